"""What a model's output is, found by trying each model once: logits or not, and from which layer.

fairseq's models do not say it. `Probe` remembers the answers, so that a training step only looks them up.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional
from weakref import WeakKeyDictionary, WeakSet

import torch
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from . import teachers
from .core.output_layer import first, output_layer
from .core.teaching import Teaching


class Probe:
    """`fuses`: whether the distance has a fused form, so that output layers are worth looking for."""

    def __init__(self, fuses: bool) -> None:
        self.layers: WeakKeyDictionary = WeakKeyDictionary()  # of each model its output layer, or None
        self._fuses = fuses
        self._fit: WeakSet = WeakSet()  # frozen teachers that were tried on a batch
        self._gives_logits: Optional[bool] = None

    def try_out(self, model, sample: Dict[str, Any], teaching: Teaching, fuses: bool = True) -> None:
        """Try what is new of the models on this batch. Raises ValueError for an offline teacher that does not fit."""
        for peer in teaching.peers:
            if hasattr(peer, "codistill_name") and peer not in self._fit:
                teachers.check_fit(peer, teaching.cast(peer, sample["net_input"]), sample["target"])
                self._fit.add(peer)
        for one in (model, *teaching.peers) if fuses and self._fuses and _plain_targets(model) else ():
            if one not in self.layers:
                net_input = teaching.cast(one, sample["net_input"])
                self.layers[one] = output_layer(one, net_input, lambda *output, one=one: _are_logits(one, *output))

    def output_layers(self, model, teaching: Teaching) -> Optional[List[nn.Linear]]:
        """The output layers of the model and of its peers, if each has one that may be fused with the loss."""
        layers = [self.layers.get(one) for one in (model, *teaching.peers)]
        found = [layer for layer in layers if layer is not None]
        return found if len(found) == len(layers) else None

    def scores(self, model, net_output) -> Tensor:
        """A model's logits as [N, V], or its log-probabilities where its output is no logits (adaptive softmax, copying)."""
        logits = first(net_output)
        logits = logits.get("encoder_out") if isinstance(logits, dict) else logits
        if self._gives_logits is None:
            self._gives_logits = _are_logits(model, net_output, logits)
        if not self._gives_logits:
            logits = model.get_normalized_probs(net_output, log_probs=True)
        return logits.reshape(-1, logits.size(-1))


def _plain_targets(model) -> bool:
    """Whether the model's targets are the sample's, whatever the model gives out."""
    get_targets = getattr(model, "get_targets", None)
    return getattr(get_targets, "__func__", None) is BaseFairseqModel.get_targets


def _are_logits(model, net_output, logits: Any) -> bool:
    """Whether the softmax of the model's first output is what the model calls its probabilities. Asked once."""
    lprobs = model.get_normalized_probs(net_output, log_probs=True).detach()
    if not torch.is_tensor(logits) or logits.numel() != lprobs.numel():
        return False
    row = logits.detach().reshape(-1, lprobs.size(-1))[0].float()
    return torch.allclose(row.log_softmax(-1), lprobs.reshape(-1, lprobs.size(-1))[0].float(), atol=1e-2, rtol=1e-2)
