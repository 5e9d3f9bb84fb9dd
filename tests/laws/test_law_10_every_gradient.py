"""Law 10, of gradients: every parameter that learns gets one in every training forward, zeros where nothing used it.

So DistributedDataParallel works with its own setting, find_unused_parameters=False, whatever the texts are. Training
in two processes: tests/tools/test_distributed.py.
"""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from renamed import checkpoint_activations
from variants import FLOAT32, VOCAB, over, runner, streams, words

from hf_gallery.models.gradients import with_gradients_for

LENGTHS = (1, 2, 5, 8, 23)  # shorter and longer than every segment, block and window


def missing(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def learn(run, ids, mask=None, cache=None, **options):
    """A forward and a backward; the cache, detached."""
    result, cache = run(ids, mask, cache, **options)
    run.model.zero_grad()
    result.sigmoid().sum().backward()
    return None if cache is None else cache.detach()


def training(variant, head, **settings):
    run = runner(variant, head, **settings)
    run.model.train()
    return run


def padded(length):
    """Rows of a batch that share no length, one of them of a single token."""
    mask = torch.ones(3, length, dtype=torch.long)
    mask[1, length // 2 + 1 :] = 0
    mask[2, : length - 1] = 0
    return mask


@over()
def test_after_a_forward_over_texts_of_any_length(variant, head):
    run = training(variant, head)
    for length in LENGTHS:
        learn(run, words(3, length))
        assert not missing(run.model), f"{length} tokens"
        learn(run, words(3, length), padded(length))
        assert not missing(run.model), f"{length} tokens, padded"


@over(lambda variant, head: not head.question)
def test_after_a_forward_over_embeddings(variant, head):
    """The table of embeddings too, though nothing was looked up in it. A seq2seq model's come from its decoder."""
    run = training(variant, head)
    table = run.model.get_input_embeddings()
    embeds = table(words(2, 9)).detach()
    if run.head.source:
        source, mask = run.sources(range(2))
        result = run.model(inputs_embeds=table(source).detach(), attention_mask=mask, decoder_inputs_embeds=embeds)
        result.logits.sigmoid().sum().backward()
    else:
        learn(run, None, embeds=embeds)
    assert not missing(run.model)


@pytest.mark.parametrize("sizes", [(7, 7, 7), (8, 3, 16), (20, 1, 5)], ids=str)
@streams()
def test_after_every_forward_that_goes_on_from_a_cache(variant, head, sizes):
    """Also where a row begins anew, and where what was read before moves no state any more."""
    run, cache = training(variant, head), None
    for i, size in enumerate(sizes):
        if i == 2 and not run.head.source:
            cache.reset_rows(torch.tensor([True, False]))
        cache = learn(run, words(2, size, seed=i), cache=cache)
        assert not missing(run.model), f"forward {i}"


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@over()
def test_with_checkpointed_activations(variant, head, reentrant):
    """And each gets it once in a backward, which DistributedDataParallel counts, but for what layers share."""
    if reentrant and not variant.reentrant:
        pytest.skip("refused, in test_errors.py")
    plain, run = training(variant, head), training(variant, head)
    checkpoint_activations(run.model, {"use_reentrant": reentrant})
    run.model.enable_input_require_grads()
    times = {}
    for name, parameter in run.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: times.update({name: times.get(name, 0) + 1}))
    options = {"use_cache": False} if run.head.stream else {}
    for length in LENGTHS:
        times.clear()
        for one in (plain, run):
            torch.manual_seed(0)
            learn(one, words(2, length), **options)
        assert not missing(run.model), f"{length} tokens"
        for (name, parameter), twin in zip(run.model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, twin.grad, **FLOAT32)
            in_layers = (
                ".layers." in name and not variant.one_by_one
            )  # each call's checkpoint is a backward of its own
            assert times[name] == 1 or (reentrant and not in_layers), (name, times[name])


@over()
def test_nothing_else_changes(variant, head, monkeypatch):
    """Results and gradients to the last bit; what had no gradient has zeros."""
    found = []
    for off in (False, True):
        if off:
            for name, module in list(sys.modules.items()):
                if name.startswith("hf_gallery.models.") and hasattr(module, "with_gradients_for"):
                    monkeypatch.setattr(module, "with_gradients_for", lambda x, *parts: x)
        run = training(variant, head, dtype=torch.float64)
        torch.manual_seed(0)
        result, _ = run(words(2, 23))
        result.sigmoid().sum().backward()
        found.append((result, {name: p.grad for name, p in run.model.named_parameters()}))
    (result, gradients), (expected, wanted) = found
    assert torch.equal(result, expected)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(gradient) if wanted[name] is None else wanted[name]), name


@over(lambda variant, head: head.stream)
def test_only_what_learns(variant, head):
    """An adapter's weights; the model's own, frozen, get nothing."""
    run = training(variant, head)
    run.model = get_peft_model(run.model, LoraConfig(r=2, target_modules="all-linear"))
    learn(run, words(2, 3))
    assert not missing(run.model)
    assert all(p.grad is None for p in run.model.parameters() if not p.requires_grad)


@over(lambda variant, head: head.stream and head.auto != "AutoModel")
def test_with_labels(variant, head):
    """A loss need not score what no label needs: no label at all, or those of frequent words only."""
    run = training(variant, head)
    for labels in (torch.full((2, 6), -100), words(2, 6) % 11, torch.randint(0, VOCAB, (2, 6))):
        run.model.zero_grad()
        run.model(**run.inputs(words(2, 6)), labels=labels).loss.nan_to_num().backward()
        assert not missing(run.model)


def test_without_gradients_nothing_is_recorded():
    """Nor where nothing learns."""
    x, part = torch.randn(2, 3), torch.nn.Linear(3, 3)
    with torch.no_grad():
        assert with_gradients_for(x, part) is x
    assert with_gradients_for(x, part.requires_grad_(False)) is x
