"""To the Hub and back, by huggingface_hub over HTTP, to a small Hub on this machine (hub_server.py).

What needs a client of its own, since the client reads its address once, runs in two other processes for all variants:
one has the library and uploads, the other has not and opens what arrived. What a client must refuse runs here.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import TOKEN, Hub
from safetensors.torch import load_file, save_file
from test_law_7_travels_light import inputs_of, open_elsewhere, results_here
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from typer.testing import CliRunner
from variants import COLUMNS, VARIANTS, Runner, assert_equal, words

import hf_gallery.variants
from hf_gallery import GalleryTransformerForCausalLM
from hf_gallery.cli import app
from hf_gallery.convert import convert
from hf_gallery.data import byte_tokenizer
from hf_gallery.hub import check_checkpoint, push

ROOT = Path(__file__).parents[2]
NAMES = list(hf_gallery.variants.VARIANTS)
TINY = {name: next(v for v in VARIANTS if v.config is about.config) for name, about in
        hf_gallery.variants.VARIANTS.items()}  # fmt: skip

CLIENT = """
import json, sys
from pathlib import Path
import torch, transformers
from huggingface_hub import HfApi, ModelCard

import hf_gallery
from hf_gallery.cli import app
from hf_gallery.convert import convert
from hf_gallery.data import byte_tokenizer
from hf_gallery.hub import push, render_card

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
base, *names = sys.argv[1:]
base = Path(base)
report = {}
for name in names:
    folder = base / "saved" / name
    transformers.AutoModelForCausalLM.from_pretrained(folder).push_to_hub(f"user/{name}")
    byte_tokenizer().push_to_hub(f"user/{name}")
    ModelCard(render_card(name, folder=folder, repo_id=f"user/{name}")).push_to_hub(f"user/{name}")
    report[name] = push(folder, f"user/{name}-folder", private=True)
try:
    app(["push", str(base / "saved" / names[0]), "user/by-command", "--message", "by command"])
except SystemExit as end:
    report["by command"] = end.code

gpt2 = transformers.GPT2LMHeadModel.from_pretrained(base / "gpt2")
for name in ("user/gpt2", "user/gpt2-broken"):
    gpt2.push_to_hub(name)
HfApi().create_repo("user/config-only")
HfApi().upload_file(
    path_or_fileobj=base / "gpt2" / "config.json", path_in_repo="config.json", repo_id="user/config-only"
)
convert("user/gpt2", base / "converted")


def attempt(name, act):
    try:
        act()
        report[name] = None
    except Exception as error:
        report[name] = f"{type(error).__name__}: {error}"


open_hub = transformers.AutoModelForCausalLM.from_pretrained
attempt("open, wrong revision", lambda: open_hub(f"user/{names[0]}", revision="nowhere"))
attempt("open, wrong name", lambda: open_hub("user/nothing"))
attempt("open, no weights", lambda: open_hub("user/config-only"))
attempt("convert, wrong revision", lambda: convert("user/gpt2", base / "no" / "revision", revision="nowhere"))
attempt("convert, no weights", lambda: convert("user/config-only", base / "no" / "weights"))
attempt("convert, broken download", lambda: convert("user/gpt2-broken", base / "no" / "download"))
(base / "client.json").write_text(json.dumps(report))
"""


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as server:
        yield server


def save_tiny(name, folder):
    """A tiny causal model of a variant with the byte tokenizer, saved; as something to run."""
    variant = TINY[name]
    run = Runner(variant, variant.heads["causal"], variant.make("causal", vocab_size=262))
    run.model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return run


@pytest.mark.slow
@pytest.mark.works("Hub, pushed and opened", *COLUMNS)
def test_there_and_back(hub, tmp_path, monkeypatch):
    """All variants go up by push_to_hub and by push, and open without the library, with the same logits and the same
    generated text, under every head; a checkpoint of transformers comes down and is converted."""
    here, jobs = {}, []
    for name in NAMES:
        run = save_tiny(name, tmp_path / "saved" / name)
        here[name] = results_here(run, inputs_of(run))
        for auto, head in {head.auto: head for head in run.variant.heads.values()}.items():
            save_file(inputs_of(replace(run, head=head)), tmp_path / f"{name} {auto}.inputs")
            for repo in (name, f"{name}-folder") if head.auto == "AutoModelForCausalLM" else (name,):
                job = dict(name=f"{repo} {auto}", folder=f"user/{repo}", auto=auto, again=None)
                files = dict(inputs=str(tmp_path / f"{name} {auto}.inputs"), out=str(tmp_path / f"{repo} {auto}.out"))
                jobs.append(job | files | {"class": head.kind.__name__})
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_positions=32, n_embd=12, n_layer=2, n_head=2, bos_token_id=94, eos_token_id=95)
    ).eval()
    gpt2.save_pretrained(tmp_path / "gpt2")
    hub.break_at("resolve", "user/gpt2-broken", status=403, times=1000)

    for variable, value in hub.environment(tmp_path / "client home").items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "client.py").write_text(CLIENT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "client.py"), str(tmp_path), *NAMES],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    client = json.loads((tmp_path / "client.json").read_text())
    opened = open_elsewhere(tmp_path, jobs)

    for job in jobs:
        about = opened[job["name"]]
        assert "error" not in about, about["error"]
        assert about["class"] == job["class"] and about["module"].startswith("transformers_modules.user.")
    for name in NAMES:
        for repo in (name, f"{name}-folder"):
            result = load_file(tmp_path / f"{repo} AutoModelForCausalLM.out")
            assert_equal(result["result"], here[name]["result"])
            assert torch.equal(result["generated"], here[name]["generated"])
            check_repository(hub, f"user/{repo}", tmp_path / "saved" / name, tmp_path / "down" / repo)
        assert client[name] == f"{hub.url}/user/{name}-folder"
        assert hub.repos[f"user/{name}-folder"].private and not hub.repos[f"user/{name}"].private
        assert hub.repos[f"user/{name}-folder"].messages == ["initial commit", f"Upload {name}"]

    assert client["by command"] == 0
    pushed, same = (hub.files(repo) for repo in ("user/by-command", f"user/{NAMES[0]}-folder"))
    assert {k: x for k, x in pushed.items() if k != "README.md"} == {k: x for k, x in same.items() if k != "README.md"}
    assert hub.repos["user/by-command"].messages[-1] == "by command"

    model = GalleryTransformerForCausalLM.from_pretrained(tmp_path / "converted").eval()
    with torch.no_grad():
        assert_equal(model(words(2, 13)).logits, gpt2(words(2, 13)).logits)

    for name, said in {
        "open, wrong revision": "nowhere",
        "open, wrong name": "user/nothing",
        "open, no weights": "model.safetensors",
        "convert, wrong revision": "Revision Not Found",
        "convert, no weights": "config-only",
        "convert, broken download": "cannot find the requested files",
    }.items():
        assert client[name] is not None and said in client[name], (name, client[name])
    assert not (tmp_path / "no").exists()
    assert not hub.unknown


def check_repository(hub, repo, saved, folder):
    """The repository holds what was saved, with a card; and its tokenizer opens."""
    files = hub.files(repo)
    for path in saved.iterdir():
        assert files[path.name] == path.read_bytes() or path.name == "config.json", path.name
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and "hf-gallery" in card.data.tags
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(files[name])
    assert AutoTokenizer.from_pretrained(folder)("né")["input_ids"] == byte_tokenizer()("né")["input_ids"]


# ---- what push refuses, and what a failure leaves


@pytest.fixture
def online(hub, tmp_path, monkeypatch):
    """The client of this process, turned to the server."""
    for name, value in dict(ENDPOINT=hub.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True).items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def saved(tmp_path):
    save_tiny("transformer_xl", tmp_path / "model")
    return tmp_path / "model"


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names that lie beside a model and look like what belongs to one.
HOSTILE = {
    *("secrets.py", "settings.py", "config.py", "conftest.py", "setup.py", "train.py", "__init__.py", "modeling.py"),
    *("token.py", "ROWS.py", "rows.py.bak", "rows.pyc", "rows.txt", "modeling_transformer_xl.py.orig"),
    *("LICENSE_KEY", "LICENSE.key", "LICENSE.pem", "LICENSES", "LICENSE-server.txt", "license", "NOTICE_board"),
    *("private.model", "keys.spm", "model.spm", "customers.model", "tokenizer.model.bak", "id_rsa", ".env", ".netrc"),
    *("config.json.bak", "config.json~", "config_secret.json", "my_config.json", "credentials.json", "token"),
    *("tokenizer.json.old", "vocab.json.bak", "passwords.txt", "merges.txt.1", "README.txt", "README.md.bak"),
    *("model.safetensors.bak", "model-00001-of-00002.safetensors", "optimizer.safetensors", "adapter_model.bin"),
    *("chat_template.jinja.bak", "secret.jinja", "additional_chat_templates/keys.txt", "code/rows.py", "*.py"),
    *("additional_chat_templates/.secret.jinja", "additional_chat_templates/deeper/secret.jinja", "a\nb.py"),
}


def test_push_makes_one_commit(online, saved, caplog):
    """Of what belongs to the model, and of nothing that training left; the folder stays as it is."""
    left = {
        *("checkpoint-10/model.safetensors", "checkpoints/checkpoint-10/model.safetensors", "runs/events.py"),
        *("training_args.bin", "trainer_state.json", "vocab.pkl", "book.cache", "other.safetensors", ".hidden.py"),
        "model.safetensors.index.json",  # of shards that model.safetensors stands in for
    }
    left |= HOSTILE
    kept = {"LICENSE", "chat_template.jinja", "additional_chat_templates/tool.jinja"}
    for name in left | kept:
        (saved / name).parent.mkdir(parents=True, exist_ok=True)
        (saved / name).write_bytes(b"left")
    before = content(saved)
    url = push(saved, "user/name", message="first")
    assert url == f"{online.url}/user/name" and content(saved) == before
    assert online.repos["user/name"].messages == ["initial commit", "first"]
    assert set(online.files("user/name")) == {str(path) for path in before} - left | {"README.md"}
    assert "not uploaded: " in caplog.text
    inside = "additional_chat_templates/"
    for name in left - {"a\nb.py", f"{inside}deeper/secret.jinja"}:
        assert (name if name.startswith(inside) else name.split("/")[0]) in caplog.text, name
    assert repr("a\nb.py") in caplog.text and f"{inside}deeper" in caplog.text
    assert 'name = "user/name"' in online.files("user/name")["README.md"].decode()
    assert push(saved, "name") == url  # the token's owner is meant
    assert not online.unknown


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_code_goes_with_the_librarys(online, tmp_path, name):
    """As those of the zoo are: what arrives is what save_pretrained would have written, and the folder stays bare."""
    folder = tmp_path / "model"
    save_tiny(name, folder)
    push(folder, "user/whole")
    for path in folder.glob("*.py"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    whole_map = config.pop("auto_map")
    (folder / "config.json").write_text(json.dumps(config))
    before = content(folder)
    push(folder, "user/bare")
    assert content(folder) == before
    whole, bare = online.files("user/whole"), online.files("user/bare")
    assert set(whole) == set(bare)
    assert all(whole[path] == bare[path] for path in whole if path.endswith((".py", ".safetensors")))
    assert json.loads(bare["config.json"])["auto_map"] == whole_map


def test_what_training_left_stays_here(online, tmp_path):
    """The command line's own training, published by its own push."""
    texts, out = tmp_path / "texts", tmp_path / "my_model"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text("It was the best of times, it was the worst of times. " * (2 + i % 3))
    sizes = [f"--set={name}" for name in ("hidden_size=16", "num_attention_heads=2", "intermediate_size=32")]
    line = [
        "train",
        "transformer_xl",
        out,
        "--corpus",
        texts,
        "--steps=2",
        "--save-steps=1",
        "--lanes=2",
        "--length=32",
    ]
    for arguments in ([*line, *sizes, "--device=cpu"], ["push", out, "user/name"]):
        done = CliRunner().invoke(app, [str(x) for x in arguments])
        assert done.exit_code == 0, done.output
    assert done.stdout.strip() == f"{online.url}/user/name"
    assert (out / "checkpoints" / "checkpoint-2" / "model.safetensors").exists()
    config = json.loads((out / "config.json").read_text())
    modules = {place.split(".")[0] for place in config["auto_map"].values()}
    files = set(online.files("user/name"))
    assert {f"{name}.py" for name in modules} < files
    assert {name for name in files if not name.endswith(".py")} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json"),
        "tokenizer_config.json",
    }


def test_links_lead_nowhere_else(online, saved, tmp_path):
    """A link within the folder is the file; one out of it is refused if it belongs to the model, else left."""
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (saved / "notes.txt").symlink_to(secret)
    (saved / "weights").mkdir()
    (saved / "model.safetensors").rename(saved / "weights" / "first")
    (saved / "model.safetensors").symlink_to(saved / "weights" / "first")
    push(saved, "user/name")
    files = online.files("user/name")
    assert files["model.safetensors"] == (saved / "weights" / "first").read_bytes()
    assert not {"notes.txt", "weights/first"} & set(files)
    before = len(online.asked)
    (saved / "rows.py").rename(tmp_path / "rows.py")
    (saved / "rows.py").symlink_to(tmp_path / "rows.py")
    for name in ("LICENSE", "extra.py"):
        (saved / name).symlink_to(secret)
    with pytest.raises(ValueError, match="LICENSE is a link to a file outside.*\n.*rows.py is a link") as caught:
        push(saved, "user/name")
    assert "extra.py" not in str(caught.value)
    assert len(online.asked) == before


def test_code_goes_by_what_imports_it(online, saved):
    """Files that the model's import from beside them go along, and those that these import, and the tokenizer's own; a
    file that nobody imports, or only by an absolute name, stays."""
    code = {"helper": "from .deeper import x\n", "deeper": "import secrets\nx = 1\n", "secrets": "KEY = 1\n"}
    code |= {
        "tokenization_own": "from .helper import x\nclass OwnTokenizer: pass\n",
        "alone": "from .rows import Rows\n",
    }
    for name, text in code.items():
        (saved / f"{name}.py").write_text(text)
    about = json.loads((saved / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    (saved / "tokenizer_config.json").write_text(json.dumps(about))
    push(saved, "user/name")
    went = {name.removesuffix(".py") for name in online.files("user/name") if name.endswith(".py")}
    assert went & set(code) == {"helper", "deeper", "tokenization_own"} and "modeling_transformer_xl" in went


@pytest.mark.parametrize("name", ["rows/../../key", "./key", ".rows", "/etc/key"])
def test_code_from_elsewhere_is_refused(online, saved, name):
    """Whatever an import says, and be it in a docstring, which transformers reads as code."""
    path = saved / "rows.py"
    path.write_text(path.read_text() + f'"""\nfrom .{name} import x\n"""\n')
    with pytest.raises(ValueError, match="rows.py imports .*no module beside it"):
        push(saved, "user/name")
    assert not online.asked


def test_a_card_that_is_there_is_kept(online, saved):
    (saved / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    push(saved, "user/name")
    assert online.files("user/name")["README.md"] == (saved / "README.md").read_bytes()


def test_old_weights_do_not_stay(online, saved, tmp_path):
    """transformers would open model.safetensors though an index lies beside it."""
    push(saved, "user/name")
    model = GalleryTransformerForCausalLM(TINY["transformer"].make_config("causal", vocab_size=262))
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    push(tmp_path / "shards", "user/name")
    files = online.files("user/name")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert len([name for name in files if name.endswith(".safetensors")]) > 1


def test_a_branch(online, saved):
    push(saved, "user/name")
    huggingface_hub.HfApi().create_branch("user/name", branch="tries")
    (saved / "generation_config.json").write_text("{}")
    push(saved, "user/name", revision="tries")
    assert online.files("user/name", "tries")["generation_config.json"] == b"{}"
    assert online.files("user/name")["generation_config.json"] != b"{}"


def test_a_wrong_revision(online, saved):
    with pytest.raises(ValueError, match="revision is 'nowhere', no branch of user/name"):
        push(saved, "user/name", revision="nowhere")
    assert not online.repos
    push(saved, "user/name")
    with pytest.raises(ValueError, match="revision is 'nowhere'"):
        push(saved, "user/name", revision="nowhere")
    assert len(online.repos["user/name"].messages) == 2


def test_private_is_private(online, saved):
    push(saved, "user/open")
    with pytest.raises(ValueError, match="user/open is there and public"):
        push(saved, "user/open", private=True)
    assert len(online.repos["user/open"].messages) == 2
    push(saved, "user/hidden", private=True)
    push(saved, "user/hidden", private=True)
    assert online.repos["user/hidden"].private


@pytest.mark.parametrize("repo_id", ["a/b/c", "user/a b", "user/..", "", "user/x.git"])
def test_a_bad_repo_id(online, saved, repo_id):
    with pytest.raises(ValueError, match="repo_id is .*USER/NAME"):
        push(saved, repo_id)
    assert not online.asked


def test_no_token(online, saved, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="no token .*hf auth login"):
        push(saved, "user/name")
    assert not online.asked
    with pytest.raises(RuntimeError, match="token is not valid"):
        push(saved, "user/name", token="hf_other")
    push(saved, "user/name", token=TOKEN)


def test_a_name_of_others(online, saved):
    with pytest.raises(RuntimeError, match="others/name got no commit.*may not write there"):
        push(saved, "others/name")
    assert not online.repos


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def tensors(change):
    """Makes a function that puts the folder's weights through `change`."""

    def damage(folder):
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return damage


def without(name):
    return tensors(lambda found: {key: x for key, x in found.items() if key != name})


def config(**fields):
    """Makes a function that sets fields of config.json."""

    def damage(folder):
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | fields))

    return damage


def index(weight_map):
    """Makes a function that puts an index in place of the weights."""

    def damage(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return damage


def missing(name):
    return lambda folder: (folder / name).unlink()


def holding(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (missing("config.json"), "config.json"),
        (holding("config.json", "{"), "config.json is missing or no JSON object"),
        (config(model_type=["gallery_transformer_xl"]), r"config.json is of \['gallery_transformer_xl'\]"),
        (config(auto_map={}), "has no auto_map"),
        (config(auto_map=["a.B"]), r"auto_map in config.json is \['a.B'\]"),
        (
            config(auto_map={"AutoModel": ["a.B", None]}),
            r"auto_map in config.json gives \['a.B', None\] for AutoModel",
        ),
        (config(auto_map={"AutoModel": "other/name--a.B"}), "gives 'other/name--a.B' for AutoModel.*MODULE.CLASS"),
        (config(auto_map={"AutoModel": "../a.B"}), "gives '../a.B' for AutoModel"),
        (config(auto_map={"AutoModel": "rows.GalleryModel"}), "rows.py has no GalleryModel, which auto_map names"),
        (config(architectures=None), "architectures in config.json is None.*GalleryTransformerXLForCausalLM"),
        (config(architectures=["GPT2LMHeadModel"]), r"architectures in config.json is \['GPT2LMHeadModel'\]"),
        (config(hidden_size="wide"), "config.json is refused by GalleryTransformerXLForCausalLM"),
        (config(vocab_size=263), r"has the shape \(262, 30\) in the weights, and \(263, 30\) by config.json"),
        (holding("generation_config.json", "[1]"), "generation_config.json holds no JSON object"),
        (missing("model.safetensors"), "model.safetensors is missing"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged"),
        (
            without("model.layers.1.self_attn.o_proj.weight"),
            "layers.1.self_attn.o_proj.weight is missing in the weights",
        ),
        (tensors(lambda found: {"x": torch.zeros(1)}), r"is missing in the weights\n  \.\.\. and so \d+ more"),
        (index({"a": "model-00001-of-00001.safetensors"}), "model-00001-of-00001.safetensors is missing"),
        (index({"a": "../model.safetensors"}), "names the file '../model.safetensors'; it must be the plain name"),
        (index({"a": "/model.safetensors"}), "names the file '/model.safetensors'"),
        (index({"a": "weights.bin"}), "names the file 'weights.bin'"),
        (index({"a": ["model.safetensors"]}), r"names the file \['model.safetensors'\]"),
        (index(["model.safetensors"]), "has no weight_map of names to files"),
        (index({}), "has no weight_map of names to files"),
        (missing("modeling_transformer_xl.py"), "modeling_transformer_xl.py is missing, which auto_map needs"),
        (missing("rows.py"), "rows.py is missing, which [a-z_]+.py needs"),
        (holding("rows.py", "def rows(:\n"), "rows.py is no Python: invalid syntax"),
        (lambda folder: (folder / "rows.py").write_bytes(b"\xff"), "rows.py is no Python: 'utf-8' codec"),
        (missing("tokenizer.json"), "the tokenizer does not load"),
        (lambda folder: cut(folder / "tokenizer.json"), "the tokenizer does not load"),
        (holding("README.md", "---\nlicense: [\n---\n"), "README.md has metadata"),
    ],
)
def test_an_incomplete_folder(online, saved, damage, said):
    """Is refused before anything is sent."""
    damage(saved)
    with pytest.raises(ValueError, match=said):
        push(saved, "user/name")
    assert not online.asked


def test_code_that_was_changed_makes_another_model(saved):
    """Its weights cannot be judged by the library's code."""
    without("model.layers.1.self_attn.o_proj.weight")(saved)
    with pytest.raises(ValueError, match="o_proj"):
        check_checkpoint(saved)
    path = saved / "modeling_transformer_xl.py"
    path.write_text(path.read_text() + "# without a map of the heads\n")
    assert check_checkpoint(saved).name == "transformer_xl"


@pytest.mark.parametrize("name", NAMES)
def test_whole_folders(tmp_path, name):
    """Under every head, in one file or in shards, tied weights saved once."""
    variant = TINY[name]
    for head in variant.heads:
        for size in ("1GB", "20KB"):
            folder = tmp_path / head / size
            variant.make(head).save_pretrained(folder, max_shard_size=size)
            assert check_checkpoint(folder).name == name


def test_a_folder_of_something_else(online, tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        push(tmp_path / "nothing", "user/name")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="'gpt2'.*gallery_transformer_xl"):
        push(tmp_path, "user/name")
    assert not online.asked


@pytest.mark.parametrize("step", ["create", "preupload", "batch", "upload", "verify", "commit"])
def test_a_broken_upload(online, saved, step):
    """Leaves no commit; the next try makes it whole."""
    before = content(saved)
    online.break_at(step, status=400)
    with pytest.raises(RuntimeError, match="user/name got no commit, the upload failed.*Run it again") as caught:
        push(saved, "user/name")
    assert "\n" not in str(caught.value) and f"told to fail at {step}" in str(caught.value)
    assert content(saved) == before
    if step != "create":
        assert online.files("user/name") == {} and online.repos["user/name"].messages == ["initial commit"]
    push(saved, "user/name")
    assert online.files("user/name")["model.safetensors"] == before[Path("model.safetensors")]


def test_a_broken_upload_leaves_the_last_commit(online, saved):
    push(saved, "user/name")
    before = online.files("user/name")
    model = TINY["transformer_xl"].make("causal", vocab_size=262, seed=1)
    model.save_pretrained(saved)
    online.break_at("commit", status=403)
    with pytest.raises(RuntimeError, match="got no commit"):
        push(saved, "user/name")
    assert online.files("user/name") == before


def test_a_hub_that_is_not_there(online, saved):
    online.__exit__()
    with pytest.raises(RuntimeError, match="user/name got no commit"):
        push(saved, "user/name")


def test_offline(hub, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE"):
        push(saved, "user/name")
    assert not hub.asked


# ---- downloads that break


@pytest.fixture
def published(online, saved, tmp_path, monkeypatch):
    """A gallery model and a GPT-2 on the server; the client keeps what it fetches in a folder of the test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    place = f"{online.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    push(saved, "user/model")
    sizes = dict(vocab_size=97, n_positions=32, n_embd=12, n_layer=2, n_head=2, bos_token_id=94, eos_token_id=95)
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    api = huggingface_hub.HfApi()
    api.create_repo("user/gpt2")
    api.upload_folder(folder_path=tmp_path / "gpt2", repo_id="user/gpt2")
    return online


@pytest.mark.parametrize("revision", [None, "main"])
def test_commands_take_a_repository(published, saved, tmp_path, monkeypatch, revision):
    """generate, eval and train give what they give on the folder that was pushed."""
    more = [] if revision is None else ["--revision", revision]
    asked = []
    monkeypatch.setattr("hf_gallery.harness.main", lambda argv: asked.append(argv) or 0)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text("It was the best of times, it was the worst of times. " * 3)
    said = []
    for place, options in ((str(saved), []), ("user/model", more)):
        out = tmp_path / f"out{len(said)}"
        sizes = ["--steps=2", "--lanes=2", "--length=32", "--device=cpu", "--corpus", str(texts)]
        done = [
            CliRunner().invoke(app, ["generate", place, "It was", "--max-new-tokens=7", "--device=cpu", *options]),
            CliRunner().invoke(app, ["train", place, str(out), *sizes, *options]),
            CliRunner().invoke(app, ["eval", place, *options]),
        ]
        assert [run.exit_code for run in done] == [0, 0, 0], [run.output for run in done]
        said.append((done[0].stdout, {k: x for k, x in json.loads(done[1].stdout).items() if k != "folder"}))
    assert said[0] == said[1]
    assert json.loads(asked[1][1]) == {"pretrained": "user/model"} | ({"revision": revision} if revision else {})


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("user/nothing", "'user/nothing' is no folder here, and no model that the Hub could give: "),
        (
            "user/gpt2",
            "user/gpt2 holds a gpt2, which is no model of the gallery; .*`hf-gallery convert user/gpt2 OUT`",
        ),
    ],
)
def test_a_repository_without_a_model(published, tmp_path, place, said):
    for line in (["generate", place, "x"], ["eval", place], ["train", place, str(tmp_path / "out")]):
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 1 and not done.stdout
        assert len(done.stderr.splitlines()) == 1
        with pytest.raises(ValueError, match=said):
            raise ValueError(done.stderr)


def fetched(folder, name):
    return [path for path in folder.rglob(name) if path.exists()]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "attention.py"])
def test_opening_after_a_cut_download(published, saved, tmp_path, name):
    """Says what arrived, leaves no part of the file where it would be opened, and works on the next try."""

    repo = f"user/{name.split('.')[0]}"  # of its own, or its code would be there from the test before
    push(saved, repo)

    def open_it():  # by the code on the server, as one does who has not the library
        kind = json.loads((saved / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
        return get_class_from_dynamic_module(kind, repo).from_pretrained(repo).eval()

    published.cut(name, "short")
    with pytest.raises(OSError, match="should be of size"):
        open_it()
    assert not fetched(tmp_path / "cache", name)
    assert published.cuts[0]["times"] == 0
    ids = words(2, 13)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(saved).eval()(ids).logits
        assert_equal(open_it()(ids).logits, expected)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_converting_after_a_cut_download(published, tmp_path, name):
    """Writes nothing, and works on the next try."""
    out = tmp_path / "converted" / "gpt2"
    published.cut(name, "short")
    with pytest.raises(OSError, match="should be of size"):
        convert("user/gpt2", out)
    assert not out.parent.exists()
    convert("user/gpt2", out)
    ids = words(2, 13)
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()(ids).logits
        assert_equal(AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits, expected)


def test_a_dropped_connection_is_taken_up_again(published, saved, tmp_path):
    published.cut("model.safetensors", "dropped")
    AutoModelForCausalLM.from_pretrained("user/model")
    assert published.cuts[0]["times"] == 0
    (path,) = fetched(tmp_path / "cache", "model.safetensors")
    assert path.read_bytes() == (saved / "model.safetensors").read_bytes()
