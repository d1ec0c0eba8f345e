"""Output layer, cross entropy and distance in one pass over chunks of positions: no [positions × V] tensor ever exists.

Value and gradient are computed together, forwards, so that a chunk's logits can be dropped before the next chunk's are
made: mine, each peer's, then ∂loss/∂logits, which goes straight into ∂loss/∂features and ∂loss/∂weight. Peers take turns
inside a chunk: memory does not grow with their number. `losses` says slowly what this computes, and is what it is tested
against.

Shapes: N positions without padding, C features, V classes; n positions in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import guard
from .losses import AGGREGATE_GRADIENTS, DISTANCES, unfit
from .output_layer import compute_dtype

# Logits in a chunk: on a CPU what its caches hold, on a GPU enough to keep it busy; and no fewer positions than this.
_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 25}
_FEWEST = 64
# fp16 cannot hold gradients below 6e-8 and the loss scale comes only afterwards, so a small one is built in.
_FP16_SCALE = 16.0


class Peer(NamedTuple):
    """What one peer says of the N positions: its features [N, C'], and its output layer, [n, C'] to logits [n, V].

    The logits may be overwritten.
    """

    features_NC: Tensor
    project: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Σ (cross entropy + α·D): the options that decide D (see `losses`), and α."""

    distance: str
    aggregate: str = "pairwise"
    temperature: float = 1.0
    alpha: float = 1.0


class Sums(NamedTuple):
    """Sums over the N positions. Only `loss` can be differentiated: in features, weight and bias."""

    loss: Tensor
    nll: Tensor
    distance: Tensor
    agreement: Tensor  # positions at which a peer's top class is mine, mean over the peers
    dropped: Tensor  # of each peer, the positions at which it may not teach (see `guard`)


def fused(
    features_NC: Tensor, weight_VC: Tensor, bias_V: Optional[Tensor], target_N: Tensor, peers: Sequence[Peer] = (),
    objective: Optional[Objective] = None, chunk: Optional[int] = None,
) -> Sums:  # fmt: skip
    """What cross entropy and `losses` give for the logits `features @ weight.T + bias`, summed over positions.

    Without peers it is cross entropy alone, and needs no `objective`.
    `chunk`: positions at a time, unless the device decides. Half-precision logits are widened to float32 first; the
    gradient of the weight is summed up in float32.
    """
    return Sums(*_Fused.apply(features_NC, weight_VC, bias_V, target_N, peers, objective, chunk))


def agrees(peer_NV: Tensor, own_top_N: Tensor) -> Tensor:
    """Whether no class has a higher score with the peer than my top class: booleans [N]."""
    return peer_NV.gather(-1, own_top_N.unsqueeze(-1)).squeeze(-1) >= peer_NV.amax(-1)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features_NC, weight_VC, bias_V, target_N, peers, objective, chunk):
        dtype = compute_dtype(weight_VC)
        with torch.autocast(weight_VC.device.type, enabled=False):
            run = _Run(
                weight_VC.to(dtype), None if bias_V is None else bias_V.to(dtype), objective, ctx.needs_input_grad, len(peers)
            )
            size = chunk or max(_FEWEST, _CHUNK.get(weight_VC.device.type, _CHUNK["cuda"]) // weight_VC.size(0))
            for start in range(0, features_NC.size(0), size):
                part = slice(start, start + size)
                logits = ((peer.project, peer.features_NC[part]) for peer in peers)
                run.chunk(features_NC[part].to(dtype), target_N[part], logits)
        sums, gradients = run.results(features_NC)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (features_NC.dtype, weight_VC.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *unused):
        # The saved gradients stay wide until the loss scale of fp16 training is multiplied in.
        scaled = [None if g is None else (g * grad).to(d) for g, d in zip(ctx.saved_tensors, ctx.dtypes)]
        return (*scaled, None, None, None, None)


class _Run:
    """One pass: sums and gradients so far. `weight_VC` in the dtype of the matrix products."""

    def __init__(
        self, weight_VC: Tensor, bias_V: Optional[Tensor], objective: Optional[Objective], needed: Sequence[bool], peers: int
    ) -> None:  # fmt: skip
        self.weight_VC, self.bias_V, self.objective = weight_VC, bias_V, objective
        self.alpha, self.peers = objective.alpha if peers else 0.0, peers
        self.dtype = weight_VC.dtype
        self.wide = torch.float32 if self.dtype in (torch.float16, torch.bfloat16) else self.dtype
        self.scale = _FP16_SCALE if self.dtype == torch.float16 else 1.0
        self.nll, self.distance, self.agreement = (weight_VC.new_zeros((), dtype=self.wide) for _ in range(3))
        self.dropped = weight_VC.new_zeros(peers, dtype=torch.long)
        self.to_features: List[Tensor] = []
        self.to_weight_VC = torch.zeros_like(weight_VC, dtype=self.wide) if needed[1] else None
        self.to_bias_V = torch.zeros_like(bias_V, dtype=self.wide) if needed[2] else None

    def chunk(self, features_nC: Tensor, target_n: Tensor, peers) -> None:
        own = _Own(F.linear(features_nC, self.weight_VC, self.bias_V).to(self.wide))
        self.nll += (own.log_total_n - own.logits_nV.gather(-1, target_n.unsqueeze(-1)).squeeze(-1)).sum()
        # ∂/∂logits of cross entropy is softmax − one at the target; the buffer of the softmax takes all of it.
        total_nV = own.probs_nV
        if self.peers:
            gradient_nV = self._compare(own, peers)
            total_nV.add_(gradient_nV, alpha=self.alpha)
        total_nV.scatter_add_(-1, target_n.unsqueeze(-1), total_nV.new_full((len(target_n), 1), -1.0))
        self._push(total_nV, features_nC)

    def _compare(self, own: _Own, peers) -> Tensor:
        """∂D/∂logits [n, V]; D itself, agreement and dropped rows are added to the sums."""
        agreement: List[Tensor] = []
        dropped: List[Tensor] = []
        behind: List[Tensor] = []

        def logits():
            for project, peer_features in peers:
                peer_nV = project(peer_features).to(self.wide)
                behind.append(guard.behind(peer_nV, own.top_n))
                agreement.append((behind[-1] <= 0).sum())
                yield peer_nV
                del peer_nV  # before the next one is made

        value_n, gradient_nV = _distance(self.objective, own, logits(), behind, dropped)
        self.distance += value_n.sum()
        self.agreement += sum(agreement) / len(agreement)
        self.dropped += torch.stack([bad_n.sum() for bad_n in dropped])
        return gradient_nV

    def _push(self, total_nV: Tensor, features_nC: Tensor) -> None:
        """From the gradient in the logits to those in features, weight and bias."""
        if self.to_bias_V is not None:
            self.to_bias_V += total_nV.sum(0)
        total_nV = total_nV.mul_(self.scale).to(self.dtype) if self.dtype != self.wide else total_nV
        self.to_features.append((total_nV @ self.weight_VC).to(self.wide))
        if self.to_weight_VC is None:
            return
        if self.dtype == self.wide:
            self.to_weight_VC.addmm_(total_nV.T, features_nC)
        else:
            self.to_weight_VC += total_nV.T @ features_nC

    def results(self, features_NC: Tensor):
        """The `Sums`, and the gradients of the loss in features, weight and bias."""
        to_features = torch.cat(self.to_features) if self.to_features else torch.zeros_like(features_NC, dtype=self.wide)
        if self.scale != 1.0:
            to_features.div_(self.scale)
            if self.to_weight_VC is not None:
                self.to_weight_VC.div_(self.scale)
        loss = self.nll + self.alpha * self.distance
        gradients = (to_features, self.to_weight_VC, self.to_bias_V)
        return (loss, self.nll, self.distance, self.agreement, self.dropped), gradients


class _Own:
    """My logits of a chunk, with what several parts need of them."""

    def __init__(self, logits_nV: Tensor) -> None:
        self.logits_nV = logits_nV
        highest = logits_nV.max(-1)
        self.top_n = highest.indices
        self._highest_n = highest.values
        self.probs_nV = logits_nV.softmax(-1)
        self.log_total_n = self._log_total(self._highest_n, self.probs_nV)
        self._at = {1.0: (self.probs_nV, self.log_total_n)}

    def at(self, temperature: float) -> Tuple[Tensor, Tensor]:
        """softmax(logits/τ) [n, V] and log Σ exp(logits/τ) [n]."""
        if temperature not in self._at:
            probs_nV = (self.logits_nV / temperature).softmax(-1)
            self._at[temperature] = probs_nV, self._log_total(self._highest_n / temperature, probs_nV)
        return self._at[temperature]

    def _log_total(self, highest_n: Tensor, probs_nV: Tensor) -> Tensor:
        # From the largest class, whose probability is at least 1/V, so that nothing underflows.
        return highest_n - probs_nV.gather(-1, self.top_n.unsqueeze(-1)).squeeze(-1).log()


def _distance(
    objective: Objective, own: _Own, peers, behind: List[Tensor], dropped: List[Tensor]
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """D [n] and ∂D/∂logits [n, V], for the logits that `peers` yields one after another, each with its `guard.behind` at the
    end of `behind`. `dropped`: see `losses`."""
    name, temperature = objective.distance, objective.temperature
    if name not in _CLOSED:
        return AGGREGATE_GRADIENTS[objective.aggregate](name, own.logits_nV, peers, temperature, dropped)
    prepare, compare = _CLOSED[name]
    teachers = map(lambda peer_nV: prepare(peer_nV, temperature), peers)
    factor = temperature if DISTANCES[name].mean_of == "probabilities" else 2 / own.logits_nV.size(-1)
    if objective.aggregate == "mean":
        return _to_mean(name, own, teachers, temperature, factor, behind, dropped)
    total: Optional[Tuple[Tensor, Tensor]] = None
    for teacher_nV in teachers:
        *both, bad_n = _usable(name, own, *compare(own, teacher_nV, temperature), behind[-1], temperature)
        dropped.append(bad_n)
        total = _plus(total, both)
        del teacher_nV, both
    count = len(dropped)
    return total[0] / count, total[1].mul_(factor / count)


def _plus(total: Optional[Tuple[Tensor, Tensor]], more: Sequence[Tensor]) -> Tuple[Tensor, Tensor]:
    return (more[0], more[1]) if total is None else (total[0] + more[0], total[1].add_(more[1]))


def _usable(
    name: str, own: _Own, value_n: Tensor, gradient_nV: Tensor, behind_n: Optional[Tensor] = None, temperature: float = 1.0
) -> Tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """D and its gradient, 0 in the rows that were dropped; and which these are."""
    if DISTANCES[name].bounded:
        bad_n = ~value_n.isfinite()
        bad_n = bad_n if behind_n is None else bad_n | guard.too_sure(behind_n, temperature)
    else:
        bad_n = guard.squared_unusable(value_n, own.logits_nV, DISTANCES[name].centred)
    return guard.zeroed(bad_n, value_n), guard.zeroed(bad_n, gradient_nV), bad_n


def _to_mean(
    name: str, own: _Own, teachers, temperature: float, factor: float, behind: List[Tensor], dropped: List[Tensor]
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    """As `_distance`, to the mean of the peers' rows that are usable."""
    mean_nV, usable = None, guard.Usable()
    for teacher_nV in teachers:
        dropped.append(unfit(name, own.logits_nV, teacher_nV, behind[-1], temperature))
        usable.add(dropped[-1])
        guard.zeroed(dropped[-1], teacher_nV)
        mean_nV = teacher_nV if mean_nV is None else mean_nV.add_(teacher_nV)
        del teacher_nV
    compare = _CLOSED[name][1]
    value_n, gradient_nV, bad_n = _usable(name, own, *compare(own, usable.mean(mean_nV), temperature))
    dropped[:] = [mask_n | bad_n for mask_n in dropped]
    return usable.weigh(value_n), usable.weigh(gradient_nV.mul_(factor))


# For each distance with a closed form: a peer's logits made comparable, whose mean may be taken; then D, and ∂D/∂logits
# less a constant factor. Both may overwrite what the peer gave.


def _as_they_are(peer_nV: Tensor, temperature: float) -> Tensor:
    return peer_nV


def _probs(peer_nV: Tensor, temperature: float) -> Tensor:
    return (peer_nV if temperature == 1.0 else peer_nV.div_(temperature)).softmax(-1)


def _mse(own: _Own, peer_nV: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    difference_nV = torch.sub(own.logits_nV, peer_nV, out=peer_nV)
    return _dot(difference_nV, difference_nV) / difference_nV.size(-1), difference_nV


def _centered_mse(own: _Own, peer_nV: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    difference_nV = torch.sub(own.logits_nV, peer_nV, out=peer_nV)
    difference_nV.sub_(difference_nV.mean(-1, keepdim=True))
    return _dot(difference_nV, difference_nV) / difference_nV.size(-1), difference_nV


def _ce(own: _Own, peer_nV: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    probs_nV, log_total_n = own.at(temperature)
    value_n = log_total_n - _dot(peer_nV, own.logits_nV) / temperature
    return value_n * temperature**2, torch.sub(probs_nV, peer_nV, out=peer_nV)


def _kl(own: _Own, peer_nV: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    entropy_n = torch.special.entr(peer_nV).sum(-1)
    value_n, gradient_nV = _ce(own, peer_nV, temperature)
    return value_n - entropy_n * temperature**2, gradient_nV


_CLOSED = {
    "mse": (_as_they_are, _mse),
    "centered_mse": (_as_they_are, _centered_mse),
    "ce": (_probs, _ce),
    "kl": (_probs, _kl),
}


def _dot(left_nV: Tensor, right_nV: Tensor) -> Tensor:
    return torch.linalg.vecdot(left_nV, right_nV)
