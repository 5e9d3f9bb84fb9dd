"""Models by kernels in Triton's interpreter: with TRITON_INTERPRET=1 only, since triton settles that when it is
imported. test_attention_triton.py runs this file so."""

import pytest
import torch
from variants import assert_equal, causal, runner, streams, words

from hf_gallery import GalleryCache, GalleryStaticCache
from hf_gallery.models import attention, attention_decode, blocks, memory, modeling_block_recurrent_transformer
from hf_gallery.models import modeling_memorizing_transformer as modeling
from hf_gallery.models.attention_triton import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: see test_attention_triton.py")


PARTS = {"memorizing": {"unit", "memory"}, "block_recurrent": {"unit", "gate"}}  # that have kernels of their own


@streams()
def test_decode_steps_are_those_of_the_tiles(variant, head, monkeypatch):
    """As on a GPU, where attend chooses the kernels for one query a row, and what stands around attention has kernels
    too: over a growing cache and over rings, with padding among the steps."""
    run, served, kernels = runner(variant, head), [], False
    attends = memory.attends

    def choose(problem, implementation):
        served.append(kernels and attention_decode.why_not(problem) is None)
        return "decode" if served[-1] else "tiles"

    monkeypatch.setattr(attention, "choose", choose)
    parts = set()
    monkeypatch.setattr(memory, "attends", lambda *found: kernels and attends(*found) and not parts.add("memory"))
    for module, part in ((blocks, "unit"), (modeling_block_recurrent_transformer, "gate")):
        monkeypatch.setattr(module, "serves", lambda x, part=part: kernels and not parts.add(part))
    texts, padded = words(2, 28), torch.tensor([[1], [0]])
    makers = [lambda: GalleryCache(run.model.config)]
    if run.model.config.why_no_static_cache is None:
        makers.append(lambda: GalleryStaticCache(run.model.config, 40))
    for make in makers:
        found = []
        for kernels in (False, True):  # noqa: B007  # `choose` reads it
            cache, steps = make(), []
            with torch.no_grad():
                run(texts[:, :23], None, cache)
                for i in range(23, 28):
                    steps.append(run(texts[:, i : i + 1], padded if i == 25 else None, cache)[0])
            found.append(torch.stack(steps))
        assert any(served)
        assert_equal(*found)
    assert parts >= PARTS.get(variant.name, set())


@causal(lambda variant: variant.name == "memorizing")
@torch.no_grad()
def test_a_memory_is_searched_by_kernels(variant, monkeypatch):
    """As on a GPU, attention over what was found too, and in tiles in which nothing is found: a text and a longer one
    behind its cache, rows apart."""
    run = runner(variant, "causal")
    monkeypatch.setattr(modeling, "query_tile", lambda *sizes: 5)
    ids, mask, found = words(2, 60), torch.ones(2, 13, dtype=torch.long), []
    mask[1, :6] = 0
    attends, served = memory.attends, []
    for kernels in (False, True):
        serves = lambda *x, kernels=kernels: served.append(kernels and attends(*x)) or served[-1]  # noqa: E731
        monkeypatch.setattr(memory, "attends", serves)
        monkeypatch.setitem(memory.BACKENDS, "exact", memory.search_numbered if kernels else memory.search_exact)
        first = run.model(ids[:, :13], attention_mask=mask, use_cache=True)
        found.append((first.logits, run.model(ids[:, 13:], past_key_values=first.past_key_values).logits))
    assert any(served)
    for expected, got in zip(*found, strict=True):
        assert_equal(got, expected)


@causal(lambda variant: variant.name in ("memorizing", "block_recurrent"))
def test_queries_and_keys_of_unit_length_by_one_kernel(variant, monkeypatch):
    """Loss and gradients of a padded batch, as with torch's operations."""
    ids, mask = words(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[1, :4] = 0
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(blocks, "serves", lambda x, kernel=kernel: kernel)
        run = runner(variant, "causal", hidden_dropout=0.0, attention_dropout=0.0)
        loss = run.model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        found.append([loss.detach(), *(x.grad for x in run.model.parameters())])
    for expected, got in zip(*found, strict=True):
        assert_equal(got, expected)
