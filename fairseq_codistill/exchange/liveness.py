"""Which other peers are alive: seen by the locks of this host, and by heartbeats that change. No clock of another machine
is compared with the local one, and no state that a file merely claims is believed, except that a peer has ended."""

from __future__ import annotations

import socket
import time
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

from .manifest import MANIFEST_LIMIT, BadSnapshot, Heartbeat

BEAT = 5.0  # seconds between two heartbeats
SILENT_SECONDS = 3 * BEAT  # without a new heartbeat before a peer is taken for dead
FINAL_STATES = ("ended", "stopped")

_Token = Optional[Tuple[str, int]]


def host_name() -> str:
    return socket.gethostname()[:200]


def folder_of(peer: int) -> str:
    return f"peer{peer}"


class Liveness:
    """Looks at peers again and again, and remembers when each one's heartbeat changed, by the local clock."""

    def __init__(
        self, store: Any, sleep: Callable[[float], None] = time.sleep, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self._sleep, self._monotonic = store, sleep, monotonic
        self._first: Dict[int, _Token] = {}
        self._last: Dict[int, Tuple[_Token, float]] = {}  # and since when it is seen

    def heartbeat(self, peer: int) -> Optional[Heartbeat]:
        """Its last heartbeat; None before its first, and where it cannot be read."""
        try:
            data = self.store.read(f"{folder_of(peer)}/alive.json", MANIFEST_LIMIT)
            found = None if data is None else Heartbeat.from_json(data)
        except (BadSnapshot, OSError):
            found = None
        token = None if found is None else (found.start_id, found.beat)
        self._first.setdefault(peer, token)
        if peer not in self._last or self._last[peer][0] != token:
            self._last[peer] = token, self._monotonic()
        return found

    def silent_for(self, peer: int) -> float:
        """Seconds without a new heartbeat, as far as it has been watched."""
        self.heartbeat(peer)
        return 0.0 if self.store.held(folder_of(peer)) else self._monotonic() - self._last[peer][1]

    def find_alive(self, peers: Iterable[int], who: Callable[[Optional[Heartbeat]], bool]) -> Optional[int]:
        """A live peer of whose heartbeat `who` is true; None if there is none. Waits only where nobody can tell at once."""
        unknown = list(peers)
        for look in range(int(SILENT_SECONDS) + 1):
            if look:
                self._sleep(1.0)
            for peer in list(unknown):
                found = self.heartbeat(peer)
                is_alive = self._is_alive(peer, found) if who(found) else False
                if is_alive:
                    return peer
                if is_alive is False:
                    unknown.remove(peer)
            if not unknown:
                return None
        return None

    def _is_alive(self, peer: int, found: Optional[Heartbeat]) -> Optional[bool]:
        """None: its heartbeat has not changed yet, and it may be on another host."""
        held = self.store.held(folder_of(peer))
        if held:
            return True
        if found is None or found.state in FINAL_STATES or (held is False and found.host == host_name()):
            return False
        return True if self._first[peer] != (found.start_id, found.beat) else None
