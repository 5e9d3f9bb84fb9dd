"""GalleryCache: all state that a gallery model carries from one forward to the next.

Each layer's state is a dictionary of tensors with the batch rows first, each of a kind (states.py) that says what it
allows: to take tokens back, to drop the oldest. Columns of time end at each row's last token (see rows.py); what a row
has not filled yet is never read, because the cache knows how many tokens each row has seen. So a row is emptied by
setting that number to zero, and rows are moved by picking them from every tensor alike.

All that a cache holds is one `Content`, which nobody changes: whatever changes the cache first makes the next content,
where it may fail, and then puts it in the place of the old one.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import os
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .cache_file import read_cache_file, write_cache_file
from .columns import alone
from .rows import Rows
from .states import Columns, Derived, Kept, NextState, Places, State, follow, taken_back, tensors_of
from .weights import Version, WeightSample, sample_weights

# Name that transformers gives the cache in its outputs and in generate(): changed in 5.24. Forwards of the gallery
# take it by either name.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(outputs):
    """The cache in a model's outputs, None if there is none; `outputs.past_key_values` in any transformers 5."""
    return outputs.get(CACHE_NAME)


def _nobody():
    return None


@dataclass(frozen=True)
class Content:
    """All that a cache holds at one time.

    states: of each layer; empty before the first forward. seen (B,): each row's own tokens, on the CPU. facts: further
    facts of each row, on the CPU. columns: seen so far, padding included. history: the newest of them, for crop, as
    (count, mask (B, count)), the mask None where every column is a token. recorded: columns at its end that all states
    can take back, since they were read while the cache recorded. tables: per layer, what follows from weights
    alone and serves all rows. version: of the weights that the tables and all `Derived` state follow from. maker: a
    reference to the model that wrote last. sample: of a saved cache, the weights of the model that made it.
    """

    states: tuple[NextState, ...] = ()
    seen: torch.Tensor | None = None
    facts: dict[str, Kept] = field(default_factory=dict)
    columns: int = 0
    history: tuple[tuple[int, torch.Tensor | None], ...] = ()
    recorded: int = 0
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    version: Version | None = None
    maker: Callable[[], Any] = _nobody
    sample: WeightSample | None = None

    def map_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Content:
        """The same with `change` applied to every tensor that has rows."""
        if self.seen is None:
            return self
        return replace(
            self,
            states=tuple({name: kept.map(change) for name, kept in state.items()} for state in self.states),
            seen=change(self.seen),
            facts={name: kept.map(change) for name, kept in self.facts.items()},
            history=tuple((n, None if mask is None else change(mask)) for n, mask in self.history),
        )

    def without_derived(self) -> Content:
        """The same without what weights make anew."""
        states = tuple({n: x for n, x in state.items() if not isinstance(x, Derived)} for state in self.states)
        return replace(self, states=states, tables={}, version=None)


class GalleryCache(Cache):
    """The past of a batch of rows, for one model.

    A model's forward takes it as `past_key_values`, advances it in place and returns it. `get_seq_length()` counts
    the columns seen, padding included, as generate() needs; `seen` (B,) counts each row's own tokens.

    config: the configuration of the model that it will serve. A model refuses the cache of another one.
    detach: whether a forward leaves its state without its graph. False: gradients of later forwards reach earlier
        ones, and are those of one forward over all that was read, until `detach()` cuts them. What the paper stops
        within a forward stays stopped: the memory of Transformer-XL and of the Memorizing Transformer.

    >>> import torch
    >>> from hf_gallery import GalleryCache, GalleryTransformerXLConfig, GalleryTransformerXLModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> model = GalleryTransformerXLModel(GalleryTransformerXLConfig(**sizes, segment_length=8, mem_len=8)).eval()
    >>> cache = GalleryCache(model.config)
    >>> _ = model(torch.tensor([list(b"a long time ago")]), past_key_values=cache)
    >>> cache.get_seq_length(), cache.seen
    (15, tensor([15]))
    """

    def __init__(self, config, *, detach: bool = True):
        super().__init__(layers=[])
        if not hasattr(config, "cache_capacity") and not isinstance(config, MadeFor):
            raise TypeError(
                f"config is a {type(config).__name__}; give the configuration of a gallery model, "
                "GalleryCache(model.config)"
            )
        made_for = config if isinstance(config, MadeFor) else MadeFor(cache_identity(config), config.cache_capacity)
        self.identity = made_for.identity
        self.capacity = made_for.capacity  # columns of time that a layer keeps; None = all
        self.recording = False
        self.detaches = detach
        self.any_weights = False  # whether models may take it whose weights are not those that a file's cache is of
        self._content = Content()
        self._unchecked = False  # it came from a file, and no model has looked at it yet
        self._waiting: list[Callable[[Content], Content]] | None = None  # writes of a `held` block

    def __repr__(self):
        kind = self.identity["model_type"]
        return f"{type(self).__name__}({kind}, rows={self.batch_size}, columns={self.columns}, bytes={self.nbytes})"

    def __len__(self):
        return len(self._content.states)

    # ---- what it holds

    @property
    def seen(self) -> torch.Tensor | None:
        """Each row's own tokens, (B,) on the CPU; None before the first forward."""
        return self._content.seen

    @property
    def columns(self) -> int:
        """Columns seen, padding included."""
        return self._content.columns

    @property
    def states(self) -> list[State]:
        """Each layer's state, name by name; empty before the first forward."""
        return [tensors_of(state) for state in self._content.states]

    @property
    def facts(self) -> State:
        """Further facts of each row, (B, ...) on the CPU."""
        return tensors_of(self._content.facts)

    @property
    def columns_held(self) -> int:
        """C: the columns of time that each layer holds now."""
        held = (x.columns for state in self._content.states for x in state.values() if x.columns is not None)
        return next(held, 0)

    @property
    def max_columns(self) -> int | None:
        """Columns that layers shall keep now; None = all. While recording nothing is dropped, so that crop works."""
        return None if self.recording else self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the states hold, whole storages counted."""
        tensors = [x for state in self._content.states for kept in state.values() for x in kept.tensors]
        tensors += self._content.tables.values()
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    # ---- what models call

    def check(self, config, batch: int):
        """Raises ValueError unless the cache belongs to a model of this configuration and has `batch` rows."""
        identity = cache_identity(config)
        own = self.identity
        names: list[str] = []
        if own != identity:
            # A file of an earlier version lacks the fields that came since; its model was what their defaults say.
            own = {field.name: field.default for field in dataclasses.fields(config)} | own
            names = [name for name in self.identity | identity if own.get(name) != identity.get(name)]
            names = [name for name in names if name not in INDIFFERENT]  # files of earlier versions name some
        if names:
            first = 1 if names[0] == "model_type" else 3  # another architecture differs in much else
            differs = {name: (own.get(name), identity.get(name)) for name in names[:first]}
            raise ValueError(
                f"past_key_values was made for another model (its value, this model's): {differs}"
                f"{' and more' if len(names) > first else ''}; pass a GalleryCache(model.config), or none"
            )
        if self._unchecked:
            check_content(self._content, config)
            self._unchecked = False
        if self.seen is not None and len(self.seen) != batch:
            raise ValueError(
                f"past_key_values holds {len(self.seen)} rows, the input has {batch}; call reset() for new texts, or "
                "batch_select_indices() to keep some rows"
            )

    def check_weights(self, model):
        """Raises ValueError if the cache came from a file and was made by other weights than the model's."""
        sample = self._content.sample
        if sample is None or self.any_weights or self._content.maker() is model:
            return
        differs = sample.difference(sample_weights(model))
        if differs is not None:
            raise ValueError(
                f"past_key_values was saved by a model of other weights ({differs} differs), so this model would "
                "misread it; read the text again, or load the cache with any_weights=True (--any-weights in a shell) "
                "to use it all the same"
            )
        self._content = replace(self._content, maker=weakref.ref(model))

    def rows_of(self, batch: int, columns: int, mask: torch.Tensor | None, packed: bool = False) -> Rows:
        """The rows of a forward that goes on from here. packed: documents lie in them one behind another.

        The mask is the one thing that a padded forward asks of a GPU, and only with a growing cache: how many columns
        it keeps, which slots of a memory are free and which tokens can be taken back follow from counts on the CPU.
        """
        return Rows(batch, columns, None if mask is None else mask.cpu(), self.seen)

    def past_of(self, rows: Rows) -> GalleryCache:
        """Returns what the rows of a forward go on with."""
        return self

    def read_states(self, version: Version | None = None) -> list[State]:
        """Each layer's state for a forward. version: of the model's weights now, see `version_of`; what follows from
        weights is left out unless they are still the same."""
        content = self._content
        if version is None or version != content.version:
            content = content.without_derived()
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            # Autograd cannot save what was made in inference mode.
            content = content.map_rows(lambda x: x.clone() if x.is_inference() else x)
        return [tensors_of(state) for state in content.states]

    def read_tables(self, version: Version | None) -> dict[int, torch.Tensor] | None:
        """Tables of the layers that follow from the weights of this version; a forward may add to them. None where
        nothing can be kept, since nobody would know when it is out of date."""
        if version is None:
            return None
        return dict(self._content.tables) if version == self._content.version else {}

    def write(
        self,
        states: list[NextState],
        rows: Rows,
        facts: NextState | None = None,
        tables: dict[int, torch.Tensor] | None = None,
        version: Version | None = None,
        maker: Any = None,
    ):
        """Takes the next state of all layers, once they all have it.

        rows: of this forward. facts: of each row. tables, version: as `read_tables` has them. maker: the model.
        """

        def after(content: Content) -> Content:
            fresh = rows.fresh is not None and bool(rows.fresh.any())
            # What was recorded before a new document is of another text, and no crop reaches back to it.
            old = [{}] * len(states) if fresh or not content.states else content.states
            now = [ready(state, self.detaches) for state in states]
            return Content(
                states=tuple(follow(state, before) for state, before in zip(now, old, strict=True)),
                seen=rows.seen + rows.lengths,
                facts=content.facts | ready(facts or {}),
                columns=content.columns + rows.columns,
                history=self._recorded(content.history, rows),
                recorded=content.recorded + rows.columns if self.recording else 0,
                tables={} if version is None else tables or {},
                version=version,
                maker=content.maker if maker is None else weakref.ref(maker),
            )

        if self._waiting is None:
            self._content = after(self._content)
        else:
            self._waiting.append(after)

    def _recorded(self, history, rows):
        """The history with the columns of one more forward; without those that no crop could take back."""
        if rows.fresh is not None and bool(rows.fresh.any()):
            history = ()  # what came before a new document cannot be taken back
        if rows.mask is None and history and history[-1][1] is None:
            history = (*history[:-1], (history[-1][0] + rows.columns, None))
        else:
            recent = rows.recent
            history = (*history, (recent, None if rows.mask is None else rows.mask[:, -recent:]))
        if self.max_columns is not None:
            while sum(count for count, _ in history[1:]) > self.max_columns:
                history = history[1:]
        return history

    @contextmanager
    def held(self):
        """Writes inside the block wait, and take place when it ends well: a forward that fails after its last layer,
        in a head or in the loss, changes nothing either."""
        if self._waiting is not None:  # an outer block decides
            yield
            return
        self._waiting = []
        try:
            try:
                yield
                content = self._content
                for after in self._waiting:
                    content = after(content)
                self._content = content
            finally:
                self._waiting = None
        finally:
            self._waiting = None  # twice: Ctrl-C may come in the first, and a cache that waits for ever stands still

    # ---- transformers' Cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest input."""
        return -1

    max_cache_len = -1  # the same, as PEFT asks for it

    @property
    def batch_size(self) -> int:
        """Rows held; -1 before the first forward."""
        return -1 if self.seen is None else len(self.seen)

    @property
    def is_initialized(self) -> bool:
        return self.seen is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """[False]: generate() gives the new columns only. It would give all of them to a cache without layers."""
        return [False]

    @property
    def folds(self) -> bool:
        """Tells whether a memory or a recurrent state took in tokens: only what was recorded is taken back from it."""
        return any(x.folds for state in self._content.states for x in state.values())

    @property
    def is_croppable(self) -> bool:
        """Tells whether `crop` can take back tokens: nothing was forgotten yet, or the cache records."""
        countable = bool(self._content.history) or not self.columns  # reset_rows leaves nothing to count by
        return countable and (self._holds_all or (self.recording and self._may_take_back))

    @property
    def _holds_all(self) -> bool:
        """Tells whether nothing was forgotten: all state is columns of time, of every token."""
        return not self.folds and (self.seen is None or self.capacity is None or int(self.seen.max()) <= self.capacity)

    @property
    def _may_take_back(self) -> bool:
        """Tells whether the state of every layer can take back what was recorded."""
        states = self._content.states if self._content.recorded else ()
        return all(x.can_take_back for state in states for x in state.values())

    def activate_past_recording(self):
        """From now on keep what the model could forget, so that `crop` can take back the tokens that come: columns of
        time, the slots of a memory that are overwritten, a recurrent state as it was before each change. Each crop
        then drops what is no longer needed. generate() ends it."""
        self.recording = True

    def deactivate_past_recording(self):
        """Ends `activate_past_recording`; the next forward drops what the model can forget."""
        self.recording = False

    def crop(self, tokens_to_remove: int):
        """Takes back the last columns, as many as the number below 0 says: crop(-3).

        A bounded cache then drops again what the model cannot see. Raises ValueError for a number above 0, which older
        transformers took for the length to keep, and if tokens were dropped since; TypeError for what is no number.
        """
        count = -whole_number("tokens_to_remove", tokens_to_remove)  # older transformers give a tensor
        if count < 0:
            raise ValueError(
                f"tokens_to_remove is {-count}; give the columns to take back as a number below 0, crop({count})"
            )
        content = self._before(count) if count else self._content
        states = tuple({name: x.settled(self.capacity) for name, x in state.items()} for state in content.states)
        self._content = replace(content, states=states, recorded=0)

    def _before(self, count: int) -> Content:
        """The content without the last `count` columns."""
        content = self._content
        history, removed = shortened(content.history, count, max(self.batch_size, 0))
        counted = sum(n for n, _ in history) + count == sum(n for n, _ in content.history)
        recorded = count <= content.recorded and self._may_take_back
        if not counted or not (recorded or self._holds_all):
            raise ValueError(f"cannot take back {count} columns: {self._why_not()}")
        seen = content.seen - removed
        return replace(
            content,
            states=tuple(taken_back(state, removed, seen) for state in content.states),
            seen=seen,
            facts={name: x.take_back(removed, seen) for name, x in content.facts.items()},
            columns=content.columns - count,
            history=history,
        )

    def _why_not(self) -> str:
        if self.columns and not self._content.history:
            return "rows were emptied by reset_rows() since; keep a copy() from before"
        what = "put them into a memory or a recurrent state" if self.folds else "dropped what came before"
        since = f", and recorded the last {self._content.recorded}" if self._content.recorded else ""
        return (
            f"this cache has {what}{since}. Call activate_past_recording() before the forward that may be taken back, "
            "or keep a copy()"
        )

    def reorder_cache(self, beam_idx: torch.Tensor):
        """Row i becomes what row beam_idx[i] was. beam_idx: (any,), row numbers."""
        self._pick("beam_idx", beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        """Keeps the rows that indices names, in its order; a mask (B,) of booleans works too."""
        self._pick("indices", indices)

    def _pick(self, name: str, indices):
        indices = row_numbers(name, indices, self.batch_size)
        if not len(indices):
            raise ValueError(f"{name} names no row; a cache keeps at least one, so call reset() to drop them all")
        self._content = self._content.map_rows(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Every row `repeats` times, copies side by side."""
        count = whole_number("repeats", repeats)
        if count < 1:
            raise ValueError(f"repeats is {count}; it must be 1 or more")
        self._content = self._content.map_rows(lambda x: x.repeat_interleave(count, dim=0))

    def reset(self):
        """Forgets everything; the cache is as new, and may serve another number of rows."""
        self._content, self.recording = Content(), False

    # ---- the gallery's own

    @classmethod
    def from_pairs(cls, config, pairs) -> GalleryCache:
        """The cache of a model that has read C tokens whose keys and values are given; gradients reach them.

        pairs: for each layer keys and values (B, H, C, D), as prefix tuning makes them. Raises ValueError for shapes
        that are not the model's.
        """
        layers, h, d = config.cache_layers, config.num_attention_heads, config.head_dim
        pairs = [tuple(pair) for pair in pairs]
        shapes = {tuple(x.shape) for pair in pairs for x in pair}
        first = next(iter(shapes), ())
        if len(pairs) != layers or len(shapes) != 1 or len(first) != 4 or (first[1], first[3]) != (h, d) or 0 in first:
            raise ValueError(
                f"past_key_values holds {len(pairs)} layers of keys and values of shape "
                f"{' and '.join(map(str, sorted(shapes))) or 'none'}; this model's {layers} layers take (rows, {h}, "
                f"columns, {d})"
            )
        cache, (b, _, p, _) = cls(config), first
        states = tuple({"keys": Columns(key), "values": Columns(value)} for key, value in pairs)
        cache._content = Content(states, seen=torch.full((b,), p), columns=p, history=((p, None),))
        return cache

    def reset_rows(self, rows):
        """Empties some rows, for a new document in each. rows: row numbers, or a mask (B,) of booleans.

        The other rows are untouched, and get_seq_length() counts on. What went before cannot be cropped any more.

        Raises ValueError for rows that the cache has not, and for the cache of an encoder-decoder, whose rows belong
        to their source; TypeError for what is no list of rows.
        """
        content, rows = self._content, row_numbers("rows", rows, self.batch_size)
        if content.seen is None:
            return
        if self.identity.get("is_encoder_decoder"):
            raise ValueError(
                "reset_rows() would leave a row without the encoder's output that it decodes; reset() the cache, and "
                "start the rows again with their new source"
            )
        if not rows.numel():
            return
        # Zeros and not only a new count: what is masked still meets a product, and 0 * NaN is NaN. What follows from
        # weights is made anew, so that a document that begins meets nothing older than itself.
        emptied = content.without_derived().map_rows(lambda x: x.index_fill(0, rows.to(x.device), 0))
        # Columns that no row fills any more. Without this an unbounded cache grows for ever over many documents.
        longest = int(emptied.seen.max())
        states = tuple({name: x.last(longest) for name, x in state.items()} for state in emptied.states)
        self._content = replace(emptied, states=states, history=())

    def forget(self, *names: str):
        """Drops these parts of every layer's state, so that the next forward goes on as one that never had them: a
        memory that is empty (memory_keys, memory_values), a recurrent state as a text begins with it (state,
        state_keys, state_values). Only between segments or blocks, where the model reads them anew.

        Raises ValueError for what tokens are counted by: columns of time.
        """
        content = self._content
        counted = {name for state in content.states for name, x in state.items() if x.columns is not None}
        if counted & set(names):
            raise ValueError(
                f"names hold {min(counted & set(names))!r}, the columns that the cache counts tokens by; reset_rows() "
                "empties them"
            )
        states = tuple({name: x for name, x in state.items() if name not in names} for state in content.states)
        self._content = replace(content, states=states, history=())

    def detach(self) -> GalleryCache:
        """Cuts every state from the graph that made it, which only a cache made with detach=False keeps. Returns the
        cache."""
        self._content = self._content.map_rows(torch.Tensor.detach)
        return self

    def to(self, device) -> GalleryCache:
        """Moves the states to a device. Returns the cache."""
        content = self._content
        states = tuple({n: kept.map(lambda x: x.to(device)) for n, kept in state.items()} for state in content.states)
        self._content = replace(content, states=states, tables={})  # made anew where each layer is
        return self

    def __copy__(self) -> GalleryCache:
        return self.copy()  # two caches on the same tensors would write into each other's memory

    def __deepcopy__(self, memo) -> GalleryCache:
        return self.copy()

    def __getstate__(self) -> dict:
        """For pickle: what belongs to the model in this process stays here."""
        content = self._content.without_derived().map_rows(alone)
        content = replace(content, maker=_nobody, sample=self._sample())
        return self.__dict__ | {"_content": content, "_waiting": None}

    def copy(self) -> GalleryCache:
        """A cache of its own with the same content: read a document once, ask many questions from copies."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.identity, other._waiting = dict(self.identity), None
        other._content = self._content.map_rows(torch.Tensor.clone)
        return other

    def _sample(self) -> WeightSample | None:
        """Numbers of the weights of the model that wrote the cache; None where nobody did, or the model is gone."""
        maker = self._content.maker()
        return self._content.sample if maker is None else sample_weights(maker)

    def save(self, path: str | os.PathLike):
        """Writes the cache to one safetensors file, all or nothing, with a sample of the weights of its model."""
        content = self._content.without_derived()
        settled = tuple({name: x.settled(self.capacity) for name, x in state.items()} for state in content.states)
        content = replace(content, states=settled, sample=self._sample())  # what was recorded stays behind
        write_cache_file(path, self.identity, self.capacity, content)

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: str | torch.device = "cpu", any_weights: bool = False
    ) -> GalleryCache:
        """The cache that `save` wrote.

        any_weights: a model may take it whose weights are not those of the model that made it.

        Raises ValueError if the file is not one; the first model that takes the cache raises ValueError if the file
        does not fit its configuration or its weights.
        """
        identity, capacity, fields = read_cache_file(path, device)
        cache = cls(MadeFor(identity, capacity))
        cache._content, cache._unchecked, cache.any_weights = Content(**fields), True, any_weights
        return cache


def ready(state: NextState, detaches: bool = True) -> NextState:
    """Returns what a cache keeps of a layer's next state."""
    found = {name: kept.ready(detaches) for name, kept in state.items()}
    return {name: kept for name, kept in found.items() if kept is not None}


def shortened(history, count: int, batch: int):
    """The history without its last `count` columns, and how many tokens of each row they were, (B,). Shorter by fewer
    if it does not reach back as far."""
    removed = torch.zeros(batch, dtype=torch.long)
    history, left = list(history), count
    while left and history:
        n, mask = history.pop()
        taken = min(n, left)
        removed += taken if mask is None else mask[:, n - taken :].sum(1)
        if taken < n:
            history.append((n - taken, None if mask is None else mask[:, : n - taken]))
        left -= taken
    return tuple(history), removed


def whole_number(name: str, value: Any) -> int:
    """value as an int. Raises TypeError unless it is a whole number, a tensor of one perhaps."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be a whole number") from None


def row_numbers(name: str, rows: Any, batch: int) -> torch.Tensor:
    """Row numbers (any,) on the CPU, from 0, of numbers or of a mask (B,). batch: rows that there are, -1 unknown.

    Raises TypeError for what is neither, ValueError for rows that there are not.
    """
    wanted = "it must be a list or tensor of row numbers, or a mask of booleans, one per row"
    if not isinstance(rows, (torch.Tensor, list, tuple, range)) and not hasattr(rows, "__array__"):
        raise TypeError(f"{name} is {rows!r}; {wanted}")
    try:
        found = torch.as_tensor(rows).cpu()
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {rows!r}; {wanted}") from None
    except RuntimeError as error:
        if "infer dtype" not in str(error):
            raise
        raise TypeError(f"{name} is {rows!r}; {wanted}") from None
    if found.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(found.shape)}; {wanted}")
    if not found.numel() and found.dtype != torch.bool:
        return found.long()
    if found.dtype == torch.bool:
        if batch >= 0 and len(found) != batch:
            raise ValueError(f"{name} is a mask of shape {tuple(found.shape)}; the cache has {batch} rows")
        return found.nonzero().squeeze(-1)
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"{name} has type {found.dtype}; {wanted}")
    found = found.long()
    if batch >= 0 and (int(found.min()) < -batch or int(found.max()) >= batch):
        raise ValueError(f"{name} are {found.tolist()}; the cache has rows 0 to {batch - 1}")
    return found % batch if batch > 0 else found


@dataclass(frozen=True)
class MadeFor:
    """The model that a cache serves: its `cache_identity`, and the columns that its layers keep."""

    identity: dict[str, Any]
    capacity: int | None


def check_content(content: Content, config):
    """Raises ValueError unless what a file holds is what layers of this configuration keep: layers, names, shapes."""

    def wrong(what: str):
        raise ValueError(
            f"past_key_values comes from a file that no model of this configuration wrote: {what}; read the text again"
        )

    if content.seen is None:
        return
    b, most = len(content.seen), int(content.seen.max())
    if len(content.states) != config.cache_layers:
        wrong(f"it has {len(content.states)} layers, the model {config.cache_layers}")
    for i, state in enumerate(content.states):
        layouts = config.cache_layout(i)
        layout = next((x for x in layouts if x.keys() == state.keys()), None)
        if layout is None:
            wrong(f"layer {i} holds {sorted(state)}, where {' or '.join(str(sorted(x)) for x in layouts)} belong")
        held = {x.columns for x in state.values() if x.columns is not None}
        for name, shape in layout.items():
            x = state[name].tensor
            fits = x.dim() == len(shape) + 1 and x.shape[0] == b and x.is_floating_point()
            if not fits or not all(n is None or n == size for n, size in zip(shape, x.shape[1:], strict=True)):
                wanted = ", ".join("any" if n is None else str(n) for n in (b, *shape))
                wrong(f"{name} of layer {i} is {x.dtype} {tuple(x.shape)}, where ({wanted}) belongs")
        capacity = config.columns_kept(i)
        if len(held) > 1 or min(held, default=0) < (most if capacity is None else min(most, capacity)):
            wrong(f"layer {i} holds {sorted(held)} columns, of {most} tokens")
    for name in content.facts.keys() | config.cache_facts.keys():
        counted = content.states[0].get(config.cache_facts.get(name, ""))
        if (name in content.facts) != (counted is not None):
            wrong(f"it {'holds' if name in content.facts else 'lacks'} {name}")
        if counted is not None:
            x, columns = content.facts[name].tensor, counted.tensor.shape[2]
            places = isinstance(content.facts[name], Places)
            shape, last = ((b, columns), most) if places else ((b,), columns)
            if x.shape != shape or int(x.min()) < 0 or int(x.max()) > last:
                wrong(f"{name} is {tuple(x.shape)}, or counts beyond {last}")


# Settings by which models may differ and yet read each other's caches: of training, of the head, of how an exact
# memory is searched, of how long an input may be, of encoders alone.
INDIFFERENT = {
    "max_position_embeddings", "max_decoder_position_embeddings", "activation_dropout",
    "vocab_size", "hidden_dropout", "attention_dropout", "classifier_dropout", "initializer_range", "initialization",
    "projection_init_range", "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "sep_token_id", "decoder_start_token_id", "final_logits_bias", "memory_topk", "memory_backend", "cluster_order",
    "classifier_act", "embedding_size", "bptt_depth",
}  # fmt: skip


def cache_identity(config) -> dict:
    """Settings that must agree between a cache and the model that reads it: all of the gallery's own but a few."""
    held = vars(config)  # every forward asks; an attribute of transformers' configurations costs ten times as much
    names = _identity_fields(type(config))
    return {"model_type": config.model_type} | {n: held[n] if n in held else getattr(config, n) for n in names}


@functools.cache
def _identity_fields(kind: type) -> tuple[str, ...]:
    own = next(i for i, base in enumerate(kind.__mro__) if base.__name__ == "GalleryConfig") + 1
    names = [name for base in kind.__mro__[:own][::-1] for name in base.__dict__.get("__annotations__", {})]
    fields = {field.name for field in dataclasses.fields(kind)} - INDIFFERENT
    return tuple(name for name in names if name in fields)
