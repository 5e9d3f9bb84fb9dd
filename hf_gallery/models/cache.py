"""GalleryCache: all state that a gallery model carries from one forward to the next.

Each layer's state is a dictionary of tensors with the batch rows first. Those named in TIMED hold columns of time,
(B, H, C, D) or (B, C, E), aligned so that each row's last token stands in the last column (see rows.py); what a row
has not filled yet is never read, because the cache knows how many tokens each row has seen. So a row is emptied by
setting that number to zero, and rows are moved by picking them from every tensor alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .columns import last_columns

TIMED = ("keys", "values", "hidden")  # state with columns of time, in the last dimension but one

State = dict[str, torch.Tensor]

# What transformers calls the cache in its outputs and in generate(): renamed in 5.24. Forwards of the gallery take it
# by either name.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def cache_of(outputs):
    """The cache in a model's outputs, None if there is none; `outputs.past_key_values` in any transformers 5."""
    return outputs.get(CACHE_NAME)


class GalleryCache(Cache):
    """The past of a batch of rows, for one model.

    A model's forward takes it as `past_key_values`, advances it in place and returns it. `get_seq_length()` counts
    the columns seen, padding included, as generate() needs; `seen` (B,) counts each row's own tokens.

    config: the configuration of the model that it will serve. A model refuses the cache of another one.
    """

    def __init__(self, config):
        super().__init__(layers=[])
        self.identity = cache_identity(config)
        self.capacity = config.cache_capacity  # columns of time that a layer keeps; None = all
        self.states: list[State] = []
        self.seen: torch.Tensor | None = None  # (B,) on the CPU
        self.rows: dict[str, torch.Tensor] = {}  # further facts of each row, (B, ...) on the CPU
        self.shared: list[State] = []  # per layer, what follows from the weights alone and serves all rows
        self.columns = 0
        self.recording = False
        # The newest columns, for crop: (count, mask (B, count)), the mask None where every column is a token.
        self.history: list[tuple[int, torch.Tensor | None]] = []
        self.waiting: list[tuple] | None = None  # writes that wait for the end of a `held` block

    def __repr__(self):
        kind = self.identity["model_type"]
        return f"GalleryCache({kind}, rows={self.batch_size}, columns={self.columns}, bytes={self.nbytes})"

    def __len__(self):
        return len(self.states)

    # ---- what models call

    def check(self, config, batch: int):
        """Raises ValueError unless the cache belongs to a model of this configuration and has `batch` rows."""
        identity = cache_identity(config)
        names = [name for name in self.identity | identity if self.identity.get(name) != identity.get(name)]
        names = [name for name in names if name not in INDIFFERENT]  # files of earlier versions name some
        if names:
            first = 1 if names[0] == "model_type" else 3  # another architecture differs in much else
            differs = {name: (self.identity.get(name), identity.get(name)) for name in names[:first]}
            raise ValueError(
                f"past_key_values was made for another model (its value, this model's): {differs}"
                f"{' and more' if len(names) > first else ''}; pass a GalleryCache(model.config), or none"
            )
        if self.seen is not None and len(self.seen) != batch:
            raise ValueError(
                f"past_key_values holds {len(self.seen)} rows, the input has {batch}; call reset() for new texts, or "
                "batch_select_indices() to keep some rows"
            )

    def write(self, states: list[State], rows, shared: list[State] | None = None, facts: State | None = None):
        """Takes the new state of all layers, once they all have it. rows: the Rows of this forward."""
        if self.waiting is not None:
            self.waiting.append((states, rows, shared, facts))
            return
        # What may fail for want of memory comes first, for all layers, then what writes.
        for ready in ("with_room", "commit"):
            states = [
                {n: getattr(x, ready)() if hasattr(x, ready) else x for n, x in state.items()} for state in states
            ]
        self.states = [{name: x.detach() for name, x in state.items() if x is not None} for state in states]
        self.seen = rows.seen + rows.lengths
        self.shared = shared or []  # a forward with gradients makes none: weights that change would leave it stale
        self.rows.update(facts or {})
        self.columns += rows.columns
        if rows.fresh is not None and bool(rows.fresh.any()):
            self.history = []  # what came before a new document cannot be taken back
        if rows.mask is None and self.history and self.history[-1][1] is None:
            self.history[-1] = (self.history[-1][0] + rows.columns, None)
        else:
            recent = rows.recent
            self.history.append((recent, None if rows.mask is None else rows.mask[:, -recent:].cpu()))
        if self.capacity is not None and not self.recording:
            while sum(count for count, _ in self.history[1:]) > self.capacity:
                self.history.pop(0)

    @contextmanager
    def held(self):
        """Writes inside the block wait, and take place when it ends well: a forward that fails after its last layer,
        in a head or in the loss, changes nothing either."""
        if self.waiting is not None:  # an outer block decides
            yield
            return
        self.waiting = []
        try:
            yield
            waiting = self.waiting
        finally:
            self.waiting = None
        for write in waiting:
            self.write(*write)

    @property
    def limit(self) -> int | None:
        """Columns that layers shall keep now; None = all. While recording nothing is dropped, so that crop works."""
        return None if self.recording else self.capacity

    # ---- transformers' Cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest input."""
        return -1

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
    def is_croppable(self) -> bool:
        """Whether `crop` can take back tokens: all state is columns of time, and those that it needs are here."""
        known = bool(self.history) or not self.columns  # reset_rows leaves nothing to count by
        return not self.folds and known and (self.capacity is None or self.recording or self.columns <= self.capacity)

    @property
    def folds(self) -> bool:
        """Whether tokens go into a memory or a recurrent state, from which they cannot be taken back."""
        return bool(self.identity.get("memory_layers") or self.identity.get("recurrent_layers"))

    def activate_past_recording(self):
        """From now on keep what the model could forget, so that `crop` can take tokens back: each crop then drops what
        is no longer needed. generate() ends it."""
        self.recording = True

    def deactivate_past_recording(self):
        """Ends `activate_past_recording`; the next forward drops what the model can forget."""
        self.recording = False

    def crop(self, tokens_to_remove: int):
        """Takes back the last columns, as many as the number below 0 says: crop(-3).

        A bounded cache then drops again what the model cannot see. Raises ValueError for a number above 0, which older
        transformers took for the length to keep, and if tokens were dropped since.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove is {tokens_to_remove}; give the columns to take back as a number below 0, "
                f"crop(-{tokens_to_remove})"
            )
        count = -int(tokens_to_remove)  # older transformers give a tensor
        if count:
            self._take_back(count)
        if self.capacity is not None:
            for state in self.states:
                for name in TIMED:
                    if name in state:
                        state[name] = last_columns(state[name], self.capacity)

    def _take_back(self, count):
        removed = torch.zeros(max(self.batch_size, 0), dtype=torch.long)  # (B,) tokens among the columns
        history, left = list(self.history), count
        while left and history:
            n, mask = history.pop()
            taken = min(n, left)
            removed += taken if mask is None else mask[:, n - taken :].sum(1)
            if taken < n:
                history.append((n - taken, None if mask is None else mask[:, : n - taken]))
            left -= taken
        columns = self.columns_held
        if left or not self.is_croppable or bool((columns - removed < self._needed(self.seen - removed)).any()):
            if self.folds:
                raise ValueError(
                    f"cannot take back {count} columns: this cache has put them into a memory or a recurrent state; "
                    "keep a copy() from before the forward that may be taken back"
                )
            if not history and left and self.columns:
                raise ValueError(
                    f"cannot take back {count} columns: rows were emptied by reset_rows() since; keep a copy() from "
                    "before"
                )
            raise ValueError(
                f"cannot take back {count} columns: this cache has dropped what came before. Call "
                "activate_past_recording() before the forward that may be taken back, or keep a copy()"
            )
        keep = columns - int(removed.min())
        for state in self.states:
            for name in TIMED:
                if name in state:
                    x = state[name]
                    column = torch.arange(keep) - (removed - removed.min())[:, None]  # (B, keep)
                    shape = [len(removed), *[1] * (x.dim() - 3), keep, 1]
                    column = column.clamp(min=0).to(x.device).view(shape).expand(*x.shape[:-2], keep, x.shape[-1])
                    state[name] = x.gather(-2, column)
        self.seen = self.seen - removed
        if "global_positions" in self.rows:  # position + 1 of each global token, 0 for none
            positions = self.rows["global_positions"]
            self.rows["global_positions"] = positions.masked_fill(positions > self.seen[:, None], 0)
        self.columns -= count
        self.history = history

    @property
    def columns_held(self) -> int:
        """C: the columns of time that each layer holds now."""
        return next((x.shape[-2] for state in self.states for name, x in state.items() if name in TIMED), 0)

    def _needed(self, seen):
        """Columns of time that rows need with `seen` tokens behind them, (B,)."""
        return seen if self.capacity is None else seen.clamp(max=self.capacity)

    def _each(self, change):
        """Applies `change` to every tensor that has rows."""
        if self.seen is None:
            return
        self.states = [{name: change(x) for name, x in state.items()} for state in self.states]
        self.rows = {name: change(x) for name, x in self.rows.items()}
        self.history = [(n, None if mask is None else change(mask)) for n, mask in self.history]
        self.seen = change(self.seen)

    def reorder_cache(self, beam_idx: torch.Tensor):
        """Row i becomes what row beam_idx[i] was. beam_idx: (any,), row numbers."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        """Keeps the rows that indices names, in its order; a mask (B,) of booleans works too."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().squeeze(-1)
        self._each(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int):
        """Every row `repeats` times, copies side by side."""
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def reset(self):
        """Forgets everything; the cache is as new, and may serve another number of rows."""
        self.states, self.shared, self.rows, self.history = [], [], {}, []
        self.seen, self.columns, self.recording = None, 0, False

    # ---- the gallery's own

    def reset_rows(self, rows):
        """Empties some rows, for a new document in each. rows: row numbers, or a mask (B,) of booleans.

        The other rows are untouched, and get_seq_length() counts on. What went before cannot be cropped any more.

        Raises ValueError for rows that the cache has not, and for the cache of an encoder-decoder, whose rows belong
        to their source.
        """
        if self.seen is None:
            return
        if self.identity.get("is_encoder_decoder"):
            raise ValueError(
                "reset_rows() would leave a row without the encoder's output that it decodes; reset() the cache, and "
                "start the rows again with their new source"
            )
        rows = torch.as_tensor(rows)
        if rows.dtype == torch.bool and rows.shape != self.seen.shape:
            raise ValueError(f"rows is a mask of shape {tuple(rows.shape)}; the cache has {len(self.seen)} rows")
        rows = rows.nonzero().squeeze(-1) if rows.dtype == torch.bool else rows.long()
        if rows.numel() and (int(rows.min()) < -len(self.seen) or int(rows.max()) >= len(self.seen)):
            raise ValueError(f"rows are {rows.tolist()}; the cache has rows 0 to {len(self.seen) - 1}")
        if not rows.numel():
            return

        def empty(x):
            # Zeros and not only a new count: what is masked still meets a product, and 0 * NaN is NaN.
            return x.index_fill(0, rows.to(x.device) % len(x), 0)

        self._each(empty)
        self.history = []
        # Columns that no row fills any more. Without this an unbounded cache grows for ever over many documents.
        longest = int(self.seen.max())
        for state in self.states:
            state.update({name: last_columns(x, longest) for name, x in state.items() if name in TIMED})

    def detach(self) -> GalleryCache:
        """Cuts every state from the graph that made it; models already write detached state. Returns the cache."""
        self._each(torch.Tensor.detach)
        return self

    def to(self, device) -> GalleryCache:
        """Moves the states to a device. Returns the cache."""
        self.states = [{name: x.to(device) for name, x in state.items()} for state in self.states]
        self.shared = [{name: x.to(device) for name, x in state.items()} for state in self.shared]
        return self

    def __copy__(self) -> GalleryCache:
        return self.copy()  # two caches on the same tensors would write into each other's memory

    def copy(self) -> GalleryCache:
        """A cache of its own with the same content: read a document once, ask many questions from copies."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._each(torch.Tensor.clone)
        other.identity, other.rows = dict(self.identity), dict(other.rows)
        other.history, other.shared = list(other.history), [dict(state) for state in self.shared]
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the states hold, whole storages counted."""
        tensors = [x for state in [*self.states, *self.shared] for x in state.values()]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())

    def save(self, path: str | os.PathLike):
        """Writes the cache to one safetensors file, all or nothing."""
        tensors = {} if self.seen is None else {"seen": self.seen}
        tensors |= {f"rows.{name}": x for name, x in self.rows.items()}
        for group, states in (("states", self.states), ("shared", self.shared)):
            tensors |= {f"{group}.{i}.{name}": x for i, state in enumerate(states) for name, x in state.items()}
        tensors |= {f"history.{i}": mask for i, (_, mask) in enumerate(self.history) if mask is not None}
        about = {
            "identity": self.identity,
            "capacity": self.capacity,
            "columns": self.columns,
            "layers": [len(self.states), len(self.shared)],
            "history": [n for n, _ in self.history],
        }
        folder = os.path.dirname(os.path.abspath(path))
        handle, beside = tempfile.mkstemp(dir=folder, suffix=".partial")
        os.close(handle)
        try:
            save_file({k: x.contiguous() for k, x in tensors.items()}, beside, {"gallery_cache": json.dumps(about)})
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> GalleryCache:
        """The cache that `save` wrote. Raises ValueError if the file is not one."""
        nothing = f"{os.fspath(path)} is no saved GalleryCache; write one with cache.save(path)"
        try:
            opened = safe_open(path, framework="pt", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{nothing} ({error})") from error
        with opened as file:
            about = json.loads((file.metadata() or {}).get("gallery_cache", "null"))
            if about is None:
                raise ValueError(nothing)
            cache = object.__new__(cls)
            Cache.__init__(cache, layers=[])
            cache.identity, cache.capacity = about["identity"], about["capacity"]
            cache.columns, cache.recording, cache.waiting = about["columns"], False, None
            cache.states, cache.shared = ([{} for _ in range(n)] for n in about["layers"])
            cache.rows, cache.seen, masks = {}, None, {}
            for name in file.keys():
                tensor, (kind, *rest) = file.get_tensor(name), name.split(".", 2)
                if kind == "seen":
                    cache.seen = tensor.cpu()
                elif kind == "rows":
                    cache.rows[rest[0]] = tensor.cpu()
                elif kind == "history":
                    masks[int(rest[0])] = tensor.cpu()
                else:
                    getattr(cache, kind)[int(rest[0])][rest[1]] = tensor
            cache.history = [(n, masks.get(i)) for i, n in enumerate(about["history"])]
        return cache


# Settings by which models may differ and yet read each other's caches: of training, of the head, of how an exact
# memory is searched, of how long an input may be.
INDIFFERENT = {
    "max_position_embeddings",
    "vocab_size", "hidden_dropout", "attention_dropout", "classifier_dropout", "initializer_range", "initialization",
    "projection_init_range", "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "sep_token_id", "decoder_start_token_id", "final_logits_bias", "memory_topk", "memory_backend", "cluster_order",
}  # fmt: skip


def cache_identity(config) -> dict:
    """Settings that must agree between a cache and the model that reads it: all of the gallery's own but a few."""
    own = next(i for i, kind in enumerate(type(config).__mro__) if kind.__name__ == "GalleryConfig") + 1
    names = [name for kind in type(config).__mro__[:own][::-1] for name in kind.__dict__.get("__annotations__", {})]
    fields = {field.name for field in dataclasses.fields(config)} - INDIFFERENT
    return {"model_type": config.model_type} | {name: getattr(config, name) for name in names if name in fields}
