"""The rooms of recipes/translation by themselves: averages, what fairseq printed, prepared data, scores, the budget."""

from __future__ import annotations

import json
import os
import pickle
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from fairseq_runs import ROOT

sys.path.insert(0, str(ROOT / "recipes" / "translation"))
import average  # noqa: E402
import budget  # noqa: E402
import generated  # noqa: E402
import prepared  # noqa: E402
import scores  # noqa: E402

# --- average.py -------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, epoch: int, update: int, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"checkpoint_{epoch}_{update}.pt"
    torch.save({"args": Namespace(arch="x"), "model": tensors, "last_optimizer_state": {"a": 1}, "update": update}, path)
    return path


def test_the_average_is_the_mean_in_the_weights_own_precision(tmp_path):
    halves = [torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor([6.0, 0.0])]
    for number, tensor in enumerate(halves):
        update = (number + 9) * 10  # 90, 100, 110: by number, not by name
        write_checkpoint(tmp_path / "peer0", 1, update, w=tensor, h=tensor.half(), version=torch.tensor([number]))
    path = average.write_average(tmp_path / "peer0", 2)
    state = torch.load(path, weights_only=True)
    assert path.name == "checkpoint_average2.pt" and state["averaged_from"] == ["checkpoint_1_100.pt", "checkpoint_1_110.pt"]
    assert torch.equal(state["model"]["w"], torch.tensor([4.0, 2.0])) and state["model"]["w"].dtype == torch.float32
    assert torch.equal(state["model"]["h"], torch.tensor([4.0, 2.0]).half()) and state["model"]["h"].dtype == torch.float16
    assert torch.equal(state["model"]["version"], torch.tensor([2])), "no number to average: the newest's"
    assert state["update"] == 110 and state["args"].arch == "x" and state["last_optimizer_state"] is None


def test_many_halves_are_summed_without_rounding(tmp_path):
    # In half precision 2048 + 1 is 2048: a running sum of halves would stop growing.
    for number in range(8):
        write_checkpoint(tmp_path / "peer0", 1, number, w=torch.tensor([2048.0 if number == 0 else 1.0]).half())
    state = torch.load(average.write_average(tmp_path / "peer0", 8), weights_only=True)
    assert state["model"]["w"].item() == torch.tensor(2055 / 8).half().item()


def test_an_average_is_made_again_only_after_newer_checkpoints(tmp_path):
    for update in (10, 20):
        write_checkpoint(tmp_path / "peer0", 1, update, w=torch.tensor([float(update)]))
    first = average.write_average(tmp_path / "peer0", 2).stat().st_mtime_ns
    assert average.write_average(tmp_path / "peer0", 2).stat().st_mtime_ns == first
    newer = write_checkpoint(tmp_path / "peer0", 2, 30, w=torch.tensor([90.0]))
    os.utime(newer, ns=(first + 1, first + 1))
    assert torch.load(average.write_average(tmp_path / "peer0", 2), weights_only=True)["model"]["w"].item() == 55


def test_averages_that_cannot_be(tmp_path, capsys):
    write_checkpoint(tmp_path / "peer0", 1, 10, w=torch.zeros(2))
    with pytest.raises(ValueError, match=r"AVERAGE must be at most 1, .*peer0 has, but is 2.*KEEP"):
        average.last_checkpoints(tmp_path / "peer0", 2)
    write_checkpoint(tmp_path / "peer0", 1, 20, w=torch.zeros(3))
    assert average.main(["--last", "2", str(tmp_path / "peer0")]) == 2
    assert capsys.readouterr().err.startswith("average.py: the checkpoints must be of one model, but ")
    assert average.main(["--last", "0", str(tmp_path / "peer0")]) == 2


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed",)


def test_loading_runs_no_code(tmp_path, capfd):
    (tmp_path / "peer0").mkdir()
    torch.save({"model": {"w": torch.zeros(1)}, "evil": Evil()}, tmp_path / "peer0/checkpoint_1_1.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only"):
        average.write_average(tmp_path / "peer0", 1)
    assert "executed" not in capfd.readouterr().out and not (tmp_path / "peer0/checkpoint_average1.pt").exists()


# --- generated.py -----------------------------------------------------------------------------------------------------

LOG = """2026 | INFO | loading
S-10\tein Satz
T-10\tthe tenth
H-10\t-0.5\tten
P-10\t-1.0000 -2.0000
S-2\tnoch einer
T-2\tthe second
H-2\t-0.25\t
P-2\t-0.5000 -0.5000 -2.0000
"""


def test_generated_text_comes_back_in_order(tmp_path):
    log = tmp_path / "generate.log"
    log.write_text(LOG, encoding="utf-8")
    assert generated.sentences(log, "H") == ["", "ten"] and generated.sentences(log, "T") == ["the second", "the tenth"]
    assert generated.bits_per_token(log) == (6.0 / 5, 5)


def test_a_line_ends_at_a_newline_alone(tmp_path):
    log = tmp_path / "generate.log"
    log.write_bytes("H-0\t-1\ta\u2028b\u0085c\rd\n".encode())
    assert generated.sentences(log, "H") == ["a\u2028b\u0085c\rd"]


def test_detokenise():
    lines = ["that &apos;s it , she said : &quot; no &quot; .", "", "a well @-@ known thing ( here )"]
    assert generated.detokenise(lines, "en") == ['that\'s it, she said: "no".', "", "a well-known thing (here)"]


# --- prepared.py ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("bin/dict.en.txt", "raw/valid.en", "raw/talks.en", "raw/news.en"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a 1\n")
    manifest = dict(source_language="de", target_language="en", subwords="bpe", tokenizer="moses", lowercase=True)
    manifest.update(test_sets={"test": "talks", "test1": "news"}, valid_sets={"valid": "valid"})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def test_what_the_manifest_says(folder):
    data = prepared.read({"DATA": str(folder)})
    assert (data.source, data.target, data.subwords, data.is_tokenised, data.is_lowercase) == ("de", "en", "bpe", True, True)
    assert data.test_sets == (("talks", "test"), ("news", "test1"))
    assert data.nll_sets == (("valid", "valid"), ("talks", "test"))


def test_variables_stand_above_the_manifest(folder):
    own = dict(SUBWORDS="sentencepiece", TOKENIZER="none", LOWERCASE="0", TEST_SETS="news:test1", NLL_SETS="")
    data = prepared.read({"DATA": str(folder), **own})
    assert (data.subwords, data.is_tokenised, data.is_lowercase) == ("sentencepiece", False, False)
    assert data.test_sets == (("news", "test1"),) and data.nll_sets == ()


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"DATA": ""}, "DATA must be a folder made by data_prep/prepare.py, but is not set"),
        ({"DATA": "/nowhere", "PREPARED_BY": "x.py"}, "made by x.py, but is /nowhere"),
        ({"SUBWORDS": "morphs"}, "SUBWORDS must be bpe or sentencepiece, but is morphs"),
        ({"TEST_SETS": "talks"}, "TEST_SETS must be NAME:SUBSET .* but has talks"),
        ({"NLL_SETS": "dev:valid"}, "DATA must hold the reference of every set, but .*dev.en is not there"),
    ],
)
def test_unfit_data_is_refused(variables, said, folder):
    with pytest.raises(ValueError, match=said):
        prepared.read({"DATA": str(folder), **variables})


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_manifest_is_refused(text, folder):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="manifest.json must be .*prepare the data again"):
        prepared.read({"DATA": str(folder)})


# --- scores.py --------------------------------------------------------------------------------------------------------


def test_scores_side_by_side(tmp_path):
    for peer, (bleu, nll) in enumerate([(20.0, 2.0), (23.0, 4.0)]):
        (tmp_path / f"peer{peer}").mkdir()
        score = {"name": "BLEU", "score": bleu, "signature": "tok:13a"}
        (tmp_path / f"peer{peer}/test.sacrebleu.json").write_text(json.dumps(score))
        (tmp_path / f"peer{peer}/valid.nll.json").write_text(json.dumps({"name": "NLL", "score": nll}))
    (tmp_path / "ensemble.test.sacrebleu.json").write_text(json.dumps({**score, "score": 25}))
    assert scores.table(tmp_path).splitlines() == [
        "| score | peer0 | peer1 | mean | ensemble |",
        "|---|---:|---:|---:|---:|",
        "| test BLEU | 20.00 | 23.00 | 21.50 | 25.00 |",
        "| valid NLL | 2.000 | 4.000 | 3.000 | – |",
        "",
        "test BLEU: tok:13a",
    ]


def test_no_mean_of_half_the_peers(tmp_path):
    for peer in range(2):
        (tmp_path / f"peer{peer}").mkdir()
    (tmp_path / "peer0/a.nll.json").write_text('{"name": "NLL", "score": 1}')
    (tmp_path / "peer1/b.nll.json").write_text('{"name": "NLL", "score": 1}')
    assert scores.table(tmp_path).splitlines()[2:4] == ["| a NLL | 1.000 | – | – | – |", "| b NLL | – | 1.000 | – | – |"]


# --- budget.py --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(budget.ARCHITECTURES))
def test_the_number_of_weights_is_fairseqs(name):
    import fairseq

    from benchmarks.communication import model_size

    if fairseq.__version__ == "0.12.2":
        pytest.skip("stock fairseq keeps every encoder layer's weights twice, for a fast path that today's torch refuses")
    assert budget.Model(*budget.ARCHITECTURES[name], 10_001).weights == model_size.of_model(name, 10_001).parameters


def announced(capsys, *options: str) -> str:
    common = "--recipe r --method codistill --arch transformer_wmt_en_de_big --jobs 2 --gpus 4 --update-freq 16"
    common += " --tokens 3584 --updates 1000 --keep 10 --vocab 32768"
    assert budget.main([*common.split(), *options]) == 0
    return capsys.readouterr().out


def test_the_announcement(capsys):
    told = announced(capsys, "--expect", "NLL 2.31")
    assert "128 workers of 3,584 tokens = 2 peers x 4 GPUs x update-freq 16: at most 458,752 tokens in an update" in told
    # 458,752,000 tokens, a third more for the teacher's forward, at NVIDIA's rate scaled to this vocabulary.
    hours = 458_752_000 * 4 / 3 / (235_077 / 8 * 210_874_368 / 209_911_808) / 3600
    assert f"{hours:.1f} GPU-hours (estimate for V100s, from NVIDIA's measurement); {hours / 8:.1f} hours on 8 of them" in told
    assert "2 x 13 checkpoints of 2.5 GB = 65 GB, exchange 2 x 3 snapshots of 0.42 GB = 2.5 GB" in told
    assert "expect   NLL 2.31" in told


def test_peers_that_share_a_gpu_take_the_time_of_both(capsys):
    assert "hours on 1 of them" not in announced(capsys, "--gpus", "1", "--devices", "1")
    assert "hours on 2 of them" in announced(capsys, "--gpus", "1", "--devices", "8")


def test_a_rate_of_ones_own(capsys):
    told = announced(capsys, "--method", "all_reduce", "--jobs", "1", "--tokens-per-second", "100000")
    assert "64 workers of 3,584 tokens = 1 job x 4 GPUs x update-freq 16" in told
    assert "229,376,000 tokens x 1.00 passes / 100,000 a second = 0.6 GPU-hours (by the rate that you gave)" in told
    assert "exchange" not in told and "expect" not in told


@pytest.mark.parametrize("kind, passes", [("single 1", 1), ("rdrop 1", 2), ("codistill 2", 4 / 3), ("codistill 4", 2)])
def test_passes(kind, passes):
    method, jobs = kind.split()[0], int(kind.split()[1])
    assert budget.passes(method, jobs) == pytest.approx(passes)


def test_no_hours_are_invented_for_small_models_and_processors(capsys):
    assert "see the recipe's README.md" in announced(capsys, "--width", "128", "--ffn", "256")
    assert "see the recipe's README.md" in announced(capsys, "--cpu")
    assert "GPU-hours" not in announced(capsys, "--arch", "fconv") and "disk" not in announced(capsys, "--arch", "fconv")
