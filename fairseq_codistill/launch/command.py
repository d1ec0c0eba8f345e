"""A fairseq training command: its options read, set and taken out, in the words of fairseq-train or of fairseq-hydra-train."""

from __future__ import annotations

import copy
import glob
import os
import re
from collections.abc import Sequence
from typing import Optional

from .hydra import HydraConfig

LAST = "checkpoint_last.pt"  # fairseq's default --restore-file, looked for in the save directory
# What must happen at a training's first start alone; fairseq does all but the last at every start.
FIRST_START_FLAGS = ("reset-optimizer", "reset-lr-scheduler", "reset-meters", "reset-dataloader")
FIRST_START_FILES = ("restore-file", "finetune-from-model")


class FairseqCommand:
    """A `fairseq-train` (options) or `fairseq-hydra-train` (overrides) command; nice or srun may stand before it.

    What a hydra command's YAML says counts as said; what hydra reads from fairseq's Python code is not seen.
    """

    PROGRAM = re.compile(r"(?:^|/)fairseq(?:-(?P<a>hydra-)?train|_cli[./](?P<b>hydra_)?train(?:\.py)?)$")
    OVERRIDE = re.compile(r"[+~]{0,2}[\w./@]+=")
    GROUPS = {
        **dict.fromkeys(("seed", "log-format", "reset-logging", "user-dir", "log-file", "tensorboard-logdir"), "common"),
        **dict.fromkeys(("aim-repo", "aim-run-hash", "wandb-project", "azureml-logging"), "common"),
        **dict.fromkeys(("plasma-path", "use-plasma-view"), "common"),
        **dict.fromkeys(("distributed-init-method", "distributed-port"), "distributed_training"),
        **dict.fromkeys(("save-dir", "continue-once", *FIRST_START_FILES, *FIRST_START_FLAGS), "checkpoint"),
        "results-path": "common_eval",
        "data": "task",
        **dict.fromkeys(("run.dir", "output-subdir", "job.name"), "hydra"),
    }  # fairseq's (and hydra's) group of each option; all others here are the criterion's

    def __init__(self, words: Sequence[str], config: Optional[HydraConfig] = None) -> None:
        self.words = list(words)
        matches = [(i, match) for i, match in enumerate(map(self.PROGRAM.search, self.words)) if match]
        self.is_training = self.is_fairseqs = bool(matches)
        self.start = matches[0][0] + 1 if matches else len(self.words)
        self.is_hydra = bool(matches and (matches[0][1]["a"] or matches[0][1]["b"]))
        self.config = config or HydraConfig(self.words[self.start :])

    def spelling(self, option: str) -> str:
        """`save-dir` as this program writes it: `--save-dir`, or `checkpoint.save_dir` for hydra."""
        if not self.is_hydra:
            return "--" + option
        return self.GROUPS.get(option, "criterion") + "." + option.replace("-", "_")

    def pop(self, option: str) -> Optional[str]:
        """Take every occurrence of an option out; return its last value as fairseq would, None if it is absent.

        Raises ValueError if the value is missing.
        """
        return self._pop(self.spelling(option))

    def _pop(self, name: str) -> Optional[str]:
        value, kept = None, self.words[: self.start]
        rest = iter(self.words[self.start :])
        for word in rest:
            key, equals, joined = word.partition("=")
            if (key.lstrip("+") if self.is_hydra else key) != name or (self.is_hydra and not equals):
                kept.append(word)
                continue
            value = joined if equals else next(rest, "--")
            if not equals and value.startswith("--"):
                raise ValueError(f"{name} must have a value, but none follows it.")
        self.words = kept
        return value.strip("'\"") if value and self.is_hydra else value

    def get(self, option: str) -> Optional[str]:
        """The value that `pop` would return, else the YAML's; None also for hydra's null. The command stays as it is."""
        return self._get(self.spelling(option))

    def _get(self, key: str) -> Optional[str]:
        value = self.copy()._pop(key)
        if self.is_hydra:
            if value is None:
                value = self.config.value(key)
            elif "${" in value:
                value = self.config.resolve(key, value)
        return None if self.is_hydra and value in ("null", "") else value

    def flag(self, option: str) -> bool:
        """Whether an option without a value is set."""
        if self.is_hydra:
            return (self.get(option) or "").lower() == "true"
        return self.spelling(option) in self.words[self.start :]

    def put(self, option: str, value: str) -> None:
        """Set an option, in the place of whatever occurrences there were."""
        self.pop(option)
        if not self.is_hydra:
            self.words += [self.spelling(option), value]
            return
        # Hydra's parser refuses overrides in two places with options between them, so it joins the others.
        overrides = [i for i, word in enumerate(self.words) if i >= self.start and self.OVERRIDE.match(word)]
        # Hydra's grammar wants quotes around odd signs.
        quoted = value if re.fullmatch(r"[\w./:@%+-]+", value) else "'" + value.replace("'", r"\'") + "'"
        self.words.insert(overrides[-1] + 1 if overrides else len(self.words), f"{self.spelling(option)}={quoted}")

    def drop(self, option: str, default: str) -> None:
        """Make an option (with a value) as if it were not given, in the YAML neither."""
        self.pop(option)
        if self.is_hydra and self.config.value(self.spelling(option)) not in (None, default):
            self.put(option, default)

    def drop_flag(self, option: str) -> None:
        if self.is_hydra:
            self.drop(option, "false")
        else:
            self.words[self.start :] = [word for word in self.words[self.start :] if word != self.spelling(option)]

    @property
    def criterion(self) -> str:
        """Its name, as fairseq would choose it."""
        if not self.is_hydra:
            return self.get("criterion") or "cross_entropy"
        return self._get("criterion._name") or self.copy()._pop("criterion") or "cross_entropy"

    def as_training(self) -> FairseqCommand:
        """If its program is not known: as if it were fairseq-train by another name."""
        command = self.copy()
        if not self.is_training:
            command.is_training, command.start = True, 1
        return command

    def copy(self) -> FairseqCommand:
        command = copy.copy(self)
        command.words = list(self.words)
        return command


def first_start_options(command: FairseqCommand) -> list[str]:
    """What the command says of where a training begins, as it is written there: `--restore-file`, `--reset-meters` …"""
    if not command.is_training:
        return []
    found = [option for option in FIRST_START_FILES if command.get(option) not in (None, LAST)]
    found += [option for option in FIRST_START_FLAGS if command.flag(option)]
    return [command.spelling(option) for option in found]


def going_on(command: FairseqCommand) -> FairseqCommand:
    """The command of a training that has begun: it goes on from its own last checkpoint, all of it."""
    command = command.copy()
    for option in FIRST_START_FILES:
        command.drop(option, LAST if option == "restore-file" else "null")
    for option in FIRST_START_FLAGS:
        command.drop_flag(option)
    return command


def has_begun(save_dir: str) -> bool:
    """Whether a training's own checkpoint is there, from which it goes on (in parts, where a model is sharded)."""
    name, end = os.path.splitext(LAST)
    return bool(glob.glob(os.path.join(glob.escape(save_dir), f"{name}*{end}")))


def absolute(path: str) -> str:
    """A path that means the same in another working directory; URLs and what is yet to be interpolated stay."""
    return path if "://" in path or path.startswith("${") else os.path.abspath(path)
