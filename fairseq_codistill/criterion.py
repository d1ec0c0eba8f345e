"""`codistill_ce`: cross entropy + α·D, for whatever logits a fairseq task gives.

    loss = Σ over positions of (cross entropy + α · D), divided by the same `sample_size` as `cross_entropy`

A position is a target token or an image; padding adds nothing. A sample that carries no teaching (validation, α = 0,
nobody to learn from) gets plain cross entropy: there is no mode flag. Only --codistill-label-smoothing and --codistill-rdrop
tell training from validation.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from fairseq import utils
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from fairseq.logging import metrics
from fairseq.models import BaseFairseqModel
from torch import Tensor, nn

from . import config, ema, hook, stalled, teachers
from .core.codistiller import AlphaSchedule, Codistiller, Teaching
from .core.fused import Objective, Peer, Sums, agrees, fused
from .core.gate import gate_of
from .core.guard import Warner
from .core.losses import AGGREGATES, CONTROLS, uniform, unigram
from .core.output_layer import first, output_layer, projection, replaced
from .core.rdrop import doubled, folded, passes_first, symmetric_kl
from .core.topology import edges_of
from .exchange.exchange import Exchange, Run
from .exchange.stores import open_store

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, None: None}


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
        self._layers: WeakKeyDictionary = WeakKeyDictionary()  # of each model its output layer, or None
        self._frequencies: Optional[Tensor] = None
        self._gives_logits: Optional[bool] = None
        self._warner = Warner()
        if self.distance_name == "unigram" and task.target_dictionary is None:
            raise ValueError("codistill_loss unigram needs a target dictionary, but this task has none; use uniform.")
        self._fit: WeakSet = WeakSet()  # frozen teachers that were tried on a batch
        _attach(task, cfg, lambda: self.training)

    def forward(self, model, sample, reduce: bool = True):
        """The loss, its sample size, and what to log, as `cross_entropy` gives them."""
        teaching = sample.get(hook.TEACHING)
        if teaching is not None:
            self._try_teachers(teaching, sample)
        layers = self._output_layers(model, sample, teaching) if reduce and teaching is not None else None
        if layers:
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

    def _try_teachers(self, teaching: Teaching, sample) -> None:
        for peer in teaching.peers:
            if hasattr(peer, "codistill_name") and peer not in self._fit:
                teachers.check_fit(peer, teaching.cast(peer, sample["net_input"]), sample["target"])
                self._fit.add(peer)

    def _whole(self, model, sample, teaching: Optional[Teaching], reduce: bool):
        """Loss, its cross entropy, and what to log of the teaching: for any model, from all its logits at once."""
        seen, log = self._seen(sample), {}
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
        """What my model is run on: with R-Drop each row of the batch twice."""
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
        """As `_whole`, without ever holding all logits. `layers`: the output layers, mine and then each peer's."""
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

    def _output_layers(self, model, sample, teaching: Teaching) -> Optional[List[nn.Linear]]:
        """The output layers of me and of my peers, if each has one that may be fused with the loss."""
        if self.distance_name in CONTROLS or not _plain_targets(model):
            return None
        for one in (model, *teaching.peers):
            if one not in self._layers:
                net_input = teaching.cast(one, sample["net_input"])
                self._layers[one] = output_layer(one, net_input, lambda *output, one=one: _are_logits(one, *output))
        layers = [self._layers[one] for one in (model, *teaching.peers)]
        return layers if all(layer is not None for layer in layers) else None

    def distance(self, model, net_output, sample, teaching: Teaching) -> Tuple[Tensor, Dict[str, Any]]:
        """D at each position, 0 at padding: [N]; and the sums to log."""
        target_N, own_NV = model.get_targets(sample, net_output).reshape(-1), self.scores(model, net_output)
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
        log = {
            "codistill_loss": distance,
            "codistill_weighted": teaching.alpha * distance,
            "codistill_positions": positions,
            "codistill_alpha": teaching.alpha * positions,
        }
        if gate is not None:
            log["codistill_gate"] = gate
        if agreement is not None:
            log["codistill_staleness"] = teaching.staleness * positions
            log["codistill_agreement"] = agreement
            log["codistill_dropped"] = dropped.sum() / len(dropped)
            self._warner.note(teaching.names or [f"teacher {i}" for i in range(len(dropped))], dropped, positions)
        return log

    def _peers_scores(self, teaching: Teaching, net_input, own_NV: Tensor, kept_N: Tensor, agreement: List[Tensor]):
        """Each peer's scores [N, V], one after another; counts on the way where its top-1 is mine."""
        own_top_N = own_NV.argmax(-1)
        for peer, output in teaching.outputs(net_input):
            peer_NV = self.scores(peer, output)
            if len(peer_NV) < len(own_NV):  # two passes of mine
                peer_NV = peer_NV.repeat(2, 1)
            agreement.append((agrees(peer_NV, own_top_N) & kept_N).sum())
            yield peer_NV

    def scores(self, model, net_output) -> Tensor:
        """A model's logits as [N, V], or its log-probabilities where its output is no logits (adaptive softmax, copying)."""
        logits = first(net_output)
        logits = logits.get("encoder_out") if isinstance(logits, dict) else logits
        if self._gives_logits is None:
            self._gives_logits = _are_logits(model, net_output, logits)
        if not self._gives_logits:
            logits = model.get_normalized_probs(net_output, log_probs=True)
        return logits.reshape(-1, logits.size(-1))

    def _smoothing(self, own_NV: Tensor) -> Tensor:
        if self.distance_name == "uniform":
            return uniform(own_NV)
        if self._frequencies is None:
            self._frequencies = _frequencies(self.task.target_dictionary).to(own_NV.device)
        return unigram(own_NV, self._frequencies)

    @staticmethod
    def reduce_metrics(logging_outputs) -> None:
        """fairseq's metrics from sums over ranks and micro-batches, in base 2, so that over any number of updates

        loss = nll_loss + codistill_alpha · codistill_loss

        but for what --codistill-label-smoothing and --codistill-rdrop add to the loss.
        So `codistill_loss` is a mean over all positions trained on, and an update that taught nothing counts as 0 (where no
        update at all was taught it is not logged); `codistill_alpha` is α in what was taught, as are the others.
        """
        total = {name: sum(log.get(name, 0) for log in logging_outputs) for name in _SUMMED}
        sample_size, ntokens = total["sample_size"], total["ntokens"]
        metrics.log_scalar("loss", total["loss"] / sample_size / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", total["nll_loss"] / ntokens / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        if total["codistill_positions"] != 0:
            logged = {name for log in logging_outputs for name in log}
            _log_teaching(total, taught_by_peers="codistill_agreement" in logged, gated="codistill_gate" in logged)
        if any("codistill_rdrop" in log for log in logging_outputs):
            metrics.log_scalar("codistill_rdrop", total["codistill_rdrop"] / sample_size / math.log(2), sample_size, round=4)
        for meters in metrics.get_active_aggregators():
            distance = meters.get("codistill_loss")
            if distance is not None and distance.count > 0:
                distance.count = meters["loss"].count  # with what was trained on, but not taught


def _log_teaching(total: Dict[str, Any], taught_by_peers: bool, gated: bool) -> None:
    sample_size, positions, distance = total["sample_size"], total["codistill_positions"], total["codistill_loss"]
    metrics.log_scalar("codistill_loss", distance / sample_size / math.log(2), sample_size, round=4)
    # Each α counts as much as the distance that it weighs; where all distances are 0, the last α is shown.
    alpha = total["codistill_weighted"] / distance if distance > 0 else total["codistill_alpha"] / positions
    metrics.log_scalar("codistill_alpha", alpha, distance, round=4)
    if taught_by_peers:
        metrics.log_scalar("codistill_staleness", total["codistill_staleness"] / positions, positions, round=1)
        metrics.log_scalar("codistill_agreement", total["codistill_agreement"] / positions, positions, round=3)
    if gated:
        metrics.log_scalar("codistill_gate", total["codistill_gate"] / positions, positions, round=3)
    if total["codistill_dropped"] > 0:
        metrics.log_scalar("codistill_dropped", total["codistill_dropped"] / positions, positions, round=4)


_SUMMED = (
    "loss", "nll_loss", "ntokens", "sample_size",
    "codistill_loss", "codistill_weighted", "codistill_positions", "codistill_alpha", "codistill_staleness",
    "codistill_agreement", "codistill_dropped", "codistill_gate", "codistill_rdrop",
)  # fmt: skip


def _attach(task: Any, cfg: config.CodistillConfig, trains: Callable[[], bool]) -> None:
    """Build the codistiller that the options describe, and tie it to the task. `trains`: not so in fairseq-validate."""
    decays = config.numbers(cfg, "codistill_weight_decays")
    if decays:
        hook.schedule_weight_decay(task, config.numbers(cfg, "codistill_milestones"), decays)
    if cfg.codistill_peers > 1 and str(cfg.codistill_data) != "independent":
        who = (cfg.codistill_peer, cfg.codistill_peers)
        hook.order_data(task, str(cfg.codistill_data), *who, cfg.train_subset, cfg.seed)
    if not config.active(cfg):
        plain = "label_smoothed_cross_entropy" if cfg.codistill_label_smoothing else "cross_entropy"
        with_rdrop = ", with R-Drop" if cfg.codistill_rdrop else ""
        logger.info(f"codistillation: no peers are configured, so this trains alone, exactly as {plain} does{with_rdrop}")
        return
    frozen = lambda: teachers.load(cfg.codistill_teacher, task)  # noqa: E731
    codistiller = _codistiller(cfg)
    hook.attach(task, codistiller, _run(task, cfg), cfg.train_subset, frozen, trains)
    if cfg.codistill_publish_ema:
        ema.publish_ema(task, codistiller)
    if cfg.codistill_when_stalled:
        stalled.teach_when_stalled(task, codistiller, cfg.codistill_when_stalled, cfg.save_dir)


def _codistiller(cfg: config.CodistillConfig) -> Codistiller:
    control = str(cfg.codistill_loss) in CONTROLS
    peer, peers = cfg.codistill_peer, cfg.codistill_peers
    exchanges = peers > 1 and not control and not cfg.codistill_teacher
    peer_dtype, wire_dtype = (
        _DTYPES[None if value is None else str(value)] for value in (cfg.codistill_peer_dtype, cfg.codistill_wire_dtype)
    )
    return Codistiller(
        peer=peer,
        peers=peers,
        schedule=AlphaSchedule(
            str(cfg.codistill_alpha_schedule), cfg.codistill_alpha, cfg.codistill_gamma, cfg.codistill_alpha_step,
            config.numbers(cfg, "codistill_milestones"), cfg.codistill_alpha_max, cfg.codistill_burn_in,
            cfg.codistill_alpha_warmup, cfg.codistill_until,
        ),
        exchange=Exchange(open_store(cfg.codistill_dir), peer, restarted=config.is_restart()) if exchanges else None,
        edges=edges_of(cfg.codistill_topology, peers),
        interval=cfg.codistill_interval,
        every=cfg.codistill_every,
        peer_dtype=peer_dtype,
        wire_dtype=wire_dtype,
        updates=cfg.max_update or None,
        lockstep=cfg.codistill_sync,
        wait=cfg.codistill_wait,
        max_staleness=cfg.codistill_max_staleness,
        needs_peers=not control,
    )  # fmt: skip


def _run(task: Any, cfg: config.CodistillConfig) -> Run:
    target = task.target_dictionary
    return Run(
        cfg.codistill_peers,
        None if target is None else teachers.digest(target),
        None if target is None else len(target),
        source_sha256=_sources_sha256(task),
        interval=cfg.codistill_interval,
        lockstep=cfg.codistill_sync,
        seed=cfg.seed,
    )


def _sources_sha256(task: Any) -> Optional[str]:
    """Of the source dictionary, or of all of a multilingual task's; None where a task has none, or will not say."""
    try:
        by_language = getattr(task, "dicts", None) or {"": task.source_dictionary}
        lines = [f"{language} {teachers.digest(dictionary)}" for language, dictionary in sorted(by_language.items())]
    except Exception:  # a task of somebody else's: not worth a training
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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


def _frequencies(dictionary) -> Tensor:
    counts = torch.tensor(dictionary.count, dtype=torch.float)
    return counts / counts.sum()
