"""Transformer-XL against the authors' computation (transformer_xl_authors.py), and the checks of its paper."""

import math

import pytest
import torch
from plain import transformer_xl as plain_twin
from plain import transformer_xl_authors as reference
from torch import nn
from variants import SIZES, VOCAB, assert_equal, loud, words

import hf_gallery as gallery
from hf_gallery import GalleryTransformerXLConfig

QUIET = dict(hidden_dropout=0.0, attention_dropout=0.0)
SETTINGS = {
    "plain": dict(),
    "mem longer than segment": dict(segment_length=4, mem_len=11),
    "no memory": dict(mem_len=0),
    "same_length": dict(same_length=True, mem_len=6),
    "same_length, long": dict(same_length=True, mem_len=9, segment_length=4),
    "same_length, one key": dict(same_length=True, mem_len=1),
    "clamp_len": dict(clamp_len=6, mem_len=8),
    "zeros": dict(initial_memory="zeros", mem_len=9),
    "zeros, same_length, pre_lnorm": dict(initial_memory="zeros", same_length=True, mem_len=9, pre_lnorm=True),
    "untie_r": dict(untie_r=True),
    "pre_lnorm": dict(pre_lnorm=True),
    "odd heads": dict(num_attention_heads=5, head_dim=7),
    "layer_norm_eps": dict(layer_norm_eps=1e-2),
    "adaptive": dict(cutoffs=[13, 41], div_val=2),
    "adaptive, div_val 1": dict(cutoffs=[13, 41]),
    "adaptive, reversed": dict(cutoffs=[13, 41, 60], div_val=2, cluster_order="reversed"),
    "adaptive, projs untied": dict(cutoffs=[13, 41], div_val=2, tie_projs=[False, True, True]),
    "adaptive, nothing tied": dict(cutoffs=[13, 41], div_val=2, tie_word_embeddings=False),
    "narrow embeddings": dict(embedding_size=14),
    "narrow embeddings, adaptive": dict(embedding_size=14, cutoffs=[13, 41], div_val=3),
    "narrow embeddings, clusters": dict(embedding_size=14, cutoffs=[13, 41]),
}
settings_of_all = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def make(kind=gallery.GalleryTransformerXLForCausalLM, **settings):
    settings = SIZES | QUIET | dict(segment_length=7, mem_len=5) | settings
    return loud(kind(GalleryTransformerXLConfig(**settings)), seed=1).double().eval()


def by_the_authors(model, ids, length=None, mems=None):
    """Log-probabilities (B, T, V), the embeddings (T, B, E) that they come from, and mems."""
    w, config = reference.weights_of(model), reference.config_of(model.config)
    x = reference.embed(w, config, ids.T)
    if mems is None and model.config.initial_memory == "zeros":
        mems = [x.new_zeros(config.mem_len, *x.shape[1:])] * config.n_layer
    hidden, mems = reference.run(w, config, x, length or model.config.segment_length, mems)
    order = model.config.cluster_order
    result = reference.log_probabilities(w, config, hidden.transpose(0, 1).flatten(0, 1), order)
    return result.view(*ids.shape, -1), x, mems


def mean_loss(log_probabilities, ids):
    return -log_probabilities[:, :-1].gather(-1, ids[:, 1:, None]).mean()


# -------------------------------------------------------------------------------------------------- the authors' code


@settings_of_all
@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "with gradients"])
def test_equals_the_authors(settings, gradients):
    """One forward over four segments against four segments with mems, and the next forward against the next mems."""
    model = make(**settings)
    ids, more = words(2, model.config.segment_length * 5), words(2, 9, seed=1)
    with torch.set_grad_enabled(gradients):
        expected, _, mems = by_the_authors(model, ids)
        output = model(ids, use_cache=True)
        assert_equal(output.logits.log_softmax(-1), expected)
        expected, _, _ = by_the_authors(model, more, mems=mems)
        assert_equal(model(more, past_key_values=output.past_key_values).logits.log_softmax(-1), expected)


@settings_of_all
def test_gradients_equal_the_authors(settings):
    """Of every weight, over one forward of many segments, and of a second forward that goes on from its cache."""
    model = make(**settings)
    model.train()
    ids = words(2, model.config.segment_length * 3)
    more = words(2, 9, seed=1)
    parameters = dict(model.named_parameters())
    expected, _, mems = by_the_authors(model, ids)
    wanted = [mean_loss(expected, ids)]
    wanted.append(mean_loss(by_the_authors(model, more, mems=mems)[0], more))
    output = model(ids, labels=ids, use_cache=True)
    got = [output.loss, model(more, labels=more, past_key_values=output.past_key_values).loss]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
        grads = [
            torch.autograd.grad(x, parameters.values(), allow_unused=True, materialize_grads=True) for x in (a, b)
        ]
        for name, x, y in zip(parameters, *grads, strict=True):
            # the loss is float32, and so are the gradients that start from it
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert sum(y.abs().max() > 1e-4 for y in grads[1]) > len(parameters) // 2


@pytest.mark.parametrize("settings", [SETTINGS[x] for x in ("plain", "same_length", "untie_r", "pre_lnorm")], ids=str)
def test_gradients_of_hidden_states_in_float64(settings):
    """The same below the loss, to the last digits, with embeddings as leaves."""
    model = make(**settings)
    backbone = model.model.train()
    length = model.config.segment_length
    embeds = torch.randn(2, 3 * length, 30, dtype=torch.float64, requires_grad=True)
    more = torch.randn(2, 9, 30, dtype=torch.float64, requires_grad=True)
    weight, weight_more = torch.randn_like(embeds), torch.randn_like(more)
    w, config = reference.weights_of(model), reference.config_of(model.config)
    hidden, mems = reference.run(w, config, embeds.transpose(0, 1), length)
    later, _ = reference.run(w, config, more.transpose(0, 1), length, mems)
    wanted = (hidden.transpose(0, 1) * weight).sum(), (later.transpose(0, 1) * weight_more).sum()
    output = backbone(inputs_embeds=embeds, use_cache=True)
    later = backbone(inputs_embeds=more, past_key_values=output.past_key_values)
    got = (output.last_hidden_state * weight).sum(), (later.last_hidden_state * weight_more).sum()
    leaves = [embeds, more, *backbone.parameters()]
    for a, b in zip(got, wanted, strict=True):
        assert_equal(a, b)
        grads = [torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in (a, b)]
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


# --------------------------------------------------------------------------------------------------------- the formula


@settings_of_all
@torch.no_grad()
def test_the_plain_twin_equals_the_authors(settings):
    """Two ways to the same numbers: query by query, and by segments with mems and shifted scores."""
    model, ids = make(**settings), words(1, 17)
    expected = by_the_authors(model, ids)[0][0]
    assert_equal(plain_twin.logits(model, ids[0]).log_softmax(-1), expected)
    assert_equal(model(ids).logits[0].log_softmax(-1), expected)


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "with gradients"])
def test_one_layer_with_all_memory_is_one_long_segment(gradients):
    ids = words(2, 23)
    with torch.set_grad_enabled(gradients):
        whole = make(num_hidden_layers=1, segment_length=23, mem_len=0)(ids).logits
        assert_equal(make(num_hidden_layers=1, segment_length=7, mem_len=23)(ids).logits, whole)
        assert_equal(make(num_hidden_layers=1, segment_length=1, mem_len=22)(ids).logits, whole)


def test_clamp_len_1_makes_all_the_past_one_distance():
    """One layer: the order of the past does not matter, only what stands at the query itself."""
    ids, order = words(1, 20), torch.cat([torch.randperm(19), torch.tensor([19])])
    options = dict(num_hidden_layers=1, segment_length=23)
    model = make(**options, clamp_len=1)
    last = model(ids).logits[:, -1]
    assert_equal(model(ids[:, order]).logits[:, -1], last)
    free = make(**options)
    assert (free(ids[:, order]).logits[:, -1] - free(ids).logits[:, -1]).abs().max() > 0.1
    # distance 1 itself is not clamped away
    assert (make(**options, clamp_len=2)(ids).logits[:, -1] - last).abs().max() > 1e-3


def test_clamp_len_beyond_all_distances_changes_nothing():
    ids = words(2, 23)
    assert_equal(make(clamp_len=12)(ids).logits, make()(ids).logits)  # 5 of memory and 7 of segment: at most 11
    assert (make(clamp_len=10)(ids).logits - make()(ids).logits).abs().max() > 1e-3


def test_without_position_terms_it_is_plain_attention():
    """u = v = 0 and W_r = 0: torch's own encoder layer with a causal mask."""
    model = make(segment_length=23)
    with torch.no_grad():
        model.model.content_bias.zero_()
        model.model.position_bias.zero_()
        for layer in model.model.layers:
            layer.self_attn.r_proj.weight.zero_()
    twin = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(30, 3, 41, dropout=0.0, batch_first=True, dtype=torch.float64), 3,
        enable_nested_tensor=False,
    )  # fmt: skip
    with torch.no_grad():
        for ours, theirs in zip(model.model.layers, twin.layers, strict=True):
            a = ours.self_attn
            theirs.self_attn.in_proj_weight.copy_(torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]))
            theirs.self_attn.in_proj_bias.zero_()
            theirs.self_attn.out_proj.weight.copy_(a.o_proj.weight)
            theirs.self_attn.out_proj.bias.zero_()
            for mine, name in (
                (ours.feed_forward.up_proj, "linear1"),
                (ours.feed_forward.down_proj, "linear2"),
                (ours.self_attn_norm, "norm1"),
                (ours.feed_forward_norm, "norm2"),
            ):
                getattr(theirs, name).load_state_dict(mine.state_dict())
    ids = words(2, 23)
    embeds = model.get_input_embeddings()(ids)
    expected = twin.train()(embeds, mask=torch.ones(23, 23, dtype=torch.bool).triu(1))
    assert_equal(model.model(ids).last_hidden_state, expected)


def visible_keys(model, parts):
    """For every position: the distances of the keys that some weight falls on, through forwards of the given sizes."""
    cache, result, done = None, [], 0
    for n in parts:
        output = model.model(words(1, n, seed=done), past_key_values=cache, output_attentions=True, use_cache=True)
        cache = output.past_key_values
        seen = (output.attentions[0][0] > 0).any(0)  # (T, C + T)
        t, s = seen.shape
        for i in range(t):
            result.append({s - t + i - j for j in seen[i].nonzero().flatten().tolist()})
        done += n
    return result


@pytest.mark.parametrize("parts", [(23,), (1,) * 23, (5, 18), (2, 9, 12)], ids=str)
@pytest.mark.parametrize(("segment", "memory"), [(7, 5), (4, 11), (7, 1), (3, 3)])
@pytest.mark.parametrize("same_length", [False, True], ids=["", "same_length"])
def test_visible_keys(same_length, segment, memory, parts):
    """same_length: mem_len keys, itself among them, or all so far while they are fewer; else memory and segment."""
    model = make(segment_length=segment, mem_len=memory, same_length=same_length)
    with torch.no_grad():
        got = visible_keys(model, parts)
    for p, distances in enumerate(got):
        first = p - memory + 1 if same_length else p - p % segment - memory
        assert distances == set(range(p - max(0, first) + 1)), p


@pytest.mark.parametrize(("segment", "memory"), [(7, 5), (4, 11), (7, 1), (3, 3)])
@pytest.mark.parametrize("same_length", [False, True], ids=["", "same_length"])
def test_visible_keys_are_those_of_the_authors(same_length, segment, memory):
    """Their mask, segment by segment, while the memory is empty, filling and full."""
    model = make(segment_length=segment, mem_len=memory, same_length=same_length)
    with torch.no_grad():
        got = visible_keys(model, (segment * 5,))
    config, memory_now, p = reference.config_of(model.config), 0, 0
    for _ in range(5):
        seen = ~reference.hidden_keys(config, segment, memory_now)
        for i in range(segment):
            assert got[p] == {memory_now + i - j for j in seen[i].nonzero().flatten().tolist()}
            p += 1
        memory_now = min(memory, memory_now + segment)


def test_context_grows_with_depth():
    """Section 3.2: the longest dependency is about layers x memory, though each layer sees its window only."""
    ids = words(1, 24)

    def reach(layers):
        model = make(segment_length=4, mem_len=4, num_hidden_layers=layers)
        base = model(ids).logits[0, -1]
        changes = []
        for at in range(24):
            changed = ids.clone()
            changed[0, at] = (ids[0, at] + 1) % 90
            changes.append((model(changed).logits[0, -1] - base).abs().max() > 1e-9)
        return 23 - changes.index(True)

    with torch.no_grad():
        # the last token, 23, stands at the end of the segment 20..23 and sees 16; 16 sees 12, and so on
        assert [reach(n) for n in (1, 2, 3)] == [7, 11, 15]


# --------------------------------------------------------------------------------------------------- adaptive softmax

ADAPTIVE = [name for name in SETTINGS if "adaptive" in name or "narrow" in name]


@pytest.mark.parametrize("settings", [SETTINGS[x] for x in ADAPTIVE], ids=ADAPTIVE)
def test_log_probabilities_sum_to_one(settings):
    model = make(**settings)
    with torch.no_grad():
        logits = model(words(2, 9)).logits
    assert logits.shape == (2, 9, VOCAB)
    if model.config.cutoffs:
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2, 9, dtype=logits.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [SETTINGS[x] for x in ADAPTIVE], ids=ADAPTIVE)
def test_adaptive_loss_equals_that_of_all_words(settings):
    """In training the loss is computed cluster by cluster; words of every cluster, -100 and shift_labels."""
    model = make(**settings)
    ids = torch.arange(VOCAB - 3).view(2, -1)  # every word
    labels = ids.clone()
    labels[0, 5:9] = -100
    labels[1, 45] = -100
    with torch.no_grad():
        log_probabilities = model(ids).logits.double().log_softmax(-1)
        shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
        wanted = [-log_probabilities[i, t, shifted[i, t]] for i in range(2) for t in range(47) if shifted[i, t] >= 0]
        total = torch.stack(wanted).sum()
        for training in (False, True):
            model.train(training)
            for options, expected in (
                (dict(labels=labels), total / len(wanted)),
                (dict(shift_labels=shifted), total / len(wanted)),
                (dict(labels=labels, num_items_in_batch=100), total / 100),
                (dict(shift_labels=shifted, num_items_in_batch=torch.tensor(100)), total / 100),
            ):
                torch.testing.assert_close(model(ids, **options).loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_adaptive_weights_are_tied():
    """Tables with output weights; projections per cluster as tie_projs says, by default all (the published are)."""

    def tied(model):
        named = dict(model.named_parameters(remove_duplicate=False))
        pairs = [(f"lm_head.weights.{i}", f"model.embed_tokens.tables.{i}.weight") for i in range(3)]
        pairs += [(f"lm_head.projs.{i}", f"model.embed_tokens.projs.{i}") for i in range(3)]
        return [named[a] is named[b] for a, b in pairs]

    assert tied(make(**SETTINGS["adaptive"])) == [True] * 6
    assert tied(make(**SETTINGS["adaptive, projs untied"])) == [True, True, True, False, True, True]
    assert tied(make(**SETTINGS["adaptive, nothing tied"])) == [False] * 6
    model = make()
    assert model.lm_head.weight is model.get_input_embeddings().weight


# ------------------------------------------------------------------------------------------------------ initialisation


@pytest.mark.parametrize("settings", [dict(), dict(cutoffs=[100, 250], div_val=2), dict(untie_r=True)], ids=str)
def test_initialisation(settings):
    """The authors' train.py: weights normal(0, 0.02), projections (0, 0.01), norms (1, 0.02), biases 0."""
    config = GalleryTransformerXLConfig(vocab_size=500, hidden_size=80, num_hidden_layers=6, num_attention_heads=8,
                                        intermediate_size=150, segment_length=7, mem_len=5, **settings)  # fmt: skip
    model = gallery.GalleryTransformerXLForCausalLM(config)
    for name, x in model.named_parameters():
        if "norm" in name:
            mean, std = (1.0, 0.02) if name.endswith("weight") else (0.0, 0.0)
        elif name.endswith(("content_bias", "position_bias")) or x.dim() == 2:
            mean, std = 0.0, 0.01 if ".projs." in name else 0.02
        else:
            mean, std = 0.0, 0.0
        slack = 6 / math.sqrt(x.numel())
        assert abs(x.mean() - mean) <= std * slack + 1e-9, name
        assert (x == mean).all() if std == 0 else abs(x.std() / std - 1) < slack, name


def test_hidden_states():
    """The embeddings and every layer's output, as the cache of the authors' code keeps them."""
    model = make()
    output = model(words(2, 23), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert_equal(output.hidden_states[0], model.get_input_embeddings()(words(2, 23)))
    assert_equal(output.hidden_states[-1], model.model(words(2, 23)).last_hidden_state)


def test_attentions_equal_with_and_without_gradients():
    model = make()
    ids = words(2, 23)
    with_gradients = model(ids, output_attentions=True)
    with torch.no_grad():
        without = model(ids, output_attentions=True)
        plain = model(ids)
    assert_equal(without.logits, plain.logits)
    assert_equal(with_gradients.logits, plain.logits)
    for a, b in zip(with_gradients.attentions, without.attentions, strict=True):
        assert_equal(a, b)
