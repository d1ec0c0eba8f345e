"""α and weight decay as plain functions of the epoch: nothing is counted, so a resumed run continues by itself.

Epochs count from 1, as in fairseq. A milestone m takes effect when m epochs are complete, so from epoch m + 1 on.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from bisect import bisect_left
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple


def constant(epoch: int, alpha: float, **_: object) -> float:
    """α in every epoch (Anil et al.)."""
    return alpha


def exponential(epoch: int, alpha: float, gamma: float, **_: object) -> float:
    """α·γ^(epoch−1) (Sodhani et al., §3.3 and Fig. 17, translation: γ = 1.1).

    With α = 1 and γ = 1.1: epoch 1 → 1.0, epoch 2 → 1.1, epoch 3 → 1.21, epoch 26 → 10.83.
    """
    try:
        return alpha * gamma ** (epoch - 1)
    except OverflowError:
        return sys.float_info.max


def stepwise(epoch: int, alpha: float, step: float, milestones: Sequence[float], **_: object) -> float:
    """α + step for each milestone passed (Sodhani et al., §3.2, ImageNet: +0.5 at each decay of the learning rate).

    With α = 1, step = 0.5 and milestones (15, 30, 40): epochs 1–15 → 1.0, 16–30 → 1.5, 31–40 → 2.0, 41– → 2.5.
    """
    return alpha + step * _passed(epoch, milestones)


ALPHA_SCHEDULES: Dict[str, Callable[..., float]] = {
    "constant": constant,
    "exponential": exponential,
    "stepwise": stepwise,
}


def alpha_at(
    schedule: str,
    epoch: int,
    update: int,
    *,
    alpha: float,
    gamma: float = 1.1,
    step: float = 0.5,
    milestones: Sequence[float] = (),
    maximum: Optional[float] = None,
    burn_in: int = 0,
    warmup: int = 0,
    warmup_updates: int = 0,
    until: Optional[int] = None,
) -> float:
    """α for this epoch and update (0, 1, …): 0 before update `burn_in` (Anil et al., Algorithm 1), never above `maximum`.
    It is 0 again from update `until` on: with until = 500, update 499 is the last that is taught.

    It grows in over the first `warmup` epochs, being multiplied by (epoch − 1) / warmup at most 1. With 4: 0 in epoch 1, a
    quarter in epoch 2, three quarters in epoch 4, all of it from epoch 5 on.

    With `warmup_updates` it grows in from update `burn_in` on, to its full size after so many updates. With a constant α = 1,
    burn_in = 100 and warmup_updates = 50: updates 0–100 → 0, 101 → 0.02, 125 → 0.5, 149 → 0.98, 150– → 1.
    """
    if update < burn_in or (until is not None and update >= until):
        return 0.0
    value = ALPHA_SCHEDULES[schedule](epoch, alpha=alpha, gamma=gamma, step=step, milestones=milestones)
    value *= min(1.0, (epoch - 1) / warmup) if warmup else 1.0
    value = value if maximum is None else min(value, maximum)
    return value if update >= burn_in + warmup_updates else value * (update - burn_in) / warmup_updates


@dataclass(frozen=True)
class AlphaSchedule:
    """The options that decide α."""

    name: str = "constant"
    alpha: float = 1.0
    gamma: float = 1.1
    step: float = 0.5
    milestones: Sequence[float] = ()
    maximum: Optional[float] = None
    burn_in: int = 0
    warmup: int = 0
    warmup_updates: int = 0
    until: Optional[int] = None

    def at(self, epoch: int, update: int, begin: Optional[int] = 0) -> float:
        """α; before update `begin` it is 0, too, and forever where that is None."""
        if begin is None:
            return 0.0
        return alpha_at(
            self.name, epoch, update, alpha=self.alpha, gamma=self.gamma, step=self.step,
            milestones=self.milestones, maximum=self.maximum, burn_in=max(begin, self.burn_in), warmup=self.warmup,
            warmup_updates=self.warmup_updates, until=self.until,
        )  # fmt: skip

    def options(self) -> Dict[str, Any]:
        """The options by name, as JSON gives them back."""
        return {_OPTIONS[name]: value for name, value in json.loads(json.dumps(dataclasses.asdict(self))).items()}

    def change_from(self, before: Dict[str, Any], epoch: int, update: int) -> Optional[str]:
        """What has changed since the options were `before`, and what that does, in one sentence; None if nothing has."""
        now = self.options()
        changes = [f"{name} {before[name]} → {now[name]}" for name in now if name in before and before[name] != now[name]]
        if not changes:
            return None
        names = {option: name for name, option in _OPTIONS.items()}
        old = AlphaSchedule(**{names[option]: value for option, value in {**now, **before}.items() if option in names})
        return (
            f"{', '.join(changes)}: options act as if they had been given from the first epoch on, so α is now "
            f"{self.at(epoch, update):.4g} in epoch {epoch}, and was {old.at(epoch, update):.4g}"
        )


_OPTIONS = {
    "name": "codistill_alpha_schedule", "alpha": "codistill_alpha", "gamma": "codistill_gamma", "step": "codistill_alpha_step",
    "milestones": "codistill_milestones", "maximum": "codistill_alpha_max", "burn_in": "codistill_burn_in",
    "warmup": "codistill_alpha_warmup_epochs", "warmup_updates": "codistill_alpha_warmup", "until": "codistill_until",
}  # fmt: skip


def stalled_at(losses: Iterable[Tuple[int, float]], patience: int) -> Optional[int]:
    """The update at which the validation loss has first failed to improve on its best `patience` times in a row, or None.

    `losses`: (update, loss) of each validation, in order. With patience 2 and losses 5, 4, 4.1, 3.9, 3.9, 4 at updates 10, 20,
    …, 60 it is 60. A loss that is no number has not improved.
    """
    best, failures = math.inf, 0
    for update, loss in losses:
        best, failures = (loss, 0) if loss < best else (best, failures + 1)
        if failures >= patience:
            return update
    return None


def weight_decay_at(epoch: int, milestones: Sequence[float], values: Sequence[float]) -> float:
    """The weight decay before the first milestone and after each (Sodhani et al., §3.2: 1e-4 → 1e-5 → 0).

    With milestones (18, 38) and values (1e-4, 1e-5, 0): epochs 1–18 → 1e-4, 19–38 → 1e-5, 39– → 0.
    """
    assert len(values) == len(milestones) + 1, "one value more than milestones"
    return values[_passed(epoch, milestones)]


def _passed(epoch: int, milestones: Sequence[float]) -> int:
    return bisect_left(milestones, epoch)
