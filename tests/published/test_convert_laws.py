"""Conversions of transformers' own models obey the laws, generate, and open without hf_gallery."""

import pytest
from converted import converted, generates, obeys_the_laws, open_without_the_library
from test_convert_longformer import longformer
from test_convert_transformer import published
from variants import PAD, VOCAB

from hf_gallery.convert import convert

SHORT = dict(to="longformer", attention_window=[4, 6, 4], max_position_embeddings=140)
MEMORY = dict(
    to="memorizing_transformer", memory_layers=[1], memory_size=30, memory_topk=3, segment_length=7, mem_len=5
)
FOLDERS = {  # what it is made from, options, and the tokens after which its cache stops growing
    "longformer": (lambda: longformer("masked"), {}, None),
    "longformer sequence": (lambda: longformer("sequence"), {}, None),
    "longformer tokens": (lambda: longformer("tokens"), {}, None),
    "longformer question": (lambda: longformer("question"), {}, None),
    "bert": (lambda: published("BertForMaskedLM"), {}, None),
    "bert sequence": (lambda: published("BertForSequenceClassification"), {}, None),
    "roberta": (lambda: published("RobertaForMaskedLM"), {}, None),
    "roberta sequence": (lambda: published("RobertaForSequenceClassification"), {}, None),
    "gpt2": (lambda: published("GPT2LMHeadModel", pad_token_id=PAD), {}, None),
    "marian": (lambda: published("MarianMTModel"), {}, None),
    "bart": (lambda: published("BartForConditionalGeneration"), {}, None),
    "led": (lambda: published("LEDForConditionalGeneration"), {}, None),
    "bart to longformer": (
        lambda: published("BartForConditionalGeneration"),
        SHORT | dict(attention_window=[4, 6]),
        None,
    ),
    "bert to longformer": (lambda: published("BertForMaskedLM"), SHORT, None),
    "bert sequence to longformer": (lambda: published("BertForSequenceClassification"), SHORT, None),
    "roberta to longformer": (lambda: published("RobertaForMaskedLM"), SHORT, None),
    "roberta sequence to longformer": (lambda: published("RobertaForSequenceClassification"), SHORT, None),
    "bert tokens": (lambda: published("BertForTokenClassification"), {}, None),
    "roberta question": (lambda: published("RobertaForQuestionAnswering", num_labels=2), {}, None),
    "bert choice": (lambda: published("BertForMultipleChoice"), {}, None),
    "longformer choice": (lambda: longformer("choice"), {}, None),
    "xlm-r to longformer": (lambda: published("XLMRobertaForMaskedLM"), SHORT, None),
    "electra, narrow, to longformer": (lambda: published("ElectraForMaskedLM", embedding_size=12), SHORT, None),
    "gpt2 to longformer": (lambda: published("GPT2LMHeadModel", pad_token_id=PAD), SHORT, 6),
    "gpt2 to memorizing": (lambda: published("GPT2LMHeadModel", pad_token_id=PAD), MEMORY, 42),
}


def made(name, base):
    source, options, horizon = FOLDERS[name]
    model = source()
    assert model.config.vocab_size == VOCAB
    model.save_pretrained(base / "published" / name)
    return converted(convert(base / "published" / name, base / name, **options), horizon=horizon)


@pytest.mark.parametrize("name", FOLDERS)
def test_laws(name, tmp_path):
    variant = made(name, tmp_path)
    obeys_the_laws(variant)
    if variant.heads[variant.head].stream:
        generates(variant)


@pytest.mark.slow
def test_all_open_without_the_library(tmp_path):
    """One folder for each class that comes out."""
    variants = [made(name, tmp_path) for name in FOLDERS]
    kinds = {variant.heads[variant.head].kind: variant for variant in variants}
    assert len(kinds) == 15
    open_without_the_library(list(kinds.values()), tmp_path)
