"""Laws 1 to 3 and 6 where sizes are least: one head, one row, windows, blocks and segments of 1, no memory, top-k 1
and as much as there is.

Every operation of the cache, in any order: each row equals the row that it has read so far, alone.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from variants import BOS, EOS, PAD, VOCAB, assert_equal, loud, words

import hf_gallery as gallery
from hf_gallery import GalleryCache

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=12,
    num_hidden_layers=2,
    intermediate_size=13,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)

# Of each architecture: the class, and the settings that are drawn.
EDGES = {
    "transformer": (
        gallery.GalleryTransformerForCausalLM,
        st.fixed_dictionaries(dict(segment_length=st.sampled_from([None, 1, 2, 3]))),
    ),
    "transformer_xl": (
        gallery.GalleryTransformerXLForCausalLM,
        st.fixed_dictionaries(
            dict(
                segment_length=st.sampled_from([1, 2, 3]),
                mem_len=st.sampled_from([0, 1, 2]),
                initial_memory=st.sampled_from(["empty", "zeros"]),
            )
        )
        | st.fixed_dictionaries(
            dict(segment_length=st.just(1), mem_len=st.sampled_from([1, 2]), same_length=st.just(True))
        ),
    ),
    "longformer": (
        gallery.GalleryLongformerForCausalLM,
        st.fixed_dictionaries(
            dict(
                attention_window=st.sampled_from([1, 2]),
                attention_dilation=st.sampled_from([1, 2]),
                position_embedding_type=st.sampled_from(["relative", "sinusoidal"]),
            )
        ),
    ),
    "memorizing": (
        gallery.GalleryMemorizingTransformerForCausalLM,
        st.fixed_dictionaries(
            dict(
                memory_layers=st.sampled_from([[0], [1], [0, 1]]),
                segment_length=st.sampled_from([1, 2, 3]),
                mem_len=st.sampled_from([0, 1]),
            )
        ).flatmap(
            lambda settings: st.sampled_from([(1, 1), (4, 1), (4, 4)]).map(
                lambda sizes: settings | dict(memory_size=sizes[0], memory_topk=sizes[1])
            )
        ),
    ),
    "block_recurrent": (
        gallery.GalleryBlockRecurrentTransformerForCausalLM,
        st.fixed_dictionaries(
            dict(
                block_length=st.sampled_from([1, 2, 3]),
                num_state_vectors=st.sampled_from([1, 2]),
                feedback=st.booleans(),
            )
        ).map(lambda settings: settings | dict(recurrent_layers=[0])),
    ),
}
STEPS = ["token", "chunk", "train", "reset_rows", "select", "repeat", "crop", "copy", "file", "detach", "move"]


class Reader:
    """A cache, and what each of its rows has read since it was emptied."""

    def __init__(self, model, rows):
        self.model, self.cache = model, GalleryCache(model.config)
        self.histories = [torch.zeros(0, dtype=torch.long)] * rows
        self.seed = 0

    def alone(self, history):
        with torch.no_grad():
            return self.model(history[None], use_cache=False).logits[0]

    def read(self, mask, gradients=False):
        """Reads new tokens where mask (B, T) is 1, and compares each row with what it gives alone."""
        self.seed += 1
        ids = words(*mask.shape, seed=self.seed)
        with torch.set_grad_enabled(gradients):
            logits = self.model(ids, attention_mask=mask, past_key_values=self.cache).logits.detach()
        for i, some in enumerate(mask.bool()):
            new = ids[i, some]
            self.histories[i] = torch.cat([self.histories[i], new])
            if len(new):
                assert_equal(logits[i, some], self.alone(self.histories[i])[-len(new) :], f"row {i}")

    def step(self, name, data, folder):
        b = len(self.histories)
        numbers = st.lists(st.integers(0, b - 1), min_size=1, max_size=3)
        if name == "token":
            self.read(torch.ones(b, 1, dtype=torch.long))
        elif name in ("chunk", "train"):
            width = data.draw(st.integers(1, 4), label="columns")
            bits = st.lists(st.integers(0, 1), min_size=width, max_size=width)
            mask = torch.tensor(data.draw(st.lists(bits, min_size=b, max_size=b), label="mask"))
            self.read(mask, gradients=name == "train")
        elif name == "reset_rows":
            rows = data.draw(numbers, label="emptied")
            self.cache.reset_rows(rows)
            self.histories = [h[:0] if i in rows else h for i, h in enumerate(self.histories)]
        elif name == "select":
            rows = data.draw(numbers, label="selected")
            self.cache.batch_select_indices(torch.tensor(rows))
            self.histories = [self.histories[i] for i in rows]
        elif name == "repeat" and b < 3:
            self.cache.batch_repeat_interleave(2)
            self.histories = [h for h in self.histories for _ in range(2)]
        elif name == "crop":
            self.cache.activate_past_recording()
            before, count = list(self.histories), data.draw(st.integers(1, 3), label="taken back")
            for columns in data.draw(st.sampled_from([[count], [1] * count]), label="read"):
                self.read(torch.ones(b, columns, dtype=torch.long))
            assert self.cache.is_croppable
            self.cache.crop(-count)
            self.histories = before
            self.cache.deactivate_past_recording()
        elif name == "copy":
            left = self.cache
            self.cache = data.draw(st.sampled_from([GalleryCache.copy, copy.copy, copy.deepcopy]))(left)
            with torch.no_grad():  # what happens to the other one is nothing to this
                self.model(words(b, 2, seed=99), past_key_values=left)
        elif name == "file":
            self.cache.save(folder / "cache")
            self.cache = GalleryCache.load(folder / "cache")
        elif name == "detach":
            self.cache.detach()
        elif name == "move":
            self.cache.to("cpu")


@pytest.mark.parametrize("architecture", EDGES)
@given(data=st.data())
def test_any_three_operations_at_the_least_sizes(architecture, data, tmp_path):
    kind, settings = EDGES[architecture]
    heads, rows = data.draw(st.sampled_from([1, 2]), label="heads"), data.draw(st.sampled_from([1, 2]), label="rows")
    model = loud(kind(kind.config_class(**SIZES, num_attention_heads=heads, **data.draw(settings, label="settings"))))
    reader = Reader(model.to(torch.float64).eval(), rows)
    for _ in range(data.draw(st.integers(1, 2), label="tokens before")):
        reader.step("token", data, tmp_path)
    for name in data.draw(st.lists(st.sampled_from(STEPS), min_size=3, max_size=3), label="steps"):
        reader.step(name, data, tmp_path)
        reader.step("token", data, tmp_path)


@pytest.mark.parametrize("architecture", EDGES)
def test_one_row_and_one_head_go_on_after_a_reset(architecture):
    """The copy of an empty tensor lies in no room, whatever its strides say."""
    kind, _ = EDGES[architecture]
    bounded = {
        "transformer": dict(segment_length=5),
        "transformer_xl": dict(segment_length=3, mem_len=4),
        "longformer": dict(attention_window=4),
        "memorizing": dict(segment_length=3, mem_len=4, memory_size=4, memory_topk=4),
        "block_recurrent": dict(block_length=3, num_state_vectors=2),
    }[architecture]
    model = loud(kind(kind.config_class(**SIZES, num_attention_heads=1, **bounded))).to(torch.float64).eval()
    reader = Reader(model, 1)
    for _ in range(3):
        for _ in range(3):
            reader.read(torch.ones(1, 1, dtype=torch.long))
        reader.cache.reset_rows([0])
        reader.histories = [reader.histories[0][:0]]
    reader.read(torch.ones(1, 1, dtype=torch.long))
