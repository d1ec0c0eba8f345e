"""fairseq's checkpoints load, and nothing else does."""

import argparse
import collections
import os

import numpy
import pytest
import torch
from fairseq.data.dictionary import Dictionary
from omegaconf import OmegaConf

from fairseq_codistill import compat

needs_safe_loading = pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch before 2.4 has no list of allowed classes"
)


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


def test_the_switch_that_turns_safety_off_is_not_used():
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
