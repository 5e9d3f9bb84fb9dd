"""The page of results: what it says follows from the results, and in a real browser, on a phone and on a desk, in both
colour schemes and on paper, it can be read and used by mouse and by keyboard."""

import copy
import csv
import io
import json
import re
from pathlib import Path

import pytest
from browser import Browser, needs_browser
from bs4 import BeautifulSoup

from eval import claims, figures, findings, origins, page, palette, tables, winners
from eval.contestants import CONTESTANTS

RESULTS = Path(__file__).parents[2] / "eval" / "results"


@pytest.fixture(scope="module")
def results():
    return json.loads((RESULTS / "standard.json").read_text())


@pytest.fixture(scope="module")
def html(results):
    return page.page(results)


@pytest.fixture(scope="module")
def soup(html):
    return BeautifulSoup(html, "html.parser")


def plain(element):
    """The text of an element, its spaces as they are typed."""
    return element.get_text().replace("\u00a0", " ")


# ---- what it says


def test_findings_come_first_and_follow_from_the_results(results, soup):
    """A sentence for everyone who is first at something, and counts of claims; other results say something else."""
    sections = [section["id"] for section in soup.select("main > section, #plots > section")]
    assert sections[:4] == ["findings", "comparison", "claims", "tables"] and sections[-1] == "origins"
    said = [str(found) for found in findings.findings(results)]
    assert [plain(li) for li in soup.select("#findings li")] == said
    outcomes = [v.outcome for v in claims.all_verdicts(results)]
    for outcome in (claims.REPRODUCED, claims.UNDECIDED):
        assert f"{outcomes.count(outcome)} {outcome}" in said[0]
    for best in winners.winners(results):
        first = results["summary"][best.names[0]]["label"]
        assert any(x.startswith(first) and f"{best.what} ({best.score})" in x for x in said)
    assert all(re.search(r"\d", x) for x in said)
    changed = copy.deepcopy(results)
    far = str(max(figures.distances(results)))
    for entry in changed["summary"].values():
        entry["recall"][far] = {"asked": 1000, "correct": 125}
    assert any(str(x).startswith("Nobody") and "recall at 8 windows" in str(x) for x in findings.findings(changed))


def test_every_claim_has_its_icon_and_its_word(results, soup):
    """Also those that were not measured."""
    some = {name: x for name, x in results["summary"].items() if name != "recurrent_memory_transformer"}
    without = results | {"summary": some}
    assert len(set(page.ICONS.values())) == 4
    assert claims.NOT_MEASURED in {verdict.outcome for verdict in claims.all_verdicts(without)}
    for shown, said in ((results, soup), (without, BeautifulSoup(page.page(without), "html.parser"))):
        rows = said.select("table.claims tbody tr")
        verdicts = claims.all_verdicts(shown)
        assert len(rows) == len(verdicts) == len(claims.CLAIMS)
        for row, verdict in zip(rows, verdicts, strict=True):
            mark = row.select_one(".outcome")
            assert mark.i.text == page.ICONS[verdict.outcome] and mark.i["aria-hidden"] == "true"
            assert mark.text == page.ICONS[verdict.outcome] + verdict.outcome
            assert verdict.outcome.replace(" ", "-") in mark["class"] and verdict.evidence in plain(row)


def test_the_comparison_has_a_row_for_each_contestant(results, soup):
    """The winners of each column are bold, and no one else; the deepest cell is the best."""
    table = soup.select_one("#comparison table")
    rows = table.select("tbody tr")
    assert [row.th.get_text(strip=True) for row in rows] == [e["label"] for e in results["summary"].values()]
    for column, measure in enumerate(winners.measures(results)):
        cells = {name: row.find_all("td")[column] for name, row in zip(results["summary"], rows, strict=True)}
        assert {name for name, cell in cells.items() if cell.b} == set(measure.best.names)
        numbers = {name: value.number for name, value in measure.values.items()}
        deepest = max(numbers, key=lambda name: numbers[name] if measure.rises else -numbers[name])
        assert "--shade: 1.0" in cells[deepest]["style"]
        for name, value in measure.values.items():
            assert cells[name].find(string=True, recursive=True) == value.said
            assert bool(cells[name].small) == (value.limits is not None)


def test_the_page_says_where_its_numbers_come_from(results, soup):
    """Dates, machine, commits and seeds above all else, and plainly where cells are of several commits."""
    head = soup.select_one("header").get_text(" ")
    commits = {cell["provenance"]["commit"][:7] for cell in results["cells"]}
    assert commits and all(commit in head for commit in commits) and "cells come from" not in head
    assert "AMD EPYC" in head and "2026-11-27" in head and "0, 1, 2 for recall, text; 0 for all else" in head
    older = copy.deepcopy(results)
    older["cells"][0] |= {"code": "another"}
    older["cells"][0]["provenance"]["commit"] = 40 * "7"
    assert f"{len(results['cells'])} cells come from" in origins.origins(older).mixed
    assert "same code" in origins.origins(older).mixed
    alike = [cell | {"code": cell["task"]} for cell in results["cells"]]  # in what decides them
    assert origins.origins(results | {"cells": alike}).mixed == ""
    one = results | {"cells": [c for c in results["cells"] if c["task"] == "cost"], "peers": None}
    assert origins.origins(one).mixed == ""
    assert dict(origins.origins(one).facts)["Commit"] == one["cells"][0]["provenance"]["commit"][:7]
    other = copy.deepcopy(one["cells"][0])
    other["provenance"]["machine"]["processor"] = "another"
    mixed = origins.origins(one | {"cells": [*one["cells"], other]}).mixed
    assert "2 machines" in mixed and "on the same machine" in mixed and "same code" not in mixed


def test_every_table_is_on_the_page(results, soup):
    found = {panel.h3.text: panel.table for panel in soup.select(".panel")}
    measured = tables.parts(results)
    words = [table for table in tables.conclusions(results) if table[1][0] != "claim"]
    assert list(found) == [title for title, *_ in [*measured, *words]] + [tables.peers_title(results["peers"])]
    for title, heads, rows in [*measured, *words]:
        cells = [[cell.text for cell in row.find_all(["th", "td"])] for row in found[title].find_all("tr")]
        assert cells == [heads, *rows]


def test_bands_are_drawn_wherever_results_hold_them(results):
    """Every share has an interval; bits have one where documents were kept, times where their spread was; and where
    there is none the caption says why."""
    for plot in figures.figures(results):
        known = [p.limits for s in plot.series for p in s.points]
        if plot.y.title == "right answers" or plot.rows or "larger memory" in plot.title:
            assert all(known), plot.title
        assert any(known) or re.search("No bands|Counted|too few for bands", plot.caption), plot.title
        for s in plot.series:
            for p in s.points:
                value = p.x if plot.rows else p.y
                assert p.limits is None or p.limits[0] <= value <= p.limits[1]


def test_learning_curves(results):
    """One plot of each ability whose results hold them: the share of right tokens at each step, levels together."""
    learned = copy.deepcopy(results)
    for entry in learned["summary"].values():
        entry.pop("learning_curves")
    assert not [plot for plot in figures.figures(learned) if "learned" in plot.title]  # results of before
    curves = {
        "2": {"10": {"asked": 10, "correct": 1}, "20": {"asked": 10, "correct": 9}},
        "4": {"10": {"asked": 30, "correct": 3}, "20": {"asked": 30, "correct": 21}},
    }
    ability = next(iter(learned["abilities"]))
    learned["summary"]["longformer"]["learning_curves"] = {ability: curves}
    (plot,) = [plot for plot in figures.figures(learned) if "learned" in plot.title]
    assert learned["abilities"][ability]["title"] in plot.title and "(2, 4)" in plot.caption
    (series,) = plot.series
    assert [(p.x, p.y) for p in series.points] == [(10, 0.1), (20, 0.75)] and "75 % of 40" in series.points[1].said
    assert [label for _, label in plot.stops] == ["10", "20"] and plot.x.place(20) == 1
    assert "how it was learned" in page.page(learned)


def test_axes_hold_what_is_drawn_and_end_at_round_numbers(results):
    for plot in figures.figures(results):
        for s in plot.series:
            for p in s.points:
                assert 0 <= plot.x.place(p.x) <= 1 and 0 <= plot.y.place(p.y) <= 1, plot.title
        across = plot.x if plot.rows else plot.y
        said = [label for _, label in across.ticks]
        for axis in (plot.x, plot.y):
            assert all(0 <= axis.place(value) <= 1 for value, _ in axis.ticks), plot.title
        assert len(said) == len(set(said)) >= 2, plot.title
    assert figures._ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and figures._ticks(3, 3)[0] < 3


@pytest.mark.parametrize("paper", [palette.LIGHT, palette.DARK])
def test_curves_stand_out_from_the_page(paper):
    for contestant in CONTESTANTS.values():
        assert palette.contrast(palette.readable(contestant.colour, paper), paper) >= palette.SEEN
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("name", ["standard", "quick", "books"])
def test_the_page_is_small_and_p_is_written_plainly(name):
    html = page.page(json.loads((RESULTS / f"{name}.json").read_text()))
    assert len(html.encode()) <= 1_500_000
    soup = BeautifulSoup(html, "html.parser")
    for script in soup.find_all("script"):
        script.extract()
    assert "p < 0.001" in plain(soup) and not re.search(r"\(\s*<|p \(|p<", plain(soup))
    assert " src=" not in html and not re.search(r"(href|url\()=?[\"']?https?:", html)


def test_the_csv_holds_every_number_that_is_drawn(results):
    rows = list(csv.DictReader(io.StringIO(page.csv_of(results))))
    drawn = sum(len(s.points) for plot in figures.figures(results) for s in plot.series)
    compared = sum(len(measure.values) for measure in winners.measures(results))
    assert len(rows) == drawn + compared
    (far,) = (r for r in rows if (r["what"], r["contestant"], r["at"]) == ("What each remembers", "longformer", "2x"))
    score = results["summary"]["longformer"]["recall"]["64"]
    assert float(far["value"]) == score["correct"] / score["asked"]
    assert float(far["low"]) < float(far["value"]) < float(far["high"])


# ---- in a browser


@pytest.fixture(scope="module")
def browser(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(html)
    with Browser() as found:
        found.path = path
        yield found


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (390, False), (1024, False), (1440, True), (1440, False)])
def test_the_page_can_be_read(browser, width, dark, results):
    """Nothing fails and nothing is fetched; all plots are drawn with all their curves; no text is small, faint or
    beyond the screen, in either scheme."""
    browser.open(browser.path, width, 844 if width < 500 else 900, dark)
    said = browser.look()
    plots = figures.figures(results)
    assert said["problems"] == [] and said["asked"] == [] and said["dark"] == dark
    assert said["texts"] > 300 and said["small"] == [] and said["faint"] == []
    assert said["overflow"] <= 0, "the page is wider than the screen"
    assert browser.evaluate("document.querySelectorAll('.drawing svg').length") == len(plots) >= 20
    assert browser.evaluate("document.querySelectorAll('.series').length") == sum(len(p.series) for p in plots)
    bands = sum(any(p.limits for p in s.points) and not plot.rows for plot in plots for s in plot.series)
    assert browser.evaluate("document.querySelectorAll('.band').length") == bands > 50


@needs_browser
def test_a_phone_shows_the_measured_column(browser):
    """A table's first column stays where it is while the others scroll to the last; claims show what was measured."""
    browser.open(browser.path, 390, 844)
    for table in ("#comparison .wide", ".panel .wide"):
        found = browser.evaluate(f"""(() => {{ const wide = document.querySelector("{table}"); wide.scrollLeft = 1e6;
            const box = e => e.getBoundingClientRect().toJSON(), row = wide.querySelector("tbody tr");
            return {{ first: box(row.firstElementChild), last: box(row.lastElementChild) }}; }})()""")
        assert found["first"]["left"] >= 0 and found["last"]["right"] <= 390
        assert found["last"]["left"] >= found["first"]["right"] - 1, "the first column hides what was measured"
    boxes = browser.evaluate("""[...document.querySelectorAll(".claims tbody td:last-child")].map(e => {
        const box = e.getBoundingClientRect(); return [box.left, box.right, box.height]; })""")
    assert all(left >= 0 and right <= 390 and height > 10 for left, right, height in boxes)


def drawn(browser, name):
    return browser.evaluate(f"""[...document.querySelectorAll('.series[data-contestant="{name}"]')].filter(
        e => e.getClientRects().length).length""")


@needs_browser
def test_contestants_are_chosen_by_mouse_and_by_keyboard(browser, results):
    """One legend for all plots."""
    browser.open(browser.path)
    count = drawn(browser, "longformer")
    assert count > 15
    button = '.legend [data-contestant="longformer"]'
    browser.point(button, click=True)
    assert drawn(browser, "longformer") == 0 and drawn(browser, "transformer_xl") == count
    for key, shown in (("Enter", count), ("Space", 0), ("Enter", count)):
        browser.press(key)  # the button that was clicked has the focus
        assert drawn(browser, "longformer") == shown
        assert browser.evaluate(f"document.querySelector('{button}').ariaPressed") == str(shown > 0).lower()
    browser.evaluate(
        f"document.querySelector('{button}').dispatchEvent(new MouseEvent('click', {{ shiftKey: true }}))"
    )
    assert drawn(browser, "transformer_xl") == 0 and drawn(browser, "longformer") == count
    browser.point(".legend [data-all]", click=True)
    assert drawn(browser, "transformer_xl") == count


@needs_browser
def test_values_are_read_by_mouse_and_by_keyboard(browser, results):
    browser.open(browser.path)
    browser.point(".drawing")
    tip = "document.querySelector('.drawing .tip').innerText"
    assert len(browser.evaluate(tip).splitlines()) == 1 + len(results["summary"]) and "%" in browser.evaluate(tip)
    browser.evaluate("document.querySelector('.legend [data-all]').focus()")
    browser.press("Tab")
    said = "document.activeElement.ariaValueText"
    assert browser.evaluate("document.activeElement.getAttribute('role')") == "slider"
    for key, stop in (("End", "8x"), ("ArrowLeft", "4x"), ("ArrowRight", "8x"), ("Home", "1/4x")):
        browser.press(key)
        assert browser.evaluate(said).startswith(f"{stop}. ")
    score = results["summary"]["longformer"]["recall"]["8"]
    assert f"{score['correct']:,} of {score['asked']:,}" in browser.evaluate(said) == browser.evaluate(said)
    browser.press("Escape")
    assert browser.evaluate("document.querySelectorAll('.tip:not([hidden])').length") == 0


@needs_browser
def test_tables_are_chosen_by_mouse_and_by_keyboard(browser, soup):
    browser.open(browser.path)
    names = [panel["data-tab"] for panel in soup.select(".panel")]
    shown = "[...document.querySelectorAll('.panel')].filter(e => !e.hidden).map(e => e.dataset.tab)"
    assert browser.evaluate(shown) == names[:1]
    browser.point(f"[role=tab]:nth-of-type({len(names)})", click=True)
    assert browser.evaluate(shown) == names[-1:]
    for key, i in (("ArrowRight", 0), ("ArrowRight", 1), ("ArrowLeft", 0), ("End", -1), ("Home", 0)):
        browser.press(key)
        assert browser.evaluate(shown) == [names[i]]
        assert browser.evaluate("document.activeElement.textContent") == names[i]
    assert browser.evaluate("document.querySelectorAll('[role=tab][tabindex=\"0\"]').length") == 1


@needs_browser
def test_downloads_hold_the_results(browser, results):
    browser.open(browser.path)
    browser.evaluate("""window.saved = []; HTMLAnchorElement.prototype.click = function () {
        saved.push(fetch(this.href).then(x => x.text()).then(text => [this.download, text])); }""")
    for kind in ("csv", "json"):
        browser.point(f"[data-save={kind}]", click=True)
    browser.wait("saved.length === 2")
    (name, table), (other, text) = sorted(browser.evaluate("Promise.all(saved)"))
    assert (name, other) == ("hf-gallery-standard.csv", "hf-gallery-standard.json")
    assert table == page.csv_of(results) and json.loads(text) == results


@needs_browser
def test_contents_follow_the_reader(browser):
    """They stay in sight, and mark the section that is read."""
    for width in (390, 1440):
        browser.open(browser.path, width, 800)
        for place in ("claims", "group1", "origins"):
            browser.evaluate(f"document.getElementById('{place}').scrollIntoView()")
            browser.wait(f"document.querySelector('#contents [aria-current]').hash === '#{place}'")
            box = browser.evaluate(
                "document.querySelector('#contents [aria-current]').getBoundingClientRect().toJSON()"
            )
            assert 0 <= box["top"] < 800 and 0 <= box["left"] and box["right"] < width + 1


@needs_browser
def test_paper_shows_every_table_in_light_colours(browser, soup):
    browser.open(browser.path, dark=True, media="print")
    said = browser.evaluate("""({ panels: [...document.querySelectorAll(".panel")].filter(e => e.offsetHeight).length,
        tools: [...document.querySelectorAll("#contents, .tools, [role=tablist]")].filter(e => e.offsetHeight).length,
        paper: getComputedStyle(document.body).backgroundColor })""")
    assert said == {"panels": len(soup.select(".panel")), "tools": 0, "paper": "rgb(255, 255, 255)"}
    assert browser.printed().startswith(b"%PDF")
