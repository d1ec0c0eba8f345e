"""The options of `--task image_classification`, checked once, one clear sentence for each mistake."""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, List, Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II, MISSING

from .transforms import AUGMENTATIONS


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


# fairseq reads the types of these fields at run time, so this module has no `from __future__ import annotations`.
@dataclass
class ImageClassificationConfig(FairseqDataclass):
    data: str = _option(MISSING, "folder with train/CLASS/*.jpeg and valid/CLASS/*.jpeg (or val/…)")
    augmentation: ChoiceEnum(list(AUGMENTATIONS)) = _option(  # type: ignore[valid-type]
        "imagenet", "imagenet: crops of random size and flips; small: shifts by up to an eighth and flips; none"
    )
    image_size: int = _option(224, "pixels of the square that the model sees")
    image_resize: Optional[int] = _option(
        None,
        "bring each image's shorter side to so many pixels first (default: as it is; imagenet in validation: 8/7 of the size)",
    )
    image_channels: int = _option(3, "3: RGB, 1: grey; images of the other kind are converted")
    no_image_flip: bool = _option(False, "no flips from left to right (digits have none)")
    image_mean: Optional[str] = _option(
        None,
        "mean of each channel, full range 0 … 1, to subtract: 0.485,0.456,0.406 (default: computed from the training split)",
    )
    image_std: Optional[str] = _option(None, "standard deviation of each channel, to divide by: 0.229,0.224,0.225")
    image_fraction: str = _option("1", "train on this part of each class, always the same images: 1/4")
    image_cache: bool = _option(False, "decode all images once and keep them in memory (small data sets)")
    skip_unreadable_images: bool = _option(False, "leave images out, with a warning, that cannot be decoded")
    log_init_distance: bool = _option(False, "log the distance ‖θ − θ₀‖ of the parameters from their start at each validation")
    # fairseq's own, filled in by fairseq
    train_subset: str = II("dataset.train_subset")
    update_freq: List[int] = II("optimization.update_freq")
    skip_remainder_batch: bool = II("optimization.skip_remainder_batch")


def check(cfg: ImageClassificationConfig) -> None:
    """Raises ValueError, in one sentence, for the first option that cannot be meant."""
    for name in ("image_size", "image_resize"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 pixel, but is {value} instead.")
    if cfg.image_channels not in (1, 3):
        raise ValueError(f"image_channels must be 3 (RGB) or 1 (grey), but is {cfg.image_channels} instead.")
    if (cfg.image_mean is None) != (cfg.image_std is None):
        raise ValueError("image_mean and image_std must be given together; did you forget one of them?")
    channel_values(cfg, "image_mean")
    if any(value <= 0 for value in channel_values(cfg, "image_std") or []):
        raise ValueError(f"image_std must be above 0, but is {cfg.image_std} instead.")
    fraction(cfg)


def channel_values(cfg: ImageClassificationConfig, name: str) -> Optional[List[float]]:
    """An option with one number for each channel; None if it was not given."""
    text = getattr(cfg, name)
    if text is None:
        return None
    try:
        values = [float(word) for word in str(text).split(",")]
    except ValueError:
        values = []
    if len(values) != cfg.image_channels or not all(math.isfinite(value) for value in values):
        raise ValueError(
            f"{name} must be {cfg.image_channels} numbers separated by commas (--image-channels {cfg.image_channels}), "
            f"but is {text!r} instead."
        )
    return values


def fraction(cfg: ImageClassificationConfig) -> Fraction:
    """The part of the training images that is used: above 0, at most 1."""
    try:
        value = Fraction(str(cfg.image_fraction))
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not 0 < value <= 1:
        raise ValueError(f"image_fraction must be above 0 and at most 1, such as 1/4, but is {cfg.image_fraction!r} instead.")
    return value
