"""When does codistillation pay? Its gain over one peer alone and over all_reduce against the generalisation gap of the former.

    python -m benchmarks.when_it_pays.draw                    # all committed runs, into benchmarks/results/when_it_pays
    python -m benchmarks.when_it_pays.draw RESULTS … --out DIR

RESULTS/…/METHOD/seedN/peerN/train.log as recipes leave them. A codistilled METHOD is compared with the folder `single` or
`alone` beside it or above it (one peer alone), and with `all_reduce_no_smoothing` and `all_reduce` (label smoothing) there, by
seeds that both have: NLLs of validation in bits, a codistilled seed being the mean over its peers. The gain is the rival's
best minus its own best (each of as many validations), or the one at the end. The gap is that of one peer alone at the end
of its run: valid NLL minus train NLL. Only runs of the same length, data and batch are compared (a model of all_reduce has
the batches of all its workers).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from fairseq_codistill.report import advice
from fairseq_codistill.report.files import ReportError, load, locate
from fairseq_codistill.report.summary import Method, Run
from fairseq_codistill.report.table import markdown_table

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "benchmarks/results/when_it_pays"
ALONE, PLAIN, SMOOTHED = ("single", "alone"), "all_reduce_no_smoothing", "all_reduce"
SWEEPS = ("tuning", "levers", "plain", "burn_in")  # folders of settings that were tried, not chosen
FORMATS = ("png", "pdf")
CORPORA = {  # folder of the run alone -> its data, in the figure
    "recipes/multi30k_en_de/results": "Multi30k, 6,000 pairs",
    "recipes/multi30k_en_de/results/default": "Multi30k, 6,000 pairs",
    "recipes/multi30k_en_de/results/two_cores": "Multi30k, all",
    "recipes/multi30k_en_de/results/default_all": "Multi30k, all",
    "recipes/newstest_de_en/results/over_fitting": "newstest, 2,500 pairs",
    "recipes/newstest_de_en/results/default": "newstest, 2,500 pairs",
    "recipes/newstest_de_en/results/two_cores": "newstest, 8,000 pairs",
    "recipes/newstest_de_en/results/default_8k": "newstest, 8,000 pairs",
    "recipes/tatoeba_de_en/results/two_cores": "Tatoeba",
    "recipes/tatoeba_de_en/results/default": "Tatoeba",
    "recipes/demo/results": "the demo's grammar",
    "recipes/fashion_mnist/results": "Fashion-MNIST (bits per image)",
}
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000 #8C6D31".split()


class Gain(NamedTuple):
    """The rival's NLL minus that of codistillation, bits: (mean, lowest, highest) over seeds."""

    best: Tuple[float, float, float]
    end: Tuple[float, float, float]


class Point(NamedTuple):
    """A codistilled method and its rivals."""

    log: str  # its folder, below which its logs are
    alone: str
    seeds: List[str]
    gap: float  # of one peer alone
    over: Dict[str, Gain]  # "alone", and where there are such runs "all_reduce" and "all_reduce, smoothed"

    @property
    def is_sweep(self) -> bool:
        return any(part in SWEEPS for part in Path(self.log).parts)

    @property
    def corpus(self) -> str:
        folder = str(Path(self.alone).parent)
        return CORPORA.get(folder, folder)


def points(folders: Sequence[Path]) -> List[Point]:
    """One for each codistilled method that has a run alone, in the order of their folders."""
    methods: Dict[Path, Method] = {}
    for method in sorted({locate(log).method for folder in folders for log in folder.rglob("train.log")}):
        methods.update(_load(method))
    return [point for folder, method in methods.items() if advice.is_taught(method) for point in _point(folder, methods)]


def _load(folder: Path) -> Dict[Path, Method]:
    try:
        found = load([str(folder)])
    except ReportError as error:  # one broken run hides no other
        print(f"when_it_pays: WARNING: left out: {error}", file=sys.stderr)
        return {}
    for sentence in found.broken.values():
        print(f"when_it_pays: WARNING: left out: {sentence}", file=sys.stderr)
    return {folder: found.methods[0]}


def _point(folder: Path, methods: Dict[Path, Method]) -> Iterator[Point]:
    method = methods[folder]
    alone = _rival(folder, methods, ALONE)
    if alone is None or not _same_data(method, methods[alone], workers=1):
        return
    seeds = _common(method, methods[alone])
    if not seeds:
        return
    chosen = Method("", [run for run in methods[alone].runs if run.name in seeds])
    gap = advice.mean_gap(chosen)
    if gap is None:
        return
    over = {"alone": _gain(method, methods[alone])}
    workers = max(len(run.peers) for run in method.runs)
    for name, label in ((PLAIN, "all_reduce"), (SMOOTHED, "all_reduce, smoothed")):
        rival = _rival(folder, methods, (name,))
        if rival is None or not _same_data(method, methods[rival], workers) or not _common(method, methods[rival]):
            continue
        # Without smoothing a recipe may call it all_reduce, too.
        label = "all_reduce" if advice.is_plain(methods[rival]) else label
        over.setdefault(label, _gain(method, methods[rival]))
    yield Point(_shown(folder), _shown(alone), seeds, gap.bits, over)


def _shown(folder: Path) -> str:
    return str(folder.relative_to(ROOT)) if ROOT in folder.parents else str(folder)


def _rival(folder: Path, methods: Dict[Path, Method], names: Sequence[str]) -> Optional[Path]:
    """The nearest: beside the method's folder, else above it."""
    places = [above / name for above in (folder.parent, folder.parent.parent) for name in names]
    return next((place for place in places if place in methods), None)


def _same_data(method: Method, rival: Method, workers: int) -> bool:
    """Whether the rival has the same data in batches `workers` times as large, and trained for as many updates."""
    pairs = [(advice.batch(method), advice.batch(rival)), (advice.epochs(method), advice.epochs(rival))]
    lengths = [max(peer.log.update for _, peer in one.peers()) for one in (method, rival)]
    alike = all(other == own == 0 or 1 / advice.SAME < other / (workers * own) < advice.SAME for own, other in pairs)
    return alike and lengths[0] == lengths[1]


def _common(method: Method, rival: Method) -> List[str]:
    return sorted({run.name for run in method.runs} & {run.name for run in rival.runs})


def _gain(method: Method, rival: Method) -> Gain:
    own, theirs = ({run.name: run for run in one.runs} for one in (method, rival))
    seeds = _common(method, rival)
    return Gain(*(_spread([_nll(theirs[s], key) - _nll(own[s], key) for s in seeds]) for key in ("best", "last")))


def _nll(run: Run, key: str) -> float:
    return run.values()[f"{key}_valid_nll"]


def _spread(values: Sequence[float]) -> Tuple[float, float, float]:
    return statistics.fmean(values), min(values), max(values)


def table(found: Sequence[Point]) -> str:
    """Markdown; + is a gain of codistillation."""
    rivals = ("alone", "all_reduce", "all_reduce, smoothed")
    heading = [f"over {rival}: {at}" for rival in rivals for at in ("best", "end")]
    rows = [["point", "codistilled", "one peer alone", "seeds", "gap of alone", *heading]]
    for number, point in enumerate(found, start=1):
        gains = [_cell(point.over.get(rival), at) for rival in rivals for at in ("best", "end")]
        rows.append([str(number), point.log, point.alone, str(len(point.seeds)), f"{point.gap:.2f}", *gains])
    return markdown_table(rows)


def _cell(gain: Optional[Gain], at: str) -> str:
    if gain is None:
        return "–"
    mean, low, high = getattr(gain, at)
    return f"{mean:+.3f}" + (f" ({low:+.3f} to {high:+.3f})" if low < high else "")


def draw(found: Sequence[Point], paths: Sequence[Path]) -> None:
    """Two panels, 6.8 inches wide as printed: the gain over one peer alone and over all_reduce without smoothing."""
    import matplotlib
    from matplotlib.figure import Figure

    corpora = list(dict.fromkeys(point.corpus for point in found))
    with matplotlib.rc_context({"pdf.fonttype": 42, "axes.linewidth": 0.6, "font.size": 8}):
        figure = Figure(figsize=(6.8, 3.9), dpi=200, layout="constrained")
        for axes, rival in zip(figure.subplots(1, 2), ("alone", "all_reduce")):
            _panel(axes, found, rival, corpora)
        handles = [_marker(corpus, COLOURS[n % len(COLOURS)], "o") for n, corpus in enumerate(corpora)]
        handles += [_marker("setting of a sweep", "white", "o"), _marker("all_reduce with label smoothing", "grey", "^")]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=7.5, handletextpad=0.1)
        for path in paths:
            figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)


def _marker(label: str, colour: str, shape: str):
    from matplotlib.lines import Line2D

    edge = "black" if colour == "white" else colour
    return Line2D([], [], label=label, marker=shape, linestyle="", color=colour, markeredgecolor=edge, markersize=5)


def _panel(axes, found: Sequence[Point], rival: str, corpora: Sequence[str]) -> None:
    shapes = {"alone": {"alone": "o"}, "all_reduce": {"all_reduce": "o", "all_reduce, smoothed": "^"}}[rival]
    labels = []
    for number, point in enumerate(found, start=1):
        colour = COLOURS[corpora.index(point.corpus) % len(COLOURS)]
        for name, shape in shapes.items():
            if name in point.over:
                mean, low, high = point.over[name].best
                axes.errorbar(
                    point.gap, mean, [[mean - low], [high - mean]], marker=shape, color=colour, markersize=4, linewidth=0.8,
                    markerfacecolor="white" if point.is_sweep else colour, markeredgewidth=0.8,
                )  # fmt: skip
                if shape == "o" and not point.is_sweep:
                    labels.append((mean, point.gap, str(number)))
    axes.margins(0.12)
    _number(axes, labels)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_title(f"gain over {'one peer alone' if rival == 'alone' else 'all_reduce'} (bits, best validation)", fontsize=8)
    axes.set_xlabel("generalisation gap of one peer alone (bits)")
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _number(axes, labels: Sequence[Tuple[float, float, str]]) -> None:
    """Write (y, x, number) beside the points, on alternate sides, and as far apart as their height where points are close."""
    low, high = axes.get_ylim()
    least = 0.03 * (high - low)  # of 6 points in a panel of 2.7 inches
    tops = {"left": -float("inf"), "right": -float("inf")}
    for place, (y, x, text) in enumerate(sorted(labels)):
        side = "left" if place % 2 else "right"
        tops[side] = max(y, tops[side] + least)
        shift = 0.09 if side == "left" else -0.09  # bits
        line = {"arrowstyle": "-", "linewidth": 0.3, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(text, (x, y), (x + shift, tops[side]), ha=side, va="center", fontsize=6, arrowprops=line)


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", nargs="*", type=Path, metavar="RESULTS", help="folders with logs (default: recipes/*/results)")
    add("--out", type=Path, default=OUT, help="for table.md and the figure (default: benchmarks/results/when_it_pays)")
    args = parser.parse_args(argv)
    folders = [folder.resolve() for folder in args.results] or sorted(ROOT.glob("recipes/*/results"))
    found = points(folders)
    if not found:
        told = "RESULTS must hold a codistilled run with `single` or `alone` beside it, but has none."
        print(f"when_it_pays: {told}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    title, words = __doc__.splitlines()[0], " ".join(__doc__.split("\n\n")[2].split())
    parts = [f"# {title}", "![figure](figure.png)", f"{words} In brackets: lowest and highest seed.", table(found)]
    (args.out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    draw(found, [args.out / f"figure.{kind}" for kind in FORMATS])
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
