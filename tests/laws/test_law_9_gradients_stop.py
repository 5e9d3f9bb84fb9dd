"""Law 9. Gradients stop where the paper stops them: between forwards always, inside a forward at the places that the
paper names, and nowhere else.

That gradients equal those of a plain computation everywhere else is tested variant by variant, in test_transformer.py
and its like, against torch's layers and the authors' code.
"""

import pytest
import torch
from variants import VARIANTS, runner, streams, words

without_source = streams(of_head=lambda head: not head.source)


def gradients_by_column(run, n, at, cuts=None):
    """For forwards of the given sizes over n embedded tokens: the size of the gradient that the result in column `at`
    sends into each column's embedding, (n,)."""
    embeds = run.model.get_input_embeddings()(words(1, n)).detach().requires_grad_()
    cache, results = None, []
    for part in embeds.split(list(cuts or [n]), dim=1):
        result, cache = run(None, cache=cache, embeds=part)
        results.append(result)
    result = torch.cat(results, dim=1)[0, at]
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=result.dtype)
    return torch.autograd.grad((result * weight).sum(), embeds)[0][0].abs().amax(-1)


@pytest.mark.parametrize("cuts", [(9, 14), (1,) * 23, (5, 2, 13, 3)], ids=lambda x: str(x[:4]))
@without_source
def test_no_gradient_between_forwards(variant, head, cuts):
    """Nothing reaches what an earlier forward read; the forward's own columns do get a gradient."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    size = gradients_by_column(run, 23, 22, cuts)
    assert (size[: 23 - cuts[-1]] == 0).all()
    assert size[22] > 1e-3


def columns_that_matter(run, n, at):
    """Where another embedding changes the result in column `at`, (n,) of booleans."""
    embeds = run.model.get_input_embeddings()(words(1, n)).detach()
    changed = embeds.repeat(n, 1, 1)
    g = torch.Generator().manual_seed(4)
    changed[range(n), range(n)] += 0.1 * torch.randn(n, embeds.shape[-1], generator=g, dtype=embeds.dtype)
    with torch.no_grad():
        results = [run(None, embeds=x[None])[0][0, at] for x in (*embeds, *changed)]
    return torch.stack([(x - results[0]).abs().max() > 1e-9 for x in results[1:]])


@without_source
def test_gradients_inside_a_forward(variant, head):
    """All that matters gets a gradient, but for what stands beyond the border of the segment where there is one:
    Transformer-XL, section 3.2; the cache and the memory of the Memorizing Transformer, section 3."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    for at in (22, 3, 0):
        size, matters = gradients_by_column(run, 23, at), columns_that_matter(run, 23, at)
        first = 0 if variant.border is None else at - at % variant.border
        assert ((size > 1e-9) == (matters & (torch.arange(23) >= first))).all()
        assert (size[~matters] == 0).all() and (size[:first] == 0).all() and matters[at]


@streams(lambda v: v.config.model_type == "gallery_transformer_xl" and v.settings["mem_len"] > 0)
def test_weights_learn_from_the_memory(variant, head):
    """The states of the past are projected anew: W_k and W_v get a gradient through them, in one forward as between
    forwards. Against the same numbers with keys and values of the past as constants."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    ids, more = words(1, 14), words(1, 1, seed=1)
    layer = next(m for m in run.model.modules() if hasattr(m, "k_proj"))
    weights = [layer.k_proj.weight, layer.v_proj.weight]
    _, with_states = run(ids)
    with torch.no_grad():
        _, with_constants = run(ids)
    results = [run(more, cache=cache)[0] for cache in (with_states, with_constants)]
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)
    learning, constant = (torch.autograd.grad(x.square().sum(), weights) for x in results)
    for a, b in zip(learning, constant, strict=True):
        assert (a - b).norm() > 1e-2 * a.norm()
    # A single new token, with all weight on itself, would teach W_k nothing: its gradient comes through the memory.
    segment = run.model.config.segment_length
    if variant.settings.get("same_length") or head != "decoder":
        return
    whole = run(words(1, segment + 1))[0][:, -1]  # the first token of a segment: its own key and the memory's
    assert torch.autograd.grad(whole.square().sum(), weights)[0].norm() > 1e-6


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "seq2seq" in v.heads], ids=lambda v: v.name)
def test_the_source_gets_gradients(variant):
    """The encoder learns through the keys of cross-attention, while the cache keeps them without a graph."""
    run = runner(variant, "seq2seq", dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    result, cache = run(words(2, 7))
    encoder = list(run.model.get_encoder().layers.parameters())
    gradients = torch.autograd.grad(result.square().sum(), encoder, allow_unused=True)
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    result, _ = run(words(2, 3, seed=1), cache=cache)
    gradients = torch.autograd.grad(result.square().sum(), encoder, allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)
