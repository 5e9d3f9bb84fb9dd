"""The Transformer against torch.nn.Transformer, values and gradients. Against transformers' GPT-2, BERT and Marian:
test_convert_transformer.py."""

import math

import pytest
import torch
from test_law_2_batch_anyhow import padded, scatter
from torch import nn
from variants import SIZES, VOCAB, assert_equal, loud, words

import hf_gallery as gallery
from hf_gallery import GalleryTransformerConfig

QUIET = dict(hidden_dropout=0.0, attention_dropout=0.0)


def make(kind, **settings):
    settings = SIZES | QUIET | settings
    return loud(kind(GalleryTransformerConfig(**settings)), seed=1).double().eval()


def copy_parameters(target, source, names):
    """names: (target's name, source's, map or None). Every parameter of the target must be written."""
    left = dict(target.named_parameters())
    source = source if isinstance(source, dict) else dict(source.named_parameters()) | dict(source.named_buffers())
    with torch.no_grad():
        for to, origin, change in names:
            tensor = source[origin] if isinstance(origin, str) else torch.cat([source[name] for name in origin])
            left.pop(to).copy_(tensor if change is None else change(tensor))
    assert not left, f"not written: {sorted(left)}"


def affine(to, origin, change=None):
    return [(f"{to}.weight", f"{origin}.weight", change), (f"{to}.bias", f"{origin}.bias", None)]


# ------------------------------------------------------------------------------------------------ torch.nn.Transformer


def torch_layer_names(to, origin, cross):
    """The parameters of a torch layer, from those of a gallery layer."""
    names = []
    for theirs, ours in (("self_attn", "self_attn"), *([("multihead_attn", "cross_attn")] if cross else [])):
        for kind in ("weight", "bias"):
            parts = [f"{origin}.{ours}.{x}_proj.{kind}" for x in "qkv"]
            names.append((f"{to}.{theirs}.in_proj_{kind}", parts, None))
        names += affine(f"{to}.{theirs}.out_proj", f"{origin}.{ours}.o_proj")
    names += affine(f"{to}.linear1", f"{origin}.feed_forward.up_proj")
    names += affine(f"{to}.linear2", f"{origin}.feed_forward.down_proj")
    norms = (
        ["self_attn_norm", "cross_attn_norm", "feed_forward_norm"]
        if cross
        else ["self_attn_norm", "feed_forward_norm"]
    )
    for i, norm in enumerate(norms):
        names += affine(f"{to}.norm{i + 1}", f"{origin}.{norm}")
    return names


def torch_options(config):
    activation = {"relu": "relu", "gelu": "gelu"}[config.hidden_act]
    return dict(
        d_model=config.hidden_size, nhead=config.num_attention_heads, dim_feedforward=config.intermediate_size,
        dropout=0.0, activation=activation, layer_norm_eps=config.layer_norm_eps, batch_first=True,
        norm_first=config.norm_position == "pre", dtype=torch.float64,
    )  # fmt: skip


def torch_stack(stack, kind="encoder"):
    """A torch encoder or decoder with the weights of a gallery stack."""
    config, cross = stack.config, kind == "decoder"
    layer = (nn.TransformerDecoderLayer if cross else nn.TransformerEncoderLayer)(**torch_options(config))
    norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, dtype=torch.float64)
    norm = norm if config.norm_position == "pre" else None
    count = len(stack.layers)
    if cross:
        twin = nn.TransformerDecoder(layer, count, norm)
    else:
        twin = nn.TransformerEncoder(layer, count, norm, enable_nested_tensor=False)
    names = [x for i in range(count) for x in torch_layer_names(f"layers.{i}", f"layers.{i}", cross)]
    copy_parameters(twin, stack, names + (affine("norm", "norm") if norm is not None else []))
    return twin.train()  # without dropout; eval() would take torch's fast path, which is another computation


def embedded(model, ids):
    """Token embeddings and positions by the formulas of sections 3.4 and 3.5, on the model's table."""
    config = model.config
    table = model.get_input_embeddings().weight
    x = table[ids] * (math.sqrt(config.hidden_size) if config.scale_embedding else 1.0)
    positions = torch.zeros(ids.shape[1], config.hidden_size, dtype=torch.float64)
    for p in range(ids.shape[1]):
        for i in range(config.hidden_size // 2):
            angle = p / 10000 ** (2 * i / config.hidden_size)
            positions[p, 2 * i], positions[p, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return x + positions


def hidden_mask(t):
    return torch.ones(t, t, dtype=torch.bool).triu(1)


def assert_same_gradients(ours, theirs, names):
    """ours, theirs: modules after backward; names as for copy_parameters."""
    source, target = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for to, origin, _ in names:
        parts = [origin] if isinstance(origin, str) else origin
        assert_equal(torch.cat([source[name].grad for name in parts]), target[to].grad, to)


forms = pytest.mark.parametrize(
    "settings",
    [
        dict(norm_position="post", hidden_act="relu"),
        dict(norm_position="pre", hidden_act="gelu"),
        dict(norm_position="post", hidden_act="relu", layer_norm_eps=1e-2, scale_embedding=False),
    ],
    ids=["post", "pre", "no scale"],
)


@pytest.mark.parametrize("is_decoder", [True, False], ids=["decoder", "encoder"])
@forms
def test_one_stack_equals_torch(settings, is_decoder):
    """Hidden states, and the gradient of every weight, of the embeddings too."""
    model = make(gallery.GalleryTransformerModel, is_decoder=is_decoder, **settings)
    twin = torch_stack(model.stack)
    table = model.get_input_embeddings().weight
    ids, weight = words(2, 23), torch.randn(2, 23, 30, dtype=torch.float64)
    mask = hidden_mask(23) if is_decoder else None

    expected = twin(embedded(model, ids), mask=mask)
    (expected * weight).sum().backward()
    table_gradient, table.grad = table.grad, None
    got = model(ids).last_hidden_state
    assert_equal(got, expected)
    (got * weight).sum().backward()
    assert_equal(table.grad, table_gradient)
    names = [x for i in range(3) for x in torch_layer_names(f"layers.{i}", f"layers.{i}", False)]
    assert_same_gradients(model.stack, twin, names)


@forms
def test_encoder_decoder_equals_torch(settings):
    """With padding in the source and in the target, logits and gradients."""
    model = make(
        gallery.GalleryTransformerForConditionalGeneration, num_encoder_layers=2, num_decoder_layers=3, **settings
    )
    encoder, decoder = torch_stack(model.model.encoder), torch_stack(model.model.decoder, "decoder")
    source, target = words(3, 11), words(3, 7, seed=1)
    source_mask = padded((11, 4, 8), "right", 11)
    target_mask = padded((7, 5, 2), "right", 7)
    table = model.get_input_embeddings().weight
    weight = torch.randn(3, 7, VOCAB, dtype=torch.float64) * target_mask[..., None]

    memory = encoder(embedded(model, source), src_key_padding_mask=source_mask == 0)
    expected = decoder(
        embedded(model, target), memory, tgt_mask=hidden_mask(7), memory_key_padding_mask=source_mask == 0
    )
    expected = expected @ table.T
    (expected * weight).sum().backward()
    table_gradient, table.grad = table.grad, None
    got = model(source, source_mask, decoder_input_ids=target, decoder_attention_mask=target_mask, use_cache=False)
    assert_equal(got.logits[target_mask == 1], expected[target_mask == 1])
    (got.logits * weight).sum().backward()
    assert_equal(table.grad, table_gradient)
    for stack, twin, cross, count in (
        (model.model.encoder, encoder, False, 2),
        (model.model.decoder, decoder, True, 3),
    ):
        names = [x for i in range(count) for x in torch_layer_names(f"layers.{i}", f"layers.{i}", cross)]
        assert_same_gradients(stack, twin, names)


def test_the_module_torch_calls_transformer():
    """nn.Transformer as a whole: it puts a norm at the end, which pre-norm needs and post-norm has not."""
    model = make(gallery.GalleryTransformerForConditionalGeneration, norm_position="pre", num_hidden_layers=2)
    twin = nn.Transformer(**torch_options(model.config), num_encoder_layers=2, num_decoder_layers=2).train()
    names = []
    for part, cross in (("encoder", False), ("decoder", True)):
        for i in range(2):
            names += torch_layer_names(f"{part}.layers.{i}", f"{part}.layers.{i}", cross)
        names += affine(f"{part}.norm", f"{part}.norm")
    copy_parameters(twin, model.model, names)
    source, target = words(2, 11), words(2, 7)
    expected = twin(embedded(model, source), embedded(model, target), tgt_mask=hidden_mask(7))
    assert_equal(model(source, decoder_input_ids=target).logits, expected @ model.get_input_embeddings().weight.T)


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("settings", [dict(), dict(norm_position="pre"), dict(segment_length=7)], ids=str)
def test_a_later_token_never_changes_an_earlier_output(settings):
    model = make(gallery.GalleryTransformerForCausalLM, **settings)
    ids = words(1, 23)
    before = model(ids).logits
    for at in (22, 14, 3):
        changed = ids.clone()
        changed[0, at] = (ids[0, at] + 1) % 90
        after = model(changed).logits
        assert_equal(after[:, :at], before[:, :at])
        assert ((after[:, at] - before[:, at]).abs() > 1e-3).any()


def test_an_encoder_without_positions_does_not_know_the_order():
    ids, order = words(2, 23), torch.randperm(23)
    for settings in (dict(norm_position="post"), dict(norm_position="pre")):
        model = make(gallery.GalleryTransformerModel, position_embedding_type="none", **settings)
        assert_equal(model(ids[:, order]).last_hidden_state, model(ids).last_hidden_state[:, order])
        model = make(gallery.GalleryTransformerModel, **settings)
        assert (model(ids[:, order]).last_hidden_state - model(ids).last_hidden_state[:, order]).abs().max() > 0.1


def test_a_segment_sees_itself_only():
    """segment_length cuts the input: every segment gives what it gives alone."""
    model = make(gallery.GalleryTransformerForCausalLM, segment_length=7)
    ids = words(2, 23)
    whole = model(ids).logits
    for start in range(0, 23, 7):
        part = ids[:, start : start + 7]
        assert_equal(whole[:, start : start + 7], model(part).logits)
    assert_equal(whole[:, :7], make(gallery.GalleryTransformerForCausalLM)(ids[:, :7]).logits)


@pytest.mark.parametrize("kind", ["left", "holes"])
def test_attentions_of_padded_rows(kind):
    """Weights over the input's own columns: rows sum to 1 at tokens, no weight on padding."""
    model = make(gallery.GalleryTransformerForCausalLM)
    mask = padded((13, 6, 9), kind, 15)
    attentions = model(scatter([words(n) for n in (13, 6, 9)], mask), mask, output_attentions=True).attentions
    assert len(attentions) == 3
    for a in attentions:
        assert a.shape == (3, 3, 15, 15)
        assert_equal(a.sum(-1), mask[:, None].expand(3, 3, 15).double())
        assert (a.masked_select(mask[:, None, None] == 0) == 0).all()
        assert (a.triu(1) == 0).all()


def test_attentions_with_a_cache():
    model = make(gallery.GalleryTransformerForCausalLM)
    ids = words(2, 15)
    whole = model(ids, output_attentions=True).attentions
    cache = model(ids[:, :9]).past_key_values
    later = model(ids[:, 9:], past_key_values=cache, output_attentions=True).attentions
    for a, b in zip(later, whole, strict=True):
        assert_equal(a, b[:, :, 9:])


def test_logits_to_keep():
    model = make(gallery.GalleryTransformerForCausalLM)
    ids = words(2, 15)
    whole = model(ids).logits
    assert_equal(model(ids, logits_to_keep=1).logits, whole[:, -1:])
    assert_equal(model(ids, logits_to_keep=torch.tensor([3, 0])).logits, whole[:, [3, 0]])


def test_losses_of_a_language_model():
    """labels are shifted inside, shift_labels are not; -100 is left out; num_items_in_batch divides the sum."""
    model = make(gallery.GalleryTransformerForCausalLM)
    ids = words(2, 15)
    labels = ids.clone()
    labels[0, :4] = -100
    log_probabilities = model(ids).logits.log_softmax(-1)
    terms = [-log_probabilities[i, t, ids[i, t + 1]] for i in range(2) for t in range(14) if labels[i, t + 1] != -100]
    total = torch.stack(terms).sum()
    total = total.float()  # the loss is, whatever the logits, as in transformers
    assert_equal(model(ids, labels=labels).loss, total / len(terms))
    assert_equal(model(ids, labels=labels, num_items_in_batch=100).loss, total / 100)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert_equal(model(ids, shift_labels=shifted).loss, total / len(terms))


def test_position_ids_replace_what_is_embedded():
    model = make(gallery.GalleryTransformerForCausalLM, position_embedding_type="learned", max_position_embeddings=30)
    ids = words(2, 9)
    assert_equal(model(ids, position_ids=torch.arange(9)[None]).logits, model(ids).logits)
    moved = model(ids, position_ids=torch.arange(5, 14)[None]).logits
    table = model.model.stack.embed_positions.weight
    with torch.no_grad():
        table[:9] = table[5:14].clone()
    assert_equal(moved, model(ids).logits)


# ------------------------------------------------------------------------------------------------------ initialisation


def test_xavier_initialisation():
    """Glorot and Bengio 2010, as the authors' code initialises: uniform in +- sqrt(6 / (rows + columns))."""
    model = gallery.GalleryTransformerForConditionalGeneration(
        GalleryTransformerConfig(
            vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=200
        )  # fmt: skip
    )
    checked = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            bound = math.sqrt(6 / sum(module.weight.shape))
            assert 0.99 * bound < module.weight.abs().max() <= bound
            assert abs(module.weight.std() / (bound / math.sqrt(3)) - 1) < 0.05, name
            assert (module.bias == 0).all()
            checked += 1
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert checked == 2 * 6 + 2 * 10
    table = model.get_input_embeddings().weight
    assert abs(table.std() * 8 - 1) < 0.05  # so that a token times sqrt(E) has variance 1
    assert model.lm_head.weight is table
    assert model.model.encoder.embed_tokens.weight is table and model.model.decoder.embed_tokens.weight is table


def test_normal_initialisation():
    """GPT-2: normal(0, 0.02), the maps that end a residual branch smaller by sqrt(2 layers)."""
    model = gallery.GalleryTransformerForCausalLM(
        GalleryTransformerConfig(
            vocab_size=400,
            hidden_size=64,
            num_hidden_layers=8,
            num_attention_heads=4,
            intermediate_size=200,
            norm_position="pre",
            position_embedding_type="learned",
            initialization="normal",
        )  # fmt: skip
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            ends = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert abs(parameter.std() / (0.02 / (4 if ends else 1)) - 1) < 0.06, name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            assert (parameter == 0).all(), name


def test_parameter_count_of_the_paper():
    """Table 3: the base model has 65 million parameters over a shared vocabulary of about 37,000."""
    config = GalleryTransformerConfig(vocab_size=37000)
    with torch.device("meta"):
        model = gallery.GalleryTransformerForConditionalGeneration(config)
    assert round(model.num_parameters() / 1e6) in (63, 64, 65)
