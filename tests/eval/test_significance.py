"""Independent things are tested and drawn anew: documents and examples, not their stretches and questions."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_eval import CPU, TINY

from eval import claims, compare, contestants, recall, report, text
from eval.significance import (
    Answers,
    answers,
    answers_differ,
    by_unit,
    counted,
    interval,
    median_interval,
    paired,
    pooled,
    sums_interval,
    text_interval,
    texts_differ,
    two_proportions,
    values_interval,
    wilson,
)
from eval.task import add_up

RESULTS = Path(__file__).parents[2] / "eval" / "results"


def entry_of(*seeds, nbytes=1000, stretches=20):
    """A contestant's summary: bits per byte of each document, by seed, all of whose stretches cost what it costs."""
    return {
        "bits_per_byte": [float(np.mean(seed)) for seed in seeds],
        "by_stretch": [np.repeat(seed, stretches).tolist() for seed in seeds],
        "by_document": [
            {"bits": (nbytes * np.asarray(seed)).tolist(), "bytes": [nbytes] * len(seed)} for seed in seeds
        ],
    }


def without_documents(entry):
    return {key: value for key, value in entry.items() if key != "by_document"}


# ---- text


def test_stretches_of_few_documents_are_no_evidence():
    """Three documents of twenty stretches: all that agree, and it is still three that agree."""
    first, second = entry_of([2.0, 2.1, 2.2]), entry_of([2.1, 2.2, 2.31])
    assert paired(*([x for seed in e["by_stretch"] for x in seed] for e in (first, second))) < 1e-9
    found = texts_differ(first, second)
    assert (found.unit, found.units, found.sure) == ("document", 3, False)
    assert found.probability == pytest.approx(2 / 2**3)  # all signs alike, of eight ways
    assert str(found) == "p = 0.250, 3 documents"


def test_many_documents_that_agree_are():
    random = np.random.default_rng(0)
    own = 2 + random.normal(0, 0.5, 12)  # documents differ, by more than the contestants do
    found = texts_differ(entry_of(own), entry_of(own + 0.05))
    assert found.probability == pytest.approx(2 / 2**12) and found.sure


def test_seeds_of_one_document_stay_together():
    """A document that ten seeds read is one document; its bits are their mean."""
    one = [2.0, 2.1, 2.2, 2.3]
    first, second = entry_of(*[one] * 10), entry_of(*[[x + 0.1 for x in one]] * 10)
    found = texts_differ(first, second)
    assert found.units == 4 and found.probability == pytest.approx(2 / 2**4)
    away = entry_of([x - 0.2 for x in one], [x + 0.2 for x in one])
    assert texts_differ(entry_of(one), away).probability == 1.0  # the mean of its seeds is the same


def false_alarms(test, runs=300):
    """The share of runs in which the test says p < 0.05 of two that are equal."""
    random = np.random.default_rng(11)
    return sum(test(random) for _ in range(runs)) / runs


def draw(random, documents=8, stretches=20):
    """Two equal contestants: each document suits one of them a little better, and all its stretches with it."""
    base, suits = random.normal(2, 0.3, documents), random.normal(0, 0.05, documents)
    return entry_of(base, stretches=stretches), entry_of(base + suits, stretches=stretches)


def test_equal_models_are_told_apart_no_more_often_than_said():
    """In one of twenty runs at most, by documents; by stretches in most of them."""
    by_document = false_alarms(lambda random: texts_differ(*draw(random)).sure)
    by_stretch = false_alarms(lambda random: texts_differ(*map(without_documents, draw(random))).sure)
    assert by_document < 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 300)  # what chance allows at 1 in 200
    assert by_stretch > 0.4


def test_a_true_difference_is_found():
    def drawn(random):
        first, second = draw(random, documents=12)
        (seed,) = second["by_document"]
        seed["bits"] = [bits + 80 for bits in seed["bits"]]
        return texts_differ(first, second).sure

    assert false_alarms(drawn, 100) > 0.9


def test_intervals_of_text_hold_the_truth():
    """19 of 20 times, or nearly: documents of other lengths and other costs."""
    random, held = np.random.default_rng(5), 0
    for _ in range(200):
        nbytes = random.integers(500, 5000, 20)
        cost = random.normal(2, 0.3, 20)
        low, high = text_interval({"by_document": [{"bits": (nbytes * cost).tolist(), "bytes": nbytes.tolist()}]})
        held += low <= 2 <= high
    assert 0.87 < held / 200 <= 0.99
    assert text_interval(entry_of([2.0])) is None and text_interval({"by_stretch": [[2.0]]}) is None


def test_results_without_documents_are_compared_as_they_were():
    first, second = entry_of([2.0, 2.1, 2.2]), entry_of([2.1, 2.2, 2.31])
    stretches = [[x for seed in e["by_stretch"] for x in seed] for e in (first, second)]
    for pair in ((without_documents(first), second), (first, without_documents(second))):
        found = texts_differ(*pair)
        assert (found.unit, found.probability) == ("stretch", paired(*stretches))
    half = entry_of([2.0, 2.1], [2.0, 2.2])
    half["by_document"].pop()  # a seed that was measured before documents were kept
    assert texts_differ(half, entry_of([2.5, 2.6], [2.7, 2.7])).unit == "stretch"
    other = entry_of([2.1, 2.2, 2.31], nbytes=999)  # another corpus
    assert texts_differ(first, other).unit == "stretch"
    assert texts_differ({}, first) is None and texts_differ(entry_of([2.0]), entry_of([2.1])) is None


# ---- answers


def of_examples(shares, asked=4):
    return answers(by_unit("example", [round(asked * share) for share in shares], [asked] * len(shares)))


def test_questions_about_few_examples_are_no_evidence():
    """Four examples right against four wrong: sixteen questions would be sure, four examples are not."""
    right, wrong = of_examples([1, 1, 1, 1]), of_examples([0, 0, 0, 0])
    assert two_proportions(16, 16, 0, 16) < 1e-6
    found = answers_differ(right, wrong)
    assert (found.unit, found.units) == ("example", 4) and found.probability == pytest.approx(2 / 2**4)
    assert answers_differ(of_examples([1] * 9), of_examples([0] * 9)).sure
    assert answers_differ(right, right).probability == 1.0


def test_equal_answers_are_told_apart_no_more_often_than_said():
    """An example is understood or not, with all its questions, by each of two equal contestants."""

    def drawn(random, known):
        shares = (random.random(60) < 0.5).astype(float), (random.random(60) < 0.5).astype(float)
        first, second = (of_examples(x) for x in shares)
        if not known:
            first, second = (Answers(a.correct, a.asked) for a in (first, second))
        return answers_differ(first, second).sure

    allowed = 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 150)
    assert false_alarms(lambda random: drawn(random, True), 150) < allowed
    assert false_alarms(lambda random: drawn(random, False), 150) > 0.25


def test_other_examples_are_shuffled_between_the_two():
    """As in two runs that asked different examples, also of different numbers of questions."""
    few = answers(by_unit("example", [1, 0, 1, 0] * 5, [4, 3, 4, 2] * 5))
    many = answers(by_unit("example", [3, 4, 2, 4] * 6, [4, 4, 3, 4] * 6))
    found = answers_differ(few, many)
    assert found.sure and found.units == 20 + 24
    assert not answers_differ(few, answers(by_unit("example", [1, 0, 1], [4, 2, 3]))).sure


def test_intervals_of_answers_are_as_wide_as_examples_make_them():
    """All questions of an example alike: the interval is that of the examples, twice that of the questions."""
    shares = np.repeat([1.0, 0.0], [150, 50])
    low, high = interval(of_examples(shares))
    whole, questions = wilson(150, 200), wilson(600, 800)
    assert (low, high) == pytest.approx(whole, abs=0.01)
    assert high - low > 1.8 * (questions[1] - questions[0])
    assert interval(of_examples([1.0] * 50)) == pytest.approx(wilson(50, 50))  # no spread to draw from
    assert interval(Answers(3, 10)) == wilson(3, 10) and interval(Answers(0, 0)) == (0.0, 1.0)


def test_an_example_asked_at_several_distances_is_one():
    near, far = (by_unit("example", correct, [2, 2, 2]) for correct in ([2, 1, 2], [0, 0, 1]))
    found = pooled({"2": near, "4": far})
    assert (found.correct_of, found.asked_of) == ((2, 1, 3), (4, 4, 4)) and found.share == 0.5
    assert pooled({"2": near, "4": {"asked": 6, "correct": 1}}).unit == "question"


def test_seeds_lay_their_examples_one_behind_another():
    totals = {}
    seeds = [{"2": by_unit("example", correct, [2, 2])} for correct in ([2, 1], [0, 1])]
    before = copy.deepcopy(seeds)
    for seed in seeds:
        add_up(totals, seed)
    assert answers(totals["2"]).correct_of == (2, 1, 0, 1) and totals["2"]["asked"] == 8
    assert seeds == before  # cells are written as measured
    add_up(totals, {"2": {"asked": 4, "correct": 1}})  # of a time when examples were not kept
    assert answers(totals["2"]) == Answers(5, 12)


def test_bits_of_a_part_of_each_document_have_an_interval():
    """Documents are drawn anew, those that have nothing of the part left out; seeds add up document by document."""
    random = np.random.default_rng(0)
    count = random.integers(50, 100, 40)
    bits = count * random.normal(3, 0.2, 40)
    units = {"unit": "document", "bits": " ".join(map(str, bits)), "bytes": " ".join(map(str, count))}
    sums = {"bits": float(bits.sum()), "bytes": int(count.sum()), "by_unit": units}
    low, high = sums_interval(sums)
    whole = {"by_document": [{"bits": list(bits), "bytes": list(count)}]}
    assert (low, high) == text_interval(whole) and low < 3 < high < low + 0.3
    empty = units | {"bits": units["bits"] + " 0", "bytes": units["bytes"] + " 0"}
    assert sums_interval(sums | {"by_unit": empty}) == (low, high)
    assert sums_interval({"bits": 3.0, "bytes": 1}) is None
    totals = {}
    for _ in range(2):
        add_up(
            totals,
            {"0": {"bits": 3.5, "bytes": 3, "by_unit": {"unit": "document", "bits": "1.25 2.25", "bytes": "1 2"}}},
        )
    assert totals["0"]["by_unit"] == {"unit": "document", "bits": "2.5 4.5", "bytes": "2 4"}


def test_intervals_of_few_measurements():
    """Of seeds by Student's t, of the median by order; both hold the truth in 95 of 100 runs."""
    random = np.random.default_rng(1)
    held = [low < 0 < high for low, high in (values_interval(random.normal(0, 1, 3)) for _ in range(400))]
    assert 0.92 < np.mean(held) < 0.98 and values_interval([1.0]) is None
    held = [low < 0 < high for low, high in (median_interval(random.normal(0, 1, 9)) for _ in range(400))]
    assert 0.94 < np.mean(held) and median_interval(range(9)) == (1, 7) and median_interval(range(5)) is None


# ---- where they come from, and where they are told


@pytest.mark.parametrize("name", ["transformer_xl", "memorizing_transformer"])
def test_cells_keep_their_examples(name):
    found = recall.measure(contestants.CONTESTANTS[name], TINY.recall, 0, CPU, lambda n: None)
    scores = [*found["recall"].values(), *(s for scores in found["by_memory_size"].values() for s in scores.values())]
    for score in scores:
        known = answers(score)
        assert known.unit == "example" and len(known.asked_of) == TINY.recall.examples
        assert max(known.asked_of) <= TINY.recall.num_writes


def test_documents_hold_every_byte():
    bits = [np.arange(10.0), np.arange(2.0 * text.STRETCH + 5)]
    assert text.by_document(bits) == {"bits": [x.sum() for x in bits], "bytes": [len(x) for x in bits]}


@pytest.fixture
def results():
    return json.loads((RESULTS / "standard.json").read_text())


def test_a_report_says_what_was_counted(results):
    """By document and example where they were kept; and of what was measured before, that it was not so."""
    for entry in results["summary"].values():
        for name in ("by_document", "by_document_of_memory_size"):
            entry.pop(name, None)
        for score in entry["recall"].values():
            score.pop("by_unit")
    before = counted(results)
    assert before == "text by stretch, so its p is too small; recall by question, so its p is too small"
    title, _, rows = report.conclusions(results)[0]
    assert before in title and not any("document" in row[-1] for row in rows)
    random = np.random.default_rng(0)
    for entry in results["summary"].values():
        costs = entry["bits_per_byte"][0] + random.normal(0, 0.01, 10)
        entry |= entry_of(*[costs] * len(entry["bits_per_byte"]))
        for d, score in entry["recall"].items():
            right = [round(4 * score["correct"] / score["asked"])] * 256
            entry["recall"][d] = by_unit("example", right, [4] * 256)
    assert counted(results) == "text by document; recall by example"
    evidence = {verdict.claim: verdict.evidence for verdict in claims.verdicts(results)}
    assert "10 documents" in evidence["Transformer-XL models text better than a Transformer of the same window"]
    assert "256 examples" in evidence["Transformer-XL remembers beyond its segment"]
    page = report.page(results)
    assert "intervals over other documents" in page and "examples drawn anew" in page


def test_runs_are_compared_by_document(results):
    first, second = copy.deepcopy(results), copy.deepcopy(results)
    for run in (first, second):
        run["summary"]["transformer_xl"].pop("by_document")
        del run["summary"]["transformer_xl"]["bits_per_byte"][1:]
    first["summary"]["longformer"] |= entry_of([2.0, 2.1, 2.2])
    second["summary"]["longformer"] |= entry_of([2.1, 2.2, 2.31])
    found = [d for d in compare.differences(first, second) if d.what == "bits per byte"]
    chances = {d.contestant: d.chance for d in found}
    assert chances["Longformer"].unit == "document" and not chances["Longformer"].sure
    assert chances["Transformer-XL"] is None  # of one seed, and its documents are not known
