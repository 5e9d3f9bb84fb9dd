"""GalleryStaticCache: a cache whose tensors never change their shapes or places, so that a decode step is one graph.

Columns of time lie in rings (rings.py), and the counts beside them on the same device. A forward of one token a row
reads and writes the rings as they are. Every other forward, as of a prompt, has a growing cache made of the rings to
go on with, and the rings are laid anew from what it leaves: so whatever reads a text is the code that always reads it.
"""

from __future__ import annotations

import functools
import os
import weakref
from dataclasses import replace

import torch

from .cache import Content, GalleryCache, MadeFor, row_numbers, whole_number
from .exporting import in_one_graph, readable, records_gradients, require
from .rings import RingColumns, RingLayout, StepRows
from .rows import Rows
from .states import NextState, tensors_of


class GalleryStaticCache(GalleryCache):
    """A GalleryCache of fixed shapes, for decode steps that are compiled once or exported.

    The first forward, which is of a prompt and not compiled, makes it for as many rows as it has. From then on a
    forward of one token a row is one graph under torch.compile(fullgraph=True), the same at every token, and
    torch.export takes the cache as an input. Results are those of a GalleryCache. It serves inference: no gradients
    are recorded.

    config: the configuration of the model that it will serve. max_cache_len: the most columns that a layer holds.
        Needed where every token stays seen, and the longest text then; else layers hold what they can see again, and
        fewer make the longest text shorter.

    What follows from weights alone, as tables of positions do, is made when a prompt is read; a compiled step cannot
    see that weights have changed since: reset() then.

    >>> import torch
    >>> from hf_gallery import GalleryStaticCache, GalleryTransformerXLConfig, GalleryTransformerXLModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = GalleryTransformerXLModel(GalleryTransformerXLConfig(**sizes, segment_length=8, mem_len=8)).eval()
    >>> cache = GalleryStaticCache(model.config)
    >>> with torch.no_grad():
    ...     _ = model(torch.tensor([list(b"a long time ag")]), past_key_values=cache)
    ...     _ = torch.compile(model, fullgraph=True, backend="eager")(torch.tensor([[111]]), past_key_values=cache)
    >>> cache.get_seq_length(), cache.states[0]["keys"].shape
    (15, torch.Size([1, 4, 16, 8]))
    """

    def __init__(self, config, max_cache_len: int | None = None):
        super().__init__(config)
        reason = config.why_no_static_cache
        if reason is not None:
            raise ValueError(
                f"{config.model_type} has no static cache: {reason}; use a GalleryCache, with which generate() works "
                "by default"
            )
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
            raise ValueError(f"max_cache_len is {max_cache_len!r}; it must be a whole number of at least 1, or None")
        self.rings = tuple(config.ring_layout(i, max_cache_len) for i in range(config.cache_layers))
        kept = [config.columns_kept(i) for i in range(config.cache_layers)]
        cut = max_cache_len is not None and any(n is None or n >= max_cache_len for n in kept)
        self.longest = max_cache_len if cut else None  # tokens of a row's text; None = no end
        self._emptied = Content()  # memory of the content before a reset

    # ---- what models call

    def check(self, config, batch: int):
        if not in_one_graph():
            super().check(config, batch)
        elif batch != len(self._content.seen):
            raise ValueError(
                f"past_key_values holds {len(self._content.seen)} rows, the input has {batch}; a graph is for one "
                "number of rows"
            )

    def check_weights(self, model):
        """Nothing: it comes from no file."""

    def rows_of(self, batch, columns, mask, packed=False):
        if records_gradients():
            raise ValueError(
                "past_key_values is a GalleryStaticCache, and gradients are recorded; run the forward under "
                "torch.no_grad(), or give a GalleryCache"
            )
        if self.is_initialized and columns == 1 and not packed:
            self._check_room()
            return StepRows(self._content.seen, mask)
        if in_one_graph():
            raise ValueError(
                f"the input has {columns} columns{' of packed documents' if packed else ''}, and past_key_values is a "
                f"GalleryStaticCache{'' if self.is_initialized else ' without a prompt'}; a graph takes one column "
                "behind a prompt, so read the prompt outside of it"
            )
        seen = self.seen.cpu() if self.is_initialized else None
        rows = Rows(batch, columns, None if mask is None else mask.cpu(), seen)  # see GalleryCache.rows_of
        if self.longest is not None and rows.longest > self.longest:
            raise ValueError(
                f"the text reaches {rows.longest} tokens, and past_key_values was made with max_cache_len="
                f"{self.longest}; make one with more"
            )
        return rows

    def _check_room(self):
        if self.longest is None:
            return
        full = f"past_key_values was made with max_cache_len={self.longest}, and a row has read as many tokens"
        if not readable(self._content.seen):
            require(self._content.seen < self.longest, full)
        elif int(self._content.seen.max()) >= self.longest:
            raise ValueError(f"{full}; make one with more")

    def past_of(self, rows):
        return self if rows.steps else self.growing()

    def read_states(self, version=None):
        if in_one_graph():  # whether weights have changed cannot be asked
            return [tensors_of(state) for state in self._content.states]
        return super().read_states(version)

    def read_tables(self, version):
        if in_one_graph():
            return dict(self._content.tables) or None
        return super().read_tables(version)

    def write(self, states, rows, facts=None, tables=None, version=None, maker=None):
        if in_one_graph():
            self._step(self._content, states, rows)
            return

        def after(content: Content) -> Content:
            if not rows.steps:
                past = self._growing(content)
                past.write(states, rows, facts, tables, version, maker)
                return self._laid(past._content, content)
            self._step(content, states, rows)
            made = {} if version is None else {i: over(x, content.tables.get(i)) for i, x in (tables or {}).items()}
            return replace(content, tables=made, version=version, maker=weakref.ref(maker))

        if self._waiting is None:
            self._content = after(self._content)
        else:
            self._waiting.append(after)

    @staticmethod
    def _step(content: Content, states: list[NextState], rows: StepRows):
        """Writes the states of a step over those that it was made from, and counts its tokens."""
        for old, new in zip(content.states, states, strict=True):
            for name, kept in new.items():
                if name in old and kept.tensor is not old[name].tensor:
                    old[name].tensor.copy_(kept.tensor)
        content.seen.add_(rows.lengths)
        content.columns.add_(1)

    # ---- columns to rings and back

    def growing(self) -> GalleryCache:
        """A GalleryCache with the same content, in memory of its own."""
        return self._growing(self._content)

    def _growing(self, content: Content) -> GalleryCache:
        cache = GalleryCache(MadeFor(dict(self.identity), self.capacity))
        if content.seen is None:
            return cache
        seen = content.seen.cpu()

        def unlaid(state: NextState, rings: dict[str, RingLayout]) -> NextState:
            found = {
                name: rings[name].unlay(kept.tensor, content.seen) if name in rings else kept.map(torch.Tensor.clone)
                for name, kept in state.items()
            }
            return {name: kept for name, kept in found.items() if kept is not None}

        cache._content = replace(
            content,
            states=tuple(map(unlaid, content.states, self.rings)),
            seen=seen.clone(),
            facts={name: kept.map(lambda x: x.to("cpu", copy=True)) for name, kept in content.facts.items()},
            columns=int(content.columns),
            tables={layer: x.clone() for layer, x in content.tables.items()},
        )
        return cache

    def _laid(self, content: Content, old: Content) -> Content:
        """The content of a growing cache in rings, in the memory of the old one or of what reset() left."""
        device = next(kept.tensor.device for state in content.states for kept in state.values())

        def laid(state: NextState, rings: dict[str, RingLayout]) -> NextState:
            return state | {name: RingColumns(ring.lay(name, state, content.seen)) for name, ring in rings.items()}

        counts = dict(seen=content.seen.to(device), columns=torch.tensor(content.columns, device=device))
        facts = {name: kept.map(lambda x: x.to(device)) for name, kept in content.facts.items()}
        states = tuple(map(laid, content.states, self.rings))
        content = replace(content, states=states, facts=facts, history=(), **counts)
        return content_over(content, old if old.seen is not None else self._emptied)

    # ---- transformers' Cache

    @property
    def columns(self) -> int:
        return int(self._content.columns)

    @property
    def max_cache_len(self) -> int:
        return -1 if self.longest is None else self.longest

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The longest text, prompt and all; -1: there is none."""
        return self.max_cache_len

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    def activate_past_recording(self):
        raise ValueError("a GalleryStaticCache records nothing, so no token is taken back; use a GalleryCache")

    def crop(self, tokens_to_remove: int):
        raise ValueError(
            f"cannot take back {tokens_to_remove} columns of a GalleryStaticCache, whose rings hold no more than is "
            "seen again; keep a copy(), or use a GalleryCache"
        )

    def _pick(self, name, indices):
        indices = row_numbers(name, indices, self.batch_size)
        if len(indices) != max(self.batch_size, 0):
            raise ValueError(
                f"{name} names {len(indices)} rows of {self.batch_size}; a GalleryStaticCache keeps its number of "
                "rows, so use a GalleryCache"
            )
        picked = self._content.map_rows(lambda x: x.index_select(0, indices.to(x.device)))
        self._content = content_over(picked, self._content)

    def batch_repeat_interleave(self, repeats: int):
        if whole_number("repeats", repeats) != 1:
            raise ValueError(
                f"repeats is {repeats}; a GalleryStaticCache keeps its number of rows, so use a GalleryCache"
            )

    def reset(self):
        """Forgets everything. The next prompt is laid into the same memory, if it has as many rows."""
        self._emptied = self._content if self.is_initialized else self._emptied
        self._content = Content()

    # ---- the gallery's own

    def reset_rows(self, rows):
        if not self.is_initialized:
            return
        before = self._content
        emptied = self.growing()
        emptied.reset_rows(rows)
        tables = before.tables  # they follow from weights alone
        self._content = replace(self._laid(emptied._content, before), tables=tables, version=before.version)

    def detach(self):
        return self

    def to(self, device):
        content = self._content
        if content.seen is not None:
            tables = {layer: x.to(device) for layer, x in content.tables.items()}
            moved = replace(
                content.map_rows(lambda x: x.to(device)), columns=content.columns.to(device), tables=tables
            )
            self._content = content_over(moved, content)
        return self

    def __getstate__(self):
        return super().__getstate__() | {"_emptied": Content()}

    def copy(self):
        other = super().copy()
        other._content, other._emptied = content_over(other._content, Content()), Content()
        return other

    def save(self, path: str | os.PathLike):
        """As GalleryCache's, whose `load` reads the file."""
        self.growing().save(path)

    @classmethod
    def load(cls, path, device="cpu", any_weights=False):
        raise ValueError(
            "a GalleryStaticCache is made for a model and filled by reading a text; GalleryCache.load reads files, "
            "those that a GalleryStaticCache has saved too"
        )

    @classmethod
    def from_pairs(cls, config, pairs):
        raise ValueError("a GalleryStaticCache is filled by reading a text; use GalleryCache.from_pairs")


def content_over(new: Content, old: Content) -> Content:
    """The new content in the memory of the old one, wherever shapes and types are the same."""
    before = old.states or ({},) * len(new.states)
    return replace(
        new,
        states=tuple(state_over(x, y) for x, y in zip(new.states, before, strict=True)),
        facts=state_over(new.facts, old.facts),
        seen=over(new.seen, old.seen),
        columns=over(new.columns, old.columns),
        tables={layer: over(x, old.tables.get(layer)) for layer, x in new.tables.items()},
    )


def state_over(new: NextState, old: NextState) -> NextState:
    """A layer's state in the memory of an old one."""
    before = tensors_of(old)
    return {name: kept.map(functools.partial(over, old=before.get(name))) for name, kept in new.items()}


def over(new: torch.Tensor, old) -> torch.Tensor:
    """The tensor in the memory of the old one; in its own, which nobody else has, where that does not fit."""
    if new is old:
        return new
    fits = isinstance(old, torch.Tensor) and old.shape == new.shape
    if fits and (old.dtype, old.device) == (new.dtype, new.device):
        return old.copy_(new)
    with torch.inference_mode(False):  # may be written in any mode
        made = torch.empty_like(new, memory_format=torch.contiguous_format).copy_(new)
    torch._dynamo.mark_static_address(made)  # CUDA graphs write to it where it lies
    return made
