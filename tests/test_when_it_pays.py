"""benchmarks/when_it_pays: gains from logs whose answer is known by hand, and the committed table against its logs."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
from fairseq_runs import ROOT
from test_report import DONE, FRESH, config_line, json_line

sys.path.insert(0, str(ROOT))

from benchmarks.when_it_pays import draw as when_it_pays  # noqa: E402


def write_run(folder: Path, peers, train=2.0, alpha=None, wpb=800, criterion="cross_entropy", epochs=2) -> None:
    """Each of `peers` is a list of valid NLLs, one for every 100 updates."""
    for number, valid in enumerate(peers):
        lines = [config_line(criterion=f"{{'_name': '{criterion}', 'x': 1}}"), FRESH]
        for n, nll in enumerate(valid, start=1):
            taught = {} if alpha is None else {"codistill_alpha": alpha}
            lines += [json_line("train", 100 * n - part, loss=9) for part in reversed(range(epochs))]
            lines += [json_line("train_inner", 100 * n, loss=9, nll_loss=train, wpb=wpb, **taught)]
            lines += [json_line("valid", 100 * n, loss=nll)]
        (folder / f"peer{number}").mkdir(parents=True)
        (folder / f"peer{number}/train.log").write_text("".join([*lines, DONE]))


@pytest.fixture
def results(tmp_path):
    for seed, valid in ((1, [4.0, 3.5, 3.7]), (2, [4.0, 3.6, 3.9])):
        write_run(tmp_path / f"r/single/seed{seed}", [valid])
        write_run(tmp_path / f"r/ce/seed{seed}", [[4.0, 3.4, 3.3], [4.0, 3.6, 3.5]], alpha=1, criterion="codistill_ce")
    write_run(tmp_path / "r/tuning/mse/seed2", [[4.0, 3.9, 3.8]] * 2, alpha=1, criterion="codistill_ce")
    write_run(tmp_path / "r/all_reduce_no_smoothing/seed1", [[3.8, 3.5, 4.0]], wpb=1600, epochs=4)
    write_run(tmp_path / "r/all_reduce/seed1", [[3.8, 3.3, 3.5]], wpb=1600, epochs=4, criterion="label_smoothed_cross_entropy")
    return tmp_path / "r"


def test_gains_by_hand(results):
    ce, mse = when_it_pays.points([results])
    assert (Path(ce.log).name, Path(ce.alone).name, ce.seeds, ce.is_sweep) == ("ce", "single", ["seed1", "seed2"], False)
    # Each seed of ce: best and last (3.3 + 3.5) / 2 = 3.4. Alone: best 3.5 and 3.6, last 3.7 and 3.9, train 2.
    assert ce.gap == pytest.approx(1.8)
    assert ce.over["alone"].best == pytest.approx((0.15, 0.1, 0.2)) and ce.over["alone"].end == pytest.approx((0.4, 0.3, 0.5))
    assert ce.over["all_reduce"].best == pytest.approx((0.1,) * 3) and ce.over["all_reduce"].end == pytest.approx((0.6,) * 3)
    assert ce.over["all_reduce, smoothed"].best == pytest.approx((-0.1,) * 3)
    assert mse.is_sweep and mse.seeds == ["seed2"] and mse.gap == pytest.approx(1.9), "of the seeds that both have"
    assert mse.over["alone"].best[0] == pytest.approx(-0.2) and set(mse.over) == {"alone"}, "all_reduce has no seed 2"


@pytest.mark.parametrize("change", [{"wpb": 1600}, {"epochs": 3}, {"peers": [[4.0, 3.5]]}])
def test_other_batches_data_or_lengths_are_no_rivals(tmp_path, change):
    write_run(tmp_path / "ce/seed1", [[4.0, 3.4, 3.3]], alpha=1, criterion="codistill_ce")
    write_run(tmp_path / "single/seed1", **{"peers": [[4.0, 3.5, 3.7]], **change})
    assert when_it_pays.points([tmp_path]) == []


def test_table_and_figure_and_a_broken_run(results, tmp_path, capsys):
    (results / "broken/peer0").mkdir(parents=True)
    (results / "broken/peer0/train.log").write_text("fairseq-train: error: no such option\n")
    assert when_it_pays.main([str(results), "--out", str(tmp_path / "out")]) == 0
    out, error = capsys.readouterr()
    assert "WARNING: left out: " in error and "no such option" in error
    assert "+0.150 (+0.100 to +0.200)" in out and out.strip() in (tmp_path / "out/table.md").read_text()
    assert (tmp_path / "out/figure.png").stat().st_size > 5000
    assert (tmp_path / "out/figure.pdf").read_bytes().startswith(b"%PDF")
    assert when_it_pays.main([str(tmp_path / "out"), "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("when_it_pays: RESULTS must hold a codistilled run")


# --- the committed table, read with a parser of its own ---


def committed_rows():
    text = (when_it_pays.OUT / "table.md").read_text(encoding="utf-8")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(table[0], row)) for row in table[2:]]


def curve(log: Path, tag: str, *names: str):
    bodies = [line.partition(f"| {tag} | ")[2] for line in log.read_text(encoding="utf-8").splitlines()]
    records = [json.loads(body) for body in bodies if body.startswith("{")]
    return [float(next(record[name] for name in names if name in record)) for record in records]


def seeds_of(folder: str):
    """seed -> (best, last) of the valid NLL, mean over peers."""
    found = {}
    for seed in sorted((ROOT / folder).glob("seed*")):
        curves = [curve(log, "valid", "valid_nll_loss", "valid_loss") for log in seed.glob("peer*/train.log")]
        found[seed.name] = statistics.fmean(map(min, curves)), statistics.fmean(one[-1] for one in curves)
    return found


def test_the_committed_table_is_what_its_logs_say():
    rows = committed_rows()
    assert len(rows) >= 20 and len({row["codistilled"] for row in rows}) == len(rows)
    for row in rows:
        own = seeds_of(row["codistilled"])
        rivals = {"alone": row["one peer alone"]}
        home = Path(row["one peer alone"]).parent
        smoothed = home / "all_reduce"
        if (ROOT / home / "all_reduce_no_smoothing").exists():
            rivals.update({"all_reduce": str(home / "all_reduce_no_smoothing"), "all_reduce, smoothed": str(smoothed)})
        elif (ROOT / smoothed).exists() and row["over all_reduce: best"] != "–":
            rivals["all_reduce"] = str(smoothed)
        for name in ("alone", "all_reduce", "all_reduce, smoothed"):
            if name not in rivals:
                # A sweep beside the runs alone, whose all_reduce lies elsewhere.
                continue
            theirs = seeds_of(rivals[name])
            for number, at in enumerate(("best", "end")):
                gains = [theirs[seed][number] - own[seed][number] for seed in own.keys() & theirs.keys()]
                assert float(row[f"over {name}: {at}"].split()[0]) == pytest.approx(statistics.fmean(gains), abs=6e-4), row
        assert int(row["seeds"]) == len(own.keys() & seeds_of(rivals["alone"]).keys())


def test_the_committed_gaps_are_what_the_logs_say():
    for row in committed_rows():
        gaps = []
        for seed in seeds_of(row["codistilled"]).keys() & seeds_of(row["one peer alone"]).keys():
            for log in (ROOT / row["one peer alone"] / seed).glob("peer*/train.log"):
                updates, train = curve(log, "train_inner", "num_updates"), curve(log, "train_inner", "nll_loss", "loss")
                tail = [nll for update, nll in zip(updates, train) if update > 0.9 * updates[-1]]
                gaps.append(curve(log, "valid", "valid_nll_loss", "valid_loss")[-1] - statistics.fmean(tail))
        assert float(row["gap of alone"]) == pytest.approx(statistics.fmean(gaps), abs=0.006), row
