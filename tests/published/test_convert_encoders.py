"""BERT, RoBERTa, XLM-R, CamemBERT and ELECTRA under every head, as a Transformer and made long: small random ones of
transformers' classes give the same through the converter, in float64, where nothing can hide in the tolerance."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_convert_transformer import ROBERTA_PAD, assert_same_states, bert_input, opened, ours_of
from test_convert_transformer import published as by_name
from test_law_2_batch_anyhow import padded
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from variants import SEP, assert_equal, words

import hf_gallery as gallery
from hf_gallery.convert import convert
from hf_gallery.convert.bert import FAMILIES, OTHERS

NAMES = ["Bert", "Roberta", "XLMRoberta", "Camembert", "Data2VecText", "Electra", "ElectraNarrow"]
NARROW = dict(embedding_size=12)  # ELECTRA's tables may have another width than its layers
OFFSETS = {
    "Bert": 0,
    "Electra": 0,
    "ElectraNarrow": 0,
}  # of the others 2, behind the id of padding
WIDE = dict(to="longformer", attention_window=80, max_position_embeddings=101)  # the window holds everything
WHOLE = "ForSequenceClassification", "ForMultipleChoice"  # one result a row

families = pytest.mark.parametrize("family", NAMES)


def published(name, dtype=torch.float32, **settings):
    """transformers' model; of an answer's two logits, which it counts as labels, there are two."""
    settings = (dict(num_labels=2) if name.endswith("QuestionAnswering") else {}) | settings
    if "Narrow" in name:
        name, settings = name.replace("Narrow", ""), NARROW | settings
    return by_name(name, dtype, **settings)


def inputs_of(theirs, head):
    """ids and the other inputs of a head, three rows of which two end in padding, and labels for its loss. An answer
    has no label: theirs gives padding a share in it."""
    ids, inputs = bert_input(theirs)
    ids[:, [4, 8, 9]] = SEP
    mask = inputs["attention_mask"]
    ids = ids.masked_fill(mask == 0, theirs.config.pad_token_id)
    if head == "ForMultipleChoice":
        ids = torch.stack([ids, ids.roll(1, 0), ids.roll(2, 0)], dim=1)  # (B, C, T)
        inputs = {name: torch.stack([x, x.roll(1, 0), x.roll(2, 0)], dim=1) for name, x in inputs.items()}
        return ids, inputs, dict(labels=torch.tensor([2, 0, 1]))
    labels = {
        "ForMaskedLM": ids.masked_fill((ids % 3 > 0) | (mask == 0), -100),
        "ForSequenceClassification": torch.tensor([2, 0, 1]),
        "ForTokenClassification": (ids % 5).masked_fill(mask == 0, -100),
    }.get(head)
    return ids, inputs, {} if labels is None else dict(labels=labels)


def results(output):
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return [output[name] for name in names if output.get(name) is not None]


@pytest.mark.parametrize("to", ["transformer", "longformer"])
@pytest.mark.parametrize("head", sorted({head for f in FAMILIES.values() for head in f.heads} - {"ForPreTraining"}))
@families
@torch.no_grad()
def test_every_head(family, head, to, tmp_path):
    """Results, losses and hidden states. A Longformer's window holds everything; global tokens change nothing."""
    theirs = published(family + head, torch.float64)
    asks = head in ("ForQuestionAnswering", "ForMultipleChoice")
    options = WIDE | (dict(sep_token_id=SEP) if asks else {}) if to == "longformer" else dict(to=to)
    ours = ours_of(theirs, tmp_path, **options)
    assert type(ours).__name__ == f"Gallery{to.title()}{head}"
    ids, inputs, labels = inputs_of(theirs, head)
    mask = inputs["attention_mask"]
    got, expected = (model(ids, **inputs, **labels, output_hidden_states=True) for model in (ours, theirs))
    assert len(results(got)) == len(results(expected)) > 0
    for a, b in zip(results(got), results(expected), strict=True):
        assert_equal(*((a, b) if head in WHOLE else (a[mask == 1], b[mask == 1])))
    if labels:
        assert_equal(got.loss.float(), expected.loss.float())
    assert_same_states(got.hidden_states, expected.hidden_states, mask.flatten(0, -2))
    if to == "longformer":
        marked = torch.zeros_like(ids).index_fill(-1, torch.tensor([0, 5, 20]), 1)
        for a, b in zip(results(ours(ids, **inputs, global_attention_mask=marked)), results(expected), strict=True):
            assert_equal(*((a, b) if head in WHOLE else (a[mask == 1], b[mask == 1])))


@pytest.mark.parametrize("to", ["transformer", "longformer"])
@pytest.mark.parametrize("rate", [None, 0.4])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra"])
def test_a_classifier_drops_where_theirs_does(family, rate, to, tmp_path):
    """The same draws fall on the same numbers. Within the layers nothing is dropped, so theirs stay the same too."""
    quiet = dict(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0 if rate else 0.3, classifier_dropout=rate)
    theirs = published(f"{family}ForSequenceClassification", torch.float64, **quiet)
    ours = ours_of(theirs, tmp_path, **(WIDE if to == "longformer" else dict(to=to)))
    ids, found = words(3, 11).clamp(min=2), []
    for model in (ours, theirs):
        model.train()
        for name, module in model.named_modules():  # all but the head's
            if name.startswith(("model.", *(f.prefix + "." for f in FAMILIES.values()))):
                module.training = False
        torch.manual_seed(0)
        found.append(model(ids).logits)
    assert_equal(*found)
    assert not torch.allclose(found[0], theirs.eval()(ids).logits)


@families
@torch.no_grad()
def test_answers_and_their_loss_without_padding(family, tmp_path):
    theirs = published(f"{family}ForQuestionAnswering", torch.float64)
    where = dict(start_positions=torch.tensor([13, 11]), end_positions=torch.tensor([14, 40]))
    ids = words(2, 23).clamp(min=2)
    got, expected = (model(ids, **where) for model in (ours_of(theirs, tmp_path), theirs))
    assert_equal(got.loss.float(), expected.loss.float())
    assert_equal(got.end_logits, expected.end_logits)


@pytest.mark.parametrize("family", ["XLMRoberta", "Camembert", "Electra", "ElectraNarrow"])
@torch.no_grad()
def test_positions_are_copied_again_and_again(family, tmp_path):
    """Those of RoBERTa's kind behind the two that belong to no position."""
    theirs = published(f"{family}Model")
    ours = ours_of(theirs, tmp_path, **WIDE)
    offset = OFFSETS.get(family, ROBERTA_PAD + 1)
    assert ours.config.longest_input == 101 - offset
    own, table = theirs.embeddings.position_embeddings.weight, ours.embed_positions.weight
    assert torch.equal(table[:40], own)
    assert torch.equal(table[40 : 80 - offset], own[offset:])
    ids, mask = words(2, 101 - offset), padded((101 - offset, 61), "left", 101 - offset)
    assert ours(ids, mask).last_hidden_state.isfinite().all()
    again = ours(ids[:, -61:][1:], mask[:, -61:][1:]).last_hidden_state
    assert_equal(ours(ids, mask).last_hidden_state[1:, -61:], again)


@pytest.mark.parametrize("family", ["Electra", "ElectraNarrow"])
@torch.no_grad()
def test_the_discriminator_becomes_the_bare_model(family, tmp_path):
    """ELECTRA's checkpoints are saved with the head that finds replaced tokens, which has no place here."""
    theirs = published(f"{family}ForPreTraining", torch.float64)
    ours = ours_of(theirs, tmp_path)
    assert type(ours) is gallery.GalleryTransformerModel
    ids, inputs = bert_input(theirs)
    expected = theirs.electra(ids, **inputs).last_hidden_state
    mask = inputs["attention_mask"] == 1
    assert_equal(ours(ids, **inputs).last_hidden_state[mask], expected[mask])
    head = gallery.GalleryTransformerForTokenClassification.from_pretrained(tmp_path / "converted")
    assert_equal(head.model(ids, **inputs).last_hidden_state[mask], expected[mask])


@torch.no_grad()
def test_berts_two_heads_become_the_masked_one(tmp_path):
    theirs = published("BertForPreTraining", torch.float64)
    ours = ours_of(theirs, tmp_path)
    ids = words(2, 9)
    assert_equal(ours(ids).logits, theirs(ids).prediction_logits)


@torch.no_grad()
def test_electras_other_activations(tmp_path):
    theirs = published("ElectraForMultipleChoice", torch.float64, summary_activation="", hidden_act="relu")
    ours = ours_of(theirs, tmp_path)
    ids, inputs, _ = inputs_of(theirs, "ForMultipleChoice")
    assert_equal(ours(ids, **inputs).logits, theirs(ids, **inputs).logits)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ElectraForMultipleChoice", dict(summary_type="mean"), "summary_type is 'mean'; the gallery has 'first'"),
        ("ElectraForMultipleChoice", dict(summary_use_proj=False), "summary_use_proj is False"),
        ("ElectraForMaskedLM", dict(hidden_act="relu"), "hidden_act is 'relu'.*gelu"),
        ("ElectraForSequenceClassification", dict(is_decoder=True), "is_decoder is True"),
        ("CamembertForMaskedLM", dict(pad_token_id=None), "pad_token_id is None; positions count from it"),
        ("XLMRobertaForMaskedLM", dict(architectures=["XLMRobertaForCausalLM"]), "architectures.*XLMRobertaForMasked"),
    ],
    ids=str,
)
def test_what_does_not_fit(name, change, message, tmp_path):
    published(name).save_pretrained(tmp_path / "published")
    path = tmp_path / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "published", tmp_path / "converted", to="longformer")
    assert not (tmp_path / "converted").exists()


def test_narrow_tables_are_for_encoders():
    sizes = dict(hidden_size=30, num_hidden_layers=1, num_attention_heads=3, **NARROW)
    for name in ("TransformerForCausalLM", "LongformerForCausalLM", "TransformerForConditionalGeneration"):
        config = getattr(gallery, f"Gallery{name.partition('For')[0]}Config")(**sizes)
        with pytest.raises(ValueError, match="embedding_size is 12 and hidden_size 30; .* encoders alone"):
            getattr(gallery, f"Gallery{name}")(config)
    with pytest.raises(ValueError, match="embedding_size is 0"):
        gallery.GalleryTransformerConfig(embedding_size=0)
    with pytest.raises(ValueError, match="embedding_size is 7; sinusoidal positions need an even number"):
        gallery.GalleryTransformerConfig(embedding_size=7)


def test_a_question_whose_end_is_unknown(tmp_path):
    """BERT's separator stands in its tokenizer; where there is none, the option says it, or the mask."""
    ours = ours_of(published("BertForQuestionAnswering"), tmp_path, to="longformer")
    with pytest.raises(ValueError, match="sep_token_id is None, so the question's end is unknown"):
        ours(words(1, 9))
    assert ours(words(1, 9), global_attention_mask=torch.zeros(1, 9).long()).start_logits.isfinite().all()


@pytest.mark.parametrize(("family", "expected"), [("Bert", 4), ("Electra", 4), ("Camembert", 6)])
@torch.no_grad()
def test_a_question_ends_where_the_tokenizer_says(family, expected, tmp_path):
    """At BERT's separator, or at the end of a text as RoBERTa's kind has it; an option comes first."""
    letters = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[SEP]": 4, "a": 5}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, sep_token="[SEP]", pad_token="[PAD]")
    tokenizer.save_pretrained(tmp_path / "published")
    special = dict(eos_token_id=6) if family == "Camembert" else {}
    ours = ours_of(published(f"{family}ForQuestionAnswering", **special), tmp_path, to="longformer")
    assert ours.config.sep_token_id == expected
    ids = words(1, 19).clamp(min=9)
    ids[0, 5] = expected
    marked = (torch.arange(19) < 5).long()[None]
    assert_equal(ours(ids).start_logits, ours(ids, global_attention_mask=marked).start_logits)
    told = convert(tmp_path / "published", tmp_path / "told", to="longformer", sep_token_id=8)
    assert opened(told).config.sep_token_id == 8


@pytest.mark.parametrize("kind", OTHERS)
def test_other_encoders_are_refused_by_name(kind, tmp_path):
    assert kind in transformers.CONFIG_MAPPING, "transformers has no such model"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=rf"is a {kind} model, which cannot be converted: .*; .*xlm-roberta"):
        convert(tmp_path, tmp_path / "converted")


def test_a_config_that_names_no_class(tmp_path):
    for name in ("ElectraForSequenceClassification", "ElectraForMaskedLM", "CamembertForTokenClassification"):
        published(name).save_pretrained(tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        del config["architectures"]
        path.write_text(json.dumps(config))
        ours = opened(convert(tmp_path / name, tmp_path / f"{name} converted"))
        assert type(ours).__name__.endswith(name.partition("For")[2])
        assert load_file(tmp_path / name / "model.safetensors").keys()
