"""Files of runs: what a sweep trains, and with which seeds. As TOML, one line for each run:

    [all]                                  # settings of every run, unless its own line says otherwise
    cpu = 1

    [runs]
    single = { method = "single" }
    rdrop_2 = { method = "rdrop", rdrop_alpha = 2, seeds = [1, 2] }    # for these seeds only

As text, in a file with another ending: a name and variables, ``rdrop_2 METHOD=rdrop RDROP_ALPHA=2 SEEDS=1,2``; a line that is
named ``*`` is no run: its variables are those of every run below it.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, Sequence, Tuple

from .tasks import Task, as_text, read_toml, variables_of


@dataclass(frozen=True)
class Run:
    """One line of the runs file with one seed."""

    name: str
    seed: int
    variables: Tuple[str, ...]  # NAME=VALUE, as train.sh knows them; of two values the later counts

    def folder(self, out: Path) -> Path:
        return out / self.name / f"seed{self.seed}"

    @property
    def own(self) -> Dict[str, str]:
        return dict(variable.split("=", 1) for variable in self.variables)

    @property
    def jobs(self) -> int:
        """How many trainings it is: its peers, if they codistil."""
        own = self.own
        return int(own.get("PEERS", 2)) if own.get("METHOD", "codistill") == "codistill" else 1

    def environment(self, data: Path, out: Path) -> Dict[str, str]:
        return {**os.environ, **self.own, "NAME": self.name, "SEED": str(self.seed), "DATA": str(data), "OUT": str(out)}


def find(recipe: Path, path: object) -> Path:
    """The file of runs: ``path``, or the recipe's runs.toml or runs.txt. NAME.txt may have become NAME.toml meanwhile."""
    wanted = Path(str(path)) if path else recipe / "runs.toml"
    for found in (wanted, wanted.with_suffix(".toml" if path else ".txt")):
        if found.is_file():
            return found
    raise ValueError(f"--runs must be a file of runs, but {wanted} is not there")


def read_runs(path: Path, task: Task, seeds: Sequence[int], only: Sequence[str]) -> List[Run]:
    """The runs of a file, all with the first seed before any with the second.

    Raises ``ValueError`` for a line that is none, a setting that ``task`` does not have, a name that is not there.
    """
    lines = _of_toml(path, task) if path.suffix == ".toml" else _of_text(path, task)
    if unknown := set(only) - set(lines):
        raise ValueError(f"--only must name runs of {path} ({', '.join(lines)}), but has {', '.join(sorted(unknown))}")
    chosen = [name for name in lines if not only or name in only]
    return [run for seed in seeds for name in chosen for run in _with_seed(name, seed, lines[name])]


def _of_toml(path: Path, task: Task) -> Dict[str, List[str]]:
    table = read_toml(path)
    if set(table) - {"all", "runs"} or not isinstance(table.get("runs"), dict):
        raise ValueError(f"{path} must have a table [runs], and may have [all], but has {', '.join(table) or 'nothing'}")
    of_all = _words(path, "all", table.get("all", {}), task)
    for name in table["runs"]:
        if not name or "/" in name:
            raise ValueError(f"{path}: a run must have a name without /, but one is called '{name}'")
    return {name: of_all + _words(path, name, settings, task) for name, settings in table["runs"].items()}


def _words(path: Path, name: str, settings: object, task: Task) -> List[str]:
    if not isinstance(settings, Mapping):
        raise ValueError(f'{path}: {name} must be a table of settings, such as {{ method = "single" }}, but is {settings!r}')
    known, words = variables_of(task), []
    for setting, value in settings.items():
        if setting == "seeds" and isinstance(value, list):
            words.append(f"SEEDS={','.join(map(str, value))}")
        elif setting != setting.lower() or setting.upper() not in known:
            raise ValueError(f"{path}: {setting} of {name} must be a setting of recipes/{task.name}/task.toml, but is none")
        else:
            words.append(f"{setting.upper()}={as_text(value, f'{path}: {setting} of {name}')}")
    return words


def _of_text(path: Path, task: Task) -> Dict[str, List[str]]:
    """Quotes are as in a shell."""
    known = variables_of(task) | {"SEEDS"}
    lines: Dict[str, List[str]] = {}
    of_all: List[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        for word in words[1:]:
            variable, equals, _ = word.partition("=")
            if not equals or variable not in known:
                raise ValueError(f"{path}:{number}: {word} must be VARIABLE=VALUE with a variable that train.sh reads")
        if words[0] == "*":
            of_all += words[1:]
            continue
        if words[0] in lines or "=" in words[0] or "/" in words[0]:
            raise ValueError(f"{path}:{number}: must begin with a new name, but begins with {words[0]}")
        lines[words[0]] = of_all + words[1:]
    return lines


def _with_seed(name: str, seed: int, words: Sequence[str]) -> Iterator[Run]:
    limits = [word.split("=", 1)[1] for word in words if word.startswith("SEEDS=")]
    if not limits or str(seed) in limits[-1].split(","):
        yield Run(name, seed, tuple(word for word in words if not word.startswith("SEEDS=")))
