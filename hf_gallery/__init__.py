"""hf-gallery: long-sequence transformers, written from scratch, each a real Hugging Face model."""

import transformers as _transformers

from .models import modeling_block_recurrent_transformer as _block_recurrent_transformer
from .models import modeling_longformer as _longformer
from .models import modeling_memorizing_transformer as _memorizing_transformer
from .models import modeling_transformer as _transformer
from .models import modeling_transformer_xl as _transformer_xl
from .models.cache import GalleryCache
from .models.configuration_block_recurrent_transformer import GalleryBlockRecurrentTransformerConfig
from .models.configuration_longformer import GalleryLongformerConfig
from .models.configuration_memorizing_transformer import GalleryMemorizingTransformerConfig
from .models.configuration_transformer import GalleryTransformerConfig
from .models.configuration_transformer_xl import GalleryTransformerXLConfig
from .models.modeling_block_recurrent_transformer import (
    GalleryBlockRecurrentTransformerForCausalLM,
    GalleryBlockRecurrentTransformerForSequenceClassification,
    GalleryBlockRecurrentTransformerModel,
)
from .models.modeling_longformer import (
    GalleryLongformerForCausalLM,
    GalleryLongformerForMaskedLM,
    GalleryLongformerForQuestionAnswering,
    GalleryLongformerForSequenceClassification,
    GalleryLongformerForTokenClassification,
    GalleryLongformerModel,
)
from .models.modeling_memorizing_transformer import (
    GalleryMemorizingTransformerForCausalLM,
    GalleryMemorizingTransformerForSequenceClassification,
    GalleryMemorizingTransformerModel,
)
from .models.modeling_transformer import (
    GalleryTransformerForCausalLM,
    GalleryTransformerForConditionalGeneration,
    GalleryTransformerForMaskedLM,
    GalleryTransformerForSequenceClassification,
    GalleryTransformerModel,
)
from .models.modeling_transformer_xl import (
    GalleryTransformerXLForCausalLM,
    GalleryTransformerXLForSequenceClassification,
    GalleryTransformerXLModel,
)

__version__ = "0.1.0"


def _register(module, model):
    """Makes the Auto classes of transformers know a variant: its config and every head."""
    config = model.config_class
    _transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for auto, name in model.heads.items():
        getattr(_transformers, auto).register(config, getattr(module, name), exist_ok=True)


_register(_transformer, GalleryTransformerModel)
_register(_transformer_xl, GalleryTransformerXLModel)
_register(_longformer, GalleryLongformerModel)
_register(_memorizing_transformer, GalleryMemorizingTransformerModel)
_register(_block_recurrent_transformer, GalleryBlockRecurrentTransformerModel)

__all__ = [
    "GalleryBlockRecurrentTransformerConfig",
    "GalleryBlockRecurrentTransformerForCausalLM",
    "GalleryBlockRecurrentTransformerForSequenceClassification",
    "GalleryBlockRecurrentTransformerModel",
    "GalleryCache",
    "GalleryLongformerConfig",
    "GalleryLongformerForCausalLM",
    "GalleryLongformerForMaskedLM",
    "GalleryLongformerForQuestionAnswering",
    "GalleryLongformerForSequenceClassification",
    "GalleryLongformerForTokenClassification",
    "GalleryLongformerModel",
    "GalleryMemorizingTransformerConfig",
    "GalleryMemorizingTransformerForCausalLM",
    "GalleryMemorizingTransformerForSequenceClassification",
    "GalleryMemorizingTransformerModel",
    "GalleryTransformerConfig",
    "GalleryTransformerForCausalLM",
    "GalleryTransformerForConditionalGeneration",
    "GalleryTransformerForMaskedLM",
    "GalleryTransformerForSequenceClassification",
    "GalleryTransformerModel",
    "GalleryTransformerXLConfig",
    "GalleryTransformerXLForCausalLM",
    "GalleryTransformerXLForSequenceClassification",
    "GalleryTransformerXLModel",
]
