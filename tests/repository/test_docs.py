"""The documentation as a site: it is built strictly, once, and what it promises is in it."""

import dataclasses
import html
import os
import re
import subprocess
import sys

import pytest
import test_fused
import torch
from fairseq_runs import PLUGIN, ROOT

from fairseq_codistill.config import CodistillConfig
from fairseq_codistill.core import fused, guard, losses, schedules

PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """`make docs`, into another folder. A link to what is not there is an error."""
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
        assert f">{heading}<" in html.unescape(built), page.name
    assert "codistillation" in (site / "index.html").read_text(encoding="utf-8").lower()


def test_the_api_has_every_module_and_what_is_public_in_it(site):
    for folder in ("core", "exchange"):
        for path in (PLUGIN / folder).glob("*.py"):
            if path.stem != "__init__":
                built = (site / "api" / folder / path.stem / "index.html").read_text(encoding="utf-8")
                public = re.findall(r"^(?:def|class) ([a-zA-Z]\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
                for name in public:
                    assert f'id="fairseq_codistill.{folder}.{path.stem}.{name}"' in built, f"{folder}.{path.stem}.{name}"


def test_the_page_of_all_options_is_that_of_the_config(site):
    built = (site / "all_options/index.html").read_text(encoding="utf-8")
    for field in dataclasses.fields(CodistillConfig):
        if field.name.startswith("codistill_"):
            assert f"<code>--{field.name.replace('_', '-')}</code>" in built
            assert field.metadata["help"].split(";")[0].split("|")[0][:30] in html.unescape(built), field.name


def test_what_pages_point_to_outside_docs_is_in_the_site(site):
    """Reports as pages with their figures, logs as files."""
    for name in ("recipes/demo/index.html", "recipes/demo/results/curves.png", "benchmarks/results/kills.txt"):
        assert (site / "repository" / name).exists(), name
    for page in site.rglob("index.html"):
        text = re.sub(r"(?s)<pre.*?</pre>", "", page.read_text(encoding="utf-8"))
        assert not re.search(r"(?m)^(<p>)?(\* |- |\||\d\. |```)", text), f"{page}: Markdown that was not understood"
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="options/"' in home and 'href="repository/recipes/multi30k_en_de/"' in home


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_modules_that_pages_name_exist(page):
    text = page.read_text(encoding="utf-8")
    scripts = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (benchmarks[\w.]+)", text)]
    for name in scripts + re.findall(r"(?:`|python )([\w/]+\.py)\b", text):
        assert (ROOT / name).exists() or list(PLUGIN.rglob(name)), f"{page.name} names {name}, which is not there"


# ------------------------------------------------------------------------------------- what docs/development.md adds

ADDED = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/development.md").read_text(encoding="utf-8"), re.S | re.M)


def test_a_distance_is_added_in_a_function_and_a_row(monkeypatch):
    """Both aggregates, the fused path and the options know it."""
    monkeypatch.setattr(losses, "DISTANCES", added := dict(losses.DISTANCES))
    for module in (fused, guard):
        if hasattr(module, "DISTANCES"):
            monkeypatch.setattr(module, "DISTANCES", added)
    exec(ADDED[0], {"DISTANCES": added, "Distance": losses.Distance})
    (name,) = set(added) - set(test_fused.DISTANCES)
    for aggregate in losses.AGGREGATES:
        objective = fused.Objective(name, aggregate, 1.0, alpha=0.6)
        features, weight, bias, target = test_fused.tensors(0)
        peers, logits = test_fused.teachers(2)
        values, gradients = [], []
        for function, teachers in ((fused.fused, peers), (test_fused.reference, logits)):
            own = features.clone().requires_grad_()
            loss, _, distance, *_ = function(own, weight, bias, target, teachers, objective)
            gradients += torch.autograd.grad(loss, own)
            values.append(distance.detach())
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*gradients)


def test_a_schedule_is_added_in_a_function_and_a_row(monkeypatch):
    monkeypatch.setattr(schedules, "ALPHA_SCHEDULES", dict(schedules.ALPHA_SCHEDULES))
    exec(ADDED[1], {"ALPHA_SCHEDULES": schedules.ALPHA_SCHEDULES})
    values = {epoch: schedules.alpha_at("linear", epoch, 5, alpha=0.1, step=0.1, maximum=0.8) for epoch in (1, 2, 10)}
    assert values == pytest.approx({1: 0.1, 2: 0.2, 10: 0.8}), "and the limit applies"
