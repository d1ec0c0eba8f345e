"""Long-lived threads for whatever touches the storage. The training thread waits for them as long as it chooses to.

They are started once, at the beginning: later there may be no thread to be had (a limit of processes, Python's exit). One that
hangs in a dead file system is left behind, and keeps no process from ending.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from concurrent.futures import Future, wait
from typing import Any, Callable, Optional, Tuple


class Worker:
    """One thread that does what it is given, one after another. `idle`: done whenever nothing came for `period()` seconds."""

    def __init__(self, idle: Optional[Callable[[], None]] = None, period: Callable[[], Optional[float]] = lambda: None) -> None:
        self._idle, self._period = idle, period
        self._given: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: Optional[threading.Thread] = None
        self._last: Optional[Future] = None
        self._asked: Optional[Tuple[Any, Future]] = None

    def start(self) -> bool:
        """Start the thread if it does not run; False if none is to be had now."""
        if self._thread is None or not self._thread.is_alive():
            thread = threading.Thread(target=self._run, daemon=True, name="codistillation")
            try:
                thread.start()
            except (RuntimeError, MemoryError):
                return False
            self._thread = thread
        return True

    @property
    def is_busy(self) -> bool:
        """Something that was given is not done yet."""
        return self._last is not None and not self._last.done()

    def do(self, work: Callable, *args: Any) -> Future:
        """Give it `work`; what comes of that is in the future. Never raises."""
        future: Future = Future()
        if self.start():
            self._last = future
            self._given.put((future, work, args))
        else:
            future.set_exception(OSError(errno.EAGAIN, "no thread can be started"))
        return future

    def ask(self, work: Callable, *args: Any, seconds: float) -> Any:
        """What `work` gives, or raises. Raises TimeoutError when that takes longer; asked the same again, it waits on."""
        deadline = time.monotonic() + seconds
        question, future = self._asked or (None, None)
        if future is None or question != (work, args):
            if not self.rest(seconds):
                raise TimeoutError(errno.ETIMEDOUT, "the storage does not answer")
            future = self.do(work, *args)
        self._asked = ((work, args), future)
        wait([future], max(0.0, deadline - time.monotonic()))
        if not future.done():
            raise TimeoutError(errno.ETIMEDOUT, "the storage does not answer")
        self._asked = None
        return future.result()

    def rest(self, seconds: Optional[float] = None) -> bool:
        """Wait until everything that was given is done; False if that took longer than `seconds`."""
        if self._last is not None:
            wait([self._last], None if seconds is None else max(0.0, seconds))
        return not self.is_busy

    def stop(self) -> None:
        """End the thread after what it was given."""
        self._given.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; False if it took longer."""
        if self._thread is not None:
            self._thread.join(max(0.0, seconds))
        return self._thread is None or not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                given = self._given.get(timeout=self._period())
            except queue.Empty:
                if self._idle is not None:
                    with contextlib.suppress(Exception):
                        self._idle()
                continue
            if given is None:
                return
            future, work, args = given
            try:
                future.set_result(work(*args))
            except BaseException as error:
                future.set_exception(error)
            del given, future, work, args  # what came of it may be large
