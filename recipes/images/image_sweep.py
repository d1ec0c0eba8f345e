"""Many runs of a recipe's train.sh, each scored: ``python recipes/images/image_sweep.py --recipe recipes/fashion_mnist …``.

A line of the recipe's runs.txt is a name and variables of train.sh. As many jobs run at a time as --jobs says, a codistilling
peer counting as one. Stopped by Ctrl-C, SIGTERM or worse, the same command goes on where it was: what is finished and scored
is skipped. ``--results DIR`` copies what deserves to be kept (logs, scores, commands; no weights), without local paths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from sweeping import Scripts, sweep  # noqa: E402


@dataclass(frozen=True)
class Run:
    """One line of the runs file with one seed."""

    name: str
    seed: int
    variables: Tuple[str, ...]  # NAME=VALUE, as train.sh knows them

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


def read_runs(path: Path, seeds: Sequence[int], only: Sequence[str]) -> List[Run]:
    """The runs of a file, all with the first seed before any with the second. Quotes are as in a shell.

    `SEEDS=1` in a line: for these seeds only. Raises ``ValueError`` for a line that is none, or a name that is not there.
    """
    known = set(re.findall(r"\$\{([A-Z_]+):-", (HERE / "train.sh").read_text(encoding="utf-8"))) | {"SEEDS"}
    lines: Dict[str, List[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        for word in words[1:]:
            variable, equals, _ = word.partition("=")
            if not equals or variable not in known - {"NAME", "SEED", "DATA", "OUT"}:
                raise ValueError(f"{path}:{number}: {word} must be VARIABLE=VALUE with a variable that train.sh reads")
        if words[0] in lines or "=" in words[0] or "/" in words[0]:
            raise ValueError(f"{path}:{number}: must begin with a new name, but begins with {words[0]}")
        lines[words[0]] = words[1:]
    if unknown := set(only) - set(lines):
        raise ValueError(f"--only must name runs of {path} ({', '.join(lines)}), but has {', '.join(sorted(unknown))}")
    chosen = [name for name in lines if not only or name in only]
    return [run for seed in seeds for name in chosen for run in _run(name, seed, lines[name])]


def _run(name: str, seed: int, words: Sequence[str]) -> List[Run]:
    limits = [word.split("=", 1)[1] for word in words if word.startswith("SEEDS=")]
    if limits and str(seed) not in limits[0].split(","):
        return []
    return [Run(name, seed, tuple(word for word in words if not word.startswith("SEEDS=")))]


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


class Pool(Scripts):
    """Trains and scores runs, as many jobs at a time as there are slots."""

    def __init__(self, recipe: Path, data: Path, out: Path, jobs: int) -> None:
        super().__init__()
        self.recipe, self.data, self.out = recipe, data, out
        self._slots = Slots(jobs)

    def work(self, run: Run) -> str:
        """Train and score one run; returns what went wrong, in one line, or nothing."""
        folder = run.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **run.own, "NAME": run.name, "SEED": str(run.seed)}
        environment.update(DATA=str(self.data), OUT=str(self.out))
        cpu = ["--cpu"] if os.environ.get("CPU", run.own.get("CPU", "1")) != "0" else []
        score = [sys.executable, HERE / "evaluate.py", folder, "--data", self.data, *cpu]
        with self._slots.taken(run.jobs):
            steps = [] if (folder / "finished").exists() else [["bash", self.recipe / "train.sh"]]
            steps += [] if (folder / "scores.json").exists() else [score]
            for step in steps:
                status = self.run(step, environment, folder / "sweep.log")
                if status:
                    return f"{Path(step[1]).name} ended with status {status}, see {folder / 'sweep.log'}"
        return ""


def collect(runs: Sequence[Run], pool: Pool, results: Path) -> int:
    """Copy commands, logs and scores of the scored runs to ``results``; returns the number of files.

    Local paths become DATA, OUT, ENV and ``.``, the repository.
    """
    count = 0
    described = json.loads((pool.data / "images.json").read_text(encoding="utf-8"))
    (results / "data.json").parent.mkdir(parents=True, exist_ok=True)
    (results / "data.json").write_text(json.dumps(described) + "\n", encoding="utf-8")
    for run in runs:
        folder = run.folder(pool.out)
        if not (folder / "scores.json").exists():
            continue
        for path in [folder / "command.txt", folder / "scores.json", *sorted(folder.glob("peer*/train.log"))]:
            target = results / path.relative_to(pool.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_without_paths(path.read_text(encoding="utf-8", errors="replace"), pool), encoding="utf-8")
            count += 1
    return count


def _without_paths(text: str, pool: Pool) -> str:
    places = {pool.data: "DATA", pool.out: "OUT", Path(sys.prefix): "ENV", ROOT: ".", Path.home(): "HOME"}
    for place in sorted(places, key=lambda place: -len(str(place))):
        text = text.replace(str(place), places[place])
    return text


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, required=True, help="folder with train.sh and runs.txt")
    parser.add_argument("--data", type=Path, required=True, help="folder made by data_prep/images.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--runs", type=Path, help="default: the recipe's runs.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time; each peer is one")
    parser.add_argument("--results", type=Path, help="copy logs and scores there; with --jobs 0 nothing is trained")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs or args.recipe / "runs.txt", args.seeds, args.only)
        if not (args.data / "images.json").is_file():
            raise ValueError(f"--data must be a folder made by data_prep/images.py, but {args.data} has no images.json")
    except ValueError as error:
        print(f"image_sweep.py: {error}", file=sys.stderr)
        return 2
    pool = Pool(args.recipe.resolve(), args.data.resolve(), args.out.resolve(), max(1, args.jobs))
    with pool.stopped_by_signals():
        failed = sweep(runs, pool, max(1, len(runs))) if args.jobs else {}
    if pool.stopped_by:
        return 128 + pool.stopped_by
    if args.results:
        print(f"{args.results}: {collect(runs, pool, args.results)} files")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
