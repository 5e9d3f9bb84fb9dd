"""Training on long documents: SegmentTrainer and its lanes."""

from .lanes import DocumentLanes
from .trainer import SegmentTrainer

__all__ = ["DocumentLanes", "SegmentTrainer"]
