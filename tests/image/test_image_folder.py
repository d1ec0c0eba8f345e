"""Folders of images: what is found, what is refused, what is random and what never is."""

import logging
from fractions import Fraction

import numpy as np
import pytest
import torch
from fairseq_runs import ROOT
from image_runs import write_folder, write_image
from PIL import Image

from fairseq_codistill.image import folder as image_folder
from fairseq_codistill.image.folder import ImageFolder, Images, UnreadableImage, find_images, read_image
from fairseq_codistill.image.transforms import Pipeline, random_area


def pipeline(augmentation="none", size=8, train=True, **choices):
    return Pipeline(augmentation, size, **{"resize": None, "channels": 3, "flip": True, "train": train, **choices})


def dataset(images, augmentation="small", mean=(0.5,) * 3, std=(0.25,) * 3, size=8, train=True, **choices):
    return ImageFolder(images, pipeline(augmentation, size, train=train), mean, std, shuffle=train, **choices)


@pytest.fixture
def images(tmp_path):
    return find_images(write_folder(tmp_path, {"train": {"cat": 5, "dog": 7}}) / "train")


# --- finding ------------------------------------------------------------------------------------------------------------


def test_classes_in_order_and_files_at_any_depth(tmp_path):
    write_folder(tmp_path, {"train": {"b": 2, "a": 1}})
    write_image(tmp_path / "train/a/deeper/x.JPEG", 9)
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/list.csv").write_text("beside the classes")
    found = find_images(tmp_path / "train")
    assert found.classes == ["a", "b"] and found.labels == [0, 0, 1, 1]
    assert [path.rsplit("/", 1)[1] for path in found.paths] == ["000.png", "x.JPEG", "000.png", "001.png"]


def test_val_serves_as_valid(tmp_path):
    write_folder(tmp_path, {"val": {"a": 1}})
    assert image_folder.split_folder(str(tmp_path), "valid") == tmp_path / "val"
    (tmp_path / "valid").mkdir()
    assert image_folder.split_folder(str(tmp_path), "valid") == tmp_path / "valid"


@pytest.mark.parametrize(
    ("counts", "extra", "words"),
    [
        ({"train": {}}, "train", "train must hold one folder for each class, but holds no folder"),
        ({"train": {"a": 0, "b": 0}}, None, "there is no image in any"),
        ({"train": {"a": 2, "b": 0, "c": 0}}, None, "must hold images, but b, c holds none"),
    ],
)
def test_nothing_to_train_on(tmp_path, counts, extra, words):
    write_folder(tmp_path, counts)
    if extra:
        (tmp_path / extra).mkdir()
    with pytest.raises(ValueError, match=words) as refusal:
        find_images(tmp_path / "train")
    assert str(tmp_path / "train") in str(refusal.value)


def test_a_folder_of_another_kind(tmp_path):
    write_folder(tmp_path, {"cat": {"x": 1}})
    with pytest.raises(ValueError, match="must hold a folder valid or val .* did you forget to point to the folder above"):
        image_folder.split_folder(str(tmp_path), "valid")


@pytest.mark.parametrize(("valid", "words"), [({"a", "b", "zebra"}, "zebra is not among them"), ({"a"}, "b is missing")])
def test_classes_must_be_equal_between_splits(tmp_path, valid, words):
    write_folder(tmp_path, {"valid": dict.fromkeys(sorted(valid), 1)})
    with pytest.raises(ValueError, match=words):
        image_folder.check_classes(["a", "b"], find_images(tmp_path / "valid"), tmp_path / "valid", "the training split")


@pytest.mark.parametrize(
    ("fraction", "kept"),
    [
        ("1", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("1/2", [1, 3, 5, 7]),
        ("1/3", [2, 5, 8]),
        ("1/4", [3, 7]),
        ("1/9", [8]),
        ("1/20", [8]),
    ],
)
def test_a_part_is_evenly_spaced_in_each_class(fraction, kept):
    images = Images(["a", "b"], [f"a{i}" for i in range(9)] + [f"b{i}" for i in range(9)], [0] * 9 + [1] * 9)
    part = image_folder.part_of(images, Fraction(fraction))
    assert part.paths == [f"{name}{i}" for name in "ab" for i in kept] and part.labels == [0] * len(kept) + [1] * len(kept)


# --- reading ------------------------------------------------------------------------------------------------------------


def colour_file(path, mode):
    """One green pixel 8 × 8 times, in a file of another mode."""
    green = Image.new("RGB", (8, 8), (0, 128, 0))
    if mode == "RGBA":
        green.putalpha(40)
    elif mode == "P":
        green = green.quantize(4)
    elif mode == "CMYK":
        green = green.convert("CMYK")
    green.save(path)
    return str(path)


@pytest.mark.parametrize(("mode", "name"), [("RGB", "x.png"), ("RGBA", "x.png"), ("P", "x.png"), ("CMYK", "x.tif")])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_colour_becomes_the_same(tmp_path, mode, name, channels):
    image = np.asarray(read_image(colour_file(tmp_path / name, mode), channels)).reshape(64, channels)
    expected = [0, 128, 0] if channels == 3 else [75]  # ITU-R 601: 0.587 · 128
    assert np.abs(image.astype(int) - expected).max() <= 1


def test_grey_becomes_three_equal_channels_and_sixteen_bits_become_eight(tmp_path):
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp >> 8).astype(np.uint8)).save(tmp_path / "grey.png")
    deep, grey = (np.asarray(read_image(str(tmp_path / name), 3)) for name in ("deep.png", "grey.png"))
    assert (deep == grey).all() and deep.shape == (8, 8, 3)
    assert (grey[..., 0] == ramp >> 8).all() and (grey[..., 0] == grey[..., 2]).all()


def damaged(folder):
    """A file that is no image, one that is cut off, one that is empty."""
    whole = write_image(folder / "whole.jpg", 1, (64, 64)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("this is no image")
    (folder / "empty.png").write_bytes(b"")
    return [str(folder / name) for name in ("cut.jpg", "text.png", "empty.png")]


def test_an_unreadable_image_is_named(tmp_path):
    for path in damaged(tmp_path):
        with pytest.raises(UnreadableImage, match="must be an image that can be read.*--skip-unreadable-images") as refusal:
            read_image(path, 3)
        assert str(refusal.value).startswith(path)


@pytest.mark.parametrize("keep", [False, True])
def test_unreadable_images_are_left_out_only_if_asked(tmp_path, caplog, keep):
    bad = damaged(tmp_path)
    good = [str(write_image(tmp_path / f"{i}.png", i)) for i in range(2)]
    images = Images(["a"], [good[0], *bad, good[1]], [0] * 5)
    with pytest.raises(UnreadableImage):
        one = dataset(images, keep=keep)
        one.collater([one[i] for i in range(5)])
    one = dataset(images, skip=True, keep=keep)
    with caplog.at_level(logging.WARNING):
        one = dataset(images, skip=True, keep=keep)
        batch = one.collater([one[i] for i in range(5)])
    assert batch["id"].tolist() == [0, 4] and batch["ntokens"] == 2
    assert all(path in caplog.text for path in bad)
    assert one.collater([one[1], one[2]]) == {}, "fairseq's sign for an empty batch"


@pytest.mark.parametrize("augmentation", ["small", "none"])
def test_an_image_smaller_than_the_crop_is_named(tmp_path, augmentation):
    path = str(write_image(tmp_path / "x.png", 1, (8, 6)))
    with pytest.raises(
        ValueError, match="x.png must be at least 8 × 8 pixels.*is 8 × 6 instead; did you forget --image-resize 8"
    ):
        dataset(Images(["a"], [path], [0]), augmentation)[0]
    larger = ImageFolder(Images(["a"], [path], [0]), pipeline(augmentation, resize=8), [0.5] * 3, [0.5] * 3)
    assert larger[0]["image"].shape == (3, 8, 8)


# --- what is random, and what is not ------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["imagenet", "small"])
def test_augmentation_depends_on_seed_epoch_and_index_alone(images, augmentation):
    one, other = dataset(images, augmentation), dataset(images, augmentation)
    torch.manual_seed(1)
    first = [one[i]["image"] for i in range(12)]
    torch.manual_seed(2)
    backwards = [other[i]["image"] for i in reversed(range(12))]
    assert all(map(torch.equal, first, reversed(backwards)))
    for change in (lambda: other.set_epoch(2), lambda: setattr(other, "seed", 2)):
        before = [other[i]["image"] for i in range(12)]
        change()
        assert sum(torch.equal(a, other[i]["image"]) for i, a in enumerate(before)) < 6


@pytest.mark.parametrize("augmentation", ["imagenet", "small"])
def test_no_global_generator_is_used(images, augmentation, monkeypatch):
    """fairseq loads data in a thread beside the training, which seeds the global generators in every update."""
    one = dataset(images, augmentation)
    expected, state = one[0]["image"], torch.get_rng_state()
    numpys = np.random.get_state()[1].copy()
    for name in ("rand", "randint", "empty", "randperm"):
        monkeypatch.setattr(torch, name, None)
    assert torch.equal(one[0]["image"], expected) and torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpys).all()


@pytest.mark.parametrize(("width", "height"), [(100, 80), (80, 100)])
def test_random_areas_are_those_of_the_paper(width, height):
    draw = np.random.default_rng(1)
    boxes = [random_area(width, height, draw) for _ in range(2000)]
    assert all(top >= 0 and left >= 0 and top + h <= height and left + w <= width for top, left, h, w in boxes)
    areas = [h * w / (width * height) for _, _, h, w in boxes]
    assert 0.07 < min(areas) < 0.1 and max(areas) > 0.9
    ratios = [w / h for _, _, h, w in boxes]
    assert 0.72 < min(ratios) < 0.78 and 1.28 < max(ratios) < 1.38


@pytest.mark.parametrize(("size", "box"), [((1000, 10), (0, 493, 10, 13)), ((10, 1000), (493, 0, 13, 10))])
def test_where_no_area_fits_it_is_the_middle(size, box):
    assert random_area(*size, np.random.default_rng(1)) == box


@pytest.mark.parametrize("augmentation", ["imagenet", "small", "none"])
def test_evaluation_is_the_same_in_every_epoch(images, augmentation):
    one = dataset(images, augmentation, train=False)
    first = one[3]["image"]
    one.set_epoch(7)
    assert torch.equal(one[3]["image"], first)


def test_workers_give_the_same_batches(images):
    def batches(workers):
        one = dataset(images)
        sampler = [list(range(i, i + 4)) for i in (0, 4, 8)]
        loader = torch.utils.data.DataLoader(one, batch_sampler=sampler, collate_fn=one.collater, num_workers=workers)
        return [batch["net_input"]["image"] for batch in loader]

    assert all(map(torch.equal, batches(0), batches(2)))


def test_the_order_is_drawn_for_each_epoch_and_validation_has_none(images):
    one = dataset(images)
    orders = []
    for one.seed, epoch in ((1, 1), (1, 1), (2, 1), (1, 2)):
        one.set_epoch(epoch)
        orders.append(one.ordered_indices().tolist())
    assert orders[0] == orders[1] and sorted(orders[0]) == list(range(12)) and not one.can_reuse_epoch_itr_across_epochs
    assert orders[0] != orders[2] != orders[3] != orders[0]
    valid = dataset(images, train=False)
    assert valid.ordered_indices().tolist() == list(range(12)) and valid.can_reuse_epoch_itr_across_epochs


def test_batches_lose_nothing_but_a_single_last_image_in_training(images):
    one, valid, indices = dataset(images), dataset(images, train=False), np.arange(12)
    assert [len(b) for b in one.batch_by_size(indices, max_sentences=5)] == [5, 5, 2]
    assert [len(b) for b in one.batch_by_size(indices, max_tokens=4, required_batch_size_multiple=8)] == [4, 4, 4]
    assert [len(b) for b in one.batch_by_size(indices[:11], max_sentences=5)] == [5, 5]
    assert [len(b) for b in valid.batch_by_size(indices[:11], max_sentences=5)] == [5, 5, 1]
    assert [len(b) for b in one.batch_by_size(indices[:3], max_sentences=1)] == [1, 1, 1]


# --- pixels -------------------------------------------------------------------------------------------------------------


def test_normalisation_is_that_of_the_training_images(images):
    mean, std = image_folder.measure(images, pipeline(), skip=False)
    one = dataset(images, "none", mean, std, train=False)
    pixels = one.collater([one[i] for i in range(12)])["net_input"]["image"]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=2e-3, rtol=0)


def test_measuring_takes_evenly_spaced_images_and_survives_one_colour(tmp_path):
    for i in range(10):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"{i}.png")
    images = Images(["a"], [str(tmp_path / f"{i}.png") for i in range(10)], [0] * 10)
    assert image_folder.measure(images, pipeline(channels=1), skip=False, limit=4)[0] == [round(45 / 255, 4)]  # 0, 30, 60, 90
    assert image_folder.measure(images, pipeline(channels=1), skip=False, limit=1)[1] == [round(1 / 255, 4)]


def test_nothing_to_measure(tmp_path):
    images = Images(["a"], damaged(tmp_path), [0] * 3)
    with pytest.raises(UnreadableImage):
        image_folder.measure(images, pipeline(), skip=False)
    with pytest.raises(ValueError, match="None of 3 images can be read, the first of them .*cut.jpg"):
        image_folder.measure(images, pipeline(), skip=True)


@pytest.mark.parametrize(
    ("augmentation", "train", "flips", "shifts"),
    [("small", True, True, True), ("none", True, False, False), ("imagenet", True, True, True), ("small", False, False, False)],
)
def test_what_each_augmentation_does(augmentation, train, flips, shifts):
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1)))
    steps, draw = pipeline(augmentation, 16, train=train, channels=1), np.random.default_rng(1)
    drawn = [np.asarray(steps.augment(steps.prepare(ramp, "x"), draw)).astype(int) for _ in range(60)]
    same = [(image == np.asarray(ramp)).all() for image in drawn]
    assert all(image.shape == (16, 16) for image in drawn)
    falling = [image[8, 4] > image[8, 11] for image in drawn]
    assert any(falling) == flips and (not all(same)) == shifts
    still = pipeline(augmentation, 16, train=train, channels=1, flip=False)
    assert not any(a[8, 4] > a[8, 11] for a in (np.asarray(still.augment(ramp, draw)).astype(int) for _ in range(60)))


def test_imagenets_evaluation_resizes_to_256_and_crops_224():
    steps = pipeline("imagenet", 224, train=False)
    prepared = steps.prepare(Image.new("RGB", (500, 400)), "x")
    assert prepared.size == (320, 256) and steps.augment(prepared, np.random.default_rng(1)).size == (224, 224)


def test_nothing_of_images_is_imported_for_those_who_translate():
    """By sources: a run costs four seconds, and `import torchvision` stands inside functions alone."""
    for path in (ROOT / "fairseq_codistill").glob("*.py"):
        top_level = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("import ", "from "))]
        assert not [line for line in top_level if "torchvision" in line or "PIL" in line], path
