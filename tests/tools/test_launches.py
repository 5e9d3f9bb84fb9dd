"""Costs of a forward for the host of a GPU, counted without one: on the device "meta" every operation is called as on
a GPU, and none has a result that could be asked. Nothing is read, but a mask by a cache that grows; a layer launches
few operations.
"""

import sys

import pytest
import torch
from renamed import checkpoint_activations
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer
from variants import COLUMNS, assert_same_step, causal, over, padded, training_step, words

from hf_gallery import GalleryStaticCache
from hf_gallery.models import (
    attention,
    attention_decode,
    attention_flash,
    backbone,
    blocks,
    context,
    exporting,
    memory,
    rings,
)
from hf_gallery.models import modeling_block_recurrent_transformer as block_recurrent
from hf_gallery.models.rows import Rows

# They launch nothing: views, and memory that nobody fills.
VIEWS = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "diagonal", "empty", "empty_like",
    "empty_strided", "expand", "lift_fresh", "movedim", "new_empty", "new_empty_strided", "permute", "select", "slice",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
}  # fmt: skip
# Launches of a layer at most, in a forward of one block or segment, its backward, a decode step, and one behind a
# static cache, which is meant to be captured as a whole.
MOST = {"forward": 60, "backward": 80, "decode": 26, "static": 34}
# The step of the state is made at every token where it cannot be asked whether a block ends.
LARGER = {"block_recurrent": {"static": 39}}
SHARED = 22  # of a step behind a static cache at most, worked out once for all of its layers
# Launches of one operator: scores, the largest of them, and what they are of; stretches of keys, and their join.
LAUNCHES = {"search": 3, "decode_attention": 2}


class Launches(TorchDispatchMode):
    """Counts the operations that have a tensor of the device, copies from the host among them."""

    shared = False  # while what layers share is worked out

    def __init__(self):
        super().__init__()
        self.count, self.once = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        name = func.overloadpacket.__name__
        if name not in VIEWS and any(x.is_meta for x in tensors):
            launches = LAUNCHES.get(name, 1)
            self.count += 0 if self.shared else launches
            self.once += launches if self.shared else 0
        return out


class Fused(TorchFunctionMode):
    """RMSNorm and dropout as one kernel each, as on a GPU: elsewhere torch takes six operations and three."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = (*args, *(kwargs or {}).values())
        if func in (torch.rms_norm, torch.nn.functional.rms_norm):
            x, shape, weight, *_ = given
            return torch.nn.functional.layer_norm(x, shape, weight)
        if func is torch.nn.functional.dropout:
            x, share, training, *_ = (*given, True)
            return torch.native_dropout(x, share, training)[0] if training and share else x
        return func(*args, **kwargs or {})


class Model:
    """A causal model on the device, and what was asked of it: shapes of `reads`, launches of its `layers`, and these
    as a `whole`, with what a layer works out for all."""

    def __init__(self, variant, monkeypatch, train, **overrides):
        monkeypatch.setattr(attention_decode, "why_no_kernel", lambda problem: None)
        monkeypatch.setattr(blocks, "serves", lambda x: True)
        monkeypatch.setattr(block_recurrent, "serves", lambda x: True)
        monkeypatch.setattr(memory, "attends", lambda query, values, topk: True)
        monkeypatch.setattr(backbone, "version_of", lambda modules: "the weights")  # "meta" is taken for offloaded
        monkeypatch.setattr(attention, "_WHY_NOT", {"triton": lambda problem: None})
        model = variant.make("causal", **{"attn_implementation": "triton"} | overrides)
        self.model, self.reads, self.layers, self.whole = model.train(train).to("meta"), [], [], []
        for module in (context, rings):
            monkeypatch.setattr(module, "once", self.once)
        real = torch.Tensor.cpu

        def cpu(x):
            if not x.is_meta:
                return real(x)
            self.reads.append(tuple(x.shape))
            mask = torch.ones(x.shape, dtype=x.dtype)
            mask[0, :2] = 0
            return mask

        monkeypatch.setattr(torch.Tensor, "cpu", cpu)
        for layer in (m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)):
            counts = []
            layer.register_forward_pre_hook(lambda *_, counts=counts: counts.append(Launches().__enter__()))
            layer.register_forward_hook(lambda *_, counts=counts: self.leave(counts.pop()))

    def leave(self, launches):
        launches.__exit__(None, None, None)
        self.layers.append(launches.count)
        self.whole.append(launches.count + launches.once)

    @staticmethod
    def once(memo, key, work):
        def apart():
            before, Launches.shared = Launches.shared, True
            try:
                return work()
            finally:
                Launches.shared = before

        return exporting.once(memo, key, apart)

    def __call__(self, tokens, columns=None, **more):
        """A forward of two rows of tokens; columns: of their mask, None for no mask."""
        ids = torch.zeros(2, tokens, dtype=torch.long, device="meta")
        mask = None if columns is None else torch.ones(2, columns, dtype=torch.long, device="meta")
        labels = ids if self.model.training else None
        with Fused():
            return self.model(input_ids=ids, attention_mask=mask, labels=labels, **more)


@causal(lambda variant: variant.name in COLUMNS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_the_host_reads_nothing(variant, masked, monkeypatch):
    """In training, whatever the mask; a growing cache, whose sizes follow from counts on the CPU, asks for the mask,
    a static one when the prompt is read. Anything else that asks would raise."""
    model = Model(variant, monkeypatch, train=True)
    model(40, 40 if masked else None).loss.backward()
    assert model.reads == []
    model = Model(variant, monkeypatch, train=False)
    with torch.no_grad():
        model(40, 40 if masked else None, use_cache=False)
        assert model.reads == []
        cache = model(40, 40 if masked else None, use_cache=True).past_key_values
        model(1, 41 if masked else None, past_key_values=cache)
        assert model.reads == [(2, 40), (2, 1)] * masked
        static = GalleryStaticCache(model.model.config, 64)
        model(40, 40 if masked else None, past_key_values=static)
        model.reads.clear()
        for _ in range(2):
            model(1, 1 if masked else None, past_key_values=static)
    assert model.reads == []


@over(lambda variant, head: head != "choice")
def test_what_asks_nothing_gives_the_same(variant, head, monkeypatch):
    """A padded forward, as it runs where no tensor can be asked what it holds, and its gradients."""
    run, ids, mask = padded(variant, head)
    expected = training_step(run, ids, mask)
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_gallery.models.") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda x: False)
    assert_same_step(training_step(run, ids, mask), expected)


def test_a_graph_searches_the_memory_as_eager_does(monkeypatch):
    """A decode step that a GPU captures holds one operator for it, and not the definition, which sorts all scores."""
    monkeypatch.setattr(memory, "in_one_graph", lambda: True)
    query, store = (torch.empty(2, 3, size, 8, device="meta") for size in (1, 20))
    ends = torch.empty(2, 1, dtype=torch.long, device="meta")
    with Launches() as launches:
        found = memory.retrieve("exact", query, [memory.Source(store, store, ends, ends)], 4)
    assert launches.count == 1 and [x.shape[3] for x in found] == [4] * 4


@causal(lambda variant: variant.name in ("memorizing", "block_recurrent"))
def test_a_reentrant_checkpoint_computes_what_training_does(variant, monkeypatch):
    """Its first pass records no gradients, and yet takes no kernel that has none: the second would find other bits."""

    def refuse(*arguments):
        raise AssertionError("a kernel without a gradient")

    monkeypatch.setattr(memory, "attends", lambda query, values, topk: True)
    monkeypatch.setattr(block_recurrent, "serves", lambda x: True)
    monkeypatch.setattr(memory, "attend_found", refuse)
    monkeypatch.setattr(block_recurrent, "gate_triton", refuse)
    model = variant.make("causal").train()
    checkpoint_activations(model, {"use_reentrant": True})
    model(input_ids=words(2, 40), labels=words(2, 40), use_cache=False).loss.backward()
    with torch.no_grad(), pytest.raises(AssertionError, match="without a gradient"):
        model(input_ids=words(2, 40), use_cache=False)


def test_a_table_is_no_longer_for_a_mask_on_a_gpu():
    """The keys that all rows see in common are known on the CPU, though where each ends is not."""
    rows = Rows(2, 40, torch.ones(2, 40, dtype=torch.bool, device="meta"), None)
    p = rows.positions
    spans = rows.spans(p - 5, p, 0)
    assert spans.lower.is_meta and spans.reach(0) == 5


def trained(model):
    """A step of two blocks or segments, or of 40 tokens: its tokens, where its launches are within what is allowed."""
    config = model.model.config
    tokens = 2 * (getattr(config, "segment_length", None) or getattr(config, "block_length", 20))
    loss = model(tokens).loss
    count = len(model.layers)  # the Recurrent Memory Transformer's are called for each segment
    assert max(model.whole) <= MOST["forward"]
    with Launches() as backward:
        loss.backward()
    assert backward.count <= MOST["backward"] * count
    return tokens


BY_FLASH = {"transformer", "longformer", "longformer_xl_short_memory", "memorizing_gpt2", "recurrent_memory_gpt2"}


@causal(lambda variant: variant.name in COLUMNS.keys() | BY_FLASH)
def test_a_layer_is_few_launches_by_what_is_best(variant, monkeypatch):
    """In training in half types, where FlashAttention serves some layers: heads of 8, which it needs not pad."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    for name, value in dict(_on_gpu=True, why_not_triton=None, flash_is_right=True).items():
        monkeypatch.setattr(attention, name, lambda x, value=value: value)
    monkeypatch.setattr(attention_flash, "lacks", lambda device: None)
    monkeypatch.setattr(attention_flash, "KINDS", (torch.float32,))
    served, real = [], attention.attend_flash
    monkeypatch.setattr(attention, "attend_flash", lambda *problems: served.append(1) or real(*problems))
    more = dict(attn_implementation="eager", head_dim=8, hidden_dropout=0.0, attention_dropout=0.0)
    trained(Model(variant, monkeypatch, train=True, **more))
    assert served or variant.name not in BY_FLASH


@causal(lambda variant: variant.name in COLUMNS)
def test_a_layer_is_few_launches(variant, monkeypatch):
    """Each layer's in a forward of two blocks or segments and in decode steps; and of a backward its share."""
    most = MOST | LARGER.get(variant.name, {})
    tokens = trained(Model(variant, monkeypatch, train=True))
    model = Model(variant, monkeypatch, train=False)
    with torch.no_grad():
        for way, cache in {"decode": None, "static": GalleryStaticCache(model.model.config, 64)}.items():
            cache = model(tokens, past_key_values=cache, use_cache=True).past_key_values
            model.layers.clear(), model.whole.clear()
            model(1, past_key_values=cache)
            assert max(model.layers) <= most[way] and sum(model.whole) - sum(model.layers) <= SHARED
