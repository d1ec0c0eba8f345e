"""The figure of codistill-report: printed sizes, formats, scales, and what curves are drawn against."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.figure
import pytest
from test_report import FRESH, config_line, json_line, loaded_line, make_run, root, run_main  # noqa: F401  (a fixture)

from fairseq_codistill.report import curves, figure, files
from fairseq_codistill.report.log import TrainLog
from fairseq_codistill.report.table import Report

REAL = Path(__file__).parent / "data" / "report"


@pytest.fixture(scope="module")
def methods():
    return files.load([str(REAL / name) for name in ("ce", "ls", "codist")]).methods


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures of which files were made."""
    seen = []
    savefig = matplotlib.figure.Figure.savefig

    def keep(self, *arguments, **named):
        seen.append(self)
        savefig(self, *arguments, **named)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return seen


def texts(drawing):
    return [text for text in drawing.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("width", [3.3, 6.8])
def test_every_label_is_legible_and_inside_at_the_printed_size(methods, tmp_path, drawn, width):
    figure.draw(Report("title", methods, [], []), [tmp_path / "a.png"], figure.Style(width))
    (drawing,) = drawn
    assert drawing.get_figwidth() == width and drawing.get_figheight() <= 0.8 * width + 0.5
    assert all(text.get_fontsize() >= 7 for text in texts(drawing))
    drawn_in = drawing.get_tightbbox()  # inches
    assert drawn_in.x0 >= -0.01 and drawn_in.x1 <= width + 0.01 and drawn_in.y0 >= -0.01
    assert drawn_in.y1 <= drawing.get_figheight() + 0.01
    assert len(drawing.axes) == (1 if width < 5 else 5)
    assert all(axes.get_xlabel() == "updates" for axes in drawing.axes)
    assert drawing.axes[0].get_title(loc="left") == "valid NLL (bits per token)"


def test_pdf_and_svg_are_vectors_with_true_type_and_always_the_same(methods, tmp_path):
    for name in ("a", "b"):
        paths = [tmp_path / f"{name}.{kind}" for kind in figure.FORMATS]
        figure.draw(Report("title", methods, [], []), paths, figure.Style(3.3))
    for kind in figure.FORMATS:
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes(), kind
    pdf, svg = (tmp_path / "a.pdf").read_bytes(), (tmp_path / "a.svg").read_text()
    assert pdf.startswith(b"%PDF") and b"/Type3" not in pdf and b"/FontFile2" in pdf
    assert "<image" not in svg and re.search(r'width="237\.6pt"', svg), "3.3 inches"


def test_formats_are_beside_the_png(root, capsys):  # noqa: F811
    status, out, _ = run_main(capsys, root, "--format", "pdf", "--format", "svg", "--width", "3.3")
    assert status == 0 and "table.md, results.json, curves.png, curves.pdf, curves.svg" in out
    assert {path.name for path in (root / "report").iterdir()} >= {"curves.png", "curves.pdf", "curves.svg"}


def test_scales(methods, tmp_path, drawn):
    figure.draw(Report("", methods, [], []), [tmp_path / "a.png"], figure.Style(log_x=True, log_y=True))
    figure.draw(Report("", methods, [], []), [tmp_path / "a.png"], figure.Style())
    logarithmic, linear = drawn
    assert all(axes.get_xscale() == "log" for axes in logarithmic.axes)
    assert {axes.get_title(loc="left").split(" (")[0] for axes in logarithmic.axes if axes.get_yscale() == "log"} == {
        "valid NLL", "train NLL",
    }  # fmt: skip
    assert all((axes.get_xscale(), axes.get_yscale()) == ("linear", "linear") for axes in linear.axes)
    for drawing in drawn:
        for axes in drawing.axes:
            low, high = axes.get_ylim()
            assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2, "an axis has numbers"


def write_log(folder, sizes, walls, valid, every=100):
    """A log whose updates n·`every` have `sizes` samples in the mean, and end after `walls` seconds."""
    lines = [config_line(), FRESH]
    for n, (size, wall, nll) in enumerate(zip(sizes, walls, valid), start=1):
        lines.append(json_line("train_inner", every * n, loss=nll, bsz=size, wpb=10 * size, wall=wall))
        lines.append(json_line("valid", every * n, loss=nll))
    folder.mkdir(parents=True)
    (folder / "train.log").write_text("".join(lines))


def test_samples_and_seconds_of_an_update(tmp_path):
    write_log(tmp_path / "a", [8, 10, 12], [5, 11, 18], [4.0, 3.5, 3.2])
    log = files.load_log(tmp_path / "a/train.log")
    assert log.samples() == [(100, 800), (200, 1800), (300, 3000)]
    assert sorted(log.clock.items()) == [(100, 5), (200, 11), (300, 18)]
    assert curves.along(log.valid_nll(), log.samples()) == [(800, 4.0), (1800, 3.5), (3000, 3.2)]
    # Between two lines, and after the last one at the pace of the last.
    assert curves.along([(50, 1.0), (250, 2.0), (350, 3.0)], log.samples()) == [(400, 1.0), (2400, 2.0), (3600, 3.0)]
    assert curves.along([(50, 1.0)], []) == []


def test_seconds_go_on_after_a_restart():
    lines = [config_line(), FRESH]
    lines += [json_line("train_inner", 100, loss=4, wall=50), json_line("train_inner", 200, loss=4, wall=90)]
    lines += [config_line(), loaded_line(100), json_line("train_inner", 150, loss=3, wall=70)]
    assert TrainLog.read(lines).clock == {100: 50, 150: 160}, "90 s of the first process, all of them spent; 200 is dropped"


def test_seeds_that_took_unequally_long_are_one_curve(tmp_path, drawn):
    """The mean is over equal updates, at their mean time: neither is cut where the faster seed ends."""
    write_log(tmp_path / "a/seed1", [8, 8, 8], [60, 120, 180], [4.0, 3.0, 2.0])
    write_log(tmp_path / "a/seed2", [8, 8, 8], [600, 1200, 1800], [4.2, 3.2, 2.2])
    found = files.load([str(tmp_path / "a")]).methods
    figure.draw(Report("", found, [], []), [tmp_path / "a.png"], figure.Style(against="seconds"))
    axes = drawn[0].axes[0]
    mean = max(axes.lines, key=lambda line: line.get_linewidth())
    assert axes.get_xlabel() == "training time (min)"
    assert list(mean.get_xdata()) == pytest.approx([5.5, 11, 16.5]) and list(mean.get_ydata()) == pytest.approx([4.1, 3.1, 2.1])


def test_a_sample_with_one_label_is_no_token(tmp_path, drawn):
    write_log(tmp_path / "a", [8, 8, 8], [1, 2, 3], [4.0, 3.0, 2.0])
    log = tmp_path / "a/train.log"
    log.write_text(log.read_text().replace('"wpb": "80"', '"wpb": "8"'))
    figure.draw(Report("", files.load([str(tmp_path / "a")]).methods, [], []), [tmp_path / "a.png"], figure.Style())
    assert drawn[0].axes[0].get_title(loc="left") == "valid NLL (bits per sample)"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--width", "1"], "--width must be from 2 to 20 inches, but is 1."),
        (["--against", "samples"], "--against samples needs 'bsz' in the lines of training, but no log has it."),
    ],
)
def test_bad_options_are_one_sentence(root, capsys, options, sentence):  # noqa: F811
    status, out, error = run_main(capsys, root, *options)
    assert status == 2 and not out and sentence in error and error.count("\n") == 1


def test_no_title(tmp_path, capsys, drawn):
    make_run(tmp_path / "a", [[4.0, 3.0]])
    assert run_main(capsys, tmp_path / "a", "--title", "")[0] == 0
    assert drawn[0].get_suptitle() == ""
