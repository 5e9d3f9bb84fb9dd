"""The kNN memory of keys and values (Wu et al. 2022, section 3): what is stored, and how it is searched.

One store for each row and head. A pair of position p lies in slot p mod memory_size, so the store is a ring: what
falls out is the oldest. How full a row's ring is follows from the row's own count of tokens, so emptying a row costs
nothing. Letters: see spans.py. N slots in use, A pairs appended, k pairs retrieved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .attention_problem import compute_dtype, without_autocast
from .exporting import in_one_graph, is_exporting, readable
from .operators import operator
from .rings import RingLayout, lay, position_in
from .search_triton import attend_found, attends, make_numbers, read_numbers, serves
from .spans import moved
from .states import Folded, Kept, Record

faiss: Any
try:
    import faiss
except ImportError:  # only the faiss backends need it
    faiss = None


class SearchBackend(Protocol):
    """A search for the k best keys. A new one is an entry in BACKENDS."""

    def __call__(
        self, query: torch.Tensor, keys: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """For query (B, H, T, D) the topk columns of keys (B, H, N, D) with the largest dot product, among
        [lower, upper) (B, T) modulo N: an interval of the ring, from the oldest pair to the most recent one. upper is
        at most lower + N. An interval of nothing, whose upper is no more than its lower, may lie anywhere.

        Returns scores (B, H, T, topk), largest first, -inf where fewer are there, and columns (B, H, T, topk). Nothing
        is differentiated.
        """


def allowed(lower: torch.Tensor, upper: torch.Tensor, first: int, last: int, n: int) -> torch.Tensor:
    """The columns [first, last) of n that are in the ring interval [lower, upper): (B, T, last - first)."""
    column = torch.arange(first, last, device=lower.device)
    upper = upper.masked_fill(upper <= lower, 0)  # else one behind all columns would go round the ring
    lower, upper = lower[..., None], upper[..., None]
    return ((column >= lower) & (column < upper)) | (column < upper - n)


def search_exact(query, keys, lower, upper, topk):
    """Exact search, a tile of queries at a time, over tiles of keys with a running top-k. Of pairs whose scores, as
    computed, are the same, the most recent come first."""
    if not readable(query) and query.dtype != torch.float64:
        return search_numbered(query, keys, lower, upper, topk)
    n = keys.shape[2]
    everything = bool((upper - lower == n).all())
    query, dtype = query.to(compute_dtype(query)), compute_dtype(query)
    results = []
    rows, columns = score_tiles(query, keys)
    for some in rows:
        best: Any = None
        for part in columns:
            tile = query[:, :, some] @ keys[:, :, part].to(dtype).mT  # (B, H, height, width)
            if not everything:
                hidden = ~allowed(lower[:, some], upper[:, some], part.start, part.stop, n)
                tile.masked_fill_(hidden[:, None], -math.inf)
            found = _first(tile, part.start, upper[:, some], n, topk)
            if best is not None:
                both, both_at = (torch.cat(pair, -1) for pair in zip(best, found, strict=True))
                everybody = torch.ones(tile.shape[:3], dtype=torch.bool, device=tile.device)
                found = tuple(x[..., :topk] for x in _in_order(both, both_at, everybody, upper[:, some], n))
            best = found
        results.append(best)
    best, best_at = (x[0] if len(x) == 1 else torch.cat(x, 2) for x in zip(*results, strict=True))
    missing = topk - best.shape[-1]
    return F.pad(best, (0, missing), value=-math.inf), F.pad(best_at, (0, missing))


def score_tiles(query: torch.Tensor, keys: torch.Tensor) -> list[list[slice]]:
    """The queries, and the keys, whose scores are held at a time."""
    (b, h, t, _), n = query.shape, keys.shape[2]
    # A GPU is fast where a launch is large, and has memory for that; each of the numbers there takes 8 bytes.
    scores, width = (_SCORES_ON_GPU, n) if query.is_cuda else (_SCORES, min(n, _WIDTH))
    height = max(1, scores // (b * h * width))
    return [[slice(i, min(i + size, most)) for i in range(0, most, size)] for size, most in ((height, t), (width, n))]


def search_numbered(query, keys, lower, upper, topk):
    """`search_exact` where the host is not to wait for a GPU: a score and its pair's turn in the ring make one whole
    number, so that no two pairs are equal, and the largest numbers are the result whatever they hold. Scores are
    float32. search_triton.py says what the numbers are, and has the kernels that make them and read them."""
    return tuple(_search_numbered(query, keys, lower, upper, topk))


def _numbered(
    query: torch.Tensor, keys: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, topk: int
) -> list[torch.Tensor]:
    n = keys.shape[2]
    make, read = (make_numbers, read_numbers) if serves(query) else (_make_numbers, _read_numbers)
    results = []
    rows, columns = score_tiles(query, keys)
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        for some in rows:
            best: Any = None
            for part in columns:
                number = make(query[:, :, some], keys[:, :, part], lower[:, some], upper[:, some], part.start, n)
                number = number if best is None else torch.cat([best, number], -1)
                best = number.topk(min(topk, number.shape[-1]), -1).values
            results.append(best)
        return list(read(results[0] if len(results) == 1 else torch.cat(results, 2), upper, n, topk))


def _make_numbers(query, keys, lower, upper, start, n):
    """The numbers (B, H, T, S) of keys (B, H, S, D), the columns from `start` on of n."""
    score = query.float() @ keys.float().mT
    column = torch.arange(start, start + keys.shape[2], device=upper.device)
    turn = (column - upper[..., None]) % n  # (B or 1, T, S), n - 1 at the newest
    hidden = turn < (n - (upper - lower))[..., None]
    score.masked_fill_(hidden[:, None], -math.inf).masked_fill_(score.isnan(), math.nan)
    turn = turn.to(torch.int32)[:, None].expand_as(score)
    # Two words of one number, the lower first; -0.0 + 0.0 is 0.0.
    return torch.stack([turn, _ordered(score.add_(0.0).view(torch.int32))], -1).view(torch.int64).squeeze(-1)


def _read_numbers(best, upper, n, topk):
    """Scores and columns (B, H, T, topk) of the best numbers (B, H, T, any)."""
    turn, ordered = best.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    missing = topk - best.shape[-1]
    scores = F.pad(_ordered(ordered).view(torch.float32), (0, missing), value=-math.inf)
    return scores, F.pad((upper[:, None, :, None] + turn) % n, (0, missing))


def _numbered_shapes(query, keys, lower, upper, topk):
    shape = (*query.shape[:3], topk)
    return [query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.long)]


_search_numbered = operator(__file__, "search", _numbered, _numbered_shapes)


def _ordered(bits):
    """The bits of float32 as int32 numbers that have the same order, and back: it is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def search_naive(query, keys, lower, upper, topk):
    """`search_exact` by its definition, with the scores of all N keys at once: for tests and for exported graphs."""
    n = keys.shape[2]
    scores = torch.matmul(query.to(compute_dtype(query)), keys.to(compute_dtype(query)).mT)  # (B, H, T, N)
    scores = scores.masked_fill(~allowed(lower, upper, 0, n, n)[:, None], -math.inf)
    age = upper[..., None] - 1 - torch.arange(n, device=upper.device)  # (B, T, N), less than 2 N
    age = torch.where(age < 0, age + n, torch.where(age < n, age, age - n))  # how many are more recent
    by_age = age.argsort(-1)[:, None].expand_as(scores)
    in_turn = scores.gather(-1, by_age)
    if torch.onnx.is_in_onnx_export():  # whose one sort is stable, and has no name for it
        scores, pick = in_turn.sort(dim=-1, descending=True)
    else:
        scores, pick = in_turn.sort(dim=-1, descending=True, stable=True)
    columns = by_age.gather(-1, pick)
    # A text may hold fewer keys than topk.
    return F.pad(scores, (0, topk), value=-math.inf)[..., :topk], F.pad(columns, (0, topk))[..., :topk]


_SCORES, _WIDTH = 2**22, 2**14  # scores of a tile: they stay near the processor; keys of a tile
_PICKED = 2**24  # numbers of the keys that are picked at a time
_SCORES_ON_GPU, _PICKED_ON_GPU = 2**25, 2**26
_BLOCK = 16


def _first(scores, start, upper, n, topk):
    """The topk largest of scores (B, H, T, width), those of the columns of a ring of n from `start` on, largest first,
    and their columns. Of equal ones those that stand nearest before upper (B, T) in the ring come first."""
    count = min(topk, scores.shape[-1])
    best, at = _topk(scores, min(topk + 1, scores.shape[-1]))  # one more: is one that stays outside equal to the last?
    alike = (best[..., 1:] == best[..., :-1]) & (best[..., 1:] > -math.inf)
    best, at = best[..., :count], at[..., :count]
    crowded = alike[..., count - 1 :].any(-1)  # (B, H, T)
    if bool(crowded.any()):
        turn = (_of(upper, crowded) - n - start).clamp(0, scores.shape[-1])
        places = _newest(scores[crowded], best[crowded][:, -1:], turn, count)
        best[crowded], at[crowded] = scores[crowded].gather(-1, places), places
    at += start
    return _in_order(best, at, alike.any(-1), upper, n)


def _in_order(best, at, tied, upper, n):
    """Scores (B, H, T, any) and their columns, largest first, equal ones by age; those of the queries that are tied
    (B, H, T) are put in order, all others are."""
    if bool(tied.any()):
        columns = at[tied]  # (tied, any): of the queries that have ties
        age = (_of(upper, tied) - 1 - columns) % n  # how many are more recent
        by_age = age.argsort(-1)
        best[tied], order = best[tied].gather(-1, by_age).sort(dim=-1, descending=True, stable=True)
        at[tied] = columns.gather(-1, by_age.gather(-1, order))
    return best, at


def _of(upper, which):
    """upper (B, T) of the queries in `which` (B, H, T), one below the other: (tied, 1)."""
    return upper[:, None].expand_as(which)[which][:, None]


def _newest(scores, last, turn, count):
    """Columns (tied, count) of the `count` largest of scores (tied, width), whose smallest is last (tied, 1): of the
    many that are equal to it the most recent, which are the last ones before turn (tied, 1), and then those before the
    end."""
    larger, equal = ~(scores <= last), scores == last  # NaN is larger than all, as topk has it
    room = count - larger.sum(-1, keepdim=True, dtype=torch.int32)
    passed = equal.cumsum(-1, dtype=torch.int32)  # how many equal ones stand up to each column
    before = F.pad(passed, (1, 0)).gather(-1, turn)  # and before the turn
    taken = passed > before + passed[:, -1:] - room
    if bool(turn.any()):
        taken |= (passed > before - room) & (torch.arange(scores.shape[-1], device=scores.device) < turn)
    return (larger | (equal & taken)).nonzero()[:, 1].view(-1, count)


def _topk(scores, topk):
    """topk of the last dimension N, found among the blocks with the largest maxima: the k best lie in at most k.

    Column c belongs to block c mod (N / 16), so that maxima are taken over whole blocks at once.
    """
    n = scores.shape[-1]
    count = n // _BLOCK
    if 2 * count < 3 * topk:
        return scores.topk(min(topk, n), -1)
    blocks = scores[..., : count * _BLOCK].unflatten(-1, (_BLOCK, count))  # (B, H, T, 16, N / 16)
    pick = blocks.amax(-2).topk(topk, -1, sorted=False).indices  # (B, H, T, k)
    few = blocks.gather(-1, pick[..., None, :].expand(*pick.shape[:-1], _BLOCK, topk)).flatten(-2)
    if count * _BLOCK < n:
        few = torch.cat([few, scores[..., count * _BLOCK :]], -1)
    best, at = few.topk(topk, -1)
    rest = at - _BLOCK * topk  # at or above 0: among the columns that fill no block
    column = torch.div(at, topk, rounding_mode="floor") * count + pick.gather(-1, at % topk)
    return best, torch.where(rest >= 0, rest + count * _BLOCK, column)


class FaissSearch:
    """Search by faiss, with an index for each row and head. make(d, n): a new index for n keys of d numbers.

    An index serves until the ring is written again, at the end of a segment: it is kept with the ring's memory.
    """

    def __init__(self, make):
        self.make = make

    def __call__(self, query, keys, lower, upper, topk):
        b, h, t, d = query.shape
        n = keys.shape[2]
        scores = torch.full((b, h, t, topk), -math.inf)
        columns = torch.zeros(b, h, t, topk, dtype=torch.long)
        inside = allowed(lower.cpu(), upper.cpu(), 0, n, n)  # (B, T, N)
        found = inside.any(-1)
        for row in range(b):
            # Queries of a row differ in what they see only where a forward holds several segments.
            kinds, kind = inside[row].unique(dim=0, return_inverse=True)
            for which, mask in enumerate(kinds):
                at = mask.nonzero().squeeze(1)
                who = ((kind == which) & found[row]).nonzero().squeeze(1)
                if not len(at) or not len(who):
                    continue
                interval = int(lower[row, who[0]]), int(upper[row, who[0]])
                for head in range(h):
                    # Several kinds are a long input's, whose indexes would pile up and serve once each.
                    place = (keys[row, head].storage_offset(), n, *interval) if len(kinds) == 1 else None
                    index = self._index(keys[row, head], at, place)
                    found_scores, found_at = index.search(
                        query[row, head, who].float().cpu().numpy(), min(topk, len(at))
                    )
                    found_scores, found_at = torch.from_numpy(found_scores), torch.from_numpy(found_at)
                    found_scores = found_scores.masked_fill(found_at < 0, -math.inf)
                    width = found_at.shape[1]
                    scores[row, head, who, :width] = found_scores
                    columns[row, head, who, :width] = at[found_at.clamp(min=0)]
        return scores.to(query.device), columns.to(query.device)

    def _index(self, keys, at, place):
        """The index over keys (N, D) at columns `at`; kept under `place`, where their memory is a ring's."""
        indexes = getattr(keys.untyped_storage(), INDEXES, {}) if place is not None else {}
        index = indexes.get((self, place))
        if index is None:
            index = self.make(keys.shape[1], len(at))
            data = keys[at].float().cpu().numpy()
            if not index.is_trained:
                index.train(data)
            index.add(data)
            indexes[self, place] = index
        return index


INDEXES = "indexes"  # of a storage that is a ring: what faiss has made of its keys since they were written


def _make_flat(d, n):
    return faiss.IndexFlatIP(d)


def _make_hnsw(d, n):
    return faiss.IndexHNSWFlat(d, 32, faiss.METRIC_INNER_PRODUCT)


def _make_ivf(d, n):
    lists = max(1, min(int(4 * math.sqrt(n)), n // 39))  # faiss asks for 39 points a list to train on
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
    index.nprobe = max(1, lists // 8)
    return index


BACKENDS: dict[str, SearchBackend] = {
    "exact": search_exact,
    "faiss_flat": FaissSearch(_make_flat),
    "faiss_hnsw": FaissSearch(_make_hnsw),
    "faiss_ivf": FaissSearch(_make_ivf),
}


def require_backend(name: str):
    """Raises ImportError if the backend's library is not installed."""
    if isinstance(BACKENDS[name], FaissSearch) and faiss is None:
        raise ImportError(
            f"memory_backend is {name!r}, and faiss is not installed: pip install faiss-cpu, or use "
            'memory_backend="exact"'
        )


def query_tile(query: torch.Tensor, topk: int, size: int) -> int:
    """Number of queries (B, H, T, D) to serve at once. Each gets k pairs of its own, so all of a long input's would
    not fit; and as the memory moves on within it, few at a time keep what they search together not much longer than
    `size`."""
    b, h, _, d = query.shape
    most = _PICKED_ON_GPU if query.is_cuda else _PICKED
    return max(16, min(max(64, size), most // (b * h * d * topk)))


class Source(NamedTuple):
    """Stored pairs: keys and values (B, H, N, D), and the ring interval [lower, upper) (B, T) of their columns that
    each query may see, see SearchBackend."""

    keys: torch.Tensor
    values: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    planned: tuple[torch.Tensor, torch.Tensor] | None = None  # the interval where it was made, on the CPU

    def of_queries(self, part: slice) -> Source:
        planned = None if self.planned is None else (self.planned[0][:, part], self.planned[1][:, part])
        return self._replace(lower=self.lower[:, part], upper=self.upper[:, part], planned=planned)

    def on(self, device: torch.device) -> Source:
        """The same with its intervals on a device."""
        lower, upper = self.lower, self.upper
        if lower.device != device:
            lower, upper = moved(torch.stack((lower, upper)), device).unbind(0)  # one copy, not two
        return self._replace(lower=lower, upper=upper, planned=(self.lower, self.upper))

    def reach(self) -> tuple[int, int]:
        """The columns [first, last) that hold all intervals, at least one of them; all where that cannot be asked."""
        lower, upper = (self.lower, self.upper) if self.planned is None else self.planned
        n = self.keys.shape[2]
        if not readable(lower) or bool((upper > n).any()):
            return 0, n
        some = lower < upper
        first = int(torch.where(some, lower, n - 1).min())
        return first, max(first + 1, int(torch.where(some, upper, 0).max()))


def retrieve(
    backend: str, query: torch.Tensor, sources: list[Source], topk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The topk stored pairs with the largest dot product, for every query, over all sources.

    query (B, H, T, D). Sources come in the order of their pairs' positions.

    Returns keys and values (B, H, T, topk, D), found (B, H, T, topk), False where fewer are stored, and columns
    (B, H, T, topk), those of later sources counted on from the earlier ones. No gradient reaches the store.
    """
    if in_one_graph() and not is_exporting():
        return _retrieve_in_graph(backend, query, sources, topk)
    search = BACKENDS[backend]
    if is_exporting():
        if backend not in ("exact", "faiss_flat"):
            raise ValueError(
                f'memory_backend is {backend!r}, whose index no graph can hold; set it to "exact" to export'
            )
        search = search_naive
    # Under autocast the products of scores would be in half precision, and the k best others than the best.
    with torch.no_grad(), without_autocast(query):
        results, ends, parts = [], [0], []
        for source in sources:
            keys, values = source[:2]
            scores, at, (first, last) = _search_source(search, query.detach(), source, topk)
            results.append((scores, at + ends[-1] if ends[-1] else at))
            if keys.is_contiguous() and values.is_contiguous():  # a ring, whose pairs are picked where they lie
                parts.append((keys, values, ends[-1]))
            else:  # only what these queries reach: tiles that each copied all of a long input would be quadratic
                parts.append((keys[:, :, first:last], values[:, :, first:last], ends[-1] + first))
            ends.append(ends[-1] + keys.shape[2])
        scores, columns = results[0]
        if len(results) > 1:
            # Later sources first: their pairs are more recent, and a stable sort leaves equals as they stand.
            scores, columns = (torch.cat(x[::-1], -1) for x in zip(*results, strict=True))  # (B, H, T, sources * k)
            scores, pick = scores.sort(dim=-1, descending=True, stable=True)
            scores, columns = scores[..., :topk], columns.gather(-1, pick[..., :topk])
        found = scores > -math.inf
        picked_keys, picked_values = _pick(parts, columns)
    return picked_keys, picked_values, found, columns


def _search_source(search, query, source, topk):
    """Scores and columns (B, H, T, topk) that a search finds in a source, and the [first, last) that it looked at."""
    keys, _, lower, upper, _ = source
    first, last = source.reach()
    lower, upper = (lower - first, upper - first) if first else (lower, upper)
    scores, at = search(query, keys[:, :, first:last], lower, upper, topk)
    return scores, at + first if first else at, (first, last)


def _retrieve_in_graph(backend, query, sources, topk):
    """`retrieve` as an operator, which runs as it does without a graph: on CPUs it may ask tensors what they hold."""
    source = sources[0]  # of a forward without a past, the columns are all there are
    found = _retrieve(backend, query.detach(), *(x.detach() for x in source[:4]), topk)
    return tuple(found)


def _retrieve_from_columns(
    backend: str,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    topk: int,
) -> list[torch.Tensor]:
    t, tile = query.shape[2], query_tile(query, topk, keys.shape[2])
    source, results = Source(keys, values, lower, upper), []
    for start in range(0, t, tile):
        part = slice(start, start + tile)
        results.append(retrieve(backend, query[:, :, part], [source.of_queries(part)], topk))
    return list(results[0]) if len(results) == 1 else [torch.cat(x, dim=2) for x in zip(*results, strict=True)]


def _retrieved_shapes(backend, query, keys, values, *rest):
    *_, topk = rest
    shape = (*query.shape[:3], topk)
    return [
        keys.new_empty(*shape, keys.shape[-1]),
        values.new_empty(*shape, values.shape[-1]),
        query.new_empty(shape, dtype=torch.bool),
        query.new_empty(shape, dtype=torch.long),
    ]


_retrieve = operator(__file__, "retrieve", _retrieve_from_columns, _retrieved_shapes)


def _pick(parts, columns):
    """Keys and values (B, H, T, k, D) at columns (B, H, T, k). parts: keys and values (B, H, any, D) and the column of
    the first, in the columns' order."""
    if len(parts) > 1 and sum(keys.shape[2] for keys, _, _ in parts) <= columns.shape[2] * columns.shape[3]:
        # Fewer pairs are there than are picked: laid side by side they are picked once.
        at, laid = columns, 0
        for keys, _, start in parts:
            at, laid = torch.where(columns >= start, columns - start + laid, at), laid + keys.shape[2]
        keys, values = (torch.cat(x, 2) for x in list(zip(*parts, strict=True))[:2])
        at = at.clamp(0, laid - 1)  # where fewer pairs are stored than are asked for
        return _pick_pairs((keys, values), at)
    picked_keys: Any = None
    picked_values: Any = None
    for keys, values, start in parts:
        at = columns
        if len(parts) > 1 or start:
            at = (columns - start).clamp(0, keys.shape[2] - 1)
        some_keys, some_values = _pick_pairs((keys, values), at)
        if picked_keys is None:
            picked_keys, picked_values = some_keys, some_values
        else:
            inside = (columns >= start) & (columns < start + keys.shape[2])
            picked_keys = torch.where(inside[..., None], some_keys, picked_keys)
            picked_values = torch.where(inside[..., None], some_values, picked_values)
    return picked_keys, picked_values


def _pick_pairs(pair, at):
    """Keys and values (B, H, N, D) at columns (B, H, T, k): (B, H, T, k, D) both."""
    b, h, n, _ = pair[0].shape
    first = torch.arange(0, b * h * n, n, device=at.device).view(b, h, 1, 1)
    at = at + first
    return [x.reshape(b * h * n, -1).index_select(0, at.flatten()).unflatten(0, at.shape) for x in pair]


def attend_memory(
    backend: str, query: torch.Tensor, sources: list[Source], topk: int, no_grad: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention of query (B, H, T, D), its scale in it, over the pairs that `retrieve` finds for it: out (B, H, T, D),
    the weights, and found and columns as `retrieve` has them, (B, H, T, topk) each.

    no_grad: nobody wants its gradient. The first pass of a reentrant checkpoint is not so, though it records nothing:
    the second must find the same."""
    values = sources[0].values
    if no_grad and not is_exporting() and len(sources) == 1 and backend == "exact" and attends(query, values, topk):
        # The scores by which pairs are found are those of attention, and values are read where they lie.
        scores, at, _ = _search_source(BACKENDS[backend], query, sources[0], topk)
        out, weights = attend_found(scores, at, values)
        return out.to(query.dtype), weights, scores > -math.inf, at
    keys, values, found, columns = retrieve(backend, query, sources, topk)
    return *attend_retrieved(query, keys, values, found), found, columns


def attend_retrieved(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, found: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of query (B, H, T, D), its scale in it, over its own retrieved pairs (B, H, T, k, D), found
    (B, H, T, k). Returns (B, H, T, D), zeros where nothing was found, and the weights (B, H, T, k).

    Gradients reach the query alone.
    """
    dtype = compute_dtype(query)
    with without_autocast(query):
        scores = torch.matmul(keys.to(dtype), query[..., None].to(dtype)).squeeze(-1)  # (B, H, T, k)
    hidden = ~found
    # Below all others, and finite where nothing was found, so that no weight is NaN.
    weights = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)
    weights = weights.to(values.dtype)
    return torch.matmul(weights[..., None, :], values).squeeze(-2).to(query.dtype), weights


def ring_with_room(
    ring: torch.Tensor | None, new: torch.Tensor, first: torch.Tensor, count: torch.Tensor, size: int, in_place: bool
) -> torch.Tensor | None:
    """A ring that `append_to_ring` may write into. It grows by doubling up to `size` slots.

    With in_place it may be the ring (B, H, N, D) itself, if the new pairs go to slots that no row has filled yet: who
    goes on from the old count never looks there. Where the oldest would be overwritten it is a copy. Arguments as in
    `append_to_ring`.
    """
    if int(count.max()) == 0:
        return ring
    needed = min(size, int((first + count).max()))
    have = 0 if ring is None else ring.shape[2]
    if have < needed:
        room = min(size, max(needed, 2 * have))
        grown = new.new_zeros(*new.shape[:2], room, new.shape[3], dtype=None if ring is None else ring.dtype)
        if ring is not None:
            grown[:, :, :have] = ring
        return grown
    unfilled = int((first + count).max()) <= have
    # A tensor of inference mode may not be written outside of it.
    if in_place and unfilled and ring.is_inference() == torch.is_inference_mode_enabled():
        return ring
    return ring.clone()


@dataclass(frozen=True)
class Overwritten(Record):
    """Keys or values that a ring has lost to later ones. earlier (B, V, H, D): what it held; position (B, V), on the
    CPU: where each stood in its row; until: the tokens that the row had read when it was lost, 0 for none."""

    position: torch.Tensor

    def changed(self, change):
        return super().changed(change) | {"position": change(self.position).cpu()}

    def behind(self, old):
        return super().behind(old) | {"position": torch.cat([old.position, self.position], dim=1)}


@dataclass(frozen=True)
class Ring(Folded):
    """A ring (B, H, N, D) of at most `size` slots, of a cache that records. What was appended to slots that were free
    is taken back by the row's count alone: nobody looks there."""

    record: Overwritten
    size: int = 0

    def take_back(self, removed, seen):
        gone, position = self.record.until > seen[:, None], self.record.position  # (B, V)
        if not bool(gone.any()):
            return self
        # A slot may have lost several pairs; the first of them is the one that it held then.
        first = position.masked_fill(~gone, torch.iinfo(position.dtype).max - self.size).amin(1, keepdim=True)
        row, which = (gone & (position < first + self.size)).nonzero(as_tuple=True)
        slot, ring = position[row, which] % self.size, self.tensor.clone()
        row, which, slot = (x.to(ring.device) for x in (row, which, slot))
        ring[row, :, slot] = self.record.earlier[row, which].to(ring.dtype)  # (any, H, D)
        return replace(self, tensor=ring)


@dataclass(frozen=True)
class Appended(Kept):
    """A ring (B, H, N, D), None if it is still empty, with pairs that its cache writes once all layers are done.

    new (B, H, A, D): keys or values; first, count, size: as in `append_to_ring`. until (B, A), where the cache
    records: how many tokens the row has read when each is appended.
    """

    tensor: torch.Tensor | None  # type: ignore[assignment]
    new: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor
    size: int
    in_place: bool
    until: torch.Tensor | None = None

    kind = Folded.kind
    folds = True

    def map(self, change):
        return replace(self, tensor=None if self.tensor is None else change(self.tensor), new=change(self.new))

    def ready(self, detaches=True) -> Folded | None:
        """As Kept's. Nothing stored is differentiated, so it is cut from its graph in any case."""
        ring = ring_with_room(self.tensor, self.new, self.first, self.count, self.size, self.in_place)
        lost = None if self.until is None or ring is None else self._lost(self.until)
        ring = append_to_ring(ring, self.new, self.first, self.count, self.size)
        if ring is None:
            return None
        return Folded(ring.detach()) if lost is None else Ring(ring.detach(), lost.map(torch.Tensor.detach), self.size)

    def _lost(self, until: torch.Tensor) -> Overwritten:
        """Pairs that the ring loses, `size` positions before those that are appended: of the ring, or of `new`."""
        offset = torch.arange(self.new.shape[2])
        position = self.first[:, None] + offset - self.size  # (B, A)
        lost = (offset < self.count[:, None]) & (position >= 0)
        some = lost.any(0)
        position, lost, offset = position[:, some], lost[:, some], offset[some]
        rows = torch.arange(len(lost), device=self.new.device)[:, None]
        own = (offset - self.size).clamp(min=0).expand_as(position)
        earlier = self.new[rows, :, own.to(self.new.device)]  # (B, V, H, D)
        if self.tensor is not None:
            slot = (position % self.size).clamp(max=self.tensor.shape[2] - 1).to(self.new.device)
            held = (offset < self.size).to(self.new.device)[None, :, None, None]
            earlier = torch.where(held, self.tensor[rows, :, slot].to(earlier.dtype), earlier)
        return Overwritten(earlier, until[:, some].masked_fill(~lost, 0), position)


def append_to_ring(
    ring: torch.Tensor | None, new: torch.Tensor, first: torch.Tensor, count: torch.Tensor, size: int
) -> torch.Tensor | None:
    """Writes each row's positions [first, first + count) from new (B, H, A, D) into the ring (B, H, N, D).

    first, count: (B,); column a of new holds position first + a; more than `size` of them leave the last `size`.
    Returns the ring.
    """
    most = int(count.max())
    if most == 0:
        return ring
    assert ring is not None  # with something to append `ring_with_room` makes one
    offset = torch.arange(most)
    kept = (offset < count[:, None]) & (offset >= count[:, None] - size)  # (B, most)
    row, column = kept.nonzero(as_tuple=True)
    slot = (first[row] + column) % size
    device = ring.device
    ring[row.to(device), :, slot.to(device)] = new[row.to(device), :, column.to(device)].to(ring.dtype)
    setattr(ring.untyped_storage(), INDEXES, {})
    return ring


@dataclass(frozen=True)
class MemoryLayout(RingLayout):
    """A memory's ring in a static cache: every pair lies in it from the first, those of a segment that has not ended
    too, and which of them a query may find is told by positions.

    columns: the state that holds the latest pairs in a growing cache. size, length: memory_size and segment_length.
    """

    columns: str = ""
    size: int = 0
    length: int = 1

    def lay(self, name, state, seen):
        latest = state[self.columns].tensor  # (B, H, C, D), the current segment's among them
        ring = lay(latest, seen, self.slots)
        if name not in state:
            return ring
        stored = state[name].tensor  # (B, H, N, D)
        seen = seen.to(ring.device)[:, None]
        position = position_in(seen - 1, torch.arange(self.slots, device=ring.device), self.slots)  # (B, slots)
        older = (position < seen - seen % self.length) & (position >= 0)
        at = (position % self.size).clamp(max=stored.shape[2] - 1)[:, None, :, None]
        found = stored.gather(2, at.expand(-1, stored.shape[1], -1, stored.shape[3]))
        return torch.where(older[:, None, :, None], found.to(ring.dtype), ring)

    def unlay(self, ring, seen):
        stored = (seen - seen % self.length).to(ring.device)
        count = min(self.size, int(stored.max()))
        if not count:
            return None
        slot = torch.arange(count, device=ring.device)
        position = position_in(stored[:, None] - 1, slot, self.size)  # (B, N)
        at = (position % self.slots)[:, None, :, None]
        return Folded(ring.gather(2, at.expand(-1, ring.shape[1], -1, ring.shape[3])))
