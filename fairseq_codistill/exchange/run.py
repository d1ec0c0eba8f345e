"""run.json: which run this is, and what its peers must agree on."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from dataclasses import dataclass
from typing import Any, Dict, Optional

from .manifest import FORMAT, BadSnapshot, is_run_id, plain

PEERS_LIMIT = 4096  # a run.json that promises more is not a run's


@dataclass(frozen=True)
class Run:
    """What the peers of one run must agree on. The dictionary is the target side's; None where the task has none.

    `source_sha256`: of the source dictionaries; `interval`: updates between two exchanges; `id`: which run it is, since one
    that begins anew in the same place must not learn from the last one's weights; `seed`: this peer's own, in no file of
    the run. What is None is not compared: an older version did not say it.
    """

    peers: int
    dictionary_sha256: Optional[str]
    classes: Optional[int]
    format: int = FORMAT
    source_sha256: Optional[str] = None
    interval: Optional[int] = None
    lockstep: Optional[bool] = None
    id: Optional[str] = None
    seed: Optional[int] = None

    def to_json(self) -> bytes:
        fields = dataclasses.asdict(self)
        del fields["seed"]
        return json.dumps({name: v for name, v in fields.items() if v is not None or name in _ALWAYS}, indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> Run:
        """Raises BadSnapshot for what is no run of any format."""
        try:
            fields = json.loads(data)
            known = {name: fields[name] for name in _CHECKS if name in fields or name in _ALWAYS}
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise BadSnapshot(f"it is not the JSON of a run ({type(error).__name__})") from None
        for name, value in known.items():
            if not (_CHECKS[name](value) or (value is None and name not in ("peers", "format"))):
                raise BadSnapshot(f"its {name} must not be {ascii(str(value)[:40])}")
        return Run(**known)

    def renewed(self) -> Run:
        """The same agreement as another run."""
        return dataclasses.replace(self, id=secrets.token_hex(8))


_ALWAYS = ("peers", "dictionary_sha256", "classes", "format")
_CHECKS: Dict[str, Any] = {
    "peers": lambda v: type(v) is int and 1 <= v <= PEERS_LIMIT,
    "dictionary_sha256": lambda v: isinstance(v, str) and len(v) < 100,
    "classes": lambda v: type(v) is int and 0 <= v < 1 << 62,
    "format": lambda v: type(v) is int and 0 <= v < 1 << 31,
    "source_sha256": lambda v: isinstance(v, str) and len(v) < 100,
    "interval": lambda v: type(v) is int and 1 <= v < 1 << 62,
    "lockstep": lambda v: isinstance(v, bool),
    "id": is_run_id,
}
# What a run is made of, and what may be changed when all of its peers are started again.
_MADE_OF = {
    "format": "snapshot format", "classes": "target dictionary", "dictionary_sha256": "target dictionary",
    "source_sha256": "source dictionary",
}  # fmt: skip
_CHANGEABLE = {"peers": "number of peers", "interval": "--codistill-interval", "lockstep": "--codistill-sync"}


def other_making(own: Run, theirs: Run) -> Optional[str]:
    """What of the run's making is not the same; None if all of it is."""
    return _first_difference(own, theirs, _MADE_OF)


def other_setting(own: Run, theirs: Run) -> Optional[str]:
    """Which of the settings is not the same that may be changed when all peers start again; None if all are."""
    return _first_difference(own, theirs, _CHANGEABLE)


def _first_difference(own: Run, theirs: Run, labels: Dict[str, str]) -> Optional[str]:
    for name, label in labels.items():
        both = getattr(own, name), getattr(theirs, name)
        if both[0] != both[1] and (None not in both or name in _ALWAYS):
            return label
    return None


def in_words(run: Run) -> str:
    """For a sentence: short, and plain whatever the file held."""
    sha256, words = run.dictionary_sha256, [f"{run.peers} peer{'' if run.peers == 1 else 's'}"]
    if sha256 is None:
        words.append("no dictionary")
    else:
        words.append(f"a dictionary of {run.classes} symbols (sha256 {_short(sha256)})")
    if run.source_sha256 is not None:
        words.append(f"a source dictionary of sha256 {_short(run.source_sha256)}")
    if run.interval is not None:
        words.append(f"interval {run.interval}")
    if run.lockstep is not None:
        words.append("in lockstep" if run.lockstep else "not in lockstep")
    return ", ".join([*words, f"format {run.format}"])


def _short(sha256: str) -> str:
    return re.sub("[^0-9a-f]", "?", plain(sha256[:12]))
