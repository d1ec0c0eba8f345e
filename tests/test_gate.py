"""The gate: its weights and D against the equations, in both paths, alone and in models."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from fairseq_runs import CODISTILL
from test_criterion import Setting, _reduced
from test_fused import both_paths, check_equal, teachers, tensors

from fairseq_codistill import hook
from fairseq_codistill.core.fused import Objective, Peer, fused
from fairseq_codistill.core.gate import Gate
from fairseq_codistill.core.losses import AGGREGATES, DISTANCES
from fairseq_codistill.core.teaching import Teaching
from fairseq_codistill.criterion import CodistillCriterion

KINDS = ("soft", "hard")


def slow_weight(kind, own_row, peer_probability, target, temperature):
    """Of one position, in plain numbers."""
    own = (own_row / temperature).softmax(-1)[target].item()
    return min(1.0, peer_probability / own) if kind == "soft" else float(peer_probability > own)


def slow(kind, name, aggregate, own, peers, target, temperature):
    """D [N], differentiable in `own`, and the mean weight of each position: row by row, from the definition."""
    at = temperature if DISTANCES[name].mean_of == "probabilities" else 1.0
    if aggregate == "mean":
        if DISTANCES[name].mean_of == "probabilities":
            peers = [sum((peer / at).softmax(-1) for peer in peers).div(len(peers)).log() * at]
        else:
            peers = [sum(peers) / len(peers)]
    distances, weights = [], []
    for row, wanted in enumerate(target.tolist()):
        each = [slow_weight(kind, own[row].detach(), (peer[row] / at).softmax(-1)[wanted].item(), wanted, at) for peer in peers]
        of_peers = [DISTANCES[name].function(own[row : row + 1], peer[row : row + 1], temperature) for peer in peers]
        distances.append(sum(w * d for w, d in zip(each, of_peers)) / len(peers))
        weights.append(sum(each) / len(each))
    return torch.cat(distances), torch.tensor(weights, dtype=torch.float64)


CASES = [(d, a, t, n) for d in DISTANCES for a in AGGREGATES for t, n in ((1.0, 1), (2.5, 2), (0.7, 3))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name,aggregate,temperature,count", CASES)
def test_both_paths_are_the_definition(name, aggregate, temperature, count, kind):
    features, weight, bias, target = tensors(0)
    peers, logits = teachers(count)
    leaves = [x.requires_grad_() for x in (features, weight, bias)]
    own = F.linear(*leaves)
    target[::2] = own.argmax(-1)[::2]  # where a peer is likely to know less, as at random targets it may know more
    expected, weights = slow(kind, name, aggregate, own, logits, target, temperature)
    expected_gradients = torch.autograd.grad(
        F.cross_entropy(own, target, reduction="sum") + 0.6 * expected.sum(), leaves, retain_graph=True
    )
    assert 0 < weights.mean() < 1, "some positions are weighed down, and some are not"

    gate = Gate(kind, target)
    whole = AGGREGATES[aggregate](name, own, logits, temperature, None, gate)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(gate.mean(), weights)
    gradients = torch.autograd.grad(F.cross_entropy(own, target, reduction="sum") + 0.6 * whole.sum(), leaves)
    for mine, theirs in zip(gradients, expected_gradients):
        torch.testing.assert_close(mine, theirs)

    for chunk in (3, None):
        sums = fused(*leaves, target, peers, Objective(name, aggregate, temperature, 0.6, kind), chunk)
        torch.testing.assert_close(sums.distance, expected.sum().detach())
        torch.testing.assert_close(sums.gate, weights.sum())
        for mine, theirs in zip(torch.autograd.grad(sums.loss, leaves), expected_gradients):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_peer_that_knows_less_of_the_target_teaches_less(kind):
    own = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    peer = torch.tensor([[0.3, 0.7], [0.9, 0.1]]).log()
    gate = Gate(kind, torch.tensor([0, 0]))
    AGGREGATES["pairwise"]("ce", own, [peer], 1.0, None, gate)
    assert gate.mean().tolist() == pytest.approx([0.5 if kind == "soft" else 0.0, 1.0])


def test_equal_probabilities_pass_a_soft_gate_and_no_hard_one():
    own = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    weights = {}
    for kind in KINDS:
        gate = Gate(kind, torch.tensor([0, 3, 4]))
        AGGREGATES["pairwise"]("kl", own, [own.clone()], 1.0, None, gate)
        weights[kind] = gate.mean().tolist()
    assert weights == {"soft": [1.0] * 3, "hard": [0.0] * 3}


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", DISTANCES)
def test_a_gate_of_ones_changes_nothing(name, aggregate):
    features, weight, bias, target = tensors(0)
    leaves = [x.requires_grad_() for x in (features, weight, bias)]
    sure = F.one_hot(target, weight.size(0)).double() * 20
    peers = [Peer(sure, torch.clone)] * 2
    with_gate, without = (fused(*leaves, target, peers, Objective(name, aggregate, gate=gate)) for gate in ("soft", "none"))
    torch.testing.assert_close(with_gate.loss, without.loss)
    assert with_gate.gate == with_gate.gate.round() and without.gate == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", DISTANCES)
def test_what_is_not_finite_stays_out(name, aggregate, kind):
    """A row of one peer that teaches nothing has the weight 0, and the other's is half of the mean."""
    features, weight, bias, target = tensors(0)
    own = F.linear(features.requires_grad_(), weight, bias)
    bad = teachers(1)[1][0]
    bad[2] = math.nan
    logits = [bad, teachers(2)[1][1]]
    gate = Gate(kind, target)
    whole = AGGREGATES[aggregate](name, own, logits, 1.0, [], gate)
    sums = fused(
        features, weight, bias, target, [Peer(peer, torch.clone) for peer in logits], Objective(name, aggregate, gate=kind)
    )
    assert gate.mean().isfinite().all() and torch.autograd.grad(sums.loss, features)[0].isfinite().all()
    torch.testing.assert_close(sums.distance, whole.sum().detach())
    torch.testing.assert_close(sums.gate, gate.mean().sum())
    alone = Gate(kind, target)
    AGGREGATES["pairwise"](name, own, logits[1:], 1.0, None, alone)
    torch.testing.assert_close(gate.mean()[2], alone.mean()[2] / 2)


# In models.


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


@torch.no_grad()
def _scaled(model):
    model.decoder.output_projection.weight.mul_(0.7)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [dict(loss="ce"), dict(loss="mse", aggregate="mean"), dict(loss="js", temperature=2.0)])
def test_both_paths_are_one(setting, choice, kind):
    other = _scaled(copy.deepcopy(setting.model))  # of an equal one, rounding would decide a hard gate
    sample = {**setting.sample, hook.TEACHING: Teaching(0.7, [setting.peer, other], 2.0)}
    results = both_paths(setting, setting.criterion(gate=kind, **choice), sample)
    check_equal(results)
    log = results[0][1]
    values = _reduced(CodistillCriterion, [log])
    assert 0 < values["codistill_gate"] < 1
    assert values["loss"] == pytest.approx(values["nll_loss"] + 0.7 * values["codistill_loss"], abs=2e-3)


def test_without_a_gate_none_is_logged(setting):
    _, _, log = setting.criterion()(setting.model, setting.teach())
    assert "codistill_gate" not in log and "codistill_gate" not in _reduced(CodistillCriterion, [log])
