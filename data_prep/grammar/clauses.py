"""Noun phrases and clauses of the demo's grammar, each in English and in German at once.

A clause is built once and said twice. The German word order is what makes the pair worth learning: the finite verb
stands second, first, or last; participles, infinitives and separable prefixes stand at the end; nicht, pronouns and
adverbials have their places in between.
"""
from __future__ import annotations

from dataclasses import dataclass, replace

from .words import (
    EIN,
    MIXED,
    REFLEXIVE,
    RELATIVE,
    STRONG,
    THE,
    WEAK,
    Adjective,
    GermanNoun,
    GermanVerb,
    Verb,
    adjective_form,
    german_verb,
)

CASES = ("nom", "acc", "dat")
COLUMNS = "mfnp"
# Fusions of preposition and article. Those of the accusative are said of places only: ins Haus, but an das Kind denken.
FUSED = {"in dem": "im", "an dem": "am", "von dem": "vom", "zu dem": "zum", "zu der": "zur"}
FUSED_PLACE = {"in das": "ins", "an das": "ans"}

HABEN = german_verb("haben hast hat hatte gehabt")
SEIN = german_verb("sein bist ist war gewesen +s")
WERDEN = german_verb("werden wirst wird wurde geworden +s")


@dataclass(frozen=True)
class NounPhrase:
    """English text and the German forms by case; `person` as in words.py, `gender` m, f, n or p."""

    english: str
    german: dict[str, str]
    person: str = "3s"
    gender: str = "m"
    english_person: str = "3s"  # the polite Sie and the plural ihr are both "you"
    pronoun: bool = False
    negative: bool = False  # kein: the phrase says the clause's negation
    english_object: str = ""  # where it differs: me, him

    def as_object(self) -> str:
        return self.english_object or self.english

    def after(self, preposition: str, case: str, place: bool = False) -> str:
        """The German phrase behind a preposition, fused with it where German does."""
        first, blank, rest = self.german[case].partition(" ")
        pair = f"{preposition} {first}"
        fused = FUSED.get(pair) or (FUSED_PLACE.get(pair) if place else None)
        # A relative clause or a demonstrative stress keeps them apart: in dem Haus, das ...
        return f"{pair if ',' in rest or not blank else fused or pair}{blank}{rest}"


# English subject and object, person, nominative, accusative, dative.
PRONOUNS = {
    "I": ("me", "1s", "ich", "mich", "mir"),
    "he": ("him", "3s", "er", "ihn", "ihm"),
    "she": ("her", "3s", "sie", "sie", "ihr"),
    "we": ("us", "1p", "wir", "uns", "uns"),
    "they": ("them", "3p", "sie", "sie", "ihnen"),
}
# The three ways to say "you" and "your": nothing in the English sentence decides.
ADDRESSES = {
    "du": ("you", "2s", "du", "dich", "dir"),
    "Sie": ("you", "3p", "Sie", "Sie", "Ihnen"),
    "ihr": ("you", "2p", "ihr", "euch", "euch"),
}
POSSESSIVES = {"my": "mein", "his": "sein", "her": "ihr", "our": "unser", "their": "ihr"}
YOUR = {"du": "dein", "Sie": "Ihr", "ihr": "euer"}


def pronoun(english: str, address: str) -> NounPhrase:
    english_object, person, *forms = ADDRESSES[address] if english == "you" else PRONOUNS[english]
    english_person = "1s" if english == "I" else "3s" if person == "3s" else "3p"
    german = dict(zip(CASES, forms))
    return NounPhrase(english, german, person, "p", english_person, pronoun=True, english_object=english_object)


# English determiner: German one, the table of its own endings (none: it does not change), the adjectives' table.
DETERMINERS = {
    "the": ("", THE, WEAK),
    "this": ("dies", STRONG, WEAK),
    "these": ("dies", STRONG, WEAK),
    "every": ("jed", STRONG, WEAK),
    "all": ("all", STRONG, WEAK),
    "a": ("ein", EIN, MIXED),
    "many": ("viel", STRONG, STRONG),
    "some": ("einig", STRONG, STRONG),
    "": ("", None, STRONG),
    "two": ("zwei", None, STRONG),
    "three": ("drei", None, STRONG),
    "four": ("vier", None, STRONG),
    "five": ("fünf", None, STRONG),
}


def _determiner(english: str, address: str, negative: bool) -> tuple[str, dict | None, dict]:
    if negative:
        return "kein", EIN, MIXED
    if english == "your" or english in POSSESSIVES:
        return YOUR[address] if english == "your" else POSSESSIVES[english], EIN, MIXED
    return DETERMINERS[english]


def noun_phrase(
    english_noun: str,
    noun: GermanNoun,
    plural: bool,
    determiner: str,
    address: str,
    adjective: tuple[Adjective, str] | None = None,
    negative: bool = False,
) -> NounPhrase:
    """Article, adjective and noun, agreeing in gender, number and case. `negative` makes "a" or no article kein."""
    stem, endings, adjective_endings = _determiner(determiner, address, negative)
    gender = "p" if plural else noun.gender
    column = COLUMNS.index(gender)
    german = {}
    for case in CASES:
        ending = endings[case][column] if endings else ""
        # eure, not euere.
        words = [("eur" if stem == "euer" and ending else stem) + ending]
        if adjective:
            words.append(adjective_form(adjective[1], adjective_endings[case][column]))
        german[case] = " ".join(filter(None, [*words, noun.form(case, plural)]))
    english = " ".join(filter(None, [adjective[0].english if adjective else "", english_noun]))
    if determiner == "a":
        determiner = "an" if english[0] in "aeiou" and not english.startswith("uni") else "a"
    person = "3p" if plural else "3s"
    return NounPhrase(f"{determiner} {english}".strip(), german, person, gender, person, negative=negative)


def name_phrase(name: str) -> NounPhrase:
    return NounPhrase(name, dict.fromkeys(CASES, name))


def joined(first: NounPhrase, second: NounPhrase) -> NounPhrase:
    german = {case: f"{first.german[case]} und {second.german[case]}" for case in CASES}
    return NounPhrase(f"{first.english} and {second.english}", german, "3p", "p", "3p")


@dataclass(frozen=True)
class Modal:
    """English forms: (present, its negation, past, its negation). A base form that is inflected ends in " to"."""

    german: GermanVerb
    english: tuple[str, str, str, str]


MODALS = (
    Modal(german_verb("können kannst kann konnte gekonnt"), ("can", "cannot", "could", "could not")),
    Modal(german_verb("müssen musst muss musste gemusst"), ("must", "have to", "had to", "have to")),
    Modal(german_verb("wollen willst will wollte gewollt"), ("want to", "want to", "wanted to", "want to")),
    Modal(german_verb("sollen sollst soll sollte gesollt"), ("should", "should not", "", "")),
    Modal(german_verb("dürfen darfst darf durfte gedurft"), ("may", "must not", "was allowed to", "be allowed to")),
)


@dataclass(frozen=True)
class Clause:
    """One clause; the fields after `negated` are pairs (English, German) or phrases in the order of speaking."""

    subject: NounPhrase
    verb: Verb
    german_verb: GermanVerb
    tense: str  # present, past, future
    german_tense: str  # present, preterite, perfect, future
    modal: Modal | None = None
    negated: bool = False
    accusative: NounPhrase | None = None
    dative: NounPhrase | None = None
    dative_last: bool = False  # English: gives the book to the child
    frequency: tuple[str, str] = ("", "")
    manner: tuple[str, str] = ("", "")
    company: tuple[str, str] = ("", "")
    bound: tuple[str, str] = ("", "")  # what the verb cannot do without: its preposition, direction, place, predicate
    place: tuple[str, str] = ("", "")
    time: tuple[str, str] = ("", "")
    english_front: bool = False
    german_front: bool = False
    complement: tuple[str, str] = ("", "")

    # ---- English

    def english(self) -> str:
        front, end = (self.time[0] + ",", "") if self.time[0] and self.english_front else ("", self.time[0])
        return _join(front, self.subject.english, self._english_verb(), self._english_rest(), end, self.complement[0])

    def english_question(self) -> str:
        auxiliary, rest = self._english_question_verb()
        return _join(auxiliary, self.subject.english, self.frequency[0], rest, self._english_rest(), self.time[0])

    def english_infinitive(self) -> str:
        return _join("to", self.verb.base, self._english_rest())

    def _english_rest(self) -> str:
        objects = [phrase.as_object() for phrase in (self.dative, self.accusative) if phrase]
        if self.dative_last:
            objects = [objects[1], "to", objects[0]]
        return _join(*objects, self.bound[0], self.company[0], self.manner[0], self.place[0])

    def _english_verb(self) -> str:
        if not self.modal:
            return _english_finite(self.verb, self.subject, self.tense, self.negated, self.frequency[0])
        modal = self.modal.english[2 * (self.tense == "past") + self.negated]
        if modal in ("want to", "have to", "be allowed to"):
            past = {"want to": "wanted to", "have to": "had to", "be allowed to": "was allowed to"}[modal]
            modal = _english_finite(Verb(modal, past, ()), self.subject, self.tense, self.negated, "")
        elif modal == "was allowed to" and self.subject.english_person == "3p":
            modal = "were allowed to"
        return _join(modal, self.frequency[0], self.verb.base)

    def _english_question_verb(self) -> tuple[str, str]:
        if self.verb.base.startswith("be ") or self.verb.base == "be":
            word, _, rest = _english_finite(self.verb, self.subject, self.tense, False, "").partition(" ")
            return word, rest
        auxiliary = {"future": "will", "past": "did"}.get(self.tense, "does")
        if auxiliary == "does" and self.subject.english_person != "3s":
            auxiliary = "do"
        return auxiliary, self.verb.base

    # ---- German

    def german(self, order: str) -> str:
        """`order`: "second" (main clause), "first" (question, or behind a subordinate clause), "last" (subordinate)."""
        finite, end = self._german_verb()
        front = self.time[1] if order == "second" and self.german_front else ""
        middle = self._german_middle(with_time=not front)
        subject = self.subject.german["nom"]
        if order == "last":
            words = [subject, middle, end + finite if end and end == self.german_verb.prefix else _join(end, finite)]
        elif order == "first" or front:
            words = [front, finite, subject, middle, end]
        else:
            words = [subject, finite, middle, end]
        return _join(*words, self.complement[1])

    def german_infinitive(self) -> str:
        return _join(self._german_middle(with_time=True), self.german_verb.zu_infinitive())

    def _german_verb(self) -> tuple[str, str]:
        """The finite verb, and what closes the clause: separable prefix, participle or infinitive."""
        verb, person = self.german_verb, self.subject.person
        if self.modal:
            modal = self.modal.german
            finite = modal.preterite(person) if self.tense == "past" else modal.present(person)
            return finite, verb.prefix + verb.infinitive
        if self.german_tense == "perfect":
            return (SEIN if verb.with_sein else HABEN).present(person), verb.prefix + verb.participle
        if self.german_tense == "future":
            return WERDEN.present(person), verb.prefix + verb.infinitive
        return (verb.preterite(person) if self.german_tense == "preterite" else verb.present(person)), verb.prefix

    def _german_middle(self, with_time: bool) -> str:
        reflexive = REFLEXIVE[self.subject.person] if self.german_verb.reflexive else ""
        # Pronouns come first, the accusative one before the dative one.
        pairs = [(self.accusative, "acc"), (self.dative, "dat")]
        pronouns = [phrase.german[case] for phrase, case in pairs if phrase and phrase.pronoun]
        nouns = [phrase.german[case] for phrase, case in reversed(pairs) if phrase and not phrase.pronoun]
        time = self.time[1] if with_time else ""
        says_kein = any(phrase and phrase.negative for phrase, _ in pairs)
        negation = "nicht" if self.negated and not says_kein else ""
        return _join(
            reflexive, *pronouns, time, self.frequency[1], *nouns, negation,
            self.company[1], self.manner[1], self.place[1], self.bound[1],
        )


def _join(*words: str) -> str:
    return " ".join(filter(None, words)).replace(" ,", ",")


def _english_finite(verb: Verb, subject: NounPhrase, tense: str, negated: bool, frequency: str) -> str:
    if tense == "future":
        return _join("will not" if negated else "will", frequency, verb.base)
    word, _, rest = verb.base.partition(" ")
    if word == "be":
        present = {"1s": "am", "3s": "is", "3p": "are"}[subject.english_person]
        past = "were" if subject.english_person == "3p" else "was"
        return _join(present if tense == "present" else past, "not" if negated else "", frequency, rest)
    third = tense == "present" and subject.english_person == "3s"
    if negated:
        return _join("did not" if tense == "past" else "does not" if third else "do not", verb.base)
    return _join(frequency, verb.past if tense == "past" else verb.third_person() if third else verb.base)


def relative_pronoun(head: NounPhrase, english: str) -> NounPhrase:
    """The subject or object of a relative clause: who, that; der, die, das in the gender of its head."""
    column = COLUMNS.index(head.gender)
    return replace(head, english=english, german={case: RELATIVE[case][column] for case in CASES}, pronoun=True)


def with_relative_clause(head: NounPhrase, english: str, german: str) -> NounPhrase:
    forms = {case: f"{form}, {german}," for case, form in head.german.items()}
    return replace(head, english=f"{head.english} {english}", german=forms)
