"""Damaged and forged files against the code that reads them; the long form is tests/stress/fuzz_snapshots.py.

CODISTILL_FUZZ_EXAMPLES sets how many examples there are (default 300).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from fairseq_runs import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fairseq_codistill.exchange import snapshot
from fairseq_codistill.exchange.manifest import BadSnapshot, Heartbeat, Manifest, file_name

sys.path.insert(0, str(ROOT / "tests/stress"))
import fuzz_damage  # noqa: E402
import fuzz_judge  # noqa: E402
import fuzz_snapshots  # noqa: E402

EXAMPLES = int(os.environ.get("CODISTILL_FUZZ_EXAMPLES", "300"))
MANIFEST = Manifest(
    update=100, epoch=2, file=file_name(100), bytes=10, checksum="sha256:" + "ab" * 32, dtype="float32", fingerprint="cd" * 8,
    model={"class": "Model"}, time=1.7e9, valid_loss=4.25,
)  # fmt: skip
HEARTBEAT = Heartbeat("one", 7, "training", "node17", 4711, 1.7e9, 103, 300, 4.5, {"0": 50})
RECORDS = pytest.mark.parametrize("record", [MANIFEST, HEARTBEAT], ids=["manifest", "heartbeat"])

numbers = st.integers() | st.floats() | st.sampled_from([10**30, 10**4000, 2**62, -1, 1e308])
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


def test_damaged_and_forged_files_in_a_process_whose_memory_is_bounded():
    """Nothing that differs is believed, nothing crashes, hangs or takes memory; and the mutations reach every check."""
    script = [sys.executable, str(ROOT / "tests/stress/fuzz_snapshots.py"), "--examples", str(EXAMPLES)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{EXAMPLES} examples, seed 1" in done.stdout and "failed: 0" in done.stdout
    for kind in fuzz_snapshots.KINDS:
        row = re.search(rf"^{re.escape(kind)} +(\d+)", done.stdout, re.MULTILINE)
        assert row and int(row[1]) >= EXAMPLES // len(fuzz_snapshots.KINDS), kind
    for reason in (
        "it is not a safetensors file", "its tensors are not those of this peer's model", "its checksum is not the one",
        "has more than",
        "but its manifest promises", "values that are not finite", "has shape", "but in this peer's model it is",
        "digest is not that of its fields", "the manifest's file must", "the manifest is not JSON", "the heartbeat's",
    ):  # fmt: skip
        assert EXAMPLES < 300 or reason in done.stdout, f"no mutation was refused because {reason!r}"


def without_checksums(monkeypatch):
    same = "sha256:" + "ab" * 32
    monkeypatch.setattr(snapshot, "checksum", lambda data: same)
    whole = snapshot.Layout.examine
    monkeypatch.setattr(snapshot.Layout, "examine", lambda self, file: (same, whole(self, file)[1]))


def with_any_values(monkeypatch):
    monkeypatch.setattr(snapshot, "_is_finite", lambda tensor: True)


@pytest.mark.parametrize(
    "blind, kind", [(without_checksums, "bits flipped"), (with_any_values, "values: NaN, infinite, overflowing")]
)
def test_a_check_that_is_missing_is_found(monkeypatch, blind, kind):
    """The judge is not blind: without one check of the decoder there are failures."""
    blind(monkeypatch)
    first = list(fuzz_snapshots.KINDS).index(kind)
    found = fuzz_snapshots.campaign(list(range(first, 880, len(fuzz_snapshots.KINDS))), seed=1)
    assert found.failures and all(kind in failure for failure in found.failures)


def test_the_benchmarks_digest_is_the_formats():
    for record in (MANIFEST, HEARTBEAT):
        fields = json.loads(record.to_json())
        assert json.loads(fuzz_damage.sealed(fields)) == fields and "digest" in fields
        assert type(record).from_json(fuzz_damage.sealed(fields)) == record


def refused_or_well_formed(kind, data):
    try:
        record = kind.from_json(data)
    except BadSnapshot as error:
        assert str(error).isprintable() and len(str(error)) < 400
    else:
        fuzz_judge.well_formed(record)
        return record


@RECORDS
@settings(max_examples=max(20, EXAMPLES // 3), deadline=None)
@given(data=st.data())
def test_any_values_in_any_fields(record, data):
    fields = json.loads(record.to_json())
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(fields)) | st.text(), values, min_size=1, max_size=3))
    refused_or_well_formed(type(record), fuzz_damage.sealed({**fields, **changes}))


@RECORDS
@settings(max_examples=max(20, EXAMPLES // 3), deadline=None)
@given(data=st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
@example(data=b"[" * 500_000)
@example(data=b"9" * 500_000)
@example(data=b'{"format": 1, "update": ' + b"[" * 980 + b"]" * 980 + b"}")
def test_any_bytes(record, data):
    assert refused_or_well_formed(type(record), data) is None


@RECORDS
@settings(max_examples=max(20, EXAMPLES // 3), deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_never_another_record(record, data):
    honest = record.to_json()
    at = data.draw(st.integers(0, len(honest) - 1))
    damaged = honest[:at] + bytes([data.draw(st.integers(0, 255))]) + honest[at + 1 :]
    assert refused_or_well_formed(type(record), damaged) in (None, record)
