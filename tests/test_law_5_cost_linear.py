"""Law 5. Time and peak memory per token stay flat as the input grows (not the Transformer that sees everything).

Nothing is timed: floating point operations and live bytes are counted. A cost a + b N + c N^2 is linear when its
growth from 2 N to 4 N is twice that from N to 2 N; a quadratic one would show four times."""

import pytest
import torch
from measure import flops, peak_bytes
from variants import runner, streams, words

N = 384


def train(run, ids):
    result, _ = run(ids, use_cache=False)
    result.square().sum().backward()
    run.model.zero_grad()


@torch.no_grad()
def infer(run, ids):
    run(ids)


@torch.no_grad()
def step(run, ids, cache):
    run(ids, None, cache)


def growth(cost):
    """Growth from 2 N to 4 N over that from N to 2 N."""
    small, middle, large = cost
    return (large - middle) / max(middle - small, 1)


@pytest.mark.parametrize("function", [train, infer])
@streams(lambda v: v.linear)
def test_cost_of_a_forward_is_linear(variant, head, function):
    run = runner(variant, head)
    run.model.train(function is train)
    inputs = [words(1, N * factor) for factor in (1, 2, 4)]
    operations = [flops(function, run, ids) for ids in inputs]
    assert growth(operations) < 2.1 and operations[2] < 4.2 * operations[0], operations
    peaks, largest = zip(*(peak_bytes(function, run, ids) for ids in inputs), strict=True)
    assert growth(peaks) < 2.2 and peaks[2] < 4.4 * peaks[0], peaks
    assert growth(largest) < 2.2, largest


@streams(lambda v: v.limit is None)
def test_no_scores_of_all_by_all(variant, head):
    """Also where time is quadratic, memory is not."""
    run = runner(variant, head)
    run.model.train()
    peaks, largest = zip(*(peak_bytes(train, run, words(1, N * f)) for f in (2, 4, 8)), strict=True)
    assert growth(peaks) < 2.4, peaks
    assert growth(largest) < 2.4, largest


@streams(lambda v: v.linear)
def test_cost_of_a_decode_step_is_flat(variant, head):
    """One token at the same place of its segment, 6, 24 and 96 segments in: the same operations and memory."""
    run = runner(variant, head)
    operations, peaks = [], []
    for past in (45, 171, 675):  # 3 more than 6, 24 and 96 segments of 7
        past = past // 7 * run.model.config.segment_length + 3
        with torch.no_grad():
            _, cache = run(words(1, past))
        step(run, words(1, 1), cache)  # the first step may fit buffers
        operations.append(flops(step, run, words(1, 1), cache))
        peaks.append(peak_bytes(step, run, words(1, 1), cache)[0])
    assert max(operations) <= 1.05 * min(operations), operations
    assert max(peaks) <= 1.1 * min(peaks) + 4096, peaks


@streams(lambda v: v.linear)
def test_a_decode_step_does_not_project_the_memory_again(variant, head):
    """The maps of one token, and its attention over the horizon: no map runs over the memory."""
    run = runner(variant, head)
    config = run.model.config
    with torch.no_grad():
        _, cache = run(words(1, 60))
    step(run, words(1, 1), cache)
    maps = sum(2 * p.numel() for name, p in run.model.named_parameters() if p.dim() == 2 and "embed" not in name)
    maps += 2 * config.vocab_size * config.hidden_size
    attention = 2 * 2 * 2 * config.num_hidden_layers * 3 * 10 * (2 * variant.horizon + 2)
    assert flops(step, run, words(1, 1), cache) <= maps + attention
