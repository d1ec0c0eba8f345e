"""`codistill-report`: fairseq's JSON logs in, one table and one figure out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..common.output import failure, tolerant_output
from ..common.paths import expanded, printable
from ..common.version import VersionAction
from .advice import advice
from .figure import AXES, FORMATS, Style, draw
from .files import Found, ReportError, load, split_label
from .notes import notes, some
from .significance import compare
from .summary import Method
from .table import Report, columns, rows, show


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="codistill-report", description="Table and curves from fairseq's JSON logs.",
        epilog="exit status: 0; 1 if something named could not be read (the rest is shown); 2 if nothing is shown")  # fmt: skip
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run, a folder of seeds, or a root with METHOD/seedN/peerN/train.log "
        "below; LABEL=PATH names it")  # fmt: skip
    add("--out", metavar="DIR", help="for table.md, results.json and curves.png (default: report in the first RUN)")
    add("--title", help="above the table and the figure (default: the first RUN's name)")
    add("--metric", action="append", default=[], metavar="NAME", help="one more column: fairseq's valid_NAME, e.g. "
        "accuracy, at the update of the best NLL; may be repeated")  # fmt: skip
    add("--version", action=VersionAction, help="print the version, and end")
    add("--baseline", metavar="METHOD", help="compare BLEU and chrF of every method with this one's, by sacreBLEU's "
        "paired bootstrap; needs SET.hyp and SET.ref beside the logs")  # fmt: skip
    add("--format", action="append", default=[], choices=FORMATS, metavar="FORMAT", help="the figure also as pdf or svg; "
        "may be repeated")  # fmt: skip
    add("--width", type=float, default=Style.width, metavar="INCHES", help="of the figure in print: 3.3 for one column, with "
        "the main panel alone (default: 6.8)")  # fmt: skip
    add("--against", choices=AXES, default=AXES[0], help="what curves are drawn against: updates, samples that one model has "
        "seen, or seconds of training (default: updates)")  # fmt: skip
    add("--log-x", action="store_true", help="logarithmic horizontal axes")
    add("--log-y", action="store_true", help="logarithmic axes of NLLs")
    add("--per-peer", action="store_true", help="also a row for each peer, and for the best of them")
    return parser


def check_metrics(metrics: Sequence[str], methods: Sequence[Method]) -> None:
    fields = [fields for m in methods for _, peer in m.peers() for _, fields in peer.log.valid_records()]
    known = sorted({name for one in fields for name in one} - {"ppl"})  # fairseq's ppl may be squared; this package computes it
    for name in metrics:
        if name not in known:
            choice = ", ".join(known)
            raise ReportError(f"--metric must be a field of the valid lines ({choice}), but is {name!r} instead.")


def make_report(args: argparse.Namespace, root: Path, found: Found) -> Report:
    check_metrics(args.metric, found.methods)
    compared, told = compare(found, args.baseline) if args.baseline else ([], [])
    lines = notes(found.methods) + told + advice(found.methods)
    if found.silent:
        lines.append(f"Left out, for nothing is logged yet: {some([os.path.relpath(path, root) for path in found.silent])}.")
    if found.broken:
        names = [os.path.relpath(path, root) for path in found.broken]
        lines.append(f"WARNING: left out, for it could not be used: {some(names)}.")
    table = rows(found.methods, columns(found.methods, args.metric), args.per_peer, compared)
    table = [list(map(printable, row)) for row in table]
    title = root.name if args.title is None else args.title
    return Report(printable(title), found.methods, table, list(map(printable, lines)), compared)


def figure_style(args: argparse.Namespace, methods: Sequence[Method]) -> Style:
    """Raises ReportError for a size that is none, and where no log has what curves are to be drawn against."""
    if not 2 <= args.width <= 20:
        raise ReportError(f"--width must be from 2 to 20 inches, but is {args.width:g}.")
    style = Style(args.width, args.against, args.log_x, args.log_y)
    logs = [peer.log for method in methods for _, peer in method.peers()]
    if not any(value > 0 for log in logs for _, value in style.axis(log)):
        field = {"samples": "bsz", "seconds": "wall"}.get(args.against, "num_updates")
        raise ReportError(f"--against {args.against} needs {field!r} in the lines of training, but no log has it.")
    return style


def write(report: Report, out: Path, figures: Sequence[str], style: Style) -> None:
    """OUT/table.md, OUT/results.json, and the figures."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(report.markdown(), encoding="utf-8")
        numbers = json.dumps(report.results(out), indent=1, ensure_ascii=False, allow_nan=False)
        # A name that is no UTF-8 becomes JSON's own escape, which reads back as that name.
        (out / "results.json").write_text(numbers + "\n", encoding="utf-8", errors="backslashreplace")
        draw(report, [out / name for name in figures], style)
    except OSError as error:
        raise ReportError(f"--out must be a folder that can be written, but {out} is not: {error.strerror}.") from None


@tolerant_output()  # `codistill-report … | head`: the files are written all the same
def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    try:
        first = split_label(args.runs[0])[1]
        root = first.parent if first.is_file() else first
        out = Path(os.path.abspath(expanded(args.out))) if args.out else root / "report"
        found = load(args.runs)
        report = make_report(args, root, found)
        figures = [f"curves.{suffix}" for suffix in dict.fromkeys(["png", *args.format])]
        style = figure_style(args, found.methods)
        try:
            write(report, out, figures, style)
        finally:
            show(report)
        print(f"\nwritten to {printable(str(out))}: table.md, results.json, {', '.join(figures)}", flush=True)
        if failure(sys.stdout):
            raise ReportError(f"the report is written to {out}, but not shown: {failure(sys.stdout)}.")
    except ReportError as error:
        return fail(str(error), 2)
    except OSError as error:
        return fail(f"{error.filename} cannot be read: {error.strerror}.", 2)
    return max([fail(sentence, 1) for sentence in found.broken.values()], default=0)


def fail(sentence: str, status: int) -> int:
    print(f"codistill-report: error: {printable(sentence)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
