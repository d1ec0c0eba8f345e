"""Frozen teachers (--codistill-teacher): fairseq checkpoints that must mean the same by their outputs as the student.

What a checkpoint tells: its settings, the shapes of its weights, and for some tasks (images) the names of the classes. The
symbols of a dictionary are not in it, so they are read where the teacher's data was. A teacher is built with a task of its
own, because building and loading change a task.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor, nn

from .core.output_layer import first, first_of_batch

logger = logging.getLogger(__name__)

_MISMATCH = re.compile(r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\) from checkpoint.*?torch\.Size\((\[.*?\])\)")


def load(paths: Optional[str], task: Any) -> List[nn.Module]:
    """The models of the checkpoints a.pt:b.pt, each with its `codistill_name`. Raises ValueError, in one sentence.

    `task`: the student's, which is left as it is.
    """
    return [_load(path, task) for path in paths.split(":")] if paths else []


def check_fit(teacher: nn.Module, net_input: Dict[str, Any], target: Tensor) -> None:
    """Raises ValueError, in one sentence, where the teacher cannot predict the targets of such a batch."""
    kind = type(teacher).__name__
    named = f"codistill_teacher must be models for this task's batches, but {teacher.codistill_name}, a {kind},"
    try:
        with torch.no_grad():
            logits = first(teacher(**first_of_batch(net_input)))
    except (TypeError, RuntimeError, AttributeError, IndexError, AssertionError, KeyError) as error:
        told = str(error).strip().splitlines()
        raise ValueError(f"{named} cannot take them ({told[0] if told else type(error).__name__}).") from error
    if torch.is_tensor(logits) and logits.dim() == target.dim() + 1 and logits.shape[1:-1] != target.shape[1:]:
        raise ValueError(f"{named} predicts {logits.size(1)} positions where there are {target.size(1)} targets.")


def _load(path: str, task: Any) -> nn.Module:
    if not Path(path).is_file():
        raise ValueError(f"codistill_teacher must be checkpoints a.pt:b.pt, but there is no file {path!r}.")
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(path)
        settings = convert_namespace_to_omegaconf(state["args"]) if state.get("args") is not None else state["cfg"]
    except Exception as error:  # whatever a file that is no checkpoint makes of it
        raise ValueError(
            f"codistill_teacher must be fairseq checkpoints, but {path!r} cannot be read as one ({_short(error)})."
        ) from error
    _check_classes(path, state, task)
    model = _build(path, state, settings, task)
    _check_dictionaries(path, settings, task)
    model.codistill_name = f"teacher {path}"  # type: ignore[assignment]
    return model


def _build(path: str, state: Dict[str, Any], settings: Any, task: Any) -> nn.Module:
    own = tasks.setup_task(task.cfg if getattr(task, "cfg", None) is not None else task.args)
    try:
        with torch.random.fork_rng(devices=[]):
            models, _ = checkpoint_utils.load_model_ensemble([path], task=own, state=state)
    except Exception as error:
        # What torch says of shapes takes many lines; any other error may need its traceback.
        raise ValueError(_does_not_fit(path, settings, task, error)) from (None if _MISMATCH.search(str(error)) else error)
    return models[0]


def _does_not_fit(path: str, settings: Any, task: Any, error: Exception) -> str:
    found = _MISMATCH.search(str(error))
    if not found:
        return f"codistill_teacher {path!r} cannot be built with this training's task ({_short(error)})."
    name, theirs, own = found.groups()
    start = f"codistill_teacher {path!r} does not fit this training: its {name} is {theirs}, but must be {own}"
    other, ours = _dictionaries(_task_of(settings)), _dictionaries(task)
    told = [f"{side} dictionary: {_words(other[side])} there, {_words(ours[side])} here" for side in ours if side in other]
    forgot = f" ({'; '.join(told)})." if told else "."
    return f"{start}; a teacher must have been trained with the same dictionaries or classes{forgot}"


def _check_classes(path: str, state: Dict[str, Any], task: Any) -> None:
    theirs = (state.get("task_state") or {}).get("classes")
    ours = getattr(task, "classes", None)
    if theirs is not None and ours is not None and list(theirs) != list(ours):
        raise ValueError(
            f"A teacher must have the same classes in the same order as this training, but {path!r} has {len(theirs)} "
            f"({_some(theirs)}), and this training has {len(ours)} ({_some(ours)})."
        )


def _check_dictionaries(path: str, settings: Any, task: Any) -> None:
    """Where the teacher's data still is. Sizes are known to fit."""
    ours = _dictionaries(task)
    theirs = _dictionaries(_task_of(settings)) if ours else {}
    if any(side not in theirs or len(theirs[side]) != len(ours[side]) for side in ours):
        logger.warning(
            f"codistillation: whether teacher {path!r} was trained with this training's dictionaries cannot be checked, since "
            f"those in its data {_data(settings)!r} are no longer there; their sizes fit, but other symbols would do harm"
        )
        return
    for side, own in ours.items():
        other = theirs[side]
        if digest(other) != digest(own):
            at = next(i for i, (a, b) in enumerate(zip(other.symbols, own.symbols)) if a != b)
            raise ValueError(
                f"A teacher must have the same {side} dictionary as this training, but {path!r} was trained on "
                f"{_data(settings)!r} with {_words(other)}, and this training has {_words(own)}: symbol {at} is "
                f"{other.symbols[at]!r} there and {own.symbols[at]!r} here."
            )


def _task_of(settings: Any) -> Any:
    """The teacher's own task, from its own data; None where that is gone."""
    try:
        return tasks.setup_task(settings.task, from_checkpoint=True)
    except Exception:  # whatever a task makes of data that is not there
        return None


def _dictionaries(task: Any) -> Dict[str, Any]:
    found = {}
    for side in ("source", "target"):
        try:
            dictionary = getattr(task, f"{side}_dictionary", None)
        except Exception:  # some tasks have none, and raise
            dictionary = None
        if hasattr(dictionary, "symbols"):
            found[side] = dictionary
    return found


def _data(settings: Any) -> Optional[str]:
    try:
        return settings.task.data
    except Exception:
        return None


def digest(dictionary: Any) -> str:
    """The sha256 of a fairseq dictionary's symbols, in their order."""
    return hashlib.sha256("\n".join(dictionary.symbols).encode()).hexdigest()


def _words(dictionary: Any) -> str:
    return f"a dictionary of {len(dictionary)} symbols (sha256 {digest(dictionary)[:12]})"


def _some(names: Any) -> str:
    return ", ".join(map(str, list(names)[:3])) + (", …" if len(names) > 3 else "")


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
