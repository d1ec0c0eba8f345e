"""Bytes per update: codistillation against all_reduce, for a given model, and checked against a real run.

    all_reduce     each worker sends 2 (W - 1)/W of the gradients' bytes in each update (and receives as many): a ring of W
    published      a peer writes one snapshot of S bytes every N updates: S/N
    read           and reads one from each of its teachers: teachers · S/N
    broadcast      its rank 0 reads; every other worker of the group then receives each teacher's weights, in the dtype in
                   which they are held
    inside         the all_reduce among a peer's own workers, which stays

A safetensors header (some hundred bytes for each tensor) and manifests are left out: below 0.1 % for the models here.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Dict, List, Optional, Sequence

from benchmarks.communication import logged, model_size
from benchmarks.communication.model_size import BYTES, Size

TOPOLOGIES = ("all", "ring")


def ring_all_reduce(size: float, workers: int) -> float:
    """Bytes that each of `workers` sends to sum `size` bytes over all: (W - 1)/W to scatter sums, as much to gather them."""
    return 2 * (workers - 1) / workers * size


def teachers(peers: int, topology: str) -> int:
    return peers - 1 if topology == "all" else min(1, peers - 1)


@dataclass(frozen=True)
class Setting:
    """A codistillation of `peers` groups of `workers`, with the options of the same names."""

    peers: int
    workers: int
    interval: int
    wire: str = "bf16"
    topology: str = "all"
    held: str = "fp32"  # --codistill-peer-dtype, by default the model's


@dataclass(frozen=True)
class Traffic:
    """Bytes for each update. The all_reduces are per worker, for gradients in fp32 and in fp16."""

    all_reduce_fp32: float  # over all peers' workers
    all_reduce_fp16: float
    published_per_peer: float
    read_per_peer: float
    exchange_per_worker: float  # published and read, shared out over the group
    broadcast_per_worker: float  # received inside the group
    inside_fp32: float
    inside_fp16: float

    @property
    def exchange_per_peer(self) -> float:
        return self.published_per_peer + self.read_per_peer

    def between_peers_times_less(self, dtype: str) -> float:
        """A ring over all workers sends `all_reduce` out of each peer and as much into it; the exchange replaces both."""
        all_reduce = self.all_reduce_fp32 if dtype == "fp32" else self.all_reduce_fp16
        return 2 * all_reduce / self.exchange_per_peer


def traffic(size: Size, setting: Setting) -> Traffic:
    snapshot = size.published * BYTES[setting.wire]
    held = size.published * BYTES[setting.held]
    read = teachers(setting.peers, setting.topology)
    everyone = setting.peers * setting.workers
    # Rank 0 sends what the other ranks receive; in a pipelined broadcast each of these passes it on.
    others = (setting.workers - 1) / setting.workers
    return Traffic(
        all_reduce_fp32=ring_all_reduce(4 * size.parameters, everyone),
        all_reduce_fp16=ring_all_reduce(2 * size.parameters, everyone),
        published_per_peer=snapshot / setting.interval,
        read_per_peer=read * snapshot / setting.interval,
        exchange_per_worker=(1 + read) * snapshot / setting.interval / setting.workers,
        broadcast_per_worker=read * held * others / setting.interval,
        inside_fp32=ring_all_reduce(4 * size.parameters, setting.workers),
        inside_fp16=ring_all_reduce(2 * size.parameters, setting.workers),
    )


# The tables.

HEADERS = (
    "n", "workers in a peer", "N",
    "all_reduce over all, per worker: fp32 / fp16", "exchange, per peer: written + read", "per worker",
    "broadcast in the peer, per worker", "all_reduce that stays in the peer, per worker: fp32 / fp16",
    "between peers, times less than fp32 / fp16",
)  # fmt: skip


def row(setting: Setting, bytes_: Traffic) -> List[str]:
    return [
        str(setting.peers), str(setting.workers), str(setting.interval),
        f"{amount(bytes_.all_reduce_fp32)} / {amount(bytes_.all_reduce_fp16)}",
        f"{amount(bytes_.published_per_peer)} + {amount(bytes_.read_per_peer)}",
        amount(bytes_.exchange_per_worker), amount(bytes_.broadcast_per_worker),
        f"{amount(bytes_.inside_fp32)} / {amount(bytes_.inside_fp16)}",
        f"{bytes_.between_peers_times_less('fp32'):,.0f} / {bytes_.between_peers_times_less('fp16'):,.0f}",
    ]  # fmt: skip


def amount(size: float) -> str:
    """Three figures with a unit, powers of ten."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale * 0.9995:
            number = size / scale
            return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f} {unit}"
    return f"{size:.0f} B"


def title(size: Size, wire: str, topology: str) -> str:
    return (
        f"{size.name}: {size.parameters:,} parameters and {size.buffers:,} buffers ({size.source}); "
        f"snapshots in {wire}, topology {topology}; bytes per update"
    )


def markdown(sizes: Sequence[Size], settings: Sequence[Setting]) -> str:
    parts = []
    for size in sizes:
        rows = [HEADERS, ["---:"] * len(HEADERS), *(row(setting, traffic(size, setting)) for setting in settings)]
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        parts.append("\n".join([f"**{title(size, settings[0].wire, settings[0].topology)}**", "", *lines]))
    return "\n\n".join(parts)


def show(sizes: Sequence[Size], settings: Sequence[Setting]) -> None:
    from rich.console import Console
    from rich.table import Table

    for size in sizes:
        table = Table(title=title(size, settings[0].wire, settings[0].topology), title_justify="left")
        for header in HEADERS:
            table.add_column(header, justify="right")
        for setting in settings:
            table.add_row(*row(setting, traffic(size, setting)))
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def as_json(sizes: Sequence[Size], settings: Sequence[Setting]) -> str:
    rows: List[Dict] = []
    for size in sizes:
        for setting in settings:
            rows.append({"model": size._asdict(), **asdict(setting), "bytes_per_update": asdict(traffic(size, setting))})
    return json.dumps(rows, indent=1)


# The command.


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", nargs="+", metavar="NAME", help="resnet50 or fairseq architectures (default: "
                       + ", ".join(model_size.NAMES) + ")")  # fmt: skip
    model.add_argument("--model-file", metavar="FILE", help="count a .safetensors file or a fairseq checkpoint instead")
    model.add_argument("--parameters", type=_number, metavar="M", help="or say how many parameters there are")
    add("--vocabulary", type=_number, default=model_size.VOCABULARY, help="symbols in the joined dictionary")
    add("--peers", type=_number, nargs="+", default=[2, 4], metavar="n")
    add("--workers", type=_number, nargs="+", default=[8, 64], metavar="W", help="workers in each peer")
    add("--interval", type=_number, nargs="+", default=[2500, 500], metavar="N", help="updates between exchanges")
    add("--wire", choices=list(BYTES), default="bf16", help="dtype of the snapshots (--codistill-wire-dtype)")
    add("--held", choices=list(BYTES), default="fp32", help="dtype in which peers are held (--codistill-peer-dtype)")
    add("--topology", choices=TOPOLOGIES, default="all")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true")
    output.add_argument("--markdown", action="store_true", help="the README's table")
    output.add_argument("--run", metavar="RUN_DIR", help="compare with the bytes that a real run logged in "
                        "RUN_DIR/peer*/train.log; exit status 1 where they differ by more than 5 %%")  # fmt: skip
    return parser


def _number(text: str) -> int:
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, but is {text!r} instead")
    return int(text)


def main(words: Optional[Sequence[str]] = None) -> int:
    args = get_parser().parse_args(words)
    try:
        if args.run:
            return logged.compare(args.run)
        sizes = _sizes(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    settings = [
        Setting(peers, workers, interval, args.wire, args.topology, args.held)
        for peers in args.peers for interval in args.interval for workers in args.workers
    ]  # fmt: skip
    if args.json or args.markdown:
        print((as_json if args.json else markdown)(sizes, settings))
    else:
        show(sizes, settings)
    return 0


def _sizes(args: argparse.Namespace) -> List[Size]:
    if args.parameters:
        return [Size(f"a model of {args.parameters:,}", args.parameters)]
    if args.model_file:
        return [model_size.of_file(args.model_file)]
    return [model_size.of_model(name, args.vocabulary) for name in args.model or model_size.NAMES]


if __name__ == "__main__":
    sys.exit(main())
