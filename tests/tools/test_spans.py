"""Drawings show what models see: each cell is a key of the model's own intervals, and changing a token moves what they
say that it reaches, and nothing else."""

import re
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner
from variants import VARIANTS, first_marked, words

from hf_gallery.cli import app
from hf_gallery.drawing import Panel, draw, panels, render
from hf_gallery.roads import DIRECT, INDIRECT, watch
from hf_gallery.variants import VARIANTS as ARCHITECTURES

TOKENS, SOURCE = 23, 9
HEADS = ("decoder", "causal", "encoder", "seq2seq")
CASES = [
    pytest.param(variant, next(head for head in some if head in variant.heads), id=f"{variant.name}-{some[0]}")
    for variant in VARIANTS
    for some in (("causal",), ("encoder",), ("seq2seq",))
    if some[0] in variant.heads
]


def made(variant, head):
    """A bare model in float64 that retrieves all that it has stored, and its input."""
    if variant.needs:
        pytest.importorskip(variant.needs)
    all_of_it = dict(memory_topk=variant.settings["memory_size"]) if "memory_size" in variant.settings else {}
    model = variant.make(head, dtype=torch.float64, **all_of_it).base_model
    inputs = {"input_ids": words(1, TOKENS)}
    if head == "seq2seq":
        inputs = {"input_ids": words(1, SOURCE, seed=1), "decoder_input_ids": inputs["input_ids"]}
    if "global_attention_mask" in model.arguments() and head != "causal":
        inputs["global_attention_mask"] = first_marked(inputs["input_ids"])
    return model, inputs


def cells(path):
    """The cells of a drawn path, (key, query)."""
    runs = re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.get("d"))
    return {(int(x) + i, int(y)) for x, y, count in runs for i in range(int(count))}


def drawn(sight):
    """The cells of each road in the picture of one sight, (key, query)."""
    svg = ElementTree.fromstring(render("one", [Panel("", "", sight)]))
    paths = svg.findall(".//{*}g/{*}path")
    return {path.get("class"): cells(path) for path in paths if path.get("class") != "line"}


@pytest.mark.parametrize("variant, head", CASES)
def test_cells_are_what_layers_attend_to(variant, head):
    """Full cells are the keys with a probability above 0 in the maps that output_attentions gives; where there is no
    map, see the next test. Cells of one road are those of the sight, whatever else stands in the picture."""
    model, inputs = made(variant, head)
    sights = watch(model, **inputs)
    for sight in sights:
        for road, found in drawn(sight).items():
            assert found == {(k, q) for q, k in sight.mask(road).nonzero().tolist()}, road
    if variant.one_by_one:
        return
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    maps = {
        "decoder": output.get("decoder_attentions", output.get("attentions")),
        "encoder": output.get("encoder_attentions", output.get("attentions")),
        "cross-attention": output.get("cross_attentions"),
    }
    seen = 0
    for sight in sights:
        found = {cell for road, some in drawn(sight).items() if road in DIRECT for cell in some}
        aside = sum(kind == "state" for kind, _ in sight.keys)  # vectors are in no map
        found = {(k - aside, q) for k, q in found if k >= aside}
        for layer in sight.layers:
            expected = maps[sight.stack][layer][0].amax(0) > 0
            before = expected.shape[1] - (len(sight.keys) - aside)
            assert before == 0
            assert found == {(k, q) for q, k in expected.nonzero().tolist()}, (sight.stack, layer)
            seen += 1
    assert seen == sum(len(x) for x in maps.values() if x is not None) if head == "seq2seq" else seen > 0


@pytest.mark.parametrize("variant, head", [case for case in CASES if case.values[1] != "seq2seq"])
def test_a_changed_token_moves_what_roads_lead_to(variant, head):
    """All roads of all layers, one behind another, lead from a token to exactly the outputs that change with it."""
    model, inputs = made(variant, head)
    reached = None
    by_layer = {layer: sight for sight in watch(model, **inputs) for layer in sight.layers}
    for layer in sorted(by_layer):
        sight = by_layer[layer]
        place = {key: i for i, key in enumerate(sight.queries)}
        step = torch.eye(len(place), dtype=torch.bool)
        for q, k in sight.mask().nonzero().tolist():
            if sight.keys[k] in place:
                step[q, place[sight.keys[k]]] = True
        reached = step if reached is None else (step.double() @ reached.double()) > 0
    tokens = [i for i, key in enumerate(sight.queries) if key[0] == "token"]
    reached = reached[tokens][:, tokens]
    ids = inputs["input_ids"].repeat(TOKENS + 1, 1)
    at = torch.arange(TOKENS)
    ids[at, at] = (ids[at, at] + 1) % 90
    marks = {k: x.repeat(TOKENS + 1, 1) for k, x in inputs.items() if k != "input_ids"}
    with torch.no_grad():
        out = model(input_ids=ids, **marks).last_hidden_state
    moved = ((out[:-1] - out[-1]).abs().amax(-1) > 1e-12).T  # (query, changed)
    assert torch.equal(moved, reached)


def test_spans_of_the_plan_are_drawn():
    """Of an interval alone, the cells are `Spans.visible`."""
    model, inputs = made(next(v for v in VARIANTS if v.name == "transformer_segments"), "causal")
    kept = []
    handle = model.stack.layers[0].register_forward_pre_hook(lambda _, arguments: kept.append(arguments[1].spans))
    (sight,) = watch(model, **inputs)
    handle.remove()
    assert drawn(sight)["window"] == {(k, q) for q, k in kept[0].visible(TOKENS)[0].nonzero().tolist()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_is_drawn_small_and_legible(name):
    """By colours that follow the reader's scheme, with words for who cannot see; all its roads are explained."""
    svg = draw(name)
    root = ElementTree.fromstring(svg)
    assert len(svg) < 12_000 and float(root.get("width")) <= 900
    assert "prefers-color-scheme:dark" in svg and root.find("{*}title").text.startswith(ARCHITECTURES[name].title)
    texts = [text.text for text in root.findall("{*}text")]
    used = {path.get("class") for path in root.findall(".//{*}g/{*}path")} - {"line"}
    assert {road for road, said in (DIRECT | INDIRECT).items() if said in texts} == used


def test_the_command_draws_what_it_is_told(tmp_path):
    run = CliRunner()
    out = tmp_path / "xl.svg"
    arguments = ["spans", "transformer_xl", "--set", "segment_length=5", "--set", "mem_len=2", "--tokens", "10"]
    assert run.invoke(app, [*arguments, "--out", str(out)]).exit_code == 0
    (panel,) = panels("transformer_xl", settings=dict(segment_length=5, mem_len=2), tokens=10)
    seen = {(p, k) for p in range(10) for k in range(max(0, p - p % 5 - 2), p + 1)}
    assert {(q, k) for q, k in panel.sight.mask().nonzero().tolist()} == seen
    assert out.read_text() == render("Transformer-XL", [panel])
    assert run.invoke(app, arguments).stdout == out.read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["spans", "bert"], "variant is 'bert'"),
        (["spans", "transformer_xl", "--set", "window=3"], "has no argument 'window'"),
        (["spans", "transformer_xl", "--set", "mem_len=-1"], "mem_len is -1"),
        (["spans", "transformer_xl", "--tokens", "513"], "tokens is 513; a drawing shows 1 to 512"),
        (["spans", "transformer_xl", "--global", "0"], "Transformer-XL has no global tokens"),
        (["spans", "longformer", "--global", "99"], "give positions from 0 to 11"),
    ],
)
def test_wrong_requests_are_refused_by_name(arguments, said):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and said in result.output
