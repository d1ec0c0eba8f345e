"""How a training ends, in every way that fairseq is started: the last snapshot and "ended" after a whole one, and only then."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from fairseq_runs import CODISTILL, DEADLINE, PLUGIN, ROOT, free_port, peer_environment, preprocess, train_words
from s3_server import s3_server
from test_training import HYDRA

from fairseq_codistill import ending
from fairseq_codistill.exchange import Exchange
from fairseq_codistill.stores import open_store

PROGRAM = Path(sys.executable).parent  # where the commands are installed
# On CPUs fairseq spawns as many ranks as there are GPUs, that is none; everything else is as on a machine that has them.
SPAWN = "import torch; torch.cuda.device_count = lambda: {ranks}; from fairseq_cli.train import cli_main; cli_main()"


def start(words, log, environment, cwd=None):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CODISTILL_")}
    clean["PATH"] = f"{PROGRAM}{os.pathsep}{clean['PATH']}"
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(log, "w") as output:
        return subprocess.Popen(
            list(map(str, words)), env={**clean, **environment}, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, cwd=cwd,
        )  # fmt: skip


@pytest.fixture(scope="module")
def ways(data, raw, tmp_path_factory):
    """Each way of starting fairseq, as a user does it, all at once: of each its exit status, log, and exchange."""
    out = tmp_path_factory.mktemp("ways")
    lm = preprocess(raw, out / "lm", "--only-source", suffix=".b")
    with s3_server() as server:
        url = server.bucket() + "/run"
        jobs = {name: start(words, out / name, environment) for name, words, environment in _jobs(data, lm, out, server, url)}
        statuses = {name: job.wait(DEADLINE) for name, job in jobs.items()}
        stores = {name: open_store(url if name == "python-m-over-s3" else str(out / f"x-{name}")) for name in jobs}
        yield {name: (statuses[name], (out / name).read_text(), stores[name]) for name in jobs}


def _jobs(data, lm, out, server, url):
    def own(name):
        return peer_environment(0, 2, out / f"x-{name}")

    def words(name, *more):
        return train_words(data, out / f"save-{name}", CODISTILL, "--max-update 6 --disable-validation", *more)[1:]

    def spawned(name, ranks):
        group = f"--distributed-world-size {ranks} --distributed-init-method tcp://127.0.0.1:{free_port()}"
        group += " --distributed-backend gloo --ddp-backend legacy_ddp"
        return [sys.executable, "-c", SPAWN.format(ranks=ranks), *words(name, group)]

    def unsaveable(name):
        """The checkpoint that is written at the end cannot be: something else has its name."""
        (out / f"save-{name}/checkpoint_last.pt.tmp/x").mkdir(parents=True)
        return name

    def hydra(name):
        return ["--config-dir", out / "config", "--config-name", "tiny", f"task.data={data}", f"common.user_dir={PLUGIN}",
                f"checkpoint.save_dir={out}/save-{name}", "dataset.disable_validation=true"]  # fmt: skip

    (out / "config").mkdir()
    tiny = HYDRA.replace("codistill_sync: true, codistill_wait: 120", "codistill_wait: 0")
    (out / "config/tiny.yaml").write_text(tiny)
    lm_model = "--task masked_lm --arch roberta_base --encoder-layers 1 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 "
    lm_model += "--encoder-attention-heads 2 --sample-break-mode eos --tokens-per-sample 64"
    masked = train_words(lm, out / "save-fairseq-train", CODISTILL, "--max-update 6", model=lm_model)
    s3 = [sys.executable, "-m", "fairseq_cli.train", *words("s3")]
    yield "fairseq-train", masked, own("fairseq-train")
    yield "python-m-over-s3", s3, {**peer_environment(0, 2, url), **server.environment}
    launch = ["codistill-launch", "--peers", "2", "--gpus-per-peer", "0", "--max-restarts", "0"]
    yield (
        "launcher-and-hydra",
        [*launch, "--", "fairseq-hydra-train", *hydra("launcher"), f"+criterion.codistill_dir={out}/x-launcher-and-hydra"],
        {},
    )
    yield "spawned", spawned("spawned", 2), own("spawned")
    name = unsaveable("spawned-unsaved")
    yield name, spawned(name, 1), own(name)
    name = unsaveable("hydra-unsaved")
    yield name, ["fairseq-hydra-train", *hydra(name), f"hydra.run.dir={out}/hydra"], own(name)


@pytest.mark.parametrize("way", ["fairseq-train", "python-m-over-s3", "launcher-and-hydra", "spawned"])
def test_the_last_weights_and_ended_are_published(ways, way):
    status, log, store = ways[way]
    assert status == 0, log[-3000:]
    for peer in (0, 1) if way == "launcher-and-hydra" else (0,):
        exchange = Exchange(store, 5)
        newest = exchange.newest(peer)
        assert (newest.update, newest.done) == (6, True) and exchange.presence(peer).state == "ended", log[-3000:]
        assert exchange.fetch(peer, newest, newest.fingerprint, _any_of(store, peer, newest))


@pytest.mark.parametrize("way", ["spawned-unsaved", "hydra-unsaved"])
def test_a_training_whose_checkpoint_cannot_be_saved_is_not_completed(ways, way):
    status, log, store = ways[way]
    assert status == 1 and "done training" not in log, log[-3000:]
    exchange = Exchange(store, 5)
    assert not exchange.newest(0).done and exchange.presence(0).state == "stopped"
    Exchange(store, 0).begin(0, exchange.newest(0).fingerprint)  # and may be started again from scratch


def _any_of(store, peer, manifest):
    """The tensors that a snapshot holds, as what is expected of it."""
    from safetensors.torch import load

    return load(bytes(store.read(f"peer{peer}/{manifest.file}", manifest.bytes)))
