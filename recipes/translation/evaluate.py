"""Translate and score finished runs; called by a recipe's evaluate.sh, which sets the experiment's defaults.

``DATA=prepared evaluate.sh RUN…``, each RUN a folder that train.sh filled. Writes ``RUN/peer{i}/SET.sacrebleu.json`` (of
``SET.hyp`` against ``SET.ref``) and ``SET.nll.json`` for each peer and, where there are several, ``RUN/ensemble.SET.…`` for all
of them together; ``RUN/scores.md`` shows all side by side. ``AVERAGE=0`` takes each peer's checkpoint_best.pt, ``AVERAGE=10``
the mean of its last ten, and the set's name then ends in ``_average10``. A result that is newer than its checkpoints is left
alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List, Mapping, Sequence, Tuple

import average
import generated
import prepared
import scores
from average import user_path

ROOT = Path(__file__).resolve().parents[2]


class Failure(Exception):
    """A program that we called has failed, or has left out sentences; one or more lines for the user."""


@dataclass(frozen=True)
class Settings:
    """The programs and how they are called; see the recipes' README for the variables."""

    data: prepared.Prepared
    generate: Tuple[str, ...]
    sacrebleu: Tuple[str, ...]
    search: Tuple[str, ...]
    average: int  # 0: the best checkpoint
    tokenised: bool  # tokenised BLEU beside sacreBLEU
    dry_run: bool

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """From environment variables. Raises ``ValueError``."""
        data = prepared.read(environ)
        generate = shlex.split(environ.get("FAIRSEQ_GENERATE") or "fairseq-generate")
        generate += [str(data.folder / "bin"), "--user-dir", str(ROOT / "fairseq_codistill"), "--task", "translation"]
        generate += ["--source-lang", data.source, "--target-lang", data.target]
        # With its default --required-batch-size-multiple, 8, fairseq's 2024 version drops the last sentences of a set.
        generate += ["--batch-size", str(_number(environ, "BATCH_SENTENCES", 64)), "--required-batch-size-multiple", "1"]
        generate += ["--num-workers", "0"] + (["--cpu"] if environ.get("CPU", "0") != "0" else [])
        search = ["--beam", str(_number(environ, "BEAM", 5)), "--remove-bpe", prepared.SUBWORDS[data.subwords]]
        search += ["--lenpen", environ["LENPEN"]] if environ.get("LENPEN") else []
        tokenised = environ.get("TOKENISED") or str(int(data.is_tokenised and data.is_lowercase))
        bleu = tuple(shlex.split(environ.get("SACREBLEU") or "sacrebleu"))
        counted = _number(environ, "AVERAGE", 0, least=0)
        dry_run = environ.get("DRY_RUN", "0") != "0"
        return cls(data, tuple(generate), bleu, tuple(search), counted, tokenised != "0", dry_run)


def _number(environ: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = environ.get(name) or str(default)
    if not text.isdigit() or int(text) < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, but is {text} instead")
    return int(text)


class Scorer:
    """Scores one model, or the ensemble of several, into files that begin with ``prefix``."""

    def __init__(self, settings: Settings, checkpoints: Sequence[Path], prefix: str) -> None:
        self.settings, self.checkpoints, self.prefix = settings, checkpoints, prefix
        self.suffix = f"_average{settings.average}" if settings.average else ""

    def bleu(self, name: str, subset: str) -> None:
        """Against the raw reference, so that the score does not depend on pieces and tokens."""
        data, at = self.settings.data, self._at(name)
        if self._is_new(at, "sacrebleu.json"):
            return
        log = self._generate(subset, at, "generate.log", self.settings.search)
        if self.settings.dry_run:
            lines, references = [], []
        else:
            lines, references = generated.sentences(log, "H"), generated.sentences(log, "T")
            self._check_lines(len(lines), name, log)
        text = generated.detokenise(lines, data.target) if data.is_tokenised else lines
        if self.settings.tokenised:
            # What many papers compare: Moses tokens of text in lower case, with fairseq's own references.
            tokens = self._write(f"{self._at(name + '_tokenised')}.ref", references)
            self._sacrebleu(tokens, lines, self._at(f"{name}_tokenised"), ["--tokenize", "none", "--force"])
        self._sacrebleu(data.reference(name), text, at, ["--lowercase"] if data.is_lowercase else [])

    def nll(self, name: str, subset: str) -> None:
        """The true one, whatever the run was trained with: bits per piece and end of sentence, no smoothing."""
        at = self._at(name)
        if self._is_new(at, "nll.json"):
            return
        log = self._generate(subset, at, "score.log", ["--score-reference"])
        if self.settings.dry_run:
            return
        self._check_lines(len(generated.sentences(log, "P")), name, log)
        bits, tokens = generated.bits_per_token(log)
        score = {"name": "NLL", "score": round(bits, 5), "base": 2, "tokens": tokens}
        self._put(f"{at}.nll.json", json.dumps(score) + "\n")

    def _at(self, name: str) -> str:
        return f"{self.prefix}{name}{self.suffix}"

    def _is_new(self, at: str, kind: str) -> bool:
        result = Path(f"{at}.{kind}")
        if self.settings.dry_run or not result.is_file():
            return False
        return all(result.stat().st_mtime_ns > path.stat().st_mtime_ns for path in self.checkpoints)

    def _generate(self, subset: str, at: str, kind: str, options: Sequence[str]) -> Path:
        log = Path(f"{at}.{kind}")
        paths = os.pathsep.join(map(str, self.checkpoints))
        command = [*self.settings.generate, "--path", paths, "--gen-subset", subset, *options]
        if not self._shown(command, log) and _call(command, log):
            end = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise Failure("\n".join([*end, f"fairseq-generate failed, see {log}"]))
        return log

    def _check_lines(self, found: int, name: str, log: Path) -> None:
        """Every sentence of the set must be there, once."""
        reference = self.settings.data.reference(name)
        with open(reference, "rb") as lines:
            expected = sum(1 for _ in lines)
        if found != expected:
            raise Failure(f"{log} must have the {expected} sentences of {reference}, but has {found}")

    def _sacrebleu(self, reference: Path, lines: List[str], at: str, options: Sequence[str]) -> None:
        hypothesis = self._write(f"{at}.hyp", lines)
        if not (self.settings.dry_run or reference == Path(f"{at}.ref")):
            shutil.copyfile(reference, f"{at}.ref")  # for codistill-report --baseline, which compares sentence by sentence
        command = [*self.settings.sacrebleu, str(reference), "-i", str(hypothesis), "-m", "bleu", "-w", "4"]
        command += ["--format", "json", *options]
        part = Path(f"{at}.part")
        if self._shown(command, part):
            return
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"{done.stderr.strip()}\nsacrebleu failed on {hypothesis}")
        self._put(f"{at}.sacrebleu.json", done.stdout)

    def _shown(self, command: Sequence[str], output: Path) -> bool:
        if self.settings.dry_run:
            print(f"{shlex.join(command)} >{shlex.quote(str(output))}")
        return self.settings.dry_run

    def _write(self, path: str, lines: Sequence[str]) -> Path:
        if not self.settings.dry_run:
            Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))
        return Path(path)

    def _put(self, path: str, text: str) -> None:
        """Whole or not at all: a file that is there is believed by the next call."""
        part = Path(f"{path}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def _call(command: Sequence[str], log: Path) -> int:
    with open(log, "wb") as output:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT).returncode


def score_run(run: Path, settings: Settings) -> None:
    """Every peer and, where there are several, all together. Raises ``ValueError`` for a folder that is no run."""
    bests = sorted(run.glob("peer*/checkpoint_best.pt"), key=lambda path: int(path.parent.name[4:]))
    if not bests:
        raise ValueError(f"{run} must be a run of train.sh, but has no peer*/checkpoint_best.pt")
    models = bests
    if settings.average and settings.dry_run:
        models = [best.with_name(f"checkpoint_average{settings.average}.pt") for best in bests]
    elif settings.average:
        models = [average.write_average(best.parent, settings.average) for best in bests]
    scorers = [Scorer(settings, [model], f"{model.parent}{os.sep}") for model in models]
    if len(models) > 1:
        scorers.append(Scorer(settings, models, f"{run}{os.sep}ensemble."))
    for scorer in scorers:
        for name, subset in settings.data.test_sets:
            scorer.bleu(name, subset)
        for name, subset in settings.data.nll_sets:
            scorer.nll(name, subset)
    if not settings.dry_run:
        told = scores.table(run)
        (run / "scores.md").write_text(told + "\n", encoding="utf-8")
        print(f"{run}: scored\n{told}", flush=True)


def main(runs: Sequence[str]) -> int:
    """Exit status 2 for input that cannot be used, 1 for what failed on the way."""
    if os.environ.get("THREADS"):
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = os.environ["THREADS"]
    try:
        settings = Settings.read(os.environ)
        if not runs:
            raise ValueError("give the folders of the runs, for example runs/single/seed1")
        for run in runs:
            score_run(user_path(run), settings)
    except (ValueError, Failure, OSError) as error:
        print(f"evaluate.sh: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
