"""Is loading images the bottleneck? Images per second of the loader alone, of the model alone, and of both together.

    python -m benchmarks.data.image_loading --out WORK --results benchmarks/results/image_loading

Two kinds of made-up images: photographs as large as ImageNet's (500 × 375, JPEG) with --augmentation imagenet, and 32 × 32
PNG with --augmentation small. They go through the task's own dataset and fairseq's own iterator, with none or several workers;
`together` is a whole update, forward, backward and optimizer, on batches as the iterator gives them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple

import numpy as np
import torch
from fairseq.data.iterators import EpochBatchIterator
from PIL import Image
from torch.nn.functional import cross_entropy

from fairseq_codistill.image.folder import ImageFolder, find_images
from fairseq_codistill.image.models import ImageClassifierConfig, build_network
from fairseq_codistill.image.transforms import Pipeline


class Kind(NamedTuple):
    """A kind of images, and what is done with them."""

    name: str
    width: int
    height: int
    suffix: str
    augmentation: str
    size: int  # pixels of the square that the model sees
    arch: str
    images: int
    batch: int


KINDS = (
    Kind("imagenet", 500, 375, ".jpg", "imagenet", 224, "resnet50", 512, 32),
    Kind("small", 32, 32, ".png", "small", 32, "resnet20", 4096, 128),
)


def write_images(folder: Path, kind: Kind) -> None:
    """Colour fields with some grain: a JPEG of them is about as large as one of a photograph (100 to 150 kB)."""
    draw = np.random.default_rng(1)
    for number in range(kind.images):
        path = folder / str(number % 8) / f"{number:05}{kind.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((kind.width, kind.height))
        grain = draw.normal(0, 12, (kind.height, kind.width, 3))
        Image.fromarray((np.asarray(fields) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)


def batches(dataset: ImageFolder, kind: Kind, workers: int) -> Iterator[Dict[str, Any]]:
    """Batches without end, from fairseq's iterator."""
    epoch = 0
    while True:
        epoch += 1
        order = dataset.batch_by_size(np.random.default_rng(epoch).permutation(len(dataset)), max_sentences=kind.batch)
        iterator = EpochBatchIterator(
            dataset, dataset.collater, order, num_workers=workers, epoch=epoch, buffer_size=10 if workers == 0 else 0
        )
        yield from iterator.next_epoch_itr(shuffle=False)


def images_per_second(step: Callable[[], int], seconds: float) -> float:
    """`step` works on some images and returns how many; two steps to warm up, then as many as fit into the time."""
    for _ in range(2):
        step()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += step()
    return count / (time.perf_counter() - began)


def updater(kind: Kind, device: str) -> Callable[[Dict[str, Any]], int]:
    net = build_network(ImageClassifierConfig(image_model=kind.arch), 3, 8).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    def update(batch: Dict[str, Any]) -> int:
        optimizer.zero_grad()
        image = batch["net_input"]["image"].to(device, non_blocking=True)
        cross_entropy(net(image), batch["target"].to(device, non_blocking=True)).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return len(image)

    return update


def measure(folder: Path, kind: Kind, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """A row for the model alone, and for each number of workers the loader alone and both."""
    if args.device == "cpu":  # or a single update would last a minute
        kind = kind._replace(batch=max(4, kind.batch // 8))
    write_images(folder, kind)
    pipeline = Pipeline(kind.augmentation, kind.size, resize=None, channels=3, flip=True, train=True)
    dataset = ImageFolder(find_images(folder), pipeline, [0.5] * 3, [0.25] * 3, shuffle=True)
    update = updater(kind, args.device)
    fixed = dataset.collater([dataset[i] for i in range(kind.batch)])
    model = images_per_second(lambda: update(fixed), args.seconds)
    rows = [{"kind": kind.name, "what": f"{kind.arch} alone", "workers": None, "images_per_second": model}]
    for workers in args.workers:
        stream = batches(dataset, kind, workers)
        alone = images_per_second(lambda stream=stream: len(next(stream)["target"]), args.seconds)
        both = images_per_second(lambda stream=stream: update(next(stream)), args.seconds)
        stream.close()  # its workers end before the next ones are forked
        rows.append({"kind": kind.name, "what": "loader alone", "workers": workers, "images_per_second": alone})
        rows.append({"kind": kind.name, "what": "together", "workers": workers, "images_per_second": both})
    return rows


def describe(rows: List[Dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        workers = "" if row["workers"] is None else f", {row['workers']} workers"
        model = next(other["images_per_second"] for other in rows if other["kind"] == row["kind"] and other["workers"] is None)
        share = "" if row["workers"] is None else f" ({row['images_per_second'] / model:.2f} of the model alone)"
        lines.append(f"{row['kind']}: {row['what']}{workers}: {row['images_per_second']:.1f} images/s{share}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the images; must not exist yet")
    parser.add_argument("--results", type=Path, help="write results.txt and results.json here")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS], default=[kind.name for kind in KINDS])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out must be a new folder, but {args.out} is there already")
    logging.basicConfig(level=logging.WARNING, force=True)  # fairseq's import has left it at DEBUG
    rows = [row for kind in KINDS if kind.name in args.kinds for row in measure(args.out / kind.name, kind, args)]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU thread(s)"
    text = f"model on {device}, {os.cpu_count()} cores, torch {torch.__version__}\n" + describe(rows)
    print(text, end="")
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        (args.results / "results.txt").write_text(text, encoding="utf-8")
        settings = {"seconds": args.seconds, "device": device, "cores": os.cpu_count()}
        (args.results / "results.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
