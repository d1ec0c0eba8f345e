"""The ranks of one data-parallel group decide together: what fails on one must not leave the others in a collective."""

from __future__ import annotations

from typing import Any, Callable, Optional

import torch
import torch.distributed as dist


def is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leads() -> bool:
    """Whether this is rank 0, which alone touches the exchange."""
    return not is_grouped() or dist.get_rank() == 0


def share(what: Any) -> Any:
    """Rank 0's `what`, on every rank."""
    if not is_grouped():
        return what
    box = [what]  # pickled, but only between the ranks of one peer
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_well(well: bool, device: Optional[torch.device] = None) -> bool:
    """Whether all ranks are `well`. `device`: one that the group's backend can reach."""
    if not is_grouped():
        return well
    flag = torch.tensor([int(well)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def by_rank_0(action: Callable[[], Any]) -> None:
    """Rank 0 does it. What it raises is raised there, and as a ValueError of the same words on every other rank."""
    error: Optional[Exception] = None
    if leads():
        try:
            action()
        except Exception as raised:
            error = raised
    words = share(None if error is None else str(error) or type(error).__name__)
    if error is not None:
        raise error
    if words is not None:
        raise ValueError(words)


def by_all(action: Callable[[], Any]) -> Any:
    """Each rank does it. What one raises is raised there, and as a ValueError of the same words on every other rank."""
    error, result = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    words = [None if error is None else f"{type(error).__name__}: {error}"]
    if is_grouped():
        own, words = words[0], [None] * dist.get_world_size()
        dist.all_gather_object(words, own)
    if error is not None:
        raise error
    for rank, said in enumerate(words):
        if said is not None:
            raise ValueError(f"Rank {rank} of this peer's group has failed, so all its ranks stop: {said}")
    return result
