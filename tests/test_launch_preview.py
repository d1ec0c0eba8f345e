"""What codistill-launch knows before it starts anything: data and exchange, the commands, and what a run will cost."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_launch import programs  # noqa: F401  (a fixture)

from fairseq_codistill.launch import cost as launch_cost
from fairseq_codistill.launch import main as launch

RUN = {"format": 1, "peers": 2, "classes": 8, "dictionary_sha256": None}


@pytest.fixture
def exchange(programs, tmp_path: Path) -> Path:  # noqa: F811
    folder = tmp_path / "X" / "exchange"
    folder.mkdir(parents=True)
    return folder


def launched(capsys, words: str) -> tuple:
    code = launch.main(["--gpus-per-peer", "0", *shlex.split(words)])
    return (code, *capsys.readouterr())


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("fairseq-train nowhere --save-dir X", r"the data must be a folder, but 'nowhere' is not there \(from /.*\); did you"),
        ("fairseq-train D:nowhere --save-dir X", "the data must be a folder, but 'nowhere' is not there"),
        ("nice -n 1 fairseq-train nowhere", "the data must be a folder, but 'nowhere' is not there"),
        ("fairseq-hydra-train task.data=/nowhere/at/all checkpoint.save_dir=X", "but '/nowhere/at/all' is not there"),
    ],
)
def test_data_that_is_not_there(programs, tmp_path: Path, capsys, words: str, sentence: str) -> None:  # noqa: F811
    code, out, err = launched(capsys, f"--peers 2 -- {words}")
    assert code == 2 and out == "" and err.count("\n") == 1 and re.search(sentence, err)
    assert not list(tmp_path.glob("start*")) and not (tmp_path / "X").exists()


@pytest.mark.parametrize(
    "words",
    ["fairseq-train D:D", "fairseq-train --task dummy_lm", "fairseq-train s3://bucket/data", "sh -c true"],
)
def test_data_that_is_there_or_cannot_be_judged(programs, capsys, words: str) -> None:  # noqa: F811
    assert launched(capsys, f"--peers 2 --log-dir L -- {words}")[0] == 0


@pytest.mark.parametrize(
    "content, words",
    [
        ("[1]", "run.json must be that of a run of format 1 with 1 to 4096 peers, but is not; did you mean another"),
        ("", "run.json must be that of a run"),
        (json.dumps({**RUN, "format": 2}), "but a newer version began it, with format 2; did you forget to upgrade"),
    ],
)
def test_an_exchange_that_is_no_runs(exchange: Path, tmp_path: Path, capsys, content: str, words: str) -> None:
    (exchange / "run.json").write_text(content)
    for option in ("--save-dir X", "--save-dir Y --codistill-dir X/exchange"):
        code, _, err = launched(capsys, f"--peers 2 -- fairseq-train D {option}")
        assert code == 2 and words in err and err.count("\n") == 1 and str(exchange) in err
    assert not list(tmp_path.glob("start*"))


def test_a_runs_exchange_is_fit_for_any_number_of_peers(exchange: Path, capsys) -> None:
    (exchange / "run.json").write_text(json.dumps(RUN))
    assert launched(capsys, "--peers 3 -- fairseq-train D --save-dir X")[0] == 0


def test_bad_input_is_told_within_a_second(programs, tmp_path: Path) -> None:  # noqa: F811
    code = "import sys; sys.argv[0] = 'codistill-launch'; from fairseq_codistill.launch.main import main; sys.exit(main())"
    words = [sys.executable, "-c", code, *"--peers 2 --gpus-per-peer 0 -- fairseq-train nowhere".split()]
    start = time.process_time(), os.times()
    assert subprocess.run(words, capture_output=True, timeout=60).returncode == 2
    assert os.times().children_user - start[1].children_user < 1.0, "seconds of a processor; torch alone takes longer"


def test_a_dry_run_prints_what_would_run_and_writes_nothing(programs, tmp_path: Path, capsys) -> None:  # noqa: F811
    before = sorted(tmp_path.rglob("*"))
    code, out, err = launched(capsys, "--peers 2 --dry-run -- fairseq-train D --save-dir 'a b/X' --max-update 1000")
    assert code == 0 and err == "" and sorted(tmp_path.rglob("*")) == before
    runs = [line for line in out.splitlines() if not line.startswith("#")]
    assert len(runs) == 2
    assert "# peer1: " in out and "log 'a b/X/peer1/train.log'" in out and "# For each 1.0 million weights (this model" in out
    # A shell takes them as they are.
    assert subprocess.run(["sh", "-c", "export CODISTILL_RESTART=0; " + runs[1]], cwd=tmp_path).returncode == 0
    started = json.loads((tmp_path / "start1.0").read_text())
    assert started["argv"][:1] == ["D"] and "a b/X/peer1" in started["argv"] and "10000001" in started["argv"]
    assert started["env"]["CODISTILL_DIR"] == str(tmp_path / "a b/X/exchange") and started["env"]["CODISTILL_PEERS"] == "2"


def costs(words: str, data=None, peers: int = 2, exchange=None) -> str:
    return "\n".join(launch_cost.costs(words.split(), data and str(data), peers, exchange and str(exchange)))


def dictionaries(folder: Path, symbols: int = 32_764) -> Path:
    folder.mkdir()
    for language in ("de", "en"):
        (folder / f"dict.{language}.txt").write_text("".join(f"w{number} 1\n" for number in range(symbols)))
    return folder


def test_weights_by_the_formula(tmp_path: Path) -> None:
    """As benchmarks/communication/model_size.py counts them in fairseq's model."""
    data = dictionaries(tmp_path / "data")
    big = "fairseq-train x --arch transformer_vaswani_wmt_en_de_big".split()
    weights = launch_cost.of_architecture([*big, "--share-all-embeddings"], str(data))
    assert weights == (209_911_808, "by the formula of transformer_vaswani_wmt_en_de_big with 32,768 symbols")
    separate = launch_cost.of_architecture(big, str(data)).count
    shared_output = launch_cost.of_architecture([*big, "--share-decoder-input-output-embed"], str(data)).count
    assert separate - weights.count == 2 * 32_768 * 1024 and separate - shared_output == 32_768 * 1024
    assert launch_cost.of_architecture(["--arch", "transformer_lm"], str(data)) is None
    assert launch_cost.of_architecture(big, str(tmp_path)) is None, "no dictionaries"


TINY = (
    "--arch transformer_iwslt_de_en --encoder-layers 1 --decoder-layers 2 --encoder-embed-dim 32 --decoder-embed-dim 64 "
    "--encoder-ffn-embed-dim 96 --decoder-ffn-embed-dim 128"
)


def test_the_formula_is_fairseqs_model(tmp_path: Path) -> None:
    from argparse import Namespace

    from fairseq.data import Dictionary
    from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY

    data, words = dictionaries(tmp_path / "data", 96), Dictionary()
    for number in range(96):
        words.add_symbol(f"w{number}")
    args = Namespace(arch="transformer_iwslt_de_en", max_source_positions=64, max_target_positions=64, encoder_layers=1,
                     decoder_layers=2, encoder_embed_dim=32, decoder_embed_dim=64, encoder_ffn_embed_dim=96,
                     decoder_ffn_embed_dim=128)  # fmt: skip
    ARCH_CONFIG_REGISTRY[args.arch](args)
    model = ARCH_MODEL_REGISTRY[args.arch].build_model(args, Namespace(source_dictionary=words, target_dictionary=words))
    assert launch_cost.of_architecture(TINY.split(), str(data)).count == sum(p.numel() for p in model.parameters())


def test_weights_counted_in_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "peer0").mkdir()
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(())}, tmp_path / "peer0" / "u000000500.safetensors")
    assert launch_cost.of_snapshot(str(tmp_path)) == (16, f"counted in {tmp_path}/peer0/u000000500.safetensors")
    newest = tmp_path / "peer0" / "u000000900.safetensors"
    for content in (b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]"):
        newest.write_bytes(content)
        assert launch_cost.of_snapshot(str(tmp_path)) is None
    newest.unlink()
    os.mkfifo(newest)
    assert launch_cost.of_snapshot(str(tmp_path)) is None, "and does not wait for a writer"
    assert launch_cost.of_snapshot(None) is None and launch_cost.of_snapshot(str(tmp_path / "none")) is None


def test_costs(tmp_path: Path) -> None:
    told = costs("fairseq-train --max-update 20000 --codistill-interval 500", peers=3)
    assert "about 16.0 MB for training" in told and "2 teachers of 4.0 MB" in told and "3 x 2.0 MB" in told
    assert "disk     3 x 12.0 MB" in told and "exchange 3 x 4 snapshots of 2.0 MB = 24.0 MB at most" in told
    assert "writes 2.0 MB and reads 2 x 2.0 MB every 500 updates; 720.0 MB in all of 20,000 updates by 3 peers" in told
    assert "time     2 more forward passes" in told
    ring = costs("x --codistill-topology ring --codistill-peer-dtype int8 --codistill-wire-dtype fp32 --fp16", peers=3)
    assert "1 teacher of 1.0 MB" in ring and "writes 4.0 MB and reads 1 x 4.0 MB every 500 updates" in ring
    hydra = costs("x optimization.max_update=100 +criterion.codistill_interval=50 common.fp16=true", peers=2)
    assert "every 50 updates; 16.0 MB in all of 100" in hydra and "1 teacher of 2.0 MB" in hydra
    offline = costs("x --codistill-teacher a.pt:b.pt", peers=1)
    assert "2 teachers of 4.0 MB" in offline and "writes 0 B and reads 0 x 0 B" in offline
    assert "time     0 more forward passes" in costs("x", peers=1)
