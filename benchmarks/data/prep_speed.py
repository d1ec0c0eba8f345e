"""How fast is data_prep? The usual script's steps with the usual tools, one process, against ours, on the same text.

    python -m benchmarks.data.prep_speed [--pairs 40000] [--jobs 2] [--results benchmarks/results/data_prep_speed]
    python -m benchmarks.data.prep_speed --input PREFIX        (your own text: PREFIX.de and PREFIX.en)

The steps are those of IWSLT'14: Moses tokenisation, cleaning, lower case, joint BPE learned and applied. The usual tools are
sacremoses' command line and subword-nmt's two programs, one process each, and a loop for the cleaning; ours are data_prep's
stages, with everything that a stage does: reading, cleaning, writing, starting and ending its processes. The two take turns
for --rounds. Each round logs how many cores other programs used meanwhile (Linux); the table has the medians of the rounds
in which that was less than a tenth of a core, and says how many those are.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, List, Tuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data_prep"))

import grammar_corpus  # noqa: E402
import parallel_text  # noqa: E402
import pipeline  # noqa: E402
from blocks import cores  # noqa: E402
from corpora import IWSLT14, Part  # noqa: E402

LANGUAGES = ("de", "en")
HELD_OUT = 20  # pairs of valid and of test, which data_prep wants
FOREIGN_CORES = 0.1  # from here on a round is not quiet
STEPS = ("tokenise, clean, lower", "learn BPE", "apply BPE")


def tool(module: str, *options: object, stdin: Path, stdout: Path) -> None:
    """Run a command line of this interpreter from one file to another."""
    with open(stdin, "rb") as source, open(stdout, "wb") as target:
        command = [sys.executable, "-m", module, *map(str, options)]
        subprocess.run(command, stdin=source, stdout=target, stderr=subprocess.DEVNULL, check=True)


def usual(text: Path, work: Path, merges: int) -> Dict[str, float]:
    """Seconds of each step with the usual tools; writes ``work/train.LANG``."""
    work.mkdir()

    def tokens() -> None:
        for language in LANGUAGES:
            options = ("-q", "-j", 1, "-l", language, "tokenize", "-x")
            tool("sacremoses", *options, stdin=text / f"train.{language}", stdout=work / f"tokens.{language}")
        clean_and_lower(work)

    def learn() -> None:
        joined = work / "joined"
        joined.write_bytes(b"".join((work / f"clean.{language}").read_bytes() for language in LANGUAGES))
        tool("subword_nmt.learn_bpe", "-s", merges, stdin=joined, stdout=work / "codes")

    def apply() -> None:
        for language in LANGUAGES:
            codes, clean = work / "codes", work / f"clean.{language}"
            tool("subword_nmt.apply_bpe", "-c", codes, stdin=clean, stdout=work / f"train.{language}")

    return dict(zip(STEPS, map(seconds, (tokens, learn, apply))))


def clean_and_lower(work: Path) -> None:
    """What clean-corpus-n.perl -ratio 1.5 … 1 175 and lowercase.perl do, in one loop."""
    cleaning = IWSLT14.cleaning
    files = [open(work / f"tokens.{language}", encoding="utf-8", newline="\n") for language in LANGUAGES]
    kept = [open(work / f"clean.{language}", "w", encoding="utf-8", newline="\n") for language in LANGUAGES]
    for pair in zip(*files):
        if not cleaning.fault(*pair):
            for line, file in zip(pair, kept):
                file.write(line.lower())
    for file in files + kept:
        file.close()


def ours(text: Path, work: Path, merges: int, jobs: int) -> Dict[str, float]:
    """Seconds of each of data_prep's stages; writes ``work/pieces/train.LANG``."""
    splits = {
        split: (Part(split, {language: [f"{split}.{language}"] for language in LANGUAGES}),)
        for split in ("train", "valid", "test")
    }
    corpus = dataclasses.replace(IWSLT14, splits=splits, every_nth_to_valid=None)
    settings = pipeline.Settings("speed", "bpe", merges, None, None)
    tokens, subwords, pieces = (work / name for name in ("tokens", "subwords", "pieces"))
    for folder in (tokens, subwords, pieces):
        folder.mkdir(parents=True)
    stages = (
        lambda: pipeline.make_tokens(corpus, settings, text, tokens, jobs),
        lambda: pipeline.learn_subwords(corpus, settings, tokens, subwords, jobs),
        lambda: pipeline.make_pieces(corpus, settings, tokens, subwords, pieces, jobs),
    )
    return dict(zip(STEPS, map(seconds, stages)))


def seconds(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def cpu_seconds() -> Tuple[float, float, float]:
    """Seconds on the clock, of all cores being busy since the start, and of this process and its ended children."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq = map(int, file.readline().split()[1:8])
    busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(os.times()[:4])


def foreign_cores(before: Tuple[float, float, float]) -> float:
    """Cores that other programs used on average since ``before``."""
    wall, busy, own = (now - then for now, then in zip(cpu_seconds(), before))
    return max(busy - own, 0.0) / wall


def write_text(folder: Path, prefix: str, pairs: int, seed: int) -> int:
    """``folder/{train,valid,test}.LANG`` of the grammar's sentences, or of the user's text; returns the training pairs."""
    if prefix:
        sides = [parallel_text.read_lines(Path(f"{prefix}.{language}")) for language in LANGUAGES]
        rows = list(itertools.islice(zip(*sides), pairs))
    else:
        rows = [(german, english) for english, german in itertools.islice(grammar_corpus.sentence_pairs(seed), pairs)]
    for split, part in (("train", rows), ("valid", rows[:HELD_OUT]), ("test", rows[:HELD_OUT])):
        for side, language in enumerate(LANGUAGES):
            parallel_text.write_lines(folder / f"{split}.{language}", [row[side] for row in part])
    return len(rows)


def compare(theirs: Path, own: Path) -> str:
    """How far the two outputs agree, where each has the same lines."""
    count = differ = 0
    for language in LANGUAGES:
        pair = [parallel_text.read_lines(folder / f"train.{language}") for folder in (theirs, own)]
        if len(pair[0]) != len(pair[1]):
            return f"{len(pair[0])} and {len(pair[1])} pairs are kept: some are counted otherwise"
        count += len(pair[0])
        differ += sum(a.split() != b.split() for a, b in zip(*pair))
    return f"{differ} of {count} lines differ"


def report(lines: int, usual_seconds: Dict[str, float], our_seconds: Dict[str, float], jobs: int) -> List[str]:
    """A table in Markdown: lines of both languages per second, and the ratio."""
    table = [f"| step | usual tools, 1 process: s | lines/s | ours, {jobs} processes: s | lines/s | times faster |"]
    table.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for step in (*STEPS, "all"):
        theirs, own = (sum(found.values()) if step == "all" else found[step] for found in (usual_seconds, our_seconds))
        table.append(f"| {step} | {theirs:.1f} | {lines / theirs:,.0f} | {own:.1f} | {lines / own:,.0f} | {theirs / own:.2f} |")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=grammar_corpus.positive, default=40000, help="at most so many (default 40000)")
    parser.add_argument("--input", default="", metavar="PREFIX", help="text of your own: PREFIX.de and PREFIX.en")
    parser.add_argument("--name", default="", help="what to call that text in the log")
    parser.add_argument("--merges", type=grammar_corpus.positive, default=10000)
    parser.add_argument("--jobs", type=grammar_corpus.positive, default=2)
    parser.add_argument("--rounds", type=grammar_corpus.positive, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, help="folder for the log")
    args = parser.parse_args()
    for language in LANGUAGES if args.input else ():
        if not Path(f"{args.input}.{language}").is_file():
            parser.error(f"--input must be the common part of two files' names, but {args.input}.{language} is not there")
    name = args.name or ("a text of the user's" if args.input else f"grammar corpus, seed {args.seed}")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pairs = write_text(work, args.input, args.pairs, args.seed)
        rounds = []
        for number in range(args.rounds):
            theirs, own = work / f"usual{number}", work / f"ours{number}"
            before = cpu_seconds()
            times = usual(work, theirs, args.merges), ours(work, own, args.merges, args.jobs)
            rounds.append((*times, foreign_cores(before)))
        agreement = compare(theirs, own / "pieces")
    quiet = [each for each in rounds if each[2] < FOREIGN_CORES]
    log = [f"{name}: {pairs:,} pairs, {2 * pairs:,} lines, {args.merges:,} merges", ""]
    log.append(f"Medians of {len(quiet)} quiet rounds of {args.rounds}." if quiet else "NO ROUND WAS QUIET; medians of all:")
    by_tools, by_us = (
        {step: statistics.median(each[side][step] for each in quiet or rounds) for step in STEPS} for side in (0, 1)
    )
    log += ["", *report(2 * pairs, by_tools, by_us, args.jobs), "", "Every round, usual / ours in seconds:"]
    for number, (theirs_s, own_s, cores_taken) in enumerate(rounds, 1):
        steps = "; ".join(f"{step} {theirs_s[step]:.1f} / {own_s[step]:.1f}" for step in STEPS)
        log.append(f"{number}. {steps}; other programs used {cores_taken:.2f} cores")
    log += ["", f"Output: {agreement}.", versions()]
    print("\n".join(log))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        with open(args.results / "results.txt", "a", encoding="utf-8") as file:
            file.write("\n".join(log) + "\n\n")
    return 0


def versions() -> str:
    tools = ", ".join(f"{tool} {metadata.version(tool)}" for tool in ("sacremoses", "subword-nmt"))
    return f"{tools}, Python {platform.python_version()}, {cores()} cores."


if __name__ == "__main__":
    sys.exit(main())
