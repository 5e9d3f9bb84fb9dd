"""The data of the lm-eval tasks in this folder: made here from seeds, or read from the corpus; nothing is fetched."""

from __future__ import annotations

from typing import Any

from datasets import Dataset, DatasetDict

from hf_gallery.data import TASKS, load_corpus, questions

EXAMPLES = 100


def ask(generator: str, arguments: dict[str, Any], last: bool = True, **metadata: Any) -> DatasetDict:
    """Questions of a task of hf_gallery.data as the split "test": the last of each example, or all of them.

    generator: its name. arguments: what it is called with. metadata: examples (100) and seed (0), and what lm-eval
    adds.
    """
    given = {name: int(metadata[name]) for name in ("examples", "seed") if name in metadata}
    data = TASKS[generator](**{"examples": EXAMPLES} | given | arguments | {"split": "test"})
    return DatasetDict(test=questions(data, last=last))


def documents(length: int, **metadata: Any) -> DatasetDict:
    """The first `length` bytes of each held-out document that has as many as the longest of these tasks reads, so that
    all of them read the same documents.

    metadata: examples (documents at most), corpus ("stdlib", or what hf_gallery.data.load_corpus reads), and
    what lm-eval adds.
    """
    longest = int(metadata.get("longest", length))
    texts = (text.encode("utf-8") for text in load_corpus(metadata.get("corpus", "stdlib"))["test"]["text"])
    starts = [text[:length].decode("utf-8", errors="ignore") for text in texts if len(text) >= longest]
    if not starts:
        raise ValueError(f"no held-out document of the corpus has {longest} bytes; take longer ones")
    return DatasetDict(test=Dataset.from_dict({"text": starts[: int(metadata.get("examples", EXAMPLES))]}))
