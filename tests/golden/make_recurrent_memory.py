"""Makes the weights and outputs in tests/golden/recurrent_memory with the authors' two codes.

    git clone https://github.com/booydar/recurrent-memory-transformer && git clone https://github.com/booydar/LM-RMT
    python tests/golden/make_recurrent_memory.py recurrent-memory-transformer LM-RMT/pytorch

It needs torch, transformers and safetensors, and was run on the commits 9d0ebe1 and e289508 with torch 2.14.1 and
transformers 5.24.0. Both are imported from their checkouts as they stand.

gpt2.safetensors: MemoryCell and RecurrentWrapper of modeling_rmt/language_modeling.py around transformers' GPT-2, on 2
rows of four segments of 7 tokens and a part: weights, ids, logits, the memory that each segment begins with, the loss
against the ids, and its gradients.

lm_rmt.safetensors: MemTransformerLM of mem_transformer.py with absolute positions (attn_type=2) and without its
memory of hidden states, the read and the written memory each seeing itself, on whole segments: weights, ids, hidden
states and memories. Around the code, which is of 2019 in parts, these are set: torch.version.cuda and Tensor.byte as
in make_transformer_xl_authors.py; and positions, which it counts from the end of a segment down to 0, are counted from
its beginning, as in the gallery.
"""

import importlib
import sys
from pathlib import Path

import torch
from loud import loud
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

OUT = Path(__file__).parent / "recurrent_memory"
VOCAB, LENGTH, TOKENS = 29, 7, 3


def ids_of(count, seed):
    return torch.randint(0, VOCAB, (2, count), generator=torch.Generator().manual_seed(seed))


def gpt2(checkout):
    sys.path.insert(0, str(checkout / "modeling_rmt"))
    code = importlib.import_module("language_modeling")
    sizes = dict(vocab_size=VOCAB, n_positions=16, n_embd=12, n_layer=2, n_head=2, n_inner=20)
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    cell = code.MemoryCell(loud(base, 1), TOKENS)
    with torch.no_grad():
        cell.memory.copy_(torch.randn(cell.memory.shape, generator=torch.Generator().manual_seed(2)))
    memories = []
    cell.register_forward_pre_hook(
        lambda _, given, named: memories.append(named.get("memory_state")), with_kwargs=True
    )
    ids = ids_of(4 * LENGTH + 3, seed=3)
    out = code.RecurrentWrapper(cell, segment_size=LENGTH)(ids, labels=ids)
    out["loss"].backward()
    tensors = {"input_ids": ids, "logits": out["logits"], "loss": out["loss"]}
    tensors |= {f"memory.{i}": x for i, x in enumerate(memories) if x is not None}
    for name, parameter in cell.named_parameters():
        name = name.removeprefix("model.")
        tensors |= {f"weight.{name}": parameter, f"grad.{name}": parameter.grad}
    return tensors


@torch.no_grad()
def lm_rmt(checkout):
    torch.version.cuda = torch.version.cuda or "10.0"
    torch.Tensor.byte = torch.Tensor.bool
    sys.path[:0] = [str(checkout), str(checkout / "utils")]
    code = importlib.import_module("mem_transformer")
    model = code.MemTransformerLM(
        n_token=VOCAB, n_layer=2, n_head=2, d_model=12, d_head=6, d_inner=20, dropout=0.0, dropatt=0.0, d_embed=12,
        tie_weight=True, tgt_len=LENGTH, ext_len=0, mem_len=0, attn_type=2, num_mem_tokens=TOKENS, mem_at_end=True,
    )  # fmt: skip
    loud(model, 4)
    count = model.pos_emb.forward
    model.pos_emb.forward = lambda positions, *more: count(positions.flip(0), *more)
    ids = ids_of(4 * LENGTH, seed=5)
    tensors = {"input_ids": ids}
    memory = model.mem_tokens.expand(-1, len(ids), -1)
    for i, part in enumerate(ids.split(LENGTH, dim=1)):
        hidden, _ = model._forward(part.T.contiguous(), mem_tokens=memory)
        memory = hidden[-TOKENS:]
        tensors |= {f"hidden.{i}": hidden[TOKENS:-TOKENS].transpose(0, 1), f"memory.{i + 1}": memory.transpose(0, 1)}
    return tensors | {f"weight.{name}": parameter for name, parameter in model.named_parameters()}


def main():
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    for name, tensors in (("gpt2", gpt2(Path(sys.argv[1]))), ("lm_rmt", lm_rmt(Path(sys.argv[2])))):
        save_file({key: x.detach().contiguous().clone() for key, x in tensors.items()}, OUT / f"{name}.safetensors")


if __name__ == "__main__":
    main()
