"""Checkpoints of fairseq read without running code from them, averaged, and stripped of what only training needs.

Two users: `codistill-launch export`, and recipes/translation/average.py.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from . import compat

State = Dict[str, Any]  # what fairseq's torch.save has written: args, cfg, model, extra_state, …
_CRITERION = "codistill_ce"
_TASKS = ("image_classification",)  # the plugin's own: without --user-dir fairseq does not know them


class Standing(NamedTuple):
    """How good a run has been so far, as its checkpoint tells it."""

    metric: str  # --best-checkpoint-metric
    best: Optional[float]  # its best value up to this checkpoint; None without a validation
    maximise: bool
    updates: Optional[int]

    @property
    def rank(self) -> float:
        """The lower, the better; infinite for a run without a finite value."""
        if self.best is None or not math.isfinite(self.best):
            return math.inf
        return -self.best if self.maximise else self.best


def load(path: Path) -> State:
    """A checkpoint on the CPU, its tensors mapped from the file. Raises ValueError, in one sentence, for any other file."""
    compat.allow_checkpoint_classes()
    try:
        # Mapped, so that Adam's averages, two thirds of the file, stay on the disk.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # written in torch's format before 1.6, which is no zip file
            raise
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} must be a checkpoint of fairseq, but holds no weights under 'model'.")
    return state


def standing(state: State) -> Standing:
    """By which metric the run chooses its best checkpoint, and the best value so far."""
    metric = _setting(state, "checkpoint", "best_checkpoint_metric") or "loss"
    maximise = bool(_setting(state, "checkpoint", "maximize_best_checkpoint_metric"))
    extra, history = state.get("extra_state") or {}, state.get("optimizer_history") or [{}]
    best = extra.get("best", extra.get("val_loss"))
    return Standing(str(metric), None if best is None else float(best), maximise, history[-1].get("num_updates"))


def _setting(state: State, group: str, name: str) -> Any:
    """An option of the training: under `cfg` since fairseq 0.10.2, before that under `args`."""
    settings = _plain(state.get("cfg")) or {}
    if isinstance(settings.get(group), dict) and name in settings[group]:
        return settings[group][name]
    return getattr(state.get("args"), name, None)


def average(paths: Sequence[Path], widen: bool = False) -> State:
    """The newest checkpoint (the last of `paths`) with every weight replaced by the mean over all, summed in fp64.

    Means have the weights' own precision; with `widen`, those of 16-bit weights are fp32, as fairseq's
    scripts/average_checkpoints.py has them. What is no floating-point number (fairseq's version marks) is the newest's;
    tensors that share their memory (tied embeddings) still do; the optimizer's state is left out. Raises ValueError if
    the models differ in their tensors.
    """
    sums: Dict[str, Any] = {}
    for path in paths:
        state = load(path)
        weights = state["model"]
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if sums and shapes != {name: tensor.shape for name, tensor in sums.items()}:
            raise ValueError(f"the checkpoints must be of one model, but {path} has other tensors than {paths[0]}")
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or name not in sums:
                sums[name] = tensor.to(torch.float64) if tensor.is_floating_point() else tensor
            else:
                sums[name] += tensor
    means: Dict[Tuple[Any, ...], Any] = {}  # the memory of the newest's tensor -> its mean
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        means.setdefault(key if tensor.numel() else (name,), _mean(sums[name], len(paths), tensor.dtype, widen))
        sums[name] = means[key if tensor.numel() else (name,)]
    return {**state, "model": sums, "last_optimizer_state": None, "averaged_from": [path.name for path in paths]}


def _mean(total: Any, count: int, dtype: Any, widen: bool) -> Any:
    if not total.is_floating_point():
        return total.clone()
    half = dtype in (torch.float16, torch.bfloat16)
    return (total / count).to(torch.float32 if widen and half else dtype)


def for_generation(state: State) -> State:
    """The checkpoint with its weights and configuration, and without what only training needs.

    Loaded by fairseq without --user-dir: the configuration is plain dicts, since torch ≥ 2.6 refuses argparse.Namespace
    to whom nobody has allowed it, and names cross_entropy, which is what codistill_ce computes in evaluation. The keys
    that fairseq's loader asks for stay, empty.
    """
    history = state.get("optimizer_history") or [{}]
    kept = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": history[-1].get("optimizer_name", "")}
    extra = state.get("extra_state") or {}
    cfg = _plain(state.get("cfg"))
    if isinstance(cfg, dict):
        _forget_plugin(cfg)
    return {
        **{name: value for name, value in state.items() if name not in ("optimizer", "best_loss")},
        "cfg": cfg,
        "criterion": None,
        "optimizer_history": [{**kept, "lr_scheduler_state": {}, "num_updates": history[-1].get("num_updates", 0)}],
        "last_optimizer_state": None,
        # The meters of training hold numpy's arrays, an EMA's weights are another model.
        "extra_state": {name: extra[name] for name in ("train_iterator", "val_loss", "best") if name in extra},
    }


def _forget_plugin(cfg: Dict[str, Any]) -> None:
    criterion, common = cfg.get("criterion"), cfg.get("common")
    if isinstance(criterion, dict) and criterion.get("_name") == _CRITERION:
        cfg["criterion"] = {"_name": "cross_entropy", "sentence_avg": criterion.get("sentence_avg", False)}
    if isinstance(common, dict) and Path(str(common.get("user_dir"))).name == Path(__file__).parent.name:
        common["user_dir"] = None


def _plain(value: Any) -> Any:
    """Namespaces and omegaconf's containers as dicts and lists."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value)
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def needs_plugin(path: Path, state: State) -> List[str]:
    """Why fairseq can load the file at `path`, saved from `state`, only with this plugin as --user-dir; [] if it need not."""
    task = _setting(state, "task", "_name") or _setting(state, "task", "task")
    reasons = [f"its task is {task}"] if task in _TASKS else []
    if compat.loads_safely():
        allowed = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            classes = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        finally:
            torch.serialization.add_safe_globals(allowed)
        reasons += [f"it holds a {name}" for name in classes]
    return reasons
