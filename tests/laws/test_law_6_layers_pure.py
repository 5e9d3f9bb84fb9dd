"""Law 6. A layer maps (hidden states, positions, its state) to (hidden states, new state); only the model writes to
the cache, in one place, after the layers. So gradient checkpointing works with memory on, and a failed forward leaves
the cache as it was."""

import copy
from dataclasses import is_dataclass

import pytest
import torch
from renamed import checkpoint_activations
from torch import nn
from torch.utils._pytree import tree_iter
from variants import assert_equal, runner, streams, words


def snapshot(cache):
    """Everything that the cache holds, in memory of its own."""
    return copy.deepcopy(cache.__dict__)


def assert_unchanged(cache, before):
    after = cache.__dict__
    assert after.keys() == before.keys()
    for name in before:
        assert_same(after[name], before[name], name)


def assert_same(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)), where
    elif is_dataclass(a):
        assert_same(vars(a), vars(b), where)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def modules_called(run, ids, **options):
    """All modules that a forward calls, in the order of their first call."""
    called, handles = {}, []
    for name, module in run.model.named_modules():
        if module is not run.model:
            note = lambda module, _, name=name: called.update({name: module})  # noqa: E731
            handles.append(module.register_forward_pre_hook(note))
    run(ids, **options)
    for handle in handles:
        handle.remove()
    return called


def layers(model):
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return [layer for m in lists for layer in m if any(isinstance(x, nn.Linear) for x in layer.modules())]


class Failure(Exception):
    pass


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@streams()
def test_a_forward_that_fails_leaves_the_cache(variant, head, gradients):
    """Whichever module fails, the cache is as it was to the last bit, and serves on."""
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train(gradients)
    ids, more = words(2, 11), words(2, 6, seed=1)
    with torch.set_grad_enabled(gradients):
        _, cache = run(ids)
        expected, _ = run(more, cache=cache.copy())
        called = modules_called(run, more, cache=cache.copy())
        assert len(called) > 10
        before = snapshot(cache)
        for name, module in called.items():

            def fail(*_):
                raise Failure

            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                handle = register(fail)
                with pytest.raises(Failure):
                    run(more, cache=cache)
                handle.remove()
                assert_unchanged(cache, before)
            assert cache.get_seq_length() == 11, name
        result, cache = run(more, cache=cache)
    assert torch.equal(result, expected) and cache.get_seq_length() == 17


@streams()
def test_a_loss_that_fails_leaves_the_cache(variant, head):
    """Labels come last, and their mistakes too."""
    if head not in ("causal", "seq2seq"):
        return
    run = runner(variant, head)
    _, cache = run(words(2, 11))
    before = snapshot(cache)
    for labels in (torch.full((2, 6), 97), torch.full((2, 6), -7), words(2, 5), words(3, 6)):
        with pytest.raises(ValueError, match="labels"):
            run(words(2, 6, seed=1), cache=cache, labels=labels)
        assert_unchanged(cache, before)


def training_run(variant, head, dropout, checkpointing):
    """Losses and gradients of three steps that carry the cache, and how often the layers ran."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=dropout, attention_dropout=dropout)
    run.model.train()
    if checkpointing:
        checkpoint_activations(run.model, checkpointing)
    calls = []
    for layer in layers(run.model):
        first = next(m for m in layer.modules() if isinstance(m, nn.Linear))
        first.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(5)
    results, cache = [], None
    for i, n in enumerate((13, 4, 9)):
        result, cache = run(words(2, n, seed=i), None, cache)
        loss = result.square().mean()
        run.model.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), {name: g.clone() for name, g in gradients.items()}))
    return results, len(calls), cache


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@streams()
def test_gradient_checkpointing_with_memory_on(variant, head, dropout, reentrant):
    if reentrant and not variant.reentrant:
        with pytest.raises(ValueError, match="use_reentrant.*feedback.*use_reentrant=False"):
            training_run(variant, head, dropout, {"use_reentrant": True})
        return
    expected, plain_calls, plain_cache = training_run(variant, head, dropout, None)
    got, calls, cache = training_run(variant, head, dropout, {"use_reentrant": reentrant})
    assert calls >= 2 * plain_calls - 3 * 2, "nothing was computed again"  # an encoder that is read once may not be
    assert cache.get_seq_length() == plain_cache.get_seq_length() == 26
    for (loss, gradients), (want, wanted) in zip(got, expected, strict=True):
        assert_equal(loss, want)
        assert gradients.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@streams()
def test_a_layer_called_twice_gives_the_same(variant, head, gradients):
    """A layer changes nothing that it is given, and remembers nothing."""
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train(gradients)
    checked = []

    def call_again(layer, arguments, keywords, result):
        if getattr(layer, "busy", False) or arguments[0] is None:  # with feedback it is also asked for its state alone
            return
        layer.busy = True
        before = copy.deepcopy(detached(contents((arguments, keywords))))
        again = layer(*arguments, **keywords)
        assert_same(detached(contents((arguments, keywords))), before)
        assert_same(detached(contents(again)), detached(contents(result)))
        layer.busy = False
        checked.append(layer)

    with torch.set_grad_enabled(gradients):
        _, cache = run(words(2, 11))
        for layer in layers(run.model):
            layer.register_forward_hook(call_again, with_kwargs=True)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, :3] = 0
        run(words(2, 6, seed=1), mask, cache)
    assert len(checked) >= run.model.config.num_hidden_layers


@streams()
def test_two_continuations_of_one_state_do_not_disturb_each_other(variant, head):
    """A layer's next state stays as it is when the same state is continued in another way."""
    run = runner(variant, head)
    checked = []

    def continue_otherwise(layer, arguments, keywords, result):
        if getattr(layer, "busy", False) or arguments[0] is None:  # with feedback it is also asked for its state alone
            return
        layer.busy = True
        before = copy.deepcopy(contents(result))
        layer(arguments[0] + 1, *arguments[1:], **keywords)
        assert_same(contents(result), before)
        layer.busy = False
        checked.append(layer)

    with torch.no_grad():
        _, cache = run(words(2, 30))
        for layer in layers(run.model):
            layer.register_forward_hook(continue_otherwise, with_kwargs=True)
        for i in range(6):
            _, cache = run(words(2, 1, seed=i), cache=cache)
    assert len(checked) >= 6 * run.model.config.num_hidden_layers


def contents(x):
    """x with objects opened, so that their tensors are compared too."""
    if isinstance(x, (list, tuple)):
        return [contents(y) for y in x]
    if isinstance(x, dict):
        return {k: contents(y) for k, y in x.items()}
    if hasattr(x, "__dict__") and not isinstance(x, (torch.Tensor, nn.Module, type)):
        return {k: contents(y) for k, y in vars(x).items() if not k.startswith("_")}
    return x


def detached(x):
    if isinstance(x, torch.Tensor):
        return x.detach()
    if isinstance(x, (list, tuple)):
        return [detached(y) for y in x]
    if isinstance(x, dict):
        return {k: detached(y) for k, y in x.items()}
    return x


@streams()
def test_a_cache_holds_no_graph(variant, head):
    """States are cut from the graph that made them."""
    run = runner(variant, head)
    run.model.train()
    _, cache = run(words(2, 11))
    tensors = [x for x in tree_iter(contents(vars(cache))) if isinstance(x, torch.Tensor)]
    assert tensors and not any(x.requires_grad for x in tensors)
