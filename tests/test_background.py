"""Exchanging in the background: what is slow, hangs, fails or lies there is never felt by the training thread."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fairseq_codistill.exchange import background as background_module
from fairseq_codistill.exchange.background import BackgroundExchange
from fairseq_codistill.exchange.exchange import Exchange, Run
from fairseq_codistill.exchange.manifest import BadSnapshot
from fairseq_codistill.exchange.snapshot import fingerprint, tensors_of
from fairseq_codistill.exchange.stores import DirectoryStore, MemoryStore

ROOT = Path(__file__).parents[1]
SECONDS = 30  # to wait for what must come; far above what it takes


class Gate(MemoryStore):
    """A store whose reads or writes of some name wait until they are let through."""

    def __init__(self, reading="", writing=""):
        super().__init__()
        self.reading, self.writing = reading, writing
        self.reached, self.open = threading.Event(), threading.Event()

    def _pass(self, gate, name):
        if gate and gate in name:
            self.reached.set()
            assert self.open.wait(SECONDS)

    def read(self, name, limit):
        self._pass(self.reading, name)
        return super().read(name, limit)

    def write(self, name, data, replace=True):
        self._pass(self.writing, name)
        return super().write(name, data, replace)


class Arrivals(dict):
    """What a background exchange has ready, with a way to wait for it."""

    def __init__(self):
        super().__init__()
        self.news = threading.Semaphore(0)

    def __setitem__(self, *item):
        super().__setitem__(*item)
        self.news.release()


def model(value=0.0):
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def background(store, peer, teachers=(), sleep=time.sleep, **settings):
    net = model()
    one = BackgroundExchange(Exchange(store, peer, sleep), list(teachers), fingerprint(net), tensors_of(net), **settings)
    one._ready = Arrivals()
    return one


def publish(one, update, value=0.0):
    net = model(value)
    return one.publish(tensors_of(net), update, epoch=1, model={}, time=0.0, fingerprint=fingerprint(net))


def value_of(found):
    return found and float(found[1]["weight"][0, 0])


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(background_module, "_FIRST_PERIOD", 0.01)
    monkeypatch.setattr(background_module, "_STOP_SECONDS", 0.2)


def test_training_does_not_wait_for_the_storage_and_a_slow_one_skips_versions(caplog):
    store = Gate(writing="safetensors")
    one, net = background(store, 0), model(1.0)
    facts = dict(epoch=1, model={}, time=0.0, fingerprint=fingerprint(net))
    assert one.publish(tensors_of(net), 1, **facts), "comes back though nothing can be written"
    assert store.reached.wait(SECONDS)
    with torch.no_grad():
        net.weight.fill_(9.0)  # training goes on
    assert not one.publish(tensors_of(net), 2, **facts) and one.totals.skipped == 1
    assert "the snapshot of update 2 was skipped: the last one is still being written to memory" in caplog.text
    assert not one.drain(0.01)
    store.open.set()
    assert one.drain(SECONDS)
    reader = background(store, 1, [0], in_background=False)
    reader.look(0)
    manifest, weights = reader.take(0)
    assert manifest.update == 1 and (weights["weight"] == 1.0).all(), "the weights of the moment when it was asked for"
    assert publish(one, 3, 3.0) and one.drain(SECONDS) and reader.exchange.newest(0).update == 3
    assert one.totals.published == 2 and one.totals.published_bytes == 2 * manifest.bytes


def test_snapshots_are_read_and_verified_ahead():
    store = MemoryStore()
    me, other = background(store, 0, [1]), background(store, 1)
    me.start()
    me.watch()
    assert me.take(1) is None
    for update in (1, 2):
        publish(other, update, update)
        other.drain()
        assert me._ready.news.acquire(timeout=SECONDS)
        assert value_of(me.take(1)) == update and me.take(1) is None, "each is taken once"
    assert me.totals.read == 2 and me.totals.read_bytes == other.totals.published_bytes
    me.stop("ended")


def test_a_newer_snapshot_replaces_one_that_was_not_taken():
    store = MemoryStore()
    me, other = background(store, 0, [1]), background(store, 1)
    for update in (1, 2):
        publish(other, update, update)
        other.drain()
        me.look(1)
    assert value_of(me.take(1)) == 2 and me.take(1) is None


def test_a_teacher_whose_storage_hangs_holds_up_nobody():
    store = Gate(reading="peer1/u")
    me, good, hanging = background(store, 0, [1, 2]), background(store, 2), background(store, 1)
    me.watch()
    publish(hanging, 1)
    assert store.reached.wait(SECONDS)
    publish(good, 1, 5.0)
    assert me._ready.news.acquire(timeout=SECONDS)
    assert value_of(me.take(2)) == 5.0 and me.take(1) is None
    me.stop("ended")  # comes back although a thread hangs
    assert any(worker.is_busy for worker in me._workers) or me._readers[1]._thread.is_alive()
    store.open.set()


def test_a_bad_snapshot_is_read_a_few_times_and_then_left_alone(caplog):
    store = MemoryStore()
    me, other = background(store, 0, [1]), background(store, 1)
    publish(other, 1)
    other.drain()
    name = "peer1/u000000001.safetensors"
    good = store.read(name, 10**6)
    store.write(name, good[:-1] + bytes([good[-1] ^ 1]))
    reads, read = [], store.read
    store.read = lambda name, limit: reads.append(name) or read(name, limit)
    for _ in range(6):
        me.look(1)
    assert reads.count(name) == 3 and me.take(1) is None
    assert caplog.text.count("peer 1: its snapshot is refused: its checksum") == 1
    publish(other, 2, 2.0)
    other.drain()
    me.look(1)
    assert value_of(me.take(1)) == 2.0


def test_a_bad_moment_of_the_storage_is_forgotten(caplog):
    store = MemoryStore()
    me, other = background(store, 0, [1]), background(store, 1)
    publish(other, 1, 4.0)
    other.drain()
    read = store.read

    def fails(name, limit):
        if name.endswith("safetensors"):
            store.read = read
            raise BadSnapshot(f"{name} cannot be read (Stale file handle)")
        return read(name, limit)

    store.read = fails
    me.look(1)
    assert me.take(1) is None and "Stale file handle" in caplog.text
    me.look(1)
    assert value_of(me.take(1)) == 4.0


def test_a_file_that_is_not_visible_yet_is_looked_for_again():
    store = MemoryStore()
    me, other = background(store, 0, [1]), background(store, 1)
    publish(other, 1, 4.0)
    other.drain()
    data = store.read("peer1/u000000001.safetensors", 10**6)
    store.remove("peer1/u000000001.safetensors")
    for _ in range(5):
        me.look(1)
    assert me.take(1) is None
    store.write("peer1/u000000001.safetensors", data)
    me.look(1)
    assert value_of(me.take(1)) == 4.0


@pytest.mark.parametrize("error", [RuntimeError("a library's own"), MemoryError(), OSError(28, "No space left on device")])
def test_no_error_of_a_store_leaves_the_background(error, caplog):
    store = MemoryStore()
    me, other = background(store, 0, [1]), background(store, 1)
    publish(other, 1)
    other.drain()

    def fails(*_, **__):
        raise error

    store.read = store.write = fails
    me.look(1)
    publish(me, 1)
    assert me.drain(SECONDS) and me.totals.failed == 1
    me._send_heartbeat()
    assert me.take(1) is None
    for words in ("its snapshot cannot be read", "was not published", "the heartbeat was not written"):
        assert words in caplog.text


def test_signs_of_life():
    store = MemoryStore()
    me = background(store, 0, [1], updates=100, clock=lambda: 7.0)
    me._send_heartbeat()
    first = me.exchange.heartbeat(0)
    assert (first.state, first.update, first.updates, first.pid, first.time) == ("waiting", 0, 100, os.getpid(), 7.0)
    me.at(20, {1: 10})
    me.stop("ended")
    last = me.exchange.heartbeat(0)
    assert (last.state, last.update, last.teachers) == ("ended", 20, {"1": 10})
    assert last.beat > first.beat and last.start_id == first.start_id


def test_the_speed_is_of_this_life_and_of_updates_that_were_seen(monkeypatch):
    """After a resume the updates before the restart do not count, nor does the time between two exchanges go unseen."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(BackgroundExchange, "_log_peers", lambda *_: None)
    me = background(MemoryStore(), 0)

    def speed(seconds, *exchange):
        now[0] += seconds
        if exchange:
            me.at(*exchange)
        me._send_heartbeat()
        return me.exchange.heartbeat(0).speed

    assert speed(0) is None and speed(9, 24_000, {}) is None, "it began at update 24,000"
    assert speed(5) is None and speed(45, 24_100, {}) == 2.0
    assert [speed(5) for _ in range(8)] == [2.0] * 8, "the next exchange is due only at 24,200"
    assert speed(10, 24_200, {}) == 2.0
    assert speed(200) == 1.0, "nothing new for twice as long as the last exchanges took"


class NoLocks(MemoryStore):
    def claim(self, folder):
        return False


def test_without_locks_an_index_is_taken_only_from_a_peer_that_has_fallen_silent():
    store = NoLocks()
    alive = background(store, 0)
    alive._send_heartbeat()
    with pytest.raises(ValueError, match=r"peer0 is already alive \(process \d+ on .*\).*--codistill-peer"):
        Exchange(store, 0, sleep=lambda seconds: alive._send_heartbeat()).join(Run(2, None, None))
    naps = []
    Exchange(store, 0, sleep=naps.append).join(Run(2, None, None))
    assert sum(naps) == 15, "three beats"
    alive.stop("stopped")
    Exchange(store, 0, sleep=pytest.fail).join(Run(2, None, None))


def test_who_has_lost_its_index_says_so_once_and_writes_nothing_more(caplog):
    store = NoLocks()
    one = background(store, 0, sleep=lambda seconds: None)
    one.exchange.join(Run(2, None, None))
    one._send_heartbeat()
    publish(one, 1)
    one.drain()
    Exchange(store, 0, sleep=lambda seconds: None).join(Run(2, None, None))
    before = dict(store._files)
    for update in (2, 3):
        assert publish(one, update)
        one.drain()
        one._send_heartbeat()
    one.stop("ended")
    assert store._files == before and one.totals.failed == 2
    assert [m for m in caplog.messages if "not published" in m or "heartbeat" in m] == []
    assert caplog.text.count("peer0 in memory now belongs to process") == 1 and "training goes on" in caplog.text


def test_one_reason_for_not_publishing_is_one_warning(caplog):
    store = MemoryStore()
    one, write = background(store, 0, in_background=False), store.write
    for reason in ("No space left on device", "No space left on device", "Stale file handle"):
        def fails(*_, reason=reason):
            raise OSError(28, reason)

        store.write = fails
        publish(one, 1)
    store.write = write
    publish(one, 2)
    store.write = fails
    publish(one, 3)
    warnings = [record.message.split(": ")[2] for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(";")[0] for text in warnings] == ["No space left on device", *["Stale file handle"] * 2]


def test_a_lock_proves_nothing_about_another_host(monkeypatch):
    store = MemoryStore()
    alive = background(store, 0)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    alive._send_heartbeat()
    monkeypatch.undo()

    def beat(seconds):
        with monkeypatch.context() as there:
            there.setattr(socket, "gethostname", lambda: "elsewhere")
            alive._send_heartbeat()

    with pytest.raises(ValueError, match=r"peer0 is already alive \(process \d+ on elsewhere\)"):
        Exchange(store, 0, sleep=beat).join(Run(2, None, None))


def test_sigterm_finishes_what_is_being_published_and_then_ends_the_process(tmp_path):
    """As a scheduler stops a job: the process dies of SIGTERM, and its last snapshot is whole."""
    code = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_background import *
        from test_codistiller import codistiller
        from fairseq_codistill import ending

        class Slow(DirectoryStore):
            def write(self, name, data, replace=True):
                if name.endswith("000000008.safetensors"):
                    print("writing", flush=True)
                    sys.stdin.readline()
                return super().write(name, data, replace)

        one = codistiller(Slow("x"), 0, model=model(3.0), in_background=True)
        ending.drain_on_sigterm(one.drain)
        for update in range(10 ** 9):
            one.teaching(update)
            if update < 8:
                one.drain({SECONDS})
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.communicate("go on\n", timeout=SECONDS)
    assert process.returncode == -signal.SIGTERM
    reader = background(DirectoryStore(str(tmp_path / "x")), 1, [0])
    reader.look(0)
    manifest, weights = reader.take(0)
    assert manifest.update == 8 and (weights["weight"] == 3.0).all()


def told(caplog, one, update):
    """What the log says of the other peers at `update`."""
    one.at(update, {})
    one._logging.result(SECONDS)
    (line,) = [m for m in caplog.messages if f"at update {update}: " in m]
    return line.partition(f"at update {update}: ")[2]


def test_the_log_tells_who_is_present(caplog):
    caplog.set_level("INFO")
    store = MemoryStore()
    one, other = background(store, 0, [1]), background(store, 1)
    one.exchange.join(Run(3, "a" * 64, 8))
    assert told(caplog, one, 0) == "peer 1 absent; peer 2 absent"
    other._progress, other._state = (40, {"0": 20}), "training"
    other._send_heartbeat()
    assert told(caplog, one, 10) == "peer 1 training, update 40; peer 2 absent"
    other._progress = (60, {"0": 40})
    other._send_heartbeat()
    assert "peer 1 training, update 60, " in told(caplog, one, 20) and "heartbeat 0 s ago; peer 2" in caplog.text
    one._status.monotonic = lambda clock=one._status.monotonic: clock() + 31
    assert "peer 1 silent, update 60, heartbeat 31 s ago" in told(caplog, one, 30)
    other.stop("ended")
    assert told(caplog, one, 40) == "peer 1 ended, update 60; peer 2 absent"


def test_a_store_that_hangs_keeps_no_second_teller_waiting():
    gate = Gate()
    one = background(gate, 0, [1])
    one.exchange.join(Run(2, None, 8))
    gate.reading = "alive"
    one.at(0, {})
    assert gate.reached.wait(SECONDS)
    first = one._logging
    one.at(10, {})
    assert one._logging is first
    gate.open.set()
    first.result(SECONDS)
