"""Lanes of documents: every batch row reads whole documents, segment after segment.

    lane 0   | doc 4: seg 0 | doc 4: seg 1 | doc 4: end.. | doc 0: seg 0 | ...
    lane 1   | doc 2: seg 0 | doc 2: end.  | doc 7: seg 0 | doc 7: seg 1 | ...
               step 0         step 1         step 2         step 3

A step is one column of segments. Where a document ends, the rest of its last segment is padding, and the lane's next
document starts in the next step with `reset` set. This is the reading order of Dai et al. 2019 (Transformer-XL,
section 3.2, and LMOrderedIterator of the official code), but by document: a row's memory never holds another text.

What a step holds depends on (documents, seed, epoch, step) alone, so a run resumes at any step without reading
what came before, and every process computes its own lanes without talking to the others.

Letters: B lanes of this process, L segment_length.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

IGNORED = -100  # the label that transformers' losses leave out
READ_AT_ONCE = 256  # documents, when lengths and fingerprint are read


class DocumentLanes:
    """Deals documents over lanes and cuts them into segments. Holds no model and no cache.

    documents: datasets.Dataset with a column `input_ids` (list of int per document; other columns are ignored), or a
        plain sequence of token lists. Empty documents are passed over.
    lanes: rows of a batch of this process (B). segment_length: tokens of a row in a step (L).
    seed: of the shuffle. shuffle False: the same lanes every epoch, documents of a lane in the dataset's order.
    eos_token_id: what the last token of a document predicts; None: nothing (-100).
    pad_token_id: what stands in padded columns, where attention_mask is 0.
    rank, world_size: the documents are dealt over world_size * lanes lanes; this object reads lanes
        rank * lanes ... (rank + 1) * lanes - 1 of them.

    Balance: documents go, longest first, each to the lane that has the fewest segments so far (Graham 1969, LPT).
    The number of steps is that of the fullest lane, which is at most 4/3 of the best dealing, and near the mean
    when there are many documents. It is the same every epoch, although the epoch's shuffle decides which of equally
    long documents goes where, which lane is which, and the order of documents within each lane. A lane that
    runs dry before the fullest gives padding (attention_mask 0, labels -100, reset) until the epoch ends, so all lanes
    of all processes take the same number of steps. One document longer than all others together cannot be balanced:
    it is never split over lanes.

    num_documents, num_tokens and num_labels (predicted tokens) count the whole dataset, over all lanes and ranks.
    A batch is named by its (epoch, step): nothing here has a position.

    Raises ValueError on documents without input_ids, without a token to predict, or of unknown length (streaming),
    and on counts below 1.
    """

    def __init__(
        self,
        documents: datasets.Dataset | Sequence[Sequence[int]],
        *,
        lanes: int,
        segment_length: int,
        seed: int = 0,
        shuffle: bool = True,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        for name, value in (("lanes", lanes), ("segment_length", segment_length), ("world_size", world_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it is a count, so give an int of 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; with world_size {world_size} it lies in 0 ... {world_size - 1}")
        self._documents = _Documents(documents)
        self.lanes = lanes
        self.segment_length = segment_length
        self.seed = seed
        self.shuffle = shuffle
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.rank = rank
        self.world_size = world_size
        lengths = self._documents.lengths
        self.num_documents = len(lengths)
        self.num_tokens = int(lengths.sum())
        # the last token of a document predicts nothing, unless eos
        self.num_labels = int(lengths.sum() if eos_token_id is not None else np.maximum(lengths - 1, 0).sum())
        if self.num_labels == 0:
            raise ValueError(
                f"the dataset has {self.num_documents} documents and {self.num_tokens} tokens, none of which follows "
                "another: there is nothing to predict; give documents of two tokens or more"
            )
        self._segments = -(-lengths // segment_length)  # of each document
        self._open: dict[int, tuple[int, np.ndarray]] = {}  # lane -> (document, its tokens): read once per document
        self._plan: tuple[int, list[_Lane]] | None = None  # of one epoch
        self._fingerprint: str | None = None
        self._steps = max(lane.steps for lane in self._deal(0))

    def __len__(self) -> int:
        """Steps of an epoch, the same in every epoch and on every rank."""
        return self._steps

    def batch(self, epoch: int, step: int) -> dict[str, Any]:
        """The batch of one step.

        Returns input_ids, shift_labels, attention_mask (B, L) int64 and reset (B,) bool: True where the row does not
        go on from the step before, because a document starts in it or the lane has run dry. shift_labels[b, t] is the
        token after input_ids[b, t] in its document, also where that one stands in the next segment; -100 where nothing
        follows. Raises ValueError for a step outside the epoch.
        """
        if not 0 <= step < len(self):
            raise ValueError(f"step is {step}; an epoch has steps 0 ... {len(self) - 1}")
        length = self.segment_length
        input_ids = torch.full((self.lanes, length), self.pad_token_id, dtype=torch.int64)
        shift_labels = torch.full((self.lanes, length), IGNORED, dtype=torch.int64)
        attention_mask = torch.zeros((self.lanes, length), dtype=torch.int64)
        reset = torch.ones(self.lanes, dtype=torch.bool)
        for row, lane in enumerate(self._lanes_of(epoch)):
            document, segment = lane.at(step)
            if document is None:
                continue
            tokens = self._tokens(row, document)[segment * length :]
            size = min(len(tokens), length)
            input_ids[row, :size] = torch.from_numpy(tokens[:size].astype(np.int64))
            follows = tokens[1 : size + 1].astype(np.int64)
            shift_labels[row, : len(follows)] = torch.from_numpy(follows)
            if len(follows) < size and self.eos_token_id is not None:
                shift_labels[row, len(follows)] = self.eos_token_id
            attention_mask[row, :size] = 1
            reset[row] = segment == 0
        return {
            "input_ids": input_ids,
            "shift_labels": shift_labels,
            "attention_mask": attention_mask,
            "reset": reset,
        }

    def after(self, epoch: int, step: int) -> tuple[int, int]:
        """The (epoch, step) that follows: after an epoch's last step the next epoch's first."""
        return (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)

    def setup(self) -> dict[str, Any]:
        """All that decides the content of every step, as plain values. Reads the whole dataset the first time."""
        return {
            "lanes": self.lanes,
            "world_size": self.world_size,
            "segment_length": self.segment_length,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "eos_token_id": self.eos_token_id,
            "documents": f"{self.num_documents} documents, {self.num_tokens} tokens, {self.fingerprint()}",
        }

    def fingerprint(self) -> str:
        """A hash of all tokens and document borders, in order. It does not depend on how the dataset was made."""
        if self._fingerprint is None:
            self._fingerprint = self._documents.fingerprint()
        return self._fingerprint

    def _lanes_of(self, epoch: int) -> list[_Lane]:
        """This rank's lanes in an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            start = self.rank * self.lanes
            self._plan = (epoch, self._deal(epoch)[start : start + self.lanes])
            self._open.clear()
        return self._plan[1]

    def _deal(self, epoch: int) -> list[_Lane]:
        """All lanes of all ranks in an epoch.

        The loads, as a set, do not depend on the shuffle: in order of length each document goes to the smallest load,
        whichever of equal documents or equal lanes that is.
        """
        count = self.world_size * self.lanes
        rng = np.random.default_rng((self.seed, epoch)) if self.shuffle else None
        documents = np.flatnonzero(self._segments)
        names = np.arange(count)
        if rng is not None:
            rng.shuffle(documents)
            rng.shuffle(names)
        documents = documents[np.argsort(-self._segments[documents], kind="stable")]
        loads = [(0, place) for place in range(count)]
        dealt: list[list[int]] = [[] for _ in range(count)]
        for document in documents.tolist():
            load, place = loads[0]
            dealt[names[place]].append(document)
            heapq.heapreplace(loads, (load + int(self._segments[document]), place))
        lanes = []
        for own in dealt:
            order = np.array(own, dtype=np.int64)
            order = np.sort(order) if rng is None else rng.permutation(order)
            lanes.append(_Lane(order, self._segments))
        return lanes

    def _tokens(self, row: int, document: int) -> np.ndarray:
        held = self._open.get(row)
        if held is None or held[0] != document:
            held = (document, self._documents.tokens(document))
            self._open[row] = held
        return held[1]


class _Lane:
    """The documents of one lane in an epoch, in reading order."""

    def __init__(self, order: np.ndarray, segments: np.ndarray):
        self.order = order
        self.ends = np.cumsum(segments[order])  # the step after each document's last
        self.steps = int(self.ends[-1]) if len(order) else 0

    def at(self, step: int) -> tuple[int | None, int]:
        """(document, segment of it) read in a step; (None, 0) once the lane is dry."""
        if step >= self.steps:
            return None, 0
        place = int(np.searchsorted(self.ends, step, side="right"))
        start = int(self.ends[place - 1]) if place else 0
        return int(self.order[place]), step - start


class _Documents:
    """Tokens of documents by number, from a datasets.Dataset (read through Arrow, nothing is copied up front) or
    from a sequence of token lists."""

    def __init__(self, documents: datasets.Dataset | Sequence[Sequence[int]]):
        if isinstance(documents, (datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)):
            raise ValueError(
                f"the dataset is a {type(documents).__name__}; lanes are planned from the lengths of all documents, "
                "so give one split as a datasets.Dataset (for a stream: datasets.Dataset.from_generator)"
            )
        if not hasattr(documents, "__len__") or not hasattr(documents, "__getitem__"):
            raise ValueError(
                f"the dataset is a {type(documents).__name__}; give a datasets.Dataset with a column input_ids"
            )
        self._rows: Any = documents
        self._arrow = isinstance(documents, datasets.Dataset)
        if isinstance(documents, datasets.Dataset):
            if "input_ids" not in documents.column_names:
                raise ValueError(
                    f"the dataset has columns {documents.column_names}, not input_ids; tokenise it first: "
                    "dataset.map(lambda row: {'input_ids': tokenizer(row['text'])['input_ids']})"
                )
            self._rows = documents.select_columns(["input_ids"]).with_format("arrow")
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(lengths for lengths, _ in self._blocks())])

    def tokens(self, document: int) -> np.ndarray:
        """(n,) tokens of one document, of any integer type."""
        if self._arrow:
            return _flat(self._rows[document : document + 1]["input_ids"])
        return np.asarray(_token_list(self._rows[document]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.lengths.astype("<i8").tobytes())
        for _, tokens in self._blocks():
            digest.update(np.ascontiguousarray(tokens, dtype="<i8").data)
        return f"sha256 {digest.hexdigest()[:16]}"

    def _blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(lengths, all tokens) of one block of documents after the other."""
        for start in range(0, len(self._rows), READ_AT_ONCE):
            stop = min(start + READ_AT_ONCE, len(self._rows))
            if self._arrow:
                column = self._rows[start:stop]["input_ids"]
                lengths = pc.fill_null(pc.list_value_length(column), 0)
                yield lengths.to_numpy().astype(np.int64), _flat(column)
            else:
                lists = [np.asarray(_token_list(self._rows[i])) for i in range(start, stop)]
                yield np.array([len(one) for one in lists], dtype=np.int64), np.concatenate(lists)


def _token_list(row: Any) -> Any:
    return row["input_ids"] if isinstance(row, dict) else row


def _flat(column: pa.ChunkedArray) -> np.ndarray:
    """All values of a column of lists, one after the other."""
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *parts])
