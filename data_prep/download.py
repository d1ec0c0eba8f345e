"""Fetch a file from the first mirror that gives it whole: resumable, checked, never a half under the final name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import requests
from parallel_text import sha256_of
from tqdm import tqdm

CHUNK_BYTES = 1 << 16
TIMEOUT_SECONDS = 30


def fetch(urls: Sequence[str], path: Path, sha256: Optional[str] = None, attempts: int = 3) -> str:
    """Make ``path`` hold the file that every one of ``urls`` offers, and return its sha256.

    A file that is there already is kept if its digest fits. A broken-off answer stays in ``path.part`` and the next
    attempt, be it minutes or days later, asks only for the rest. Without ``sha256`` the length is all that is checked.
    Raises ``ConnectionError`` that names every mirror and what it answered, once each has failed ``attempts`` times.
    """
    if path.exists() and (sha256 is None or sha256_of(path) == sha256):
        return sha256_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures = []
    # All attempts at one mirror before the next: what it broke off is most likely to be continued by itself.
    for url in [url for url in urls for _ in range(attempts)]:
        try:
            _continue_part(url, part)
            digest = sha256_of(part)
            if sha256 is not None and digest != sha256:
                part.unlink()
                raise ConnectionError(f"the file has sha256 {digest} instead of {sha256}")
        except (requests.RequestException, ConnectionError) as error:
            failures.append(f"{url}: {error}")
            continue
        part.replace(path)
        return digest
    raise ConnectionError(f"{path.name} could not be downloaded. " + "; ".join(dict.fromkeys(failures)))


def _continue_part(url: str, part: Path) -> None:
    """Append to ``part`` what is missing of ``url``; raises if the server stops before its promised length."""
    have = part.stat().st_size if part.exists() else 0
    # Without "identity" a server may hand out a .gz as a compressed text, whose bytes and ranges are not the file's.
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"} if have else {"Accept-Encoding": "identity"}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status_code == 416:  # nothing is left to send: the part is whole, or it is not this file
            _check_whole(part, answer.headers.get("Content-Range", "").rpartition("/")[2])
            return
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        rest = answer.headers.get("Content-Length")
        total = have + int(rest) if rest else None
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, leave=False)
        with bar, open(part, "ab" if have else "wb") as file:
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
        part.unlink()
    raise ConnectionError(f"the answer broke off at {have} of {total_bytes or 'an unknown number of'} bytes")
