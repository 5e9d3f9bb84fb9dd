"""Model cards: metadata that the Hub takes, numbers from the results file, code that runs as it stands."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from variants import VARIANTS as TINY

from hf_gallery.cards import render_card, with_numbers, write_cards
from hf_gallery.data import byte_tokenizer
from hf_gallery.drawing import draw
from hf_gallery.variants import VARIANTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results" / "standard.json"
NUMBERS = (RESULTS, RESULTS.with_name("quick.json"))
RENEW = (
    "model_cards is not what eval/results and the models give; renew it: hf-gallery card --all "
    "--results eval/results/standard.json --results eval/results/quick.json --out model_cards"
)
each = pytest.mark.parametrize("name", VARIANTS)


def committed(name):
    return (ROOT / "model_cards" / f"{name}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def numbers_of(name):
    """The results that a variant's card is made of."""
    return json.loads(with_numbers(name, NUMBERS).read_text(encoding="utf-8"))


@each
def test_committed_cards_are_current(name):
    numbers = with_numbers(name, NUMBERS)
    assert committed(name) == render_card(name, results=numbers, drawing=f"{name}.svg"), RENEW


@each
def test_committed_drawings_are_current(name):
    """They are what the models' own intervals give, and the card and the architecture's page show them."""
    assert (ROOT / "model_cards" / f"{name}.svg").read_text(encoding="utf-8") == draw(name), RENEW
    assert f"]({name}.svg)" in committed(name)
    assert f"](../model_cards/{name}.svg)" in (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


@each
def test_metadata(name):
    """As huggingface_hub reads it back: nothing is lost, and the fields that the Hub shows are there."""
    card = ModelCard(committed(name), ignore_metadata_errors=False)
    written = yaml.safe_load(card.content.split("---")[1])
    assert card.data.to_dict() == written
    assert written["license"] == "apache-2.0" and written["library_name"] == "transformers"
    assert written["pipeline_tag"] == "text-generation"
    assert f"arxiv:{VARIANTS[name].arxiv}" in written["tags"]
    assert VARIANTS[name].paper in card.text
    for heading in ("How to use", "Intended use", "Limits", "Results", "How it was measured"):
        assert f"\n## {heading}\n" in card.text


@each
def test_the_model_index_holds_the_measured_numbers(name):
    """Every measured share and bits per byte of the variant is there, and nothing else."""
    results = numbers_of(name)
    contestants = [c.name for c in VARIANTS[name].contestants if c.name in results["summary"]]
    expected = []
    for key in contestants:
        entry = results["summary"][key]
        label = f" ({entry['label']})" if len(contestants) > 1 else ""
        for distance, score in entry["recall"].items():
            expected.append((f"distance_{distance}", f"accuracy{label}", score["correct"] / score["asked"]))
        for levels in entry.get("abilities", {}).values():
            expected += [(level, f"accuracy{label}", x["correct"] / x["asked"]) for level, x in levels.items()]
        bits = entry["bits_per_byte"]
        expected.append((None, f"bits per byte{label}", sum(bits) / len(bits)))
    found = [(x.dataset_config, x.metric_name, x.metric_value) for x in ModelCard(committed(name)).data.eval_results]
    both = [sorted((str(part), metric, round(value, 4)) for part, metric, value in x) for x in (found, expected)]
    assert both[0] == both[1]


@each
def test_the_text_says_the_measured_numbers(name):
    text, results = ModelCard(committed(name)).text, numbers_of(name)
    entry = results["summary"][name]
    row = next(line for line in text.splitlines() if line.startswith(f"| {entry['label']} | {entry['parameters']:,} "))
    assert f"{sum(entry['bits_per_byte']) / len(entry['bits_per_byte']):.3f}" in row
    assert f"{entry['cost']['training_tokens_per_second']:,.0f}" in row
    for score in entry["recall"].values():
        assert f"{score['correct'] / score['asked']:.1%}" in text
    cells = [cell for cell in results["cells"] if cell["contestant"] == name]
    for cell in cells:
        assert cell["provenance"]["machine"]["processor"] in text and cell["provenance"]["date"][:10] in text
        assert cell["provenance"]["commit"][:12] in text and f"`{cell['provenance']['command']}`" in text


def test_other_numbers_make_another_card(tmp_path, results):
    changed = json.loads(json.dumps(results))
    entry = changed["summary"]["longformer"]
    entry["recall"][next(iter(entry["recall"]))] = {"asked": 1000, "correct": 123}
    entry["bits_per_byte"] = [1.0, 2.5]
    for other in changed["summary"].values():
        other.pop("abilities", None)
    entry["abilities"] = {"passkey": {"4x": {"asked": 8, "correct": 5}}}
    changed["abilities"] = {
        "passkey": {"title": "Passkey", "group": "memory", "axis": "distance", "about": "A number."}
    }
    changed["settings"]["abilities"] = changed["settings"]["recall"]
    (tmp_path / "results.json").write_text(json.dumps(changed))
    card = ModelCard(render_card("longformer", results=tmp_path / "results.json"))
    assert {0.123, 1.75, 0.625} <= {x.metric_value for x in card.data.eval_results}
    assert "12.3%" in card.text and "1.750" in card.text and "62.5%" in card.text and "A number." in card.text


def test_cards_are_written_whole(tmp_path):
    write_cards(tmp_path / "cards", *NUMBERS)
    for folder in (tmp_path / "cards", ROOT / "model_cards"):
        assert {path.name for path in folder.iterdir()} == {f"{x}.{kind}" for x in VARIANTS for kind in ("md", "svg")}
    for path in (tmp_path / "cards").iterdir():
        assert path.read_text(encoding="utf-8") == (ROOT / "model_cards" / path.name).read_text(encoding="utf-8")


def test_cards_are_written_all_or_none(tmp_path, results):
    del results["summary"]["longformer"], results["summary"]["longformer_xl"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="no numbers of longformer or longformer_xl; run .* longformer,longformer_xl"):
        write_cards(tmp_path / "cards", tmp_path / "results.json")
    assert not (tmp_path / "cards").exists()


# ---- cards of trained models, and the code in them


def tiny(name, head="causal"):
    """With the byte tokenizer's vocabulary and separator."""
    variant = next(v for v in TINY if v.config is VARIANTS[name].config and head in v.heads)
    special = {"sep_token_id": 260} if variant.heads[head].question and name == "longformer" else {}
    return variant.make(head, vocab_size=262, **special)


def run_code(card, folder):
    """Runs the card's one block of Python with the folder in place of the repository; what it printed."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert code.count('"user/name"') == 1
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code.replace('"user/name"', repr(str(folder))), "card", "exec"), {})
    return printed.getvalue()


@each
def test_the_code_of_a_card_runs(name, tmp_path):
    """It prints what generate() says of the text, from its start and going on from the cache."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    printed = run_code(committed(name), tmp_path)
    text = byte_tokenizer()("def area(width, height):", return_tensors="pt")
    twice = torch.cat([text["input_ids"]] * 2, dim=1)
    expected = [byte_tokenizer().decode(model.generate(x, max_new_tokens=20)[0]) for x in (text["input_ids"], twice)]
    assert printed == "".join(f"{x}\n" for x in expected)


@pytest.mark.parametrize(
    ("name", "head", "tag"),
    [
        ("transformer", "seq2seq", None),
        ("transformer", "masked", "fill-mask"),
        ("longformer", "tokens", "token-classification"),
        ("longformer", "question", "question-answering"),
        ("longformer", "seq2seq", None),
        ("longformer", "choice", "multiple-choice"),
        ("transformer", "tokens", "token-classification"),
        ("transformer", "question", "question-answering"),
        ("transformer", "choice", "multiple-choice"),
        ("transformer_xl", "sequence", "text-classification"),
        ("block_recurrent_transformer", "decoder", None),
    ],
)
def test_a_card_of_a_folder_fits_its_head(name, head, tag, tmp_path):
    """The class that opens it, what it is for, its size; and the code runs, with a tokenizer and without."""
    model = tiny(name, head)
    model.save_pretrained(tmp_path)
    card = ModelCard(render_card(name, folder=tmp_path))
    assert card.data.to_dict().get("pipeline_tag") == tag and "license" not in card.data.to_dict()
    count = sum(x.numel() for x in load_file(tmp_path / "model.safetensors").values())
    assert f"`{type(model).__name__}`, {count:,} parameters, saved as F32" in card.text
    assert "model-index" not in card.content
    assert run_code(card.content, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert run_code(render_card(name, folder=tmp_path), tmp_path)


def test_a_folder_brings_its_own_scores(tmp_path):
    """Those that Trainer.save_metrics left. Numbers of other models stay out of the metadata."""
    tiny("transformer_xl").save_pretrained(tmp_path / "mine")
    scores = {"eval_bits_per_byte": 2.34567, "eval_loss": 1.5, "eval_runtime": 9.0, "epoch": 1.0}
    (tmp_path / "mine" / "eval_results.json").write_text(json.dumps(scores))
    card = ModelCard(render_card("transformer_xl", folder=tmp_path / "mine", results=RESULTS, repo_id="me/fine"))
    assert {x.metric_type: x.metric_value for x in card.data.eval_results} == {"bits_per_byte": 2.3457, "loss": 1.5}
    assert card.data.model_name == "fine" and card.text.lstrip().startswith("# fine\n")
    assert "bits per byte on the evaluation set of its training: 2.3457" in card.text
    assert "are not of the weights here" in card.text and 'name = "me/fine"' in card.text


INJECTED = 'me/x"\nimport os\nos.system("id")\n#'


@pytest.mark.parametrize(
    "repo_id", [INJECTED, 'a"b', "a/b/c", "", "user/a b", "user/name\n", "user/x`", "user/{x}", "-me/x", "user/x.git"]
)
@each
def test_a_repo_id_that_is_no_name(name, repo_id):
    """It would stand in the card's code."""
    with pytest.raises(ValueError, match="repo_id is .*; it must be USER/NAME"):
        render_card(name, repo_id=repo_id)


def lines_of(card):
    return [
        line for line in card.split("\n") if line.startswith(("import ", "evil", "# evil", "| evil", "- evil", "---"))
    ]


@pytest.mark.parametrize(
    "place", ["folder", "auto_map", "architectures", "setting's name", "setting", "score's name", "score"]
)
def test_a_folder_writes_no_lines_of_its_own(tmp_path, place):
    """Whatever its name, its config.json and its scores say: a card has the lines that another one has, its code
    imports the same, and its metadata reads back."""
    evil = 'x`|"*[a](b)\n---\nevil\n# evil\nimport evil\n| evil |\n- evil'
    folder, plain = tmp_path / "model", tmp_path / "plain"
    if place == "folder":
        folder = tmp_path / evil.replace("/", "")
    tiny("transformer_xl").save_pretrained(plain)
    tiny("transformer_xl").save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())
    scores = {"eval_loss": 1.5}
    if place == "auto_map":
        about["auto_map"] = {evil: "x.GalleryTransformerXLForCausalLM"}
    elif place == "architectures":
        about["architectures"] = [evil]
    elif place == "setting's name":
        about[evil] = 1
    elif place == "setting":
        about["hidden_act"] = {evil: evil}
    elif place == "score's name":
        scores[f"eval_{evil}"] = 0.5
    elif place == "score":
        scores["eval_other"] = evil
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "eval_results.json").write_text(json.dumps(scores))
    (plain / "eval_results.json").write_text(json.dumps({"eval_loss": 1.5}))
    card, other = (render_card("transformer_xl", folder=path) for path in (folder, plain))
    assert lines_of(card) == lines_of(other)
    assert ModelCard(card).data.library_name == "transformers"
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    cells = [{len(re.findall(r"(?<!\\)\|", line)) for line in x.split("\n") if line[:1] == "|"} for x in (card, other)]
    assert cells[0] == cells[1]


@pytest.mark.parametrize("content", ["[" * 10**5, '{"a":' * 10**5, "", "null", "[]", '{"model_type": {}}', "\0"])
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json is .*must be of a gallery model"):
        render_card("longformer", folder=tmp_path)


@pytest.mark.parametrize("path", [("window",), ("summary", "longformer", "recall"), ("cells",), ("settings",)])
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"a": 1}, [1]])
def test_results_that_were_changed_by_hand(tmp_path, path, value):
    """A card, or one line that names the file."""
    changed = json.loads(RESULTS.read_text(encoding="utf-8"))
    *above, last = path
    place = changed
    for key in above:
        place = place[key]
    place[last] = value
    (tmp_path / "results.json").write_text(json.dumps(changed))
    try:
        render_card("longformer", results=tmp_path / "results.json")
    except ValueError as error:
        assert str(tmp_path / "results.json") in str(error) and "\n" not in str(error)


def test_what_cannot_be_rendered(tmp_path):
    with pytest.raises(ValueError, match="variant is 'mamba'; choose from transformer, "):
        render_card("mamba")
    with pytest.raises(ValueError, match="no file of `python -m eval`"):
        render_card("longformer", results=ROOT / "pyproject.toml")
    with pytest.raises(ValueError, match="is no folder"):
        render_card("longformer", folder=tmp_path / "nothing")
    tiny("transformer_xl").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant is 'longformer', but .* holds a transformer_xl"):
        render_card("longformer", folder=tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing or damaged"):
        render_card("transformer_xl", folder=tmp_path)
