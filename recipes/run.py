"""The recipes' runner, for text and images: makes the literal command of a training from a recipe's TOML, prints it, runs it.

    python recipes/run.py train RECIPE [NAME=VALUE …] [--dry-run] [-- more options of fairseq-train]
    python recipes/run.py evaluate RECIPE RUN…
    python recipes/run.py sweep --recipe RECIPE --data DATA --out OUT [--runs FILE] [--seeds 1 2 3] [--jobs 2] …

RECIPE is a folder with a recipe.toml. NAME=VALUE is a setting (recipes/TASK/README.md lists them), as in the environment:
DATA=data/iwslt14 OUT=runs METHOD=all_reduce SEED=2 UPDATES=1000. Of an option that stands twice fairseq takes the last, so
everything of fairseq-train can be set after --. A recipe's train.sh, evaluate.sh and the sweeps come here too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

from paths import user_path
from runner import sweeping
from runner.tasks import read_recipe
from runner.training import TASKS, train


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; the exit status is 2 for input that cannot be used, else that of what was run."""
    words = list(sys.argv[1:] if argv is None else argv)
    what, rest = (words[0] if words else ""), words[1:]
    if what in ("", "-h", "--help"):
        print(__doc__.strip())
        return 0 if what else 2
    if what == "sweep":
        return sweeping.main(rest)
    try:
        if what == "train":
            return _train(rest)
        if what == "evaluate":
            return _evaluate(rest)
        raise ValueError(f"the first word must be train, evaluate or sweep, but is {what}; run.py --help shows how")
    except (ValueError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130


def _train(words: Sequence[str]) -> int:
    settings, literal, options = _parts(words)
    is_dry = "--dry-run" in settings
    settings = [word for word in settings if word != "--dry-run"]
    if not settings:
        raise ValueError("train must be followed by the folder of a recipe, such as recipes/multi30k_en_de")
    return train(read_recipe(user_path(settings[0])), literal, settings[1:], options, is_dry)


def _parts(words: Sequence[str]) -> Tuple[List[str], List[str], List[str]]:
    """What stands before the first ``--``, a train.sh's own command if it is there, and more options of fairseq-train.

    As ``RECIPE SETTINGS -- OPTIONS``, or from a train.sh ``RECIPE -- codistill-launch … -- fairseq-train … -- OPTIONS``.
    """
    parts: List[List[str]] = [[]]
    for word in words:
        if word == "--" and len(parts) < 4:
            parts.append([])
        else:
            parts[-1].append(word)
    if len(parts) > 2:
        return parts[0], [*parts[1], "--", *parts[2]], parts[3] if len(parts) > 3 else []
    return parts[0], [], parts[1] if len(parts) > 1 else []


def _evaluate(words: Sequence[str]) -> int:
    if not words:
        raise ValueError("evaluate must be followed by the folder of a recipe and those of runs")
    recipe = read_recipe(Path(words[0]))
    command, environment = TASKS[recipe.task.name].evaluation(recipe, os.environ, words[1:])
    os.execve(command[0], command, environment)


if __name__ == "__main__":
    sys.exit(main())
