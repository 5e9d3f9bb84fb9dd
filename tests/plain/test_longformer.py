"""Longformer against transformers' own, against its plain twin (longformer.py), and the checks of its paper."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from plain import longformer as twin
from variants import FLOAT32, SEP, SIZES, assert_equal, loud, words

import hf_gallery as gallery
from hf_gallery.convert.longformer import Longformer

QUIET = dict(hidden_dropout=0.0, attention_dropout=0.0)
DECODER = dict(position_embedding_type="relative", norm_position="pre")


def make(kind, seed=1, **settings):
    config = gallery.GalleryLongformerConfig(**SIZES | QUIET | dict(sep_token_id=SEP) | settings)
    return loud(kind(config), seed).double().eval()


def causal(**settings):
    return make(gallery.GalleryLongformerForCausalLM, **settings)


def encoder(**settings):
    return make(gallery.GalleryLongformerModel, **settings)


# ------------------------------------------------------------------------------------------------- transformers' model

THEIR_PAD = 1
HEADS = {
    "masked": transformers.LongformerForMaskedLM,
    "sequence": transformers.LongformerForSequenceClassification,
    "tokens": transformers.LongformerForTokenClassification,
    "question": transformers.LongformerForQuestionAnswering,
}


def plan_for(them):
    """Converts transformers' model, without files."""
    config = them.config.to_dict() | {"architectures": [type(them).__name__]}
    return Longformer().plan(SimpleNamespace(config=config, tensors=them.state_dict()), "longformer")


def pair(head, window=(4, 8, 4)):
    """transformers' model with loud weights, and ours with the same, in float64, but for its softmax."""
    sizes = dict(vocab_size=97, hidden_size=30, num_hidden_layers=3, num_attention_heads=3, intermediate_size=41)
    sizes |= dict(
        type_vocab_size=1,
        num_labels=2 if head == "question" else 4,
        max_position_embeddings=64,
        attention_window=list(window),
    )
    special = dict(bos_token_id=0, eos_token_id=2, sep_token_id=SEP, pad_token_id=THEIR_PAD)
    no_dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.LongformerConfig(**sizes, **special, **no_dropout, layer_norm_eps=1e-5)
    them = loud(HEADS[head](config), 1)
    plan, theirs = plan_for(them), them.state_dict()
    us = plan.model(plan.config)
    weights = {name: take.make(*(theirs[n] for n in take.names)) for name, take in plan.take.items()}
    assert set(us.load_state_dict(weights, strict=False).missing_keys) <= set(us.all_tied_weights_keys)
    return them.double(), us.double()


def rows_of(length, padding):
    """ids (2, length) and a mask; the first row is whole, the second ends `padding` tokens early."""
    ids = words(2, length).clamp(min=3)
    ids[:, [length // 4, length // 2, length - 1 - padding]] = SEP  # theirs wants three
    mask = torch.ones_like(ids)
    mask[1, length - padding :] = 0
    return ids.masked_fill(mask == 0, THEIR_PAD), mask


GLOBALS = {"none": [], "first": [0], "several": [0, 5, 11], "neighbours": [7, 8, 9], "default": None}


def global_mask(ids, mask, which):
    """Columns of the first row; in the second one column moves, so that rows differ."""
    if GLOBALS[which] is None:
        return None
    result = torch.zeros_like(ids)
    result[:, GLOBALS[which]] = 1
    if GLOBALS[which]:
        result[1, GLOBALS[which][-1]] = 0
        result[1, 3] = 1
    return result * mask


def outputs_of(output):
    names = ("logits", "start_logits", "end_logits")
    return [output[name] for name in names if name in output]


def assert_same_output(them, us, ids, mask, given):
    """Logits at the tokens of two models in one mode, and the gradients of their sum's square."""
    given = {} if given is None else {"global_attention_mask": given}
    found = []
    for model in (them, us):
        output = outputs_of(model(input_ids=ids, attention_mask=mask, **given))
        parts = [x if x.dim() == 2 and x.shape[1] == 4 else x[mask == 1] for x in output]
        total = sum(x.square().sum() for x in parts)
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(total, named.values(), allow_unused=True)
        found.append((parts, {name: g for name, g in zip(named, grads, strict=True) if g is not None}))
    (parts, grads), (our_parts, our_grads) = found
    our_name = {n: name for name, take in plan_for(them).take.items() for n in take.names}
    for a, b in zip(our_parts, parts, strict=True):
        torch.testing.assert_close(a, b, **FLOAT32)
    if not all(g.isfinite().all() for g in grads.values()):
        # theirs has no derivative where a token of padding sees padding only
        assert (mask == 0).any() and all(g.isfinite().all() for g in our_grads.values())
        return
    checked, scale = 0, max(float(g.abs().max()) for g in grads.values())
    for name, g in grads.items():
        name = our_name[name]
        if name.endswith("embed_positions.weight"):
            continue  # theirs embeds what it pads, too
        ours = our_grads.get(name)
        if ours is None:
            assert g.abs().max() == 0, name  # theirs runs the global maps where there are no global tokens
            continue
        torch.testing.assert_close(ours, g, rtol=1e-4, atol=1e-6 * scale, msg=name)
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("which", ["none", "first", "several", "neighbours"])
@pytest.mark.parametrize(("length", "padding"), [(23, 0), (23, 6), (24, 0), (16, 3), (33, 17)])
def test_equals_transformers(length, padding, which):
    """Logits and gradients, with windows of unequal width, at lengths that are and are not multiples of them; global
    tokens inside each other's windows, and not the same in both rows."""
    them, us = pair("masked")
    ids, mask = rows_of(length, padding)
    assert_same_output(them.eval(), us.eval(), ids, mask, global_mask(ids, mask, which))


@pytest.mark.parametrize("which", ["default", "several"])
@pytest.mark.parametrize("head", ["sequence", "tokens", "question"])
def test_heads_equal_transformers(head, which):
    """By default the first token is global for a sequence, the question for an answer, and none for tokens."""
    them, us = pair(head)
    ids, mask = rows_of(23, 5)
    assert_same_output(them.eval(), us.eval(), ids, mask, global_mask(ids, mask, which))


def test_losses_equal_transformers():
    ids, mask = rows_of(23, 0)
    given = global_mask(ids, mask, "first")
    labels = ids.clone()
    labels[0, 2:9] = -100
    for head, targets in (
        ("masked", dict(labels=labels)),
        ("sequence", dict(labels=torch.tensor([3, 1]))),
        ("tokens", dict(labels=(labels % 4).masked_fill(labels == -100, -100))),
        ("question", dict(start_positions=torch.tensor([13, 15]), end_positions=torch.tensor([14, 40]))),
    ):
        them, us = pair(head)
        output, expected = (
            m.eval()(ids, attention_mask=mask, global_attention_mask=given, **targets) for m in (us, them)
        )
        torch.testing.assert_close(output.loss.double(), expected.loss.double(), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_padding_takes_no_part_in_an_answer():
    """Theirs gives it a share of the probability; here a row's loss is that of the row alone."""
    us = pair("question")[1].eval()
    ids, mask = rows_of(23, 5)
    where = dict(start_positions=torch.tensor([13, 15]), end_positions=torch.tensor([14, 17]))
    padded = us(ids, mask, **where)
    alone = [
        us(ids[i : i + 1, :n], **{k: x[i : i + 1] for k, x in where.items()}).loss for i, n in enumerate((23, 18))
    ]
    torch.testing.assert_close(padded.loss, sum(alone) / 2, rtol=1e-5, atol=1e-6)
    assert padded.start_logits.softmax(-1)[1, 18:].sum() == 0


def test_a_separator_in_padding_ends_no_question():
    us = pair("question")[1].eval()
    ids, mask = words(1, 23).clamp(min=3), torch.ones(1, 23, dtype=torch.long)
    ids[:, 9] = SEP
    mask[:, :4] = 0
    with torch.no_grad():
        expected = us(ids, attention_mask=mask)
        got = us(ids.masked_fill(mask == 0, SEP), attention_mask=mask)
        alone = us(ids[:, 4:])
    assert_equal(got.start_logits, expected.start_logits)
    assert_equal(got.end_logits[:, 4:], alone.end_logits)


# ------------------------------------------------------------------------------------------- the twin in every setting

SETTINGS = {
    "window": dict(attention_window=5, **DECODER),
    "window of one": dict(attention_window=1, attention_dilation=[1, 4, 1], **DECODER),
    "dilated": dict(attention_window=[5, 3, 2], attention_dilation=[1, 2, 3], **DECODER),
    "dilated everywhere": dict(attention_window=4, attention_dilation=3, position_embedding_type="relative"),
    "learned, post-norm": dict(attention_window=[2, 6, 3], attention_dilation=[2, 1, 2]),
    "wider than the input": dict(attention_window=40, attention_dilation=2, **DECODER),
}
ENCODERS = {
    "window": dict(attention_window=4),
    "dilated": dict(attention_window=[4, 2, 6], attention_dilation=[1, 3, 2]),
    "relative": dict(attention_window=[4, 2, 6], attention_dilation=[2, 3, 1], **DECODER),
    "narrow tables": dict(attention_window=4, embedding_size=12),
}


def assert_same_gradients(model, got, expected, at_least=10):
    """Of every weight, from the square of the hidden states (T, E)."""
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2), dtype=got.dtype)
    parameters = dict(model.named_parameters())
    grads = [
        torch.autograd.grad((x * weight).sum(), parameters.values(), allow_unused=True, materialize_grads=True)
        for x in (got, expected)
    ]
    for name, a, b in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1), msg=name)
    assert sum(b.abs().max() > 1e-4 for b in grads[1]) >= at_least


@pytest.mark.parametrize("marked", [[], [0], [1, 4, 5, 13]], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_decoder_equals_the_twin(settings, marked):
    model = encoder(is_decoder=True, **settings)
    ids = words(1, 19)
    given = torch.zeros_like(ids)
    given[:, marked] = 1
    expected = twin.hidden_states(model, ids[0], marked)
    got = model(ids, global_attention_mask=given).last_hidden_state[0]
    assert_equal(got, expected)
    assert_same_gradients(model, got, expected)


@pytest.mark.parametrize("marked", [[], [0], [2, 3, 11]], ids=str)
@pytest.mark.parametrize("settings", ENCODERS.values(), ids=ENCODERS.keys())
def test_an_encoder_equals_the_twin(settings, marked):
    model = encoder(**settings)
    ids = words(1, 17)
    given = torch.zeros_like(ids)
    given[:, marked] = 1
    expected = twin.hidden_states(model, ids[0], marked)
    got = model(ids, global_attention_mask=given).last_hidden_state[0]
    assert_equal(got, expected)
    assert_same_gradients(model, got, expected)


# -------------------------------------------------------------------------------------------- the checks of the paper


def transformer_with(model, maps):
    """A GalleryTransformer encoder with the weights of a Longformer; attention by its q_proj... or q_global_proj..."""
    c = model.config
    same = (
        "scale_embedding",
        "norm_position",
        "position_embedding_type",
        "position_offset",
        "max_position_embeddings",
        "embedding_norm",
    )
    settings = {name: getattr(c, name) for name in same}
    twin = gallery.GalleryTransformerModel(
        gallery.GalleryTransformerConfig(**SIZES | QUIET | settings, hidden_act=c.hidden_act)
    )
    weights = {}
    for name, x in model.state_dict().items():
        if maps == "_global" and ("q_proj" in name or "k_proj" in name or "v_proj" in name):
            continue
        if maps != "_global" and "_global" in name:
            continue
        weights[name.replace("_global", "")] = x
    twin.stack.load_state_dict(weights)
    return twin.double().eval()


@torch.no_grad()
def test_a_window_over_everything_is_full_attention():
    model, ids = encoder(attention_window=2 * 23), words(2, 23)
    expected = transformer_with(model, "")(ids).last_hidden_state
    assert_equal(model(ids).last_hidden_state, expected)
    assert (encoder(attention_window=20)(ids).last_hidden_state - expected).abs().max() > 1e-3


@torch.no_grad()
def test_global_maps_equal_to_the_local_ones_change_nothing_in_a_full_window():
    model, ids = encoder(attention_window=2 * 23), words(2, 23)
    for layer in model.layers:
        for x in "qkv":
            getattr(layer.self_attn, f"{x}_global_proj").load_state_dict(
                getattr(layer.self_attn, f"{x}_proj").state_dict()
            )
    given = torch.zeros_like(ids)
    given[:, [0, 7]] = 1
    assert_equal(model(ids, global_attention_mask=given).last_hidden_state, model(ids).last_hidden_state)


@torch.no_grad()
def test_all_tokens_global_is_full_attention_by_the_global_maps():
    model, ids = encoder(attention_window=4), words(2, 23)
    got = model(ids, global_attention_mask=torch.ones_like(ids)).last_hidden_state
    assert_equal(got, transformer_with(model, "_global")(ids).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("is_decoder", [False, True], ids=["encoder", "decoder"])
def test_dilation_is_interleaved_problems_without_it(is_decoder):
    """Tokens that are no multiple of g apart never meet."""
    settings = dict(attention_window=4, is_decoder=is_decoder, position_embedding_type="none")
    dilated, plain = encoder(attention_dilation=3, **settings), encoder(**settings)
    ids = words(2, 3 * 8)
    got = dilated(ids).last_hidden_state
    for first in range(3):
        assert_equal(got[:, first::3], plain(ids[:, first::3]).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("g", [1, 2, 3])
def test_visible_keys_are_counted_by_hand(g):
    """With a width of 6: three each side and itself, fewer at the ends; a decoder of 6: six before and itself."""
    ids, n = words(1, 20), 20
    model = encoder(attention_window=6, attention_dilation=g)
    for layer, seen in enumerate(model(ids, output_attentions=True).attentions):
        counts = (seen[0, 0] > 0).sum(-1).tolist()
        assert counts == [min(3, p // g) + 1 + min(3, (n - 1 - p) // g) for p in range(n)], layer
    model = encoder(attention_window=6, attention_dilation=g, is_decoder=True)
    for seen in model(ids, output_attentions=True).attentions:
        assert (seen[0, 0] > 0).sum(-1).tolist() == [min(6, p // g) + 1 for p in range(n)]


@torch.no_grad()
@pytest.mark.parametrize("which", ["none", "several"])
def test_attention_maps_give_the_same_result(which):
    """output_attentions takes another path, and pays for the maps only."""
    model, (ids, mask) = encoder(attention_window=[4, 2, 6], attention_dilation=[1, 3, 2]), rows_of(23, 5)
    given = global_mask(ids, mask, which)
    plain = model(ids, mask, given).last_hidden_state
    looked = model(ids, mask, given, output_attentions=True)
    assert_equal(looked.last_hidden_state, plain)
    for probabilities in looked.attentions:
        assert_equal(probabilities.sum(-1), mask[:, None].expand(-1, 3, -1).double())
        assert (probabilities[1, :, :, mask[1] == 0] == 0).all()


@torch.no_grad()
def test_context_grows_with_depth():
    """The last token depends on what is the sum of windows times dilations away, and on nothing beyond."""
    windows, dilations, ids = [3, 2, 4], [1, 4, 2], words(1, 25)
    for layers in (1, 2, 3):
        model = causal(
            num_hidden_layers=layers,
            attention_window=windows[:layers],
            attention_dilation=dilations[:layers],
            **DECODER,
        )
        base = model(ids).logits[0, -1]
        changes = []
        for at in range(25):
            other = ids.clone()
            other[0, at] = (ids[0, at] + 1) % 90
            changes.append((model(other).logits[0, -1] - base).abs().max() > 1e-9)
        reach = sum(w * g for w, g in zip(windows[:layers], dilations[:layers], strict=True))
        assert 24 - changes.index(True) == reach


@torch.no_grad()
@pytest.mark.parametrize("marked", [[], [2, 11]], ids=str)
def test_a_decoder_does_not_look_ahead(marked):
    model, ids = causal(attention_window=4, attention_dilation=2, **DECODER), words(1, 23)
    given = torch.zeros_like(ids)
    given[:, marked] = 1
    base = model(ids, global_attention_mask=given).logits
    for p in (0, 2, 11, 12, 22):
        other = ids.clone()
        other[0, p] = (ids[0, p] + 1) % 90
        changed = (model(other, global_attention_mask=given).logits - base).abs().amax(-1)[0] > 1e-9
        assert not changed[:p].any() and changed[p]


def test_global_maps_learn_from_global_tokens_only():
    model, ids = encoder(attention_window=4), words(2, 23)
    maps = [getattr(layer.self_attn, f"{x}_global_proj").weight for layer in model.layers for x in "qkv"]
    given = torch.zeros_like(ids)
    for marked in (False, True):
        given[1, 3] = marked
        total = model(ids, global_attention_mask=given).last_hidden_state.square().sum()
        grads = torch.autograd.grad(total, maps, allow_unused=True)
        assert all((g is not None and g.abs().max() > 1e-6) == marked for g in grads)


# ---------------------------------------------------------------------------------------- global tokens of a decoder

CHUNKED = [(1,) * 23, (5, 18), (8, 8, 7), (20, 1, 1, 1)]


def a_text():
    """Two rows; row 0 is padded in front and has two global tokens, row 1 three, one of them late."""
    ids, mask, given = words(2, 23), torch.ones(2, 23, dtype=torch.long), torch.zeros(2, 23, dtype=torch.long)
    mask[0, :5] = 0
    given[0, [5, 9]] = 1
    given[1, [2, 3, 17]] = 1
    return ids, mask, given


@torch.no_grad()
def in_chunks(model, cuts, cache=None, start=0):
    ids, mask, given = a_text()
    parts = []
    for n in cuts:
        at = slice(start, start + n)
        output = model(ids[:, at], mask[:, at], given[:, at], past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + n
        parts.append(output.logits)
    return torch.cat(parts, dim=1), cache


DILATED = dict(attention_window=[3, 2, 2], attention_dilation=[1, 2, 3], **DECODER)


@pytest.mark.parametrize("cuts", CHUNKED, ids=lambda x: str(x[:4]))
@torch.no_grad()
def test_global_tokens_are_seen_wherever_the_input_is_cut(cuts):
    """Also long after they have left the window: their keys stay in the cache. Rows as alone."""
    model = causal(**DILATED)
    ids, mask, given = a_text()
    whole = model(ids, mask, given).logits
    parts, cache = in_chunks(model, cuts)
    assert_equal(parts[mask == 1], whole[mask == 1])
    assert cache.states[0]["global_keys"].shape[2] == 3
    assert (model(ids, mask).logits - whole)[:, -1].abs().max() > 1e-3
    assert_equal(whole[0, 5:], model(ids[:1, 5:], None, given[:1, 5:]).logits[0])


@torch.no_grad()
def test_the_mask_of_global_tokens_over_all_columns():
    model = causal(**DILATED)
    ids, mask, given = a_text()
    whole = model(ids, mask, given).logits
    cache = model(ids[:, :9], mask[:, :9], given[:, :9], use_cache=True).past_key_values
    later = model(ids[:, 9:], mask[:, 9:], given, past_key_values=cache).logits
    assert_equal(later, whole[:, 9:])


@torch.no_grad()
def test_rows_with_global_tokens_are_reset_moved_and_kept(tmp_path):
    model = causal(**DILATED)
    ids, mask, given = a_text()
    _, cache = in_chunks(model, (14,))
    whole = model(ids, mask, given).logits
    moved, kept = cache.copy(), cache.copy()
    moved.reorder_cache(torch.tensor([1, 0, 1]))
    swap = [1, 0, 1]
    got = model(ids[swap, 14:], None, given[swap, 14:], past_key_values=moved).logits
    assert_equal(got, whole[swap, 14:])
    kept.save(tmp_path / "cache")
    loaded = gallery.GalleryCache.load(tmp_path / "cache")
    assert_equal(in_chunks(model, (4, 5), loaded, start=14)[0], whole[:, 14:])
    cache.reset_rows([1])
    got = model(ids[:, 14:], None, given[:, 14:], past_key_values=cache).logits
    assert_equal(got[0], whole[0, 14:])
    assert_equal(got[1], model(ids[1:, 14:], None, given[1:, 14:]).logits[0])


@torch.no_grad()
def test_generating_with_global_tokens():
    """They are those of the prompt, however the tokens are chosen, with a cache and without."""
    model = causal(tie_word_embeddings=False, **DILATED)
    model.generation_config.eos_token_id = None
    prompt, given = words(2, 11), torch.zeros(2, 11, dtype=torch.long)
    given[0, 0] = given[1, 2] = given[1, 3] = 1
    ids = prompt
    for n in range(20):
        logits = model(ids, None, F.pad(given, (0, n))).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    options = dict(global_attention_mask=given, max_new_tokens=20, do_sample=False)
    assert torch.equal(model.generate(prompt, **options), ids)
    assert torch.equal(model.generate(prompt, use_cache=False, **options), ids)
    assert torch.equal(model.generate(prompt, prefill_chunk_size=4, **options), ids)
    beams = model.generate(prompt, num_beams=3, **options)
    assert torch.equal(beams, model.generate(prompt, num_beams=3, use_cache=False, **options))
    assert not torch.equal(model.generate(prompt, **options | dict(global_attention_mask=None)), ids)


# --------------------------------------------------------------------------------------------------------- bad input

WRONG = [
    (dict(attention_window=0), r"attention_window.*\b0\b"),
    (dict(attention_window=-4), "attention_window.*-4"),
    (dict(attention_window=[4, 0, 4]), r"attention_window.*\[4, 0, 4\]"),
    (dict(attention_window=2.0), r"attention_window.*2\.0"),
    (dict(attention_window=[4, 4]), r"attention_window.*\b2\b.*num_hidden_layers.*\b3\b"),
    (dict(attention_dilation=0), r"attention_dilation.*\b0\b"),
    (dict(attention_dilation=[1, 1, 1, 2]), r"attention_dilation.*\b4\b.*num_hidden_layers.*\b3\b"),
    (dict(position_embedding_type="rotary"), "position_embedding_type.*rotary.*relative"),
    (dict(hidden_size=33, position_embedding_type="relative"), r"hidden_size.*\b33\b.*even"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(s) for s, _ in WRONG])
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        gallery.GalleryLongformerConfig(**SIZES | settings)


def test_an_encoders_window_has_two_sides():
    for window in (5, [4, 5, 4]):
        with pytest.raises(ValueError, match=r"attention_window.*5.*even"):
            encoder(attention_window=window)
        encoder(attention_window=window, is_decoder=True)


def test_masks_that_do_not_fit():
    model, ids = causal(**DILATED), words(2, 6)
    for shape in ((2, 5), (3, 6), (2, 7), (6,), (2, 1, 6)):
        with pytest.raises(ValueError, match=r"global_attention_mask.*\(2, 6\)") as error:
            model(ids, global_attention_mask=torch.ones(shape))
        assert str(tuple(shape)) in str(error.value)
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"global_attention_mask.*\(2, 11\).*\(2, 6\).*\(2, 12\)"):
        model(ids, global_attention_mask=torch.ones(2, 11), past_key_values=cache)
    assert cache.get_seq_length() == 6
    with pytest.raises(ValueError, match="output_attentions.*global"):
        model(ids, global_attention_mask=torch.ones(2, 6), output_attentions=True)


def test_bad_labels_of_tokens():
    model, ids = pair("tokens")[1], words(2, 6)
    for labels, message in (
        (ids[:, :5], r"\(2, 5\).*\(2, 6\)"),
        (torch.full_like(ids, 4), r"\b4\b.*num_labels 4"),
        (torch.full_like(ids, -1), "-1.*num_labels 4"),
    ):
        with pytest.raises(ValueError, match=f"labels.*{message}"):
            model(ids, labels=labels)


def test_questions_without_an_end():
    model = pair("question")[1]
    ids = words(3, 9).clamp(min=3)
    ids[0, 4] = SEP
    with pytest.raises(ValueError, match=rf"input_ids.*sep_token_id {SEP}.*\[1, 2\].*global_attention_mask"):
        model(ids)
    with pytest.raises(ValueError, match="inputs_embeds.*global_attention_mask"):
        model(inputs_embeds=model.get_input_embeddings()(ids))
    model.config.sep_token_id = None
    with pytest.raises(ValueError, match="sep_token_id.*None.*global_attention_mask"):
        model(ids)
    model(ids, global_attention_mask=torch.zeros_like(ids))


# ------------------------------------------------------------------------------------------------------- Longformer-XL

XL = dict(attention_window=[5, 3, 6], segment_length=7)


@pytest.mark.parametrize("positions", ["relative", "learned", "sinusoidal", "none"])
@torch.no_grad()
def test_over_segments_it_is_the_windowed_decoder(positions):
    """In numbers, at any length and through the cache, while the memory holds all windows, as it does by default."""
    settings = dict(position_embedding_type=positions, max_position_embeddings=64)
    plain = causal(**settings, attention_window=XL["attention_window"])
    ids = words(2, 30)
    expected = plain(ids).logits
    for memory in (dict(), dict(mem_len=6), dict(mem_len=20)):
        xl = causal(**settings, **XL, **memory)
        xl.load_state_dict(plain.state_dict())
        assert xl.config.mem_len == memory.get("mem_len", 6) and xl.config.cache_capacity == 6
        assert xl.config.n_positions == plain.config.n_positions
        assert_equal(xl(ids).logits, expected)
        cache, parts = None, []
        for part in ids.split([9, 1, 13, 7], dim=1):
            output = xl(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
        assert_equal(torch.cat(parts, dim=1), expected)
    short = causal(**settings, **XL, mem_len=2)
    short.load_state_dict(plain.state_dict())
    difference = (short(ids).logits - expected).abs().amax((0, 2))
    assert difference[:7].max() < 1e-9 and difference[7] > 1e-3  # the first query whose window the memory cuts


def test_gradients_stop_at_segments_and_reach_the_maps_of_the_memory():
    """The windowed decoder has gradients of all tokens in the window; over segments a token learns from none of an
    earlier segment, in the same forward or another, but by the maps that make its keys and values."""
    ids = words(1, 14)
    found = {}
    for name, settings in (("window", {}), ("segments", dict(segment_length=7))):
        model = causal(**DECODER, attention_window=5, num_hidden_layers=1, **settings)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeds).logits[:, 7]  # the first of the second segment
        key = model.model.layers[0].self_attn.k_proj.weight
        found[name] = torch.autograd.grad(logits.square().sum(), (embeds, key))
    for (name, (embeds, key)), reached in zip(found.items(), (range(2, 8), range(7, 8)), strict=True):
        assert [p for p in range(14) if embeds[0, p].abs().max() > 0] == list(reached), name
        assert key.abs().max() > 0, name
    torch.testing.assert_close(found["window"][1], found["segments"][1])  # one layer: the states are constants anyway


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(segment_length=0), "segment_length is 0"),
        (dict(mem_len=4), "mem_len is 4 and segment_length None"),
        (dict(segment_length=7, mem_len=-1), "mem_len is -1"),
        (dict(segment_length=7, attention_dilation=2), "attention_dilation is 2 and segment_length 7"),
        (dict(segment_length=7, is_encoder_decoder=True), "segment_length is 7 and is_encoder_decoder is True"),
    ],
    ids=str,
)
def test_segments_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        gallery.GalleryLongformerConfig(**settings)


def test_an_encoder_has_no_segments():
    with pytest.raises(ValueError, match="segment_length is 7, and segments with a memory are read by a decoder"):
        make(gallery.GalleryLongformerForMaskedLM, attention_window=4, segment_length=7)
    with pytest.raises(ValueError, match="segment_length is 7 and is_encoder_decoder is True"):
        make(gallery.GalleryLongformerForConditionalGeneration, attention_window=4, segment_length=7)


def test_the_encoder_decoder_has_a_config_of_its_own():
    """Refused by one stack, by relative positions, and windows for layers that there are not."""
    kind = gallery.GalleryLongformerForConditionalGeneration
    with pytest.raises(ValueError, match="GalleryLongformerModel has one stack"):
        make(gallery.GalleryLongformerModel, attention_window=4, is_encoder_decoder=True)
    with pytest.raises(ValueError, match="num_encoder_layers is 2, of an encoder-decoder"):
        make(gallery.GalleryLongformerModel, attention_window=4, num_encoder_layers=2)
    with pytest.raises(ValueError, match="position_embedding_type is 'relative' and is_encoder_decoder is True"):
        make(kind, attention_window=4, position_embedding_type="relative")
    with pytest.raises(ValueError, match="attention_window has 3 entries.*num_encoder_layers 2"):
        make(kind, attention_window=[4, 4, 4], num_encoder_layers=2)
    with pytest.raises(ValueError, match="global_attention_mask and encoder_outputs are given"):
        model = make(kind, attention_window=4)
        source, marked = words(1, 5), torch.ones(1, 5)
        encoded = model.get_encoder()(source)
        model(encoder_outputs=encoded, global_attention_mask=marked, decoder_input_ids=source)
