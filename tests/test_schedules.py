import math

import pytest

from fairseq_codistill.core.schedules import AlphaSchedule, alpha_at, stalled_at, weight_decay_at

SODHANI_STEPS = dict(alpha=1.0, step=0.5, milestones=(15, 30, 40))

# (schedule, settings, {epoch: α}) at the boundaries
# fmt: off
TABLE = [
    ("constant", dict(alpha=0.7), {1: 0.7, 2: 0.7, 1000: 0.7}),
    # Sodhani et al., translation: γ = 1.1 for each epoch.
    ("exponential", dict(alpha=1.0, gamma=1.1), {1: 1.0, 2: 1.1, 3: 1.21, 26: 1.1**25}),
    ("exponential", dict(alpha=0.1, gamma=1.5), {1: 0.1, 2: 0.15, 26: 0.1 * 1.5**25}),
    ("exponential", dict(alpha=1.0, gamma=1.0), {1: 1.0, 50: 1.0}),
    ("exponential", dict(alpha=1.0, gamma=1.1, maximum=2.0), {7: 1.1**6, 8: 1.1**7, 9: 2.0, 10**6: 2.0}),
    # The default: growing in over four epochs, a quarter more in each.
    (
        "exponential", dict(alpha=0.3, gamma=1.1, warmup=4, maximum=1.0),
        {1: 0.0, 2: 0.3 * 1.1 / 4, 3: 0.3 * 1.21 / 2, 4: 0.3 * 1.331 * 0.75, 5: 0.3 * 1.1**4, 14: 1.0},
    ),
    ("constant", dict(alpha=2.0, warmup=1, maximum=1.0), {1: 0.0, 2: 1.0, 3: 1.0}),
    # Sodhani et al., ImageNet: + 0.5 at each decay of the learning rate, after epochs 15, 30 and 40.
    ("stepwise", SODHANI_STEPS, {1: 1.0, 15: 1.0, 16: 1.5, 30: 1.5, 31: 2.0, 40: 2.0, 41: 2.5, 45: 2.5}),
    ("stepwise", dict(alpha=1.0, step=0.5, milestones=(2.5,)), {2: 1.0, 3: 1.5}),
    ("stepwise", dict(SODHANI_STEPS, maximum=1.75), {15: 1.0, 16: 1.5, 31: 1.75}),
]
# fmt: on


@pytest.mark.parametrize("schedule, settings, expected", TABLE)
def test_alpha_at_the_boundaries(schedule, settings, expected):
    for epoch, alpha in expected.items():
        assert alpha_at(schedule, epoch, 10**9, **settings) == pytest.approx(alpha), f"epoch {epoch}"


def test_burn_in_is_counted_in_updates():
    values = {update: alpha_at("constant", 3, update, alpha=1.0, burn_in=100) for update in (0, 99, 100, 101)}
    assert values == {0: 0.0, 99: 0.0, 100: 1.0, 101: 1.0}


def test_the_warmup_begins_after_the_burn_in():
    def values(**settings):
        updates = (0, 99, 100, 101, 125, 149, 150, 10**6)
        return [pytest.approx(alpha_at("constant", 3, update, alpha=2.0, **settings)) for update in updates]

    assert values(burn_in=100, warmup_updates=50) == [0, 0, 0, 0.04, 1.0, 1.96, 2.0, 2.0]
    assert values(warmup_updates=200) == [0, 0.99, 1.0, 1.01, 1.25, 1.49, 1.5, 2.0]
    assert values(burn_in=100) == [0, 0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_the_warmup_is_of_the_limited_alpha():
    settings = dict(alpha=1.0, gamma=2.0, maximum=3.0, warmup_updates=10)
    assert [alpha_at("exponential", epoch, 5, **settings) for epoch in (1, 2, 3)] == [0.5, 1.0, 1.5]


def test_until_is_the_first_update_that_is_not_taught():
    settings = dict(alpha=1.0, burn_in=100, until=500)
    values = {update: alpha_at("constant", 3, update, **settings) for update in (99, 100, 499, 500, 10**6)}
    assert values == {99: 0.0, 100: 1.0, 499: 1.0, 500: 0.0, 10**6: 0.0}


LOSSES = [(10, 5.0), (20, 4.0), (30, 4.1), (40, 3.9), (50, 3.9), (60, 4.0), (70, 1.0)]


@pytest.mark.parametrize("patience, update", [(1, 30), (2, 60), (3, None)])
def test_where_the_validation_loss_has_stalled(patience, update):
    assert stalled_at(LOSSES, patience) == update
    assert stalled_at([], patience) is None and stalled_at([(1, math.nan)] * 9, 3) == 1


def test_teaching_and_its_warmup_begin_later():
    schedule = AlphaSchedule("constant", 1.0, burn_in=10, warmup_updates=10)
    assert [schedule.at(1, update, begin=20) for update in (15, 20, 25, 30, 40)] == [0, 0, 0.5, 1.0, 1.0]
    assert [schedule.at(1, update, begin=5) for update in (9, 10, 15, 20)] == [0, 0, 0.5, 1.0]
    assert schedule.at(1, 10**6, begin=None) == 0


def test_a_very_long_run_does_not_overflow():
    assert alpha_at("exponential", 10**6, 1, alpha=1.0, gamma=1.5) < float("inf")


def test_weight_decay_at_the_boundaries():
    """Sodhani et al.: 1e-4, from the first decay of the learning rate (after epoch 18) 1e-5, from the second (38) 0."""
    at = {epoch: weight_decay_at(epoch, (18, 38), (1e-4, 1e-5, 0.0)) for epoch in (1, 18, 19, 38, 39, 45)}
    assert at == {1: 1e-4, 18: 1e-4, 19: 1e-5, 38: 1e-5, 39: 0.0, 45: 0.0}
