"""`python -m eval peers`: both sides do the same work, in turns, and a peer that cannot be had stops nothing else."""

import dataclasses
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from eval.cli import app
from eval.peers import PEERS, PeerSettings, is_whole, measured, run, show, table, worker
from eval.peers.comparison import PeerError, Side, environment

TINY = PeerSettings(
    layers=2, hidden=16, heads=2, length=32, longformer_window=8, segment=8, xl_batch=2, decode_tokens=2, block=8,
    states=4, memorizing_batch=2, memories=32, topk=4, repeats=2,
)  # fmt: skip
HERE = [name for name, peer in PEERS.items() if not peer.requires]


def test_works_and_peers_are_the_same_names():
    assert list(worker.WORKS) == list(PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_the_gallery_side_works_and_goes_on(name):
    """Each repeat does the same work: what is carried has its full size from the first repeat on."""
    torch.manual_seed(0)
    model, step = worker.WORKS[name]["gallery"](dataclasses.asdict(TINY))
    for _ in range(3):
        step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", HERE)
def test_sides_are_of_one_size(name):
    """Both sides have as many parameters, but for what one paper has and the other not."""
    sides = [worker.WORKS[name][side](dataclasses.asdict(TINY))[0] for side in ("gallery", "peer")]
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in sides)
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.slow
def test_two_sides_in_turns(tmp_path):
    result = run(TINY, tmp_path, ["longformer"])
    entry = result["peers"]["longformer"]
    for times in (entry["clock"], entry["one_thread"]):
        ms = times["milliseconds"]
        assert times["ratio"] == pytest.approx(ms["peer"] / ms["gallery"]) and times["ratio"] > 0
        least, most = times["ratio_of_rounds"]
        assert least <= most and 0 < times["utilisation"] < 1.5
    assert entry["parameters"]["gallery"] > 0
    json.dumps(result)


def test_processors_are_counted_of_children_too():
    """The port of the Memorizing Transformer searches in some."""
    before = worker.processor_seconds()
    code = "import time\nwhile time.process_time() < 0.3:\n    pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert worker.processor_seconds() - before >= 0.25
        child.communicate(b"\n")


@pytest.mark.slow
def test_a_side_has_the_threads_that_it_is_given(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    for threads, found in ((None, 2), (1, 1)):
        with Side(sys.executable, "transformer", "gallery", TINY, threads) as side:
            assert side.answer()["threads"] == found


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_is_said_and_the_others_are_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(PEERS, "transformer", dataclasses.replace(PEERS["transformer"], requires=("/no/such/wheel",)))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = run(TINY, tmp_path, ["transformer", "transformer_sdpa"])["peers"]
    assert "pip could not install /no/such/wheel" in result["transformer"]["not_measured"]
    assert result["transformer_sdpa"]["clock"]["ratio"] > 0
    assert not list(tmp_path.iterdir())  # nothing half made is taken for an environment next time


@pytest.mark.slow
def test_a_side_that_dies_says_why():
    settings = dataclasses.replace(TINY, heads=3)
    with pytest.raises(PeerError, match="Transformer, training step stopped: ValueError: hidden_size is 16"):
        with Side(sys.executable, "transformer", "gallery", settings) as side:
            side.answer()


@pytest.mark.slow
def test_an_environment_is_made_once_and_sees_this_one(tmp_path, monkeypatch):
    wheel = tmp_path / "ancient_peer-1.0-py3-none-any.whl"
    write_wheel(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    python = environment((str(wheel),), True, tmp_path / "environments")
    code = "import ancient_peer, torch, json; print(json.dumps([ancient_peer.NAME, torch.__version__]))"
    said = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert said == ["ancient", torch.__version__]
    wheel.unlink()
    assert environment((str(wheel),), True, tmp_path / "environments") == python


def write_wheel(path):
    about = "ancient_peer-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("ancient_peer.py", "NAME = 'ancient'\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: ancient-peer\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.peers.PeerSettings", lambda repeats: dataclasses.replace(TINY, repeats=repeats))
    arguments = ["peers", "--only", "transformer", "--repeats", "1", "--runs", str(tmp_path)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "GPT-2" in result.output
    saved = json.loads((tmp_path / "peers" / "results.json").read_text())
    assert saved["peers"]["transformer"]["one_thread"]["ratio"] > 0 and saved["provenance"]["versions"]["torch"]
    refused = CliRunner().invoke(app, ["peers", "--only", "nobody", "--runs", str(tmp_path)])
    assert refused.exit_code == 2 and "--only names 'nobody'" in refused.output


def test_results_of_one_time_only_are_shown_without_numbers():
    """As they were written before both were taken."""
    old = {"peer": "x", "target": 3.0, "milliseconds": {"gallery": 1.0, "peer": 3.0}, "ratio": 3.0, "utilisation": 0.5}
    result = {"settings": dataclasses.asdict(TINY), "threads": 1, "peers": {"longformer": old}}
    assert is_whole(result) and not measured(result)
    assert all(row[4:8] == ["-"] * 4 for row in table(result)[1])


def test_what_is_not_measured_is_shown(capsys):
    result = {
        "settings": dataclasses.asdict(TINY),
        "threads": 1,
        "peers": {"longformer": {"peer": "x", "target": 3.0, "not_measured": "no network"}},
    }
    show(result, Console(width=200))
    assert "not measured: Longformer: no network" in capsys.readouterr().out
