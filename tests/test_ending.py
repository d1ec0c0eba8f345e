"""How a training ends, in every way that fairseq is started: the last snapshot and "ended" after a whole one, and only then."""

import copy
import logging
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from fairseq_runs import CODISTILL, DEADLINE, PLUGIN, ROOT, free_port, peer_environment, preprocess, train_words
from omegaconf import OmegaConf
from s3_server import s3_server
from test_training import HYDRA

from fairseq_codistill import data_order, ending, facts, hook
from fairseq_codistill.exchange.exchange import Exchange
from fairseq_codistill.exchange.stores import MemoryStore, open_store

PROGRAM = Path(sys.executable).parent  # where the commands are installed
# On CPUs fairseq spawns as many ranks as there are GPUs, that is none; everything else is as on a machine that has them.
SPAWN = "import torch; torch.cuda.device_count = lambda: {ranks}; from fairseq_cli.train import cli_main; cli_main()"


def start(words, log, environment, cwd=None):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODISTILL_")}
    clean["PATH"] = f"{PROGRAM}{os.pathsep}{clean['PATH']}"
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w") as output:
        return subprocess.Popen(
            list(map(str, words)), env={**clean, **environment}, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, cwd=cwd,
        )  # fmt: skip


@pytest.fixture(scope="module")
def ways(data, raw, tmp_path_factory):
    """Each way of starting fairseq, as a user does it, all at once: of each its exit status, log, and exchange."""
    out = tmp_path_factory.mktemp("ways")
    lm = preprocess(raw, out / "lm", "--only-source", suffix=".b")
    with s3_server() as server:
        url = server.bucket() + "/run"
        jobs = {name: start(words, out / name, environment) for name, words, environment in _jobs(data, lm, out, server, url)}
        statuses = {name: job.wait(DEADLINE) for name, job in jobs.items()}
        stores = {name: open_store(url if name == "python-m-over-s3" else str(out / f"x-{name}")) for name in jobs}
        yield {name: (statuses[name], (out / name).read_text(), stores[name]) for name in jobs}


def _jobs(data, lm, out, server, url):
    def own(name):
        return peer_environment(0, 2, out / f"x-{name}")

    def words(name, *more):
        return train_words(data, out / f"save-{name}", CODISTILL, "--max-update 6 --disable-validation", *more)[1:]

    def spawned(name, ranks):
        group = f"--distributed-world-size {ranks} --distributed-init-method tcp://127.0.0.1:{free_port()}"
        group += " --distributed-backend gloo --ddp-backend legacy_ddp"
        return [sys.executable, "-c", SPAWN.format(ranks=ranks), *words(name, group)]

    def unsaveable(name):
        """The checkpoint that is written at the end cannot be: something else has its name."""
        (out / f"save-{name}/checkpoint_last.pt.tmp/x").mkdir(parents=True)
        return name

    def hydra(name):
        return ["--config-dir", out / "config", "--config-name", "tiny", f"task.data={data}", f"common.user_dir={PLUGIN}",
                f"checkpoint.save_dir={out}/save-{name}", "dataset.disable_validation=true"]  # fmt: skip

    (out / "config").mkdir()
    tiny = HYDRA.replace("codistill_sync: true, codistill_wait: 120", "codistill_wait: 0")
    (out / "config/tiny.yaml").write_text(tiny)
    lm_model = "--task masked_lm --arch roberta_base --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    lm_model += "--encoder-attention-heads 2 --sample-break-mode eos --tokens-per-sample 64"
    masked = train_words(lm, out / "save-fairseq-train", CODISTILL, "--max-update 6", model=lm_model)
    s3 = [sys.executable, "-m", "fairseq_cli.train", *words("s3")]
    yield "fairseq-train", masked, own("fairseq-train")
    yield "python-m-over-s3", s3, {**peer_environment(0, 2, url), **server.environment}
    launch = ["codistill-launch", "--peers", "2", "--gpus-per-peer", "0", "--max-restarts", "0"]
    yield (
        "launcher-and-hydra",
        [*launch, "--", "fairseq-hydra-train", *hydra("launcher"), f"+criterion.codistill_dir={out}/x-launcher-and-hydra"],
        {},
    )
    yield "spawned", spawned("spawned", 2), own("spawned")
    name = unsaveable("spawned-unsaved")
    yield name, spawned(name, 1), own(name)
    name = unsaveable("hydra-unsaved")
    yield name, ["fairseq-hydra-train", *hydra(name), f"hydra.run.dir={out}/hydra"], own(name)


@pytest.mark.parametrize("way", ["fairseq-train", "python-m-over-s3", "launcher-and-hydra", "spawned"])
def test_the_last_weights_and_ended_are_published(ways, way):
    status, log, store = ways[way]
    assert status == 0, log[-3000:]
    for peer in (0, 1) if way == "launcher-and-hydra" else (0,):
        exchange = Exchange(store, 5)
        newest = exchange.newest(peer)
        assert (newest.update, newest.done) == (6, True) and exchange.heartbeat(peer).state == "ended", log[-3000:]
        assert exchange.fetch(peer, newest, newest.fingerprint, _any_of(store, peer, newest))


@pytest.mark.parametrize("way", ["spawned-unsaved", "hydra-unsaved"])
def test_a_training_whose_checkpoint_cannot_be_saved_is_not_completed(ways, way):
    status, log, store = ways[way]
    assert status == 1 and "done training" not in log, log[-3000:]
    exchange = Exchange(store, 5)
    assert not exchange.newest(0).done and exchange.heartbeat(0).state == "stopped"
    Exchange(store, 0).begin(0, exchange.newest(0).fingerprint)  # and may be started again from scratch


def _any_of(store, peer, manifest):
    """The tensors that a snapshot holds, as what is expected of it."""
    from safetensors.torch import load

    return load(bytes(store.read(f"peer{peer}/{manifest.file}", manifest.bytes)))


# The same in this process.

PROGRAM_TEXT = """
def main(task, steps):
    steps()
    logger.info("begin validation")
    logger.info("done training in {:.1f} seconds".format(1.0))
"""


@pytest.fixture
def exits(monkeypatch):
    """What would be called at Python's exit."""
    waiting = []
    monkeypatch.setattr(ending.util, "Finalize", lambda _, end, exitpriority: waiting.append(end))
    monkeypatch.setattr(threading, "_register_atexit", waiting.append)
    return lambda: [end() for end in waiting]


def program(level=logging.INFO, disabled=False):
    logger = logging.getLogger("fairseq_cli.train.of_this_test")
    logger.setLevel(level)
    logger.disabled = disabled
    names = {"logger": logger}
    exec(PROGRAM_TEXT, names)
    return names["main"], logger


@pytest.mark.parametrize("settings", [{}, {"level": logging.ERROR}, {"disabled": True}], ids=["as usual", "quiet", "disabled"])
def test_the_programs_last_words_end_a_training_whatever_its_log_shows(exits, settings):
    (main, logger), ends, task, other = program(**settings), [], object(), object()
    main(task, lambda: ending.watch(task, ends.append, lambda: False))
    assert ends == [True] and "info" not in vars(logger)
    exits()
    assert ends == [True], "once"
    first, second = [], []
    with pytest.raises(OSError):  # hydra's multirun: the first training fails, and the next is completed
        main(task, lambda: ending.watch(task, first.append, lambda: True) or _full())
    main(other, lambda: ending.watch(other, second.append, lambda: False))
    assert (first, second) == ([], [True])
    exits()
    assert (first, second) == ([False], [True]) and "info" not in vars(logger)


def _full():
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("complete", [True, False])
def test_a_program_without_last_words_is_asked_at_its_exit(exits, complete):
    ends = []
    ending.watch(object(), ends.append, lambda: complete)
    exits()
    assert ends == [complete]


def test_a_failing_program_without_last_words_is_not_complete(exits, monkeypatch):
    ends = []
    ending.watch(object(), ends.append, lambda: True)
    monkeypatch.setattr(sys, "last_value", ValueError("shown by Python"), raising=False)
    exits()
    assert ends == [False]


def test_nothing_that_goes_wrong_in_the_end_leaves_it(exits, caplog):
    ending.watch(object(), lambda completed: _full(), lambda: True)
    exits()
    assert "the exchange was not ended well: OSError" in caplog.text


def test_fairseqs_data_threads_end():
    from fairseq.data.iterators import BufferedIterator

    iterator = BufferedIterator(2, range(10**9))
    assert next(iterator) == 0
    ending.end_data_threads()
    assert not iterator._consumer.is_alive()


class Task:
    """As fairseq's, and its trainer's calls."""

    def __init__(self, fails_at=()):
        self.datasets, self.fails_at, self.given = {}, fails_at, []

    def load_dataset(self, split, combine=False, **kwargs):
        pass

    def begin_epoch(self, epoch, model):
        pass

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kwargs):
        self.given.append((update_num, kwargs))
        if update_num in self.fails_at:
            raise RuntimeError("CUDA out of memory")
        return 1.0, 1, {}

    def valid_step(self, sample, model, criterion, **kwargs):
        return sample, 1, {}

    def state_dict(self):
        return {}


class Told:
    """A codistiller's side of the hook."""

    def __init__(self, may_be_complete=True):
        self.may_be_complete, self.updates, self.epochs, self.ends, self.valid_loss = may_be_complete, [], [], [], None
        self.checkpointed = self.drain = lambda *_: None
        self.join = self.load_frozen = lambda _: None

    def begin_epoch(self, epoch, model):
        self.epochs.append((epoch, model))

    def teaching(self, update):
        self.updates.append(update)

    def end(self, completed):
        self.ends.append(completed)


def attached(task, told=None):
    told = told or Told()
    hook.attach(task, told, None, "train", lambda: ())
    task.load_dataset("train")
    return told


def test_arguments_by_position_by_name_and_more(exits):
    """fairseq's trainer passes names, its second run after a NaN positions; `ema_model` comes with --store-ema."""
    task, model = Task(), SimpleNamespace()
    data_order.schedule_weight_decay(task, [1.0], [1e-4, 0.0])
    told, optimizer = attached(task), SimpleNamespace(param_groups=[{"weight_decay": 7.0}])
    task.begin_epoch(1, model)
    task.begin_epoch(model=model, epoch=2)
    sample = {"net_input": {}}
    task.train_step(sample=sample, model=model, criterion=None, optimizer=optimizer, update_num=3, ignore_grad=False)
    task.train_step(sample, model, None, optimizer, 4, ignore_grad=False, ema_model="ema")
    task.train_step(sample, model, None, optimizer, 5, True)
    assert told.updates == [3, 4, 5] and told.epochs == [(1, model), (2, model)]
    assert task.given == [(3, {}), (4, {"ema_model": "ema"}), (5, {})]
    assert optimizer.param_groups[0]["weight_decay"] == 0.0, "epoch 2"
    with pytest.raises(ValueError, match="update_num"):
        task.train_step(sample, model, None, optimizer)


def test_an_out_of_memory_that_fairseq_recovers_from_is_no_failure(exits):
    task = Task(fails_at=[1])
    told = attached(task)
    for update in range(3):
        try:
            task.train_step({}, None, None, None, update)
        except RuntimeError:
            pass
    exits()
    assert told.ends == [True]


def test_a_training_that_fails_in_its_last_step_is_not_completed(exits):
    told = attached(task := Task(fails_at=[1]))
    with pytest.raises(RuntimeError):
        task.train_step({}, None, None, None, 1)
    exits()
    assert told.ends == [False]


@pytest.mark.parametrize("loss, shown", [(math.log(2), 1.0), (math.inf, None), (math.nan, None), ("no number", None)])
def test_a_validation_loss_that_is_not_finite_is_not_published(exits, loss, shown):
    told = attached(task := Task())
    assert task.valid_step(loss, None, None)[0] is loss
    assert told.valid_loss == (shown and pytest.approx(shown))
    published = Exchange(MemoryStore(), 0).publish({}, 1, epoch=1, fingerprint="x", model={}, time=0.0, valid_loss=math.inf)
    assert published.valid_loss is None


def test_what_cannot_be_read_of_a_models_settings_is_left_out():
    cfg = OmegaConf.create({"missing": "???", "layers": 2, "rate": math.inf, "long": "x" * 10**6, "list": [1]})
    assert facts.model_facts(SimpleNamespace(cfg=cfg)) == {"class": "SimpleNamespace", "layers": 2}
    assert facts.model_facts(SimpleNamespace(args=SimpleNamespace(a=1, b=None))) == {"class": "SimpleNamespace", "a": 1}
    assert facts.model_facts(SimpleNamespace(cfg=3)) == {"class": "SimpleNamespace"}


# The order of data, and weight decay.


class Data:
    def ordered_indices(self):
        return numpy.arange(6)

class PassesOn:
    """A data set that has only what another has."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


class Batches(Task):
    def get_batch_iterator(self, dataset, max_tokens=None, max_sentences=None, max_positions=None, ignore=False, multiple=1,
                           seed=1, epoch=1):  # fmt: skip
        return seed, list(dataset.ordered_indices())


@pytest.mark.parametrize("dataset", [Data(), PassesOn(Data())], ids=["its own", "passed on"])
def test_a_part_of_the_data_can_be_sent_to_a_data_worker(dataset):
    task = Batches()
    task.datasets["train"] = dataset
    data_order.order_data(task, "disjoint", 1, 2, "train")
    data_order.schedule_weight_decay(task, (1,), (0.0, 1e-4))
    assert task.get_batch_iterator(dataset)[1] == [1, 3, 5]
    there = pickle.loads(pickle.dumps(dataset))
    assert list(there.ordered_indices()) == [1, 3, 5]
    there = pickle.loads(pickle.dumps(task))  # a data set may hold its task
    assert there.train_step({}, None, None, None, 3) == (1.0, 1, {}) and there.given == [(3, {})]


def test_the_same_order_keeps_what_fairseq_adds_to_the_seed():
    task, other = Batches(), Data()
    task.datasets["train"] = dataset = Data()
    data_order.order_data(task, "same", 1, 2, "train", seed=70)
    assert task.get_batch_iterator(dataset, seed=70)[0] == 1
    assert task.get_batch_iterator(dataset, seed=72)[0] == 3, "--update-ordered-indices-seed adds the epoch"
    assert task.get_batch_iterator(dataset, 9, 9, 9, False, 1, 72)[0] == 3, "by position"
    assert task.get_batch_iterator(dataset=dataset)[0] == 1 and task.get_batch_iterator(other, seed=72)[0] == 72


def test_weight_decay_comes_back_from_zero_also_after_a_resume():
    decays, groups = [], [{"weight_decay": 0.5}, {"weight_decay": 0.0}]
    for epochs in ((1, 2), (3,)):  # two lives; the groups travel in the checkpoint
        task, groups = Task(), copy.deepcopy(groups)
        data_order.schedule_weight_decay(task, (1, 2), (1e-4, 0.0, 1e-5))
        for epoch in epochs:
            task.begin_epoch(epoch, None)
            task.train_step({}, None, None, SimpleNamespace(param_groups=groups), 0)
            decays.append([group["weight_decay"] for group in groups])
    assert decays == [[1e-4, 0.0], [0.0, 0.0], [1e-5, 0.0]]


def test_groups_that_began_without_weight_decay_are_spoken_of_once(caplog):
    task = Task()
    data_order.schedule_weight_decay(task, (1,), (1e-4, 0.0))
    for update in range(2):
        task.train_step({}, None, None, SimpleNamespace(param_groups=[{"weight_decay": 0}, {"weight_decay": 0}]), update)
    assert caplog.text.count("--codistill-weight-decays changes nothing") == 1
