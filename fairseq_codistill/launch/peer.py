"""One peer: its processes, started, watched, signalled and ended as a group."""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Optional

from .guard import Guard
from .plan import FairseqCommand, PeerPlan
from .progress import LogFollower

# The first process of a peer: names its group to the guard, whose pipe is its stdin (see guard.py), then becomes the
# command. `exec` leaves no shell behind; >> lets every process of the peer append without overwriting another's lines.
_SCRIPT = '(echo $$) >&0 2>/dev/null; log=$1; shift; exec "$@" >>"$log" 2>&1 </dev/null'
# fairseq would die of these, which schedulers send as a warning to every process of a job (Slurm's --signal=USR1@60).
# Ignored from the start, they still reach whoever installs a handler: a fork of fairseq that saves its work.
_WARNED_SCRIPT = "trap '' USR1 USR2; " + _SCRIPT
_KILL_SECONDS = 30.0  # a process in the middle of a disk's or a GPU's work may not die at once, or never


class Peer:
    """One peer: the process that `plan` names, and all that it starts, in a process group of their own."""

    def __init__(self, plan: PeerPlan, peers: int, guard: Optional[Guard] = None) -> None:
        self.plan, self.peers, self.guard = plan, peers, guard or Guard(0)
        self.progress = LogFollower()
        self.restarts = 0
        self.status: Optional[int] = None  # exit status; None while it runs
        self.late_status = 0  # what it ended with after its training was complete, which does not count as failed
        self.refused = self.stopping = self.killed = False
        self.began, self.seconds = time.monotonic(), 0.0
        self._is_training = FairseqCommand(plan.command).is_training
        self._process: Optional[subprocess.Popen] = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    @property
    def name(self) -> str:
        return f"peer{self.plan.index}"

    @property
    def state(self) -> str:
        """In the view's words: starting, training, validating, ending, stopping, stopped, finished, failed, not started."""
        if self.status is None:
            return "stopping" if self.stopping else self.progress.phase
        if self.status == 0:
            return "finished"
        if self.refused:
            return "not started"
        return "stopped" if self.stopping else f"failed ({self.status})"

    def start(self) -> None:
        """Start (again). All output is appended to the log, under a line that names attempt and command.

        Raises OSError where no process is to be had.
        """
        self.status, self.killed, self.late_status, self.progress.phase = None, False, 0, "starting"
        environ = {**self.plan.environ, "CODISTILL_RESTART": str(self.restarts)}
        self._write_header(environ)
        script = _WARNED_SCRIPT if self._is_training else _SCRIPT
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", script, "codistill-launch", self.plan.log, *self.plan.command],
            env={**os.environ, **environ}, stdin=self.guard.pipe, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def refuse(self) -> None:
        """Not to be started at all; counts as failed."""
        self.status, self.refused = 1, True

    def _write_header(self, environ: Mapping[str, str]) -> None:
        words = [f"{name}={shlex.quote(value)}" for name, value in environ.items()]
        words += [shlex.quote(word) for word in self.plan.command]
        head = f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} | codistill-launch | {self.name} of {self.peers}"
        # A full disk must not stop the other peers: this one fails by itself when it writes.
        with contextlib.suppress(OSError), open(self.plan.log, "a+", encoding="utf-8") as log:
            self._offset = self._offset or log.tell()
            log.write(("\n" if log.tell() else "") + f"{head} | restart {self.restarts} | {' '.join(words)}\n")

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was started"
        return self._process.pid

    def poll(self) -> bool:
        """Read the log, ask for the processes; True when the peer has ended since the last call."""
        if self.status is not None or self._process is None:
            return False
        self.seconds = time.monotonic() - self.began
        code = self._process.poll()
        self._follow(code is not None)  # after the question, so that the last words of a dead peer are read
        # When stopping, the rest of the group has its time to end well too, as long as the grace lasts.
        if code is None or (self.stopping and not self.killed and self._group_lives()):
            return False
        self.signal(signal.SIGKILL)  # what the peer left behind: data-loader workers, other ranks
        self.guard.forget(self.pid)
        self.status = code if code >= 0 else 128 - code
        # fairseq says this when the last checkpoint is written. What fails afterwards, as Python ends, has cost nothing,
        # and to train again would cost much. Another program than fairseq's may have had more to do.
        if self.status and self._is_training and self.progress.phase == "ending" and not self.stopping:
            self.late_status, self.status = self.status, 0
        return True

    def _follow(self, to_the_end: bool = False) -> None:
        with contextlib.suppress(OSError), open(self.plan.log, "rb") as log:
            log.seek(self._offset)
            while data := log.read(1 << 22):
                self._offset += len(data)
                self.progress.feed(self._decoder.decode(data))
                if not to_the_end:
                    return

    def handles(self, number: int) -> bool:
        """Whether its first process has a handler for a signal, which would otherwise be its death or pass unnoticed.

        False where the system does not tell (no /proc).
        """
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))
            return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
        return False

    def tell(self, number: int) -> None:
        """Send a signal to its first process alone."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.pid, number)

    def signal(self, number: int) -> None:
        """Send a signal to every process of the peer's group."""
        self.killed = self.killed or number == signal.SIGKILL
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _group_lives(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            # As process 1 of a container the launcher inherits orphans; their zombies would count as alive.
            os.waitpid(-self.pid, os.WNOHANG)
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """End every process of the peer now."""
        if self._process is not None and self.status is None:
            self.signal(signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_SECONDS)
            self.guard.forget(self.pid)
