"""What codistillation costs as users run it: real fairseq-train processes, a core each, with and without teachers.

    python -m benchmarks.step.two_jobs --out WORK --results benchmarks/results/two_jobs
    python -m benchmarks.step.two_jobs --out WORK --arms cross_entropy codistill_ce codistill_ce:fp32 --isa avx2

An arm is two jobs that run at the same time on the same two cores: two of fairseq's `cross_entropy`, two of the fused cross
entropy without a teacher (`fused_ce`: the sceptic's baseline), or two peers that teach each other and exchange. Arms take
turns, in an order that turns with each round, once with the system's malloc and once with a tuned one. Time is fairseq's own,
from the words per second that it logs, after the first updates and while all jobs of an arm still run; a ratio is between
arms of one round.
"""

from __future__ import annotations

import argparse
import ctypes.util
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from fairseq_codistill.common.fairseq_log import parse_records

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("cross_entropy", "fused_ce", "codistill_ce")
BASES = ("cross_entropy", "fused_ce")  # with which the others are compared
DTYPES = ("fp32", "bf16", "fp16", "int8")
# glibc gives large blocks back to the system and clears them anew each time; this keeps them.
_GLIBC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34), "MALLOC_TOP_PAD_": str(1 << 28)}
ISAS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")  # as /proc/cpuinfo says
_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")


class Plan(NamedTuple):
    """What all arms share. `words`: data, task, model and optimizer; the first `skip` updates do not count."""

    words: List[str]
    updates: int
    skip: int
    interval: int
    log_interval: int
    jobs: int = 2


class Speed(NamedTuple):
    """Of one job: seconds for an update, words per second."""

    seconds: float
    wps: float


Rows = Dict[Tuple[str, str], List[float]]  # (malloc, arm) -> seconds of an update in each round, mean over the jobs


def arm_words(arm: str, plan: Plan) -> List[str]:
    """Raises ValueError, in one sentence, for an arm that is none."""
    name, *dtype = arm.split(":")
    if arm == "cross_entropy":
        return ["--criterion", arm]
    plugin = ["--user-dir", str(ROOT / "fairseq_codistill"), "--criterion", "codistill_ce"]
    if arm == "fused_ce":
        return [*plugin, "--codistill-fused-ce"]
    if name != "codistill_ce" or dtype not in ([], *([each] for each in DTYPES)):
        raise ValueError(
            f"An arm must be cross_entropy, fused_ce or codistill_ce[:DTYPE], where a DTYPE is {', '.join(DTYPES)}, "
            f"but is {arm!r}."
        )
    # Teaching from the first exchange on: by default it would grow in over epochs, and be measured only after them.
    peers = [*plugin, "--codistill-alpha-warmup-epochs", "0"]
    peers += ["--codistill-interval", str(plan.interval), "--codistill-wait", "300"]
    return peers + ["--codistill-peer-dtype", *dtype] * bool(dtype)


def start(words: List[str], environment: Dict[str, str], log: Path, cores: int) -> Any:
    """A fairseq-train of its own, on the first `cores` cores that this process may use; `wait()` gives its exit status."""
    allowed = set(sorted(os.sched_getaffinity(0))[:cores])
    with open(log, "wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fairseq_cli.train", *words[1:]], env={**os.environ, **environment}, stdout=file,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        )  # fmt: skip


def run_arm(arm: str, plan: Plan, out: Path, environment: Dict[str, str]) -> List[Speed]:
    """All jobs of one arm, at the same time; the speed of each. `out`: a new folder."""
    out.mkdir(parents=True)
    logs, running = [], []
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for job in range(plan.jobs):
        words = ["fairseq-train", *plan.words, *arm_words(arm, plan), "--max-update", str(plan.updates)]
        words += ["--seed", str(1000 * job + 1), "--cpu", "--no-save", "--save-dir", str(out / f"job{job}")]
        words += ["--disable-validation", "--log-format", "json", "--log-interval", str(plan.log_interval)]
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
        if arm.startswith("codistill_ce"):
            own.update(CODISTILL_PEER=str(job), CODISTILL_PEERS=str(plan.jobs), CODISTILL_DIR=str(out / "exchange"))
        logs.append(out / f"job{job}.log")
        running.append(start(words, {**environment, **own}, logs[-1], plan.jobs))
    for job, log in zip(running, logs):
        status = job.wait()
        if status != 0:
            raise RuntimeError(f"{log} ended with {status}:\n{log.read_text(errors='replace')[-2000:]}")
    return speeds([log.read_text(errors="replace") for log in logs], plan, taught=arm.startswith("codistill_ce"))


def speeds(logs: Sequence[str], plan: Plan, taught: bool) -> List[Speed]:
    """From what fairseq logged, for the updates after `skip` and before the first of the jobs has ended.

    A record tells the words of an update and the words per second since the last record; the updates per second that it tells,
    too, are rounded to two digits. Raises ValueError where a counted update was not `taught`, or none is left.
    """
    jobs, first = [_records(log) for log in logs], plan.skip + plan.log_interval
    first_end = min(records[-1][0] if records else datetime.min for records in jobs)
    result = []
    for records in jobs:
        counted = [values for moment, update, values in records if moment <= first_end and update >= first]
        if not counted:
            raise ValueError(f"no update is left to be timed: --skip is {plan.skip}, of {plan.updates} updates; take more.")
        if taught and not all("codistill_loss" in values for values in counted):
            raise ValueError(f"not every timed update was taught by a peer; --skip is {plan.skip} and must be larger.")
        words = sum(values["wpb"] for values in counted)
        seconds = sum(values["wpb"] / values["wps"] for values in counted)
        result.append(Speed(seconds / len(counted), words / seconds))
    return result


def _records(log: str) -> List[Tuple[datetime, int, Dict[str, float]]]:
    """(when, update, values) of each line that fairseq logs in training."""
    found, moment = [], datetime.min
    for line in log.splitlines():
        stamp = _STAMP.search(line)
        moment = datetime.strptime(stamp[0], "%Y-%m-%d %H:%M:%S") if stamp else moment
        found += [(moment, record.update, record.values) for record in parse_records(line) if record.tag == "train_inner"]
    return found


def mallocs() -> Dict[str, Dict[str, str]]:
    """The system's, and a tuned one: jemalloc or tcmalloc if they are installed, else glibc's with other thresholds."""
    for name in ("jemalloc", "tcmalloc", "tcmalloc_minimal"):
        library = ctypes.util.find_library(name)
        if library and is_loaded(library):
            return {"system": {}, name: {"LD_PRELOAD": library}}
    return {"system": {}, "glibc tuned": dict(_GLIBC)}


def is_loaded(library: str) -> bool:
    """Whether a process that is told to preload `library` does: the dynamic linker only warns where it cannot."""
    look = [sys.executable, "-c", f"print({library!r} in open('/proc/self/maps').read())"]
    done = subprocess.run(look, env={**os.environ, "LD_PRELOAD": library}, capture_output=True, text=True)
    return done.stdout.strip() == "True"


def instruction_sets(isa: str, cpuinfo: str) -> str:
    """What the processor has, by `cpuinfo`, and what it was kept to."""
    names = re.findall(r"model name\s*: (.*)", cpuinfo)
    flags = set(" ".join(re.findall(r"flags\s*: (.*)", cpuinfo)[:1]).split())
    has = [flag for flag in _FLAGS if flag in flags]
    kept = "" if isa == "native" else f"; kept to {isa}"
    return f"{names[0] if names else 'a processor without a name'} ({', '.join(has) or 'none of ' + ', '.join(_FLAGS)}{kept})"


def table(rows: Rows) -> List[str]:
    """Markdown: seconds of an update, and ratios to both baselines of the same malloc, and to cross_entropy of the first; each
    as median (lowest … highest) over the rounds."""
    first = next(iter(rows))[0]
    heads = ["malloc", "arm", "s / update", *(f"/ {base}" for base in BASES), f"/ cross_entropy, {first} malloc"]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for (malloc, arm), seconds in rows.items():
        bases = [rows.get((malloc, base)) for base in BASES] + [rows.get((first, "cross_entropy"))]
        lines.append([malloc, arm, _band(seconds, 3)] + [_ratio(seconds, base) for base in bases])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _ratio(seconds: List[float], base: Any) -> str:
    return _band([mine / other for mine, other in zip(seconds, base)], 2) if base else "–"


def _band(values: List[float], digits: int) -> str:
    if not values:
        return "–"
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"**{middle}** ({low} … {high})"


def measure(plan: Plan, environments: Dict[str, Dict[str, str]], args: Any, machine: str) -> Rows:
    """All rounds. `environments`: of each malloc. What is known is written after each arm: a run may be stopped."""
    arms = list(args.arms)
    rows: Rows = {(malloc, arm): [] for malloc in environments for arm in arms}
    for number in range(args.rounds):
        for malloc, environment in environments.items():
            turn = number % len(arms)
            for arm in [*arms[turn:], *arms[:turn]]:
                out = args.out / f"round{number}" / malloc.replace(" ", "_") / arm.replace(":", "_")
                both = run_arm(arm, plan, out, {**environment, **ISAS[args.isa]})
                rows[malloc, arm].append(statistics.mean(speed.seconds for speed in both))
                print(f"round {number}, {malloc}, {arm}: {rows[malloc, arm][-1]:.3f} s / update", flush=True)
                report(rows, plan, args, machine)
    return rows


def report(rows: Rows, plan: Plan, args: Any, machine: str) -> List[str]:
    shared = plan._asdict()
    del shared["words"]
    lines = [f"{plan.jobs} jobs on {plan.jobs} cores, a thread each: {machine}", "", *table(rows)]
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        seconds = [{"malloc": malloc, "arm": arm, "seconds": values} for (malloc, arm), values in rows.items()]
        result = {"machine": machine, "isa": args.isa, "plan": shared, "seconds": seconds}
        (args.results / "two_jobs.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.results / "two_jobs.md").write_text("\n".join(lines) + "\n")
    return lines


def plan_of(args: Any) -> Plan:
    """With the data made. Imports fairseq."""
    from benchmarks.step.method import SETTINGS, TRAINING, write_data

    setting = dataclasses.replace(SETTINGS["transformer"], vocabulary=args.vocabulary, tokens=args.tokens)
    data = write_data(setting, args.out / "data", sentences=args.sentences)
    words = [str(data), *setting.words.split(), *TRAINING.split(), "--max-tokens", str(setting.tokens)]
    return Plan(words, args.updates, args.skip, args.interval, args.log_interval, args.jobs)


def main(words: Sequence[str] = ()) -> int:
    found = mallocs()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data and logs; must not exist yet")
    parser.add_argument("--results", type=Path, help="folder for two_jobs.json and two_jobs.md")
    parser.add_argument("--arms", nargs="+", default=ARMS, help="cross_entropy, fused_ce, codistill_ce[:DTYPE of the peers]")
    parser.add_argument("--mallocs", nargs="+", choices=found, default=list(found), help="found here: %(choices)s")
    parser.add_argument("--isa", choices=ISAS, default="native", help="keep the processor to these instructions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=100, help="of each job")
    parser.add_argument("--skip", type=int, default=40, help="first updates that are not timed; above --interval")
    parser.add_argument("--interval", type=int, default=25, help="updates between two exchanges")
    parser.add_argument("--log-interval", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--tokens", type=int, default=2000, help="--max-tokens: target tokens in a batch")
    parser.add_argument("--sentences", type=int, default=8000)
    args = parser.parse_args(words or None)
    try:
        for arm in args.arms:
            arm_words(arm, Plan([], 1, 0, 1, 1))
    except ValueError as error:
        parser.error(str(error))
    if args.out.exists() or args.skip <= args.interval or args.updates <= args.skip + args.log_interval:
        parser.error("--out must not exist yet, --skip be above --interval, and --updates above --skip and --log-interval")
    if args.jobs > len(os.sched_getaffinity(0)):
        parser.error(f"--jobs must be at most the {len(os.sched_getaffinity(0))} cores that there are, but is {args.jobs}")
    args.out.mkdir(parents=True)
    machine = instruction_sets(args.isa, Path("/proc/cpuinfo").read_text())
    plan = plan_of(args)
    rows = measure(plan, {name: found[name] for name in args.mallocs}, args, machine)
    print("\n".join(report(rows, plan, args, machine)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
