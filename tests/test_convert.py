"""Conversion as such: which files are read and which refused, what is said of tensors that do not fit, and that all or
nothing is written. The checkpoints are small Transformer-XLs made by transformers 4.35.2, see golden/.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_gallery.convert
from hf_gallery.convert import FORMATS, convert

GOLDEN = Path(__file__).parent / "golden" / "transformer_xl"
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
    refused("has no option segment_lenght; it has segment_length", segment_lenght=3)
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
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(r"names the shard 'gone\.safetensors', which is not in")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../source/config.json"}}')
    refused("names the shard 'config.json', which is not in")
    in_shards(source, "model.safetensors", lambda tensors, path: save_file({"a": torch.ones(1)}, path))(
        {"a": 0, "b": 0}
    )
    refused("holds a twice")


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
    assert convert(source, out) == out and (out / "config.json").exists()
    before = {path: path.read_bytes() for path in out.iterdir()}
    for taken in (out, source / "config.json"):
        with pytest.raises(ValueError, match=r"holds something already; give a folder that is empty or not there"):
            convert(source, taken)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_conversion_that_fails_leaves_nothing(source, tmp_path, monkeypatch):
    """Not even when the disk is full half way, and an empty folder that was there stays."""
    from hf_gallery.models.modeling_base import GalleryPreTrainedModel

    def half(self, folder, **kwargs):
        Path(folder).mkdir()
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(GalleryPreTrainedModel, "save_pretrained", half)
    with pytest.raises(OSError, match="no space left"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert not any((tmp_path / "out").iterdir())


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


@pytest.mark.skipif(sys.platform != "linux", reason="counts a process's memory as Linux does")
@pytest.mark.parametrize("kind", ["safetensors", "torch file of old"])
def test_memory_is_at_most_twice_the_checkpoint(kind, tmp_path):
    """In a process of its own: pages of the mapped file are counted too."""
    width, inner, layers, words = 768, 3072, 3, 16000
    config = json.loads((GOLDEN / "plain" / "config.json").read_text())
    config |= dict(vocab_size=words, d_model=width, d_embed=width, n_head=12, d_head=64, d_inner=inner)
    config |= dict(n_layer=layers, untie_r=True)
    small, g = load_file(GOLDEN / "plain" / "model.safetensors"), torch.Generator().manual_seed(0)
    sizes = {97: words, 16: width, 36: 3 * width, 12: width, 20: inner, 8: width // 2}
    tensors = {
        name.replace("transformer.layers.0", f"transformer.layers.{i}"): torch.rand(
            [sizes[n] for n in x.shape], generator=g
        )
        for i in range(layers)
        for name, x in small.items()
        if "layers.1." not in name and ".r_w_bias" not in name and ".r_r_bias" not in name
    }
    for i in range(layers):
        for name in ("r_w_bias", "r_r_bias"):
            tensors[f"transformer.layers.{i}.dec_attn.{name}"] = torch.rand(12, 64, generator=g)
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
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.5 * size < int(done.stdout) < 2.2 * size


# ------------------------------------------------------------------------------------------------------------- formats


def test_formats_say_what_they_are():
    names = [form.name for form in FORMATS]
    assert len(set(names)) == len(names) and all(form.targets for form in FORMATS)
