"""Score the last checkpoints of a run on a split: ``python evaluate.py RUN --data DATA [--split test]``.

Writes RUN/scores.json: top-1 and top-5 in percent and NLL in bits, of each peer and of their ensemble (mean probabilities).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path
from typing import Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]

import torch  # noqa: E402
from paths import user_path  # noqa: E402

from fairseq_codistill.image.folder import find_images, split_folder  # noqa: E402
from fairseq_codistill.image.predict import load, predict  # noqa: E402


def scores(paths: Sequence[Path], data: Path, split: str, device: str) -> Dict[str, float]:
    """Of the mean probabilities of the models in `paths`. Raises ValueError for a split that is not there."""
    models, task = load(":".join(map(str, paths)), device, {"data": str(data)})
    images = find_images(split_folder(str(data), split))
    label_of = dict(zip(images.paths, images.labels))
    rows = list(predict(models, task, images.paths, batch_size=250, device=device))
    probability_NV = torch.stack([row for _, row in rows])
    target_N = torch.tensor([label_of[path] for path, _ in rows])
    best_NK = probability_NV.topk(min(5, probability_NV.size(1)), dim=1).indices
    hits_NK = best_NK == target_N.unsqueeze(1)
    own_N = probability_NV.gather(1, target_N.unsqueeze(1)).clamp(min=1e-30)
    return {
        "top1": round(100 * hits_NK[:, 0].float().mean().item(), 3),
        "top5": round(100 * hits_NK.any(1).float().mean().item(), 3),
        "nll": round(-own_N.log().mean().item() / math.log(2), 4),
        "images": len(rows),
    }


def evaluate(run: Path, data: Path, split: str, device: str) -> Dict[str, Dict[str, float]]:
    """Raises ValueError if `run` has no checkpoints."""
    paths: List[Path] = sorted(run.glob("peer*/checkpoint_last.pt"))
    if not paths:
        raise ValueError(f"{run} must be a run of train.sh, but has no peer*/checkpoint_last.pt; did the training end?")
    result = {path.parent.name: scores([path], data, split, device) for path in paths}
    if len(paths) > 1:
        result["ensemble"] = scores(paths, data, split, device)
    return result


def main(argv: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=user_path)
    parser.add_argument("--data", type=user_path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, force=True)  # fairseq's import has left it at DEBUG
    device = "cpu" if args.cpu or not torch.cuda.is_available() else "cuda"
    try:
        result = evaluate(args.run, args.data, args.split, device)
    except ValueError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    part = args.run / "scores.json.part"
    part.write_text(json.dumps({"split": args.split, **result}, indent=1) + "\n", encoding="utf-8")
    part.replace(args.run / "scores.json")
    print("; ".join(f"{name} top-1 {score['top1']:.2f} %" for name, score in result.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
