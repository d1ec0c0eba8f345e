"""Checks of settings, each with one sentence for what is wrong, and what both tasks compute from them."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

from .commands import expand
from .tasks import OFF, Task


def count(values: Mapping[str, Any], *names: str) -> None:
    """Each must be a whole number of at least 1; ``ValueError`` otherwise."""
    for name in names:
        if not re.fullmatch("[1-9][0-9]*", values[name]):
            raise ValueError(f"{name.upper()} must be a whole number of at least 1, but is {values[name] or OFF} instead")


def one_of(values: Mapping[str, Any], name: str, *choices: str) -> None:
    """Raises ``ValueError`` for another value."""
    if values[name] not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ValueError(f"{name.upper()} must be {listed}, but is {values[name] or OFF} instead")


def whole(values: Mapping[str, Any], name: str) -> None:
    """It must be a whole number; ``ValueError`` otherwise."""
    if not re.fullmatch("[0-9]+", values[name]):
        raise ValueError(f"{name.upper()} must be a whole number, but is {values[name] or OFF} instead")


def check_folders(values: Dict[str, Any], data_is: str) -> None:
    """DATA and OUT must be given; a leading ~ in them becomes the home folder, since between quotes a shell leaves it."""
    if not values["data"]:
        raise ValueError(f"DATA must be {data_is}, but is not set")
    if not values["out"]:
        raise ValueError("OUT must be the folder for the runs, but is not set")
    for name in ("data", "out"):
        values[name] = os.path.expanduser(values[name]) if values[name].startswith("~/") else values[name]


def choose_method(task: Task, values: Dict[str, Any]) -> Mapping[str, Any]:
    """Set ``jobs`` and ``run``, its folder; returns the method's table."""
    one_of(values, "method", *task.methods)
    method = task.methods[values["method"]]
    values["jobs"] = method.get("jobs", "1").format_map(values)
    name = values["name"] or method.get("name", values["method"]).format_map(values)
    values["run"] = f"{values['out']}/{name}/seed{values['seed']}"
    return method


def set_objective(method: Mapping[str, Any], values: Dict[str, Any]) -> None:
    """The method's options, once all that they need is there."""
    values["objective"] = expand(method["options"], values)


def split_words(values: Dict[str, Any], names: Sequence[str]) -> None:
    """Settings that hold several options: at blanks, without a shell's quotes."""
    for name in names:
        values[name] = values[name].split()


def visible_gpus() -> int:
    """Those that CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return sum(1 for device in named.split(",") if device.strip())
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return 0
    return sum(1 for line in listed.splitlines() if line.startswith("GPU"))


def line_count(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
