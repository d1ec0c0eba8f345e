"""The threads that touch the storage, and a training for which there is none to be had."""

import threading

import pytest
from test_background import SECONDS, Gate, background, publish
from test_codistiller import codistiller, train

from fairseq_codistill.exchange import background as background_module
from fairseq_codistill.exchange.stores import MemoryStore
from fairseq_codistill.exchange.worker import Worker


def test_what_takes_too_long_is_waited_for_when_asked_again():
    worker, gate, runs = Worker(), threading.Event(), []

    def slow(word):
        runs.append(word)
        assert gate.wait(SECONDS)
        return word

    for _ in range(3):
        with pytest.raises(TimeoutError):
            worker.ask(slow, "a", seconds=0.01)
    with pytest.raises(TimeoutError):
        worker.ask(slow, "b", seconds=0.01)
    assert worker.is_busy and not worker.rest(0.01)
    gate.set()
    assert worker.ask(slow, "a", seconds=SECONDS) == "a" and worker.ask(slow, "b", seconds=SECONDS) == "b"
    assert runs == ["a", "b"], "a thread that hangs is given nothing more"
    worker.stop()
    assert worker.join(SECONDS)


def test_what_is_raised_is_raised_to_who_asked():
    worker = Worker()
    with pytest.raises(ValueError, match="invalid literal"):
        worker.ask(int, "x", seconds=SECONDS)
    assert worker.ask(int, "3", seconds=SECONDS) == 3


def test_what_is_done_when_idle_may_fail():
    calls, twice = [], threading.Event()

    def idle():
        calls.append(1)
        if len(calls) > 1:
            twice.set()
        raise OSError

    worker = Worker(idle, lambda: 0.001)
    worker.start()
    assert twice.wait(SECONDS)
    worker.stop()


@pytest.fixture
def no_threads(monkeypatch):
    """A limit of processes is reached: no thread can be started, until it is lifted."""

    def limit():
        def fails(thread):
            raise RuntimeError("can't start new thread")

        with_threads = threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", fails)
        return lambda: monkeypatch.setattr(threading.Thread, "start", with_threads)

    return limit


def test_threads_are_started_once(no_threads, caplog):
    """When there is none to be had later, nothing is missed."""
    store = MemoryStore()
    me, other = codistiller(store, 0, in_background=True), codistiller(store, 1)
    train(other, 5)
    me.teaching(0)
    no_threads()
    train(me, 9, start=1)
    me.end(completed=True)
    newest = me.exchange.newest(0)
    assert newest.update == 9 and newest.done and me.exchange.heartbeat(0).state == "ended"
    assert "thread" not in caplog.text


def test_without_any_thread_training_goes_on_and_exchanges_begin_when_there_are_some(no_threads, caplog):
    store = MemoryStore()
    lift = no_threads()
    me = codistiller(store, 0)
    assert train(me, 5) == [None] * 5
    assert "not all threads of the exchange could be started" in caplog.text
    assert caplog.text.count("was not published: no thread can be started") == 1, "of one reason there is one warning"
    lift()
    train(codistiller(store, 1), 9)
    assert train(me, 9, start=5)[-1] is not None and me.exchange.newest(0).update == 8
    me.end(completed=True)


class NotHere(MemoryStore):
    """A store that must not be touched in the training thread."""

    def __init__(self):
        super().__init__()
        self.touched = []

    def _note(self):
        if threading.current_thread() is threading.main_thread():
            self.touched.append(1)

    def read(self, *args):
        self._note()
        return super().read(*args)

    def write(self, *args, **kwargs):
        self._note()
        return super().write(*args, **kwargs)

    def remove(self, *args):
        self._note()
        return super().remove(*args)

    def names(self, *args):
        self._note()
        return super().names(*args)

    def claim(self, *args):
        self._note()
        return super().claim(*args)

    def release(self, *args):
        self._note()
        return super().release(*args)


@pytest.mark.parametrize("settings", [{"in_background": True}, {"lockstep": True, "wait": 0.01}, {"wait": 0.01}])
def test_the_training_thread_never_touches_the_storage(settings):
    store = NotHere()
    me = codistiller(store, 0, **settings)
    train(me, 9)
    me.end(completed=True)
    codistiller(store, 0).end(completed=False)  # one that ends before its first update
    assert store.touched == []


@pytest.mark.parametrize("what", ["u00", "alive", "latest"])
def test_a_storage_that_hangs_does_not_keep_the_training_from_ending(what, monkeypatch, caplog):
    monkeypatch.setattr(background_module, "_STOP_SECONDS", 0.05)
    monkeypatch.setattr(background_module, "_SHORTEST_LIMIT", 0.1)
    store = Gate()
    one = codistiller(store, 0, in_background=True)
    train(one, 4)
    assert one._background.drain(SECONDS)
    store.reading = store.writing = what  # from now on
    train(one, 6, start=4)
    one._background._heartbeat_worker.do(one._background._send_heartbeat)
    ended = threading.Event()
    threading.Thread(target=lambda: (one.end(completed=True), ended.set()), daemon=True).start()
    assert ended.wait(SECONDS)
    assert "memory does not answer; training ends without waiting for it" in caplog.text
    store.open.set()


def test_the_limit_grows_with_the_weights(monkeypatch):
    one = background(MemoryStore(), 0)
    assert one.limit == pytest.approx(30, abs=0.01)
    monkeypatch.setattr(one, "_buffer", type("Buffer", (), {"data": range(100_000_000)}))
    assert one.limit == 130
    monkeypatch.setattr(one, "_buffer", type("Buffer", (), {"data": range(10**10)}))
    assert one.limit == 300


def test_weights_that_cannot_be_copied_cost_one_snapshot(monkeypatch, caplog):
    store = MemoryStore()
    one = background(store, 0)
    with monkeypatch.context() as patch:
        patch.setattr(one._buffer, "fill", lambda weights: 1 / 0)
        assert not publish(one, 1) and one.totals.failed == 1
    assert "update 1 was not published: division by zero; training goes on" in caplog.text
    assert publish(one, 2) and one.drain(SECONDS) and one.exchange.newest(0).update == 2
