"""benchmarks/step/two_jobs.py: that it starts what it says and times what it should."""

import json
from types import SimpleNamespace

import pytest
from fairseq_runs import MODEL, TRAINING, Job

from benchmarks.step import two_jobs

PLAN = two_jobs.Plan([], updates=40, skip=10, interval=4, log_interval=10)


def log(*records, **more):
    """fairseq's lines: (seconds after the full minute, update, words per second) each, of batches of 100 words."""
    lines = []
    for second, update, wps in records:
        values = {"epoch": 1, "loss": "5", "wps": str(wps), "ups": "0.01", "wpb": "100", "num_updates": str(update), **more}
        lines.append(f"2026-01-01 00:00:{second:02} | INFO | train_inner | {json.dumps(values)}")
    return "\n".join(["2026-01-01 00:00:00 | INFO | fairseq_cli.train | begins", *lines, "done"])


def test_time_is_taken_from_the_words_per_second_of_what_counts():
    quick, slow = log((5, 10, 1.0), (10, 20, 50.0), (30, 30, 200.0)), log((6, 10, 1.0), (20, 20, 25.0), (40, 30, 1000.0))
    first, second = two_jobs.speeds([quick, slow], PLAN, taught=False)
    assert first.seconds == pytest.approx((2.0 + 0.5) / 2) and first.wps == pytest.approx(200 / 2.5)
    assert second.seconds == pytest.approx(4.0), "what it did alone, after the first had ended, does not count"


def test_what_cannot_be_timed_is_refused():
    with pytest.raises(ValueError, match="no update is left to be timed: --skip is 10, of 40 updates"):
        two_jobs.speeds([log((5, 10, 1.0))] * 2, PLAN, taught=False)
    with pytest.raises(ValueError, match="not every timed update was taught"):
        two_jobs.speeds([log((5, 20, 1.0))] * 2, PLAN, taught=True)
    assert two_jobs.speeds([log((5, 20, 1.0), codistill_loss="1")] * 2, PLAN, taught=True)


def test_the_table_compares_within_a_round_and_a_malloc():
    rows = {("system", "cross_entropy"): [1.0, 2.0], ("system", "codistill_ce"): [1.2, 2.0]}
    rows.update({("tuned", "cross_entropy"): [0.5, 1.0], ("tuned", "fused_ce"): [0.4, 0.8]})
    rows["tuned", "codistill_ce"] = [0.6, 1.0]
    lines = two_jobs.table(rows)
    assert lines[0].endswith("| / cross_entropy | / fused_ce | / cross_entropy, system malloc |")
    assert lines[3].endswith("| **1.10** (1.00 … 1.20) | – | **1.10** (1.00 … 1.20) |")
    assert lines[6].endswith("| **1.10** (1.00 … 1.20) | **1.38** (1.25 … 1.50) | **0.55** (0.50 … 0.60) |")


@pytest.mark.parametrize("arm, words", [
    ("cross_entropy", "--criterion cross_entropy"), ("fused_ce", "--criterion codistill_ce --codistill-fused-ce"),
    ("codistill_ce", "--codistill-interval 4 --codistill-wait 300"), ("codistill_ce:bf16", "--codistill-peer-dtype bf16"),
])  # fmt: skip
def test_arms(arm, words):
    assert " ".join(two_jobs.arm_words(arm, PLAN)).endswith(words)


@pytest.mark.parametrize("arm", ["mse", "codistill_ce:fp8", "codistill_ce:bf16:2", "cross_entropy:bf16"])
def test_arms_that_are_none(arm):
    with pytest.raises(ValueError, match=r"^An arm must be cross_entropy, fused_ce or codistill_ce\[:DTYPE\]"):
        two_jobs.arm_words(arm, PLAN)


def test_instruction_sets_are_named():
    cpuinfo = "model name\t: A CPU\nflags\t\t: sse avx2 avx512f amx_tile avx512_bf16\nmodel name\t: A CPU\nflags\t\t: sse"
    assert two_jobs.instruction_sets("native", cpuinfo) == "A CPU (avx2, avx512f, avx512_bf16, amx_tile)"
    assert two_jobs.instruction_sets("avx2", cpuinfo).endswith("amx_tile; kept to avx2)")
    assert two_jobs.instruction_sets("native", "").startswith("a processor without a name (none of avx2, ")


def test_a_tuned_malloc_is_the_installed_one_else_glibcs(monkeypatch):
    monkeypatch.setattr(two_jobs, "is_loaded", lambda library: True)
    monkeypatch.setattr(two_jobs.ctypes.util, "find_library", lambda name: "libtc.so" if name == "tcmalloc" else None)
    assert two_jobs.mallocs() == {"system": {}, "tcmalloc": {"LD_PRELOAD": "libtc.so"}}
    monkeypatch.setattr(two_jobs, "is_loaded", lambda library: False)
    assert "MALLOC_MMAP_THRESHOLD_" in two_jobs.mallocs()["glibc tuned"]


def test_what_cannot_be_preloaded_is_not_taken_for_loaded():
    assert not two_jobs.is_loaded("libnobody-has-this.so.7")


def test_all_arms_in_fairseq(data, tmp_path, monkeypatch):
    """As small as can be: one round of the three arms."""

    def start(words, environment, log, cores):
        job = Job(words, environment)

        def wait():
            status = job.status()
            log.write_text(job.log)
            return status

        return SimpleNamespace(wait=wait)

    monkeypatch.setattr(two_jobs, "start", start)
    plan = two_jobs.Plan([str(data), *MODEL.split(), *TRAINING.split()], updates=80, skip=40, interval=4, log_interval=2)
    args = SimpleNamespace(arms=two_jobs.ARMS, rounds=1, isa="native", out=tmp_path / "out", results=tmp_path / "results")
    rows = two_jobs.measure(plan, {"system": {}}, args, "a machine")
    assert list(rows) == [("system", arm) for arm in two_jobs.ARMS] and all(0 < values[0] < 60 for values in rows.values())
    written = json.loads((tmp_path / "results/two_jobs.json").read_text())
    assert [row["arm"] for row in written["seconds"]] == list(two_jobs.ARMS) and written["plan"]["skip"] == 40
    assert "learning from peer" in (tmp_path / "out/round0/system/codistill_ce/job0.log").read_text()
    assert "with the fused loss" in (tmp_path / "out/round0/system/fused_ce/job1.log").read_text()
