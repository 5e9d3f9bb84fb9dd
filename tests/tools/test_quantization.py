"""Maps in eight bits, by torchao and by bitsandbytes: close to the model they are made of, and generating."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from test_trainer import five
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from variants import runner, words


@pytest.fixture(params=["torchao", "bitsandbytes"])
def settings(request):
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    if request.param == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.mark.works("quantization")
@five
def test_eight_bits_say_nearly_the_same(variant, settings, tmp_path):
    run = runner(variant, "causal", hidden_size=32, num_attention_heads=4, intermediate_size=64)
    ids = words(2, 23)
    with torch.no_grad():
        expected = run.model(ids).logits
    run.model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own
        small = type(run.model).from_pretrained(tmp_path, quantization_config=settings, device_map="cpu").eval()
    kinds = [f"{type(m).__name__} {type(getattr(m, 'weight', None)).__name__}" for m in small.modules()]
    assert sum("8bit" in kind or "Int8" in kind for kind in kinds) >= 6 * small.config.num_hidden_layers
    with torch.no_grad():
        got = small(ids).logits
    assert 0 < (got - expected).abs().max() and (got - expected).std() < 0.05 * expected.std()
    generated = small.generate(ids, max_new_tokens=4, do_sample=False)
    again = small.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert generated.shape == (2, 27) and generated.tolist() == again.tolist()


@pytest.mark.works("quantization")
@five
def test_lora_learns_beside_eight_bits_and_what_is_saved_opens_alike(variant, settings, tmp_path):
    """Every map of the adapter gets a gradient, with checkpointed activations as prepare_model_for_kbit_training sets
    them; the small model itself is saved and opened without its settings."""
    run = runner(variant, "causal", hidden_size=32, num_attention_heads=4, intermediate_size=64)
    ids = words(2, 23)
    run.model.save_pretrained(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their own
        small = (
            type(run.model).from_pretrained(tmp_path / "whole", quantization_config=settings, device_map="cpu").eval()
        )
        with torch.no_grad():
            expected = small(ids).logits
        small.save_pretrained(tmp_path / "small")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
        prepared = prepare_model_for_kbit_training(small, use_gradient_checkpointing=True)
        adapted = get_peft_model(prepared, LoraConfig(r=2, target_modules="all-linear")).train()
        adapted(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name and p.grad is not None for name, p in learning.items())
    assert any(bool(p.grad.any()) for p in learning.values())
