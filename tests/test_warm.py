"""The stand-ins of fairseq's commands: to whoever starts them they are the commands."""

from __future__ import annotations

import signal
import subprocess

import pytest
from fairseq_runs import CODISTILL, train_words


def test_streams_status_folder_and_environment(warm, data, tmp_path):
    done = subprocess.run([warm / "fairseq-train", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:20]) == (0, "usage: fairseq-train")
    done = subprocess.run([warm / "fairseq-train", "--no-such-option"], capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError" in done.stderr and "RuntimeError" not in done.stdout
    words = train_words(data, "here", CODISTILL, "--max-update 1 --disable-validation")[1:]
    environment = {"CODISTILL_PEER": "2", "CODISTILL_PEERS": "2", "CODISTILL_DIR": "x"}
    done = subprocess.run([warm / "fairseq-train", *words], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and "codistill_peer" in done.stderr, done.stderr
    environment["CODISTILL_PEER"] = "1"
    subprocess.run([warm / "fairseq-train", *words], check=True, capture_output=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "here/checkpoint_last.pt").is_file() and (tmp_path / "x/peer1/latest.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_both(warm, data, tmp_path, number):
    words = train_words(data, tmp_path, CODISTILL, "--max-update 1000000 --no-save --disable-validation")[1:]
    job = subprocess.Popen([warm / "fairseq-train", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while '"num_updates": "3"' not in job.stdout.readline():
        assert job.poll() is None
    job.send_signal(number)
    job.stdout.read()  # ends when nobody holds it any more
    assert job.wait() == -number
