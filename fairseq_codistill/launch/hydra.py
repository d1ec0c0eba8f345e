"""What a `fairseq-hydra-train` command leaves to its YAML: read before the start, without fairseq (nor torch).

Hydra itself composes the configuration, so that defaults lists and groups of files mean what they mean to it. What fairseq
registers from Python (tasks, models, criteria) is not there; each such choice stands as `{"_name": choice}`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Optional

_HERE = re.compile(r"\$\{hydra[:.]runtime\.cwd\}")  # hydra's name for the folder in which it was started
_CHOICE = re.compile(r"\+?[\w/@]+=[\w/.-]+$")  # task=translation: takes one YAML (or class) of a group
_MOST_CHOICES = 100


class HydraConfig:
    """The composed YAML of a hydra command, from the words after the program; read when it is first asked for."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)

    @cached_property
    def tree(self) -> Any:
        """An omegaconf DictConfig. Raises ValueError in one sentence where hydra would find no YAML or cannot read it."""
        parser = argparse.ArgumentParser(add_help=False)
        for option in ("name", "dir", "path"):
            parser.add_argument(f"--config-{option}", f"-c{option[0]}")
        found, _ = parser.parse_known_args(self.words)
        return _compose(found.config_name or "config", _folders(found.config_path, found.config_dir), self._choices())

    def _choices(self) -> list[str]:
        return [word for word in self.words if _CHOICE.match(word) and "." not in word.partition("=")[0]]

    def value(self, key: str) -> Optional[str]:
        """A value as text, interpolations resolved where that is possible before the start; None where there is none."""
        return _select(self.tree, key) if _is_installed() else None

    def resolve(self, key: str, text: str) -> Optional[str]:
        """As `value`, if the command line gave this text for the key."""
        return _select(_with(self.tree, key, text), key) if _is_installed() else text

    def raw(self, key: str) -> Optional[str]:
        """A value as it is written, with its interpolations."""
        return _raw(self.tree, key) if _is_installed() else None


def _is_installed() -> bool:
    """The launcher may live in another environment than the command; then the YAML is left to the command."""
    return all(importlib.util.find_spec(name) for name in ("hydra", "omegaconf"))


def _select(tree: Any, key: str) -> Optional[str]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    written = _raw(tree, key)
    if written is not None and _HERE.search(written):
        tree = _with(tree, key, _HERE.sub(lambda _: os.getcwd(), written))
    try:
        found = OmegaConf.select(tree, key)
    except (OmegaConfBaseException, ValueError):  # what only the started job knows, as ${hydra:run.dir}
        return written
    return None if found is None or found == "???" else _text(found)


def _raw(tree: Any, key: str) -> Optional[str]:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(tree, resolve=False)
    for name in key.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return None if found is None else _text(found)


def _with(tree: Any, key: str, text: str) -> Any:
    from omegaconf import OmegaConf

    tree = copy.deepcopy(tree)
    OmegaConf.set_struct(tree, False)
    OmegaConf.update(tree, key, text, merge=True)
    return tree


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _folders(config_path: Optional[str], config_dir: Optional[str]) -> list[str]:
    """Where hydra looks for YAML: in fairseq's own folder (or --config-path), then in --config-dir."""
    spec = importlib.util.find_spec("fairseq")  # imports nothing
    packages = os.path.dirname(next(iter(spec.submodule_search_locations or []), "")) if spec else ""
    # Hydra reads --config-path from the folder of the program's file.
    folders = [os.path.join(packages, "fairseq_cli", config_path or os.path.join("..", "fairseq", "config"))]
    if config_dir is not None:
        if "://" not in config_dir and not os.path.isdir(config_dir):
            raise ValueError(f"--config-dir must be a folder with YAML files, but {config_dir!r} is none.")
        folders.append(config_dir)
    return [folder if "://" in folder else os.path.abspath(folder) for folder in folders]


def _compose(name: str, folders: Sequence[str], choices: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    path = _find(name, folders)
    error: Optional[Exception] = None
    # A choice that only fairseq's own classes allow does not make the YAML unreadable; hydra 1.0 takes no further folder.
    for overrides, places in ((choices, folders), ([], folders), (choices, [os.path.dirname(path)])):
        try:
            return _composed_by_hydra(name, places, list(overrides))
        except Exception as failure:  # hydra's many kinds
            error = failure
    try:  # another hydra than is known here: the file alone, without its defaults list
        tree = OmegaConf.load(path)
        OmegaConf.to_container(tree, resolve=False)
    except Exception as failure:
        raise ValueError(f"--config-name must name a YAML that can be read, but {path} cannot be: {_line(failure)}") from error
    return tree


def _find(name: str, folders: Sequence[str]) -> str:
    for folder in folders:
        path = os.path.join(folder.partition("://")[2] or folder, name if name.endswith((".yaml", ".yml")) else name + ".yaml")
        if os.path.isfile(path) or "://" in folder:
            return path
    raise ValueError(
        f"--config-name must name a YAML of --config-dir, but there is no {name}.yaml in {' or '.join(folders)};"
        " did you forget --config-dir?"
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _composed_by_hydra(name: str, folders: Sequence[str], overrides: list[str]) -> Any:
    try:
        from hydra import compose, initialize_config_dir
    except ImportError:  # hydra 1.0, of stock fairseq
        from hydra.experimental import compose, initialize_config_dir  # type: ignore[assignment]
    from hydra.errors import MissingConfigException

    # Hydra looks for the first YAML in one folder alone.
    main = next((folder for folder in folders if os.path.isfile(os.path.join(folder, name + ".yaml"))), folders[0])
    more = [folder if "://" in folder else f"file://{folder}" for folder in folders if folder != main]
    search = ["hydra.searchpath=[" + ",".join(f"'{folder}'" for folder in more) + "]"] if more else []
    # fairseq declares no version either; without one hydra takes the oldest ways it knows, and warns.
    with _quiet(), _borrowed_store() as store, initialize_config_dir(config_dir=main, job_name="hydra_train"):
        for group, _, choice in (override.lstrip("+").partition("=") for override in overrides):
            if not any(os.path.isfile(os.path.join(folder, group, choice + ".yaml")) for folder in folders):
                store.store(group=group, name=choice, node={"_name": choice})
        for _ in range(_MOST_CHOICES):
            try:
                return compose(name, overrides=[*overrides, *search], return_hydra_config=True)
            except MissingConfigException as error:
                group, _, choice = (error.missing_cfg_file or "").rpartition("/")
                if not group:
                    raise
                store.store(group=group, name=choice, node={"_name": choice})
    raise ValueError(f"more than {_MOST_CHOICES} choices")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hydra says again, when the peers start, what it has to say of the YAML."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _borrowed_store() -> Iterator[Any]:
    """Hydra's registry of classes with hydra's own alone, whether fairseq is imported or not; it is left as it was."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # they register themselves once, when hydra looks for them: not in what is borrowed
    store = ConfigStore.instance()
    before = store.repo
    store.repo = {name: copy.deepcopy(entry) for name, entry in before.items() if name.startswith(("hydra", "_dummy"))}
    try:
        yield store
    finally:
        store.repo = before
