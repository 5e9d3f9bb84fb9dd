"""The Block-Recurrent Transformer against its plain twin, block_recurrent_transformer.py, and the checks of its
paper."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plain import block_recurrent_transformer as twin
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention
from variants import SIZES, assert_equal, loud, words

import hf_gallery as gallery

QUIET = dict(hidden_dropout=0.0, attention_dropout=0.0)
SMALL = dict(block_length=5, num_state_vectors=4, recurrent_layers=[1])


def config_of(**settings):
    return gallery.GalleryBlockRecurrentTransformerConfig(**SIZES | QUIET | SMALL | settings)


def make(kind=gallery.GalleryBlockRecurrentTransformerForCausalLM, seed=1, **settings):
    return loud(kind(config_of(**settings)), seed).double().eval()


# ------------------------------------------------------------------------------------------- the twin in every setting

SETTINGS = {
    "fixed, skip": dict(),
    "lstm, skip": dict(gate_type="lstm"),
    "fixed, dual": dict(recurrence_type="dual"),
    "lstm, dual": dict(gate_type="lstm", recurrence_type="dual"),
    "fixed, single": dict(recurrence_type="single"),
    "lstm, single": dict(gate_type="lstm", recurrence_type="single"),
    "two recurrent layers, single": dict(recurrence_type="single", recurrent_layers=[0, 2], num_state_vectors=6),
    "two recurrent layers": dict(recurrent_layers=[0, 2], num_state_vectors=7),
    "feedback": dict(feedback=True),
    "feedback to the first, lstm, dual": dict(
        feedback=True, recurrent_layers=[0], gate_type="lstm", recurrence_type="dual"
    ),
    "feedback to the last": dict(feedback=True, recurrent_layers=[2]),
    "feedback to the last, single": dict(feedback=True, recurrent_layers=[2], recurrence_type="single"),
    "one state vector": dict(num_state_vectors=1),
    "blocks of one": dict(block_length=1),
    "no recurrence": dict(recurrent_layers=[]),
}
settings_of_all = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
N = 18  # three blocks and a part


def in_parts(model, ids, cuts):
    logits, cache = [], None
    for part in ids.split(list(cuts), dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize("cuts", [(18,), (1,) * 18, (7, 11), (5, 5, 8), (3, 1, 14)], ids=lambda x: str(x[:4]))
@settings_of_all
@torch.no_grad()
def test_equals_the_twin(settings, cuts):
    """Logits, and the state that is carried on."""
    model, ids = make(**settings), words(1, N)
    states = {}
    expected = twin.hidden_states(model.model, ids[0], states=states) @ model.lm_head.weight.T
    got, cache = in_parts(model, ids, cuts)
    assert_equal(got[0], expected)
    for layer, values in states.items():
        assert_equal(cache.states[layer]["state"][0], values[-1])


@pytest.mark.parametrize("cuts", [(18,), (5, 13), (3, 8, 7), (7, 1, 10)], ids=str)
@settings_of_all
def test_gradients_equal_the_twin(settings, cuts):
    """Of every weight: through all blocks of a forward, and nothing through what an earlier one left."""
    model, ids = make(**settings), words(1, N)
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    expected = twin.logits(model, ids[0], starts)
    got = in_parts(model, ids, cuts)[0][0]
    assert_equal(got, expected)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    grads = [
        torch.autograd.grad((x * weight).sum(), parameters.values(), allow_unused=True, materialize_grads=True)
        for x in (got, expected)
    ]
    for name, a, b in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1), msg=name)
        if "gate" in name or "initial" in name or "o_proj" in name:  # a softmax over one thing teaches nothing
            assert b.abs().max() > 1e-6, name


# -------------------------------------------------------------------------------------------- the checks of the paper


def recurrence_of(model, layer=1):
    return model.model.layers[layer].self_attn.recurrence


def set_gates(part, keeps):
    """All gates of a state keep everything, or nothing."""
    for gate in (x for name, x in part.named_children() if name.endswith("gate")):
        if gate.lstm:
            for linear, sign in ((gate.forget_gate, 1), (gate.input_gate, -1)):
                linear.weight.zero_()
                linear.bias.fill_(sign * (60 if keeps else -60))
        else:
            gate.gate_bias.fill_(60 if keeps else -60)


gates = pytest.mark.parametrize(
    "settings", [SETTINGS[name] for name in SETTINGS if name.startswith(("fixed, ", "lstm, "))], ids=str
)


@gates
@torch.no_grad()
def test_a_gate_that_keeps_never_changes_the_state(settings):
    model, ids = make(**settings), words(2, 23)
    part = recurrence_of(model)
    set_gates(part, keeps=True)
    state = model(ids).past_key_values.states[1]["state"]
    assert_equal(state, part.initial.expand(2, -1, -1))


@gates
@torch.no_grad()
def test_a_gate_that_forgets_makes_the_state_anew(settings):
    """s' = y: what the first blocks held does not matter but through what the next state reads."""
    model, ids = make(**settings), words(2, 10)
    part = recurrence_of(model)
    set_gates(part, keeps=False)
    seen = []
    last = part.o_proj if part.kind == "skip" else part.feed_forward.down_proj
    last.register_forward_hook(lambda _, x, y: seen.append(y.tanh() if part.kind == "single" else y))
    state = model(ids).past_key_values.states[1]["state"]
    assert len(seen) == 2
    assert_equal(state, seen[-1])


@torch.no_grad()
@pytest.mark.parametrize("gate_type", ["fixed", "lstm"])
def test_the_states_order_does_not_matter(gate_type):
    """Initial states and their ids moved together move the state, and leave the tokens alone."""
    model, ids = make(gate_type=gate_type), words(2, 23)
    expected = model(ids)
    part, order = recurrence_of(model), [2, 0, 3, 1]
    part.initial.copy_(part.initial[order])
    part.ids.copy_(part.ids[order])
    got = model(ids)
    assert_equal(got.logits, expected.logits)
    assert_equal(got.past_key_values.states[1]["state"], expected.past_key_values.states[1]["state"][:, order])


@torch.no_grad()
def test_ids_keep_the_states_apart():
    model, ids = make(), words(1, 23)
    part = recurrence_of(model)
    part.initial.copy_(part.initial[:1].expand(4, -1))

    def spread():
        state = model(ids).past_key_values.states[1]["state"]
        return (state - state[:, :1]).abs().max()

    assert spread() > 0.1
    part.ids.copy_(part.ids[:1].expand(4, -1))
    assert spread() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("feedback", [False, True], ids=["", "feedback"])
def test_a_token_changes_nothing_before_it(feedback):
    """And no state before its block's end; afterwards the state carries it beyond all windows."""
    model, ids, n = make(feedback=feedback, num_hidden_layers=3), words(1, 40), 40
    base, states = model(ids).logits, states_by_token(model, ids)
    for p in (0, 3, 4, 5, 17):
        other = ids.clone()
        other[0, p] = (ids[0, p] + 1) % 90
        changed = (model(other).logits - base).abs().amax(-1)[0] > 1e-9
        assert not changed[:p].any() and changed[p]
        # three windows of 5 reach 15 tokens on; only the state goes farther
        assert changed[min(n - 1, p + 16) :].all()
        end = p - p % 5 + 4
        moved = [(a - b).abs().max() > 1e-9 for a, b in zip(states_by_token(model, other), states, strict=True)]
        assert not any(moved[:end]) and all(moved[end:])


def windowed(model, ids):
    """Logits (B, T, V) of a decoder with a sliding window and T5 bias: all tokens at once, each under a mask, out of
    torch's attention and transformers' T5 bias."""
    c, (b, t) = model.config, ids.shape
    t5 = T5Config(d_model=c.hidden_size, num_heads=c.num_attention_heads, is_decoder=True, d_kv=10)
    distance = torch.arange(t)[:, None] - torch.arange(t)
    hidden = ~((distance >= 1) & (distance <= c.block_length))
    t5_attention = T5Attention(t5, has_relative_attention_bias=True, layer_idx=0).double()

    def normed(x, layer):
        return F.rms_norm(x, (c.hidden_size,), layer.weight, c.layer_norm_eps)

    x = F.embedding(ids, model.model.embed_tokens.weight) * c.hidden_size**0.5
    for layer in model.model.layers:
        attn, y = layer.self_attn, normed(x, layer.self_attn_norm)
        q, k, v = (
            F.linear(y, project.weight).view(b, t, -1, 10).transpose(1, 2)
            for project in (attn.project.q_proj, attn.project.k_proj, attn.project.v_proj)
        )
        q, k = (z / torch.sqrt(z.pow(2).sum(-1, keepdim=True) + 1e-6) for z in (q, k))
        scale = attn.project.scale.abs()[:, None, None]
        t5_attention.relative_attention_bias.weight = attn.relative_bias.table.weight
        bias = (t5_attention.compute_bias(t, t) * scale).masked_fill(hidden, -math.inf)  # (1, H, T, T)
        out = F.scaled_dot_product_attention(q * scale, k, v, attn_mask=bias, scale=1.0)
        out = torch.cat([torch.zeros_like(out[:, :, :1]), out[:, :, 1:]], dim=2)  # the first token sees nothing
        x = x + F.linear(out.transpose(1, 2).flatten(2), attn.o_proj.weight)
        inner = F.relu(F.linear(normed(x, layer.feed_forward_norm), layer.feed_forward.up_proj.weight))
        x = x + F.linear(inner, layer.feed_forward.down_proj.weight)
    return F.linear(normed(x, model.model.norm), model.model.embed_tokens.weight)


@pytest.mark.parametrize("cuts", [(40,), (1,) * 40, (7, 13, 20)], ids=lambda x: str(x[:4]))
@torch.no_grad()
def test_without_recurrence_it_is_a_decoder_with_a_sliding_window(cuts):
    model, ids = make(recurrent_layers=[]), words(2, 40)
    assert_equal(in_parts(model, ids, cuts)[0], windowed(model, ids))


@torch.no_grad()
def test_without_recurrence_nothing_reaches_beyond_the_windows():
    model, ids = make(recurrent_layers=[]), words(1, 40)
    base, other = model(ids).logits, ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % 90
    changed = (model(other).logits - base).abs().amax(-1)[0] > 1e-9
    assert changed.nonzero().flatten().tolist() == list(range(3, 3 + 15 + 1))


@torch.no_grad()
def test_attention_itself_does_not_see_its_own_token():
    """[p - W, p - 1]: W keys, and none for the first token of a document, which gets zeros."""
    model = make()
    for parts in ((23,), (1,) * 23, (4, 9, 10)):
        cache, p = None, 0
        for n in parts:
            output = model(words(1, n, seed=p), past_key_values=cache, use_cache=True, output_attentions=True)
            cache = output.past_key_values
            for seen in output.attentions:
                s = seen.shape[-1]
                for t in range(n):
                    columns = (seen[0, 0, t] > 0).nonzero().flatten()
                    assert [s - n + t - int(c) for c in columns] == list(range(min(5, p + t), 0, -1))
            p += n
    seen = []
    attn = model.model.layers[0].self_attn
    attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(words(1, 4))
    assert (seen[0][0, 0] == 0).all() and (seen[0][0, 1] != 0).all()


@torch.no_grad()
def states_by_token(model, ids):
    """The state (S, E) after each token of one row, read token by token."""
    cache, states = None, []
    for part in ids.split(1, dim=1):
        cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        states.append(cache.states[1]["state"][0])
    return states


@pytest.mark.parametrize("feedback", [False, True], ids=["", "feedback"])
@torch.no_grad()
def test_the_state_advances_when_its_block_is_full(feedback):
    """Never sooner or later, for each row by its own count of tokens, padding or none."""
    model = make(feedback=feedback)
    ids, mask = words(3, 60), torch.randint(0, 2, (3, 60), generator=torch.Generator().manual_seed(4))
    mask[0] = 1
    cache, before, advanced = None, None, 0
    for t in range(60):
        cache = model(ids[:, t : t + 1], mask[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
        state = cache.states[1]["state"]
        if before is not None:
            for row in range(3):
                ends = bool(mask[row, t]) and int(cache.seen[row]) % 5 == 0
                assert torch.equal(state[row], before[row]) != ends
                advanced += ends
        before = state.clone()
    assert advanced == sum(int(n) // 5 for n in mask.sum(1))


@torch.no_grad()
def test_the_state_matters():
    """Pitfall of ports: a state that is dropped, or the first one read for ever."""
    model, ids, more = make(), words(1, 20), words(1, 4, seed=1)
    cache = model(ids).past_key_values
    expected = model(more, past_key_values=cache.copy()).logits
    for change in (torch.zeros_like, lambda x: recurrence_of(model).initial[None].expand_as(x).clone()):
        other = cache.copy()
        other._content = other._content.without_derived()
        states = [dict(state) for state in other._content.states]
        states[1]["state"] = states[1]["state"].map(change)
        other._content = replace(other._content, states=tuple(states))
        assert (model(more, past_key_values=other).logits - expected).abs().max() > 1e-2


def test_the_first_state_learns_through_blocks_of_one_forward():
    """From the fourth block it gets a gradient, if all blocks came in one forward, and none across two."""
    model, ids = make(num_hidden_layers=2, recurrent_layers=[1]), words(1, 20)
    initial = recurrence_of(model).initial

    def gradient(cuts):
        logits, _ = in_parts(model, ids, cuts)
        grad = torch.autograd.grad(logits[:, 15:].square().sum(), [initial], allow_unused=True)[0]
        return 0.0 if grad is None else float(grad.abs().max())

    assert gradient((20,)) > 1e-4
    assert gradient((10, 10)) == gradient((15, 5)) == gradient((5, 15)) == 0.0
    assert gradient((4, 16)) > 1e-4  # its first block was not over: it is still the learned one that enters


@torch.no_grad()
def test_what_is_kept_of_a_state_is_that_of_the_state():
    """Its keys and values are kept between tokens of a block; a forward with gradients, whose weights may move, makes
    them anew."""
    model, ids = make(), words(2, 13)
    part = recurrence_of(model)
    reads = []
    part.project.k_proj.register_forward_hook(lambda *_: reads.append(1))
    cache = model(ids).past_key_values
    state = cache.states[1]
    made_anew = part.project.keys_values(part.norm(state["state"]) + part.ids)
    for got, expected in zip((state["state_keys"], state["state_values"]), made_anew, strict=True):
        assert_equal(got, expected)
    reads.clear()
    model(words(2, 1, seed=1), past_key_values=cache)
    assert not reads
    model(words(2, 1, seed=2), past_key_values=cache)  # the last one of its block
    assert len(reads) == 1
    state["state_keys"].zero_()
    with torch.enable_grad():
        model.train()
        cache = model(words(2, 1, seed=3), past_key_values=cache).past_key_values
    assert len(reads) == 2 and "state_keys" not in cache.states[1]


def test_how_it_starts():
    """State normal(0, 0.1), ids normal(0, 1), gates near a half or, for lstm, by a tenth of the usual variance."""
    config = gallery.GalleryBlockRecurrentTransformerConfig()
    assert config.recurrent_layers == [9] and (config.block_length, config.num_state_vectors) == (512, 512)
    wide = dict(hidden_size=240, num_state_vectors=50, recurrence_type="dual")
    part = recurrence_of(gallery.GalleryBlockRecurrentTransformerForCausalLM(config_of(**wide)))
    assert part.initial.std().item() == pytest.approx(0.1, rel=0.05)
    assert part.ids.std().item() == pytest.approx(1.0, rel=0.05)
    assert part.gate.gate_bias.std().item() == pytest.approx(0.1, rel=0.2)
    assert (part.cross_scale == 1).all() and (part.project.scale == 1).all()
    other = gallery.GalleryBlockRecurrentTransformerForCausalLM(config_of(initial_scale=8.0))
    scales = [p for name, p in other.named_parameters() if name.endswith("scale")]
    assert len(scales) == 3 + 3 and all((p == 8).all() for p in scales)
    part = recurrence_of(gallery.GalleryBlockRecurrentTransformerForCausalLM(config_of(**wide, gate_type="lstm")))
    for gate in (part.gate, part.feed_forward_gate):
        for layer in (gate.forget_gate, gate.input_gate):
            assert layer.weight.std().item() == pytest.approx((0.1 / layer.in_features) ** 0.5, rel=0.05)
            assert layer.bias.std().item() == pytest.approx(0.1, rel=0.2)
    assert part.o_proj.weight.std().item() == pytest.approx(part.o_proj.in_features**-0.5, rel=0.05)


def test_half_precision_keeps_its_type():
    ids = words(2, 24)
    exact = make()(ids, labels=ids).loss.item()
    model = make().to(torch.bfloat16).train()
    output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert all(x.dtype == torch.bfloat16 for state in output.past_key_values.states for x in state.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = make().float()(ids, labels=ids)
    assert output.loss.item() == pytest.approx(exact, rel=0.05) and again.loss.item() == pytest.approx(exact, rel=0.05)


# --------------------------------------------------------------------------------------------------------- bad input

WRONG = [
    (dict(block_length=0), r"block_length.*\b0\b"),
    (dict(block_length=-5), "block_length.*-5"),
    (dict(block_length=2.5), r"block_length.*2\.5"),
    (dict(num_state_vectors=0), r"num_state_vectors.*\b0\b"),
    (dict(recurrent_layers=[3]), r"recurrent_layers.*\b3\b.*0 to 2.*num_hidden_layers 3"),
    (dict(recurrent_layers=[-1]), r"recurrent_layers.*-1.*0 to 2"),
    (dict(recurrent_layers=[1, 1]), r"recurrent_layers.*\[1, 1\].*different"),
    (dict(recurrent_layers=2), r"recurrent_layers is 2.*list"),
    (dict(gate_type="gru"), "gate_type.*gru.*fixed, lstm"),
    (dict(recurrence_type="gru"), "recurrence_type.*gru.*skip, dual, single"),
    (dict(feedback=True, recurrent_layers=[0, 2]), r"feedback.*recurrent_layers.*\[0, 2\].*one"),
    (dict(feedback=True, recurrent_layers=[]), r"feedback.*recurrent_layers.*\[\].*one"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(s) for s, _ in WRONG])
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)
    with pytest.raises(ValueError, match=message):
        gallery.GalleryBlockRecurrentTransformerConfig.from_dict(config_of().to_dict() | settings)


def test_a_cache_of_another_setting():
    model = make()
    for setting in (dict(block_length=6), dict(num_state_vectors=5), dict(recurrent_layers=[2])):
        (name,) = setting
        cache = make(**setting)(words(1, 9)).past_key_values
        with pytest.raises(ValueError, match=rf"past_key_values.*{name}"):
            model(words(1, 3), past_key_values=cache)
        assert cache.get_seq_length() == 9


def test_maps_of_attention_and_feedback():
    with pytest.raises(ValueError, match="output_attentions.*feedback"):
        make(feedback=True)(words(1, 9), output_attentions=True)
