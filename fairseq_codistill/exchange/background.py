"""Carries snapshots between training and exchange, in background threads, so that an exchange never shows in a step.

The training thread copies its weights and goes on; a worker checks, writes and syncs them. One worker for each teacher
notices its new snapshots, reads and verifies them ahead of the reload; another sends the heartbeat. The training thread
never touches the storage itself. Whatever fails or hangs there costs the teaching of one peer and never stops the training.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import secrets
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Callable, Deque, Dict, List, Optional, Set, Tuple

import torch

from .exchange import BEAT, Exchange, IndexTaken, host_name
from .manifest import BadSnapshot, Heartbeat, Manifest, plain
from .snapshot import Buffer, Weights
from .status import StatusReader, in_words
from .worker import Worker

logger = logging.getLogger(__name__)

_TRIES = 3  # how often one snapshot is read before it is given up: a disk or a server may have had a bad moment
_FIRST_PERIOD, _SHORTEST_PERIOD, _LONGEST_PERIOD = 0.5, 0.1, 10.0  # seconds between two looks at a teacher
_LOOKS = 50  # looks at each teacher between two exchanges
_SPEED_BEATS = 13  # heartbeats, so a minute, over which the speed is a mean
_MOMENT = 1.0  # seconds to wait for an answer of the storage before looking whether the wait is over
# What the storage may take for one snapshot, at its start or at the end of training: so many seconds, and one for each MB.
_SHORTEST_LIMIT, _LONGEST_LIMIT, _BYTES_PER_SECOND = 30.0, 300.0, 1e6
_STOP_SECONDS = 10.0  # for the last heartbeat and for the threads to end; one that hangs in a dead storage is left behind


@dataclass
class Totals:
    """What the exchange has cost since the training began. `hidden_s`: seconds of work in the background; `visible_s`:
    seconds for which training stood still, apart from `copy_s`, the copying of weights, and from `waited_s`, which lockstep
    and --codistill-wait ask for. Bytes are those of snapshots."""

    updates: int = 0
    published: int = 0
    published_bytes: int = 0
    skipped: int = 0
    failed: int = 0
    read: int = 0
    read_bytes: int = 0
    hidden_s: float = 0.0
    visible_s: float = 0.0
    copy_s: float = 0.0
    waited_s: float = 0.0

    def to_json(self) -> str:
        return json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(self).items()})


class BackgroundExchange:
    """`expected`: tensors of this peer's model, for names and shapes; `wire`: what floats travel as, None for what they are;
    `updates`: where training ends, for the heartbeat. Without `in_background` everything happens at once, when asked."""

    def __init__(
        self, exchange: Exchange, teachers: List[int], fingerprint: str, expected: Weights,
        wire: Optional[torch.dtype] = None, in_background: bool = True, updates: Optional[int] = None,
        clock: Callable[[], float] = time.time, publisher: Optional[Worker] = None,
    ) -> None:  # fmt: skip
        self.exchange, self.teachers, self.fingerprint = exchange, teachers, fingerprint
        self.in_background, self.clock, self.totals = in_background, clock, Totals()
        self._expected = {name: torch.empty_like(tensor, device="meta") for name, tensor in expected.items()}
        self._buffer = Buffer(expected, wire)
        self._period: Optional[float] = _FIRST_PERIOD
        self._ready: Dict[int, Tuple[Manifest, Weights]] = {}
        self._seen: Dict[int, Tuple[Manifest, int]] = {}  # of each teacher what was read last, and how often in vain
        self._missing: Set[int] = set()
        self._warned: Set[Tuple[object, str]] = set()
        self._counting = threading.Lock()
        self._lost = False  # this peer's index, to another process
        self._start_id, self._updates, self._beat, self._state = secrets.token_hex(8), updates, 0, "waiting"
        self._progress: Tuple[int, Dict[str, int]] = (0, {})  # update, and the update held of each teacher
        self._speed_points: Deque[Tuple[float, int]] = collections.deque(maxlen=_SPEED_BEATS)
        self._status: Optional[StatusReader] = None
        self._logging: Optional[Future] = None
        self._watching, self._began = False, time.monotonic()
        self._publisher, self._log_worker = publisher or Worker(), Worker()
        self._heartbeat_worker = Worker(self._send_heartbeat, lambda: BEAT)
        self._readers = {teacher: self._reader(teacher) for teacher in teachers}

    def _reader(self, teacher: int) -> Worker:
        return Worker(lambda: self.look(teacher), lambda: self._period if self._watching else None)

    @property
    def _workers(self) -> List[Worker]:
        return [self._publisher, self._heartbeat_worker, self._log_worker, *self._readers.values()]

    # Start and end.

    def start(self) -> None:
        """Start the threads, and the heartbeat."""
        if not all([worker.start() for worker in self._workers]):
            logger.warning(
                "codistillation: not all threads of the exchange could be started (a limit of processes?); training goes on, "
                "and each exchange tries again"
            )
        self._heartbeat_worker.do(self._send_heartbeat)

    def watch(self) -> None:
        """Begin to watch the teachers, each in a thread of its own: one whose storage hangs must not hold up the others."""
        self._watching = self.in_background
        for reader in self._readers.values() if self._watching else ():
            reader.do(lambda: None)

    def at(self, update: int, held: Dict[int, int], seconds: Optional[float] = None) -> None:
        """For the heartbeat: where training is, and the update held of each teacher. Logs the other peers' states.

        `seconds`: how long the last interval between two exchanges took; the teachers are looked at accordingly.
        """
        self._progress, self._state = (update, {str(peer): of for peer, of in held.items()}), "training"
        if seconds is not None:
            self._period = min(max(seconds / _LOOKS, _SHORTEST_PERIOD), _LONGEST_PERIOD)
        if not self._log_worker.is_busy:
            self._logging = self._log_worker.do(self._log_peers, update)

    @property
    def limit(self) -> float:
        """Seconds that the storage may take for a snapshot of this peer."""
        return min(_SHORTEST_LIMIT + len(self._buffer.data) / _BYTES_PER_SECOND, _LONGEST_LIMIT)

    def drain(self, seconds: Optional[float] = None) -> bool:
        """Wait until what is being published is published; False if that took longer than `seconds`."""
        return self._publisher.rest(seconds)

    def end(self, state: str, publish_last: Callable[[], Any]) -> None:
        """Drain, publish what is last, and stop, as `state`: all before one deadline, whatever the storage does."""
        now = time.monotonic()
        # What hangs for longer than it may will hardly come now.
        deadline = max(now + _STOP_SECONDS, self._began + self.limit) if self._publisher.is_busy else now + self.limit
        if self.drain(deadline - now):
            publish_last()
        self.drain(deadline - time.monotonic())
        self.stop(state)

    def stop(self, state: str) -> None:
        """Send a last heartbeat with `state`, leave the exchange, end the threads, and log what all of it cost."""
        self._watching, self._state, deadline = False, state, time.monotonic() + _STOP_SECONDS
        self._heartbeat_worker.do(self._send_heartbeat)
        self._heartbeat_worker.do(self.exchange.leave)
        for worker in self._workers:
            worker.stop()
        # Not `all(…)` of a generator: each is given what is left of the time.
        if not all([worker.join(deadline - time.monotonic()) for worker in self._workers]):
            logger.warning(f"codistillation: {self.exchange.store} does not answer; training ends without waiting for it")
        logger.info(f"codistillation: exchange totals {self.totals.to_json()}")

    # Publish.

    def publish(
        self, weights: Weights, update: int, needed_from: Optional[Callable[[], Optional[int]]] = None, **facts: Any
    ) -> bool:
        """Copy the weights and publish them; False, with a warning, when that cannot begin. `needed_from`: as of `Exchange`."""
        if self._publisher.is_busy:
            self._count(skipped=1)
            logger.warning(
                f"codistillation: the snapshot of update {update} was skipped: the last one is still being written to "
                f"{self.exchange.store}; training goes on. Is the storage too slow for this --codistill-interval?"
            )
            return False
        start = time.perf_counter()
        try:
            copied = self._buffer.fill(weights)
        except Exception as error:  # a GPU that is full, say
            self._warn_of_failure(update, error)
            return False
        finally:
            self.totals.copy_s += time.perf_counter() - start
        self._began = time.monotonic()
        publishing = self._publisher.do(self._publish, copied, update, needed_from, facts)
        failure = publishing.exception() if publishing.done() else None
        if failure is not None:
            self._warn_of_failure(update, failure)
            return False
        if not self.in_background:
            self.drain(self.limit)
        return True

    def _publish(
        self, copied: Callable[[], None], update: int, needed_from: Optional[Callable], facts: Dict[str, Any]
    ) -> None:
        start = time.perf_counter()
        try:
            copied()
            needed = needed_from() if needed_from is not None else None
            manifest = self.exchange.publish(self._buffer, update, needed, **facts)
        except IndexTaken as error:
            self._warn_of_loss(error)
            self._count(failed=1)
            return
        except Exception as error:  # whatever it is, training must go on
            self._warn_of_failure(update, error)
            return
        seconds = time.perf_counter() - start
        self._warned = {(peer, what) for peer, what in self._warned if peer != "publish"}
        self._count(published=1, published_bytes=manifest.bytes, hidden_s=seconds)
        logger.info(f"codistillation: published update {update}, {manifest.bytes / 1e6:.1f} MB in {seconds:.2f} s")

    def _warn_of_failure(self, update: int, error: BaseException) -> None:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        is_new = ("publish", str(reason)) not in self._warned
        self._warned.add(("publish", str(reason)))  # later ones of the same reason are no warnings any more
        text = f"codistillation: the snapshot of update {update} was not published: {reason}; training goes on"
        logger.log(logging.WARNING if is_new else logging.INFO, text)
        self._count(failed=1)

    # Read the teachers.

    def take(self, teacher: int) -> Optional[Tuple[Manifest, Weights]]:
        """The newest verified snapshot of the teacher that was found, if it was not taken before."""
        return self._ready.pop(teacher, None)

    def ask(self, teacher: int, question: Callable, *args: Any) -> Any:
        """What `question`, which reads from the teacher, gives or raises. OSError where it takes longer than a moment; asked
        the same again, it waits on."""
        return self._readers[teacher].ask(question, *args, seconds=_MOMENT)

    def is_reading(self, teacher: int) -> bool:
        """Something that was asked of the teacher's storage is not answered yet."""
        return self._readers[teacher].is_busy

    def look_now(self, teachers: List[int], update: Optional[int] = None) -> Callable[[], List[int]]:
        """Begin to `look` at the teachers, all at once; the function returned waits a moment, and gives those not done yet."""
        missing = list(teachers)
        for teacher in teachers:
            with contextlib.suppress(OSError):
                self._readers[teacher].ask(self.look, teacher, update, seconds=0)
                missing.remove(teacher)

        def remaining() -> List[int]:
            for teacher in list(missing):
                try:
                    self.ask(teacher, self.look, teacher, update)
                except TimeoutError:
                    continue
                except OSError as error:
                    self.warn(teacher, f"it cannot be looked at: {error.strerror}.")
                missing.remove(teacher)
            return missing

        return remaining

    def look(self, teacher: int, update: Optional[int] = None) -> None:
        """Read and verify what is new of the teacher: its newest, or that of `update` if it is there."""
        try:
            manifest = self.exchange.at(teacher, update) if update is not None else None
            manifest = manifest or self.exchange.newest(teacher)
            (self._missing.add if manifest is None else self._missing.discard)(teacher)
            # A snapshot of update 0 only shows that the peer exists: it has learnt nothing.
            if manifest is None or manifest.update == 0 or not self._is_new(teacher, manifest):
                return
            self._read(teacher, manifest)
        except BadSnapshot as error:
            self.warn(teacher, f"its snapshot is refused: {error}.")
        except Exception as error:  # whatever it is, training must go on
            self.warn(teacher, f"its snapshot cannot be read: {type(error).__name__}: {plain(str(error))}.")

    def _is_new(self, teacher: int, manifest: Manifest) -> bool:
        seen, tries = self._seen.get(teacher, (None, 0))
        return seen != manifest or 0 < tries < _TRIES

    def _read(self, teacher: int, manifest: Manifest) -> None:
        start = time.perf_counter()
        seen, tries = self._seen.get(teacher, (None, 0))
        self._seen[teacher] = (manifest, tries + 1 if seen == manifest else 1)
        weights = self.exchange.fetch(teacher, manifest, self.fingerprint, self._expected)
        if weights is None:
            self._seen[teacher] = (manifest, 1)  # replaced meanwhile, or not visible here yet: look again
            return
        self._seen[teacher] = (manifest, 0)
        self._ready[teacher] = (manifest, weights)
        self._warned = {(peer, what) for peer, what in self._warned if peer != teacher}
        self._count(read=1, read_bytes=manifest.bytes, hidden_s=time.perf_counter() - start)

    def warn_missing(self, teachers: List[int], update: int) -> None:
        """Warn about teachers without a snapshot yet, once training has come to `update`."""
        for teacher in sorted(self._missing.intersection(teachers)) if update else []:
            where = self.exchange.store
            self.warn(teacher, f"it has published nothing in {where} yet; does it run, and see this directory?")

    def warn(self, peer: int, what: str) -> None:
        """Say it once, until a good snapshot of that peer has come."""
        if (peer, what) not in self._warned:
            self._warned.add((peer, what))
            logger.warning(f"codistillation: peer {peer}: {what} Training goes on with what it holds.")

    # The threads.

    def _send_heartbeat(self) -> None:
        (update, held), now = self._progress, time.monotonic()
        self._beat += 1
        # An update is told at each exchange only. Speed is a mean over the last exchanges, from the first since this start,
        # which may not be at update 0; it falls when nothing new comes for longer than they took.
        if self._state == "training" and update != next((of for _, of in reversed(self._speed_points)), None):
            self._speed_points.append((now, update))
        points = self._speed_points or [(now, 0)]
        (began, first), (ended, last) = points[0], points[-1]
        speed = (last - first) / max(ended - began, now - ended) if last > first else None
        heartbeat = Heartbeat(
            self._start_id, self._beat, self._state, host_name(), os.getpid(), self.clock(), update, self._updates, speed, held
        )
        try:
            self.exchange.beat(heartbeat)
        except IndexTaken as error:
            self._warn_of_loss(error)
        except Exception as error:  # whatever it is, training must go on
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            if ("heartbeat", str(reason)) not in self._warned:
                self._warned.add(("heartbeat", str(reason)))
                logger.warning(f"codistillation: the heartbeat was not written: {reason}; training goes on")

    def _warn_of_loss(self, error: IndexTaken) -> None:
        with self._counting:
            is_new, self._lost = not self._lost, True
        if is_new:
            logger.warning(f"codistillation: {error}; training goes on")

    def _log_peers(self, update: int) -> None:
        try:
            self._status = self._status or StatusReader(self.exchange.store, self.clock)
            others = [peer for peer in range(self._status.run["peers"]) if peer != self.exchange.peer]
            states = "; ".join(in_words(self._status.row(peer)) for peer in others)
            logger.info(f"codistillation: at update {update}: {states}")
        except Exception as error:  # whatever it is, training must go on
            logger.info(f"codistillation: at update {update}: the other peers' heartbeats cannot be read: {error}")

    def holds(self, held: Dict[int, int]) -> None:
        """For the heartbeat: the update that is now held of each teacher, since the exchange that `at` told of."""
        self._progress = (self._progress[0], {str(peer): of for peer, of in held.items()})

    def _count(self, **more: float) -> None:
        with self._counting:
            for name, value in more.items():
                setattr(self.totals, name, getattr(self.totals, name) + value)
