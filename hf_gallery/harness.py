"""Gallery models in lm-eval, without cutting their past short: the model `hf-gallery`, its command line, and scores of
a model in memory.

lm-eval's own `--model hf` works on a saved gallery model like on any other, but as for any other it reads a context in
one forward, cuts it to max_length tokens (if it is not given: what config or tokenizer say), and begins each window of
a longer document anew. `--model hf-gallery` keeps the cache from window to window, reads long contexts in chunks, and
cuts nothing that the model could read.

Needs lm-eval: pip install "hf-gallery[eval]".
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset, DatasetDict
from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import setup_logging
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import hf_gallery  # registers the models with AutoModel...

from .data import TASKS, byte_tokenizer, questions
from .data.catalogue import NO_TEXT
from .models.cache import cache_of
from .models.configuration_base import UNLIMITED

TASK_FOLDER = Path(hf_gallery.__file__).parents[1] / "eval" / "tasks"  # in a checkout, not in an installed package

GALLERY = "gallery_"  # begins the model types of the gallery

Item = TypeVar("Item")
Result = TypeVar("Result")


@register_model("hf-gallery")
class GalleryLM(HFLM):
    """A causal gallery model for lm-eval. Takes the arguments of lm-eval's `hf` and

    prefill_chunk_size: tokens of a forward; what is longer is read in as many, with the cache carried along. No result
        depends on it.

    max_length limits nothing unless it is given, or the model has learned positions that end. A text is read on from
    prefix_token_id, the tokenizer's <bos> unless given. Requests with the same context read it once. With batch_size
    "auto", as many rows as max_batch_size are read side by side, half as many from the first time that memory runs
    out, and so on; no result depends on it either.

    Raises ValueError for a model that is not of the gallery, a prefill_chunk_size below 1, and a prefix token that the
    model has no embedding of.
    """

    def __init__(self, pretrained: str | PreTrainedModel, *, prefill_chunk_size: int = 2048, **arguments: Any):
        self.prefill_chunk_size = int(prefill_chunk_size)
        if self.prefill_chunk_size < 1:
            raise ValueError(f"prefill_chunk_size is {prefill_chunk_size}; it counts tokens, so give 1 or more")
        super().__init__(pretrained, **arguments)
        self._rows = int(self.max_batch_size if self.batch_size == "auto" else self.batch_size)
        kind = self.config.model_type
        if not kind.startswith(GALLERY):
            raise ValueError(f"model_type is {kind!r}; hf-gallery is for models of the gallery: use --model hf")
        if self.prefix_token_id >= self.config.vocab_size:
            raise ValueError(
                f"prefix_token_id is {self.prefix_token_id}, outside the model's vocabulary of "
                f"{self.config.vocab_size}; give one that it knows, 10 (a line feed) for example"
            )

    @property
    def max_length(self) -> int:
        """Tokens of the longest input; no limit for models that can read on for ever."""
        return self._max_length or self.config.n_positions

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, every token given all before it, as far as the model remembers.

        Texts are read side by side, each in its row, in chunks of prefill_chunk_size. Models that cannot read for ever
        do as lm-eval's `hf`.
        """
        if self.max_length != UNLIMITED:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        texts = [request.args[0] for request in requests]
        tokens = [torch.tensor([self.prefix_token_id, *self.tok_encode(text)]) for text in texts]
        totals = [0.0] * len(texts)
        with self._progress(len(texts), "texts", disable_tqdm) as bar:
            read = self._in_batches(
                range(len(texts)), lambda i: len(tokens[i]), lambda batch: self._read([tokens[i] for i in batch])
            )
            for i, total in read:
                totals[i] = total
                self.cache_hook.add_partial("loglikelihood_rolling", (texts[i],), total)
                bar.update(1)
        return totals

    def _read(self, rows: list[torch.Tensor]) -> list[float]:
        """Log-likelihoods of rows of tokens, the longest first, each without its first token."""
        cache, totals = None, torch.zeros(len(rows), dtype=torch.float64)
        for start in range(0, len(rows[0]) - 1, self.prefill_chunk_size):
            stop = start + self.prefill_chunk_size
            reading = sum(len(row) - 1 > start for row in rows)  # the others have ended
            if cache is not None and reading < cache.batch_size:
                cache.batch_select_indices(torch.arange(reading))
            inputs = _right_padded([row[start : min(stop, len(row) - 1)] for row in rows[:reading]])
            targets = _right_padded([row[start + 1 : stop + 1] for row in rows[:reading]], -100)
            logits, cache = self._forward(inputs, cache=cache)
            totals[:reading] += self._scores(logits, targets).sum(1)
        return totals.tolist()

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the log-likelihood of the continuation, and whether it is what the
        model would say, token by token. A context is read once for all its continuations."""
        if self.max_length != UNLIMITED:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        asked: dict[tuple[int, ...], list[int]] = {}  # the requests of each context
        for i, (_, tokens, _) in enumerate(requests):
            asked.setdefault(tuple(tokens), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with self._progress(len(requests), "answers", disable_tqdm) as bar:
            answered = self._in_batches(
                asked,
                len,
                lambda contexts: self._answers(contexts, [[requests[i][2] for i in asked[c]] for c in contexts]),
            )
            for context, found in answered:
                for i, answer in zip(asked[context], found, strict=True):
                    answers[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                    bar.update(1)
        return answers

    def _answers(
        self, contexts: Sequence[Sequence[int]], continuations: list[list[list[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """For each context, log-likelihood and exactness of each of its continuations."""
        logits, cache = self._prefill(contexts)
        pairs = [(row, torch.tensor(ids)) for row, several in enumerate(continuations) for ids in several]
        if len(pairs) == len(contexts):  # one continuation each: none needs the cache again
            return [[answer] for answer in self._answer(logits, cache, [ids for _, ids in pairs])]
        answers: list[list[tuple[float, bool]]] = [[] for _ in contexts]
        for start in range(0, len(pairs), self._rows):
            rows, part = zip(*pairs[start : start + self._rows], strict=True)
            picked = cache.copy()
            picked.batch_select_indices(torch.tensor(rows))
            for row, answer in zip(rows, self._answer(logits[list(rows)], picked, list(part)), strict=True):
                answers[row].append(answer)
        return answers

    def _prefill(self, contexts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, Any]:
        """Reads contexts, shorter ones padded on the left. Returns the logits after each (B, 1, V), and the cache."""
        longest = max(map(len, contexts))
        ids = torch.zeros(len(contexts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, longest - len(context) :] = torch.tensor(context)
            mask[row, longest - len(context) :] = 1
        return self._in_chunks(ids, mask)

    def _in_chunks(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Reads ids (B, T) with mask (B, T). Returns the logits after the last column (B, 1, V), and the cache."""
        cache = None
        for start in range(0, ids.shape[1], self.prefill_chunk_size):
            chunk = slice(start, start + self.prefill_chunk_size)
            padded = None if bool(mask[:, chunk].all()) else mask[:, chunk]
            logits, cache = self._forward(ids[:, chunk], padded, cache, logits_to_keep=1)
        return logits, cache

    def _answer(self, logits: torch.Tensor, cache: Any, continuations: list[torch.Tensor]) -> list[tuple[float, bool]]:
        """Log-likelihood and exactness of the continuation of each row, after whose context these are the logits
        (B, 1, V) and the cache, which is advanced."""
        targets = _right_padded(continuations, -100)
        if targets.shape[1] > 1:
            inputs = _right_padded([continuation[:-1] for continuation in continuations])
            logits = torch.cat([logits, self._forward(inputs, cache=cache)[0]], dim=1)
        right = (logits.argmax(-1).cpu() == targets) | (targets < 0)
        return list(zip(self._scores(logits, targets).sum(1).tolist(), right.all(1).tolist(), strict=True))

    def _forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None, logits_to_keep: int = 0
    ) -> tuple[torch.Tensor, Any]:
        """Logits and the cache, advanced by ids (B, T)."""
        autocast = torch.autocast(
            self.device.type, dtype=self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None
        )
        with torch.no_grad(), autocast:
            output = self.model(
                input_ids=ids.to(self.device),
                attention_mask=None if mask is None else mask.to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=logits_to_keep,
            )
        return output.logits, cache_of(output)

    def _scores(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the targets (B, T), 0 where they are below 0; float64, on the CPU."""
        logits = logits.flatten(0, 1)
        logits = logits.to(self.softmax_dtype or torch.promote_types(logits.dtype, torch.float32))
        losses = torch.nn.functional.cross_entropy(logits, targets.flatten().to(logits.device), reduction="none")
        return -losses.double().cpu().view(targets.shape)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **arguments: Any):
        """As lm-eval's, after reading all but the last token of the context in chunks, once for all its beams."""
        if context.shape[1] > 1:
            mask = arguments.get("attention_mask", torch.ones_like(context))
            _, cache = self._in_chunks(context[:, :-1], mask[:, :-1])
            own = self.model.generation_config  # what the arguments leave open
            copies = (arguments.get(name) or getattr(own, name) for name in ("num_beams", "num_return_sequences"))
            cache.batch_repeat_interleave(max(n or 1 for n in copies))
            arguments["past_key_values"] = cache
        return super()._model_generate(context, max_length, stop, **arguments)

    def _in_batches(
        self, items: Iterable[Item], length: Callable[[Item], int], work: Callable[[list[Item]], list[Result]]
    ) -> Iterator[tuple[Item, Result]]:
        """Each item with its result, from `work` on several at a time, the longest first, so that little is padded."""
        ordered = sorted(items, key=length, reverse=True)
        while ordered:
            batch = ordered[: self._rows]
            try:
                results = work(batch)
            except RuntimeError as error:
                if self.batch_size != "auto" or len(batch) == 1 or not should_reduce_batch_size(error):
                    raise
                self._rows = len(batch) // 2
                continue
            ordered = ordered[len(batch) :]
            yield from zip(batch, results, strict=True)

    def _detect_batch_size(self, requests: Sequence | None = None, pos: int = 0) -> int:
        """The rows of which one forward, prefill_chunk_size tokens, fits into memory: where lm-eval asks for itself,
        before it generates. It would try max_length tokens, which have no end here."""
        if self.max_length != UNLIMITED:
            return super()._detect_batch_size(requests, pos)

        def forward(rows: list[int]) -> list[int]:
            self._forward(torch.zeros(len(rows), self.prefill_chunk_size, dtype=torch.long), logits_to_keep=1)
            return rows

        next(self._in_batches(range(self._rows), lambda i: 0, forward))
        return self._rows

    def _progress(self, total: int, what: str, hidden: bool) -> tqdm:
        return tqdm(total=total, desc=f"hf-gallery: {what}", disable=hidden or self.rank != 0)


def _right_padded(rows: list[torch.Tensor], value: int = 0) -> torch.Tensor:
    """(B, T) of rows, with `value` after the shorter ones: nothing before sees it."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def score(
    model: PreTrainedModel,
    levels: dict[str, tuple[str, dict[str, Any]]],
    *,
    examples: int,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
    prefill_chunk_size: int = 2048,
) -> dict[str, dict[str, int]]:
    """Asks a model in memory, through lm-eval, questions of synthetic tasks, and counts its right answers.

    levels: for each label, a task of hf_gallery.data by name and its arguments, without examples, seed and split; each
    of `examples` test examples asks its last question, as in eval/tasks. An answer is right if the model's most likely
    token is the right one at each place of it. tokenizer: the byte tokenizer unless given. A causal model that is not
    of the gallery reads each question in one forward.

    Returns, by label, {"asked": questions, "correct": right answers}. The model stays where it is, in evaluation mode;
    no random state changes. Raises ValueError for a task that there is none of, and for what the task refuses.
    """
    data = {}
    for label, (name, arguments) in levels.items():
        if name not in TASKS:
            raise ValueError(f"task is {name!r} at level {label!r}; it must be one of {', '.join(TASKS)}")
        if name in NO_TEXT:
            raise ValueError(f"task is {name!r} at level {label!r}, whose tokens are no text: python -m eval asks it")
        data[label] = questions(TASKS[name](examples, **arguments, seed=seed, split="test"), last=True)
    given: dict[str, Any] = {
        "tokenizer": tokenizer or byte_tokenizer(),
        "batch_size": batch_size,
        "prefix_token_id": 0,  # stands before texts without a context, of which there are none here
    }
    with _quiet():
        if model.config.model_type.startswith(GALLERY):
            harness = GalleryLM(model, prefill_chunk_size=prefill_chunk_size, **given)
        else:  # nothing is cut: it reads what it is asked in one forward
            harness = HFLM(model, max_length=UNLIMITED, **given)
        found = simple_evaluate(
            harness,
            tasks=[_question_task(label, asked) for label, asked in data.items()],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    right = {label: [int(sample["acc"]) for sample in found["samples"][label]] for label in levels}
    return {label: {"asked": len(answers), "correct": sum(answers)} for label, answers in right.items()}


def _question_task(label: str, data: Dataset) -> ConfigurableTask:
    """An lm-eval task as eval/tasks/question_template has it, on these questions."""
    return ConfigurableTask(
        config={
            "task": label,
            "custom_dataset": lambda **metadata: DatasetDict(test=data),
            "output_type": "loglikelihood",
            "test_split": "test",
            "doc_to_text": "context",
            "doc_to_target": "target",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1.0},
        }
    )


@contextmanager
def _quiet():
    """Without lm-eval's bars and its advice for the command line."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def main(argv: Sequence[str]) -> int:
    """lm-eval's command line, `lm_eval ...`, with the model hf-gallery and, in a checkout, the gallery's tasks.

    argv: its arguments. Where they name no --model it is hf-gallery; where they name no --include_path it is
    eval/tasks. Returns the exit code: 0, or 2 for wrong usage. Raises what lm-eval raises, and RuntimeError with what
    it says where it ends the process.
    """
    arguments = list(argv)
    if arguments and arguments[0] not in ("run", "ls", "validate", "-h", "--help"):
        arguments.insert(0, "run")
    if arguments[:1] == ["run"] and not _names(arguments, "--config", "-C"):
        if not _names(arguments, "--model", "-M"):
            arguments += ["--model", "hf-gallery"]
        if not _names(arguments, "--include_path") and TASK_FOLDER.is_dir():
            arguments += ["--include_path", str(TASK_FOLDER)]
    before = sys.argv
    sys.argv = ["hf-gallery eval", *arguments]  # lm-eval reads it from there
    try:
        setup_logging()
        command = HarnessCLI()
        command.execute(command.parse_args())
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        raise RuntimeError(end.code) from None
    finally:
        sys.argv = before
    return 0


def _names(arguments: list[str], *options: str) -> bool:
    return any(argument.split("=")[0] in options for argument in arguments)
