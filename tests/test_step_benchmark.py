"""benchmarks/step: that it measures what it says, on a model as small as can be."""

import json

import pytest
from matplotlib import pyplot

from benchmarks.step import measure as step
from benchmarks.step import scaling as step_scaling
from benchmarks.step.method import PARTS, Method, Setting, Step, image_words, write_data

TINY = Setting(
    "--task translation --arch transformer --encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16 "
    "--encoder-ffn-embed-dim 16 --decoder-ffn-embed-dim 16 --encoder-attention-heads 2 --decoder-attention-heads 2",
    vocabulary=64,
    tokens=200,
    length=12,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_data(TINY, tmp_path_factory.mktemp("step") / "data", sentences=80)


@pytest.mark.parametrize("text", ["cross_entropy", "rdrop", "codistill_ce:2", "codistill_ce:3:kl:bf16:2"])
def test_methods_that_are_meant(text):
    method = Method.parse(text)
    assert ":".join(str(part) for part in method[: len(text.split(":"))]) == text


@pytest.mark.parametrize(
    "text", ["mse", "codistill_ce", "codistill_ce:1", "codistill_ce:2:ce:fp8", "rdrop:2", "codistill_ce:2:ce:bf16:x"]
)
def test_methods_that_are_not(text):
    with pytest.raises(ValueError, match="^A method must be cross_entropy, rdrop or codistill_ce:N"):
        Method.parse(text)


def test_it_trains_what_it_says(tiny):
    pytest.importorskip("fairseq.criterions.label_smoothed_cross_entropy_with_rdrop")  # not in stock 0.12.2
    methods = ("cross_entropy", "codistill_ce:3:ce:bf16:2", "rdrop")
    steps = {text: Step(TINY, Method.parse(text), tiny) for text in methods}
    assert len(steps["cross_entropy"].trainer.task.target_dictionary) == 64
    rows = step.measure(steps, rounds=1, repeats=4, warm_up=1)
    for text, (row,) in rows.items():
        assert row["step"] == pytest.approx(sum(row[part] for part in PARTS))
        assert (row["peers"] > 0) == text.startswith("codistill_ce")
    for one in steps.values():
        assert one.trainer.get_num_updates() == 1 + 1 + 4, "the warm-up, the round's first, and its repeats"
    peers = steps["codistill_ce:3:ce:bf16:2"].peers
    assert len(peers) == 2 and str(next(peers[0].parameters()).dtype) == "torch.bfloat16"
    sizes = [batch["net_input"]["src_tokens"].size(0) == batch["target"].size(0) for batch in steps["rdrop"]._batches]
    assert all(sizes), "R-Drop doubles a copy of the batch only"


def test_images(tmp_path):
    setting = Setting(image_words("resnet8", 8), vocabulary=3, tokens=4, image_size=8)
    data = write_data(setting, tmp_path / "data")
    texts = ("cross_entropy", "codistill_ce:2:ce")
    rows = step.measure({text: Step(setting, Method.parse(text), data) for text in texts}, rounds=1, repeats=1, warm_up=1)
    assert [rows[text][0]["peers"] > 0 for text in texts] == [False, True]


def test_ratios_and_table():
    rows = {"a": [dict(step=s, peers=0, forward=s, backward=0, rest=0) for s in (1.0, 2.0, 4.0)]}
    rows["b"] = [dict(run, step=run["step"] * r) for run, r in zip(rows["a"], (1.5, 1.1, 1.2))]
    assert step.ratios(rows, "a")["b"]["median"] == pytest.approx(1.2)
    lines = step.table(rows, {"a": dict(step=100.0, peers_weights=0.0), "b": dict(step=50.0, peers_weights=25.0)}, "a")
    assert lines[3].startswith("| b | 2200 | **1.20** (1.10 … 1.50)") and lines[3].endswith("| 50 | 0.50 | 25 | 0.75 |")


def test_the_floor():
    assert step_scaling.floor(Method.parse("codistill_ce:2")) == pytest.approx(4 / 3)
    assert step_scaling.floor(Method.parse("codistill_ce:4:ce:fp32:3")) == pytest.approx(4 / 3)


def test_the_cost_of_exchanges_is_read_and_drawn(tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"settings": {"interval": 4}, "ratios": [[0.5, 0.5], [1.0, 1.0]]}))
    row = step_scaling.exchange_cost(file)
    assert (row["value"], row["ratio"]) == (4, 1.5) and row["error"] == pytest.approx((1 / 3) ** 0.5 / 2)
    point = {f"{dtype}_{name}": 1.0 for dtype in step_scaling.DTYPES for name in ("median", "low", "high")}
    results = {"every": [{"value": 1, "floor": 1.3, **point}]}
    assert step_scaling.table(results, [row])[-1] == "| 4 | 1.500 ± 0.289 |"
    without, with_exchanges = tmp_path / "without.png", tmp_path / "with.png"
    step_scaling.draw(results, [], without)
    step_scaling.draw(results, [row], with_exchanges)
    assert pyplot.imread(with_exchanges).shape[1] > pyplot.imread(without).shape[1], "one panel more"


def test_without_a_gpu_a_sentence(capsys, monkeypatch):
    monkeypatch.setattr(step.torch.cuda, "is_available", lambda: False)
    assert step.main(["--setting", "transformer_big"]) == 0
    assert capsys.readouterr().out == "transformer_big was not measured: it needs a GPU, and torch finds none here.\n"
