"""benchmarks/default_setting: the default setting beside training alone, from logs whose answer is known by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, Sequence

import pytest
from fairseq_runs import ROOT

from benchmarks.default_setting import compare as default_setting


def write_run(folder: Path, peers: Sequence[Dict[int, float]]) -> None:
    for number, curve in enumerate(peers):
        log = folder / f"peer{number}/train.log"
        log.parent.mkdir(parents=True)
        rows = [{"epoch": 1, "valid_loss": str(value), "valid_num_updates": str(update)} for update, value in curve.items()]
        log.write_text("".join(f"2026-01-01 00:00:00 | INFO | valid | {json.dumps(row)}\n" for row in rows))


def test_the_table(tmp_path, capsys):
    """Two seeds: the means are +9.0 (in the first tenth), −0.1, +0.03, −0.35."""
    write_run(tmp_path / "default/seed1", [{10: 19.0, 40: 4.8, 70: 4.0, 100: 3.5}, {10: 19.0, 40: 5.0, 70: 4.2, 100: 3.7}])
    write_run(tmp_path / "alone/seed1", [{10: 10.0, 40: 5.0, 70: 4.1, 100: 4.0}, {10: 10.0, 40: 5.0, 70: 4.1, 100: 4.0}])
    write_run(tmp_path / "default/seed2", [{10: 19.0, 40: 4.9, 70: 4.06, 100: 3.7}])
    write_run(tmp_path / "alone/seed2", [{10: 10.0, 40: 5.0, 70: 4.0, 100: 4.0, 130: 3.0}])
    write_run(tmp_path / "default/seed3", [{10: 1.0}])  # has nothing to be compared with
    beside = default_setting.compare(tmp_path)
    assert beside.seeds == ["seed1", "seed2"] and list(beside.differences) == [10, 40, 70, 100]
    assert beside.judged() == pytest.approx({40: -0.1, 70: 0.03, 100: -0.35}) and beside.worst() == 70
    assert default_setting.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"| {tmp_path} | 2 | +0.030 | 70 | -0.400, -0.300 |" in shown
    assert "| seed2 | +9.000 | -0.100 | +0.060 | -0.300 |" in shown


def test_what_cannot_be_compared_is_told(tmp_path, capsys):
    write_run(tmp_path / "default/seed1", [{10: 1.0}])
    assert default_setting.main([str(tmp_path)]) == 2
    assert "must hold the folders default and alone, but" in capsys.readouterr().err
    write_run(tmp_path / "alone/seed2", [{20: 1.0}])
    assert default_setting.main([str(tmp_path)]) == 2 and "a seed in common" in capsys.readouterr().err
    write_run(tmp_path / "alone/seed1", [{20: 1.0}])
    assert default_setting.main([str(tmp_path)]) == 2 and "at the same updates" in capsys.readouterr().err


def test_the_readmes_table_is_that_of_the_committed_logs(monkeypatch, capsys):
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    command = re.search(r"python -m benchmarks\.default_setting\.compare (.*)", readme)[1]
    monkeypatch.chdir(ROOT)
    assert default_setting.main(command.split()) == 0
    shown = capsys.readouterr().out.split("\n\n")[0]
    assert shown.count("\n") == 3 and shown in readme
