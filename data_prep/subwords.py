"""Learn joint subwords on a stream of lines and split lines into them: subword-nmt's BPE, or sentencepiece."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Dict, List

import parallel_text
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

BPE_FILE, SENTENCEPIECE_FILE = "subwords.codes", "subwords.model"
# subword-nmt's index of pairs takes about 200 bytes for each character of each distinct word (measured).
MOST_INDEXED_CHARACTERS = 12_000_000
# sentencepiece holds its sentences in memory, and a suffix array: about 21 bytes for each character (measured).
MOST_SENTENCEPIECE_CHARACTERS = 100_000_000
CACHED_WORDS = 300_000


def count_words(lines: List[str]) -> Counter:
    """How often each token stands in ``lines``."""
    counts: Counter = Counter()
    for line in lines:
        counts.update(line.split(" "))
    counts.pop("", None)
    return counts


def learn_codes(counts: Dict[str, int], merges: int, path: Path) -> Dict[str, int]:
    """Write the codes that subword-nmt learns from the words' counts, the same as from the text itself.

    Where there are too many distinct words for the memory, the rarest are left out. Returns how many, and the merges.
    """
    kept, threshold, characters = dict(counts), 1, sum(map(len, counts))
    while characters > MOST_INDEXED_CHARACTERS:
        threshold += 1
        kept = {word: count for word, count in kept.items() if count >= threshold}
        characters = sum(map(len, kept))
    words = (f"{word} {count}\n" for word, count in kept.items())
    # Its progress bar would fill a log with lines.
    is_quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    with open(path, "w", encoding="utf-8", newline="\n") as file, is_quiet:
        learn_bpe(words, file, merges, is_dict=True)
    learned = len(parallel_text.read_lines(path)) - 1  # the first line is the version
    return {"words": len(counts), "rare_words_left_out": len(counts) - len(kept), "merges": learned}


def learn_pieces(texts: Iterable[Iterable[str]], characters: int, vocab: int, path: Path) -> Dict[str, int]:
    """Write a sentencepiece unigram model of ``texts``, which have so many ``characters`` in all.

    Of a text that is too large for the memory every n-th line is used. Returns how many lines that were.
    """
    step = -(-characters // MOST_SENTENCEPIECE_CHARACTERS)
    used = 0

    def some(lines: Iterable[str]) -> Iterable[str]:
        nonlocal used
        for number, line in enumerate(lines):
            if number % step == 0:
                used += 1
                yield line

    parallel_text.train_subwords([some(lines) for lines in texts], path, vocab, "unigram")
    return {"lines_learned_from": used, "every_nth": step}


def split_lines(lines: List[str], path: str) -> List[str]:
    """Each line as its pieces with blanks between, by the model that ``learn_codes`` or ``learn_pieces`` wrote."""
    if Path(path).name == SENTENCEPIECE_FILE:
        return parallel_text.encode(_sentencepiece(path), lines)
    bpe = _bpe(path)
    if len(bpe.cache) > CACHED_WORDS:  # it would grow with the text for ever
        bpe.cache.clear()
    return [bpe.segment(line) for line in lines]


@functools.lru_cache(maxsize=1)
def _bpe(path: str) -> BPE:
    with open(path, encoding="utf-8", newline="\n") as codes:
        return BPE(codes)


@functools.lru_cache(maxsize=1)
def _sentencepiece(path: str) -> parallel_text.SentencePieceProcessor:
    return parallel_text.SentencePieceProcessor(model_file=path)
