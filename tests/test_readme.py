"""The commands of the README and of docs/ really run: each of its code blocks is either run here or is what `make` runs."""

import json
import re
import shlex

from fairseq_runs import MODEL, ROOT, column, command

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
TINY = ["--cpu", *MODEL.split(), "--max-update", "6", "--codistill-interval", "2", "--codistill-wait", "60"]
TINY += ["--log-interval", "1", "--codistill-sync"]


def test_every_block_is_known():
    """A new block in the README needs a test; this one says where each of today's is run."""
    starts = [block.split()[0:2] for block in BLOCKS]
    assert starts == [
        ["make", "demo"],  # tests/test_demo.py, small
        ["pip", "install"],  # the steps of the Makefile, below
        ["codistill-launch", "--peers"],  # below
        ["codistill-launch", "status"],  # below, on the exchange that the one before has left
    ]


def test_the_installation_is_the_makefiles():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for step in ("numpy cython setuptools wheel", "--no-build-isolation fairseq-fixed", "--no-build-isolation -e"):
        assert step in BLOCKS[1] and step in makefile
    pinned = re.search(r"fairseq-fixed==([\d.]+)", BLOCKS[1])[0]
    assert pinned in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_launch_generate_and_report(data, tmp_path):
    """The README's own words, in a shell and in a folder that is not the clone; options that follow make the model small."""
    (tmp_path / "data-bin").mkdir()
    (tmp_path / "data-bin/iwslt14").symlink_to(data)
    output = command("bash", "-c", f"{BLOCKS[2].strip()} {shlex.join(TINY)}", cwd=tmp_path)
    assert "codistill-report" in output, "it says what to do next"
    for peer in range(2):
        log = (tmp_path / f"checkpoints/two/peer{peer}/train.log").read_text()
        assert column(log, "train_inner", "num_updates")[-1] == 6 and len(column(log, "train_inner", "codistill_loss")) == 4
    seeds = {re.search(r"'seed': (\d+)", (tmp_path / f"checkpoints/two/peer{i}/train.log").read_text())[1] for i in (0, 1)}
    assert len(seeds) == 2

    status = json.loads(command(*shlex.split(BLOCKS[3]), cwd=tmp_path))
    assert [peer["state"] for peer in status["peers"]] == ["ended", "ended"], status

    generate = re.search(r"`(fairseq-generate data-bin/[^`]*)`", README)[1]
    generated = command("bash", "-c", f"{generate} --cpu --max-len-b 12", cwd=tmp_path)
    assert "Generate test with beam=5: BLEU4" in generated
    report = re.search(r"`(codistill-report checkpoints/two)`", README)[1]
    table = command(*shlex.split(report), cwd=tmp_path)
    assert "two" in table and list(tmp_path.glob("**/curves.png")) and list(tmp_path.glob("**/table.md"))
