"""The bare model of every variant: rows are packed, the forward is planned, layers run, results are unpacked.

    input_ids (B, columns) -> Rows: own tokens first -> plan: Context -> embed (B, T, E) -> layers -> finish -> unpack

A variant says how it embeds, what its layers share (`plan`) and what stands behind the last of them (`finish`).
Padding, the cache and transformers' output classes are known here and nowhere in a variant. Letters: see spans.py.
"""

from __future__ import annotations

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from .cache import CACHE_NAME
from .context import ForwardContext
from .gradients import with_gradients_for
from .modeling_base import GalleryPreTrainedModel, no_cache
from .rows import Rows


class Backbone(GalleryPreTrainedModel):
    """Layers under embeddings. `__init__` of a variant makes embed_tokens and layers."""

    _auto_class = "AutoModel"
    output_type: type = BaseModelOutputWithPast
    gradient_checkpointing = False
    causal = True  # a query sees nothing after it; an encoder keeps no cache
    prefix = ""  # of its arguments' names, in messages

    def counted(self, position_ids=None, **inputs):
        """Positions that must be the tokens' places, since the model embeds none."""
        return position_ids

    def check(self, rows: Rows, **inputs):
        """Raises ValueError unless the variant's own inputs fit."""

    def embed(self, rows: Rows, input_ids, inputs_embeds, **more) -> torch.Tensor:
        """Packed embeddings (B, T, E)."""
        return self.embed_tokens(rows.pack(input_ids)) if inputs_embeds is None else rows.pack(inputs_embeds)

    def plan(self, common: dict, cache, **inputs) -> ForwardContext:
        """The variant's Context: `common`, the fields that all have, and its own."""
        raise NotImplementedError

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """What stands behind the last layer, (B, T, E)."""
        return x

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **inputs,
    ):
        """input_ids (B, T), or inputs_embeds (B, T, E) as get_input_embeddings() returns them; any T. attention_mask
        (B, T) or (B, columns seen + T): 1 at tokens, 0 at padding, which may stand anywhere and gets zeros.
        past_key_values: a GalleryCache, advanced in place.

        Raises ValueError for input that does not fit, before anything is computed; the cache is then unchanged.
        """
        if not self.causal:
            no_cache(past_key_values)
            use_cache = False
        rows, cache = self.open_input(
            input_ids, inputs_embeds, attention_mask, past_key_values, use_cache, self.counted(**inputs), self.prefix
        )
        self.check(rows, **inputs)
        common = dict(
            rows=rows,
            device=(input_ids if inputs_embeds is None else inputs_embeds).device,
            cached=0 if cache is None else cache.columns_held,
            keep=cache is not None,
            limit=None if cache is None else cache.limit,
            infers=not torch.is_grad_enabled(),
            output_attentions=bool(output_attentions),
            implementation=self.config._attn_implementation,
        )
        context = self.plan(common, cache, **inputs)
        x = self.embed(rows, input_ids, inputs_embeds, **inputs)
        if inputs_embeds is not None:
            x = with_gradients_for(x, self.embed_tokens)
        x, hidden, attentions = self.run_layers(
            self.layers, x, context, cache, output_hidden_states, output_attentions, *self.layer_inputs(context)
        )
        x = self.finish(x)
        if hidden is not None:
            hidden[-1] = x
        return self.output_type(
            last_hidden_state=rows.unpack(x),
            **{CACHE_NAME: cache},
            hidden_states=None if hidden is None else tuple(rows.unpack(h) for h in hidden),
            **self.results(context, attentions),
        )

    def layer_inputs(self, context) -> tuple:
        """What layers take besides (hidden states, context, state): tensors that gradients must reach."""
        return ()

    def results(self, context, attentions) -> dict:
        """Further fields of the output."""
        return {"attentions": None if attentions is None else unpacked(context.rows, attentions)}


def unpacked(rows: Rows, attentions: list, keys_too: bool = True) -> tuple:
    """Probabilities of all layers over the input's columns."""
    return tuple(rows.unpack_attentions(a, keys_too) for a in attentions)
