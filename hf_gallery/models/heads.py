"""Heads that variants share: what a head does with the hidden states of its backbone, `self.model`.

A variant's class takes one of these first and its own PreTrainedModel second, names its backbone, and widens
`forward` only where that takes more input. Letters: see spans.py.
"""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForMaskedLMLoss
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from .cache import CACHE_NAME, cache_of
from .documents import PACKING, Documents
from .exporting import compile_whole, is_exporting, require
from .modeling_base import GalleryGenerationMixin, check_arguments, check_tensors, refuse_export, with_config

LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels")
READ_BY_BACKBONE = {"past_key_values", "use_cache", "output_attentions", "output_hidden_states"}


def find_packed(head, input_ids, inputs_embeds, attention_mask, past_key_values=None, **inputs) -> Documents | None:
    """The documents packed in a head's input, and the checks of all input that come before; None if there are none."""
    given = {name: inputs.get(name) for name in PACKING if inputs.get(name) is not None}
    if not given:
        return None
    own = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
    return head.open_input(**own, past_key_values=past_key_values, packing=given)[2]


def open_documents(head, input_ids, inputs_embeds, attention_mask, **inputs) -> Documents | None:
    """Checks all of a head's input before the head itself reads it. Returns the documents packed in it, None if there
    are none."""
    packing = {name: inputs.get(name) for name in PACKING}

    def opened():
        own = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        return head.open_input(**own, packing=packing)[2]

    whole = torch.compiler.is_compiling() and all(x is None for x in packing.values())
    return compile_whole(opened) if whole else opened()


def reads(*names: str):
    """Decorates a head whose backbone takes more input than the shared forward names. They reach the backbone by
    **kwargs anyway; but tools read the signature: Trainer drops columns of a dataset that it does not name, and
    generate() refuses arguments."""

    def widen(head: type) -> type:
        original = head.forward  # the head's own where it has one, else what it inherits
        inherited = next(vars(base)["forward"] for base in head.__mro__[1:] if "forward" in vars(base))
        signature = inspect.signature(inherited)
        own = list(signature.parameters.values())
        own = [parameter for parameter in own if parameter.name not in names]
        own[3:3] = [own[1].replace(name=name, annotation=torch.Tensor | None) for name in names]  # after the mask
        order = [parameter.name for parameter in own[1:]]

        @functools.wraps(original)
        def forward(self, *arguments, **keywords):
            return original(self, **dict(zip(order, arguments, strict=False)), **keywords)

        forward.__signature__ = signature.replace(parameters=own)
        head.forward = forward
        return head

    return widen


def name_causal(kind: type):
    """Tells transformers that a class predicts the next token. Its Trainer shifts labels by itself where it smooths
    them (label_smoothing_factor), for the classes named in this table; of all others it takes each label for the
    token in its own column. lm-eval looks a model type up in the same table."""
    name, mapping = kind.__name__, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if name not in mapping.values():  # a model type has one entry; further classes of it stand under their own names
        model_type = getattr(getattr(kind, "config_class", None), "model_type", None)
        mapping[name if not model_type or model_type in mapping else model_type] = name


class Head:
    """A backbone, and what `build_head` makes to stand on it."""

    backbone_class: type[torch.nn.Module]
    config_changes: dict[str, bool] = {}  # what the head makes of the configuration

    def __init__(self, config):
        self.check_config(config)
        super().__init__(with_config(config, **self.config_changes))  # type: ignore[call-arg] # the PreTrainedModel's
        self.model = self.backbone_class(self.config)
        self.build_head(self.config)
        self.post_init()

    def check_config(self, config):
        """Raises ValueError unless the head can stand on a model of this configuration."""
        one_stack(self, config)

    def build_head(self, config):
        """Makes the modules that stand on `self.model`."""
        raise NotImplementedError


def one_stack(model: torch.nn.Module, config):
    """Raises ValueError for the config of an encoder-decoder, whose weights a single stack cannot take."""
    if config.is_encoder_decoder:
        other = model.auto_classes.get("AutoModelForSeq2SeqLM")
        hint = f"use {other} (AutoModelForSeq2SeqLM) for this config" if other else "leave it False"
        raise ValueError(f"{type(model).__name__} has one stack, but config.is_encoder_decoder is True; {hint}")


class CausalLMHead(Head, GalleryGenerationMixin):
    """Next-token prediction: `lm_head` on every hidden state, tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    lm_head: torch.nn.Module
    _auto_class = "AutoModelForCausalLM"
    output_type = CausalLMOutputWithPast  # override when the backbone returns extra fields
    head_loss = "ForCausalLM"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        name_causal(cls)

    def build_head(self, config):
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as in the bare model. labels (B, T) are shifted inside, as in transformers; shift_labels (B, T),
        column t holding the token after column t, are not. -100 is left out; so is padding, which neither predicts nor
        is predicted (where it stands before a row, Llama has it predict the first token), and no document predicts the
        one packed behind it. logits (B, T, V).
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if kwargs.get(name) is not None}
        columns = input_ids if inputs_embeds is None else inputs_embeds
        check_arguments(self, kwargs, self.model.arguments() | {"token_type_ids", *LOSS_ARGUMENTS})
        kwargs |= {"position_ids": position_ids}
        labels = checked_labels("labels", labels, columns, self.config.vocab_size)
        if "shift_labels" in loss_arguments:
            targets = checked_labels("shift_labels", loss_arguments["shift_labels"], columns, self.config.vocab_size)
            loss_arguments["shift_labels"] = targets
        check_kept(logits_to_keep, columns)
        documents = None
        if labels is not None or "shift_labels" in loss_arguments:
            documents = find_packed(self, input_ids, inputs_embeds, attention_mask, past_key_values, **kwargs)
        if not getattr(self.config, "type_vocab_size", None):
            kwargs.pop("token_type_ids", None)  # tokenizers give them unasked, and causal models leave them aside
        outputs = self.model(
            return_dict=True,
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        if "shift_labels" in loss_arguments:
            if documents is not None:
                loss_arguments["shift_labels"] = documents.within(loss_arguments["shift_labels"])
        elif labels is not None and documents is not None:
            loss_arguments["shift_labels"] = documents.next_tokens(labels)
        elif labels is not None and attention_mask is not None:
            loss_arguments["shift_labels"] = next_tokens(labels, attention_mask)
        logits, loss = self.logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, loss_arguments)
        more = {name: outputs[name] for name in outputs if name in self.output_type.__dataclass_fields__}
        return self.output_type(**more | {"loss": loss, "logits": logits})

    def logits_and_loss(self, hidden, labels, logits_to_keep, loss_arguments):
        """Logits (B, T, V) of hidden (B, T, E), and the loss if there are labels."""
        learns = labels is not None or "shift_labels" in loss_arguments
        if learns:
            check_all_kept(logits_to_keep, hidden)
        logits = vocabulary_scores(self.lm_head, keep_logits(hidden, logits_to_keep))
        if not learns:
            return logits, None
        return logits, self.loss_function(
            logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments
        )


class MaskedLMHead(Head):
    """The token that belongs in each column: a dense map with norm, then `lm_head` (Devlin et al. 2018)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    config_changes = {"is_decoder": False}
    _auto_class = "AutoModelForMaskedLM"
    head_loss = "ForMaskedLM"

    def build_head(self, config):
        """As Head's. The output map is the table of embeddings, with its width."""
        self.transform = torch.nn.Linear(config.hidden_size, config.embedding_width)
        self.transform_act = ACT2FN[config.hidden_act]
        self.transform_norm = torch.nn.LayerNorm(config.embedding_width, eps=config.layer_norm_eps)
        self.lm_head = torch.nn.Linear(config.embedding_width, config.vocab_size)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MaskedLMOutput:
        """Arguments as in the bare model. labels (B, T): the token that belongs there, -100 to leave it out. logits
        (B, T, V)."""
        loss_arguments = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        check_arguments(self, kwargs, self.model.arguments() | READ_BY_BACKBONE)
        columns = input_ids if inputs_embeds is None else inputs_embeds
        labels = checked_labels("labels", labels, columns, self.config.vocab_size)
        outputs = self.model(
            return_dict=True,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        x = self.transform_norm(self.transform_act(self.transform(outputs.last_hidden_state)))
        logits = vocabulary_scores(self.lm_head, x)
        loss = None
        if labels is not None:
            labels = labels.contiguous()
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_arguments
            )
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class SequenceClassificationHead(Head):
    """A label for each row, from its last token; `pool` may say otherwise."""

    _auto_class = "AutoModelForSequenceClassification"
    output_type = SequenceClassifierOutputWithPast  # override when the backbone returns extra fields
    head_loss = "ForSequenceClassification"

    def build_head(self, config):
        self.num_labels = config.num_labels
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> SequenceClassifierOutputWithPast:
        """Arguments as in the bare model. labels (B,), or (B, num_labels) for several at once. num_items_in_batch: the
        labels of all batches of an update, whose losses then add up to their mean. logits (B, num_labels). Where
        documents are packed in the rows, labels and logits are theirs, in reading order: (documents,) and (documents,
        num_labels)."""
        items = kwargs.pop("num_items_in_batch", None)
        check_arguments(self, kwargs, self.model.arguments() | {"token_type_ids", "num_items_in_batch"})
        kwargs |= {"position_ids": position_ids}
        labels = checked_classes(labels, self.config.num_labels)
        documents = find_packed(self, input_ids, inputs_embeds, attention_mask, past_key_values, **kwargs)
        columns = input_ids if inputs_embeds is None else inputs_embeds
        if labels is not None and columns is not None:
            check_count(labels, len(columns) if documents is None else len(documents), self.config)
        outputs = self.model(
            return_dict=True,
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        logits = self.classifier(self.pool(outputs.last_hidden_state, attention_mask, documents))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
            if items is not None:  # transformers' loss would use it for one of its three problem types only
                loss = loss * labels.ne(-100).sum() / items
        more = {name: outputs[name] for name in outputs if name in self.output_type.__dataclass_fields__}
        return self.output_type(**more | {"loss": loss, "logits": logits})

    def pool(self, hidden, attention_mask, documents: Documents | None):
        """The input of `classifier`, from hidden (B, T, E): (B, E), or (documents, E) where documents are packed."""
        return pooled_rows(hidden, attention_mask, documents, last=True)


class TokenClassificationHead(Head):
    """A label for each token: dropout, then `classifier` on every hidden state."""

    _auto_class = "AutoModelForTokenClassification"
    head_loss = "ForTokenClassification"

    def build_head(self, config):
        self.num_labels = config.num_labels
        self.dropout = classifier_dropout(config)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """Arguments as in the bare model. labels (B, T), -100 to leave one out. logits (B, T, num_labels)."""
        num_items = {k: kwargs.pop(k) for k in ("num_items_in_batch",) if k in kwargs}
        check_arguments(self, kwargs, self.model.arguments() | READ_BY_BACKBONE)
        columns = input_ids if inputs_embeds is None else inputs_embeds
        labels = checked_labels("labels", labels, columns, self.num_labels, "num_labels")
        outputs = self.model(
            return_dict=True,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs | {"use_cache": False},
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(logits, labels.contiguous(), self.config, **num_items)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class QuestionAnsweringHead(Head):
    """Start and end of an answer in each row: `qa_outputs` on every hidden state."""

    _auto_class = "AutoModelForQuestionAnswering"
    head_loss = "ForQuestionAnswering"
    config_changes = {"is_decoder": False}

    def build_head(self, config):
        self.qa_outputs = torch.nn.Linear(config.hidden_size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """Arguments as in the bare model. start_positions, end_positions (B,): columns of the answer's first and last
        token; those behind the input, as T, are left out of the loss. The logits of padding are the least number.
        """
        check_arguments(self, kwargs, self.model.arguments() | READ_BY_BACKBONE)
        own = dict(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        documents = open_documents(self, **own, **kwargs | {"position_ids": position_ids})  # its errors come first
        if documents is not None and (start_positions is not None or end_positions is not None):
            raise ValueError(
                "start_positions and end_positions are columns of a row with one text, and documents are packed in "
                "the rows; to train give each text a row of its own, padded: leave out padding_free, packing and "
                "DataCollatorWithFlattening. Answers without a loss are given for packed texts too"
            )
        columns = input_ids if inputs_embeds is None else inputs_embeds
        start_positions = checked_answers("start_positions", start_positions, columns, attention_mask)
        end_positions = checked_answers("end_positions", end_positions, columns, attention_mask)
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"{missing} is missing; give start_positions and end_positions for a loss, or neither")
        kwargs |= self.question_inputs(input_ids, attention_mask, documents, kwargs)
        outputs = self.model(
            return_dict=True,
            **own,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            **kwargs | {"use_cache": False},
        )
        logits = self.qa_outputs(outputs.last_hidden_state)  # (B, T, 2)
        if attention_mask is not None:  # no answer is there, and the others' probabilities are those of the row alone
            logits = logits.masked_fill((attention_mask == 0)[..., None], torch.finfo(logits.dtype).min)
        start_logits, end_logits = logits.unbind(-1)  # (B, T) each
        loss = None
        if start_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def question_inputs(self, input_ids, attention_mask, documents: Documents | None, given: dict) -> dict:
        """Further inputs of the backbone that follow from where the question stands. Override to give some."""
        return {}


class ConditionalGenerationHead(Head, GalleryGenerationMixin):
    """The target's next token from the source and the target so far: `lm_head` on the decoder's hidden states, and
    where config.final_logits_bias asks for it a bias on the logits."""

    _auto_class = "AutoModelForSeq2SeqLM"
    _tied_weights_keys = {"lm_head.weight": "model.shared.weight"}
    config_changes = {"is_encoder_decoder": True}

    def check_config(self, config):
        pass

    def build_head(self, config):
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.final_logits_bias:
            self.final_logits_bias = torch.nn.Parameter(torch.zeros(1, config.vocab_size))

    def get_encoder(self, modality=None):
        return self.model.get_encoder(modality)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """As in GalleryPreTrainedModel; the bias on the logits, where there is one, is 0 for new tokens."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.final_logits_bias:
            bias = self.final_logits_bias
            bias.data = F.pad(bias.data, (0, self.config.vocab_size - bias.shape[1]))
        return embeddings

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """labels (B, T) moved one to the right behind decoder_start_token_id, -100 replaced by padding."""
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id
        if start is None or pad is None:
            raise ValueError(
                f"decoder_start_token_id is {start} and pad_token_id is {pad}; set both in the config, or pass "
                "decoder_input_ids"
            )
        ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
        return ids.masked_fill(ids == -100, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs=None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> Seq2SeqLMOutput:
        """Arguments as in the bare model. labels (B, T): the target, -100 left out of the loss; without
        decoder_input_ids the decoder reads the labels moved one to the right. logits (B, T, V).
        """
        items = {"num_items_in_batch": kwargs.pop("num_items_in_batch", None)}
        check_arguments(self, kwargs, self.model.arguments() | {"num_items_in_batch"})
        check_tensors({"labels": labels})
        if decoder_input_ids is None and decoder_inputs_embeds is None and labels is not None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        decoded = decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds
        labels = checked_labels("labels", labels, decoded, self.config.vocab_size)
        check_kept(logits_to_keep, decoded)
        if labels is not None:
            check_all_kept(logits_to_keep, decoded)
        outputs = self.model(
            return_dict=True,
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        logits = self.lm_head(keep_logits(outputs.last_hidden_state, logits_to_keep))  # (B, T, V)
        if self.config.final_logits_bias:
            logits = logits + self.final_logits_bias
        loss = None
        if labels is not None:
            loss = ForMaskedLMLoss(
                logits, labels.contiguous(), self.config.vocab_size, **items
            )  # labels stand where they belong
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: cache_of(outputs)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
        )


def next_tokens(labels: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """labels (B, T) as what each token is to predict, its row's next token; -100 at the last one and at padding."""
    t = labels.shape[1]
    mask = attention_mask[:, -t:].to(labels.device) != 0
    column = torch.arange(t, device=labels.device).masked_fill(~mask, t)  # (B, T)
    after = column.flip(1).cummin(1).values.flip(1)  # the first token from here on, t where there is none
    after = F.pad(after, (0, 1), value=t)[:, 1:]
    return F.pad(labels, (0, 1), value=-100).gather(1, after).masked_fill(~mask, -100)


def checked_labels(name: str, labels, columns, count: int, counted: str = "vocab_size") -> torch.Tensor | None:
    """labels (B, T), if given, as torch.long.

    Raises ValueError or TypeError unless they are whole numbers below count, or -100, under the columns (B, T, ...).
    """
    check_tensors({name: labels})
    if labels is None or not isinstance(columns, torch.Tensor):
        return None  # what is wrong with the columns is said elsewhere
    if is_exporting():
        refuse_export([name])
    if labels.dtype not in WHOLE:
        raise ValueError(f"{name} has type {labels.dtype}; it must be torch.long or torch.int")
    if labels.shape != columns.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(labels.shape)}; the input's columns need {tuple(columns.shape[:2])}"
        )
    sound = (labels == -100) | ((labels >= 0) & (labels < count))
    wanted = f"labels are numbers from 0 and below {counted} {count}, or -100 to leave a column out"
    if torch.compiler.is_compiling():
        require(sound, f"{name} holds others; {wanted}", labels)
    elif not bool(sound.all()):
        raise ValueError(f"{name} holds {int(labels[~sound][0])}; {wanted}")
    return labels.long()


WHOLE = (torch.long, torch.int)


def checked_classes(labels: torch.Tensor | None, count: int, counted: str = "num_labels") -> torch.Tensor | None:
    """The labels of a classification into `count` classes: whole numbers as torch.long, others as they are.

    Raises ValueError or TypeError unless whole numbers name classes below count, or are -100 (with one class alone
    they are values to be met).
    """
    check_tensors({"labels": labels})
    if labels is not None and is_exporting():
        refuse_export(["labels"])
    if labels is None or labels.is_floating_point():
        return labels
    if labels.dtype not in WHOLE:
        raise ValueError(
            f"labels has type {labels.dtype}; give classes as torch.long or torch.int, and several at once, or values "
            "to be met, as a floating type"
        )
    sound = (labels == -100) | ((labels >= 0) & (labels < count))
    wanted = f"they must be numbers of classes, from 0 and below {counted} {count}, or -100 to leave a row out"
    if count > 1 and torch.compiler.is_compiling():
        require(sound, f"labels hold others; {wanted}", labels)
    elif count > 1 and not bool(sound.all()):
        low, high = (int(x) for x in labels.aminmax())
        raise ValueError(f"labels hold values from {low} to {high}; {wanted}")
    return labels.long()


def checked_answers(
    name: str, places: torch.Tensor | None, columns: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """The columns (B,) in which answers begin or end, if given, as torch.long.

    Raises ValueError or TypeError unless they are whole numbers from 0, one for each row of the input's columns
    (B, T, ...), and none is padding. transformers' loss takes those below 0 for column 0.
    """
    check_tensors({name: places})
    if places is None:
        return None
    b, t = columns.shape[:2]
    if is_exporting():
        refuse_export([name])
    if places.dtype not in WHOLE or places.shape not in ((b,), (b, 1)):  # a second dimension comes of DataParallel
        raise ValueError(
            f"{name} has type {places.dtype} and shape {tuple(places.shape)}; {b} rows need ({b},) of torch.long or "
            "torch.int"
        )
    places = places.long().view(b)
    if bool((places < 0).any()):
        raise ValueError(
            f"{name} holds {int(places.min())}; give columns from 0, or one behind the input, {t}, to leave a row out"
        )
    if attention_mask is not None:
        token = attention_mask.to(places.device).gather(1, places.clamp(max=t - 1)[:, None]).squeeze(1) != 0  # (B,)
        wrong = ((places < t) & ~token).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"{name} holds {int(places[wrong[0]])} for row {wrong[0]}, a column of padding by attention_mask; "
                "an answer begins and ends at tokens"
            )
    return places


def check_count(labels: torch.Tensor, count: int, config):
    """Raises ValueError unless labels fit `count` texts and the loss that transformers takes for them: a class each,
    in whole numbers (count,); several at once, floating (count, num_labels); values to be met (count, num_labels)."""
    floating, one = labels.is_floating_point(), config.num_labels == 1
    each, several = labels.shape == (count,), labels.shape == (count, config.num_labels)
    fits = {
        "regression": several or (each and one),
        "single_label_classification": each and not floating,
        "multi_label_classification": several and floating,
    }
    chosen = "multi_label_classification" if floating else "single_label_classification"
    kind = config.problem_type or ("regression" if one else chosen)
    if kind not in fits:
        raise ValueError(f"config.problem_type is {kind!r}; it must be one of {', '.join(fits)}, or None")
    if not fits[kind] and kind == "regression":
        raise ValueError(
            f"labels has type {labels.dtype} and shape {tuple(labels.shape)}; regression of {count} texts needs "
            f"values ({count}, {config.num_labels}){f', or ({count},)' if one else ''}"
        )
    if not fits[kind]:
        raise ValueError(
            f"labels has type {labels.dtype} and shape {tuple(labels.shape)}; {count} texts need whole numbers "
            f"({count},) or, with several classes at once, a floating type ({count}, {config.num_labels}) and "
            f"config.problem_type 'multi_label_classification' (it is {config.problem_type!r})"
        )


def classifier_dropout(config) -> torch.nn.Dropout:
    """The dropout before a classifier: at config.classifier_dropout, or at hidden_dropout where that is None."""
    rate = config.hidden_dropout if config.classifier_dropout is None else config.classifier_dropout
    return torch.nn.Dropout(rate)


def pooled_rows(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, documents: Documents | None, last: bool
) -> torch.Tensor:
    """The hidden state (B, E) of each row's first or last token in hidden (B, T, E), padding left out; where documents
    are packed, of each document's (documents, E).

    Raises ValueError if a row has no token.
    """
    b, t = hidden.shape[:2]
    if documents is not None:
        return documents.pooled(hidden, last)
    if attention_mask is None:
        return hidden[:, -1 if last else 0]
    mask = attention_mask[:, -t:].bool()
    empty = ~mask.any(1)
    if torch.compiler.is_compiling():
        require(~empty, "attention_mask has rows without a token")
    elif bool(empty.any()):
        raise ValueError(
            f"attention_mask has no token in rows {empty.nonzero().flatten().tolist()}; nothing to classify"
        )
    column = torch.arange(t, device=mask.device).expand(b, t)
    column = column.masked_fill(~mask, -1).amax(1) if last else column.masked_fill(~mask, t).amin(1)
    return hidden[torch.arange(b, device=hidden.device), column.to(hidden.device)]


def vocabulary_scores(lm_head: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Scores (B, T, V) of hidden (B, T, E), with the bias that PEFT leaves out of a tied head. Its trainable tokens,
    alone or beside LoRA, multiply by the table only (0.21, TrainableTokensLayer.forward_adapters); what the head makes
    of zeros says whether the bias is to be added.

    Raises ValueError where PEFT has put a head without bias in this one's place: merged, it would stay so."""
    scores = lm_head(hidden)
    for copy in getattr(lm_head, "modules_to_save", {}).values():
        if getattr(copy, "bias", None) is None and getattr(lm_head.original_module, "bias", None) is not None:
            raise ValueError(
                "PEFT has tied a copy of lm_head without its bias to the embedding of modules_to_save; leave "
                "ensure_weight_tying out, or use trainable_token_indices"
            )
    adapter = getattr(lm_head, "token_adapter", lm_head)
    bias = adapter.get_base_layer().bias if hasattr(adapter, "trainable_tokens_delta") else None
    if bias is None:
        return scores
    return scores + (bias - lm_head(torch.zeros_like(hidden[:1, :1])))


def check_all_kept(logits_to_keep, columns: torch.Tensor):
    """Raises ValueError if logits_to_keep leaves out any of the columns (B, T, ...): a loss needs them all."""
    t = columns.shape[1]
    if not isinstance(logits_to_keep, int) or logits_to_keep not in (0, t):
        raise ValueError(
            f"logits_to_keep is {logits_to_keep}, and labels are given: a loss needs the logits of all {t} columns; "
            "leave one of them out"
        )


def check_kept(logits_to_keep, columns: torch.Tensor | None):
    """Raises ValueError or TypeError unless logits_to_keep says which of the input's columns (B, T, ...) to keep."""
    if not isinstance(columns, torch.Tensor) or columns.dim() < 2 or not columns.shape[1]:
        return  # what is wrong with them is said elsewhere
    t = columns.shape[1]
    if isinstance(logits_to_keep, int):
        if not 0 <= logits_to_keep <= t:
            raise ValueError(f"logits_to_keep is {logits_to_keep}; give 0 for all of the {t} columns, or 1 to {t}")
        return
    if not isinstance(logits_to_keep, (torch.Tensor, slice)):
        raise TypeError(f"logits_to_keep is a {type(logits_to_keep).__name__}; give a number, or a tensor of columns")
    if isinstance(logits_to_keep, torch.Tensor):
        wanted = logits_to_keep
        mask = wanted.dtype == torch.bool and wanted.shape == (t,)
        if not mask and (wanted.dtype not in WHOLE or wanted.dim() > 1):
            raise ValueError(
                f"logits_to_keep has type {wanted.dtype} and shape {tuple(wanted.shape)}; give column numbers (any,), "
                f"or a mask ({t},) of booleans"
            )
        low, high = (int(x) for x in wanted.aminmax()) if wanted.numel() else (0, 0)
        if not mask and not (-t <= low and high < t):
            raise ValueError(f"logits_to_keep holds columns from {low} to {high}; the input has 0 to {t - 1}")


def keep_logits(hidden: torch.Tensor, logits_to_keep) -> torch.Tensor:
    """The columns of hidden (B, T, E) whose logits are wanted: all (0), the last few (an int), or these (a tensor)."""
    if isinstance(logits_to_keep, int):
        return hidden if logits_to_keep == 0 else hidden[:, -logits_to_keep:]
    return hidden[:, logits_to_keep]
