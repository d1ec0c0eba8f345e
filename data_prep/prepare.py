"""Make a published corpus ready for fairseq: download, extract, clean, tokenise, split into subwords, binarise.

    python data_prep/prepare.py NAME --out DIR [--source FOLDER] [--pieces bpe|sentencepiece] [--vocab N]
    python data_prep/prepare.py own --out DIR --source de --target en --train PREFIX ...     (your own text: own.py)

writes DIR/raw (valid and test sets as they were, for scoring), DIR/bin (what fairseq-train reads, with a joined
dictionary), DIR/subwords.codes or DIR/subwords.model, and DIR/manifest.json with every count, version and checksum. DIR
appears only when all is there. What is not finished lies in DIR.partial; the same command goes on with the stage at which
an earlier run was stopped. A second run does nothing. Only the download uses the network, and --source spares it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Dict, Optional

import own
import parallel_text
import pipeline
from archives import is_archive
from blocks import cores
from corpora import CORPORA, Corpus
from download import fetch_archives, trust
from making import make, told
from options import positive, user_path
from pipeline import Settings


def prepare(out: Path, settings: Settings, source: Optional[Path], archives: Optional[Path], jobs: int) -> bool:
    """Make ``out`` hold the corpus, from the folder ``source`` or else from the network; returns False if it did already.

    Downloads stay in ``archives``, else in ``out/archives``. Raises ``ValueError`` if ``out`` was made with other settings
    or is somebody else's folder, or if the texts are unfit; ``ConnectionError`` if they cannot be downloaded.
    """
    corpus = CORPORA[settings.corpus]

    def read(work: Path, to: Path) -> Dict[str, object]:
        return _copy(corpus, source, to) if source else _download(corpus, archives or work / "archives", to)

    return make(out, corpus, settings, str(source or "download"), read, jobs)


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


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status: 2 for input that cannot be used, 1 for what failed on the way."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [own.NAME]:
        return own.main(words[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=f"Your own text: prepare.py {own.NAME} --help")
    parser.add_argument("corpus", choices=[*CORPORA, own.NAME])
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
    args = parser.parse_args(words)
    if args.corpus == own.NAME:
        parser.error(f"{own.NAME} must be the first word after prepare.py: its options are others")
    return told(lambda: _from_arguments(args), args.out)


def _from_arguments(args: argparse.Namespace) -> bool:
    corpus = CORPORA[args.corpus]
    settings = Settings(
        corpus=args.corpus,
        pieces=args.pieces or corpus.pieces,
        vocab=args.vocab or corpus.vocab,
        train_pairs=args.train_pairs,
        held_out=args.held_out if corpus.by_sentence else None,
    )
    source, archives = (path and path.absolute() for path in (args.source, args.archives))
    if source is not None and not source.is_dir():
        raise ValueError(f"--source must be a folder with the archives or texts, but {source} is none")
    return prepare(args.out.absolute(), settings, source, archives, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
