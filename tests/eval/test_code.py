"""Each cell says by which code it was measured: words may change, and numbers of older code are known for it."""

import pytest
import torch
from rich.console import Console

from eval import benchmark, code, presets, report
from eval.cells import Cell, Run
from hf_gallery.files import read_json, write_json

CPU = torch.device("cpu")


def tree(tmp_path, monkeypatch, source, **arguments):
    """The hash of a file of that content."""
    monkeypatch.setattr(code, "HERE", tmp_path / "eval")
    path = tmp_path / "module.py"
    path.write_text(source)
    code._tree.cache_clear()
    return code._tree(path, **arguments)


def test_words_do_not_count_and_all_else_does(tmp_path, monkeypatch):
    def of(source, **arguments):
        return tree(tmp_path, monkeypatch, source, **arguments)

    plain = of("class Plain:\n    x = 1\n\n    def f(self):\n        return self.x + 1\n")
    worded = '"""Of it."""\n\nclass Plain:  # that is\n    """A plain one."""\n\n    x = 1\n\n'
    worded += '    def f(self):\n        """Gives."""\n'
    assert of(worded + "        return self.x + 1\n") == plain
    assert of(worded + "        return self.x + 2\n") != plain
    assert of("x = 'text'\n") != of("x = 'other'\n")
    assert of("f(label='a', x=1)\n", words=code.WORDS) == of("f(label='b', x=1)\n", words=code.WORDS)
    assert of("f(label='a', x=1)\n", words=code.WORDS) != of("f(label='a', x=2)\n", words=code.WORDS)
    assert of("f(label='a')\n") != of("f(label='b')\n")
    shown = "class Shown:\n    def add(self):\n        return {}\n"
    assert of(shown.format(1), showing=code.SHOWING) == of(shown.format(2), showing=code.SHOWING)
    assert of(shown.format(1)) != of(shown.format(2))


def test_a_tasks_hash_is_of_its_own_modules_and_the_gallerys(monkeypatch):
    kept = {name: task.code for name, task in benchmark.TASKS.items()}
    assert kept["recall"] != kept["text"] and kept["passkey"] == kept["capacity"]
    real = code._tree.__wrapped__
    for changed, stale in (
        ("models/rings.py", set(kept)),
        ("training/lanes.py", set(kept)),
        ("eval/text.py", {"text"}),
        ("eval/report.py", set()),
    ):
        code.fingerprint.cache_clear()
        monkeypatch.setattr(
            code,
            "_tree",
            lambda path, changed=changed, **more: real(path, **more) + b"x" * path.as_posix().endswith(changed),
        )
        assert {name for name, task in benchmark.TASKS.items() if task.code != kept[name]} == stale, changed
    code.fingerprint.cache_clear()


def test_every_planned_cell_carries_its_hash():
    cells = benchmark.plan(
        presets.PRESETS["quick"], benchmark.choose_contestants("transformer"), list(benchmark.TASKS), 1, "stdlib", CPU
    )
    assert {cell.task for cell in cells} == set(benchmark.TASKS)
    assert all(cell.code == benchmark.TASKS[cell.task].code for cell in cells)


def cell(name, version, calls):
    def measure(tick):
        calls.append(name)
        tick(1)
        return version

    return Cell("recall", name, 0, {}, 1, measure, version)


def test_stale_cells_stay_unless_they_are_asked_for(tmp_path):
    """Those of older code, and those of results that do not say by what code they were measured."""
    run, calls = Run(tmp_path), []

    def complete(version, **more):
        console = Console(record=True, quiet=False, file=open("/dev/null", "w"), width=200)  # noqa: SIM115
        found = run.complete([cell(name, version, calls) for name in "abc"], CPU, "test", console, **more)
        return [(one["contestant"], one["result"]) for one in found], console.export_text()

    complete("old")
    damaged = run.path(cell("b", "old", calls))
    saved = read_json(damaged)
    assert saved["code"] == "old"
    del saved["code"]
    write_json(damaged, saved)
    calls.clear()
    found, said = complete("new")
    assert dict(found) == dict.fromkeys("abc", "old") and not calls
    assert "3 of 3 cells were measured by other code than this, and stay; --stale measures them anew" in said
    complete("old", stale=True)
    assert calls == ["b"]
    found, said = complete("new", stale=True)
    assert dict(found) == dict.fromkeys("abc", "new") and calls == ["b", *"abc"] and "measured anew" in said
    found, said = complete("new", stale=True)
    assert calls == ["b", *"abc"] and "other code" not in said


def test_a_run_takes_from_other_results_what_was_measured_alike(tmp_path):
    """Cells of the same settings that it has not; those of other code are counted as such."""
    calls, others, own = [], Run(tmp_path / "others"), Run(tmp_path / "own")
    console = Console(record=True, file=open("/dev/null", "w"), width=200)  # noqa: SIM115
    others.complete([cell(name, "old", calls) for name in "abcd"], CPU, "test", console)
    results = {"cells": others.saved()}
    results["cells"][1]["settings"] = {"steps": 5}
    del results["cells"][2]["result"]
    own.complete([cell("d", "new", calls)], CPU, "test", console)
    wanted = [cell(name, "new", calls) for name in "abcde"]
    assert own.adopt(results, wanted) == 1 and own.adopt(results, wanted) == 0
    calls.clear()
    found = own.complete(wanted, CPU, "test", console)
    assert [one["result"] for one in found] == ["old", "new", "new", "new", "new"] and calls == [*"bce"]
    assert "1 of 5 cells were measured by other code" in console.export_text()
    damaged = own.path(cell("e", "new", calls))
    write_json(damaged, read_json(damaged) | {"settings": {"steps": 5}})
    own.path(cell("a", "new", calls)).unlink()
    with pytest.raises(ValueError, match="measured with other settings"):
        own.adopt(results, wanted)
    assert not own.path(cell("a", "new", calls)).exists()  # before anything is taken


def test_results_say_by_how_many_versions_they_were_measured():
    def told(*codes):
        return code.told({"task": task} | ({"code": known} if known else {}) for task, known in codes)

    assert told(("recall", "a"), ("recall", "a"), ("text", "b")) == (
        "all 3 cells by one version of the code that decides them"
    )
    assert told(("recall", "a"), ("recall", "c"), ("text", "b")) == (
        "3 cells by 2 versions of the code that decides them: recall by 2"
    )
    assert "2 versions" in told(("recall", "a"), ("text", None)) and "1 cells do not say" in told(
        ("recall", "a"), ("text", None)
    )
    assert told(("text", None)) == "1 cells, which do not say by which version of the code they were measured"
    assert report.versions({"cells": [{"task": "text"}]}) == told(("text", None))
