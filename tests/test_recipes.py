"""The Multi30k recipe on thirty made-up pairs: the data, the commands, and a whole sweep with the real programs."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "multi30k_en_de"
METHODS = ("codistill", "all_reduce", "all_reduce_no_smoothing", "single", "rdrop", "rdrop_all_reduce")
PIECES = 36

sys.path[:0] = [str(ROOT / "data_prep"), str(RECIPE)]
import download  # noqa: E402
import multi30k  # noqa: E402
import parallel_text  # noqa: E402
import sweep  # noqa: E402


def write_source(folder: Path, pairs: int = 30) -> Path:
    """Texts under Multi30k's names, some of them gzipped. Ω stands in a test set alone."""
    draw = random.Random(7)
    words = {"en": "a man dog red runs sees the house".split(), "de": "ein Mann Hund rot läuft sieht das Haus".split()}
    folder.mkdir(parents=True)
    for name in (name for names in multi30k.SPLITS.values() for name in names):
        drawn = [[draw.randrange(8) for _ in range(draw.randint(3, 7))] for _ in range(pairs if name == "train" else 9)]
        for language in multi30k.LANGUAGES:
            lines = [" ".join(words[language][i] for i in sentence) + "." for sentence in drawn]
            if name == "test_2017_mscoco":
                lines[0] += " Ω"
            parallel_text.write_lines(folder / f"{name}.{language}", lines)
    for path in sorted(folder.glob("*.de")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder


def prepare(out: Path, source: Path, *options: str) -> int:
    return multi30k.main(["--out", str(out), "--source", str(source), "--vocab", str(PIECES), *options])


def contents(folder: Path) -> dict:
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("multi30k") / "source")


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("multi30k") / "data"
    assert prepare(out, source, "--train-pairs", "24") == 0
    return out


@pytest.fixture
def refused(capsys):
    """Assert that a call is refused with status 2 and one line on stderr with these words."""

    def check(status: int, *words: str) -> None:
        error = capsys.readouterr().err
        assert status == 2 and error.count("\n") == 1 and all(word in error for word in words), error

    return check


# --- data_prep/multi30k.py --------------------------------------------------------------------------------------------


def test_prepared_data(prepared, source):
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["pairs"] == {"train": 24, "val": 9, **dict.fromkeys(multi30k.SPLITS["test"], 9)}
    assert manifest["test_sets"] == dict(test="test_2016_flickr", test1="test_2017_flickr", test2="test_2017_mscoco")
    # The first pairs, and the references as they were.
    assert parallel_text.read_lines(prepared / "raw/train.de") == parallel_text.read_lines(source / "train.de.gz")[:24]
    assert (prepared / "raw/val.en").read_bytes() == (source / "val.en").read_bytes()


def test_fairseq_reads_every_prepared_sentence(prepared):
    from fairseq.data import Dictionary, data_utils

    dictionary = Dictionary.load(str(prepared / "bin/dict.de.txt"))
    assert (prepared / "bin/dict.en.txt").read_bytes() == (prepared / "bin/dict.de.txt").read_bytes()
    for subset, name in dict(train="train", valid="val", test="test_2016_flickr", test2="test_2017_mscoco").items():
        for language in multi30k.LANGUAGES:
            dataset = data_utils.load_indexed_dataset(str(prepared / f"bin/{subset}.en-de.{language}"), dictionary)
            read = [dictionary.string(dataset[i], "sentencepiece") for i in range(len(dataset))]
            written = parallel_text.read_lines(prepared / "raw" / f"{name}.{language}")
            assert [line.replace("<unk>", "Ω") for line in read] == written


def test_pieces_are_learned_from_the_training_part_only(prepared):
    assert "Ω" in (prepared / "raw/test_2017_mscoco.de").read_text(encoding="utf-8")
    assert "Ω" not in (prepared / "bin/dict.de.txt").read_text(encoding="utf-8")


def test_second_run_does_nothing(prepared, source, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    assert prepare(prepared, source, "--train-pairs", "24") == 0
    # Without a source there is no download either, for there is nothing to do.
    assert multi30k.main(["--out", str(prepared), "--vocab", str(PIECES), "--train-pairs", "24"]) == 0
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert capsys.readouterr().out.count("nothing done") == 2


def test_killed_run_starts_again_and_data_is_reproducible(prepared, source, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parallel_text, "binarise", kill)
        prepare(tmp_path / "data", source)
    assert not (tmp_path / "data").exists() and (tmp_path / "data.part/pieces").exists()
    assert prepare(tmp_path / "data", source, "--train-pairs", "24") == 0
    # The same to the byte as the run that nobody disturbed, in another folder; only fairseq's own log names the folder.
    second, first = contents(tmp_path / "data"), contents(prepared)
    assert second.pop(Path("bin/preprocess.log")) and first.pop(Path("bin/preprocess.log"))
    assert second == first
    assert not (tmp_path / "data.part").exists()


def test_other_data_is_not_overwritten(prepared, source, tmp_path, refused):
    refused(prepare(prepared, source, "--train-pairs", "23"), "was made with", "23")
    other = shutil.copytree(source, tmp_path / "other")
    parallel_text.write_lines(other / "val.en", ["other"] * 9)
    refused(prepare(prepared, other, "--train-pairs", "24"), "other texts")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("Dear")
    refused(prepare(tmp_path / "mine", source), "manifest.json")
    assert (tmp_path / "mine/letter.txt").read_text() == "Dear"


def test_bad_source_is_refused(source, tmp_path, refused):
    bad = shutil.copytree(source, tmp_path / "bad")
    out = tmp_path / "out"
    refused(prepare(out, bad, "--train-pairs", "31"), "--train-pairs", "30", "31")
    refused(prepare(out, bad, "--vocab", "5000"), "--vocab", "at most", "5000")
    parallel_text.write_lines(bad / "val.en", ["one line"])
    refused(prepare(out, bad), "val.en", "val.de.gz", "1, 9")
    (bad / "train.de.gz").write_bytes((source / "train.de.gz").read_bytes()[:50])
    refused(prepare(out, bad), "train.de.gz", "gzip")
    (bad / "train.de.gz").unlink()
    refused(prepare(out, bad), "train.de", "train.de.gz", str(bad))
    assert not out.exists()


# --- data_prep/download.py --------------------------------------------------------------------------------------------


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves ``files``; breaks off its first answer for each name in ``broken`` after 10 bytes; knows ranges."""

    def __init__(self, files: dict, broken: set, asked: list, *args) -> None:
        self.files, self.broken, self.asked = files, broken, asked
        super().__init__(*args)

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.asked.append((self.path, self.headers.get("Range")))
        if name not in self.files or self.path.startswith("/gone"):
            return self.send_error(404)
        body = b"<html>log in first</html>" if self.path.startswith("/portal") else self.files[name]
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.send_response(206 if start else 200)
        body = body[int(start.group(1)) :] if start else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:10] if name in self.broken else body)
        self.broken.discard(name)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def mirror(source, monkeypatch):
    """Address, what breaks off, and what was asked for, of a server that offers the source's files as ``.gz``."""
    texts = {path.name.replace(".gz", ""): parallel_text.read_lines(path) for path in source.iterdir()}
    data = {name: "".join(f"{line}\n" for line in lines).encode() for name, lines in texts.items()}
    files = {f"{name}.gz": gzip.compress(text, mtime=0) for name, text in data.items()}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    monkeypatch.setattr(multi30k, "PUBLISHED_SHA256", digests)
    broken, asked = set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Mirror, files, broken, asked))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", broken, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_changes_mirror(mirror, prepared, tmp_path, monkeypatch):
    address, broken, asked = mirror
    broken.add("val.en.gz")
    monkeypatch.setattr(multi30k, "_build", lambda *_: {})  # the texts are what matters here
    mirrors = [f"{address}/gone", f"{address}/portal", f"{address}/whole"]
    assert multi30k.prepare(tmp_path / "data", None, multi30k.Settings(24, PIECES, "unigram"), mirrors)
    # What the portal began with must not be continued with the file's own bytes.
    assert [range_ for path, range_ in asked if path == "/whole/val.en.gz"] == [None]
    digests = [json.loads((out / "manifest.json").read_text())["text_sha256"] for out in (tmp_path / "data", prepared)]
    assert digests[0] == digests[1]
    assert not (tmp_path / "data/download").exists()


def test_download_asks_only_for_the_rest(mirror, tmp_path, monkeypatch):
    address, broken, asked = mirror
    monkeypatch.setattr(download, "CHUNK_BYTES", 4)
    broken.add("val.en.gz")
    url, path = f"{address}/whole/val.en.gz", tmp_path / "val.en.gz"
    digest = multi30k.PUBLISHED_SHA256["val.en.gz"]
    assert download.fetch([url], path, digest) == digest == parallel_text.sha256_of(path)
    assert [range_ for _, range_ in asked] == [None, "bytes=8-"]
    download.fetch([url], path, digest)
    assert len(asked) == 2, "a file that is there is not asked for again"


def test_download_that_fails_names_every_mirror(mirror, tmp_path):
    address, _, asked = mirror
    with pytest.raises(ConnectionError, match=r"val\.en\.gz.*gone/val\.en\.gz: 404.*portal/val\.en\.gz: .*sha256"):
        urls = [f"{address}/gone/val.en.gz", f"{address}/portal/val.en.gz"]
        download.fetch(urls, tmp_path / "val.en.gz", multi30k.PUBLISHED_SHA256["val.en.gz"])
    assert list(tmp_path.iterdir()) == []


# --- the commands -----------------------------------------------------------------------------------------------------


def script(name: str, *arguments: str, **variables: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
    return subprocess.run(["bash", str(RECIPE / name), *arguments], env=environment, capture_output=True, text=True)


def dry_run(**variables: object) -> list[str]:
    """The words of the command that train.sh would start."""
    result = script("train.sh", **{"DATA": "data", "OUT": "runs", "CPU": 1, **variables, "DRY_RUN": 1})
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


@pytest.mark.parametrize("method", METHODS)
def test_fairseq_understands_every_option(method, monkeypatch):
    from fairseq import options

    launcher, train = " ".join(dry_run(METHOD=method, SEED=3, ALPHA=0.5, DISTANCE="ce")).split(" -- ")
    words = dry_run(METHOD=method, SEED=3, ALPHA=0.5, DISTANCE="ce")
    words = words[words.index("fairseq-train") + 1 :]
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words])
    if "rdrop" in method:
        pytest.importorskip("fairseq.criterions.label_smoothed_cross_entropy_with_rdrop")  # not in stock 0.12.2
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    assert (args.encoder_layers, args.encoder_embed_dim, args.decoder_ffn_embed_dim) == (2, 128, 256)
    assert (args.lr, args.max_tokens, args.max_update, args.seed) == ([0.003], 1000, 2000, 3)
    assert (args.required_batch_size_multiple, args.validate_interval_updates, args.cpu) == (1, 100, True)
    is_smoothed = method in ("all_reduce", "rdrop", "rdrop_all_reduce")
    assert getattr(args, "label_smoothing", 0) == (0.1 if is_smoothed else 0)
    assert args.best_checkpoint_metric == ("nll_loss" if is_smoothed else "loss")
    assert args.update_freq == [2 if "all_reduce" in method else 1]
    assert launcher == f"codistill-launch --peers {2 if method == 'codistill' else 1} --gpus-per-peer 0"
    if method == "codistill":
        assert (args.codistill_interval, args.codistill_loss, args.codistill_alpha) == (50, "ce", 0.5)
        assert args.save_dir == "runs/codistill_ce/seed3"
    else:
        assert args.save_dir == f"runs/{method}/seed3"


def test_gpus_do_not_change_the_batch():
    def launcher(**variables: object) -> str:
        words = dry_run(CPU=0, **variables)
        return " ".join(words[1 : words.index("--")]) + " " + " ".join(re.findall(r"--update-freq \d", " ".join(words)))

    assert launcher(METHOD="single", CUDA_VISIBLE_DEVICES="0,1,2,3") == "--peers 1 --gpus-per-peer 1 --update-freq 1"
    assert launcher(METHOD="codistill", CUDA_VISIBLE_DEVICES="0,1") == "--peers 2 --gpus-per-peer 1 --update-freq 1"
    # Peers may share one GPU; all_reduce may have the two that codistillation has.
    assert launcher(METHOD="codistill", CUDA_VISIBLE_DEVICES="0") == "--peers 2 --update-freq 1"
    assert launcher(METHOD="all_reduce", CUDA_VISIBLE_DEVICES="0,1") == "--peers 1 --gpus-per-peer 1 --update-freq 2"
    two = dict(GPUS_PER_PEER=2, CUDA_VISIBLE_DEVICES="0,1")
    assert launcher(METHOD="all_reduce", **two) == "--peers 1 --gpus-per-peer 2 --update-freq 1"
    assert "needs 4 GPUs" in script("train.sh", DATA="d", OUT="o", METHOD="codistill", **two).stderr


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(METHOD="bagging"), ["METHOD", "rdrop_all_reduce", "bagging"]),
        (dict(DATA=""), ["DATA", "multi30k.py"]),
        (dict(DATA="nowhere"), ["DATA", "nowhere"]),
        (dict(PEERS="two"), ["PEERS", "two"]),
        (dict(SEED="-1"), ["SEED", "-1"]),
        (dict(GPUS_PER_PEER=3), ["GPUS_PER_PEER", "divides PEERS=2"]),
    ],
)
def test_train_refuses(variables, words, tmp_path):
    result = script("train.sh", **{"DATA": "data", "OUT": tmp_path, "CPU": 1, **variables})
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_a_run_is_not_continued_with_another_command(prepared, tmp_path):
    common = dict(METHOD="single", DATA=prepared, OUT=tmp_path, CPU=1, CODISTILL_LAUNCH="false")
    assert script("train.sh", **common).returncode == 1  # begun, and failed as `false` does
    result = script("train.sh", **common, LR="0.1")
    assert result.returncode == 2 and "another command" in result.stderr
    assert not (tmp_path / "single/seed1/finished").exists()


@pytest.mark.parametrize("has_data, arguments, word", [(1, "", "runs/"), (0, "", "DATA"), (1, "x", "no peer")])
def test_evaluate_refuses(has_data, arguments, word, prepared):
    result = script("evaluate.sh", *arguments.split(), DATA=prepared if has_data else "")
    assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1


# --- sweep.py ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["runs.txt", "tuning.txt"])
def test_every_listed_run_has_a_command(name):
    runs = sweep.read_runs(RECIPE / name, [1, 2], [])
    commands = {" ".join(dry_run(NAME="x", **dict(word.split("=", 1) for word in run.variables))) for run in runs}
    assert len(commands) == len(runs) // 2, "two lines of one file are the same run"


def test_sweep_refuses(prepared, tmp_path, refused):
    runs = tmp_path / "runs.txt"
    common = ["--data", str(prepared), "--out", str(tmp_path), "--runs", str(runs)]
    runs.write_text("# none\nfine METHOD=single EXTRA='--clip-norm 1'\nmse ALPAH=1\n")
    refused(sweep.main(common), "runs.txt:3", "ALPAH=1")
    runs.write_text("same METHOD=single\nsame METHOD=rdrop\n")
    refused(sweep.main(common), "runs.txt:2", "same")
    runs.write_text("single METHOD=single\n")
    refused(sweep.main([*common, "--only", "double"]), "--only", "double")
    refused(sweep.main([*common, "--jobs", "0"]), "--jobs")
    refused(sweep.main(["--data", str(tmp_path), "--out", str(tmp_path)]), "--data")


def test_sweep_stops_what_it_started(prepared, tmp_path):
    told = tmp_path / "told"
    os.mkfifo(told)
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\nexec 3>{told}\necho begun >&3\nexec sleep 100000\n")
    launcher.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, str(RECIPE / "sweep.py"), "--data", str(prepared), "--out", str(tmp_path / "runs")],
        env={**os.environ, "CODISTILL_LAUNCH": str(launcher)},
        stdout=subprocess.DEVNULL,
    )
    with open(told) as line:  # blocks until the run has begun
        assert line.readline() == "begun\n"
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
        assert line.read() == "", "the pipe ends when nobody holds it any more: what was started is gone"


TINY = dict(LAYERS=1, WIDTH=16, FFN=16, HEADS=2, UPDATES=6, INTERVAL=2, VALIDATE=2, WARMUP=2, TOKENS=100)
TINY.update(CPU=1, THREADS=1, TEST_SETS="test_2016_flickr:test", NLL_SETS="val:valid", PYTHONPATH=str(ROOT))


@pytest.fixture(scope="module")
def swept(prepared, tmp_path_factory):
    """A sweep of two methods with the real programs, called as modules of this interpreter; its folder."""
    out = tmp_path_factory.mktemp("sweep")
    (out / "runs.txt").write_text("single METHOD=single\ncodistill_ce METHOD=codistill DISTANCE=ce\n")
    programs = dict(
        CODISTILL_LAUNCH="fairseq_codistill.launch",
        FAIRSEQ_TRAIN="fairseq_cli.train",
        FAIRSEQ_GENERATE="fairseq_cli.generate",
        SACREBLEU="sacrebleu",
    )
    variables = {name: f"{sys.executable} -m {module}" for name, module in programs.items()}
    variables.update({name: str(value) for name, value in TINY.items()})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        command = ["--data", str(prepared), "--out", str(out / "runs"), "--runs", str(out / "runs.txt"), "--seeds", "5"]
        command += ["--jobs", "2", "--results", str(out / "results")]
        status = sweep.main(command)
        logs = "\n".join(path.read_text()[-3000:] for path in out.glob("runs/*/*/sweep.log"))
        assert status == 0, logs
        before = contents(out / "runs")
        assert sweep.main(command) == 0
    # Only what each run says of itself grows when nothing is left to do.
    after = contents(out / "runs")
    assert {path.name for path in after if after[path] != before.get(path)} == {"sweep.log"}
    return out


def valid_losses(log: Path) -> list[float]:
    return [float(value) for value in re.findall(r'"valid_loss": "([0-9.]+)"', log.read_text())]


def test_scored_nll_is_the_validation_loss(swept):
    for peer in swept.glob("runs/*/seed5/peer*"):
        scored = json.loads((peer / "val.nll.json").read_text())
        assert len(valid_losses(peer / "train.log")) == 3
        assert scored["score"] == pytest.approx(min(valid_losses(peer / "train.log")), abs=6e-4)


def test_every_peer_and_the_ensemble_is_scored(swept):
    run = swept / "runs/codistill_ce/seed5"
    prefixes = [f"{run}/peer0/", f"{run}/peer1/", f"{run}/ensemble."]
    scores = [json.loads(Path(f"{prefix}test_2016_flickr.sacrebleu.json").read_text()) for prefix in prefixes]
    assert all(score["name"] == "BLEU" and "tok:13a" in score["signature"] for score in scores)
    first, second, both = (json.loads(Path(f"{prefix}val.nll.json").read_text())["score"] for prefix in prefixes)
    # Jensen: the mean of the probabilities is never below their geometric mean.
    assert both <= (first + second) / 2 + 1e-4
    assert not list(swept.glob("runs/single/seed5/ensemble*"))


def test_results_hold_no_local_path(swept):
    files = contents(swept / "results")
    assert {Path("data.json"), Path("codistill_ce/seed5/peer1/train.log")} <= set(files)
    assert {path.suffix for path in files} == {".json", ".log", ".txt"}, "no weights"
    for path, data in files.items():
        assert str(swept).encode() not in data and str(ROOT).encode() not in data, path
    assert b"--save-dir OUT/single/seed5" in files[Path("single/seed5/command.txt")]


def test_report_reads_the_results(swept, tmp_path):
    words = ["-m", "fairseq_codistill.report", str(swept / "results"), "--out", str(tmp_path / "report")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "codistill_ce" in result.stdout and "single" in result.stdout
