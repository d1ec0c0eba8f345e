"""What a run will cost, before it is started: the batch, tokens, GPU-hours and disk, in a few lines.

Hours are an estimate, scaled from one published measurement by the number of weights. `--tokens-per-second` gives your own
(`wps` in fairseq's log, for one GPU training one model of this size).
"""

from __future__ import annotations

import argparse
import sys
from typing import List, NamedTuple, Optional

# fairseq's sizes: layers of encoder and of decoder, width, feed-forward width.
ARCHITECTURES = {
    "transformer": (6, 512, 2048),
    "transformer_wmt_en_de": (6, 512, 2048),
    "transformer_iwslt_de_en": (6, 512, 1024),
    "transformer_wmt_en_de_big": (6, 1024, 4096),
    "transformer_vaswani_wmt_en_de_big": (6, 1024, 4096),
}
# NVIDIA DeepLearningExamples, PyTorch/Translation/Transformer, README: Transformer-big, a joint vocabulary of 33,708,
# mixed precision, DGX-1 with 8 V100 16 GB, 5,120 tokens a GPU: 235,077 target tokens a second. Their fairseq is tuned.
V100_TOKENS_PER_SECOND = 235_077 / 8
V100_SIZE = (6, 1024, 4096, 33_708)
# Small models are bound by launching kernels, not by arithmetic: the measurement says nothing of them.
SMALLEST = 50_000_000
SNAPSHOTS_KEPT = 3  # by the exchange, for each peer


class Model(NamedTuple):
    layers: int
    width: int
    ffn: int
    vocab: int

    @property
    def weights(self) -> int:
        """Of a fairseq transformer with joined embeddings and sinusoidal positions, biases and norms counted."""
        attention = 4 * (self.width**2 + self.width)
        feed = 2 * self.width * self.ffn + self.ffn + self.width
        norm = 2 * self.width
        return self.vocab * self.width + self.layers * (3 * attention + 2 * feed + 5 * norm)


def passes(method: str, jobs: int) -> float:
    """Work of an update of one job, in forward and backward passes of its own batch; a forward alone is a third of one."""
    if method == "codistill":
        return 1 + (jobs - 1) / 3
    return 2 if method.startswith("rdrop") else 1


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def _some(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def lines(args: argparse.Namespace, model: Optional[Model]) -> List[str]:
    """The announcement; estimates are called estimates."""
    workers = args.gpus * args.update_freq
    batch = args.jobs * workers * args.tokens
    total = batch * args.updates
    device = "process" if args.cpu else "GPU"
    own = f"update-freq {args.update_freq}" if args.gpus == 1 else f"{args.gpus} {device}s x update-freq {args.update_freq}"
    told = [
        f"{args.recipe}, {args.method}:",
        f"  batch    {_some(args.jobs * workers, 'worker')} of {args.tokens:,} tokens = "
        f"{_some(args.jobs, 'peer' if args.jobs > 1 else 'job')} x {own}: at most {batch:,} tokens in an update",
        f"  length   {args.updates:,} updates, at most {total:,} tokens in all",
    ]
    if model:
        told += [*_hours(args, model, total), *_disk(args, model)]
    return told + ([f"  expect   {args.expect}"] if args.expect else [])


def _hours(args: argparse.Namespace, model: Model, tokens: int) -> List[str]:
    if args.cpu or (model.weights < SMALLEST and not args.tokens_per_second):
        return ["  time     see the recipe's README.md, which has what was measured"]
    rate = args.tokens_per_second or V100_TOKENS_PER_SECOND * Model(*V100_SIZE).weights / model.weights
    hours = tokens * passes(args.method, args.jobs) / rate / 3600
    what = "by the rate that you gave" if args.tokens_per_second else "estimate for V100s, from NVIDIA's measurement"
    gpus = min(args.jobs * args.gpus, args.devices or sys.maxsize)  # fewer devices than peers: they share
    shared = f"; {hours / gpus:,.1f} hours on {gpus} of them" if gpus > 1 else ""
    return [
        f"  time     {tokens:,} tokens x {passes(args.method, args.jobs):.2f} passes / {rate:,.0f} a second = "
        f"{hours:,.1f} GPU-hours ({what}){shared}"
    ]


def _disk(args: argparse.Namespace, model: Model) -> List[str]:
    # Weights and Adam's two averages, four bytes each; beside the kept ones lie checkpoint_last and checkpoint_best, and
    # the next is written before the oldest goes.
    checkpoint, kept = 12 * model.weights, args.keep + 3
    total = gigabytes(args.jobs * kept * checkpoint)
    told = f"  disk     {args.jobs} x {kept} checkpoints of {gigabytes(checkpoint)} = {total}"
    if args.method == "codistill":
        size = 2 * model.weights
        told += f", exchange {args.jobs} x {SNAPSHOTS_KEPT} snapshots of {gigabytes(size)} = "
        told += f"{gigabytes(args.jobs * SNAPSHOTS_KEPT * size)} in 16 bits"
    return [told + f" at most ({model.weights:,} weights)"]


def model_of(args: argparse.Namespace) -> Optional[Model]:
    """None where the size is not known: another architecture, or no dictionary yet."""
    layers, width, ffn = ARCHITECTURES.get(args.arch, (None, None, None))
    sizes = (args.layers or layers, args.width or width, args.ffn or ffn, args.vocab)
    return Model(*sizes) if all(sizes) else None


def announced(argv: Optional[List[str]] = None) -> str:
    """The announcement for these words of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("recipe", "method", "arch"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("jobs", "gpus", "update-freq", "tokens", "updates", "keep"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("layers", "width", "ffn", "vocab"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--devices", type=int, help="GPUs that there are")
    parser.add_argument("--tokens-per-second", type=float, help="of one GPU, without codistillation")
    parser.add_argument("--expect", default="", help="the paper's number")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    return "\n".join(lines(args, model_of(args)))


def main(argv: Optional[List[str]] = None) -> int:
    print(announced(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
