"""Work in stages, each of which is done wholly or not at all: a run that is killed goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Callable, List, Optional

_TRIES = 10
RECORD = "stage.json"
INSTEAD = "give another --out or delete it"


class Stages:
    """The stages of one piece of work in ``folder``, begun with ``settings``.

    A stage writes into ``NAME.PID.tmp``; one rename to ``NAME`` makes it done. Its record lies inside, so that there is no
    moment at which one is there without the other.
    """

    def __init__(self, folder: Path, settings: dict, first_use: Mapping[str, str] = MappingProxyType({})) -> None:
        """``first_use``: of a setting, the first stage that depends on it (and with it all that come later); a setting that
        is not named there is used by the first of all. What only undone stages depend on may still be changed: a value
        that was refused is not held against the corrected one.

        Raises ``ValueError`` if ``folder`` holds what was made with other settings.
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        begun_with = read_json(folder / "settings.json")
        if begun_with is None and any(folder.iterdir()):
            raise ValueError(f"{folder} must be new or work that was begun, but has no good settings.json. Delete it")
        if begun_with is not None and any(self._is_used(name, first_use) for name in _different(begun_with, settings)):
            raise ValueError(f"{folder} was begun with {begun_with}, not with {settings}; {INSTEAD}")
        if begun_with != settings:
            write_json(folder / "settings.json", settings)

    def _is_used(self, setting: str, first_use: Mapping[str, str]) -> bool:
        stage = first_use.get(setting)
        if stage is not None:
            return read_json(self.folder / stage / RECORD) is not None
        return any(self.folder.glob(f"*/{RECORD}"))

    def do(self, name: str, function: Callable[[Path], dict]) -> dict:
        """Run ``function(folder to fill)`` unless the stage is done; returns what it returned, now or then."""
        done = self.folder / name
        record = read_json(done / RECORD)
        if record is not None:
            return record
        for left in [done, *self.folder.glob(f"{name}.*.tmp")]:
            shutil.rmtree(left, ignore_errors=True)
        # A name of its own: a program that a killed run had started may still be writing.
        unfinished = self.folder / f"{name}.{os.getpid()}.tmp"
        unfinished.mkdir()
        began = time.monotonic()
        try:
            record = function(unfinished)
            write_json(unfinished / RECORD, record)
            sync_files(unfinished)
            unfinished.rename(done)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        print(f"{name}: done in {time.monotonic() - began:.1f} s", flush=True)
        return record


def finished(out: Path, settings: dict) -> Optional[dict]:
    """The manifest of ``out``, None if there is nothing yet; ``ValueError`` if it is something else than ``settings`` make."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = read_json(out / "manifest.json") or {}
    if "settings" not in manifest:
        raise ValueError(f"--out {out} must be new, empty or prepared data, but has no good manifest.json")
    if manifest["settings"] != settings:
        raise ValueError(f"--out {out} was made with {manifest['settings']}, not with {settings}; {INSTEAD}")
    return manifest


def read_json(path: Path) -> Optional[dict]:
    """The object in a file, None where there is no such file or something else in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, value: dict) -> None:
    """Never half: under another name first."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def sync_files(folder: Path) -> None:
    """Have the disk hold every file below ``folder``, so that not even a power cut leaves a done stage with half a file."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _different(begun_with: dict, settings: dict) -> List[str]:
    return [name for name in {*begun_with, *settings} if begun_with.get(name) != settings.get(name)]


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold ``folder``, made if need be, until the process ends or is done; ``ValueError`` if another run holds it.

    The lock is a file beside it, since NFS locks only what is open for writing. A file system without locks (Lustre
    mounted without ``-o flock``) is told of, and used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(folder.name + ".lock")
    handle = _open_and_lock(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: who opened it meanwhile sees that it has lost its name
        os.close(handle)


def _open_and_lock(path: Path, what: str) -> int:
    for _ in range(_TRIES):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise ValueError(f"{what} is being made by another run; wait for its end") from error
        except OSError as error:
            print(
                f"note: the file system of {path.parent} has no locks ({error.strerror}); nothing else may make {what} "
                "at the same time",
                file=sys.stderr,
            )
            return handle
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # another run removed it at its end, after we had opened it
    raise ValueError(f"{what} is being made by other runs, one after another; wait for their end")
