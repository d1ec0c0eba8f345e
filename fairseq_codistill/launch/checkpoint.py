r"""A torn `checkpoint_last.pt` is set aside, so that a killed training goes on from its newest whole checkpoint.

fairseq writes each checkpoint beside its place and renames it, but then copies it to `checkpoint_last.pt` where that
stands: a training that is killed in the middle of the copy leaves half a file, and fails at its next start. Without
any `checkpoint_last.pt` it would begin from update 0, so there is always one: the whole copy is made first.

    python -m fairseq_codistill.launch.checkpoint SAVE_DIR …

Exit status: 0, or 3 where a torn checkpoint could not be replaced, and the training must not start.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import sys
import zipfile
from collections.abc import Sequence
from typing import Optional

LAST = "checkpoint_last.pt"
REFUSED = 3  # neither Python's status for a module that is not there, nor the shell's for a missing Python


def is_torn(path: str) -> bool:
    """Whether a checkpoint lacks its end: torch's are zip files, whose table stands last. Other formats are not judged."""
    with open(path, "rb") as file:
        start = file.read(2)
    return start in (b"", b"P") or (start == b"PK" and not zipfile.is_zipfile(path))


def mend(save_dir: str) -> Optional[str]:
    """Give SAVE_DIR a whole `checkpoint_last.pt` if its own is torn; returns what was done, in one sentence, or None.

    The torn file stays, under another name. Raises ValueError, in one sentence, if it cannot be replaced: then all is as
    it was.
    """
    last, torn = os.path.join(save_dir, LAST), os.path.join(save_dir, LAST + ".torn")
    # An attempt that was cut short between its two steps has left the torn file alone.
    is_half_mended = not os.path.lexists(last) and os.path.isfile(torn)
    try:
        if not is_half_mended and not (os.path.isfile(last) and is_torn(last)):
            return None
        whole = _newest_whole(save_dir)
        found = f"{last} was torn (a training was killed while it wrote it) and is now {LAST}.torn"
        if whole is None:
            if is_half_mended:
                return None  # said when it was set aside
            os.replace(last, torn)
            return f"{found}; there is no other checkpoint: the training begins anew."
        _put(whole, last, torn)
    except OSError as error:
        raise ValueError(
            f"{last} is torn (a training was killed while it wrote it), and a whole checkpoint cannot be put in its place: "
            f"{error.strerror or error}; did the disk become full? Without it the training would begin from update 0."
        ) from error
    return f"{found}; the training goes on from {os.path.basename(whole)}."


def _newest_whole(save_dir: str) -> Optional[str]:
    last = os.path.join(save_dir, LAST)
    others = [path for path in glob.glob(os.path.join(glob.escape(save_dir), "checkpoint*.pt")) if path != last]
    for path in sorted(others, key=os.path.getmtime, reverse=True):
        if not is_torn(path):
            return path
    return None


def _put(whole: str, last: str, torn: str) -> None:
    """A copy of `whole` becomes `last`, which becomes `torn`; on failure all is as before. Raises OSError."""
    # Not a link to `whole`: fairseq copies onto checkpoint_last.pt where it stands, so the link would lose both.
    copy = last + ".mended"
    try:
        shutil.copyfile(whole, copy)
        descriptor = os.open(copy, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # some file systems tell of a full disk only here
        finally:
            os.close(descriptor)
        if os.path.lexists(last):
            os.replace(last, torn)
        try:
            os.replace(copy, last)
        except OSError:
            os.replace(torn, last)
            raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(copy)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command: mends each folder, prints what it did."""
    for save_dir in sys.argv[1:] if argv is None else argv:
        try:
            done = mend(save_dir)
        except ValueError as error:
            print(f"launch_checkpoint: {error}", file=sys.stderr)
            return REFUSED
        if done:
            with contextlib.suppress(OSError):  # a log that cannot be written stops no training
                print(done, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
