"""The variants that every law is tested on. A new one is one more entry in VARIANTS.

Sizes divide nothing: 23 tokens, segments of 7, a memory of 5, 3 heads of 10. Weights are drawn wide, so that a key too
many or too few changes the result, and dropout is on in the config, so that a model in eval() that drops shows.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

import hf_gallery as gallery
from hf_gallery.variants import VARIANTS as ARCHITECTURES

VOCAB, SEP, BOS, EOS, PAD = 97, 93, 94, 95, 96
WORDS = 90  # ids below it are plain tokens
# The architectures as the table of what works has them: how names in VARIANTS begin, and the heading.
COLUMNS = {name.removesuffix("_transformer"): about.short for name, about in ARCHITECTURES.items()}


@dataclass(frozen=True)
class Head:
    """One class of a variant, and how it is fed.

    stream: it is causal and carries a cache. source: it reads an encoder's input too. marks: whose first token is
    global. pooled: one result a row.
    question: its input is a question, a separator and a text; its results are two, unless it is pooled.
    choices: it reads (B, C, T) too, and learns from such input only.
    """

    kind: type
    auto: str
    settings: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    source: bool = False
    marks: bool = False
    pooled: bool = False
    question: bool = False
    choices: bool = False


@dataclass(frozen=True)
class Variant:
    """One architecture in one setting.

    horizon: tokens after which the bytes of the cache stop growing; None where they grow with the input.
    linear: the cost per token does not grow with the input, however long.
    limit: the longest input, where there is one.
    period: tokens after which the same happens again, say a segment ends.
    border: length of the segments at whose beginnings gradients stop; None where they reach all that is seen.
    reentrant: its layers stand reentrant gradient checkpoints.
    one_by_one: its layers are called for one segment or block after another, and show no map of attention.
    shallow: what else to set for a model of two layers.
    needs: a package that it needs and that may be missing.
    larger: the same in a size that takes fewer operations for as many tokens, where every operation is counted.
    """

    name: str
    config: type
    heads: dict[str, Head]
    settings: dict[str, Any]
    horizon: int | None = None
    linear: bool = False
    limit: int | None = None
    period: int = 1
    border: int | None = None
    reentrant: bool = True
    one_by_one: bool = False
    shallow: dict[str, Any] = field(default_factory=dict)
    needs: str | None = None
    larger: Variant | None = None

    def make_config(self, head="causal", **overrides):
        return self.config(**SIZES | self.settings | self.heads[head].settings | overrides)

    def make(self, head="causal", *, seed=0, dtype=torch.float32, **overrides):
        """A model in eval(), with loud random weights that depend on the seed only."""
        model = self.heads[head].kind(self.make_config(head, **overrides))
        return loud(model, seed).to(dtype).eval()


SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=30,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=41,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)

TRANSFORMER_HEADS = {
    "causal": Head(gallery.GalleryTransformerForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryTransformerModel, "AutoModel", {"is_decoder": True}, stream=True),
    "encoder": Head(gallery.GalleryTransformerModel, "AutoModel", {"is_decoder": False}),
    "masked": Head(gallery.GalleryTransformerForMaskedLM, "AutoModelForMaskedLM"),
    "sequence": Head(
        gallery.GalleryTransformerForSequenceClassification, "AutoModelForSequenceClassification", pooled=True
    ),
}
TRANSFORMER_ENCODERS = {
    "tokens": Head(
        gallery.GalleryTransformerForTokenClassification, "AutoModelForTokenClassification", {"num_labels": 4}
    ),
    "question": Head(gallery.GalleryTransformerForQuestionAnswering, "AutoModelForQuestionAnswering", question=True),
    "choice": Head(
        gallery.GalleryTransformerForMultipleChoice, "AutoModelForMultipleChoice", pooled=True, choices=True
    ),
}
SEQ2SEQ = {
    "seq2seq": Head(
        gallery.GalleryTransformerForConditionalGeneration,
        "AutoModelForSeq2SeqLM",
        {"num_encoder_layers": 2, "num_decoder_layers": 3, "decoder_start_token_id": BOS},
        stream=True,
        source=True,
    )
}
XL_HEADS = {
    "causal": Head(gallery.GalleryTransformerXLForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryTransformerXLModel, "AutoModel", stream=True),
    "sequence": Head(
        gallery.GalleryTransformerXLForSequenceClassification, "AutoModelForSequenceClassification", pooled=True
    ),
}


LONGFORMER_HEADS = {
    "causal": Head(gallery.GalleryLongformerForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryLongformerModel, "AutoModel", {"is_decoder": True}, stream=True),
}
LONGFORMER_ENCODERS = {
    "encoder": Head(gallery.GalleryLongformerModel, "AutoModel", {"is_decoder": False}),
    "masked": Head(gallery.GalleryLongformerForMaskedLM, "AutoModelForMaskedLM"),
    "sequence": Head(
        gallery.GalleryLongformerForSequenceClassification, "AutoModelForSequenceClassification", pooled=True
    ),
    "tokens": Head(
        gallery.GalleryLongformerForTokenClassification, "AutoModelForTokenClassification", {"num_labels": 4}
    ),
    "question": Head(gallery.GalleryLongformerForQuestionAnswering, "AutoModelForQuestionAnswering", question=True),
    "choice": Head(
        gallery.GalleryLongformerForMultipleChoice,
        "AutoModelForMultipleChoice",
        pooled=True,
        question=True,
        choices=True,
    ),
}
LONGFORMER_DECODER = Head(
    gallery.GalleryLongformerForSequenceClassification,
    "AutoModelForSequenceClassification",
    {"is_decoder": True},
    pooled=True,
)
LED_HEADS = {
    "seq2seq": Head(
        gallery.GalleryLongformerForConditionalGeneration,
        "AutoModelForSeq2SeqLM",
        {"num_encoder_layers": 2, "num_decoder_layers": 3, "decoder_start_token_id": BOS},
        stream=True,
        source=True,
        marks=True,
    )
}
MEMORIZING_HEADS = {
    "causal": Head(gallery.GalleryMemorizingTransformerForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryMemorizingTransformerModel, "AutoModel", stream=True),
    "sequence": Head(
        gallery.GalleryMemorizingTransformerForSequenceClassification,
        "AutoModelForSequenceClassification",
        pooled=True,
    ),
}
RECURRENT_HEADS = {
    "causal": Head(gallery.GalleryBlockRecurrentTransformerForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryBlockRecurrentTransformerModel, "AutoModel", stream=True),
    "sequence": Head(
        gallery.GalleryBlockRecurrentTransformerForSequenceClassification,
        "AutoModelForSequenceClassification",
        pooled=True,
    ),
}
MEMORY_TOKEN_HEADS = {
    "causal": Head(gallery.GalleryRecurrentMemoryTransformerForCausalLM, "AutoModelForCausalLM", stream=True),
    "decoder": Head(gallery.GalleryRecurrentMemoryTransformerModel, "AutoModel", stream=True),
    "encoder": Head(gallery.GalleryRecurrentMemoryTransformerModel, "AutoModel", {"is_decoder": False}),
    "sequence": Head(
        gallery.GalleryRecurrentMemoryTransformerForSequenceClassification,
        "AutoModelForSequenceClassification",
        {"is_decoder": False},
        pooled=True,
    ),
}


def some(heads, *names):
    return {name: heads[name] for name in names}


def transformer(name, heads=None, *, limit=None, **settings):
    """segment_length makes it the windowed one, whose segments see only themselves."""
    length = settings.get("segment_length")
    return Variant(
        f"transformer{name}",
        gallery.GalleryTransformerConfig,
        heads or TRANSFORMER_HEADS | SEQ2SEQ,
        settings,
        horizon=length,
        linear=length is not None,
        limit=limit,
        period=length or 1,
        border=length,
    )


def transformer_xl(name, heads=None, **settings):
    settings = dict(segment_length=7, mem_len=5) | settings
    length = settings["segment_length"]
    return Variant(
        f"transformer_xl{name}",
        gallery.GalleryTransformerXLConfig,
        heads or some(XL_HEADS, "causal", "sequence"),
        settings,
        horizon=length + settings["mem_len"],
        linear=True,
        period=length,
        border=length,
    )


def longformer(name, heads, *, limit=None, **settings):
    config = gallery.GalleryLongformerConfig(**SIZES | settings)
    return Variant(
        f"longformer{name}",
        gallery.GalleryLongformerConfig,
        heads,
        settings,
        horizon=config.cache_capacity,
        linear=limit is None,
        limit=limit,
        shallow=dict(attention_window=4, attention_dilation=2),
    )


def longformer_xl(name, heads, **settings):
    """The decoder in segments with a memory."""
    variant = longformer(f"_xl{name}", heads, **settings)
    length = settings["segment_length"]
    shallow = dict(attention_window=settings["mem_len"])
    return replace(variant, period=length, border=length, shallow=shallow)


def led(name, *, limit, **settings):
    """Longformer's encoder before the Transformer's decoder, whose cache keeps all that was written."""
    return Variant(
        f"longformer_led{name}",
        gallery.GalleryLongformerConfig,
        LED_HEADS,
        settings,
        limit=limit,
        shallow=dict(attention_window=4, attention_dilation=2, num_encoder_layers=2, num_decoder_layers=2),
    )


def memorizing(name, heads, *, needs=None, **settings):
    settings = dict(segment_length=7, mem_len=5, memory_topk=3) | settings
    length = settings["segment_length"]
    period = gallery.GalleryMemorizingTransformerConfig(**SIZES | settings).position_period
    return Variant(
        f"memorizing{name}",
        gallery.GalleryMemorizingTransformerConfig,
        heads,
        settings,
        horizon=settings["memory_size"] + length + settings["mem_len"],
        linear=True,
        period=period or length,
        border=length,
        shallow=dict(memory_layers=[1]),
        needs=needs,
    )


# Settings that give the Memorizing Transformer GPT-2's layers; positions start anew every 15 tokens, in whole
# segments.
GPT2_WITH_MEMORY = dict(
    segment_length=5,
    num_positions=19,
    normalize_qk=False,
    scale_embedding=False,
    attention_bias=True,
    mlp_bias=True,
    norm_type="layer",
    hidden_act="gelu_new",
)


def block_recurrent(name, heads, **settings):
    small, large = (
        Variant(
            f"block_recurrent{name}",
            gallery.GalleryBlockRecurrentTransformerConfig,
            heads,
            settings | dict(block_length=length),
            horizon=2 * length + 2 * settings["num_state_vectors"],  # the state counts as columns
            linear=True,
            period=length,
            reentrant=not settings.get("feedback"),
            one_by_one=settings.get("feedback", False),
            shallow=dict(recurrent_layers=[1]),
        )
        for length in (settings["block_length"], 32)
    )
    return replace(small, larger=large)


def recurrent_memory(name, heads, **settings):
    tokens, depth = settings["num_memory_tokens"], settings.get("bptt_depth", -1)
    small, large = (
        Variant(
            f"recurrent_memory{name}",
            gallery.GalleryRecurrentMemoryTransformerConfig,
            heads,
            settings | dict(segment_length=length),
            horizon=length + 2 * tokens,  # the memory counts as columns
            linear=True,
            period=length,
            border=None if depth < 0 else (depth + 1) * length,
            one_by_one=True,
        )
        for length in (settings["segment_length"], 32)
    )
    return replace(small, larger=large)


VARIANTS = [
    transformer(
        "",
        TRANSFORMER_HEADS | TRANSFORMER_ENCODERS | SEQ2SEQ,
        norm_position="post",
        position_embedding_type="sinusoidal",
    ),
    transformer(
        "_pre",
        norm_position="pre",
        position_embedding_type="learned",
        hidden_act="gelu_new",
        scale_embedding=False,
        max_position_embeddings=61,
        limit=61,
    ),
    transformer("_segments", TRANSFORMER_HEADS, segment_length=7),
    transformer(
        "_narrow",
        some(TRANSFORMER_HEADS, "encoder", "masked"),
        norm_position="post",
        position_embedding_type="learned",
        max_position_embeddings=63,
        position_offset=2,
        embedding_norm=True,
        embedding_size=12,
        limit=61,
    ),
    transformer_xl("", XL_HEADS),
    transformer_xl("_long_memory", segment_length=4, mem_len=11),
    transformer_xl("_no_memory", mem_len=0),
    transformer_xl("_same_length", same_length=True, mem_len=6),
    transformer_xl("_clamp", clamp_len=6, mem_len=8),
    transformer_xl("_untied_pre_zeros", untie_r=True, pre_lnorm=True, initial_memory="zeros"),
    transformer_xl("_adaptive", XL_HEADS, cutoffs=[13, 41], div_val=2),
    longformer(
        "_dilated",
        some(LONGFORMER_HEADS, "causal"),
        position_embedding_type="relative",
        attention_window=[5, 3, 2],
        attention_dilation=[1, 2, 3],
        norm_position="pre",
    ),
    longformer(
        "",
        LONGFORMER_HEADS | LONGFORMER_ENCODERS,
        attention_window=[4, 2, 6],
        attention_dilation=[1, 2, 1],
        max_position_embeddings=63,
        sep_token_id=SEP,
        limit=61,  # positions count from 2
    ),
    longformer_xl(
        "",
        some(LONGFORMER_HEADS, "causal", "decoder") | {"sequence": LONGFORMER_DECODER},
        position_embedding_type="relative",
        norm_position="pre",
        attention_window=[5, 3, 6],
        segment_length=7,
        mem_len=6,
    ),
    longformer_xl(  # a memory that cuts windows
        "_short_memory",
        some(LONGFORMER_HEADS, "causal"),
        position_embedding_type="none",
        attention_window=[5, 9, 4],
        segment_length=4,
        mem_len=3,
    ),
    led(
        "",
        attention_window=[4, 2],
        attention_dilation=[1, 2],
        max_position_embeddings=41,
        max_decoder_position_embeddings=63,
        final_logits_bias=True,
        limit=61,  # positions count from 2
    ),
    memorizing("", MEMORIZING_HEADS, memory_layers=[0, 2], memory_size=40),
    memorizing("_overflowing", some(MEMORIZING_HEADS, "causal"), memory_layers=[1], memory_size=10, mem_len=0),
    memorizing(
        "_faiss",
        some(MEMORIZING_HEADS, "causal"),
        memory_layers=[1],
        memory_size=16,
        memory_backend="faiss_flat",
        needs="faiss",
    ),
    memorizing("_gpt2", some(MEMORIZING_HEADS, "causal"), memory_layers=[1], memory_size=16, **GPT2_WITH_MEMORY),
    block_recurrent("", RECURRENT_HEADS, block_length=7, num_state_vectors=4, recurrent_layers=[1]),
    block_recurrent(
        "_lstm_dual",
        some(RECURRENT_HEADS, "causal"),
        block_length=4,
        num_state_vectors=9,
        recurrent_layers=[0, 2],
        gate_type="lstm",
        recurrence_type="dual",
    ),
    block_recurrent(
        "_single",
        some(RECURRENT_HEADS, "causal"),
        block_length=6,
        num_state_vectors=5,
        recurrent_layers=[0, 1],
        recurrence_type="single",
    ),
    block_recurrent(
        "_feedback",
        some(RECURRENT_HEADS, "causal"),
        block_length=5,
        num_state_vectors=3,
        recurrent_layers=[1],
        feedback=True,
    ),
    recurrent_memory("", MEMORY_TOKEN_HEADS, segment_length=7, num_memory_tokens=3, norm_position="pre"),
    recurrent_memory(
        "_gpt2",
        some(MEMORY_TOKEN_HEADS, "causal"),
        segment_length=5,
        num_memory_tokens=2,
        memory_attention="causal",
        bptt_depth=1,
        max_position_embeddings=61,
        norm_position="pre",
        position_embedding_type="learned",
        hidden_act="gelu_new",
        scale_embedding=False,
    ),
]


def loud(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew: maps that keep the size of what they are given, biases and norms that show."""
    g = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            if id(parameter) in embeddings:
                x = 0.3 * x
            elif name.endswith(("scale", "recurrence.ids", "recurrence.initial")):
                x = 3 + x if name.endswith("scale") else x  # of unit queries and keys; of state vectors, as they start
            elif parameter.dim() > 1:
                x = 1.2 * x / parameter.shape[-1] ** 0.5
            else:
                x = 1 + 0.2 * x if name.endswith("weight") else 0.3 * x
            parameter.copy_(x)
    return model


def words(*shape, seed=0):
    """Random plain tokens."""
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(1000 + seed))


@dataclass
class Runner:
    """A model under one head, called the same way whatever the head.

    Rows that read an encoder's input read one of their own: row i of a batch the i-th of `sources`.
    """

    variant: Variant
    head: Head
    model: nn.Module

    @property
    def seeks_question(self):
        """Tells whether it looks for the question's end in its input."""
        return self.head.question and "global_attention_mask" in self.model.model.arguments()

    def sources(self, rows):
        """Encoder input (B, 9) and mask for the rows numbered `rows`; its length differs from row to row."""
        ids = torch.stack([words(9, seed=500 + row) for row in rows])
        lengths = torch.tensor([9 - row % 4 for row in rows])
        return ids, (torch.arange(9) < lengths[:, None]).long()

    def inputs(self, ids, mask=None, *, rows=None, embeds=None):
        """The keyword arguments by which the head reads ids or embeddings."""
        if self.head.source:
            source, source_mask = self.sources(range(len(ids)) if rows is None else rows)
            arguments = dict(input_ids=source, attention_mask=source_mask, decoder_input_ids=ids)
            arguments |= dict(decoder_attention_mask=mask)
            if self.head.marks:
                arguments |= dict(global_attention_mask=first_marked(source))
        else:
            if self.head.question:
                ids = ask(ids, mask)
            arguments = dict(input_ids=ids if embeds is None else None, attention_mask=mask, inputs_embeds=embeds)
        return {k: x for k, x in arguments.items() if x is not None}

    def __call__(self, ids, mask=None, cache=None, *, rows=None, embeds=None, **options):
        """(result, cache): hidden states or logits (B, T, any), or one result a row (B, any)."""
        arguments = self.inputs(ids, mask, rows=rows, embeds=embeds) | options
        if self.head.stream:
            arguments |= dict(past_key_values=cache, use_cache=options.get("use_cache", True))
        output = self.model(**{k: x for k, x in arguments.items() if x is not None})
        return result_of(output), output.get("past_key_values")


def first_marked(input_ids, attention_mask=None):
    """A mask (B, T) of each row's first token."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return ((mask.cumsum(1) == 1) & (mask == 1)).long()


def ask(ids, mask=None):
    """ids (B, T) with a separator as the third token of each row, or the last of fewer; wrong input stays as it is."""
    if ids.dim() != 2 or 0 in ids.shape or ids.dtype != torch.long or (mask is not None and mask.shape != ids.shape):
        return ids
    mask = torch.ones_like(ids) if mask is None else mask
    third = mask.sum(1, keepdim=True).clamp(max=3)
    return ids.masked_fill((mask.cumsum(1) == third) & (mask == 1), SEP)


def result_of(output):
    """A model's results: its hidden states, its logits, or (B, T, 2) the logits of an answer's start and end."""
    if "last_hidden_state" in output:
        return output["last_hidden_state"]
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], dim=-1)
    return output["logits"]


def runner(variant, head, **options):
    return Runner(variant, variant.heads[head], variant.make(head, **options))


def over(condition=lambda variant, head: True):
    """Parametrises a test over `variant` and `head` (its name), for the heads that the condition picks."""
    pairs = [(v, name) for v in VARIANTS for name, head in v.heads.items() if condition(v, head)]
    cases = [pytest.param(v, name, id=f"{v.name}-{name}", marks=missing(v)) for v, name in pairs]
    return pytest.mark.parametrize(("variant", "head"), cases)


def streams(condition=lambda variant: True, of_head=lambda head: True):
    """Parametrises over the heads that carry a cache."""
    return over(lambda variant, head: head.stream and condition(variant) and of_head(head))


def causal(condition=lambda variant: True, others_slow=False):
    """Parametrises over `variant`, for those that have a causal language model. others_slow: the architectures in
    other settings than their plain ones are among the slow tests."""
    chosen = [v for v in VARIANTS if "causal" in v.heads and condition(v)]
    slow = {v.name: [pytest.mark.slow] if others_slow and v.name not in COLUMNS else [] for v in chosen}
    cases = [pytest.param(v, id=v.name, marks=missing(v) + slow[v.name]) for v in chosen]
    return pytest.mark.parametrize("variant", cases)


def missing(variant):
    """Marks that skip a variant whose package is not installed."""
    absent = variant.needs is not None and importlib.util.find_spec(variant.needs) is None
    return [pytest.mark.skip(reason=f"{variant.needs} is not installed")] if absent else []


FLOAT32 = dict(rtol=1e-4, atol=1e-5)
FLOAT64 = dict(rtol=1e-9, atol=1e-10)


def autocast_nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def leave_autocast(times: int) -> None:
    for _ in range(times):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()


def tolerance(x):
    return FLOAT64 if x.dtype == torch.float64 else FLOAT32


def assert_trains_alike_in_one_graph(model, ids, mask):
    """Loss and gradients, each parameter's, of a training step without dropout are those of the compiled model."""
    torch.compiler.reset()
    found = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        loss = step(input_ids=ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        found.append((loss.detach(), {name: x.grad for name, x in model.named_parameters()}))
    assert_same_step(found[1], found[0])


def padded(variant, head, **more):
    """A model, and ids and mask of rows with padding before, behind and in their midst."""
    run = runner(variant, head, hidden_dropout=0.0, attention_dropout=0.0, **more)
    run.model.config.use_cache = False  # decoders under a classifier keep one by themselves
    ids, mask = words(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[1, :6] = mask[2, 9:17] = mask[2, 20:] = 0
    return run, ids, mask


def training_step(run, ids, mask):
    """The result of a forward in training, and its gradients by the names of parameters."""
    run.model.zero_grad()
    result = result_of(run.model(**run.inputs(ids, mask)))
    result.square().mean().backward()
    return result.detach(), {name: x.grad for name, x in run.model.named_parameters()}


def assert_same_step(found, expected):
    """Equal results and gradients of two steps, each (result, gradients by name)."""
    (result, grads), (expected_result, expected_grads) = found, expected
    assert_equal(result, expected_result)
    for name, grad in expected_grads.items():
        assert (grads[name] is None) == (grad is None), name
        if grad is not None:
            assert_equal(grads[name], grad, name)


def assert_equal(got, expected, message=""):
    """Within the tolerance of the type."""
    torch.testing.assert_close(got, expected, **tolerance(expected), msg=lambda m: f"{message}: {m}" if message else m)
