"""The benchmark of loading, on a few images."""

import json
import sys

import pytest

from benchmarks.data import image_loading


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["image_loading.py", *map(str, words)])
    return image_loading.main()


def test_each_part_is_measured(tmp_path, monkeypatch, capsys):
    kind = image_loading.Kind("small", 32, 32, ".png", "small", 32, "resnet8", 64, 32)
    monkeypatch.setattr(image_loading, "KINDS", (kind,))
    words = [
        "--out",
        tmp_path / "work",
        "--results",
        tmp_path / "results",
        "--seconds",
        0.2,
        "--kinds",
        "small",
        "--workers",
        0,
        1,
    ]
    assert run(monkeypatch, *words) == 0
    rows = json.loads((tmp_path / "results/results.json").read_text())["rows"]
    assert [(row["what"], row["workers"]) for row in rows] == [
        ("resnet8 alone", None), ("loader alone", 0), ("together", 0), ("loader alone", 1), ("together", 1),
    ]  # fmt: skip
    assert all(row["images_per_second"] > 0 for row in rows)
    assert (tmp_path / "results/results.txt").read_text() == capsys.readouterr().out


def test_its_photographs_are_as_large_as_photographs(tmp_path):
    image_loading.write_images(tmp_path, image_loading.KINDS[0]._replace(images=2))
    sizes = [path.stat().st_size for path in tmp_path.rglob("*.jpg")]
    assert len(sizes) == 2 and all(60_000 < size < 200_000 for size in sizes)


def test_images_per_second_counts_what_fits_into_the_time(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(image_loading.time, "perf_counter", lambda: next(clock))
    # The clock moves a second with each look at it: two steps fit into 2.5 s, and it is 4 when all is counted.
    assert image_loading.images_per_second(lambda: 12, 2.5) == 24 / 4


def test_a_folder_that_is_there_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--out", tmp_path)
    assert ended.value.code == 2 and "must be a new folder" in capsys.readouterr().err
