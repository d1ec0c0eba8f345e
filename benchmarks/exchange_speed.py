"""Does an exchange show in the step time? Two peers that exchange, against the same two with a teacher that never changes.

    python benchmarks/exchange_speed.py --out WORK --results benchmarks/results/exchange_speed

Real fairseq-train processes, a core each, a transformer of the base size (about 60 million parameters). `frozen` loads one
checkpoint as its teacher (--codistill-teacher), so that each step does the same work, but there is no exchange at all.
The arms take turns, as often as --rounds says; ratios are between neighbours of one round, on one machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Dict, List

import run_log

from fairseq_codistill.fairseq_log import parse_records

ROOT = Path(__file__).resolve().parents[1]
PEERS = 2
_AROUND = 10  # updates before and after


def make_data(folder: Path, words: int, sentences: int = 3000) -> Path:
    """Random sentences over `words` words, each of which occurs, in fairseq's binary form: what is learnt is no matter."""
    draw, raw = random.Random(1), folder / "raw"
    raw.mkdir(parents=True)
    rows = [[draw.randrange(words) for _ in range(24)] for _ in range(sentences)]
    rows += [list(range(start, min(start + 24, words))) for start in range(0, words, 24)]
    for name, text in (("train", rows), ("valid", rows[:8])):
        for side in "ab":
            (raw / f"{name}.{side}").write_text("".join(" ".join(f"w{i}" for i in row) + "\n" for row in text))
    command = ["fairseq-preprocess", "-s", "a", "-t", "b", "--joined-dictionary", "--destdir", folder / "bin"]
    run(command + ["--trainpref", raw / "train", "--validpref", raw / "valid", "--workers", "1"], folder / "preprocess.log")
    return folder / "bin"


def run(words: List[object], log: Path) -> None:
    with open(log, "ab") as file:
        subprocess.run([*map(str, words)], stdout=file, stderr=file, stdin=subprocess.DEVNULL, check=True)


def train(data: Path, out: Path, peers: int, updates: int, args: argparse.Namespace, *options: object) -> None:
    words = ["codistill-launch", "--peers", peers, "--gpus-per-peer", 0, "--", "fairseq-train", data, "--cpu"]
    words += ["--user-dir", ROOT / "fairseq_codistill", "--save-dir", out, "--arch", "transformer", "--share-all-embeddings"]
    for side in ("encoder", "decoder"):
        words += [f"--{side}-layers", args.layers, f"--{side}-embed-dim", args.width, f"--{side}-ffn-embed-dim", 4 * args.width]
    words += ["--optimizer", "adam", "--lr", 1e-4, "--max-tokens", args.tokens, "--max-update", updates, "--num-workers", 0]
    words += ["--required-batch-size-multiple", 1, "--log-format", "json", "--log-interval", 1, "--disable-validation"]
    words += ["--criterion", "codistill_ce", "--codistill-loss", "ce", "--codistill-alpha-schedule", "constant"]
    out.mkdir(parents=True, exist_ok=True)
    run(words + list(options), out / "launch.log")


def updates_per_second(log: Path, first: int, last: int) -> float:
    """Between two updates. Log lines have whole seconds, so each end is the mean time of the updates around it."""
    times: Dict[int, float] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        for record in parse_records(line):
            times.setdefault(record.update, datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S").timestamp())
    begin, end = (statistics.mean(times[update + i] for i in range(-_AROUND, _AROUND + 1)) for update in (first, last))
    return (last - first) / (end - begin)


def measure(arm: str, number: int, data: Path, teacher: Path, args: argparse.Namespace) -> Dict[str, object]:
    """One run of an arm; its speed is the mean of its peers'. The first interval, in which nobody teaches, is left out."""
    out = args.out / f"{arm}{number}"
    options = ["--codistill-interval", args.interval, "--no-save"]
    options += ["--codistill-wait", 120] if arm == "exchanging" else ["--codistill-teacher", teacher]
    train(data, out, PEERS, args.updates, args, *options)
    first = args.interval + args.interval // 2
    logs = [out / f"peer{peer}" / "train.log" for peer in range(PEERS)]
    last = first + (args.updates - _AROUND - first) // args.interval * args.interval  # whole intervals, each with one exchange
    speeds = [updates_per_second(log, first, last) for log in logs]
    row: Dict[str, object] = {"arm": arm, "round": number, "updates_per_second": round(statistics.mean(speeds), 4)}
    if arm == "exchanging":
        totals = [lives[0].totals for lives in run_log.load(str(out)).peers]
        row["totals"] = totals
        # Of one update, for each exchange: what the training thread was held by, apart from copies of memory.
        parts = [t["visible_s"] / max(1, t["published"]) * speed for t, speed in zip(totals, speeds)]
        copies = [t["copy_s"] / max(1, t["published"]) * speed for t, speed in zip(totals, speeds)]
        row["blocked_share_of_an_update"] = round(statistics.mean(parts), 4)
        row["copies_share_of_an_update"] = round(statistics.mean(copies), 4)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs; must not exist yet")
    parser.add_argument("--results", type=Path, help="write the table here, as results.json and results.txt")
    parser.add_argument("--updates", type=int, default=240)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--words", type=int, default=30_000, help="words in the dictionary")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200, help="--max-tokens: target tokens in a batch")
    args = parser.parse_args()
    least = 5 * args.interval // 2 + _AROUND
    if args.out.exists() or args.updates < least or args.interval < 2 * _AROUND:
        parser.error(f"--out must not exist yet, --interval be {2 * _AROUND} or more, and --updates {least} or more")
    args.out.mkdir(parents=True)
    data = make_data(args.out / "data", args.words)
    train(data, args.out / "teacher", 1, 1, args, "--no-epoch-checkpoints")
    teacher = args.out / "teacher/peer0/checkpoint_last.pt"
    rows, lines = [], []
    for number in range(1, args.rounds + 1):
        arms = ("frozen", "exchanging") if number % 2 else ("exchanging", "frozen")
        for arm in arms:
            began = time.monotonic()
            rows.append(measure(arm, number, data, teacher, args))
            print(f"{arm} {number}: {rows[-1]['updates_per_second']} updates/s ({time.monotonic() - began:.0f} s)", flush=True)
    speed = {(row["arm"], row["round"]): row["updates_per_second"] for row in rows}
    ratios = [speed["exchanging", i] / speed["frozen", i] for i in range(1, args.rounds + 1)]
    exchanging = [row for row in rows if row["arm"] == "exchanging"]
    size = exchanging[0]["totals"][0]
    lines.append(
        f"snapshot {size['published_bytes'] / max(1, size['published']) / 1e6:.1f} MB, interval {args.interval} updates"
    )
    for row in rows:
        lines.append(f"{row['arm']:<11} round {row['round']}: {row['updates_per_second']:.3f} updates/s for each peer")
    lines.append("ratio exchanging / frozen: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
    for name in ("blocked", "copies"):
        shares = [row[f"{name}_share_of_an_update"] for row in exchanging]
        lines.append(f"{name}, share of one update for each exchange: " + ", ".join(f"{share:.2%}" for share in shares))
    print("\n".join(lines))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        result = {"settings": settings, "runs": rows, "ratios": ratios}
        (args.results / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.results / "results.txt").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
