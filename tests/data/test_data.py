"""Corpora, the byte tokenizer and the task generators: nothing is lost, nothing leaks between splits, every answer is
where the labels say, and the same arguments give the same data in every process."""

import hashlib
import json
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gallery.data import (
    associative_recall,
    byte_tokenizer,
    corpus_version,
    encode_bytes,
    load_corpus,
    passkey,
    slot_recall,
    split_of,
)
from hf_gallery.data.examples import NOISE
from hf_gallery.data.tasks import ANSWERS, FILLER, KEYS, READS, SLOT_VALUES, VALUES, WRITES

SPLITS = ("train", "validation", "test")
# No lone surrogates: they have no UTF-8 form, so no text that was read from anywhere holds them.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def elsewhere(code, *arguments, **environment):
    """The JSON that `code` prints in a process of its own, in which strings hash otherwise than here."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONHASHSEED": "4", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---------------------------------------------------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@given(text=TEXTS)
def test_ids_are_the_bytes_of_the_text(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert encode_bytes(text).tolist() == ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a ",
        "a .",
        "\t\r\n\n",
        "\0",
        "do n't ,",
        "Ġ ▁ \u200b",
        "e\u0301 é",
        "\U0001f469‍\U0001f680",
        "<pad> <eos>",
        "\ufeffx",
    ],
    ids=ascii,
)
def test_texts_that_tokenizers_like_to_change(tokenizer, text):
    assert tokenizer(text).input_ids == list(text.encode("utf-8"))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@given(data=st.binary(max_size=60))
def test_any_bytes_decode_as_utf8_with_replacement(tokenizer, data):
    assert tokenizer.decode(list(data)) == data.decode("utf-8", errors="replace")


@given(text=TEXTS, cut=st.integers(0, 240))
def test_ids_cut_within_a_character_lose_nothing(tokenizer, text, cut):
    ids = tokenizer(text).input_ids
    cut = min(cut, len(ids))
    pieces = [ids[:cut], ids[cut:]]
    expected = [bytes(piece).decode("utf-8", errors="replace") for piece in pieces]
    assert tokenizer.batch_decode(pieces) == expected
    tokens = [tokenizer.convert_ids_to_tokens(piece) for piece in pieces]
    back = [tokenizer.convert_tokens_to_ids(piece) for piece in tokens]
    assert tokenizer.decode(back[0] + back[1]) == text


def test_every_byte_has_a_token_of_its_own(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(list(range(262)))
    assert len(set(tokens)) == 262
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(262))
    assert len(tokenizer) == 262


def test_special_tokens(tokenizer):
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask", "sep", "cls")}
    assert ids == {"pad": 256, "bos": 257, "eos": 258, "mask": 259, "sep": 260, "cls": 261}
    assert tokenizer.unk_token_id is None
    assert sorted(tokenizer.all_special_ids) == list(range(256, 262))
    assert tokenizer.decode([257, 104, 105, 258]) == "<bos>hi<eos>"
    assert tokenizer.decode([257, 104, 105, 258], skip_special_tokens=True) == "hi"


def test_the_name_of_a_special_token_is_plain_text_unless_asked(tokenizer):
    assert tokenizer("a<mask>b").input_ids == list(b"a<mask>b")
    assert tokenizer("a<mask>b", split_special_tokens=False).input_ids == [97, 259, 98]


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["a", "bcé", ""], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}  # all that every model of the gallery takes
    assert batch["input_ids"].tolist() == [[256, 256, 256, 97], [98, 99, 195, 169], [256, 256, 256, 256]]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 256).long())
    assert len(tokenizer("x" * 100_000).input_ids) == 100_000  # no longest input, and no warning of one
    assert tokenizer.model_max_length > 10**9


TOKENIZE = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
batch = tokenizer(json.loads(sys.argv[2]), padding=True)
assert "hf_gallery" not in sys.modules
print(json.dumps([dict(batch), tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True), len(tokenizer),
                  tokenizer.all_special_tokens, tokenizer.all_special_ids, tokenizer.model_max_length]))
"""


def test_travels_to_a_process_without_the_package(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    texts = ["a <pad> b .", "Ünï\n\r\n", " x "]
    batch, decoded, *facts = elsewhere(TOKENIZE, tmp_path, json.dumps(texts))
    assert batch == dict(tokenizer(texts, padding=True))
    assert decoded == texts
    names, ids = tokenizer.all_special_tokens, tokenizer.all_special_ids
    assert facts == [262, names, ids, tokenizer.model_max_length]


def test_encode_bytes_gives_an_array_of_its_own():
    ids = encode_bytes("é\n")
    assert ids.dtype == np.int64 and ids.shape == (3,)
    ids[0] = 7  # torch.from_numpy needs it writable
    assert encode_bytes("é\n").tolist() == [195, 169, 10]
    assert encode_bytes("").shape == (0,)


# ------------------------------------------------------------------------------------------------ the standard library


@pytest.fixture(scope="module")
def stdlib():
    return load_corpus()


def documents(corpus):
    """Text by document, and split by document: of a corpus where no document is in two splits."""
    texts, places = {}, {}
    for split, rows in corpus.items():
        for row in rows:
            assert row["document"] not in texts, f"{row['document']} is in {split} and {places[row['document']]}"
            texts[row["document"]], places[row["document"]] = row["text"], split
    return texts, places


def test_stdlib_splits(stdlib):
    assert list(stdlib) == list(SPLITS)
    texts, places = documents(stdlib)
    assert places == {path: split_of(path) for path in texts}
    shares = {split: len(stdlib[split]) / len(texts) for split in SPLITS}
    assert 0.85 < shares["train"] < 0.95 and min(shares["validation"], shares["test"]) > 0.02, shares
    assert sum(map(len, texts.values())) > 4_000_000  # characters: enough to train on


def test_stdlib_texts_are_the_sources(stdlib):
    texts, _ = documents(stdlib)
    assert all(text.strip() for text in texts.values())
    for module in (json, json.decoder, re, subprocess):
        path = Path(module.__file__)
        name = Path(*path.parts[path.parts.index(Path(os.__file__).parent.name) + 1 :]).as_posix()
        assert texts[name] == path.read_bytes().decode("utf-8")


def test_stdlib_has_no_tests_and_no_installed_packages(stdlib):
    texts, _ = documents(stdlib)
    folders = {folder for path in texts for folder in path.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any("torch" in path.split("/")[0] or Path(path).suffix != ".py" for path in texts)


CORPORA = """
import hashlib, json, sys
from hf_gallery.data import load_corpus
print(json.dumps([[split, rows["document"][:], hashlib.sha256("".join(rows["text"]).encode()).hexdigest()]
                  for name in sys.argv[1:] for split, rows in load_corpus(name).items()]))
"""


@pytest.mark.slow
def test_corpora_are_the_same_in_every_process(stdlib, tmp_path, texts):
    here = [
        [split, rows["document"][:], hashlib.sha256("".join(rows["text"]).encode()).hexdigest()]
        for corpus in (stdlib, load_corpus(write(tmp_path, texts)))
        for split, rows in corpus.items()
    ]
    assert elsewhere(CORPORA, "stdlib", tmp_path) == here


def test_a_split_is_fixed_for_all_time():
    """Written down once: a corpus that was split otherwise later would mix what was trained on into the test."""
    known = {"json/decoder.py": "train", "a.txt": "train", "ü.md": "train", "11.txt": "test"}
    known |= {"os.py": "validation", "4.txt": "validation", "22.txt": "validation"}
    assert {path: split_of(path) for path in known} == known


def test_hashes_split_90_5_5():
    places = [split_of(f"chapters/{i}.txt") for i in range(20_000)]
    shares = {split: places.count(split) / len(places) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.90, "validation": 0.05, "test": 0.05}, abs=0.006)  # 4 deviations


# ------------------------------------------------------------------------------------------------------------- folders


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


@pytest.fixture
def texts():
    """Enough documents, in nested folders, that each split gets some."""
    files = {f"{'abc'[i % 3]}/{i // 10}/{i}.txt": f"document {i}, über\r\n" for i in range(200)}
    assert {split_of(path) for path in files} == set(SPLITS)
    return files


def test_folder(tmp_path, texts):
    for name in (str(write(tmp_path, texts)), tmp_path):
        corpus = load_corpus(name)
        assert documents(corpus) == (texts, {path: split_of(path) for path in texts})
        assert all(
            rows.features["text"].dtype == rows.features["document"].dtype == "string" for rows in corpus.values()
        )


def test_folder_from_the_home_directory(tmp_path, texts, monkeypatch):
    write(tmp_path / "corpus", texts)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents(load_corpus("~/corpus"))[0] == texts


def test_documents_keep_their_split_when_others_come_and_go(tmp_path, texts):
    before = documents(load_corpus(write(tmp_path, texts)))[1]
    (tmp_path / "a/0/0.txt").unlink()
    write(tmp_path, {f"new/{i}.md": "more" for i in range(50)})
    after = documents(load_corpus(tmp_path))[1]
    assert len(after) == 249
    assert all(before[path] == split for path, split in after.items() if path in before)


def test_what_is_no_text_is_left_out(tmp_path, texts):
    other = {
        ".git/config.txt": "hidden folder",
        "a/.venv/lib.py": "hidden folder",
        "a/.hidden.txt": "hidden file",
        "picture.png": "a suffix that is not text's",
        "Makefile": "no suffix",
        "a/binary.txt": b"text\0with a zero byte",
        "a/utf16.txt": "text".encode("utf-16"),
        "a/empty.txt": "",
        "a/blank.md": " \n\t\n",
        "a/folder.txt/inside.png": "a folder that is named like a text",
    }
    write(tmp_path, texts | other)
    assert documents(load_corpus(tmp_path))[0] == texts


def test_suffixes_of_any_case(tmp_path, texts):
    more = {"A.TXT": "one", "b/B.Md": "two", "c.PY": "three"}
    assert documents(load_corpus(write(tmp_path, texts | more)))[0] == texts | more


def test_what_is_not_utf8_is_replaced(tmp_path, texts):
    write(tmp_path, texts | {"latin1.txt": "Zürich".encode("latin-1")})
    assert documents(load_corpus(tmp_path))[0]["latin1.txt"] == "Z\ufffdrich"


def test_file_name_that_is_not_utf8(tmp_path, texts):
    write(tmp_path, texts)
    try:
        (tmp_path / os.fsdecode(b"\xff.txt")).write_text("odd")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert documents(load_corpus(tmp_path))[0] == texts | {r"\udcff.txt": "odd"}


def test_given_splits(tmp_path):
    """Sub-folders win over hashes, and what stands beside them is not mixed in."""
    files = {f"{split}/{i}.txt": f"{split} {i}" for split in SPLITS for i in range(4)}
    corpus = load_corpus(write(tmp_path, files | {"README.md": "beside them"}))
    assert documents(corpus) == (files, {path: path.split("/")[0] for path in files})


@pytest.mark.parametrize("number", [60, 2], ids=["by_file", "within_files"])
@pytest.mark.parametrize("missing", ["validation", "test"])
def test_a_missing_split_is_taken_from_train_alone(tmp_path, missing, number):
    present = "test" if missing == "validation" else "validation"
    train = {f"train/{i}.txt": f"train {i} " * 20 for i in range(number)}
    held_out = {f"{present}/{i}.txt": f"{present} {i}" for i in range(3)}
    corpus = load_corpus(write(tmp_path, train | held_out))
    assert dict(zip(corpus[present]["document"], corpus[present]["text"], strict=True)) == held_out
    assert 0 < sum(map(len, corpus[missing]["text"])) < 0.15 * sum(map(len, corpus["train"]["text"]))
    rejoined = {path: "" for path in train}
    for split in ("train", missing):
        for row in corpus[split]:
            rejoined[row["document"]] += row["text"]
    assert rejoined == train
    if number == 60:
        assert set(corpus["train"]["document"]).isdisjoint(corpus[missing]["document"])


def test_a_test_folder_alone_is_no_split(tmp_path, texts):
    """Many a project has its tests in a folder of this name."""
    files = texts | {"test/test_a.py": "assert True"}
    assert documents(load_corpus(write(tmp_path, files))) == (files, {path: split_of(path) for path in files})


@pytest.mark.parametrize("as_file", [True, False])
def test_one_document_is_split_within(tmp_path, as_file):
    text = "".join(f"Zeile {i} über\n" for i in range(100))
    write(tmp_path, {"book.txt": text})
    corpus = load_corpus(tmp_path / "book.txt" if as_file else tmp_path)
    parts = {split: rows["text"][0] for split, rows in corpus.items()}
    assert {split: rows["document"][:] for split, rows in corpus.items()} == {split: ["book.txt"] for split in SPLITS}
    assert "".join(parts.values()) == text
    assert [round(len(parts[split]) / len(text), 2) for split in SPLITS] == [0.90, 0.05, 0.05]


@pytest.mark.parametrize("read", [load_corpus, corpus_version])
@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (
            {},
            "no/such/folder",
            r"corpus '.*no/such/folder' does not exist; give a folder of text, 'stdlib', or 'hf:NAME'",
        ),
        ({}, "", r"corpus '.*' holds no text; text files end in .*\.txt, \.md"),
        ({"a.png": "x", "b/.c.txt": "x", "empty.txt": ""}, "", "holds no text"),
        ({"blank.txt": " \n"}, "blank.txt", r"corpus '.*blank\.txt' holds no text"),
        ({"data.bin": b"\0\1\2"}, "data.bin", r"corpus '.*data\.bin' holds no text"),
    ],
    ids=["no_path", "empty_folder", "folder_without_text", "blank_file", "binary_file"],
)
def test_folders_without_text(tmp_path, read, files, name, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, files) / name)


@pytest.mark.parametrize("read", [load_corpus, corpus_version])
def test_no_name(read):
    """Not the folder that the process happens to be in."""
    with pytest.raises(ValueError, match=r"corpus '' does not exist; give a folder"):
        read("")


@pytest.mark.parametrize("read", [load_corpus, corpus_version])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "link to nothing", "link to itself"])
def test_what_is_no_file_is_refused(tmp_path, texts, read, alone, kind):
    """At once, and not when somebody writes to the pipe."""
    place = write(tmp_path / "c", texts) / "b.txt"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        if not alone:
            pytest.skip("a link out of the folder")
        place.symlink_to("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(place))
    else:
        place.symlink_to(place if kind.endswith("itself") else tmp_path / "c" / "nothing")
    said = rf"corpus '.*' cannot be read: .*{place.name}"
    with pytest.raises(ValueError, match=said) as caught:
        read(place if alone else tmp_path / "c")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_that_leave_the_folder_are_refused(tmp_path, texts, kind):
    """Those within it are what they lead to: files are read, folders are there already."""
    secret = write(tmp_path / "secret", {"key.txt": "mine"})
    folder = write(tmp_path / "corpus", texts)
    (folder / "again.txt").symlink_to(folder / sorted(texts)[0])
    (folder / "round").symlink_to(folder)
    assert set(documents(load_corpus(folder))[0]) == {*texts, "again.txt"}
    (folder / "link.txt").symlink_to(secret / "key.txt" if kind == "file" else secret)
    with pytest.raises(
        ValueError, match="link.txt is a link to .*, outside of the folder; put there what it leads to"
    ):
        load_corpus(folder)


@pytest.mark.parametrize("part", ["folder", "file"])
def test_what_cannot_be_read_is_not_left_out(tmp_path, texts, monkeypatch, part):
    folder = write(tmp_path, texts | {"locked/a.txt": "text"})

    def deny(real, what):
        def act(path, *more, **named):
            if Path(path) == what:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *more, **named)

        return act

    name, what = ("scandir", folder / "locked") if part == "folder" else ("open", folder / "locked" / "a.txt")
    monkeypatch.setattr(os, name, deny(getattr(os, name), what))
    with pytest.raises(ValueError, match=f"corpus '.*' cannot be read: .*Permission denied.*{what.name}"):
        load_corpus(folder)


def test_large_files_with_holes_are_not_read(tmp_path, texts):
    """Ten gigabytes of nothing are binary, as their first block shows; behind a text they are too long."""
    folder = write(tmp_path, texts)
    with open(folder / "hole.txt", "wb") as file:
        file.truncate(10 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert set(documents(load_corpus(folder))[0]) == set(texts)
    (folder / "hole.txt").unlink()
    with open(folder / "book.txt", "wb") as file:
        file.write(b"Call me Ishmael. " * 2**17)
        file.truncate(10 * 2**30)
    with pytest.raises(ValueError, match="book.txt has 10,737,418,240 bytes; a document has .* at most, so cut it up"):
        load_corpus(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_folders_of_any_depth(tmp_path, texts):
    """More levels than Python calls itself in."""
    folder = write(tmp_path, texts)
    deep = [folder / "d"]
    for _ in range(1200):
        deep.append(deep[-1] / "d")
    try:
        for level in deep:
            level.mkdir()
        (deep[-1] / "a.txt").write_text("deep")
        assert any(path.endswith("d/a.txt") for path in documents(load_corpus(folder))[0])
    finally:  # pytest's own cleaning calls itself in every level
        (deep[-1] / "a.txt").unlink(missing_ok=True)
        for level in reversed(deep):
            level.rmdir()


@pytest.mark.parametrize("read", [load_corpus, corpus_version])
@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "/dev/zero", "/dev/full", "/proc/1/mem"]
)
def test_names_of_no_folder(read, name):
    with pytest.raises(ValueError, match="corpus '.*' (cannot be read|does not exist|holds no text)"):
        read(name)


@pytest.mark.parametrize("files", [{"a.txt": "x"}, {"train/a.txt": "x", "test/a.txt": "y"}])
def test_too_little_text_to_split(tmp_path, files):
    number = len(files)
    with pytest.raises(ValueError, match=rf"too little text, {number} characters in {number} file.*; add text"):
        load_corpus(write(tmp_path, files))


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6))
@settings(max_examples=15)
def test_no_document_is_ever_empty(tmp_path_factory, lengths):
    folder = write(tmp_path_factory.mktemp("corpus"), {f"{i}.txt": "ab " * n for i, n in enumerate(lengths)})
    try:
        corpus = load_corpus(folder)
    except ValueError as error:
        assert "too little text" in str(error)
        assert max(lengths) < 7  # 21 characters: one of them is the last 5 %
        return
    assert all(len(rows) and all(text.strip() for text in rows["text"]) for rows in corpus.values())


def test_version_of_a_corpus(tmp_path):
    folder = write(tmp_path / "corpus", {"a.txt": "one", "b.txt": "two"})
    before = corpus_version(folder)
    assert before == corpus_version(str(folder)) and before.startswith(f"{folder}, ")
    write(folder, {"note.png": "no part of it"})
    assert corpus_version(folder) == before
    versions = {before}
    for change in ({"a.txt": "onf"}, {"a.txt": "onet", "b.txt": "wo"}, {"c.txt": "three"}):
        versions.add(corpus_version(write(folder, change)))
    (folder / "c.txt").rename(folder / "d.txt")
    versions.add(corpus_version(folder))
    assert len(versions) == 5  # each change shows
    one, two = write(tmp_path / "1", {"a.txt": "xb.txty"}), write(tmp_path / "2", {"a.txt": "x", "b.txt": "y"})
    assert corpus_version(one).removeprefix(str(one)) != corpus_version(two).removeprefix(str(two))
    assert corpus_version("stdlib") == "stdlib of Python {}.{}.{}".format(*sys.version_info[:3])
    assert corpus_version("hf:name:config") == "hf:name:config"


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub: keep {split: rows} in it, and read what it was asked for."""
    from hf_gallery.data import corpus

    calls, kept = [], {}

    def load(*arguments, **named):
        calls.append((arguments, named))
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in kept.items()})

    monkeypatch.setattr(corpus, "load_dataset", load)
    return calls, kept


def rows(split, number):
    return [{"text": f"{split} {i}", "other": i} for i in range(number)]


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("hf:wikitext", ("wikitext", None)),
        ("hf:owner/name", ("owner/name", None)),
        ("hf:owner/name:wikitext-2-raw-v1", ("owner/name", "wikitext-2-raw-v1")),
    ],
)
def test_name_and_config_reach_the_hub(hub, name, asked):
    calls, kept = hub
    kept.update({split: rows(split, 3) for split in (*SPLITS, "unsupervised")})
    corpus = load_corpus(name)
    assert calls == [(asked, {})]
    assert {split: corpus[split].to_list() for split in corpus} == {
        split: [{"text": f"{split} {i}", "document": f"{split}/{i}"} for i in range(3)] for split in SPLITS
    }


def test_pg19_by_name(hub):
    calls, kept = hub
    kept.update({split: rows(split, 2) for split in SPLITS})
    corpus = load_corpus("pg19")
    assert calls == [(("emozilla/pg19", None), {})] and corpus_version("pg19") == "pg19"
    assert corpus["test"].to_list() == [{"text": f"test {i}", "document": f"test/{i}"} for i in range(2)]


def test_wikitext_is_joined_to_articles(hub):
    lines = ["", " = First = \n", "", " Text of it . \n", " = = A section = = \n", " x = y = z \n"]
    lines += [" = Second : a = b = \n", " More . \n"]
    hub[1].update({split: [{"text": line} for line in lines] for split in SPLITS})
    corpus = load_corpus("wikitext-103")
    assert hub[0] == [(("Salesforce/wikitext", "wikitext-103-raw-v1"), {})]
    articles = ["".join(lines[1:6]), "".join(lines[6:])]
    assert corpus["validation"]["text"][:] == articles
    assert corpus["train"]["document"][:] == ["train/0", "train/1"]


def test_enwik8_is_split_as_the_field_does(hub):
    whole = "0123456789" * 9 + "äbcde" + "fghi"  # 100 bytes; the cut at 95 goes through nothing
    hub[1].update({"train": [{"text": whole}]})
    corpus = load_corpus("enwik8")
    assert hub[0] == [(("LTCB/enwik8", "enwik8-raw"), {"revision": "refs/convert/parquet"})]
    assert [corpus[split]["text"][:] for split in SPLITS] == [["0123456789" * 9], ["äbcd"], ["efghi"]]
    hub[1]["train"] = [{"text": "0" * 89 + "ä" + "123456789"}]  # the first cut goes through a character
    assert [load_corpus("enwik8")[split]["text"][0] for split in SPLITS] == ["0" * 89, "1234", "56789"]


def test_a_corpus_by_name_without_a_network(monkeypatch):
    from hf_gallery.data import corpus

    def load(*arguments, **named):
        raise ConnectionError("no network")

    monkeypatch.setattr(corpus, "load_dataset", load)
    with pytest.raises(
        ValueError, match="corpus 'enwik8' cannot be loaded: no network; check its name and the network"
    ):
        load_corpus("enwik8")


@pytest.mark.parametrize("present", [("train", "test"), ("train", "validation"), ("train",)], ids="-".join)
def test_splits_that_the_hub_lacks_are_taken_from_train(hub, present):
    hub[1].update({split: rows(split, 100) for split in present})
    first, second = load_corpus("hf:name"), load_corpus("hf:name")
    for split in SPLITS:
        assert first[split].to_list() == second[split].to_list()
        if split in present[1:]:
            assert first[split]["text"][:] == [f"{split} {i}" for i in range(100)]
        elif split != "train":
            assert 3 <= len(first[split]) <= 6
    taken = [text for split in SPLITS if split not in present[1:] for text in first[split]["text"]]
    assert sorted(taken) == sorted(f"train {i}" for i in range(100))


def test_dataset_without_text(hub):
    hub[1].update(train=[{"content": "a", "id": 1}])
    with pytest.raises(
        ValueError, match=r"corpus 'hf:name' has the columns \['content', 'id'\] in train; one must be 'text'"
    ):
        load_corpus("hf:name")


def test_dataset_without_a_train_split(hub):
    hub[1].update(test=rows("test", 3))
    with pytest.raises(ValueError, match=r"corpus 'hf:name' has the splits \['test'\]; 'train' must be one"):
        load_corpus("hf:name")


def test_hub_without_a_network():
    with pytest.raises(
        ValueError, match=r"corpus 'hf:owner/name' cannot be loaded: .*owner/name.*; check its name and the"
    ):
        load_corpus("hf:owner/name")


@pytest.mark.parametrize("name", ["hf:", "hf::config"])
def test_hub_without_a_name(name):
    with pytest.raises(ValueError, match=rf"corpus '{name}' names no dataset; write hf:NAME or hf:NAME:CONFIG"):
        load_corpus(name)


def test_a_dataset_on_disk_through_the_hubs_own_loader(tmp_path):
    for split in SPLITS:
        lines = [json.dumps({"text": f"{split} {i}"}) + "\n" for i in range(3)]
        write(tmp_path, {f"{split}.jsonl": "".join(lines)})
    corpus = load_corpus(f"hf:{tmp_path}")
    assert {split: corpus[split]["text"][:] for split in SPLITS} == {s: [f"{s} {i}" for i in range(3)] for s in SPLITS}
    with pytest.raises(ValueError, match=r"cannot be loaded: .*'nothing'"):
        load_corpus(f"hf:{tmp_path}:nothing")


# --------------------------------------------------------------------------------------------------------------- tasks
# Each task has a reader: from the ids before a column alone, it says which answer belongs there and how many tokens
# ago it was shown. It knows the task's rule, and nothing of how examples are drawn.


def read_pair(ids, column):
    """The key stands before the answer, and stood once before, followed by the same value."""
    asked, before = ids[column - 1], ids[: column - 1]
    assert asked in KEYS and before.count(asked) == 1
    shown = before.index(asked) + 1
    return ids[shown], column - shown


def read_slot(ids, column):
    """The last token asks for a slot, and one token before has set it."""
    slot = READS.tolist().index(ids[column - 1])
    sets = WRITES[slot * SLOT_VALUES : (slot + 1) * SLOT_VALUES].tolist()
    (written,) = (i for i, token in enumerate(ids[: column - 1]) if token in sets)
    return ANSWERS[sets.index(ids[written])], column - 1 - written


def read_number(ids, column):
    """The digit of the number that the text names, in the place at which its repetition stands."""
    text = bytes(ids[:column]).decode("ascii")
    (number,) = re.finditer(r" The pass key is:(\d+)\.", text)
    place = column - (text.rindex(" is:") + 4)
    assert text[:column].endswith(" What is the pass key? The pass key is:" + number[1][:place])
    return ord(number[1][place]), column - (number.start(1) + place)


TASKS = {
    "associative_recall": (associative_recall, read_pair, {"examples": 40, "length": 120, "distances": [2, 17, 60]}),
    "slot_recall": (slot_recall, read_slot, {"examples": 40, "length": 120, "distances": [1, 17, 60], "num_reads": 2}),
    "passkey": (passkey, read_number, {"examples": 40, "length": 300, "distances": [45, 90, 250]}),
}
over_tasks = pytest.mark.parametrize("name", TASKS)


def columns(data):
    data = data.with_format("numpy")
    return data["input_ids"][:], data["labels"][:], data["distance"][:]


def check(name, data, distances):
    """All scored columns hold what the reader reads, at a distance that was asked for."""
    reader = TASKS[name][1]
    ids, labels, distance = columns(data)
    assert ids.shape == labels.shape == distance.shape
    assert ids.min() >= 0 and ids.max() < 256
    np.testing.assert_array_equal(labels != -100, distance != -1)
    for row, column in zip(*np.nonzero(labels != -100), strict=True):
        answer, apart = reader(ids[row].tolist(), column)
        assert (labels[row, column], distance[row, column]) == (answer, apart)
        assert apart in distances
    return ids, labels, distance


@over_tasks
def test_answers_stand_where_the_labels_say(name):
    make, _, arguments = TASKS[name]
    data = make(**arguments)
    assert data.column_names == ["input_ids", "labels", "distance"]
    assert len(data) == 40 and all(len(row[column]) == arguments["length"] for row in data for column in row)
    ids, labels, distance = check(name, data, arguments["distances"])
    assert set(distance[distance >= 0]) == set(arguments["distances"])  # each of them is drawn
    scored = labels >= 0
    assert scored.any(axis=1).all()
    if name == "slot_recall":  # or one read would answer the next
        assert not np.isin(ids, ANSWERS).any()
    else:
        np.testing.assert_array_equal(labels[scored], ids[scored])


@given(data=st.data())
def test_associative_recall_of_any_size(data):
    length = data.draw(st.integers(4, 60))
    distances = data.draw(st.lists(st.integers(2, length - 2), min_size=1, max_size=4))
    pairs, values = data.draw(st.integers(1, 20)), data.draw(st.integers(2, 64))
    made = associative_recall(
        5, length, distances=distances, num_pairs=pairs, num_values=values, seed=data.draw(st.integers(0, 2**40))
    )
    ids, labels, _ = check("associative_recall", made, distances)
    used = labels[labels >= 0]
    assert ((VALUES.start <= used) & (used < VALUES.start + values)).all()
    assert (labels >= 0).sum(1).max() <= pairs
    pairs_of_tokens = (labels >= 0).sum(1) * 4  # nothing but pairs, twice each, and filler
    np.testing.assert_array_equal(np.isin(ids, FILLER).sum(1), length - pairs_of_tokens)


@given(data=st.data())
def test_slot_recall_of_any_size(data):
    length = data.draw(st.integers(3, 60))
    distances = data.draw(st.lists(st.integers(1, length - 2), min_size=1, max_size=4))
    writes, reads, values = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5)), data.draw(st.integers(2, 8))
    made = slot_recall(
        5,
        length,
        distances=distances,
        num_writes=writes,
        num_reads=reads,
        num_values=values,
        seed=data.draw(st.integers(0, 2**40)),
    )
    ids, labels, _ = check("slot_recall", made, distances)
    assert np.isin(labels[labels >= 0], ANSWERS[:values]).all()
    assert (np.isin(ids, WRITES).sum(1) <= writes).all()
    np.testing.assert_array_equal(np.isin(ids, READS).sum(1), (labels >= 0).sum(1))  # no question is left unscored
    assert np.isin(ids, np.concatenate([WRITES, READS, NOISE])).all()


@given(data=st.data())
def test_passkey_of_any_size(data):
    digits = data.draw(st.integers(1, 18))
    length = data.draw(st.integers(57 + 2 * digits, 400))
    distances = data.draw(st.lists(st.integers(40 + digits, length - digits - 17), min_size=1, max_size=4))
    made = passkey(5, length, distances=distances, digits=digits, seed=data.draw(st.integers(0, 2**40)))
    ids, labels, distance = check("passkey", made, distances)
    np.testing.assert_array_equal(labels[:, :-digits], -100)
    assert (labels[:, -digits:] == ids[:, -digits:]).all() and (distance[:, -digits:] == distance[:, -1:]).all()


@over_tasks
def test_same_seed_same_data(name):
    make, _, arguments = TASKS[name]
    data = make(**arguments, seed=3, split="test").to_list()
    assert make(**arguments, seed=3, split="test").to_list() == data
    assert make(**arguments | {"distances": arguments["distances"][::-1] * 2}, seed=3, split="test").to_list() == data


@over_tasks
def test_seeds_and_splits_share_no_example(name):
    make, _, arguments = TASKS[name]
    made = [make(**arguments, seed=seed, split=split) for seed in (0, 1, 2) for split in SPLITS]
    examples = [tuple(row) for data in made for row in data["input_ids"]]
    assert len(set(examples)) == len(examples) == 9 * 40
    labels = [tuple(map(tuple, data["labels"])) for data in made]
    assert len(set(labels)) == 9


MAKE = """
import json, sys
from hf_gallery import data
print(json.dumps([getattr(data, name)(**arguments).to_list() for name, arguments in json.loads(sys.argv[1])]))
"""


@pytest.mark.slow
def test_tasks_are_the_same_in_every_process():
    calls = [
        (name, arguments | {"examples": 4, "seed": 5, "split": "validation"})
        for name, (_, _, arguments) in TASKS.items()
    ]
    here = [TASKS[name][0](**arguments).to_list() for name, arguments in calls]
    assert elsewhere(MAKE, json.dumps(calls)) == here


@pytest.mark.parametrize("num_values", [2, 5])
def test_answers_are_drawn_evenly(num_values):
    """Chance is 1 / num_values: no value is more frequent than chance allows, and none tells another's place."""
    for make, distances in ((associative_recall, [9]), (slot_recall, [9])):
        _, labels, _ = columns(make(2000, 60, distances=distances, num_values=num_values))
        _, counts = np.unique(labels[labels >= 0], return_counts=True)
        expected = counts.sum() / num_values
        assert len(counts) == num_values
        assert np.abs(counts - expected).max() < 5 * expected**0.5
    _, labels, _ = columns(passkey(500, 120, distances=[50]))
    _, counts = np.unique(labels[labels >= 0], return_counts=True)
    assert len(counts) == 10 and np.abs(counts - 250).max() < 5 * 250**0.5


@pytest.mark.parametrize("make", [associative_recall, slot_recall])
def test_questions_stand_anywhere(make):
    """Nothing tells from the column alone whether a question comes: all that leave room for the distance have some."""
    _, labels, _ = columns(make(500, 9, distances=[3]))
    assert set(np.nonzero(labels >= 0)[1]) == set(range(4, 9))


@pytest.mark.parametrize(("make", "alone"), [(associative_recall, "num_pairs"), (slot_recall, "num_writes")])
def test_one_question_alone_always_finds_room(make, alone):
    _, labels, _ = columns(make(200, 9, distances=[6], **{alone: 1}))
    assert ((labels >= 0).sum(axis=1) == 1).all()


def test_distances_are_drawn_evenly():
    _, _, distance = columns(passkey(3000, 300, distances=[50, 100, 200]))
    _, counts = np.unique(distance[:, -1], return_counts=True)
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    _, _, distance = columns(associative_recall(3000, 300, distances=[2, 100, 200], num_pairs=1))
    _, counts = np.unique(distance[distance >= 0], return_counts=True)
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        *((name, {"examples": 0}, r"examples is 0; it must be a whole number of at least 1") for name in TASKS),
        *((name, {"length": 0}, r"length is 0|distances are .*with length 0") for name in TASKS),
        *((name, {"seed": -1}, r"seed is -1; it must be a whole number of at least 0") for name in TASKS),
        *((name, {"seed": 1.5}, r"seed is 1\.5; it must be a whole number") for name in TASKS),
        *((name, {"split": "dev"}, r"split is 'dev'; it must be one of train, validation, test") for name in TASKS),
        *((name, {"distances": []}, r"distances are \[\]; .*whole numbers from \d+ to \d+") for name in TASKS),
        *((name, {"distances": 17}, r"distances is 17; give a list of distances, \[17\]") for name in TASKS),
        *((name, {"distances": [60.0]}, r"distances are \[60\.0\]; .*whole numbers") for name in TASKS),
        ("associative_recall", {"distances": [1, 9]}, r"distances are \[1, 9\]; .*length 120.* from 2 to 118"),
        ("associative_recall", {"distances": [9, 119]}, r"distances are \[9, 119\]; .*length 120.* from 2 to 118"),
        ("associative_recall", {"length": 3}, r"distances are \[2, 17, 60\]; .*length 3.* longer examples"),
        ("associative_recall", {"num_pairs": 0}, r"num_pairs is 0; .* at least 1 and at most 64"),
        ("associative_recall", {"num_pairs": 65}, r"num_pairs is 65; .* at least 1 and at most 64"),
        ("associative_recall", {"num_values": 1}, r"num_values is 1; .* at least 2 and at most 64"),
        ("associative_recall", {"num_values": 65}, r"num_values is 65; .* at least 2 and at most 64"),
        ("slot_recall", {"distances": [0, 9]}, r"distances are \[0, 9\]; .*length 120.* from 1 to 118"),
        ("slot_recall", {"distances": [9, 119]}, r"distances are \[9, 119\]; .*length 120.* from 1 to 118"),
        ("slot_recall", {"num_writes": 9}, r"num_writes is 9; .* at least 1 and at most 8"),
        ("slot_recall", {"num_reads": 0}, r"num_reads is 0; .* at least 1"),
        ("slot_recall", {"num_values": 9}, r"num_values is 9; .* at least 2 and at most 8"),
        ("passkey", {"distances": [44]}, r"distances are \[44\]; with length 300 and 5 digits .* from 45 to 278"),
        ("passkey", {"distances": [279]}, r"distances are \[279\]; with length 300 and 5 digits .* from 45 to 278"),
        ("passkey", {"digits": 0}, r"digits is 0; .* at least 1 and at most 18"),
        ("passkey", {"digits": 19}, r"digits is 19; .* at least 1 and at most 18"),
        ("passkey", {"length": 50}, r"distances are \[45, 90, 250\]; with length 50 .* longer examples"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(name, changed, message):
    make, _, arguments = TASKS[name]
    with pytest.raises(ValueError, match=message):
        make(**arguments | changed)


@pytest.mark.parametrize(("name", "distances", "length"), [
    ("associative_recall", [2, 118], 120), ("slot_recall", [1, 118], 120), ("passkey", [45, 278], 300),
])  # fmt: skip
def test_the_least_and_the_most_distance(name, distances, length):
    """The limits that the errors name can be had."""
    _, _, distance = check(name, TASKS[name][0](40, length, distances=distances), distances)
    assert set(distance[distance >= 0]) == set(distances)
