"""Which files are which method's, and reading them:

    METHOD/seed1/peer0/train.log                the log of one peer; `seed1` and `peer0` may each be left out
    METHOD/seed1/peer0/test.sacrebleu.json      what the `sacrebleu` command printed for that peer
    METHOD/seed1/ensemble.test.sacrebleu.json   the same for the ensemble of the run's peers

A log under any other name than train.log is a method of its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .report_log import TrainLog
from .report_notes import some
from .report_summary import Method, Peer, Run, Score


class ReportError(ValueError):
    """Something the user can mend, in one sentence."""


class Place(NamedTuple):
    """Where a log stands in METHOD/seedN/peerN."""

    log: Path
    peer: str
    run: Path
    seed: str
    method: Path


def natural(path: Path) -> list[Any]:
    """peer10 after peer9."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", str(path))]


def locate(log: Path) -> Place:
    if log.name != "train.log":  # a log under a name of its own is a method of its own
        own = log.with_suffix("")
        return Place(log, "", own, "", own)
    folder = log.parent
    peer, run = (folder.name, folder.parent) if re.fullmatch(r"peer\d+", folder.name) else ("", folder)
    seed, method = (run.name, run.parent) if re.fullmatch(r"seed[-_]?\d+", run.name) else ("", run)
    return Place(log, peer, run, seed, method)


def find_logs(path: Path) -> list[Place]:
    """The logs at or below `path`; beside peer*/train.log a train.log of the run itself is no peer's."""
    if not path.exists():
        raise ReportError(f"RUN must be a train.log or a folder with one in or below it, but {path} does not exist.")
    places = [locate(path)] if path.is_file() else [locate(log) for log in sorted(path.rglob("train.log"), key=natural)]
    with_peers = {place.run for place in places if place.peer}
    places = [place for place in places if place.peer or place.run not in with_peers]
    if not places:
        raise ReportError(
            f"RUN must have a train.log in or below it, but {path} has none; did you forget to train with "
            "codistill-launch, which writes it?"
        )
    return places


def split_label(argument: str) -> tuple[str, Path]:
    """LABEL=PATH -> (LABEL, PATH); a path that exists is a path, whatever its name."""
    label, equals, path = argument.partition("=")
    if not equals or os.path.exists(argument):
        return "", Path(os.path.abspath(argument))
    if not label.strip() or not path:
        raise ReportError(f"RUN must be PATH or LABEL=PATH, but is {argument!r} instead.")
    return label.strip(), Path(os.path.abspath(path))


def group(arguments: Sequence[str]) -> dict[str, list[Place]]:
    """label -> the logs of that method, in the order of the arguments.

    One folder reached by two arguments (METHOD/seed1 METHOD/seed2, or a root and a method in it) is one method. A log
    that a LABEL= names is not shown a second time under its folder's name.
    """
    found = [(label, path, find_logs(path)) for label, path in map(split_label, arguments)]
    labelled = {place.log for label, _, places in found for place in places if label}
    groups: dict[Any, tuple[str, dict[Place, None]]] = {}  # LABEL or method's folder -> name in the table, logs
    for label, path, places in found:
        several = len({place.method for place in places}) > 1
        for place in places:
            if label or place.log not in labelled:
                below = str(place.method.relative_to(path)) if path in place.method.parents else place.method.name
                name = below if not label else f"{label}/{below}" if several else label
                groups.setdefault(name if label else place.method, (name, {}))[1][place] = None
    return {_unique(identity, groups): list(places) for identity, (_, places) in groups.items()}


def _unique(identity: Any, groups: dict[Any, tuple[str, dict[Place, None]]]) -> str:
    """Two folders of one name are two methods, told apart by the folders above."""
    name = groups[identity][0]
    namesakes = [other for other, (its_name, _) in groups.items() if its_name == name and isinstance(other, Path)]
    if isinstance(identity, str) or (len(namesakes) == 1 and name not in groups):
        return name
    return os.path.relpath(identity, os.path.commonpath([path.parent.parent for path in namesakes]))


def load_methods(arguments: Sequence[str]) -> tuple[list[Method], list[Path]]:
    """Everything that the RUN arguments name, and the logs that say nothing yet."""
    found = [load_method(label, places) for label, places in group(arguments).items()]
    methods = [method for method, _ in found if method.runs]
    silent = [path for _, paths in found for path in paths]
    if not methods:
        raise ReportError(
            f"RUN must have a train.log with fairseq's JSON lines, but {some(list(map(str, silent)))} has none yet; "
            "has the training failed, or only just begun?"
        )
    return methods, silent


def load_method(label: str, places: Sequence[Place]) -> tuple[Method, list[Path]]:
    """The method, and those of its logs that say nothing yet."""
    runs: dict[Path, Run] = {}
    silent = []
    for place in sorted(places, key=lambda place: natural(place.log)):
        log = load_log(place.log)
        if log is None:
            silent.append(place.log)
            continue
        folder = place.log.parent if place.log.name == "train.log" else place.run
        run = runs.setdefault(place.run, Run(place.seed, [], read_scores(place.run, ensemble=True)))
        run.peers.append(Peer(place.peer, place.log, log, read_scores(folder)))
    for folder, run in runs.items():
        run.name = run.name or (folder.name if len(runs) > 1 else "")
    return Method(label, list(runs.values())), silent


def load_log(file: Path) -> TrainLog | None:
    """None for a log that says nothing yet: its process has just started, or died before its first line."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        log = TrainLog.read(lines)
    if any(log.records.values()):
        return log
    if log.blank or log.settings.get("log_format") == "json":
        return None
    raise ReportError(f"{file} must hold fairseq's JSON lines, but has none; did you forget --log-format json?")


def read_scores(folder: Path, ensemble: bool = False) -> list[Score]:
    """Every NAME.sacrebleu.json in `folder`, or every ensemble.NAME.sacrebleu.json."""
    files = sorted(folder.glob("*.sacrebleu.json"), key=natural) if folder.is_dir() else []
    return [score for file in files if file.name.startswith("ensemble.") == ensemble for score in _scores_in(file)]


def _scores_in(file: Path) -> list[Score]:
    test = file.name[: -len(".sacrebleu.json")]
    test = test[len("ensemble.") :] if test.startswith("ensemble.") else test
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
        entries = loaded if isinstance(loaded, list) else [loaded]  # sacrebleu -m bleu chrf prints a list
        return [Score(test, str(e["name"]), float(e["score"]), str(e["signature"]), file) for e in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ReportError(
            f"{file} must hold the JSON that sacrebleu prints (name, score, signature), but does not "
            f"({type(error).__name__}: {error}); was the scoring interrupted?"
        ) from None
