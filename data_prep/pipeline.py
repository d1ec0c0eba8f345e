"""From a published corpus to fairseq's binary data: texts, tokens, subwords, pieces, bin, each a stage of its own."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, TextIO, Tuple

import parallel_text
import subwords
import texts
from archives import gather
from blocks import map_blocks, run_apart
from corpora import Corpus, Part
from moses import NO_EMPTY_SIDE, Cleaning, Treatment
from splits import split_by_sentence
from texts import Pair
from tqdm import tqdm

Row = Tuple[str, ...]  # source and target as they were, if that is wanted, then source and target as the subwords get them
LEARNED_HERE = 20_000_000  # bytes of training text; subwords of more are learned in a process of their own


@dataclass(frozen=True)
class Settings:
    """What the data depends on beside the texts."""

    corpus: str
    pieces: str  # bpe or sentencepiece
    vocab: int  # merges or pieces
    train_pairs: Optional[int]  # the first so many that cleaning leaves; None: all
    held_out: Optional[int]  # sentences for valid and for test each, where a corpus comes without splits


# --- texts ------------------------------------------------------------------------------------------------------------


def part_files(part: Part) -> Iterator[str]:
    """Every file name under which the part may be found."""
    return itertools.chain.from_iterable(part.files.values())


def gather_texts(corpus: Corpus, folder: Path, out: Path) -> Dict[str, dict]:
    """Copy the corpus' texts from ``folder`` to ``out``; returns for each the file it came from, and its digest.

    Raises ``ValueError`` that names the first text that is missing.
    """
    wanted = {name for parts in corpus.splits.values() for part in parts for name in part_files(part)}
    offers = [offer for archive in corpus.archives for offer in archive]
    archives = {offer.name for offer in offers} | {url.rpartition("/")[2] for offer in offers for url in offer.urls}
    origins = gather(folder, archives, wanted, out)
    used: Dict[str, dict] = {}
    for part in (part for parts in corpus.splits.values() for part in parts):
        for names in part.files.values():
            name = next((name for name in names if name in origins), None)
            if name is None:
                raise ValueError(f"{folder} must hold {' or '.join(names)}, plain, as .gz or in an archive, but does not")
            used[name] = {"from": origins[name], "sha256": parallel_text.sha256_of(out / name)}
    return used


def pairs_of(corpus: Corpus, part: Part, folder: Path) -> Iterator[Pair]:
    """Source and target of a part whose files lie in ``folder``."""
    paths = {key: next(folder / name for name in names if (folder / name).exists()) for key, names in part.files.items()}
    if len(paths) == 2:
        yield from texts.aligned([paths[language] for language in corpus.languages])
        return
    [(columns, path)] = paths.items()
    order = [columns.split().index(language) for language in corpus.languages]
    for pair in texts.columns(path):
        yield pair[order[0]], pair[order[1]]


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What happens to the pairs of one split: ``given`` goes to the subwords, ``judged`` is what ``cleaning`` counts."""

    languages: Tuple[str, str]
    given: Treatment
    judged: Treatment
    cleaning: Optional[Cleaning]
    with_raw: bool  # whether the text as it was is wanted too


def rules_of(corpus: Corpus, settings: Settings, split: str) -> Rules:
    """BPE gets tokens, sentencepiece gets text; which pairs are kept does not depend on that."""
    is_train = split == "train"
    treatment = corpus.train if is_train else corpus.held_out
    given = replace(treatment, tokenise=settings.pieces == "bpe")
    if not is_train:
        return Rules(corpus.languages, given, given, None, True)
    with_raw = corpus.every_nth_to_valid is not None
    if corpus.cleaned_as_pieces:
        return Rules(corpus.languages, given, given, NO_EMPTY_SIDE, with_raw)
    return Rules(corpus.languages, given, treatment, corpus.cleaning, with_raw)


def make_tokens(corpus: Corpus, settings: Settings, folder: Path, out: Path, jobs: int) -> Dict[str, object]:
    """Write ``out/SPLIT.LANG``, treated and cleaned, and ``out/raw/NAME.LANG`` of what is held out, as it was."""
    counts: Dict[str, Counter] = {}
    (out / "raw").mkdir()
    for split, pairs in _splits(corpus, settings, folder, counts):
        tally = counts.setdefault(split, Counter())
        treat = functools.partial(treat_block, rules=rules_of(corpus, settings, split))
        rows = _rows(map_blocks(treat, _bar(pairs, f"tokens {split}", "pairs"), jobs), tally)
        if split == "train" and corpus.every_nth_to_valid:
            rows = _valid_apart(rows, corpus, out, counts.setdefault("valid", Counter()))
        limit = settings.train_pairs if split == "train" else None
        with _files(out, _names(corpus, split)) as files:
            for row in rows:
                if limit is not None and tally["kept"] == limit:
                    tally["over_train_pairs"] += 1
                    continue
                tally["kept"] += 1
                _write_row(row, files)
    _check_not_empty(counts)
    return {"counts": counts}


def treat_block(pairs: List[Pair], rules: Rules) -> Tuple[List[Row], Counter]:
    """Rows of the pairs that the rules keep, and how many were read and dropped why."""
    rows, tally = [], Counter(read=len(pairs))
    for pair in pairs:
        judged = [rules.judged.apply(line, language) for line, language in zip(pair, rules.languages)]
        fault = rules.cleaning.fault(*judged) if rules.cleaning else None
        if fault:
            tally[fault] += 1
            continue
        given = judged
        if rules.given != rules.judged:
            given = [rules.given.apply(line, language) for line, language in zip(pair, rules.languages)]
        raw = map(texts.one_line, pair) if rules.with_raw else ()
        rows.append((*raw, *given))
    return rows, tally


def _splits(
    corpus: Corpus, settings: Settings, folder: Path, counts: Dict[str, Counter]
) -> Iterator[Tuple[str, Iterable[Pair]]]:
    """Each split's name and pairs, the held-out ones of a corpus without splits drawn from it."""
    by_split = {
        split: itertools.chain.from_iterable(pairs_of(corpus, part, folder) for part in parts)
        for split, parts in corpus.splits.items()
    }
    if corpus.by_sentence and settings.held_out:
        key = corpus.languages.index(corpus.by_sentence)
        by_split, left_out = split_by_sentence(by_split["all"], key, settings.held_out)
        counts["train"] = Counter(shared_with_held_out=left_out)
    yield from by_split.items()


def _rows(blocks: Iterable[Tuple[list, Counter]], tally: Counter) -> Iterator[Tuple[str, ...]]:
    for rows, counted in blocks:
        tally.update(counted)
        yield from rows


def _valid_apart(rows: Iterable[Row], corpus: Corpus, out: Path, tally: Counter) -> Iterator[Row]:
    """Write every n-th of ``rows`` to valid and give the others on."""
    with _files(out, _names(corpus, "valid")) as files:
        for number, row in enumerate(rows, 1):
            if number % corpus.every_nth_to_valid:
                yield row
            else:
                tally.update(read=1, kept=1)
                _write_row(row, files)


def _names(corpus: Corpus, split: str) -> List[str]:
    """The files of a split in the order of a row, the raw ones only for what is held out."""
    raw = [] if split == "train" else [f"raw/{corpus.raw_names[split]}.{language}" for language in corpus.languages]
    return raw + [f"{split}.{language}" for language in corpus.languages]


@contextlib.contextmanager
def _files(folder: Path, names: Iterable[str]) -> Iterator[List[TextIO]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open(folder / name, "w", encoding="utf-8", newline="\n")) for name in names]


def _write_row(row: Tuple[str, ...], files: List[TextIO]) -> None:
    """The last columns of ``row``, as many as there are files."""
    for line, file in zip(row[-len(files) :], files):
        file.write(line + "\n")


def _check_not_empty(counts: Dict[str, Counter]) -> None:
    empty = [split for split, tally in counts.items() if not tally["kept"]]
    if empty:
        raise ValueError(f"the texts must leave pairs for {' and '.join(empty)}, but none is left after cleaning")


# --- subwords, pieces, bin --------------------------------------------------------------------------------------------


def learn_subwords(corpus: Corpus, settings: Settings, tokens: Path, out: Path, jobs: int) -> Dict[str, object]:
    """One model for both languages, from the training pairs only: anything else would leak the test sets."""
    paths = [tokens / f"train.{language}" for language in corpus.languages]
    size = sum(path.stat().st_size for path in paths)
    if size < LEARNED_HERE:
        return learn_from(paths, settings, out, jobs)
    # The allocator would keep the gigabytes of a large text while the later stages want theirs.
    return run_apart(learn_from, paths, settings, out, jobs)


def learn_from(paths: List[Path], settings: Settings, out: Path, jobs: int) -> Dict[str, object]:
    """The model of all lines of ``paths``, in ``out``."""
    if settings.pieces == "sentencepiece":
        characters = sum(path.stat().st_size for path in paths)
        path = out / subwords.SENTENCEPIECE_FILE
        return subwords.learn_pieces(map(texts.lines_of, paths), characters, settings.vocab, path)
    counts: Counter = Counter()
    lines = itertools.chain.from_iterable(map(texts.lines_of, paths))
    for block in map_blocks(subwords.count_words, _bar(lines, "words", "lines"), jobs):
        counts.update(block)
    return subwords.learn_codes(counts, settings.vocab, out / subwords.BPE_FILE)


def make_pieces(corpus: Corpus, settings: Settings, tokens: Path, model: Path, out: Path, jobs: int) -> Dict[str, object]:
    """Write ``out/SPLIT.LANG`` with blanks between the subwords, cleaned again where the corpus asks for it."""
    counts: Dict[str, Counter] = {}
    path = str(model / (subwords.BPE_FILE if settings.pieces == "bpe" else subwords.SENTENCEPIECE_FILE))
    for split in split_names(corpus):
        tally = counts.setdefault(split, Counter())
        cleaning = corpus.cleaning if split == "train" and corpus.cleaned_as_pieces else None
        lines = zip(*(texts.lines_of(tokens / f"{split}.{language}") for language in corpus.languages))
        cut = functools.partial(split_block, path=path, cleaning=cleaning)
        with _files(out, [f"{split}.{language}" for language in corpus.languages]) as files:
            for row in _rows(map_blocks(cut, _bar(lines, f"pieces {split}", "pairs"), jobs), tally):
                tally["kept"] += 1
                _write_row(row, files)
    _check_not_empty(counts)
    return {"counts": counts}


def split_block(pairs: List[Pair], path: str, cleaning: Optional[Cleaning]) -> Tuple[List[Pair], Counter]:
    """Pairs of lines as pieces, by the model at ``path``, and why how many are dropped."""
    sides = [subwords.split_lines(list(side), path) for side in zip(*pairs)]
    kept, dropped = [], Counter(read=len(pairs))
    for pair in zip(*sides):
        fault = cleaning.fault(*pair) if cleaning else None
        if fault:
            dropped[fault] += 1
        else:
            kept.append(pair)
    return kept, dropped


def binarise(corpus: Corpus, pieces: Path, out: Path, jobs: int) -> Dict[str, object]:
    """fairseq's binary data in ``out``; its log names folders of this machine and is not kept."""
    splits = {"train": ["train"], "valid": ["valid"], "test": [name for name in split_names(corpus) if name.startswith("test")]}
    parallel_text.binarise(pieces, out, corpus.source, corpus.target, splits, jobs)
    (out / "preprocess.log").unlink()
    dictionary = out / f"dict.{corpus.target}.txt"
    return {
        "dictionary_lines": len(parallel_text.read_lines(dictionary)),
        "dictionary_sha256": parallel_text.sha256_of(dictionary),
    }


def split_names(corpus: Corpus) -> List[str]:
    """train, valid, test, and fairseq's names of further test sets."""
    return ["train", *corpus.raw_names]


def _bar(items: Iterable, text: str, unit: str) -> Iterable:
    return tqdm(items, desc=text, unit=f" {unit}", unit_scale=True, leave=False, disable=None)
