"""Transformer-XL as the authors' code computes it (kimiyoung/transformer-xl, pytorch/mem_transformer.py and
utils/proj_adaptive_softmax.py): time first, segment after segment, with a list of memories. Slow, plain, autograd.

Weights are a dictionary under the names of transformers' TransfoXLLMHeadModel without "transformer.", the names that
published checkpoints have.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F


def embed(w, config, ids):
    """AdaptiveEmbedding.forward: ids (T, B) to (T, B, E)."""
    scale = config.d_model**0.5
    if config.div_val == 1:
        x = F.embedding(ids, w["word_emb.emb_layers.0.weight"])
        if config.d_model != config.d_embed:
            x = F.linear(x, w["word_emb.emb_projs.0"])
        return x * scale
    ends = [0, *config.cutoffs, config.vocab_size]
    out = None
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        mask = (ids >= start) & (ids < end)
        x = F.linear(
            F.embedding(ids.clamp(start, end - 1) - start, w[f"word_emb.emb_layers.{i}.weight"]),
            w[f"word_emb.emb_projs.{i}"],
        )
        x = x * mask[..., None]
        out = x if out is None else out + x
    return out * scale


def rel_shift(x):
    zero_pad = torch.zeros((x.size(0), 1, *x.shape[2:]), dtype=x.dtype)
    padded = torch.cat([zero_pad, x], dim=1).view(x.size(1) + 1, x.size(0), *x.shape[2:])
    return padded[1:].view_as(x)


def layer(w, config, i, x, r, mask, mem):
    """RelPartialLearnableDecoderLayer.forward: x (qlen, B, E), r (klen, E), mask (qlen, klen), mem (mlen, B, E)."""
    name = f"layers.{i}.dec_attn"
    heads, size = config.n_head, config.d_head
    u = w[f"{name}.r_w_bias" if config.untie_r else "r_w_bias"]
    v = w[f"{name}.r_r_bias" if config.untie_r else "r_r_bias"]

    def norm(part, y):
        return F.layer_norm(
            y, y.shape[-1:], w[f"{part}.layer_norm.weight"], w[f"{part}.layer_norm.bias"], config.layer_norm_epsilon
        )

    qlen, batch = x.shape[:2]
    cat = torch.cat([mem, x], 0)
    q, k, val = F.linear(norm(name, cat) if config.pre_lnorm else cat, w[f"{name}.qkv_net.weight"]).chunk(3, dim=-1)
    q, k, val = (y.view(len(y), batch, heads, size) for y in (q[-qlen:], k, val))
    r = F.linear(r, w[f"{name}.r_net.weight"]).view(-1, heads, size)
    ac = torch.einsum("ibnd,jbnd->ijbn", q + u, k)
    bd = rel_shift(torch.einsum("ibnd,jnd->ijbn", q + v, r))
    score = ((ac + bd) / size**0.5).masked_fill(mask[:, :, None, None], -torch.inf)
    vec = torch.einsum("ijbn,jbnd->ibnd", score.softmax(1), val).reshape(qlen, batch, heads * size)
    out = F.linear(vec, w[f"{name}.o_net.weight"])
    x = x + out if config.pre_lnorm else norm(name, x + out)
    name = f"layers.{i}.pos_ff"
    y = norm(name, x) if config.pre_lnorm else x
    y = F.linear(y, w[f"{name}.CoreNet.0.weight"], w[f"{name}.CoreNet.0.bias"]).relu()
    y = F.linear(y, w[f"{name}.CoreNet.3.weight"], w[f"{name}.CoreNet.3.bias"])
    return x + y if config.pre_lnorm else norm(name, x + y)


def hidden_keys(config, qlen, mlen):
    """dec_attn_mask of MemTransformerLM._forward, True where a key is hidden: (qlen, klen)."""
    klen = mlen + qlen
    ones = torch.ones(qlen, klen)
    if not config.same_length:
        return torch.triu(ones, 1 + mlen).bool()
    mask_len = klen - config.mem_len
    shift = qlen - mask_len if mask_len > 0 else qlen
    return (torch.triu(ones, 1 + mlen) + torch.tril(ones, -shift)).bool()


def segment(w, config, x, mems):
    """One segment: x (T, B, E) embedded, mems n_layer tensors (M', B, E). Hidden (T, B, E) and the next mems."""
    qlen, mlen = len(x), len(mems[0])
    distance = torch.arange(mlen + qlen - 1, -1, -1.0, dtype=x.dtype)
    if config.clamp_len > 0:
        distance = distance.clamp(max=config.clamp_len)
    angle = distance[:, None] / 10000 ** (torch.arange(0.0, config.d_model, 2.0, dtype=x.dtype) / config.d_model)
    r = torch.cat([angle.sin(), angle.cos()], dim=-1)
    mask = hidden_keys(config, qlen, mlen)
    new = []
    for i in range(config.n_layer):
        both = torch.cat([mems[i], x.detach()])
        new.append(both[max(0, len(both) - config.mem_len) :].detach())
        x = layer(w, config, i, x, r, mask, mems[i])
    return x, new


def run(w, config, x, length, mems=None):
    """All segments of x (T, B, E), `length` tokens each. Hidden (T, B, E) and mems."""
    mems = mems or [x.new_zeros(0, *x.shape[1:]) for _ in range(config.n_layer)]
    outs = []
    for part in x.split(length):
        out, mems = segment(w, config, part, mems)
        outs.append(out)
    return torch.cat(outs), mems


def log_probabilities(w, config, hidden, cluster_order="forward"):
    """ProjectedAdaptiveLogSoftmax for every word: hidden (N, E) to (N, V)."""

    def logits(i, weight, bias):
        proj = w.get(f"crit.out_projs.{i}")
        return F.linear(hidden if proj is None else hidden @ proj, weight, bias)

    ends = [0, *config.cutoffs, config.vocab_size]
    weights, biases = [], []
    for i, (start, end) in enumerate(zip(ends[:-1], ends[1:], strict=True)):
        if config.div_val == 1:
            weights.append(w["crit.out_layers.0.weight"][start:end])
            biases.append(w["crit.out_layers.0.bias"][start:end])
        else:
            weights.append(w[f"crit.out_layers.{i}.weight"])
            biases.append(w[f"crit.out_layers.{i}.bias"])
    if not config.cutoffs:
        return logits(0, weights[0], biases[0]).log_softmax(-1)
    head = logits(
        0, torch.cat([weights[0], w["crit.cluster_weight"]]), torch.cat([biases[0], w["crit.cluster_bias"]])
    ).log_softmax(-1)
    parts = [head[:, : ends[1]]]
    for i in range(1, len(ends) - 1):
        column = ends[1] + i - 1 if cluster_order == "forward" else -i
        parts.append(head[:, column, None] + logits(i, weights[i], biases[i]).log_softmax(-1))
    return torch.cat(parts, dim=-1)


def config_of(config):
    """The reference's names for a gallery config."""
    return SimpleNamespace(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        d_embed=config.embedding_size,
        n_head=config.num_attention_heads,
        d_head=config.head_dim,
        d_inner=config.intermediate_size,
        n_layer=config.num_hidden_layers,
        mem_len=config.mem_len,
        same_length=config.same_length,
        clamp_len=config.clamp_len,
        untie_r=config.untie_r,
        pre_lnorm=config.pre_lnorm,
        cutoffs=list(config.cutoffs or []),
        div_val=config.div_val,
        layer_norm_epsilon=config.layer_norm_eps,
    )


def weights_of(model):
    """The parameters of a GalleryTransformerXLForCausalLM under the reference's names, in its graph."""
    named, w = dict(model.named_parameters(remove_duplicate=False)), {}
    for i in range(model.config.num_hidden_layers):
        ours, attention, forward = f"model.layers.{i}", f"layers.{i}.dec_attn", f"layers.{i}.pos_ff"
        w[f"{attention}.qkv_net.weight"] = torch.cat([named[f"{ours}.self_attn.{x}_proj.weight"] for x in "qkv"])
        w[f"{attention}.o_net.weight"] = named[f"{ours}.self_attn.o_proj.weight"]
        w[f"{attention}.r_net.weight"] = named[f"{ours}.self_attn.r_proj.weight"]
        for kind in ("weight", "bias"):
            w[f"{attention}.layer_norm.{kind}"] = named[f"{ours}.self_attn_norm.{kind}"]
            w[f"{forward}.layer_norm.{kind}"] = named[f"{ours}.feed_forward_norm.{kind}"]
            w[f"{forward}.CoreNet.0.{kind}"] = named[f"{ours}.feed_forward.up_proj.{kind}"]
            w[f"{forward}.CoreNet.3.{kind}"] = named[f"{ours}.feed_forward.down_proj.{kind}"]
        if model.config.untie_r:
            w[f"{attention}.r_w_bias"] = named[f"{ours}.self_attn.content_bias"]
            w[f"{attention}.r_r_bias"] = named[f"{ours}.self_attn.position_bias"]
    if not model.config.untie_r:
        w["r_w_bias"], w["r_r_bias"] = named["model.content_bias"], named["model.position_bias"]
    if "lm_head.weight" in named:
        w["word_emb.emb_layers.0.weight"] = named["model.embed_tokens.weight"]
        w["crit.out_layers.0.weight"], w["crit.out_layers.0.bias"] = named["lm_head.weight"], named["lm_head.bias"]
        return w
    for i in range(len(model.config.cutoffs) + 1):
        for theirs, ours in (
            (f"word_emb.emb_layers.{i}.weight", f"model.embed_tokens.tables.{i}.weight"),
            (f"word_emb.emb_projs.{i}", f"model.embed_tokens.projs.{i}"),
            (f"crit.out_layers.{i}.weight", f"lm_head.weights.{i}"),
            (f"crit.out_layers.{i}.bias", f"lm_head.biases.{i}"),
            (f"crit.out_projs.{i}", f"lm_head.projs.{i}"),
        ):
            if ours in named:
                w[theirs] = named[ours]
    if model.config.cutoffs:
        w["crit.cluster_weight"], w["crit.cluster_bias"] = (
            named["lm_head.cluster_weight"],
            named["lm_head.cluster_bias"],
        )
    return w
