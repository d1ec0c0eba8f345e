"""What `make lint` finds: nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Older libraries have other types, or none; those of constraints.txt are what the package is checked against.
pinned = pytest.mark.skipif(sys.version_info < (3, 11), reason="the pinned libraries need Python 3.11")


@pytest.mark.parametrize("tool", [["ruff", "check", "."], pytest.param(["mypy"], marks=pinned)], ids=lambda tool: tool[0])
def test_nothing_is_found_by(tool):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-1000:]}"
