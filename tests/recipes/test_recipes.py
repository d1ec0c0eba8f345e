"""The translation recipes: what each of them asks fairseq for, and whole runs on made-up pairs with the real programs."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib.util
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

import data_prep_corpora as made
import pytest
from fairseq_runs import checkpoint

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
RECIPE = RECIPES / "multi30k_en_de"
pytestmark = pytest.mark.usefixtures("warm_scripts")
METHODS = ("codistill", "all_reduce", "all_reduce_no_smoothing", "single", "rdrop", "rdrop_all_reduce")
PIECES = 36

sys.path[:0] = [str(ROOT / "data_prep"), str(RECIPES / "translation")]
import corpora  # noqa: E402
import download  # noqa: E402
import generated  # noqa: E402
import multi30k  # noqa: E402
import parallel_text  # noqa: E402
import prepare as prepare_corpus  # noqa: E402
import sweep  # noqa: E402
from runner import runs, sweeping, tasks  # noqa: E402

from fairseq_codistill.report import main as report  # noqa: E402

TRANSLATION = tasks.read_task("translation")


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
def prepared(warm_scripts, source, tmp_path_factory):
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
    # Ten bytes came; an older urllib3 hands out the last chunk although it is not whole.
    assert [range_ for _, range_ in asked] in ([None, "bytes=8-"], [None, "bytes=10-"])
    download.fetch([url], path, digest)
    assert len(asked) == 2, "a file that is there is not asked for again"


def test_download_that_fails_names_every_mirror(mirror, tmp_path):
    address, _, asked = mirror
    with pytest.raises(ConnectionError, match=r"val\.en\.gz.*gone/val\.en\.gz: 404.*portal/val\.en\.gz: .*sha256"):
        urls = [f"{address}/gone/val.en.gz", f"{address}/portal/val.en.gz"]
        download.fetch(urls, tmp_path / "val.en.gz", multi30k.PUBLISHED_SHA256["val.en.gz"])
    assert list(tmp_path.iterdir()) == []


# --- the commands -----------------------------------------------------------------------------------------------------


def script(name: str, *arguments: str, recipe: str = "multi30k_en_de", **variables: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **{key: str(value) for key, value in variables.items()}}
    command = ["bash", str(RECIPES / recipe / name), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def dry_run(recipe: str = "multi30k_en_de", **variables: object) -> list[str]:
    """The words of the command that train.sh would start."""
    if recipe == "own":  # its languages are the data's
        variables = {"SOURCE": "fr", "TARGET": "it", **variables}
    result = script("train.sh", recipe=recipe, **{"DATA": "data", "OUT": "runs", "CPU": 1, **variables, "DRY_RUN": 1})
    assert result.returncode == 0, result.stderr
    return shlex.split(result.stdout)


# What each recipe is: languages, architecture, and the settings that its README gives as the papers'.
PAPERS = dict(dropout=0.3, warmup_updates=4000, warmup_init_lr=1e-7, max_update=17500, weight_decay=0.0)
BIG = dict(encoder_layers=6, encoder_embed_dim=1024, decoder_ffn_embed_dim=4096, decoder_attention_heads=16)
BIG.update(PAPERS, keep_interval_updates=10)
RECIPE_FLAGS = {
    "multi30k_en_de": dict(
        source_lang="en", target_lang="de", arch="transformer", encoder_layers=2, encoder_embed_dim=128,
        decoder_ffn_embed_dim=256, dropout=0.1, lr=[0.003],
        max_tokens=1000, max_update=2000, validate_interval_updates=100, fp16=False,
    ),
    "demo": dict(
        source_lang="en", target_lang="de", arch="transformer", encoder_layers=2, decoder_embed_dim=128, dropout=0.0,
        lr=[0.003], max_tokens=700, max_update=900, fp16=False,
    ),
    "iwslt14_de_en": dict(
        source_lang="de", target_lang="en", arch="transformer_wmt_en_de_big", lr=[5e-4], max_tokens=4096, fp16=True, **BIG
    ),
    "wmt16_en_de": dict(
        source_lang="en", target_lang="de", arch="transformer_wmt_en_de_big", lr=[0.001], max_tokens=3584, fp16=True, **BIG
    ),
    "tatoeba_de_en": dict(source_lang="de", target_lang="en", arch="transformer", keep_interval_updates=5, fp16=False),
    "newstest_de_en": dict(source_lang="de", target_lang="en", arch="transformer", keep_interval_updates=5, fp16=False),
    "own": dict(
        source_lang="fr", target_lang="it", arch="transformer_iwslt_de_en", lr=[5e-4], max_tokens=4096, fp16=False,
        encoder_ffn_embed_dim=1024, decoder_attention_heads=4, dropout=0.3, weight_decay=1e-4, keep_interval_updates=5,
    ),
}  # fmt: skip
# distance, α, its schedule, interval, lockstep; a worker's share and all workers.
CODISTILLATION = {
    "multi30k_en_de": ("mse", 0.1, "exponential", 50, True, 1, 2),
    "demo": ("ce", 0.3, "exponential", 50, True, 1, 2),
    "iwslt14_de_en": ("mse", 0.1, "exponential", 500, False, 1, 2),
    "wmt16_en_de": ("mse", 0.1, "exponential", 2500, False, 64, 128),
    "tatoeba_de_en": ("ce", 1.0, "constant", 100, True, 1, 2),
    "newstest_de_en": ("ce", 1.0, "constant", 50, True, 1, 2),
    "own": ("ce", 0.3, "exponential", 500, False, 1, 2),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPE_FLAGS)
def test_fairseq_understands_every_option(recipe, method, monkeypatch):
    from fairseq import options

    words = dry_run(recipe, METHOD=method, SEED=3, CPU=0, GPUS=2 if method == "codistill" or "all_reduce" in method else 1)
    launcher, words = words[: words.index("fairseq-train")], words[words.index("fairseq-train") + 1 :]
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words])
    if "rdrop" in method:
        pytest.importorskip("fairseq.criterions.label_smoothed_cross_entropy_with_rdrop")  # not in stock 0.12.2
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)

    assert {name: getattr(args, name) for name in RECIPE_FLAGS[recipe]} == RECIPE_FLAGS[recipe]
    assert (args.task, args.share_all_embeddings, args.optimizer, args.lr_scheduler) == (
        "translation", True, "adam", "inverse_sqrt",
    )  # fmt: skip
    assert eval(args.adam_betas) == (0.9, 0.98)
    assert (args.seed, args.required_batch_size_multiple, args.cpu, args.log_format) == (3, 1, False, "json")
    assert args.save_interval_updates == args.validate_interval_updates
    is_smoothed = method in ("all_reduce", "rdrop", "rdrop_all_reduce")
    assert (getattr(args, "label_smoothing", None) or 0) == (0.1 if is_smoothed else 0)
    assert args.best_checkpoint_metric == ("nll_loss" if is_smoothed else "loss")
    distance, alpha, schedule, interval, lockstep, share, workers = CODISTILLATION[recipe]
    # The same updates and workers for both methods: two GPUs are two peers, or one group of both.
    gpus = int(launcher[launcher.index("--gpus-per-peer") + 1])
    assert args.update_freq == [(workers if "all_reduce" in method else share) // gpus]
    assert launcher[:3] == ["codistill-launch", "--peers", "2" if method == "codistill" else "1"]
    if method == "codistill":
        assert args.criterion == "codistill_ce" and args.save_dir == f"runs/codistill_{distance}/seed3"
        told = (args.codistill_loss, args.codistill_alpha, args.codistill_alpha_schedule, args.codistill_interval)
        assert told == (distance, alpha, schedule, interval)
        assert (args.codistill_sync, args.codistill_gamma) == (lockstep, 1.1)
    else:
        assert args.save_dir == f"runs/{method}/seed3" and "codistill" not in args.criterion


EVALUATED = [
    ("bpe", "moses", "de", "@@ "), ("sentencepiece", "none", "en", "sentencepiece"), (None, None, "en", "sentencepiece"),
]  # fmt: skip


@pytest.mark.parametrize("subwords, tokenizer, target, removed", EVALUATED)
@pytest.mark.parametrize("recipe, method", [("iwslt14_de_en", "codistill"), ("wmt16_en_de", "all_reduce")])
def test_bleu_may_choose_the_checkpoint(recipe, method, subwords, tokenizer, target, removed, tmp_path, monkeypatch):
    """As in fairseq's own recipe, with the pieces and tokens of the data at hand; and nothing else changes."""
    from fairseq import options

    if subwords:
        (tmp_path / "manifest.json").write_text(json.dumps({"subwords": subwords, "tokenizer": tokenizer}, indent=1))
    common = dict(METHOD=method, DATA=tmp_path, TARGET=target, SOURCE="fr", LENPEN="0.6", BEAM=4)
    plain, words = dry_run(recipe, **common), dry_run(recipe, **common, EVAL_BLEU=1)
    assert not any("--eval" in word for word in plain) and "--maximize-best-checkpoint-metric" not in plain
    words = words[words.index("fairseq-train") + 1 :]
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *words])
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    assert (args.eval_bleu, args.best_checkpoint_metric, args.maximize_best_checkpoint_metric) == (True, "bleu", True)
    assert json.loads(args.eval_bleu_args) == {"beam": 4, "lenpen": 0.6, "max_len_a": 1.2, "max_len_b": 10}
    assert args.eval_bleu_remove_bpe == removed
    told = (args.eval_bleu_detok, json.loads(args.eval_bleu_detok_args))
    assert told == (("moses", {"target_lang": target}) if tokenizer == "moses" else ("space", {}))
    first = words.index("--eval-bleu")
    last = words.index("--maximize-best-checkpoint-metric")
    rest = words[:first] + words[last + 1 :]
    metric = rest.index("--best-checkpoint-metric") + 1
    before = plain[plain.index("fairseq-train") + 1 :]
    assert rest[:metric] + rest[metric + 1 :] == before[:metric] + before[metric + 1 :]


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for recipe in ("demo", "digits"):
        words = dry_run(recipe, DATA="~/data", OUT="~/a b")
        assert words[words.index("fairseq-train") + 1].startswith(f"{tmp_path}/data")
        assert words[words.index("--save-dir") + 1].startswith(f"{tmp_path}/a b/")
    args = sweeping._parser(TRANSLATION, "").parse_args(["--recipe", "~", "--data", "~/x", "--out=~/y"])
    assert (args.recipe, args.data, args.out) == (tmp_path, tmp_path / "x", tmp_path / "y")
    no_average = [sys.executable, RECIPES / "translation/average.py", "~/nowhere"]
    assert f"that {tmp_path}/nowhere has" in subprocess.run(no_average, capture_output=True, text=True).stderr
    assert f"{tmp_path}/nowhere must be a run" in script("evaluate.sh", "~/nowhere", DATA=data_of(tmp_path)).stderr
    taken_as_they_are = [file.name for file in RECIPES.rglob("*.py") if "type=Path" in file.read_text(encoding="utf-8")]
    assert not taken_as_they_are


def data_of(home: Path) -> str:
    (home / "data/bin").mkdir(parents=True)
    (home / "data/raw").mkdir()
    (home / "data/bin/dict.de.txt").write_text("")
    for name in ("val", "test_2016_flickr", "test_2017_flickr", "test_2017_mscoco"):
        (home / f"data/raw/{name}.de").write_text("")
    return "~/data"


def test_every_recipe_is_tested_and_has_what_a_recipe_has():
    recipes = {path.parent.name for path in RECIPES.glob("*/recipe.toml") if tasks.read_toml(path)["task"] == "translation"}
    assert recipes == set(RECIPE_FLAGS) == set(CODISTILLATION)
    for recipe in recipes:
        assert {"README.md", "train.sh", "evaluate.sh"} <= {path.name for path in (RECIPES / recipe).iterdir()}


def test_the_readme_lists_every_variable():
    readme = (RECIPES / "translation/README.md").read_text()
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", readme))
    assert tasks.variables_of(TRANSLATION) <= listed
    for name in ("evaluate.py", "prepared.py"):
        read = set(re.findall(r'"([A-Z][A-Z_]+)"', (RECIPES / "translation" / name).read_text()))
        assert read <= listed | {"NLL", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}, name
    for recipe in map(tasks.read_recipe, map(RECIPES.joinpath, RECIPE_FLAGS)):
        assert {name.upper() for name in (*recipe.settings, *recipe.evaluate)} <= listed, recipe


# Settings that were tried and given up, and what they are compared with on a GPU, are described by their command.txt alone.
TRIED = ("default/plain", "default/burn_in", "default_all", "default_8k", "tatoeba_de_en/results/default")
COMMITTED = [
    path for recipe in RECIPE_FLAGS for path in sorted(RECIPES.glob(f"{recipe}/results/**/seed1/command.txt"))
    if not any(f"{tried}/" in str(path) for tried in TRIED)
]  # fmt: skip


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.relative_to(RECIPES).parts[0]}-{path.parents[1].name}")
def test_committed_results_come_from_the_same_commands(path):
    """What was run for the committed tables; some came before the options that ask for what was then the only way."""
    recipe, name = path.relative_to(RECIPES).parts[0], path.parents[1].name
    own_list = RECIPES / recipe / (path.relative_to(RECIPES / recipe / "results").parts[0] + ".toml")
    listed = own_list if own_list.is_file() else RECIPES / recipe / "runs.toml"
    if recipe == "demo":  # its runs are named after their methods
        variables = {"METHOD": name.split("_ce")[0]}
    else:
        (run,) = runs.read_runs(listed, TRANSLATION, [1], [name])
        variables = run.own
    now = dry_run(recipe, NAME=name, SEED=1, DATA="DATA", OUT="OUT", **variables)
    was = shlex.split(path.read_text())
    for option, value in (("--codistill-wire-dtype", "fp32"), ("--codistill-alpha-warmup-epochs", "0")):
        if option in now and option not in was:
            at = now.index(option)
            assert now[at : at + 2] == [option, value]
            del now[at : at + 2]
    now = [word.replace(str(ROOT), ".") for word in now]
    assert same_numbers(now) == same_numbers(was)


def same_numbers(words: list[str]) -> list[object]:
    """1 and 1.0 are one value; folders are where somebody put them."""
    read = [float(word) if re.fullmatch(r"-?\d+(\.\d+)?", word) else word for word in words]
    places = [read.index("--save-dir") + 1, read.index("fairseq-train") + 1]
    return [word for i, word in enumerate(read) if i not in places and word not in ("--gpus-per-peer", 0.0, "--cpu")]


def test_gpus_do_not_change_the_batch():
    def launcher(recipe: str = "multi30k_en_de", **variables: object) -> str:
        words = dry_run(recipe, CPU=0, **variables)
        return " ".join(words[1 : words.index("--")]) + " " + " ".join(re.findall(r"--update-freq \d+", " ".join(words)))

    assert launcher(METHOD="single", CUDA_VISIBLE_DEVICES="0,1,2,3") == "--peers 1 --gpus-per-peer 1 --update-freq 1"
    assert launcher(METHOD="codistill", CUDA_VISIBLE_DEVICES="0,1") == "--peers 2 --gpus-per-peer 1 --update-freq 1"
    # Peers may share one GPU; all_reduce may have the two that codistillation has.
    assert launcher(METHOD="codistill", CUDA_VISIBLE_DEVICES="0") == "--peers 2 --update-freq 1"
    assert launcher(METHOD="all_reduce", CUDA_VISIBLE_DEVICES="0,1") == "--peers 1 --gpus-per-peer 1 --update-freq 2"
    two = dict(GPUS_PER_PEER=2, CUDA_VISIBLE_DEVICES="0,1")
    assert launcher(METHOD="all_reduce", **two) == "--peers 1 --gpus-per-peer 2 --update-freq 1"
    # A recipe whose batch is of many workers takes all GPUs that it finds.
    for gpus in (1, 2, 4, 8, 16, 128):
        per_peer = max(gpus // 2, 1)
        option = "" if gpus == 1 else f" --gpus-per-peer {per_peer}"
        assert launcher("wmt16_en_de", GPUS=gpus) == f"--peers 2{option} --update-freq {64 // per_peer}"
        told = launcher("wmt16_en_de", GPUS=gpus, METHOD="all_reduce")
        assert told == f"--peers 1 --gpus-per-peer {gpus} --update-freq {128 // gpus}"


def test_before_training_the_cost_is_told():
    common = dict(recipe="wmt16_en_de", DATA="data", OUT="runs", DRY_RUN=1, GPUS=8)
    told = script("train.sh", **common).stderr
    assert "2 peers x 4 GPUs x update-freq 16: at most 458,752" in told and "GPU-hours (estimate for V100s" in told
    assert "checkpoints of 2.5 GB" in told and "2.12" in told
    assert "100,000 a second" in script("train.sh", **common, GPU_TOKENS_PER_SECOND=100000).stderr


@pytest.mark.parametrize(
    "recipe, variables, words",
    [
        ("multi30k_en_de", dict(METHOD="bagging"), ["METHOD", "rdrop_all_reduce", "bagging"]),
        ("multi30k_en_de", dict(DATA=""), ["DATA", "multi30k.py"]),
        ("iwslt14_de_en", dict(DATA=""), ["DATA", "prepare.py iwslt14_de_en"]),
        ("multi30k_en_de", dict(DATA="nowhere"), ["DATA", "nowhere"]),
        ("multi30k_en_de", dict(OUT=""), ["OUT", "not set"]),
        ("multi30k_en_de", dict(PEERS="two"), ["PEERS", "two"]),
        ("multi30k_en_de", dict(SEED="-1"), ["SEED", "-1"]),
        ("wmt16_en_de", dict(UPDATES="many"), ["UPDATES", "many"]),
        ("wmt16_en_de", dict(PEERS=3), ["WORKERS", "multiple of PEERS=3", "128"]),
        ("iwslt14_de_en", dict(EVAL_BLEU="yes"), ["EVAL_BLEU must be 0 or 1, but is yes"]),
        ("iwslt14_de_en", dict(EVAL_BLEU=1, BEAM="wide"), ["BEAM must be a whole number of at least 1, but is wide"]),
        ("iwslt14_de_en", dict(EVAL_BLEU=1, SUBWORDS="words"), ["SUBWORDS must be bpe or sentencepiece, but is words"]),
        ("iwslt14_de_en", dict(EVAL_BLEU=1, TOKENIZER="mecab"), ["TOKENIZER must be moses or none, but is mecab"]),
        ("wmt16_en_de", dict(PRECISION="fp8"), ["PRECISION", "fp16 or fp32", "fp8"]),
        ("wmt16_en_de", dict(CPU=0, GPUS=0), ["PRECISION=fp16 needs a GPU", "CPU=1"]),
        ("wmt16_en_de", dict(CPU=0, GPUS=6), ["GPUS_PER_PEER must divide", "1, 2, 4, 8, 16, 32, 64", "is 3", "6 GPUs"]),
        ("wmt16_en_de", dict(CPU=0, GPUS=2, GPUS_PER_PEER=4), ["needs 8 GPUs, but there are 2"]),
        ("multi30k_en_de", dict(CPU=0, GPUS=8, GPUS_PER_PEER=3), ["GPUS_PER_PEER must divide", "one of 1, but is 3"]),
        ("own", dict(), ["DATA must be a folder made by data_prep/prepare.py own, but data is not"]),
    ],
)
def test_train_refuses(recipe, variables, words, tmp_path):
    result = script("train.sh", recipe=recipe, **{"DATA": "data", "OUT": tmp_path, "CPU": 1, **variables})
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_a_run_is_not_continued_with_another_command(prepared, tmp_path):
    common = dict(METHOD="single", DATA=prepared, OUT=tmp_path, CPU=1, CODISTILL_LAUNCH="false")
    assert script("train.sh", **common).returncode == 1  # begun, and failed as `false` does
    result = script("train.sh", **common, LR="0.1")
    assert result.returncode == 2 and "another command" in result.stderr
    assert not (tmp_path / "single/seed1/finished").exists()


@pytest.mark.parametrize(
    "variables, arguments, word",
    [
        ({}, "", "runs/"),
        ({"DATA": ""}, "", "DATA"),
        ({}, "x", "no peer"),
        ({"AVERAGE": "ten"}, "x", "AVERAGE must be a whole number of at least 0, but is ten"),
        ({"BEAM": "0"}, "x", "BEAM must be a whole number of at least 1, but is 0"),
        ({"SUBWORDS": "words"}, "x", "SUBWORDS"),
    ],
)
def test_evaluate_refuses(variables, arguments, word, prepared):
    result = script("evaluate.sh", *arguments.split(), **{"DATA": prepared, **variables})
    assert result.returncode == 2 and word in result.stderr and result.stderr.count("\n") == 1, result.stderr


# --- sweep.py ---------------------------------------------------------------------------------------------------------


LISTS = [path for path in RECIPES.glob("*_*_*/*.toml") if path.name != tasks.FILE]


@pytest.mark.parametrize("path", sorted(LISTS), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_listed_run_has_a_command(path):
    listed, recipe = runs.read_runs(path, TRANSLATION, [1, 2], []), path.parent.name
    told = {" ".join(dry_run(recipe, NAME="x", **dict(word.split("=", 1) for word in run.variables))) for run in listed}
    assert len(told) == len(listed) // 2, "two lines of one file are the same run"


def test_a_star_is_for_every_run_below_it(tmp_path):
    listed = tmp_path / "runs.txt"
    listed.write_text("first METHOD=single\n* LR=1 EXTRA='--fp16 --amp'\nsecond METHOD=rdrop LR=2\n")
    first, second = runs.read_runs(listed, TRANSLATION, [1], [])
    assert first.variables == ("METHOD=single",)
    assert dict(word.split("=", 1) for word in second.variables) == {"LR": "2", "EXTRA": "--fp16 --amp", "METHOD": "rdrop"}
    assert second.environment(tmp_path, tmp_path)["LR"] == "2"


def test_sweep_refuses(prepared, tmp_path, refused):
    listed = tmp_path / "runs.txt"
    common = ["--recipe", str(RECIPE), "--data", str(prepared), "--out", str(tmp_path), "--runs", str(listed)]
    listed.write_text("# none\nfine METHOD=single EXTRA='--clip-norm 1'\nmse ALPAH=1\n")
    refused(sweep.main(common), "runs.txt:3", "ALPAH=1")
    listed.write_text("same METHOD=single\nsame METHOD=rdrop\n")
    refused(sweep.main(common), "runs.txt:2", "same")
    listed.write_text("single METHOD=single\n")
    refused(sweep.main([*common, "--only", "double"]), "--only", "double")
    refused(sweep.main([*common, "--jobs", "0"]), "--jobs")
    refused(sweep.main(["--recipe", str(RECIPE), "--data", str(tmp_path), "--out", str(tmp_path)]), "--data")
    refused(sweep.main(["--recipe", str(tmp_path), "--data", str(prepared), "--out", str(tmp_path)]), "--recipe", "train.sh")


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
PROGRAMS = dict(CODISTILL_LAUNCH="fairseq_codistill.launch", SACREBLEU="sacrebleu")
TINY.update({name: f"{sys.executable} -m {module}" for name, module in PROGRAMS.items()}, PYTHON=sys.executable)
TINY.update(FAIRSEQ_TRAIN="fairseq-train", FAIRSEQ_GENERATE="fairseq-generate")


@pytest.fixture(scope="module")
def swept(prepared, tmp_path_factory):
    """A sweep of two methods with the real programs; its folder."""
    out = tmp_path_factory.mktemp("sweep")
    (out / "runs.txt").write_text("single METHOD=single\ncodistill_ce METHOD=codistill DISTANCE=ce\n")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setenv(name, str(value))
        command = ["--recipe", str(RECIPE), "--data", str(prepared), "--out", str(out / "runs"), "--seeds", "5"]
        command += ["--runs", str(out / "runs.txt"), "--jobs", "2", "--results", str(out / "results")]
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
    words = ["-m", "fairseq_codistill.report.main", str(swept / "results"), "--out", str(tmp_path / "report")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "codistill_ce" in result.stdout and "single" in result.stdout


# --- subwords of BPE, Moses' tokens, averaged checkpoints --------------------------------------------------------------


def write_ted(folder: Path) -> Path:
    """IWSLT'14 as it is published, unpacked: training text with metadata lines, test sets as XML."""
    draw = random.Random(3)
    words = {"de": "ein Mann Hund rot läuft sieht das Haus".split(), "en": "a man's dog red-hot runs sees the house".split()}
    folder.mkdir()
    for language in ("de", "en"):
        draw.seed(3)
        lines = [" ".join(draw.choices(words[language], k=draw.randint(4, 8))).capitalize() + "!" for _ in range(140)]
        head = ["<url>http://x</url>", "<keywords>k</keywords>", "<title>t</title>"]
        parallel_text.write_lines(folder / f"train.tags.de-en.{language}", head + lines[:100])
        for number, name in enumerate(("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")):
            of_set = lines[100 + 2 * number : 102 + 2 * number]
            segments = [f'<seg id="{i}"> {line} </seg>' for i, line in enumerate(of_set, 1)]
            text = ['<mteval><srcset><doc docid="1">', *segments, "</doc></srcset></mteval>"]
            parallel_text.write_lines(folder / f"IWSLT14.{name}.de-en.{language}.xml", text)
    return folder


@pytest.fixture(scope="module")
def scored(warm_scripts, tmp_path_factory):
    """iwslt14_de_en from published texts to scores.md, BLEU choosing the checkpoint: its data and its run."""
    folder = tmp_path_factory.mktemp("iwslt")
    options = ["--source", str(write_ted(folder / "texts")), "--out", str(folder / "data"), "--vocab", "30", "--jobs", "1"]
    assert prepare_corpus.main(["iwslt14_de_en", *options]) == 0
    tiny = {**TINY, "KEEP": 3, "AVERAGE": 2, "NLL_SETS": "", "TOKENS": 400, "SYNC": 1, "SEED": 1, "EVAL_BLEU": 1}
    del tiny["TEST_SETS"]
    tiny["FAIRSEQ_GENERATE"] += " --max-len-b 20"
    for name, arguments in (("train.sh", []), ("evaluate.sh", [str(folder / "runs/codistill_mse/seed1")])):
        result = script(name, *arguments, recipe="iwslt14_de_en", DATA=folder / "data", OUT=folder / "runs", **tiny)
        assert result.returncode == 0, result.stderr
    return folder / "data", folder / "runs/codistill_mse/seed1", result.stdout


def test_from_published_texts_to_scores(scored):
    data, run, told = scored
    table = (run / "scores.md").read_text()
    assert table in told
    rows = {line.split(" | ")[0]: line.count("|") for line in table.splitlines() if line.startswith("| test")}
    # sacreBLEU and the field's tokenised one, each for two peers, their mean and their ensemble.
    assert rows == {"| test_average2 BLEU": 6, "| test_tokenised_average2 BLEU": 6}
    scores = {path.name: json.loads(path.read_text()) for path in run.glob("ensemble.*.sacrebleu.json")}
    assert "case:lc" in scores["ensemble.test_average2.sacrebleu.json"]["signature"]
    assert "tok:13a" in scores["ensemble.test_average2.sacrebleu.json"]["signature"]
    assert "tok:none" in scores["ensemble.test_tokenised_average2.sacrebleu.json"]["signature"]


def test_bleu_has_chosen_the_checkpoint(scored, tmp_path, capsys):
    import torch

    _, run, _ = scored
    for peer in ("peer0", "peer1"):
        bleus = re.findall(r'"valid_bleu": "([0-9.]+)"', (run / peer / "train.log").read_text())
        assert len(bleus) == 3
        best = torch.load(run / peer / "checkpoint_best.pt", weights_only=True)["extra_state"]["best"]
        assert best == max(map(float, bleus))
    assert report.main([str(run), "--out", str(tmp_path)]) == 0
    assert "best valid bleu" in capsys.readouterr().out


def test_what_is_scored_is_text(scored):
    data, run, _ = scored
    at = run / "peer0/test_average2"
    tokens = generated.sentences(at.with_suffix(".generate.log"), "H")
    assert parallel_text.read_lines(at.with_suffix(".hyp")) == generated.detokenise(tokens, "en")
    assert parallel_text.read_lines(run / "peer0/test_tokenised_average2.hyp") == tokens
    assert len(tokens) == 10 and not any("@@" in line for line in tokens)
    # The references: as published, and as Moses' tokens in lower case.
    raw = parallel_text.read_lines(data / "raw/test.en")
    reference = parallel_text.read_lines(run / "peer0/test_tokenised_average2.ref")
    assert [line.lower() for line in raw] == generated.detokenise(reference, "en")
    assert any("&apos;" in line for line in reference) and any(line != line.lower() for line in raw)


def test_what_was_scored_can_be_tested_for_significance(scored, tmp_path, capsys):
    """The report finds hypotheses and references as evaluate.py leaves them, and computes the BLEU that was recorded."""
    data, run, _ = scored
    recorded = [json.loads((run / f"peer{i}/test_average2.sacrebleu.json").read_text())["score"] for i in (0, 1)]
    assert parallel_text.read_lines(run / "peer1/test_average2.ref") == parallel_text.read_lines(data / "raw/test.en")
    peers = [f"{name}={run / name / 'train.log'}" for name in ("peer0", "peer1")]
    assert report.main([*peers, "--baseline", "peer0", "--out", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "results.json").read_text())["significance"]
    scores = [one["score"] for one in told if (one["test"], one["metric"]) == ("test_average2", "BLEU")]
    assert scores == pytest.approx(recorded, abs=0.06) and told[-1]["p"] > 0
    assert "test_tokenised_average2 BLEU against peer0" in capsys.readouterr().out


def test_the_scored_model_is_the_average_of_the_last_two(scored):
    import torch

    _, run, _ = scored
    for peer in ("peer0", "peer1"):
        states = [checkpoint(path)["model"] for path in sorted((run / peer).glob("checkpoint_*_*.pt"))]
        assert len(states) == 3
        mean = checkpoint(run / peer / "checkpoint_average2.pt")["model"]
        for name, tensor in mean.items():
            if tensor.is_floating_point() and "_float_tensor" not in name:
                torch.testing.assert_close(tensor, (states[-2][name] + states[-1][name]) / 2)
        assert any(not torch.equal(mean[name], states[-1][name]) for name in mean)
        assert "checkpoint_average2.pt" in (run / peer / "test_average2.generate.log").read_text()


def news_texts() -> dict:
    """A file for each set and language of newstest, plain."""
    sets = [part.name for parts in corpora.NEWSTEST.splits.values() for part in parts]
    pairs = made.grammar_pairs(20 * len(sets), seed=20)
    drawn = {name: pairs[20 * number : 20 * number + 20] for number, name in enumerate(sets)}
    sides = ((0, "en"), (1, "de"))
    return {f"{name}.{language}": made.plain_text([pair[i] for pair in drawn[name]]) for name in sets for i, language in sides}


HAS_RDROP = importlib.util.find_spec("fairseq.criterions.label_smoothed_cross_entropy_with_rdrop")  # not in stock 0.12.2
# Of each other recipe: its published files, options of prepare.py, a method, and what scores.md must have.
BLEU, NLL = ["test_average2 BLEU"], ["valid_average2 NLL", "test_average2 NLL"]
FROM_ARCHIVES = {
    "wmt16_en_de": (made.wmt16_archives, ["--vocab", "60"], "codistill", BLEU),
    "tatoeba_de_en": (
        lambda: {"deu-eng.zip": made.tatoeba_zip(made.tatoeba_rows())},
        ["--vocab", "100", "--held-out", "9"],
        "all_reduce",
        BLEU + NLL,
    ),
    "newstest_de_en": (news_texts, ["--vocab", "100"], "rdrop" if HAS_RDROP else "single", BLEU + NLL),
    "own": (made.own_texts, ["--vocab", "100", "--held-out", "9"], "codistill", BLEU + NLL),
}


@pytest.mark.parametrize("recipe", FROM_ARCHIVES)
def test_every_other_recipe_from_archives_to_scores(recipe, tmp_path):
    files, options, method, expected = FROM_ARCHIVES[recipe]
    source, data = tmp_path / "source", tmp_path / "data"
    source.mkdir()
    for name, content in files().items():
        (source / name).write_bytes(content)
    where = ["--source", str(source)]
    if recipe == "own":
        where = ["--source", "xx", "--target", "yy", "--train", str(source / "all")]
    assert prepare_corpus.main([recipe, *where, "--out", str(data), "--jobs", "1", *options]) == 0
    tiny = {**TINY, "METHOD": method, "WORKERS": 2, "PRECISION": "fp32", "KEEP": 2, "AVERAGE": 2, "SEED": 1, "RDROP_ALPHA": 1}
    tiny.update(DATA=data, OUT=tmp_path / "runs")
    del tiny["TEST_SETS"], tiny["NLL_SETS"]
    if expected == BLEU:
        tiny["NLL_SETS"] = ""
    tiny["FAIRSEQ_GENERATE"] += " --max-len-b 10"
    result = script("train.sh", recipe=recipe, **tiny)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").glob("*/seed1")
    result = script("evaluate.sh", str(run), recipe=recipe, **tiny)
    assert result.returncode == 0, result.stderr
    table = (run / "scores.md").read_text().splitlines()
    rows = [line.split(" | ")[0].strip("| ") for line in table if line.startswith(("| test", "| valid"))]
    assert sorted(rows) == sorted(expected)
    for peer in ("peer0", "peer1") if method == "codistill" else ("peer0",):
        hypotheses = parallel_text.read_lines(run / peer / "test_average2.hyp")
        assert len(hypotheses) == json.loads((data / "manifest.json").read_text())["pairs"]["test"]


def test_evaluate_shows_its_commands(scored):
    data, run, _ = scored
    result = script("evaluate.sh", str(run), recipe="iwslt14_de_en", DATA=data, DRY_RUN=1, AVERAGE=0, FAIRSEQ_GENERATE="")
    assert result.returncode == 0, result.stderr
    commands = [shlex.split(line) for line in result.stdout.splitlines()]
    # For each peer and the ensemble: a translation, two scores; and two reference scorings.
    assert [words[0] for words in commands] == (["fairseq-generate"] + ["sacrebleu"] * 2 + ["fairseq-generate"] * 2) * 3
    words = " ".join(commands[10])
    assert f"--path {run}/peer0/checkpoint_best.pt:{run}/peer1/checkpoint_best.pt" in words
    assert "--remove-bpe subword_nmt" in words


def test_too_few_checkpoints_are_refused(scored):
    data, run, _ = scored
    result = script("evaluate.sh", str(run), recipe="iwslt14_de_en", DATA=data)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "AVERAGE must be at most 3" in result.stderr
