"""Run an exported model where neither the gallery nor transformers is loaded, and compare its numbers.

    python examples/run_exported.py exported

What export_model.py wrote: model.pt2, and check.pt with ids and the logits that the model gave for them. Fails if they
differ, or if anything has loaded the libraries that the model was made with.
"""

import argparse
import sys
from pathlib import Path

import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()

    run = torch.export.load(arguments.folder / "model.pt2").module()
    check = torch.load(arguments.folder / "check.pt", weights_only=True)
    logits = run(check["ids"]).detach()
    # Of float32, whose sums another order of the same numbers moves, the more the larger the logits are.
    largest = float(check["logits"].abs().max())
    torch.testing.assert_close(logits, check["logits"], rtol=0, atol=1e-5 * max(1.0, largest))
    loaded = sorted({"hf_gallery", "transformers"} & set(sys.modules))
    if loaded:
        raise SystemExit(f"loaded here: {', '.join(loaded)}; an exported model needs torch alone")
    difference = float((logits - check["logits"]).abs().max())
    batch, tokens = check["ids"].shape
    print(f"{batch} rows of {tokens} tokens without hf_gallery: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
