"""Names that transformers has changed since the oldest release that setup.py allows, as the one here has them."""

import dataclasses

from transformers import PreTrainedModel, TrainingArguments

_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}


def checkpointing(on=True):
    """The training argument that keeps no activations but computes them again."""
    return {"activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing": on}


def checkpoint_activations(model, arguments):
    """Has a model compute its activations again, with these arguments of torch.utils.checkpoint."""
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(arguments)
    else:
        model.gradient_checkpointing_enable(arguments)
