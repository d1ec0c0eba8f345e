"""Which peers teach now, and how strongly: without files, ranks and training."""

import dataclasses

import pytest
import torch
from torch import nn

from fairseq_codistill.core.schedules import AlphaSchedule
from fairseq_codistill.core.teaching import Held, Teachers, Teaching

CONSTANT = AlphaSchedule(alpha=0.5)


def teachers(updates, **settings):
    held = {peer: Held(nn.Linear(2, 2), update) for peer, update in updates.items()}
    return Teachers(settings.pop("schedule", CONSTANT), held=held, **settings)


def test_everybody_who_is_held_teaches_and_the_staleness_is_their_mean():
    ones = teachers({1: 10, 2: 30})
    teaching = ones.at(1, 40)
    assert (teaching.alpha, teaching.staleness, list(teaching.names)) == (0.5, 20.0, ["peer 1", "peer 2"])
    assert list(teaching.peers) == [held.model for held in ones.held.values()] and ones.updates() == {1: 10, 2: 30}


@pytest.mark.parametrize(
    "updates, settings, update",
    [
        ({}, {}, 40),
        ({1: 10}, dict(schedule=AlphaSchedule(alpha=0.0)), 40),
        ({1: 10}, dict(schedule=dataclasses.replace(CONSTANT, burn_in=41)), 40),
        ({1: 10}, dict(schedule=dataclasses.replace(CONSTANT, until=40)), 40),
        ({1: 10}, dict(teaches_from=41), 40),
        ({1: 10}, dict(teaches_from=None), 40),
        ({1: 10}, dict(every=3), 40),
        ({1: 10}, dict(max_staleness=29), 40),
    ],
    ids=["nobody", "alpha", "burn-in", "until", "not yet", "unknown", "every", "stale"],
)
def test_nobody_teaches(updates, settings, update):
    assert teachers(updates, **settings).at(1, update) is None


def test_at_the_boundaries():
    assert teachers({1: 10}, max_staleness=30).at(1, 40) is not None, "as old as it may be"
    assert [update for update in range(7) if teachers({1: 0}, every=3).at(1, update)] == [0, 3, 6]
    assert teachers({1: 10, 2: 39}, max_staleness=29).at(1, 40).names == ["peer 2"], "the other one is too old"


def test_controls_teach_without_a_peer_and_frozen_teachers_before_one():
    assert teachers({}, needs_peers=False).at(1, 0) == Teaching(0.5)
    frozen = nn.Linear(2, 2)
    teaching = teachers({1: 10}, frozen=[frozen]).at(1, 40)
    assert list(teaching.peers) == [frozen] and teaching.staleness == 0.0 and list(teaching.names) == ["a teacher"]


def test_outputs_record_no_gradient_and_cast_floats_alone():
    peer = nn.Linear(2, 2).to(torch.bfloat16)
    ((model, output),) = Teaching(1.0, [peer]).outputs({"input": torch.ones(1, 2)})
    assert model is peer and output.dtype == torch.bfloat16 and not output.requires_grad
    assert Teaching.cast(peer, {"tokens": torch.ones(1).long()})["tokens"].dtype == torch.int64
