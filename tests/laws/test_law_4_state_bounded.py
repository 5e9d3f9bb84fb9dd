"""Law 4. The cache's bytes stop growing once past the horizon, where the architecture says so."""

import io

import pytest
import torch
from variants import runner, streams, words

bounded = streams(lambda v: v.horizon is not None and v.limit is None)


def written_bytes(cache):
    """All that the cache holds, whatever its attribute: tensors with their whole storage, lists, counters."""
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    return buffer.tell()


def grow(run, gradients, chunks):
    """(columns, nbytes, bytes when written) after each chunk."""
    cache, sizes = None, []
    with torch.set_grad_enabled(gradients):
        for i, n in enumerate(chunks):
            _, cache = run(words(2, n, seed=i), None, cache)
            sizes.append((cache.get_seq_length(), cache.nbytes, written_bytes(cache)))
    return sizes


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 200], ids=lambda n: f"chunks of {n}")
@bounded
def test_state_is_bounded(variant, head, chunk, gradients):
    run = runner(variant, head)
    run.model.train(gradients)
    count = 2 + 4 * variant.horizon // chunk + 6
    sizes = grow(run, gradients, [chunk] * count)
    assert [columns for columns, _, _ in sizes] == [chunk * (i + 1) for i in range(count)]
    past = [size for size in sizes if size[0] > variant.horizon]
    assert len(past) >= 6
    assert len({nbytes for _, nbytes, _ in past}) == 1 and past[0][1] > 0
    # records of the newest columns may differ by a few numbers, and must not build up
    assert max(written for _, _, written in past) < past[0][2] + 64 * min(count, variant.horizon + 2)
    late = [written for _, _, written in sizes[-3:]]
    assert max(late) - min(late) < 128


@bounded
def test_state_is_what_the_architecture_needs(variant, head):
    """Not more than two tensors of the horizon's length a layer, also after one long forward."""
    run = runner(variant, head)
    with torch.no_grad():
        _, cache = run(words(2, 400))
    inner = run.model.config.num_attention_heads * run.model.config.head_dim
    per_column = 2 * 2 * inner * 4  # rows, keys and values, float32
    shared = 2 * (variant.horizon + 64) * inner * 4  # tables that follow from the weights
    assert cache.nbytes <= run.model.config.num_hidden_layers * (variant.horizon * per_column + shared)


@bounded
def test_state_is_bounded_with_padding(variant, head):
    run = runner(variant, head)
    cache, sizes = None, []
    with torch.no_grad():
        for i in range(30):
            mask = torch.randint(0, 2, (2, 9), generator=torch.Generator().manual_seed(i))
            _, cache = run(words(2, 9, seed=i), mask, cache)
            sizes.append((cache.nbytes, written_bytes(cache)))
    assert cache.get_seq_length() == 270
    assert len({nbytes for nbytes, _ in sizes[15:]}) == 1
    assert max(written for _, written in sizes[20:]) <= max(written for _, written in sizes[10:20]) + 256


@streams(lambda v: v.horizon is None)
def test_a_state_that_grows_says_so(variant, head):
    """nbytes counts what is held: without a horizon it grows by as much with every token."""
    run = runner(variant, head)
    sizes = [nbytes for _, nbytes, _ in grow(run, False, [4] * 8)]
    steps = {b - a for a, b in zip(sizes, sizes[1:], strict=False)}
    config = run.model.config
    inner = config.num_attention_heads * config.head_dim
    assert steps == {2 * 4 * config.num_hidden_layers * 2 * inner * 4}
