"""Law 2. A row in a left- or right-padded batch gives the logits that it gives alone. Its segments, blocks and memory
start at its own first token, not at the batch's first column."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variants import assert_equal, causal, over, runner, streams, words

LENGTHS = (23, 9, 1, 16)


def padded(lengths, kind, width=None, seed=0):
    """A mask (B, width): each row's tokens on the right, on the left, in the middle, or scattered."""
    width = width or max(lengths) + 2
    g = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        start = {"left": width - n, "right": 0, "middle": (width - n) // 2}.get(kind)
        at = torch.randperm(width, generator=g)[:n] if start is None else torch.arange(start, start + n)
        row[at] = 1
    return mask


def scatter(rows, mask, seed=0):
    """The rows' tokens where the mask has ones; the padding holds plain tokens, which nobody must read."""
    ids = words(*mask.shape, seed=seed + 77)
    for i, row in enumerate(rows):
        ids[i, mask[i].bool()] = row
    return ids


def alone(run, rows):
    with torch.no_grad():
        return [run(row[None], rows=[i])[0][0] for i, row in enumerate(rows)]


def assert_rows(run, result, mask, expected):
    for i, want in enumerate(expected):
        got = result[i] if run.head.pooled else result[i, mask[i].bool()]
        assert_equal(got, want, f"row {i}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["left", "right", "middle", "holes"])
@over()
def test_batch_anyhow(variant, head, kind, dtype):
    run = runner(variant, head, dtype=dtype)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    with torch.no_grad():
        result, _ = run(scatter(rows, mask), mask)
    assert_rows(run, result, mask, alone(run, rows))


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@over(lambda variant, head: head.stream)
def test_batch_anyhow_with_gradients(variant, head, kind):
    """Also the gradients of the weights are those of the rows alone, summed."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train()
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    parameters = [p for p in run.model.parameters() if p.requires_grad]

    def gradients(total):
        return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)

    result, _ = run(scatter(rows, mask), mask)
    got = gradients(sum(result[i, mask[i].bool()].square().sum() for i in range(len(rows))))
    expected = gradients(sum(run(row[None], rows=[i])[0].square().sum() for i, row in enumerate(rows)))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.abs().max() + 1))


@over()
def test_padding_columns_are_zero(variant, head):
    """Hidden states of padding are zero; what a language model's map makes of them is its bias."""
    if head not in ("decoder", "encoder"):
        return
    run = runner(variant, head)
    mask = padded(LENGTHS, "holes")
    result, _ = run(scatter([words(n, seed=n) for n in LENGTHS], mask), mask)
    assert (result[mask == 0] == 0).all() and (result[mask == 1] != 0).all()


@over()
def test_no_mask_means_no_padding(variant, head):
    """Without a mask a pad token is a token like any other."""
    run = runner(variant, head)
    ids = words(2, 23)
    ids[0, 3:6] = run.model.config.pad_token_id
    with torch.no_grad():
        assert_equal(run(ids)[0], run(ids, torch.ones_like(ids))[0])


@pytest.mark.parametrize("form", ["new columns", "all columns"])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
@streams()
def test_padding_in_every_chunk(variant, head, kind, form):
    """The mask may be given for the new columns or for all columns since the cache began."""
    run = runner(variant, head, dtype=torch.float64)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, kind)
    ids = scatter(rows, mask)
    results, cache, done = [], None, 0
    with torch.no_grad():
        for part in ids.split([4, 1, 13, 1, 6], dim=1):
            end = done + part.shape[1]
            given_mask = mask[:, done:end] if form == "new columns" else mask[:, :end]
            result, cache = run(part, given_mask, cache)
            results.append(result)
            done = end
    assert cache.get_seq_length() == mask.shape[1]
    assert cache.seen.tolist() == list(LENGTHS)
    assert_rows(run, torch.cat(results, dim=1), mask, alone(run, rows))


@streams()
def test_left_padded_prompt_then_decoding(variant, head):
    """What generate() does with prompts of unequal length."""
    run = runner(variant, head)
    rows = [words(n + 8, seed=n) for n in (11, 4, 1)]
    mask = torch.cat([padded((11, 4, 1), "left", 11), torch.ones(3, 8, dtype=torch.long)], dim=1)
    ids = scatter(rows, mask)
    with torch.no_grad():
        result, cache = run(ids[:, :11], mask[:, :11])
        results = [result]
        for t in range(11, 19):
            result, cache = run(ids[:, t : t + 1], mask[:, : t + 1], cache)
            results.append(result)
    assert_rows(run, torch.cat(results, dim=1), mask, alone(run, rows))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@over(lambda variant, head: variant.config.model_type == "gallery_transformer")
def test_batch_anyhow_on_both_backends(variant, head, implementation):
    run = runner(variant, head, dtype=torch.float64, attn_implementation=implementation)
    rows = [words(n, seed=n) for n in LENGTHS]
    mask = padded(LENGTHS, "holes")
    with torch.no_grad():
        result, _ = run(scatter(rows, mask), mask)
    assert_rows(run, result, mask, alone(runner(variant, head, dtype=torch.float64), rows))


@given(data=st.data())
@causal()
def test_any_padding_in_any_chunks(variant, data):
    """Rows that stand still for a chunk, chunks with no token at all, masks of either form."""
    run = runner(variant, "causal", dtype=torch.float64)
    b = data.draw(st.integers(1, 4), label="rows")
    widths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5), label="chunks")
    bits = data.draw(st.lists(st.integers(0, 2 ** sum(widths) - 1), min_size=b, max_size=b), label="masks")
    mask = torch.tensor([[n >> i & 1 for i in range(sum(widths))] for n in bits])
    rows = [words(int(m.sum()), seed=i) for i, m in enumerate(mask)]
    ids = scatter(rows, mask)
    results, cache, done = [], None, 0
    for width in widths:
        end = done + width
        given_mask = mask[:, done:end] if data.draw(st.booleans(), label="new columns only") else mask[:, :end]
        with torch.set_grad_enabled(data.draw(st.booleans(), label="gradients")):
            result, cache = run(ids[:, done:end], given_mask, cache)
        results.append(result.detach())
        done = end
    result = torch.cat(results, dim=1)
    assert result.isfinite().all()
    filled = [i for i, row in enumerate(rows) if len(row)]
    expected = alone(run, [rows[i] for i in filled])
    for i, want in zip(filled, expected, strict=True):
        assert_equal(result[i, mask[i].bool()], want, f"row {i}")
