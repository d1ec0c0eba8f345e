"""The formula of `bytes_per_update` against the bytes that a real run logged.

A peer that makes U updates publishes at 0, N, 2N, … below U, and once more at U if it completes: ⌈U/N⌉ + 1 snapshots,
less those that it skipped or that failed. A teacher's snapshot can be read if it has learnt something (not that of update
0) and came before the reader ended. Of these the newest is read in each look, so each once, except that the last one may
come too late, and that a teacher who is faster than the reader's looks is not read each time.
"""

from __future__ import annotations

from typing import List, NamedTuple, Tuple

from benchmarks import run_log
from benchmarks.communication.model_size import BYTES
from benchmarks.run_log import Attempt, Run

TOLERANCE = 0.05


class Check(NamedTuple):
    what: str
    low: float
    high: float
    measured: float

    @property
    def ratio(self) -> float:
        """Of what was measured to what was predicted: 1 within the range, else to its nearer end."""
        nearest = min(max(self.measured, self.low), self.high)
        return self.measured / nearest if nearest else float(self.measured > 0) + 1

    @property
    def is_good(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE


def compare(path: str) -> int:
    """Print predicted, measured and their ratio for each peer; 1 if any differs by more than 5 %. Raises ValueError."""
    run = run_log.load(path)
    good = True
    print(f"{'peer':4}  {'bytes':28}  {'predicted':>31}  {'measured':>15}  ratio")
    for peer in range(len(run.peers)):
        for check in checks(run, peer):
            spread = "" if check.low == check.high else f"{check.low:,.0f} … "
            mark = "" if check.is_good else "  differs"
            good = good and check.is_good
            print(f"{peer:4}  {check.what:28}  {spread + format(check.high, ',.0f'):>31}  "
                  f"{check.measured:15,.0f}  {check.ratio:5.3f}{mark}")  # fmt: skip
    return 0 if good else 1


def checks(run: Run, peer: int) -> List[Check]:
    """Attempts without totals (killed) are left out, and what they published and read with them."""
    counted = [attempt for attempt in run.peers[peer] if attempt.totals]
    size, largest = snapshot_bytes(counted[0])
    published = sum(publications(attempt) for attempt in counted)
    low, high = (sum(ends) for ends in zip(*(readings(run, peer, attempt) for attempt in counted)))
    updates = sum(attempt.totals["updates"] for attempt in counted)
    wrote, read = (sum(attempt.totals[f"{verb}_bytes"] for attempt in counted) for verb in ("published", "read"))
    return [
        Check("published", size * published, largest * published, wrote),
        Check("read", size * low, largest * high, read),
        Check("published, for each update", size * published / updates, largest * published / updates, wrote / updates),
        Check("read, for each update", size * low / updates, largest * high / updates, read / updates),
    ]


def snapshot_bytes(attempt: Attempt) -> Tuple[float, float]:
    """The least and the most that a snapshot can have."""
    given = attempt.options.get("codistill_wire_dtype", "None")
    # By default two bytes for a number, whatever the model: its own 16 bits, or bf16 for fp32.
    size = attempt.parameters * BYTES["bf16" if given == "None" else given]
    # How narrow the matrices are decides what int8's scales add, a tenth at most; the log does not tell.
    return size, size * (1.1 if given == "int8" else 1.0)


def publications(attempt: Attempt) -> int:
    """The snapshots that an attempt published: one at each multiple of N from its first update on, and one at its end."""
    first, end = attempt.first, attempt.first + attempt.totals["updates"]
    due = -(-end // attempt.interval) - -(-first // attempt.interval)
    return due + attempt.completed - attempt.totals["skipped"] - attempt.totals["failed"]


def readings(run: Run, peer: int, attempt: Attempt) -> Tuple[int, int]:
    """The fewest and the most snapshots that an attempt can have read of all its teachers."""
    exchanges = -(-attempt.totals["updates"] // attempt.interval)
    low = high = 0
    for teacher in run.teachers(peer):
        events = [event for other in run.peers[teacher] for event in other.published if event.update > 0]
        # One that is there already when I begin is read as well, but only the newest such.
        before = [event for event in events if event.second < attempt.begins]
        during = [event for event in events if attempt.begins <= event.second <= attempt.ends]
        readable = len(during) + bool(before)
        high += readable
        low += max(0, min(readable - 1, exchanges - 1))
    return low, high
