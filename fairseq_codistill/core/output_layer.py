"""The module that makes a model's logits: found by running the model, and replaced for the length of one forward.

fairseq's models differ in where it is (`decoder.output_projection`, `fc_out`, `fc3`, `fc`). What counts is what it does:
its output is the model's output, unaltered, and it is asked once. Then the model's forward with another function in its
place gives that function's result, with all that surrounds a forward (data-parallel wrappers, autocast) as ever.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def first(net_output: Any) -> Any:
    """A model's first output: the logits."""
    return net_output[0] if isinstance(net_output, (tuple, list)) else net_output


def output_layer(model: nn.Module, net_input: Dict[str, Any], is_output: Callable[[Any, Tensor], bool]) -> Optional[nn.Linear]:
    """The `nn.Linear` whose output is the model's; None if there is no such.

    Runs the model once, on the first of the batch, in evaluation: nothing of it changes, nor do random numbers. Without
    autocast, which would keep the weights that it casts here, without a gradient, for the training forward that follows.
    `is_output(net_output, logits)` may veto, such as when these are no logits.
    """
    calls: List = []
    candidates = [module for module in model.modules() if _projects(module)]
    handles = [module.register_forward_hook(lambda module, _, out: calls.append((module, out))) for module in candidates]
    try:
        with _evaluating(model), torch.no_grad(), _without_autocast(model):
            net_output = model(**first_of_batch(net_input))
            logits = first(net_output)
            layers = [module for module, out in calls if out is logits]
            asked_once = len(layers) == 1 and sum(module is layers[0] for module, _ in calls) == 1
            return layers[0] if asked_once and is_output(net_output, logits) else None
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(layer: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Meanwhile `layer` does what `function` does; its hooks (weight_norm's, say) run as ever."""
    assert "forward" not in vars(layer), "the layer is replaced already"
    layer.forward = function
    try:
        yield
    finally:
        del layer.forward


def projection(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """What a peer's output layer does to its features [n, C], as autocast would have it here and now.

    Its weight is taken once for all chunks: in 8 bits it is made anew whenever it is asked for. Features are cast, since
    autocast makes them in other dtypes than the weight's: fp16 or bf16, and fp32 behind a layer norm.
    """
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    dtype = compute_dtype(weight)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return lambda features: F.linear(features.to(dtype), weight, bias)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a linear layer with this weight computes in, here and now: autocast's dtype under --amp."""
    device = weight.device.type
    dtype: Callable[[str], torch.dtype]
    if hasattr(torch, "get_autocast_dtype"):
        active, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype
    elif weight.is_cuda:  # torch before 2.4
        active, dtype = torch.is_autocast_enabled(), lambda device: torch.get_autocast_gpu_dtype()
    else:
        active, dtype = torch.is_autocast_cpu_enabled(), lambda device: torch.get_autocast_cpu_dtype()
    return dtype(device) if active and weight.dtype != torch.float64 else weight.dtype


def _projects(module: nn.Module) -> bool:
    """Whether it is a matrix product and nothing else; with the weight in 8 bits, too."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    # Each module's own flag: models overwrite train() and eval(), and some parts of a model may be frozen.
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        for module, _ in modes:
            module.training = False
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _without_autocast(model: nn.Module) -> torch.autocast:
    device = next((p.device.type for p in model.parameters()), "cpu")
    return torch.autocast(device, enabled=False)


def first_of_batch(net_input: Dict[str, Any]) -> Dict[str, Any]:
    """One sentence or image, where all tensors have a batch in front; else all of them."""
    sizes = {value.size(0) if value.dim() else 0 for value in net_input.values() if torch.is_tensor(value)}
    if len(sizes) != 1:
        return net_input
    return {name: value[:1] if torch.is_tensor(value) else value for name, value in net_input.items()}
