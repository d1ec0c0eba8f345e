"""Where snapshots lie: named bytes that are replaced atomically."""

from __future__ import annotations

import threading
from typing import Dict, List, Optional

from .directory_store import DirectoryStore
from .lock_file import two_peers
from .manifest import BadSnapshot

__all__ = ["DirectoryStore", "MemoryStore", "open_store", "two_peers"]


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
        """Remove `name`; nothing where it is not there. Never raises."""
        self._files.pop(name, None)

    def names(self, folder: str) -> List[str]:
        """The names below `folder`, without it, sorted."""
        start = folder + "/"
        return sorted(name[len(start) :] for name in self._files if name.startswith(start))

    def sweep(self, folder: str) -> None:
        """Remove what a writer of `folder` that was killed has left there."""

    def claim(self, folder: str) -> bool:
        """Hold `folder` for this peer until `release`; False where the store has no locks.

        Raises ValueError when another live peer holds it."""
        if folder in self._live:
            raise ValueError(two_peers(folder, "this process"))
        self._live.add(folder)
        return True

    def held(self, folder: str) -> Optional[bool]:
        """Whether a live process of this host holds `folder`; None where that cannot be seen."""
        return folder in self._live

    def release(self, folder: str) -> None:
        """Give back what `claim` took; nothing where it took nothing."""
        self._live.discard(folder)

    def __str__(self) -> str:
        return "memory"


def open_store(url: str):
    """The store that --codistill-dir names: a path, or an fsspec URL. Raises ValueError, in one sentence."""
    scheme, colon, rest = url.partition(":")
    if scheme in ("file", "local") and rest.startswith("///"):
        return DirectoryStore(rest[2:])  # rather than fsspec's, which has neither locks nor atomic writes
    if scheme in ("file", "local", "s3", "gs") and colon and (scheme in ("file", "local") or not rest.startswith("//")):
        raise ValueError(f"codistill_dir must be a path or a URL such as s3://BUCKET/FOLDER or file:///PATH, but is {url!r}.")
    if "://" in url:
        from .url_store import UrlStore  # a path needs no fsspec

        return UrlStore(url)
    return DirectoryStore(url)
