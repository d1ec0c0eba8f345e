"""`--codistill-init shared`: all peers begin with the weights of peer 0, as they travelled."""

from __future__ import annotations

import logging
from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..exchange.exchange import Exchange
from ..exchange.manifest import Manifest, plain
from ..exchange.snapshot import Weights, tensors_of
from .barrier import Barrier
from .pull import Masters, broadcast, parameters_of

logger = logging.getLogger(__name__)

Found = List[Tuple[Manifest, Weights]]  # one, or none


def first_of_peer_0(barrier: Barrier, read: Callable[[], Found], where: str, seconds: float) -> Optional[Weights]:
    """What every peer begins with, on rank 0, and None on other ranks: what `read` finds, within `seconds`.

    Raises ValueError, on every rank, where none comes."""
    found: Found = []
    reason: List[str] = []

    def ready() -> bool:
        try:
            found.extend(read())
        except Exception as error:
            reason[:] = [f" (the last look: {plain(str(error))})"]
        return bool(found)

    if not barrier.until(ready, seconds):
        raise ValueError(
            f"codistill_init shared needs the first snapshot of peer 0, but none has come to {where} within "
            f"{seconds:g} s{''.join(reason)}; does peer 0 run, and see this directory? --codistill-wait sets the time."
        )
    if not found:
        return None
    logger.info(f"codistillation: begins with the weights of peer 0 as of its update {found[0][0].update}")
    return found[0][1]


def read_first(exchange: Exchange, fingerprint: str, expected: Dict[str, Tensor]) -> Found:
    """The first snapshot of peer 0, or its newest where that is gone."""
    manifest = exchange.at(0, 0) or exchange.newest(0)
    weights = exchange.fetch(0, manifest, fingerprint, expected) if manifest is not None else None
    return [] if manifest is None or weights is None else [(manifest, weights)]


def begin_with(model: nn.Module, weights: Optional[Weights], masters: Masters) -> None:
    """Give `model` the tensors `weights`, which rank 0 alone has; and the optimizer, too."""
    wide_copies, parameters = masters(), parameters_of(model)
    for name, tensor in tensors_of(model).items():
        value = torch.empty_like(tensor) if weights is None else weights[name].to(tensor.device, tensor.dtype)
        value = value.contiguous()
        broadcast(value)
        tensor.copy_(value)
        if name in parameters and id(parameters[name]) in wide_copies:
            wide_copies[id(parameters[name])].copy_(value)
