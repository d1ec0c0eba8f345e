"""What is wrong with a command and can be seen before anything starts; what it does that its user may not expect."""

from __future__ import annotations

import importlib.util
import os
from typing import Optional

from ..common.paths import PLUGIN
from .command import FairseqCommand

OURS = os.path.basename(PLUGIN)  # fairseq_codistill
CRITERION = "codistill_ce"
PLAIN = ("cross_entropy", "label_smoothed_cross_entropy")


def find_user_dir(command: FairseqCommand) -> Optional[str]:
    """The folder that fairseq will import, None if none is named. This package's name means where it is installed.

    Raises ValueError if there is no such folder.
    """
    given = command.get("user-dir")
    if given is None or given.startswith("${"):
        return given
    if os.path.isdir(given):
        return os.path.abspath(given) if command.is_hydra else given
    if os.path.normpath(given) == OURS:
        return PLUGIN
    spec = importlib.util.find_spec("fairseq")  # imports nothing
    for package in (spec.submodule_search_locations or []) if spec else []:  # fairseq looks there next
        if any(os.path.isdir(os.path.join(package, place, given)) for place in ("", "..")):
            return given
    raise ValueError(
        f"{command.spelling('user-dir')} must be a folder, but there is no {given!r};"
        f" did you mean {command.spelling('user-dir')}{'=' if command.is_hydra else ' '}{OURS}, the installed plugin?"
    )


def check(command: FairseqCommand, save_dir: str) -> None:
    """Raises ValueError, in one sentence, for what fairseq would say after half a minute, or not at all."""
    _check_save_dir(command, save_dir)
    if command.criterion != CRITERION:
        return
    if command.get("user-dir") is None and command.is_fairseqs:  # another program may import the package itself
        raise ValueError(
            f"criterion {CRITERION} needs {command.spelling('user-dir')}, but none is given: fairseq alone does not know it;"
            f" did you forget {command.spelling('user-dir')}{'=' if command.is_hydra else ' '}{OURS}?"
        )
    smoothing = command.spelling("label-smoothing")
    if command.get("label-smoothing") is not None:
        ours = command.spelling("codistill-label-smoothing")
        raise ValueError(f"criterion {CRITERION} does not know {smoothing}; smooth labels with {ours} instead.")


def _check_save_dir(command: FairseqCommand, save_dir: str) -> None:
    option = command.spelling("save-dir")
    if "${" in save_dir:
        raise ValueError(f"{option} must be known before the peers start, but {save_dir!r} is not; give its path.")
    if "://" in save_dir:
        return
    path = os.path.abspath(save_dir)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise ValueError(f"{option} must be a folder, or one that can be made, but is {save_dir!r}, and {path} is no folder.")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{option} must be writable, but is {save_dir!r}, and in {path} you may not write.")


def notes(command: FairseqCommand, peers: int) -> list[str]:
    """What is allowed, and may be a mistake."""
    user_dir = command.get("user-dir")
    # A criterion from elsewhere may be built on this one.
    is_other = command.criterion not in PLAIN and user_dir and os.path.basename(os.path.normpath(user_dir)) != OURS
    if peers < 2 or command.criterion == CRITERION or is_other:
        return []
    return [f"these are {peers} unrelated runs, for criterion {command.criterion} exchanges nothing; {CRITERION} does."]
