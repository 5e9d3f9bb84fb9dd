"""The checkpoint that a run resumes from: the newest that is whole.

A kill, or a disk that is full, may cut the writing of a checkpoint off anywhere. It is whole when all files that a run
needs to go on bit for bit are there and read; what else stands in the folder does not matter.

    trainer_state.json            written last
    model.safetensors             or what stands for it, see WEIGHTS
    optimizer.pt, scheduler.pt    of all processes
    rng_state.pth                 or of several processes rng_state_RANK.pth
    config.json and the like      those that are there
    lanes_RANK.json               position and setup of a process
    lanes_RANK.safetensors        its cache, if it had one
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import TrainerState
from transformers.trainer import safe_globals
from transformers.trainer_utils import sort_checkpoints

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
LANES_FILE = "lanes_{rank}.json"
CACHE_FILE = "lanes_{rank}.safetensors"
LANES_ENTRIES = ("position", "setup", "config", "cache")

# Any one of each; where a model is sharded by FSDP or DeepSpeed, a folder holds what a file holds elsewhere.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "adapter_model.safetensors", "adapter_model.bin", "*/adapter_model.safetensors", "*/adapter_model.bin",
    "pytorch_model_fsdp*", "global_step*",
)  # fmt: skip
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")
SCHEDULER = ("scheduler.pt", "global_step*")
# How the names of settings begin; what a user has put beside them is no part of the checkpoint.
SETTINGS = (
    "config.json", "generation_config.json", "adapter_config.json", "tokenizer", "special_tokens_map", "added_tokens",
    "model.safetensors.index", "pytorch_model.bin.index",
)  # fmt: skip


class NotWholeError(ValueError):
    """A checkpoint that lacks a file, or has one that does not read; the message completes "it ..."."""


def newest_whole(folder: str | os.PathLike) -> str | None:
    """The newest whole checkpoint in a folder, None if there is none. A warning names each newer one and says why it
    is passed over."""
    for path in reversed(sort_checkpoints(os.fspath(folder))):
        try:
            check_whole(path)
        except NotWholeError as error:
            logger.warning("checkpoint %s is passed over: it %s", path, error)
        else:
            return path
    return None


def check_whole(folder: str | os.PathLike) -> None:
    """Raises NotWholeError unless a checkpoint of a SegmentTrainer is whole."""
    folder = Path(folder)
    _read(folder / TRAINER_STATE, lambda path: TrainerState.load_from_json(str(path)))
    for path in sorted(folder.rglob("*.json")):
        if path.name.startswith(SETTINGS):
            _read(path, _read_json)
    _one_of(folder, WEIGHTS, "weights")
    processes = read_lanes(folder, 0)["setup"]["world_size"]
    _one_of(folder, OPTIMIZER, "state of the optimizer")
    _one_of(folder, SCHEDULER, "state of the scheduler")
    for rank in range(processes):
        _read(folder / ("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth"), _read_torch)
        if read_lanes(folder, rank)["cache"]:
            _read(folder / CACHE_FILE.format(rank=rank), _read_safetensors)


def read_lanes(folder: str | os.PathLike, rank: int) -> dict[str, Any]:
    """Reads a process's lanes file. Raises NotWholeError if that is missing or no such thing."""
    path = Path(folder) / LANES_FILE.format(rank=rank)
    lanes = _read(path, _read_json)
    if not isinstance(lanes, dict) or not all(name in lanes for name in LANES_ENTRIES):
        raise NotWholeError(f"has a {path.name} without {', '.join(LANES_ENTRIES)}")
    if not isinstance(lanes["setup"], dict) or not isinstance(lanes["setup"].get("world_size"), int):
        raise NotWholeError(f"has a {path.name} whose setup names no world_size")
    return lanes


def _one_of(folder: Path, patterns: tuple[str, ...], what: str) -> None:
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    if not found:
        raise NotWholeError(f"has no {what}, none of {', '.join(patterns)}")
    for path in found:
        if path.name.endswith(".index.json"):
            names = _read(path, lambda path: set(_read_json(path)["weight_map"].values()))
            for name in sorted(names):
                _read(path.with_name(name), _READERS[Path(name).suffix])
        elif path.is_file():
            _read(path, _READERS[path.suffix])


def _read(path: Path, reader: Any) -> Any:
    """Reads a file by a reader. A reader of broken bytes may raise anything."""
    if not path.is_file():
        raise NotWholeError(f"has no {path.name}")
    try:
        return reader(path)
    except Exception as error:
        said = " ".join(str(error).split())
        raise NotWholeError(f"has a {path.name} that does not read ({type(error).__name__}: {said[:120]})") from error


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _read_torch(path: Path) -> None:
    with safe_globals():
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # nothing is copied: it is large


def _read_safetensors(path: Path) -> None:
    with safe_open(path, "pt"):  # its header says how long the file must be
        pass


_READERS = {".pt": _read_torch, ".pth": _read_torch, ".bin": _read_torch, ".safetensors": _read_safetensors}
