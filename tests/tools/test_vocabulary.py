"""Vocabularies of any size: configurations, tables that grow and shrink, virtual tokens that are learned."""

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from test_trainer import FIVE
from transformers import AutoConfig
from variants import COLUMNS, PAD, VOCAB, assert_equal, causal, over, runner, tolerance, words

CONFIGS = pytest.mark.parametrize("kind", [v.config for v in FIVE], ids=[v.name for v in FIVE])
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


def special(config):
    return {name: getattr(config, name) for name in SPECIAL if hasattr(config, name)}


@CONFIGS
def test_special_ids_are_the_byte_tokenizers_with_its_vocabulary_only(kind, tmp_path):
    own = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    own |= {"sep_token_id": 260, "decoder_start_token_id": 257}
    config = kind()
    assert config.vocab_size == 262
    assert special(config) == {name: own[name] for name in special(config)}
    assert {type(value) for value in special(config).values()} == {int}
    for size in (100, 50257):
        config = kind(vocab_size=size)
        assert set(special(config).values()) == {None}
        config.save_pretrained(tmp_path)
        assert special(AutoConfig.from_pretrained(tmp_path)) == special(config)
    assert set(special(kind(pad_token_id=None, bos_token_id=None, eos_token_id=None)).values()) <= {None, 260}
    assert kind(vocab_size=100, pad_token_id=7).pad_token_id == 7
    with pytest.raises(ValueError, match="pad_token_id is 256, outside the vocabulary of vocab_size 100"):
        kind(vocab_size=100, pad_token_id=256)


@over(lambda variant, head: variant.name in COLUMNS)
@pytest.mark.parametrize("name", ["pad_token_id", "decoder_start_token_id"])
def test_a_model_is_built_with_ids_of_its_vocabulary(variant, head, name, tmp_path):
    """A vocabulary that is set on a finished config, as from_pretrained(vocab_size=...) does, must hold the ids too:
    the model would save and not load again."""
    config = variant.make_config(head)
    if getattr(config, name, None) is None:
        return
    config.save_pretrained(tmp_path)
    kind = variant.heads[head].kind
    config.vocab_size = 50
    late = type(config).from_pretrained(tmp_path, vocab_size=50)
    for wrong in (config, late):
        for other in SPECIAL:
            if other != name and hasattr(wrong, other):
                setattr(wrong, other, 1)
        with pytest.raises(ValueError, match=f"{name} is 9., outside the vocabulary of vocab_size 50"):
            kind(wrong)
        setattr(wrong, name, 1)
        assert kind(wrong).config.vocab_size == 50


@CONFIGS
def test_a_saved_configuration_keeps_the_ids_that_it_states(kind, tmp_path):
    """None with the byte tokenizer's vocabulary, and its numbers with a larger one, as earlier versions had them."""
    for settings in ({"pad_token_id": None}, {"vocab_size": 1000, "pad_token_id": 256, "bos_token_id": 257}):
        kind(**settings).save_pretrained(tmp_path)
        again = AutoConfig.from_pretrained(tmp_path)
        assert settings.items() <= again.to_dict().items()


def resized(run, size, **options):
    """The model's outputs over the words that stay, before and after."""
    inputs = run.inputs(words(2, 17) % 50)
    with torch.no_grad():
        before = run.model(**inputs)
        run.model.resize_token_embeddings(size, **options)
        return before, run.model(**inputs)


@over()
@pytest.mark.parametrize("size", [VOCAB + 1, VOCAB + 40])
def test_a_vocabulary_grows(variant, head, size, tmp_path):
    """Old words keep their logits; new ones are read, scored, saved and loaded."""
    run = runner(variant, head)
    if variant.name == "transformer" and head == "seq2seq":
        run = runner(variant, head, final_logits_bias=True)
    before, after = resized(run, size)
    assert run.model.config.vocab_size == size
    old, new = (x.get("logits", x.get("last_hidden_state", x.get("start_logits"))) for x in (before, after))
    if run.model.get_output_embeddings() is None:
        assert_equal(new, old)
    else:
        assert new.shape[-1] == size
        # Probabilities are shared with the new words, so only the differences among the old ones stay.
        kept = slice(0, 41) if variant.settings.get("cutoffs") else slice(0, VOCAB)
        assert_equal(*(x[..., kept] - x[..., :1] for x in (new, old)))
    ids = torch.full((2, 5), size - 1)
    run.model.save_pretrained(tmp_path)
    again = runner(variant, head)
    again.model = type(run.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_equal(again(ids)[0], run(ids)[0])


@over()
def test_a_vocabulary_shrinks(variant, head, tmp_path):
    size = 60
    small = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 4, "decoder_start_token_id": 2}
    run = runner(variant, head, **{k: x for k, x in small.items() if hasattr(variant.make_config(head), k)})
    ids = words(2, 17) % 50
    if run.head.question:
        ids[:, 3] = 4
    inputs = dict(input_ids=ids) | ({"decoder_input_ids": ids} if run.head.source else {})
    run.model.resize_token_embeddings(size)
    run.model.save_pretrained(tmp_path)
    again = type(run.model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got, expected = again(**inputs), run.model(**inputs)
    assert_equal(got[0], expected[0])
    if run.model.get_output_embeddings() is not None:
        assert got.logits.shape[-1] == size
        if variant.settings.get("cutoffs"):
            assert_equal(got.logits.exp().sum(-1), torch.ones(2, 17))
    with pytest.raises(ValueError, match="outside the vocabulary of vocab_size 60"):
        run.model(**inputs | {"input_ids": ids + 40})


@over()
def test_a_special_id_must_stay_in_the_vocabulary(variant, head):
    model = variant.make(head)
    with pytest.raises(ValueError, match=rf"the new vocabulary has {PAD} tokens and config.pad_token_id is {PAD}"):
        model.resize_token_embeddings(PAD)
    assert model.get_input_embeddings().weight.shape[0] == VOCAB == model.config.vocab_size
    for wrong in (dict(new_num_tokens=0), dict(pad_to_multiple_of=1.3)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .* whole number"):
            model.resize_token_embeddings(**wrong)
    model.resize_token_embeddings(PAD, pad_to_multiple_of=64)
    assert model.config.vocab_size == 128


@causal(lambda variant: variant.settings.get("cutoffs"))
def test_the_last_cluster_keeps_a_word(variant):
    ids = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    with pytest.raises(ValueError, match="the new vocabulary has 41 tokens, and the last cluster begins at 41"):
        variant.make("causal", **ids).resize_token_embeddings(41)


PROMPTS = {
    "prompt tuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
}


@pytest.mark.works("prompt tuning")
@pytest.mark.parametrize("kind", list(PROMPTS))
@causal()
def test_virtual_tokens_stand_before_a_text(variant, kind, tmp_path):
    """Ids give what their embeddings give; they learn, are saved, and text is generated."""
    run = runner(variant, "causal")
    bare = run.model
    model = get_peft_model(bare, PROMPTS[kind]).eval()
    ids = words(2, 17)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    virtual = model.get_prompt(batch_size=2)
    embeds = torch.cat([virtual, bare.get_input_embeddings()(ids)], dim=1)
    whole = torch.cat([torch.ones(2, 4, dtype=torch.long), mask], dim=1)
    with torch.no_grad():
        expected = bare(inputs_embeds=embeds, attention_mask=whole).logits
        assert_equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    by_hand = bare.generate(inputs_embeds=embeds, attention_mask=whole, max_new_tokens=4, do_sample=False)
    assert generated[:, 17:].tolist() == by_hand.tolist()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert learned and all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learned)
    assert max(float(p.grad.abs().max()) for p in learned) > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(runner(variant, "causal").model, tmp_path).eval()
    with torch.no_grad():
        got = again(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, **tolerance(expected))
