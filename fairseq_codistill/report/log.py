"""One train.log, read as a whole: its records, whatever restarts it has seen, and the curves in them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ..common import fairseq_log
from ..common.fairseq_log import Record, Values, as_float

Curve = list[tuple[float, float]]  # (update, value), updates rising
_LOADED = re.compile(r"Loaded checkpoint .* @ (\d+) updates\)")
_STAMP = re.compile(r"\[?(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)")
_RDROP = "label_smoothed_cross_entropy_with_rdrop"


@dataclass
class TrainLog:
    """What one train.log says: `records[tag][update][field]`, as logged, of the run that its last lines continue.

    A log may hold several processes, one after another. What a later one did again replaces what an earlier one
    logged; `seconds` adds them up, because all of them were spent.
    """

    settings: dict[str, str] = field(default_factory=dict)
    records: dict[str, dict[int, Values]] = field(default_factory=lambda: defaultdict(dict))
    update: int = 0  # of the newest record
    finished: bool = False
    last_line: str = field(default="", compare=False)  # that is not blank
    failed: bool = False  # the newest process has shown a traceback
    exchange: Values = field(default_factory=dict)  # totals of the exchange, added up over all processes that ended
    clock: dict[int, float] = field(default_factory=dict)  # update -> `seconds` when it was logged
    _earlier_seconds: float = 0.0
    _wall: float = 0.0
    _resumed: datetime | None = field(default=None, compare=False)  # when the newest process loaded a checkpoint, if it did

    @classmethod
    def read(cls, lines: Iterable[str]) -> TrainLog:
        log = cls()
        for line in lines:
            log._feed(line)
        return log

    def _feed(self, line: str) -> None:
        self.last_line = line.strip()[:1000] or self.last_line
        for record in fairseq_log.parse_records(line):
            self._add(record, _time_of(line))
        for name, value in fairseq_log.parse_exchange(line).items():
            self.exchange[name] = self.exchange.get(name, 0.0) + value
        settings = fairseq_log.parse_settings(line)
        loaded = _LOADED.search(line)
        if settings:  # a process starts
            self.settings, self.finished, self.failed, self._resumed = settings, False, False, None
            self._bank()
        elif loaded:
            self._resumed = _time_of(line)
            self._forget(int(loaded[1]) + 1)
        elif "No existing checkpoint found" in line:  # it starts from nothing: what stands above was abandoned
            self._forget(0)
            self._earlier_seconds = 0.0
        elif "done training in" in line:
            self.finished = True
        elif "Traceback (most recent call last)" in line:
            self.failed = True

    def _add(self, record: Record, time: datetime | None) -> None:
        if record.update < self.update:  # a restart whose first lines are missing
            self._forget(record.update)
        self.update = record.update
        self.records[record.tag][record.update] = record.values
        wall = record.values.get("wall", self._wall)
        if wall == 0 and time and self._resumed:  # fairseq's stands still in a process that has loaded a checkpoint
            wall = max(0.0, (time - self._resumed).total_seconds())
        if wall < self._wall:  # fairseq's wall starts at 0 in every process
            self._bank()
        self._wall = wall
        self.clock[record.update] = self.seconds

    def _bank(self) -> None:
        self._earlier_seconds, self._wall = self._earlier_seconds + self._wall, 0.0

    def _forget(self, first: int) -> None:
        """Drop every record from update `first` on."""
        for tag, records in self.records.items():
            self.records[tag] = {update: fields for update, fields in records.items() if update < first}
        self.clock = {update: seconds for update, seconds in self.clock.items() if update < first}
        self.update = max((update for records in self.records.values() for update in records), default=0)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training and validation, those of earlier processes included."""
        return self._earlier_seconds + self._wall

    @property
    def doubled(self) -> bool:
        """Whether the logged losses are twice the true ones.

        fairseq's R-Drop runs every batch twice, in validation too, and divides by the tokens of one.
        """
        if "criterion" in self.settings:
            return self.settings["criterion"] == _RDROP and (as_float(self.settings.get("rdrop_alpha")) or 0) > 0
        return any("rdrop_kl_loss" in fields for fields in self.records.get("train", {}).values())

    def valid_records(self) -> list[tuple[int, Values]]:
        """Of the first validation subset: the one by which fairseq chooses its best checkpoint."""
        return self._true(self.records.get(self.settings.get("valid_subset", "valid"), {}))

    def train_records(self) -> list[tuple[int, Values]]:
        """The lines of every --log-interval updates; where there are none, those of the ends of epochs."""
        return self._true(self.records.get("train_inner") or self.records.get("train", {}))

    def _true(self, records: dict[int, Values]) -> list[tuple[int, Values]]:
        halves = ("loss", "nll_loss") if self.doubled else ()
        halved = {u: {name: fields[name] / 2 for name in halves if name in fields} for u, fields in records.items()}
        return [(update, {**fields, **halved[update]}) for update, fields in sorted(records.items())]

    def valid_nll(self) -> Curve:
        return _nll_curve(self.valid_records())

    def chosen(self) -> Curve:
        """The field of the valid lines that chooses checkpoint_best.pt, such as bleu; [] where that is the NLL."""
        metric = fairseq_log.choosing_metric(self.settings)
        return [(update, fields[metric]) for update, fields in self.valid_records() if metric in fields]

    def train_nll(self) -> Curve:
        return _nll_curve(self.train_records())

    def samples(self) -> Curve:
        """Sentences (or images) that the model has been trained on by an update, of all workers that share its gradients.

        Empty where the log does not tell how many an update has.
        """
        total, last = 0.0, 0.0
        curve: Curve = []
        for update, size in self.train_curve("bsz"):  # the mean since the record before
            total, last = total + size * (update - last), update
            curve.append((update, total))
        return curve

    def train_curve(self, name: str) -> Curve:
        return [(update, fields[name]) for update, fields in self.train_records() if name in fields]


def _time_of(line: str) -> datetime | None:
    """When a line was logged, if it begins with that."""
    stamp = _STAMP.match(line)
    try:
        return datetime.fromisoformat(stamp[1]) if stamp else None
    except ValueError:
        return None


def _nll_curve(records: Sequence[tuple[int, Values]]) -> Curve:
    pairs = [(update, fairseq_log.nll(fields)) for update, fields in records]
    return [(update, value) for update, value in pairs if value is not None]
