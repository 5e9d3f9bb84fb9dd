"""The file of a saved cache: safetensors, with what is no tensor as JSON in its metadata.

    seen                          rows.NAME          facts of each row
    states.LAYER.NAME             history.NUMBER     masks of the newest columns
    weights                       a sample of the weights of the model that made it

Files come from anywhere. So the header is read and checked before any tensor is, and everything in it is a ValueError
or as `save` writes it; what only the model's configuration knows is checked when a model takes the cache.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import stat
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .files import whole_file
from .states import KINDS, Columns, Fixed, Folded, Kept, Places
from .weights import NUMBERS, WeightSample

logger = logging.getLogger(__name__)

# Kinds of what versions before this one saved, which did not write them down.
EARLIER_KINDS: dict[str, type[Kept]] = {
    "keys": Columns,
    "values": Columns,
    "hidden": Columns,
    "cross_keys": Fixed,
    "cross_values": Fixed,
    "global_keys": Fixed,
    "global_values": Fixed,
    "memory_keys": Folded,
    "memory_values": Folded,
    "state": Folded,
    "source_length": Fixed,
    "global_positions": Places,
}
EARLIER_DERIVED = {"state_keys", "state_values"}  # and all of `shared`: made anew

_LONGEST_HEADER = 2**24  # bytes; a cache of a thousand layers needs a tenth
_MOST = 2**40  # columns or rows that anybody could have read
_FLOATS = ("F64", "F32", "F16", "BF16")


def write_cache_file(path: str | os.PathLike, identity: dict, capacity: int | None, content):
    """Writes a cache's Content, without derived state, all or nothing."""
    tensors = {} if content.seen is None else {"seen": content.seen}
    kinds: dict[str, str] = {}
    named = {f"rows.{name}": kept for name, kept in content.facts.items()}
    for i, state in enumerate(content.states):
        named |= {f"states.{i}.{name}": kept for name, kept in state.items()}
    for name, kept in named.items():
        tensors[name], kinds[name.rsplit(".", 1)[-1]] = kept.tensor, kept.kind
    tensors |= {f"history.{i}": mask for i, (_, mask) in enumerate(content.history) if mask is not None}
    about: dict[str, Any] = {
        "identity": identity,
        "capacity": capacity,
        "columns": content.columns,
        "layers": [len(content.states), 0],
        "history": [n for n, _ in content.history],
        "kinds": kinds,
    }
    if content.sample is not None:
        tensors["weights"] = content.sample.numbers
        about["weights"] = {"names": content.sample.names, "types": content.sample.types}
    with whole_file(path) as beside:
        save_file({k: x.contiguous() for k, x in tensors.items()}, beside, {"gallery_cache": json.dumps(about)})


def read_cache_file(path: str | os.PathLike, device: str | torch.device = "cpu"):
    """(identity, capacity, fields of Content) of a saved cache. Raises ValueError if the file is not one."""
    header = CacheHeader(os.fspath(path))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return header.identity, header.capacity, header.fields(file.get_tensor)
    except SafetensorError as error:
        raise header.wrong(str(error)) from error


class CacheHeader:
    """Header of a cache's file: checked to be whole and of one piece, before tensors are read."""

    def __init__(self, path: str):
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        about = self._about(self._read())
        self.identity: dict[str, Any] = self._is("identity", about, dict)
        self.capacity: int | None = None if about.get("capacity") is None else self._count("capacity", about)
        self.columns = self._count("columns", about)
        self.history: list[int] = self._counts("history", about)
        self.kinds = self._kinds(about)
        self.layers = (self._counts("layers", about) or [0])[0]
        self.weights = self._weights(about)
        if not isinstance(self.identity.get("model_type"), str):
            raise self.wrong("its identity names no model")
        self._check_names()

    def wrong(self, why: str) -> ValueError:
        return ValueError(f"{self.path} is no saved GalleryCache; write one with cache.save(path) ({why})")

    # ---- reading

    def _read(self) -> dict[str, Any]:
        """The safetensors header: its length in 8 bytes, then JSON."""
        found = os.stat(self.path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would keep the reader waiting for ever
            raise self.wrong("it is no regular file")
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if found.st_size < 8 or not 2 <= length <= min(found.st_size - 8, _LONGEST_HEADER):
                raise self.wrong("it is no safetensors file")
            return self._json(file.read(length), "header")

    def _json(self, text: bytes | str, name: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.wrong(f"its {name} is no JSON: {type(error).__name__}") from error
        if not isinstance(value, dict):
            raise self.wrong(f"its {name} is no JSON object")
        return value

    def _about(self, header: dict[str, Any]) -> dict[str, Any]:
        metadata = header.pop("__metadata__", {})
        about = metadata.get("gallery_cache") if isinstance(metadata, dict) else None
        if not isinstance(about, str):
            raise self.wrong("it holds no cache")
        for name, entry in header.items():
            shape, kind = (entry.get(x) if isinstance(entry, dict) else None for x in ("shape", "dtype"))
            if not isinstance(shape, list) or not all(_is_count(n) for n in shape) or not isinstance(kind, str):
                raise self.wrong(f"tensor {name[:80]!r} has no shape or no type")
            self.shapes[name], self.types[name] = tuple(shape), kind
        return self._json(about, "metadata")

    # ---- parts of the metadata

    def _is(self, name: str, about: dict, kind: type) -> Any:
        if not isinstance(about.get(name), kind):
            raise self.wrong(f"its {name} is no {kind.__name__}")
        return about[name]

    def _count(self, name: str, about: dict) -> int:
        if not _is_count(about.get(name)):
            raise self.wrong(f"its {name} is no count")
        return about[name]

    def _counts(self, name: str, about: dict) -> list[int]:
        if not all(_is_count(n) for n in self._is(name, about, list)):
            raise self.wrong(f"its {name} holds what is no count")
        return about[name]

    def _kinds(self, about: dict) -> dict[str, type[Kept]]:
        if "kinds" not in about:
            return EARLIER_KINDS
        kinds = self._is("kinds", about, dict)
        for name, kind in kinds.items():
            if not isinstance(kind, str) or kind not in KINDS:
                raise self.wrong(f"{name[:80]!r} is of an unknown kind")
        return {name: KINDS[kind] for name, kind in kinds.items()}

    def _weights(self, about: dict) -> tuple[list[str], list[str]] | None:
        if "weights" not in about:
            logger.warning(
                "%s does not say which weights made it, so nobody can tell whether they are the model's", self.path
            )
            return None
        weights = self._is("weights", about, dict)
        names, types = (self._is(name, weights, list) for name in ("names", "types"))
        if not all(isinstance(x, str) for x in (*names, *types)) or len(names) != len(types):
            raise self.wrong("its weights have no names")
        return names, types

    # ---- names, shapes and types of the tensors

    def _check_names(self):
        """Every tensor belongs somewhere, and has the rows of all."""
        self.places: dict[tuple[str, ...], str] = {}
        rows = self.shapes.get("seen", (0,))
        if len(rows) != 1:
            raise self.wrong(f"seen has shape {rows}")
        for name, shape in self.shapes.items():
            place = _PLACE.fullmatch(name)
            if place is None:
                raise self.wrong(f"tensor {name[:80]!r} belongs to no cache")
            if name.startswith("shared.") or name.rsplit(".", 1)[-1] in EARLIER_DERIVED:
                continue
            parts = tuple(name.split(".", 2))
            self.places[parts] = name
            wanted = {"seen": ("I64",), "rows": ("I64",), "history": ("BOOL",), "weights": ("F32",)}
            if self.types[name] not in wanted.get(parts[0], _FLOATS):
                raise self.wrong(f"tensor {name!r} is of type {self.types[name][:20]}")
            if parts[0] != "weights" and (not shape or shape[0] != rows[0]):
                raise self.wrong(f"tensor {name!r} has shape {shape}, where there are {rows[0]} rows")
            if parts[0] in ("rows", "states") and self._kind(parts) is Columns and len(shape) < 3:
                raise self.wrong(f"tensor {name!r} has shape {shape}, without columns")
        if ("seen" in self.shapes) != bool(rows[0]) or math.prod(rows) > _MOST:
            raise self.wrong(f"seen has shape {rows}")
        layers = {int(parts[1]) for parts in self.places if parts[0] == "states"}
        if layers != set(range(len(layers))) or self.layers != len(layers) or bool(layers) != bool(rows[0]):
            raise self.wrong(f"it says {self.layers} layers, and holds {len(layers)}")
        masks = {int(parts[1]): self.shapes[name] for parts, name in self.places.items() if parts[0] == "history"}
        fits = all(i < len(self.history) and shape == (rows[0], self.history[i]) for i, shape in masks.items())
        if not fits or sum(self.history) > self.columns or self.columns > _MOST or 0 in self.history:
            raise self.wrong("its history is of other columns than its own")
        sample = None if self.weights is None else (len(self.weights[0]), NUMBERS)
        if self.shapes.get("weights") != sample:
            raise self.wrong("its sample of weights has no numbers, or no names")

    def _kind(self, parts: tuple[str, ...]) -> type[Kept]:
        kind = self.kinds.get(parts[-1])
        if kind is None:
            raise self.wrong(f"tensor {'.'.join(parts)[:80]!r} is of no known kind")
        return kind

    def fields(self, tensor) -> dict[str, Any]:
        """The fields of Content. tensor: a tensor by its name."""
        states: list[dict[str, Kept]] = [{} for _ in range(self.layers)]
        facts, masks, seen, sample = {}, {}, None, None
        for parts, name in self.places.items():
            x = tensor(name)
            if parts[0] == "seen":
                seen = x.cpu()
                if int(seen.min()) < 0 or int(seen.max()) > self.columns:
                    raise self.wrong("its rows have seen other tokens than its columns")
            elif parts[0] == "rows":
                facts[parts[1]] = self._kind(parts)(x.cpu())
            elif parts[0] == "history":
                masks[int(parts[1])] = x.cpu()
            elif parts[0] == "weights":
                names, types = self.weights
                sample = WeightSample(names, types, x.cpu())
            else:
                states[int(parts[1])][parts[2]] = self._kind(parts)(x)
        return {
            "states": tuple(states),
            "seen": seen,
            "facts": facts,
            "columns": self.columns,
            "history": tuple((n, masks.get(i)) for i, n in enumerate(self.history)),
            "sample": sample,
        }


_PLACE = re.compile(
    r"seen|weights|rows\.\w{1,80}|history\.(0|[1-9]\d{0,6})|(states|shared)\.(0|[1-9]\d{0,4})\.\w{1,80}"
)


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MOST
