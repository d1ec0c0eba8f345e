"""Weights for the positions of D, by what the peer and the own model give the target ("gold") class there.

    soft:  w = min(1, p_peer(target) / p_own(target))
    hard:  w = 1 where p_peer(target) > p_own(target), else 0

No gradient goes through w. The probabilities are at the temperature τ of `kl`, `reverse_kl`, `js` and `ce`, and at 1 for the
squared distances. Each peer has its own weights where the distances are averaged (`pairwise`); where the predictions are
(`mean`), p_peer is the mean prediction.

Shapes: N positions, V classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional

import torch
from torch import Tensor

GATES = ("none", "soft", "hard")


@dataclass
class Gate:
    """The kind, `soft` or `hard`, the targets [N], and the weights given so far: [N] for each peer, or for their mean."""

    kind: str
    target_N: Tensor
    weights: List[Tensor] = field(default_factory=list)

    def weigh(self, own_N: Tensor, peer_N: Tensor, bad_N: Tensor) -> Tensor:
        """The weights [N], from log-probabilities of the target; 0 in the rows that were dropped (`bad_N`)."""
        difference_N = peer_N - own_N
        weight_N = (difference_N > 0).to(own_N.dtype) if self.kind == "hard" else difference_N.clamp_max(0).exp()
        self.weights.append(weight_N.masked_fill(bad_N, 0))  # among them those that are no numbers
        return self.weights[-1]

    def mean(self) -> Tensor:
        """The mean weight of each position over the peers, [N]."""
        return torch.stack(self.weights).mean(0)


def gate_of(kind: str, target_N: Tensor) -> Optional[Gate]:
    """The gate for these targets; None for `none`."""
    return None if kind == "none" else Gate(kind, target_N)


def at_target(scores_NV: Tensor, target_N: Tensor) -> Tensor:
    """scores[i, target[i]], as [N]."""
    return scores_NV.gather(-1, target_N.unsqueeze(-1)).squeeze(-1)


def log_prob(logits_NV: Tensor, target_N: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits/τ) at the target, [N]."""
    return at_target(logits_NV, target_N) / temperature - torch.logsumexp(logits_NV / temperature, -1)
