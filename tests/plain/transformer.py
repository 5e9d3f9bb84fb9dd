"""The Transformer, plainly (Vaswani et al. 2017, arXiv 1706.03762): one query and one head at a time.

The twin of hf_gallery/models/modeling_transformer.py. Equation and section numbers are the paper's.
"""

import math

import torch
from plain.parts import feed_forward, head, linear, norm, past, sinusoid, start_of


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

    def embed():
        width = c.embedding_width
        x = model.embed_tokens.weight[ids] * (math.sqrt(width) if c.scale_embedding else 1)  # section 3.4
        places = [p if length is None else p % length for p in range(n)]
        if c.position_embedding_type == "learned":
            x = x + model.embed_positions.weight[[p + c.position_offset for p in places]]
        else:
            x = x + torch.stack([sinusoid(p, width, c.sinusoid_layout == "interleaved") for p in places])  # 3.5
        x = norm(x, model.embed_norm) if c.embedding_norm else x
        return x if width == c.hidden_size else linear(x, model.embed_project)

    def sees(p):
        """The positions that query p sees: in a decoder none after itself (section 3.2.3); windowed, its segment."""
        first, last = 0, n - 1
        if length is not None:
            first = p - p % length
            last = min(first + length - 1, last)
        return range(first, (p if model.causal else last) + 1)

    def residual(x, layer_norm, sublayer):
        """Section 3.1: LayerNorm(x + Sublayer(x)); or, as later models have it, x + Sublayer(LayerNorm(x))."""
        return x + sublayer(norm(x, layer_norm)) if c.norm_position == "pre" else norm(x + sublayer(x), layer_norm)

    x = embed()
    for layer in model.layers:
        own, cross = layer.self_attn, getattr(layer, "cross_attn", None)
        x = residual(x, layer.self_attn_norm, lambda y, a=own: attention(a, y, y, sees, c, starts))
        if cross is not None:
            x = residual(
                x, layer.cross_attn_norm, lambda y, a=cross: attention(a, y, source, lambda p: range(len(source)), c)
            )
        ffn = layer.feed_forward
        x = residual(x, layer.feed_forward_norm, lambda y, f=ffn: feed_forward(y, f, c.hidden_act))  # equation 2
    return norm(x, model.norm) if c.norm_position == "pre" else x


def attention(attn, x, source, sees, config, starts=(0,)):
    """MultiHead(x, source, source), section 3.2.2: (T, E)."""
    d, (q, k, v) = config.head_dim, (linear(y, f) for y, f in zip((x, source, source), maps(attn), strict=True))
    rows = []
    for p in range(len(x)):
        border, row = start_of(p, starts), []
        for h in range(config.num_attention_heads):
            at = head(h, d)
            keys, values = past(k[:, at], sees(p), border), past(v[:, at], sees(p), border)
            row.append((keys @ q[p, at] / math.sqrt(d)).softmax(0) @ values)  # equation 1
        rows.append(torch.cat(row))
    return linear(torch.stack(rows), attn.o_proj)


def maps(attn):
    return attn.q_proj, attn.k_proj, attn.v_proj
