"""Who teaches when: a codistiller alone, with peers in memory, in threads, and with the ranks of a group."""

import dataclasses
import threading
import time

import pytest
import torch
import torch.distributed as dist
from fairseq_runs import fork_server, free_port
from test_background import Arrivals, Gate
from torch import nn

from fairseq_codistill.core import barrier, group
from fairseq_codistill.core import codistiller as codistiller_module
from fairseq_codistill.core.codistiller import Codistiller
from fairseq_codistill.core.schedules import AlphaSchedule
from fairseq_codistill.core.topology import edges_of
from fairseq_codistill.exchange import background as background_module
from fairseq_codistill.exchange.exchange import KEEP_FOR_LEARNERS, Exchange, Run
from fairseq_codistill.exchange.snapshot import fingerprint, tensors_of
from fairseq_codistill.exchange.stores import MemoryStore, open_store

CONSTANT = AlphaSchedule("constant", 0.5)


class Model(nn.Module):
    def __init__(self, value=0.0):
        super().__init__()
        self.layer = nn.utils.weight_norm(nn.Linear(2, 2, bias=False))  # its `weight` is no leaf and refuses deepcopy
        self.dropout = nn.Dropout(0.5)
        self.bias = nn.Parameter(torch.full((2,), float(value)))

    def forward(self, x):
        return self.dropout(self.layer(x)) + self.bias


def codistiller(store, peer, peers=2, model=None, join=True, topology="all", **settings):
    settings = {"interval": 4, "schedule": CONSTANT, "in_background": False, **settings}
    one = Codistiller(peer, peers, exchange=Exchange(store, peer), edges=edges_of(topology, peers), **settings)
    if join:
        one.join(Run(peers, None, None))
        one.begin_epoch(1, model or Model(peer))
    return one


def train(one, updates, start=0):
    """Ask for each update in turn; the teaching of each."""
    return [one.teaching(update) for update in range(start, updates)]


def biases(teaching):
    return [peer.bias[0].item() for peer in teaching.peers]


def test_a_peer_teaches_from_its_first_snapshot_on(caplog):
    store = MemoryStore()
    me, other = codistiller(store, 0), codistiller(store, 1)
    train(other, 5)
    assert me.teaching(0).staleness == -4, "it is ahead of me"
    other_late = codistiller(MemoryStore(), 0)
    assert train(other_late, 9) == [None] * 9, "nobody is there"
    assert caplog.text.count("peer 1: it has published nothing in memory yet") == 1


def test_the_heartbeat_tells_at_once_from_whom_a_resumed_peer_learns():
    store = MemoryStore()
    me, other = codistiller(store, 0), codistiller(store, 1)
    train(other, 5)
    me.teaching(6)  # resumed between two exchanges
    me._background._send_heartbeat()
    heartbeat = me.exchange.heartbeat(0)
    assert (heartbeat.update, heartbeat.teachers) == (6, {"1": 4})


def test_a_snapshot_of_update_zero_does_not_teach():
    store = MemoryStore()
    me, other = codistiller(store, 0), codistiller(store, 1)
    for update in range(5):
        mine, theirs = me.teaching(update), other.teaching(update)
    assert mine is None and theirs.staleness == 0, "peer 1 asked after peer 0 had published update 4"
    assert me.teaching(5).staleness == 1, "what came too late for the exchange is not left to lie until the next"


def test_a_late_snapshot_is_looked_for_ten_times_in_an_interval():
    store = MemoryStore()
    me, other = codistiller(store, 0, interval=40), codistiller(store, 1, interval=40)
    train(me, 41)
    train(other, 41)
    assert [teaching is not None for teaching in train(me, 46, start=41)] == [False] * 3 + [True] * 2
    other.teaching(80)
    assert me.teaching(48).staleness == 8, "one snapshot in an interval is enough"
    assert me.teaching(80).staleness == 0


def test_the_peer_is_frozen_stale_and_in_eval_mode():
    store, theirs = MemoryStore(), Model(3.0)
    me, other = codistiller(store, 0), codistiller(store, 1, model=theirs, wire_dtype=torch.float32)
    train(other, 5)
    with torch.no_grad():
        theirs.bias.fill_(9.0)  # it trains on; I do not see that before the next exchange
    teaching = me.teaching(0)
    (peer,) = teaching.peers
    assert biases(teaching) == [3.0] and not peer.training and not any(p.requires_grad for p in peer.parameters())
    ((who, output),) = teaching.outputs({"x": torch.ones(1, 2)})
    assert who is peer and not output.requires_grad
    torch.testing.assert_close(output, theirs.eval()(torch.ones(1, 2)) - 6.0)
    for update in range(5, 9):
        other.teaching(update)
    assert biases(me.teaching(3)) == [3.0] and biases(me.teaching(4)) == [9.0]


def test_micro_batches_and_re_runs_exchange_once():
    store = MemoryStore()
    me, writes = codistiller(store, 0), []
    write = store.write
    store.write = lambda name, *args, **kwargs: writes.append(name) or write(name, *args, **kwargs)
    for update in (0, 0, 1, 1, 2, 3, 4, 4, 4, 5):
        me.teaching(update)
    assert [name for name in writes if name.endswith("latest.json")] == ["peer0/latest.json"] * 2
    assert me.exchange.newest(0).update == 4


def test_alpha_burn_in_and_epochs():
    store = MemoryStore()
    schedule = AlphaSchedule("exponential", 1.0, gamma=2.0, burn_in=6)
    me, other = codistiller(store, 0, schedule=schedule), codistiller(store, 1)
    train(other, 5)
    assert train(me, 6) == [None] * 6
    assert me.teaching(6).alpha == 1.0
    me.begin_epoch(3, me._model)
    assert me.teaching(7).alpha == 4.0


def test_after_the_end_of_teaching_snapshots_still_go_out():
    store = MemoryStore()
    me, other = codistiller(store, 0, schedule=AlphaSchedule("constant", 1.0, until=3)), codistiller(store, 1)
    train(other, 5)
    assert [teaching is not None for teaching in train(me, 10)] == [True] * 3 + [False] * 7
    assert me.exchange.newest(0).update == 8


def test_a_stale_snapshot_stops_teaching_and_a_fresh_one_resumes():
    store = MemoryStore()
    me, other = codistiller(store, 0, max_staleness=3), codistiller(store, 1)
    train(other, 5)
    assert [teaching is not None for teaching in train(me, 10)] == [True] * 8 + [False] * 2
    train(other, 9, start=5)
    assert me.teaching(11).staleness == 3 and me.teaching(12) is None, "it is of update 8"
    train(other, 13, start=9)
    assert me.teaching(15).staleness == 3 and me.teaching(16) is None
    train(other, 21, start=13)
    assert me.teaching(20).staleness == 0


def test_all_ring_and_their_models():
    store = MemoryStore()
    ones = [codistiller(store, i, peers=3, topology="ring") for i in range(3)]
    for update in range(5):
        taught = [one.teaching(update) for one in ones]
    assert [biases(teaching) if teaching else None for teaching in taught] == [None, [0.0], [1.0]]
    for update in range(5, 10):
        taught = [one.teaching(update) for one in ones]
    assert [biases(teaching) for teaching in taught] == [[2.0], [0.0], [1.0]]


def test_peers_in_their_own_precision():
    store = MemoryStore()
    me, other = codistiller(store, 0, peer_dtype=torch.bfloat16), codistiller(store, 1, model=Model(1.0))
    train(other, 5)
    teaching = me.teaching(0)
    assert {p.dtype for p in teaching.peers[0].parameters()} == {torch.bfloat16}
    ((_, output),) = teaching.outputs({"x": torch.ones(1, 2)})
    assert output.dtype == torch.bfloat16 and me._model.bias.dtype == torch.float32


@pytest.mark.parametrize("dtype, wire, travels", [
    (torch.float32, None, "bfloat16"), (torch.float16, None, "float16"), (torch.float64, None, "float64"),
    (torch.float32, torch.float32, "float32"), (torch.float32, torch.int8, "int8"),
])  # fmt: skip
def test_what_weights_travel_as(dtype, wire, travels):
    store, theirs = MemoryStore(), Model(1.5).to(dtype)
    other = codistiller(store, 1, model=theirs, wire_dtype=wire)
    train(other, 5)
    assert other.exchange.newest(1).dtype == travels
    teaching = codistiller(store, 0).teaching(0)
    assert biases(teaching) == [1.5] and teaching.peers[0].bias.dtype == torch.float32, "the copy has the model's precision"


def test_holding_a_peer_draws_no_random_numbers_and_leaves_my_model_alone():
    store, mine = MemoryStore(), Model()
    me, other = codistiller(store, 0, model=mine), codistiller(store, 1)
    train(other, 5)
    mine(torch.ones(1, 2)).sum().backward()
    gradient, state = mine.bias.grad.clone(), torch.get_rng_state()
    (peer,) = me.teaching(0).peers
    list(me.teaching(0).outputs({"x": torch.ones(1, 2)}))
    assert torch.equal(torch.get_rng_state(), state)
    assert mine.training and mine.bias.requires_grad and torch.equal(mine.bias.grad, gradient) and peer.bias.grad is None


BROKEN = {
    "truncated": lambda data: data[:-10],
    "a bit flipped": lambda data: data[:60] + bytes([data[60] ^ 4]) + data[61:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_corrupt_snapshot_is_refused_once_and_training_goes_on(how, caplog):
    store = MemoryStore()
    me, other = codistiller(store, 0), codistiller(store, 1, model=Model(3.0))
    train(other, 5)
    assert biases(me.teaching(0)) == [3.0]
    train(other, 9, start=5)
    name = "peer1/u000000008.safetensors"
    store.write(name, BROKEN[how](store.read(name, 10**6)))
    held = train(me, 12, start=1)
    assert all(biases(teaching) == [3.0] for teaching in held), "it keeps what it holds"
    warnings = [text for text in map(str, caplog.messages) if "refused" in text]
    assert len(warnings) == 1 and "peer 1: its snapshot is refused" in warnings[0] and "goes on" in warnings[0], warnings
    train(other, 13, start=9)
    assert me.teaching(12).staleness == 0, "and takes the next good one"


@pytest.mark.parametrize("manifest", [b"{}", b"\x00", b'{"format": 1, "file": "../../x"}'])
def test_a_hostile_manifest_costs_only_its_teaching(manifest, caplog):
    store = MemoryStore()
    me = codistiller(store, 0)
    store.write("peer1/latest.json", manifest)
    assert train(me, 9) == [None] * 9 and "its snapshot is refused: the manifest" in caplog.text


def test_a_model_of_another_architecture_is_refused(caplog):
    store = MemoryStore()
    other = codistiller(store, 1, model=nn.Linear(3, 3))
    train(other, 5)
    assert codistiller(store, 0).teaching(0) is None and "all peers must have the same model" in caplog.text


def test_a_failing_store_and_a_diverged_model_are_only_warnings(caplog):
    store, mine = MemoryStore(), Model()
    me = codistiller(store, 0, model=mine)
    me.teaching(0)
    write, store.write = store.write, _full
    me.teaching(4)
    assert "update 4 was not published: No space left on device; training goes on" in caplog.text
    store.write = write
    with torch.no_grad():
        mine.bias.fill_(float("nan"))
    me.teaching(8)
    assert "update 8 was not published: 'bias' has values that are not finite" in caplog.text
    assert me.exchange.newest(0).update == 0


def _full(*_, **__):
    raise OSError(28, "No space left on device")


def test_the_last_weights_are_published_and_a_slower_peer_still_has_a_teacher():
    store, last = MemoryStore(), Model(1.0)
    other = codistiller(store, 1, model=last)
    train(other, 6)
    with torch.no_grad():
        last.bias.fill_(5.0)
    other.end(completed=True)
    manifest = other.exchange.newest(1)
    assert manifest.update == 6 and manifest.done
    assert biases(codistiller(store, 0).teaching(0)) == [5.0]


def test_a_failed_training_publishes_nothing_more():
    store = MemoryStore()
    other = codistiller(store, 1)
    train(other, 6)
    other.end(completed=False)
    assert other.exchange.newest(1).update == 4 and not other.exchange.newest(1).done
    codistiller(store, 1)  # its index is free again


def test_wait_at_the_start():
    """The first snapshots are awaited, but no longer than asked; `sleep` stands for the other peer's progress."""
    store = MemoryStore()
    other, naps = codistiller(store, 1, join=False), []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 3:
            other.join(Run(2, None, None))
            other.begin_epoch(1, Model())
            train(other, 5)

    me = codistiller(store, 0, wait=60.0, sleep=nap)
    assert me.teaching(0) is not None and len(naps) == 3
    assert codistiller(MemoryStore(), 0, wait=0.0, sleep=naps.append).teaching(0) is None and len(naps) == 3


def test_nobody_comes_and_the_wait_ends(caplog):
    assert codistiller(MemoryStore(), 0, wait=0.01).teaching(0) is None
    assert "peer 1 has not appeared in memory within 0.01 s (--codistill-wait); training starts without it" in caplog.text


def test_a_resumed_peer_takes_the_newest_at_once():
    store = MemoryStore()
    other = codistiller(store, 1)
    train(other, 13)
    resumed = codistiller(store, 0, model=Model())
    assert resumed.teaching(10).staleness == -2, "update 10 is between two exchanges, but it holds nobody yet"


def test_frozen_teachers_and_controls_need_no_exchange():
    frozen = Codistiller(0, 1, CONSTANT, frozen=[Model(7.0)])
    frozen.begin_epoch(1, Model())
    assert biases(frozen.teaching(0)) == [7.0] and frozen.teaching(0).staleness == 0
    control = Codistiller(0, 1, dataclasses.replace(CONSTANT, burn_in=2), needs_peers=False)
    control.begin_epoch(1, Model())
    assert control.teaching(1) is None and control.teaching(2).alpha == 0.5 and not control.teaching(2).peers


@pytest.mark.parametrize("clock", [lambda: -86400.0, lambda: 4e9, iter([3600.0, 0.0] * 100).__next__])
def test_no_clock_decides_anything(clock):
    """Hosts a day apart, clocks that jump: the same teaching as with a clock that stands still."""
    seen = []
    for clocks in ((lambda: 0.0, lambda: 0.0), (clock, lambda: 5e8)):
        store = MemoryStore()
        ones = [codistiller(store, i, clock=clocks[i], max_staleness=6) for i in range(2)]
        taught = [[one.teaching(update) for one in ones] for update in range(12)]
        seen.append([[(biases(t), t.staleness) if t else None for t in both] for both in taught])
        [one.end(completed=True) for one in ones]
    assert seen[0] == seen[1] and seen[0][11][0] is not None


# Lockstep.


def in_lockstep(store, peers, updates, topology="ring", seen=None, **settings):
    """Peers as threads; each adds its update number to its bias, so that whose weights are held can be read off."""
    seen = {} if seen is None else seen

    def run(i):
        model = Model()
        one = codistiller(store, i, peers, model=model, topology=topology, lockstep=True, wait=60.0, **settings)
        for update in range(updates[i]):
            teaching = one.teaching(update)
            seen[i, update] = (biases(teaching), teaching.staleness) if teaching else None
            with torch.no_grad():
                model.bias.fill_(100 * i + update + 1)
        one.end(completed=True)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(peers)]
    [thread.start() for thread in threads]
    [thread.join(120) for thread in threads]
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    return seen


def test_lockstep_holds_the_snapshot_of_the_same_update():
    seen = in_lockstep(MemoryStore(), 3, [14] * 3)
    for i in range(3):
        for update in range(14):
            exchange, teacher = update - update % 4, (i - 1) % 3
            expected = ([100.0 * teacher + exchange], update - exchange) if exchange else None
            assert seen[i, update] == expected, (i, update)


def test_lockstep_does_not_wait_for_a_peer_that_has_finished():
    seen = in_lockstep(MemoryStore(), 2, [14, 6], topology="all")
    assert seen[0, 13] == ([106.0], 7.0), "peer 1 ended after 6 updates; its last weights go on teaching"


def test_lockstep_gives_up_on_a_dead_peer(caplog):
    store = MemoryStore()
    me = codistiller(store, 0, lockstep=True, wait=0.01)
    assert train(me, 9) == [None] * 9
    assert "lockstep is broken: no snapshot of update 4 has come in time" in caplog.text


def test_lockstep_waits_for_a_dead_peer_once_until_it_shows_life():
    store, waits = MemoryStore(), []
    me, dead = codistiller(store, 0, lockstep=True, wait=0.01), codistiller(store, 1)
    dead.teaching(0)
    me.teaching(0)
    me._barrier._sleep = waits.append

    def has_waited(update):
        del waits[:]
        train(me, update + 1, start=update)
        return len(waits) > 0

    assert [has_waited(update) for update in (4, 8, 12)] == [True, False, False]
    dead._background._send_heartbeat()  # it is back, though far behind
    assert [has_waited(update) for update in (16, 20)] == [True, False]
    train(dead, 5, start=4)  # it publishes
    assert [has_waited(update) for update in (24, 28)] == [True, False]
    train(dead, 33, start=32)
    assert not has_waited(32) and me.teaching(32).staleness == 0, "and is met again"
    assert has_waited(36)


@pytest.mark.parametrize("what", ["peer1", "peer1/u000000004.s", "peer1/u000000008.s"])
def test_a_storage_that_hangs_is_waited_for_once_in_lockstep(monkeypatch, what):
    monkeypatch.setattr(background_module, "_MOMENT", 0.01)
    monkeypatch.setattr(background_module, "_SHORTEST_LIMIT", 0.5)  # half a minute otherwise, for each of three exchanges
    store, waits = Gate(), []
    me, other = codistiller(store, 0, lockstep=True, wait=0.1), codistiller(store, 1)
    me.teaching(0)
    train(other, 41)  # it is far ahead, and keeps its last snapshots
    facts = dict(epoch=1, fingerprint=fingerprint(Model()), model={}, time=0.0)
    for update in (4, 8, 12):
        other.exchange.publish(tensors_of(Model(update)), update, needed_from=0, **facts)
    store.reading = what
    me._barrier._sleep = lambda seconds: (waits.append(seconds), time.sleep(seconds))
    waited = []
    for update in range(1, 13):
        me.teaching(update)
        waited.append(len(waits))
        del waits[:]
    hung = 8 if "8" in what else 4
    assert [update for update in range(1, 13) if waited[update - 1]] == [hung], "and its reader is left alone after that"
    store.open.set()


def test_lockstep_keeps_what_a_learner_would_need_to_resume():
    """Peer 1 saved no checkpoint: everything is kept. It saves one, twice: what lies before the first may go."""
    store = MemoryStore()
    ones = [codistiller(store, i, lockstep=True, wait=60.0) for i in range(2)]

    def step(one, update):
        thread = threading.Thread(target=one.teaching, args=(update,))
        thread.start()
        return thread

    def run(start, stop):
        for update in range(start, stop):
            [thread.join(60) for thread in [step(one, update) for one in ones]]

    run(0, 21)
    kept = [name for name in store.names("peer0") if name.endswith(".safetensors")]
    assert len(kept) == 6
    ones[1].checkpointed()  # at update 21
    run(21, 29)
    ones[1].checkpointed()  # at update 29: should it die while writing this one, it resumes from 21
    run(29, 41)
    kept = [name for name in store.names("peer0") if name.endswith(".safetensors")]
    assert kept[0] == "u000000020.safetensors"


def test_lockstep_does_not_wait_for_what_a_teacher_no_longer_keeps():
    """Peer 1 was dead for long; restarted at update 4, it meets peer 0 as it is now, and at once."""
    store = MemoryStore()
    other = codistiller(store, 0, lockstep=True, wait=0.001)
    train(other, 81)
    kept = [name for name in store.names("peer0") if name.endswith(".safetensors")]
    assert len(kept) <= KEEP_FOR_LEARNERS and "u000000004.safetensors" not in kept
    me = codistiller(store, 1, lockstep=True, wait=1e9, sleep=lambda seconds: pytest.fail("it waits"))
    assert me.teaching(4).staleness == -76


# What is said of the options.


def test_options_that_never_teach_are_spoken_of_once(caplog):
    train(codistiller(MemoryStore(), 0, updates=4, interval=4, every=5, schedule=AlphaSchedule("constant", 0.5, burn_in=4)), 4)
    for name, value in (("interval", 4), ("every", 5), ("burn-in", 4)):
        assert caplog.text.count(f"--codistill-{name} is {value}, which is not below --max-update 4, so this peer will") == 1
    caplog.clear()
    train(codistiller(MemoryStore(), 0, updates=5), 5)
    assert "max-update" not in caplog.text


def test_a_schedule_that_is_given_anew_at_a_resume_is_spoken_of(caplog):
    store = MemoryStore()

    def resumed(update, epoch, schedule):
        one = codistiller(store, 0, schedule=schedule)
        one.begin_epoch(epoch, Model())
        caplog.clear()
        train(one, update + 5, start=update)
        one.end(completed=False)
        return "; ".join(message for message in caplog.messages if "since this run's" in message)

    first = AlphaSchedule("exponential", 1.0, gamma=1.1, milestones=[3.0])
    assert resumed(0, 1, first) == "" and resumed(4, 8, first) == ""
    assert resumed(8, 8, dataclasses.replace(first, alpha=2.0, burn_in=3)) == (
        "codistillation: since this run's snapshot of update 8: codistill_alpha 1.0 → 2.0, codistill_burn_in 0 → 3: options "
        "act as if they had been given from the first epoch on, so α is now 3.897 in epoch 8, and was 1.949"
    )
    newest = store.read("peer0/latest.json", 10**6)
    store.write("peer0/latest.json", newest.replace(b'"codistill_alpha"', b'"something_else_"'))
    assert resumed(12, 8, first) == "", "a manifest that was tampered with, or of an older version"


# A group: only rank 0 touches the exchange, and all hold the same.


def _publish_as_peer_1(store, update, value):
    theirs = Model(value)
    facts = dict(epoch=1, fingerprint=fingerprint(theirs), model={}, time=0.0)
    Exchange(store, 1).publish(tensors_of(theirs), update, **facts)


def _rank(rank, port, path, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    store = open_store(path)
    if rank == 1:  # it could not read the exchange if it tried
        store.read = store.write = store.claim = None
    one = codistiller(store, 0, model=Model())
    held = []
    for update in range(9):
        teaching = one.teaching(update)
        held.append((biases(teaching), teaching.staleness) if teaching else None)
        if update in (3, 7) and rank == 0:
            _publish_as_peer_1(open_store(path), update + 1, update)
        dist.barrier()
    results.put((rank, held))
    dist.destroy_process_group()


def _rank_with_a_late_read(rank, port, path, results):
    """Rank 0's thread hangs in reading from before update 4 until after update 5."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    store = Gate(reading="peer1/u")
    one = codistiller(store, 0, model=Model(), in_background=True, interval=4)
    held = []
    for update in range(9):
        teaching = one.teaching(update)
        held.append((biases(teaching), teaching.staleness) if teaching else None)
        if rank == 0 and update == 0:
            one._background._ready = Arrivals()
            _publish_as_peer_1(store, 4, 3.0)
            assert store.reached.wait(60)
        if rank == 0 and update == 5:
            store.open.set()
            assert one._background._ready.news.acquire(timeout=60)
        dist.barrier()
    one.end(completed=True)
    results.put((rank, held))
    dist.destroy_process_group()


def _wait_of_ranks(rank, port, path, results):
    """Rank 0 waits for a peer that never comes, in more slices than one; the others wait with it, and all go on."""
    torch.set_num_threads(1)
    barrier._SLICE = 0.1
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    one = codistiller(open_store(path), 0, model=Model(), wait=0.35)
    shared, share = [], group.share
    group.share = lambda what: shared.append(share(what)) or shared[-1]
    held = [one.teaching(update) for update in range(3)]
    results.put((rank, (held, False in shared, shared.count(None) >= 2)))
    dist.destroy_process_group()


def _rank_with_failures(rank, port, path, results):
    """What fails on one rank alone: memory for the peer's model (rank 1), loading (rank 0), copying the weights (rank 0)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    one, held = codistiller(open_store(path), 0, model=Model()), []
    fails = {(1, 4): "replica", (0, 8): "load"}

    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    for update in range(17):
        with pytest.MonkeyPatch.context() as patch:
            if (rank, update) in fails:
                patch.setattr(codistiller_module, fails[rank, update], fail)
            if rank == 0 and update == 12:
                patch.setattr(one._background._buffer, "fill", fail)
                patch.setattr(one._background, "at", fail)
            teaching = one.teaching(update)
        held.append(biases(teaching)[0] if teaching else None)
        if update in (3, 7, 11, 15) and rank == 0:
            _publish_as_peer_1(open_store(path), update + 1, update)
        dist.barrier()
    results.put((rank, held))
    dist.destroy_process_group()


def _rank_that_may_not_begin(rank, port, path, results):
    """Rank 0 is refused by the exchange, before the training and at its first update; rank 1 cannot load a teacher."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    said = []
    one = codistiller(open_store(path), 0, join=False)
    one.begin_epoch(1, Model())
    for refused in (
        lambda: one.join(Run(3, None, None)),
        lambda: (one.join(Run(2, None, None)), one.teaching(0)),
        lambda: one.load_frozen((lambda: 1 / 0) if rank == 1 else list),
    ):
        try:
            refused()
        except (ValueError, ZeroDivisionError) as error:
            said.append(str(error))
    results.put((rank, said))
    dist.destroy_process_group()


def of_ranks(target, path):
    """What `target` gives on each of two ranks."""
    context = fork_server()
    results, port = context.Queue(), free_port()
    ranks = [context.Process(target=target, args=(rank, port, str(path), results)) for rank in range(2)]
    [rank.start() for rank in ranks]
    held = dict(results.get(timeout=120) for _ in ranks)
    [rank.join(60) for rank in ranks]
    return held[0], held[1]


def test_all_ranks_of_a_group_hold_the_same(tmp_path):
    first, second = of_ranks(_rank, tmp_path / "x")
    assert first == second
    assert first == [None] * 4 + [([3.0], 0.0), ([3.0], 1.0), ([3.0], 2.0), ([3.0], 3.0), ([7.0], 0.0)]


def test_a_late_read_is_skipped_by_all_ranks_together(tmp_path):
    first, second = of_ranks(_rank_with_a_late_read, tmp_path / "x")
    assert first == second
    assert first == [None] * 6 + [([3.0], 2.0), ([3.0], 3.0), ([3.0], 4.0)]


def test_what_fails_on_one_rank_costs_all_of_them_one_snapshot(tmp_path):
    first, second = of_ranks(_rank_with_failures, tmp_path / "x")
    assert first == second
    assert first == [None] * 12 + [11.0] * 4 + [15.0]


def test_what_stops_one_rank_at_the_start_stops_all_of_them(tmp_path):
    store = open_store(str(tmp_path / "x"))
    Exchange(store, 1).join(Run(2, None, None))
    other = nn.Linear(3, 3)
    Exchange(store, 0).publish(tensors_of(other), 4, epoch=1, fingerprint="another", model={}, time=0.0)
    first, second = of_ranks(_rank_that_may_not_begin, tmp_path / "x")
    assert first[:2] == second[:2] and "the same number of peers" in first[0] and "another architecture" in first[1]
    assert second[2] == "division by zero"
    assert first[2] == "Rank 1 of this peer's group has failed, so all its ranks stop: ZeroDivisionError: division by zero"


def test_a_peer_that_finds_no_memory_costs_its_teaching_alone(monkeypatch, caplog):
    store = MemoryStore()
    me, other = codistiller(store, 0), codistiller(store, 1)
    train(other, 5)
    with monkeypatch.context() as patch:
        patch.setattr(codistiller_module, "replica", lambda *_: 1 / 0)
        assert me.teaching(0) is None
    assert "peer 1: its snapshot of update 4 could not be loaded (ZeroDivisionError" in caplog.text
    train(other, 9, start=5)
    assert me.teaching(4).staleness == -4


def test_ranks_wait_together_and_never_for_ever(tmp_path):
    first, second = of_ranks(_wait_of_ranks, tmp_path / "x")
    assert first == second == ([None] * 3, True, True)


def test_only_every_third_update_is_taught():
    """By the update's number alone, so that a resumed run goes on as it would have; exchanges are not affected."""
    store = MemoryStore()
    me, other = codistiller(store, 0, every=3), codistiller(store, 1)
    train(other, 5)
    assert [teaching is not None for teaching in train(me, 10)] == [update % 3 == 0 for update in range(10)]
    assert me.exchange.newest(0).update == 8
    me.end(completed=False)
    resumed = codistiller(store, 0, every=3)
    assert resumed.teaching(10) is None and resumed.teaching(12) is not None
