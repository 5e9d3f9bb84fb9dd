"""What the conversions of transformers' own models write obeys the laws, generates, and opens without hf_gallery."""

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
    "bert": (lambda: published("BertForMaskedLM"), {}, None),
    "roberta": (lambda: published("RobertaForSequenceClassification"), {}, None),
    "gpt2": (lambda: published("GPT2LMHeadModel", pad_token_id=PAD), {}, None),
    "marian": (lambda: published("MarianMTModel"), {}, None),
    "bert to longformer": (lambda: published("BertForMaskedLM"), SHORT, None),
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
    open_without_the_library([made(name, tmp_path) for name in FOLDERS], tmp_path)
