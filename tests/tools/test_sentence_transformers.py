"""sentence-transformers and setfit on encoders and causal models: open, encode, save, open again."""

import numpy as np
import pytest
import torch
from test_trainer import FIVE, TOKENIZER, make

from hf_gallery.data import byte_tokenizer

sentence_transformers = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")

TEXTS = ["the sea is wide", "a hill", "the sea is wide, and so on and so on", "a hill, and the sea, and another hill"]
# An encoder has no class of its own in these models; a folder saved of any head opens as the bare model.
SAVED = [(v, head) for v in FIVE for head in ("causal", "masked") if head in v.heads]


@pytest.mark.works("sentence-transformers")
@pytest.mark.parametrize(("variant", "head"), [pytest.param(v, h, id=f"{v.name}-{h}") for v, h in SAVED])
def test_texts_are_encoded_alike_in_a_batch_and_alone(variant, head, tmp_path):
    settings = {}
    if "max_position_embeddings" in variant.config.__dataclass_fields__:
        settings["max_position_embeddings"] = 300
    if "encoder" in variant.heads:
        settings["is_decoder"] = head == "causal"
    model = make(variant, head, **settings)
    model.save_pretrained(tmp_path / "saved")
    TOKENIZER.save_pretrained(tmp_path / "saved")
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    if "max_position_embeddings" in settings:
        assert encoder.max_seq_length == 300
    batch = encoder.encode(TEXTS, batch_size=4)
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(batch, alone, rtol=1e-4, atol=1e-5)
    hidden = model.base_model.eval()(torch.tensor([TOKENIZER(TEXTS[0])["input_ids"]])).last_hidden_state
    pooled = hidden[0].mean(0) if head == "masked" else hidden[0, -1]  # what sentence-transformers chooses itself
    np.testing.assert_allclose(batch[0], pooled.detach().numpy(), rtol=1e-4, atol=1e-5)
    encoder.save_pretrained(str(tmp_path / "again"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "again"), device="cpu", trust_remote_code=True)
    np.testing.assert_array_equal(again.encode(TEXTS), batch)


def test_a_long_text_is_cut_to_what_a_new_longformer_reads():
    """Its positions count from 2, so that its table is longer than any input; hf-gallery train tells the tokenizer."""
    from hf_gallery.cli import _model_to_train

    settings = ["hidden_size=16", "num_attention_heads=2", "num_hidden_layers=1", "intermediate_size=16"]
    settings += ["attention_window=4", "position_embedding_type=learned"]
    settings += ["max_position_embeddings=40", "position_offset=2"]
    model, tokenizer = _model_to_train("longformer", settings, None)
    assert tokenizer.model_max_length == model.config.n_positions == 38
    _, tokenizer = _model_to_train("transformer_xl", settings[:4], None)
    assert tokenizer.model_max_length > 2**66, "no length to transformers"


def test_sentence_transformers_cut_to_the_tokenizers_length(tmp_path):
    model = make(next(v for v in FIVE if v.name == "longformer"), "masked", max_position_embeddings=40)
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = model.config.n_positions
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu", trust_remote_code=True)
    assert encoder.max_seq_length == 38
    np.testing.assert_allclose(encoder.encode(["a" * 100]), encoder.encode(["a" * 38]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "longformer"])
def test_setfit_learns_from_a_few_texts(name, tmp_path):
    setfit = pytest.importorskip("setfit", reason="setfit is not installed", exc_type=ImportError)
    variant = next(v for v in FIVE if v.name == name)
    make(variant, "masked").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = setfit.SetFitModel.from_pretrained(str(tmp_path), trust_remote_code=True, device="cpu")
    model.fit(TEXTS, [0, 1, 0, 1], num_epochs=1)
    assert list(model.predict(["the sea is wide", "a hill"])) == [0, 1]
