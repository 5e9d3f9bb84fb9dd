"""Fine-tune a classifier with transformers' own Trainer: which module does a piece of Python's library come from?

    python examples/fine_tune.py --variant transformer_xl --steps 200

The texts are sources of the standard library, so nothing is downloaded. Examples are independent here, so no state is
carried from one to the next: for documents longer than a step see train_on_folder.py.
"""

import argparse
import random

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer, TrainingArguments

from hf_gallery.data import byte_tokenizer, load_corpus
from hf_gallery.variants import VARIANTS


def pieces(split, modules, tokenizer, length=128):
    """Rows input_ids, label of `length` bytes of the modules' files, equally many of each module."""
    texts = [[] for _ in modules]
    for document, text in zip(split["document"], split["text"], strict=True):
        if (module := document.split("/")[0]) in modules:
            starts = range(0, len(text) - length, length)
            texts[modules.index(module)] += [text[start : start + length] for start in starts]
    count = min(map(len, texts))
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "label": label}
        for label, own in enumerate(texts)
        for text in random.Random(0).sample(own, count)
    ]
    return Dataset.from_list(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="transformer_xl", choices=list(VARIANTS))
    parser.add_argument("--modules", nargs="+", default=["asyncio", "encodings", "pydoc_data"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--out", default="my_classifier")
    arguments = parser.parse_args()

    tokenizer = byte_tokenizer()
    corpus = load_corpus("stdlib")
    examples = pieces(corpus["train"], arguments.modules, tokenizer).train_test_split(test_size=256, seed=0)
    config = VARIANTS[arguments.variant].make_config(
        vocab_size=len(tokenizer),
        num_labels=len(arguments.modules),
        hidden_size=arguments.hidden_size,
        intermediate_size=2 * arguments.hidden_size,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = Trainer(
        AutoModelForSequenceClassification.from_config(config),
        TrainingArguments(
            f"{arguments.out}/checkpoints",
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=3e-3,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=examples["train"],
        eval_dataset=examples["test"],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )
    trainer.train()
    print(f"accuracy {trainer.evaluate()['eval_accuracy']:.3f}, {1 / len(arguments.modules):.3f} by guessing")
    trainer.save_model(arguments.out)


if __name__ == "__main__":
    main()
