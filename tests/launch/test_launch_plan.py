"""What each peer is told: its own outputs, where it goes on from, what its YAML says, and what is refused beforehand."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from fairseq_runs import PLUGIN, ROOT

from fairseq_codistill.launch import command as launch_command
from fairseq_codistill.launch import outputs as launch_outputs
from fairseq_codistill.launch import plan as launch_plan

IS_OLD = version("hydra-core") < "1.1"  # of stock fairseq
PLAIN = "fairseq-train D --criterion cross_entropy --save-dir X"


def planned(words: str, environ: dict | None = None, peers: int = 2, log_dir=None) -> launch_plan.Plan:
    options = argparse.Namespace(peers=peers, gpus_per_peer=0, max_restarts=0, grace=1, log_dir=log_dir, command=words.split())
    return launch_plan.make_plan(options, environ or {})


def commands(words: str, environ: dict | None = None, peers: int = 2) -> list:
    return [" ".join(peer.command) for peer in planned(words, environ, peers).peers]


def notes(words: str, environ: dict | None = None, peers: int = 2) -> str:
    return "\n".join(planned(words, environ, peers).notes)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is neither a clone nor above one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_yaml(text: str, name: str = "c.yaml") -> str:
    Path("yaml").mkdir(exist_ok=True)
    path = Path("yaml", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return "fairseq-hydra-train --config-dir yaml --config-name c"


# ------------------------------------------------------------------------------------ what a job writes to, and its names


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("tensorboard-logdir", "tb", ["tb/peer0", "tb/peer1"]),
        ("tensorboard-logdir", "/tb/", ["/tb/peer0", "/tb/peer1"]),
        ("log-file", "logs/train.log", ["logs/train.peer0.log", "logs/train.peer1.log"]),
        ("log-file", "log", ["log.peer0", "log.peer1"]),
        ("results-path", "out", ["out/peer0", "out/peer1"]),
        ("distributed-port", "29500", ["29500", "29501"]),
        ("distributed-port", "-1", ["-1", "-1"]),
        ("distributed-init-method", "tcp://here:5000", ["tcp://here:5000", "tcp://here:5001"]),
        ("distributed-init-method", "tcp://[::1]:5000", ["tcp://[::1]:5000", "tcp://[::1]:5001"]),
        ("distributed-init-method", "file:///a/meet", ["file:///a/meet.peer0", "file:///a/meet.peer1"]),
        ("distributed-init-method", "env://", ["env://", "env://"]),
    ],
)
def test_each_peer_writes_and_listens_for_itself(option: str, value: str, expected: list) -> None:
    told = planned(f"{PLAIN} --{option}={value}").peers
    assert [launch_command.FairseqCommand(peer.command).get(option) for peer in told] == expected
    assert (f"--{option} {value} would be shared" in notes(f"{PLAIN} --{option} {value}")) == (expected[0] != expected[1])
    alone = commands(f"{PLAIN} --{option} {value}", peers=1)[0]
    assert f"--{option} {value} " in alone, "a run of one shares nothing"


def test_sockets_and_runs_of_others() -> None:
    assert "--plasma-path /tmp/plasma.peer1" in commands(f"{PLAIN} --use-plasma-view")[1]
    assert "plasma" not in commands(PLAIN)[1]
    assert not any("aim-run-hash" in one for one in commands(f"{PLAIN} --aim-repo A --aim-run-hash 77"))
    assert "--aim-run-hash would be shared, so it is left out" in notes(f"{PLAIN} --aim-run-hash 77")
    assert "--aim-run-hash 77" in commands(f"{PLAIN} --aim-run-hash 77", peers=1)[0]
    assert "peers of one AzureML job log to one run" in notes(f"{PLAIN} --azureml-logging")


def test_names_in_the_environment() -> None:
    given = {"WANDB_NAME": "try", "WANDB_RUN_ID": "77", "MASTER_PORT": "5000", "WANDB_DIR": "w"}
    second = planned(PLAIN, given).peers[1].environ
    assert (second["WANDB_NAME"], second["WANDB_RUN_ID"], second["MASTER_PORT"]) == ("try-peer1", "77-peer1", "5001")
    assert "WANDB_DIR" not in second and "WANDB_RUN_ID 77 would be shared: peers get 77-peer0, 77-peer1 …" in notes(
        PLAIN, given
    )
    assert planned(f"{PLAIN} --wandb-project P").peers[0].environ["WANDB_NAME"] == "X-peer0"
    assert not set(launch_outputs.ENVIRON) & set(planned(PLAIN).peers[0].environ)
    assert not set(launch_outputs.ENVIRON) & set(planned("python train.py", given).peers[0].environ)


def test_a_port_must_exist() -> None:
    with pytest.raises(ValueError, match="--distributed-port must leave a port below 65536 for each peer, but is 65535"):
        planned(f"{PLAIN} --distributed-port 65535")


def test_nothing_of_fairseq_that_names_an_output_is_forgotten() -> None:
    """A new fairseq may have more; then the table must be looked at."""
    from fairseq.dataclass.configs import CommonConfig, DistributedTrainingConfig

    names = [*CommonConfig.__dataclass_fields__, *DistributedTrainingConfig.__dataclass_fields__]
    endings = ("_dir", "_logdir", "_file", "_path", "_port", "_method", "_hash", "_repo", "_project", "_logging")
    known = {*launch_outputs.OPTIONS, "user-dir", "quantization-config-path", "aim-repo", "wandb-project"}
    known |= {"azureml-logging", "reset-logging"}
    assert {name.replace("_", "-") for name in names if name.endswith(endings)} - known == set()


# -------------------------------------------------------------------------------------------------- a training that has begun

FIRST = "--restore-file base.pt --reset-optimizer --reset-dataloader --reset-meters --reset-lr-scheduler"


def test_a_peer_goes_on_from_its_own_checkpoint(elsewhere: Path) -> None:
    plan = planned(f"fairseq-train D --criterion cross_entropy --restore-file=base.pt {FIRST} --lr 1 --save-dir X")
    first, second = plan.peers
    assert all(word in " ".join(second.command) for word in FIRST.split())
    (elsewhere / "X/peer1").mkdir(parents=True)
    (elsewhere / "X/peer1/checkpoint_last.pt.torn").touch()
    assert "--restore-file" in second.command
    (elsewhere / "X/peer1/checkpoint_last.pt").touch()  # of this start: the next one of the same launcher goes on from it
    told = "fairseq-train D --criterion cross_entropy --lr 1 --save-dir X/peer1 --seed 10000001 --log-format json"
    assert " ".join(second.command) == told and "--restore-file" in first.command
    assert commands(f"{PLAIN} {FIRST}")[1].startswith("fairseq-train D"), "so does a start by hand"
    said = notes(f"{PLAIN} {FIRST}")
    assert "--restore-file, --reset-optimizer, --reset-lr-scheduler" in said and "for a peer's first start alone" in said
    assert "as peer1 does now" in said


def test_of_a_model_in_parts_and_what_is_not_the_first_starts(elsewhere: Path) -> None:
    (elsewhere / "X/peer0").mkdir(parents=True)
    (elsewhere / "X/peer0/checkpoint_last-shard0.pt").touch()
    first = commands(f"{PLAIN} --finetune-from-model m.pt --optimizer-overrides {{}} --restore-file checkpoint_last.pt")[0]
    assert "finetune" not in first and "--optimizer-overrides {}" in first
    assert "first start" not in notes(f"{PLAIN} --restore-file checkpoint_last.pt")


def test_hydra_goes_on_too(elsewhere: Path) -> None:
    hydra = write_yaml("checkpoint: {save_dir: X, restore_file: base.pt, reset_meters: true}\ncriterion: {_name: c}")
    peer = planned(f"{hydra} +checkpoint.reset_optimizer=true").peers[0]
    told = peer.command
    assert f"checkpoint.restore_file={elsewhere}/base.pt" in told and "+checkpoint.reset_optimizer=true" in told
    (elsewhere / "X/peer0").mkdir(parents=True)
    (elsewhere / "X/peer0/checkpoint_last.pt").touch()
    told = peer.command
    assert "checkpoint.restore_file=checkpoint_last.pt" in told and "checkpoint.reset_meters=false" in told
    assert not any("reset_optimizer" in word for word in told)


# ---------------------------------------------------------------------------------------------------------- hydra and YAML

YAML = """\
common: {seed: 1337, log_format: simple, tensorboard_logdir: tb, user_dir: fairseq_codistill}
checkpoint: {save_dir: "${oc.env:WHERE}/from_yaml"}
criterion: {_name: codistill_ce, codistill_dir: meet}
task: {_name: translation, data: "bin:/more"}
distributed_training: {distributed_port: 4000}
"""


def test_a_peer_gets_its_own_of_what_stands_in_the_yaml(elsewhere: Path, monkeypatch) -> None:
    monkeypatch.setenv("WHERE", str(elsewhere / "w"))
    hydra = write_yaml(YAML.replace("oc.env", "env") if IS_OLD else YAML)
    plan = planned(hydra)
    told = plan.peers[1].command
    for word in (
        f"checkpoint.save_dir={elsewhere}/w/from_yaml/peer1",
        "common.seed=10001337",
        f"common.tensorboard_logdir={elsewhere}/tb/peer1",
        f"common.user_dir={PLUGIN}",
        f"criterion.codistill_dir={elsewhere}/meet",
        f"task.data={elsewhere}/bin:/more",
        "distributed_training.distributed_port=4001",
        "common.reset_logging=true",
        "hydra.run.dir='outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}/peer1'",
    ):
        assert word in told, word
    assert not any("log_format" in word for word in told) and "'simple'" in "\n".join(plan.notes)
    assert plan.run_dir == f"{elsewhere}/w/from_yaml" and "CODISTILL_DIR" not in plan.peers[1].environ
    told = commands(f"{hydra} checkpoint.save_dir=Y common.tensorboard_logdir=null common.seed=3")[1]
    assert f"checkpoint.save_dir={elsewhere}/Y/peer1" in told and "common.seed=10000003" in told and "/tb/" not in told


@pytest.mark.skipif(IS_OLD, reason="hydra 1.0 composes in another order")
def test_a_yaml_is_composed_as_hydra_does() -> None:
    write_yaml("checkpoint: {save_dir: of_the_group}\ncommon: {seed: 5}\n", "experiment/small.yaml")
    write_yaml("seed: 9\n", "common/base.yaml")
    hydra = write_yaml("defaults: [{common: base}, {optimizer: adam}, _self_]\ncheckpoint: {save_dir: of_the_first}\n")
    assert "common.seed=9 " in commands(f"{hydra} criterion=cross_entropy")[0]
    assert "/of_the_first/peer0" in commands(hydra)[0]
    write_yaml("# @package _global_\ncheckpoint: {save_dir: of_the_group}\n", "experiment/small.yaml")
    assert "/of_the_group/peer0" in commands(f"{hydra} +experiment=small")[0]
    here = commands("fairseq-hydra-train checkpoint.save_dir='${hydra:runtime.cwd}/a-b/it=1'")[0]
    assert f"checkpoint.save_dir='{os.getcwd()}/a-b/it=1/peer0'" in here


@pytest.mark.parametrize(
    "words, second",
    [
        (
            "checkpoint.save_dir=X common.seed=3 task.data=/D --config-dir yaml",
            "task.data=/D checkpoint.save_dir={}/X/peer1 common.seed=10000003 common.log_format=json"
            " common.reset_logging=true {} --config-dir yaml",
        ),
        (
            "++checkpoint.save_dir='X' +common.log_format=json common.reset_logging=false hydra.run.dir=R",
            "+common.log_format=json common.reset_logging=false checkpoint.save_dir={}/X/peer1 common.seed=10000001"
            " hydra.run.dir=R/peer1",
        ),
    ],
)
def test_each_spelling_of_an_override(elsewhere: Path, words: str, second: str) -> None:
    write_yaml("hydra: {run: {dir: S}}")
    told = commands(f"fairseq-hydra-train {words}" + (" --config-name c" if "yaml" in words else ""))[1]
    expected = "fairseq-hydra-train " + second.format(elsewhere, "hydra.run.dir=S/peer1")
    assert told.replace(" --config-name c", "") == expected


def test_hydra_in_the_folder_of_the_launcher() -> None:
    """fairseq's own YAML says so; the folder is all peers', the log and the copy of the configuration are not."""
    told = commands("fairseq-hydra-train")[1]
    assert "hydra.output_subdir=.hydra/peer1 hydra.job.name=hydra_train.peer1" in told and "run.dir" not in told


def test_the_exchange_is_one_folder_in_every_working_directory(elsewhere: Path) -> None:
    peer = planned("fairseq-hydra-train", {"CODISTILL_DIR": "meet"}).peers[0]
    assert peer.environ["CODISTILL_DIR"] == f"{elsewhere}/meet"
    assert "CODISTILL_DIR" not in planned("fairseq-hydra-train", {"CODISTILL_DIR": "s3://b/meet"}).peers[0].environ


def test_hydra_itself_takes_what_a_peer_is_told(elsewhere: Path) -> None:
    """Hydra with fairseq's classes shows the configuration that it would train with."""
    hydra = write_yaml(
        "# @package _group_\ncommon: {tensorboard_logdir: tb, log_file: l.log}\ntask: {_name: translation, data: bin}\n"
        "criterion: {_name: cross_entropy}\ncheckpoint: {restore_file: base.pt, reset_meters: true}\n"
        "optimizer: {_name: adam}\nlr_scheduler: {_name: fixed}\nmodel: {_name: transformer}\n"
    )
    (elsewhere / "checkpoints/peer1").mkdir(parents=True)
    (elsewhere / "checkpoints/peer1/checkpoint_last.pt").touch()
    peer = planned(hydra).peers[1]
    program = [sys.executable, "-m", "fairseq_cli.hydra_train", *peer.command[1:], "--cfg", "all"]
    shown = subprocess.run(program, capture_output=True, text=True, cwd=elsewhere)
    assert shown.returncode == 0, shown.stderr[-2000:]
    for line in (
        f"save_dir: {elsewhere}/checkpoints/peer1",
        "restore_file: checkpoint_last.pt",
        "reset_meters: false",
        f"tensorboard_logdir: {elsewhere}/tb/peer1",
        f"log_file: {elsewhere}/l.peer1.log",
        "seed: 10000001",
        f"data: {elsewhere}/bin",
        "dir: outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}/peer1",
    ):
        assert line in shown.stdout, line


# ------------------------------------------------------------------------------------------------ said before anything starts


def test_the_name_of_the_plugin_is_where_it_is_installed(elsewhere: Path) -> None:
    ours = "fairseq-train D --criterion codistill_ce --save-dir X --user-dir"
    for name in ("fairseq_codistill", "./fairseq_codistill/"):
        assert f"--user-dir {PLUGIN}" in commands(f"{ours} {name}")[0]
        assert f"it is the installed plugin, {PLUGIN}" in notes(f"{ours} {name}")
    (elsewhere / "fairseq_codistill").mkdir()
    assert "--user-dir fairseq_codistill" in commands(f"{ours} fairseq_codistill")[0]
    assert "installed" not in notes(f"{ours} fairseq_codistill")


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--user-dir nowhere/fairseq_codistill", "--user-dir must be a folder, but there is no 'nowhere/fairseq_codistill'"),
        ("--criterion codistill_ce", "criterion codistill_ce needs --user-dir, but none is given"),
        (
            "--criterion=codistill_ce --user-dir fairseq_codistill --label-smoothing 0.1",
            "codistill_ce does not know --label-smoothing; smooth labels with --codistill-label-smoothing instead.",
        ),
        ("--save-dir file", "--save-dir must be a folder, or one that can be made, but is 'file'"),
        ("--save-dir file/x", "--save-dir must be a folder, or one that can be made, but is 'file/x'"),
        ("--codistill-peer 1", "--codistill-peer must not be in the command"),
    ],
)
def test_a_command_that_would_fail_is_refused_at_once(elsewhere: Path, words: str, sentence: str) -> None:
    (elsewhere / "file").write_text("no folder")
    began = time.monotonic()
    with pytest.raises(ValueError) as refused:
        planned(f"fairseq-train D {words}")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert time.monotonic() - began < 5, "fairseq takes half a minute to say it"


@pytest.mark.parametrize(
    "yaml, sentence",
    [
        ("criterion: {_name: codistill_ce}", "needs common.user_dir, but none is given"),
        (
            "criterion: {_name: codistill_ce, label_smoothing: 0.1}\ncommon: {user_dir: yaml}",
            "does not know criterion.label_smoothing; smooth labels with criterion.codistill_label_smoothing instead.",
        ),
        ("criterion: {codistill_peers: 3}", "criterion.codistill_peers must not be in the command"),
        ("common: {user_dir: nowhere}", "common.user_dir must be a folder, but there is no 'nowhere'"),
        ("common: {seed: many}", "common.seed must be a whole number"),
        ("checkpoint: {save_dir: '${hydra:run.dir}/x'}", "checkpoint.save_dir must be known before the peers start"),
        ("a: [", "--config-name must name a YAML that can be read, but"),
    ],
)
def test_a_yaml_that_would_fail_is_refused(yaml: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        planned(write_yaml(yaml))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_yaml_that_is_not_there() -> None:
    write_yaml("")
    with pytest.raises(ValueError, match="--config-dir must be a folder with YAML files, but 'none' is none."):
        planned("fairseq-hydra-train --config-dir none")
    with pytest.raises(ValueError, match="there is no d.yaml in .*yaml; did you forget --config-dir?"):
        planned("fairseq-hydra-train --config-dir yaml --config-name d")


@pytest.mark.parametrize(
    "words, peers, is_said",
    [
        ("fairseq-train D", 2, True),
        ("fairseq-train D --criterion label_smoothed_cross_entropy", 3, True),
        ("fairseq-train D --criterion cross_entropy", 1, False),
        ("fairseq-train D --user-dir fairseq_codistill --criterion codistill_ce", 2, False),
        ("fairseq-train D --user-dir . --criterion built_on_ours", 2, False),
        ("fairseq-hydra-train criterion=cross_entropy", 2, True),
        ("fairseq-hydra-train criterion._name=codistill_ce common.user_dir=fairseq_codistill", 2, False),
        ("python train.py", 2, False),
    ],
)
def test_runs_that_do_not_teach_each_other(words: str, peers: int, is_said: bool) -> None:
    assert (f"these are {peers} unrelated runs, for criterion " in notes(words, peers=peers)) == is_said


@pytest.mark.parametrize(
    "gpus, peers, asked, expected",
    [
        (8, 3, None, "2 of 8 GPUs stay idle: 3 peers get 2 each."),
        (3, 2, None, "1 of 3 GPUs stays idle: 2 peers get 1 each."),
        (8, 2, None, ""),
        (8, 3, 1, ""),  # as asked for
        (2, 3, None, "3 peers share 2 GPUs."),
    ],
)
def test_gpus_that_nobody_uses(monkeypatch, gpus: int, peers: int, asked, expected: str) -> None:
    monkeypatch.setattr(launch_plan, "visible_gpus", lambda: [str(i) for i in range(gpus)])
    options = argparse.Namespace(peers=peers, gpus_per_peer=asked, max_restarts=0, grace=1, log_dir=None, command=["env"])
    assert [note for note in launch_plan.make_plan(options, {}).notes if "GPU" in note] == ([expected] if expected else [])


def test_a_process_that_reads_a_hydra_config_can_go_on_with_hydra(tmp_path):
    """Its plugins register themselves once: not in the registry that is borrowed to read a YAML, and given back."""
    (tmp_path / "tiny.yaml").write_text("model: {_name: x}\n")
    code = f"""
        from fairseq_codistill.launch.hydra import _composed_by_hydra
        assert _composed_by_hydra("tiny", [{str(tmp_path)!r}], []).model._name == "x"
        try:
            from hydra import compose, initialize_config_dir
        except ImportError:
            from hydra.experimental import compose, initialize_config_dir
        with initialize_config_dir(config_dir={str(tmp_path)!r}):
            assert compose("tiny", return_hydra_config=True).hydra.sweeper is not None
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)
