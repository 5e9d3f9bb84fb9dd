"""Decisions of transformers, TRL, PEFT and lm-eval by the name of a class or by a model type, and that each decides of
our models as it does of GPT-2 or BERT."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from test_trainer import FIVE
from test_training import NO_DROPOUT, arguments, dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    default_data_collator,
)
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from variants import VOCAB, assert_equal, causal, over, runner, words

from hf_gallery.training import SegmentTrainer

SMOOTHING = 0.1


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=30, n_layer=2, n_head=3, n_positions=64))


def counting(length=24, period=29):
    """Texts that count: after a token stands the next one."""
    return [[(start + i) % period for i in range(length)] for start in range(period)]


def smoothing(model, folder, kind=Trainer, **changes):
    texts = counting()
    rows = dataset(texts).add_column("labels", texts) if kind is Trainer else dataset(texts)
    settings = {"max_steps": 100, "optim": "adamw_torch", "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    settings = arguments(folder, label_smoothing_factor=SMOOTHING, max_grad_norm=1.0, **settings | changes)
    more = {"data_collator": only_tokens} if kind is Trainer else {"segment_length": 8}
    return kind(model, settings, train_dataset=rows, **more)


def only_tokens(rows):
    return default_data_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows])


def said(model):
    """The shares of tokens, after the first few of a text, whose successor the model names, and which it repeats."""
    ids = torch.tensor(counting())
    with torch.no_grad():
        best = model.eval()(input_ids=ids).logits.argmax(-1)[:, 4:-1]
    return tuple((best == wanted).float().mean().item() for wanted in (ids[:, 5:], ids[:, 4:-1]))


def brute_force(logits, labels, count=None):
    """The smoothed loss of logits (B, T, V), in their type, where column t is to say label t + 1."""
    total, tokens = 0.0, 0
    for row, wanted in zip(logits.log_softmax(-1), labels, strict=True):
        for scores, label in zip(row[:-1], wanted[1:], strict=True):
            if label >= 0:
                total += -(1 - SMOOTHING) * scores[label] - SMOOTHING * scores.mean()
                tokens += 1
    return total / (count or tokens)


@pytest.mark.works("label smoothing")
@causal(others_slow=True)
def test_smoothed_labels_teach_the_next_token(variant, tmp_path):
    own = smoothing(variant.make(**NO_DROPOUT), tmp_path)
    own.train()
    following, repeated = said(own.model)
    assert following > 0.95 and repeated < 0.05


def test_smoothed_labels_teach_the_next_token_as_they_teach_gpt2(tmp_path):
    own = smoothing(gpt2(), tmp_path)
    own.train()
    following, repeated = said(own.model)
    assert following > 0.95 and repeated < 0.05


@pytest.mark.works("label smoothing")
@causal(others_slow=True)
def test_smoothed_labels_teach_the_next_token_by_segments(variant, tmp_path):
    """SegmentTrainer shifts labels itself, so that a segment's last token knows the next one's first."""
    own = smoothing(variant.make(**NO_DROPOUT), tmp_path, SegmentTrainer)
    own.train()
    following, repeated = said(own.model)
    assert following > 0.95 and repeated < 0.05


def wrapped(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


def subclass(model):
    """The same under a class of a user's own, whose name says nothing."""
    model.__class__ = type("Mine", (type(model),), {})
    return model


def batch():
    labels = words(3, 11)
    labels[1, 7:] = labels[2, :3] = -100
    return {"input_ids": words(3, 11), "labels": labels}


@pytest.mark.works("label smoothing")
@pytest.mark.parametrize("way", [lambda model: model, wrapped, subclass], ids=["plain", "lora", "subclass"])
@causal()
def test_the_smoothed_loss_is_what_its_formula_says(variant, way, tmp_path):
    """In float64, but for a sum that transformers takes in float32; also the mean over the labels of several batches,
    which Trainer asks for by their number."""
    model = way(variant.make(dtype=torch.float64, **NO_DROPOUT))
    own = smoothing(model, tmp_path)
    inputs = batch()
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"]).logits
        for count in (None, 40):
            loss = own.compute_loss(model, dict(inputs), num_items_in_batch=count and torch.tensor(count))
            torch.testing.assert_close(loss, brute_force(logits, inputs["labels"], count), rtol=1e-6, atol=0)


@pytest.mark.works("label smoothing")
@causal()
def test_segments_smooth_as_whole_texts_do(variant, tmp_path):
    """The mean over all tokens of documents that are read in pieces is that of the documents read at once."""
    texts = [row.tolist() for row in words(4, 13)]
    changes = dict(label_smoothing_factor=SMOOTHING, per_device_eval_batch_size=2)
    model = variant.make(dtype=torch.float64, **NO_DROPOUT)
    own = SegmentTrainer(model, arguments(tmp_path, **changes), segment_length=4, eval_dataset=dataset(texts))
    found = own.evaluate()["eval_loss"]
    with torch.no_grad():
        ids = torch.tensor(texts)
        expected = brute_force(model(input_ids=ids).logits, ids).item()
    assert found == pytest.approx(expected, rel=1e-6)


ELSEWHERE = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_gallery":
            raise ImportError("hf_gallery is not installed here")
sys.meta_path.insert(0, Blocker())
import torch, transformers
from peft import LoraConfig, get_peft_model
torch.set_num_threads(1)
inputs, smoothing, found = torch.load(sys.argv[1] + "/batch.pt"), float(sys.argv[2]), {}
for name in sys.argv[3:]:
    folder = f"{sys.argv[1]}/{name}"
    settings = transformers.TrainingArguments(
        folder + "/run", label_smoothing_factor=smoothing, use_cpu=True, report_to=[], disable_tqdm=True)
    for adapted in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float64).eval()
        if adapted:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        with torch.no_grad():
            found[name, adapted] = transformers.Trainer(model, settings).compute_loss(model, dict(inputs))
torch.save(found, sys.argv[1] + "/found.pt")
"""


@pytest.mark.works("label smoothing", *(variant.name for variant in FIVE))
def test_code_from_the_hub_smooths_alike(tmp_path):
    """By trust_remote_code, in a process that cannot import hf_gallery, with an untrained adapter and without."""
    torch.save(batch(), tmp_path / "batch.pt")
    expected = {}
    for variant in FIVE:
        model = variant.make(dtype=torch.float64, **NO_DROPOUT)
        model.save_pretrained(tmp_path / variant.name)
        with torch.no_grad():
            expected[variant.name] = brute_force(model(input_ids=batch()["input_ids"]).logits, batch()["labels"])
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", "-c", ELSEWHERE, str(tmp_path), str(SMOOTHING), *expected],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    for (name, adapted), loss in found.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-6, atol=0, msg=f"{name}, adapter {adapted}: {loss}")


def llama(**changes):
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def unshifted(logits, labels):
    """The smoothed loss where column t is to say label t."""
    logits = torch.cat([logits, logits[:, :1]], dim=1)  # of which the last column says nothing
    return brute_force(logits, torch.cat([labels[:, :1], labels], dim=1))


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("model", ["llama", *(v.name for v in FIVE)])
def test_virtual_tokens_are_smoothed_as_on_llama(model, kind, tmp_path):
    """Wrongly: Trainer looks for the class of a model without virtual tokens one step too deep, finds the bare
    model's and shifts no labels; prompts make logits longer than labels, which fails. docs/GUIDE.md warns of it."""
    variant = next((v for v in FIVE if v.name == model), None)
    bare = llama() if variant is None else variant.make(**NO_DROPOUT)
    if kind is PrefixTuningConfig and not getattr(bare, "takes_pairs", True):
        pytest.skip("keeps more of a token than its key and value: prefix tuning is refused")
    tuned = get_peft_model(bare, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    own, inputs = smoothing(tuned, tmp_path), batch()
    with torch.no_grad():
        if kind is PromptTuningConfig:
            with pytest.raises(RuntimeError, match="size of tensor"):
                own.compute_loss(tuned, dict(inputs))
            return
        logits = tuned(input_ids=inputs["input_ids"]).logits
        found = own.compute_loss(tuned, dict(inputs))
    torch.testing.assert_close(found, unshifted(logits, inputs["labels"]), rtol=1e-5, atol=0)


# ---- liger's kernels, chosen by model type


@over(lambda variant, head: variant in FIVE and head.auto != "AutoModel")
def test_a_trainer_with_liger_evaluates_as_without(variant, head, tmp_path, monkeypatch):
    """liger leaves a model as it is whose type it does not know; Trainer then says in evaluation that logits may be
    left out, which Llama takes too."""
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda model, config: None)
    run = runner(variant, head, **NO_DROPOUT)
    inputs = run.inputs(words(2, 11))
    if run.head.choices:
        inputs = {"input_ids": torch.stack([inputs["input_ids"], inputs["input_ids"].flip(0)], dim=1)}
        inputs["labels"] = torch.tensor([0, 1])
    elif run.head.question:
        inputs |= {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 6])}
    else:
        inputs["labels"] = torch.tensor([0, 1]) if run.head.pooled else words(2, 11) % run.model.config.num_labels
    losses = []
    for on in (False, True):
        own = Trainer(run.model, arguments(tmp_path, use_liger_kernel=on))
        losses.append(own.prediction_step(run.model, dict(inputs), prediction_loss_only=True)[0])
    assert torch.equal(*losses)


def test_without_liger_trainer_says_what_it_says_of_llama(tmp_path):
    if importlib.util.find_spec("liger_kernel") is not None:
        pytest.skip("liger_kernel is installed")
    said = []
    for model in (llama(), FIVE[0].make()):
        with pytest.raises(ImportError, match="pip install liger-kernel") as caught:
            smoothing(model, tmp_path, use_liger_kernel=True).train()
        said.append(str(caught.value))
    assert said[0] == said[1]


# ---- the loss


@over(lambda variant, head: head.auto not in ("AutoModel", "AutoModelForSeq2SeqLM") and not head.choices)
def test_the_loss_goes_by_the_head_and_not_by_the_name(variant, head):
    """transformers takes a model's loss from its class name; a subclass is trained by its head's all the same."""
    kind = variant.heads[head].kind
    expected = LOSS_MAPPING["For" + kind.__name__.split("For")[-1]]
    for model in (variant.make(head), type("Mine", (kind,), {})(variant.make_config(head))):
        assert model.loss_function is expected, type(model).__name__


def test_references_take_their_loss_by_name():
    """Classes that the test above is held against."""
    assert gpt2().loss_function is LOSS_MAPPING["ForCausalLM"]
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    assert BertForMaskedLM(small).loss_function is LOSS_MAPPING["ForMaskedLM"]


@causal()
def test_tokens_are_counted_as_the_loss_shifts_them(variant, tmp_path):
    """Trainer counts the labels of an update by the kind of loss: without those of first columns where it shifts."""
    own = smoothing(variant.make(), tmp_path)
    assert own._loss_shifts_labels
    assert own._get_num_items_in_batch([batch()], torch.device("cpu")) == (batch()["labels"][:, 1:] != -100).sum()


# ---- tables of model types


@causal()
def test_transformers_knows_every_causal_class(variant):
    """As it knows GPT-2's; what reads the table: Trainer's label smoothing, its model cards, transformers' server."""
    kind = variant.heads["causal"].kind
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[variant.config.model_type] == kind.__name__
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["gpt2"] == "GPT2LMHeadModel"


def targets_of(adapter):
    return adapter.target_modules if isinstance(adapter.target_modules, str) else sorted(adapter.target_modules)


@pytest.mark.works("PEFT without target_modules")
@pytest.mark.parametrize(
    "config",
    [LoraConfig, IA3Config, LoHaConfig, OFTConfig, partial(AdaLoraConfig, total_step=10), VeraConfig],
    ids=lambda config: getattr(config, "func", config).__name__,
)
@causal()
def test_adapters_go_where_they_go_on_llama(variant, config):
    """PEFT takes modules that a user has not named from a table of model types. Fresh ones change nothing."""
    made = {"oft_block_size": 0, "r": 1} if config is OFTConfig else {}
    expected = get_peft_model(llama(), config(task_type="CAUSAL_LM", **made)).peft_config["default"]
    model, ids = variant.make(), words(2, 9)
    before = model(input_ids=ids).logits
    adapted = get_peft_model(model, config(task_type="CAUSAL_LM", **made))
    assert targets_of(adapted.peft_config["default"]) == targets_of(expected)
    assert_equal(adapted.eval()(input_ids=ids).logits, before)
    reached = {name for name, p in adapted.named_parameters() if p.requires_grad}
    layers = variant.make_config().num_hidden_layers
    assert all(any(f"layers.{i}." in name for name in reached) for i in range(layers))


LATER = """
import sys
import hf_gallery
sizes = dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
kinds = [getattr(hf_gallery, name) for name in hf_gallery.__all__ if name.endswith("ForCausalLM")]
models = [kind(kind.config_class(**sizes)) for kind in kinds]
assert len(models) >= 5 and not any(name.split(".")[0] == "peft" for name in sys.modules)
from peft import IA3Config, LoraConfig, get_peft_model
for model in models:
    for config, wanted in ((LoraConfig, {"q_proj", "v_proj"}), (IA3Config, {"k_proj", "v_proj", "down_proj"})):
        adapted = get_peft_model(model, config(task_type="CAUSAL_LM"))
        assert adapted.peft_config["default"].target_modules == wanted, type(model)
        model = adapted.unload()
"""


@pytest.mark.works("PEFT without target_modules", *(variant.name for variant in FIVE))
def test_models_may_be_built_before_peft_is_imported():
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@causal()
def test_norms_are_tuned_by_their_names_here(variant):
    model = get_peft_model(variant.make(), LNTuningConfig(task_type="CAUSAL_LM"))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = (torch.nn.LayerNorm, torch.nn.RMSNorm)
    norms = [name for name, m in variant.make().named_modules() if isinstance(m, kinds) and "recurrence" not in name]
    tuned = {name for name in norms if any(f".{name}." in entry for entry in learning)}
    assert tuned == {name for name in norms if not name.endswith("embed_norm")} and tuned


def test_prefix_tuning_takes_no_table():
    """Only Bloom's and BigCode's keys stand otherwise than they are given."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING as table

    assert not [name for name in table if name.startswith("gallery")]


# ---- lists of classes


@over()
def test_pipelines_know_every_head(variant, head):
    """By its class, which they look for among those that Auto classes were told of."""
    auto = getattr(transformers, variant.heads[head].auto)
    assert auto._model_mapping[variant.config] is variant.heads[head].kind


@causal()
def test_lm_eval_takes_every_variant_for_a_causal_model(variant):
    """It looks a model type up among causal and among seq2seq models, the latter first."""
    seen = SimpleNamespace(AUTO_MODEL_CLASS=None)
    HFLM._get_backend(seen, variant.make_config())
    assert seen.backend == "causal" and seen.AUTO_MODEL_CLASS is transformers.AutoModelForCausalLM


def test_a_head_whose_signature_is_widened_keeps_its_own_forward():
    """`reads` wraps what the class defines: a Longformer's classifier makes the first token global by itself."""
    variant = next(v for v in FIVE if v.name == "longformer")
    model, ids = variant.make("sequence"), words(2, 17)
    first = torch.zeros_like(ids)
    first[:, 0] = 1
    with torch.no_grad():
        logits = model(ids).logits
        assert_equal(logits, model(ids, global_attention_mask=first).logits)
        assert not torch.allclose(logits, model(ids, global_attention_mask=torch.zeros_like(ids)).logits, atol=1e-3)
