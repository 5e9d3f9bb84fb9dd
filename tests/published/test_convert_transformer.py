"""Published GPT-2, BERT, RoBERTa and Marian as gallery checkpoints: small random ones of transformers' classes give
the same through the converter, in float32 as published and in float64, where nothing can hide in the tolerance."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_law_2_batch_anyhow import padded
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from variants import BOS, EOS, PAD, VOCAB, assert_equal, loud, words

import hf_gallery as gallery
from hf_gallery.convert import convert
from hf_gallery.data.tokenizer import UNLIMITED

precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])

GPT2 = dict(vocab_size=VOCAB, n_positions=31, n_embd=30, n_layer=3, n_head=3, n_inner=41, bos_token_id=BOS)
GPT2 |= dict(eos_token_id=EOS)
BERT = dict(vocab_size=VOCAB, hidden_size=30, num_hidden_layers=3, num_attention_heads=3, intermediate_size=41)
BERT |= dict(max_position_embeddings=40, num_labels=5)
MARIAN = dict(vocab_size=VOCAB, d_model=30, encoder_layers=2, decoder_layers=3, max_position_embeddings=40)
MARIAN |= dict(encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=41, decoder_ffn_dim=41)
MARIAN |= dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, decoder_start_token_id=PAD)
MARIAN |= dict(scale_embedding=True, activation_function="swish", forced_eos_token_id=EOS)

BART = dict(vocab_size=VOCAB, d_model=30, encoder_layers=2, decoder_layers=3, max_position_embeddings=40)
BART |= dict(encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=41, decoder_ffn_dim=41)
BART |= dict(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS, decoder_start_token_id=EOS, activation_dropout=0.1)
LED = {name: x for name, x in BART.items() if name != "max_position_embeddings"}
LED |= dict(max_encoder_position_embeddings=61, max_decoder_position_embeddings=40, attention_window=[4, 8])

ROBERTA = BERT | dict(pad_token_id=1)
FAMILIES = {"GPT2": GPT2, "Bert": BERT, "Roberta": ROBERTA, "Marian": MARIAN}
FAMILIES |= dict.fromkeys(("XLMRoberta", "Camembert", "Data2VecText"), ROBERTA)
FAMILIES |= {"Electra": BERT | dict(embedding_size=30), "Bart": BART, "LED": LED}


def published(name, dtype=torch.float32, **settings):
    """A model of transformers by the name of its class, with loud random weights."""
    family = next(family for family in FAMILIES if name.startswith(family))
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | settings)
    model = loud(getattr(transformers, name)(config), seed=1).to(dtype).eval()
    if family == "Marian":
        with torch.no_grad():
            for side in (model.get_encoder(), model.get_decoder()):  # sinusoids are parameters there
                angle = torch.arange(40).double()[:, None] / 10000 ** (torch.arange(0, 30, 2).double() / 30)
                side.embed_positions.weight.copy_(torch.cat([angle.sin(), angle.cos()], dim=1))
    if hasattr(model, "final_logits_bias"):
        with torch.no_grad():
            model.final_logits_bias.copy_(torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(2)))
    return model


def opened(folder):
    """The gallery's model in a folder, under the class that its config names."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(gallery, name).from_pretrained(folder).eval()


def ours_of(model, folder, **options):
    """The gallery's model, through files in the folder."""
    model.save_pretrained(folder / "published")
    return opened(convert(folder / "published", folder / "converted", **options))


def assert_same_states(got, expected, mask=None):
    """Hidden states before the first and after every layer, where there are tokens."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert_equal(*((a, b) if mask is None else (a[mask == 1], b[mask == 1])))


# --------------------------------------------------------------------------------------------------------------- GPT-2

GPT2_SETTINGS = {
    "as published": dict(),
    "another activation, four times as wide inside": dict(activation_function="relu", n_inner=None),
    "scores divided by the layer": dict(scale_attn_by_inverse_layer_idx=True),
    "scores not divided": dict(scale_attn_weights=False),
    "scores in another order": dict(reorder_and_upcast_attn=True),
    "not tied": dict(tie_word_embeddings=False, layer_norm_epsilon=1e-2),
}


@precisions
@pytest.mark.parametrize("settings", GPT2_SETTINGS.values(), ids=GPT2_SETTINGS.keys())
@torch.no_grad()
def test_gpt2(settings, dtype, tmp_path):
    """Logits, loss, hidden states, with padding on the left, and what greedy and beam search write."""
    if settings.get("reorder_and_upcast_attn") and dtype == torch.float64:
        pytest.skip("it computes scores in float32")
    theirs = published("GPT2LMHeadModel", dtype, **settings)
    ours = ours_of(theirs, tmp_path)
    assert type(ours) is gallery.GalleryTransformerForCausalLM and ours.dtype == dtype
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    ids, mask = words(3, 31), padded((31, 9, 16), "left", 31)
    got, expected = (model(ids, labels=ids, output_hidden_states=True) for model in (ours, theirs))
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss.float(), expected.loss.float())
    assert_same_states(got.hidden_states, expected.hidden_states)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=position_ids).logits
    assert_equal(ours(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1])
    prompt = words(2, 5)
    for beams in (1, 3):
        options = dict(max_new_tokens=20, do_sample=False, num_beams=beams, pad_token_id=PAD)
        assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


@torch.no_grad()
def test_gpt2_under_its_published_names(tmp_path):
    """OpenAI's files name the tensors of the bare model, beside masks that are no weights, and say LMHeadModel."""
    theirs = published("GPT2LMHeadModel")
    theirs.save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    for i in range(3):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, 31, 31).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file)
    ours, ids = opened(convert(tmp_path / "published", tmp_path / "converted")), words(2, 23)
    assert_equal(ours(ids).logits, theirs(ids).logits)
    tensors["lm_head.weight"] = tensors.pop("wte.weight")  # either name may stand for both
    save_file(tensors, file)
    ours = opened(convert(tmp_path / "published", tmp_path / "again"))
    assert_equal(ours(ids).logits, theirs(ids).logits)
    tensors["wte.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"lm_head\.weight and wte\.weight differ"):
        convert(tmp_path / "published", tmp_path / "third")


@torch.no_grad()
def test_bare_models(tmp_path):
    ids = words(2, 23).clamp(min=2)
    for name in ("GPT2Model", "BertModel", "RobertaModel"):
        theirs = published(name, torch.float64)
        ours = ours_of(theirs, tmp_path / name)
        assert type(ours) is gallery.GalleryTransformerModel
        assert_equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    theirs, target = published("MarianModel", torch.float64), words(2, 7, seed=1)
    ours = ours_of(theirs, tmp_path / "marian")
    got, expected = (model(input_ids=ids, decoder_input_ids=target) for model in (ours, theirs))
    assert_equal(got.last_hidden_state, expected.last_hidden_state)


# ---------------------------------------------------------------------------------------------------- BERT and RoBERTa

ROBERTA_PAD = 1


def bert_input(theirs):
    """Three rows of which two end in padding, of two types where the model has them."""
    mask = padded((23, 9, 16), "right", 23)
    ids = words(3, 23).clamp(min=2).masked_fill(mask == 0, theirs.config.pad_token_id)
    types = (torch.arange(23) > 9).long().expand(3, -1)
    return ids, dict(attention_mask=mask, token_type_ids=types)


@precisions
@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM"])
@torch.no_grad()
def test_masked_language_models(name, dtype, tmp_path):
    theirs = published(name, dtype)
    ours = ours_of(theirs, tmp_path)
    ids, inputs = bert_input(theirs)
    mask = inputs["attention_mask"]
    labels = ids.masked_fill((ids % 3 > 0) | (mask == 0), -100)
    got, expected = (model(ids, **inputs, labels=labels, output_hidden_states=True) for model in (ours, theirs))
    assert_equal(got.logits[mask == 1], expected.logits[mask == 1])
    assert_equal(got.loss.float(), expected.loss.float())
    assert_same_states(got.hidden_states, expected.hidden_states, mask)
    ids = words(2, 9).clamp(min=2)
    assert_equal(ours(ids).logits, theirs(ids).logits)


@precisions
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
@torch.no_grad()
def test_classifiers(name, dtype, tmp_path):
    theirs = published(name, dtype, id2label={0: "yes", 1: "no", 2: "perhaps"}, num_labels=3)
    ours = ours_of(theirs, tmp_path)
    ids, inputs = bert_input(theirs)
    labels = torch.tensor([2, 0, 1])
    got, expected = (model(ids, **inputs, labels=labels) for model in (ours, theirs))
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss.float(), expected.loss.float())
    assert ours.config.id2label == {0: "yes", 1: "no", 2: "perhaps"}


@torch.no_grad()
def test_attention_maps(tmp_path):
    """The attention maps, where there are tokens."""
    theirs = published("BertModel", torch.float64)
    theirs.set_attn_implementation("eager")
    ids, inputs = bert_input(theirs)
    mask = inputs["attention_mask"]
    got, expected = (model(ids, **inputs, output_attentions=True) for model in (ours_of(theirs, tmp_path), theirs))
    seen = (mask[:, None, :, None] * mask[:, None, None]) == 1
    assert len(got.attentions) == 3
    for a, b in zip(got.attentions, expected.attentions, strict=True):
        assert a.shape == (3, 3, 23, 23)
        assert_equal(a[seen.expand_as(a)], b[seen.expand_as(b)])


@torch.no_grad()
def test_bert_under_its_published_names(tmp_path):
    """Google's norms have a gamma and a beta, and beside the language model stand a pooler and a sentence head."""
    theirs = published("BertForMaskedLM")
    theirs.save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "LayerNorm" in name]:
        tensors[name.replace("weight", "gamma").replace("bias", "beta")] = tensors.pop(name)
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    tensors |= {"bert.pooler.dense.weight": torch.randn(30, 30), "cls.seq_relationship.bias": torch.randn(2)}
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, file)
    ours, ids = opened(convert(tmp_path / "published", tmp_path / "converted")), words(2, 23)
    assert_equal(ours(ids).logits, theirs(ids).logits)


# -------------------------------------------------------------------------------------------------------------- Marian


def translations(model, source, mask):
    """Texts of greedy and beam search, by the settings that came with the model."""
    return [model.generate(source, attention_mask=mask, max_new_tokens=12, num_beams=n) for n in (1, 4)]


@precisions
@pytest.mark.parametrize("settings", [dict(), dict(activation_function="relu", scale_embedding=False)], ids=str)
@torch.no_grad()
def test_marian(settings, dtype, tmp_path):
    theirs = published("MarianMTModel", dtype, **settings)
    ours = ours_of(theirs, tmp_path)
    source, labels, mask = words(3, 11), words(3, 7, seed=1), padded((11, 4, 8), "right", 11)
    labels[1, 5:] = -100
    inputs = dict(attention_mask=mask, labels=labels, output_hidden_states=True)
    got, expected = (model(source, **inputs) for model in (ours, theirs))
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss.float(), expected.loss.float())
    assert_same_states(got.encoder_hidden_states, expected.encoder_hidden_states, mask)
    assert_same_states(got.decoder_hidden_states, expected.decoder_hidden_states)
    for a, b in zip(translations(ours, source, mask), translations(theirs, source, mask), strict=True):
        assert torch.equal(a, b) and (a == EOS).any(1).all()  # the last token is forced to end


@torch.no_grad()
def test_marian_as_it_was_published(tmp_path):
    """Older files hold the shared table under four names and the sinusoids; their config the settings of search."""
    theirs = published("MarianMTModel")
    theirs.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "published" / "config.json").read_text())
    config |= dict(num_beams=4, bad_words_ids=[[PAD]], max_length=12)
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    (tmp_path / "published" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "published" / "pytorch_model.bin")
    assert {"lm_head.weight", "model.encoder.embed_positions.weight"} <= theirs.state_dict().keys()
    ours = opened(convert(tmp_path / "published", tmp_path / "converted"))
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "published").eval()
    assert ours.generation_config.num_beams == theirs.generation_config.num_beams == 4
    source = words(3, 11)
    assert torch.equal(ours.generate(source), theirs.generate(source))


def test_positions_that_are_no_sinusoids(tmp_path):
    theirs = published("MarianMTModel")
    with torch.no_grad():
        theirs.model.encoder.embed_positions.weight[3, 4] += 0.1
    theirs.save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "published" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.encoder\.embed_positions\.weight differs by 0\.1 from sinusoids"):
        convert(tmp_path / "published", tmp_path / "converted")


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        *(family + head for family in ("Bert", "Roberta") for head in ("Model", "ForMaskedLM")),
        *("GPT2Model", "GPT2LMHeadModel", "MarianModel", "MarianMTModel", "RobertaForSequenceClassification"),
    ],
)
def test_a_config_that_names_no_class(name, tmp_path):
    """As some old ones do: the tensors tell."""
    published(name).save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    expected = type(opened(convert(tmp_path / "published", tmp_path / "named")))
    assert config.pop("architectures") == [name]
    path.write_text(json.dumps(config))
    assert type(opened(convert(tmp_path / "published", tmp_path / "converted"))) is expected


# ----------------------------------------------------------------------------------------------------------- bad input

WITHOUT_COUNTERPART = [
    ("GPT2LMHeadModel", dict(add_cross_attention=True), "add_cross_attention is True"),
    ("GPT2LMHeadModel", dict(embd_pdrop=0.3), r"embd_pdrop is 0\.3.*0\.1"),
    ("BertForMaskedLM", dict(is_decoder=True), "is_decoder is True"),
    ("BertForMaskedLM", dict(position_embedding_type="relative_key"), "position_embedding_type is 'relative_key'"),
    ("BertForMaskedLM", dict(tie_word_embeddings=False), "tie_word_embeddings is False"),
    ("RobertaForMaskedLM", dict(hidden_act="relu"), "hidden_act is 'relu'.*gelu"),
    ("MarianMTModel", dict(share_encoder_decoder_embeddings=False), "share_encoder_decoder_embeddings is False"),
    ("MarianMTModel", dict(decoder_ffn_dim=43), "decoder_ffn_dim is 43.*41"),
    ("MarianMTModel", dict(decoder_attention_heads=5), "decoder_attention_heads is 5.*3"),
    ("MarianMTModel", dict(normalize_before=True), "normalize_before is True"),
    ("MarianMTModel", dict(activation_dropout=0.1), r"activation_dropout is 0\.1"),
    ("BertForNextSentencePrediction", dict(), "architectures.*BertForNextSentencePrediction.*BertForMaskedLM"),
    ("GPT2DoubleHeadsModel", dict(), "architectures.*GPT2DoubleHeadsModel.*GPT2LMHeadModel"),
]


@pytest.mark.parametrize(
    ("name", "settings", "message"), WITHOUT_COUNTERPART, ids=[str(x[:2]) for x in WITHOUT_COUNTERPART]
)
def test_a_config_that_has_no_counterpart(name, settings, message, tmp_path):
    published(name, **settings).save_pretrained(tmp_path / "published")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "published", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("GPT2LMHeadModel", "n_layer", ("big", None, 1.5, [3], True)),
        ("GPT2LMHeadModel", "architectures", (3, "GPT2LMHeadModel", {"a": 1}, [["GPT2LMHeadModel"]], [None])),
        ("GPT2LMHeadModel", "dtype", ("float3", [], "nn")),
        ("BertForMaskedLM", "hidden_dropout_prob", ("0.1", None)),
        ("BertForMaskedLM", "id2label", ("yes", 3, ["yes"], {"a": "yes"})),
        ("BertForMaskedLM", "num_labels", ("2", None, 1.5)),
        ("RobertaForMaskedLM", "pad_token_id", (None, "1")),
        ("MarianMTModel", "encoder_layers", ("2", [])),
    ],
)
def test_a_config_of_other_types(name, field, values, tmp_path):
    """Field and value are named, whichever of the two packages it is that does not take it."""
    published(name).save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError) as error:
            convert(tmp_path / "published", tmp_path / "converted")
        assert f"{field} is {value!r}" in str(error.value)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM", "RobertaForMaskedLM", "MarianMTModel"])
def test_tensors_that_do_not_fit(name, tmp_path):
    """All of them are listed, and nothing is written."""
    published(name).save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = load_file(file)
    first, second, third, *_ = [x for x in tensors if tensors[x].dim() == 2]
    del tensors[first]
    tensors[second] = torch.zeros(tensors[second].shape[0], tensors[second].shape[1] + 1)
    tensors["extra.weight"] = tensors.pop(third)
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "published", tmp_path / "converted")
    for expected in (f"missing {first}", f"{second} ", f"missing {third}", "unknown extra.weight"):
        assert expected in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_options_of_another_target(tmp_path):
    published("GPT2LMHeadModel").save_pretrained(tmp_path / "published")
    published("BertForMaskedLM").save_pretrained(tmp_path / "bert")
    for folder, options, message in (
        ("published", dict(attention_window=4), "attention_window is given, but transformer has no such option"),
        ("published", dict(to="longformer", mem_len=4), "mem_len.*longformer.*attention_window, max_position"),
        ("bert", dict(attention_window=4), "attention_window is given, but transformer"),
        ("bert", dict(to="memorizing_transformer"), "memorizing_transformer.*transformer, longformer"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / folder, tmp_path / "converted", **options)


# ----------------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    ("options", "length"),
    [(dict(), 31), (dict(to="longformer"), 4096), (dict(to="memorizing_transformer"), UNLIMITED)],
)
def test_the_tokenizer_comes_along(options, length, tmp_path):
    """With the number of tokens that the model now reads."""
    letters = Tokenizer(models.BPE(vocab={chr(97 + i): i for i in range(26)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    published("GPT2LMHeadModel").save_pretrained(tmp_path / "published")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=31)
    tokenizer.save_pretrained(tmp_path / "published")
    folder = convert(tmp_path / "published", tmp_path / "converted", **options)
    ours = AutoTokenizer.from_pretrained(folder)
    assert ours("gallery").input_ids == tokenizer("gallery").input_ids == [6, 0, 11, 11, 4, 17, 24]
    assert ours.model_max_length == length


def test_a_tokenizer_that_is_none(tmp_path):
    published("GPT2LMHeadModel").save_pretrained(tmp_path / "published")
    (tmp_path / "published" / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    (tmp_path / "published" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ValueError, match="the tokenizer in .*published cannot be opened"):
        convert(tmp_path / "published", tmp_path / "converted")


def test_the_two_tokenizers_of_marian(tmp_path):
    """One for the source language, one for the target's, and one vocabulary for both."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder, text = tmp_path / "published", ["the gallery holds models for long texts", "a sentence of plain words"]
    published("MarianMTModel").save_pretrained(folder)
    for side in ("source", "target"):
        with open(folder / f"{side}.spm", "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text), model_writer=file, vocab_size=40, hard_vocab_limit=False, minloglevel=2
            )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    vocabulary = ["</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, len(pieces))), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(source_lang="en", target_lang="de")))
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = AutoTokenizer.from_pretrained(convert(folder, tmp_path / "converted"))
    assert type(ours) is type(theirs) is transformers.MarianTokenizer
    ids = ours("a gallery of words", text_target="long sentence")
    assert ids == theirs("a gallery of words", text_target="long sentence") and len(ids.input_ids) > 4
