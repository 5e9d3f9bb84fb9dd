"""Law 3. Resetting, reordering or dropping rows of the cache (documents that end, beams that move) leaves the others
untouched, and a reset row equals a fresh one."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_law_2_batch_anyhow import padded, scatter
from variants import assert_equal, causal, runner, streams, words

LENGTHS = (17, 6, 11)


def read(run, seed=0, mask=None):
    """A cache that has read three rows of unequal length, and the rows."""
    rows = [words(n, seed=seed + n) for n in LENGTHS]
    mask = padded(LENGTHS, "left") if mask is None else mask
    with torch.no_grad():
        _, cache = run(scatter(rows, mask), mask)
    return cache, rows


def reading_on(run, ids, cache, rows=None, cuts=(1, 5, 3)):
    """The results for 9 more tokens of each row."""
    results = []
    with torch.no_grad():
        for part in ids.split(list(cuts), dim=1):
            result, cache = run(part, None, cache, rows=rows)
            results.append(result)
    return torch.cat(results, dim=1)


def alone(run, row, number):
    with torch.no_grad():
        return run(row[None], rows=[number])[0][0]


resettable = streams(of_head=lambda head: not head.source)


@pytest.mark.parametrize("form", ["list", "tensor", "mask"])
@resettable
def test_a_reset_row_equals_a_fresh_one(variant, head, form):
    run = runner(variant, head, dtype=torch.float64)
    cache, rows = read(run)
    columns = cache.get_seq_length()
    chosen = {"list": [1], "tensor": torch.tensor([1]), "mask": torch.tensor([False, True, False])}[form]
    cache.reset_rows(chosen)
    assert cache.seen.tolist() == [17, 0, 11]
    assert cache.get_seq_length() == columns and cache.batch_size == 3
    more = words(3, 9, seed=5)
    result = reading_on(run, more, cache)
    for i, history in enumerate((rows[0], rows[1][:0], rows[2])):
        want = alone(run, torch.cat([history, more[i]]), i)[-9:]
        assert_equal(result[i], want, f"row {i}")


@resettable
def test_reset_with_hidden_states_in_the_cache(variant, head):
    """The same for a cache that was filled with gradients on."""
    run = runner(variant, head, dtype=torch.float64)
    rows, mask = [words(n, seed=n) for n in LENGTHS], padded(LENGTHS, "right")
    _, cache = run(scatter(rows, mask), mask)
    cache.reset_rows([0, 2])
    more = words(3, 9, seed=5)
    result, _ = run(more, None, cache)
    for i, history in enumerate((rows[0][:0], rows[1], rows[2][:0])):
        assert_equal(result[i].detach(), alone(run, torch.cat([history, more[i]]), i)[-9:], f"row {i}")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "training"])
@resettable
def test_a_poisoned_row_harms_no_other_and_heals(variant, head, gradients, poison):
    """A row whose states became NaN leaves its neighbours alone, and is as new after a reset."""
    run = runner(variant, head, dtype=torch.float64, hidden_dropout=0.0, attention_dropout=0.0)
    run.model.train(gradients)
    rows = words(3, 9, seed=1)
    embeds = run.model.get_input_embeddings()(rows).detach()
    embeds[1, 4] = poison
    with torch.set_grad_enabled(gradients):
        result, cache = run(None, cache=None, embeds=embeds)
        assert result[[0, 2]].isfinite().all() and not result[1].isfinite().all()
        cache.reset_rows([1])
        more = words(3, 9, seed=5)
        result, cache = run(more[:, :2], None, cache)
        results = [result]
        result, cache = run(more[:, 2:], None, cache)
        result = torch.cat([*results, result], dim=1)
    for i, history in enumerate((rows[0], rows[1][:0], rows[2])):
        assert_equal(result[i].detach(), alone(run, torch.cat([history, more[i]]), i)[-9:], f"row {i}")


@streams(of_head=lambda head: head.source)
def test_a_row_with_a_source_is_not_reset_in_silence(variant, head):
    """The keys of an encoder's output belong to the row: a new document needs a new source, so the cache says so."""
    run = runner(variant, head)
    cache, _ = read(run)
    more = words(3, 9, seed=5)
    expected = reading_on(run, more, cache.copy())
    with pytest.raises(ValueError, match=r"reset_rows.*encoder"):
        cache.reset_rows([1])
    assert torch.equal(reading_on(run, more, cache), expected)


@pytest.mark.parametrize("verb", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("order", [[2, 0, 1], [0, 0, 2], [1], [2, 2, 2, 1, 0]], ids=str)
@streams()
def test_rows_move_and_are_dropped(variant, head, order, verb):
    run = runner(variant, head, dtype=torch.float64)
    cache, rows = read(run)
    getattr(cache, verb)(torch.tensor(order))
    assert cache.batch_size == len(order) and cache.seen.tolist() == [LENGTHS[i] for i in order]
    more = words(len(order), 9, seed=5)
    result = reading_on(run, more, cache, rows=order)
    for place, i in enumerate(order):
        assert_equal(result[place], alone(run, torch.cat([rows[i], more[place]]), i)[-9:], f"place {place}")


@streams()
def test_rows_are_repeated(variant, head):
    run = runner(variant, head, dtype=torch.float64)
    cache, rows = read(run)
    cache.batch_repeat_interleave(2)
    order = [0, 0, 1, 1, 2, 2]
    assert cache.batch_size == 6 and cache.seen.tolist() == [LENGTHS[i] for i in order]
    more = words(6, 9, seed=5)
    result = reading_on(run, more, cache, rows=order)
    for place, i in enumerate(order):
        assert_equal(result[place], alone(run, torch.cat([rows[i], more[place]]), i)[-9:], f"place {place}")


@streams()
def test_reset_forgets_all(variant, head):
    run = runner(variant, head, dtype=torch.float64)
    cache, _ = read(run)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0 and cache.batch_size == -1
    ids = words(2, 9, seed=5)  # and another number of rows
    result = reading_on(run, ids, cache)
    for i in range(2):
        assert_equal(result[i], alone(run, ids[i], i))


@given(data=st.data())
@causal()
def test_any_sequence_of_moves(variant, data):
    """Chunks, resets, moves and repeats in any order: every row equals the row that it has read so far, alone."""
    run = runner(variant, "causal", dtype=torch.float64)
    histories = [torch.zeros(0, dtype=torch.long)] * 2
    cache, seed = None, 0
    for _ in range(data.draw(st.integers(2, 6), label="steps")):
        b = len(histories)
        action = data.draw(st.sampled_from(["read", "read", "reset", "select", "repeat"]), label="action")
        if cache is None or action == "read":
            width, seed = data.draw(st.integers(1, 9), label="columns"), seed + 1
            with torch.set_grad_enabled(data.draw(st.booleans(), label="gradients")):
                mask = torch.tensor(
                    data.draw(
                        st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=b, max_size=b)
                    )
                )
                ids = words(b, width, seed=seed)
                result, cache = run(ids, mask, cache)
            for i in range(b):
                new = ids[i, mask[i].bool()]
                histories[i] = torch.cat([histories[i], new])
                if len(new):
                    want = alone(run, histories[i], i)[-len(new) :]
                    assert_equal(result[i, mask[i].bool()].detach(), want, f"row {i}")
        elif action == "reset":
            rows = data.draw(st.lists(st.integers(0, b - 1), max_size=b), label="rows")
            cache.reset_rows(rows)
            histories = [h[:0] if i in rows else h for i, h in enumerate(histories)]
        elif action == "select":
            rows = data.draw(st.lists(st.integers(0, b - 1), min_size=1, max_size=4), label="rows")
            cache.reorder_cache(torch.tensor(rows))
            histories = [histories[i] for i in rows]
        elif b < 5:
            cache.batch_repeat_interleave(2)
            histories = [h for h in histories for _ in range(2)]
        if any(len(h) > 50 for h in histories):
            return
