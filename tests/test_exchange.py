"""One contract for every store, and format 1 on top of it, with real files, real processes and real failures."""

import errno
import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from fairseq_runs import fork_server
from torch import nn

from fairseq_codistill.exchange.exchange import KEEP, Exchange, Run
from fairseq_codistill.exchange.manifest import BadSnapshot
from fairseq_codistill.exchange.snapshot import fingerprint, tensors_of
from fairseq_codistill.exchange.stores import DirectoryStore, MemoryStore, open_store

STORES = {"memory": lambda path: MemoryStore(), "directory": lambda path: DirectoryStore(str(path / "exchange"))}
RUN = Run(peers=2, dictionary_sha256="ab" * 32, classes=100)


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    return STORES[request.param](tmp_path)


def model(value=0.0):
    net = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def publish(exchange, update, value=0.0, **facts):
    net = model(value)
    facts = {"epoch": 1, "model": {}, "time": 0.0, "fingerprint": fingerprint(net), **facts}
    return exchange.publish(tensors_of(net), update, **facts)


def fetch(exchange, peer, manifest):
    return exchange.fetch(peer, manifest, fingerprint(model()), tensors_of(model()))


# The store's contract.


def test_a_store_keeps_bytes(store):
    assert store.read("a/x", 10) is None and store.names("a") == []
    assert store.write("a/x", b"one") and store.write("a/y", b"")
    assert store.read("a/x", 3) == b"one" and store.read("a/y", 0) == b"" and store.names("a") == ["x", "y"]
    assert store.write("a/x", b"two") and store.read("a/x", 10) == b"two"
    store.remove("a/x")
    store.remove("a/x")
    assert store.read("a/x", 10) is None and store.names("a") == ["y"]


def test_a_store_gives_no_more_than_it_is_asked_for(store):
    store.write("x", b"12345")
    with pytest.raises(BadSnapshot, match="more than 4 bytes"):
        store.read("x", 4)


def test_the_first_of_several_writers_wins(store):
    barrier, wins = threading.Barrier(8), []

    def write(i):
        barrier.wait()
        wins.append((store.write("run.json", b"%d" % i * 1000, replace=False), i))

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    winners = [i for won, i in wins if won]
    assert len(winners) == 1 and store.read("run.json", 10**6) == b"%d" % winners[0] * 1000


def test_the_first_writer_wins_without_hard_links_too(tmp_path, monkeypatch):
    def no_links(*_, **__):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    store = DirectoryStore(str(tmp_path))
    assert store.write("run.json", b"one", replace=False) and not store.write("run.json", b"two", replace=False)
    assert store.read("run.json", 10) == b"one" and store.names(".") == ["run.json"]


def test_a_run_that_is_just_being_written_is_waited_for(store):
    """On storage where a reader may come between the creation of run.json and its last byte."""
    whole = MemoryStore()
    Exchange(whole, 0).join(RUN)
    store.write("run.json", b"")
    naps = []

    def nap(seconds):
        naps.append(seconds)
        store.write("run.json", whole.read("run.json", 10**6))

    Exchange(store, 1, sleep=nap).join(RUN)
    assert len(naps) == 1


def test_a_reader_never_sees_half_a_write(store):
    versions = [bytes([i]) * 50_000 for i in range(4)]
    store.write("x", versions[0])
    enough, wrote = threading.Event(), threading.Semaphore(0)

    def write():
        count = 0
        while not enough.is_set():
            count += 1
            store.write("x", versions[count % 4])
            wrote.release()

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(100):
        wrote.acquire()  # so that there is a new version at each look
        assert store.read("x", 10**6) in versions
    enough.set()
    writer.join()


def test_a_reader_that_has_begun_keeps_the_old_version_whole(tmp_path):
    """A write goes to another file, which then takes the name; written in place it would change under the reader."""
    store = DirectoryStore(str(tmp_path))
    store.write("x", b"old" * 1000)
    with open(tmp_path / "x", "rb", buffering=0) as reader:
        assert reader.read(3) == b"old"
        store.write("x", b"new" * 500)
        reader.seek(0)
        assert reader.read() == b"old" * 1000
    assert store.read("x", 10**4) == b"new" * 500


# Format 1.


def test_publish_newest_fetch(store):
    mine, theirs = Exchange(store, 0), Exchange(store, 1)
    mine.join(RUN)
    theirs.join(RUN)
    assert mine.newest(1) is None and mine.at(1, 50) is None
    publish(theirs, 50, 1.5)
    manifest = mine.newest(1)
    assert manifest.update == 50 and manifest == mine.at(1, 50)
    assert (fetch(mine, 1, manifest)["weight"] == 1.5).all()
    publish(theirs, 100, 2.5)
    assert mine.newest(1).update == 100 and mine.at(1, 50) == manifest
    assert (fetch(mine, 1, manifest)["weight"] == 1.5).all(), "the older one is still there"


def test_the_newest_few_are_kept(store):
    exchange = Exchange(store, 0)
    exchange.join(RUN)
    for update in range(0, 100, 10):
        publish(exchange, update)
    kept = [name for name in store.names("peer0") if name.endswith(".safetensors")]
    assert kept == [f"u{update:09d}.safetensors" for update in (70, 80, 90)] and len(kept) == KEEP
    publish(exchange, 100, needed_from=80)
    publish(exchange, 110, needed_from=80)
    assert exchange.at(0, 80) and exchange.at(0, 110) and not exchange.at(0, 70)
    again = Exchange(store, 0)
    exchange.leave()
    again.join(RUN)
    publish(again, 85)  # resumed from an earlier update: what it writes now is the newest, whatever its number
    assert again.at(0, 85) and again.newest(0).update == 85
    assert len([name for name in store.names("peer0") if name.endswith(".safetensors")]) == KEEP


@pytest.mark.parametrize("fails", ["safetensors", "u00", "latest"])
def test_failures_neither_cost_the_last_good_one_nor_pile_up(store, fails):
    exchange = Exchange(store, 0)
    exchange.join(RUN)
    publish(exchange, 1, 1.0)
    write, attempts = store.write, []

    def full(name, data, replace=True):
        if name.split("/")[1].startswith(fails) or name.endswith(fails):
            attempts.append(name)
            raise OSError(28, "No space left on device")
        return write(name, data, replace)

    store.write = full
    for update in range(2, 9):
        with pytest.raises(OSError):
            publish(exchange, update)
    assert len(attempts) == 7
    assert exchange.newest(0).update == 1 and (fetch(exchange, 0, exchange.newest(0))["weight"] == 1.0).all()
    assert len([name for name in store.names("peer0") if name.endswith("safetensors")]) <= 2
    store.write = write
    publish(exchange, 9, 9.0)
    assert [name for name in store.names("peer0") if name.startswith("u")] == [
        f"u{update:09d}.{kind}" for update in (1, 9) for kind in ("json", "safetensors")
    ]


def test_a_snapshot_that_went_meanwhile_is_no_error(store):
    exchange = Exchange(store, 0)
    exchange.join(RUN)
    manifest = publish(exchange, 0)
    store.remove(f"peer0/{manifest.file}")
    assert fetch(exchange, 0, manifest) is None


def test_peers_must_agree(store):
    Exchange(store, 0).join(RUN)
    for other, words in {
        Run(3, RUN.dictionary_sha256, RUN.classes): "same number of peers",
        Run(2, "cd" * 32, RUN.classes): "same target dictionary",
        Run(2, RUN.dictionary_sha256, 101): "same target dictionary",
    }.items():
        with pytest.raises(ValueError, match=words) as error:
            Exchange(store, 1).join(other)
        assert "dictionary of 100 symbols (sha256 abababababab)" in str(error.value), "both sides are named"
        assert f"{other.peers} peers, a dictionary of {other.classes} symbols" in str(error.value)


@pytest.mark.parametrize("content", [b"{}", b"\xff\x00", b"[1]", b'{"format": 2, "peers": 2}'])
def test_a_directory_of_something_else(store, content):
    store.write("run.json", content)
    with pytest.raises(ValueError, match="did you mean another directory"):
        Exchange(store, 0).join(RUN)


def test_two_live_peers_with_one_index_in_memory():
    store = MemoryStore()
    first = Exchange(store, 0)
    first.join(RUN)
    with pytest.raises(ValueError, match="peer0 is already alive.*--codistill-peer"):
        Exchange(store, 0).join(RUN)
    first.leave()
    Exchange(store, 0).join(RUN)


def test_two_live_peers_with_one_index_in_two_processes(tmp_path):
    """The claim ends with its process, also when that is killed, and names it while it lives."""
    holder = _python(
        tmp_path,
        """
        from fairseq_codistill.exchange.exchange import Exchange, Run
        from fairseq_codistill.exchange.stores import open_store
        exchange = Exchange(open_store("x"), 0)
        exchange.join(Run(2, None, None))
        print("joined", flush=True)
        input()
        """,
    )
    assert holder.stdout.readline() == "joined\n"
    with pytest.raises(ValueError, match=rf"peer0 is already alive \(process {holder.pid} on .*\).*--codistill-peer"):
        Exchange(open_store(str(tmp_path / "x")), 0).join(Run(2, None, None))
    holder.kill()
    holder.communicate()
    Exchange(open_store(str(tmp_path / "x")), 0).join(Run(2, None, None))


def test_a_run_that_ended_is_another_run(store):
    first = Exchange(store, 0)
    first.join(RUN)
    publish(first, 50, done=True)
    first.leave()
    again = Exchange(store, 0)
    again.join(RUN)
    with pytest.raises(ValueError, match="holds another run, which has ended: peer 0 published update 50"):
        again.begin(0, fingerprint(model()))
    again.begin(50, fingerprint(model()))  # resumed, to train longer
    assert again.newest(0).done is False
    with pytest.raises(ValueError, match="has another architecture"):
        again.begin(50, "0" * 16)


def test_a_killed_run_begun_afresh_teaches_nothing_old(store):
    first = Exchange(store, 0)
    first.join(RUN)
    publish(first, 50)
    first.leave()
    again = Exchange(store, 0)
    again.join(RUN)
    again.begin(0, fingerprint(model()))
    assert again.newest(0) is None and again.at(0, 50) is None


# A directory, its failures, and those who would abuse it.


def test_an_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file/below", Path("/proc/nothing")):
        with pytest.raises(ValueError, match="codistill_dir must be a directory that this peer can write to"):
            Exchange(DirectoryStore(str(path)), 0).join(RUN)


def test_what_is_no_plain_file_is_refused(tmp_path):
    store = DirectoryStore(str(tmp_path))
    secret = tmp_path / "secret"
    secret.write_text("x")
    (tmp_path / "peer1").mkdir()
    (tmp_path / "peer1/latest.json").symlink_to(secret)
    with pytest.raises(BadSnapshot):
        Exchange(store, 0).newest(1)
    (tmp_path / "peer1/latest.json").unlink()
    os.mkfifo(tmp_path / "peer1/latest.json")  # opening it to read would wait for a writer
    with pytest.raises(BadSnapshot, match="not a plain file"):
        Exchange(store, 0).newest(1)
    (tmp_path / "peer1/latest.json").unlink()
    (tmp_path / "peer1/latest.json").mkdir()
    free = os.dup(0)
    os.close(free)
    with pytest.raises(BadSnapshot, match="not a plain file"):
        Exchange(store, 0).newest(1)
    again = os.dup(0)
    os.close(again)
    assert again == free, "no descriptor is left open, look after look"


def test_no_link_leads_out_of_the_directory(tmp_path):
    """A planted link in place of a folder or of the lock: nothing is read, written or truncated behind it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "latest.json").write_text("precious")
    root = tmp_path / "x"
    root.mkdir()
    (root / "peer1").symlink_to(outside)
    store = DirectoryStore(str(root))
    with pytest.raises(BadSnapshot):
        store.read("peer1/latest.json", 100)
    with pytest.raises(ValueError, match="codistill_dir must be .* peer1 is a link"):
        Exchange(store, 1).join(RUN)
    (root / "peer0").mkdir()
    (root / "peer0/lock").symlink_to(outside / "latest.json")
    with pytest.raises(ValueError, match="codistill_dir must be"):
        Exchange(store, 0).join(RUN)
    assert (outside / "latest.json").read_text() == "precious" and len(list(outside.iterdir())) == 1


def test_a_stale_file_handle_is_opened_anew(tmp_path, monkeypatch):
    store, calls = DirectoryStore(str(tmp_path)), []
    store.write("x", b"new")
    read, good = store._read, [3]

    def stale(name, limit):
        calls.append(name)
        if len(calls) < good[0]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(name, limit)

    monkeypatch.setattr(store, "_read", stale)
    assert store.read("x", 10) == b"new" and len(calls) == 3
    good[0] = 100
    assert store.read("x", 10) is None, "it is looked for again later"


def test_a_file_that_grows_while_it_is_read_is_not_taken_for_small(tmp_path, monkeypatch):
    store = DirectoryStore(str(tmp_path))
    store.write("x", b"12345")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result([*real(descriptor)[:6], 2, *real(descriptor)[7:]]))
    with pytest.raises(BadSnapshot, match="more than 3 bytes"):
        store.read("x", 3)


def test_a_snapshot_can_be_read_by_other_users(tmp_path):
    store = DirectoryStore(str(tmp_path))
    store.write("peer0/x", b"1")
    assert stat.S_IMODE(os.stat(tmp_path / "peer0/x").st_mode) == 0o644


def test_a_full_disk_is_no_half_file(tmp_path):
    """A real failing write, by the limit of the file size; the parent then reads what is there."""
    writer = _python(
        tmp_path,
        """
        import resource, signal, sys
        sys.path.insert(0, TESTS)
        from test_exchange import *
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        exchange = Exchange(open_store("x"), 0)
        exchange.join(RUN)
        publish(exchange, 1, 1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
        try:
            publish(exchange, 2, 2.0)
        except OSError as error:
            print("OSError", error.strerror)
        """,
    )
    out, _ = writer.communicate(timeout=60)
    assert "OSError File too large" in out
    reader = Exchange(open_store(str(tmp_path / "x")), 1)
    assert reader.newest(0).update == 1 and (fetch(reader, 0, reader.newest(0))["weight"] == 1.0).all()
    assert not [name for name in os.listdir(tmp_path / "x/peer0") if name.startswith(".tmp")]


def _publisher(path, ready):
    exchange = Exchange(open_store(path), 0)
    exchange.join(Run(2, None, None))
    net = nn.Linear(200, 200)
    update = 0
    while True:
        update += 1
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.fill_(update)
        exchange.publish(tensors_of(net), update, epoch=1, model={}, time=0.0, fingerprint=fingerprint(net))
        ready.set()


def test_killed_while_publishing(tmp_path):
    """SIGKILL at a random moment, again and again: what a reader believes is whole, and nothing piles up."""
    context = fork_server()
    path, expected = str(tmp_path / "x"), nn.Linear(200, 200)
    reader, believed = Exchange(open_store(path), 1), 0
    for i in range(10):
        ready = context.Event()
        process = context.Process(target=_publisher, args=(path, ready))
        process.start()
        assert ready.wait(60)
        for _ in range(i + 1):  # reading is the clock: each round kills a little later
            manifest = reader.newest(0)
            weights = manifest and reader.fetch(0, manifest, fingerprint(expected), tensors_of(expected))
            if weights:
                believed += 1
                assert all((tensor == manifest.update).all() for tensor in weights.values())
        process.kill()
        process.join()
    assert believed >= 10
    last = Exchange(open_store(path), 0)
    last.join(Run(2, None, None))
    for update in range(KEEP):
        publish(last, update)
    names = os.listdir(tmp_path / "x/peer0")
    assert len([name for name in names if name.endswith(".safetensors")]) == KEEP
    assert not [name for name in names if name.startswith(".tmp")]


def _python(folder, code):
    """A Python process in `folder` that runs `code`."""
    tests = Path(__file__).parent
    code = f"TESTS = {str(tests)!r}\n" + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
    )  # fmt: skip


def test_an_outage_at_the_start_is_told_as_it_is(store):
    def away(name, limit):
        raise BadSnapshot(f"{name} cannot be read (Connection refused)")

    Exchange(store, 0).join(RUN)
    store.read = away
    with pytest.raises(ValueError, match=r"run.json is neither \(run.json cannot be read \(Connection refused\)\)"):
        Exchange(store, 1, sleep=lambda seconds: None).join(RUN)


def test_a_run_that_goes_on_where_it_cannot_write_says_so(store):
    exchange = Exchange(store, 0)
    exchange.join(RUN)
    publish(exchange, 4, done=True)

    def full(name, data, replace=True):
        raise OSError(28, "No space left on device")

    store.write = full
    with pytest.raises(ValueError, match="codistill_dir must be a directory .* No space left on device"):
        exchange.begin(4, exchange.newest(0).fingerprint)
