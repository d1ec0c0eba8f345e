"""Draws the sentences of the demo's grammar: which pattern, which words, and the choices one language hides."""
from __future__ import annotations

from dataclasses import replace

from .clauses import (
    MODALS,
    Clause,
    NounPhrase,
    joined,
    name_phrase,
    noun_phrase,
    pronoun,
    relative_pronoun,
    with_relative_clause,
)
from .words import Adjective, Dice, GermanVerb, Lexicon, Noun, Verb, german_verb

# English conjunction, German ones, tenses of both clauses.
CONJUNCTIONS = (
    ("because", ("weil", "da"), ("present", "past")),
    ("when", ("wenn",), ("present",)),
    ("when", ("als",), ("past",)),
    ("if", ("wenn", "falls"), ("present",)),
    ("although", ("obwohl",), ("present", "past")),
    ("while", ("während",), ("present", "past")),
    ("before", ("bevor", "ehe"), ("present", "past")),
    ("as soon as", ("sobald",), ("present",)),
    ("until", ("bis",), ("present", "past")),
)
QUESTION_WORDS = (
    ("why", ("warum", "weshalb")),
    ("when", ("wann",)),
    ("where", ("wo",)),
    ("how", ("wie",)),
    ("with whom", ("mit wem",)),
)
DEGREES = (("very", "sehr"), ("quite", "ziemlich"), ("too", "zu"), ("so", "so"), ("really", "wirklich"))
COMPANY = (("with", "mit", "dat"), ("without", "ohne", "acc"), ("for", "für", "acc"))

SINGULAR = (("the", 50), ("a", 24), ("possessive", 16), ("this", 7), ("every", 3))
PLURAL = (
    ("the", 38), ("", 16), ("possessive", 14), ("these", 7), ("two", 6), ("many", 6), ("some", 5), ("three", 3),
    ("all", 3), ("four", 1), ("five", 1),
)
UNCOUNTABLE = (("the", 40), ("", 40), ("possessive", 12), ("this", 8))
NEGATABLE = ("a", "")  # with these, German says kein
COUNTABLE = ("person", "animal", "meal", "text", "thing", "tool", "clothes", "vehicle", "machine", "building", "matter")

EXIST = Verb("be", "was", (german_verb("sein bist ist war gewesen +s"),))
BECOME = Verb("become", "became", (german_verb("werden wirst wird wurde geworden +s"),))
GIBT = german_verb("geben gibst gibt gab gegeben")
IT = NounPhrase("it", dict.fromkeys(("nom", "acc", "dat"), "es"), pronoun=True)


class Grammar:
    """Draws sentences. `address` (du, Sie or ihr) holds for a whole sentence."""

    def __init__(self, dice: Dice, lexicon: Lexicon) -> None:
        self.dice = dice
        self.lexicon = lexicon
        self.address = "du"

    def sentence(self) -> tuple[str, str]:
        self.address = self.dice.pick(("du", "Sie", "ihr"), (5, 3, 2))
        pattern = self.dice.pick(
            (self.statement, self.with_conjunction, self.with_that, self.predicate, self.question, self.two_clauses,
             self.with_infinitive, self.existence, self.indirect_question),
            (38, 17, 12, 9, 8, 5, 5, 4, 4),
        )
        return tuple(_polish(text) for text in pattern())

    # ---- sentence patterns: (English, German) without the last touch

    def statement(self) -> tuple[str, str]:
        clause = self.clause(adverbs=True)
        return clause.english() + ".", clause.german("second") + "."

    def with_conjunction(self) -> tuple[str, str]:
        english, german, tenses = self.dice.zipf(CONJUNCTIONS)
        tense = self.dice.pick(tenses)
        main, side = self.clause(tense, adverbs=self.dice.chance(0.3)), self.clause(tense, weather=True)
        main = _without_front(main)
        word = self.dice.usual(german)
        if self.dice.chance(0.4):
            side_first = f"{word} {side.german('last')}, {main.german('first')}."
            return f"{english} {side.english()}, {main.english()}.", side_first
        # denn joins two main clauses, the other words a subordinate one.
        as_main = english == "because" and self.dice.chance(0.2)
        reason = f"denn {side.german('second')}" if as_main else f"{word} {side.german('last')}"
        return f"{main.english()} {english} {side.english()}.", f"{main.german('second')}, {reason}."

    def with_that(self) -> tuple[str, str]:
        verb = self.dice.zipf(self.lexicon.verbs["that", "person"])
        said = self.clause(adverbs=self.dice.chance(0.3))
        german = f", dass {said.german('last')}"
        if verb.extra and self.dice.chance(0.25):
            german = f", {said.german('second')}"
        that = "that " if self.dice.chance(0.75) else ""
        return self._with_complement(verb, that + _without_front(said).english(), german)

    def indirect_question(self) -> tuple[str, str]:
        verb = self.dice.zipf(self.lexicon.verbs["whether", "person"])
        asked = _without_front(self.clause())
        english, german = ("whether", ("ob",)) if self.dice.chance(0.5) else self.dice.zipf(QUESTION_WORDS)
        complement = f", {self.dice.usual(german)} {asked.german('last')}"
        return self._with_complement(verb, f"{english} {asked.english()}", complement)

    def with_infinitive(self) -> tuple[str, str]:
        verb = self.dice.zipf(self.lexicon.verbs["infinitive", "person"])
        subject = self.subject("person")
        done = self.clause("present", plain=True, subject=subject)
        return self._with_complement(verb, done.english_infinitive(), f", {done.german_infinitive()}", subject)

    def _with_complement(
        self, verb: Verb, english: str, german: str, subject: NounPhrase | None = None
    ) -> tuple[str, str]:
        clause = self.clause(subject=subject, verb=verb, adverbs=self.dice.chance(0.2), complement=(english, german))
        return clause.english() + ".", clause.german("second") + "."

    def two_clauses(self) -> tuple[str, str]:
        english, german = self.dice.pick((("and", "und"), ("but", "aber"), ("or", "oder")), (5, 4, 1))
        tense = self.dice.pick(("present", "past"))
        first, second = (self.clause(tense) for _ in range(2))
        comma = "," if german == "aber" else ""
        return (f"{first.english()}, {english} {second.english()}.",
                f"{first.german('second')}{comma} {german} {second.german('second')}.")

    def question(self) -> tuple[str, str]:
        clause = self.clause(self.dice.pick(("present", "past", "future"), (5, 4, 1)), plain=True, adverbs=True)
        english, german = clause.english_question(), clause.german("first")
        if self.dice.chance(0.35):
            asked, words = self.dice.zipf(QUESTION_WORDS)
            english, german = f"{asked} {english}", f"{self.dice.usual(words)} {german}"
        return english + "?", german + "?"

    def predicate(self) -> tuple[str, str]:
        """Something is old, someone became sick."""
        section = self.dice.zipf(COUNTABLE)
        subject = self.subject("person") if section == "person" else self.phrase([section])
        adjective = self.dice.zipf([a for a in self.lexicon.adjectives if section in a.sections])
        english, german = adjective.english, self.dice.usual(adjective.german)
        if self.dice.chance(0.4):
            degree = self.dice.pick(DEGREES)
            english, german = f"{degree[0]} {english}", f"{degree[1]} {german}"
        becomes = section == "person" and self.dice.chance(0.2)
        clause = self.clause(subject=subject, verb=BECOME if becomes else EXIST, adverbs=True, bound=(english, german))
        return clause.english() + ".", clause.german("second") + "."

    def existence(self) -> tuple[str, str]:
        """There is a dog in the garden: es gibt with the accusative, or the place in front."""
        past, plural = self.dice.chance(0.4), self.dice.chance(0.4)
        thing = self._noun_phrase(("person", "animal", "thing", "building"), plural, "a" if not plural else "two")
        place = self._place(location=True)
        be = {(False, False): "is", (False, True): "are", (True, False): "was", (True, True): "were"}[past, plural]
        exist = EXIST.german[0]
        person = "3p" if plural else "3s"
        if self.dice.chance(0.55):
            gibt = GIBT.preterite("3s") if past else GIBT.present("3s")
            german = f"es {gibt} {thing.german['acc']} {place[1]}."
        else:
            finite = exist.preterite(person) if past else exist.present(person)
            german = f"{place[1]} {finite} {thing.german['nom']}."
        return f"there {be} {thing.english} {place[0]}.", german

    # ---- clauses

    def clause(
        self,
        tense: str | None = None,
        adverbs: bool = False,
        plain: bool = False,
        weather: bool = False,
        subject: NounPhrase | None = None,
        kind: str = "",
        verb: Verb | None = None,
        relative: bool = False,
        complement: tuple[str, str] = ("", ""),
        bound: tuple[str, str] = ("", ""),
    ) -> Clause:
        """One clause. `plain`: no modal, no negation; `weather`: may be about it; a given `verb` draws no objects."""
        dice = self.dice
        tense = tense or dice.pick(("present", "past", "future"), (48, 42, 10))
        if weather and dice.chance(0.08):
            verb, subject, plain = dice.pick(self.lexicon.verbs["weather", "weather"]), IT, True
        kind = kind or ("animal" if not verb and not subject and dice.chance(0.1) else "person")
        subject = subject or self.subject(kind, simple=relative)
        modal = None
        if kind == "person" and tense != "future" and not (plain or verb) and dice.chance(0.16):
            modal = dice.pick([modal for modal in MODALS if tense == "present" or modal.english[2]])
        negated = not plain and dice.chance(0.15)
        frame = "given"
        if not verb:
            frame = self._frame(kind)
            verb = dice.zipf(self.lexicon.verbs[frame, kind])
        german = dice.usual(verb.german)
        parts = {"bound": bound, **self._arguments(frame, verb, subject, negated, relative)}
        if adverbs:
            parts.update(self._adverbs(tense, negated, frame))
        if complement[0]:
            parts["complement"] = complement
        return Clause(
            subject, verb, german, tense, self._german_tense(tense, subject, german, parts), modal, negated, **parts
        )

    def _frame(self, kind: str) -> str:
        if kind == "animal":
            return self.dice.pick(("intransitive", "transitive"), (1, 1))
        frames = ("transitive", "intransitive", "prepositional", "ditransitive", "motion", "location", "dative")
        return self.dice.pick(frames, (42, 13, 13, 10, 8, 7, 7))

    def _german_tense(self, tense: str, subject: NounPhrase, verb: GermanVerb, parts: dict) -> str:
        """The past is perfect or preterite, the future may be a present: which one, English does not say."""
        if tense == "past":
            if verb.infinitive in ("sein", "haben"):
                return "preterite"
            spoken_to = subject.english == "you"
            return "perfect" if spoken_to or self.dice.chance(0.45) else "preterite"
        if tense == "future" and parts.get("time", ("", ""))[0] and self.dice.chance(0.4):
            return "present"
        return tense

    def _arguments(self, frame: str, verb: Verb, subject: NounPhrase, negated: bool, relative: bool) -> dict:
        """The noun phrases that the verb asks for, as fields of the clause."""
        simple = relative or self.dice.chance(0.9)
        if frame == "transitive":
            return {"accusative": self.object(verb.sections, subject, negated, simple)}
        if frame == "dative":
            return {"dative": self.object(verb.sections, subject, False, simple)}
        if frame == "ditransitive":
            thing = self.phrase(verb.sections, negated)
            receiver = self.object(("person",), subject, False)
            to_receiver = bool(verb.extra) or self.dice.chance(0.3)
            return {"accusative": thing, "dative": receiver, "dative_last": to_receiver}
        if frame == "prepositional":
            english, german, case = verb.extra
            target = self.object(verb.sections, subject, False, simple)
            return {"bound": (f"{english} {target.as_object()}".removeprefix("- "), target.after(german, case))}
        if frame in ("motion", "location"):
            return {"bound": self._place(frame == "location", verb.sections)}
        return {}

    def _adverbs(self, tense: str, negated: bool, frame: str) -> dict:
        dice, adverbs = self.dice, self.lexicon.adverbs
        parts = {}
        if dice.chance(0.45):
            english, german, _ = dice.zipf([entry for entry in adverbs["time"] if tense in entry[2]])
            front = dice.chance(0.4)
            parts["time"] = (english, dice.usual(german))
            parts["english_front"], parts["german_front"] = front, dice.chance(0.9 if front else 0.25)
        elif not negated and tense != "future" and dice.chance(0.25):
            english, german, _ = dice.zipf(adverbs["frequency"])
            parts["frequency"] = (english, dice.usual(german))
        if frame not in ("given", "location") and dice.chance(0.15):
            english, german, _ = dice.zipf(adverbs["manner"])
            parts["manner"] = (english, dice.usual(german))
        if frame in ("transitive", "intransitive") and dice.chance(0.2):
            parts["place"] = self._place(location=True)
        elif frame in ("intransitive", "motion") and dice.chance(0.2):
            english, german, case = dice.pick(COMPANY[:2])
            companion = self.phrase(("person",))
            parts["company"] = (f"{english} {companion.as_object()}", companion.after(german, case))
        return parts

    # ---- noun phrases

    def subject(self, kind: str, simple: bool = False) -> NounPhrase:
        if kind == "person" and self.dice.chance(0.36):
            return pronoun(self.dice.pick(("I", "he", "she", "we", "they", "you"), (6, 5, 5, 4, 4, 5)), self.address)
        if kind == "person" and self.dice.chance(0.15):
            return name_phrase(self.dice.zipf(self.lexicon.names))
        head = self.phrase((kind,))
        if simple:
            return head
        if self.dice.chance(0.06):
            return joined(head, self.phrase((kind,)))
        return self.with_relative(head, kind) if self.dice.chance(0.07) else head

    def object(self, sections: tuple[str, ...], subject: NounPhrase, negated: bool, simple: bool = True) -> NounPhrase:
        """A noun phrase, or a pronoun for somebody else than the subject."""
        if "person" in sections and self.dice.chance(0.2):
            others = [p for p in ("I", "he", "she", "we", "they", "you") if p != subject.english]
            # "I" and "we" share a speaker: neither sees the other.
            others = [p for p in others if not {p, subject.english} <= {"I", "we"}]
            return pronoun(self.dice.pick(others), self.address)
        head = self.phrase(sections, negated)
        return head if simple or head.negative else self.with_relative(head, "thing")

    def phrase(self, sections: tuple[str, ...], negated: bool = False) -> NounPhrase:
        return self._noun_phrase(sections, self.dice.chance(0.27), None, negated)

    def _noun_phrase(
        self, sections: tuple[str, ...], plural: bool, determiner: str | None, negated: bool = False
    ) -> NounPhrase:
        section, noun = self._noun(sections)
        uncountable = noun.plural == "-"
        plural = plural and not uncountable
        if determiner is None:
            table = UNCOUNTABLE if uncountable else PLURAL if plural else SINGULAR
            determiner = self.dice.pick([word for word, _ in table], [weight for _, weight in table])
        if determiner == "possessive":
            determiner = self.dice.pick(("my", "your", "his", "her", "our", "their"), (6, 4, 5, 5, 3, 3))
        adjective = self._adjective(section) if self.dice.chance(0.33) else None
        return noun_phrase(
            noun.plural if plural else noun.singular, self.dice.usual(noun.german), plural, determiner, self.address,
            adjective, negative=negated and determiner in NEGATABLE,
        )

    def _noun(self, sections: tuple[str, ...]) -> tuple[str, Noun]:
        section = self.dice.zipf(sections)
        return section, self.dice.zipf(self.lexicon.nouns[section])

    def _adjective(self, section: str) -> tuple[Adjective, str]:
        adjective = self.dice.zipf([a for a in self.lexicon.adjectives if section in a.sections])
        return adjective, self.dice.usual(adjective.german)

    def _place(self, location: bool, sections: tuple[str, ...] = ("building", "outdoors")) -> tuple[str, str]:
        """In the garden, im Garten; or into it: in den Garten, zum Garten."""
        section, noun = self._noun(sections)
        english, german = noun.place
        determiner = self.dice.pick(("the", "a", "possessive", "this"), (75, 10, 8, 7))
        if determiner == "possessive":
            determiner = self.dice.pick(("my", "your", "his", "her", "our", "their"))
        adjective = self._adjective(section) if self.dice.chance(0.25) else None
        place = noun_phrase(noun.singular, self.dice.usual(noun.german), False, determiner, self.address, adjective)
        if location:
            return f"{english} {place.english}", place.after(german, "dat")
        if self.dice.chance(0.35):
            return f"to {place.english}", place.after("zu", "dat")
        return f"to {place.english}", place.after(german, "acc", place=True)

    def with_relative(self, head: NounPhrase, kind: str) -> NounPhrase:
        """The man who reads a book; the book that the woman buys."""
        tense = self.dice.pick(("present", "past"))
        if kind != "thing":
            who = relative_pronoun(head, "who" if kind == "person" else "that")
            clause = self.clause(tense, plain=True, subject=who, kind=kind, relative=True)
            return with_relative_clause(head, clause.english(), clause.german("last"))
        clause = self.clause(tense, plain=True, relative=True, verb=self.dice.zipf(self._owning_verbs()))
        object_ = relative_pronoun(head, "that").german["acc"]
        return with_relative_clause(head, f"that {clause.english()}", f"{object_} {clause.german('last')}")

    def _owning_verbs(self) -> list[Verb]:
        """Transitive verbs for whatever their object is: find, look for, need."""
        names = ("see", "find", "look for", "know", "need", "forget", "like", "lose")
        return [verb for verb in self.lexicon.verbs["transitive", "person"] if verb.base in names]


def _without_front(clause: Clause) -> Clause:
    return replace(clause, english_front=False, german_front=False)


def _polish(text: str) -> str:
    """Capital at the start; the comma that closes a relative clause gives way to the sign after it."""
    for sign in (".", "?", ","):
        text = text.replace("," + sign, sign)
    return text[0].upper() + text[1:]
