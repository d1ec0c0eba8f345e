"""A peer's model in this process: a frozen copy of the trained one, to be filled with the peer's weights."""

from __future__ import annotations

import copy
from typing import Any, Dict, Optional, Tuple

import torch
from torch import nn

from .int8 import quantise


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


def freeze(
    model: nn.Module, device: Optional[torch.device], dtype: Optional[torch.dtype], otherwise: Optional[torch.dtype] = None
) -> nn.Module:
    """`model` itself, made ready to teach: never trained, in evaluation, as fast as it goes without gradients.

    Without `dtype` its floats become `otherwise`; with int8 its matrices become 8 bits, which compute in `otherwise`. Where
    that is None too they stay as they are. To be called again, it changes nothing.
    """
    model.to(device=device, dtype=otherwise if dtype in (None, torch.int8) else dtype)
    if dtype == torch.int8:
        quantise(model)
    for module in model.modules():
        # fairseq's first layers get a transposed batch. Where no gradient is asked for, torch would copy each of its
        # linear layers' weights for every time step instead of copying the batch once.
        if hasattr(module, "self_attn") and _contiguous not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_contiguous)
    return model.eval().requires_grad_(False)


def _contiguous(module: nn.Module, inputs: Tuple[Any, ...]) -> Tuple[Any, ...]:
    return tuple(value.contiguous() if index == 0 and torch.is_tensor(value) else value for index, value in enumerate(inputs))
