"""--codistill-label-smoothing beside fairseq's label_smoothed_cross_entropy, and in the fused path."""

import copy

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq_runs import CODISTILL, column, same, train, weights
from test_criterion import Setting
from test_fused import both_paths, check_equal, teachers, tensors

from fairseq_codistill import hook
from fairseq_codistill.core.fused import Objective, fused
from fairseq_codistill.core.losses import AGGREGATES, DISTANCES
from fairseq_codistill.core.teaching import Teaching

EPSILON = 0.2


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


def smoothing(setting, **choices):
    return setting.criterion(codistill_label_smoothing=EPSILON, **choices)


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("sentence_avg", [False, True])
def test_without_teaching_it_is_fairseqs_to_the_bit(setting, sentence_avg, reduce):
    mine = smoothing(setting, sentence_avg=sentence_avg)(setting.model, setting.sample, reduce)
    theirs = LabelSmoothedCrossEntropyCriterion(setting.task, sentence_avg, EPSILON)(setting.model, setting.sample, reduce)
    assert torch.equal(mine[0].reshape(-1), theirs[0].reshape(-1)) and mine[1] == theirs[1]
    assert mine[2].keys() == theirs[2].keys()
    assert torch.equal(mine[2]["nll_loss"].reshape(-1), theirs[2]["nll_loss"].reshape(-1))


def test_validation_is_cross_entropy_to_the_bit(setting):
    mine = smoothing(setting).eval()(setting.model, setting.sample)
    plain = CrossEntropyCriterion(setting.task, False)(setting.model, setting.sample)
    assert torch.equal(mine[0], plain[0]) and mine[2]["nll_loss"] == mine[2]["loss"] == plain[2]["loss"]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", DISTANCES)
def test_the_fused_loss_is_the_formula(name, aggregate):
    features, weight, bias, target = tensors(0)
    leaves = [x.requires_grad_() for x in (features, weight, bias)]
    peers, logits = teachers(2)
    own = F.linear(*leaves)
    nll, every = F.cross_entropy(own, target, reduction="sum"), -own.log_softmax(-1).sum()
    others = EPSILON / (own.size(-1) - 1)
    expected = (1 - EPSILON - others) * nll + others * every + 0.6 * AGGREGATES[aggregate](name, own, logits).sum()
    gradients = torch.autograd.grad(expected, leaves)
    for chunk in (3, None):
        sums = fused(*leaves, target, peers, Objective(name, aggregate, alpha=0.6, smoothing=EPSILON), chunk)
        torch.testing.assert_close(sums.loss, expected)
        torch.testing.assert_close(sums.nll, nll.detach())
        for mine, theirs in zip(torch.autograd.grad(sums.loss, leaves), gradients):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("choice", [dict(loss="ce"), dict(loss="mse", aggregate="mean"), dict(loss="kl", gate="soft")])
def test_both_paths_are_one(setting, choice):
    peers = [setting.peer, copy.deepcopy(setting.model)]
    sample = {**setting.sample, hook.TEACHING: Teaching(0.7, peers, 2.0)}
    results = both_paths(setting, smoothing(setting, **choice), sample)
    check_equal(results)
    loss, log, _ = results[0]
    theirs = LabelSmoothedCrossEntropyCriterion(setting.task, False, EPSILON)(setting.model, setting.sample)
    torch.testing.assert_close(loss, theirs[0].detach() + 0.7 * log["codistill_loss"])
    torch.testing.assert_close(log["nll_loss"], theirs[2]["nll_loss"])


def test_alone_it_trains_as_fairseqs_does_to_the_bit(data, tmp_path):
    options = "--max-update 6 --dropout 0.2"
    mine = train(data, tmp_path / "mine", CODISTILL, f"--codistill-label-smoothing {EPSILON}", options)
    theirs = train(
        data, tmp_path / "theirs", f"--criterion label_smoothed_cross_entropy --label-smoothing {EPSILON}", options
    )
    assert same(*(weights(tmp_path / name / "checkpoint_last.pt") for name in ("mine", "theirs")))
    for name in ("loss", "nll_loss", "ppl"):
        assert column(mine, "train_inner", name) == column(theirs, "train_inner", name)
    assert column(mine, "valid", "valid_loss") == column(theirs, "valid", "valid_nll_loss")
    assert "trains alone, exactly as label_smoothed_cross_entropy does" in mine
