"""The attention kernels against the plain definition in float64, on a GPU, or on a CPU in Triton's interpreter.

`python -m eval.kernels [case ...]` prints JSON, the relative errors of each case; a process of its own, since whether
kernels are interpreted (TRITON_INTERPRET=1) is settled when triton is imported. Needs torch and triton only.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from typing import NamedTuple

import torch

from hf_gallery.models import attention_triton, blocks, gate_triton, memory, search_triton, unit_triton
from hf_gallery.models.attention import Position, attend, attend_naive, join
from hf_gallery.models.attention_triton import jit
from hf_gallery.models.rings import RingSpans, StepRows, attend_ring
from hf_gallery.models.spans import Spans

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

DEVICE = "cuda" if torch.cuda.is_available() and not attention_triton.INTERPRETED else "cpu"


class Case(NamedTuple):
    """One problem. band: keys that queries see, about, up to their own; None, any interval, empty ones too; 0, ends of
    any size."""

    b: int
    h: int
    t: int
    s: int
    d: int
    dv: int
    term: str = "none"
    band: int | None = None
    shared: bool = False
    dropout: float = 0.0
    kind: torch.dtype = torch.float32
    frozen: tuple[str, ...] = ()


CASES = {
    "window": Case(2, 2, 50, 50, 16, 16, band=37, shared=True),
    "one query": Case(3, 1, 1, 70, 24, 24, "bias", band=60, shared=True),
    "ragged, T < S, odd heads": Case(2, 2, 37, 61, 24, 8, band=40),
    "T > S": Case(1, 2, 61, 21, 8, 16, "relative"),
    "any intervals": Case(2, 2, 41, 53, 16, 16),
    "bias, any intervals": Case(2, 2, 35, 53, 7, 5, "bias"),
    "bias, a band": Case(2, 2, 50, 66, 16, 16, "bias", band=45, shared=True),
    "relative, any intervals": Case(2, 2, 35, 53, 20, 20, "relative"),
    "relative, a band": Case(2, 2, 50, 66, 16, 16, "relative", band=45, shared=True),
    "relative, frozen keys and values": Case(1, 2, 35, 35, 16, 16, "relative", band=30, frozen=("key", "value")),
    "ends beyond 32 bits": Case(4, 1, 5, 21, 8, 8, band=0),
    "dropout": Case(1, 2, 40, 40, 16, 16, "none", band=30, dropout=0.3),
    "dropout, bias": Case(2, 1, 40, 40, 16, 16, "bias", band=30, dropout=0.3),
    "dropout, relative": Case(2, 1, 40, 40, 16, 16, "relative", band=30, dropout=0.3),
    "bf16": Case(2, 2, 50, 50, 16, 16, band=37, kind=torch.bfloat16),
    "bf16, bias": Case(1, 2, 50, 50, 16, 16, "bias", band=37, kind=torch.bfloat16),
    "bf16, relative": Case(1, 2, 50, 50, 16, 16, "relative", band=37, kind=torch.bfloat16),
    "fp16, relative": Case(1, 1, 40, 40, 16, 16, "relative", band=37, kind=torch.float16),
}
# On a GPU tiles are larger: problems that cross many of them, and heads of every block size.
LARGE = {
    f"large, {term}, heads of {d}, {str(kind).split('.')[1]}": Case(
        2, 2, 517, 773, d, d, term, band, shared=band is not None, kind=kind
    )
    for term in ("none", "bias", "relative")
    for d in (64, 80, 256)
    for kind, band in ((torch.float32, None), (torch.bfloat16, 300))
} | {
    "large, ragged, bf16": Case(3, 2, 517, 773, 64, 64, "relative", 300, kind=torch.bfloat16),
    "large, dropout": Case(2, 2, 517, 517, 64, 64, "relative", 300, dropout=0.2, kind=torch.bfloat16),
    "large, fp16": Case(2, 2, 517, 517, 64, 64, "bias", 300, kind=torch.float16),
    "large, decoding": Case(4, 2, 1, 2049, 64, 64, "relative", 2049),
}
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def intervals(case: Case, generator: torch.Generator) -> Spans:
    """Random intervals of a case, or its band."""
    rows = 1 if case.shared else case.b
    if case.band == 0:  # ends far beyond the keys
        far = torch.tensor([2**31 - 1, 2**31, 2**40, 2**33 + 5])
        far = far[torch.arange(rows) % 4][:, None].expand(-1, case.t)
        return Spans(torch.where(far % 2 == 1, 3, -far), far.clone())
    if case.band is None:  # ends stick out of the keys, and every third interval is empty
        ends = torch.randint(-3, case.s + 3, (2, rows, case.t), generator=generator)
        lower, upper = ends.amin(0), ends.amax(0)
        upper = torch.where(torch.rand(rows, case.t, generator=generator) < 0.3, lower - 1, upper)
        return Spans(lower, upper)
    at = case.s - case.t + torch.arange(case.t).expand(rows, -1)
    if case.shared:
        return Spans((at - case.band + 1).clamp(min=0), at.clone())
    late = 3 * torch.arange(rows)[:, None]  # rows end at different places, and a stretch of queries sees nothing
    lower = (at - case.band + 1 + late).clamp(min=0)
    upper = torch.where(torch.arange(case.t) < case.t - late, at, lower - 1)
    upper[:, case.t // 3 : case.t // 3 + 4] = -1
    return Spans(lower, upper)


def inputs_of(case: Case, spans: Spans, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of a problem by name, and the greatest distance that its table holds."""

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(case.kind)

    x = {
        "query": normal(case.b, case.t, case.h, case.d).transpose(1, 2),  # laid out as a model's
        "key": normal(case.b, case.h, case.s, case.d),
        "value": normal(case.b, case.h, case.s, case.dv),
    }
    nearest, farthest = spans.clamp(case.s).distances(case.s - case.t)
    far = farthest + 2
    size = (case.h, far - nearest + 4)
    if case.term != "none":
        x["table"] = normal(*size, *([case.d] if case.term == "relative" else []))
    if case.term == "relative":
        x["asked"] = normal(case.b, case.h, case.t, case.d)
    return x, far


def results(function, case: Case, x: dict[str, torch.Tensor], far: int, spans: Spans) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of a fixed functional of both."""
    position = Position(x["table"], far, x.get("asked")) if "table" in x else None
    out, lse = function(x["query"], x["key"], x["value"], spans, position=position)
    generator = torch.Generator().manual_seed(5)
    weight, weight_lse = (
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype) for y in (out, lse)
    )
    total = (out * weight).sum() + (lse.masked_fill(lse == -math.inf, 0.0) * weight_lse).sum()
    leaves = {name: y for name, y in x.items() if y.requires_grad}
    grads = torch.autograd.grad(total, list(leaves.values()))
    return {"out": out.detach(), "lse": lse.detach()} | dict(zip(leaves, grads, strict=True))


def kernels(case: Case):
    """The kernels as `attend` calls them."""

    def function(*arguments, position):
        return attend(*arguments, position=position, dropout=case.dropout, implementation="triton", return_lse=True)

    return function


def definition(case: Case, mask: torch.Tensor | None):
    """The plain definition of a case as a function of its inputs; mask (B, H, T, S): the pairs that dropout keeps."""

    def function(query, key, value, spans, position):
        out, lse, probabilities = attend_naive(query, key, value, spans, position=position)
        return (out if mask is None else (probabilities * mask / (1 - case.dropout)) @ value), lse

    return function


@jit
def _mask_kernel(seed_ptr, out_ptr, T, S, dropout, M: tl.constexpr):
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * M + tl.arange(0, M)
    s = tl.program_id(1) * M + tl.arange(0, M)
    kept = attention_triton._kept(tl.load(seed_ptr), row, t, s, T, S, dropout, False)
    place = out_ptr + (row * T + t[:, None]) * S + s[None, :]
    tl.store(place, kept.to(tl.float32), mask=(t < T)[:, None] & (s < S)[None, :])


def mask_of(case: Case, seed: torch.Tensor) -> torch.Tensor:
    """Mask (B, H, T, S) of the probabilities that the kernels keep."""
    mask = torch.empty(case.b, case.h, case.t, case.s, device=seed.device)
    grid = triton.cdiv(case.t, 16), triton.cdiv(case.s, 16), case.b * case.h
    _mask_kernel[grid](seed, mask, case.t, case.s, case.dropout, 16)
    return mask


def errors(case: Case) -> dict[str, float]:
    """The relative error of each result, in the Euclidean norm; infinite where zeros are due and others came."""
    generator = torch.Generator().manual_seed(3)
    spans = intervals(case, generator)
    x, far = inputs_of(case, spans, generator)
    ours = {k: y.to(DEVICE).detach().requires_grad_(k not in case.frozen) for k, y in x.items()}
    exact = {k: y.to(DEVICE, torch.float64).detach().requires_grad_(k not in case.frozen) for k, y in x.items()}
    mask = None
    torch.manual_seed(9)
    if case.dropout:
        seed = torch.randint(2**31, (1,), device=DEVICE)
        mask = mask_of(case, seed).double()
        torch.manual_seed(9)
    got = results(kernels(case), case, ours, far, spans)
    expected = results(definition(case, mask), case, exact, far, spans)
    found = {}
    for name, right in expected.items():
        y = got[name].double()
        if name == "lse":
            if not torch.equal(y == -math.inf, right == -math.inf):
                found[name] = math.inf
                continue
            y, right = y.masked_fill(y == -math.inf, 0.0), right.masked_fill(right == -math.inf, 0.0)
        empty = right == 0.0
        error = (y - right).norm() / right.norm().clamp(min=1e-30) if right.any() else y.norm()
        found[name] = error.item() if bool((y[empty] == 0.0).all()) or name not in ("out", "query") else math.inf
    if mask is not None:
        deviation = (case.dropout * (1 - case.dropout) / mask.numel()) ** 0.5
        found["share"] = 0.0 if abs(mask.mean().item() - (1 - case.dropout)) < 5 * deviation else math.inf
    return found


def join_errors() -> dict[str, float]:
    """Attention in two parts, joined through lse, as transformers with segments make it, against the whole."""
    case = Case(1, 2, 40, 40, 16, 16, band=25, shared=True)
    generator = torch.Generator().manual_seed(0)
    whole = intervals(case, generator)
    border = torch.arange(case.t)[None] // 16 * 16
    own = Spans(torch.maximum(whole.lower, border), whole.upper)
    parts = [own, Spans(whole.lower, torch.minimum(whole.upper, border - 1))]
    x, far = inputs_of(case, whole, generator)
    ours = {k: y.to(DEVICE).detach().requires_grad_() for k, y in x.items()}
    exact = {k: y.to(DEVICE, torch.float64).detach().requires_grad_() for k, y in x.items()}

    def joined(query, key, value, spans, position):
        both = [attend(query, key, value, y, implementation="triton", return_lse=True) for y in parts]
        return join(*both)

    got, expected = results(joined, case, ours, far, whole), results(definition(case, None), case, exact, far, whole)
    return {name: ((got[name].double() - y).norm() / y.norm()).item() for name, y in expected.items()}


def groups_errors() -> dict[str, float]:
    """A relative term whose products are held for one row and head at a time."""
    before = attention_triton.SCRATCH_BYTES
    attention_triton.SCRATCH_BYTES = 1
    try:
        return errors(Case(2, 2, 20, 30, 16, 16, "relative"))
    finally:
        attention_triton.SCRATCH_BYTES = before


def empty_errors() -> dict[str, float]:
    """A batch of no rows: empty results, and empty gradients."""
    right = True
    for t, implementation in ((5, "triton"), (1, "decode")):
        x = torch.zeros(0, 2, 5, 8, device=DEVICE)
        query = x[:, :, :t].clone().requires_grad_(implementation == "triton")
        ends = torch.zeros(1, t, dtype=torch.long)
        out, lse = attend(query, x, x, Spans(ends, ends), implementation=implementation, return_lse=True)
        right = right and (out.shape, lse.shape) == ((0, 2, t, 8), (0, 2, t))
        if query.requires_grad:
            right = right and torch.autograd.grad(out.sum() + lse.sum(), query)[0].shape == query.shape
    return dict.fromkeys(("out", "lse", "query"), 0.0 if right else math.inf)


def compiled_errors() -> dict[str, float]:
    """In one graph without a break: torch.compile(fullgraph=True), forward and backward."""
    case = CASES["relative, any intervals"]
    generator = torch.Generator().manual_seed(3)
    spans = intervals(case, generator)
    x, far = inputs_of(case, spans, generator)
    lower, upper = spans.lower.to(DEVICE), spans.upper.to(DEVICE)
    leaves = {k: y.to(DEVICE).detach().requires_grad_() for k, y in x.items()}

    def model(query, key, value, table, asked):
        return attend(
            query, key, value, Spans(lower, upper), position=Position(table, far, asked), implementation="triton",
            return_lse=True,
        )  # fmt: skip

    whole = torch.compile(model, fullgraph=True, backend="aot_eager")

    def run(function):
        return results(lambda q, k, v, spans, position: function(q, k, v, *position[::2]), case, leaves, far, spans)

    got, expected = run(whole), run(model)
    return {name: 0.0 if torch.equal(got[name], y) else math.inf for name, y in expected.items()}


def search_errors(kind: torch.dtype, most: int = 2**22, width: int = 2**14) -> dict[str, float]:
    """The search of a memory against its definition in float64: scores and columns, of equal scores the most recent.

    Keys are small whole numbers, whose scores are exact in every type and mostly alike. most, width: scores and keys
    of a tile.
    """
    before = memory._SCORES, memory._SCORES_ON_GPU, memory._WIDTH
    memory._SCORES, memory._SCORES_ON_GPU, memory._WIDTH = most, most, width
    generator, wrong = torch.Generator().manual_seed(4), {"scores": 0.0, "columns": 0.0}
    try:
        for t, n, d, topk in ((5, 90, 24, 6), (1, 61, 7, 32), (19, 33, 16, 33), (3, 7, 80, 9)):
            query, keys = (torch.randint(-1, 2, (2, 3, x, d), generator=generator).to(DEVICE, kind) for x in (t, n))
            keys[1, 2, n // 2] = torch.nan  # of a training that has diverged
            lower = torch.randint(0, n, (2, t), generator=generator).to(DEVICE)
            upper = lower + torch.randint(0, n + 1, (2, t), generator=generator).to(DEVICE)
            upper[0, 0], upper[1, -1] = lower[0, 0], lower[1, -1] + n  # nothing, and all
            if t > 1:  # nothing, where no column is
                lower[0, 1], upper[0, 1], lower[1, 0], upper[1, 0] = -n, -n, 5 * n, 4 * n
            assert search_triton.serves(query)
            scores, columns = memory.search_numbered(query, keys, lower, upper, topk)
            exact, places = memory.search_naive(query.double(), keys.double(), lower, upper, topk)
            same = torch.equal(scores.double().nan_to_num(9e9), exact.nan_to_num(9e9))
            wrong["scores"] = wrong["scores"] if same else math.inf
            same = torch.equal(columns[exact > -math.inf], places[exact > -math.inf])
            wrong["columns"] = wrong["columns"] if same else math.inf
    finally:
        memory._SCORES, memory._SCORES_ON_GPU, memory._WIDTH = before
    return wrong


def found_errors(kind: torch.dtype) -> dict[str, float]:
    """Attention over pairs that were found, where some or all are missing, against torch's operations in float64."""
    generator, wrong = torch.Generator().manual_seed(6), {"out": 0.0, "weights": 0.0}
    for b, h, t, k, n, d in ((2, 3, 1, 32, 90, 24), (1, 2, 5, 9, 9, 7), (2, 1, 3, 1, 40, 64)):
        values = torch.randn(b, n, h, d, generator=generator).to(DEVICE, kind).transpose(1, 2)
        scores = torch.randn(b, h, t, k, generator=generator).sort(dim=-1, descending=True).values
        count = torch.randint(0, k + 1, (b, h, t, 1), generator=generator)
        count[0, 0, 0] = 0  # nothing was found
        scores = scores.masked_fill(torch.arange(k) >= count, -math.inf).to(DEVICE)
        scores[-1, -1, -1, 0] = torch.nan  # of a training that has diverged: it does not count as found
        columns = torch.randint(0, n, (b, h, t, k), generator=generator).to(DEVICE)
        columns[~(scores > -math.inf)] = 2**40
        at = columns.clamp(max=n - 1)
        picked = values.double().gather(2, at.flatten(2)[..., None].expand(-1, -1, -1, d)).unflatten(2, (t, k))
        weights = scores.double().nan_to_num(-math.inf, neginf=-math.inf).softmax(-1).nan_to_num(0.0)
        right = {"out": (weights[..., None] * picked).sum(-2), "weights": weights}
        for name, got in zip(right, search_triton.attend_found(scores, columns, values), strict=True):
            error = ((got.double() - right[name]).norm() / right[name].norm().clamp(min=1e-30)).item()
            wrong[name] = max(wrong[name], error)
    return wrong


def gate_errors(kind: torch.dtype) -> dict[str, float]:
    """Both gates of state vectors, of all rows and of some, against their formulas in float64."""
    generator, wrong = torch.Generator().manual_seed(7), 0.0
    for b, z, e in ((3, 5, 24), (2, 64, 40), (1, 1, 7)):
        old, new, forget, enter = (torch.randn(b, z, e, generator=generator).to(DEVICE, kind) for _ in range(4))
        bias, done = torch.randn(e, generator=generator).to(DEVICE, kind), (torch.arange(b) % 2 == 0).to(DEVICE)
        old = old[:1].expand(b, -1, -1)  # as the initial state
        s, x, f, i, g = (y.double() for y in (old, new, forget, enter, bias))
        g = torch.sigmoid(g)
        fixed, lstm = s * g + x * (1 - g), s * torch.sigmoid(f + 1) + x * torch.sigmoid(i - 1)
        for maps, right in (((bias,), fixed), ((forget, enter), lstm)):
            for rows in (None, done):
                got = gate_triton.gate_triton(old, new, maps, rows).double()
                due = right if rows is None else torch.where(rows[:, None, None], right, s)
                wrong = max(wrong, ((got - due).norm() / due.norm()).item())
    return {"out": wrong}


def unit_errors(kind: torch.dtype) -> dict[str, float]:
    """Vectors at a length and their gradients, against torch's operations in float64; of an empty vector too."""
    wrong: dict[str, float] = {}
    for b, t, h, d, sized in ((2, 37, 3, 20, True), (3, 1, 2, 7, True), (1, 16, 1, 64, False)):
        generator = torch.Generator().manual_seed(8)
        x, weight = (torch.randn(b, t, h, d, generator=generator).to(DEVICE, kind).transpose(1, 2) for _ in range(2))
        x[0, 0, 0] = 0.0
        size = torch.rand(h, generator=generator).to(DEVICE) + 0.5 if sized else None
        if size is not None:
            size[0] *= -1  # a scale that has changed its sign
            size = torch.stack([size, size.new_full((h,), torch.nan)], -1)[:, 0]  # a view
        ways = []
        for y, function in ((x, unit_triton.unit_triton), (x.double(), _unit_definition)):
            leaves = [z.clone().requires_grad_() for z in ((y, size.to(y)) if size is not None else (y,))]
            out = function(leaves[0], leaves[1] if sized else None)
            ways.append([out, *torch.autograd.grad((out * weight.to(out)).sum(), leaves)])
        for name, got, right in zip(("out", "query", "size"), *ways, strict=False):
            error = ((got.double() - right).norm() / right.norm()).item()
            wrong[name] = max(wrong.get(name, 0.0), error)
    return wrong


def _unit_definition(x: torch.Tensor, size: torch.Tensor | None) -> torch.Tensor:
    return blocks.unit(x) if size is None else blocks.scaled_unit(x, size)


class Decode(NamedTuple):
    """One query a row. seen: tokens that each row has behind it, -1 - n if it has n and no token now; with it the keys
    of `case` are a ring. window, dilation: of that ring. short: entries that its table lacks, in place of which the
    last one is read."""

    case: Case
    seen: tuple[int, ...] = ()
    window: int = 0
    dilation: int = 1
    short: int = 0


def decode_errors(problem: Decode) -> dict[str, float]:
    """One query a row over keys that are split, against the definition; over a ring, against torch's products."""
    case, seen, window, dilation, short = problem
    generator = torch.Generator().manual_seed(3)
    spans = intervals(case, generator)
    x, far = inputs_of(case, spans, generator)
    if seen:
        count = torch.tensor([n if n >= 0 else -1 - n for n in seen], device=DEVICE)
        mask = torch.tensor([[n >= 0] for n in seen], device=DEVICE)
        rows = StepRows(count, None if bool(mask.all()) else mask)
        at = count[:, None]
        spans = RingSpans((at - window * dilation + 1).clamp(min=0), at, rows, dilation)
        far = window - 1
        if "table" in x:
            x["table"] = torch.randn(case.h, window - short, *x["table"].shape[2:], generator=generator).to(case.kind)
    ours = {k: y.to(DEVICE) for k, y in x.items()}
    exact = {k: y.double() for k, y in ours.items()}

    def attended(function, x, **options):
        position = Position(x["table"], far, x.get("asked")) if "table" in x else None
        return function(x["query"], x["key"], x["value"], spans, position=position, **options)[:2]

    got = attended(attend, ours, implementation="decode", return_lse=True)
    expected = attended(attend_ring if seen else attend_naive, exact)
    found = {}
    for name, y, right in zip(("out", "lse"), got, expected, strict=True):
        nothing = expected[1] == -math.inf
        same = torch.equal(got[1] == -math.inf, nothing) and not bool(got[0][nothing].any())
        y, right = (z.double().masked_fill(z == -math.inf, 0.0) for z in (y, right))
        found[name] = ((y - right).norm() / right.norm().clamp(min=1e-30)).item() if same else math.inf
    return found


_STEP = Case(3, 2, 1, 70, 24, 8)
DECODES = {
    "decode": Decode(_STEP._replace(band=70, shared=True)),
    "decode, a window": Decode(_STEP._replace(band=37, shared=True)),
    "decode, any intervals": Decode(_STEP._replace(b=9)),
    "decode, bias": Decode(_STEP._replace(b=7, term="bias")),
    "decode, relative": Decode(_STEP._replace(b=7, term="relative", d=20)),
    "decode, ends beyond 32 bits": Decode(_STEP._replace(b=5, band=0)),
    "decode, one key": Decode(Case(2, 1, 1, 1, 7, 5, "bias", band=1)),
    "decode, bf16": Decode(_STEP._replace(band=50, shared=True, kind=torch.bfloat16)),
    "decode, bf16, relative": Decode(_STEP._replace(band=50, shared=True, term="relative", kind=torch.bfloat16)),
    "ring": Decode(_STEP._replace(b=5), (0, 3, 69, 70, 1000), 70),
    "ring, a window": Decode(_STEP._replace(b=4), (5, 75, 139, 143), 33),
    "ring, padded": Decode(_STEP._replace(b=4), (5, -76, 140, -1), 33),
    "ring, bias": Decode(_STEP._replace(b=3, term="bias"), (5, 75, 140), 70),
    "ring, relative": Decode(_STEP._replace(b=3, term="relative"), (5, 75, 140), 70),
    "ring, a short table": Decode(_STEP._replace(b=3, term="bias"), (5, 75, 140), 70, short=9),
    "ring, dilated": Decode(_STEP._replace(b=3, term="bias"), (5, 75, 140), 23, 3),
    "ring, fp16": Decode(_STEP._replace(b=3, term="relative", kind=torch.float16), (5, 75, 140), 70),
}
if DEVICE == "cuda":
    _LONG = Case(2, 4, 1, 40_003, 64, 64)
    DECODES |= {
        f"large, {'ring' if seen else 'decode'}, {term}, heads of {d}, {str(kind).split('.')[1]}": Decode(
            _LONG._replace(term=term, d=d, dv=d, kind=kind, s=40_003 if d < 256 else 4_001, band=4_000, shared=True),
            seen,
            4_000,
        )
        for term in ("none", "bias", "relative")
        for d in (64, 80, 256)
        for kind, seen in ((torch.float32, ()), (torch.bfloat16, (123_456, 77)))
    }


SEARCHES = {
    "search": functools.partial(search_errors, torch.float32),
    "search, many tiles": functools.partial(search_errors, torch.float32, 600, 30),
    "search, bf16": functools.partial(search_errors, torch.bfloat16),
}
# What stands around attention, each in two types.
PARTS = {
    f"{part}, {name}": functools.partial(function, kind)
    for part, function in (("unit", unit_errors), ("found", found_errors), ("gate", gate_errors))
    for name, kind in (("float32", torch.float32), ("bf16", torch.bfloat16))
}
DECODED = {name: functools.partial(decode_errors, problem) for name, problem in DECODES.items()}
OTHERS = {
    "joined parts": join_errors,
    "one head at a time": groups_errors,
    "a whole graph": compiled_errors,
    "no rows": empty_errors,
}
EXTRA = SEARCHES | DECODED | PARTS | OTHERS


def limit(name: str) -> float:
    """The greatest relative error that is allowed."""
    if name in PARTS:
        return LIMITS[torch.float32 if name.endswith("float32") else torch.bfloat16]
    case = DECODES[name].case if name in DECODES else (CASES | LARGE).get(name)
    return LIMITS[torch.float32 if case is None else case.kind]


def measure(names: list[str]) -> dict[str, dict[str, float]]:
    """The errors of the cases with these names. Memory that nobody wrote is NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    return {name: EXTRA[name]() if name in EXTRA else errors((CASES | LARGE)[name]) for name in names}


def all_names() -> list[str]:
    """Every case, on a GPU the large ones too."""
    return [*CASES, *EXTRA, *(LARGE if DEVICE == "cuda" else {})]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:] or all_names())))
