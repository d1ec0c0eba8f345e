"""Words of the demo's grammar: the lexicon, German and English inflection, and reproducible choices.

lexicon.txt describes its own format. Cases are "nom", "acc", "dat"; genders "m", "f", "n", and "p" for any
plural; persons "1s", "2s", "3s", "1p", "2p", "3p", where the polite Sie is "3p".
"""
from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

LEXICON = Path(__file__).with_name("lexicon.txt")

# Endings of der-words (dieser, jeder, alle) and of adjectives that stand alone; columns m, f, n, p.
STRONG = {"nom": ("er", "e", "es", "e"), "acc": ("en", "e", "es", "e"), "dat": ("em", "er", "em", "en")}
# Endings of adjectives after der-words.
WEAK = {"nom": ("e", "e", "e", "en"), "acc": ("en", "e", "e", "en"), "dat": ("en", "en", "en", "en")}
# Endings of adjectives after ein-words (ein, kein, mein): strong where the ein-word itself has no ending.
MIXED = {"nom": ("er", "e", "es", "en"), "acc": ("en", "e", "es", "en"), "dat": ("en", "en", "en", "en")}
EIN = {"nom": ("", "e", "", "e"), "acc": ("en", "e", "", "e"), "dat": ("em", "er", "em", "en")}
THE = {"nom": ("der", "die", "das", "die"), "acc": ("den", "die", "das", "die"), "dat": ("dem", "der", "dem", "den")}
RELATIVE = {**THE, "dat": ("dem", "der", "dem", "denen")}

REFLEXIVE = {"1s": "mich", "2s": "dich", "3s": "sich", "1p": "uns", "2p": "euch", "3p": "sich"}
INSEPARABLE = ("be", "ent", "er", "ge", "ver", "zer", "über", "unter")
ADJECTIVE_STEMS = {"teuer": "teur", "sauer": "saur", "dunkel": "dunkl", "edel": "edl", "hoch": "hoh"}
SEIN = {"1s": "bin", "2s": "bist", "3s": "ist", "1p": "sind", "2p": "seid", "3p": "sind"}


class Dice:
    """Choices that are the same on every platform and Python version: only ``Random.random`` is promised to be."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence, weights: Sequence[float] | None = None):
        cumulative = list(accumulate(weights or [1.0] * len(items)))
        return items[bisect(cumulative, self._random() * cumulative[-1], 0, len(items) - 1)]

    def zipf(self, items: Sequence):
        """Item of rank r (from 1) with a probability proportional to 1 / (r + 12)."""
        return self.pick(items, [1.0 / (rank + 13) for rank in range(len(items))])

    def usual(self, items: Sequence):
        """The first of several translations in 3 of 5 cases, else one of the others."""
        return items[0] if len(items) == 1 or self.chance(0.6) else self.pick(items[1:])


@dataclass(frozen=True)
class GermanNoun:
    singular: str
    gender: str
    plural: str
    weak: bool = False

    def form(self, case: str, plural: bool) -> str:
        if not plural:
            return self.plural if self.weak and case != "nom" else self.singular
        return self.plural if case != "dat" or self.plural[-1] in "ns" else self.plural + "n"


@dataclass(frozen=True)
class GermanVerb:
    """`du`, `er`, `past` (of ich) and `participle` are full forms, without the separable prefix."""

    infinitive: str
    prefix: str
    du: str
    er: str
    past: str
    participle: str
    reflexive: bool = False
    with_sein: bool = False

    @property
    def stem(self) -> str:
        return _stem(self.infinitive)

    def present(self, person: str) -> str:
        if self.infinitive == "sein":
            return SEIN[person]
        if person == "1s":
            # ich weiß, mag, kann: the few whose er-form has no ending share it with ich.
            return _first_person(self.infinitive) if self.er[-1] in "td" else self.er
        if person in ("1p", "3p"):
            return self.infinitive
        return {"2s": self.du, "3s": self.er, "2p": self.stem + _linking_e(self.stem) + "t"}[person]

    def preterite(self, person: str) -> str:
        vowel_end = self.past.endswith("e")
        if person in ("1p", "3p"):
            return self.past + ("n" if vowel_end else "en")
        if person == "2s":
            return self.past + ("est" if self.past[-1] in "tdsßzx" else "st")
        if person == "2p":
            return self.past + ("et" if self.past[-1] in "td" else "t")
        return self.past

    def zu_infinitive(self) -> str:
        return f"{self.prefix}zu{self.infinitive}" if self.prefix else f"zu {self.infinitive}"


def _stem(infinitive: str) -> str:
    return infinitive[:-2] if infinitive.endswith("en") else infinitive[:-1]


def _first_person(infinitive: str) -> str:
    stem = _stem(infinitive)
    return stem[:-2] + "le" if infinitive.endswith("eln") else stem + "e"


def _linking_e(stem: str) -> str:
    """The e of er arbeitet, öffnet, zeichnet; not of lernt, wohnt, kommt."""
    hard_nasal = stem[-1] in "mn" and (stem[-2] not in "aeiouäöülrhmn" or stem.endswith(("chn", "chm")))
    return "e" if stem[-1] in "td" or hard_nasal else ""


def german_verb(entry: str) -> GermanVerb:
    """A lexicon entry such as ``sich an-ziehen - - zog gezogen`` or ``kaufen``."""
    words = entry.split()
    reflexive, with_sein = words[0] == "sich", words[-1] == "+s"
    words = words[reflexive:len(words) - with_sein]
    prefix, _, infinitive = words[0].rpartition("-")
    stem = _stem(infinitive)
    e = _linking_e(stem)
    du = stem + e + ("t" if stem[-1] in "sßzx" else "st")
    ge = "" if stem.startswith(INSEPARABLE) or infinitive.endswith("ieren") else "ge"
    regular = [du, stem + e + "t", stem + e + "te", ge + stem + e + "t"]
    forms = [given if given != "-" else rule for given, rule in zip(words[1:] or regular, regular)]
    return GermanVerb(infinitive, prefix, *forms, reflexive, with_sein)


@dataclass(frozen=True)
class Noun:
    singular: str
    plural: str
    german: tuple[GermanNoun, ...]
    place: tuple[str, str] = ("", "")  # English and German preposition, for places


@dataclass(frozen=True)
class Adjective:
    english: str
    german: tuple[str, ...]
    sections: tuple[str, ...]


@dataclass(frozen=True)
class Verb:
    base: str
    past: str
    german: tuple[GermanVerb, ...]
    sections: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()  # "v2", "to", or the English preposition, the German one and its case

    def third_person(self) -> str:
        word, blank, rest = self.base.partition(" ")
        if word in ("be", "have"):
            word = {"be": "is", "have": "has"}[word]
        elif word[-1] == "y" and word[-2] not in "aeiou":
            word = word[:-1] + "ies"
        else:
            word += "es" if word.endswith(("s", "sh", "ch", "x", "z", "o")) else "s"
        return word + blank + rest


@dataclass
class Lexicon:
    nouns: dict[str, list[Noun]] = field(default_factory=dict)
    verbs: dict[tuple[str, str], list[Verb]] = field(default_factory=dict)  # by frame and kind of subject
    adjectives: list[Adjective] = field(default_factory=list)
    adverbs: dict[str, list[tuple[str, tuple[str, ...], tuple[str, ...]]]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


def _english(word: str) -> str:
    return word.replace("_", " ")


def _alternatives(text: str) -> list[str]:
    return [part.strip() for part in text.split(";")]


def _add_noun(lexicon: Lexicon, header: list[str], left: str, right: str) -> None:
    singular, plural = left.split()
    german = []
    for alternative in _alternatives(right):
        word, gender, plural_form, *weak = alternative.split()
        german.append(GermanNoun(word, gender, plural_form, weak == ["w"]))
    noun = Noun(_english(singular), _english(plural), tuple(german), tuple(header[1:]) or ("", ""))
    lexicon.nouns.setdefault(header[0], []).append(noun)


def _add_verb(lexicon: Lexicon, header: list[str], left: str, right: str) -> None:
    words, _, sections = left.partition("|")
    base, past, *extra = words.split()
    german = tuple(german_verb(alternative) for alternative in _alternatives(right))
    verb = Verb(_english(base), _english(past), german, tuple(sections.split()), tuple(extra))
    lexicon.verbs.setdefault((header[0], header[-1]), []).append(verb)


def _add_adjective(lexicon: Lexicon, header: list[str], left: str, right: str) -> None:
    german, _, sections = right.partition(":")
    lexicon.adjectives.append(Adjective(_english(left), tuple(_alternatives(german)), tuple(sections.split())))


def _add_adverb(lexicon: Lexicon, header: list[str], left: str, right: str) -> None:
    german, _, tenses = right.partition(":")
    entry = (_english(left), tuple(_alternatives(german)), tuple(tenses.split()))
    lexicon.adverbs.setdefault(header[0], []).append(entry)


def _add_name(lexicon: Lexicon, header: list[str], left: str, right: str) -> None:
    lexicon.names.append(left)


def load_lexicon(path: Path = LEXICON) -> Lexicon:
    """Read the lexicon; an entry that cannot be read is named with its line."""
    add = {"noun": _add_noun, "verb": _add_verb, "adjective": _add_adjective, "adverb": _add_adverb, "name": _add_name}
    lexicon, header = Lexicon(), []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        line = line.strip()
        if line.startswith("["):
            header = line.strip("[]").split()
        elif line and not line.startswith("#"):
            left, _, right = (part.strip() for part in line.partition("="))
            try:
                add[header[0]](lexicon, header[1:], left, right)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path.name}, line {number}: cannot read '{line}' as {header[0]}: {error}") from error
    return lexicon


def adjective_form(adjective: str, ending: str) -> str:
    return ADJECTIVE_STEMS.get(adjective, adjective[:-1] if adjective.endswith("e") else adjective) + ending
