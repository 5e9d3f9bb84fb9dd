"""Law 9. Gradients stop where the paper stops them: between forwards always, inside a forward at the places that the
paper names, and nowhere else.

That gradients equal those of a plain computation everywhere else is tested variant by variant, in test_transformer.py
and its like, against torch's layers and the authors' code.
"""

import pytest
import torch
from renamed import checkpoint_activations
from test_law_2_batch_anyhow import padded, scatter
from variants import VARIANTS, assert_equal, runner, streams, words

from hf_gallery import GalleryCache

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
    """Marks the columns whose embedding changes the result in column `at`: (n,) of booleans."""
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


# ---- gradients through the state, when asked for


def parameter_gradients(run, ids, mask, cuts, cache=None):
    """Gradients of all parameters, of a weighed sum of the results at tokens, after forwards of the given sizes."""
    run.model.zero_grad()
    results = []
    for some, part in zip(ids.split(cuts, dim=1), mask.split(cuts, dim=1), strict=True):
        result, cache = run(some, part, cache)
        results.append(result)
    result = torch.cat(results, dim=1)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=result.dtype)
    (result * weight * mask[:, :, None]).sum().backward()
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.works("gradients through the state")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@streams(of_head=lambda head: head.auto != "AutoModel")
def test_gradients_pass_from_forward_to_forward_when_asked(variant, head, checkpointing):
    """GalleryCache(config, detach=False): several forwards give the gradients of one, for every parameter, wherever
    they are cut. What the paper stops within a forward stays stopped, as it is there."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    lengths = (23, 16)
    mask = padded(lengths, "left", 23)
    ids = scatter([words(n, seed=n) for n in lengths], mask)
    expected = parameter_gradients(run, ids, mask, [23])
    detached = parameter_gradients(run, ids, mask, [9, 14], GalleryCache(run.model.config))
    assert any((detached[name] - x).abs().max() > 1e-6 for name, x in expected.items())
    if checkpointing:
        checkpoint_activations(run.model, dict(use_reentrant=False))
    for cuts in ([5, 2, 13, 3],) if checkpointing else ([1] * 23, [5, 2, 13, 3]):
        got = parameter_gradients(run, ids, mask, cuts, GalleryCache(run.model.config, detach=False))
        for name, x in expected.items():
            assert_equal(got[name], x, f"{cuts} {name}")


@streams(of_head=lambda head: head.auto == "AutoModelForCausalLM")
def test_what_comes_after_leaves_the_graph_alone(variant, head):
    """Decoding without gradients, copies, emptied and moved rows and a cache that is cut between a forward and its
    backward change no gradient; what is read behind a cut reaches nothing before it."""
    run = runner(variant, head, dtype=torch.float64)
    ids = words(2, 20)

    def gradients(disturb):
        run.model.zero_grad()
        cache = GalleryCache(run.model.config, detach=False)
        first, _ = run(ids[:, :9], cache=cache)
        second, _ = run(ids[:, 9:], cache=cache)
        if disturb:
            with torch.no_grad():
                for step in range(12):
                    run(words(2, 1, seed=step), cache=cache)
                other = cache.copy()
                other.reset_rows([0])
                other.reorder_cache(torch.tensor([1, 0]))
                run(words(2, 3), cache=other)
            cache.detach()
            run(words(2, 9, seed=40), cache=cache)
        (first.sum() + second.square().sum()).backward()
        return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}

    plain, disturbed = gradients(False), gradients(True)
    assert plain.keys() == disturbed.keys() and all(torch.equal(plain[name], disturbed[name]) for name in plain)


@streams(of_head=lambda head: head.auto == "AutoModelForCausalLM")
def test_emptied_rows_reach_nothing_before(variant, head):
    """With detach=False a row that begins a new text has no gradient of the one before; the others keep theirs."""
    run = runner(variant, head, dtype=torch.float64)
    embeds = run.model.get_input_embeddings()(words(2, 12)).detach().requires_grad_()
    cache = GalleryCache(run.model.config, detach=False)
    run(None, cache=cache, embeds=embeds[:, :6])
    cache.reset_rows([0])
    result, _ = run(None, cache=cache, embeds=embeds[:, 6:])
    result.square().sum().backward()
    assert (embeds.grad[0, :6] == 0).all() and embeds.grad[0, 6:].abs().amax() > 0
    within_a_segment = variant.border is None or variant.border > 6  # else a border stops it just there
    assert not within_a_segment or embeds.grad[1, :6].abs().amax() > 0


def test_reentrant_checkpoints_are_refused():
    """They give a layer's state no gradient."""
    model = VARIANTS[0].make("causal").train()
    checkpoint_activations(model, dict(use_reentrant=True))
    with pytest.raises(ValueError, match="use_reentrant is True.*detach=False.*use_reentrant=False"):
        model(words(1, 4), past_key_values=GalleryCache(model.config, detach=False))
