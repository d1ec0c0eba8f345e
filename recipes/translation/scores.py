"""All scores of a run side by side: every peer, their mean, and their ensemble."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Dict, List, Optional

KINDS = ("sacrebleu", "nll")


def read(run: Path) -> Dict[str, Dict[str, dict]]:
    """``{"test BLEU": {"peer0": {...}, "ensemble": {...}}}`` from the files that evaluate.py has left."""
    found: Dict[str, Dict[str, dict]] = {}
    for kind in KINDS:
        for path in sorted(run.glob(f"**/*.{kind}.json")):
            name = path.name[: -len(f".{kind}.json")]
            who = path.parent.name if re.fullmatch(r"peer\d+", path.parent.name) else "ensemble"
            score = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(f"{name.replace('ensemble.', '', 1)} {score['name']}", {})[who] = score
    return found


def table(run: Path) -> str:
    """A markdown table and, below it, every signature that occurs."""
    rows = read(run)
    peers = sorted({who for row in rows.values() for who in row} - {"ensemble"}, key=lambda name: int(name[4:]))
    columns = ["score", *peers] + (["mean", "ensemble"] if len(peers) > 1 else [])
    lines = [_line(columns), "|---|" + "---:|" * (len(columns) - 1)]
    for name, row in sorted(rows.items()):
        values: List[Optional[float]] = [row[peer]["score"] if peer in row else None for peer in peers]
        if len(peers) > 1:
            values += [_mean(values), row["ensemble"]["score"] if "ensemble" in row else None]
        digits = 3 if name.endswith("NLL") else 2
        lines.append(_line([name, *("–" if value is None else f"{value:.{digits}f}" for value in values)]))
    return "\n".join([*lines, "", *_signatures(rows)])


def _line(cells: List[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _mean(values: List[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _signatures(rows: Dict[str, Dict[str, dict]]) -> List[str]:
    names: Dict[str, List[str]] = {}
    for name, row in sorted(rows.items()):
        for score in row.values():
            if "signature" in score and name not in names.setdefault(score["signature"], []):
                names[score["signature"]].append(name)
    return [f"{', '.join(found)}: {signature}" for signature, found in names.items()]
