"""The cost task: slopes, operations, and what a cell holds, against counts by hand."""

import pytest
import torch
from test_eval import CPU, NAMES, TINY, TINY_SIZES

from eval import contestants, cost, report

CHOSEN = [contestants.CONTESTANTS[name] for name in NAMES]


@pytest.fixture(scope="module")
def cell():
    ticks = []
    found = cost.measure(CHOSEN, TINY.cost, 0, CPU, ticks.append)
    assert sum(ticks) == cost.units(TINY.cost, CHOSEN)
    return found


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_slopes_of_powers(power):
    assert cost.slope({n: 3.7 * n**power for n in (64, 256, 1024, 5000)}) == pytest.approx(power, abs=1e-9)


def test_operations_by_hand():
    """A step of the windowed Transformer: its dense layers forward and backward, and scores of each segment."""
    model = contestants.build(contestants.CONTESTANTS["transformer"], TINY_SIZES).train()
    t, d, f, v, w = 40, TINY_SIZES.hidden, model.config.intermediate_size, TINY_SIZES.vocabulary, TINY_SIZES.window
    counted = cost.flops(cost._training_step(model, torch.zeros(1, t, dtype=torch.long)))
    dense = 2 * t * (TINY_SIZES.layers * (4 * d * d + 2 * d * f) + d * v)
    # Forward is two products of queries with keys or values, backward five with the scores computed anew. They are of
    # a segment's w keys at least, and of all t at most, since a tile is wider than so small a window.
    least, most = (7 * 2 * t * keys * d * TINY_SIZES.layers for keys in (w, t))
    assert 3 * dense + least <= counted <= 3 * dense + most  # backward of a dense layer is two products for one


def test_longer_steps_have_fewer_rows_and_repeats():
    settings = cost.CostSettings(TINY_SIZES, (16, 64, 256), 128, 8, (8,), 1)
    assert [settings.batch_at(n) for n in settings.lengths] == [8, 2, 1]
    assert [settings.repeats_at(n) for n in settings.lengths] == [8, 8, 4]
    assert settings.repeats_at(4096) == 3


def test_what_a_cell_holds(cell):
    assert list(cell) == NAMES
    for name, entry in cell.items():
        assert list(entry["training"]) == ["24", "48"] and entry["machine_flops_per_second"] > 1e6
        for step in entry["training"].values():
            assert step["tokens_per_second"] > 0 and step["peak_bytes"] > 0 and step["flops_per_token"] > 1e4
            rate = step["flops_per_token"] * step["tokens_per_second"] / entry["machine_flops_per_second"]
            assert step["utilisation"] == pytest.approx(rate)
        assert entry["training_tokens_per_second"] == entry["training"]["24"]["tokens_per_second"]
        assert entry["training_peak_bytes"] == entry["training"]["24"]["peak_bytes"]
        for by_context in ("prefill_tokens_per_second", "decode_ms_per_token", "cache_bytes"):
            assert list(entry[by_context]) == ["8", "24"] and all(x > 0 for x in entry[by_context].values()), name
        assert set(entry["slopes"]) == set(report.SLOPES)


def test_the_bounded_caches_do_not_grow(cell):
    for name, entry in cell.items():
        small, large = entry["cache_bytes"]["8"], entry["cache_bytes"]["24"]
        grows = name in ("transformer_full", "memorizing_transformer")
        assert (large > small) if grows else large < 3 * small, name


def test_a_stream_reads_as_one_forward():
    """Chunk by chunk, with decoding in between or without, to the same next token as the whole text at once."""
    model = contestants.build(contestants.CONTESTANTS["transformer_xl"], TINY_SIZES).eval()
    stream = cost.Stream(model, 30, 0, CPU)
    stream.read(7)
    stream.read(23)
    with torch.no_grad():
        whole = model(input_ids=stream.ids).logits[:, -1].argmax(-1, keepdim=True)
    assert torch.equal(stream.last, whole) and stream.place == 30
    stream.decode()
    assert stream.cache.get_seq_length() == 31
