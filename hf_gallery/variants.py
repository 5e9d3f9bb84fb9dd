"""The five architectures by name: their papers, classes, and a small configuration of each to start from."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

import hf_gallery


@dataclasses.dataclass(frozen=True)
class Variant:
    """One architecture. causal: its language model. small: config arguments of a model that trains on a CPU, beside
    the sizes that all share."""

    name: str
    title: str
    authors: str
    arxiv: str
    idea: str
    config: type[PreTrainedConfig]
    causal: type[PreTrainedModel]
    small: dict[str, Any]

    @property
    def paper(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def heads(self) -> dict[str, str]:
        """Class names by the Auto class that opens them."""
        return dict(self.causal.heads)

    def make_config(self, **arguments: Any) -> PreTrainedConfig:
        """The small configuration, with `arguments` in place of its own.

        Raises ValueError for an argument that the configuration has not, or a value that it refuses.
        """
        inherited, known = ({f.name for f in dataclasses.fields(kind)} for kind in (PreTrainedConfig, self.config))
        for name in arguments:
            if name.startswith("_") or (name not in known and not hasattr(PreTrainedConfig, name)):  # as num_labels
                own = sorted(name for name in known - inherited if not name.startswith("_"))
                raise ValueError(f"{self.config.__name__} has no argument {name!r}; it has {', '.join(own)}")
        return self.config(**SHARED | self.small | arguments)


SHARED = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)

VARIANTS = {
    v.name: v
    for v in (
        Variant(
            "transformer",
            "Transformer",
            "Vaswani et al. 2017",
            "1706.03762",
            "attention over everything before, or over segments",
            hf_gallery.GalleryTransformerConfig,
            hf_gallery.GalleryTransformerForCausalLM,
            dict(norm_position="pre", segment_length=256),
        ),
        Variant(
            "transformer_xl",
            "Transformer-XL",
            "Dai et al. 2019",
            "1901.02860",
            "segments with a memory of hidden states, relative positions",
            hf_gallery.GalleryTransformerXLConfig,
            hf_gallery.GalleryTransformerXLForCausalLM,
            dict(segment_length=128, mem_len=128),
        ),
        Variant(
            "longformer",
            "Longformer",
            "Beltagy et al. 2020",
            "2004.05150",
            "a sliding, dilated window, and global tokens",
            hf_gallery.GalleryLongformerConfig,
            hf_gallery.GalleryLongformerForCausalLM,
            dict(norm_position="pre", position_embedding_type="relative", embedding_norm=False, attention_window=128),
        ),
        Variant(
            "memorizing_transformer",
            "Memorizing Transformer",
            "Wu et al. 2022",
            "2203.08913",
            "the nearest of a large memory of keys and values, by a gate",
            hf_gallery.GalleryMemorizingTransformerConfig,
            hf_gallery.GalleryMemorizingTransformerForCausalLM,
            dict(segment_length=128, mem_len=128, memory_layers=[2], memory_size=8192, memory_topk=32),
        ),
        Variant(
            "block_recurrent_transformer",
            "Block-Recurrent Transformer",
            "Hutchins et al. 2022",
            "2203.07852",
            "a sliding window, and a recurrent state of vectors",
            hf_gallery.GalleryBlockRecurrentTransformerConfig,
            hf_gallery.GalleryBlockRecurrentTransformerForCausalLM,
            dict(block_length=128, num_state_vectors=64, recurrent_layers=[2]),
        ),
    )
}
