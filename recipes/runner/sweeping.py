"""Many runs of a recipe's train.sh and evaluate.sh, a few at a time, for text and images alike."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Optional, Sequence

from paths import user_path

from .runs import Run, find, read_runs
from .tasks import FILE, ROOT, Task, read_recipe, read_task


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


class Pool(Scripts):
    """Runs a recipe's scripts for each run, one after another."""

    def __init__(self, recipe: Path, data: Path, out: Path, scripts: Sequence[str], scored: str = "") -> None:
        """``scored``: the file of a run that says that evaluate.sh has nothing left to do."""
        super().__init__()
        self.recipe, self.data, self.out, self.scripts, self.scored = recipe, data, out, scripts, scored

    def work(self, run: Run) -> str:
        """Train and score one run; returns what went wrong, in one line, or nothing."""
        folder = run.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        for script in self.scripts:
            is_score = script == "evaluate.sh"
            if is_score and self.scored and (folder / self.scored).exists():
                continue
            command = ["bash", self.recipe / script] + [folder] * is_score
            environment = {"PYTHON": sys.executable, **run.environment(self.data, self.out)}
            status = self.run(command, environment, folder / "sweep.log")
            if status:
                return f"{script} ended with status {status}, see {folder / 'sweep.log'}"
        return ""


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


def collect(runs: Sequence[Run], task: Task, data: Path, out: Path, results: Path) -> int:
    """Copy commands, logs and scores of the runs that are done to ``results``; returns the number of files.

    A log above the task's ``large_log_bytes`` is gzipped. Local paths become DATA, OUT, ENV and ``.``, the repository.
    """
    count, largest = 0, task.sweep.get("large_log_bytes", sys.maxsize)
    results.mkdir(parents=True, exist_ok=True)
    (results / "data.json").write_bytes((data / task.sweep["data"]).read_bytes())
    for run in runs:
        folder = run.folder(out)
        if not (folder / task.sweep["kept_after"]).exists():
            continue
        for path in _kept(folder, task.sweep["kept"]):
            text = without_paths(path.read_text(encoding="utf-8", errors="replace"), data, out).encode("utf-8")
            target = results / path.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            zipped = target.with_name(target.name + ".gz")
            for stale in (target, zipped):
                stale.unlink(missing_ok=True)
            if path.suffix == ".log" and len(text) > largest:
                zipped.write_bytes(gzip.compress(text, mtime=0))  # no time inside: the same log gives the same bytes
            else:
                target.write_bytes(text)
            count += 1
    return count


def _kept(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(folder.glob(pattern))


def _parser(task: Task, program: str) -> argparse.ArgumentParser:
    text = f"Many runs of a recipe's train.sh and evaluate.sh, a few at a time ({task.name})."
    parser = argparse.ArgumentParser(prog=program, description=text)
    parser.add_argument("--recipe", type=user_path, required=True, help="folder with train.sh and evaluate.sh")
    parser.add_argument("--data", type=user_path, required=True, help=f"{task.sweep['data_is']}, as the recipe's README tells")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the runs, OUT/NAME/seedN")
    parser.add_argument("--runs", type=user_path, help="file of runs (default: the recipe's runs.toml)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these, only some")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    jobs = task.sweep["jobs"]
    parser.add_argument("--jobs", type=int, default=jobs, help=f"trainings at a time; each peer is one (default: {jobs})")
    parser.add_argument("--no-evaluate", action="store_true", help="train only, as for tuning on valid")
    parser.add_argument("--results", type=user_path, help="copy logs and scores there; with --jobs 0 nothing is trained")
    return parser


def main(argv: Optional[Sequence[str]] = None, task_name: str = "", program: str = "run.py sweep") -> int:
    """Command line; the exit status is 1 if a run failed, 2 for bad input, 130 or 143 when stopped.

    ``task_name``: of a recipe that does not say it; else its recipe.toml counts.
    """
    try:
        task = read_task(task_name) if task_name else _task_of(argv)
        args = _parser(task, program).parse_args(argv)
        runs = _checked(args, task)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    scripts = ["train.sh"] if args.no_evaluate else ["train.sh", "evaluate.sh"]
    data, out = args.data.resolve(), args.out.resolve()
    pool = Pool(args.recipe.resolve(), data, out, scripts, task.sweep["scored"])
    with pool.stopped_by_signals():
        failed = sweep(runs, pool, args.jobs) if args.jobs else {}
    if pool.stopped_by:
        print("stopped; the same command goes on from the last checkpoints", flush=True)
        return 128 + pool.stopped_by
    if args.results:
        print(f"{args.results}: {collect(runs, task, data, out, args.results)} files")
    return 1 if failed else 0


def _checked(args: argparse.Namespace, task: Task) -> List[Run]:
    """The runs, once everything else is fit for them; ``ValueError`` otherwise."""
    runs = read_runs(find(args.recipe, args.runs), task, args.seeds, args.only)
    if args.jobs < 0 or (args.jobs == 0 and not args.results):
        raise ValueError(f"--jobs must be at least 1, or 0 with --results, but is {args.jobs} instead")
    if not (args.data / task.sweep["data"]).is_file():
        raise ValueError(f"--data must be {task.sweep['data_is']}, but {args.data} has no {task.sweep['data']}")
    if not (args.recipe / "train.sh").is_file():
        raise ValueError(f"--recipe must be a folder with a train.sh, but {args.recipe} has none")
    return runs


def _task_of(argv: Optional[Sequence[str]]) -> Task:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe", type=user_path)
    recipe = parser.parse_known_args(argv)[0].recipe
    return read_recipe(recipe).task if recipe and (recipe / FILE).is_file() else read_task("translation")
