"""The image recipes: the papers' numbers in their commands, the data, a sweep with the real programs, tables and claims."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from fractions import Fraction

import numpy as np
import pytest
from fairseq_runs import ROOT, command
from image_runs import write_digits, write_folder
from PIL import Image
from sklearn.datasets import load_digits

sys.path[:0] = [str(ROOT / "data_prep"), str(ROOT / "recipes/images")]
import image_results  # noqa: E402
import image_sweep  # noqa: E402
import images  # noqa: E402
from runner import runs as runs_files  # noqa: E402
from runner import sweeping, tasks  # noqa: E402

IMAGES = tasks.read_task("images")
RECIPES = ("imagenet_resnet50", "digits", "fashion_mnist", "cifar10")


def dry_run(recipe="imagenet_resnet50", status=0, **variables):
    """The command that train.sh would run, as words; or, with a status, what it says instead."""
    own = {"DATA": "data", "OUT": "out", "DRY_RUN": "1", **{name: str(value) for name, value in variables.items()}}
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    script = ROOT / "recipes" / recipe / "train.sh"
    done = subprocess.run(["bash", str(script)], env={**clean, **own}, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stderr if status else shlex.split(done.stdout)


def option(words, name):
    return words[words.index(name) + 1]


# --- train.sh -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "regularisation", "epochs", "warmup", "milestones", "lr"),
    [  # Goyal et al. 2017; Sodhani et al., §3.1 and §3.2
        ("all_reduce", "unmodified", "90", "5", "30,60,80", "0.2"),
        ("codistill", "unmodified", "45", "2.5", "15,30,40", "0.1"),
        ("codistill", "reduced", "45", "2.5", "18,38,44", "0.1"),
        ("codistill", "constant", "45", "2.5", "18,38,44", "0.1"),
        ("single", "unmodified", "45", "2.5", "15,30,40", "0.1"),
    ],
)
def test_imagenet_is_the_papers(method, regularisation, epochs, warmup, milestones, lr):
    words = dry_run(METHOD=method, REGULARISATION=regularisation)
    found = [option(words, f"--{name}") for name in ("max-epoch", "warmup-epochs", "lr-milestones", "lr", "warmup-init-lr")]
    assert found == [epochs, warmup, milestones, lr, "0.1"]
    assert option(words, "--batch-size") == "256" and option(words, "--weight-decay") == "1e-4"
    assert option(words, "--update-freq") == ("2" if method == "all_reduce" else "1")
    assert option(words, "--arch") == "resnet50" and "--no-decay-norm-bias" in words
    if regularisation == "reduced":
        assert option(words, "--weight-decays") == "1e-4,1e-05,0" and option(words, "--weight-decay-milestones") == "18,38"
    else:
        assert "--weight-decays" not in words
    if method == "codistill":
        names = ("interval", "burn-in", "loss", "alpha", "alpha-schedule", "milestones")
        assert [option(words, f"--codistill-{name}") for name in names] == ["2500", "0", "mse", "1.0", "stepwise", milestones]
        assert option(words, "--peers") == "2"
    else:
        assert option(words, "--criterion") == "cross_entropy" and option(words, "--peers") == "1"


@pytest.mark.parametrize(("fraction", "k"), [("1/2", 2), ("1/8", 8)])
def test_a_fraction_of_the_data_takes_as_many_updates(fraction, k):
    words = dry_run(METHOD="codistill", REGULARISATION="reduced", FRACTION=fraction)
    assert option(words, "--image-fraction") == fraction and option(words, "--max-epoch") == str(45 * k)
    assert option(words, "--lr-milestones") == ",".join(str(m * k) for m in (18, 38, 44))
    assert option(words, "--codistill-milestones") == option(words, "--lr-milestones")
    assert option(words, "--warmup-epochs") == str(2.5 * k).removesuffix(".0")


def test_cosine_and_groups():
    words = dry_run(METHOD="all_reduce", SCHEDULE="cosine_he")
    assert option(words, "--lr-scheduler") == "cosine_he" and "--lr-milestones" not in words
    words = dry_run(METHOD="codistill", GPUS_PER_PEER=8, CUDA_VISIBLE_DEVICES=",".join(map(str, range(16))))
    assert option(words, "--gpus-per-peer") == "8" and option(words, "--batch-size") == "32"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_a_command_that_its_programs_know(recipe):
    words = dry_run(recipe, METHOD="codistill", REGULARISATION="reduced", EPOCHS=18)
    known = (ROOT / "fairseq_codistill/image/options.py").read_text() + (ROOT / "fairseq_codistill/image/models.py").read_text()
    known += (ROOT / "fairseq_codistill/image/lr_schedules.py").read_text() + (ROOT / "fairseq_codistill/config.py").read_text()
    ours = [word for word in words if re.match(r"--(image|codistill|lr-mile|warmup-e|weight-decays|log-init|augment)", word)]
    assert ours and all(f"    {word[2:].replace('-', '_')}:" in known for word in ours)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (dict(METHOD="magic"), "METHOD must be codistill, all_reduce or single, but is magic"),
        (dict(REGULARISATION="none"), "REGULARISATION must be unmodified, reduced or constant, but is none"),
        (dict(SCHEDULE="linear"), "SCHEDULE must be multistep or cosine_he, but is linear"),
        (dict(FRACTION="0.25"), "FRACTION must be 1 or 1/k, but is 0.25"),
        (dict(EPOCHS=7), "EPOCHS=7 must give whole epochs for codistill, but gives 3.5"),
        (dict(BATCH="many"), "BATCH must be a whole number of at least 1, but is many"),
        (dict(DATA=""), "DATA must be a folder"),
        (dict(GPUS_PER_PEER=3, CUDA_VISIBLE_DEVICES="0,1,2,3,4,5"), "GPUS_PER_PEER=3 must divide BATCH=256"),
    ],
)
def test_one_sentence_for_each_mistake(variables, says):
    assert says in dry_run(status=2, **variables)


def test_data_that_is_none(tmp_path):
    error = dry_run(status=2, DATA=tmp_path, OUT=tmp_path / "out", DRY_RUN=0)
    assert "has no train" in error and error.count("\n") == 1


# --- data_prep/images.py --------------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns(tmp_path):
    folder = write_digits(tmp_path / "digits")
    assert images.counts(folder) == {"test": 355, "train": 1142, "valid": 300}
    digits = load_digits()
    threes = np.flatnonzero(digits.target == 3)
    for number, split in ((0, "train"), (threes.size - 1, "test")):
        image = np.asarray(Image.open(folder / split / "3" / f"{number:03}.png"))
        assert image.dtype == np.uint8 and (np.round(image / 255 * 16) == digits.images[threes[number]]).all()


@pytest.fixture
def archive(tmp_path):
    """Images below a folder of another name, as such archives often are; and a thing or two beside them."""
    write_folder(
        tmp_path / "x/pictures", {"train": {"cat": 4, "dog": 4}, "val": {"cat": 1, "dog": 1}, "test": {"cat": 2, "dog": 1}}
    )
    (tmp_path / "x/pictures/LICENSE").write_text("MIT")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for path in sorted((tmp_path / "x").rglob("*")):
            if path.is_file():
                out.write(path, path.relative_to(tmp_path / "x"))
        out.writestr("../train/cat/evil.png", b"outside")
    return tmp_path / "x.zip"


def test_an_archive_becomes_folders(archive, tmp_path, capsys):
    out = tmp_path / "data"
    assert images.main(["zip", "--source", str(archive), "--out", str(out)]) == 0
    assert images.counts(out) == {"test": 3, "train": 8, "valid": 2}
    assert (out / "train/cat/000.png").read_bytes() == (tmp_path / "x/pictures/train/cat/000.png").read_bytes()
    assert not list(tmp_path.rglob("evil.png"))
    assert images.main(["zip", "--source", str(archive), "--out", str(out)]) == 0
    assert "was ready" in capsys.readouterr().out


def test_validation_images_may_be_taken_from_the_training_images(archive, tmp_path):
    out = tmp_path / "data"
    assert images.main(["zip", "--source", str(archive), "--out", str(out), "--valid-per-class", "1"]) == 0
    assert images.counts(out) == {"test": 3, "train": 6, "valid": 4}
    assert (out / "valid/dog/003.png").exists() and not (out / "train/dog/003.png").exists()


def test_an_interrupted_preparation_starts_again(archive, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(images, "counts", stop)
        images.main(["zip", "--source", str(archive), "--out", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists() and (tmp_path / "data.part/train").exists()
    assert images.main(["zip", "--source", str(archive), "--out", str(tmp_path / "data")]) == 0
    assert not (tmp_path / "data.part").exists()


def test_preparation_refuses_in_one_sentence(archive, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "none.zip").write_text("no archive")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as out:
        out.writestr("readme.txt", "nothing")
    source = ["--source", str(archive)]
    for words, says in (
        (["digits", "--out", str(tmp_path / "mine")], "--out must be a new folder"),
        (["digits", "--out", str(tmp_path / "d"), *source], "--source must be given with zip, and only with it"),
        (["zip", "--out", str(tmp_path / "d")], "--source must be given with zip"),
        (["zip", "--out", str(tmp_path / "d"), "--source", "no.zip"], "there is no file no.zip"),
        (["zip", "--out", str(tmp_path / "d"), "--source", str(tmp_path / "none.zip")], "must be a zip archive"),
        (["zip", "--out", str(tmp_path / "d"), "--source", str(tmp_path / "empty.zip")], "must hold images under train/CLASS/"),
        (
            ["zip", "--out", str(tmp_path / "d"), *source, "--valid-per-class", "4"],
            "must leave images to train on, but cat has 4",
        ),
        (["zip", "--out", str(tmp_path / "d"), *source, "--valid-per-class", "-1"], "must not be negative"),
    ):
        assert images.main(words) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
        assert not (tmp_path / "d").exists()
    assert images.main(["digits", "--out", str(tmp_path / "d")]) == 0
    assert images.main(["digits", "--out", str(tmp_path / "d"), "--valid-per-class", "7"]) == 2
    assert "was made with other settings" in capsys.readouterr().err


# --- the sweep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ("fashion_mnist", "digits", "cifar10"))
def test_every_runs_file_can_be_read(recipe):
    runs = runs_files.read_runs(ROOT / "recipes" / recipe / "runs.toml", IMAGES, [1, 2, 3], [])
    names = {run.name for run in runs}
    assert {"all_reduce", "codistill", "codistill_reduced", "codistill_constant"} <= names
    assert {run.name for run in runs if run.seed == 3} < names, "some are run once"
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {claim.one for claim in image_results.CLAIMS} | {claim.other for claim in image_results.CLAIMS} <= names


def test_a_run_is_as_many_jobs_as_it_has_peers(tmp_path):
    (tmp_path / "runs.txt").write_text("a METHOD=codistill PEERS=4\nb METHOD=all_reduce\nc REGULARISATION=reduced\n")
    assert [run.jobs for run in runs_files.read_runs(tmp_path / "runs.txt", IMAGES, [1], [])] == [4, 1, 2]


def test_slots_never_hold_more_than_there_are():
    slots, lock, held, most, done = sweeping.Slots(3), threading.Lock(), [0], [0], []

    def work(wanted):
        with slots.taken(wanted):
            with lock:
                held[0] += min(wanted, 3)
                most[0] = max(most[0], held[0])
            with lock:
                held[0] -= min(wanted, 3)
        done.append(wanted)

    threads = [threading.Thread(target=work, args=(wanted,)) for wanted in (1, 2, 3, 5, 1, 2) * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 30 and most[0] == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [("a METHD=x", "METHD=x must be VARIABLE=VALUE"), ("a\na", "new name"), ("x SEED=4", "SEED=4 must be")],
)
def test_a_runs_file_that_is_none(tmp_path, capsys, text, says):
    (tmp_path / "runs.txt").write_text(text + "\n")
    words = ["--recipe", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path)]
    assert image_sweep.main(words) == 2 and says in capsys.readouterr().err
    (tmp_path / "runs.txt").write_text("a METHOD=single\n")
    assert image_sweep.main([*words, "--only", "b"]) == 2 and "--only must name runs" in capsys.readouterr().err
    assert image_sweep.main(words) == 2 and "has no images.json" in capsys.readouterr().err


@pytest.fixture(scope="module")
def swept(warm, tmp_path_factory):
    """Two runs of the digits' recipe with the real programs, very short; where they lie, and what was printed."""
    folder = tmp_path_factory.mktemp("sweep")
    write_digits(folder / "data")
    (folder / "runs.txt").write_text(
        "all_reduce METHOD=all_reduce\ncodistill_reduced METHOD=codistill REGULARISATION=reduced\n"
    )
    words = ["--recipe", ROOT / "recipes/digits", "--runs", folder / "runs.txt", "--data", folder / "data"]
    words += ["--out", folder / "runs", "--seeds", 1, "--jobs", 3, "--results", folder / "results"]
    environment = {"EPOCHS": "2", "FRACTION": "1", "VALIDATE": "12", "INTERVAL": "6", "PYTHONPATH": str(ROOT)}
    environment["FAIRSEQ_TRAIN"] = str(warm / "fairseq-train")

    def sweep():
        return command(sys.executable, ROOT / "recipes/images/image_sweep.py", *words, environment=environment)

    return folder, sweep(), sweep


def test_a_sweep_trains_scores_and_collects(swept):
    folder, printed, _ = swept
    assert printed.count("done") == 2
    scores = json.loads((folder / "results/codistill_reduced/seed1/scores.json").read_text())
    assert {"peer0", "peer1", "ensemble"} < set(scores) and scores["peer0"]["images"] == 355 and scores["split"] == "test"
    for path in (folder / "results").rglob("*"):
        if path.is_file():
            assert str(folder) not in path.read_text() and str(ROOT) not in path.read_text(), path
    assert "OUT/all_reduce/seed1" in (folder / "results/all_reduce/seed1/command.txt").read_text()


def test_a_sweep_that_is_called_again_does_nothing(swept):
    folder, _, sweep = swept
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.pt")}
    assert sweep().count("done") == 2
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.pt")} == before


def test_results_of_a_sweep(swept, capsys):
    folder, _, _ = swept
    assert image_results.main([str(folder), "--results", str(folder / "results"), "--seeds", "1"]) == 0
    table = (folder / "results/table.md").read_text()
    assert "| all_reduce | 1 | 1 |" in table and "–" in table.splitlines()[2], "one worker is no ensemble"
    claims = (folder / "results/claims.md").read_text()
    assert "one seed: " in claims and claims.count("not run") >= 4
    assert (folder / "results/curves.png").stat().st_size > 5000


def test_a_sweep_ends_on_sigterm(tmp_path):
    write_folder(tmp_path / "data", {"train": {"a": 1}})
    (tmp_path / "data/images.json").write_text("{}")
    (tmp_path / "runs.txt").write_text("a METHOD=single\nb METHOD=single\n")
    os.mkfifo(tmp_path / "started")
    (tmp_path / "train.sh").write_text(f"echo $NAME >{tmp_path}/started; exec sleep 600\n")
    words = [sys.executable, ROOT / "recipes/images/image_sweep.py", "--recipe", tmp_path, "--data", tmp_path / "data"]
    words += ["--out", tmp_path / "out", "--seeds", "1", "--jobs", "1"]
    process = subprocess.Popen([str(word) for word in words], start_new_session=True)
    try:
        assert (tmp_path / "started").read_text() == "a\n"  # waits for the writer
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert not (tmp_path / "out/b/seed1/sweep.log").exists(), "the second is not begun"
    finally:
        process.kill()


# --- claims ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "sign", "word"),
    [
        ([-2.0, -2.1, -1.9], -1, "confirmed"),
        ([2.0, 2.1, 1.9], -1, "not confirmed"),
        ([-2.0, 0.5, -0.1], -1, "too close to call"),
        ([-0.1, -2.0, -0.2], -1, "too close to call"),
        ([-0.1, -0.3, -0.2], 1, "not confirmed"),
        ([0.4], 1, "one seed: as claimed"),
        ([0.4], -1, "one seed: not as claimed"),
        ([], 1, "not run"),
    ],
)
def test_verdicts(differences, sign, word):
    assert image_results.verdict(differences, sign) == word


def result(name, fraction, **values):
    return image_results.Result(name, "x", Fraction(fraction), {measure.replace("_", " "): v for measure, v in values.items()})


def test_the_claim_of_fractions_compares_the_gains():
    found = {}
    for fraction, one, other in (("1", 90.0, 91.0), ("1/8", 85.0, 84.0)):
        suffix = "" if fraction == "1" else "_" + fraction.replace("/", "_")
        for method, value in (("codistill_reduced", one), ("all_reduce", other)):
            values = {"test top-1": {1: value, 2: value + 0.1, 3: value}}
            found[method + suffix] = image_results.Result(method + suffix, method, Fraction(fraction), values)
    line = image_results.claims(found).splitlines()[-1]
    assert "1: -1.00 (-1.00, -1.00, -1.00); 1/8: +1.00" in line and line.endswith("confirmed (from 1 to 1/8) |")


def test_claims_are_paired_by_seed():
    found = {
        "codistill": result("codistill", 1, **{"test top-1": {1: 80.0, 3: 82.0}}),
        "all_reduce": result("all_reduce", 1, **{"test top-1": {1: 82.0, 2: 99.0, 3: 84.0}}),
    }
    line = image_results.claims(found).splitlines()[2]
    assert "-2.00 (-2.00, -2.00)" in line and line.endswith("| confirmed |")
