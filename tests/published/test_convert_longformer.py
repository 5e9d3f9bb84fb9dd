"""Published Longformers as gallery checkpoints, and BERT, RoBERTa and GPT-2 made into Longformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert_transformer import assert_same_states, bert_input, opened, ours_of, published
from test_longformer import HEADS, THEIR_PAD, global_mask, outputs_of, rows_of
from variants import PAD, SEP, assert_equal, loud, words

import hf_gallery as gallery
from hf_gallery.convert import convert

SIZES = dict(vocab_size=97, hidden_size=30, num_hidden_layers=3, num_attention_heads=3, intermediate_size=41)
SIZES |= dict(max_position_embeddings=64, type_vocab_size=2, attention_window=[4, 8, 4])
SIZES |= dict(bos_token_id=0, eos_token_id=2, sep_token_id=SEP, pad_token_id=THEIR_PAD)


def longformer(head, **settings):
    """transformers' Longformer, in float32: its softmax knows no other."""
    others = dict(bare=transformers.LongformerModel, choice=transformers.LongformerForMultipleChoice)
    kind = others[head] if head in others else HEADS[head]
    labels = {} if head in (*others, "question") else dict(num_labels=4)
    return loud(kind(transformers.LongformerConfig(**SIZES | labels | settings)), seed=1).eval()


TARGETS = {
    "masked": lambda ids, mask: dict(labels=ids.masked_fill((ids % 3 > 0) | (mask == 0), -100)),
    "sequence": lambda ids, mask: dict(labels=torch.tensor([3, 1])),
    "tokens": lambda ids, mask: dict(labels=(ids % 4).masked_fill(mask == 0, -100)),
    "question": lambda ids, mask: dict(start_positions=torch.tensor([13, 11]), end_positions=torch.tensor([14, 40])),
}


@pytest.mark.parametrize("which", ["default", "several"])
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_heads(head, which, tmp_path):
    """Logits, loss and hidden states, with two types of tokens, padding, and global tokens that differ by row."""
    theirs = longformer(head)
    ours = ours_of(theirs, tmp_path)
    assert type(ours).__name__ == f"Gallery{type(theirs).__name__}"
    ids, mask = rows_of(23, 0 if head == "question" else 5)  # an answer's loss: see test_longformer.py
    inputs = dict(attention_mask=mask, token_type_ids=(torch.arange(23) > 9).long().expand(2, -1))
    if which == "several":
        inputs |= dict(global_attention_mask=global_mask(ids, mask, which))
    inputs |= TARGETS[head](ids, mask)
    got, expected = (model(ids, **inputs, output_hidden_states=True) for model in (ours, theirs))
    for a, b in zip(outputs_of(got), outputs_of(expected), strict=True):
        assert_equal(*((a, b) if head == "sequence" else (a[mask == 1], b[mask == 1])))
    assert_equal(got.loss, expected.loss)
    assert_same_states(got.hidden_states, expected.hidden_states, mask)


@torch.no_grad()
def test_the_bare_model_under_its_published_names(tmp_path):
    """longformer-base-4096 was saved from a head, with a buffer of positions and a pooler that nobody trained."""
    theirs = longformer("bare", attention_window=6)
    theirs.save_pretrained(tmp_path / "published")
    file = tmp_path / "published" / "model.safetensors"
    tensors = {f"longformer.{name}": x for name, x in load_file(file).items()}
    assert "longformer.pooler.dense.weight" in tensors
    tensors["longformer.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(tensors, file)
    ours = opened(convert(tmp_path / "published", tmp_path / "converted"))
    assert type(ours) is gallery.GalleryLongformerModel and ours.config.attention_window == [6, 6, 6]
    ids, mask = rows_of(23, 5)
    got, expected = (model(ids, attention_mask=mask).last_hidden_state for model in (ours, theirs))
    assert_equal(got[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("head", HEADS)
def test_a_config_that_names_no_class(head, tmp_path):
    theirs = longformer(head)
    theirs.save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    ours = opened(convert(tmp_path / "published", tmp_path / "converted"))
    assert type(ours).__name__ == f"Gallery{type(theirs).__name__}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention_dilation=[1, 2, 1]), r"attention_dilation is \[1, 2, 1\]"),
        (dict(autoregressive=True), "autoregressive is True"),
        (dict(hidden_act="relu"), "hidden_act is 'relu'"),
        (dict(pad_token_id=None), "pad_token_id is None; positions count from it"),
        (dict(attention_window="wide"), "attention_window is 'wide'"),
        (dict(num_hidden_layers="three"), "num_hidden_layers is 'three', which LongformerConfig does not take"),
        (dict(architectures=["LongformerForCausalLM"]), "architectures.*CausalLM.*LongformerForMaskedLM"),
        (dict(vocab_size=98), r"word_embeddings\.weight \(97, 30\) makes \(97, 30\), but .* is \(98, 30\)"),
        (
            dict(num_hidden_layers=4, attention_window=4),
            r"missing longformer\.encoder\.layer\.3.*query_global\.weight",
        ),
        (dict(num_hidden_layers=2, attention_window=4), r"unknown longformer\.encoder\.layer\.2.*value_global\.bias"),
    ],
    ids=str,
)
def test_what_does_not_fit(change, message, tmp_path):
    longformer("masked").save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        convert(tmp_path / "published", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# ---------------------------------------------------------------------------------- a Longformer from a shorter model

WIDE = dict(to="longformer", attention_window=80, max_position_embeddings=101)  # the window holds everything


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@torch.no_grad()
def test_from_an_encoder(family, head, tmp_path):
    """In a window over everything it is the source, and global tokens, whose maps are copies, change nothing."""
    theirs = published(family + head, torch.float64)
    ours = ours_of(theirs, tmp_path, **WIDE)
    assert type(ours).__name__ == f"GalleryLongformer{head}"
    ids, inputs = bert_input(theirs)
    mask = inputs["attention_mask"]
    expected = theirs(ids, **inputs)[0]
    chosen = ... if head == "ForSequenceClassification" else mask == 1
    marked = torch.zeros_like(ids).index_fill(1, torch.tensor([0, 5, 20]), 1)
    for given in (dict(), dict(global_attention_mask=marked)):
        assert_equal(ours(ids, **inputs, **given)[0][chosen], expected[chosen])
    offset = 2 if family == "Roberta" else 0
    own = theirs.base_model.embeddings.position_embeddings.weight
    table = ours.base_model.embed_positions.weight
    assert len(table) == 101 and torch.equal(table[:40], own)
    assert_equal(table[40 : 40 + 40 - offset], own[offset:])
    assert_equal(table[offset + 2 * (40 - offset) :], own[offset:][: 101 - offset - 2 * (40 - offset)])


@pytest.mark.parametrize("name", ["GPT2Model", "GPT2LMHeadModel"])
@torch.no_grad()
def test_from_gpt2(name, tmp_path):
    theirs = published(name, torch.float64, scale_attn_by_inverse_layer_idx=True)
    ours = ours_of(theirs, tmp_path, to="longformer", attention_window=[30, 31, 80], max_position_embeddings=70)
    ids = words(2, 31)
    assert_equal(ours(ids)[0], theirs(ids)[0])
    table = ours.base_model.embed_positions.weight
    own = theirs.base_model.wpe.weight
    assert torch.equal(table, torch.cat([own, own, own[:8]]))
    ours(words(2, 70))
    if name == "GPT2Model":
        return
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=PAD)
    for beams in (1, 3):
        prompt = words(2, 5)
        expected = theirs.generate(prompt, num_beams=beams, **options)
        assert torch.equal(ours.generate(prompt, num_beams=beams, **options), expected)
    narrow = ours_of(theirs, tmp_path / "narrow", to="longformer", attention_window=3)
    logits, expected = narrow(ids).logits, theirs(ids).logits
    assert_equal(logits[:, :4], expected[:, :4])
    assert (logits - expected)[:, 4].abs().max() > 1e-2


def test_how_long_by_default(tmp_path):
    """The paper's 4096 tokens and a window of 512."""
    for name, length in (("GPT2LMHeadModel", 4096), ("BertForMaskedLM", 4096), ("RobertaForMaskedLM", 4098)):
        ours = ours_of(published(name), tmp_path / name, to="longformer")
        assert ours.config.max_position_embeddings == length and ours.config.longest_input == 4096
        assert ours.config.attention_window == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_position_embeddings=39), "max_position_embeddings is 39, fewer than the 40"),
        (dict(attention_window=5), "attention_window is 5.*even"),
        (dict(max_position_embeddings=0), "max_position_embeddings is 0, fewer than the 40"),
        (dict(max_position_embeddings="big"), "max_position_embeddings is 'big'; it must be a whole number"),
        (dict(max_position_embeddings=1e4), r"max_position_embeddings is 10000\.0; it must be a whole number"),
        (dict(max_position_embeddings=10**9), "max_position_embeddings is 1000000000; .* at most 1048576"),
        (dict(attention_window="big"), "attention_window is 'big'"),
        (dict(attention_window=[4, 4]), "attention_window has 2 entries.*num_hidden_layers 3"),
        (dict(window=4), "no option window.*attention_window, max_position_embeddings"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message, tmp_path):
    published("BertForMaskedLM").save_pretrained(tmp_path / "published")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "published", tmp_path / "converted", to="longformer", **options)
    assert not (tmp_path / "converted").exists()


def test_a_table_of_positions_that_does_not_fit(tmp_path):
    """Copying must not hide it."""
    for name in ("BertForMaskedLM", "GPT2LMHeadModel"):
        folder = tmp_path / name
        published(name).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        table = next(x for x in tensors if "position_embeddings" in x or "wpe" in x)
        tensors[table] = tensors[table][1:]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{table} \(\d+, 30\) cannot make .*embed_positions.*(40|31) positions"):
            convert(folder, tmp_path / "converted", to="longformer")
