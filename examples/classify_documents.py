"""Make a trained model a classifier of long documents, and ask how much of a document it needs.

    python examples/classify_documents.py zoo/longformer
    python examples/classify_documents.py zoo/longformer my_documents --length 8192

The model is a folder or a name on the Hub, any model of the gallery that classifies. The folder of documents has a
sub-folder of texts for each label. Without one documents are made up: each label has words of its own, strewn thinly
over texts of common words, so that a few lines may hold none of them. A fifth of the documents is held out; the
accuracy on them is told for the whole text and for its first quarter and sixteenth.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import hf_gallery  # noqa: F401  (registers the architectures for a folder without code)

COMMON = "the of and to in that was his it with had as her not but at on for be they have which said so".split()
WORDS = {
    "sea": "anchor gull sail tide".split(),
    "farm": "barn hay orchard plough".split(),
    "court": "clerk judge oath verdict".split(),
}


def made_up(length, count=1600, thinly=0.1):
    """(text, label) of `count` documents of about `length` characters."""
    draw = random.Random(0)
    for number in range(count):
        label = list(WORDS)[number % len(WORDS)]
        words = draw.choices(COMMON, k=length // 4)
        yield " ".join(draw.choice(WORDS[label]) if draw.random() < thinly else x for x in words), label


def texts_of(folder):
    """(text, label) of all files in the sub-folders."""
    for path in sorted(folder.glob("*/**/*")):
        if path.is_file() and not path.name.startswith("."):
            yield path.read_text(encoding="utf-8"), path.relative_to(folder).parts[0]


def tokenized(rows, labels, tokenizer, length):
    """Rows input_ids, label of the first `length` tokens of each text."""
    return Dataset.from_list(
        [{"input_ids": tokenizer(text)["input_ids"][:length], "label": labels.index(label)} for text, label in rows]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(
        "--length", type=int, help="tokens of a document that are read, at most; default 4096, of those made up 256"
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", default="my_document_classifier")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    length = arguments.length or (256 if arguments.folder is None else 4096)
    rows = list(made_up(length) if arguments.folder is None else texts_of(arguments.folder))
    labels = sorted({label for _, label in rows})
    if len(labels) < 2:
        parser.error(
            f"{arguments.folder} has {len(labels)} sub-folders with texts; give one for each label, 2 or more"
        )
    random.Random(0).shuffle(rows)
    held_out, train = rows[: max(1, len(rows) // 5)], rows[max(1, len(rows) // 5) :]
    model = AutoModelForSequenceClassification.from_pretrained(
        arguments.model,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    if model.config.n_positions < length:
        parser.error(f"{arguments.model} has {model.config.n_positions} positions; give a --length within them")
    trainer = Trainer(
        model,
        TrainingArguments(
            f"{arguments.out}/checkpoints",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.batch,
            per_device_eval_batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            warmup_steps=arguments.steps // 10,
            train_sampling_strategy="group_by_length",
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=tokenized(train, labels, tokenizer, length),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(-1) == p.label_ids))},
    )
    trainer.train()
    trainer.save_model(arguments.out)
    print(f"{len(held_out)} documents held out, {len(labels)} labels: {1 / len(labels):.3f} right by guessing")
    for part in (length, length // 4, length // 16):
        found = trainer.evaluate(tokenized(held_out, labels, tokenizer, max(1, part)))
        print(f"of the first {part:,} tokens {found['eval_accuracy']:.3f} right")


if __name__ == "__main__":
    main()
