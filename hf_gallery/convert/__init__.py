"""Published checkpoints to gallery checkpoints: `convert`."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from . import transformer_xl
from .bert import Bert
from .checkpoint import Format, Source, carry_out, check, quiet
from .gpt2 import GPT2
from .longformer import Longformer
from .marian import Marian

FORMATS: Sequence[Format] = [
    transformer_xl.TransfoXL(),
    transformer_xl.ModelPt(),
    Longformer(),
    Bert(),
    GPT2(),
    Marian(),
]

# What a conversion reads of a repository: configs and tokenizer files, then weights of the first kind that is there.
ABOUT = ["*.json", "*.txt", "*.model", "*.spm", "vocab.pkl", "vocab.bin"]
WEIGHTS = [["model*.safetensors"], ["pytorch_model*.bin"], ["model.pt"]]


def convert(
    source: str | Path, out: str | Path, *, to: str | None = None, revision: str | None = None, **options: Any
) -> Path:
    """Writes a published checkpoint as a gallery checkpoint: a folder as save_pretrained writes it, with weights in
    safetensors, config, code, and the tokenizer where the source has one. Returns its path.

    source: a local folder, or the id of a repository on the Hub, of which revision is taken; no code of it is run.
    to: what it becomes, where there is a choice. options: those of the format, see `plan` in its module.

    Raises ValueError if the source is not recognised, its config asks for what the gallery lacks, its tensors do not
    fit (with a list of all that do not), or out holds something already. Nothing is written unless all is right.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"{out} holds something already; give a folder that is empty or not there")
    opened = Source(_fetch(source, revision))
    form = next((form for form in FORMATS if form.recognises(opened)), None)
    if form is None:
        raise ValueError(
            f"{source} is no checkpoint that can be converted: its config.json gives model_type "
            f"{opened.config.get('model_type')!r}; there are {', '.join(form.name for form in FORMATS)}"
        )
    _check_arguments(form, to, options)
    plan = form.plan(opened, to or form.targets[0], **options)
    check(plan, opened)
    model = carry_out(plan, opened)
    tokenizer = None if plan.tokenizer is None else plan.tokenizer(opened)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    try:
        with quiet():
            model.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        if out.is_dir():
            out.rmdir()
        os.replace(beside, out)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def _fetch(source: str | Path, revision: str | None) -> Path:
    """The source's local folder."""
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {source} is a local folder; revisions are the Hub's")
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)) or folder.is_file():
        raise ValueError(f"source is {str(source)!r}; it must be a local folder or the id of a repository on the Hub")
    for weights in WEIGHTS:
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=ABOUT + weights))
        if any(path for pattern in weights for path in folder.glob(pattern)):
            break
    return folder


def _check_arguments(form: Format, to: str | None, options: dict[str, Any]):
    if to is not None and to not in form.targets:
        raise ValueError(f"to is {to!r}; a {form.name} checkpoint can become {', '.join(form.targets)}")
    accepted = list(inspect.signature(form.plan).parameters)[2:]
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise ValueError(f"{form.name} has no option {', '.join(unknown)}; it has {', '.join(accepted) or 'none'}")


__all__ = ["FORMATS", "convert"]
