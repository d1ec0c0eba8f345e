"""What a failed peer's log says of the reason: the one sentence where there is one, else its end."""

from __future__ import annotations

import re
from typing import Optional

from .progress import last_lines

_TRACEBACK = "Traceback (most recent call last):"
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*: \S")
_PLACE = re.compile(r'\s+File "(?P<file>.+)", line (?P<line>\d+)')
_USAGE = re.compile(r"[\w./-]+: error: \S")  # argparse's
# What follows on another line, but is another matter: a warning (file.py:12: …), a record of a log, the next rank's words.
_OTHER = re.compile(r"\S+:\d+: |\d{4}-\d\d-\d\d |\[\d{4}-|[A-Z]\d{4} \d\d:|-- Process |Set the environment variable HYDRA")
_LOOK_BACK = 400  # lines
_AFTER = 40  # lines that may come after the sentence: warnings as Python ends, other ranks
_SENTENCE_LINES = 12


def reason(log: str) -> tuple[str, list[str]]:
    """Of the newest start in `log`: the sentence ("" where there is none), and the lines to show."""
    try:
        lines = last_lines(log, _LOOK_BACK, cut=False)
    except OSError as error:
        return "", [f"the log cannot be read: {error.strerror}"]
    starts = [i for i, line in enumerate(lines) if line.startswith("=== ") and "| codistill-launch |" in line]
    lines = lines[starts[-1] + 1 :] if starts else lines
    found = _exception(lines) or _usage(lines)
    return ("\n".join(found), found) if found else ("", last_lines(log))


def same_for_all(sentence: str) -> str:
    """A sentence without what differs between peers that fail for one reason: their index."""
    return re.sub(r"\b([Pp]eer(?:\s|=|_)?)\d+\b", r"\1N", sentence)


def _exception(lines: list[str]) -> Optional[list[str]]:
    starts = [i for i, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    # An exception's own line is the first behind its traceback that is not indented.
    end = next((i for i in range(starts[-1] + 1, len(lines)) if not lines[i][0].isspace()), None) if starts else None
    if end is None or len(lines) - end > _AFTER or not _EXCEPTION.match(lines[end]):
        return None
    more = lines[end + 1 : end + _SENTENCE_LINES]
    other = next((i for i, line in enumerate(more) if _OTHER.match(line)), len(more))
    places = [match for match in map(_PLACE.match, lines[starts[-1] : end]) if match]
    # A ValueError here is a sentence for the user; of any other exception one wants to know where it was.
    is_plain = lines[end].startswith("ValueError: ") or not places
    where = [] if is_plain else [f"  in {places[-1]['file']}, line {places[-1]['line']}"]
    return [lines[end], *more[:other], *where]


def _usage(lines: list[str]) -> Optional[list[str]]:
    return next(([line] for line in reversed(lines[-5:]) if _USAGE.match(line)), None)
