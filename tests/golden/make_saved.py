"""Makes the folders, caches, a checkpoint and results in tests/golden/saved, with the gallery at commit 93bd5cf.

    git worktree add ../before 93bd5cf
    PYTHONPATH=../before:../before/tests python tests/golden/make_saved.py
    PYTHONPATH=../before python -m eval --variants transformer_xl --tasks recall,text --share 0.01 --runs runs_before \
        --name tiny    # its results.json, and what `python -m eval report ... --markdown` prints as results.md

It was run with transformers 5.24.0 and torch 2.14.1. Each folder VARIANT-HEAD is what save_pretrained writes, but for
the code. Beside the weights stand outputs.safetensors, with ids and mask of two rows, padded differently, and the
logits or hidden states that came out; where there is a cache also cache.safetensors of these columns, with the
logits of five more, and the same for a cache that was filled with gradients. remote.zip is a folder with its code.
checkpoint/ is what SegmentTrainer wrote after two of four steps, with the weights after the fourth.
"""

import shutil
import sys
from pathlib import Path

import torch
import variants
from safetensors.torch import save_file
from transformers import TrainingArguments

import hf_gallery as gallery
from hf_gallery.training import SegmentTrainer

OUT = Path(__file__).parent / "saved"
SIZES = dict(
    vocab_size=23,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=9,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    pad_token_id=22,
    bos_token_id=20,
    eos_token_id=21,
)
WORDS = 18
LONG = ("memorizing",)  # prompts long enough to fill a memory and wrap it round
FEW = {  # settings of which some heads are enough, since another has them all
    "transformer_pre": ("causal", "masked", "seq2seq"),
    "transformer_segments": ("causal", "encoder"),
    "transformer_xl_adaptive": ("causal",),
}


def settings_of(variant):
    own = dict(variant.settings)
    if "cutoffs" in own:
        own["cutoffs"] = [5, 12]
    if "sep_token_id" in own:
        own["sep_token_id"] = 19
    return own


def tokens(*shape, seed):
    return torch.randint(0, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(run, ids, mask):
    arguments = run.inputs(ids, mask)
    for name in ("input_ids", "decoder_input_ids"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name] % WORDS
    if run.head.question:
        arguments["input_ids"][:, 5] = 19
    return arguments


def save(variant, name, head):
    config = variant.config(**SIZES | settings_of(variant) | head.settings | decoder_start(head))
    model = variants.loud(head.kind(config), seed=3).eval()
    folder = OUT / f"{variant.name}-{name}"
    model.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    length = 33 if variant.name.startswith(LONG) else 19
    ids, mask = tokens(2, length, seed=4), torch.ones(2, length, dtype=torch.long)
    mask[0, :3] = 0  # in front
    mask[1, 8:10] = 0  # in the middle
    run = variants.Runner(variant, head, model)
    arguments = inputs_of(run, ids, mask)
    out = {f"input.{key}": x for key, x in arguments.items()}
    for inferring in (True, False) if head.stream else (True,):
        with torch.set_grad_enabled(not inferring):
            output = model(**arguments, **(dict(use_cache=True) if head.stream else {}))
        if inferring:
            out["result"] = variants.result_of(output)
        if head.stream:
            cache = output.past_key_values
            cache.save(folder / ("cache.safetensors" if inferring else "cache_trained.safetensors"))
            more = tokens(2, 5, seed=5)
            with torch.no_grad():
                arguments |= {"decoder_input_ids" if head.source else "input_ids": more}
                arguments.pop("decoder_attention_mask" if head.source else "attention_mask")
                if head.source and "attention_mask" not in arguments:
                    arguments["attention_mask"] = inputs_of(run, ids, mask)["attention_mask"]
                result = variants.result_of(model(**arguments, past_key_values=cache, use_cache=True))
            out["more"], out["after" if inferring else "after_trained"] = more, result
            arguments = inputs_of(run, ids, mask)
    save_file({key: x.detach().contiguous() for key, x in out.items()}, folder / "outputs.safetensors")


def decoder_start(head):
    return dict(decoder_start_token_id=20) if head.source else {}


def save_remote():
    config = gallery.GalleryTransformerXLConfig(**SIZES, segment_length=7, mem_len=5)
    model = variants.loud(gallery.GalleryTransformerXLForCausalLM(config), seed=3).eval()
    folder = OUT / "remote"
    model.save_pretrained(folder)
    ids = tokens(2, 19, seed=4)
    with torch.no_grad():
        save_file({"ids": ids, "result": model(ids).logits}, folder / "outputs.safetensors")
    shutil.make_archive(str(folder), "zip", folder)
    shutil.rmtree(folder)


def documents():
    return [{"input_ids": tokens(n, seed=n).tolist()} for n in (61, 40, 23, 52, 17, 34)]


def save_checkpoint():
    """Four steps in one go; the folder keeps the checkpoint after two, and what the weights became."""
    config = gallery.GalleryTransformerXLConfig(**SIZES | dict(hidden_dropout=0.0, attention_dropout=0.0), mem_len=5)
    config.segment_length = 7
    model = variants.loud(gallery.GalleryTransformerXLForCausalLM(config), seed=3)
    arguments = TrainingArguments(
        str(OUT / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[],
        optim="sgd", use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no",
    )  # fmt: skip
    trainer = SegmentTrainer(model, arguments, segment_length=7, train_dataset=documents())
    trainer.train()
    shutil.copytree(OUT / "run" / "checkpoint-2", OUT / "checkpoint")
    shutil.rmtree(OUT / "run")
    for path in [*(OUT / "checkpoint").glob("*.py"), OUT / "checkpoint" / "training_args.bin"]:
        path.unlink()
    save_file(
        {k: x.clone() for k, x in model.state_dict().items()}, OUT / "checkpoint" / "after_four_steps.safetensors"
    )


if __name__ == "__main__":
    if hasattr(gallery.models, "backbone"):
        sys.exit("PYTHONPATH leads to a later gallery; put a checkout of 93bd5cf in front")
    for variant in variants.VARIANTS:
        if variant.needs is None:
            for name, head in variant.heads.items():
                if name in FEW.get(variant.name, variant.heads):
                    save(variant, name, head)
    save_remote()
    save_checkpoint()
