"""The file `lock` of a peer's folder: one live process of this host holds it, for as long as it runs.

It lies where others may write, so it is opened without following a link, without truncating what lies there, and without
waiting for a pipe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import sys
from typing import Optional, Set, Tuple

try:
    import fcntl
except ImportError:  # no POSIX locks on this system
    fcntl = None  # type: ignore[assignment]

_NAME = "lock"
_TRIES = 3
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
# struct flock, to ask for a lock without taking it: (layout, place of its type).
_FLOCK = {"linux": ("hhqqi4x", 0), "darwin": ("qqihh", 3)}.get(sys.platform) if sys.maxsize > 2**32 else None
# Locks of this process by device and inode: to open and close such a file again would release it.
_MINE: Set[Tuple[int, int]] = set()


def take(folder: int, name: str) -> Optional[int]:
    """A descriptor that holds the lock of the open folder `name`, None where there are no locks.

    Raises OSError for what is no lock file, ValueError where another live process holds it."""
    if fcntl is None:
        return None
    for _ in range(_TRIES):
        descriptor = _open(folder, name)
        try:
            # A POSIX lock ends with its process, however that dies, and its data-loading children do not inherit it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            holder = holder if holder.isprintable() and holder else "another process"
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ValueError(two_peers(name, holder)) from None
            return None  # a file system without locks
        opened = os.fstat(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(opened, _look(folder)):
                _MINE.add((opened.st_dev, opened.st_ino))
                _sign(descriptor, opened)
                return descriptor
        os.close(descriptor)  # it was removed before it was locked: the next process would lock another one
    raise OSError(errno.EBUSY, f"{name}/lock is removed again and again")


def _open(folder: int, name: str) -> int:
    """Opened, not truncated: what lies there may be a link to somebody's file."""
    must = f"{name}/lock must be a plain file with this one name"
    try:
        descriptor = os.open(_NAME, os.O_RDWR | os.O_CREAT | _CAREFUL, 0o644, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise OSError(error.errno, f"{must}, but is {_kind(_look(folder))}; remove it") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{must}, but is {_kind(found)}; remove it")
    return descriptor


def _kind(found: os.stat_result) -> str:
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFREG: "one of several names"}
    return kinds.get(stat.S_IFMT(found.st_mode), "a special file")


def _sign(descriptor: int, found: os.stat_result) -> None:
    """Say in the lock who holds it, for people; not in a file of another user."""
    if found.st_uid == os.geteuid():
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o644)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def release(descriptor: int) -> None:
    found = os.fstat(descriptor)
    _MINE.discard((found.st_dev, found.st_ino))
    os.close(descriptor)


def is_held(folder: int) -> Optional[bool]:
    """Whether a live process of this host holds the lock of an open folder; None where that cannot be seen. Raises OSError."""
    found = _look(folder)
    if (found.st_dev, found.st_ino) in _MINE:
        return True
    descriptor = os.open(_NAME, os.O_RDONLY | _CAREFUL, dir_fd=folder)
    try:
        return _is_locked(descriptor)
    finally:
        os.close(descriptor)


def _look(folder: int) -> os.stat_result:
    return os.stat(_NAME, dir_fd=folder, follow_symlinks=False)


def _is_locked(descriptor: int) -> Optional[bool]:
    if fcntl is None or _FLOCK is None:
        return None
    layout, place = _FLOCK
    question = [0] * len(struct.unpack(layout, bytes(struct.calcsize(layout))))
    question[place] = fcntl.F_WRLCK
    try:
        answer = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(layout, *question)))
    except OSError:
        return None  # a file system without locks
    return answer[place] != fcntl.F_UNLCK


def two_peers(folder: str, holder: str) -> str:
    return (
        f"{folder} is already alive ({holder}); each peer needs an index of its own: "
        "did you forget --codistill-peer (or CODISTILL_PEER)?"
    )
