"""The presets: the measurements of each, and their amount of work."""

from __future__ import annotations

import dataclasses

from .abilities import ABILITIES, AbilitySettings
from .contestants import Sizes


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Language modelling on a corpus: `steps` of `lanes` documents side by side, `length` tokens each.

    test_bytes: of the held-out documents, from the first on. document_bytes: of each of them at most. bf16:
    train in mixed precision. compile: train the model compiled by torch.compile. Scores are taken in float32 as built.
    """

    sizes: Sizes
    steps: int
    lanes: int
    length: int
    learning_rate: float
    test_bytes: int
    document_bytes: int
    bf16: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True)
class RecallSettings:
    """Slot recall: `steps` of about `tokens` tokens, first in short examples, then in growing ones, up to `length`.

    multiples: distances that are tested, in windows. examples: tested at each of them, num_writes questions each.
    """

    sizes: Sizes
    steps: int
    tokens: int
    short: int
    length: int
    learning_rate: float
    multiples: tuple[float, ...]
    examples: int
    num_writes: int = 4
    short_share: float = 0.4  # of the steps, in short examples
    growing_share: float = 0.3  # of the steps, while the examples grow
    num_values: int = 8

    def distances(self) -> list[int]:
        """The tested distances, in tokens."""
        return [max(1, round(m * self.sizes.window)) for m in self.multiples]


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
    """Byte classification: `steps` of about `tokens` tokens, in stretches of `lengths`, rising, in bytes.

    classes: sources to tell apart, where the corpus has no labels. examples: asked about at each length. bf16: train
    in mixed precision.
    """

    sizes: Sizes
    steps: int
    tokens: int
    learning_rate: float
    lengths: tuple[int, ...]
    examples: int
    classes: int = 8
    growing_share: float = 0.6  # of the steps, while ever longer stretches are added
    bf16: bool = False


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """Speed and memory of the models of the text task.

    lengths: of training steps. tokens: of a step, in as many rows as that makes, at least one. repeats: of a step of
    that many tokens; of longer ones fewer, in proportion, but six, which an interval needs. contexts: tokens read
    before decoding is timed, `decode_tokens` tokens each. bf16: steps in mixed precision; reading and decoding stay in
    float32.
    """

    sizes: Sizes
    lengths: tuple[int, ...]
    tokens: int
    repeats: int
    contexts: tuple[int, ...]
    decode_tokens: int
    bf16: bool = False

    def batch_at(self, length: int) -> int:
        """Rows of a training step of that length."""
        return max(1, self.tokens // length)

    def repeats_at(self, length: int) -> int:
        """The number of times that a training step of that length is timed."""
        return max(min(6, self.repeats), self.repeats * self.tokens // (length * self.batch_at(length)))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named amount of work. seeds: of recall and text. ability_seeds: of all other tasks. tasks: those that are
    measured unless others are asked for. learning_rates: of text, of contestants for which validation text chose it
    (eval/rates.py); all others train at text.learning_rate. share: of the training steps that the preset has by
    itself."""

    name: str
    about: str
    seeds: int
    ability_seeds: int
    tasks: tuple[str, ...]
    recall: RecallSettings
    abilities: AbilitySettings
    text: TextSettings
    classification: ClassificationSettings
    cost: CostSettings
    learning_rates: dict[str, float] = dataclasses.field(default_factory=dict)
    share: float = 1.0

    @property
    def published(self) -> bool:
        """Tells whether tasks of papers have their papers' sizes (eval/published.py), as all else in this preset."""
        return self.name == "full"

    def seeds_of(self, task: str) -> int:
        """The number of seeds that a task is measured with."""
        return self.seeds if task in ("recall", "text") else self.ability_seeds

    def of(self, contestant: str) -> Preset:
        """The same with the contestant's own learning rate of text."""
        rate = self.learning_rates.get(contestant, self.text.learning_rate)
        return dataclasses.replace(self, text=dataclasses.replace(self.text, learning_rate=rate))

    def shortened(self, share: float) -> Preset:
        """The same with `share` of the training steps of every task."""
        parts = {name: getattr(self, name) for name in ("recall", "abilities", "text", "classification")}
        shorter = {name: dataclasses.replace(p, steps=max(1, round(share * p.steps))) for name, p in parts.items()}
        return dataclasses.replace(self, share=share, **shorter)


_SMALL = Sizes(
    hidden=64,
    layers=3,
    heads=4,
    window=16,
    context=256,
    intermediate=192,
    memory_size=1024,
    memory_topk=32,
    memory_layers=(0, 1),
    states=16,
    recurrent_layers=(1,),
)
MEDIUM = Sizes(
    hidden=128,
    layers=4,
    heads=4,
    window=64,
    context=1024,
    intermediate=512,
    memory_size=2048,
    memory_topk=32,
    memory_layers=(1,),
    states=64,
    recurrent_layers=(1,),
)
_LASTING = dataclasses.replace(MEDIUM, memory_size=8192)
_PAPER = Sizes(
    hidden=512,
    layers=12,
    heads=8,
    window=512,
    context=8192,
    intermediate=2048,
    memory_size=65536,
    memory_topk=32,
    memory_layers=(8,),
    states=512,
    recurrent_layers=(9,),
)
_MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)

_EVERYTHING = ("recall", *ABILITIES, "text", "cost")
_WIDER = dataclasses.replace(_SMALL, hidden=128, window=32, context=512, intermediate=384, states=32)

PRESETS = {
    p.name: p
    for p in (
        Preset(
            "quick",
            "minutes on two cores: small models, one seed",
            seeds=1,
            ability_seeds=1,
            tasks=("recall", "text", "cost"),
            recall=RecallSettings(
                _SMALL,
                steps=700,
                tokens=1024,
                short=24,
                length=160,
                learning_rate=3e-3,
                multiples=_MULTIPLES,
                examples=256,
            ),
            abilities=AbilitySettings(
                dataclasses.replace(_SMALL, context=1024), steps=400, tokens=4096, learning_rate=3e-3, examples=128
            ),
            text=TextSettings(
                MEDIUM, steps=240, lanes=4, length=256, learning_rate=3e-3, test_bytes=65536, document_bytes=65536
            ),
            classification=ClassificationSettings(
                MEDIUM, steps=400, tokens=4096, learning_rate=2e-3, lengths=(64, 256, 1024), examples=256
            ),
            cost=CostSettings(
                MEDIUM, lengths=(1024, 4096), tokens=2048, repeats=6, contexts=(1024, 4096), decode_tokens=24
            ),
            learning_rates={  # eval/results/rates_quick.json
                "transformer_full": 3e-3,
                "transformer": 3e-3,
                "transformer_xl": 6e-3,
                "longformer": 1.5e-3,
                "longformer_xl": 1.5e-3,
                "memorizing_transformer": 6e-3,
                "block_recurrent_transformer": 6e-3,
                "recurrent_memory_transformer": 6e-3,
                "recurrent_memory_transformer_few": 6e-3,
                "llama": 1.5e-3,
                "mistral": 1.5e-3,
                "mamba2": 6e-3,
            },
        ),
        Preset(
            "standard",
            "hours on two cores, minutes on a GPU: all abilities, three seeds, two of abilities",
            seeds=3,
            ability_seeds=2,
            tasks=_EVERYTHING,
            recall=RecallSettings(
                _WIDER,
                steps=250,
                tokens=4096,
                short=48,
                length=320,
                learning_rate=2e-3,
                multiples=_MULTIPLES,
                examples=512,
            ),
            abilities=AbilitySettings(
                dataclasses.replace(_SMALL, context=1024), steps=1200, tokens=2048, learning_rate=3e-3, examples=256
            ),
            text=TextSettings(
                _LASTING,
                steps=250,
                lanes=8,
                length=512,
                learning_rate=3e-3,
                test_bytes=786432,
                document_bytes=262144,
            ),
            classification=ClassificationSettings(
                dataclasses.replace(_LASTING, context=4096),
                steps=2000,
                tokens=8192,
                learning_rate=2e-3,
                lengths=(64, 256, 1024, 4096),
                examples=512,
            ),
            cost=CostSettings(
                _LASTING,
                lengths=(1024, 4096, 16384, 32768),
                tokens=4096,
                repeats=9,
                contexts=(1024, 4096, 16384, 65536, 131072),
                decode_tokens=32,
            ),
            learning_rates={  # eval/results/rates_standard.json
                "transformer_full": 6e-3,
                "transformer": 6e-3,
                "transformer_xl": 3e-3,
                "longformer": 1.5e-3,
                "longformer_xl": 1.5e-3,
                "memorizing_transformer": 6e-3,
                "block_recurrent_transformer": 6e-3,
                "recurrent_memory_transformer": 3e-3,
                "recurrent_memory_transformer_few": 6e-3,
            },
        ),
        Preset(
            "full",
            "widths and lengths of the papers, for a GPU: five seeds",
            seeds=5,
            ability_seeds=5,
            tasks=(*_EVERYTHING, "bytes"),
            recall=RecallSettings(
                dataclasses.replace(
                    _WIDER, hidden=256, heads=8, window=128, context=2048, intermediate=768, states=64
                ),
                steps=5000,
                tokens=32768,
                short=192,
                length=1280,
                learning_rate=1e-3,
                multiples=_MULTIPLES,
                examples=1024,
            ),
            abilities=AbilitySettings(
                dataclasses.replace(_WIDER, hidden=512, layers=6, heads=8, window=64, context=4096, intermediate=2048),
                steps=20000,
                tokens=65536,
                learning_rate=5e-4,
                examples=1024,
            ),
            text=TextSettings(
                _PAPER,
                steps=50000,
                lanes=16,
                length=1024,
                learning_rate=5e-4,
                test_bytes=4194304,
                document_bytes=4194304,
                bf16=True,
                compile=True,
            ),
            classification=ClassificationSettings(
                _PAPER,
                steps=20000,
                tokens=131072,
                learning_rate=5e-4,
                lengths=(512, 1024, 2048, 4096, 8192),
                examples=1024,
                bf16=True,
            ),
            cost=CostSettings(
                _PAPER,
                lengths=(1024, 8192, 32768, 131072),
                tokens=16384,
                repeats=15,
                contexts=(1024, 8192, 32768, 131072, 524288),
                decode_tokens=128,
                bf16=True,
            ),
        ),
    )
}
