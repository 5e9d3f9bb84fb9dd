"""Law 8. Equals the published one: weights of the reference implementation give its outputs.

The comparisons stand in tests/published and tests/plain, each beside what it compares with. This file names all of
them, and fails if one is lost or skipped, or if a variant, a conversion or a golden folder is without one.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

from hf_gallery.convert import FORMATS
from hf_gallery.variants import VARIANTS

TESTS = Path(__file__).parents[1]
INSTALLED = "the installed release"


class Comparison(NamedTuple):
    """One published implementation and the test that holds a variant to it.

    version: the commit or release that gave the numbers. numbers: the folder in tests/golden that keeps them; None
    where the reference runs beside ours. conversion: the name of the format by which its weights come over.
    """

    variant: str
    source: str
    version: str
    test: str
    numbers: str | None = None
    conversion: str | None = None


MELIAD = "e8af0543441222c1c4c60d58803511f7cf92908b"
BERTS = "BERT, RoBERTa, XLM-R, CamemBERT, data2vec-text or ELECTRA"
COMPARISONS = [
    Comparison(
        "transformer", "torch.nn.Transformer", INSTALLED,
        "plain/test_transformer.py::test_encoder_decoder_equals_torch",
    ),
    Comparison(
        "transformer", "torch.nn.TransformerEncoder", INSTALLED,
        "plain/test_transformer.py::test_one_stack_equals_torch",
    ),
    Comparison(
        "transformer", "transformers' GPT-2", INSTALLED,
        "published/test_convert_transformer.py::test_gpt2", None, "GPT-2",
    ),
    Comparison(
        "transformer", "transformers' BERT and RoBERTa", INSTALLED,
        "published/test_convert_transformer.py::test_masked_language_models", None, BERTS,
    ),
    Comparison(
        "transformer", "transformers' BERT and RoBERTa classifiers", INSTALLED,
        "published/test_convert_transformer.py::test_classifiers", None, BERTS,
    ),
    Comparison(
        "transformer", "transformers' Marian", INSTALLED,
        "published/test_convert_transformer.py::test_marian", None, "Marian",
    ),
    Comparison(
        "transformer", "transformers' BART", INSTALLED,
        "published/test_convert_bart.py::test_bart", None, "BART",
    ),
    Comparison(
        "transformer_xl", "transformers' Transformer-XL, memory carried", "transformers 4.35.2",
        "published/test_convert_transformer_xl.py::test_segments_with_memory", "transformer_xl", "Transformer-XL",
    ),
    Comparison(
        "transformer_xl", "transformers' Transformer-XL, generate", "transformers 4.35.2",
        "published/test_convert_transformer_xl.py::test_greedy_continuation", "transformer_xl", "Transformer-XL",
    ),
    Comparison(
        "transformer_xl", "transformers' Transformer-XL, classifier", "transformers 4.35.2",
        "published/test_convert_transformer_xl.py::test_classifier", "transformer_xl", "Transformer-XL",
    ),
    Comparison(
        "transformer_xl", "kimiyoung/transformer-xl", "44781ed",
        "published/test_convert_transformer_xl.py::test_what_the_authors_code_gave", "transformer_xl_authors",
        "Transformer-XL (model.pt of its authors)",
    ),
    Comparison(
        "longformer", "transformers' Longformer", INSTALLED, "plain/test_longformer.py::test_equals_transformers",
    ),
    Comparison(
        "longformer", "transformers' Longformer, all heads", INSTALLED,
        "published/test_convert_longformer.py::test_heads", None, "Longformer",
    ),
    Comparison(
        "longformer", "transformers' Longformer, losses", INSTALLED,
        "plain/test_longformer.py::test_losses_equal_transformers",
    ),
    Comparison(
        "longformer", "transformers' BERT and RoBERTa, within a window", INSTALLED,
        "published/test_convert_longformer.py::test_from_an_encoder", None, BERTS,
    ),
    Comparison(
        "longformer", "transformers' XLM-R, CamemBERT, data2vec and ELECTRA, all heads, within a window", INSTALLED,
        "published/test_convert_encoders.py::test_every_head", None, BERTS,
    ),
    Comparison(
        "transformer", "transformers' BERT, RoBERTa, XLM-R, CamemBERT, data2vec and ELECTRA, all heads", INSTALLED,
        "published/test_convert_encoders.py::test_every_head", None, BERTS,
    ),
    Comparison(
        "longformer", "transformers' Longformer, multiple choice", INSTALLED,
        "plain/test_multiple_choice.py::test_equals_transformers_longformer", None, "Longformer",
    ),
    Comparison(
        "longformer", "transformers' GPT-2, within a window", INSTALLED,
        "published/test_convert_longformer.py::test_from_gpt2", None, "GPT-2",
    ),
    Comparison(
        "longformer", "transformers' LED", INSTALLED, "published/test_convert_bart.py::test_led", None, "LED",
    ),
    Comparison(
        "longformer", "transformers' BART, within a window", INSTALLED,
        "published/test_convert_bart.py::test_bart", None, "BART",
    ),
    Comparison(
        "memorizing_transformer", "google-research/meliad, forward", MELIAD,
        "published/test_meliad.py::test_logits_states_and_losses", "meliad",
    ),
    Comparison(
        "memorizing_transformer", "google-research/meliad, gradients", MELIAD,
        "published/test_meliad.py::test_gradients_per_segment", "meliad",
    ),
    Comparison(
        "memorizing_transformer", "transformers' GPT-2, gates closed", INSTALLED,
        "published/test_convert_memorizing.py::test_closed_gates_give_gpt2", None, "GPT-2",
    ),
    Comparison(
        "block_recurrent_transformer", "google-research/meliad, forward", MELIAD,
        "published/test_meliad.py::test_logits_states_and_losses", "meliad",
    ),
    Comparison(
        "block_recurrent_transformer", "google-research/meliad, gradients", MELIAD,
        "published/test_meliad.py::test_gradients_per_segment", "meliad",
    ),
    Comparison(
        "block_recurrent_transformer", "transformers' T5 bias in torch's attention", INSTALLED,
        "plain/test_block_recurrent_transformer.py::test_without_recurrence_it_is_a_decoder_with_a_sliding_window",
    ),
    Comparison(
        "recurrent_memory_transformer", "booydar/recurrent-memory-transformer, forward", "9d0ebe1",
        "published/test_recurrent_memory.py::test_logits_and_memories_of_the_code_around_gpt2", "recurrent_memory",
        "GPT-2",
    ),
    Comparison(
        "recurrent_memory_transformer", "booydar/recurrent-memory-transformer, gradients", "9d0ebe1",
        "published/test_recurrent_memory.py::test_loss_and_gradients_of_the_code_around_gpt2", "recurrent_memory",
        "GPT-2",
    ),
    Comparison(
        "recurrent_memory_transformer", "booydar/LM-RMT", "e289508",
        "published/test_recurrent_memory.py::test_hidden_states_and_memories_of_lm_rmt", "recurrent_memory",
    ),
    Comparison(
        "recurrent_memory_transformer", "transformers' GPT-2, without memory tokens", INSTALLED,
        "published/test_recurrent_memory.py::test_without_memory_tokens_a_segment_is_gpt2", None, "GPT-2",
    ),
]  # fmt: skip


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: f"{c.variant}: {c.source}")
def test_the_comparison_is_there_and_runs(comparison):
    path, _, name = comparison.test.partition("::")
    functions = {x.name: x for x in ast.parse((TESTS / path).read_text()).body if isinstance(x, ast.FunctionDef)}
    assert name in functions, f"{comparison.test} is gone, the comparison with {comparison.source}"
    marks = [ast.unparse(x) for x in functions[name].decorator_list]
    assert not [mark for mark in marks if "skip" in mark or "slow" in mark or "xfail" in mark], marks
    assert comparison.numbers is None or any((TESTS / "golden" / comparison.numbers).iterdir())


def test_each_variant_has_a_published_counterpart():
    assert {c.variant for c in COMPARISONS} == set(VARIANTS)


def test_each_conversion_is_compared():
    assert {c.conversion for c in COMPARISONS if c.conversion} == {form.name for form in FORMATS}


def test_all_golden_numbers_are_compared_with():
    """Folders of numbers that others computed; those that earlier versions of this project saved are in `saved`."""
    folders = {path.name for path in (TESTS / "golden").iterdir() if path.is_dir()} - {"saved", "__pycache__"}
    assert {c.numbers for c in COMPARISONS if c.numbers} == folders
