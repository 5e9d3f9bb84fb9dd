"""Files of caches from anywhere, arguments of any kind, and who may read what is written."""

import json
import os
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from variants import VARIANTS, runner, streams, words

from hf_gallery import GalleryCache
from hf_gallery.files import write_json, write_text
from hf_gallery.models.files import whole_file

causal_models = streams(of_head=lambda head: head.auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"))


def saved(run, path):
    with torch.no_grad():
        _, cache = run(words(2, 16))
        run(words(2, 1, seed=1), cache=cache)
    cache.save(path)
    return cache


def opened(path):
    """The header of a safetensors file and the bytes behind it."""
    raw = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def closed(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def about(header, **changes):
    """The header with its metadata changed."""
    facts = json.loads(header["__metadata__"]["gallery_cache"]) | changes
    return header | {"__metadata__": {"gallery_cache": json.dumps(facts)}}


DEEP = "[" * 100_000 + "]" * 100_000
METADATA = {
    "sixty million layers": dict(layers=[60_000_000, 0]),
    "layers that are not there": dict(layers=[2, 0]),
    "layers of no kind": dict(layers="three"),
    "negative layers": dict(layers=[-1, 0]),
    "no identity": dict(identity=None),
    "an identity without a model": dict(identity={}),
    "a list for an identity": dict(identity=[1]),
    "columns below 0": dict(columns=-1),
    "columns without end": dict(columns=10**30),
    "fewer columns than tokens": dict(columns=3),
    "columns that are true": dict(columns=True),
    "a fraction of columns": dict(columns=16.5),
    "an odd capacity": dict(capacity="all"),
    "a history longer than the past": dict(history=[1000]),
    "an odd history": dict(history=[None]),
    "an unknown kind": dict(kinds={"keys": "pickle"}),
    "a kind that is no name": dict(kinds={"keys": ["columns"]}),
    "no kinds": dict(kinds={}),
    "weights without names": dict(weights={"names": [], "types": []}),
    "weights of another number": dict(weights={"names": ["a"], "types": ["b"]}),
    "weights of no kind": dict(weights=7),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_from_outside(case, tmp_path):
    saved(runner(VARIANTS[0], "causal"), tmp_path / "book")
    header, data = opened(tmp_path / "book")
    closed(tmp_path / "other", about(header, **METADATA[case]), data)
    with pytest.raises(ValueError, match=r"other is no saved GalleryCache.*cache\.save\(path\)"):
        GalleryCache.load(tmp_path / "other")


def test_headers_from_outside(tmp_path):
    saved(runner(VARIANTS[0], "causal"), tmp_path / "book")
    header, data = opened(tmp_path / "book")
    keys = header["states.0.keys"]
    headers = {
        "no metadata": {k: x for k, x in header.items() if k != "__metadata__"},
        "metadata that is a list": header | {"__metadata__": [1]},
        "metadata that is a number": header | {"__metadata__": {"gallery_cache": 7}},
        "metadata that is no JSON": header | {"__metadata__": {"gallery_cache": "{"}},
        "metadata that is no object": header | {"__metadata__": {"gallery_cache": "3"}},
        "deep metadata": header | {"__metadata__": {"gallery_cache": DEEP}},
        "a deep header": DEEP.encode(),
        "a header that is a list": b"[1]",
        "an odd name": header | {"states.x.keys": keys},
        "a layer far away": header | {"states.99999.keys": keys},
        "a name without a place": header | {"keys": keys},
        "a path for a name": header | {"states.0.../../etc": keys},
        "integers for keys": header | {"states.0.keys": keys | {"dtype": "I32"}},
        "a shape of another batch": header | {"states.0.keys": keys | {"shape": [1, 6, *keys["shape"][2:]]}},
        "no columns": header | {"states.0.keys": keys | {"shape": [2, 3 * keys["shape"][2] * 10]}},
        "a shape below 0": header | {"states.0.keys": keys | {"shape": [2, -3, 4, 10]}},
        "a shape that is no list": header | {"states.0.keys": keys | {"shape": 12}},
        "an entry that is no object": header | {"states.0.keys": 3},
        "rows without a number": header | {"seen": header["seen"] | {"shape": []}},
        "rows of two dimensions": header | {"seen": header["seen"] | {"shape": [1, 2]}},
        "no rows": {k: x for k, x in header.items() if k != "seen"},
    }
    for name, changed in headers.items():
        closed(tmp_path / "other", changed, data)
        with pytest.raises(ValueError, match=r"other is no saved GalleryCache"):
            print(name)
            GalleryCache.load(tmp_path / "other")


def test_bytes_from_outside(tmp_path):
    path = tmp_path / "other"
    saved(runner(VARIANTS[0], "causal"), tmp_path / "book")
    raw = (tmp_path / "book").read_bytes()
    for cut in (0, 1, 7, 8, 9, 200, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="other is no saved GalleryCache"):
            GalleryCache.load(path)
    for size in (2**63, 2**40, len(raw) * 2, 1, 0):
        path.write_bytes(struct.pack("<Q", size) + raw[8:])
        with pytest.raises(ValueError, match="other is no saved GalleryCache"):
            GalleryCache.load(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="no saved GalleryCache"):
            GalleryCache.load(path)
    with pytest.raises(FileNotFoundError):
        GalleryCache.load(tmp_path / "nowhere")


@causal_models
def test_states_that_no_model_left(variant, head, tmp_path):
    """Facts of the configuration are checked when a model takes the cache: names, shapes, types, lengths."""
    run = runner(variant, head)
    saved(run, tmp_path / "book")
    header, data = opened(tmp_path / "book")
    names = [name for name in header if name.startswith(("states.", "rows."))]
    for name in names:
        for change in ("left out", "renamed", "turned", "of integers", "cut"):
            entry = header[name]
            changed = dict(header)
            if change == "left out":
                del changed[name]
            elif change == "renamed":
                changed[name + "_other"] = changed.pop(name)
            elif change == "turned" and len(entry["shape"]) > 2 and len(set(entry["shape"][1:])) > 1:
                changed[name] = entry | {"shape": [entry["shape"][0], *entry["shape"][:0:-1]]}
            elif change == "of integers" and entry["dtype"] != "I64":
                changed[name] = entry | {"dtype": "I32"}
            elif change == "cut" and len(entry["shape"]) > 2:
                start, end = entry["data_offsets"]
                shape = [*entry["shape"][:-2], 0, entry["shape"][-1]]
                changed[name] = entry | {"shape": shape, "data_offsets": [start, start]}
            else:
                continue
            closed(tmp_path / "other", changed, data)
            try:
                loaded = GalleryCache.load(tmp_path / "other")
            except ValueError as error:
                assert "other is no saved GalleryCache" in str(error)
                continue
            with pytest.raises(ValueError, match="past_key_values"):
                run(words(2, 3, seed=2), cache=loaded)


def test_tensors_that_are_saved_by_hand(tmp_path):
    save_file({"seen": torch.zeros(0, dtype=torch.long)}, tmp_path / "other", {"gallery_cache": "{}"})
    with pytest.raises(ValueError, match="no saved GalleryCache"):
        GalleryCache.load(tmp_path / "other")


# ---- arguments

WRONG = [
    ("batch_select_indices", torch.tensor([0, 2]), ValueError, r"indices.*rows 0 to 1"),
    ("batch_select_indices", torch.tensor([-3]), ValueError, r"indices.*rows 0 to 1"),
    ("batch_select_indices", [0, 7], ValueError, r"indices.*rows 0 to 1"),
    ("batch_select_indices", torch.tensor([True]), ValueError, r"indices is a mask of shape \(1,\).*2 rows"),
    ("batch_select_indices", torch.tensor([True, False, True]), ValueError, r"indices is a mask"),
    ("batch_select_indices", torch.tensor([False, False]), ValueError, r"indices names no row.*reset"),
    ("batch_select_indices", torch.tensor([0.0]), TypeError, r"indices has type"),
    ("batch_select_indices", torch.tensor([[0]]), ValueError, r"indices has shape"),
    ("batch_select_indices", None, TypeError, r"indices is None"),
    ("batch_select_indices", "ab", TypeError, r"indices is 'ab'"),
    ("reorder_cache", torch.tensor([5]), ValueError, r"beam_idx"),
    ("reorder_cache", None, TypeError, r"beam_idx"),
    ("reset_rows", None, TypeError, r"rows is None"),
    ("reset_rows", torch.tensor([[0, 1]]), ValueError, r"rows has shape \(1, 2\)"),
    ("reset_rows", [[True, False]], ValueError, r"rows has shape"),
    ("reset_rows", [0.5], TypeError, r"rows has type"),
    ("reset_rows", [2], ValueError, r"rows are \[2\]"),
    ("reset_rows", 1, TypeError, r"rows is 1"),
    ("reset_rows", {"a": 1}, TypeError, r"rows is"),
    ("reset_rows", [None], TypeError, r"rows is"),
    ("reset_rows", [[0], [1, 0]], TypeError, r"rows is"),
    ("batch_repeat_interleave", 0, ValueError, r"repeats is 0"),
    ("batch_repeat_interleave", -1, ValueError, r"repeats is -1"),
    ("batch_repeat_interleave", 1.5, TypeError, r"repeats is 1.5"),
    ("batch_repeat_interleave", None, TypeError, r"repeats is None"),
    ("batch_repeat_interleave", True, TypeError, r"repeats is True"),
    ("crop", 1.0, TypeError, r"tokens_to_remove is 1.0"),
    ("crop", None, TypeError, r"tokens_to_remove is None"),
    ("crop", True, TypeError, r"tokens_to_remove is True"),
    ("crop", torch.tensor([1, 2]), TypeError, r"tokens_to_remove is tensor"),
    ("crop", torch.tensor(-1.0), TypeError, r"tokens_to_remove is tensor"),
    ("crop", 2, ValueError, r"tokens_to_remove is 2.*crop\(-2\)"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: f"{case[0]}-{case[1]}")
@streams(lambda v: v.name in ("transformer", "transformer_xl", "memorizing"), lambda h: not h.source)
def test_arguments_that_do_not_fit(variant, head, case):
    """An error names the argument, and nothing has changed."""
    name, value, kind, message = case
    run = runner(variant, head)
    with torch.no_grad():
        _, cache = run(words(2, 11))
        content = cache._content
        with pytest.raises(kind, match=message):
            getattr(cache, name)(value)
        assert cache._content is content


def test_arguments_that_fit():
    run = runner(VARIANTS[0], "causal")
    with torch.no_grad():
        _, cache = run(words(3, 11))
    for one in ([0, 2], (0, 2), np.array([0, 2]), torch.tensor([0, 2], dtype=torch.int32), [True, False, True]):
        other = cache.copy()
        other.batch_select_indices(one)
        assert other.batch_size == 2 and torch.equal(other.states[0]["keys"], cache.states[0]["keys"][[0, 2]])
    cache.reset_rows([])
    cache.crop(np.int64(-1))
    cache.batch_repeat_interleave(np.int64(2))
    assert cache.get_seq_length() == 10 and cache.batch_size == 6


# ---- who may read


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_are_for_whom_the_umask_says(umask, tmp_path):
    with torch.no_grad():
        _, cache = runner(VARIANTS[0], "causal")(words(2, 3))
    before = os.umask(umask)
    try:
        cache.save(tmp_path / "cache")
        write_text(tmp_path / "text", "text")
        write_json(tmp_path / "json", {})
        with whole_file(tmp_path / "bytes") as beside:
            beside.write_bytes(b"bytes")
    finally:
        os.umask(before)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_is_there_keeps_its_readers_and_a_link_its_place(tmp_path):
    """As where a file is opened and written: nobody may read what was private, and a link leads to the new content."""
    book, shelf = tmp_path / "book", tmp_path / "shelf"
    shelf.mkdir()
    saved(runner(VARIANTS[0], "causal"), shelf / "book")
    size = (shelf / "book").stat().st_size
    (shelf / "book").chmod(0o600)
    book.symlink_to(shelf / "book")
    (shelf / "book").write_text("old")
    saved(runner(VARIANTS[0], "causal"), book)
    assert book.is_symlink() and (shelf / "book").stat().st_size == size
    assert (shelf / "book").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in shelf.iterdir()) == ["book"]
    saved(runner(VARIANTS[0], "causal"), shelf / ("x" * 250))  # the longest name has 255 letters


def test_nobody_else_writes_by_hand():
    """Files are put in their place by one writer: no other module moves one over another."""
    root = Path(__file__).parents[2]
    movers = {
        str(path.relative_to(root))
        for folder in ("hf_gallery", "eval")
        for path in (root / folder).rglob("*.py")
        if "os.replace(" in path.read_text(encoding="utf-8") or "mkstemp" in path.read_text(encoding="utf-8")
    }
    # Whole folders, and not files, are moved by the conversion.
    assert movers <= {"hf_gallery/models/files.py", "hf_gallery/convert/__init__.py"}
