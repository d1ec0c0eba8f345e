"""A discrete-event simulation of codistilling peers on a shared store, for what no machine at hand can show.

What is assumed, and so what the results are worth:

Steps. A worker's update takes `step_s` seconds times a lognormal factor of mean 1 (`jitter`: its σ), drawn anew for each
worker and update; a peer waits for its slowest worker. No worker is slow for ever. Each teacher adds `teacher_cost` of a
step, its forward pass. Then comes an all_reduce inside the peer: a ring's bytes, 2 (w - 1)/w of the gradients, over links of
`within_bytes_per_s`, and a double tree's 2 log₂ w hops (kinder to all_reduce than a ring's 2 (w - 1)); the backward pass
hides as much of it as `hidden_share` of a step.
Exchange, as the package does it. A snapshot every `interval` updates: copying it holds the training thread,
the rest is in the background, and with one publish in flight the next is skipped. A thread for each teacher looks 50
times an interval (every 0.1 to 10 s) and reads the newest that it finds. The exchange takes what has been read; for
teachers that had nothing new it looks again every interval/10 updates. Taking copies the weights and broadcasts them
inside the peer: both hold the training thread. A snapshot of update 0 is never read, for it has learnt nothing. Whoever
starts again reads its teachers at once, and stands still meanwhile.
Store. All transfers, reads and writes, share `total_bytes_per_s` max-min fairly; each peer gets at most
`client_bytes_per_s` in each direction, and each transfer `transfer_bytes_per_s` after `latency_s`. There is no other load.
A parallel file system is bounded by its total and the client's link, an object store by its connections and latency.
Failures. A peer dies at `failures_per_worker_hour` times its workers, loses what came after its last checkpoint (every
`checkpoint_every` updates, at no cost), and is back after `restart_s`. The store never fails.
One big group, to compare with: the same steps, without teachers, waiting for the slowest of all n·w workers; its ring
passes the slowest link (`between_bytes_per_s`), and the death of any worker stops it all.
Not modelled: memory, validation, contention between all_reduce and store, and how well anything learns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, List

PARAMETERS = 209_911_808  # Transformer-big, as benchmarks.communication counts it


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Scenario:
    """One experiment. The defaults: Transformer-big, exchanged in bf16, every peer in a place of its own."""

    peers: int = option(4, "n, the peers (groups)")
    workers: int = option(8, "workers in each peer")
    interval: int = option(500, "N, updates between exchanges")
    updates: int = option(10_000, "updates that each peer makes")
    topology: str = option("ring", "whom a peer learns from: all, ring")
    step_s: float = option(0.5, "seconds of a worker's update without all_reduce, mean")
    jitter: float = option(0.1, "σ of the lognormal factor on each worker's step")
    teacher_cost: float = option(1 / 3, "what each teacher's forward pass adds, as a share of a step")
    start_spread_s: float = option(60.0, "peers start at random within so many seconds")
    gradient_bytes: float = option(4.0 * PARAMETERS, "bytes of the gradients that are all-reduced")
    snapshot_bytes: float = option(2.0 * PARAMETERS, "bytes of one published snapshot")
    held_bytes: float = option(4.0 * PARAMETERS, "bytes of a peer as it is held: what a broadcast inside a group moves")
    within_bytes_per_s: float = option(12.5e9, "link of a worker inside its peer")
    between_bytes_per_s: float = option(1.25e9, "link between two peers' places, which a ring over all of them passes")
    hop_s: float = option(1e-5, "latency of one hop of an all_reduce")
    hidden_share: float = option(2 / 3, "share of a step behind which an all_reduce hides: the backward pass")
    total_bytes_per_s: float = option(5e9, "what the store gives to all transfers together; inf: no limit")
    client_bytes_per_s: float = option(1e9, "what it gives to the reads, and to the writes, of one peer")
    transfer_bytes_per_s: float = option(math.inf, "what it gives to one transfer")
    latency_s: float = option(0.005, "wait before the first byte of a transfer")
    encode_s: float = option(0.5, "background seconds to check and checksum a snapshot")
    verify_s: float = option(0.5, "background seconds to verify one that was read")
    copy_bytes_per_s: float = option(5e9, "memory copies: of my weights to publish, of a peer's when taken")
    failures_per_worker_hour: float = option(2e-5, "of one worker, each of which stops its peer")
    restart_s: float = option(600.0, "seconds from a failure until the peer trains again")
    checkpoint_every: int = option(1000, "updates")
    seed: int = option(1, "of all that is random")

    def __post_init__(self) -> None:
        for name in ("peers", "workers", "interval", "updates", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)} instead.")
        for name, value in vars(self).items():
            if isinstance(value, float) and not value >= 0 or name.endswith("_per_s") and value == 0:
                raise ValueError(f"{name} must be a number above 0 (or 0 seconds), but is {value} instead.")
        if self.topology not in ("all", "ring"):
            raise ValueError(f"topology must be all or ring, but is {self.topology!r} instead.")

    def teachers(self, peer: int) -> List[int]:
        if self.peers == 1:
            return []
        return [(peer - 1) % self.peers] if self.topology == "ring" else [i for i in range(self.peers) if i != peer]


STORES = {
    "file_system": {
        "total_bytes_per_s": 5e9, "client_bytes_per_s": 1e9, "transfer_bytes_per_s": math.inf, "latency_s": 0.005,
    },
    "nfs_server": {
        "total_bytes_per_s": 1.2e9, "client_bytes_per_s": 1.2e9, "transfer_bytes_per_s": math.inf, "latency_s": 0.005,
    },
    "object_store": {
        "total_bytes_per_s": math.inf, "client_bytes_per_s": 1e9, "transfer_bytes_per_s": 90e6, "latency_s": 0.1,
    },
}  # fmt: skip
