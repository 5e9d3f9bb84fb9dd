"""One side of one comparison, in a process of its own: prepares the work, then does it once for each line it is sent.

    python worker.py NAME SIDE SETTINGS     NAME of WORKS, SIDE "gallery" or "peer", SETTINGS as JSON

When it is ready it answers {"parameters": ..., "threads": ..., "flops": ...}, then for each line, "step" or "product",
the seconds of doing that once more, {"clock": ..., "processor": ...}, one JSON value a line. A product, of two large
matrices, tells what the machine reaches; it and flops, the floating-point operations of both, are the gallery's side's
only. processor: of this process and of those that it has started. The other side may run in an environment that holds
little but torch and the peer, so what a work needs is imported where it needs it, and nothing of this package outside
the gallery's own side.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

Step = Callable[[], Any]


def _tokens(settings: dict[str, Any], *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings["seed"])
    return torch.randint(0, settings["vocabulary"], shape, generator=generator)


def _sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """The sizes under the names of gallery configs, without dropout: every side computes the same layers."""
    return dict(
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        intermediate_size=4 * settings["hidden"],
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def _training_step(model, **inputs) -> Step:
    """Forward with a loss, and backward; the optimiser is not part of an architecture."""
    model.train()

    def step():
        model(**inputs).loss.backward()
        model.zero_grad()

    return step


# ---- Longformer, bidirectional, against transformers' own


def _longformer_gallery(settings):
    from hf_gallery import GalleryLongformerConfig, GalleryLongformerForMaskedLM

    ids = _tokens(settings, 1, settings["length"])
    config = GalleryLongformerConfig(
        attention_window=settings["longformer_window"] // 2,  # each side; theirs is the whole width
        position_embedding_type="learned",
        max_position_embeddings=settings["length"] + 2,
        **_sizes(settings),
    )
    model = GalleryLongformerForMaskedLM(config)
    return model, _training_step(model, input_ids=ids, labels=ids)


def _longformer_peer(settings):
    from transformers import LongformerConfig, LongformerForMaskedLM

    ids = _tokens(settings, 1, settings["length"])
    sizes = _sizes(settings)
    config = LongformerConfig(
        attention_window=settings["longformer_window"],
        max_position_embeddings=settings["length"] + 2,
        hidden_dropout_prob=sizes.pop("hidden_dropout"),
        attention_probs_dropout_prob=sizes.pop("attention_dropout"),
        pad_token_id=1,
        **sizes,
    )
    model = LongformerForMaskedLM(config)
    ids = ids.clamp(min=2)  # 1 is padding there
    return model, _training_step(model, input_ids=ids, labels=ids)


# ---- Transformer, full causal attention, against GPT-2 with torch's fused kernels


def _transformer_gallery(settings, implementation="eager"):
    from hf_gallery import GalleryTransformerConfig, GalleryTransformerForCausalLM

    ids = _tokens(settings, 1, settings["length"])
    config = GalleryTransformerConfig(
        norm_position="pre",
        position_embedding_type="learned",
        hidden_act="gelu_new",
        max_position_embeddings=settings["length"],
        attn_implementation=implementation,
        **_sizes(settings),
    )
    model = GalleryTransformerForCausalLM(config)
    return model, _training_step(model, input_ids=ids, labels=ids)


def _transformer_sdpa_gallery(settings):
    return _transformer_gallery(settings, "sdpa")


def _transformer_peer(settings):
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = _tokens(settings, 1, settings["length"])
    config = GPT2Config(
        vocab_size=settings["vocabulary"],
        n_embd=settings["hidden"],
        n_layer=settings["layers"],
        n_head=settings["heads"],
        n_positions=settings["length"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(config)
    return model, _training_step(model, input_ids=ids, labels=ids, use_cache=False)


# ---- Transformer-XL, against transformers 4.35.2, the last release that carries it in its main tree


def _xl_gallery_model(settings):
    from hf_gallery import GalleryTransformerXLConfig, GalleryTransformerXLForCausalLM

    segment = settings["segment"]
    config = GalleryTransformerXLConfig(segment_length=segment, mem_len=segment, **_sizes(settings))
    return GalleryTransformerXLForCausalLM(config)


def _xl_train_gallery(settings):
    from hf_gallery import GalleryCache

    model = _xl_gallery_model(settings).train()
    ids = _tokens(settings, settings["xl_batch"], settings["segment"])
    cache = GalleryCache(model.config)

    def step():
        model(input_ids=ids, past_key_values=cache, labels=ids).loss.backward()
        model.zero_grad()

    step()  # the memory is full from here on
    return model, step


def _xl_decode_gallery(settings):
    from hf_gallery import GalleryCache

    model = _xl_gallery_model(settings).eval()
    ids = _tokens(settings, settings["xl_batch"], 2 * settings["segment"])
    cache, carried = GalleryCache(model.config), {}

    @torch.no_grad()
    def read(new):
        logits = model(input_ids=new, past_key_values=cache, logits_to_keep=1).logits
        carried["last"] = logits[:, -1].argmax(-1, keepdim=True)

    read(ids)

    def decode():
        for _ in range(settings["decode_tokens"]):
            read(carried["last"])

    return model, decode


def _xl_peer_model(settings):
    from transformers import TransfoXLConfig, TransfoXLLMHeadModel

    config = TransfoXLConfig(
        vocab_size=settings["vocabulary"],
        cutoffs=[],
        div_val=1,
        d_model=settings["hidden"],
        d_embed=settings["hidden"],
        n_head=settings["heads"],
        d_head=settings["hidden"] // settings["heads"],
        d_inner=4 * settings["hidden"],
        n_layer=settings["layers"],
        mem_len=settings["segment"],
        clamp_len=-1,
        same_length=False,
        dropout=0.0,
        dropatt=0.0,
    )
    return TransfoXLLMHeadModel(config)


def _xl_train_peer(settings):
    model = _xl_peer_model(settings).train()
    ids = _tokens(settings, settings["xl_batch"], settings["segment"])
    carried = {"mems": None}

    def step():
        output = model(input_ids=ids, mems=carried["mems"], labels=ids)
        output.loss.backward()
        model.zero_grad()
        carried["mems"] = output.mems

    step()
    return model, step


def _xl_decode_peer(settings):
    model = _xl_peer_model(settings).eval()
    ids = _tokens(settings, settings["xl_batch"], 2 * settings["segment"])
    carried = {}

    @torch.no_grad()
    def read(new):
        output = model(input_ids=new, mems=carried.get("mems"))
        carried["mems"], carried["last"] = output.mems, output.prediction_scores[:, -1].argmax(-1, keepdim=True)

    for part in ids.split(settings["segment"], dim=1):
        read(part)

    def decode():
        for _ in range(settings["decode_tokens"]):
            read(carried["last"])

    return model, decode


# ---- Block-Recurrent Transformer, against block-recurrent-transformer-pytorch


def _block_recurrent_gallery(settings):
    from hf_gallery import GalleryBlockRecurrentTransformerConfig, GalleryBlockRecurrentTransformerForCausalLM

    ids = _tokens(settings, 1, settings["length"])
    config = GalleryBlockRecurrentTransformerConfig(
        block_length=settings["block"],
        num_state_vectors=settings["states"],
        recurrent_layers=[settings["layers"] // 2 - 1],
        **_sizes(settings),
    )
    model = GalleryBlockRecurrentTransformerForCausalLM(config)
    return model, _training_step(model, input_ids=ids, labels=ids)


def _block_recurrent_peer(settings):
    from block_recurrent_transformer_pytorch import BlockRecurrentTransformer

    ids = _tokens(settings, 1, settings["length"] + 1)  # it cuts off the last one as the label of the one before
    model = BlockRecurrentTransformer(
        num_tokens=settings["vocabulary"],
        dim=settings["hidden"],
        depth=settings["layers"],
        heads=settings["heads"],
        dim_head=settings["hidden"] // settings["heads"],
        max_seq_len=settings["length"],
        block_width=settings["block"],
        num_state_vectors=settings["states"],
        recurrent_layers=(settings["layers"] // 2,),
    ).train()

    def step():
        loss, *_ = model(ids, return_loss=True)
        loss.backward()
        model.zero_grad()

    return model, step


# ---- Memorizing Transformer, against memorizing-transformers-pytorch


def _segments(settings):
    """A new segment for each step: one that came again and again would fill a memory with copies, all equally near."""
    for seed in itertools.count(settings["seed"] + 1):
        yield _tokens(settings | {"seed": seed}, settings["memorizing_batch"], settings["segment"])


def _memorizing_gallery(settings):
    from hf_gallery import GalleryCache, GalleryMemorizingTransformerConfig, GalleryMemorizingTransformerForCausalLM

    segment, batch = settings["segment"], settings["memorizing_batch"]
    config = GalleryMemorizingTransformerConfig(
        segment_length=segment,
        mem_len=segment,
        memory_layers=[settings["layers"] // 2 - 1],
        memory_size=settings["memories"],
        memory_topk=settings["topk"],
        **_sizes(settings),
    )
    model = GalleryMemorizingTransformerForCausalLM(config).train()
    cache = GalleryCache(config)
    with torch.no_grad():
        for part in _tokens(settings, batch, settings["memories"]).split(segment, dim=1):
            model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    segments = _segments(settings)

    def step():
        ids = next(segments)
        model(input_ids=ids, past_key_values=cache, labels=ids).loss.backward()
        model.zero_grad()

    return model, step


def _memorizing_peer(settings):
    import tempfile

    from memorizing_transformers_pytorch import MemorizingTransformer

    segment, batch = settings["segment"], settings["memorizing_batch"]
    model = MemorizingTransformer(
        num_tokens=settings["vocabulary"],
        dim=settings["hidden"],
        depth=settings["layers"],
        heads=settings["heads"],
        dim_head=settings["hidden"] // settings["heads"],
        memorizing_layers=settings["layers"] // 2,
        # It empties its memory when there are more, so it gets room; by the middle repeat it holds as many as ours.
        max_knn_memories=4 * settings["memories"],
        num_retrieved_memories=settings["topk"],
        xl_max_memories=segment,
        knn_memories_directory=tempfile.mkdtemp(),
    ).train()
    memories = model.create_knn_memories(batch_size=batch)
    carried = {"xl": None}
    segments = _segments(settings)

    def step():
        ids = next(segments)
        loss, carried["xl"] = model(ids, knn_memories=memories, xl_memories=carried["xl"], labels=ids)
        loss.backward()
        model.zero_grad()

    with torch.no_grad():
        for _ in range(max(1, settings["memories"] // segment - settings["repeats"] // 2)):
            ids = next(segments)
            _, carried["xl"] = model(ids, knn_memories=memories, xl_memories=carried["xl"], labels=ids)
    return model, step


WORKS: dict[str, dict[str, Callable]] = {
    "longformer": {"gallery": _longformer_gallery, "peer": _longformer_peer},
    "transformer_xl_train": {"gallery": _xl_train_gallery, "peer": _xl_train_peer},
    "transformer_xl_decode": {"gallery": _xl_decode_gallery, "peer": _xl_decode_peer},
    "memorizing_transformer": {"gallery": _memorizing_gallery, "peer": _memorizing_peer},
    "block_recurrent_transformer": {"gallery": _block_recurrent_gallery, "peer": _block_recurrent_peer},
    "transformer": {"gallery": _transformer_gallery, "peer": _transformer_peer},
    "transformer_sdpa": {"gallery": _transformer_sdpa_gallery, "peer": _transformer_peer},
}


def main(name: str, side: str, settings: dict[str, Any]) -> None:
    """Prepares the work and answers on the standard output until the standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    torch.manual_seed(settings["seed"])
    model, step = WORKS[name][side](settings)
    step()
    about = {"parameters": sum(p.numel() for p in model.parameters()), "threads": torch.get_num_threads()}
    works = {"step": step}
    if side == "gallery":
        from eval.cost import PRODUCT, flops

        a, b = torch.randn(2, PRODUCT["cpu"], PRODUCT["cpu"])  # (n, n) each
        works["product"] = lambda: a @ b
        works["product"]()
        about["flops"] = {what: flops(work) for what, work in works.items()}
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        clock, processor = time.perf_counter(), processor_seconds()
        works[line.strip()]()
        took = {"clock": time.perf_counter() - clock, "processor": processor_seconds() - processor}
        print(json.dumps(took), file=answers, flush=True)


def processor_seconds() -> float:
    """Seconds that processors spent on this process and on its children, as a peer may search in some."""
    children = psutil.Process().children(recursive=True)
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
