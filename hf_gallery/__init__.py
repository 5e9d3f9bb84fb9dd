"""hf-gallery: long-sequence transformers, written from scratch, each a real Hugging Face model."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from .models.cache import GalleryCache
from .models.configuration_transformer import GalleryTransformerConfig
from .models.configuration_transformer_xl import GalleryTransformerXLConfig
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

for _model in (GalleryTransformerModel, GalleryTransformerXLModel):
    _config = _model.config_class
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    ):
        if _auto.__name__ in _model.heads:
            _auto.register(_config, globals()[_model.heads[_auto.__name__]], exist_ok=True)

__all__ = [
    "GalleryCache",
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
