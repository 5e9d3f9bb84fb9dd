"""The attention kernels compiled for GPUs that need not be there: registers, spilled bytes and shared memory.

    python -m eval.compiled --arch 80 --heads 64,128 --kernels forward,keys

prints a line of JSON for each kernel. triton.compile takes a target, and triton brings ptxas. Needs torch and triton
only, and a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_gallery.models import attention_decode, gate_triton, search_triton, unit_triton
from hf_gallery.models import attention_triton as kernels

FUNCTIONS = {
    "forward": kernels._forward,
    "queries": kernels._backward_queries,
    "keys": kernels._backward_keys,
    "diagonals": kernels._backward_diagonals,
    "products": kernels._products,
    "decode": attention_decode._decode,
    "ring": attention_decode._decode,
    "join": attention_decode._join,
    "unit": unit_triton._unit,
    "unit_backward": unit_triton._unit_backward,
    "numbers": search_triton._numbers,
    "found": search_triton._found,
    "attend_found": search_triton._attend,
    "attend_many": search_triton._attend,
    "gate": gate_triton._gate,
    "gate_lstm": gate_triton._gate,
}
LAUNCHED = {
    "found": search_triton.FOUND,
    "attend_found": search_triton.PICKED,
    "attend_many": search_triton.PICKED,
    "gate": gate_triton.NUMBERS,
    "gate_lstm": gate_triton.NUMBERS,
}
# Else all three.
TERMS = {"diagonals": ["bias"], "products": ["relative"]} | dict.fromkeys(
    ("join", "unit", "unit_backward", "numbers", *LAUNCHED), ["none"]
)
KINDS = {"half": torch.bfloat16, "float": torch.float32, "tf32": torch.float32}
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Integers that the launcher finds to be multiples of 16 where a model's sizes are: all strides of tensors.
STRIDE = re.compile(r"[qkvp]_[bhts]|d?term_[bh]|spans_b|table_h|[TS]")


def compile_for(
    arch: int, kernel: str, kind: torch.dtype, head: int, term: str, precision: str = "ieee"
) -> dict[str, Any]:
    """Resources that a kernel takes of a GPU of compute capability arch / 10, launched as `attend` would."""
    function = FUNCTIONS[kernel]
    if kernel in ("decode", "ring", "join", "unit", "unit_backward"):
        tiles = kernels._Tiles(1, attention_decode.keys_of(head), attention_decode.WARPS, 3)
    elif kernel == "numbers":
        tiles = search_triton.tiles_for(kind, head)
    elif kernel in LAUNCHED:
        tiles = LAUNCHED[kernel]
    else:
        tiles = kernels.tiles_of(kernel, kind, head, 4096, arch >= 90)
    block = kernels._block(head)
    constants: dict[str, Any] = dict(
        D=head, DV=head, BLOCK_D=block, BLOCK_DV=block, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, TERM=term != "none",
        DROPOUT=False, PRECISION=precision, PUT_TERM=term == "relative", RING=kernel == "ring",
        SPLITS=attention_decode.MOST_SPLITS, ROWS=unit_triton._ROWS, SIZED=True, EPS=unit_triton.EPSILON,
        BLOCK_K=search_triton.MOST_FOUND if kernel == "attend_many" else 32, LSTM=kernel == "gate_lstm", ASKED=True,
    )  # fmt: skip
    if kernel in ("decode", "ring"):
        constants["TERM"] = term
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: _type(name, kernel, NAMES[kind], term, constants) for name in function.arg_names}
    sheared = {"term_t", "term_base"} if term == "relative" else set()
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or (type_ == "i32" and (STRIDE.fullmatch(name) or name in sheared))
    }
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    start = time.time()
    made = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=places, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options=dict(num_warps=tiles.warps, num_stages=tiles.stages),
    )
    said = _assembled(made.asm["ptx"], arch)
    registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers and spilled, said
    return {
        "arch": arch,
        "kernel": kernel,
        "kind": "tf32x3" if precision == "tf32x3" else NAMES[kind],
        "head": head,
        "term": term,
        "tiles": tuple(tiles),
        "registers": int(registers.group(1)),
        "spilled": int(spilled.group(1)),
        "shared": made.metadata.shared,
        "seconds": round(time.time() - start, 1),
    }


def _type(name: str, kernel: str, kind: str, term: str, constants: dict[str, Any]) -> str:
    """The type of an argument in Triton's notation."""
    if name in constants:
        return "constexpr"
    whole = ("lower", "upper", "seed_ptr", "newest_ptr", "best_ptr", "columns_ptr")
    if name in whole or (kernel, name) == ("numbers", "out_ptr"):
        return "*i64"
    if name == "plan":
        return "*i32"
    if name == "done_ptr":
        return "*i1"
    sums = ("lse_ptr", "lse2_ptr", "offset_ptr", "sums_ptr", "scores_ptr", "parts_ptr", "size_ptr", "along_ptr")
    if name in (*sums, "weights_ptr") or (name in ("term", "table") and term == "bias"):
        return "*fp32"
    if name.endswith("_ptr") or name in ("term", "table"):
        return f"*{kind}"
    return "fp32" if name in ("scale", "scale2", "dropout") else "i32"


def _assembled(ptx: str, arch: int) -> str:
    """Report of ptxas on a kernel."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = "sm_90a" if arch == 90 else f"sm_{arch}"
        command = [str(program), "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main():
    """Compiles the kernels that the command line asks for, and prints what each takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--heads", default="64,128,256")
    parser.add_argument("--kernels", default=",".join(FUNCTIONS))
    parser.add_argument("--kinds", default=",".join(KINDS))
    chosen = parser.parse_args()
    for kind in chosen.kinds.split(","):
        for head in map(int, chosen.heads.split(",")):
            for kernel in chosen.kernels.split(","):
                if kind == "tf32" and head > kernels.TF32.get(kernel, 0):
                    continue
                for term in TERMS.get(kernel, ["none", "bias", "relative"]):
                    precision = "tf32x3" if kind == "tf32" else "ieee"
                    made = compile_for(chosen.arch, kernel, KINDS[kind], head, term, precision)
                    print(json.dumps(made), flush=True)


if __name__ == "__main__":
    main()
