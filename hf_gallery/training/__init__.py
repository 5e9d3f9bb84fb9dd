"""Training on long documents: SegmentTrainer and its lanes."""

from .checkpoints import newest_whole
from .lanes import DocumentLanes
from .trainer import SegmentTrainer

__all__ = ["DocumentLanes", "SegmentTrainer", "newest_whole"]
