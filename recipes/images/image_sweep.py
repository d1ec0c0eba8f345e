"""Many runs of a recipe's train.sh, each scored: ``python recipes/images/image_sweep.py --recipe recipes/fashion_mnist …``.

A line of the recipe's runs.txt is a name and variables of train.sh. As many trainings run at a time as --jobs says, each
codistilling peer counting as one. Stopped by Ctrl-C, SIGTERM or worse, the same command goes on where it was: what is
finished and scored is skipped. ``--results DIR`` copies what deserves to be kept (logs, scores, commands; no weights), with
local paths taken out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from paths import user_path  # noqa: E402
from sweeping import Run, Scripts, read_runs, sweep, without_paths  # noqa: E402

TRAIN = HERE / "train.sh"

class Pool(Scripts):
    """Runs a recipe's train.sh and evaluate.py for each run, one after the other."""

    def __init__(self, recipe: Path, data: Path, out: Path) -> None:
        super().__init__()
        self.recipe, self.data, self.out = recipe, data, out

    def work(self, run: Run) -> str:
        """Train and score one run; returns what went wrong, in one line, or nothing."""
        folder = run.folder(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        environment = run.environment(self.data, self.out)
        cpu = ["--cpu"] if os.environ.get("CPU", run.own.get("CPU", "1")) != "0" else []
        score = [sys.executable, HERE / "evaluate.py", folder, "--data", self.data, *cpu]
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
            text = without_paths(path.read_text(encoding="utf-8", errors="replace"), pool.data, pool.out)
            target.write_text(text, encoding="utf-8")
            count += 1
    return count


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=user_path, required=True, help="folder with train.sh and runs.txt")
    parser.add_argument("--data", type=user_path, required=True, help="folder made by data_prep/images.py")
    parser.add_argument("--out", type=user_path, required=True, help="folder for the runs")
    parser.add_argument("--runs", type=user_path, help="default: the recipe's runs.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time; each peer is one")
    parser.add_argument("--results", type=user_path, help="copy logs and scores there; with --jobs 0 nothing is trained")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(args.runs or args.recipe / "runs.txt", TRAIN, args.seeds, args.only)
        if not (args.data / "images.json").is_file():
            raise ValueError(f"--data must be a folder made by data_prep/images.py, but {args.data} has no images.json")
    except ValueError as error:
        print(f"image_sweep.py: {error}", file=sys.stderr)
        return 2
    pool = Pool(args.recipe.resolve(), args.data.resolve(), args.out.resolve())
    with pool.stopped_by_signals():
        failed = sweep(runs, pool, args.jobs) if args.jobs else {}
    if pool.stopped_by:
        return 128 + pool.stopped_by
    if args.results:
        print(f"{args.results}: {collect(runs, pool, args.results)} files")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
