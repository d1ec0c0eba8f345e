"""From peers to methods: the numbers of a peer, their mean over a run's peers, mean and spread over a method's seeds.

Every NLL is in bits per target token, for fairseq logs its losses in base 2.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..common import fairseq_log
from ..common.fairseq_log import Values
from .log import TrainLog


class Score(NamedTuple):
    """One score of one peer (or of a run's ensemble), as sacreBLEU printed it."""

    test: str  # name of the test set
    metric: str  # BLEU, chrF2, TER
    value: float
    signature: str
    file: Path

    @property
    def key(self) -> str:
        return f"{self.test} {self.metric}"


@dataclass
class Peer:
    name: str
    file: Path
    log: TrainLog
    scores: list[Score] = field(default_factory=list)

    def values(self) -> Values:
        """The numbers of this peer; a number that its log does not (yet) hold is left out.

        `valid NAME` is fairseq's valid_NAME at the update of the best NLL.
        """
        log, curve = self.log, self.log.valid_nll()
        values: Values = {"updates": log.update, "seconds": log.seconds}
        if curve:
            values["last_valid_nll"] = curve[-1][1]
        finite = [(value, update) for update, value in curve if math.isfinite(value)]
        if finite:
            best, at = min(finite)  # of equal NLLs the earliest
            values.update(best_valid_nll=best, ppl=perplexity(best), at_update=at)
            values.update({f"valid {name}": value for name, value in dict(log.valid_records())[int(at)].items()})
        return {**values, **self._chosen(), **{score.key: score.value for score in self.scores}}

    def _chosen(self) -> Values:
        """The best of what chooses checkpoint_best.pt, and its update, where that is no NLL."""
        settings = self.log.settings
        sign = 1 if fairseq_log.is_maximised(settings) else -1
        curve = [(sign * value, update) for update, value in self.log.chosen() if math.isfinite(value)]
        if not curve:
            return {}
        best, at = max(curve)  # of equal ones the latest, which fairseq saves over the earlier
        metric = fairseq_log.choosing_metric(settings)
        return {f"best_valid_{metric}": sign * best, f"at_update_of_{metric}": at}


@dataclass
class Run:
    """One seed of a method: the peers that trained together."""

    name: str
    peers: list[Peer]
    ensemble: list[Score] = field(default_factory=list)

    def values(self) -> Values:
        """The mean over the peers, and the ensemble's scores."""
        values = {key: mean(found) for key, found in gather(peer.values() for peer in self.peers).items()}
        return {**values, **{f"{score.key} of the ensemble": score.value for score in self.ensemble}}

    def best_peer(self) -> Peer:
        """Chosen by validation, so that its test score is an honest one."""
        return min(self.peers, key=lambda peer: peer.values().get("best_valid_nll", math.inf))


@dataclass
class Method:
    label: str
    runs: list[Run]

    def peers(self) -> Iterator[tuple[str, Peer]]:
        """Every peer with the words that tell it from the others."""
        for run in self.runs:
            for peer in run.peers:
                yield " ".join(filter(None, (self.label, run.name, peer.name))), peer

    def scores(self) -> list[Score]:
        lists = [scores for run in self.runs for scores in (run.ensemble, *(peer.scores for peer in run.peers))]
        return [score for scores in lists for score in scores]


class Stat(NamedTuple):
    mean: float
    std: float | None  # None for a single seed
    n: int


def mean(values: Sequence[float]) -> float:
    """Also of ∞ and −∞, which `fmean` refuses to add."""
    return statistics.fmean(values) if all(map(math.isfinite, values)) else sum(values) / len(values)


def perplexity(bits: float) -> float:
    """2 to the NLL. fairseq's own `ppl` is squared wherever its NLL is doubled."""
    return 2.0**bits if bits < 1000 else math.inf


def gather(values: Iterable[Values]) -> dict[str, list[float]]:
    """[{a: 1}, {a: 2, b: 3}] -> {a: [1, 2], b: [3]}"""
    gathered: dict[str, list[float]] = defaultdict(list)
    for one in values:
        for key, value in one.items():
            gathered[key].append(value)
    return gathered


def spread(values: Sequence[float]) -> Stat:
    """Mean and sample standard deviation (n − 1)."""
    finite = all(map(math.isfinite, values))  # statistics.stdev refuses the others
    std = (statistics.stdev(values) if finite else math.nan) if len(values) > 1 else None
    return Stat(mean(values), std, len(values))


def summarise(seeds: Iterable[Values]) -> dict[str, Stat]:
    return {key: spread(found) for key, found in gather(seeds).items()}
