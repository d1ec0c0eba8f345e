"""SIGKILL at random moments while a peer publishes, 200 times: does a reader ever believe half a snapshot?

    python tests/stress/kill_while_publishing.py --kills 200 --seed 1

A process publishes one snapshot after the other, every value of which is its update's number, and is killed, and started
again, which resumes after what it had published. Meanwhile another process reads the newest snapshot as fast as it can.
Half of the kills are with large snapshots, where writing takes the time, half with small ones, where the steps between do.
Where each kill struck is read off from what lay in the directory afterwards. It fails (exit status 1) if the reader
believes a snapshot whose values are not all its update's number, finds anything that it must refuse, goes back to an older
one or crashes; if a restart cannot take the dead one's place; if the directory grows beyond what it may hold, or holds
anything but the snapshots that are kept after one start that ended well.
"""

from __future__ import annotations

import argparse
import collections
import math
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Callable, Counter, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from torch import nn

from fairseq_codistill.exchange.exchange import KEEP, Exchange, Run
from fairseq_codistill.exchange.manifest import BadSnapshot, Manifest, file_name, manifest_name
from fairseq_codistill.exchange.snapshot import Buffer, fingerprint, tensors_of
from fairseq_codistill.exchange.stores import open_store

RUN = Run(peers=2, dictionary_sha256=None, classes=None)
WIDTHS = (1500, 40)  # of a square matrix: 9 MB and 7 kB
START_SECONDS = 120.0  # for a process to start on a busy machine
MOMENTS = (
    "between two snapshots",
    "weights: temporary file incomplete",
    "weights: complete, not yet renamed",
    "weights in place, manifest not begun",
    "manifest being written",
    "manifest in place, latest.json not begun",
    "latest.json being written",
    "latest.json replaced, old ones not yet removed",
)


def publish_for_ever(path: str, width: int, ready: Any) -> None:
    """One start of the peer: resumes after what it had published, publishes until it is killed."""
    torch.set_num_threads(1)
    publish(path, width, ready.set)


def publish(path: str, width: int, begun: Callable[[], None], most: float = math.inf) -> None:
    """Join, resume, and publish `most` snapshots."""
    net = nn.Linear(width, width)
    weights = tensors_of(net)
    buffer = Buffer(weights)
    exchange = Exchange(open_store(path), 0)
    exchange.join(RUN)
    past = newest(exchange)
    first = update = past.update + 1 if past else 1
    exchange.begin(update, fingerprint(net))
    begun()
    while update < first + most:
        for tensor in weights.values():
            tensor.data.fill_(update)
        buffer.fill(weights)()
        exchange.publish(buffer, update, epoch=1, model={}, time=time.time(), fingerprint=fingerprint(net))
        update += 1
    exchange.leave()


def newest(exchange: Exchange) -> Optional[Manifest]:
    """Of the peer that is killed; None also where that cannot be read, which must not be."""
    try:
        return exchange.newest(0)
    except BadSnapshot:
        return None


@dataclass
class Reads:
    """What the reader met. `torn`, `refused`, `backwards`, `crashes` must stay 0."""

    believed: int = 0
    newest: int = 0  # update
    went: int = 0  # replaced between the manifest and the weights: no error
    torn: int = 0
    refused: int = 0
    backwards: int = 0
    crashes: List[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return bool(self.believed) and not (self.torn or self.refused or self.backwards or self.crashes)


def read_until(path: str, width: int, ended: Any, ready: Any, answer: Any) -> None:
    """The reader, in a process of its own. Sends its `Reads` when `ended` is set."""
    torch.set_num_threads(1)
    exchange, net, reads = Exchange(open_store(path), 1), nn.Linear(width, width), Reads()
    ready.set()
    while not ended.is_set():
        try:
            _read_once(exchange, net, reads)
        except BadSnapshot:
            reads.refused += 1
        except Exception as error:
            reads.crashes.append(f"{type(error).__name__}: {error}")
    answer.send(reads)


def _read_once(exchange: Exchange, net: nn.Module, reads: Reads) -> None:
    manifest = exchange.newest(0)
    if manifest is None:
        return
    weights = exchange.fetch(0, manifest, fingerprint(net), tensors_of(net))
    if weights is None:
        reads.went += 1
        return
    reads.believed += 1
    reads.torn += not all(bool((tensor == manifest.update).all()) for tensor in weights.values())
    reads.backwards += manifest.update < reads.newest
    reads.newest = manifest.update


def moment(folder: Path, latest: Optional[Manifest], size: int) -> str:
    """Where in publishing the kill struck. `latest`: what latest.json says; `size`: bytes of the weights' file."""
    following = latest.update + 1 if latest else 1
    names = set(os.listdir(folder))
    temporary = [name for name in names if name.startswith(".tmp-")]
    if file_name(following) not in names:
        if temporary:
            return MOMENTS[1 if (folder / temporary[0]).stat().st_size < size else 2]
        return MOMENTS[7 if sum(name.endswith(".safetensors") for name in names) > KEEP else 0]
    if manifest_name(following) not in names:
        return MOMENTS[4 if temporary else 3]
    return MOMENTS[6 if temporary else 5]


@dataclass
class Kills:
    """What lay in the directory after the kills."""

    moments: Counter = field(default_factory=collections.Counter)
    largest: int = 0  # bytes in the directory
    most_files: int = 0
    snapshot: int = 0  # bytes of one snapshot's weights
    last: int = 0  # update
    unreadable: int = 0  # times that latest.json was not to be read
    leftovers: int = 0  # files that nobody needs, after one start that ended well

    @property
    def is_good(self) -> bool:
        """The snapshots that are kept, the new one that is there before an old one goes, one that was never finished."""
        return self.largest <= (KEEP + 2) * (self.snapshot + 4096) and not self.leftovers + self.unreadable


def kill_often(path: str, kills: int, width: int, random: Random, context: Any) -> Kills:
    result, reader = Kills(snapshot=len(Buffer(tensors_of(nn.Linear(width, width))).data)), Exchange(open_store(path), 1)
    seconds = 0.05  # of one snapshot, as measured so far
    for number in range(kills):
        ready = context.Event()
        peer = context.Process(target=publish_for_ever, args=(path, width, ready))
        peer.start()
        assert ready.wait(START_SECONDS), "the killed peer's successor did not start"
        began = time.monotonic()
        time.sleep(random.uniform(0, 3 * seconds))
        peer.kill()
        lived = time.monotonic() - began
        peer.join()
        latest = newest(reader)
        result.unreadable += latest is None and result.last > 0
        made = (latest.update if latest else 0) - result.last
        seconds = 0.8 * seconds + 0.2 * lived / (made + 0.5)
        result.last += made
        _look(Path(path), latest, result)
        _progress(number + 1, kills)
    publish(path, width, lambda: None, most=KEEP + 1)
    result.leftovers = len(os.listdir(os.path.join(path, "peer0"))) - 2 * KEEP - 3  # besides latest.json, alive.json and lock
    return result


def _look(root: Path, latest: Optional[Manifest], result: Kills) -> None:
    result.moments[moment(root / "peer0", latest, result.snapshot)] += 1
    files = [file for file in root.rglob("*") if file.is_file()]
    result.largest = max(result.largest, sum(file.stat().st_size for file in files))
    result.most_files = max(result.most_files, len(files))


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty() or done % 50 == 0:
        print(f"\r{done} of {of} kills", end="\n" if done == of or not sys.stderr.isatty() else "", file=sys.stderr, flush=True)


def show(results: List[Tuple[Kills, Reads]], options: argparse.Namespace, seconds: float) -> None:
    print(f"{options.kills} kills, seed {options.seed}, {seconds:.0f} s\n")
    rows: List[Tuple[str, Callable[[Kills, Reads], Any]]] = [
        ("one snapshot, MB", lambda kills, _: f"{kills.snapshot / 1e6:.3f}"),
        *((f"killed: {name}", lambda kills, _, name=name: kills.moments[name]) for name in MOMENTS),
        ("snapshots published", lambda kills, _: kills.last),
        ("snapshots believed by the reader", lambda _, reads: reads.believed),
        ("  gone before they were read", lambda _, reads: reads.went),
        ("  torn, and believed", lambda _, reads: reads.torn),
        ("  refused", lambda _, reads: reads.refused),
        ("  older than the one before", lambda _, reads: reads.backwards),
        ("  crashes", lambda _, reads: len(reads.crashes)),
        ("latest.json unreadable after a kill", lambda kills, _: kills.unreadable),
        ("largest directory, MB", lambda kills, _: f"{kills.largest / 1e6:.3f}"),
        (
            f"  in snapshots (most: {KEEP} kept, a new one, a dead one)",
            lambda kills, _: f"{kills.largest / kills.snapshot:.2f}",
        ),
        ("  files", lambda kills, _: kills.most_files),
        ("files left over after a start that ended well", lambda kills, _: kills.leftovers),
    ]
    for name, cell in rows:
        print(f"{name:56}" + "".join(f"{cell(*result):>10}" for result in results))
    for crash in [crash for _, reads in results for crash in reads.crashes][:5]:
        print(f"  {crash}")


def main() -> int:
    parser = argparse.ArgumentParser(description="SIGKILL at random moments while a peer publishes.")
    parser.add_argument("--kills", type=int, default=200, help="how many, half of them with large snapshots (default: 200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", help="where the exchange is made (default: the system's place for temporary files)")
    options = parser.parse_args()
    # Processes are forked from one that has all this loaded, or each start would cost seconds.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "fairseq_codistill.exchange.exchange"])
    torch.set_num_threads(1)
    random, began, results = Random(options.seed), time.monotonic(), []
    for width, kills in zip(WIDTHS, (options.kills // 2, options.kills - options.kills // 2)):
        with tempfile.TemporaryDirectory(dir=options.dir) as path:
            results.append(_run(path, kills, width, random, context))
    show(results, options, time.monotonic() - began)
    if all(reads.is_good and kills.is_good for kills, reads in results):
        return 0
    print("FAILED", file=sys.stderr)
    return 1


def _run(path: str, kills: int, width: int, random: Random, context: Any) -> Tuple[Kills, Reads]:
    ended, ready, (answer, theirs) = context.Event(), context.Event(), context.Pipe(duplex=False)
    reader = context.Process(target=read_until, args=(path, width, ended, ready, theirs))
    reader.start()
    assert ready.wait(START_SECONDS), "the reader did not start"
    try:
        result = kill_often(path, kills, width, random, context)
    finally:
        ended.set()
    reads = answer.recv()
    reader.join()
    return result, reads


if __name__ == "__main__":
    sys.exit(main())
