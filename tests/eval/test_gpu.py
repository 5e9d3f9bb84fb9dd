"""`python -m eval.gpu --dry`: the script that measures on a GPU, tried on a CPU in Triton's interpreter."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from eval import gpu
from eval.gpu import DRY, _models
from hf_gallery.files import write_json


def test_what_is_wrong_is_written(tmp_path, monkeypatch):
    """Errors that are no numbers, which no JSON file holds, as words."""
    monkeypatch.setattr(gpu, "_case", lambda name: {"out": math.inf, "query": 1e-9})
    said = []
    found = gpu.correctness(DRY, lambda: 0.0, said.append)
    write_json(tmp_path / "results.json", found)
    assert not found["all_right"] and found["wrong"] == list(found["errors"])
    assert found["errors"]["window"] == {"out": "inf", "query": 1e-9} and any("WRONG window" in x for x in said)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: it comes with torch on Linux"
)
def test_the_whole_script_runs(tmp_path):
    """Every part measures every model; torch's windowed FlashAttention alone needs the device."""
    path = tmp_path / "results.json"
    command = [sys.executable, "-m", "eval.gpu", "--dry", "--out", str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(path.read_text())
    assert found["correctness"]["all_right"]
    assert {e["form"] for e in found["attention"] if "error" in e} == {"flash, window"}
    assert [(e["variant"], "error" in e) for e in found["training"]] == [(name, False) for name in _models()] * 3
    decoded = [(e["variant"], e["context"]) for e in found["decoding"] if e["decode_tokens_per_second"] > 0]
    assert decoded == [(name, context) for name in _models() for context in DRY.contexts]
