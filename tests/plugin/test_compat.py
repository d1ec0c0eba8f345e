"""fairseq's checkpoints load, and nothing else does."""

import argparse
import collections
import logging
import math
import os

import numpy
import pytest
import torch
from fairseq.data.dictionary import Dictionary
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from omegaconf import OmegaConf

from fairseq_codistill import compat

needs_safe_loading = pytest.mark.skipif(not compat.loads_safely(), reason="torch before 2.6 loads anything")


@pytest.fixture(autouse=True)
def allowed():
    compat.allow_checkpoint_classes()


def there_and_back(path, value):
    torch.save(value, path)
    return torch.load(path, weights_only=True)


@needs_safe_loading
def test_what_fairseqs_checkpoints_hold(tmp_path):
    checkpoint = {
        "args": argparse.Namespace(arch="transformer", lr=[0.1], betas=(0.9, 0.98)),
        "cfg": OmegaConf.create({"model": {"layers": 2, "name": "x"}, "list": [1, 2.0, None, True]}),
        "extra_state": {"best": numpy.float64(2.5), "count": numpy.int64(3), "metrics": collections.OrderedDict(a=1)},
        "task_state": {"target_dictionary": Dictionary()},
        "model": {"weight": torch.ones(2, dtype=torch.bfloat16)},
    }
    loaded = there_and_back(tmp_path / "x.pt", checkpoint)
    assert loaded["args"] == checkpoint["args"] and loaded["cfg"] == checkpoint["cfg"]
    assert loaded["extra_state"] == checkpoint["extra_state"]
    assert loaded["task_state"]["target_dictionary"].symbols == Dictionary().symbols


ARRAYS = [
    numpy.array([1, 2, 3]), numpy.array(2.5), numpy.array([[1.5, math.nan]], dtype=numpy.float32), numpy.array([True, False]),
    numpy.asfortranarray(numpy.arange(6).reshape(2, 3)), numpy.array([1, 2], dtype=">i4"), numpy.array(["ab", "ü"]),
    numpy.array([b"ab"]), numpy.zeros(0), numpy.array([1 + 2j]), numpy.arange(4, dtype=numpy.uint8)[::2],
]  # fmt: skip


@needs_safe_loading
@pytest.mark.parametrize("array", ARRAYS, ids=str)
def test_arrays_of_numpy(tmp_path, array):
    """And saved again they are numpy's, not ours: other programs can load them."""
    for _ in range(2):
        torch.save({"x": array, "one": array.reshape(-1)[:1]}, tmp_path / "x.pt")
        assert b"fairseq_codistill" not in (tmp_path / "x.pt").read_bytes()
        loaded = torch.load(tmp_path / "x.pt", weights_only=True)["x"]
        assert isinstance(loaded, numpy.ndarray) and loaded.dtype == array.dtype.newbyteorder("=")
        numpy.testing.assert_array_equal(loaded, array)
        array = loaded


@needs_safe_loading
@pytest.mark.parametrize("kind", ["f8", "f4", "f2", "i8", "i4", "u1", "b1", "c16", ">f8", "U3"])
def test_numbers_of_numpy(tmp_path, kind):
    number = numpy.array([1]).astype(kind)[0]
    loaded = there_and_back(tmp_path / "x.pt", number)
    assert loaded == number and type(loaded) is type(number)


@needs_safe_loading
def test_as_numpy_1_named_it(tmp_path):
    torch.save([numpy.float64(2.5), numpy.array([1, 2])], tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    number, array = torch.load(tmp_path / "x.pt", weights_only=True)
    assert number == 2.5 and array.tolist() == [1, 2]


@needs_safe_loading
def test_meters_as_tasks_fill_them(tmp_path):
    """BLEU's counts: fairseq sums arrays in its meters, and goes on to do so after a resume."""
    with metrics.aggregate(new_root=True) as before:
        for value in (numpy.array([1, 2]), numpy.float64(2.0), torch.tensor(1.5), 3, numpy.float32(1.0)):
            metrics.log_scalar(f"_{type(value).__name__}", value, weight=1)
    state = there_and_back(tmp_path / "x.pt", before.state_dict())
    after = MetersDict()
    after.load_state_dict(state)
    after["_ndarray"].update(numpy.array([10, 20]))
    assert after["_ndarray"].sum.tolist() == [11, 22]
    assert there_and_back(tmp_path / "y.pt", after.state_dict())[0][3]["sum"] is not None


class Dangerous:
    """Pickles as a call of a numpy function that reads any bytes as addresses of Python objects."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


BYTES = b"\x41" * 16
OBJECTS = Dangerous(numpy.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0))  # which claims to be none
FIELDS = Dangerous(numpy.dtype, ([("a", "O")], False, True), (3, "|", None, ("a",), {}, 8, 1, 0))
_RECONSTRUCT, (_, *_EMPTY), _ = numpy.array([1]).__reduce__()
_SCALAR = numpy.float64(1).__reduce__()[0]


@needs_safe_loading
@pytest.mark.parametrize(
    "dangerous",
    [
        OBJECTS,
        FIELDS,
        Dangerous(_SCALAR, (OBJECTS, BYTES)),
        Dangerous(_RECONSTRUCT, (numpy.ndarray, *_EMPTY), (1, (2,), OBJECTS, False, BYTES)),
        Dangerous(_RECONSTRUCT, (numpy.ndarray, *_EMPTY), (1, (2,), FIELDS, False, BYTES)),
        Dangerous(_RECONSTRUCT, (numpy.ndarray, *_EMPTY), (1, (9,), numpy.dtype("f8"), False, BYTES)),
    ],
)
def test_a_file_cannot_pass_bytes_for_objects(tmp_path, dangerous):
    with pytest.raises(Exception, match="may hold numpy numbers and texts|buffer size does not match"):
        there_and_back(tmp_path / "x.pt", dangerous)


@needs_safe_loading
def test_numpys_own_functions_are_not_reached(tmp_path):
    """`numpy.ndarray(shape, "O", bytes)` called by a file gives an empty array; a wrong size in a dtype has no effect."""
    assert there_and_back(tmp_path / "x.pt", Dangerous(numpy.ndarray, ((2,), "O", BYTES))).tolist() == []
    small = Dangerous(numpy.dtype, ("f8", False, True), (3, "<", None, None, None, 1, 1, 0))
    assert there_and_back(tmp_path / "x.pt", Dangerous(_SCALAR, (small, BYTES))) == numpy.frombuffer(BYTES)[0]


class Foreign:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@needs_safe_loading
def test_anything_else_is_refused_and_not_run(tmp_path):
    proof = tmp_path / "it-was-run"
    with pytest.raises(Exception, match="Weights only load failed|Unsupported global"):
        there_and_back(tmp_path / "x.pt", {"model": Foreign(f"touch {proof}")})
    assert not proof.exists()


def test_libraries_do_not_tell_each_step(monkeypatch):
    """What fairseq does to the root logger shows what they say for debugging; a level that somebody has set stays."""
    names = ("botocore", "s3fs", "PIL", "asyncio")
    for name in names:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    logging.getLogger("s3fs").setLevel(logging.DEBUG)
    root = logging.getLogger().level
    logging.getLogger("botocore.hooks").manager._clear_cache()
    compat.quieten_libraries()
    assert not logging.getLogger("botocore.hooks").isEnabledFor(logging.DEBUG)
    assert logging.getLogger("botocore.hooks").isEnabledFor(logging.WARNING)
    assert not logging.getLogger("PIL.PngImagePlugin").isEnabledFor(logging.INFO)
    assert logging.getLogger("s3fs").level == logging.DEBUG and logging.getLogger().level == root


def test_the_switch_that_turns_safety_off_is_not_used():
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
