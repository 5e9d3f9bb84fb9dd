"""Law 5. Time and peak memory per token stay flat as the input grows (not the Transformer that sees everything).

Nothing is timed: floating point operations, live bytes and bytes ever made are counted. A cost a + b N + c N^2 is
linear when its growth from 2 N to 4 N is twice that from N to 2 N; a quadratic one would show four times."""

import torch
from measure import cost_of
from variants import causal, over, runner, streams, words


def lengths(variant, n):
    """n, 2 n and 4 n tokens, the least of them several horizons long."""
    assert n > 2 * (variant.horizon or 0)
    return n, 2 * n, 4 * n


def train(run, ids):
    result, _ = run(ids, use_cache=False)
    result.square().sum().backward()
    run.model.zero_grad()


def frozen(variant, head):
    """For inference. The counter stumbles over views of parameters that want gradients while none are taken."""
    run = runner(variant, head)
    run.model.requires_grad_(False)
    return run


@torch.no_grad()
def infer(run, ids):
    run(ids)


@torch.no_grad()
def step(run, ids, cache):
    run(ids, None, cache)


def assert_linear(costs):
    """costs of N, 2 N and 4 N tokens, by the growth from one to the next: 2 if linear, 4 if quadratic. What is held at
    the worst moment may be buffers of one size as long as N is small: there, no more per token at 4 N than at 2 N."""
    small, middle, large = costs
    for a, b, c in ([cost.flops for cost in costs], [cost.made for cost in costs]):
        assert (c - b) < 2.2 * (b - a) and c < 4.4 * a, (a, b, c)
    assert large.peak < 2.1 * middle.peak and large.peak < 4.4 * small.peak, [cost.peak for cost in costs]
    assert large.largest < 2.1 * middle.largest


@causal(lambda v: v.linear)
def test_cost_of_training_is_linear(variant):
    n = 6 * variant.larger.period if variant.larger else 256
    variant = variant.larger or variant
    run = runner(variant, "causal")
    run.model.train()
    assert_linear([cost_of(train, run, words(1, n)) for n in lengths(variant, n)])


@streams(lambda v: v.linear)
def test_cost_of_inference_is_linear(variant, head):
    n = 6 * variant.larger.period if variant.larger else 512
    variant = variant.larger or variant
    run = frozen(variant, head)
    assert_linear([cost_of(infer, run, words(1, n)) for n in lengths(variant, n)])


@streams(lambda v: not v.linear and v.limit is None)
def test_no_scores_of_all_by_all(variant, head):
    """Also where time is quadratic, memory is not."""
    run = runner(variant, head)
    run.model.train()
    small, middle, large = (cost_of(train, run, words(1, n)) for n in lengths(variant, 512))
    assert large.peak - middle.peak < 2.4 * (middle.peak - small.peak)
    assert large.largest < 2.2 * middle.largest


@streams(lambda v: v.linear)
def test_cost_of_a_decode_step_is_flat(variant, head):
    """One token at the same place of its segment or block, past the horizon: the same operations and memory."""
    run = frozen(variant, head)
    start, costs = variant.horizon + -variant.horizon % variant.period + 3, []
    for periods in (6, 24, 96):
        with torch.no_grad():
            _, cache = run(words(1, start + periods * variant.period))
        step(run, words(1, 1), cache)  # the first step may fit buffers
        costs.append(cost_of(step, run, words(1, 1), cache))
    flops, peaks, _, made = zip(*costs, strict=True)
    assert max(flops) <= 1.05 * min(flops), flops
    assert max(peaks) <= 1.1 * min(peaks) + 4096, peaks
    assert max(made) <= 1.1 * min(made) + 4096, made


@over(lambda variant, head: variant.name == "longformer" and head in ("encoder", "tokens"))
def test_an_encoder_with_a_window_is_linear(variant, head):
    """With and without global tokens. Positions are learned up to a length, so sinusoids stand in for them."""
    run = runner(variant, head, position_embedding_type="sinusoidal")
    for count in (0, 3):
        marks = [torch.zeros(1, n, dtype=torch.long) for n in (256, 512, 1024)]
        for mark in marks:
            mark[:, :count] = 1

        def forward(run, ids, mark):
            result, _ = run(ids, global_attention_mask=mark)
            result.square().sum().backward()

        assert_linear([cost_of(forward, run, words(1, mark.shape[1]), mark) for mark in marks])


@streams(lambda v: v.linear)
def test_a_decode_step_does_not_project_the_memory_again(variant, head):
    """The maps of one token, and its attention over the horizon: no map runs over the memory."""
    run = frozen(variant, head)
    config = run.model.config
    with torch.no_grad():
        _, cache = run(words(1, 60))
    step(run, words(1, 1), cache)
    maps = sum(2 * p.numel() for name, p in run.model.named_parameters() if p.dim() == 2 and "embed" not in name)
    maps += 2 * config.vocab_size * config.hidden_size
    attention = 2 * 2 * 2 * config.num_hidden_layers * 3 * 10 * (2 * variant.horizon + 2)
    assert cost_of(step, run, words(1, 1), cache).flops <= maps + attention
