"""Small sums that the plain twins share: maps, norms, embeddings, sinusoids, buckets, and where gradients stop.

A twin computes one row of tokens, in the precision of the model's weights, as its paper writes it: query by query and
head by head. It takes the gallery model for its weights and settings alone. T tokens, E wide, D per head.
"""

import math

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN


def linear(x, layer):
    """x (..., any) by a linear layer."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def norm(x, layer):
    """LayerNorm (Ba et al. 2016), or without its mean and shift where the layer is an RMSNorm."""
    if isinstance(layer, torch.nn.RMSNorm):
        return x / (x.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def unit(x):
    """Vectors (..., D) of length 1."""
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def feed_forward(x, layer, act):
    """Two maps with an activation between: (T, E) to (T, E)."""
    return linear(ACT2FN[act](linear(x, layer.up_proj)), layer.down_proj)


def residual(x, layer_norm, pre, sublayer, *given):
    """LayerNorm(x + Sublayer(x)) (Vaswani et al. 2017, section 3.1); or, as later models have it, `pre`:
    x + Sublayer(LayerNorm(x))."""
    return x + sublayer(norm(x, layer_norm), *given) if pre else norm(x + sublayer(x, *given), layer_norm)


def head(h, d):
    """The columns of head h of d numbers."""
    return slice(h * d, h * d + d)


def heads(x, count):
    """(T, H * D) in heads: (T, H, D)."""
    return x.unflatten(-1, (count, -1))


def attend(query, key, value, bias=0):
    """Queries (T, H, D) over all keys and values (S, H, D), the scale in them; bias (S, H): (T, H * D)."""
    scores = torch.einsum("thd,shd->tsh", query, key) + bias
    return torch.einsum("tsh,shd->thd", scores.softmax(1), value).flatten(1)


def queries(x, layer, scale):
    """Queries (T, H, D) of unit length times a learned scale (H,), as google-research/meliad has them."""
    return unit(heads(linear(x, layer), len(scale))) * scale.abs()[:, None]


def keys_values(x, maps):
    """Keys of unit length and values, (T, H, D) each."""
    return [unit(heads(linear(x, maps.k_proj), len(maps.scale))), heads(linear(x, maps.v_proj), len(maps.scale))]


def embedded(model, ids):
    """Vectors (T, width) of tokens, from one table (Vaswani et al. 2017, section 3.4)."""
    scaled = getattr(model.config, "scale_embedding", True)
    return model.embed_tokens.weight[ids] * (math.sqrt(model.config.embedding_width) if scaled else 1)


def positioned(x, model, places):
    """Vectors (T, width) with the positions of their places (section 3.5), and BERT's norm or ELECTRA's map."""
    c = model.config
    if c.position_embedding_type == "learned":
        x = x + model.embed_positions.weight[[p + c.position_offset for p in places]]
    elif c.position_embedding_type == "sinusoidal":
        order = c.sinusoid_layout == "interleaved"
        x = x + torch.stack([sinusoid(p, c.embedding_width, order) for p in places])
    x = norm(x, model.embed_norm) if c.embedding_norm else x
    return x if c.embedding_width == c.hidden_size else linear(x, model.embed_project)


def sinusoid(position, width, interleaved=False):
    """(width,): sin and cos of position / 10000^(2i / width), all sines first, or each beside its cosine."""
    angles = [position / 10000 ** (2 * i / width) for i in range(width // 2)]
    pairs = [(math.sin(a), math.cos(a)) for a in angles]
    numbers = sum(pairs, ()) if interleaved else [s for s, _ in pairs] + [c for _, c in pairs]
    return torch.tensor(numbers, dtype=torch.float64)


def bucket(distance):
    """T5's bucket of a distance back (Raffel et al. 2019, section 2.1): 16 of one distance, 16 that grow up to 128."""
    if distance < 16:
        return distance
    return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16))


def start_of(p, starts):
    """The position at which the forward that reads p began; `starts` are those of all forwards."""
    return max(s for s in starts if s <= p)


def past(x, columns, border):
    """Rows `columns` of x (T, any), those before `border` without gradient."""
    return torch.cat([x[:border].detach(), x[border:]])[list(columns)]
