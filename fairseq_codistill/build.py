"""Builds the system that the options describe, and ties it to the task: the composition root of the plugin."""

from __future__ import annotations

import hashlib
import logging
from typing import Any, Callable, Optional

import torch

from . import config, ema, hook, stalled, teachers
from .core.codistiller import Codistiller
from .core.losses import CONTROLS
from .core.schedules import AlphaSchedule
from .core.topology import edges_of
from .data_order import order_data, schedule_weight_decay
from .exchange.exchange import Exchange
from .exchange.run import Run
from .exchange.stores import open_store

logger = logging.getLogger(__name__)

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8, None: None}


def attach(task: Any, cfg: config.CodistillConfig, trains: Callable[[], bool]) -> None:
    """Build the codistiller that the options describe, and tie it to the task. `trains`: not so in fairseq-validate."""
    decays = config.numbers(cfg, "codistill_weight_decays")
    if decays:
        schedule_weight_decay(task, config.numbers(cfg, "codistill_milestones"), decays)
    peer, peers = config.peers_of(cfg)
    if peers > 1 and str(cfg.codistill_data) != "independent":
        order_data(task, str(cfg.codistill_data), peer, peers, cfg.train_subset, cfg.seed)
    if not config.active(cfg):
        plain = "label_smoothed_cross_entropy" if cfg.codistill_label_smoothing else "cross_entropy"
        with_rdrop = ", with R-Drop" if cfg.codistill_rdrop else ""
        logger.info(f"codistillation: no peers are configured, so this trains alone, exactly as {plain} does{with_rdrop}")
        return
    frozen = lambda: teachers.load(cfg.codistill_teacher, task)  # noqa: E731
    codistiller = codistiller_of(cfg)
    hook.attach(task, codistiller, run_of(task, cfg), cfg.train_subset, frozen, trains)
    if cfg.codistill_publish_ema:
        ema.publish_ema(task, codistiller)
    if cfg.codistill_when_stalled:
        stalled.teach_when_stalled(task, codistiller, cfg.codistill_when_stalled, cfg.save_dir)


def codistiller_of(cfg: config.CodistillConfig) -> Codistiller:
    control = str(cfg.codistill_loss) in CONTROLS
    peer, peers = config.peers_of(cfg)
    exchanges = peers > 1 and not control and not cfg.codistill_teacher
    assert cfg.codistill_alpha is not None and cfg.codistill_interval is not None, "see config.fill_defaults"
    peer_dtype, wire_dtype = (
        TORCH_DTYPES[None if value is None else str(value)] for value in (cfg.codistill_peer_dtype, cfg.codistill_wire_dtype)
    )
    return Codistiller(
        peer=peer,
        peers=peers,
        schedule=AlphaSchedule(
            str(cfg.codistill_alpha_schedule), cfg.codistill_alpha, cfg.codistill_gamma, cfg.codistill_alpha_step,
            config.numbers(cfg, "codistill_milestones"), cfg.codistill_alpha_max, cfg.codistill_burn_in,
            cfg.codistill_alpha_warmup_epochs or 0, cfg.codistill_alpha_warmup, cfg.codistill_until,
        ),
        exchange=Exchange(open_store(str(cfg.codistill_dir)), peer, restarted=config.is_restart()) if exchanges else None,
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


def run_of(task: Any, cfg: config.CodistillConfig) -> Run:
    target = task.target_dictionary
    assert cfg.codistill_peers is not None, "see config.read_environment"
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
    except Exception:  # a task from elsewhere: decoration is not worth a training
        return None
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
