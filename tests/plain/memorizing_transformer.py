"""The Memorizing Transformer, plainly (Wu et al. 2022, arXiv 2203.08913): one query and one head at a time.

The twin of hf_gallery/models/modeling_memorizing_transformer.py: section 3 of the paper, and where that is silent
(unit keys, T5 bias, norms) as google-research/meliad computes it.
"""

import math

import torch
from plain.parts import bucket, embedded, feed_forward, head, linear, norm, past, start_of, unit


def logits(model, ids, starts=(0,)):
    """Logits (T, V) of a language model for one row of tokens."""
    return linear(hidden_states(model.model, ids, starts), model.lm_head)


def hidden_states(model, ids, starts=(0,), retrieved=None):
    """(T, E) of one row of tokens. starts: where forwards began. retrieved: a dictionary to fill with the positions
    (T, H, k) that each memory layer retrieved, -1 where it found fewer."""
    c, n, d = model.config, len(ids), model.config.head_dim
    period = n if c.num_positions is None else c.num_positions // c.segment_length * c.segment_length

    def attention(attn, y, number):
        q, k, v = (linear(y, f) for f in (attn.project.q_proj, attn.project.k_proj, attn.project.v_proj))
        remembers, rows = number in c.memory_layers, []
        picks = torch.full((n, c.num_attention_heads, c.memory_topk), -1)
        for p in range(n):
            row = []
            for h in range(c.num_attention_heads):
                at = head(h, d)
                qs, ks, vs, scale = q[p, at], k[:, at], v[:, at], 1 / math.sqrt(d)
                if c.normalize_qk:  # old keys stay comparable with new queries
                    qs, ks, scale = unit(qs), unit(ks), attn.project.scale[h].abs()
                result = local(attn, qs, ks, vs, scale, p, h)
                if remembers:
                    best = nearest(qs, ks, p)
                    found = memory(qs, ks[best].detach(), vs[best].detach(), scale)
                    gate = torch.sigmoid(attn.gate_bias[h])
                    result = result * (1 - gate) + found * gate  # V_a = g V_m + (1 - g) V_c
                    picks[p, h, : len(best)] = torch.tensor(best)
                row.append(result)
            rows.append(torch.cat(row))
        if remembers and retrieved is not None:
            retrieved[number] = picks
        return linear(torch.stack(rows), attn.o_proj)

    def local(attn, q, k, v, scale, p, h):
        """Over the query's segment and the mem_len tokens before it, which carry no gradient (section 3)."""
        segment = p - p % c.segment_length
        sees, border = range(max(p - p % period, segment - c.mem_len), p + 1), max(segment, start_of(p, starts))
        scores = past(k, sees, border) @ q
        if c.num_positions is None:  # T5's bias
            scores = scores + torch.stack([attn.relative_bias.table.weight[bucket(p - s), h] for s in sees])
        return (scores * scale).softmax(0) @ past(v, sees, border)

    def nearest(q, k, p):
        """The k stored positions with the largest dot product: of the last memory_size before the query's segment."""
        segment = p - p % c.segment_length
        stored = range(max(0, segment - c.memory_size), segment)
        return sorted(stored, key=lambda s: -float((k[s] @ q).detach()))[: c.memory_topk]

    def memory(q, k, v, scale):
        """Attention over what was retrieved, in a softmax of its own; zeros for an empty memory."""
        return (k @ q * scale).softmax(0) @ v if len(k) else torch.zeros_like(q)

    x = embedded(model, ids)
    if c.num_positions is not None:
        x = x + model.embed_positions.weight[[p % period for p in range(n)]]
    for number, layer in enumerate(model.layers):
        x = x + attention(layer.self_attn, norm(x, layer.self_attn_norm), number)
        x = x + feed_forward(norm(x, layer.feed_forward_norm), layer.feed_forward, c.hidden_act)
    return norm(x, model.norm)
