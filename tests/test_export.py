"""codistill-launch export: which model it takes, what it leaves out, and that fairseq uses the file without the plugin."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq_runs import CODISTILL, PLUGIN, Job, preprocess, rows, train_peers, write_corpus

from fairseq_codistill import checkpoints, compat
from fairseq_codistill.launch import export, main


def write_checkpoint(path: Path, best=None, update=100, metric="loss", maximise=False, model=None, **more) -> Path:
    """A checkpoint with what fairseq-fixed writes, and weights of our own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cfg = {
        "common": {"user_dir": str(PLUGIN)},
        "checkpoint": {"best_checkpoint_metric": metric, "maximize_best_checkpoint_metric": maximise},
        "criterion": {"_name": "codistill_ce", "sentence_avg": False, "codistill_loss": "ce"},
        "model": argparse.Namespace(arch="transformer", dims=[1, 2]),
        "task": {"_name": "translation"},
    }
    state = {
        "args": None, "cfg": cfg, "criterion": None, "task_state": {},
        "model": model or {"w": torch.tensor([float(update)]), "version": torch.tensor([3])},
        "optimizer_history": [{"criterion_name": "CodistillCriterion", "optimizer_name": "FairseqAdam",
                               "lr_scheduler_state": {"lr": 0.1}, "num_updates": update}],
        "extra_state": {"train_iterator": {"epoch": 2}, "val_loss": best, "best": best, "metrics": {"default": []},
                        "ema": {"w": torch.zeros(9)}},
        "last_optimizer_state": {"state": {"exp_avg": torch.zeros(1000)}},
    }  # fmt: skip
    torch.save({**state, **more}, path)
    return path


@pytest.fixture
def run(tmp_path):
    """Two peers; the second is the better one."""
    for peer, best in ((0, 4.0), (1, 3.5)):
        write_checkpoint(tmp_path / f"run/peer{peer}/checkpoint_best.pt", best, update=100 + peer)
        write_checkpoint(tmp_path / f"run/peer{peer}/checkpoint_last.pt", best, update=200 + peer)
    return tmp_path / "run"


def exported(capsys, run, *options):
    """Exit status, the state in the file, and what was printed."""
    out = run.parent / "out/model.pt"
    status = main.main(["export", str(run), "--out", str(out), *options])
    told = capsys.readouterr()
    return status, torch.load(out, weights_only=True) if status == 0 else None, told.out + told.err


def test_the_best_peer_is_the_one_with_the_lowest_loss(run, capsys):
    status, state, told = exported(capsys, run)
    assert status == 0 and state["model"]["w"].item() == 101 and state["exported_from"] == ["checkpoint_best.pt"]
    assert "checkpoint_best.pt of peer1 (best loss 3.5), update 101" in told
    assert [path.name for path in (run.parent / "out").iterdir()] == ["model.pt"], "no temporary file is left"


def test_a_metric_that_is_maximised(tmp_path, capsys):
    for peer, bleu in ((0, 20.0), (1, 30.0), (2, 25.0), (3, float("nan"))):
        write_checkpoint(tmp_path / f"run/peer{peer}/checkpoint_best.pt", bleu, update=peer, metric="bleu", maximise=True)
    assert exported(capsys, tmp_path / "run")[1]["model"]["w"].item() == 1


def test_another_peer_and_the_last_checkpoint(run, capsys):
    assert exported(capsys, run, "--peer", "0")[1]["model"]["w"].item() == 100
    assert exported(capsys, run, "--checkpoint", "last", "--force")[1]["model"]["w"].item() == 201


def test_one_training_without_peers_is_a_run(tmp_path, capsys):
    write_checkpoint(tmp_path / "run/checkpoint_best.pt", 3.0, update=7)
    status, state, told = exported(capsys, tmp_path / "run")
    assert status == 0 and state["model"]["w"].item() == 7 and "checkpoint_best.pt (best loss 3), update 7" in told


def test_what_only_training_needs_is_left_out(run, capsys):
    state = exported(capsys, run)[1]
    assert state["last_optimizer_state"] is None and "metrics" not in state["extra_state"] and "ema" not in state["extra_state"]
    assert state["optimizer_history"][-1]["lr_scheduler_state"] == {} and state["optimizer_history"][-1]["num_updates"] == 101
    assert state["cfg"]["criterion"] == {"_name": "cross_entropy", "sentence_avg": False}
    assert state["cfg"]["model"] == {"arch": "transformer", "dims": [1, 2]}, "no Namespace, which torch refuses"
    assert state["cfg"]["common"]["user_dir"] is None
    assert (run.parent / "out/model.pt").stat().st_size < (run / "peer1/checkpoint_best.pt").stat().st_size - 4000


def test_the_average_is_of_the_best_peers_last_checkpoints(run, capsys):
    for peer in (0, 1):
        for update in (90, 100, 110):  # by number, not by name
            tied = torch.tensor([1.0 + update + peer, 2.0])
            half = torch.tensor([2048.0 if update == 100 else 1.0]).half()
            model = {"a": tied, "b": tied, "h": half, "n": torch.tensor([update])}
            write_checkpoint(run / f"peer{peer}/checkpoint_1_{update}.pt", 9.0, update, model=model)
    status, state, told = exported(capsys, run, "--average", "2")
    assert status == 0 and state["exported_from"] == ["checkpoint_1_100.pt", "checkpoint_1_110.pt"]
    assert torch.equal(state["model"]["a"], torch.tensor([107.0, 2.0])) and state["model"]["a"].dtype == torch.float32
    assert state["model"]["a"].data_ptr() == state["model"]["b"].data_ptr(), "tied embeddings are stored once"
    assert state["model"]["h"].dtype == torch.float32 and state["model"]["h"].item() == 1024.5, "not rounded to a half"
    assert state["model"]["n"].item() == 110
    assert "mean of checkpoint_1_100.pt to checkpoint_1_110.pt of peer1" in told


def test_checkpoints_of_epochs_are_averaged_where_there_are_no_others(run, capsys):
    for epoch in (9, 10, 11):
        write_checkpoint(run / f"peer1/checkpoint{epoch}.pt", update=epoch)
    assert exported(capsys, run, "--average", "2")[1]["model"]["w"].item() == 10.5


def test_nothing_is_replaced_without_force(run, capsys):
    assert exported(capsys, run)[0] == 0
    status, _, told = exported(capsys, run, "--peer", "0")
    assert status == 2 and "does; give --force to replace it" in told
    assert torch.load(run.parent / "out/model.pt", weights_only=True)["model"]["w"].item() == 101
    assert exported(capsys, run, "--peer", "0", "--force")[1]["model"]["w"].item() == 100


def test_a_write_that_fails_leaves_the_old_file(run, capsys, monkeypatch):
    assert exported(capsys, run)[0] == 0

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    status, _, told = exported(capsys, run, "--force")
    assert status == 2 and told.count("\n") == 1 and "No space left on device" in told
    assert [path.name for path in (run.parent / "out").iterdir()] == ["model.pt"]
    assert torch.load(run.parent / "out/model.pt", weights_only=True)["model"]["w"].item() == 101


def test_a_file_made_meanwhile_is_not_replaced(tmp_path):
    (tmp_path / "part").write_text("new")
    (tmp_path / "out").write_text("theirs")
    with pytest.raises(FileExistsError):
        export._rename_to_new(tmp_path / "part", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "theirs"


def test_a_broken_peer_is_told_and_costs_no_other(run, capsys):
    (run / "peer1/checkpoint_best.pt").write_bytes((run / "peer1/checkpoint_best.pt").read_bytes()[:500])
    status, state, told = exported(capsys, run)
    assert status == 0 and state["model"]["w"].item() == 100
    assert "WARNING: not considered: " in told and "peer1/checkpoint_best.pt must be a whole checkpoint" in told


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--peer", "2"], "--peer must be a peer of the run, but is 2, and the run has peer0, peer1."),
        (["--average", "2"], "--average must be at most 0, the checkpoint_EPOCH_UPDATE.pt or checkpointEPOCH.pt that"),
        (["--average", "0"], "--average must be at least 1, but is 0."),
        (["--average", "2", "--checkpoint", "last"], "must not be given with --average"),
        (["--checkpoint", "first"], "see codistill-launch export --help"),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, options, sentence):
    status, _, told = exported(capsys, run, *options)
    assert status == 2 and told.count("\n") == 1 and told.startswith("codistill-launch export: ") and sentence in told


def test_bad_folders_and_files_are_one_sentence(run, capsys, tmp_path):
    (tmp_path / "method").mkdir()
    run.rename(tmp_path / "method/seed1")
    assert "did you forget a folder between, such as seed1" in exported(capsys, tmp_path / "method")[2]
    assert "is no folder" in exported(capsys, tmp_path / "nowhere")[2]
    seed = tmp_path / "method/seed1"
    assert main.main(["export", str(seed), "--out", str(seed / "peer0/checkpoint_last.pt"), "--force"]) == 2
    assert "--out must be no checkpoint of the run itself" in capsys.readouterr().err
    assert main.main(["export", str(seed), "--out", str(seed)]) == 2
    assert "is a folder" in capsys.readouterr().err
    torch.save({"w": torch.zeros(1)}, seed / "peer1/checkpoint_best.pt")
    assert main.main(["export", str(seed), "--out", str(tmp_path / "x.pt"), "--peer", "1"]) == 2
    assert "holds no weights under 'model'" in capsys.readouterr().err


def test_what_needs_the_plugin_is_said(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "run/checkpoint_best.pt", 3.0)
    state = torch.load(path, weights_only=False)
    state["cfg"]["task"]["_name"] = "image_classification"
    torch.save(state, path)
    assert "fairseq needs --user-dir for it, since its task is image_classification" in exported(capsys, tmp_path / "run")[2]


def test_the_help_needs_neither_torch_nor_fairseq():
    code = "import sys; from fairseq_codistill.launch import main; main.main(['export', 'nowhere']); " \
           "assert not {'torch', 'fairseq'} & set(sys.modules)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stderr, done.stderr


# --- with fairseq itself ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, and a codistilled run of two peers on it."""
    folder = tmp_path_factory.mktemp("export")
    write_corpus(folder / "raw")
    data = preprocess(folder / "raw", folder / "bin", "--source-lang", "a", "--target-lang", "b")
    train_peers(data, folder / "run", CODISTILL, "--max-update 24 --save-interval-updates 8 --keep-interval-updates 3")
    return data, folder / "run"


def hypotheses(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("H-")]


def best_loss(path: Path) -> float:
    return checkpoints.standing(checkpoints.load(path)).best


def generate(data: Path, path: Path, *options: str) -> Job:
    words = ["fairseq-generate", str(data), "--path", str(path), "--cpu", "--required-batch-size-multiple", "1"]
    return Job([*words, "--num-workers", "0", "--max-len-b", "20", *options])


def test_fairseq_generates_and_validates_without_the_plugin(trained, tmp_path):
    data, run = trained
    best = min((run / f"peer{i}/checkpoint_best.pt" for i in (0, 1)), key=best_loss)
    export.export(run, tmp_path / "model.pt")
    export.export(run, tmp_path / "mean.pt", average=2)
    jobs = [generate(data, tmp_path / "model.pt"), generate(data, best, "--user-dir", str(PLUGIN))]
    jobs += [generate(data, tmp_path / "mean.pt"), generate(data, best)]
    logs = [job.finish() for job in jobs[:3]]
    assert len(hypotheses(logs[0])) == 30 and hypotheses(logs[0]) == hypotheses(logs[1]), "the same model"
    assert len(hypotheses(logs[2])) == 30
    assert (jobs[3].status() == 0) is not compat.loads_safely(), "what the export is for: fairseq alone refuses the checkpoint"
    words = ["fairseq-validate", str(data), "--task", "translation", "--path", str(tmp_path / "model.pt"), "--cpu"]
    words += ["--log-format", "json", "--required-batch-size-multiple", "1", "--num-workers", "0", "--max-tokens", "300"]
    validated = Job(words).finish()
    loss = rows(validated, "valid")[-1]["valid_loss"]
    assert loss == pytest.approx(best_loss(best), abs=0.002)
