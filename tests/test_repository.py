"""What people expect of a repository: one version, metadata that parse, a workflow and hooks whose commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fairseq_runs import ROOT

from fairseq_codistill import __version__
from fairseq_codistill.launch import main as launch
from fairseq_codistill.report import main as report

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- version


@pytest.mark.parametrize("command, main", [("codistill-launch", launch.main), ("codistill-report", report.main)])
def test_each_command_tells_its_version_in_one_line(command, main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    beside = r"\(fairseq(-fixed)? \S+, torch \S+, Python 3\.\S+\)"
    assert re.fullmatch(rf"{command} {re.escape(__version__)} {beside}\n", shown), shown


def test_the_version_is_written_once():
    told = subprocess.check_output([sys.executable, "setup.py", "--version"], cwd=ROOT, text=True)
    assert told.split()[-1] == __version__
    assert yaml.safe_load(text("CITATION.cff"))["version"] == __version__
    released = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", text("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == __version__, "the changelog's newest release"
    for path in [*(ROOT / "fairseq_codistill").rglob("*.py"), ROOT / "setup.py"]:
        if path.name != "version.py":
            assert f'"{__version__}"' not in path.read_text(encoding="utf-8"), path


# ------------------------------------------------------------------------------------------------------------ metadata


def test_the_citation_is_as_cff_1_2_0_wants_it():
    """The schema's required fields, and the types that it checks; the whole schema was checked with cffconvert."""
    cff = yaml.safe_load(text("CITATION.cff"))
    assert cff["cff-version"] == "1.2.0" and cff["type"] == "software" and cff["license"] == "MIT"
    assert cff["message"] and cff["title"] == "fairseq-codistill"
    assert cff["authors"] == [{"name": "The fairseq-codistill authors"}]
    assert isinstance(cff["version"], str), "0.10 would be read as the number 0.1"
    papers = cff["references"]
    assert [paper["authors"][0]["family-names"] for paper in papers] == ["Anil", "Sodhani"]
    for paper in papers:
        assert {"type", "title", "authors", "year", "url"} <= set(paper)
        assert paper["type"] in ("article", "conference-paper") and isinstance(paper["year"], int)
        assert paper["title"].lower() in text("README.md").lower(), "the README cites the same"
        for author in paper["authors"]:
            assert set(author) == {"family-names", "given-names"}
            assert f"{author['family-names']}, {author['given-names']}" in text("README.md")


def test_the_changelog_keeps_its_form():
    """Keep a Changelog: releases newest first, of them `Unreleased` the first; the six kinds of change."""
    assert re.findall(r"^# .+", text("CHANGELOG.md"), re.MULTILINE) == ["# Changelog"]
    releases = re.findall(r"^## (.+)", text("CHANGELOG.md"), re.MULTILINE)
    assert releases[0] == "[Unreleased]" and all(re.fullmatch(r"\[[\d.]+\] - \d{4}-\d\d-\d\d", one) for one in releases[1:])
    dates = [one.split()[-1] for one in releases[1:]]
    assert dates == sorted(dates, reverse=True)
    kinds = set(re.findall(r"^### (.+)", text("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md"])
def test_what_they_name_exists(name):
    named = re.findall(r"`((?:tests|docs|benchmarks)/[\w/]+\.\w+)`|\]\(([^)#]+)\)", text(name))
    assert named
    for found in ("".join(pair) for pair in named):
        assert (ROOT / found).exists(), f"{name} names {found}"
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text(name), re.MULTILINE)) <= TARGETS


# -------------------------------------------------------------------------------------------------------------- CI, hooks


def test_the_workflow_runs_what_is_there():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    jobs = workflow["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"], "as text: 3.10 would be read as 3.1"
    runs = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert ".ci/run" in runs["test"] and any(run.startswith("make test-legacy") for run in runs["legacy"])
    for run in [line for job in runs.values() for lines in job for line in lines.splitlines()]:
        if run.startswith("make "):
            assert run.split()[1] in TARGETS, run
        else:
            program = ROOT / run.split()[0]
            assert program.exists() and program.stat().st_mode & 0o100, f"{run}: no program of ours"
    assert "constraints.txt" in workflow["env"]["TORCH"], "the tested torch"
    assert "make test" in text(".ci/run")


def test_hooks_are_this_environments_programs():
    repositories = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert [one["repo"] for one in repositories] == ["local"], "another repository would have a version of its own"
    for hook in repositories[0]["hooks"]:
        assert hook["language"] == "system"
        words = hook["entry"].split()
        program = words[2] if words[:2] == ["python", "-m"] else words[0]
        assert re.search(rf"^{program}==", text("constraints.txt"), re.MULTILINE), f"{program} is not pinned"
        for path in (word for word in words if word.startswith("tests/")):
            assert Path(ROOT / path).exists(), path


def test_make_help_tells_every_target():
    told = set(re.findall(r"@echo 'make ([a-z-]+)", text("Makefile")))
    assert told == TARGETS - {"help"}
