"""What a run will cost in memory, disk, traffic and time, as far as its command and its folders tell: no model is built.

The number of weights is read off a snapshot of the run where there is one, else follows from --arch and its options for
fairseq's translation transformers; where neither tells, costs are for each million weights.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import stat
from collections.abc import Sequence
from typing import NamedTuple, Optional

from ..core.topology import edges_of, teachers_of
from .view import size

# fairseq's translation transformers: layers of encoder and of decoder, width, feed-forward width.
_ARCHITECTURES = {
    "transformer": (6, 512, 2048),
    "transformer_wmt_en_de": (6, 512, 2048),
    "transformer_iwslt_de_en": (6, 512, 1024),
    "transformer_wmt_en_de_big": (6, 1024, 4096),
    "transformer_vaswani_wmt_en_de_big": (6, 1024, 4096),
}
_SPECIAL = 4  # symbols that fairseq's dictionary has and its file has not
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_TRAINING = 16  # bytes for each weight: itself, its gradient and Adam's two averages
_CHECKPOINT = 12  # the same without the gradient
_SNAPSHOTS = 4  # of each peer: three are kept, and the next is written before the oldest goes
_HEADER_LIMIT = 1 << 26  # bytes of a snapshot's header


class Weights(NamedTuple):
    """How many, and who says so."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    source: str


def value(words: Sequence[str], option: str) -> Optional[str]:
    """The last value of an option in a command: `--max-update 5`, `--max-update=5`, `optimization.max_update=5`."""
    found, override = None, re.compile(rf"[+~]*(?:[\w@/]+\.)*{option.replace('-', '_')}=(.*)", re.DOTALL)
    for word, following in zip(words, [*words[1:], ""]):
        match = override.fullmatch(word)
        if word == (option if option.startswith("-") else f"--{option}"):
            found = following
        elif word.startswith(f"--{option}=") or match:
            found = match[1] if match else word.partition("=")[2]
    return found


def costs(words: Sequence[str], data: Optional[str], peers: int, exchange: Optional[str]) -> list[str]:
    """Lines for a person. `words`: a peer's command; `data`: its data folder; `exchange`: a local folder, or None."""
    weights = of_snapshot(exchange) or of_architecture(words, data)
    count, source = weights or Weights(1_000_000, "this model's size is not known before it is built")
    lines = [f"For {'' if weights else 'each '}{count / 1e6:,.1f} million weights ({source}):"]
    model = 2 if _flag(words, "fp16") or _flag(words, "bf16") else 4
    # What the criterion does where nothing is said: snapshots of an fp32 model travel as bf16.
    wire = _BYTES.get(value(words, "codistill-wire-dtype") or "", 2) * count
    held = _BYTES.get(value(words, "codistill-peer-dtype") or "", model) * count
    teachers, offline = _teachers(words, peers), value(words, "codistill-teacher")
    if offline:
        teachers, wire = len(offline.split(":")), 0  # nothing is exchanged
    return [
        *lines,
        f"  memory   of each process about {size(_TRAINING * count)} for training with Adam, activations not counted; for "
        f"codistillation {_times(teachers, 'teacher')} of {size(held)}, and of a peer's first process in main memory "
        f"{1 + teachers} x {size(wire)}",
        f"  disk     {peers} x {size(_CHECKPOINT * count)} for each checkpoint that is kept (fairseq's --keep-… options); the "
        f"exchange {peers} x {_SNAPSHOTS} snapshots of {size(wire)} = {size(peers * _SNAPSHOTS * wire)} at most",
        _traffic(words, peers, 0 if offline else teachers, wire),
        f"  time     {_times(teachers, 'more forward pass', 'es')} in each update (a forward pass is about a third of one)",
    ]


def _traffic(words: Sequence[str], peers: int, teachers: int, wire: int) -> str:
    updates = _number(value(words, "max-update"))
    # As the criterion fills it in.
    interval = _number(value(words, "codistill-interval")) or (min(2500, max(1, updates // 20)) if updates else 500)
    told = f"  traffic  each peer writes {size(wire)} and reads {teachers} x {size(wire)} every {interval:,} updates"
    total = peers * (1 + teachers) * wire * (updates // interval)
    return told + (f"; {size(total)} in all of {updates:,} updates by {_times(peers, 'peer')}" if updates else "")


def of_snapshot(exchange: Optional[str]) -> Optional[Weights]:
    """Counted in the newest snapshot of a run, None where there is none. Only its header is read."""
    paths = glob.glob(os.path.join(glob.escape(exchange), "peer*", "u*.safetensors")) if exchange else []
    for path in sorted(paths, key=os.path.basename, reverse=True)[:1]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            # Others may write there: no link is followed, and a pipe does not block.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                length = int.from_bytes(file.read(8), "little") if stat.S_ISREG(os.fstat(descriptor).st_mode) else 0
                header = json.loads(file.read(length)) if 0 < length < _HEADER_LIMIT else {}
            count = sum(_product(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
            return Weights(count, f"counted in {path}") if count > 0 else None
    return None


def of_architecture(words: Sequence[str], data: Optional[str]) -> Optional[Weights]:
    """By the formula for fairseq's translation transformers, None for others; biases and norms counted, positions not."""
    arch = value(words, "arch") or value(words, "-a") or ""
    known = _ARCHITECTURES.get(arch)
    symbols = _symbols(words, data)
    if known is None or symbols is None:
        return None
    layers, width, ffn = known

    def option(name: str, default: int) -> int:
        return _number(value(words, name)) or default

    encoder = option("encoder-embed-dim", width)
    decoder = option("decoder-embed-dim", encoder)
    forward = option("encoder-ffn-embed-dim", ffn)
    forwards = forward, option("decoder-ffn-embed-dim", forward)
    own = [4 * (d * d + d) + 2 * d * f + f + d + 4 * d for d, f in zip((encoder, decoder), forwards)]
    across = 2 * (decoder * decoder + decoder) + 2 * (encoder * decoder + decoder) + 2 * decoder
    count = option("encoder-layers", layers) * own[0] + option("decoder-layers", layers) * (own[1] + across)
    source, target = symbols
    if _flag(words, "share-all-embeddings"):
        count += target * decoder
    else:
        count += source * encoder + (1 if _flag(words, "share-decoder-input-output-embed") else 2) * target * decoder
    return Weights(count, f"by the formula of {arch} with {target:,} symbols")


def _symbols(words: Sequence[str], data: Optional[str]) -> Optional[tuple[int, int]]:
    """Of the source and the target dictionary."""
    folder = (data or "").split(":")[0]
    languages = value(words, "source-lang") or value(words, "-s"), value(words, "target-lang") or value(words, "-t")
    names = sorted(glob.glob(os.path.join(glob.escape(folder), "dict.*.txt"))) if folder else []
    paths = [os.path.join(folder, f"dict.{language}.txt") for language in languages] if all(languages) else names
    try:
        counts = [_lines(path) + _SPECIAL for path in paths]
    except OSError:
        return None
    # Without the languages' names, which of two dictionaries is the source's is not known, and matters little.
    return (counts[0], counts[1]) if len(counts) == 2 else None


def _lines(path: str) -> int:
    with open(path, "rb") as file:
        return sum(1 for line in file if not line.startswith(b"#fairseq:overwrite"))


def _flag(words: Sequence[str], name: str) -> bool:
    return f"--{name}" in words or value(words, name) in ("true", "True")


def _teachers(words: Sequence[str], peers: int) -> int:
    edges = edges_of(value(words, "codistill-topology") or "all", peers)
    return max(len(teachers_of(peer, edges)) for peer in range(peers))


def _number(text: Optional[str]) -> int:
    return int(text) if text and re.fullmatch(r"\d{1,15}", text) else 0


def _times(count: int, what: str, plural: str = "s") -> str:
    return f"{count:,} {what}{'' if count == 1 else plural}"


def _product(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
