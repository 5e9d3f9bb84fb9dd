"""Decode steps of models by the kernels that split keys, in Triton's interpreter: with TRITON_INTERPRET=1 only, since
triton settles that when it is imported. test_attention_triton.py runs this file so."""

import pytest
import torch
from variants import assert_equal, runner, streams, words

from hf_gallery import GalleryCache, GalleryStaticCache
from hf_gallery.models import attention, attention_decode
from hf_gallery.models.attention_triton import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="runs with TRITON_INTERPRET=1: see test_attention_triton.py")


@streams()
def test_steps_are_those_of_the_tiles(variant, head, monkeypatch):
    """As on a GPU, where attend chooses the kernels for one query a row: over a growing cache and over rings, with
    padding among the steps."""
    run, served, kernels = runner(variant, head), [], False

    def choose(problem, implementation):
        served.append(kernels and attention_decode.why_not(problem) is None)
        return "decode" if served[-1] else "tiles"

    monkeypatch.setattr(attention, "choose", choose)
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
