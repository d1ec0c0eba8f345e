"""Thousands of damaged and forged snapshots, manifests and heartbeats against the code that reads them.

    python tests/stress/fuzz_snapshots.py --examples 2200 --seed 1

Each example publishes a small model (as it is, in bf16, fp16, int8), mutates what lies in the store (`fuzz_mutations`), and
reads it as a training peer and as `codistill-launch status` do. It passes when

- nothing but BadSnapshot, in one short printable sentence, or None comes out, and no other file than the peer's is opened;
- of damaged files, only what is exactly as it was published is believed, to the bit;
- of forged files, whose checksums fit, only what a slow reader of the format, written for this purpose, finds in order
  and reads as the same values;
- no example takes more memory than the process may have, or hangs.

Exit status 1 if any example failed.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import resource
import sys
import time
from dataclasses import dataclass, field
from random import Random
from typing import Counter, Dict, List

import torch
from fuzz_judge import Published, Verdict, read
from fuzz_mutations import DAMAGE, FORGERY

KINDS = {**DAMAGE, **FORGERY}
WIRES = (None, torch.bfloat16, torch.float16, torch.int8)
HANG_SECONDS = 60
MEMORY = 192 << 20  # bytes that reading may take on top of what torch has; a model here has some kB, a header at most 1 MB


@dataclass
class Tally:
    """One kind's outcomes."""

    words: Counter = field(default_factory=collections.Counter)
    slowest: float = 0.0  # seconds of processor time


@dataclass
class Campaign:
    """Outcomes by kind, the reasons of refusals, and the examples that failed, as sentences."""

    tallies: Dict[str, Tally] = field(default_factory=dict)
    reasons: Counter = field(default_factory=collections.Counter)
    failures: List[str] = field(default_factory=list)
    peak: int = 0  # bytes of memory taken on top of what there was before


def campaign(examples: List[int], seed: int) -> Campaign:
    """Example i is always the same for one seed, whatever others run."""
    result = Campaign({kind: Tally() for kind in KINDS})
    published = [Published(wire) for wire in WIRES]
    for i, wire in enumerate(WIRES):
        assert read(published[i], published[i].files, False).word == "as published", f"{wire}: an honest snapshot is refused"
    before = _peak_memory()
    for number in examples:
        kind = list(KINDS)[number % len(KINDS)]
        one = published[number // len(KINDS) % len(WIRES)]
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            _example(number, seed, kind, one, result)
        except Exception as error:  # whatever it is, it came out of reading another's file: that is the finding
            result.failures.append(f"example {number} ({kind}): {type(error).__name__}: {str(error)[:300]}")
    faulthandler.cancel_dump_traceback_later()
    result.peak = _peak_memory() - before
    return result


def _example(number: int, seed: int, kind: str, published: Published, result: Campaign) -> None:
    random, files = Random(f"{seed}:{number}"), dict(published.files)
    KINDS[kind](random, files)
    start = time.process_time()
    verdict = read(published, files, forged=kind in FORGERY)
    tally = result.tallies[kind]
    tally.slowest = max(tally.slowest, time.process_time() - start)
    tally.words[verdict.word if files != published.files else "unchanged"] += 1
    result.reasons.update(set(verdict.reasons))


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(more: int) -> None:
    """From now on this process may take `more` bytes, then every allocation fails. Only where /proc says what it has."""
    with open("/proc/self/status") as status:
        data = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def show(result: Campaign, seed: int) -> None:
    words = (*Verdict.ORDER, "unchanged")
    total = sum(sum(tally.words.values()) for tally in result.tallies.values())
    width = max(map(len, KINDS))
    print(f"{total + len(result.failures)} examples, seed {seed}, torch {torch.__version__}\n")
    print(f"{'':{width}}  {'examples':>8}  {'  '.join(words)}  slowest")
    for kind, tally in result.tallies.items():
        counts = "  ".join(f"{tally.words[word]:{len(word)}}" for word in words)
        print(f"{kind:{width}}  {sum(tally.words.values()):8}  {counts}  {1000 * tally.slowest:4.0f} ms")
    sums = "  ".join(f"{sum(tally.words[word] for tally in result.tallies.values()):{len(word)}}" for word in words)
    print(f"{'':{width}}  {total:8}  {sums}\n\nExamples refused, by reason (one example may have several):")
    for reason, count in result.reasons.most_common():
        print(f"{count:6}  {reason}")
    print(f"\nmost memory taken by reading: {result.peak / 1e6:.1f} MB; failed: {len(result.failures)}")
    for failure in result.failures[:50]:
        print(f"  {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged and forged snapshots against the code that reads them.")
    parser.add_argument("--examples", type=int, default=2200, help="how many (default: 2200, a hundred of each kind)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="I", help="only example I, to see a failure again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    limit_memory(MEMORY)
    examples = [options.only] if options.only is not None else list(range(options.examples))
    result = campaign(examples, options.seed)
    show(result, options.seed)
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
