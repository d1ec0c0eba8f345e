"""Which peers teach in an update, and how strongly. Neither files nor ranks are known here.

A training sample carries a `Teaching` from the trainer to the loss. `Teachers` makes it: from α's schedule, and from the
models that are held: stale copies of the peers with the update that each is of, or frozen offline teachers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .schedules import AlphaSchedule


@dataclass(frozen=True)
class Teaching:
    """What a training sample carries to the criterion: α, and the peers to learn from, each frozen and in eval mode.

    Peers run only when their outputs are asked for, one after another; the criterion decides what it keeps of each.
    """

    alpha: float
    peers: Sequence[nn.Module] = ()
    staleness: float = 0.0  # updates, mean over the peers
    names: Sequence[str] = ()  # of the peers, for messages

    def outputs(self, net_input: Dict[str, Any]) -> Iterator[Tuple[nn.Module, Any]]:
        """Each peer with what it predicts for `net_input`; no gradient is recorded."""
        for peer in self.peers:
            with torch.no_grad():
                output = peer(**self.cast(peer, net_input))
            yield peer, output

    @staticmethod
    def cast(peer: nn.Module, net_input: Dict[str, Any]) -> Dict[str, Any]:
        """The input with its floats (images, speech) in the peer's precision."""
        dtype = next((p.dtype for p in peer.parameters() if p.is_floating_point()), None)
        return {name: _cast(value, dtype) for name, value in net_input.items()}

    def of(self, part: str) -> Teaching:
        """The same teaching by the sub-models `peer.models[part]`: one language pair of a multilingual model."""
        return Teaching(self.alpha, [_part_of(peer, part) for peer in self.peers], self.staleness, self.names)


@dataclass
class Held:
    """A peer's stale copy: the model, and how many updates it had been trained for."""

    model: nn.Module
    update: int


@dataclass
class Teachers:
    """`every`: distil on every k-th update only; `max_staleness`: updates after which a copy no longer teaches;
    `needs_peers`: False for the smoothing controls, which need no peer; `frozen`: offline teachers, instead of peers."""

    schedule: AlphaSchedule
    every: int = 1
    max_staleness: Optional[int] = None
    needs_peers: bool = True
    frozen: Sequence[nn.Module] = ()
    held: Dict[int, Held] = field(default_factory=dict)  # by peer
    begin: Optional[int] = 0  # update before which nobody teaches; None: not yet known

    def at(self, epoch: int, update: int) -> Optional[Teaching]:
        """Who teaches in update 0, 1, … of epoch 1, 2, …; None where α is 0, no peer can, or `every` skips the update."""
        alpha = self.schedule.at(epoch, update, self.begin)
        if alpha == 0 or update % self.every:
            return None
        if not self.needs_peers:
            return Teaching(alpha)
        if self.frozen:
            return Teaching(alpha, self.frozen, names=[getattr(model, "codistill_name", "a teacher") for model in self.frozen])
        fresh = {peer: held for peer, held in self.held.items() if self._is_fresh(held, update)}
        if not fresh:
            return None
        ages = [update - held.update for held in fresh.values()]
        models = [held.model for held in fresh.values()]
        return Teaching(alpha, models, sum(ages) / len(ages), [f"peer {peer}" for peer in fresh])

    def updates(self) -> Dict[int, int]:
        """The update held of each peer."""
        return {peer: held.update for peer, held in self.held.items()}

    def _is_fresh(self, held: Held, update: int) -> bool:
        return self.max_staleness is None or update - held.update <= self.max_staleness


def _part_of(peer: Any, part: str) -> nn.Module:
    return peer.models[part]


def _cast(value: Any, dtype: Optional[torch.dtype]) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() and dtype else value
