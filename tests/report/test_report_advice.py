"""What codistill-report says about over-fitting and α: on small made logs, and on the committed ones it was calibrated on."""

from __future__ import annotations

import re

import pytest
from fairseq_runs import ROOT
from test_report import DONE, FRESH, config_line, json_line, run_main

from fairseq_codistill.report import advice, files, main

RECIPES = ROOT / "recipes"
TRANSLATION = ["multi30k_en_de/results/" + name for name in ("single", "codistill_ce", "codistill_mse", "tuning", "levers")]


def write_log(folder, valid, train, alpha=None, wpb=800, criterion="cross_entropy", epochs=4):
    """A run that logs and validates every 100 updates."""
    lines = [config_line(criterion=f"{{'_name': '{criterion}', 'x': 1}}", max_update=100 * len(valid)), FRESH]
    for n, (nll, own) in enumerate(zip(valid, train), start=1):
        taught = {} if alpha is None else {"codistill_alpha": alpha, "codistill_agreement": 0.5 + 0.01 * n}
        lines += [json_line("train_inner", 100 * n, loss=9.0, nll_loss=own, wpb=wpb, **taught)]
        lines += [json_line("train", 100 * n, loss=9.0)] if n % (len(valid) // epochs) == 0 else []
        lines += [json_line("valid", 100 * n, loss=nll)]
    (folder / "peer0").mkdir(parents=True)
    (folder / "peer0/train.log").write_text("".join([*lines, DONE]))


def told(root):
    return advice.advice(files.load([str(root)]).methods)


FALL = [5.0, 4.5, 4.0, 3.8, 3.6, 3.5, 3.45, 3.4]
OVER = [*FALL[:6], 3.6, 3.7]
TRAIN = [4.9, 4.0, 3.4, 3.0, 2.6, 2.4, 2.2, 2.0]


def test_a_run_that_over_fits(tmp_path):
    write_log(tmp_path / "single", OVER, TRAIN)
    assert told(tmp_path) == [
        "single at update 800: valid NLL 3.700, 0.200 above its best at 600; train NLL 2.000; gap 1.70 bits. Codistillation is "
        "likely to pay: in measured runs with one above 1 it gained 0.2 to 0.3 bits."
    ]


@pytest.mark.parametrize(("gap", "words"), [(0.1, "is unlikely to pay"), (-0.2, "is unlikely to pay"), (0.6, "pays is open")])
def test_runs_that_over_fit_less(tmp_path, gap, words):
    write_log(tmp_path / "single", FALL, [nll - gap for nll in FALL])
    (line,) = told(tmp_path)
    assert words in line and f"gap {gap:.2f} bits" in line and "valid NLL 3.400, its best;" in line


@pytest.mark.parametrize(
    ("valid", "train", "words"),
    [
        ([nll + 0.4 for nll in FALL], [nll + 0.2 for nll in FALL],
         "behind at the end, at its best +0.300; gap 0.20 bits instead of 1.70, agreement 0.58. α was too large; use a"),
        ([nll + 0.2 for nll in FALL[:-1]] + [3.0], FALL,
         "ahead from update 800 on, at its best -0.500; gap -0.40 bits instead of 1.70, agreement 0.58. "
         "α was too large, at first: in the end it is 0.500 bits better; use"),
        ([nll - 0.01 for nll in OVER], TRAIN,
         "ahead from update 100 on, at its best -0.010; gap 1.69 bits instead of 1.70, agreement 0.58. α was too small: most"),
        ([nll - 0.1 for nll in FALL], [*FALL[:-1], 2.2], "gap 1.10 bits instead of 1.70, agreement 0.58. α was about right."),
    ],
)  # fmt: skip
def test_a_codistilled_run_beside_a_run_alone(tmp_path, valid, train, words):
    write_log(tmp_path / "single", OVER, TRAIN)
    write_log(tmp_path / "taught", valid, train, alpha=1, criterion="codistill_ce")
    lines = told(tmp_path)
    assert len(lines) == 2 and lines[1].startswith("taught beside single: valid NLL ") and words in lines[1]


def test_what_is_no_run_alone_is_not_compared_with(tmp_path):
    """all_reduce has twice the batch, another part of the data more epochs, R-Drop and label smoothing another loss."""
    write_log(tmp_path / "taught", OVER, TRAIN, alpha=1, criterion="codistill_ce")
    write_log(tmp_path / "all_reduce", OVER, TRAIN, wpb=1600)
    write_log(tmp_path / "half", OVER, TRAIN, epochs=8)
    write_log(tmp_path / "smoothed", OVER, TRAIN, criterion="label_smoothed_cross_entropy")
    methods = {method.label: method for method in files.load([str(tmp_path)]).methods}
    assert advice.alone_beside(methods["taught"], methods.values()) is None
    assert [line.split(" at ")[0] for line in told(tmp_path)] == ["all_reduce", "half"]
    write_log(tmp_path / "zero", OVER, TRAIN, alpha=0, criterion="codistill_ce")
    assert told(tmp_path)[-1].startswith("taught beside zero: "), "peers with α = 0 do not teach"


def test_logs_that_say_too_little_get_no_advice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(main, "draw", lambda report, paths, style: [path.write_bytes(b"") for path in paths])
    write_log(tmp_path / "runs/short", [], [])
    (tmp_path / "runs/short/peer0/train.log").write_text(config_line() + FRESH + json_line("train_inner", 100, loss=4, wpb=9))
    write_log(tmp_path / "runs/infinite", [float("inf")] * 4, [float("nan")] * 4)
    write_log(tmp_path / "runs/taught", FALL, TRAIN, alpha=1, criterion="codistill_ce")
    assert told(tmp_path / "runs") == []
    write_log(tmp_path / "runs/single", OVER, TRAIN)
    status, out, _ = run_main(capsys, tmp_path / "runs")
    assert status == 0 and "gap 1.70 bits. Codistillation is likely to pay" in out and "taught beside single" in out


# --- the committed logs ---


def load(*folders):
    return {method.label: method for method in files.load([str(RECIPES / folder) for folder in folders]).methods}


def test_the_table_of_the_docstring_is_what_the_logs_say():
    table = re.findall(r"^    (\S+/results\S*) +(-?[\d.]+)    (.*)$", advice.__doc__, re.MULTILINE)
    assert len(table) == 7
    for folder, gap, gains in table:
        alone = next(iter(load(folder).values()))
        assert advice.mean_gap(alone).bits == pytest.approx(float(gap), abs=0.005), folder
        for gain, name in re.findall(r"(-?[\d.]+) \((\w+)\)", gains):
            method = load(f"{folder.rpartition('/')[0]}/{name}")[name]
            assert advice.lag_behind(method, alone).gain == pytest.approx(float(gain), abs=0.006), (folder, name)
            likely = advice.mean_gap(alone).bits >= advice.LIKELY
            assert likely == (float(gain) >= 0.2) and (likely or advice.mean_gap(alone).bits < advice.UNLIKELY)


VERDICTS = {
    "too large": {
        "multi30k": ["ce_constant_3", "mse_growing_1"], "multi30k_en_de/results/two_cores": ["codistill_ce"],
        "newstest_de_en/results/two_cores": ["codistill_ce"], "tatoeba_de_en/results/two_cores": ["codistill_ce"],
    },
    "too small": {"multi30k": ["ce_constant_0.3", "mse_growing_0.03"]},
    "about right": {
        "multi30k": ["codistill_ce", "codistill_mse", "ce_growing_0.3", "mse_constant_0.3", "every_2", "peer_int8"],
        "multi30k_en_de/results/default": ["default"], "newstest_de_en/results/default": ["default"],
        "newstest_de_en/results/over_fitting": ["codistill_ce"], "demo/results": ["codistill_ce"],
    },
}  # fmt: skip


@pytest.mark.parametrize("words", VERDICTS)
def test_the_verdicts_on_the_committed_logs(words):
    for folder, names in VERDICTS[words].items():
        methods = load(*(TRANSLATION if folder == "multi30k" else [folder]))
        lines = [line for line in advice.advice(list(methods.values())) if " beside " in line]
        for name in names:
            (line,) = [line for line in lines if line.startswith(f"{name} beside ")]
            assert f"α was {words}" in line, line


def test_a_part_of_the_data_is_not_compared_with_all_of_it():
    methods = load(*(f"fashion_mnist/results/{name}" for name in ("single", "codistill", "codistill_reduced_1_8")))
    assert advice.alone_beside(methods["codistill"], methods.values()) is methods["single"]
    assert advice.alone_beside(methods["codistill_reduced_1_8"], methods.values()) is None
