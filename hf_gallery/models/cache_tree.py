"""Caches as pytrees: their tensors as leaves, all else as what stands between them.

torch.export takes a cache as an input by it. It is not there unasked: tools that map over the inputs of a model, to
cast or to move them, as FSDP does, would hand the model another cache than the caller's, which then never advances.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from .cache import Content, GalleryCache
from .rings import RingLayout
from .states import Kept, Record
from .static_cache import GalleryStaticCache

# What a cache is besides its content, and what of the content is of this process alone.
_ATTRIBUTES = ("identity", "capacity", "recording", "detaches", "any_weights", "_unchecked", "longest")
_OF_PROCESS = ("version", "maker", "sample")


@dataclass(frozen=True)
class Layout:
    """All of a cache but its tensors, as JSON, and what of it means nothing in another process."""

    text: str
    of_process: dict[str, Any] = field(default_factory=dict, compare=False)


def register_gallery_cache_export_support():
    """Makes pytrees of GalleryCache and GalleryStaticCache, for torch.export; as transformers'
    register_dynamic_cache_export_support does for its own."""
    for kind in (GalleryCache, GalleryStaticCache):
        if kind in pytree.SUPPORTED_NODES:
            continue
        pytree.register_pytree_node(
            kind,
            flatten,
            lambda leaves, layout, kind=kind: unflatten(kind, leaves, layout),
            serialized_type_name=f"{kind.__module__}.{kind.__name__}",
            to_dumpable_context=lambda layout: layout.text,
            from_dumpable_context=Layout,
            flatten_with_keys_fn=flatten_with_keys,
        )


def flatten(cache: GalleryCache) -> tuple[list[torch.Tensor], Layout]:
    """The tensors of a cache, and how they lie in it."""
    named, layout = flatten_with_keys(cache)
    return [x for _, x in named], layout


def flatten_with_keys(cache: GalleryCache) -> tuple[list[tuple[Any, torch.Tensor]], Layout]:
    """As `flatten`, each tensor with its name."""
    leaves: list[tuple[Any, torch.Tensor]] = []
    content = cache._content
    tree = {
        "attributes": {name: vars(cache)[name] for name in _ATTRIBUTES if name in vars(cache)},
        "rings": _taken(getattr(cache, "rings", ()), "", leaves),
        "content": _taken(content, "", leaves),
    }
    return leaves, Layout(json.dumps(tree), {name: getattr(content, name) for name in _OF_PROCESS})


def unflatten(kind: type[GalleryCache], leaves, layout: Layout) -> GalleryCache:
    """The cache of some tensors that lie as another one's did."""
    tree = json.loads(layout.text)
    cache = object.__new__(kind)
    Cache.__init__(cache, layers=[])
    cache._content, cache._waiting = Content(), None
    vars(cache).update(tree["attributes"])
    if isinstance(cache, GalleryStaticCache):
        cache.rings, cache._emptied = _given(tree["rings"], iter(())), Content()
    cache._content = dataclasses.replace(_given(tree["content"], iter(leaves)), **layout.of_process)
    return cache


def _taken(x: Any, name: str, leaves: list) -> Any:
    """x without its tensors, as JSON has it; those are added to the leaves, in order."""
    if isinstance(x, torch.Tensor):
        leaves.append((pytree.MappingKey(name), x))
        return {"tensor": name}
    if dataclasses.is_dataclass(x):
        fields = [f.name for f in dataclasses.fields(x) if not (isinstance(x, Content) and f.name in _OF_PROCESS)]
        return {"kind": type(x).__name__, "of": [[n, _taken(getattr(x, n), _joined(name, n), leaves)] for n in fields]}
    if isinstance(x, dict):
        return {"dict": [[key, _taken(y, _joined(name, key), leaves)] for key, y in x.items()]}
    if isinstance(x, tuple):
        return {"tuple": [_taken(y, _joined(name, i), leaves) for i, y in enumerate(x)]}
    return {"value": x}


def _joined(name: str, more: Any) -> str:
    return f"{name}.{more}" if name else str(more)


def _given(tree: dict, leaves) -> Any:
    """Puts together what `_taken` has taken apart."""
    if "tensor" in tree:
        return next(leaves)
    if "kind" in tree:
        return _kinds()[tree["kind"]](**{name: _given(x, leaves) for name, x in tree["of"]})
    if "dict" in tree:
        return {key: _given(x, leaves) for key, x in tree["dict"]}
    if "tuple" in tree:
        return tuple(_given(x, leaves) for x in tree["tuple"])
    return tree["value"]


def _kinds() -> dict[str, type]:
    """The classes that a content is made of, by name."""
    found: dict[str, type] = {"Content": Content}
    waiting: list[type] = [Kept, Record, RingLayout]
    while waiting:
        kind = waiting.pop()
        found[kind.__name__] = kind
        waiting.extend(kind.__subclasses__())
    return found
