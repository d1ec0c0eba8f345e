"""Is a difference in BLEU or chrF more than the choice of test sentences? sacreBLEU's paired bootstrap against a baseline.

Beside `SET.sacrebleu.json` a peer's folder holds what was scored: `SET.hyp`, and the reference in `SET.ref` there or in a
folder above it, a line for each sentence (recipes/translation/evaluate.py leaves both). Tokenisation, case and smoothing
are those of the recorded score's signature.

All peers of all seeds that a method and the baseline have in common are tested together: the corpus is the union of their
translations, and a sentence is resampled with all its translations. That is the right unit: three seeds translate the same
sentences, so 3 × 1,000 lines are not 3,000 independent ones, and a test on the concatenation would find differences
significant that are not. Beside it stands in how many single seeds p is below 0.05. The p-value is about the test
sentences; how far seeds differ is what ± is for.

The test is `sacrebleu.significance.PairedTest` (Koehn 2004: 1,000 resamples, seed 12345 or $SACREBLEU_SEED).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .files import Found, ReportError, open_regular
from .summary import Method, Peer, Run

LEVEL = 0.05
_ABOVE = 3  # folders above a peer's where a reference may stand: seed1, METHOD, the root


class Sentences(NamedTuple):
    """One peer's translations of a test set as sufficient statistics: metric -> (sentences, counts) array."""

    seed: str
    statistics: dict[str, Any]
    signature: str  # of BLEU, which names case, tokenisation and smoothing
    reference: str  # its sha256: only translations of one text are compared
    file: Path


@dataclass
class Comparison:
    """A method and the baseline on one test set by one metric."""

    method: str
    baseline: str
    test: str
    metric: str  # BLEU, chrF2
    score: float  # of all peers of the common seeds together; for the baseline's own row its score
    difference: float | None = None  # to the baseline; None in its own row
    p: float | None = None
    seed_p: dict[str, float] = field(default_factory=dict)  # of each common seed by itself
    signature: str = ""

    @property
    def key(self) -> str:
        return f"{self.test} {self.metric}"

    def cell(self) -> str:
        """35.10, +0.52, p 0.012, 2/3 seeds"""
        if self.p is None or self.difference is None:
            return f"{self.score:.2f}"
        found = sum(p < LEVEL for p in self.seed_p.values())
        seeds = f", {found}/{len(self.seed_p)} seeds" if len(self.seed_p) > 1 else ""
        return f"{self.score:.2f}, {self.difference:+.2f}, p {self.p:.3f}{seeds}"


class _Pooled:
    """A sacreBLEU metric whose "hypotheses" are statistics already, so that sentences are read and counted once."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def _extract_corpus_statistics(self, hypotheses: Any, references: Any) -> Any:
        return hypotheses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._metric, name)


def compare(found: Found, baseline: str) -> tuple[list[Comparison], list[str]]:
    """Every method against `baseline`, and notes on what could not be compared. Raises ReportError for no such method.

    A file that cannot be used is in `found.broken` afterwards, and costs only its own peer.
    """
    labels = [method.label for method in found.methods]
    if baseline not in labels:
        raise ReportError(f"--baseline must be a method of the table ({', '.join(labels)}), but is {baseline!r} instead.")
    read = {method.label: _read_method(found, method) for method in found.methods}
    if not read[baseline]:
        told = f"--baseline {baseline}: none of its peers has a SET.hyp with a SET.ref beside it, so nothing is tested."
        return [], [f"WARNING: {told}"]
    comparisons, notes = [], []
    for test, theirs in read[baseline].items():
        for metric in theirs[0].statistics:
            comparisons.append(_own(baseline, test, metric, theirs))
    for label in labels:
        for test, mine in read[label].items() if label != baseline else ():
            told = _incomparable(mine, read[baseline].get(test, []))
            if told:
                notes.append(f"WARNING: {test} of {label} is not tested against {baseline}: {told}.")
                continue
            theirs = read[baseline][test]
            comparisons += [_tested(label, baseline, test, metric, mine, theirs) for metric in theirs[0].statistics]
    return comparisons, [_meaning(comparisons, baseline), *notes]


def _meaning(comparisons: Sequence[Comparison], baseline: str) -> str:
    signature = "; ".join(sorted({comparison.signature for comparison in comparisons}))
    return (
        f"against {baseline}: score of all peers and common seeds together, difference, p of sacreBLEU's paired bootstrap in "
        "which a sentence is resampled with the translations of all seeds (about the choice of test sentences, not of "
        f"seeds), and in how many single seeds p is below {LEVEL}; {signature}"
    )


def _incomparable(mine: Sequence[Sentences], theirs: Sequence[Sentences]) -> str:
    if not theirs:
        return "the baseline has no translations of it"
    if len({one.reference for one in [*mine, *theirs]}) > 1:
        return "the references differ"
    if len({one.signature for one in [*mine, *theirs]}) > 1:
        return "the sacreBLEU signatures differ"
    if not _common(mine, theirs):
        return f"no seed is common ({', '.join(sorted({one.seed for one in mine}))})"
    return ""


def _common(mine: Sequence[Sentences], theirs: Sequence[Sentences]) -> list[str]:
    """Seeds of both, in the baseline's order."""
    have = {one.seed for one in mine}
    return list(dict.fromkeys(one.seed for one in theirs if one.seed in have))


def _own(label: str, test: str, metric: str, theirs: Sequence[Sentences]) -> Comparison:
    scorer = _scorers(theirs[0].signature)[metric]
    return Comparison(label, label, test, metric, scorer._aggregate_and_compute(_sum(theirs, metric)).score)


def _tested(
    label: str, baseline: str, test: str, metric: str, mine: Sequence[Sentences], theirs: Sequence[Sentences]
) -> Comparison:
    seeds = _common(mine, theirs)
    score, difference, p, signature = _bootstrap(metric, *(_of_seeds(side, seeds) for side in (mine, theirs)))
    each = {seed: _bootstrap(metric, *(_of_seeds(side, [seed]) for side in (mine, theirs)))[2] for seed in seeds}
    return Comparison(label, baseline, test, metric, score, difference, p, each, signature)


def _of_seeds(sentences: Sequence[Sentences], seeds: Sequence[str]) -> list[Sentences]:
    return [one for one in sentences if one.seed in seeds]


def _bootstrap(metric: str, mine: Sequence[Sentences], theirs: Sequence[Sentences]) -> tuple[float, float, float, str]:
    """(score, difference to the baseline, p, signature) over all of `mine` together against all of `theirs`."""
    from sacrebleu.significance import PairedTest

    systems = [("baseline", _sum(theirs, metric)), ("method", _sum(mine, metric))]
    scorers: Any = {metric: _Pooled(_scorers(mine[0].signature)[metric])}
    signatures, scores = PairedTest(systems, scorers, None, "bs")()
    base: Any
    result: Any
    (name, (base, result)), = ((name, found) for name, found in scores.items() if name != "System")  # fmt: skip
    return result.score, result.score - base.score, result.p_value, f"{name}|{signatures[name]}"


def _sum(sentences: Sequence[Sentences], metric: str) -> Any:
    """BLEU's and chrF's counts add up: those of a sentence over all its translations, in a list as sacreBLEU wants them."""
    return sum(one.statistics[metric] for one in sentences).tolist()


def _scorers(signature: str) -> dict[str, Any]:
    """sacreBLEU's BLEU with the settings of a signature, and chrF2 with its case; chrF2 only of text that is no tokens."""
    from sacrebleu.metrics import BLEU, CHRF

    said = dict(part.split(":", 1) for part in signature.split("|") if ":" in part)
    lowercase, tokenize = said.get("case", "mixed") == "lc", said.get("tok", "13a")
    smooth = re.match(r"[\w-]+", said.get("smooth", "exp"))
    bleu = BLEU(
        lowercase=lowercase, tokenize=tokenize, smooth_method=smooth[0] if smooth else "exp",
        effective_order=said.get("eff") == "yes", force=True,
    )  # fmt: skip
    scorers = {"BLEU": bleu} if tokenize == "none" else {"BLEU": bleu, "chrF2": CHRF(lowercase=lowercase)}
    for scorer in scorers.values():
        scorer.num_refs = 1  # a signature says so; sacreBLEU sets it when it reads references
    return scorers


# Reading.


def _read_method(found: Found, method: Method) -> dict[str, list[Sentences]]:
    """test set -> what every peer translated of it, of the peers that have it."""
    read: dict[str, list[Sentences]] = {}
    for run, peer, file in _hypotheses(method):
        # The one seed of a method has no name where it stands in METHOD itself.
        seed = run.name or "seed1"
        one = found.read(partial(_read_sentences, peer=peer, seed=seed), file)
        if one:
            read.setdefault(file.name[: -len(".hyp")], []).append(one)
    return read


def _hypotheses(method: Method) -> Iterator[tuple[Run, Peer, Path]]:
    for run in method.runs:
        for peer in run.peers:
            folder = peer.file.parent if peer.file.name == "train.log" else peer.file.with_suffix("")
            for file in sorted(folder.glob("*.hyp")):
                if not file.name.startswith("ensemble."):
                    yield run, peer, file


def _read_sentences(file: Path, peer: Peer, seed: str) -> Sentences | None:
    import numpy

    folders = [file.parent, *file.parent.parents][: 1 + _ABOVE]
    reference = next((path for path in (folder / f"{file.stem}.ref" for folder in folders) if path.is_file()), None)
    if reference is None:
        return None
    hypotheses, references = _lines(file), _lines(reference)
    if len(hypotheses) != len(references):
        raise ReportError(
            f"{file} must have a line for each of the {len(references)} sentences of {reference}, but has {len(hypotheses)}."
        )
    if not references:
        raise ReportError(f"{reference} must hold a sentence in each line, but is empty.")
    signature = next((s.signature for s in peer.scores if (s.test, s.metric) == (file.stem, "BLEU")), "")
    statistics = {
        name: numpy.array(scorer._extract_corpus_statistics(hypotheses, [references]))
        for name, scorer in _scorers(signature).items()
    }
    sha256 = hashlib.sha256("\n".join(references).encode("utf-8", "surrogateescape")).hexdigest()
    return Sentences(seed, statistics, signature, sha256, file)


def _lines(file: Path) -> list[str]:
    with open_regular(file, "rb") as content:
        text = content.read().decode("utf-8", "replace")
    # Only a line feed ends a sentence: Python would also end it at others' separators, which texts from the web hold.
    return [line.rstrip() for line in text.removesuffix("\n").split("\n")] if text else []
