"""Codistillation in real fairseq processes: exactness, lockstep, resuming, precisions, groups, tasks and architectures."""

import json
import re
import resource
import signal

import fairseq
import pytest
from fairseq_runs import (
    CODISTILL,
    LOCKSTEP,
    MODEL,
    PLUGIN,
    Job,
    checkpoint,
    column,
    command,
    peer_environment,
    preprocess,
    rows,
    same,
    start_group,
    start_peers,
    taught,
    train,
    train_peers,
    train_words,
    weights,
)
from s3_server import ACCESS_KEY, SECRET_KEY, s3_server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fairseq_codistill.exchange.exchange import Exchange
from fairseq_codistill.exchange.snapshot import checksum
from fairseq_codistill.exchange.stores import open_store

# fairseq ≥ 2023 shuffles an epoch's batches by seed and epoch, but keeps the first epoch's for the others unless told
# otherwise: without this a resumed run, plain or codistilled, sees other batches than one that was never stopped.
EXACT_RESUME = "--update-epoch-batch-itr True"

EVERY_SENTENCE = ("--required-batch-size-multiple", "1")  # fairseq ≥ 2023 drops what is left after a multiple of 8


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run of plain cross entropy: its log, and its last checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    return train(data, folder, "--criterion cross_entropy --max-update 8 --dropout 0.2"), folder / "checkpoint_last.pt"


def check_equal(log, checkpoint_path, plain):
    plain_log, plain_checkpoint = plain
    for name in ("valid_loss", "valid_ppl"):
        assert column(log, "valid", name) == column(plain_log, "valid", name)
    for name in ("loss", "ppl", "gnorm"):
        assert column(log, "train_inner", name) == column(plain_log, "train_inner", name)
    assert same(weights(checkpoint_path), weights(plain_checkpoint))
    assert not taught(log)


def test_alone_it_is_cross_entropy_to_the_bit(data, tmp_path, plain):
    log = train(data, tmp_path, CODISTILL, "--max-update 8 --dropout 0.2")
    check_equal(log, tmp_path / "checkpoint_last.pt", plain)
    assert log.count("no peers are configured") == 1


@pytest.mark.parametrize("nothing", ["--codistill-alpha 0", "--codistill-burn-in 8"])
def test_without_alpha_it_is_cross_entropy_to_the_bit(data, tmp_path, plain, nothing):
    log = train_peers(data, tmp_path, LOCKSTEP, nothing, "--max-update 8 --dropout 0.2")[0]
    check_equal(log, tmp_path / "peer0/checkpoint_last.pt", plain)
    assert "learning from peer 1" in log, "snapshots are exchanged; they only do not teach yet"


def test_two_peers_teach_each_other_and_the_checkpoint_is_plain(data, tmp_path, plain):
    logs = train_peers(data, tmp_path / "run", LOCKSTEP, f"--max-update 12 --tensorboard-logdir {tmp_path}/board")
    for log in logs:
        assert len(taught(log)) == 8, "no snapshot of update 0 teaches; from update 4 on each update is taught"
        assert column(log, "train_inner", "codistill_staleness") == [0, 1, 2, 3, 0, 1, 2, 3]
        for row in rows(log, "train_inner")[4:]:
            assert row["loss"] == pytest.approx(row["nll_loss"] + row["codistill_alpha"] * row["codistill_loss"], abs=2e-3)
            assert 0 <= row["codistill_agreement"] <= 1
        assert not any("codistill" in name for row in rows(log, "valid") for name in row)
    board = EventAccumulator(str(tmp_path / "board/train_inner")).Reload().Tags()["scalars"]
    assert {f"codistill_{name}" for name in ("loss", "alpha", "staleness", "agreement")} <= set(board)
    trained, reference = checkpoint(tmp_path / "run/peer0/checkpoint_last.pt"), checkpoint(plain[1])
    assert trained.keys() == reference.keys() and trained["model"].keys() == reference["model"].keys()
    assert trained["criterion"] is None and trained["task_state"] == reference["task_state"]
    assert not same(trained["model"], weights(tmp_path / "run/peer1/checkpoint_last.pt")), "peers stay different models"

    path = ("--path", tmp_path / "run/peer0/checkpoint_last.pt", "--cpu", "--user-dir", PLUGIN)
    generated = command("fairseq-generate", data, *path, "--max-len-b", 12)
    assert "Generate test with beam=5: BLEU4" in generated
    # fairseq-validate builds the checkpoint's own criterion; it must not touch the exchange, and give the plain loss.
    validated = command("fairseq-validate", data, "--task", "translation", "--max-tokens", 300, *EVERY_SENTENCE, *path)
    nll = column(logs[0], "valid", "valid_nll_loss")[-1]
    assert f"| nll_loss {nll:g} |" in validated, validated[-2000:]


def test_by_default_the_first_epoch_is_cross_entropy_to_the_bit(data, tmp_path):
    """What is seen for the first time cannot be over-fitted: α grows in, by a quarter in each epoch from the second on."""
    run = "--max-epoch 3 --seed 1"
    alone = Job(train_words(data, tmp_path / "alone", "--criterion cross_entropy", run))
    options = f"--criterion codistill_ce --codistill-interval 2 --codistill-sync --codistill-wait 120 {run}"
    ours = [job.finish() for job in start_peers(data, tmp_path, options)][0]
    valid, plain = (column(log, "valid", "valid_loss") for log in (ours, alone.finish()))
    assert len(valid) == 3 and valid[0] == plain[0] and valid[1] != plain[1]
    alphas = {row["epoch"]: row["codistill_alpha"] for row in rows(ours, "train_inner") if row.get("codistill_alpha")}
    assert alphas == pytest.approx({2: 0.3 * 1.1 / 4, 3: 0.3 * 1.21 / 2}, abs=1e-3)
    assert "α is 0 in epoch 1 and grows in until epoch 5" in ours


def test_its_nll_is_that_of_cross_entropy(data, tmp_path):
    """The checkpoint of a codistilled peer goes on under cross_entropy, with a step of length 0: it has the loss that was
    logged (fairseq-validate would take the checkpoint's own criterion)."""
    log = train_peers(data, tmp_path / "run", LOCKSTEP, "--max-update 6")[0]
    reset = "--reset-optimizer --reset-lr-scheduler --reset-dataloader --reset-meters --max-update 7 --lr 0"
    restore = f"--criterion cross_entropy --restore-file {tmp_path}/run/peer0/checkpoint_last.pt --user-dir {PLUGIN}"
    plain = train(data, tmp_path / "plain", restore, reset)
    assert column(plain, "valid", "valid_loss")[-1] == column(log, "valid", "valid_loss")[-1]


def test_a_ring_in_lockstep_repeats_to_the_bit_and_resumes_as_if_never_killed(data, tmp_path):
    options = (LOCKSTEP, EXACT_RESUME, "--codistill-topology ring --max-update 16 --save-interval-updates 5")
    options += ("--codistill-init shared --codistill-pull 0.5",)
    undisturbed = [train_peers(data, tmp_path / name, *options, peers=3) for name in ("first", "second")]
    jobs = start_peers(data, tmp_path / "killed", *options, peers=3)
    jobs[1].wait_for('"num_updates": "11"')
    for job in jobs:
        job.kill()
    logs = train_peers(data, tmp_path / "killed", *options, peers=3)
    for i in range(3):
        assert column(logs[i], "train_inner", "num_updates")[0] > 5, "it went on from its checkpoint"
        first, second, killed = (weights(tmp_path / n / f"peer{i}/checkpoint_last.pt") for n in ("first", "second", "killed"))
        assert same(first, second)
        if fairseq.__version__ == "0.12.2":  # does not resume to the last bit, with plain cross_entropy neither
            last, again = (column(log, "valid", "valid_loss")[-1] for log in (undisturbed[0][i], logs[i]))
            assert last == pytest.approx(again, abs=0.01)
        else:
            assert same(first, killed)


def test_a_dead_peer_costs_only_its_teaching(data, tmp_path):
    """Peer 1 publishes and ends; peer 0 goes on with what it holds until the staleness guard lets go."""
    one = Job(train_words(data, tmp_path / "peer1", CODISTILL, "--max-update 4"), peer_environment(1, 2, tmp_path / "x"))
    one.finish()
    options = "--max-update 12 --codistill-max-staleness 5 --codistill-wait 60"
    log = train(data, tmp_path / "peer0", CODISTILL, options, environment=peer_environment(0, 2, tmp_path / "x"))
    # It takes the snapshot of update 4 at once, so that is ahead of me at first, and 5 updates old at update 9.
    assert column(log, "train_inner", "codistill_staleness") == [float(update - 4) for update in range(10)]
    assert column(log, "train_inner", "num_updates")[-1] == 12


# Long enough for snapshots to travel while it runs: a hundred updates take two seconds.
BESIDE = f"{CODISTILL} --codistill-wait 120 --log-interval 10 --validate-interval 1000000 --save-interval-updates 50"


def totals(log):
    """What the exchange has cost, as logged at the end."""
    return json.loads(re.search(r"exchange totals (\{.*\})", log)[1])


def test_exchanging_beside_the_training(data, tmp_path):
    """The default: nobody waits for anybody, and what the log says was exchanged lies there."""
    logs = train_peers(data, tmp_path, BESIDE, "--max-update 200 --codistill-interval 20")
    for peer, log in enumerate(logs):
        seen, other = totals(log), totals(logs[1 - peer])
        newest = json.loads((tmp_path / f"exchange/peer{peer}/latest.json").read_text())
        assert newest["done"] and newest["update"] == 200 and newest["dtype"] == "bfloat16"
        assert seen["updates"] == 200 and seen["failed"] == 0 and seen["published"] + seen["skipped"] == 11
        assert seen["published_bytes"] == seen["published"] * newest["bytes"]
        assert 0 <= seen["visible_s"] and 0 < seen["copy_s"] and 0 < seen["hidden_s"]
        assert 1 <= seen["read"] <= other["published"] and seen["read_bytes"] == seen["read"] * newest["bytes"]
        assert len(taught(log)) > 10 and log.count("learning from peer") >= 1
        heartbeat = json.loads((tmp_path / f"exchange/peer{peer}/alive.json").read_text())
        assert heartbeat["state"] == "ended" and heartbeat["updates"] == 200


def test_peers_come_late_die_come_back_and_finish_early(data, tmp_path):
    """A ring of three, in which each learns from the one before: 0 finishes early, 1 is killed and resumes, 2 comes late."""
    lengths = ("--max-update 100", "--max-update 300", "--max-update 250")

    def start(peer):
        words = train_words(
            data, tmp_path / f"peer{peer}", BESIDE.replace("--codistill-wait 120", ""), lengths[peer],
            f"--codistill-interval 20 --codistill-topology ring --seed {1 + peer}",
        )  # fmt: skip
        return Job(words, peer_environment(peer, 3, tmp_path / "exchange"))

    first = [start(0), start(1)]
    first[1].wait_for('"num_updates": "100"')
    first[1].kill()
    late = start(2)
    late.wait_for('"num_updates": "50"')
    back = start(1)
    logs = [first[0].finish(), back.finish(), late.finish()]
    for log, length in zip(logs, lengths):
        assert column(log, "train_inner", "num_updates")[-1] == int(length.split()[1])
    assert column(logs[1], "train_inner", "num_updates")[0] > 50, "it went on from its checkpoint"
    assert "learning from peer 0 as of its update 100" in logs[1], "peer 0 has ended and still teaches"
    assert "learning from peer 1" in logs[2] and len(taught(logs[2])) > 10


def test_sigterm_is_how_a_scheduler_stops_a_peer(data, tmp_path):
    words = train_words(data, tmp_path / "peer0", CODISTILL, "--max-update 1000000 --codistill-interval 1")
    job = Job(words, peer_environment(0, 2, tmp_path / "exchange"))
    job.wait_for('"num_updates": "30"')
    job.signal(signal.SIGTERM)
    assert job.status() == -signal.SIGTERM
    reader = Exchange(open_store(str(tmp_path / "exchange")), 1)
    manifest = reader.newest(0)
    data = (tmp_path / "exchange/peer0" / manifest.file).read_bytes()
    assert checksum(data) == manifest.checksum and manifest.update > 0


@pytest.mark.parametrize("trouble", ["full disk", "read-only directory"])
def test_training_goes_on_where_nothing_can_be_published(data, tmp_path, trouble):
    """From its update 20 on peer 0 can write no more; it trains to the end all the same, and says so once for each."""
    folder = tmp_path / "exchange/peer0"
    options = "--max-update 300 --codistill-interval 20 --no-save --disable-validation"
    words = train_words(data, tmp_path / "peer0", CODISTILL, options)
    job = Job(words, peer_environment(0, 2, tmp_path / "exchange"))
    job.wait_for("published update 20")
    if trouble == "full disk":  # of its process: no file may grow beyond a snapshot's header
        resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (100, 100))
    else:  # root may write where the mode forbids it, so the directory becomes a file
        folder.rename(tmp_path / "away")
        folder.write_text("")
    log = job.finish()
    assert column(log, "train_inner", "num_updates")[-1] == 300
    reasons = {"full disk": "File too large", "read-only directory": "peer0 in \\S+ is no longer the folder .* claimed; .*"}
    assert re.search(f"snapshot of update \\d+ was not published: {reasons[trouble]}; training goes on", log)
    assert totals(log)["failed"] >= 1
    reader = Exchange(open_store(str(tmp_path / "exchange")), 1)
    if trouble == "full disk":
        manifest = reader.newest(0)
        assert checksum((folder / manifest.file).read_bytes()) == manifest.checksum, "what was published before is whole"


def test_two_peers_over_s3(data, tmp_path):
    """A real S3 server on loopback instead of a shared directory; nothing but the URL changes."""
    with s3_server() as server:
        url = server.bucket() + "/run"
        jobs = []
        for peer in range(2):
            words = train_words(data, tmp_path / f"peer{peer}", LOCKSTEP, f"--max-update 12 --seed {1 + peer}")
            jobs.append(Job(words, {**peer_environment(peer, 2, url), **server.environment}))
        logs = [job.finish() for job in jobs]
        for log in logs:
            assert len(taught(log)) == 8 and column(log, "train_inner", "codistill_staleness")[:4] == [0, 1, 2, 3]
            assert SECRET_KEY not in log and ACCESS_KEY not in log
        status = command("codistill-launch", "status", url, "--json", environment=server.environment)
        assert [peer["state"] for peer in json.loads(status)["peers"]] == ["ended", "ended"]


MODES = [
    "--amp",  # idle on a CPU; under an autocast that works: test_fused
    "--codistill-peer-dtype bf16 --update-freq 2", "--codistill-peer-dtype fp16", "--memory-efficient-fp16",
    "--codistill-peer-dtype int8 --share-decoder-input-output-embed",
    "--fp16 --fp16-no-flatten-grads",  # flattened, fairseq's copy of the gradients can live on a GPU alone
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_precisions_and_update_freq(data, tmp_path, mode):
    logs = train_peers(data, tmp_path, LOCKSTEP, "--max-update 6", mode)
    for log in logs:
        assert len(taught(log)) == 2 and all(0 < loss < 50 for loss in taught(log))
        assert column(log, "train_inner", "num_updates")[-1] == 6
        assert log.count("learning from peer") == 1, "one exchange at update 4, whatever the number of micro-batches"


def test_peers_of_two_and_of_three_ranks(data, tmp_path):
    """Each peer is a data-parallel group that all_reduces inside; fairseq itself stops where the ranks' gradients differ."""
    jobs = []
    for peer, (ranks, micro_batches) in enumerate([(2, 1), (3, 2)]):
        environment = peer_environment(peer, 2, tmp_path / "exchange")
        options = (LOCKSTEP, f"--max-update 12 --seed {1 + peer} --update-freq {micro_batches}")
        jobs += start_group(data, tmp_path / f"peer{peer}", *options, ranks=ranks, environment=environment)
    logs = [job.finish() for job in jobs]
    for leader, follower in (logs[:2], logs[2:4]):
        assert len(taught(leader)) == 8
        assert leader.count("learning from peer") == 2 and "published update" not in follower


def test_the_multi_process_restore_loads_safely(data, tmp_path):
    """Resuming a group broadcasts the checkpoint through torch.load: it must work without switching the safety off."""
    for last in (3, 5):
        logs = [job.finish() for job in start_group(data, tmp_path, CODISTILL, f"--max-update {last}")]
    assert column(logs[0], "train_inner", "num_updates") == [4, 5]


ARCHITECTURES = {
    "lstm": "--arch lstm --encoder-embed-dim 16 --encoder-hidden-size 16 --decoder-embed-dim 16 --decoder-hidden-size 16 "
    "--decoder-out-embed-dim 16 --encoder-layers 1 --decoder-layers 1",
    "fconv": "--arch fconv_iwslt_de_en --encoder-embed-dim 16 --decoder-embed-dim 16 --decoder-out-embed-dim 16 "
    "--encoder-layers [(16,3)] --decoder-layers [(16,3)]",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(data, tmp_path, architecture):
    logs = train_peers(data, tmp_path, LOCKSTEP, "--max-update 6", model=ARCHITECTURES[architecture])
    assert all(len(taught(log)) == 2 for log in logs)


@pytest.mark.parametrize("blocks", ["none", "eos"])
def test_language_modeling(raw, tmp_path, blocks):
    data = preprocess(raw, tmp_path / "bin", "--only-source", suffix=".b")
    model = "--task language_modeling --arch transformer_lm --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 "
    model += "--decoder-layers 1 --decoder-attention-heads 2 --tokens-per-sample 32 --sample-break-mode "
    model += f"{blocks} --user-dir {PLUGIN}"
    logs = train_peers(data, tmp_path, LOCKSTEP, "--max-update 6", model=model)
    assert all(len(taught(log)) == 2 for log in logs)
    plain = train(data, tmp_path / "plain", "--criterion cross_entropy --max-update 3", model=model)
    assert column(plain, "train_inner", "ppl") == column(logs[0], "train_inner", "ppl")[:3]


@pytest.fixture(scope="module")
def two_directions(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    preprocess(raw, out / "joined", "-s", "a", "-t", "b", "--joined-dictionary")
    dictionary = str(out / "joined/dict.a.txt")
    for source, target in (("a", "b"), ("b", "a")):
        preprocess(raw, out, "-s", source, "-t", target, "--srcdict", dictionary, "--tgtdict", dictionary)
    return out


def test_multilingual_translation(two_directions, tmp_path):
    model = MODEL.replace("transformer_iwslt_de_en", "multilingual_transformer_iwslt_de_en")
    task = "--task multilingual_translation --lang-pairs a-b,b-a"
    logs = train_peers(two_directions, tmp_path, LOCKSTEP, "--max-update 6", task, model=model)
    assert all(len(taught(log)) == 2 for log in logs)


def test_translation_multi_simple_epoch(two_directions, tmp_path):
    task = "--task translation_multi_simple_epoch --lang-pairs a-b,b-a --langs a,b --encoder-langtok tgt"
    logs = train_peers(two_directions, tmp_path, LOCKSTEP, "--max-update 6", task)
    assert all(len(taught(log)) == 2 for log in logs)


# On fairseq-train's command line --bf16 means a TPU; in a config it does not.
@pytest.mark.parametrize("precision", ["", "bf16: true, fp16_no_flatten_grads: true,", "memory_efficient_bf16: true,"])
def test_hydra_train(data, tmp_path, precision):
    (tmp_path / "config").mkdir()
    (tmp_path / "config/tiny.yaml").write_text(HYDRA.replace("cpu: true,", f"cpu: true, {precision}"))
    jobs = []
    for peer in range(2):
        words = ["fairseq-hydra-train", "--config-dir", str(tmp_path / "config"), "--config-name", "tiny", f"task.data={data}"]
        words += [f"common.user_dir={PLUGIN}", f"common.seed={1 + peer}", f"checkpoint.save_dir={tmp_path}/peer{peer}"]
        words += [f"hydra.run.dir={tmp_path}/hydra{peer}"]
        jobs.append(Job(words, peer_environment(peer, 2, tmp_path / "exchange"), cwd=tmp_path))
    for job in jobs:
        job.finish()
    for peer in range(2):
        log = (tmp_path / f"hydra{peer}/hydra_train.log").read_text()
        assert len(taught(log.replace("[train_inner][INFO] - ", "| train_inner | "))) == 2, log[-2000:]


# base_layers: stock fairseq asks whether it is above 0 before a checkpoint, but its default does not reach a config.
HYDRA = """
# @package _group_
common: {cpu: true, log_format: json, log_interval: 1}
task: {_name: translation, data: given below}
criterion: {_name: codistill_ce, codistill_interval: 4, codistill_loss: ce, codistill_sync: true, codistill_wait: 120,
  codistill_alpha_warmup_epochs: 0}
dataset: {max_tokens: 300}
optimization: {max_update: 6, lr: [0.003]}
optimizer: {_name: adam}
lr_scheduler: {_name: fixed}
model: {_name: transformer, encoder: {embed_dim: 32, ffn_embed_dim: 64, layers: 1, attention_heads: 2},
  decoder: {embed_dim: 32, ffn_embed_dim: 64, layers: 1, attention_heads: 2}, base_layers: 0}
checkpoint: {no_epoch_checkpoints: true}
"""
