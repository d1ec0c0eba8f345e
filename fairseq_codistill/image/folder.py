"""Images in folders of classes, the layout of ImageNet and torchvision's ImageFolder, as a fairseq dataset.

    DATA/train/CLASS/….jpeg        DATA/valid/CLASS/….png        (a folder `val` serves as `valid`)

What is random about an image depends on (seed, epoch, index) alone: not on the worker that draws it, nor on a restart.
Shapes: B images in a batch, C channels, H × W pixels.
"""

from __future__ import annotations

import logging
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import FairseqDataset

from .. import compat
from ..common.paths import printable
from .transforms import Pipeline, pixels

logger = logging.getLogger(__name__)


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


class Images(NamedTuple):
    """The files of one split. `labels[i]` is the place of the class of `paths[i]` in `classes`."""

    classes: List[str]
    paths: List[str]
    labels: List[int]


def split_folder(data: str, split: str) -> Path:
    """Where a split lies. Raises ValueError if there is no such folder."""
    names = [split, "val"] if split == "valid" else [split]
    for name in names:
        if (Path(data) / name).is_dir():
            return Path(data) / name
    raise ValueError(
        f"{data} must hold a folder {' or '.join(names)} with one folder for each class, but holds none; did you forget "
        "to point to the folder above it?"
    )


def find_images(folder: Path) -> Images:
    """All images below `folder`, by class, in the order of torchvision's ImageFolder.

    Raises ValueError for a folder without classes, without images, or with a class that has no image.
    """
    compat.load_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    try:
        classes, index_of = find_classes(str(folder))
    except FileNotFoundError:
        raise ValueError(f"{folder} must hold one folder for each class, but holds no folder.") from None
    try:
        found = make_dataset(str(folder), index_of, extensions=IMG_EXTENSIONS)
    except FileNotFoundError:  # a class without a single image
        found = _files_of_classes(folder, classes, IMG_EXTENSIONS)
    return Images(classes, [path for path, _ in found], [label for _, label in found])


def _files_of_classes(folder: Path, classes: Sequence[str], extensions: Sequence[str]) -> List[Tuple[str, int]]:
    """Finds which class is empty, and says so."""
    files = {name: [f for _, _, files in os.walk(folder / name, followlinks=True) for f in files] for name in classes}
    empty = [name for name in classes if not any(f.lower().endswith(tuple(extensions)) for f in files[name])]
    kinds = f"(files that end in {' '.join(extensions)})"
    if len(empty) == len(classes):
        raise ValueError(f"{folder} must hold images in the folders of its classes, but there is no image in any {kinds}.")
    raise ValueError(f"Each class folder of {folder} must hold images, but {', '.join(empty)} holds none {kinds}.")


def check_classes(classes: Sequence[str], images: Images, folder: Path, of: str) -> None:
    """Raises ValueError unless the split in `folder` has exactly `classes`, those of `of`."""
    extra, missing = sorted(set(images.classes) - set(classes)), sorted(set(classes) - set(images.classes))
    if extra:
        raise ValueError(f"The classes of {folder} must be those of {of}, but {_some(extra)} is not among them.")
    if missing:
        raise ValueError(f"The classes of {folder} must be those of {of}, but {_some(missing)} is missing.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" (and {len(names) - 5} more)" if len(names) > 5 else "")


def part_of(images: Images, fraction: Fraction) -> Images:
    """The same part of every class, evenly spaced, at least one image; 1/4 is contained in 1/2.

    With 1/3, of the images 0 … 8 of a class: 2, 5, 8.
    """
    kept, seen = [], [0] * len(images.classes)
    totals = np.bincount(images.labels, minlength=len(images.classes))
    for i, label in enumerate(images.labels):
        number, seen[label] = seen[label], seen[label] + 1
        is_last_hope = number == totals[label] - 1 and totals[label] * fraction < 1
        if is_last_hope or math.floor((number + 1) * fraction) > math.floor(number * fraction):
            kept.append(i)
    return Images(images.classes, [images.paths[i] for i in kept], [images.labels[i] for i in kept])


def read_image(path: str, channels: int) -> Any:
    """The image as PIL's, grey (`channels` 1) or RGB (3), whatever the file holds.

    Grey becomes three equal channels, a palette its colours, transparency is dropped (not blended), and 16-bit grey keeps
    its upper 8 bits. Raises UnreadableImage.
    """
    from PIL import Image  # here, so that those who translate need no PIL

    try:
        with Image.open(path) as opened:
            image: Image.Image = opened
            if image.mode.startswith("I"):  # PIL's own conversion would cut off at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB").convert("L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and more
        raise UnreadableImage(
            f"{path} must be an image that can be read, but: {error}; --skip-unreadable-images leaves such files out."
        ) from None


class ImageFolder(FairseqDataset):
    """One split: items are {id, image [C, H, W] uint8, target}; batches have `net_input: {image: [B, C, H, W] float}`.

    `shuffle`: a new order for each seed and epoch. `keep`: decode all images now and hold them in memory. `skip`: leave
    unreadable images out, with a warning, instead of raising UnreadableImage.
    """

    def __init__(
        self,
        images: Images,
        pipeline: Pipeline,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        shuffle: bool = False,
        skip: bool = False,
        keep: bool = False,
    ) -> None:
        self.images, self.pipeline = images, pipeline
        self.shuffle, self.skip = shuffle, skip
        self.seed, self.epoch = 1, 1
        self.normalise_with(mean, std)
        self._kept: Optional[Dict[int, Any]] = None
        if keep:
            self._kept = {i: self._prepared(i) for i in range(len(images.paths))}

    def normalise_with(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Subtract `mean` and divide by `std` of each channel; both in units of the full range, 0 … 1."""
        shape = (1, len(mean), 1, 1)
        self._mean = 255 * torch.tensor(mean, dtype=torch.float).view(shape)
        self._scale = 1 / (255 * torch.tensor(std, dtype=torch.float).view(shape))

    def __len__(self) -> int:
        return len(self.images.paths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Training takes a new iterator each epoch: for another order, and for workers that know the epoch."""
        return not self.shuffle

    def _prepared(self, index: int) -> Any:
        """The image as PIL's, after all that is the same in every epoch; None if it is unreadable and skipped."""
        path = self.images.paths[index]
        try:
            return self.pipeline.prepare(read_image(path, self.pipeline.channels), path)
        except UnreadableImage as error:
            if not self.skip:
                raise
            logger.warning("left out: %s", printable(str(error)))
            return None

    def __getitem__(self, index: int) -> Optional[Dict[str, Any]]:
        index = int(index)
        image = self._prepared(index) if self._kept is None else self._kept[index]
        if image is None:
            return None
        image = self.pipeline.augment(image, np.random.default_rng([self.seed, self.epoch, index]))
        return {"id": index, "image": pixels(image), "target": self.images.labels[index]}

    def collater(self, samples: List[Optional[Dict[str, Any]]]) -> Dict[str, Any]:
        """A batch; an empty dict, fairseq's sign for nothing, if all its images were left out."""
        kept = [sample for sample in samples if sample is not None]
        if not kept:
            return {}
        image_BCHW = torch.stack([sample["image"] for sample in kept]).float()
        return {
            "id": torch.tensor([sample["id"] for sample in kept]),
            "net_input": {"image": image_BCHW.sub_(self._mean).mul_(self._scale)},
            "target": torch.tensor([sample["target"] for sample in kept]),
            "ntokens": len(kept),
            "nsentences": len(kept),
        }

    def ordered_indices(self) -> np.ndarray:
        # Stock fairseq 0.12.2 would seed numpy's own generator alike for all epochs.
        draw = np.random.default_rng([self.seed, self.epoch])
        return draw.permutation(len(self)) if self.shuffle else np.arange(len(self))

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        required_batch_size_multiple: int = 1,
    ) -> List[np.ndarray]:
        """`indices` cut into batches of --batch-size (or --max-tokens: an image is one token).

        fairseq's own would drop what is left after a multiple of 8. Here a last batch of one image alone is left out, in
        training, because BatchNorm can make nothing of it.
        """
        size = min(limit for limit in (max_tokens, max_sentences) if limit is not None)
        batches = [indices[start : start + size] for start in range(0, len(indices), size)]
        if self.shuffle and size > 1 and len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()
        return batches

    def filter_indices_by_size(self, indices: np.ndarray, max_sizes: Any) -> Tuple[np.ndarray, List[int]]:
        return indices, []

    def num_tokens(self, index: int) -> int:
        return 1

    def size(self, index: int) -> int:
        return 1


def measure(images: Images, pipeline: Pipeline, skip: bool, limit: int = 5000) -> Tuple[List[float], List[float]]:
    """Mean and standard deviation of each channel over at most `limit` evenly spaced images; full range is 0 … 1."""
    count = min(limit, len(images.paths))
    total, number = torch.zeros(2, pipeline.channels, dtype=torch.double), 0
    for i in np.linspace(0, len(images.paths) - 1, count).astype(int):
        try:
            image_CN = pixels(read_image(images.paths[i], pipeline.channels)).flatten(1).double() / 255
        except UnreadableImage:
            if skip:
                continue
            raise
        total[0] += image_CN.sum(1)
        total[1] += image_CN.square().sum(1)
        number += image_CN.size(1)
    if not number:
        raise ValueError(f"None of {count} images can be read, the first of them {images.paths[0]}.")
    mean_C = total[0] / number
    # Images of one colour have no deviation to divide by.
    std_C = (total[1] / number - mean_C.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return [round(v, 4) for v in mean_C.tolist()], [round(v, 4) for v in std_C.tolist()]
