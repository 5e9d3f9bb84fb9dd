"""Text and JSON files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .models.files import whole_file


def write_text(path: Path, text: str) -> None:
    """Writes text (UTF-8) to path at once: a reader, or a kill, sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes value as readable JSON, at once. Raises ValueError for NaN and infinities: no plot could show them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; None if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # the last: brackets without end
        return None
