"""Files that are whole or absent: written beside their place, then moved over it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends well, and goes when it does not.

    A reader, or a kill, sees the old file or the new one, never a part. As with any file that is written, a new one
    may be read by whom the umask says, an old one by whom it could be read before, and where `path` is a link the
    file that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}.part")
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = (path if path.exists() else beside).stat().st_mode
    try:
        yield beside
        os.chmod(beside, mode)  # safetensors makes a file of its own there, and keeps it to itself
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
