"""recipes/slurm on a real Slurm of one node, which the tests start for themselves: peers, groups, preemption, time limits."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Sequence

import pytest
from fairseq_runs import MODEL, PLUGIN, ROOT, TRAINING, checkpoint, column, free_port

SCRIPTS = ROOT / "recipes" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
REASON = f"{', '.join(MISSING)} not installed (on Debian: slurm-wlm and munge)" if MISSING else "slurmd must be started by root"
needs_slurm = pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=REASON)
DEADLINE = 150  # seconds; a busy machine imports fairseq slowly
UPDATES = 100

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
AuthType=auth/munge
# How long a job that is queued again waits before it starts: 120 s where this does not say otherwise.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/node
SlurmctldPidFile={folder}/controller/pid
SlurmdPidFile={folder}/node/pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
# Four ranks, on a machine that may have fewer cores.
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=4
PartitionName=all Nodes={host} Default=YES State=UP
"""


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.1)


class Slurm:
    """A cluster of this machine alone, in a folder of its own."""

    def __init__(self, folder: Path, commands: Path) -> None:
        """`commands`: where a job finds fairseq's before all others."""
        self.folder = folder
        self.daemons: List[subprocess.Popen] = []
        for name in ("munge", "controller", "node"):
            (folder / name).mkdir(mode=0o755, parents=True)
        (folder / "munge/key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge/key").chmod(0o400)
        host, ports = socket.gethostname().partition(".")[0], (free_port(), free_port())
        text = CONFIGURATION.format(folder=folder, host=host, controller=ports[0], node=ports[1])
        (folder / "slurm.conf").write_text(text)
        path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CODISTILL_"))}
        self.environment = {**clean, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        at = self.folder / "munge"
        options = [f"--{name}={at / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={at / 'key'}", *options)
        until((at / "socket").exists, "munge's socket")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T", check=False), "an idle node")

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        until(lambda: not self.run("squeue", "-h", check=False), "the end of all jobs")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            daemon.wait(DEADLINE)

    def _daemon(self, *words: str) -> None:
        with open(self.folder / f"{words[0]}.log", "wb") as log:
            self.daemons.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log, cwd=self.folder))

    def run(self, *words: object, check: bool = True, **more) -> str:
        done = subprocess.run(list(map(str, words)), env=self.environment, capture_output=True, text=True, **more)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, cwd: Path, *words: object) -> str:
        """The number of the array job."""
        return self.run("bash", SCRIPTS / "submit.sh", *words, cwd=cwd)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """As ``until``, but fails at once when no job is left that could do it."""
        until(lambda: condition() or not self.run("squeue", "-h"), what)
        assert condition(), f"{what} did not happen, and the jobs have ended"

    def state(self, task: str) -> Dict[str, str]:
        """What ``scontrol`` says of one task of an array."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", task)))


@pytest.fixture(scope="module")
def slurm(warm, tmp_path_factory):
    cluster = Slurm(tmp_path_factory.mktemp("slurm"), warm)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def text_of(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


def reached(log: Path, update: int) -> Callable[[], bool]:
    return lambda: any(done >= update for done in column(text_of(log), "train_inner", "num_updates"))


@needs_slurm
def test_two_groups_codistill_through_preemption_and_time_limit(slurm, data, tmp_path):
    options = "--cpu --distributed-backend gloo --ddp-backend legacy_ddp --disable-validation --seed 7"
    options += f" --save-interval-updates 10 --keep-interval-updates 2 --max-update {UPDATES}"
    # Lockstep makes the test independent of time: a peer that is stopped is waited for.
    options += " --criterion codistill_ce --codistill-interval 10 --codistill-loss ce --codistill-sync --codistill-wait 200"
    # It begins from here, and would again at every start.
    options += " --restore-file not_there.pt --reset-optimizer --reset-meters --reset-dataloader"
    words = f"--peers 2 --gpus-per-peer 0 --ntasks 2 -- fairseq-train {data} --user-dir {PLUGIN} --save-dir run"
    job = slurm.submit(tmp_path, *words.split(), *MODEL.split(), *TRAINING.split(), *options.split())
    logs = [tmp_path / f"run/peer{i}/train.log" for i in range(2)]

    slurm.wait(reached(logs[1], 20), "update 20 of peer 1")
    slurm.run("scontrol", "requeue", f"{job}_1")  # as a preemption does
    slurm.wait(lambda: "Loaded checkpoint" in text_of(logs[1]), "the second start of peer 1")
    # As --signal does before the time limit; in lockstep peer 0 cannot have ended while peer 1 was away.
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    until(lambda: not slurm.run("squeue", "-h"), "the end of both peers")

    for peer, log in enumerate(map(text_of, logs)):
        output = text_of(tmp_path / f"codistill-{job}_{peer}.out")
        starts = re.findall(r"peer (\d) of 2, job \d+, start (\d), 2 rank", output)
        assert starts == [(str(peer), "1"), (str(peer), "2")], output
        assert ("out of time, queued again" in output) == (peer == 0)
        # It went on from where it was, with the other's weights, to the last update; once, on two ranks.
        resumed = int(re.search(r"Loaded checkpoint run/peer\d/checkpoint_last.pt \(epoch \d+ @ (\d+) updates\)", log)[1])
        assert 0 < resumed < UPDATES
        updates = column(log, "train_inner", "num_updates")
        assert updates[-1] == UPDATES and updates.count(UPDATES) == 1
        assert f"learning from peer {1 - peer} as of its update {UPDATES - 10}" in log
        assert set(re.findall(r"'distributed_world_size': (\d+)", log)) == {"2"}
        assert set(re.findall(r"'seed': (\d+)", log)) == {str(7 + 10_000_000 * peer)}
        state = checkpoint(tmp_path / f"run/peer{peer}/checkpoint_last.pt")
        assert state["optimizer_history"][-1]["num_updates"] == UPDATES


def fake_training(folder: Path, script: str) -> Path:
    program = folder / "fairseq-train"
    program.write_text(f"#!/bin/bash\n{script}\n")
    program.chmod(0o755)
    return program


@needs_slurm
def test_a_cancelled_job_stays_cancelled_and_its_peers_hear_of_it(slurm, tmp_path):
    # What a rank does when it hears SIGTERM is done before it is killed.
    program = fake_training(tmp_path, "trap 'echo said goodbye; exit 143' TERM\necho started\nsleep 1000 & wait $!")
    job = slurm.submit(tmp_path, "--peers=2", "--gpus-per-peer=0", "--", program, "--save-dir", "run")
    logs = [tmp_path / f"run/peer{i}/train.log" for i in range(2)]
    for log in logs:
        slurm.wait(lambda log=log: "started" in text_of(log), f"the start of {log}")
    slurm.run("scancel", job)
    until(lambda: not slurm.run("squeue", "-h"), "the end of both peers")
    assert [log.read_text().count("said goodbye") for log in logs] == [1, 1]
    for peer in range(2):
        assert slurm.state(f"{job}_{peer}")["JobState"] == "CANCELLED"
        assert text_of(tmp_path / f"codistill-{job}_{peer}.out").count("start ") == 1


@needs_slurm
def test_a_peer_that_fails_is_not_queued_again(slurm, tmp_path):
    program = fake_training(tmp_path, '[ "$CODISTILL_PEER" = 0 ] || exit 3; echo "$CODISTILL_PEERS $CODISTILL_DIR $@"')
    given = "--save-dir=run --seed 4 --user-dir fairseq_codistill --tensorboard-logdir tb"
    job = slurm.submit(tmp_path, "--peers", "2", "--gpus-per-peer", "0", "--", program, *given.split())
    until(lambda: not slurm.run("squeue", "-h"), "the end of both peers")
    states = [slurm.state(f"{job}_{peer}") for peer in range(2)]
    assert [state["JobState"] for state in states] == ["COMPLETED", "FAILED"] and states[1]["ExitCode"] == "3:0"
    told = text_of(tmp_path / "run/peer0/train.log").split()
    assert told[:2] == ["2", f"{tmp_path}/run/exchange"]
    assert " ".join(told[2:]) == (
        f"--user-dir {PLUGIN} --save-dir run/peer0 --seed 4 --log-format json --tensorboard-logdir tb/peer0"
        " --distributed-world-size 1"
    )
    output = text_of(tmp_path / f"codistill-{job}_0.out")
    assert "note: --tensorboard-logdir tb would be shared: peers get tb/peer0, tb/peer1" in output
    assert "note: these are 2 unrelated runs" in output


# --- what needs no Slurm ----------------------------------------------------------------------------------------------


def submitted(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """submit.sh with an sbatch that tells what it was given."""
    return told_sbatch(tmp_path, f"bash {SCRIPTS / 'submit.sh'} {shlex.join(words)}")


def told_sbatch(tmp_path: Path, line: str, **variables: str) -> subprocess.CompletedProcess:
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir(exist_ok=True)
    sbatch.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    sbatch.chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, cwd=ROOT)


TRAIN = ("--", "fairseq-train", "DATA")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--peers 2", "--nodes=1 --ntasks-per-node=1 --gpus-per-node=1"),
        ("--peers 2 --gpus-per-peer 4", "--nodes=1 --ntasks-per-node=4 --gpus-per-node=4"),
        ("--peers 4 --gpus-per-peer=16 --gpus-per-node=8", "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8"),
        ("--peers 2 --gpus-per-peer 4 --gpus-per-node 8", "--nodes=1 --ntasks-per-node=4 --gpus-per-node=4"),
    ],
)
def test_nodes_and_tasks_of_a_peer(words, expected, tmp_path):
    told = submitted(tmp_path, *words.split(), "--partition=gpu", *TRAIN).stdout.split()
    assert told[:2] == ["--parsable", f"--array=0-{int(words.split()[1]) - 1}"]
    assert " ".join(told).endswith(f"--partition=gpu {expected} {SCRIPTS / 'peer.sbatch'} fairseq-train DATA")


@pytest.mark.parametrize("method, tasks, nodes, update_freq", [("codistill", 2, 1, 8), ("all_reduce", 1, 2, 8)])
def test_a_recipe_goes_to_slurm_as_its_readme_says(method, tasks, nodes, update_freq, tmp_path):
    variables = dict(METHOD=method, DATA="data", OUT="out", GPUS="16", DRY_RUN="1")
    launch = "recipes/slurm/submit.sh --gpus-per-node=8 --partition=gpu"
    line = "bash recipes/wmt16_en_de/train.sh | bash"
    told = told_sbatch(tmp_path, line, CODISTILL_LAUNCH=launch, **variables).stdout.split("\n")
    assert f"--array=0-{tasks - 1}" in told and f"--nodes={nodes}" in told and "--ntasks-per-node=8" in told
    assert told[told.index("--update-freq") + 1] == str(update_freq) and told[told.index("--adam-betas") + 1] == "(0.9, 0.98)"


@pytest.mark.parametrize(
    "words, said",
    [
        (("--peers", "two", *TRAIN), "--peers must be a whole number of at least 1, but is two"),
        (TRAIN, "--peers must be a whole number of at least 1, but is not given"),
        (("--peers", "2"), "a fairseq-train command must follow --"),
        (("--peers", "2", "--gpus-per-peer", "12", "--gpus-per-node", "8", *TRAIN), "multiple of --gpus-per-node 8, but is 12"),
        (("--peers", "2", "--gpus-per-node", "0", *TRAIN), "--gpus-per-node must be"),
    ],
)
def test_submit_refuses(words: Sequence[str], said: str, tmp_path):
    result = submitted(tmp_path, *words)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr, result.stderr


@pytest.mark.parametrize(
    "variables, words, said",
    [
        ({}, ["fairseq-train"], "must be a task of an array job"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, [], "a fairseq-train command must follow"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, ["fairseq-hydra-train"], "must be fairseq-train, but is fairseq-hydra-train"),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1"}, ["fairseq-train"], "--array must begin with 0"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, ["fairseq-train", "--seed", "x"], "--seed must be a whole number"),
        (
            {"SLURM_ARRAY_TASK_ID": "0"},
            ["fairseq-train", "--user-dir", "x"],
            "--user-dir must be a folder, but there is no 'x'",
        ),
        (
            {"SLURM_ARRAY_TASK_ID": "0"},
            ["fairseq-train", "--criterion=codistill_ce"],
            "codistill_ce needs --user-dir, but none",
        ),
    ],
)
def test_a_peer_refuses(variables: Dict[str, str], words: List[str], said: str, tmp_path):
    result = started_peer(tmp_path, words, SLURM_ARRAY_TASK_COUNT="2", **variables)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and said in result.stderr, result.stderr


@pytest.mark.parametrize("case, status", [("whole", 0), ("torn", 0), ("no room", 1)])
def test_a_peer_does_not_begin_anew_because_its_checkpoint_is_torn(case: str, status: int, tmp_path):
    folder, programs = tmp_path / "run/peer0", tmp_path / "bin"
    folder.mkdir(parents=True)
    programs.mkdir()
    fake_training(programs, "touch ../begun").rename(programs / "srun")
    (folder / "checkpoint_1_5.pt").write_bytes(b"PK\5\6" + bytes(18))  # a zip without files
    (folder / "checkpoint_last.pt").write_bytes(b"PK\5\6" + bytes(18 if case == "whole" else 8))
    if case == "no room":
        (folder / "checkpoint_last.pt.mended").mkdir()  # the copy cannot be written
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment.update(SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_COUNT="1", SLURM_JOB_ID="1", SLURM_JOB_NODELIST="here")
    (tmp_path / "work").mkdir()
    command = ["bash", str(SCRIPTS / "peer.sbatch"), "fairseq-train", "--save-dir", str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path / "work")
    assert result.returncode == status and (tmp_path / "begun").exists() == (status == 0), result.stderr
    assert ("cannot be put in its place" in result.stderr) == (status == 1)
    assert (folder / "checkpoint_last.pt.torn").exists() == (case == "torn")


def started_peer(cwd: Path, words: Sequence[str], **variables: str) -> subprocess.CompletedProcess:
    """peer.sbatch without Slurm: it is what it refuses, or gives to `srun`."""
    path = os.pathsep.join([str(cwd), str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CODISTILL_", "WANDB_"))}
    command = ["bash", str(SCRIPTS / "peer.sbatch"), *words]
    return subprocess.run(command, env={**clean, "PATH": path, **variables}, capture_output=True, text=True, cwd=cwd)


def test_a_peer_that_has_begun_goes_on_and_has_its_own_of_everything(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$CODISTILL_DIR" "$WANDB_NAME" "${@:8}"\n')
    srun.chmod(0o755)
    variables = {name: "1" for name in ("SLURM_ARRAY_TASK_ID", "SLURM_JOB_ID", "SLURM_NTASKS")}
    variables = {**variables, "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_JOB_NODELIST": "here", "WANDB_NAME": "a try"}
    words = "fairseq-train D --save-dir X --restore-file base.pt --reset-optimizer --log-file l --lr 1".split()
    first, second = "--restore-file base.pt --reset-optimizer --lr 1", "--lr 1"
    for expected in (first, second, second):
        done = started_peer(tmp_path, words, **variables)
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()[1:]
        assert told[:2] == [f"{tmp_path}/X/exchange", "a try-peer1"]
        assert " ".join(told[2:]) == (
            f"fairseq-train D {expected} --save-dir X/peer1 --seed 10000001 --log-format json --log-file l.peer1"
            " --distributed-world-size 1"
        )
        (tmp_path / "X/peer1/checkpoint_last.pt").write_bytes(b"\x80\x02")
    assert "for a peer's first start alone" in done.stderr and "as peer1 does now" in done.stderr


def test_a_peer_needs_the_plugin_for_its_commands(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\necho No module named fairseq_codistill >&2; exit 1\n")
    python.chmod(0o755)
    done = started_peer(tmp_path, ["fairseq-train"], SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_COUNT="1")
    assert done.returncode == 2 and "did you forget to activate its environment?" in done.stderr
