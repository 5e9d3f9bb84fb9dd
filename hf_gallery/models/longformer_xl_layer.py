"""Attention and layer of Longformer-XL: Longformer's window over segments, with Transformer-XL's memory of states.

    query p sees the keys in [max(p - w, seg(p) - mem_len), p], seg(p) = p - p mod segment_length

Those before seg(p) are made of detached states (Dai et al. 2019, section 3.2), so that no gradient crosses from a
segment into the one before, while W_k and W_v learn from the memory too. The window has the same length for every
query wherever it stands in its segment, as long as mem_len is no less than it; the numbers are then those of the
windowed decoder. Letters: see spans.py.
"""

from __future__ import annotations

from .attention_maps import Keys, attend_shown
from .blocks import merge_heads
from .longformer_layer import Context, GalleryLongformerAttention, GalleryLongformerLayer
from .segments import SegmentLayer, attend_segments


class GalleryLongformerXLAttention(GalleryLongformerAttention):
    """A decoder's window within its segment and the memory before it."""

    def forward(self, x, own, joined, before, context: Context):
        """As in Transformer-XL: x (B, T, E), pairs of keys and values (B, H, ., D). Returns (B, T, E) and, if asked
        for, probabilities (B, H, T, C + T)."""
        query, position = self.query(x), None  # (B, H, T, D)
        if self.relative:
            query, position = self._relative(query, context)
        spans, parts = context.segments(self.left)
        if parts is not None:
            out, probabilities = attend_segments(
                context, query, own, before, parts, position, dropout=self.dropout.rate
            )
        else:
            key, value = joined
            keys = Keys(key, value, spans, position)
            out, probabilities = attend_shown(context, query, keys, dropout=self.dropout.rate)
        return self.o_proj(merge_heads(out)), probabilities


class GalleryLongformerXLLayer(SegmentLayer, GalleryLongformerLayer):
    """One layer; its state is that of SegmentLayer."""

    attention = GalleryLongformerXLAttention
