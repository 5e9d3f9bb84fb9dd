"""Longformer (Beltagy, Peters, Cohan 2020, arXiv 2004.05150).

    local query p   one softmax over the global keys and the keys p + j g, |j| <= w/2 in an encoder, -w <= j <= 0 in a
                    decoder; g the dilation                                                            section 3.1
    global query    q, k, v by maps of their own, over all tokens                                      section 3.1

A global key inside the window counts once, as in the released code (allenai/longformer; transformers'
models/longformer). The window and the global keys outside it are disjoint intervals, the latter of the list of
global keys, so all of it is `attend` over intervals, joined. A dilated layer is folded into g problems without
dilation (folding.py): tokens meet in it only at distances that g divides. One dilation serves all heads of a layer, as
in the released code; the paper dilates two heads of its upper layers.

The decoder is the paper's autoregressive model (section 4), which has no global tokens. Given some, they are seen by
all later tokens, however far, and themselves see what their window shows: a query over the whole past would need the
whole past kept.

With segment_length the decoder is a Longformer-XL, over Transformer-XL's memory of hidden states (Dai et al. 2019,
section 3.2; longformer_xl_layer.py). No paper describes it and public code of that name (a LongformerXL over a
LocalXLAttention: windows over [memory | segment], by chunks) has no relative positions; the memory and the positions
here are Transformer-XL's, the window is this model's.

The encoder-decoder, LED (section 7), puts a Transformer's decoder on this encoder, with learned positions for each. As
in the released code (transformers' models/led) no token of the source is global unless it is marked.

The same by loops over queries and heads, to read beside the paper: tests/plain/longformer.py.

Letters: see spans.py. G global tokens of a row.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .attention import OWN_IMPLEMENTATIONS
from .backbone import Backbone
from .cache import CACHE_NAME
from .configuration_longformer import GalleryLongformerConfig
from .encoder_decoder import EncoderDecoder
from .exporting import is_exporting
from .folding import GlobalTokens, choice_tokens, first_token, question_tokens
from .heads import (
    CausalLMHead,
    ConditionalGenerationHead,
    MaskedLMHead,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    classifier_dropout,
    one_stack,
    open_documents,
    pooled_rows,
    reads,
)
from .longformer_layer import Context, GalleryLongformerLayer
from .longformer_xl_layer import GalleryLongformerXLLayer
from .modeling_base import GalleryPreTrainedModel, check_marks, is_static
from .modeling_transformer import GalleryTransformerStack
from .multiple_choice import MultipleChoiceHead
from .rows import Rows, true_first
from .stack import AbsoluteEmbeddings, init_stack
from .states import Places


class GalleryLongformerPreTrainedModel(GalleryPreTrainedModel):
    """Weights and names that Longformer's classes share."""

    config: GalleryLongformerConfig
    config_class = GalleryLongformerConfig
    _no_split_modules = ["GalleryLongformerLayer", "GalleryLongformerXLLayer", "GalleryTransformerLayer"]
    takes_pairs = True
    implementations = OWN_IMPLEMENTATIONS | {
        "eager": "their own tiles or kernels, which join the window with the global tokens"
    }
    auto_classes = {
        "AutoModel": "GalleryLongformerModel",
        "AutoModelForCausalLM": "GalleryLongformerForCausalLM",
        "AutoModelForMaskedLM": "GalleryLongformerForMaskedLM",
        "AutoModelForSequenceClassification": "GalleryLongformerForSequenceClassification",
        "AutoModelForTokenClassification": "GalleryLongformerForTokenClassification",
        "AutoModelForQuestionAnswering": "GalleryLongformerForQuestionAnswering",
        "AutoModelForMultipleChoice": "GalleryLongformerForMultipleChoice",
        "AutoModelForSeq2SeqLM": "GalleryLongformerForConditionalGeneration",
    }

    def _init_weights(self, module):
        init_stack(module, self.config)
        for name in ("content_bias", "position_bias"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.normal_(getattr(module, name), 0.0, self.config.initializer_range)


class GalleryLongformerStack(AbsoluteEmbeddings, Backbone, GalleryLongformerPreTrainedModel):
    """Embeddings and layers: an encoder, or a decoder if config.is_decoder."""

    _auto_class = None
    own_arguments = ("global_attention_mask", "token_type_ids")

    def __init__(self, config: GalleryLongformerConfig):
        super().__init__(config)
        if not config.is_decoder and any(window % 2 for window in config.per_layer("attention_window")):
            raise ValueError(
                f"attention_window is {config.attention_window!r}; an encoder's window has two equal sides, so give "
                "even numbers, or set is_decoder"
            )
        if config.segment_length is not None and not config.is_decoder:
            raise ValueError(
                f"segment_length is {config.segment_length}, and segments with a memory are read by a decoder; leave "
                "it at None, or set is_decoder"
            )
        self.build_embeddings(config)
        self.segment_length = None  # positions go on from segment to segment
        layer = GalleryLongformerLayer if config.segment_length is None else GalleryLongformerXLLayer
        self.layers = nn.ModuleList([layer(config, i) for i in range(config.window_layers)])
        self.causal = config.is_decoder
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **inputs,
    ):
        """As Backbone's. global_attention_mask, of attention_mask's shapes: 1 at global tokens. position_ids (B, T)
        replace the positions that are embedded."""
        own = dict(global_attention_mask=global_attention_mask, position_ids=position_ids)
        return super().forward(input_ids, attention_mask, token_type_ids=token_type_ids, **own, **inputs)

    def check(self, rows, cache, longest, global_attention_mask=None, **inputs):
        super().check(rows, cache, longest, **inputs)
        if global_attention_mask is None:
            return
        if is_static(cache):
            raise ValueError(
                "global_attention_mask is given, and past_key_values is a GalleryStaticCache, which keeps windows "
                "alone; give a GalleryCache"
            )
        if self.config.segment_length is not None:
            raise ValueError(
                f"global_attention_mask is given, and segment_length is {self.config.segment_length}; what a segment "
                "carries on is its memory, so leave one of them out"
            )
        if not isinstance(global_attention_mask, torch.Tensor):
            raise TypeError(
                f"global_attention_mask is a {type(global_attention_mask).__name__}; give a tensor, "
                "torch.as_tensor(global_attention_mask)"
            )
        shape, (b, t) = tuple(global_attention_mask.shape), (rows.batch, rows.columns)
        past = 0 if cache is None else cache.columns
        if shape not in ((b, t), (b, past + t)):
            also = f" or ({b}, {past + t})" if past else ""
            raise ValueError(
                f"global_attention_mask has shape {shape}; it must be ({b}, {t}){also}, 1 at global tokens"
            )
        check_marks("global_attention_mask", global_attention_mask, "global tokens", "others")

    def tables_follow(self):
        return [layer.self_attn.r_proj for layer in self.layers if layer.self_attn.relative]

    def plan(self, common, past, global_attention_mask=None, **inputs) -> Context:
        if global_attention_mask is not None:  # how many there are decides how much there is to do
            common = replace(common, rows=common.rows.asked())
        rows = common.rows
        globals_, facts = self._global_tokens(rows, past, global_attention_mask)
        everything = None
        if not self.causal:
            last = rows.last.expand(-1, rows.width)
            everything = rows.spans(torch.zeros_like(last), last, 0)
        own = dict(causal=self.causal, everything=everything, globals=globals_, facts=facts)
        if self.config.segment_length is None:
            return common.widened(Context, **own)
        sizes = dict(segment_length=self.config.segment_length, mem_len=self.config.mem_len)
        context = common.widened(Context, sizes=sizes, **own)
        # All windows now: a layer under reentrant checkpoints could not tell that gradients are recorded.
        for window in self.config.per_layer("attention_window"):
            context.parts = context.segments(window)[1]
        return context

    def _global_tokens(self, rows: Rows, past, mask):
        """The global tokens, None if there are none, and what the cache must remember of them."""
        b = rows.lengths.shape[0]
        earlier = None if past is None else past.facts.get("global_positions")  # (B, G), one more than the position
        if mask is None and earlier is None:
            return None, {}
        if mask is None:
            index = torch.zeros(b, 0, dtype=torch.long)
        else:
            packed = rows.pack(mask[:, -rows.columns :].cpu().long()) != 0  # (B, T)
            count = packed.sum(1)
            most = rows.width if is_exporting() else int(count.max())
            if most == 0 and earlier is None:
                return None, {}
            index = true_first(packed)[:, :most]
            index = torch.where(torch.arange(most) < count[:, None], index, rows.width)
        positions = torch.where(index < rows.width, rows.seen[:, None] + index, -1)
        if not self.config.is_decoder:
            return GlobalTokens(positions, index, None, causal=False), {}
        if earlier is not None:
            positions = torch.cat([earlier - 1, positions], dim=1)
        order = true_first(positions >= 0)
        most = order.shape[1] if is_exporting() else max(1, int((positions >= 0).sum(1).max()))
        pick = order[:, :most]
        positions = positions.gather(1, pick)
        return GlobalTokens(positions, index, pick, causal=True), {"global_positions": Places(positions + 1)}


class GalleryLongformerModel(GalleryLongformerStack):
    """The bare Longformer: an encoder, or a decoder if config.is_decoder.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerModel
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerModel(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).last_hidden_state.shape
    torch.Size([1, 15, 32])
    """

    _auto_class: Any = "AutoModel"

    def __init__(self, config: GalleryLongformerConfig):
        one_stack(self, config)
        if config.window_layers != config.num_hidden_layers:
            raise ValueError(
                f"num_encoder_layers is {config.num_encoder_layers}, of an encoder-decoder; {type(self).__name__} has "
                f"one stack, of num_hidden_layers {config.num_hidden_layers}, so leave it out"
            )
        super().__init__(config)


class GalleryLongformerEncoderDecoder(EncoderDecoder, GalleryLongformerPreTrainedModel):
    """The bare encoder-decoder (section 7): Longformer's encoder, whose windows and global tokens read a long source,
    and the Transformer's decoder, which sees all of it and all that was written."""

    _auto_class = None
    source_arguments = ("global_attention_mask",)

    def __init__(self, config: GalleryLongformerConfig):
        config.check_encoder_decoder()
        super().__init__(config)
        decoder = GalleryTransformerStack(config, causal=True, cross_attention=True, layers=config.num_decoder_layers)
        self.join(config, GalleryLongformerStack(config), decoder)
        self.post_init()


@reads("global_attention_mask", "position_ids", "token_type_ids")
class GalleryLongformerForCausalLM(CausalLMHead, GalleryLongformerPreTrainedModel):
    """The autoregressive Longformer of section 4.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForCausalLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForCausalLM(config).eval()
    >>> cache = model(torch.tensor([list(b"a long time")]), use_cache=True).past_key_values
    >>> model(torch.tensor([list(b" ago")]), past_key_values=cache).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryLongformerModel
    config_changes = {"is_decoder": True}

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,  # named, since generate() looks whether it is
        is_first_iteration=False,
        global_attention_mask=None,
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            **{CACHE_NAME: cache},
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if global_attention_mask is None or not (is_first_iteration or cache is None):
            return inputs  # the mask is the prompt's, which has been read
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        past = 0 if cache is None else cache.get_seq_length()
        end = past + (ids if embeds is None else embeds).shape[1]
        mask = F.pad(global_attention_mask, (0, max(0, end - global_attention_mask.shape[1])))
        return inputs | {"global_attention_mask": mask[:, past:end]}


@reads("global_attention_mask")
class GalleryLongformerForMaskedLM(MaskedLMHead, GalleryLongformerPreTrainedModel):
    """The encoder with RoBERTa's head, as released.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForMaskedLM
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForMaskedLM(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 15, 262])
    """

    backbone_class = GalleryLongformerModel


@reads("global_attention_mask", "position_ids", "token_type_ids")
class GalleryLongformerForSequenceClassification(SequenceClassificationHead, GalleryLongformerPreTrainedModel):
    """A label for each row: from the first token of an encoder, global unless set otherwise; from a decoder's last.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForSequenceClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForSequenceClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 2])
    """

    backbone_class = GalleryLongformerModel

    def build_head(self, config):
        self.num_labels = config.num_labels
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler_act = ACT2FN[config.classifier_act]
        self.dropout = classifier_dropout(config)
        self.pooler_dropout = self.dropout if config.pooler_dropout is None else nn.Dropout(config.pooler_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, global_attention_mask=None, **inputs):
        """As in SequenceClassificationHead. An encoder's first token is global, unless others are given."""
        own = dict(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        if global_attention_mask is None and not self.config.is_decoder:
            documents = open_documents(self, **own, **inputs)  # its errors come first
            columns = input_ids if inputs_embeds is None else inputs_embeds
            global_attention_mask = first_token(columns, attention_mask, documents)
        return super().forward(**own, global_attention_mask=global_attention_mask, **inputs)

    def pool(self, hidden, attention_mask, documents):
        x = pooled_rows(hidden, attention_mask, documents, last=self.config.is_decoder)
        return self.dropout(self.pooler_act(self.pooler(self.pooler_dropout(x))))


@reads("global_attention_mask")
class GalleryLongformerForTokenClassification(TokenClassificationHead, GalleryLongformerPreTrainedModel):
    """A label for each token.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForTokenClassification
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForTokenClassification(config).eval()
    >>> model(torch.tensor([list(b"a long time ago")])).logits.shape
    torch.Size([1, 15, 2])
    """

    backbone_class = GalleryLongformerModel


@reads("global_attention_mask")
class GalleryLongformerForQuestionAnswering(QuestionAnsweringHead, GalleryLongformerPreTrainedModel):
    """Start and end of an answer; the question, all tokens before the first separator, is global.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForQuestionAnswering
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForQuestionAnswering(config).eval()
    >>> ids = [*b"when?", config.sep_token_id, *b"a long time ago"]
    >>> model(torch.tensor([ids])).start_logits.shape
    torch.Size([1, 21])
    """

    backbone_class = GalleryLongformerModel

    def check_config(self, config):
        super().check_config(config)
        config.check_ids("sep_token_id")

    def question_inputs(self, input_ids, attention_mask, documents, given):
        """The question is global, unless other tokens are given. Raises ValueError if a row has no separator."""
        if given.get("global_attention_mask") is not None:
            return {}
        if input_ids is None:
            raise ValueError("with inputs_embeds the question cannot be found; give global_attention_mask")
        mask = question_tokens(input_ids, attention_mask, documents, self.config.sep_token_id)
        return {"global_attention_mask": mask}


@reads("global_attention_mask")
class GalleryLongformerForConditionalGeneration(ConditionalGenerationHead, GalleryLongformerPreTrainedModel):
    """The Longformer-Encoder-Decoder, LED (section 7); one table for source, target and logits.

    global_attention_mask marks tokens of the source; for summaries the paper marks its first.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForConditionalGeneration
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForConditionalGeneration(config).eval()
    >>> ids = torch.tensor([list(b"a long time ago")])
    >>> first = torch.zeros_like(ids).index_fill(1, torch.tensor(0), 1)
    >>> model(input_ids=ids, global_attention_mask=first, decoder_input_ids=ids[:, :4]).logits.shape
    torch.Size([1, 4, 262])
    """

    backbone_class = GalleryLongformerEncoderDecoder
    config_changes = {"is_encoder_decoder": True, "is_decoder": False}

    @functools.wraps(ConditionalGenerationHead.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("global_attention_mask", None)  # of the source, which has been read
        return inputs


@reads("global_attention_mask")
class GalleryLongformerForMultipleChoice(MultipleChoiceHead, GalleryLongformerPreTrainedModel):
    """A score for each choice, from its text's first token; all tokens behind the question's separator are global.

    >>> import torch
    >>> from hf_gallery import GalleryLongformerConfig, GalleryLongformerForMultipleChoice
    >>> sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    >>> config = GalleryLongformerConfig(**sizes, attention_window=4)
    >>> model = GalleryLongformerForMultipleChoice(config).eval()
    >>> choices = [[*b"when?", config.sep_token_id, *text] for text in (b"today", b"there", b"never")]
    >>> model(torch.tensor([choices])).logits.shape
    torch.Size([1, 3])
    """

    backbone_class = GalleryLongformerModel

    def check_config(self, config):
        super().check_config(config)
        config.check_ids("sep_token_id")

    def choice_inputs(self, flat, documents):
        """Choices are global, unless other tokens are given. Raises ValueError if a row has no separator."""
        if flat.get("global_attention_mask") is not None:
            return {}
        if flat["input_ids"] is None:
            raise ValueError("with inputs_embeds the choices cannot be found; give global_attention_mask")
        mask = choice_tokens(flat["input_ids"], flat["attention_mask"], documents, self.config.sep_token_id)
        return {"global_attention_mask": mask}


__all__ = [
    "GalleryLongformerEncoderDecoder",
    "GalleryLongformerForCausalLM",
    "GalleryLongformerForConditionalGeneration",
    "GalleryLongformerForMaskedLM",
    "GalleryLongformerForMultipleChoice",
    "GalleryLongformerForQuestionAnswering",
    "GalleryLongformerForSequenceClassification",
    "GalleryLongformerForTokenClassification",
    "GalleryLongformerModel",
    "GalleryLongformerPreTrainedModel",
]
