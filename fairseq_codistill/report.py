"""`codistill-report`: fairseq's JSON logs in, one table and one figure out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .output import failure, tolerant_output
from .report_figure import draw
from .report_files import ReportError, load_methods, split_label
from .report_notes import notes, some
from .report_summary import Method
from .report_table import Report, columns, rows, show


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


@tolerant_output()  # `codistill-report … | head`: the files are written all the same
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
        if failure(sys.stdout):
            raise ReportError(f"the report is written to {out}, but not shown: {failure(sys.stdout)}.")
    except ReportError as error:
        print(f"codistill-report: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"codistill-report: error: {error.filename} cannot be read: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
