"""The Transformer (Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser, Polosukhin 2017, arXiv 1706.03762).

    Attention(Q, K, V) = softmax(Q K^T / sqrt(D)) V                      section 3.2.1, in H heads: 3.2.2
    post-norm: x = LayerNorm(x + Dropout(Sublayer(x)))                   sections 3.1 and 5.4
    encoder layer: self-attention, feed-forward; decoder layer: causal self-attention, cross-attention, feed-forward
    sinusoids and embeddings (3.4, 3.5) are in stack.py, maps W^Q, W^K, W^V, W^O (3.2.2) and the feed-forward (3.3) in
    blocks.py, losses in heads.py

One stack serves three forms: encoder-decoder as published, decoder alone (ForCausalLM), encoder alone (ForMaskedLM
and the other output heads). Query p sees the keys [0, p] in a decoder and [0, n) in an encoder; with segment_length
[seg(p), p]. Switches in the config give what later models changed: GPT-2 (pre-norm, learned positions), BERT
(embedding norm, token types), Marian (sines first, bias on the logits).

The same by loops over queries and heads, to read beside the paper: tests/plain/transformer.py.

Letters: see spans.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .attention import OWN_IMPLEMENTATIONS
from .attention_maps import Keys, attend_shown
from .backbone import Backbone
from .blocks import MultiHeadAttention, ResidualLayer, merge_heads
from .configuration_transformer import GalleryTransformerConfig
from .context import IntervalContext
from .encoder_decoder import EncoderDecoder
from .exporting import surely
from .gradients import with_gradients_for
from .heads import (
    CausalLMHead,
    ConditionalGenerationHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    classifier_dropout,
    pooled_rows,
    reads,
)
from .modeling_base import GalleryPreTrainedModel
from .multiple_choice import MultipleChoiceHead
from .rows import Rows
from .spans import Spans
from .stack import AbsoluteEmbeddings, init_stack, mark_branches
from .states import Fixed, State


@dataclass(kw_only=True)
class Context(IntervalContext):
    """Inputs shared by all layers of one forward. Adds to IntervalContext:"""

    source: torch.Tensor | None = None  # cross-attention: the encoder's output, packed (B, S, E)
    source_spans: Spans | None = None  # and the tokens of it that each row has


class GalleryTransformerAttention(MultiHeadAttention):
    """Multi-head attention, section 3.2.2, over the intervals that it is given."""

    def forward(self, x, keys: Keys, context: Context, keys_too: bool = True):
        """x (B, T, E) to (B, T, E) and, if asked for, probabilities (B, H, T, S). keys_too: the last T are x's own."""
        query = self.query(x)  # (B, H, T, D)
        out, probabilities = attend_shown(context, query, keys, dropout=self.dropout.rate, keys_too=keys_too)
        return self.o_proj(merge_heads(out)), probabilities


class GalleryTransformerLayer(ResidualLayer):
    """An encoder or decoder layer. State: keys, values (B, H, C, D); with cross-attention cross_keys, cross_values."""

    def __init__(self, config: GalleryTransformerConfig, cross_attention: bool = False):
        own = GalleryTransformerAttention(config, config.attention_bias)
        cross = GalleryTransformerAttention(config, config.attention_bias) if cross_attention else None
        super().__init__(config, own, config.norm_position == "pre", config.activation_dropout, cross)
        self.cross_attention = cross_attention
        mark_branches([x.o_proj for x in (own, cross) if x is not None] + [self.feed_forward.down_proj], config)

    def forward(self, x: torch.Tensor, context: Context, state: State, source: torch.Tensor | None = None):
        """x (B, T, E), source (B, S, E): the encoder's output. Returns x, the next state, own and cross attentions."""
        y = self.self_attn_norm(x) if self.pre else x
        key, value = self.self_attn.keys_values(y)
        key, value, new = context.extend(state, keys=key, values=value)  # (B, H, C + T, D)
        y, probabilities = self.self_attn(y, Keys(key, value, context.spans), context)
        x = self.add(x, y, self.self_attn_norm)
        cross_probabilities = None
        if self.cross_attention:
            y = self.cross_attn_norm(x) if self.pre else x
            if "cross_keys" in state:
                key, value = state["cross_keys"].to(y.dtype), state["cross_values"].to(y.dtype)
                y = with_gradients_for(y, self.cross_attn.k_proj, self.cross_attn.v_proj)
            else:
                key, value = self.cross_attn.keys_values(source)
            keys = Keys(key, value, context.source_spans)
            y, cross_probabilities = self.cross_attn(y, keys, context, keys_too=False)
            x = self.add(x, y, self.cross_attn_norm)
            if context.keeps_state:
                new |= {"cross_keys": Fixed(key), "cross_values": Fixed(value)}
        y = self.feed_forward(self.feed_forward_norm(x) if self.pre else x)
        x = self.add(x, y, self.feed_forward_norm)
        return x, new, probabilities, cross_probabilities


class GalleryTransformerPreTrainedModel(GalleryPreTrainedModel):
    """Weights and names that the Transformer's classes share."""

    config: GalleryTransformerConfig
    config_class = GalleryTransformerConfig
    _no_split_modules = ["GalleryTransformerLayer"]
    takes_pairs = True
    implementations = OWN_IMPLEMENTATIONS | {"sdpa": "torch's fused kernels"}
    auto_classes = {
        "AutoModel": "GalleryTransformerModel",
        "AutoModelForCausalLM": "GalleryTransformerForCausalLM",
        "AutoModelForMaskedLM": "GalleryTransformerForMaskedLM",
        "AutoModelForSequenceClassification": "GalleryTransformerForSequenceClassification",
        "AutoModelForTokenClassification": "GalleryTransformerForTokenClassification",
        "AutoModelForQuestionAnswering": "GalleryTransformerForQuestionAnswering",
        "AutoModelForMultipleChoice": "GalleryTransformerForMultipleChoice",
        "AutoModelForSeq2SeqLM": "GalleryTransformerForConditionalGeneration",
    }

    def _init_weights(self, module):
        init_stack(module, self.config)


class GalleryTransformerStack(AbsoluteEmbeddings, Backbone, GalleryTransformerPreTrainedModel):
    """Embeddings and layers: an encoder, a decoder, or a decoder with cross-attention."""

    _auto_class = None
    own_arguments = ("token_type_ids", "encoder_hidden_states", "encoder_attention_mask")

    def __init__(self, config: GalleryTransformerConfig, causal: bool, cross_attention: bool = False, layers=None):
        super().__init__(config)
        self.causal, self.cross_attention = causal, cross_attention
        self.build_embeddings(config, f"max_{'decoder_' if cross_attention else ''}position_embeddings")
        self.layers = nn.ModuleList(
            [GalleryTransformerLayer(config, cross_attention) for _ in range(layers or config.num_hidden_layers)]
        )
        self.prefix = "decoder_" if cross_attention else ""
        if cross_attention:
            self.output_type = BaseModelOutputWithPastAndCrossAttentions
        self.post_init()

    def plan(self, common, past, encoder_hidden_states=None, encoder_attention_mask=None, **inputs) -> Context:
        """The source: encoder_hidden_states (B, S, E), encoder_attention_mask (B, S)."""
        rows = common.rows
        given = encoder_hidden_states, encoder_attention_mask
        source, source_spans, facts = self._open_source(rows, past, *given, common.keeps_state)
        p = rows.positions  # (B or 1, T)
        if self.causal:
            length = self.segment_length
            lower = torch.zeros_like(p) if length is None else p - p % length
            upper = p
        else:
            lower, upper = self._encoder_interval(p, rows.last)
        spans = rows.spans(lower, upper, common.cached)
        return common.widened(Context, spans=spans, source=source, source_spans=source_spans, facts=facts)

    def layer_inputs(self, context):
        return () if context.source is None else (context.source,)

    def results(self, context, attentions):
        if attentions is None:
            return {}
        own, cross = zip(*attentions, strict=True)
        return {"attentions": own} | ({"cross_attentions": cross} if self.cross_attention else {})

    def _encoder_interval(self, p, last):
        length = self.segment_length
        if length is None:
            return torch.zeros_like(p), last.expand(-1, p.shape[1])
        first = p - p % length
        return first, torch.minimum((first + length - 1).to(last.device), last)

    def _open_source(self, rows, past, encoder_hidden_states, encoder_attention_mask, keeps_state):
        """The source packed (B, S, E), its intervals, and what the cache must remember of it, on the CPU."""
        if not self.cross_attention:
            return None, None, {}
        b = rows.lengths.shape[0]
        if past is not None and "source_length" in past.facts:
            source, lengths = encoder_hidden_states, past.facts["source_length"]
        elif encoder_hidden_states is None:
            raise ValueError("the decoder needs encoder_outputs, or a cache that holds their keys; got neither")
        else:
            if encoder_hidden_states.dim() != 3:
                raise ValueError(
                    f"encoder_outputs have shape {tuple(encoder_hidden_states.shape)}; they must be (batch, tokens, "
                    "hidden_size)"
                )
            s = encoder_hidden_states.shape[1]
            if encoder_hidden_states.shape[0] != b:
                raise ValueError(
                    f"encoder_outputs have {encoder_hidden_states.shape[0]} rows, decoder_input_ids {b}; they must "
                    "agree"
                )
            if encoder_hidden_states.shape[2] != self.config.hidden_size:
                raise ValueError(
                    f"encoder_outputs are {encoder_hidden_states.shape[2]} wide; this model's hidden_size is "
                    f"{self.config.hidden_size}"
                )
            mask = self.check_mask(encoder_attention_mask, b, s, None)
            source_rows = Rows(b, s, mask.cpu() if mask is not None and keeps_state else mask, None)
            source, lengths = source_rows.pack(encoder_hidden_states), source_rows.lengths
        upper = (lengths[:, None] - 1).expand(b, rows.width)
        if surely(lengths == lengths[0]):
            upper = upper[:1]
        return source, Spans(torch.zeros_like(upper), upper), {"source_length": Fixed(lengths)}


class GalleryTransformerModel(EncoderDecoder, GalleryTransformerPreTrainedModel):
    """The bare Transformer: one stack, causal if config.is_decoder, or encoder and decoder if is_encoder_decoder.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerModel(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).last_hidden_state.shape
    torch.Size([1, 15, 32])
    """

    _auto_class: Any = "AutoModel"

    def __init__(self, config: GalleryTransformerConfig):
        super().__init__(config)
        if config.is_encoder_decoder:
            config.check_encoder_decoder()
            self.join(
                config,
                GalleryTransformerStack(config, causal=False, layers=config.num_encoder_layers),
                GalleryTransformerStack(config, causal=True, cross_attention=True, layers=config.num_decoder_layers),
            )
        else:
            self.stack = GalleryTransformerStack(config, causal=config.is_decoder)
        self.post_init()


@reads("position_ids", "token_type_ids")
class GalleryTransformerForCausalLM(CausalLMHead, GalleryTransformerPreTrainedModel):
    """The decoder alone, with a map to the vocabulary, tied to the embeddings as section 3.4 ties them.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForCausalLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForCausalLM(config).eval()
    >>> cache = model(torch.tensor([list(b"a long time")]), use_cache=True).past_key_values
    >>> model(torch.tensor([list(b" ago")]), past_key_values=cache).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryTransformerModel
    config_changes = {"is_decoder": True}
    _tied_weights_keys = {"lm_head.weight": "model.stack.embed_tokens.weight"}


class GalleryTransformerForMaskedLM(MaskedLMHead, GalleryTransformerPreTrainedModel):
    """The encoder alone, with BERT's head.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForMaskedLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForMaskedLM(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 15, 262])
    """

    backbone_class = GalleryTransformerModel
    _tied_weights_keys = {"lm_head.weight": "model.stack.embed_tokens.weight"}


@reads("position_ids", "token_type_ids")
class GalleryTransformerForSequenceClassification(SequenceClassificationHead, GalleryTransformerPreTrainedModel):
    """A label for each row: from the last token of a decoder, from the first of an encoder through BERT's pooler.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForSequenceClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 2])
    """

    backbone_class = GalleryTransformerModel

    def build_head(self, config):
        self.num_labels = config.num_labels
        if not config.is_decoder:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
            self.pooler_act = ACT2FN[config.classifier_act]
            self.pooler_dropout = nn.Dropout(config.pooler_dropout or 0.0)  # BERT's has none, RoBERTa's has
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def pool(self, hidden, attention_mask, documents):
        x = pooled_rows(hidden, attention_mask, documents, last=self.config.is_decoder)
        return self.dropout(x if self.config.is_decoder else self.pooler_act(self.pooler(self.pooler_dropout(x))))


class GalleryTransformerForTokenClassification(TokenClassificationHead, GalleryTransformerPreTrainedModel):
    """A label for each token.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForTokenClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForTokenClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 15, 2])
    """

    backbone_class = GalleryTransformerModel


class GalleryTransformerForQuestionAnswering(QuestionAnsweringHead, GalleryTransformerPreTrainedModel):
    """Start and end of an answer in a text, which stands behind its question.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForQuestionAnswering
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForQuestionAnswering(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).start_logits.shape
    torch.Size([1, 15])
    """

    backbone_class = GalleryTransformerModel


class GalleryTransformerForMultipleChoice(MultipleChoiceHead, GalleryTransformerPreTrainedModel):
    """A score for each choice, from its text's first token through BERT's pooler.

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForMultipleChoice
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForMultipleChoice(config).eval()
    >>> model(torch.tensor([[list(b"when? today"), list(b"when? there"), list(b"when? never")]])).logits.shape
    torch.Size([1, 3])
    """

    backbone_class = GalleryTransformerModel


class GalleryTransformerForConditionalGeneration(ConditionalGenerationHead, GalleryTransformerPreTrainedModel):
    """The published encoder-decoder; one table for source, target and logits (section 3.4).

    >>> import torch
    >>> from hf_gallery import GalleryTransformerConfig, GalleryTransformerForConditionalGeneration
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryTransformerConfig(**sizes)
    >>> model = GalleryTransformerForConditionalGeneration(config).eval()
    >>> ids = torch.tensor([list(b"a long time ago")])
    >>> model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryTransformerModel


__all__ = [
    "GalleryTransformerForCausalLM",
    "GalleryTransformerForConditionalGeneration",
    "GalleryTransformerForMaskedLM",
    "GalleryTransformerForMultipleChoice",
    "GalleryTransformerForQuestionAnswering",
    "GalleryTransformerForSequenceClassification",
    "GalleryTransformerForTokenClassification",
    "GalleryTransformerModel",
    "GalleryTransformerPreTrainedModel",
]
