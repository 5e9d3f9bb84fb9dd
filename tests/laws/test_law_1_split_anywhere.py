"""Law 1. One forward over N tokens gives the logits of any chunking of it with the cache carried along: token by
token, unequal chunks, chunks that cut a segment or block in two."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variants import assert_equal, causal, runner, streams, words

N = 23
CUTS = [(1,) * N, (5, 18), (8, 8, 7), (20, 1, 1, 1), (1, 13, 9), (7, 7, 9), (22, 1)]
cuts_of_all = pytest.mark.parametrize("cuts", CUTS, ids=lambda x: "-".join(map(str, x)) if len(x) < N else "ones")


def in_chunks(run, ids, cuts, cache=None, **options):
    parts = []
    for chunk in ids.split(list(cuts), dim=1):
        result, cache = run(chunk, cache=cache, **options)
        parts.append(result)
    return torch.cat(parts, dim=1), cache


@cuts_of_all
@streams()
def test_split_anywhere(variant, head, cuts):
    """Without gradients: what generate() does."""
    run = runner(variant, head)
    ids = words(2, N)
    with torch.no_grad():
        whole, _ = run(ids)
        parts, cache = in_chunks(run, ids, cuts)
    assert_equal(parts, whole)
    assert cache.get_seq_length() == N and cache.batch_size == 2


@cuts_of_all
@streams()
def test_split_anywhere_with_gradients(variant, head, cuts):
    """With gradients the cache may hold other things (hidden states that are projected anew), and gives the same."""
    run = runner(variant, head, dtype=torch.float64)
    ids = words(2, N)
    with torch.no_grad():
        whole, _ = run(ids)
    assert_equal(run(ids)[0], whole)
    assert_equal(in_chunks(run, ids, cuts)[0], whole)


@pytest.mark.parametrize("mode", ["prefill without gradients", "prefill with gradients"])
@streams()
def test_a_cache_serves_both_modes(variant, head, mode):
    """A cache that was filled while inferring goes on while training, and the other way round."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    ids = words(2, N)
    first = mode == "prefill with gradients"
    with torch.no_grad():
        whole, _ = run(ids)
    parts, cache = [], None
    for i, chunk in enumerate(ids.split([9, 1, 4, 9], dim=1)):
        gradients = first == (i % 2 == 0)
        run.model.train(gradients)
        with torch.set_grad_enabled(gradients):
            result, cache = run(chunk, cache=cache)
        parts.append(result.detach())
    assert_equal(torch.cat(parts, dim=1), whole)


@streams()
def test_split_anywhere_in_training_mode(variant, head):
    """A trained model carries its cache from step to step when it is given one."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    ids = words(2, N)
    with torch.no_grad():
        whole, _ = run(ids)
    assert_equal(in_chunks(run, ids, (5, 9, 1, 8))[0], whole)


@streams(lambda v: v.limit is None)
def test_split_far_beyond_the_horizon(variant, head):
    """Many segments: nothing builds up."""
    run = runner(variant, head, dtype=torch.float64)
    ids = words(1, 160)
    with torch.no_grad():
        whole, _ = run(ids)
        parts, _ = in_chunks(run, ids, (50, 3, 1, 1, 1, 64, 40))
    assert_equal(parts, whole)


@streams(of_head=lambda head: not head.source)
def test_split_of_embeddings(variant, head):
    """inputs_embeds are cut as token ids are."""
    run = runner(variant, head, dtype=torch.float64)
    ids = words(2, N)
    embeds = run.model.get_input_embeddings()(ids)
    with torch.no_grad():
        whole, _ = run(ids)
        parts, cache = [], None
        for part in embeds.split([4, 11, 8], dim=1):
            result, cache = run(None, cache=cache, embeds=part)
            parts.append(result)
    assert_equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@streams(lambda v: v.config.model_type == "gallery_transformer")
def test_split_anywhere_on_both_backends(variant, head, implementation):
    run = runner(variant, head, dtype=torch.float64, attn_implementation=implementation)
    ids = words(2, N)
    with torch.no_grad():
        whole, _ = runner(variant, head, dtype=torch.float64)(ids)
        parts, _ = in_chunks(run, ids, (5, 1, 12, 5))
    assert_equal(parts, whole)


@given(data=st.data())
@causal()
def test_split_of_any_length_anywhere(variant, data):
    head = "causal"
    run = runner(variant, head, dtype=torch.float64)
    n = data.draw(st.integers(2, 45), label="tokens")
    cuts, left = [], n
    while left:
        cuts.append(data.draw(st.integers(1, left), label="chunk"))
        left -= cuts[-1]
    ids = words(data.draw(st.integers(1, 3), label="rows"), n, seed=n)
    modes = st.sampled_from([True, False])
    with torch.no_grad():
        whole, _ = run(ids)
    parts, cache = [], None
    for chunk in ids.split(cuts, dim=1):
        with torch.set_grad_enabled(data.draw(modes, label="gradients")):
            result, cache = run(chunk, cache=cache)
        parts.append(result.detach())
    assert_equal(torch.cat(parts, dim=1), whole)


@streams()
def test_the_past_matters(variant, head):
    """The law would hold of a model that forgets everything: the first token changes what follows it."""
    run = runner(variant, head)
    ids = words(1, 6)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 90
    with torch.no_grad():
        a, b = run(ids)[0], run(other)[0]
    assert ((a - b).abs().amax(-1) > 1e-3).all()
