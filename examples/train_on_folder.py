"""Train a language model on a folder of long documents, with its memory carried from step to step.

    python examples/train_on_folder.py my_texts --variant block_recurrent_transformer --steps 1000

Every file of text in the folder is a document. Each batch row is a lane that reads its documents segment after
segment; the state goes along, and is emptied where a document ends.
"""

import argparse

from transformers import TrainingArguments

from hf_gallery.data import byte_tokenizer, load_corpus
from hf_gallery.training import SegmentTrainer
from hf_gallery.variants import VARIANTS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--variant", default="transformer_xl", choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens that each lane reads in a step")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--out", default="my_model")
    arguments = parser.parse_args()

    tokenizer = byte_tokenizer()
    corpus = load_corpus(arguments.folder)
    documents = corpus.map(
        lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text", "document"]
    )
    variant = VARIANTS[arguments.variant]
    config = variant.make_config(
        vocab_size=len(tokenizer), hidden_size=arguments.hidden_size, intermediate_size=4 * arguments.hidden_size
    )
    trainer = SegmentTrainer(
        variant.causal(config),
        TrainingArguments(
            f"{arguments.out}/checkpoints",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.lanes,
            per_device_eval_batch_size=arguments.lanes,
            learning_rate=1e-3,
            logging_steps=max(1, arguments.steps // 10),
            save_steps=max(1, arguments.steps // 4),
            save_total_limit=1,
            report_to=[],
        ),
        segment_length=arguments.length,
        train_dataset=documents["train"],
        eval_dataset=documents["test"],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_bits_per_byte"]
    trainer.train()
    print(f"bits per byte {before:.3f} before training, {trainer.evaluate()['eval_bits_per_byte']:.3f} after")
    trainer.save_model(arguments.out)


if __name__ == "__main__":
    main()
