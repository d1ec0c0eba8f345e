"""Multi30k task 1, English to German, made ready for fairseq.

``python data_prep/multi30k.py --out DIR --source TEXTS`` writes ``DIR/raw`` (the texts, for scoring), ``DIR/pieces``,
``DIR/subwords.model``, ``DIR/bin`` (what ``fairseq-train`` reads) and ``DIR/manifest.json``. ``DIR`` appears only when
all is there: a run that was killed starts again, a second run finds the manifest and does nothing.
Data: Elliott et al. 2016, github multi30k/dataset, for research.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import parallel_text
from download import fetch
from options import positive, user_path
from stages import INSTEAD, finished, write_json

LANGUAGES = ("en", "de")  # source, target
SPLITS = {"train": ["train"], "valid": ["val"], "test": ["test_2016_flickr", "test_2017_flickr", "test_2017_mscoco"]}
MIRRORS = [
    "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw",
    "https://github.com/multi30k/dataset/raw/master/data/task1/raw",
    "https://cdn.jsdelivr.net/gh/multi30k/dataset@master/data/task1/raw",
]
# The .gz files of the dataset's repository, unchanged since 2017. A mirror that gives other bytes is refused.
PUBLISHED_SHA256 = {
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2017_flickr.en.gz": "76a444ee25172e72695cddb13ae4a3bda59430617be88e0bb46b60504f054074",
    "test_2017_flickr.de.gz": "a2c89666db00c495cd8513b9d708d5a3acc205d7de312ef2bf5fb7ebc1540aee",
    "test_2017_mscoco.en.gz": "aab300bfb4427697987e02cd0aacd44bfe8aa50456231b6474c08038bbed2b58",
    "test_2017_mscoco.de.gz": "799e4854c25d601c6cb6be29eabe5667734c61ace2f495e03e429031a0bc338",
}


@dataclass(frozen=True)
class Settings:
    """What the data depends on beside the texts."""

    train_pairs: Optional[int]  # the first so many; None: all
    vocab: int  # joint pieces
    pieces: str  # unigram or bpe


def prepare(out: Path, source: Optional[Path], settings: Settings, mirrors: Sequence[str] = MIRRORS) -> bool:
    """Make ``out`` hold the data, from ``source`` or else from a mirror; returns False if it did already.

    Raises ``ValueError`` if ``out`` was made with other settings or from other texts, or is somebody else's folder.
    """
    # Before the download: a folder that cannot be used should not cost one.
    done = finished(out, asdict(settings))
    if done and source is None:
        return False
    part = out.with_name(out.name + ".part")
    texts, counts = _read_texts(source or _download(part / "download", mirrors), settings.train_pairs)
    digests = {name: parallel_text.text_sha256(lines) for name, lines in texts.items()}
    if done:
        if done["text_sha256"] != digests:
            raise ValueError(f"--out {out} was made from other texts than {source} holds; {INSTEAD}")
        return False
    # What a killed run left is not believed, except finished downloads, whose digests are checked again.
    for name in ("raw", "pieces", "bin"):
        shutil.rmtree(part / name, ignore_errors=True)
    manifest = {"format": 1, "settings": asdict(settings), "pairs": counts, "text_sha256": digests}
    manifest.update(_build(part, texts, settings))
    shutil.rmtree(part / "download", ignore_errors=True)
    write_json(part / "manifest.json", manifest)
    part.replace(out)
    return True


def _download(folder: Path, mirrors: Sequence[str]) -> Path:
    for name, digest in PUBLISHED_SHA256.items():
        fetch([f"{mirror}/{name}" for mirror in mirrors], folder / name, digest)
    return folder


def _read_texts(folder: Path, train_pairs: Optional[int]) -> tuple[dict[str, list[str]], dict[str, int]]:
    """All ten texts by file name, the training part cut to its first ``train_pairs``, and the pairs of each set."""
    texts, counts = {}, {}
    for name in (name for names in SPLITS.values() for name in names):
        paths = [parallel_text.find_text(folder, f"{name}.{language}") for language in LANGUAGES]
        pair = [parallel_text.read_lines(path) for path in paths]
        sizes = [len(lines) for lines in pair]
        if sizes[0] != sizes[1] or sizes[0] == 0:
            raise ValueError(f"{paths[0]} and {paths[1]} must have equally many lines, at least one, but have {sizes}")
        if name == "train" and train_pairs is not None:
            if train_pairs > sizes[0]:
                raise ValueError(f"--train-pairs must be at most {sizes[0]}, as {paths[0]} has, but is {train_pairs}")
            pair = [lines[:train_pairs] for lines in pair]
        texts.update({f"{name}.{language}": lines for language, lines in zip(LANGUAGES, pair)})
        counts[name] = len(pair[0])
    return texts, counts


def _build(part: Path, texts: dict[str, list[str]], settings: Settings) -> dict[str, object]:
    """Write everything below ``part``; returns what the manifest says of it."""
    # Only the training part: pieces learned from the test sets would leak them.
    training = [texts[f"train.{language}"] for language in LANGUAGES]
    model = parallel_text.train_subwords(training, part / "subwords.model", settings.vocab, settings.pieces)
    for name, lines in texts.items():
        parallel_text.write_lines(part / "raw" / name, lines)
        parallel_text.write_lines(part / "pieces" / name, parallel_text.encode(model, lines))
    parallel_text.binarise(part / "pieces", part / "bin", *LANGUAGES, SPLITS)
    dictionary = part / "bin" / f"dict.{LANGUAGES[1]}.txt"
    return {
        # fairseq-preprocess numbers the test sets
        "test_sets": {f"test{i or ''}": name for i, name in enumerate(SPLITS["test"])},
        "subwords_sha256": parallel_text.sha256_of(part / "subwords.model"),
        "dictionary_sha256": parallel_text.sha256_of(dictionary),
        "dictionary_lines": len(parallel_text.read_lines(dictionary)),
        "versions": parallel_text.versions(),
    }


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; returns the exit status: 2 for input that cannot be used, 1 for what failed on the way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=user_path, required=True, help="folder to make")
    parser.add_argument("--source", type=user_path, help="folder with train.en, val.de …, plain or .gz (default: download)")
    parser.add_argument("--train-pairs", type=positive, help="keep only the first N training pairs (default: all)")
    parser.add_argument("--vocab", type=positive, default=2000, help="joint sentencepiece pieces (default: 2000)")
    parser.add_argument("--pieces", choices=["unigram", "bpe"], default="unigram", help="kind (default: unigram)")
    args = parser.parse_args(argv)
    try:
        made = prepare(args.out.absolute(), args.source, Settings(args.train_pairs, args.vocab, args.pieces))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"multi30k.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"{args.out}: {'ready' if made else 'was ready, nothing done'}. Training reads it with DATA={args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
