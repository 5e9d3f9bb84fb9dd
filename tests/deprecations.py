"""Deprecated calls that our own code makes are errors; those that libraries make of each other are theirs to mend.

A warning's stack level says little of who is to blame: transformers warns on its own behalf where a caller uses an old
name. So the stack decides: whoever called into the package that warns, be it through several of its functions, caused
the warning. Libraries that warn by logging (transformers' `logger.warning_once`) are held to the same.
"""

import logging
import re
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

TESTS = str(Path(__file__).parent)
OURS = {"hf_gallery", "eval", "transformers_modules"}  # the last: our code as a saved model carries it
KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
# They stand between a caller and what it calls.
BETWEEN = {"warnings", "logging", "functools", "contextlib", "typing_extensions", __name__}
WORDS = re.compile("deprecat|will be removed", re.IGNORECASE)
LOGGERS = ("transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub", "lm_eval", "torch")
ALLOWED = re.compile(
    "|".join(
        (
            # The gallery takes and gives both names; this is the one that every release has which setup.py allows.
            r"`past_key_values`/`cache_params` are deprecated",
            # Said to us, though it is torch that calls its own old code.
            r"torch\.jit\.",
            r"Enum subclass",
        )
    )
)


def caused_by_us(frame):
    """Tells whether the code that called into the package of `frame`, the one that warns, is the project's."""
    warning = None
    while frame is not None:
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package not in BETWEEN:
            ours = package in OURS or frame.f_code.co_filename.startswith(TESTS)
            if warning is not None and package != warning:
                return ours
            warning = None if ours else package
            if ours:
                return False  # a warning of our own
        frame = frame.f_back
    return False


class Listener(logging.Handler):
    """Raises DeprecationWarning for what a library logs of a deprecated call of ours."""

    def emit(self, record):
        said = record.getMessage()
        if WORDS.search(said) and not ALLOWED.search(said) and caused_by_us(sys._getframe()):
            raise DeprecationWarning(said)


@contextmanager
def errors():
    """Inside, a deprecated call of the project's code raises the warning that it causes."""
    show, listener = warnings.showwarning, Listener(logging.WARNING)

    def judge(message, category, *where, **more):
        if issubclass(category, KINDS) and not ALLOWED.search(str(message)) and caused_by_us(sys._getframe()):
            raise category(message)
        show(message, category, *where, **more)

    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addHandler(listener)
    warnings.showwarning = judge
    try:
        yield
    finally:
        warnings.showwarning = show
        for logger in loggers:
            logger.removeHandler(listener)
