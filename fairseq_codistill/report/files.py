"""Which files are which method's, and reading them:

    METHOD/seed1/peer0/train.log                the log of one peer; `seed1` and `peer0` may each be left out
    METHOD/seed1/peer0/test.sacrebleu.json      what the `sacrebleu` command printed for that peer
    METHOD/seed1/ensemble.test.sacrebleu.json   the same for the ensemble of the run's peers
    METHOD/seed1/peer0/test.hyp, test.ref       what was scored, and the reference, for --baseline

A log under any other name than train.log is a method of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from ..common.paths import expanded, printable
from .log import TrainLog
from .notes import some
from .summary import Method, Peer, Run, Score

T = TypeVar("T")


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


def find_logs(path: Path, unreadable: Callable[[OSError], None]) -> list[Place]:
    """The logs at or below `path`; beside peer*/train.log a train.log of the run itself is no peer's."""
    folders = [] if path.is_file() else os.walk(path, onerror=unreadable)
    logs = [Path(at, "train.log") for at, *names in folders if "train.log" in itertools.chain(*names)]
    places = [locate(path)] if path.is_file() else [locate(log) for log in sorted(logs, key=natural)]
    with_peers = {place.run for place in places if place.peer}
    places = [place for place in places if place.peer or place.run not in with_peers]
    if not places:
        raise ReportError(
            f"RUN must have a train.log in or below it, as codistill-launch writes it, but {path} has none; name the log "
            f"itself if plain fairseq-train wrote it: {_example(path)}"
        )
    return places


def _example(folder: Path) -> str:
    """How a log that is no train.log is named, with the one that may be meant."""
    logs = sorted(log for log in folder.glob("*.log") if log.is_file())
    return f"{folder.name}={logs[0]}" if logs else "LS=base.log, from fairseq-train --log-format json --log-file base.log"


def check_path(path: Path) -> None:
    if not path.exists():
        raise ReportError(f"RUN must be a train.log or a folder with one in or below it, but {path} does not exist.")
    if not (path.is_file() or path.is_dir()):
        raise ReportError(f"RUN must be a file or a folder, but {path} is a pipe or a device; copy it into a file first.")


def split_label(argument: str) -> tuple[str, Path]:
    """LABEL=PATH -> (LABEL, PATH); a path that exists is a path, whatever its name."""
    label, equals, path = argument.partition("=")
    if (argument and not equals) or os.path.exists(argument):
        return "", Path(os.path.abspath(expanded(argument)))
    if not label.strip() or not path:
        raise ReportError(f"RUN must be PATH or LABEL=PATH, but is {argument!r} instead.")
    return label.strip(), Path(os.path.abspath(expanded(path)))


def group(arguments: Sequence[str], into: Found) -> dict[str, list[Place]]:
    """label -> the logs of that method, in the order of the arguments.

    One folder reached by two arguments (METHOD/seed1 METHOD/seed2, or a root and a method in it) is one method. A log
    that a LABEL= names is not shown a second time under its folder's name. A folder without a log is told `into`.
    """
    named = [split_label(argument) for argument in arguments]
    for _, path in named:
        check_path(path)
    found = [(label, path, into.read(lambda path: find_logs(path, into.cannot_read), path) or []) for label, path in named]
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


@dataclass
class Found:
    """What the RUN arguments name, and what of it cannot be shown."""

    methods: list[Method] = field(default_factory=list)
    silent: list[Path] = field(default_factory=list)  # logs that say nothing yet
    broken: dict[Path, str] = field(default_factory=dict)  # file -> why it cannot be used, in one sentence

    def read(self, reader: Callable[[Path], T], file: Path) -> T | None:
        """`reader(file)`; where that fails, None: one broken file must not cost the others."""
        try:
            return reader(file)
        except ReportError as error:
            self.broken.setdefault(file, str(error))
        except OSError as error:
            self.cannot_read(error, file)
        return None

    def cannot_read(self, error: OSError, file: Path | None = None) -> None:
        """`file`: for an error that comes while reading, and so names none."""
        at = Path(file or error.filename)
        self.broken[at] = f"{at} cannot be read: {error.strerror}."

    def load(self, label: str, places: Sequence[Place]) -> None:
        """Add the method whose logs these are."""
        runs: dict[Path, Run] = {}
        for place in sorted(places, key=lambda place: natural(place.log)):
            log = self.read(load_log, place.log)
            if log is None:
                self.silent += [place.log] if place.log not in self.broken else []
                continue
            folder = place.log.parent if place.log.name == "train.log" else place.run
            if place.run not in runs:
                runs[place.run] = Run(printable(place.seed), [], self.scores(place.run, ensemble=True))
            runs[place.run].peers.append(Peer(place.peer, place.log, log, self.scores(folder)))
        for folder, run in runs.items():
            run.name = run.name or (printable(folder.name) if len(runs) > 1 else "")
        self.methods += [Method(printable(label), list(runs.values()))] if runs else []

    def scores(self, folder: Path, ensemble: bool = False) -> list[Score]:
        """Every NAME.sacrebleu.json in `folder`, or every ensemble.NAME.sacrebleu.json."""
        files = sorted(folder.glob("*.sacrebleu.json"), key=natural) if folder.is_dir() else []
        wanted = [file for file in files if file.name.startswith("ensemble.") == ensemble]
        return [score for file in wanted for score in self.read(read_scores, file) or ()]


def load(arguments: Sequence[str]) -> Found:
    """Everything that the RUN arguments name. Raises ReportError if none of it can be shown."""
    found = Found()
    groups = group(arguments, found)
    for label, places in groups.items():
        found.load(label, places)
    if found.methods:
        return found
    if found.broken:
        first, *others = found.broken.values()
        raise ReportError(f"{first} (And {len(others)} more such.)" if others else first)
    raise ReportError(
        f"RUN must have a train.log with fairseq's JSON lines, but {some(list(map(str, found.silent)))} has none yet; "
        "has the training failed, or only just begun?"
    )


def open_regular(file: Path, mode: str = "r") -> IO[Any]:
    """The open file; ReportError for what is none, such as a pipe, whose reader would wait for ever."""
    if file.exists() and not file.is_file():
        raise ReportError(f"{file} must be a file, but is {'a folder' if file.is_dir() else 'a pipe or a device'}.")
    return open(file, mode, encoding=None if "b" in mode else "utf-8", errors=None if "b" in mode else "replace")


def load_log(file: Path) -> TrainLog | None:
    """None for a log that says nothing yet: its process has just started, or died before its first line."""
    with open_regular(file) as lines:
        # What is no text may have no ends of lines.
        log = TrainLog.read(iter(lambda: lines.readline(1_000_000), ""))
    if any(log.records.values()):
        return log
    is_json = log.settings.get("log_format") == "json"
    if not log.last_line or (is_json and not log.failed):
        return None
    raise ReportError(_why_no_records(file, log))


def _why_no_records(file: Path, log: TrainLog) -> str:
    with open_regular(file, "rb") as start:
        is_text = b"\0" not in start.read(4096)
    last = printable(log.last_line[:300])
    if not is_text:
        return f"{file} must hold fairseq's JSON lines, but is no text; is it compressed?"
    if log.failed:
        return f"{file} has nothing to show, for the training failed before its first loss: {last}"
    told = "" if log.settings else f" Its last line: {last}"  # the log of something else, or of a start that failed
    return f"{file} must hold fairseq's JSON lines, but has none; did you forget --log-format json?{told}"


def read_scores(file: Path) -> list[Score]:
    """What the sacrebleu command has written."""
    test = file.name[: -len(".sacrebleu.json")]
    test = test[len("ensemble.") :] if test.startswith("ensemble.") else test
    try:
        with open_regular(file) as text:
            loaded = json.load(text)
        entries = loaded if isinstance(loaded, list) else [loaded]  # sacrebleu -m bleu chrf prints a list
        return [Score(test, str(e["name"]), float(e["score"]), str(e["signature"]), file) for e in entries]
    except ReportError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ReportError(
            f"{file} must hold the JSON that sacrebleu prints (name, score, signature), but does not "
            f"({type(error).__name__}: {error}); was the scoring interrupted?"
        ) from None
