"""What each peer of a run is told: its command, its environment, its GPUs and its log. Starts nothing, writes nothing."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

from . import checks, outputs
from .command import LAST, FairseqCommand, absolute, first_start_options, going_on, has_begun

SEED_STEP = 10_000_000  # fairseq seeds update u with seed + u: peers this far apart never draw the same numbers


@dataclass
class PeerPlan:
    """What one peer runs: its commands, what is added to its environment, its log, and where it goes on from."""

    index: int
    first_command: list[str]
    environ: dict[str, str]
    log: str
    save_dir: Optional[str] = None  # holds the checkpoint that it goes on from; None where it is not known
    next_command: Optional[list[str]] = None  # once that checkpoint is there; None: the same

    @property
    def command(self) -> list[str]:
        """What it runs if it is started now."""
        if self.next_command is not None and self.save_dir is not None and has_begun(self.save_dir):
            return self.next_command
        return self.first_command


@dataclass
class Plan:
    """Everything decided before the first process starts."""

    run_dir: str
    peers: list[PeerPlan]
    max_restarts: int
    grace_seconds: float
    notes: list[str] = field(default_factory=list)


def make_plan(options: argparse.Namespace, environ: Mapping[str, str]) -> Plan:
    """Decide what each peer runs, from the launcher's options and environment. Raises ValueError with one sentence."""
    base, notes = prepare(FairseqCommand(options.command), options.peers)
    save_dir = save_dir_of(base)
    run_dir = options.log_dir or save_dir
    asked = options.gpus_per_peer
    visible = [] if asked == 0 else visible_gpus()
    gpus = share_gpus(visible, options.peers, asked)
    plan = Plan(run_dir, [], options.max_restarts, options.grace, notes)
    shared = _shared_environ(base, options, run_dir, len(gpus[0]), environ)
    ports = iter(_free_ports(options.peers))
    for i in range(options.peers):
        command, own = peer_command(base, i, options.peers, environ)
        if len(gpus[i]) > 1 and _needs_rendezvous(base, environ):
            command.put("distributed-init-method", f"tcp://localhost:{next(ports)}")
        own = {**shared, "CODISTILL_PEER": str(i), **own}
        if gpus[i] or asked == 0:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i])
        plan.peers.append(plan_peer(i, command, own, run_dir))
    if base.is_training:
        plan.notes += start_notes(base, plan.peers) + outputs.notes(base, environ, options.peers)
    plan.notes += _gpu_notes(gpus, asked, visible)
    return plan


def prepare(base: FairseqCommand, peers: int) -> tuple[FairseqCommand, list[str]]:
    """The command with what holds for all peers, and notes for the user. Raises ValueError with one sentence."""
    base, notes = base.copy(), []
    for option in ("codistill-peer", "codistill-peers"):
        if base.get(option) is not None:
            raise ValueError(f"{base.spelling(option)} must not be in the command: each peer gets its own.")
    if not base.is_training:
        note = f"{base.words[0]} is not fairseq-train or fairseq-hydra-train, so its options stay as they are;"
        return base, [f"{note} let it use $CODISTILL_PEER for its save directory and seed."]
    given, user_dir = base.get("user-dir"), checks.find_user_dir(base)
    if user_dir is not None and user_dir != given:
        if os.path.normpath(given or "") == checks.OURS and not os.path.isdir(given or ""):
            notes.append(f"{base.spelling('user-dir')} {given} is no folder here; it is the installed plugin, {user_dir}.")
        base.put("user-dir", user_dir)
    checks.check(base, save_dir_of(base))
    if base.is_hydra:
        _make_absolute(base)
    log_format = base.get("log-format")
    if log_format not in (None, "json"):
        notes.append(f"with log format {log_format!r} the losses cannot be shown here; json is the one that is read.")
    return base, notes + checks.notes(base, peers)


def save_dir_of(base: FairseqCommand) -> str:
    return base.get("save-dir") or "checkpoints"


def _make_absolute(base: FairseqCommand) -> None:
    """Hydra starts a job in a folder of its own, where a relative path would be another at each start."""
    for option in ("restore-file", "continue-once", "finetune-from-model", "codistill-dir", "codistill-teacher", "data"):
        value = base.get(option)
        if value is None or value.startswith("[") or (option == "restore-file" and value == LAST):
            continue
        parts = [value] if "://" in value else value.split(":")
        path = ":".join(absolute(part) if part else part for part in parts)
        if path != value:
            base.put(option, path)


def _seed(base: FairseqCommand, peers: int) -> int:
    text = base.get("seed") or "1"
    if not re.fullmatch(r"\d+", text) or int(text) + (peers - 1) * SEED_STEP >= 2**32:
        raise ValueError(
            f"{base.spelling('seed')} must be a whole number, below 2**32 with {SEED_STEP} more for each further peer,"
            f" but is {text!r} with {peers} peers."
        )
    return int(text)


def peer_command(
    base: FairseqCommand, index: int, peers: int, environ: Mapping[str, str]
) -> tuple[FairseqCommand, dict[str, str]]:
    """What peer `index` runs, and what it alone has in its environment, of what `prepare` returned."""
    command, seed = base.copy(), _seed(base, peers)
    if not command.is_training:
        return command, {}
    save_dir = save_dir_of(base)
    # A log that tells where checkpoints are should tell it as the user did, where that is enough.
    command.put("save-dir", outputs.own_folder(absolute(save_dir) if base.is_hydra else save_dir, index))
    command.put("seed", str(seed + index * SEED_STEP))
    if base.get("log-format") is None:
        command.put("log-format", "json")
    # Hydra's own logging writes its lines in another form than fairseq's, which other tools could not read.
    if command.is_hydra and base.get("reset-logging") is None:
        command.put("reset-logging", "true")
    if peers == 1:
        return command, {}
    if command.is_hydra:
        outputs.make_own_hydra_folder(command, index)
    outputs.make_own(command, index)
    return command, outputs.own_environ(command, index, save_dir, environ)


def plan_peer(index: int, command: FairseqCommand, environ: dict[str, str], run_dir: str) -> PeerPlan:
    """The plan of one peer, with what it runs once it has a checkpoint of its own."""
    log = os.path.join(run_dir, f"peer{index}", "train.log")
    if not command.is_training:
        return PeerPlan(index, command.words, environ, log)
    later = going_on(command).words if first_start_options(command) else None
    return PeerPlan(index, command.words, environ, log, command.get("save-dir"), later)


def _shared_environ(
    base: FairseqCommand, options: argparse.Namespace, run_dir: str, gpus: int, environ: Mapping[str, str]
) -> dict[str, str]:
    shared = {"CODISTILL_PEERS": str(options.peers), "PYTHONUNBUFFERED": "1"}
    if base.get("codistill-dir") is None:
        # Absolute, because a command may change its directory (hydra does).
        given = environ.get("CODISTILL_DIR")
        exchange = absolute(given or os.path.join(run_dir, "exchange"))
        if exchange != given and (not given or base.is_hydra):
            shared["CODISTILL_DIR"] = exchange
    if "OMP_NUM_THREADS" not in environ:
        shared["OMP_NUM_THREADS"] = str(share_cores(options.peers, gpus))
    return shared


def start_notes(base: FairseqCommand, plans: Sequence[PeerPlan]) -> list[str]:
    """That what a command says of its start will not happen at each start."""
    options = first_start_options(base)
    if not options:
        return []
    begun = [f"peer{plan.index}" for plan in plans if plan.save_dir and has_begun(plan.save_dir)]
    now = f", as {' and '.join(begun)} {'do' if len(begun) > 1 else 'does'} now" if begun else ""
    return [
        f"{', '.join(options)}: for a peer's first start alone; one with a {LAST} in its own save directory goes on from that"
        f" without{now} (to begin anew, choose another save directory)."
    ]


def _gpu_notes(gpus: Sequence[Sequence[str]], asked: Optional[int], visible: Sequence[str]) -> list[str]:
    used, peers = len({name for names in gpus for name in names}), len(gpus)
    if 0 < used < peers:
        return [f"{peers} peers share {used} GPU{'s' if used > 1 else ''}."]
    idle = len(visible) - used
    if asked is None and idle > 0:
        return [f"{idle} of {len(visible)} GPUs stay{'s' if idle == 1 else ''} idle: {peers} peers get {len(gpus[0])} each."]
    return []


def _needs_rendezvous(base: FairseqCommand, environ: Mapping[str, str]) -> bool:
    """In a Slurm job fairseq makes a group's port from the job's number: the peers' ports would be the same."""
    chosen = any(base.get(name) not in (None, "-1") for name in ("distributed-init-method", "distributed-port"))
    return base.is_training and "SLURM_JOB_ID" in environ and not chosen


def share_cores(peers: int, processes_per_peer: int) -> int:
    """Threads for each process, of the cores this process may run on (the affinity mask, which Slurm sets)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (peers * max(1, processes_per_peer)))


def visible_gpus() -> list[str]:
    """The GPUs that CUDA would show this process, as CUDA_VISIBLE_DEVICES names them. Does not start CUDA."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in named.split(",")] if named else [str(i) for i in range(count)]
    return names[:count]


def share_gpus(gpus: Sequence[str], peers: int, per_peer: Optional[int]) -> list[list[str]]:
    """The GPUs of each peer: `per_peer` neighbours, by default an equal share; fewer GPUs than peers go round.

    Raises ValueError if `per_peer` asks for more than there are.
    """
    if per_peer is not None and per_peer * peers > len(gpus):
        raise ValueError(
            f"--gpus-per-peer {per_peer} with --peers {peers} needs {per_peer * peers} GPUs, but there are {len(gpus)}"
            " (leave it out and the peers share what there is)."
        )
    if per_peer is None and len(gpus) < peers:
        return [[gpus[i % len(gpus)]] if gpus else [] for i in range(peers)]
    size = len(gpus) // peers if per_peer is None else per_peer
    return [list(gpus[i * size : (i + 1) * size]) for i in range(peers)]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("localhost", 0))
        return [one.getsockname()[1] for one in sockets]
