"""The mean of the last checkpoints of a run, as one checkpoint that fairseq loads: ``python average.py --last 10 RUN/peer0``.

Averaging the last ten is how Ott et al. 2018 and most since then score translation. The mean itself is the package's
(``fairseq_codistill.checkpoints``), as for ``codistill-launch export RUN --average 10``, which takes the best peer alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import List, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paths import user_path  # noqa: E402


def last_checkpoints(peer: Path, count: int) -> List[Path]:
    """The ``count`` newest checkpoints of a peer, oldest first. Raises ``ValueError`` if there are fewer."""
    from fairseq_codistill.launch import export

    return export.last_checkpoints(peer, count, "AVERAGE", "KEEP")


def write_average(peer: Path, count: int) -> Path:
    """``peer/checkpoint_averageN.pt``, made anew if there are newer checkpoints."""
    target, paths = peer / f"checkpoint_average{count}.pt", last_checkpoints(peer, count)
    if target.is_file() and target.stat().st_mtime_ns >= max(path.stat().st_mtime_ns for path in paths):
        return target
    import torch

    from fairseq_codistill.checkpoints import average  # with fairseq, which takes seconds

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
