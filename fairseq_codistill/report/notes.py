"""The lines under the table: what the numbers are, and whatever keeps them from being compared."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from ..common.fairseq_log import as_float, choosing_metric
from .log import TrainLog
from .summary import Method

SPREAD = (
    "The value of a seed is the mean over its peers; with several seeds: the seeds' mean ± their sample standard "
    "deviation (n − 1)."
)
UNITS = {
    "NLL": "bits per target token (base 2), on the validation set, of a peer's own model",
    "ppl": "2 to the best NLL",
    "at update": "the update of the best NLL",
    "training seconds": "wall clock with validation, all restarts together",
}


def notes(methods: Sequence[Method]) -> list[str]:
    """What the numbers are, and whatever keeps them from being compared."""
    peers = [pair for method in methods for pair in method.peers()]
    lines = ["; ".join(f"{name}: {meaning}" for name, meaning in UNITS.items()) + ".", SPREAD]
    if any(peer.log.doubled for _, peer in peers):
        lines.append(
            "† fairseq's R-Drop criterion runs every batch twice, in validation too, so its log holds twice the true "
            "NLL: halved here."
        )
    lines += [_chosen_by(metric, names) for metric, names in choosing_metrics(methods).items()]
    lines += _dropped_sentences([peer.log for _, peer in peers])
    lines += _signatures(methods)
    lines += [line for method in methods for line in _missing_scores(method)]
    lines += [line for method in methods for line in _exchange(method)]
    unfinished = [f"{name} ({_progress(peer.log)})" for name, peer in peers if not peer.log.finished]
    if unfinished:
        lines.append(f"Still running, or ended early (no 'done training' in the log): {some(unfinished)}.")
    diverged = [name for name, peer in peers if not all(math.isfinite(value) for _, value in peer.log.valid_nll())]
    if diverged:
        lines.append(f"WARNING: some validation losses are not finite, and never count as best: {some(diverged)}.")
    return lines


def choosing_metrics(methods: Sequence[Method]) -> dict[str, list[str]]:
    """What other than an NLL chooses checkpoint_best.pt -> the methods whose it is."""
    found: dict[str, list[str]] = defaultdict(list)
    for method in methods:
        for metric in sorted({choosing_metric(peer.log.settings) for _, peer in method.peers()} - {""}):
            found[metric].append(method.label)
    return found


def _chosen_by(metric: str, labels: Sequence[str]) -> str:
    return (
        f"{metric} chooses checkpoint_best.pt of {some(labels)} (--best-checkpoint-metric): that is the model at the update "
        f"of the best {metric}, not of the best NLL."
    )


def some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _progress(log: TrainLog) -> str:
    limit = as_float(log.settings.get("max_update")) or 0
    return f"update {log.update:,}" + (f" of {limit:,.0f}" if limit else "")


def _dropped_sentences(logs: Sequence[TrainLog]) -> list[str]:
    multiple = max(int(as_float(log.settings.get("required_batch_size_multiple")) or 1) for log in logs)
    if multiple == 1:
        return []
    return [
        f"fairseq leaves up to {multiple - 1} sentences out of validation when --required-batch-size-multiple is "
        f"{multiple}, as here; with 1 it keeps them all."
    ]


def _signatures(methods: Sequence[Method]) -> list[str]:
    users: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))  # key, signature, labels
    for method in methods:
        for score in method.scores():
            users[score.key][score.signature][method.label] = None
    lines = []
    for key, found in sorted(users.items()):
        if len(found) == 1:
            lines.append(f"{key}: sacreBLEU {next(iter(found))}")
        else:
            each = "; ".join(f"{signature} in {some(list(found[signature]))}" for signature in sorted(found))
            lines.append(f"WARNING: {key} must not be compared, for the sacreBLEU signatures differ: {each}.")
    return lines


def _exchange(method: Method) -> list[str]:
    """What exchanging cost a peer of this method, in the mean."""
    logs = [peer.log.exchange for _, peer in method.peers() if peer.log.exchange.get("updates")]
    if not logs:
        return []
    updates = sum(log["updates"] for log in logs)
    per_update = {name: sum(log.get(name, 0.0) for log in logs) / updates for name in logs[0]}
    seconds = {name: 1000 * per_update.get(f"{name}_s", 0.0) for name in ("hidden", "visible", "copy", "waited")}
    skipped = sum(log.get("skipped", 0.0) + log.get("failed", 0.0) for log in logs)
    return [
        f"exchange of {method.label}, for each peer and update: published {_size(per_update.get('published_bytes', 0.0))}, "
        f"read {_size(per_update.get('read_bytes', 0.0))}; in 1,000 updates {seconds['hidden']:.2f} s hidden beside the "
        f"training, {seconds['copy']:.2f} s copying weights, {seconds['visible']:.2f} s otherwise visible"
        + (f", {seconds['waited']:.2f} s waiting for peers" if seconds["waited"] else "")
        + (f"; {skipped:.0f} snapshots skipped or failed." if skipped else ".")
    ]


def _size(count: float) -> str:
    for unit in ("bytes", "kB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} MB"


def _missing_scores(method: Method) -> list[str]:
    lines = []
    for key in sorted({score.key for _, peer in method.peers() for score in peer.scores}):
        missing = [name for name, peer in method.peers() if key not in {score.key for score in peer.scores}]
        if missing:
            lines.append(f"{key} is not there (yet) for {some(missing)}; the mean is over the others.")
    return lines
