"""Every mistake in an option is one clear sentence, before any data is loaded."""

import dataclasses
import math

import pytest
from fairseq_runs import CODISTILL, Job, peer_environment, train_words

from fairseq_codistill.config import CodistillConfig, active, check, fill_defaults, read_environment


def config(**options):
    """The options as fairseq hands them over: its own values filled in."""
    defaults = {field.name: field.default for field in dataclasses.fields(CodistillConfig) if field.name != "_name"}
    defaults.update(sentence_avg=False, ddp_backend="pytorch_ddp", model_parallel_size=1, train_subset="train", max_update=0)
    defaults.update(disable_validation=False, save_dir="checkpoints", store_ema=False)
    defaults.update({name if name in defaults else f"codistill_{name}": value for name, value in options.items()})
    return CodistillConfig(**defaults)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("CODISTILL_PEER", "CODISTILL_PEERS", "CODISTILL_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_a_leading_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = read_environment(config(dir="~/x", teacher="~/a.pt:b~.pt:~/c.pt", topology="~/edges"))
    assert cfg.codistill_dir == f"{tmp_path}/x" and cfg.codistill_topology == f"{tmp_path}/edges"
    assert cfg.codistill_teacher == f"{tmp_path}/a.pt:b~.pt:{tmp_path}/c.pt"
    monkeypatch.setenv("CODISTILL_DIR", "~/from the environment")
    assert read_environment(config()).codistill_dir == f"{tmp_path}/from the environment"
    assert read_environment(config(dir="s3://bucket/~x")).codistill_dir == "s3://bucket/~x"


BAD = [
    (dict(peer=2, peers=2, dir="x"), "codistill_peer must be between 0 and 1 with 2 peers, but is 2 instead."),
    (dict(peer=-1, peers=2, dir="x"), "codistill_peer must be between 0 and 1 with 2 peers, but is -1 instead."),
    (dict(peer=1), "but is 1 instead; did you forget --codistill-peers (or CODISTILL_PEERS)?"),
    (dict(peers=0), "codistill_peers must be at least 1, but is 0 instead."),
    (dict(peers=2), "codistill_dir must name a directory (or URL) that all 2 peers see, but is not given; did you forget"),
    (dict(interval=0), "codistill_interval must be at least 1 update, but is 0 instead."),
    (dict(every=0), "codistill_every must be at least 1 update, but is 0 instead."),
    (dict(alpha=-0.1), "codistill_alpha must be a finite number, not negative, but is -0.1 instead."),
    (dict(alpha=float("nan")), "codistill_alpha must be a finite number, not negative, but is nan instead."),
    (dict(gamma=float("inf")), "codistill_gamma must be a finite number, not negative, but is inf instead."),
    (dict(gamma=-1.0), "codistill_gamma must be"),
    (dict(alpha_step=float("nan")), "codistill_alpha_step must be a finite number"),
    (dict(alpha_max=-1.0), "codistill_alpha_max must be a number, not negative (inf: no limit), but is -1.0 instead."),
    (dict(alpha_max=math.nan), "codistill_alpha_max must be"),
    (dict(temperature=0.0), "codistill_temperature must be a finite number greater than 0, but is 0.0 instead."),
    (dict(alpha_warmup_epochs=-1), "codistill_alpha_warmup_epochs must be a number of epochs, not negative, but is -1"),
    (dict(burn_in=-1), "codistill_burn_in must be a number of updates, not negative, but is -1 instead."),
    (dict(gate="hard", loss="uniform"), "codistill_gate must be none with --codistill-loss uniform, which has no peer to"),
    (dict(alpha_warmup=-1), "codistill_alpha_warmup must be a number of updates, not negative, but is -1 instead."),
    (dict(until=0), "codistill_until must be at least 1 update, but is 0 instead."),
    (dict(burn_in=9, until=9), "codistill_until must be above codistill_burn_in, which is 9, but is 9 instead, so that no"),
    (dict(when_stalled=-1), "codistill_when_stalled must be a number of validations, not negative, but is -1 instead."),
    (dict(when_stalled=2, peers=2, dir="x", disable_validation=True), "codistill_when_stalled needs validations, but"),
    (dict(publish_ema=True), "codistill_publish_ema needs the averaged weights that fairseq keeps with --store-ema, but that"),
    (dict(rdrop=-1.0), "codistill_rdrop must be a finite number, not negative, but is -1.0 instead."),
    (dict(wait=-1.0), "codistill_wait must be a finite number of seconds"),
    (dict(max_staleness=0), "codistill_max_staleness must be at least 1 update"),
    (dict(milestones="30,15"), "codistill_milestones must be epochs that increase, from above 0, but is 30,15."),
    (dict(milestones="15,15"), "codistill_milestones must be epochs that increase"),
    (dict(milestones="0,15"), "codistill_milestones must be epochs that increase"),
    (dict(milestones="15;30"), "codistill_milestones must be numbers separated by commas, but is '15;30' instead."),
    (dict(milestones="15,nan"), "codistill_milestones must be numbers separated by commas"),
    (dict(alpha_schedule="stepwise"), "codistill_milestones must be given with --codistill-alpha-schedule stepwise"),
    (dict(milestones="15", weight_decays="1e-4"), "so 2 for 1 milestones, but is 1e-4."),
    (dict(milestones="15", weight_decays="1e-4,-1"), "codistill_weight_decays must be one number, not negative"),
    (dict(topology="rign", peers=2, dir="x"), "codistill_topology must be 'all', 'ring' or the path of a file of edges"),
    (dict(peers=2, dir="x", ddp_backend="fully_sharded"), "cannot publish the weights of --ddp-backend fully_sharded"),
    (dict(peers=2, dir="x", model_parallel_size=2), "needs whole models, but --model-parallel-size is above 1"),
    (dict(label_smoothing=0.1), "which is 0.1; smooth labels with --codistill-label-smoothing 0.1 instead."),
    (dict(codistill_label_smoothing=1.0), "codistill_label_smoothing must be at least 0 and below 1, but is 1.0 instead."),
    (dict(codistill_label_smoothing=0.1, loss="uniform"), "codistill_label_smoothing must be 0 with --codistill-loss uniform"),
]


@pytest.mark.parametrize("options, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_a_bad_option_is_one_sentence(options, sentence):
    with pytest.raises(ValueError) as error:
        check(read_environment(config(**options)))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(peers=2, dir="x", peer=1, milestones="18,38", weight_decays="1e-4,1e-5,0", alpha_schedule="stepwise"),
        dict(peers=3, dir="x", topology="ring", alpha=0.0, gamma=0.0, alpha_max=0.0, max_staleness=1),
        dict(ddp_backend="fully_sharded"),
    ],
)
def test_a_good_one_passes(options):
    check(read_environment(config(**options)))


def test_the_environment_fills_what_the_command_line_leaves_open(monkeypatch):
    for name, value in {"CODISTILL_PEER": "1", "CODISTILL_PEERS": "3", "CODISTILL_DIR": "shared"}.items():
        monkeypatch.setenv(name, value)
    read = read_environment(config())
    assert (read.codistill_peer, read.codistill_peers, read.codistill_dir) == (1, 3, "shared")
    given = read_environment(config(peer=0, peers=2, dir="own"))
    assert (given.codistill_peer, given.codistill_peers, given.codistill_dir) == (0, 2, "own")
    monkeypatch.setenv("CODISTILL_PEER", "one")
    with pytest.raises(ValueError, match="environment variable CODISTILL_PEER must be a whole number, but is 'one' instead"):
        read_environment(config())


DEFAULTS = [  # options; then α, its limit, the interval
    (dict(), 0.3, 1.0, 500),
    (dict(loss="kl"), 0.3, 1.0, 500),
    (dict(loss="reverse_kl"), 0.3, 1.0, 500),
    (dict(loss="js"), 1.2, 4.0, 500),
    (dict(loss="mse"), 0.1, 1 / 3, 500),
    (dict(loss="centered_mse"), 0.1, 1 / 3, 500),
    (dict(loss="uniform"), 1 / 9, 1 / 9, 500),
    (dict(loss="unigram"), 1 / 9, 1 / 9, 500),
    (dict(alpha=3.0), 3.0, 10.0, 500),
    (dict(alpha=0.0), 0.0, 0.0, 500),
    (dict(alpha_schedule="constant"), 0.3, None, 500),
    (dict(alpha_schedule="stepwise", milestones="5"), 0.3, None, 500),
    (dict(alpha_max=0.5), 0.3, 0.5, 500),
    # The paper's own: uncentred MSE, α = 1 that grows by a tenth in each epoch without a limit.
    (dict(loss="mse", alpha=1.0, alpha_max=math.inf, interval=2500), 1.0, math.inf, 2500),
    (dict(max_update=2000), 0.3, 1.0, 100),
    (dict(max_update=7), 0.3, 1.0, 1),
    (dict(max_update=50_000), 0.3, 1.0, 2500),
    (dict(max_update=300_000), 0.3, 1.0, 2500),
    (dict(max_update=2000, interval=2500), 0.3, 1.0, 2500),
]


@pytest.mark.parametrize("options, alpha, limit, interval", DEFAULTS, ids=[str(row[0]) for row in DEFAULTS])
def test_defaults_that_depend_on_other_options(options, alpha, limit, interval):
    cfg = read_environment(config(**options))
    check(cfg)
    cfg = fill_defaults(cfg)
    assert (cfg.codistill_alpha, cfg.codistill_interval) == (alpha, interval)
    assert cfg.codistill_alpha_max == (limit if limit is None else pytest.approx(limit))


@pytest.mark.parametrize(
    "options, epochs",
    [
        (dict(), 4),
        (dict(loss="mse"), 4),
        (dict(alpha=1.0), 4),
        (dict(alpha_warmup_epochs=0), 0),
        (dict(alpha_warmup_epochs=2, alpha_schedule="constant"), 2),
        (dict(alpha_schedule="constant"), 0),
        (dict(alpha_schedule="stepwise", milestones="5"), 0),
        (dict(teacher="a.pt"), 0),
        (dict(loss="uniform"), 0),
    ],
)
def test_alpha_grows_in_where_peers_teach(options, epochs):
    cfg = read_environment(config(**options))
    check(cfg)
    assert fill_defaults(cfg).codistill_alpha_warmup_epochs == epochs


def test_when_anybody_teaches():
    assert not active(read_environment(config()))
    assert active(read_environment(config(peers=2, dir="x")))
    assert active(read_environment(config(loss="uniform"))) and active(read_environment(config(teacher="a.pt")))


REFUSED = {
    "--codistill-alpha -1": "codistill_alpha must be a finite number, not negative, but is -1.0 instead.",
    "--codistill-topology rign": "'rign' is none of these.",
    "--label-smoothing 0.1": "smooth labels with --codistill-label-smoothing 0.1 instead.",
    "--codistill-loss mes": "argument --codistill-loss: invalid choice: ",
}


@pytest.mark.parametrize("option", REFUSED)
def test_training_ends_before_the_data_is_loaded(data, tmp_path, option):
    job = Job(train_words(data, tmp_path / "out", CODISTILL, option), peer_environment(0, 2, tmp_path / "exchange"))
    assert job.status() != 0 and REFUSED[option] in job.log
    assert "loaded" not in job.log and not (tmp_path / "exchange").exists()


def test_two_dictionaries_in_one_run(data, tmp_path):
    """The second peer's data has another dictionary: it must not begin to train, and the first goes on."""
    from fairseq_runs import preprocess, write_corpus

    write_corpus(tmp_path / "raw", words=50)
    other = preprocess(tmp_path / "raw", tmp_path / "bin", "-s", "a", "-t", "b")
    first = Job(train_words(data, tmp_path / "0", CODISTILL, "--max-update 2"), peer_environment(0, 2, tmp_path / "x"))
    first.finish()
    second = Job(train_words(other, tmp_path / "1", CODISTILL, "--max-update 2"), peer_environment(1, 2, tmp_path / "x"))
    assert second.status() != 0
    last = second.log.strip().splitlines()[-1]
    assert "All peers of a run must have the same target dictionary" in last
    assert "a dictionary of 48 symbols (sha256 " in last and "a dictionary of 56 symbols (sha256 " in last
    assert "num_updates" not in second.log


def test_two_live_peers_with_one_index(data, tmp_path):
    environment = peer_environment(0, 2, tmp_path / "x")
    first = Job(train_words(data, tmp_path / "0", CODISTILL, "--max-update 100000"), environment)
    first.wait_for("train_inner")
    second = Job(train_words(data, tmp_path / "1", CODISTILL, "--max-update 2"), environment)
    assert second.status() != 0
    assert "peer0 is already alive (process " in second.log.splitlines()[-1]
    first.wait_for("published update 4")
    first.kill()
