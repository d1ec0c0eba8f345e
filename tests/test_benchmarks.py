"""benchmarks/: bytes by formula and by log, and the simulation where its answer is known by hand."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import fairseq
import numpy as np
import pytest
import simpy
import torch
from fairseq_runs import ROOT
from torch import nn

from benchmarks import run_log
from benchmarks.communication import bytes_per_update, logged, model_size
from benchmarks.communication.bytes_per_update import Setting, ring_all_reduce, traffic
from benchmarks.communication.model_size import Size
from benchmarks.exchange import alternating_train
from benchmarks.exchange import speed as exchange_speed
from benchmarks.simulation import simulate, validate
from benchmarks.simulation.outcome import outcome
from benchmarks.simulation.peer import World, all_reduce_s
from benchmarks.simulation.scenario import PARAMETERS, Scenario
from benchmarks.simulation.store import Store, fair_rates
from fairseq_codistill.exchange.snapshot import Buffer, tensors_of

BENCHMARKS = ROOT / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
MAIN = {module.__name__: module.main for module in (bytes_per_update, simulate)}
INFINITE = {name: math.inf for name in Scenario.__dataclass_fields__ if name.endswith("_bytes_per_s")}
# Peers of one worker that start together, take half a second for an update, and exchange in no time at all.
IDEAL = Scenario(
    peers=3, workers=1, interval=100, updates=1000, topology="all", step_s=0.5, jitter=0.0, teacher_cost=0.0,
    start_spread_s=0.0, **INFINITE, latency_s=0.0, encode_s=0.0, verify_s=0.0, failures_per_worker_hour=0.0,
)  # fmt: skip


# ---------------------------------------------------------------- bytes by formula


def simulated_ring(size: int, workers: int) -> list[int]:
    """Bytes that each worker sends in a ring all_reduce of `size` bytes, chunk by chunk: the slow, obvious reference."""
    sent = [0] * workers
    chunk = size // workers
    for _ in range(2):  # first sums are scattered, then gathered
        for _ in range(workers - 1):
            for worker in range(workers):
                sent[worker] += chunk
    return sent


@pytest.mark.parametrize("workers", [1, 2, 3, 16])
def test_ring_all_reduce(workers):
    assert simulated_ring(48_000, workers) == [ring_all_reduce(48_000, workers)] * workers


def test_traffic_by_hand():
    """1,000 parameters and 100 buffers, 4 peers of 8 workers, every 10 updates, in bf16, held in fp32."""
    bytes_ = traffic(Size("small", 1000, 100), Setting(4, 8, 10, "bf16", "all", "fp32"))
    assert bytes_.all_reduce_fp32 == 2 * 31 / 32 * 4000 and bytes_.all_reduce_fp16 == 2 * 31 / 32 * 2000
    assert bytes_.inside_fp32 == 2 * 7 / 8 * 4000 and bytes_.inside_fp16 == 2 * 7 / 8 * 2000
    assert bytes_.published_per_peer == 220 and bytes_.read_per_peer == 660
    assert bytes_.exchange_per_worker == 110
    assert bytes_.broadcast_per_worker == pytest.approx(3 * 4400 * 7 / 8 / 10)
    assert bytes_.between_peers_times_less("fp32") == pytest.approx(2 * 7750 / 880)


@pytest.mark.parametrize("wire, size", [("fp32", 4400), ("bf16", 2200), ("int8", 1100)])
def test_a_ring_reads_one_teacher_whatever_n_and_the_wire_sets_the_size(wire, size):
    for peers in (2, 8):
        bytes_ = traffic(Size("small", 1000, 100), Setting(peers, 1, 10, wire, "ring"))
        assert bytes_.published_per_peer == bytes_.read_per_peer == size / 10
        assert bytes_.broadcast_per_worker == bytes_.inside_fp32 == 0, "one worker has nobody to tell"
    assert traffic(Size("small", 1000, 100), Setting(1, 1, 10)).read_per_peer == 0


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
def test_the_formula_is_the_size_of_real_snapshots(wire):
    model = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[wire]
    data = bytes(Buffer.of(tensors_of(model), dtype).data)
    body = len(data) - 8 - int.from_bytes(data[:8], "little")
    counted = model_size._count(model, "small", "")
    assert counted.parameters == 300 * 200 + 200 + 400 and counted.buffers == 400 + 1
    assert body == pytest.approx(model_size.BYTES[wire] * counted.published, rel=0.03)


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (640, "640 B"), (5_247.8, "5.25 kB"), (999_960, "1.00 MB"), (31.2e6, "31.2 MB"), (1.57e9, "1.57 GB")],
)
def test_amounts(size, text):
    assert bytes_per_update.amount(size) == text


# ---------------------------------------------------------------- models


counts_once = pytest.mark.skipif(fairseq.__version__ == "0.12.2", reason="stock fairseq keeps encoder layers' weights twice")


@counts_once
def test_transformer_big_is_counted():
    """V·d + 6 encoder and 6 decoder layers, d = 1024, ffn 4096; its two `version` buffers are published, tables are not."""
    attention, feed_forward, norm = 4 * (1024 * 1024 + 1024), 2 * 1024 * 4096 + 4096 + 1024, 2 * 1024
    layers = 6 * (attention + feed_forward + 2 * norm) + 6 * (2 * attention + feed_forward + 3 * norm)
    size = model_size.of_model("transformer_vaswani_wmt_en_de_big")
    assert size.parameters == 32768 * 1024 + layers == PARAMETERS
    assert size.buffers == 2


def test_resnet50_is_what_its_architecture_says():
    """Counted here from the paper's table, because torchvision may be missing."""
    norms = convolutions = 0

    def convolution(kernel, inward, outward):
        nonlocal norms, convolutions
        convolutions += kernel * kernel * inward * outward
        norms += outward
        return outward

    width = convolution(7, 3, 64)
    for inner, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            if block == 0:
                convolution(1, width, 4 * inner)
            convolution(1, width, inner)
            convolution(3, inner, inner)
            width = convolution(1, inner, 4 * inner)
    layers = 1 + 3 * (3 + 4 + 6 + 3) + 4
    expected = (convolutions + 2 * norms + 2048 * 1000 + 1000, 2 * norms + layers)
    size = model_size.of_model("resnet50")
    assert (size.parameters, size.buffers) == expected == model_size.RESNET50


def test_a_file_is_counted(tmp_path):
    weights = {"a": torch.zeros(3, 5), "b": torch.zeros(7)}
    path = tmp_path / "u000000001.safetensors"
    path.write_bytes(bytes(Buffer.of(weights).data))
    assert model_size.of_file(str(path)).parameters == 22
    tied = torch.zeros(4, 4)
    torch.save({"model": {"embed": tied, "project": tied, "bias": torch.zeros(4)}}, tmp_path / "checkpoint_best.pt")
    assert model_size.of_file(str(tmp_path / "checkpoint_best.pt")).parameters == 20, "tied weights travel once"


@pytest.mark.parametrize(
    "words, must",
    [
        ("--model-file nowhere.safetensors", "must be a file that can be read"),
        ("--model-file odd.safetensors", "must be a .safetensors file"),
        ("--model-file odd.pt", "must be a .safetensors file or a fairseq checkpoint"),
        ("--model no_such_arch", "must be resnet50 or an architecture of fairseq's"),
        ("--run .", "must hold peer0/train.log"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence_and_status_2(words, must, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("odd.safetensors", "odd.pt"):
        Path(name).write_bytes(b"\x07nonsense")
    assert bytes_per_update.main(shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert must in error and error.count("\n") == 1


def test_tables(capsys):
    assert bytes_per_update.main(shlex.split("--parameters 1000000 --peers 2 4 --workers 8 --interval 50")) == 0
    shown = capsys.readouterr().out
    assert "40.0 kB + 40.0 kB" in shown and "40.0 kB + 120 kB" in shown
    assert bytes_per_update.main(shlex.split("--parameters 1000000 --peers 2 --workers 8 --interval 50 --json")) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["bytes_per_update"]["published_per_peer"] == 40_000 and one["wire"] == "bf16"


@counts_once
def test_the_readmes_tables_are_what_the_command_prints(capsys):
    """Word for word, apart from how ResNet-50 was counted."""
    assert bytes_per_update.main(["--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 2 * (2 + 8)
    for row in rows:
        assert row in README


# ---------------------------------------------------------------- the speed of an exchange


def test_an_exchange_is_compared_with_its_neighbours():
    """Intervals of 10 updates: the first three do not count; with an exchange they take 25 and 50 s; the machine slows down."""
    seconds = [10.0, 10.0, 99.0, 20.0, 25.0, 20.0, 50.0, 60.0, 1.0]
    begins = [sum(seconds[:i]) for i in range(len(seconds) + 1)]
    assert exchange_speed.ratios({10 * i: begin for i, begin in enumerate(begins)}, 10) == pytest.approx([0.8, 0.8])
    counted = [update for update in range(0, 70, 10) if alternating_train.exchanges(update, 10)]
    assert counted == [0, 20, 40, 60]


# ---------------------------------------------------------------- bytes by log

RECORD = '{clock} | INFO | train_inner | {{"epoch": 1, "update": 0.5, "loss": "7", {more}"num_updates": "{update}"}}\n'


def write_run(folder: Path, updates: int = 40, interval: int = 10, late: int = 0, **changes) -> Path:
    """Two peers of 1,000 parameters in bf16, 1 s an update, peer 1 `late` s behind; each read is ready a second later.

    By hand: published 0, 10, 20, 30 and 40 at the end.
    """
    for peer in range(2):
        begin = peer * late
        lines = [
            line(begin, f"{{'criterion': {{'_name': 'codistill_ce', 'codistill_interval': {interval}, 'codistill_topology': "
                 f"'all', 'codistill_sync': {changes.get('sync', False)}, 'codistill_wire_dtype': None}}}}"),
            line(begin, "num. shared model params: 1,000 (num. trained: 1,000)"),
            line(begin, "begin training epoch 1"),
        ]  # fmt: skip
        for update in range(0, updates + 1, interval):
            lines.append(line(begin + update, f"codistillation: published update {update}, 0.0 MB in 0.20 s"))
        for update in range(interval, updates + 1, interval):
            staleness = changes.get("staleness", [5.5, 4.5])[peer]
            taught = f'"codistill_staleness": "{staleness}", ' if update > interval else ""
            lines.append(line(begin + update, "", RECORD.format(clock=clock(begin + update), more=taught, update=update)))
        read = 4 if peer == 1 or not late else 3  # the last of a late peer comes too late
        totals = {"updates": updates, "published": 5, "published_bytes": 5 * 2000, "skipped": 0, "failed": 0, "read": read,
                  "read_bytes": read * 2000, "hidden_s": 1.8, "visible_s": 0.01, "copy_s": 0.02}  # fmt: skip
        totals.update(changes.get("totals", {}))
        lines.append(line(begin + updates, f"done training in {updates}.0 seconds"))
        lines.append(line(begin + updates + 1, f"codistillation: exchange totals {json.dumps(totals)}"))
        (folder / f"peer{peer}").mkdir(parents=True)
        (folder / f"peer{peer}/train.log").write_text("".join(sorted(lines, key=lambda one: one[:19])), encoding="utf-8")
    return folder


def clock(second: int) -> str:
    return f"2026-01-01 00:{second // 60:02}:{second % 60:02}"


def line(second: int, text: str, whole: str = "") -> str:
    return whole or f"{clock(second)} | INFO | somewhere | {text}\n"


def test_a_runs_bytes_are_those_of_the_formula(tmp_path, capsys):
    assert bytes_per_update.main(["--run", str(write_run(tmp_path))]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"published +10,000 +10,000 +1\.000", shown)) == 2
    assert len(re.findall(r"read +6,000 … 8,000 +8,000 +1\.000", shown)) == 2, "four are readable, the last may be too late"


@pytest.mark.parametrize(
    "totals, good",
    [
        ({"published": 4, "published_bytes": 8000, "skipped": 1}, True),
        ({"published": 4, "published_bytes": 8000, "failed": 1}, True),
        ({"published": 4, "published_bytes": 8000}, False),  # one is missing, and nothing says why
        ({"published_bytes": 20_000}, False),  # snapshots in fp32, though bf16 was asked for
        ({"read": 3, "read_bytes": 6000}, True),  # the last came too late
        ({"read": 2, "read_bytes": 4000}, False),
        ({"read": 8, "read_bytes": 16_000}, False),  # each was read twice
    ],
)
def test_a_run_that_differs_is_status_1(totals, good, tmp_path, capsys):
    assert bytes_per_update.main(["--run", str(write_run(tmp_path, totals=totals))]) == (0 if good else 1)
    assert ("differs" in capsys.readouterr().out) is not good


def test_publications_of_an_attempt_that_began_and_ended_between_exchanges():
    attempt = run_log.Attempt({"codistill_interval": "50"}, first=120, totals={"updates": 100, "skipped": 0, "failed": 0})
    assert logged.publications(attempt) == 2, "150 and 200; it was stopped at 220"
    attempt.completed = True
    assert logged.publications(attempt) == 3


def test_a_run_without_totals_is_refused_in_one_sentence(tmp_path, capsys):
    folder = write_run(tmp_path)
    log = folder / "peer1/train.log"
    log.write_text(log.read_text().replace("exchange totals", "nothing"))
    assert bytes_per_update.main(["--run", str(folder)]) == 2
    assert "must have a line 'codistillation: exchange totals'" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["two_peers", "ring_of_three"])
def test_committed_runs_are_as_predicted(run, capsys):
    """Real ones: two peers in bf16, and three in a ring in int8, 1,000 updates each."""
    folder = str(BENCHMARKS / "results/communication" / run)
    assert bytes_per_update.main(["--run", folder]) == 0
    assert simulate.main(["--validate", folder]) == 0
    for one in validate.comparisons(run_log.load(folder)):
        if one.what == "staleness":
            assert one.low - 1 <= one.measured <= one.high + 1, "what the README says"


# ---------------------------------------------------------------- the simulated store


@pytest.mark.parametrize(
    "transfers, total, client, transfer, rates",
    [
        ([1, 2, 0, 1], 10, 100, 100, [2.5, 2.5, 0, 2.5]),  # equal shares
        ([1, 2, 0, 1], 10, 3, 100, [3, 1.5, 0, 3]),  # each client at its limit
        ([1, 4], 5, 3, 100, [2, 0.75]),  # the second is bound by its limit, the first takes what is left
        ([1, 4], 5, 100, 0.5, [0.5, 0.5]),
        ([1, 4], math.inf, 8, math.inf, [8, 2]),
        ([0, 0], 5, 5, 5, [0, 0]),
    ],
)
def test_fair_rates(transfers, total, client, transfer, rates):
    assert fair_rates(np.array(transfers), total, client, transfer) == pytest.approx(rates)


def ends(moves, kill=None, **limits):
    """When transfers end: `moves` are (client, bytes, start); one may be killed: (its number, when)."""
    env = simpy.Environment()
    store = Store(env, 3, **{"total": math.inf, "client": math.inf, "transfer": math.inf, "latency_s": 0, **limits})
    ended = {}

    def move(number, client, size, start):
        yield env.timeout(start)
        try:
            yield from store.move(client, size)
            ended[number] = env.now
        except simpy.Interrupt:
            pass

    processes = [env.process(move(number, *one)) for number, one in enumerate(moves)]
    if kill:
        env.timeout(kill[1]).callbacks.append(lambda _: processes[kill[0]].interrupt())
    env.run()
    return ended, store.moved


def test_transfers_share_the_store():
    ended, moved = ends([(0, 100, 0), (1, 100, 0), (2, 50, 5)], total=10)
    # 5 s at 5 each leave 75, 75, 50; then a third each: the small one ends after 15 s more, the others share the rest.
    assert ended == pytest.approx({2: 20.0, 0: 25.0, 1: 25.0}) and moved == 250
    ended, _ = ends([(0, 100, 0), (0, 100, 0), (1, 100, 0)], client=10, latency_s=1)
    assert ended == pytest.approx({0: 21.0, 1: 21.0, 2: 11.0})


def test_what_a_killed_transfer_had_goes_to_the_others():
    ended, moved = ends([(0, 100, 0), (1, 100, 0)], kill=(0, 4), total=10)
    assert ended == pytest.approx({1: 12.0}) and moved == 100


# ---------------------------------------------------------------- the simulation


def test_infinite_bandwidth():
    """At an exchange nothing new is there yet; it is taken at the late look, N/10 = 10 updates after. So the ages run from
    10 to 109, and in the last, shorter interval from 10 to 99."""
    result = outcome(IDEAL)
    ages = [age for block in range(9) for age in range(10, 110 if block < 8 else 100)]
    assert result["staleness_mean"] == pytest.approx(np.mean(ages))
    assert result["staleness_p95"] == pytest.approx(np.percentile(ages, 95))
    assert result["without_teacher_share"] == pytest.approx(110 / 1000)
    assert result["published"] == 3 * 11 and result["read"] == 3 * 2 * 9, "not that of update 0, and the last comes too late"
    assert result["stall_s_per_peer"] == result["skipped"] == result["failures"] == 0
    assert result["updates_per_s"] == pytest.approx(2) and result["relative_pace"] == pytest.approx(1)


def test_peers_that_are_apart():
    """Two peers, the second ten seconds (20 updates) behind. It sees the first's snapshot of update 100 when itself at 80, and
    takes it at its next look, 90: ages from -10. The first is at 120 when the second publishes 100, and looks at 130."""
    first, second = World(replace(IDEAL, peers=2), starts=[0.0, 10.0]).run()
    ahead, behind = np.concatenate(first.ages), np.concatenate(second.ages)
    assert (behind.min(), behind.max()) == (-10, 89)
    assert (ahead.min(), ahead.max()) == (30, 129)


def test_no_jitter_is_the_step_and_more_workers_wait_longer():
    quiet = outcome(replace(IDEAL, teacher_cost=1 / 3))
    assert quiet["updates_per_s"] == pytest.approx(1 / (0.5 * (1 + 2 / 3)))
    paces = [outcome(replace(IDEAL, jitter=0.2, workers=w, hop_s=0.0))["updates_per_s"] for w in (1, 8, 64, 1024)]
    assert paces[0] == pytest.approx(2, rel=0.02), "the factor's mean is 1"
    assert paces == sorted(paces, reverse=True)
    # The slowest of 1,024 normal draws lies 3.2 standard deviations above the mean.
    assert paces[-1] == pytest.approx(2 / math.exp(0.2 * 3.2 - 0.02), rel=0.05)


def test_the_slowest_of_many_workers_is_drawn_as_if_each_were():
    scenario = replace(IDEAL, peers=1, workers=50, jitter=0.3, hop_s=0.0)
    seconds = World(scenario).peers[0].seconds(0, 0, 20_000) / 20_000
    draws = np.random.default_rng(0).lognormal(-0.045, 0.3, (20_000, 50)).max(1).mean() * 0.5
    assert seconds == pytest.approx(draws, rel=0.01)


def test_all_reduce_by_hand():
    scenario = replace(IDEAL, workers=8, gradient_bytes=800.0, within_bytes_per_s=100.0, hop_s=0.5)
    assert all_reduce_s(scenario) == pytest.approx(2 * 7 / 8 * 8 + 6 * 0.5)
    alone = replace(scenario, peers=1)
    assert outcome(replace(alone, hidden_share=0.5))["updates_per_s"] == pytest.approx(1 / (0.5 + 17 - 0.25))
    assert outcome(replace(alone, hidden_share=40.0))["updates_per_s"] == pytest.approx(2), "all of it is hidden"


def test_a_tiny_bandwidth_skips_and_is_counted():
    """A write takes 120 s, an interval 50 s: of the snapshots at 0, 100, … 900 those at 0, 300, 600 and 900 are begun."""
    slow = replace(IDEAL, peers=2, topology="ring", client_bytes_per_s=1.0, snapshot_bytes=120.0)
    result = outcome(slow)
    assert result["skipped"] == 2 * 6 and result["published"] == 2 * 5
    assert result["updates_per_s"] == pytest.approx(2), "training never waits for it"
    # 300 is there at second 270, read at 390 or within the second after, so taken at update 790. 600 is there at 420 and
    # read when the training has ended; 900 would be later still.
    assert result["read"] == 2 * 2 and result["staleness_mean"] == pytest.approx(np.mean(range(490, 700)))


def test_the_last_snapshot_waits_for_the_one_in_flight():
    """As above: 900 is on its way from second 450 to 570, and the last, of second 500, must not slow it down."""
    world = World(replace(IDEAL, peers=2, topology="ring", client_bytes_per_s=1.0, snapshot_bytes=120.0))
    for peer in world.peers:
        world.env.process(peer.train())
    world.env.run(until=571)
    assert [peer.latest.update for peer in world.peers] == [900, 900]


def test_shared_bandwidth_makes_snapshots_older():
    stalenesses = [
        outcome(replace(IDEAL, peers=n, total_bytes_per_s=100.0, snapshot_bytes=100.0))["staleness_mean"] for n in (2, 4, 8)
    ]
    assert stalenesses == sorted(stalenesses) and stalenesses[-1] > stalenesses[0] + 20


def test_copies_and_broadcasts_hold_the_training_and_nothing_else_does():
    result = outcome(replace(IDEAL, held_bytes=100.0, copy_bytes_per_s=100.0, hop_s=0.0, encode_s=1.0, verify_s=1.0))
    assert result["stall_s_per_peer"] == 10 + 2 * 9, "a second for each of 10 copies out and 2 · 9 in"
    group = replace(IDEAL, workers=2, gradient_bytes=0.0, held_bytes=100.0, within_bytes_per_s=50.0, hop_s=0.0)
    assert outcome(group)["stall_s_per_peer"] == 2 * 2 * 9, "and two for each broadcast"


def test_failures_cost_their_peer_alone_but_stop_a_big_group():
    """Often enough that all peers die some times: those that are left go on, the group starts again each time."""
    scenario = replace(IDEAL, peers=8, topology="ring", updates=5000, failures_per_worker_hour=1.0, checkpoint_every=200,
                       restart_s=300.0)  # fmt: skip
    result = outcome(scenario)
    assert result["failures"] >= 3
    assert result["big_group_updates_per_s"] < result["updates_per_s"] < 2
    assert result["relative_pace"] > 1.2


def test_a_seed_decides_everything():
    scenario = replace(Scenario(), peers=6, updates=2000, failures_per_worker_hour=0.1)
    assert outcome(scenario) == outcome(scenario)
    assert outcome(scenario) != outcome(replace(scenario, seed=2))


@pytest.mark.parametrize(
    "words, must",
    [
        ("--peers 0", "peers must be at least 1"),
        ("--topology star", "topology must be all or ring"),
        ("--total-bytes-per-s 0", "total_bytes_per_s must be a number above 0"),
        ("--jitter nan", "jitter must be a number"),
        ("--validate .", "must hold peer0/train.log"),
    ],
)
def test_a_scenario_that_cannot_be_meant(words, must, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert simulate.main(shlex.split(words)) == 2
    assert must in capsys.readouterr().err


# ---------------------------------------------------------------- the simulation against a log


def test_validate(tmp_path, capsys):
    """Peer 1 is two updates later, looks are one update apart. It takes peer 0's snapshot of update 10 at its own 9, so ages
    from -1 to 8; peer 0 takes its at 13 or so, ages from 3 to 12. The first window of each is its end only."""
    folder = write_run(tmp_path, late=2, staleness=[7.5, 3.5])
    assert simulate.main(["--validate", str(folder)]) == 0
    results = validate.comparisons(run_log.load(str(folder)))
    predicted = {(one.peer, one.what): (one.low, one.high) for one in results}
    assert predicted[0, "staleness"] == pytest.approx((7.5, 7.5), abs=1)
    assert predicted[1, "staleness"] == pytest.approx((3.5, 3.5), abs=1)
    assert predicted[0, "bytes published"] == predicted[1, "bytes published"] == (10_000, 10_000)
    assert predicted[1, "bytes read"] == (8000, 8000), "peer 0's last is there when peer 1 still trains"
    assert capsys.readouterr().out.count("staleness") == 2


@pytest.mark.parametrize(
    "changes", [{"staleness": [14.5, 3.5]}, {"totals": {"published_bytes": 20_000}}, {"totals": {"read_bytes": 2000}}]
)
def test_validate_sees_what_differs(changes, tmp_path, capsys):
    folder = write_run(tmp_path, **{"late": 2, "staleness": [7.5, 3.5], **changes})
    assert simulate.main(["--validate", str(folder)]) == 1
    assert "differs" in capsys.readouterr().out


def test_lockstep_cannot_be_validated(tmp_path, capsys):
    assert simulate.main(["--validate", str(write_run(tmp_path, sync=True))]) == 2
    assert "--codistill-sync" in capsys.readouterr().err


# ---------------------------------------------------------------- what the README shows

BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)]
COMMANDS = [shlex.split(line) for block in BLOCKS for line in block.splitlines()]
SMALL = {"--sweep": ["--most-peers", "2", "--quick"]}


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[1] == "-m" and w[2] in MAIN], ids=" ".join)
def test_the_readmes_commands(words, tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "RUN_DIR", late=2, staleness=[7.5, 3.5])
    monkeypatch.chdir(tmp_path)
    small = [word for option, more in SMALL.items() if option in words for word in more]
    assert words[0] == "python" and folder.name == "RUN_DIR"
    assert MAIN[words[2]](words[3:] + small) == 0
    if "--sweep" in words:
        (results,) = tmp_path.glob("**/sweep.json")
        rows = json.loads(results.read_text())
        assert {row["part"] for row in rows} == {"storage", "pace", "failures"}
        assert (results.parent / "figure.png").stat().st_size > 20_000
        assert len((results.parent / "sweep.csv").read_text().splitlines()) == len(rows) + 1
    else:
        assert len(capsys.readouterr().out.splitlines()) > 5


def test_the_committed_sweep_is_the_grids():
    rows = json.loads((BENCHMARKS / "results/simulation/sweep.json").read_text())
    assert len(rows) == len(list(simulate.grid(max(simulate.PEERS))))
    one = next(row for row in rows if row["part"] == "pace" and row["peers"] == 4 and row["workers"] == 8)
    names = set(Scenario.__dataclass_fields__)
    again = outcome(
        Scenario(**{name: float(value) if value == "inf" else value for name, value in one.items() if name in names})
    )
    assert one["relative_pace"] == pytest.approx(again["relative_pace"], rel=1e-4)
