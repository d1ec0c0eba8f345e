r"""`codistill-launch status DIR`: who takes part in a run, how far, how fast and how old, by what lies in its exchange.

It needs no torch, and runs on any machine that sees the exchange. Another machine's clock proves nothing: a single look
shows what each peer says, with ages by the peer's own clock and marked so; `--watch` sees beats change, and tells by its
own clock who has fallen silent.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..common.output import failure, is_gone, tolerant_output
from ..exchange.manifest import FORMAT
from ..exchange.status import LIVE_STATES, SILENT_SECONDS, Age, Row, StatusReader, find_exchange, plain
from .view import duration, size, text_of


def run_line(reader: StatusReader) -> str:
    """Where the exchange is, and what its peers have agreed on."""
    run, sha256 = reader.run, reader.run["dictionary_sha256"]
    words = "no dictionary"
    if sha256 is not None:
        words = f"dictionary of {run['classes']} symbols (sha256 {plain(sha256[:12])})"
    peers = f"{run['peers']} peer{'s' if run['peers'] > 1 else ''}"
    return f"{plain(str(reader.store), 300)}: {peers}, {words}, format {FORMAT}"


def age_text(age: Age) -> str:
    """Like 12s by the local clock, 12s* by the writer's; 2h05m ahead* and absurd* where that cannot be right."""
    if age.ahead is not None:
        return "absurd*" if age.is_absurd else f"{duration(age.ahead)} ahead*"
    return duration(age.seconds) + ("" if age.local or age.seconds is None else "*")


def _update(row: Row) -> str:
    updates = row.heartbeat.updates if row.heartbeat else None
    share = f" ({row.update / updates:.0%})" if updates and row.update is not None and row.update <= updates else ""
    return f"{text_of(row.update)}/{updates}{share}" if updates is not None else text_of(row.update)


def _snapshot(row: Row) -> str:
    if "latest.json" in row.problems:
        return f"refused: {row.problems['latest.json']}"
    if row.newest is None:
        return "-"
    last = ", the last" if row.newest.done else ""
    return f"{row.newest.update}, {size(row.newest.bytes)}, {plain(row.newest.dtype, 12)}{last}"


def _teachers_cell(row: Row, most: int = 3) -> str:
    """Its teachers, the update held of each, and how far that is from its own."""

    def one(teacher: int, held: int) -> str:
        behind = (row.update or 0) - held
        return f"{teacher} at {held} ({abs(behind)} {'old' if behind >= 0 else 'ahead'})"

    told = [one(*item) for item in row.teachers.items()]
    return ", ".join(told[:most]) + (f", {len(told) - most} more" if len(told) > most else "") or "-"


def _heartbeat(row: Row) -> str:
    return f"refused: {row.problems['alive.json']}" if "alive.json" in row.problems else age_text(row.heartbeat_age)


def _state(row: Row) -> str:
    # Its last heartbeat is old by its own clock: whether that clock is right, one look cannot tell.
    doubtful = row.silent is None and row.state in LIVE_STATES and (row.heartbeat_age.seconds or 0) >= SILENT_SECONDS
    return row.state + ("?" if doubtful else "")


_STYLES = {"training": "green", "waiting": "cyan", "ended": "bold green", "silent": "bold red", "stopped": "yellow"}

# Heading, the narrowest terminal that shows it, and the cell.
_COLUMNS: tuple[tuple[str, int, Callable[[Row], str]], ...] = (
    ("peer", 0, lambda row: str(row.peer)),
    ("state", 0, _state),
    ("update", 0, _update),
    ("upd/s", 72, lambda row: text_of(row.heartbeat.speed if row.heartbeat else None, ".3g")),
    ("newest snapshot", 0, _snapshot),
    ("its age", 80, lambda row: age_text(row.snapshot_age)),
    ("valid loss", 90, lambda row: text_of(row.newest.valid_loss if row.newest else None, ".4g")),
    ("learns from", 120, _teachers_cell),
    ("host:pid", 140, lambda row: f"{plain(row.heartbeat.host, 40)}:{row.heartbeat.pid}" if row.heartbeat else "-"),
    ("heartbeat", 0, _heartbeat),
)


def table(rows: Sequence[Row], width: int) -> Any:
    """A rich table of all peers, for a terminal of `width` columns."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.ASCII2 if width >= 160 else box.SIMPLE_HEAD)
    columns = [(name, cell) for name, least, cell in _COLUMNS if width >= least]
    for name, _ in columns:
        shown.add_column(name, overflow="fold", justify="right" if name in ("peer", "upd/s", "valid loss") else "left")
    for row in rows:
        style = _STYLES.get(row.state, "dim")
        shown.add_row(*(Text(cell(row), style if name == "state" else "") for name, cell in columns))
    return shown


def notes(rows: Sequence[Row], reader: StatusReader, watching: bool) -> list[str]:
    """What the signs in the table mean, and what it cannot tell."""
    told = [reader.note] if reader.note else []
    if any(age_text(age).endswith("*") for row in rows for age in (row.heartbeat_age, row.snapshot_age)):
        told.append("* by its clock, not by this machine's: a clock may be wrong")
    if not watching and any(row.state in LIVE_STATES for row in rows):
        told.append("one look cannot tell whether a peer is still alive: --watch can, within 30 s")
    return told


def as_json(rows: Sequence[Row], reader: StatusReader) -> str:
    """One line. Ages in seconds, null where unknown; `…_by_its_clock`: by the writer's clock, which may be wrong."""

    def peer(row: Row) -> dict[str, Any]:
        heartbeat = {name: getattr(row.heartbeat, name, None) for name in ("updates", "speed", "host", "pid")}
        heartbeat["life"] = getattr(row.heartbeat, "start_id", None)
        snapshot = {name: getattr(row.newest, name, None) for name in ("update", "epoch", "bytes", "dtype", "fingerprint")}
        snapshot.update(valid_loss=getattr(row.newest, "valid_loss", None), last=getattr(row.newest, "done", None))
        ages = {"last_sign": row.heartbeat_age, "snapshot": row.snapshot_age}
        return {
            "peer": row.peer, "state": row.state, "silent": row.silent, "update": row.update, **heartbeat,
            "teachers": row.teachers, "newest": snapshot if row.newest else None, "problems": row.problems,
            **{f"{name}_age": age.seconds for name, age in ages.items()},
            **{f"{name}_age_by_its_clock": not age.local for name, age in ages.items()},
            **{f"{name}_clock_ahead": age.ahead for name, age in ages.items()},
        }  # fmt: skip

    told = {"exchange": str(reader.store), "run": reader.run, "note": reader.note, "peers": [*map(peer, rows)]}
    return json.dumps(told, allow_nan=False)


# The command.


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see codistill-launch status --help).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="codistill-launch status",
        allow_abbrev=False,
        description="Show a run's peers, their progress, speed and snapshots, from what lies in its exchange.",
        epilog="States: training, waiting (for a teacher), ended and stopped are the peer's own words; silent: no "
        "new heartbeat for 30 s while watched; absent: nothing of it is there. Ages with * are by the "
        "peer's own clock. Exit status: 0, also after Ctrl-C; 2 where DIR is no exchange.",
    )
    add = parser.add_argument
    add("dir", metavar="DIR", help="the run's --save-dir, or its exchange: a directory or a URL, as --codistill-dir")
    add("--watch", action="store_true", help="look again and again, until Ctrl-C")
    add("--seconds", type=float, default=2.0, metavar="S", help="between two looks (default: 2)")
    add("--json", action="store_true", help="for scripts: one line of JSON for each look")
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Raises ValueError with one sentence."""
    options = _parser().parse_args(list(argv))
    if not 0.1 <= options.seconds <= 86400:
        raise ValueError(f"--seconds must be from 0.1 to 86400, but is {options.seconds:g}.")
    return options


def _drawing(reader: StatusReader, rows: Sequence[Row], watching: bool, width: int) -> Any:
    from rich.console import Group
    from rich.text import Text

    when = time.strftime("%H:%M:%S ") if watching else ""
    below = Text("\n".join(notes(rows, reader, watching)), "dim")
    return Group(Text(when + run_line(reader)), table(rows, width), below)


def _show(reader: StatusReader, options: argparse.Namespace) -> None:
    """One look, or look after look."""
    from rich.console import Console
    from rich.live import Live

    is_live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    # In a pipe or a file a row is a line, however long.
    settings: dict[str, Any] = {} if sys.stdout.isatty() else {"width": 1000}
    settings.update({} if is_live else {"force_terminal": False, "color_system": None})
    console = Console(highlight=False, **settings)
    live = Live(console=console, auto_refresh=False) if is_live and options.watch and not options.json else None
    with live or contextlib.nullcontext():
        while True:
            rows = reader.look()
            if live:
                live.update(_drawing(reader, rows, True, console.width), refresh=True)
            elif options.json:
                print(as_json(rows, reader), flush=True)
            else:
                with console.capture() as drawn:  # printed here, as rich takes a closed pipe for a failure
                    console.print(_drawing(reader, rows, options.watch, console.width))
                print(drawn.get().rstrip("\n"), flush=True)
            # `… | head`: the reader has seen enough.
            if not options.watch or is_gone(sys.stdout) or failure(sys.stdout):
                return
            time.sleep(options.seconds)


@tolerant_output()
def main(argv: Sequence[str]) -> int:
    """The command, without its first word. Returns its exit status; bad input is one sentence on stderr and 2."""
    try:
        options = parse_arguments(argv)
        _show(StatusReader(find_exchange(options.dir)), options)
        if failure(sys.stdout):
            raise ValueError(f"what it shows cannot be written: {failure(sys.stdout)}")
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError) as error:
        print(f"codistill-launch status: {plain(str(error), 600)}", file=sys.stderr)
        return 2
    return 0
