"""The image task in real trainings on scikit-learn's digits: alone, as a pair of peers, resumed, validated, predicting."""

import os
import re

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq_runs import (
    PLUGIN,
    Job,
    checkpoint,
    column,
    command,
    rows,
    same,
    start_group,
    taught,
    train,
    train_peers,
    train_words,
    weights,
)
from image_runs import MODEL, SGD, TASK, write_digits, write_folder
from test_config import config

from fairseq_codistill.core.codistiller import Codistiller
from fairseq_codistill.core.schedules import AlphaSchedule
from fairseq_codistill.core.topology import edges_of
from fairseq_codistill.criterion import CodistillCriterion
from fairseq_codistill.data_order import order_data
from fairseq_codistill.exchange.exchange import Exchange, Run
from fairseq_codistill.exchange.snapshot import tensors_of
from fairseq_codistill.exchange.stores import MemoryStore
from fairseq_codistill.hook import TEACHING
from fairseq_codistill.image import predict as image_predict
from fairseq_codistill.image.options import ImageClassificationConfig, check
from fairseq_codistill.image.task import distance

CODISTILL = (
    f"{SGD} --criterion codistill_ce --codistill-interval 10 --codistill-sync --codistill-wait 120 --codistill-wire-dtype fp32 "
    "--codistill-alpha-warmup-epochs 0"
)
PLAIN = f"{SGD} --criterion cross_entropy"


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("images") / "digits")


@pytest.fixture(scope="module")
def pair(digits, tmp_path_factory):
    """Two peers of a small network, in lockstep: their folder and their logs."""
    out = tmp_path_factory.mktemp("pair")
    return out, train_peers(digits, out, CODISTILL, "--max-update 40 --log-init-distance", model=MODEL)


def settings(data, *words, model=MODEL):
    """fairseq's configuration of a training."""
    words = train_words(data, "unused", PLAIN, *words, model=model)[1:]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), words))


def setup(data, *words, model=MODEL):
    cfg = settings(data, *words, model=model)
    return cfg, tasks.setup_task(cfg.task)


# --- done when ----------------------------------------------------------------------------------------------------------


def test_two_peers_of_resnet18_learn_the_digits(warm, digits, tmp_path):
    """With codistill-launch, as a user types it."""
    words = f"--user-dir {PLUGIN} --task image_classification --arch resnet18 --criterion codistill_ce --augmentation none"
    words += " --image-size 16 --image-resize 16 --image-channels 1 --batch-size 32 --max-epoch 2 --codistill-interval 20"
    words += " --optimizer sgd_nesterov --lr 0.02 --lr-scheduler cosine_he --cpu --num-workers 0 --no-epoch-checkpoints"
    words += f" --log-format json --log-interval 20 --codistill-wait 120 --save-dir {tmp_path}"
    command("codistill-launch", "--peers", 2, "--", "fairseq-train", digits, *words.split(), first=warm)
    for peer in range(2):
        log = (tmp_path / f"peer{peer}/train.log").read_text()
        assert column(log, "valid", "valid_top1")[-1] > 60, "chance is 10"
        assert taught(log)


def test_a_small_pair_learns_faster_still(pair):
    for log in pair[1]:
        assert column(log, "valid", "valid_top1")[-1] > 35 and column(log, "valid", "valid_top5")[-1] > 75
        assert len(taught(log)) == 30
        assert column(log, "train_inner", "top1")[-1] > column(log, "train_inner", "top1")[0]


# --- what the task gives the criteria, and the logs -----------------------------------------------------------------------


def test_alone_codistill_ce_is_cross_entropy_to_the_bit(digits, tmp_path):
    logs = [
        train(digits, tmp_path / name, SGD, f"--criterion {name} --max-update 6", model=MODEL)
        for name in ("cross_entropy", "codistill_ce")
    ]
    for name in ("loss", "top1", "top5", "gnorm"):
        assert column(logs[0], "train_inner", name) == column(logs[1], "train_inner", name)
    for name in ("valid_loss", "valid_top1"):
        assert column(logs[0], "valid", name) == column(logs[1], "valid", name)
    ends = [weights(tmp_path / name / "checkpoint_last.pt") for name in ("cross_entropy", "codistill_ce")]
    assert same(*ends)


class Fixed(torch.nn.Module):
    """A model that gives what it is told."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.calls = logits, 0

    def forward(self, image):
        self.calls += 1
        return self.logits


def count(task, logits, target):
    model = Fixed(torch.tensor(logits))
    sample = {"net_input": {"image": None}, "target": torch.tensor(target), "nsentences": len(target)}

    def criterion(model, sample):
        model(**sample["net_input"])
        return torch.zeros(()), len(target), {"nsentences": len(target)}

    log = task.valid_step(sample, model, criterion)[2]
    assert model.calls == 1, "nothing is computed twice"
    return log["top1"].item(), log["top5"].item()


def test_top1_and_top5_count_hits(tmp_path):
    task = setup(write_folder(tmp_path, {"train": {name: 1 for name in "abcdefg"}}))[1]
    falling = [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert count(task, [falling] * 7, list(range(7))) == (1, 5)
    few = setup(write_folder(tmp_path / "few", {"train": {"a": 1, "b": 1}}))[1]
    assert count(few, [[1.0, 2.0], [1.0, 2.0]], [0, 1]) == (1, 2), "with two classes the second choice is always among five"


def test_percent_over_micro_batches_of_unequal_size(digits):
    task = setup(digits)[1]
    logs = [{"nsentences": 30, "ntokens": 30, "sample_size": 30, "loss": 0.0, "top1": 30, "top5": 30}]
    logs += [{"nsentences": 10, "ntokens": 10, "sample_size": 10, "loss": 0.0, "top1": 0, "top5": 5}]
    with metrics.aggregate() as seen:
        task.reduce_metrics(logs, task.build_criterion(settings(digits).criterion))
    assert seen["top1"].avg == 75.0 and seen["top5"].avg == 87.5


def test_labels_that_disagree_with_the_models_outputs(tmp_path):
    task = setup(write_folder(tmp_path, {"train": {"a": 1, "b": 1, "c": 1}}))[1]
    with pytest.raises(ValueError, match=r"must give 3 outputs for each image.*but gives \(1, 10\) instead.*other data"):
        count(task, [[0.0] * 10], [0])


def test_a_checkpoint_of_other_classes_is_refused(digits, pair, tmp_path):
    """As many, but others: only their names can tell."""
    other = write_folder(tmp_path, {"valid": {name: 1 for name in "abcdefghij"}})
    words = [word.replace(str(digits), str(other)) for word in validate_words(digits, pair)]
    job = Job(words)
    assert job.status() != 0
    assert (
        f"The classes of {other}/valid must be those of the training split, but a, b, c, d, e (and 5 more) is not among"
        in job.log
    )


def test_the_distance_from_the_start_is_logged(digits, pair):
    """Logged by the task, and again from the checkpoint and the seed."""
    cfg, task = setup(digits, "--seed 1")
    from fairseq import utils

    utils.set_torch_seed(1)
    start = [p.detach() for p in task.build_model(cfg.model).parameters()]
    model = task.build_model(cfg.model)
    model.load_state_dict(weights(pair[0] / "peer0/checkpoint_last.pt"))
    logged = column(pair[1][0], "valid", "valid_init_distance")[-1]
    assert logged == pytest.approx(distance(model, start), abs=2e-4) and logged > 1


# --- peers and BatchNorm --------------------------------------------------------------------------------------------------


def test_batchnorm_statistics_travel_and_the_peer_runs_in_eval_mode(digits):
    """A real pair: the teacher predicts to the bit what that peer does for this batch in evaluation, and stays unchanged."""
    cfg, task = setup(digits)
    task.load_dataset("train")
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[i] for i in range(0, 1142, 36)])
    mine, theirs = task.build_model(cfg.model), task.build_model(cfg.model)
    theirs.train()
    for _ in range(3):
        theirs(**sample["net_input"])
    store, peers = MemoryStore(), []
    for index, model in enumerate((mine, theirs)):
        exchange = Exchange(store, index)
        schedule = AlphaSchedule("constant", 1.0)
        one = Codistiller(
            index, 2, exchange=exchange, edges=edges_of("all", 2), interval=4, schedule=schedule, in_background=False,
            wire_dtype=torch.float32,
        )  # fmt: skip
        one.join(Run(2, None, None))
        one.begin_epoch(1, model)
        peers.append(one)
    for update in range(5):
        peers[1].teaching(update)
    teaching = peers[0].teaching(0)
    (held,) = teaching.peers
    before = {name: tensor.clone() for name, tensor in tensors_of(held).items()}
    assert before["net.1.running_mean"].abs().sum() > 0 and before["net.1.num_batches_tracked"] == 3
    assert all(torch.equal(tensor, tensors_of(theirs)[name]) for name, tensor in before.items())

    criterion = CodistillCriterion(task, config(loss="mse"))
    _, _, log = criterion(mine.train(), {**sample, TEACHING: teaching})
    own, said = mine.eval(), theirs.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(held).items()), "no trace of the batch"
    ((_, output),) = teaching.outputs(sample["net_input"])
    with torch.no_grad():
        assert torch.equal(output, said(**sample["net_input"]))
        assert not torch.allclose(output, theirs.train()(**sample["net_input"])), "in training it would say something else"
    assert own is mine and log["codistill_positions"] == len(sample["target"])


# --- order, epochs, resuming, groups --------------------------------------------------------------------------------------


def test_resumed_in_the_middle_of_an_epoch(digits, tmp_path):
    """9 batches make an epoch: stopped after 4 updates and after 12, it ends where an undisturbed run does, to the bit."""
    options_ = [
        PLAIN,
        "--image-fraction 1/4 --num-workers 2 --augmentation small --save-interval-updates 4 --log-init-distance",
    ]
    options_ += ["--lr-milestones 1.4 --warmup-epochs 0.5 --weight-decays 1e-3,1e-4 --no-decay-norm-bias"]
    whole = train(digits, tmp_path / "whole", *options_, "--max-update 14", model=MODEL)
    for stop in (4, 12, 14):
        resumed = train(digits, tmp_path / "parts", *options_, f"--max-update {stop}", model=MODEL)
    assert same(weights(tmp_path / "whole/checkpoint_last.pt"), weights(tmp_path / "parts/checkpoint_last.pt"))
    for name in ("loss", "lr", "top1"):
        assert column(whole, "train_inner", name)[-2:] == column(resumed, "train_inner", name)
    assert column(whole, "valid", "valid_init_distance")[-1] == column(resumed, "valid", "valid_init_distance")[-1]
    groups = checkpoint(tmp_path / "parts/checkpoint_last.pt")["last_optimizer_state"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0]


def test_the_number_of_workers_changes_nothing(digits, tmp_path):
    words = f"{PLAIN} --image-fraction 1/4 --augmentation small --max-update 12"
    logs = [train(digits, tmp_path / str(n), words, f"--num-workers {n}", model=MODEL) for n in (0, 3)]
    assert column(logs[0], "train_inner", "gnorm") == column(logs[1], "train_inner", "gnorm")


def test_two_ranks_are_one_worker_with_two_batches(digits, tmp_path):
    """The counts of a group are summed, and its updates per epoch are those of its schedule."""
    words = f"{PLAIN} --batch-size 16 --max-update 8 --lr-milestones 0.1"
    group = start_group(digits, tmp_path / "group", words, model=MODEL)
    log = [job.finish() for job in group][0]
    alone = train(digits, tmp_path / "alone", words, "--update-freq 2", model=MODEL)
    assert column(log, "train_inner", "lr") == column(alone, "train_inner", "lr") == [0.1] * 3 + [0.01] * 5
    assert column(log, "train_inner", "bsz") == column(alone, "train_inner", "bsz")
    assert column(log, "train_inner", "top1") == pytest.approx(column(alone, "train_inner", "top1"), abs=7)


def test_a_fraction_of_the_data_is_a_fraction_of_the_epoch(digits, tmp_path):
    log = train(digits, tmp_path, PLAIN, "--image-fraction 1/4 --max-epoch 2 --image-cache", model=MODEL)
    assert column(log, "train", "train_num_updates") == [9, 18], "281 images of 1,142, without the last one of 9 · 32 + …"


def test_peers_may_share_out_the_images(digits):
    shares = []
    for peer in range(2):
        _, task = setup(digits)
        task.load_dataset("train")
        order_data(task, "disjoint", peer, 2, "train")
        batches = task.get_batch_iterator(task.dataset("train"), max_sentences=32, seed=1, epoch=1)
        assert len(batches) == 18, "half of the 36 updates of an epoch"
        shares.append({index for batch in batches.frozen_batches for index in batch})
    assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 1142


def test_another_seed_is_another_order_and_another_augmentation(digits):
    _, task = setup(digits, "--augmentation small")
    task.load_dataset("train")
    dataset, seen = task.dataset("train"), []
    for seed, epoch in ((1, 1), (9, 1), (1, 2), (1, 1)):
        batches = task.get_batch_iterator(dataset, max_sentences=32, seed=seed, epoch=epoch)
        seen.append((list(batches.frozen_batches[0]), dataset[0]["image"].tolist()))
    assert seen[0] == seen[3]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert seen[i][0] != seen[j][0] and seen[i][1] != seen[j][1]


# --- validating and predicting --------------------------------------------------------------------------------------------


def validate_words(data, pair):
    words = ["fairseq-validate", data, *TASK.split()[:4], "--path", pair[0] / "peer0/checkpoint_last.pt"]
    words += ["--batch-size", 64, "--cpu", "--num-workers", 0, "--log-format", "json", "--valid-subset", "valid"]
    return [str(word) for word in words]


def test_fairseq_validate(digits, pair):
    (again,) = rows(Job(validate_words(digits, pair)).finish(), "valid")
    last = rows(pair[1][0], "valid")[-1]
    assert again["valid_top1"] == last["valid_top1"] and again["valid_loss"] == last["valid_loss"]


def predict(capsys, *words, status=0):
    assert image_predict.main([str(word) for word in words]) == status
    return capsys.readouterr()


def test_predictions_in_a_file(digits, pair, tmp_path, capsys):
    last = pair[0] / "peer0/checkpoint_last.pt"
    printed = predict(capsys, "--cpu", "--path", last, "--out", tmp_path / "p.tsv", "--top", 3, digits / "valid").out
    lines = [line.split("\t") for line in (tmp_path / "p.tsv").read_text().splitlines()]
    assert len(lines) == 300 and all(len(line) == 7 for line in lines)
    hits = sum(path.split("/")[-2] == first for path, first, *_ in lines)
    assert all(float(line[2]) >= float(line[4]) >= float(line[6]) for line in lines)
    assert rows(pair[1][0], "valid")[-1]["valid_top1"] == pytest.approx(100 * hits / 300, abs=0.01)
    assert re.search(rf"top-1 {100 * hits / 300:.2f} %, top-5 [\d.]+ %, 300 images", printed)


def test_an_ensemble_averages_probabilities(digits, pair, tmp_path, capsys):
    paths = [pair[0] / f"peer{i}/checkpoint_last.pt" for i in (0, 1)]
    image = digits / "test/3/150.png"
    found = []
    for path in (*paths, f"{paths[0]}:{paths[1]}"):
        predict(capsys, "--cpu", "--path", path, "--out", tmp_path / "p.tsv", "--top", 10, image)
        words = (tmp_path / "p.tsv").read_text().split("\t")[1:]
        found.append(dict(zip(words[::2], map(float, words[1::2]))))
    for name in "0123456789":
        assert found[2][name] == pytest.approx((found[0][name] + found[1][name]) / 2, abs=2e-6)
    assert sum(found[2].values()) == pytest.approx(1, abs=1e-5)


def test_predictions_skip_what_cannot_be_read_only_if_asked(digits, pair, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/broken.png").write_text("no image")
    (tmp_path / "images/good.png").write_bytes((digits / "test/3/150.png").read_bytes())
    words = ["--cpu", "--path", pair[0] / "peer0/checkpoint_last.pt", "--out", tmp_path / "p.tsv", tmp_path / "images"]
    error = predict(capsys, *words, status=2).err
    assert error.count("\n") == 1 and "broken.png must be an image" in error and not (tmp_path / "p.tsv").exists()
    printed = predict(capsys, *words, "--skip-unreadable-images").out
    assert len((tmp_path / "p.tsv").read_text().splitlines()) == 1 and "top-1" not in printed


def test_predictions_keep_names_that_are_no_text(digits, pair, tmp_path, capsys, monkeypatch, caplog):
    """A Latin-1 name, a tab and a line feed: after hours of work on other images, each is but a name."""
    image, home = (digits / "test/3/150.png").read_bytes(), tmp_path / os.fsdecode(b"f\xe9")
    home.mkdir()
    for name in (b"caf\xe9.png", b"a\tb\nc.png"):
        (home / os.fsdecode(name)).write_bytes(image)
    (home / os.fsdecode(b"\xe9 broken.png")).write_text("no image")
    monkeypatch.setenv("HOME", str(home))
    words = ["--cpu", "--path", pair[0] / "peer0/checkpoint_last.pt", "--out=~/p.tsv", "~/", "--skip-unreadable-images"]
    with caplog.at_level("DEBUG", logger=""):
        printed = predict(capsys, *words).out
    lines = (home / "p.tsv").read_bytes().split(b"\n")[:-1]
    assert [line.split(b"\t")[0].replace(os.fsencode(home), b"~") for line in lines] == [rb"~/a\tb\nc.png", b"~/caf\xe9.png"]
    assert "f\\xe9/p.tsv" in printed
    told = [record.getMessage() for record in caplog.records]
    assert len([text for text in told if "left out" in text and "\\xe9 broken.png" in text and text.isprintable()]) == 1
    assert not [record for record in caplog.records if record.name.startswith("PIL")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--out": "/nowhere/p.tsv"}, "--out must be the file to write, but /nowhere/p.tsv lies in no folder."),
        ({"--out": "/"}, "--out must be the file to write, but / is a folder."),
        ({"--path": "none.pt"}, "--path must be checkpoints a.pt:b.pt, but there is no file none.pt"),
        ({"images": "nowhere"}, "there is no nowhere"),
        ({"--top": "0"}, "--top must be at least 1, but is 0"),
    ],
)
def test_predictions_refuse_in_one_sentence(digits, pair, tmp_path, capsys, change, words):
    given = {"--path": str(pair[0] / "peer0/checkpoint_last.pt"), "--out": str(tmp_path / "p.tsv"), "--top": "2", **change}
    images = given.pop("images", str(digits / "test"))
    error = predict(capsys, "--cpu", *[word for item in given.items() for word in item], images, status=2).err
    assert words in error and error.count("\n") == 1


# --- bad input in a training -----------------------------------------------------------------------------------------------


def test_no_images_at_all(tmp_path):
    (tmp_path / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="must hold one folder for each class, but holds no folder"):
        setup(tmp_path)[1].load_dataset("train")


def test_a_class_in_valid_but_not_in_train(tmp_path):
    task = setup(write_folder(tmp_path, {"train": {"a": 4, "b": 4}, "valid": {"a": 1, "b": 1, "zebra": 1}}))[1]
    task.load_dataset("train")
    with pytest.raises(ValueError, match="must be those of the training split, but zebra is not among them"):
        task.load_dataset("valid")


def test_unreadable_images_stop_a_training_unless_they_are_skipped(tmp_path):
    data = write_folder(tmp_path / "data", {"train": {"a": 20, "b": 20}, "valid": {"a": 2, "b": 2}})
    (data / "train/a/000.png").write_bytes((data / "train/a/000.png").read_bytes()[:60])
    words = "--batch-size 8 --image-mean 0.5 --image-std 0.3 --num-workers 2 --max-epoch 1"
    job = Job(train_words(data, tmp_path / "stop", PLAIN, words, model=MODEL))
    assert job.status() != 0 and "train/a/000.png must be an image that can be read" in job.log
    log = train(data, tmp_path / "skip", PLAIN, words, "--skip-unreadable-images", model=MODEL)
    assert "left out: " in log and sum(column(log, "train_inner", "bsz")) == 39


def test_fairseq_validate_survives_a_batch_without_images(tmp_path):
    _, task = setup(write_folder(tmp_path, {"train": {"a": 1}}))
    loss, sample_size, log = task.valid_step({}, torch.nn.Linear(1, 1), None)
    assert loss == 0 and sample_size == 0 and log["nsentences"] == log["top1"] == 0


def test_grey_and_rgba_among_rgb(tmp_path):
    for mode, number in (("RGBA", 8), ("L", 3), ("RGB", 5)):
        write_folder(tmp_path, {"train": {"a": number, "b": number}}, mode=mode)
    cfg, task = setup(tmp_path, model=MODEL.replace("--image-channels 1", "--image-channels 3"))
    task.load_dataset("train")
    dataset = task.dataset("train")
    batch = dataset.collater([dataset[i] for i in range(16)])
    assert (
        batch["net_input"]["image"].shape == (16, 3, 8, 8)
        and task.build_model(cfg.model)(**batch["net_input"]).isfinite().all()
    )


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (dict(image_size=0), "image_size must be at least 1 pixel, but is 0"),
        (dict(image_resize=-1), "image_resize must be at least 1 pixel"),
        (dict(image_channels=2), r"image_channels must be 3 \(RGB\) or 1 \(grey\), but is 2"),
        (dict(image_mean="0.5,0.5,0.5"), "image_mean and image_std must be given together"),
        (dict(image_mean="0.5", image_std="0.5"), "image_mean must be 3 numbers separated by commas"),
        (dict(image_mean="a,b,c", image_std="1,1,1"), "image_mean must be 3 numbers"),
        (dict(image_mean="0,0,0", image_std="1,0,1"), "image_std must be above 0"),
        (dict(image_fraction="0"), "image_fraction must be above 0 and at most 1, such as 1/4, but is '0'"),
        (dict(image_fraction="1/0"), "image_fraction"),
        (dict(image_fraction="2"), "image_fraction"),
        (dict(image_fraction="half"), "image_fraction"),
    ],
)
def test_one_sentence_for_each_mistake(choices, words):
    with pytest.raises(ValueError, match=words):
        check(ImageClassificationConfig(data="data", **choices))


def test_the_task_needs_torchvision_and_says_so(digits, monkeypatch):
    from fairseq_codistill import compat
    from fairseq_codistill.image import task as image_classification

    def missing():
        raise ValueError("need torchvision")

    monkeypatch.setattr(compat, "load_torchvision", missing)
    with pytest.raises(ValueError, match="need torchvision"):
        image_classification.ImageClassificationTask(ImageClassificationConfig(data=str(digits)))


def test_normalisation_travels_in_the_checkpoint(digits, pair):
    state = checkpoint(pair[0] / "peer0/checkpoint_last.pt")["task_state"]
    assert state["classes"] == list("0123456789")
    (mean,), (std,) = state["normalisation"]
    assert mean == pytest.approx(0.305, abs=0.01) and std == pytest.approx(0.376, abs=0.01)
    task = setup(digits, "--image-mean 0.25 --image-std 0.5")[1]
    assert task.normalisation == ([0.25], [0.5]) and "normalisation" not in task.state.state_dict


def test_schedules_of_another_length_are_told_nothing(digits):
    task = setup(digits, "--update-freq 1,2")[1]
    assert task._updates(10) == 0
    assert setup(digits, "--update-freq 4")[1]._updates(10) == 3
    assert setup(digits, "--update-freq 4 --skip-remainder-batch")[1]._updates(10) == 2
