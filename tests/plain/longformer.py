"""Longformer, plainly (Beltagy, Peters, Cohan 2020, arXiv 2004.05150): one query and one head at a time.

The twin of hf_gallery/models/modeling_longformer.py. Section numbers are the paper's.
"""

import math

import torch
from plain import transformer
from plain.parts import embedded, feed_forward, head, linear, norm, positioned, residual, sinusoid, start_of


def logits(model, ids, source=None, marked=(), starts=(0,)):
    """Logits (T, V) of a language model for one row of tokens, `source` those of the encoder's (section 7)."""
    if source is None:
        return linear(hidden_states(model.model, ids, marked, starts), model.lm_head)
    encoded = hidden_states(model.model.encoder, source, marked)
    scores = linear(transformer.stack(model.model.decoder, ids, encoded, starts), model.lm_head)
    return scores + (model.final_logits_bias if model.config.final_logits_bias else 0)


def hidden_states(model, ids, marked=(), starts=(0,)):
    """(T, E) of one row of tokens; marked: the positions of its global tokens. starts: where forwards began; what they
    left behind carries no gradient, nor does what a segment of Longformer-XL has before it to the states that made it
    (Dai et al. 2019, section 3.2)."""
    c, n, d = model.config, len(ids), model.config.head_dim
    pre, relative, xl = c.norm_position == "pre", c.position_embedding_type == "relative", c.segment_length

    def window(p, w, g):
        """Section 3.1: w / 2 keys on each side, every g-th; in a decoder (section 4) w before. Always itself."""
        offsets = range(-w, 1) if c.is_decoder else range(-(w // 2), w // 2 + 1)
        first = max(0, p - p % xl - c.mem_len) if xl else 0
        return [p + j * g for j in offsets if first <= p + j * g < n]

    def attention(y, attn, before, w, g):
        """Every query over its window and the global keys outside it, in one softmax; global queries over all."""
        q, k, v = (linear(y, f) for f in (attn.q_proj, attn.k_proj, attn.v_proj))
        earlier = [linear(before, f) for f in (attn.k_proj, attn.v_proj)] if xl else [k.detach(), v.detach()]
        rows = []
        for p in range(n):
            near, row = window(p, w, g), []
            border = max(start_of(p, starts), p - p % xl if xl else 0)
            far = [s for s in marked if s not in near and (s < p or not c.is_decoder)]
            for h in range(c.num_attention_heads):
                at = head(h, d)
                keys, values = (
                    torch.stack([(now if s >= border else then)[s, at] for s in near + far])
                    for now, then in zip((k, v), earlier, strict=True)
                )
                scores = keys @ q[p, at]
                if relative:  # section 4: as Transformer-XL, within the window
                    r = torch.stack([attn.r_proj.weight[at] @ sinusoid(p - s, c.hidden_size) for s in near])
                    scores = keys @ (q[p, at] + attn.content_bias[h])
                    term = r @ (q[p, at] + attn.position_bias[h])
                    scores = scores + torch.cat([term, term.new_zeros(len(far))])
                row.append((scores / math.sqrt(d)).softmax(0) @ values)
            rows.append(torch.cat(row))
        if marked and not c.is_decoder:  # by maps of their own (section 3.1, linear projections)
            q, k, v = (linear(y, f) for f in (attn.q_global_proj, attn.k_global_proj, attn.v_global_proj))
            every = [head(h, d) for h in range(c.num_attention_heads)]
            for p in marked:
                rows[p] = torch.cat([(k[:, at] @ q[p, at] / math.sqrt(d)).softmax(0) @ v[:, at] for at in every])
        return linear(torch.stack(rows), attn.o_proj)

    x = positioned(embedded(model, ids), model, range(n))
    windows, dilations = c.per_layer("attention_window"), c.per_layer("attention_dilation")
    for layer, w, g in zip(model.layers, windows, dilations, strict=True):
        before = norm(x.detach(), layer.self_attn_norm) if pre else x.detach()
        x = residual(x, layer.self_attn_norm, pre, attention, layer.self_attn, before, w, g)
        x = residual(x, layer.feed_forward_norm, pre, feed_forward, layer.feed_forward, c.hidden_act)
    return norm(x, model.norm) if pre else x
