"""The table of architectures is the only list of them: what else is said of them follows from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import transformers
from variants import COLUMNS
from variants import VARIANTS as SETTINGS

import hf_gallery
from eval import claims, figures, long, pictures
from eval.contestants import CONTESTANTS
from hf_gallery.variants import VARIANTS, markdown, register

ROOT = Path(__file__).parents[2]
# Claims of each paper, other implementations beside ours, measured learning rates, and the roads of contexts with more
# than plain intervals: of one architecture after the other.
EACH = {"eval/claims.py", "eval/peers/comparison.py", "eval/peers/worker.py", "eval/presets.py", "hf_gallery/roads.py"}


def test_the_readme_has_the_table():
    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_nothing_else_lists_the_architectures():
    files = [*ROOT.glob("hf_gallery/**/*.py"), *ROOT.glob("eval/**/*.py"), *ROOT.glob("examples/*.py")]
    files += [ROOT / "setup.py", ROOT / "tests" / "works.py", ROOT / "tests" / "conftest.py"]
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8")
        left_out = [v.name for v in VARIANTS.values() if v.name not in text and v.config.__name__ not in text]
        assert left_out or name in EACH or name == "hf_gallery/variants.py", f"{name} lists all architectures"


@pytest.mark.parametrize("name", VARIANTS)
def test_what_follows_from_an_entry(name):
    """Public names, the Auto classes, a contestant that is drawn, a column of the table of what works."""
    variant = VARIANTS[name]
    for kind_name, kind in variant.classes.items():
        assert getattr(hf_gallery, kind_name) is kind and kind_name in hf_gallery.__all__
    config = variant.make_config(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    for auto, kind_name in variant.auto_classes.items():
        if auto == "AutoModelForSeq2SeqLM":
            with pytest.raises(ValueError, match="and is_encoder_decoder is True"):  # one stack's segments, distances
                getattr(transformers, auto).from_config(config)
            plain = dict(segment_length=None) if name == "transformer" else dict(position_embedding_type="learned")
            config = variant.make_config(hidden_size=16, num_attention_heads=2, intermediate_size=32, **plain)
        assert type(getattr(transformers, auto).from_config(config)).__name__ == kind_name
    assert variant.contestants and all(CONTESTANTS[c.name].model is variant.causal for c in variant.contestants)
    assert any(about.config is variant.config and about.name in COLUMNS for about in SETTINGS)


def test_contestants_are_drawn_apart():
    """Another colour and symbol each, which both plotting libraries know; and any number of them."""
    assert (
        len({c.colour for c in CONTESTANTS.values()})
        == len({c.symbol for c in CONTESTANTS.values()})
        == len(CONTESTANTS)
    )
    assert {c.symbol for c in CONTESTANTS.values()} <= set(pictures.MARKERS)
    assert {c.carries for c in CONTESTANTS.values()} == {"nothing", "keys", "memory", "state"}
    assert set(long.BOUNDED) | set(claims.ATTENTION_ONLY) == set(CONTESTANTS)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_more_contestants_than_colours(tmp_path, ending):
    """A picture of thirteen, half of whom the gallery does not know: each has a curve."""
    names = [*CONTESTANTS, *(f"another_{i}" for i in range(7))]
    entry = {"recall": {"16": {"asked": 8, "correct": 5}, "32": {"asked": 8, "correct": 2}}}
    summary = {name: entry | {"label": name} for name in names}
    results = {"summary": summary, "window": {"recall": 16}, "chance": 0.1}
    pictures.forgetting_curves(results, tmp_path / f"curves.{ending}")
    assert (tmp_path / f"curves.{ending}").stat().st_size > 1000
    places = [figures.place(name, results) for name in names]
    assert len(set(places)) == len(names) and places[: len(CONTESTANTS)] == list(range(len(CONTESTANTS)))


def test_an_architecture_is_drawn_alike_in_every_run():
    alone = {"summary": {"longformer": {}}}
    assert figures.place("longformer", alone) == list(CONTESTANTS).index("longformer")


def test_names_are_of_one_variant():
    variant = VARIANTS["longformer"]
    for same in (variant, dataclasses.replace(variant, name="other")):
        with pytest.raises(ValueError, match="'longformer' with the model_type 'gallery_longformer' already"):
            register(same)
    assert list(VARIANTS.values()).count(variant) == 1
