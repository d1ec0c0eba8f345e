"""Which run it is, who takes part in it, and on what its peers agree: no leftovers teach, no two hold one index."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from test_exchange import fetch, model, publish

from fairseq_codistill import build, config
from fairseq_codistill.exchange import liveness
from fairseq_codistill.exchange.exchange import KEEP, KEEP_FOR_LEARNERS, Exchange, IndexTaken, Run
from fairseq_codistill.exchange.manifest import BadSnapshot, Heartbeat
from fairseq_codistill.exchange.snapshot import fingerprint
from fairseq_codistill.exchange.stores import MemoryStore

RUN = Run(2, "ab" * 32, 100, source_sha256="cd" * 32, interval=10, lockstep=False)
PRINT = fingerprint(model())


class NoLocks(MemoryStore):
    """As an object store."""

    def claim(self, folder):
        return False

    def held(self, folder):
        return None


class Peer(Exchange):
    """A peer whose naps are recorded; `meanwhile` is called in each."""

    def __init__(self, store, peer, meanwhile=lambda: None, **settings):
        self.naps = []
        super().__init__(store, peer, sleep=lambda seconds: (self.naps.append(seconds), meanwhile()), **settings)

    def start(self, update=0, run=RUN):
        """Join, begin, and be seen training there."""
        self.join(run)
        self.begin(update, PRINT)
        return self.train(update)

    def train(self, update):
        self.alive(update)
        publish(self, update, update)
        return self

    def alive(self, update=0, state="training"):
        beat = getattr(self, "beats", 0) + 1
        self.beats = beat
        self.beat(Heartbeat("", beat, state, liveness.host_name(), 1, 0.0, update=update))

    @property
    def run_id(self):
        return self._membership.run_id


def killed(store):
    """Whoever was there is dead; its locks went with it."""
    if hasattr(store, "_live"):
        store._live.clear()


@pytest.fixture(params=[MemoryStore, NoLocks])
def store(request):
    return request.param()


@pytest.fixture
def old_run(store):
    """Both peers trained to update 40 and were killed."""
    for peer in range(2):
        Peer(store, peer).start().train(40)
    killed(store)
    return json.loads(store.read("run.json", 10**6))["id"]


# Which run it is.


def test_a_run_begun_from_nothing_learns_nothing_from_the_last(store, old_run):
    first, second = Peer(store, 0), Peer(store, 1)
    for one in (first, second):  # as a launcher starts them: both load their data before one of them trains
        one.join(RUN)
    first.begin(0, PRINT)
    assert first.run_id not in (None, old_run) and first.newest(0) is None and first.at(0, 40) is None
    for look in (lambda: first.newest(1), lambda: first.at(1, 40)):
        with pytest.raises(BadSnapshot, match="it is of an earlier run"):
            look()
    first.train(0)
    second.begin(0, PRINT)
    second.train(0)
    assert second.run_id == first.run_id and first.newest(1).update == second.newest(0).update == 0
    second.train(20)
    assert (fetch(first, 1, first.newest(1))["weight"] == 20).all(), "ahead in the same run: it teaches"


def test_a_peer_that_lost_its_checkpoint_joins_those_that_train(store, old_run):
    one = Peer(store, 1)
    one.start(40)
    other = Peer(store, 0, meanwhile=one.alive)
    other.join(RUN)
    one.alive(41)
    other.begin(0, PRINT)
    assert other.run_id == one.run_id == old_run and other.newest(0) is None and other.newest(1).update == 40


def test_without_locks_who_is_silent_for_three_beats_does_not_train(old_run, store):
    peer = Peer(store, 0)
    peer.join(RUN)
    before = sum(peer.naps)
    peer.begin(0, PRINT)
    assert peer.run_id != old_run
    assert sum(peer.naps) - before == (liveness.SILENT_SECONDS if isinstance(store, NoLocks) else 0)


@pytest.mark.parametrize("state", ["ended", "stopped"])
def test_a_goodbye_is_believed_at_once(state):
    store = NoLocks()
    for peer in range(2):
        Peer(store, peer).start().train(40).alive(40, state)
    again = Peer(store, 0).start()
    assert again.naps == []


def test_a_restart_within_a_run_is_no_new_run(store, old_run):
    peer = Peer(store, 0, restarted=True)
    peer.start()
    assert peer.run_id == old_run and peer.newest(1).update == 40 and peer.at(0, 40) is None


def test_a_peer_that_resumes_takes_the_run_that_stands(store, old_run):
    first, second = Peer(store, 0).start(), Peer(store, 1)
    second.join(RUN)
    second.begin(40, PRINT)
    assert second.run_id == first.run_id != old_run and second.newest(1) is None, "what it left is of the other run"
    second.train(40)
    assert first.newest(1).update == 40
    killed(store)
    resumed = [Peer(store, i).start(40) for i in range(2)]
    assert resumed[0].run_id == resumed[1].run_id == first.run_id, "all killed and resumed: it is one run"


def test_a_peer_that_comes_late_for_the_first_time_just_joins(store):
    first = Peer(store, 0).start().train(40)
    killed(store)
    late = Peer(store, 1).start()
    assert late.run_id == first.run_id and late.newest(0).update == 40 and late.naps == []


def test_two_that_begin_at_the_same_moment_end_with_one_run(store, old_run):
    one, two = Peer(store, 0), Peer(store, 1)
    for peer in (one, two):
        peer.join(RUN)
    one.begin(0, PRINT)
    one.train(0)
    publish(one, 10)
    two._membership.is_new_run = lambda past: True  # it looked just before
    two.begin(0, PRINT)
    assert two.run_id != one.run_id
    with pytest.raises(BadSnapshot, match="an earlier run"):
        two.newest(0)
    one.alive(11)
    assert one.run_id == two.run_id and two.newest(0).update == two.at(0, 10).update == 10, "it has told again what it has"
    publish(two, 0)
    publish(one, 20)
    assert one.newest(1).run == two.newest(0).run == one.run_id


def test_a_reader_that_is_behind_follows_before_it_refuses(store):
    one, two = Peer(store, 0).start(), Peer(store, 1).start()
    one._membership.begin_new_run()
    publish(one, 10)
    assert two.newest(0).update == 10 and two.run_id == one.run_id


def test_files_of_an_older_version_are_believed(store):
    older = {"peers": 2, "dictionary_sha256": RUN.dictionary_sha256, "classes": 100, "format": 1}
    store.write("run.json", json.dumps(older).encode())
    publish(Exchange(store, 1), 40)  # it has joined nothing, so it names no run
    peer = Peer(store, 0).start()
    assert peer.run_id is None and peer.newest(1).update == 40
    assert json.loads(store.read("run.json", 10**6)) == older
    assert Run.from_json(RUN.to_json()) == RUN and Run(2, None, None).to_json() == json.dumps(
        {"peers": 2, "dictionary_sha256": None, "classes": None, "format": 1}, indent=1
    ).encode()


# On what they agree.


@pytest.mark.parametrize("change, label", [
    ({"peers": 3}, "number of peers"), ({"interval": 20}, "--codistill-interval"), ({"lockstep": True}, "--codistill-sync"),
])  # fmt: skip
def test_what_all_may_change_together_nobody_changes_alone(change, label, store):
    other = dataclasses.replace(RUN, **change)
    living = Peer(store, 0).start()
    with pytest.raises(ValueError, match=f"same {label}, but .* was begun with .* and peer 0 runs; did you forget") as error:
        Peer(store, 1, meanwhile=living.alive).join(other)
    assert "2 peers" in str(error.value) and "interval 10, not in lockstep" in str(error.value), "both sides are named"
    killed(store)
    old_id = living.run_id
    changed = [Peer(store, 0), Peer(store, 1)]
    for one in changed:
        one.join(other)
    for one in changed:
        one.begin(10, PRINT)
    assert Run.from_json(store.read("run.json", 10**6)) == dataclasses.replace(other, id=old_id)


def test_a_run_of_two_becomes_one_of_three(store):
    for peer in range(2):
        Peer(store, peer).start().train(40)
    killed(store)
    three = dataclasses.replace(RUN, peers=3)
    peers = [Peer(store, i) for i in range(3)]
    for peer in peers:
        peer.join(three)
    peers[2].begin(0, PRINT)
    for peer in peers[:2]:
        peer.begin(40, PRINT)
        peer.train(50)
    peers[2].train(0)
    assert len({peer.run_id for peer in peers}) == 1
    assert [peers[2].newest(i).update for i in range(2)] == [50, 50] and peers[0].newest(2).update == 0


def test_who_raises_the_number_from_nothing_begins_a_new_run(store, old_run):
    """Else the one that has no past would learn from the others' until they have started."""
    peer = Peer(store, 2).start(run=dataclasses.replace(RUN, peers=3))
    assert peer.run_id != old_run
    with pytest.raises(BadSnapshot, match="an earlier run"):
        peer.newest(0)


def test_a_change_that_comes_before_training_is_seen_at_its_beginning():
    store = NoLocks()
    first, second = Peer(store, 0), Peer(store, 1)
    first.join(RUN)
    second.join(dataclasses.replace(RUN, interval=20))  # nobody was seen to live
    with pytest.raises(ValueError, match="same --codistill-interval, but memory was begun with .* interval 20"):
        first.begin(0, PRINT)
    second.begin(0, PRINT)


def test_what_a_run_is_made_of_nobody_changes(store):
    Peer(store, 0).start()
    killed(store)
    for change, label in ({"source_sha256": "ef" * 32}, "source"), ({"classes": 9}, "target"), ({"classes": None}, "target"):
        with pytest.raises(ValueError, match=f"same {label} dictionary, but .* did you forget"):
            Peer(store, 1).join(dataclasses.replace(RUN, **change))
    Peer(store, 1).join(dataclasses.replace(RUN, source_sha256=None, interval=None, lockstep=None))


HOSTILE = "\x1b]0;owned\x07" * 50


@pytest.mark.parametrize("field, value", [
    ("peers", HOSTILE), ("peers", 10**9), ("classes", HOSTILE), ("dictionary_sha256", HOSTILE), ("source_sha256", HOSTILE),
    ("format", HOSTILE), ("interval", HOSTILE), ("lockstep", HOSTILE), ("id", HOSTILE), ("peers", [[HOSTILE]]),
])  # fmt: skip
def test_what_run_json_holds_is_shown_plain_and_short(store, field, value):
    fields = {**json.loads(RUN.to_json()), field: value}
    store.write("run.json", json.dumps(fields).encode())
    with pytest.raises(ValueError) as error:
        Peer(store, 0).join(RUN)
    assert str(error.value).isprintable() and len(str(error.value)) < 700, str(error.value)


def test_a_short_hash_is_shown_plain(store):
    store.write("run.json", json.dumps({**json.loads(RUN.to_json()), "dictionary_sha256": "\x1b[31m\u202e"}).encode())
    with pytest.raises(ValueError, match=r"\(sha256 \?\?31\?\?\)"):
        Peer(store, 0).join(RUN)


# Seeds.


def seeded(seed):
    return dataclasses.replace(RUN, seed=seed)


def test_living_peers_have_different_seeds(store):
    first = Peer(store, 0).start(run=seeded(1))
    with pytest.raises(ValueError, match="different seeds, .* peer 0 and this peer 1 have --seed 1; did you forget"):
        Peer(store, 1, meanwhile=first.alive).join(seeded(1))
    assert Peer(store, 1).heartbeat(1).state == "stopped"
    Peer(store, 1).start(run=seeded(10_000_001))
    assert b"seed" not in store.read("run.json", 10**6)


def test_the_seeds_of_those_that_are_gone_do_not_matter(store):
    Peer(store, 0).start(run=seeded(1)).alive(1, "ended")
    killed(store)
    assert Peer(store, 1).start(run=seeded(1)).naps == []
    killed(store)
    Peer(store, 0).join(seeded(1))


def test_two_that_start_together_see_each_others_seeds_at_the_latest_when_they_train():
    store = NoLocks()
    peers = [Peer(store, i) for i in range(2)]
    peers[0].join(seeded(1))
    peers[1].join(seeded(1))  # the other does not beat yet: it might be dead
    with pytest.raises(ValueError, match="peer 1 and this peer 0 have --seed 1"):
        peers[0].begin(0, PRINT)


# One holder of an index.


def test_who_was_taken_for_dead_while_it_was_paused_publishes_nothing_more():
    store = NoLocks()
    first = Peer(store, 0).start().train(40)
    second = Peer(store, 0)
    second.start(40)
    before = dict(store._files)
    for attempt in (lambda: publish(first, 50), first.alive, lambda: first.alive(50, "ended"), lambda: publish(first, 60)):
        with pytest.raises(IndexTaken, match="peer0 in memory now belongs to process 1 on .*; this one publishes nothing more"):
            attempt()
    first.leave()
    assert store._files == before
    second.train(50)
    assert Peer(store, 1).newest(0).update == 50


def test_one_that_was_paused_in_the_middle_of_publishing_does_not_finish():
    store = NoLocks()
    first = Peer(store, 0).start()
    write, paused = store.write, []

    def pause(name, data, replace=True):
        written = write(name, data, replace)
        if name.endswith("50.safetensors") and not paused:
            paused.append(name)
            Peer(store, 0).start(40)
        return written

    store.write = pause
    with pytest.raises(IndexTaken):
        publish(first, 50)
    assert paused and Peer(store, 1).newest(0).update == 40


def test_one_that_writes_once_more_before_it_sees_the_newcomer_does_not_drive_it_away():
    store = NoLocks()
    first = Peer(store, 0).start()
    late = store.read("peer0/alive.json", 10**6)
    second = Peer(store, 0)
    second.start(40)
    store.write("peer0/alive.json", late)
    second.alive(41)
    with pytest.raises(IndexTaken):
        first.alive(41)


def test_of_two_that_take_an_index_at_the_same_moment_one_is_refused():
    store = NoLocks()
    Peer(store, 0).start()  # and dies
    first, second = Peer(store, 0), Peer(store, 0)
    second._membership._watch_for_another = lambda locked, watch=second._membership._watch_for_another: (
        watch(locked), first.join(RUN)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"peer0 is already alive \(process \d+ on .*\).*--codistill-peer"):
        second.join(RUN)
    first.begin(40, PRINT)
    first.train(40)


def test_a_peer_that_never_trained_says_goodbye(store):
    peer = Peer(store, 0)
    peer.join(RUN)
    assert peer.heartbeat(0).state == "waiting"
    peer.leave()
    assert peer.heartbeat(0).state == "stopped"
    trained = Peer(store, 0).start()
    trained.leave()
    assert trained.heartbeat(0).state == "training", "its background exchange says how it ended"


# What is kept, and for whom.


def kept(store, peer=0):
    return [int(name[1:10]) for name in store.names(f"peer{peer}") if name.endswith(".safetensors")]


def test_what_is_kept_for_a_learner_is_bounded(store):
    one, other = Peer(store, 0).start(), Peer(store, 1).start()
    for update in range(10, 400, 10):
        publish(one, update, needed_from=one.needed_from([1], 10, 600.0))
    assert kept(store) == list(range(400 - 10 * KEEP_FOR_LEARNERS, 400, 10)), "it saves no checkpoint"
    other.alive(390, "training")
    publish(other, 390, resumes_from=375)
    assert one.needed_from([1], 10, 600.0) == 370


def test_nothing_is_kept_for_one_that_has_ended_or_shows_no_life():
    store = NoLocks()
    now = [0.0]
    one, other = Peer(store, 0).start(), Peer(store, 1).start()
    one._membership.liveness._monotonic = lambda: now[0]
    assert one.needed_from([1], 10, 600.0) == 0
    now[0] = 599.0
    assert one.needed_from([1], 10, 600.0) == 0, "others may still wait for it"
    now[0] = 601.0
    assert one.needed_from([1], 10, 600.0) is None
    other.alive()
    assert one.needed_from([1], 10, 600.0) == 0, "it is back"
    publish(other, 20, done=True)
    assert one.needed_from([1], 10, 600.0) is None and one.needed_from([], 10, 600.0) is None


def test_a_living_lock_is_life(monkeypatch):
    store = MemoryStore()
    one, other = Peer(store, 0).start(), Peer(store, 1).start()
    one.needed_from([1], 10, 0.0)
    one._membership.liveness._monotonic = lambda: 1e9
    assert one.needed_from([1], 10, 0.0) == 0
    other.leave()
    assert one.needed_from([1], 10, 0.0) is None


def test_a_full_disk_is_made_room_on(store):
    """Room for two and a half snapshots: the oldest goes, never the newest; it takes what fits."""
    peer, write, room = Peer(store, 0).start(), store.write, [2]

    def full(name, data, replace=True):
        there = {name for name in store._files if name.endswith(".safetensors")}
        if name.endswith(".safetensors") and len(there | {name}) > room[0]:
            raise OSError(28, "No space left on device")
        return write(name, data, replace)

    for update in (10, 20, 30):
        publish(peer, update)
    store.write = full
    for update in (40, 50, 60):
        publish(peer, update, needed_from=0)
        assert kept(store) == [update - 10, update] and peer.newest(0).update == update
    room[0] = 1
    for update in (70, 80):
        with pytest.raises(OSError, match="No space left"):
            publish(peer, update)
        assert kept(store) == [60] and fetch(Peer(store, 1), 0, peer.newest(0)) is not None
    room[0] = 2
    assert publish(peer, 90).update == 90 and kept(store) == [60, 90] and len(kept(store)) < KEEP
    killed(store)
    again = Peer(store, 0)  # resumed: what lies there from before makes room, too
    again.start(90)
    assert kept(store) == [60, 90]
    publish(again, 100)
    assert kept(store) == [90, 100]


def test_another_failure_costs_no_snapshot(store):
    peer, write = Peer(store, 0).start(), store.write
    for update in (10, 20):
        publish(peer, update)

    def fails(name, data, replace=True):
        raise OSError(5, "Input/output error")

    store.write = fails
    with pytest.raises(OSError):
        publish(peer, 30)
    store.write = write
    assert kept(store) == [0, 10, 20]


# What the criterion says of the run.



class Dictionary(list):
    symbols = property(list)


def made(task, **options):
    cfg = config.CodistillConfig(**{"codistill_peers": 3, "codistill_interval": 7, "seed": 5, **options})
    return build.run_of(SimpleNamespace(**task), cfg)


def test_the_run_of_a_task():
    a, b = Dictionary("xy"), Dictionary("yx")
    run = made({"source_dictionary": a, "target_dictionary": b}, codistill_sync=True)
    assert (run.peers, run.classes, run.interval, run.lockstep, run.seed) == (3, 2, 7, True, 5)
    assert run.source_sha256 != made({"source_dictionary": b, "target_dictionary": b}).source_sha256 is not None
    several = made({"dicts": {"de": a, "en": b}, "target_dictionary": b})
    assert several.source_sha256 == made({"dicts": {"en": b, "de": a}, "target_dictionary": b}).source_sha256
    assert several.source_sha256 != made({"dicts": {"en": a, "de": b}, "target_dictionary": b}).source_sha256
    assert made({"source_dictionary": None, "target_dictionary": None}).source_sha256 is None
    assert made({"target_dictionary": None}).dictionary_sha256 is None, "a task without the attribute"


def test_a_restart_by_the_launcher_is_known(monkeypatch):
    for text, answer in ((None, False), ("0", False), ("", False), ("1", True), ("12", True)):
        monkeypatch.delenv("CODISTILL_RESTART", raising=False)
        if text is not None:
            monkeypatch.setenv("CODISTILL_RESTART", text)
        assert config.is_restart() is answer
