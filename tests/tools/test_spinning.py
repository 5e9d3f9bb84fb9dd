"""Commands of the gallery let idle threads sleep soon, and say so before torch reads it; a user's word comes first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = """
import os
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
raise SystemExit
"""
SCRIPT = "from hf_gallery.cli import app\napp()\n"  # what pip writes for an entry point
COMMANDS = {
    "hf-gallery": ["{folder}/hf-gallery", "list"],
    "python -m hf_gallery": ["-m", "hf_gallery", "list"],
    "python -W ignore -m hf_gallery": ["-W", "ignore", "-m", "hf_gallery", "list"],
    "python -m eval": ["-m", "eval", "--help"],
    "a worker of eval": ["-m", "eval.compiled", "--arch", "90"],
    "the tests": ["-c", "import conftest"],
}


@pytest.fixture
def told(tmp_path):
    """Variables in the environment of a fresh process when it imports torch, which is a stub here."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "hf-gallery").write_text(SCRIPT)

    def run(arguments, **given):
        kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        places = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests")))
        command = [sys.executable, *(argument.format(folder=tmp_path) for argument in arguments)]
        done = subprocess.run(
            command, env=kept | given | {"PYTHONPATH": places}, cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_let_threads_sleep(command, told):
    assert told(COMMANDS[command]) == ["10000", "None"]
    assert told(COMMANDS[command], GOMP_SPINCOUNT="7") == ["7", "None"]
    assert told(COMMANDS[command], OMP_WAIT_POLICY="active") == ["None", "active"]


def test_the_library_leaves_the_environment_alone(told):
    assert told(["-c", "import hf_gallery"]) == ["None", "None"]
