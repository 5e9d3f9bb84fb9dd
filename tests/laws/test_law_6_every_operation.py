"""Law 6, every operation of a forward: whichever fails, for want of memory or by Ctrl-C, the cache is as it was, and
the text goes on from it as if nothing had been tried."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import assert_equal, autocast_nesting, leave_autocast, runner, streams, words

from hf_gallery import GalleryCache
from hf_gallery.models import cache as cache_module
from hf_gallery.models import cache_file, columns, memory, states

FIRST = 11

whole = streams(of_head=lambda head: head.auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"))


class Fail(TorchDispatchMode):
    """Counts the operations, and makes one of them fail: number `at`, or none."""

    def __init__(self, at=None):
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise RuntimeError("no memory")
        return function(*args, **kwargs or {})


def small(variant, head):
    settings = dict(hidden_dropout=0.0, attention_dropout=0.0, num_hidden_layers=2) | variant.shallow
    if "memory_layers" in settings:
        settings["memory_layers"] = [0, 1]  # two rings are written
    if variant.heads[head].source:
        settings |= dict(num_encoder_layers=1, num_decoder_layers=2)
    return runner(variant, head, **settings)


def read(run, gradients):
    with torch.set_grad_enabled(gradients):
        _, cache = run(words(2, FIRST))
        _, cache = run(words(2, 1, seed=9), cache=cache)  # memory with room stands behind it
    return cache


def tensors(cache):
    return [x for x in tree_leaves([cache.states, cache.facts, cache.seen]) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@whole
def test_each_operation_fails_in_turn(variant, head, gradients):
    run = small(variant, head)
    more, later = words(2, 6, seed=1), words(2, 4, seed=2)  # a segment or block ends within
    with torch.set_grad_enabled(gradients):
        cache = read(run, gradients)
        untouched, content = cache.copy(), cache._content
        shapes = [(x.shape, x.dtype) for x in tensors(cache)]
        with Fail() as counter:
            run(more, cache=cache.copy())
        at, most = 0, counter.count + 100
        while True:
            # With gradients the writes are the same; what only computes is tried here and there.
            at += 7 if gradients and at < counter.count - 40 else 1
            assert at < most
            try:
                with Fail(at):
                    run(more, cache=cache)
            except RuntimeError as error:
                assert str(error) == "no memory" and cache._content is content, f"operation {at}"
                assert [(x.shape, x.dtype) for x in tensors(cache)] == shapes
            else:
                break
            if at % 100 == 0 or at > counter.count - 5:
                assert_goes_on(run, cache, untouched, more, later)
        assert at > 50
        run(more, cache=untouched)
        assert_goes_on(run, cache, untouched, later)


def assert_goes_on(run, cache, untouched, *texts):
    one, other = cache.copy(), untouched.copy()
    for text in texts:
        result, expected = run(text, cache=one)[0], run(text, cache=other)[0]
        assert_equal(result.detach(), expected.detach())
    assert one.get_seq_length() == other.get_seq_length()


FILES = {module.__file__ for module in (cache_module, cache_file, columns, memory, states)}


class Interrupt:
    """Raises KeyboardInterrupt at a line of the cache's own code: number `at`, or none.

    Python has a line between the body of a `with` and its `__exit__`; an interrupt there leaves the context open, in
    every program. Here that is autocast, and it is left afterwards.
    """

    def __init__(self, at=None):
        self.at, self.count = at, 0

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.before, self.nesting = sys.gettrace(), autocast_nesting()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)
        leave_autocast(autocast_nesting() - self.nesting)


@whole
def test_an_interrupt_at_any_line(variant, head):
    """Ctrl-C between two statements of the cache: it holds all that came before the forward, or all that came after,
    and is not left waiting for the end of a forward that is over."""
    run = small(variant, head)
    more, later = words(2, 6, seed=1), words(2, 4, seed=2)
    with torch.no_grad():
        cache = read(run, False)
        before = cache.copy()
        with Interrupt() as counter:
            _, after = run(more, cache=cache.copy())
        lines = list(range(1, counter.count + 1))
        lines = lines if len(lines) < 150 else lines[:: len(lines) // 100] + lines[-50:]
        for at in lines:
            one = before.copy()
            try:
                with Interrupt(at):
                    run(more, cache=one)
            except KeyboardInterrupt:
                pass
            assert one.get_seq_length() in (before.get_seq_length(), after.get_seq_length())
            twin = before if one.get_seq_length() == before.get_seq_length() else after
            assert_goes_on(run, one, twin, later)


@pytest.mark.parametrize("name", ["reset_rows", "batch_select_indices", "batch_repeat_interleave", "crop", "detach"])
@streams(lambda v: True, of_head=lambda head: head.auto == "AutoModelForCausalLM")
def test_each_operation_of_a_change_fails_in_turn(variant, head, name):
    """Also where rows move, end or are taken back."""
    arguments = dict(reset_rows=([1],), batch_select_indices=(torch.tensor([1, 0]),), crop=(-2,))
    arguments |= dict(batch_repeat_interleave=(2,), detach=())
    run = small(variant, head)
    with torch.no_grad():
        cache = GalleryCache(run.model.config)
        cache.activate_past_recording()
        run(words(2, FIRST), cache=cache)
        untouched, content, twin = cache.copy(), cache._content, cache.copy()
        with Fail() as counter:
            getattr(twin, name)(*arguments[name])
        for at in range(1, counter.count + 1):
            with pytest.raises(RuntimeError, match="no memory"), Fail(at):
                getattr(cache, name)(*arguments[name])
            assert cache._content is content
        assert_goes_on(run, cache, untouched, words(2, 6, seed=1))
