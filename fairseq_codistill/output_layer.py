"""The module that makes a model's logits: found by running the model, and replaced for the length of one forward.

fairseq's models differ in where it is (`decoder.output_projection`, `fc_out`, `fc3`, `fc`). What counts is what it does:
its output is the model's output, unaltered, and it is asked once. Then the model's forward with another function in its
place gives that function's result, with all that surrounds a forward (data-parallel wrappers, autocast) as ever.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn


def first(net_output: Any) -> Any:
    """A model's first output: the logits."""
    return net_output[0] if isinstance(net_output, (tuple, list)) else net_output


def output_layer(model: nn.Module, net_input: Dict[str, Any], is_output: Callable[[Any, Tensor], bool]) -> Optional[nn.Linear]:
    """The `nn.Linear` whose output is the model's; None if there is no such.

    Runs the model once, on the first of the batch, in evaluation: nothing of it changes, nor do random numbers.
    `is_output(net_output, logits)` has a last word, such as whether these are logits.
    """
    calls: List = []
    candidates = [module for module in model.modules() if _projects(module)]
    handles = [module.register_forward_hook(lambda module, _, out: calls.append((module, out))) for module in candidates]
    try:
        with _evaluating(model), torch.no_grad():
            net_output = model(**_first_of_batch(net_input))
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


def _first_of_batch(net_input: Dict[str, Any]) -> Dict[str, Any]:
    """One sentence or image, where all tensors have a batch in front; else all of them."""
    sizes = {value.size(0) if value.dim() else 0 for value in net_input.values() if torch.is_tensor(value)}
    if len(sizes) != 1:
        return net_input
    return {name: value[:1] if torch.is_tensor(value) else value for name, value in net_input.items()}
