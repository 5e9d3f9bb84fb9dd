"""One run by several processes: `accelerate launch --num_processes N -m eval` shares the cells out over N GPUs.

Cells are independent of each other, so each process measures its own ones as if it were alone, on its own device, and
all write into the same folder. That keeps every number what one process would measure, which splitting batches over
devices would not, and small models gain more by it.
"""

from __future__ import annotations

import dataclasses
import os

# What launchers tell a process of the others; a Trainer that read it would join them in training one model.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Process:
    """One of `of` processes; 0 is the main one, which measures the costs and collects the results."""

    rank: int = 0
    of: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def this_process() -> Process:
    """Which process this is, of those that accelerate or torchrun launched. From then on it is alone, with one GPU of
    its own if there are any: call this before anything asks torch for one."""
    found = {name: os.environ.pop(name, None) for name in LAUNCHED}
    process = Process(int(found["RANK"] or 0), int(found["WORLD_SIZE"] or 1))
    if process.of > 1:
        local = int(found["LOCAL_RANK"] or 0)
        visible = [device for device in os.environ.get(DEVICES, "").split(",") if device]
        os.environ[DEVICES] = visible[local % len(visible)] if visible else str(local)
    return process
