"""Going to the Hub: `push` uploads a saved model. Its card is `render_card`'s, of cards.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_relative_imports

from .cards import render_card, variant_of, weight_files, write_cards
from .files import read_json
from .variants import Variant

# What a Trainer leaves beside a model, and what is hidden: of no use to who loads the model, and partly pickles.
LEFT_OUT = ["checkpoint-*/*", "runs/*", "__pycache__/*", ".*", "*/.*", "*.bin", "*.pt", "*.pth", "trainer_state.json"]


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

    The repository is made if it is not there. A folder without README.md gets the card of `render_card`. Weights that
    the repository holds and the folder does not are deleted, lest they be loaded in place of the new ones.

    repo_id: user/name, or a name of the token's owner. private: for a repository that is made. revision: a branch that
    is there, default main. token: default the one that huggingface_hub finds. Returns the repository's address.

    Raises ValueError, before anything is sent, if the folder is no whole gallery checkpoint (with a list of what is
    wrong), repo_id is no name or there is no token; and if the branch is missing or a repository that shall be private
    is public. Raises RuntimeError, with the Hub's reason, if the Hub refuses or cannot be reached.
    """
    folder = Path(folder)
    variant = check_checkpoint(folder)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}; it must be USER/NAME. {_one_line(error)}") from error
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
    operations = list(_operations(folder, variant, url.repo_id, there))
    with _told(repo_id, revision):
        # create_commit and not upload_folder, which may cut an upload into several commits.
        message = message or f"Upload {folder.resolve().name}"
        api.create_commit(url.repo_id, operations, commit_message=message, revision=revision)
    return str(url)


def check_checkpoint(folder: Path) -> Variant:
    """The variant whose checkpoint a folder holds.

    Raises ValueError with all that is missing or damaged: config.json, the code that its auto_map names and what that
    imports, weights, tokenizer, the metadata of README.md.
    """
    variant, config = variant_of(folder), read_json(folder / "config.json")
    problems = [*_code_problems(folder, config), *_weight_problems(folder), *_text_problems(folder)]
    if problems:
        raise ValueError(
            f"{folder} is no whole checkpoint; save the model (and tokenizer) there again:\n  " + "\n  ".join(problems)
        )
    return variant


def _code_problems(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    if not config.get("auto_map"):
        yield "config.json has no auto_map, so nobody without hf-gallery could open it"
    wanted = {place.split(".")[0]: "auto_map" for place in (config.get("auto_map") or {}).values()}
    left = list(wanted)
    while left:
        name = left.pop()
        path = folder / f"{name}.py"
        if not path.is_file():
            yield f"{path.name} is missing, which {wanted[name]} needs"
            continue
        for needed in get_relative_imports(path):
            if needed not in wanted:
                wanted[needed] = path.name
                left.append(needed)


def _weight_problems(folder: Path) -> Iterator[str]:
    try:
        paths = weight_files(folder)
    except ValueError as error:
        yield _one_line(error)
        return
    for path in paths:
        try:
            with safe_open(path, framework="pt"):  # reads the header, and compares it with the file's length
                pass
        except FileNotFoundError:
            yield f"{path.name} is missing, which holds weights"
        except (SafetensorError, OSError) as error:
            yield f"{path.name} is damaged: {_one_line(error)}"


def _text_problems(folder: Path) -> Iterator[str]:
    if (folder / "tokenizer_config.json").is_file():
        try:
            AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers of all kinds raise errors of all kinds
            yield f"tokenizer_config.json is there, but the tokenizer does not load: {_one_line(error)}"
    if (folder / "README.md").is_file():
        try:
            ModelCard.load(folder / "README.md")
        except Exception as error:  # YAML's errors are no ValueErrors
            yield f"README.md has metadata that cannot be read: {_one_line(error)}"


def _operations(folder: Path, variant: Variant, repo_id: str, there: list[str]) -> Iterator[Any]:
    """What makes the repository hold the folder; `there` is what it holds."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = list(filter_repo_objects(paths, ignore_patterns=LEFT_OUT))
    for path in paths:
        yield CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path)
    if "README.md" not in paths:
        card = render_card(variant.name, folder=folder, repo_id=repo_id)
        yield CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode())
    weights = filter_repo_objects(there, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
    for path in weights:
        if path not in paths and "/" not in path:
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
        cause, said = error, [_one_line(error)]
        while isinstance(cause.__cause__, Exception) and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
            said.append(_one_line(cause))
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        remedy = {
            401: "The token is not valid there; run `hf auth login` for a new one",
            403: "The token may not write there; use one with write permission, or another repo_id",
        }.get(status, "Run it again: what has arrived is not sent twice")
        reason = ": ".join(dict.fromkeys(said))
        raise RuntimeError(f"{repo_id} got no commit, the upload failed: {reason}. {remedy}") from error


def _one_line(error: BaseException, longest: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


__all__ = ["check_checkpoint", "push", "render_card", "write_cards"]
