"""What the command of a translation run needs beside the settings: the batch on any number of GPUs, BLEU, the announcement."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from .commands import Command, is_on, set_value, value_of
from .tasks import OFF, ROOT, Recipe, Task
from .values import (
    check_folders,
    choose_method,
    count,
    line_count,
    one_of,
    set_objective,
    split_words,
    visible_gpus,
    whole,
)

CHECKPOINT = "checkpoint_best.pt"  # of a peer whose training has ended
_EMPTY_COUNTS_AS_SET = ("test_sets", "nll_sets")  # "" there means none


def complete(task: Task, values: Dict[str, Any]) -> None:
    """Check ``values`` and add what is computed from them; ``ValueError`` in one sentence."""
    check_folders(values, f"a folder made by {values['prepared_by']}")
    whole(values, "seed")
    count(values, "peers", "workers", "tokens", "updates", "validate", "keep")
    if values["gpus"]:
        whole(values, "gpus")
    for name in ("update_freq", "gpus_per_peer"):
        if values[name] not in ("", "auto"):
            count(values, name)
    one_of(values, "eval_bleu", "0", "1")
    one_of(values, "precision", "fp16", "fp32")
    peers, workers = int(values["peers"]), int(values["workers"])
    if workers % peers:
        raise ValueError(f"WORKERS must be a multiple of PEERS={peers}, but is {workers} instead")
    method = choose_method(task, values)
    values["job_workers"] = workers if method["workers"] == "all" else workers // peers
    values["update_freq_is_given"] = bool(values["update_freq"])
    values["update_freq"] = values["update_freq"] or str(values["job_workers"])
    values["metric"] = method["metric"]
    values["fp16"] = "1" if values["precision"] == "fp16" and not is_on(values["cpu"]) else ""
    split_words(values, ["extra"])
    _choose_bleu(values)
    set_objective(method, values)


def _choose_bleu(values: Dict[str, Any]) -> None:
    """With EVAL_BLEU=1 each validation translates the validation set, and BLEU chooses the best checkpoint.

    As in fairseq's own recipe for IWSLT'14. What is undone before scoring is what the data was prepared with.
    """
    values["bleu"] = []
    if values["eval_bleu"] == "0":
        return
    count(values, "beam")
    manifest = read_manifest(values)
    undone = {
        "tokenizer": values["tokenizer"] or str(manifest.get("tokenizer", "none")),
        "subwords": values["subwords"] or str(manifest.get("subwords", "sentencepiece")),
    }
    one_of(undone, "tokenizer", "moses", "none")
    one_of(undone, "subwords", "bpe", "sentencepiece")
    lenpen = f'"lenpen": {values["lenpen"]}, ' if values["lenpen"] else ""
    words = ["--eval-bleu", "--eval-bleu-args", f'{{"beam": {values["beam"]}, {lenpen}"max_len_a": 1.2, "max_len_b": 10}}']
    if undone["tokenizer"] == "moses":
        target = values["target"] or str(manifest.get("target_language", ""))
        words += ["--eval-bleu-detok", "moses", "--eval-bleu-detok-args", f'{{"target_lang": "{target}"}}']
    else:
        words += ["--eval-bleu-detok", "space"]
    # Alone it means the "@@ " of subword-nmt.
    words.append("--eval-bleu-remove-bpe" + ("=sentencepiece" if undone["subwords"] == "sentencepiece" else ""))
    values["metric"] = "bleu"
    values["bleu"] = [*words, "--maximize-best-checkpoint-metric"]


def read_manifest(values: Mapping[str, Any]) -> Dict[str, Any]:
    """What DATA/manifest.json says, as far as it can be read."""
    try:
        found = json.loads((Path(values["data"]) / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def fit(command: Command, values: Dict[str, Any]) -> None:
    """Place the jobs on the GPUs: set --gpus-per-peer, and --update-freq such that the batch stays; also ``gpus`` of a job.

    A worker is one batch of TOKENS in an update. A GPU that stands for several sums their batches one after another: the same
    gradient as workers that all-reduce. Left to itself the launcher would share out all GPUs, and the batch would grow.
    """
    values["devices"], values["gpus_of_a_job"] = 0, 1
    if is_on(values["cpu"]):
        return
    visible = int(values["gpus"]) if values["gpus"] else visible_gpus()
    jobs, asked = command.jobs, values["gpus_per_peer"]
    workers = int(values["job_workers"] if values["update_freq_is_given"] else value_of(command.train, "--update-freq") or 1)
    if not visible and not is_on(values["dry_run"]) and values["precision"] != "fp32":
        raise ValueError(
            f"PRECISION={values['precision']} needs a GPU, but none is visible; CPU=1 trains on the processor, and GPUS=8 "
            "DRY_RUN=1 plans for eight"
        )
    gpus = int(asked) if asked != "auto" else max(1, visible // jobs)
    if workers % gpus:
        divisors = ", ".join(str(i) for i in range(1, workers + 1) if workers % i == 0)
        raise ValueError(
            f"GPUS_PER_PEER must divide the workers of each job, {workers}: one of {divisors}, but is {gpus} instead "
            f"({visible} GPUs for {jobs} job(s))"
        )
    if jobs * gpus <= visible:
        set_value(command.launcher, "--gpus-per-peer", gpus)
    elif gpus > 1:
        raise ValueError(f"GPUS_PER_PEER={gpus} with {jobs} job(s) needs {jobs * gpus} GPUs, but there are {visible}")
    values["devices"], values["gpus_of_a_job"] = visible, gpus
    if not values["update_freq_is_given"]:
        set_value(command.train, "--update-freq", workers // gpus)


def check_data(values: Mapping[str, Any]) -> None:
    """DATA must be prepared; ``ValueError`` otherwise."""
    target = values["target"] or str(read_manifest(values).get("target_language", ""))
    if not (Path(values["data"]) / f"bin/dict.{target}.txt").is_file():
        raise ValueError(f"DATA must be a folder made by {values['prepared_by']}, but {values['data']} is not")


def announcement(command: Command, values: Mapping[str, Any]) -> str:
    """What it will cost and what to expect, by the settings."""
    sys.path.insert(0, str(ROOT / "recipes/translation"))
    import budget

    dictionary = Path(values["data"]) / f"bin/dict.{values['target']}.txt"
    # fairseq adds four special symbols to the file's.
    vocab = str(line_count(dictionary) + 4) if dictionary.is_file() else values["vocab"]
    told = {name: values[name] for name in ("recipe", "method", "jobs", "tokens", "updates", "keep", "expect", "arch")}
    told.update({"gpus": values["gpus_of_a_job"], "update-freq": value_of(command.train, "--update-freq")})
    sizes = {name: values[name] for name in ("layers", "width", "ffn")}
    sizes.update({"vocab": vocab, "tokens-per-second": values["gpu_tokens_per_second"], "devices": values["devices"]})
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    words += [word for name, value in sizes.items() if value for word in (f"--{name}", str(value))]
    return budget.announced([*words, *(["--cpu"] if is_on(values["cpu"]) else [])])


def evaluation(recipe: Recipe, environ: Mapping[str, str], runs: Sequence[str]) -> tuple:
    """The command that scores ``runs``, and its environment: the recipe's settings where ``environ`` has none."""
    environment = dict(environ)
    for name, value in {**recipe.settings, **recipe.evaluate}.items():
        variable = name.upper()
        if variable not in environ or (not environ[variable] and name not in _EMPTY_COUNTS_AS_SET):
            environment[variable] = "" if value == OFF else value
    command: List[str] = [sys.executable, str(ROOT / "recipes/translation/evaluate.py"), *runs]
    return command, environment
