"""torch's two FlashAttention operators by their definition, for CPUs, sequence by sequence with all scores: the tokens
of all sequences one behind another, and two numbers that say what a query of a sequence sees."""

import math

import torch

CALLS = {"forward": [], "backward": []}  # the last arguments that each was given


def visible(queries, keys, left, right, causal):
    """Mask (queries, keys) of one sequence: the last query stands at the last key."""
    at = keys - queries + torch.arange(queries)[:, None]
    column = torch.arange(keys)
    right = 0 if causal else right
    mask = torch.ones(queries, keys, dtype=torch.bool)
    if left >= 0:
        mask &= column >= at - left
    if right >= 0:
        mask &= column <= at + right
    return mask


def check(query, key, value, cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p):
    """Fails for tensors that the kernels refuse, or would read wrong."""
    tokens, heads, size = query.shape
    assert key.shape == value.shape == (len(key), heads, size) and size % 8 == 0 and size <= 256
    assert query.dtype == key.dtype == value.dtype
    for x in (query, key, value):
        assert x.stride(-1) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.storage_offset() % 8 == 0
    for ends, count, most in ((cu_seqlens_q, tokens, max_q), (cu_seqlens_k, len(key), max_k)):
        assert ends.dtype == torch.int32 and ends.dim() == 1 and ends.is_contiguous() and len(ends) > 1
        lengths = ends.diff()
        assert int(ends[0]) == 0 and int(ends[-1]) == count and int(lengths.min()) > 0 and int(lengths.max()) == most
    assert cu_seqlens_q.shape == cu_seqlens_k.shape and dropout_p == 0.0


def sequences(query, key, ends_q, ends_k, scale, left, right, causal):
    """Of each sequence its slices and scores (H, queries, keys), -inf where nothing is seen."""
    for i in range(len(ends_q) - 1):
        q, k = (slice(int(ends[i]), int(ends[i + 1])) for ends in (ends_q, ends_k))
        scores = torch.einsum("qhd,khd->hqk", query[q].double(), key[k].double()) * scale
        mask = visible(q.stop - q.start, k.stop - k.start, left, right, causal)
        yield q, k, scores.masked_fill(~mask, -math.inf)


def forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, **others,
):  # fmt: skip
    """out (tokens, H, D) and lse (H, tokens), +inf of a query that sees nothing."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
    CALLS["forward"].append((query.shape[-1], window_size_left, window_size_right, is_causal, len(cum_seq_q) - 1))
    assert not any(others.values()) and not return_debug_mask
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(query), torch.empty(query.shape[1], len(query), dtype=kind)
    window = scale, window_size_left, window_size_right, is_causal
    for q, k, scores in sequences(query, key, cum_seq_q, cum_seq_k, *window):
        sums = scores.logsumexp(-1)
        sums = sums.masked_fill(sums == -math.inf, math.inf)
        out[q] = torch.einsum("hqk,khd->qhd", (scores - sums[..., None]).exp(), value[k].double()).to(out.dtype)
        lse[:, q] = sums.to(kind)
    empty = query.new_empty(0)
    return out, lse, torch.zeros(2, dtype=torch.uint64), empty, empty


def backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    """Gradients of query, key and value, from the out and lse that are given."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p)
    CALLS["backward"].append((query.shape[-1], window_size_left, window_size_right, is_causal, len(cum_seq_q) - 1))
    assert out.shape == grad_out.shape == query.shape and out.dtype == grad_out.dtype == query.dtype
    assert logsumexp.shape == (query.shape[1], len(query)) and logsumexp.is_contiguous()
    assert logsumexp.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)
    grads = [torch.full_like(x, math.nan, memory_format=torch.contiguous_format) for x in (query, key, value)]
    delta = (grad_out.double() * out.double()).sum(-1).T  # (H, tokens)
    window = scale, window_size_left, window_size_right, is_causal
    for q, k, scores in sequences(query, key, cum_seq_q, cum_seq_k, *window):
        p = (scores - logsumexp[:, q, None].double()).exp()
        given = grad_out[q].double()
        dp = torch.einsum("qhd,khd->hqk", given, value[k].double())
        ds = p * (dp - delta[:, q, None]) * scale
        found = (
            torch.einsum("hqk,khd->qhd", ds, key[k].double()),
            torch.einsum("hqk,qhd->khd", ds, query[q].double()),
            torch.einsum("hqk,qhd->khd", p, given),
        )
        for grad, where, x in zip(grads, (q, k, k), found, strict=True):
            grad[where] = x.to(grad.dtype)
    return tuple(grads)


def register():
    """Puts them in place of torch's on CPUs, which has none there, until the library that is returned is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    return library
