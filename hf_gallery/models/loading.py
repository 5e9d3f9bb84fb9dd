"""Weights are compared with the configuration before a model is given memory for them.

transformers compares them, too, but afterwards: a config.json that was damaged, or that somebody else wrote, would
have taken all memory by then, or hours.
"""

from __future__ import annotations

import zipfile
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
    files: with shapes that agree, but where they `may_differ`, and of about as many parameters."""
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
    """Shapes by name; None where there are none, or a torch file does not read: transformers says what is wrong."""
    if state_dict is not None:
        return {name: tuple(x.shape) for name, x in state_dict.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files or ():
        found = _safetensors_shapes(path) if str(path).endswith(".safetensors") else _torch_shapes(path)
        if found is None:
            return None
        shapes |= found
    return shapes or None


def _safetensors_shapes(path: str) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:  # reads the header
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _torch_shapes(path: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes of a torch file's tensors. No number of theirs is read, but where the file is older than torch 1.6."""
    try:
        state = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # a reader of damaged bytes may raise anything
        return None
    if not isinstance(state, dict):
        return None
    tensors = {name: x for name, x in state.items() if isinstance(x, torch.Tensor)}
    for name, x in tensors.items():
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():  # one number in a million places
            raise WrongWeightsError(f"{path} holds {name}, which is no plain tensor; save the model again")
    return {name: tuple(x.shape) for name, x in tensors.items()}
