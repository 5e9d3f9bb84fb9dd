"""Corpora, a byte tokenizer and task generators, all without a network."""

from .corpus import corpus_version, load_corpus, split_of
from .tasks import associative_recall, passkey, slot_recall
from .tokenizer import byte_tokenizer, encode_bytes

__all__ = [
    "associative_recall",
    "byte_tokenizer",
    "corpus_version",
    "encode_bytes",
    "load_corpus",
    "passkey",
    "slot_recall",
    "split_of",
]
