"""What the command of an image run needs beside the settings: epochs, milestones and decays as the papers have them."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from .commands import Command, is_on, set_value, value_of
from .tasks import ROOT, Recipe, Task
from .values import check_folders, choose_method, count, one_of, set_objective, split_words, visible_gpus, whole

CHECKPOINT = "checkpoint_last.pt"  # of a peer whose training has ended
_FOLDER = "a folder with train/CLASS and valid/CLASS"


def complete(task: Task, values: Dict[str, Any]) -> None:
    """Check ``values`` and add what is computed from them; ``ValueError`` in one sentence."""
    check_folders(values, _FOLDER)
    whole(values, "seed")
    if not re.fullmatch("1(/[1-9][0-9]*)?", values["fraction"]):
        raise ValueError(f"FRACTION must be 1 or 1/k, but is {values['fraction']} instead")
    count(values, "peers", "batch", "gpus_per_peer")
    method = choose_method(task, values)
    has_all = method["workers"] == "all"
    values["update_freq"] = values["peers"] if has_all else "1"
    split_words(values, ["extra", "image_options"])
    _choose_schedule(values, has_all)
    set_objective(method, values)


def _choose_schedule(values: Dict[str, Any], has_all: bool) -> None:
    """EPOCHS are those of all_reduce.

    A peer sees half the data in as many updates (a PEERS-th), so it trains half the epochs, with every milestone halved. 1/k of
    the data takes k times the epochs, again for as many updates.
    """
    one_of(values, "schedule", "multistep", "cosine_he")
    one_of(values, "regularisation", "unmodified", "reduced", "constant")
    peers, k = int(values["peers"]), int(values["fraction"].partition("/")[2] or 1)
    # In proportion to the images in an update (Goyal et al. 2017): LR is a peer's.
    values["job_lr"] = f"{_number(values, 'lr') * peers:.6g}" if has_all else values["lr"]
    epochs = values["job_epochs"] = _decimal(_number(values, "epochs") * k / (1 if has_all else peers))
    if not epochs.isdigit():
        raise ValueError(f"EPOCHS={values['epochs']} must give whole epochs for {values['method']}, but gives {epochs}")
    is_unmodified, total = values["regularisation"] == "unmodified", int(epochs)
    # Of the 90 epochs of Goyal et al. 30, 60, 80; of the 45 of Sodhani et al. (§3.2) 18, 38, 44 instead of 15, 30, 40.
    shares = ((1, 3), (2, 3), (8, 9)) if is_unmodified else ((18, 45), (38, 45), (44, 45))
    milestones = [_decimal(total * above / below) for above, below in shares]
    values["warmup_epochs"] = _decimal(total / 18)
    values["lr_milestones"] = ",".join(milestones) if values["schedule"] == "multistep" else ""
    values["alpha_milestones"] = ",".join(milestones) if values["alpha_schedule"] == "stepwise" else ""
    values["weight_decays"] = values["weight_decay_milestones"] = ""
    if values["regularisation"] == "reduced":
        values["weight_decays"] = f"{values['weight_decay']},{_number(values, 'weight_decay') / 10:.6g},0"
        values["weight_decay_milestones"] = ",".join(milestones[:2])


def _number(values: Mapping[str, Any], name: str) -> float:
    try:
        return float(values[name])
    except ValueError as error:
        raise ValueError(f"{name.upper()} must be a number, but is {values[name]} instead") from error


def _decimal(value: float) -> str:
    """Epochs with up to four places."""
    return re.sub(r"\.?0+$", "", f"{value:.4f}")


def fit(command: Command, values: Dict[str, Any]) -> None:
    """Place the jobs on the GPUs: set --gpus-per-peer, and --batch-size such that BATCH is a peer's, whatever its workers.

    Left to itself the launcher shares out all GPUs, and a single job would get a larger batch.
    """
    gpus, jobs = int(values["gpus_per_peer"]), command.jobs
    if not is_on(values["cpu"]):
        visible = visible_gpus()
        if jobs * gpus <= visible:
            set_value(command.launcher, "--gpus-per-peer", gpus)
        elif gpus > 1:
            raise ValueError(f"GPUS_PER_PEER={gpus} with {jobs} peers needs {jobs * gpus} GPUs, but there are {visible}")
    batch = int(value_of(command.train, "--batch-size") or values["batch"])
    if batch % gpus:
        raise ValueError(f"GPUS_PER_PEER={gpus} must divide BATCH={batch}")
    set_value(command.train, "--batch-size", batch // gpus)


def check_data(values: Mapping[str, Any]) -> None:
    """DATA must have training images; ``ValueError`` otherwise."""
    if not (Path(values["data"]) / "train").is_dir():
        raise ValueError(f"DATA must be {_FOLDER}, but {values['data']} has no train")


def announcement(command: Command, values: Mapping[str, Any]) -> str:
    """Nothing is known of the cost of image runs."""
    return ""


def evaluation(recipe: Recipe, environ: Mapping[str, str], runs: Sequence[str]) -> tuple:
    """The command that scores the run, and its environment; on the processor unless CPU=0."""
    if not environ.get("DATA"):
        raise ValueError(f"DATA must be {_FOLDER}, but is not set")
    if len(runs) != 1:
        raise ValueError(f"evaluate.sh must have the folder of one run, for example runs/single/seed1, but has {len(runs)}")
    cpu = ["--cpu"] if (environ.get("CPU") or "1") != "0" else []
    command: List[str] = [sys.executable, str(ROOT / "recipes/images/evaluate.py"), *runs, "--data", environ["DATA"], *cpu]
    return command, dict(environ)
