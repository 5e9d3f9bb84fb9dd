"""Makes the checkpoints and outputs in tests/golden/transformer_xl_authors with the authors' own code.

    git clone https://github.com/kimiyoung/transformer-xl
    python tests/golden/make_transformer_xl_authors.py transformer-xl/pytorch

It needs torch, numpy and safetensors, and was run on commit 44781ed with torch 2.13.0. The code is imported from the
checkout as it stands. It is from 2019, so three things around it are set:

- torch.version.cuda, which one of its modules takes apart when it is imported, though nothing depends on it: None in
  a torch without CUDA.
- Tensor.byte gives bool: its masks are bytes, which masked_fill no longer takes.
- keep_order of the adaptive softmax is True, so that losses stand in the order of the words and not of the clusters.

Each case is a folder: model.pt, the state_dict; options.json, what convert() must be told; outputs.safetensors, with
the ids of 2 rows and one word more than four segments of 7, and for each segment, its memory carried from the one
before, the next words' negative log-likelihoods and the hidden states before the first and after every layer; for the
last one also the log-probability of every word. All but the hidden states' first axis is rows, then time.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch
from loud import loud
from safetensors.torch import save_file

OUT = Path(__file__).parent / "transformer_xl_authors"
VOCAB, LAYERS, ROWS, SEGMENT, SEGMENTS = 97, 2, 2, 7, 4
PLAIN = dict(d_embed=16, div_val=1, cutoffs=[], tie_projs=[False])
ADAPTIVE = dict(d_embed=16, cutoffs=[20, 50], tie_projs=[False, True, True])
# As the large model for WikiText-103: 64, 16, 4 and 1 wide.
DIV_4 = dict(d_embed=64, div_val=4, cutoffs=[13, 29, 60], tie_projs=[False, True, True, True])
CASES = {
    "plain": PLAIN | dict(mem_len=8),
    "plain_projected": PLAIN | dict(mem_len=5, d_embed=10),
    "div_1": ADAPTIVE | dict(mem_len=5, div_val=1),
    "div_1_projected": ADAPTIVE | dict(mem_len=5, div_val=1, d_embed=10),
    "div_2": ADAPTIVE | dict(mem_len=5, div_val=2),
    "div_4": DIV_4 | dict(mem_len=5),
    "clamp": ADAPTIVE | dict(mem_len=11, div_val=1, clamp_len=4),
    "same_length": ADAPTIVE | dict(mem_len=6, div_val=2, same_length=True),
    "same_length_clamp": DIV_4
    | dict(mem_len=20, clamp_len=6, same_length=True),  # as eval.py is run; 3 segments fill it
    "pre_lnorm": ADAPTIVE | dict(mem_len=5, div_val=2, pre_lnorm=True),
    "no_memory": ADAPTIVE | dict(mem_len=0, div_val=2),
}


def the_authors_model(checkout):
    """Their class, from the checkout."""
    torch.version.cuda = torch.version.cuda or "10.0"
    torch.Tensor.byte = torch.Tensor.bool
    sys.path[:0] = [str(checkout), str(checkout / "utils")]
    return importlib.import_module("mem_transformer").MemTransformerLM


@torch.no_grad()
def outputs_of(model, ids):
    """The model's results for one segment after the other."""
    outputs, mems, states = {"ids": ids}, (), []
    model.layers[0].register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0]))
    for layer in model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: states.append(output))
    for i in range(SEGMENTS):
        part, target = (ids[:, i * SEGMENT + k :][:, :SEGMENT].T.contiguous() for k in (0, 1))
        loss, *mems = model(part, target, *mems)
        outputs[f"nll.{i}"] = loss.T
        outputs[f"hidden_states.{i}"] = torch.stack(states).transpose(1, 2)
        hidden = states[-1].transpose(0, 1).reshape(-1, states[-1].shape[-1])
        states.clear()
    every = torch.arange(VOCAB).repeat(len(hidden))
    nll = model.crit(hidden.repeat_interleave(VOCAB, dim=0), every)
    outputs[f"log_probabilities.{SEGMENTS - 1}"] = -nll.view(ROWS, SEGMENT, VOCAB)
    return outputs


def make(kind, name, settings, seed):
    settings = dict(clamp_len=-1, same_length=False, pre_lnorm=False) | settings
    model = kind(
        n_token=VOCAB, n_layer=LAYERS, n_head=2, d_model=16, d_head=6, d_inner=20, dropout=0.0, dropatt=0.0,
        tie_weight=True, tgt_len=SEGMENT, ext_len=0, attn_type=0, sample_softmax=-1, **settings,
    )  # fmt: skip
    loud(model, seed).crit.keep_order = True
    ids = torch.randint(0, VOCAB, (ROWS, SEGMENT * SEGMENTS + 1), generator=torch.Generator().manual_seed(seed))
    told = ("mem_len", "clamp_len", "same_length", "pre_lnorm")
    options = {"segment_length": SEGMENT} | {option: settings[option] for option in told}
    if settings["div_val"] == 1 and settings["cutoffs"]:
        options["cutoffs"] = settings["cutoffs"]
    (OUT / name).mkdir(parents=True)
    torch.save(model.state_dict(), OUT / name / "model.pt")
    (OUT / name / "options.json").write_text(json.dumps(options) + "\n")
    outputs = {key: x.contiguous() for key, x in outputs_of(model, ids).items()}
    save_file(outputs, OUT / name / "outputs.safetensors")


def main():
    torch.set_num_threads(1)
    kind = the_authors_model(Path(sys.argv[1]).resolve())
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, (name, settings) in enumerate(CASES.items()):
        make(kind, name, settings, seed)


if __name__ == "__main__":
    main()
