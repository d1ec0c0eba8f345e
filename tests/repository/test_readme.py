"""The commands of README and docs/ really run, and show what the pages say that they show.

A block of `bash` is run as it stands. Other blocks that begin with a command are patterns, with a `…`: the launcher plans its
own, and each of the rest is named here with the reason why it is not run.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from fairseq_runs import MODEL, PLUGIN, ROOT, column, command

from fairseq_codistill.launch import plan
from fairseq_codistill.launch.main import main as launch

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXT["README.md"]
FENCED = [found for text in TEXT.values() for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]
BLOCKS = [block for language, block in FENCED if language == "bash"]
TINY = ["--cpu", *MODEL.split(), "--max-update", "6", "--codistill-interval", "2", "--codistill-wait", "60"]
TINY += ["--log-interval", "1", "--codistill-sync"]

USER_DIR = '--user-dir "$(codistill-launch --user-dir)"'
# The first line of each block of bash, and where it is run.
RUN = {
    "make demo": "tests/recipes/test_demo.py, small",
    "pip install torch numpy cython setuptools wheel": "the Makefile's steps, below; a wheel: tests/repository/test_dist.py",
    "codistill-launch --peers 2 -- fairseq-train data-bin/iwslt14 \\": "below",
    "codistill-launch --peers 2 -- fairseq-train data-bin/iwslt14 --tensorboard-logdir tb/two \\": "below",
    "codistill-launch status checkpoints/two --json": "below, on the exchange that the training has left",
    "codistill-report checkpoints/two": "below, on its logs",
    f"fairseq-generate data-bin/iwslt14 {USER_DIR} --path checkpoints/two/peer0/checkpoint_best.pt": "below, its checkpoint",
    "codistill-launch --version": "tests/repository/test_repository.py",
    "make install": "what `make test` does first",
}  # fmt: skip
# The first words of other blocks that begin with a command, and why they are not run here.
NOT_RUN = {
    "fairseq-preprocess -s de": "how the tests' data is made (fairseq_runs.preprocess), with file names of the reader's",
    "codistill-launch export RUN": "tests/launch/test_export.py, to the translations of fairseq-generate",
    "codistill-report runs --baseline single": "tests/report/test_report_significance.py, on files that the test makes",
    "codistill-report recipes/multi30k_en_de": "tests/report/test_report_advice.py, in process",
    "tensorboard --logdir tb": "a server; the folders that it reads are checked below",
}


def test_every_block_is_known():
    assert {block.splitlines()[0] for block in BLOCKS} == set(RUN), "a block that is new, or gone"
    for first in RUN:
        texts = {block for block in BLOCKS if block.startswith(first + "\n")}
        assert len(texts) == 1, f"{first}: pages differ in the lines that follow"


def block(first: str) -> str:
    return next(one.strip() for one in BLOCKS if one.startswith(first))


def test_the_installation_is_the_makefiles():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = block("pip install")
    for step in ("numpy cython setuptools wheel", "--no-build-isolation fairseq-fixed", "--no-build-isolation -e"):
        assert step in shown and step in makefile
    pinned = re.search(r"fairseq-fixed==([\d.]+)", shown)[0]
    assert pinned in (ROOT / "setup.py").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------- what a reader types


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A folder that is not the clone, with the data that the pages name."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "data-bin").mkdir()
    (folder / "data-bin/iwslt14").symlink_to(data)
    return folder


def shows(output: str, after: str) -> None:
    """`output` has the lines that the README shows after the block `after`; `…` stands for anything."""
    shown = re.search(re.escape(after) + r"\n```\n```\n(.*?)```", README, re.DOTALL)[1].splitlines()
    lines = ["".join(line.split()) for line in output.splitlines()]
    for wanted in shown:
        pattern = ".*?".join(re.escape("".join(part.split())) for part in wanted.split("…"))
        assert any(re.fullmatch(pattern, line) for line in lines), f"no line is like {wanted!r}:\n{output[-3000:]}"



def test_launch_status_report_and_generate(folder):
    """The pages' own words, in a shell; options that follow make the model small."""
    words = block("codistill-launch --peers 2 -- fairseq-train data-bin/iwslt14 \\")
    output = command("bash", "-c", f"{words} {shlex.join([*TINY, '--tensorboard-logdir', 'tb/two'])}", cwd=folder)
    shows(output, words)
    for peer in range(2):
        log = (folder / f"checkpoints/two/peer{peer}/train.log").read_text()
        assert column(log, "train_inner", "num_updates")[-1] == 6 and len(column(log, "train_inner", "codistill_loss")) == 4
        written = folder / f"tb/two/peer{peer}"
        assert {path.name for path in written.iterdir()} >= {"train", "train_inner", "valid"}, "docs/trackers.md says so"
    seeds = {re.search(r"'seed': (\d+)", (folder / f"checkpoints/two/peer{i}/train.log").read_text())[1] for i in (0, 1)}
    assert len(seeds) == 2

    status = json.loads(command(*shlex.split(block("codistill-launch status")), cwd=folder))
    assert [peer["state"] for peer in status["peers"]] == ["ended", "ended"], status

    report = block("codistill-report")
    shows(command(*shlex.split(report), cwd=folder), report)
    assert list(folder.glob("checkpoints/two/report/curves.png")) and list(folder.glob("checkpoints/two/report/table.md"))

    generate = block("fairseq-generate")
    shows(command("bash", "-c", f"{generate} --cpu --max-len-b 12", cwd=folder), generate)


PROGRAM = re.compile(r"([A-Z_]+=\S+ )*(codistill-|fairseq-|tensorboard|python |pip |make |bash )")
COMMANDS = [text for language, text in FENCED if not language and PROGRAM.match(text)]
PLANNED = [text for text in COMMANDS if " -- " in text]
PLANNED.append(block("codistill-launch --peers 2 -- fairseq-train data-bin/iwslt14 --tensorboard-logdir"))


def test_fairseqs_options_exist():
    """By its own sources: to import fairseq takes seconds."""
    folder = Path(importlib.util.find_spec("fairseq").submodule_search_locations[0])
    sources = [*(folder / "dataclass").glob("*.py"), folder / "options.py", *(folder / "optim").rglob("*.py")]
    known = set(re.findall(r"[a-z]\w+", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    for text in [*PLANNED, block("fairseq-generate")]:
        _, _, given = text.replace("\\\n", " ").rpartition(" -- ")
        for option in re.findall(r"(?<!\()(?<!launch )--([a-z-]+)", given):
            assert option.replace("-", "_") in known or option.startswith(("codistill-", "config-")), f"--{option} in {text}"


def test_other_commands_are_planned_or_named():
    named = {first for text in COMMANDS for first in NOT_RUN if text.startswith(first)}
    assert named == set(NOT_RUN)
    for text in COMMANDS:
        assert text in PLANNED or any(text.startswith(first) for first in NOT_RUN), text


@pytest.mark.parametrize("text", PLANNED)
def test_the_launcher_takes_it(text, folder, monkeypatch, capsys):
    """As far as the peers' commands and what each has for itself; `…` is the rest of a command."""
    monkeypatch.chdir(folder)
    (folder / "conf").mkdir(exist_ok=True)
    (folder / "conf/train.yaml").write_text(f"checkpoint: {{save_dir: three}}\ntask: {{data: {folder}/data-bin/iwslt14}}\n")
    monkeypatch.setattr(plan, "visible_gpus", lambda: list("01234567") if "--gpus" in text else [])
    rest = f"data-bin/iwslt14 --criterion codistill_ce --user-dir {PLUGIN} --arch transformer_iwslt_de_en"
    rest += "" if "--save-dir" in text else " --save-dir three"
    words = shlex.split(text.replace("\\\n", " ").replace("$(codistill-launch --user-dir)", str(PLUGIN)).replace("…", rest))
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    assert words[0] == "codistill-launch"
    assert launch(["--dry-run", *words[1:]]) == 0, capsys.readouterr().err
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CODISTILL_")]
    assert len(shown) == 2
    for peer, line in enumerate(shown):
        if "--tensorboard-logdir" in text:
            assert f"--tensorboard-logdir tb/two/peer{peer}" in line
        if "--wandb-project" in text:
            assert f"WANDB_NAME=two-peer{peer}" in line
        if "--aim-repo" in text:
            assert f"--save-dir checkpoints/two/peer{peer}" in line, "by which fairseq finds Aim's run"
        if "--gpus-per-peer 4" in text:
            assert f"CUDA_VISIBLE_DEVICES={'0,1,2,3' if peer == 0 else '4,5,6,7'}" in line


# ------------------------------------------------------------------------------------------------------------ its size


def test_the_readme_is_short():
    """What a first-time reader does not need is in docs/."""
    assert len(README) <= 10_000 and len(README.splitlines()) <= 160
    programs = ("pip install", "codistill-launch --peers", "codistill-report", "fairseq-generate")
    for needed in ("  peer 0", *programs, "![", "| data,"):
        assert needed in README.split("\n## ")[0], "the first screen"
    headings = re.findall(r"^## (.+)", README, re.MULTILINE)
    assert headings == ["Using it with your own command", "Five options", "Evaluation", "More", "Citation"]
    assert len(re.findall(r"^\| `--codistill", README, re.MULTILINE)) == 5


def test_the_results_page_has_the_readmes_table():
    """Row for row; only the links are relative to another folder."""
    def table(text):
        start = text.index("| data, updates of a peer |")
        return text[start : text.index("\n\n", start)]

    assert table(TEXT["results.md"]) == table(README).replace("](recipes/", "](../recipes/")


def test_the_demos_numbers_are_those_of_its_logs():
    """The table of docs/quickstart.md is that of recipes/demo/results."""
    table = [line for line in (ROOT / "recipes/demo/results/table.md").read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    columns = [cells[0].index(name) for name in ("method", "best valid NLL", "last valid NLL", "test BLEU")]
    for row in cells[2:]:
        wanted = [row[i] for i in columns]
        shown = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in TEXT["quickstart.md"].splitlines()]
        assert any(line[0] == wanted[0] and set(wanted) <= set(line) for line in shown), wanted
