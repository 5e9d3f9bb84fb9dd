"""Default places of PEFT's adapters, for users who name no modules: as on Llama, whose names our maps have.

PEFT looks a model type up in tables, one for each kind of adapter, and asks for target_modules where it finds none.
"""

from __future__ import annotations

import sys

NORMS = ["self_attn_norm", "cross_attn_norm", "feed_forward_norm", "norm"]


def name_targets(model_type: str) -> None:
    """Enters a model type in PEFT's tables, if this process has PEFT: nobody else pays for its import. PEFT asks a
    model's config for its dictionary right before it looks there, so that it may be imported before the model is built
    or after (see GalleryConfig.to_dict)."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in list(vars(constants).items()) if constants is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault(model_type, NORMS if "LNTUNING" in name else table["llama"])
