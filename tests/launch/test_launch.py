"""codistill-launch: what each peer is told, how its log is read, and that nothing outlives the launcher.

The peers here are tiny scripts that print what fairseq prints; they show by files how far they are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from fairseq_runs import ROOT
from hypothesis import given
from hypothesis import strategies as st

from fairseq_codistill.launch import checkpoint as launch_checkpoint  # fmt: skip
from fairseq_codistill.launch import guard as launch_guard
from fairseq_codistill.launch import main as launch
from fairseq_codistill.launch import peer as launch_peer
from fairseq_codistill.launch import plan as launch_plan
from fairseq_codistill.launch import progress as launch_progress
from fairseq_codistill.launch import supervisor as launch_supervisor
from fairseq_codistill.launch import view as launch_view

# As the console command does it; the second argument says whether to take the terminal at stdin as one's own.
LAUNCH = """
import fcntl, sys, termios
terminal = sys.argv.pop(1) == "terminal"
if terminal:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from fairseq_codistill.launch.main import main
sys.exit(main())
"""
TRAINING = """
log("train", "{'optimization': {'_name': None, 'max_epoch': 0, 'max_update': 100, 'stop_time_hours': 0.0}}")
log("train_inner", json.dumps({"epoch": 2, "update": 1.5, "loss": "7.1", "nll_loss": "6.1", "num_updates": "50",
    "ups": "5", "codistill_alpha": "1.1", "codistill_staleness": "25", "codistill_agreement": "0.5"}))
log("valid", json.dumps({"epoch": 2, "valid_loss": "5.5", "valid_nll_loss": "4.5", "valid_num_updates": "100"}))
"""
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts stand-ins for fairseq's commands on PATH, which note argv and environment; call it with what they do."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "D").mkdir()
    for name in [name for name in os.environ if name.startswith(("CODISTILL_", "SLURM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)

    def write(body: str = "") -> None:
        lines = [
            f"#!{sys.executable} -S",
            "import json, os, pathlib, signal, subprocess, sys, time",
            "me, restart = int(os.environ['CODISTILL_PEER']), int(os.environ['CODISTILL_RESTART'])",
            f"here = pathlib.Path({str(tmp_path)!r})",
            "def log(name, text): print('2025-11-21 00:00:00 | INFO |', name, '|', text)",
            "def write(name, text=''):",
            "    (here / (name + '~')).write_text(str(text))",
            "    (here / (name + '~')).rename(here / name)",
            "def wait_for_end(peer):",
            "    pid = here / f'pid{peer}'",
            "    while not pid.exists() or os.path.exists(f'/proc/{pid.read_text()}'): time.sleep(0.01)",
            "write(f'start{me}.{restart}', json.dumps({'argv': sys.argv[1:], 'env': dict(os.environ)}))",
        ]
        for name in ("fairseq-train", "fairseq-hydra-train"):
            (folder / name).write_text("\n".join(lines) + "\n" + body)
            (folder / name).chmod(0o755)

    write()
    return write


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits to be reaped does not."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def until(condition, seconds: float = 30.0):
    """Wait for something another process does; its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"{condition} did not come true in {seconds} s")


def pids_of(folder: Path, count: int) -> list:
    """The pids that `count` processes have written into files pid*, as soon as all have."""

    def written() -> list:
        return [int(path.read_text()) for path in folder.glob("pid*[!~]")]

    until(lambda: len(written()) == count)
    return written()


def make_plan(argv: list, environ: dict) -> launch_plan.Plan:
    return launch_plan.make_plan(launch.parse_arguments(argv), environ)


def commands(*command: str, peers: int = 2, options: tuple = ()) -> list:
    plan = make_plan(["--peers", str(peers), *options, "--", *command], os.environ)
    return [" ".join(peer.command) for peer in plan.peers]


# ---------------------------------------------------------------------------------------------- what each peer runs


@pytest.mark.parametrize(
    "given_command, second",
    [
        ("fairseq-train D", "fairseq-train D --save-dir checkpoints/peer1 --seed 10000001 --log-format json"),
        (
            "fairseq-train D --save-dir X --seed 3 --lr 1",
            "fairseq-train D --lr 1 --save-dir X/peer1 --seed 10000003 --log-format json",
        ),
        (
            "fairseq-train --save-dir=X D --seed=3",
            "fairseq-train D --save-dir X/peer1 --seed 10000003 --log-format json",
        ),
        (
            "fairseq-train D --save-dir W --log-format simple --save-dir=X",
            "fairseq-train D --log-format simple --save-dir X/peer1 --seed 10000001",
        ),
        (
            "nice -n 10 fairseq-train D --save-dir X",
            "nice -n 10 fairseq-train D --save-dir X/peer1 --seed 10000001 --log-format json",
        ),
        (
            f"{sys.executable} -m fairseq_cli.train D --save-dir X",
            f"{sys.executable} -m fairseq_cli.train D --save-dir X/peer1 --seed 10000001 --log-format json",
        ),
        ("env OTHER=1 true --save-dir X --seed 3", "env OTHER=1 true --save-dir X --seed 3"),
    ],
)
def test_each_spelling_of_the_command(programs, given_command: str, second: str) -> None:
    assert commands(*given_command.split())[1] == second


def test_without_separator_and_with_the_commands_own(programs) -> None:
    plan = make_plan("--peers 1 env -- fairseq-train D".split(), {})
    assert plan.peers[0].command[:4] == ["env", "--", "fairseq-train", "D"]


def test_environment(programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))

    def environs(command: str, environ: dict) -> list:
        return [peer.environ for peer in make_plan(["--peers", "3", "--", *command.split()], environ).peers]

    second = environs("fairseq-train D --save-dir X", {})[1]
    assert second == {
        "CODISTILL_PEER": "1",
        "CODISTILL_PEERS": "3",
        "CODISTILL_DIR": str(tmp_path / "X" / "exchange"),
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
    }
    assert environs("fairseq-train D", {})[2]["CODISTILL_PEER"] == "2"
    assert "CODISTILL_DIR" not in environs("fairseq-train D --codistill-dir s3://b/x", {})[0]
    assert "CODISTILL_DIR" not in environs("fairseq-hydra-train criterion.codistill_dir=s3://b/x", {})[0]
    assert "CODISTILL_DIR" not in environs("fairseq-train D", {"CODISTILL_DIR": "mine"})[0]
    assert "OMP_NUM_THREADS" not in environs("fairseq-train D", {"OMP_NUM_THREADS": "7"})[0]


@pytest.mark.parametrize(
    "count, visible, peers, options, expected",
    [
        (4, None, 2, (), ["0,1", "2,3"]),
        (5, None, 2, (), ["0,1", "2,3"]),
        (4, "4,5,6,7", 2, (), ["4,5", "6,7"]),
        (2, "GPU-aa, GPU-bb", 2, (), ["GPU-aa", "GPU-bb"]),
        (2, "3,1,-1,0", 2, (), ["3", "1"]),  # CUDA stops at the first name it does not know
        (2, None, 3, (), ["0", "1", "0"]),
        (4, None, 2, ("--gpus-per-peer", "1"), ["0", "1"]),
        (4, None, 2, ("--gpus-per-peer", "0"), ["", ""]),
        (0, None, 2, (), [None, None]),
    ],
)
def test_gpus_are_shared(programs, monkeypatch, count, visible, peers, options, expected) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = make_plan(["--peers", str(peers), *options, "--", "fairseq-train", "D"], os.environ)
    assert [peer.environ.get("CUDA_VISIBLE_DEVICES") for peer in plan.peers] == expected
    assert any("share 2 GPUs" in note for note in plan.notes) == (peers == 3)


def test_peers_of_a_slurm_job_do_not_meet_at_one_port(programs, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert not any("distributed" in command for command in commands("fairseq-train", "D"))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    ports = [
        re.findall(r"--distributed-init-method tcp://localhost:(\d+)", one) for one in commands("fairseq-train", "D")
    ]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]
    assert "distributed_training.distributed_init_method=tcp://localhost:" in commands("fairseq-hydra-train", "a.b=c")[0]
    assert not any("init-method" in one for one in commands("fairseq-train", "D", "--distributed-port", "1"))
    assert not any("init-method" in one for one in commands("fairseq-train", "D", peers=4))


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ("--peers 0 -- fairseq-train D", "--peers must be at least 1, but is 0."),
        ("--peers two -- fairseq-train D", "argument --peers: invalid int value: 'two'"),
        ("-- fairseq-train D", "the following arguments are required: --peers"),
        ("--peers 2", "a command must follow `--`, but there is none; did you forget it"),
        ("--peers 2 --", "a command must follow `--`, but there is none; did you forget it"),
        ("--peers 2 -- fairseq-trian D", "'fairseq-trian' is not; did you forget to activate its environment?"),
        ("--peers 2 --restarts 3 -- fairseq-train D", "unrecognized arguments: --restarts"),
        ("--peers 2 --max-restarts -1 -- fairseq-train D", "--max-restarts must not be negative, but is -1."),
        ("--peers 2 --grace -1 -- fairseq-train D", "--grace must not be negative, but is -1.0."),
        ("--peers 2 --gpus-per-peer -1 -- fairseq-train D", "--gpus-per-peer must not be negative, but is -1."),
        (
            "--peers 2 --gpus-per-peer 3 -- fairseq-train D",
            "--gpus-per-peer 3 with --peers 2 needs 6 GPUs, but there are 0",
        ),
        ("--peers 2 -- fairseq-train D --codistill-peer 1", "--codistill-peer must not be in the command"),
        ("--peers 2 -- fairseq-train D --codistill-peers=2", "--codistill-peers must not be in the command"),
        ("--peers 2 -- fairseq-hydra-train criterion.codistill_peers=2", "criterion.codistill_peers must not be"),
        ("--peers 2 -- fairseq-train D --save-dir", "--save-dir must have a value, but none follows it."),
        ("--peers 2 -- fairseq-train D --save-dir --seed 1", "--save-dir must have a value, but none follows it."),
        ("--peers 2 -- fairseq-train D --seed one", "--seed must be a whole number"),
        ("--peers 500 -- fairseq-train D", "--seed must be a whole number, below 2**32 with 10000000 more"),
        ("--peers 2 -- fairseq-train D --save-dir file/x", "--save-dir must be a folder, or one that can be made, but"),
        ("--peers 2 --log-dir file -- env", "--log-dir must be writable, but 'file/peer0/train.log'"),
    ],
)
def test_bad_input_is_one_sentence(programs, tmp_path: Path, capsys, argv: str, sentence: str) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert launch.main(argv.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("codistill-launch: ")
    assert sentence in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.glob("start*"))


def test_help_needs_no_torch() -> None:
    code = "import sys\nfrom fairseq_codistill.launch.main import main\n"
    code += "try: main(['--help'])\nexcept SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    root = ROOT
    shown = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "--max-restarts" in shown.stdout and "Ctrl-C" in shown.stdout


# ------------------------------------------------------------------------------------------------ reading a peer's log

LOG = """\
2025-11-21 00:00:00 | INFO | fairseq_cli.train | {'optimization': {'_name': None, 'max_epoch': 0, 'max_update': 200}}
2025-11-21 00:00:00 | INFO | fairseq.trainer | begin training epoch 1
2025-11-21 00:00:01 | INFO | train_inner | {"epoch": 2, "update": 1.25, "loss": "7.1", "nll_loss": "6.5", \
"num_updates": "50", "ups": "10", "codistill_alpha": "1.1", "codistill_staleness": "20", "codistill_agreement": "0.25"}
tensorflow says: gr\u00fc\u00dfe {"epoch": broken}
{"epoch": 2, "num_updates": "many"}
2025-11-21 00:00:02 | INFO | fairseq_cli.train | begin validation on "valid" subset
2025-11-21 00:00:02 | INFO | valid | {"epoch": 2, "valid_loss": "5.5", "valid_nll_loss": "5.0", \
"valid_num_updates": "60"}
2025-11-21 00:00:02 | INFO | valid1 | {"epoch": 2, "valid1_loss": "1.0", "valid1_num_updates": "60"}
2025-11-21 00:00:03 | INFO | train | {"epoch": 2, "train_loss": "6.0", "train_num_updates": "80"}
2025-11-21 00:00:04 | INFO | valid | {"epoch": 3, "valid_loss": "nan", "valid_num_updates": "90"}
2025-11-21 00:00:04 | INFO | valid | {"epoch": 3, "valid_loss": "5.25", "valid_num_updates": "100"}
"""


def test_follower_reads_a_log() -> None:
    seen = launch_progress.LogFollower()
    lines = LOG.splitlines(keepends=True)
    assert seen.phase == "starting" and seen.seconds_left is None
    seen.feed("".join(lines[:2]))
    assert (seen.phase, seen.update, seen.total) == ("training", None, 200)
    seen.feed("".join(lines[2:5]))
    assert (seen.update, seen.epoch, seen.train_nll, seen.alpha) == (50, 2, 6.5, 1.1)
    assert (seen.staleness, seen.agreement, seen.seconds_left) == (20, 0.25, 15)
    seen.feed(lines[5])
    assert seen.phase == "validating"
    seen.feed("".join(lines[6:9]))
    assert (seen.phase, seen.update, seen.train_nll, seen.valid_nll) == ("training", 80, 6.0, 5.0)
    seen.feed("".join(lines[9:]))
    assert (seen.update, seen.valid_nll, seen.best_valid_nll) == (100, 5.25, 5.0)


def test_follower_takes_no_nan_for_the_best() -> None:
    seen = launch_progress.LogFollower()
    for loss in ("nan", "3.5", "nan"):
        seen.feed(json.dumps({"epoch": 1, "valid_loss": loss, "valid_num_updates": "1"}) + "\n")
    assert seen.best_valid_nll == 3.5 and seen.valid_nll != seen.valid_nll


@given(st.lists(st.integers(0, len(LOG)), max_size=8))
def test_follower_takes_text_in_any_pieces(cuts: list) -> None:
    whole, pieces = launch_progress.LogFollower(), launch_progress.LogFollower()
    whole.feed(LOG)
    edges = [0, *sorted(cuts), len(LOG)]
    for begin, end in zip(edges, edges[1:]):
        pieces.feed(LOG[begin:end])
    assert repr(pieces) == repr(whole)  # repr, because NaN is not equal to itself


def test_follower_knows_the_total_from_epochs_too() -> None:
    seen = launch_progress.LogFollower()
    seen.feed(
        "{'max_epoch': 10, 'max_update': 0}\n" + '{"epoch": 2, "update": 1.5, "loss": "3", "num_updates": "30"}\n'
    )
    assert seen.total == 200
    seen.feed(
        "{'max_epoch': 10, 'max_update': 120}\n" + '{"epoch": 2, "update": 1.5, "loss": "3", "num_updates": "30"}\n'
    )
    assert seen.total == 120


def test_follower_forgets_a_line_that_never_ends() -> None:
    seen = launch_progress.LogFollower()
    for _ in range(30):
        seen.feed("x" * 100_000)
    assert len(seen._partial) == 1_000_000


def test_last_lines_are_plain_and_short(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"\x1b[31mred\x1b[0m\n\n" + b"y" * 5000 + b"\n50%\r100%\n\xff\x07\n")
    lines = launch_progress.last_lines(str(tmp_path / "log"))
    assert lines == ["red", "y" * 300 + " ...", "50%", "100%", "\ufffd"]
    (tmp_path / "log").write_text("z" * 400 + "\n" + "y" * 400)
    assert launch_progress.last_lines(str(tmp_path / "log")) == ["z" * 300 + " ...", "y" * 400], "the last one is whole"
    (tmp_path / "log").write_text("\n".join(map(str, range(100))))
    assert launch_progress.last_lines(str(tmp_path / "log")) == [str(n) for n in range(80, 100)]


def test_one_reason_of_all_peers_is_said_once(programs, capsys) -> None:
    words = "ValueError: codistill_interval must be the same for all, but peer {} has another; did you forget it? " + "x" * 400
    raised = 'Traceback (most recent call last):\n  File "x.py", line 1\n'
    programs(f"print({raised!r} + {words!r}.format(me))\nsys.exit(1)")
    assert launch.main("--peers 3 --max-restarts 1 -- fairseq-train D --save-dir X".split()) == 1
    out = capsys.readouterr().out
    assert out.count("did you forget it? " + "x" * 400 + "\n") == 1 and "Traceback" not in out
    assert len(re.findall(r"peer(\d) failed with exit status 1 after \d+s, at update -: as (?!peer\1)peer\d\.", out)) == 4
    assert len(re.findall(r"peer\d failed with exit status 1 after \d+s, at update -: as before\.", out)) == 1


def test_duration_and_sparkline() -> None:
    assert [launch_view.duration(s) for s in (None, 5, 200, 7500, 93600)] == ["-", "5s", "3m20s", "2h05m", "1d02h"]
    assert launch_view.sparkline([1, 2, 8, float("nan")]) == "▁▂█"
    assert launch_view.sparkline([]) == "" and launch_view.sparkline([3.0]) == "▁"


# --------------------------------------------------------------------------------------------- keeping a peer going


def test_all_end_well_and_a_second_run_appends(programs, tmp_path: Path, capsys) -> None:
    programs(TRAINING)
    command = ["--peers", "2", "--", "fairseq-train", "D", "--save-dir", "X"]
    assert launch.main(command) == 0
    out = capsys.readouterr().out
    for i in range(2):
        assert f"peer{i}: " in out
        assert re.search(rf"peer{i} \w+ \| update 100/100 \(100%\) \| epoch 2 \| loss 6.100 \| valid nll 4.500", out)
        assert re.search(rf"{i} \| finished +\| +100 \| +4.500 \| +0 \| +\d+s \| X/peer{i}/train.log", out)
        start = json.loads((tmp_path / f"start{i}.0").read_text())
        assert start["argv"][start["argv"].index("--seed") + 1] == str(1 + i * 10_000_000)
        assert start["env"]["CODISTILL_DIR"] == str(tmp_path / "X" / "exchange")
    assert "codistill-report X" in out and "alpha 1.1 | staleness 25 | agreement 50%" in out
    assert "\x1b" not in out and "\r" not in out

    programs("")
    assert launch.main(command) == 0
    assert re.search(r"0 \| finished +\| +- \| +- \|", capsys.readouterr().out)  # the old lines are not this run's
    log = (tmp_path / "X" / "peer0" / "train.log").read_text()
    headers = [line for line in log.splitlines() if line.startswith("===")]
    assert len(headers) == 2 and log.count("valid_nll_loss") == 1
    assert "peer0 of 2 | restart 0" in headers[1] and headers[1].endswith("--seed 1 --log-format json")


def test_a_failing_peer_is_reported_at_once_and_the_other_finishes(programs, tmp_path: Path, capsys) -> None:
    programs(
        "if me == 0:\n"
        "    write('pid0', os.getpid())\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    write('pidchild', child.pid)\n"
        "    sys.stderr.write('RuntimeError: out of memory, half a lin')\n"
        "    sys.exit(3)\n"
        "wait_for_end(0)\n" + TRAINING
    )
    assert launch.main("--peers 2 -- fairseq-train D --save-dir X".split()) == 3
    out = capsys.readouterr().out
    failure = out.index("peer0 failed with exit status 3")
    assert failure < out.index("  | RuntimeError: out of memory, half a lin") < out.index("the other peers go on")
    assert failure < out.index("peer1 ", failure) < out.index("valid nll 4.500")
    assert re.search(r"0 \| failed \(3\)", out) and re.search(r"1 \| finished", out)
    # Its data-loader worker went with it.
    assert not any(is_alive(pid) for pid in pids_of(tmp_path, 2))


@pytest.mark.parametrize("allowed, status, starts", [(0, 7, 1), (1, 7, 2), (2, 0, 3), (5, 0, 3)])
def test_restarts(programs, tmp_path: Path, capsys, allowed: int, status: int, starts: int) -> None:
    programs("sys.stdout.write(f'attempt {restart}')\nif me == 1 and restart < 2: sys.exit(7)")
    assert (
        launch.main(["--peers", "2", "--max-restarts", str(allowed), "--", "fairseq-train", "--save-dir=X"]) == status
    )
    out = capsys.readouterr().out
    assert len(list(tmp_path.glob("start1.*"))) == starts and len(list(tmp_path.glob("start0.*"))) == 1
    log = (tmp_path / "X" / "peer1" / "train.log").read_text()
    assert re.findall(r"^(?:attempt|=== .* restart) (\d)", log, re.M) == [str(n) for n in range(starts) for _ in "xx"]
    assert out.count(f"restart 1 of {allowed}.") == min(allowed, 1)
    assert out.count("peer1 is not started again") == (status != 0)


def torn_checkpoint(folder: Path, size: int) -> Path:
    """A whole checkpoint of update 10, an older one, and a `checkpoint_last.pt` of which only `size` bytes were written."""
    folder.mkdir(parents=True)
    for update, age in (("1_10", 10), ("1_5", 20), ("best", 20)):
        torch.save({"update": update}, folder / f"checkpoint_{update}.pt")
        os.utime(folder / f"checkpoint_{update}.pt", (time.time() - age,) * 2)
    last = folder / "checkpoint_last.pt"
    last.write_bytes((folder / "checkpoint_1_10.pt").read_bytes()[:size])
    return last


@pytest.mark.parametrize("size", [0, 1, 2, 500, -1])
def test_a_torn_checkpoint_is_set_aside(programs, tmp_path: Path, capsys, size: int) -> None:
    last = torn_checkpoint(tmp_path / "X" / "peer1", size)
    torn = last.read_bytes()
    assert launch.main("--peers 2 -- fairseq-train D --save-dir X".split()) == 0
    assert torch.load(last) == {"update": "1_10"}, "the newest whole one"
    assert (last.parent / "checkpoint_last.pt.torn").read_bytes() == torn, "nothing is lost"
    assert "checkpoint_last.pt.torn; the training goes on from checkpoint_1_10.pt." in capsys.readouterr().out


def test_a_torn_checkpoint_before_a_restart(programs, tmp_path: Path, capsys) -> None:
    last = torn_checkpoint(tmp_path / "X" / "peer0", 500)
    shutil.copyfile(last.parent / "checkpoint_1_10.pt", last)
    programs(f"if restart == 0: os.truncate({str(last)!r}, 700); sys.exit(1)")
    assert launch.main("--peers 1 --max-restarts 1 -- fairseq-train D --save-dir X".split()) == 0
    assert torch.load(last) == {"update": "1_10"}
    assert "goes on from checkpoint_1_10.pt" in capsys.readouterr().out


def test_without_another_checkpoint_the_training_begins_anew(tmp_path: Path, capsys) -> None:
    last = torn_checkpoint(tmp_path / "X", 500)
    for other in last.parent.glob("checkpoint_*[05t].pt"):
        if other != last:
            other.unlink()
    assert launch_checkpoint.main([str(last.parent)]) == 0
    assert "begins anew" in capsys.readouterr().out and not last.exists()


@pytest.mark.parametrize("content", [None, b"\x80\x02pickle of an old torch"], ids=["whole", "another format"])
def test_other_checkpoints_are_left_alone(tmp_path: Path, capsys, content) -> None:
    last = torn_checkpoint(tmp_path / "X", 500)
    last.write_bytes(content or (last.parent / "checkpoint_1_5.pt").read_bytes())
    before = last.read_bytes()
    assert launch_checkpoint.main([str(last.parent), str(tmp_path / "nothing there")]) == 0
    assert last.read_bytes() == before and not capsys.readouterr().out


def test_a_torn_checkpoint_of_ones_own_comes_before_one_that_the_command_names(programs, tmp_path: Path) -> None:
    programs()
    last = torn_checkpoint(tmp_path / "X" / "peer0", 500)
    assert launch.main("--peers 1 -- fairseq-train D --save-dir X --restore-file other.pt".split()) == 0
    assert torch.load(last) == {"update": "1_10"}
    assert "--restore-file" not in json.loads((tmp_path / "start0.0").read_text())["argv"]


def test_a_restart_goes_on_from_what_the_peer_has_saved(programs, tmp_path: Path) -> None:
    """And not from where the run began, which would be again and again."""
    programs(
        "save_dir = here / sys.argv[sys.argv.index('--save-dir') + 1]\n"
        "if restart == 1: (save_dir / 'checkpoint_last.pt').write_bytes(b'another format')\nif restart < 2: sys.exit(9)"
    )
    words = "--peers 1 --max-restarts 2 -- fairseq-train D --save-dir X --restore-file base.pt --reset-meters"
    assert launch.main(words.split()) == 0
    told = [json.loads((tmp_path / f"start0.{restart}").read_text())["argv"] for restart in range(3)]
    assert told[0] == told[1] and "base.pt" in told[1] and "--reset-meters" in told[1]
    assert told[2] == "D --save-dir X/peer0 --seed 1 --log-format json".split()
    assert "--restore-file" not in (tmp_path / "X/peer0/train.log").read_text().split("restart 2 |")[1]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """Copies end half-way, as on a disk without room, until the test says otherwise."""

    def copyfile(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:300])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(shutil, "copyfile", copyfile)


def contents(folder: Path) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "train.log"}


def test_a_full_disk_does_not_begin_a_training_anew(programs, tmp_path: Path, capsys, full_disk) -> None:
    """A torn checkpoint that cannot be replaced stays, and its peer does not start; the others do."""
    last = torn_checkpoint(tmp_path / "X" / "peer0", 500)
    before = contents(last.parent)
    assert launch.main("--peers 2 --max-restarts 3 -- fairseq-train D --save-dir X".split()) == 1
    out = capsys.readouterr().out
    assert contents(last.parent) == before, "all is as it was"
    assert not list(tmp_path.glob("start0.*")) and (tmp_path / "start1.0").exists()
    assert re.search(r"peer0 is not started: X/peer0/checkpoint_last.pt is torn .*: No space left on device; did the disk", out)
    assert re.search(r"0 \| not started", out) and re.search(r"1 \| finished", out)
    assert launch_checkpoint.main([str(last.parent)]) == launch_checkpoint.REFUSED == 3
    assert "is torn" in capsys.readouterr().err and contents(last.parent) == before


def test_a_rename_that_fails_is_taken_back(tmp_path: Path, monkeypatch) -> None:
    last = torn_checkpoint(tmp_path / "X", 500)
    before = contents(last.parent)
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(".mended"):
            raise OSError(errno.EIO, "a bad moment")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(ValueError, match="a bad moment"):
        launch_checkpoint.mend(str(last.parent))
    assert contents(last.parent) == before


def test_a_mending_that_was_cut_short_is_completed(tmp_path: Path) -> None:
    """Also one of an earlier version, which moved the torn file away first."""
    last = torn_checkpoint(tmp_path / "X", 500)
    last.rename(f"{last}.torn")
    assert launch_checkpoint.mend(str(last.parent)).endswith("the training goes on from checkpoint_1_10.pt.")
    assert torch.load(last) == {"update": "1_10"} and launch_checkpoint.mend(str(last.parent)) is None


def test_a_training_that_was_begun_anew_is_not_mended_from_nothing(tmp_path: Path) -> None:
    last = torn_checkpoint(tmp_path / "X", 500)
    last.rename(f"{last}.torn")
    for other in last.parent.glob("*.pt"):
        other.unlink()
    assert launch_checkpoint.mend(str(last.parent)) is None and not last.exists()


def test_status_is_the_first_failures_and_a_signals_is_128_more(programs, tmp_path: Path, capsys) -> None:
    programs(
        "if me == 1:\n    write('pid1', os.getpid())\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "wait_for_end(1)\n"
        "sys.exit(4)"
    )
    assert launch.main("--peers 2 -- fairseq-train".split()) == 137
    out = capsys.readouterr().out
    assert "peer1 failed with exit status 137 (SIGKILL)" in out and "peer0 failed with exit status 4 after" in out


DONE = "log('fairseq_cli.train', 'done training in 3.2 seconds')\nsys.stdout.flush()\n"


def test_a_training_that_is_complete_did_not_fail(programs, tmp_path: Path, capsys) -> None:
    """Python may abort as it ends (a thread of fairseq's data): the last checkpoint is written, there is nothing to repeat."""
    programs(TRAINING + DONE + "os.abort()")
    assert launch.main("--peers 1 --max-restarts 2 -- fairseq-train D --save-dir X".split()) == 0
    out = capsys.readouterr().out
    assert "peer0 ended with exit status 134 (SIGABRT) after its training was complete; it counts as finished." in out
    assert re.search(r"0 \| finished", out) and not list(tmp_path.glob("start0.1")) and "failed" not in out


def test_done_training_must_be_the_last_word(programs, capsys) -> None:
    command = "--peers 1 -- fairseq-train D --save-dir X".split()
    programs(DONE)
    assert launch.main(command) == 0
    programs("sys.exit(4)")  # after the words of the start before
    assert launch.main(command) == 4
    programs(DONE + TRAINING + "sys.stdout.flush()\nsys.exit(5)")  # a sweep goes on with its next training
    assert launch.main(command) == 5
    words = "2025-11-21 | INFO | fairseq_cli.train | done training in 3.2 seconds"
    # Another program's exit status may be that of what comes after the training.
    assert launch.main(["--peers", "1", "--log-dir", "Y", "--", "sh", "-c", f"echo '{words}'; exit 6"]) == 6


def test_any_other_program_gets_its_environment(programs, tmp_path: Path, capsys) -> None:
    script = "echo I am $CODISTILL_PEER of $CODISTILL_PEERS in $CODISTILL_DIR; cat"
    assert launch.main(["--peers", "2", "--log-dir", "logs", "--", "sh", "-c", script]) == 0
    log = (tmp_path / "logs" / "peer1" / "train.log").read_text()
    assert log.endswith(f"\nI am 1 of 2 in {tmp_path}/logs/exchange\n")
    assert "note: sh is not fairseq-train" in capsys.readouterr().out


def test_a_log_with_any_bytes_does_no_harm(programs, capsys) -> None:
    programs(TRAINING + "sys.stdout.flush()\nos.write(1, bytes(range(256)) * 50)\nsys.exit(1)")
    sys.stdout.reconfigure(encoding="ascii", errors="strict")  # a terminal of LANG=C
    assert launch.main("--peers 1 -- fairseq-train".split()) == 1
    out = capsys.readouterr().out
    assert "valid nll 4.500" in out and not re.search(r"[\x00-\x09\x0b-\x1f]", out)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launch_supervisor.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.wait(5) == {signal.SIGTERM}
            assert signals.wait(0) == set()
    finally:
        signal.signal(signal.SIGHUP, before)


# Peer 0 has one child that ignores SIGTERM and one that saves its work; peer 1 ignores all that can be ignored.
STUBBORN = """
def child(name, program):
    words = [sys.executable, "-S", "-c", "import os, signal, sys, time\\n" + program]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    process.stdout.read(1)
    write("pid" + name, process.pid)

if me == 0:
    child("stubborn", "signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(1, b'x'); signal.pause()")
    child("saving", "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), open('saved', 'w'), sys.exit()));"
        "os.write(1, b'x'); signal.pause()")
else:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
write(f"pid{me}", os.getpid())
while True: signal.pause()
"""


def start(*argv: str, terminal: str = "pipe", **kwargs) -> subprocess.Popen:
    """With no GPUs, as counting them takes torch and its seconds."""
    return subprocess.Popen([sys.executable, "-c", LAUNCH, terminal, "--gpus-per-peer", "0", *argv], **kwargs)


def test_sigterm_leaves_no_process(programs, tmp_path: Path) -> None:
    programs(STUBBORN)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = start(*"--peers 2 --grace 2 --max-restarts 1 -- fairseq-train".split(), **streams)
    pids = pids_of(tmp_path, 4)
    assert all(map(is_alive, pids))
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 143 and err == ""
    assert "SIGTERM: stopping all peers within 2 s" in out and out.count("| stopped") == 2
    assert "failed" not in out and not list(tmp_path.glob("start*.1"))
    assert (tmp_path / "saved").exists()  # the grace is for a peer's every process, not only the first
    until(lambda: not any(map(is_alive, pids)), 5)


WAITING = "write(f'pid{me}', os.getpid())\nwhile True: time.sleep(0.05)\n"


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP])
def test_whatever_a_scheduler_sends_stops_all_in_order(programs, tmp_path: Path, number: int) -> None:
    programs("def on_term(*_):\n    write(f'term{me}')\n    sys.exit(0)\nsignal.signal(signal.SIGTERM, on_term)\n" + WAITING)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, which the launcher would inherit
    launcher = start(*"--peers 2 -- fairseq-train".split(), stdout=subprocess.PIPE, text=True)
    signal.signal(signal.SIGHUP, before)
    pids = pids_of(tmp_path, 2)
    # A scheduler may send it to every process of the job; fairseq has no handler for these two, and does not die of them.
    if number in (signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pids[0], number)
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + number and f"{signal.Signals(number).name}: stopping all peers" in out
    assert (tmp_path / "term0").exists() and (tmp_path / "term1").exists() and not any(map(is_alive, pids))


def test_a_warning_reaches_the_peer_that_handles_it(programs, tmp_path: Path) -> None:
    """A fork of fairseq that saves its work at SIGUSR1 gets it, also through nice; the others train on."""
    programs("if me == 1: signal.signal(signal.SIGUSR1, lambda *_: write('warned'))\n" + WAITING)
    launcher = start(*"--peers 2 -- nice fairseq-train".split(), stdout=subprocess.PIPE, text=True)
    pids = pids_of(tmp_path, 2)
    launcher.send_signal(signal.SIGUSR1)
    until((tmp_path / "warned").exists)
    assert all(map(is_alive, pids))
    launcher.terminate()
    out, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 143 and "SIGUSR1: passed on to peer1, and training goes on." in out


def test_a_killed_launcher_leaves_no_process(programs, tmp_path: Path) -> None:
    """SIGKILL, of an out-of-memory killer for example: peers, and what they started, get SIGTERM and their grace."""
    programs(STUBBORN)
    launcher = start(*"--peers 2 --grace 1 -- fairseq-train".split(), stdout=subprocess.DEVNULL)
    pids = pids_of(tmp_path, 4)
    launcher.kill()
    launcher.wait(30)
    until(lambda: not any(map(is_alive, pids)), 10)
    assert (tmp_path / "saved").exists()


def test_the_guard_leaves_others_alone(monkeypatch) -> None:
    """What has ended before the launcher is not signalled: its number may be another process's by now."""
    sent: list = []
    monkeypatch.setattr(launch_guard.os, "killpg", lambda *call: sent.append(call))
    launch_guard.watch(io.BytesIO(b"101\n102\n-101\nnonsense\n0\n1\n-1\n103\n-103"), 0.0)
    assert sent == [(102, signal.SIGTERM), (102, 0), (102, signal.SIGKILL)]


def test_without_a_guard_peers_start_all_the_same(programs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    assert launch.main("--peers 2 -- fairseq-train".split()) == 0
    assert len(list(tmp_path.glob("start*"))) == 2


def test_a_guard_that_was_killed_does_no_harm(programs, tmp_path: Path, monkeypatch) -> None:
    enter = launch_guard.Guard.__enter__

    def killed(guard):
        enter(guard)._process.kill()
        guard._process.wait(5)
        return guard

    monkeypatch.setattr(launch_guard.Guard, "__enter__", killed)
    assert launch.main("--peers 2 -- fairseq-train".split()) == 0
    assert len(list(tmp_path.glob("start*"))) == 2


# ------------------------------------------------------------------------ faults of the launcher's own, and of its output


def test_output_that_cannot_be_written_costs_no_peer(programs, tmp_path: Path) -> None:
    """The reader of stdout goes away (`| head`), and stderr is a full disk; the peers end as they would have."""
    programs("if me == 1: sys.exit(3)\nwhile not (here / 'go').exists(): time.sleep(0.01)\n" + TRAINING)
    reader, writer = os.pipe()
    with open("/dev/full", "w") as full:
        launcher = start(*"--peers 2 -- fairseq-train --save-dir X".split(), stdout=writer, stderr=full)
    os.close(writer)
    until(lambda: (tmp_path / "start1.0").exists())
    os.close(reader)
    (tmp_path / "go").touch()
    assert launcher.wait(30) == 3, "the status of the peer that failed, not of a pipe that broke"
    assert "valid_nll_loss" in (tmp_path / "X/peer0/train.log").read_text()


def test_a_full_disk_under_stdout_costs_no_peer(programs, tmp_path: Path) -> None:
    programs(TRAINING)
    with open("/dev/full", "w") as full:
        assert start(*"--peers 2 -- fairseq-train".split(), stdout=full, stderr=full).wait(60) == 0


def test_a_closed_stdout_costs_no_peer(programs, tmp_path: Path) -> None:
    programs(TRAINING)
    words = [sys.executable, "-c", LAUNCH, "pipe", *"--gpus-per-peer 0 --peers 2 -- fairseq-train".split()]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words], timeout=60).returncode == 0


def test_a_reader_that_stands_still_does_not_keep_signals_away(programs, tmp_path: Path) -> None:
    """`| less`, or Ctrl-S: the launcher must still hear that it is to stop."""
    programs("if me == 1: print('x' * 60000); sys.exit(1)\n" + WAITING)
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    launcher = start(*"--peers 2 --max-restarts 9 -- fairseq-train".split(), stdout=writer)
    os.close(writer)
    until(lambda: (tmp_path / "start1.9").exists())
    launcher.terminate()
    until(lambda: not is_alive(int((tmp_path / "pid0").read_text())))
    os.close(reader)
    assert launcher.wait(30) == 143


class Broken(launch_view.PlainView):
    def tell(self, text: str, is_error: bool = False) -> None:
        raise RuntimeError("no such glyph")

    def update(self, peers: list) -> None:
        raise RuntimeError("no such glyph")


def test_a_view_that_fails_is_left_out(programs, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(launch, "PlainView", Broken)
    assert launch.main("--peers 2 -- fairseq-train".split()) == 0
    assert len(list(tmp_path.glob("start*"))) == 2
    assert "note: the live view has failed (RuntimeError: no such glyph); plain lines follow." in capsys.readouterr().out


def test_a_fault_of_the_launchers_stops_peers_with_their_grace(programs, tmp_path: Path, monkeypatch, capsys) -> None:
    programs("def on_term(*_):\n    time.sleep(0.3)\n    write(f'term{me}')\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, on_term)\n" + WAITING)  # fmt: skip
    wait = launch_supervisor.Signals.wait

    def failing(signals, seconds: float) -> set:
        if len(list(tmp_path.glob("pid*[!~]"))) == 2 and not failed:
            failed.append(True)
            raise OSError("out of descriptors")
        return wait(signals, seconds)

    failed: list = []
    monkeypatch.setattr(launch_supervisor.Signals, "wait", failing)
    assert launch.main("--peers 2 -- fairseq-train".split()) == 1
    assert (tmp_path / "term0").exists() and (tmp_path / "term1").exists(), "SIGTERM and time, rather than SIGKILL"
    assert not any(map(is_alive, pids_of(tmp_path, 2)))
    err = capsys.readouterr().err
    assert "out of descriptors" in err and err.endswith("the fault above is its own; all peers were stopped with SIGTERM.\n")


def test_a_peer_for_which_there_is_no_process(programs, tmp_path: Path, monkeypatch, capsys) -> None:
    start_peer = launch_peer.Peer.start

    def failing(peer) -> None:
        if peer.plan.index == 0:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        start_peer(peer)

    monkeypatch.setattr(launch_peer.Peer, "start", failing)
    assert launch.main("--peers 2 -- fairseq-train".split()) == 1
    assert "peer0 is not started: [Errno 11] Resource temporarily unavailable" in capsys.readouterr().out
    assert (tmp_path / "start1.0").exists()


def test_second_ctrl_c_kills_at_once(programs, tmp_path: Path) -> None:
    programs(STUBBORN)
    launcher = start(*"--peers 2 --grace 300 -- fairseq-train".split(), stdout=subprocess.PIPE, text=True)
    pids = pids_of(tmp_path, 4)
    launcher.send_signal(signal.SIGINT)
    until(lambda: "stopping" in launcher.stdout.readline())
    launcher.send_signal(signal.SIGINT)  # passed on twice by a wrapper: still one Ctrl-C
    with pytest.raises(AssertionError):
        until(lambda: not is_alive(int((tmp_path / "pid1").read_text())), 0.7)
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(30) == 130
    launcher.stdout.close()
    until(lambda: not any(map(is_alive, pids)), 5)


class Terminal:
    """What a person sees: the text on a terminal of `width` columns, of which the launcher is the session's leader."""

    def __init__(self, width: int, *argv: str) -> None:
        self.width, self.rows, self.row, self.column, self.raw = width, [""], 0, 0, bytearray()
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        environ = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        environ.pop("COLUMNS", None)  # the terminal's own width counts; pytest-xdist sets this
        self.launcher = start(
            *argv, terminal="terminal", stdin=slave, stdout=slave, stderr=slave, env=environ, start_new_session=True
        )
        os.close(slave)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # Linux ends a terminal with an error
            while piece := os.read(self.master, 65536):
                self.raw.extend(piece)

    def end(self) -> int:
        status = self.launcher.wait(30)
        self.reader.join(10)
        os.close(self.master)
        return status

    @property
    def text(self) -> str:
        """All that was ever written, without control codes."""
        return CODES.sub("", self.raw.decode("utf-8", "replace"))

    @property
    def screen(self) -> list:
        """The lines that are to be seen, as control codes have left them."""
        self.rows, self.row, self.column = [""], 0, 0
        for code, sign in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b])", self.raw.decode("utf-8", "replace")):
            self._obey(code[-1], int(re.sub(r"\D", "", code[2:-1]) or 1)) if code else self._write(sign)
        return [row.rstrip() for row in self.rows]

    def _obey(self, letter: str, count: int) -> None:
        if letter == "A":
            self.row = max(0, self.row - count)
        elif letter == "K":
            self.rows[self.row] = "" if count == 2 else self.rows[self.row][: self.column]

    def _write(self, sign: str) -> None:
        if sign == "\r":
            self.column = 0
        elif sign == "\n":
            self.row += 1
            self.rows += [""] * (self.row + 1 - len(self.rows))
        else:
            if self.column == self.width:
                self._write("\r"), self._write("\n")
            row = self.rows[self.row].ljust(self.column)
            self.rows[self.row] = row[: self.column] + sign + row[self.column + 1 :]
            self.column += 1


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminal_is_left_as_it_was(programs, tmp_path: Path, width: int) -> None:
    """Ctrl-C while peers start leaves no line of the table; what is echoed would move it."""
    programs(WAITING)
    terminal = Terminal(width, *"--peers 2 -- fairseq-train --save-dir".split(), "a-folder/of-some-length/for-a-run")
    pids_of(tmp_path, 2)
    until(lambda: "starting" in terminal.text)
    table = [line for line in terminal.screen if line[:1] in "╭│╰" and line]
    assert len(table) == 5 and max(map(len, table)) <= min(width, 140), table
    if width >= 80:
        assert "tail -f a-folder/of-some-length/for-a-run/peer*/train.log" in table[-1]
    os.write(terminal.master, b"typed, and Enter\n\n\x03")
    assert terminal.end() == 130
    screen = "\n".join(terminal.screen)
    assert not re.search("[╭╰│]", screen) and "SIGINT: stopping all peers" in screen and "^C" not in screen, screen
    log = "a-folder/of-some-length/for-a-run/peer"
    words = f"Logs:  {log}*/train.log" if width < 100 else f"{log}1/train.log"
    assert words in terminal.text, "in one piece"


def test_terminal_shows_the_table_and_ctrl_c_lets_peers_end_well(programs, tmp_path: Path) -> None:
    programs(
        "def leave(*_):\n    time.sleep(0.2)\n    write('left')\n    sys.exit(1)\n"
        "if me == 1: signal.signal(signal.SIGINT, leave)\n"
        + TRAINING.replace("log(", "me == 1 and log(")
        + "assert not os.isatty(0)\nwrite(f'pid{me}', os.getpid())\nif me == 0: sys.exit(9)\nwhile True: signal.pause()"
    )
    terminal = Terminal(140, *"--peers 2 -- fairseq-train --save-dir X".split())
    pids = pids_of(tmp_path, 2)
    until(lambda: "failed (9)" in terminal.text and "4.500" in terminal.text)
    os.write(terminal.master, b"\x03")
    assert terminal.end() == 130
    text = terminal.text
    row = re.findall(r"│ 1 +\S training +━{20,40} 100/100 +2 +6\.100 +4\.500 +4\.500 +▁ +1\.1 +25 +50% +5 +\d+s │", text)
    assert row and re.search(r"peer +state +progress +update +epoch +loss +valid +best", text), text[-3000:]
    assert "codistill-launch · 2 peers" in text and "Ctrl-C stops all" in text
    assert "\x1b[" in terminal.raw.decode("utf-8", "replace") and "SIGINT: stopping all peers" in text
    assert (tmp_path / "left").exists() and re.search(r"1 +stopped", text)
    assert "The same command again goes on" in text
    assert not any(map(is_alive, pids))


def test_a_teacher_that_is_ahead() -> None:
    assert [launch_view.staleness_text(age) for age in (None, 25.4, 0, -0.4, -1)] == ["-", "25", "0", "0", "1 ahead"]


def test_what_chooses_the_checkpoint_is_shown(programs, capsys) -> None:
    """BLEU beside the NLL, its best in fairseq's own words; and nothing of it where the NLL chooses."""
    chosen = "'best_checkpoint_metric': 'bleu', 'maximize_best_checkpoint_metric': True, 'criterion': {'_name': 'x'}}"
    told = TRAINING.replace("'optimization': {", "'checkpoint': {" + chosen + ", 'optimization': {")
    programs(told.replace('"valid_num', '"valid_bleu": "30.1", "valid_best_bleu": "31.5", "valid_num'))
    assert launch.main("--peers 2 -- fairseq-train D --save-dir X".split()) == 0
    out = capsys.readouterr().out
    assert "valid nll 4.500 (best 4.500) | valid bleu 30.10 (best 31.50)" in out
    assert re.search(r"best valid nll \| best valid bleu \| restarts", out) and re.search(r"4\.500 \| +31\.50 \| +0 \|", out)

    seen = launch_progress.LogFollower()
    seen.feed("{" + chosen + "\n" + '{"epoch": 1, "valid_loss": "5", "valid_bleu": "2", "valid_num_updates": "1"}\n')
    assert (seen.metric, seen.score, seen.best_score) == ("bleu", 2, 2), "fairseq tells no best of the first"
    peers = [types.SimpleNamespace(progress=progress, restarts=0) for progress in (seen, launch_progress.LogFollower())]
    columns = {name: (width, cell) for name, width, cell in launch_view.LiveView._columns(VIEW, peers)}
    assert columns["bleu"][0] < 80 and [columns["bleu"][1](peer) for peer in peers] == ["2.00", "-"]
    without = launch_view.LiveView._columns(VIEW, peers[1:])
    assert all(width == sys.maxsize for name, width, _ in without if name in ("", "best ")), "hidden on every terminal"


VIEW = types.SimpleNamespace(is_utf8=False, _state=None, _bar=None, _valid=None)
