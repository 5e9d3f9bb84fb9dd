"""The example in the docstring of every public class runs, and gives what it says."""

import doctest

import pytest

import hf_gallery


@pytest.mark.parametrize("name", hf_gallery.__all__)
def test_a_docstrings_example_runs(name):
    public = getattr(hf_gallery, name)
    found = doctest.DocTestFinder(recurse=False).find(public, name)
    assert sum(len(example.examples) for example in found) > 0, f"{name} has no example"
    for example in found:
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(example)
        assert runner.summarize(verbose=False).failed == 0
