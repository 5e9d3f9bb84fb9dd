"""A published GPT-2 with a memory: its own results while the gates are closed, and a memory to learn to use."""

import pytest
import torch
from test_convert_transformer import assert_same_states, ours_of, precisions, published
from test_law_2_batch_anyhow import padded
from variants import PAD, assert_equal, words

import hf_gallery as gallery
from hf_gallery.convert import convert

MEMORY = dict(to="memorizing_transformer", memory_layers=[0, 2], memory_size=64, memory_topk=4)


def with_memory(theirs, folder, closed=True, **options):
    """The gallery's model, with closed gates or with those that it starts with."""
    ours = ours_of(theirs, folder, **MEMORY | options)
    for layer in ours.config.memory_layers:
        gate = ours.base_model.layers[layer].self_attn.gate_bias
        assert (gate == 0).all()
        if closed:
            with torch.no_grad():
                gate.fill_(-60)
    return ours


# n_positions is 31. Segments of 10 make positions start anew after 30, and all of those are seen with mem_len 20.
SEGMENTS = {"one segment": dict(), "three segments": dict(segment_length=10, mem_len=20)}
segments = pytest.mark.parametrize("options", SEGMENTS.values(), ids=SEGMENTS.keys())


@segments
@precisions
@torch.no_grad()
def test_closed_gates_give_gpt2(dtype, options, tmp_path):
    """Logits, loss, hidden states, with padding on the left, and what greedy and beam search write."""
    theirs = published("GPT2LMHeadModel", dtype)
    ours = with_memory(theirs, tmp_path, **options)
    assert type(ours) is gallery.GalleryMemorizingTransformerForCausalLM and ours.dtype == dtype
    period = ours.config.position_period
    ids, mask = words(3, period), padded((period, 9, 16), "left", period)
    got, expected = (model(ids, labels=ids, output_hidden_states=True) for model in (ours, theirs))
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss.float(), expected.loss.float())
    assert_same_states(got.hidden_states, expected.hidden_states)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=position_ids).logits
    assert_equal(ours(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1])
    prompt = words(2, 5)
    for beams in (1, 3):
        options = dict(max_new_tokens=20, do_sample=False, num_beams=beams, pad_token_id=PAD)
        assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


@segments
@torch.no_grad()
def test_longer_than_gpt2_reads(options, tmp_path):
    """Closed gates give GPT-2 on one piece after the other; open ones let a piece know of those before."""
    theirs = published("GPT2LMHeadModel", torch.float64)
    ours, ids = with_memory(theirs, tmp_path, **options), words(2, 80)
    expected = torch.cat([theirs(piece).logits for piece in ids.split(ours.config.position_period, dim=1)], dim=1)
    assert_equal(ours(ids).logits, expected)
    fresh = with_memory(theirs, tmp_path / "fresh", closed=False, **options)
    other = torch.cat([words(2, 31, seed=1), ids[:, 31:]], dim=1)
    assert ((fresh(ids).logits - fresh(other).logits)[:, 62:].abs().amax(-1) > 1e-3).all()
    retrieved = fresh(ids, output_retrievals=True).retrievals
    assert retrieved.keys() == {0, 2} and (retrieved[2].positions[:, :, 70:] >= 0).all()


@torch.no_grad()
def test_the_bare_model_and_other_scales(tmp_path):
    theirs = published("GPT2Model", torch.float64, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False)
    ours, ids = with_memory(theirs, tmp_path), words(2, 31)
    assert type(ours) is gallery.GalleryMemorizingTransformerModel
    assert_equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


def test_the_gates_learn(tmp_path):
    """Fine-tuning opens or closes them: they have a gradient as soon as something is stored."""
    ours, ids = with_memory(published("GPT2LMHeadModel"), tmp_path, closed=False), words(2, 62)
    ours(ids, labels=ids).loss.backward()
    for layer in (0, 2):
        assert (ours.model.layers[layer].self_attn.gate_bias.grad.abs() > 1e-6).all()


def test_what_it_is_by_default(tmp_path):
    ours = ours_of(published("GPT2LMHeadModel"), tmp_path, to="memorizing_transformer")
    config, default = ours.config, gallery.GalleryMemorizingTransformerConfig()
    assert (config.segment_length, config.mem_len, config.position_period, config.memory_layers) == (31, 0, 31, [0])
    assert (config.memory_size, config.memory_topk) == (default.memory_size, default.memory_topk)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(segment_length=32), "segment_length is 32.*num_positions 31"),
        (dict(mem_len=4), "mem_len is 4.*after 31 tokens.*mem_len 0"),
        (dict(memory_layers=[3]), r"memory_layers holds 3.*0 to 2"),
        (dict(memory_size=3), "memory_topk is 4.*memory_size 3"),
        (dict(attention_window=4), "attention_window.*memorizing_transformer.*memory_layers"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message, tmp_path):
    published("GPT2LMHeadModel").save_pretrained(tmp_path / "published")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "published", tmp_path / "converted", **MEMORY | options)
    assert not (tmp_path / "converted").exists()
