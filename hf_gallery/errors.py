"""Messages of errors, in one line."""

from __future__ import annotations

import re

PLAIN = (
    ValueError,
    OSError,
    ImportError,
    RuntimeError,
    SyntaxError,
)  # say by themselves what is wrong; a KeyError says a key


def one_line(error: BaseException, longest: int | None = None) -> str:
    """All of what an error says in one line, cut to `longest` characters; its type where it says nothing. Those whose
    words alone say little, as a KeyError's, are named. Control characters, which may come from names of files, are
    spelt out."""
    text = re.sub(r"(?<=[:;,.!?])\s*\n\s*", " ", str(error).strip())
    text = re.sub(r"\s*\n\s*", "; ", text)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if not text or not isinstance(error, PLAIN):
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if longest is None or len(text) <= longest else text[: longest - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without the advice that may follow; its type where it says nothing."""
    return lines(error)[0]


def lines(error: BaseException) -> list[str]:
    """The lines of an error's message; its type where it has none."""
    return str(error).strip().splitlines() or [type(error).__name__]
