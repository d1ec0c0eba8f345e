"""How the price of teachers grows: with their number, V, the batch, the share of updates that are taught, and the interval.

    python -m benchmarks.step.scaling --out benchmarks/results/step \\
        --exchanges benchmarks/results/exchange_speed/interval_*/results.json

Writes scaling.json, scaling.md and scaling.png. For each point a step with teachers and one without take turns, as in
measure.py, in one process. The floor is arithmetic's: of the multiplications of a plain step (forward, and twice that
backward) each teacher adds the forward's share, a third, and nothing else costs anything. What an exchange costs cannot be
seen in one process: those points were measured by benchmarks.exchange.speed, against the same peers without exchanges.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, Sequence, Tuple

from benchmarks.step import measure as step  # sets the number of threads before torch is imported
from benchmarks.step.method import SETTINGS, Method, Setting, Step, write_data

# What is varied, its values, and what is changed for a value.
SWEEPS: Dict[str, Tuple[int, ...]] = {
    "peers": (2, 3, 4, 6, 8),
    "vocabulary": (2000, 8000, 32000),
    "tokens": (500, 2000, 4000),
    "every": (1, 2, 4),
}
LABELS = {
    "peers": "number of peers n", "vocabulary": "words in the dictionary, V", "tokens": "tokens in a batch",
    "every": "of so many updates one is taught",
}  # fmt: skip
EXCHANGES = "updates between exchanges, N"
DTYPES = ("fp32", "bf16")


def point(sweep: str, value: int, dtype: str) -> Tuple[Setting, Method]:
    setting, method = SETTINGS["transformer"], Method("codistill_ce", 2, "ce", dtype)
    if sweep in ("vocabulary", "tokens"):
        return dataclasses.replace(setting, **{sweep: value}), method
    return setting, method._replace(**{sweep: value})


def floor(method: Method) -> float:
    """Step time over that of a plain step, if only multiplications took time."""
    return 1 + (method.peers - 1) / 3 / method.every


def measure(sweep: str, value: int, rounds: int, folder: Path) -> Dict[str, float]:
    """Ratio to cross_entropy of each precision: median and quartiles; and the floor. `folder`: for data, made once."""
    setting, method = point(sweep, value, DTYPES[0])
    place = folder / str(setting.vocabulary)
    data = place / "bin" if place.exists() else write_data(setting, place)
    steps = {"cross_entropy": Step(setting, Method("cross_entropy"), data)}
    steps.update({dtype: Step(setting, method._replace(dtype=dtype), data) for dtype in DTYPES})
    ratios = step.ratios(step.measure(steps, rounds, max(2, method.every), warm_up=2), "cross_entropy")
    row: Dict[str, float] = {"value": value, "floor": floor(method)}
    for dtype in DTYPES:
        row.update({f"{dtype}_{name}": number for name, number in ratios[dtype].items()})
    return row


def exchange_cost(file: Path) -> Dict[str, float]:
    """A result of benchmarks.exchange: its interval, step time with exchanges over that without, and the standard error."""
    result = json.loads(file.read_text())
    values = [1 / speed for peer in result["ratios"] for speed in peer]
    error = statistics.stdev(values) / len(values) ** 0.5
    return {"value": result["settings"]["interval"], "ratio": statistics.mean(values), "error": error}


def draw(results: Dict[str, List[Dict[str, float]]], exchanges: List[Dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = len(results) + bool(exchanges)
    figure, axes = pyplot.subplots(1, panels, figsize=(3.3 * panels, 3.2), squeeze=False)
    for axis, (sweep, rows) in zip(axes[0], results.items()):
        values = [row["value"] for row in rows]
        for dtype, colour in zip(DTYPES, ("tab:blue", "tab:orange")):
            axis.plot(values, [row[f"{dtype}_median"] for row in rows], "o-", color=colour, label=f"peers in {dtype}")
            bounds = [[row[f"{dtype}_{bound}"] for row in rows] for bound in ("low", "high")]
            axis.fill_between(values, *bounds, color=colour, alpha=0.2, linewidth=0)
        axis.plot(values, [row["floor"] for row in rows], "k--", label="floor of the arithmetic")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        if sweep != "peers":
            axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(LABELS[sweep])
        axis.set_ylim(bottom=0.5)
    if exchanges:
        axis, values = axes[0][-1], [row["value"] for row in exchanges]
        heights, errors = ([row[name] for row in exchanges] for name in ("ratio", "error"))
        axis.errorbar(values, heights, errors, fmt="o-", capsize=3, color="tab:green")
        axis.axhline(1.0, color="k", linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.set_xlabel(EXCHANGES)
        axis.set_ylabel("step / step without exchanges")
    axes[0][0].set_ylabel("step / step of cross_entropy")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def table(results: Dict[str, List[Dict[str, float]]], exchanges: Sequence[Dict[str, float]] = ()) -> List[str]:
    lines = ["| varied | value | " + " | ".join(f"peers in {dtype}" for dtype in DTYPES) + " | floor |"]
    lines.append("| --- | ---: | " + "---: | " * len(DTYPES) + "---: |")
    for sweep, rows in results.items():
        for row in rows:
            cells = [f"{row[f'{d}_median']:.2f} ({row[f'{d}_low']:.2f} … {row[f'{d}_high']:.2f})" for d in DTYPES]
            lines.append(f"| {LABELS[sweep]} | {row['value']} | {' | '.join(cells)} | {row['floor']:.2f} |")
    if exchanges:
        lines += ["", f"| {EXCHANGES} | step / step without exchanges (standard error) |", "| ---: | ---: |"]
        lines += [f"| {row['value']} | {row['ratio']:.3f} ± {row['error']:.3f} |" for row in exchanges]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for scaling.json, scaling.md and scaling.png")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--exchanges", type=Path, nargs="+", default=[], metavar="FILE", help="of benchmarks.exchange.speed")
    parser.add_argument("--go-on", action="store_true", help="keep the points that are in --out already")
    args = parser.parse_args()
    step.quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "scaling.json"
    results = json.loads(file.read_text())["ratios"] if args.go_on and file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sweeps:
            rows = results.setdefault(name, [])
            for value in SWEEPS[name]:
                if all(row["value"] != value for row in rows):
                    rows.append(measure(name, value, args.rounds, Path(folder)))
                    file.write_text(json.dumps({"machine": step.machine(), "ratios": results}, indent=1) + "\n")
    results = {sweep: results[sweep] for sweep in SWEEPS if sweep in results}
    exchanges = sorted((exchange_cost(file) for file in args.exchanges), key=lambda row: row["value"])
    lines = [f"Step time over that of cross_entropy; {step.machine()}", "", *table(results, exchanges)]
    (args.out / "scaling.md").write_text("\n".join(lines) + "\n")
    draw(results, exchanges, args.out / "scaling.png")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
