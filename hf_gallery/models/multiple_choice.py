"""Multiple choice: which of several texts is right, say the answers to one question. Each is read alone and scored.

Letters: see spans.py. C choices of a question.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MultipleChoiceModelOutput
from transformers.utils import can_return_tuple

from .documents import Documents
from .exporting import is_exporting
from .heads import READ_BY_BACKBONE, Head, checked_classes, classifier_dropout, open_documents, pooled_rows
from .modeling_base import check_arguments

# Inputs of a forward that have a row for each text.
BY_ROW = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "seq_idx",
    "global_attention_mask",
)  # fmt: skip


class MultipleChoiceHead(Head):
    """A score for each choice: BERT's pooler on its text's first token, then `score` (Devlin et al. 2018, section
    4.4)."""

    _auto_class = "AutoModelForMultipleChoice"
    config_changes = {"is_decoder": False}

    def build_head(self, config):
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.pooler_act = ACT2FN[config.classifier_act]
        self.dropout = classifier_dropout(config)
        self.score = nn.Linear(config.hidden_size, 1)  # a classifier is of other sizes, in one folder

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
    ) -> MultipleChoiceModelOutput:
        """Arguments as in the bare model, with a dimension for the choices: input_ids (B, C, T), and so all that have
        rows; hidden states and attentions are of B * C rows. labels (B,): the number of the right choice, -100 to
        leave a question out. num_items_in_batch: the questions of all batches of an update, whose losses then add up
        to their mean. logits (B, C).

        input_ids (B, T) are texts by themselves, one a row: logits (B, 1), their scores, and no labels.

        Where documents are packed in the rows, the first documents of a question's C rows are the choices of one
        question, the second ones of another, and so on: labels (questions,), logits (questions, C).
        """
        items = kwargs.pop("num_items_in_batch", None)
        check_arguments(self, kwargs, self.model.arguments() | READ_BY_BACKBONE)
        own = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        flat, choices = as_rows(own | dict(token_type_ids=token_type_ids, position_ids=position_ids) | kwargs)
        labels = checked_classes(labels, 1 if choices is None else choices, "the choices'")
        documents = open_documents(self, **flat)  # its errors come first
        flat |= self.choice_inputs(flat, documents)
        outputs = self.model(**flat | {"return_dict": True, "use_cache": False})
        pooled = pooled_rows(outputs.last_hidden_state, flat["attention_mask"], documents, last=False)
        scores = self.score(self.dropout(self.pooler_act(self.pooler(pooled))))  # (texts, 1)
        logits = scores if choices is None else by_question(scores, choices, documents)
        loss = None
        if labels is not None:
            check_right_choices(labels, logits, choices)
            loss = F.cross_entropy(logits, labels, reduction="mean" if items is None else "sum")
            loss = loss if items is None else loss / items
        return MultipleChoiceModelOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def choice_inputs(self, flat: dict, documents: Documents | None) -> dict:
        """Further inputs of the backbone that follow from where the choices stand. Override to give some."""
        return {}


def as_rows(given: dict) -> tuple[dict, int | None]:
    """The inputs with a row for each text, (B, C, T) as (B * C, T), and C; as they are, and None, where they have no
    dimension for choices.

    Raises ValueError if one has other questions or choices than the text.
    """
    embeds = given["inputs_embeds"]
    name, text, wanted = ("input_ids", given["input_ids"], 3) if embeds is None else ("inputs_embeds", embeds, 4)
    if not isinstance(text, torch.Tensor) or text.dim() != wanted:
        return given, None  # one text a row; what is wrong with it is said elsewhere
    shape = text.shape[:2]
    flat = dict(given)
    for other in BY_ROW:
        x = given.get(other)
        if isinstance(x, torch.Tensor):
            if x.dim() < 3 or x.shape[:2] != shape:
                raise ValueError(
                    f"{other} has shape {tuple(x.shape)} and {name} {tuple(text.shape)}; each begins with the "
                    f"questions and their choices, {tuple(shape)}"
                )
            flat[other] = x.flatten(0, 1)
    return flat, shape[1]


def by_question(scores: torch.Tensor, choices: int, documents: Documents | None) -> torch.Tensor:
    """The scores (texts, 1) of B * C rows as (questions, C).

    Raises ValueError if the rows of one question hold different numbers of documents.
    """
    if documents is None:
        return scores.view(-1, choices)
    rows = documents.batch
    count = torch.bincount(documents.row, minlength=rows)  # (B * C,) documents of each row
    of_question = count.view(-1, choices)  # (B, C)
    uneven = (of_question != of_question[:, :1]).any(1)
    if bool(uneven.any()):
        first = int(uneven.nonzero()[0])
        raise ValueError(
            f"the choices of row {first} hold {of_question[first].tolist()} documents; each question needs one in "
            "every choice, so their numbers must be the same"
        )
    place = torch.arange(len(documents)) - (count.cumsum(0) - count)[documents.row]  # of each document in its row
    before = of_question[:, 0].cumsum(0) - of_question[:, 0]  # (B,) questions in earlier rows
    question = before[torch.div(documents.row, choices, rounding_mode="floor")] + place
    order = (question * choices + documents.row % choices).argsort()
    return scores[order.to(scores.device)].view(-1, choices)


def check_right_choices(labels: torch.Tensor, logits: torch.Tensor, choices: int | None):
    """Raises ValueError unless labels (questions,) name choices of logits (questions, C)."""
    if is_exporting():
        return  # labels have been refused
    if choices is None or choices < 2:
        shape = "no dimension for choices" if choices is None else "one choice for each question"
        raise ValueError(f"labels are given, and the input has {shape}: nothing can be learned; give (B, C, T), C > 1")
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels has type {labels.dtype} and shape {tuple(labels.shape)}; {len(logits)} questions need "
            f"({len(logits)},) whole numbers, those of the right choices"
        )
