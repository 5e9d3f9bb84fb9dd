"""The cost task: slopes, operations, and what a cell holds, against counts by hand."""

import dataclasses

import pytest
import torch
from test_eval import CPU, NAMES, TINY, TINY_SIZES

from eval import contestants, cost, figures

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
    """Of the windowed Transformer, forward alone and with backward: its dense layers, and the attention's tiles.

    Backward of a dense layer is two products for one. Attention's forward is two products of queries with keys or
    values, its backward five, since it computes the scores anew, over the same tiles. These hold a segment's keys at
    least, and all of them at most, since a tile is wider than so small a window.
    """
    model = contestants.build(contestants.CONTESTANTS["transformer"], TINY_SIZES).train()
    t, d, f, v, w = 40, TINY_SIZES.hidden, model.config.intermediate_size, TINY_SIZES.vocabulary, TINY_SIZES.window
    ids = torch.zeros(1, t, dtype=torch.long)
    dense = 2 * t * (TINY_SIZES.layers * (4 * d * d + 2 * d * f) + d * v)
    with torch.no_grad():
        product = (cost.flops(lambda: model(input_ids=ids)) - dense) / 2
    assert TINY_SIZES.layers * 2 * t * w * d <= product <= TINY_SIZES.layers * 2 * t * t * d
    assert cost.flops(cost._training_step(model, ids)) == 3 * dense + 7 * product


def test_operations_are_counted_by_tiles():
    """Whatever a GPU computes attention by, and it goes on by that; models from outside are left as they are."""
    model = contestants.build(contestants.CONTESTANTS["transformer"], TINY_SIZES).train()
    step = cost._training_step(model, torch.zeros(1, 40, dtype=torch.long))
    expected = cost.flops(step)
    model.set_attn_implementation("sdpa")
    assert cost.flops(step) != expected
    with cost._by_tiles(model):
        assert cost.flops(step) == expected
    assert model.config._attn_implementation == "sdpa"
    with cost._by_tiles(torch.nn.Linear(1, 1)):
        pass


def test_steps_in_mixed_precision():
    """The same operations, of which the maps' are in bf16; weights and their gradients stay in float32."""
    model = contestants.build(contestants.CONTESTANTS["transformer_xl"], TINY_SIZES).train()
    ids, seen = torch.zeros(1, 24, dtype=torch.long), set()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
            layer.weight.register_hook(lambda gradient: seen.add(gradient.dtype))
    counted = [cost.flops(cost._training_step(model, ids, bf16)) for bf16 in (False, True)]
    assert counted[0] == counted[1] and seen == {torch.float32, torch.bfloat16}
    assert cost.machine_speed(CPU, bf16=True, repeats=1) > 1e6


def test_longer_steps_have_fewer_rows_and_repeats():
    settings = cost.CostSettings(TINY_SIZES, (16, 64, 256), 128, 8, (8,), 1)
    assert [settings.batch_at(n) for n in settings.lengths] == [8, 2, 1]
    assert [settings.repeats_at(n) for n in settings.lengths] == [8, 8, 6]
    assert settings.repeats_at(4096) == 6  # as many as an interval of their median needs


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
        for context, (slow, quick) in entry["prefill_interval"].items():
            assert 0 < slow <= entry["prefill_tokens_per_second"][context] <= quick
        assert list(entry["prefill_interval"]) == ["8", "24"]
        assert set(entry["slopes"]) == set(cost.SLOPES)


def test_the_caches_stop_growing():
    """Beyond its horizon each cache is of one size. Before, the line through log(bytes) goes up, where a segment's
    columns are not there from its first token on."""
    horizon = TINY_SIZES.memory_size + TINY_SIZES.context
    for contexts in ((1, horizon), (2 * horizon, 3 * horizon, 4 * horizon)):
        settings = dataclasses.replace(TINY.cost, lengths=(8,), contexts=contexts, decode_tokens=1)
        for name, entry in cost.measure(CHOSEN, settings, 0, CPU, lambda ticks: None).items():
            grown = entry["slopes"]["cache_bytes"]
            grows = contexts[0] == 1 and "recurrent_memory" not in name
            assert grown > 0.05 if grows else abs(grown) < 0.01, name


def test_the_page_shows_what_it_costs(cell):
    """A plot of each cost, all contestants by length, both in the order of the lengths; slopes under the pointer."""
    summary = {c.name: {"label": c.label, "reach": c.reach, "cost": cell[c.name]} for c in CHOSEN}
    plots = figures._costs([(i, name, entry) for i, (name, entry) in enumerate(summary.items())])
    assert len(plots) == len(figures.COSTS) >= 7
    for plot in plots:
        assert [s.label for s in plot.series] == [c.label for c in CHOSEN]
        assert all([p.x for p in s.points] in ([24, 48], [8, 24]) for s in plot.series)
    seconds = next(plot for plot in plots if plot.title == "What training costs: time").series[0]
    first = cell[NAMES[0]]
    assert [p.y for p in seconds.points] == [x["tokens_per_second"] for x in first["training"].values()]
    assert f"to the power of {first['slopes']['training_seconds']:.2f}" in seconds.points[0].said


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
