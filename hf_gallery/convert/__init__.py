"""Published checkpoints to gallery checkpoints: `convert`."""

from __future__ import annotations

import difflib
import inspect
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from . import transformer_xl
from .bart import LED, Bart
from .bert import Bert
from .checkpoint import Format, Source, carry_out, check, check_sizes, quiet
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
    Bart(),
    LED(),
]

# Files that a conversion reads of a repository: configs and tokenizer files, then weights of the first kind that is
# there.
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
    target = _target(out)  # before the work: what is wrong with it shows at once
    opened = Source(_fetch(source, revision))
    form = next((form for form in FORMATS if form.recognises(opened)), None)
    if form is None:
        raise ValueError(
            f"{source} is no checkpoint that can be converted: its config.json gives model_type "
            f"{opened.config.get('model_type')!r}; there are {', '.join(form.name for form in FORMATS)}"
        )
    if f"{to}_transformer" in form.targets:  # the short name will do
        to = f"{to}_transformer"
    _check_arguments(form, to, options)
    check_sizes(opened)
    plan = form.plan(opened, to or form.targets[0], **options)
    check(plan, opened)
    model = carry_out(plan, opened)
    tokenizer = None if plan.tokenizer is None else plan.tokenizer(opened)
    with _all_or_nothing(target) as folder, quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out)


def check_settings(settings: Mapping[str, Any]):
    """Raises ValueError if settings that shall be options of `convert` have a name of its own arguments, which Python
    would refuse with a TypeError."""
    own = [name for name in inspect.signature(convert).parameters if name in settings and name != "options"]
    if own:
        raise ValueError(f"{own[0]} is no option of a format but an argument of the conversion; give it as such")


def _target(out: str | Path) -> Path:
    """The folder to write, in full: "." has no name to put another beside, and a link may lead elsewhere."""
    target = Path(out).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} holds something already; give a folder that is empty or not there")
    nearest = next(path for path in (target, *target.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"{out} cannot be made: {nearest} is no folder")
    return target


@contextmanager
def _all_or_nothing(target: Path) -> Iterator[Path]:
    """A folder to write to, which becomes the target at the end; if anything fails, all is as it was.

    An empty folder that is there stays, and is filled: it may be the current one of a shell, or a mount.
    """
    there = _target(target).is_dir()  # once more: the work may have taken minutes
    made = [] if there else [path for path in target.parents if not path.exists()]
    folder = (target if there else target.parent) / f".{target.name}.{uuid.uuid4().hex}"
    moved: list[Path] = []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield folder
        if there:
            # The config last: without it nobody takes the folder for a model.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
                moved.append(target / path.name)
                os.replace(path, target / path.name)
            folder.rmdir()
        else:
            os.replace(folder, target)
    except BaseException:
        for path in (folder, *moved):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        for path in made:  # the deepest first
            with suppress(OSError):
                path.rmdir()
        raise


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
        near = difflib.get_close_matches(unknown[0], accepted, n=1)
        hint = f"did you mean {near[0]}? It has" if near else "it has"
        raise ValueError(f"{form.name} has no option {', '.join(unknown)}; {hint} {', '.join(accepted) or 'none'}")


__all__ = ["FORMATS", "check_settings", "convert"]
