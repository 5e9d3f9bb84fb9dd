"""Training in two processes on CPUs (torchrun, gloo) gives the losses and weights of one process with the same global
batch. SegmentTrainer in two processes, with lanes of their own, is in test_training.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from test_trainer import COLLATORS, FIVE, examples, make, trainer
from test_training import NO_DROPOUT, losses, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

GLOBAL_BATCH = 4


def by_trainer(variant, folder, rank, processes):
    """transformers' Trainer, which wraps the model in DistributedDataParallel where there are several processes."""
    changes = {"per_device_train_batch_size": GLOBAL_BATCH // processes, "max_grad_norm": 1.0}
    own = trainer(make(variant, **NO_DROPOUT), "causal", folder, **changes)
    own.train()
    assert isinstance(own.model_wrapped, torch.nn.parallel.DistributedDataParallel) == (processes > 1)
    return {"losses": losses(own), "weights": weights(own.model)}


def in_shards(variant, folder, rank, processes):
    """torch's own FSDP2, each layer a unit, in a plain loop: accelerate, and so Trainer, uses FSDP on GPUs only and
    takes DDP on CPUs without a word (accelerate/state.py, 1.15)."""
    model = make(variant, **NO_DROPOUT).train()
    if processes > 1:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rows = [{"input_ids": row["input_ids"]} for row in examples("causal", GLOBAL_BATCH)]
    batch = COLLATORS["causal"](rows)
    tokens = batch["labels"][:, 1:].ne(-100).sum()
    mine = {name: x[rank::processes] for name, x in batch.items()}
    found = []
    for _ in range(4):
        loss = model(**mine, num_items_in_batch=tokens).loss
        (processes * loss).backward()  # FSDP takes the mean over processes, and each has a part of the sum
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if processes > 1:
            torch.distributed.all_reduce(total)
        found.append(total.item())
    whole = {name: p.full_tensor() if processes > 1 else p for name, p in model.named_parameters()}
    return {"losses": found, "weights": {name: p.detach().clone() for name, p in whole.items()}}


ONE_OF_TWO = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
import test_distributed
from test_trainer import FIVE
rank = torch.distributed.get_rank()
for variant in FIVE:
    for way in ("by_trainer", "in_shards"):
        folder = Path(sys.argv[2]) / variant.name / way
        folder.mkdir(parents=True, exist_ok=True)
        result = getattr(test_distributed, way)(variant, folder, rank, processes=2)
        torch.save(result, folder / f"result_{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.works("Trainer, 2 processes (DDP)", *(variant.name for variant in FIVE))
@pytest.mark.works("FSDP by fully_shard", *(variant.name for variant in FIVE))
def test_two_processes_train_as_one(tmp_path):
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, here, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for variant in FIVE:
        for way in (by_trainer, in_shards):
            one = way(variant, tmp_path / "one", rank=0, processes=1)
            assert len(set(one["losses"])) == 4, "it learned"
            for rank in (0, 1):
                two = torch.load(tmp_path / variant.name / way.__name__ / f"result_{rank}.pt", weights_only=True)
                assert two["losses"] == pytest.approx(one["losses"], rel=1e-4), (variant.name, way.__name__)
                assert two["weights"].keys() == one["weights"].keys()
                for name, value in one["weights"].items():
                    torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5)
