"""What a reader may make of damaged and forged files: an honest publisher, a slow reader of the format, and the judgement."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, List, Optional

import torch
from fuzz_damage import ALIVE, EARLIER, UPDATE, Files
from fuzz_mutations import WIDTHS, take_apart
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from fairseq_codistill.exchange.exchange import Exchange
from fairseq_codistill.exchange.manifest import MANIFEST_LIMIT, BadSnapshot, Heartbeat, Manifest
from fairseq_codistill.exchange.snapshot import Buffer, Weights, fingerprint, size_limit, tensors_of
from fairseq_codistill.exchange.status import StatusReader
from fairseq_codistill.exchange.stores import MemoryStore

# What of a refusal's sentence is of one example only: names, numbers, values.
_ONE_EXAMPLES_OWN = re.compile(r"(?<!\w)'.*'(?!\w)|\".*\"|\(.*\)|\b\d+\b|(?<=but is ).*|(?<=must not be ).*|torch\.\w+|u?\d{9}")
RUN = {"format": 1, "peers": 2, "classes": None, "dictionary_sha256": None}
NAMES = re.compile(r"run\.json|peer[01]/(latest\.json|alive\.json|u\d{9}\.(json|safetensors))", re.ASCII)


class Model(nn.Module):
    """What fairseq's models have: matrices, vectors, three dimensions, buffers of whole numbers, a scalar, nothing at all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.output = nn.Linear(4, 7)
        self.output_too = nn.Linear(4, 7)
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("order", torch.arange(5, dtype=torch.int32))
        self.register_buffer("mask", torch.tensor([True, False]))


class WatchedStore(MemoryStore):
    """A store that nobody asks for another file than a peer's, or for more bytes than there can honestly be."""

    def __init__(self, files: Files, most: int) -> None:
        super().__init__()
        self._files.update(files)
        self.most = most

    def read(self, name: str, limit: int) -> Optional[bytes]:
        assert NAMES.fullmatch(name), f"{name!r} was opened"
        assert limit <= self.most, f"{name!r} was read with a limit of {limit} bytes"
        return super().read(name, limit)


class Published:
    """What the peer has published, in one wire dtype: the files, and what an honest reader gets of them."""

    def __init__(self, wire: Optional[torch.dtype]) -> None:
        model = Model(0)
        self.expected, self.fingerprint = tensors_of(model), fingerprint(model)
        self.most = max(MANIFEST_LIMIT, size_limit(self.expected))
        store = MemoryStore()
        store.write("run.json", json.dumps(RUN).encode())
        exchange = Exchange(store, 1)
        for update in (EARLIER, UPDATE):
            exchange.publish(
                Buffer.of(tensors_of(Model(update)), wire), update, epoch=2, fingerprint=self.fingerprint,
                model={"class": "Model"}, time=1.7e9, valid_loss=4.25,
            )  # fmt: skip
        told = Heartbeat("one", 7, "training", "node17", 4711, 1.7e9, UPDATE + 3, 300, 4.5, {"0": 50})
        store.write(ALIVE, told.to_json())
        self.files: Files = dict(store._files)
        self.manifests = {update: exchange.at(1, update) for update in (EARLIER, UPDATE)}
        self.weights = {u: exchange.fetch(1, m, self.fingerprint, self.expected) for u, m in self.manifests.items()}
        self.heartbeat = exchange.heartbeat(1)


def slow_read(data: bytes, expected: Weights) -> Weights:
    """The tensors of format 1, read one by one in plain Python. Raises whatever it likes for what is not in order."""

    def once(pairs):
        assert len(dict(pairs)) == len(pairs), "a name stands twice"
        return dict(pairs)

    header, body = take_apart(data)
    json.loads(data[8 : len(data) - len(body)], object_pairs_hook=once)
    header.pop("__metadata__", None)
    found, covered = {}, 0
    for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = one["data_offsets"]
        assert begin == covered and end - begin == WIDTHS[one["dtype"]] * math.prod(one["shape"])
        flat = torch.frombuffer(bytearray(body[begin:end]) or bytearray(8), dtype=_DTYPES[one["dtype"]])
        found[name], covered = flat[: math.prod(one["shape"])].reshape(one["shape"]), end
    assert covered == len(body)
    for name in expected:
        scale = found.pop(f"{name}:scale", None)
        if scale is not None:
            assert found[name].dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == expected[name].shape[:1]
            rows = [row.float() * one for row, one in zip(found[name], scale)]
            found[name] = torch.stack(rows) if rows else found[name].float()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape and tensor.is_floating_point() == expected[name].is_floating_point()
        assert tensor.is_floating_point() or tensor.dtype == expected[name].dtype
        assert all(math.isfinite(value) for value in tensor.flatten().tolist())
    return found


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Verdict:
    """What came of one example: of each read, `refused`, `not there`, `as published` or `as vouched for`; the reasons."""

    ORDER = ("refused", "as vouched for", "not there", "as published")

    def __init__(self) -> None:
        self.words: List[str] = []
        self.reasons: List[str] = []

    @property
    def word(self) -> str:
        return min(self.words, key=self.ORDER.index)


def read(published: Published, files: Files, forged: bool) -> Verdict:
    """Read the files as a peer and as the status command do. Raises AssertionError for what must never be."""
    store, verdict = WatchedStore(files, published.most), Verdict()
    exchange = Exchange(store, 0)
    for look in (lambda: exchange.newest(1), lambda: exchange.at(1, UPDATE)):
        manifest = _attempt(look, verdict)
        if manifest is not None:
            weights = _attempt(lambda m=manifest: exchange.fetch(1, m, published.fingerprint, published.expected), verdict)
            _believed(published, files, manifest, weights, forged, verdict)
    manifest = None if "peer1/latest.json" not in files else _attempt(lambda: exchange.at(1, UPDATE), Verdict())
    assert manifest is None or manifest.update == UPDATE, f"update {manifest.update} is taken for update {UPDATE}"
    heartbeat = _attempt(lambda: exchange.heartbeat(1), verdict)
    if heartbeat is not None:
        well_formed(heartbeat)
        assert forged or heartbeat == published.heartbeat, f"the heartbeat {heartbeat} was never given"
        verdict.words.append("as published" if heartbeat == published.heartbeat else "as vouched for")
    rows = StatusReader(store).look()
    assert len(rows) == 2 and all(len(text) < 200 and text.isprintable() for row in rows for text in row.problems.values())
    return verdict


def _attempt(look: Any, verdict: Verdict) -> Any:
    """What there is; of None and BadSnapshot a note."""
    try:
        found = look()
    except BadSnapshot as error:
        sentence = str(error)
        assert sentence.isprintable() and len(sentence) < 400, f"no sentence for a log: {sentence[:500]!r}"
        verdict.words.append("refused")
        verdict.reasons.append(_ONE_EXAMPLES_OWN.sub("…", sentence))
        return None
    if found is None:
        verdict.words.append("not there")
    return found


def _believed(
    published: Published, files: Files, manifest: Manifest, weights: Optional[Weights], forged: bool, verdict: Verdict
) -> None:
    original = published.manifests.get(manifest.update)
    assert forged or manifest == original, f"{manifest} was never published"
    well_formed(manifest)
    if weights is None:
        return
    data = files[f"peer1/{manifest.file}"]
    truth = published.weights[manifest.update] if manifest == original else slow_read(data, published.expected)
    assert weights.keys() == truth.keys()
    for name, tensor in truth.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor), f"{name} is not what was written"
    verdict.words.append("as published" if manifest == original else "as vouched for")


def well_formed(record: Any) -> None:
    """Every field of its type and in its range, said otherwise than the code under test says it."""
    fields = asdict(record)
    optional = {"valid_loss", "updates", "speed", "run", "seed"}
    for name, value in fields.items():
        if value is None and name in optional:
            continue
        if name in ("time", "valid_loss", "speed"):
            assert isinstance(value, (int, float)) and -1e300 < value < 1e300, (name, value)
        elif name in ("model", "options", "structure", "teachers"):
            assert isinstance(value, dict), (name, value)
        elif name in ("file", "checksum", "dtype", "fingerprint", "start_id", "run", "state", "host"):
            assert isinstance(value, str) and len(value) <= 255, (name, value)
        elif name == "done":
            assert value is True or value is False
        else:
            assert int(value) == value and 0 <= value < 2**62, (name, value)
    if isinstance(record, Manifest):
        assert record.file == f"u{record.update:09d}.safetensors" and len(record.checksum) == 71
    else:
        assert record.state in ("training", "waiting", "ended", "stopped") and (record.host + record.start_id).isprintable()
