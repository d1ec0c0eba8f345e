"""Take named texts out of archives and folders that need not be trusted: nothing is written but those names."""

from __future__ import annotations

import functools
import gzip
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Callable, Dict, Tuple

_BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile)


def is_archive(name: str) -> bool:
    """Whether a file of this name holds members."""
    return name.endswith((".tgz", ".tar.gz", ".tar", ".zip"))


def gather(folder: Path, archives: Collection[str], wanted: Collection[str], out: Path) -> Dict[str, str]:
    """Copy the files named in ``wanted`` to ``out``, unpacked; returns which file below ``folder`` each came from.

    They may lie at any depth, as they are, as ``.gz``, or in one of ``archives`` (file names). A text that lies there as
    a file goes before the same in an archive. Raises ``ValueError`` where a name stands for two files, an archive breaks
    off, or a member wants to be written elsewhere.
    """
    found: Dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.name[:-3] if path.name.endswith(".gz") else path.name
        if name not in wanted:
            continue
        if name in found:
            raise ValueError(f"{folder} must hold {name} once, but has {found[name]} and {path}")
        found[name] = path
    for name, path in found.items():
        _copy_text(path, out / name)
    origins = {name: path.name for name, path in found.items()}
    for path in sorted(path for path in folder.rglob("*") if path.name in archives and path.is_file()):
        if is_archive(path.name):
            taken = extract(path, set(wanted) - set(origins), out)
            origins.update(dict.fromkeys(taken, path.name))
    return origins


def extract(archive: Path, wanted: Collection[str], out: Path) -> Dict[str, int]:
    """Write the members whose file name is in ``wanted`` to ``out``, flat; returns the bytes of each.

    Raises ``ValueError`` if any member's path leaves its folder, if a wanted member is no plain file or stands there
    twice, or if the archive is damaged.
    """
    taken: Dict[str, int] = {}
    try:
        for path, kind, open_member in _members(archive):
            _check_path(archive, path)
            name = PurePosixPath(path).name
            if name not in wanted or kind == "folder":
                continue
            if kind != "file":
                raise ValueError(f"{archive.name} must hold {name} as a plain file, but holds a {kind} instead")
            if name in taken:
                raise ValueError(f"{archive.name} must hold {name} once, but has several")
            with open_member() as source, open(out / name, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                taken[name] = file.tell()
    except _BROKEN as error:
        raise ValueError(f"{archive} must be a whole archive, but cannot be read to its end: {error}") from error
    return taken


Member = Tuple[str, str, Callable[[], IO[bytes]]]  # path, kind, opener


def _members(archive: Path) -> Iterator[Member]:
    """The members of a tar or zip file in their order; each can be opened until the next one is asked for."""
    return _zip_members(archive) if archive.suffix == ".zip" else _tar_members(archive)


def _tar_members(archive: Path) -> Iterator[Member]:
    opener = open if archive.suffix == ".tar" else gzip.open
    with opener(archive, "rb") as file:
        with tarfile.open(fileobj=file, mode="r|") as members:
            for member in members:
                kind = "file" if member.isfile() else "folder" if member.isdir() else "link or device"
                yield member.name, kind, functools.partial(members.extractfile, member)
        # tarfile takes a damaged header for the end. Only gzip's checksum, at its very end, tells the difference.
        while file.read(1 << 20):
            pass


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as members:
        for member in members.infolist():
            # The upper half of the attributes is Unix's mode: 0o12 is a symbolic link.
            is_link = member.external_attr >> 28 == 0o12
            kind = "folder" if member.is_dir() else "link or device" if is_link else "file"
            yield member.filename, kind, functools.partial(members.open, member)


def _check_path(archive: Path, path: str) -> None:
    parts = PurePosixPath(path.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or path[1:2] == ":" or "\0" in path:
        raise ValueError(f"{archive.name} must hold paths below its own folder, but has the member {path!r}: do not trust it")


def _copy_text(path: Path, out: Path) -> None:
    try:
        source: IO[bytes]
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as source, open(out, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} must be a whole gzip file, but cannot be read to its end: {error}") from error
