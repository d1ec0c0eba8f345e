"""When and how a training ends, seen while Python is still whole, in every way that fairseq is started.

fairseq tells nobody that a training has ended, and Python's exit is too late: executors are closed, S3's libraries fail, and
Python 3.12 starts no thread any more. But fairseq's program logs "done training in … seconds" after every training that was
not broken off, whichever condition ended it: updates, epochs, hours, patience or learning rate. What ends without these
words (an exception, wherever it was caught, sys.exit, a signal) was not completed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from multiprocessing import util
from types import FrameType
from typing import Any, Callable, Optional

logger = logging.getLogger(__name__)

_LAST_WORDS = "done training"
_SIGTERM_SECONDS = 10.0  # schedulers kill half a minute after SIGTERM
_DATA_SECONDS = 10.0  # for fairseq's data threads to end; each needs as long as one batch takes


def watch(task: Any, end: Callable[[bool], None], seems_complete: Callable[[], bool]) -> None:
    """Call `end(completed)` once, when the training of `task` is over. To be called below the program that trains it.

    `seems_complete`: asked at Python's exit, only where the program is not fairseq's or a fork with the same last words.
    """
    process, pending = os.getpid(), [end]

    def once(completed: bool) -> None:
        if not pending or os.getpid() != process:
            return  # a data-loading child has inherited this
        ending = pending.pop()
        forget()
        end_data_threads()
        try:
            ending(completed)
        except Exception as error:  # the training is over and saved, whatever this is
            logger.warning(f"codistillation: the exchange was not ended well: {type(error).__name__}: {error}")

    def at_exit() -> None:
        once(bool(pending) and speaker is None and not _is_failing() and seems_complete())

    speaker = _speaker()
    forget = _hear(speaker, task, lambda: once(True)) if speaker is not None else lambda: None
    # Before executors are closed; ranks that torch spawns come to multiprocessing's finalizers first.
    with contextlib.suppress(AttributeError, RuntimeError):
        threading._register_atexit(at_exit)  # type: ignore[attr-defined]
    util.Finalize(None, at_exit, exitpriority=10)


def _speaker() -> Optional[logging.Logger]:
    """The logger of the program below which this is called, if it has the last words to say."""
    frame: Optional[FrameType] = sys._getframe()
    while frame is not None:
        if any(isinstance(text, str) and text.startswith(_LAST_WORDS) for text in frame.f_code.co_consts):
            found = frame.f_globals.get("logger")
            return found if isinstance(found, logging.Logger) else None
        frame = frame.f_back
    return None


def _hear(speaker: logging.Logger, task: Any, then: Callable[[], None]) -> Callable[[], None]:
    """Call `then` once the program of `task` has said its last words; the function returned stops that.

    A handler or filter would hear nothing where the level is above INFO, or where hydra's configuration has disabled the
    logger. So its method `info` is wrapped.
    """
    info = speaker.info

    def listening(message: Any, *args: Any, **kwargs: Any) -> None:
        info(message, *args, **{**kwargs, "stacklevel": kwargs.get("stacklevel", 1) + 1})
        # One process may train one model after another (hydra's multirun).
        of_this_task = sys._getframe(1).f_locals.get("task", task) is task
        if isinstance(message, str) and message.startswith(_LAST_WORDS) and of_this_task:
            then()

    def forget() -> None:
        if vars(speaker).get("info") is listening:
            del speaker.info
            if info != speaker.info:
                speaker.info = info  # type: ignore[method-assign]

    speaker.info = listening  # type: ignore[assignment, method-assign]
    return forget


def _is_failing() -> bool:
    return getattr(sys, "last_value", None) is not None or sys.exc_info()[0] is not None


def end_data_threads(seconds: float = _DATA_SECONDS) -> None:
    """Let fairseq's data threads end. One that frees a tensor while Python ends aborts the process, with a good training.

    Each waits to put a batch into its full queue: it is told that this was the last one, and its queue is emptied.
    """
    deadline = time.monotonic() + seconds
    for thread in threading.enumerate():
        queue = getattr(thread, "_queue", None)
        if type(thread).__name__ != "BackgroundConsumer" or queue is None:
            continue
        thread._max_len = 0  # type: ignore[attr-defined]
        while thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # it is empty
                queue.get_nowait()
            thread.join(0.01)


def drain_on_sigterm(drain: Callable[[float], Any]) -> Callable[[], None]:
    """A scheduler's SIGTERM ends the process as it would have, once what is being published is published.

    The function returned gives SIGTERM back."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return lambda: None  # another handler decides
    process = os.getpid()

    def on_sigterm(number: int, frame: Any) -> None:
        if os.getpid() == process:  # and not a data-loading child, which inherits this
            drain(_SIGTERM_SECONDS)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def give_back() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, on_sigterm)
    return give_back
