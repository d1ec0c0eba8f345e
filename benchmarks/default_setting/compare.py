"""Is the default setting ever worse than training alone? Valid NLL of `default` beside that of `alone`, at every validation.

    python -m benchmarks.default_setting.compare RUNS [RUNS …]

RUNS/default/seedN and RUNS/alone/seedN are runs of one recipe's default.txt. `alone` are the same peers at α = 0, which is
plain cross entropy to the bit: so each difference is between equal seeds. A run is the mean over its peers; NLL in bits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

from fairseq_codistill.report.files import ReportError, load
from fairseq_codistill.report.summary import Run

Curve = Dict[int, float]  # update -> NLL
FIRST_PART = 0.1  # of the run, in which models know next to nothing yet, and are not judged


class Beside(NamedTuple):
    """`default` less `alone` by seed, at the updates at which all of both were validated."""

    seeds: List[str]
    differences: Dict[int, List[float]]

    def judged(self) -> Dict[int, float]:
        """Means over the seeds, after the first part of the run."""
        last = max(self.differences)
        return {update: statistics.fmean(by_seed) for update, by_seed in self.differences.items() if update > FIRST_PART * last}

    def worst(self) -> int:
        """The update at which `default` is farthest behind, or least ahead."""
        judged = self.judged()
        return max(judged, key=judged.__getitem__)


def compare(folder: Path) -> Beside:
    """Raises ReportError for a folder that lacks one of the two."""
    runs: Dict[str, Dict[str, Curve]] = {}
    for name in ("default", "alone"):
        if not (folder / name).is_dir():
            raise ReportError(f"RUNS must hold the folders default and alone, but {folder} has no {name}.")
        runs[name] = {run.name: mean_curve(run) for method in load([str(folder / name)]).methods for run in method.runs}
    seeds = sorted(runs["default"].keys() & runs["alone"].keys())
    if not seeds:
        raise ReportError(f"default and alone must have a seed in common, but in {folder} have none.")
    curves = [(runs["default"][seed], runs["alone"][seed]) for seed in seeds]
    common = set.intersection(*(set(curve) for pair in curves for curve in pair))
    if not common:
        raise ReportError(f"default and alone must have been validated at the same updates, but in {folder} never were.")
    return Beside(seeds, {update: [ours[update] - alone[update] for ours, alone in curves] for update in sorted(common)})


def mean_curve(run: Run) -> Curve:
    """Where all its peers were validated."""
    curves = [dict(peer.log.valid_nll()) for peer in run.peers]
    return {update: statistics.fmean(curve[update] for curve in curves) for update in set.intersection(*map(set, curves))}


def table(named: Dict[str, Beside]) -> str:
    rows = ["| runs | seeds | farthest behind alone after the first tenth (+ is behind) | at update | at the end, by seed |"]
    rows.append("|---|---:|---:|---:|---|")
    for name, beside in named.items():
        worst, last = beside.worst(), max(beside.differences)
        end = ", ".join(f"{value:+.3f}" for value in beside.differences[last])
        rows.append(f"| {name} | {len(beside.seeds)} | {beside.judged()[worst]:+.3f} | {worst:,} | {end} |")
    return "\n".join(rows)


def curve_table(name: str, beside: Beside) -> str:
    updates = list(beside.differences)
    rows = [f"| {name}, update | " + " | ".join(f"{update:,}" for update in updates) + " |", "|---|" + "---:|" * len(updates)]
    for number, seed in enumerate(beside.seeds):
        rows.append(f"| {seed} | " + " | ".join(f"{beside.differences[update][number]:+.3f}" for update in updates) + " |")
    return "\n".join(rows)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folder with default/seedN and alone/seedN")
    args = parser.parse_args(argv)
    try:
        named = {str(folder): compare(folder) for folder in args.runs}
    except ReportError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    print("\n\n".join([table(named), *(curve_table(name, beside) for name, beside in named.items())]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
