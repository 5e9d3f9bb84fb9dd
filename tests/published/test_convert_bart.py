"""Published BART and LED as gallery checkpoints, and BART made as long as LED."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert_transformer import assert_same_states, opened, ours_of, precisions, published
from test_law_2_batch_anyhow import padded
from variants import EOS, PAD, SEP, VOCAB, assert_equal, first_marked, words

import hf_gallery as gallery
from hf_gallery.convert import FORMATS, convert

LENGTHS = (23, 9, 16)
SEARCH = dict(num_beams=4, no_repeat_ngram_size=3, length_penalty=2.0, early_stopping=True, min_length=5)


def batch(global_tokens=()):
    """A source of three rows with padding behind it, and targets of unequal length."""
    source, mask, labels = words(3, 23), padded(LENGTHS, "right", 23), words(3, 7, seed=1)
    labels[1, 5:] = -100
    inputs = dict(attention_mask=mask, labels=labels)
    if global_tokens:
        marked = torch.zeros_like(source).index_fill(1, torch.tensor(global_tokens), 1) * mask
        marked[1, 3] = 1  # rows differ
        inputs["global_attention_mask"] = marked
    return source.masked_fill(mask == 0, PAD), inputs


def assert_same(ours, theirs, source, inputs):
    """Logits, losses, hidden states of both sides, and gradients of the loss for every weight that both have."""
    got, expected = (model(source, **inputs, output_hidden_states=True) for model in (ours, theirs))
    mask = inputs["attention_mask"]
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss.float(), expected.loss.float())
    assert_same_states(got.encoder_hidden_states, expected.encoder_hidden_states, mask)
    assert_same_states(got.decoder_hidden_states, expected.decoder_hidden_states)
    ours_named, theirs_named = (dict(model.named_parameters()) for model in (ours, theirs))
    assert_same_gradients(
        dict(zip(ours_named, gradients(got.loss, ours_named), strict=True)),
        dict(zip(theirs_named, gradients(expected.loss, theirs_named), strict=True)),
        plan_of(theirs, ours).take,
    )


def gradients(loss, named):
    return torch.autograd.grad(loss, named.values(), allow_unused=True, materialize_grads=True)


def plan_of(theirs, ours):
    """The source of each of our weights."""
    source = SimpleNamespace(config=theirs.config.to_dict(), tensors=theirs.state_dict())
    source.config["architectures"] = [type(theirs).__name__]
    form = next(form for form in FORMATS if form.recognises(source))
    options = {}
    if "Bart" in type(theirs).__name__ and "Longformer" in type(ours).__name__:
        options = dict(attention_window=80)
    return form.plan(source, ours.config.model_type.removeprefix("gallery_"), **options)


def assert_same_gradients(ours, theirs, take):
    """Of every weight that both have and that a token has reached."""
    compared, scale = 0, max(float(g.abs().max()) for g in theirs.values())
    for name, g in ours.items():
        (other,) = take[name].names if name in take else (None,)
        if other not in theirs or name.endswith("embed_positions.weight") or not g.abs().max():
            continue  # a buffer of theirs; their positions count what they pad, too; global maps that nobody used
        torch.testing.assert_close(g, theirs[other], rtol=1e-4, atol=1e-6 * scale, msg=name)
        compared += 1
    assert compared > 90


def assert_same_texts(ours, theirs, source, mask, **more):
    """Greedy and beam search, by the settings that came with the model and by those of a summary."""
    for options in (dict(num_beams=1), dict(num_beams=3), SEARCH):
        options = dict(max_new_tokens=12) | options | more
        a, b = (model.generate(source, attention_mask=mask, **options) for model in (ours, theirs))
        assert torch.equal(a, b) and a.shape[1] > 5, options


# ---------------------------------------------------------------------------------------------------------------- LED


@pytest.mark.parametrize("marked", [(), (0,), (0, 5, 6)], ids=["no global token", "the first", "several"])
def test_led(marked, tmp_path):
    """In float32, since its softmax knows no other: with padding behind sources that are no multiple of a window,
    windows of unequal width, and biases on logits."""
    theirs = published("LEDForConditionalGeneration")
    ours = ours_of(theirs, tmp_path)
    assert type(ours) is gallery.GalleryLongformerForConditionalGeneration
    source, inputs = batch(marked)
    assert_same(ours, theirs, source, inputs)
    given = {} if not marked else dict(global_attention_mask=inputs["global_attention_mask"])
    assert_same_texts(ours, theirs, source, inputs["attention_mask"], **given)


def test_led_as_it_was_published(tmp_path):
    """Its table under four names in a torch file, one window for all layers, and the settings of search in its config
    (forced first and last tokens among them)."""
    theirs = published("LEDForConditionalGeneration", attention_window=6)
    folder = tmp_path / "published"
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text()) | dict(attention_window=6, max_length=14)
    config |= dict(forced_bos_token_id=SEP, forced_eos_token_id=EOS, **SEARCH)
    (folder / "config.json").write_text(json.dumps(config))
    assert {"lm_head.weight", "led.encoder.embed_tokens.weight"} <= theirs.state_dict().keys()
    ours = opened(convert(folder, tmp_path / "converted"))
    settings = ours.generation_config
    assert settings.num_beams == 4 and settings.decoder_start_token_id == EOS and settings.forced_bos_token_id == SEP
    source, inputs = batch((0,))
    given = {name: inputs[name] for name in ("attention_mask", "global_attention_mask")}
    asked = dict(forced_bos_token_id=SEP, forced_eos_token_id=EOS, max_length=14, **SEARCH)
    tokens = ours.generate(source, **given)
    assert torch.equal(tokens, theirs.generate(source, **given, **asked))
    assert (tokens[:, 0] == EOS).all() and (tokens[:, 1] == SEP).all() and (tokens == EOS).sum() >= 6


# --------------------------------------------------------------------------------------------------------------- BART

WIDE = dict(to="longformer", attention_window=80)  # the window holds everything


@precisions
@pytest.mark.parametrize("to", [{}, WIDE], ids=["transformer", "longformer"])
@pytest.mark.parametrize("settings", [{}, dict(scale_embedding=True, activation_function="relu")], ids=str)
def test_bart(settings, to, dtype, tmp_path):
    """In a window over everything the long one is the source, and global tokens, whose maps are copies, change
    nothing."""
    theirs = published("BartForConditionalGeneration", dtype, **settings)
    ours = ours_of(theirs, tmp_path, **to)
    long = "ForConditionalGeneration"
    assert type(ours).__name__ == ("GalleryLongformer" if to else "GalleryTransformer") + long
    source, inputs = batch()
    assert_same(ours, theirs, source, inputs)
    assert_same_texts(ours, theirs, source, inputs["attention_mask"])
    if to:
        marked = dict(global_attention_mask=first_marked(source))
        assert_equal(ours(source, **inputs, **marked).logits, theirs(source, **inputs).logits)
        table, own = ours.model.encoder.embed_positions.weight, theirs.model.encoder.embed_positions.weight
        assert len(table) == 16384 + 2 and torch.equal(table[:42], own)
        assert torch.equal(table[2:].view(-1, own.shape[1])[:400], own[2:].repeat(10, 1))
        assert ours.config.max_decoder_position_embeddings == 42


def test_dropout_inside_the_feed_forward_comes_along(tmp_path):
    ours = ours_of(published("BartForConditionalGeneration"), tmp_path)
    assert ours.model.decoder.layers[0].feed_forward.dropout.p == ours.config.activation_dropout == 0.1


@torch.no_grad()
def test_a_narrow_window_reads_long_sources(tmp_path):
    """Longer than BART's own positions; what is within the first window is as before."""
    theirs = published("BartForConditionalGeneration")
    ours = ours_of(theirs, tmp_path, to="longformer", attention_window=8, max_position_embeddings=122)
    source = words(1, 120)
    assert ours.generate(source, max_new_tokens=5, global_attention_mask=first_marked(source)).shape == (1, 6)
    with pytest.raises(ValueError, match="reaches 121 tokens, but max_position_embeddings 122 has room for 120"):
        ours.generate(words(1, 121), max_new_tokens=5)
    with pytest.raises(ValueError, match="reaches 41 tokens, but max_decoder_position_embeddings 42 has room for 40"):
        ours(source, decoder_input_ids=words(1, 41))


@torch.no_grad()
@pytest.mark.parametrize("family", ["Bart", "LED"])
def test_bare_models_write_by_their_table(family, tmp_path):
    """As BART was trained, and as transformers opens bart-base, which was published bare."""
    theirs = published(f"{family}Model")
    ours = ours_of(theirs, tmp_path)
    kind = getattr(transformers, f"{family}ForConditionalGeneration")
    theirs = kind.from_pretrained(tmp_path / "published").eval()
    source, inputs = batch()
    assert not ours.config.final_logits_bias
    assert_equal(ours(source, **inputs).logits, theirs(source, **inputs).logits)


@pytest.mark.parametrize(
    "name", ["BartModel", "BartForConditionalGeneration", "LEDModel", "LEDForConditionalGeneration"]
)
def test_a_config_that_names_no_class(name, tmp_path):
    published(name).save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("architectures") == [name]
    path.write_text(json.dumps(config))
    ours = opened(convert(tmp_path / "published", tmp_path / "converted"))
    assert type(ours).__name__.endswith("ForConditionalGeneration")


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Bart", dict(normalize_before=True), "normalize_before is True"),
        ("Bart", dict(decoder_ffn_dim=43), "decoder_ffn_dim is 43.*41"),
        ("Bart", dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
        ("Bart", dict(encoder_layerdrop=0.1), r"encoder_layerdrop is 0\.1"),
        ("Bart", dict(architectures=["BartForSequenceClassification"]), "architectures.*BartForConditionalGeneration"),
        ("Bart", dict(max_position_embeddings=41), r"embed_positions\.weight \(42, 30\) makes \(42, 30\), but"),
        ("LED", dict(decoder_attention_heads=5), "decoder_attention_heads is 5.*3"),
        ("LED", dict(attention_window="wide"), "attention_window is 'wide'"),
        ("LED", dict(attention_window=[4]), "attention_window has 1 entries.*num_encoder_layers 2"),
        ("LED", dict(attention_window=5), "attention_window is 5.*even"),
        ("LED", dict(max_encoder_position_embeddings=60), r"encoder\.embed_positions\.weight \(61, 30\) makes"),
        ("LED", dict(architectures=["LEDForQuestionAnswering"]), "architectures.*LEDForConditionalGeneration"),
        ("LED", dict(vocab_size=VOCAB + 1), r"shared\.weight \(97, 30\) makes"),
    ],
    ids=str,
)
def test_what_does_not_fit(name, change, message, tmp_path):
    published(f"{name}ForConditionalGeneration").save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(tmp_path / "published", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_tensors_that_are_missing_or_unknown(tmp_path):
    published("LEDForConditionalGeneration").save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    held = load_file(file)
    name = "led.encoder.layers.1.self_attn.longformer_self_attn.key_global.bias"
    held["extra"] = held.pop(name)
    save_file(held, file)
    with pytest.raises(ValueError, match=rf"(?s)missing {name}, for .*k_global_proj\.bias.*unknown extra"):
        convert(tmp_path / "published", tmp_path / "converted")


def test_options_of_the_long_one_only(tmp_path):
    published("BartForConditionalGeneration").save_pretrained(tmp_path / "published")
    for options, message in (
        (dict(attention_window=4), "attention_window is given, but transformer has no such option"),
        (dict(to="longformer", max_position_embeddings=41), "max_position_embeddings is 41, fewer than the 42"),
        (dict(to="memorizing_transformer"), "memorizing_transformer.*transformer, longformer"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "published", tmp_path / "converted", **options)
