"""The Block-Recurrent Transformer, plainly (Hutchins et al. 2022, arXiv 2203.07852): a loop over blocks.

The twin of hf_gallery/models/modeling_block_recurrent_transformer.py. Section numbers are the paper's; where the paper
is silent (unit keys, T5 bias, norms, self not seen) it is as google-research/meliad computes it.
"""

import math

import torch
from plain.parts import bucket, feed_forward, linear, norm, past, start_of, unit


def logits(model, ids, starts=(0,)):
    """Logits (T, V) of a language model for one row of tokens."""
    return linear(hidden_states(model.model, ids, starts), model.lm_head)


def hidden_states(model, ids, starts=(0,), states=None):
    """(T, E) of one row of tokens, all layers of a block before the next block. starts: where forwards began.

    states: a dictionary to fill, by recurrent layer, with the state before the first block and after each whole one.
    """
    c, n, w = model.config, len(ids), model.config.block_length
    embedded, outs = model.embed_tokens.weight[ids] * math.sqrt(c.hidden_size), []
    states = {} if states is None else states
    states |= {i: [model.layers[i].self_attn.recurrence.initial] for i in c.recurrent_layers}
    pairs = [[] for _ in model.layers]  # keys and values (H, W, D) of each block so far

    def entering(i, j, p):
        """The state that block j enters layer i with, as token p sees it: constant if an earlier forward left it."""
        return states[i][j].detach() if 0 < j * w <= start_of(p, starts) else states[i][j]

    for j in range(math.ceil(n / w)):
        x, first, last = embedded[j * w : j * w + w], j * w, j * w + w - 1
        for i, layer in enumerate(model.layers):
            attn, y = layer.self_attn, norm(x, layer.self_attn_norm)
            maps, query = attn.project, split(y, attn.project.q_proj, c, length=1)
            pairs[i].append((split(y, maps.k_proj, c, length=1), split(y, maps.v_proj, c)))
            keys, values = (torch.cat(z, dim=1) for z in zip(*pairs[i], strict=True))  # (H, tokens so far, D)
            rows = []
            for t, p in enumerate(range(first, first + len(x))):  # vertical: section 3, recurrent cell
                row = window(attn, query[:, t], keys, values, p, start_of(p, starts), w)
                if attn.reads_state:
                    source = i if i in states else c.recurrent_layers[0]  # feedback: all read that one's
                    part = model.layers[source].self_attn.recurrence
                    cross = split(y[t : t + 1], attn.cross_q_proj, c, attn.cross_scale)
                    row = torch.cat([row, look(cross, *state_pairs(part, entering(source, j, p), c))[0]])
                rows.append(row)
            if i in states and last < n:  # horizontal, once the block is whole
                sees, border = range(max(0, first - w), last + 1), start_of(last, starts)
                seen = (past(z.transpose(0, 1), sees, border).transpose(0, 1) for z in (keys, values))
                states[i].append(next_state(attn.recurrence, entering(i, j, last), *seen, c))
            x = x + linear(torch.stack(rows), attn.o_proj)
            x = x + feed_forward(norm(x, layer.feed_forward_norm), layer.feed_forward, c.hidden_act)
        outs.append(x)
    return norm(torch.cat(outs), model.norm)


def window(attn, query, keys, values, p, border, w):
    """Query p (H, D) over the w tokens before it, itself not among them: (H * D,), zeros for a document's first."""
    sees = range(max(0, p - w), p)
    if not sees:
        return torch.zeros_like(query).flatten()
    bias = attn.relative_bias.table.weight[[bucket(p - s) for s in sees]].T  # (H, at most w)
    k, v = (past(z.transpose(0, 1), sees, border).transpose(0, 1) for z in (keys, values))
    scores = ((k @ query[..., None])[..., 0] + bias) * attn.project.scale.abs()[:, None]
    return (scores.softmax(-1)[:, None] @ v).flatten()


def next_state(part, state, keys, values, c):
    """The state (Z, E) after a block, from the one it entered with, its tokens and those of the block before."""
    z = norm(state, part.norm) + part.ids  # section 3: learned state ids
    own = look(split(z, part.project.q_proj, c, part.project.scale), *state_pairs(part, state, c))
    cross = look(split(z, part.cross_q_proj, c, part.cross_scale), keys, values)
    x, kind = torch.cat([own, cross], dim=-1), c.recurrence_type  # section 3, gate configurations
    state = state if kind == "single" else gated(part.gate, state, linear(x, part.o_proj), x)
    if kind == "skip":
        return state
    hidden = linear(x if kind == "single" else norm(state, part.feed_forward_norm), part.feed_forward.up_proj).relu()
    content = linear(hidden, part.feed_forward.down_proj)
    return gated(part.feed_forward_gate, state, content.tanh() if kind == "single" else content, hidden)


def gated(gate, state, content, hidden):
    """The fixed gate or the LSTM's (section 3, gates)."""
    if hasattr(gate, "gate_bias"):
        g = torch.sigmoid(gate.gate_bias)
        return state * g + content * (1 - g)
    forget = torch.sigmoid(linear(hidden, gate.forget_gate) + 1)
    return state * forget + content * torch.sigmoid(linear(hidden, gate.input_gate) - 1)


def state_pairs(part, state, c):
    """The keys and values (H, Z, D) of a state, which tokens and the state itself read."""
    z = norm(state, part.norm) + part.ids
    return split(z, part.project.k_proj, c, length=1), split(z, part.project.v_proj, c)


def look(query, key, value):
    """Softmax attention of query (H, any, D) over all of key and value (H, S, D): (any, H * D)."""
    return ((query @ key.mT).softmax(-1) @ value).transpose(0, 1).flatten(1)


def split(x, layer, c, scale=None, length=None):
    """x (any, E) by a map, in heads (H, any, D): as it is, of length 1, or of the length |scale| (H,)."""
    y = linear(x, layer).unflatten(-1, (-1, c.head_dim)).transpose(0, 1)
    if scale is not None:
        return unit(y) * scale.abs()[:, None, None]
    return y if length is None else unit(y)
