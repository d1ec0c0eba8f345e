"""The version of this package: the one place where it is written, which setup.py reads too."""

from __future__ import annotations

import argparse
from typing import Any

__version__ = "0.1.0"

# What a report of a fault should name beside this package. Of the two that provide `fairseq` one is installed.
_BESIDE = ("fairseq-fixed", "fairseq", "torch")


def version_line(program: str) -> str:
    """What `program --version` prints: `codistill-launch 0.1.0 (fairseq-fixed 0.12.3.1, torch 2.13.0, Python 3.11.7)`."""
    import platform

    beside = [f"{name} {found}" for name in _BESIDE if (found := _installed(name))]
    return f"{program} {__version__} ({', '.join([*beside, f'Python {platform.python_version()}'])})"


def _installed(name: str) -> str:
    """The version of a package, read from its metadata without importing it; empty where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and needed here alone

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


class VersionAction(argparse.Action):
    """`--version` in one line, which argparse's own would wrap; looked up only when it is asked for."""

    def __init__(self, option_strings: Any, dest: str, **options: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(version_line(parser.prog))
        parser.exit()
