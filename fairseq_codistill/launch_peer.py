"""One peer: its processes, started, watched, signalled and ended as a group."""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import signal
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Optional

from .launch_plan import PeerPlan
from .launch_progress import LogFollower


class _InheritedOutput:
    """Elastic's `LogsSpecs` that redirects nothing: its own truncate the file, ours must append (see `Peer.start`)."""

    def reify(self, envs: dict[int, dict[str, str]]) -> Any:
        from torch.distributed.elastic.multiprocessing import LogsDest

        return LogsDest(stdouts={0: ""}, stderrs={0: ""}, error_files={0: os.devnull})


class Peer:
    """One peer: a process group under an elastic context of its own, as a context kills all it holds when one fails."""

    def __init__(self, plan: PeerPlan, peers: int) -> None:
        self.plan, self.peers = plan, peers
        self.progress = LogFollower()
        self.restarts = 0
        self.status: Optional[int] = None  # exit status; None while it runs
        self.stopping = self.killed = False
        self.began, self.seconds = time.monotonic(), 0.0
        self.context: Any = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    @property
    def name(self) -> str:
        return f"peer{self.plan.index}"

    @property
    def state(self) -> str:
        """In the view's words: starting, training, validating, ending, stopping, stopped, finished, failed."""
        if self.status is None:
            return "stopping" if self.stopping else self.progress.phase
        if self.status == 0:
            return "finished"
        return "stopped" if self.stopping else f"failed ({self.status})"

    def start(self) -> None:
        """Start (again). All output is appended to the log, under a line that names attempt and command."""
        from torch.distributed.elastic.multiprocessing import start_processes

        self.status, self.killed, self.progress.phase = None, False, "starting"
        environ = {**self.plan.environ, "CODISTILL_RESTART": str(self.restarts)}
        self._write_header(environ)
        # `exec` leaves no shell behind; >> lets every process of the peer append without overwriting another's lines.
        script = 'log=$1; shift; exec "$@" >>"$log" 2>&1 </dev/null'
        arguments = ("-c", script, "codistill-launch", self.plan.log, *self.plan.command)
        # In the main thread elastic installs signal handlers that raise anywhere, even between a fork and its record.
        with ThreadPoolExecutor(1) as thread:
            self.context = thread.submit(
                start_processes, self.name, "/bin/sh", {0: arguments}, {0: environ}, _InheritedOutput()
            ).result()

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
        return self.context.pids()[0]

    def poll(self) -> bool:
        """Read the log, ask for the processes; True when the peer has ended since the last call."""
        if self.status is not None:
            return False
        self.seconds = time.monotonic() - self.began
        result = self.context.wait(timeout=0)
        self._follow()  # after the question, so that the last words of a dead peer are read
        # When stopping, the rest of the group has its time to end well too, as long as the grace lasts.
        if result is None or (self.stopping and not self.killed and self._group_lives()):
            return False
        self.signal(signal.SIGKILL)  # what the peer left behind: data-loader workers, other ranks
        failure = result.failures.get(0)
        code = failure.exitcode if failure else 0
        self.status = code if code >= 0 else 128 - code
        return True

    def _follow(self) -> None:
        with contextlib.suppress(OSError), open(self.plan.log, "rb") as log:
            log.seek(self._offset)
            data = log.read(1 << 22)
            self._offset += len(data)
            self.progress.feed(self._decoder.decode(data))

    def signal(self, number: int) -> None:
        """Send a signal to every process of the peer's group."""
        self.killed = self.killed or number == signal.SIGKILL
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _group_lives(self) -> bool:
        with contextlib.suppress(ChildProcessError):
            # As process 1 of a container we inherit orphans; their zombies would count as alive.
            os.waitpid(-self.pid, os.WNOHANG)
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        """End every process of the peer now."""
        if self.context is not None and self.status is None:
            self.signal(signal.SIGKILL)
            self.context.close(death_sig=signal.SIGKILL)
