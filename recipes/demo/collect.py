"""Take a finished demo over into the repository: logs, scores and report into results/, its table into the pages.

    python recipes/demo/collect.py [DEMO_DIR]

A page shows the table between the lines `<!-- demo: table -->` and `<!-- /demo -->`; all pages that have them are rewritten.
Sentences with numbers in them are yours to change: the command names the pages.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "recipes/demo/results"
sys.path.insert(0, str(ROOT / "recipes"))
from paths import user_path  # noqa: E402
from runner.sweeping import without_paths  # noqa: E402

KEPT = ("*/seed1/command.txt", "*/seed1/peer*/train.log", "*/seed1/peer*/*.sacrebleu.json", "*/seed1/*.sacrebleu.json")
REPORT = ("table.md", "results.json", "curves.png")
COLUMNS = {
    "best valid NLL": ("best_valid_nll", "{:.3f}"), "at update": ("at_update", "{:,.0f}"),
    "last valid NLL": ("last_valid_nll", "{:.3f}"), "test BLEU": ("test BLEU", "{:.2f}"),
    "BLEU of the ensemble": ("test BLEU of the ensemble", "{:.2f}"), "training seconds": ("seconds", "{:.0f}"),
}  # fmt: skip
PLACE = re.compile(r"(<!-- demo: table -->\n).*?(<!-- /demo -->)", re.DOTALL)


def table(results: dict) -> str:
    """The report's summary as the pages show it; "–" where a run has no such number."""
    rows = [["run", *COLUMNS], ["---", *["---:"] * len(COLUMNS)]]
    for method in results["methods"]:
        means = {name: value["mean"] for name, value in method["summary"].items()}
        rows.append([method["label"], *(form.format(means[key]) if key in means else "–" for key, form in COLUMNS.values())])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def pages() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "recipes/demo/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if PLACE.search(page.read_text(encoding="utf-8"))]


def take_over(demo: Path, results: Path) -> None:
    """Replace `results` by what a finished demo has, without local paths. Raises ``ValueError`` where it is not finished."""
    missing = [name for name in REPORT if not (demo / "report" / name).is_file()]
    if missing:
        raise ValueError(f"{demo} must be a finished demo, but its report has no {missing[0]}; did you forget make demo?")
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    for name in REPORT:
        shutil.copyfile(demo / "report" / name, results / name)
    for pattern in KEPT:
        for path in (demo / "runs").glob(pattern):
            target = results / path.relative_to(demo / "runs")
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8", errors="replace")
            target.write_text(without_paths(text, demo / "data", demo / "runs"), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("demo", nargs="?", type=user_path, default=ROOT / "demo", metavar="DEMO_DIR")
    demo = parser.parse_args().demo.resolve()
    try:
        take_over(demo, RESULTS)
    except ValueError as error:
        print(f"collect.py: {error}", file=sys.stderr)
        return 2
    rows = table(json.loads((RESULTS / "results.json").read_text(encoding="utf-8")))
    for page in pages():
        text = page.read_text(encoding="utf-8")
        page.write_text(PLACE.sub(lambda found: found[1] + rows + found[2], text), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: the table is new; sentences with numbers, such as how long it took, are not")
    return 0


if __name__ == "__main__":
    sys.exit(main())
