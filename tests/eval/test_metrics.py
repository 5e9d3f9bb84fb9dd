"""The evaluate modules in eval/metrics: loaded by evaluate, without a network, alone and in a Trainer."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import Trainer, TrainingArguments
from variants import VARIANTS

from hf_gallery.data import byte_tokenizer, slot_recall

METRICS = Path(__file__).parents[2] / "eval" / "metrics"


def load(name):
    return evaluate.load(str(METRICS / name))


@pytest.mark.parametrize("name", ["bits_per_byte", "recall_at_distance"])
def test_they_say_what_they_are(name):
    metric = load(name)
    assert metric.name == name
    assert (
        "arxiv" in metric.citation.lower() and "Returns:" in metric.inputs_description and metric.description.strip()
    )


def test_bits_per_byte_of_texts_and_of_counts():
    """Two bits for each byte of "déjà" (six) and one for each of "vu"; long texts count more."""
    nats = [-12 * np.log(2), -2 * np.log(2)]
    metric = load("bits_per_byte")
    for references in (["déjà", "vu"], [6, 2]):
        found = metric.compute(predictions=nats, references=references)
        assert found == {"bits_per_byte": pytest.approx(14 / 8), "bytes": 8}
    with pytest.raises(ValueError, match="references hold 0 bytes in all"):
        metric.compute(predictions=[0.0], references=[0])


def test_bits_per_byte_of_an_even_guess():
    """8 bits, whatever the text."""
    text = "It was the best of times"
    found = load("bits_per_byte").compute(predictions=[len(text) * np.log(1 / 256)], references=[text])
    assert found["bits_per_byte"] == pytest.approx(8)


def test_recall_by_distance():
    rows = dict(
        predictions=[[7, 8, 9, 1], [5, 5, 5, 5]],
        references=[[7, 5, -100, 1], [-100, 5, 5, 4]],
        distances=[[4, 16, -1, 9], [-1, 4, 16, 90]],
    )
    metric = load("recall_at_distance")
    assert metric.compute(**rows) == {
        "recall": pytest.approx(4 / 6),
        "recall@4": 1.0, "asked@4": 2,
        "recall@9": 1.0, "asked@9": 1,
        "recall@16": 0.5, "asked@16": 2,
        "recall@90": 0.0, "asked@90": 1,
    }  # fmt: skip
    assert metric.compute(**rows, edges=[8, 32]) == {
        "recall": pytest.approx(4 / 6),
        "recall@8": 1.0, "asked@8": 2,
        "recall@32": pytest.approx(2 / 3), "asked@32": 3,
    }  # fmt: skip
    assert metric.compute(**rows, edges=[16, 90])["asked@16"] == 5  # an edge counts with what lies below it
    with pytest.raises(ValueError, match=r"edges are \[32, 8\]; they must rise"):
        metric.compute(**rows, edges=[32, 8])
    with pytest.raises(ValueError, match="references hold nothing but -100"):
        metric.compute(predictions=[[1]], references=[[-100]], distances=[[-1]])


# ------------------------------------------------------------------------------------------------------- in a Trainer


def trainer(model, rows, folder, **arguments):
    return Trainer(
        model,
        TrainingArguments(str(folder), per_device_eval_batch_size=4, use_cpu=True, report_to=[]),
        eval_dataset=rows,
        processing_class=byte_tokenizer(),
        **arguments,
    )


@pytest.fixture
def model():
    return VARIANTS[0].make(vocab_size=262, pad_token_id=256, bos_token_id=257, eos_token_id=258)


def test_bits_per_byte_in_a_trainer(model, tmp_path):
    """As the docstring of the module has it; equal to the loss of a batch over all."""
    metric = load("bits_per_byte")
    ids = torch.randint(32, 127, (6, 30), generator=torch.Generator().manual_seed(0))

    def keep_scores(logits, labels):
        scored = labels[:, 1:] >= 0
        scores = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        return scores * scored

    def compute_metrics(p):
        return metric.compute(predictions=p.predictions.sum(1), references=(p.label_ids[:, 1:] >= 0).sum(1))

    labels = ids.clone()
    labels[2, :11] = -100
    rows = [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in zip(ids, labels, strict=True)]
    found = trainer(
        model, rows, tmp_path, preprocess_logits_for_metrics=keep_scores, compute_metrics=compute_metrics
    ).evaluate()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels).loss.item()
    assert found["eval_bytes"] == 6 * 29 - 10
    assert found["eval_bits_per_byte"] == pytest.approx(loss / np.log(2), rel=1e-5)


def test_recall_at_distance_in_a_trainer(model, tmp_path):
    """As the docstring of the module has it; equal to the model's own choices, counted one by one."""
    metric = load("recall_at_distance")
    rows = slot_recall(30, 20, distances=[2, 9], num_values=2, split="test")
    only = 1e4 * torch.isin(torch.arange(262), torch.tensor([97, 98]))  # a and b, or it would never be right
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + only)

    def keep_choices(logits, labels):
        return logits.argmax(-1)

    def compute_metrics(p):
        return metric.compute(
            predictions=p.predictions[:, :-1],
            references=p.label_ids[:, 1:],
            distances=np.array(rows["distance"])[:, 1:],
        )

    found = trainer(
        model, rows, tmp_path, preprocess_logits_for_metrics=keep_choices, compute_metrics=compute_metrics
    ).evaluate()
    ids, labels, distances = (torch.tensor(rows[name][:]) for name in ("input_ids", "labels", "distance"))
    with torch.no_grad():
        right = model(input_ids=ids).logits.argmax(-1)[:, :-1] == labels[:, 1:]
    for distance in (2, 9):
        asked = distances[:, 1:] == distance
        assert found[f"eval_asked@{distance}"] == asked.sum()
        assert found[f"eval_recall@{distance}"] == pytest.approx(right[asked].float().mean().item())
    assert 0 < found["eval_recall"] < 1
