"""Ties a codistiller to the fairseq task that the criterion was built with, by wrapping methods of that instance.

fairseq tells only its task the update number, the epoch and the unwrapped model; so stock tasks need no subclass, and
`--criterion codistill_ce` alone is enough. The sample is the only channel to the criterion.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from .core.codistiller import Codistiller
from .core.teaching import Teaching
from .ending import drain_on_sigterm, watch
from .exchange.run import Run
from .facts import model_facts
from .wrapping import TRAIN_STEP, Argument, wrap

TEACHING = "codistill"  # the sample's key


def attach(
    task: Any, codistiller: Codistiller, run: Run, train_subset: str, load_frozen: Callable[[], Sequence],
    trains: Callable[[], bool] = lambda: True,
) -> None:  # fmt: skip
    """From now on `task` asks `codistiller` in each training step. `load_frozen` gives the offline teachers, when needed.

    The exchange is joined when the training data is about to be loaded and it `trains`: fairseq-validate may load it, too. It
    is ended as soon as the training is over.
    """

    def load_dataset(load, *args, **kwargs):
        if split_of.of(args, kwargs) == train_subset and not joined and trains():
            joined.append(drain_on_sigterm(codistiller.drain))
            codistiller.join(run)
            codistiller.load_frozen(load_frozen)
        return load(*args, **kwargs)

    def begin_epoch(begin, *args, **kwargs):
        model = model_of.of(args, kwargs)
        codistiller.model_config = model_facts(model)
        codistiller.begin_epoch(epoch_of.of(args, kwargs), model)
        return begin(*args, **kwargs)

    def train_step(step, *args, **kwargs):
        losses.clear()
        update = update_of.of(args, kwargs)
        if update is None:
            raise ValueError("codistill_ce needs a fairseq whose trainer passes update_num to task.train_step; this is older.")
        sample = _with(sample_of.of(args, kwargs), codistiller.teaching(int(update)))
        args, kwargs = sample_of.replaced(sample, args, kwargs)
        raised.append(update)
        result = step(*args, **kwargs)
        raised.clear()
        return result

    def valid_step(step, *args, **kwargs):
        raised.append("valid")
        result = step(*args, **kwargs)
        raised.clear()
        with contextlib.suppress(Exception):  # decoration of the manifest
            losses.append((float(result[0]), float(result[1])))
            codistiller.valid_loss = _mean_in_bits(losses)
        return result

    def state_dict(state, *args, **kwargs):
        codistiller.checkpointed()
        return state(*args, **kwargs)

    def end(completed: bool) -> None:
        codistiller.end(completed)
        for give_back in joined:
            give_back()

    joined: List[Callable[[], None]] = []
    raised: List[Any] = []  # not empty while, and after, a step has raised; an out-of-memory may be recovered from
    losses: List[Tuple[float, float]] = []
    split_of = Argument(task.load_dataset, "split", ("split",))
    epoch_of, model_of = (Argument(task.begin_epoch, name, ("epoch", "model")) for name in ("epoch", "model"))
    sample_of, update_of = (Argument(task.train_step, name, TRAIN_STEP) for name in ("sample", "update_num"))
    for wrapper in (load_dataset, begin_epoch, train_step, valid_step, state_dict):
        wrap(task, wrapper.__name__, wrapper)
    watch(task, end, lambda: not raised and codistiller.may_be_complete)


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
    """None for what is not finite: readers would refuse the manifest, and with it good weights."""
    size = sum(size for _, size in losses)
    mean = sum(loss for loss, _ in losses) / size / math.log(2) if size else math.nan
    return mean if math.isfinite(mean) and abs(mean) < 1e300 else None
