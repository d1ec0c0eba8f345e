"""The simulated peers: what each does, when, and what that costs it. The assumptions stand in `scenario`."""

from __future__ import annotations

import itertools
import math
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set

import numpy as np
import simpy
from scipy.special import ndtri

from benchmarks.simulation.scenario import Scenario
from benchmarks.simulation.store import Store

Seconds = Callable[[int, int, int], float]  # (peer, first update, end) -> seconds that these updates take
# As in the background exchange and the codistiller.
LOOKS, SHORTEST_PERIOD, LONGEST_PERIOD, FIRST_PERIOD = 50, 0.1, 10.0, 0.5
LATE_LOOKS = 10


class Snapshot(NamedTuple):
    update: int
    serial: int  # tells an update that was published again from its first time


class World:
    """All peers of a scenario on one store; `run` ends when all have made their updates."""

    def __init__(self, scenario: Scenario, seconds: Optional[Seconds] = None, starts: Optional[Sequence[float]] = None) -> None:
        """`seconds`: a measured run's own pace instead of the model's; `starts`: when each of its peers began."""
        self.scenario = scenario
        self.env = simpy.Environment()
        self.store = Store(
            self.env, 2 * scenario.peers, scenario.total_bytes_per_s, scenario.client_bytes_per_s,
            scenario.transfer_bytes_per_s, scenario.latency_s,
        )  # fmt: skip
        streams = np.random.SeedSequence(scenario.seed).spawn(scenario.peers)
        self.peers = [Peer(self, index, np.random.default_rng(stream), seconds) for index, stream in enumerate(streams)]
        for peer in self.peers:
            peer.start_s = starts[peer.index] if starts else peer.random.uniform(0, scenario.start_spread_s)

    def run(self) -> List[Peer]:
        self.env.run(self.env.all_of([self.env.process(peer.train()) for peer in self.peers]))
        return self.peers


class Peer:
    """One training thread with its background. What happened to it is in its counters."""

    def __init__(self, world: World, index: int, random: np.random.Generator, seconds: Optional[Seconds]) -> None:
        self.world, self.env, self.scenario, self.index, self.random = world, world.env, world.scenario, index, random
        self.teachers = self.scenario.teachers(index)
        self.seconds: Seconds = seconds or self._modelled_seconds
        self.start_s = self.end_s = self.stall_s = 0.0
        self.published = self.skipped = self.read = self.failures = 0
        self.alone = 0  # updates made without a teacher
        self.ages: List[np.ndarray] = []  # staleness of the updates made with one: mean over the teachers
        self.aged: List[np.ndarray] = []  # those updates
        self.latest: Optional[Snapshot] = None  # what others can see of me
        self.news = world.env.event()  # happens when that changes
        self._serials = itertools.count()

    def train(self) -> Iterator:
        yield self.env.timeout(self.start_s)
        update = 0
        while update < self.scenario.updates:
            self._seen: Dict[int, Snapshot] = {}  # of each teacher what was read last
            self._ready: Dict[int, Snapshot] = {}  # read and not yet taken
            self._held: Dict[int, Snapshot] = {}
            self._publisher: Optional[simpy.Process] = None
            self._readers: List[simpy.Process] = []
            self._period, self._exchanged = FIRST_PERIOD, self.env.now
            update = yield from self._live(update)
            if update < self.scenario.updates:
                self.failures += 1
                self._kill([*self._readers, self._publisher])
                yield self.env.timeout(self.scenario.restart_s)
        self.end_s = self.env.now
        if self.teachers:  # the last snapshot waits for the one in flight: nothing is skipped at the end
            yield self._publisher or self.env.timeout(0)
            yield self.env.process(self._publish(update))
        self._kill(self._readers)

    def _live(self, update: int) -> Iterator:
        """Updates until the end, or until I die: returns the update from which to go on."""
        per_hour = self.scenario.failures_per_worker_hour * self.scenario.workers
        dies = self.env.now + (self.random.exponential(3600 / per_hour) if per_hour else math.inf)
        due: Set[int] = set()
        yield from self._first_look()
        first = True
        while update < self.scenario.updates:
            held_s = 0.0
            if first or update % self.scenario.interval == 0:
                due = set(self.teachers)
                held_s += self._exchange(update, first)
            held_s += self._take(due)
            first = False
            end = self._next_stop(update, bool(due))
            seconds = held_s + self.seconds(self.index, update, end)
            if self.env.now + seconds > dies:
                yield self.env.timeout(max(0.0, dies - self.env.now))
                return update - update % self.scenario.checkpoint_every
            yield self.env.timeout(seconds)
            self.stall_s += held_s
            self._record(update, end)
            update = end
        return update

    def _next_stop(self, update: int, due: bool) -> int:
        """The next update at which something can happen: an exchange, a late look, a checkpoint, the end."""
        steps = [self.scenario.interval, self.scenario.checkpoint_every]
        if due:
            steps.append(max(1, self.scenario.interval // LATE_LOOKS))
        return min([update - update % step + step for step in steps] + [self.scenario.updates])

    def _record(self, update: int, end: int) -> None:
        if not self._held:
            self.alone += end - update
            return
        updates = np.arange(update, end)
        self.aged.append(updates)
        self.ages.append(updates - np.mean([snapshot.update for snapshot in self._held.values()]))

    # What holds the training thread: the seconds.

    def _first_look(self) -> Iterator:
        """Read what the teachers have, in the foreground; then watch each in the background."""
        began = self.env.now
        for teacher in self.teachers:
            yield from self._read(teacher)
        self.stall_s += self.env.now - began
        self._readers = [self.env.process(_until_killed(self._watch(teacher))) for teacher in self.teachers]

    def _exchange(self, update: int, first: bool) -> float:
        if not first:
            self._period = min(max((self.env.now - self._exchanged) / LOOKS, SHORTEST_PERIOD), LONGEST_PERIOD)
        self._exchanged = self.env.now
        if not self.teachers or update % self.scenario.interval:
            return 0.0
        if self._publisher is not None and self._publisher.is_alive:
            self.skipped += 1
            return 0.0
        self._publisher = self.env.process(_until_killed(self._publish(update)))
        return self.scenario.held_bytes / self.scenario.copy_bytes_per_s

    def _take(self, due: Set[int]) -> float:
        """Take what was read of those who are due; they are due no longer."""
        taken = {teacher: self._ready.pop(teacher) for teacher in list(self._ready) if teacher in due}
        self._held.update(taken)
        due.difference_update(taken)
        scenario = self.scenario
        broadcast = scenario.held_bytes / scenario.within_bytes_per_s if scenario.workers > 1 else 0.0
        return len(taken) * (scenario.held_bytes / scenario.copy_bytes_per_s + broadcast)

    # The background.

    def _publish(self, update: int) -> Iterator:
        yield self.env.timeout(self.scenario.encode_s)
        yield from self.world.store.move(2 * self.index, self.scenario.snapshot_bytes)
        self.latest = Snapshot(update, next(self._serials))
        self.published += 1
        news, self.news = self.news, self.env.event()
        news.succeed()

    def _watch(self, teacher: int) -> Iterator:
        while True:
            if self._is_new(teacher):
                yield self.env.timeout(self._period)
            else:
                yield self.world.peers[teacher].news
                yield self.env.timeout(self.random.uniform(0, self._period))  # until my next look
            yield from self._read(teacher)

    def _is_new(self, teacher: int) -> bool:
        latest = self.world.peers[teacher].latest
        return latest is not None and latest.update > 0 and latest != self._seen.get(teacher)

    def _read(self, teacher: int) -> Iterator:
        if self._is_new(teacher):
            snapshot = self.world.peers[teacher].latest
            yield from self.world.store.move(2 * self.index + 1, self.scenario.snapshot_bytes)
            yield self.env.timeout(self.scenario.verify_s)
            self.read += 1
            self._seen[teacher] = self._ready[teacher] = snapshot

    @staticmethod
    def _kill(processes: Sequence[Optional[simpy.Process]]) -> None:
        for process in processes:
            if process is not None and process.is_alive:
                process.interrupt()

    # The model's pace.

    def _modelled_seconds(self, peer: int, first: int, end: int) -> float:
        scenario = self.scenario
        # The largest of w draws from one distribution is its quantile u^(1/w), for a uniform u.
        quantiles = self.random.random(end - first) ** (1 / scenario.workers)
        factors = np.exp(scenario.jitter * ndtri(quantiles) - scenario.jitter**2 / 2)
        compute = scenario.step_s * (1 + scenario.teacher_cost * len(self.teachers))
        shown = max(0.0, all_reduce_s(scenario) - scenario.hidden_share * scenario.step_s)
        return compute * float(factors.sum()) + (end - first) * shown


def all_reduce_s(scenario: Scenario) -> float:
    """Seconds of an all_reduce inside a peer: a ring's bytes, a double tree's hops."""
    workers = scenario.workers
    if workers == 1:
        return 0.0
    hops = 2 * math.ceil(math.log2(workers))
    return 2 * (workers - 1) / workers * scenario.gradient_bytes / scenario.within_bytes_per_s + hops * scenario.hop_s


def _until_killed(work: Iterator) -> Iterator:
    try:
        yield from work
    except simpy.Interrupt:
        pass
