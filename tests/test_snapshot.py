import dataclasses
import json
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from fairseq_codistill.exchange.manifest import BadSnapshot, Manifest, sealed
from fairseq_codistill.exchange.snapshot import (
    Buffer,
    check_manifest,
    checksum,
    describe,
    fingerprint,
    size_limit,
    tensors_of,
)
from fairseq_codistill.exchange.snapshot import (
    decode as decode_bytes,
)

decode = decode_bytes  # which the fixture below replaces


class Model(nn.Module):
    """Tied weights, buffers, integers, an empty tensor and a plain one: what fairseq's models have."""

    def __init__(self, seed=0, width=3):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(5, width)
        self.norm = nn.BatchNorm1d(width)
        self.output = nn.Linear(width, 5, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("version", torch.tensor([3.0]))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("_float_tensor", torch.tensor([math.nan]))  # as fairseq's, uninitialised


@pytest.fixture(params=[bytes, bytearray], autouse=True)
def memory(request, monkeypatch):
    """Everything is read twice: from memory that tensors can lie in, and from other memory, which is copied."""
    monkeypatch.setitem(globals(), "decode", lambda data, *rest: decode_bytes(request.param(data), *rest))
    return request.param


FACTS = dict(dtype="float32", epoch=2, model={"class": "Model"}, time=1.5e9, valid_loss=4.2, resumes_from=0, done=False)


def snapshot(model, update=7, wire=None):
    buffer = Buffer.of(tensors_of(model), wire)
    facts = dict(FACTS, dtype=buffer.dtype)
    return bytes(buffer.data), describe(buffer.data, update, fingerprint=fingerprint(model), **facts)


def test_what_is_written_is_read_back_to_the_bit():
    model, mine = Model(1), Model(2)
    data, manifest = snapshot(model)
    read = Manifest.from_json(manifest.to_json())
    assert read == manifest and read.file == "u000000007.safetensors" and read.dtype == "float32"
    check_manifest(read, fingerprint(mine), tensors_of(mine))
    weights = decode(data, read, tensors_of(mine))
    assert weights.keys() == tensors_of(model).keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors_of(model).items())


def test_a_snapshot_laid_out_as_mine_is_not_copied():
    data, manifest = snapshot(Model(1))
    data = bytearray(data)
    weights = decode_bytes(data, manifest, tensors_of(Model(2)))
    weights["embedding.weight"].zero_()
    assert data != snapshot(Model(1))[0], "the tensors lie in the bytes that were read"


def test_tied_tensors_travel_once():
    names = set(tensors_of(Model()))
    assert "embedding.weight" in names and "output.weight" not in names and "_float_tensor" not in names
    assert {"norm.running_mean", "norm.num_batches_tracked", "version", "empty"} <= names


def test_it_is_a_file_of_the_library_and_a_copy_that_can_be_filled_again():
    model, other = Model(1), Model(2)
    buffer = Buffer(tensors_of(model))
    for filled in (model, other):
        buffer.fill(tensors_of(filled))()
        read, before = load(bytes(buffer.data)), {name: t.clone() for name, t in tensors_of(filled).items()}
        with torch.no_grad():
            filled.embedding.weight.zero_()
        assert read.keys() == before.keys() and load(bytes(buffer.data)).keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in load(bytes(buffer.data)).items())


@pytest.mark.parametrize("wire, bound", [(torch.float32, 0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_weights_travel_in_16_bits(wire, bound):
    model = Model(1)
    data, manifest = snapshot(model, wire=wire)
    assert manifest.dtype == str(wire).replace("torch.", "")
    weights = decode(data, manifest, tensors_of(Model()))
    for name, tensor in tensors_of(model).items():
        assert weights[name].dtype == (wire if tensor.is_floating_point() else tensor.dtype), "whole numbers stay exact"
        assert ((weights[name].to(tensor.dtype) - tensor).abs() <= bound * tensor.abs()).all()


def test_weights_travel_in_8_bits():
    """A 256th part of the largest in its row is the most that a value moves; rows of zeros and one huge row do no harm."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(50, 40))
    with torch.no_grad():
        model[1].weight[0] *= 1e6
        model[1].weight[1] = 0
    data, manifest = snapshot(model, wire=torch.int8)
    small = sum(t.numel() for t in model.parameters())
    assert manifest.dtype == "int8" and len(data) < 1.5 * small + 600
    weights = decode(data, manifest, tensors_of(model))
    for name in ("0.weight", "1.weight"):
        tensor = model.state_dict()[name].flatten(1)
        assert ((weights[name].flatten(1) - tensor).abs() <= tensor.abs().amax(1, keepdim=True) / 250).all()
    assert torch.equal(weights["0.bias"], model[0].bias.detach().bfloat16())


def test_forged_scales_are_refused():
    model = nn.Linear(4, 3)
    good = load(snapshot(model, wire=torch.int8)[0])
    for change in (
        {"weight:scale": torch.ones(4)}, {"weight:scale": torch.ones(3).half()}, {"weight:scale": torch.full((3,), math.nan)},
        {"weight:scale": torch.full((3,), 1e38), "weight": torch.full((3, 4), 127, dtype=torch.int8)},
        {"bias:scale": torch.ones(3)}, {"weight": torch.ones(3, 4)},
    ):  # fmt: skip
        data = save({**good, **change})
        manifest = describe(data, 1, fingerprint=fingerprint(model), **FACTS)
        with pytest.raises(BadSnapshot):
            decode(data, manifest, tensors_of(model))


def test_the_fingerprint_knows_shapes_and_not_precision():
    assert fingerprint(Model(1)) == fingerprint(Model(2)) == fingerprint(Model(1).half())
    assert fingerprint(Model(width=4)) != fingerprint(Model(width=3))


def test_another_precision_is_read():
    data, manifest = snapshot(Model(1).bfloat16())
    weights = decode(data, manifest, tensors_of(Model()))
    assert manifest.dtype == "bfloat16" and weights["embedding.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(poison):
    model = Model()
    with torch.no_grad():
        model.norm.weight[0] = poison
    with pytest.raises(BadSnapshot, match="'norm.weight' has values that are not finite"):
        describe(Buffer.of(tensors_of(model)), 1, fingerprint=fingerprint(model), **FACTS)
    data = save(tensors_of(model))
    manifest = describe(data, 1, fingerprint=fingerprint(model), **FACTS)
    with pytest.raises(BadSnapshot, match="not finite"):
        decode(data, manifest, tensors_of(Model()))


def forged(change, model=None):
    """A snapshot whose weights were changed by someone who also made the checksum right."""
    weights = tensors_of(model or Model())
    change(weights)
    data = save(weights)
    return data, describe(data, 1, fingerprint=fingerprint(Model()), **FACTS)


def swap(weights):
    weights["norm.weight"], weights["version"] = weights["version"], weights["norm.weight"]


FORGERIES = {
    "has shape": lambda w: w.update({"norm.weight": torch.ones(4)}),
    "'norm.weight' stands on one side only": lambda w: w.pop("norm.weight"),
    "'zzz' stands on one side only": lambda w: w.update(zzz=torch.ones(1)),
    "is torch.int64, but in this peer's model it is torch.float32": lambda w: w.update({"norm.weight": torch.ones(3).long()}),
    "is torch.float32, but in this peer's model it is torch.int64": lambda w: w.update(
        {"norm.num_batches_tracked": torch.tensor(1.0)}
    ),
    "has shape ": swap,
}


@pytest.mark.parametrize("sentence", FORGERIES)
def test_a_forged_snapshot_is_refused(sentence):
    data, manifest = forged(FORGERIES[sentence])
    with pytest.raises(BadSnapshot, match=sentence):
        decode(data, manifest, tensors_of(Model()))


def test_a_truncated_or_flipped_file_is_refused():
    data, manifest = snapshot(Model())
    expected = tensors_of(Model())
    with pytest.raises(BadSnapshot, match="bytes, but its manifest promises"):
        decode(data[:-1], manifest, expected)
    for position in (0, 9, len(data) // 2, len(data) - 1):
        flipped = bytearray(data)
        flipped[position] ^= 1
        with pytest.raises(BadSnapshot, match="checksum"):
            decode(bytes(flipped), manifest, expected)


def test_a_huge_header_does_not_allocate():
    data, _ = snapshot(Model())
    for length in (2**63, 2**40, 10**8):
        huge = struct.pack("<Q", length) + data[8:]
        manifest = dataclasses.replace(snapshot(Model())[1], bytes=len(huge), checksum=checksum(huge))
        with pytest.raises(BadSnapshot, match="not a safetensors file"):
            decode(huge, manifest, tensors_of(Model()))


def test_a_manifest_cannot_promise_more_than_the_model_has():
    manifest = dataclasses.replace(snapshot(Model())[1], bytes=10**12)
    assert len(snapshot(Model())[0]) < 2 * size_limit(tensors_of(Model()))
    with pytest.raises(BadSnapshot, match="more than this model can have"):
        check_manifest(manifest, fingerprint(Model()), tensors_of(Model()))
    with pytest.raises(BadSnapshot, match="architecture"):
        check_manifest(snapshot(Model(width=4))[1], fingerprint(Model()), tensors_of(Model()))


BAD_FIELDS = {
    "file": ["../../etc/passwd", "u1.safetensors", "/u000000001.safetensors", "u000000001.safetensors\n", "ü", 7, None],
    "update": [-1, 10**9, 1.5, True, "1"],
    "bytes": [-1, 2**80, "big"],
    "checksum": ["sha256:00", "md5:" + "0" * 64, 0],
    "time": [math.nan, math.inf, "now"],
    "valid_loss": [math.nan, "low"],
    "done": [1, None],
    "format": [2, None, "1"],
    "model": [[], None],
    "fingerprint": ["x" * 1000, 1],
    # They are shown to the peer when it resumes; structure when two differ.
    "options": ["α = 1", {"codistill_alpha": "\x1b[2J"}, {"codistill_milestones": ["3"]}, {"codistill_alpha": {}}, None],
    "structure": [[], {"heads": 4}],
    "run": ["x", 1],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_FIELDS.items() for value in values])
def test_a_bad_field_of_a_manifest_is_named(name, value):
    fields = json.loads(snapshot(Model())[1].to_json())
    fields[name] = value
    with pytest.raises(BadSnapshot, match=f"manifest's {name}"):
        Manifest.from_json(json.dumps(fields).encode())


def test_fields_of_a_later_version_are_passed_over():
    fields = json.loads(snapshot(Model())[1].to_json())
    del fields["digest"]
    assert Manifest.from_json(sealed({**fields, "colour": "blue"})) == snapshot(Model())[1]
    with pytest.raises(BadSnapshot, match="the manifest is damaged: its digest is not that of its fields"):
        Manifest.from_json(json.dumps({**fields, "digest": "sha256:" + "0" * 64}).encode())


@given(st.binary(max_size=300) | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=20).map(
    lambda value: json.dumps(value).encode()))  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_bytes_crash_the_manifest(data):
    with pytest.raises(BadSnapshot):
        Manifest.from_json(data)


@given(st.data())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_no_mutation_is_believed_unless_it_is_the_same(data):
    """Mutated bytes with a forged checksum: refused, or finite tensors of the right names and shapes."""
    original, manifest = snapshot(Model())
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    mutated = bytes(mutated)[: data.draw(st.integers(1, len(mutated)))]
    with pytest.raises(BadSnapshot) if mutated != original else _nothing():
        decode(mutated, manifest, tensors_of(Model()))
    try:
        forged = dataclasses.replace(manifest, bytes=len(mutated), checksum=checksum(mutated))
        weights = decode(mutated, forged, tensors_of(Model()))
    except BadSnapshot:
        return
    assert all(weights[name].shape == tensor.shape for name, tensor in tensors_of(Model()).items())
    assert all(tensor.isfinite().all() for tensor in weights.values())


def _nothing():
    import contextlib

    return contextlib.nullcontext()
