"""The curves of all methods as one picture, drawn at the size at which it is printed: fonts are 7 to 9 points at any width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..common.fairseq_log import choosing_metric
from .curves import along, band, finite, mean_curve
from .log import Curve, TrainLog
from .notes import choosing_metrics
from .summary import Method
from .table import Report

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #8C6D31".split()  # Okabe and Ito's, for all eyes
STYLES = ("-", "--", ":", "-.")
PANELS: list[tuple[str, Callable[[TrainLog], Curve]]] = [
    ("train NLL", TrainLog.train_nll),
    ("α", lambda log: log.train_curve("codistill_alpha")),
    ("agreement with peers (top-1)", lambda log: log.train_curve("codistill_agreement")),
    ("staleness of peers (updates)", lambda log: log.train_curve("codistill_staleness")),
]
AXES = ("updates", "samples", "seconds")
FORMATS = ("png", "pdf", "svg")
ONE_COLUMN = 5.0  # inches: a narrower figure has the main panel alone, and no title
DPI = 200  # of the PNG
_RC: Any = {
    "pdf.fonttype": 42,  # TrueType: conferences refuse Type 3
    "svg.hashsalt": "codistill-report",  # the same figure is the same file
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}


@dataclass(frozen=True)
class Style:
    """How the curves are drawn."""

    width: float = 6.8  # inches: two columns of a paper; 3.3 is one
    against: str = "updates"  # one of AXES
    log_x: bool = False
    log_y: bool = False  # of NLLs

    def axis(self, log: TrainLog) -> Curve:
        """(update, place on the horizontal axis) for the updates of a log; [] where it does not tell."""
        if self.against == "samples":
            return log.samples()
        return sorted(log.clock.items()) if self.against == "seconds" else [(log.update, log.update)]


def draw(report: Report, paths: Sequence[Path], style: Style) -> None:
    """The curves into each of `paths`, PNG, PDF or SVG by their suffix: valid NLL at the left, small panels at the right."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    with matplotlib.rc_context(_RC):
        labels = [_legible(method.label) for method in report.methods]
        rows = _legend_rows(labels, style.width)
        is_narrow = style.width < ONE_COLUMN
        height = (0.7 if is_narrow else 0.5) * style.width + 0.16 * rows
        figure = Figure(figsize=(style.width, height), dpi=DPI, layout="constrained")
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.02, h_pad=0.02)
        _panels(figure, report.methods, style)
        _legend(figure, labels, math.ceil(len(labels) / rows))
        if report.title and not is_narrow:
            figure.suptitle(report.title, fontsize=9).set_parse_math(False)  # a name with two dollars is a name
        for path in paths:
            # Without the date, so that the same logs give the same file.
            metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(path.suffix[1:])
            figure.savefig(path, metadata=metadata)


def _legible(label: str) -> str:
    # matplotlib leaves out of a legend what begins with a "_".
    return " " * label.startswith("_") + label


def _legend_rows(labels: Sequence[str], width: float) -> int:
    """As few as fit; matplotlib fills columns from the top, and each is as wide as its longest label."""
    for rows in range(1, len(labels)):
        columns = [labels[start : start + rows] for start in range(0, len(labels), rows)]
        if sum(0.5 + 0.058 * max(map(len, column)) for column in columns) <= width:  # inches, at 8 points
            return rows
    return len(labels)


def _panels(figure: Any, methods: Sequence[Method], style: Style) -> None:
    """The main panel, and beside it, in a wide figure, the small ones that have a curve."""
    small = [(f"valid {metric}", partial(_chosen_by, metric)) for metric in choosing_metrics(methods)] + PANELS
    small = [panel for panel in small if any(panel[1](peer.log) for m in methods for _, peer in m.peers())]
    if style.width < ONE_COLUMN or not small:
        _panel(figure.add_subplot(), methods, "valid NLL", TrainLog.valid_nll, style, size=8)
        return
    across = 1 if len(small) < 3 else 2
    left, right = figure.add_gridspec(1, 2, width_ratios=(4, 2 + 2 * across))
    _panel(figure.add_subplot(left), methods, "valid NLL", TrainLog.valid_nll, style, size=8)
    grid = right.subgridspec(math.ceil(len(small) / across), across)
    for number, (name, curve) in enumerate(small):
        _panel(figure.add_subplot(grid[number // across, number % across]), methods, name, curve, style, size=7)


def _legend(figure: Any, labels: Sequence[str], columns: int) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=label, linewidth=1.6, **look(n)) for n, label in enumerate(labels)]
    legend = figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=1.6,
        columnspacing=1.2, borderaxespad=0.1, labelspacing=0.25,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _chosen_by(metric: str, log: TrainLog) -> Curve:
    return log.chosen() if choosing_metric(log.settings) == metric else []


def _panel(
    axes: Any, methods: Sequence[Method], name: str, curve_of: Callable[[TrainLog], Curve], style: Style, size: int
) -> None:
    everything: list[Curve] = []
    label, unit = _unit(style, methods)
    for number, method in enumerate(methods):
        found = [(finite(curve_of(peer.log)), finite(style.axis(peer.log))) for _, peer in method.peers()]
        found = [(curve, [(u, x / unit) for u, x in axis]) for curve, axis in found if curve and along(curve, axis)]
        _lines(axes, [curve for curve, _ in found], [axis for _, axis in found], look(number))
        everything += [along(curve, axis) for curve, axis in found]
    _scales(axes, style, is_nll="NLL" in name)
    limits = focus(everything) if "NLL" in name else None
    if limits:
        axes.set_ylim(*limits)
    axes.set_title(name + (f" ({_nll_unit(methods)})" if "NLL" in name else ""), fontsize=size, loc="left", pad=3)
    axes.set_xlabel(label, fontsize=size, labelpad=2)
    axes.tick_params(labelsize=size, length=2.5, pad=2)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(style: Style, methods: Sequence[Method]) -> tuple[str, float]:
    """Label of the horizontal axis, and what one of its units is."""
    if style.against != "seconds":
        return {"updates": "updates", "samples": "samples seen by one model"}[style.against], 1.0
    longest = max((peer.log.seconds for method in methods for _, peer in method.peers()), default=0.0)
    name, unit = next(((n, u) for n, u in (("h", 3600.0), ("min", 60.0)) if longest > 2 * u), ("s", 1.0))
    return f"training time ({name})", unit


def _nll_unit(methods: Sequence[Method]) -> str:
    """Where a batch has as many targets as samples, a target is an image (or another sample with one label)."""
    batches = [
        fields for method in methods for _, peer in method.peers() for _, fields in peer.log.train_records()
        if "wpb" in fields and "bsz" in fields
    ]  # fmt: skip
    is_label = bool(batches) and all(fields["wpb"] == fields["bsz"] for fields in batches)
    return "bits per sample" if is_label else "bits per token"


def _scales(axes: Any, style: Style, is_nll: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    if style.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0), numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    # No "300m" for 0.3 minutes.
    axes.xaxis.set_major_formatter("{x:g}" if style.against == "seconds" else EngFormatter(sep=""))
    if style.log_y and is_nll:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(6))  # within a decade powers of ten would be one tick or none
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())


def _lines(axes: Any, curves: Sequence[Curve], places: Sequence[Curve], colour: dict[str, str]) -> None:
    """With several logs: a thin line for each, a band from the lowest to the highest, and their mean.

    `curves` are over updates, `places` tell where these stand. The mean is over logs at equal updates, at their mean place:
    seeds that took unequally long are still compared update by update.
    """
    for curve, axis in zip(curves, places) if len(curves) > 1 else ():
        axes.plot(*zip(*along(curve, axis)), linewidth=0.4, alpha=0.45, **colour)
    middle = band(curves) if curves else []
    if middle:
        axis = mean_curve(places)
        low, mean, high = (along([(point[0], point[n]) for point in middle], axis) for n in (1, 2, 3))
        xs = [x for x, _ in mean]
        axes.fill_between(xs, [y for _, y in low], [y for _, y in high], color=colour["color"], alpha=0.18, linewidth=0)
        axes.plot(*zip(*mean), linewidth=1.2, marker="o" if len(xs) == 1 else None, **colour)


def look(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def focus(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits of an NLL axis: the first quarter, where the loss falls from log2 V, may leave the picture at the top."""
    low = min((value for curve in curves for _, value in curve), default=math.inf)
    high = max((value for curve in curves for x, value in curve if x >= curve[-1][0] / 4), default=-math.inf)
    return (low - 0.05 * (high - low), high + 0.05 * (high - low)) if low < high else None
