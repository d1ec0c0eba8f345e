"""Which rows (positions) of a peer may teach. A peer that diverges must cost its teaching, never the training.

A row is dropped when its distance is not finite, and when two things are true of it at once:

* it pulls harder than a target could: ‖∂D/∂logits‖ > √2·τ, the most that a cross entropy reaches;
* the peer's logits lie farther from the model's own than twice their size (without their mean, where the mean has no effect).

`ce`, `kl` and `js` never pull that hard, but follow a peer wherever it points. Of them a row is dropped in which the peer finds
its own top class e^50 times as likely as the model's: a trained model is not that sure, one whose weights have exploded is.

Peers of one age keep the squared distances and `reverse_kl` below it, too; a
fresh student beside a trained teacher with few classes can lose rows until its own logits have grown.
A running median of D as the threshold would be lost at a resume, so lockstep runs would not repeat.

Shapes: N positions, V classes. "Raw" distances see the mean of a row's logits, "centred" ones do not.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Dict, Optional, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PULL = 2.0  # the square of the hardest pull of a cross entropy at τ = 1
FAR = 4.0  # the square of: twice the own logits' size
SURE = 50.0  # nats, at τ = 1
_LOOK = 100  # taught updates between looks at a GPU's counts, each of which waits for the GPU


def size(logits_NV: Tensor, centred: bool) -> Tensor:
    """The mean square of each row, [N]: of the logits as they are, or less their mean."""
    return logits_NV.var(-1, unbiased=False) if centred else torch.linalg.vecdot(logits_NV, logits_NV) / logits_NV.size(-1)


def unusable(
    value_N: Tensor, pull_N: Tensor, apart: Callable[[], Tensor], own_NV: Tensor, centred: bool, temperature: float = 1.0
) -> Tensor:  # fmt: skip
    """The rows to drop, booleans [N]. `pull_N`: ‖∂D/∂logits‖²; `apart` gives the `size` of the own logits less the peer's."""
    # Not "greater": what is no number is dropped as well.
    strong_N = ~(pull_N <= PULL * temperature**2)
    if not own_NV.is_cuda and not strong_N.any():  # as ever; a GPU would have to be waited for
        return ~value_N.isfinite()
    return ~value_N.isfinite() | (strong_N & ~(apart() <= FAR * size(own_NV, centred)))


def squared_unusable(value_N: Tensor, own_NV: Tensor, centred: bool) -> Tensor:
    """`unusable` of a squared distance, whose value says it all: D = ‖s − t‖²/V, and its gradient is 2(s − t)/V."""
    return unusable(value_N, value_N * (4 / own_NV.size(-1)), lambda: value_N, own_NV, centred)


def squared_unfit(own_NV: Tensor, peer_NV: Tensor, centred: bool) -> Tensor:
    """`squared_unusable` before there is a distance."""
    if not own_NV.is_cuda:  # usually norms say enough: ‖s − t‖ ≤ ‖s‖ + ‖t‖, and the mean only adds to them
        most_N = (size(own_NV, False).sqrt() + size(peer_NV, False).sqrt()).square()
        if (most_N * (4 / own_NV.size(-1)) <= PULL).all():
            return torch.zeros_like(most_N, dtype=torch.bool)
    return squared_unusable(size(own_NV - peer_NV, centred), own_NV, centred)


def behind(peer_NV: Tensor, own_top_N: Tensor) -> Tensor:
    """By how much the model's own top class has a lower logit with the peer than the peer's own, [N]: 0 where both agree."""
    return peer_NV.amax(-1) - peer_NV.gather(-1, own_top_N.unsqueeze(-1)).squeeze(-1)


def too_sure(behind_N: Tensor, temperature: float = 1.0) -> Tensor:
    """The rows of a bounded distance to drop, booleans [N], by what `behind` gives; also those that are no numbers."""
    return ~(behind_N <= SURE * temperature)


def zeroed(bad_N: Tensor, rows: Tensor) -> Tensor:
    """`rows` ([N] or [N, …]) itself, with 0 where `bad_N`. On a CPU nothing is touched unless something is bad."""
    if bad_N.is_cuda or bad_N.any():
        rows.masked_fill_(bad_N.view(-1, *[1] * (rows.dim() - 1)), 0)
    return rows


class Usable:
    """How many peers each row of a mean has: those that are good."""

    def __init__(self) -> None:
        self.bad_N: Optional[Tensor] = None  # how many were dropped
        self.count = 0

    def add(self, bad_N: Tensor) -> None:
        self.bad_N = bad_N.int() if self.bad_N is None else self.bad_N.add_(bad_N)
        self.count += 1

    def mean(self, sum_NV: Tensor) -> Tensor:
        """Of what good peers summed up to: in place. 0 where no peer is good."""
        sum_NV.div_(self.count)
        assert self.bad_N is not None, "no peer was added"
        if sum_NV.is_cuda or self.bad_N.any():
            sum_NV.mul_((self.count / (self.count - self.bad_N).clamp_min(1)).to(sum_NV.dtype).unsqueeze(-1))
        return sum_NV

    def weigh(self, rows: Tensor) -> Tensor:
        """D or its gradient, to their mean, in place: a dropped peer adds 0 to the mean over all, as in `pairwise`."""
        assert self.bad_N is not None, "no peer was added"
        if rows.is_cuda or self.bad_N.any():
            share_N = ((self.count - self.bad_N) / self.count).to(rows.dtype)
            rows.mul_(share_N.view(-1, *[1] * (rows.dim() - 1)))
        return rows


class Warner:
    """Says once of each peer that rows of it were dropped."""

    def __init__(self) -> None:
        self._counts: Dict[Any, Tensor] = {}
        self._warned: set = set()
        self._taught = 0

    def note(self, names: Sequence[Any], dropped: Tensor, positions: Tensor) -> None:
        """`dropped`: for each of `names`, how many of the `positions` were dropped in this (micro-)batch."""
        self._taught += 1
        for name, count in zip(names, dropped.unbind()):
            if name not in self._warned:
                row = torch.stack([count.float(), positions.float()])
                self._counts[name] = row + self._counts[name] if name in self._counts else row
        if not dropped.is_cuda or self._taught % _LOOK == 0:
            self._look()

    def _look(self) -> None:
        for name, counts in list(self._counts.items()):
            dropped, positions = counts.tolist()
            del self._counts[name]
            if dropped:
                self._warned.add(name)
                logger.warning(
                    f"codistillation: {name} teaches nothing at {dropped:.0f} of {positions:.0f} positions: its predictions "
                    "there are not finite, or so far from this peer's that they would pull harder than a target can, or surer "
                    "than a trained model is. It may have diverged; training goes on, and codistill_dropped in the log is the "
                    "share of such positions"
                )
