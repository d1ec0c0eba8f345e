"""What only a GPU can show: precisions, the copy beside the training, an update that runs out of memory, NCCL.

`make gpu` runs these; without a GPU they are skipped.
"""

import time

import pytest
import torch
from fairseq_runs import (
    CODISTILL,
    LOCKSTEP,
    Job,
    checkpoint,
    column,
    free_port,
    peer_environment,
    taught,
    train_words,
)  # fmt: skip
from safetensors.torch import load

from fairseq_codistill.exchange.snapshot import Buffer, tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")]


def gpu_words(*arguments, **more):
    return [word for word in train_words(*arguments, **more) if word != "--cpu"]


def gpu_peers(data, out, *options, user_dir=None):
    """Two peers that share the one GPU; their logs."""
    jobs = []
    for peer in range(2):
        words = gpu_words(data, out / f"peer{peer}", *options, f"--seed {1 + 10_000_000 * peer}")
        if user_dir:
            words[words.index("--user-dir") + 1] = str(user_dir)
        jobs.append(Job(words, peer_environment(peer, 2, out / "exchange")))
    return [job.finish() for job in jobs]


# fairseq's --bf16 means a TPU on its command line.
@pytest.mark.parametrize("precision", ["", "--fp16", "--memory-efficient-fp16", "--amp"])
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_two_peers_on_one_gpu(data, tmp_path, precision, loss):
    options = f"--max-update 24 --codistill-loss {loss} --codistill-alpha 0.3 {precision}"
    for log in gpu_peers(data, tmp_path, LOCKSTEP, options):
        assert len(taught(log)) >= 18, "each update after the first exchange, but for fp16's first overflows"
        losses = column(log, "train_inner", "nll_loss") or column(log, "train_inner", "loss")
        assert losses[-1] < losses[0] and "no longer listened to" not in log
        assert column(log, "valid", "valid_loss")[-1] < 6.5
    assert "nan" not in log


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_peers_in_another_precision(data, tmp_path, dtype):
    options = f"--max-update 12 --fp16 --codistill-peer-dtype {dtype}"
    assert all(len(taught(log)) >= 6 for log in gpu_peers(data, tmp_path, LOCKSTEP, options))


def test_alpha_0_is_cross_entropy(data, tmp_path):
    """Not to the bit: a GPU adds in an order of its own."""
    plain = Job(gpu_words(data, tmp_path / "plain", "--criterion cross_entropy --max-update 12 --seed 1")).finish()
    words = gpu_words(data, tmp_path / "ours", LOCKSTEP, "--codistill-alpha 0 --max-update 12 --seed 1")
    ours = Job(words, peer_environment(0, 1, tmp_path / "exchange")).finish()
    want = column(plain, "valid", "valid_loss")
    assert want and column(ours, "valid", "valid_loss") == pytest.approx(want, rel=1e-3)


def test_resume(data, tmp_path):
    first = gpu_peers(data, tmp_path, LOCKSTEP, "--fp16 --max-update 12 --save-interval-updates 4")
    again = gpu_peers(data, tmp_path, LOCKSTEP, "--fp16 --max-update 20 --save-interval-updates 4")
    for before, after in zip(first, again):
        assert "Loaded checkpoint" in after and len(taught(after)) >= 7
        assert min(column(after, "train_inner", "num_updates")) > max(column(before, "train_inner", "num_updates"))


def test_a_group_of_one_over_nccl(data, tmp_path):
    group = "--distributed-world-size 1 --distributed-rank 0 --distributed-no-spawn --distributed-backend nccl"
    jobs = []
    for peer in range(2):
        address = f"--distributed-init-method tcp://127.0.0.1:{free_port()} --ddp-backend pytorch_ddp"
        options = f"--max-update 12 --seed {1 + peer * 10_000_000}"
        words = gpu_words(data, tmp_path / f"peer{peer}", LOCKSTEP, options, group, address)
        jobs.append(Job(words, peer_environment(peer, 2, tmp_path / "exchange")))
    assert all(len(taught(job.finish())) >= 8 for job in jobs)


FULL = '''"""codistill_ce whose fifth update asks for more memory than any GPU has."""
import torch
from fairseq_codistill.criterion import CodistillCriterion

forward, calls = CodistillCriterion.forward, []

def greedy(self, model, sample, reduce=True):
    if model.training:
        calls.append(1)
        if len(calls) == 5:
            torch.empty(1 << 50, device="cuda")
    return forward(self, model, sample, reduce)

CodistillCriterion.forward = greedy
'''


def test_an_update_that_runs_out_of_memory(data, tmp_path):
    """fairseq leaves it out; the exchange and the teaching go on."""
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin/__init__.py").write_text(FULL)
    options = "--max-update 12 --codistill-alpha 0.3"
    for log in gpu_peers(data, tmp_path, CODISTILL, "--codistill-wait 60", options, user_dir=tmp_path / "plugin"):
        assert "attempting to recover from OOM" in log and "codistill_loss" in log
        assert max(column(log, "train_inner", "num_updates")) == 12


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_the_copy_beside_the_training_is_of_one_update(wire):
    """The copy to main memory runs in a stream of its own; what the next update writes is not in it."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(2048, 4096), torch.nn.Linear(4096, 2048)).cuda()
    expected = tensors_of(model)
    buffer = Buffer(expected, wire)
    for update in range(1, 6):
        want = {name: tensor.detach().to(wire).cpu() for name, tensor in tensors_of(model).items()}
        torch.cuda._sleep(20_000_000)  # the training stream is behind, as it is in the middle of an update
        wait = buffer.fill(tensors_of(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5).add_(1)
        wait()
        got = load(bytes(buffer.data))
        assert all(torch.equal(got[name], want[name]) for name in want), update


def test_training_is_not_held_up_by_the_copy(data, tmp_path):
    start = time.monotonic()
    options = "--max-update 40 --codistill-interval 2"
    logs = gpu_peers(data, tmp_path, CODISTILL, "--codistill-wait 60", options)
    assert all("Traceback" not in log for log in logs) and time.monotonic() - start < 200
    assert checkpoint(tmp_path / "peer0/checkpoint_last.pt")["model"]
