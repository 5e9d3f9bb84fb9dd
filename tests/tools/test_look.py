"""`look`: sums of sources, surprise, and what a text costs without each, against direct computations."""

import math

import pytest
import torch
from variants import VARIANTS, assert_equal, causal, over, words

from hf_gallery import GalleryCache, look
from hf_gallery.looking.reach import by_change
from hf_gallery.looking.reading import piece_size
from hf_gallery.models.cache import CACHE_NAME

LENGTH = 40  # several segments of every variant


def looked_at(variant, monkeypatch=None, **options):
    model = variant.make("causal", dtype=torch.float64)
    options = dict(worth=False, reach=False, most=LENGTH) | options
    return model.eval(), look(model, words(LENGTH), **options)


def of_pieces(monkeypatch, size):
    """Pieces of about `size` tokens, whole segments where they must be."""
    monkeypatch.setattr(
        "hf_gallery.looking.text.piece_size",
        lambda config, *_: piece_size(config, 1, 0) if hasattr(config, "num_memory_tokens") else size,
    )


@causal()
def test_weights_of_all_sources_add_up_to_one(variant, monkeypatch):
    """Of every token, layer and head, as sums by source and as single sources, in whatever pieces the text is read."""
    of_pieces(monkeypatch, 11)
    _, found = looked_at(variant)
    total = found.weights.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)
    assert bool((found.weights >= 0).all()) and len(found.shown) == LENGTH - 1
    for query, layers in found.shown.items():
        for layer, sources in enumerate(layers):
            sums = torch.zeros(sources.weights.shape[0], len(found.sources))
            sums.index_add_(1, sources.kinds, sources.weights)
            torch.testing.assert_close(sums, found.weights[query, layer], rtol=1e-5, atol=1e-6)
            assert bool((sources.positions <= query).all())


@causal(others_slow=True)
def test_surprise_is_the_loss_of_each_token(variant, monkeypatch):
    """In bits, though the text was read in pieces."""
    of_pieces(monkeypatch, 11)
    model, found = looked_at(variant)
    assert math.isnan(found.surprise[0]) and len(found.surprise) == LENGTH
    assert_equal(found.surprise[1:].double(), direct(model, words(LENGTH)))


def direct(model, ids):
    """The bits of each token of ids (T,) but the first, from one forward."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].float()
    return (torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none") / math.log(2)).double()


@causal(lambda variant: not variant.one_by_one)
def test_weights_are_those_of_the_models_maps(variant, monkeypatch):
    """Key by key what output_attentions gives for the whole text at once, though it was read in pieces; behind the
    gate where pairs are retrieved, and beside the state's share where there is a state."""
    of_pieces(monkeypatch, 11)
    model, found = looked_at(variant)
    with torch.no_grad():
        maps = model(words(LENGTH)[None], output_attentions=True).attentions
    for layer, expected in enumerate(maps):
        seen = expected[0, ..., -LENGTH:].amax(0) > 0
        first = torch.where(seen.any(-1), seen.byte().argmax(-1), torch.arange(LENGTH))
        assert variant.name == "transformer_xl_untied_pre_zeros" or torch.equal(found.first[:, layer], first)
        for query, layers in found.shown.items():
            sources = layers[layer]
            names = [found.sources[kind] for kind in sources.kinds]
            own = torch.tensor([name in ("window", "segment", "memory") for name in names])
            positions, weights = sources.positions[0, own], sources.weights[:, own]
            got = torch.zeros(len(weights), LENGTH).index_add_(1, positions.clamp(min=0), weights * (positions >= 0))
            share = weights.sum(-1, keepdim=True)
            if "retrieved" in names:
                gates = torch.sigmoid(model.model.layers[layer].self_attn.gate_bias.detach().float())
                assert_equal(found.gates[layer], gates)
                share = 1 - gates[:, None]
            torch.testing.assert_close(got, expected[0, :, query, -LENGTH:].float() * share, rtol=1e-4, atol=1e-6)


MARKED = (1, 9, 17)


def marks(*positions):
    return torch.zeros(1, LENGTH, dtype=torch.long).index_fill(1, torch.tensor(positions), 1)


@causal(lambda variant: variant.name in ("longformer", "longformer_dilated"))
def test_global_tokens_of_a_decoder_are_a_source(variant, monkeypatch):
    """Read in pieces, the weights of window and global tokens, key by key, give what attention gives in one plain
    forward; what is summed as global tokens stands at them; surprise and worth are those of direct readings."""
    of_pieces(monkeypatch, 11)
    model = variant.make("causal", dtype=torch.float64).eval()
    ids, seen = words(LENGTH), []
    found = look(model, ids, most=LENGTH, reach=False, global_attention_mask=marks(*MARKED))
    total = found.weights.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)
    hooks = [
        hook
        for layer in model.model.layers
        for hook in (
            layer.self_attn.register_forward_pre_hook(lambda module, x: seen.append(module.keys_values(x[0])[1][0])),
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0])),
        )
    ]
    with torch.no_grad():
        logits = model(ids[None], global_attention_mask=marks(*MARKED)).logits[0, :-1]
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none") / math.log(2)
    assert_equal(found.surprise[1:].double(), loss.double())
    assert_equal(found.worth["global tokens unmarked"][1:].double(), direct(model, ids))
    kind = found.sources.index("global tokens")
    for layer, (values, joined) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        for query, layers in found.shown.items():
            sources = layers[layer]
            weights = torch.zeros(len(values), LENGTH).scatter_add_(1, sources.positions.clamp(min=0), sources.weights)
            got = torch.einsum("hs,hsd->hd", weights, values.float()).flatten()
            torch.testing.assert_close(got, joined[query].float(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                found.weights[query, layer, :, kind], weights[:, MARKED].sum(-1), rtol=1e-4, atol=1e-6
            )
    far = found.weights[LENGTH - 2, :, :, kind]
    assert bool((far > 0).all()), "the last query sees the first global tokens, which no window of it holds"


@causal(lambda variant: variant.name == "longformer")
def test_a_global_token_reaches_beyond_all_windows(variant):
    """A changed global token moves losses from beyond what the windows of all layers allow, and gradients find it."""
    model = variant.make("causal", dtype=torch.float64).eval()
    found = look(model, words(LENGTH), worth=False, most=0, global_attention_mask=marks(0))
    farthest = int(found.reach.allowed.max())
    assert found.reach.further and farthest < LENGTH - 2
    assert found.reach.changed[farthest + 2 :].nan_to_num().max() > 1e-3
    assert found.reach.gradient[farthest + 2 :].nan_to_num().max() > 1e-6


@causal(lambda variant: variant.name.startswith("memorizing"))
def test_retrieved_pairs_are_those_that_the_model_returns(variant, monkeypatch):
    """Positions and weights of output_retrievals, times the gate; and how often each token is fetched, by all."""
    of_pieces(monkeypatch, 11)
    model = variant.make("causal", dtype=torch.float64).eval()
    ids = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:LENGTH]  # a repeated token's keys would tie
    found = look(model, ids, worth=False, reach=False, most=LENGTH)
    with torch.no_grad():
        retrievals = model(ids[None], output_retrievals=True).retrievals
    fetched = torch.zeros(LENGTH)
    for layer, (positions, weights) in retrievals.items():
        weights = weights[0].float() * found.gates[layer][:, None, None]
        for query, layers in found.shown.items():
            some = layers[layer].kinds == found.sources.index("retrieved")
            order = layers[layer].positions[:, some].sort(-1)
            expected = positions[0, :, query].sort(-1)
            assert torch.equal(order.values, expected.values)
            got = layers[layer].weights[:, some].gather(-1, order.indices)
            torch.testing.assert_close(got, weights[:, query].gather(-1, expected.indices), rtol=1e-4, atol=1e-6)
        there = positions[0] >= 0
        fetched.index_add_(0, positions[0][there], weights[there])
    torch.testing.assert_close(found.fetched, fetched, rtol=1e-4, atol=1e-5)
    assert fetched.sum() > 0
    torch.testing.assert_close(found.passages.sum(), fetched.sum(), rtol=1e-4, atol=1e-5)


@causal(lambda variant: variant.name.startswith("block_recurrent"))
def test_the_states_share_is_its_part_of_the_output(variant):
    """Head by head: with all of the output's map but the state's columns of a head closed, the length of what is left
    is the state's part."""
    model, found = looked_at(variant, most=0)
    read = [layer for layer in model.model.layers if layer.self_attn.reads_state]
    seen, kind = [], found.sources.index("state")
    hooks = [x.self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0])) for x in read]
    with torch.no_grad():
        model(words(LENGTH)[None])
    for hook in hooks:
        hook.remove()
    numbers = [i for i, layer in enumerate(model.model.layers) if layer.self_attn.reads_state]
    weights = [layer.self_attn.o_proj.weight.detach() for layer in model.model.layers]
    h, d = model.config.num_attention_heads, model.config.head_dim
    for place, number in enumerate(numbers):
        joined = torch.cat(seen[place :: len(numbers)])  # of all blocks, where they run one by one
        weight = weights[number]
        for head in range(h):
            window, state = (
                (joined[:, x * d : (x + 1) * d] @ weight[:, x * d : (x + 1) * d].T).norm(dim=-1)
                for x in (head, h + head)
            )
            assert_equal(found.weights[:, number, head, kind], (state / (window + state)).float())


@causal(others_slow=True)
def test_what_a_source_is_worth(variant):
    """Without its memory each segment costs what it costs alone, and a reset state is the one that a text begins
    with; half a window is another model of the same weights."""
    model, found = looked_at(variant, worth=True, most=0)
    config, ids = model.config, words(LENGTH)
    for name, got in found.worth.items():
        assert math.isnan(got[0]) and bool(got[1:].isfinite().all())
        if name == "window halved":
            field = {"longformer": "attention_window"}.get(config.model_type.split("_")[1], "mem_len")
            field = "segment_length" if config.model_type == "gallery_transformer" else field
            value = getattr(config, field)
            half = [x // 2 for x in value] if isinstance(value, list) else value // 2
            other = type(model)(type(config).from_dict(config.to_dict() | {field: half})).double().eval()
            other.load_state_dict(model.state_dict())
            assert_equal(got[1:].double(), direct(other, ids))
            assert model.config is config and getattr(config, field) == value
            continue
        length = getattr(config, "segment_length", None) or config.block_length
        for start in range(0, LENGTH - 1, length):
            part = ids[start : start + length + 1]
            if name in ("memory emptied", "memory and retrieval emptied", "memory tokens reset"):
                with torch.no_grad():
                    alone = model(part[None, :length]).logits[0, : len(part) - 1].float()
                loss = torch.nn.functional.cross_entropy(alone, part[1:], reduction="none") / math.log(2)
                assert_equal(got[start + 1 : start + len(part)].double(), loss.double())
    expected = {
        "transformer_xl": "memory emptied",
        "memorizing": "retrieval emptied",
        "block_recurrent": "state reset",
        "recurrent_memory": "memory tokens reset",
        "longformer": "window halved",
        "transformer_segments": "window halved",
    }
    if variant.name in expected:
        assert expected[variant.name] in found.worth


@causal(lambda variant: variant.name in ("memorizing", "block_recurrent", "block_recurrent_feedback"))
def test_a_source_that_is_forgotten_is_as_it_began(variant):
    """Until the first segment ends nothing differs; after it a reading without differs, and a memory whose gates are
    closed is worth nothing."""
    model, found = looked_at(variant, worth=True, most=0)
    name = "retrieval emptied" if variant.name == "memorizing" else "state reset"
    length = model.config.segment_length if variant.name == "memorizing" else model.config.block_length
    lost, whole = found.worth[name], found.surprise
    assert_equal(lost[1 : length + 1], whole[1 : length + 1])
    assert (lost[length + 1 :] - whole[length + 1 :]).abs().max() > 1e-3
    if variant.name == "memorizing":
        with torch.no_grad():
            for layer in model.config.memory_layers:
                model.model.layers[layer].self_attn.gate_bias.fill_(-1e4)
        closed = look(model, words(LENGTH), most=0, reach=False)
        assert_equal(closed.worth[name][1:], closed.surprise[1:])


@causal(others_slow=True)
def test_no_token_moves_a_loss_from_beyond_the_reach(variant):
    """A changed token and the gradients find nothing beyond what the intervals of all layers allow, where nothing else
    carries it on; and they do find something within."""
    model, found = looked_at(variant, reach=True, most=0)
    reach = found.reach
    assert reach.changed[1:9].isfinite().all() and reach.changed[1] > 0 and reach.gradient[1] > 0
    if not reach.further:
        ids = words(LENGTH)
        for place in reach.samples:
            changed = by_change(model, ids, [place])
            for distance in range(1, LENGTH - place):
                if distance > reach.allowed[place + distance]:
                    assert changed[distance] < 1e-5
        farthest = int(reach.allowed.max())
        assert not (reach.gradient[farthest + 1 :] > 1e-9).any()
    assert reach.further == any(name in variant.name for name in ("memorizing", "recurrent"))


@over(lambda variant, head: head in ("encoder", "masked") and not variant.heads[head].source)
def test_encoders_are_looked_at_too(variant, head):
    """All at once, without a surprise; the weights are those of the model's maps, global tokens marked."""
    model = variant.make(head, dtype=torch.float64).eval()
    ids, inputs = words(1, 21), {}
    if variant.name == "longformer":
        inputs["global_attention_mask"] = (torch.arange(21) == 2).long()[None]
    found = look(model, ids, most=21, **inputs)
    total = found.weights.sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)
    assert not found.predicts and found.worth == {} and found.reach is None and len(found.shown) == 21
    if not variant.one_by_one:
        with torch.no_grad():
            maps = model(ids, output_attentions=True, **inputs).attentions
        for layer, expected in enumerate(maps):
            for query, layers in found.shown.items():
                got = torch.zeros(expected.shape[1], 21)
                got.index_add_(1, layers[layer].positions[0], layers[layer].weights)
                torch.testing.assert_close(got, expected[0, :, query].float(), rtol=1e-4, atol=1e-6)
        if inputs:
            kind = found.sources.index("global tokens")
            assert_equal(found.weights[5, 0, :, kind], maps[0][0, :, 5, 2].float())


def test_what_cannot_be_looked_at_is_refused_by_name():
    variants = {v.name: v for v in VARIANTS}
    model = variants["transformer_xl"].make("causal").eval()
    for ids, options, message in (
        (words(2, 9), {}, "give one text"),
        (words(1), {}, "2 or more"),
        (words(9), dict(at=[9]), "positions 0 to 8"),
        ("a tale", {}, "ids are a str"),
        (words(9), dict(at=3), "at is 3; give positions"),
        (words(9), dict(at=[1.5]), "whole numbers in a list"),
        (words(9), dict(most=-1), "most is -1"),
        (words(9), dict(attention_mask=torch.ones(1, 9)), "attention_mask is given"),
        (words(9), dict(global_attention_mask=torch.ones(1, 9)), "global_attention_mask is given"),
    ):
        with pytest.raises(ValueError, match=message):
            look(model, ids, **options)
    with pytest.raises(ValueError, match="shape \\(1, 8\\); give \\(9,\\) or \\(1, 9\\)"):
        look(variants["longformer"].make("causal"), words(9), global_attention_mask=torch.ones(1, 8))
    with pytest.raises(TypeError, match="encoder-decoder"):
        look(variants["transformer"].make("seq2seq"), words(9))
    with pytest.raises(TypeError, match="no model of the gallery"):
        look(torch.nn.Linear(2, 2), words(9))


def test_padding_and_numbers_that_are_none_are_refused():
    """A reading of either would be a page of wrong numbers."""
    variants = {v.name: v for v in VARIANTS}
    encoder, mask = variants["longformer"].make("masked"), torch.ones(1, 9, dtype=torch.long)
    assert_equal(look(encoder, words(9), attention_mask=mask).weights, look(encoder, words(9)).weights)
    for padded in (mask.index_fill(1, torch.tensor([0, 1]), 0), mask.index_fill(1, torch.tensor([7, 8]), 0)):
        with pytest.raises(ValueError, match="attention_mask marks padding"):
            look(encoder, words(9), attention_mask=padded)
    causal = variants["transformer_xl"].make("causal")
    for model, message in ((causal, "surprise of token 1"), (encoder, "attention of")):
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(math.nan)
        with pytest.raises(ValueError, match=f"{message}.* is NaN"):
            look(model, words(9))


def test_a_look_leaves_the_model_as_it_was():
    """Its mode, its hooks and its weights; a cache of its own is all that it reads with."""
    model = {v.name: v for v in VARIANTS}["memorizing"].make("causal").train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    look(model, words(30), at=[7])
    assert model.training and all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_tokens_that_are_asked_for_are_shown_beside_those_of_most_surprise():
    model = {v.name: v for v in VARIANTS}["transformer_xl"].make("causal").eval()
    for at in ([5, 9], torch.tensor([5, 9])):
        found = look(model, words(30), at=at, most=3, worth=False, reach=False)
        best = found.surprise[1:].topk(3).indices.tolist()
        assert set(found.shown) == {4, 8, *best}


def test_a_cache_forgets_no_columns():
    model = {v.name: v for v in VARIANTS}["block_recurrent"].make("causal").eval()
    cache = GalleryCache(model.config)
    with torch.no_grad():
        model(words(1, 9), **{CACHE_NAME: cache})
    with pytest.raises(ValueError, match="reset_rows"):
        cache.forget("keys")
    cache.forget("state")
    assert all("state" not in state for state in cache.states)
