"""codistill-report: hand-computed numbers, excerpts of real fairseq logs (tests/data/report), and bad input."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq_runs import ROOT

from fairseq_codistill.common import fairseq_log
from fairseq_codistill.report import figure as report_figure
from fairseq_codistill.report import files as report_files
from fairseq_codistill.report import log as report_log
from fairseq_codistill.report import main as report
from fairseq_codistill.report import notes as report_notes
from fairseq_codistill.report import summary as report_summary
from fairseq_codistill.report import table as report_table

REAL = Path(__file__).parents[1] / "data" / "report"
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0"


# --- logs made by hand, in fairseq's words ---


def json_line(tag, update, **fields):
    prefix = "" if tag == "train_inner" else f"{tag}_"
    fields = {prefix + name: str(value) for name, value in {**fields, "num_updates": update}.items()}
    return f"2026-01-01 00:00:00 | INFO | {tag} | {json.dumps({'epoch': 1, **fields})}\n"


def config_line(criterion="{'_name': 'cross_entropy', 'sentence_avg': False}", max_update=200, log_format="json"):
    return (
        "2026-01-01 00:00:00 | INFO | fairseq_cli.train | {'_name': None, 'common': {'_name': None, "
        f"'log_format': '{log_format}', 'seed': 7}}, 'optimization': {{'max_update': {max_update}}}, "
        f"'model': Namespace(arch='transformer', rdrop_alpha=5.0), 'criterion': {criterion}}}\n"
    )


DONE = "2026-01-01 00:00:00 | INFO | fairseq_cli.train | done training in 9.0 seconds\n"
FRESH = "2026-01-01 00:00:00 | INFO | fairseq.trainer | No existing checkpoint found x/checkpoint_last.pt\n"


def loaded_line(update):
    return (
        "2026-01-01 00:00:00 | INFO | fairseq.trainer | Loaded checkpoint x/checkpoint_last.pt "
        f"(epoch 3 @ {update} updates)\n"
    )


def log_text(nlls, seconds=10, finished=True):
    """One process that validates every 100 updates."""
    points = list(enumerate(nlls, start=1))
    body = "".join(
        json_line("train_inner", 100 * n, loss=nll - 0.5, wall=seconds * n // len(points))
        + json_line("valid", 100 * n, loss=nll, ppl=2**nll)
        for n, nll in points
    )
    return config_line() + FRESH + body + (DONE if finished else "")


def make_run(folder, peers, bleu=None, ensemble=None, signature=SIGNATURE, **kwargs):
    """A run as codistill-launch leaves it: `peers` holds the valid NLLs of each, `bleu` a score for each."""
    for number, nlls in enumerate(peers):
        log = folder / f"peer{number}" / "train.log"
        log.parent.mkdir(parents=True)
        log.write_text(log_text(nlls, **kwargs))
        if bleu:
            write_score(log.parent / "test.sacrebleu.json", bleu[number], signature)
    if ensemble:
        write_score(folder / "ensemble.test.sacrebleu.json", ensemble, signature)


def write_score(file, score, signature=SIGNATURE, name="BLEU"):
    file.write_text(json.dumps({"name": name, "score": score, "signature": signature}))


def summary(*arguments):
    """label -> column -> (mean, std, n)"""
    methods = report_files.load(list(map(str, arguments))).methods
    return {method.label: report_summary.summarise(run.values() for run in method.runs) for method in methods}


def run_main(capsys, *arguments):
    """Exit status, stdout, stderr."""
    status = report.main(list(map(str, arguments)))
    return status, *capsys.readouterr()


@pytest.fixture
def no_figure(monkeypatch):
    """For tests of words and numbers: drawing takes half a second."""
    monkeypatch.setattr(report, "draw", lambda report, paths, style: [path.write_bytes(b"") for path in paths])


@pytest.fixture
def root(tmp_path):
    """Two seeds of two codistilling peers, one seed of one model alone."""
    make_run(tmp_path / "runs/codist/seed1", [[5.0, 3.6, 3.7], [5.0, 4.0, 3.8]], bleu=[30, 32], ensemble=33)
    make_run(tmp_path / "runs/codist/seed2", [[5.0, 4.0, 4.2], [5.0, 4.5, 4.2]], bleu=[28, 29], ensemble=31, seconds=20)
    make_run(tmp_path / "runs/alone", [[5.0, 4.0, 4.4]], bleu=[25])
    return tmp_path / "runs"


# --- numbers ---


def test_hand_computed_table(root):
    codist, alone = summary(root / "codist")["codist"], summary(root / "alone")["alone"]
    # Seed 1: peers' best 3.6 (update 200) and 3.8 (300); seed 2: 4.0 (200) and 4.2 (300). Means 3.7 and 4.1.
    assert codist["best_valid_nll"] == pytest.approx((3.9, 0.2 * math.sqrt(2), 2))
    assert codist["at_update"] == pytest.approx((250, 0, 2))
    assert codist["last_valid_nll"] == pytest.approx((3.975, math.sqrt(2) * 0.225, 2))  # 3.75 and 4.2
    assert codist["ppl"].mean == pytest.approx((2**3.6 + 2**3.8 + 2**4.0 + 2**4.2) / 4)
    assert codist["test BLEU"] == pytest.approx((29.75, math.sqrt(2) * 1.25, 2))  # 31 and 28.5
    assert codist["test BLEU of the ensemble"] == pytest.approx((32, math.sqrt(2), 2))
    assert codist["seconds"] == pytest.approx((15, math.sqrt(50), 2))
    assert alone["best_valid_nll"] == (4.0, None, 1), "one seed has no spread"
    assert (alone["at_update"].mean, alone["last_valid_nll"].mean, alone["updates"].mean) == (200, 4.4, 300)
    assert "test BLEU of the ensemble" not in alone


def test_of_equal_nlls_the_earliest_is_the_best(tmp_path):
    make_run(tmp_path / "a", [[4.0, 3.5, 3.5]])
    assert summary(tmp_path / "a")["a"]["at_update"].mean == 200


def test_order_of_arguments_changes_no_number(root):
    arguments = [root / "codist/seed2", root / "codist/seed1", root / "alone", root]
    assert len({json.dumps(summary(*order), sort_keys=True) for order in itertools.permutations(arguments)}) == 1


def test_table_cells():
    assert report_table.cell(report_summary.Stat(3.7, None, 1), 3, 1) == "3.700"
    assert report_table.cell(report_summary.Stat(3.7, 0.0123, 3), 3, 3) == "3.700 ± 0.012"
    assert report_table.cell(report_summary.Stat(2500.4, 50, 2), 0, 3) == "2,500 ± 50 (2 of 3)"
    assert report_table.cell(None, 3, 1) == "–"


def test_markdown_table():
    assert report_table.markdown_table([["method", "ppl"], ["a|b", "3.70"]]).splitlines() == [
        "| method |  ppl |",
        "|--------|-----:|",
        "| a\\|b   | 3.70 |",
    ]


def test_rows_of_peers(root):
    methods = report_files.load([str(root / "codist")]).methods
    shown = [column for column in report_table.columns(methods) if column.key in ("best_valid_nll", "test BLEU")]
    assert report_table.rows(methods, shown, per_peer=True) == [
        ["method", "seeds", "peers", "best valid NLL", "test BLEU"],
        ["codist", "2", "2", "3.900 ± 0.283", "29.75 ± 1.77"],
        ["codist: peer0", "2", "1", "3.800 ± 0.283", "29.00 ± 1.41"],
        ["codist: peer1", "2", "1", "4.000 ± 0.283", "30.50 ± 2.12"],
        ["codist: best peer by valid NLL", "2", "1", "3.800 ± 0.283", "29.00 ± 1.41"],
    ]


def test_a_seed_that_has_no_score_yet_is_counted(root):
    for file in (root / "codist/seed2").glob("*/test.sacrebleu.json"):
        file.unlink()
    (root / "codist/seed1/peer1/test.sacrebleu.json").unlink()
    methods = report_files.load([str(root / "codist")]).methods
    table = report_table.rows(methods, report_table.columns(methods))
    assert dict(zip(*table))["test BLEU"] == "30.00 (1 of 2)"
    missing = "codist seed1 peer1, codist seed2 peer0, codist seed2 peer1"
    assert f"test BLEU is not there (yet) for {missing}; the mean is over the others." in report_notes.notes(methods)


# --- real logs ---


def test_real_logs_of_every_criterion():
    found = summary(REAL / "ce", REAL / "ls", REAL / "rdrop", REAL / "codist")
    assert {label: round(stats["best_valid_nll"].mean, 4) for label, stats in found.items()} == {
        "ce": 4.692,  # valid_loss 4.705 and 4.679: cross_entropy logs no nll_loss
        "ls": 4.711,  # its valid_loss, smoothed, is 4.845
        "rdrop": 4.834,
        "codist": 4.763,  # 4.743 and 4.783
    }
    assert found["ce"]["best_valid_nll"].std == pytest.approx(0.026 / math.sqrt(2))
    assert found["ls"]["ppl"].mean == pytest.approx(26.19, abs=0.01), "fairseq's own valid_ppl"
    assert {stats["updates"].mean for stats in found.values()} == {30}


def test_rdrop_is_halved_to_the_nll_of_its_checkpoint():
    # 4.8341 was measured: this run's last checkpoint, loaded with the criterion cross_entropy over the same batches.
    log = report_files.load_log(REAL / "rdrop/seed1/peer0/train.log")
    assert log.doubled
    assert log.valid_nll()[-1] == (30, pytest.approx(4.8341, abs=0.0003))
    assert log.train_nll()[-1] == (30, pytest.approx(9.622 / 2))
    assert summary(REAL / "rdrop")["rdrop"]["ppl"].mean == pytest.approx(2**4.834)


def test_rdrop_with_alpha_zero_is_not_halved():
    text = (REAL / "rdrop/seed1/peer0/train.log").read_text()
    assert "'rdrop_alpha': 5.0" in text
    log = report_log.TrainLog.read(text.replace("'rdrop_alpha': 5.0", "'rdrop_alpha': 0.0").splitlines())
    assert not log.doubled and log.valid_nll()[-1] == (30, 9.668)


def test_rdrop_is_known_by_its_records_where_the_config_line_is_lost():
    lines = (REAL / "rdrop/seed1/peer0/train.log").read_text().splitlines()
    assert report_log.TrainLog.read(line for line in lines if "'criterion'" not in line).doubled
    lines = (REAL / "ls/seed1/peer0/train.log").read_text().splitlines()
    assert not report_log.TrainLog.read(line for line in lines if "'criterion'" not in line).doubled


def test_fairseqs_rdrop_still_doubles_in_validation():
    """The reason for the halving, against the criterion that is installed."""
    rdrop = pytest.importorskip("fairseq.criterions.label_smoothed_cross_entropy_with_rdrop")
    import torch
    from fairseq.criterions.cross_entropy import CrossEntropyCriterion
    from fairseq.data import Dictionary
    from fairseq.models import BaseFairseqModel

    class Model(BaseFairseqModel):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(9, 9)

        def forward(self, src_tokens):
            return self.table(src_tokens)  # (B, T, V)

    class Task:
        target_dictionary = Dictionary()

    torch.manual_seed(1)
    model, tokens = Model().eval(), torch.randint(4, 9, (3, 5))
    sample = {"net_input": {"src_tokens": tokens}, "target": tokens.roll(1, 0), "ntokens": tokens.numel()}
    true = CrossEntropyCriterion(Task, sentence_avg=False)(model, sample)[2]["loss"]
    criterion = rdrop.RdropLabelSmoothedCrossEntropyCriterion(Task, False, 0.1, rdrop_alpha=5.0).eval()
    _, size, logged = criterion(model, sample)
    assert size == tokens.numel()
    torch.testing.assert_close(logged["nll_loss"], 2 * true)


def test_codistillation_curves_of_a_real_log():
    log = report_files.load_log(REAL / "codist/seed1/peer0/train.log")
    alpha = dict(log.train_curve("codistill_alpha"))
    assert sorted(alpha) == [10, 15, 20, 25, 30], "before the first snapshot nothing is taught"
    assert alpha[30] == 0.7321 and dict(log.train_curve("codistill_agreement"))[30] == 0.965
    assert dict(log.train_nll())[30] == 4.74, "not the loss, which holds α·D"
    assert log.settings["criterion"] == "codistill_ce" and not log.doubled


# --- restarts, torn lines, runs that go on ---


def test_real_log_of_a_run_killed_at_25_and_resumed_from_15():
    log = report_files.load_log(REAL / "resumed/seed1/peer0/train.log")
    assert log.valid_nll() == [
        *[(5, 5.155), (6, 5.09), (10, 4.895), (12, 4.847), (15, 4.808)],
        *[(18, 4.78), (20, 4.762), (24, 4.734), (25, 4.726), (30, 4.699)],  # the first process had 4.782 at 18
        *[(35, 4.685), (36, 4.678), (40, 4.658), (42, 4.635), (45, 4.629)],
    ]
    assert log.finished and log.update == 45
    assert log.seconds == 3, "2 s of the first process, 1 s of the other, whose wall stands still at 0"


def test_what_a_restart_has_not_done_again_is_dropped():
    lines = [config_line(), FRESH, *(json_line("valid", u, loss=9.0) for u in (100, 200, 300, 400))]
    restarted = lines + [config_line(), loaded_line(200)]
    assert report_log.TrainLog.read(restarted).valid_nll() == [(100, 9.0), (200, 9.0)]
    again = restarted + [json_line("valid", 350, loss=8.0)]
    assert report_log.TrainLog.read(again).valid_nll() == [(100, 9.0), (200, 9.0), (350, 8.0)]


def test_updates_that_go_back_are_a_restart():
    lines = [json_line("valid", 100, loss=9), json_line("train_inner", 300, loss=9), json_line("valid", 300, loss=9)]
    log = report_log.TrainLog.read([*lines, json_line("train_inner", 200, loss=8), json_line("valid", 200, loss=8)])
    assert log.valid_nll() == [(100, 9), (200, 8)] and log.train_nll() == [(200, 8)] and log.update == 200


def test_a_start_from_nothing_drops_the_attempt_before_it():
    log = report_log.TrainLog.read((log_text([5, 4, 3], seconds=50) + log_text([6, 5], seconds=7)).splitlines())
    assert log.valid_nll() == [(100, 6), (200, 5)] and log.seconds == 7
    begun = report_log.TrainLog.read((log_text([5, 4, 3]) + config_line() + FRESH).splitlines())
    assert begun.valid_nll() == [] and begun.update == 0


def test_seconds_of_all_processes_are_added():
    first = [json_line("train_inner", 10, loss=1, wall=30), json_line("train_inner", 20, loss=1, wall=60)]
    second = [loaded_line(10), json_line("train_inner", 20, loss=1, wall=25)]
    assert report_log.TrainLog.read(first + second).seconds == 85, "the wall clock that falls back tells of a restart"
    longer = [config_line(), loaded_line(10), json_line("train_inner", 20, loss=1, wall=70)]
    assert report_log.TrainLog.read(first + longer).seconds == 130, "and the config line of a process that waited longer"


def test_seconds_of_a_resumed_process_whose_wall_stands_still():
    """fairseq's does, at 0, once it has loaded a checkpoint: the lines' own times tell."""
    lines = [config_line(), FRESH, json_line("train_inner", 100, loss=4, wall=50)]
    resumed = [config_line(), loaded_line(100), *(json_line("train_inner", n, loss=4, wall=0) for n in (200, 300))]
    times = ["01:00:00", "01:00:02", "01:00:30", "01:01:10"]
    lines += [line.replace("00:00:00", time) for line, time in zip(resumed, times)]
    log = report_log.TrainLog.read(lines)
    assert log.clock == {100: 50, 200: 78, 300: 118} and log.seconds == 118


def test_garbage_and_torn_lines_are_passed_over(tmp_path):
    whole = json_line("valid", 100, loss=4.0)
    (tmp_path / "train.log").write_bytes(
        whole.encode()
        + b"\xff\xfe\x00 garbage { \n| INFO | valid | {}\n| INFO | valid | {\"valid_loss\": }\n"
        + json_line("valid", 150, loss="None").encode()
        + json_line("valid", "nan", loss=1).encode()
        + json_line("valid", 200, loss=3.0)[:-20].encode()
        + json_line("valid", 300, loss=2.0).encode()  # behind a torn line, as after a kill
        + json_line("valid", 400, loss=1.0)[:-30].encode()
    )
    assert report_files.load_log(tmp_path / "train.log").valid_nll() == [(100, 4.0), (300, 2.0)]


def test_lines_of_fairseq_hydra_train():
    lines = (REAL / "ls/seed1/peer0/train.log").read_text().splitlines()
    hydra = [re.sub(r"^(\S+ \S+) \| INFO \| (\S+) \| ", r"[\1,123][\2][INFO] - ", line) for line in lines]
    assert hydra[-1].endswith("][fairseq_cli.train][INFO] - done training in 0.6 seconds")
    assert report_log.TrainLog.read(hydra) == report_log.TrainLog.read(lines)


def test_first_validation_subset_is_the_one_reported():
    config = config_line().replace("'seed'", "'valid_subset': 'dev,valid', 'seed'")
    log = report_log.TrainLog.read([config, json_line("dev", 10, loss=4), json_line("valid", 10, loss=5)])
    assert log.valid_nll() == [(10, 4)]


def test_settings_of_a_criterion_with_a_dict_among_its_options():
    config = config_line("{'_name': 'composite_loss', 'weights': {'a': 1}}")
    assert fairseq_log.parse_settings(config) == {
        **{"criterion": "composite_loss", "seed": "7", "max_update": "200", "log_format": "json"}
    }
    assert fairseq_log.parse_settings("criterion: CrossEntropyCriterion") == {}


def test_train_curve_of_epoch_ends_where_nothing_else_is_logged():
    log = report_log.TrainLog.read([json_line("train", 10, loss=4), json_line("train", 20, loss=3)])
    assert log.train_nll() == [(10, 4), (20, 3)]


def test_a_run_that_goes_on_is_reported_and_marked(tmp_path, capsys, no_figure):
    make_run(tmp_path / "runs/a", [[5.0, 4.5]], finished=False)
    (tmp_path / "runs/b/peer0").mkdir(parents=True)
    (tmp_path / "runs/b/peer0/train.log").write_text(config_line())  # has only begun
    status, out, _ = run_main(capsys, tmp_path / "runs")
    assert status == 0
    assert "Still running, or ended early (no 'done training' in the log): a peer0 (update 200 of 200)." in out
    assert f"Left out, for nothing is logged yet: {os.path.join('b', 'peer0', 'train.log')}." in out


def test_a_run_before_its_first_validation(tmp_path, capsys, no_figure):
    (tmp_path / "train.log").write_text(config_line() + json_line("train_inner", 50, loss=7, wall=3))
    status, out, _ = run_main(capsys, f"a={tmp_path}")
    assert status == 0 and re.search(r"\| a +\| +1 +\| +1 +\| +50 +\| +3 +\|", out.replace("-", ""))


def test_losses_that_are_not_finite_never_count_as_best(tmp_path, capsys, no_figure):
    make_run(tmp_path / "a/seed1", [[float("nan"), 5.0, float("nan")]])
    make_run(tmp_path / "a/seed2", [[5.0, 4.0, float("inf")]])
    status, out, _ = run_main(capsys, tmp_path / "a")
    assert status == 0 and "4.500 ± 0.707" in out and "nan ± nan" in out
    assert "validation losses are not finite, and never count as best: a seed1 peer0, a seed2 peer0." in out
    stats = json.loads((tmp_path / "a/report/results.json").read_text())["methods"][0]["summary"]
    assert stats["last_valid_nll"]["mean"] is None and stats["best_valid_nll"]["mean"] == 4.5


# --- which files are which method's ---


def labels(*arguments):
    """label -> number of peers in each run"""
    methods = report_files.load(list(map(str, arguments))).methods
    return {method.label: [len(run.peers) for run in method.runs] for method in methods}


def test_folders_tell_methods_seeds_and_peers(root, monkeypatch):
    assert labels(root) == {"alone": [1], "codist": [2, 2]}
    assert labels(root / "codist") == labels(root / "codist/seed2", root / "codist/seed1") == {"codist": [2, 2]}
    assert labels(root / "codist/seed1/peer0") == labels(root / "codist/seed1/peer0/train.log") == {"codist": [1]}
    assert labels(root, root / "codist/seed1") == {"alone": [1], "codist": [2, 2]}, "no log counts twice"
    assert list(labels(root / "codist", root)) == ["codist", "alone"], "rows in the order of the arguments"
    monkeypatch.chdir(root / "codist")
    assert labels(".") == {"codist": [2, 2]}


def test_labels(root):
    assert labels(f"new={root / 'codist'}", root) == labels(root, f"new={root / 'codist'}")
    assert labels(root, f"new={root / 'codist'}") == {"alone": [1], "new": [2, 2]}
    assert labels(f"x={root / 'alone'}", f"x={root / 'codist/seed1'}") == {"x": [1, 2]}, "seeds of one method"
    assert labels(f"x={root}") == {"x/alone": [1], "x/codist": [2, 2]}
    shutil.copytree(root / "alone", root / "a=b")
    assert labels(root / "a=b") == {"a=b": [1]}
    methods = report_files.load([f"x={root / 'alone'}", f"x={root / 'codist/seed1'}"]).methods
    assert [words for words, _ in methods[0].peers()] == ["x alone peer0", "x seed1 peer0", "x seed1 peer1"]


def test_a_run_without_peer_folders_and_its_ensemble(root):
    run = root / "codist/seed1/peer0"
    write_score(run / "ensemble.test.sacrebleu.json", 40)
    stats = summary(f"x={run / 'train.log'}", f"y={root / 'alone'}")["x"]
    assert stats["test BLEU"].mean == 30, "the ensemble's score is not a peer's"
    shutil.copytree(run, root / "flat")
    assert summary(root / "flat")["flat"]["test BLEU of the ensemble"].mean == 40


def test_two_folders_of_one_name_are_two_methods(root, tmp_path):
    shutil.copytree(root / "alone", tmp_path / "other/alone")
    assert set(labels(root / "alone", tmp_path / "other/alone")) == {"runs/alone", "other/alone"}
    assert set(labels(f"alone={tmp_path / 'other/alone'}", root / "alone")) == {"alone", "runs/alone"}


def test_peers_in_their_order_and_a_log_of_the_run_itself(tmp_path):
    make_run(tmp_path / "a", [[5.0 - n / 100] for n in range(11)])
    (tmp_path / "a/train.log").write_text(log_text([1.0]))
    methods = report_files.load([str(tmp_path / "a")]).methods
    assert [peer.name for peer in methods[0].runs[0].peers] == [f"peer{n}" for n in range(11)]
    shutil.rmtree(tmp_path / "a/peer0")
    assert labels(tmp_path / "a") == {"a": [10]}


def test_logs_under_names_of_their_own(root, tmp_path):
    for name in ("smoothed.log", "plain.log"):
        shutil.copy(root / "alone/peer0/train.log", tmp_path / name)
    write_score(tmp_path / "test.sacrebleu.json", 99)  # of which of the two? of neither
    found = summary(tmp_path / "smoothed.log", tmp_path / "plain.log")
    assert list(found) == ["smoothed", "plain"] and "test BLEU" not in found["plain"]


# --- scores ---


def test_a_list_of_metrics_and_several_test_sets(root):
    entries = [{"name": name, "score": score, "signature": name} for name, score in (("BLEU", 40), ("chrF2", 60))]
    (root / "alone/peer0/flickr2017.sacrebleu.json").write_text(json.dumps(entries))
    methods = report_files.load([str(root / "alone")]).methods
    assert [column.heading for column in report_table.columns(methods)][-4:-1] == [
        *("flickr2017 BLEU", "flickr2017 chrF2", "test BLEU")
    ]
    assert "flickr2017 chrF2: sacreBLEU chrF2" in report_notes.notes(methods)


def test_signatures_that_differ_are_warned_of(root, capsys, no_figure):
    assert "WARNING" not in run_main(capsys, root)[1]
    other = SIGNATURE.replace("13a", "intl")
    write_score(root / "alone/peer0/test.sacrebleu.json", 25, other)
    warning = next(line for line in run_main(capsys, root)[1].splitlines() if line.startswith("WARNING"))
    assert warning.startswith("WARNING: test BLEU must not be compared")
    assert f"{SIGNATURE} in codist; {other} in alone" in warning


# --- what is written ---


def test_everything_is_written_and_agrees(root, capsys):
    status, out, _ = run_main(capsys, root, "--title", "Two | runs")
    assert status == 0
    text = (root / "report/table.md").read_text()
    assert text.startswith("# Two | runs\n") and "![curves](curves.png)" in text
    table = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    assert table in out, "the terminal shows the same table"
    assert re.search(r"\| codist +\| +2 \| +2 \| +3\.900 ± 0\.283 \|", table)
    results = json.loads((root / "report/results.json").read_text())
    assert str(root) not in json.dumps(results), "files are given relative to the report"
    by_label = {method["label"]: method for method in results["methods"]}
    assert by_label["codist"]["summary"]["best_valid_nll"] == pytest.approx({"mean": 3.9, "std": 0.08**0.5, "n": 2})
    runs = by_label["codist"]["runs"]
    assert [run["seed"] for run in runs] == ["seed1", "seed2"]
    for peer in (peer for run in runs for peer in run["peers"]):
        own = report_files.load_log(root / "report" / peer["log"]).valid_nll()
        assert peer["settings"]["seed"] == "7"
        assert peer["values"]["best_valid_nll"] == min(nll for _, nll in own)
        score = json.loads((root / "report" / peer["scores"][0]["file"]).read_text())
        assert (peer["scores"][0]["value"], peer["scores"][0]["signature"]) == (score["score"], SIGNATURE)
    assert runs[1]["ensemble_scores"][0]["value"] == 31


def test_out_and_a_second_report_of_the_same_root(root, tmp_path, capsys, no_figure):
    status, out, _ = run_main(capsys, root, "--out", tmp_path / "x/y")
    assert status == 0 and sorted(os.listdir(tmp_path / "x/y")) == ["curves.png", "results.json", "table.md"]
    assert not (root / "report").exists() and f"written to {tmp_path / 'x/y'}" in out
    first = run_main(capsys, root)[1]
    assert run_main(capsys, root)[1] == first, "the report's own folder is no run"
    assert run_main(capsys, root / "alone/peer0/train.log")[0] == 0
    assert (root / "alone/peer0/report/table.md").exists()


def test_figure_of_real_logs(tmp_path):
    from matplotlib.image import imread

    methods = report_files.load([str(REAL / name) for name in ("ce", "ls", "rdrop", "codist", "resumed")]).methods
    report_figure.draw(report_table.Report("Five criteria", methods, [], []), [tmp_path / "all.png"], report_figure.Style())
    report_figure.draw(report_table.Report("No peers", methods[:1], [], []), [tmp_path / "one.png"], report_figure.Style())
    both, alone = imread(tmp_path / "all.png"), imread(tmp_path / "one.png")
    assert both.shape[1] == alone.shape[1] == 1360 and 680 <= alone.shape[0] <= both.shape[0] <= 760, "6.8 inches at 200 dpi"
    assert colours_of(both) == {0, 1, 2, 3, 4} and colours_of(alone) == {0}


def colours_of(picture):
    """Which methods' colours an RGBA picture (rows, columns, 4) holds above the legend."""
    picture = picture[: int(0.85 * len(picture))]
    pixels = set(map(bytes, (picture[..., :3].reshape(-1, 3) * 255).round().astype("uint8")))
    return {n for n in range(8) if bytes.fromhex(report_figure.look(n)["color"][1:]) in pixels - {b"\0\0\0"}}


def test_band_reads_each_curve_between_its_points():
    short, long = [(0, 4.0), (100, 2.0)], [(50, 5.0), (100, 6.0), (150, 0.0)]
    assert report_figure.band([short, long]) == [(50, 3.0, 4.0, 5.0), (100, 2.0, 4.0, 6.0)], "where both are known"
    assert report_figure.band([long]) == [(update, nll, nll, nll) for update, nll in long]
    assert report_figure.band([[(0, 1.0)], [(10, 1.0)]]) == []


def test_focus_leaves_the_fall_from_log2_v_out():
    low, high = report_figure.focus([[(10, 11.0), (30, 5.0), (100, 4.0)], [(10, 12.0), (30, 4.5), (100, 4.8)]])
    assert (low, high) == pytest.approx((3.95, 5.05))
    assert report_figure.focus([]) is None and report_figure.focus([[(10, 4.0)]]) is None


def test_nll_axis_is_focused():
    from matplotlib.figure import Figure

    methods = report_files.load([str(REAL / "ls")]).methods
    axes = Figure().add_subplot()
    report_figure._panel(axes, methods, "valid NLL", report_log.TrainLog.valid_nll, report_figure.Style(), 8)
    assert axes.get_ylim() == pytest.approx(report_figure.focus([methods[0].runs[0].peers[0].log.valid_nll()]))


class Terminal:
    """A stdout that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("width, term", [(20, "xterm"), (60, "xterm"), (120, "xterm"), (300, "xterm"), (80, "dumb")])
def test_no_terminal_cuts_a_number(root, monkeypatch, width, term):
    methods = report_files.load([f"[i]a={root / 'alone'}", str(root)]).methods
    table = report_table.rows(methods, report_table.columns(methods), per_peer=True)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("NO_COLOR", "1")
    report_table.show(report_table.Report("title [bold]", methods, table, ["WARNING: [red]"]))
    words = "".join(terminal.text.split())
    assert all("".join(text.split()) in words for row in table[1:] for text in row[1:]), terminal.text
    assert "…" not in terminal.text and "[bold]" in terminal.text and "[red]" in terminal.text
    assert "[i]a" in terminal.text, "a name is no markup"


def test_metric(root, capsys, no_figure):
    log = root / "alone/peer0/train.log"
    log.write_text(log.read_text().replace('"valid_loss": "4.0"', '"valid_loss": "4.0", "valid_accuracy": "61.5"'))
    status, out, _ = run_main(capsys, root / "alone", "--metric", "accuracy")
    assert status == 0 and "valid accuracy at best" in out and "61.500" in out
    status, out, error = run_main(capsys, root / "alone", "--metric", "acuracy")
    assert status == 2 and not out
    assert "--metric must be a field of the valid lines (accuracy, loss, num_updates), but is 'acuracy'" in error


def test_what_the_exchange_has_cost(tmp_path, capsys, no_figure):
    """Over both peers, and over a peer's restarts: 600 updates."""
    make_run(tmp_path / "two", [[4.0], [4.0]])
    quiet = dict(published=2, skipped=1, failed=0, read=1, published_bytes=0, read_bytes=0, copy_s=0.0, waited_s=0.0)
    attempts = {
        "peer0": [dict(quiet, updates=100, published_bytes=300_000, hidden_s=0.5, visible_s=0.1)] * 2,
        "peer1": [dict(quiet, updates=400, read_bytes=1200, hidden_s=0.2, visible_s=0.1, copy_s=0.6, waited_s=3.0)],
    }
    for peer, found in attempts.items():
        with open(tmp_path / "two" / peer / "train.log", "a") as log:
            for attempt in found:
                log.write(f"x | INFO | x | codistillation: exchange totals {json.dumps(attempt)}\n")
            log.write('codistillation: exchange totals {"updates": 4\n')  # torn by a kill
    assert run_main(capsys, tmp_path)[0] == 0
    notes = (tmp_path / "report/table.md").read_text()
    assert (
        "exchange of two, for each peer and update: published 1 kB, read 2 bytes; in 1,000 updates 2.00 s hidden beside the "
        "training, 1.00 s copying weights, 0.50 s otherwise visible, 5.00 s waiting for peers; 3 snapshots skipped or failed."
    ) in notes


def test_dropped_validation_sentences_are_told(capsys, tmp_path, no_figure):
    out = run_main(capsys, REAL / "ls", "--out", tmp_path / "out")[1]
    assert "leaves up to 7 sentences out of validation when --required-batch-size-multiple is 8" in out
    text = (REAL / "ls/seed1/peer0/train.log").read_text()
    (tmp_path / "train.log").write_text(text.replace("_batch_size_multiple': 8", "_batch_size_multiple': 1"))
    assert "out of validation" not in run_main(capsys, tmp_path)[1]


def chosen_by(metric, values, maximise=True):
    """The log of a run whose --best-checkpoint-metric is `metric`, validated every 100 updates, NLL rising."""
    told = f"'best_checkpoint_metric': '{metric}', 'maximize_best_checkpoint_metric': {maximise}, 'seed'"
    lines = [json_line("valid", 100 * n, loss=3 + n, **{metric: value}) for n, value in enumerate(values, start=1)]
    return config_line().replace("'seed'", told) + FRESH + "".join(lines) + DONE


def test_what_chooses_the_checkpoint_has_columns_and_a_curve(tmp_path, capsys, monkeypatch):
    panels = []
    monkeypatch.setattr(report_figure, "_panel", lambda axes, methods, name, curve_of, style, size: panels.append(name))
    for name, text in {
        "bleu": chosen_by("bleu", [10, "nan", 31.5, 31.5, 20]),
        "error": chosen_by("wer", [9, 7, 8], maximise=False),
        "nll": chosen_by("loss", []) + json_line("valid", 100, loss=4, bleu=99),
    }.items():
        (tmp_path / f"runs/{name}").mkdir(parents=True)
        (tmp_path / f"runs/{name}/train.log").write_text(text)
    status, out, _ = run_main(capsys, tmp_path / "runs")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    named = {row[0]: dict(zip(table[0], row)) for row in table[2:]}
    assert status == 0 and {row["best valid NLL"] for row in named.values()} == {"4.000"}
    # Of equal values fairseq keeps the latest.
    assert (named["bleu"]["best valid bleu"], named["bleu"]["at update of bleu"]) == ("31.500", "400")
    assert (named["error"]["best valid wer"], named["error"]["at update of wer"]) == ("7.000", "200")
    assert named["nll"]["best valid bleu"] == named["nll"]["best valid wer"] == "–"
    assert "bleu chooses checkpoint_best.pt of bleu (--best-checkpoint-metric)" in out
    assert panels == ["valid NLL", "valid bleu", "valid wer"]


def test_names_that_are_no_text(root, capsys):
    """Latin-1, line feeds, escape sequences, dollars and a first "_" in names of folders and in what sacreBLEU printed."""
    names = [os.fsdecode(b"caf\xe9"), "two\nlines \x1b[31m", "$_a$ $", "_hidden"]
    for name in names:
        make_run(root / name, [[4.0]], bleu=[30], signature="nrefs:1\n\x1b[0m")
    (root / names[0] / "peer1").mkdir()
    (root / names[0] / "peer1/train.log").write_text("")
    status, out, error = run_main(capsys, root)
    assert status == 0 and not error and "\x1b" not in out
    shown = (root / "report/table.md").read_text(encoding="utf-8")
    for text in (out, shown):
        assert "| caf\\xe9 " in text and "| two\\nlines \\x1b[31m " in text
        assert "Left out, for nothing is logged yet: caf\\xe9" in text
    logs = [m["runs"][0]["peers"][0]["log"] for m in json.loads((root / "report/results.json").read_text())["methods"]]
    assert f"../{names[0]}/peer0/train.log" in logs
    (root / names[0] / "peer0/train.log").write_text("broken")
    assert "caf\\xe9/peer0/train.log must hold" in run_main(capsys, root)[2]


def test_a_leading_tilde_is_the_home_folder(root, tmp_path, capsys, monkeypatch, no_figure):
    monkeypatch.setenv("HOME", str(tmp_path))
    status, out, error = run_main(capsys, "x=~/runs/alone", "~/runs/codist", "--out=~/out")
    assert (status, error) == (0, "") and "| x" in out and (tmp_path / "out/table.md").exists()


def test_infinities_of_both_signs_have_a_mean(tmp_path, capsys, no_figure):
    (tmp_path / "a").mkdir()
    for peer, value in (("peer0", "inf"), ("peer1", "-inf")):
        (tmp_path / "a" / peer).mkdir()
        (tmp_path / "a" / peer / "train.log").write_text(config_line() + json_line("valid", 100, loss=4, score=value))
    assert run_main(capsys, tmp_path / "a", "--metric", "score")[0] == 0


# --- bad input ---


def bad_score(text):
    def make(tmp_path):
        make_run(tmp_path / "a", [[4.0]])
        (tmp_path / "a/peer0/test.sacrebleu.json").write_text(text)
        return tmp_path / "a"

    return make


def empty_folder(tmp_path):
    (tmp_path / "a/peer0").mkdir(parents=True)
    return tmp_path / "a"


def silent_log(text):
    def make(tmp_path):
        (tmp_path / "train.log").write_text(text)
        return tmp_path

    return make


def other_log(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/base.log").write_text(log_text([4.0]))
    return tmp_path / "a"


def named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


TRACEBACK = "Traceback (most recent call last):\n  File x, line 1\nValueError: no good\n"
BAD = {
    "no path": (lambda tmp_path: tmp_path / "nowhere", "nowhere does not exist"),
    "no path behind a label": (lambda tmp_path: f"x={tmp_path / 'nowhere'}", "nowhere does not exist"),
    "nothing": (lambda tmp_path: "", "RUN must be PATH or LABEL=PATH, but is '' instead"),
    "label only": (lambda tmp_path: "x=", "RUN must be PATH or LABEL=PATH, but is 'x=' instead"),
    "no label": (lambda tmp_path: f"={tmp_path}", "RUN must be PATH or LABEL=PATH"),
    "no log": (empty_folder, "must have a train.log in or below it, as codistill-launch writes it, but"),
    "no log, and what to do": (empty_folder, "plain fairseq-train wrote it: LS=base.log, from fairseq-train --log-format json"),
    "a log of its own name": (other_log, "a has none; name the log itself if plain fairseq-train wrote it: a="),
    "simple format": (lambda tmp_path: REAL / "simple", "did you forget --log-format json?"),
    "no log of fairseq's": (silent_log("hello\n"), "did you forget --log-format json? Its last line: hello"),
    "failed at once": (silent_log(config_line() + TRACEBACK), "failed before its first loss: ValueError: no good"),
    "no text": (silent_log("\0\x01" * 3_000_000), "train.log must hold fairseq's JSON lines, but is no text"),
    "a folder": (lambda tmp_path: (tmp_path / "train.log").mkdir() or tmp_path, "train.log must be a file, but is a folder"),
    "a pipe": (lambda tmp_path: os.mkfifo(tmp_path / "train.log") or tmp_path, "train.log must be a file, but is a pipe"),
    "a named pipe": (named_pipe, "RUN must be a file or a folder, but"),
    "a link to nothing": (
        lambda tmp_path: (tmp_path / "train.log").symlink_to("gone") or tmp_path, "train.log cannot be read: No such file",
    ),
    "only begun": (silent_log(config_line()), "has none yet; has the training failed, or only just begun?"),
    "empty": (silent_log(" \n"), "has none yet; has the training failed, or only just begun?"),
}


@pytest.mark.parametrize("make, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_clear_sentence(make, sentence, tmp_path, capsys):
    status, out, error = run_main(capsys, make(tmp_path), "--out", tmp_path / "out")
    assert status == 2 and not out
    assert sentence in error and error.startswith("codistill-report: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, sentence",
    [
        ('{"name": "BLEU", "sco', "a/peer0/test.sacrebleu.json must hold the JSON"),
        ('{"name": "BLEU", "score": "high", "signature": "x"}', "was the scoring interrupted?"),
        ('{"name": "BLEU"}', "KeyError: 'score'"),
        ("27.3", "must hold the JSON that sacrebleu prints"),
    ],
)
def test_a_score_that_cannot_be_read_costs_no_other_number(text, sentence, tmp_path, capsys, no_figure):
    make_run(tmp_path / "a", [[4.0], [5.0]], bleu=[30, 31])
    (tmp_path / "a/peer0/test.sacrebleu.json").write_text(text)
    status, out, error = run_main(capsys, tmp_path / "a")
    assert status == 1 and sentence in error and error.count("\n") == 1
    assert "4.500" in out and "31.00" in out and "could not be used: peer0/test.sacrebleu.json." in out


def test_a_broken_run_costs_no_other_run(root, capsys, no_figure):
    make_run(root / "failed", [[4.0]])
    (root / "failed/peer0/train.log").write_text("fairseq-train: error: unrecognized arguments: --nonsense\n")
    os.mkfifo(root / "codist/seed2/peer1/test_2.sacrebleu.json")
    status, out, error = run_main(capsys, root)
    assert status == 1 and "3.900 ± 0.283" in out and "| alone" in out and "| failed" not in out
    assert "failed/peer0/train.log must hold fairseq's JSON lines" in error and "unrecognized arguments: --nonsense" in error
    assert "test_2.sacrebleu.json must be a file, but is a pipe" in error and error.count("\n") == 2
    left_out = "WARNING: left out, for it could not be used: codist/seed2/peer1/test_2.sacrebleu.json, failed/peer0/train.log."
    assert left_out in out and left_out in (root / "report/table.md").read_text()


def test_what_the_disk_refuses_is_told_and_the_rest_is_shown(root, capsys, monkeypatch, no_figure):
    (root / "codist/seed2/peer0/train.log").unlink()
    (root / "codist/seed2/peer0/train.log").symlink_to("/proc/self/mem")  # opens, and fails at the first read
    make_run(root / "locked", [[4.0]])
    scandir = os.scandir

    def guarded(path):
        if str(path) == str(root / "locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    status, out, error = run_main(capsys, root)
    assert status == 1 and "| alone" in out and "| codist" in out
    assert f"{root}/locked cannot be read: Permission denied.\n" in error and error.count("\n") == 2
    assert "seed2/peer0/train.log cannot be read: Input/output error.\n" in error
    assert f"{root}/locked cannot be read" in run_main(capsys, root / "locked")[2]


def test_out_that_cannot_be_written(root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    status, out, error = run_main(capsys, root, "--out", tmp_path / "file")
    assert status == 2 and "3.900 ± 0.283" in out and "written" not in out
    assert "--out must be a folder that can be written, but" in error and "exists" in error


def test_a_reader_that_leaves_early_loses_no_file(root):
    code = (
        "import sys; from fairseq_codistill.report import main as report; "
        f"sys.exit(report.main([{str(root)!r}]))"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == ("", 0)
    assert sorted(os.listdir(root / "report")) == ["curves.png", "results.json", "table.md"]


def test_the_command_starts_without_fairseq_torch_or_matplotlib():
    code = (
        "import sys; from fairseq_codistill.report import main as report; "
        "print(sorted({'fairseq', 'torch', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)))"
    )
    folder = ROOT
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_full_disk_under_stdout_loses_no_file_and_is_an_error(root):
    code = "import sys; sys.argv = ['codistill-report']; from fairseq_codistill.report import main as report; "
    code += f"sys.exit(report.main([{str(root)!r}]))"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.endswith("but not shown: No space left on device.\n")
    assert sorted(os.listdir(root / "report")) == ["curves.png", "results.json", "table.md"]
