"""Training in two processes on CPUs (torchrun, gloo) gives the losses and weights of one process with the same global
batch. SegmentTrainer in two processes, with lanes of their own, is in test_training.py."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed
from renamed import checkpointing
from test_trainer import COLLATORS, FIVE, examples, make, trainer
from test_training import NO_DROPOUT, arguments, dataset, losses, texts, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from variants import VARIANTS, assert_equal, over, runner, words

from hf_gallery.training import SegmentTrainer

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


def run_in_two(program, folder):
    """Runs a program in two processes, which are given this folder and another to write into."""
    script = folder / "one_of_two.py"
    script.write_text(program)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, here, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr


BLOCK = 8
DOCUMENTS = [17, 3, 40, 8, 21, 1, 33, 5, 16, 29]  # tokens; some end within a block, one has nothing to predict


def some_parts_idle(folder):
    """Makers of the trainers of runs in which not every batch uses every parameter, by names of the runs."""
    model = {v.name: v for v in VARIANTS}

    def plain(head, variant, again, **settings):
        changes = {"per_device_train_batch_size": 2, "max_steps": 4} | checkpointing(again)
        return trainer(make(model[variant], head, **NO_DROPOUT | settings), head, folder, **changes)

    def segments(length, variant="block_recurrent", again=True):
        changes = {"max_steps": 6, "per_device_train_batch_size": 1} | checkpointing(again)
        sizes = {"segment_length" if variant == "recurrent_memory" else "block_length": BLOCK}
        own = model[variant].make(**sizes, **NO_DROPOUT)
        documents = dataset(texts(*DOCUMENTS))
        return SegmentTrainer(own, arguments(folder, **changes), segment_length=length, train_dataset=documents)

    runs = {f"segments of {n}": partial(segments, n) for n in (BLOCK, 2 * BLOCK, 20, 3)}
    runs["segments, activations kept"] = partial(segments, 20, again=False)
    runs["segments, an LSTM gate"] = partial(segments, 20, "block_recurrent_lstm_dual")
    runs["segments, feedback"] = partial(segments, 20, "block_recurrent_feedback")
    runs["segments with memory tokens"] = partial(segments, 20, "recurrent_memory")
    for again in (False, True):
        activations = "computed again" if again else "kept"
        runs[f"short texts, activations {activations}"] = partial(
            plain, "causal", "block_recurrent", again, block_length=64
        )
        runs[f"one segment, activations {activations}"] = partial(
            plain, "causal", "recurrent_memory", again, segment_length=64
        )
        runs[f"no global tokens, activations {activations}"] = partial(plain, "masked", "longformer", again)
    return runs


def with_idle_parts(folder, rank, processes):
    """The losses of each of these runs."""
    found = {}
    for name, made in some_parts_idle(folder).items():
        own = made()
        own.train()
        assert isinstance(own.model_wrapped, torch.nn.parallel.DistributedDataParallel) == (processes > 1)
        found[name] = losses(own)
    return found


IDLE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
import test_distributed
rank = torch.distributed.get_rank()
torch.save(test_distributed.with_idle_parts(sys.argv[2], rank, 2), f"{sys.argv[2]}/idle_{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.works("Trainer, 2 processes (DDP)", "block_recurrent", "longformer", "recurrent_memory")
def test_two_processes_train_though_parts_are_idle(tmp_path):
    """By DistributedDataParallel's own setting, which looks for no unused parameters: none is ever without a gradient,
    so no process waits for one that another has not. Without dropout a run is the same on both, to the last bit."""
    run_in_two(IDLE, tmp_path)
    first, second = (torch.load(tmp_path / f"idle_{rank}.pt") for rank in (0, 1))
    assert first == second and all(len(set(found)) > 1 for found in first.values())


@over(lambda variant, head: variant.one_by_one)
def test_calls_for_other_ranks_change_nothing(variant, head, monkeypatch):
    """A rank with short texts calls a layer as often as one with long ones, where weights are gathered at each call:
    the further segments or blocks have no tokens, and give no gradient."""
    own = runner(variant, head, dtype=torch.float64)
    ids, mask = words(2, 11), torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    found = []
    for more in (0, 2):
        monkeypatch.setattr(own.model.base_model, "agreed", lambda device, calls, more=more: calls + more)
        layer, calls = own.model.base_model.layers[-1], []
        handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        own.model.zero_grad()
        result, cache = own(ids, mask)
        result.square().sum().backward()
        gradients = {name: p.grad for name, p in own.model.named_parameters()}
        with torch.no_grad():
            first, cache = own(ids, mask)
            after = own(words(2, 5, seed=1), cache=cache)[0] if cache is not None else first
        handle.remove()
        found.append((len(calls), {"result": result, "first": first, "after": after} | gradients))
    (fewer, expected), (most, got) = found
    assert most > fewer
    for name, x in expected.items():
        assert_equal(got[name], x, name)


# Layers of the last two are called as often as a text has segments or blocks.
SHARDED = [*FIVE, *(variant for variant in VARIANTS if variant.name == "block_recurrent_feedback")]
WAYS = [(way, variant) for way, some in (("by_trainer", FIVE), ("in_shards", SHARDED)) for variant in some]

ONE_OF_TWO = """
import datetime, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))  # one that waits in vain says so
import test_distributed
rank = torch.distributed.get_rank()
for way, variant in test_distributed.WAYS:
    folder = Path(sys.argv[2]) / variant.name / way
    folder.mkdir(parents=True, exist_ok=True)
    result = getattr(test_distributed, way)(variant, folder, rank, processes=2)
    torch.save(result, folder / f"result_{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.works("Trainer, 2 processes (DDP)", *(variant.name for variant in FIVE))
@pytest.mark.works("FSDP by fully_shard", *(variant.name for variant in SHARDED))
def test_two_processes_train_as_one(tmp_path):
    """Each has rows of its own, the one's shorter than the other's."""
    run_in_two(ONE_OF_TWO, tmp_path)
    for way, variant in WAYS:
        one = globals()[way](variant, tmp_path / "one", rank=0, processes=1)
        assert len(set(one["losses"])) == 4, "it learned"
        for rank in (0, 1):
            two = torch.load(tmp_path / variant.name / way / f"result_{rank}.pt", weights_only=True)
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-4), (variant.name, way)
            assert two["weights"].keys() == one["weights"].keys()
            for name, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5)
