"""A peer's matrices in 8 bits: whole numbers and a scale for each row, made into floats again whenever they are used.

For memory, not for speed: a matrix product still computes in the model's precision, after its weight was made whole.
"""

from __future__ import annotations

from typing import Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class RowsIn8Bits(nn.Module):
    """A weight [R, …] as int8 [R, …] and scales [R, 1, …]: torch's parametrization, so `module.weight` is a float as ever."""

    def forward(self, whole: Tensor, scale: Tensor) -> Tensor:
        return whole.to(scale.dtype).mul_(scale)

    def right_inverse(self, weight: Tensor) -> Tuple[Tensor, Tensor]:
        largest = weight.abs().flatten(1).amax(1).view(-1, *[1] * (weight.dim() - 1))
        # In the weight's own dtype, and numbers by the rounded scale, so that the rounding of the scale costs nothing.
        scale = largest / 127
        scale.masked_fill_(scale == 0, 1)
        return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


def quantise(model: nn.Module) -> nn.Module:
    """`model` itself, frozen, with every matrix in 8 bits; tied ones stay tied, torch's LSTMs (which look inside) whole."""
    model.requires_grad_(False)
    found = [
        (module, name, weight)
        for module in model.modules()
        if not isinstance(module, (nn.RNNBase, parametrize.ParametrizationList))
        for name, weight in module._parameters.items()
        if weight is not None and weight.dim() > 1 and weight.is_floating_point()
    ]
    done: Dict[int, parametrize.ParametrizationList] = {}
    for module, name, weight in found:
        parametrize.register_parametrization(module, name, RowsIn8Bits(), unsafe=True)
        own = _parametrization(module, name)
        first = done.setdefault(id(weight), own)
        own.original0, own.original1 = first.original0, first.original1
    return model


def load(model: nn.Module, weights: Dict[str, Tensor]) -> None:
    """Copy `weights` into a model that has the same tensors by name, some of them, perhaps, in 8 bits."""
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            if name in state:
                state[name].copy_(tensor)
                continue
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            scale = _parametrization(module, leaf).original1
            assert isinstance(scale, Tensor)
            setattr(module, leaf, tensor.to(scale.device, scale.dtype))


def _parametrization(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    found = module.get_submodule(f"parametrizations.{name}")
    assert isinstance(found, parametrize.ParametrizationList)
    return found
