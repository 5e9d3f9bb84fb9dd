"""An encoder and a decoder over one table of embeddings: what all encoder-decoders of the gallery share.

    source (B, S) -> encoder: (B, S, E) -> decoder, which reads it beside the target (B, T) -> (B, T, E)

Letters: see spans.py.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, Seq2SeqModelOutput
from transformers.utils import can_return_tuple

from .backbone import Backbone
from .blocks import ScaledEmbedding
from .cache import CACHE_NAME, cache_of
from .gradients import with_gradients_for
from .modeling_base import check_arguments


class EncoderDecoder:
    """The bare model of an encoder-decoder, for a PreTrainedModel: it calls `join`, or where config.is_encoder_decoder
    is False makes one `stack`."""

    source_arguments: tuple[str, ...] = ()  # what the encoder reads besides the source and its mask

    def join(self, config, encoder: nn.Module, decoder: nn.Module):
        """Takes both, over one table of embeddings for source and target."""
        self._tied_weights_keys = {
            "encoder.embed_tokens.weight": "shared.weight",
            "decoder.embed_tokens.weight": "shared.weight",
        }
        scale = math.sqrt(config.hidden_size) if config.scale_embedding else 1.0
        self.shared = ScaledEmbedding(config.vocab_size, config.hidden_size, scale)
        self.encoder, self.decoder = encoder, decoder

    @classmethod
    def arguments(cls) -> set[str]:
        """The names of all that forward takes by **kwargs."""
        return {*Backbone.arguments(), *cls.source_arguments}

    def get_input_embeddings(self):
        return self.shared if self.config.is_encoder_decoder else self.stack.embed_tokens

    def set_input_embeddings(self, value):
        if self.config.is_encoder_decoder:
            self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value
        else:
            self.stack.embed_tokens = value

    def get_encoder(self, modality=None):
        return self.encoder if self.config.is_encoder_decoder else super().get_encoder(modality)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | Seq2SeqModelOutput:
        """input_ids (B, T), or inputs_embeds (B, T, E) as get_input_embeddings() returns them. attention_mask (B, T)
        or (B, columns seen + T): 1 at tokens, 0 at padding, which may stand anywhere and gets zeros. position_ids
        (B, T) replace the positions that are embedded; what a token sees follows its row's own count either way.
        past_key_values: a GalleryCache, advanced in place. The encoder-decoder reads decoder_input_ids (B, T) over
        encoder_outputs, which it computes from input_ids if they are not given.

        Raises ValueError for input that does not fit, before anything is computed; the cache is then unchanged.
        """
        flags = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        check_arguments(self, kwargs, self.arguments())
        if not self.config.is_encoder_decoder:
            return self.stack(
                return_dict=True,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                token_type_ids=token_type_ids,
                use_cache=use_cache,
                **flags,
                **kwargs,
            )
        of_source = {name: kwargs.pop(name, None) for name in self.source_arguments}
        cache_position = kwargs.pop("cache_position", None)
        single = kwargs | {"position_ids": position_ids, "token_type_ids": token_type_ids}
        given = [name for name, value in single.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: for a single stack only; the encoder-decoder counts its positions itself, and "
                "reads one source and one target in a row, so leave it out"
            )
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError("decoder_input_ids are missing: give them, decoder_inputs_embeds, or labels to the head")
        read = encoder_outputs is not None or "source_length" in getattr(past_key_values, "facts", {})
        if not read:
            encoder_outputs = self.encoder(
                return_dict=True,
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                **of_source,
                **flags,
            )
        elif encoder_outputs is not None and any(value is not None for value in of_source.values()):
            raise ValueError(
                f"{', '.join(of_source)} and encoder_outputs are given; the former is the encoder's, which has run: "
                "give it to get_encoder()"
            )
        if isinstance(encoder_outputs, torch.Tensor):
            raise TypeError("encoder_outputs is a Tensor; give what get_encoder() returns, or (hidden states,)")
        source = None if encoder_outputs is None else encoder_outputs[0]
        decoded = self.decoder(
            return_dict=True,
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            encoder_hidden_states=source,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            cache_position=cache_position,
            **flags,
        )
        hidden = decoded.last_hidden_state
        if read:  # the encoder has run before, or elsewhere
            hidden = with_gradients_for(hidden, self.encoder)
        return Seq2SeqModelOutput(
            last_hidden_state=hidden,
            **{CACHE_NAME: cache_of(decoded)},
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.get("cross_attentions"),
            encoder_last_hidden_state=source,
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
            encoder_attentions=getattr(encoder_outputs, "attentions", None),
        )
