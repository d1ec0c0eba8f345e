"""The lines that fairseq logs with --log-format json: records of losses, and the config when a process starts.

fairseq-train and fairseq-hydra-train write the same records behind other words, so those words are not looked at:

    2026-01-01 00:00:00 | INFO | valid | {"epoch": 1, "valid_loss": "4.7", "valid_ppl": "26", "valid_num_updates": "50"}
    [2026-01-01 00:00:00,123][train_inner][INFO] - {"epoch": 1, "update": 0.5, "loss": "7.1", "num_updates": "25"}
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

Values = dict[str, float]  # name -> number

# A record is flat, so a body without inner braces also finds the whole record behind one that was torn by a kill.
RECORD = re.compile(r'\{"epoch"[^{}]*\}')
_EXCHANGE = re.compile(r"codistillation: exchange totals (\{[^{}]*\})")
_UPDATE = "num_updates"
_SETTINGS = (
    "seed", "max_update", "valid_subset", "log_format", "required_batch_size_multiple",
    "best_checkpoint_metric", "maximize_best_checkpoint_metric",
)  # fmt: skip
_NLL_METRICS = ("loss", "nll_loss", "ppl")


class Record(NamedTuple):
    """One JSON object of a log. Losses are base 2, as fairseq logs them."""

    tag: str  # train_inner (each --log-interval), train (the end of an epoch), or the name of a validation subset
    epoch: int
    update: int
    values: Values  # under their names without the tag


def parse_records(line: str) -> list[Record]:
    """The records in a line. A broken one, or one that does not tell its update, is passed over."""
    return [record for record in map(_parse_record, RECORD.findall(line)) if record]


def _parse_record(body: str) -> Record | None:
    try:
        raw = json.loads(body)
    except ValueError:
        return None
    # The names in a record begin with its tag, those of train_inner with nothing: valid_num_updates, num_updates.
    key = next((name for name in raw if name.endswith(_UPDATE)), _UPDATE)
    prefix = key[: -len(_UPDATE)]
    update, epoch = as_float(raw.get(key)), as_float(raw["epoch"])
    if update is None or epoch is None or not math.isfinite(update + epoch):
        return None
    numbers = {name[len(prefix) :]: as_float(value) for name, value in raw.items() if name.startswith(prefix)}
    values = {name: value for name, value in numbers.items() if value is not None}
    return Record(prefix[:-1] or "train_inner", int(epoch), int(update), values)


def parse_exchange(line: str) -> Values:
    """What a codistilling process has exchanged, from the line that it logs when it ends; {} for any other line."""
    found = _EXCHANGE.search(line)
    try:
        raw = json.loads(found[1]) if found else {}
    except ValueError:
        return {}
    return {name: float(value) for name, value in raw.items() if isinstance(value, (int, float))}


def as_float(value: Any) -> float | None:
    """fairseq logs numbers as strings; None for what is no number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def nll(values: Values) -> float | None:
    """cross_entropy logs no nll_loss, because its loss is the NLL."""
    return values.get("nll_loss", values.get("loss"))


def choosing_metric(settings: dict[str, str]) -> str:
    """What chooses checkpoint_best.pt where that is no NLL (bleu, top1), as the valid lines name it; else ""."""
    metric = settings.get("best_checkpoint_metric", "loss")
    return "" if metric in _NLL_METRICS else metric


def is_maximised(settings: dict[str, str]) -> bool:
    return settings.get("maximize_best_checkpoint_metric") == "True"


def parse_settings(config: str) -> dict[str, str]:
    """The settings that matter here, from the line in which fairseq logs its config; {} for any other line.

    The line is a dict's repr with Namespaces inside: neither JSON nor a Python literal, hence the patterns.
    """
    criterion = re.search(r"'criterion': \{([^}]*)", config)
    if not criterion:
        return {}
    places = {"_name": criterion[1], "rdrop_alpha": criterion[1], **dict.fromkeys(_SETTINGS, config)}
    found = {name: re.search(rf"'{name}': '?([^',}}]*)", text) for name, text in places.items()}
    return {"criterion" if name == "_name" else name: match[1] for name, match in found.items() if match}
