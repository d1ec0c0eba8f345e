"""The table of methods, as markdown, as JSON and on a terminal."""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..common.fairseq_log import Values
from .notes import SPREAD, UNITS, choosing_metrics
from .significance import Comparison
from .summary import Method, Run, Score, Stat, summarise


class Column(NamedTuple):
    key: str
    heading: str
    decimals: int


@dataclass
class Report:
    title: str
    methods: list[Method]
    table: list[list[str]]
    notes: list[str]
    comparisons: list[Comparison] = field(default_factory=list)  # with --baseline

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", markdown_table(self.table), "", *(f"- {line}" for line in self.notes)]
        return "\n".join([*lines, "", "![curves](curves.png)", ""])

    def results(self, base: Path) -> dict[str, Any]:
        """Every number with the file it comes from, given relative to `base`, the folder of results.json."""
        methods = [_method_entry(method, base) for method in self.methods]
        found = {"title": self.title, "units": UNITS, "spread": SPREAD, "notes": self.notes, "methods": methods}
        if self.comparisons:
            found["significance"] = [asdict(comparison) for comparison in self.comparisons]
        return finite_json(found)


def columns(methods: Sequence[Method], metrics: Sequence[str] = ()) -> list[Column]:
    """The columns that hold at least one number: validation, the --metric fields, test scores, time."""
    wanted = [
        Column("best_valid_nll", "best valid NLL", 3),
        Column("ppl", "ppl", 2),
        Column("at_update", "at update", 0),
        Column("last_valid_nll", "last valid NLL", 3),
        *(column for metric in choosing_metrics(methods) for column in (
            Column(f"best_valid_{metric}", f"best valid {metric}", 3),
            Column(f"at_update_of_{metric}", f"at update of {metric}", 0),
        )),  # fmt: skip
        Column("updates", "updates", 0),
        *(Column(f"valid {name}", f"valid {name} at best", 3) for name in metrics),
    ]
    for key in sorted({score.key for method in methods for score in method.scores()}):
        wanted += [Column(name, name, 2) for name in (key, f"{key} of the ensemble")]
    wanted.append(Column("seconds", "training seconds", 0))
    present = {key for method in methods for run in method.runs for key in run.values()}
    return [column for column in wanted if column.key in present]


def rows(
    methods: Sequence[Method], shown: Sequence[Column], per_peer: bool = False, compared: Sequence[Comparison] = ()
) -> list[list[str]]:
    """The table: a row of headings, then a row for each method (and, if asked, for each of its peers).

    `compared` adds a column for each test set and metric, filled for methods.
    """
    tested = {(one.key, one.method): one.cell() for one in compared}
    keys = sorted({key for key, _ in tested})
    headings = [f"{key} against {compared[0].baseline}" for key in keys]
    table = [["method", "seeds", "peers", *(column.heading for column in shown), *headings]]
    for method in methods:
        counts = sorted({len(run.peers) for run in method.runs})
        mark = " †" if any(peer.log.doubled for _, peer in method.peers()) else ""
        parts = [(method.label + mark, "/".join(map(str, counts)), [run.values() for run in method.runs])]
        if per_peer and counts[-1] > 1:
            parts += _peer_parts(method)
        for number, (name, peers, seeds) in enumerate(parts):
            stats = summarise(seeds)
            cells = [cell(stats.get(column.key), column.decimals, len(seeds)) for column in shown]
            cells += [tested.get((key, method.label), "–") if number == 0 else "–" for key in keys]
            table.append([name, str(len(seeds)), peers, *cells])
    return table


def _peer_parts(method: Method) -> list[tuple[str, str, list[Values]]]:
    seeds: dict[str, list[Values]] = defaultdict(list)
    for run in method.runs:
        for peer in run.peers:
            seeds[f"{method.label}: {peer.name}"].append(peer.values())
    seeds[f"{method.label}: best peer by valid NLL"] = [run.best_peer().values() for run in method.runs]
    return [(name, "1", values) for name, values in seeds.items()]


def cell(stat: Stat | None, decimals: int, seeds: int) -> str:
    """3.700 ± 0.012, and how many seeds have the number where some have not."""
    if stat is None:
        return "–"
    text = f"{stat.mean:,.{decimals}f}" + ("" if stat.std is None else f" ± {stat.std:,.{decimals}f}")
    return text if stat.n == seeds else f"{text} ({stat.n} of {seeds})"


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """GitHub's markdown, aligned so that it also reads well as plain text."""
    table = [[text.replace("|", "\\|") for text in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [[row[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(row[1:], widths[1:]))] for row in table]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    heading, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([heading, f"|{rule}|", *body])


def _method_entry(method: Method, base: Path) -> dict[str, Any]:
    summary = summarise(run.values() for run in method.runs)
    return {
        "label": method.label,
        "summary": {key: stat._asdict() for key, stat in summary.items()},
        "runs": [_run_entry(run, base) for run in method.runs],
    }


def _run_entry(run: Run, base: Path) -> dict[str, Any]:
    def scores(found: Sequence[Score]) -> list[dict[str, Any]]:
        return [{**score._asdict(), "file": os.path.relpath(score.file, base)} for score in found]

    peers = [
        {
            "peer": peer.name,
            "log": os.path.relpath(peer.file, base),
            "settings": peer.log.settings,
            "nll_halved": peer.log.doubled,
            "finished": peer.log.finished,
            "values": peer.values(),
            "scores": scores(peer.scores),
        }
        for peer in run.peers
    ]
    ensemble = scores(run.ensemble)
    return {"seed": run.name, "values": run.values(), "ensemble_scores": ensemble, "peers": peers}


def finite_json(value: Any) -> Any:
    """NaN and infinity have no JSON: null."""
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(report: Report) -> None:
    """To a terminal with rich; elsewhere as plain text.

    Where the table is too wide, methods become columns; where that is too wide as well, the terminal wraps the lines,
    but no number is cut.
    """
    if not sys.stdout.isatty():
        print("\n".join([report.title, "", markdown_table(report.table), "", *report.notes]))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text(report.title, style="bold"))
    views = [_view(table) for table in (report.table, list(zip(*report.table)))]
    widths = [console.measure(view, options=console.options.update(width=10_000)).minimum for view in views]
    chosen = next((n for n, width in enumerate(widths) if width <= console.width), widths.index(min(widths)))
    # Without a height rich takes no width on a dumb terminal, and cuts the table at 80.
    wide = Console(highlight=False, width=max(console.width, widths[chosen]), height=console.height)
    wide.print(views[chosen])
    for line in report.notes:
        console.print(Text(line, style="bold yellow" if line.startswith("WARNING") else "dim"))


def _view(table: Sequence[Sequence[str]]) -> Any:
    """A rich table whose headings may wrap between words, but whose cells may not."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    view = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, (heading, *cells) in enumerate(zip(*table)):
        least = max(map(len, [*cells, *heading.split()]))
        view.add_column(Text(heading), justify="right" if number else "left", min_width=least)
    for row in table[1:]:
        view.add_row(*map(Text, row))
    return view
