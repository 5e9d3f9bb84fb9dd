"""Parts of every conversion: a published checkpoint, the plan of where its tensors go, and its execution.

A `Source` is read lazily, so nothing of it is in memory before it is needed. A format's `plan` says for every
parameter of the gallery's model which source tensors make it. `check` compares plan and source without loading a
weight, and `carry_out` builds the model. Both trust nothing that they read: tensors only, never code.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import first_line, lines
from ..models.configuration_base import MOST

WEIGHT_FILES = (  # in order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "source.spm", "sentencepiece.bpe.model")
AGAIN = "fetch the source's files again"
LONGEST_JSON = 2**27  # bytes
# Fields of the sources' configs that count something there are tensors of.
LAYERS = ("n_layer", "num_hidden_layers", "encoder_layers", "decoder_layers")
SIZES = (
    *("vocab_size", "decoder_vocab_size", "n_positions", "n_ctx", "max_position_embeddings", "type_vocab_size"),
    *("max_encoder_position_embeddings", "max_decoder_position_embeddings"),
    *("n_embd", "hidden_size", "d_model", "d_embed", "d_head", "n_inner", "d_inner", "intermediate_size"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "n_head", "num_attention_heads", "encoder_attention_heads"),
    *("decoder_attention_heads", "num_labels", "div_val"),
)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, each read when it is asked for.

    Reads safetensors and torch files, single or in shards with an index. A torch file is opened with
    weights_only=True, so that it can hold nothing but tensors, and mapped into memory where its format allows.

    Raises ValueError, with the file's path, if there are no weights, a shard is missing, or a file is damaged or holds
    anything but plain tensors.
    """

    def __init__(self, folder: Path):
        self.path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
        if self.path is None:
            raise ValueError(f"{folder} holds no weights; one of {', '.join(WEIGHT_FILES)} must be there")
        self._places: dict[str, tuple[Path, Any, str]] = {}  # name: the file, its content, the name in it
        for path in self._paths(folder):
            content = _open(path)
            for name in content.keys():  # noqa: SIM118 - safe_open has keys() and is no mapping
                if _modern(name) in self._places:
                    raise ValueError(f"{self.path} holds {_modern(name)} twice")
                self._places[_modern(name)] = path, content, name

    def _paths(self, folder):
        if self.path.suffix != ".json":
            return [self.path]
        places = read_json(self.path).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ValueError(
                f"{self.path} has no weight_map, an object with the name of a file for each tensor; {AGAIN}"
            )
        for name in places.values():
            if (folder / name).name != name or not (folder / name).is_file():
                raise ValueError(f"{self.path} names the shard {name!r}, which is not in {folder}; {AGAIN}")
        return [folder / name for name in sorted(set(places.values()))]

    def __getitem__(self, name: str) -> Tensor:
        path, content, own = self._places[name]
        if isinstance(content, dict):
            return content[own]
        try:
            return content.get_tensor(own)
        except Exception as error:  # a type that this torch lacks, say
            raise ValueError(f"{path} holds {own}, which cannot be read ({first_line(error)})") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; nothing is read."""
        _, content, own = self._places[name]
        return tuple(content[own].shape if isinstance(content, dict) else content.get_slice(own).get_shape())

    def meta(self, name: str) -> Tensor:
        """A tensor of the same shape and type on the meta device; nothing is read."""
        _, content, own = self._places[name]
        if isinstance(content, dict):
            return content[own].to("meta")
        about = content.get_slice(own)
        return torch.empty(about.get_shape(), dtype=FLOATS.get(about.get_dtype(), torch.long), device="meta")


def _open(path: Path):
    """A safetensors handle, or a dictionary of name to tensor."""
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            raise ValueError(f"{path} is no safetensors file, or is damaged ({first_line(error)}); {AGAIN}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects other than tensors, or is damaged. Unpickling objects could run any code, so it is "
            "not opened. If you trust it, load it yourself and save its state_dict()"
        ) from error
    except Exception as error:  # what a damaged file makes of the unpickler can be anything
        raise ValueError(f"{path} is no torch file, or is damaged ({first_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise ValueError(f"{path} holds no state_dict, a dictionary of names to tensors; save model.state_dict()")
    for name, x in content.items():
        plain = x.layout == torch.strided and not x.is_nested and not x.is_quantized and x.device.type == "cpu"
        # One number may be told to stand in a million places; copied, it would.
        if not plain or x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise ValueError(
                f"{path} holds {name}, which is no plain tensor; save it dense, as floating-point numbers"
            )
    return content


def _modern(name: str) -> str:
    """A norm's parameters under torch's names: files from TensorFlow days say gamma and beta."""
    return re.sub(r"(LayerNorm)\.gamma$", r"\1.weight", re.sub(r"(LayerNorm)\.beta$", r"\1.bias", name))


@dataclass
class Source:
    """A published checkpoint in a local folder: its config.json ({} without one) and its tensors."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        return read_json(path) if path.is_file() else {}

    @cached_property
    def tensors(self) -> Tensors:
        return Tensors(self.folder)


@dataclass(frozen=True)
class Take:
    """Makes one parameter of the gallery's model: `make` of the source tensors `names`.

    `make` is first called with tensors on the meta device, to learn the shape of its result, so it must not look at
    values.
    """

    names: tuple[str, ...]
    make: Callable[..., Tensor] = lambda tensor: tensor


@dataclass
class Plan:
    """The places that the tensors of a source go to.

    model, config: a gallery class and its configuration. take: for every parameter and buffer that the model saves,
    but for those tied to another, what makes it. fresh: parameters that the source has no counterpart of; they keep
    the model's own initialisation. ignore: patterns (re.fullmatch) of source names that carry no weights. copies:
    source names that hold what another source name holds, as tied weights do in torch files; they must be equal.
    tokenizer: makes the tokenizer to save beside the model from the source, or None if it has none.
    """

    model: type[PreTrainedModel]
    config: PreTrainedConfig
    take: dict[str, Take]
    fresh: set[str] = field(default_factory=set)
    ignore: tuple[str, ...] = ()
    copies: dict[str, str] = field(default_factory=dict)
    tokenizer: Callable[[Source], Any] | None = None


class Format(Protocol):
    """One family of checkpoints: how it is recognised and converted."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def targets(self) -> tuple[str, ...]:
        """The architectures that it can become, the default first."""

    def recognises(self, source: Source) -> bool:
        """Tells whether the source is of this format, from its config or its files' names."""

    @property
    def plan(self) -> Callable[..., Plan]:
        """plan(source, to, ...), the options as further arguments. Raises ValueError for what has no counterpart in
        the gallery, naming the field and its value."""


# ---------------------------------------------------------------------------------------------------- for formats


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, with the path, if it is none."""
    if path.stat().st_size > LONGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; a JSON file of a model has a few million")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for brackets without end
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


Config = TypeVar("Config", bound=PreTrainedConfig)


def as_config(kind: type[Config], fields: Mapping[str, Any]) -> Config:
    """The fields of a source's config as a class of transformers holds them.

    Raises ValueError, naming the field and its value, for one that the class does not take.
    """
    try:
        return kind.from_dict(dict(fields))
    except Exception as error:  # the class's own check of types, or what comes of a value that it does not check
        for name, value in fields.items():  # nobody else says which: look for the one that fails alone
            try:
                kind.from_dict({name: value})
            except Exception as alone:
                if str(alone) == str(error):
                    raise ValueError(
                        f"{name} is {value!r}, which {kind.__name__} does not take: {lines(error)[-1].strip()}"
                    ) from error
        raise ValueError(f"the config is no {kind.__name__}: {error}") from error


def only(config: Mapping[str, Any], **accepted: tuple[Any, ...]):
    """Raises ValueError if a field of a source's config has a value that the gallery has no counterpart of.

    accepted: for each field the values that may stand there; a field that is absent passes.
    """
    wrong = [
        f"{name} is {config[name]!r}; the gallery has {' or '.join(map(repr, values))}"
        for name, values in accepted.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise ValueError("the source's config asks for what the gallery does not have:\n  " + "\n  ".join(wrong))


def copy_tokenizer(source: Source):
    """The source's own tokenizer as transformers opens it, without remote code; None if it has no tokenizer files."""
    if not any((source.folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError):  # they say what to install, and which file
        raise
    except Exception as error:
        raise ValueError(
            f"the tokenizer in {source.folder} cannot be opened ({first_line(error)}); {AGAIN}, or take them away"
        ) from error


# ------------------------------------------------------------------------------------------------------ the engine


def check_sizes(source: Source):
    """Raises ValueError for a size in the source's config that its tensors rule out, with the field's name, before
    anything is built by it."""
    shapes = [shape for shape in map(source.tensors.shape, source.tensors) if 0 not in shape]
    widest = max((size for shape in shapes for size in shape), default=0)
    for fields, most, why in (
        (LAYERS, len(shapes), f"there are {len(shapes)} tensors, and a layer has one at least"),
        (SIZES, max(widest, MOST), f"the largest of the tensors is {widest} long"),
    ):
        for name in fields:
            value = source.config.get(name)
            if isinstance(value, (int, float)) and not value <= most:
                raise ValueError(f"{source.folder} is damaged: its config says {name} {value!r}, but {why}; {AGAIN}")


def check(plan: Plan, source: Source):
    """Raises one ValueError with all that does not fit between plan and source. No weight is read for it, but where
    two must be equal."""
    with torch.device("meta"):
        model = plan.model(plan.config)
    wanted = model.state_dict()
    made = {*plan.take, *plan.fresh, *model.all_tied_weights_keys}
    problems = [f"the plan has no source for {name}" for name in wanted if name not in made]
    problems += [f"the plan makes {name}, which the model does not have" for name in plan.take if name not in wanted]
    problems += [f"fresh names {name}, which the model does not have" for name in plan.fresh if name not in wanted]
    for name, take in plan.take.items():
        if name in wanted:
            problems += _problems_of(name, take, tuple(wanted[name].shape), source.tensors)
    problems += _leftovers(plan, source.tensors)
    problems += _differences(plan, source.tensors)
    if problems:
        raise ValueError(f"{source.folder} does not fit {plan.model.__name__}:\n  " + "\n  ".join(problems))


def _problems_of(name, take, shape, tensors) -> list[str]:
    missing = [n for n in take.names if n not in tensors]
    if missing:
        return [f"missing {n}, for {name}" for n in missing]
    given = [tensors.meta(n) for n in take.names]
    described = ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(take.names, given, strict=True))
    integers = [n for n, x in zip(take.names, given, strict=True) if not x.is_floating_point()]
    if integers:
        return [f"{n} does not hold floating-point numbers, for {name}" for n in integers]
    try:
        made = tuple(take.make(*given).shape)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return [f"{described} cannot make {name} {shape}: {first_line(error)}"]
    return [] if made == shape else [f"{described} makes {made}, but {name} is {shape}"]


def _leftovers(plan, tensors) -> list[str]:
    taken = {n for take in plan.take.values() for n in take.names}
    used = taken | {name for pair in plan.copies.items() for name in pair}
    ignored = [re.compile(pattern) for pattern in plan.ignore]
    left = [n for n in tensors if n not in used and not any(pattern.fullmatch(n) for pattern in ignored)]
    return [f"unknown {n} {tuple(tensors.meta(n).shape)}" for n in left]


def _differences(plan, tensors) -> list[str]:
    same: dict[str, list[str]] = {}
    for name, original in plan.copies.items():
        same.setdefault(original, [original]).append(name)
    problems = []
    for names in same.values():
        present = [n for n in names if n in tensors]
        differ = [n for n in present[1:] if not _equal(tensors[n], tensors[present[0]])]
        problems += [f"{n} and {present[0]} differ, though the config says that they are one" for n in differ]
    return problems


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape or torch.equal(a, b)


@torch.no_grad()
def carry_out(plan: Plan, source: Source) -> PreTrainedModel:
    """The gallery's model with the source's weights, in the widest of their types.

    A weight that is taken as it stands stays mapped to its file; others are made one after the other.
    """
    state = {}
    for name, take in plan.take.items():
        state[name] = take.make(*(source.tensors[n] for n in take.names)).contiguous()
    dtype = reduce(torch.promote_types, (x.dtype for x in state.values()))
    plan.config.architectures = [plan.model.__name__]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)  # the fresh parameters: the same folder from the same source
        model = plan.model.from_pretrained(None, config=plan.config, state_dict=state, dtype=dtype)
    if model.can_generate():
        _take_over_generation(model, source)
    return model.eval()


def _take_over_generation(model: PreTrainedModel, source: Source):
    path = source.folder / "generation_config.json"
    try:
        if path.is_file():
            read_json(path)
            model.generation_config = GenerationConfig.from_pretrained(source.folder)
        else:  # older checkpoints keep the settings of generate() in their config
            path = source.folder / "config.json"
            known = vars(model.generation_config)
            model.generation_config.update(**{name: x for name, x in source.config.items() if name in known})
    except Exception as error:
        raise ValueError(f"the settings of generate() in {path} are not what transformers takes: {error}") from error


@contextmanager
def quiet():
    """Without transformers' report of missing weights, which are those that shall be fresh, and its bars."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
