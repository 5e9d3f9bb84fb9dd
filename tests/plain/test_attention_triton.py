"""The attention kernels without a GPU: in Triton's interpreter against the definition, and compiled for GPUs."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from variants import causal, over, runner, words

from hf_gallery.models import attention
from hf_gallery.models.attention import IMPLEMENTATIONS, attend, choose
from hf_gallery.models.attention_problem import Problem
from hf_gallery.models.spans import Spans

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: it comes with torch on Linux"
)
ROOT = Path(__file__).parents[2]
QUICK = ["window", "ragged, T < S, odd heads", "bias, any intervals", "relative, any intervals", "bf16, relative"]
QUICK += [
    "no rows",
    "ends beyond 32 bits",
    "search, many tiles",
    "decode, any intervals",
    "decode, relative",
    "ring, padded",
    "ring, dilated",
    "unit, float32",
    "found, float32",
    "gate, float32",
]


def in_interpreter(*names):
    """The kernels' errors by case and tensor, found by a process that interprets them."""
    found = subprocess.run(
        [sys.executable, "-m", "eval.kernels", *names],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout.splitlines()[-1])


def assert_near(found):
    from eval.kernels import DECODES, PARTS, SEARCHES, limit

    for name, errors in found.items():
        due = {"scores", "columns"} if name in SEARCHES else {"out"}
        due |= set() if name in SEARCHES | PARTS else {"lse"}
        due |= {"query"} if name.startswith("unit") or name not in SEARCHES | PARTS | DECODES else set()
        assert set(errors) >= due, name
        for tensor, error in errors.items():
            assert error < limit(name), (name, tensor, error)


@needs_triton
def test_kernels_equal_the_definition():
    """Values, lse and all gradients: intervals of a band, ragged and random rows, empty rows, sizes that divide
    nothing, a bias and a relative term. And the search of a memory: equal scores, NaN, empty and turned intervals."""
    assert_near(in_interpreter(*QUICK))


@needs_triton
@pytest.mark.slow
def test_all_kernels_equal_the_definition():
    """Every case: dropout whose mask is drawn again in the backward, frozen inputs, joined parts, T > S, one query,
    half types, one head at a time, a whole graph under torch.compile."""
    found = in_interpreter()
    assert_near(found)
    assert {"joined parts", "one head at a time", "a whole graph", "dropout, relative", "bf16, bias"} <= found.keys()


@needs_triton
@pytest.mark.parametrize(
    "which", [pytest.param("test", marks=pytest.mark.slow), "transformer_xl-causal or unit_length or searched"]
)
def test_models_by_interpreted_kernels(which):
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "tests/plain/test_interpreted_models.py", "-k", which],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert found.returncode == 0 and " passed" in found.stdout, found.stdout[-3000:]


# ------------------------------------------------------------------------------------------------------ compilation


def compiled(*arguments):
    """Resources that the kernels take of a GPU, by a process that compiles them for one that is not there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-m", "eval.compiled", *arguments],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def assert_fits(found):
    assert found
    for kernel in found:
        assert kernel["spilled"] <= 256, kernel
        assert kernel["shared"] <= (227 if kernel["arch"] == 90 else 99) * 1024, kernel


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["80", "90"])
def test_kernels_compile_for_gpus(arch):
    """In half types and by TF32, for heads of 64: few spilled bytes, and shared memory that the GPU has (sm_89's 99 KB
    for those before Hopper). `python -m eval.compiled` without arguments compiles float32 and heads of 128 and 256
    too, for half an hour."""
    assert_fits(compiled("--arch", arch, "--heads", "64", "--kinds", "half,tf32"))


@needs_triton
def test_a_kernel_compiles_for_hopper():
    kernels = "products,decode,ring,join,unit,gate,gate_lstm,attend_found,attend_many"
    assert_fits(compiled("--arch", "90", "--heads", "64", "--kernels", kernels, "--kinds", "half"))


# ------------------------------------------------------------------------------------------------------------ choice


def problem(device="cpu", dtype=torch.float32, d=8):
    x = torch.zeros(1, 1, 3, d, dtype=dtype, device=device)
    ends = torch.zeros(1, 3, dtype=torch.long)
    return Problem(x, x, x, Spans(ends, ends), None, 1.0)


def test_the_device_and_type_choose_the_implementation():
    for name in ("auto", "eager"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert choose(problem(dtype=dtype), name) == "tiles"
    assert choose(problem(), "tiles") == "tiles" and choose(problem(), "sdpa") == "sdpa"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "CUDA.*cpu|needs the package triton"), ({"device": "meta"}, "CUDA.*meta|needs the package triton")],
)
def test_triton_says_what_keeps_it(changes, message):
    with pytest.raises(ValueError, match=f'implementation="triton".*({message}).*auto'):
        choose(problem(**changes), "triton")


@needs_triton
def test_one_query_a_row_is_decoded_by_split_keys(monkeypatch):
    """For inference; and rings, which no other kernel reads."""
    from hf_gallery.models import attention_triton
    from hf_gallery.models.rings import RingSpans, StepRows

    monkeypatch.setattr(attention_triton, "INTERPRETED", True)  # as if the CPU would do
    x, end = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, dtype=torch.long)
    step = Problem(x[:, :, :1], x, x, Spans(end, end), None, 1.0)
    ring = step._replace(spans=RingSpans(end, end, StepRows(end[0], None)))
    for one in (step, ring):
        assert choose(one, "triton") == choose(one, "decode") == "decode"
        assert choose(one, "tiles") == choose(one, "auto") == "tiles"
        learns = one._replace(query=one.query.clone().requires_grad_())
        assert choose(learns, "triton") == ("triton" if one is step else "tiles")
        for changes, message in (({"query": x}, "one query a row, got 3"), ({"dropout": 0.1}, "has no dropout")):
            with pytest.raises(ValueError, match=f'implementation="decode" .*{message}.*auto'):
                choose(one._replace(**changes), "decode")
        with pytest.raises(ValueError, match="records no gradients"):
            choose(learns, "decode")
        with pytest.raises(ValueError, match="'flex'"):
            choose(one, "flex")
    for name in ("sdpa", "flash"):
        assert choose(ring, name) == "tiles"


@needs_triton
@causal()
def test_a_model_is_asked_for_the_kernels_of_one_query(variant):
    run = runner(variant, "causal", attn_implementation="decode")
    with torch.no_grad(), pytest.raises(ValueError, match='implementation="decode" serves one query a row, got'):
        run(words(2, 9))


@needs_triton
def test_triton_refuses_types_and_sizes_that_it_cannot_do(monkeypatch):
    from hf_gallery.models import attention_triton

    monkeypatch.setattr(attention_triton, "INTERPRETED", True)  # as if the CPU would do
    assert choose(problem(), "triton") == "triton" and choose(problem(), "auto") == "tiles"
    with pytest.raises(ValueError, match="float64"):
        choose(problem(dtype=torch.float64), "triton")
    with pytest.raises(ValueError, match="256.*257"):
        choose(problem(d=257), "triton")


def test_an_unknown_implementation_is_refused_with_all_names():
    x = torch.zeros(1, 1, 3, 8)
    ends = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="'flex'.*" + ".*".join(IMPLEMENTATIONS)):
        attend(x, x, x, Spans(ends, ends), implementation="flex")


@over()
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
def test_all_attention_of_a_model_runs_as_it_was_asked_to(variant, head, gradients, monkeypatch):
    """No call of attend leaves the choice to a default: what attn_implementation says reaches every one."""
    asked = set()

    def spy(problem, implementation):
        asked.add(implementation)
        return "tiles"

    monkeypatch.setattr(attention, "choose", spy)
    run = runner(variant, head, attn_implementation="triton")
    with torch.set_grad_enabled(gradients):
        run(words(2, 23))
    assert asked == {"triton"}


def test_the_file_loads_without_triton(tmp_path):
    """As on machines without a GPU, where torch brings no triton: attention works, and names what is missing."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from hf_gallery.models.attention import attend
from hf_gallery.models.spans import Spans
x, ends = torch.ones(1, 1, 3, 8), torch.zeros(1, 3, dtype=torch.long)
assert torch.equal(attend(x, x, x, Spans(ends, ends)), x)
try:
    attend(x, x, x, Spans(ends, ends), implementation="triton")
except ValueError as error:
    assert "needs the package triton" in str(error), error
else:
    raise AssertionError
"""
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("attention_triton", "_forward_operator"),
        ("attention_tiles", "_tiles_forward"),
        ("attention_flash", "_forward_operator"),
        ("attention_decode", "_operator"),
        ("search_triton", "_attend_operator"),
        ("gate_triton", "_operator"),
    ],
)
def test_a_second_import_of_the_code_uses_the_operators_of_the_first(name, made, tmp_path, monkeypatch):
    """Remote code is imported once for each folder: the same code must not collide with itself, other code neither."""
    original = importlib.import_module(f"hf_gallery.models.{name}")
    package = tmp_path / f"copied_{name}"
    shutil.copytree(Path(original.__file__).parent, package)
    (package / "other.py").write_text(Path(original.__file__).read_text() + "\n# changed\n")
    monkeypatch.syspath_prepend(tmp_path)
    same = importlib.import_module(f"{package.name}.{name}")
    other = importlib.import_module(f"{package.name}.other")
    assert getattr(same, made) is getattr(original, made)
    assert getattr(other, made).name() != getattr(original, made).name()


def test_limits_hold_for_what_is_not_a_number():
    with pytest.raises(AssertionError):
        assert_near({"window": {"out": math.nan, "lse": 0.0, "query": 0.0}})
