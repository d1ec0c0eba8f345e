import math
import weakref

import pytest
import reference
import torch

from fairseq_codistill.core.losses import AGGREGATES, DISTANCES, pairwise, to_mean, uniform, unigram

N, V = 5, 7


def logits(seed, dtype=torch.float64, scale=2.0):
    return (torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DISTANCES)
def test_each_equals_the_slow_reference(name, temperature):
    own, peer = logits(0), logits(1)
    expected = [getattr(reference, name)(s, t, temperature) for s, t in zip(own.tolist(), peer.tolist())]
    torch.testing.assert_close(DISTANCES[name].function(own, peer, temperature), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_those_of_the_values(name, aggregate):
    peers = [logits(1), logits(2), logits(3)]
    own = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: AGGREGATES[aggregate](name, s, peers, 1.7), (own,))


@pytest.mark.parametrize("name", DISTANCES)
def test_pairwise_is_the_mean_of_the_distances(name):
    own, peers = logits(0), [logits(1), logits(2), logits(3)]
    expected = sum(DISTANCES[name].function(own, peer, 2.0) for peer in peers) / 3
    torch.testing.assert_close(pairwise(name, own, peers, 2.0), expected)


def test_mean_aggregate_is_the_distance_to_the_mean_prediction():
    own, peers = logits(0), [logits(1), logits(2)]
    mean_logits = (peers[0] + peers[1]) / 2
    torch.testing.assert_close(to_mean("mse", own, peers), (own - mean_logits).pow(2).mean(-1))
    mean_probs = (peers[0].softmax(-1) + peers[1].softmax(-1)) / 2
    torch.testing.assert_close(to_mean("ce", own, peers), -(mean_probs * own.log_softmax(-1)).sum(-1))
    torch.testing.assert_close(
        to_mean("reverse_kl", own, peers), (own.softmax(-1) * (own.log_softmax(-1) - mean_probs.log())).sum(-1)
    )


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", ["mse", "centered_mse", "ce", "kl"])
def test_pairwise_and_mean_have_the_same_gradient(name, temperature):
    """The claim that lets peers be summed one after another (design: Mathematics)."""
    gradients = []
    for aggregate in AGGREGATES.values():
        own = logits(0).requires_grad_()
        aggregate(name, own, [logits(1), logits(2), logits(3)], temperature).sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["reverse_kl", "js"])
def test_where_it_does_not_hold_it_is_not_claimed(name):
    values = [aggregate(name, logits(0), [logits(1), logits(2)]) for aggregate in AGGREGATES.values()]
    assert not torch.allclose(*values)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", DISTANCES)
def test_no_gradient_reaches_a_peer(name, aggregate):
    own, peer = logits(0).requires_grad_(), logits(1).requires_grad_()
    AGGREGATES[aggregate](name, own, [peer]).sum().backward()
    assert peer.grad is None and own.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["mse", "centered_mse", "kl", "reverse_kl", "js"])
def test_zero_for_identical_predictions(name):
    own = logits(0).requires_grad_()
    value = pairwise(name, own, [logits(0)])
    value.sum().backward()
    torch.testing.assert_close(value, torch.zeros(N, dtype=torch.float64))
    torch.testing.assert_close(own.grad, torch.zeros_like(own))


def test_relations_between_the_distances():
    own, peer = logits(0), logits(1)
    entropy = -(peer.softmax(-1) * peer.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(DISTANCES["ce"].function(own, peer, 1.0), DISTANCES["kl"].function(own, peer, 1.0) + entropy)
    torch.testing.assert_close(DISTANCES["js"].function(own, peer, 1.0), DISTANCES["js"].function(peer, own, 1.0))
    assert (DISTANCES["js"].function(own * 50, peer * 50, 1.0) <= math.log(2)).all()
    shifted = peer + torch.arange(N, dtype=torch.float64).unsqueeze(-1)
    for name in ("centered_mse", "kl", "reverse_kl", "js", "ce"):
        function = DISTANCES[name].function
        torch.testing.assert_close(function(own, shifted, 1.0), function(own, peer, 1.0))
    assert not torch.allclose(DISTANCES["mse"].function(own, shifted, 1.0), DISTANCES["mse"].function(own, peer, 1.0))


@pytest.mark.parametrize("name", ["ce", "kl", "reverse_kl", "js"])
def test_temperature_squared_keeps_the_gradient_in_scale(name):
    """At high τ the gradient tends to that of the centred squared distance, whatever τ is; without τ² it would vanish."""
    gradients = []
    for temperature in (300.0, 3000.0):
        own = logits(0).requires_grad_()
        pairwise(name, own, [logits(1)], temperature).sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-3)
    assert gradients[0].abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("name", DISTANCES)
def test_finite_in_half_precision(name, aggregate, dtype):
    own = logits(0, dtype, scale=100).requires_grad_()
    value = AGGREGATES[aggregate](name, own, [logits(1, dtype, scale=100), logits(2, dtype, scale=100)])
    (value.sum() * 128).backward()
    assert value.dtype == torch.float32 and value.isfinite().all()
    assert own.grad.dtype == dtype and own.grad.isfinite().all()


def test_a_small_gradient_survives_fp16_when_the_loss_is_scaled():
    """∂mse/∂own is about 1/V: below fp16's smallest number for a large V, unless the loss scale comes first."""
    own = torch.zeros(1, 64, dtype=torch.float16, requires_grad=True)
    (pairwise("mse", own, [torch.full((1, 64), 1e-7, dtype=torch.float16)]) * 2**20).sum().backward()
    assert own.grad.abs().min() > 0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["mse", "ce", "js"])
def test_a_row_that_is_not_finite_teaches_nothing(name, poison):
    own, bad = logits(0).requires_grad_(), logits(1)
    bad[2] = poison
    value = pairwise(name, own, [bad])
    value.sum().backward()
    assert value[2] == 0 and (own.grad[2] == 0).all()
    assert value.isfinite().all() and own.grad.isfinite().all() and own.grad[0].abs().sum() > 0


def test_a_class_that_the_peer_rules_out_is_no_poison():
    peer = logits(1)
    peer[:, 0] = -math.inf
    for name in ("ce", "kl", "js"):
        assert (pairwise(name, logits(0), [peer]) > 0).all(), name


def test_peers_are_dropped_one_after_another():
    alive = []

    def peers():
        for seed in range(1, 5):
            assert sum(reference() is not None for reference in alive) <= 1, "an earlier peer's logits are still held"
            peer = logits(seed)
            alive.append(weakref.ref(peer))
            yield peer
            del peer

    own = logits(0).requires_grad_()
    pairwise("ce", own, peers()).sum().backward()
    assert len(alive) == 4


def test_smoothing_controls():
    own = logits(0).requires_grad_()
    torch.testing.assert_close(uniform(own), -own.log_softmax(-1).mean(-1))
    torch.testing.assert_close(unigram(own, torch.full((V,), 1 / V, dtype=torch.float64)), uniform(own))
    one_class = torch.zeros(V, dtype=torch.float64)
    one_class[3] = 1.0
    torch.testing.assert_close(unigram(own, one_class), -own.log_softmax(-1)[:, 3])
    uniform(own).sum().backward()
    torch.testing.assert_close(own.grad, own.detach().softmax(-1) - 1 / V)
