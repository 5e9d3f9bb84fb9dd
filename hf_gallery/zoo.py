"""The zoo: trained models, one of each architecture, in a folder of folders. `python -m eval zoo` makes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .cards import SavedFacts, variant_of
from .files import read_json

ZOO = Path(__file__).parent.parent / "zoo"  # beside the package in a checkout


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """A model of the zoo: its folder, its parameters, the bytes that it was trained on and its bits per byte on
    held-out documents; None for a number that its folder does not tell."""

    folder: Path
    parameters: int
    trained_bytes: int | None
    bits_per_byte: float | None


def zoo_models(folder: Path = ZOO) -> list[ZooModel]:
    """The models in the sub-folders of a zoo, those that model text best first.

    Raises ValueError for a folder that holds none.
    """
    found = []
    for path in sorted(folder.glob("[!.]*/config.json")):
        place = path.parent
        variant, training = variant_of(place), read_json(place / "training.json")
        facts, training = SavedFacts.read(place, variant), training if isinstance(training, dict) else {}
        bits = facts.evaluation.get("eval_bits_per_byte")
        found.append(ZooModel(place, facts.parameters, training.get("trained_bytes"), bits))
    if not found:
        raise ValueError(f"{folder} holds no trained models; a checkout of hf-gallery has some in its folder zoo/")
    return sorted(found, key=lambda model: (model.bits_per_byte is None, model.bits_per_byte))
