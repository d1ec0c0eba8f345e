"""The options of `codistill_ce`: declared for fairseq, checked once, one clear sentence for each mistake.

Every option carries the prefix `codistill_`, because fairseq has one flat namespace and swallows collisions. The few
fields below the options are fairseq's own values, filled in by fairseq.
"""

import argparse
import math
import os
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Tuple

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from .common.paths import expanded
from .core.gate import GATES
from .core.losses import AGGREGATES, CONTROLS, DISTANCES
from .core.schedules import ALPHA_SCHEDULES
from .core.topology import edges_of

ENVIRONMENT = {"codistill_peer": "CODISTILL_PEER", "codistill_peers": "CODISTILL_PEERS", "codistill_dir": "CODISTILL_DIR"}
DTYPES = ("fp32", "bf16", "fp16", "int8")


_ALPHAS = ", ".join(f"{name} {distance.alpha:g}" for name, distance in DISTANCES.items())
_ALPHAS += ", " + ", ".join(f"{name} {alpha:.3g}" for name, alpha in CONTROLS.items())


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


# fairseq reads the types of these fields at run time, so this module has no `from __future__ import annotations`.
@dataclass
class CodistillConfig(FairseqDataclass):
    codistill_peer: Optional[int] = _option(None, "index of this peer, 0 … n−1 (default: $CODISTILL_PEER, else 0)")
    codistill_peers: Optional[int] = _option(None, "number of peers (default: $CODISTILL_PEERS, else 1)")
    codistill_dir: Optional[str] = _option(
        None, "where snapshots are exchanged: a directory, or a URL such as s3://bucket/run (default: $CODISTILL_DIR)"
    )
    codistill_interval: Optional[int] = _option(
        None,
        "updates between publishing this peer's weights and reloading the others' (default: 2500, but at most a 20th of "
        "--max-update; 500 where that is not given)",
    )
    codistill_loss: ChoiceEnum([*DISTANCES, *CONTROLS]) = _option(  # type: ignore[valid-type]
        "ce", "distance to the peers' predictions; uniform and unigram are the smoothing controls, without a peer"
    )
    codistill_temperature: float = _option(1.0, "τ of kl, reverse_kl, js and ce, with the factor τ²")
    codistill_alpha: Optional[float] = _option(
        None,
        f"weight α of the distance in the first epoch (default: the distance's own: {_ALPHAS})",
    )
    codistill_alpha_schedule: ChoiceEnum(list(ALPHA_SCHEDULES)) = _option(  # type: ignore[valid-type]
        "exponential", "α by epoch: constant; exponential, α·γ^(epoch−1); stepwise, + step after each milestone"
    )
    codistill_gamma: float = _option(1.1, "γ of the exponential schedule")
    codistill_alpha_step: float = _option(0.5, "what the stepwise schedule adds after each milestone")
    codistill_milestones: Optional[str] = _option(None, "epochs after which α steps and weight decay changes: 15,30,40")
    codistill_alpha_max: Optional[float] = _option(
        None,
        "α never grows above this; inf: no limit (default: 10/3 of --codistill-alpha for the exponential schedule, so 1 for "
        "ce; no growth for uniform and unigram; no limit for the other schedules)",
    )
    codistill_alpha_warmup_epochs: Optional[int] = _option(
        None,
        "epochs over which α grows in from 0, so that nobody teaches in the first: what is seen for the first time cannot be "
        "over-fitted (default: 4 for peers and the exponential schedule, else 0)",
    )
    codistill_burn_in: int = _option(0, "updates before which α is 0 and no peer is run")
    codistill_alpha_warmup: int = _option(0, "updates in which α grows from 0 to its full size, after the burn-in")
    codistill_until: Optional[int] = _option(None, "update from which on α is 0 again and no peer is run")
    codistill_when_stalled: int = _option(
        0, "teach only once the validation loss has failed to improve so many times in a row; 0: always"
    )
    codistill_topology: str = _option("all", "topology: all, ring, or a file of edges (lines 'TEACHER LEARNER')")
    codistill_aggregate: ChoiceEnum(list(AGGREGATES)) = _option(  # type: ignore[valid-type]
        "pairwise", "pairwise: mean of the distances; mean: distance to the peers' mean prediction"
    )
    codistill_gate: ChoiceEnum(list(GATES)) = _option(  # type: ignore[valid-type]
        "none",
        "weight of the distance at each position, by the probabilities that the peer and this model give the target; soft: "
        "min(1, peer's/own); hard: 1 where the peer's is higher, else 0; none: 1",
    )
    codistill_label_smoothing: float = _option(
        0.0, "ε of label smoothing in training, as in label_smoothed_cross_entropy; nll_loss and validation are without it"
    )
    codistill_rdrop: float = _option(
        0.0,
        "β of R-Drop in training: two passes with different dropout, taught by the peers both, and β times the symmetric KL "
        "between them; half of --rdrop-alpha of label_smoothed_cross_entropy_with_rdrop, whose loss is twice this one",
    )
    codistill_peer_dtype: Optional[ChoiceEnum(list(DTYPES))] = _option(  # type: ignore[valid-type]
        None,
        "precision of the peers' weights and forward (default: the model's); bf16 is fastest where the processor has it, "
        "int8 saves memory and costs time",
    )
    codistill_every: int = _option(
        1, "distil on every k-th update only, the others are plain and cheaper; α is not raised for it"
    )
    codistill_wire_dtype: Optional[ChoiceEnum(list(DTYPES))] = _option(  # type: ignore[valid-type]
        None, "precision in which weights travel (default: bf16 for an fp32 model, else the model's)"
    )
    codistill_publish_ema: bool = _option(
        False, "publish the averaged weights that --store-ema keeps, so that the peers learn from them"
    )
    codistill_sync: bool = _option(False, "lockstep: wait for the peers' snapshot of the same update (reproducible runs)")
    codistill_wait: float = _option(
        0.0, "seconds to wait at the start for the peers' first snapshots; with --codistill-sync, for each (0: 600)"
    )
    codistill_max_staleness: Optional[int] = _option(None, "updates after which a snapshot stops teaching")
    codistill_data: ChoiceEnum(["independent", "same", "disjoint"]) = _option(  # type: ignore[valid-type]
        "independent", "training data of the peers: independent order, same order, or disjoint fixed parts"
    )
    codistill_weight_decays: Optional[str] = _option(
        None, "weight decay before and after each milestone, e.g. 1e-4,1e-5,0"
    )
    codistill_teacher: Optional[str] = _option(
        None, "frozen fairseq checkpoints a.pt:b.pt instead of peers (offline distillation)"
    )
    # no option of this criterion, but given by habit: so that there is a sentence instead of "unrecognized arguments"
    label_smoothing: Optional[float] = _option(None, argparse.SUPPRESS)
    # fairseq's own, filled in by fairseq
    sentence_avg: bool = II("optimization.sentence_avg")
    ddp_backend: str = II("distributed_training.ddp_backend")
    model_parallel_size: int = II("common.model_parallel_size")
    train_subset: str = II("dataset.train_subset")
    max_update: int = II("optimization.max_update")
    seed: int = II("common.seed")
    disable_validation: bool = II("dataset.disable_validation")
    save_dir: str = II("checkpoint.save_dir")
    store_ema: bool = II("ema.store_ema")


def read_environment(cfg: CodistillConfig) -> CodistillConfig:
    """Fill index, number and directory of the peers from the environment, where the command line is silent."""
    for name, variable in ENVIRONMENT.items():
        text = os.environ.get(variable)
        if getattr(cfg, name) is None and text:
            setattr(cfg, name, text if name == "codistill_dir" else _integer(text, variable))
    for name in ("codistill_dir", "codistill_teacher", "codistill_topology"):  # paths, those of teachers with ":" between
        value = getattr(cfg, name)
        if value is not None:
            setattr(cfg, name, ":".join(map(expanded, value.split(":"))))
    cfg.codistill_peer = 0 if cfg.codistill_peer is None else cfg.codistill_peer
    cfg.codistill_peers = 1 if cfg.codistill_peers is None else cfg.codistill_peers
    return cfg


def peers_of(cfg: CodistillConfig) -> Tuple[int, int]:
    """(index of this peer, number of peers). `cfg`: environment already read."""
    assert cfg.codistill_peer is not None and cfg.codistill_peers is not None
    return cfg.codistill_peer, cfg.codistill_peers


def fill_defaults(cfg: CodistillConfig) -> CodistillConfig:
    """Fill α, its limit, its warm-up and the interval, whose defaults depend on other options. `cfg`: checked already."""
    name = str(cfg.codistill_loss)
    if cfg.codistill_alpha is None:
        cfg.codistill_alpha = CONTROLS[name] if name in CONTROLS else DISTANCES[name].alpha
    if cfg.codistill_alpha_max is None and str(cfg.codistill_alpha_schedule) == "exponential":
        cfg.codistill_alpha_max = cfg.codistill_alpha * (1 if name in CONTROLS else _GROWTH)
    if cfg.codistill_interval is None:
        updates = cfg.max_update or 0
        cfg.codistill_interval = min(_INTERVAL, max(1, updates // _EXCHANGES)) if updates > 0 else _INTERVAL_OF_UNKNOWN
    if cfg.codistill_alpha_warmup_epochs is None:
        # Teachers in files are trained already, and the smoothing controls know as much as they ever will.
        by_peers = cfg.codistill_teacher is None and name not in CONTROLS
        grows = by_peers and str(cfg.codistill_alpha_schedule) == "exponential"
        cfg.codistill_alpha_warmup_epochs = _WARMUP_EPOCHS if grows else 0
    return cfg


# Without a limit γ = 1.1 makes α 12,500 times what it began with in 100 epochs.
_GROWTH = 10 / 3
# The papers' translation runs exchange every 2500 updates; a shorter training must still exchange often enough to learn.
_INTERVAL, _EXCHANGES, _INTERVAL_OF_UNKNOWN = 2500, 20, 500
# Peers that know little yet hold each other back, and a model that has seen its data less than once over-fits nothing.
_WARMUP_EPOCHS = 4


def is_restart() -> bool:
    """Whether the launcher has started this peer again within its run."""
    return os.environ.get("CODISTILL_RESTART", "0") not in ("", "0")


def check(cfg: CodistillConfig) -> None:
    """Raises ValueError, in one sentence, for the first option that cannot be meant. `cfg`: environment already read."""
    for name, good, must in _RULES:
        value = getattr(cfg, name)
        if value is not None and not good(value):
            raise ValueError(f"{name} must be {must}, but is {value} instead.")
    _check_peers(cfg)
    milestones = numbers(cfg, "codistill_milestones")
    if any(later <= earlier for earlier, later in zip([0.0, *milestones], milestones)):
        raise ValueError(f"codistill_milestones must be epochs that increase, from above 0, but is {cfg.codistill_milestones}.")
    _check_milestones_used(cfg, milestones)
    _check_levers(cfg)
    if cfg.ddp_backend == "fully_sharded" and active(cfg):
        raise ValueError(
            "codistill_ce cannot publish the weights of --ddp-backend fully_sharded, whose ranks hold a shard each; "
            "use another backend inside a peer, such as the default pytorch_ddp."
        )
    if cfg.model_parallel_size > 1 and active(cfg):
        raise ValueError("codistill_ce needs whole models, but --model-parallel-size is above 1; leave it at 1.")
    if cfg.label_smoothing is not None:
        raise ValueError(
            f"codistill_ce does not know --label-smoothing, which is {cfg.label_smoothing}; smooth labels with "
            f"--codistill-label-smoothing {cfg.label_smoothing} instead."
        )


def numbers(cfg: CodistillConfig, name: str) -> List[float]:
    """An option that is a comma-separated list of numbers."""
    text = getattr(cfg, name)
    try:
        values = [float(word) for word in text.split(",")] if text else []
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{name} must be numbers separated by commas, but is {text!r} instead.")
    return values


def active(cfg: CodistillConfig) -> bool:
    """Whether anybody teaches at all; otherwise the criterion is plain cross entropy."""
    return peers_of(cfg)[1] > 1 or cfg.codistill_teacher is not None or str(cfg.codistill_loss) in CONTROLS


def _finite(test: Callable[[float], bool]) -> Callable[[float], bool]:
    return lambda value: math.isfinite(value) and test(value)


_RULES = (
    ("codistill_peers", lambda v: v >= 1, "at least 1"),
    ("codistill_interval", lambda v: v >= 1, "at least 1 update"),
    ("codistill_every", lambda v: v >= 1, "at least 1 update"),
    ("codistill_temperature", _finite(lambda v: v > 0), "a finite number greater than 0"),
    ("codistill_alpha", _finite(lambda v: v >= 0), "a finite number, not negative"),
    ("codistill_gamma", _finite(lambda v: v >= 0), "a finite number, not negative"),
    ("codistill_alpha_step", _finite(lambda v: True), "a finite number"),
    ("codistill_alpha_max", lambda v: v >= 0, "a number, not negative (inf: no limit)"),
    ("codistill_alpha_warmup_epochs", lambda v: v >= 0, "a number of epochs, not negative"),
    ("codistill_burn_in", lambda v: v >= 0, "a number of updates, not negative"),
    ("codistill_alpha_warmup", lambda v: v >= 0, "a number of updates, not negative"),
    ("codistill_until", lambda v: v >= 1, "at least 1 update"),
    ("codistill_when_stalled", lambda v: v >= 0, "a number of validations, not negative"),
    ("codistill_label_smoothing", lambda v: 0 <= v < 1, "at least 0 and below 1"),
    ("codistill_rdrop", _finite(lambda v: v >= 0), "a finite number, not negative"),
    ("codistill_wait", _finite(lambda v: v >= 0), "a finite number of seconds, not negative"),
    ("codistill_max_staleness", lambda v: v >= 1, "at least 1 update"),
)


def _check_peers(cfg: CodistillConfig) -> None:
    peer, peers = peers_of(cfg)
    if not 0 <= peer < peers:
        forgot = "; did you forget --codistill-peers (or CODISTILL_PEERS)?" if peers == 1 else "."
        raise ValueError(f"codistill_peer must be between 0 and {peers - 1} with {peers} peers, but is {peer} instead{forgot}")
    if peers > 1 and not cfg.codistill_dir and not cfg.codistill_teacher:
        raise ValueError(
            f"codistill_dir must name a directory (or URL) that all {peers} peers see, but is not given; "
            "did you forget --codistill-dir (or CODISTILL_DIR)?"
        )
    edges_of(cfg.codistill_topology, peers)


def _check_milestones_used(cfg: CodistillConfig, milestones: List[float]) -> None:
    if str(cfg.codistill_alpha_schedule) == "stepwise" and not milestones:
        raise ValueError("codistill_milestones must be given with --codistill-alpha-schedule stepwise; did you forget it?")
    decays = numbers(cfg, "codistill_weight_decays")
    if decays and (len(decays) != len(milestones) + 1 or min(decays) < 0):
        raise ValueError(
            "codistill_weight_decays must be one number, not negative, before and after each milestone, so "
            f"{len(milestones) + 1} for {len(milestones)} milestones, but is {cfg.codistill_weight_decays}."
        )


def _check_levers(cfg: CodistillConfig) -> None:
    if cfg.codistill_until is not None and cfg.codistill_until <= cfg.codistill_burn_in:
        raise ValueError(
            f"codistill_until must be above codistill_burn_in, which is {cfg.codistill_burn_in}, but is {cfg.codistill_until} "
            "instead, so that no update would be taught."
        )
    if cfg.codistill_when_stalled and cfg.disable_validation and active(cfg):
        raise ValueError("codistill_when_stalled needs validations, but --disable-validation is given; leave one of them out.")
    if str(cfg.codistill_gate) != "none" and str(cfg.codistill_loss) in CONTROLS:
        raise ValueError(
            f"codistill_gate must be none with --codistill-loss {cfg.codistill_loss}, which has no peer to compare with, but "
            f"is {cfg.codistill_gate} instead."
        )
    if cfg.codistill_publish_ema and not cfg.store_ema:
        raise ValueError(
            "codistill_publish_ema needs the averaged weights that fairseq keeps with --store-ema, but that is not given; did "
            "you forget it?"
        )
    if cfg.codistill_label_smoothing and str(cfg.codistill_loss) == "uniform":
        raise ValueError(
            "codistill_label_smoothing must be 0 with --codistill-loss uniform, which is label smoothing itself, but is "
            f"{cfg.codistill_label_smoothing} instead."
        )


def _integer(text: str, variable: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"The environment variable {variable} must be a whole number, but is {text!r} instead.") from None
