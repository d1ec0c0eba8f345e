"""One peer's weights as bytes: taken from a model, written, verified, read (format 1).

Nothing here touches files. Nothing that is read is executed: the weights are safetensors, and never a pickle.
Whatever is wrong with a peer's bytes is a `BadSnapshot`, in one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any, Callable, Dict, List, Optional, Tuple, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from .manifest import BadSnapshot, Manifest, file_name, plain

_HEADER_LIMIT = 1 << 20  # bytes that names, shapes and padding may add to the weights
_PIECE = 1 << 19  # values looked at before the next: they stay in the cache from one check to the other
# fairseq's sinusoidal positions keep one uninitialised number to know their dtype by: noise, and at times not finite.
_NO_WEIGHT = "_float_tensor"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_WIRES = ("float32", "bfloat16", "float16", "int8")
_SCALE = ":scale"
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

Weights = Dict[str, Tensor]


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


def fingerprint(model: nn.Module) -> str:
    """Names and shapes of the model's tensors as one hash: equal for one architecture in any precision."""
    lines = (f"{name} {tuple(tensor.shape)}\n" for name, tensor in sorted(tensors_of(model).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


class Layout:
    """Where each tensor lies in the safetensors file of one model's snapshot.

    `expected`: the model's tensors, for names, shapes and dtypes. `wire`: what floats travel as; None leaves them as they
    are. With int8 a tensor of two or more dimensions becomes whole numbers and a scale for each row (`NAME:scale`, float32);
    the others, which are small, become bf16.
    """

    def __init__(self, expected: Weights, wire: Optional[torch.dtype] = None) -> None:
        kinds = {name: (_kind(tensor, wire), tuple(tensor.shape)) for name, tensor in expected.items()}
        for name in [name for name, (dtype, _) in kinds.items() if wire == torch.int8 and expected[name].is_floating_point()]:
            if kinds[name][0] == torch.int8:
                kinds[name + _SCALE] = (torch.float32, kinds[name][1][:1])
        # The wide ones first, so that each tensor begins at a multiple of its size.
        order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
        header: Dict[str, Any] = {}
        end = 0
        for name in order:
            dtype, shape = kinds[name]
            begin, end = end, end + dtype.itemsize * math.prod(shape)
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = len(text).to_bytes(8, "little") + text
        self.bytes = len(self.head) + end
        self.dtype = str(wire or next((d for d, _ in kinds.values() if d.is_floating_point), "none")).replace("torch.", "")
        self._places = {name: (*header[name]["data_offsets"], *kinds[name]) for name in order}

    def views(self, file: Tensor) -> Weights:
        """The tensors in `file`, the bytes of a snapshot of this layout; they share its memory, in its order."""
        body = file[len(self.head) :]
        return {name: body[begin:end].view(dtype).view(shape) for name, (begin, end, dtype, shape) in self._places.items()}

    def examine(self, file: Tensor) -> Tuple[str, Optional[str]]:
        """The file's checksum, and the name of a tensor that is not finite, if there is one: memory is read only once."""
        digest, bad = hashlib.sha256(self.head), None
        for name, tensor in self.views(file).items():
            for piece in tensor.view(-1).split(_PIECE):
                digest.update(piece.view(torch.uint8).numpy())
                bad = bad if bad is not None or _is_finite(piece) else name
        return "sha256:" + digest.hexdigest(), bad


class Buffer:
    """One model's snapshot as the bytes of a safetensors file: laid out once, filled by one copy of the weights each time.

    The library's own `save` copies twice and holds Python's lock meanwhile, 0.4 s for 140 MB: training would stand still.
    `expected` and `wire`: see `Layout`.
    """

    def __init__(self, expected: Weights, wire: Optional[torch.dtype] = None) -> None:
        self._layout = Layout(expected, wire)
        self.dtype = self._layout.dtype
        self._on_gpu = any(tensor.is_cuda for tensor in expected.values())
        self._file = torch.empty(self._layout.bytes, dtype=torch.uint8, pin_memory=self._on_gpu)
        self.data = memoryview(self._file.numpy())  # type: ignore[arg-type]
        self.data[: len(self._layout.head)] = self._layout.head
        self._views = self._layout.views(self._file)

    @staticmethod
    def of(weights: Weights, wire: Optional[torch.dtype] = None) -> Buffer:
        buffer = Buffer(weights, wire)
        buffer.fill(weights)()
        return buffer

    def fill(self, weights: Weights) -> Callable[[], None]:
        """Copy the weights, which may change as soon as this returns; the function returned waits for the copy's end.

        On a GPU they are copied there first, in the wire's dtype, and go to main memory beside the training.
        """
        pairs = [pair for name, tensor in weights.items() for pair in self._pairs(name, tensor.detach())]
        if not self._on_gpu:
            for view, tensor in pairs:
                view.copy_(tensor)
            return lambda: None
        pairs = [(view, tensor.to(view.dtype, copy=True)) for view, tensor in pairs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for view, tensor in pairs:
                view.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
        return stream.synchronize

    def _pairs(self, name: str, tensor: Tensor) -> List[Tuple[Tensor, Tensor]]:
        """(where to, what): one pair, or two for a tensor that travels in 8 bits."""
        scale_view = self._views.get(name + _SCALE)
        if scale_view is None:
            return [(self._views[name], tensor)]
        rows = tensor.flatten(1).float()
        scale = rows.abs().amax(1) / 127 if rows.numel() else rows.new_zeros(len(rows))
        whole = (rows / scale.clamp_min(torch.finfo(scale.dtype).tiny).unsqueeze(1)).round().view(tensor.shape)
        return [(self._views[name], whole), (scale_view, scale)]

    def checksum(self) -> str:
        """Raises BadSnapshot when a value is not finite: a diverged model must not teach."""
        checksum, bad = self._layout.examine(self._file)
        _refuse_not_finite(bad)
        return checksum


def _kind(tensor: Tensor, wire: Optional[torch.dtype]) -> torch.dtype:
    dtype = wire if wire is not None and tensor.is_floating_point() else tensor.dtype
    dtype = torch.bfloat16 if dtype == torch.int8 and tensor.is_floating_point() and tensor.dim() < 2 else dtype
    if dtype not in _NAMES:
        raise BadSnapshot(f"a tensor of {dtype} cannot be published")
    return dtype


def checksum(data: Union[bytes, memoryview]) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def describe(data: Union[bytes, Buffer], update: int, **facts: Any) -> Manifest:
    """The manifest of `data`, a file that holds the weights as they were after `update` updates.

    Raises BadSnapshot for a buffer that holds what is not finite."""
    if isinstance(data, Buffer):
        facts, checksum_, size = {"dtype": data.dtype, **facts}, data.checksum(), len(data.data)
    else:
        checksum_, size = checksum(data), len(data)
    # Readers would refuse the manifest, and with it good weights.
    loss = facts.pop("valid_loss", None)
    loss = loss if loss is not None and math.isfinite(loss) and abs(loss) < 1e300 else None
    return Manifest(update=update, file=file_name(update), bytes=size, checksum=checksum_, valid_loss=loss, **facts)


def size_limit(expected: Weights) -> int:
    """The most bytes that a snapshot of these tensors can honestly have."""
    return sum(max(4, t.element_size()) * t.numel() + 4 * _rows(t) for t in expected.values()) + _HEADER_LIMIT


def check_manifest(manifest: Manifest, fingerprint: str, expected: Weights) -> None:
    """Before the file is read: is it of this peer's architecture, and can it be as large as it says? Else BadSnapshot."""
    if manifest.fingerprint != fingerprint:
        raise BadSnapshot(
            f"its architecture (fingerprint {manifest.fingerprint[:20]!r}) is not this peer's ({fingerprint}); "
            "all peers must have the same model"
        )
    if manifest.bytes > size_limit(expected):
        raise BadSnapshot(f"its {manifest.bytes} bytes are more than this model can have ({size_limit(expected)})")


def decode(data: bytes, manifest: Manifest, expected: Weights) -> Weights:
    """The tensors of a snapshot, believed only if size, checksum, names, shapes, kinds and values are as promised.

    `expected`: tensors of this peer's model, for names and shapes. Raises BadSnapshot, in one sentence.
    """
    if len(data) != manifest.bytes:
        raise BadSnapshot(f"it has {len(data)} bytes, but its manifest promises {manifest.bytes}")
    own = _in_own_layout(data, manifest, expected)
    weights, found, bad = own or (None, checksum(data), None)
    if found != manifest.checksum:
        raise BadSnapshot("its checksum is not the one that its manifest promises")
    _refuse_not_finite(bad)
    weights = _in_any_layout(bytes(data)) if weights is None else weights
    scales = {name: weights.pop(name + _SCALE) for name in expected if name + _SCALE in weights}
    if weights.keys() != expected.keys():
        odd = sorted(weights.keys() ^ expected.keys())[0]
        raise BadSnapshot(f"its tensors are not those of this peer's model: {odd[:80]!r} stands on one side only")
    for name, tensor in weights.items():
        _check_kind(name, tensor, expected[name], scales.get(name))
    if own is None:
        _check_finite({**weights, **scales})
    scaled = {n: weights[n].float() * scale.view(-1, *[1] * (weights[n].dim() - 1)) for n, scale in scales.items()}
    _check_finite(scaled)
    return {**weights, **scaled}


def _in_own_layout(data: bytes, manifest: Manifest, expected: Weights) -> Optional[Tuple[Weights, str, Optional[str]]]:
    """What `data` holds, without a copy, if it is laid out as this peer would write it: tensors, checksum, those not finite.

    If the header equals this peer's own to the bit, parsing is skipped: names, shapes and places are known.
    """
    wire = getattr(torch, manifest.dtype, None) if manifest.dtype in _WIRES else None
    if wire is None or not isinstance(data, bytearray):  # torch wants memory that it might write to
        return None
    layout = Layout(expected, wire)
    if layout.bytes != len(data) or data[: len(layout.head)] != layout.head:
        return None
    file = torch.frombuffer(data, dtype=torch.uint8)
    return (layout.views(file), *layout.examine(file))


def _in_any_layout(data: bytes) -> Weights:
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise BadSnapshot(f"it is not a safetensors file ({plain(str(error), 80)})") from None


def _check_kind(name: str, tensor: Tensor, expected: Tensor, scale: Optional[Tensor]) -> None:
    if tensor.shape != expected.shape:
        shape = str(tuple(tensor.shape))[:80]
        raise BadSnapshot(f"{name!r} has shape {shape}, but this peer's model has {tuple(expected.shape)}")
    if scale is not None:
        scaled = expected.is_floating_point() and expected.dim() > 1 and tensor.dtype == torch.int8
        same = scaled and scale.dtype == torch.float32 and scale.shape == expected.shape[:1]
    else:
        same = tensor.dtype in _FLOATS if expected.is_floating_point() else tensor.dtype == expected.dtype
    if not same:
        raise BadSnapshot(f"{name!r} is {tensor.dtype}, but in this peer's model it is {expected.dtype}")


def _check_finite(weights: Weights) -> None:
    _refuse_not_finite(next((name for name, tensor in weights.items() if not _is_finite(tensor)), None))


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Whatever is not finite shows in the extremes; isfinite on every value is 15 times slower.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(low) and math.isfinite(high)


def _refuse_not_finite(name: Optional[str]) -> None:
    if name is not None:
        raise BadSnapshot(f"{name!r} has values that are not finite")


def _rows(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.dim() else 1
