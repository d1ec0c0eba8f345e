"""core/ and exchange/ train two models in one process without fairseq: the program that docs/own_trainer.md shows."""

import re
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("own_trainer.py")
PAGE = Path(__file__).parents[1] / "docs/own_trainer.md"


def blocks_of(page):
    return re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_shows_the_program():
    code = [text for language, text in blocks_of(PAGE) if language == "python"]
    assert code == [PROGRAM.read_text(encoding="utf-8").partition('"""\n\n')[2]]


def test_two_peers_learn_from_each_other_without_fairseq():
    run = f"import runpy, sys; runpy.run_path({str(PROGRAM)!r}); assert 'fairseq' not in sys.modules, 'fairseq was imported'"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all("from a copy" in line for line in lines)
    assert [int(age) for age in re.findall(r"copy (\d+) updates", done.stdout)] == [9, 9, 19, 19, 9, 9, 19, 19]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+),", done.stdout)]
    assert max(losses[-2:]) < 0.35 < min(losses[:2]), "both have learnt the task"
    numbers = re.compile(r"\d+\.\d+")
    shown = [text for language, text in blocks_of(PAGE) if not language]
    assert numbers.sub("…", shown[0]) == numbers.sub("…", done.stdout), "the page's output is the program's"
