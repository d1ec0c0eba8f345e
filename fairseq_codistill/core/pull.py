"""`--codistill-pull`: weights are averaged, beside the teaching or instead of it.

At an exchange a peer moves a part λ of the way to the mean of all weights, its own and its teachers':

    w ← w + λ · (mean(p, p₁, …, pₖ) − p)

p is what it published of its own weights, and p₁ … pₖ what it read of its k teachers: all of them as they travelled, so that
the rounding on the way (bf16, say) cancels where peers agree, and what w has learnt since it was published is kept. A teacher
whose snapshot does not come counts as p: it pulls nowhere, and each snapshot pulls once. So in lockstep, with all peers as
teachers and fp32 on the way, λ = 1 is local SGD: all peers go on from the same average, equal to the bit.

Only what is trained is pulled: parameters, and not running statistics, of which a stale difference might make no sense.
"""

from __future__ import annotations

import logging
from typing import Callable, Dict, List, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..exchange.snapshot import Weights, as_sent, tensors_of
from . import group

logger = logging.getLogger(__name__)

# Two networks that began differently are about 1.4 of their norm apart. What is much farther away has diverged.
_FARTHEST = 4.0
# Of each parameter (by id) the wide copy that the optimizer steps on, where it has one: fp16 training.
Masters = Callable[[], Dict[int, Tensor]]


class Pull:
    """`strength`: λ; `wire`: as of `Codistiller`. Every rank of a group has one; rank 0 alone is given weights."""

    def __init__(self, strength: float, peer: int, teachers: List[int], wire: Optional[torch.dtype], masters: Masters) -> None:
        self.strength, self.masters, self._wire = strength, masters, wire
        self._peer, self._all = peer, sorted([peer, *teachers])
        self._sent: Weights = {}

    def note(self, model: nn.Module) -> None:
        """Keep what is published of `model` now: the p of the pulls until the next exchange."""
        self._sent = {name: as_sent(parameter.data, self._wire) for name, parameter in parameters_of(model).items()}

    def to(self, model: nn.Module, update: int, found: Dict[int, Weights]) -> None:
        """Pull `model` towards `found`: rank 0's snapshots of teachers. Raises nothing for what a peer may have sent."""
        found, masters = self._sound(found, update), self.masters()
        if not group.share(bool(found)):
            return
        for name, parameter in parameters_of(model).items():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            target_and_sent = torch.empty(2, *parameter.shape, dtype=wide, device=parameter.device)
            if group.leads():
                self._target(name, found, *target_and_sent)
            broadcast(target_and_sent)
            _move(parameter, masters.get(id(parameter)), *target_and_sent)

    def _target(self, name: str, found: Dict[int, Weights], target: Tensor, sent: Tensor) -> None:
        sent.copy_(self._sent[name])
        mean = torch.zeros_like(sent)
        for peer in self._all:  # in one order for all peers, so that they get the same mean to the bit
            mean += found[peer][name].to(sent.device, sent.dtype) if peer in found else sent
        torch.lerp(sent, mean.div_(len(self._all)), self.strength, out=target)

    def _sound(self, found: Dict[int, Weights], update: int) -> Dict[int, Weights]:
        """`found` without what has diverged; says how far away each is."""
        sound = {}
        for peer, weights in sorted(found.items()) if group.leads() else ():
            apart = self._distance(weights)
            if not apart <= _FARTHEST:
                logger.warning(
                    f"codistillation: peer {peer}: its weights are {apart:.3g} times the norm of this peer's away, as those "
                    "of a training that has diverged; they pull nowhere. Training goes on."
                )
                continue
            sound[peer] = weights
            logger.info(f"codistillation: at update {update} pulled towards peer {peer}, {apart:.4f} of this peer's norm away")
        return sound

    def _distance(self, weights: Weights) -> float:
        """‖p_j − p‖ / ‖p‖, over all parameters."""
        apart, norm = 0.0, 0.0
        for name, sent in self._sent.items():
            own = sent.float()
            apart += torch.linalg.vector_norm(weights[name].to(own) - own).item() ** 2
            norm += torch.linalg.vector_norm(own).item() ** 2
        return (apart / norm) ** 0.5 if norm else 0.0


def parameters_of(model: nn.Module) -> Dict[str, nn.Parameter]:
    """The trained parameters, by the names of `tensors_of`: tied ones once."""
    trained = {(p.data_ptr(), p.shape, p.stride()): p for p in model.parameters() if p.requires_grad and p.numel()}
    places = {name: (t.data_ptr(), t.shape, t.stride()) for name, t in tensors_of(model).items()}
    return {name: trained[place] for name, place in places.items() if place in trained}


def _move(parameter: nn.Parameter, master: Optional[Tensor], target: Tensor, sent: Tensor) -> None:
    """w ← target + (w − sent), where w is the optimizer's own copy, if there is one. So if w is `sent`, it is `target`."""
    own = parameter.data if master is None else master
    value = target.add_(own.to(target.dtype).sub(sent))
    own.copy_(value)
    if master is not None:
        parameter.data.copy_(value)


def broadcast(tensor: Tensor) -> None:
    """Rank 0's value, on every rank of a group."""
    if group.is_grouped():
        dist.broadcast(tensor, src=0)
