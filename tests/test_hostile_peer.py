"""A peer that diverges costs its teaching, and neither the training nor the other peers'."""

import copy
import logging
import math

import pytest
import torch
from fairseq_runs import CODISTILL
from test_criterion import Setting, _reduced
from test_fused import V, reference, teachers, tensors

from fairseq_codistill import hook
from fairseq_codistill.core import guard
from fairseq_codistill.core.fused import Objective, Peer, fused
from fairseq_codistill.core.losses import AGGREGATES, DISTANCES, pairwise, to_mean
from fairseq_codistill.core.teaching import Teaching
from fairseq_codistill.criterion import CodistillCriterion

UNBOUNDED = ("mse", "centered_mse", "reverse_kl")
GARBAGE = (1e3, 1e6, 1e12, 1e30, 1e38, math.inf, math.nan)


def garbage(logits, size):
    """Nonsense that is `size` times as large; in half precision it overflows."""
    return (torch.randn(logits.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float32) * size).to(logits.dtype)


def taught(function, distance, aggregate, logits, dtype, temperature=1.0):
    """(D, its gradient in the features, dropped) by the fused or the general path."""
    features, weight, bias, target = (x.to(dtype) if x.is_floating_point() else x for x in tensors(0))
    features.requires_grad_()
    objective = Objective(distance, aggregate, temperature, alpha=0.6)
    peers = [Peer(peer, torch.clone) for peer in logits] if function is fused else logits
    loss, nll, value, _, dropped, *_ = function(features, weight, bias, target, peers, objective)
    (gradient,) = torch.autograd.grad(loss - nll if function is reference else loss, features)
    return value.detach(), gradient, dropped.tolist()


@pytest.mark.parametrize("size", GARBAGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("function", [fused, reference], ids=["fused", "general"])
def test_garbage_beside_an_honest_peer(function, distance, aggregate, dtype, size):
    """Everything stays finite, and no larger than a target's pull; where rows are dropped, the other's half remains."""
    honest = [x.to(dtype) for x in teachers(1)[1]]
    value, gradient, dropped = taught(function, distance, aggregate, [garbage(honest[0], size), *honest], dtype)
    assert value.isfinite() and gradient.isfinite().all()
    assert gradient.norm(dim=-1).max() < 100, "√2 for the target, 0.6 · √2 for a peer, times the weights"
    finite = math.isfinite(size)
    squared = distance in ("mse", "centered_mse")
    assert dropped[1] == 0 or (distance == "reverse_kl" and aggregate == "mean")
    assert dropped[0] == len(tensors(0)[0]) or finite and not squared
    if dropped == [len(tensors(0)[0]), 0]:
        alone, half, _ = taught(function, distance, aggregate, honest, dtype)
        torch.testing.assert_close(value, alone / 2)


@pytest.mark.parametrize("distance", UNBOUNDED)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_of_a_peer_alone_nothing_is_left(distance, aggregate):
    """Then the gradient is that of cross entropy."""
    honest = [x.float() for x in teachers(1)[1]]
    for function in (fused, reference):
        value, gradient, dropped = taught(function, distance, aggregate, [garbage(honest[0], 1e25)], torch.float32)
        own = torch.nn.functional.linear(*(x.float() for x in tensors(0)[:3]))
        assert value == 0 or distance == "reverse_kl"
        if dropped == [len(own)] and function is fused:
            weight, target = tensors(0)[1].float(), tensors(0)[3]
            plain = (own.softmax(-1) - torch.nn.functional.one_hot(target, V)) @ weight
            torch.testing.assert_close(gradient, plain)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("distance", [name for name in DISTANCES if DISTANCES[name].bounded])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_peer_that_is_surer_than_any_trained_model_is_not_followed(distance, aggregate, temperature):
    """Wherever its weights, which have exploded, name another class than the model's; an honest one loses nothing."""
    honest = [x.float() for x in teachers(1)[1]]
    wild = garbage(honest[0], 1e6)
    own = torch.nn.functional.linear(*(x.float() for x in tensors(0)[:3]))
    for function in (fused, reference):
        assert taught(function, distance, aggregate, honest, torch.float32, temperature)[2] == [0]
        value, gradient, dropped = taught(function, distance, aggregate, [wild], torch.float32, temperature)
        others_N = wild.argmax(-1) != own.argmax(-1)
        assert dropped == [others_N.sum()] and others_N.sum() >= len(own) - 2
        if function is fused:
            weight, target = tensors(0)[1].float(), tensors(0)[3]
            plain = (own.softmax(-1) - torch.nn.functional.one_hot(target, V)) @ weight
            torch.testing.assert_close(gradient[others_N], plain[others_N])


def test_an_exploding_reverse_kl_is_dropped_but_not_one_that_disagrees():
    own = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]], requires_grad=True)
    peer = torch.tensor([[-1e30, 1e30, 0.0], [0.0, 4.0, 0.0]])
    dropped = []
    value = pairwise("reverse_kl", own, [peer], dropped=dropped)
    value.sum().backward()
    assert value[0] == 0 and value[1] > 3 and own.grad[0].eq(0).all() and own.grad[1].norm() > 0
    assert dropped[0].tolist() == [True, False]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("distance", ["ce", "kl", "js"])
def test_what_is_called_bounded_is(distance, temperature):
    """Extreme logits on both sides: the gradient is never longer than √2·τ, so these need no guard."""
    assert DISTANCES[distance].bounded
    draw = torch.Generator().manual_seed(3)
    for size in (0.1, 1.0, 30.0, 1e4):
        for other in (0.1, 1.0, 30.0, 1e4):
            own = (torch.randn(200, V, generator=draw, dtype=torch.float64) * size).requires_grad_()
            peer = torch.randn(200, V, generator=draw, dtype=torch.float64) * other
            DISTANCES[distance].function(own, peer, temperature).sum().backward()
            assert own.grad.norm(dim=-1).max() <= math.sqrt(2) * temperature + 1e-9


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("distance", DISTANCES)
def test_honest_peers_teach_the_same_to_the_bit(distance, aggregate):
    """Without the guard the general path is a sum of the equations."""
    own = torch.randn(50, V, generator=torch.Generator().manual_seed(1))
    peers = [own + torch.randn(50, V, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3, 4)]
    dropped = []
    value = AGGREGATES[aggregate](distance, own, peers, dropped=dropped)
    function = DISTANCES[distance].function
    if aggregate == "pairwise":
        expected = (function(own, peers[0], 1.0) + function(own, peers[1], 1.0) + function(own, peers[2], 1.0)) / 3
    elif DISTANCES[distance].mean_of == "logits":
        expected = function(own, (peers[0] + peers[1] + peers[2]) / 3, 1.0)
    else:
        mean = (peers[0].softmax(-1) + peers[1].softmax(-1) + peers[2].softmax(-1)) / 3
        expected = function(own, mean.log(), 1.0)
    assert torch.equal(value, expected) and not torch.stack(dropped).any()


def test_far_from_me_is_no_reason_while_the_pull_is_weak():
    """With many classes a fresh student may learn from a trained teacher whose logits are far larger."""
    own, peer = torch.randn(4, 1000) * 0.01, torch.randn(4, 1000) * 5
    dropped = []
    assert (pairwise("mse", own, [peer], dropped=dropped) > 20).all() and not dropped[0].any()


def test_a_strong_pull_is_no_reason_while_the_peer_is_like_me():
    """With few classes two confident models that disagree pull hard."""
    own, peer = torch.tensor([[20.0, 0.0, 0.0]]), torch.tensor([[0.0, 20.0, 0.0]])
    dropped = []
    assert pairwise("mse", own, [peer], dropped=dropped) > 200 and not dropped[0].any()
    assert pairwise("mse", own, [5 * peer], dropped=dropped) == 0 and dropped[1].all()


def test_a_mean_of_two_without_the_bad_one_is_the_good_one_at_half_weight():
    own = torch.randn(3, V)
    good, bad = torch.randn(3, V), torch.full((3, V), math.nan)
    for distance in DISTANCES:
        for order in ([good, bad], [bad, good]):
            torch.testing.assert_close(to_mean(distance, own, order), pairwise(distance, own, [good]) / 2)


# In models, through the criterion.


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


def diverged(model, size):
    """The model with an output layer of random weights of this size."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if math.isnan(size) or "output_projection" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * size)
    return other


def step(setting, criterion, peers, fused_path, model=None):
    model = model or setting.model
    if not fused_path:
        criterion._probe.layers[model] = None
    names = [f"peer {i + 1}" for i in range(len(peers))]
    model.zero_grad()
    loss, size, log = criterion(model, {**setting.sample, hook.TEACHING: Teaching(1.0, peers, 3.0, names)})
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach(), gradients, log


@pytest.mark.parametrize("distance,aggregate", [("mse", "pairwise"), ("mse", "mean"), ("reverse_kl", "pairwise")])
@pytest.mark.parametrize("fused_path", [True, False], ids=["fused", "general"])
def test_one_warning_and_the_honest_peer_goes_on(setting, fused_path, distance, aggregate, caplog):
    criterion = setting.criterion(loss=distance, aggregate=aggregate)
    peers = [setting.peer, diverged(setting.peer, 1e30)]
    with caplog.at_level(logging.WARNING, guard.__name__):
        for _ in range(3):
            loss, gradients, log = step(setting, criterion, peers, fused_path)
            assert loss.isfinite() and gradients.isfinite().all() and gradients.norm() < 1e4
    lines, kept = [record.getMessage() for record in caplog.records], log["codistill_positions"]
    assert len(lines) == 1
    assert f"peer 2 teaches nothing at {kept} of {kept} positions: its predictions there are not finite, or so far" in lines[0]
    _, _, alone = step(setting, setting.criterion(loss=distance, aggregate=aggregate), [setting.peer], fused_path)
    torch.testing.assert_close(log["codistill_loss"], alone["codistill_loss"] / 2, rtol=1e-4, atol=1e-4)
    assert log["codistill_dropped"] == kept / 2 and alone["codistill_dropped"] == 0
    assert _reduced(CodistillCriterion, [log])["codistill_dropped"] == 0.5
    assert "codistill_dropped" not in _reduced(CodistillCriterion, [alone])


@pytest.mark.parametrize("size", [1e6, 1e30, math.nan])
@pytest.mark.parametrize("fused_path", [True, False], ids=["fused", "general"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_training_by_sgd_beside_a_diverged_peer(setting, distance, fused_path, size):
    """As many updates as ruin a model today: it learns its targets all the same."""
    model = copy.deepcopy(setting.model).train(False)
    criterion, optimizer = setting.criterion(loss=distance), torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(12):
        _, _, log = step(setting, criterion, [diverged(setting.peer, size)], fused_path, model)
        losses.append(float(log["nll_loss"] / log["sample_size"]))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= log["sample_size"]
        optimizer.step()
    assert losses[-1] < losses[0] + 0.05, losses
