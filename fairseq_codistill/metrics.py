"""What the criterion's sums become in fairseq's log: the metrics `codistill_…` beside those of `cross_entropy`."""

from __future__ import annotations

import math
from typing import Any, Dict, Set

from fairseq import utils
from fairseq.logging import metrics

_SUMMED = (
    "loss", "nll_loss", "ntokens", "sample_size",
    "codistill_loss", "codistill_weighted", "codistill_positions", "codistill_alpha", "codistill_staleness",
    "codistill_agreement", "codistill_dropped", "codistill_gate", "codistill_rdrop",
)  # fmt: skip


def reduce_metrics(logging_outputs) -> None:
    """fairseq's metrics from sums over ranks and micro-batches, in base 2, so that over any number of updates

    loss = nll_loss + codistill_alpha · codistill_loss

    but for what --codistill-label-smoothing and --codistill-rdrop add to the loss.
    So `codistill_loss` is a mean over all positions trained on, and an update that taught nothing counts as 0 (where no
    update at all was taught it is not logged); `codistill_alpha` is α in what was taught, as are the others.
    """
    total = {name: sum(log.get(name, 0) for log in logging_outputs) for name in _SUMMED}
    logged = {name for log in logging_outputs for name in log}
    sample_size, ntokens = total["sample_size"], total["ntokens"]
    metrics.log_scalar("loss", total["loss"] / sample_size / math.log(2), sample_size, round=3)
    metrics.log_scalar("nll_loss", total["nll_loss"] / ntokens / math.log(2), ntokens, round=3)
    metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
    if total["codistill_positions"] != 0:
        _log_teaching(total, logged)
    if "codistill_rdrop" in logged:
        metrics.log_scalar("codistill_rdrop", total["codistill_rdrop"] / sample_size / math.log(2), sample_size, round=4)
    for meters in metrics.get_active_aggregators():
        distance = meters.get("codistill_loss")
        if distance is not None and distance.count > 0:
            distance.count = meters["loss"].count  # with what was trained on, but not taught


def _log_teaching(total: Dict[str, Any], logged: Set[str]) -> None:
    sample_size, positions, distance = total["sample_size"], total["codistill_positions"], total["codistill_loss"]
    metrics.log_scalar("codistill_loss", distance / sample_size / math.log(2), sample_size, round=4)
    # Each α counts as much as the distance that it weighs; where all distances are 0, the last α is shown.
    alpha = total["codistill_weighted"] / distance if distance > 0 else total["codistill_alpha"] / positions
    metrics.log_scalar("codistill_alpha", alpha, distance, round=4)
    if "codistill_agreement" in logged:
        metrics.log_scalar("codistill_staleness", total["codistill_staleness"] / positions, positions, round=1)
        metrics.log_scalar("codistill_agreement", total["codistill_agreement"] / positions, positions, round=3)
    if "codistill_gate" in logged:
        metrics.log_scalar("codistill_gate", total["codistill_gate"] / positions, positions, round=3)
    if total["codistill_dropped"] > 0:
        metrics.log_scalar("codistill_dropped", total["codistill_dropped"] / positions, positions, round=4)
