"""codistill-report --baseline: sacreBLEU's paired bootstrap, seeds together, and what cannot be compared."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from test_report import SIGNATURE, make_run, run_main, write_score

from fairseq_codistill.report import files, main, significance

WORDS = "der die ein Mann Hund Ball rot läuft sieht wirft im Park auf Gras und Kind".split()
N = 60


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(main, "draw", lambda report, paths, style: [path.write_bytes(b"") for path in paths])


def sentences(seed: int, count: int = N) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) for _ in range(count)]


def damaged(lines: list[str], share: float, seed: int) -> list[str]:
    """Translations with a share of wrong words."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) if draw.random() < share else word for word in line.split()) for line in lines]


REFERENCES = sentences(1)


def translate(peer: Path, share: float, seed: int, test="test", references=REFERENCES, signature=SIGNATURE) -> list[str]:
    """Leave SET.hyp, SET.ref and SET.sacrebleu.json as evaluate.py does; the hypotheses."""
    lines = damaged(references, share, seed)
    (peer / f"{test}.hyp").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (peer / f"{test}.ref").write_text("".join(f"{line}\n" for line in references), encoding="utf-8")
    write_score(peer / f"{test}.sacrebleu.json", BLEU().corpus_score(lines, [references]).score, signature)
    return lines


@pytest.fixture
def root(tmp_path):
    """good (two peers) and bad (one peer), two seeds each; good is better on seed 1 and a little worse on seed 2."""
    for seed, share, of_bad in ((1, 0.15, 0.45), (2, 0.31, 0.3)):
        make_run(tmp_path / f"runs/good/seed{seed}", [[4.0], [4.0]])
        make_run(tmp_path / f"runs/bad/seed{seed}", [[4.1]])
        for peer in (0, 1):
            translate(tmp_path / f"runs/good/seed{seed}/peer{peer}", share, 10 * seed + peer)
        translate(tmp_path / f"runs/bad/seed{seed}/peer0", of_bad, 10 * seed + 5)
    return tmp_path / "runs"


def compared(root, baseline="bad"):
    found = files.load([str(root)])
    comparisons, notes = significance.compare(found, baseline)
    return {(one.method, one.key): one for one in comparisons}, notes, found


def test_one_seed_and_peer_are_sacrebleus_own_test(tmp_path):
    for name in ("good", "bad"):
        make_run(tmp_path / name, [[4.0]])
    mine, theirs = (translate(tmp_path / name / "peer0", share, 3) for name, share in (("good", 0.2), ("bad", 0.3)))
    found, notes, _ = compared(tmp_path)
    for key, metric in (("test BLEU", BLEU()), ("test chrF2", CHRF())):
        _, scores = PairedTest([("bad", theirs), ("good", mine)], {"m": metric}, [REFERENCES], "bs")()
        base, result = next(results for name, results in scores.items() if name != "System")
        one = found["good", key]
        assert one.score == pytest.approx(result.score) and one.difference == pytest.approx(result.score - base.score)
        assert one.p == pytest.approx(result.p_value) and one.seed_p == {"seed1": one.p}
        assert found["bad", key].score == pytest.approx(base.score) and found["bad", key].p is None
    assert "BLEU|nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp" in notes[0]


def test_equal_seeds_are_no_further_evidence(tmp_path):
    """Three runs that translate alike say what one says; a test on their concatenation would say more."""
    for name, share in (("good", 0.28), ("bad", 0.3)):
        for seed in (1, 2, 3):
            make_run(tmp_path / f"{name}/seed{seed}", [[4.0]])
            translate(tmp_path / f"{name}/seed{seed}/peer0", share, 3)
    found, _, _ = compared(tmp_path)
    one = found["good", "test BLEU"]
    assert one.p == pytest.approx(one.seed_p["seed1"], abs=0.003) and set(one.seed_p) == {"seed1", "seed2", "seed3"}
    assert 0.01 < one.p < 0.99


def test_seeds_together_and_each_by_itself(root):
    found, _, _ = compared(root)
    one = found["good", "test BLEU"]
    both, theirs = (
        [line for file in sorted((root / name).glob("*/*/test.hyp")) for line in file.read_text().splitlines()]
        for name in ("good", "bad")
    )
    assert one.score == pytest.approx(BLEU().corpus_score(both, [REFERENCES * 4]).score)
    assert found["bad", "test BLEU"].score == pytest.approx(BLEU().corpus_score(theirs, [REFERENCES * 2]).score)
    assert one.seed_p["seed1"] < 0.05 < one.seed_p["seed2"]
    assert one.cell() == f"{one.score:.2f}, {one.difference:+.2f}, p {one.p:.3f}, 1/2 seeds"


def test_the_table_and_the_results_have_it(root, capsys):
    status, out, error = run_main(capsys, root, "--baseline", "bad", "--per-peer")
    assert (status, error) == (0, "")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    rows = {row[0]: dict(zip(table[0], row)) for row in table[2:]}
    one = compared(root)[0]["good", "test chrF2"]
    assert rows["good"]["test chrF2 against bad"] == one.cell() and ", p 0.0" in one.cell()
    assert rows["good: peer0"]["test chrF2 against bad"] == "–" and "," not in rows["bad"]["test BLEU against bad"]
    told = json.loads((root / "report/results.json").read_text())["significance"]
    of = [(entry["method"], entry["metric"]) for entry in told]
    assert of == [(method, metric) for method in ("bad", "good") for metric in ("BLEU", "chrF2")]
    assert "a sentence is resampled with the translations of all seeds" in (root / "report/table.md").read_text()


def test_case_and_tokens_are_those_of_the_recorded_score(tmp_path):
    for name in ("good", "bad"):
        make_run(tmp_path / name, [[4.0]])
        translate(tmp_path / name / "peer0", 0.2, 3, signature=SIGNATURE.replace("mixed", "lc"))
        translate(tmp_path / name / "peer0", 0.2, 3, "test_tokenised", signature=SIGNATURE.replace("13a", "none"))
    lines = (tmp_path / "good/peer0/test.hyp").read_text().upper()
    (tmp_path / "good/peer0/test.hyp").write_text(lines)
    found, notes, _ = compared(tmp_path)
    assert found["good", "test BLEU"].difference == found["good", "test chrF2"].difference == 0, "case does not matter"
    assert "case:lc" in notes[0] and ("good", "test_tokenised chrF2") not in found, "chrF is of text, not of tokens"
    assert ("good", "test_tokenised BLEU") in found


def test_a_broken_run_hides_no_other(root, capsys):
    make_run(root / "torn/seed1", [[4.0]])
    translate(root / "torn/seed1/peer0", 0.2, 1)
    (root / "torn/seed1/peer0/test.hyp").write_text("too short\n")
    (root / "good/seed2/peer0/train.log").write_text("fairseq-train: error: unrecognized arguments\n")
    status, out, error = run_main(capsys, root, "--baseline", "bad")
    assert status == 1 and "torn/seed1/peer0/test.hyp must have a line for each of the 60 sentences of" in error
    assert "1/2 seeds" in out and "| torn" in out


@pytest.mark.parametrize("what", ["reference", "signature", "seed", "no reference"])
def test_what_must_not_be_compared_is_told(root, capsys, what):
    make_run(root / "other/seed1", [[4.0]])
    peer = root / "other/seed1/peer0"
    if what == "reference":
        translate(peer, 0.2, 1, references=sentences(2))
        sentence = "test of other is not tested against bad: the references differ."
    elif what == "signature":
        translate(peer, 0.2, 1, signature=SIGNATURE.replace("mixed", "lc"))
        sentence = "test of other is not tested against bad: the sacreBLEU signatures differ."
    elif what == "seed":
        translate(peer, 0.2, 1)
        (root / "other/seed1").rename(root / "other/seed7")
        sentence = "test of other is not tested against bad: no seed is common (seed7)."
    else:
        translate(peer, 0.2, 1, test="test2")
        sentence = "test2 of other is not tested against bad: the baseline has no translations of it."
    status, out, _ = run_main(capsys, root, "--baseline", "bad")
    assert status == 0 and f"WARNING: {sentence}" in out and "1/2 seeds" in out


def test_a_reference_above_the_peers_and_none_at_all(root, capsys):
    for path in root.glob("*/*/*/test.ref"):
        path.unlink()
    assert "none of its peers has a SET.hyp with a SET.ref beside it" in run_main(capsys, root, "--baseline", "bad")[1]
    (root / "test.ref").write_text("".join(f"{line}\n" for line in REFERENCES))
    assert "1/2 seeds" in run_main(capsys, root, "--baseline", "bad")[1]


def test_a_baseline_that_is_none(root, capsys):
    status, out, error = run_main(capsys, root, "--baseline", "single")
    assert status == 2 and not out and "--baseline must be a method of the table (bad, good), but is 'single' instead." in error
