"""Damage, and forgery of JSON: ways to change what a peer has published. See `fuzz_mutations`, which has the others."""

from __future__ import annotations

import hashlib
import json
from random import Random
from typing import Any, Callable, Dict, List, Tuple

UPDATE, EARLIER = 100, 50
FOLDER = "peer1"
WEIGHTS, LATEST, MANIFEST, ALIVE = (
    f"{FOLDER}/{name}" for name in (f"u{UPDATE:09d}.safetensors", "latest.json", f"u{UPDATE:09d}.json", "alive.json")
)
FILES = (WEIGHTS, LATEST, MANIFEST, ALIVE)

Files = Dict[str, bytes]
Mutation = Callable[[Random, Files], None]


# Damage.


def damage(change: Callable[[Random, bytes], bytes]) -> Mutation:
    """The change applied to one of the four files, or to both manifests alike (one write error, copied)."""

    def mutate(random: Random, files: Files) -> None:
        name = random.choice(FILES)
        files[name] = change(random, files[name])
        if name == LATEST and random.random() < 0.5:
            files[MANIFEST] = files[LATEST]

    return mutate


def _block(random: Random, size: int) -> Tuple[int, int]:
    begin = random.randrange(size)
    return begin, min(size, begin + random.choice((1, 8, 64, size)))


def truncated(random: Random, data: bytes) -> bytes:
    return data[: random.choice((0, 1, 7, 8, len(data) // 2, len(data) - 1, random.randrange(len(data))))]


def bits_flipped(random: Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def bytes_replaced(random: Random, data: bytes) -> bytes:
    begin, end = _block(random, len(data))
    fill = random.choice((bytes(end - begin), random.randbytes(end - begin), b"9" * (end - begin)))
    return data[:begin] + fill + data[end:]


def bytes_lost_or_doubled(random: Random, data: bytes) -> bytes:
    begin, end = _block(random, len(data))
    return data[:begin] + random.choice((b"", data[begin:end] * 2)) + data[end:]


def blocks_swapped(random: Random, data: bytes) -> bytes:
    size = random.choice((1, 4, 16))
    first, second = sorted(random.sample(range(0, len(data) - size, size), 2))
    a, b = data[first : first + size], data[second : second + size]
    return data[:first] + b + data[first + size : second] + a + data[second + size :]


def grown(random: Random, data: bytes) -> bytes:
    return data + random.choice((b"\0", b" x", data, random.randbytes(64), b" " * (1 << 20), b"[" * 50_000))


def another_files_bytes(random: Random, files: Files) -> None:
    """A file under another's name: of this snapshot, of the one before, or of another directory."""
    name = random.choice(FILES)
    earlier = name.replace(f"{UPDATE:09d}", f"{EARLIER:09d}").replace("latest", f"u{EARLIER:09d}")
    files[name] = random.choice([files[other] for other in (*FILES, earlier) if other != name] + [b"", b"{}", b"\0" * 4096])


def files_missing(random: Random, files: Files) -> None:
    for name in random.sample(FILES, random.randrange(1, 4)):
        files.pop(name)


# Forgery of JSON.


def sealed(fields: Dict[str, Any]) -> bytes:
    """The JSON of these fields with a digest that fits, written after the format and not after the code that is tested."""
    fields = {name: value for name, value in fields.items() if name != "digest"}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return json.dumps({**fields, "digest": "sha256:" + hashlib.sha256(text.encode()).hexdigest()}).encode()


def odd_value(random: Random) -> Any:
    """Something that no honest writer writes, of any JSON type."""
    deep: Any = []
    for _ in range(random.choice((10, 300))):
        deep = random.choice(([deep], {"a": deep}))
    odd = (
        None, True, False, -1, 0, 1.0, 0.5, 2**31, 2**62, 2**63, 10**17, 10**30, -(10**30), 10**300, 10**400, 10**4000, 1e308,
        -1e17, float("nan"), float("inf"), -float("inf"), "", "0", "1", "x" * 100_000, "\0", "\x1b[2J", "\ud800", "\u202e",
        "é\n", [], {}, [1], {"a": 1}, deep, ["x"] * 10_000, {"9" * 5000: 1}, {"-1": 1}, {"0": -1}, {"²": 1}, {"٣": 1},
    )  # fmt: skip
    return random.choice(odd)


ODD_NAMES = (
    "../run.json", "../../../../etc/passwd", "/etc/passwd", "u000000100.safetensors/../x", "./u000000100.safetensors", "..",
    "u000000100.safetensors\n", "u000000100.safetensors\0", "u00000010０.safetensors", "u٠٠٠٠٠٠١٠٠.safetensors", "CON", "~",
    "U000000100.safetensors", "u000000100.pt", "u000000100.safetensors.pt", "latest.json", "$HOME", "%2e%2e/x", "..\\x", "",
    "s3://bucket/x", f"u{EARLIER:09d}.safetensors", "u000000099.safetensors", "u0000000100.safetensors", "a" * 5000,
)  # fmt: skip


def _targets(random: Random) -> List[str]:
    return random.choice(([LATEST], [MANIFEST], [LATEST, MANIFEST], [ALIVE], [ALIVE]))


def fields_odd(random: Random, files: Files) -> None:
    """One or two fields with a value that they must not have, or that is merely unusual."""
    targets = _targets(random)
    fields = json.loads(files[targets[0]])
    for name in random.sample(sorted(fields), random.choice((1, 1, 2))):
        fields[name] = odd_value(random)
    put(files, targets, sealed(fields))


def fields_names(random: Random, files: Files) -> None:
    """A manifest whose file's name leads elsewhere."""
    fields = json.loads(files[LATEST])
    fields["file"] = random.choice(ODD_NAMES)
    put(files, _targets(random)[:1], sealed(fields))


def fields_missing_doubled_or_new(random: Random, files: Files) -> None:
    targets = _targets(random)
    fields = json.loads(files[targets[0]])
    name = random.choice(sorted(fields))
    how = random.randrange(4)
    if how == 0:
        del fields[name]
        put(files, targets, sealed(fields))
    elif how == 1:
        put(files, targets, sealed({**fields, random.choice(("", "x" * 1000, "__class__", "é")): odd_value(random)}))
    else:  # the same name twice: the odd value first, or last
        pair, data = json.dumps(name) + ": " + json.dumps(odd_value(random)), sealed(fields).decode()
        data = "{" + pair + ", " + data[1:] if how == 2 else data[:-1] + ", " + pair + "}"
        put(files, targets, data.encode())


def json_odd(random: Random, files: Files) -> None:
    """Not the object that was expected, or not in the encoding."""
    targets = _targets(random)
    text = files[targets[0]].decode()
    odd = (
        "[" * 900 + "]" * 900, "[" * 500_000, '{"a":' * 900 + "1" + "}" * 900, '{"format":' + "[" * 950 + "]" * 950 + "}",
        '{"format":' + "[" * random.randrange(950, 1000) + "1" + "]" * 1000, "1", "null", '"x"', "[]", "{}", "NaN", "-Infinity",
        "9" * 1_000_000, '{"format": ' + "9" * 100_000 + "}", '{"format": 1e999999}', "{" + '"a": 1, ' * 80_000 + '"b": 2}',
        "[" + "1, " * 300_000 + "1]", " " * 1_048_576, f"[{text}]", text + text, text.replace('"', "'"), text + "\0",
        text.replace("1", "１"), text.replace(":", ": //\n"), text[:-2] + ",}",
    )  # fmt: skip
    encodings = [text.encode(name) for name in ("utf-16", "utf-32", "utf-8-sig", "utf-7")] + [b"\xff\xfe" + text.encode()]
    put(files, targets, random.choice([*(one.encode() for one in odd), *encodings]))


def put(files: Files, names: List[str], data: bytes) -> None:
    for name in names:
        files[name] = data
