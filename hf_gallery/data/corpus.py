"""Corpora of real documents, as datasets: what every machine has, a folder, or the Hub."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset

from ..errors import one_line

SPLITS = ("train", "validation", "test")
LONGEST = 2**31 - 1  # bytes of a document: Arrow counts them so
SUFFIXES = (".txt", ".md", ".rst", ".py", ".tex", ".json", ".jsonl", ".html", ".c", ".h", ".js", ".java", ".rs", ".go")


def load_corpus(name: str | os.PathLike = "stdlib", labels: bool = False) -> DatasetDict:
    """A corpus by name, with splits train, validation and test and the columns "text" and "document", both str.

    "stdlib": the sources of the running Python's standard library, one file a document: real text with long-range
    dependence that needs no network. Tests and installed packages are left out.
    A folder: its text files, one a document named by its path in the folder, sub-folders too. Files that are hidden
    or binary (a zero byte) are left out, and what is not UTF-8 reads as U+FFFD. Nothing else is: what cannot be read,
    links that lead out of the folder, and pipes and devices with the name of a text are refused. If there is a
    sub-folder train and one of validation and test, these are the splits, a third that is missing is taken from train,
    and files beside them are left out; otherwise files are split as below. A single file is a folder of one.
    "pg19", "wikitext-103", "enwik8": these corpora from the Hub, as the field splits them. A document of WikiText is
    an article, joined from its lines; enwik8 is one document a split, its first 90, next 5 and last 5 of 100 million
    bytes (what a cut leaves of a character at its edges is dropped).
    "hf:NAME" or "hf:NAME:CONFIG": through datasets.load_dataset, with the splits it has and its column "text"; of
    validation and test what is missing is 5 % of the rows of train, drawn with seed 0. labels=True keeps a column
    "label" too, where there is one.

    Files are split by a hash of their path within the corpus, about 90 : 5 : 5, so that a file stays in its split when
    others come or go. A folder whose files leave a split empty, one single file for example, is split within each file
    instead: its first 90 % of characters, the next 5, the last 5. No document is without text.

    Raises ValueError for a path that does not exist or cannot be read as text, a folder with no text or too little to
    be split, and a dataset that cannot be loaded or has no text column.
    """
    name = os.fspath(name)
    if name.startswith("hf:"):
        return _from_hub(name, labels)
    if name in PUBLISHED:
        return _published(name)
    files = _find_files(name)
    given = {split: {p: t for p, t in files.items() if p.split("/")[0] == split} for split in SPLITS}
    if given["train"] and (given["validation"] or given["test"]):
        for split in ("validation", "test"):
            if not given[split]:
                given["train"], given[split] = _hold_out(given["train"], split)
        splits = given
    else:
        splits = _split(files)
    if not all(splits.values()):
        raise ValueError(
            f"corpus {name!r} holds too little text, {sum(map(len, files.values()))} characters in {len(files)} "
            f"file(s), to have some in each of {', '.join(SPLITS)}; add text"
        )
    return _make(splits)


def split_of(path: str) -> str:
    """The split of a document, "train", "validation" or "test", from its path within the corpus alone (with forward
    slashes): the same on every machine, 90 : 5 : 5 of many."""
    place = int.from_bytes(hashlib.blake2b(path.encode("utf-8"), digest_size=8).digest(), "big") / 2**64
    return "train" if place < 0.9 else "validation" if place < 0.95 else "test"


def _split(files: dict[str, str]) -> dict[str, dict[str, str]]:
    splits: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    for path, text in files.items():
        splits[split_of(path)][path] = text
    if all(splits.values()):
        return splits
    splits = {split: {} for split in SPLITS}
    for path, text in files.items():
        ends = [0, int(len(text) * 0.9), int(len(text) * 0.95), len(text)]
        for split, start, end in zip(SPLITS, ends[:-1], ends[1:], strict=True):
            if text[start:end].strip():
                splits[split][path] = text[start:end]
    return splits


def _hold_out(files: dict[str, str], split: str) -> tuple[dict[str, str], dict[str, str]]:
    """The remaining files and those of the split: the files that it would get from a whole corpus, or the last 5 % of
    each if that leaves one side empty."""
    held_out = {path: text for path, text in files.items() if split_of(path) == split}
    remaining = {path: text for path, text in files.items() if path not in held_out}
    if not held_out or not remaining:
        cuts = {path: int(len(text) * 0.95) for path, text in files.items()}
        remaining = {path: text[: cuts[path]] for path, text in files.items() if text[: cuts[path]].strip()}
        held_out = {path: text[cuts[path] :] for path, text in files.items() if text[cuts[path] :].strip()}
    return remaining, held_out


def _make(splits: dict[str, dict[str, str]]) -> DatasetDict:
    return DatasetDict(
        {
            split: Dataset.from_dict({"text": list(files.values()), "document": list(files)})
            for split, files in splits.items()
        }
    )


def _find_files(name: str) -> dict[str, str]:
    """The texts of "stdlib", a folder or a file, by path in it with forward slashes, in order."""
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _texts(root, (p for p in _walk(root, _is_library_folder) if p.suffix.lower() == ".py" and p.is_file()))
        if not files:
            raise ValueError(
                f"corpus 'stdlib' finds no sources in {root}; this Python has none, so give a folder of text"
            )
        return files
    try:
        root = Path(name).expanduser()
        there = bool(name) and os.path.lexists(root)  # ValueError: a zero byte; RuntimeError: ~nobody
        if there and root.is_dir():
            files = _texts(root, (_inside(path, root) for path in _walk(root) if path.suffix.lower() in SUFFIXES))
        elif there:
            files = {root.name: _read(root)}
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"corpus {name!r} cannot be read: {one_line(error)}") from error
    if not there:
        raise ValueError(f"corpus {name!r} does not exist; give a folder of text, 'stdlib', or 'hf:NAME'")
    if not any(files.values()):
        raise ValueError(f"corpus {name!r} holds no text; text files end in {', '.join(SUFFIXES)}")
    return files


def _walk(root: Path, enter: Callable[[str], bool] | None = None) -> Iterator[Path]:
    """All that lies below a folder and is neither a folder nor hidden. Links to folders are not followed, nor are
    folders that `enter` says no to, by their path below the root.

    Raises OSError for a folder that cannot be read, and without `enter` ValueError for a link to a folder elsewhere.
    """
    left = [root]
    while left:  # and not os.walk, which leaves out what it cannot read, and ends after a thousand levels
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if enter is None or enter(path.relative_to(root).as_posix()):
                        left.append(path)
                elif not entry.is_dir():
                    yield path
                elif enter is None:
                    _inside(path, root)


def _inside(path: Path, root: Path) -> Path:
    """The path itself. Raises ValueError if it is a link to a place outside of the root."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link to {os.readlink(path)}, outside of the folder; put there what it leads to")
    return path


def _texts(root: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Texts of the files that hold text, by their path below the root with forward slashes, in order."""
    texts = {}
    for path in paths:
        name = path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")
        texts[name] = _read(path)
    return {name: texts[name] for name in sorted(texts, key=lambda n: n.split("/")) if texts[name]}


def _read(path: Path) -> str:
    """A file's text; "" if it is binary or blank, of which no more is read than shows it.

    Raises ValueError for what is no file, as a pipe or a device, and for one that is too long for a document.
    """
    # Without waiting: a pipe opens only when somebody writes to it.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path} is no file that could be read to its end, but a pipe, a device or the like")
        parts: list[bytes] = []
        while part := file.read(2**20):
            if b"\0" in part:
                return ""
            parts.append(part)
            if max(about.st_size, sum(map(len, parts))) > LONGEST:
                raise ValueError(
                    f"{path} has {about.st_size:,} bytes; a document has {LONGEST:,} at most, so cut it up"
                )
    text = b"".join(parts).decode("utf-8", errors="replace")
    return text if text.strip() else ""


def _is_library_folder(path: str) -> bool:
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


def _from_hub(name: str, labels: bool) -> DatasetDict:
    path, _, config = name.removeprefix("hf:").partition(":")
    if not path:
        raise ValueError(f"corpus {name!r} names no dataset; write hf:NAME or hf:NAME:CONFIG")
    data = _download(name, path, config or None)
    for split, rows in data.items():
        if "text" not in rows.column_names:
            raise ValueError(f"corpus {name!r} has the columns {rows.column_names} in {split}; one must be 'text'")
    if "train" not in data:
        raise ValueError(f"corpus {name!r} has the splits {list(data)}; 'train' must be one of them")
    for split in ("validation", "test"):
        if split not in data:
            parts = data["train"].train_test_split(test_size=0.05, seed=0)
            data["train"], data[split] = parts["train"], parts["test"]
    kept = ["label"] if labels and "label" in data["train"].column_names else []
    return DatasetDict({split: _name_rows(data[split], split, kept) for split in SPLITS})


def _download(name: str, path: str, config: str | None, **options: str) -> DatasetDict:
    try:
        return load_dataset(path, config, **options)
    except Exception as error:  # no network, no such dataset or config; or files that are not what they should be
        raise ValueError(
            f"corpus {name!r} cannot be loaded: {one_line(error)}; check its name and the network, or take 'stdlib' "
            "or a folder"
        ) from error


def _published(name: str) -> DatasetDict:
    """One of PUBLISHED, in documents."""
    place, options, documents = PUBLISHED[name]
    data = _download(name, *place, **options)
    if name == "enwik8":
        whole = "".join(data["train"]["text"]).encode()
        ends = [0, len(whole) * 9 // 10, len(whole) * 19 // 20, len(whole)]
        parts = [whole[i:j].decode(errors="ignore") for i, j in zip(ends[:-1], ends[1:], strict=True)]
        data = DatasetDict({s: Dataset.from_dict({"text": [part]}) for s, part in zip(SPLITS, parts, strict=True)})
    return DatasetDict({split: documents(data[split], split) for split in SPLITS})


def _articles(rows: Dataset, split: str) -> Dataset:
    """WikiText's lines joined to articles; a line " = Title = " begins one."""
    articles: list[list[str]] = []
    for line in rows["text"]:
        if not articles or TITLE.fullmatch(line):
            articles.append([])
        articles[-1].append(line)
    joined = ["".join(lines) for lines in articles]
    return _name_rows(Dataset.from_dict({"text": [text for text in joined if text.strip()]}), split)


def _name_rows(rows: Dataset, split: str, kept: Sequence[str] = ()) -> Dataset:
    return rows.select_columns(["text", *kept]).add_column("document", [f"{split}/{i}" for i in range(len(rows))])


TITLE = re.compile(r" = (?!= )[^\n]*(?<! =) = \n")
# Where published corpora lie on the Hub, in files that load without running their code: dataset and config, options of
# load_dataset, and what makes documents of a split's rows.
PUBLISHED: dict[str, tuple[tuple[str, str | None], dict[str, str], Callable[[Dataset, str], Dataset]]] = {
    "pg19": (("emozilla/pg19", None), {}, _name_rows),
    "wikitext-103": (("Salesforce/wikitext", "wikitext-103-raw-v1"), {}, _articles),
    "enwik8": (("LTCB/enwik8", "enwik8-raw"), {"revision": "refs/convert/parquet"}, _name_rows),
}


def corpus_version(name: str | os.PathLike) -> str:
    """The name of a corpus to write beside a result: for "stdlib" with the Python that it is the library of, for a
    folder or file with a hash of its texts, so that a change of either shows. Raises ValueError as load_corpus does.
    """
    name = os.fspath(name)
    if name == "stdlib":
        return "stdlib of Python " + ".".join(map(str, sys.version_info[:3]))
    if name.startswith("hf:") or name in PUBLISHED:
        return name
    content = hashlib.blake2b(digest_size=8)
    for path, text in _find_files(name).items():
        for part in (path.encode("utf-8"), text.encode("utf-8")):
            content.update(len(part).to_bytes(8, "big") + part)  # with their lengths, so that a boundary counts
    return f"{name}, {content.hexdigest()}"
