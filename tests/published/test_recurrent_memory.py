"""The Recurrent Memory Transformer against the authors' two codes, and GPT-2 with memory tokens.

golden/make_recurrent_memory.py says what was run: booydar/recurrent-memory-transformer at 9d0ebe1 around GPT-2, and
booydar/LM-RMT at e289508.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convert_transformer import ours_of, precisions, published
from test_law_2_batch_anyhow import padded
from test_training import arguments, dataset, texts
from transformers import GPT2Config, GPT2LMHeadModel
from variants import PAD, assert_equal, words

import hf_gallery as gallery
from hf_gallery.convert import convert
from hf_gallery.training import SegmentTrainer

GOLDEN = Path(__file__).parents[1] / "golden" / "recurrent_memory"
RECURRENT = dict(to="recurrent_memory", num_memory_tokens=3)


def golden(name):
    """The tensors of a case, those of a kind (weight, grad, memory, hidden) by their own names."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    of = {"": {}}
    for key, x in tensors.items():
        kind, _, rest = key.partition(".")
        of.setdefault(kind if rest else "", {})[rest or key] = x
    return of


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def from_gpt2(folder):
    """The gallery's model of the case around GPT-2, through files and `convert`."""
    case = golden("gpt2")
    sizes = dict(vocab_size=29, n_positions=16, n_embd=12, n_layer=2, n_head=2, n_inner=20)
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    memory = case["weight"].pop("memory")
    missing = base.load_state_dict(case["weight"], strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    base.tie_weights()
    model = ours_of(base, folder, **RECURRENT, segment_length=7)
    with torch.no_grad():
        model.model.memory.initial.copy_(memory)
    return model, case


@pytest.mark.parametrize("cuts", [(31,), (7, 7, 7, 7, 3), (1,) * 31, (5, 20, 6)], ids=str)
@torch.no_grad()
def test_logits_and_memories_of_the_code_around_gpt2(cuts, tmp_path):
    """However the text is cut; the memory is compared wherever a forward ends with a segment."""
    model, case = from_gpt2(tmp_path)
    cache, logits, end = gallery.GalleryCache(model.config), [], 0
    for part in case[""]["input_ids"].split(list(cuts), dim=1):
        logits.append(model(part, past_key_values=cache).logits)
        end += part.shape[1]
        if end % 7 == 0:
            close(cache.states[0]["memory"], case["memory"][str(end // 7)])
    close(torch.cat(logits, dim=1), case[""]["logits"])


def test_loss_and_gradients_of_the_code_around_gpt2(tmp_path):
    """Through all segments, to the memory tokens too."""
    model, case = from_gpt2(tmp_path)
    ids = case[""]["input_ids"]
    loss = model(ids, labels=ids).loss
    close(loss, case[""]["loss"])
    loss.backward()
    close(model.model.memory.initial.grad, case["grad"]["memory"])
    close(model.model.embed_tokens.weight.grad, case["grad"]["transformer.wte.weight"])
    close(model.model.embed_positions.weight.grad, case["grad"]["transformer.wpe.weight"])
    for i, layer in enumerate(model.model.layers):
        attention, name = layer.self_attn, f"transformer.h.{i}"
        maps = [x.weight.grad.mT for x in (attention.q_proj, attention.k_proj, attention.v_proj)]
        close(torch.cat(maps, dim=1), case["grad"][f"{name}.attn.c_attn.weight"])
        close(layer.feed_forward.down_proj.weight.grad.mT, case["grad"][f"{name}.mlp.c_proj.weight"])


@torch.no_grad()
def test_hidden_states_and_memories_of_lm_rmt():
    """Memory tokens that see each other: the mask of the paper's language models."""
    case = golden("lm_rmt")
    config = gallery.GalleryRecurrentMemoryTransformerConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        segment_length=7, num_memory_tokens=3, sinusoid_layout="concatenated", attention_bias=False,
    )  # fmt: skip
    model = gallery.GalleryRecurrentMemoryTransformerModel(config).eval()
    weight, states = case["weight"], {}
    states["embed_tokens.weight"] = weight["word_emb.emb_layers.0.weight"]
    states["memory.initial"] = weight["mem_tokens"][:, 0]
    for i in range(2):
        name = f"layers.{i}"
        key, value = weight[f"{name}.dec_attn.kv_net.weight"].chunk(2)
        maps = {"q": weight[f"{name}.dec_attn.q_net.weight"], "k": key, "v": value}
        maps["o"] = weight[f"{name}.dec_attn.o_net.weight"]
        states |= {f"{name}.self_attn.{letter}_proj.weight": x for letter, x in maps.items()}
        for kind in ("weight", "bias"):
            states[f"{name}.self_attn_norm.{kind}"] = weight[f"{name}.dec_attn.layer_norm.{kind}"]
            states[f"{name}.feed_forward_norm.{kind}"] = weight[f"{name}.pos_ff.layer_norm.{kind}"]
            states[f"{name}.feed_forward.up_proj.{kind}"] = weight[f"{name}.pos_ff.CoreNet.0.{kind}"]
            states[f"{name}.feed_forward.down_proj.{kind}"] = weight[f"{name}.pos_ff.CoreNet.3.{kind}"]
    model.load_state_dict(states)
    cache = gallery.GalleryCache(config)
    whole = model(case[""]["input_ids"]).last_hidden_state
    for i, part in enumerate(case[""]["input_ids"].split(7, dim=1)):
        close(whole[:, 7 * i : 7 * i + 7], case["hidden"][str(i)])
        close(model(part, past_key_values=cache).last_hidden_state, case["hidden"][str(i)])
        close(cache.states[0]["memory"], case["memory"][str(i + 1)])


@precisions
@torch.no_grad()
def test_without_memory_tokens_a_segment_is_gpt2(dtype, tmp_path):
    """Logits and loss, with padding on the left, and what greedy and beam search write; then the next segment, which
    knows nothing of it."""
    theirs = published("GPT2LMHeadModel", dtype)
    ours = ours_of(theirs, tmp_path, to="recurrent_memory", num_memory_tokens=0)
    assert type(ours) is gallery.GalleryRecurrentMemoryTransformerForCausalLM and ours.config.segment_length == 31
    ids, mask = words(3, 31), padded((31, 9, 16), "left", 31)
    got, expected = (model(ids, labels=ids) for model in (ours, theirs))
    assert_equal(got.logits, expected.logits)
    assert_equal(got.loss.float(), expected.loss.float())
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask, position_ids=position_ids).logits
    assert_equal(ours(ids, attention_mask=mask).logits[mask == 1], expected[mask == 1])
    for beams in (1, 3):
        options = dict(max_new_tokens=20, do_sample=False, num_beams=beams, pad_token_id=PAD)
        assert torch.equal(ours.generate(ids[:2, :5], **options), theirs.generate(ids[:2, :5], **options))
    more = words(3, 62)
    assert_equal(ours(more).logits[:, 31:], theirs(more[:, 31:]).logits)


@torch.no_grad()
def test_fresh_memory_tokens(tmp_path):
    """As the authors' code makes them: normal numbers of the size of the embeddings; the same in every conversion."""
    theirs = published("GPT2Model")
    ours, again = (ours_of(theirs, tmp_path / name, to="recurrent_memory_transformer") for name in "ab")
    config = ours.config
    assert (config.num_memory_tokens, config.segment_length, config.memory_attention) == (10, 11, "causal")
    memory = ours.memory.initial
    assert torch.equal(memory, again.memory.initial)
    assert memory.std() / theirs.wte.weight.std() == pytest.approx(1, abs=0.15)
    assert (memory[0] - memory[1]).abs().max() > 0.1
    ids = words(1, 40)
    other = ids.clone()
    other[0, 0] += 1
    assert ((ours(ids)[0] - ours(other)[0])[0, 33:].abs().amax(-1) > 1e-4).all()  # three segments on


def test_gpt2_learns_to_write_its_memory(tmp_path):
    """By SegmentTrainer, in steps of a segment whose gradients reach the one before; and what is saved is that."""
    model = ours_of(published("GPT2LMHeadModel"), tmp_path, **RECURRENT, segment_length=8)
    before = model.model.memory.initial.detach().clone()
    settings = arguments(tmp_path, max_steps=12, learning_rate=0.05, gradient_accumulation_steps=2)
    documents = dataset(texts(40, 33))
    ways = dict(segment_length=8, backpropagate_segments=2, train_dataset=documents, eval_dataset=documents)
    own = SegmentTrainer(model, settings, **ways)
    first = own.evaluate()["eval_loss"]
    own.train()
    last = own.evaluate()["eval_loss"]
    assert last < 0.9 * first and not torch.equal(model.model.memory.initial, before)
    own.save_model(tmp_path / "trained")
    saved = SegmentTrainer(type(model).from_pretrained(tmp_path / "trained"), settings, **ways)
    assert saved.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_memory_tokens=16), "num_memory_tokens is 16.*31 positions"),
        (dict(segment_length=26), "segment_length is 26 and num_memory_tokens 3.*together 32.*31"),
        (dict(num_memory_tokens=-1), "num_memory_tokens is -1"),
        (dict(memory_attention="none"), "memory_attention is 'none'.*full, causal"),
        (dict(mem_len=4), "mem_len.*recurrent_memory_transformer.*num_memory_tokens"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message, tmp_path):
    published("GPT2LMHeadModel").save_pretrained(tmp_path / "published")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "published", tmp_path / "converted", **RECURRENT | options)
    assert not (tmp_path / "converted").exists()
