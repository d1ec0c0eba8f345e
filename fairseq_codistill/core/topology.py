"""Who learns from whom: a directed graph over the peers 0 … n−1."""

from __future__ import annotations

import itertools
import os
from typing import List, Set, Tuple

Edge = Tuple[int, int]  # (teacher, learner)


def teachers_of(peer: int, edges: Set[Edge]) -> List[int]:
    """The peers whose predictions `peer` learns from, in ascending order."""
    return sorted(teacher for teacher, learner in edges if learner == peer)


def learners_of(peer: int, edges: Set[Edge]) -> List[int]:
    """The peers that learn from `peer`, in ascending order."""
    return sorted(learner for teacher, learner in edges if teacher == peer)


def edges_of(topology: str, peers: int) -> Set[Edge]:
    """The edges (teacher, learner) of `all`, of `ring` (each learns from the one before it), or of a file of edges.

    Raises ValueError, with one sentence, for a name that is neither, or a file that is not a graph over the peers.
    """
    if topology == "all":
        return set(itertools.permutations(range(peers), 2))
    if topology == "ring":
        return {((i - 1) % peers, i) for i in range(peers)} if peers > 1 else set()
    if not os.path.isfile(topology):
        raise ValueError(
            f"codistill_topology must be 'all', 'ring' or the path of a file of edges, but {topology!r} is none of these."
        )
    return _read_edges(topology, peers)


def _read_edges(path: str, peers: int) -> Set[Edge]:
    """A file of edges: a line `TEACHER LEARNER` for each; empty lines and what follows a # are passed over."""
    edges: Set[Edge] = set()
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            words = line.split("#")[0].split()
            if words:
                edges.add(_edge(words, f"{path}, line {number}", peers))
    for peer in range(peers):
        if not teachers_of(peer, edges):
            raise ValueError(f"{path} has no edge to peer {peer}, which then has no teacher; did you forget a line?")
    return edges


def _edge(words: List[str], where: str, peers: int) -> Edge:
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        raise ValueError(f"{where} must be 'TEACHER LEARNER', two peer indices, but is {' '.join(words)!r}.")
    teacher, learner = int(words[0]), int(words[1])
    if teacher == learner:
        raise ValueError(f"{where} is a self edge: peer {teacher} cannot be its own teacher.")
    if max(teacher, learner) >= peers:
        raise ValueError(
            f"{where} names peer {max(teacher, learner)}, but with {peers} peers the indices are 0 … {peers - 1}."
        )
    return teacher, learner
