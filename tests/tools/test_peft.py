"""LoRA by PEFT (Hu et al. 2021) on every variant: train, save, load, merge, generate."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model
from renamed import checkpointing
from test_trainer import COLLATORS, HEADS, TOKENIZER, examples, five, make, trainer
from test_training import losses
from variants import assert_equal, result_of

SETTINGS = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.1}
# The maps of attention that all variants have; "all-linear" is PEFT's own word for every map but the head's.
TARGETS = [pytest.param(["q_proj", "v_proj"], id="q-v", marks=pytest.mark.slow), "all-linear"]


def logits(model, head):
    batch = TOKENIZER.pad(examples(head).remove_columns([] if head == "causal" else "labels")[:3], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.works("PEFT LoRA")
@pytest.mark.parametrize("targets", TARGETS)
@five
def test_lora_trains_travels_and_merges(variant, targets, tmp_path):
    """Only the adapter learns; it loads on the saved base by itself, and merged into the base it gives the same."""
    base = make(variant)
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    untouched = logits(base, "causal")
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=targets, **SETTINGS))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    changes = {"max_steps": 8, "optim": "adamw_torch", "learning_rate": 0.01}
    own = trainer(model, "causal", tmp_path / "run", **checkpointing(targets == "all-linear"), **changes)
    own.train()
    assert losses(own)[-1] < losses(own)[0]
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    trained = logits(model, "causal")
    assert not torch.allclose(trained, untouched, atol=1e-2)
    with model.disable_adapter():
        assert_equal(logits(model, "causal"), untouched)

    own.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists(), "only the adapter is saved"
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True)
    again = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "run")
    for loaded in (alone, again):
        assert_equal(logits(loaded, "causal"), trained)
    prompt = torch.tensor([TOKENIZER("the sea is wide")["input_ids"]])
    generated = again.eval().generate(input_ids=prompt, max_new_tokens=12, do_sample=False)

    merged = again.merge_and_unload()
    assert type(merged) is type(base)
    assert_equal(logits(merged, "causal"), trained)
    assert merged.generate(prompt, max_new_tokens=12, do_sample=False).tolist() == generated.tolist()
    merged.save_pretrained(tmp_path / "merged")
    assert_equal(logits(type(base).from_pretrained(tmp_path / "merged"), "causal"), trained)


# PEFT's kind of task, and the map that it trains whole and saves with the adapter; it has no kind for choices.
TASKS = {
    "sequence": (TaskType.SEQ_CLS, "classifier"),
    "tokens": (TaskType.TOKEN_CLS, "classifier"),
    "question": (TaskType.QUESTION_ANS, "qa_outputs"),
    "choice": (None, "score"),
}
TRIED = ("transformer-tokens", "longformer-question", "transformer-choice")  # by default


def results(model, head):
    with torch.no_grad():
        return result_of(model.eval()(**COLLATORS[head](list(examples(head).select(range(3))))))


@pytest.mark.works("PEFT LoRA")
@pytest.mark.parametrize(
    ("variant", "head"),
    [
        pytest.param(v, head, id=f"{v.name}-{head}", marks=[] if f"{v.name}-{head}" in TRIED else pytest.mark.slow)
        for v, head in HEADS
        if head in TASKS
    ],
)
def test_lora_on_a_head(variant, head, tmp_path):
    """The head is new: it is trained whole and saved with the adapter."""
    make(variant, head).save_pretrained(tmp_path / "base")
    kind, (task, new) = variant.heads[head].kind, TASKS[head]
    whole = {} if task is not None else {"modules_to_save": [new]}
    config = LoraConfig(task_type=task, target_modules=["q_proj", "v_proj"], **SETTINGS, **whole)
    model = get_peft_model(kind.from_pretrained(tmp_path / "base"), config)
    before = getattr(model.base_model.model, new).weight.detach().clone()
    own = trainer(model, head, tmp_path / "run", max_steps=4, optim="adamw_torch", learning_rate=0.01)
    own.train()
    assert not torch.equal(getattr(model.base_model.model, new).weight, before)
    trained = results(model, head)
    own.save_model()
    again = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "run")
    assert_equal(results(again, head), trained)
    assert_equal(results(again.merge_and_unload(), head), trained)
