"""Lanes of documents, and SegmentTrainer on every causal variant: what is trained on, resumed and evaluated is what a
plain loop over the documents says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from renamed import checkpointing
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from variants import VARIANTS, VOCAB, WORDS, causal

from hf_gallery.training import DocumentLanes, SegmentTrainer, newest_whole


def texts(*lengths, vocabulary=WORDS, seed=0):
    """One document per length, of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, size=n).tolist() for n in lengths]


def dataset(documents):
    return datasets.Dataset.from_dict({"input_ids": documents, "name": [str(i) for i in range(len(documents))]})


def read_back(lanes, epoch=0):
    """The documents of an epoch as the lanes read them: (tokens, labels) from each reset of a row to the next."""
    found, rows = [], [None] * lanes.lanes
    for step in range(len(lanes)):
        batch = lanes.batch(epoch, step)
        for row in range(lanes.lanes):
            here = batch["attention_mask"][row].bool()
            if batch["reset"][row]:
                rows[row] = ([], [])
                found.append(rows[row])
            assert (batch["shift_labels"][row][~here] == -100).all()
            assert here.tolist() == sorted(here.tolist(), reverse=True), "padding stands on the right"
            rows[row][0].extend(batch["input_ids"][row][here].tolist())
            rows[row][1].extend(batch["shift_labels"][row][here].tolist())
    return [pair for pair in found if pair[0]]


# ---- lanes


@hypothesis.given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 5),
    segment_length=st.integers(1, 9),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    eos=st.sampled_from([None, 99]),
)
def test_lanes_read_every_token_once(lengths, lanes, segment_length, world_size, seed, shuffle, eos):
    """Over all ranks, an epoch reads every document once, whole and in order; each token predicts the one after it,
    over segment borders too, and the last predicts eos or nothing. All ranks take the same number of steps."""
    hypothesis.assume(max(lengths) > 1)
    documents = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    last = -100 if eos is None else eos
    for epoch in (0, 1):
        found, steps = [], set()
        for rank in range(world_size):
            own = DocumentLanes(
                documents,
                lanes=lanes,
                segment_length=segment_length,
                seed=seed,
                shuffle=shuffle,
                eos_token_id=eos,
                rank=rank,
                world_size=world_size,
            )
            found += read_back(own, epoch)
            steps.add(len(own))
        assert sorted(found) == sorted((d, [*d[1:], last]) for d in documents if d)
        assert len(steps) == 1


def test_lanes_in_one_process_are_those_of_many():
    documents = texts(5, 23, 11, 2, 17, 9, 30, 1)
    together = DocumentLanes(documents, lanes=4, segment_length=4, seed=3)
    parts = [DocumentLanes(documents, lanes=2, segment_length=4, seed=3, rank=r, world_size=2) for r in (0, 1)]
    assert len(together) == len(parts[0]) == len(parts[1])
    for step in range(len(together)):
        whole, halves = together.batch(1, step), [part.batch(1, step) for part in parts]
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([half[name] for half in halves])), name


def test_lanes_are_balanced_and_their_number_of_steps_is_known():
    documents = texts(*np.random.default_rng(0).integers(2, 60, size=40))
    lanes = DocumentLanes(documents, lanes=4, segment_length=5)
    needed = sum(-(-len(d) // 5) for d in documents)
    assert len(lanes) <= -(-needed // 4) + 1
    for epoch in range(3):
        busy = [int(lanes.batch(epoch, step)["attention_mask"].any(1).sum()) for step in range(len(lanes))]
        assert sum(busy) == needed, "nothing is left when the steps are over"


def test_a_dry_lane_gives_padding_that_holds_nothing():
    lanes = DocumentLanes([[1, 2, 3, 4, 5, 6, 7], [8, 9]], lanes=3, segment_length=3, pad_token_id=77)
    assert len(lanes) == 3
    last = lanes.batch(0, 2)
    dry = ~last["attention_mask"].any(1)
    assert dry.sum() == 2
    assert (last["input_ids"][dry] == 77).all() and (last["shift_labels"][dry] == -100).all()
    assert last["reset"][dry].all() and not last["reset"][~dry].any()


def test_lanes_shuffle_by_seed_and_epoch():
    documents = texts(*[7] * 30)

    def order(seed, epoch, shuffle=True):
        return read_back(DocumentLanes(documents, lanes=2, segment_length=3, seed=seed, shuffle=shuffle), epoch)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0, shuffle=False) == order(1, 1, shuffle=False)


def test_a_batch_depends_on_its_epoch_and_step_alone():
    """Whatever was read before: lanes over another copy of the documents, asked in another order, give the same."""
    documents = texts(5, 23, 11, 2, 17)
    lanes, other = (DocumentLanes(x, lanes=2, segment_length=4) for x in (dataset(documents), documents))
    position, order = (0, 0), []
    while position[0] < 2:
        order.append((position, lanes.batch(*position)))
        position = lanes.after(*position)
    assert [p for p, _ in order] == [(epoch, step) for epoch in (0, 1) for step in range(len(lanes))]
    for (epoch, step), expected in reversed(order):
        got = other.batch(epoch, step)
        assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lanes", {"lanes": 3}),
        ("segment_length", {"segment_length": 5}),
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
        ("eos_token_id", {"eos_token_id": 9}),
        ("world_size", {"world_size": 2}),
        ("documents", {"documents": texts(5, 23, 11, 2, 16)}),
    ],
)
def test_the_setup_says_what_decides_the_batches(name, change):
    """As plain values, by which a checkpoint knows its lanes again."""
    arguments = {"documents": texts(5, 23, 11, 2, 17), "lanes": 2, "segment_length": 4}
    setup, other = (DocumentLanes(**arguments | more).setup() for more in ({}, change))
    assert json.loads(json.dumps(setup)) == setup
    assert {n for n in setup if setup[n] != other[n]} == {name}


def test_the_fingerprint_is_of_content():
    """Not of storage: selected, shuffled back, stored as other types or split otherwise, the same documents are the
    same; tokens moved over a document's border are not."""
    documents = texts(5, 23, 11, 2, 17)
    own = DocumentLanes(documents, lanes=1, segment_length=4).fingerprint()
    stored = dataset(documents)
    indices = list(reversed(range(len(documents))))
    narrow = stored.cast_column("input_ids", datasets.List(datasets.Value("int16")))
    for same in (
        stored,
        stored.select(indices).select(indices),
        narrow,
        datasets.concatenate_datasets([stored.select(range(2)), stored.select(range(2, 5))]),
    ):
        assert DocumentLanes(same, lanes=2, segment_length=3).fingerprint() == own
    moved = [documents[0] + documents[1][:1], documents[1][1:], *documents[2:]]
    for other in (stored.select(indices), dataset(moved), dataset(texts(5, 23, 11, 2, 17, seed=1))):
        assert DocumentLanes(other, lanes=2, segment_length=3).fingerprint() != own


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (datasets.Dataset.from_dict({"text": ["a"]}), r"columns \['text'\], not input_ids"),
        (datasets.DatasetDict({"train": dataset(texts(4))}), "DatasetDict"),
        (dataset(texts(4)).to_iterable_dataset(), "IterableDataset"),
        (dataset([[1], [2], []]), "nothing to predict"),
        ([], "0 documents"),
    ],
)
def test_lanes_say_what_documents_they_need(documents, message):
    with pytest.raises(ValueError, match=message):
        DocumentLanes(documents, lanes=2, segment_length=4)


@pytest.mark.parametrize("change", [{"lanes": 0}, {"segment_length": 0}, {"world_size": 0}, {"rank": 2}])
def test_lanes_refuse_wrong_counts(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is {change[name]}"):
        DocumentLanes(texts(4), **{"lanes": 2, "segment_length": 4, "world_size": 2, **change})


# ---- SegmentTrainer

LENGTHS = (13, 9, 25, 2, 17, 6, 1, 30)  # one document of one token: it has nothing to predict
# Where a test is of the trainer more than of the model.
MAIN = [variant for variant in VARIANTS if variant.name in ("transformer", "transformer_xl")]
MORE = ("transformer_xl_adaptive", "longformer_dilated", "memorizing", "block_recurrent")
SOME = [*MAIN, *(variant for variant in VARIANTS if variant.name in MORE)]
IN_TWO = [*SOME, *(variant for variant in VARIANTS if variant.name == "recurrent_memory")]
main = pytest.mark.parametrize("variant", MAIN, ids=[variant.name for variant in MAIN])
some = pytest.mark.parametrize("variant", SOME, ids=[variant.name for variant in SOME])
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def arguments(folder, **changes):
    plain = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "linear", "max_grad_norm": 0.0}
    quiet = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return TrainingArguments(str(folder), **{**plain, **quiet, "per_device_train_batch_size": 2, "seed": 5, **changes})


def trainer(
    model,
    folder,
    documents=None,
    *,
    segment_length=4,
    backpropagate_segments=1,
    evaluate=None,
    callbacks=None,
    predict_eos=False,
    **changes,
):
    return SegmentTrainer(
        model,
        arguments(folder, **changes),
        segment_length=segment_length,
        backpropagate_segments=backpropagate_segments,
        predict_eos=predict_eos,
        train_dataset=dataset(texts(*LENGTHS) if documents is None else documents),
        eval_dataset=None if evaluate is None else dataset(evaluate),
        callbacks=callbacks,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(a, b):
    """To the last bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


@pytest.mark.works("SegmentTrainer")
@pytest.mark.works("gradient accumulation")
@causal()
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_a_plain_loop(variant, accumulation, tmp_path):
    """Losses and weights are those of a loop that reads each document by itself, in a cache of its own, segment by
    segment, and takes the mean over all tokens of an update."""
    train_beside_a_plain_loop(variant, accumulation, 1, tmp_path)


@pytest.mark.works("gradients through the state")
@causal(others_slow=True)
@pytest.mark.parametrize(("accumulation", "segments"), [(2, 2), (4, 2)])
def test_gradients_pass_through_several_segments(variant, accumulation, segments, tmp_path):
    """Losses and weights are those of a loop that reads as many segments of a document in one forward: where a window
    ends gradients stop, where a document ends within a window the next one is fresh, and the end of an epoch cuts a
    window short."""
    train_beside_a_plain_loop(variant, accumulation, segments, tmp_path)


def train_beside_a_plain_loop(variant, accumulation, segments, tmp_path):
    a, b, c = texts(14, 9, 6)
    lanes = [[a], [b, c]]  # by length, each to the emptier lane; lane 0 is dry in the last step of an epoch
    epochs, steps, length = 2, 5, 4
    model = variant.make(**NO_DROPOUT)
    own = trainer(
        variant.make(**NO_DROPOUT),
        tmp_path,
        [a, b, c],
        segment_length=length,
        backpropagate_segments=segments,
        train_sampling_strategy="sequential",
        num_train_epochs=epochs,
        gradient_accumulation_steps=accumulation,
    )
    own.train()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    updates = epochs * -(-steps // accumulation)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 - update / updates)
    expected = []
    model.train()
    for _ in range(epochs):
        queues = [[(d, i) for d in lane for i in range(0, len(d), length)] for lane in lanes]
        caches = [None, None]
        for first in range(0, steps, accumulation):
            total, count = 0.0, 0
            for window in range(first, min(first + accumulation, steps), segments):
                for row, queue in enumerate(queues):
                    # What a window holds of each document, in one forward.
                    pieces = {}
                    for document, start in queue[window : window + segments]:
                        begin = pieces[id(document)][1] if id(document) in pieces else start
                        pieces[id(document)] = document, begin, start + length
                    for document, begin, end in pieces.values():
                        piece = torch.tensor(document[begin:end])
                        target = torch.tensor(document[begin + 1 : end + 1], dtype=torch.long)
                        cache = None if begin == 0 else caches[row]
                        output = model(piece[None], past_key_values=cache, use_cache=True)
                        caches[row] = output.past_key_values.detach()
                        total = total + F.cross_entropy(output.logits[0, : len(target)], target, reduction="sum")
                        count += len(target)
            loss = total / count
            expected.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert losses(own) == pytest.approx(expected, rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


class Stop(TrainerCallback):
    """Ends the process's training as a kill would: an exception after the update, when its checkpoint is written."""

    def __init__(self, update):
        self.update = update

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.update:
            raise KeyboardInterrupt


@pytest.mark.works("SegmentTrainer")
@pytest.mark.works("resume")
@causal(others_slow=True)
def test_resuming_is_bit_for_bit(variant, tmp_path):
    """With dropout, momentum, accumulation and gradients through two segments, losses and weights of a run that was
    cut off in its second epoch, and went on in new objects, are those of an unbroken one."""
    changes = {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "max_grad_norm": 1.0}
    changes |= {"backpropagate_segments": 2}
    whole = trainer(variant.make(), tmp_path / "whole", **changes)
    whole.train()
    per_epoch = whole.state.max_steps // 2
    assert per_epoch > 4
    # Elsewhere the variants do not differ: in the first epoch, and where the next one begins with empty caches.
    for update in (per_epoch + 2, 3, per_epoch)[: 3 if variant is VARIANTS[0] else 1]:
        folder = tmp_path / str(update)
        saving = {**changes, "save_strategy": "steps", "save_steps": update}
        cut = trainer(variant.make(), folder, callbacks=[Stop(update)], **saving)
        with pytest.raises(KeyboardInterrupt):
            cut.train()
        # Other weights, which the checkpoint's must replace.
        resumed = trainer(variant.make(seed=1), folder, **changes)
        resumed.train(resume_from_checkpoint=True)
        assert losses(cut) == losses(whole)[:update]
        assert losses(resumed) == losses(whole)
        assert_same(weights(resumed.model), weights(whole.model))


@torch.no_grad()
def mean_loss(model, documents):
    """Over all tokens but the first of each document, each document by itself in one forward."""
    total = 0.0
    for document in documents:
        tokens = torch.tensor(document)
        total += F.cross_entropy(model(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum").item()
    return total / sum(len(document) - 1 for document in documents)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of VARIANTS[0] in the middle of an epoch."""
    own = trainer(VARIANTS[0].make(), tmp_path_factory.mktemp("run"), max_steps=3, save_strategy="steps", save_steps=3)
    own.train()
    return Path(own.args.output_dir) / "checkpoint-3"


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("per_device_train_batch_size is 3, .* 2; set per_device", {"per_device_train_batch_size": 3}),
        ("segment_length is 5, .* 4; set segment_length=4", {"segment_length": 5}),
        ("gradient_accumulation_steps is 2, .* 1; set", {"gradient_accumulation_steps": 2}),
        ("backpropagate_segments is 2, .* 1; set", {"gradient_accumulation_steps": 2, "backpropagate_segments": 2}),
        ("seed is 6, .* 5; set seed=5", {"seed": 6}),
        ("train_sampling_strategy is 'sequential', .* 'random'", {"train_sampling_strategy": "sequential"}),
        ("predict_eos is 95, .* None; pass predict_eos=False", {"predict_eos": True}),
        ("train_dataset is '8 documents, 103 tokens, .*; pass the documents", {"documents": texts(*LENGTHS, seed=1)}),
        ("num_hidden_layers is 2 in the model's config, .* 3; build the model with", {"num_hidden_layers": 2}),
        ("dtype is 'torch.float64', .* 'torch.float32'; load the model with", {"dtype": torch.float64}),
        ("ignore_data_skip is True", {"ignore_data_skip": True}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_checkpoint_of_another_setup_is_refused(checkpoint, message, change, tmp_path):
    """By argument, both values and remedy, with model and trainer as they were."""
    config = {name: change[name] for name in ("num_hidden_layers", "dtype") if name in change}
    own = trainer(VARIANTS[0].make(**config), tmp_path, **{k: v for k, v in change.items() if k not in config})
    before, held = weights(own.model), own._training
    with pytest.raises(ValueError, match=message):
        own.train(resume_from_checkpoint=str(checkpoint))
    assert_same(weights(own.model), before)
    assert own._training is held and own.state.global_step == 0


FILES = (
    "trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "lanes_0.json",
    "lanes_0.safetensors",
)  # fmt: skip


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """The folder of a run of four steps, with whole checkpoints of two and four, and its weights in the end."""
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    own = trainer(VARIANTS[0].make(), tmp_path_factory.mktemp("run"), **changes)
    own.train()
    return Path(own.args.output_dir), weights(own.model)


def damaged(run, folder, name, kind):
    """A copy of the run whose newest checkpoint is damaged in one file, and that checkpoint."""
    shutil.copytree(run, folder, dirs_exist_ok=True)
    path = folder / "checkpoint-4" / name
    content = path.read_bytes()
    damages = {"empty": b"", "half": content[: len(content) // 2], "zeros": bytes(len(content))}
    path.unlink() if kind == "missing" else path.write_bytes(damages[kind])
    return path.parent


@pytest.mark.works("resume", "transformer")
@pytest.mark.parametrize("kind", ["missing", "empty", "half", "zeros"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_is_not_whole_is_refused_or_passed_over(two_checkpoints, name, kind, tmp_path, caplog):
    """As a kill or a full disk leaves it: by name it is refused, by its path, the file and a remedy; True takes the
    one before, whose training ends as it did, to the last bit, and a warning says what was passed over."""
    run, ended = two_checkpoints
    newest = damaged(run, tmp_path, name, kind)
    with pytest.raises(ValueError) as refused:
        trainer(VARIANTS[0].make(), tmp_path).train(resume_from_checkpoint=str(newest))
    said = str(refused.value)
    missing = {"model.safetensors": "no weights", "optimizer.pt": "no state of the optimizer"}
    missing["scheduler.pt"] = "no state of the scheduler"
    why = missing.get(name, f"no {name}") if kind == "missing" else f"a {name} that does not read"
    assert str(newest) in said and why in said and "give an earlier one" in said
    resumed = trainer(VARIANTS[0].make(seed=1), tmp_path, max_steps=4, optim="adamw_torch")
    with caplog.at_level("WARNING", logger="hf_gallery"):
        resumed.train(resume_from_checkpoint=True)
    assert f"{newest} is passed over" in caplog.text and why in caplog.text
    assert_same(weights(resumed.model), ended)


@pytest.mark.parametrize("kind", ["empty", "half", "zeros"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_checkpoint_whose_settings_do_not_read_is_not_whole(two_checkpoints, name, kind, tmp_path):
    """Trainer reads a model's config where it resumes."""
    newest = damaged(two_checkpoints[0], tmp_path, name, kind)
    with pytest.raises(ValueError, match=f"a {name} that does not read .*give an earlier one"):
        trainer(VARIANTS[0].make(), tmp_path).train(resume_from_checkpoint=str(newest))
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("content", ["null", "[]", "{}", '{"position": 1, "setup": 2, "config": 3, "cache": 4}'])
def test_lanes_that_say_something_else_are_not_read(two_checkpoints, content, tmp_path):
    newest = damaged(two_checkpoints[0], tmp_path, "lanes_0.json", "empty")
    (newest / "lanes_0.json").write_text(content)
    with pytest.raises(ValueError, match="lanes_0.json"):
        trainer(VARIANTS[0].make(), tmp_path).train(resume_from_checkpoint=str(newest))
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-2")


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(two_checkpoints, tmp_path):
    newest = damaged(two_checkpoints[0], tmp_path, "trainer_state.json", "missing")
    (tmp_path / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        trainer(VARIANTS[0].make(), tmp_path).train(resume_from_checkpoint=True)
    shutil.rmtree(newest)
    assert newest_whole(tmp_path) is None and newest_whole(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "settings", [{"save_only_model": True}, {"kind": Trainer}], ids=["weights alone", "Trainer's"]
)
def test_checkpoints_without_lanes_are_not_whole(settings, tmp_path):
    """With save_only_model, or by transformers' own Trainer."""
    settings = dict(settings)
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    if settings.pop("kind", None):
        rows = dataset(texts(9, 9)).add_column("labels", texts(9, 9))
        own = Trainer(VARIANTS[0].make(), arguments(tmp_path, **changes), train_dataset=rows)
    else:
        own = trainer(VARIANTS[0].make(), tmp_path, **changes, **settings)
    own.train()
    with pytest.raises(ValueError, match="no lanes_0.json; give an earlier one"):
        trainer(VARIANTS[0].make(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_is_not_whole_while_it_is_written_again(two_checkpoints, tmp_path, monkeypatch):
    """A run that went on from an earlier one is cut off at any file of the same step: the folder, which holds files of
    both runs, is passed over."""
    for name in ("_save_optimizer_and_scheduler", "_save_rng_state"):
        folder = tmp_path / name
        shutil.copytree(two_checkpoints[0], folder)
        own = trainer(
            VARIANTS[0].make(), folder, max_steps=4, save_strategy="steps", save_steps=2, optim="adamw_torch"
        )
        monkeypatch.setattr(own, name, fail)
        with pytest.raises(KeyboardInterrupt):
            own.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert newest_whole(folder) == str(folder / "checkpoint-2")


def fail(*_):
    raise KeyboardInterrupt


@pytest.mark.works("SegmentTrainer")
@causal()
def test_evaluation_is_the_mean_over_tokens(variant, tmp_path):
    """It equals one long forward over each document alone, whatever the number of lanes and the segments."""
    documents = texts(*LENGTHS, seed=3)
    model = variant.make()
    expected = mean_loss(model, documents)
    for lanes, segment_length in ((1, 4), (3, 4), (11, 4), (2, 9), (2, 40)):
        changes = {"per_device_eval_batch_size": lanes, "segment_length": segment_length}
        metrics = trainer(model, tmp_path, evaluate=documents, **changes).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["eval_bits_per_token"] == pytest.approx(expected / np.log(2), rel=1e-5)
        assert metrics["eval_tokens"] == sum(len(document) - 1 for document in documents)
        assert "eval_bits_per_byte" not in metrics


def test_bits_per_byte_where_tokens_are_bytes(tmp_path):
    """The same number as bits per token with a byte-level tokenizer, and no such number with another."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    documents = texts(9, 6, 11)
    for merges, expected in (([], True), ([("a", "b")], False)):
        words = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
        plain = Tokenizer(models.BPE(words, merges))
        plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
        own = SegmentTrainer(
            VARIANTS[0].make(),
            arguments(tmp_path),
            segment_length=4,
            eval_dataset=dataset(documents),
            processing_class=tokenizer,
        )
        metrics = own.evaluate()
        assert metrics.get("eval_bits_per_byte") == (metrics["eval_bits_per_token"] if expected else None)


def test_evaluation_on_several_sets_and_with_metrics(tmp_path):
    """Trainer's own ways go on working: a dictionary of sets, compute_metrics, predict, predict_eos."""
    first, second = texts(9, 6, 11, seed=3), texts(5, 8, seed=4)
    own = SegmentTrainer(
        VARIANTS[0].make(),
        arguments(tmp_path, per_device_eval_batch_size=2),
        segment_length=4,
        predict_eos=True,
        eval_dataset={"first": dataset(first), "second": dataset(second)},
        compute_metrics=lambda p: {"right": int((p.predictions.argmax(-1) == p.label_ids).sum())},
    )
    metrics = own.evaluate()
    assert metrics["eval_first_tokens"] == 26 and metrics["eval_second_tokens"] == 13
    output = own.predict(dataset(second))
    assert output.metrics["test_loss"] == pytest.approx(metrics["eval_second_loss"])
    assert output.metrics["test_right"] == metrics["eval_second_right"]
    assert (output.label_ids != -100).sum() == 13 and (output.label_ids == own.model.config.eos_token_id).sum() == 2


@main
def test_evaluation_leaves_training_alone(variant, tmp_path):
    """Neither its cache nor its random numbers: with dropout on, a run that evaluates after every update is the run
    that never does, to the last bit."""
    quiet = trainer(variant.make(), tmp_path / "quiet")
    quiet.args.max_steps = 8
    quiet.train()
    changes = {"max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
    watched = trainer(variant.make(), tmp_path / "watched", evaluate=texts(9, 30, 2), **changes)
    watched.train()
    assert len([entry for entry in watched.state.log_history if "eval_loss" in entry]) == 8
    assert losses(watched) == losses(quiet)
    assert_same(weights(watched.model), weights(quiet.model))


@pytest.mark.works("gradient checkpointing")
@causal()
def test_checkpointed_activations_give_the_same_training(variant, tmp_path):
    plain = trainer(variant.make(), tmp_path, max_steps=6)
    plain.train()
    saving = trainer(variant.make(), tmp_path, max_steps=6, **checkpointing())
    saving.train()
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(saving.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


@some
def test_a_loss_of_ones_own(variant, tmp_path):
    """compute_loss_func gets labels that stand under their logits, and the number of tokens of the update; label
    smoothing works. Neither is a likelihood, so no bits are reported."""

    def twice(outputs, labels, num_items_in_batch=None):
        total = F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return 2 * total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    documents, changes = texts(9, 30, 2), {"max_steps": 1, "gradient_accumulation_steps": 3}
    found = {}
    for name, more, settings in (
        ("model", {}, {}),
        ("own", {"compute_loss_func": twice}, {}),
        ("smooth", {}, {"label_smoothing_factor": 0.3}),
    ):
        own = SegmentTrainer(
            variant.make(**NO_DROPOUT),
            arguments(tmp_path, **changes, **settings),
            segment_length=4,
            train_dataset=dataset(documents),
            eval_dataset=dataset(documents),
            **more,
        )
        before = own.evaluate()
        own.train()
        found[name] = [losses(own)[0], before["eval_loss"]]
        assert ("eval_bits_per_token" in before) == (name == "model")
    assert found["own"] == pytest.approx([2 * loss for loss in found["model"]], rel=1e-5)
    assert found["smooth"] != pytest.approx(found["model"], rel=1e-3)


@causal(others_slow=True)
def test_a_stream_of_documents_does_not_grow_the_cache(variant, tmp_path):
    """Whatever the lanes read before, the cache holds no more than what its rows' own documents need."""
    documents = texts(*np.random.default_rng(0).integers(5, 14, size=60))
    bytes_held = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bytes_held.append(own._training.cache.nbytes)

    own = trainer(variant.make(), tmp_path, documents, num_train_epochs=1, callbacks=[Look()])
    own.train()
    model = variant.make().train()
    tokens = torch.zeros(2, 13 + own.segment_length, dtype=torch.long)
    assert max(bytes_held) <= model(tokens, use_cache=True).past_key_values.nbytes


def test_transformers_counts_and_batch_size_search(tmp_path):
    """Tokens without padding are counted, and a search for a batch size that fits ends with fresh lanes."""
    own = trainer(VARIANTS[0].make(), tmp_path, num_train_epochs=2, include_num_input_tokens_seen="non_padding")
    own.train()
    assert own.state.num_input_tokens_seen == 2 * sum(LENGTHS)
    # Nothing is learned, so that the updates before the search fails do not show.
    changes = {"max_steps": 6, "learning_rate": 0.0}
    fitting = trainer(VARIANTS[0].make(**NO_DROPOUT), tmp_path, **changes)
    fitting.train()
    changes |= {"per_device_train_batch_size": 3, "auto_find_batch_size": True}
    searching = trainer(VARIANTS[0].make(**NO_DROPOUT), tmp_path, callbacks=[SmallDevice(lanes=2)], **changes)
    searching.train()
    assert losses(searching) == losses(fitting)


class SmallDevice(TrainerCallback):
    """Has no memory for more lanes, and finds out late."""

    def __init__(self, lanes):
        self.lanes = lanes

    def on_step_end(self, args, state, control, **kwargs):
        if state.train_batch_size > self.lanes and state.global_step == 2:
            raise RuntimeError("CUDA out of memory.")


@pytest.mark.works("bf16")
@some
def test_bf16_on_the_processor(variant, tmp_path):
    exact = trainer(variant.make(**NO_DROPOUT), tmp_path, max_steps=5)
    exact.train()
    half = trainer(variant.make(**NO_DROPOUT), tmp_path, max_steps=5, bf16=True, save_strategy="steps", save_steps=3)
    half.train()
    assert losses(half) == pytest.approx(losses(exact), rel=0.05)
    assert losses(half) != losses(exact), "bf16 was on"
    resumed = trainer(variant.make(**NO_DROPOUT, seed=1), tmp_path, max_steps=5, bf16=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(weights(resumed.model), weights(half.model))


def test_batches_from_workers_are_the_same(tmp_path):
    changes = {"num_train_epochs": 2, "data_seed": 9}
    here = trainer(VARIANTS[0].make(), tmp_path, **changes)
    here.train()
    there = trainer(
        VARIANTS[0].make(), tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, **changes
    )
    there.train()
    assert losses(there) == losses(here)


@pytest.mark.works("Trainer")
@some
def test_transformers_own_trainer(variant, tmp_path):
    """Independent examples, padded, with accumulation: the loss is the mean over the predicted tokens of an update."""
    documents = texts(12, 7, 9, 12, 5, 12, 8, 3)
    examples = datasets.Dataset.from_list(
        [
            {
                "input_ids": document + [VOCAB - 1] * (12 - len(document)),
                "attention_mask": [1] * len(document) + [0] * (12 - len(document)),
                "labels": document + [-100] * (12 - len(document)),
            }
            for document in documents
        ]
    )
    model = variant.make(**NO_DROPOUT)
    expected = mean_loss(model, documents)
    settings = arguments(tmp_path, gradient_accumulation_steps=4, max_steps=40, learning_rate=0.02)
    own = Trainer(model, settings, train_dataset=examples, eval_dataset=examples)
    own.train()
    assert losses(own)[0] == pytest.approx(expected, rel=1e-4)
    assert losses(own)[-1] < 0.8 * losses(own)[0]
    assert own.evaluate()["eval_loss"] < losses(own)[0]


GROUPED = {"backpropagate_segments": 2, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("segment_length is None", {"segment_length": None}),
        ("segment_length is 0", {"segment_length": 0}),
        ("dataloader_drop_last is True", {"dataloader_drop_last": True}),
        ("batch_eval_metrics is True", {"batch_eval_metrics": True}),
        ("train_sampling_strategy is 'group_by_length'", {"train_sampling_strategy": "group_by_length"}),
        ("backpropagate_segments is 0; .* 1 or more", {"backpropagate_segments": 0}),
        ("backpropagate_segments is True", {"backpropagate_segments": True}),
        ("backpropagate_segments is 2 and .*_steps 3: .* a multiple of 2", GROUPED),
    ],
)
def test_arguments_without_a_meaning_here_are_refused(message, change, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer(VARIANTS[0].make(), tmp_path, **change)


def test_more_that_is_refused(tmp_path):
    with pytest.raises(ValueError, match="data_collator is given"):
        SegmentTrainer(VARIANTS[0].make(), arguments(tmp_path), segment_length=4, data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="eos_token_id is None"):
        trainer(VARIANTS[0].make(eos_token_id=None), tmp_path, predict_eos=True)
    encoder = VARIANTS[0].make("masked")
    with pytest.raises(ValueError, match="GalleryTransformerForMaskedLM, .* without reset_rows"):
        trainer(encoder, tmp_path, max_steps=1).train()


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_virtual_tokens_before_every_segment_are_refused(kind, smoothing, tmp_path):
    """A prefix would take the place of the cache, and a prompt stand before each segment in the midst of a text."""
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(VARIANTS[0].make(), getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match=f"tuned by {kind}, whose virtual tokens .* use LoRA"):
        trainer(tuned, tmp_path, label_smoothing_factor=smoothing)


def test_the_config_keeps_its_cache(tmp_path):
    """Trainer writes use_cache=False into the config, with which a loaded checkpoint would forget its past."""
    model = VARIANTS[0].make()
    trainer(model, tmp_path, max_steps=1).train()
    assert model.config.use_cache is True


def trained_and_resumed(variant, folder, lanes):
    """Trains on all processes, resumes from the middle, and returns losses, evaluation and weights of this process."""
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "max_grad_norm": 1.0}
    changes |= {"per_device_train_batch_size": lanes, "save_strategy": "steps", "save_steps": 5}
    # Without find_unused_parameters, which Trainer then switches off: a process that is dry must reach every weight.
    changes |= checkpointing(variant.name == "transformer_xl_adaptive")
    changes |= {"backpropagate_segments": 2 if variant.name in ("transformer", "block_recurrent") else 1}
    whole = trainer(variant.make(**NO_DROPOUT), folder / "whole", evaluate=texts(9, 30, 2, 4, 4), **changes)
    whole.train()
    metrics = whole.evaluate()
    resumed = trainer(variant.make(**NO_DROPOUT, seed=1), folder / "resumed", **changes)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-5"))
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))
    return {"losses": losses(whole), "eval_loss": metrics["eval_loss"], "weights": weights(whole.model)}


ONE_OF_TWO = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_training import IN_TWO, trained_and_resumed
for variant in IN_TWO:
    folder = Path(sys.argv[2]) / variant.name
    result = trained_and_resumed(variant, folder, lanes=1)
    torch.save(result, folder / f"result_{os.environ['RANK']}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.works("SegmentTrainer, 2 processes", *(variant.name for variant in IN_TWO))
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_train_as_one_with_all_lanes(tmp_path):
    """torchrun with 2 processes of 1 lane gives the losses, weights and evaluation of 1 process with 2 lanes, and
    resumes bit for bit. One process runs dry before the other."""
    script = tmp_path / "one_of_two.py"
    script.write_text(ONE_OF_TWO)
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, here, tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for variant in IN_TWO:
        folder = tmp_path / variant.name
        assert (folder / "whole" / "checkpoint-5" / "lanes_1.safetensors").is_file()
        one = trained_and_resumed(variant, folder / "one", lanes=2)
        for rank in (0, 1):
            two = torch.load(folder / f"result_{rank}.pt", weights_only=True)
            assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
            assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
            for name, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5)
