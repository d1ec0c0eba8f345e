"""Peers in a ring that are killed and started again, again and again: does each reach its last update, and learn as well?

    python tests/stress/soak.py --out WORK --results benchmarks/results/soak

First an undisturbed run of codistill-launch, for the spread of the peers' valid losses; then the same peers, each killed by
SIGKILL at random moments (it trains for --mean-life seconds, half as long to half as long again) and started again some
seconds later, until all have reached their last update. The exit status is 1 unless all did, and unless the disturbed peers'
mean best valid loss lies within the undisturbed peers' range.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Dict, List, Tuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from fairseq_codistill.common.fairseq_log import nll, parse_records

ROOT = Path(__file__).resolve().parents[2]


def words(data: Path, save_dir: Path, args: argparse.Namespace) -> List[str]:
    command = ["fairseq-train", data / "bin", "--cpu", "--user-dir", ROOT / "fairseq_codistill", "--save-dir", save_dir]
    command += ["--task", "translation", "-s", "en", "-t", "de", "--arch", "transformer", "--share-all-embeddings"]
    for side in ("encoder", "decoder"):
        command += [f"--{side}-layers", 1, f"--{side}-embed-dim", 64, f"--{side}-ffn-embed-dim", 128]
        command += [f"--{side}-attention-heads", 2]
    command += ["--optimizer", "adam", "--lr", 3e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 100]
    command += ["--max-tokens", 500, "--max-update", args.updates, "--num-workers", 0, "--required-batch-size-multiple", 1]
    command += ["--criterion", "codistill_ce", "--codistill-loss", "ce", "--codistill-alpha-schedule", "constant"]
    command += ["--codistill-interval", args.interval, "--codistill-topology", "ring", "--log-format", "json"]
    command += ["--log-interval", 20, "--validate-interval", 1000000, "--save-interval", 1000000]
    command += ["--save-interval-updates", args.save, "--validate-interval-updates", args.save, "--keep-interval-updates", 2]
    return [str(word) for word in command]


@dataclass
class Peer:
    """One peer's lives. `kills`: (seconds since the beginning, update) of each SIGKILL."""

    index: int
    command: List[str]
    log: Path
    environment: Dict[str, str]
    kills: List[Tuple[float, int]] = field(default_factory=list)
    update: int = 0  # as it logged last
    failures: int = 0
    done: bool = False

    def live(self, draw: random.Random, began: float, deadline: float, mean_life: float) -> None:
        """Start, kill, start again, until the training ends by itself."""
        while not self.done and time.monotonic() < deadline:
            process = subprocess.Popen(
                self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **self.environment}, text=True, errors="replace",
            )  # fmt: skip
            trains = threading.Event()
            reader = threading.Thread(target=self._read, args=(process.stdout, trains))
            reader.start()
            trains.wait()  # or has ended; nobody is killed before, or nothing would ever happen
            try:
                status = process.wait(mean_life * draw.uniform(0.5, 1.5))
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
                self.kills.append((time.monotonic() - began, self.update))
            reader.join()
            self.done = status == 0
            self.failures += status not in (0, -signal.SIGKILL)
            if not self.done:
                time.sleep(draw.uniform(0, 5))

    def _read(self, lines: IO[str], trains: threading.Event) -> None:
        with open(self.log, "a", encoding="utf-8", buffering=1) as log:
            for line in lines:
                log.write(line)
                for record in parse_records(line):
                    self.update = record.update
                    trains.set()
        trains.set()


def records(log: Path) -> List:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return [record for line in text.splitlines() for record in parse_records(line)]


def losses(log: Path) -> List[Tuple[int, float]]:
    """(update, valid NLL in bits), the last word on each update."""
    return sorted({record.update: nll(record.values) for record in records(log) if record.tag == "valid"}.items())


def undisturbed(data: Path, out: Path, args: argparse.Namespace) -> List[Path]:
    command = ["codistill-launch", "--peers", str(args.peers), "--gpus-per-peer", "0", "--", *words(data, out, args)]
    out.mkdir()
    with open(out / "launch.log", "ab") as log:
        subprocess.run(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=True)
    return [out / f"peer{i}" / "train.log" for i in range(args.peers)]


def disturbed(data: Path, out: Path, args: argparse.Namespace) -> Tuple[List[Peer], float]:
    draw, began = random.Random(args.seed), time.monotonic()
    peers = []
    for i in range(args.peers):
        folder = out / f"peer{i}"
        folder.mkdir(parents=True)
        environment = {"CODISTILL_PEER": str(i), "CODISTILL_PEERS": str(args.peers), "CODISTILL_DIR": str(out / "exchange")}
        environment.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        command = words(data, folder, args) + ["--seed", str(1 + 10_000_000 * i)]
        peers.append(Peer(i, command, folder / "train.log", environment))
    deadline = began + 60 * args.minutes
    threads = [
        threading.Thread(target=peer.live, args=(random.Random(draw.random()), began, deadline, args.mean_life))
        for peer in peers
    ]
    [thread.start() for thread in threads]
    with tqdm(total=args.peers * args.updates, unit="update", desc="soak") as bar:
        while any(thread.is_alive() for thread in threads):
            time.sleep(2.0)
            bar.n = sum(peer.update for peer in peers)
            bar.set_postfix(kills=sum(len(peer.kills) for peer in peers))
    return peers, time.monotonic() - began


def figure(path: Path, quiet: List[List[Tuple[int, float]]], peers: List[Peer]) -> None:
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for peer in peers:
        left.plot([s / 60 for s, _ in peer.kills], [u for _, u in peer.kills], "x", label=f"peer {peer.index}", ms=5)
    left.set(title="each × is a SIGKILL", xlabel="minutes", ylabel="update")
    left.legend(fontsize=8)
    for curve in quiet:
        right.plot(*zip(*curve), color="tab:blue", lw=1)
    for peer in peers:
        right.plot(*zip(*losses(peer.log)), color="tab:red", lw=1, ls="--")
    right.plot([], [], color="tab:blue", label="undisturbed")
    right.plot([], [], color="tab:red", ls="--", label="killed and started again")
    right.set(title="valid NLL of each peer", xlabel="update", ylabel="bits")
    right.legend()
    plt.tight_layout()
    plt.savefig(path, dpi=110)
    plt.close()


def judge(quiet: List[float], loud: List[float], peers: List[Peer], args: argparse.Namespace, seconds: float) -> List[str]:
    low, high, mean = min(quiet), max(quiet), statistics.mean(loud)
    everybody = all(peer.done and peer.update == args.updates for peer in peers)
    within = low <= mean <= high
    taught = [sum("learning from peer" in line for line in open(peer.log, errors="replace")) for peer in peers]
    refused = sum("its snapshot is refused" in line for peer in peers for line in open(peer.log, errors="replace"))
    return [
        f"{args.peers} peers in a ring, {args.updates} updates, exchanges every {args.interval}, seed {args.seed}, "
        f"{seconds / 60:.1f} minutes, {sum(len(peer.kills) for peer in peers)} kills",
        *(
            f"peer {p.index}: {'reached' if p.done else 'did NOT reach'} update {p.update}, killed {len(p.kills)} times, ended "
            f"with an error {p.failures} times, reloaded its teacher {t} times, best valid NLL {loss:.3f}"
            for p, t, loss in zip(peers, taught, loud)
        ),
        f"snapshots refused: {refused}",
        f"undisturbed best valid NLL: {', '.join(f'{loss:.3f}' for loss in quiet)} (mean {statistics.mean(quiet):.3f})",
        f"disturbed mean {mean:.3f}: {'within' if within else 'OUTSIDE'} {low:.3f} … {high:.3f}",
        "PASSED" if everybody and within and not any(p.failures for p in peers) else "FAILED",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for data and runs; must not exist yet")
    parser.add_argument("--results", type=Path, help="write soak.txt, soak.json and soak.png here")
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--updates", type=int, default=7000)
    parser.add_argument("--interval", type=int, default=50)
    parser.add_argument("--save", type=int, default=100, help="updates between checkpoints")
    parser.add_argument(
        "--mean-life", type=float, default=60.0, help="seconds from a start to a kill, mean, after the first 15"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="give up after these")
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=1, help="of the kills")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out must not exist yet, but {args.out} does")
    args.out.mkdir(parents=True)
    logging.disable(logging.INFO)  # with fairseq imported, matplotlib tells of every font
    prepare = [sys.executable, ROOT / "recipes/demo/prepare.py", "--out", args.out / "data", "--train-pairs", args.pairs]
    subprocess.run([*map(str, prepare), "--vocab", "500"], check=True, stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quiet = [losses(log) for log in undisturbed(args.out / "data", args.out / "undisturbed", args)]
    peers, seconds = disturbed(args.out / "data", args.out / "disturbed", args)
    best = [min(loss for _, loss in curve) for curve in quiet]
    loud = [min((loss for _, loss in losses(peer.log)), default=float("nan")) for peer in peers]
    lines = judge(best, loud, peers, args, seconds)
    print("\n".join(lines))
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        figure(args.results / "soak.png", quiet, peers)
        (args.results / "soak.txt").write_text("\n".join(lines) + "\n")
        kills = {f"peer{peer.index}": [[round(s, 1), u] for s, u in peer.kills] for peer in peers}
        curves = {"undisturbed": quiet, "disturbed": [losses(peer.log) for peer in peers]}
        (args.results / "soak.json").write_text(json.dumps({"kills": kills, "valid_nll": curves}) + "\n")
    return 0 if lines[-1] == "PASSED" else 1


if __name__ == "__main__":
    sys.exit(main())
