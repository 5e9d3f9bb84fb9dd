"""hf-gallery: long-sequence transformers, written from scratch, each a real Hugging Face model.

Public here are both caches, `look` and, of every architecture in variants.py, the configuration and all heads.
Importing this makes the Auto classes of transformers know them.
"""

from .spinning import is_command as _is_command
from .spinning import spin_briefly as _spin_briefly

if _is_command():  # before the next lines import torch
    _spin_briefly()

from .looking import look as look
from .models.cache import GalleryCache as GalleryCache
from .models.static_cache import GalleryStaticCache as GalleryStaticCache
from .variants import VARIANTS as _VARIANTS

__version__ = "0.1.0"

_classes = {name: kind for variant in _VARIANTS.values() for name, kind in variant.classes.items()}
globals().update(_classes)
__all__ = sorted(["GalleryCache", "GalleryStaticCache", "look", *_classes])
