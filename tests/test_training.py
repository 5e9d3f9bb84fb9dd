"""Lanes of documents, and SegmentTrainer on both causal variants: what is trained on, resumed and evaluated is what a
plain loop over the documents says."""

import datasets
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from hf_gallery.training import DocumentLanes


def texts(*lengths, vocabulary=50, seed=0):
    """One document per length, of random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, size=n).tolist() for n in lengths]


def dataset(documents):
    return datasets.Dataset.from_dict(
        {"input_ids": documents, "name": [f"document {i}" for i in range(len(documents))]}
    )


def read_back(lanes, epoch=0):
    """The documents of an epoch as the lanes read them: (tokens, labels) from each reset of a row to the next."""
    found, rows = [], [None] * lanes.lanes
    for step in range(len(lanes)):
        batch = lanes.batch(epoch, step)
        for row in range(lanes.lanes):
            here = batch["attention_mask"][row].bool()
            if batch["reset"][row]:
                rows[row] = ([], [])
                found.append(rows[row])
            assert (batch["shift_labels"][row][~here] == -100).all()
            assert here.tolist() == sorted(here.tolist(), reverse=True), "padding stands on the right"
            rows[row][0].extend(batch["input_ids"][row][here].tolist())
            rows[row][1].extend(batch["shift_labels"][row][here].tolist())
    return [pair for pair in found if pair[0]]


# ---- lanes


@hypothesis.given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    lanes=st.integers(1, 5),
    segment_length=st.integers(1, 9),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    eos=st.sampled_from([None, 99]),
)
def test_lanes_read_every_token_once(lengths, lanes, segment_length, world_size, seed, shuffle, eos):
    """Over all ranks, an epoch reads every document once, whole and in order; each token predicts the one after it, over
    segment borders too, and the last predicts eos or nothing. All ranks take the same number of steps, every epoch."""
    hypothesis.assume(max(lengths) > 1)
    documents = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    last = -100 if eos is None else eos
    for epoch in (0, 1):
        found, steps = [], set()
        for rank in range(world_size):
            own = DocumentLanes(
                documents,
                lanes=lanes,
                segment_length=segment_length,
                seed=seed,
                shuffle=shuffle,
                eos_token_id=eos,
                rank=rank,
                world_size=world_size,
            )
            found += read_back(own, epoch)
            steps.add(len(own))
        assert sorted(found) == sorted((d, [*d[1:], last]) for d in documents if d)
        assert len(steps) == 1


def test_lanes_in_one_process_are_those_of_many():
    documents = texts(5, 23, 11, 2, 17, 9, 30, 1)
    together = DocumentLanes(documents, lanes=4, segment_length=4, seed=3)
    parts = [DocumentLanes(documents, lanes=2, segment_length=4, seed=3, rank=r, world_size=2) for r in (0, 1)]
    assert len(together) == len(parts[0]) == len(parts[1])
    for step in range(len(together)):
        whole, halves = together.batch(1, step), [part.batch(1, step) for part in parts]
        for name, value in whole.items():
            assert torch.equal(value, torch.cat([half[name] for half in halves])), name


def test_lanes_are_balanced_and_their_number_of_steps_is_known():
    documents = texts(*np.random.default_rng(0).integers(2, 60, size=40))
    lanes = DocumentLanes(documents, lanes=4, segment_length=5)
    needed = sum(-(-len(d) // 5) for d in documents)
    assert len(lanes) <= -(-needed // 4) + 1
    for epoch in range(3):
        busy = [int(lanes.batch(epoch, step)["attention_mask"].any(1).sum()) for step in range(len(lanes))]
        assert sum(busy) == needed, "nothing is left when the steps are over"


def test_a_dry_lane_gives_padding_that_holds_nothing():
    lanes = DocumentLanes([[1, 2, 3, 4, 5, 6, 7], [8, 9]], lanes=3, segment_length=3, pad_token_id=77)
    assert len(lanes) == 3
    last = lanes.batch(0, 2)
    dry = ~last["attention_mask"].any(1)
    assert dry.sum() == 2
    assert (last["input_ids"][dry] == 77).all() and (last["shift_labels"][dry] == -100).all()
    assert last["reset"][dry].all() and not last["reset"][~dry].any()


def test_lanes_shuffle_by_seed_and_epoch():
    documents = texts(*[7] * 30)

    def order(seed, epoch, shuffle=True):
        return read_back(DocumentLanes(documents, lanes=2, segment_length=3, seed=seed, shuffle=shuffle), epoch)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0, shuffle=False) == order(1, 1, shuffle=False)


def test_lanes_go_on_from_their_state():
    """The state is plain values; new lanes over another copy of the documents go on from it, into the next epoch."""
    documents = texts(5, 23, 11, 2, 17)
    whole = DocumentLanes(dataset(documents), lanes=2, segment_length=4)
    epochs = [list(whole), list(whole)]
    lanes = DocumentLanes(dataset(documents), lanes=2, segment_length=4)
    reader = iter(lanes)
    for _ in range(3):
        next(reader)
    other = DocumentLanes(documents, lanes=2, segment_length=4)
    other.load_state_dict(lanes.state_dict())
    rest = [*other, *other]
    expected = [*epochs[0][3:], *epochs[1]]
    assert len(rest) == len(expected)
    for got, want in zip(rest, expected, strict=True):
        for name in want:
            assert torch.equal(got[name], want[name])
    assert (other.epoch, other.step) == (2, 0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lanes", {"lanes": 3}),
        ("segment_length", {"segment_length": 5}),
        ("seed", {"seed": 1}),
        ("shuffle", {"shuffle": False}),
        ("eos_token_id", {"eos_token_id": 9}),
        ("world_size", {"world_size": 2}),
        ("documents", {"documents": texts(5, 23, 11, 2, 16)}),
    ],
)
def test_lanes_refuse_the_state_of_others(name, change):
    setup = {"documents": texts(5, 23, 11, 2, 17), "lanes": 2, "segment_length": 4}
    state = DocumentLanes(**setup).state_dict()
    other = DocumentLanes(**{**setup, **change})
    with pytest.raises(ValueError, match=name):
        other.load_state_dict(state)
    assert (other.epoch, other.step) == (0, 0)


def test_the_fingerprint_is_of_content():
    """Not of storage: selected, shuffled back, stored as other types or split otherwise, the same documents are the
    same; tokens moved over a document's border are not."""
    documents = texts(5, 23, 11, 2, 17)
    own = DocumentLanes(documents, lanes=1, segment_length=4).fingerprint()
    stored = dataset(documents)
    indices = list(reversed(range(len(documents))))
    narrow = stored.cast_column("input_ids", datasets.List(datasets.Value("int16")))
    for same in (
        stored,
        stored.select(indices).select(indices),
        narrow,
        datasets.concatenate_datasets([stored.select(range(2)), stored.select(range(2, 5))]),
    ):
        assert DocumentLanes(same, lanes=2, segment_length=3).fingerprint() == own
    moved = [documents[0] + documents[1][:1], documents[1][1:], *documents[2:]]
    for other in (stored.select(indices), dataset(moved), dataset(texts(5, 23, 11, 2, 17, seed=1))):
        assert DocumentLanes(other, lanes=2, segment_length=3).fingerprint() != own


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (datasets.Dataset.from_dict({"text": ["a"]}), r"columns \['text'\], not input_ids"),
        (datasets.DatasetDict({"train": dataset(texts(4))}), "DatasetDict"),
        (dataset(texts(4)).to_iterable_dataset(), "IterableDataset"),
        (dataset([[1], [2], []]), "nothing to predict"),
        ([], "0 documents"),
    ],
)
def test_lanes_say_what_documents_they_need(documents, message):
    with pytest.raises(ValueError, match=message):
        DocumentLanes(documents, lanes=2, segment_length=4)


@pytest.mark.parametrize("change", [{"lanes": 0}, {"segment_length": 0}, {"world_size": 0}, {"rank": 2}])
def test_lanes_refuse_wrong_counts(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is {change[name]}"):
        DocumentLanes(texts(4), **{"lanes": 2, "segment_length": 4, "world_size": 2, **change})
