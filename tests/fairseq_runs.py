"""Real fairseq processes on tiny data, for the tests.

`import fairseq` costs four seconds, and its first optimizer two more. So most jobs are processes forked from one server that
has imported all that already; `command()` runs the installed command from nothing, as a user does, and `warm.commands()` has
stand-ins of fairseq's commands for scripts.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path
from typing import Dict, List, Optional

import pytest
import torch

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "fairseq_codistill"
# For a Python process that imports from the tests, as pyproject.toml has it for pytest.
TESTS_PATH = os.pathsep.join(str(ROOT / part) for part in (".", "tests", "tests/core", "tests/exchange"))
MODEL = (
    "--arch transformer_iwslt_de_en --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 32 --decoder-embed-dim 32 "
    "--encoder-ffn-embed-dim 64 --decoder-ffn-embed-dim 64 --encoder-attention-heads 2 --decoder-attention-heads 2"
)
TRAINING = "--cpu --optimizer adam --lr 0.003 --max-tokens 300 --log-format json --log-interval 1 --no-epoch-checkpoints "
# fairseq-fixed drops what is left of a data set after the last multiple of 8 sentences; tiny data would be empty.
TRAINING += "--num-workers 0 --required-batch-size-multiple 1"
CODISTILL = "--criterion codistill_ce --codistill-interval 4 --codistill-loss ce --codistill-alpha-schedule constant"
LOCKSTEP = f"{CODISTILL} --codistill-sync --codistill-wait 120"
DEADLINE = 240  # seconds; far above what any job needs

os.environ["OMP_NUM_THREADS"] = "1"  # before the server starts
_FORK = multiprocessing.get_context("forkserver")


@functools.cache
def fork_server():
    """The context whose processes are forked from one that has imported what `preload` imports."""
    with pytest.MonkeyPatch.context() as patch:  # only the server needs to find `preload`
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        _FORK.set_forkserver_preload(["preload"])
        forkserver.ensure_running()
    return _FORK


class Job:
    """A fairseq command in a process of its own; its stdout and stderr are read line by line as they come."""

    def __init__(self, words: List[str], environment: Optional[Dict[str, str]] = None, cwd: Optional[Path] = None) -> None:
        reading, writing = _FORK.Pipe(duplex=False)
        self._process = fork_server().Process(target=_job, args=(words, environment or {}, str(cwd or os.getcwd()), writing))
        self._process.start()
        writing.close()
        self._lines: List[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, args=(reading,), daemon=True)
        self._reader.start()

    def _read(self, reading) -> None:
        with os.fdopen(os.dup(reading.fileno()), errors="replace") as lines:
            reading.close()
            for line in lines:
                with self._changed:
                    self._lines.append(line)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str) -> None:
        """Until a line shows `text`."""
        with self._changed:
            shown = self._changed.wait_for(lambda: self._ended or any(text in line for line in self._lines), DEADLINE)
            assert shown and any(text in line for line in self._lines), f"{text!r} never showed:\n{self.log[-3000:]}"

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.join()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def status(self) -> int:
        """Wait for the end; the exit status."""
        self._process.join(DEADLINE)
        if self._process.is_alive():
            self.kill()
            raise AssertionError(f"the job did not end:\n{self.log[-3000:]}")
        self._reader.join(DEADLINE)
        return self._process.exitcode

    def finish(self) -> str:
        """Wait for a good end; the log."""
        assert self.status() == 0, self.log[-4000:]
        return self.log


def _job(words: List[str], environment: Dict[str, str], cwd: str, output) -> None:
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    for name in [name for name in os.environ if name.startswith("CODISTILL_")]:
        del os.environ[name]
    become(words, environment, cwd)


def become(words: List[str], environment: Dict[str, str], cwd: str) -> None:
    """In a process of `fork_server`: be the command `words`."""
    assert "preload" in sys.modules, "the server was not started by fork_server()"
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # what a command finds, for its data loader's workers
    sys.argv = words
    runpy.run_module("fairseq_cli." + words[0].replace("fairseq-", "").replace("-", "_"), run_name="__main__")


def command(
    *words: object, environment: Optional[Dict[str, str]] = None, cwd: Optional[Path] = None, status: int = 0,
    first: Optional[Path] = None,
) -> str:  # fmt: skip
    """Run an installed command of this interpreter's environment from nothing; what it printed. `first`: of its PATH."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODISTILL_")}
    clean.update(environment or {})
    clean["PATH"] = os.pathsep.join([*([str(first)] if first else []), str(Path(sys.executable).parent), clean["PATH"]])
    program = shutil.which(str(words[0]), path=clean["PATH"])
    assert program, f"{words[0]} is not installed"
    done = subprocess.run(
        [program, *map(str, words[1:])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        text=True, env=clean, cwd=cwd, timeout=DEADLINE,
    )  # fmt: skip
    assert done.returncode == status, f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def train_words(data: Path, save_dir: Path, *options: str, model: str = MODEL) -> List[str]:
    words = ["fairseq-train", str(data), "--save-dir", str(save_dir), *model.split(), *TRAINING.split()]
    for option in options:
        words += option.split()
    return words + (["--user-dir", str(PLUGIN)] if "codistill" in " ".join(options) else [])


def train(data: Path, save_dir: Path, *options: str, model: str = MODEL, environment=None) -> str:
    """Train one job alone to its end; the log."""
    return Job(train_words(data, save_dir, *options, model=model), environment).finish()


def peer_environment(peer: int, peers: int, exchange: Path) -> Dict[str, str]:
    return {"CODISTILL_PEER": str(peer), "CODISTILL_PEERS": str(peers), "CODISTILL_DIR": str(exchange)}


def start_peers(data: Path, out: Path, *options: str, peers: int = 2, model: str = MODEL) -> List[Job]:
    """Start the peers of one run side by side, with seeds far apart; output in OUT/peer{i}, exchange in OUT/exchange."""
    return [
        Job(
            train_words(data, out / f"peer{i}", *options, f"--seed {1 + 10_000_000 * i}", model=model),
            peer_environment(i, peers, out / "exchange"),
        )
        for i in range(peers)
    ]


def train_peers(data: Path, out: Path, *options: str, peers: int = 2, model: str = MODEL) -> List[str]:
    """Train the peers of one run to their end; their logs."""
    return [job.finish() for job in start_peers(data, out, *options, peers=peers, model=model)]


def start_group(data: Path, save_dir: Path, *options: str, ranks: int = 2, model: str = MODEL, environment=None) -> List[Job]:
    """Start one data-parallel group of CPU processes, which all_reduce their gradients over gloo."""
    port = free_port()
    group = "--distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp"
    group += f" --distributed-world-size {ranks} --distributed-init-method tcp://127.0.0.1:{port}"
    words = train_words(data, save_dir, *options, group, model=model)
    return [Job([*words, "--distributed-rank", str(rank)], environment) for rank in range(ranks)]


def rows(log: str, tag: str) -> List[Dict[str, float]]:
    """The JSON lines of one kind (train_inner, train, valid) in a fairseq log."""
    found = []
    for line in log.splitlines():
        _, _, tail = line.partition(f"| {tag} | ")
        if tail.startswith("{"):
            found.append({name: float(value) for name, value in json.loads(tail).items() if value is not None})
    return found


def column(log: str, tag: str, name: str) -> List[float]:
    return [row[name] for row in rows(log, tag) if name in row]


def taught(log: str) -> List[float]:
    """The codistillation losses of the updates that were taught."""
    return column(log, "train_inner", "codistill_loss")


def checkpoint(path: Path) -> Dict:
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    from fairseq_codistill import compat

    compat.allow_checkpoint_classes()
    return load_checkpoint_to_cpu(str(path))


def weights(path: Path) -> Dict[str, torch.Tensor]:
    return checkpoint(path)["model"]


def same(left: Dict[str, torch.Tensor], right: Dict[str, torch.Tensor]) -> bool:
    """Equal to the bit, but for the one number that stock fairseq leaves uninitialised."""
    names = [name for name in left if not name.endswith("_float_tensor")]
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in names)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_corpus(folder: Path, seed: int = 1, words: int = 40) -> None:
    """Sentences of random words; the target is the source backwards, in capitals."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    folder.mkdir(parents=True)
    for split, count in (("train", 200), ("valid", 30), ("test", 30)):
        with open(folder / f"{split}.a", "w") as source, open(folder / f"{split}.b", "w") as target:
            for _ in range(count):
                sentence = [draw.choice(vocabulary) for _ in range(draw.randint(3, 9))]
                source.write(" ".join(sentence) + "\n")
                target.write(" ".join(reversed(sentence)).upper() + "\n")


def preprocess(raw: Path, out: Path, *options: str, suffix: str = "") -> Path:
    parts = [word for split in ("train", "valid", "test") for word in (f"--{split}pref", f"{raw / split}{suffix}")]
    Job(["fairseq-preprocess", "--destdir", str(out), "--workers", "1", *options, *parts]).finish()
    return out
