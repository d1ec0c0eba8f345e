"""A peer's model in my process: a frozen copy of mine, to be filled with the peer's weights."""

from __future__ import annotations

import copy
from typing import Any, Dict, Optional

import torch
from torch import nn


def replica(model: nn.Module, dtype: Optional[torch.dtype]) -> nn.Module:
    """A frozen copy of `model` to hold a peer's weights. It draws no random numbers, so training is not disturbed."""
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for value in list(vars(module).values()):
            # Derived tensors (weight_norm's `weight`) refuse to be copied; they are computed anew in each forward.
            if torch.is_tensor(value) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)  # without its gradient
    return freeze(copy.deepcopy(model, memo), None, dtype)


def freeze(model: nn.Module, device: Optional[torch.device], dtype: Optional[torch.dtype]) -> nn.Module:
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)
