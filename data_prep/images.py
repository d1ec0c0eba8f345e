"""Images into folders of classes, as `--task image_classification` reads them: DIR/train/CLASS, DIR/valid/CLASS, ….

    python data_prep/images.py digits --out DIR                    # scikit-learn's 1,797 handwritten digits, 8 × 8, no download
    python data_prep/images.py zip --source FILE.zip --out DIR     # any archive that holds TRAIN/CLASS/… and TEST/CLASS/…

``--valid-per-class N`` takes the last N images of each class out of the training split, to validate on. DIR appears only when
all is there: a run that was killed starts again, a second run does nothing. Images are copied as they are, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Dict, List, Sequence

from options import user_path

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_INSTEAD = "give another --out or delete it"


def write_digits(folder: Path, valid_per_class: int) -> None:
    """The digits as 8-bit grey PNG: a fifth of them to test on, so many of each class to validate on, the rest to train."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen: Dict[int, int] = Counter()
    totals = Counter(digits.target.tolist())
    for pixels, label in zip(digits.images, digits.target.tolist()):
        number, seen[label] = seen[label], seen[label] + 1
        # By number within the class: the test images are the last, as in an archive with a split of its own.
        test_from = totals[label] - totals[label] // 5
        split = "test" if number >= test_from else "valid" if number >= test_from - valid_per_class else "train"
        path = folder / split / str(label) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(path)


def unpack(source: Path, folder: Path, valid_per_class: int) -> None:
    """Copy the images of an archive. Raises ValueError if it is none, or holds no …/SPLIT/CLASS/IMAGE."""
    if not zipfile.is_zipfile(source):
        raise ValueError(f"--source must be a zip archive, but {source} is none.")
    with zipfile.ZipFile(source) as archive:
        members = by_class(archive.namelist())
        if "train" not in members:
            raise ValueError(f"{source} must hold images under train/CLASS/, but holds none there.")
        for split, classes in members.items():
            for name, paths in classes.items():
                if split == "train" and valid_per_class >= len(paths):
                    raise ValueError(f"--valid-per-class must leave images to train on, but {name} has {len(paths)} in all.")
                cut = len(paths) - valid_per_class if split == "train" else len(paths)
                for number, path in enumerate(paths):
                    _copy(archive, path, folder / (split if number < cut else "valid") / name)


def by_class(names: Sequence[str]) -> Dict[str, Dict[str, List[str]]]:
    """{split: {class: [paths in order]}} of the paths …/SPLIT/CLASS/IMAGE; the splits are train, valid (or val) and test."""
    found: Dict[str, Dict[str, List[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        parts = PurePosixPath(name).parts
        if len(parts) >= 3 and name.lower().endswith(SUFFIXES):
            split = {"val": "valid"}.get(parts[-3], parts[-3])
            if split in ("train", "valid", "test") and ".." not in parts:
                found[split][parts[-2]].append(name)
    return found


def _copy(archive: zipfile.ZipFile, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PurePosixPath(name).name).write_bytes(archive.read(name))


def counts(folder: Path) -> Dict[str, int]:
    """Images in each split."""
    splits = sorted(path for path in folder.iterdir() if path.is_dir())
    return {split.name: sum(1 for path in split.rglob("*") if path.is_file()) for split in splits}


def prepare(out: Path, kind: str, source: Path | None, valid_per_class: int) -> bool:
    """Make `out` hold the images; returns False if it did already. Raises ValueError for a folder that is another's."""
    settings = {"kind": kind, "source": source.name if source else None, "valid_per_class": valid_per_class}
    stamp = out / "images.json"
    if out.exists():
        if not stamp.is_file():
            raise ValueError(f"--out must be a new folder, but {out} is there already; {_INSTEAD}.")
        made_with = json.loads(stamp.read_text(encoding="utf-8"))
        if {name: made_with.get(name) for name in settings} != settings:
            raise ValueError(f"{out} was made with other settings ({made_with}); {_INSTEAD}.")
        return False
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if kind == "digits":
        write_digits(part, valid_per_class)
    else:
        unpack(source, part, valid_per_class)
    (part / "images.json").write_text(json.dumps({**settings, "images": counts(part)}) + "\n", encoding="utf-8")
    part.replace(out)
    return True


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("digits", "zip"))
    parser.add_argument("--out", type=user_path, required=True)
    parser.add_argument("--source", type=user_path, help="the archive, for zip")
    parser.add_argument("--valid-per-class", type=int, default=None, help="default: 30 for digits, 0 for zip")
    args = parser.parse_args(argv)
    valid_per_class = args.valid_per_class if args.valid_per_class is not None else 30 if args.kind == "digits" else 0
    try:
        if valid_per_class < 0:
            raise ValueError(f"--valid-per-class must not be negative, but is {valid_per_class} instead.")
        if (args.kind == "zip") != (args.source is not None):
            raise ValueError("--source must be given with zip, and only with it.")
        if args.source and not args.source.is_file():
            raise ValueError(f"--source must be a zip archive, but there is no file {args.source}.")
        made = prepare(args.out, args.kind, args.source, valid_per_class)
    except ValueError as error:
        print(f"images.py: {error}", file=sys.stderr)
        return 2
    held = json.loads((args.out / "images.json").read_text(encoding="utf-8"))["images"]
    summary = ", ".join(f"{number:,} {split}" for split, number in held.items())
    print(f"{args.out}: {summary}" if made else f"{args.out}: was ready, {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
