"""``prepare.py own``: one's own text and languages, splits taken out of train without a leak, and what is refused."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import data_prep_corpora as made
import pytest
from fairseq_runs import ROOT

sys.path.insert(0, str(ROOT / "data_prep"))
import parallel_text  # noqa: E402
import prepare  # noqa: E402
import splits  # noqa: E402
from texts import plain  # noqa: E402


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def faked_fairseq(monkeypatch):
    """fairseq-preprocess takes seconds to start, and what it writes is not looked at here."""

    def fake(pieces: Path, out: Path, source: str, target: str, *_: object) -> None:
        out.mkdir(exist_ok=True)
        for name in ("preprocess.log", f"dict.{source}.txt", f"dict.{target}.txt"):
            (out / name).write_text("a 1\n")

    monkeypatch.setattr(parallel_text, "binarise", fake)


@pytest.fixture
def run(capsys, tmp_path):
    """Run ``prepare.py own`` to ``out``; returns the status, and stdout and stderr together."""

    def call(*words: object, source: str = "xx", target: str = "yy") -> tuple:
        common = ["own", "--out", str(tmp_path / "out"), "--source", source, "--target", target, "--jobs", "1", "--vocab", "90"]
        capsys.readouterr()
        status = prepare.main([*common, *map(str, words)])
        told = capsys.readouterr()
        return status, told.out + told.err

    return call


def pairs_in(out: Path, split: str) -> list:
    """Of valid and test, as they were."""
    return list(zip(*(parallel_text.read_lines(out / "raw" / f"{split}.{language}") for language in ("xx", "yy"))))


def plained(pairs: list) -> set:
    return {tuple(map(plain, pair)) for pair in pairs}


def all_pairs() -> list:
    """Pairs with sentences that come twice, translations that several share, and sides that nobody can score."""
    pairs = [(german, english) for english, german in made.grammar_pairs(90, seed=9)]
    pairs += [(german, "Other: " + english) for german, english in pairs[::4]]
    pairs += [("So: " + german, english) for german, english in pairs[::5]]
    random.Random(1).shuffle(pairs)
    return [*pairs, ("", "empty"), ("leer", ""), ("lang " * 300, "long"), ("x " + pairs[0][0], "y\u2028z")]


def texts_of(pairs: list, prefix: str = "all") -> dict:
    return {f"{prefix}.xx": made.plain_text([a for a, _ in pairs]), f"{prefix}.yy": made.plain_text([b for _, b in pairs])}


def test_given_sets_stay_as_they_are(tmp_path, run, faked_fairseq):
    source = write(tmp_path / "text", {**made.own_texts("train"), **made.own_texts("dev", 8, 6)})
    write(source, made.own_texts("news", 7, 7))
    status, told = run("--train", source / "train", "--valid", source / "dev", "--test", source / "news")
    assert status == 0 and "train 120, valid 8, test 7" in told, told
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["source_language"], manifest["target_language"], manifest["subwords"]) == ("xx", "yy", "sentencepiece")
    assert manifest["settings"]["held_out"] is None and manifest["texts"]["test/news.yy"]["from"] == "news.yy.gz"
    assert (tmp_path / "out/raw/test.xx").read_bytes() == (source / "news.xx").read_bytes()
    assert (tmp_path / "out/raw/valid.yy").read_bytes() == gzip.decompress((source / "dev.yy.gz").read_bytes())


@pytest.mark.parametrize("given", [(), ("test",), ("valid",)])
def test_no_sentence_of_a_set_that_was_taken_out_stays_in_train(given, tmp_path, run, faked_fairseq, monkeypatch):
    kept = []
    real = prepare.pipeline.treat_block
    monkeypatch.setattr(prepare.pipeline, "treat_block", lambda pairs, rules: kept.append((rules, pairs)) or real(pairs, rules))
    pairs = all_pairs()
    source = write(tmp_path / "text", {**texts_of(pairs), **made.own_texts("given", 8, 6)})
    options = [word for split in given for word in (f"--{split}", source / "given")]
    status, told = run("--train", source / "all", "--held-out", 9, *options)
    assert status == 0, told
    taken = {split: pairs_in(tmp_path / "out", split) for split in ("test", "valid") if split not in given}
    train = [pair for rules, block in kept if rules.cleaning for pair in block]
    sentences = {split: {plain(side) for pair in rows for side in pair} for split, rows in {**taken, "train": train}.items()}
    for split, rows in taken.items():
        assert len({source for source, _ in rows}) == 9 and plained(rows) < plained(pairs)
        assert all(0 < len(side) <= 1000 for pair in rows for side in pair)
        assert not any(sentences[split] & others for name, others in sentences.items() if name != split)
    left_out = json.loads((tmp_path / "out/manifest.json").read_text())["left_out_of_train"]
    assert left_out + len(train) + sum(map(len, taken.values())) == len(pairs)


def test_the_split_is_that_of_the_published_corpora():
    """The rule that holds a text in memory is the reference of the one that reads it twice."""
    pairs = [pair for pair in all_pairs() if all(0 < len(side) <= 1000 for side in pair)]
    expected, left_out = splits.split_by_sentence(pairs, 0, 11)
    held_out = splits.HeldOut(lambda: iter(pairs), {"test": 11, "valid": 11})
    found = [held_out.split_of(pair) for pair in pairs]
    for split, rows in expected.items():
        assert [pair for pair, home in zip(pairs, found) if home == split] == rows, split
    assert left_out == found.count(None) > 0


def test_a_second_run_does_nothing_and_other_texts_are_refused(tmp_path, run, faked_fairseq):
    source = write(tmp_path / "text", made.own_texts())
    words = ["--train", source / "all", "--held-out", 9]
    assert run(*words)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    status, told = run(*words)
    assert status == 0 and "was ready, nothing done" in told
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    status, told = run(*words[:2], "--held-out", 8)
    assert status == 2 and "was made with" in told
    write(source, {"all.xx": (source / "all.xx").read_bytes().replace(b"e", b"f")})
    status, told = run(*words)
    assert status == 2 and f"made from other texts than {source}/all.xx now" in told and told.count("\n") == 1


@pytest.mark.parametrize(
    "change, words, says",
    [
        ({}, dict(target="zz"), "all.zz or all.zz.gz there, but neither is: there is all.xx, all.yy.gz; is --source or"),
        ({}, dict(train="none"), "none.xx or none.xx.gz there, but neither is: nothing begins with it"),
        ({}, dict(valid="dev"), "--valid must be a prefix with"),
        ({}, dict(target="xx"), "--source and --target must be two languages, but both are xx"),
        ({"all.xx": b"one\n"}, {}, "all.xx and all.yy must have equally many lines, but have 1 and 120 instead"),
        ({"all.xx": b"caf\xe9\n" * 120}, {}, "all.xx must be UTF-8, but line 1 has the byte 0xe9"),
        ({"all.yy.gz": b"no gzip"}, {}, "all.yy.gz must be gzip of UTF-8 text"),
        ({}, {"held-out": "41"}, "--held-out must be at most 40 for so small a text, but is 41"),
        ({}, {"max-ratio": "0.5"}, "--max-ratio must be at least 1, but is 0.5"),
        ({"all.xx": b"\n" * 120}, {}, "--held-out must be at most 0"),
    ],
)
def test_one_sentence_for_each_mistake(change, words, says, tmp_path, run):
    source = write(tmp_path / "text", {**made.own_texts(), **change})
    options = {"train": "all", "held-out": "9", **words}
    languages = {name: options.pop(name) for name in ("source", "target") if name in options}
    prefixes = {name: source / options.pop(name) for name in ("train", "valid", "test") if name in options}
    words = [word for name, value in {**options, **prefixes}.items() for word in (f"--{name}", value)]
    status, told = run(*words, **languages)
    assert status == 2 and says in told and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.partial/texts"))


def test_languages_are_names(capsys, tmp_path):
    for words in (["--source", "de-AT"], ["--source", ""]):
        with pytest.raises(SystemExit):
            prepare.main(["own", "--out", str(tmp_path), "--target", "en", "--train", "x", *words])
        assert "argument --source: must be a language as in the files' names" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["--out", str(tmp_path), "own"])
    assert "own must be the first word after prepare.py" in capsys.readouterr().err
