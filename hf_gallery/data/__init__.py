"""Corpora, a byte tokenizer and task generators, all without a network."""

from .catalogue import TASKS, chance
from .corpus import corpus_version, load_corpus, split_of
from .examples import questions
from .mad import (
    mad_compression,
    mad_fuzzy_recall,
    mad_memorization,
    mad_noisy_recall,
    mad_recall,
    mad_selective_copy,
)
from .mqar import mqar
from .reasoning import listops, permutation_composition, variable_tracking
from .stories import state_tracking
from .tasks import associative_recall, passkey, selective_copy, slot_recall, verbatim_copy
from .tokenizer import byte_tokenizer, encode_bytes

__all__ = [
    "TASKS",
    "associative_recall",
    "byte_tokenizer",
    "chance",
    "corpus_version",
    "encode_bytes",
    "listops",
    "load_corpus",
    "mad_compression",
    "mad_fuzzy_recall",
    "mad_memorization",
    "mad_noisy_recall",
    "mad_recall",
    "mad_selective_copy",
    "mqar",
    "passkey",
    "permutation_composition",
    "questions",
    "selective_copy",
    "slot_recall",
    "split_of",
    "state_tracking",
    "variable_tracking",
    "verbatim_copy",
]
