"""From logs alone: does a run over-fit, so that codistillation is likely to pay; and was α too large or too small?

All thresholds are from the committed logs in recipes/*/results (NLL in bits per token, per image for Fashion-MNIST; the train
NLL is the one that is logged, with dropout; gains are of the best validation, seeds together):

    run alone                                     gap at the end    gain of codistillation
    multi30k_en_de/results/single                           1.71    0.24 (codistill_ce), 0.22 (codistill_mse)
    newstest_de_en/results/over_fitting/single              1.79    0.28 (codistill_ce)
    demo/results/single                                     1.56    0.26 (codistill_ce)
    multi30k_en_de/results/two_cores/single                 0.05    -0.05 (codistill_ce)
    newstest_de_en/results/two_cores/single                 0.03    0.02 (codistill_ce)
    fashion_mnist/results/single                            0.01    0.02 (codistill_constant)
    tatoeba_de_en/results/two_cores/single                 -0.23    -0.12 (codistill_ce)

The same two thresholds hold for all_reduce: with gaps of 1.9 to 3.3 it is behind codistillation by 0.3 bits, with gaps of up
to 0.22 ahead of it. No committed run has a gap between the two, and the report says so.

α, from multi30k_en_de/results/tuning, codistill_ce, codistill_mse and the sets above. Too large (ce 3; mse 1 growing; ce 1
where nothing over-fits): the mean lag behind the run alone over the middle half of the updates is 0.04 bits or
more, everywhere else it is below 0. Too small (ce 0.3; mse 0.03 growing; two thirds of the others' gain): 0.85 of the run
alone's gap is left, with the others at most 0.79. The agreement with peers is shown, not judged: on one corpus it rises with α
(ce 0.3, 1, 3: 0.68, 0.72, 0.79), but between corpora it differs as much at one α (0.57 to 0.84 at ce 1).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .curves import finite, mean_curve, value_at
from .log import Curve, TrainLog
from .summary import Method

LIKELY, UNLIKELY = 1.0, 0.25  # bits: a gap that paid, and one that did not
TOO_LARGE = 0.03  # bits of lag behind alone
TOO_SMALL = 0.82  # of alone's gap
SAME = 1.25  # two runs with batches and epochs within this ratio have as many workers and as much data
END = 0.9  # of the updates: the train NLL of the end is the mean from here on


class Gap(NamedTuple):
    """How far validation is behind training at the end of a run; NLLs in bits."""

    update: float
    train: float
    valid: float
    best: float
    best_at: float

    @property
    def bits(self) -> float:
        return self.valid - self.train

    @property
    def rise(self) -> float:
        """Of the valid NLL since its minimum."""
        return self.valid - self.best


def gap_of(log: TrainLog) -> Gap | None:
    """None before the first validation, or without a train NLL."""
    valid, train = finite(log.valid_nll()), finite(log.train_nll())
    if not valid or not train:
        return None
    tail = [nll for update, nll in train if update > END * train[-1][0]]
    best, at = min((nll, update) for update, nll in valid)
    return Gap(valid[-1][0], statistics.fmean(tail), valid[-1][1], best, at)


def mean_gap(method: Method) -> Gap | None:
    """The mean over all peers of all seeds."""
    gaps = [gap for gap in (gap_of(peer.log) for _, peer in method.peers()) if gap]
    return Gap(*map(statistics.fmean, zip(*gaps))) if gaps else None


def is_taught(method: Method) -> bool:
    """Whether peers (or a teacher) have had a say in any of its runs."""
    return any(alpha > 0 for _, peer in method.peers() for _, alpha in peer.log.train_curve("codistill_alpha"))


def is_plain(method: Method) -> bool:
    """Cross entropy without teaching, smoothing or a second pass: what a codistilled run is to be compared with."""
    criteria = {peer.log.settings.get("criterion", "") for _, peer in method.peers()}
    return criteria <= {"cross_entropy", "codistill_ce"} and not is_taught(method)


def batch(method: Method) -> float:
    """Target tokens (or images) in an update of one job, in the mean; NaN where the logs do not say."""
    sizes = [size for _, peer in method.peers() for _, size in peer.log.train_curve("wpb")]
    return statistics.fmean(sizes) if sizes else math.nan


def epochs(method: Method) -> float:
    """Epochs in 1,000 updates, in the mean: of the same data in the same batches two runs have as many. 0 before the first."""
    ended = [(len(peer.log.records.get("train", {})), peer.log.update) for _, peer in method.peers()]
    return statistics.fmean([1000 * count / update for count, update in ended if update] or [0.0])


def alone_beside(method: Method, methods: Iterable[Method]) -> Method | None:
    """The run alone that a codistilled method is compared with: plain, with the batch of one peer (all_reduce has more), and
    with as many epochs in as many updates, so that it has the same data.

    Of several the one that shares most seeds, then the first.
    """
    seeds = {run.name for run in method.runs}
    plain = [
        other for other in methods
        if is_plain(other) and _alike(batch(method), batch(other)) and _alike(epochs(method), epochs(other))
    ]  # fmt: skip
    return max(plain, key=lambda other: len(seeds & {run.name for run in other.runs}), default=None)


def _alike(one: float, other: float) -> bool:
    return one == other or other / SAME < one < other * SAME


class Lag(NamedTuple):
    """A codistilled method minus the run alone, valid NLL in bits at equal updates; negative is better."""

    middle: float  # mean from a quarter to three quarters of the updates
    ahead_from: float | None  # the update after which it is never behind; None if it is behind at the end
    gain: float  # alone's best minus its own


def lag_behind(method: Method, alone: Method) -> Lag | None:
    """None where the curves do not overlap."""
    mine, theirs = (_valid_curve(one, {run.name for run in other.runs}) for one, other in ((method, alone), (alone, method)))
    if not mine or not theirs:
        return None
    points = [(x, nll - value_at(theirs, x)) for x, nll in mine if theirs[0][0] <= x <= theirs[-1][0]]
    middle = [lag for x, lag in points if 0.25 * points[-1][0] <= x <= 0.75 * points[-1][0]]
    if not middle:
        return None
    later = [x for x, _ in points if x > max((x for x, lag in points if lag > 0), default=-math.inf)]
    gain = min(nll for _, nll in theirs) - min(nll for _, nll in mine)
    return Lag(statistics.fmean(middle), later[0] if later else None, gain)


def _valid_curve(method: Method, seeds: set[str]) -> Curve:
    """The mean over all peers, of the seeds that both have where there are such."""
    runs = [run for run in method.runs if run.name in seeds] or method.runs
    return mean_curve([peer.log.valid_nll() for run in runs for peer in run.peers])


def advice(methods: Sequence[Method]) -> list[str]:
    """A sentence for each method without peers, and for each codistilled method with a run alone beside it."""
    lines = [_of_alone(method) for method in methods if is_plain(method)]
    for method in methods:
        alone = alone_beside(method, methods) if is_taught(method) else None
        lines += [_of_codistilled(method, alone)] if alone else []
    return [line for line in lines if line]


def _of_alone(method: Method) -> str:
    gap = mean_gap(method)
    if gap is None:
        return ""
    rise = f", {gap.rise:.3f} above its best at {gap.best_at:,.0f}" if gap.rise > 0 else ", its best"
    return (
        f"{method.label} at update {gap.update:,.0f}: valid NLL {gap.valid:.3f}{rise}; train NLL {gap.train:.3f}; gap "
        f"{gap.bits:.2f} bits. {_will_it_pay(gap)}"
    )


def _will_it_pay(gap: Gap) -> str:
    if gap.bits >= LIKELY:
        return f"Codistillation is likely to pay: in measured runs with one above {LIKELY:g} it gained 0.2 to 0.3 bits."
    if gap.bits < UNLIKELY:
        return f"Codistillation is unlikely to pay: in measured runs with one below {UNLIKELY:g} it gained at most 0.03 bits."
    return f"Whether codistillation pays is open: no measured run has a gap between {UNLIKELY:g} and {LIKELY:g}."


def _of_codistilled(method: Method, alone: Method) -> str:
    lag, own, theirs = lag_behind(method, alone), mean_gap(method), mean_gap(alone)
    if lag is None or own is None or theirs is None:
        return ""
    ahead = f"ahead from update {lag.ahead_from:,.0f} on" if lag.ahead_from is not None else "behind at the end"
    agreements = [curve[-1][1] for _, peer in method.peers() if (curve := peer.log.train_curve("codistill_agreement"))]
    agreement = f", agreement {statistics.fmean(agreements):.2f}" if agreements else ""
    return (
        f"{method.label} beside {alone.label}: valid NLL {lag.middle:+.3f} bits in the middle half of the run, {ahead}, "
        f"at its best {-lag.gain:+.3f}; gap {own.bits:.2f} bits instead of {theirs.bits:.2f}{agreement}. "
        f"{verdict(lag, own, theirs)}"
    )


def verdict(lag: Lag, own: Gap, alone: Gap) -> str:
    """What the numbers say about α."""
    if lag.middle > TOO_LARGE:
        until = "" if lag.gain <= 0 else f", at first: in the end it is {lag.gain:.3f} bits better"
        return f"α was too large{until}; use a smaller one, let it grow, or begin later (--codistill-burn-in)."
    if alone.bits < LIKELY:
        return "α was not too large; where the run alone over-fits so little, there is not much to gain."
    if own.bits > TOO_SMALL * alone.bits:
        return "α was too small: most of the gap is left."
    return "α was about right."
