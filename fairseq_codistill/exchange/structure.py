"""What a model computes beyond the names and shapes of its tensors: heads, activations, where it normalises, strides.

Two models with equal tensors and another number of heads cannot teach each other, and nothing else would tell. The module
tree is asked, not the options: options differ for reasons that are irrelevant here (dropout, folders, seeds), and each
model has its own. Only attributes that are known to change the function are compared, and only where both sides have them,
so that another version of fairseq is no reason to refuse a teacher.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Optional

from .manifest import plain

_MOST = 1000  # facts; a model has some dozen, since those of a stack of layers are put together
_TELLING = {
    "num_heads", "num_attention_heads", "attention_heads", "n_heads", "nheads", "nhead", "n_head", "heads", "num_kv_heads",
    "activation_fn", "activation", "activation_function", "act_fn", "act", "nonlinearity", "negative_slope", "approximate",
    "normalize_before", "pre_norm", "norm_first", "layer_norm_first", "eps", "num_groups",
    "embed_scale", "scaling", "kernel_size", "stride", "padding", "padding_mode", "padding_l", "dilation", "groups",
    "bidirectional", "weight_softmax", "cross_self_attention", "max_relative_positions",
}  # fmt: skip
_CHILDREN = ("embed_positions",)  # sub-modules without weights whose presence tells


def structure(model: Any) -> Dict[str, str]:
    """Facts by place, such as `decoder.layers.*.self_attn.num_heads`: those of all layers of a stack are one."""
    found: Dict[str, List[str]] = {}
    for path, module in model.named_modules():
        place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)
        for name, value in _facts(module).items():
            found.setdefault(f"{place}.{name}".lstrip("."), []).append(value)
    together = {place: values[0] if len(set(values)) == 1 else ",".join(values) for place, values in found.items()}
    return {place: value[:200] for place, value in sorted(together.items())[:_MOST]}


def difference(own: Dict[str, str], theirs: Dict[str, str]) -> Optional[str]:
    """The first setting in which another model differs from this peer's, in words; None where nothing tells them apart."""
    for place in sorted(own.keys() & theirs.keys()):
        if own[place] != theirs[place]:
            return f"its {plain(place)} is {plain(theirs[place], 60)}, but this peer's is {plain(own[place], 60)}"
    return None


def _facts(module: Any) -> Dict[str, str]:
    values = {name: _text(value) for name, value in vars(module).items() if name in _TELLING}
    for name in _CHILDREN:
        if name in module._modules or name in vars(module):
            values[name] = type(module._modules.get(name)).__name__
    if type(module).__module__ == "torch.nn.modules.activation":
        values["class"] = type(module).__name__
    return {name: value for name, value in values.items() if value is not None}


def _text(value: Any) -> Optional[str]:
    """A plain setting as text; None for what is none. Six digits, since machines differ in the last bit of a root."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (bool, int, str)):
        return str(value)
    if isinstance(value, (list, tuple)):
        parts = [_text(part) for part in value]
        return None if None in parts else " ".join(map(str, parts))
    name = getattr(value, "__name__", None) if callable(value) else None
    return name if isinstance(name, str) else None
