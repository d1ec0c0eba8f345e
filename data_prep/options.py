"""What the values of command line options must be."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text} instead")
    return int(text)


def user_path(text: str) -> Path:
    """A path; `~` is the home folder here too, since a shell leaves it as it is in `--out=~/data` and between quotes."""
    return Path(os.path.expanduser(text))
