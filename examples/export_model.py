"""Export a model as one graph, and have a process that knows nothing of the gallery run it.

    python examples/export_model.py zoo/longformer exported

Writes exported/model.pt2, and exported/check.pt with ids and the logits that the model gives for them; then runs
run_exported.py on them, which imports torch alone. The graph serves every batch and length; architectures that read
block after block are exported for one length, see --fixed.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_gallery  # noqa: F401  # its models are known to AutoModel... from here on


class Logits(torch.nn.Module):
    """The model as ids to logits, so that the graph gives a tensor and no class of a library."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--length", type=int, default=256, help="tokens of the text that is checked")
    parser.add_argument("--fixed", action="store_true", help="export for texts of --length tokens alone")
    arguments = parser.parse_args()

    model = Logits(AutoModelForCausalLM.from_pretrained(arguments.model).eval())
    shape = {0: torch.export.Dim("batch")}
    if not arguments.fixed:
        shape[1] = torch.export.Dim("tokens", min=2)
    vocabulary = model.model.config.vocab_size
    traced = torch.randint(vocabulary, (2, arguments.length if arguments.fixed else 17))
    program = torch.export.export(model, (traced,), dynamic_shapes=(shape,))
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, arguments.out / "model.pt2")
    ids = torch.randint(vocabulary, (3, arguments.length))  # another batch, and another length
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids)}, arguments.out / "check.pt")
    run = Path(__file__).with_name("run_exported.py")
    subprocess.run([sys.executable, str(run), str(arguments.out)], check=True)


if __name__ == "__main__":
    main()
