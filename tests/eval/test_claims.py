"""Conclusions of a run: claims of the papers, and who does best, on made-up numbers with known answers."""

import copy

import pytest

from eval import claims, winners
from eval.significance import paired, pooled, two_proportions


def score(correct, asked=100, chance=0.1):
    return {"correct": correct, "asked": asked, "chance": chance, "trained": True}


def contestant(label, recall, bits, permutations, cost):
    return {
        "label": label,
        "recall": {str(16 * d): score(c) for d, c in zip((1, 2, 8), recall, strict=True)},
        "bits_per_byte": [sum(bits) / len(bits)],
        "by_stretch": [bits],
        "abilities": {"permutations": {"4": score(permutations[0]), "8": score(permutations[1])}},
        "cost": cost,
    }


def cost(speed, slope=1.0):
    return {
        "training_tokens_per_second": speed,
        "training_peak_bytes": 2**20,
        "decode_ms_per_token": {"1024": 1.0, "4096": 1000 / speed},
        "cache_bytes": {"1024": 1024, "4096": 2048},
        "slopes": {"training_seconds": slope},
    }


@pytest.fixture
def results():
    low, high = [2.0, 2.1, 2.2, 2.05], [2.2, 2.31, 2.4, 2.26]
    memorizing = contestant("Memorizing", (99, 98, 97), low, (60, 11), cost(500))
    memorizing["recall_by_memory_size"] = {"32": {"16": score(99), "32": score(50), "128": score(12)}}
    memorizing["text_by_memory_size"] = {
        size: {"bits": bits, "bytes": 100} for size, bits in (("32", 230), ("128", 220), ("1024", 210))
    }
    memorizing["by_stretch_of_memory_size"] = {"32": [high], "128": [high], "1024": [low]}
    return {
        "chance": 0.1,
        "window": {"recall": 16, "text": 64},
        "abilities": {"permutations": {"title": "Permutations"}},
        "summary": {
            "transformer_full": contestant("Full", (100, 100, 100), low, (59, 12), cost(5000, 2.0)),
            "transformer": contestant("Windowed", (90, 11, 10), high, (12, 9), cost(2000)),
            "transformer_xl": contestant("XL", (95, 90, 12), low, (58, 12), cost(1000)),
            "longformer": contestant("Longformer", (96, 92, 13), low, (57, 12), cost(1500, 1.02)),
            "longformer_xl": contestant("Longformer-XL", (96, 92, 13), low, (57, 12), cost(1000)),
            "memorizing_transformer": memorizing,
            "block_recurrent_transformer": contestant("BR", (95, 70, 40), low[::-1], (90, 80), cost(900)),
            "recurrent_memory_transformer": contestant("RMT", (95, 90, 80), low, (58, 12), cost(800)),
            "recurrent_memory_transformer_few": contestant("Few", (95, 60, 40), low, (58, 12), cost(900)),
        },
    }


def outcomes(results):
    return {v.claim: v.outcome for v in claims.verdicts(results)}


def test_what_does_not_come_out_here_names_the_size_of_its_paper(results):
    """Every paper has one; what is reproduced needs none."""
    assert {paper for _, paper, _ in claims.CLAIMS} == set(claims.SIZES_OF_PAPERS)
    alike = copy.deepcopy(results)
    alike["summary"]["transformer_xl"] = alike["summary"]["transformer"]
    for measured in (results, alike):
        for verdict in claims.verdicts(measured):
            told = verdict.evidence.endswith(claims.SIZES_OF_PAPERS[verdict.paper])
            assert told == (verdict.outcome != claims.REPRODUCED), verdict
    assert any(verdict.outcome == claims.UNDECIDED for verdict in claims.verdicts(alike))


def test_claims_that_hold(results):
    found = outcomes(results)
    assert len(found) == len(claims.CLAIMS)
    undecided = {
        "A kNN memory models text better than Transformer-XL",  # the same numbers
        "Block-Recurrent beats Transformer-XL on text at no higher cost",
    }
    assert {claim for claim, outcome in found.items() if outcome != claims.REPRODUCED} == undecided
    assert all(found[claim] == claims.UNDECIDED for claim in undecided)
    evidence = {v.claim: v.evidence for v in claims.verdicts(results)}
    assert evidence["Transformer-XL remembers beyond its segment"] == (
        "Transformer-XL 51 %, windowed 10 % right from two windows back on (p < 0.001)"
    )
    assert "2.00" in evidence["Longformer's training cost is linear in length"]  # full attention, to compare


def test_claims_that_do_not_hold(results):
    """Each claim turns round with its numbers."""
    summary = results["summary"]
    summary["transformer_xl"], summary["transformer"] = summary["transformer"], summary["transformer_xl"]
    summary["longformer"]["cost"]["slopes"]["training_seconds"] = 1.6
    summary["longformer"]["recall"], summary["transformer"]["recall"] = (
        summary["transformer"]["recall"],
        summary["longformer"]["recall"],
    )
    sums = summary["memorizing_transformer"]["text_by_memory_size"]
    sums["32"], sums["1024"] = sums["1024"], sums["32"]
    stretches = summary["memorizing_transformer"]["by_stretch_of_memory_size"]
    stretches["32"], stretches["1024"] = stretches["1024"], stretches["32"]
    found = outcomes(results)
    for claim in (
        "Transformer-XL remembers beyond its segment",
        "Transformer-XL models text better than a Transformer of the same window",
        "Longformer's training cost is linear in length",
        "A larger kNN memory models text better",
    ):
        assert found[claim] == claims.NOT_REPRODUCED, claim


def test_a_state_is_held_against_the_best_of_attention(results):
    claim = "A recurrent state composes permutations where attention cannot"
    evidence = {v.claim: v.evidence for v in claims.verdicts(results)}[claim]
    assert evidence == "Block-Recurrent 85 %, Full 36 % right over all lengths (p < 0.001)"
    results["summary"]["longformer"]["abilities"]["permutations"] = {"4": score(99), "8": score(95)}
    assert outcomes(results)[claim] == claims.NOT_REPRODUCED


def test_a_gain_that_costs_more_is_not_decided(results):
    better = [bits - 0.1 for bits in results["summary"]["transformer_xl"]["by_stretch"][0]]
    entry = results["summary"]["block_recurrent_transformer"]
    entry["by_stretch"], entry["bits_per_byte"] = [[b + 1e-3 * i for i, b in enumerate(better)]], [2.0]
    claim = "Block-Recurrent beats Transformer-XL on text at no higher cost"
    assert outcomes(results)[claim] == claims.UNDECIDED
    entry["cost"]["training_tokens_per_second"] = 1000
    assert outcomes(results)[claim] == claims.REPRODUCED


def test_what_was_not_measured_is_not_judged(results):
    empty = {name: {"label": entry["label"]} for name, entry in results["summary"].items()}
    nothing = results | {"summary": empty, "abilities": {}}
    assert claims.verdicts(nothing) == [] and winners.winners(nothing) == []
    alone = copy.deepcopy(results)
    alone["summary"] = {"transformer_xl": alone["summary"]["transformer_xl"]}
    assert claims.verdicts(alone) == []


def test_winners(results):
    found = {best.what: best for best in winners.winners(results)}
    assert found["recall at 8 windows"].names == ["memorizing_transformer"]  # the upper line takes no part
    assert found["recall at 8 windows"].score == "97 %"
    assert found["Permutations"].names == ["block_recurrent_transformer"]
    text = found["text"].names
    assert "transformer" not in text and set(text) >= {"transformer_xl", "longformer", "memorizing_transformer"}
    assert found["training speed"].names == ["transformer"] and found["training speed"].score == "2,000 tokens/s"
    assert found["decoding after 4,096 tokens"].names == ["transformer"]
    assert len(found["training memory"].names) == 8  # alike


def test_nobody_wins_who_only_guesses(results):
    for entry in results["summary"].values():
        entry["abilities"]["permutations"] = {"4": score(11), "8": score(9)}
    best = next(b for b in winners.winners(results) if b.what == "Permutations")
    assert best.names == [] and "nobody" in best.score


def test_statistics():
    found = pooled({"a": score(3, 10), "b": score(4, 20)})
    assert (found.correct, found.asked, found.unit) == (7, 30, "question")
    assert two_proportions(50, 100, 50, 100) == 1.0
    assert paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert paired([1.0, 2.0, 3.0], [2.0, 3.1, 3.9]) < 0.05
    assert paired([1.0], [2.0]) is None
