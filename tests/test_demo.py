"""The whole demo on a tiny scale: from corpus to table, interrupted on the way and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "demo" / "run.sh"
SMALL = {"UPDATES": "12", "VALIDATE": "6", "INTERVAL": "3", "TRAIN_PAIRS": "200", "TEST_PAIRS": "10", "PIECES": "400"}
SMALL |= {"LAYERS": "1", "WIDTH": "32", "FFN": "32", "TOKENS": "300", "BEAM": "2"}


def start_demo(folder: Path, **variables: str) -> subprocess.Popen:
    """COMMANDS: where it finds fairseq's commands before all others."""
    path = os.pathsep.join([variables.pop("COMMANDS", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **SMALL, "DEMO_DIR": str(folder), "PATH": path, **variables}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(["bash", str(SCRIPT)], env=environment, text=True, **streams)


def finish(demo: subprocess.Popen) -> str:
    output, _ = demo.communicate()
    return output


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name the folder."""
    command = ["ps", "-ww", "-eo", "stat,args"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in listing.splitlines() if str(folder) in line and not line.startswith("Z")]


@pytest.mark.timeout(900)  # a dozen processes: on a busy machine minutes
def test_demo_interrupted_and_run_again(warm, tmp_path):
    folder = tmp_path / "demo"
    first = start_demo(folder, COMMANDS=str(warm))
    for line in first.stdout:
        if "training | update" in line:
            first.send_signal(signal.SIGTERM)
            break
    finish(first)
    assert first.returncode == 143
    assert processes_of(folder) == []
    assert not (folder / "report").exists()

    second = start_demo(folder, COMMANDS=str(warm))
    output = finish(second)
    assert second.returncode == 0, output
    results = json.loads((folder / "report" / "results.json").read_text())
    runs = {run.parent.name: run for run in folder.glob("runs/*/seed1")}
    assert set(runs) == {"all_reduce", "all_reduce_no_smoothing", "single", "codistill_ce"}
    for name, run in runs.items():
        peers = sorted(run.glob("peer*"))
        assert len(peers) == (2 if name == "codistill_ce" else 1)
        for peer in peers:
            log = (peer / "train.log").read_text()
            # Believed half-made files or a restart from nothing would show here.
            assert '"train_num_updates": "12"' in log or '"valid_num_updates": "12"' in log
            assert len((peer / "test.hyp").read_text().splitlines()) == 10
            assert json.loads((peer / "test.sacrebleu.json").read_text())["name"] == "BLEU"
    assert (folder / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "one peer alone" in output and "codistillation (ce)" in output and results

    third = start_demo(folder, COMMANDS=str(warm))
    again = finish(third)
    assert third.returncode == 0, again
    assert again.count("was finished, nothing done") == 4 or again.count("training | update") == 0
    assert json.loads((folder / "report" / "results.json").read_text()) == results


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "settings.json").write_text('{"pairs": {"train": 6000}}')
    demo = start_demo(tmp_path)
    output = finish(demo)
    assert demo.returncode == 2
    assert "was made with {'pairs': {'train': 6000}}" in output.splitlines()[-1]


def test_without_the_commands_on_the_path_the_demo_says_so(tmp_path):
    demo = start_demo(tmp_path / "demo", PATH="/usr/bin:/bin")
    output = finish(demo)
    assert demo.returncode == 2
    assert output == (
        "demo: codistill-launch must be on PATH, but is not. Did you forget 'make demo', or to activate .venv?\n"
    )
