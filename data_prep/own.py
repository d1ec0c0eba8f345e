"""One's own parallel text made ready for fairseq, by the same pipeline as the published corpora.

    python data_prep/prepare.py own --out DIR --source de --target en --train PREFIX [--valid PREFIX] [--test PREFIX]

A PREFIX stands for two files with one sentence a line, line n of one the translation of line n of the other: PREFIX.de and
PREFIX.en, plain or .gz. Where valid or test is not given, sentences are held out of train: distinct source sentences, drawn by
their digests; no sentence of theirs, of either language, stays in another split.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Dict, List, Optional

import parallel_text
import texts
from blocks import cores
from corpora import Corpus, Part
from making import make, told
from moses import Cleaning, Treatment
from options import positive, user_path
from pipeline import Settings, pairs_of
from splits import HeldOut
from stages import INSTEAD, finished

NAME = "own"  # what it is called where a published corpus has its name
HELD_OUT = ("test", "valid")  # in the order in which sentences are drawn for them
_LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # as fairseq-train takes it: its files are named SPLIT.SOURCE-TARGET.LANGUAGE


@dataclass(frozen=True)
class OwnSettings(Settings):
    """What the data depends on beside the texts. ``split_off``: splits that are taken out of train, blanks between."""

    source: str
    target: str
    split_off: str
    longest: int  # subwords of a training sentence
    ratio: float  # of the two numbers of subwords of a training pair
    lowercase: bool


def corpus_of(settings: OwnSettings, prefixes: Dict[str, Path]) -> Corpus:
    """How the texts at ``prefixes``, by split, are made."""
    treatment = Treatment(tokenise=settings.pieces == "bpe", lowercase=settings.lowercase)
    return Corpus(
        source=settings.source,
        target=settings.target,
        archives=(),
        splits={split: (_part(settings, split, prefixes),) for split in ("train", "valid", "test")},
        vocab=settings.vocab,
        pieces=settings.pieces,
        train=treatment,
        held_out=treatment,
        cleaning=Cleaning(1, settings.longest, settings.ratio),
        cleaned_as_pieces=True,
        about=f"a text of the user's, {settings.source} to {settings.target}",
    )


def _part(settings: OwnSettings, split: str, prefixes: Dict[str, Path]) -> Part:
    """Files keep their names in the folder of their split: what is wrong with one is said under its own name."""
    name = prefixes[split].name if split in prefixes else split
    return Part(split, {language: [f"{split}/{name}.{language}"] for language in (settings.source, settings.target)})


def read_texts(corpus: Corpus, settings: OwnSettings, prefixes: Dict[str, Path], out: Path) -> Dict[str, object]:
    """Fill ``out`` with what ``corpus`` reads, splits taken out of train included; returns what the texts are.

    Raises ``ValueError`` for files with unequal numbers of lines, or that are no UTF-8 text.
    """
    used: Dict[str, dict] = {}
    for split, prefix in prefixes.items():
        for language in corpus.languages:
            source = find_text(prefix, language, f"--{split}")
            name = corpus.splits[split][0].files[language][0]
            _copy(source, out / name)
            used[name] = {"from": source.name, "sha256": parallel_text.sha256_of(out / name)}
        for _ in pairs_of(corpus, corpus.splits[split][0], out):
            pass  # it raises where a line has no partner
    told: Dict[str, object] = {"archives": {}, "texts": used}
    if settings.split_off:
        told["left_out_of_train"] = _split(corpus, settings, out)
    return told


def _split(corpus: Corpus, settings: OwnSettings, out: Path) -> int:
    """Take sentences out of train's files in ``out``; returns how many pairs were left out, since they would leak."""
    whole = out / "whole"
    (out / "train").rename(whole)
    (part,) = corpus.splits["train"]
    paths = [whole / Path(part.files[language][0]).name for language in corpus.languages]

    def read():
        return texts.aligned(paths)

    held_out = HeldOut(read, dict.fromkeys(settings.split_off.split(), settings.held_out or 0))
    left_out = 0
    with contextlib.ExitStack() as stack:
        files: Dict[str, list] = {}
        for split in ("train", *settings.split_off.split()):
            (out / split).mkdir()
            names = [corpus.splits[split][0].files[language][0] for language in corpus.languages]
            files[split] = [stack.enter_context(open(out / name, "w", encoding="utf-8", newline="\n")) for name in names]
        for pair in read():
            split_name = held_out.split_of(pair)
            left_out += split_name is None
            for line, file in zip(pair, files.get(split_name or "", ())):
                file.write(line + "\n")
    shutil.rmtree(whole)
    return left_out


def find_text(prefix: Path, language: str, option: str) -> Path:
    """``PREFIX.LANGUAGE`` or the same with ``.gz``; ``ValueError`` says what is there instead."""
    paths = [prefix.with_name(f"{prefix.name}.{language}{ending}") for ending in ("", ".gz")]
    for path in paths:
        if path.is_file():
            return path
    near = sorted(path.name for path in prefix.parent.glob(f"{glob_escaped(prefix.name)}.*") if path.is_file())
    there = f"there is {', '.join(near[:6])}; is --source or --target another language?" if near else "nothing begins with it"
    raise ValueError(f"{option} must be a prefix with {paths[0]} or {paths[1].name} there, but neither is: {there}")


def glob_escaped(name: str) -> str:
    """``name`` as a pattern that means itself."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    try:
        with _opened(source) as text, open(target, "wb") as copy:
            shutil.copyfileobj(text, copy)
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{source} must be gzip of UTF-8 text, but cannot be read as such: {error}") from error


def _opened(source: Path) -> IO[bytes]:
    return gzip.open(source) if source.suffix == ".gz" else open(source, "rb")  # type: ignore[return-value]


def _check_same_texts(corpus: Corpus, prefixes: Dict[str, Path], out: Path, manifest: dict) -> None:
    """Data that is there must have come from these texts; ``ValueError`` otherwise."""
    for split, prefix in prefixes.items():
        for language in corpus.languages:
            source = find_text(prefix, language, f"--{split}")
            name = corpus.splits[split][0].files[language][0]
            with _opened(source) as text:
                digest = hashlib.sha256()
                for chunk in iter(lambda: text.read(1 << 20), b""):
                    digest.update(chunk)
            if manifest.get("texts", {}).get(name, {}).get("sha256") != digest.hexdigest():
                raise ValueError(f"--out {out} was made from other texts than {source} now; {INSTEAD}")


def _language(text: str) -> str:
    if not _LANGUAGE.fullmatch(text):
        raise argparse.ArgumentTypeError(
            f"must be a language as in the files' names, letters and digits such as de or zh_CN, but is '{text}' instead"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prepare.py own", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder to make")
    parser.add_argument("--source", type=_language, required=True, metavar="LANG", help="language to translate from")
    parser.add_argument("--target", type=_language, required=True, metavar="LANG", help="language to translate to")
    parser.add_argument("--train", type=user_path, required=True, metavar="PREFIX", help="PREFIX.SOURCE and PREFIX.TARGET")
    for split in ("valid", "test"):
        parser.add_argument(f"--{split}", type=user_path, metavar="PREFIX", help="(default: sentences held out of train)")
    parser.add_argument("--held-out", type=positive, default=2000, metavar="N", help="sentences of each (default 2000)")
    parser.add_argument("--pieces", choices=["sentencepiece", "bpe"], default="sentencepiece", help="bpe: of Moses' tokens")
    parser.add_argument("--vocab", type=positive, default=8000, help="sentencepiece: pieces, bpe: merges (default 8000)")
    parser.add_argument("--lowercase", action="store_true", help="of all texts; scores then ignore the case")
    parser.add_argument("--max-length", type=positive, default=250, metavar="N", help="subwords in training (default 250)")
    parser.add_argument("--max-ratio", type=float, default=3.0, metavar="R", help="of a pair's subwords (default 3)")
    parser.add_argument("--train-pairs", type=positive, help="keep only the first N training pairs (default: all)")
    parser.add_argument("--jobs", type=positive, default=cores(), help="processes (default: all cores)")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line of ``prepare.py own``; returns the exit status."""
    args = _parser().parse_args(argv)
    return told(lambda: _from_arguments(args), args.out)


def _from_arguments(args: argparse.Namespace) -> bool:
    if args.source == args.target:
        raise ValueError(f"--source and --target must be two languages, but both are {args.source}")
    if not args.max_ratio >= 1:
        raise ValueError(f"--max-ratio must be at least 1, but is {args.max_ratio} instead")
    given = {"train": args.train, "valid": args.valid, "test": args.test}
    prefixes = {split: prefix.absolute() for split, prefix in given.items() if prefix is not None}
    split_off: List[str] = [split for split in HELD_OUT if split not in prefixes]
    settings = OwnSettings(
        corpus=NAME,
        pieces=args.pieces,
        vocab=args.vocab,
        train_pairs=args.train_pairs,
        held_out=args.held_out if split_off else None,
        source=args.source,
        target=args.target,
        split_off=" ".join(split_off),
        longest=args.max_length,
        ratio=args.max_ratio,
        lowercase=args.lowercase,
    )
    for split, prefix in prefixes.items():
        for language in (args.source, args.target):
            find_text(prefix, language, f"--{split}")
    corpus, out = corpus_of(settings, prefixes), args.out.absolute()
    made = finished(out, asdict(settings))
    if made:
        _check_same_texts(corpus, prefixes, out, made)
    origin = ", ".join(f"{split} {prefix}" for split, prefix in prefixes.items())
    return make(
        out, corpus, settings, origin, lambda work, to: read_texts(corpus, settings, prefixes, to), args.jobs
    )
