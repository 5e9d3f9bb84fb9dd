"""Sizes that cannot be meant, in configurations and in files from outside, are refused before anything is built."""

import json
import re
import resource
import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    MarianConfig,
    MarianMTModel,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from variants import VARIANTS, assert_equal, over, runner, words

from hf_gallery.convert import convert
from hf_gallery.variants import VARIANTS as ARCHITECTURES

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_xl" / "clamp"


@contextmanager
def cheap(seconds=20, megabytes=300):
    """Neither much time nor much memory is taken inside."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


COUNTS = {
    "num_hidden_layers": 10**9,
    "vocab_size": 10**12,
    "hidden_size": 10**12,
    "head_dim": 10**12,
    "num_attention_heads": 10**12,
    "intermediate_size": 10**12,
    "num_labels": 10**8,
    "embedding_size": 10**12,
    "div_val": 10**12,
    "segment_length": 10**12,
    "mem_len": 10**12,
    "memory_size": 10**15,
    "attention_window": 10**12,
    "attention_dilation": 10**12,
    "block_length": 10**12,
    "num_state_vectors": 10**12,
    "num_memory_tokens": 10**12,
    "num_positions": 10**12,
    "max_position_embeddings": 10**12,
    "position_offset": 10**12,
    "type_vocab_size": 10**12,
    "num_encoder_layers": 10**9,
    "num_decoder_layers": 10**9,
    "max_decoder_position_embeddings": 10**12,
}


def has(config, name):
    return name == "num_labels" or name in config.__dataclass_fields__


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_of_absurd_size(architecture, name):
    config = ARCHITECTURES[architecture].config
    if not has(config, name):
        pytest.skip(f"{config.__name__} has no {name}")
    fixed = {"num_attention_heads": 1} if name == "hidden_size" else {}
    with cheap(), pytest.raises(ValueError, match=f"{name} (is )?.*{COUNTS[name]}"):
        config(**fixed | {name: COUNTS[name]})


@pytest.mark.parametrize("value", ["3", [3], {}, 2.0, None, True, -1], ids=repr)
@pytest.mark.parametrize(
    "name", ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_labels"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_count_of_another_type(architecture, name, value):
    """Names the field, whatever else would be computed of it first."""
    if name == "num_labels" and value in (None, True):
        pytest.skip("None is transformers' own default, and True counts as 1 there")
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(repr(value))}"):
        ARCHITECTURES[architecture].config(**{name: value})


def test_every_count_is_tried():
    """A new field that is a whole number, and is no id and no special sign, is among those above."""
    # Bounded by memory_size; distances, of which nothing is made; ids within the vocabulary.
    known = {*COUNTS, "memory_topk", "clamp_len", "bptt_depth", "cutoffs"}
    for architecture in ARCHITECTURES.values():
        for kind in architecture.config.__mro__:
            if kind.__name__.startswith("Gallery"):
                for name, said in kind.__dict__.get("__annotations__", {}).items():
                    assert "int" not in str(said) or name in known or name.endswith(("_token_id", "_layers")), name


def described(folder, **changes):
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | changes))


PLAIN = [v.name for v in VARIANTS if not v.needs]


@over(lambda variant, head: variant.name in PLAIN and variant.limit is None)
@pytest.mark.parametrize("remote", [False, True], ids=["package", "remote"])
def test_weights_that_are_not_the_configs(variant, head, remote, tmp_path):
    """Fields within all bounds, of another model than that whose weights lie beside: told by name and shape, and no
    memory is taken for them. Asked to, they are drawn anew as in transformers."""
    kind = variant.heads[head].kind
    variant.make(head).save_pretrained(tmp_path)
    if remote:
        kind = get_class_from_dynamic_module(f"{kind.__module__.split('.')[-1]}.{kind.__name__}", str(tmp_path))
    kept = (tmp_path / "config.json").read_text()
    for name, value in (("vocab_size", 2**24), ("intermediate_size", 2**24)):
        described(tmp_path, **{name: value})
        with (
            cheap(),
            pytest.raises(ValueError, match=r"has the shape \(.*\) in the weights, and .*16777\d{3}.* by the config"),
        ):
            kind.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(kept)
    described(tmp_path, intermediate_size=43)
    opened = kind.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert opened.config.intermediate_size == 43


@pytest.mark.parametrize("zipped", [True, False], ids=["torch", "torch before 1.6"])
def test_torch_files_that_are_not_the_configs(zipped, tmp_path):
    """Of them shapes are read too, and no memory is taken for what they do not hold."""
    model = next(v for v in VARIANTS if v.limit and "causal" in v.heads).make("causal")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state, path = model.state_dict(), tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    kept = (tmp_path / "config.json").read_text()
    for name, said in (("vocab_size", "embed_tokens.weight has"), ("type_vocab_size", "503,[0-9,]* weights beside")):
        described(tmp_path, **{name: 2**24})
        with cheap(), pytest.raises(ValueError, match=said):
            type(model).from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(kept)
    opened = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert_equal(opened(words(1, 9)).logits, model(words(1, 9)).logits)
    wide = torch.zeros(1).expand(2**24, 30)
    torch.save(state | {"model.stack.embed_tokens.weight": wide}, path, _use_new_zipfile_serialization=zipped)
    described(tmp_path, vocab_size=2**24)
    with cheap(), pytest.raises(ValueError, match="embed_tokens.weight, which is no plain tensor"):
        type(model).from_pretrained(tmp_path)


def test_layers_that_no_file_holds(tmp_path):
    """Some more than there are may be meant; thousands of times as many weights as there are may not."""
    run = runner(next(v for v in VARIANTS if v.name == "transformer"), "causal")
    run.model.save_pretrained(tmp_path)
    kind = type(run.model)
    assert kind.from_pretrained(tmp_path, num_hidden_layers=5).config.num_hidden_layers == 5
    described(tmp_path, num_hidden_layers=900)
    tensors = load_file(tmp_path / "model.safetensors")
    wide = {name: x for name, x in tensors.items() if ".layers." not in name}
    save_file(wide, tmp_path / "model.safetensors", {"format": "pt"})
    described(tmp_path, intermediate_size=2**16)
    with cheap(), pytest.raises(ValueError, match="the config describes a model with .* weights beside the "):
        kind.from_pretrained(tmp_path)


@over(lambda variant, head: variant.name in PLAIN)
def test_whole_folders_open(variant, head, tmp_path):
    """Under every head, and as the bare model: what a file holds more or less than that is no fault."""
    run = runner(variant, head)
    run.model.save_pretrained(tmp_path)
    for other in (h for h in variant.heads.values() if h.source == run.head.source or h.auto == "AutoModel"):
        kind = other.kind
        opened = kind.from_pretrained(tmp_path, config=AutoConfig.from_pretrained(tmp_path))
        if kind is type(run.model) and other.settings == run.head.settings:
            ids = words(2, 9)
            with torch.no_grad():
                assert_equal(variant_result(opened, run, ids), variant_result(run.model, run, ids))


def variant_result(model, run, ids):
    output = model.eval()(**run.inputs(ids))
    return output[next(name for name in ("last_hidden_state", "logits", "start_logits") if name in output)]


# ---- published checkpoints

TINY = dict(vocab_size=50, bos_token_id=0, eos_token_id=2, pad_token_id=1)
BERT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **TINY)
SEQ2SEQ = dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
SEQ2SEQ |= dict(encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=2, **TINY)
SOURCES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **TINY)),
    "bert": lambda: BertForMaskedLM(BertConfig(**BERT, max_position_embeddings=66)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**BERT, max_position_embeddings=66)),
    "longformer": lambda: LongformerForMaskedLM(
        LongformerConfig(**BERT, attention_window=8, max_position_embeddings=66)
    ),
    "marian": lambda: MarianMTModel(
        MarianConfig(
            **TINY | dict(pad_token_id=49, decoder_start_token_id=49), d_model=16, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
            max_position_embeddings=40,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SEQ2SEQ, max_position_embeddings=40)),
    "led": lambda: LEDForConditionalGeneration(
        LEDConfig(
            **SEQ2SEQ, max_encoder_position_embeddings=40, max_decoder_position_embeddings=40, attention_window=8
        )
    ),
    "transfo-xl": None,
}  # fmt: skip
THEIRS = {
    "gpt2": ("n_layer", "n_embd", "n_head", "n_positions", "n_inner", "vocab_size", "num_labels"),
    "bert": (*BERT, "max_position_embeddings", "type_vocab_size", "num_labels"),
    "roberta": (*BERT, "max_position_embeddings", "type_vocab_size", "num_labels"),
    "longformer": (*BERT, "max_position_embeddings", "attention_window", "num_labels"),
    "marian": ("encoder_layers", "decoder_layers", "d_model", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"),
    "bart": ("encoder_layers", "decoder_layers", "d_model", "max_position_embeddings", "encoder_attention_heads"),
    "led": ("encoder_layers", "d_model", "max_encoder_position_embeddings", "max_decoder_position_embeddings"),
    "transfo-xl": ("n_layer", "d_model", "d_embed", "n_head", "d_head", "d_inner", "vocab_size", "mem_len", "div_val"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of each kind of checkpoint."""
    folders = {}
    for name, make in SOURCES.items():
        folders[name] = tmp_path_factory.mktemp("sources") / name
        if make is None:
            shutil.copytree(GOLDEN, folders[name])
        else:
            make().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("value", [10**9, 1e9, 10**12, 10**30, float("inf"), float("nan")])
@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in THEIRS.items() for n in names if "token" not in n])
def test_a_source_of_absurd_size(sources, tmp_path, kind, name, value):
    shutil.copytree(sources[kind], tmp_path / "source")
    described(tmp_path / "source", **{name: value})
    said = "mem_len|segment_length" if name == "mem_len" else name  # as long, where the config has no tgt_len
    with cheap(), pytest.raises(ValueError, match=said):
        convert(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_as_they_were(sources, tmp_path, kind):
    assert convert(sources[kind], tmp_path / "out").is_dir()


def test_one_number_in_a_million_places(tmp_path):
    """A torch file may say that a storage of one number is a table of any size; a copy would be."""
    SOURCES["gpt2"]().save_pretrained(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "model.safetensors").unlink()
    state["transformer.wte.weight"] = torch.zeros(1).expand(10**12, 16)
    torch.save(state, tmp_path / "source" / "pytorch_model.bin")
    described(tmp_path / "source", vocab_size=10**12)
    with cheap(), pytest.raises(ValueError, match="transformer.wte.weight, which is no plain tensor"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_config_of_ten_gigabytes(sources, tmp_path):
    shutil.copytree(sources["gpt2"], tmp_path / "source")
    with open(tmp_path / "source" / "config.json", "ab") as file:
        file.truncate(10 * 2**30)
    with cheap(), pytest.raises(ValueError, match="config.json has 10,737,418,240 bytes"):
        convert(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("by_auto", [True, False], ids=["AutoModel", "class"])
def test_wrong_weights_are_the_error_that_transformers_has(by_auto, tmp_path):
    """A RuntimeError, which tools catch, and a ValueError, as all that does not fit."""
    model = next(v for v in VARIANTS if "sequence" in v.heads).make("sequence")
    model.save_pretrained(tmp_path)
    kind = AutoModelForSequenceClassification if by_auto else type(model)
    for error in (RuntimeError, ValueError):
        with pytest.raises(error, match="classifier.weight has the shape"):
            kind.from_pretrained(tmp_path, num_labels=42)
    assert kind.from_pretrained(tmp_path, num_labels=42, ignore_mismatched_sizes=True).classifier.out_features == 42
