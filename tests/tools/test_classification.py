"""Byte classification: where stretches come from, that none is both learned and asked about, and what is learned."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from test_eval import CPU, NAMES, TINY, invoke, tiny  # noqa: F401, a fixture

from eval import benchmark, classification, compare, contestants, report, training
from eval.presets import PRESETS
from hf_gallery.data import load_corpus

SETTINGS = dataclasses.replace(TINY.classification, lengths=(8, 32), examples=60, classes=3)
WINDOW = SETTINGS.sizes.window


def corpus_of(documents, **columns):
    """A corpus whose training documents are these texts by name."""
    rows = {"text": list(documents.values()), "document": list(documents)} | columns
    return DatasetDict({split: Dataset.from_dict(rows) for split in ("train", "validation", "test")})


def numbered(label, size):
    """A text of which each stretch of four bytes stands in one place only: its label, and where it is."""
    return "".join(f"{label}{i:03d}" for i in range(size // 4))


def pieces(stretches):
    return [ids[i : i + 4].astype(np.uint8).tobytes() for ids in stretches for i in range(len(ids) - 3)]


def test_the_largest_places_are_the_sources():
    """A folder at the top is one source, and a file another; the folder of a split is no place."""
    documents = {"train/big/a.py": "a" * 300, "train/big/b.py": "b" * 200, "train/book.txt": "c" * 400}
    documents |= {"train/tiny.txt": "d" * 20, "other": "e" * 170, "less": "f" * 165}
    found = classification.sources(corpus_of(documents), SETTINGS)
    assert list(found) == ["big", "book.txt", "other"]
    assert [len(found["big"].train[0]), len(found["big"].test[0])] == [400, 100]
    assert (found["big"].test[0] == ord("b")).all()  # its end
    assert list(classification.sources(corpus_of(documents), dataclasses.replace(SETTINGS, classes=9))) == [
        "big",
        "book.txt",
        "other",
        "less",
    ]


def test_nothing_that_is_asked_was_trained_on():
    documents = {name: numbered(name, 800 + 100 * i) for i, name in enumerate("xyz")}
    found = classification.sources(corpus_of(documents), SETTINGS)
    names = list(found)
    trained = set()
    for batch in classification.Stretches(found, dataclasses.replace(SETTINGS, steps=200), 0):
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            text = bytes(ids[mask.bool()].tolist()).decode()
            assert text in documents[names[label]] and len(text) in SETTINGS.lengths
            trained |= set(pieces([ids[mask.bool()].numpy()]))
    assert len(trained) > 1000
    for length in SETTINGS.lengths:
        asked = classification.questions(found, SETTINGS, length, 0)
        assert np.bincount([question.label for question in asked]).tolist() == [min(20, 160 // length)] * 3
        shown = [question.stretch.tobytes().decode() for question in asked]
        assert all(
            len(s) == length and s in documents[names[label]] for s, (_, label, _) in zip(shown, asked, strict=True)
        )
        own = pieces([question.stretch for question in asked])
        whole = [piece for piece in own if chr(piece[0]) in names]
        assert len(whole) == len(set(whole))  # no two overlap
        assert not trained & {p for p in whole if documents[chr(p[0])].index(p.decode()) % 4 == 0}
    other = classification.questions(found, SETTINGS, 8, 1)
    assert [q.stretch.tobytes() for q in other] != [
        q.stretch.tobytes() for q in classification.questions(found, SETTINGS, 8, 0)
    ]


def test_batches_are_the_same_for_all_and_grow():
    found = classification.sources(corpus_of({name: numbered(name, 800) for name in "xyz"}), SETTINGS)
    settings = dataclasses.replace(SETTINGS, steps=60)
    first, again, other = (list(classification.Stretches(found, settings, seed)) for seed in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "attention_mask", "labels"))
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, other, strict=True))
    lengths = [batch["input_ids"].shape[1] for batch in first]
    assert len(lengths) == 60 and set(lengths[:30]) == {8} and set(lengths[40:]) == {8, 32}
    assert {batch["input_ids"].numel() for batch in first} == {settings.tokens}


def test_labels_of_a_dataset():
    """Its own splits; texts of less than a window are left out, others cut to whole windows and padded on the left."""
    texts = ["good " * 3, "bad " * 9, "no", "bad " * 2]
    corpus = corpus_of(dict(zip("abcd", texts, strict=True)), label=[1, 0, 1, 0])
    found = classification.sources(corpus, SETTINGS)
    assert list(found) == ["0", "1"] and [len(s.test) for s in found.values()] == [2, 1]
    asked = classification.questions(found, SETTINGS, 32, 0)
    assert {(bytes(s), label) for s, label, _ in asked} <= {(b"bad " * 8, 0), (b"bad " * 2, 0), (b"good good go", 1)}
    assert sorted(question.label for question in asked) == [0, 1]
    batch = classification._batch([np.arange(8, dtype=np.uint8), np.arange(4, dtype=np.uint8)])
    assert batch["attention_mask"].tolist() == [[1] * 8, [0] * 4 + [1] * 4]
    assert batch["input_ids"][1].tolist() == [0] * 4 + [0, 1, 2, 3]


@pytest.mark.parametrize(
    "documents", [{"one": "x" * 900}, {"one": "x" * 900, "short": "y" * 150}, {"a": "x", "b": "y"}], ids=len
)
def test_too_few_sources(documents):
    with pytest.raises(ValueError, match="[01] source.* 32 bytes .*at least two.*longer documents"):
        classification.sources(corpus_of(documents), SETTINGS)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_classifiers_have_one_size_and_whole_windows(preset):
    s = PRESETS[preset].classification
    counts = {}
    for name, contestant in contestants.CONTESTANTS.items():
        with torch.device("meta"):
            model = contestants.build(contestant, s.sizes, labels=s.classes)
        assert model.config.num_labels == s.classes
        counts[name] = model.num_parameters()
    assert max(counts.values()) / min(counts.values()) < 1.03, counts
    assert all(length % s.sizes.window == 0 for length in s.lengths) and list(s.lengths) == sorted(set(s.lengths))
    assert s.sizes.context >= s.lengths[-1]  # the upper line sees all of it


def test_the_windowed_transformer_judges_by_its_last_window():
    """The premise: what stands before the last window changes everyone's label scores but the lower line's."""
    ids = torch.randint(0, 97, (1, 2 * WINDOW))
    other = ids.clone()
    other[0, 0] += 1
    for name, contestant in contestants.CONTESTANTS.items():
        model = contestants.build(contestant, SETTINGS.sizes, labels=3).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # louder than at the start of training
                parameter.add_(0.3 * torch.randn_like(parameter))
            change = (model(ids).logits - model(other).logits).abs().max()
        assert (change == 0) == (name == "transformer"), name


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_difference_is_learned(name):
    """Sources with bytes of their own: everyone tells them apart, by the label's row and not by its place."""
    rng = np.random.default_rng(0)
    documents = {
        place: "".join(rng.choice(list(letters), size=size))
        for place, letters, size in (("p", "abcd", 900), ("q", "efgh", 800), ("r", "ijkl", 700))
    }
    settings = dataclasses.replace(SETTINGS, steps=40, tokens=128)
    result = classification.measure(
        contestants.CONTESTANTS[name], settings, corpus_of(documents), 0, CPU, lambda n: None
    )
    assert result["labels"] == ["p", "q", "r"]
    for length, asked in ((8, 51), (32, 12)):
        score = result["levels"][str(length)]
        assert score["asked"] == asked and score["chance"] == pytest.approx(1 / 3) and score["trained"]
        assert score["correct"] > 0.9 * asked


def test_mixed_precision_is_for_training_alone(monkeypatch):
    seen = {True: set(), False: set()}

    def build(*arguments):
        model = contestants.build(*arguments)
        model.classifier.register_forward_hook(lambda module, x, y: seen[module.training].add(y.dtype))
        return model

    monkeypatch.setattr(training, "build", build)
    corpus = corpus_of({name: numbered(name, 800) for name in "xyz"})
    for bf16 in (True, False):
        settings = dataclasses.replace(SETTINGS, bf16=bf16)
        classification.measure(contestants.CONTESTANTS["transformer_xl"], settings, corpus, 0, CPU, lambda n: None)
        assert seen == {True: {torch.bfloat16 if bf16 else torch.float32}, False: {torch.float32}}
        seen[True].clear()


def test_guesses_are_counted_as_such():
    class Zero:
        def __call__(self, input_ids, attention_mask):
            assert len(input_ids) <= 2
            return type("", (), {"logits": torch.tensor([[1.0, 0.0]] * len(input_ids))})

    asked = [
        classification.Question(np.zeros(4 * n, dtype=np.uint8), label, text)
        for n, label, text in ((1, 0, 3), (2, 1, 7), (3, 0, 3), (1, 0, 5), (1, 1, 7))
    ]
    score = classification.ask(Zero(), asked, [3, 5, 7], 2, CPU)
    units = {"unit": "document", "asked": "2 1 2", "correct": "2 1 0"}
    assert score == {"asked": 5, "correct": 3, "by_unit": units}


def test_the_command_shows_it_as_an_ability(tiny, tmp_path):  # noqa: F811
    for i in range(3):  # long enough to hold stretches out
        (tmp_path / "corpus" / f"{i}.txt").write_text(numbered("xyz"[i], 1200))
    done = invoke(*tiny, "--tasks", "bytes", "--variants", "transformer,transformer_xl", "--seeds", "2")
    assert done.exit_code == 0, (done.output, done.exception)
    results = json.loads((tmp_path / "runs/tiny/results.json").read_text())
    assert results["abilities"] == {"bytes": classification.ABOUT}
    cells = {cell["contestant"]: cell for cell in results["cells"] if cell["seed"] == 0}
    assert str(tmp_path / "corpus") in cells["transformer"]["settings"]["corpus"]
    for name, cell in cells.items():
        total = results["summary"][name]["abilities"]["bytes"]
        for length, score in cell["result"]["levels"].items():
            assert total[length]["asked"] == 2 * score["asked"] > 0  # of both seeds
    assert "Byte classification" in report.markdown(results)
    page = (tmp_path / "runs/tiny/report.html").read_text()
    assert "Byte classification (text)" in page and "bytes of the stretch" in page
    assert {d.what for d in compare.differences(results, results)} == {
        f"Byte classification, {length}" for length in TINY.classification.lengths
    }


def test_it_is_measured_only_when_asked_for():
    assert "bytes" in benchmark.TASKS
    assert {name: "bytes" in preset.tasks for name, preset in PRESETS.items()} == {
        "quick": False,
        "standard": False,
        "full": True,
    }
    assert PRESETS["quick"].shortened(0.5).classification.steps == PRESETS["quick"].classification.steps / 2


def test_labels_of_the_hub_are_kept_on_demand(monkeypatch):
    from hf_gallery.data import corpus

    rows = Dataset.from_dict({"text": ["fine film", "poor film"] * 20, "label": [1, 0] * 20})
    monkeypatch.setattr(corpus, "load_dataset", lambda *a, **k: DatasetDict({"train": rows, "test": rows}))
    assert load_corpus("hf:some/reviews")["train"].column_names == ["text", "document"]
    labelled = load_corpus("hf:some/reviews", labels=True)
    assert labelled["test"].column_names == ["text", "label", "document"]
    assert labelled["test"]["label"][:2] == [1, 0] and len(labelled["validation"]) == 2
