"""From texts that somebody reads to a finished folder of data: all stages, restarts, and the manifest."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Dict, List

import parallel_text
import pipeline
import subwords
from corpora import Corpus
from pipeline import Settings
from stages import RECORD, Stages, finished, locked, read_json, sync_files, write_json

# The first stage that depends on a setting, where that is not the first of all. A refused --vocab may so be corrected.
FIRST_USE = {
    "pieces": "tokens", "train_pairs": "tokens", "held_out": "tokens", "lowercase": "tokens", "vocab": "subwords",
    "longest": "pieces", "ratio": "pieces",
}  # fmt: skip


def make(
    out: Path, corpus: Corpus, settings: Settings, origin: str, read: Callable[[Path, Path], Dict[str, object]], jobs: int
) -> bool:
    """Make ``out`` hold ``corpus``; ``read(working folder, folder to fill)`` brings its texts and says what they are.

    ``origin`` names where from: unfinished work goes on from the same place alone. Returns and raises as ``prepare``.
    """
    work = out.with_name(out.name + ".partial")
    if finished(out, asdict(settings)):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed in its last moment
        return False
    with locked(work, f"--out {out}"):
        try:
            stages = Stages(work, {**asdict(settings), "from": origin}, FIRST_USE)
            _build(out, work, corpus, settings, stages, read, jobs)
        finally:
            _forget_if_nothing_done(work)
    return True


def _build(
    out: Path,
    work: Path,
    corpus: Corpus,
    settings: Settings,
    stages: Stages,
    read: Callable[[Path, Path], Dict[str, object]],
    jobs: int,
) -> None:
    at = work.joinpath
    texts = stages.do("texts", lambda to: read(work, to))
    tokens = stages.do("tokens", lambda to: pipeline.make_tokens(corpus, settings, at("texts"), to, jobs))
    model = stages.do("subwords", lambda to: pipeline.learn_subwords(corpus, settings, at("tokens"), to, jobs))
    pieces = stages.do("pieces", lambda to: pipeline.make_pieces(corpus, settings, at("tokens"), at("subwords"), to, jobs))
    binary = stages.do("bin", lambda to: pipeline.binarise(corpus, at("pieces"), to, jobs))
    # Made anew each time: it is only links, and complete once it has its name.
    data = at("data")
    shutil.rmtree(data, ignore_errors=True)
    _collect(work, data)
    write_json(data / "manifest.json", _manifest(corpus, settings, data, texts, tokens, model, pieces, binary))
    sync_files(data)
    data.rename(out)
    shutil.rmtree(work)


def told(work: Callable[[], bool], out: Path) -> int:
    """The exit status of ``work``, which makes ``out`` and returns whether there was anything to do; says how it ended."""
    try:
        made = work()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("prepare.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    manifest = read_json(out / "manifest.json") or {}
    for warning in unexpected(manifest):
        print(warning, file=sys.stderr)
    pairs = ", ".join(f"{split} {count:,}" for split, count in manifest["pairs"].items())
    print(f"{out}: {'ready' if made else 'was ready, nothing done'}; pairs: {pairs}")
    return 0


def _collect(work: Path, out: Path) -> None:
    """What stays, linked together in ``out``: a run that is killed here still has it in its old place too."""
    folders = {"bin": work / "bin", "raw": work / "tokens" / "raw", "archives": work / "archives", "": work / "subwords"}
    for name, folder in folders.items():
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            # no record of a stage, no half download of a mirror that failed
            if path.name != RECORD and path.is_file() and path.suffix not in (".part", ".from"):
                (out / name).mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path, out / name / path.name)
                except OSError:  # a file system without hard links
                    shutil.copyfile(path, out / name / path.name)


def _manifest(
    corpus: Corpus, settings: Settings, out: Path, texts: dict, tokens: dict, model: dict, pieces: dict, binary: dict
) -> Dict[str, object]:
    file = subwords.BPE_FILE if settings.pieces == "bpe" else subwords.SENTENCEPIECE_FILE
    return {
        "format": 1,
        "corpus": settings.corpus,
        "about": corpus.about,
        "settings": asdict(settings),
        "source_language": corpus.source,
        "target_language": corpus.target,
        # How a translation becomes text again: join the subwords, undo the tokenizer; the case may be lost.
        "subwords": settings.pieces,
        "tokenizer": "moses" if settings.pieces == "bpe" else "none",
        "lowercase": corpus.train.lowercase,
        "pairs": {split: tally["kept"] for split, tally in pieces["counts"].items()},
        "expected_pairs": dict(corpus.expected),
        # fairseq's names of the sets, and those of the files in raw
        "test_sets": {split: name for split, name in corpus.raw_names.items() if split.startswith("test")},
        "valid_sets": {split: name for split, name in corpus.raw_names.items() if split.startswith("valid")},
        "counts": {"tokens": tokens["counts"], "pieces": pieces["counts"]},
        "subword_model": {"file": file, "sha256": parallel_text.sha256_of(out / file), **model},
        "dictionary": binary,
        "raw_sha256": {path.name: parallel_text.sha256_of(path) for path in sorted((out / "raw").iterdir())},
        **texts,
        "versions": parallel_text.versions(),
    }


def unexpected(manifest: dict) -> List[str]:
    """A sentence for each split that has not the published number of pairs; none for a part of the training pairs."""
    pairs, expected = manifest["pairs"], manifest["expected_pairs"]
    splits = [split for split in expected if split != "train" or not manifest["settings"]["train_pairs"]]
    return [
        f"warning: {split} has {pairs[split]:,} pairs, but {expected[split]:,} are expected. Probably the texts are not the "
        "published ones, or this version of sacremoses splits otherwise than Moses does, which moves pairs over a limit"
        for split in splits
        if pairs[split] != expected[split]
    ]


def _forget_if_nothing_done(work: Path) -> None:
    archives = work / "archives"
    if archives.is_dir() and not any(archives.iterdir()):
        archives.rmdir()
    if work.exists() and {path.name for path in work.iterdir()} <= {"settings.json"}:
        shutil.rmtree(work)
