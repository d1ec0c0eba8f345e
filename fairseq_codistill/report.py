"""`codistill-report`: fairseq's JSON logs in, one table and one figure out.

    METHOD/seed1/peer0/train.log                the log of one peer; `seed1` and `peer0` may each be left out
    METHOD/seed1/peer0/test.sacrebleu.json      what the `sacrebleu` command printed for that peer
    METHOD/seed1/ensemble.test.sacrebleu.json   the same for the ensemble of the run's peers

Pure first, files last: read a log, sum up methods, render; then draw, find the files, write, `main`.
Every NLL is in bits per target token, for fairseq logs its losses in base 2.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import os
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Curve = list[tuple[int, float]]  # (update, value), updates rising
Values = dict[str, float]  # column key -> number

# --- read a log -----------------------------------------------------------------------------------------------------

# fairseq-train writes "… | INFO | valid | {…}", fairseq-hydra-train "[…][valid][INFO] - {…}". A record is flat, so
# a body without inner braces also finds the whole record behind one that was torn by a kill.
_RECORD = re.compile(r'(?:\| INFO \| |\]\[)([\w.:-]+)(?: \| |\]\[INFO\] - )(\{"[^{}]*\})')
_LOADED = re.compile(r"Loaded checkpoint .* @ (\d+) updates\)")
_SETTINGS = ("seed", "max_update", "valid_subset", "log_format", "required_batch_size_multiple")
_RDROP = "label_smoothed_cross_entropy_with_rdrop"


class ReportError(ValueError):
    """Something the user can mend, in one sentence."""


def as_float(value: Any) -> float | None:
    """fairseq logs numbers as strings; None for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def parse_settings(config: str) -> dict[str, str]:
    """The settings that matter here, from the line in which fairseq logs its config; {} for any other line.

    The line is a dict's repr with Namespaces inside: neither JSON nor a Python literal, hence the patterns.
    """
    criterion = re.search(r"'criterion': \{([^}]*)", config)
    if not criterion:
        return {}
    places = {"_name": criterion[1], "rdrop_alpha": criterion[1], **dict.fromkeys(_SETTINGS, config)}
    found = {name: re.search(rf"'{name}': '?([^',}}]*)", text) for name, text in places.items()}
    return {"criterion" if name == "_name" else name: match[1] for name, match in found.items() if match}


@dataclass
class TrainLog:
    """What one train.log says: `records[tag][update][field]`, as logged, of the run that its last lines continue.

    A log may hold several processes, one after another. What a later one did again replaces what an earlier one
    logged; `seconds` adds them up, because all of them were spent.
    """

    settings: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict[int, Values]] = field(default_factory=lambda: defaultdict(dict))
    update: int = 0  # of the newest record
    finished: bool = False
    blank: bool = True  # not one word
    _earlier_seconds: float = 0.0
    _wall: float = 0.0

    @classmethod
    def read(cls, lines: Iterable[str]) -> TrainLog:
        log = cls()
        for line in lines:
            log._feed(line)
        return log

    def _feed(self, line: str) -> None:
        self.blank = self.blank and not line.strip()
        for tag, body in _RECORD.findall(line):
            self._add(tag, body)
        settings = parse_settings(line)
        loaded = _LOADED.search(line)
        if settings:  # a process starts
            self.settings, self.finished = settings, False
            self._bank()
        elif loaded:
            self._forget(int(loaded[1]) + 1)
        elif "No existing checkpoint found" in line:  # it starts from nothing: what stands above was abandoned
            self._forget(0)
            self._earlier_seconds = 0.0
        elif "done training in" in line:
            self.finished = True

    def _add(self, tag: str, body: str) -> None:
        try:
            raw = json.loads(body)
        except ValueError:
            return
        prefix = "" if tag == "train_inner" else f"{tag}_"
        fields = {name[len(prefix) :]: as_float(value) for name, value in raw.items() if name.startswith(prefix)}
        update = fields.get("num_updates")
        if update is None or not math.isfinite(update):
            return
        if update < self.update:  # a restart whose first lines are missing
            self._forget(int(update))
        self.update = int(update)
        self.records[tag][self.update] = {name: value for name, value in fields.items() if value is not None}
        wall = fields.get("wall")
        if wall is not None:
            if wall < self._wall:  # fairseq's wall starts at 0 in every process
                self._bank()
            self._wall = wall

    def _bank(self) -> None:
        self._earlier_seconds, self._wall = self._earlier_seconds + self._wall, 0.0

    def _forget(self, first: int) -> None:
        """Drop every record from update `first` on."""
        for tag, records in self.records.items():
            self.records[tag] = {update: fields for update, fields in records.items() if update < first}
        self.update = max((update for records in self.records.values() for update in records), default=0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training and validation, those of earlier processes included."""
        return self._earlier_seconds + self._wall

    @property
    def doubled(self) -> bool:
        """Whether the logged losses are twice the true ones.

        fairseq's R-Drop runs every batch twice, in validation too, and divides by the tokens of one.
        """
        if "criterion" in self.settings:
            return self.settings["criterion"] == _RDROP and (as_float(self.settings.get("rdrop_alpha")) or 0) > 0
        return any("rdrop_kl_loss" in fields for fields in self.records.get("train", {}).values())

    def valid_records(self) -> list[tuple[int, Values]]:
        """Of the first validation subset: the one by which fairseq chooses its best checkpoint."""
        return self._true(self.records.get(self.settings.get("valid_subset", "valid"), {}))

    def train_records(self) -> list[tuple[int, Values]]:
        """The lines of every --log-interval updates; where there are none, those of the ends of epochs."""
        return self._true(self.records.get("train_inner") or self.records.get("train", {}))

    def _true(self, records: dict[int, Values]) -> list[tuple[int, Values]]:
        halves = ("loss", "nll_loss") if self.doubled else ()
        halved = {u: {name: fields[name] / 2 for name in halves if name in fields} for u, fields in records.items()}
        return [(update, {**fields, **halved[update]}) for update, fields in sorted(records.items())]

    def valid_nll(self) -> Curve:
        return nll(self.valid_records())

    def train_nll(self) -> Curve:
        return nll(self.train_records())

    def train_curve(self, name: str) -> Curve:
        return [(update, fields[name]) for update, fields in self.train_records() if name in fields]


def nll(records: Sequence[tuple[int, Values]]) -> Curve:
    """cross_entropy logs no nll_loss, because its loss is the NLL."""
    pairs = [(update, fields.get("nll_loss", fields.get("loss"))) for update, fields in records]
    return [(update, value) for update, value in pairs if value is not None]


# --- sum up methods -------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """One score of one peer (or of a run's ensemble), as sacreBLEU printed it."""

    test: str  # name of the test set
    metric: str  # BLEU, chrF2, TER
    value: float
    signature: str
    file: Path

    @property
    def key(self) -> str:
        return f"{self.test} {self.metric}"


@dataclass
class Peer:
    name: str
    file: Path
    log: TrainLog
    scores: list[Score] = field(default_factory=list)

    def values(self) -> Values:
        """The numbers of this peer; a number that its log does not (yet) hold is left out.

        `valid NAME` is fairseq's valid_NAME at the update of the best NLL.
        """
        log, curve = self.log, self.log.valid_nll()
        values: Values = {"updates": log.update, "seconds": log.seconds}
        if curve:
            values["last_valid_nll"] = curve[-1][1]
        finite = [(value, update) for update, value in curve if math.isfinite(value)]
        if finite:
            best, at = min(finite)  # of equal NLLs the earliest
            values.update(best_valid_nll=best, ppl=perplexity(best), at_update=at)
            values.update({f"valid {name}": value for name, value in dict(log.valid_records())[at].items()})
        return {**values, **{score.key: score.value for score in self.scores}}


@dataclass
class Run:
    """One seed of a method: the peers that trained together."""

    name: str
    peers: list[Peer]
    ensemble: list[Score] = field(default_factory=list)

    def values(self) -> Values:
        """The mean over the peers, and the ensemble's scores."""
        values = {key: statistics.fmean(found) for key, found in gather(peer.values() for peer in self.peers).items()}
        return {**values, **{f"{score.key} of the ensemble": score.value for score in self.ensemble}}

    def best_peer(self) -> Peer:
        """Chosen by validation, so that its test score is an honest one."""
        return min(self.peers, key=lambda peer: peer.values().get("best_valid_nll", math.inf))


@dataclass
class Method:
    label: str
    runs: list[Run]

    def peers(self) -> Iterator[tuple[str, Peer]]:
        """Every peer with the words that tell it from the others."""
        for run in self.runs:
            for peer in run.peers:
                yield " ".join(filter(None, (self.label, run.name, peer.name))), peer

    def scores(self) -> list[Score]:
        lists = [scores for run in self.runs for scores in (run.ensemble, *(peer.scores for peer in run.peers))]
        return [score for scores in lists for score in scores]


class Stat(NamedTuple):
    mean: float
    std: float | None  # None for a single seed
    n: int


class Column(NamedTuple):
    key: str
    heading: str
    decimals: int


def perplexity(bits: float) -> float:
    """2 to the NLL. fairseq's own `ppl` is squared wherever its NLL is doubled."""
    return 2.0**bits if bits < 1000 else math.inf


def gather(values: Iterable[Values]) -> dict[str, list[float]]:
    """[{a: 1}, {a: 2, b: 3}] -> {a: [1, 2], b: [3]}"""
    gathered: dict[str, list[float]] = defaultdict(list)
    for one in values:
        for key, value in one.items():
            gathered[key].append(value)
    return gathered


def spread(values: Sequence[float]) -> Stat:
    """Mean and sample standard deviation (n − 1)."""
    finite = all(map(math.isfinite, values))  # statistics.stdev refuses the others
    std = (statistics.stdev(values) if finite else math.nan) if len(values) > 1 else None
    return Stat(statistics.fmean(values), std, len(values))


def summarise(seeds: Iterable[Values]) -> dict[str, Stat]:
    return {key: spread(found) for key, found in gather(seeds).items()}


def columns(methods: Sequence[Method], metrics: Sequence[str] = ()) -> list[Column]:
    """The columns that hold at least one number: validation, the --metric fields, test scores, time."""
    wanted = [
        Column("best_valid_nll", "best valid NLL", 3),
        Column("ppl", "ppl", 2),
        Column("at_update", "at update", 0),
        Column("last_valid_nll", "last valid NLL", 3),
        Column("updates", "updates", 0),
        *(Column(f"valid {name}", f"valid {name} at best", 3) for name in metrics),
    ]
    for key in sorted({score.key for method in methods for score in method.scores()}):
        wanted += [Column(name, name, 2) for name in (key, f"{key} of the ensemble")]
    wanted.append(Column("seconds", "training seconds", 0))
    present = {key for method in methods for run in method.runs for key in run.values()}
    return [column for column in wanted if column.key in present]


def rows(methods: Sequence[Method], shown: Sequence[Column], per_peer: bool = False) -> list[list[str]]:
    """The table: a row of headings, then a row for each method (and, if asked, for each of its peers)."""
    table = [["method", "seeds", "peers", *(column.heading for column in shown)]]
    for method in methods:
        counts = sorted({len(run.peers) for run in method.runs})
        mark = " †" if any(peer.log.doubled for _, peer in method.peers()) else ""
        parts = [(method.label + mark, "/".join(map(str, counts)), [run.values() for run in method.runs])]
        if per_peer and counts[-1] > 1:
            parts += _peer_parts(method)
        for name, peers, seeds in parts:
            stats = summarise(seeds)
            cells = [cell(stats.get(column.key), column.decimals, len(seeds)) for column in shown]
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


# --- the lines under the table --------------------------------------------------------------------------------------

SPREAD = (
    "The value of a seed is the mean over its peers; with several seeds: the seeds' mean ± their sample standard "
    "deviation (n − 1)."
)
UNITS = {
    "NLL": "bits per target token (base 2), on the validation set, of a peer's own model",
    "ppl": "2 to the best NLL",
    "at update": "the update of the best NLL",
    "training seconds": "wall clock with validation, all restarts together",
}


def notes(methods: Sequence[Method]) -> list[str]:
    """What the numbers are, and whatever keeps them from being compared."""
    peers = [pair for method in methods for pair in method.peers()]
    lines = ["; ".join(f"{name}: {meaning}" for name, meaning in UNITS.items()) + ".", SPREAD]
    if any(peer.log.doubled for _, peer in peers):
        lines.append(
            "† fairseq's R-Drop criterion runs every batch twice, in validation too, so its log holds twice the true "
            "NLL: halved here."
        )
    lines += _dropped_sentences([peer.log for _, peer in peers])
    lines += _signatures(methods)
    lines += [line for method in methods for line in _missing_scores(method)]
    unfinished = [f"{name} ({_progress(peer.log)})" for name, peer in peers if not peer.log.finished]
    if unfinished:
        lines.append(f"Still running, or ended early (no 'done training' in the log): {some(unfinished)}.")
    diverged = [name for name, peer in peers if not all(math.isfinite(value) for _, value in peer.log.valid_nll())]
    if diverged:
        lines.append(f"WARNING: some validation losses are not finite, and never count as best: {some(diverged)}.")
    return lines


def some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _progress(log: TrainLog) -> str:
    limit = as_float(log.settings.get("max_update")) or 0
    return f"update {log.update:,}" + (f" of {limit:,.0f}" if limit else "")


def _dropped_sentences(logs: Sequence[TrainLog]) -> list[str]:
    multiple = max(int(as_float(log.settings.get("required_batch_size_multiple")) or 1) for log in logs)
    if multiple == 1:
        return []
    return [
        f"fairseq leaves up to {multiple - 1} sentences out of validation when --required-batch-size-multiple is "
        f"{multiple}, as here; with 1 it keeps them all."
    ]


def _signatures(methods: Sequence[Method]) -> list[str]:
    users: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))  # key, signature, labels
    for method in methods:
        for score in method.scores():
            users[score.key][score.signature][method.label] = None
    lines = []
    for key, found in sorted(users.items()):
        if len(found) == 1:
            lines.append(f"{key}: sacreBLEU {next(iter(found))}")
        else:
            each = "; ".join(f"{signature} in {some(list(found[signature]))}" for signature in sorted(found))
            lines.append(f"WARNING: {key} must not be compared, for the sacreBLEU signatures differ: {each}.")
    return lines


def _missing_scores(method: Method) -> list[str]:
    lines = []
    for key in sorted({score.key for _, peer in method.peers() for score in peer.scores}):
        missing = [name for name, peer in method.peers() if key not in {score.key for score in peer.scores}]
        if missing:
            lines.append(f"{key} is not there (yet) for {some(missing)}; the mean is over the others.")
    return lines


# --- render ---------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    title: str
    methods: list[Method]
    table: list[list[str]]
    notes: list[str]

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", markdown_table(self.table), "", *(f"- {line}" for line in self.notes)]
        return "\n".join([*lines, "", "![curves](curves.png)", ""])

    def results(self, base: Path) -> dict[str, Any]:
        """Every number with the file it comes from, given relative to `base`, the folder of results.json."""
        methods = [_method_entry(method, base) for method in self.methods]
        found = {"title": self.title, "units": UNITS, "spread": SPREAD, "notes": self.notes, "methods": methods}
        return finite_json(found)


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


# --- draw -----------------------------------------------------------------------------------------------------------

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #8C6D31".split()  # Okabe and Ito's, for all eyes
STYLES = ("-", "--", ":", "-.")
PANELS: list[tuple[str, Callable[[TrainLog], Curve]]] = [
    ("train NLL (bits per token)", TrainLog.train_nll),
    ("α", lambda log: log.train_curve("codistill_alpha")),
    ("agreement with peers (share of top-1)", lambda log: log.train_curve("codistill_agreement")),
    ("staleness of peers (updates)", lambda log: log.train_curve("codistill_staleness")),
]


def band(curves: Sequence[Curve]) -> list[tuple[int, float, float, float]]:
    """(update, lowest, mean, highest) at the updates that all curves cover; between its points a curve is a line."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    updates = sorted({update for curve in curves for update, _ in curve if first <= update <= last})
    values = [[_at(curve, update) for curve in curves] for update in updates]
    return [(update, min(found), statistics.fmean(found), max(found)) for update, found in zip(updates, values)]


def _at(curve: Curve, update: int) -> float:
    number = bisect.bisect_right(curve, (update, math.inf))
    (left, low), (right, high) = curve[number - 1], curve[min(number, len(curve) - 1)]
    return low + (high - low) * (update - left) / (right - left) if left < right else low


def focus(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits of an NLL axis: the first quarter, where the loss falls from log2 V, may leave the picture at the top."""
    low = min((value for curve in curves for _, value in curve), default=math.inf)
    high = max((value for curve in curves for update, value in curve if update >= curve[-1][0] / 4), default=-math.inf)
    return (low - 0.05 * (high - low), high + 0.05 * (high - low)) if low < high else None


def draw(report: Report, path: Path) -> None:
    """The curves as a PNG of about 1200 × 550 pixels: valid NLL at the left, small panels at the right."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.lines import Line2D

    methods = report.methods
    panels = [panel for panel in PANELS if any(panel[1](peer.log) for m in methods for _, peer in m.peers())]
    across = 1 if len(panels) < 3 else 2
    legend_rows = math.ceil(len(methods) / 5)
    figure = Figure(figsize=(12, 5 + 0.25 * legend_rows), dpi=100, layout="constrained")
    left, right = figure.add_gridspec(1, 2, width_ratios=(5, 2 + 2 * across))
    _panel(figure.add_subplot(left), methods, "valid NLL (bits per token)", TrainLog.valid_nll, size=10)
    small = right.subgridspec(max(1, math.ceil(len(panels) / across)), across)
    for number, (name, curve) in enumerate(panels):
        _panel(figure.add_subplot(small[number // across, number % across]), methods, name, curve, size=8)
    handles = [Line2D([], [], label=method.label, linewidth=2, **look(n)) for n, method in enumerate(methods)]
    in_a_row = math.ceil(len(methods) / legend_rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=in_a_row, frameon=False)
    figure.suptitle(report.title, fontsize=12)
    figure.savefig(path)


def look(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def _panel(axes: Any, methods: Sequence[Method], name: str, curve_of: Callable[[TrainLog], Curve], size: int) -> None:
    everything: list[Curve] = []
    for number, method in enumerate(methods):
        curves = [[point for point in curve_of(peer.log) if math.isfinite(point[1])] for _, peer in method.peers()]
        curves = [curve for curve in curves if curve]
        _lines(axes, curves, look(number))
        everything += curves
    limits = focus(everything) if "NLL" in name else None
    if limits:
        axes.set_ylim(*limits)
    axes.set_title(name, fontsize=size + 1, loc="left")
    axes.set_xlabel("updates", fontsize=size)
    axes.tick_params(labelsize=size)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Any, curves: Sequence[Curve], colour: dict[str, str]) -> None:
    """With several logs: a thin line for each, a band from the lowest to the highest, and their mean."""
    for curve in curves if len(curves) > 1 else ():
        axes.plot(*zip(*curve), linewidth=0.6, alpha=0.45, **colour)
    middle = band(curves) if curves else []
    if middle:
        updates, low, mean, high = zip(*middle)
        axes.fill_between(updates, low, high, color=colour["color"], alpha=0.15, linewidth=0)
        axes.plot(updates, mean, linewidth=1.8, marker="o" if len(updates) == 1 else None, **colour)


# --- find the files -------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a log stands in METHOD/seedN/peerN."""

    log: Path
    peer: str
    run: Path
    seed: str
    method: Path


def natural(path: Path) -> list[Any]:
    """peer10 after peer9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def locate(log: Path) -> Place:
    if log.name != "train.log":  # a log under a name of its own is a method of its own
        own = log.with_suffix("")
        return Place(log, "", own, "", own)
    folder = log.parent
    peer, run = (folder.name, folder.parent) if re.fullmatch(r"peer\d+", folder.name) else ("", folder)
    seed, method = (run.name, run.parent) if re.fullmatch(r"seed[-_]?\d+", run.name) else ("", run)
    return Place(log, peer, run, seed, method)


def find_logs(path: Path) -> list[Place]:
    """The logs at or below `path`; beside peer*/train.log a train.log of the run itself is no peer's."""
    if not path.exists():
        raise ReportError(f"RUN must be a train.log or a folder with one in or below it, but {path} does not exist.")
    places = [locate(path)] if path.is_file() else [locate(log) for log in sorted(path.rglob("train.log"), key=natural)]
    with_peers = {place.run for place in places if place.peer}
    places = [place for place in places if place.peer or place.run not in with_peers]
    if not places:
        raise ReportError(
            f"RUN must have a train.log in or below it, but {path} has none; did you forget to train with "
            "codistill-launch, which writes it?"
        )
    return places


def split_label(argument: str) -> tuple[str, Path]:
    """LABEL=PATH -> (LABEL, PATH); a path that exists is a path, whatever its name."""
    label, equals, path = argument.partition("=")
    if not equals or os.path.exists(argument):
        return "", Path(os.path.abspath(argument))
    if not label.strip() or not path:
        raise ReportError(f"RUN must be PATH or LABEL=PATH, but is {argument!r} instead.")
    return label.strip(), Path(os.path.abspath(path))


def group(arguments: Sequence[str]) -> dict[str, list[Place]]:
    """label -> the logs of that method, in the order of the arguments.

    One folder reached by two arguments (METHOD/seed1 METHOD/seed2, or a root and a method in it) is one method. A log
    that a LABEL= names is not shown a second time under its folder's name.
    """
    found = [(label, path, find_logs(path)) for label, path in map(split_label, arguments)]
    labelled = {place.log for label, _, places in found for place in places if label}
    groups: dict[Any, tuple[str, dict[Place, None]]] = {}  # LABEL or method's folder -> name in the table, logs
    for label, path, places in found:
        several = len({place.method for place in places}) > 1
        for place in places:
            if label or place.log not in labelled:
                below = str(place.method.relative_to(path)) if path in place.method.parents else place.method.name
                name = below if not label else f"{label}/{below}" if several else label
                groups.setdefault(name if label else place.method, (name, {}))[1][place] = None
    return {_unique(identity, groups): list(places) for identity, (_, places) in groups.items()}


def _unique(identity: Any, groups: dict[Any, tuple[str, dict[Place, None]]]) -> str:
    """Two folders of one name are two methods, told apart by the folders above."""
    name = groups[identity][0]
    namesakes = [other for other, (its_name, _) in groups.items() if its_name == name and isinstance(other, Path)]
    if isinstance(identity, str) or (len(namesakes) == 1 and name not in groups):
        return name
    return os.path.relpath(identity, os.path.commonpath([path.parent.parent for path in namesakes]))


def read_scores(folder: Path, ensemble: bool = False) -> list[Score]:
    """Every NAME.sacrebleu.json in `folder`, or every ensemble.NAME.sacrebleu.json."""
    files = sorted(folder.glob("*.sacrebleu.json"), key=natural) if folder.is_dir() else []
    return [score for file in files if file.name.startswith("ensemble.") == ensemble for score in _scores_in(file)]


def _scores_in(file: Path) -> list[Score]:
    test = file.name[: -len(".sacrebleu.json")]
    test = test[len("ensemble.") :] if test.startswith("ensemble.") else test
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        entries = loaded if isinstance(loaded, list) else [loaded]  # sacrebleu -m bleu chrf prints a list
        return [Score(test, str(e["name"]), float(e["score"]), str(e["signature"]), file) for e in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ReportError(
            f"{file} must hold the JSON that sacrebleu prints (name, score, signature), but does not "
            f"({type(error).__name__}: {error}); was the scoring interrupted?"
        ) from None


def load_log(file: Path) -> TrainLog | None:
    """None for a log that says nothing yet: its process has just started, or died before its first line."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        log = TrainLog.read(lines)
    if any(log.records.values()):
        return log
    if log.blank or log.settings.get("log_format") == "json":
        return None
    raise ReportError(f"{file} must hold fairseq's JSON lines, but has none; did you forget --log-format json?")


def load_method(label: str, places: Sequence[Place]) -> tuple[Method, list[Path]]:
    """The method, and those of its logs that say nothing yet."""
    runs: dict[Path, Run] = {}
    silent = []
    for place in sorted(places, key=lambda place: natural(place.log)):
        log = load_log(place.log)
        if log is None:
            silent.append(place.log)
            continue
        folder = place.log.parent if place.log.name == "train.log" else place.run
        run = runs.setdefault(place.run, Run(place.seed, [], read_scores(place.run, ensemble=True)))
        run.peers.append(Peer(place.peer, place.log, log, read_scores(folder)))
    for folder, run in runs.items():
        run.name = run.name or (folder.name if len(runs) > 1 else "")
    return Method(label, list(runs.values())), silent


def load_methods(arguments: Sequence[str]) -> tuple[list[Method], list[Path]]:
    """Everything that the RUN arguments name, and the logs that say nothing yet."""
    found = [load_method(label, places) for label, places in group(arguments).items()]
    methods = [method for method, _ in found if method.runs]
    silent = [path for _, paths in found for path in paths]
    if not methods:
        raise ReportError(
            f"RUN must have a train.log with fairseq's JSON lines, but {some(list(map(str, silent)))} has none yet; "
            "has the training failed, or only just begun?"
        )
    return methods, silent


# --- the command ----------------------------------------------------------------------------------------------------


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="codistill-report", description="Table and curves from fairseq's JSON logs.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run, a folder of seeds, or a root with METHOD/seedN/peerN/train.log "
        "below; LABEL=PATH names it")  # fmt: skip
    add("--out", metavar="DIR", help="for table.md, results.json and curves.png (default: report in the first RUN)")
    add("--title", help="above the table and the figure (default: the first RUN's name)")
    add("--metric", action="append", default=[], metavar="NAME", help="one more column: fairseq's valid_NAME, e.g. "
        "accuracy, at the update of the best NLL; may be repeated")  # fmt: skip
    add("--per-peer", action="store_true", help="also a row for each peer, and for the best of them")
    return parser


def check_metrics(metrics: Sequence[str], methods: Sequence[Method]) -> None:
    fields = [fields for m in methods for _, peer in m.peers() for _, fields in peer.log.valid_records()]
    known = sorted({name for one in fields for name in one} - {"ppl"})  # fairseq's ppl may be squared; there is ours
    for name in metrics:
        if name not in known:
            choice = ", ".join(known)
            raise ReportError(f"--metric must be a field of the valid lines ({choice}), but is {name!r} instead.")


def make_report(args: argparse.Namespace, root: Path) -> Report:
    methods, silent = load_methods(args.runs)
    check_metrics(args.metric, methods)
    lines = notes(methods)
    if silent:
        lines.append(f"Left out, for nothing is logged yet: {some([os.path.relpath(path, root) for path in silent])}.")
    table = rows(methods, columns(methods, args.metric), args.per_peer)
    return Report(args.title or root.name, methods, table, lines)


def write(report: Report, out: Path) -> None:
    """OUT/table.md, OUT/results.json, OUT/curves.png."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(report.markdown(), encoding="utf-8")
        numbers = json.dumps(report.results(out), indent=1, ensure_ascii=False, allow_nan=False)
        (out / "results.json").write_text(numbers + "\n", encoding="utf-8")
        draw(report, out / "curves.png")
    except OSError as error:
        raise ReportError(f"--out must be a folder that can be written, but {out} is not: {error.strerror}.") from None


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    try:
        first = split_label(args.runs[0])[1]
        root = first.parent if first.is_file() else first
        out = Path(os.path.abspath(args.out)) if args.out else root / "report"
        report = make_report(args, root)
        try:
            write(report, out)
        finally:
            show(report)
        print(f"\nwritten to {out}: table.md, results.json, curves.png", flush=True)
    except BrokenPipeError:  # `codistill-report … | head`: the reader has seen enough, and the files are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ReportError as error:
        print(f"codistill-report: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"codistill-report: error: {error.filename} cannot be read: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
