"""Weights are compared with the configuration before a model is given memory for them.

transformers compares them, too, but afterwards: a config.json that was damaged, or that somebody else wrote, would
have taken all memory by then, or hours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from safetensors import safe_open
from torch import nn

MISSING = 2**28  # weights that may be missing, whatever the files hold: new heads, new tokens


class WrongWeightsError(ValueError, RuntimeError):
    """Weights that are not of the model that a config describes. A RuntimeError too, as transformers' own is, for
    whoever catches that."""


def check_weights(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None, files: Sequence[str] | None, may_differ: bool
):
    """Raises WrongWeightsError unless a model on the meta device is one of the weights in a state_dict, or in
    safetensors files: with shapes that agree, but where they `may_differ`, and of about as many parameters."""
    given = _shapes(state_dict, files)
    if given is None:
        return
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = getattr(model, "all_tied_weights_keys", {})
    missing, differ = 0, []
    for name, weight in model.state_dict(keep_vars=True).items():
        shape = tuple(getattr(weight, "ds_shape", weight.shape))  # of DeepSpeed, which keeps a part
        # A backbone's files open under a head, and a head's as the backbone.
        found = next((x for x in (name, prefix + name, name.removeprefix(prefix)) if x in given), None)
        if found is not None and given[found] != shape and not may_differ:
            differ.append(f"{name} has the shape {given[found]} in the weights, and {shape} by the config")
        elif found is None and name not in tied:
            missing += weight.numel()
        elif found is not None and given[found] != shape:
            missing += weight.numel()
    if differ:
        more = f", and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise WrongWeightsError(
            f"the weights are not of the model that the config describes: {'; '.join(differ[:5])}{more}. Correct the "
            "config, or give ignore_mismatched_sizes=True to draw these weights anew"
        )
    held = sum(torch.Size(shape).numel() for shape in given.values())
    if missing > max(MISSING, 8 * held):
        raise WrongWeightsError(
            f"the config describes a model with {missing:,} weights beside the {held:,} that there are; it is not of "
            "the model that was saved, so correct it"
        )


def _shapes(state_dict, files) -> dict[str, tuple[int, ...]] | None:
    """Shapes by name; None for torch files, which would have to be read whole."""
    if state_dict is not None:
        return {name: tuple(x.shape) for name, x in state_dict.items()}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:  # reads the header
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes
