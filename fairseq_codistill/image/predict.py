"""What trained image classifiers say of images, as tab-separated values:

    python -m fairseq_codistill.image_predict --path peer0/checkpoint_best.pt:peer1/checkpoint_best.pt --out FILE.tsv DATA/test

Files and folders (all images below them) are read in order. A line is FILE, then CLASS and PROBABILITY of the --top best,
names byte for byte as on the disk but for tabs and ends of lines, which become \\t, \\n and \\r. Several checkpoints are an
ensemble, whose probabilities are averaged. If the folders of all images are named as classes, the accuracy is printed too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import checkpoint_utils
from torch import Tensor

from .. import compat
from ..common.paths import expanded, printable
from .folder import ImageFolder, Images
from .models import ImageClassifier
from .task import ImageClassificationTask


class Accuracy(NamedTuple):
    """Percent of the images, and their number."""

    top1: float
    top5: float
    images: int


def find_files(places: Sequence[str]) -> List[str]:
    """The image files among `places` and below them, sorted within each. Raises ValueError if there is none."""
    compat.load_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files: List[str] = []
    for place in map(expanded, places):
        if not os.path.exists(place):
            raise ValueError(f"Images must be files or folders, but there is no {place}.")
        if os.path.isdir(place):
            below = (os.path.join(at, name) for at, _, names in os.walk(place, followlinks=True) for name in names)
            files += sorted(path for path in below if path.lower().endswith(IMG_EXTENSIONS))
        else:
            files.append(place)
    if not files:
        raise ValueError(f"There must be images in {', '.join(places)}, but there is none.")
    return files


def predict(
    models: Sequence[ImageClassifier], task: ImageClassificationTask, files: Sequence[str], *, batch_size: int, device: str
) -> Iterator[Tuple[str, Tensor]]:
    """(file, mean probabilities [V]) for each file that can be read, in order."""
    images = Images(task.classes, list(files), [0] * len(files))
    skip = task.cfg.skip_unreadable_images
    dataset = ImageFolder(images, task.pipeline(train=False), *task.normalisation, skip=skip)
    for start in range(0, len(files), batch_size):
        batch = dataset.collater([dataset[i] for i in range(start, min(start + batch_size, len(files)))])
        if not batch:
            continue
        image_BCHW = batch["net_input"]["image"].to(device)
        with torch.no_grad():
            probability_BV = sum(model(image_BCHW).float().softmax(-1) for model in models) / len(models)
        for index, probability_V in zip(batch["id"].tolist(), probability_BV.cpu()):
            yield files[index], probability_V


def load(paths: str, device: str, overrides: dict) -> Tuple[List[ImageClassifier], Any]:
    """The models of a.pt:b.pt and their task. Raises ValueError for files that are no image classifiers."""
    paths = ":".join(map(expanded, paths.split(":")))
    for path in paths.split(":"):
        if not os.path.isfile(path):
            raise ValueError(f"--path must be checkpoints a.pt:b.pt, but there is no file {path}.")
    compat.allow_checkpoint_classes()
    compat.quieten_libraries()  # `python -m` has not done what a plugin's import does
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(paths.split(":"), arg_overrides=overrides)
    if not isinstance(task, ImageClassificationTask):
        raise ValueError(f"--path must be checkpoints of --task image_classification, but these are of {type(task).__name__}.")
    return [model.to(device).eval() for model in models], task


def write(out: Path, classes: Sequence[str], rows: Iterator[Tuple[str, Tensor]], top: int) -> Optional[Accuracy]:
    """Write the lines; returns the accuracy if every file lies in a folder that is named as a class."""
    hits, labelled, number = [0, 0], True, 0
    place = {name: i for i, name in enumerate(classes)}
    part = out.with_name(out.name + ".part")
    # A name is bytes; those that are no UTF-8 come and go as Python's stand-ins for them.
    with open(part, "w", encoding="utf-8", errors="surrogateescape") as file:
        for path, probability_V in rows:
            best = probability_V.topk(min(top, len(classes)))
            words = [f"{_in_a_cell(classes[i])}\t{p:.6f}" for p, i in zip(best.values.tolist(), best.indices.tolist())]
            file.write("\t".join([_in_a_cell(path), *words]) + "\n")
            label = place.get(Path(path).resolve().parent.name)
            labelled, number = labelled and label is not None, number + 1
            if labelled:
                order = probability_V.topk(min(5, len(classes))).indices.tolist()
                hits = [hits[0] + (order[0] == label), hits[1] + (label in order)]
    part.replace(out)
    if not (labelled and number):
        return None
    first, fifth = (round(100 * hit / number, 2) for hit in hits)
    return Accuracy(first, fifth, number)


def _in_a_cell(name: str) -> str:
    return name.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fairseq_codistill.image_predict", description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="+", help="image files, and folders of them")
    parser.add_argument("--path", required=True, help="checkpoints, a.pt:b.pt for an ensemble")
    parser.add_argument("--out", type=lambda path: Path(expanded(path)), required=True, help="the file to write")
    parser.add_argument("--top", type=int, default=5, help="classes in each line")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--cpu", action="store_true", help="not on a GPU, even if there is one")
    parser.add_argument("--skip-unreadable-images", action="store_true", help="leave them out, with a warning")
    args = parser.parse_args(argv)
    device = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    try:
        for name in ("top", "batch_size"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but is {getattr(args, name)} instead.")
        if args.out.is_dir() or not args.out.parent.is_dir():  # told before the work, not after it
            what = "is a folder" if args.out.is_dir() else "lies in no folder"
            raise ValueError(f"--out must be the file to write, but {args.out} {what}.")
        models, task = load(args.path, device, {"skip_unreadable_images": True} if args.skip_unreadable_images else {})
        rows = predict(models, task, find_files(args.images), batch_size=args.batch_size, device=device)
        accuracy = write(args.out, task.classes, rows, args.top)
    except ValueError as error:
        print(f"image_predict: {printable(str(error))}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"image_predict: {printable(f'{error.filename or args.out}: {error.strerror}')}", file=sys.stderr)
        return 1
    if accuracy:
        print(f"top-1 {accuracy.top1:.2f} %, top-5 {accuracy.top5:.2f} %, {accuracy.images} images")
    print(f"wrote {printable(str(args.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
