"""Paths as users write them, and names of files as they may be printed."""

from __future__ import annotations

import os

# The folder for fairseq's --user-dir.
PLUGIN = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def expanded(path: str) -> str:
    """`path` with a leading ~ as the home folder: no shell expands the one in `--out=~/x`."""
    return os.path.expanduser(path)


def printable(text: str) -> str:
    """`text` without signs that a stream, a table or a terminal cannot take.

    A name is bytes to the system: those that are no UTF-8 (a Latin-1 é) are shown as \\xe9, a line feed as \\n.
    """
    return "".join(sign if sign.isprintable() else _escaped(sign) for sign in text)


def _escaped(sign: str) -> str:
    byte = ord(sign) - 0xDC00  # Python's stand-in for a byte that is no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else sign.encode("unicode_escape").decode("ascii")
