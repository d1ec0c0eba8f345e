"""What became of a scenario: run it, and the same workers as one big group, and give the numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Dict

import numpy as np

from benchmarks.simulation.peer import World
from benchmarks.simulation.scenario import Scenario


def big_group(scenario: Scenario) -> Scenario:
    """The same workers as one synchronous group, which all-reduces over all of them."""
    slowest = min(scenario.within_bytes_per_s, scenario.between_bytes_per_s)
    workers = scenario.peers * scenario.workers
    return replace(scenario, peers=1, workers=workers, within_bytes_per_s=slowest, start_spread_s=0.0)


def outcome(scenario: Scenario) -> Dict[str, float]:
    """What became of a scenario: staleness in updates, seconds, bytes per second; and the big group's pace."""
    world = World(scenario)
    peers = world.run()
    ages = np.concatenate([part for peer in peers for part in peer.ages] or [np.empty(0)])
    seconds = [peer.end_s - peer.start_s for peer in peers]
    alone = World(big_group(scenario)).run()[0]
    pace = float(np.mean([scenario.updates / s for s in seconds]))
    group = scenario.updates / (alone.end_s - alone.start_s)
    numbers = {
        "staleness_mean": float(ages.mean()) if ages.size else math.nan,
        "staleness_p95": float(np.percentile(ages, 95)) if ages.size else math.nan,
        "without_teacher_share": sum(peer.alone for peer in peers) / (ages.size + sum(peer.alone for peer in peers)),
        "stall_s_per_peer": float(np.mean([peer.stall_s for peer in peers])),
        "stall_share": sum(peer.stall_s for peer in peers) / sum(seconds),
        "store_bytes_per_s": world.store.moved / (max(peer.end_s for peer in peers) - min(peer.start_s for peer in peers)),
        "published": sum(peer.published for peer in peers),
        "skipped": sum(peer.skipped for peer in peers),
        "read": sum(peer.read for peer in peers),
        "failures": sum(peer.failures for peer in peers),
        "updates_per_s": pace,
        "big_group_updates_per_s": group,
        "relative_pace": pace / group,
    }
    return {name: float(value) for name, value in numbers.items()}
