"""What --codistill-data and --codistill-weight-decays do to a task: the order of its data, its optimizer's weight decay."""

from __future__ import annotations

import logging
from typing import Any, Dict, Optional, Sequence

from .core.schedules import weight_decay_at
from .core.weight_decay import set_weight_decay
from .wrapping import TRAIN_STEP, Argument, wrap

logger = logging.getLogger(__name__)

_BATCHES = (
    "dataset", "max_tokens", "max_sentences", "max_positions", "ignore_invalid_inputs", "required_batch_size_multiple",
    "seed", "num_shards", "shard_id", "num_workers", "epoch",
)  # fmt: skip


def order_data(task: Any, data: str, peer: int, peers: int, train_subset: str, seed: Optional[int] = None) -> None:
    """`same`: all peers' training batches in one order, whatever their seeds; `disjoint`: each its own fixed part.

    `seed`: this peer's --seed. What fairseq adds to it (--update-ordered-indices-seed adds the epoch) is kept."""

    def get_batch_iterator(get, *args, **kwargs):
        dataset = dataset_of.of(args, kwargs)
        if dataset is not None and dataset is task.datasets.get(train_subset):
            if data == "same":
                given = seed_of.of(args, kwargs)
                more = given - seed if None not in (given, seed) else 0
                args, kwargs = seed_of.replaced(1 + more, args, kwargs)
            elif not isinstance(vars(dataset).get("ordered_indices"), _Part):
                dataset.ordered_indices = _Part(dataset, peer, peers)
        return get(*args, **kwargs)

    dataset_of, seed_of = (Argument(task.get_batch_iterator, name, _BATCHES) for name in ("dataset", "seed"))
    wrap(task, "get_batch_iterator", get_batch_iterator)


class _Part:
    """A data set's `ordered_indices` for one of `peers`. Of a module, so that it is pickled with its data set."""

    def __init__(self, dataset: Any, peer: int, peers: int) -> None:
        self._dataset, self._peer, self._peers = dataset, peer, peers
        self._own = vars(dataset).get("ordered_indices")  # one that somebody else has put there

    def __call__(self) -> Any:
        of_class = getattr(type(self._dataset), "ordered_indices", None)
        if self._own is not None:
            whole = self._own()
        elif of_class is not None:
            whole = of_class(self._dataset)
        else:
            whole = self._dataset.__getattr__("ordered_indices")()  # a data set that passes on what it does not have
        return whole[whole % self._peers == self._peer]


def schedule_weight_decay(task: Any, milestones: Sequence[float], values: Sequence[float]) -> None:
    """Set the optimizer's weight decay as a function of the epoch; groups that began without any (biases, say) keep none."""
    now: Dict[str, Any] = {"epoch": 1, "warned": False}

    def begin_epoch(begin, *args, **kwargs):
        now["epoch"] = epoch_of.of(args, kwargs, now["epoch"])
        return begin(*args, **kwargs)

    def train_step(step, *args, **kwargs):
        optimizer = optimizer_of.of(args, kwargs)
        changes = optimizer is None or set_weight_decay(
            optimizer.param_groups, weight_decay_at(now["epoch"], milestones, values)
        )
        if not changes and not now["warned"]:
            now["warned"] = True
            logger.warning(
                "codistillation: --codistill-weight-decays changes nothing: no group of the optimizer's parameters has a "
                "weight decay; did you forget --weight-decay, which says who has one?"
            )
        return step(*args, **kwargs)

    epoch_of = Argument(task.begin_epoch, "epoch", ("epoch", "model"))
    optimizer_of = Argument(task.train_step, "optimizer", TRAIN_STEP)
    wrap(task, "begin_epoch", begin_epoch)
    wrap(task, "train_step", train_step)
