"""Where snapshots lie: named bytes that are replaced atomically. Files and directories are touched only here."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import tempfile
import threading
from typing import Dict, List, Optional

from .manifest import BadSnapshot

try:
    import fcntl
except ImportError:  # no POSIX locks on this system
    fcntl = None  # type: ignore[assignment]


_STALE_TRIES = 3


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

    def claim(self, folder: str) -> bool:
        """Hold `folder` for this peer until `release`; False where the store has no locks.

        Raises ValueError when another live peer holds it."""
        if folder in self._live:
            raise ValueError(two_peers(folder, "this process"))
        self._live.add(folder)
        return True

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
        for _ in range(_STALE_TRIES):
            try:
                return self._read(name, limit)
            except FileNotFoundError:
                return None
            except OSError as error:
                # An NFS client held a file that another host has replaced; opened anew, it is the new one.
                if error.errno != errno.ESTALE:
                    raise BadSnapshot(f"{name} cannot be read ({error.strerror})") from None
        return None

    def _read(self, name: str, limit: int) -> bytearray:
        # Neither a link that leaves the directory nor a pipe that never answers is a snapshot.
        *folders, last = name.split("/")
        with contextlib.ExitStack() as opened:
            parent = None
            for path, flags in ((self.root, 0), *((folder, os.O_NOFOLLOW) for folder in folders)):
                parent = os.open(path, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=parent)
                opened.callback(os.close, parent)
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=parent)
            opened.callback(os.close, descriptor)
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadSnapshot(f"{name} is not a plain file")
            if found.st_size > limit:
                raise BadSnapshot(f"{name} has more than {limit} bytes")
            file = opened.enter_context(os.fdopen(descriptor, "rb", closefd=False))
            # Memory that may be written to, so that tensors can lie in it. The size may be an old one that the system
            # remembers: what is read has the last word.
            data = bytearray(found.st_size)
            del data[file.readinto(data) :]
            if file.read(1):
                file.seek(0)
                data = bytearray(file.read(limit + 1))
            if len(data) > limit:
                raise BadSnapshot(f"{name} has more than {limit} bytes")
            return data

    def write(self, name: str, data: bytes, replace: bool = True) -> bool:
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=os.path.dirname(path))
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(OSError):  # some file systems have no modes
                os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide it from a peer that runs as another user
            if not replace:
                return _put_first(temporary, path, data)
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
        except OSError:
            return []

    def claim(self, folder: str) -> bool:
        path = os.path.join(self.root, folder)
        os.makedirs(path, exist_ok=True)
        if os.path.islink(path):
            raise OSError(errno.ELOOP, f"{folder} is a link, and snapshots would lie elsewhere")
        if fcntl is None:
            return False
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK  # a planted link would lead to somebody's file
        descriptor = os.open(os.path.join(path, "lock"), flags, 0o644)
        try:
            # A POSIX lock ends with its process, however that dies, and its data-loading children do not inherit it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            holder = holder if holder.isprintable() and holder else "another process"
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(two_peers(folder, holder)) from None
            return False  # a file system without locks
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._claims[folder] = descriptor
        return True

    def release(self, folder: str) -> None:
        descriptor = self._claims.pop(folder, None)
        if descriptor is not None:
            os.close(descriptor)

    def __str__(self) -> str:
        return self.root


def _put_first(temporary: str, path: str, data: bytes) -> bool:
    try:
        os.link(temporary, path)  # fails where the name is taken: the first of several writers wins, whole
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; there a reader may come before the last byte, and looks again
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
        except OSError:
            os.unlink(path)  # a torn one would be in everybody's way
            raise
    return True


def two_peers(folder: str, holder: str) -> str:
    return (
        f"{folder} is already alive ({holder}); each peer needs an index of its own: "
        "did you forget --codistill-peer (or CODISTILL_PEER)?"
    )


def open_store(url: str):
    """The store that --codistill-dir names: a path, or an fsspec URL. Raises ValueError, in one sentence."""
    scheme, colon, rest = url.partition(":")
    if scheme == "file" and rest.startswith("///"):
        return DirectoryStore(rest[2:])  # rather than fsspec's, which has neither locks nor atomic writes
    if scheme in ("file", "s3", "gs") and colon and (scheme == "file" or not rest.startswith("//")):
        raise ValueError(f"codistill_dir must be a path or a URL such as s3://BUCKET/FOLDER or file:///PATH, but is {url!r}.")
    if "://" in url:
        from .url_store import UrlStore  # a path needs no fsspec

        return UrlStore(url)
    return DirectoryStore(url)
