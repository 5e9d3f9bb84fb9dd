"""Ask a saved model how far back it remembers, through lm-eval, in Python.

    python examples/evaluate_memory.py my_model --examples 100

The same questions as the task group gallery_memory asks on the command line (`hf-gallery eval`), at distances of your
own choice.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gallery.data import chance
from hf_gallery.harness import score


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--distances", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--examples", type=int, default=100)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    levels = {
        str(d): ("verbatim_copy", {"length": d + 6, "distances": [d], "num_symbols": 4, "alphabet": 8})
        for d in arguments.distances
    }
    found = score(model, levels, examples=arguments.examples, tokenizer=AutoTokenizer.from_pretrained(arguments.model))
    for distance, counts in found.items():
        task, given = levels[distance]
        right = counts["correct"] / counts["asked"]
        print(
            f"{distance} tokens back: {right:.0%} right of {counts['asked']}, {chance(task, **given):.1%} by guessing"
        )


if __name__ == "__main__":
    main()
