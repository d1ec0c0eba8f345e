"""The mean of the last checkpoints of a run, as one checkpoint that fairseq loads: ``python average.py --last 10 RUN/peer0``.

Averaging the last ten is how Ott et al. 2018 and most since then score translation. Checkpoints are loaded without running
code from them (``weights_only``), and their optimizer's state is never read into memory.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paths import user_path  # noqa: E402

INTERVAL_CHECKPOINT = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def last_checkpoints(peer: Path, count: int) -> List[Path]:
    """The ``count`` newest ``checkpoint_EPOCH_UPDATE.pt`` of a peer, oldest first.

    Raises ``ValueError`` if there are fewer: an average of another number of models is another result.
    """
    matches = {path: INTERVAL_CHECKPOINT.fullmatch(path.name) for path in peer.glob("checkpoint_*.pt")}
    found = {int(match[1]): path for path, match in matches.items() if match}
    if len(found) < count:
        raise ValueError(
            f"AVERAGE must be at most {len(found)}, the checkpoint_EPOCH_UPDATE.pt that {peer} has, but is {count}; "
            "did you forget to train with as large a KEEP?"
        )
    return [found[update] for update in sorted(found)[-count:]]


def average(paths: Sequence[Path]) -> Dict[str, Any]:
    """The newest checkpoint (the last of ``paths``) with every weight replaced by the mean over all, in its own precision.

    What is no floating-point number (fairseq's version marks) is the newest's; the optimizer's state is left out. Raises
    ``ValueError`` if the models differ in their tensors.
    """
    import torch

    sums: Dict[str, Any] = {}
    for path in paths:
        state = _load(path)
        weights = state["model"]
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        if sums and shapes != {name: tensor.shape for name, tensor in sums.items()}:
            raise ValueError(f"the checkpoints must be of one model, but {path} has other tensors than {paths[0]}")
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or name not in sums:
                sums[name] = tensor.to(torch.float64) if tensor.is_floating_point() else tensor
            else:
                sums[name] += tensor
    mean = {name: _mean(sums[name], len(paths), weights[name].dtype) for name in weights}
    return {**state, "model": mean, "last_optimizer_state": None, "averaged_from": [path.name for path in paths]}


def _mean(total: Any, count: int, dtype: Any) -> Any:
    return (total / count).to(dtype) if total.is_floating_point() else total.clone()


def _load(path: Path) -> Dict[str, Any]:
    import torch

    from fairseq_codistill import compat

    compat.allow_checkpoint_classes()
    # Mapped, so that Adam's averages, two thirds of the file, stay on the disk.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def write_average(peer: Path, count: int) -> Path:
    """``peer/checkpoint_averageN.pt``, made anew if there are newer checkpoints."""
    import torch

    target, paths = peer / f"checkpoint_average{count}.pt", last_checkpoints(peer, count)
    if target.is_file() and target.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in paths):
        return target
    part = target.with_suffix(".part")
    torch.save(average(paths), part)
    os.replace(part, target)
    return target


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; the exit status is 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--last", type=int, default=10, metavar="N", help="how many (default: 10)")
    parser.add_argument("peers", type=user_path, nargs="+", metavar="RUN/peerI", help="folder with checkpoint_EPOCH_UPDATE.pt")
    args = parser.parse_args(argv)
    try:
        if args.last < 1:
            raise ValueError(f"--last must be at least 1, but is {args.last} instead")
        for peer in args.peers:
            print(write_average(peer, args.last))
    except ValueError as error:
        print(f"average.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
