"""Many runs of a recipe's train.sh and evaluate.sh, a few at a time:

    python recipes/translation/sweep.py --recipe recipes/RECIPE --data PREPARED --out RUNS --jobs 4

Stopped by Ctrl-C, SIGTERM or worse, the same command goes on where it was: what is finished and scored is skipped.
``--results DIR`` copies what deserves to be kept (logs, scores, commands; no weights), with local paths taken out.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Optional

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from paths import user_path  # noqa: E402
from sweeping import Run, Scripts, read_runs, sweep, without_paths  # noqa: E402

TRAIN = HERE / "train.sh"
LARGE_LOG_BYTES = 200_000


class Pool(Scripts):
    """Runs a recipe's scripts for each run, one after another."""

    def __init__(self, recipe: Path, data: Path, out: Path, scripts: Sequence[str]) -> None:
        super().__init__()
        self.recipe, self.data, self.out, self.scripts = recipe, data, out, scripts

    def work(self, run: Run) -> str:
        """Train and score one run; returns what went wrong, in one line, or nothing."""
        folder = run.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        for script in self.scripts:
            command = ["bash", self.recipe / script] + [folder] * (script == "evaluate.sh")
            status = self.run(command, run.environment(self.data, self.out), folder / "sweep.log")
            if status:
                return f"{script} ended with status {status}, see {folder / 'sweep.log'}"
        return ""


def collect(runs: Sequence[Run], pool: Pool, results: Path) -> int:
    """Copy commands, logs and scores of the finished runs to ``results``; returns the number of files.

    A log above ``LARGE_LOG_BYTES`` is gzipped. Local paths become DATA, OUT, ENV and ``.``, the repository.
    """
    count = 0
    shutil.copyfile(pool.data / "manifest.json", _parent_made(results / "data.json"))
    for run in runs:
        folder = run.folder(pool.out)
        if not (folder / "finished").exists():
            continue
        for path in _kept(folder):
            text = without_paths(path.read_text(encoding="utf-8", errors="replace"), pool.data, pool.out).encode("utf-8")
            target = _parent_made(results / path.relative_to(pool.out))
            is_large = path.suffix == ".log" and len(text) > LARGE_LOG_BYTES
            for stale in (target, target.with_name(target.name + ".gz")):
                stale.unlink(missing_ok=True)
            if is_large:
                # No time inside: the same log gives the same bytes.
                target.with_name(target.name + ".gz").write_bytes(gzip.compress(text, mtime=0))
            else:
                target.write_bytes(text)
            count += 1
    return count


def _kept(folder: Path) -> Iterator[Path]:
    yield folder / "command.txt"
    yield from sorted(folder.glob("peer*/train.log"))
    yield from sorted(folder.glob("**/*.sacrebleu.json"))
    yield from sorted(folder.glob("**/*.nll.json"))


def _parent_made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=user_path, required=True, help="folder with train.sh and evaluate.sh")
    parser.add_argument("--data", type=user_path, required=True, help="prepared data, as the recipe's README tells")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the runs, OUT/NAME/seedN")
    parser.add_argument("--runs", type=user_path, help="file of runs (default: the recipe's runs.txt)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these, only some")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time; each peer is one (default: 1)")
    parser.add_argument("--no-evaluate", action="store_true", help="train only, as for tuning on valid")
    parser.add_argument("--results", type=user_path, help="copy logs and scores of the finished runs here")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; the exit status is 1 if a run failed, 2 for bad input, 130 or 143 when stopped."""
    args = _parser().parse_args(argv)
    try:
        if not (args.recipe / "train.sh").is_file():
            raise ValueError(f"--recipe must be a folder with a train.sh, but {args.recipe} has none")
        runs = read_runs(args.runs or args.recipe / "runs.txt", TRAIN, args.seeds, args.only)
        if args.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, but is {args.jobs} instead")
        if not (args.data / "manifest.json").is_file():
            raise ValueError(f"--data must be prepared data, but {args.data} has no manifest.json")
    except (ValueError, OSError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    scripts = ["train.sh"] if args.no_evaluate else ["train.sh", "evaluate.sh"]
    pool = Pool(args.recipe.resolve(), args.data.resolve(), args.out.resolve(), scripts)
    with pool.stopped_by_signals():
        failed = sweep(runs, pool, args.jobs)
    if pool.stopped_by:
        print("stopped; the same command goes on from the last checkpoints", flush=True)
        return 128 + pool.stopped_by
    if args.results:
        print(f"{args.results}: {collect(runs, pool, args.results)} files")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
