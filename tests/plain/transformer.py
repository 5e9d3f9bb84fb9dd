"""The Transformer, plainly (Vaswani et al. 2017, arXiv 1706.03762): one query and one head at a time.

The twin of hf_gallery/models/modeling_transformer.py. Equation and section numbers are the paper's.
"""

import math

import torch
from plain.parts import embedded, feed_forward, head, linear, norm, past, positioned, residual, start_of


def logits(model, ids, source=None, starts=(0,)):
    """Logits (T, V) of a language model for one row of tokens, `source` those of the encoder's."""
    x = hidden_states(model.model, ids, source, starts)
    return linear(x, model.lm_head)  # section 3.4: the same table as the embeddings


def hidden_states(model, ids, source=None, starts=(0,)):
    """(T, E) of one row of tokens. starts: where forwards began; what they left behind carries no gradient."""
    if source is None:
        return stack(model.stack, ids, None, starts)
    return stack(model.decoder, ids, stack(model.encoder, source), starts)


def stack(model, ids, source=None, starts=(0,)):
    """An encoder or a decoder: (T, E). source (S, E): what the encoder made, which a decoder's layers also read."""
    c, n, length = model.config, len(ids), getattr(model.config, "segment_length", None)

    def sees(p):
        """The positions that query p sees: in a decoder none after itself (section 3.2.3); windowed, its segment."""
        first, last = 0, n - 1
        if length is not None:
            first = p - p % length
            last = min(first + length - 1, last)
        return range(first, (p if model.causal else last) + 1)

    def sees_source(p):
        return range(len(source))

    x = positioned(embedded(model, ids), model, [p if length is None else p % length for p in range(n)])
    pre = c.norm_position == "pre"
    for layer in model.layers:
        x = residual(x, layer.self_attn_norm, pre, attention, layer.self_attn, c, sees, starts)
        if source is not None:
            x = residual(x, layer.cross_attn_norm, pre, attention, layer.cross_attn, c, sees_source, (0,), source)
        x = residual(x, layer.feed_forward_norm, pre, feed_forward, layer.feed_forward, c.hidden_act)  # equation 2
    return norm(x, model.norm) if pre else x


def attention(x, attn, config, sees, starts=(0,), source=None):
    """MultiHead(x, source, source), section 3.2.2, by default of x itself: (T, E)."""
    source, d = x if source is None else source, config.head_dim
    q, k, v = linear(x, attn.q_proj), linear(source, attn.k_proj), linear(source, attn.v_proj)
    rows = []
    for p in range(len(x)):
        border, row = start_of(p, starts), []
        for h in range(config.num_attention_heads):
            at = head(h, d)
            keys, values = past(k[:, at], sees(p), border), past(v[:, at], sees(p), border)
            row.append((keys @ q[p, at] / math.sqrt(d)).softmax(0) @ values)  # equation 1
        rows.append(torch.cat(row))
    return linear(torch.stack(rows), attn.o_proj)
