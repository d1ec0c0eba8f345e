"""Averaging beside teaching: a common start, and weights pulled towards the peers', against loops that say it slowly."""

import copy
import logging
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq_runs import LOCKSTEP, taught, train_peers
from test_codistiller import Model, codistiller, of_ranks, train
from test_config import config
from test_training import same, weights
from torch import nn

from fairseq_codistill.config import check, read_environment
from fairseq_codistill.core.pull import Pull
from fairseq_codistill.core.schedules import AlphaSchedule
from fairseq_codistill.exchange.exchange import Exchange
from fairseq_codistill.exchange.snapshot import Buffer, as_sent, decode, describe, fingerprint, tensors_of
from fairseq_codistill.exchange.stores import MemoryStore, open_store
from fairseq_codistill.masters import masters_of

INTERVAL, UPDATES = 4, 14
NOTHING = AlphaSchedule("constant", 0.0)


class Tiny(nn.Module):
    """Tied weights, a running statistic and a frozen parameter beside what is trained."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer, self.norm, self.out = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.out.weight = self.layer.weight
        self.frozen = nn.Parameter(torch.full((2,), float(seed)), requires_grad=False)

    def forward(self, x):
        return self.out(self.norm(self.layer(x)))


def step(model, peer, update):
    """One of plain SGD on a batch of the peer's own."""
    batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(1000 * peer + update))
    model.zero_grad()
    (model(batch) - batch.flip(1)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def in_lockstep(models, updates=UPDATES, store=None, start=0, **settings):
    """Each model trained by a thread, with exchanges in lockstep; None where one raised nothing, else what it raised."""
    store, errors = store or MemoryStore(), [None] * len(models)

    def run(peer):
        settings_of = {"schedule": NOTHING, "interval": INTERVAL, "lockstep": True, "wait": 60.0, **settings}
        one = codistiller(store, peer, len(models), model=models[peer], **settings_of)
        try:
            for update in range(start, updates):
                one.teaching(update)
                step(models[peer], peer, update)
            one.end(completed=False)
        except Exception as error:
            errors[peer] = error

    threads = [threading.Thread(target=run, args=(peer,)) for peer in range(len(models))]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert errors == [None] * len(models)


def local_sgd(models, updates=UPDATES, strength=1.0):
    """The reference: all begin as the first; every INTERVAL updates all parameters go on from (towards) their mean."""
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for update in range(updates):
        if update and update % INTERVAL == 0:
            for group in zip(*(model.parameters() for model in models)):
                mean = sum(parameter.data for parameter in group) / len(group)
                for parameter in group:
                    parameter.data.lerp_(mean, strength)
        for peer, model in enumerate(models):
            step(model, peer, update)


def states(models):
    return [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]


@pytest.mark.parametrize("peers", [2, 3])
def test_in_lockstep_a_pull_of_1_is_local_sgd_to_the_bit(peers):
    mine, reference = [Tiny(seed) for seed in range(peers)], [Tiny(seed) for seed in range(peers)]
    in_lockstep(mine, pull=1.0, shared_init=True, wire_dtype=torch.float32)
    local_sgd(reference)
    for model, slow in zip(states(mine), states(reference)):
        assert same(model, slow), "running statistics included, which are each peer's own"
    assert not same(*states(mine)[:2]), "they have trained on since"


def test_a_weaker_pull_goes_a_part_of_the_way():
    mine, reference = [Tiny(0), Tiny(1)], [Tiny(0), Tiny(1)]
    in_lockstep(mine, pull=0.3, shared_init=True, wire_dtype=torch.float32)
    local_sgd(reference, strength=0.3)
    for model, slow in zip(mine, reference):
        for parameter, expected in zip(model.parameters(), slow.parameters()):
            torch.testing.assert_close(parameter, expected)


def test_without_a_pull_the_peers_train_alone():
    mine, reference = [Tiny(0), Tiny(1)], [Tiny(0), Tiny(1)]
    in_lockstep(mine)
    for peer, model in enumerate(reference):
        [step(model, peer, update) for update in range(UPDATES)]
    assert all(same(*pair) for pair in zip(states(mine), states(reference)))


@pytest.mark.parametrize("wire", [None, torch.int8])
def test_in_lockstep_it_repeats_to_the_bit_and_a_resumed_run_pulls_once(wire):
    settings = dict(pull=0.6, shared_init=True, wire_dtype=wire)
    whole, parts = [Tiny(0), Tiny(1)], [Tiny(0), Tiny(1)]
    in_lockstep(whole, **settings)
    store = MemoryStore()
    in_lockstep(parts, 6, store, **settings)
    in_lockstep(parts, 8, store, start=6, **settings)  # resumed between two exchanges, and then at one
    in_lockstep(parts, UPDATES, store, start=8, **settings)
    assert all(same(*pair) for pair in zip(states(whole), states(parts)))


# One pull, by hand.


def one_pull(model, others, strength=1.0, wire=None, masters=dict, since=None, peers=2):
    """`model` pulled towards `others`, {peer: model}; `since`: moves `model` between publishing and the pull."""
    pull = Pull(strength, 0, list(range(1, peers)), wire, masters)
    pull.note(model)
    if since is not None:
        since(model)
    pull.to(model, 4, {peer: {n: as_sent(t, wire) for n, t in tensors_of(other).items()} for peer, other in others.items()})


@pytest.mark.parametrize("wire", [None, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_peers_that_agree_do_not_move_whatever_weights_travel_as(wire):
    model = Tiny(0)
    before = copy.deepcopy(model.state_dict())
    one_pull(model, {1: copy.deepcopy(model)}, 0.7, wire)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.int8, None])
def test_what_is_subtracted_is_what_was_published(wire):
    """w + λ (mean(p, p1) − p), with p and p1 as they travel and w as it is now."""
    model, other = Tiny(0), Tiny(1)
    p, p1 = (as_sent(one.layer.weight.data, wire).float() for one in (model, other))

    def trained(model):
        model.layer.weight.data.add_(0.01)

    w = model.layer.weight.data + 0.01
    one_pull(model, {1: other}, 0.4, wire, since=trained)
    torch.testing.assert_close(model.layer.weight.data, w + 0.4 * ((p + p1) / 2 - p))
    assert model.out.weight is model.layer.weight, "tied weights are pulled once"
    assert model.frozen[0] == 0 and torch.equal(model.norm.running_var, torch.ones(3))


def test_a_teacher_that_does_not_come_counts_as_my_own_weights():
    model, other = Tiny(0), Tiny(1)
    p, p1 = (one.layer.weight.data.clone() for one in (model, other))
    one_pull(model, {2: other}, 1.0, peers=3)
    torch.testing.assert_close(model.layer.weight.data, (2 * p + p1) / 3)


def test_weights_that_have_diverged_pull_nowhere(caplog):
    model, good, bad = Tiny(0), Tiny(1), Tiny(2)
    p, p1 = (one.layer.weight.data.clone() for one in (model, good))
    for parameter in bad.parameters():
        parameter.data.mul_(1e30)
    one_pull(model, {1: good, 2: bad}, 1.0, peers=3)
    torch.testing.assert_close(model.layer.weight.data, (2 * p + p1) / 3)
    assert "peer 2: its weights are inf times" in caplog.text or "peer 2: its weights are 1" in caplog.text
    one_pull(model, {2: bad}, 1.0, peers=3)
    assert model.layer.weight.isfinite().all()


FP16 = {
    "list": lambda params: [nn.Parameter(p.data.float()) for p in params],
    "flat": lambda params: torch.cat([p.data.float().view(-1) for p in params]),
    "by device": lambda params: {0: torch.cat([p.data.float().view(-1) for p in params])},
}


@pytest.mark.parametrize("kind", FP16)
def test_under_fp16_the_optimizers_copies_are_pulled(kind):
    model, other = Tiny(0).half(), Tiny(1).half()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = SimpleNamespace(fp16_params=params, fp32_params=FP16[kind](params))
    views = masters_of(optimizer)
    assert views.keys() == {id(p) for p in params} and all(torch.equal(views[id(p)].half(), p) for p in params)
    for view in views.values():
        view.add_(1e-5)  # less than fp16 can tell apart, and yet not lost
    p, p1 = (one.layer.weight.data.float() for one in (model, other))
    one_pull(model, {1: other}, 0.4, masters=lambda: masters_of(optimizer))
    pulled = masters_of(optimizer)[id(model.layer.weight)]
    torch.testing.assert_close(pulled, p + 1e-5 + 0.4 * ((p + p1) / 2 - p), rtol=1e-6, atol=1e-7)
    assert torch.equal(model.layer.weight.data, pulled.half())


def test_optimizers_without_copies():
    assert masters_of(SimpleNamespace()) == masters_of(None) == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_without_copies_is_rounded_once(dtype):
    model, other = Tiny(0).to(dtype), Tiny(1).to(dtype)
    p, p1 = (one.layer.weight.data.float() for one in (model, other))
    one_pull(model, {1: other}, 1.0)
    assert torch.equal(model.layer.weight.data, ((p + p1) / 2).to(dtype))


def test_as_sent_is_what_a_reader_gets():
    tensors = {**tensors_of(Tiny(3)), "whole": torch.arange(4)}
    for wire in (None, torch.bfloat16, torch.float16, torch.int8):
        buffer = Buffer.of(tensors, wire)
        manifest = describe(buffer, 4, epoch=1, fingerprint="x", model={}, time=0.0)
        read = decode(bytearray(buffer.data), manifest, tensors)
        assert all(torch.equal(as_sent(tensor, wire), read[name]) for name, tensor in tensors.items()), wire
        assert all(as_sent(tensor, wire).data_ptr() != tensor.data_ptr() for tensor in tensors.values()), "a copy"


# When it happens.


def test_in_the_background_each_snapshot_pulls_once():
    store = MemoryStore()
    me, other = codistiller(store, 0, pull=1.0, model=Model(0.0)), codistiller(store, 1, model=Model(1.0))
    train(other, 5)
    me.teaching(0)
    assert me._model.bias[0] == 0.5, "half way, since the mean counts my own"
    train(me, 8, start=1)
    assert me._model.bias[0] == 0.5, "at update 4 there was nothing new"


@pytest.mark.parametrize("oldest, bias", [(3, 0.0), (4, 0.5)])
def test_a_stale_snapshot_does_not_pull(oldest, bias):
    store = MemoryStore()
    other = codistiller(store, 1, model=Model(1.0))
    train(other, 5)
    me = codistiller(store, 0, pull=1.0, model=Model(0.0), max_staleness=oldest)
    me.teaching(8)  # resumed
    assert me._model.bias[0] == bias


# A common start.


def test_all_begin_as_peer_0_does_rounded_as_it_travels(caplog):
    caplog.set_level(logging.INFO)
    models = [Tiny(seed) for seed in range(3)]
    first = {name: as_sent(tensor, torch.bfloat16) for name, tensor in tensors_of(models[0]).items()}
    in_lockstep(models, 0)
    assert not same(*states(models)[:2])
    ones = [codistiller(MemoryStore(), 0, 3, shared_init=True, model=models[0], topology="ring")]
    ones += [codistiller(ones[0].exchange.store, i, 3, shared_init=True, model=models[i], topology="ring") for i in (1, 2)]
    for one in ones:
        one.teaching(0)
    for model in models:
        assert all(torch.equal(tensor, first[name].to(tensor.dtype)) for name, tensor in tensors_of(model).items())
    assert caplog.text.count("begins with the weights of peer 0 as of its update 0") == 2
    assert models[2].frozen[0] == 0, "all weights, trained or not"


def test_the_optimizers_copies_begin_alike_too():
    store = MemoryStore()
    models = [Tiny(0).half(), Tiny(1).half()]
    for peer, model in enumerate(models):
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = SimpleNamespace(fp16_params=params, fp32_params=FP16["flat"](params))
        one = codistiller(store, peer, shared_init=True, model=model)
        one.masters = lambda optimizer=optimizer: masters_of(optimizer)
        one.teaching(0)
    assert same(*states(models))
    assert all(torch.equal(masters_of(optimizer)[id(p)].half(), p) for p in params)


def test_a_resumed_peer_keeps_its_weights_and_a_late_one_takes_the_newest():
    store = MemoryStore()
    zero = codistiller(store, 0, shared_init=True, model=Model(0.0), peers=3)
    train(zero, 5)
    store.remove("peer0/u000000000.json")
    store.remove("peer0/u000000000.safetensors")
    zero._model.bias.data.fill_(5.0)
    train(zero, 9, start=5)
    resumed = codistiller(store, 1, shared_init=True, model=Model(1.0), peers=3)
    resumed.teaching(6)
    late = codistiller(store, 2, shared_init=True, model=Model(2.0), peers=3)
    late.teaching(0)
    assert (resumed._model.bias[0], late._model.bias[0]) == (1.0, 5.0)


def test_without_peer_0_there_is_no_common_start():
    one = codistiller(MemoryStore(), 1, shared_init=True, wait=0.01)
    with pytest.raises(ValueError) as error:
        one.teaching(0)
    assert str(error.value) == (
        "codistill_init shared needs the first snapshot of peer 0, but none has come to memory within 0.01 s; does peer 0 run, "
        "and see this directory? --codistill-wait sets the time."
    )


def test_a_pull_without_a_common_start_is_spoken_of(caplog):
    codistiller(MemoryStore(), 0, pull=0.5).teaching(0)
    assert caplog.text.count("did you forget --codistill-init shared?") == 1
    codistiller(MemoryStore(), 0, pull=0.5, shared_init=True).teaching(0)
    codistiller(MemoryStore(), 0, pull=0.5).teaching(3)
    assert caplog.text.count("did you forget --codistill-init shared?") == 1


@pytest.mark.parametrize("options, sentence", [
    (dict(pull=1.5), "codistill_pull must be between 0 and 1, but is 1.5 instead."),
    (dict(pull=float("nan")), "codistill_pull must be between 0 and 1"),
    (dict(pull=0.5, teacher="a.pt"), "codistill_pull is 0.5, but needs peers that exchange weights"),
    (dict(init="shared", loss="uniform"), "codistill_init is shared, but needs peers that exchange weights"),
])  # fmt: skip
def test_what_cannot_be_meant_is_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        check(read_environment(config(**options)))
    assert sentence in str(error.value)


# In a data-parallel group, and in fairseq.


def _publish_as_peer_0(store, update, model):
    facts = dict(epoch=1, fingerprint=fingerprint(model), model={}, time=0.0)
    Exchange(store, 0).publish(tensors_of(model), update, **facts)


def _rank(rank, port, path, results):
    """Of peer 1. Its ranks begin apart here, so that what is not given to all of them would show."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    one = codistiller(open_store(path), 1, model=Tiny(7 + rank), pull=1.0, shared_init=True, wire_dtype=torch.float32)
    one.teaching(0)
    results.put((rank, {name: tensor.tolist() for name, tensor in one._model.state_dict().items()}))
    dist.barrier()
    dist.destroy_process_group()


def test_all_ranks_of_a_group_begin_and_are_pulled_alike(tmp_path):
    store, begin, later = open_store(str(tmp_path / "x")), Tiny(0), Tiny(1)
    _publish_as_peer_0(store, 0, begin)
    _publish_as_peer_0(store, 4, later)
    first, second = of_ranks(_rank, tmp_path / "x")
    assert first == second
    middle = (begin.layer.weight.data + later.layer.weight.data) / 2
    torch.testing.assert_close(torch.tensor(first["layer.weight"]), middle)
    assert first["frozen"] == [0.0, 0.0]


MODES = ["--codistill-init own", "--fp16 --fp16-no-flatten-grads", "--memory-efficient-fp16"]


@pytest.mark.parametrize("mode", MODES)
def test_in_fairseq_two_peers_meet_in_the_middle(data, tmp_path, mode):
    """With steps of length 0, what differs is the start alone, and a pull of 1 ends it: without teaching, in all precisions."""
    options = "--codistill-pull 1 --codistill-alpha 0 --codistill-interval 2 --codistill-wire-dtype fp32 --lr 0 --max-update 3"
    logs = train_peers(data, tmp_path, LOCKSTEP, options, mode)
    assert all(log.count("at update 2 pulled towards peer") == 1 and not taught(log) for log in logs)
    assert same(*(weights(tmp_path / f"peer{peer}/checkpoint_last.pt") for peer in range(2)))


def test_in_fairseq_peers_begin_alike(data, tmp_path):
    train_peers(data, tmp_path, LOCKSTEP, "--codistill-init shared --codistill-interval 2 --lr 0 --max-update 1")
    assert same(*(weights(tmp_path / f"peer{peer}/checkpoint_last.pt") for peer in range(2)))
