"""One run by several processes: `accelerate launch --num_processes N -m eval` shares the cells out over N GPUs.

Cells are independent of each other, so each process measures its own ones as if it were alone, on its own device, and
all write into the same folder. That keeps every number what one process would measure, which splitting batches over
devices would not, and small models gain more by it.
"""

from __future__ import annotations

import dataclasses
import os

import psutil
import torch
from accelerate.utils import str_to_bool

# Variables by which launchers tell a process of the others; a Trainer that read it would join them in training one
# model.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ACCELERATE = "ACCELERATE_"  # begins what accelerate tells: precision, compilation and more, which the preset decides
USE_CPU = ACCELERATE + "USE_CPU"
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `of` processes, of which `here` share this machine; 0 is the main one, which measures the costs and
    collects the results."""

    rank: int = 0
    of: int = 1
    here: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share_cores(self) -> None:
        """Torch takes this process's share of the machine's cores. One process alone leaves torch as it is."""
        if self.of > 1:
            torch.set_num_threads(max(1, cores() // self.here))

    def take_all_cores(self) -> None:
        """Torch takes what it would take for one process alone, once the others are done."""
        if self.of > 1:
            torch.set_num_threads(cores())


def this_process() -> Process:
    """Finds this process among those that accelerate or torchrun launched. From then on it is alone, with one GPU of
    its own if there are any, shared where processes are more: call this before anything asks torch for one."""
    found = {name: os.environ.pop(name, None) for name in LAUNCHED}
    told = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(ACCELERATE)}
    if str_to_bool(told.get(USE_CPU, "false")):
        os.environ[DEVICES] = ""
    visible = os.environ.get(DEVICES)
    devices = [str(i) for i in range(torch.cuda.device_count())] if visible is None else visible.split(",")
    if any(devices):  # also for a process alone: a Trainer that saw more than one GPU would split its batches
        os.environ[DEVICES] = devices[int(found["LOCAL_RANK"] or 0) % len(devices)]
    of = int(found["WORLD_SIZE"] or 1)
    return Process(int(found["RANK"] or 0), of, int(found["LOCAL_WORLD_SIZE"] or of))


def cores() -> int:
    """The cores that this process may run on; two threads of one core count once, as torch counts by itself."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return min(cores, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else cores
