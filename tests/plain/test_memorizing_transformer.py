"""The Memorizing Transformer against its plain twin (memorizing_transformer.py), and the checks of its paper."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from plain import memorizing_transformer as twin
from plain.parts import bucket, unit
from transformers.models.t5.modeling_t5 import T5Attention
from variants import GPT2_WITH_MEMORY, SIZES, assert_equal, loud, missing, words

import hf_gallery as gallery
from hf_gallery.models import memory
from hf_gallery.models import modeling_memorizing_transformer as modeling
from hf_gallery.models.positions import t5_buckets

QUIET = dict(hidden_dropout=0.0, attention_dropout=0.0)
SMALL = dict(segment_length=7, mem_len=5, memory_layers=[1], memory_size=40, memory_topk=3)


def config_of(**settings):
    return gallery.GalleryMemorizingTransformerConfig(**SIZES | QUIET | SMALL | settings)


def make(kind=gallery.GalleryMemorizingTransformerForCausalLM, seed=1, **settings):
    return loud(kind(config_of(**settings)), seed).double().eval()


def distinct(b, n):
    """Tokens none of which comes twice in its row, so that no two keys of the first layer are equal."""
    g = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(90, generator=g)[:n] for _ in range(b)])


# ------------------------------------------------------------------------------------------- the twin in every setting

SETTINGS = {
    "plain": dict(),
    "overflowing": dict(memory_size=10, memory_layers=[0, 1, 2]),
    "memory no longer than a segment": dict(memory_size=4),
    "no local cache": dict(mem_len=0, memory_layers=[0, 2]),
    "k of one": dict(memory_topk=1),
    "k of all": dict(memory_topk=40),
    "segments of one": dict(segment_length=1, mem_len=2, memory_size=6),
    "odd heads": dict(num_attention_heads=5, head_dim=7),
    "no memory": dict(memory_layers=[]),
    "of GPT-2's layers": GPT2_WITH_MEMORY,
    "learned positions, no local cache": dict(num_positions=9, mem_len=0),
    "queries and keys as they come": dict(normalize_qk=False),
}
settings_of_all = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def in_parts(model, ids, cuts, **options):
    outputs, cache = [], None
    for part in ids.split(list(cuts), dim=1):
        outputs.append(model(part, past_key_values=cache, use_cache=True, **options))
        cache = outputs[-1].past_key_values
    return outputs, cache


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "with gradients"])
@settings_of_all
def test_equals_the_twin(settings, gradients):
    model, ids = make(**settings), words(1, 24)
    with torch.set_grad_enabled(gradients):
        expected = twin.logits(model, ids[0])
        assert_equal(model(ids).logits[0], expected)


@pytest.mark.parametrize("cuts", [(24,), (9, 15), (4, 6, 14)], ids=str)
@settings_of_all
def test_gradients_equal_the_twin(settings, cuts):
    """Of every weight, over one forward of many segments, and over forwards that go on from a cache."""
    model, ids = make(**settings), words(1, sum(cuts))
    starts = [sum(cuts[:i]) for i in range(len(cuts))]
    expected = twin.logits(model, ids[0], starts)
    got = torch.cat([output.logits for output in in_parts(model, ids, cuts)[0]], dim=1)[0]
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = dict(model.named_parameters())
    grads = [
        torch.autograd.grad((x * weight).sum(), parameters.values(), allow_unused=True, materialize_grads=True)
        for x in (got, expected)
    ]
    for name, a, b in zip(parameters, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1), msg=name)
        if "gate_bias" in name or "q_proj.weight" in name or name.endswith("scale"):
            assert b.abs().max() > 1e-3, name


@pytest.mark.parametrize("cuts", [(24,), (1,) * 24, (9, 15), (3, 11, 10)], ids=lambda x: str(x[:4]))
@settings_of_all
@torch.no_grad()
def test_retrievals_are_those_of_the_twin(settings, cuts):
    """Positions and weights, wherever the input is cut: among the last memory_size positions before the segment."""
    model, ids = make(**settings), distinct(1, 24)
    chosen = {}
    twin.hidden_states(model.model, ids[0], retrieved=chosen)
    outputs, _ = in_parts(model, ids, cuts, output_retrievals=True)
    for output in outputs:
        assert output.retrievals.keys() == chosen.keys() == set(model.config.memory_layers)
    for layer, picks in chosen.items():
        positions, weights = (torch.cat([o.retrievals[layer][i] for o in outputs], dim=2)[0] for i in (0, 1))
        expected = picks.transpose(0, 1)  # (H, T, k)
        assert torch.equal(positions.sort(-1).values, expected.sort(-1).values)
        assert ((weights > 0) == (positions >= 0)).all()
        found = (expected >= 0).any(-1)
        assert_equal(weights.sum(-1), found.double())
        segment = torch.arange(24) - torch.arange(24) % model.config.segment_length
        assert (positions < segment[:, None]).all()
        least = (segment - model.config.memory_size).clamp(min=0)
        assert ((positions >= least[:, None]) | (positions == -1)).all()
        first = model.config.segment_length
        assert not found[:, :first].any() and found[:, first:].all()


@torch.no_grad()
def test_retrievals_of_padded_rows():
    """Positions count a row's own tokens, and stand at its packed tokens."""
    model, rows = make(), [words(1, n, seed=n) for n in (23, 16)]
    ids, mask = words(2, 25, seed=9), torch.zeros(2, 25, dtype=torch.long)
    ids[0, 2:], mask[0, 2:] = rows[0][0], 1
    ids[1, :16], mask[1, :16] = rows[1][0], 1
    got = model(ids, mask, output_retrievals=True).retrievals[1]
    for i, row in enumerate(rows):
        alone = model(row, output_retrievals=True).retrievals[1]
        assert torch.equal(got.positions[i, :, : row.shape[1]], alone.positions[0])
        assert_equal(got.weights[i, :, : row.shape[1]], alone.weights[0])


@torch.no_grad()
def test_a_classifier_shows_its_retrievals_too():
    model = make(gallery.GalleryMemorizingTransformerForSequenceClassification)
    retrieved = model(words(2, 24), output_retrievals=True).retrievals
    assert retrieved.keys() == {1} and (retrieved[1].positions[:, :, 7:] >= 0).all()
    assert model(words(2, 24)).retrievals is None


def test_without_being_asked_nothing_is_watched():
    assert make()(words(1, 9)).retrievals is None


def test_buckets_are_those_of_t5():
    distance = torch.arange(3000)
    theirs = T5Attention._relative_position_bucket(-distance, bidirectional=False, num_buckets=32, max_distance=128)
    assert torch.equal(t5_buckets(distance), theirs)
    assert [bucket(d) for d in range(3000)] == theirs.tolist()
    assert t5_buckets(distance)[[0, 15, 16, 127, 128, 2999]].tolist() == [0, 15, 16, 31, 31, 31]


# -------------------------------------------------------------------------------------------- the checks of the paper


@torch.no_grad()
def test_a_closed_gate_is_a_model_without_memory():
    model, ids = make(memory_layers=[0, 2]), words(2, 30)
    plain = make(memory_layers=[])
    plain.load_state_dict({k: x for k, x in model.state_dict().items() if "gate_bias" not in k})
    expected = plain(ids).logits
    assert (model(ids).logits - expected).abs().max() > 1e-2
    for layer in (0, 2):
        model.model.layers[layer].self_attn.gate_bias.fill_(-60)
    assert_equal(model(ids).logits, expected)


@torch.no_grad()
def test_an_open_gate_and_k_of_all_is_full_attention_over_the_store():
    model = make(gallery.GalleryMemorizingTransformerModel, num_hidden_layers=1, memory_layers=[0], memory_topk=40)
    attn, ids = model.layers[0].self_attn, words(2, 28)
    attn.gate_bias.fill_(60)
    seen = []
    attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(ids)
    y = model.layers[0].self_attn_norm(model.embed_tokens(ids))
    q, _ = attn.project(y)
    k, v = attn.project.keys_values(y)
    for p in (7, 13, 14, 27):
        segment = p - p % 7
        weights = (q[:, :, p : p + 1] @ k[:, :, :segment].mT).softmax(-1)
        assert_equal(seen[0][:, p], (weights @ v[:, :, :segment]).flatten(1))
    assert (seen[0][:, :7] == 0).all()


def random_store(b=2, h=3, t=5, n=200, d=10, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [unit(torch.randn(b, h, size, d, generator=g, dtype=dtype)) for size in (t, n, n)]


def brute_force(query, keys, lower, upper, topk):
    """Scores (B, H, T, k), -inf where fewer are there, and columns, -1 there, by looking at every pair in float64: the
    largest first, and the most recent first among equals."""
    (b, h, t, _), n = query.shape, keys.shape[2]
    scores = torch.full((b, h, t, topk), -math.inf, dtype=torch.float64)
    columns = torch.full((b, h, t, topk), -1)
    for i, j, p in itertools.product(range(b), range(h), range(t)):
        places = torch.tensor([c % n for c in range(int(lower[i, p]), int(upper[i, p]))][::-1], dtype=torch.long)
        best, order = (keys[i, j, places].double() @ query[i, j, p].double()).sort(descending=True, stable=True)
        scores[i, j, p, : len(best)] = best[:topk]
        columns[i, j, p, : len(best)] = places[order[:topk]]
    return scores, columns


INTERVALS = {
    "all": lambda t, n: (0, n),
    "some": lambda t, n: (n // 3, n // 2),
    "fewer than k": lambda t, n: (4, 7),
    "none": lambda t, n: (9, 9),
    "none, before all": lambda t, n: (-n, -n),
    "none, behind all": lambda t, n: (3 * n, 2 * n),
    "one": lambda t, n: (n - 1, n),
    "round the ring": lambda t, n: (n - n // 4, n + n // 5),
    "all, round the ring": lambda t, n: (n // 3, n + n // 3),
    "of each query its own": lambda t, n: (torch.arange(t) * n // (2 * t), torch.arange(t) * n // (2 * t) + n // 3),
}
EXACT = ["exact", pytest.param("faiss_flat", marks=missing(type("V", (), {"needs": "faiss"})))]


@pytest.mark.parametrize("topk", [1, 6, 32])
@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS.keys())
@pytest.mark.parametrize("backend", EXACT)
def test_search_equals_looking_at_every_pair(backend, interval, topk):
    """Recall 1.0 of the exact backends."""
    query, keys, _ = random_store()
    low, high = (torch.as_tensor(x).expand(2, 5).contiguous() for x in interval(5, 200))
    scores, columns = memory.BACKENDS[backend](query, keys, low, high, topk)
    expected, places = brute_force(query, keys, low, high, topk)
    assert scores.shape == columns.shape == (2, 3, 5, topk)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(columns.masked_fill(scores == -math.inf, -1), places)


@pytest.mark.parametrize("n", [5000, 4096, 4099])
def test_exact_search_in_tiles_and_blocks(n):
    """Sizes at which scores come in several tiles, and the best are looked for among blocks first."""
    query, keys, _ = random_store(b=1, h=2, t=2048, n=n, dtype=torch.float32)
    keys[:, :, -1] = query[:, :, 5]  # and one best of all in the last column
    ends = torch.zeros(1, 2048, dtype=torch.long), torch.full((1, 2048), n)
    scores, columns = memory.search_exact(query, keys, *ends, 8)
    some = torch.arange(0, 2048, 37)
    expected = (query[:, :, some] @ keys.mT).topk(8, -1)
    torch.testing.assert_close(scores[:, :, some], expected.values, rtol=1e-5, atol=1e-6)
    assert (columns[:, :, some].sort(-1).values == expected.indices.sort(-1).values).float().mean() > 0.999
    assert (columns[:, :, 5, 0] == n - 1).all()


def test_a_stored_key_finds_itself():
    """A query of unit length that is stored has the dot product 1 with it, and no other has more."""
    _, keys, values = random_store()
    ends = torch.zeros(2, 200, dtype=torch.long), torch.full((2, 200), 200)
    found_keys, found_values, found, columns = memory.retrieve("exact", keys, [memory.Source(keys, values, *ends)], 4)
    assert (columns[..., 0] == torch.arange(200)).all() and found.all()
    assert torch.equal(found_keys[..., 0, :], keys) and torch.equal(found_values[..., 0, :], values)
    product = (found_keys[..., 0, :] * keys).sum(-1)
    torch.testing.assert_close(product, torch.ones_like(product), rtol=0, atol=2e-6)


# The second is what GPUs run: it asks no tensor what it holds.
SEARCHES = pytest.mark.parametrize("search", [memory.search_exact, memory.search_numbered], ids=["exact", "numbered"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [1, 6, 32, 200])
@pytest.mark.parametrize("interval", INTERVALS.values(), ids=INTERVALS.keys())
@pytest.mark.parametrize("tile", [(2**22, 2**14), (600, 30)], ids=["one tile", "many tiles"])
@SEARCHES
def test_of_equal_scores_the_most_recent_come_first(search, tile, interval, topk, dtype, monkeypatch):
    """Keys of small whole numbers: scores are exact in every type, and most of them are alike."""
    monkeypatch.setattr(memory, "_SCORES", tile[0])
    monkeypatch.setattr(memory, "_WIDTH", tile[1])
    query, keys = (torch.randint(-1, 2, (2, 3, size, 4), generator=torch.Generator().manual_seed(size)).to(dtype)
                   for size in (5, 200))  # fmt: skip
    low, high = (torch.as_tensor(x).expand(2, 5).contiguous() for x in interval(5, 200))
    scores, columns = search(query, keys, low, high, topk)
    expected, places = brute_force(query, keys, low, high, topk)
    assert torch.equal(scores.double(), expected)
    assert torch.equal(columns.masked_fill(scores == -math.inf, -1), places)


@pytest.mark.parametrize("topk", [1, 6, 32])
@SEARCHES
def test_a_key_of_nan_is_found_first_and_harms_no_other_row(search, topk):
    """A training that has diverged gives NaN, as elsewhere, and fails nowhere; equal scores stand beside it."""
    query, keys = (torch.randint(-1, 2, (2, 3, size, 4), generator=torch.Generator().manual_seed(size)).float()
                   for size in (5, 200))  # fmt: skip
    low, high = torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), 200)
    scores, columns = search(query, keys, low, high, topk)
    broken = keys.clone()
    broken[0, 1, 3:8] = -torch.tensor(torch.nan)  # of either sign
    got, at = search(query, broken, low, high, topk)
    count = min(topk, 5)
    assert got[0, 1, :, :count].isnan().all() and (at[0, 1, :, :count] >= 3).all() and (at[0, 1, :, :count] < 8).all()
    assert got[0, 1, :, count:].isfinite().all()
    others = torch.ones(2, 3, dtype=torch.bool)
    others[0, 1] = False
    assert torch.equal(got[others], scores[others]) and torch.equal(at[others], columns[others])


@pytest.mark.parametrize("tile", [1, 3, 50])
@pytest.mark.parametrize("lengths", [(8, 11, 2), (15, 8, 13)], ids=str)
@SEARCHES
@torch.no_grad()
def test_tiles_of_queries_that_find_nothing(search, lengths, tile, monkeypatch):
    """Rows whose segments end at other tokens, and a forward that is longer than the memory behind it: in one tile
    some queries find pairs of the ring, and others have none left there."""
    monkeypatch.setattr(modeling, "query_tile", lambda *sizes: tile)
    monkeypatch.setitem(memory.BACKENDS, "exact", search)
    model, ids, width = make(segment_length=4, memory_size=16, memory_layers=[0, 2]), words(3, 60), max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    cache = model(ids[:, :width], attention_mask=mask.long(), use_cache=True).past_key_values
    got = model(ids[:, width:], past_key_values=cache).logits
    for row, length in enumerate(lengths):
        assert_equal(got[row], twin.logits(model, ids[row, width - length :])[length:])


def test_of_equal_scores_a_later_source_comes_first():
    """The ring first, then what this forward has read: positions rise from source to source."""
    query, keys = (torch.randint(-1, 2, (2, 3, size, 4), generator=torch.Generator().manual_seed(size)).float()
                   for size in (5, 60))  # fmt: skip
    parts, ends = keys.split([40, 20], dim=2), [torch.tensor(x).expand(2, 5) for x in (7, 47, 3, 20)]
    sources = [memory.Source(parts[0], parts[0], *ends[:2]), memory.Source(parts[1], parts[1], *ends[2:])]
    found_keys, _, found, columns = memory.retrieve("exact", query, sources, 9)
    order = torch.tensor([c % 40 for c in range(7, 47)] + list(range(43, 60)))  # by position
    _, expected = brute_force(query, keys[:, :, order], torch.zeros(2, 5), torch.full((2, 5), len(order)), 9)
    assert found.all() and torch.equal(columns, order[expected])
    assert torch.equal(found_keys, memory._pick_pairs((keys,), columns)[0])


@pytest.mark.parametrize("backend", EXACT)
def test_the_order_of_the_store_does_not_matter(backend):
    query, keys, values = random_store()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    ends = torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), 200)
    results = []
    for places in (torch.arange(200), order):
        source = memory.Source(keys[:, :, places], values[:, :, places], *ends)
        found = memory.retrieve(backend, query, [source], 7)
        results.append(memory.attend_retrieved(query, *found[:3])[0])
    assert_equal(results[1], results[0])


def test_sources_are_searched_as_one():
    query, keys, values = random_store()
    ends = torch.zeros(2, 5, dtype=torch.long), torch.full((2, 5), 200)
    whole = memory.retrieve("exact", query, [memory.Source(keys, values, *ends)], 9)
    sources = []
    for part in (slice(0, 3), slice(3, 150), slice(150, 200)):
        n = part.stop - part.start
        sources.append(memory.Source(keys[:, :, part], values[:, :, part], ends[0], torch.full((2, 5), n)))
    for a, b in zip(memory.retrieve("exact", query, sources, 9), whole, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("backend", "least"), [("faiss_hnsw", 0.9), ("faiss_ivf", 0.3)])
def test_recall_of_approximate_search(backend, least):
    """Random keys are the worst case for both; an index that finds less than this is broken."""
    pytest.importorskip("faiss")
    query, keys, values = random_store(b=1, h=2, t=64, n=2000, d=16, dtype=torch.float32)
    ends = torch.zeros(1, 64, dtype=torch.long), torch.full((1, 64), 2000)
    exact, columns = (
        memory.retrieve(name, query, [memory.Source(keys, values, *ends)], 10)[3] for name in ("faiss_flat", backend)
    )
    recall = (columns[..., None] == exact[..., None, :]).any(-1).float().mean()
    assert recall > least
    assert torch.equal(memory.retrieve("exact", query, [memory.Source(keys, values, *ends)], 10)[3], exact)


@pytest.mark.parametrize("backend", ["faiss_flat", "faiss_hnsw", "faiss_ivf"])
@torch.no_grad()
def test_faiss_in_the_model(backend):
    """Few stored pairs are all found, whatever the index, so the model is that of exact search."""
    pytest.importorskip("faiss")
    ids = words(2, 30)
    expected = make(memory_layers=[0, 2])(ids).logits
    assert_equal(make(memory_layers=[0, 2], memory_backend=backend)(ids).logits, expected)


@torch.no_grad()
def test_an_index_serves_until_the_memory_changes(monkeypatch):
    """A decoded token searches the index that is there; a segment's end makes new ones, and so does a moved row."""
    pytest.importorskip("faiss")
    search, made = memory.BACKENDS["faiss_flat"], []
    make_index = search.make
    monkeypatch.setattr(search, "make", lambda d, n: made.append(n) or make_index(d, n))
    exact, model, ids = make(), make(memory_backend="faiss_flat"), words(2, 60)
    caches = [m(ids[:, :35], use_cache=True).past_key_values for m in (exact, model)]
    made.clear()
    for t in range(35, 60):
        if t == 44:
            for cache in caches:
                cache.reorder_cache(torch.tensor([1, 0]))
            ids = ids[[1, 0]]
        expected, got = (
            m(ids[:, t : t + 1], past_key_values=c).logits for m, c in zip((exact, model), caches, strict=True)
        )
        assert_equal(got, expected)
    # 35 to 41, 42 to 43, 49 to 55, 56 to 59: an index for each of 2 rows and 3 heads; after the move, one a token.
    assert len(made) == 6 * (4 + 5)


def test_a_backend_of_ones_own(monkeypatch):
    """An entry in BACKENDS is all that it takes."""
    asked = []

    def mine(query, keys, lower, upper, topk):
        asked.append(keys.shape[2])
        return memory.search_exact(query, keys, lower, upper, topk)

    with pytest.raises(ValueError, match="memory_backend.*mine.*exact"):
        config_of(memory_backend="mine")
    monkeypatch.setitem(memory.BACKENDS, "mine", mine)
    ids = words(2, 30)
    assert torch.equal(make(memory_backend="mine")(ids).logits, make()(ids).logits) and asked


def test_faiss_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(memory, "faiss", None)
    for backend in ("faiss_flat", "faiss_hnsw", "faiss_ivf"):
        with pytest.raises(ImportError, match=f"{backend}.*pip install faiss-cpu.*exact"):
            make(memory_backend=backend)
    make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_types_are_searched_in_float32(dtype, autocast):
    """The k best of 4,096 keys that differ little are those that float64 finds."""
    query, keys, values = (x.to(dtype) for x in random_store(b=1, h=2, t=16, n=4096, d=32, dtype=torch.float32))
    ends = torch.zeros(1, 16, dtype=torch.long), torch.full((1, 16), 4096)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, _, _, columns = memory.retrieve("exact", query, [memory.Source(keys, values, *ends)], 32)
    best = (query.double() @ keys.double().mT).topk(32, -1).indices
    assert (columns[..., None] == best[..., None, :]).any(-1).float().mean() > 0.999


def test_a_memory_of_262144_pairs():
    """Filled past its end a segment at a time: the newest are there, and are found."""
    size, segment = 262_144, 16_384
    ring, done = None, torch.zeros(1, dtype=torch.long)
    g = torch.Generator().manual_seed(0)
    for _ in range(18):
        pairs = torch.randn(1, 1, segment, 4, generator=g)
        count = torch.tensor([segment])
        ring = memory.ring_with_room(ring, pairs, done, count, size, in_place=True)
        ring, done = memory.append_to_ring(ring, pairs, done, count, size), done + segment
    assert ring.shape[2] == size
    query = torch.nn.functional.normalize(pairs[:, :, -3:], dim=-1)
    keys = torch.nn.functional.normalize(ring, dim=-1)
    ends = torch.zeros(1, 3, dtype=torch.long), torch.full((1, 3), size)
    columns = memory.retrieve("exact", query, [memory.Source(keys, ring, *ends)], 1)[3].flatten()
    assert columns.tolist() == [(int(done) - 3 + i) % size for i in range(3)]


def test_the_cache_of_one_backend_serves_another():
    pytest.importorskip("faiss")
    ids, more = words(2, 30), words(2, 5, seed=1)
    exact, faiss = make(), make(memory_backend="faiss_flat")
    with torch.no_grad():
        cache = exact(ids).past_key_values
        got = faiss(more, past_key_values=cache).logits
        assert_equal(got, faiss(torch.cat([ids, more], dim=1)).logits[:, 30:])


@torch.no_grad()
@pytest.mark.parametrize("tile", [1, 3, 10])
def test_queries_are_served_in_tiles(tile, monkeypatch):
    """A long input comes in parts, each of which searches only what its queries may see; that may be two ends of the
    ring, as here for the tokens 28 to 34 of a forward that begins at 22."""
    model, ids = make(memory_layers=[0, 2], memory_size=10), distinct(2, 40)
    expected, _ = in_parts(model, ids, (22, 18), output_retrievals=True)
    searched = []
    exact = memory.BACKENDS["exact"]
    monkeypatch.setattr(modeling, "query_tile", lambda *_: tile)
    monkeypatch.setitem(
        memory.BACKENDS, "exact", lambda q, k, *rest: searched.append((q.shape[2], k.shape[2])) or exact(q, k, *rest)
    )
    got, _ = in_parts(model, ids, (22, 18), output_retrievals=True)
    for one, other in zip(got, expected, strict=True):
        assert_equal(one.logits, other.logits)
        for layer in (0, 2):
            for a, b in zip(one.retrievals[layer], other.retrievals[layer], strict=True):
                assert_equal(a, b)
    assert max(q for q, _ in searched) == tile and max(n for _, n in searched) <= 10 + tile + 7


def test_a_tile_fits_in_memory():
    for batch, heads, width, topk, size in ((2, 8, 128, 32, 8192), (1, 3, 10, 3, 40), (64, 32, 256, 512, 262144)):
        tile = memory.query_tile(torch.empty(batch, heads, 1, width, device="meta"), topk, size)
        assert 16 <= tile <= max(64, size) and (tile == 16 or tile * batch * heads * width * topk <= 2**24)


# --------------------------------------------------------------------------------------------------------- the store


@torch.no_grad()
def test_the_oldest_leave_first():
    """After M + r pairs the r oldest are gone: with k = M, exactly the last M are retrieved, however they came."""
    model = make(memory_size=12, memory_topk=12)
    for cuts in ((60,), (1,) * 60, (25, 3, 32)):
        outputs, cache = in_parts(model, words(1, 60), cuts, output_retrievals=True)
        positions = torch.cat([o.retrievals[1].positions for o in outputs], dim=2)[0].sort(-1).values
        for p in range(60):
            segment = p - p % 7
            stored = list(range(max(0, segment - 12), segment))
            assert (positions[:, p] == torch.tensor([-1] * (12 - len(stored)) + stored)).all()
        assert cache.states[1]["memory_keys"].shape[2] == 12


def test_a_ring_that_is_written_past_its_end():
    """Pair p lies in slot p mod size, for any batch of rows that move at their own pace."""
    size, g = 6, torch.Generator().manual_seed(0)
    done, ring, kept = torch.zeros(3, dtype=torch.long), None, None
    for step in range(30):
        count = torch.randint(0, 11, (3,), generator=g)
        new = done[:, None] + torch.arange(int(count.max()) or 1)
        pairs = new[:, None, :, None].expand(-1, 2, -1, 4).double()
        in_place = step % 2 == 0
        before = None if ring is None else ring.clone()
        room = memory.ring_with_room(ring, pairs, done, count, size, in_place)
        kept, ring = ring, memory.append_to_ring(room, pairs, done, count, size)
        if kept is not None and not in_place:
            assert torch.equal(kept, before), "the ring that was given has changed"
        done = done + count
        for row in range(3):
            for p in range(max(0, int(done[row]) - size), int(done[row])):
                assert (ring[row, :, p % size] == p).all()


@torch.no_grad()
def test_a_reset_row_forgets_and_the_others_do_not():
    model, ids, more = make(), words(2, 30), words(2, 6, seed=1)
    cache = model(ids).past_key_values
    twin = cache.copy()
    expected = model(more, past_key_values=twin, output_retrievals=True).retrievals[1]
    cache.reset_rows([0])
    got = model(more, past_key_values=cache, output_retrievals=True).retrievals[1]
    assert torch.equal(got.positions[1], expected.positions[1])
    assert torch.equal(got.weights[1], expected.weights[1])
    assert (got.positions[0] == -1).all() and (got.weights[0] == 0).all()


def test_nothing_stored_is_differentiated():
    """Keys and values of before learn nothing through what is retrieved; gate, scale and queries do."""
    model, ids = make(num_hidden_layers=1, memory_layers=[0], mem_len=0), words(1, 14)
    attn = model.model.layers[0].self_attn
    with torch.no_grad():
        attn.gate_bias.fill_(60)  # local attention has no share
    project = attn.project
    weights = [project.k_proj.weight, project.v_proj.weight, project.q_proj.weight, project.scale]
    total = model(ids).logits[:, 7:].square().sum()
    k, v, q, scale = torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)
    assert k.abs().max() < 1e-12 and v.abs().max() < 1e-12
    assert q.abs().max() > 1e-2 and scale.abs().max() > 1e-2
    with torch.no_grad():
        attn.gate_bias.fill_(0)
    (gate,) = torch.autograd.grad(model(ids).logits[:, 7:].square().sum(), [attn.gate_bias])
    assert (gate.abs() > 1e-3).all()


@torch.no_grad()
def test_a_book_is_read_once_and_asked_often(tmp_path):
    """The saved memory serves every question as the book itself would; no question leaves a trace in it."""
    model = make(memory_size=20)
    book, questions = words(1, 51), [words(1, 17, seed=n) for n in range(3)]
    cache = model(book).past_key_values
    cache.save(tmp_path / "book.safetensors")
    held = {name: x.clone() for name, x in cache.states[1].items()}
    kept = gallery.GalleryCache.load(tmp_path / "book.safetensors")
    for question in questions:
        expected = model(torch.cat([book, question], dim=1)).logits[:, 51:]
        for source in (cache, kept):
            one = source.copy()
            parts = [model(part, past_key_values=one).logits for part in question.split([1, 9, 7], dim=1)]
            assert_equal(torch.cat(parts, dim=1), expected)
            assert source.get_seq_length() == 51 and one.get_seq_length() == 68
    for name, x in held.items():
        assert torch.equal(cache.states[1][name], x), name
    with pytest.raises(ValueError, match=r"past_key_values.*memory_size.*\(20, 21\)"):
        make(memory_size=21)(questions[0], past_key_values=kept)
    with pytest.raises(ValueError, match=r"past_key_values.*memory_layers.*\(\[1\], \[2\]\)"):
        make(memory_layers=[2], memory_size=20)(questions[0], past_key_values=kept)
    assert kept.get_seq_length() == 51


def test_how_it_starts():
    """The gate half open, scales 1, memory in the fourth layer from the top, linear maps by their fan-in."""
    config = gallery.GalleryMemorizingTransformerConfig()
    assert config.memory_layers == [8] and (config.memory_size, config.memory_topk) == (8192, 32)
    model = gallery.GalleryMemorizingTransformerModel(config_of(hidden_size=240, memory_layers=None))
    assert model.config.memory_layers == [0]
    attn = model.layers[0].self_attn
    assert (attn.gate_bias == 0).all() and (attn.project.scale == 1).all()
    other = gallery.GalleryMemorizingTransformerModel(config_of(initial_scale=8.0))
    assert (other.layers[0].self_attn.project.scale == 8).all()
    assert not hasattr(model.layers[1].self_attn, "gate_bias")
    for layer in (attn.project.q_proj, attn.o_proj, model.layers[2].feed_forward.up_proj):
        assert layer.weight.std().item() == pytest.approx(layer.in_features**-0.5, rel=0.05)
        assert layer.weight.abs().max() < 2.3 * layer.in_features**-0.5
    assert not [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert attn.relative_bias.table.weight.std().item() == pytest.approx(32**-0.5, rel=0.25)
    assert isinstance(model.norm, torch.nn.RMSNorm) and model.norm.eps == config.layer_norm_eps == 1e-6
    assert config.hidden_dropout == config.attention_dropout == 0.05


def test_half_precision_keeps_its_type():
    model = make().to(torch.bfloat16)
    ids = words(2, 24)
    model.train()
    output = model(ids, labels=ids, use_cache=True)
    output.loss.backward()
    assert all(x.dtype == torch.bfloat16 for state in output.past_key_values.states for x in state.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = make().float()(ids, labels=ids)
    exact = make()(ids, labels=ids).loss.item()
    assert output.loss.item() == pytest.approx(exact, rel=0.1) and again.loss.item() == pytest.approx(exact, rel=0.1)


# --------------------------------------------------------------------------------------------------------- bad input

WRONG = [
    (dict(memory_topk=41), r"memory_topk.*\b41\b.*memory_size 40"),
    (dict(memory_topk=0), r"memory_topk.*\b0\b"),
    (dict(memory_size=0), r"memory_size.*\b0\b"),
    (dict(memory_size=2.5), r"memory_size.*2\.5"),
    (dict(memory_layers=[3]), r"memory_layers.*\b3\b.*0 to 2.*num_hidden_layers 3"),
    (dict(memory_layers=[-1]), r"memory_layers.*-1.*0 to 2"),
    (dict(memory_layers=[1, 1]), r"memory_layers.*\[1, 1\].*different"),
    (dict(memory_layers=1), r"memory_layers is 1.*list"),
    (dict(memory_layers=["1"]), r"memory_layers.*'1'.*0 to 2"),
    (dict(memory_layers=[True]), r"memory_layers.*True.*0 to 2"),
    (dict(memory_layers=[[1]]), r"memory_layers.*\[1\]"),
    (dict(memory_backend="annoy"), "memory_backend.*annoy.*exact.*faiss_flat"),
    (dict(segment_length=0), r"segment_length.*\b0\b"),
    (dict(mem_len=-1), "mem_len.*-1"),
    (dict(num_positions=0), r"num_positions.*\b0\b"),
    (dict(num_positions=6), r"segment_length is 7.*num_positions 6"),
    (dict(num_positions=13), r"mem_len is 5.*after 7 tokens.*mem_len 0 or less"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(s) for s, _ in WRONG])
def test_bad_config(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)
    with pytest.raises(ValueError, match=message):
        gallery.GalleryMemorizingTransformerConfig.from_dict(config_of().to_dict() | settings)


WITHOUT_FAISS = """
import sys
sys.modules["faiss"] = None  # importing it fails
import torch
import hf_gallery as gallery

sizes = dict(vocab_size=300, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
sizes |= dict(segment_length=2, memory_layers=[0], memory_size=8, memory_topk=2)
kind, config = gallery.GalleryMemorizingTransformerModel, gallery.GalleryMemorizingTransformerConfig
print(kind(config(**sizes)).eval()(torch.arange(6)[None]).last_hidden_state.isfinite().all())
for backend in ("faiss_flat", "faiss_hnsw", "faiss_ivf"):
    try:
        kind(config(**sizes, memory_backend=backend))
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_faiss_backend_without_faiss():
    """Said when the model is built, and not segments later; the exact backend needs nothing."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_FAISS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *errors = done.stdout.splitlines()
    assert first == "tensor(True)"
    assert len(errors) == 3
    for backend, error in zip(("faiss_flat", "faiss_hnsw", "faiss_ivf"), errors, strict=True):
        assert backend in error and "pip install faiss-cpu" in error and "exact" in error
