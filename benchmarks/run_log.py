"""What a real run logged of its exchange: RUN_DIR/peer*/train.log, one attempt after another."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from fairseq_codistill.common.fairseq_log import Record, parse_records
from fairseq_codistill.core.topology import edges_of, teachers_of

_STAMP = re.compile(r"\[?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:,(\d{3}))?")
_PUBLISHED = re.compile(r"codistillation: published update (\d+), [\d.]+ MB in ([\d.]+) s")
_TOOK = re.compile(r"codistillation: learning from peer (\d+) as of its update (\d+)")
_TOTALS = re.compile(r"codistillation: exchange totals (\{.*\})")
_PARAMETERS = re.compile(r"num\. shared model params: ([\d,]+)")
_RESUMED = re.compile(r"Loaded checkpoint .* @ (\d+) updates")
_OPTION = re.compile(r"'(codistill_\w+)': '?([^',}]*)")


class Event(NamedTuple):
    """`second`: of the log's clock, since 1970 in no particular time zone. `value`: seconds of a publish, or a teacher."""

    second: float
    update: int
    value: float


@dataclass
class Attempt:
    """One process of a peer, from its config to its end."""

    options: Dict[str, str]
    parameters: int = 0
    first: int = 0  # update at which it started
    begins: float = 0.0
    ends: float = 0.0
    completed: bool = False
    totals: Optional[Dict[str, Any]] = None
    published: List[Event] = field(default_factory=list)
    took: List[Event] = field(default_factory=list)
    records: List[Tuple[float, Record]] = field(default_factory=list)

    @property
    def interval(self) -> int:
        return int(self.options["codistill_interval"])


@dataclass
class Run:
    """The peers of a run, each by its attempts."""

    path: Path
    peers: List[List[Attempt]]

    @property
    def options(self) -> Dict[str, str]:
        return self.peers[0][0].options

    def teachers(self, peer: int) -> List[int]:
        return teachers_of(peer, edges_of(self.options["codistill_topology"], len(self.peers)))


def load(path: str) -> Run:
    """Raises ValueError, in one sentence, for a folder without what a codistilling run logs."""
    logs = sorted(Path(path).glob("peer*/train.log"), key=lambda log: int(re.sub(r"\D", "", log.parent.name) or 0))
    if len(logs) < 2:
        raise ValueError(
            f"RUN_DIR must hold peer0/train.log, peer1/train.log, … of a codistilling run, but {path} holds {len(logs)} such "
            "logs; did you mean a folder below it?"
        )
    peers = [_attempts(log) for log in logs]
    for log, attempts in zip(logs, peers):
        if not any(attempt.totals for attempt in attempts):
            raise ValueError(
                f"{log} must have a line 'codistillation: exchange totals', but has none; did the run end, and was it one with "
                "peers?"
            )
    return Run(Path(path), peers)


def _attempts(log: Path) -> List[Attempt]:
    attempts: List[Attempt] = []
    second = 0.0
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            second = _second(line, second)
            options = dict(_OPTION.findall(line)) if "'codistill_interval'" in line else {}
            if options:
                attempts.append(Attempt(options, begins=second))
            if attempts:
                _read(line, second, attempts[-1])
    return attempts


def _second(line: str, before: float) -> float:
    stamp = _STAMP.match(line)
    if not stamp:
        return before
    moment = datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S")
    return (moment - datetime(1970, 1, 1)).total_seconds() + int(stamp[2] or 0) / 1000


def _read(line: str, second: float, attempt: Attempt) -> None:
    attempt.ends = second
    for record in parse_records(line):
        attempt.records.append((second, record))
    if "codistillation: " in line:
        _read_exchange(line, second, attempt)
    found = _PARAMETERS.search(line) or _RESUMED.search(line)
    if found and found.re is _PARAMETERS:
        attempt.parameters = int(found[1].replace(",", ""))
    elif found:
        attempt.first = int(found[1])
    elif "done training in" in line:
        attempt.completed = True
    elif "begin training epoch" in line and not attempt.records:
        attempt.begins = second


def _read_exchange(line: str, second: float, attempt: Attempt) -> None:
    published, took, totals = _PUBLISHED.search(line), _TOOK.search(line), _TOTALS.search(line)
    if published:
        attempt.published.append(Event(second, int(published[1]), float(published[2])))
    elif took:
        attempt.took.append(Event(second, int(took[2]), int(took[1])))
    elif totals:
        attempt.totals = json.loads(totals[1])
