"""A directory into which others may write: nothing of ours leaves it, nothing of theirs is changed, and files can be read."""

import os
import shutil
import stat

import pytest

from fairseq_codistill.exchange import lock_file
from fairseq_codistill.exchange.stores import DirectoryStore, open_store


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def at(monkeypatch, name, action):
    """Call `action` once, just before `os.name` is called."""
    real, done = getattr(os, name), []

    def wrapped(*args, **kwargs):
        if not done:
            done.append(1)
            action()
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, wrapped)


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "id_rsa"
    path.write_text("SECRET")
    path.chmod(0o600)
    return path


@pytest.fixture
def store(tmp_path):
    store = DirectoryStore(str(tmp_path / "x"))
    assert store.claim("peer0")
    yield store
    store.release("peer0")


@pytest.mark.parametrize("plant", ["link", "hard link", "a file of the attacker's"])
def test_what_is_planted_for_the_temporary_file_is_neither_changed_nor_published(store, secret, tmp_path, plant, monkeypatch):
    """As by somebody who watches the folder: the temporary file is replaced as soon as it is there."""
    folder = tmp_path / "x/peer0"
    store.write("peer0/latest.json", b"good")

    def swap():
        (aside,) = [path for path in folder.iterdir() if path.name.startswith(".tmp-")]
        aside.unlink()
        if plant == "link":
            aside.symlink_to(secret)
        elif plant == "hard link":
            os.link(secret, aside)
        else:
            aside.write_text("longer than what was written")

    at(monkeypatch, "fsync", swap)
    with pytest.raises(OSError, match="somebody puts other files in the place of those that are written to peer0"):
        store.write("peer0/latest.json", b"SECRE!")  # as long as the secret
    assert mode(secret) == 0o600 and secret.read_text() == "SECRET"
    assert store.read("peer0/latest.json", 10) == b"good" and sorted(os.listdir(folder)) == ["latest.json", "lock"]


def test_what_is_planted_between_the_look_and_the_rename_is_not_taken_for_published(store, secret, tmp_path, monkeypatch):
    folder = tmp_path / "x/peer0"

    def swap():
        (aside,) = [path for path in folder.iterdir() if path.name.startswith(".tmp-")]
        aside.unlink()
        aside.symlink_to(secret)

    at(monkeypatch, "replace", swap)
    with pytest.raises(OSError, match="somebody puts other files"):
        store.write("peer0/latest.json", b"mine")
    assert mode(secret) == 0o600 and secret.read_text() == "SECRET"


@pytest.mark.parametrize("replacement", ["link", "folder", "file"])
def test_a_folder_that_is_replaced_after_the_claim(store, tmp_path, replacement):
    """Neither written to, nor read, nor emptied, whoever it belongs to."""
    store.write("peer0/latest.json", b"mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / "latest.json").write_text("precious")
    (other / ".tmp-1").write_text("theirs")
    (tmp_path / "x/peer0").rename(tmp_path / "x/gone")
    if replacement == "link":
        (tmp_path / "x/peer0").symlink_to(other)
    elif replacement == "folder":
        other.rename(tmp_path / "x/peer0")
        other = tmp_path / "x/peer0"
    else:
        (tmp_path / "x/peer0").write_text("")
    for _ in range(2):
        with pytest.raises(OSError, match="peer0 in .* is no longer the folder that this peer claimed"):
            store.write("peer0/latest.json", b"new")
    store.remove("peer0/latest.json")
    store.sweep("peer0")
    assert sorted(path.name for path in other.iterdir()) == [".tmp-1", "latest.json"] and store.names("peer0") == []
    assert (other / "latest.json").read_text() == "precious"
    assert (tmp_path / "x/gone/latest.json").read_bytes() == b"mine"


def test_a_folder_that_was_removed_is_claimed_anew(store, tmp_path):
    store.write("peer0/latest.json", b"one")
    shutil.rmtree(tmp_path / "x")
    assert store.read("peer0/latest.json", 10) is None
    store.write("peer0/latest.json", b"two")
    assert store.read("peer0/latest.json", 10) == b"two" and sorted(os.listdir(tmp_path / "x/peer0")) == ["latest.json", "lock"]
    assert held_elsewhere(tmp_path), "the new lock is held, too"


@pytest.mark.parametrize("planted, what", [
    ("link", "a link"), ("hard link", "one of several names"), ("pipe", "a pipe"), ("folder", "a folder"),
])  # fmt: skip
def test_what_is_planted_as_the_lock_is_refused_and_left_as_it_is(secret, tmp_path, planted, what):
    lock = tmp_path / "x/peer0/lock"
    lock.parent.mkdir(parents=True)
    make = {"link": lambda: lock.symlink_to(secret), "hard link": lambda: os.link(secret, lock),
            "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}  # fmt: skip
    make[planted]()
    with pytest.raises(OSError, match=f"peer0/lock must be a plain file with this one name, but is {what}; remove it"):
        DirectoryStore(str(tmp_path / "x")).claim("peer0")
    assert secret.read_text() == "SECRET" and mode(secret) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_a_lock_of_another_user_is_held_but_not_written_to(tmp_path):
    lock = tmp_path / "x/peer0/lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("theirs")
    os.chown(lock, 4711, 4711)
    store = DirectoryStore(str(tmp_path / "x"))
    assert store.claim("peer0") and held_elsewhere(tmp_path)
    store.release("peer0")
    assert lock.read_text() == "theirs"


def test_a_lock_that_is_replaced_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    """Else two peers would each hold a lock: one on the file that is there, one on a file that has no name any more."""
    lock, real = tmp_path / "x/peer0/lock", lock_file.fcntl.lockf

    def lockf(*args):
        real(*args)
        if not lock.with_name("was replaced").exists():
            lock.unlink()
            lock.with_name("was replaced").touch()

    monkeypatch.setattr(lock_file.fcntl, "lockf", lockf)
    store = DirectoryStore(str(tmp_path / "x"))
    assert store.claim("peer0") and held_elsewhere(tmp_path)
    store.release("peer0")


def test_who_holds_a_folder_can_be_seen_and_looking_releases_nothing(store, tmp_path):
    assert store.held("peer0") is True and DirectoryStore(store.root).held("peer0") is True
    assert store.held("peer1") is None, "nobody was ever there"
    assert held_elsewhere(tmp_path), "closing a lock's file would release it"
    store.release("peer0")
    assert store.held("peer0") is False and not held_elsewhere(tmp_path)
    store.claim("peer0")


def held_elsewhere(tmp_path):
    """Whether another process sees peer 0's lock held, and cannot take it."""
    child = os.fork()  # which inherits no POSIX lock
    if child == 0:
        lock_file._MINE.clear()
        store, status = DirectoryStore(str(tmp_path / "x")), 1
        try:
            held = store.held("peer0")
            store.claim("peer0")
            status = 0 if held is False else 1
        except ValueError:
            status = 3 if held else 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 3), "what it sees is not what it can do"
    return status == 3


@pytest.mark.parametrize("umask, folder_mode", [(0o077, 0o755), (0o022, 0o755), (0o002, 0o775)])
def test_no_umask_hides_what_is_meant_to_be_read(tmp_path, umask, folder_mode):
    before = os.umask(umask)
    try:
        store = DirectoryStore(str(tmp_path / "new/x"))
        store.claim("peer0")
        store.write("run.json", b"1", replace=False)
        store.write("peer0/latest.json", b"1")
        store.write("peer1/latest.json", b"1")
    finally:
        os.umask(before)
    for folder in ("new", "new/x", "new/x/peer0", "new/x/peer1"):
        assert mode(tmp_path / folder) == folder_mode, folder
    for name in ("run.json", "peer0/lock", "peer0/latest.json", "peer1/latest.json"):
        assert mode(tmp_path / "new/x" / name) == 0o644, name
    (tmp_path / "private").mkdir(mode=0o700)
    DirectoryStore(str(tmp_path / "private")).write("run.json", b"1")
    assert mode(tmp_path / "private") == 0o700, "a folder that was there keeps its mode"
    store.release("peer0")


def test_no_descriptor_is_left_open(tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    store = DirectoryStore(str(tmp_path / "x"))
    for _ in range(3):
        store.claim("peer0")
        for name in ("peer0/a", "peer1/a", "run.json"):
            store.write(name, b"1")
            store.read(name, 10)
            store.names("peer0")
            store.held("peer1")
        store.release("peer0")
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_a_url_of_this_machine_is_a_directory(tmp_path):
    for scheme in ("file", "local"):
        assert isinstance(open_store(f"{scheme}://{tmp_path}/x"), DirectoryStore)
        with pytest.raises(ValueError, match="codistill_dir must be a path or a URL"):
            open_store(f"{scheme}:relative")
