"""stdout and stderr that never raise: a closed pipe, a full disk or a stopped terminal costs the words, not the work."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, Optional

_AT_ONCE = 4096  # bytes: a pipe that `select` calls ready takes so many without waiting (PIPE_BUF)


class Tolerant(io.TextIOBase):
    """Text to a file descriptor, unbuffered, so that nothing is left to fail when Python ends.

    What cannot be written is dropped. `patience`: seconds to wait for a reader or a terminal that is stopped, None for ever.
    `failure`: why the last words were dropped, if the system said so; `is_gone`: no later word will be read, as the reader
    has closed its end, which is no failure.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor, self._encoding = descriptor, encoding
        self.patience: Optional[float] = None
        self.is_gone, self.failure = False, ""
        self._is_stuck = False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return "replace"

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        rest = memoryview(text.encode(self._encoding, "replace"))
        try:
            while rest and self._is_ready():
                rest = rest[os.write(self._descriptor, rest[:_AT_ONCE]) :]
        except OSError as error:
            self.is_gone = error.errno in (errno.EPIPE, errno.EIO, errno.EBADF)
            self.failure = "" if self.is_gone else error.strerror or str(error)
        return len(text)

    def _is_ready(self) -> bool:
        patience = 0.0 if self._is_stuck and self.patience is not None else self.patience
        self._is_stuck = not select.select([], [self._descriptor], [], patience)[1]
        return not self._is_stuck


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """Within it sys.stdout and sys.stderr are `Tolerant`; also a decorator. Streams without a descriptor stay."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_tolerant, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def hurried(seconds: float) -> Iterator[None]:
    """Within it output waits no longer than `seconds`, for a loop that has more to do than to be read."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Tolerant)]
    for stream in streams:
        stream.patience = seconds
    try:
        yield
    finally:
        for stream in streams:
            stream.patience = None


def is_gone(stream: Any) -> bool:
    """Whether nobody will read what is written to it."""
    return getattr(stream, "is_gone", False)


def failure(stream: Any) -> str:
    """Why words for it were lost, for a command whose words are its work; "" if none were, or nobody wants them."""
    return getattr(stream, "failure", "")


def _tolerant(stream: Any) -> Any:
    if stream is None:  # Python's own word for a descriptor that was closed when it began
        return open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    try:
        if os.name != "posix":
            raise OSError("select knows sockets only")
        return Tolerant(stream.fileno(), stream.encoding or "utf-8")
    except (OSError, ValueError, AttributeError):  # a test's, or a notebook's
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a peer's log may hold any sign, a terminal of LANG=C shows few
        return stream
