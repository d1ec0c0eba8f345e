r"""`codistill-launch`: one fairseq job for each peer, started, shown and stopped together.

    codistill-launch --peers 2 -- \
        fairseq-train DATA --user-dir fairseq_codistill --criterion codistill_ce --save-dir RUN …

Peer i runs the same command with `--save-dir RUN/peer{i}`, `--seed S + i·10,000,000` and `--log-format json`, in a
process group of its own; it finds CODISTILL_PEER, CODISTILL_PEERS and CODISTILL_DIR in its environment and writes to
RUN/peer{i}/train.log. `codistill-launch status RUN` shows who takes part; see `launch_status`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Optional

from . import launch_checkpoint, launch_status
from .launch_peer import Peer
from .launch_plan import PeerPlan, Plan, make_plan
from .launch_progress import last_lines
from .launch_view import LiveView, PlainView, duration, print_summary, text_of

POLL_SECONDS = 0.25


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"{message} (see codistill-launch --help).")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="codistill-launch",
        allow_abbrev=False,
        usage="codistill-launch --peers N [options] -- COMMAND ...\n       codistill-launch status DIR [options]",
        description="Start one fairseq job for each peer, show them all, stop them together.",
        epilog="`codistill-launch status DIR` shows who takes part in a run, also one that others have started. "
        "Any other command than fairseq-train or fairseq-hydra-train (a script, a Slurm step) only gets its "
        "environment; it finds its index in $CODISTILL_PEER. Ctrl-C stops all peers, a second one kills them. "
        "Exit status: 0 when all peers ended well, 130 or 143 after Ctrl-C or SIGTERM, 2 for bad input, "
        "else that of the first peer that failed.",
    )
    add = parser.add_argument
    add("--peers", type=int, required=True, metavar="N", help="how many jobs teach each other")
    add("--gpus-per-peer", type=int, metavar="K", help="GPUs for each peer, 0 for none (default: an equal share)")
    add("--max-restarts", type=int, default=0, metavar="R", help="how often a failed peer starts again (default: 0)")
    add("--log-dir", metavar="DIR", help="logs go to DIR/peer{i}/train.log (default: the command's --save-dir)")
    add("--grace", type=float, default=15.0, metavar="SECONDS", help="from the signal to stop to SIGKILL (default: 15)")
    add("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Our options, and the command after the first `--`. Raises ValueError with one sentence."""
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = _parser().parse_args(list(argv[:split]))
    # A `--` after the command has begun is the command's own: srun -- fairseq-train.
    options.command += list(argv[split if options.command else split + 1 :])
    if options.peers < 1:
        raise ValueError(f"--peers must be at least 1, but is {options.peers}.")
    for name in ("gpus_per_peer", "max_restarts", "grace"):
        if (getattr(options, name) or 0) < 0:
            raise ValueError(f"--{name.replace('_', '-')} must not be negative, but is {getattr(options, name)}.")
    if not options.command:
        raise ValueError("a command must follow `--`, but there is none; did you forget it, or the `--`?")
    if shutil.which(options.command[0]) is None:
        raise ValueError(
            f"the command must be a program on PATH, but {options.command[0]!r} is not;"
            " did you forget to activate its environment?"
        )
    return options


def make_log(log: str, option: str) -> None:
    """Make a peer's log and its folders; raises ValueError, which names the option the path comes from."""
    try:
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, "ab"):
            pass
    except OSError as error:
        raise ValueError(f"{option} must be writable, but {log!r} cannot be made: {error.strerror}.") from error


class Signals:
    """SIGINT, SIGTERM and SIGHUP as data for the loop, and SIGCHLD to wake it: nothing is ever interrupted half-way."""

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        watched = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it: so do we
            watched.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, lambda *_: None) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> set[int]:
        """The signals that ask to stop and came within this time; returns at once when a child ends."""
        if not select.select([self._reader], [], [], seconds)[0]:
            return set()
        return set(self._reader.recv(4096)) - {signal.SIGCHLD}


class Supervisor:
    """The loop: watches all peers, restarts those that fail, passes signals on, ends when all have ended."""

    def __init__(self, plan: Plan, view: PlainView) -> None:
        self.plan, self.view = plan, view
        self.peers = [Peer(peer, len(plan.peers)) for peer in plan.peers]
        self.first_failure = 0  # its exit status
        self.stop_signal: Optional[int] = None
        self._stopped_at = self._deadline = 0.0

    def run(self) -> int:
        """Start all, watch all; returns the launcher's exit status."""
        with Signals() as signals, self.view:
            try:
                for note in self.plan.notes:
                    self.view.tell(f"note: {note}")
                for peer in self.peers:
                    self._start(peer)
                    self.view.tell(f"{peer.name}: {_resources(peer.plan)}, log {peer.plan.log}")
                while any(peer.status is None for peer in self.peers):
                    self.view.update(self.peers)
                    for number in signals.wait(POLL_SECONDS):
                        self._on_signal(number)
                    if self.stop_signal is not None and time.monotonic() > self._deadline:
                        self._signal_all(signal.SIGKILL)
                    for peer in self.peers:
                        if peer.poll() and peer.status and not peer.stopping:
                            self._on_failure(peer)
                self.view.update(self.peers)
            finally:
                for peer in self.peers:
                    peer.kill()
        return self.first_failure if self.stop_signal is None else 128 + self.stop_signal

    def _start(self, peer: Peer) -> None:
        with contextlib.suppress(OSError):  # what cannot be mended the peer itself reports
            mended = peer.plan.save_dir and launch_checkpoint.mend(peer.plan.save_dir)
            if mended:
                self.view.tell(f"{peer.name}: {mended}")
        peer.start()

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self.stop_signal is None:
            grace = self.plan.grace_seconds
            self.stop_signal, self._stopped_at, self._deadline = number, now, now + grace
            name = signal.Signals(number).name
            self.view.tell(f"{name}: stopping all peers within {grace:g} s (Ctrl-C again: at once).")
            for peer in self.peers:
                peer.stopping = peer.status is None
            self._signal_all(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        elif number == signal.SIGINT and now - self._stopped_at > 0.5:  # a wrapper may pass one Ctrl-C on twice
            self._deadline = now

    def _signal_all(self, number: int) -> None:
        for peer in self.peers:
            if peer.status is None:
                peer.signal(number)

    def _on_failure(self, peer: Peer) -> None:
        status = f"exit status {peer.status}{_signal_name(peer.status)}"
        where = f"after {duration(peer.seconds)}, at update {text_of(peer.progress.update)}"
        report = [f"{peer.name} failed with {status} {where}. The end of its log:"]
        report += [f"  | {line}" for line in last_lines(peer.plan.log)]
        if peer.restarts < self.plan.max_restarts:
            peer.restarts += 1
            report.append(f"{peer.name} is started again: restart {peer.restarts} of {self.plan.max_restarts}.")
            self.view.tell("\n".join(report), is_error=True)
            self._start(peer)
            return
        self.first_failure = self.first_failure or peer.status
        others = "; the other peers go on" if any(other.status is None for other in self.peers) else ""
        report.append(f"{peer.name} is not started again{others}. Log: {peer.plan.log}")
        self.view.tell("\n".join(report), is_error=True)


def _resources(plan: PeerPlan) -> str:
    gpus = plan.environ.get("CUDA_VISIBLE_DEVICES")
    threads = plan.environ.get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
    return (f"GPU {gpus}, " if gpus else "") + f"{threads} thread{'' if threads == '1' else 's'}"


def _signal_name(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(status - 128).name})" if status > 128 else ""
    return ""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command. Returns its exit status; bad input is one sentence on stderr and 2."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "status":
        return launch_status.main(argv[1:])
    try:
        options = parse_arguments(argv)
        plan = make_plan(options, os.environ)
        for peer in plan.peers:
            make_log(peer.log, "--log-dir" if options.log_dir else "--save-dir")
    except ValueError as error:
        print(f"codistill-launch: {error}", file=sys.stderr)
        return 2
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a peer's log may hold any sign, a terminal of LANG=C shows few
    # What elastic reports of a failed process we report with the end of its log.
    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)
    is_live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    supervisor = Supervisor(plan, LiveView(plan) if is_live else PlainView(plan))
    status = supervisor.run()
    print_summary(plan, supervisor.peers)
    return status


if __name__ == "__main__":
    sys.exit(main())
