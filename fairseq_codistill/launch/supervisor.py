"""Watches all peers from the first start to the last end: restarts, signals, and that nothing outlives the launcher."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from typing import Optional

from ..common.output import hurried
from . import checkpoint
from . import error as launch_error
from .guard import Guard
from .peer import Peer
from .plan import Plan
from .view import PlainView, duration, resources, text_of

POLL_SECONDS = 0.25
_OUTPUT_SECONDS = 1.0  # a reader that is stopped must not delay a signal


def _named(*names: str) -> tuple[int, ...]:
    """Those that the system has: `codistill-launch status` is imported with it, also where there are no such signals."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


# What ends a run: of schedulers too, and of a terminal (Ctrl-C, Ctrl-\, hanging up). All but the first as SIGTERM.
_STOPS = _named("SIGINT", "SIGTERM", "SIGQUIT", "SIGXCPU", "SIGHUP")
# Warnings of schedulers, some time before they end a job (Slurm's --signal=USR1@60, LSF, SGE). A program that has a handler
# gets them; fairseq has none, so there they stop the run while there is time to, and the batch script can queue it again.
_WARNINGS = _named("SIGUSR1", "SIGUSR2")


class Signals:
    """Signals as data for the loop, and SIGCHLD to wake it: nothing is ever interrupted half-way."""

    def __enter__(self) -> Signals:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        watched = [*_STOPS, *_WARNINGS, signal.SIGCHLD]
        for number in (signal.SIGHUP, *_WARNINGS):  # nohup, or a script's trap '', ignores it: so does the launcher
            if signal.getsignal(number) is signal.SIG_IGN:
                watched.remove(number)
        self._before = {number: signal.signal(number, lambda *_: None) for number in watched}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def wait(self, seconds: float) -> set[int]:
        """The signals other than SIGCHLD that came within this time; returns at once when a child ends."""
        if not select.select([self._reader], [], [], seconds)[0]:
            return set()
        return set(self._reader.recv(4096)) - {signal.SIGCHLD}


class Supervisor:
    """The loop: watches all peers, restarts those that fail, passes signals on, ends when all have ended."""

    def __init__(self, plan: Plan, view: PlainView) -> None:
        self.plan, self.view = plan, view
        self.guard = Guard(plan.grace_seconds)
        self.peers = [Peer(peer, len(plan.peers), self.guard) for peer in plan.peers]
        self.first_failure = 0  # its exit status
        self.stop_signal: Optional[int] = None
        self._stopped_at = self._deadline = 0.0
        self._told: dict[str, Peer] = {}  # who failed first of each reason

    def run(self) -> int:
        """Start all, watch all; returns the launcher's exit status."""
        with Signals() as signals, hurried(_OUTPUT_SECONDS), self.guard, self.view:
            try:
                for note in self.plan.notes:
                    self._tell(f"note: {note}")
                for peer in self.peers:
                    if self._start(peer):
                        self._tell(f"{peer.name}: {resources(peer.plan)}, log {peer.plan.log}")
                self._watch(signals)
            except BaseException:
                self._begin_to_stop()  # a fault of the launcher: the peers may still end well
                self._watch(signals)
                raise
            finally:
                for peer in self.peers:
                    peer.kill()
        return self.first_failure if self.stop_signal is None else 128 + self.stop_signal

    def _watch(self, signals: Signals) -> None:
        while any(peer.status is None for peer in self.peers):
            self._draw()
            for number in signals.wait(POLL_SECONDS):
                self._on_signal(number)
            if self._deadline and time.monotonic() > self._deadline:
                self._signal_all(signal.SIGKILL)
            for peer in self.peers:
                if peer.poll():
                    self._on_end(peer)
        self._draw()

    def _start(self, peer: Peer) -> bool:
        try:
            # A peer that would begin from update 0 because its checkpoint is torn had better not begin.
            mended = peer.plan.save_dir and checkpoint.mend(peer.plan.save_dir)
            if mended:
                self._tell(f"{peer.name}: {mended}")
            peer.start()
        except (ValueError, OSError) as error:
            peer.refuse()
            self.first_failure = self.first_failure or peer.status or 0
            self._tell(f"{peer.name} is not started: {error}", is_error=True)
        return peer.status is None

    # What is shown is decoration: no fault of it may stop a training.

    def _tell(self, text: str, is_error: bool = False) -> None:
        with contextlib.suppress(Exception):
            self.view.tell(text, is_error)

    def _draw(self) -> None:
        try:
            self.view.update(self.peers)
        except Exception as error:
            with contextlib.suppress(Exception):
                self.view.__exit__(None, None, None)
            is_plain = type(self.view) is PlainView
            self.view = PlainView(self.plan)
            if not is_plain:
                self._tell(f"note: the live view has failed ({type(error).__name__}: {error}); plain lines follow.")

    # What happens.

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        name = signal.Signals(number).name
        if number in _WARNINGS and self._pass_on(number, name):
            return
        if self.stop_signal is None:
            self.stop_signal = number
            self._tell(f"{name}: stopping all peers within {self.plan.grace_seconds:g} s (Ctrl-C again: at once).")
            self._begin_to_stop(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        elif number in (signal.SIGINT, signal.SIGQUIT) and now - self._stopped_at > 0.5:
            self._deadline = now  # half a second, as a wrapper may pass one Ctrl-C on twice

    def _begin_to_stop(self, number: int = signal.SIGTERM) -> None:
        self._stopped_at = time.monotonic()
        self._deadline = self._stopped_at + self.plan.grace_seconds
        for peer in self.peers:
            peer.stopping = peer.status is None
        self._signal_all(number)

    def _signal_all(self, number: int) -> None:
        for peer in self.peers:
            if peer.status is None:
                peer.signal(number)

    def _pass_on(self, number: int, name: str) -> bool:
        told = [peer for peer in self.peers if peer.status is None and peer.handles(number)]
        for peer in told:
            peer.tell(number)
        if told:
            self._tell(f"{name}: passed on to {', '.join(peer.name for peer in told)}, and training goes on.")
        return bool(told)

    def _on_end(self, peer: Peer) -> None:
        if peer.late_status:
            status = f"exit status {peer.late_status}{_signal_name(peer.late_status)}"
            self._tell(f"{peer.name} ended with {status} after its training was complete; it counts as finished.")
        elif peer.status and not peer.stopping:
            self._on_failure(peer)

    def _on_failure(self, peer: Peer) -> None:
        report = self._report(peer)
        if peer.restarts < self.plan.max_restarts:
            peer.restarts += 1
            report.append(f"{peer.name} is started again: restart {peer.restarts} of {self.plan.max_restarts}.")
            self._tell("\n".join(report), is_error=True)
            self._start(peer)
            return
        self.first_failure = self.first_failure or peer.status or 0
        others = "; the other peers go on" if any(other.status is None for other in self.peers) else ""
        report.append(f"{peer.name} is not started again{others}. Log: {peer.plan.log}")
        self._tell("\n".join(report), is_error=True)

    def _report(self, peer: Peer) -> list[str]:
        """Why it failed; a sentence that has been told of one peer is not repeated for the next."""
        status = f"exit status {peer.status}{_signal_name(peer.status or 0)}"
        head = f"{peer.name} failed with {status} after {duration(peer.seconds)}, at update {text_of(peer.progress.update)}"
        sentence, lines = launch_error.reason(peer.plan.log)
        same = launch_error.same_for_all(sentence)
        if same and same in self._told:
            first = self._told[same]
            return [f"{head}: as {'before' if first is peer else first.name}."]
        self._told[same] = peer
        head += ":" if sentence else ". The end of its log:"
        return [head, *(f"  | {line}" for line in lines)]


def _signal_name(status: int) -> str:
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(status - 128).name})" if status > 128 else ""
    return ""
