"""transformers' own Trainer and Seq2SeqTrainer on the heads of every variant, with what they are mostly used with:
bf16, checkpointed activations, accumulation, torch.compile, resuming. Data and collators are the usual ones."""

import datasets
import numpy as np
import pytest
import torch
import transformers
from renamed import checkpointing
from test_training import NO_DROPOUT, Stop, arguments, assert_same, dataset, losses, texts, weights
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForMultipleChoice,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)
from variants import COLUMNS, VARIANTS, first_marked

from hf_gallery.data import byte_tokenizer
from hf_gallery.training import SegmentTrainer

TOKENIZER = byte_tokenizer()
# As in most training: Trainer divides a loss by all labels behind a row's first column, and with padding on the left
# that counts a text's first token, which nothing predicts here.
TOKENIZER.padding_side = "right"
# One of each architecture, with all of its heads.
FIVE = [v for v in VARIANTS if v.name in COLUMNS]
five = pytest.mark.parametrize("variant", FIVE, ids=[variant.name for variant in FIVE])
TRAINED = ("causal", "masked", "sequence", "tokens", "question", "choice")
HEADS = [(v, head) for v in FIVE for head in TRAINED if head in v.heads]
# The default run takes the causal ones; the others take the same ways, each with a loss of its own.
heads = pytest.mark.parametrize(
    ("variant", "head"),
    [
        pytest.param(v, head, id=f"{v.name}-{head}", marks=[] if head == "causal" else pytest.mark.slow)
        for v, head in HEADS
    ],
)


def make(variant, head="causal", **settings):
    """The variant with a byte tokenizer's vocabulary."""
    special = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("pad", "bos", "eos", "sep")}
    return variant.make(head, vocab_size=len(TOKENIZER), **special, **settings)


def examples(head, count=8):
    """Short texts, tokenised. A classifier's are labelled by what they speak of, its tokens by what they are; of a
    masked model's, every third token is to be found; a question is answered by the text's last word, or by one of two
    texts."""
    rows = []
    for i in range(count):
        ids = TOKENIZER(f"{'the sea is wide' if i % 2 else 'a hill'}, {'and so on ' * (i % 4)}end")["input_ids"]
        if head == "sequence":
            rows.append({"input_ids": ids, "labels": i % 2})
        elif head == "masked":
            hidden = [t % 3 == 1 for t in range(len(ids))]
            masked = [TOKENIZER.mask_token_id if h else token for h, token in zip(hidden, ids, strict=True)]
            labels = [token if h else -100 for h, token in zip(hidden, ids, strict=True)]
            rows.append({"input_ids": masked, "labels": labels})
        elif head == "tokens":
            rows.append({"input_ids": ids, "labels": [-100 if chr(t) == "," else t % 4 for t in ids]})
        elif head == "question":
            asked = [*TOKENIZER("how?")["input_ids"], TOKENIZER.sep_token_id, *ids]
            rows.append({"input_ids": asked, "start_positions": len(asked) - 3, "end_positions": len(asked) - 1})
        elif head == "choice":
            asked, other = ([*TOKENIZER(x)["input_ids"], TOKENIZER.sep_token_id] for x in ("how?", "so it is"))
            texts = (ids, other) if i % 2 else (other, ids)
            rows.append({"input_ids": [asked + text for text in texts], "labels": 1 - i % 2})
        else:
            rows.append({"input_ids": ids})
    return datasets.Dataset.from_list(rows)


COLLATORS = {
    "causal": DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
    "masked": DataCollatorForTokenClassification(TOKENIZER),  # pads labels that stand under their tokens
    "sequence": DataCollatorWithPadding(TOKENIZER),
    "tokens": DataCollatorForTokenClassification(TOKENIZER),
    "question": DataCollatorWithPadding(TOKENIZER),
    "choice": DataCollatorForMultipleChoice(TOKENIZER),
}


def trainer(model, head, folder, callbacks=None, **changes):
    settings = arguments(folder, **{"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.02} | changes)
    return Trainer(
        model,
        settings,
        data_collator=COLLATORS[head],
        train_dataset=examples(head),
        eval_dataset=examples(head),
        processing_class=TOKENIZER,
        callbacks=callbacks,
    )


@pytest.mark.works("Trainer")
@heads
def test_training_lowers_the_loss_and_what_is_saved_is_what_was_trained(variant, head, tmp_path):
    own = trainer(make(variant, head), head, tmp_path, max_steps=20, optim="adamw_torch", learning_rate=0.01)
    before = own.evaluate()["eval_loss"]
    own.train()
    after = own.evaluate()["eval_loss"]
    assert after < 0.8 * before
    own.save_model()
    auto = getattr(transformers, variant.heads[head].auto)
    loaded = trainer(auto.from_pretrained(tmp_path, trust_remote_code=True), head, tmp_path)
    expected = own.predict(examples(head)).predictions
    np.testing.assert_allclose(loaded.predict(examples(head)).predictions, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.works("Trainer")
@pytest.mark.parametrize("variant", [v for v in FIVE if "masked" in v.heads], ids=lambda v: v.name)
def test_masks_may_be_drawn_anew_for_every_batch(variant, tmp_path):
    own = trainer(make(variant, "masked"), "masked", tmp_path, max_steps=24)
    own.train_dataset = examples("causal")
    own.data_collator = DataCollatorForLanguageModeling(TOKENIZER, mlm=True, mlm_probability=0.3)
    own.train()
    assert sum(losses(own)[-6:]) < 0.95 * sum(losses(own)[:6])


@pytest.mark.slow  # SegmentTrainer's, which is Trainer in this, runs by default
@pytest.mark.works("bf16")
@heads
def test_bf16(variant, head, tmp_path):
    exact, half = (trainer(make(variant, head, **NO_DROPOUT), head, tmp_path, bf16=bf16) for bf16 in (False, True))
    for own in (exact, half):
        own.train()
    assert losses(half) == pytest.approx(losses(exact), rel=0.05)
    assert losses(half) != losses(exact), "bf16 was on"
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.float32}


@pytest.mark.slow  # SegmentTrainer's, which is Trainer in this, runs by default
@pytest.mark.works("gradient checkpointing")
@heads
def test_checkpointed_activations_give_the_same_training(variant, head, tmp_path):
    """With dropout, which falls on the same places when a layer is computed again."""
    trained, counts = [], []
    for options in ({}, checkpointing()):
        own = trainer(make(variant, head), head, tmp_path, **options)  # it sets the seed, so one after the other
        layer = next(module for name, module in own.model.named_modules() if name.endswith("layers.0"))
        runs: list[int] = []
        layer.feed_forward.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        own.train()
        trained.append(own)
        counts.append(len(runs))
    plain, saving = trained
    assert counts[1] == 2 * counts[0], "each layer runs again in the backward"
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-5)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(saving.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.works("gradient accumulation")
@heads
def test_accumulated_batches_are_one_large_batch(variant, head, tmp_path):
    """Also where they differ in length and so in predicted tokens."""
    whole = trainer(make(variant, head, **NO_DROPOUT), head, tmp_path, per_device_train_batch_size=8)
    whole.train()
    changes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = trainer(make(variant, head, **NO_DROPOUT), head, tmp_path, **changes)
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(parts.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
def test_accumulation_is_right_for_every_kind_of_label(problem, tmp_path):
    """Of the losses that transformers has for labels of a row, only one of classes knows of accumulation."""
    texts_only = examples("sequence").remove_columns("labels")
    count = 1 if problem == "regression" else 3
    labels = torch.rand(8, count, generator=torch.Generator().manual_seed(0)).round(decimals=2)
    if problem == "regression":
        labels = labels[:, 0]
    elif problem == "single_label_classification":
        labels = labels.argmax(1)
    rows = texts_only.add_column("labels", labels.tolist())
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = make(FIVE[0], "sequence", num_labels=count, problem_type=problem, **NO_DROPOUT)
        own = trainer(
            model,
            "sequence",
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        own.train_dataset = rows
        own.train()
        found.append((losses(own), weights(own.model)))
    (whole, expected), (parts, got) = found
    assert parts == pytest.approx(whole, rel=1e-4)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.works("resume")
@heads
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(variant, head, tmp_path):
    changes = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0, "max_steps": 5}
    whole = trainer(make(variant, head), head, tmp_path / "whole", **changes)
    whole.train()
    saving = {**changes, "save_strategy": "steps", "save_steps": 3}
    cut = trainer(make(variant, head), head, tmp_path / "cut", callbacks=[Stop(3)], **saving)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    # Other weights, which the checkpoint's must replace.
    resumed = trainer(make(variant, head, seed=1), head, tmp_path / "cut", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert_same(weights(resumed.model), weights(whole.model))


OPTIONS = {
    "adafactor": {"optim": "adafactor"},
    "noisy embeddings": {"neftune_noise_alpha": 5.0},
    "batches of like length": {"train_sampling_strategy": "group_by_length"},
    "a batch size that fits": {"auto_find_batch_size": True},
    "bf16 throughout evaluation": {"bf16": True, "bf16_full_eval": True},
    "means by process": {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2},
}


@pytest.mark.slow
@pytest.mark.works("Trainer")
@pytest.mark.parametrize("option", OPTIONS)
@five
def test_options_of_the_trainer(variant, option, tmp_path):
    """A training with each lowers the loss, and is evaluated by what the model predicts; noise stays in training."""
    changes = {"optim": "adamw_torch", "learning_rate": 0.01, "max_steps": 12} | OPTIONS[option]
    own = trainer(make(variant), "causal", tmp_path, **changes)
    own.compute_metrics = lambda found: {"columns": found.predictions.shape[1]}
    before = own.evaluate()
    own.train()
    after = own.evaluate()
    assert after["eval_loss"] < 0.9 * before["eval_loss"] and after["eval_columns"] == before["eval_columns"]
    assert own.evaluate()["eval_loss"] == after["eval_loss"]


# ---- torch.compile


@pytest.mark.slow
@pytest.mark.works("torch.compile")
@five
def test_a_compiled_model_trains_alike(variant, tmp_path):
    torch.compiler.reset()
    changes = {"max_steps": 2, "per_device_train_batch_size": 8}  # one batch of one shape: compiled once
    plain, compiled = (
        trainer(make(variant, **NO_DROPOUT), "causal", tmp_path, torch_compile=on, **changes) for on in (False, True)
    )
    for own in (plain, compiled):
        own.train()
    assert compiled.model._compiled_call_impl is not None or hasattr(compiled.model_wrapped, "_orig_mod")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(compiled.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.works("torch.compile")
@five
def test_a_compiled_model_carries_its_cache_alike(variant, tmp_path):
    """The cache grows from step to step, so each is traced anew; without inductor's kernels, which the test above has,
    that takes seconds."""
    torch.compiler.reset()
    plain, compiled = (
        SegmentTrainer(
            variant.make(**NO_DROPOUT),
            arguments(tmp_path, max_steps=3, torch_compile=on, torch_compile_backend="aot_eager" if on else None),
            segment_length=4,
            train_dataset=dataset(texts(9, 12, 7)),
        )
        for on in (False, True)
    )
    for own in (plain, compiled):
        own.train()
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


# ---- Seq2SeqTrainer


@pytest.mark.works("Seq2SeqTrainer")
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, id=v.name, marks=[pytest.mark.slow] * (v.name == "longformer_led"))
        for v in VARIANTS
        if v.name in ("transformer", "longformer_led")
    ],
)
def test_seq2seq_trainer_is_measured_by_what_it_generates(variant, bf16, tmp_path):
    """Trained to say a source again, it gets more of them right; each prediction is what the source gives alone. Where
    the source may have global tokens, its first is one."""
    sources = [TOKENIZER(text)["input_ids"] for text in ("abc", "bcab", "ca", "cbacb", "ab", "bbca")]
    rows = datasets.Dataset.from_list([{"input_ids": s, "labels": [*s, TOKENIZER.eos_token_id]} for s in sources])

    def right(result):
        texts = TOKENIZER.batch_decode(
            np.where(result.predictions < 0, 0, result.predictions), skip_special_tokens=True
        )
        return {"right": sum(a == TOKENIZER.decode(b) for a, b in zip(texts, sources, strict=True))}

    collate = DataCollatorForSeq2Seq(TOKENIZER)

    def collated(rows):
        batch = collate(rows)
        return {**batch, **marks(batch["input_ids"])}

    def marks(source):
        return dict(global_attention_mask=first_marked(source)) if variant.heads["seq2seq"].marks else {}

    model = make(variant, "seq2seq", decoder_start_token_id=TOKENIZER.bos_token_id, **NO_DROPOUT)
    own = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            str(tmp_path),
            max_steps=100,
            learning_rate=5e-3,
            per_device_train_batch_size=6,
            predict_with_generate=True,
            generation_max_length=8,
            bf16=bf16,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
        data_collator=collated,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=TOKENIZER,
        compute_metrics=right,
    )
    before = own.evaluate()
    own.train()
    after = own.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert before["eval_right"] == 0 and after["eval_right"] >= 4
    if not bf16:
        for source, predicted in zip(sources, own.predict(rows).predictions, strict=True):
            source = torch.tensor([source])
            alone = model.generate(source, max_length=8, **marks(source))[0].tolist()
            assert predicted[: len(alone)].tolist() == alone


@pytest.mark.works("Trainer, padding-free")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "told_by",
    ["position_ids", *(pytest.param(x, marks=pytest.mark.slow) for x in ("flash attention's arguments", "seq_idx"))],
)
@five
def test_flattened_batches_train_as_padded_ones(variant, told_by, smoothing, tmp_path):
    """DataCollatorWithFlattening lays a batch into one row without padding: the weights become what they become from
    the same batch, padded."""
    flatten = DataCollatorWithFlattening(
        return_position_ids=told_by == "position_ids",
        return_flash_attn_kwargs=told_by == "flash attention's arguments",
        return_seq_idx=told_by == "seq_idx",
    )
    trained = []
    for collator in (COLLATORS["causal"], flatten):
        changes = dict(max_steps=3, gradient_accumulation_steps=2, label_smoothing_factor=smoothing, lr=0.01)
        own = trainer(
            make(variant, **NO_DROPOUT), "causal", tmp_path, **{"learning_rate": changes.pop("lr")} | changes
        )
        own.data_collator = collator
        own.train()
        trained.append((losses(own), weights(own.model)))
    assert trained[0][0] == pytest.approx(trained[1][0], rel=1e-3)
    for name, value in trained[0][1].items():
        torch.testing.assert_close(
            trained[1][1][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
