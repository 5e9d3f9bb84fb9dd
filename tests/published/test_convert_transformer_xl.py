"""Published Transformer-XL as gallery checkpoints: what transformers 4.35.2 gave, kept in golden/, comes out again.

golden/make_transformer_xl.py made it, and says what each case is about. So does make_transformer_xl_authors.py of what
the authors' own code gave, and plain/transformer_xl_authors.py computes what that gives for further models.
"""

import collections
import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from converted import converted, generates, obeys_the_laws, open_without_the_library
from plain import transformer_xl_authors as reference
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from variants import VOCAB, assert_equal, words

import hf_gallery as gallery
from hf_gallery.convert import convert
from hf_gallery.convert.checkpoint import Source
from hf_gallery.convert.transfo_xl_vocabulary import FILES, read_vocabulary, vocabulary_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_xl"
AUTHORS = GOLDEN.with_name("transformer_xl_authors")
# Every case has its folder here, so that one that is lost, or one that nobody runs, shows.
CASES = [
    "clamp", "div_1", "div_1_projected", "div_2", "div_2_same_length", "no_memory", "nothing_tied", "plain",
    "plain_projected", "plain_same_length", "pre_lnorm", "same_length", "wt103",
]  # fmt: skip
AUTHORS_CASES = [
    "clamp", "div_1", "div_1_projected", "div_2", "div_4", "no_memory", "plain", "plain_projected", "pre_lnorm",
    "same_length", "same_length_clamp",
]  # fmt: skip
SEGMENT, SEGMENTS, PROMPT = 8, 3, 7

golden_cases = pytest.mark.parametrize("case", CASES)


def opened(case, folder, **options):
    """The gallery's model of a case, and what was published of it."""
    kind = gallery.GalleryTransformerXLForCausalLM
    model = kind.from_pretrained(convert(GOLDEN / case, folder / "converted", **options)).eval()
    return model, load_file(GOLDEN / case / "outputs.safetensors")


# ------------------------------------------------------------------------------------------------- transformers' port


def test_the_cases_are_there():
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted([*CASES, "classifier", "vocabulary"])
    assert sorted(path.name for path in AUTHORS.iterdir()) == AUTHORS_CASES


@pytest.mark.parametrize("gradients", [False, True], ids=["inferring", "with gradients"])
@golden_cases
def test_segments_with_memory(case, gradients, tmp_path):
    """Log-probabilities, hidden states and losses of three segments, the memory carried; the last loss's gradient."""
    model, expected = opened(case, tmp_path, segment_length=SEGMENT)
    ids, labels, cache = expected["ids"], expected["labels"], None
    with torch.set_grad_enabled(gradients):
        for i in range(SEGMENTS):
            part = slice(i * SEGMENT, (i + 1) * SEGMENT)
            output = model(
                ids[:, part], past_key_values=cache, use_cache=True, labels=labels[:, part], output_hidden_states=True
            )
            cache = output.past_key_values
            assert_equal(output.logits.log_softmax(-1), expected[f"log_probabilities.{i}"], f"segment {i}")
            assert_equal(torch.stack(output.hidden_states), expected[f"hidden_states.{i}"], f"segment {i}")
            assert_equal(output.loss, expected[f"loss.{i}"], f"segment {i}")
    if gradients:
        output.loss.backward()
        attention = model.model.layers[0].self_attn
        got = torch.cat([getattr(attention, f"{x}_proj").weight.grad for x in "qkv"])
        assert_equal(got, expected["gradient"])
    else:
        whole = model(ids).logits.log_softmax(-1)
        assert_equal(whole, torch.cat([expected[f"log_probabilities.{i}"] for i in range(SEGMENTS)], dim=1))


@golden_cases
def test_greedy_continuation(case, tmp_path):
    """With same_length the segments do not matter; else the port decodes in segments of one token."""
    settings = json.loads((GOLDEN / case / "config.json").read_text())
    model, expected = opened(case, tmp_path, segment_length=SEGMENT if settings["same_length"] else 1)
    model.generation_config.eos_token_id = None
    tokens = model.generate(expected["ids"][:, :PROMPT], max_new_tokens=expected["greedy"].shape[1], do_sample=False)
    assert torch.equal(tokens[:, PROMPT:], expected["greedy"])


def test_classifier(tmp_path):
    folder = convert(GOLDEN / "classifier", tmp_path / "converted", segment_length=10)
    model = gallery.GalleryTransformerXLForSequenceClassification.from_pretrained(folder).eval()
    expected = load_file(GOLDEN / "classifier" / "outputs.safetensors")
    ids, mask = expected["ids"], (expected["ids"] != model.config.pad_token_id).long()
    output = model(ids, attention_mask=mask, labels=expected["labels"])
    assert_equal(output.logits, expected["logits"])
    assert_equal(output.loss, expected["loss"])


def test_bare_model(tmp_path):
    """A file without a head, whose names have no prefix."""
    source = tmp_path / "published"
    shutil.copytree(GOLDEN / "div_2", source)
    tensors = load_file(source / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items() if not name.startswith("crit")}
    save_file(tensors, source / "model.safetensors")
    folder = convert(source, tmp_path / "converted", segment_length=SEGMENT)
    model = gallery.GalleryTransformerXLModel.from_pretrained(folder).eval()
    expected = load_file(GOLDEN / "div_2" / "outputs.safetensors")
    assert_equal(model(expected["ids"][:, :SEGMENT]).last_hidden_state, expected["hidden_states.0"][-1])


def obedient(folder):
    """Laws 1 to 4, and what generate() needs, for a converted folder."""
    config = gallery.GalleryTransformerXLConfig.from_pretrained(folder)
    variant = converted(folder, horizon=config.segment_length + config.mem_len)
    obeys_the_laws(variant)
    if variant.head == "causal":
        generates(variant)


@pytest.mark.parametrize("case", ["wt103", "div_1", "div_2", "plain", "pre_lnorm", "classifier"])
def test_laws(case, tmp_path):
    obedient(convert(GOLDEN / case, tmp_path / case, segment_length=5))


@pytest.mark.parametrize("case", ["clamp", "div_4", "plain", "same_length"])
def test_laws_from_the_authors(case, tmp_path):
    """Memory that starts empty, and clusters in reverse order."""
    obedient(from_the_authors(case, tmp_path / case))


@pytest.mark.slow
def test_opens_without_the_library(tmp_path):
    folders = [convert(GOLDEN / case, tmp_path / case) for case in ("wt103", "plain", "classifier")]
    folders += [from_the_authors(case, tmp_path / f"authors_{case}") for case in ("div_1", "div_4")]
    open_without_the_library([converted(folder) for folder in folders], tmp_path)


@pytest.mark.parametrize("case", ["div_1_projected", "div_2"])
def test_any_name_of_a_shared_tensor_will_do(case, tmp_path):
    """Of those that are the same a safetensors file holds one: here the last that transformers has a name for."""
    source, layer = tmp_path / "published", "transformer.layers.1.dec_attn."
    shutil.copytree(GOLDEN / case, source)
    names = {"transformer.r_w_bias": f"{layer}r_w_bias", "transformer.r_r_bias": f"{layer}r_r_bias"}
    for i in range(3):
        names[f"transformer.word_emb.emb_layers.{i}.weight"] = f"crit.out_layers.{i}.weight"
        if i and case == "div_2":
            names[f"transformer.word_emb.emb_projs.{i}"] = f"crit.out_projs.{i}"
    tensors = load_file(source / "model.safetensors")
    moved = {names.get(name, name): x for name, x in tensors.items()}
    assert moved.keys() != tensors.keys()
    save_file(moved, source / "model.safetensors")
    folders = [convert(x, tmp_path / name) for x, name in ((GOLDEN / case, "a"), (source, "b"))]
    assert (folders[0] / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_segment_length(tmp_path):
    """Said, or that of the config's old tgt_len, or mem_len."""
    source = tmp_path / "published"
    shutil.copytree(GOLDEN / "wt103", source)

    def length(name, **options):
        folder = convert(source, tmp_path / name, **options)
        return gallery.GalleryTransformerXLConfig.from_pretrained(folder).segment_length

    assert length("a") == 20 and length("b", segment_length=3) == 3
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tgt_len": 128, "ext_len": 0}))
    assert length("c") == 128


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(attn_type=2), "attn_type is 2; the gallery has 0"),
        (dict(sample_softmax=5), "sample_softmax is 5"),
        (dict(clamp_len=None), "clamp_len is None; it must be a whole number"),
        (dict(clamp_len="far"), "clamp_len is 'far'; it must be a whole number"),
        (dict(d_embed="64"), "d_embed is '64'; it must be a whole number"),
        (dict(n_layer=True), "n_layer is True; it must be a whole number"),
        (dict(dropatt=None), "dropatt is None; it must be a number"),
        (dict(same_length=1), "same_length is 1; it must be True or False"),
        (dict(cutoffs=20), "cutoffs is 20; it must be a list of whole numbers"),
        (dict(cutoffs=[13, "29", 60]), r"cutoffs is \[13, '29', 60\]; it must be a list of whole numbers"),
        (dict(tie_projs=[0, 1, 1, 1]), r"tie_projs is \[0, 1, 1, 1\]; it must be a list of True and False"),
        (dict(tgt_len="128"), "tgt_len is '128'; it must be a whole number"),
        (dict(pad_token_id=[3]), r"pad_token_id is \[3\]; it must be a whole number"),
        (dict(eos_token_id="<eos>"), "eos_token_id is '<eos>'"),
        (dict(id2label=["yes"]), r"id2label is \['yes'\], which PreTrainedConfig does not take"),
        (dict(d_model=17), "hidden_size is 17"),
        (dict(n_layer=3), r"missing transformer\.layers\.2\.dec_attn\.qkv_net\.weight"),
        (dict(n_layer=1), r"unknown transformer\.layers\.1\.dec_attn\.qkv_net\.weight \(36, 16\)"),
        (dict(n_head=3), r"qkv_net\.weight \(36, 16\) makes \(12, 16\), but .*q_proj\.weight is \(18, 16\)"),
        (dict(untie_r=False), r"layers\.1\.dec_attn\.r_w_bias and transformer\.layers\.0\.dec_attn\.r_w_bias differ"),
        (
            dict(tie_projs=[True, True, True, True]),
            r"crit\.out_projs\.0 and transformer\.word_emb\.emb_projs\.0 differ",
        ),
    ],
)
def test_a_config_that_does_not_fit(settings, message, tmp_path):
    source = tmp_path / "published"
    shutil.copytree(GOLDEN / "wt103", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# ----------------------------------------------------------------------------------------------- the authors' model.pt

OTHERS = {  # weights of transformers' cases, and what they might have been trained with
    "div_2": dict(mem_len=5),
    "div_1": dict(mem_len=11, clamp_len=4, cutoffs=[20, 50]),
    "plain": dict(mem_len=6, same_length=True),
}


def from_the_authors(case, folder, **options):
    """The converted folder of one of the authors' cases."""
    told = json.loads((AUTHORS / case / "options.json").read_text())
    return convert(AUTHORS / case, folder, **told | options)


@pytest.mark.parametrize("case", AUTHORS_CASES)
@torch.no_grad()
def test_what_the_authors_code_gave(case, tmp_path):
    """Losses and hidden states of four segments, the memory carried, and of all in one forward; in the last segment
    the log-probability of every word, whatever its cluster."""
    model = gallery.GalleryTransformerXLForCausalLM.from_pretrained(from_the_authors(case, tmp_path / case)).eval()
    expected = load_file(AUTHORS / case / "outputs.safetensors")
    ids, length = expected["ids"], model.config.segment_length
    segments = ids.shape[1] // length
    assert (segments, ids.shape[1]) == (4, 4 * length + 1)
    whole, cache = model(ids[:, :-1]).logits.log_softmax(-1).split(length, dim=1), None
    for i in range(segments):
        part, target = (ids[:, i * length + k :][:, :length] for k in (0, 1))
        output = model(part, past_key_values=cache, use_cache=True, output_hidden_states=True)
        cache = output.past_key_values
        assert_equal(torch.stack(output.hidden_states), expected[f"hidden_states.{i}"], f"segment {i}")
        for logits in (output.logits.log_softmax(-1), whole[i]):
            nll = -logits.gather(-1, target[..., None])[..., 0]
            assert_equal(nll, expected[f"nll.{i}"], f"segment {i}")
    assert_equal(output.logits.log_softmax(-1), expected[f"log_probabilities.{i}"])


def model_pt(case, folder):
    """The weights of a case as the authors' train.py would save a state_dict."""
    tensors = load_file(GOLDEN / case / "model.safetensors")
    w = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    for i in range(3):  # safetensors keep one of two that are tied
        for ours, theirs in (
            ("crit.out_layers.{}.weight", "word_emb.emb_layers.{}.weight"),
            ("crit.out_projs.{}",) * 2,
        ):
            if theirs.format(i) in w:
                w.setdefault(ours.format(i), w[theirs.format(i)])
        if f"word_emb.emb_projs.{i}" in w:
            w.setdefault(f"crit.out_projs.{i}", w[f"word_emb.emb_projs.{i}"])
    folder.mkdir()
    torch.save(w | {"pos_emb.inv_freq": torch.ones(8)}, folder / "model.pt")
    return w


@pytest.mark.parametrize("case", OTHERS)
def test_the_authors_own_file(case, tmp_path):
    """Memory that starts empty, and clusters of the softmax's head in reverse order."""
    w = model_pt(case, tmp_path / "published")
    folder = convert(tmp_path / "published", tmp_path / "converted", segment_length=7, **OTHERS[case])
    model = gallery.GalleryTransformerXLForCausalLM.from_pretrained(folder).eval()
    ids, config = words(2, 21), reference.config_of(model.config)
    assert config.mem_len == OTHERS[case]["mem_len"] and config.vocab_size == VOCAB
    hidden, _ = reference.run(w, config, reference.embed(w, config, ids.T), 7)
    expected = reference.log_probabilities(w, config, hidden.transpose(0, 1).flatten(0, 1), "reversed")
    assert_equal(model(ids).logits.log_softmax(-1), expected.view(2, 21, -1))


def test_the_authors_file_tells_what_it_can(tmp_path):
    model_pt("div_2", tmp_path / "published")
    with pytest.raises(ValueError, match=r"segment_length \(tgt_len in the authors' code\) and mem_len"):
        convert(tmp_path / "published", tmp_path / "converted")
    model_pt("div_1", tmp_path / "one table")
    with pytest.raises(ValueError, match=r"cutoffs are None; .* a head of 2 tail clusters"):
        convert(tmp_path / "one table", tmp_path / "converted", segment_length=7, mem_len=5)
    torch.save({"weight": torch.ones(3)}, tmp_path / "one table" / "model.pt")
    with pytest.raises(ValueError, match=r"is not the authors' Transformer-XL: it has no word_emb"):
        convert(tmp_path / "one table", tmp_path / "converted", segment_length=7, mem_len=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cutoffs=20), "cutoffs is 20; it must be a list"),
        (dict(cutoffs=[20, 51]), r"cutoffs are \[20, 51\]; the embeddings in .* end at \[20, 50\]"),
        (dict(segment_length="7"), "segment_length is '7'"),
        (dict(segment_length=0), "segment_length is 0"),
        (dict(mem_len=1.5), r"mem_len is 1\.5"),
        (dict(clamp_len="far"), "clamp_len is 'far'"),
        (dict(same_length="yes"), "same_length is 'yes'"),
        (dict(eos_token_id="<eos>"), "eos_token_id is '<eos>'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_the_authors("div_2", tmp_path / "converted", **options)


@pytest.mark.parametrize(
    "name", ["word_emb.emb_layers.0.weight", "r_w_bias", "layers.0.pos_ff.CoreNet.0.weight", "crit.cluster_bias"]
)
def test_a_shape_that_tells_nothing(name, tmp_path):
    """Of the tensors from which the model's sizes are read."""
    tensors = torch.load(AUTHORS / "div_2" / "model.pt", weights_only=True)
    for wrong in (torch.tensor(3.0), torch.ones(2, 0), torch.ones(2, 2, 2)):
        torch.save(dict(tensors) | {name: wrong}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=rf"holds {name} of the shape .*; it must have [12] dimensions"):
            convert(tmp_path, tmp_path / "converted", segment_length=7, mem_len=5)


def test_a_pickled_module_is_refused(tmp_path):
    """As the authors' train.py writes it: it would run the code that it names."""
    (tmp_path / "published").mkdir()
    torch.save(torch.nn.Linear(3, 3), tmp_path / "published" / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt holds objects other than tensors.*save its state_dict\(\)"):
        convert(tmp_path / "published", tmp_path / "converted", segment_length=7, mem_len=5)


# ------------------------------------------------------------------------------------------------------ the vocabulary


def with_vocabulary(folder, name, content=None):
    """A folder of the wt103 case with a vocabulary file of that name."""
    shutil.copytree(GOLDEN / "wt103", folder)
    config = json.loads((folder / "config.json").read_text())
    if content is None:
        shutil.copy(GOLDEN / "vocabulary" / name, folder)
    else:
        (folder / name).write_bytes(content)
    return config


@pytest.mark.parametrize("name", FILES)
def test_vocabulary_files(name):
    """A pickled tokenizer of 4.35.2, a torch file of old, and plain text hold the same words."""
    symbols, _ = read_vocabulary(GOLDEN / "vocabulary" / name)
    assert symbols == (GOLDEN / "vocabulary" / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert symbols[:3] == ["<eos>", "<unk>", "<formula>"] and len(symbols) > 150


def test_a_line_ends_with_a_line_feed(tmp_path):
    """Not at what else Unicode has for it: the numbers of all symbols after it would be others."""
    path = tmp_path / "vocab.txt"
    symbols = ["<eos>", "a\u2028b", "c\x0bd", "e\x85", "f\x1cg", "last"]
    path.write_bytes("\n".join([*symbols, ""]).encode())
    assert read_vocabulary(path) == (["<eos>", "a", "c", "e", "f", "last"], {})  # what follows space is no word's
    path.write_bytes("\r\n".join([*symbols, ""]).encode())
    assert read_vocabulary(path) == (["<eos>", "a", "c", "e", "f", "last"], {})
    path.write_bytes(b"<eos>\n\xff\n")
    with pytest.raises(ValueError, match=r"vocab\.txt is no text in UTF-8"):
        read_vocabulary(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_authors_vocabulary_class(protocol, tmp_path, monkeypatch):
    """Pickled as an object: its attributes are read, its class is not looked for."""
    module = types.ModuleType("vocabulary")
    exec("class Vocab: pass", module.__dict__)
    vocabulary = module.Vocab()
    vocabulary.sym2idx = collections.OrderedDict(b=1, a=0)
    vocabulary.counter = collections.Counter("aab")
    vocabulary.lower_case = True
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "vocabulary", module)
        (tmp_path / "vocab.pkl").write_bytes(pickle.dumps(vocabulary, protocol))
    assert read_vocabulary(tmp_path / "vocab.pkl") == (["a", "b"], {"lower_case": True})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The converted tokenizer, as it opens from its folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary_tokenizer(Source(GOLDEN / "vocabulary")).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


TEXTS = json.loads((GOLDEN / "vocabulary" / "texts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text["text"])[:30])
def test_texts_get_the_same_ids(text, tokenizer):
    assert tokenizer(text["text"])["input_ids"] == text["ids"]


def test_texts_come_back(tokenizer):
    """As transformers 4.35.2 decodes them, but for quotation marks and ideographs."""
    others = [text for text in TEXTS if not any(c in text["decoded"] for c in "\"語'") and " @" not in text["text"]]
    assert len(others) > 8
    for text in others:
        assert tokenizer.decode(text["ids"]) == text["decoded"]
    assert tokenizer.decode(TEXTS[0]["ids"]) == TEXTS[0]["text"]


def test_the_tokenizer_comes_along(tmp_path):
    symbols = ["<eos>", "<unk>", *(f"w{i}" for i in range(80)), "the", "5", "@,@", "000", "U.S."]
    with_vocabulary(tmp_path / "published", "vocab.txt", "\n".join(symbols).encode())
    folder = convert(tmp_path / "published", tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the 5,000 w7 of the U.S.").input_ids == [82, 83, 84, 85, 9, 1, 82, 86]
    assert tokenizer.eos_token_id == 0 and tokenizer.unk_token_id == 1
    model = gallery.GalleryTransformerXLForCausalLM.from_pretrained(folder)
    inputs = tokenizer("the 5,000", return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"} and model.generate(**inputs, max_new_tokens=3).shape[0] == 1


def test_lower_case(tmp_path):
    content = pickle.dumps({"idx2sym": ["<eos>", "<unk>", "the"], "lower_case": True})
    with_vocabulary(tmp_path / "published", "vocab.pkl", content)
    tokenizer = AutoTokenizer.from_pretrained(convert(tmp_path / "published", tmp_path / "converted"))
    assert tokenizer("The THE the").input_ids == [2, 2, 2]


class Call:
    """A pickle that calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    import builtins
    import os

    return {
        "a function of os": Call(os.system, f"touch {marker}"),
        "a builtin": Call(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "inside a container": {"idx2sym": ["a"], "sym2idx": [Call(builtins.eval, f"open({str(marker)!r}, 'w')")]},
        "an attribute of what is known": Call(getattr, dict, "fromkeys"),
    }


@pytest.mark.parametrize("name", ["vocab.pkl", "vocab.bin"])
@pytest.mark.parametrize("attack", attacks(""))
def test_a_malicious_vocabulary_is_refused(attack, name, tmp_path):
    marker = tmp_path / "marker"
    with_vocabulary(tmp_path / "published", name, pickle.dumps(attacks(marker)[attack]))
    if name == "vocab.bin":
        torch.save(attacks(marker)[attack], tmp_path / "published" / name)
    with pytest.raises(ValueError, match=rf"{name} holds more than a vocabulary, .* so it is not opened"):
        convert(tmp_path / "published", tmp_path / "converted")
    assert not marker.exists() and not (tmp_path / "converted").exists()


def test_classes_of_a_vocabulary_are_not_imported(tmp_path):
    """A name of the tokenizer's time gives an empty bag, whatever would stand there; what it does is nothing."""
    marker = tmp_path / "marker"
    content = (
        b"(dVidx2sym\n(lV<unk>\naVword\nasVother\n"
        b"cre\nos.system\n(Vtouch " + str(marker).encode() + b"\ntRs."  # re.os would be the module os
    )  # fmt: skip
    (tmp_path / "vocab.pkl").write_bytes(content)
    assert read_vocabulary(tmp_path / "vocab.pkl")[0] == ["<unk>", "word"]
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "is no vocabulary, or is damaged"),
        (b"", "is no vocabulary, or is damaged"),
        (pickle.dumps({"idx2sym": [1, 2]}), "holds no vocabulary: neither idx2sym"),
        (pickle.dumps({"sym2idx": {"a": 1, "b": "2"}}), "holds no vocabulary: neither idx2sym"),
        (pickle.dumps({"idx2sym": ["a", "b"], "sym2idx": {"a": 1, "b": 0}}), "contradicts itself"),
        (pickle.dumps({"idx2sym": ["a", "a"]}), "has 2 symbols, of which only 1 differ"),
        (pickle.dumps({"idx2sym": [str(i) for i in range(98)]}), "has 98 symbols; the model's vocab_size is 97"),
        (pickle.dumps({"idx2sym": ["a"], "delimiter": ""}), "a vocabulary of characters"),
    ],
)
def test_a_vocabulary_that_is_none(content, message, tmp_path):
    with_vocabulary(tmp_path / "published", "vocab.pkl", content)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "published", tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
