"""All of runs.toml: ``python recipes/multi30k_en_de/sweep.py --data PREPARED --out RUNS``; see ../translation/sweep.py."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "translation"))

import sweep  # noqa: E402

if __name__ == "__main__":
    sys.exit(sweep.main(["--recipe", str(HERE), *sys.argv[1:]]))
