"""`codistill_ce` and the hook inside one process, on real fairseq tasks, models and batches."""

import math

import pytest
import torch
import torch.nn.functional as F
from fairseq import options, tasks
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq_runs import CODISTILL, Job, checkpoint, preprocess, taught, train, train_words
from test_config import config
from torch import nn

from fairseq_codistill import data_order, hook
from fairseq_codistill.core.teaching import Teaching
from fairseq_codistill.criterion import CodistillCriterion


class Setting:
    """A task, two models and a batch with padding."""

    def __init__(self, data, *words, model=None):
        words = train_words(data, "unused", *words, **({"model": model} if model else {}))[1:]
        args = options.parse_args_and_arch(options.get_training_parser(), words)
        self.cfg = convert_namespace_to_omegaconf(args)
        self.task = tasks.setup_task(self.cfg.task)
        torch.manual_seed(1)
        self.model, self.peer = (self.task.build_model(self.cfg.model).eval() for _ in range(2))
        self.task.load_dataset("valid")
        dataset = self.task.dataset("valid")
        self.items = [dataset[i] for i in range(6)]
        self.sample = dataset.collater(self.items)
        self.dataset = dataset

    def criterion(self, **choices):
        return CodistillCriterion(self.task, config(**choices))

    def teach(self, sample=None, alpha=1.0, staleness=3.0):
        return {**(sample or self.sample), hook.TEACHING: Teaching(alpha, [self.peer], staleness)}


@pytest.fixture(scope="module")
def setting(data):
    return Setting(data, CODISTILL)


@pytest.mark.parametrize("choice", [dict(loss="mse"), dict(loss="ce"), dict(loss="js", temperature=2.0, aggregate="mean")])
def test_padding_adds_nothing(setting, choice):
    """The batch's distance is the sum of its sentences', each alone and so without padding."""
    criterion = setting.criterion(**choice)
    _, _, log = criterion(setting.model, setting.teach())
    alone = [setting.dataset.collater([item]) for item in setting.items]
    logs = [criterion(setting.model, setting.teach(sample))[2] for sample in alone]
    assert setting.sample["target"].eq(1).any(), "there is padding to speak of"
    torch.testing.assert_close(log["codistill_loss"], sum(one["codistill_loss"] for one in logs), rtol=1e-4, atol=1e-3)
    assert log["codistill_positions"] == sum(one["codistill_positions"] for one in logs) == setting.sample["ntokens"]


def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(setting):
    criterion, alpha = setting.criterion(loss="ce"), 0.7
    loss, sample_size, log = criterion(setting.model, setting.teach(alpha=alpha))
    loss.backward()
    used = [p for p in setting.model.parameters() if p.grad is not None]  # stock fairseq has copies that it does not use
    gradients = [p.grad.clone() for p in used]
    setting.model.zero_grad()
    target = setting.sample["target"].view(-1)
    kept = target != 1
    own = setting.model(**setting.sample["net_input"])[0].view(-1, len(setting.task.target_dictionary))
    with torch.no_grad():
        peer = setting.peer(**setting.sample["net_input"])[0].view_as(own)
    cross_entropy = F.cross_entropy(own[kept], target[kept], reduction="sum")
    soft = -(peer.softmax(-1) * own.log_softmax(-1)).sum(-1)[kept].sum()
    (cross_entropy + alpha * soft).backward()
    torch.testing.assert_close(loss, cross_entropy + alpha * soft)
    for mine, plain in zip(gradients, (p.grad for p in used)):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    setting.model.zero_grad()
    assert all(p.grad is None for p in setting.peer.parameters())
    assert sample_size == setting.sample["ntokens"]
    agreement = (own.argmax(-1) == peer.argmax(-1))[kept].sum()
    assert log["codistill_agreement"] == agreement and log["codistill_staleness"] == 3.0 * kept.sum()
    own_teaching = Teaching(1.0, [setting.model], 0.0)
    _, _, log = criterion(setting.model, {**setting.sample, hook.TEACHING: own_teaching})
    assert log["codistill_agreement"] == kept.sum() < kept.numel(), "with itself it agrees but at padding"


def test_reduce_false_gives_the_loss_of_each_position(setting):
    criterion = setting.criterion()
    each, _, _ = criterion(setting.model, setting.teach(), reduce=False)
    total, _, _ = criterion(setting.model, setting.teach())
    torch.testing.assert_close(each.sum(), total)


@pytest.mark.parametrize("sentence_avg", [False, True])
def test_without_teaching_it_is_cross_entropy_to_the_bit(setting, sentence_avg):
    mine = setting.criterion(sentence_avg=sentence_avg)(setting.model, setting.sample)
    plain = CrossEntropyCriterion(setting.task, sentence_avg)(setting.model, setting.sample)
    assert torch.equal(mine[0], plain[0]) and mine[1] == plain[1]
    assert {name: mine[2][name] for name in plain[2]} == plain[2] and not any("codistill" in name for name in mine[2])
    logged = [_reduced(criterion, [output[2]]) for criterion, output in
              ((CodistillCriterion, mine), (CrossEntropyCriterion, plain))]  # fmt: skip
    assert logged[0]["ppl"] == logged[1]["ppl"] and logged[0]["loss"] == logged[1]["loss"]
    assert logged[0]["nll_loss"] == logged[1].get("nll_loss", logged[1]["loss"])


def _reduced(criterion, outputs):
    with metrics.aggregate(new_root=True) as meters:
        criterion.reduce_metrics(outputs)
    return meters.get_smoothed_values()


def test_metrics_of_several_ranks_and_micro_batches(setting):
    """Sums over ranks are divided once; and the loss is what its parts say."""
    criterion = setting.criterion()
    outputs = [criterion(setting.model, setting.teach(alpha=0.5))[2]]
    outputs.append(criterion(setting.model, setting.teach(setting.dataset.collater(setting.items[:2]), alpha=0.5))[2])
    together = {name: outputs[0][name] + outputs[1][name] for name in outputs[0]}
    values = _reduced(criterion, outputs)
    assert values == _reduced(criterion, [together])
    assert values["loss"] == pytest.approx(values["nll_loss"] + 0.5 * values["codistill_loss"], abs=2e-3)
    assert values["codistill_alpha"] == 0.5 and values["codistill_staleness"] == 3.0
    untaught = criterion(setting.model, setting.sample)[2]
    assert _reduced(criterion, [outputs[0], untaught])["codistill_alpha"] == 0.5, "the mean over the taught positions"


def test_the_logged_identity_over_an_interval(setting):
    """Plain updates (burn-in, --codistill-every), micro-batches and an α that changes, inside one log interval."""
    criterion = setting.criterion()
    small, plain = setting.dataset.collater(setting.items[:2]), lambda sample: criterion(setting.model, sample)[2]
    taught = lambda alpha, sample=None: criterion(setting.model, setting.teach(sample, alpha))[2]  # noqa: E731
    intervals = [
        [[plain(setting.sample)], [plain(small)], [taught(1.0)], [plain(setting.sample)]],
        [[taught(1.0)], [taught(0.4, small), taught(0.4)], [plain(small)]],
        [[plain(small)]],
        [[taught(0.0)], [taught(2.0, small)]],
    ]
    with metrics.aggregate(new_root=True) as meters:
        for updates in intervals:
            meters.reset()
            for outputs in updates:
                criterion.reduce_metrics(outputs)
            values = {name: meters[name].avg for name in meters if "ppl" not in name}
            if len(updates) > 1:
                added = values["codistill_alpha"] * values["codistill_loss"]
                assert float(values["loss"]) == pytest.approx(float(values["nll_loss"] + added), rel=1e-5)
            else:
                assert values["codistill_loss"] is None and values["codistill_alpha"] is None, "nothing was taught"
        assert float(values["codistill_alpha"]) == pytest.approx(2.0 * _share(intervals[-1]), rel=1e-5)


def _share(updates):
    """How much of the distance is the last update's."""
    return float(updates[1][0]["codistill_loss"] / (updates[0][0]["codistill_loss"] + updates[1][0]["codistill_loss"]))


def test_where_all_distances_are_0_alpha_is_shown_all_the_same(setting):
    sample = {**setting.sample, hook.TEACHING: Teaching(0.3, [setting.model])}
    outputs = setting.criterion(loss="mse")(setting.model, sample)[2]
    values = _reduced(CodistillCriterion, [outputs])
    assert values["codistill_loss"] == 0 and values["codistill_alpha"] == 0.3


def test_the_smoothing_controls(setting):
    own = setting.model(**setting.sample["net_input"])[0]
    kept = setting.sample["target"] != 1
    sample = {**setting.sample, hook.TEACHING: Teaching(1.0)}
    _, _, log = setting.criterion(loss="uniform")(setting.model, sample)
    torch.testing.assert_close(log["codistill_loss"], -own.log_softmax(-1).mean(-1)[kept].sum())
    _, _, log = setting.criterion(loss="unigram")(setting.model, sample)
    counts = torch.tensor(setting.task.target_dictionary.count, dtype=torch.float)
    torch.testing.assert_close(log["codistill_loss"], -(own.log_softmax(-1) @ (counts / counts.sum()))[kept].sum())


def test_an_output_that_is_no_logits_is_taken_as_probabilities(raw, tmp_path):
    """With an adaptive softmax the model's first output is features, so its log-probabilities are compared."""
    data = preprocess(raw, tmp_path / "bin", "--only-source", suffix=".b")
    model = "--task language_modeling --arch transformer_lm --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 "
    model += "--decoder-layers 1 --decoder-attention-heads 2 --tokens-per-sample 32 --adaptive-softmax-cutoff 10,20"
    setting = Setting(data, CODISTILL, model=model)
    _, _, log = setting.criterion(loss="kl")(setting.model, setting.teach())
    mine, theirs = (m.get_normalized_probs(m(**setting.sample["net_input"]), log_probs=True) for m in
                    (setting.model, setting.peer))  # fmt: skip
    kept = setting.sample["target"] != setting.task.target_dictionary.pad()
    torch.testing.assert_close(log["codistill_loss"], (theirs.exp() * (theirs - mine)).sum(-1)[kept].sum())


class Images:
    """What the criterion needs of a task without a dictionary."""

    target_dictionary = None
    datasets: dict = {}


class Classifier(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(8, 3)

    def forward(self, image):
        return self.layer(image)

    def get_normalized_probs(self, net_output, log_probs):
        return net_output.float().log_softmax(-1) if log_probs else net_output.float().softmax(-1)

    def get_targets(self, sample, net_output):
        return sample["target"]


def test_images():
    criterion = CodistillCriterion(Images(), config(loss="mse"))
    model, peer, image = Classifier(1), Classifier(2), torch.randn(5, 8)
    sample = {"net_input": {"image": image}, "target": torch.tensor([0, 1, 2, 0, 1]), "ntokens": 5}
    loss, _, log = criterion(model, {**sample, hook.TEACHING: Teaching(2.0, [peer])})
    expected = F.cross_entropy(model(image), sample["target"], reduction="sum")
    expected = expected + 2.0 * (model(image) - peer(image)).pow(2).mean(-1).sum()
    torch.testing.assert_close(loss, expected)
    assert log["codistill_positions"] == 5
    with pytest.raises(ValueError, match="codistill_loss unigram needs a target dictionary"):
        CodistillCriterion(Images(), config(loss="unigram"))


# The hook.


class Task:
    """A task that records what its methods are given."""

    def __init__(self):
        self.datasets, self.given = {}, []

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        self.given.append(sample)
        return torch.tensor(1.0), 1, {}

    def begin_epoch(self, epoch, model):
        self.given.append(epoch)

    def get_batch_iterator(self, dataset, seed=1, **kwargs):
        return seed, list(dataset.ordered_indices())


class Data:
    def ordered_indices(self):
        import numpy

        return numpy.array([4, 2, 0, 5, 3, 1])


def test_data_in_the_same_order_or_in_disjoint_parts():
    parts = []
    for peer in range(2):
        task, train_set, valid_set = Task(), Data(), Data()
        task.datasets = {"train": train_set, "valid": valid_set}
        data_order.order_data(task, "disjoint", peer, 2, "train")
        for _ in range(2):  # an epoch's iterator is made again: the part stays the same
            seed, part = task.get_batch_iterator(dataset=train_set, seed=7)
        parts.append(part)
        assert seed == 7 and task.get_batch_iterator(dataset=valid_set)[1] == [4, 2, 0, 5, 3, 1]
    assert parts == [[4, 2, 0], [5, 3, 1]]
    task = Task()
    task.datasets = {"train": train_set}
    data_order.order_data(task, "same", 0, 2, "train")
    assert task.get_batch_iterator(dataset=train_set, seed=7)[0] == 1


def test_weight_decay_by_epochs():
    class Optimizer:
        param_groups = [{"weight_decay": 0.5}, {"weight_decay": 0.0}]

    task = Task()
    data_order.schedule_weight_decay(task, (1, 2), (1e-4, 1e-5, 0.0))
    seen = []
    for epoch in (1, 2, 3):
        task.begin_epoch(epoch, None)
        task.train_step(sample={}, model=None, criterion=None, optimizer=Optimizer, update_num=0)
        seen.append([group["weight_decay"] for group in Optimizer.param_groups])
    assert seen == [[1e-4, 0.0], [1e-5, 0.0], [0.0, 0.0]], "a group without weight decay (biases) stays without"


def test_the_sample_itself_is_not_changed():
    sample = {"net_input": {"x": 1}, "target": 2}
    carried = hook._with(sample, Teaching(1.0))
    assert hook.TEACHING not in sample and carried[hook.TEACHING].alpha == 1.0
    pairs = {"a-b": {"net_input": {}, "target": 1}, "b-a": None}

    class Multilingual:
        models = {"a-b": "the sub-model"}

    carried = hook._with(pairs, Teaching(1.0, [Multilingual]))
    assert carried["a-b"][hook.TEACHING].peers == ["the sub-model"] and carried["b-a"] is None
    assert hook._with(sample, None) is sample


# The controls and offline teachers in real trainings.


def test_controls_and_offline_teachers_train(data, tmp_path):
    log = train(data, tmp_path / "uniform", "--criterion codistill_ce --codistill-loss uniform --max-update 6")
    assert len(taught(log)) == 6 and "codistill_agreement" not in log
    train(data, tmp_path / "teacher", "--criterion cross_entropy --max-update 3")
    teacher = tmp_path / "teacher/checkpoint_last.pt"
    words = f"--criterion codistill_ce --codistill-loss kl --codistill-teacher {teacher}:{teacher} --max-update 6"
    student = Job(train_words(data, tmp_path / "student", words)).finish()
    assert len(taught(student)) == 6 and math.isfinite(taught(student)[-1])
    assert checkpoint(tmp_path / "student/checkpoint_last.pt")["model"].keys() == checkpoint(teacher)["model"].keys()


def test_weight_decay_reaches_the_optimizer_and_resumes(data, tmp_path):
    options = "--criterion codistill_ce --codistill-milestones 1 --codistill-weight-decays 0.5,0 --max-epoch 2"
    train(data, tmp_path, options)
    groups = checkpoint(tmp_path / "checkpoint_last.pt")["last_optimizer_state"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.0]
