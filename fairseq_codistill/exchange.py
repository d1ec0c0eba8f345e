"""Snapshots on the move: publish, newest, fetch, retain. The only code that touches files and other processes.

A store keeps named bytes and replaces them atomically; an exchange lays format 1 out in a store:

    run.json                          what all peers must agree on
    peer0/u000002500.safetensors      weights, written first
    peer0/u000002500.json             their manifest, written next
    peer0/latest.json                 the same manifest, replaced last: a reader believes only what it names
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import tempfile
import threading
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from typing import Dict, List, Optional

from .snapshot import (
    FORMAT,
    MANIFEST_LIMIT,
    BadSnapshot,
    Manifest,
    Weights,
    check_manifest,
    decode,
    describe,
    encode,
    manifest_name,
)

try:
    import fcntl
except ImportError:  # no POSIX locks on this system: two peers with one index go unnoticed
    fcntl = None  # type: ignore[assignment]

KEEP = 3  # snapshots of a peer: one that is being read, the newest, and one between


class MemoryStore:
    """Named bytes in this process: peers as threads, and tests. The reference for what a store must do."""

    def __init__(self) -> None:
        self._files: Dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._live: set = set()

    def read(self, name: str, limit: int) -> Optional[bytes]:
        """The bytes of `name`, or None where there is none. Raises BadSnapshot when they are more than `limit`."""
        data = self._files.get(name)
        if data is not None and len(data) > limit:
            raise BadSnapshot(f"{name} has more than {limit} bytes")
        return data

    def write(self, name: str, data: bytes, replace: bool = True) -> bool:
        """All of `data` or nothing. Without `replace`, False if `name` is there already. Raises OSError."""
        with self._lock:
            if not replace and name in self._files:
                return False
            self._files[name] = bytes(data)
            return True

    def remove(self, name: str) -> None:
        self._files.pop(name, None)

    def names(self, folder: str) -> List[str]:
        """The names below `folder`, without it, sorted."""
        start = folder + "/"
        return sorted(name[len(start) :] for name in self._files if name.startswith(start))

    def claim(self, folder: str) -> None:
        """Hold `folder` for this peer until `release`. Raises ValueError when another live peer holds it."""
        if folder in self._live:
            raise ValueError(_two_peers(folder, "this process"))
        self._live.add(folder)

    def release(self, folder: str) -> None:
        self._live.discard(folder)

    def __str__(self) -> str:
        return "memory"


class DirectoryStore:
    """Named bytes as files of a directory that all peers see."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self._claims: Dict[str, int] = {}

    def read(self, name: str, limit: int) -> Optional[bytes]:
        # Neither a link that leaves the directory nor a pipe that never answers is a snapshot.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(os.path.join(self.root, name), flags)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadSnapshot(f"{name} cannot be read ({error.strerror})") from None
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadSnapshot(f"{name} is not a plain file")
            if os.fstat(descriptor).st_size > limit:
                raise BadSnapshot(f"{name} has more than {limit} bytes")
            try:
                return file.read(limit + 1)
            except OSError as error:
                raise BadSnapshot(f"{name} cannot be read ({error.strerror})") from None

    def write(self, name: str, data: bytes, replace: bool = True) -> bool:
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=os.path.dirname(path))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from a peer that runs as another user
            if not replace:
                return _put_first(temporary, path)
            os.replace(temporary, path)
            return True
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self.root, name))

    def names(self, folder: str) -> List[str]:
        try:
            return sorted(os.listdir(os.path.join(self.root, folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def claim(self, folder: str) -> None:
        os.makedirs(os.path.join(self.root, folder), exist_ok=True)
        descriptor = os.open(os.path.join(self.root, folder, "lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                # A POSIX lock ends with its process, however that dies, and its data-loading children do not inherit it.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(_two_peers(folder, holder)) from None
            return  # a file system without locks: the check is not to be had there
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._claims[folder] = descriptor

    def release(self, folder: str) -> None:
        descriptor = self._claims.pop(folder, None)
        if descriptor is not None:
            os.close(descriptor)

    def __str__(self) -> str:
        return self.root


def _put_first(temporary: str, path: str) -> bool:
    try:
        os.link(temporary, path)  # fails where the name is taken: the first of several writers wins, whole
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.exists(path):
            return False
        os.replace(temporary, path)
    return True


def _two_peers(folder: str, holder: str) -> str:
    return (
        f"{folder} is already alive ({holder}); each peer needs an index of its own: "
        "did you forget --codistill-peer (or CODISTILL_PEER)?"
    )


def open_store(url: str):
    """The store that --codistill-dir names: a path."""
    if "://" in url:
        raise ValueError(
            f"codistill_dir must be a directory that all peers see, but is {url!r}; this version has no object stores."
        )
    return DirectoryStore(url)


@dataclass(frozen=True)
class Run:
    """What the peers of one run must agree on. The dictionary is the target side's; None where the task has none."""

    peers: int
    dictionary_sha256: Optional[str]
    classes: Optional[int]
    format: int = FORMAT


class Exchange:
    """Format 1 in a store, for one peer."""

    def __init__(self, store, peer: int) -> None:
        self.store = store
        self.peer = peer
        self._kept: List[int] = []  # my own snapshots' updates, in the order of writing

    def join(self, run: Run) -> None:
        """Agree with the other peers on `run`, and claim my index. Raises ValueError, in one sentence."""
        try:
            self.store.write("run.json", json.dumps(asdict(run), indent=1).encode(), replace=False)
            self._agree(run)
            self.store.claim(self._folder(self.peer))
            self._kept = self._left_behind()
        except OSError as error:
            raise ValueError(
                f"codistill_dir must be a directory that this peer can write to, but {self.store} is not: {error.strerror}."
            ) from None

    def begin(self, update: int, fingerprint: str) -> None:
        """My training starts at `update`. Raises ValueError when my folder holds what cannot be this training's past."""
        try:
            past = self.newest(self.peer)
        except BadSnapshot:
            past = None
        if past is None:
            return
        if past.fingerprint != fingerprint or (past.done and update == 0):
            what = "has ended" if past.fingerprint == fingerprint else "has another architecture"
            raise ValueError(
                f"codistill_dir {self.store} holds another run, which {what}: peer {self.peer} published update "
                f"{past.update} there and now starts at update {update}; did you forget to give this run a --codistill-dir "
                "of its own, or to resume from its --save-dir?"
            )
        if update == 0:
            self.forget()
        elif past.done:  # the training goes on after all: a peer in lockstep must wait for me again
            self.store.write(f"{self._folder(self.peer)}/latest.json", replace_fields(past, done=False).to_json())

    def forget(self) -> None:
        """Remove all snapshots of mine."""
        folder = self._folder(self.peer)
        for name in self.store.names(folder):
            if name.endswith((".json", ".safetensors")):
                self.store.remove(f"{folder}/{name}")
        self._kept = []

    def leave(self) -> None:
        self.store.release(self._folder(self.peer))

    def publish(self, weights: Weights, update: int, needed_from: Optional[int] = None, **facts) -> Manifest:
        """Write a snapshot, then its manifest, then forget old ones, but none from update `needed_from` on.

        `facts`: the manifest's other fields. Raises BadSnapshot for weights that are not finite, OSError for a full or
        failing store; either way no reader sees anything half done.
        """
        data = encode(weights)
        manifest = describe(weights, data, update, **facts)
        folder = self._folder(self.peer)
        try:
            self.store.write(f"{folder}/{manifest.file}", data)
            self.store.write(f"{folder}/{manifest_name(update)}", manifest.to_json())
            self.store.write(f"{folder}/latest.json", manifest.to_json())
        finally:
            self._kept = [u for u in self._kept if u != update] + [update]
            self._retain(needed_from)
        return manifest

    def newest(self, peer: int) -> Optional[Manifest]:
        """What `peer` published last, None before its first. Raises BadSnapshot."""
        return self._manifest(peer, "latest.json")

    def at(self, peer: int, update: int) -> Optional[Manifest]:
        """What `peer` published at `update`, None if that is not there. Raises BadSnapshot."""
        return self._manifest(peer, manifest_name(update))

    def fetch(self, peer: int, manifest: Manifest, fingerprint: str, expected: Weights) -> Optional[Weights]:
        """The verified tensors of a snapshot; None when it was replaced meanwhile. Raises BadSnapshot."""
        check_manifest(manifest, fingerprint, expected)
        data = self.store.read(f"{self._folder(peer)}/{manifest.file}", manifest.bytes)
        return None if data is None else decode(data, manifest, expected)

    def _manifest(self, peer: int, name: str) -> Optional[Manifest]:
        data = self.store.read(f"{self._folder(peer)}/{name}", MANIFEST_LIMIT)
        return None if data is None else Manifest.from_json(data)

    def _agree(self, mine: Run) -> None:
        try:
            theirs = json.loads(self.store.read("run.json", MANIFEST_LIMIT) or b"")
            theirs = {name: theirs[name] for name in asdict(mine)}
        except (BadSnapshot, ValueError, KeyError, TypeError):
            raise ValueError(
                f"codistill_dir must be empty or hold a run of format {FORMAT}, but {self.store}/run.json is neither; "
                "did you mean another directory?"
            ) from None
        for name, label in _AGREE.items():
            if theirs[name] != asdict(mine)[name]:
                raise ValueError(
                    f"All peers of a run must have the same {label}, but {self.store} was begun with "
                    f"{_words(theirs)} and this peer has {_words(asdict(mine))}; did you forget to give this run a "
                    "--codistill-dir of its own, or to preprocess all peers' data with one dictionary?"
                )

    def _left_behind(self) -> List[int]:
        """The updates of the snapshots that I published in an earlier life; what a killed publish left is removed."""
        folder, updates = self._folder(self.peer), []
        for name in self.store.names(folder):
            if name.startswith(".tmp-"):
                self.store.remove(f"{folder}/{name}")
            elif name.endswith(".safetensors") and name[1:10].isdecimal():
                updates.append(int(name[1:10]))
        return updates

    def _retain(self, needed_from: Optional[int]) -> None:
        folder = self._folder(self.peer)
        for update in self._kept[:-KEEP]:
            if needed_from is not None and update >= needed_from:
                continue
            self._kept.remove(update)
            self.store.remove(f"{folder}/{manifest_name(update)}")
            self.store.remove(f"{folder}/u{update:09d}.safetensors")

    @staticmethod
    def _folder(peer: int) -> str:
        return f"peer{peer}"


_AGREE = {
    "format": "snapshot format",
    "peers": "number of peers",
    "classes": "target dictionary",
    "dictionary_sha256": "target dictionary",
}


def _words(run: Dict) -> str:
    sha256 = run["dictionary_sha256"]
    dictionary = "no dictionary" if sha256 is None else f"a dictionary of {run['classes']} symbols (sha256 {sha256[:12]})"
    return f"{run['peers']} peers, {dictionary}, format {run['format']}"
