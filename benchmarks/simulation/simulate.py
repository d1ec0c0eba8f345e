"""Simulate codistillation at sizes that no machine here has: one scenario, a sweep, or a check against a real run.

    python -m benchmarks.simulation.simulate --peers 16 --workers 64 --store object_store
    python -m benchmarks.simulation.simulate --sweep benchmarks/results/simulation
    python -m benchmarks.simulation.simulate --validate RUN_DIR

What is assumed stands in `scenario.py`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from benchmarks.simulation import figure, validate
from benchmarks.simulation.outcome import outcome
from benchmarks.simulation.scenario import STORES, Scenario

Row = Dict[str, Any]
PEERS = (2, 4, 8, 16, 32, 64)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sweep", metavar="DIR", help="the whole grid: sweep.csv, sweep.json and figure.png in DIR")
    what.add_argument("--validate", metavar="RUN_DIR", help="replay a real run and compare; exit status 1 where they differ")
    parser.add_argument("--most-peers", type=int, default=max(PEERS), metavar="n", help="of the sweep")
    parser.add_argument("--quick", action="store_true", help="the sweep with a hundredth of the updates")
    parser.add_argument("--json", action="store_true", help="one scenario as JSON")
    parser.add_argument("--store", choices=list(STORES), help="bandwidths and latency of a typical one; options below override")
    group = parser.add_argument_group("the scenario (SI units: bytes, seconds)")
    for one in dataclasses.fields(Scenario):
        help = f"{one.metadata['help']} (default: {one.default:g})" if isinstance(one.default, float) else \
            f"{one.metadata['help']} (default: {one.default})"  # fmt: skip
        group.add_argument("--" + one.name.replace("_", "-"), type=type(one.default), help=help, metavar="X")
    return parser


def scenario_of(args: argparse.Namespace) -> Scenario:
    given = {one.name: getattr(args, one.name) for one in dataclasses.fields(Scenario)}
    return Scenario(**{**STORES.get(args.store, {}), **{name: value for name, value in given.items() if value is not None}})


# The sweep. Each part varies what it asks about and leaves the rest as in Scenario's defaults.


def grid(most: int) -> Iterator[Row]:
    """Settings with the part of the sweep that they belong to."""
    peers = [n for n in PEERS if n <= most]
    for topology in ("ring", "all"):
        for interval in (50, 500, 2500):
            for store in STORES:
                for n in peers:
                    yield {"part": "storage", "store": store, "peers": n, "workers": 64, "topology": topology,
                           "interval": interval, "updates": 12 * interval, "failures_per_worker_hour": 0.0}  # fmt: skip
    # Gradients in 16 bits: what is best for all_reduce.
    mixed = {"store": "file_system", "gradient_bytes": Scenario.gradient_bytes / 2, "updates": 200_000}
    for workers in (8, 64, 1024):
        for link in (0.125e9, 1.25e9, 12.5e9):
            for n in peers:
                yield {"part": "pace", "peers": n, "workers": workers, "between_bytes_per_s": link, **mixed}
        for rate in (0.0, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4):
            yield {"part": "failures", "peers": min(8, most), "workers": workers, "between_bytes_per_s": 12.5e9,
                   "failures_per_worker_hour": rate, **mixed}  # fmt: skip


def sweep(most: int, quick: bool = False) -> List[Row]:
    from tqdm import tqdm

    rows = []
    for setting in tqdm(list(grid(most)), unit="scenario", disable=not sys.stderr.isatty()):
        plain = {name: value for name, value in setting.items() if name not in ("part", "store")}
        plain["updates"] = max(2 * plain.get("interval", 0), plain["updates"] // 100) if quick else plain["updates"]
        scenario = Scenario(**{**STORES[setting["store"]], **plain})
        rows.append({"part": setting["part"], "store": setting["store"], **dataclasses.asdict(scenario), **outcome(scenario)})
    return rows


def write(rows: List[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sweep.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({name: _short(value) for name, value in row.items()} for row in rows)
    text = json.dumps([{name: _short(value) for name, value in row.items()} for row in rows], indent=1)
    (folder / "sweep.json").write_text(text + "\n", encoding="utf-8")
    figure.draw(rows, folder / "figure.png")


def _short(value: Any) -> Any:
    """Five figures. JSON has no infinity and no NaN."""
    return value if not isinstance(value, float) else float(f"{value:.5g}") if abs(value) < 1e300 else str(value)


def show(scenario: Scenario, result: Row) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{scenario.peers} peers of {scenario.workers} workers, N={scenario.interval}, {scenario.topology}")
    table.add_column("outcome")
    table.add_column("", justify="right")
    for name, value in result.items():
        table.add_row(name, f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main(words: Optional[Sequence[str]] = None) -> int:
    args = get_parser().parse_args(words)
    try:
        if args.validate:
            return validate.validate(args.validate)
        if args.sweep:
            write(sweep(args.most_peers, args.quick), Path(args.sweep))
            return 0
        scenario = scenario_of(args)
        result = outcome(scenario)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"scenario": {k: _short(v) for k, v in dataclasses.asdict(scenario).items()},
                          "outcome": {k: _short(v) for k, v in result.items()}}, indent=1))  # fmt: skip
    else:
        show(scenario, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
