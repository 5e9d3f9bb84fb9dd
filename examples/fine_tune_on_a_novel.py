"""Fine-tune a trained model on a novel of your own, and see what it has learned from it.

    python examples/fine_tune_on_a_novel.py zoo/block_recurrent_transformer novel.txt --steps 200

The model is a folder or a name on the Hub, any causal model of the gallery. The novel's last tenth is held out: what a
byte of it costs is printed before and after, and two pages show where predictions in it came from, before.html and
after.html. The rest is cut into as many parts as there are lanes, which are read side by side, each from its beginning
to its end, with the memory carried along.
"""

import argparse
import math
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_gallery import look
from hf_gallery.looking.page import page, words_of
from hf_gallery.training import SegmentTrainer


def parts_of(text, held_out=0.1):
    """The text to learn from and the last part, cut where a line ends if one does."""
    at = int(len(text) * (1 - held_out))
    at = text.rfind("\n", 0, at) + 1 or at
    return text[:at], text[at:]


def lanes_of(ids, lanes):
    """Rows input_ids: ids in `lanes` parts of equal length, one after the other."""
    size = math.ceil(len(ids) / lanes)
    return Dataset.from_list([{"input_ids": ids[start : start + size]} for start in range(0, len(ids), size)])


def bits_per_byte(trainer, tokenizer, ids):
    """The cost of a held-out byte, whatever the tokens are; the first token is predicted by nothing."""
    found = trainer.evaluate()
    count = len(tokenizer.decode(ids).encode()) - len(tokenizer.decode(ids[:1]).encode())
    return found["eval_bits_per_token"] * found["eval_tokens"] / count


def write_page(model, tokenizer, ids, path, title):
    found = look(model, ids)
    path.write_text(page(found, words_of(tokenizer, found.ids), title), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("novel", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens that each lane reads in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--shown", type=int, default=4000, help="held-out tokens that the pages show")
    parser.add_argument("--out", type=Path, default=Path("my_novel_model"))
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    text, last = parts_of(arguments.novel.read_text(encoding="utf-8"))
    ids, held_out = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (text, last))
    if len(held_out) < 2 or len(ids) < 2 * arguments.lanes:
        parser.error(f"{arguments.novel} has {len(ids) + len(held_out)} tokens, too few to learn from; give a novel")
    trainer = SegmentTrainer(
        model,
        TrainingArguments(
            f"{arguments.out}/checkpoints",
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.lanes,
            per_device_eval_batch_size=1,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to=[],
        ),
        segment_length=arguments.length,
        train_dataset=lanes_of(ids, arguments.lanes),
        eval_dataset=Dataset.from_list([{"input_ids": held_out}]),
        processing_class=tokenizer,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    before = bits_per_byte(trainer, tokenizer, held_out)
    shown = held_out[: arguments.shown]
    write_page(model, tokenizer, shown, arguments.out / "before.html", f"{arguments.novel.name}, before fine-tuning")
    trainer.train()
    after = bits_per_byte(trainer, tokenizer, held_out)
    write_page(model, tokenizer, shown, arguments.out / "after.html", f"{arguments.novel.name}, after fine-tuning")
    trainer.save_model(arguments.out)
    print(f"held out: {before:.3f} bits per byte before, {after:.3f} after")
    print(f"{arguments.out / 'before.html'} and {arguments.out / 'after.html'} show where they came from")


if __name__ == "__main__":
    main()
