"""What a snapshot's manifest says of the model: its class and settings."""

from __future__ import annotations

import contextlib
import math
from typing import Any, Dict

_LONGEST_TEXT = 500  # characters of one setting; a manifest that is too long is not read


def model_facts(model: Any) -> Dict[str, Any]:
    """For the manifest, so that a person or a later version can tell what the weights belong to: class and settings.

    They are decoration: what cannot be read, or is no plain value, is left out."""
    plain: Dict[str, Any] = {"class": type(model).__name__}
    with contextlib.suppress(Exception):
        settings = getattr(model, "cfg", None) or getattr(model, "args", None) or {}
        for name in list(settings if hasattr(settings, "keys") else vars(settings)):
            with contextlib.suppress(Exception):  # omegaconf raises for a value that is missing
                value = settings[name] if hasattr(settings, "keys") else getattr(settings, name)
                if _is_plain(value):
                    plain[str(name)] = value
    return plain


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)
