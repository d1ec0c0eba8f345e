"""Waiting for the teachers: at the start, in lockstep, for a read. All ranks of a group wait together; rank 0 alone looks."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any, Callable, Dict, List, Optional, Set

from ..exchange.background import BackgroundExchange
from ..exchange.exchange import Exchange
from ..exchange.manifest import BadSnapshot, Manifest
from . import group

logger = logging.getLogger(__name__)

_LOOK_AGAIN = 0.05  # seconds between looks at the exchange while waiting; other machines cannot wake this one
_SLICE = 30.0  # seconds after which waiting ranks hear from rank 0, far below what a process group takes for a hang


class Barrier:
    """`background`: the exchange of rank 0, None on other ranks. `sleep`: takes seconds."""

    def __init__(
        self, exchange: Exchange, background: Optional[BackgroundExchange], teachers: List[int],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._exchange, self._background, self._teachers, self._sleep = exchange, background, teachers, sleep
        self._missed: Dict[int, Any] = {}  # teachers whose update did not come in time, and what showed them alive then
        self._slow: Set[int] = set()  # teachers whose last read did not end in time

    def await_first_snapshots(self, seconds: float) -> None:
        """Until each teacher has published something."""
        all_ready = lambda: all(self._look(teacher, None) for teacher in self._teachers)  # noqa: E731
        if self._await(all_ready, seconds) or self._background is None:
            return
        for teacher in self._teachers:
            if self._look(teacher, None) is None:
                logger.warning(
                    f"codistillation: peer {teacher} has not appeared in {self._exchange.store} within {seconds:g} s "
                    "(--codistill-wait); training starts without it"
                )

    def await_update(self, update: int, seconds: float) -> None:
        """Lockstep: until each teacher has published `update`, or has ended before it. One that was late once is
        not waited for again before its heartbeat or its snapshot has changed."""
        all_ready = lambda: all([self._need_not_wait(teacher, update) for teacher in self._teachers])  # noqa: E731
        if self._await(all_ready, seconds) or self._background is None:
            return
        for teacher in self._teachers:
            if teacher not in self._missed and self._look(teacher, update) is None:
                self._missed[teacher] = self._liveness_of(teacher)
                self._background.warn(
                    teacher,
                    f"lockstep is broken: no snapshot of update {update} has come in time; it is not waited for again before "
                    "it shows a new heartbeat.",
                )

    def read(self, teachers: List[int], update: Optional[int], seconds: float) -> None:
        """Until what is new of the teachers has been read and verified; `update`: see `BackgroundExchange.look`.

        Those that were late, or whose storage hung before, are given a moment only."""
        if self._background is None:
            self._await(bool, seconds, asked_for=False)
            return
        remaining, impatient = self._background.look_now(teachers, update), self._slow.union(self._missed)
        self._await(lambda: impatient.issuperset(remaining()), seconds, asked_for=False)
        self._slow = self._slow.difference(teachers).union(remaining())

    @property
    def _rank_0(self) -> BackgroundExchange:
        assert self._background is not None, "rank 0 alone looks at the exchange"
        return self._background

    def _need_not_wait(self, teacher: int, update: int) -> bool:
        """The teacher's snapshot is there; or it was late, and no heartbeat has come since; or its storage still hangs."""
        if self._look(teacher, update) is not None:
            self._missed.pop(teacher, None)
            return True
        if teacher in self._slow and self._rank_0.is_reading(teacher):
            return True
        if teacher not in self._missed:
            return False
        alive = self._liveness_of(teacher)
        if alive is None or alive == self._missed[teacher]:
            return True
        del self._missed[teacher]
        return False

    def _liveness_of(self, teacher: int) -> Any:
        """What changes while the teacher is alive; None where that cannot be seen."""
        with contextlib.suppress(OSError):
            return self._rank_0.ask(teacher, self._liveness, teacher)
        return None

    def _liveness(self, teacher: int) -> List[Any]:
        seen: List[Any] = [None, None]
        with contextlib.suppress(BadSnapshot):
            heartbeat = self._exchange.heartbeat(teacher)
            seen[0] = heartbeat and (heartbeat.start_id, heartbeat.beat)
        with contextlib.suppress(BadSnapshot):
            newest = self._exchange.newest(teacher)
            seen[1] = newest and (newest.update, newest.checksum)
        return seen

    def _look(self, teacher: int, update: Optional[int]) -> Optional[Manifest]:
        """The teacher's snapshot of `update`, or its last if it will make no more; with None, its newest."""
        with contextlib.suppress(BadSnapshot, OSError):
            return self._rank_0.ask(teacher, self._snapshot, teacher, update)
        return None

    def _snapshot(self, teacher: int, update: Optional[int]) -> Optional[Manifest]:
        manifest = self._exchange.newest(teacher) if update is None else self._exchange.at(teacher, update)
        if manifest is None and update is not None:
            newest = self._exchange.newest(teacher)
            # It will make no more, or no longer keeps that one.
            is_last = newest is not None and (newest.update > update or newest.done)
            manifest = newest if is_last else None
        return manifest

    def _await(self, ready: Callable[[], bool], seconds: float, asked_for: bool = True) -> bool:
        """Wait until rank 0 finds it `ready`, on all ranks. In slices: a process group takes long silence for a hang."""
        start, deadline = time.monotonic(), time.monotonic() + seconds
        answer = None
        while answer is None:
            slice_end = time.monotonic() + _SLICE
            while self._background is not None and answer is None and time.monotonic() < slice_end:
                if ready():
                    answer = True
                elif time.monotonic() >= deadline:
                    answer = False
                else:
                    self._sleep(_LOOK_AGAIN)
            answer = group.share(answer)
        if self._background is not None and asked_for:
            self._background.totals.waited_s += time.monotonic() - start
        return answer
