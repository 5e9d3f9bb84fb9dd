"""Maps in eight bits, by torchao and by bitsandbytes: close to the model they are made of, and generating."""

import warnings

import pytest
import torch
from test_trainer import five
from transformers import BitsAndBytesConfig, TorchAoConfig
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
