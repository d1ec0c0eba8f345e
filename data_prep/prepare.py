"""Make a published corpus ready for fairseq: download, extract, clean, tokenise, split into subwords, binarise.

    python data_prep/prepare.py NAME --out DIR [--source FOLDER] [--pieces bpe|sentencepiece] [--vocab N]

writes DIR/raw (valid and test sets as they were, for scoring), DIR/bin (what fairseq-train reads, with a joined
dictionary), DIR/subwords.codes or DIR/subwords.model, and DIR/manifest.json with every count, version and checksum. DIR
appears only when all is there. What is not finished lies in DIR.partial; the same command goes on with the stage at which
an earlier run was stopped. A second run does nothing. Only the download uses the network, and --source spares it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Dict, List, Optional

import parallel_text
import pipeline
import subwords
from archives import is_archive
from blocks import cores
from corpora import CORPORA, Corpus
from download import fetch_archives, trust
from options import positive, user_path
from pipeline import Settings
from stages import RECORD, Stages, finished, locked, read_json, sync_files, write_json

# The first stage that depends on a setting, where that is not the first of all. A refused --vocab may so be corrected.
FIRST_USE = {"pieces": "tokens", "train_pairs": "tokens", "held_out": "tokens", "vocab": "subwords"}


def prepare(out: Path, settings: Settings, source: Optional[Path], archives: Optional[Path], jobs: int) -> bool:
    """Make ``out`` hold the corpus, from the folder ``source`` or else from the network; returns False if it did already.

    Downloads stay in ``archives``, else in ``out/archives``. Raises ``ValueError`` if ``out`` was made with other settings
    or is somebody else's folder, or if the texts are unfit; ``ConnectionError`` if they cannot be downloaded.
    """
    work = out.with_name(out.name + ".partial")
    if finished(out, asdict(settings)):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed in its last moment
        return False
    with locked(work, f"--out {out}"):
        try:
            _build(out, work, settings, source, archives or work / "archives", jobs)
        finally:
            _forget_if_nothing_done(work)
    return True


def _build(out: Path, work: Path, settings: Settings, source: Optional[Path], archives: Path, jobs: int) -> None:
    corpus, at = CORPORA[settings.corpus], work.joinpath
    stages = Stages(work, {**asdict(settings), "from": str(source or "download")}, FIRST_USE)
    if source is not None:
        texts = stages.do("texts", lambda to: _copy(corpus, source, to))
    else:
        texts = stages.do("texts", lambda to: _download(corpus, archives, to))
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


def _copy(corpus: Corpus, source: Path, out: Path) -> Dict[str, object]:
    """The texts out of a folder of the user's, and what its archives are."""
    used = pipeline.gather_texts(corpus, source, out)
    published = {offer.name: offer.sha256 for archive in corpus.archives for offer in archive}
    archives = {}
    for name in sorted({about["from"] for about in used.values()}):
        if is_archive(name):
            path = next(source.rglob(name))
            digest = parallel_text.sha256_of(path)
            known = published.get(name)
            if known not in (None, digest):
                print(f"note: {path} is not the published archive, whose sha256 is {known}", file=sys.stderr)
            about = "published" if digest == known else "source"
            archives[name] = {"bytes": path.stat().st_size, "sha256": digest, "digest_known_from": about}
    return {"archives": archives, "texts": used}


def _download(corpus: Corpus, archives: Path, out: Path) -> Dict[str, object]:
    """The texts out of archives from the network; what nobody vouches for is trusted once it has proved readable."""
    fetched = fetch_archives(corpus.archives, archives)
    unknown = [name for name, about in fetched.items() if about["digest_known_from"] == "first use"]
    try:
        used = pipeline.gather_texts(corpus, archives, out)
    except ValueError as error:
        for name in unknown:
            (archives / name).unlink()
        raise ValueError(f"{error}. The next run downloads {' and '.join(unknown) or 'nothing'} again") from error
    for name in unknown:
        trust(name, fetched[name]["sha256"], archives)
    return {"archives": fetched, "texts": used}


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
        "archives": texts["archives"],
        "texts": texts["texts"],
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


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status: 2 for input that cannot be used, 1 for what failed on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", choices=CORPORA)
    parser.add_argument("--out", type=user_path, required=True, help="folder to make")
    parser.add_argument("--source", type=user_path, help="folder with the archives or texts (default: download)")
    parser.add_argument(
        "--archives", type=user_path, help="folder to keep downloads in, for several corpora (default: DIR/archives)"
    )
    parser.add_argument("--pieces", choices=["bpe", "sentencepiece"], help="subwords (default: what the corpus is known for)")
    parser.add_argument("--vocab", type=positive, help="bpe: merges, sentencepiece: pieces (default: the corpus')")
    parser.add_argument("--train-pairs", type=positive, help="keep only the first N training pairs (default: all)")
    parser.add_argument("--held-out", type=positive, default=2000, help="sentences in valid and in test each (default 2000)")
    parser.add_argument("--jobs", type=positive, default=cores(), help="processes (default: all cores)")
    args = parser.parse_args(argv)
    corpus = CORPORA[args.corpus]
    settings = Settings(
        corpus=args.corpus,
        pieces=args.pieces or corpus.pieces,
        vocab=args.vocab or corpus.vocab,
        train_pairs=args.train_pairs,
        held_out=args.held_out if corpus.by_sentence else None,
    )
    try:
        source, archives = (path and path.absolute() for path in (args.source, args.archives))
        if source is not None and not source.is_dir():
            raise ValueError(f"--source must be a folder with the archives or texts, but {source} is none")
        made = prepare(args.out.absolute(), settings, source, archives, args.jobs)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("prepare.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    manifest = read_json(args.out / "manifest.json") or {}
    for warning in unexpected(manifest):
        print(warning, file=sys.stderr)
    pairs = ", ".join(f"{split} {count:,}" for split, count in manifest["pairs"].items())
    print(f"{args.out}: {'ready' if made else 'was ready, nothing done'}; pairs: {pairs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
