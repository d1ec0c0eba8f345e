"""Small image folders for the tests, and scikit-learn's digits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Dict, Sequence

import numpy as np
from fairseq_runs import PLUGIN, ROOT
from PIL import Image

TASK = f"--user-dir {PLUGIN} --task image_classification --augmentation none --image-size 8 --image-channels 1"
MODEL = f"{TASK} --arch resnet8 --image-width 8"
# An option of a job rather than a model of one: fairseq_runs' own TRAINING would have the last word.
SGD = "--optimizer sgd_nesterov --lr 0.1 --lr-scheduler multistep --lr-milestones 4 --batch-size 32"


def write_image(path: Path, seed: int, size: Sequence[int] = (8, 8), mode: str = "RGB") -> Path:
    """Noise, `size` as (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}[mode]
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(array[:, :, 0] if bands == 1 else array, mode).save(path)
    return path


def write_folder(folder: Path, counts: Dict[str, Dict[str, int]], **choices) -> Path:
    """{split: {class: images}}, each of noise of its own."""
    seed = 0
    for split, classes in counts.items():
        for name, number in classes.items():
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(number):
                seed += 1
                write_image(folder / split / name / f"{i:03}.png", seed, **choices)
    return folder


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits as data_prep makes them: 1,142 to train, 300 to validate, 355 to test."""
    command = [sys.executable, ROOT / "data_prep/images.py", "digits", "--out", folder]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return folder
