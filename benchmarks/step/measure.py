"""What does a teacher cost? Training steps with and without, in one process, taking turns, on the same batches.

    python -m benchmarks.step.measure                            the transformer of width 256 on two threads of a CPU
    python -m benchmarks.step.measure --setting lstm_lm --methods cross_entropy codistill_ce:2:ce codistill_ce:2:ce:bf16
    python -m benchmarks.step.measure --out benchmarks/results/step/NAME.json --note "what this measures"

Each round runs every method a few times, in an order that turns, after one step that is not counted: the allocator has
to get used to a method again. A ratio is between neighbours of one round. Memory is measured afterwards, for each method
in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Dict, List, Sequence

METHODS = ("cross_entropy", "codistill_ce:2:mse", "codistill_ce:2:ce", "codistill_ce:4:mse", "codistill_ce:4:ce", "rdrop")
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "2"))  # before torch is imported

import torch  # noqa: E402

from benchmarks.step.method import PARTS, SETTINGS, Method, Setting, Step, write_data  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
Seconds = Dict[str, float]


def measure(steps: Dict[str, Step], rounds: int, repeats: int, warm_up: int = 3) -> Dict[str, List[Seconds]]:
    """For each method its seconds in each round: the mean of the round's repeats."""
    for step in steps.values():
        for _ in range(warm_up):
            step.run()
    names = list(steps)
    rows: Dict[str, List[Seconds]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            steps[name].run()
            runs = [steps[name].run() for _ in range(repeats)]
            rows[name].append({part: statistics.mean(run[part] for run in runs) for part in runs[0]})
    return rows


def ratios(rows: Dict[str, List[Seconds]], base: str) -> Dict[str, Dict[str, float]]:
    """Step time of each method over that of `base`, round by round: median, and the quartiles."""
    table = {}
    for name, runs in rows.items():
        values = [run["step"] / other["step"] for run, other in zip(runs, rows[base])]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        table[name] = {"median": middle, "low": low, "high": high}
    return table


def memory(setting: str, method: str, data: Path, steps: int = 3) -> Dict[str, float]:
    """Megabytes, of a fresh process: resident after set-up, how much more the steps take at most, and peers' weights."""
    command = [sys.executable, "-m", "benchmarks.step.measure", "--memory-of", method, "--setting", setting]
    command += ["--data", data.resolve(), "--rounds", steps]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {method} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_of(setting: Setting, method: Method, data: Path, steps: int) -> Dict[str, float]:
    step = Step(setting, method, data)
    step.run_tiny()  # optimizer state, gradients and libraries are there before what is counted
    weights = sum(p.numel() * p.element_size() for peer in step.peers for p in peer.parameters()) / 1e6
    if setting.needs_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    for _ in range(steps):
        step.run()
    peak = torch.cuda.max_memory_allocated() / 1e6 if setting.needs_gpu else _resident("VmHWM")
    return {"before": before, "step": peak - before, "peers_weights": weights}


def _resident(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux only")


def table(rows: Dict[str, List[Seconds]], memories: Dict[str, Dict[str, float]], base: str) -> List[str]:
    """Markdown. Parts are medians in ms; the step's ratio has its quartiles; memory is what steps add to the set-up."""
    heads, cells = ["method"], {name: [name] for name in rows or memories}
    if rows:
        heads += ["step, ms", f"/ {base}", "/ rdrop", f"{', '.join(PARTS)}, ms"]
        to_base, to_rdrop = ratios(rows, base), ratios(rows, "rdrop") if "rdrop" in rows else {}
    for name, runs in rows.items():
        middle = {part: statistics.median(run[part] for run in runs) * 1e3 for part in runs[0]}
        ratio, rival = to_base[name], to_rdrop.get(name)
        cells[name] += [f"{middle['step']:.0f}", f"**{ratio['median']:.2f}** ({ratio['low']:.2f} … {ratio['high']:.2f})"]
        cells[name] += [f"{rival['median']:.2f}" if rival else "–", " + ".join(f"{middle[part]:.0f}" for part in PARTS)]
    if memories:
        heads += ["memory of a step, MB", f"/ {base}", "peers' weights, MB", f"with them / {base}"]
    for name, one in memories.items():
        plain = memories[base]["step"]
        cells[name] += [f"{one['step']:.0f}", f"{one['step'] / plain:.2f}", f"{one['peers_weights']:.0f}"]
        cells[name] += [f"{(one['step'] + one['peers_weights']) / plain:.2f}"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *cells.values()]
    return ["| " + " | ".join(line) + " |" for line in lines]


def machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{torch.get_num_threads()} threads, {cpu}, torch {torch.__version__}"


def quiet() -> None:
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")


def main(words: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="transformer")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="the first is what the others are compared with")
    parser.add_argument("--rounds", type=int, default=9, help="0: memory only")
    parser.add_argument("--repeats", type=int, default=2, help="steps of a method in a round")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--out", type=Path, help="write what was measured to this JSON file, and the table beside it as .md")
    parser.add_argument("--note", default="", help="a sentence for that file")
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(words or None)
    try:
        methods = {text: Method.parse(text) for text in args.methods}
    except ValueError as error:
        parser.error(str(error))
    setting = SETTINGS[args.setting]
    quiet()
    if setting.needs_gpu and not torch.cuda.is_available():
        print(f"{args.setting} was not measured: it needs a GPU, and torch finds none here.")
        return 0
    if args.memory_of:
        print(json.dumps(memory_of(setting, Method.parse(args.memory_of), args.data, args.rounds)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(setting, Path(folder) / "data")
        began = time.monotonic()
        steps = {name: Step(setting, method, data) for name, method in methods.items()} if args.rounds else {}
        rows = measure(steps, args.rounds, args.repeats)
        memories = {} if args.no_memory else {name: memory(args.setting, name, data) for name in methods}
    lines = [f"{args.setting}: {machine()}; {args.rounds} rounds of {args.repeats}, {time.monotonic() - began:.0f} s", ""]
    lines += table(rows, memories, args.methods[0])
    print("\n".join(lines))
    if args.out:
        result = {"note": args.note, "setting": args.setting, "machine": machine(), "seconds": rows, "memory_mb": memories}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=None) + "\n")
        args.out.with_suffix(".md").write_text("\n".join(([args.note, ""] if args.note else []) + lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
