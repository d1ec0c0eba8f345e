"""Does an exchange show in the step time? Two peers exchange in every second interval, and keep their teacher in the others.

    python -m benchmarks.exchange.speed --out WORK --results benchmarks/results/exchange_speed

Real fairseq-train processes, a core each, a transformer of the base size (about 60 million parameters). Each interval that
begins with an exchange is compared with its two neighbours, which do all the same work but for the exchange. So a machine
that is a little slower now than ten minutes ago does not show.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Dict, List

from benchmarks import run_log

ROOT = Path(__file__).resolve().parents[2]
PEERS = 2


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


def run(words: List[object], log: Path, **environ: str) -> None:
    with open(log, "ab") as file:
        streams = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
        subprocess.run([*map(str, words)], env={**os.environ, **environ}, check=True, **streams)


def train(data: Path, out: Path, args: argparse.Namespace) -> None:
    updates = (2 * args.pairs + 4) * args.interval + 1
    program = [sys.executable, Path(__file__).with_name("alternating_train.py"), "fairseq-train"]
    words = ["codistill-launch", "--peers", PEERS, *([] if args.gpu else ["--gpus-per-peer", 0]), "--", *program, data]
    words += ["--no-save", "--fp16" if args.gpu else "--cpu"]
    words += ["--user-dir", ROOT / "fairseq_codistill", "--save-dir", out / "run"]
    words += ["--arch", "transformer", "--share-all-embeddings"]
    for side in ("encoder", "decoder"):
        words += [f"--{side}-layers", args.layers, f"--{side}-embed-dim", args.width, f"--{side}-ffn-embed-dim", 4 * args.width]
    words += ["--optimizer", "adam", "--lr", 1e-4, "--max-tokens", args.tokens, "--max-update", updates, "--num-workers", 0]
    words += ["--required-batch-size-multiple", 1, "--log-format", "json", "--log-interval", 50, "--disable-validation"]
    words += ["--criterion", "codistill_ce", "--codistill-loss", "ce", "--codistill-alpha-schedule", "constant"]
    words += ["--codistill-interval", args.interval, "--codistill-wait", 120]
    run(words, out / "launch.log", ALTERNATING_TIMES=str(out), PYTHONPATH=str(ROOT))


def read_times(path: Path) -> Dict[int, float]:
    """When each update began, in seconds, as alternating_train.py writes it."""
    return {int(update): float(seconds) for update, seconds in map(str.split, path.read_text().splitlines())}


def ratios(times: Dict[int, float], interval: int) -> List[float]:
    """Speed of each interval with an exchange over the mean speed of its neighbours without. In the first two intervals
    nobody teaches, so neither they nor the third, their neighbour, count."""
    seconds = [times[end] - times[end - interval] for end in range(interval, max(times) + 1, interval)]
    return [(seconds[i - 1] + seconds[i + 1]) / 2 / seconds[i] for i in range(4, len(seconds) - 1, 2)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs; must not exist yet")
    parser.add_argument("--results", type=Path, help="write the table here, as results.json and results.txt")
    parser.add_argument("--pairs", type=int, default=5, help="intervals with an exchange that are compared")
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--words", type=int, default=30_000, help="words in the dictionary")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=200, help="--max-tokens: target tokens in a batch")
    parser.add_argument("--gpu", action="store_true", help="the peers share what GPUs there are, in fp16")
    args = parser.parse_args()
    if args.out.exists() or args.pairs < 2 or args.interval < 2:
        parser.error("--out must not exist yet, and --pairs and --interval be 2 or more")
    args.out.mkdir(parents=True)
    train(make_data(args.out / "data", args.words), args.out, args)
    report(args)
    return 0


def report(args: argparse.Namespace) -> None:
    """Print what the run in --out says, and write it to --results."""
    times = [read_times(args.out / f"peer{peer}") for peer in range(PEERS)]
    by_peer = [ratios(each, args.interval) for each in times]
    everything = sum(by_peer, [])
    error = statistics.stdev(everything) / len(everything) ** 0.5
    totals = [lives[0].totals for lives in run_log.load(str(args.out / "run")).peers]
    update = statistics.mean((each[max(each)] - each[3 * args.interval]) / (max(each) - 3 * args.interval) for each in times)
    size = totals[0]["published_bytes"] / max(1, totals[0]["published"]) / 1e6
    lines = [f"snapshot {size:.1f} MB, interval {args.interval} updates of {update:.2f} s, {args.tokens} tokens in a batch"]
    for peer, values in enumerate(by_peer):
        lines.append(f"peer {peer}: speed with an exchange / without: {', '.join(f'{value:.3f}' for value in values)}")
    mean, median = statistics.mean(everything), statistics.median(everything)
    lines.append(f"mean {mean:.3f} ± {error:.3f} (standard error), median {median:.3f}")
    for text, key in (("training thread blocked", "visible_s"), ("copies of weights", "copy_s"), ("background", "hidden_s")):
        share = statistics.mean(total[key] / max(1, total["published"]) / update for total in totals)
        lines.append(f"{text}, share of one update for each exchange: {share:.2%}")
    print("\n".join(lines))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        result = {"settings": settings, "ratios": by_peer, "totals": totals, "update_s": round(update, 4)}
        (args.results / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.results / "results.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
