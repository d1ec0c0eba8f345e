"""Stops the peers when the launcher is killed: a process that outlives it for as long as that takes.

SIGKILL leaves the launcher no time to stop anybody, and its peers, in process groups of their own, would train on. The guard
reads a pipe that only the launcher holds, so it ends with the launcher, however that dies and on every kind of Unix. A
parent-death signal would reach the first process of each peer alone, neither its ranks nor its data workers.
It runs as a script of its own, `python guard.py GRACE`, and needs nothing but Python.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import IO, BinaryIO, Optional

_LOOK_SECONDS = 0.05


class Guard:
    """The launcher's end of the pipe. Without a guard (no process to be had) everything else works as ever."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._process: Optional[subprocess.Popen] = None

    def __enter__(self) -> Guard:
        command = [sys.executable, "-I", "-S", __file__, str(self._grace_seconds)]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process is not None and self._process.stdin is not None
        return self._process.stdin

    @property
    def pipe(self) -> int:
        """Where a peer writes the number of its process group, as its first act."""
        return subprocess.DEVNULL if self._process is None else self._stdin.fileno()

    def forget(self, group: int) -> None:
        """A group has ended, and its number may come to stand for somebody else's."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._stdin.write(b"-%d\n" % group)


def watch(lines: BinaryIO, grace_seconds: float) -> None:
    """Read groups that began (`123`) and ended (`-123`) until the launcher is gone, then stop those that are left."""
    groups: set[int] = set()
    for line in lines:
        with contextlib.suppress(ValueError):
            number = int(line)
            groups.add(number) if number > 1 else groups.discard(-number)
    _signal(groups, signal.SIGTERM)
    end = time.monotonic() + grace_seconds
    while any(_signal({group}, 0) for group in groups) and time.monotonic() < end:
        time.sleep(_LOOK_SECONDS)
    _signal(groups, signal.SIGKILL)


def _signal(groups: set[int], number: int) -> bool:
    """Whether any of the groups is there."""
    found = False
    for group in groups:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)
            found = True
    return found


def main() -> None:
    # What a terminal or a scheduler sends to all is the launcher's to answer.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGTSTP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    watch(sys.stdin.buffer, float(sys.argv[1]))


if __name__ == "__main__":
    main()
