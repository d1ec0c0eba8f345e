"""What an exchange tells of a run's peers: their states, progress and ages, and which have fallen silent. Only reads.

Whatever is read was written by others: sizes are bounded, and only the folders of peers 0 … n−1 are opened.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Optional

from .manifest import FORMAT, MANIFEST_LIMIT, BadSnapshot, Heartbeat, Manifest, plain
from .run import PEERS_LIMIT
from .stores import open_store

# Live peers beat about every 5 s, so six beats are missing. Only a word in a table rests on it: an NFS client that shows
# a beat later than that makes a peer silent for a while, and nothing else.
SILENT_SECONDS = 30.0
LIVE_STATES = ("training", "waiting")
_SAME_CLOCK = 2.0  # seconds; a peer's clock that is ahead by less is as good as the local one
_ABSURD = 10 * 365 * 86400.0  # seconds; a clock that is off by more was never set
_READERS = 16  # reads at once, for an object store's sake


@dataclass(frozen=True)
class Age:
    """How long ago something was written: `seconds` by the local clock, since it was seen to come, when `local`, else by the
    writer's.

    `seconds` is None where nothing was written, or where the writer's clock cannot be right: it is `ahead` of the local one
    by at least as many seconds (if negative, behind)."""

    seconds: Optional[float] = None
    local: bool = False
    ahead: Optional[float] = None

    @property
    def is_absurd(self) -> bool:
        """The writer's clock was never set."""
        return self.ahead is not None and abs(self.ahead) > _ABSURD


def age_by_its_clock(written: float, now: float) -> Age:
    """`written`, `now`: seconds since 1970, each by its own machine's clock. Never negative."""
    ahead = written - now
    if ahead > _SAME_CLOCK or ahead < -_ABSURD:
        return Age(ahead=ahead)
    return Age(max(0.0, -ahead))


@dataclass(frozen=True)
class Row:
    """What is known of one peer. `silent`: None while nobody can tell. `problems`: what of it was refused, and why."""

    peer: int
    heartbeat: Optional[Heartbeat] = None
    newest: Optional[Manifest] = None
    problems: dict[str, str] = field(default_factory=dict)  # by file
    heartbeat_age: Age = Age()
    snapshot_age: Age = Age()
    silent: Optional[bool] = None

    @property
    def state(self) -> str:
        """training, waiting, ended, stopped as it says; silent and absent as seen from here; unknown if it does not say."""
        if self.heartbeat is not None:
            return "silent" if self.silent else self.heartbeat.state
        if self.newest is not None and self.newest.done:
            return "ended"
        return "unknown" if self.newest is not None or self.problems else "absent"

    @property
    def update(self) -> Optional[int]:
        """Updates that it has done; its last heartbeat may be older than its last snapshot."""
        if self.heartbeat is None:
            return None
        done = self.newest.update if self.newest is not None and self.newest.done else 0
        return max(self.heartbeat.update, done)

    @property
    def teachers(self) -> dict[int, int]:
        """The update that it holds of each teacher."""
        told = self.heartbeat.teachers if self.heartbeat is not None else {}
        # Python takes any script's digits, and any number of them, for a number.
        known = {name: update for name, update in told.items() if len(name) < 5 and name == str(int(name))}
        return {int(name): update for name, update in sorted(known.items(), key=lambda item: int(item[0]))}


def in_words(row: Row) -> str:
    """A row for a log: `peer 1 training, update 104, 2.31 updates/s, heartbeat 3 s ago`."""
    told = [f"peer {row.peer} {row.state}"]
    if row.update is not None:
        told.append(f"update {row.update}")
    if row.state in LIVE_STATES and row.heartbeat is not None and row.heartbeat.speed is not None:
        told.append(f"{row.heartbeat.speed:.3g} updates/s")
    # By the local clock only: what another machine's says may be a day off.
    if row.state in (*LIVE_STATES, "silent") and row.heartbeat_age.local:
        told.append(f"heartbeat {row.heartbeat_age.seconds:.0f} s ago")
    return ", ".join(told)


class StatusReader:
    """Looks at an exchange, again and again; remembers by its own monotonic clock when each peer's files changed."""

    def __init__(
        self, store: Any, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self.clock, self.monotonic = store, clock, monotonic
        self.run = read_run(store) or {}
        self.note = ""
        self._seen: dict[tuple[int, str], tuple[Any, float, bool]] = {}  # what, since when, whether it was seen to come

    def look(self) -> list[Row]:
        """All peers of the run, also those without any file yet."""
        try:
            self.run, self.note = read_run(self.store) or self.run, ""
        except (ValueError, OSError) as error:
            self.note = plain(str(error))
        peers = self.run["peers"]
        with ThreadPoolExecutor(min(_READERS, peers)) as pool:
            return list(pool.map(self.row, range(peers)))

    def row(self, peer: int) -> Row:
        """One peer."""
        problems: dict[str, str] = {}
        heartbeat = self._read(f"peer{peer}/alive.json", Heartbeat.from_json, problems)
        newest = self._read(f"peer{peer}/latest.json", Manifest.from_json, problems)
        heartbeat_age = snapshot_age = Age()
        silent = None
        if heartbeat is not None:
            unchanged, heartbeat_age = self._age(peer, "alive", (heartbeat.start_id, heartbeat.beat), heartbeat.time)
            late = heartbeat.state in LIVE_STATES and unchanged >= SILENT_SECONDS
            silent = late if late or heartbeat_age.local else None
        if newest is not None:
            _, snapshot_age = self._age(peer, "snapshot", (newest.update, newest.checksum), newest.time)
        return Row(peer, heartbeat, newest, problems, heartbeat_age, snapshot_age, silent)

    def _read(self, name: str, parse: Callable[[bytes], Any], problems: dict[str, str]) -> Any:
        try:
            data = self.store.read(name, MANIFEST_LIMIT)
            return None if data is None else parse(data)
        except (BadSnapshot, OSError) as error:
            problems[name.split("/")[1]] = plain(str(error))
            return None

    def _age(self, peer: int, what: str, token: Any, written: float) -> tuple[float, Age]:
        """For how many seconds it has been unchanged here, and its age."""
        now = self.monotonic()
        before, since, came = self._seen.get((peer, what), (token, now, False))
        if before != token:
            since, came = now, True
        self._seen[peer, what] = (token, since, came)
        return now - since, Age(now - since, local=True) if came else age_by_its_clock(written, self.clock())


def read_run(store: Any) -> Optional[dict[str, Any]]:
    """run.json's `peers`, `classes` and `dictionary_sha256`; None where there is no such file.

    Raises ValueError, in one sentence, when it is not a run's of this format."""
    try:
        data = store.read("run.json", MANIFEST_LIMIT)
    except BadSnapshot as error:
        raise ValueError(f"{store} must hold the run.json of a run, but {error}; did you mean another directory?") from None
    if data is None:
        return None
    run: Any = None
    try:
        run = json.loads(data)
        known = {name: run[name] for name in ("peers", "classes", "dictionary_sha256")}
        good = run["format"] == FORMAT and type(run["peers"]) is int and 1 <= run["peers"] <= PEERS_LIMIT
        good = good and type(run["classes"]) in (int, type(None)) and type(run["dictionary_sha256"]) in (str, type(None))
    except (ValueError, RecursionError, KeyError, TypeError):
        good = False
    newer = run.get("format") if isinstance(run, dict) else None
    if type(newer) is int and newer > FORMAT:
        raise ValueError(
            f"{store}/run.json must be that of a run of format {FORMAT}, but a newer version began it, with format {newer}; "
            "did you forget to upgrade fairseq-codistill here?"
        )
    if not good:
        raise ValueError(
            f"{store}/run.json must be that of a run of format {FORMAT} with 1 to {PEERS_LIMIT} peers, but is not; "
            "did you mean another directory?"
        )
    return known


def find_exchange(address: str) -> Any:
    """The store of an exchange, or of the `exchange` below a run's --save-dir. Raises ValueError, in one sentence."""
    if "://" not in address and not os.path.isdir(address):
        what = "is a file" if os.path.exists(address) else "is not there"
        raise ValueError(
            f"DIR must be a run's --save-dir or its exchange, but {plain(address)!r} {what}; did you forget to start the "
            "run, or its --codistill-dir?"
        )
    stores = [open_store(candidate) for candidate in (address, address.rstrip("/") + "/exchange")]
    for store in stores:
        if read_run(store) is not None:
            return store
    # A store's own name, since that of a URL may hold a password.
    raise ValueError(
        f"DIR must be a run's --save-dir or its exchange, but neither {plain(str(stores[0]))!r} nor its exchange/ holds a "
        "run.json; did you forget that the run has a --codistill-dir, or have its peers not begun yet?"
    )
