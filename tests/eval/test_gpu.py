"""`python -m eval.gpu --dry`: the script that measures on a GPU, tried on a CPU in Triton's interpreter."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.gpu import DRY, _models


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
