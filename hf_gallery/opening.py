"""A saved model by the name that a user types: a folder, or a repository on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .cards import weight_files
from .errors import one_line
from .files import read_json
from .variants import VARIANTS, Variant

LONGEST = 300  # characters of a library's own reason


def open_causal(name: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal model and the tokenizer that a folder or a repository on the Hub holds; no code of it is run.

    Raises ValueError as `check_causal` does, and where weights or tokenizer do not open.
    """
    check_causal(name, revision)
    return _open(name, revision, AutoModelForCausalLM)


def open_stack(name: str, revision: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of one stack of layers, causal or an encoder, under the head that it was saved with, and the
    tokenizer; as `open_causal`."""
    variant, named = _check_saved(name, revision)
    if not named or variant.causal.__name__ in named:
        return _open(name, revision, AutoModelForCausalLM)
    kind = variant.classes.get(named[0])
    if kind is None:
        raise ValueError(f"{name} holds a {named[0]}, which is no head of {variant.title}; save the model again")
    if kind.__name__ == variant.auto_classes.get("AutoModelForSeq2SeqLM"):
        raise ValueError(f"{name} holds a {named[0]}, an encoder-decoder; give a model of one stack of layers")
    return _open(name, revision, kind)


def _open(name: str, revision: str | None, kind: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = dict(revision=revision or "main", trust_remote_code=False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise ValueError(
            f"{name} has no tokenizer that opens: {one_line(error, LONGEST)}; save its own beside the model"
        ) from error
    try:
        model = kind.from_pretrained(name, **options)
    except Exception as error:  # damaged files fail in the words of whichever library reads them
        raise ValueError(f"the weights of {name} do not open: {one_line(error, LONGEST)}") from error
    return model, tokenizer


def check_causal(name: str, revision: str | None = None):
    """Raises ValueError unless a folder, or a repository on the Hub, holds a causal model of the gallery; it says what
    is there instead, and what to do."""
    variant, named = _check_saved(name, revision)
    causal = variant.causal.__name__
    if named and causal not in named:
        raise ValueError(f"{name} holds a {named[0]}; a {causal} is needed, which continues text")


def _check_saved(name: str, revision: str | None) -> tuple[Variant, list[str]]:
    """The architecture that a folder, or a repository on the Hub, holds, and the classes that it was saved as, none if
    it does not say. Raises ValueError as `check_causal`."""
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"--revision is {revision!r}, but {name} is a local folder; revisions are the Hub's")
        _check_folder(folder)
        about = read_json(folder / "config.json")
    elif folder.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"{name!r} is {'a file' if folder.exists() else 'no folder'}; give the folder of a saved model"
        )
    else:
        try:
            about = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False).to_dict()
        except Exception as error:  # of the network, of the Hub, of a config that is none
            raise ValueError(
                f"{name!r} is no folder here, and no model that the Hub could give: {one_line(error, LONGEST)}"
            ) from error
    kinds = {variant.config.model_type: variant for variant in VARIANTS.values()}
    kind, named = about.get("model_type"), about.get("architectures") or []
    if kind not in kinds:
        raise ValueError(
            f"{name} holds a {kind}, which is no model of the gallery; where it can be made one, `hf-gallery convert "
            f"{name} OUT` does it"
        )
    return kinds[kind], named


def _check_folder(folder: Path):
    """Raises ValueError unless the folder holds a model of the gallery, and says what lies there instead."""
    if not (folder / "config.json").is_file():
        if not any(folder.iterdir()):
            raise ValueError(f"{folder} is empty; give the folder that `hf-gallery train` or save_pretrained wrote")
        if (folder / "checkpoints").is_dir():
            raise ValueError(
                f"{folder} holds a training that has not ended, and no model yet; go on with `hf-gallery train ... "
                "--resume`, or give one of its checkpoints"
            )
        raise ValueError(
            f"{folder} holds no model: there is no config.json; give the folder that save_pretrained wrote"
        )
    about = read_json(folder / "config.json")
    if not isinstance(about, dict) or not isinstance(about.get("model_type"), str):
        raise ValueError(f"{folder / 'config.json'} is no configuration of a model; save the model there again")
    missing = [path.name for path in weight_files(folder) if not path.is_file()]
    if missing and not any(folder.glob("pytorch_model*.bin")):  # which transformers opens too
        raise ValueError(
            f"{folder} has a config.json, but no weights: {', '.join(missing)}; save the model there again"
        )
    for path in (*weight_files(folder), folder / "tokenizer.json", folder / "tokenizer_config.json"):
        if path.is_file() and not path.stat().st_size:
            raise ValueError(f"{path} is an empty file; save model and tokenizer there again")
