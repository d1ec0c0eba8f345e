"""Fetch a file from the first mirror that gives it whole: resumable, checked, never a half under the final name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional, Tuple

import requests
from parallel_text import sha256_of
from tqdm import tqdm

CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Published:
    """One file as it is offered: the same bytes at each of ``urls``, of known length and digest if somebody published them."""

    name: str
    urls: Tuple[str, ...]
    bytes: Optional[int] = None
    sha256: Optional[str] = None


def fetch_archives(archives: Iterable[Sequence[Published]], folder: Path) -> Dict[str, dict]:
    """Have in ``folder`` one of the offers for each archive; returns what the manifest says of each, by file name.

    Where no digest is published, the one recorded beside the file by ``trust`` must fit. Raises ``ValueError`` if a file
    that lies there does not fit its record, ``ConnectionError`` if an archive cannot be had.
    """
    return dict(_fetch_first_offer(offers, folder) for offers in archives)


def trust(name: str, sha256: str, folder: Path) -> None:
    """Record a digest at the first use of a file, as ``sha256sum`` would; it is compared from then on."""
    record = _record_of(folder / name)
    if not record.exists():
        record.write_text(f"{sha256}  {name}\n", encoding="utf-8")


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _fetch_first_offer(offers: Sequence[Published], folder: Path) -> Tuple[str, dict]:
    failures = []
    for offer in sorted(offers, key=lambda offer: not (folder / offer.name).exists()):
        path = folder / offer.name
        recorded = _recorded_digest(path) if offer.sha256 is None else None
        try:
            digest = fetch(offer.urls, path, offer.sha256 or recorded, size=offer.bytes)
        except ConnectionError as error:
            hint = f". If it was changed on purpose, delete {_record_of(path)}" if recorded else ""
            failures.append(f"{error}{hint}")
            continue
        known = "published" if offer.sha256 else "first use"
        return offer.name, {"bytes": path.stat().st_size, "sha256": digest, "digest_known_from": known}
    raise ConnectionError("; ".join(failures))


def _recorded_digest(path: Path) -> Optional[str]:
    """What was recorded when ``path`` was first used; ``ValueError`` if the file that lies there is another one."""
    record = _record_of(path)
    if not record.exists():
        return None
    digest = record.read_text(encoding="utf-8").split(" ")[0].strip()
    if path.exists() and sha256_of(path) != digest:
        raise ValueError(f"{path} must have the sha256 that {record.name} recorded at its first use. Delete one of them")
    return digest


def fetch(urls: Sequence[str], path: Path, sha256: Optional[str] = None, attempts: int = 3, size: Optional[int] = None) -> str:
    """Make ``path`` hold the file that every one of ``urls`` offers, and return its sha256.

    A file that is there already is kept if its digest fits. A broken-off answer stays in ``path.part`` and the next
    attempt, be it minutes or days later, asks only for the rest: any mirror if the digest is known, else the same one, if
    it says that the file is still the same. Without ``sha256`` and ``size`` (bytes) the announced length is all that is
    checked. Raises ``ConnectionError`` that names every mirror and what it answered, once each has failed ``attempts``
    times.
    """
    if path.exists() and (sha256 is None or sha256_of(path) == sha256):
        return sha256_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    # All attempts at one mirror before the next: what it broke off is most likely to be continued by itself.
    for url in [url for url in urls for _ in range(attempts)]:
        try:
            _continue_part(url, part, is_known=sha256 is not None, size=size)
            have = part.stat().st_size
            if size is not None and have != size:  # of a server that had announced no length
                _forget(part)
                raise ConnectionError(f"the file has {have} bytes instead of {size}")
            digest = sha256_of(part)
            if sha256 is not None and digest != sha256:
                _forget(part)
                raise ConnectionError(f"the file has sha256 {digest} instead of {sha256}")
        except (requests.RequestException, ConnectionError) as error:
            failures.append(f"{url}: {error}")
            continue
        part.replace(path)
        _forget(part)
        return digest
    raise ConnectionError(f"{path.name} could not be downloaded. " + "; ".join(dict.fromkeys(failures)))


def _continue_part(url: str, part: Path, is_known: bool, size: Optional[int]) -> None:
    """Append to ``part`` what is missing of ``url``; raises if the server stops before its promised length."""
    # Without "identity" a server may hand out a .gz as a compressed text, whose bytes and ranges are not the file's.
    headers = {"Accept-Encoding": "identity"}
    have = part.stat().st_size if part.exists() else 0
    if have and not is_known:
        origin = _read_origin(part)
        if origin.get("url") != url:
            have = 0
        elif origin.get("validator"):
            headers["If-Range"] = origin["validator"]
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status_code == 416:  # nothing is left to send: the part is whole, or it is not this file
            _check_whole(part, answer.headers.get("Content-Range", "").rpartition("/")[2])
            return
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        rest = answer.headers.get("Content-Length")
        total = have + int(rest) if rest else None
        if size is not None and total is not None and total != size:
            raise ConnectionError(f"the file has {total} bytes instead of {size}")
        _write_origin(part, url, answer)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, leave=False, disable=None)
        # That a connection broke is told below, by the length.
        broken = contextlib.suppress(requests.exceptions.ChunkedEncodingError) if total is not None else bar
        with bar, open(part, "ab" if have else "wb") as file, broken:
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None:
        _check_whole(part, str(total))


def _check_whole(part: Path, total_bytes: str) -> None:
    """Raise unless ``part`` is ``total_bytes`` long; drop it if it is longer, since then it is another file's."""
    have = part.stat().st_size
    if str(have) == total_bytes:
        return
    if not total_bytes.isdigit() or have > int(total_bytes):
        _forget(part)
    raise ConnectionError(f"the answer broke off at {have} of {total_bytes or 'an unknown number of'} bytes")


def _origin_of(part: Path) -> Path:
    return part.with_name(part.name + ".from")


def _write_origin(part: Path, url: str, answer: requests.Response) -> None:
    """Whose bytes ``part`` has, and what the server calls this state of the file."""
    etag = answer.headers.get("ETag", "")
    # A weak tag says nothing about bytes, and servers ignore it in If-Range.
    validator = answer.headers.get("Last-Modified", "") if not etag or etag.startswith("W/") else etag
    _origin_of(part).write_text(json.dumps({"url": url, "validator": validator}), encoding="utf-8")


def _read_origin(part: Path) -> dict:
    try:
        return json.loads(_origin_of(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _forget(part: Path) -> None:
    for path in (part, _origin_of(part)):
        path.unlink(missing_ok=True)
