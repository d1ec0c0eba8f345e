"""Everything that needs a GPU, in one command: tests, step ratios, the cost of an exchange, and a real training.

    make gpu                              in the environment of `make install`, with a CUDA build of torch
    make gpu WHEELS=FOLDER                on a machine that has torch and reaches no registry
    make gpu DRY_RUN=1                    shows every command

Parts are run one after the other, each within its minutes; one that fails or is cut short does not stop the others, and
what it wrote stays. Everything goes to RESULTS: logs, tables, and summary.md.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
STEP = ("cross_entropy", "codistill_ce:2:ce", "codistill_ce:2:mse", "codistill_ce:4:ce")
STEP_OF_IMAGES = ("cross_entropy", "codistill_ce:2:ce", "codistill_ce:2:mse")


class Part(NamedTuple):
    """One command. `minutes`: when it is stopped. `result`: a file of RESULTS that the summary shows."""

    name: str
    words: List[str]
    minutes: float
    result: Optional[str] = None


def parts(results: Path, work: Path, data: Optional[Path], minutes: float) -> List[Part]:
    """Tests first, then what is timed, while nothing else runs; the training gets what is left of `minutes`."""
    python = [sys.executable]
    files = [str(ROOT / "tests" / name) for name in ("test_gpu.py", "test_fused.py")]
    tests = python + ["-m", "pytest", "-q", "-n", "4", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5", *files]
    found = [Part("tests", tests, 6)]
    for setting, methods in (("transformer_base", STEP), ("transformer_big", STEP), ("resnet50", STEP_OF_IMAGES)):
        name = f"step_{setting}"
        words = python + ["-m", "benchmarks.step.measure", "--setting", setting, "--methods", *methods, "--rounds", "7"]
        words += ["--out", str(results / f"{name}.json"), "--note", "make gpu"]
        found.append(Part(name, words, 2.5, f"{name}.md"))
    words = python + ["-m", "benchmarks.exchange.speed", "--gpu", "--tokens", "2000", "--out", str(work / "exchange")]
    words += ["--interval", "50", "--pairs", "5", "--results", str(results / "exchange")]
    found.append(Part("exchange", words, 3, "exchange/results.txt"))
    if data:
        left = max(2.0, minutes - sum(part.minutes for part in found[1:]) - 2)
        tatoeba = ROOT / "recipes/tatoeba_de_en"
        sweep = [str(ROOT / "recipes/run.py"), "sweep", "--recipe", str(tatoeba), "--runs", str(tatoeba / "gpu.toml")]
        sweep += ["--no-evaluate"]
        sweep += ["--seeds", "1", "--jobs", "8", "--data", str(data), "--out", str(work / "runs")]
        sweep += ["--results", str(results / "training")]
        found.append(Part("training", python + sweep, left))
        report = ["-m", "fairseq_codistill.report", str(results / "training"), "--out", str(results / "training/report")]
        found.append(Part("training_table", python + report, 1, "training/report/table.md"))
    return found


def run(part: Part, results: Path, environ: Dict[str, str]) -> str:
    """Runs it, with its output in RESULTS/NAME.log; one line on how it ended."""
    start = time.monotonic()
    with open(results / f"{part.name}.log", "wb") as log:
        process = subprocess.Popen(
            part.words, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(part.minutes * 60)
            end = "done" if status == 0 else f"ended with {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with all that it started
            process.wait()
            end = f"stopped after {part.minutes:g} min"
    return f"{part.name}: {end}, {time.monotonic() - start:.0f} s"


def summary(ends: Sequence[str], found: Sequence[Part], results: Path) -> str:
    """Markdown: the machine, how each part ended, its table."""
    import torch

    lines = [f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", ""]
    lines += [f"- {end}" for end in ends]
    tail = (results / "tests.log").read_text(errors="replace").strip().splitlines() if (results / "tests.log").exists() else []
    lines += [f"- tests: {tail[-1].strip('= ')}"] if tail else []
    for part in found:
        path = results / part.result if part.result else None
        if path and path.exists():
            lines += ["", f"## {part.name}", "", path.read_text(encoding="utf-8").strip()]
    return "\n".join(lines) + "\n"


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("gpu-results"), help="folder for logs and tables")
    parser.add_argument("--work", type=Path, default=Path("gpu-runs"), help="folder for data and checkpoints, large")
    parser.add_argument(
        "--data", type=Path, help="a folder made by data_prep/prepare.py tatoeba_de_en; without it nothing is trained"
    )
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args(argv)
    results, work = args.results.absolute(), args.work.absolute()
    found = parts(results, work, args.data.absolute() if args.data else None, args.minutes)
    if unknown := set(args.only or ()) - {part.name for part in found}:
        parser.error(f"--only must name parts ({', '.join(part.name for part in found)}), but has {', '.join(sorted(unknown))}")
    found = [part for part in found if not args.only or part.name in args.only]
    if args.dry_run:
        print("\n".join(f"# {part.name}, at most {part.minutes:g} min\n{shlex.join(part.words)}" for part in found))
        return 0
    if args.data and not (args.data / "bin").is_dir():
        parser.error(f"--data must be a folder made by data_prep/prepare.py, but {args.data} has no bin/")
    import torch

    if not torch.cuda.is_available():
        parser.error("torch must find a GPU, but finds none; did you install a CUDA build? --dry-run shows the commands")
    results.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    ends = []
    for part in found:
        print(f"{part.name} …", flush=True)
        ends.append(run(part, results, dict(os.environ)))
        print(ends[-1], flush=True)
        (results / "summary.md").write_text(summary(ends, found, results), encoding="utf-8")
    print((results / "summary.md").read_text(encoding="utf-8"))
    return 0 if all(": done" in end for end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
