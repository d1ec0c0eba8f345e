"""What can be known before the first process starts: that data and exchange are fit for it, what will run, what it costs."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping
from typing import Optional

from ..exchange.status import read_run
from ..exchange.stores import open_store
from . import cost
from .plan import FairseqCommand, PeerPlan, Plan
from .view import resources

_RUN_LOOKS = 5  # tenths of a second; run.json may just be being written by a peer that others have started


def check(plan: Plan, environ: Mapping[str, str]) -> None:
    """Whether the data folder is there, and the exchange is a run's. Raises ValueError, in one sentence.

    fairseq would say the same after half a minute, once for each peer. What a URL names is not looked at.
    """
    command = FairseqCommand(plan.peers[0].command)
    if not command.is_training:
        return
    for part in (data_of(command) or "").split(":"):
        if part and not os.path.exists(os.path.expanduser(part)):
            raise ValueError(
                f"the data must be a folder, but {part!r} is not there (from {os.getcwd()}); "
                "did you forget to prepare it, or are you in another folder?"
            )
    exchange = exchange_of(plan.peers[0], environ)
    if not exchange:
        return
    for look in range(_RUN_LOOKS):
        try:
            read_run(open_store(exchange))
            return
        except ValueError:
            if look == _RUN_LOOKS - 1:
                raise
            time.sleep(0.1)


def dry_run(plan: Plan, environ: Mapping[str, str]) -> str:
    """All peers' commands, as a shell would take them, and in comments what they get and cost."""
    command = FairseqCommand(plan.peers[0].command)
    lines = [f"# note: {note}" for note in plan.notes]
    for peer in plan.peers:
        lines.append(f"# peer{peer.index}: {resources(peer)}, log {shlex.quote(peer.log)}")
        lines.append(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in peer.environ.items()), *map(shlex.quote, peer.command)]))
    if command.is_training:
        exchange = exchange_of(plan.peers[0], environ)
        lines += [f"# {line}" for line in cost.costs(command.words, data_of(command), len(plan.peers), exchange)]
    return "\n".join(lines)


def data_of(command: FairseqCommand) -> Optional[str]:
    """The data folder, or several joined by colons; None where the command does not show it, or it is no local path.

    fairseq-train takes it at any place; between options it cannot be told from an option's value, so it is seen in front
    only. Under hydra a relative path is fairseq's to resolve.
    """
    words = command.words[command.start :]
    if command.is_hydra:
        found = [match[1] for match in (re.fullmatch(r"\+*task\.data=(.*)", word) for word in words) if match]
        data = found[-1].strip("'\"") if found and found[-1].strip("'\"").startswith("/") else None
    else:
        data = words[0] if words and not words[0].startswith("-") else None
    return None if data is None or "://" in data else data


def exchange_of(peer: PeerPlan, environ: Mapping[str, str]) -> Optional[str]:
    """A peer's exchange where it is a folder that is there already, else None."""
    command = FairseqCommand(peer.command)
    named = command.get("codistill-dir")
    if named is not None and command.is_hydra and not named.startswith("/"):
        return None
    folder = named or peer.environ.get("CODISTILL_DIR") or environ.get("CODISTILL_DIR")
    return folder if folder and "://" not in folder and os.path.isdir(folder) else None
