"""Many lines through a function on all cores: in order, in blocks, with a bounded number of them in memory."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Callable, List, TypeVar

BLOCK_ITEMS = 5000  # for some tenths of a second of work, about 2 MB of text
AHEAD = 3  # blocks for each worker that are under way or wait to be fetched
_KILLED = "a worker process was killed. Was the memory short? Then try fewer --jobs"

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """How many processes can work at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_blocks(function: Callable[[List[Item]], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """``function`` of each block of ``items``, in order. ``function`` must be picklable, and pure.

    Memory does not grow with the input: no more than ``AHEAD`` blocks for each of the ``jobs`` processes exist at once.
    What fits into one block is done here, without any other process.
    """
    iterator = iter(items)
    blocks = iter(lambda: list(itertools.islice(iterator, BLOCK_ITEMS)), [])
    first = next(blocks, None)
    if first is None:
        return
    second = next(blocks, None) if jobs > 1 else None
    if second is None:
        yield from map(function, itertools.chain([first], blocks))
        return
    yield from _map_in_processes(function, itertools.chain([first, second], blocks), jobs)


def _map_in_processes(function: Callable[[List[Item]], Result], blocks: Iterable[List[Item]], jobs: int) -> Iterator[Result]:
    # Spawned, not forked: a fork would inherit the pipes by which the others see that their parent has died.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker) as pool:
        waiting: deque = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(function, block))
                if len(waiting) >= AHEAD * jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(_KILLED) from error
        finally:
            for future in waiting:
                future.cancel()


def run_apart(function: Callable[..., Result], *arguments: object) -> Result:
    """``function(*arguments)`` in a process of its own, whose memory goes back to the system when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise RuntimeError(_KILLED) from error


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
