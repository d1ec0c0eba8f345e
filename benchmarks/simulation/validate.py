"""The simulation at the small end: fed with a real run's pace and seconds, does it find that run's staleness and bytes?

From the log come when each update was made, how long a publish took, and the background seconds that remain for a read.
Predicted are when who published, noticed, read and took what, hence the staleness in each window of the log, and the
bytes. Late looks are N/10 updates apart, so one look more or less is what a prediction may be off.
"""

from __future__ import annotations

import math
from typing import List, NamedTuple, Sequence, Tuple

import numpy as np

from benchmarks import run_log
from benchmarks.communication import logged
from benchmarks.run_log import Attempt, Run
from benchmarks.simulation.peer import LATE_LOOKS, Peer, World
from benchmarks.simulation.scenario import Scenario

CHANCES = 20  # replays: when in its period a peer looks at another is chance, and may decide a whole run


class Comparison(NamedTuple):
    """`low` and `high`: the least and the most that the replays predict."""

    peer: int
    what: str
    low: float
    high: float
    measured: float
    tolerance: float

    @property
    def is_good(self) -> bool:
        return self.low - self.tolerance <= self.measured <= self.high + self.tolerance


def validate(path: str) -> int:
    """Print predicted and measured; 1 where they differ by more than the log can resolve. Raises ValueError."""
    results = comparisons(run_log.load(path))
    print(f"{'peer':4}  {'what':16}  {'predicted':>25}  {'measured':>13}  give or take")
    for one in results:
        spread = f"{one.low:,.1f}" if one.low == one.high else f"{one.low:,.1f} … {one.high:,.1f}"
        mark = "" if one.is_good else "  differs"
        print(f"{one.peer:4}  {one.what:16}  {spread:>25}  {one.measured:13,.1f}  {one.tolerance:,.1f}{mark}")
    return 0 if all(one.is_good for one in results) else 1


def comparisons(run: Run) -> List[Comparison]:
    attempts = [_only_attempt(run, peer) for peer in range(len(run.peers))]
    replays = [replay(run, attempts, seed) for seed in range(CHANCES)]
    results = []
    for index, attempt in enumerate(attempts):
        peers = [peers[index] for peers in replays]
        predicted, measured = zip(*(_staleness(attempt, peer) for peer in peers))
        tolerance = attempt.interval / LATE_LOOKS
        results.append(Comparison(index, "staleness", min(predicted), max(predicted), measured[0], tolerance))
        sizes = logged.snapshot_bytes(attempt)
        # The last snapshot of each teacher may be read or not.
        results.append(_bytes(index, "published", [peer.published for peer in peers], sizes, attempt, 0))
        results.append(_bytes(index, "read", [peer.read for peer in peers], sizes, attempt, len(peers[0].teachers)))
    return results


def _bytes(
    peer: int, verb: str, snapshots: Sequence[int], sizes: Tuple[float, float], attempt: Attempt, unsure: int
) -> Comparison:
    measured, tolerance = attempt.totals[f"{verb}_bytes"], logged.TOLERANCE * attempt.totals[f"{verb}_bytes"]
    low, high = min(snapshots) * sizes[0], max(snapshots) * sizes[1]
    return Comparison(peer, f"bytes {verb}", low, high, measured, tolerance + unsure * sizes[1])


def replay(run: Run, attempts: List[Attempt], seed: int = 1) -> List[Peer]:
    """The simulated peers of a measured run, at its own pace."""
    clocks = [_clock(attempt) for attempt in attempts]
    starts = [float(seconds[0]) for _, seconds in clocks]
    writes = [event.value for attempt in attempts for event in attempt.published]
    totals = [attempt.totals for attempt in attempts]
    reads = sum(total["read"] for total in totals)
    hidden = sum(total["hidden_s"] for total in totals)
    infinite = {name: math.inf for name in Scenario.__dataclass_fields__ if name.endswith("_bytes_per_s")}
    scenario = Scenario(
        peers=len(attempts), workers=1, interval=attempts[0].interval, updates=totals[0]["updates"],
        topology=run.options["codistill_topology"], **infinite, latency_s=0.0,
        encode_s=float(np.mean(writes)), verify_s=max(0.0, hidden - sum(writes)) / max(1, reads),
        failures_per_worker_hour=0.0, seed=seed,
    )  # fmt: skip

    def seconds(peer: int, first: int, end: int) -> float:
        begin, finish = np.interp([first, end], *clocks[peer])
        return float(finish - begin)

    return World(scenario, seconds, [start - min(starts) for start in starts]).run()


def _clock(attempt: Attempt) -> Tuple[np.ndarray, np.ndarray]:
    """(updates from 0 on, seconds at which they were done).

    The log's clock has whole seconds, but `ups` tells how long each window took. Many whole seconds on that course tell
    where it begins, as a vernier does; the log's second stays the bound.
    """
    stamps = {0: attempt.begins}
    stamps.update({event.update: event.second - event.value for event in attempt.published})
    inner = [(second, record) for second, record in attempt.records if record.tag == "train_inner"]
    windows = [(record.update, record.values.get("ups")) for _, record in inner]
    stamps.update({record.update: second for second, record in inner})
    updates = np.array(sorted(stamps))
    seconds = np.array([stamps[update] for update in updates])
    if windows and all(ups for _, ups in windows):
        ends = np.array([0] + [update for update, _ in windows])
        course = np.append(0.0, np.cumsum(np.diff(ends) / [ups for _, ups in windows]))
        course = np.interp(updates, ends, course)
        course += np.mean(seconds + 0.5 - course)
        seconds = np.clip(course, seconds, seconds + 1)
    return updates, np.maximum.accumulate(seconds)


def _staleness(attempt: Attempt, peer: Peer) -> Tuple[float, float]:
    """(predicted, measured), means over the windows of the log that have both."""
    ages = np.full(attempt.totals["updates"], math.nan)
    for updates, staleness in zip(peer.aged, peer.ages):
        ages[updates] = staleness
    predicted, measured, weights, before = [], [], [], 0
    for _, record in attempt.records:
        if record.tag == "train_inner":
            window, before = ages[before : record.update], record.update
            taught = window[~np.isnan(window)]
            if taught.size and "codistill_staleness" in record.values:
                predicted.append(taught.mean())
                measured.append(record.values["codistill_staleness"])
                weights.append(taught.size)
    if not weights:
        raise ValueError("The train_inner lines must tell codistill_staleness, but none does while a teacher is held.")
    return float(np.average(predicted, weights=weights)), float(np.average(measured, weights=weights))


def _only_attempt(run: Run, peer: int) -> Attempt:
    attempts = run.peers[peer]
    attempt = attempts[-1]
    rules = [
        (len(attempts) == 1 and attempt.first == 0, "a run whose peers were not restarted",
         f"peer {peer} has {len(attempts)} attempts"),
        (attempt.options["codistill_sync"] == "False", "a run without --codistill-sync",
         "this one's peers wait for each other, so that its staleness is (N - 1)/2 whatever the storage does"),
        (attempt.options["codistill_topology"] in ("all", "ring"), "a run with topology all or ring", "this one has another"),
        (attempt.totals["updates"] == run.peers[0][0].totals["updates"], "a run whose peers made equally many updates",
         f"peer {peer} made {attempt.totals['updates']}"),
    ]  # fmt: skip
    for good, must, but in rules:
        if not good:
            raise ValueError(f"--validate needs {must}, but in {run.path} {but}.")
    return attempt
