"""A simulated store: transfers that share bandwidth as a fair network would."""

from __future__ import annotations

import heapq
import itertools
import math
from typing import Iterator, List, Tuple

import numpy as np
import simpy


class Store:
    """Transfers share `total` max-min fairly; none is faster than `transfer`, nor all of one client than `client`.

    All three are bytes per second and may be infinite. Clients are numbered from 0; a peer's reads and its writes do not
    share (full duplex), so they are two clients. A transfer waits `latency_s` before its first byte.
    """

    def __init__(
        self, env: simpy.Environment, clients: int, total: float, client: float, transfer: float, latency_s: float
    ) -> None:
        self.env, self.total, self.client, self.transfer, self.latency_s = env, total, client, transfer, latency_s
        self.moved = 0.0  # bytes of the transfers that ended
        # Of each client: its open transfers, by the value of `_served` at which they end; how many, and the first such
        # value; bytes that each would have got, had it been open since the beginning; the rate of each.
        self._open: List[List[Tuple[float, int, simpy.Event]]] = [[] for _ in range(clients)]
        self._counts = np.zeros(clients, dtype=int)
        self._ends = np.full(clients, math.inf)
        self._served = np.zeros(clients)
        self._rates = np.zeros(clients)
        self._order = itertools.count()
        self._since = 0.0
        self._plan = 0

    def move(self, client: int, size: float) -> Iterator:
        """A process that ends with the last byte; when interrupted, its share goes back to the others."""
        yield self.env.timeout(self.latency_s)
        self._advance()
        entry = (self._served[client] + size, next(self._order), self.env.event())
        heapq.heappush(self._open[client], entry)
        self._changed(client)
        try:
            yield entry[2]
        except simpy.Interrupt:
            self._advance()
            self._open[client] = [other for other in self._open[client] if other is not entry]
            heapq.heapify(self._open[client])
            self._changed(client)
            raise
        self.moved += size

    def _advance(self) -> None:
        elapsed, self._since = self.env.now - self._since, self.env.now
        if elapsed:  # no time passes in a transfer at an infinite rate
            self._served += self._rates * elapsed

    def _changed(self, client: int) -> None:
        """Divide the bandwidth anew, and plan the next end. An older plan is not taken back but ignored, by its number."""
        transfers = self._open[client]
        self._counts[client] = len(transfers)
        self._ends[client] = transfers[0][0] if transfers else math.inf
        self._rates = fair_rates(self._counts, self.total, self.client, self.transfer)
        self._plan += 1
        if self._counts.any():
            lefts = np.full(len(self._ends), math.inf)
            np.divide(self._ends - self._served, self._rates, out=lefts, where=self._counts > 0)
            plan, first = self._plan, int(lefts.argmin())
            self.env.timeout(max(0.0, lefts[first])).callbacks.append(lambda _: self._end(plan, first))

    def _end(self, plan: int, client: int) -> None:
        if plan == self._plan:
            self._advance()
            end, _, event = heapq.heappop(self._open[client])
            self._served[client] = max(self._served[client], end)  # rounding must not leave a byte behind
            event.succeed()
            self._changed(client)


def fair_rates(transfers: np.ndarray, total: float, client: float, transfer: float) -> np.ndarray:
    """The rate of each transfer of each client, who have so many [clients]; 0 where a client has none.

    Max-min fair: whom its own limit holds below an equal share of `total` leaves the rest to the others.
    """
    limits = np.where(transfers > 0, np.minimum(transfer, client / np.maximum(transfers, 1)), 0.0)
    if math.isinf(total) or limits @ transfers <= total:
        return limits
    limits = np.minimum(limits, total)
    order = np.argsort(limits)
    wanted = limits[order] * transfers[order]
    # What an equal share would be if all with a lower limit had what they want.
    shares = (total - (wanted.cumsum() - wanted)) / np.maximum(transfers[order][::-1].cumsum()[::-1], 1)
    return np.minimum(limits, shares[np.argmax(limits[order] >= shares)])
