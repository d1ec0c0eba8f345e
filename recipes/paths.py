"""Paths on the command lines of the recipes."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str) -> Path:
    """A path; `~` is the home folder here too, since a shell leaves it as it is in `--out=~/runs` and between quotes."""
    return Path(os.path.expanduser(text))
