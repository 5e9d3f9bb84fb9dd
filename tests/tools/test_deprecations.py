"""Deprecated calls of our own code are errors in every test; those that libraries make of each other are not."""

import warnings
from types import ModuleType

import pytest
from deprecations import errors


def library(name, source):
    """A module that is not of the project, with functions from `source`."""
    module = ModuleType(name)
    exec(compile(source, f"/usr/lib/{name}.py", "exec"), module.__dict__)
    return module


LIBRARY = """
import logging, warnings

def old():
    warnings.warn("old() is deprecated", FutureWarning)

def logs():
    logging.getLogger("transformers.models").warning("logs() is deprecated and will be removed")

def deep():
    old()
"""


@pytest.mark.parametrize("function", ["old", "logs", "deep"])
def test_a_deprecated_call_of_ours_is_an_error(function):
    call = getattr(library("numpy", LIBRARY), function)
    with errors(), pytest.raises((FutureWarning, DeprecationWarning), match="deprecated"):
        call()


@pytest.mark.parametrize("function", ["old", "logs", "deep"])
def test_a_deprecated_call_of_one_library_in_another_is_not(function):
    between = library("pandas", "def call(function):\n    return function()")
    with warnings.catch_warnings(record=True) as told, errors():
        warnings.simplefilter("always")
        between.call(getattr(library("numpy", LIBRARY), function))
    assert len(told) == (function != "logs"), "it is shown as ever"
