"""data_prep on small archives of the published layouts: exact splits, broken and hostile input, kills, second runs."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gzip
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path

import data_prep_corpora as made
import pytest
from fairseq_runs import ROOT

import archives  # isort: skip
import blocks  # isort: skip
import corpora  # isort: skip
import download  # isort: skip
import moses  # isort: skip
import multi30k  # isort: skip
import options  # isort: skip
import parallel_text  # isort: skip
import pipeline  # isort: skip
import prepare  # isort: skip
import splits  # isort: skip
import stages  # isort: skip
import subwords  # isort: skip
import texts  # isort: skip
from download import Published  # isort: skip
from sacremoses import MosesPunctNormalizer, MosesTokenizer  # isort: skip
from subword_nmt.apply_bpe import BPE  # isort: skip
from subword_nmt.learn_bpe import learn_bpe  # isort: skip

IWSLT, WMT = "iwslt14_de_en", "wmt16_en_de"
MERGES = 150


def settings(corpus: str, **changes: object) -> pipeline.Settings:
    common = dict(corpus=corpus, pieces=corpora.CORPORA[corpus].pieces, vocab=MERGES, train_pairs=None, held_out=None)
    return pipeline.Settings(**{**common, **changes})


def make_pieces(corpus: str, source: Path, out: Path, jobs: int = 1, **changes: object) -> dict:
    """All stages but fairseq's, in ``out``; returns the counts by stage."""
    chosen, about = settings(corpus, **changes), corpora.CORPORA[corpus]
    at = {name: out / name for name in ("texts", "tokens", "subwords", "pieces")}
    for folder in at.values():
        folder.mkdir(parents=True)
    pipeline.gather_texts(about, source, at["texts"])
    tokens = pipeline.make_tokens(about, chosen, at["texts"], at["tokens"], jobs)
    learned = pipeline.learn_subwords(about, chosen, at["tokens"], at["subwords"], jobs)
    pieces = pipeline.make_pieces(about, chosen, at["tokens"], at["subwords"], at["pieces"], jobs)
    return {"tokens": tokens["counts"], "subwords": learned, "pieces": pieces["counts"]}


def read(folder: Path, *names: str) -> list:
    """Columns of the named files: each line's text in each of them, split at newlines only."""
    return list(zip(*((folder / name).read_bytes().decode().split("\n")[:-1] for name in names)))


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def iwslt_source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("iwslt"), {"de-en.tgz": made.tgz(made.iwslt14_texts())})


@pytest.fixture(scope="module")
def wmt_source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("wmt"), made.wmt16_archives())


# --- slow references: the published scripts' rules, line by line, written apart from data_prep -------------------------


def reference_tokens(line: str, language: str, hyphens: bool = False) -> str:
    """tokenizer.perl by sacremoses, with the two things in which it differs: Perl's \\s, and the dot of the last word."""
    line = "".join(c for c in line if c not in "\x1c\x1d\x1e\x1f")
    words = MosesTokenizer(language).tokenize(line, aggressive_dash_splits=hyphens)
    if words and words[-1].endswith(".") and not words[-1].endswith("..") and words[-1] != ".":
        words[-1:] = [words[-1][:-1], "."]
    return " ".join(words)


def reference_keeps(source: str, target: str, most: int) -> bool:
    """clean-corpus-n.perl -ratio 1.5 with a minimum of 1."""
    a, b = len(source.split()), len(target.split())
    if not a or not b or a > most or b > most or a / b > 1.5 or b / a > 1.5:
        return False
    return max(map(len, source.split() + target.split())) <= 1000


def reference_bpe(train: list, other: list, merges: int) -> list:
    """subword-nmt as its command line runs it: codes from the text of both languages, one after the other."""
    codes = io.StringIO()
    text = "".join(line + "\n" for side in zip(*train) for line in side)
    with contextlib.redirect_stderr(io.StringIO()):
        learn_bpe(io.StringIO(text), codes, merges)
    bpe = BPE(codes)
    return [tuple(bpe.process_line(line) for line in pair) for pair in other]


def reference_iwslt(files: dict) -> dict:
    sides = {}
    for language in ("de", "en"):
        lines = []
        for line in files[f"de-en/train.tags.de-en.{language}"].decode().split("\n")[:-1]:
            if "<url>" in line or "<talkid>" in line or "<keywords>" in line:
                continue
            for tag in ("<title>", "</title>", "<description>", "</description>"):
                line = line.replace(tag, "")
            lines.append(reference_tokens(line, language))
        sides[language] = lines
    kept = [pair for pair in zip(sides["de"], sides["en"]) if reference_keeps(*pair, 175)]
    lowered = [tuple("".join(c.lower() for c in line) for line in pair) for pair in kept]
    test = []
    for name in made.TED_SETS:
        columns = []
        for language in ("de", "en"):
            text = files[f"de-en/IWSLT14.{name}.de-en.{language}.xml"].decode()
            found = re.findall(r'<seg id="\d+">\s*(.*?)\s*</seg>', text)
            columns.append([reference_tokens(line.replace("’", "'"), language).lower() for line in found])
        test += zip(*columns)
    return {
        "train": [pair for number, pair in enumerate(lowered, 1) if number % 23],
        "valid": [pair for number, pair in enumerate(lowered, 1) if number % 23 == 0],
        "test": test,
    }


def reference_wmt(source: Path) -> dict:
    """prepare-wmt14en2de.sh's rules for the training text of WMT'16, newstest2013 and 2014 held out."""
    texts_by_name = {}
    for path in source.glob("*.tgz"):
        with tarfile.open(path) as archive:
            files = [info for info in archive if info.isfile()]
            texts_by_name.update((Path(info.name).name, archive.extractfile(info).read().decode()) for info in files)

    def train_line(line: str, language: str) -> str:
        line = MosesPunctNormalizer(language, perl_parity=True).normalize(line + "\n")
        line = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in line)
        return reference_tokens(line, language, hyphens=True)

    train = []
    for name in ("europarl-v7", "commoncrawl", "news-commentary-v11"):
        sides = [texts_by_name[f"{name}.de-en.{language}"].split("\n")[:-1] for language in ("en", "de")]
        train += [(train_line(en, "en"), train_line(de, "de")) for en, de in zip(*sides)]
    held_out = {"valid": [], "test": []}
    for language in ("en", "de"):
        lines = texts_by_name[f"newstest2013.{language}"].split("\n")[:-1]
        held_out["valid"].append(lines)
        found = re.findall(r"<seg[^>]*>\s*(.*?)\s*</seg>", texts_by_name[f"newstest2014-deen-src.{language}.sgm"])
        held_out["test"].append(found)
    result = {
        split: [
            tuple(reference_tokens(line.replace("’", "'"), language, True) for line, language in zip(pair, ("en", "de")))
            for pair in zip(*sides)
        ]
        for split, sides in held_out.items()
    }
    train = [pair for pair in train if all(pair)]  # an empty side cannot pass the cleaning
    result["train"] = train
    result["train_pieces"] = [pair for pair in reference_bpe(train, train, MERGES) if reference_keeps(*pair, 250)]
    return result


# --- exact splits -----------------------------------------------------------------------------------------------------


def test_iwslt14_is_what_the_script_makes(iwslt_source, tmp_path):
    counts = make_pieces(IWSLT, iwslt_source, tmp_path)
    expected = reference_iwslt(made.iwslt14_texts())
    for split, pairs in expected.items():
        assert read(tmp_path / "tokens", f"{split}.de", f"{split}.en") == pairs, split
        pieces = reference_bpe(expected["train"], pairs, MERGES)
        assert read(tmp_path / "pieces", f"{split}.de", f"{split}.en") == pieces, split
        assert counts["pieces"][split]["kept"] == len(pairs)
    tally = counts["tokens"]["train"]
    # 150 sentences and ten odd ones, a title and a description for each of 23 talks
    assert tally["read"] == 150 + 10 + 2 * 23
    assert {fault: tally[fault] for fault in ("empty", "length", "long_word")} == dict(empty=1, length=1, long_word=1)
    assert tally["kept"] == tally["read"] - sum(tally[fault] for fault in ("empty", "length", "ratio", "long_word")) - len(
        expected["valid"]
    )
    assert len(expected["valid"]) == (tally["kept"] + len(expected["valid"])) // 23


def test_iwslt14_raw_is_the_reference_as_published(iwslt_source, tmp_path):
    make_pieces(IWSLT, iwslt_source, tmp_path)
    raw = read(tmp_path / "tokens/raw", "test.de", "test.en")
    assert raw[0] == ("Das ist’s „wahr“, nicht?", "It’s “true”, isn’t it?")
    assert len(raw) == 40 and not any("<seg" in line for pair in raw for line in pair)
    tokens = read(tmp_path / "tokens", "valid.de", "valid.en")
    raw = read(tmp_path / "tokens/raw", "valid.de", "valid.en")
    for pair, text in zip(tokens, raw):
        assert pair == tuple(reference_tokens(line, lang).lower() for line, lang in zip(text, ("de", "en")))


def test_sentencepiece_has_the_same_pairs(iwslt_source, tmp_path):
    make_pieces(IWSLT, iwslt_source, tmp_path / "bpe")
    make_pieces(IWSLT, iwslt_source, tmp_path / "sp", pieces="sentencepiece", vocab=120)
    expected = reference_iwslt(made.iwslt14_texts())
    model = parallel_text.SentencePieceProcessor(model_file=str(tmp_path / "sp/subwords/subwords.model"))
    for split, pairs in expected.items():
        text = read(tmp_path / "sp/tokens", f"{split}.de", f"{split}.en")
        tokens = [tuple(map(reference_tokens, pair, ("de", "en"))) for pair in text]
        # \x1c is a blank to one and nothing to the other, so blanks do not count here.
        assert [tuple("".join(line.split()) for line in pair) for pair in tokens] == [
            tuple("".join(line.split()) for line in pair) for pair in pairs
        ], "the same pairs, lower case, but as text"
        pieces = read(tmp_path / "sp/pieces", f"{split}.de", f"{split}.en")
        assert pieces == [tuple(" ".join(model.encode(line, out_type=str)) for line in pair) for pair in text]
    for name in ("test.de", "valid.en"):
        assert (tmp_path / "sp/tokens/raw" / name).read_bytes() == (tmp_path / "bpe/tokens/raw" / name).read_bytes()


def test_wmt16_is_what_the_rules_make(wmt_source, tmp_path):
    counts = make_pieces(WMT, wmt_source, tmp_path)
    expected = reference_wmt(wmt_source)
    for split in ("train", "valid", "test"):
        assert read(tmp_path / "tokens", f"{split}.en", f"{split}.de") == expected[split], split
    assert read(tmp_path / "pieces", "train.en", "train.de") == expected["train_pieces"]
    assert read(tmp_path / "pieces", "test.en", "test.de") == reference_bpe(expected["train"], expected["test"], MERGES)
    assert counts["tokens"]["train"]["empty"] == 1
    assert {"ratio", "length"} <= set(counts["pieces"]["train"]), "cleaned by the number of pieces"
    assert any("@-@" in line for pair in expected["train"] for line in pair)


def test_newstest_has_the_sets_of_its_years(tmp_path):
    pairs = made.grammar_pairs(70, seed=5)
    train = [part.name for part in corpora.NEWSTEST.splits["train"]]
    assert len(train) == 14 and not any(year in name for name in train for year in ("2013", "2014"))
    names = [*train, "newstest2013", "newstest2014"]
    for number, name in enumerate(names):
        for side, language in enumerate(("en", "de")):
            text = made.plain_text([pair[side] for pair in pairs[4 * number : 4 * number + 4]])
            write(tmp_path / "source", {f"{name}.{language}.gz": gzip.compress(text)})
    make_pieces("newstest_de_en", tmp_path / "source", tmp_path / "out", vocab=90, pieces="sentencepiece")
    swapped = [(german, english) for english, german in pairs]
    for split, expected in (("train", swapped[:56]), ("valid", swapped[56:60]), ("test", swapped[60:64])):
        assert read(tmp_path / "out/tokens", f"{split}.de", f"{split}.en") == expected


def test_newstest_takes_either_side_of_the_sgm_files(tmp_path):
    part = corpora.NEWSTEST.splits["test"][0]
    source = {
        "newstest2014-deen-src.de.sgm": made.segment_text(["Eins."]),
        "newstest2014-deen-ref.en.sgm": made.segment_text(["One."]),
    }
    assert list(pipeline.pairs_of(corpora.NEWSTEST, part, write(tmp_path, source))) == [("Eins.", "One.")]


@pytest.mark.parametrize("name", ["deu-eng.zip", "deu-eng.tsv.gz"])
def test_tatoeba_splits_share_no_sentence(name, tmp_path):
    rows = made.tatoeba_rows()
    text = "".join(f"{english}\t{german}\n" for english, german in rows).encode()
    write(tmp_path / "source", {name: made.tatoeba_zip(rows) if name.endswith("zip") else gzip.compress(text)})
    counts = make_pieces("tatoeba_de_en", tmp_path / "source", tmp_path / "out", held_out=20, pieces="sentencepiece", vocab=90)
    found = {split: read(tmp_path / "out/tokens", f"{split}.de", f"{split}.en") for split in ("train", "valid", "test")}
    for one, other in itertools.combinations(found, 2):
        for side in (0, 1):
            assert not {pair[side] for pair in found[one]} & {pair[side] for pair in found[other]}, (one, other)
    left_out = counts["tokens"]["train"]["shared_with_held_out"]
    assert left_out > 0 and sum(map(len, found.values())) + left_out == len(rows)
    assert len({pair[1] for pair in found["test"]}) == 20
    # Every translation of a sentence is in its split, in the order of the file.
    english = {pair[1] for pair in found["test"]}
    assert found["test"] == [(german, sentence) for sentence, german in rows if sentence in english]


def test_which_sentences_are_held_out_does_not_depend_on_the_order():
    rows = made.tatoeba_rows()
    first, _ = splits.split_by_sentence(rows, 0, 20)
    second, _ = splits.split_by_sentence(list(reversed(rows)), 0, 20)
    assert {split: sorted(pairs) for split, pairs in first.items()} == {split: sorted(pairs) for split, pairs in second.items()}


def test_train_pairs_cuts_nothing_but_train(iwslt_source, tmp_path):
    make_pieces(IWSLT, iwslt_source, tmp_path / "all")
    counts = make_pieces(IWSLT, iwslt_source, tmp_path / "some", train_pairs=50)
    assert read(tmp_path / "some/tokens", "train.de") == read(tmp_path / "all/tokens", "train.de")[:50]
    assert read(tmp_path / "some/tokens", "valid.de") == read(tmp_path / "all/tokens", "valid.de")
    assert counts["tokens"]["train"]["over_train_pairs"] == len(read(tmp_path / "all/tokens", "train.de")) - 50


def test_multi30k_is_the_same_by_both_doors(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_text, "binarise", faked_binarise)
    pairs = made.grammar_pairs(66, seed=30)
    for number, parts in enumerate(corpora.MULTI30K.splits.values()):
        drawn = pairs[:30] if number == 0 else pairs[21 + 9 * number : 30 + 9 * number]
        for side, language in enumerate(("en", "de")):
            write(tmp_path / "source", {f"{parts[0].name}.{language}": made.plain_text([pair[side] for pair in drawn])})
    multi30k.prepare(tmp_path / "old", tmp_path / "source", multi30k.Settings(None, 80, "unigram"))
    make_pieces("multi30k_en_de", tmp_path / "source", tmp_path / "new", vocab=80)
    new, old = contents(tmp_path / "new"), contents(tmp_path / "old")
    assert new[Path("subwords/subwords.model")] == old[Path("subwords.model")]
    for split, name in {"train": "train", **corpora.MULTI30K.raw_names}.items():
        for language in ("en", "de"):
            assert new[Path(f"pieces/{split}.{language}")] == old[Path(f"pieces/{name}.{language}")], split
            if split != "train":
                assert new[Path(f"tokens/raw/{name}.{language}")] == old[Path(f"raw/{name}.{language}")]


# --- lines ------------------------------------------------------------------------------------------------------------


def test_several_processes_change_nothing(iwslt_source, tmp_path, monkeypatch):
    make_pieces(IWSLT, iwslt_source, tmp_path / "one")
    monkeypatch.setattr(blocks, "BLOCK_ITEMS", 40)
    monkeypatch.setattr(pipeline, "LEARNED_HERE", 0)
    make_pieces(IWSLT, iwslt_source, tmp_path / "two", jobs=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_few_blocks_are_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ITEMS", 1)
    drawn = 0

    def items():
        nonlocal drawn
        for number in range(60):
            drawn += 1
            yield number

    for done, result in enumerate(blocks.map_blocks(sum, items(), 2)):
        assert result == done
        assert drawn <= done + 2 * blocks.AHEAD + 1
    assert drawn == 60


def test_a_worker_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ITEMS", 1)
    with pytest.raises(RuntimeError, match="worker process was killed.*--jobs"):
        list(blocks.map_blocks(made.kill_this_process, range(9), 2))


def test_lines_end_at_newlines_only(tmp_path):
    line = "a\u2028b\u0085c\x0bd\x1ce\rf\x00g"
    write(tmp_path, {"text": f"\ufeff{line}\nlast".encode()})
    assert list(texts.lines_of(tmp_path / "text")) == [line, "last"], "a byte order mark is no text"
    assert texts.one_line(line) == "a b c d e f g" == texts.plain(f" {line}\xa0 ")


@pytest.mark.parametrize("text, tokens", [
    ("It ends in the U.S.", "It ends in the U.S ."),  # Moses splits the last dot, always
    ("The U.S. is big...", "The U.S. is big ..."),
    ("She said 'go.'", "She said &apos; go . &apos;"),
    ("a\x1cb\x07c \x00", "abc"),
])  # fmt: skip
def test_tokens_are_those_of_moses(text, tokens):
    """As tokenizer.perl -l en prints them."""
    assert moses.tokenise(text, "en") == tokens


@pytest.mark.parametrize("text, normal", [
    ('Er sagte: "Das ist alles."', 'Er sagte: "Das ist alles".'),
    ("„Ja“ – sagte er…", '"Ja" - sagte er...'),
    ("3 % (von 5)", "3% (von 5)"),
])  # fmt: skip
def test_punctuation_is_that_of_moses(text, normal):
    """As normalize-punctuation.perl de prints it."""
    assert moses.Treatment(normalise=True).apply(text, "de") == normal


def test_bpe_leaves_rare_words_out_where_memory_is_short(tmp_path, monkeypatch):
    counts = subwords.count_words(["tief tiefer tiefer Tiefe", "tief tiefer  Seltenes"])
    assert counts == {"tief": 2, "tiefer": 3, "Tiefe": 1, "Seltenes": 1}
    assert subwords.learn_codes(counts, 4, tmp_path / "all")["rare_words_left_out"] == 0
    monkeypatch.setattr(subwords, "MOST_INDEXED_CHARACTERS", 12)
    learned = subwords.learn_codes(counts, 4, tmp_path / "some")
    assert learned == {"words": 4, "rare_words_left_out": 2, "merges": 4}
    assert (tmp_path / "some").read_text().split("\n")[1:4] == ["t i", "ti e", "tie f"]


def test_sentencepiece_learns_from_every_nth_line_of_a_large_text(tmp_path, monkeypatch):
    lines = [[pair[side] for pair in made.grammar_pairs(200, seed=2)] for side in (0, 1)]
    characters = sum(len(line) for side in lines for line in side)
    monkeypatch.setattr(subwords, "MOST_SENTENCEPIECE_CHARACTERS", characters // 2 + 1)
    assert subwords.learn_pieces(lines, characters, 80, tmp_path / "m") == {"lines_learned_from": 200, "every_nth": 2}


# --- archives ---------------------------------------------------------------------------------------------------------


HOSTILE = {
    "up": (made.member("de-en/../../evil"), "'de-en/../../evil'"),
    "absolute": (made.member("/etc/evil"), "'/etc/evil'"),
    "drive": (made.member("C:\\evil"), "evil"),
    "link": (made.member("de-en/train.tags.de-en.fr", tarfile.SYMTYPE, "/etc/passwd"), None),
    "wanted link": (made.member("train.tags.de-en.de", tarfile.SYMTYPE, "/etc/passwd"), "link"),
    "wanted hard link": (made.member("train.tags.de-en.de", tarfile.LNKTYPE, "/etc/passwd"), "link"),
    "wanted device": (made.member("train.tags.de-en.de", tarfile.CHRTYPE), "device"),
    "twice": (made.member("again/train.tags.de-en.en"), "several"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_write_nothing(case, tmp_path):
    info, word = HOSTILE[case]
    data = made.tgz({"de-en/train.tags.de-en.en": b"One.\n"}, (info,))
    write(tmp_path / "source", {"de-en.tgz": data})
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    wanted = {"train.tags.de-en.en", "train.tags.de-en.de"}
    if word is None:  # a link that nobody asks for is not followed, nor made
        assert archives.extract(tmp_path / "source/de-en.tgz", wanted, out) == {"train.tags.de-en.en": 5}
    else:
        with pytest.raises(ValueError, match=re.escape(word)) as error:
            archives.extract(tmp_path / "source/de-en.tgz", wanted, out)
        assert "de-en.tgz must hold" in str(error.value) and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {"source", "de-en.tgz", "deep", "out", "train.tags.de-en.en"}


def test_hostile_zip_is_refused(tmp_path):
    write(tmp_path, {"deu-eng.zip": made.zipped({"../deu.txt": b"Hi.\tHallo!\n"})})
    with pytest.raises(ValueError, match=r"must hold paths below its own folder, but has the member '\.\./deu\.txt'"):
        archives.extract(tmp_path / "deu-eng.zip", {"deu.txt"}, tmp_path)
    link = io.BytesIO()
    with archives.zipfile.ZipFile(link, "w") as archive:
        info = archives.zipfile.ZipInfo("deu.txt")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    write(tmp_path, {"deu-eng.zip": link.getvalue()})
    with pytest.raises(ValueError, match="must hold deu.txt as a plain file, but holds a link"):
        archives.extract(tmp_path / "deu-eng.zip", {"deu.txt"}, tmp_path)


# --- the command: what is refused, in one sentence, leaving nothing ----------------------------------------------------


def run(capsys: pytest.CaptureFixture, corpus: str, out: Path, *options: object) -> tuple:
    """Exit status of prepare.py and the lines on stderr."""
    capsys.readouterr()
    status = prepare.main([corpus, "--out", str(out), "--jobs", "1", *map(str, options)])
    return status, capsys.readouterr().err.splitlines()


def broken_iwslt(change: dict) -> bytes:
    return made.tgz({**made.iwslt14_texts(30, 3), **change})


def damage(case: str) -> dict:
    """Files of a source folder that cannot be used."""
    whole = made.tgz(made.iwslt14_texts(30, 3))
    english = made.iwslt14_texts(30, 3)["de-en/train.tags.de-en.en"]
    return {
        "truncated gzip": {"de-en.tgz": whole[: len(whole) // 2]},
        "truncated tar": {"de-en.tgz": gzip.compress(gzip.decompress(whole)[:3000])},
        "flipped bits": {"de-en.tgz": whole[:2000] + bytes(b ^ 0x55 for b in whole[2000:2020]) + whole[2020:]},
        "no archive": {"de-en.tgz": b"<html>log in first</html>"},
        "empty archive": {"de-en.tgz": b""},
        "a set is missing": {
            "de-en.tgz": made.tgz({"de-en/train.tags.de-en.de": b"Eins.\n", "de-en/train.tags.de-en.en": b"One.\n"})
        },
        "unequal lines": {"de-en.tgz": broken_iwslt({"de-en/train.tags.de-en.en": english + b"One more.\n"})},
        "unequal segments": {
            "de-en.tgz": broken_iwslt({"de-en/IWSLT14.TED.tst2011.de-en.de.xml": made.segment_text(["Eins."])})
        },
        "not utf-8": {"de-en.tgz": broken_iwslt({"de-en/train.tags.de-en.en": english.replace(b"<talkid>0", b"<talkid>\xe4")})},
        "nothing left": {"de-en.tgz": broken_iwslt({f"de-en/train.tags.de-en.{lang}": b"\n\n" for lang in ("de", "en")})},
    }[case]


REFUSED = {
    "truncated gzip": ["de-en.tgz", "whole archive"],
    "truncated tar": ["de-en.tgz", "whole archive"],
    "flipped bits": ["de-en.tgz", "whole archive"],
    "no archive": ["de-en.tgz", "whole archive"],
    "empty archive": ["de-en.tgz", "whole archive"],
    "a set is missing": ["must hold IWSLT14.TED.dev2010.de-en.de.xml", "but does not"],
    "unequal lines": ["train.tags.de-en.de and train.tags.de-en.en must have equally many lines", "52 and 53"],
    "unequal segments": ["IWSLT14.TED.tst2011.de-en.de.xml", "equally many lines", "1 and 3"],
    "not utf-8": ["train.tags.de-en.en must be UTF-8", "line 3", "0xe4"],
    "nothing left": ["pairs for train", "none is left"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_source_is_refused_in_one_sentence(case, tmp_path, capsys):
    source = write(tmp_path / "source", damage(case))
    status, errors = run(capsys, IWSLT, tmp_path / "out", "--source", source)
    assert status == 2 and len(errors) == 1, errors
    assert all(word in errors[0] for word in REFUSED[case]), errors
    assert not (tmp_path / "out").exists()
    left = {path.name for path in tmp_path.glob("out.partial/*")}
    assert left in (set(), {"settings.json", "texts"}), "only whole stages stay"


def test_bad_loose_texts_are_refused(tmp_path, capsys):
    rows = made.tatoeba_rows()
    text = "".join(f"{english}\t{german}\n" for english, german in rows).encode()
    cases = {
        "deu-eng.tsv.gz": (gzip.compress(text)[:-200], ["deu-eng.tsv.gz", "whole gzip"]),
        "deu-eng.tsv": (text + b"no tab\n", ["deu-eng.tsv", "two columns", f"line {len(rows) + 1} "]),
        "deu.txt": (b"Hi.\tHallo!\n", ["--held-out must be at most 0"]),
    }
    for name, (data, words) in cases.items():
        source = write(tmp_path / name, {name: data})
        status, errors = run(capsys, "tatoeba_de_en", tmp_path / "out", "--source", source)
        assert status == 2 and len(errors) == 1 and all(word in errors[0] for word in words), errors
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    write(tmp_path / "twice", {"deu.txt": text, "deu.txt.gz": gzip.compress(text)})
    status, errors = run(capsys, "tatoeba_de_en", tmp_path / "out", "--source", tmp_path / "twice")
    assert status == 2 and "must hold deu.txt once" in errors[0]


def test_bad_folders_are_refused(iwslt_source, tmp_path, capsys):
    status, errors = run(capsys, IWSLT, tmp_path / "out", "--source", tmp_path / "nowhere")
    assert status == 2 and "--source must be a folder" in errors[0] and len(errors) == 1
    write(tmp_path / "mine", {"letter.txt": b"Dear"})
    status, errors = run(capsys, IWSLT, tmp_path / "mine", "--source", iwslt_source)
    assert status == 2 and "has no good manifest.json" in errors[0]
    write(tmp_path / "yours.partial", {"letter.txt": b"Dear"})
    status, errors = run(capsys, IWSLT, tmp_path / "yours", "--source", iwslt_source)
    assert status == 2 and "has no good settings.json" in errors[0]
    assert [path.name for path in tmp_path.rglob("*.*") if path.is_file()] == ["letter.txt", "letter.txt"]


def test_two_runs_of_one_folder_do_not_meet(tmp_path, iwslt_source, capsys):
    with stages.locked(tmp_path / "out.partial", "it"):
        status, errors = run(capsys, IWSLT, tmp_path / "out", "--source", iwslt_source)
    assert status == 2 and "is being made by another run" in errors[0]


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOSYS, errno.ENOLCK], ids=["NFS", "Lustre", "no lock daemon"])
def test_a_file_system_without_locks_is_used_and_told_of(tmp_path, monkeypatch, capsys, number):
    """NFS answers EBADF for what is not open for writing, Lustre without -o flock ENOSYS for everything."""

    def flock(handle, operation):
        writable = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if number != errno.EBADF or not writable:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stages.fcntl, "flock", flock)
    with stages.locked(tmp_path / "out", "it"):
        pass
    told = capsys.readouterr().err
    assert told == "" if number == errno.EBADF else "has no locks" in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the lock is gone"


def test_a_refused_vocab_is_not_held_against_the_corrected_one(tmp_path, capsys):
    text = "".join(f"{english}\t{german}\n" for english, german in made.tatoeba_rows())
    source = write(tmp_path / "source", {"deu.txt": text.encode()})
    words = ("tatoeba_de_en", tmp_path / "out", "--source", source, "--held-out", 20, "--pieces", "sentencepiece")
    status, errors = run(capsys, *words, "--vocab", 100_000)
    assert status == 2 and "--vocab must be at most" in errors[0]
    done = (tmp_path / "out.partial/tokens/stage.json").stat().st_mtime_ns
    status, errors = run(capsys, *words, "--vocab", 100_000, "--train-pairs", 5)
    assert status == 2 and "was begun with" in errors[0], "the tokens that are there have other pairs"
    assert (tmp_path / "out.partial/tokens/stage.json").stat().st_mtime_ns == done
    status, errors = run(capsys, *words, "--vocab", 70)
    assert status == 0, errors
    assert json.loads((tmp_path / "out/manifest.json").read_text())["settings"]["vocab"] == 70


def test_a_line_that_sentencepiece_passes_over_is_learned_from_in_parts(tmp_path):
    short = ["ein Satz", "ä" * 2096, "word " * 838]
    assert [list(parallel_text.learnable(line)) for line in short] == [[line] for line in short]
    words = ["Wörter und noch mehr Worte"] * 400
    parts = list(parallel_text.learnable(" ".join(words)))
    assert " ".join(parts) == " ".join(words) and len(parts) > 1
    for line in (" ".join(words), "ü" * 10_000, "a " + "b" * 9_000 + " c"):
        parts = list(parallel_text.learnable(line))
        assert max(len(part.encode()) for part in parts) <= 4192
        assert "".join(parts).replace(" ", "") == line.replace(" ", "")
    model = parallel_text.train_subwords([[" ".join(words)] * 3], tmp_path / "model", 19, "unigram")
    assert model.get_piece_size() == 19
    with pytest.raises(ValueError, match="^the training text must have lines to learn subwords from, but has no line that is"):
        parallel_text.train_subwords([[""]], tmp_path / "none", 20, "unigram")


def test_a_home_folder_is_found_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert options.user_path("~/data") == tmp_path / "data" and options.user_path("a/~") == Path("a/~")
    for program in ("prepare", "multi30k", "grammar_corpus", "images"):
        text = (Path(prepare.__file__).parent / f"{program}.py").read_text()
        assert "type=Path" not in text, program


# --- download ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def site():
    with made.serve() as site:
        yield site


def offer(site: made.Site, *folders: str, name: str = "a.tgz", **known: object) -> Published:
    return Published(name, site.offers(*(f"{folder}/{name}" for folder in folders)), **known)


def test_a_broken_download_goes_on_where_it_was(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 100)
    site.files["a.tgz"] = bytes(range(256)) * 10
    site.break_after["a.tgz"] = [1000, 500]
    name, about = download._fetch_first_offer([offer(site, "x")], tmp_path)
    assert (tmp_path / "a.tgz").read_bytes() == site.files["a.tgz"]
    assert site.asked == [("/x/a.tgz", None), ("/x/a.tgz", "bytes=1000-"), ("/x/a.tgz", "bytes=1500-")]
    assert about["bytes"] == 2560 and about["digest_known_from"] == "first use"
    assert [path.name for path in tmp_path.iterdir()] == ["a.tgz"]


def test_a_file_that_changed_meanwhile_is_not_continued(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 100)
    site.files["a.tgz"], site.break_after["a.tgz"] = b"old" * 1000, [1000]
    with pytest.raises(ConnectionError, match="broke off at 1000 of 3000 bytes"):
        download.fetch(site.offers("x/a.tgz"), tmp_path / "a.tgz", attempts=1)
    site.files["a.tgz"] = b"new" * 1000
    download.fetch(site.offers("x/a.tgz"), tmp_path / "a.tgz", attempts=1)
    assert (tmp_path / "a.tgz").read_bytes() == b"new" * 1000


def test_another_mirror_does_not_continue_bytes_that_nobody_can_check(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK_BYTES", 100)
    site.files["a.tgz"], site.break_after["a.tgz"] = b"same" * 1000, [1000]
    digest = download.fetch(site.offers("x/a.tgz", "y/a.tgz"), tmp_path / "a.tgz", attempts=1)
    assert site.asked == [("/x/a.tgz", None), ("/y/a.tgz", None)]
    (tmp_path / "a.tgz").unlink()
    site.break_after["a.tgz"] = [1000]
    download.fetch(site.offers("x/a.tgz", "y/a.tgz"), tmp_path / "a.tgz", digest, attempts=1)
    assert site.asked[2:] == [("/x/a.tgz", None), ("/y/a.tgz", "bytes=1000-")], "a known digest will tell"


def test_a_wrong_size_is_refused_before_it_is_loaded(site, tmp_path):
    site.files["a.tgz"] = b"<html>log in first</html>"
    with pytest.raises(ConnectionError, match="the file has 25 bytes instead of 5000"):
        download.fetch(site.offers("x/a.tgz"), tmp_path / "a.tgz", size=5000)
    assert list(tmp_path.iterdir()) == []


def test_a_known_size_tells_of_a_break_that_the_server_does_not(site, tmp_path):
    site.files["a.tgz"], site.break_after["a.tgz"], site.no_length = b"same" * 1000, [1000], {"a.tgz"}
    with pytest.raises(ConnectionError, match="the file has 1000 bytes instead of 4000"):
        download.fetch(site.offers("x/a.tgz"), tmp_path / "a.tgz", attempts=1, size=4000)
    assert list(tmp_path.iterdir()) == []
    download.fetch(site.offers("x/a.tgz"), tmp_path / "a.tgz", attempts=1, size=4000)
    assert (tmp_path / "a.tgz").read_bytes() == b"same" * 1000


def test_the_next_offer_is_taken_where_one_is_gone(site, tmp_path):
    site.files["a.zip"] = b"zip"
    offers = [offer(site, "gone", "gone2"), offer(site, "x", name="a.zip")]
    assert download._fetch_first_offer(offers, tmp_path)[0] == "a.zip"
    before = len(site.asked)
    assert download._fetch_first_offer(offers, tmp_path)[0] == "a.zip"
    assert len(site.asked) == before, "what lies there is not asked for again, nor is what goes before it"


def test_first_use_is_remembered(site, tmp_path):
    site.files["a.tgz"] = b"first"
    name, about = download._fetch_first_offer([offer(site, "x")], tmp_path)
    download.trust(name, about["sha256"], tmp_path)
    assert (tmp_path / "a.tgz.sha256").read_text() == f"{about['sha256']}  a.tgz\n"
    (tmp_path / "a.tgz").write_bytes(b"other")
    with pytest.raises(ValueError, match="a.tgz must have the sha256 that a.tgz.sha256 recorded"):
        download._fetch_first_offer([offer(site, "x")], tmp_path)
    (tmp_path / "a.tgz").unlink()
    site.files["a.tgz"] = b"changed"
    with pytest.raises(ConnectionError, match="instead of .*If it was changed on purpose, delete .*a.tgz.sha256"):
        download._fetch_first_offer([offer(site, "x")], tmp_path)


# --- from the address to the training ---------------------------------------------------------------------------------


@pytest.fixture
def published(site, monkeypatch):
    """IWSLT'14 as the loopback site publishes it."""
    site.files["de-en.tgz"] = made.tgz(made.iwslt14_texts())
    about = dataclasses.replace(
        corpora.IWSLT14, archives=((Published("de-en.tgz", site.offers("gone/de-en.tgz", "x/de-en.tgz")),),)
    )
    monkeypatch.setitem(corpora.CORPORA, IWSLT, about)
    return site


def faked_binarise(pieces: Path, out: Path, *_: object) -> None:
    """In the place of fairseq-preprocess, where five seconds for each call would teach nothing more."""
    out.mkdir(exist_ok=True)
    for path in pieces.iterdir():
        if path.name != stages.RECORD:
            (out / path.name).write_bytes(path.read_bytes())
    (out / "preprocess.log").write_text("log")
    (out / "dict.de.txt").write_text("a 1\n")
    (out / "dict.en.txt").write_text("a 1\n")


def test_a_broken_archive_is_downloaded_again(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.parallel_text, "binarise", faked_binarise)
    whole = published.files["de-en.tgz"]
    published.files["de-en.tgz"] = whole[:-500]
    status, errors = run(capsys, IWSLT, tmp_path / "out", "--vocab", MERGES)
    assert status == 2 and len(errors) == 1 and "The next run downloads de-en.tgz again" in errors[0]
    assert list(tmp_path.iterdir()) == [], "nothing is left, for nothing was whole"
    published.files["de-en.tgz"] = whole
    status, errors = run(capsys, IWSLT, tmp_path / "out", "--vocab", MERGES)
    assert status == 0
    assert {path.name for path in (tmp_path / "out/archives").iterdir()} == {"de-en.tgz", "de-en.tgz.sha256"}
    # Small archives have not the published counts, and that is told for each split.
    assert [line.split(" has ")[0] for line in errors] == ["warning: train", "warning: valid", "warning: test"]
    assert "160,239" in errors[0]


def test_no_network_is_told(tmp_path, published, capsys):
    published.files.clear()
    status, errors = run(capsys, IWSLT, tmp_path / "out")
    assert status == 1 and len(errors) == 1 and "gone/de-en.tgz: 404" in errors[0] and "x/de-en.tgz: 404" in errors[0]
    assert list(tmp_path.iterdir()) == []


KILL_POINTS = {
    "inside tokens": ("pipeline._write_row", 60),
    "inside subwords": ("subwords.learn_codes", 1),
    "after subwords": ("pipeline.make_pieces", 1),
    "inside bin": ("pipeline.parallel_text.sha256_of", 1),
    "before the end": ("making.sync_files", 1),
    "after the end": ("making.shutil.rmtree", 2),
}


def run_until_killed(point: str, arguments: list, output: Path) -> int:
    """Run prepare.py in a child that kills itself at the n-th call of a function; returns its exit status."""
    path, count = KILL_POINTS[point]
    target = functools.reduce(getattr, path.split(".")[1:-1], sys.modules[path.split(".")[0]])
    name = path.rpartition(".")[2]
    real, calls = getattr(target, name), itertools.count(1)

    def deadly(*values: object, **options: object) -> object:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*values, **options)

    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    setattr(target, name, deadly)
    prepare.main(arguments)
    os._exit(0)


def test_a_killed_run_goes_on_and_ends_alike(iwslt_source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.parallel_text, "binarise", faked_binarise)
    common = ["--source", iwslt_source, "--vocab", MERGES]
    assert run(capsys, IWSLT, tmp_path / "undisturbed", *common)[0] == 0
    expected = contents(tmp_path / "undisturbed")
    # One after the other in the same folder: each run takes up the work of the one that was killed before it.
    did = []
    for point in KILL_POINTS:
        arguments = [IWSLT, "--out", tmp_path / "out", "--jobs", 1, *common]
        status = run_until_killed(point, list(map(str, arguments)), tmp_path / "stdout")
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, point
        assert (tmp_path / "out").exists() == (point == "after the end")
        did.append(re.findall(r"^(\w+): done", (tmp_path / "stdout").read_text(), re.MULTILINE))
    assert did == [["texts"], ["tokens"], ["subwords"], ["pieces"], ["bin"], []]
    assert run(capsys, IWSLT, tmp_path / "out", *common)[0] == 0
    assert contents(tmp_path / "out") == expected
    assert not (tmp_path / "out.partial").exists()


def test_workers_end_with_a_killed_run(tmp_path):
    script = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'data_prep')]!r}\n"
        "import blocks\n"
        "blocks.BLOCK_ITEMS = 1\n"
        "if __name__ == '__main__':\n"
        "    for count in blocks.map_blocks(sum, range(10**9), 2): print(count, flush=True)\n"
    )
    write(tmp_path, {"endless.py": script.encode()})
    process = subprocess.Popen([sys.executable, str(tmp_path / "endless.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.kill()
    process.wait()
    # The workers hold the same pipe: its end comes when the last of them is gone.
    process.stdout.read()


@pytest.mark.usefixtures("warm_scripts")
@pytest.mark.parametrize("pieces, vocab", [("bpe", MERGES), ("sentencepiece", 120)])
def test_from_download_to_training(pieces, vocab, published, tmp_path, capsys):
    options = ["--pieces", pieces, "--vocab", vocab, "--archives", tmp_path / "archives"]
    status, _ = run(capsys, IWSLT, tmp_path / "out", *options)
    assert status == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    expected = reference_iwslt(made.iwslt14_texts())
    assert manifest["pairs"] == {split: len(pairs) for split, pairs in expected.items()}
    assert (manifest["source_language"], manifest["target_language"], manifest["lowercase"]) == ("de", "en", True)
    assert (manifest["subwords"], manifest["tokenizer"]) == (pieces, "moses" if pieces == "bpe" else "none")
    assert (manifest["test_sets"], manifest["valid_sets"]) == ({"test": "test"}, {"valid": "valid"})
    assert (out / manifest["subword_model"]["file"]).is_file()
    assert (out / "bin/dict.de.txt").read_bytes() == (out / "bin/dict.en.txt").read_bytes()
    digest = parallel_text.sha256_of(tmp_path / "archives/de-en.tgz")
    assert manifest["archives"]["de-en.tgz"]["sha256"] == digest
    assert {"python", "sacremoses", "subword-nmt", "sentencepiece"} <= set(manifest["versions"])
    assert not any(str(tmp_path).encode() in data for data in contents(out).values()), "no path of this machine"

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    asked = len(published.asked)
    assert run(capsys, IWSLT, out, *options) == (0, run(capsys, IWSLT, out, *options)[1])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert len(published.asked) == asked, "a second run asks nobody"
    assert run(capsys, IWSLT, out, *options, "--train-pairs", 9)[0] == 2, "other settings are refused"

    train = ["fairseq-train", str(out / "bin"), "--arch", "transformer_iwslt_de_en", "--cpu"]
    train += "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16".split()
    train += "--encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --share-all-embeddings --optimizer adam --lr 0.001".split()
    train += f"--max-tokens 200 --max-update 5 --save-dir {tmp_path / 'ckpt'} --no-progress-bar --no-save".split()
    result = subprocess.run(train, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = result.stdout + result.stderr
    assert result.returncode == 0 and re.search(r"num_updates.{0,4}5\b", log), log[-2000:]
