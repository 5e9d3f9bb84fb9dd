"""Conversion as such: which files are read and which refused, what is said of tensors that do not fit, and that all or
nothing is written. The checkpoints are small Transformer-XLs made by transformers 4.35.2, see golden/.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hf_gallery.convert
from hf_gallery.convert import FORMATS, check_settings, convert
from hf_gallery.convert.checkpoint import Tensors

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_xl"
CASE = "clamp"  # in safetensors, with tied tables and projections


@pytest.fixture
def source(tmp_path):
    """A folder to convert, and change before."""
    shutil.copytree(GOLDEN / CASE, tmp_path / "source")
    (tmp_path / "source" / "outputs.safetensors").unlink()
    return tmp_path / "source"


def tensors_of(source):
    return load_file(source / "model.safetensors")


def rewrite(source, write):
    """Replaces the folder's weights by what write(tensors) leaves there."""
    tensors = tensors_of(source)
    (source / "model.safetensors").unlink()
    write(tensors)


def weights(folder):
    return load_file(folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------- kinds of file


def in_shards(source, name, write):
    """Two files with an index, as transformers writes large checkpoints."""

    def split(tensors):
        names, places = sorted(tensors), {}
        stem, suffix = name.rsplit(".", 1)
        for i, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"{stem}-0000{i}-of-00002.{suffix}"
            write({x: tensors[x] for x in part}, source / file)
            places |= dict.fromkeys(part, file)
        (source / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return split


KINDS = {
    "safetensors in shards": lambda source: in_shards(source, "model.safetensors", save_file),
    "torch file": lambda source: lambda tensors: torch.save(tensors, source / "pytorch_model.bin"),
    "torch file of old": lambda source: (
        lambda tensors: torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ),
    "torch file of parameters": lambda source: (
        lambda tensors: torch.save(
            {name: torch.nn.Parameter(x) for name, x in tensors.items()}, source / "pytorch_model.bin"
        )
    ),
    "torch files in shards": lambda source: in_shards(source, "pytorch_model.bin", torch.save),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same(kind, source, tmp_path):
    expected = weights(convert(source, tmp_path / "expected"))
    rewrite(source, KINDS[kind](source))
    got = weights(convert(source, tmp_path / "converted"))
    assert got.keys() == expected.keys() and all(torch.equal(got[x], expected[x]) for x in got)


def test_the_result_is_what_save_pretrained_writes(source, tmp_path):
    """It opens, is tied, and converting again gives the same bytes."""
    folder = convert(str(source), str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "generation_config.json", "modeling_transformer_xl.py"} <= files
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weights[0] is model.model.embed_tokens.tables[0].weight
    again = convert(source, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gallery_transformer_xl"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda name, x: x.half(), torch.float16),
        (lambda name, x: x.bfloat16(), torch.bfloat16),
        (lambda name, x: x.half() if "layers.0" in name else x.double(), torch.float64),
        (lambda name, x: x.half() if "layers.0" in name else x.bfloat16(), torch.float32),
    ],
    ids=["half", "bfloat16", "half and double", "half and bfloat16"],
)
def test_types(change, expected, source, tmp_path):
    """A type stays; of several, the smallest that holds all of them is taken."""
    before = tensors_of(source)
    rewrite(
        source, lambda tensors: save_file({k: change(k, x) for k, x in tensors.items()}, source / "model.safetensors")
    )
    after = weights(convert(source, tmp_path / "converted"))
    assert {x.dtype for x in after.values()} == {expected}
    name = "layers.0.dec_attn.o_net.weight"
    published = change(name, before[f"transformer.{name}"])
    assert torch.equal(after["model.layers.0.self_attn.o_proj.weight"], published.to(expected))
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------- what does not fit


def test_all_problems_are_listed(source, tmp_path):
    """Missing, unknown and mis-shaped tensors, and those that hold no numbers, in one error; nothing is written."""

    def write(tensors):
        del tensors["transformer.layers.0.dec_attn.r_net.weight"]
        tensors["transformer.layers.0.dec_attn.o_net.weight"] = torch.zeros(16, 13)
        tensors["transformer.layers.1.dec_attn.qkv_net.weight"] = torch.zeros(37, 16)
        tensors["transformer.layers.1.pos_ff.CoreNet.0.bias"] = torch.zeros(20, dtype=torch.int8)
        tensors["transformer.layers.2.extra"] = torch.zeros(3)
        save_file(tensors, source / "model.safetensors")

    rewrite(source, write)
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "converted")
    for line in (
        "does not fit GalleryTransformerXLForCausalLM",
        "missing transformer.layers.0.dec_attn.r_net.weight, for model.layers.0.self_attn.r_proj.weight",
        "transformer.layers.0.dec_attn.o_net.weight (16, 13) makes (16, 13), but "
        "model.layers.0.self_attn.o_proj.weight is (16, 12)",
        "transformer.layers.1.dec_attn.qkv_net.weight (37, 16) makes (13, 16), but",
        "transformer.layers.1.pos_ff.CoreNet.0.bias does not hold floating-point numbers",
        "unknown transformer.layers.2.extra (3,)",
    ):
        assert line in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_tied_weights_that_differ(kind, source, tmp_path):
    """A torch file holds both of two that are one; where they are not, the result could not have both."""

    def write(tensors):
        tensors["crit.out_layers.1.weight"] = tensors["transformer.word_emb.emb_layers.1.weight"].clone()
        tensors["crit.out_layers.1.weight"][5, 3] += 1e-3
        if kind == "safetensors":
            save_file(tensors, source / "model.safetensors")
        else:
            torch.save(tensors, source / "pytorch_model.bin")

    rewrite(source, write)
    with pytest.raises(ValueError, match=r"crit\.out_layers\.1\.weight and .*emb_layers\.1\.weight differ"):
        convert(source, tmp_path / "converted")


def test_what_cannot_be_recognised(source, tmp_path):
    def refused(message, source=source, **options):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "converted", **options)
        assert not (tmp_path / "converted").exists()

    refused("to is 'longformer'; a Transformer-XL checkpoint can become transformer_xl", to="longformer")
    refused("has no option segment_lenght; did you mean segment_length[?] It has segment_length", segment_lenght=3)
    refused("revision is 'main', but .* is a local folder", revision="main")
    refused("must be a local folder or the id", source=tmp_path / "nowhere")
    refused("must be a local folder or the id", source=source / "config.json")
    (source / "config.json").write_text('{"model_type": "swin"}')
    refused("gives model_type 'swin'; there are Transformer-XL")
    (source / "config.json").write_text("{")
    refused(r"config\.json is no JSON file")
    (source / "config.json").write_text("[1]")
    refused(r"config\.json holds a JSON list")


def test_files_that_are_damaged_or_absent(source, tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "converted")

    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-100])
    refused(r"model\.safetensors is no safetensors file, or is damaged")
    (source / "model.safetensors").unlink()
    refused("holds no weights; one of model.safetensors, .*pytorch_model.bin")
    for content in (b"nothing", b"", b"PK\x03\x04 a zip file, says its head"):
        (source / "pytorch_model.bin").write_bytes(content)
        refused(r"pytorch_model\.bin (is no torch file, or is damaged|holds objects other than tensors)")
    torch.save([torch.ones(3)], source / "pytorch_model.bin")
    refused("holds no state_dict, a dictionary of names to tensors")
    (source / "pytorch_model.bin").unlink()
    in_shards(source, "model.safetensors", lambda tensors, path: save_file({"a": torch.ones(1)}, path))(
        {"a": 0, "b": 0}
    )
    refused("holds a twice")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": None}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ({"weight_map": {"a": 3}}, "has no weight_map"),
        ({"weight_map": {"a": None}}, "has no weight_map"),
        *(
            ({"weight_map": {"a": name}}, f"names the shard {name!r}, which is not in")
            for name in ("gone.safetensors", "../source/config.json", "", ".", "..", "/etc/hosts", "a/../config.json")
        ),
    ],
    ids=str,
)
def test_an_index_that_is_none(content, message, source, tmp_path):
    """It says which files are read, so it must name files of the folder and no others."""
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json .*fetch the source's files again") as error:
        convert(source, tmp_path / "converted")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {0: torch.ones(3)}, "holds no state_dict"),
        (lambda tensors: {("a", "b"): torch.ones(3)}, "holds no state_dict"),
        (lambda tensors: tensors | {"more": torch.ones(3, 3).to_sparse()}, "holds more, which is no plain tensor"),
        (lambda tensors: tensors | {"more": torch.empty(3, device="meta")}, "holds more, which is no plain tensor"),
        (
            lambda tensors: tensors | {"crit.out_layers.0.weight": torch.tensor(3.0)},
            r"crit\.out_layers\.0\.weight and .* differ",
        ),
        (lambda tensors: dict.fromkeys(tensors, torch.tensor(3.0)), r"\(\) cannot make .*q_proj\.weight"),
    ],
    ids=["a number for a name", "a pair for a name", "sparse", "without values", "a number", "nothing but numbers"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch checks no invariants of sparse tensors unless told
def test_a_torch_file_of_other_things(change, message, source, tmp_path):
    rewrite(source, lambda tensors: torch.save(change(tensors), source / "pytorch_model.bin"))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "converted")


def damaged(content, seed):
    """The bytes cut short, changed, or moved by some that are lost or that came in; mostly where structure is."""
    random = Random(seed)
    content, place = bytearray(content), random.randrange(min(len(content), 3000))
    kind = random.choice(["cut", "changed", "changed at the end", "lost", "more"])
    if kind == "cut":
        return bytes(content[: random.randrange(len(content))])
    if kind == "lost":
        del content[place : place + random.choice([1, 8, 100])]
    elif kind == "more":
        content[place:place] = random.randbytes(random.choice([1, 8]))
    else:
        for _ in range(random.choice([1, 3, 20])):
            place = random.randrange(min(len(content), 3000))
            content[place if kind == "changed" else -1 - place] = random.randrange(256)
    return bytes(content)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of versions that the bytes seem to say
@pytest.mark.parametrize("kind", ["safetensors", *(kind for kind in KINDS if "shards" not in kind)])
def test_a_damaged_file_is_named(kind, source):
    """Wherever the damage is: it can be read, or a ValueError says which file it is."""
    if kind in KINDS:
        rewrite(source, KINDS[kind](source))
    (file,) = (path for path in source.iterdir() if path.name != "config.json")
    whole, failed = file.read_bytes(), 0
    for seed in range(100):
        file.write_bytes(damaged(whole, seed))
        try:
            tensors = Tensors(source)
            for name in tensors:
                assert tensors.meta(name).shape == tensors[name].shape
        except ValueError as error:
            failed += 1
            assert str(file) in str(error) and len(str(error)) > len(str(file)) + 20
    assert failed > 50


# -------------------------------------------------------------------------------------------------------------- safety


class Call:
    """A pickle that calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("place", ["instead of a tensor", "beside the tensors", "as the file"])
def test_a_malicious_file_is_refused(place, old, source, tmp_path):
    """It asks for os.system; nothing is run, and nothing written."""
    marker = tmp_path / "marker"
    call = Call(os.system, f"touch {marker}")

    def write(tensors):
        name = "more" if place == "beside the tensors" else next(iter(tensors))
        content = call if place == "as the file" else tensors | {name: call}
        torch.save(content, source / "pytorch_model.bin", _use_new_zipfile_serialization=not old)

    rewrite(source, write)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds objects other than tensors.*not opened"):
        convert(source, tmp_path / "converted")
    assert not marker.exists() and not (tmp_path / "converted").exists()


def test_code_beside_the_weights_is_not_run(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')\n")
    folder = convert(source, tmp_path / "converted")
    assert not (tmp_path / "marker").exists() and not (folder / "code.py").exists()
    assert "code" not in json.dumps(json.loads((folder / "config.json").read_text())["auto_map"])


# ------------------------------------------------------------------------------------------------------ all or nothing


def test_out_must_be_empty(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    same = out.stat().st_ino
    assert convert(source, out) == out and (out / "config.json").exists()
    assert out.stat().st_ino == same and not [path for path in out.iterdir() if path.name.startswith(".")]
    before = {path: path.read_bytes() for path in out.iterdir()}
    for taken in (out, source / "config.json"):
        with pytest.raises(ValueError, match=r"holds something already; give a folder that is empty or not there"):
            convert(source, taken)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ValueError, match=r"cannot be made: .*config\.json is no folder"):
        convert(source, source / "config.json" / "out")


def test_the_current_folder_and_paths_from_it(source, tmp_path, monkeypatch):
    """A folder that is there stays the same folder, so that a shell that stands in it still does."""
    expected = weights(convert(source, tmp_path / "expected"))
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "here")
    assert convert(source, ".") == Path(".")
    monkeypatch.chdir(tmp_path)
    assert convert("source", "b/c") == Path("b/c")
    assert convert("source", "link") == Path("link")
    for folder in ("here", "b/c", "linked"):
        assert weights(Path(folder)).keys() == expected.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "expected", "here", "link", "linked", "source"]
    assert AutoModelForCausalLM.from_pretrained("here").config.model_type == "gallery_transformer_xl"


def test_a_conversion_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    """Not even when the disk is full half way, and an empty folder that was there stays."""
    from hf_gallery.models.modeling_base import GalleryPreTrainedModel

    def half(self, folder, **kwargs):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(GalleryPreTrainedModel, "save_pretrained", half)
    for out in ("out", "new", "newer/and/deeper", "out/deeper"):
        with pytest.raises(OSError, match="no space left"):
            convert(source, tmp_path / out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
        assert not any((tmp_path / "out").iterdir())


def test_a_folder_that_is_taken_meanwhile(source, tmp_path, monkeypatch):
    """A file that came there while the conversion worked is not written over."""
    made = hf_gallery.convert.carry_out
    (tmp_path / "out").mkdir()

    def slow(*arguments):
        (tmp_path / "out" / "config.json").write_text("mine")
        return made(*arguments)

    monkeypatch.setattr(hf_gallery.convert, "carry_out", slow)
    with pytest.raises(ValueError, match="holds something already"):
        convert(source, tmp_path / "out")
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_empty_folder_that_cannot_be_filled(source, tmp_path, monkeypatch):
    """The config is the last to come there, and what came before goes again."""
    (tmp_path / "out").mkdir()
    came, replace = [], os.replace

    def fails(path, target):
        came.append(Path(target).name)
        if came[-1] == "config.json":
            raise OSError("no space left on device")
        replace(path, target)

    monkeypatch.setattr(hf_gallery.convert.os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        convert(source, tmp_path / "out")
    assert "model.safetensors" in came and not any((tmp_path / "out").iterdir())


# ------------------------------------------------------------------------------------------------ settings and options


def test_settings_that_are_no_options():
    """Arguments of convert() itself cannot come among the options as well."""
    for name in ("source", "out", "to", "revision"):
        with pytest.raises(ValueError, match=f"{name} is no option of a format but an argument of the conversion"):
            check_settings({"segment_length": 4, name: "x"})
    check_settings({"segment_length": 4, "options": 3})


def test_options_are_not_hidden_by_the_formats_own_arguments(source, tmp_path):
    for name in ("self", "options"):
        with pytest.raises(ValueError, match=f"has no option {name}; it has segment_length"):
            convert(source, tmp_path / "converted", **{name: 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"generation_config\.json"),
        ("[1]", r"generation_config\.json holds a JSON list"),
        ('{"max_new_tokens": -1}', r"generation_config\.json are not what transformers takes: .*max_new_tokens"),
    ],
)
def test_settings_of_generate_that_are_none(content, message, source, tmp_path):
    (source / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_a_repository_on_the_hub(kind, source, tmp_path, monkeypatch):
    """Of all that is there, configs, tokenizer files and one kind of weights are fetched, at the revision."""
    if kind == "torch":
        rewrite(source, lambda tensors: torch.save(tensors, source / "pytorch_model.bin"))
    (source / "code.py").write_text("raise SystemExit\n")
    calls, cache = [], tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision))
        for pattern in allow_patterns:
            for path in source.glob(pattern):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(hf_gallery.convert, "snapshot_download", snapshot_download)
    folder = convert("someone/xl-wt103", tmp_path / "converted", revision="v1")
    assert set(calls) == {("someone/xl-wt103", "v1")} and (folder / "model.safetensors").exists()
    fetched = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}[kind]
    assert {path.name for path in cache.iterdir()} == {"config.json", fetched}


# -------------------------------------------------------------------------------------------------------------- memory

PEAK = r"""
import re, sys
from hf_gallery.convert import convert

def peak():  # since the process began: getrusage counts its parent's too
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024

before = peak()
convert(*sys.argv[1:])
print(peak() - before)
"""


WIDTH, INNER, LAYERS, WORDS = 768, 3072, 3, 16000


def large_transformer_xl():
    """A config, and tensors that fit it."""
    config = json.loads((GOLDEN / "plain" / "config.json").read_text())
    config |= dict(vocab_size=WORDS, d_model=WIDTH, d_embed=WIDTH, n_head=12, d_head=64, d_inner=INNER)
    config |= dict(n_layer=LAYERS, untie_r=True)
    sizes = {97: WORDS, 16: WIDTH, 36: 3 * WIDTH, 12: WIDTH, 20: INNER, 8: WIDTH // 2}
    shapes = {
        name.replace("transformer.layers.0", f"transformer.layers.{i}"): [sizes[n] for n in x.shape]
        for i in range(LAYERS)
        for name, x in load_file(GOLDEN / "plain" / "model.safetensors").items()
        if "layers.1." not in name and ".r_w_bias" not in name and ".r_r_bias" not in name
    }
    for i in range(LAYERS):
        for name in ("r_w_bias", "r_r_bias"):
            shapes[f"transformer.layers.{i}.dec_attn.{name}"] = [12, 64]
    return config, random_tensors(shapes)


def large_gpt2():
    """The same. Its maps are transposed on the way, so that they are in memory twice; with few words they are most of
    it."""
    sizes = dict(vocab_size=2000, n_positions=256, n_embd=WIDTH, n_layer=LAYERS + 2, n_head=12)
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    return config.to_dict() | dict(architectures=["GPT2LMHeadModel"]), random_tensors(
        {name: x.shape for name, x in model.state_dict().items() if name != "lm_head.weight"}
    )


def random_tensors(shapes):
    g = torch.Generator().manual_seed(0)
    return {name: torch.rand(tuple(shape), generator=g) for name, shape in shapes.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="counts a process's memory as Linux does")
@pytest.mark.parametrize(
    ("large", "kind"),
    [
        (large_transformer_xl, "safetensors"),
        (large_transformer_xl, "torch file of old"),
        (large_gpt2, "safetensors"),
    ],
    ids=["transformer_xl", "transformer_xl in a torch file of old", "gpt2"],
)
def test_memory_is_at_most_twice_the_checkpoint(large, kind, tmp_path):
    """In a process of its own: pages of the mapped file are counted too."""
    config, tensors = large()
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        save_file(tensors, source / "model.safetensors")
    else:
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    size = sum(x.nbytes for x in tensors.values())
    assert size > 120e6
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), str(tmp_path / "out")],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.5 * size < int(done.stdout) < 2.2 * size


# ------------------------------------------------------------------------------------------------------------- formats


def test_formats_say_what_they_are():
    names = [form.name for form in FORMATS]
    assert len(set(names)) == len(names) and all(form.targets for form in FORMATS)
