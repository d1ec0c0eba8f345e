"""The documentation as a site: it is built strictly, once, and what it promises is in it."""

import os
import re
import subprocess
import sys

import pytest
from fairseq_runs import PLUGIN, ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`make docs`, into another folder. A link to what is not there, or a page outside the navigation, is an error."""
    folder = tmp_path_factory.mktemp("site")
    recipe = re.search(r"^docs:.*\n\t\$\(IN_VENV\) (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    words = recipe.split()
    assert words[:2] == ["NO_MKDOCS_2_WARNING=1", "python"] and "--strict" in words and words[-2:] == ["--site-dir", "site"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, *words[2:-1], str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, env=environment, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return folder


def test_every_page_is_built_with_its_heading(site):
    for page in PAGES:
        heading = re.match(r"# (.+)", page.read_text(encoding="utf-8"))[1]
        built = (site / page.stem / "index.html").read_text(encoding="utf-8")
        assert f">{heading.replace('`', '')}<" in re.sub(r"</?code>", "", built), page.name
    assert "codistillation" in (site / "index.html").read_text(encoding="utf-8").lower()


def test_the_api_has_every_module_and_what_is_public_in_it(site):
    for folder in ("core", "exchange"):
        for path in (PLUGIN / folder).glob("*.py"):
            if path.stem != "__init__":
                built = (site / "api" / folder / path.stem / "index.html").read_text(encoding="utf-8")
                public = re.findall(r"^(?:def|class) ([a-zA-Z]\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
                for name in public:
                    assert f'id="fairseq_codistill.{folder}.{path.stem}.{name}"' in built, f"{folder}.{path.stem}.{name}"


def test_what_pages_point_to_outside_docs_is_in_the_site(site):
    """Reports as pages with their figures, logs as files."""
    for name in ("recipes/demo/index.html", "recipes/demo/results/curves.png", "benchmarks/results/kills.txt"):
        assert (site / "repository" / name).exists(), name
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="options/"' in home and 'href="repository/recipes/demo/"' in home


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules_that_pages_name_exist(page):
    for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or list(PLUGIN.rglob(name)), f"{page.name} names {name}, which is not there"
