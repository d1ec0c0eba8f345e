"""What the usual scripts do to a line: Moses' normalisation, tokenisation, lower case and cleaning, by sacremoses."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Optional

from sacremoses import MosesPunctNormalizer, MosesTokenizer
from texts import plain

# Python takes these for blanks, Perl deletes them with the other control characters.
_JUNK = re.compile("[\x1c-\x1f]")
_LAST_DOT = re.compile(r"(?<=[^\s.])\.$")


@dataclass(frozen=True)
class Cleaning:
    """Pairs to keep: ``shortest`` to ``longest`` tokens on both sides, neither more than ``ratio`` times the other.

    As Moses' clean-corpus-n; None sets no limit.
    """

    shortest: int
    longest: Optional[int]
    ratio: Optional[float]
    longest_word: Optional[int] = 1000  # characters

    def fault(self, source: str, target: str) -> Optional[str]:
        """Why a pair is dropped, None if it is kept; for two lines with blanks between their tokens."""
        words = source.split(), target.split()
        fewer, more = sorted(map(len, words))
        if fewer == 0:
            return "empty"
        if fewer < self.shortest or (self.longest is not None and more > self.longest):
            return "length"
        if self.ratio is not None and more / fewer > self.ratio:
            return "ratio"
        if self.longest_word is not None and any(len(word) > self.longest_word for side in words for word in side):
            return "long_word"
        return None


NO_EMPTY_SIDE = Cleaning(1, None, None, None)


@dataclass(frozen=True)
class Treatment:
    """What is done to every line of a set."""

    normalise: bool = False  # punctuation; unprintable characters go
    apostrophes: bool = False  # ’ becomes '
    tokenise: bool = False
    split_hyphens: bool = False  # a-b becomes a @-@ b
    lowercase: bool = False

    def apply(self, line: str, language: str) -> str:
        """One line of text, treated; what is not tokenised is only made one line."""
        if self.apostrophes:
            line = line.replace("’", "'")
        if self.normalise:
            # Perl's line still has its newline, and one of the rules for quotes looks behind the last quote.
            line = _printable(_normaliser(language).normalize(line + "\n"))
        if self.tokenise:
            line = tokenise(line, language, self.split_hyphens)
        else:
            line = plain(line)
        return lower(line) if self.lowercase else line


def tokenise(line: str, language: str, split_hyphens: bool = False) -> str:
    """As Moses' tokenizer.perl does, escapes included."""
    line = _tokeniser(language).tokenize(_JUNK.sub("", line), aggressive_dash_splits=split_hyphens, return_str=True).strip()
    # Moses splits the dot off the last word whatever the word is; sacremoses not where it may be an abbreviation.
    return _LAST_DOT.sub(" .", line)


def lower(line: str) -> str:
    """Character by character, as Perl does: Python alone would write a Σ at the end of a word as ς."""
    return "".join(map(str.lower, line)) if "Σ" in line else line.lower()


def _printable(line: str) -> str:
    """Blanks instead of the characters of Unicode's category C, as remove-non-printing-char.perl."""
    if line.isprintable():
        return line
    return "".join(" " if unicodedata.category(character)[0] == "C" else character for character in line)


class _Tokeniser(MosesTokenizer):
    """sacremoses' own; but it makes sets of all letters of the world once, not for every abbreviation."""

    _lower, _letters = frozenset(MosesTokenizer.IsLower), frozenset(MosesTokenizer.IsAlpha)

    def islower(self, text: str) -> bool:
        return self._lower.issuperset(text)

    def isanyalpha(self, text: str) -> bool:
        return not self._letters.isdisjoint(text)

    def handles_nonbreaking_prefixes(self, text: str) -> str:
        return super().handles_nonbreaking_prefixes(text) if "." in text else " ".join(text.split())


@functools.cache
def _tokeniser(language: str) -> _Tokeniser:
    return _Tokeniser(language)


@functools.cache
def _normaliser(language: str) -> MosesPunctNormalizer:
    return MosesPunctNormalizer(language, perl_parity=True)
