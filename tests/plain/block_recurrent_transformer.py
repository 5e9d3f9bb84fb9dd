"""The Block-Recurrent Transformer, plainly (Hutchins et al. 2022, arXiv 2203.07852): a loop over blocks.

The twin of hf_gallery/models/modeling_block_recurrent_transformer.py. Section numbers are the paper's; where it is
silent (unit keys, T5 bias, norms, self not seen) the twin does as google-research/meliad.
"""

import torch
from plain.parts import attend, bucket, embedded, feed_forward, keys_values, linear, norm, past, queries, start_of


def logits(model, ids, starts=(0,)):
    """Logits (T, V) of a language model for one row of tokens."""
    return linear(hidden_states(model.model, ids, starts), model.lm_head)


def hidden_states(model, ids, starts=(0,), states=None):
    """(T, E) of one row of tokens, all layers of a block before the next. starts: where forwards began. states: a
    dictionary to fill, by recurrent layer, with the state before the first block and after each whole one."""
    c, w, pairs, out = model.config, model.config.block_length, [[] for _ in model.layers], []
    states = {} if states is None else states
    states |= {i: [model.layers[i].self_attn.recurrence.initial] for i in c.recurrent_layers}

    def entering(i, p):
        """The state that token p's block enters layer i with: constant if an earlier forward left it."""
        state = states[i][p // w]
        return state.detach() if 0 < p - p % w <= start_of(p, starts) else state

    def vertical(attn, i, p, y, pair):
        """Section 3, recurrent cell: token p, y (1, E), reads the w tokens before it, and the state beside them."""
        sees, border, scale = range(max(0, p - w), p), start_of(p, starts), attn.project.scale
        bias = attn.relative_bias.table.weight[[bucket(p - s) for s in sees]] * scale.abs()  # (at most w, H)
        row = attend(queries(y, attn.project.q_proj, scale), *(past(z, sees, border) for z in pair), bias)
        if not attn.reads_state:
            return row
        source = i if i in states else c.recurrent_layers[0]  # feedback: all layers read that one's
        part = model.layers[source].self_attn.recurrence
        state = keys_values(norm(entering(source, p), part.norm) + part.ids, part.project)
        return torch.cat([row, attend(queries(y, attn.cross_q_proj, attn.cross_scale), *state)], dim=-1)

    for first in range(0, len(ids), w):
        x, last = embedded(model, ids[first : first + w]), first + w - 1
        for i, layer in enumerate(model.layers):
            attn, y = layer.self_attn, norm(x, layer.self_attn_norm)
            pairs[i].append(keys_values(y, attn.project))
            pair = [torch.cat(z) for z in zip(*pairs[i], strict=True)]  # (tokens so far, H, D)
            if i in states and last < len(ids):  # horizontal, once the block is whole
                seen = [past(z, range(max(0, first - w), last + 1), start_of(last, starts)) for z in pair]
                states[i].append(next_state(attn.recurrence, entering(i, last), *seen, c.recurrence_type))
            rows = [vertical(attn, i, first + t, y[t : t + 1], pair) for t in range(len(y))]
            x = x + linear(torch.cat(rows), attn.o_proj)
            x = x + feed_forward(norm(x, layer.feed_forward_norm), layer.feed_forward, c.hidden_act)
        out.append(x)
    return norm(torch.cat(out), model.norm)


def next_state(part, state, keys, values, kind):
    """The state (Z, E) after a block, from the one it entered with, its tokens and those of the block before."""
    z = norm(state, part.norm) + part.ids
    own = attend(queries(z, part.project.q_proj, part.project.scale), *keys_values(z, part.project))
    x = torch.cat([own, attend(queries(z, part.cross_q_proj, part.cross_scale), keys, values)], dim=-1)
    state = state if kind == "single" else gated(part.gate, state, linear(x, part.o_proj), x)
    if kind == "skip":  # section 3, gate configurations
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
