"""Keys and values that a tool gives become the past, where keys and values are all that a past is."""

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache
from variants import assert_equal, runner, streams, words

import hf_gallery as gallery
from hf_gallery import GalleryCache

TAKES = (gallery.GalleryTransformerConfig, gallery.GalleryTransformerXLConfig, gallery.GalleryLongformerConfig)
of_pairs = streams(lambda v: v.config in TAKES, lambda head: head.auto == "AutoModelForCausalLM")
refused = streams(lambda v: v.config not in TAKES, lambda head: head.auto == "AutoModelForCausalLM")


def pairs_of(cache):
    """The keys and values of four tokens; before them may stand those of an initial memory."""
    return [(state["keys"][..., -4:, :], state["values"][..., -4:, :]) for state in cache.states]


def as_past(pairs):
    past = DynamicCache()
    for layer, (key, value) in enumerate(pairs):
        past.update(key, value, layer)
    return past


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@of_pairs
def test_pairs_are_the_past(variant, head, gradients):
    """The keys and values of tokens, given as pairs, are what the tokens are: everything after them is the same."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    prefix, text = words(2, 4), words(2, 13, seed=1)
    with torch.no_grad():
        expected, _ = run(torch.cat([prefix, text], dim=1))
        _, cache = run(prefix)
    with torch.set_grad_enabled(gradients):
        result, returned = run(text, torch.ones(2, 17), as_past(pairs_of(cache)))
    assert_equal(result.detach(), expected[:, 4:])
    assert isinstance(returned, GalleryCache) and returned.get_seq_length() == 17
    again = run(words(2, 5, seed=2), cache=returned)[0].detach()
    assert_equal(again, run(torch.cat([prefix, text, words(2, 5, seed=2)], dim=1))[0][:, 17:].detach())


@of_pairs
def test_gradients_reach_the_pairs(variant, head):
    """As differences say, for all layers' keys and values. Within a segment: at its border Transformer-XL stops all
    gradients, those that would reach a prefix by way of earlier tokens too."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    with torch.no_grad():
        _, cache = run(words(2, 4))
    pairs = [tuple(x.clone().requires_grad_() for x in pair) for pair in pairs_of(cache)]
    text = words(2, 3, seed=1)

    def loss(given):
        return run(text, None, as_past(given))[0].sin().sum()

    gradients = torch.autograd.grad(loss(pairs), [x for pair in pairs for x in pair])
    assert all(g.abs().max() > 0 for g in gradients)
    with torch.no_grad():
        ways = [tuple(torch.randn_like(x) for x in pair) for pair in pairs]
        step = 1e-5
        ahead, behind = (
            loss([tuple(x + s * w for x, w in zip(*both, strict=True)) for both in zip(pairs, ways, strict=True)])
            for s in (step, -step)
        )
    directional = sum((g * w).sum() for g, w in zip(gradients, [w for pair in ways for w in pair], strict=True))
    torch.testing.assert_close(directional, (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6)


@of_pairs
def test_a_prefix_is_tuned(variant, head):
    """PEFT's prefix learns, and nothing else; generate() goes on from it as the forward does."""
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0)
    model = get_peft_model(run.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    learning = [x for x in model.parameters() if x.requires_grad]
    optimizer, ids = torch.optim.Adam(learning, lr=0.05), words(2, 9)
    losses = []
    model.train()
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()
    text = ids[:1]
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=text).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.ones_like(ids[:1])
        got = model.generate(
            input_ids=ids[:1], attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None
        )
    assert got.tolist() == text.tolist()


@refused
def test_pairs_that_are_no_past(variant, head):
    """The reason is told."""
    run = runner(variant, head)
    h, d = run.model.config.num_attention_heads, run.model.config.head_dim
    past = as_past([(torch.zeros(2, h, 4, d),) * 2 for _ in run.model.model.layers])
    with pytest.raises(ValueError, match=r"past_key_values.*prefix tuning.*keeps more of a token"):
        run(words(2, 3), None, past)


@of_pairs
def test_pairs_of_another_shape(variant, head):
    run = runner(variant, head)
    n, h, d = run.model.config.num_hidden_layers, run.model.config.num_attention_heads, run.model.config.head_dim
    for layers, shape in ((n - 1, (2, h, 4, d)), (n, (2, h + 1, 4, d)), (n, (2, h, 4, d + 1))):
        with pytest.raises(ValueError, match=rf"past_key_values.*\(rows, {h}, columns, {d}\)"):
            run(words(2, 3), None, as_past([(torch.zeros(shape),) * 2] * layers))
    with pytest.raises(ValueError, match="2 rows"):
        run(words(3, 3), None, as_past([(torch.zeros(2, h, 4, d),) * 2] * n))
