"""`attend` by torch's fused kernels over the same intervals, one call for each tile of queries.

Letters: see spans.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .attention_problem import Problem
from .exporting import outside_graphs


@outside_graphs  # its tiles depend on the intervals: every new length would be traced anew
def attend_sdpa(problem: Problem) -> torch.Tensor:
    """out (B, H, T, Dv) of a checked problem.

    Queries, keys and values are split once, and keys joined again for each tile, so that autograd's work stays linear
    in T as well. Raises ValueError for a position term that depends on the query.
    """
    query, key, value, spans, position, scale, dropout = problem
    if position is not None and position.query is not None:
        raise ValueError(
            'implementation="sdpa" has no position term that depends on the query; use implementation="eager"'
        )
    b, h, t, _ = query.shape
    s = key.shape[2]
    if position is None and t > 1 and s == t and spans.is_causal:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout, scale=scale)
    size = 256
    query_parts, key_parts, value_parts = (x.split(size, dim=2) for x in (query, key, value))
    outs = []
    for i, (first, last, full_first, full_last) in enumerate(spans.tiles(slice(0, b), size)):
        queries = slice(i * size, min((i + 1) * size, t))
        if first > last:
            outs.append(value.new_zeros(b, h, queries.stop - queries.start, value.shape[-1]))
            continue
        parts = slice(first // size, last // size + 1)
        start, stop = parts.start * size, min(parts.stop * size, s)
        k, v = torch.cat(key_parts[parts], dim=2), torch.cat(value_parts[parts], dim=2)
        bias = None
        nothing = None
        if position is not None:
            distance = (s - t) + torch.arange(queries.start, queries.stop, device=query.device)[:, None]
            distance = distance - torch.arange(start, stop, device=query.device)
            entry = (position.farthest - distance).clamp(0, position.table.shape[1] - 1)
            bias = (position.table[:, entry] * scale).to(query.dtype)[None]  # (1, H, t, s)
        if start < full_first or stop - 1 > full_last:
            lower, upper = (x[:, None, queries, None] for x in spans.on(query.device))
            column = torch.arange(start, stop, device=query.device)
            visible = (column >= lower) & (column <= upper)  # (B or 1, 1, t, s)
            nothing = upper < lower  # the kernels give NaN for these queries: let them see all, then drop it
            visible = visible | nothing
            hidden = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, -math.inf)
            bias = hidden if bias is None else bias + hidden
        out = F.scaled_dot_product_attention(
            query_parts[i], k, v, attn_mask=bias, dropout_p=dropout, scale=scale
        )  # (B, H, t, Dv)
        if nothing is not None:
            out = out.masked_fill(nothing, 0.0)
        outs.append(out)
    return torch.cat(outs, dim=2) if len(outs) != 1 else outs[0]
