"""Frozen teachers: what a checkpoint must have in common with the student, and what loading one must leave alone."""

import copy
import logging
import shutil
from argparse import Namespace
from multiprocessing import util

import pytest
import torch
from fairseq_runs import CODISTILL, preprocess, write_corpus
from omegaconf import OmegaConf
from test_criterion import Setting
from torch import nn

from fairseq_codistill import hook, teachers
from fairseq_codistill.core.teaching import Teaching

LM = "--task language_modeling --arch transformer_lm --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-layers 1 "
LM += "--decoder-attention-heads 2 --tokens-per-sample 32 --sample-break-mode eos"


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


def write(setting, path, data=None, **changes):
    """A checkpoint as fairseq writes it, trained on `data`."""
    cfg = OmegaConf.to_container(setting.cfg, resolve=True, enum_to_str=True)
    cfg["task"]["data"] = str(data or cfg["task"]["data"])
    history = {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "x", "lr_scheduler_state": {}, "num_updates": 3}
    state = {
        "args": None, "cfg": cfg, "model": setting.model.state_dict(), "optimizer_history": [history], "task_state": {},
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}}, **changes,
    }  # fmt: skip
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def other(data, tmp_path_factory):
    """Data with as many symbols, but others: the same corpus with other words."""
    folder = tmp_path_factory.mktemp("other") / "bin"
    shutil.copytree(data, folder)
    for path in folder.glob("dict.*.txt"):
        path.write_text(path.read_text().replace("w", "v").replace("W", "V"))
    return folder


def test_a_good_teacher_and_a_task_that_is_left_alone(setting, tmp_path, caplog):
    before = {name: id(value) for name, value in vars(setting.task).items()}
    state, random = copy.deepcopy(setting.task.state_dict()), torch.get_rng_state()
    path = write(setting, tmp_path / "a.pt", task_state={"something": 1})
    with caplog.at_level(logging.WARNING):
        first, second = teachers.load(f"{path}:{path}", setting.task)
    assert {name: id(value) for name, value in vars(setting.task).items()} == before
    assert setting.task.state_dict() == state and torch.equal(torch.get_rng_state(), random)
    assert first.codistill_name == f"teacher {path}" and first is not second
    assert all(torch.equal(mine, its) for mine, its in zip(setting.model.parameters(), first.parameters()))
    assert not caplog.records and not list(teachers.load(None, setting.task))


def test_other_symbols(setting, other, tmp_path):
    path = write(setting, tmp_path / "a.pt", other)
    with pytest.raises(ValueError) as error:
        teachers.load(path, setting.task)
    told = str(error.value)
    assert told.startswith(f"A teacher must have the same source dictionary as this training, but {path!r} was trained on ")
    assert f"{str(other)!r} with a dictionary of 48 symbols (sha256 " in told and "\n" not in told
    assert "there and " in told and "'v" in told and "'w" in told


def test_the_other_direction(setting, tmp_path):
    """On the same data, from b to a: the dictionaries have changed places."""
    turned = copy.copy(setting)
    turned.cfg = copy.deepcopy(setting.cfg)
    turned.cfg.task.source_lang, turned.cfg.task.target_lang = "b", "a"
    with pytest.raises(ValueError, match="must have the same source dictionary"):
        teachers.load(write(turned, tmp_path / "a.pt"), setting.task)


def test_data_that_is_no_longer_there(setting, tmp_path, caplog):
    path = write(setting, tmp_path / "a.pt", tmp_path / "gone")
    with caplog.at_level(logging.WARNING):
        assert len(teachers.load(path, setting.task)) == 1
    (record,) = caplog.records
    assert f"dictionaries cannot be checked, since those in its data '{tmp_path / 'gone'}' are no longer" in record.getMessage()
    assert path in record.getMessage()


def test_another_vocabulary(data, setting, tmp_path):
    """Told from the shapes; where the teacher's data is still there, with both dictionaries."""
    write_corpus(tmp_path / "raw", words=50)
    bigger = Setting(preprocess(tmp_path / "raw", tmp_path / "bin", "-s", "a", "-t", "b"), CODISTILL)
    for gone, words in ((None, "(source dictionary: a dictionary of 56 symbols"), (tmp_path / "gone", "classes.")):
        path = write(bigger, tmp_path / "a.pt", gone)
        with pytest.raises(ValueError) as error:
            teachers.load(path, setting.task)
        told = str(error.value)
        assert told.startswith(f"codistill_teacher {path!r} does not fit this training: its encoder.embed_tokens.weight is [56")
        assert "but must be [48, " in told and words in told and "\n" not in told
        assert error.value.__suppress_context__, "torch's many lines about shapes are not shown"


def test_what_is_no_checkpoint(setting, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no checkpoint")
    torch.save({"model": {}}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=rf"codistill_teacher must be fairseq checkpoints, but '.*{name}' cannot be read"):
            teachers.load(str(tmp_path / name), setting.task)
    with pytest.raises(ValueError, match="codistill_teacher must be checkpoints a.pt:b.pt, but there is no file 'missing.pt'."):
        teachers.load("missing.pt", setting.task)


def test_an_architecture_that_is_not_there(setting, tmp_path):
    cfg = OmegaConf.to_container(setting.cfg, resolve=True, enum_to_str=True)
    cfg["model"] = Namespace(**{**vars(cfg["model"]), "_name": "somebodys_own", "arch": "somebodys_own"})
    with pytest.raises(ValueError, match=r"codistill_teacher '.*a.pt' cannot be built with this training's task \("):
        teachers.load(write(setting, tmp_path / "a.pt", cfg=cfg), setting.task)


def test_a_model_for_other_batches(raw, setting, tmp_path):
    """A language model beside a translation student, found at the first batch."""
    lm = Setting(preprocess(raw, tmp_path / "bin", "--only-source", suffix=".b"), CODISTILL, model=LM).model
    lm.codistill_name = "teacher lm.pt"
    criterion = setting.criterion(loss="ce")
    with pytest.raises(ValueError) as error:
        criterion(setting.model, {**setting.sample, hook.TEACHING: Teaching(1.0, [lm.eval()])})
    assert "for this task's batches, but teacher lm.pt, a TransformerLanguageModel, " in str(error.value)
    assert "\n" not in str(error.value)


class Classes:
    """An image task, as far as teachers care."""

    def __init__(self, *classes):
        self.classes = list(classes)


def test_the_classes_of_images(setting, tmp_path):
    path = write(setting, tmp_path / "a.pt", task_state={"classes": ["dog", "cat"]})
    with pytest.raises(ValueError, match=r"same classes in the same order .* has 2 \(dog, cat\), and this training has 2 "):
        teachers.load(path, Classes("cat", "dog"))


class Task:
    """What the hook needs of a task."""

    def __init__(self):
        self.given = []

    def load_dataset(self, split, **kwargs):
        self.given.append(split)

    def begin_epoch(self, epoch, model): ...

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False): ...

    def valid_step(self, sample, model, criterion): ...

    def state_dict(self): ...


def test_validating_on_the_training_data_joins_nothing_and_needs_no_teacher(monkeypatch):
    class Criterion(nn.Module): ...

    class Listener:
        frozen, joined = (), False

        def join(self, run):
            self.joined = True

        def load_frozen(self, load):
            self.frozen = load()

        def drain(self, seconds): ...

    for training in (False, True):
        criterion, task, codistiller = Criterion().train(training), Task(), Listener()
        for name in ("_drain_on_sigterm", "drain_on_sigterm", "watch"):  # what outlives a test
            monkeypatch.setattr(hook, name, lambda *_: None, raising=False)
        monkeypatch.setattr(util, "Finalize", lambda *_, **__: None)
        hook.attach(task, codistiller, None, "train", lambda: ["loaded"], lambda criterion=criterion: criterion.training)
        task.load_dataset("valid")
        assert not codistiller.joined
        task.load_dataset("train")
        assert task.given == ["valid", "train"] and codistiller.joined == training
        assert list(codistiller.frozen) == (["loaded"] if training else [])
