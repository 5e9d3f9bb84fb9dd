"""TRL's SFTTrainer on every variant's causal model."""

import datasets
import pytest
import torch
from peft import LoraConfig
from test_trainer import five, make
from test_training import losses, weights
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
from variants import assert_equal

from hf_gallery.data import byte_tokenizer

TEXTS = ["the sea is wide", "a hill", "the sea is wide, and so on", "a hill, and so on and so on"]
ROWS = {
    "text": [{"text": text} for text in TEXTS],
    "prompt and completion": [{"prompt": f"{text} ", "completion": "indeed"} for text in TEXTS],
}


def settings(folder, **changes):
    plain = {"max_steps": 12, "learning_rate": 0.01, "per_device_train_batch_size": 2, "max_length": 48}
    quiet = {"logging_steps": 1, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return SFTConfig(str(folder), **plain, **quiet, **{"bf16": False, "gradient_checkpointing": False} | changes)


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
