"""The recipes' runner: train.sh is what recipe.toml makes, what stands above what, and what is refused. No training."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_runs import ROOT

RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))
import run  # noqa: E402
from runner import commands, runs, tasks, training  # noqa: E402

ALL = sorted(path.parent.name for path in RECIPES.glob("*/recipe.toml"))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in tasks.variables_of(tasks.read_task("translation")) | tasks.variables_of(tasks.read_task("images")):
        monkeypatch.delenv(name, raising=False)
    for name in ("DATA", "OUT", "SEED", "NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def shell(script: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "DATA": "a folder", "OUT": "out", **variables}
    return subprocess.run(["bash", str(script), *words], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    """Stands for Python, and writes down the words with which it was called."""
    path = tmp_path_factory.mktemp("recorder") / "python"
    path.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    path.chmod(0o755)
    return str(path)


def literal_of(recipe: str, recorder: str, **variables: str) -> list:
    words = shell(RECIPES / recipe / "train.sh", PYTHON=recorder, **variables).stdout.split("\0")[:-1]
    assert words[:4] == [str(RECIPES / "run.py"), "train", str(RECIPES / recipe), "--"] and words[-1] == "--"
    return words[4:-1]


@pytest.mark.parametrize("recipe", ALL)
def test_the_literal_command_is_what_the_settings_make(recipe, recorder):
    """What a reader sees in train.sh is what METHOD=codistill and every sweep run."""
    typed = commands.from_literal(literal_of(recipe, recorder, SEED="3"))
    made, _ = training.make(tasks.read_recipe(RECIPES / recipe), {"data": "a folder", "out": "out", "seed": "3"})
    assert typed == made


def edited_recipe(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of Multi30k's train.sh that trains otherwise."""
    text = (RECIPES / "multi30k_en_de/train.sh").read_text()
    assert text.count(old) == 1
    script = tmp_path / "train.sh"
    root = 'root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"'
    assert root in text
    script.write_text(text.replace(root, f"root={shlex.quote(str(ROOT))}").replace(old, new))
    return script


def test_an_edit_of_train_sh_counts(tmp_path):
    script = edited_recipe(tmp_path, "--lr 3e-3", "--lr 7")
    result = shell(script, DRY_RUN="1", CUDA_VISIBLE_DEVICES="0,1")
    words = shlex.split(result.stdout)
    assert commands.value_of(words, "--lr") == "7" and commands.value_of(words, "--gpus-per-peer") == "1"
    assert commands.value_of(words, "--save-dir") == "out/codistill_mse/seed1" and words[7] == "a folder/bin"
    assert "METHOD" not in result.stderr and "batch" not in result.stderr, "recipe.toml's cost would be another's"
    # The same settings as the default's are no others.
    again = shell(script, DRY_RUN="1", CUDA_VISIBLE_DEVICES="0,1", METHOD="codistill", LR="3e-3")
    assert again.stdout == result.stdout


def test_with_other_settings_recipe_toml_counts_and_says_so(tmp_path):
    result = shell(edited_recipe(tmp_path, "--lr 3e-3", "--lr 7"), DRY_RUN="1", METHOD="single")
    assert commands.value_of(shlex.split(result.stdout), "--lr") == "3e-3"
    assert "note: train.sh and recipe.toml of multi30k_en_de differ" in result.stderr
    untouched = shell(RECIPES / "multi30k_en_de/train.sh", DRY_RUN="1", METHOD="single")
    assert untouched.stdout == result.stdout and "note" not in untouched.stderr


def dry_run(capsys: pytest.CaptureFixture, recipe: str, *words: str) -> list:
    assert run.main(["train", str(RECIPES / recipe), "DATA=data", "OUT=out", "--dry-run", *words]) == 0
    return shlex.split(capsys.readouterr().out)


def test_the_runner_takes_settings_as_words(capsys):
    for words in (["METHOD=rdrop", "SEED=4", "TOKENS=77"], ["method=rdrop", "seed=4", "tokens=77"]):
        told = dry_run(capsys, "newstest_de_en", *words)
        variables = {word.split("=")[0].upper(): word.split("=")[1] for word in words}
        by_environment = shell(RECIPES / "newstest_de_en/train.sh", DRY_RUN="1", DATA="data", **variables)
        assert told == shlex.split(by_environment.stdout) and commands.value_of(told, "--max-tokens") == "77"


def test_everything_of_fairseq_can_be_set(capsys, monkeypatch):
    from fairseq import options

    scheduler = ["LR_SCHEDULER=tri_stage", "WARMUP=-", "WARMUP_INIT_LR=-"]
    told = dry_run(capsys, "iwslt14_de_en", *scheduler, "--", "--phase-ratio", "(0.1, 0.4, 0.5)", "--dropout", "0.7", "--fp16")
    words = told[told.index("fairseq-train") + 1 :]
    assert "--warmup-updates" not in words and words[-5:-1] == ["--phase-ratio", "(0.1, 0.4, 0.5)", "--dropout", "0.7"]
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words])
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    assert (args.lr_scheduler, args.dropout, list(eval(str(args.phase_ratio)))) == ("tri_stage", 0.7, [0.1, 0.4, 0.5])
    by_script = shell(RECIPES / "iwslt14_de_en/train.sh", "--dropout", "0.7", DRY_RUN="1", GPUS="2")
    assert shlex.split(by_script.stdout)[-2:] == ["--dropout", "0.7"]


def test_what_stands_above_what(tmp_path):
    """Defaults of the task, recipe.toml, environment, words; α depends on the distance that comes of it."""
    (tmp_path / "recipe.toml").write_text(
        'task = "translation"\n[settings]\ntokens = 5\nlr = 3e-3\nweight_decay = false\nsync = true\ndistance = "fused_mse"\n'
    )
    recipe = tasks.read_recipe(tmp_path)
    values = tasks.resolve(recipe.task, recipe.settings, {"tokens": "6", "validate": "7"}, {"tokens": "8"})
    assert (values["tokens"], values["valid_tokens"], values["log_every"], values["lr"]) == ("8", "8", "7", "3e-3")
    assert (values["weight_decay"], values["sync"], values["workers"], values["keep"]) == ("", "1", "2", "1")
    assert (values["alpha"], values["alpha_schedule"]) == ("0.1", "exponential")
    values = tasks.resolve(recipe.task, recipe.settings, {"distance": "kl", "alpha_schedule": "linear"})
    assert (values["alpha"], values["alpha_schedule"]) == ("1.0", "linear")
    assert tasks.from_environment(recipe.task, {"TOKENS": "", "LR": "1", "HOME": "/"}) == {"lr": "1"}


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "train must be followed by the folder of a recipe"),
        ("nowhere", "a recipe must be a folder with a recipe.toml, such as recipes/multi30k_en_de, but nowhere has none"),
        ("digits METHDO=single", "METHDO=single must be NAME=VALUE with a setting of recipes/images/task.toml"),
        ("digits DATA=x OUT=y METHOD=magic", "METHOD must be codistill, all_reduce or single, but is magic instead"),
        ("digits DATA=x OUT=y EPOCHS=few", "EPOCHS must be a number, but is few instead"),
        ("digits DATA=x OUT=y -- train -- x", "train.sh must run codistill-launch OPTIONS -- fairseq-train OPTIONS, but"),
        ("demo DATA=x OUT=y TOKENS=-", "TOKENS must be a whole number of at least 1, but is - instead"),
    ],
)
def test_one_sentence_for_each_mistake(words, says, capsys):
    words = words.replace("digits", str(RECIPES / "digits")).replace("demo", str(RECIPES / "demo"))
    assert run.main(["train", *words.split()]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "text, says",
    [
        ("task = ", "recipe.toml must be TOML, but is not: Invalid value"),
        ('task = "music"', "task must be images or translation, but is music instead"),
        ('task = "images"\n[settings]\nepoch = 3', "epoch must be a setting of the recipe's task.toml, but is none"),
        ('task = "images"\n[settings]\nepochs = [3]', "epochs must be a text, a number, true or false, but is [3] instead"),
    ],
)
def test_a_recipe_that_is_none(text, says, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(text)
    assert run.main(["train", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    assert run.main(["dance"]) == 2 and "must be train, evaluate or sweep, but is dance" in capsys.readouterr().err


# --- files of runs ----------------------------------------------------------------------------------------------------

TRANSLATION = tasks.read_task("translation")


def test_a_runs_file_as_toml_is_the_one_as_text(tmp_path):
    text, toml = tmp_path / "runs.txt", tmp_path / "other.toml"
    text.write_text("* LR=3e-3 EXTRA='--fp16 --amp'\nfirst METHOD=single\nsecond METHOD=rdrop LR=2 SEEDS=1\n")
    toml.write_text(
        '[all]\nlr = 3e-3\nextra = "--fp16 --amp"\n[runs]\nfirst = { method = "single" }\n'
        'second = { method = "rdrop", lr = 2, seeds = [1] }\n'
    )
    expected = runs.read_runs(text, TRANSLATION, [1, 2], [])
    assert [(run.name, run.seed) for run in expected] == [("first", 1), ("second", 1), ("first", 2)]
    assert runs.read_runs(toml, TRANSLATION, [1, 2], []) == expected
    assert runs.read_runs(toml, TRANSLATION, [1], ["second"])[0].own["LR"] == "2"
    # A list that was text once is found under its old name.
    assert runs.find(tmp_path, tmp_path / "other.txt") == toml and runs.find(tmp_path, None) == text
    with pytest.raises(ValueError, match="--runs must be a file of runs, but .*none.txt is not there"):
        runs.find(tmp_path, tmp_path / "none.txt")


@pytest.mark.parametrize(
    "text, says",
    [
        ("[runs]\na = { methd = 'x' }", "methd of a must be a setting of recipes/translation/task.toml, but is none"),
        ("[runs]\na = { seed = 4 }", "seed of a must be a setting"),
        ("[runs]\na = { METHOD = 'single' }", "METHOD of a must be a setting"),
        ("[runs]\na = 'single'", "a must be a table of settings"),
        ("[runs]\n'a/b' = {}", "must have a name without /, but one is called 'a/b'"),
        ("[run]\na = {}", r"must have a table \[runs\], and may have \[all\], but has run"),
        ("[all]\nepochs = 3\n[runs]\na = {}", "epochs of all must be a setting"),
        ("[runs]\na = {}\na = {}", "must be TOML, but is not"),
    ],
)
def test_a_toml_file_of_runs_that_is_none(text, says, tmp_path):
    (tmp_path / "runs.toml").write_text(text)
    with pytest.raises(ValueError, match=says):
        runs.read_runs(tmp_path / "runs.toml", TRANSLATION, [1], [])


# --- one training -----------------------------------------------------------------------------------------------------


def test_a_run_is_trained_once_and_goes_on_with_its_command(tmp_path, capsys):
    """Also one whose command.txt was written with other quotes than ours."""
    made = tmp_path / "run/peer0/checkpoint_last.pt"
    words = ["sh", "-c", f"mkdir -p {made.parent} && echo $OMP_NUM_THREADS >> {made}"]
    made.parent.mkdir(parents=True)
    (tmp_path / "run/command.txt").write_text(" ".join(word.replace(" ", "\\ ").replace(">", "\\>").replace("$", "\\$").replace(
        "&", "\\&") for word in words) + "\n")  # fmt: skip
    assert training.train_once(tmp_path / "run", 1, "checkpoint_last.pt", words, "3") == 0
    assert training.train_once(tmp_path / "run", 1, "checkpoint_last.pt", words, "3") == 0
    assert made.read_text() == "3\n" and "was finished, nothing done" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was begun with another command .* give another NAME or OUT"):
        training.train_once(tmp_path / "run", 1, "checkpoint_last.pt", [*words, "--more"], "3")


def test_a_training_that_leaves_no_checkpoint_has_failed(tmp_path, capsys):
    assert training.train_once(tmp_path / "a", 1, "checkpoint_last.pt", ["true"], "") == 1
    assert "a/peer0 has no checkpoint_last.pt" in capsys.readouterr().err and not (tmp_path / "a/finished").exists()
    assert training.train_once(tmp_path / "b", 1, "checkpoint_last.pt", ["sh", "-c", "exit 7"], "") == 7
    assert training.train_once(tmp_path / "c", 1, "checkpoint_last.pt", ["sh", "-c", "kill -9 $$"], "") == 137
    assert training.train_once(tmp_path / "d", 1, "checkpoint_last.pt", ["no-such-launcher"], "") == 127
    assert "no-such-launcher must be on PATH, but is not" in capsys.readouterr().err


def test_two_do_not_train_one_run(tmp_path):
    with training._locked(tmp_path):
        with pytest.raises(ValueError, match="is being trained by another process"):
            training.train_once(tmp_path, 1, "checkpoint_last.pt", ["true"], "")


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scoring_has_the_recipes_settings_where_the_environment_has_none():
    recipe = tasks.read_recipe(RECIPES / "demo")
    given = {"BEAM": "", "TEST_SETS": "", "LENPEN": "0.6", "FAIRSEQ_GENERATE": "generate"}
    command, environment = training.TASKS["translation"].evaluation(recipe, given, ["runs/a", "runs/b"])
    assert command == [sys.executable, str(RECIPES / "translation/evaluate.py"), "runs/a", "runs/b"]
    expected = {"BEAM": "5", "TEST_SETS": "", "LENPEN": "0.6", "FAIRSEQ_GENERATE": "generate", "NLL_SETS": "", "TARGET": "de"}
    assert {name: environment[name] for name in expected} == expected


def test_scoring_of_images(capsys):
    recipe = tasks.read_recipe(RECIPES / "imagenet_resnet50")
    evaluation = training.TASKS["images"].evaluation
    assert evaluation(recipe, {"DATA": "d"}, ["r"])[0][2:] == ["r", "--data", "d", "--cpu"]
    assert evaluation(recipe, {"DATA": "d", "CPU": "0"}, ["r"])[0][2:] == ["r", "--data", "d"]
    assert run.main(["evaluate", str(RECIPES / "digits"), "r"]) == 2 and "DATA must be a folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must have the folder of one run, for example runs/single/seed1, but has 2"):
        evaluation(recipe, {"DATA": "d"}, ["r", "s"])
