"""The tiled attention against its definition: values, gradients, half types, dropout, cost and errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measure import cost_of
from torch.utils.checkpoint import checkpoint

from hf_gallery.models import attention_tiles
from hf_gallery.models.attention import Position, attend, attend_naive
from hf_gallery.models.spans import Spans

# Sizes that divide nothing. The large ones cross the tiles of queries, of keys and of batch rows.
SHAPES = {
    "one query": dict(b=1, h=1, t=1, s=1, d=1, dv=1),
    "decode": dict(b=3, h=3, t=1, s=131, d=10, dv=10),
    "chunk": dict(b=2, h=3, t=23, s=61, d=7, dv=5),
    "square": dict(b=2, h=2, t=197, s=197, d=5, dv=5),
    "tall": dict(b=1, h=2, t=141, s=37, d=3, dv=4),
    "rows apart": dict(b=5, h=3, t=131, s=331, d=6, dv=6),
    "many heads": dict(b=2, h=16, t=133, s=601, d=3, dv=3),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
positions = pytest.mark.parametrize("position", ["none", "bias", "query"])


def problem(*, b, h, t, s, d, dv, position="none", band=None, shared_spans=False, dtype=torch.float64, seed=0):
    """Random inputs that require gradients, as the arguments of attend. `band`: intervals of about that many keys."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    rows = 1 if shared_spans else b
    if band is None:  # anything, with empty ones, and ends that stick out of [0, s)
        lower = torch.randint(-3, s + 2, (rows, t), generator=g)
        upper = torch.randint(-3, s + 2, (rows, t), generator=g)
        swap = torch.rand(rows, t, generator=g) < 0.7  # most are not empty
        lower, upper = torch.where(swap, lower.minimum(upper), lower), torch.where(swap, lower.maximum(upper), upper)
    else:
        middle = torch.arange(s - t, s) + torch.randint(-2, 3, (rows, t), generator=g)
        lower = middle - torch.randint(0, band, (rows, t), generator=g)
        upper = middle + torch.randint(-1, 3, (rows, t), generator=g)
    inputs = dict(query=2 * normal(b, h, t, d), key=2 * normal(b, h, s, d), value=normal(b, h, s, dv))
    if position != "none":
        size = (h, s + t - 1) if position == "bias" else (h, s + t - 1, d)  # rows for every pair (t, s)
        inputs["position"] = Position(2 * normal(*size), s - 1, normal(b, h, t, d) if position == "query" else None)
    inputs = {k: leaf(x) if isinstance(x, torch.Tensor) else Position(*map(leaf, x)) for k, x in inputs.items()}
    return inputs, Spans(lower, upper)


def leaf(x):
    return x.detach().requires_grad_() if isinstance(x, torch.Tensor) else x


def tensors(inputs):
    """The tensors of a problem, by name."""
    named = {k: x for k, x in inputs.items() if isinstance(x, torch.Tensor)}
    if "position" in inputs:
        table, _, query = inputs["position"]
        named |= {"table": table} | ({} if query is None else {"position_query": query})
    return named


def run(function, inputs, spans, **options):
    """out and lse of the function, and the gradient of a fixed random functional of both for every input."""
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    out, lse = function(query, key, value, spans, position=inputs.get("position"), **options)[:2]
    g = torch.Generator().manual_seed(11)
    total = (out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)).sum()
    weight = torch.randn(lse.shape, generator=g, dtype=torch.float64).to(lse.dtype)
    total = total + (lse.masked_fill(lse == -math.inf, 0.0) * weight).sum()
    named = tensors(inputs)
    gradients = torch.autograd.grad(total, named.values(), allow_unused=True, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(named, gradients, strict=True))


def tiled(*arguments, **options):
    return attend(*arguments, return_lse=True, **options)


def assert_same(got, expected, rtol=1e-10, atol=1e-10):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def by_definition(query, key, value, spans, *, position=None, scale=None):
    """attend, one (query, key) pair at a time, in the order of the formula."""
    b, h, t, d = query.shape
    s = key.shape[2]
    scale = d**-0.5 if scale is None else scale
    outs, lses = [], []
    for place in ((i, j, k) for i in range(b) for j in range(h) for k in range(t)):
        i, j, k = place
        row = i if spans.lower.shape[0] > 1 else 0
        seen = [c for c in range(s) if spans.lower[row, k] <= c <= spans.upper[row, k]]
        scores = []
        for c in seen:
            score = (query[i, j, k] * key[i, j, c]).sum()
            if position is not None:
                entry = position.table[j, position.farthest - (s - t + k - c)]
                score = score + (entry if position.query is None else (position.query[i, j, k] * entry).sum())
            scores.append(score * scale)
        if seen:
            weights = torch.stack(scores).softmax(0)
            outs.append(sum(w * value[i, j, c] for w, c in zip(weights, seen, strict=True)))
            lses.append(torch.stack(scores).exp().sum().log())
        else:
            outs.append(value.new_zeros(value.shape[-1]))
            lses.append(value.new_full((), -math.inf))
    return torch.stack(outs).view(b, h, t, -1), torch.stack(lses).view(b, h, t)


# ------------------------------------------------------------------------------------------------- the definition


@positions
@pytest.mark.parametrize("shared_spans", [True, False], ids=["shared", "per row"])
@pytest.mark.parametrize("function", [tiled, attend_naive], ids=["attend", "attend_naive"])
def test_equals_the_double_loop(function, shared_spans, position):
    """Values and gradients, with empty intervals and T greater and smaller than S."""
    for t, s in ((6, 9), (9, 6), (1, 5)):
        inputs, spans = problem(b=2, h=2, t=t, s=s, d=3, dv=4, position=position, shared_spans=shared_spans)
        for scale in (None, 0.7):
            expected = run(by_definition, inputs, spans, scale=scale)
            assert_same(run(function, inputs, spans, scale=scale), expected)


@positions
@shapes
def test_equals_naive(shape, position):
    inputs, spans = problem(**shape, position=position)
    assert_same(run(tiled, inputs, spans), run(attend_naive, inputs, spans))


@positions
@pytest.mark.parametrize("band", [1, 20, 90])
def test_equals_naive_on_a_band(band, position):
    """Narrow intervals near the diagonal: most tiles are skipped."""
    inputs, spans = problem(b=3, h=2, t=403, s=467, d=5, dv=5, position=position, band=band)
    assert_same(run(tiled, inputs, spans), run(attend_naive, inputs, spans))


@given(
    b=st.integers(1, 4),
    h=st.integers(1, 3),
    t=st.integers(1, 150),
    s=st.integers(1, 150),
    position=st.sampled_from(["none", "bias", "query"]),
    band=st.none() | st.integers(1, 70),
    shared_spans=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_equals_naive_on_any_problem(**options):
    inputs, spans = problem(d=3, dv=2, **options)
    assert_same(run(tiled, inputs, spans), run(attend_naive, inputs, spans))


def test_many_keys_for_one_query():
    """The keys of one tile of queries span several tiles of keys, with the largest score first, last and between."""
    for at in (0, 1700, 3000):
        inputs, spans = problem(b=1, h=8, t=70, s=3001, d=3, dv=3, band=2990)
        inputs["key"].data[:, :, at] *= 30
        assert_same(run(tiled, inputs, spans), run(attend_naive, inputs, spans))


@positions
def test_probabilities_of_naive_are_those_of_the_result(position):
    inputs, spans = problem(**SHAPES["chunk"], position=position)
    arguments = inputs["query"], inputs["key"], inputs["value"], spans
    out, lse, probabilities = attend_naive(*arguments, position=inputs.get("position"))
    visible = spans.visible(61)[:, None].expand_as(probabilities)
    assert (probabilities[~visible] == 0).all() and (probabilities[visible] > 0).all()
    torch.testing.assert_close(probabilities.sum(-1), (lse > -math.inf).double(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attend(*arguments, position=inputs.get("position")), probabilities @ inputs["value"])


@positions
def test_gradcheck(position):
    """Finite differences in float64, through out and lse together."""
    inputs, spans = problem(b=2, h=2, t=5, s=7, d=3, dv=2, position=position, seed=3)

    def function(query, key, value, table=None, position_query=None):
        place = None if table is None else Position(table, inputs["position"].farthest, position_query)
        out, lse = attend(query, key, value, spans, position=place, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, tuple(tensors(inputs).values()))


@pytest.mark.parametrize("use", ["out", "lse"])
def test_gradient_when_one_result_is_used(use):
    """Autograd hands no gradient for a result that nobody used."""
    inputs, spans = problem(**SHAPES["chunk"], position="query")
    grads = []
    for function in (tiled, attend_naive):
        results = function(inputs["query"], inputs["key"], inputs["value"], spans, position=inputs["position"])
        result = results[0] if use == "out" else results[1].masked_fill(results[1] == -math.inf, 0.0)
        named = tensors(inputs)
        given = torch.autograd.grad(result.square().sum(), named.values(), allow_unused=True, materialize_grads=True)
        grads.append(dict(zip(named, given, strict=True)))
    assert_same(*grads)


@pytest.mark.parametrize("frozen", ["query", "key", "value", "table", "position_query"])
def test_gradient_with_a_frozen_input(frozen):
    inputs, spans = problem(**SHAPES["chunk"], position="query")
    expected = run(attend_naive, inputs, spans)
    tensors(inputs)[frozen].requires_grad_(False)
    named = {k: x for k, x in tensors(inputs).items() if x.requires_grad}
    out, lse = tiled(inputs["query"], inputs["key"], inputs["value"], spans, position=inputs["position"])
    g = torch.Generator().manual_seed(11)
    total = (out * torch.randn(out.shape, generator=g, dtype=torch.float64)).sum()
    total = (
        total
        + (lse.masked_fill(lse == -math.inf, 0.0) * torch.randn(lse.shape, generator=g, dtype=torch.float64)).sum()
    )
    got = dict(zip(named, torch.autograd.grad(total, named.values()), strict=True))
    assert_same(got, {k: expected[k] for k in named})


@positions
def test_views_and_strides_do_not_matter(position):
    """Heads are usually a transposed view, and keys a slice of a longer buffer."""
    inputs, spans = problem(**SHAPES["chunk"], position=position)
    expected = run(tiled, inputs, spans)
    strided = dict(inputs)
    for name in ("query", "key", "value"):
        x = inputs[name].detach()
        buffer = torch.full((x.shape[0], x.shape[2] + 9, x.shape[1], 2 * x.shape[3]), math.nan, dtype=x.dtype)
        view = buffer[:, 4:-5, :, ::2].transpose(1, 2)
        view.copy_(x)
        strided[name] = view.requires_grad_()
    assert_same(run(tiled, strided, spans), expected, rtol=1e-12, atol=1e-12)


def test_expanded_gradient_and_heads_in_common():
    """sum() hands the backward a gradient of stride 0; keys expanded over heads (one key head) sum their gradient."""
    inputs, spans = problem(**SHAPES["chunk"])
    one = leaf(inputs["key"][:, :1])
    grads = []
    for function in (attend, attend_naive):
        out = function(inputs["query"], one.expand(-1, 3, -1, -1), inputs["value"], spans)
        out = out[0] if isinstance(out, tuple) else out
        grads.append(torch.autograd.grad(out.sum(), (inputs["query"], one, inputs["value"])))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


# --------------------------------------------------------------------------------------------------- what is unseen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("garbage", [1e4, -1e4])
def test_keys_outside_every_interval_leave_no_trace(garbage, implementation):
    """Padding and columns that nobody sees may hold any number that a cache leaves there."""
    inputs, spans = problem(b=2, h=3, t=150, s=200, d=5, dv=5)
    spans = Spans(spans.lower.clamp(min=70), spans.upper.clamp(max=129))  # tiles of 64 hold seen and unseen keys
    options = dict(implementation=implementation)
    expected = attend(inputs["query"], inputs["key"], inputs["value"], spans, **options)
    for name in ("key", "value"):
        inputs[name].data[:, :, :70] = garbage
        inputs[name].data[:, :, 130:] = garbage
    got = attend(inputs["query"], inputs["key"], inputs["value"], spans, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(got.square().sum(), (inputs["key"], inputs["value"]))
    for gradient in gradients:
        assert (gradient[:, :, :70] == 0).all() and (gradient[:, :, 130:] == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_query_that_sees_nothing_gives_zeros(implementation):
    """Also when the whole row, the whole tile and the whole problem see nothing."""
    for t, s in ((3, 5), (150, 170)):
        for empty in (slice(0, 1), slice(0, 70), slice(0, t)):
            inputs, _ = problem(b=2, h=2, t=t, s=s, d=3, dv=4)
            lower, upper = torch.zeros(2, t, dtype=torch.long), torch.full((2, t), s - 1)
            upper[0, empty] = -1
            out = attend(
                inputs["query"], inputs["key"], inputs["value"], Spans(lower, upper), implementation=implementation
            )
            assert (out[0, :, empty] == 0).all() and (out[1] != 0).all()
            gradient = torch.autograd.grad(out.sum(), inputs["query"])[0]
            assert gradient.isfinite().all() and (gradient[0, :, empty] == 0).all()
    _, lse = attend(inputs["query"], inputs["key"], inputs["value"], Spans(lower, upper), return_lse=True)
    assert (lse[0] == -math.inf).all() and lse[1].isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_no_keys_at_all(implementation):
    query, key, value = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 0, 5), torch.randn(2, 3, 0, 6)
    spans = Spans(torch.zeros(1, 4, dtype=torch.long), torch.full((1, 4), -1))
    out = attend(query, key, value, spans, implementation=implementation)
    assert out.shape == (2, 3, 4, 6) and (out == 0).all()


def test_large_scores_do_not_overflow():
    inputs, spans = problem(**SHAPES["chunk"], dtype=torch.float32)
    inputs["query"].data.mul_(1e3)
    inputs["key"].data.mul_(1e3)
    got, expected = run(tiled, inputs, spans), run(attend_naive, inputs, spans)
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")
    torch.testing.assert_close(got["out"], expected["out"], rtol=1e-4, atol=1e-5)


def test_the_position_of_a_query_is_counted_from_the_last_key():
    """Query t stands at column S - T + t; the table's row is far - distance."""
    t, s = 4, 9
    query = torch.zeros(1, 1, t, 2, dtype=torch.float64)
    key, value = torch.zeros(1, 1, s, 2, dtype=torch.float64), torch.eye(s, dtype=torch.float64)[None, None]
    table = torch.full((1, s + t - 1), -50.0, dtype=torch.float64)
    table[0, s - 1 - 3] = 0.0  # all weight on the key three before
    lower, upper = torch.zeros(1, t, dtype=torch.long), torch.full((1, t), s - 1)
    out = attend(query, key, value, Spans(lower, upper), position=Position(table, s - 1), scale=1.0)
    assert out.argmax(-1).tolist() == [[[2, 3, 4, 5]]]


def test_join_of_disjoint_keys_is_one_softmax():
    from hf_gallery.models.attention import join

    inputs, _ = problem(**SHAPES["chunk"])
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    g = torch.Generator().manual_seed(5)
    cut = torch.randint(0, 62, (2, 23), generator=g)  # 0 and 61: one side is empty
    cut[0, :2] = torch.tensor([0, 61])
    start, end = torch.zeros_like(cut), torch.full_like(cut, 60)
    both = [attend(query, key, value, Spans(*x), return_lse=True) for x in ((start, cut - 1), (cut, end))]
    results = []
    for out, lse in (join(*both), attend(query, key, value, Spans(start, end), return_lse=True)):
        total = out.square().sum() + (lse * torch.arange(23)).sum()
        results.append((out, lse, *torch.autograd.grad(total, (query, key, value), retain_graph=True)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    nothing = attend(query, key, value, Spans(start, start - 1), return_lse=True)
    out, lse = join(nothing, nothing)
    assert (out == 0).all() and (lse == -math.inf).all()


# -------------------------------------------------------------------------------------------------------- half types


# The result is rounded once to the half type; its gradients carry the rounding of the inputs' product in float32.
HALF = [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 2**-7, 2**-7), (torch.float16, 2**-9, 2**-9)]


@positions
@pytest.mark.parametrize(("dtype", "rtol", "atol"), HALF, ids=["float32", "bfloat16", "float16"])
def test_lower_precision(dtype, rtol, atol, factors, position):
    """Against float64 on the same (rounded) inputs: scores and sums are float32, whatever the input and the CPU."""
    inputs, spans = problem(b=2, h=3, t=130, s=192, d=10, dv=6, position=position, dtype=dtype)
    exact = {k: leaf(x.double()) for k, x in inputs.items() if k != "position"}
    if position != "none":
        table, far, query = inputs["position"]
        exact["position"] = Position(leaf(table.double()), far, None if query is None else leaf(query.double()))
    got, expected = run(tiled, inputs, spans), run(attend_naive, exact, spans)
    assert got["out"].dtype == dtype and got["lse"].dtype == torch.float32 and got["key"].dtype == dtype
    torch.testing.assert_close(got["out"].double(), expected["out"], rtol=rtol, atol=atol)
    torch.testing.assert_close(got["lse"].double(), expected["lse"], rtol=1e-4, atol=1e-4)
    for name in tensors(inputs):
        # the functional's weights are rounded too, so gradients differ by that rounding relative to their size
        error = (got[name].double() - expected[name]).norm() / expected[name].norm()
        assert error < 4 * rtol, (name, error)


@pytest.fixture
def factors(monkeypatch):
    """On a CPU that multiplies bfloat16: the types of the factors of products."""
    monkeypatch.setattr(attention_tiles, "multiplies_bfloat16", lambda: True)
    kinds, real = set(), attention_tiles._Scorer.factor

    def factor(self, x):
        found = real(self, x)
        kinds.add(found.dtype)
        return found

    monkeypatch.setattr(attention_tiles._Scorer, "factor", factor)
    return kinds


@positions
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_factors_are_rounded_in_even_tiles(factors, dropout, position, monkeypatch):
    """The results are those of factors in float32, but for roundings."""
    inputs, spans = problem(b=2, h=3, t=130, s=192, d=10, dv=6, position=position, dtype=torch.bfloat16)
    found = []
    for rounds in (True, False):
        monkeypatch.setattr(attention_tiles, "multiplies_bfloat16", lambda rounds=rounds: rounds)
        torch.manual_seed(0)
        found.append(run(tiled, inputs, spans, dropout=dropout))
        assert factors == {torch.bfloat16, torch.float32} if rounds else {torch.float32}
        factors.clear()
    for name, exact in found[1].items():
        exact = exact.float()
        error = (found[0][name].float() - exact).nan_to_num(0.0).norm() / exact.nan_to_num(0.0).norm()
        assert error < 2**-6, (name, error)


def test_only_bfloat16_is_rounded_to_it(factors):
    """Not values in float32, as a cache of that type has them, nor what is in float16."""
    inputs, spans = problem(b=2, h=3, t=130, s=192, d=10, dv=6, dtype=torch.bfloat16)
    run(tiled, inputs | {"value": leaf(inputs["value"].float())}, spans)
    run(tiled, {name: leaf(x.half()) for name, x in inputs.items()}, spans)
    assert factors == {torch.float32}


def test_autocast_leaves_the_softmax_in_float32():
    inputs, spans = problem(**SHAPES["chunk"], dtype=torch.float32)
    expected = run(tiled, inputs, spans)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(tiled, inputs, spans)
    assert_same(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@positions
@torch.no_grad()
def test_autocast_leaves_one_query_in_float32(position, dtype):
    """A decode step without gradients has a path of its own."""
    sizes = SHAPES["chunk"] | dict(t=1)
    inputs, spans = problem(**sizes, position=position, dtype=torch.float32)
    arguments = inputs["query"], inputs["key"], inputs["value"], spans
    expected = attend(*arguments, position=inputs.get("position"), implementation="tiles")
    with torch.autocast("cpu", dtype=dtype):
        got = attend(*arguments, position=inputs.get("position"), implementation="tiles")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- dropout


def probabilities_of(inputs, spans, dropout, seed=0):
    """The weights that were used, read off with the identity as values."""
    s = inputs["key"].shape[2]
    eye = torch.eye(s, dtype=inputs["key"].dtype).expand(*inputs["key"].shape[:2], s, s)
    torch.manual_seed(seed)
    return attend(inputs["query"], inputs["key"], eye, spans, position=inputs.get("position"), dropout=dropout)


@positions
def test_dropout_keeps_a_share_and_scales_it(position):
    inputs, spans = problem(b=3, h=4, t=150, s=170, d=3, dv=2, position=position)
    whole, dropped = probabilities_of(inputs, spans, 0.0), probabilities_of(inputs, spans, 0.3)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.7, rtol=1e-9, atol=0.0)
    seen = whole > 1e-12
    assert abs(kept[seen].double().mean() - 0.7) < 0.01


def test_dropout_draws_are_independent():
    """No two rows, heads, tiles or calls share their draw: a pattern that repeats at some lag would show."""
    inputs, _ = problem(b=3, h=16, t=140, s=700, d=2, dv=2, dtype=torch.float32)
    spans = Spans(torch.zeros(1, 140, dtype=torch.long), torch.full((1, 140), 699))
    with torch.no_grad():
        mask, again, other = ((probabilities_of(inputs, spans, 0.5, seed) != 0).float() - 0.5 for seed in (0, 0, 1))
    assert torch.equal(mask, again)
    assert abs((mask * other).mean()) * 4 < 5 / math.sqrt(mask.numel())
    lines = mask.flatten(0, 1).view(48, -1)
    products = (lines @ lines.T / lines.shape[1] * 4).fill_diagonal_(0.0)
    assert products.abs().max() < 6 / math.sqrt(lines.shape[1])  # rows and heads
    for dim in (-1, -2):  # keys and queries
        n = mask.shape[dim]
        spectrum = torch.fft.rfft(mask, n=2 * n, dim=dim)
        lags = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=dim).movedim(dim, -1)[..., 1:n]
        pairs = torch.arange(n - 1, 0, -1) * (mask.numel() // n)
        lags = lags.sum(dim=(0, 1, 2)) * 4 / pairs
        assert (lags.abs() * pairs.sqrt()).max() < 6


def test_dropout_is_right_on_average():
    inputs, spans = problem(b=1, h=2, t=30, s=40, d=3, dv=4)
    expected = attend(inputs["query"], inputs["key"], inputs["value"], spans)
    draws = [attend(inputs["query"], inputs["key"], inputs["value"], spans, dropout=0.2) for _ in range(2000)]
    draws = torch.stack(draws)
    error = (draws.mean(0) - expected) / (draws.std(0) / math.sqrt(2000)).clamp(min=1e-9)
    assert error.abs().max() < 5.5 and 0.8 < error[error != 0].std() < 1.2


def test_dropout_leaves_the_log_sum_exp():
    inputs, spans = problem(**SHAPES["chunk"])
    arguments = inputs["query"], inputs["key"], inputs["value"], spans
    _, lse = attend(*arguments, return_lse=True, dropout=0.5)
    assert torch.equal(lse, attend(*arguments, return_lse=True)[1])


@positions
def test_gradcheck_with_dropout(position):
    """Under one seed the function is smooth, and the backward must use the mask of the forward."""
    inputs, spans = problem(b=2, h=2, t=5, s=7, d=3, dv=2, position=position, seed=3)

    def function(query, key, value, table=None, position_query=None):
        torch.manual_seed(5)
        place = None if table is None else Position(table, inputs["position"].farthest, position_query)
        return attend(query, key, value, spans, position=place, dropout=0.4)

    assert torch.autograd.gradcheck(function, tuple(tensors(inputs).values()))


def test_dropout_gradient_over_many_tiles():
    """A directional derivative, where the tiles are many and rows come in groups."""
    inputs, spans = problem(b=4, h=16, t=140, s=300, d=3, dv=3, position="query")
    named = tensors(inputs)
    directions = {name: torch.randn_like(x) for name, x in named.items()}
    weight = torch.randn(4, 16, 140, 3, dtype=torch.float64)

    def function(step):
        moved = {name: leaf(x.detach() + step * directions[name]) for name, x in named.items()}
        torch.manual_seed(9)
        place = Position(moved["table"], inputs["position"].farthest, moved["position_query"])
        out = attend(moved["query"], moved["key"], moved["value"], spans, position=place, dropout=0.3)
        return (out * weight).sum(), moved

    total, moved = function(0.0)
    gradients = torch.autograd.grad(total, moved.values())
    expected = sum((g * d).sum() for g, d in zip(gradients, directions.values(), strict=True))
    slope = (function(1e-5)[0] - function(-1e-5)[0]) / 2e-5
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-5)


def test_dropout_under_checkpointing():
    """The recomputed forward draws the same mask."""
    inputs, spans = problem(b=2, h=3, t=100, s=120, d=5, dv=5)
    named = tuple(tensors(inputs).values())
    results = []
    for wrap in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False)):
        torch.manual_seed(3)
        out = wrap(lambda q, k, v: attend(q, k, v, spans, dropout=0.4), *named)
        torch.randn(5)  # what follows draws as well
        results.append((out, *torch.autograd.grad(out.square().sum(), named)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


# -------------------------------------------------------------------------------------------------------------- sdpa


@pytest.mark.parametrize("position", ["none", "bias"])
@shapes
def test_sdpa_equals_eager(shape, position):
    inputs, spans = problem(**shape, position=position)
    results = []
    for implementation in ("sdpa", "eager"):
        place = inputs.get("position")
        out = attend(
            inputs["query"], inputs["key"], inputs["value"], spans, position=place, implementation=implementation
        )
        named = tensors(inputs)
        gradients = torch.autograd.grad(out.square().sum(), named.values())
        results.append({"out": out} | dict(zip(named, gradients, strict=True)))
    assert_same(*results)


def test_sdpa_of_a_plain_causal_problem():
    for t, s in ((70, 70), (70, 101), (300, 300)):
        inputs, _ = problem(b=2, h=2, t=t, s=s, d=3, dv=3)
        spans = Spans(torch.zeros(1, t, dtype=torch.long), torch.arange(s - t, s)[None])
        outs = [
            attend(inputs["query"], inputs["key"], inputs["value"], spans, implementation=x) for x in ("sdpa", "eager")
        ]
        torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)


def test_sdpa_says_what_it_cannot_do():
    inputs, spans = problem(**SHAPES["chunk"], position="query")
    arguments = inputs["query"], inputs["key"], inputs["value"], spans
    with pytest.raises(ValueError, match="sdpa.*eager"):
        attend(*arguments, position=inputs["position"], implementation="sdpa")
    with pytest.raises(ValueError, match="sdpa.*eager"):
        attend(*arguments, implementation="sdpa", return_lse=True)


# -------------------------------------------------------------------------------------------------------------- cost


def band_problem(t, position="none", span=32):
    inputs, _ = problem(b=1, h=2, t=t, s=t, d=8, dv=8, dtype=torch.float32)
    column = torch.arange(t)[None]
    spans = Spans((column - span + 1).clamp(min=0), column)
    if position != "none":
        size = (2, span) if position == "bias" else (2, span, 8)
        query = leaf(torch.randn(1, 2, t, 8)) if position == "query" else None
        inputs["position"] = Position(leaf(torch.randn(*size)), span - 1, query)
    return inputs, spans


def one_step(inputs, spans, implementation):
    out = attend(
        inputs["query"],
        inputs["key"],
        inputs["value"],
        spans,
        position=inputs.get("position"),
        implementation=implementation,
    )
    torch.autograd.grad(out.sum(), tensors(inputs).values())


@pytest.mark.parametrize(
    ("implementation", "position"),
    [("eager", "none"), ("eager", "bias"), ("eager", "query"), ("sdpa", "none")],
)
def test_cost_is_linear(implementation, position):
    """Products and peak memory of forward and backward grow with T x span, and no tensor is T x T."""
    small, middle, large = (cost_of(one_step, *band_problem(t, position), implementation) for t in (1024, 2048, 4096))
    for a, b in ((small, middle), (middle, large)):
        assert b.flops <= 2.1 * a.flops
        assert b.peak <= 2.2 * a.peak
    assert large.largest < 4096 * 4096 * 4 / 4


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors_name_what_disagrees():
    inputs, spans = problem(b=2, h=3, t=4, s=6, d=5, dv=5)
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    table = torch.zeros(3, 9, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"key.*\(2, 3, 6, 4\)"):
        attend(query, key[..., :4], value, spans)
    with pytest.raises(ValueError, match=r"value.*\(2, 3, 5, 5\)"):
        attend(query, key, value[:, :, :5], spans)
    with pytest.raises(ValueError, match=r"key.*\(1, 3, 6, 5\)"):
        attend(query, key[:1], value, spans)
    with pytest.raises(ValueError, match=r"spans.*\(2, 3\)"):
        attend(query, key, value, Spans(spans.lower[:, :3], spans.upper[:, :3]))
    with pytest.raises(ValueError, match=r"spans.*\(3, 4\)"):
        attend(query, key, value, Spans(spans.lower[[0, 0, 0]], spans.upper[[0, 0, 0]]))
    with pytest.raises(ValueError, match="lower.*upper"):
        Spans(spans.lower, spans.upper[:, :2])
    with pytest.raises(ValueError, match=r"table.*\(2, 9\)"):
        attend(query, key, value, spans, position=Position(table[:2], 5))
    with pytest.raises(ValueError, match=r"position.query.*\(2, 3, 3, 5\)"):
        attend(query, key, value, spans, position=Position(torch.zeros(3, 9, 5).double(), 5, query[:, :, :3]))
    with pytest.raises(ValueError, match="implementation.*'flex'"):
        attend(query, key, value, spans, implementation="flex")


def test_every_visible_distance_needs_a_row():
    """Query 3 of 4 stands at column 5 of 6: a table of distances 1 to 4 serves keys 1 to 4, no others."""
    inputs, _ = problem(b=1, h=1, t=4, s=6, d=5, dv=5)
    arguments = inputs["query"], inputs["key"], inputs["value"]
    table = torch.randn(1, 4, dtype=torch.float64)
    nothing = torch.full((1, 4), -1)

    def spans(lower, upper):
        low, up = torch.zeros_like(nothing), nothing.clone()
        low[0, 3], up[0, 3] = lower, upper
        return Spans(low, up)

    for function in (attend, attend_naive):
        function(*arguments, spans(1, 4), position=Position(table, 4))
        assert (function(*arguments, spans(1, 0), position=Position(table, -4))[0] == 0).all()  # nobody sees anything
        with pytest.raises(ValueError, match=r"distances 1 to 5\b.* 1 to 4\b"):
            function(*arguments, spans(0, 4), position=Position(table, 4))
        with pytest.raises(ValueError, match=r"distances 0 to 4\b.* 1 to 4\b"):
            function(*arguments, spans(1, 5), position=Position(table, 4))
