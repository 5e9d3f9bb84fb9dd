"""The table of what works for which variant, made from the outcomes of tests.

A test that proves an ability carries `@pytest.mark.works("ability")`. Its columns are the variants named after that
(`@pytest.mark.works("DDP", "transformer", "longformer")`, model types or names of tests/variants.py), else the one in
its parameter `variant`. A test may carry several marks.

    pytest --works=README.md         writes the outcomes of this run into the table between the two comments
    pytest --check-works README.md   fails if the table says something else than this run

A cell is `yes` if all tests behind it passed, `no` if one failed, and `-` where there is no test, say because the
variant has no such head. A skipped test adds a footnote with its reason. Cells whose tests did not run (deselected,
another file) stay as they are; a run over the whole suite also removes those that no test stands behind. Rows stand in
the order of ORDER, and those of one kind as they stood in the file, new ones last.

A machine may lack what a test needs, so a check lets a `yes` stand whose tests were all skipped; but not where the
environment sets CI, which is to have everything that the table speaks of.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BEGIN, END, NONE = "<!-- works -->", "<!-- /works -->", "-"
ORDER = (  # how abilities begin, from use through training and adapters to tools around them; others come last
    "generate", "TextIteratorStreamer", "pipeline", "answering", "summaries", "opens", "Hub", "transformers serve",
    "lm-eval", "config.", "Trainer", "SegmentTrainer", "Seq2SeqTrainer", "bf16", "gradient", "label smoothing",
    "packing", "torch.", "resume", "FSDP", "TRL", "PEFT", "prompt tuning", "prefix tuning", "accelerate",
    "sentence-transformers", "quantization",
)  # fmt: skip
Cell = tuple[str, str]  # ability, column
Columns = dict[str, str]  # how names of variants begin, and what stands above their column


def column_of(variant, columns: Columns) -> str:
    """The column of a Variant, or of a variant's name. Raises ValueError if there is none."""
    name = getattr(variant, "name", variant)
    fitting = [column for column in columns if isinstance(name, str) and f"{name}_".startswith(f"{column}_")]
    if not fitting:
        raise ValueError(f"the mark works is given the variant {name!r}; it begins with none of {list(columns)}")
    return max(fitting, key=len)


def cells_of(item, columns: Columns) -> list[Cell]:
    """The cells that a test stands behind. Raises ValueError for a mark without ability or variant."""
    found = []
    for mark in item.iter_markers("works"):
        ability, *variants = mark.args or (None,)
        if not variants and "variant" in getattr(item, "callspec", Parameters()).params:
            variants = [item.callspec.params["variant"]]
        if not isinstance(ability, str) or "|" in ability or not variants:
            raise ValueError(
                f"{item.nodeid} is marked works{mark.args}; give an ability (a string without |) and variants, or "
                "parametrise the test over `variant`"
            )
        found += [(ability, column_of(variant, columns)) for variant in variants]
    return found


@dataclass
class Parameters:
    """Those of a test that has none."""

    params: dict = field(default_factory=dict)


class Works:
    """The pytest plugin: gathers outcomes from all of xdist's processes, writes or checks the table at the end."""

    def __init__(self, config, columns: Columns):
        self.config, self.columns = config, columns
        self.cells: list[Cell] = []  # of every collected test, those that are deselected too
        self.outcomes: dict[Cell, list[tuple[str, str]]] = {}  # of those that ran: (outcome, reason)
        self.whole = config.args_source != config.ArgsSource.ARGS and not config.option.keyword
        self.is_worker = hasattr(config, "workerinput")

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        for item in items:
            try:
                cells = cells_of(item, self.columns)
            except ValueError as error:
                raise pytest.UsageError(str(error)) from None
            if cells:
                item.user_properties.append(("works", cells))
                self.cells += cells

    def pytest_runtest_logreport(self, report):
        cells = dict(report.user_properties).get("works")
        if cells is None or (report.when != "call" and report.passed):
            return
        reason = ""
        # A test that is expected to fail proves that it does not work; one that skips proves nothing.
        outcome = "failed" if hasattr(report, "wasxfail") else report.outcome
        if outcome == "skipped":
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            reason = " ".join(reason.removeprefix("Skipped: ").split())
        for ability, column in cells:
            self.outcomes.setdefault((ability, column), []).append((outcome, reason))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        """xdist: the processes collect, this one only hears of what ran."""
        self.cells += map(tuple, getattr(node, "workeroutput", {}).get("works", []))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session):
        if self.is_worker:
            self.config.workeroutput["works"] = self.cells
            return
        for option, act in (("works", self.write), ("check_works", self.check)):
            path = self.config.getoption(option)
            if path is not None and not session.config.option.collectonly:
                act(session, Path(path))

    def write(self, session, path: Path):
        text = path.read_text(encoding="utf-8")
        beside = path.with_name(f".{path.name}.partial")
        beside.write_text(
            replaced(text, render(self.merged(parse(text, self.columns)), self.columns)), encoding="utf-8"
        )
        os.replace(beside, path)

    def check(self, session, path: Path):
        stands = parse(path.read_text(encoding="utf-8"), self.columns)
        ran = self.merged(stands)
        for cell in sorted({*stands, *ran}):
            then, now = stands.get(cell, (NONE, ())), ran.get(cell, (NONE, ()))
            # A reason for skipping belongs to the machine; that it is skipped does not make a `yes` wrong, but nobody
            # would see it if that were so on every machine.
            excused = now[0] == "skipped" and not (os.environ.get("CI") and then[0] == "yes")
            if then[0] != now[0] and not excused:
                self.say(
                    f"{path}: {cell[0]}, {self.columns[cell[1]]} is {then[0]!r}, tests say {now[0]!r}; use --works"
                )
                session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

    def say(self, line: str):
        self.config.pluginmanager.get_plugin("terminalreporter").write_line(line, red=True)

    def merged(self, stands: dict) -> dict:
        """The cells of a table with those that ran put in their place."""
        ran = {cell: result(outcomes) for cell, outcomes in self.outcomes.items()}
        kept = {cell: value for cell, value in stands.items() if not self.whole or cell in self.cells}
        return kept | ran


def result(outcomes: list[tuple[str, str]]) -> tuple[str, tuple[str, ...]]:
    """A cell's text, and its footnotes, from the (outcome, reason) of all its tests."""
    kinds = {outcome for outcome, _ in outcomes}
    said = "no" if "failed" in kinds else "yes" if "passed" in kinds else "skipped"
    return said, tuple(sorted({reason for outcome, reason in outcomes if outcome == "skipped"}))


def parse(text: str, columns: Columns) -> dict[Cell, tuple[str, tuple[str, ...]]]:
    """The cells between the comments, with their footnotes' texts. Raises ValueError if a comment is missing."""
    table = inside(text)
    notes = dict(re.findall(r"^\[(\d+)\] (.+?)(?:  )?$", table, re.MULTILINE))
    cells = {}
    for line in re.findall(r"^\| (?!ability |---)(.+) \|$", table, re.MULTILINE):
        ability, *words = line.split(" | ")
        for column, word in zip(columns, words, strict=True):
            said = word.split(" ")[0]
            if said != NONE:
                reasons = tuple(notes[number] for number in re.findall(r"\[(\d+)\]", word))
                cells[ability, column] = (said, reasons)
    return cells


def render(cells: dict[Cell, tuple[str, tuple[str, ...]]], columns: Columns) -> str:
    """The table of these cells, in the order of ORDER, and the footnotes, numbered as they are met."""
    abilities = sorted(dict.fromkeys(ability for ability, _ in cells), key=_kind)
    said_of = [cells.get((ability, column), (NONE, ())) for ability in abilities for column in columns]
    notes = list(dict.fromkeys(reason for _, reasons in said_of for reason in reasons))
    lines = [f"| ability | {' | '.join(columns.values())} |", "|---|" + ":---:|" * len(columns)]
    for ability in abilities:
        words = []
        for column in columns:
            said, reasons = cells.get((ability, column), (NONE, ()))
            words.append(" ".join([said, *(f"[{notes.index(reason) + 1}]" for reason in reasons)]))
        lines.append(f"| {ability} | {' | '.join(words)} |")
    # Two spaces break a line in Markdown.
    footnotes = "  \n".join(f"[{number}] {reason}" for number, reason in enumerate(notes, 1))
    return "\n".join(lines) + (f"\n\n{footnotes}" if notes else "")


def _kind(ability: str) -> int:
    """The place in ORDER of the first that the ability begins with."""
    return next((i for i, begins in enumerate(ORDER) if ability.startswith(begins)), len(ORDER))


def inside(text: str) -> str:
    """The text between the comments."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the file must hold {BEGIN} and then {END}, once each, around its table")
    return text.split(BEGIN)[1].split(END)[0]


def replaced(text: str, table: str) -> str:
    """The text with another table between the comments."""
    inside(text)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"
