"""The sweep's figure: what grows with the number of groups, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Sequence

Row = Dict[str, Any]
COLOURS = {50: "#D55E00", 500: "#0072B2", 2500: "#009E73"}  # by interval; Okabe and Ito's, for all eyes
LINKS = {0.125e9: "#D55E00", 1.25e9: "#0072B2", 12.5e9: "#009E73"}
STYLES = {"file_system": "-", "object_store": "--", "nfs_server": ":"}
MARKERS = {8: "o", 64: "s", 1024: "^"}
SIZE = 8


def draw(rows: Sequence[Row], path: Path) -> None:
    """Six panels as a PNG of about 1300 × 800 pixels."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(13, 8), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3)
    storage = [row for row in rows if row["part"] == "storage"]
    for row in storage:
        row["staleness"] = row["staleness_mean"] / row["interval"]
        row["skipped_share"] = row["skipped"] / max(1, row["skipped"] + row["published"])
        row["gigabytes"] = row["store_bytes_per_s"] / 1e9
    ring, everyone = ([row for row in storage if row["topology"] == topology] for topology in ("ring", "all"))
    _by_store(axes[0, 0], ring, "staleness", "ring: mean staleness (intervals N)")
    _by_store(axes[0, 1], everyone, "staleness", "all: mean staleness (intervals N)")
    _bytes(axes[1, 0], [row for row in storage if row["store"] == "file_system"])
    _by_store(axes[1, 1], everyone, "skipped_share", "all: share of skipped publishes")
    _pace(axes[0, 2], [row for row in rows if row["part"] == "pace"])
    _failures(axes[1, 2], [row for row in rows if row["part"] == "failures"])
    figure.savefig(path)


def _by_store(axes: Any, rows: Sequence[Row], name: str, title: str) -> None:
    for interval, colour in COLOURS.items():
        for store, style in STYLES.items():
            line = [row for row in rows if row["interval"] == interval and row["store"] == store]
            _line(axes, line, "peers", name, color=colour, linestyle=style, label=f"N={interval}, {store.replace('_', ' ')}")
    _finish(axes, title, "peers of 64 workers")
    axes.set_ylim(bottom=0)


def _bytes(axes: Any, rows: Sequence[Row]) -> None:
    for interval, colour in COLOURS.items():
        for topology, style in (("ring", "-"), ("all", "--")):
            line = [row for row in rows if row["interval"] == interval and row["topology"] == topology]
            _line(axes, line, "peers", "gigabytes", color=colour, linestyle=style, label=f"N={interval}, {topology}")
    _finish(axes, "the store's traffic, file system (GB/s)", "peers of 64 workers", log=True)


def _pace(axes: Any, rows: Sequence[Row]) -> None:
    for link, colour in LINKS.items():
        for workers, marker in MARKERS.items():
            line = [row for row in rows if row["between_bytes_per_s"] == link and row["workers"] == workers]
            label = f"{link * 8e-9:g} Gbit/s between, w={workers}"
            _line(axes, line, "peers", "relative_pace", color=colour, marker=marker, markersize=4, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    _finish(axes, "ring: updates/s, relative to one all_reduce group", "peers of w workers", log=True)


def _failures(axes: Any, rows: Sequence[Row]) -> None:
    for workers, marker in MARKERS.items():
        line = [row for row in rows if row["workers"] == workers]
        _line(axes, line, "failures_per_worker_hour", "relative_pace", color="#009E73", marker=marker, label=f"w={workers}")
    axes.axhline(1, color="black", linewidth=0.8)
    _finish(axes, "the same with failures (8 peers, 100 Gbit/s)", "failures per worker and hour")
    axes.set_xscale("symlog", linthresh=1e-6)


def _line(axes: Any, rows: List[Row], across: str, name: str, **look: Any) -> None:
    points = sorted((row[across], row[name]) for row in rows)
    if points:
        axes.plot(*zip(*points), linewidth=1.3, **look)


def _finish(axes: Any, title: str, across: str, log: bool = False) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    axes.set_title(title, fontsize=SIZE + 1, loc="left")
    axes.set_xlabel(across, fontsize=SIZE)
    axes.tick_params(labelsize=SIZE)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=SIZE - 2, frameon=False)
