"""Read the files of the published corpora as aligned pairs of lines, without holding them in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Sequence, Tuple

Pair = Tuple[str, str]

# TED talks carry these lines between their sentences; titles and descriptions are sentences, too.
_TALK_LINES = ("<url>", "<talkid>", "<keywords>")
_TALK_TAGS = re.compile(r"</?(?:title|description)>")
_SEGMENT = "<seg id"
_SEGMENT_TAGS = re.compile(r'<seg id="[0-9]*">\s*|\s*</seg>\s*')
# What would end a line for one tool and not for another, or vanish: control characters, U+2028 and U+2029, a stray BOM.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file. Only a newline ends a line; a byte order mark at the start is no text.

    Raises ``ValueError`` that names the line where the bytes are not UTF-8.
    """
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path.name} must be UTF-8, but line {number} has the byte 0x{raw[error.start]:02x} at "
                    f"position {error.start} instead. Was it saved in another encoding?"
                ) from error
            yield (line[1:] if number == 1 and line.startswith("\ufeff") else line).rstrip("\n")


def talk_lines(path: Path) -> Iterator[str]:
    """Sentences of a ``train.tags`` file of IWSLT: no metadata lines, no tags of titles and descriptions."""
    for line in lines_of(path):
        if not any(tag in line for tag in _TALK_LINES):
            yield _TALK_TAGS.sub("", line)


def segments(path: Path) -> Iterator[str]:
    """Texts of the ``<seg id="…">`` lines of an IWSLT ``.xml`` or a WMT ``.sgm`` file, as they stand between the tags."""
    for line in lines_of(path):
        if _SEGMENT in line:
            yield _SEGMENT_TAGS.sub("", line)


def sentences(path: Path) -> Iterator[str]:
    """Of a file of any of the three kinds, by its name."""
    if path.suffix in (".xml", ".sgm"):
        return segments(path)
    return talk_lines(path) if path.name.startswith("train.tags.") else lines_of(path)


def aligned(paths: Sequence[Path]) -> Iterator[Pair]:
    """Pairs of two files; raises ``ValueError`` with both counts where one is longer than the other."""
    iterators = [sentences(path) for path in paths]
    count = 0
    ended = object()
    while True:
        pair = [next(iterator, ended) for iterator in iterators]
        if ended in pair:
            break
        count += 1
        yield pair[0], pair[1]
    if pair[0] is not pair[1]:
        counts = [count + (one is not ended) + sum(1 for _ in rest) for one, rest in zip(pair, iterators)]
        names = " and ".join(path.name for path in paths)
        raise ValueError(f"{names} must have equally many lines, but have {counts[0]} and {counts[1]} instead")


def columns(path: Path) -> Iterator[Pair]:
    """The first two columns of a text with tabs; raises ``ValueError`` that names a line with fewer."""
    for number, line in enumerate(lines_of(path), 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise ValueError(f"{path.name} must have two columns with a tab between, but line {number} has one instead")
        yield fields[0], fields[1]


def one_line(line: str) -> str:
    """``line`` such that every tool takes it for one line: blanks instead of control characters."""
    return _CONTROL.sub(" ", line)


def plain(line: str) -> str:
    """``line`` with one blank for each run of blanks and control characters, and none at the ends."""
    return " ".join(one_line(line).split())
