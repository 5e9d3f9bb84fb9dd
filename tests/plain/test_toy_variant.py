"""Adding an architecture touches nothing else: the one of toy_variant.py, registered by its entry, obeys laws 1 to 4
and 6 by their own tests, and is known to the Auto classes, the cards and the contestants."""

import ast
from pathlib import Path

import pytest
import test_law_6_layers_pure as law_6
import torch
import transformers
from converted import Converted, generates, obeys_the_laws
from toy_variant import GalleryToyConfig, GalleryToyForCausalLM, GalleryToyModel
from variants import SIZES, Head, Variant, runner, words

from hf_gallery import variants
from hf_gallery.cards import render_card
from hf_gallery.drawing import panels
from hf_gallery.variants import Contestant, markdown, register

HEADS = {
    "causal": Head(GalleryToyForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(GalleryToyModel, "AutoModel", stream=True),
}
SETTINGS = [
    Variant(f"toy_{reach}", GalleryToyConfig, HEADS, {"reach": reach}, horizon=reach + 3, linear=True)
    for reach in (5, 8)
]
ENTRY = variants.Variant(
    name="toy",
    title="Toy",
    short="Toy",
    authors="nobody",
    arxiv="0000.00000",
    paper_title="A Toy",
    idea="a window that moves by threes",
    sees="what is near",
    carries="keys and values of the window",
    about="A query sees what is near.",
    limits=("It is a toy.",),
    model=GalleryToyModel,
    small=dict(reach=8),
    contestants=(
        Contestant(
            name="toy", label="Toy", reach="a window", settings=lambda sizes: dict(reach=sizes.window),
            carries="keys", colour="#000000", symbol="cross",
        ),
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def registered():
    register(ENTRY)
    yield
    del variants.VARIANTS["toy"]


class Toy(Converted):
    """Stands in for a converted folder: a variant that is in none."""

    make = Variant.make


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", SETTINGS, ids=lambda v: v.name)
def test_it_obeys_the_laws(variant, head):
    alone = Toy(**vars(variant) | {"heads": {head: HEADS[head]}})
    obeys_the_laws(alone)
    if head == "causal":
        generates(alone)
    for gradients in (False, True):
        law_6.test_a_forward_that_fails_leaves_the_cache(variant, head, gradients)
        law_6.test_a_layer_called_twice_gives_the_same(variant, head, gradients)
    law_6.test_gradient_checkpointing_with_memory_on(variant, head, 0.2, False)
    law_6.test_two_continuations_of_one_state_do_not_disturb_each_other(variant, head)
    law_6.test_a_cache_holds_no_graph(variant, head)


@pytest.mark.parametrize("variant", SETTINGS, ids=lambda v: v.name)
def test_its_interval(variant):
    """With one layer a query's output changes with exactly the tokens that it sees."""
    run = runner(variant, "causal", num_hidden_layers=1)
    ids, reach = words(1, 17), variant.settings["reach"]
    with torch.no_grad():
        plain = run.model(ids).logits[0]
        for changed in range(17):
            other = ids.clone()
            other[0, changed] = (other[0, changed] + 1) % 90
            moved = ((run.model(other).logits[0] - plain).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
            assert moved == [p for p in range(17) if p - p % 3 - reach <= changed <= p]


def test_what_else_knows_it(tmp_path):
    """Auto classes, the saved folder, the README's table, the cards and the drawings, from its entry alone."""
    run = runner(SETTINGS[0], "causal")
    assert type(transformers.AutoModelForCausalLM.from_config(run.model.config)) is GalleryToyForCausalLM
    assert "| [Toy](https://arxiv.org/abs/0000.00000) (nobody) | what is near |" in markdown()
    assert "A query sees what is near." in render_card("toy")
    (panel,) = panels("toy", settings=dict(reach=2), tokens=9)
    assert panel.sight.mask().tolist() == [[p - p % 3 - 2 <= s <= p for s in range(9)] for p in range(9)]
    assert ENTRY.causal is GalleryToyForCausalLM and ENTRY.make_config().reach == 8
    assert GalleryToyConfig(**SIZES).cache_capacity == 18


def test_an_encoder_alone_is_saved_and_opens(tmp_path):
    """An architecture need not have a causal model."""
    kind = type("GalleryToyModel", (GalleryToyModel,), {"auto_classes": {"AutoModel": "GalleryToyModel"}})
    kind.__module__ = GalleryToyModel.__module__
    model = kind(GalleryToyConfig(**SIZES))
    code = tmp_path / "code"
    model.save_pretrained(code)
    about = transformers.AutoConfig.from_pretrained(code)
    assert set(about.auto_map) == {"AutoConfig", "AutoModel"}
    opened = kind.from_pretrained(code).eval()
    with torch.no_grad():
        assert torch.equal(opened(words(1, 9)).last_hidden_state, model.eval()(words(1, 9)).last_hidden_state)


def test_it_is_small_and_touches_nothing():
    path = Path(__file__).with_name("toy_variant.py")
    assert len(path.read_text().splitlines()) <= 60
    root = path.parents[2]
    for other in [*root.glob("hf_gallery/**/*.py"), *root.glob("eval/**/*.py")]:
        names = {x.id for x in ast.walk(ast.parse(other.read_text())) if isinstance(x, ast.Name)}
        assert not {name for name in names if "Toy" in name}, other
