"""--codistill-publish-ema: the weights that fairseq averages for --store-ema go out, and the peers learn from them.

fairseq's trainer hands its averaged model to a task that says `uses_ema`.
"""

from __future__ import annotations

from typing import Any

from .core.codistiller import Codistiller
from .wrapping import wrap

_ARGUMENT = "ema_model"


def publish_ema(task: Any, codistiller: Codistiller) -> None:
    """From the first training step on `codistiller` publishes the averaged weights, as they are before each update.

    They are in the model's own precision, also where fairseq keeps a copy in float32 (--ema-fp32). Raises ValueError in the
    first step where fairseq does not hand them over.
    """
    has_use = bool(getattr(task, "uses_ema", False))

    def train_step(step, *args, **kwargs):
        codistiller.published = kwargs.get(_ARGUMENT, codistiller.published)  # a NaN's re-run may come without
        if codistiller.published is None:
            raise ValueError(
                "codistill_publish_ema needs a fairseq whose trainer gives ema_model to task.train_step, but this one does "
                "not; is it older than 0.12?"
            )
        return step(*args, **_without(kwargs))

    def valid_step(step, *args, **kwargs):
        return step(*args, **_without(kwargs))

    def _without(kwargs):
        return kwargs if has_use else {name: value for name, value in kwargs.items() if name != _ARGUMENT}

    task.uses_ema = True
    wrap(task, "train_step", train_step)
    wrap(task, "valid_step", valid_step)
