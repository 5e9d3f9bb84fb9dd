"""Law 7. save_pretrained writes a folder that loads by AutoModel... with trust_remote_code in an environment without
hf_gallery, and gives the same logits.

All folders are opened in one other process, in which hf_gallery cannot be imported, since starting one takes seconds.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from variants import VARIANTS, assert_equal, causal, missing, over, result_of, runner, words

import hf_gallery

ELSEWHERE = """
import importlib.abc, json, sys
import torch


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_gallery":
            raise ImportError("hf_gallery is not installed here")


sys.meta_path.insert(0, Blocker())
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def open_and_run(job, folder):
    auto = getattr(transformers, job["auto"])
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = load_file(job["inputs"])
    output = model(**inputs)
    if "start_logits" in output:
        result = {"result": torch.stack([output["start_logits"], output["end_logits"]], dim=-1)}
    else:
        result = {"result": output["last_hidden_state"] if "last_hidden_state" in output else output["logits"]}
    if model.can_generate():
        prompt = {k: x for k, x in inputs.items() if not k.startswith("decoder")}
        result["generated"] = model.generate(**prompt, max_new_tokens=9, do_sample=False)
    return model, {k: x.detach().contiguous() for k, x in result.items()}


report = {}
for job in json.load(open(sys.argv[1])):
    try:
        with torch.no_grad():
            model, result = open_and_run(job, job["folder"])
            facts = {"class": type(model).__name__, "module": type(model).__module__}
            config = transformers.AutoConfig.from_pretrained(job["folder"], trust_remote_code=True)
            facts["config"] = type(config).__name__
            save_file(result, job["out"])
            if job["again"]:
                model.save_pretrained(job["again"])
                model, result = open_and_run(job, job["again"])
                save_file(result, job["out"] + ".again")
    except Exception as error:
        import traceback
        facts = {"error": traceback.format_exc()[-3000:]}
    report[job["name"]] = facts
assert not any(name.split(".")[0] == "hf_gallery" for name in sys.modules)
json.dump(report, open(sys.argv[2], "w"))
"""


def inputs_of(run):
    """Left-padded rows, as keyword arguments of the head's forward."""
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :4] = 0
    return run.inputs(words(2, 13), None if run.head.source else mask)


def results_here(run, inputs):
    """The model's results in this process."""
    with torch.no_grad():
        result = {"result": result_of(run.model(**inputs))}
        if run.model.can_generate():
            prompt = {k: x for k, x in inputs.items() if not k.startswith("decoder")}
            result["generated"] = run.model.generate(**prompt, max_new_tokens=9, do_sample=False)
    return result


def open_elsewhere(base, jobs):
    """Runs ELSEWHERE on the jobs in another process, in an empty folder of base; its report, by the jobs' names."""
    (base / "jobs.json").write_text(json.dumps(jobs))
    (base / "elsewhere.py").write_text(ELSEWHERE)
    work = base / "empty"
    work.mkdir()
    environment = os.environ | {"HF_MODULES_CACHE": str(base / "modules"), "HF_HOME": str(base / "home")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", str(base / "elsewhere.py"), str(base / "jobs.json"), str(base / "report.json")],
        cwd=work, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((base / "report.json").read_text())


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Saves every variant under every head, and opens all in the other process: (its report, results here, folder)."""
    base = tmp_path_factory.mktemp("travel")
    jobs, here = [], {}
    torch.manual_seed(0)
    for variant in VARIANTS:
        if missing(variant):
            continue
        for head, about in variant.heads.items():
            run = runner(variant, head)
            name = f"{variant.name}-{head}"
            inputs, folder = inputs_of(run), base / "saved" / name
            run.model.save_pretrained(folder)
            save_file(inputs, base / f"{name}.inputs")
            here[name] = results_here(run, inputs)
            common = dict(inputs=str(base / f"{name}.inputs"), folder=str(folder), auto=about.auto)
            jobs.append(
                dict(common, name=name, out=str(base / f"{name}.out"), again=str(base / "again" / name))
            )  # fmt: skip
            if "causal" in variant.heads and head != "causal":
                name = f"{variant.name}-causal as {head}"
                folder = str(base / "saved" / f"{variant.name}-causal")
                jobs.append(dict(common, name=name, folder=folder, out=str(base / f"{name}.out"), again=None))
    return open_elsewhere(base, jobs), here, base


@pytest.mark.works("opens with trust_remote_code")
@over()
def test_a_saved_folder_opens_without_the_library(variant, head, elsewhere):
    """The same results, generation included; and saved again from there it opens again."""
    report, here, base = elsewhere
    name = f"{variant.name}-{head}"
    assert "error" not in report[name], report[name]["error"]
    assert report[name]["class"] == variant.heads[head].kind.__name__
    assert report[name]["config"] == variant.config.__name__
    assert report[name]["module"].startswith("transformers_modules.")
    for out in (f"{name}.out", f"{name}.out.again"):
        result = load_file(base / out)
        assert_equal(result["result"], here[name]["result"])
        if "generated" in here[name]:
            assert torch.equal(result["generated"], here[name]["generated"])


@over(lambda variant, head: "causal" in variant.heads and head is not variant.heads["causal"])
def test_a_causal_checkpoint_opens_under_every_head(variant, head, elsewhere):
    report, _, base = elsewhere
    name = f"{variant.name}-causal as {head}"
    assert "error" not in report[name], report[name]["error"]
    assert report[name]["class"] == variant.heads[head].kind.__name__
    if head == "decoder":
        run = runner(variant, "causal")
        with torch.no_grad():
            expected = run.model.model(**inputs_of(run)).last_hidden_state
        assert_equal(load_file(base / f"{name}.out")["result"], expected)


@over()
def test_the_folder_that_came_back_opens_here(variant, head, elsewhere):
    """Saved in the other process, from remote code, and opened in this one, by the library's own classes."""
    import transformers

    _, here, base = elsewhere
    name = f"{variant.name}-{head}"
    auto = getattr(transformers, variant.heads[head].auto)
    model = auto.from_pretrained(base / "again" / name).eval()
    assert type(model) is variant.heads[head].kind
    run = runner(variant, head)
    run.model = model
    assert_equal(results_here(run, inputs_of(run))["result"], here[name]["result"])


@causal()
def test_the_folder_lists_every_head_and_its_code(variant, elsewhere):
    _, _, base = elsewhere
    for folder in (base / "saved", base / "again"):
        folder = folder / f"{variant.name}-causal"
        config = json.loads((folder / "config.json").read_text())
        expected = {about.auto: about.kind.__name__ for about in variant.heads.values()}
        expected["AutoConfig"] = variant.config.__name__
        mapped = config["auto_map"]
        assert expected.items() <= {auto: place.split(".")[-1] for auto, place in mapped.items()}.items()
        for place in mapped.values():
            file, name = place.split(".")
            assert f"class {name}(" in (folder / f"{file}.py").read_text()
        assert config["architectures"] == [variant.heads["causal"].kind.__name__]


MODELS = Path(hf_gallery.__file__).parent / "models"


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda path: path.name)
def test_files_that_travel_import_little(path):
    """The standard library, torch, transformers and what they need themselves, and siblings as `from .name import`."""
    allowed = set(sys.stdlib_module_names) | {"torch", "transformers", "safetensors", "numpy"}
    guarded = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Try):
            guarded |= {id(child) for child in ast.walk(node)}
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
                assert (MODELS / f"{node.module}.py").exists()
            else:
                assert node.module.split(".")[0] in allowed, ast.unparse(node)
