"""Contestants from outside the gallery: causal models of transformers, with their own code and their own caches.

They train on the same batches as the others. No trainer cuts and resets their caches, so nothing is carried from one
step of the text task into the next. When they are asked, their caches go on over calls, if that gives what one call
over everything gives: a cache of transformers may hold a state and begin anew all the same.
"""

from __future__ import annotations

import copy
import enum
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    DynamicCache,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    Trainer,
)

from hf_gallery.training import DocumentLanes

from .contestants import Contestant

GALLERY = "gallery_"  # begins the model types of the gallery
ALIKE = 1e-3  # bits of a token by which reading in parts may differ from reading at once
IGNORED = -100  # a label that asks for nothing
# A pad token has no embedding of its own.
NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
CACHES = ("cache", "past_key_values", "cache_params")  # names that models have for a cache, the first from now on
LONGEST = 2**20  # positions that rotary models are told of; it decides nothing but what they say of themselves


def _llama(sizes: Any) -> PreTrainedConfig:
    return LlamaConfig(**_attention(sizes), tie_word_embeddings=True)


def _mistral(sizes: Any) -> PreTrainedConfig:
    return MistralConfig(
        **_attention(sizes), num_key_value_heads=sizes.heads, sliding_window=sizes.window, tie_word_embeddings=True
    )


def _attention(sizes: Any) -> dict[str, Any]:
    return {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": sizes.intermediate,
        "max_position_embeddings": LONGEST,
        **NO_TOKENS,
    }


def _mamba(sizes: Any) -> PreTrainedConfig:
    """There is no feed-forward: the inner width is matched."""
    config = MambaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, num_hidden_layers=sizes.layers, **NO_TOKENS
    )
    config.intermediate_size = sizes.intermediate
    return config


def _mamba2(sizes: Any) -> PreTrainedConfig:
    """There is no feed-forward, and the inner width is a multiple of the hidden one: the state's width is matched."""
    return Mamba2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        expand=3,
        num_heads=sizes.heads,
        head_dim=3 * sizes.hidden // sizes.heads,
        n_groups=1,
        state_size=sizes.intermediate,
        chunk_size=16,  # results do not depend on it; the memory of a step on a CPU does
        tie_word_embeddings=True,
        **NO_TOKENS,
    )


def _recurrent_gemma(sizes: Any) -> PreTrainedConfig:
    return RecurrentGemmaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=2 * sizes.intermediate,  # it halves it
        attention_window_size=sizes.window,
        block_types=("recurrent", "recurrent", "attention") if sizes.layers > 2 else ("recurrent", "attention"),
        **NO_TOKENS,
    )


def _causal(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal model of a configuration, in float32. One from outside makes no cache unless its reader gives it
    one."""
    config.use_cache = not is_foreign(config)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind(config)


ASKED = "carried when it is asked, not in training"
OUTSIDE = {
    c.name: c
    for c in (
        Contestant(
            "llama",
            "Llama (outside)",
            "everything before it; a text in segments as long as those it trained on, with nothing carried",
            _causal,
            _llama,
            "nothing",
            "#8B4513",
            "circle",
        ),
        Contestant(
            "mistral",
            "Mistral (outside)",
            f"one window in each layer; its keys are {ASKED}",
            _causal,
            _mistral,
            "keys",
            "#6A3D9A",
            "diamond-open",
        ),
        Contestant(
            "mamba",
            "Mamba (outside)",
            f"a recurrent state in each layer, {ASKED}",
            _causal,
            _mamba,
            "state",
            "#B2182B",
            "star-open",
        ),
        Contestant(
            "mamba2",
            "Mamba-2 (outside)",
            f"a recurrent state in each layer, {ASKED}",
            _causal,
            _mamba2,
            "state",
            "#E7298A",
            "star-square",
        ),
        Contestant(
            "recurrent_gemma",
            "RecurrentGemma (outside)",
            f"a recurrent state, and in every third layer one window, both {ASKED}",
            _causal,
            _recurrent_gemma,
            "state",
            "#1B7837",
            "hexagon-open",
        ),
    )
}


def is_foreign(config: PreTrainedConfig) -> bool:
    """Tells whether the models of a configuration have caches of their own instead of the gallery's."""
    return not config.model_type.startswith(GALLERY)


def own_config(path: Path) -> tuple[str, dict[str, Any]]:
    """A user's configuration, from its file or a folder with a config.json: its name in a run, which is the file's or
    the folder's, and its arguments.

    Raises ValueError for a file that is none, or of a model type that has no causal model in transformers.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        arguments = json.loads(file.read_text(encoding="utf-8"))
        config = _configured(arguments)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--contestant {path} is no configuration of transformers: {error}") from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"--contestant {path} has the model_type {config.model_type!r}, which has no causal language model here; "
            "give one of a causal model"
        )
    named = file.parent if file.name == "config.json" else file
    return named.resolve().name.removesuffix(".json").replace(".", "_").replace(",", "_"), arguments


def own(name: str, arguments: dict[str, Any]) -> Contestant:
    """The contestant of a user's configuration, whose sizes stay as they are."""
    return Contestant(
        name,
        f"{name} (outside)",
        f"as its own configuration says, of the type {arguments['model_type']}",
        _causal,
        lambda sizes: _configured(arguments),
        "as its configuration says",
        "#000000",
        "bowtie",
        own=arguments,
    )


def _configured(arguments: dict[str, Any]) -> PreTrainedConfig:
    arguments = copy.deepcopy(arguments)
    if not isinstance(arguments, dict) or "model_type" not in arguments:
        raise ValueError("it has no model_type")
    return AutoConfig.for_model(arguments.pop("model_type"), **arguments)


# ---- training on text


class Segments(IterableDataset):
    """The batches of SegmentTrainer, as many as there are steps: {input_ids, labels}, (B, L) each, where labels hold
    the token that follows each in its document. longest: tokens of a row at most;
    longer ones are cut."""

    def __init__(self, lanes: DocumentLanes, steps: int, longest: int | None):
        self.lanes, self.steps, self.longest = lanes, steps, longest

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        place = (0, 0)
        for _ in range(self.steps):
            batch = self.lanes.batch(*place)
            place = self.lanes.after(*place)
            ids, labels = (
                _cut(batch[name], self.longest, value) for name, value in (("input_ids", 0), ("shift_labels", IGNORED))
            )
            yield {"input_ids": ids, "labels": labels}


def _cut(rows: torch.Tensor, longest: int | None, value: int) -> torch.Tensor:
    """Rows (B, L) cut into rows of at most `longest`, the last of each filled up."""
    if longest is None or rows.shape[1] <= longest:
        return rows
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % longest), value=value)
    return filled.reshape(-1, longest)  # (B * parts, longest)


class SegmentsTrainer(Trainer):
    """Trains on batches of `Segments`: the loss is the mean over all tokens that are asked for. A document's padding
    stands behind it, where no token sees it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(input_ids=inputs["input_ids"], use_cache=False)
        loss = torch.nn.functional.cross_entropy(output.logits.float().mT, inputs["labels"], ignore_index=IGNORED)
        return (loss, output) if return_outputs else loss


def positions(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text that a model can read, where positions are learned or it says so; None without
    end."""
    return getattr(config, "max_position_embeddings", None)


# ---- reading texts of any length


@torch.no_grad()
def looks_ahead(model: PreTrainedModel) -> bool:
    """Tells whether what a model says of a token changes with a token after it, as of an encoder."""
    ids = torch.arange(8, device=model.device)[None]
    other = ids.clone()
    other[:, -1] += 1
    first, second = (model.eval()(input_ids=x).logits[:, :-1] for x in (ids, other))
    return not torch.allclose(first, second, atol=1e-5)


class Reading(enum.Enum):
    """Way in which a model reads on over calls."""

    PARTS = "its cache carried from part to part"
    TOKENS = "its cache carried from token to token, since it goes on in no other way"
    SEGMENTS = "in segments that know nothing of each other"


class Reader:
    """A text that is read on, call after call, by a model from outside. ids: (B, T), T as it comes.

    reading: how it goes on, see `how`.
    """

    def __init__(self, model: PreTrainedModel, reading: Reading):
        self.model, self.reading = model, reading
        self.cache = None if reading is Reading.SEGMENTS else DynamicCache(config=model.config)
        self.begun = False
        # Some models hold a state in their modules, whatever cache they are given; a call without cache clears it.
        self._forward(torch.zeros(1, 1, dtype=torch.long, device=model.device), None)

    @torch.no_grad()
    def read(self, ids: torch.Tensor, last: bool = False) -> torch.Tensor:
        """The logits after each token (B, T, V), or after the last one (B, 1, V)."""
        singly = self.begun and self.reading is Reading.TOKENS
        self.begun = True
        found = [self._forward(part, self.cache, last) for part in (ids.split(1, dim=1) if singly else (ids,))]
        return found[-1] if last else torch.cat(found, dim=1)

    @property
    def nbytes(self) -> int:
        """Bytes of what is carried, in the cache or, as some models have it, in their modules."""
        if self.cache is None:
            return 0
        held = [value for module in self.model.modules() for value in vars(module).values()]
        for layer in self.cache.layers:
            for value in vars(layer).values():
                held += value.values() if isinstance(value, dict) else [value]
        return sum(x.nbytes for x in held if isinstance(x, torch.Tensor) and x.ndim > 1)

    def _forward(self, ids: torch.Tensor, cache: DynamicCache | None, last: bool = False) -> torch.Tensor:
        taken = inspect.signature(self.model.forward).parameters
        given: dict[str, Any] = {"use_cache": cache is not None} if "use_cache" in taken else {}
        if cache is not None:
            given[next((name for name in CACHES if name in taken), CACHES[0])] = cache
        if last and "logits_to_keep" in taken:
            given["logits_to_keep"] = 1
        logits = self.model(input_ids=ids, **given).logits
        return logits[:, -1:] if last else logits


def how(model: PreTrainedModel, part: int) -> Reading:
    """Finds how a trained model reads on over calls of `part` tokens: with its cache where that gives what one call
    over everything gives, and in segments otherwise, or where its cache grows without end: what it learned goes no
    further than the segments that it trained on."""
    if not _is_bounded(model):
        return Reading.SEGMENTS
    return carried(model, part)


def carried(model: PreTrainedModel, part: int) -> Reading:
    """The same, but caches may grow without end."""
    generator = torch.Generator().manual_seed(0)
    end = positions(model.config)
    part = max(2, part if end is None else min(part, (end - 3) // 2))
    ids = torch.randint(0, 256, (2, 2 * part + 3), generator=generator).to(model.device)
    whole = _bits(Reader(model, Reading.SEGMENTS).read(ids))
    for reading, sizes in ((Reading.PARTS, (part, part, 1, 2)), (Reading.TOKENS, (part, part + 3))):
        try:
            reader = Reader(model, reading)
            parts = [reader.read(x) for x in ids.split(sizes, dim=1)]
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            continue  # it has no such cache
        if (_bits(torch.cat(parts, dim=1)) - whole).abs().max() < ALIKE:
            return reading
    return Reading.SEGMENTS


def _bits(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), -1) / math.log(2)


def _is_bounded(model: PreTrainedModel) -> bool:
    """Tells whether what a model's cache holds has an end, as a window's and a state's."""
    cache = DynamicCache(config=model.config)
    layers = list(zip(cache.is_sliding, cache.is_linear, cache.is_dummy, strict=True))
    return bool(layers) and all(map(any, layers))
