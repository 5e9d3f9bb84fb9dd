"""PEFT's prefix tuning: keys and values that are learned stand before a text's own, where a variant keeps such."""

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from test_trainer import TOKENIZER, five, make, trainer
from test_training import NO_DROPOUT, losses
from transformers import DynamicCache
from variants import assert_equal, causal, words

KINDS = ("gallery_transformer", "gallery_transformer_xl", "gallery_longformer")
with_pairs = causal(lambda v: v.config.model_type in KINDS)
without_pairs = causal(lambda v: v.config.model_type not in KINDS)
PREFIX = 3


def prefixed(model, **settings):
    """A model with a prefix that is drawn loud."""
    made = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX, **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return made.eval()


@pytest.mark.works("prefix tuning")
@pytest.mark.parametrize("gradients", [False, True], ids=["infers", "records"])
@with_pairs
def test_keys_and_values_of_tokens_are_those_tokens(variant, gradients):
    """A text after the keys and values of another is the text after the other, whichever way they came."""
    model = variant.make()
    first, ids = words(2, PREFIX), words(2, 17, seed=1)
    with torch.no_grad():
        read = model(input_ids=first, use_cache=True).past_key_values
        expected = model(input_ids=ids, past_key_values=read).logits
        read = model(input_ids=first, use_cache=True).past_key_values
    given = DynamicCache()
    for i, state in enumerate(read.states):
        given.update(state["keys"][:, :, -PREFIX:].clone(), state["values"][:, :, -PREFIX:].clone(), i)
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=ids, past_key_values=given).logits
    assert_equal(logits.detach(), expected)


@pytest.mark.works("prefix tuning")
@five
def test_a_prefix_learns_travels_and_generates(variant, tmp_path):
    if variant.config.model_type not in KINDS:
        pytest.skip("refused: a prefix is keys and values alone, and the cache of these keeps more of a token")
    base = make(variant, **NO_DROPOUT)
    base.save_pretrained(tmp_path / "base")
    model = prefixed(base)
    frozen = {name: p.detach().clone() for name, p in base.named_parameters()}
    own = trainer(model, "causal", tmp_path / "run", max_steps=12, optim="adamw_torch", learning_rate=0.1)
    own.train()
    assert losses(own)[-1] < losses(own)[0]
    assert all(torch.equal(p, frozen[name]) for name, p in base.named_parameters())
    own.save_model()
    again = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "run").eval()
    prompt = torch.tensor([TOKENIZER("the sea is wide")["input_ids"]])
    with torch.no_grad():
        assert_equal(again(input_ids=prompt).logits, model.eval()(input_ids=prompt).logits)
        ids = prompt
        for _ in range(8):
            ids = torch.cat([ids, again(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        said = again.generate(input_ids=prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)
    assert said.tolist() == ids.tolist()


@without_pairs
def test_where_there_is_more_to_keep_it_is_refused(variant):
    model = prefixed(variant.make())
    with pytest.raises(ValueError, match="keeps more of a token than its key and value: use prompt tuning"):
        model(input_ids=words(1, 5))


@with_pairs
def test_a_prefix_of_other_shapes_is_refused(variant):
    model, given = variant.make(), DynamicCache()
    given.update(torch.zeros(2, 1, PREFIX, 4), torch.zeros(2, 1, PREFIX, 4), 0)
    with pytest.raises(ValueError, match="keys and values of shape"):
        model(input_ids=words(2, 5), past_key_values=given)
    with pytest.raises(ValueError, match="give a GalleryCache"):
        model(input_ids=words(2, 5), past_key_values=DynamicCache())
