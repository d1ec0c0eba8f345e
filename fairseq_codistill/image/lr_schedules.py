"""Learning rate and weight decay by epochs, which may be fractions: `--lr-scheduler multistep` and `cosine_he`.

Both are functions of the update: nothing is counted, so a resumed run continues by itself. t counts epochs from 0, so a
milestone m takes effect when m epochs are complete, as in schedules.py. How many updates an epoch has is told by the image
task, or by --updates-per-epoch.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from ..core.weight_decay import set_weight_decay

_ROUNDING = 1e-4  # epochs: two thirds are written 0.6667, which the update at two thirds should reach


def multistep(t: float, lr: float, *, milestones: Sequence[float], shrink: float, warmup: float, start: float) -> float:
    """lr · shrink^(milestones passed), after a linear warm-up from `start` in `warmup` epochs (Goyal et al. 2017).

    With lr 0.2, milestones (30, 60, 80), shrink 0.1, warm-up of 5 epochs from 0.1: t 0 → 0.1, 2.5 → 0.15, 5 → 0.2,
    just before 30 → 0.2, 30 → 0.02, 60 → 0.002, 80 → 0.0002.
    """
    if t < warmup - _ROUNDING:
        return start + (lr - start) * t / warmup
    return lr * shrink ** passed(t, milestones)


def cosine_he(t: float, lr: float, *, epochs: float, warmup: float, start: float) -> float:
    """½ (1 + cos(π (t − warmup) / (epochs − warmup))) · lr after the linear warm-up (He et al. 2019, §3.1 and §5.1).

    With lr 0.4, 90 epochs, warm-up of 5 from 0: t 0 → 0, 2.5 → 0.2, 5 → 0.4, 47.5 → 0.2, 90 → 0; later 0.
    """
    if t < warmup - _ROUNDING:
        return start + (lr - start) * t / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (t - warmup) / (epochs - warmup)))) * lr


def passed(t: float, milestones: Sequence[float]) -> int:
    """How many milestones are complete at t epochs: with (18, 38), t 17.99 → 0, 18 → 1, 38 → 2."""
    return bisect_right(milestones, t + _ROUNDING)


def tell_updates_per_epoch(optimizer: Any, updates: Optional[int]) -> None:
    """What a task knows and fairseq tells no schedule. `optimizer`: fairseq's, with which the schedule was built."""
    schedule = getattr(optimizer, "epoch_schedule", None)
    if schedule is not None and updates:
        schedule.updates_per_epoch_are(updates)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


# fairseq reads the types of these fields at run time, so this module has no `from __future__ import annotations`.
@dataclass
class EpochScheduleConfig(FairseqDataclass):
    warmup_epochs: float = _option(0.0, "epochs in which the learning rate rises linearly to --lr; may be a fraction")
    warmup_init_lr: float = _option(0.0, "where the warm-up begins (Goyal et al.: 0.1)")
    weight_decays: Optional[str] = _option(
        None, "weight decay before and after each of its milestones, e.g. 1e-4,1e-5,0 (default: the optimizer's, constant)"
    )
    weight_decay_milestones: Optional[str] = _option(
        None, "epochs after which the weight decay changes (default: the first of --lr-milestones)"
    )
    updates_per_epoch: Optional[int] = _option(None, "updates in an epoch (default: what the image task tells)")
    lr: List[float] = II("optimization.lr")


@dataclass
class MultistepConfig(EpochScheduleConfig):
    lr_milestones: Optional[str] = _option(None, "epochs after which the learning rate shrinks: 30,60,80; may be fractions")
    lr_shrink: float = _option(0.1, "factor at each milestone")


@dataclass
class CosineHeConfig(EpochScheduleConfig):
    cosine_epochs: Optional[float] = _option(None, "epochs after which the rate reaches 0 (default: --max-epoch)")
    max_epoch: int = II("optimization.max_epoch")


def _numbers(cfg: FairseqDataclass, name: str) -> List[float]:
    """An option that is a comma-separated list of finite numbers, not negative. Raises ValueError."""
    text = getattr(cfg, name)
    try:
        values = [float(word) for word in str(text).split(",")] if text is not None else []
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) and value >= 0 for value in values):
        raise ValueError(f"{name} must be numbers separated by commas, none negative, but is {text!r} instead.")
    return values


def _milestones(cfg: FairseqDataclass, name: str) -> List[float]:
    values = _numbers(cfg, name)
    if any(later <= earlier for earlier, later in zip([0.0, *values], values)):
        raise ValueError(f"{name} must be epochs that increase, from above 0, but is {getattr(cfg, name)} instead.")
    return values


class EpochSchedule(FairseqLRScheduler):
    """A schedule by epochs: sets learning rate and weight decay after each update. Subclasses give `rate`."""

    def __init__(self, cfg: EpochScheduleConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        if len(cfg.lr) != 1 or not cfg.lr[0] > 0:
            raise ValueError(f"lr must be one number above 0 with this --lr-scheduler, but is {list(cfg.lr)} instead.")
        for name in ("warmup_epochs", "warmup_init_lr"):
            _numbers(cfg, name)
        self.peak = float(cfg.lr[0])
        self._updates_per_epoch = cfg.updates_per_epoch
        self._update = 0
        self._decays = _numbers(cfg, "weight_decays")
        self._decay_milestones = self._milestones_of_decays(cfg)
        optimizer.epoch_schedule = self

    def _milestones_of_decays(self, cfg: EpochScheduleConfig) -> List[float]:
        given = _milestones(cfg, "weight_decay_milestones")
        milestones = given or (_milestones(cfg, "lr_milestones") if hasattr(cfg, "lr_milestones") else [])
        milestones = milestones if given or not self._decays else milestones[: len(self._decays) - 1]
        if self._decays and len(self._decays) != len(milestones) + 1:
            raise ValueError(
                f"weight_decays must be one number before and after each of {len(milestones)} milestones, so "
                f"{len(milestones) + 1}, but is {cfg.weight_decays}; did you forget --weight-decay-milestones?"
            )
        if given and not self._decays:
            raise ValueError("weight_decays must be given with --weight-decay-milestones; did you forget it?")
        return milestones

    def rate(self, t: float) -> float:
        """The learning rate after t epochs."""
        raise NotImplementedError

    def updates_per_epoch_are(self, updates: int) -> None:
        if self.cfg.updates_per_epoch is None and updates != self._updates_per_epoch:
            self._updates_per_epoch = updates
            self.step_update(self._update)

    def epochs(self, num_updates: int) -> float:
        """t, the epochs complete after so many updates. Raises ValueError if nobody has told how many make an epoch."""
        if num_updates == 0:
            return 0.0
        if not self._updates_per_epoch or self._updates_per_epoch < 1:
            raise ValueError(
                f"--lr-scheduler {self.cfg._name} must know how many updates an epoch has (the image_classification task "
                "tells it), but nobody has; did you forget --updates-per-epoch?"
            )
        return num_updates / self._updates_per_epoch

    def step_update(self, num_updates: int) -> float:
        """Set what holds for the update after `num_updates`; returns the learning rate."""
        self._update = num_updates
        t = self.epochs(num_updates)
        self.optimizer.set_lr(self.rate(t))
        if self._decays:
            set_weight_decay(self.optimizer.param_groups, self._decays[passed(t, self._decay_milestones)])
        return self.optimizer.get_lr()

    def step(self, epoch: int, val_loss: Optional[float] = None) -> float:
        super().step(epoch, val_loss)
        return self.optimizer.get_lr()

    def state_dict(self) -> Dict[str, Any]:
        return {**super().state_dict(), "updates_per_epoch": self._updates_per_epoch}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # fairseq asks for the rate of a resumed run before the task has told anything.
        self._updates_per_epoch = self._updates_per_epoch or state_dict.get("updates_per_epoch")


@register_lr_scheduler("multistep", dataclass=MultistepConfig)
class MultistepSchedule(EpochSchedule):
    """Linear warm-up, then a factor at each milestone."""

    def __init__(self, cfg: MultistepConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        self._milestones = _milestones(cfg, "lr_milestones")
        if not self._milestones:
            raise ValueError("lr_milestones must be given with --lr-scheduler multistep; did you forget it?")

    def rate(self, t: float) -> float:
        cfg = self.cfg
        return multistep(
            t, self.peak, milestones=self._milestones, shrink=cfg.lr_shrink, warmup=cfg.warmup_epochs, start=cfg.warmup_init_lr
        )


@register_lr_scheduler("cosine_he", dataclass=CosineHeConfig)
class CosineHeSchedule(EpochSchedule):
    """Linear warm-up, then half a cosine down to 0. fairseq's own `cosine` gives the same rates, but counts in updates."""

    def __init__(self, cfg: CosineHeConfig, optimizer: Any) -> None:
        super().__init__(cfg, optimizer)
        self._epochs = cfg.cosine_epochs or cfg.max_epoch
        if not self._epochs or self._epochs <= cfg.warmup_epochs:
            raise ValueError(
                f"cosine_epochs (or max_epoch) must be more than the {cfg.warmup_epochs} epochs of the warm-up, but is "
                f"{self._epochs} instead; did you forget --max-epoch?"
            )

    def rate(self, t: float) -> float:
        return cosine_he(t, self.peak, epochs=self._epochs, warmup=self.cfg.warmup_epochs, start=self.cfg.warmup_init_lr)
