"""Everything that commit 93bd5cf saved opens as before: folders under every head, caches, a checkpoint of a training,
results.

golden/make_saved.py made it with that commit, and says what each file holds.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments
from variants import assert_equal, result_of

import hf_gallery as gallery
from eval import report
from hf_gallery.training import SegmentTrainer

SAVED = Path(__file__).parents[1] / "golden" / "saved"
FOLDERS = sorted(path.parent.name for path in SAVED.glob("*/outputs.safetensors"))
STREAMS = [name for name in FOLDERS if (SAVED / name / "cache.safetensors").exists()]
folders, streams = (pytest.mark.parametrize("name", names) for names in (FOLDERS, STREAMS))


def opened(name):
    """The model of a saved folder, in eval(), what it was given, and what else was kept."""
    (kind,) = json.loads((SAVED / name / "config.json").read_text())["architectures"]
    model, report = getattr(gallery, kind).from_pretrained(SAVED / name, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    kept = load_file(SAVED / name / "outputs.safetensors")
    inputs = {key.removeprefix("input."): x for key, x in kept.items() if key.startswith("input.")}
    return model.eval(), inputs, kept


def test_all_are_there():
    """Every architecture, every class of it, and the caches of all that carry one."""
    classes = {json.loads((SAVED / name / "config.json").read_text())["architectures"][0] for name in FOLDERS}
    assert len(FOLDERS) == 43 and len(STREAMS) == 25
    assert {"Gallery" + x for x in CLASSES} == classes


CLASSES = [
    "BlockRecurrentTransformerForCausalLM", "BlockRecurrentTransformerForSequenceClassification",
    "BlockRecurrentTransformerModel", "LongformerForCausalLM", "LongformerForMaskedLM",
    "LongformerForQuestionAnswering", "LongformerForSequenceClassification", "LongformerForTokenClassification",
    "LongformerModel", "MemorizingTransformerForCausalLM", "MemorizingTransformerForSequenceClassification",
    "MemorizingTransformerModel", "TransformerForCausalLM", "TransformerForConditionalGeneration",
    "TransformerForMaskedLM", "TransformerForSequenceClassification", "TransformerModel", "TransformerXLForCausalLM",
    "TransformerXLForSequenceClassification", "TransformerXLModel",
]  # fmt: skip


@folders
@torch.no_grad()
def test_a_folder_gives_the_same(name):
    model, inputs, kept = opened(name)
    assert_equal(result_of(model(**inputs)), kept["result"])


@pytest.mark.parametrize("which", ["cache", "cache_trained"])
@streams
@torch.no_grad()
def test_a_cache_goes_on_as_before(name, which):
    """Filled without and with gradients, rows padded differently; a memory's ring is full, and has wrapped round."""
    model, inputs, kept = opened(name)
    cache = gallery.GalleryCache.load(SAVED / name / f"{which}.safetensors")
    target = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    more = {target: kept["more"]}
    if target == "decoder_input_ids":
        more |= {"attention_mask": inputs["attention_mask"], "input_ids": inputs["input_ids"]}
    after = kept["after" if which == "cache" else "after_trained"]
    assert cache.get_seq_length() == inputs[target].shape[1]
    for chunked in (cache.copy(), cache):
        parts = [kept["more"]] if chunked is cache else kept["more"].split(1, dim=1)
        results = [
            result_of(model(**more | {target: part}, past_key_values=chunked, use_cache=True)) for part in parts
        ]
        assert_equal(torch.cat(results, dim=1), after)


def test_a_memory_that_is_full_was_saved():
    for name in ("memorizing-causal", "memorizing_overflowing-causal"):
        model, inputs, _ = opened(name)
        states = gallery.GalleryCache.load(SAVED / name / "cache.safetensors").states
        rings = [state["memory_keys"].shape[2] for state in states if "memory_keys" in state]
        assert len(rings) == len(model.config.memory_layers)
    assert rings == [model.config.memory_size] and inputs["input_ids"].shape[1] > 3 * rings[0]


def test_a_folder_with_its_code(tmp_path):
    """By its own code, in a process without the library, and by today's."""
    with zipfile.ZipFile(SAVED / "remote.zip") as file:
        file.extractall(tmp_path / "remote")
    kept = load_file(tmp_path / "remote" / "outputs.safetensors")
    model = gallery.GalleryTransformerXLForCausalLM.from_pretrained(tmp_path / "remote").eval()
    with torch.no_grad():
        assert_equal(model(kept["ids"]).logits, kept["result"])
    program = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
kept = load_file("remote/outputs.safetensors")
model = AutoModelForCausalLM.from_pretrained("remote", trust_remote_code=True).eval()
with torch.no_grad():
    torch.testing.assert_close(model(kept["ids"]).logits, kept["result"], rtol=1e-4, atol=1e-5)
assert "hf_gallery" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def documents():
    def tokens(n):
        return torch.randint(0, 18, (n,), generator=torch.Generator().manual_seed(n)).tolist()

    return [{"input_ids": tokens(n)} for n in (61, 40, 23, 52, 17, 34)]


def test_a_training_is_resumed(tmp_path):
    """From its lanes and their cache: two more steps give the weights that four in one go gave."""
    shutil.copytree(SAVED / "checkpoint", tmp_path / "checkpoint-2")
    after = load_file(tmp_path / "checkpoint-2" / "after_four_steps.safetensors")
    (tmp_path / "checkpoint-2" / "after_four_steps.safetensors").unlink()
    model = gallery.GalleryTransformerXLForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[],
        optim="sgd", use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    trainer = SegmentTrainer(model, arguments, segment_length=7, train_dataset=documents())
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for name, x in model.state_dict().items():
        assert_equal(x, after[name], name)


def test_results_read_as_before(tmp_path):
    """Every measured row of the tables that were written then stands in the tables that are written now."""
    results = report.read(str(SAVED / "results" / "results.json"), tmp_path)
    then = (SAVED / "results" / "results.md").read_text()
    rows, now = ([line for line in text.splitlines() if line[:2] == "| "] for text in (then, report.markdown(results)))
    measured = [row for row in rows if row.startswith(("| Transformer-XL", "| bytes by", "| chance"))]
    assert len(measured) == 4
    for row in measured:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert any(all(cell in line for cell in cells) for line in now), row
