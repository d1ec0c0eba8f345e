"""--codistill-when-stalled: a codistiller teaches only once the validation loss has stopped improving.

fairseq keeps the best validation loss in its checkpoints, but not what came after it. So the losses are kept in a file beside
the checkpoints, a line of JSON for each validation, and what follows from them is computed anew: a run that resumes at some
update takes those up to there, whichever checkpoint it came from, and whether or not it has lost a few updates.
"""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any, List, Tuple

from .core import group
from .core.codistiller import Codistiller
from .core.schedules import stalled_at
from .wrapping import TRAIN_STEP, Argument, wrap

logger = logging.getLogger(__name__)

FILE = "codistill_validation.jsonl"  # in --save-dir


def teach_when_stalled(task: Any, codistiller: Codistiller, patience: int, save_dir: str) -> None:
    """`codistiller` teaches from the validation on at which the loss has failed to improve `patience` times in a row.

    The loss is that of the first of --valid-subset, as fairseq logs it (rounded to 3 decimals). In a group rank 0 decides.
    Raises ValueError where fairseq does not tell its task of validations.
    """
    _check_fairseq()
    history = History(Path(save_dir) / FILE)
    codistiller.teachers.begin = None

    def train_step(step, *args, **kwargs):
        if not history.is_read:
            history.read(int(update_of.of(args, kwargs)))
            decide()
        return step(*args, **kwargs)

    def post_validate(validated, *args, **kwargs):
        stats = stats_of.of(args, kwargs)
        update, loss = group.share((int(stats["num_updates"]), float(stats["loss"])))
        if history.add(update, loss) and codistiller.teachers.begin is None:
            decide()
        return validated(*args, **kwargs)

    def decide() -> None:
        codistiller.teachers.begin = begin = stalled_at(history.losses, patience)
        if begin is not None:
            best = min(loss for update, loss in history.losses if update <= begin)
            logger.info(
                f"codistillation: at update {begin} the validation loss had not improved on {best:g} {patience} times in a "
                "row; from there on the peers teach"
            )

    update_of = Argument(task.train_step, "update_num", TRAIN_STEP)
    stats_of = Argument(getattr(task, "post_validate", lambda model, stats, agg: None), "stats", ("model", "stats", "agg"))
    wrap(task, "train_step", train_step)
    wrap(task, "post_validate", post_validate)


class History:
    """The (update, loss) of each validation so far, the same on all ranks of a group; rank 0 keeps them in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_read = path, False
        self.losses: List[Tuple[int, float]] = []

    def read(self, update: int) -> None:
        """Training begins or goes on at `update`: what was validated until then; later losses are of a life that was lost."""
        self.is_read = True
        found = [row for row in self._rows() if row[0] <= update] if group.leads() and update else []
        self.losses = group.share(found)
        self._write()
        if update and not self.losses:
            logger.warning(
                f"codistillation: {self.path} has no validation before update {update}, from where this run goes on, so "
                "--codistill-when-stalled counts anew; did you forget to bring it along with the checkpoint?"
            )

    def add(self, update: int, loss: float) -> bool:
        """After a validation; False where it is of another subset."""
        if self.losses and self.losses[-1][0] >= update:
            return False
        self.losses.append((update, loss))
        self._write()
        return True

    def _rows(self) -> List[Tuple[int, float]]:
        try:
            rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            return [(int(row["update"]), float(row["valid_loss"])) for row in rows]
        except FileNotFoundError:
            return []
        except Exception as error:  # whatever somebody has made of it
            logger.warning(f"codistillation: {self.path} cannot be read: {error}")
            return []

    def _write(self) -> None:
        if not group.leads():
            return
        text = "".join(json.dumps({"update": update, "valid_loss": loss}) + "\n" for update, loss in self.losses)
        try:
            whole = self.path.with_suffix(".tmp")
            whole.write_text(text, encoding="utf-8")
            whole.replace(self.path)
        except OSError as error:  # training goes on
            logger.warning(f"codistillation: {self.path} cannot be written, so a resumed run will count anew: {error}")


def _check_fairseq() -> None:
    train = importlib.import_module("fairseq_cli.train")
    if "post_validate" not in train.validate.__code__.co_names:
        raise ValueError(
            "codistill_when_stalled needs a fairseq that tells its task of validations (post_validate), but this one is older; "
            "pip install fairseq-fixed has it."
        )
