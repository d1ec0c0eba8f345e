"""One peer's weights as bytes: taken from a model, written, verified, read (format 1).

Nothing here touches files. Nothing that is read is executed: the weights are safetensors, the manifest is JSON.
Whatever is wrong with a peer's bytes is a `BadSnapshot`, in one sentence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Dict, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

FORMAT = 1
MANIFEST_LIMIT = 1 << 20  # bytes; a manifest is small, and is read before anything is known of its writer
_HEADER_LIMIT = 1 << 20  # bytes that names, shapes and padding may add to the weights
_FILE_NAME = re.compile(r"u\d{9}\.safetensors")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
# fairseq's sinusoidal positions keep one uninitialised number to know their dtype by: noise, and at times not finite.
_NO_WEIGHT = "_float_tensor"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Weights = Dict[str, Tensor]


class BadSnapshot(ValueError):
    """A snapshot or manifest that must not be believed."""


@dataclass(frozen=True)
class Manifest:
    """What a peer says of its snapshot. `update`: updates done; `bytes`: the file's size; `time`: seconds since 1970,
    for people only, since no decision may rest on another machine's clock; `resumes_from`: the update at which the peer
    would start again if it died now; `done`: its training has ended, no later snapshot will come."""

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
    format: int = FORMAT

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Raises BadSnapshot unless every field is there, of its type, and in its range."""
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSnapshot(f"the manifest is not JSON ({type(error).__name__})") from None
        if not isinstance(fields, dict):
            raise BadSnapshot(f"the manifest must be a JSON object, but is a {type(fields).__name__}")
        if fields.get("format") != FORMAT:
            raise BadSnapshot(f"the manifest's format must be {FORMAT}, but is {str(fields.get('format'))[:40]}")
        known = {field.name for field in dataclasses.fields(Manifest)}
        # A later version may add fields; that is no reason to lose a teacher.
        fields = {name: value for name, value in fields.items() if name in known}
        for name, good in _CHECKS.items():
            if name not in fields or not good(fields[name]):
                raise BadSnapshot(f"the manifest's {name} must not be {str(fields.get(name, 'missing'))[:80]!r}")
        return Manifest(**fields)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


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
}


def file_name(update: int) -> str:
    return f"u{update:09d}.safetensors"


def manifest_name(update: int) -> str:
    return f"u{update:09d}.json"


def tensors_of(model: nn.Module) -> Weights:
    """The model's own parameters and buffers by name; tied ones once, by the first name. They share the model's memory."""
    tensors: Weights = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        if not torch.is_tensor(tensor) or name.split(".")[-1] == _NO_WEIGHT:
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        tensors[name] = tensor
    return tensors


def copy_of(model: nn.Module) -> Weights:
    """A consistent copy in main memory."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors_of(model).items()}


def fingerprint(model: nn.Module) -> str:
    """Names and shapes of the model's tensors as one hash: equal for one architecture in any precision."""
    lines = (f"{name} {tuple(tensor.shape)}\n" for name, tensor in sorted(tensors_of(model).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def encode(weights: Weights) -> bytes:
    """Raises BadSnapshot when a value is not finite: a diverged model must not teach."""
    _check_finite(weights)
    return save(weights)


def checksum(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def describe(weights: Weights, data: bytes, update: int, **facts: Any) -> Manifest:
    """The manifest of `data`, which encodes `weights` as they were after `update` updates."""
    floats = [t.dtype for t in weights.values() if t.is_floating_point()]
    dtype = str(floats[0]).replace("torch.", "") if floats else "none"
    return Manifest(
        update=update, file=file_name(update), bytes=len(data), checksum=checksum(data), dtype=dtype, **facts
    )


def size_limit(expected: Weights) -> int:
    """The most bytes that a snapshot of these tensors can honestly have."""
    return sum(max(8, t.element_size()) * t.numel() + len(name) for name, t in expected.items()) + _HEADER_LIMIT


def check_manifest(manifest: Manifest, fingerprint: str, expected: Weights) -> None:
    """Before the file is read: is it of my architecture, and can it be as large as it says? Else BadSnapshot."""
    if manifest.fingerprint != fingerprint:
        raise BadSnapshot(
            f"its architecture (fingerprint {manifest.fingerprint[:20]!r}) is not mine ({fingerprint}); "
            "all peers must have the same model"
        )
    if manifest.bytes > size_limit(expected):
        raise BadSnapshot(f"its {manifest.bytes} bytes are more than this model can have ({size_limit(expected)})")


def decode(data: bytes, manifest: Manifest, expected: Weights) -> Weights:
    """The tensors of a snapshot, believed only if size, checksum, names, shapes, kinds and values are as promised.

    `expected`: my own model's tensors, for names and shapes. Raises BadSnapshot, in one sentence.
    """
    if len(data) != manifest.bytes:
        raise BadSnapshot(f"it has {len(data)} bytes, but its manifest promises {manifest.bytes}")
    if checksum(data) != manifest.checksum:
        raise BadSnapshot("its checksum is not the one that its manifest promises")
    try:
        weights = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise BadSnapshot(f"it is not a safetensors file ({str(error)[:80]})") from None
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())[0]
        raise BadSnapshot(f"its tensors are not my model's: {odd[:80]!r} stands on one side only")
    for name, tensor in weights.items():
        _check_kind(name, tensor, expected[name])
    _check_finite(weights)
    return weights


def _check_kind(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise BadSnapshot(f"{name!r} has shape {tuple(tensor.shape)}, but my model's has {tuple(expected.shape)}")
    same = tensor.dtype in _FLOATS if expected.is_floating_point() else tensor.dtype == expected.dtype
    if not same:
        raise BadSnapshot(f"{name!r} is {tensor.dtype}, but my model's is {expected.dtype}")


def _check_finite(weights: Weights) -> None:
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadSnapshot(f"{name!r} has values that are not finite")
