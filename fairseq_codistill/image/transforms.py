"""From a decoded image to the pixels that a model sees: resizing, cropping, flipping, by torchvision's transforms.

| --augmentation | in training                                        | in evaluation                        |
|----------------|----------------------------------------------------|--------------------------------------|
| imagenet       | crop of random area and aspect ratio, flip         | shorter side to 8/7 of the size, centre crop |
| small          | padding by 1/8, random crop, flip                  | centre crop                          |
| none           | centre crop                                        | centre crop                          |

`imagenet` is that of Goyal et al. 2017 without changes of colour, `small` that of He et al. 2016 for CIFAR-10.
"""

from __future__ import annotations

import math
from typing import Any, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from .. import compat

AUGMENTATIONS = ("imagenet", "small", "none")
_AREAS, _RATIOS = (0.08, 1.0), (3 / 4, 4 / 3)  # of the random crops; ratio: width / height


class Pipeline:
    """`prepare` is what every epoch shares, so that it may be kept; `augment` is what is drawn.

    size: pixels of the square that comes out. resize: the shorter side is brought to this first (None: as the table says).
    What is drawn comes from the generator that is given. torchvision's own random transforms draw from torch's global one,
    which the training thread seeds anew for each update, while fairseq loads data in another thread.
    """

    def __init__(self, augmentation: str, size: int, *, resize: Optional[int], channels: int, flip: bool, train: bool) -> None:
        compat.load_torchvision()
        from torchvision.transforms import functional

        self._do: Any = functional
        self.size, self.channels = size, channels
        self._augmentation = augmentation if train else "none"
        self._flip = flip and self._augmentation != "none"
        if augmentation == "imagenet" and not train:
            resize = resize or round(size * 8 / 7)  # 256 for 224
        self._resize = resize

    def prepare(self, image: Any, path: str) -> Any:
        """Resized if need be. Raises ValueError, naming `path`, if a crop would not fit."""
        image = self._do.resize(image, self._resize) if self._resize else image
        width, height = image.size
        # A crop of random area is brought to the size, whatever it was.
        if min(width, height) < self.size and self._augmentation != "imagenet":
            raise ValueError(
                f"{path} must be at least {self.size} × {self.size} pixels (--image-size), but is {width} × {height} instead; "
                f"did you forget --image-resize {self.size}?"
            )
        return image

    def augment(self, image: Any, draw: np.random.Generator) -> Any:
        """The square that the model sees."""
        size = self.size
        if self._augmentation == "imagenet":
            width, height = image.size
            image = self._do.resized_crop(image, *random_area(width, height, draw), [size, size])
        elif self._augmentation == "small":
            border = max(1, size // 8)
            image = self._do.pad(image, border)
            left, top = (int(draw.integers(0, side - size + 1)) for side in image.size)
            image = self._do.crop(image, top, left, size, size)
        else:
            image = self._do.center_crop(image, [size, size])
        return self._do.hflip(image) if self._flip and draw.random() < 0.5 else image


def random_area(width: int, height: int, draw: np.random.Generator) -> Tuple[int, int, int, int]:
    """(top, left, height, width) of a box of 8 to 100 % of the area with an aspect ratio of 3/4 to 4/3 (Szegedy et al. 2015).

    If ten draws do not fit into the image: the largest box of such a ratio, in the middle.
    """
    for _ in range(10):
        area = width * height * draw.uniform(*_AREAS)
        ratio = math.exp(draw.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw.integers(0, height - h + 1)), int(draw.integers(0, width - w + 1)), h, w
    w, h = min(width, round(height * _RATIOS[1])), min(height, round(width / _RATIOS[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def pixels(image: Any) -> Tensor:
    """PIL's image as a tensor: [C, H, W], uint8."""
    array = np.array(image)  # a copy: torch wants memory that it may write to
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
