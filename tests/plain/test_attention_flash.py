"""All that stands around torch's FlashAttention, over its operators by their definition; on a GPU the real ones."""

import math

import flash
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from renamed import checkpoint_activations
from test_attention import assert_same, leaf, problem, run, tensors
from variants import (
    VARIANTS,
    assert_equal,
    assert_same_step,
    assert_trains_alike_in_one_graph,
    over,
    padded,
    runner,
    training_step,
    words,
)
from variants import causal as causal_variants

from hf_gallery.models import attention, attention_flash
from hf_gallery.models.attention import Position, attend, attend_naive, attend_parts, choose, flash_is_right
from hf_gallery.models.attention_flash import Sequences, sequences_of
from hf_gallery.models.attention_problem import Problem
from hf_gallery.models.attention_tiles import attend_tiles
from hf_gallery.models.documents import find_documents
from hf_gallery.models.exporting import compile_whole
from hf_gallery.models.folding import Folding
from hf_gallery.models.rows import Rows
from hf_gallery.models.segments import segment_spans
from hf_gallery.models.spans import Spans


@pytest.fixture
def kernels(monkeypatch):
    """The operators on CPUs, in full precision too, and what they were called with."""
    monkeypatch.setattr(attention_flash, "lacks", lambda device: None)
    kinds = (*attention_flash.KINDS, torch.float32, torch.float64)
    monkeypatch.setattr(attention_flash, "KINDS", kinds)
    library = flash.register()
    for calls in flash.CALLS.values():
        calls.clear()
    yield flash.CALLS
    library._destroy()


@pytest.fixture
def gpu(kernels, monkeypatch):
    """The rule of a GPU, where the tiles do what is chosen for the gallery's own kernels."""
    monkeypatch.setattr(attention, "_on_gpu", lambda problem: True)
    monkeypatch.setattr(attention, "why_not_triton", lambda problem: None)
    monkeypatch.setattr(attention, "why_not_decode", lambda problem: "is not tried here")
    monkeypatch.setattr(attention, "_WHY_NOT", {"triton": lambda problem: None, "flash": attention_flash.why_not})
    monkeypatch.setattr(attention, "attend_triton", lambda problem: attend_tiles(problem.check()))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)  # the tests ask for them
    flash_is_right.cache_clear()
    yield kernels
    flash_is_right.cache_clear()


def flashed(*arguments, **options):
    return attend(*arguments, return_lse=True, implementation="flash", **options)


def inputs_over(spans, s, *, b=2, h=3, d=10, dv=6, dtype=torch.float64, seed=0):
    """Random tensors for intervals over s columns."""
    rows, t = spans.lower.shape
    inputs, _ = problem(b=rows if rows > 1 else b, h=h, t=t, s=s, d=d, dv=dv, dtype=dtype, seed=seed)
    return inputs


# -------------------------------------------------------------------------------------------- intervals as sequences

B, T = 3, 29


def ragged():
    """Padding before, behind and in the midst of rows, one of them short."""
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) > 0.25
    mask[:, T // 2] = True
    mask[1, 3:] = mask[1, :1]
    return mask


def rows(seen=None, mask=None):
    return Rows(B, T, mask, None if seen is None else torch.tensor(seen))


def documents():
    """Rows of their own for documents of 5, 9 and 15 tokens, packed three a row."""
    position = torch.cat([torch.arange(n) for n in (5, 9, 15)]).expand(B, -1)
    found = find_documents(rows(), position)
    return found.rows(torch.arange(len(found)))


def causal(rows, cached=0, *, window=None, before=0):
    """The intervals of a kind, and how many columns they are over."""
    p = rows.positions
    lower = torch.zeros_like(p) if window is None else p - window
    return rows.spans(lower, p - before, cached), cached + rows.width


def encoder(rows):
    last = torch.zeros_like(rows.positions) + rows.last
    return rows.spans(torch.zeros_like(last), last, 0), rows.width


def both_sides(rows, dilation, left, right):
    folding = Folding(rows, 0, dilation)
    return folding.window(left, right), -(-rows.width // dilation)


def segments(rows, length, mem_len, cached=0, *, part=None, **options):
    spans, parts = segment_spans(rows, cached, segment_length=length, mem_len=mem_len, **options)
    if part is None:
        return spans, cached + rows.width
    cached = cached if part == "before" or parts.carries else 0
    return getattr(parts, part), cached + (rows.width if part == "own" or parts.crosses else 0)


def plain(lower, upper, columns):
    return Spans(torch.as_tensor(lower), torch.as_tensor(upper)), columns


KINDS = {
    "causal": lambda: causal(rows()),
    "causal, cached": lambda: causal(rows([11] * B), 11),
    "causal, ragged": lambda: causal(rows(None, ragged())),
    "causal, rows apart behind a cache": lambda: causal(rows([11, 4, 0]), 11),
    "window": lambda: causal(rows(), window=6),
    "window, ragged behind a cache": lambda: causal(rows([9, 2, 5], ragged()), 6, window=6),
    "window before the query": lambda: causal(rows(), window=6, before=1),
    "window before the query, cached": lambda: causal(rows([7] * B), 7, window=7, before=1),
    "encoder": lambda: encoder(rows()),
    "encoder, ragged": lambda: encoder(rows(None, ragged())),
    "window on both sides, ragged": lambda: both_sides(rows(None, ragged()), 1, 4, 4),
    "window on both sides, dilated": lambda: both_sides(rows(), 3, 3, 3),
    "window, dilated": lambda: both_sides(rows(None, ragged()), 2, 3, 0),
    "segments": lambda: segments(rows(), 7, 0),
    "segments and memory": lambda: segments(rows(), 7, 5),
    "segments and a long memory": lambda: segments(rows(), 5, 15),
    "segments and memory, within a text": lambda: segments(rows([24] * B), 7, 5, 12),
    "segments and memory, ragged": lambda: segments(rows(None, ragged()), 7, 5),
    "segments, same length": lambda: segments(rows(), 7, 9, same_length=True),
    "own": lambda: segments(rows(), 7, 5, part="own"),
    "own, ragged": lambda: segments(rows([24, 3, 0], ragged()), 7, 5, 12, part="own"),
    "own, gradients carried": lambda: segments(rows([24] * B), 7, 5, 12, part="own", carries=True),
    "before": lambda: segments(rows(), 7, 5, part="before"),
    "before, long": lambda: segments(rows(), 5, 15, part="before"),
    "before, the cache alone": lambda: segments(rows([28] * B), 50, 30, 12, part="before"),
    "before, rows apart": lambda: segments(rows([24, 3, 0]), 7, 5, 12, part="before"),
    "documents": lambda: causal(documents()),
    "documents, window": lambda: causal(documents(), window=4),
    "documents, segments and memory": lambda: segments(documents(), 4, 3),
    "a source": lambda: plain([[0] * 5], [[T - 1] * 5], T),
    "a padded source": lambda: plain([[0] * 5] * B, [[T - 1] * 5, [3] * 5, [11] * 5], T),
    "one query": lambda: plain([[2]] * B, [[8], [4], [1]], 9),
    "one query of equal rows": lambda: plain([[0]], [[8]], 9),
    "nothing at all": lambda: plain([[3] * 4], [[2] * 4], 9),
    "ends that stick out": lambda: plain([[-3, -2, -1, 0]], [[5, 6, 7, 8]], 7),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_sequences_say_what_the_intervals_say(kind):
    """The mask of all sequences, put together, is `Spans.visible`."""
    spans, s = KINDS[kind]()
    found = sequences_of(spans, s)
    assert isinstance(found, Sequences), found
    expected = spans.clamp(s).visible(s)
    mask = torch.zeros_like(expected)
    for row, query, queries, key, keys in zip(*(x.tolist() for x in found[:5]), strict=True):
        seen = flash.visible(queries, keys, found.left, found.right, False)
        assert seen.any(1).all()
        mask[row, query : query + queries, key : key + keys] |= seen
    assert torch.equal(mask, expected)


@kinds
@pytest.mark.parametrize("heads", [dict(d=10, dv=6), dict(d=8, dv=8), dict(d=3, dv=17)], ids=["10, 6", "8", "3, 17"])
def test_flash_equals_naive(kind, heads, kernels):
    """out, lse and all gradients, of lse too, in float64."""
    spans, s = KINDS[kind]()
    inputs = inputs_over(spans, s, b=B, **heads)
    assert_same(run(flashed, inputs, spans), run(attend_naive, inputs, spans))
    assert kernels["forward"] or kind == "nothing at all"


@kinds
def test_flash_equals_naive_in_float32(kind, kernels):
    spans, s = KINDS[kind]()
    inputs = inputs_over(spans, s, b=B, dtype=torch.float32)
    exact = {name: leaf(x.double()) for name, x in inputs.items()}
    found, expected = run(flashed, inputs, spans), run(attend_naive, exact, spans)
    for name, right in expected.items():
        x, right = (y.double().nan_to_num(neginf=0.0) for y in (found[name], right))
        assert (x - right).norm() <= 2e-6 * right.norm(), name


@given(
    b=st.integers(1, 4), t=st.integers(1, 60), cached=st.integers(0, 40), length=st.integers(1, 12),
    mem_len=st.integers(0, 30), padded=st.booleans(), part=st.sampled_from([None, "own", "before"]),
    window=st.none() | st.integers(0, 50), seed=st.integers(0, 2**20),
)  # fmt: skip
def test_flash_equals_naive_or_says_why_not(b, t, cached, length, mem_len, padded, part, window, seed, kernels):
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(b, t, generator=g) > 0.3) if padded else None
    seen = torch.randint(0, 60, (b,), generator=g)
    options = dict(segment_length=length, mem_len=mem_len, window=window)
    spans, parts = segment_spans(Rows(b, t, mask, seen), cached, **options)
    spans = spans if part is None else getattr(parts, part)
    if spans is None:
        return
    s = spans.lower.shape[1] + cached
    inputs = inputs_over(spans, s, b=b, h=2, d=3, dv=5, seed=seed)
    found = sequences_of(spans, s)
    if isinstance(found, str):
        with pytest.raises(ValueError, match='implementation="flash" h.*auto'):
            run(flashed, inputs, spans)
    else:
        assert_same(run(flashed, inputs, spans), run(attend_naive, inputs, spans))


def test_any_intervals_are_no_sequences():
    """A query a sequence would fit them, and hold each key as often as it is seen."""
    _, spans = problem(b=2, h=1, t=40, s=50, d=1, dv=1)
    assert "one window for all" in sequences_of(spans, 50)
    assert "one window for all" in sequences_of(*segments(rows([24] * B), 7, 14, 24, part="before", window=9))
    assert "a key in 4 of them at most" in sequences_of(*segments(rows(), 2, 20))


@pytest.mark.parametrize(
    ("window", "count", "some"),
    [
        ((-1, 0), 1, ("causal", "causal, cached")),
        ((-1, 0), 5, ("segments", "segments and memory", "own")),
        ((-1, 0), 9, ("documents",)),
        ((-1, -1), 1, ("encoder", "a source", "one query of equal rows")),
        ((-1, -1), 4, ("before",)),
        ((-1, -1), B, ("encoder, ragged", "a padded source")),
        ((6, 0), 1, ("window",)),
        ((5, 0), 1, ("window before the query",)),
        ((4, 4), B, ("window on both sides, ragged",)),
        ((3, 3), 3 * B, ("window on both sides, dilated",)),
    ],
)
def test_sequences_are_few_and_windows_are_plain(window, count, some):
    """A row, a document or a segment each; no end of a window that nobody's interval has."""
    for kind in some:
        found = sequences_of(*KINDS[kind]())
        assert found[5:] == window and len(found.row) == count, kind


# ------------------------------------------------------------------------------------------------------ joined parts


def two_parts(mask=None):
    """Intervals over all columns, over a forward's own segments and over what is before them."""
    made = rows([21] * B, mask)
    whole, parts = segment_spans(made, 9, segment_length=7, mem_len=5)
    return whole, parts.own, parts.before


def joint(inputs, own, before, implementation="flash"):
    t = inputs["query"].shape[2]
    new = (x[:, :, -t:] for x in (inputs["key"], inputs["value"]))
    parts = [(*new, own, None), (inputs["key"], inputs["value"], before, None)]
    return attend_parts(inputs["query"], parts, implementation=implementation)


@pytest.mark.parametrize("padded", [False, True])
def test_parts_are_one_softmax(padded, kernels):
    """By the joint out and lse, without a gradient of lse: no kernel is given wider heads than the forward's."""
    whole, own, before = two_parts(ragged() if padded else None)
    inputs = inputs_over(whole, whole.lower.shape[1] + 9, b=B)
    weight = torch.randn(inputs["query"].shape[:3] + (6,), generator=torch.Generator().manual_seed(2)).double()
    out = joint(inputs, own, before)
    expected = attend_naive(*tensors(inputs).values(), whole)[0]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    found, right = (torch.autograd.grad((x * weight).sum(), list(tensors(inputs).values())) for x in (out, expected))
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert len(kernels["forward"]) == len(kernels["backward"]) == 2
    assert {call[0] for calls in kernels.values() for call in calls} == {16}


def test_parts_of_three_and_of_nothing(kernels):
    """A part that nobody sees, a query that sees no part, and one that sees a single one."""
    ends = ([0] * 4, [[-1] * 4, [2, 2, 2, -1]]), ([9] * 4, [[8] * 4] * 2), ([5] * 4, [[-1] * 4, [-1, 6, 6, -1]])
    some = [plain([lower] * 2, upper, 12)[0] for lower, upper in ends]
    inputs = inputs_over(some[0], 12)
    query, key, value = tensors(inputs).values()
    out = attend_parts(query, [(key, value, spans, None) for spans in some], implementation="flash")
    visible = sum(spans.visible(12).int() for spans in some)[:, None].bool()
    scores = (query @ key.mT * 10**-0.5).masked_fill(~visible, -1e30)
    expected = (scores.softmax(-1) * visible.any(-1, keepdim=True)) @ value
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    assert (out[0] == 0).all() and (out[1, :, 3] == 0).all()
    for x, y in zip(
        *(torch.autograd.grad(z.square().sum(), (query, key, value)) for z in (out, expected)), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_parts_of_other_implementations_are_joined_as_ever(kernels):
    whole, own, before = two_parts()
    inputs = inputs_over(whole, whole.lower.shape[1] + 9, b=B)
    expected = attend_naive(*tensors(inputs).values(), whole)[0]
    torch.testing.assert_close(joint(inputs, own, before, "auto"), expected, rtol=1e-10, atol=1e-10)
    assert not kernels["forward"]
    part = inputs["key"], inputs["value"], whole, None
    with pytest.raises(ValueError, match='implementation="flash" has no dropout; got 0.1; use implementation="auto"'):
        attend_parts(inputs["query"], [part] * 2, dropout=0.1, implementation="flash")


@pytest.mark.parametrize("frozen", ["query", "key", "value"])
def test_frozen_inputs(frozen, kernels):
    spans, s = KINDS["segments and memory"]()
    inputs = inputs_over(spans, s, b=B)
    tensors(inputs)[frozen].requires_grad_(False)
    named = {name: x for name, x in tensors(inputs).items() if x.requires_grad}
    grads = [
        torch.autograd.grad(function(*tensors(inputs).values(), spans)[0].square().sum(), named.values())
        for function in (flashed, attend_naive)
    ]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_gradcheck(kernels):
    spans, s = KINDS["segments and memory"]()
    inputs = inputs_over(spans, s, b=B, h=1, d=3, dv=2)

    def function(query, key, value):
        return flashed(query, key, value, spans)

    assert torch.autograd.gradcheck(function, tuple(tensors(inputs).values()), fast_mode=True)


def test_views_and_strides_do_not_matter(kernels):
    """The kernels read 16 bytes at a time: what lies otherwise is copied."""
    spans, s = KINDS["window"]()
    inputs = inputs_over(spans, s, b=B, d=8, dv=8)
    expected = run(attend_naive, inputs, spans)
    for name, x in list(inputs.items()):
        buffer = torch.full((x.shape[0], x.shape[2] + 3, x.shape[1], 21), math.nan, dtype=x.dtype)
        view = buffer[:, 1:-2, :, 3:19:2].transpose(1, 2)
        inputs[name] = view.copy_(x.detach()).requires_grad_()
    assert_same(run(flashed, inputs, spans), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, kernels):
    """Two parts are rounded once for each and once together; a gradient of lse enters with more than a half type's
    precision."""
    whole, own, before = two_parts()
    inputs = inputs_over(whole, whole.lower.shape[1] + 9, b=B, dtype=dtype)
    exact = {name: leaf(x.double()) for name, x in inputs.items()}
    limit = 4 * 2.0 ** (-7 if dtype == torch.bfloat16 else -9)
    found = torch.autograd.grad(joint(inputs, own, before).double().square().sum(), list(inputs.values()))
    right = torch.autograd.grad(joint(exact, own, before, "tiles").square().sum(), list(exact.values()))
    for x, y in zip(found, right, strict=True):
        assert x.dtype == dtype and (x.double() - y).norm() < limit * y.norm()
    found = torch.autograd.grad(flashed(*inputs.values(), whole)[1].double().square().sum(), list(inputs.values())[:2])
    right = torch.autograd.grad(attend_naive(*exact.values(), whole)[1].square().sum(), list(exact.values())[:2])
    for x, y in zip(found, right, strict=True):
        assert (x.double() - y).norm() < limit / 4 * y.norm()


# ------------------------------------------------------------------------------------------------- masks of a GPU


@pytest.mark.parametrize("window", [None, 6])
def test_rows_that_are_padded_by_a_mask_of_the_gpu(window, kernels, monkeypatch):
    """Intervals that all rows share are cut on the host; that padding sees nothing stays on the device."""
    ends, t = causal(rows(None, ragged()), window=window)
    spans = Spans(ends.lower, ends.upper, within=causal(Rows(B, t, None, None), window=window)[0])
    monkeypatch.setattr(attention_flash, "readable", lambda x: x is not spans.lower)
    inputs = inputs_over(spans, t)
    assert_same(run(flashed, inputs, spans), run(attend_naive, inputs, ends))
    assert kernels["forward"][0][-1] == B
    spans.within = None
    with pytest.raises(ValueError, match="the host knows.*mask.*auto"):
        flashed(*tensors(inputs).values(), spans)


def test_within_is_the_same_or_empty():
    """`Spans.within` holds what it promises, of rows whose ends a GPU holds."""
    found = Rows(2, 40, torch.ones(2, 40, dtype=torch.bool, device="meta"), None)
    p = found.positions
    spans = found.spans(p - 5, p, 3)
    assert (
        spans.lower.is_meta
        and torch.equal(spans.within.upper, p + 3)
        and torch.equal(spans.within.lower, (p - 5).clamp(min=0) + 3)
    )


# ------------------------------------------------------------------------------------------------------------ choice


def small(device="cpu", dtype=torch.bfloat16, d=8, **changes):
    x = torch.zeros(1, 1, 3, d, dtype=dtype, device=device)
    ends = torch.arange(3)[None]
    return Problem(x, x, x, Spans(torch.zeros_like(ends), ends), None, 1.0)._replace(**changes)


def test_flash_says_what_keeps_it(kernels, monkeypatch):
    table, (inputs, spans) = torch.zeros(1, 3), problem(b=2, h=1, t=40, s=50, d=1, dv=1)
    anything = Problem(*tensors(inputs).values(), spans, None, 1.0)
    for refused, message in (
        (small(dtype=torch.int8), "computes half types.*int8"),
        (small(d=249), "heads of 248 at most, got 249"),
        (small(position=Position(table, 2)), "has no term of positions"),
        (small(dropout=0.1), "has no dropout; got 0.1"),
        (anything, "one window for all rows or segments, a key in 4 of them at most"),
    ):
        with pytest.raises(ValueError, match=f'^implementation="flash" .*{message}.*; use implementation="auto"$'):
            choose(refused, "flash")
    assert choose(small(), "flash") == "flash" and choose(small(), "auto") == "tiles"
    monkeypatch.undo()
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=f'^implementation="flash" runs on CUDA; query is on {device}; use'):
            choose(small(device), "flash")


def test_full_precision_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(attention_flash, "KINDS", (torch.bfloat16, torch.float16))
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=f"half types.*{dtype}"):
            choose(small(dtype=dtype), "flash")


def test_the_rule_reads_no_gpu(monkeypatch):
    """Neither does what the kernels are told: on the device meta a tensor that is asked for a number raises."""
    monkeypatch.setattr(attention_flash, "lacks", lambda device: None)
    given = small("meta")
    query = given.query.requires_grad_()
    assert choose(given, "flash") == "flash"
    out, lse = attention_flash.attend_flash(given)
    out.sum().backward()
    assert out.is_meta and lse.is_meta and query.grad.is_meta
    mask = torch.ones(1, 3, dtype=torch.bool, device="meta")
    found = Rows(1, 3, mask, None)
    spans = found.spans(torch.zeros_like(found.positions), found.positions, 0)
    assert choose(given._replace(spans=spans), "flash") == "flash"
    attention_flash.attend_flash(given._replace(spans=spans))[0].sum().backward()


# -------------------------------------------------------------------------------------------------------- by itself


def test_it_is_chosen_where_it_serves(gpu, monkeypatch):
    """In half types, plain windows, eager forwards, unless torch is asked for the same bits each time."""
    monkeypatch.setattr(attention_flash, "KINDS", (torch.bfloat16, torch.float16))
    with torch.inference_mode():  # where it is tried first, gradients and all
        assert choose(small(), "auto") == "flash" and choose(small(dtype=torch.float16), "eager") == "flash"
    inputs, spans = problem(b=2, h=1, t=40, s=50, d=1, dv=1, dtype=torch.bfloat16)
    others = [
        small(dtype=torch.float32), small(d=249), small(position=Position(torch.zeros(1, 3), 2)), small(dropout=0.1),
        small()._replace(key=small(dtype=torch.float32).key), Problem(*tensors(inputs).values(), spans, None, 1.0),
    ]  # fmt: skip
    assert [choose(x, "auto") for x in others] == ["triton"] * len(others)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert choose(small(), "auto") == "triton" and choose(small(), "flash") == "flash"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert choose(small(), "auto") == "triton"
    with monkeypatch.context() as patch:
        patch.setattr(attention, "why_not_decode", lambda problem: None)
        assert choose(small(), "auto") == "decode"


def wrong_window(monkeypatch):
    monkeypatch.setattr(flash, "visible", lambda q, k, left, *rest: torch.ones(q, k).tril(k - q).bool())


def no_lse(monkeypatch):
    real = torch.ops.aten._flash_attention_forward
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", lambda *x, **more: (real(*x, **more)[0],))


def other_parameters(monkeypatch):
    def changed(query, key, value, scale):
        raise AssertionError

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", changed)


def no_gradient(monkeypatch):
    real = torch.ops.aten._flash_attention_backward

    def changed(*x, **more):
        grads = real(*x, **more)
        return *grads[:2], torch.full_like(grads[2], math.nan)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", changed)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrong_window, r"its relative error is 0\.\d"),
        (no_gradient, "its relative error is nan"),
        (no_lse, "ValueError: "),
        (other_parameters, "TypeError: "),
    ],
)
def test_it_is_tried_before_it_is_chosen(change, reason, gpu, monkeypatch):
    """Once, and it is said why another is chosen."""
    change(monkeypatch)
    with pytest.warns(UserWarning, match=f"FlashAttention is not used on cpu, as a trial of it failed: {reason}"):
        assert choose(small(), "auto") == "triton"
    calls = len(gpu["forward"])
    assert choose(small(), "auto") == "triton" and len(gpu["forward"]) == calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_first_forward_under_checkpoints(reentrant, gpu):
    """A checkpoint, which counts what a forward saves, sees nothing of the trial."""
    variant = next(v for v in VARIANTS if v.name == "transformer")
    model, ids = runner(variant, "causal", attention_dropout=0.0).model.train(), words(2, 17)
    checkpoint_activations(model, {"use_reentrant": reentrant})
    model(input_ids=ids, labels=ids).loss.backward()
    assert gpu["backward"] and flash_is_right(torch.device("cpu"))


def test_transforms_of_functions_are_not_for_it():
    seen = []
    torch.func.vmap(lambda x: seen.append(attention._is_plain(x)) or x)(torch.randn(2, 3))
    torch.func.grad(lambda x: seen.append(attention._is_plain(x)) or x.sum())(torch.randn(3))
    assert seen == [False, False]


def test_no_rows(gpu):
    x = torch.zeros(0, 2, 5, 8, dtype=torch.bfloat16)
    p = torch.arange(5)[None]
    out, lse = flashed(x, x, x, Spans(0 * p, p))
    assert out.shape == x.shape and lse.shape == (0, 2, 5)


def test_parts_of_which_it_serves_one(gpu):
    """One softmax: where another part has a term, it takes no share, since lse would need a gradient."""
    p = torch.arange(12)[None]
    own, before = Spans(p - p % 4, p), Spans((p - p % 4 - 4).clamp(min=0), p - p % 4 - 1)
    inputs = inputs_over(own, 12)
    assert flash_is_right(torch.device("cpu"))
    gpu["forward"].clear()
    for table, times in ((None, 2), (torch.randn(3, 12, dtype=torch.float64), 0)):
        query, key, value = tensors(inputs).values()
        position = None if table is None else Position(table, 11)
        found = attend_parts(query, [(key, value, own, None), (key, value, before, position)])
        assert len(gpu["forward"]) == times
        gpu["forward"].clear()
        parts = [
            attend(query, key, value, spans, position=term, return_lse=True, implementation="tiles")
            for spans, term in ((own, None), (before, position))
        ]
        assert_equal(found, attention.joined(*parts))


@over()
def test_models_run_by_what_is_best(variant, head, gpu):
    """Layers that it serves by it, all others by the gallery's own."""
    run, ids, mask = padded(variant, head, dtype=torch.float64)
    expected = step(run, ids, mask, "tiles")
    assert flash_is_right(torch.device("cpu"))
    gpu["forward"].clear()
    found = step(run, ids, mask, "eager")
    assert gpu["forward"] or because(variant, head) is not None
    assert_same_step(found, expected)


# ------------------------------------------------------------------------------------------------------------ models

# Without a term of positions, but with memory tokens that see all of their segment between tokens that do not.
REFUSED = {"recurrent_memory": ("causal", "decoder")}


def because(variant, head):
    """The reason in which a model's attention is refused."""
    config = variant.make_config(head)
    relative = (
        getattr(config, "position_embedding_type", "") == "relative" or getattr(config, "num_positions", 0) is None
    )
    if relative or variant.name.startswith(("transformer_xl", "block_recurrent")):
        return "has no term of positions"
    return "has one window for all rows or segments" if head in REFUSED.get(variant.name, ()) else None


def step(run, ids, mask, implementation):
    """The result of a forward in training, and its gradients."""
    run.model.set_attn_implementation(implementation)
    return training_step(run, ids, mask)


@over()
def test_models_run_by_it_or_say_why_not(variant, head, kernels):
    """Padded rows and gradients: as the tiles do, or refused in words, and never something else."""
    run, ids, mask = padded(variant, head, dtype=torch.float64)
    expected = step(run, ids, mask, "tiles")
    if (reason := because(variant, head)) is not None:
        with pytest.raises(ValueError, match=f'^implementation="flash" {reason}.*; use implementation="auto"$'):
            step(run, ids, mask, "flash")
        return
    found = step(run, ids, mask, "flash")
    assert kernels["forward"] and kernels["backward"]
    assert_same_step(found, expected)


def served(**options):
    return causal_variants(lambda variant: because(variant, "causal") is None, **options)


@served()
@torch.no_grad()
def test_models_decode_by_it(variant, kernels):
    """Behind a cache: a prompt in two parts, and tokens one by one, of rows of unequal lengths."""
    found = []
    for implementation in ("tiles", "flash"):
        run = runner(variant, "causal", dtype=torch.float64, attn_implementation=implementation)
        ids, mask, cache = words(2, 26), torch.ones(2, 26, dtype=torch.long), None
        mask[0, :5] = 0
        logits = []
        for start, end in ((0, 13), (13, 23), (23, 24), (24, 25), (25, 26)):
            output = run.model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits * mask[:, start:end, None])
        found.append(torch.cat(logits, 1))
    assert_equal(*reversed(found))
    assert kernels["forward"]


@served()
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_the_host_reads_nothing_in_training(variant, masked, monkeypatch):
    """On the device meta, as on a GPU: with a mask those run in whose intervals the ends of rows decide nothing."""
    monkeypatch.setattr(attention_flash, "lacks", lambda device: None)
    monkeypatch.setattr(attention_flash, "KINDS", (torch.float32,))
    model = variant.make("causal", attention_dropout=0.0, attn_implementation="flash").train().to("meta")
    ids = torch.zeros(2, 23, dtype=torch.long, device="meta")
    given = dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids) if masked else None)
    if masked and variant.name in ("longformer", "recurrent_memory_gpt2"):
        with pytest.raises(ValueError, match='^implementation="flash" needs intervals that the host knows'):
            model(**given)
    else:
        model(**given).loss.backward()


@served(others_slow=True)
def test_a_training_step_is_one_graph(variant, kernels):
    """The operators ask the intervals when the graph runs, which holds them whole; rows are padded."""
    run = runner(variant, "causal", hidden_dropout=0.0, attention_dropout=0.0, attn_implementation="flash")
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 11:] = mask[1, :3] = 0
    assert_trains_alike_in_one_graph(run.model.train(), words(2, 17), mask)


@pytest.mark.slow
def test_several_graphs_leave_it_out(kernels):
    """Without fullgraph, behind a cache: what asks the intervals is no part of any graph."""
    run = runner(next(v for v in VARIANTS if v.name == "transformer_segments"), "causal", attn_implementation="flash")
    torch.compiler.reset()
    graph, ids, found = torch.compile(run.model, backend="eager"), words(2, 17), []
    with torch.no_grad():
        for forward in (run.model, graph):
            cache = forward(input_ids=ids[:, :9], use_cache=True).past_key_values
            found.append(forward(input_ids=ids[:, 9:], past_key_values=cache, use_cache=True).logits)
    assert_equal(*found)


def test_one_graph_needs_intervals_of_the_cpu(kernels, monkeypatch):
    monkeypatch.setattr(attention_flash, "in_one_graph", lambda: True)
    assert choose(small(spans=problem(b=1, h=1, t=3, s=3, d=1, dv=1)[1]), "flash") == "flash"
    with pytest.raises(ValueError, match="in one graph those of padded rows are on the GPU"):
        choose(small(spans=Spans(*torch.zeros(2, 1, 3, dtype=torch.long, device="meta"))), "flash")


def test_a_graph_refuses_intervals_when_it_runs(kernels):
    inputs, spans = problem(b=2, h=1, t=40, s=50, d=1, dv=1, dtype=torch.float32)
    call = torch.compile(whole_graph, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="one window for all rows or segments"):
        call(*tensors(inputs).values(), spans.lower, spans.upper)


def whole_graph(query, key, value, lower, upper):
    return compile_whole(lambda: attend(query, key, value, Spans(lower, upper), implementation="flash"))


# ---------------------------------------------------------------------------------------------------------- on a GPU


def test_the_eval_compares_them(kernels):
    """Its cases are right here, by its own limits, and wrong where a window does not end."""
    from eval import gpu

    for name in gpu.FLASH:
        errors = gpu._flash_case(name)
        assert errors.keys() == {"out", "gradients of out", "gradients of both"} and gpu._within(name, errors), name
    name = "flash, before the query"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "visible", lambda q, k, left, *rest: torch.ones(q, k).tril(k - q).bool())
        assert not gpu._within(name, gpu._flash_case(name))


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or attention_flash.lacks(torch.device("cuda")) is not None,
    reason="there is no GPU here that torch's FlashAttention runs on",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_themselves(dtype):
    """As on the CPU, by torch's own kernels: out, lse and the gradients of both, of every kind of interval."""
    limit = {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for kind, make in KINDS.items():
        spans, s = make()
        inputs = {name: leaf(x.cuda()) for name, x in inputs_over(spans, s, b=B, d=60, dv=64, dtype=dtype).items()}
        exact = {name: leaf(x.double()) for name, x in inputs.items()}
        found = []
        for function, x in ((flashed, inputs), (attend_naive, exact)):
            out, lse = function(*x.values(), spans)[:2]
            generator = torch.Generator().manual_seed(5)
            weights = [torch.randn(y.shape, generator=generator).to(y) for y in (out, lse)]
            total = (out * weights[0]).double().sum() + (lse.masked_fill(lse == -math.inf, 0.0) * weights[1]).sum()
            found.append([out, lse, *torch.autograd.grad(total, list(x.values()))])
        for x, right in zip(*found, strict=True):
            assert torch.equal(x == -math.inf, right == -math.inf), kind
            x, right = x.double().nan_to_num(neginf=0.0), right.nan_to_num(neginf=0.0)
            assert (x - right).norm() <= limit * right.norm(), kind


@needs_gpu
def test_the_kernels_join_parts():
    whole, own, before = two_parts()
    inputs = inputs_over(whole, whole.lower.shape[1] + 9, b=B, d=64, dv=64, dtype=torch.bfloat16)
    inputs = {name: leaf(x.cuda()) for name, x in inputs.items()}
    exact = {name: leaf(x.double()) for name, x in inputs.items()}
    found, right = joint(inputs, own, before), attend_naive(*exact.values(), whole)[0]
    assert (found.double() - right).norm() <= 2e-2 * right.norm()
    grads = (torch.autograd.grad(x.square().sum(), list(y.values())) for x, y in ((found, inputs), (right, exact)))
    for x, y in zip(*grads, strict=True):
        assert (x.double() - y).norm() <= 2e-2 * y.norm()
