"""Fine-tune on short documents that TRL packs into rows, and see that packed documents do not see each other.

    python examples/pack_documents.py zoo/longformer notes.txt --steps 100

Every paragraph of the text is a document. Packing lays several behind one another in a row, so that nothing is spent
on padding; before training, the logits of a packed row are compared with those of each document alone, and with those
of the same row read as one text.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_gallery  # noqa: F401  # its models are known to AutoModel... from here on


@torch.no_grad()
def differences(model, batch):
    """(documents in the batch, the largest difference of a logit from that of its document alone, and from that of
    the row as one text)."""
    packed, row = model(**batch | {"labels": None}).logits[0], batch["input_ids"]
    documents = row[0].split(batch["cu_seq_lens_q"].diff().tolist())
    alone = torch.cat([model(document[None]).logits[0] for document in documents])
    return len(documents), float((packed - alone).abs().max()), float((packed - model(row).logits[0]).abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", default="my_packed_model")
    arguments = parser.parse_args()

    paragraphs = [x.strip() for x in arguments.text.read_text(encoding="utf-8").split("\n\n") if x.strip()]
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model),
        SFTConfig(
            f"{arguments.out}/checkpoints",
            packing=True,
            max_length=arguments.length,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.rows,
            learning_rate=3e-4,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_dict({"text": paragraphs}),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    count, from_alone, from_one_text = differences(trainer.model.eval(), batch)
    print(f"{count} documents in {batch['input_ids'].shape[1]:,} tokens, without padding")
    print(f"logits differ by {from_alone:.1e} from those of each alone, by {from_one_text:.1e} if read as one text")
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    trainer.save_model(arguments.out)


if __name__ == "__main__":
    main()
