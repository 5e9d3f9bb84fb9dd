"""TRL's trainers on every variant's causal model."""

import copy
import math

import datasets
import pytest
import torch
from peft import LoraConfig
from test_trainer import five, make
from test_training import losses, weights
from transformers import AutoModelForCausalLM
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.trainer.utils import disable_dropout_in_model
from variants import VARIANTS, assert_equal, over, runner, words

from hf_gallery.data import byte_tokenizer

TEXTS = ["the sea is wide", "a hill", "the sea is wide, and so on", "a hill, and so on and so on"]
ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt and completion": [{"prompt": f"{text} ", "completion": "indeed"} for text in TEXTS],
}

QUIET = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}


def settings(folder, **changes):
    plain = {"max_steps": 12, "learning_rate": 0.01, "per_device_train_batch_size": 2, "max_length": 48}
    plain = {name: value for name, value in plain.items() if name not in changes}
    return SFTConfig(str(folder), **plain, **QUIET, **{"bf16": False, "gradient_checkpointing": False} | changes)


@pytest.mark.works("TRL SFTTrainer")
@pytest.mark.parametrize("kind", ["text", pytest.param("prompt and completion", marks=pytest.mark.slow)])
@five
def test_supervised_fine_tuning(variant, kind, tmp_path):
    own = SFTTrainer(
        make(variant),
        settings(tmp_path),
        train_dataset=datasets.Dataset.from_list(ROWS[kind]),
        processing_class=byte_tokenizer(),
    )
    own.train()
    assert losses(own)[-1] < 0.8 * losses(own)[0]
    own.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = torch.tensor([list(b"the sea")])
    with torch.no_grad():
        assert_equal(loaded(ids).logits, own.model.eval()(ids).logits)


@pytest.mark.works("TRL SFTTrainer")
@five
def test_with_its_own_defaults_and_lora(variant, tmp_path):
    """bf16 and checkpointed activations, which it switches on by itself; only the adapter learns."""
    own = SFTTrainer(
        make(variant),
        settings(tmp_path, bf16=True, gradient_checkpointing=True),
        train_dataset=datasets.Dataset.from_list(ROWS["text"]),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    frozen = {name: p.detach().clone() for name, p in own.model.named_parameters() if not p.requires_grad}
    own.train()
    assert losses(own)[-1] < losses(own)[0]
    after = weights(own.model)
    assert frozen and all(torch.equal(after[name], value) for name, value in frozen.items())


@over()
def test_dropout_that_tools_switch_off_is_off(variant, head):
    """TRL goes over the modules that are nn.Dropout and sets their p to 0: then nothing else may draw."""
    run = runner(variant, head, hidden_dropout=0.3, attention_dropout=0.3)
    inputs = run.inputs(words(2, 23))
    again = [run.model.train()(**inputs)[0] for _ in range(2)]
    assert not torch.equal(*again)
    disable_dropout_in_model(run.model)
    dropped = run.model.train()(**inputs)[0]
    assert torch.equal(dropped, run.model(**inputs)[0])
    assert_equal(dropped, run.model.eval()(**inputs)[0])


@over()
def test_each_dropout_of_attention_is_read_when_it_is_used(variant, head):
    """A rate that is set on the modules alone is what a model is built with."""
    built, told = (runner(variant, head, hidden_dropout=0.0, attention_dropout=rate) for rate in (0.4, 0.0))
    for module in told.model.modules():
        if type(module).__name__ == "AttentionDropout":
            module.p = 0.4
    inputs, results = built.inputs(words(2, 23)), []
    for run in (built, told):
        torch.manual_seed(3)
        results.append(run.model.train()(**inputs)[0])
    assert torch.equal(*results) and not torch.allclose(results[0], built.model.eval()(**inputs)[0], atol=1e-3)


PREFERENCES = [{"prompt": f"{text} ", "chosen": "indeed", "rejected": "no, not so"} for text in TEXTS]


@pytest.mark.works("TRL DPOTrainer")
@five
def test_a_policy_that_is_its_reference_prefers_nothing(variant, tmp_path):
    """The first loss is ln 2, since margins are 0; then the chosen answers become likelier than the rejected."""
    model = make(variant)
    own = DPOTrainer(
        model,
        copy.deepcopy(model),
        DPOConfig(
            str(tmp_path), max_steps=8, learning_rate=0.003, max_length=48, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=4, **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    assert model.config.attention_dropout > 0 and model.config.hidden_dropout > 0
    own.train()
    assert abs(losses(own)[0] - math.log(2)) < 1e-4
    assert losses(own)[-1] < 0.8 * math.log(2)


def supervised(model, folder):
    rows = datasets.Dataset.from_list(ROWS["text"])
    return SFTTrainer(model, settings(folder), train_dataset=rows, processing_class=byte_tokenizer())


def test_an_adaptive_softmax_of_one_cluster_trains_as_the_linear_map_that_it_is(tmp_path):
    """TRL multiplies by lm_head.weight itself. With projections that is the product of two maps."""
    variant = next(v for v in VARIANTS if v.name == "transformer_xl")
    model = make(variant, embedding_size=12)
    ids = torch.tensor([list(b"the sea is wide")])
    head, hidden = model.lm_head, model.model(ids).last_hidden_state
    assert_equal((hidden @ head.weight.T + head.bias).log_softmax(-1), model(ids).logits)
    own = supervised(model, tmp_path)
    own.train()
    assert losses(own)[-1] < 0.9 * losses(own)[0]


def test_an_adaptive_softmax_with_clusters_says_why_it_cannot_be_trained(tmp_path):
    variant = next(v for v in VARIANTS if v.name == "transformer_xl_adaptive")
    own = supervised(make(variant), tmp_path)
    with pytest.raises(AttributeError, match="clusters that end at .* has no one weight.*TRL.*SegmentTrainer"):
        own.train()
    assert not hasattr(own.model.lm_head, "weight")


@pytest.mark.works("TRL packing")
@pytest.mark.parametrize(
    "how",
    [{"packing": True, "max_length": 96}, {"padding_free": True, "max_length": None}],
    ids=["packed", "padding-free"],
)
@five
def test_packed_fine_tuning(variant, how, tmp_path, caplog):
    """TRL packs documents into rows by default once packing is asked for, and lays rows into one; its first loss is
    that of the documents alone."""
    own = SFTTrainer(
        make(variant, hidden_dropout=0.0, attention_dropout=0.0),
        settings(tmp_path, per_device_train_batch_size=4, **how),
        train_dataset=datasets.Dataset.from_list(ROWS["text"]),
        processing_class=byte_tokenizer(),
    )
    batch = next(iter(own.get_train_dataloader()))
    assert int((batch["position_ids"] == 0).sum()) == len(TEXTS) and "attention_mask" not in batch
    model, total, count = own.model.eval(), 0.0, 0
    for text in batch["input_ids"][0].split(batch["cu_seq_lens_q"].diff().tolist()):
        with torch.no_grad():
            total += float(model(text[None], labels=text[None]).loss) * (len(text) - 1)
        count += len(text) - 1
    own.train()
    assert losses(own)[0] == pytest.approx(total / count, rel=1e-3)  # logged to few places
    assert losses(own)[-1] < 0.8 * losses(own)[0]
    assert "attn_implementation" not in caplog.text and "flash" not in caplog.text.lower()


@pytest.mark.works("TRL SFTTrainer")
@five
def test_its_loss_is_the_models_own(variant, tmp_path):
    """It scores hidden states by the head's weight and bias itself; that of the logits is the same."""
    model = make(variant)
    own = SFTTrainer(
        model,
        settings(tmp_path),
        train_dataset=datasets.Dataset.from_list(ROWS["text"]),
        processing_class=byte_tokenizer(),
    )
    model.eval()
    batch = next(iter(own.get_train_dataloader()))
    with torch.no_grad():
        found = own.compute_loss(model, dict(batch))
        torch.testing.assert_close(found, model(**batch).loss, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.works("TRL RewardTrainer")
@five
def test_a_reward_model_prefers_what_was_chosen(variant, tmp_path):
    """A classifier of one label; the first loss of even rewards is ln 2."""
    model = make(variant, "sequence", num_labels=1)
    torch.nn.init.zeros_(model.classifier.weight)
    own = RewardTrainer(
        model,
        RewardConfig(
            str(tmp_path), max_steps=12, learning_rate=0.01, max_length=48, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=4, **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    own.train()
    assert losses(own)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(own)[-1] < 0.9 * math.log(2)


@pytest.mark.slow
@pytest.mark.works("TRL KTOTrainer")
@five
def test_kto_begins_where_its_reference_stands(variant, tmp_path):
    """A policy that is its reference has no margin: each answer's loss is a half."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(PREFERENCES)
    ]
    model = make(variant)
    own = KTOTrainer(
        model,
        copy.deepcopy(model),
        args=KTOConfig(
            str(tmp_path), max_steps=6, learning_rate=0.003, max_length=48, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=4, **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    own.train()
    assert losses(own)[0] == pytest.approx(0.5, abs=1e-4) and losses(own)[-1] < 0.45


@pytest.mark.slow
@pytest.mark.works("TRL GRPOTrainer")
@five
def test_grpo_learns_what_is_rewarded(variant, tmp_path):
    """Paid for one letter, the policy writes more of it."""
    own = GRPOTrainer(
        make(variant, hidden_dropout=0.0, attention_dropout=0.0),
        reward_funcs=lambda completions, **_: [float(sum(c in "etaoin" for c in text)) for text in completions],
        args=GRPOConfig(
            str(tmp_path), max_steps=20, learning_rate=0.02, bf16=False, gradient_checkpointing=False, seed=0,
            per_device_train_batch_size=16, num_generations=16, max_completion_length=8, **QUIET,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in TEXTS]),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    own.train()
    rewards = [entry["reward"] for entry in own.state.log_history if "reward" in entry]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
