"""--codistill-rdrop: both paths against the formula, and beside fairseq's R-Drop."""

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy_with_rdrop import RdropLabelSmoothedCrossEntropyCriterion
from fairseq_runs import CODISTILL, LOCKSTEP, rows, taught, train, train_peers
from test_criterion import Setting
from test_fused import FUSED_MODELS, N, check_equal, teachers, tensors

from fairseq_codistill import hook
from fairseq_codistill.core.fused import Objective, fused
from fairseq_codistill.core.gate import gate_of
from fairseq_codistill.core.losses import AGGREGATES, DISTANCES
from fairseq_codistill.core.rdrop import doubled, passes_first
from fairseq_codistill.core.teaching import Teaching

ALPHA, BETA, EPSILON = 0.6, 1.7, 0.1


def formula(features, weight, bias, target, logits, objective):
    """From two passes' logits, by the definitions: the loss, and what is logged of it."""
    passes = [F.linear(part, weight, bias) for part in features.chunk(2)]
    others = EPSILON / (weight.size(0) - 1)
    nll, cross_entropy, distance = 0, 0, 0
    for own in passes:
        nll = nll + F.cross_entropy(own, target, reduction="sum") / 2
        cross_entropy = cross_entropy - others * own.log_softmax(-1).sum() / 2
        gate = gate_of(objective.gate, target)
        values = AGGREGATES[objective.aggregate](objective.distance, own, logits, objective.temperature, None, gate)
        distance = distance + values.sum() / 2
    p, q = (own.softmax(-1) for own in passes)
    apart = ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    return (1 - EPSILON - others) * nll + cross_entropy + ALPHA * distance + BETA * apart, nll, distance, apart


CASES = [(d, a, n, g) for d in DISTANCES for a in AGGREGATES for n, g in ((1, "none"), (2, "soft"), (3, "hard"))]


@pytest.mark.parametrize("name,aggregate,count,gate", CASES)
def test_the_fused_loss_is_the_formula(name, aggregate, count, gate):
    first, weight, bias, target = tensors(0)
    leaves = [x.requires_grad_() for x in (torch.cat([first, tensors(7)[0]]), weight, bias)]
    peers, logits = teachers(count)
    objective = Objective(name, aggregate, 1.3, ALPHA, gate, EPSILON, BETA)
    expected, *parts = formula(*leaves, target, logits, objective)
    gradients = torch.autograd.grad(expected, leaves)
    for chunk in (3, None):
        sums = fused(*leaves, target, peers, objective, chunk)
        torch.testing.assert_close(sums.loss, expected)
        for mine, slow in zip((sums.nll, sums.distance, sums.rdrop), parts):
            torch.testing.assert_close(mine, slow.detach())
        assert 0 <= sums.agreement <= N
        for mine, slow in zip(torch.autograd.grad(sums.loss, leaves), gradients):
            torch.testing.assert_close(mine, slow)


def test_the_order_of_a_doubled_batch():
    target = torch.arange(6).view(3, 2)
    twice = doubled({"tokens": target, "lengths": torch.tensor([3, 2, 1]), "other": torch.zeros(2)}, 3)
    assert twice["lengths"].tolist() == [3, 3, 2, 2, 1, 1], "sorted, as recurrent encoders need it"
    assert twice["other"].shape == (2,)
    assert twice["tokens"].reshape(-1)[passes_first(target)].tolist() == [*range(6), *range(6)]
    with pytest.raises(ValueError, match="codistill_rdrop needs a task whose inputs have the batch in front, here 5 rows"):
        doubled({"tokens": target}, 5)


# In models, with dropout.


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


def run(setting, criterion, sample, reduce=True):
    """(loss, log, gradients), with dropout drawn anew from one seed; and the model's output."""
    outputs = []
    handle = setting.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    setting.model.train().zero_grad()
    torch.manual_seed(5)
    loss, _, log = criterion(setting.model, sample, reduce)
    handle.remove()
    loss.sum().backward()
    setting.model.eval()
    gradients = {name: p.grad.clone() for name, p in setting.model.named_parameters() if p.grad is not None}
    return (loss.detach(), log, gradients), outputs[-1]


def both(setting, criterion, sample):
    fast, _ = run(setting, criterion, sample)
    assert criterion._probe.layers[setting.model] is not None
    criterion._probe.layers[setting.model] = None
    return fast, run(setting, criterion, sample)[0]


CHOICES = [dict(loss="ce"), dict(loss="mse", aggregate="mean", gate="soft"), dict(loss="js", codistill_label_smoothing=0.1)]


@pytest.mark.parametrize("choice", CHOICES)
def test_both_paths_are_one(setting, choice):
    sample = {**setting.sample, hook.TEACHING: Teaching(0.7, [setting.peer], 2.0)}
    results = both(setting, setting.criterion(rdrop=BETA, **choice), sample)
    check_equal(results)
    loss, log, _ = results[0]
    assert log["codistill_rdrop"] > 0, "the passes differ"
    assert log["codistill_positions"] == setting.sample["ntokens"]
    if "codistill_label_smoothing" not in choice:
        torch.testing.assert_close(loss, log["nll_loss"] + 0.7 * log["codistill_loss"] + BETA * log["codistill_rdrop"])


def test_both_paths_are_one_in_a_recurrent_model(data):
    other = Setting(data, CODISTILL, model=FUSED_MODELS["lstm"])
    check_equal(both(other, other.criterion(loss="ce", rdrop=BETA), other.teach()))


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_without_teaching_it_is_half_of_fairseqs(setting, epsilon):
    """fairseq adds both passes up, and has them one behind the other in its batch; β is half of its rdrop_alpha."""
    criterion = setting.criterion(rdrop=BETA, codistill_label_smoothing=epsilon)
    (loss, log, _), (logits, extra) = run(setting, criterion, setting.sample)
    behind = (torch.cat([logits[0::2], logits[1::2]]), extra)
    fairseqs = RdropLabelSmoothedCrossEntropyCriterion(setting.task, False, epsilon, rdrop_alpha=2 * BETA)
    theirs, size, their_log = fairseqs(setting.model, setting.sample, net_output=behind)
    torch.testing.assert_close(2 * loss, theirs.detach())
    torch.testing.assert_close(2 * log["nll_loss"], their_log["nll_loss"])
    assert float(log["codistill_rdrop"]) == pytest.approx(their_log["rdrop_kl_loss"], rel=1e-5)
    assert size == setting.sample["ntokens"] == log["sample_size"]


def test_validation_is_cross_entropy_to_the_bit(setting):
    mine = setting.criterion(rdrop=BETA).eval()(setting.model, setting.sample)
    plain = CrossEntropyCriterion(setting.task, False)(setting.model, setting.sample)
    assert torch.equal(mine[0], plain[0]) and mine[2]["nll_loss"] == mine[2]["loss"] == plain[2]["loss"]
    assert not any("codistill" in name for name in mine[2])


def test_reduce_false_gives_the_loss_of_each_position(setting):
    criterion = setting.criterion(rdrop=BETA, codistill_label_smoothing=0.1, gate="soft")
    (each, _, _), _ = run(setting, criterion, setting.teach(), reduce=False)
    (total, _, _), _ = run(setting, criterion, setting.teach())
    assert each.shape == (setting.sample["target"].numel(),)
    torch.testing.assert_close(each.sum(), total)


def test_peers_train_with_it(data, tmp_path):
    logs = train_peers(data, tmp_path / "peers", LOCKSTEP, "--codistill-rdrop 2 --dropout 0.2 --max-update 8")
    for log in logs:
        assert len(taught(log)) == 4
        for row in rows(log, "train_inner"):
            added = row.get("codistill_alpha", 0) * row.get("codistill_loss", 0) + 2 * row["codistill_rdrop"]
            assert row["codistill_rdrop"] > 0 and row["loss"] == pytest.approx(row["nll_loss"] + added, abs=2e-3)
        assert not any("rdrop" in name for row in rows(log, "valid") for name in row)
    alone = train(data, tmp_path / "alone", CODISTILL, "--codistill-rdrop 2 --dropout 0.2 --max-update 4")
    assert [row["loss"] for row in rows(alone, "train_inner")] == [row["loss"] for row in rows(logs[0], "train_inner")][:4]
    assert "trains alone, exactly as cross_entropy does, with R-Drop" in alone
