"""What `make dist` builds is whole: installed in a fresh environment, it is used from another folder, without the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from fairseq_runs import MODEL, PLUGIN, ROOT, TRAINING, column

from fairseq_codistill import __version__

# Without what this session's environment says of our package.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("CODISTILL_", "PYTHONPATH"))}
REAL = ROOT / "tests/data/report"


def run(*words: object, cwd: Path, path: Path = Path(sys.executable).parent) -> str:
    """What a program of `path` prints, which must end well; what it starts itself may be the test environment's, too."""
    environment = {**CLEAN, "PATH": os.pathsep.join([str(path), str(Path(sys.executable).parent), CLEAN["PATH"]])}
    program = shutil.which(str(words[0]), path=str(path))
    assert program, f"{words[0]} is not in {path}"
    done = subprocess.run(
        [program, *map(str, words[1:])], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        cwd=cwd, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with both, built by what `make dist` runs."""
    assert ".ci/dist $(DIST)" in (ROOT / "Makefile").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("dist")
    run(ROOT / ".ci/dist", folder, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def programs(dist, tmp_path_factory):
    """The folder of programs of a fresh environment with our wheel. What it requires is that of the test environment."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    pip = f"-m pip --python {environment}/bin/python install -q --no-deps --no-index --no-compile --disable-pip-version-check"
    run(sys.executable, *pip.split(), dist / f"fairseq_codistill-{__version__}-py3-none-any.whl", cwd=environment)
    # `--system-site-packages` would show the packages below a virtual environment, not those in it. This line shows them, but
    # not its editable packages, of which ours is one.
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "test_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_the_source_distribution_holds_the_repository(dist):
    """All that git tracks (in a copy without git: the folders that matter), and nothing that a run has left behind."""
    root = f"fairseq_codistill-{__version__}"
    with tarfile.open(dist / f"{root}.tar.gz") as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    if (ROOT / ".git").exists():
        wanted = set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())
        wanted = {name for name in wanted - {".gitignore"} if (ROOT / name).exists()}
    else:
        folders = [path for name in ("fairseq_codistill", "tests", "docs", ".ci") for path in (ROOT / name).rglob("*.*")]
        wanted = {path.relative_to(ROOT).as_posix() for path in folders if path.is_file() and path.suffix != ".pyc"}
    assert not wanted - packed, "MANIFEST.in forgets these"
    assert not [name for name in packed if name.endswith((".pyc", ".pt", ".safetensors"))]


def test_the_wheel_holds_the_package_alone(programs):
    site = next(programs.parent.glob("lib/python*/site-packages"))
    own = {path.relative_to(PLUGIN) for path in PLUGIN.rglob("*.py")}
    assert {path.relative_to(site / PLUGIN.name) for path in (site / PLUGIN.name).rglob("*.*")} == own
    assert not (site / "tests").exists() and not (site / "recipes").exists()


def test_used_from_another_folder(programs, data, tmp_path):
    """The programs' version, path and --dry-run; a report of a log that is already there."""
    told = run("codistill-launch", "--version", cwd=tmp_path, path=programs)
    assert told.startswith(f"codistill-launch {__version__} (fairseq")
    user_dir = run("codistill-launch", "--user-dir", cwd=tmp_path, path=programs).rstrip("\n")
    assert user_dir.startswith(f"{programs.parent}/lib/") and user_dir.endswith("/fairseq_codistill")

    words = f"--peers 2 --dry-run -- fairseq-train {data} --user-dir {user_dir} --criterion codistill_ce --save-dir two {MODEL}"
    shown = run("codistill-launch", *words.split(), *TRAINING.split(), cwd=tmp_path, path=programs)
    for peer in range(2):
        assert f"--save-dir two/peer{peer}" in shown and f"CODISTILL_PEER={peer}" in shown
    assert not (tmp_path / "two").exists(), "a dry run starts nothing"

    log = next(REAL.rglob("train.log"))
    shown = run("codistill-report", f"real={log}", "--out", "report", cwd=tmp_path, path=programs)
    assert "real" in shown and json.loads((tmp_path / "report/results.json").read_text())
    assert (tmp_path / "report/curves.png").stat().st_size > 1000


def test_a_package_of_ones_own_trains_with_it(programs, data, tmp_path):
    """From another folder, by `python -m`, with the path that the command prints."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/__init__.py").write_text("import fairseq_codistill\n")
    main = "from fairseq_cli.train import cli_main\nif __name__ == '__main__':\n    cli_main()\n"
    (tmp_path / "own/train.py").write_text(main)
    user_dir = run("codistill-launch", "--user-dir", cwd=tmp_path, path=programs).rstrip("\n")
    options = f"--save-dir run {MODEL} {TRAINING} --criterion codistill_ce --max-update 2 --user-dir {user_dir}"
    log = run(programs / "python", "-m", "own.train", data, *options.split(), cwd=tmp_path)
    assert column(log, "train_inner", "num_updates") == [1, 2]
