"""One training: the command that train.sh has or that the settings make, run once, and gone on with after a stop."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

from . import images, translation
from .commands import Command, expand, from_literal, is_on, value_of
from .tasks import Recipe, from_environment, from_words, resolve

TASKS: Mapping[str, ModuleType] = {"translation": translation, "images": images}
_OF_THE_LITERAL = ("data", "out", "seed")  # a train.sh has variables for these


def make(recipe: Recipe, *layers: Mapping[str, str]) -> Tuple[Command, Dict[str, Any]]:
    """The command for the recipe's settings and those of ``layers``, not yet placed on GPUs, and the values in it."""
    values: Dict[str, Any] = {**resolve(recipe.task, recipe.settings, *layers), "root": str(recipe.root)}
    TASKS[recipe.task.name].complete(recipe.task, values)
    lines = recipe.task.command
    return Command(expand(lines["launcher"], values), expand(lines["train"], values)), values


def choose(recipe: Recipe, literal: Sequence[str], *layers: Mapping[str, str]) -> Tuple[Command, Dict[str, Any], bool]:
    """``make``, unless the settings ask for nothing but what ``literal``, train.sh's command, does: then that, as it stands.

    The third value says whether the command is a literal that somebody has edited.
    """
    command, values = make(recipe, *layers)
    if not literal:
        return command, values, False
    given = {name: value for layer in layers for name, value in layer.items() if name in _OF_THE_LITERAL}
    default, _ = make(recipe, given)
    typed = from_literal(literal)
    if command == default:
        return typed, values, typed != default
    if typed != default:
        print(
            f"run.py: note: train.sh and recipe.toml of {recipe.folder.name} differ; with other settings than its defaults "
            "recipe.toml counts",
            file=sys.stderr,
        )
    return command, values, False


def train(recipe: Recipe, literal: Sequence[str], words: Sequence[str], options: Sequence[str], is_dry: bool) -> int:
    """Run or, if ``is_dry``, print the command; ``options`` of fairseq-train are added. Returns the exit status.

    Raises ``ValueError`` for settings that cannot be used, or a run that was begun with another command.
    """
    module = TASKS[recipe.task.name]
    command, values, is_edited = choose(
        recipe, literal, from_environment(recipe.task, os.environ), from_words(recipe.task, words)
    )
    if is_dry:
        values["dry_run"] = "1"
    module.fit(command, values)
    command.train += options
    whole = command.words(values["codistill_launch"].split(), values["fairseq_train"].split())

    def tell() -> None:
        told = "" if is_edited else module.announcement(command, values)
        if told:
            print(told, file=sys.stderr, flush=True)

    if is_on(values["dry_run"]):
        tell()
        print(shlex.join(whole))
        return 0
    module.check_data(values)
    run = Path(value_of(command.train, "--save-dir") or values["run"])
    return train_once(run, command.jobs, module.CHECKPOINT, whole, values["threads"], tell)


def train_once(
    run: Path, jobs: int, checkpoint: str, words: List[str], threads: str, tell: Optional[Callable[[], None]] = None
) -> int:
    """Run the command unless ``run`` is finished; it must leave ``run/peer{i}/CHECKPOINT`` for each of ``jobs`` peers.

    Raises ``ValueError`` if another process trains it, or if it was begun with another command.
    """
    run.mkdir(parents=True, exist_ok=True)
    with _locked(run) as lock:
        written = run / "command.txt"
        # Going on with other options would give a run that no command line describes.
        if written.is_file() and shlex.split(written.read_text(encoding="utf-8")) != words:
            raise ValueError(
                f"{run} was begun with another command (see its command.txt); give another NAME or OUT, or delete it"
            )
        if (run / "finished").is_file():
            print(f"{run}: was finished, nothing done")
            return 0
        if tell:
            tell()
        if not written.is_file():
            written.write_text(shlex.join(words) + "\n", encoding="utf-8")
        status = _call(words, threads, lock)
        if status:
            return status
        for peer in range(jobs):
            if not (run / f"peer{peer}" / checkpoint).is_file():
                print(f"run.py: the training ended, but {run}/peer{peer} has no {checkpoint}", file=sys.stderr)
                return 1
        (run / "finished").touch()
    return 0


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[int]:
    """Hold ``run``; its lock is handed on to the launcher, and so held as long as that lives, even if we are killed."""
    handle = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{run} is being trained by another process") from error
        except OSError:  # such as Lustre mounted without -o flock
            print(
                f"run.py: note: the file system of {run} has no locks; nothing else may train it at the same time",
                file=sys.stderr,
            )
        yield handle
    finally:
        os.close(handle)


def _call(words: Sequence[str], threads: str, lock: int) -> int:
    environment = dict(os.environ)
    if threads:
        environment.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    sys.stdout.flush()
    try:
        process = subprocess.Popen(words, env=environment, pass_fds=(lock,))
    except FileNotFoundError:
        print(f"run.py: {words[0]} must be on PATH, but is not. Did you forget to activate the environment?", file=sys.stderr)
        return 127
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the launcher has got it too, and stops its peers
            continue
        return status if status >= 0 else 128 - status
