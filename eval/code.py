"""The code that decides a cell's numbers, as a hash, so that a result of older code is known for one.

Words do not count: comments, docstrings, and what is only shown. So a hash is taken of the syntax tree without them,
written in one way for every version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GALLERY = HERE.parent / "hf_gallery"
# Of the gallery: they decide every task.
SHARED = ("models/*.py", "data/*.py", "training/*.py", "variants.py", "harness.py")
MAKING = ("contestants", "outside", "training")  # modules of this package that make and train whoever is measured

# Arguments of the table of architectures that are read by people alone.
WORDS = frozenset({
    "title", "short", "authors", "arxiv", "paper_title", "idea", "sees", "carries", "about", "limits", "label",
    "reach", "colour", "symbol", "drawn",
})  # fmt: skip
SHOWING = frozenset({"about", "add", "columns"})  # methods of a task that come after the measurement


@functools.cache
def fingerprint(modules: tuple[str, ...]) -> str:
    """The hash of the code that decides a task's numbers: the gallery's models, data and training, and these modules
    of `eval`, beside those that make and train every contestant."""
    digest = hashlib.sha256()
    for path in (path for pattern in SHARED for path in sorted(GALLERY.glob(pattern))):
        digest.update(_tree(path, words=WORDS if path.name == "variants.py" else frozenset()))
    for module in sorted({*MAKING, *modules}):
        digest.update(_tree(HERE / f"{module}.py", showing=SHOWING))
    return digest.hexdigest()[:16]


@functools.cache
def _tree(path: Path, words: frozenset[str] = frozenset(), showing: frozenset[str] = frozenset()) -> bytes:
    """A file's name and syntax tree, without arguments of the names `words` and functions of the names `showing`."""
    found = [f"\n{path.relative_to(HERE.parent).as_posix()}\n"]
    _write(ast.parse(path.read_text(encoding="utf-8")), words, showing, found)
    return "".join(found).encode()


def _write(node: Any, words: frozenset[str], showing: frozenset[str], found: list[str]) -> None:
    """Appends a syntax tree as text: kinds of nodes and their fields, but for empty ones, which differ between
    versions of Python, and for texts that stand alone, as docstrings do."""
    if isinstance(node, list):
        found.append("[")
        for entry in node:
            if not (isinstance(entry, ast.FunctionDef) and entry.name in showing):
                _write(entry, words, showing, found)
        found.append("]")
    elif isinstance(node, ast.AST):
        found.append(f"{type(node).__name__}(")
        for name, value in ast.iter_fields(node):
            if name == "body" and isinstance(value, list):
                value = [statement for statement in value if not _is_words(statement)]
            if name == "keywords":
                value = [argument for argument in value if argument.arg not in words]
            if value is not None and value != [] and name not in ("kind", "type_comment"):
                found.append(f"{name}=")
                _write(value, words, showing, found)
        found.append(")")
    else:
        found.append(f"{node!r},")


def _is_words(statement: Any) -> bool:
    """Tells whether a statement is a text and nothing else, as a docstring is."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def by_one_version(cells: Iterable[dict[str, Any]]) -> bool:
    """Tells whether all cells of a result say that they were measured by one version of the code that decides them."""
    hashes, unknown = _hashes(cells)
    return not unknown and {len(found) for found in hashes.values()} == {1}


def told(cells: Iterable[dict[str, Any]]) -> str:
    """Tells in a sentence by how many versions of the code that decides them the cells of a result were measured. All
    cells that do not say it, as those of older results, count as of one more version."""
    cells = list(cells)
    if by_one_version(cells):
        return f"all {len(cells)} cells by one version of the code that decides them"
    hashes, unknown = _hashes(cells)
    if unknown == len(cells):
        return f"{unknown} cells, which do not say by which version of the code they were measured"
    versions = max(map(len, hashes.values())) + (unknown > 0)
    parts = [f"{task} by {len(found)}" for task, found in hashes.items() if len(found) > 1]
    if unknown:
        parts.append(f"{unknown} cells do not say by which")
    return f"{len(cells)} cells by {versions} versions of the code that decides them: {', '.join(parts)}"


def _hashes(cells: Iterable[dict[str, Any]]) -> tuple[dict[str, set[str]], int]:
    """The hashes of each task's cells, and how many cells have none."""
    hashes: dict[str, set[str]] = {}
    unknown = 0
    for cell in cells:
        found = hashes.setdefault(cell["task"], set())
        if "code" in cell:
            found.add(cell["code"])
        else:
            unknown += 1
    return hashes, unknown
