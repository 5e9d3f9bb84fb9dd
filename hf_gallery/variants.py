"""The table of architectures: all that the gallery says and does of each of them beside its model's own code.

From an entry follow the public names of hf_gallery, what the Auto classes open, the command line, cards and README,
who is compared by `python -m eval` and how it is drawn. So a new architecture is a configuration and a modeling file
under models/, and one entry here.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from .models.modeling_block_recurrent_transformer import GalleryBlockRecurrentTransformerModel
from .models.modeling_longformer import GalleryLongformerModel
from .models.modeling_memorizing_transformer import GalleryMemorizingTransformerModel
from .models.modeling_recurrent_memory_transformer import GalleryRecurrentMemoryTransformerModel
from .models.modeling_transformer import GalleryTransformerModel
from .models.modeling_transformer_xl import GalleryTransformerXLModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One line of `python -m eval`: an architecture in the setting in which it is compared.

    reach: what a query of it sees. settings: its config arguments for given sizes (eval.contestants.Sizes), beside
    those that all share. carries: what goes from one segment into the next, "nothing", "keys", "memory" (searched) or
    "state" (recurrent). colour, symbol: as plots draw it. smaller_of: the name of the contestant that it equals but
    for a smaller memory, which shows what the size is worth.
    """

    name: str
    label: str
    reach: str
    settings: Callable[[Any], dict[str, Any]]
    carries: str
    colour: str
    symbol: str
    smaller_of: str | None = None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A setting in which it is drawn what queries see: config arguments, and positions of global tokens."""

    settings: dict[str, Any]
    marks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One architecture.

    model: the bare model, whose `heads` name the others, of the same module. small: config arguments of a model that
    trains on a CPU, beside the sizes that all share. drawn: settings that show in a few tokens what queries see. idea:
    in a line; sees, carries: what a query at position p sees, and what goes from one call to the next; about, limits:
    as its card says it.
    """

    name: str
    title: str
    short: str
    authors: str
    arxiv: str
    paper_title: str
    idea: str
    sees: str
    carries: str
    about: str
    limits: tuple[str, ...]
    model: type[PreTrainedModel]
    small: dict[str, Any]
    drawn: tuple[Drawn, ...] = (Drawn(dict(num_hidden_layers=1)),)
    contestants: tuple[Contestant, ...] = ()

    @property
    def paper(self) -> str:
        """Address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def config(self) -> type[PreTrainedConfig]:
        """The configuration's class."""
        return self.model.config_class  # type: ignore[return-value] # None only of PreTrainedModel itself

    @property
    def auto_classes(self) -> dict[str, str]:
        """Class names by the Auto class that opens them."""
        return dict(self.model.auto_classes)

    @property
    def classes(self) -> dict[str, type]:
        """The configuration and every head by the class's name."""
        module = sys.modules[self.model.__module__]
        models = {name: getattr(module, name) for name in self.auto_classes.values()}
        return {self.config.__name__: self.config} | models

    @property
    def causal(self) -> type[PreTrainedModel]:
        """The causal language model. Raises ValueError for an architecture that has none."""
        if "AutoModelForCausalLM" not in self.auto_classes:
            raise ValueError(
                f"{self.title} has no causal language model; it has {', '.join(self.auto_classes.values())}"
            )
        return self.classes[self.auto_classes["AutoModelForCausalLM"]]

    def make_config(self, **arguments: Any) -> PreTrainedConfig:
        """The small configuration, with `arguments` in place of its own.

        Raises ValueError for an argument that the configuration has not, or a value that it refuses.
        """
        inherited, known = ({f.name for f in dataclasses.fields(kind)} for kind in (PreTrainedConfig, self.config))
        own = sorted(name for name in known - inherited if not name.startswith("_"))
        for name in arguments:
            if name.startswith("_") or (name not in known and not hasattr(PreTrainedConfig, name)):  # as num_labels
                near = difflib.get_close_matches(name, [*own, "num_labels"], n=1)
                hint = f"did you mean {near[0]}? It has" if near else "it has"
                raise ValueError(f"{self.config.__name__} has no argument {name!r}; {hint} {', '.join(own)}")
        return self.config(**SHARED | self.small | arguments)


SHARED = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)


def unit_scale(sizes: Any) -> float:
    """The initial scale of unit queries and keys with which their scores spread as all others', which are divided by
    sqrt(D): sqrt(D). At 1, where the authors start, they are almost alike, and a training as short as
    the benchmark's cannot raise it."""
    return (sizes.hidden / sizes.heads) ** 0.5


def memory_tokens(sizes: Any, fewer: int = 1) -> int:
    """Memory tokens that read and write as many vectors together as a recurrent state has; or `fewer` times fewer."""
    return max(1, sizes.states // 2 // fewer)


# Colours are Okabe and Ito's, which the colour-blind can tell apart; symbols are those of eval/palette.py.
TABLE = (
    Variant(
        name="transformer",
        title="Transformer",
        short="Transformer",
        authors="Vaswani et al. 2017",
        arxiv="1706.03762",
        paper_title="Attention Is All You Need",
        idea="attention over everything before, or over segments",
        sees="everything before it, or all (encoder); the source (encoder-decoder)",
        carries="all keys and values",
        about="A query sees every position before it, or the whole input in an encoder. With `segment_length` the "
        "input is cut into segments that see only themselves, which is what the long-sequence architectures are "
        "compared with.",
        limits=(
            "Without `segment_length` its cache and its cost per token grow with the text.",
            "With `segment_length` it knows nothing of the segments before.",
        ),
        model=GalleryTransformerModel,
        small=dict(norm_position="pre", segment_length=256),
        drawn=(
            Drawn(dict(is_decoder=True, segment_length=None)),
            Drawn(dict(is_decoder=True, segment_length=4)),
            Drawn(dict(is_decoder=False, segment_length=None)),
        ),
        contestants=(
            Contestant(
                name="transformer_full",
                label="Transformer, long context",
                reach="its segment of 16 windows (upper line)",
                settings=lambda sizes: dict(norm_position="pre", segment_length=sizes.context),
                carries="nothing",
                colour="#999999",
                symbol="circle-open",
            ),
            Contestant(
                name="transformer",
                label="Transformer, windowed",
                reach="its segment of one window (lower line)",
                settings=lambda sizes: dict(norm_position="pre", segment_length=sizes.window),
                carries="nothing",
                colour="#56B4E9",
                symbol="x",
            ),
        ),
    ),
    Variant(
        name="transformer_xl",
        title="Transformer-XL",
        short="Transformer-XL",
        authors="Dai et al. 2019",
        arxiv="1901.02860",
        paper_title="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
        idea="segments with a memory of hidden states, relative positions",
        sees="its segment, and `mem_len` tokens before it",
        carries="keys and values of the memory",
        about="The text is read in segments, and each layer also attends to what it computed for the `mem_len` tokens "
        "before the segment. Positions are relative, so what is remembered needs no new positions.",
        limits=(
            "It reaches back one memory per layer, and no farther.",
            "No gradient crosses from a segment into the one before: it learns to read its memory, not to write it.",
        ),
        model=GalleryTransformerXLModel,
        small=dict(segment_length=128, mem_len=128),
        drawn=(
            Drawn(dict(segment_length=4, mem_len=4)),
            Drawn(dict(segment_length=4, mem_len=4, same_length=True)),
        ),
        contestants=(
            Contestant(
                name="transformer_xl",
                label="Transformer-XL",
                reach="its segment and a memory of two windows, in each layer",
                settings=lambda sizes: dict(pre_lnorm=True, segment_length=sizes.window, mem_len=2 * sizes.window),
                carries="keys",
                colour="#E69F00",
                symbol="square",
            ),
        ),
    ),
    Variant(
        name="longformer",
        title="Longformer",
        short="Longformer",
        authors="Beltagy et al. 2020",
        arxiv="2004.05150",
        paper_title="Longformer: The Long-Document Transformer",
        idea="a sliding, dilated window, and global tokens",
        sees="a sliding window, dilated if asked; global tokens; the source (encoder-decoder)",
        carries="keys and values of the window and the global tokens; all of them (encoder-decoder)",
        about="A query sees a sliding window, dilated if asked, and a few global tokens. The causal language model is "
        "the paper's character model; encoder heads serve classification, token classification, question answering "
        "and multiple choice. The encoder-decoder, LED, reads a long source through windows and writes, say, its "
        "summary. With `segment_length` the decoder is a Longformer-XL, whose windows reach into Transformer-XL's "
        "memory of states.",
        limits=(
            "The causal model reaches back one window per layer, times its dilation.",
            "Absolute learned positions, as the released checkpoints have them, end at `max_position_embeddings`; "
            "relative ones do not.",
            "The encoder-decoder's decoder sees all that was written and all of the source: its cost grows with both.",
        ),
        model=GalleryLongformerModel,
        small=dict(
            norm_position="pre", position_embedding_type="relative", embedding_norm=False, attention_window=128
        ),
        drawn=(
            Drawn(dict(is_decoder=True, attention_window=3), (0,)),
            Drawn(dict(is_decoder=True, attention_window=3, attention_dilation=2)),
            Drawn(dict(is_decoder=False, attention_window=4), (0,)),
            Drawn(dict(is_decoder=True, attention_window=4, segment_length=4, mem_len=4)),
        ),
        contestants=(
            Contestant(
                name="longformer",
                label="Longformer",
                reach="one window in each layer",
                settings=lambda sizes: dict(
                    norm_position="pre",
                    position_embedding_type="relative",
                    embedding_norm=False,
                    attention_window=sizes.window,
                ),
                carries="keys",
                colour="#009E73",
                symbol="diamond",
            ),
            Contestant(
                name="longformer_xl",
                label="Longformer-XL",
                reach="two windows in each layer, those before its segment in a memory",
                settings=lambda sizes: dict(
                    norm_position="pre",
                    position_embedding_type="relative",
                    embedding_norm=False,
                    attention_window=2 * sizes.window,
                    segment_length=sizes.window,
                    mem_len=2 * sizes.window,
                ),
                carries="keys",
                colour="#44AA99",
                symbol="cross",
            ),
        ),
    ),
    Variant(
        name="memorizing_transformer",
        title="Memorizing Transformer",
        short="Memorizing",
        authors="Wu et al. 2022",
        arxiv="2203.08913",
        paper_title="Memorizing Transformers",
        idea="the nearest of a large memory of keys and values, by a gate",
        sees="its segment and a local cache; the `memory_topk` nearest of `memory_size` stored keys",
        carries="the local cache and the memory",
        about="Some layers store the keys and values of what was read, up to `memory_size` pairs per head, and each "
        "query also attends to the `memory_topk` stored pairs nearest to it. A learned gate joins that to local "
        "attention.",
        limits=(
            "What is stored is not differentiated: the model learns to search the memory, not to write to it.",
            "The memory is first in, first out: beyond `memory_size` tokens the oldest are forgotten.",
            "Every token searches the memory, so a large one costs time; `memory_backend` offers faiss indexes.",
        ),
        model=GalleryMemorizingTransformerModel,
        small=dict(segment_length=128, mem_len=128, memory_layers=[2], memory_size=8192, memory_topk=32),
        drawn=(
            Drawn(
                dict(num_hidden_layers=2, memory_layers=[1], segment_length=4, mem_len=2, memory_size=6, memory_topk=2)
            ),
        ),
        contestants=(
            Contestant(
                name="memorizing_transformer",
                label="Memorizing Transformer",
                reach="its segment and one window, and the nearest stored keys",
                settings=lambda sizes: dict(
                    segment_length=sizes.window,
                    mem_len=sizes.window,
                    memory_layers=list(sizes.memory_layers),
                    memory_size=sizes.memory_size,
                    memory_topk=sizes.memory_topk,
                    initial_scale=unit_scale(sizes),
                ),
                carries="memory",
                colour="#D55E00",
                symbol="triangle-up",
            ),
        ),
    ),
    Variant(
        name="block_recurrent_transformer",
        title="Block-Recurrent Transformer",
        short="Block-Recurrent",
        authors="Hutchins et al. 2022",
        arxiv="2203.07852",
        paper_title="Block-Recurrent Transformers",
        idea="a sliding window, and a recurrent state of vectors",
        sees="the `block_length` tokens before it, and a state",
        carries="keys and values of the window, the state",
        about="A window slides over the text, and in some layers a state of vectors is carried from block to block: "
        "tokens read it, and a gate lets it take in what it reads of them.",
        limits=(
            "The state has a fixed size, so what is far back is kept at falling strength.",
            "The state moves when a block is complete; within a block tokens see the window and the last state.",
        ),
        model=GalleryBlockRecurrentTransformerModel,
        small=dict(block_length=128, num_state_vectors=64, recurrent_layers=[2]),
        drawn=(Drawn(dict(num_hidden_layers=2, recurrent_layers=[1], block_length=4, num_state_vectors=2)),),
        contestants=(
            Contestant(
                name="block_recurrent_transformer",
                label="Block-Recurrent Transformer",
                reach="one window, and a recurrent state",
                settings=lambda sizes: dict(
                    block_length=sizes.window,
                    num_state_vectors=sizes.states,
                    recurrent_layers=list(sizes.recurrent_layers),
                    initial_scale=unit_scale(sizes),
                ),
                carries="state",
                colour="#CC79A7",
                symbol="star",
            ),
        ),
    ),
    Variant(
        name="recurrent_memory_transformer",
        title="Recurrent Memory Transformer",
        short="Recurrent Memory",
        authors="Bulatov et al. 2022",
        arxiv="2207.06881",
        paper_title="Recurrent Memory Transformer",
        idea="segments that hand memory tokens on, one to the next",
        sees="its segment up to it, and the memory tokens in front",
        carries="the memory tokens, keys and values of the segment",
        about="The text is read in segments. Before each stand `num_memory_tokens` tokens of no text, to be read, and "
        "as many behind it, to be written: what the layers make of the latter stands before the next segment. So "
        "memory is written by the whole depth of the model, and learned by gradients that flow through segments.",
        limits=(
            "The memory has few tokens, and all that later segments know of a segment is in them.",
            "It learns what to write from later segments of the same forward alone: a forward of one segment teaches "
            "it to read only.",
            "Segments run one after the other, so short ones leave a GPU idle.",
        ),
        model=GalleryRecurrentMemoryTransformerModel,
        small=dict(norm_position="pre", segment_length=128, num_memory_tokens=16),
        drawn=(
            Drawn(dict(is_decoder=True, segment_length=4, num_memory_tokens=1)),
            Drawn(dict(is_decoder=False, segment_length=4, num_memory_tokens=1)),
        ),
        contestants=(
            Contestant(
                name="recurrent_memory_transformer",
                label="Recurrent Memory Transformer",
                reach="its segment of one window, and memory tokens",
                settings=lambda sizes: dict(
                    norm_position="pre", segment_length=sizes.window, num_memory_tokens=memory_tokens(sizes)
                ),
                carries="state",
                colour="#0072B2",
                symbol="hexagon",
            ),
            Contestant(
                name="recurrent_memory_transformer_few",
                label="Recurrent Memory, fewer tokens",
                reach="its segment of one window, and a quarter of the memory tokens",
                settings=lambda sizes: dict(
                    norm_position="pre",
                    segment_length=sizes.window,
                    num_memory_tokens=memory_tokens(sizes, fewer=4),
                ),
                carries="state",
                colour="#F0E442",
                symbol="pentagon",
                smaller_of="recurrent_memory_transformer",
            ),
        ),
    ),
)
VARIANTS: dict[str, Variant] = {}


def register(variant: Variant) -> Variant:
    """Adds an architecture to VARIANTS, and its configuration and heads to the Auto classes of transformers.

    Raises ValueError for a name, or a model_type, that another one has.
    """
    for other in VARIANTS.values():
        if variant.name == other.name or variant.config.model_type == other.config.model_type:
            raise ValueError(
                f"there is a variant {other.name!r} with the model_type {other.config.model_type!r} already; give "
                f"{variant.title} a name and a model_type of its own"
            )
    transformers.AutoConfig.register(variant.config.model_type, variant.config, exist_ok=True)
    for auto, name in variant.auto_classes.items():
        getattr(transformers, auto).register(variant.config, variant.classes[name], exist_ok=True)
    VARIANTS[variant.name] = variant
    return variant


for _variant in TABLE:
    register(_variant)


def markdown() -> str:
    """The table of the README: what a query of each architecture sees, what it carries, and its heads."""
    lines = ["| model | a query at position p sees | what it carries | heads |", "|---|---|---|---|"]
    for v in VARIANTS.values():
        prefix = f"{v.config.__name__.removesuffix('Config')}For"
        heads = ", ".join(name.removeprefix(prefix) for name in v.auto_classes.values() if name.startswith(prefix))
        lines.append(f"| [{v.title}]({v.paper}) ({v.authors}) | {v.sees} | {v.carries} | {heads} |")
    return "\n".join(lines)
