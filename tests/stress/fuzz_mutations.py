"""Ways to damage or forge what a peer publishes. Each takes a random generator and the files, and changes the files.

Two families. *Damage* is what disks, networks and mistakes do: nothing is recomputed, so the reader must see that something
is wrong, or find everything as it was published. *Forgery* is what somebody with write access could do: sizes, checksums
and digests are made to fit again, so that the mutation reaches the decoder behind them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from random import Random
from typing import Any, Callable, Dict, Tuple

import fuzz_damage
from fuzz_damage import LATEST, MANIFEST, WEIGHTS, Files, Mutation, put, sealed

# Forgery of weights: the file is taken apart, changed, put together, and both manifests vouch for it.


def take_apart(data: bytes) -> Tuple[Dict[str, Any], bytes]:
    """A safetensors file's header and body."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_together(header: Any, body: bytes, size: int = -1) -> bytes:
    """`header`: bytes as they are, anything else as JSON; `size`: what to say that it has, -1 for the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", (len(text) if size < 0 else size) % 2**64) + text + body


def vouch(files: Files, weights: bytes) -> None:
    files[WEIGHTS] = weights
    fields = {**json.loads(files[LATEST]), "bytes": len(weights)}
    fields["checksum"] = "sha256:" + hashlib.sha256(weights).hexdigest()
    put(files, [LATEST, MANIFEST], sealed(fields))


def _forgery(change: Callable[[Random, Dict[str, Any], bytes], bytes]) -> Mutation:
    def mutate(random: Random, files: Files) -> None:
        vouch(files, change(random, *take_apart(files[WEIGHTS])))

    return mutate


WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ODD_DTYPES = ("F8_E4M3", "F8_E5M2", "U16", "U32", "U64", "C64", "F4", "f32", "", "pickle", None, 7, "X" * 10_000)


def dtypes_changed(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    """To one of the same width, so that the offsets stay right; or of any, or to none that there is."""
    one = header[random.choice(sorted(header))]
    same = [name for name, width in WIDTHS.items() if width == WIDTHS[one["dtype"]] and name != one["dtype"]]
    one["dtype"] = random.choice([*same, *same, *WIDTHS, *ODD_DTYPES])
    return put_together(header, body)


def shapes_changed(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    one = header[random.choice(sorted(header))]
    shape, count = one["shape"], 1
    for length in shape:
        count *= length
    one["shape"] = random.choice(
        (shape[::-1], [count], [*shape, 1], [1, *shape], shape[:-1], [], [-1], [2**63], [2**32, 2**32], [0], [0, 2**62], [1.5],
         ["1"], None, [1] * 70_000 + shape, [1] * 1000 + shape, [count, 1], [2**64 - 1, 2**64 - 1], [[1]])
    )  # fmt: skip
    return put_together(header, body)


def offsets_changed(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    names = sorted(header)
    one, other = header[random.choice(names)], header[random.choice(names)]
    begin, end = one["data_offsets"]
    one["data_offsets"] = random.choice(
        (other["data_offsets"], [end, begin], [begin + 4, end + 4], [begin, end + 4], [begin, begin], [0, len(body)],
         [-4, end], [begin, 2**63], [2**64 - 4, 2**64], [begin + 0.0, end], None, [begin], [begin, end, end],
         [10**30, 10**30 + end - begin])
    )  # fmt: skip
    return put_together(header, body)


def tensors_swapped(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    """Two tensors under each other's names: with all that belongs to them, or with the other's offsets only."""
    first, second = random.sample(sorted(header), 2)
    if random.random() < 0.5:
        header[first], header[second] = header[second], header[first]
    else:
        a, b = header[first], header[second]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]
    return put_together(header, body)


def names_changed(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    name = random.choice(sorted(header))
    odd = (
        "",
        "../" * 40,
        "\0",
        "é" * 300,
        "n" * 400_000,
        name + "\u200b",
        name.upper(),
        name + ":scale",
        "__metadata__",
        "__class__",
    )
    header[random.choice(odd)] = header.pop(name)
    return put_together(header, body)


def tensors_missing_or_added(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    """One less or many more; the body grows or shrinks with them, so that the library finds the file in order."""
    last = max(header, key=lambda name: header[name]["data_offsets"])
    begin, end = header[last]["data_offsets"]
    how = random.randrange(4)
    if how == 0:
        header.pop(last)
        return put_together(header, body[:begin])
    if how == 1:
        header[last + random.choice(("2", ":scale", "é"))] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
        return put_together(header, body + b"\0\0\x80\x3f")
    if how == 2:
        header.update({f"x{i}": {"dtype": "U8", "shape": [0], "data_offsets": [end, end]} for i in range(5000)})
        return put_together(header, body)
    header["large"] = {"dtype": "U8", "shape": [900_000], "data_offsets": [end, end + 900_000]}
    return put_together(header, body + bytes(900_000))


def header_odd(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    """A header that is huge, deep, doubled, of another size than it says, or no header."""
    text = json.dumps(header).encode()
    name = random.choice(sorted(header))
    doubled = text[:-1] + b", " + json.dumps(name).encode() + b": " + json.dumps(header[random.choice(sorted(header))]).encode()
    odd = (
        put_together(text, body, 2**63), put_together(text, body, 2**64 - 1), put_together(text, body, 0),
        put_together(text, body, len(text) - 1), put_together(text, body, len(text) + len(body)),
        put_together(text, body, 10**8),
        put_together(text + b" " * 900_000, body), put_together(b"[" * 500_000, body), put_together(b'{"a":' * 100_000, body),
        put_together(b'{"__metadata__": ' + b"[" * 200 + b"]" * 200 + b", " + text[1:], body),
        put_together({"__metadata__": {"k": "v" * 500_000}, **header}, body), put_together({"__metadata__": 1, **header}, body),
        put_together(doubled + b"}", body), put_together([], body), put_together({}, body), put_together({}, b""),
        put_together(b"\xff" + text, body), put_together(b"", b""), put_together(text.replace(b"1", b"1e0"), body), b"",
        b"\0" * 7, put_together(b'{"x": ' + b"9" * 500_000 + b"}", body), b"PK\x03\x04" + body, b"\x80\x02." + body,
    )  # fmt: skip
    return random.choice(odd)


def body_resized(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    return put_together(header, random.choice((b"", body[:-1], body + b"\0", body[4:], body * 2, body + bytes(900_000))))


# Of each float's width: not a number, infinite, and so large that a scale or another dtype makes it infinite.
ODD_FLOATS = {
    "F64": ("000000000000f87f", "000000000000f07f", "ffffffffffffef7f"), "F32": ("0000c07f", "000080ff", "ffff7f7f"),
    "F16": ("007e", "007c", "ff7b"), "BF16": ("c07f", "80ff", "7f7f"),
}  # fmt: skip


def values_not_finite(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    floats = [one for one in header.values() if one["dtype"] in ODD_FLOATS and one["data_offsets"][0] < one["data_offsets"][1]]
    one, changed = random.choice(floats), bytearray(body)
    width = WIDTHS[one["dtype"]]
    at = random.randrange(*one["data_offsets"], width)
    changed[at : at + width] = bytes.fromhex(random.choice(ODD_FLOATS[one["dtype"]]))
    return put_together(header, bytes(changed))


def values_changed(random: Random, header: Dict[str, Any], body: bytes) -> bytes:
    """Other weights, which their manifest vouches for: whatever is finite is a peer's own affair."""
    return put_together(header, fuzz_damage.bits_flipped(random, body))


DAMAGE: Dict[str, Mutation] = {
    "truncated": fuzz_damage.damage(fuzz_damage.truncated),
    "bits flipped": fuzz_damage.damage(fuzz_damage.bits_flipped),
    "bytes replaced": fuzz_damage.damage(fuzz_damage.bytes_replaced),
    "bytes lost or doubled": fuzz_damage.damage(fuzz_damage.bytes_lost_or_doubled),
    "blocks swapped": fuzz_damage.damage(fuzz_damage.blocks_swapped),
    "something appended": fuzz_damage.damage(fuzz_damage.grown),
    "another file's bytes": fuzz_damage.another_files_bytes,
    "files missing": fuzz_damage.files_missing,
}
FORGERY: Dict[str, Mutation] = {
    "fields: odd values": fuzz_damage.fields_odd,
    "fields: ../ and odd file names": fuzz_damage.fields_names,
    "fields: missing, doubled, new": fuzz_damage.fields_missing_doubled_or_new,
    "JSON: deep, huge, other encodings": fuzz_damage.json_odd,
    "tensors: dtype": _forgery(dtypes_changed),
    "tensors: shape": _forgery(shapes_changed),
    "tensors: offsets": _forgery(offsets_changed),
    "tensors: swapped": _forgery(tensors_swapped),
    "tensors: odd names": _forgery(names_changed),
    "tensors: missing, added": _forgery(tensors_missing_or_added),
    "header: huge, deep, doubled, lying": _forgery(header_odd),
    "body: other size": _forgery(body_resized),
    "values: NaN, infinite, overflowing": _forgery(values_not_finite),
    "values: other, finite or not": _forgery(values_changed),
}
