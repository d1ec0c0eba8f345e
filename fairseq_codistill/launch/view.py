"""What the launcher shows: plain lines in a log, a live table on a terminal, and how each peer ended."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any, Optional

from .peer import Peer
from .plan import PeerPlan, Plan

BAR_WIDTH = 40  # at most; the numbers beside it say more
PLAIN_SECONDS = 10.0  # without a terminal, a peer reports at most this often between validations


def text_of(value: Optional[float], spec: str = "") -> str:
    return "-" if value is None else format(value, spec)


def duration(seconds: Optional[float]) -> str:
    """Like 45s, 3m20s, 2h05m, 1d02h."""
    if seconds is None:
        return "-"
    minutes, left = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{left:02d}s" if minutes else f"{left}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def size(count: float) -> str:
    """Bytes as people say them: 812 B, 1.5 kB, 105.3 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if value < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def sparkline(values: Sequence[float], width: int = 10) -> str:
    """The course of the last values, one character each: low ▁ to high █."""
    shown = [value for value in values[-width:] if value == value and abs(value) != float("inf")]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / (high - low or 1.0))] for value in shown)


def staleness_text(updates: Optional[float]) -> str:
    """How many updates old the teachers are; a teacher that is further than its pupil is ahead."""
    if updates is None:
        return "-"
    rounded = round(updates)
    return f"{-rounded} ahead" if rounded < 0 else str(rounded)


def progress_line(peer: Peer) -> str:
    """One peer's progress as plain words, only what its log has told."""
    seen = peer.progress
    share = f" ({seen.update / seen.total:.0%})" if seen.update is not None and seen.total else ""
    parts = [f"{peer.name} {peer.state}", f"update {text_of(seen.update)}/{text_of(seen.total)}{share}"]
    parts += [f"epoch {seen.epoch}"] if seen.epoch is not None else []
    parts += [f"loss {seen.train_nll:.3f}"] if seen.train_nll is not None else []
    parts += [f"valid nll {seen.valid_nll:.3f} (best {seen.best_valid_nll:.3f})"] if seen.validations else []
    if seen.score is not None:
        parts.append(f"valid {seen.metric} {seen.score:.2f} (best {text_of(seen.best_score, '.2f')})")
    parts += [f"alpha {seen.alpha:.3g}"] if seen.alpha is not None else []
    parts += [f"staleness {staleness_text(seen.staleness)}"] if seen.staleness is not None else []
    parts += [f"agreement {seen.agreement:.0%}"] if seen.agreement is not None else []
    parts += [f"{seen.ups:.3g} updates/s, {duration(seen.seconds_left)} left"] if seen.ups else []
    return " | ".join(parts)


def metric_of(peers: Sequence[Peer]) -> str:
    """What other than the NLL chooses the best checkpoint; "" for none."""
    return next((peer.progress.metric for peer in peers if peer.progress.metric), "")


def resources(plan: PeerPlan) -> str:
    """What a peer has of the machine, in words."""
    gpus = plan.environ.get("CUDA_VISIBLE_DEVICES")
    threads = plan.environ.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
    return (f"GPU {gpus}, " if gpus else "") + f"{threads} thread{'' if threads == '1' else 's'}"


class PlainView:
    """One line for each validation of a peer, and now and then between: for logs, so without control codes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.began = time.monotonic()
        self._told: dict[str, tuple[float, int, Optional[int]]] = {}  # peer: when, validations, update

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def tell(self, text: str, is_error: bool = False) -> None:
        """Say something that happened once."""
        print(text, flush=True)

    def update(self, peers: Sequence[Peer]) -> None:
        """Show where the peers are."""
        now = time.monotonic()
        for peer in peers:
            seen = peer.progress
            when, validations, update = self._told.get(peer.name, (self.began, 0, None))
            is_due = seen.update != update and now - when >= PLAIN_SECONDS
            if is_due or len(seen.validations) != validations:
                self._told[peer.name] = (now, len(seen.validations), seen.update)
                self.tell(f"{time.strftime('%H:%M:%S')} {progress_line(peer)}")


class QuietTerminal:
    """Within it the terminal does not echo what is typed: a ^C behind the table would move it, and leave a line of it."""

    def __enter__(self) -> QuietTerminal:
        self._before: Any = None
        with contextlib.suppress(Exception):  # stdin may be no terminal, or be gone
            import termios

            self._before = termios.tcgetattr(sys.stdin.fileno())
            quiet = termios.tcgetattr(sys.stdin.fileno())
            quiet[3] &= ~termios.ECHO
            self._set(quiet)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            with contextlib.suppress(Exception):
                self._set(self._before)
            self._before = None

    @staticmethod
    def _set(attributes: list[Any]) -> None:
        import termios

        # From the background a change would stop the whole job.
        if os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, attributes)


class LiveView(PlainView):
    """A table of all peers that is drawn anew in its place; what happens once is printed above it."""

    STYLES = {"training": "green", "validating": "cyan", "finished": "bold green", "failed": "bold red"}

    def __init__(self, plan: Plan) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(plan)
        self.console = Console(highlight=False)
        self.is_utf8 = self.console.encoding.startswith("utf")
        self._spinners: dict[str, Any] = {}
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._terminal = QuietTerminal()

    def __enter__(self) -> LiveView:
        self._terminal.__enter__()
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)
        self._terminal.__exit__(None, None, None)

    def tell(self, text: str, is_error: bool = False) -> None:
        from rich.text import Text

        first, newline, rest = text.partition("\n")
        self.console.print(Text(first, "bold red" if is_error else "") + Text(newline + rest, "dim"), soft_wrap=True)

    def update(self, peers: Sequence[Peer]) -> None:
        from rich import box
        from rich.cells import cell_len
        from rich.markup import escape
        from rich.panel import Panel

        elapsed = duration(time.monotonic() - self.began)
        title = f"codistill-launch · {len(peers)} peer{'s' if len(peers) > 1 else ''} · {elapsed}"
        table = self._table(peers)
        # As wide as the table needs it, and never cut in the middle of the path.
        width = min(self.console.width, max(self.console.measure(table).maximum, len(title) + 2) + 4)
        told = (f"tail -f {shlex.quote(self.plan.run_dir)}/peer*/train.log · Ctrl-C stops all", "Ctrl-C stops all")
        subtitle = escape(told[cell_len(told[0]) > width - 4])
        panel = Panel(table, title=title, subtitle=subtitle, width=width, box=box.ROUNDED, border_style="dim")
        self._live.update(panel, refresh=True)

    def _table(self, peers: Sequence[Peer]) -> Any:
        """As many columns as fit without cutting a cell, and a bar in what is left."""
        columns = [column for column in self._columns(peers) if column[1] <= self.console.width]
        room = -1
        while room < 0:
            table = self._drawn(peers, columns, 0)
            room = self.console.width - 4 - self.console.measure(table).maximum
            if room < 0:
                if len(columns) == 1:
                    return table
                columns.remove(max(columns, key=lambda column: column[1]))
        return self._drawn(peers, columns, min(BAR_WIDTH, room - 1)) if room > 8 else table

    def _drawn(self, peers: Sequence[Peer], columns: Sequence[tuple[str, int, Any]], bar: int) -> Any:
        from rich.table import Table

        if bar:
            columns = [*columns[:2], ("progress", 0, self._bar), *columns[2:]]
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
        for name, _, _ in columns:
            justify: Any = "left" if name in ("peer", "state", "progress", "") else "right"
            table.add_column(name, justify=justify, no_wrap=True, width=bar if name == "progress" else None)
        for peer in peers:
            table.add_row(*(cell(peer) for _, _, cell in columns))
        return table

    def _columns(self, peers: Sequence[Peer]) -> list[tuple[str, int, Any]]:
        """Name, the narrowest terminal that shows it, and the cell; where it is too narrow all the same, the highest such
        number goes first. What no peer logs has no column."""

        def logged(name: str) -> int:
            return 0 if any(getattr(peer.progress, name) is not None for peer in peers) else sys.maxsize

        return [
            ("peer", -9, lambda peer: str(peer.plan.index)),
            ("state", -8, self._state),
            ("update", -7, lambda peer: f"{text_of(peer.progress.update)}/{text_of(peer.progress.total)}"),
            ("epoch", 90, lambda peer: text_of(peer.progress.epoch)),
            ("loss", 60, lambda peer: text_of(peer.progress.train_nll, ".3f")),
            ("valid", 40, self._valid),
            ("best", 100, lambda peer: text_of(peer.progress.best_valid_nll, ".3f")),
            ("", 120 if self.is_utf8 else sys.maxsize, lambda peer: sparkline(peer.progress.validations)),
            (metric_of(peers), max(60, logged("score")), lambda peer: text_of(peer.progress.score, ".2f")),
            (f"best {metric_of(peers)}", max(100, logged("score")), lambda peer: text_of(peer.progress.best_score, ".2f")),
            ("alpha", max(70, logged("alpha")), lambda peer: text_of(peer.progress.alpha, ".3g")),
            ("stale", max(80, logged("staleness")), lambda peer: staleness_text(peer.progress.staleness)),
            ("agree", max(100, logged("agreement")), lambda peer: text_of(peer.progress.agreement, ".0%")),
            ("upd/s", 110, lambda peer: text_of(peer.progress.ups, ".3g")),
            ("left", 50, lambda peer: duration(peer.progress.seconds_left)),
            ("restarts", 0 if any(peer.restarts for peer in peers) else sys.maxsize, lambda peer: str(peer.restarts)),
        ]

    def _state(self, peer: Peer) -> Any:
        from rich.spinner import Spinner
        from rich.text import Text

        style = self.STYLES.get(peer.state.split()[0], "yellow")
        if peer.status is not None:
            return Text(peer.state, style)
        spinner = self._spinners.setdefault(peer.name, Spinner("dots" if self.is_utf8 else "line"))
        spinner.update(text=Text(peer.state, style), style=style)
        return spinner

    @staticmethod
    def _bar(peer: Peer) -> Any:
        from rich.progress_bar import ProgressBar

        total = peer.progress.total
        return ProgressBar(total=total or 1, completed=peer.progress.update or 0 if total else 0)

    @staticmethod
    def _valid(peer: Peer) -> Any:
        from rich.text import Text

        seen = peer.progress
        is_best = bool(seen.validations) and seen.valid_nll == seen.best_valid_nll
        return Text(text_of(seen.valid_nll, ".3f"), "bold green" if is_best else "")


def print_summary(plan: Plan, peers: Sequence[Peer]) -> None:
    """How each peer ended, where its log is, and what to do next."""
    from rich.console import Console

    # In a pipe or a file a row is a line, however long.
    plain: dict[str, Any] = {} if sys.stdout.isatty() else {"force_terminal": False, "color_system": None, "width": 1000}
    console = Console(highlight=False, markup=False, **plain)
    table = _summary(peers, bool(plain), with_logs=True)
    has_room = console.measure(table, options=console.options.update(width=1000)).maximum <= console.width
    console.print(table if has_room else _summary(peers, bool(plain), with_logs=False))
    if not has_room:  # a path that is broken over lines cannot be copied
        console.print(f"Logs:  {shlex.quote(plan.run_dir)}/peer*/train.log", soft_wrap=True)
    if any(peer.stopping and peer.progress.update for peer in peers):
        console.print("The same command again goes on from the last checkpoints.", soft_wrap=True)
    if any(peer.progress.validations for peer in peers):
        console.print(f"Table and curves:  codistill-report {shlex.quote(plan.run_dir)}", soft_wrap=True)


def _summary(peers: Sequence[Peer], is_ascii: bool, with_logs: bool) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.ASCII2 if is_ascii else box.SIMPLE_HEAD)
    metric = [f"best valid {metric_of(peers)}"] if metric_of(peers) else []
    for name in ["peer", "status", "updates", "best valid nll", *metric, "restarts", "time", *["log"] * with_logs]:
        table.add_column(name, justify="left" if name in ("status", "log") else "right", no_wrap=name == "log")
    for peer in peers:
        best, update = text_of(peer.progress.best_valid_nll, ".3f"), text_of(peer.progress.update)
        scores = [best, *[text_of(peer.progress.best_score, ".2f")] * len(metric)]
        row = [peer.plan.index, peer.state, update, *scores, peer.restarts, duration(peer.seconds)]
        table.add_row(*map(str, row + [peer.plan.log] * with_logs))
    return table
