"""`codistill_ce`: cross entropy + α·D, for whatever logits a fairseq task gives.

    loss = Σ over positions of (cross entropy + α · D), divided by the same `sample_size` as `cross_entropy`

A position is a target token or an image; padding adds nothing. A sample that carries no teaching (validation, α = 0,
no teacher) gets plain cross entropy: there is no mode flag.
"""

from __future__ import annotations

import contextlib
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from torch import Tensor, nn

from . import build, config, hook, metrics
from .core.fused import Objective, Peer, Sums, agrees, fused
from .core.guard import Warner
from .core.losses import AGGREGATES, CONTROLS, uniform, unigram
from .core.output_layer import first, projection, replaced
from .core.teaching import Teaching
from .probe import Probe


@register_criterion("codistill_ce", dataclass=config.CodistillConfig)
class CodistillCriterion(CrossEntropyCriterion):
    """Cross entropy, and in training the distance to the peers' predictions where the sample carries a `Teaching`."""

    def __init__(self, task: Any, cfg: config.CodistillConfig) -> None:
        super().__init__(task, cfg.sentence_avg)
        cfg = config.read_environment(cfg)
        config.check(cfg)
        cfg = config.fill_defaults(cfg)
        self.distance_name = str(cfg.codistill_loss)
        self.aggregate = str(cfg.codistill_aggregate)
        self.temperature = cfg.codistill_temperature
        self._frequencies: Optional[Tensor] = None
        self._probe = Probe(fuses=self.distance_name not in CONTROLS)
        self._warner = Warner()
        if self.distance_name == "unigram" and task.target_dictionary is None:
            raise ValueError("codistill_loss unigram needs a target dictionary, but this task has none; use uniform.")
        build.attach(task, cfg, lambda: self.training)

    def forward(self, model, sample, reduce: bool = True):
        """The loss, its sample size, and what to log, as `cross_entropy` gives them."""
        teaching = sample.get(hook.TEACHING)
        layers = None
        if teaching is not None:
            self._probe.try_out(model, sample, teaching, fuses=reduce)
            layers = self._probe.output_layers(model, teaching) if reduce else None
        if layers is not None:
            loss, nll_loss, log = self._fused(model, sample, teaching, layers)
        else:
            loss, nll_loss, log = self._whole(model, sample, teaching, reduce)
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        return loss, sample_size, {
            "loss": loss.data,
            "nll_loss": nll_loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            **log,
        }  # fmt: skip

    def _whole(self, model, sample, teaching: Optional[Teaching], reduce: bool):
        """Loss, its cross entropy, and what to log of the teaching: for any model, from all its logits at once."""
        net_output = model(**sample["net_input"])
        nll_loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        if teaching is None:
            return nll_loss, nll_loss, {}
        distance, log = self.distance(model, net_output, sample, teaching)
        return nll_loss + teaching.alpha * (distance.sum() if reduce else distance), nll_loss, log

    def _fused(self, model, sample, teaching: Teaching, layers: Sequence[nn.Linear]):
        """As `_whole`, without ever holding all logits. `layers`: the output layers, of this model and then of each peer."""
        target_N = sample["target"].reshape(-1)
        kept = (target_N != self.padding_idx).nonzero().squeeze(-1)
        peers = self._peers_features(teaching, sample["net_input"], layers[1:], kept)
        objective = Objective(self.distance_name, self.aggregate, self.temperature, teaching.alpha)
        sums: List[Sums] = []

        def loss_of(features: Tensor) -> Tensor:
            kept_features = features.reshape(-1, features.size(-1)).index_select(0, kept)
            sums.append(fused(kept_features, layers[0].weight, layers[0].bias, target_N[kept], peers, objective))
            return sums[0].loss

        # Inside the model's forward, so that data-parallel wrappers see every parameter used there.
        with replaced(layers[0], loss_of):
            loss = first(model(**sample["net_input"]))
        positions = torch.tensor(kept.numel(), device=kept.device)
        return loss, sums[0].nll, self._log(teaching, sums[0].distance, positions, sums[0].agreement, sums[0].dropped)

    def _peers_features(self, teaching: Teaching, net_input, layers: Sequence[nn.Linear], kept: Tensor) -> List[Peer]:
        """What goes into each peer's output layer, at the kept positions, and that layer."""
        peers = []
        with contextlib.ExitStack() as stack:
            for layer in layers:
                stack.enter_context(replaced(layer, lambda features: features))
            for layer, (_, output) in zip(layers, teaching.outputs(net_input)):
                features = first(output)
                kept_features = features.reshape(-1, features.size(-1)).index_select(0, kept)
                peers.append(Peer(kept_features, projection(layer)))
        return peers

    def distance(self, model, net_output, sample, teaching: Teaching) -> Tuple[Tensor, Dict[str, Any]]:
        """D at each position, 0 at padding: [N]; and the sums to log."""
        kept_N = model.get_targets(sample, net_output).reshape(-1) != self.padding_idx
        own_NV = self._probe.scores(model, net_output)
        agreement: List[Tensor] = []
        dropped: List[Tensor] = []
        if self.distance_name in CONTROLS:
            distance_N = self._smoothing(own_NV)
        else:
            predictions = self._peers_scores(teaching, sample["net_input"], own_NV, kept_N, agreement)
            distance_N = AGGREGATES[self.aggregate](self.distance_name, own_NV, predictions, self.temperature, dropped)
        distance_N = distance_N.masked_fill(~kept_N, 0)
        positions = kept_N.sum()
        if not agreement:
            return distance_N, self._log(teaching, distance_N.sum().data, positions)
        counts = torch.stack([(bad_N & kept_N).sum() for bad_N in dropped])
        shared = torch.stack(agreement).sum() / len(agreement)
        return distance_N, self._log(teaching, distance_N.sum().data, positions, shared, counts)

    def _log(
        self, teaching: Teaching, distance: Tensor, positions: Tensor, agreement: Optional[Tensor] = None,
        dropped: Optional[Tensor] = None,
    ) -> Dict[str, Any]:  # fmt: skip
        """What `reduce_metrics` adds up. `dropped`: of each peer, the positions at which it may not teach."""
        log: Dict[str, Any] = {
            "codistill_loss": distance,
            "codistill_weighted": teaching.alpha * distance,
            "codistill_positions": positions,
            "codistill_alpha": teaching.alpha * positions,
        }
        if agreement is not None and dropped is not None:
            log["codistill_staleness"] = teaching.staleness * positions
            log["codistill_agreement"] = agreement
            log["codistill_dropped"] = dropped.sum() / len(dropped)
            self._warner.note(teaching.names or [f"teacher {i}" for i in range(len(dropped))], dropped, positions)
        return log

    def _peers_scores(self, teaching: Teaching, net_input, own_NV: Tensor, kept_N: Tensor, agreement: List[Tensor]):
        """Each peer's scores [N, V], one after another; counts on the way where its top-1 is this model's."""
        own_top_N = own_NV.argmax(-1)
        for peer, output in teaching.outputs(net_input):
            peer_NV = self._probe.scores(peer, output)
            agreement.append((agrees(peer_NV, own_top_N) & kept_N).sum())
            yield peer_NV

    def _smoothing(self, own_NV: Tensor) -> Tensor:
        if self.distance_name == "uniform":
            return uniform(own_NV)
        if self._frequencies is None:
            self._frequencies = _frequencies(self.task.target_dictionary).to(own_NV.device)
        return unigram(own_NV, self._frequencies)

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """See `metrics`."""
        metrics.reduce_metrics(logging_outputs)


def _frequencies(dictionary) -> Tensor:
    counts = torch.tensor(dictionary.count, dtype=torch.float)
    return counts / counts.sum()
