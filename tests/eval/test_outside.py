"""Contestants from outside the gallery: of one size with the others, trained on the same batches, asked honestly."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_eval import CPU, TINY, TINY_SIZES, invoke
from test_eval import tiny as tiny
from transformers import LlamaForCausalLM

from eval import benchmark, contestants, outside, presets, recall, report, text
from eval.cells import Run
from eval.outside import OUTSIDE, Reading
from hf_gallery.data import TASKS, encode_bytes, questions
from hf_gallery.files import read_json
from hf_gallery.harness import score
from hf_gallery.training import SegmentTrainer

CARRIED = {
    "mistral": Reading.PARTS,
    "mamba": Reading.TOKENS,
    "mamba2": Reading.PARTS,
    "recurrent_gemma": Reading.TOKENS,
}


def loud(name, sizes=TINY_SIZES):
    """A model with weights that matter, in evaluation."""
    model = contestants.build(OUTSIDE[name], sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("task", ["text", "recall", "abilities"])
@pytest.mark.parametrize("preset", list(presets.PRESETS))
def test_outsiders_have_the_size_of_the_others(preset, task):
    sizes = getattr(presets.PRESETS[preset], task).sizes
    with torch.device("meta"):
        reference = contestants.build(contestants.CONTESTANTS["transformer"], sizes).num_parameters()
        for name, contestant in OUTSIDE.items():
            assert abs(contestants.build(contestant, sizes).num_parameters() / reference - 1) < 0.03, name


def bits(logits, ids):
    """Of each token but the first, from logits (1, T, V) of a document (1, T)."""
    return -torch.log_softmax(logits.double(), -1)[:, :-1].gather(-1, ids[:, 1:, None])[0, :, 0] / math.log(2)


@pytest.mark.parametrize("name", OUTSIDE)
def test_outsiders_read_documents_as_if_alone(name):
    """With what they carry, over calls of any length, beside others: what one forward of transformers over the whole
    document gives. Llama, whose keys have no end, begins anew with each segment."""
    model, part = loud(name), 9
    assert outside.how(model, part) is CARRIED.get(name, Reading.SEGMENTS)
    random = np.random.default_rng(0)
    found = [random.integers(1, 256, size=n) for n in (2, 41, 30, 10)]
    got = text.read(model, found, lanes=3, length=part, device=CPU)
    for ids, own in zip(found, got, strict=True):
        ids = torch.from_numpy(ids)[None]
        with torch.no_grad():
            if name in CARRIED:
                logits = model(input_ids=ids, use_cache=False).logits
            else:
                logits = torch.cat([model(input_ids=x, use_cache=False).logits for x in ids[:, :-1].split(part, 1)], 1)
                logits = torch.cat([logits, logits[:, -1:]], 1)
        np.testing.assert_allclose(own, bits(logits, ids).numpy(), rtol=2e-4, atol=1e-4)


def test_a_cache_that_begins_anew_is_not_trusted(monkeypatch):
    """As Mamba's does in transformers, where a call of several tokens forgets the state."""
    model = loud("mamba")
    ids = torch.randint(1, 256, (1, 18))
    reader = outside.Reader(model, Reading.PARTS)
    parts = torch.cat([reader.read(x) for x in ids.split(9, 1)], 1)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
    assert (parts - whole).abs().max() > 1e-3 and outside.how(model, 9) is Reading.TOKENS


def test_outsiders_train_on_the_same_batches(tmp_path):
    found = Dataset.from_dict({"input_ids": [list(range(1, n)) for n in (40, 7, 23, 90, 12)]})
    with text.training_arguments(CPU, 5, 1e-3, 3, per_device_train_batch_size=2) as arguments:
        gallery = contestants.build(contestants.CONTESTANTS["transformer"], TINY_SIZES)
        ours = text.trainer_of(gallery, arguments, TINY.text.length, found)
        assert isinstance(ours, SegmentTrainer)
        loader = iter(ours.get_train_dataloader())
        expected = [next(loader) for _ in range(3)]
    with text.training_arguments(CPU, 5, 1e-3, 3, per_device_train_batch_size=2) as arguments:
        trainer = text.trainer_of(contestants.build(OUTSIDE["llama"], TINY_SIZES), arguments, TINY.text.length, found)
        assert not isinstance(trainer, SegmentTrainer)
        loader = iter(trainer.get_train_dataloader())
        for theirs in expected:
            batch = next(loader)
            asked = theirs["shift_labels"] >= 0
            assert torch.equal(batch["labels"], theirs["shift_labels"])
            assert torch.equal(batch["input_ids"][asked], theirs["input_ids"][asked])
            loss = trainer.compute_loss(trainer.model, batch)
            with torch.no_grad():
                logits = trainer.model(batch["input_ids"]).logits.double()
            given = -torch.log_softmax(logits, -1).gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
            assert loss.item() == pytest.approx(given[asked].mean().item(), rel=1e-5)


def test_long_batches_are_cut_for_models_whose_positions_end():
    rows = torch.arange(1, 15).view(2, 7)
    cut = outside._cut(rows, 3, -100)
    assert cut.tolist() == [[1, 2, 3], [4, 5, 6], [7, -100, -100], [8, 9, 10], [11, 12, 13], [14, -100, -100]]
    assert outside._cut(rows, None, 0) is rows and outside._cut(rows, 7, 0) is rows


def test_recall_of_llama_is_that_of_transformers():
    """Counted from forwards of transformers' own class with the same weights."""
    model = loud("llama")
    own = LlamaForCausalLM(model.config).eval()
    own.load_state_dict(model.state_dict())
    settings = dataclasses.replace(TINY.recall, examples=12)
    asked = recall.ask(model, settings, 8, 0, CPU)
    assert asked == recall.ask(lambda input_ids: own(input_ids=input_ids), settings, 8, 0, CPU)


@pytest.mark.parametrize("name", OUTSIDE)
def test_abilities_of_outsiders_are_counted_from_their_own_logits(name):
    """Nothing of a question is cut or padded into sight."""
    model, given = loud(name), {"length": 24, "num_questions": 1}
    right = 0
    for row in questions(TASKS["permutation_composition"](12, **given, split="test"), last=True):
        context, target = (encode_bytes(row[part]).tolist() for part in ("context", "target"))
        with torch.no_grad():
            logits = model(torch.tensor([context + target[:-1]])).logits[0, len(context) - 1 :]
        right += logits.argmax(-1).tolist() == target
    found = score(model, {"a": ("permutation_composition", given)}, examples=12)
    assert found == {"a": {"asked": 12, "correct": right}}


def test_unasked_outsiders_take_no_part():
    assert not set(OUTSIDE) & {c.name for c in benchmark.choose_contestants(None)}
    assert [c.name for c in benchmark.choose_contestants("mamba,transformer")] == ["transformer", "mamba"]


@pytest.mark.parametrize(
    "named", [["llama", "mamba"], pytest.param(["mistral", "mamba2", "recurrent_gemma"], marks=pytest.mark.slow)]
)
def test_a_whole_run_of_outsiders(named, tiny):
    """Recall, text and costs, beside one of the gallery and one of a user's own."""
    Path("mine").mkdir()
    small = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 262, "n_positions": 64}
    Path("mine/config.json").write_text(json.dumps(small))
    names, tasks = ["transformer", *named], ["--tasks", "recall,text,cost", "--workers", "1"]
    result = invoke(*tiny, *tasks, "--variants", ",".join(names), "--contestant", "mine")
    assert result.exit_code == 0, result.output
    results = read_json(Path("runs/tiny") / report.RESULTS)
    assert list(results["summary"]) == [*names, "mine"]
    for name, entry in results["summary"].items():
        assert set(entry["recall"]) == {"2", "8", "32"}
        assert 3 < entry["bits_per_byte"][0] < 12 and entry["cost"]["decode_ms_per_token"]["24"] > 0
        assert ("outside" in entry) == (name != "transformer")
    decoded = TINY.cost.decode_tokens + 1  # after the first context
    for name in named:
        held = results["summary"][name]["cost"]["cache_bytes"]
        grown = 1 if name in CARRIED else (24 + decoded) / 8
        assert held["24"] == grown * held["8"] > 0, name
    said = " ".join(result.output.split())
    label, size = OUTSIDE[named[0]].label, results["summary"][named[0]]["parameters"]
    assert "by one version of the code" in said and f"{label}: {size:,} parameters, as many as the others" in said
    assert "trained with nothing carried" in said and re.search(
        r"mine \(outside\): [\d,]+ parameters, as its own", said
    )
    kept = benchmark.measured(Run(Path("runs/tiny")), TINY, tiny[-1], CPU)  # as another command finds it
    assert len(kept) == len(results["cells"]) and "mine" in {cell["contestant"] for cell in kept}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"model_type": "gpt2", "vocab_size": 100}, [], "vocab_size is 100.*raise it to 262"),
        ({"model_type": "gpt2", "n_positions": 8}, ["--tasks", "recall"], "reads 8 tokens at most.*recall"),
        ({"model_type": "bert_of_ours"}, [], "no configuration of transformers"),
        ({"model_type": "clip"}, [], "no causal language model"),
        (
            {"model_type": "bert", "vocab_size": 262, "num_hidden_layers": 1},
            [],
            "sees tokens that come later.*is_decoder",
        ),
        (None, ["--variants", "llama", "--tasks", "bytes"], "llama.*takes no part in the task bytes"),
        (None, ["--contestant", "nowhere"], "--contestant nowhere"),
    ],
)
def test_outsiders_that_cannot_take_part_are_refused_by_name(config, arguments, message, tiny):
    if config is not None:
        Path("mine").mkdir()
        Path("mine/config.json").write_text(json.dumps(config))
        arguments = [*arguments, "--contestant", "mine"]
    result = invoke(*tiny, *arguments)
    assert result.exit_code == 2 and re.search(message, " ".join(result.output.split())), result.output
    assert not list(Path("runs").rglob("*.json"))
