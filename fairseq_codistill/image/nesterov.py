"""`--optimizer sgd_nesterov`: SGD as residual networks are trained with (Goyal et al. 2017, §5.1).

fairseq's `sgd` has no Nesterov momentum, and its `nag` keeps weight decay out of the momentum: 1e-4 there is about a tenth
of 1e-4 here. This is torch's SGD, with the choice of leaving the parameters of BatchNorm and the biases undecayed.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II


# fairseq reads the types of these fields at run time, so this module has no `from __future__ import annotations`.
@dataclass
class SgdNesterovConfig(FairseqDataclass):
    momentum: float = field(default=0.9, metadata={"help": "Nesterov momentum, above 0 and below 1"})
    weight_decay: float = field(default=0.0, metadata={"help": "L2 regularization, added to the gradient"})
    no_decay_norm_bias: bool = field(
        default=False, metadata={"help": "no weight decay on normalisation layers and biases (all that has one dimension)"}
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("sgd_nesterov", dataclass=SgdNesterovConfig)
class SgdNesterov(FairseqOptimizer):
    """torch.optim.SGD with nesterov=True in one group, or in two: what decays and what does not (`decays: False`)."""

    def __init__(self, cfg: SgdNesterovConfig, params: List[torch.nn.Parameter]) -> None:
        super().__init__(cfg)
        if not 0 < cfg.momentum < 1:
            raise ValueError(f"momentum must be above 0 and below 1, but is {cfg.momentum} instead.")
        self._optimizer = torch.optim.SGD(_groups(list(params), cfg), nesterov=True, **self.optimizer_config)

    @property
    def optimizer_config(self) -> Dict[str, Any]:
        return {"lr": self.cfg.lr[0], "momentum": self.cfg.momentum, "weight_decay": self.cfg.weight_decay}

    @property
    def supports_flat_params(self) -> bool:
        return not self.cfg.no_decay_norm_bias


def _groups(params: List[torch.nn.Parameter], cfg: SgdNesterovConfig) -> List[Dict[str, Any]]:
    if not cfg.no_decay_norm_bias:
        return [{"params": params}]
    matrices = [param for param in params if param.ndim > 1]
    if not matrices:
        raise ValueError(
            "no_decay_norm_bias must see the parameters' shapes, but --fp16 and --bf16 make one flat vector of them; "
            "did you forget --fp16-no-flatten-grads?"
        )
    others = [param for param in params if param.ndim <= 1]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.0, "decays": False}]
