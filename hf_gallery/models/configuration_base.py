"""Base of the configurations of all variants: the common fields and the checks of their values."""

from __future__ import annotations

import difflib
import logging
import math
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .adapters import name_targets
from .rings import RingLayout

logger = logging.getLogger(__name__)

BYTES = 262  # ids of the byte tokenizer: 256 bytes and 6 special tokens
UNLIMITED = 2**48  # tokens; more than any text has, and still what torch takes as the bound of a slice
# More than this is a slip of the hand or a damaged file, and building it would take hours or all memory.
MOST = 2**20  # tokens of a window, block, segment or memory of a layer; labels
DEEPEST = 2**10  # layers
WIDEST = 2**24  # any other count


SEVERAL = ("eos_token_id", "decoder_start_token_id")
PROBLEMS = ["regression", "single_label_classification", "multi_label_classification"]  # of a classifier


class ByteTokenizerId(int):
    """The default of a special id: the byte tokenizer's with its vocabulary, None with another."""


class GalleryConfig(PreTrainedConfig):
    """Fields that every variant has, under transformers' own names.

    A wrong value raises a ValueError that names the argument, what it got and what it accepts. A name that is not
    known but looks like one that is draws a warning, since PreTrainedConfig would keep it without a word.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    _auto_class: ClassVar[str] = "AutoConfig"

    vocab_size: int = BYTES
    hidden_size: int = 512  # E
    num_hidden_layers: int = 6
    num_attention_heads: int = 8  # H
    head_dim: int | None = None  # D; default hidden_size // num_attention_heads
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = ByteTokenizerId(256)
    bos_token_id: int | None = ByteTokenizerId(257)
    eos_token_id: int | None = ByteTokenizerId(258)

    def __post_init__(self, **kwargs: Any):
        self._warn_of_near_misses(kwargs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            self.check_count(name, 1)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}, which num_attention_heads {self.num_attention_heads} does "
                    "not divide; choose a multiple, or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.check_count("head_dim", 1)
        if self.num_attention_heads * self.head_dim > WIDEST:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads} and head_dim {self.head_dim}, together "
                f"{self.num_attention_heads * self.head_dim} wide; {WIDEST} at most"
            )
        self.check_choice("hidden_act", sorted(ACT2FN))
        for name in ("hidden_dropout", "attention_dropout"):
            self.check_probability(name)
        for name in ("layer_norm_eps", "initializer_range"):
            self.check_positive(name)
        self.choose_default_ids()
        self.check_special_ids()
        for name in ("tie_word_embeddings", "use_cache"):
            self.check_flag(name)
        # The gallery's own attention is the default; transformers would choose sdpa where a model supports it.
        kwargs.setdefault("attn_implementation", "eager")
        labels = kwargs.get("num_labels")
        whole = isinstance(labels, int) and not isinstance(labels, bool)
        if labels is not None and (not whole or not 1 <= labels <= MOST):  # each gets a name
            raise ValueError(f"num_labels is {labels!r}; it must be a whole number of at least 1 and at most {MOST}")
        super().__post_init__(**kwargs)
        if self.num_labels < 1:
            raise ValueError(f"num_labels is {self.num_labels}; it must be 1 or more")
        if self.problem_type is not None:
            self.check_choice("problem_type", PROBLEMS)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers. PEFT reads it when it is about to choose where its adapters go."""
        name_targets(self.model_type)
        return super().to_dict()

    @property
    def n_positions(self) -> int:
        """Tokens of the longest input, under the first name that lm-eval looks for: as many as learned positions
        reach, unless they begin anew in each segment; UNLIMITED for models that read on for ever."""
        longest = getattr(self, "longest_input", None)
        return UNLIMITED if longest is None or getattr(self, "segment_length", None) is not None else longest

    @property
    def cache_capacity(self) -> int | None:
        """Keys that a layer must keep for the tokens to come; None where every key may be seen again."""
        return None

    @property
    def why_no_static_cache(self) -> str | None:
        """The reason that a GalleryStaticCache cannot hold what the layers keep; None where it can."""
        return None

    # ---- what a cache holds for a model of this configuration; `check_content` in cache.py compares

    @property
    def cache_layers(self) -> int:
        """Layers that keep state."""
        return self.num_hidden_layers

    def columns_kept(self, layer: int) -> int | None:
        """Columns of time that a layer keeps; None for all."""
        return self.cache_capacity

    def ring_layout(self, layer: int, most: int | None) -> dict[str, RingLayout]:
        """The rings of a static cache, for columns of time. most: slots of each at most; None where layers say it.

        Raises ValueError if nobody does."""
        kept = self.columns_kept(layer)
        if most is None and kept is None:
            raise ValueError(
                f"max_cache_len is None, and {self.model_type} keeps every token; give the length of the longest "
                "text, prompt and all"
            )
        # One more than are seen again: the new token's own column stands in the ring too.
        slots = most if kept is None else kept + 1 if most is None else min(most, kept + 1)
        return {name: RingLayout(slots) for name in ("keys", "values")}

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        """The states that a layer may leave: names, and shapes behind the rows, in which None is any number."""
        return [{name: (self.num_attention_heads, None, self.head_dim) for name in ("keys", "values")}]

    @property
    def cache_facts(self) -> dict[str, str]:
        """Facts of each row that the cache keeps, each with the state of the first layer that it counts in."""
        return {}

    @property
    def embedding_width(self) -> int:
        """Width of the table of embeddings, and so of inputs_embeds."""
        return self.hidden_size

    def check_count(self, name: str, least: int, most: int | None = None):
        """Raises ValueError unless the field is a whole number of at least `least`, at most `most` (default: what such
        a count can be)."""
        value = getattr(self, name)
        most = most or (DEEPEST if name.endswith("_layers") else WIDEST)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {least} and at most {most}")

    def choose_default_ids(self):
        """Special ids that were not given become plain numbers or None, see ByteTokenizerId."""
        for name, value in vars(self).items():
            if isinstance(value, ByteTokenizerId):
                setattr(self, name, int(value) if self.vocab_size == BYTES else None)

    def check_flag(self, name: str):
        """Raises ValueError unless the field is True or False."""
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")

    def check_probability(self, name: str):
        """Raises ValueError unless the field is in [0, 1)."""
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
            raise ValueError(f"{name} is {value!r}; it is a probability, so give a number in [0, 1)")

    def check_positive(self, name: str):
        """Raises ValueError unless the field is a finite number above 0."""
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a positive number")

    def check_special_ids(self):
        """Raises ValueError unless what every model needs of them fits the vocabulary."""
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            self.check_ids(name)

    def check_ids(self, name: str):
        """Raises ValueError unless the field is an id of the vocabulary, several where a text may end or begin with
        any of them, or None."""
        ids = getattr(self, name)
        several = isinstance(ids, (list, tuple)) and name in SEVERAL
        for value in ids if several else [ids]:
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and (not whole or not 0 <= value < self.vocab_size):
                raise ValueError(
                    f"{name} is {value!r}, outside the vocabulary of vocab_size {self.vocab_size}; give an id in "
                    f"[0, {self.vocab_size}) or None"
                )

    def check_choice(self, name: str, choices: list[str]):
        """Raises ValueError unless the field is one of the choices."""
        if getattr(self, name) not in choices:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")

    def check_layers(self, name: str):
        """Makes the field a list. Raises ValueError unless it holds different numbers of the model's layers."""
        layers, count = getattr(self, name), self.num_hidden_layers
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"{name} is {layers!r}; it must be a list of layer numbers")
        for layer in layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
                raise ValueError(
                    f"{name} holds {layer!r}; layers are numbered 0 to {count - 1} (num_hidden_layers {count})"
                )
        if len(set(layers)) != len(layers):
            raise ValueError(f"{name} is {layers!r}; its layer numbers must be different")
        setattr(self, name, list(layers))

    def _warn_of_near_misses(self, unknown: dict[str, Any]):
        known = [name for name in type(self).__dataclass_fields__ if not name.startswith("_")]
        for name in unknown:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near and not hasattr(PreTrainedConfig, name):
                logger.warning("%s has no argument %r; did you mean %r?", type(self).__name__, name, near[0])


class GalleryStackConfig(GalleryConfig):
    """Fields of the variants whose stack embeds absolute positions: Transformer and Longformer."""

    is_decoder: bool = False  # causal; set by ForCausalLM, cleared by ForMaskedLM
    norm_position: str = "post"  # post: norm(x + f(x)), as published; pre: x + f(norm(x)), and a norm at the end
    position_embedding_type: str = "sinusoidal"
    position_offset: int = 0  # added to positions that are learned; RoBERTa and the released Longformer: 2
    # Length of the learned table, offset included. Other positions have no end, and no input is refused for it: it is
    # then what tools take for the longest input that they should make, as sentence-transformers does.
    max_position_embeddings: int | None = 2048
    sinusoid_layout: str = "interleaved"  # interleaved: sin, cos, sin, cos, as published; concatenated: sines first
    scale_embedding: bool = False  # times sqrt(hidden_size)
    embedding_norm: bool = False  # a LayerNorm on the embeddings (BERT)
    embedding_size: int | None = None  # width of the tables; if not hidden_size, a map follows (ELECTRA's encoder)
    type_vocab_size: int = 0  # token types (BERT); 0 = none
    attention_bias: bool = True
    initialization: str = (
        "xavier"  # xavier: uniform, as published; normal: normal(0, initializer_range), as GPT-2, BERT
    )
    classifier_dropout: float | None = None  # default hidden_dropout
    activation_dropout: float = 0.0  # inside the feed-forward (BART)
    is_encoder_decoder: bool = False  # set by ForConditionalGeneration, which alone reads what follows
    num_encoder_layers: int | None = None  # default num_hidden_layers
    num_decoder_layers: int | None = None
    max_decoder_position_embeddings: int | None = None  # default max_position_embeddings, which is then the encoder's
    final_logits_bias: bool = False  # a bias on the logits (Marian, BART)
    decoder_start_token_id: int | None = None  # default bos_token_id
    classifier_act: str = "tanh"  # of the pooler before a classifier of texts or a choice's score; ELECTRA: gelu
    pooler_dropout: float | None = None  # before a text classifier's pooler; default 0, a Longformer's as behind it

    position_embedding_types: ClassVar[list[str]] = ["sinusoidal", "learned", "none"]

    def __post_init__(self, **kwargs: Any):
        self.check_choice("norm_position", ["post", "pre"])
        self.check_choice("position_embedding_type", self.position_embedding_types)
        self.check_choice("sinusoid_layout", ["interleaved", "concatenated"])
        self.check_choice("initialization", ["xavier", "normal"])
        self.check_choice("classifier_act", sorted(ACT2FN))
        if self.max_position_embeddings is None:
            self.max_position_embeddings = type(self).__dataclass_fields__["max_position_embeddings"].default
        self.check_count("hidden_size", 1)
        self.check_count("max_position_embeddings", 1)
        self.check_count("position_offset", 0)
        self.check_count("type_vocab_size", 0)
        if self.embedding_size is not None:
            self.check_count("embedding_size", 1, MOST)
        for name in ("num_encoder_layers", "num_decoder_layers", "max_decoder_position_embeddings"):
            if getattr(self, name) is not None:
                self.check_count(name, 1)
        flags = ("is_decoder", "scale_embedding", "embedding_norm", "attention_bias")
        for name in (*flags, "is_encoder_decoder", "final_logits_bias"):
            self.check_flag(name)
        for name in ("classifier_dropout", "activation_dropout", "pooler_dropout"):
            if name == "activation_dropout" or getattr(self, name) is not None:
                self.check_probability(name)
        for name in ("max_position_embeddings", "max_decoder_position_embeddings"):
            longest = self.reach_of(name)
            if longest is not None and longest < 1:
                raise ValueError(
                    f"position_offset is {self.position_offset}, which leaves no learned position of {name} "
                    f"{getattr(self, name)}; give a smaller one"
                )
        self.choose_default_ids()
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id
        if self.is_encoder_decoder:
            self.check_encoder_decoder()
        if self.position_embedding_type in ("sinusoidal", "relative") and self.hidden_size % 2:
            raise ValueError(f"hidden_size is {self.hidden_size}; sinusoidal positions need an even number")
        if self.position_embedding_type == "sinusoidal" and self.embedding_width % 2:
            raise ValueError(f"embedding_size is {self.embedding_size}; sinusoidal positions need an even number")
        super().__post_init__(**kwargs)

    @property
    def embedding_width(self) -> int:
        return self.hidden_size if self.embedding_size is None else self.embedding_size

    @property
    def longest_input(self) -> int | None:
        """Tokens that the learned positions reach; None where positions have no end."""
        return self.reach_of("max_position_embeddings")

    def reach_of(self, name: str) -> int | None:
        """Tokens that the learned positions of the length in a field reach; None where positions have no end."""
        length = getattr(self, name)
        if self.position_embedding_type != "learned" or length is None:
            return None
        return length - self.position_offset

    def check_encoder_decoder(self):
        """Raises ValueError for a setting that an encoder-decoder cannot have."""

    # ---- of an encoder-decoder: the cache is its decoder's, which sees all that was written, and keeps the source

    @property
    def cache_layers(self) -> int:
        own = self.num_decoder_layers if self.is_encoder_decoder else None
        return self.num_hidden_layers if own is None else own

    def cache_layout(self, layer: int) -> list[dict[str, tuple]]:
        (layout,) = super().cache_layout(layer)
        if self.is_encoder_decoder:
            layout |= {f"cross_{name}": shape for name, shape in layout.items()}
        return [layout]

    @property
    def cache_facts(self) -> dict[str, str]:
        return {"source_length": "cross_keys"} if self.is_encoder_decoder else {}

    def check_special_ids(self):
        super().check_special_ids()
        self.check_ids("decoder_start_token_id")
