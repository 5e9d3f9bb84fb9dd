"""Laws of every converted folder: obey laws 1 to 4, generate, and open in an environment without hf_gallery.

The laws' own tests are called, with a variant whose model comes from the folder. They need a vocabulary as large as
theirs (VOCAB), whose first ids are plain words.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from test_law_1_split_anywhere import test_split_anywhere, test_split_anywhere_with_gradients, test_the_past_matters
from test_law_2_batch_anyhow import test_batch_anyhow, test_padding_in_every_chunk
from test_law_3_rows_independent import test_a_reset_row_equals_a_fresh_one, test_rows_move_and_are_dropped
from test_law_4_state_bounded import test_state_is_bounded
from test_law_7_travels_light import inputs_of, open_elsewhere, results_here
from variants import VARIANTS, Variant, assert_equal, runner


@dataclass(frozen=True)
class Converted(Variant):
    """A converted folder in the place of a variant; it has the one head that its config names."""

    folder: Path | None = None

    @property
    def head(self):
        return next(iter(self.heads))

    def make(self, head="causal", *, seed=0, dtype=torch.float32, **overrides):
        return self.heads[head].kind.from_pretrained(self.folder, **overrides).to(dtype).eval()


def converted(folder: Path, *, horizon: int | None = None, limit: int | None = None) -> Converted:
    """The folder as a variant. horizon: tokens after which its cache stops growing; limit: its longest input."""
    config = json.loads((folder / "config.json").read_text())
    (architecture,) = config["architectures"]
    heads = {
        name: head
        for variant in VARIANTS
        for name, head in variant.heads.items()
        if head.kind.__name__ == architecture and head.settings.get("is_decoder") in (None, config.get("is_decoder"))
    }
    name = next(iter(heads))
    kind = heads[name].kind
    return Converted(
        folder.name, kind.config_class, {name: heads[name]}, {}, horizon=horizon, limit=limit, folder=folder
    )


def obeys_the_laws(variant: Converted):
    """Laws 1 to 4, as far as they are about its head."""
    name, head = variant.head, variant.heads[variant.head]
    for kind in ("left", "right"):
        test_batch_anyhow(variant, name, kind, torch.float32)
    if not head.stream:
        return
    for cuts in ((5, 18), (1,) * 23):
        test_split_anywhere(variant, name, cuts)
    test_split_anywhere_with_gradients(variant, name, (8, 8, 7))
    test_the_past_matters(variant, name)
    test_padding_in_every_chunk(variant, name, "left", "all columns")
    test_rows_move_and_are_dropped(variant, name, [2, 0, 1], "reorder_cache")
    if not head.source:
        test_a_reset_row_equals_a_fresh_one(variant, name, "list")
    if variant.horizon is not None:
        test_state_is_bounded(variant, name, 13, False)


def generates(variant: Converted):
    """The same with a cache and without one, token by token the likeliest."""
    run = runner(variant, variant.head)
    prompt = {k: x for k, x in inputs_of(run).items() if not k.startswith("decoder")}
    options = dict(max_new_tokens=9, min_new_tokens=9, do_sample=False, num_beams=1)
    tokens = run.model.generate(**prompt, **options)
    assert tokens.shape[1] >= 9 and torch.equal(tokens, run.model.generate(**prompt, **options, use_cache=False))


def open_without_the_library(variants: list[Converted], base: Path):
    """All folders, each under its head and saved again, in one other process without hf_gallery."""
    jobs, here = [], {}
    for variant in variants:
        run = runner(variant, variant.head)
        inputs, name = inputs_of(run), str(variant.folder).replace("/", "_")
        save_file(inputs, base / f"{name}.inputs")
        here[name] = results_here(run, inputs)
        files = dict(inputs=str(base / f"{name}.inputs"), out=str(base / f"{name}.out"), again=str(base / name))
        jobs.append(dict(files, name=name, folder=str(variant.folder), auto=run.head.auto))
    report = open_elsewhere(base, jobs)
    for name, expected in here.items():
        assert "error" not in report[name], report[name]["error"]
        assert report[name]["module"].startswith("transformers_modules.")
        for out in (f"{name}.out", f"{name}.out.again"):
            result = load_file(base / out)
            assert_equal(result["result"], expected["result"])
            if "generated" in expected:
                assert torch.equal(result["generated"], expected["generated"])
