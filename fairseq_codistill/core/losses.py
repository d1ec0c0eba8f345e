"""Distances between a model's own predictions and a peer's: the papers' equations, one value per position, no reduction.

Shapes: N positions (target tokens, or images), V classes. `own_NV` and `peer_NV` are logits; any scores that differ from
them by a constant in each row (such as log-probabilities) give the same value, except for `mse`.
Half-precision logits are widened to float32 first. No gradient ever reaches a peer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import guard
from .gate import Gate, log_prob


def mse(own_NV: Tensor, peer_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over V of (own − peer)², uncentred: the distance of Sodhani et al. (§3). The temperature is not used."""
    return (own_NV - peer_NV).pow(2).mean(-1)


def centered_mse(own_NV: Tensor, peer_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """`mse` after each row's mean is taken away (Sodhani et al., §3: "similar"): the variance over V of own − peer."""
    return (own_NV - peer_NV).var(-1, unbiased=False)


def ce(own_NV: Tensor, peer_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """−Σ softmax(peer/τ) · log softmax(own/τ) · τ²: cross entropy to soft targets (ψ of Anil et al., §2)."""
    return -(_probs(peer_NV, temperature) * _log_probs(own_NV, temperature)).sum(-1) * temperature**2


def kl(own_NV: Tensor, peer_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(peer ‖ own) · τ² = `ce` less the peer's entropy, so the same gradient; 0 where both agree."""
    return _kl(_log_probs(peer_NV, temperature), _log_probs(own_NV, temperature)) * temperature**2


def reverse_kl(own_NV: Tensor, peer_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(own ‖ peer) · τ²: the direction of Murai et al. 2020."""
    return _kl(_log_probs(own_NV, temperature), _log_probs(peer_NV, temperature)) * temperature**2


def js(own_NV: Tensor, peer_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen–Shannon divergence · τ²: half of each KL to the middle of both distributions; at most ln 2 · τ²."""
    log_own, log_peer = _log_probs(own_NV, temperature), _log_probs(peer_NV, temperature)
    log_middle = ((log_own.exp() + log_peer.exp()) / 2).clamp_min(torch.finfo(log_own.dtype).tiny).log()
    return (_kl(log_own, log_middle) + _kl(log_peer, log_middle)) / 2 * temperature**2


def uniform(own_NV: Tensor) -> Tensor:
    """Cross entropy to the uniform distribution: label smoothing as a "teacher" (Anil et al., Fig. 2a, control)."""
    return -_log_probs(_wide(own_NV), 1.0).mean(-1)


def unigram(own_NV: Tensor, frequencies_V: Tensor) -> Tensor:
    """Cross entropy to the classes' frequencies in the training data, which sum to 1 (Anil et al., Fig. 2a, control)."""
    return -(_log_probs(_wide(own_NV), 1.0) * frequencies_V).sum(-1)


@dataclass(frozen=True)
class Distance:
    """A row of the table of distances: the equation, what the mean of several peers' predictions is a mean of, and the
    default α of the first epoch."""

    function: Callable[[Tensor, Tensor, float], Tensor]
    mean_of: str  # "logits" or "probabilities"
    alpha: float
    bounded: bool  # whether no row can pull harder than a cross entropy; see `guard`
    centred: bool = True  # whether a constant added to a row's logits changes nothing


# The α of `ce` and `mse` were tuned on Multi30k (recipes/multi30k_en_de). `kl` has the gradient of `ce`; near agreement
# `reverse_kl` equals `kl`, and `js` a quarter of it, to second order; the squared distances differ by a row's mean alone.
DISTANCES: Dict[str, Distance] = {
    "mse": Distance(mse, "logits", 0.1, bounded=False, centred=False),
    "centered_mse": Distance(centered_mse, "logits", 0.1, bounded=False),
    "kl": Distance(kl, "probabilities", 0.3, bounded=True),
    "reverse_kl": Distance(reverse_kl, "probabilities", 0.3, bounded=False),
    "js": Distance(js, "probabilities", 1.2, bounded=True),
    "ce": Distance(ce, "probabilities", 0.3, bounded=True),
}
# The smoothing controls, each with its default α: 0.1/0.9, which is label smoothing of 0.1.
CONTROLS: Dict[str, float] = {"uniform": 1 / 9, "unigram": 1 / 9}


Dropped = Optional[List[Tensor]]  # to which each peer's dropped rows are appended, booleans [N]


def pairwise(
    name: str, own_NV: Tensor, peers: Iterable[Tensor], temperature: float = 1.0, dropped: Dropped = None,
    gate: Optional[Gate] = None,
) -> Tensor:  # fmt: skip
    """Mean over the peers of D(own, peer), for each position (Sodhani et al., Algorithm 1).

    `peers` yields logits [N, V] one after another, and each is dropped before the next is asked for: memory does not
    grow with their number. A peer's row that is `guard.unusable` teaches nothing: D is 0 there. `gate` weighs the rows.
    Returns [N], differentiable once in `own_NV`.
    """
    return _KnownGradient.apply(own_NV, *pairwise_gradient(name, own_NV, peers, temperature, dropped, gate))


def to_mean(
    name: str, own_NV: Tensor, peers: Iterable[Tensor], temperature: float = 1.0, dropped: Dropped = None,
    gate: Optional[Gate] = None,
) -> Tensor:  # fmt: skip
    """D(own, the peers' mean prediction), for each position (Anil et al., Algorithm 1). Shapes as `pairwise`.

    The mean is of logits for the squared distances and of probabilities (at τ) for the others. For `mse`, `ce` and `kl`
    its gradient equals that of `pairwise`. Where a peer's row is unusable the mean is of the others, and counts less.
    """
    return _KnownGradient.apply(own_NV, *to_mean_gradient(name, own_NV, peers, temperature, dropped, gate))


def pairwise_gradient(
    name: str, own_NV: Tensor, peers: Iterable[Tensor], temperature: float = 1.0, dropped: Dropped = None,
    gate: Optional[Gate] = None,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """What `pairwise` returns, [N], and its gradient in `own_NV`, [N, V]; neither can be differentiated further."""
    total: Optional[Tuple[Tensor, Tensor]] = None
    count = 0
    for peer_NV in peers:
        value_N, gradient_NV, bad_N = _value_and_gradient(name, own_NV, peer_NV, temperature, gate)
        total = (value_N, gradient_NV) if total is None else (total[0] + value_N, total[1].add_(gradient_NV))
        count += 1
        if dropped is not None:
            dropped.append(bad_N)
    assert total is not None, "a distance needs at least one peer"
    return total[0] / count, total[1].div_(count)


def to_mean_gradient(
    name: str, own_NV: Tensor, peers: Iterable[Tensor], temperature: float = 1.0, dropped: Dropped = None,
    gate: Optional[Gate] = None,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """As `pairwise_gradient`, of `to_mean`."""
    probabilities = DISTANCES[name].mean_of == "probabilities"
    mean_NV, usable, masks = None, guard.Usable(), []
    own_top_N = own_NV.detach().argmax(-1)
    for peer_NV in peers:
        behind_N = guard.behind(_wide(peer_NV), own_top_N)
        peer_NV = _probs(_wide(peer_NV), temperature) if probabilities else _wide(peer_NV).clone()
        masks.append(unfit(name, own_NV, peer_NV, behind_N, temperature))
        usable.add(masks[-1])
        guard.zeroed(masks[-1], peer_NV)
        mean_NV = peer_NV if mean_NV is None else mean_NV.add_(peer_NV)
        del peer_NV  # before the next one is made
    assert mean_NV is not None, "a distance needs at least one peer"
    usable.mean(mean_NV)
    if probabilities:  # back to logits, whose softmax at τ is the mean distribution
        mean_NV = mean_NV.clamp_min_(torch.finfo(mean_NV.dtype).tiny).log_().mul_(temperature)
    value_N, gradient_NV, bad_N = _value_and_gradient(name, own_NV, mean_NV, temperature, gate)
    if dropped is not None:
        dropped.extend(mask | bad_N for mask in masks)
    if gate is not None:
        usable.weigh(gate.weights[-1])
    return usable.weigh(value_N), usable.weigh(gradient_NV)


def unfit(name: str, own_NV: Tensor, peer_NV: Tensor, behind_N: Tensor, temperature: float) -> Tensor:
    """The rows of a peer that must not go into a mean, booleans [N]. `peer_NV`: what the mean is taken of; `behind_N`: its
    `guard.behind`."""
    if DISTANCES[name].mean_of == "probabilities":
        bad_N = ~peer_NV[:, 0].isfinite()  # a softmax is finite everywhere in a row, or nowhere
        return bad_N | guard.too_sure(behind_N, temperature) if DISTANCES[name].bounded else bad_N
    return guard.squared_unfit(_wide(own_NV.detach()), peer_NV, DISTANCES[name].centred)


AGGREGATES = {"pairwise": pairwise, "mean": to_mean}
AGGREGATE_GRADIENTS = {"pairwise": pairwise_gradient, "mean": to_mean_gradient}


def _value_and_gradient(
    name: str, own_NV: Tensor, peer_NV: Tensor, temperature: float, gate: Optional[Gate] = None
) -> Tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """D [N] and ∂D/∂own [N, V]: taken at once, so that no graph of [N, V] tensors waits for the model's backward.

    Both are 0 in the rows that were dropped, the third: booleans [N].
    """
    with torch.enable_grad():
        leaf_NV = _wide(own_NV.detach()).requires_grad_()
        value_N = DISTANCES[name].function(leaf_NV, _wide(peer_NV.detach()), temperature)
        (gradient_NV,) = torch.autograd.grad(value_N.sum(), leaf_NV)
    value_N, own_NV, peer_NV = value_N.detach(), leaf_NV.detach(), _wide(peer_NV.detach())
    bad_N = _unusable(DISTANCES[name], value_N, gradient_NV, own_NV, peer_NV, temperature)
    value_N, gradient_NV = value_N.masked_fill_(bad_N, 0), gradient_NV.masked_fill_(bad_N.unsqueeze(-1), 0)
    if gate is not None:
        at = temperature if DISTANCES[name].mean_of == "probabilities" else 1.0
        weight_N = gate.weigh(log_prob(own_NV, gate.target_N, at), log_prob(peer_NV, gate.target_N, at), bad_N)
        value_N, gradient_NV = value_N.mul_(weight_N), gradient_NV.mul_(weight_N.unsqueeze(-1))
    return value_N, gradient_NV, bad_N


def _unusable(
    kind: Distance, value_N: Tensor, gradient_NV: Tensor, own_NV: Tensor, peer_NV: Tensor, temperature: float
) -> Tensor:  # fmt: skip
    if kind.bounded:
        return ~value_N.isfinite() | guard.too_sure(guard.behind(peer_NV, own_NV.argmax(-1)), temperature)
    if kind.mean_of == "logits":
        return guard.squared_unusable(value_N, own_NV, kind.centred)
    pull_N = torch.linalg.vecdot(gradient_NV, gradient_NV)
    apart = lambda: guard.size(own_NV - peer_NV, kind.centred)  # noqa: E731
    return guard.unusable(value_N, pull_N, apart, own_NV, kind.centred, temperature)


class _KnownGradient(torch.autograd.Function):
    """Passes `value_N` on; its gradient in `own_NV` is the row's `gradient_NV`, which was computed beforehand."""

    @staticmethod
    def forward(ctx, own_NV: Tensor, value_N: Tensor, gradient_NV: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = own_NV.dtype
        return value_N.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):
        (gradient_NV,) = ctx.saved_tensors
        # In float32 until the loss scale of fp16 training is multiplied in: the bare gradient would underflow.
        return (gradient_NV * grad_N.unsqueeze(-1)).to(ctx.dtype), None, None


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _probs(logits: Tensor, temperature: float) -> Tensor:
    return F.softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)


def _kl(log_probs: Tensor, log_probs_other: Tensor) -> Tensor:
    """Σ p · (log p − log q), where a class of probability 0 adds 0, to the value and to the gradient."""
    probs = log_probs.exp()
    return (probs * torch.where(probs > 0, log_probs - log_probs_other, torch.zeros_like(probs))).sum(-1)
