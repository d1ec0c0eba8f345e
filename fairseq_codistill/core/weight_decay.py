"""Sets the weight decay of an optimizer while it trains (Sodhani et al., §3.2), on those parameters that have any."""

from __future__ import annotations

from typing import Any, Dict, List

_HAS_DECAY = "codistill_weight_decay"  # marks a group of parameters, and is saved with it in a checkpoint


def set_weight_decay(groups: List[Dict[str, Any]], value: float) -> bool:
    """Set it to `value` in those of an optimizer's `param_groups` that have weight decay; whether there is such a group."""
    decayed = _decayed(groups)
    for group in decayed:
        group["weight_decay"] = value
    return bool(decayed)


def _decayed(groups: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """The groups that have weight decay: the only one; of several, those not marked `decays: False`; where none is marked,
    those that had some, even if theirs is 0 now."""
    if len(groups) == 1 or any("decays" in group for group in groups):
        return [group for group in groups if group.get("decays", True)]
    for group in groups:
        if group.get("weight_decay"):
            group[_HAS_DECAY] = True
    return [group for group in groups if group.get(_HAS_DECAY)]
