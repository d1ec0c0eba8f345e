"""`codistill_ce`: cross entropy + α·D, for whatever logits a fairseq task gives.

    loss = Σ over positions of (cross entropy + α · D), divided by the same `sample_size` as `cross_entropy`

A position is a target token or an image; padding adds nothing. A sample that carries no teaching (validation, α = 0,
no teacher) gets plain cross entropy: there is no mode flag. Only --codistill-label-smoothing and --codistill-rdrop tell
training from validation.
"""

from __future__ import annotations

import contextlib
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch import Tensor, nn

from . import build, config, hook, metrics
from .core.fused import Objective, Peer, Sums, agrees, fused
from .core.gate import gate_of
from .core.guard import Warner
from .core.losses import AGGREGATES, CONTROLS, uniform, unigram
from .core.output_layer import first, projection, replaced
from .core.rdrop import doubled, folded, passes_first, symmetric_kl
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
        self.gate = str(cfg.codistill_gate)
        self.label_smoothing = cfg.codistill_label_smoothing
        self.rdrop = cfg.codistill_rdrop
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
        log: Dict[str, Any] = {}
        seen = self._seen(sample)
        net_output = model(**seen["net_input"])
        loss, nll_loss = self._cross_entropy(model, net_output, seen, reduce)
        if self._rdrop_now:
            order = passes_first(sample["target"])
            loss, nll_loss = (x / 2 if reduce else folded(x.index_select(0, order)) for x in (loss, nll_loss))
            apart_N = self._apart(model, net_output, sample, order)
            loss, log = loss + self._rdrop_now * (apart_N.sum() if reduce else apart_N), {"codistill_rdrop": apart_N.sum().data}
        if teaching is None:
            return loss, nll_loss, log
        distance, more = self.distance(model, net_output, sample, teaching)
        return loss + teaching.alpha * (distance.sum() if reduce else distance), nll_loss, {**log, **more}

    def _seen(self, sample):
        """What the model is run on: with R-Drop each row of the batch twice."""
        if not self._rdrop_now:
            return sample
        net_input = doubled(sample["net_input"], sample["target"].size(0))
        return {**sample, "net_input": net_input, "target": sample["target"].repeat_interleave(2, 0)}

    def _apart(self, model, net_output, sample, order: Tensor) -> Tensor:
        """The symmetric KL between both passes, [N]; 0 at padding."""
        lprobs = model.get_normalized_probs(net_output, log_probs=True)
        apart_N = symmetric_kl(lprobs.reshape(-1, lprobs.size(-1)).index_select(0, order))
        return apart_N.masked_fill(sample["target"].reshape(-1) == self.padding_idx, 0)

    def _cross_entropy(self, model, net_output, sample, reduce: bool) -> Tuple[Tensor, Tensor]:
        """The cross entropy to train on, and the NLL: the same unless labels are smoothed."""
        if not self._smoothing_now:
            nll_loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
            return nll_loss, nll_loss
        lprobs = model.get_normalized_probs(net_output, log_probs=True)
        lprobs, target = lprobs.view(-1, lprobs.size(-1)), model.get_targets(sample, net_output).view(-1)
        loss, nll_loss = label_smoothed_nll_loss(lprobs, target, self._smoothing_now, self.padding_idx, reduce)
        return (loss, nll_loss) if reduce else (loss.squeeze(-1), nll_loss.squeeze(-1))

    @property
    def _smoothing_now(self) -> float:
        return self.label_smoothing if self.training else 0.0

    @property
    def _rdrop_now(self) -> float:
        return self.rdrop if self.training else 0.0

    def _fused(self, model, sample, teaching: Teaching, layers: Sequence[nn.Linear]):
        """As `_whole`, without ever holding all logits. `layers`: the output layers, of this model and then of each peer."""
        target_N = sample["target"].reshape(-1)
        kept = (target_N != self.padding_idx).nonzero().squeeze(-1)
        peers = self._peers_features(teaching, sample["net_input"], layers[1:], kept)
        own_rows = passes_first(sample["target"]).view(2, -1)[:, kept].reshape(-1) if self._rdrop_now else kept
        objective = Objective(
            self.distance_name, self.aggregate, self.temperature, teaching.alpha, self.gate, self._smoothing_now,
            self._rdrop_now,
        )  # fmt: skip
        sums: List[Sums] = []

        def loss_of(features: Tensor) -> Tensor:
            kept_features = features.reshape(-1, features.size(-1)).index_select(0, own_rows)
            sums.append(fused(kept_features, layers[0].weight, layers[0].bias, target_N[kept], peers, objective))
            return sums[0].loss

        # Inside the model's forward, so that data-parallel wrappers see every parameter used there.
        with replaced(layers[0], loss_of):
            loss = first(model(**self._seen(sample)["net_input"]))
        positions = torch.tensor(kept.numel(), device=kept.device)
        gate = None if self.gate == "none" else sums[0].gate
        log = self._log(teaching, sums[0].distance, positions, sums[0].agreement, sums[0].dropped, gate)
        return loss, sums[0].nll, {**log, "codistill_rdrop": sums[0].rdrop} if self._rdrop_now else log

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
        target_N, own_NV = model.get_targets(sample, net_output).reshape(-1), self._probe.scores(model, net_output)
        if self._rdrop_now:
            target_N, own_NV = target_N.repeat(2), own_NV.index_select(0, passes_first(sample["target"]))
        kept_N, gate = target_N != self.padding_idx, gate_of(self.gate, target_N.clamp_min(0))
        agreement: List[Tensor] = []
        dropped: List[Tensor] = []
        if self.distance_name in CONTROLS:
            distance_N = self._smoothing(own_NV)
        else:
            predictions = self._peers_scores(teaching, sample["net_input"], own_NV, kept_N, agreement)
            distance_N = AGGREGATES[self.aggregate](
                self.distance_name, own_NV, predictions, self.temperature, dropped, gate
            )  # fmt: skip
        distance_N = distance_N.masked_fill(~kept_N, 0)
        positions = kept_N.sum()
        sums: List[Tensor] = []
        if agreement:
            sums = [torch.stack(agreement).sum() / len(agreement), torch.stack([(bad_N & kept_N).sum() for bad_N in dropped])]
        if agreement and gate is not None:
            sums.append(gate.mean().masked_fill(~kept_N, 0).sum())
        if self._rdrop_now:  # means over both passes
            distance_N, positions, sums = folded(distance_N), positions // 2, [value / 2 for value in sums]
        return distance_N, self._log(teaching, distance_N.sum().data, positions, *sums)

    def _log(
        self, teaching: Teaching, distance: Tensor, positions: Tensor, agreement: Optional[Tensor] = None,
        dropped: Optional[Tensor] = None, gate: Optional[Tensor] = None,
    ) -> Dict[str, Any]:  # fmt: skip
        """What `reduce_metrics` adds up. `dropped`: of each peer, the positions at which it may not teach; `gate`: the sum of
        the positions' weights."""
        log: Dict[str, Any] = {
            "codistill_loss": distance,
            "codistill_weighted": teaching.alpha * distance,
            "codistill_positions": positions,
            "codistill_alpha": teaching.alpha * positions,
        }
        if gate is not None:
            log["codistill_gate"] = gate
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
            if len(peer_NV) < len(own_NV):  # two passes of this model
                peer_NV = peer_NV.repeat(2, 1)
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
