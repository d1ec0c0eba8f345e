"""Where a training job is, read from its growing log."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Optional

from ..common import fairseq_log
from ..common.fairseq_log import Record


@dataclass
class LogFollower:
    """What a fairseq job's log tells so far. Fed with text in any pieces; passes over what it does not understand.

    Losses are base 2 as fairseq logs them, staleness is in updates, agreement a share 0…1, `ups` updates per second.
    """

    phase: str = "starting"
    update: Optional[int] = None
    total: Optional[int] = None
    epoch: Optional[int] = None
    train_nll: Optional[float] = None
    valid_nll: Optional[float] = None
    best_valid_nll: Optional[float] = None
    metric: str = ""  # what chooses checkpoint_best.pt where that is no NLL: bleu, top1
    score: Optional[float] = None  # of that metric, in the newest validation
    best_score: Optional[float] = None  # as fairseq tells it, earlier processes included
    alpha: Optional[float] = None
    staleness: Optional[float] = None
    agreement: Optional[float] = None
    ups: Optional[float] = None
    validations: list[float] = field(default_factory=list)
    _partial: str = field(default="", repr=False)
    _max_epoch: int = field(default=0, repr=False)
    _max_update: int = field(default=0, repr=False)
    _valid_subset: str = field(default="", repr=False)

    LIMITS = re.compile(r"'max_epoch': (-?\d+), 'max_update': (-?\d+)")
    PHASES = (("begin validation on", "validating"), ("begin training epoch", "training"), ("done training", "ending"))

    def feed(self, text: str) -> None:
        """Read the next piece of the log; an unfinished last line is kept for the next call."""
        *lines, partial = (self._partial + text).split("\n")
        self._partial = partial[-1_000_000:]  # something that never ends its line must not fill the memory
        for line in lines:
            self._read_line(line)

    def _read_line(self, line: str) -> None:
        for words, phase in self.PHASES:
            if words in line:
                self.phase = phase
        limits = self.LIMITS.search(line)
        if limits:
            self._max_epoch, self._max_update = int(limits[1]), int(limits[2])
            self.total = self._max_update if self._max_update > 0 else None
        self.metric = fairseq_log.choosing_metric(fairseq_log.parse_settings(line)) or self.metric
        for record in fairseq_log.parse_records(line):
            self.phase, self.update, self.epoch = "training", record.update, record.epoch
            if record.tag in ("train_inner", "train"):
                self._read_training(record)
            else:
                self._read_validation(record)

    def _read_training(self, record: Record) -> None:
        values, nll = record.values, fairseq_log.nll(record.values)
        self.train_nll = self.train_nll if nll is None else nll
        self.alpha = values.get("codistill_alpha")
        self.staleness = values.get("codistill_staleness")
        self.agreement = values.get("codistill_agreement")
        self.ups = values.get("ups") or self.ups
        # fairseq's word for the epochs done, 1.5 in the middle of the second.
        done_epochs = values.get("update", 0)
        if self._max_epoch > 0 and done_epochs > 0:
            by_epochs = round(record.update / done_epochs * self._max_epoch)
            self.total = min(by_epochs, self._max_update) if self._max_update > 0 else by_epochs

    def _read_validation(self, record: Record) -> None:
        nll = fairseq_log.nll(record.values)
        # Of several validation subsets the first decides, as for fairseq's best checkpoint.
        if nll is None or self._valid_subset not in ("", record.tag):
            return
        self._valid_subset, self.valid_nll = record.tag, nll
        self.score = record.values.get(self.metric)
        before = self.score if self.best_score is None else self.best_score
        self.best_score = record.values.get(f"best_{self.metric}", before)
        self.validations.append(nll)
        self.best_valid_nll = min((value for value in self.validations if value == value), default=nll)  # not NaN

    @property
    def seconds_left(self) -> Optional[float]:
        """Time to the last update at the present speed; None while the total or the speed is unknown."""
        if self.total is None or self.update is None or not self.ups:
            return None
        return max(0, self.total - self.update) / self.ups


def last_lines(path: str, count: int = 20, cut: bool = True) -> list[str]:
    """The end of a log, without control codes; with `cut`, all lines but the last are cut. Raises OSError."""
    from rich.text import Text

    with open(path, "rb") as log:
        log.seek(max(0, os.path.getsize(path) - 65536))
        lines = log.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    plain = ["".join(filter(str.isprintable, Text.from_ansi(line.expandtabs()).plain)).rstrip() for line in lines]
    shown = [line for line in plain if line][-count:]
    # The last words of the error matter, not another record of losses or the configuration.
    limits = [70 if fairseq_log.RECORD.search(line) else 300 for line in shown]
    limits[-1:] = [max(limits[-1], 4000)] if limits and limits[-1] > 70 else limits[-1:]  # advice stands at the end
    return [line if len(line) <= limit or not cut else line[:limit] + " ..." for line, limit in zip(shown, limits)]
