"""Law 5. Time and peak memory per token stay flat as the input grows (not the Transformer that sees everything).

Nothing is timed: floating point operations and live bytes are counted. A cost a + b N + c N^2 is linear when its
growth from 2 N to 4 N is twice that from N to 2 N; a quadratic one would show four times."""

import torch
from measure import cost_of
from variants import causal, runner, streams, words

N = 256


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


def assert_linear(costs):
    """costs of N, 2 N and 4 N tokens, by the growth from one to the next: 2 if linear, 4 if quadratic."""
    small, middle, large = costs
    for kind in ("flops", "peak"):
        a, b, c = (getattr(cost, kind) for cost in costs)
        assert (c - b) < 2.2 * (b - a) and c < 4.4 * a, (kind, a, b, c)
    assert large.largest < 2.1 * middle.largest


@causal(lambda v: v.linear)
def test_cost_of_training_is_linear(variant):
    run = runner(variant, "causal")
    run.model.train()
    assert_linear([cost_of(train, run, words(1, N * factor)) for factor in (1, 2, 4)])


@streams(lambda v: v.linear)
def test_cost_of_inference_is_linear(variant, head):
    run = runner(variant, head)
    assert_linear([cost_of(infer, run, words(1, 2 * N * factor)) for factor in (1, 2, 4)])


@streams(lambda v: not v.linear and v.limit is None)
def test_no_scores_of_all_by_all(variant, head):
    """Also where time is quadratic, memory is not."""
    run = runner(variant, head)
    run.model.train()
    small, middle, large = (cost_of(train, run, words(1, N * f)) for f in (2, 4, 8))
    assert large.peak - middle.peak < 2.4 * (middle.peak - small.peak)
    assert large.largest < 2.2 * middle.largest


@streams(lambda v: v.linear)
def test_cost_of_a_decode_step_is_flat(variant, head):
    """One token at the same place of its segment, 6, 24 and 96 segments in: the same operations and memory."""
    run = runner(variant, head)
    costs = []
    for segments in (6, 24, 96):
        with torch.no_grad():
            _, cache = run(words(1, segments * run.model.config.segment_length + 3))
        step(run, words(1, 1), cache)  # the first step may fit buffers
        costs.append(cost_of(step, run, words(1, 1), cache))
    flops, peaks, _ = zip(*costs, strict=True)
    assert max(flops) <= 1.05 * min(flops), flops
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
    assert cost_of(step, run, words(1, 1), cache).flops <= maps + attention
