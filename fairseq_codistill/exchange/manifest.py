"""What a peer says of itself, as JSON (format 1): a snapshot's manifest, and its heartbeat. No torch needed.

What comes from another peer is data: nothing is executed, and whatever is wrong with it is a `BadSnapshot`, in one sentence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional

FORMAT = 1
Bytes = bytes  # since a manifest has a field of that name
STATES = ("waiting", "training", "ended", "stopped")
MANIFEST_LIMIT = 1 << 20  # bytes; a manifest is small, and is read before anything is known of its writer
_FILE_NAME = re.compile(r"u\d{9}\.safetensors", re.ASCII)
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")


class BadSnapshot(ValueError):
    """A snapshot or manifest that must not be believed."""


@dataclass(frozen=True)
class Manifest:
    """What a peer says of its snapshot. `update`: updates done; `bytes`: the file's size; `time`: seconds since 1970,
    for people only, since no decision may rest on another machine's clock; `resumes_from`: the update at which the peer
    would start again if it died now; `done`: its training has ended, no later snapshot will come; `run`: the id of its run;
    `structure`: see `structure`; `options`: those that decide α, for the peer itself when it resumes. The last three are not
    in the manifests of an older version."""

    update: int
    epoch: int
    file: str
    bytes: int
    checksum: str
    dtype: str
    fingerprint: str
    model: Dict[str, Any]
    time: float
    valid_loss: Optional[float] = None
    resumes_from: int = 0
    done: bool = False
    options: Dict[str, Any] = dataclasses.field(default_factory=dict)
    format: int = FORMAT
    run: Optional[str] = None
    structure: Dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Bytes:
        return sealed(dataclasses.asdict(self))

    @staticmethod
    def from_json(data: Bytes) -> Manifest:
        """Raises BadSnapshot unless every field is there, of its type, and in its range."""
        manifest = Manifest(**_fields_of(data, Manifest, _CHECKS, "manifest"))
        if manifest.file != file_name(manifest.update):
            raise BadSnapshot(f"the manifest's file must be that of its update {manifest.update}, but is {manifest.file!r}")
        return manifest


def _digest(fields: Dict[str, Any]) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def sealed(fields: Dict[str, Any]) -> bytes:
    """With a digest of all other fields, so that no bit that a disk or a network turns is believed."""
    return json.dumps({**fields, "digest": _digest(fields)}, indent=1).encode()


def _fields_of(data: bytes, kind: type, checks: Dict[str, Callable[[Any], bool]], what: str) -> Dict[str, Any]:
    try:
        fields = json.loads(data)
        digest = fields.pop("digest", None) if isinstance(fields, dict) else None
        whole = digest == _digest(fields)
    except (ValueError, RecursionError) as error:
        raise BadSnapshot(f"the {what} is not JSON ({type(error).__name__})") from None
    if not isinstance(fields, dict):
        raise BadSnapshot(f"the {what} must be a JSON object, but is a {type(fields).__name__}")
    if fields.get("format") != FORMAT or type(fields["format"]) is not int:
        raise BadSnapshot(f"the {what}'s format must be {FORMAT}, but is {_shown(fields, 'format')}")
    known = {_key(field): field.name for field in dataclasses.fields(kind)}
    # A later version may add fields; that is no reason to lose a teacher.
    fields = {name: value for name, value in fields.items() if name in known}
    for name, good in checks.items():
        if (name not in fields and name not in _LATER) or not good(fields.get(name, _LATER.get(name))):
            raise BadSnapshot(f"the {what}'s {name} must not be {_shown(fields, name)}")
    if not whole:
        raise BadSnapshot(f"the {what} is damaged: its digest is not that of its fields")
    return {known[name]: value for name, value in fields.items()}


def _key(field: dataclasses.Field) -> str:
    """A field's name in the file."""
    return field.metadata.get("key", field.name)


def _shown(fields: Dict[str, Any], name: str) -> str:
    """A field's value for a sentence: short, and without control characters."""
    value = fields.get(name, "missing")
    # A list or an object can be as deep as the parser's stack, too deep to be shown.
    return f"a {type(value).__name__}" if isinstance(value, (list, dict)) else ascii(str(value)[:80])


def plain(text: str, limit: int = 160) -> str:
    """Text of unknown origin, fit for a terminal: short, and without control characters."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in text[:limit])
    return shown + ("..." if len(text) > limit else "")


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def is_run_id(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{8,64}", value) is not None


def _setting(value: object) -> bool:
    """Of an option: fit to be compared and shown, whoever wrote it."""
    if isinstance(value, list):
        return len(value) < 1000 and all(type(number) in (int, float) for number in value)
    return value is None or type(value) in (bool, int, float) or (_text(value) and len(str(value)) < 80)


def _text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable()


# Fields that an older version does not write.
_LATER: Dict[str, Any] = {"run": None, "structure": {}, "seed": None, "options": {}}
_CHECKS = {
    "update": lambda v: _count(v) and v < 10**9,  # nine digits of the file's name
    "epoch": _count,
    "file": lambda v: isinstance(v, str) and _FILE_NAME.fullmatch(v) is not None,
    "bytes": _count,
    "checksum": lambda v: isinstance(v, str) and _CHECKSUM.fullmatch(v) is not None,
    "dtype": lambda v: isinstance(v, str) and len(v) < 40,
    "fingerprint": lambda v: isinstance(v, str) and len(v) < 100,
    "model": lambda v: isinstance(v, dict),
    "time": _number,
    "valid_loss": lambda v: v is None or _number(v),
    "resumes_from": _count,
    "done": lambda v: isinstance(v, bool),
    "run": lambda v: v is None or is_run_id(v),
    "options": lambda v: isinstance(v, dict) and all(map(_setting, v.values())),
    "structure": lambda v: isinstance(v, dict) and all(isinstance(fact, str) for fact in v.values()),
}


def file_name(update: int) -> str:
    return f"u{update:09d}.safetensors"


def manifest_name(update: int) -> str:
    return f"u{update:09d}.json"


@dataclass(frozen=True)
class Heartbeat:
    """`peer0/alive.json`, renewed every few seconds. Only a change of `beat` proves anything: `time`
    (seconds since 1970) is by the writer's clock, which may be days off. `start_id`: a random one for each start of
    the process (`life` in the file);
    `updates`: where training ends, if known; `speed`: updates per second; `teachers`: update held of each peer; `run`: the id
    of its run, and `seed`, both unknown of an older version."""

    start_id: str = dataclasses.field(metadata={"key": "life"})
    beat: int
    state: str  # waiting, training, ended (completed), stopped
    host: str
    pid: int
    time: float
    update: int = 0
    updates: Optional[int] = None
    speed: Optional[float] = None
    teachers: Dict[str, int] = dataclasses.field(default_factory=dict)
    format: int = FORMAT
    run: Optional[str] = None
    seed: Optional[int] = None

    def to_json(self) -> bytes:
        return sealed({_key(field): getattr(self, field.name) for field in dataclasses.fields(self)})

    @staticmethod
    def from_json(data: bytes) -> Heartbeat:
        """Raises BadSnapshot unless every field is there, of its type, and in its range."""
        return Heartbeat(**_fields_of(data, Heartbeat, _HEARTBEAT_CHECKS, "heartbeat"))


_HEARTBEAT_CHECKS = {
    "life": _text,
    "beat": _count,
    "state": lambda v: v in STATES,
    "host": _text,
    "pid": _count,
    "time": _number,
    "update": _count,
    "updates": lambda v: v is None or _count(v),
    "speed": lambda v: v is None or (_number(v) and v >= 0),
    "teachers": lambda v: isinstance(v, dict) and all(name.isdecimal() and _count(v[name]) for name in v),
    "run": lambda v: v is None or is_run_id(v),
    "seed": lambda v: v is None or _count(v),
}
