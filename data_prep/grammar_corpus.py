"""A seeded English-German parallel corpus from a grammar of its own: codistillation can be tried without any download.

    python data_prep/grammar_corpus.py --out DIR [--train 6000] [--valid 500] [--test 500] [--seed 1]

writes DIR/{train,valid,test}.{en,de}, one sentence a line. The German has what makes translation hard: gender and case
agreement, verb-second main clauses and verb-final subordinate ones, separable verbs, two past tenses. Many choices are
free (synonyms, word order, tense, the three words for "you") and many English words are ambiguous, so neither the
likelihood nor BLEU can be perfect. No English sentence stands twice. The same seed gives the same bytes everywhere;
valid and test do not depend on the size of train.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from grammar.sentences import Grammar
from grammar.words import Dice, Lexicon, load_lexicon
from options import user_path

MAX_WORDS = 22  # English words in a sentence; longer ones are thrown away
GIVE_UP_AFTER = 2000  # sentences in a row that were there already: the grammar has no more to say


def sentence_pairs(seed: int, lexicon: Lexicon | None = None) -> Iterator[tuple[str, str]]:
    """Endless pairs, no English sentence twice. Raises ValueError when the grammar has nothing new to say."""
    grammar = Grammar(Dice(seed), lexicon or load_lexicon())
    seen: set[str] = set()
    repeats = 0
    while repeats < GIVE_UP_AFTER:
        english, german = grammar.sentence()
        repeats += 1
        if english not in seen and len(english.split()) <= MAX_WORDS:
            seen.add(english)
            repeats = 0
            yield english, german
    raise ValueError(f"the grammar found no new sentence after {len(seen)}: ask for fewer pairs")


def write_corpus(out: Path, sizes: dict[str, int], seed: int) -> None:
    """Write ``out/{split}.{en,de}`` for each split of `sizes`; train is drawn last: the others do not depend on it."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = sentence_pairs(seed)
    for split in sorted(sizes, key=lambda name: name == "train"):
        drawn = [next(pairs) for _ in range(sizes[split])]
        for side, language in enumerate(("en", "de")):
            text = "".join(pair[side] + "\n" for pair in drawn)
            (out / f"{split}.{language}").write_bytes(text.encode("utf-8"))


def positive(text: str) -> int:
    """For argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is '{text}' instead")
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder for train.en, train.de, ...")
    for split, size in (("train", 6000), ("valid", 500), ("test", 500)):
        parser.add_argument(f"--{split}", type=positive, default=size, metavar="N", help=f"pairs (default {size})")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other sentences (default 1)")
    args = parser.parse_args(arguments)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, but {args.out} is a file instead")
    write_corpus(args.out, {"valid": args.valid, "test": args.test, "train": args.train}, args.seed)
    print(f"{args.out}: {args.train} / {args.valid} / {args.test} pairs (train / valid / test), seed {args.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
