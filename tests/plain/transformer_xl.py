"""Transformer-XL, plainly (Dai et al. 2019, arXiv 1901.02860): one query and one head at a time.

The twin of hf_gallery/models/modeling_transformer_xl.py. Section numbers are the paper's. Adaptive embeddings and
softmax are in adaptive.py; the authors' code, with its segments, memories and shifted scores, is
transformer_xl_authors.py.
"""

import math

import torch
from plain.adaptive import embed, log_probabilities
from plain.parts import feed_forward, head, linear, norm, residual, sinusoid, start_of


def logits(model, ids, starts=(0,)):
    """Logits (T, V) for one row of tokens; log-probabilities where the softmax is adaptive."""
    x, out = hidden_states(model.model, ids, starts), model.lm_head
    return linear(x, out) if hasattr(out, "weight") else log_probabilities(out, model.config, x)


def hidden_states(model, ids, starts=(0,)):
    """(T, E) of one row of tokens. starts: where forwards began."""
    c, d = model.config, model.config.head_dim
    least = -c.mem_len if c.initial_memory == "zeros" else 0  # states of zeros may stand before the first token
    x = torch.stack([embed(model.embed_tokens, c, int(i)) for i in ids]) * math.sqrt(c.hidden_size)

    def attention(attn, layer_norm, x):
        biases = attn if c.untie_r else model
        u, v, rows = biases.content_bias, biases.position_bias, []
        for p in range(len(x)):
            segment = p - p % c.segment_length
            first = p - c.mem_len + 1 if c.same_length else segment - c.mem_len
            border, sees = max(segment, start_of(p, starts)), range(max(first, least), p + 1)
            states = [x[j] if j >= border else x[j].detach() if j >= 0 else torch.zeros_like(x[0]) for j in sees]
            context = torch.stack(states)  # h~ = [SG(memory) ; h], section 3.2
            y, context = (norm(z, layer_norm) if c.pre_lnorm else z for z in (x[p], context))
            distances = [min(p - j, c.clamp_len) if c.clamp_len > 0 else p - j for j in sees]
            relative = torch.stack([sinusoid(j, c.hidden_size) for j in distances])  # R, section 3.3
            row = []
            for h in range(c.num_attention_heads):
                maps = attn.q_proj, attn.k_proj, attn.v_proj, attn.r_proj
                w_q, w_k, w_v, w_r = (f.weight[head(h, d)] for f in maps)
                q, k, r = w_q @ y, context @ w_k.T, relative @ w_r.T
                scores = k @ (q + u[h]) + r @ (q + v[h])  # (a) and (c), then (b) and (d), of section 3.3
                row.append((scores / math.sqrt(d)).softmax(0) @ (context @ w_v.T))
            rows.append(torch.cat(row))
        return torch.stack(rows) @ attn.o_proj.weight.T

    for layer in model.layers:
        out = x + attention(layer.self_attn, layer.self_attn_norm, x)
        x = out if c.pre_lnorm else norm(out, layer.self_attn_norm)
        x = residual(x, layer.feed_forward_norm, c.pre_lnorm, feed_forward, layer.feed_forward, c.hidden_act)
    return x
