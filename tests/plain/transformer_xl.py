"""Transformer-XL, plainly (Dai et al. 2019, arXiv 1901.02860): one query and one head at a time.

The twin of hf_gallery/models/modeling_transformer_xl.py and adaptive.py. Section numbers are the paper's. The authors'
code, with its segments, memories and shifted scores, is transformer_xl_authors.py.
"""

import math

import torch
from plain.parts import feed_forward, head, norm, sinusoid, start_of


def logits(model, ids, starts=(0,)):
    """Logits (T, V) for one row of tokens; log-probabilities where the softmax is adaptive."""
    x, out = hidden_states(model.model, ids, starts), model.lm_head
    return x @ out.weight.T + out.bias if hasattr(out, "weight") else log_probabilities(out, model.config, x)


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
        y = norm(x, layer.feed_forward_norm) if c.pre_lnorm else x
        out = x + feed_forward(y, layer.feed_forward, c.hidden_act)
        x = out if c.pre_lnorm else norm(out, layer.feed_forward_norm)
    return x


def embed(part, config, token):
    """The vector (E,) of one token. Adaptive: rare ones stand in narrower tables (Baevski and Auli 2018)."""
    if hasattr(part, "weight"):
        return part.weight[token]
    ends = [0] if config.div_val == 1 else [0, *config.cutoffs]
    i = max(i for i, end in enumerate(ends) if token >= end)
    x = part.tables[i].weight[token - ends[i]]
    return part.projs[i] @ x if len(part.projs) else x


def log_probabilities(part, config, x):
    """Adaptive softmax (Grave et al. 2017): log p(word) = log p(its cluster) + log p(word in the cluster). (T, V)."""
    ends = [0, *config.cutoffs, config.vocab_size]
    one_table, tails = config.div_val == 1, len(ends) - 2

    def scores(i, weight, bias):
        return (x @ part.projs[i] if len(part.projs) else x) @ weight.T + bias

    clusters = []
    for i in range(tails + 1):
        at = slice(ends[i], ends[i + 1]) if one_table else slice(None)
        clusters.append((part.weights[0 if one_table else i][at], part.biases[0 if one_table else i][at]))
    if not tails:
        return scores(0, *clusters[0]).log_softmax(-1)
    weight, bias = clusters[0]
    weight, bias = torch.cat([weight, part.cluster_weight]), torch.cat([bias, part.cluster_bias])
    first = scores(0, weight, bias).log_softmax(-1)  # the frequent words, then one column for each tail cluster
    result = [first[:, : ends[1]]]
    for i in range(1, tails + 1):
        column = ends[1] + (i - 1 if config.cluster_order == "forward" else tails - i)
        result.append(first[:, column, None] + scores(i, *clusters[i]).log_softmax(-1))
    return torch.cat(result, dim=-1)
