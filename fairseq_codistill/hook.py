"""Ties a codistiller to the fairseq task that the criterion was built with, by wrapping methods of that instance.

fairseq tells only its task the update number, the epoch and the unwrapped model; so stock tasks need no subclass, and
`--criterion codistill_ce` alone is enough. The sample is the only channel to the criterion.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from multiprocessing import util
from typing import Any, Callable, Dict, Optional, Sequence

from .codistiller import Codistiller, Teaching
from .exchange import Run
from .schedules import weight_decay_at

TEACHING = "codistill"  # the sample's key
_SIGTERM_SECONDS = 10.0  # schedulers kill half a minute after SIGTERM


def attach(
    task: Any, codistiller: Codistiller, run: Run, train_subset: str, load_frozen: Callable[[], Sequence],
    trains: Callable[[], bool] = lambda: True,
) -> None:  # fmt: skip
    """From now on `task` asks `codistiller` in each training step. `load_frozen` gives the offline teachers, when needed.

    The exchange is joined when the training data is about to be loaded and it `trains`: fairseq-validate may load it, too.
    """

    def load_dataset(load, split, *args, **kwargs):
        if split == train_subset and not joined and trains():
            joined.append(split)
            codistiller.join(run)
            _drain_on_sigterm(codistiller)
            codistiller.frozen = load_frozen()
        return load(split, *args, **kwargs)

    def begin_epoch(begin, epoch, model):
        codistiller.model_config = model_facts(model)
        codistiller.begin_epoch(epoch, model)
        return begin(epoch, model)

    def train_step(step, sample, *args, update_num, **kwargs):
        losses.clear()
        try:
            return step(_with(sample, codistiller.teaching(update_num)), *args, update_num=update_num, **kwargs)
        except BaseException:
            failed.append(update_num)
            raise

    def valid_step(step, *args, **kwargs):
        loss, sample_size, logging_output = step(*args, **kwargs)
        losses.append((float(loss), float(sample_size)))
        codistiller.valid_loss = _mean_in_bits(losses)
        return loss, sample_size, logging_output

    def state_dict(state):
        codistiller.checkpointed()
        return state()

    def end() -> None:
        codistiller.end(completed=not failed and getattr(sys, "last_value", None) is None)

    joined, failed, losses = [], [], []
    for wrapper in (load_dataset, begin_epoch, train_step, valid_step, state_dict):
        _wrap(task, wrapper.__name__, wrapper)
    # fairseq calls nothing when training ends, and ranks that torch spawns run no atexit; this runs in both.
    util.Finalize(None, end, exitpriority=10)


def _drain_on_sigterm(codistiller: Codistiller) -> None:
    """A scheduler's SIGTERM ends the process as it would have, once what is being published is published."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return  # somebody else's handler has the last word
    process = os.getpid()

    def on_sigterm(number: int, frame: Any) -> None:
        if os.getpid() == process:  # and not a data-loading child, which inherits this
            codistiller.drain(_SIGTERM_SECONDS)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, on_sigterm)


def model_facts(model: Any) -> Dict[str, Any]:
    """For the manifest, so that a person or a later version can tell what the weights belong to: class and settings."""
    settings = getattr(model, "cfg", None) or getattr(model, "args", None) or {}
    items = settings.items() if hasattr(settings, "items") else vars(settings).items()
    plain = {str(name): value for name, value in items if isinstance(value, (bool, int, float, str))}
    return {"class": type(model).__name__, **plain}


def order_data(task: Any, data: str, peer: int, peers: int, train_subset: str) -> None:
    """`same`: all peers' training batches in one order, whatever their seeds; `disjoint`: each its own fixed part."""

    def get_batch_iterator(get, dataset, *args, **kwargs):
        if dataset is task.datasets.get(train_subset):
            if data == "same":
                kwargs["seed"] = 1
            elif not hasattr(dataset, "_codistill_whole"):
                dataset._codistill_whole = whole = dataset.ordered_indices
                dataset.ordered_indices = lambda: (lambda all_: all_[all_ % peers == peer])(whole())
        return get(dataset, *args, **kwargs)

    _wrap(task, "get_batch_iterator", get_batch_iterator)


def schedule_weight_decay(task: Any, milestones: Sequence[float], values: Sequence[float]) -> None:
    """Set the optimizer's weight decay as a function of the epoch; groups without any (biases, say) are left alone."""
    now: Dict[str, int] = {"epoch": 1}

    def begin_epoch(begin, epoch, model):
        now["epoch"] = epoch
        return begin(epoch, model)

    def train_step(step, *args, optimizer, **kwargs):
        groups = optimizer.param_groups
        for group in groups:
            if len(groups) == 1 or group.get("weight_decay"):
                group["weight_decay"] = weight_decay_at(now["epoch"], milestones, values)
        return step(*args, optimizer=optimizer, **kwargs)

    _wrap(task, "begin_epoch", begin_epoch)
    _wrap(task, "train_step", train_step)


def _wrap(task: Any, name: str, wrapper: Callable) -> None:
    inner = getattr(task, name)
    setattr(task, name, lambda *args, **kwargs: wrapper(inner, *args, **kwargs))


def _with(sample: Dict[str, Any], teaching: Optional[Teaching]) -> Dict[str, Any]:
    """A shallow copy of the sample that carries the teaching; the sample itself may be used again (a dummy batch)."""
    if teaching is None or not sample:
        return sample
    if "net_input" in sample:
        return {**sample, TEACHING: teaching}
    return {part: _with_part(value, teaching, part) for part, value in sample.items()}


def _with_part(value: Any, teaching: Teaching, part: str) -> Any:
    """Multilingual tasks make a dict of samples, one for each sub-model."""
    if isinstance(value, dict) and "net_input" in value:
        return {**value, TEACHING: teaching.of(part)}
    return value


def _mean_in_bits(losses: Sequence) -> Optional[float]:
    size = sum(size for _, size in losses)
    return sum(loss for loss, _ in losses) / size / math.log(2) if size else None
