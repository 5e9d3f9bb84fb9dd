"""Model cards: README.md as the Hub reads it, with the numbers that were measured."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import EvalResult, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .drawing import draw
from .errors import one_line
from .files import read_json, write_text
from .variants import VARIANTS, Variant

Found = TypeVar("Found")

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
}


def write_cards(out: Path, *results: Path) -> None:
    """Renders the cards of all variants to out/VARIANT.md, each with its numbers from the first of the results that
    has some, and what they see to out/VARIANT.svg. Raises as render_card does, and then writes none."""
    cards = {name: render_card(name, results=with_numbers(name, results), drawing=f"{name}.svg") for name in VARIANTS}
    drawings = {name: draw(name) for name in VARIANTS}
    for name, card in cards.items():
        write_text(out / f"{name}.md", card)
        write_text(out / f"{name}.svg", drawings[name])


def with_numbers(variant: str, results: Sequence[Path]) -> Path:
    """The first of these files of `python -m eval` that has numbers of an architecture; the last if none has."""
    names = [contestant.name for contestant in _known(variant).contestants]
    return next((path for path in results[:-1] if _entries(read_json(path), names)), results[-1])


def render_card(
    variant: str,
    *,
    folder: Path | None = None,
    results: Path | None = None,
    repo_id: str | None = None,
    drawing: str | None = None,
    training: str | None = None,
) -> str:
    """The model card of an architecture, or of a trained model: metadata and text, as README.md holds them.

    folder: a saved model. Its class, sizes and, where Trainer.save_metrics("eval", ...) left an eval_results.json, its
    scores are read from there. results: a file that `python -m eval` wrote. Its numbers are of models which that
    command trained, so they enter the metadata (model-index) of an architecture's card, and only the text of a
    folder's. repo_id: USER/NAME or NAME, where it will be, for the code that loads it. drawing: where the
    drawing of what the architecture's queries see will be, for the card to show it. training: of a trained model, in
    Markdown.

    What comes from files and arguments enters as text: it can start no line, table cell or code of its own.

    Raises ValueError for a variant that is not known, a folder that holds none or another, a repo_id that is no name,
    and results that are no such file or have no numbers of the variant.
    """
    about = _known(variant)
    if folder is not None and variant_of(Path(folder)) is not about:
        held = variant_of(Path(folder)).name
        raise ValueError(f"variant is {variant!r}, but {folder} holds a {held}; give that name")
    if repo_id is not None:
        check_repo_id(repo_id)
    saved = None if folder is None else SavedFacts.read(Path(folder), about)
    measured = None if results is None else _Measured.read(Path(results), tuple(c.name for c in about.contestants))
    auto = "AutoModelForCausalLM" if saved is None else saved.auto
    name = (
        repo_id.split("/")[-1]
        if repo_id
        else about.config.model_type
        if folder is None
        else Path(folder).resolve().name
    )
    scores = [] if saved is None else saved.scores()
    if measured is not None and saved is None:
        scores = _told(Path(str(results)), measured.scores)
    metadata = ModelCardData(
        model_name=name,
        license="apache-2.0" if saved is None else None,  # of weights only their author can say
        library_name="transformers",
        pipeline_tag=PIPELINES.get(auto),
        tags=["hf-gallery", "long-context", variant.replace("_", "-"), f"arxiv:{about.arxiv}"],
        eval_results=scores or None,
    )
    if not scores:
        del metadata.model_name  # it is the model-index's
    sections = [
        f"# {about.title if saved is None else _plain(name)}",
        about.about,
        f"The architecture is that of [{about.paper_title}]({about.paper}) ({about.authors}), written from scratch in "
        "hf-gallery. What it carries from one call to the next lives in its cache, and goes on in `generate`.",
    ]
    if drawing is not None:
        sections.append(
            f"What each query sees, as `hf-gallery spans {variant}` draws it:\n\n![{drawing_text(about)}]({drawing})"
        )
    sections += [] if saved is None else [saved.text()]
    sections += [] if training is None else [training]
    sections += [
        "## How to use",
        _code(auto, repo_id or "user/name", saved),
        "The model comes without code, which `hf-gallery push` adds when it uploads; here the package opens it."
        if saved is not None and saved.bare
        else "`trust_remote_code=True` runs the Python files beside the weights: read them first, or pin a commit by "
        "`revision`. Where hf-gallery is installed, `import hf_gallery` makes that argument unnecessary.",
        "## Intended use",
        "Research on long sequences: to read and change the architecture, to train it on long documents "
        "(`hf_gallery.training.SegmentTrainer` carries its cache from step to step), and to compare it with others "
        "at equal size. Not for decisions about people, nor for text that is shown unread.",
        "## Limits",
        "\n".join(
            f"- {limit}"
            for limit in (
                *about.limits,
                "A model knows its training text only, with that text's mistakes and biases; nothing filters what it "
                "writes.",
            )
        ),
    ]
    sections += [] if measured is None else [_told(Path(str(results)), lambda: measured.text(own=saved is None))]
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card)


def _known(variant: str) -> Variant:
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; choose from {', '.join(VARIANTS)}")
    return VARIANTS[variant]


def drawing_text(about: Variant) -> str:
    """Says in words what an architecture's drawing shows."""
    return f"A query of the {about.title} sees {about.sees.replace('`', '')}."


def check_repo_id(repo_id: str):
    """Raises ValueError unless repo_id is USER/NAME or NAME, as the Hub has them."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id is {repo_id!r}; it must be USER/NAME. {one_line(error, 300)}") from error


def variant_of(folder: Path) -> Variant:
    """The variant that a folder's config.json names. Raises ValueError if it names none."""
    if not folder.is_dir():
        raise ValueError(f"folder is {str(folder)!r}, which is no folder; give what save_pretrained wrote")
    config = read_json(folder / "config.json")
    known = {variant.config.model_type: variant for variant in VARIANTS.values()}
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in known:
        found = f"of {kind!r}" if isinstance(config, dict) else "missing or no JSON object"
        raise ValueError(
            f"{folder / 'config.json'} is {found}; it must be of a gallery model ({', '.join(known)}), as "
            "save_pretrained writes it"
        )
    return known[kind]


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read a model's weights from, be they there or not: one, or those that an index
    names. Raises ValueError for an index that names none, or a file elsewhere than beside it."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file() or not index.is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    content = read_json(index)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map of names to files; save the model there again")
    for place in places.values():
        if not isinstance(place, str) or not re.fullmatch(r"\w[\w.-]*\.safetensors", place):
            raise ValueError(
                f"{index} names the file {place!r}; it must be the plain name of a .safetensors file beside it"
            )
    return [folder / name for name in sorted(set(places.values()))]


def _code(auto: str, place: str, saved: SavedFacts | None) -> str:
    """Lines that load the model and call it, whole as they stand."""
    tokenizes = saved is None or saved.tokenizes
    carries = auto == "AutoModelForCausalLM"
    lines = ["import torch"] if carries or not tokenizes else []
    lines += [f"from transformers import {', '.join(sorted([auto] + ['AutoTokenizer'] * tokenizes))}", ""]
    bare = saved is not None and saved.bare
    lines += ["import hf_gallery  # tells transformers of the architecture", ""] if bare else []
    lines += [f'name = "{place}"  # a repository on the Hub, or a folder']
    trusting = "" if bare else ", trust_remote_code=True"
    lines += [f"model = {auto}.from_pretrained(name{trusting}).eval()"]
    chooses = auto == "AutoModelForMultipleChoice"
    asks = chooses or auto == "AutoModelForQuestionAnswering"  # its input is a question, a separator and a text
    if tokenizes:
        lines += ["tokenizer = AutoTokenizer.from_pretrained(name)"]
        answer = '"Who came? " + tokenizer.sep_token + '
        answer = f'[{answer}x for x in ("Ann came.", "Bob came.")]' if chooses else f'{answer}"Ann came."'
        question = f"{answer}, split_special_tokens=False"
        said = question if asks else '"def area(width, height):"'
        lines += [f'text = tokenizer({said}, return_tensors="pt")']
    else:
        looks = saved is not None and saved.config.get("sep_token_id") is not None
        asked = f"1, {'model.config.sep_token_id' if looks else 0}"
        ids = f"[[{asked}, 2, 3], [{asked}, 4, 5]]" if chooses else f"[[{asked}, 2, 3]]" if asks else "[[1, 2, 3]]"
        lines += [f'text = {{"input_ids": torch.tensor({ids})}}  # this model came without a tokenizer']
    if not (carries or auto == "AutoModelForSeq2SeqLM"):
        given = "**{name: x[None] for name, x in text.items()}" if chooses else "**text"  # (1, choices, tokens)
        return "\n".join(["```python", *lines, f"print(model({given}))", "```"])
    show = "print(tokenizer.decode({}[0]))" if tokenizes else "print({})"
    lines += [show.format("model.generate(**text, max_new_tokens=20)")]
    if carries:
        ids = 'text["input_ids"]'
        lines += ["", "# what was read goes on: the cache holds what the model keeps of the text"]
        lines += ["with torch.no_grad():", "    read = model(**text, use_cache=True)"]
        lines += [f"more = torch.cat([{ids}, {ids}], dim=1)"]
        lines += [show.format("model.generate(more, past_key_values=read.past_key_values, max_new_tokens=20)")]
    return "\n".join(["```python", *lines, "```"])


@dataclasses.dataclass(frozen=True)
class SavedFacts:
    """Facts about the model in a saved folder."""

    config: dict[str, Any]
    head: str  # the class that it was saved as; "" if the config names none of its variant's
    auto: str  # the Auto class that opens it under that head
    parameters: int
    dtypes: list[str]
    tokenizes: bool
    evaluation: dict[str, float]  # of Trainer.save_metrics("eval", ...)

    @classmethod
    def read(cls, folder: Path, variant: Variant) -> SavedFacts:
        config = read_json(folder / "config.json")
        named = config.get("architectures")
        named = named if isinstance(named, list) else []
        auto, head = next(
            ((auto, kind) for auto, kind in variant.auto_classes.items() if kind in named), ("AutoModel", "")
        )
        parameters, dtypes = 0, set()
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    tensors = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118, a handle is no dictionary
            except (FileNotFoundError, SafetensorError) as error:
                raise ValueError(f"{path} is missing or damaged; save the model there again: {error}") from error
            parameters += sum(math.prod(tensor.get_shape()) for tensor in tensors)
            dtypes |= {tensor.get_dtype() for tensor in tensors}
        scores = read_json(folder / "eval_results.json")
        scores = {k: x for k, x in scores.items() if _is_number(x)} if isinstance(scores, dict) else {}
        tokenizes = (folder / "tokenizer_config.json").is_file()
        return cls(config, head, auto, parameters, sorted(dtypes), tokenizes, scores)

    @property
    def bare(self) -> bool:
        """Tells whether it names no code that opens it without hf-gallery."""
        return not self.config.get("auto_map")

    def scores(self) -> list[EvalResult]:
        """The evaluation's scores; speeds and counts are not among them."""
        kept = {name.removeprefix("eval_"): x for name, x in self.evaluation.items() if name.startswith("eval_")}
        told = ("runtime", "samples_per_second", "steps_per_second", "samples")
        return [
            EvalResult(
                task_type=PIPELINES.get(self.auto, "feature-extraction"),
                dataset_type="evaluation_set",
                dataset_name="the evaluation set of its training",
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=round(x, 4),
            )
            for name, x in kept.items()
            if name not in told
        ]

    def text(self) -> str:
        hidden = {"auto_map", "architectures", "model_type", "transformers_version", "dtype", "use_cache", "id2label"}
        hidden |= {"label2id"}
        rows = [(name, json.dumps(value)) for name, value in sorted(self.config.items()) if name not in hidden]
        lines = [
            "## This model",
            "",
            f"`{self.head or '?'}`, {self.parameters:,} parameters, saved as {', '.join(self.dtypes)}.",
            "",
        ]
        for score in self.scores():
            lines += [f"- {_plain(score.metric_name)} on {score.dataset_name}: {score.metric_value}"]
        lines += [""] if self.scores() else []
        lines += ["| setting | value |", "|---|---|"]
        lines += [f"| {_plain(name)} | {_code_span(value)} |" for name, value in rows]
        return "\n".join(lines)


def _entries(results: Any, contestants: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Entries of some contestants in a results file, by name; of those alone of whom it has numbers."""
    summary = results.get("summary") if isinstance(results, dict) else None
    found = {n: summary.get(n) for n in contestants} if isinstance(summary, dict) else {}
    measures = {"recall", "bits_per_byte", "cost", "abilities"}
    return {n: entry for n, entry in found.items() if isinstance(entry, dict) and measures & entry.keys()}


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A results file of `python -m eval`, and its entries of some contestants."""

    results: dict[str, Any]
    entries: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path, contestants: tuple[str, ...]) -> _Measured:
        results = read_json(path)
        if not isinstance(results, dict) or not {"summary", "settings", "window", "cells"} <= set(results):
            raise ValueError(f"results is {str(path)!r}, no file of `python -m eval`; give its results.json")
        entries = _entries(results, contestants)
        if not entries:
            raise ValueError(
                f"{path} has no numbers of {' or '.join(contestants)}; run `python -m eval --variants "
                f"{','.join(contestants)}`"
            )
        return cls(results, entries)

    def scores(self) -> list[EvalResult]:
        """Shares of right answers and bits per byte, for the model-index. Speeds belong to a machine, and stay out."""
        found = []
        window = self.results["window"]["recall"]
        for entry in self.entries.values():
            of = f" ({entry['label']})" if len(self.entries) > 1 else ""
            for distance, score in entry.get("recall", {}).items():
                windows = f"{int(distance) / window:g} window{'s' if int(distance) != window else ''}"
                name = f"Slot recall, distance of {distance} tokens ({windows})"
                found.append(_share("slot_recall", name, f"distance_{distance}", of, score))
            for ability, levels in entry.get("abilities", {}).items():
                title = self.results["abilities"][ability]["title"]
                for level, score in levels.items():
                    found.append(_share(ability, f"{title}, {level}", level, of, score))
            if entry.get("bits_per_byte"):
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type="text",
                        dataset_name=f"Held-out documents: {self.settings('text')['corpus']}",
                        dataset_split="test",
                        metric_type="bits_per_byte",
                        metric_name=f"bits per byte{of}",
                        metric_value=round(_mean(entry["bits_per_byte"]), 4),
                    )
                )
        return found

    def cell(self, task: str) -> dict[str, Any] | None:
        """A cell of the task that measured one of the contestants, or everyone."""
        for cell in self.results["cells"]:
            if cell["task"] == task and cell["contestant"] in (*self.entries, "all"):
                return cell
        return None

    def settings(self, task: str) -> dict[str, Any]:
        cell = self.cell(task)
        return {} if cell is None else cell["settings"]

    def text(self, own: bool) -> str:
        """Tables, and how they came about. own: the card is the architecture's, not that of a trained model."""
        intro = (
            "Of small models that `python -m eval` trained from scratch, all architectures at one size and on the "
            "same batches. They compare architectures" + (" and" if own else ", are not of the weights here, and")
        )
        parts = ["## Results", f"{intro} say nothing about large models."]
        parts += [table for table in (self._recall(), *self._abilities(), self._text_and_cost()) if table]
        parts += ["## How it was measured", self._how()]
        return "\n\n".join(parts)

    def _recall(self) -> str:
        window = self.results["window"]["recall"]
        return self._shares(
            f"Recall by distance, in windows of {window} tokens; chance is {self.results['chance']:.1%}:",
            {name: entry.get("recall", {}) for name, entry in self.entries.items()},
            lambda distance: f"{int(distance) / window:g}x",
        )

    def _abilities(self) -> Iterator[str]:
        for name, about in self.results.get("abilities", {}).items():
            by = {key: entry.get("abilities", {}).get(name, {}) for key, entry in self.entries.items()}
            yield self._shares(f"{about['title']} ({about['axis']}). {about['about']}", by, str)

    def _shares(self, title: str, by: dict[str, dict[str, Any]], head) -> str:
        labels = next((list(scores) for scores in by.values() if scores), [])
        if not labels:
            return ""
        lines = [
            " ".join(title.split()),
            "",
            f"| model | {' | '.join(head(x) for x in labels)} |",
            "|---|" + "---:|" * len(labels),
        ]
        for name, scores in by.items():
            shares = [f"{scores[x]['correct'] / scores[x]['asked']:.1%}" if x in scores else "-" for x in labels]
            lines += [f"| {_plain(self.entries[name]['label'])} | {' | '.join(shares)} |"]
        return "\n".join(lines)

    def _text_and_cost(self) -> str:
        contexts = next((list(e["cost"]["cache_bytes"]) for e in self.entries.values() if "cost" in e), [])
        headings = ["model", "parameters", "bits/byte", "training tokens/s", "peak MiB of a training step"]
        headings += [f"ms/token after {int(x):,}" for x in contexts] + [
            f"KiB of cache after {int(x):,}" for x in contexts
        ]
        lines = []
        for entry in self.entries.values():
            cost, bits = entry.get("cost"), entry.get("bits_per_byte")
            parameters = entry.get("parameters") or (cost or {}).get("parameters")
            row = [
                _plain(entry["label"]),
                f"{parameters:,}" if parameters else "-",
                f"{_mean(bits):.3f}" if bits else "-",
            ]
            if cost:
                row += [f"{cost['training_tokens_per_second']:,.0f}", f"{cost['training_peak_bytes'] / 2**20:.0f}"]
                row += [f"{cost['decode_ms_per_token'][x]:.2f}" for x in contexts]
                row += [f"{cost['cache_bytes'][x] / 2**10:,.0f}" for x in contexts]
            else:
                row += ["-"] * (len(headings) - len(row))
            if cost or bits:
                lines.append(f"| {' | '.join(row)} |")
        if not lines:
            return ""
        baseline = self.results.get("order0_bits_per_byte")
        title = "Text, speed and memory" + (
            f"; a model that knows only how frequent each byte is takes {baseline:.3f} bits a byte:"
            if baseline is not None
            else ":"
        )
        return "\n".join([title, "", f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1), *lines])

    def _how(self) -> str:
        lines = []
        recall, text, cost = (self.settings(task) for task in ("recall", "text", "cost"))
        if recall:
            lines.append(
                f"- Recall: a token says that slot k holds v, and after a distance another asks for slot k. "
                f"{recall['steps']:,} training steps of about {recall['tokens']:,} tokens, then "
                f"{recall['examples']:,} test texts of {recall['length']:,} tokens at each distance. {_sizes(recall)}"
            )
        if self.results.get("abilities"):
            found = self.results["settings"]["abilities"]
            lines.append(
                f"- Abilities: {found['steps']:,} training steps of about {found['tokens']:,} tokens, from easy "
                f"levels to hard ones, then {found['examples']:,} test texts at each level. {_sizes(found)}"
            )
        if text:
            lines.append(
                f"- Text: {text['corpus']}; {text['steps']:,} training steps of {text['lanes']} documents side by "
                f"side, {text['length']} bytes each, the cache carried from step to step; then "
                f"{text['test_bytes']:,} held-out bytes, each document from its first byte to its last. {_sizes(text)}"
            )
        if cost:
            lines.append(
                f"- Cost: medians of {cost['repeats']} training steps (forward and backward) of {cost['tokens']:,} "
                f"tokens in rows of {cost['lengths'][0]:,}, and of {cost['decode_tokens']} decoded tokens after each "
                f"context, all models in turns. {_sizes(cost)}"
            )
        cells = [c for c in self.results["cells"] if c["contestant"] in (*self.entries, "all")]
        seeds = sorted({c["seed"] for c in cells})
        lines.append(f"- Seeds: {', '.join(map(str, seeds))}.")
        origins = {json.dumps(_origin(c["provenance"]), sort_keys=True) for c in cells}
        for origin in (json.loads(x) for x in sorted(origins)):
            command = _code_span(str(origin.pop("command")))
            origin = {name: _plain(value) for name, value in origin.items()}
            lines.append(
                f"- Machine: {origin['processor']}, {origin['cores']} cores, {origin['device']}; torch "
                f"{origin['torch']}, transformers {origin['transformers']}, Python {origin['python']}; commit "
                f"{origin['commit']}, {origin['day']}, by {command}."
            )
        return "\n".join(lines)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _plain(text: Any) -> str:
    """Text for one line or table cell of Markdown, whatever it holds."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(text).split()))


def _code_span(text: str) -> str:
    """Text as code in a table cell: between backticks, more of them than stand in it together."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * text.startswith("`") or " " * text.endswith("`")
    return f"{ticks}{pad}{text}{pad}{ticks}".replace("|", "\\|")


def _told(path: Path, work: Callable[[], Found]) -> Found:
    """The work's result. Raises ValueError where the results file at `path` is not as `python -m eval` writes it."""
    try:
        return work()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} is not as `python -m eval` writes it: {one_line(error)}; measure again, or undo what was changed"
        ) from error


def _share(dataset: str, name: str, part: str, of: str, score: dict[str, Any]) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=name,
        dataset_config=part,
        dataset_split="test",
        metric_type="accuracy",
        metric_name=f"accuracy{of}",
        metric_value=round(score["correct"] / score["asked"], 4),
    )


def _sizes(settings: dict[str, Any]) -> str:
    sizes = settings["sizes"]
    return (
        f"Models of {sizes['layers']} layers, {sizes['hidden']} wide, {sizes['heads']} heads, windows of "
        f"{sizes['window']} tokens."
    )


def _origin(provenance: dict[str, Any]) -> dict[str, Any]:
    machine, versions = provenance["machine"], provenance["versions"]
    return {
        "processor": machine.get("accelerator") or machine["processor"],
        **{key: machine[key] for key in ("cores", "device")},
        **{key: versions[key] for key in ("torch", "transformers", "python")},
        "commit": str(provenance["commit"])[:12],
        "command": provenance["command"],
        "day": provenance["date"][:10],
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
