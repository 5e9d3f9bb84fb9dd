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
    torch.testing.assert_close(logits, check["logits"], rtol=1e-4, atol=1e-5)
    loaded = sorted({"hf_gallery", "transformers"} & set(sys.modules))
    if loaded:
        raise SystemExit(f"loaded here: {', '.join(loaded)}; an exported model needs torch alone")
    difference = float((logits - check["logits"]).abs().max())
    batch, tokens = check["ids"].shape
    print(f"{batch} rows of {tokens} tokens without hf_gallery: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
