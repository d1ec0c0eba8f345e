"""Table, claims and figures of a sweep: ``python image_results.py recipes/fashion_mnist --results RESULTS``.

Reads RESULTS/NAME/seedN (scores.json and peer*/train.log, as image_sweep.py collects them), writes table.md, claims.md and
figures beside them. The rule for a verdict was fixed before the runs: see ``verdict``.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from paths import user_path  # noqa: E402
from runner.runs import Run, find, read_runs  # noqa: E402
from runner.tasks import read_task  # noqa: E402

from fairseq_codistill.common.fairseq_log import nll  # noqa: E402
from fairseq_codistill.report.log import TrainLog  # noqa: E402

Curve = List[Tuple[int, float]]


@dataclass
class Result:
    """One name of the runs: its values by seed, each the mean over the peers, as are the curves."""

    name: str
    method: str
    fraction: Fraction
    values: Dict[str, Dict[int, float]] = field(default_factory=dict)  # measure -> seed -> value
    curves: Dict[str, List[Curve]] = field(default_factory=dict)  # measure -> one for each seed

    def add(self, seed: int, measure: str, value: Optional[float]) -> None:
        if value is not None:
            self.values.setdefault(measure, {})[seed] = value


def load(runs: Sequence[Run], results: Path) -> Dict[str, Result]:
    """What has been collected, by name."""
    found: Dict[str, Result] = {}
    for run in runs:
        folder = run.folder(results)
        if not (folder / "scores.json").is_file():
            continue
        method = run.own.get("METHOD", "codistill")
        result = found.setdefault(run.name, Result(run.name, method, Fraction(run.own.get("FRACTION", "1"))))
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        peers = [score for name, score in scores.items() if name.startswith("peer")]
        result.add(run.seed, "test top-1", statistics.mean(score["top1"] for score in peers))
        result.add(run.seed, "test NLL", statistics.mean(score["nll"] for score in peers))
        result.add(run.seed, "ensemble top-1", scores.get("ensemble", {}).get("top1"))
        _add_curves(result, run.seed, sorted(folder.glob("peer*/train.log")))
    return found


def _add_curves(result: Result, seed: int, logs: Sequence[Path]) -> None:
    read = [TrainLog.read(path.read_text(encoding="utf-8").splitlines()) for path in logs]
    curves = {
        "train NLL": _mean([[(u, nll(values)) for u, values in log.train_records()] for log in read]),
        "valid top-1": _mean([[(u, values.get("top1")) for u, values in log.valid_records()] for log in read]),
        "distance": _mean([[(u, values.get("init_distance")) for u, values in log.valid_records()] for log in read]),
    }
    for measure, curve in curves.items():
        result.curves.setdefault(measure, []).append(curve)
        result.add(seed, measure, curve[-1][1] if curve else None)


def _mean(curves: Sequence[List[Tuple[int, Optional[float]]]]) -> Curve:
    """Of curves over the same updates: those that all of them have."""
    values: Dict[int, List[float]] = {}
    for curve in curves:
        for update, value in curve:
            if value is not None:
                values.setdefault(update, []).append(value)
    return [(update, statistics.mean(v)) for update, v in sorted(values.items()) if len(v) == len(curves)]


MEASURES = (("train NLL", 3), ("valid top-1", 2), ("test top-1", 2), ("test NLL", 3), ("ensemble top-1", 2), ("distance", 2))


def table(found: Dict[str, Result]) -> str:
    """A row for each run: mean ± sample standard deviation over seeds, at the last update."""
    lines = ["| run | data | seeds | " + " | ".join(name for name, _ in MEASURES) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(MEASURES))
    for result in found.values():
        cells = [_cell(list(result.values.get(name, {}).values()), digits) for name, digits in MEASURES]
        seeds = len(result.values["test top-1"])
        lines.append(f"| {result.name} | {result.fraction} | {seeds} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


class Claim(NamedTuple):
    """That `measure` of `one` less that of `other` is above 0 (`sign` 1) or below (−1)."""

    figure: str
    says: str
    one: str
    other: str
    measure: str
    sign: int


CLAIMS = (
    Claim("Fig. 1b", "unmodified, codistillation is about 2 points below all_reduce",
          "codistill", "all_reduce", "test top-1", -1),
    Claim("Fig. 1a", "unmodified, its training loss is higher", "codistill", "all_reduce", "train NLL", 1),
    Claim("Fig. 1c", "unmodified, it stays closer to its initialisation", "codistill", "all_reduce", "distance", -1),
    Claim("Fig. 2a", "with less weight decay it gains (the gap of 2 points closes to 0.2)",
          "codistill_reduced", "codistill", "test top-1", 1),
    Claim("Fig. 8a", "even then its training loss is above all_reduce's", "codistill_reduced", "all_reduce", "train NLL", 1),
    Claim("Fig. 12", "with constant weight decay and the shifted schedule it is clearly below all_reduce",
          "codistill_constant", "all_reduce", "test top-1", -1),
    Claim("Fig. 12", "so it is the weight decay that helps, not the shift",
          "codistill_reduced", "codistill_constant", "test top-1", 1),
)  # fmt: skip


def verdict(differences: Sequence[float], sign: int) -> str:
    """`confirmed`: two seeds or more, all with the claimed sign, and their mean is above two standard errors.

    `not confirmed`: as far beyond on the other side, or all seeds there. Else it is too close to call; one seed shows a sign.
    """
    signed = [sign * difference for difference in differences]
    if len(signed) < 2:
        return "one seed: as claimed" if signed and signed[0] > 0 else "one seed: not as claimed" if signed else "not run"
    error = statistics.stdev(signed) / math.sqrt(len(signed))
    mean = statistics.mean(signed)
    if min(signed) > 0 and mean > 2 * error:
        return "confirmed"
    if max(signed) <= 0 or mean < -2 * error:
        return "not confirmed"
    return "too close to call"


def claims(found: Dict[str, Result]) -> str:
    """Each claim of the paper beside the difference that was measured, seed by seed."""
    lines = ["| paper | claim | measured (mean; each seed) | verdict |", "|---|---|---|---|"]
    for claim in CLAIMS:
        differences = _differences(found, claim.one, claim.other, claim.measure)
        shown = f"{claim.measure}, {claim.one} − {claim.other}: " + _signed(differences)
        lines.append(f"| {claim.figure} | {claim.says} | {shown} | {verdict(differences, claim.sign)} |")
    lines += _fraction_claim(found)
    return "\n".join(lines) + "\n"


def _fraction_claim(found: Dict[str, Result]) -> List[str]:
    """Fig. 6a: what codistillation gains over all_reduce grows as the data shrink."""
    pairs = fraction_pairs(found)
    gains = {k: _paired(one, other, "test top-1") for k, (one, other) in pairs.items()}
    if len(gains) < 2:
        return []
    shown = "; ".join(f"{k}: {_signed(list(gain.values()))}" for k, gain in sorted(gains.items(), reverse=True))
    most, least = gains[max(gains)], gains[min(gains)]
    growth = [least[seed] - most[seed] for seed in least if seed in most]
    says = "with less data (as many updates) codistillation gains over all_reduce, increasingly"
    measure = f"test top-1, codistill_reduced − all_reduce, by part of the data: {shown}"
    return [f"| Fig. 6a | {says} | {measure} | {verdict(growth, 1)} (from {max(gains)} to {min(gains)}) |"]


def fraction_pairs(found: Dict[str, Result]) -> Dict[Fraction, Tuple[Result, Result]]:
    """(codistillation with reduced weight decay, all_reduce) for each part of the data that has both."""
    chosen: Dict[Tuple[str, Fraction], Result] = {}
    for name in found:
        for method in ("codistill_reduced", "all_reduce"):
            if name == method or name.startswith(method + "_1_"):
                chosen[method, found[name].fraction] = found[name]
    parts = sorted({fraction for _, fraction in chosen})
    keys = [(("codistill_reduced", k), ("all_reduce", k)) for k in parts]
    return {one[1]: (chosen[one], chosen[other]) for one, other in keys if one in chosen and other in chosen}


def _paired(one: Result, other: Result, measure: str) -> Dict[int, float]:
    left, right = one.values.get(measure, {}), other.values.get(measure, {})
    return {seed: left[seed] - right[seed] for seed in sorted(left) if seed in right}


def _differences(found: Dict[str, Result], one: str, other: str, measure: str) -> List[float]:
    return list(_paired(found[one], found[other], measure).values()) if one in found and other in found else []


def _signed(values: Sequence[float]) -> str:
    if not values:
        return "–"
    each = f" ({', '.join(f'{value:+.2f}' for value in values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{each}"


def figures(found: Dict[str, Result], folder: Path) -> None:
    """curves.png (Fig. 1, 2 and 12) over updates, fractions.png (Fig. 6) over the part of the data."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, result in found.items() if result.fraction == 1]
    shown = (("train NLL", "training NLL, bits"), ("valid top-1", "valid top-1, %"), ("distance", "‖θ − θ₀‖"))
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for axis, (measure, label) in zip(axes, shown):
        for name in names:
            curve = _mean(found[name].curves[measure])
            axis.plot(*zip(*curve), label=name, marker=".", markersize=4) if curve else None
        axis.set(xlabel="updates", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "curves.png", dpi=110)
    pairs = fraction_pairs(found)
    if len(pairs) < 2:
        return
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for axis, measure in zip(axes, ("test top-1", "train NLL")):
        for place, label in ((1, "all_reduce"), (0, "codistill_reduced")):
            points = [(str(k), list(pairs[k][place].values[measure].values())) for k in sorted(pairs, reverse=True)]
            means = [statistics.mean(values) for _, values in points]
            bars = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
            axis.errorbar([k for k, _ in points], means, yerr=bars, marker="o", capsize=3, label=label)
        axis.set(xlabel="part of the training data, as many updates", ylabel=measure)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "fractions.png", dpi=110)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=user_path, help="folder with runs.toml")
    parser.add_argument("--results", type=user_path, help="default: RECIPE/results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args(argv)
    results = args.results or args.recipe / "results"
    found = load(read_runs(find(args.recipe, None), read_task("images"), args.seeds, []), results)
    if not found:
        print(f"image_results.py: --results must hold NAME/seedN/scores.json, but {results} holds none", file=sys.stderr)
        return 2
    texts: Dict[str, Callable[[Dict[str, Result]], str]] = {"table.md": table, "claims.md": claims}
    for name, make in texts.items():
        (results / name).write_text(make(found), encoding="utf-8")
        print(make(found))
    figures(found, results)
    return 0


if __name__ == "__main__":
    logging.disable(logging.INFO)  # with fairseq imported, matplotlib tells of every font
    sys.exit(main())
