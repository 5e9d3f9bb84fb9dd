"""Going to the Hub: `push` uploads a saved model. Its card is `render_card`'s, of cards.py."""

from __future__ import annotations

import ast
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import custom_object_save, get_relative_imports
from transformers.utils import CHAT_TEMPLATE_DIR, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

import hf_gallery

from .cards import check_repo_id, render_card, variant_of, weight_files, write_cards
from .errors import one_line
from .files import read_json, write_json
from .variants import Variant

logger = logging.getLogger(__name__)

# Files that go to the Hub beside weights and code, by exact name: what opening a model reads, and what tells about it.
# A folder may hold much else, checkpoints, optimiser states, keys and caches of texts, and none of that is anybody's
# business; so no name here is a pattern.
ABOUT = ("config.json", "generation_config.json", "README.md")
RIGHTS = tuple(f"{name}{ending}" for name in ("LICENSE", "NOTICE") for ending in ("", ".txt", ".md"))
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "target_vocab.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm"),
    *("chat_template.jinja", "chat_template.json"),
)
LONGEST = 300  # characters of a reason in a list of them
PLACE = re.compile(r"\w+\.\w+")  # MODULE.CLASS in an auto_map
LIBRARY = Path(hf_gallery.__file__).parent / "models"  # the code that save_pretrained copies


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads a folder that save_pretrained wrote, with its tokenizer and card, in one commit: all of it or nothing.

    A folder without code, as those of the zoo, goes with the library's.

    It holds the weights that transformers would load, the code that config.json and tokenizer_config.json name with
    what that imports, and the files of ABOUT, RIGHTS and TOKENIZER; a line of the log says what stays. The repository
    is made if it is not there. A folder without README.md gets the card of `render_card`. Weights that the repository
    holds and the folder does not are deleted, lest they be loaded in place of the new ones.

    repo_id: user/name, or a name of the token's owner. private: for a repository that is made. revision: a branch that
    is there, default main. token: default the one that huggingface_hub finds. Returns the repository's address.

    Raises ValueError, before anything is sent, if the folder is no whole gallery checkpoint (with a list of what is
    wrong), repo_id is no name or there is no token; and if the branch is missing or a repository that shall be private
    is public. Raises RuntimeError, with the Hub's reason, if the Hub refuses or cannot be reached.
    """
    with _with_code(Path(folder)) as whole:
        return _push(whole, repo_id, private, revision, message or f"Upload {Path(folder).resolve().name}", token)


def _push(folder: Path, repo_id: str, private: bool, revision: str | None, message: str, token: str | None) -> str:
    """Uploads a folder that brings its code, see `push`."""
    variant = check_checkpoint(folder)
    check_repo_id(repo_id)
    token = token or get_token()
    if not token:
        raise ValueError("no token for the Hub was found; run `hf auth login`, set HF_TOKEN, or give token")
    api = HfApi(token=token)
    with _told(repo_id, revision):
        if revision is not None and revision != "main":
            api.repo_info(repo_id, revision=revision)  # before the repository is made: a new one has no such branch
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        public = private and not api.repo_info(url.repo_id).private
        there = api.list_repo_files(url.repo_id, revision=revision)
    if public:
        raise ValueError(f"private is True, but {url.repo_id} is there and public; make it private there, or leave it")
    paths = _belonging(folder)
    around = {
        path.relative_to(folder).as_posix() for path in (*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*"))
    }
    stays = sorted(around - {*paths, *(path.split("/")[0] for path in paths)})
    if stays:
        shown = ", ".join(name if name.isprintable() else repr(name) for name in stays)
        logger.warning("not part of the model, so not uploaded: %s", shown)
    operations = list(_operations(folder, paths, variant, url.repo_id, there))
    with _told(repo_id, revision):
        # create_commit and not upload_folder, which may cut an upload into several commits.
        api.create_commit(url.repo_id, operations, commit_message=message, revision=revision)
    return str(url)


@contextmanager
def _with_code(folder: Path) -> Iterator[Path]:
    """The folder itself; or, of one without code that names none, as those of the zoo, a copy with the library's."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("auto_map") or any(folder.glob("*.py")):
        yield folder
        return
    variant = variant_of(folder)
    with tempfile.TemporaryDirectory(prefix="gallery-push-") as place:
        copy = Path(place) / folder.resolve().name
        shutil.copytree(folder, copy, symlinks=True, ignore=shutil.ignore_patterns("checkpoint*"))
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model: Any = variant.model(variant.config.from_dict(config))
        model.name_classes()
        custom_object_save(model, copy, config=model.config)
        write_json(copy / "config.json", config | {"auto_map": model.config.auto_map})
        yield copy


def check_checkpoint(folder: Path) -> Variant:
    """The variant whose checkpoint a folder holds.

    Raises ValueError with all that is missing or damaged: config.json, the code that its auto_map names and what that
    imports, weights, tokenizer, the metadata of README.md; and with files of those that are links to other places.
    The weights must be those of the model that config.json describes, as far as the folder's code is the library's:
    code that was changed makes another model, and is not run here.
    """
    variant, config = variant_of(folder), read_json(folder / "config.json")
    problems = [
        *_code_problems(folder, config),
        *_weight_problems(folder, variant, config),
        *_text_problems(folder),
        *_link_problems(folder),
    ]
    if problems:
        raise ValueError(
            f"{folder} is no whole checkpoint; save the model (and tokenizer) there again:\n  " + "\n  ".join(problems)
        )
    return variant


def _code_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    places = config.get("auto_map") or {}
    if not places:
        yield "config.json has no auto_map, so nobody without hf-gallery could open it"
    if not isinstance(places, dict):
        yield f"auto_map in config.json is {places!r}; it must name a class for each Auto class"
        return
    classes = []
    for auto, place in places.items():
        if not isinstance(place, str) or not PLACE.fullmatch(place):
            yield f"auto_map in config.json gives {place!r} for {auto}; it must be MODULE.CLASS, of a file beside it"
            continue
        classes.append(place.split("."))
    for name, needs in _code_files(folder, config).items():
        path = folder / f"{name}.py"
        if not name.isidentifier():
            yield f"{needs} imports .{name}, which is no module beside it; a saved model's code lies flat"
            continue
        if not path.is_file():
            yield f"{path.name} is missing, which {needs} needs"
            continue
        try:
            code = path.read_text(encoding="utf-8")
            ast.parse(code)
        except (SyntaxError, ValueError) as error:  # ValueError: no utf-8, or a null byte
            yield f"{path.name} is no Python: {one_line(error, LONGEST)}"
            continue
        for kind in sorted({kind for module, kind in classes if module == name}):
            if not re.search(rf"\b{kind}\b", code):
                yield f"{path.name} has no {kind}, which auto_map names"


def _code_files(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The modules that opening the model runs, be they there or not, and who needs each: those that the auto_map of
    the config and of the tokenizer's name, and what they import from beside them, and so on."""
    about = read_json(folder / "tokenizer_config.json")
    wanted: dict[str, str] = {}
    for source in (config, about if isinstance(about, dict) else {}):
        places = source.get("auto_map")
        for place in places.values() if isinstance(places, dict) else ():
            for one in place if isinstance(place, (list, tuple)) else (place,):  # a tokenizer's: [slow, fast]
                if isinstance(one, str) and PLACE.fullmatch(one):
                    wanted.setdefault(one.split(".")[0], "auto_map")
    left = list(wanted)
    while left:
        name = left.pop()
        path = folder / f"{name}.py"
        if not name.isidentifier():
            continue
        try:
            imported = get_relative_imports(path)  # as transformers finds them when it fetches the code
        except (OSError, ValueError):  # missing, or no utf-8
            continue
        for needed in imported:
            if needed not in wanted:
                wanted[needed] = path.name
                left.append(needed)
    return wanted


def _weight_problems(folder: Path, variant: Variant, config: dict[str, Any]) -> Iterator[str]:
    try:
        paths = weight_files(folder)
    except ValueError as error:
        yield one_line(error)
        return
    found: dict[str, tuple[int, ...]] | None = {}  # shapes by name; None where a file does not open
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:  # reads the header, and compares it with the file's length
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            found = None if found is None else found | shapes
        except FileNotFoundError:
            found = None
            yield f"{path.name} is missing, which holds weights"
        except (SafetensorError, OSError) as error:
            found = None
            yield f"{path.name} is damaged: {one_line(error, LONGEST)}"
    if found is not None and "quantization_config" not in config and not _has_own_code(folder):
        yield from _tensor_problems(variant, config, found)


def _has_own_code(folder: Path) -> bool:
    """Tells whether a file of the library was changed in the folder."""
    ours = (path for path in folder.glob("*.py") if path.is_file() and (LIBRARY / path.name).is_file())
    return any(path.read_bytes() != (LIBRARY / path.name).read_bytes() for path in ours)


def _tensor_problems(variant: Variant, config: dict[str, Any], found: dict[str, tuple[int, ...]]) -> Iterator[str]:
    """Differences of tensors of these names and shapes from those of the model that config describes."""
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in variant.auto_classes.values():
        known = ", ".join(variant.auto_classes.values())
        yield f"architectures in config.json is {named!r}; it must be a list of one of {known}"
        return
    kind = variant.classes[named[0]]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = kind(variant.config.from_dict(config))
    except Exception as error:  # a field of any type meets code of any kind
        yield f"config.json is refused by {named[0]}: {one_line(error, LONGEST)}"
        return
    state = model.state_dict(keep_vars=True)
    names_of: dict[int, list[str]] = {}  # tied weights are one parameter, and saved under one of its names
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    yield from _few(
        [f"{names[0]} is missing in the weights" for names in names_of.values() if found.keys().isdisjoint(names)]
    )
    yield from _few(
        [
            f"{name} has the shape {shape} in the weights, and {tuple(state[name].shape)} by config.json"
            for name, shape in found.items()
            if name in state and tuple(state[name].shape) != shape
        ]
    )


def _few(problems: list[str], most: int = 5) -> list[str]:
    """The first of them, and how many more there are."""
    return problems[:most] + ([f"... and so {len(problems) - most} more"] if len(problems) > most else [])


def _text_problems(folder: Path) -> Iterator[str]:
    if (folder / "generation_config.json").is_file():
        if not isinstance(read_json(folder / "generation_config.json"), dict):
            yield "generation_config.json holds no JSON object"
    if (folder / "tokenizer_config.json").is_file():
        try:
            AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers of all kinds raise errors of all kinds
            yield f"tokenizer_config.json is there, but the tokenizer does not load: {one_line(error, LONGEST)}"
    if (folder / "README.md").is_file():
        try:
            ModelCard.load(folder / "README.md")
        except Exception as error:  # YAML's errors are no ValueErrors
            yield f"README.md has metadata that cannot be read: {one_line(error, LONGEST)}"


def _link_problems(folder: Path) -> Iterator[str]:
    for path in _belonging(folder):
        if not (folder / path).resolve().is_relative_to(folder.resolve()):
            yield f"{path} is a link to a file outside of the folder; put the file itself there"


def _belonging(folder: Path) -> list[str]:
    """The files of a folder that belong to its model, by path in it."""
    config = read_json(folder / "config.json")
    names = {*ABOUT, *RIGHTS, *TOKENIZER}
    modules = _code_files(folder, config) if isinstance(config, dict) else ()
    names |= {f"{name}.py" for name in modules if name.isidentifier()}
    try:
        weights = weight_files(folder)
    except ValueError:  # an index that names none
        weights = []
    names |= {path.name for path in weights}
    if weights != [folder / SAFE_WEIGHTS_NAME]:
        names.add(SAFE_WEIGHTS_INDEX_NAME)
    # The one folder of which every file goes: transformers reads all of its templates.
    templates = (path for path in (folder / CHAT_TEMPLATE_DIR).glob("*.jinja") if not path.name.startswith("."))
    names |= {f"{CHAT_TEMPLATE_DIR}/{path.name}" for path in templates}
    return sorted(name for name in names if (folder / name).is_file())


def _operations(folder: Path, paths: list[str], variant: Variant, repo_id: str, there: list[str]) -> Iterator[Any]:
    """The operations after which the repository holds these files of the folder; `there`: what it holds now."""
    for path in paths:
        yield CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path)
    if "README.md" not in paths:
        card = render_card(variant.name, folder=folder, repo_id=repo_id)
        yield CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode())
    for path in there:
        if "/" not in path and path.endswith((".safetensors", SAFE_WEIGHTS_INDEX_NAME)) and path not in paths:
            yield CommitOperationDelete(path_in_repo=path)


@contextmanager
def _told(repo_id: str, revision: str | None) -> Iterator[None]:
    """Says in one line what the client's errors mean, and what to do."""
    try:
        yield
    except Exception as error:  # the client's own, its HTTP library's and the system's: which, depends on its version
        if revision is not None and isinstance(error, (RevisionNotFoundError, RepositoryNotFoundError)):
            raise ValueError(
                f"revision is {revision!r}, no branch of {repo_id}; make it first (`hf repos branch create {repo_id} "
                f"{revision}`), or leave it out for main"
            ) from error
        cause, said = error, [one_line(error, LONGEST)]
        while isinstance(cause.__cause__, Exception) and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
            said.append(one_line(cause, LONGEST))
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        remedy = {
            401: "The token is not valid there; run `hf auth login` for a new one",
            403: "The token may not write there; use one with write permission, or another repo_id",
        }.get(status, "Run it again: what has arrived is not sent twice")
        reason = ": ".join(dict.fromkeys(said))
        raise RuntimeError(f"{repo_id} got no commit, the upload failed: {reason}. {remedy}") from error


__all__ = ["check_checkpoint", "push", "render_card", "write_cards"]
