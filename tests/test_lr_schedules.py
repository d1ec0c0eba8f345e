"""Learning rate and weight decay by epochs, at the boundaries; and the optimizer that the residual networks use."""

from argparse import Namespace

import pytest
import torch
from fairseq.optim.lr_scheduler.cosine_lr_scheduler import CosineLRSchedule, CosineLRScheduleConfig
from torch import nn

from fairseq_codistill.image import lr_schedules
from fairseq_codistill.image.lr_schedules import CosineHeConfig, CosineHeSchedule, MultistepConfig, MultistepSchedule
from fairseq_codistill.image.nesterov import SgdNesterov, SgdNesterovConfig


def optimizer(lr=0.2, model=None, **choices):
    model = model or nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    return SgdNesterov(SgdNesterovConfig(lr=[lr], **choices), list(model.parameters()))


def multistep(one=None, lr=0.2, updates_per_epoch=10, **choices):
    cfg = MultistepConfig(**{"lr_milestones": "30,60,80", **choices, "lr": [lr], "updates_per_epoch": updates_per_epoch})
    cfg._name = "multistep"
    return MultistepSchedule(cfg, one or optimizer(lr))


def cosine(one=None, lr=0.4, updates_per_epoch=10, max_epoch=90, **choices):
    cfg = CosineHeConfig(**{**choices, "lr": [lr], "updates_per_epoch": updates_per_epoch, "max_epoch": max_epoch})
    cfg._name = "cosine_he"
    return CosineHeSchedule(cfg, one or optimizer(lr))


@pytest.mark.parametrize(
    ("t", "rate"),
    [
        (0, 0.1),
        (2.5, 0.15),
        (4.999, 0.2),
        (5, 0.2),
        (29.99, 0.2),
        (30, 0.02),
        (59.99, 0.02),
        (60, 0.002),
        (80, 0.0002),
        (90, 0.0002),
    ],
)
def test_multistep_at_the_boundaries(t, rate):
    value = lr_schedules.multistep(t, 0.2, milestones=(30, 60, 80), shrink=0.1, warmup=5, start=0.1)
    assert value == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(("t", "rate"), [(0, 0), (2.5, 0.2), (5, 0.4), (47.5, 0.2), (26.25, 0.34142), (90, 0), (91, 0)])
def test_cosine_at_the_boundaries(t, rate):
    assert lr_schedules.cosine_he(t, 0.4, epochs=90, warmup=5, start=0.0) == pytest.approx(rate, abs=1e-5)


def test_cosine_he_gives_the_rates_of_fairseqs_own_cosine():
    """He et al.'s formula, which fairseq's `cosine` is as well when its updates are those of the run."""
    one, other = optimizer(0.4), optimizer(0.4)
    cfg = CosineLRScheduleConfig(warmup_updates=50, lr=[0.4], max_update=900)
    fairseqs, ours = CosineLRSchedule(cfg, one), cosine(other, warmup_epochs=5.0)
    for update in (0, 1, 25, 49, 50, 51, 475, 899):
        assert ours.step_update(update) == pytest.approx(fairseqs.step_update(update), abs=1e-12)


@pytest.mark.parametrize(("t", "count"), [(0, 0), (17.999, 0), (18, 1), (37.999, 1), (38, 2), (44, 3), (1000, 3)])
def test_milestones_passed(t, count):
    assert lr_schedules.passed(t, (18, 38, 44)) == count


def test_fractional_milestones_fall_on_the_update():
    """Two thirds of 16 epochs of 54 updates are 576, though 10.6667 · 54 is a little more."""
    schedule = multistep(updates_per_epoch=54, lr_milestones="7.5,10.6667")
    assert [round(schedule.step_update(u), 5) for u in (404, 405, 575, 576)] == [0.2, 0.02, 0.02, 0.002]


def test_the_papers_weight_decay():
    """1e-4 → 1e-5 → 0 at the first two milestones of the learning rate (Sodhani et al., §3.2)."""
    one = optimizer(weight_decay=1e-4)
    schedule = multistep(one, lr_milestones="18,38,44", weight_decays="1e-4,1e-5,0")
    seen = []
    for update in (0, 179, 180, 379, 380, 439, 440, 449):
        schedule.step_update(update)
        seen.append(one.param_groups[0]["weight_decay"])
    assert seen == [1e-4, 1e-4, 1e-5, 1e-5, 0, 0, 0, 0]


def test_weight_decay_has_milestones_of_its_own_if_given():
    one = optimizer()
    schedule = cosine(one, weight_decays="1e-3,0", weight_decay_milestones="0.5")
    decays = [schedule.step_update(u) and one.param_groups[0]["weight_decay"] for u in (1, 4, 5)]
    assert decays == [1e-3, 1e-3, 0]


def test_what_never_decays_is_left_alone_and_other_schedules_leave_all():
    one = optimizer(no_decay_norm_bias=True, weight_decay=7.0)
    multistep(one).step_update(5)
    assert [group["weight_decay"] for group in one.param_groups] == [7.0, 0.0]
    multistep(one, weight_decays="1e-4,1e-5").step_update(5)
    assert [group["weight_decay"] for group in one.param_groups] == [1e-4, 0.0]


def test_groups_without_weight_decay_keep_none_under_any_optimizer():
    """As with --codistill-weight-decays: an optimizer that marks no groups has biases without any, too."""
    one = optimizer(weight_decay=0.5)
    groups = one.param_groups
    groups.append({**groups[0], "params": [], "weight_decay": 0.0})
    schedule = multistep(one, weight_decays="1e-4,0,1e-5", weight_decay_milestones="1,2")
    seen = [schedule.step_update(u) and [group["weight_decay"] for group in groups] for u in (1, 10, 20)]
    assert seen == [[1e-4, 0.0], [0.0, 0.0], [1e-5, 0.0]]


def test_the_task_tells_how_many_updates_an_epoch_has():
    one = optimizer()
    schedule = multistep(one, updates_per_epoch=None, lr_milestones="2")
    assert schedule.step_update(0) == 0.2, "at the start nothing need be known"
    lr_schedules.tell_updates_per_epoch(one, 4)
    assert [schedule.step_update(u) for u in (7, 8)] == pytest.approx([0.2, 0.02])
    lr_schedules.tell_updates_per_epoch(one, 5)
    assert one.get_lr() == pytest.approx(0.2), "at once: update 8 is before epoch 2 now"
    lr_schedules.tell_updates_per_epoch(Namespace(), 4)  # another schedule: nobody to tell


def test_a_resumed_schedule_knows_before_it_is_told():
    schedule = multistep(updates_per_epoch=None, lr_milestones="2")
    lr_schedules.tell_updates_per_epoch(schedule.optimizer, 4)
    resumed = multistep(updates_per_epoch=None, lr_milestones="2")
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.step_update(8) == pytest.approx(0.02)


def test_given_updates_are_not_overridden():
    one = optimizer()
    schedule = multistep(one, updates_per_epoch=10, lr_milestones="2")
    lr_schedules.tell_updates_per_epoch(one, 4)
    assert schedule.step_update(19) == 0.2


def test_nobody_told():
    with pytest.raises(ValueError, match="multistep must know how many updates .* did you forget --updates-per-epoch"):
        multistep(updates_per_epoch=None).step_update(1)


@pytest.mark.parametrize(
    ("make", "choices", "words"),
    [
        (multistep, dict(lr_milestones=None), "lr_milestones must be given"),
        (multistep, dict(lr_milestones="3,2"), "lr_milestones must be epochs that increase.*3,2"),
        (multistep, dict(lr_milestones="0,2"), "above 0"),
        (multistep, dict(lr_milestones="a"), "lr_milestones must be numbers.*'a'"),
        (multistep, dict(lr=0.0), "lr must be one number above 0"),
        (multistep, dict(warmup_epochs=-1.0), "warmup_epochs must be"),
        (multistep, dict(weight_decays="1,2,3,4,5"), "weight_decays must be one number before and after each of 3"),
        (multistep, dict(weight_decays="1e-4,-1"), "weight_decays must be numbers"),
        (multistep, dict(weight_decay_milestones="3"), "weight_decays must be given"),
        (cosine, dict(weight_decays="1e-4,0"), "did you forget --weight-decay-milestones"),
        (cosine, dict(max_epoch=0), "cosine_epochs .* did you forget --max-epoch"),
        (cosine, dict(max_epoch=5, warmup_epochs=5.0), "must be more than the 5.0 epochs"),
    ],
)
def test_one_sentence_for_each_mistake(make, choices, words):
    with pytest.raises(ValueError, match=words):
        make(one=optimizer(0.1), **choices)


# --- the optimizer ------------------------------------------------------------------------------------------------------


def test_sgd_nesterov_is_the_plain_formula():
    """v ← µ v + g + λ θ;  θ ← θ − η (g + λ θ + µ v), twice."""
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    one = SgdNesterov(SgdNesterovConfig(lr=[0.1], momentum=0.9, weight_decay=0.01), [parameter])
    expected, velocity = parameter.detach().clone(), torch.zeros(1, 2)
    for gradient in (torch.tensor([[0.5, 1.0]]), torch.tensor([[-1.0, 2.0]])):
        parameter.grad = gradient.clone()
        one.step()
        decayed = gradient + 0.01 * expected
        velocity = 0.9 * velocity + decayed
        expected = expected - 0.1 * (decayed + 0.9 * velocity)
        torch.testing.assert_close(parameter.detach(), expected)


def test_norms_and_biases_do_not_decay_if_asked():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    one = optimizer(model=model, weight_decay=1e-4, no_decay_norm_bias=True)
    decayed, others = one.param_groups
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert others["weight_decay"] == 0 and len(others["params"]) == 4 and decayed["weight_decay"] == 1e-4


def test_flat_parameters_cannot_be_told_apart():
    with pytest.raises(ValueError, match="--fp16-no-flatten-grads"):
        SgdNesterov(SgdNesterovConfig(lr=[0.1], no_decay_norm_bias=True), [nn.Parameter(torch.ones(9))])


def test_momentum_that_cannot_be():
    with pytest.raises(ValueError, match="momentum must be above 0 and below 1, but is 1.0"):
        optimizer(momentum=1.0)
