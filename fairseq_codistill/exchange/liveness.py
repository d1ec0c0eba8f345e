"""Which other peers live: seen by the locks of this host, and by heartbeats that change. No clock of another machine is
compared with ours, and no state that a file merely claims is believed, but for a goodbye."""

from __future__ import annotations

import socket
import time
from typing import Any, Callable, Dict, Iterable, Optional, Tuple

from .manifest import MANIFEST_LIMIT, BadSnapshot, Presence

BEAT = 5.0  # seconds between two heartbeats
SILENT_SECONDS = 3 * BEAT  # for which a peer must show no life before it is taken for dead
GOODBYES = ("ended", "stopped")

_Token = Optional[Tuple[str, int]]


def host_name() -> str:
    return socket.gethostname()[:200]


def folder_of(peer: int) -> str:
    return f"peer{peer}"


class Others:
    """Looks at peers again and again, and remembers when each one's heartbeat changed, by our own clock."""

    def __init__(
        self, store: Any, sleep: Callable[[float], None] = time.sleep, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.store, self._sleep, self._monotonic = store, sleep, monotonic
        self._first: Dict[int, _Token] = {}
        self._last: Dict[int, Tuple[_Token, float]] = {}  # and since when it is seen

    def presence(self, peer: int) -> Optional[Presence]:
        """Its last heartbeat; None before its first, and where it cannot be read."""
        try:
            data = self.store.read(f"{folder_of(peer)}/alive.json", MANIFEST_LIMIT)
            found = None if data is None else Presence.from_json(data)
        except (BadSnapshot, OSError):
            found = None
        token = None if found is None else (found.life, found.beat)
        self._first.setdefault(peer, token)
        if peer not in self._last or self._last[peer][0] != token:
            self._last[peer] = token, self._monotonic()
        return found

    def silent_for(self, peer: int) -> float:
        """Seconds for which it has shown no life, as far as we have watched."""
        self.presence(peer)
        return 0.0 if self.store.held(folder_of(peer)) else self._monotonic() - self._last[peer][1]

    def living(self, peers: Iterable[int], who: Callable[[Optional[Presence]], bool]) -> Optional[int]:
        """A living peer of whose heartbeat `who` is true; None if there is none. Waits only where nobody can tell at once."""
        unknown = list(peers)
        for look in range(int(SILENT_SECONDS) + 1):
            if look:
                self._sleep(1.0)
            for peer in list(unknown):
                found = self.presence(peer)
                lives = self._lives(peer, found) if who(found) else False
                if lives:
                    return peer
                if lives is False:
                    unknown.remove(peer)
            if not unknown:
                return None
        return None

    def _lives(self, peer: int, found: Optional[Presence]) -> Optional[bool]:
        """None: its heartbeat has not changed yet, and it may be on another host."""
        held = self.store.held(folder_of(peer))
        if held:
            return True
        if found is None or found.state in GOODBYES or (held is False and found.host == host_name()):
            return False
        return True if self._first[peer] != (found.life, found.beat) else None
