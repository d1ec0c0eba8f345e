"""Snapshots in a directory that all peers see: the contract of `stores.MemoryStore` over files.

Others may write into this directory, so no name is trusted twice. Folders are opened without following links, and everything
happens relative to the open folder; a peer's own folder is held open from its claim on. Modes are changed through the open
file, and before and after it takes its name a file is compared with what lies under that name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple, Union

from . import lock_file
from .manifest import BadSnapshot

_STALE_TRIES = 3
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_FILE = _NO_LINK | getattr(os, "O_NONBLOCK", 0)  # nor wait for a pipe's other end
_TEMPORARY = ".tmp-"


class _Folder:
    """An open folder. It closes when nobody uses it any more, so that a late thread never meets its number reused."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Any = os.close) -> None:
        close(self.descriptor)

    def below(self, name: str, make: bool = False) -> _Folder:
        """The folder `name` in this one, and no link to one. `make`: make it where it is missing. Raises OSError."""
        made = False
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
                made = True
        folder = _Folder(os.open(name, _FOLDER | _NO_LINK, dir_fd=self.descriptor))
        if made:  # its files are meant to be read, whatever the umask
            with contextlib.suppress(OSError):
                os.fchmod(folder.descriptor, stat.S_IMODE(os.fstat(folder.descriptor).st_mode) | 0o755)
        return folder

    def look(self, name: str) -> os.stat_result:
        """What lies under `name`; a link is not followed."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)


@dataclass
class _Claim:
    folder: _Folder
    lock: Optional[int]  # its descriptor; None where there are no locks


class DirectoryStore:
    """Named bytes as files of a directory that all peers see."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self._claims: Dict[str, _Claim] = {}

    def read(self, name: str, limit: int) -> Union[bytes, bytearray, None]:
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
        parent, last = self._place(name)
        descriptor = os.open(last, os.O_RDONLY | _FILE, dir_fd=parent.descriptor)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadSnapshot(f"{name} is not a plain file")
            if found.st_size > limit:
                raise BadSnapshot(f"{name} has more than {limit} bytes")
            return _whole(descriptor, name, found.st_size, limit)
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes, replace: bool = True) -> bool:
        parent, last = self._place(name, make=True)
        aside = _TEMPORARY + secrets.token_hex(8)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600, dir_fd=parent.descriptor)
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            with contextlib.suppress(OSError):  # some file systems have no modes
                os.fchmod(descriptor, 0o644)  # 0600 would hide it from a peer that runs as another user
            _check_is(descriptor, parent, aside, name)
            if not replace:
                return _put_first(parent, aside, last, data)
            os.replace(aside, last, src_dir_fd=parent.descriptor, dst_dir_fd=parent.descriptor)
            if name != last:  # in the directory itself others may write the same name
                _check_is(descriptor, parent, last, name)
            return True
        finally:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(aside, dir_fd=parent.descriptor)

    def remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            parent, last = self._place(name)
            os.unlink(last, dir_fd=parent.descriptor)

    def names(self, folder: str) -> List[str]:
        try:
            opened = self._folder(folder)
            return sorted(os.listdir(opened.descriptor))
        except OSError:
            return []

    def sweep(self, folder: str) -> None:
        """Remove what a writer of `folder` that was killed has left there."""
        for name in self.names(folder):
            if name.startswith(_TEMPORARY):
                self.remove(f"{folder}/{name}")

    def claim(self, folder: str) -> bool:
        self._claims[folder] = claim = self._hold(folder)
        return claim.lock is not None

    def held(self, folder: str) -> Optional[bool]:
        """Whether a live process of this host holds `folder`; None where that cannot be seen."""
        try:
            opened = self._folder(folder)
            return lock_file.is_held(opened.descriptor)
        except OSError:
            return None

    def release(self, folder: str) -> None:
        claim = self._claims.pop(folder, None)
        if claim is not None and claim.lock is not None:
            lock_file.release(claim.lock)

    def __str__(self) -> str:
        return self.root

    def _hold(self, folder: str) -> _Claim:
        *above, last = folder.split("/")
        parent = self._folder("/".join(above), make=True)
        try:
            opened = parent.below(last, make=True)
        except OSError as error:
            if stat.S_ISLNK(parent.look(last).st_mode):
                raise OSError(errno.ELOOP, f"{folder} is a link, and snapshots would lie elsewhere") from None
            raise error
        return _Claim(opened, lock_file.take(opened.descriptor, folder))

    def _place(self, name: str, make: bool = False) -> Tuple[_Folder, str]:
        """(the open folder of `name`, its last part). Raises OSError."""
        folder, _, last = name.rpartition("/")
        return self._folder(folder, make), last

    def _folder(self, folder: str, make: bool = False) -> _Folder:
        if folder in self._claims:
            return self._claimed(folder, make)
        opened = _open(self.root, make)
        for name in folder.split("/"):
            opened = opened.below(name, make) if name not in ("", ".") else opened
        return opened

    def _claimed(self, folder: str, make: bool) -> _Folder:
        """The folder as it was claimed, if it is still in its place; one that was removed is made and claimed anew."""
        claim = self._claims[folder]
        *above, last = folder.split("/")
        try:
            found = self._folder("/".join(above)).look(last)
        except FileNotFoundError:
            if not make:
                raise
            self._claims[folder] = self._hold(folder)
            if claim.lock is not None:
                lock_file.release(claim.lock)
            return self._claims[folder].folder
        if not os.path.samestat(found, os.fstat(claim.folder.descriptor)):
            raise PermissionError(
                errno.EPERM, f"{folder} in {self} is no longer the folder that this peer claimed; somebody has replaced it"
            )
        return claim.folder


def _open(path: str, make: bool) -> _Folder:
    """The folder that the user named; its own path may have links."""
    parent, name = os.path.split(path)
    try:
        return _Folder(os.open(path, _FOLDER))
    except FileNotFoundError:
        if not make or not name:
            raise
    return _open(parent, make).below(name, make)


def _whole(descriptor: int, name: str, size: int, limit: int) -> bytearray:
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        # Memory that may be written to, so that tensors can lie in it. The size may be an old one that the system
        # remembers: what is read has the last word.
        data = bytearray(size)
        del data[file.readinto(data) :]
        if file.read(1):
            file.seek(0)
            data = bytearray(file.read(limit + 1))
    if len(data) > limit:
        raise BadSnapshot(f"{name} has more than {limit} bytes")
    return data


def _check_is(descriptor: int, folder: _Folder, last: str, name: str) -> None:
    """Raises OSError unless `last` is the open file: somebody could have put a link or a file of theirs in its place."""
    opened, found = os.fstat(descriptor), folder.look(last)
    # A file system over an object store gives a renamed file another inode.
    alike = opened.st_dev == found.st_dev and opened.st_uid == found.st_uid and opened.st_size == found.st_size
    if not os.path.samestat(opened, found) and not (alike and stat.S_ISREG(found.st_mode) and found.st_nlink <= 1):
        where = name.rpartition("/")[0] or "the directory"
        raise PermissionError(errno.EPERM, f"somebody puts other files in the place of those that are written to {where}")


def _put_first(folder: _Folder, aside: str, last: str, data: bytes) -> bool:
    place = {"src_dir_fd": folder.descriptor, "dst_dir_fd": folder.descriptor}
    try:
        # Fails where the name is taken: the first of several writers wins, whole.
        os.link(aside, last, follow_symlinks=False, **place)
    except FileExistsError:
        return False
    except (OSError, NotImplementedError):
        # A file system without hard links; there a reader may come before the last byte, and looks again.
        return _put_first_in_place(folder, last, data)
    return True


def _put_first_in_place(folder: _Folder, last: str, data: bytes) -> bool:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK
    try:
        descriptor = os.open(last, flags, 0o644, dir_fd=folder.descriptor)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, 0o644)
            file.write(data)
    except OSError:
        os.unlink(last, dir_fd=folder.descriptor)  # a torn one would be in everybody's way
        raise
    return True
