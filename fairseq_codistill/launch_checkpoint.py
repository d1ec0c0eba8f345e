r"""A torn `checkpoint_last.pt` is set aside, so that a killed training goes on from its newest whole checkpoint.

fairseq writes each checkpoint beside its place and renames it, but then copies it to `checkpoint_last.pt` where that
stands: a training that is killed in the middle of the copy leaves half a file, and dies of it at its next start.

    python -m fairseq_codistill.launch_checkpoint SAVE_DIR …
"""

from __future__ import annotations

import glob
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from typing import Optional

LAST = "checkpoint_last.pt"


def is_torn(path: str) -> bool:
    """Whether a checkpoint lacks its end: torch's are zip files, whose table stands last. Other formats are not judged."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start in (b"", b"P") or (start == b"PK" and not zipfile.is_zipfile(path))


def mend(save_dir: str) -> Optional[str]:
    """Give SAVE_DIR a whole `checkpoint_last.pt` if its own is torn; returns what was done, in one sentence, or None.

    The torn file stays, under another name. Raises OSError if the folder cannot be read or written.
    """
    last = os.path.join(save_dir, LAST)
    if not os.path.isfile(last) or not is_torn(last):
        return None
    os.replace(last, last + ".torn")
    found = f"{last} was torn (a training was killed while it wrote it) and is now {LAST}.torn"
    others = sorted(glob.glob(os.path.join(glob.escape(save_dir), "checkpoint*.pt")), key=os.path.getmtime, reverse=True)
    whole = next((path for path in others if not is_torn(path)), None)
    if whole is None:
        return f"{found}; there is no other checkpoint: the training begins anew."
    shutil.copyfile(whole, last + ".tmp")
    os.replace(last + ".tmp", last)
    return f"{found}; the training goes on from {os.path.basename(whole)}."


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command: mends each folder, prints what it did."""
    for save_dir in sys.argv[1:] if argv is None else argv:
        try:
            done = mend(save_dir)
        except OSError as error:
            print(f"launch_checkpoint: {save_dir}: {error}", file=sys.stderr)
            return 1
        if done:
            print(done, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
