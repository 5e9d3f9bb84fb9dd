"""The Recurrent Memory Transformer, plainly (Bulatov et al. 2022, arXiv 2207.06881): one segment, query and head at a
time.

The twin of hf_gallery/models/modeling_recurrent_memory_transformer.py. Section numbers are the paper's. Layers are
those of the Transformer, as its twin has them.
"""

import torch
from plain.parts import embedded, feed_forward, linear, norm, positioned, residual
from plain.transformer import attention


def logits(model, ids, starts=(0,)):
    """Logits (T, V) for one row of tokens. starts: where forwards began."""
    return linear(hidden_states(model.model, ids, starts), model.lm_head)


def hidden_states(model, ids, starts=(0,)):
    """(T, E) of one row of tokens."""
    c, m = model.config, model.config.num_memory_tokens
    words = embedded(model, ids)
    memory = model.memory.initial if m else words[:0]
    out = []
    for number, first in enumerate(range(0, len(ids), c.segment_length)):
        tokens = words[first : first + c.segment_length]
        n, here = len(tokens), [s - first for s in starts if s > first]
        cut = c.bptt_depth >= 0 and number % (c.bptt_depth + 1) == 0  # back-propagation through time
        if number and (first in starts or cut):
            memory = memory.detach()
        again = memory.detach() if number and any(s < n for s in here) else memory  # written in a later forward
        x = torch.cat([memory, tokens, again] if c.is_decoder else [memory, tokens])  # section 3.2
        y = segment(model, x, [0, *(s + m for s in here if s < n)])
        out.append(y[m : m + n])
        memory = y[m + n :] if c.is_decoder else y[:m]  # what has been written is read by the next segment
    return torch.cat(out)


def segment(model, x, starts):
    """The stack on one segment with its memory tokens: (any, E). starts: the places where forwards began."""
    c, m, n = model.config, model.config.num_memory_tokens, len(x)

    def sees(p):
        """Read memory sees itself, tokens the read memory and those before them, written memory sees all."""
        if not c.is_decoder:
            return range(n)
        if c.memory_attention == "causal":
            return range(p + 1)
        return range(m if p < m else n if p >= n - m else p + 1)

    x, pre = positioned(x, model, range(n)), c.norm_position == "pre"
    for layer in model.layers:
        x = residual(x, layer.self_attn_norm, pre, attention, layer.self_attn, c, sees, starts)
        x = residual(x, layer.feed_forward_norm, pre, feed_forward, layer.feed_forward, c.hidden_act)
    return norm(x, model.norm) if pre else x
