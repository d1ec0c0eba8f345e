"""The curves of all methods as one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..common.fairseq_log import choosing_metric
from .curves import band
from .log import Curve, TrainLog
from .notes import choosing_metrics
from .summary import Method
from .table import Report

COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #8C6D31".split()  # Okabe and Ito's, for all eyes
STYLES = ("-", "--", ":", "-.")
PANELS: list[tuple[str, Callable[[TrainLog], Curve]]] = [
    ("train NLL (bits per token)", TrainLog.train_nll),
    ("α", lambda log: log.train_curve("codistill_alpha")),
    ("agreement with peers (share of top-1)", lambda log: log.train_curve("codistill_agreement")),
    ("staleness of peers (updates)", lambda log: log.train_curve("codistill_staleness")),
]


def draw(report: Report, path: Path) -> None:
    """The curves as a PNG of about 1200 × 550 pixels: valid NLL at the left, small panels at the right."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state
    from matplotlib.lines import Line2D

    methods = report.methods
    panels = [(f"valid {metric}", partial(_chosen_by, metric)) for metric in choosing_metrics(methods)] + PANELS
    panels = [panel for panel in panels if any(panel[1](peer.log) for m in methods for _, peer in m.peers())]
    across = 1 if len(panels) < 3 else 2
    legend_rows = math.ceil(len(methods) / 5)
    figure = Figure(figsize=(12, 5 + 0.25 * legend_rows), dpi=100, layout="constrained")
    left, right = figure.add_gridspec(1, 2, width_ratios=(5, 2 + 2 * across))
    _panel(figure.add_subplot(left), methods, "valid NLL (bits per token)", TrainLog.valid_nll, size=10)
    small = right.subgridspec(max(1, math.ceil(len(panels) / across)), across)
    for number, (name, curve) in enumerate(panels):
        _panel(figure.add_subplot(small[number // across, number % across]), methods, name, curve, size=8)
    # matplotlib leaves out of a legend what begins with a "_".
    labels = [" " * method.label.startswith("_") + method.label for method in methods]
    handles = [Line2D([], [], label=label, linewidth=2, **look(n)) for n, label in enumerate(labels)]
    in_a_row = math.ceil(len(methods) / legend_rows)
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=in_a_row, frameon=False)
    for text in (*legend.get_texts(), figure.suptitle(report.title, fontsize=12)):
        text.set_parse_math(False)  # a name with two dollars is a name
    figure.savefig(path)


def _chosen_by(metric: str, log: TrainLog) -> Curve:
    return log.chosen() if choosing_metric(log.settings) == metric else []


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


def look(number: int) -> dict[str, str]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number // len(COLOURS) % len(STYLES)]}


def focus(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits of an NLL axis: the first quarter, where the loss falls from log2 V, may leave the picture at the top."""
    low = min((value for curve in curves for _, value in curve), default=math.inf)
    high = max((value for curve in curves for update, value in curve if update >= curve[-1][0] / 4), default=-math.inf)
    return (low - 0.05 * (high - low), high + 0.05 * (high - low)) if low < high else None
