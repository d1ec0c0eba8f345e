"""The float32 copies that fairseq's fp16 optimizers step on: whoever changes a weight must change them, too."""

from __future__ import annotations

from typing import Any, Dict

from torch import Tensor


def masters_of(optimizer: Any) -> Dict[int, Tensor]:
    """Of each parameter, by its id, the float32 copy that `optimizer` steps on, as a view.

    Empty for optimizers without copies: fp32, --amp, and --memory-efficient-fp16, which widens its weights in each step.
    """
    wide, narrow = getattr(optimizer, "fp32_params", None), getattr(optimizer, "fp16_params", None)
    if wide is None or narrow is None:
        return {}
    if isinstance(wide, (list, tuple)):  # --bf16, --fp16-no-flatten-grads
        return {id(parameter): copy.data for parameter, copy in zip(narrow, wide)}
    # All parameters of a device in one flat tensor, in their order.
    flat = {None: wide} if not isinstance(wide, dict) else wide
    views: Dict[int, Tensor] = {}
    offsets = dict.fromkeys(flat, 0)
    for parameter in narrow:
        place = next(iter(flat)) if len(flat) == 1 else parameter.device.index
        end = offsets[place] + parameter.numel()
        views[id(parameter)] = flat[place].data[offsets[place] : end].view_as(parameter)
        offsets[place] = end
    return views
