"""What a recipe is: settings and methods in TOML files, and what stands above them."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Set

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
FILE = "recipe.toml"
OFF = "-"  # the value of a setting that is not passed


@dataclass(frozen=True)
class Task:
    """What the recipes of one kind share; ``defaults`` has every setting that there is."""

    name: str
    defaults: Mapping[str, str]
    when: Sequence[Mapping[str, Any]]
    methods: Mapping[str, Mapping[str, Any]]
    command: Mapping[str, Sequence[Any]]
    sweep: Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A folder with a recipe.toml; ``evaluate`` has the settings that only scoring knows."""

    folder: Path
    task: Task
    settings: Mapping[str, str]
    evaluate: Mapping[str, str]

    @property
    def root(self) -> Path:
        """The repository, by the path by which the recipe was named."""
        above = Path(os.path.abspath(self.folder)).parents
        return above[1] if len(above) > 1 and (above[1] / "fairseq_codistill").is_dir() else ROOT


def read_toml(path: Path) -> Dict[str, Any]:
    """The tables of a file. A number with a fraction or an exponent stays as it is written: 3e-3 is "3e-3"."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file, parse_float=str)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} must be TOML, but is not: {error}") from error


@functools.cache
def read_task(name: str) -> Task:
    """``recipes/NAME/task.toml``; ``ValueError`` if there is no such task."""
    path = ROOT / "recipes" / name / "task.toml"
    if not path.is_file():
        known = sorted(file.parent.name for file in ROOT.glob("recipes/*/task.toml"))
        raise ValueError(f"task must be {' or '.join(known)}, but is {name} instead")
    table = read_toml(path)
    defaults = texts(table["defaults"], path, None)
    return Task(name, defaults, table.get("when", []), table["methods"], table["command"], table["sweep"])


def read_recipe(folder: Path) -> Recipe:
    """Raises ``ValueError`` for a folder that is no recipe, or a setting that its task does not know."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"a recipe must be a folder with a {FILE}, such as recipes/multi30k_en_de, but {folder} has none")
    table = read_toml(path)
    task = read_task(str(table.get("task")))
    settings = texts(table.get("settings", {}), path, set(task.defaults))
    return Recipe(folder, task, settings, texts(table.get("evaluate", {}), path, None))


def texts(table: Mapping[str, Any], path: Path, known: object) -> Dict[str, str]:
    """Settings as the text that stands in a command. ``known``: names that there are, or None for any."""
    if isinstance(known, set):
        for name in table:
            if name not in known:
                raise ValueError(f"{path}: {name} must be a setting of the recipe's task.toml, but is none")
    return {name: as_text(value, f"{path}: {name}") for name, value in table.items()}


def as_text(value: object, what: str) -> str:
    """A value of a TOML file; ``true`` is 1 and ``false`` means that the option is not passed."""
    if isinstance(value, bool):
        return "1" if value else OFF
    if isinstance(value, (str, int)):
        return str(value)
    raise ValueError(f"{what} must be a text, a number, true or false, but is {value!r} instead")


def variables_of(task: Task) -> Set[str]:
    """The settings as the environment and files of runs name them, less what a sweep sets itself."""
    return {name.upper() for name in task.defaults} - {"NAME", "SEED", "DATA", "OUT"}


def from_environment(task: Task, environ: Mapping[str, str]) -> Dict[str, str]:
    """The settings that ``environ`` has, each under its name in capitals; an empty one counts as not set."""
    return {name: environ[name.upper()] for name in task.defaults if environ.get(name.upper())}


def from_words(task: Task, words: Sequence[str]) -> Dict[str, str]:
    """Settings given as NAME=VALUE; ``ValueError`` for a word that is none."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name.lower() not in task.defaults:
            raise ValueError(f"{word} must be NAME=VALUE with a setting of recipes/{task.name}/task.toml, as METHOD=single")
        if value:  # an empty one counts as not set, as in the environment
            found[name.lower()] = value
    return found


def resolve(task: Task, *layers: Mapping[str, str]) -> Dict[str, str]:
    """The value of every setting, from defaults and ``layers``, the later of which stand above the earlier."""
    given: Dict[str, str] = {}
    for layer in layers:
        given.update(layer)
    values = {**task.defaults, **given}
    open_names: List[str] = [name for name in task.defaults if name not in given]
    for rule in task.when:
        if all(fnmatchcase(values[name], pattern) for name, pattern in rule.items() if name != "defaults"):
            filled = {name: as_text(value, name) for name, value in rule["defaults"].items() if name in open_names}
            values.update(filled)
            break
    for name in open_names:  # a default may be another setting's value
        if values[name].startswith("{"):
            values[name] = values[values[name][1:-1]]
    return {name: "" if value == OFF else value for name, value in values.items()}
