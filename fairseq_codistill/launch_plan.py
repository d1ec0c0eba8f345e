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

SEED_STEP = 10_000_000  # fairseq seeds update u with seed + u: peers this far apart never draw the same numbers


@dataclass
class PeerPlan:
    """What one peer runs: its command, what is added to its environment, its log, and where it goes on from."""

    index: int
    command: list[str]
    environ: dict[str, str]
    log: str
    save_dir: Optional[str] = None  # holds the checkpoint that it starts from; None where the command says otherwise


@dataclass
class Plan:
    """Everything decided before the first process starts."""

    run_dir: str
    peers: list[PeerPlan]
    max_restarts: int
    grace_seconds: float
    notes: list[str] = field(default_factory=list)


class FairseqCommand:
    """A `fairseq-train` (options) or `fairseq-hydra-train` (overrides) command; nice or srun may stand before it."""

    PROGRAM = re.compile(r"(?:^|/)fairseq(?:-(?P<a>hydra-)?train|_cli[./](?P<b>hydra_)?train(?:\.py)?)$")
    OVERRIDE = re.compile(r"[+~]{0,2}[\w./@]+=")
    GROUPS = {
        **dict.fromkeys(("seed", "log-format", "reset-logging"), "common"),
        **dict.fromkeys(("distributed-init-method", "distributed-port"), "distributed_training"),
        **dict.fromkeys(("save-dir", "restore-file"), "checkpoint"),
    }  # fairseq's group of each option; all others here are the criterion's

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        matches = [(i, match) for i, match in enumerate(map(self.PROGRAM.search, self.words)) if match]
        self.is_training = bool(matches)
        self.start = matches[0][0] + 1 if matches else len(self.words)
        self.is_hydra = bool(matches and (matches[0][1]["a"] or matches[0][1]["b"]))

    def spelling(self, option: str) -> str:
        """`save-dir` as this program writes it: `--save-dir`, or `checkpoint.save_dir` for hydra."""
        if not self.is_hydra:
            return "--" + option
        return self.GROUPS.get(option, "criterion") + "." + option.replace("-", "_")

    def pop(self, option: str) -> Optional[str]:
        """Take every occurrence of an option out; return its last value as fairseq would, None if it is absent.

        Raises ValueError if the value is missing.
        """
        name, value, kept = self.spelling(option), None, self.words[: self.start]
        rest = iter(self.words[self.start :])
        for word in rest:
            key, equals, joined = word.partition("=")
            if (key.lstrip("+") if self.is_hydra else key) != name or (self.is_hydra and not equals):
                kept.append(word)
                continue
            value = joined if equals else next(rest, "--")
            if not equals and value.startswith("--"):
                raise ValueError(f"{name} must have a value, but none follows it.")
        self.words = kept
        return value.strip("'\"") if value and self.is_hydra else value

    def get(self, option: str) -> Optional[str]:
        """The value that `pop` would return; the command stays as it is."""
        return self.copy().pop(option)

    def put(self, option: str, value: str) -> None:
        """Set an option, in the place of whatever occurrences there were."""
        self.pop(option)
        if not self.is_hydra:
            self.words += [self.spelling(option), value]
            return
        # Hydra's parser refuses overrides in two places with options between them, so it joins the others.
        overrides = [i for i, word in enumerate(self.words) if i >= self.start and self.OVERRIDE.match(word)]
        # Hydra's grammar wants quotes around odd signs.
        quoted = value if re.fullmatch(r"[\w./:@%+-]+", value) else "'" + value.replace("'", r"\'") + "'"
        self.words.insert(overrides[-1] + 1 if overrides else len(self.words), f"{self.spelling(option)}={quoted}")

    def copy(self) -> FairseqCommand:
        return FairseqCommand(self.words)


def make_plan(options: argparse.Namespace, environ: Mapping[str, str]) -> Plan:
    """Decide what each peer runs, from the launcher's options and environment. Raises ValueError with one sentence."""
    base = FairseqCommand(options.command)
    for option in ("codistill-peer", "codistill-peers"):
        if base.get(option) is not None:
            raise ValueError(f"{base.spelling(option)} must not be in the command: each peer gets its own.")
    save_dir = base.get("save-dir") or "checkpoints"
    seed = _seed(base, options.peers)
    run_dir = options.log_dir or save_dir
    asked = options.gpus_per_peer
    gpus = share_gpus([] if asked == 0 else visible_gpus(), options.peers, asked)
    plan = Plan(run_dir, [], options.max_restarts, options.grace, _notes(base, gpus, options.peers))
    shared = _shared_environ(base, options, run_dir, len(gpus[0]), environ)
    ports = iter(_free_ports(options.peers))
    for i in range(options.peers):
        command = _peer_command(base, i, save_dir, seed)
        if len(gpus[i]) > 1 and _needs_rendezvous(base, environ):
            command.put("distributed-init-method", f"tcp://localhost:{next(ports)}")
        own = {**shared, "CODISTILL_PEER": str(i)}
        if gpus[i] or asked == 0:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[i])
        own_dir = command.get("save-dir") if command.is_training and command.get("restore-file") is None else None
        plan.peers.append(PeerPlan(i, command.words, own, os.path.join(run_dir, f"peer{i}", "train.log"), own_dir))
    return plan


def _seed(base: FairseqCommand, peers: int) -> int:
    text = base.get("seed") or "1"
    if not re.fullmatch(r"\d+", text) or int(text) + (peers - 1) * SEED_STEP >= 2**32:
        raise ValueError(
            f"{base.spelling('seed')} must be a whole number, below 2**32 with {SEED_STEP} more for each further peer,"
            f" but is {text!r} with {peers} peers."
        )
    return int(text)


def _peer_command(base: FairseqCommand, index: int, save_dir: str, seed: int) -> FairseqCommand:
    command = base.copy()
    if not command.is_training:
        return command
    command.put("save-dir", os.path.join(save_dir, f"peer{index}"))
    command.put("seed", str(seed + index * SEED_STEP))
    if base.get("log-format") is None:
        command.put("log-format", "json")
    # Hydra's own logging writes its lines in another form than fairseq's, which other tools could not read.
    if command.is_hydra and base.get("reset-logging") is None:
        command.put("reset-logging", "true")
    return command


def _shared_environ(
    base: FairseqCommand, options: argparse.Namespace, run_dir: str, gpus: int, environ: Mapping[str, str]
) -> dict[str, str]:
    shared = {"CODISTILL_PEERS": str(options.peers), "PYTHONUNBUFFERED": "1"}
    if base.get("codistill-dir") is None and not environ.get("CODISTILL_DIR"):
        # Absolute, because a command may change its directory (hydra does).
        shared["CODISTILL_DIR"] = os.path.abspath(os.path.join(run_dir, "exchange"))
    if "OMP_NUM_THREADS" not in environ:
        shared["OMP_NUM_THREADS"] = str(share_cores(options.peers, gpus))
    return shared


def _notes(base: FairseqCommand, gpus: Sequence[Sequence[str]], peers: int) -> list[str]:
    notes = []
    if not base.is_training:
        notes.append(
            f"{base.words[0]} is not fairseq-train or fairseq-hydra-train, so its options stay as they are;"
            " let it use $CODISTILL_PEER for its save directory and seed."
        )
    log_format = base.get("log-format")
    if log_format not in (None, "json"):
        notes.append(f"with log format {log_format!r} the losses cannot be shown here; json is the one that is read.")
    different = len({name for names in gpus for name in names})
    if 0 < different < peers:
        notes.append(f"{peers} peers share {different} GPU{'s' if different > 1 else ''}.")
    return notes


def _needs_rendezvous(base: FairseqCommand, environ: Mapping[str, str]) -> bool:
    """In a Slurm job fairseq makes a group's port from the job's number: the peers' ports would be the same."""
    chosen = any(base.get(option) is not None for option in ("distributed-init-method", "distributed-port"))
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
