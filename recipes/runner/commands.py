"""The command of a training as words: filled in from lines with settings, read back, printed as it may be typed."""

from __future__ import annotations

import os
import shlex
import string
from dataclasses import dataclass
from typing import Any, List, Mapping, Optional, Sequence


@dataclass
class Command:
    """``codistill-launch LAUNCHER -- fairseq-train TRAIN``; the names of the two programs are added at the end."""

    launcher: List[str]
    train: List[str]

    def words(self, launch: Sequence[str], fairseq_train: Sequence[str]) -> List[str]:
        return [*launch, *self.launcher, "--", *fairseq_train, *self.train]

    @property
    def jobs(self) -> int:
        return int(value_of(self.launcher, "--peers") or 1)


def from_literal(words: Sequence[str]) -> Command:
    """The command as a train.sh has it; ``ValueError`` if it is none."""
    if "--" not in words or words[:1] != ["codistill-launch"] or "fairseq-train" not in words:
        raise ValueError("train.sh must run codistill-launch OPTIONS -- fairseq-train OPTIONS, but runs something else")
    at = list(words).index("--")
    # Between quotes a shell leaves ~ as it is.
    train = [os.path.expanduser(word) if word.startswith("~/") else word for word in words[at + 2 :]]
    return Command(list(words[1:at]), train)


def expand(lines: Sequence[Any], values: Mapping[str, Any]) -> List[str]:
    """The words of ``lines`` with ``{setting}`` replaced.

    A line with a setting that is empty is left out, and one that is ``{ if = setting, options = line }`` where the setting is 0
    or empty. A setting that is a list gives several words.
    """
    words: List[str] = []
    for line in lines:
        if isinstance(line, Mapping):
            if not is_on(values[line["if"]]):
                continue
            line = line["options"]
        names = [name for _, name, _, _ in string.Formatter().parse(line) if name]
        if any(values[name] == "" for name in names):
            continue
        for word in shlex.split(line):
            value = values.get(word[1:-1]) if word.startswith("{") else None
            words += value if isinstance(value, list) else [word.format_map(values)]
    return words


def is_on(value: str) -> bool:
    return value not in ("", "0")


def value_of(words: Sequence[str], option: str) -> Optional[str]:
    """What follows ``option``, None if it is not there; of two the last, as for fairseq."""
    for at in range(len(words) - 2, -1, -1):
        if words[at] == option:
            return words[at + 1]
    return None


def set_value(words: List[str], option: str, value: object) -> None:
    """Replace what follows ``option`` wherever it stands, or add both at the end."""
    places = [at for at, word in enumerate(words[:-1]) if word == option]
    for at in places:
        words[at + 1] = str(value)
    if not places:
        words += [option, str(value)]
