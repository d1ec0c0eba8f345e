"""What the sweeps of translation and of images share: files of runs, so many trainings at a time, scripts that end together.

A line of a runs file is a name and variables of train.sh. A line that is named ``*`` is no run: its variables are those of
every run below it, unless the run's own line says otherwise. ``SEEDS=1,2`` in a line: for these seeds only.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Run:
    """One line of the runs file with one seed."""

    name: str
    seed: int
    variables: Tuple[str, ...]  # NAME=VALUE, as train.sh knows them; of two values the later counts

    def folder(self, out: Path) -> Path:
        return out / self.name / f"seed{self.seed}"

    @property
    def own(self) -> Dict[str, str]:
        return dict(variable.split("=", 1) for variable in self.variables)

    @property
    def jobs(self) -> int:
        """How many trainings it is: its peers, if they codistil."""
        own = self.own
        return int(own.get("PEERS", 2)) if own.get("METHOD", "codistill") == "codistill" else 1

    def environment(self, data: Path, out: Path) -> Dict[str, str]:
        return {**os.environ, **self.own, "NAME": self.name, "SEED": str(self.seed), "DATA": str(data), "OUT": str(out)}


def known_variables(script: Path) -> Set[str]:
    """What a train.sh, with what all of them share, reads, less what a sweep sets itself."""
    text = "".join(file.read_text(encoding="utf-8") for file in (script, ROOT / "recipes/training.sh"))
    return set(re.findall(r"\$\{([A-Z_]+):-", text)) - {"NAME", "SEED", "DATA", "OUT"}


def read_runs(path: Path, script: Path, seeds: Sequence[int], only: Sequence[str]) -> List[Run]:
    """The runs of a file, all with the first seed before any with the second. Quotes are as in a shell.

    Raises ``ValueError`` for a line that is none, a variable that ``script`` does not read, a name that is not there.
    """
    known = known_variables(script) | {"SEEDS"}
    lines: Dict[str, List[str]] = {}
    of_all: List[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        for word in words[1:]:
            variable, equals, _ = word.partition("=")
            if not equals or variable not in known:
                raise ValueError(f"{path}:{number}: {word} must be VARIABLE=VALUE with a variable that train.sh reads")
        if words[0] == "*":
            of_all += words[1:]
            continue
        if words[0] in lines or "=" in words[0] or "/" in words[0]:
            raise ValueError(f"{path}:{number}: must begin with a new name, but begins with {words[0]}")
        lines[words[0]] = of_all + words[1:]
    if unknown := set(only) - set(lines):
        raise ValueError(f"--only must name runs of {path} ({', '.join(lines)}), but has {', '.join(sorted(unknown))}")
    chosen = [name for name in lines if not only or name in only]
    return [run for seed in seeds for name in chosen for run in _with_seed(name, seed, lines[name])]


def _with_seed(name: str, seed: int, words: Sequence[str]) -> Iterator[Run]:
    limits = [word.split("=", 1)[1] for word in words if word.startswith("SEEDS=")]
    if not limits or str(seed) in limits[-1].split(","):
        yield Run(name, seed, tuple(word for word in words if not word.startswith("SEEDS=")))


class Slots:
    """So many trainings at a time; a run that needs several waits until they are free together, in order of arrival."""

    def __init__(self, number: int) -> None:
        self._free = self._all = number
        self._changed = threading.Condition()
        self._queue: List[object] = []

    @contextlib.contextmanager
    def taken(self, wanted: int):
        wanted = min(wanted, self._all)
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            self._changed.wait_for(lambda: self._queue[0] is ticket and self._free >= wanted)
            self._queue.pop(0)
            self._free -= wanted
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += wanted
                self._changed.notify_all()


class Scripts:
    """Processes that were started here and have not ended; `stopped_by` is the number of the signal that asked them to."""

    def __init__(self) -> None:
        self.stopped_by = 0
        self._live: set = set()
        self._lock = threading.RLock()  # a second signal may come while `stop` holds it

    def run(self, command: Sequence[object], environment: Mapping[str, str], log: Path) -> int:
        """The exit status of a command whose output is appended to `log`; it is not begun after a signal to stop."""
        with self._lock:
            if self.stopped_by:
                return -signal.SIGTERM
            with open(log, "ab") as out:
                streams = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
                process = subprocess.Popen([*map(str, command)], env=dict(environment), start_new_session=True, **streams)
            self._live.add(process)
        status = process.wait()
        with self._lock:
            self._live.discard(process)
        return status

    def stop(self, number: int, frame: object = None) -> None:
        """A handler of signals: begin nothing more, ask every script to end; codistill-launch passes it on to its peers.

        It raises nothing: an exception could come before the first run is waited for, and nobody would be told to end.
        """
        with self._lock:
            self.stopped_by = self.stopped_by or number
            for process in self._live:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    @contextlib.contextmanager
    def stopped_by_signals(self):
        """SIGTERM and SIGINT `stop` these scripts, also where a shell has started us in the background, deaf to SIGINT."""
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def sweep(runs: Sequence[Run], pool, jobs: int) -> Dict[Run, str]:
    """`pool.work` for each run, `jobs` trainings at a time (each peer is one); returns the runs that failed and why."""
    failed: Dict[Run, str] = {}
    began, slots = time.monotonic(), Slots(jobs)

    def work(run: Run) -> str:
        with slots.taken(run.jobs):
            return pool.work(run)

    with ThreadPoolExecutor(max(1, len(runs))) as executor:
        futures = {executor.submit(work, run): run for run in runs}
        for count, future in enumerate(as_completed(futures), 1):
            run, error = futures[future], future.result()
            if error:
                failed[run] = error
            if not pool.stopped_by:
                so_far = f"[{count}/{len(runs)}, {(time.monotonic() - began) / 60:.1f} min]"
                print(f"{so_far} {run.name} seed {run.seed}: {error or 'done'}", flush=True)
    return failed


def without_paths(text: str, data: Path, out: Path) -> str:
    """A log or a command as it may be committed: local paths become DATA, OUT, ENV, ~ and ``.``, the repository."""
    names = {str(data): "DATA", str(out): "OUT", str(ROOT): ".", sys.prefix: "ENV", str(Path.home()): "~"}
    # The longest first, because one may lie inside another; "/" and "/usr" would spoil every other path.
    for path in sorted((path for path in names if path.count("/") > 1), key=len, reverse=True):
        text = text.replace(path, names[path])
    return text
