"""Many runs of a translation recipe, a few at a time:

    python recipes/translation/sweep.py --recipe recipes/RECIPE --data PREPARED --out RUNS --jobs 4

Stopped by Ctrl-C, SIGTERM or worse, the same command goes on where it was: what is finished and scored is skipped.
``--results DIR`` copies what deserves to be kept (logs, scores, commands; no weights), with local paths taken out.
``python recipes/run.py sweep`` does the same for any recipe.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runner import sweeping  # noqa: E402

TASK = "translation"


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line; see ``runner.sweeping.main``."""
    return sweeping.main(argv, TASK, "sweep.py")


if __name__ == "__main__":
    sys.exit(main())
