"""Corpora of real documents, as datasets: what every machine has, a folder, or the Hub."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".json", ".jsonl", ".html", ".c", ".h", ".js", ".java", ".rs", ".go")


def load_corpus(name: str | os.PathLike = "stdlib") -> DatasetDict:
    """A corpus by name, with splits train, validation and test and the columns "text" and "document".

    "stdlib": the sources of the running Python's standard library, one file a document: real text with long-range
    dependence that needs no network. Tests and installed packages are left out.
    A folder: its text files, one a document, sub-folders too. Sub-folders named train, validation and test are the
    splits; otherwise files are split as below.
    "hf:NAME" or "hf:NAME:CONFIG": through datasets.load_dataset, with the splits it has and its column "text".

    Files are split by a hash of their path within the corpus, about 90 : 5 : 5, so that a file stays in its split when
    others come or go. A folder whose files leave a split empty, one single file for example, is split within each file
    instead: its first 90 % of characters, the next 5, the last 5.

    Raises ValueError for a path that does not exist, a folder without text, or a dataset without a text column.
    """
    name = os.fspath(name)
    if name == "stdlib":
        return _split(_read_files(Path(sysconfig.get_paths()["stdlib"]), (".py",), _is_library_source))
    if name.startswith("hf:"):
        return _from_hub(name)
    root = Path(name).expanduser()
    if not root.exists():
        raise ValueError(f"corpus {name!r} does not exist; give a folder of text, 'stdlib', or 'hf:NAME'")
    files = _read_files(root, SUFFIXES) if root.is_dir() else {root.name: _read(root)}
    if not any(text.strip() for text in files.values()):
        raise ValueError(f"corpus {name!r} holds no text; text files end in {', '.join(SUFFIXES)}")
    given = {split: {p: t for p, t in files.items() if p.split("/")[0] == split} for split in SPLITS}
    if all(given.values()):
        return _make(given)
    return _split(files)


def split_of(path: str) -> str:
    """The split of a document, from its path within the corpus alone: the same on every machine."""
    place = int.from_bytes(hashlib.blake2b(path.encode("utf-8"), digest_size=8).digest(), "big") / 2**64
    return "train" if place < 0.9 else "validation" if place < 0.95 else "test"


def _split(files: dict[str, str]) -> DatasetDict:
    splits: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for path, text in files.items():
        splits[split_of(path)][path] = text
    if not all(splits.values()):
        for path, text in files.items():
            ends = [0, int(len(text) * 0.9), int(len(text) * 0.95), len(text)]
            for split, start, end in zip(SPLITS, ends[:-1], ends[1:], strict=True):
                splits[split][path] = text[start:end]
    return _make(splits)


def _make(splits: dict[str, dict[str, str]]) -> DatasetDict:
    return DatasetDict(
        {
            split: Dataset.from_dict({"text": list(files.values()), "document": list(files)})
            for split, files in splits.items()
        }
    )


def _read_files(root: Path, suffixes: tuple[str, ...], wanted=lambda path: True) -> dict[str, str]:
    """The non-empty text files below a folder, by their path in it with forward slashes, in order."""
    found = sorted(p for p in root.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
    paths = {path.relative_to(root).as_posix(): path for path in found}
    texts = {name: _read(path) for name, path in paths.items() if wanted(name)}
    return {name: text for name, text in texts.items() if text.strip()}


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace")


def _is_library_source(path: str) -> bool:
    parts = path.split("/")
    left_out = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "__pycache__",
        "lib-dynload",
    }
    return not left_out & set(parts) and not parts[0].startswith("config-")


def _from_hub(name: str) -> DatasetDict:
    path, _, config = name.removeprefix("hf:").partition(":")
    if not path:
        raise ValueError(f"corpus {name!r} names no dataset; write hf:NAME or hf:NAME:CONFIG")
    data = load_dataset(path, config or None)
    for split, rows in data.items():
        if "text" not in rows.column_names:
            raise ValueError(f"corpus {name!r} has the columns {rows.column_names} in {split}; one must be 'text'")
    if "train" not in data:
        raise ValueError(f"corpus {name!r} has the splits {list(data)}; 'train' must be one of them")
    for split in ("validation", "test"):
        if split not in data:
            parts = data["train"].train_test_split(test_size=0.05, seed=0)
            data["train"], data[split] = parts["train"], parts["test"]
    return DatasetDict({split: _name_rows(data[split], split) for split in SPLITS})


def _name_rows(rows: Dataset, split: str) -> Dataset:
    return rows.select_columns(["text"]).add_column("document", [f"{split}/{i}" for i in range(len(rows))])


def corpus_version(name: str) -> str:
    """What to write beside a result measured on a corpus: for "stdlib" also the Python that it is the library of."""
    if name != "stdlib":
        return str(name)
    return "stdlib of Python " + ".".join(map(str, sys.version_info[:3]))
