import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy import stats
from skimage.color import deltaE_ciede2000, rgb2lab

from lit_defect.data.images import read_mask
from lit_defect.metrics.segmentation import compare_masks, count_masks, evaluate_masks
from lit_defect.metrics.uncertainty import sparsification
from lit_defect.reporting import segmentation_panels
from lit_defect.reporting.maps import overlay
from lit_defect.reporting.segmentation_figures import (
    gain_figure,
    iou_by_class_figure,
    sparsification_figure,
    sweep_figure,
)
from lit_defect.reporting.segmentation_panels import PanelRow, colour_mask, palette, panel_sheet, write_mask_png
from lit_defect.reporting.segmentation_tables import mask_markdown, mask_table
from lit_defect.reporting.sheets import Cell
from tests.test_reporting_figures import assert_inside, texts

SKY, YELLOW, VERMILION = (86, 180, 233), (240, 228, 66), (213, 94, 0)  # right, missed, false alarm
GREY = 100


def picture(side: int = 60) -> np.ndarray:
    return np.full((side, side, 3), GREY, dtype=np.uint8)


def box(top: int, left: int, height: int, width: int, side: int = 60, value: int = 1) -> np.ndarray:
    mask = np.zeros((side, side), dtype=np.int64)
    mask[top : top + height, left : left + width] = value
    return mask


def tinted(colour: tuple[int, ...], opacity: float = 0.8) -> tuple[int, ...]:
    """Painter's over, by hand."""
    return tuple(round((1 - opacity) * GREY + opacity * channel) for channel in colour)


def where(panel: np.ndarray, colour: tuple[int, ...]) -> np.ndarray:
    return (panel == np.array(colour)).all(axis=-1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `panel_sheet` hands to the sheet, before it becomes pixels."""
    calls: list[dict[str, Any]] = []
    whole = segmentation_panels.sheet

    def listen(cells: list[Cell], **arguments: Any) -> Image.Image:
        calls.append({"cells": cells, **arguments})
        return whole(cells, **arguments)

    monkeypatch.setattr(segmentation_panels, "sheet", listen)
    return calls


def caption(cell: Cell) -> str:
    return "".join(words.text for line in cell.caption for words in line)


# Panels


def test_two_classes_show_right_missed_and_false_pixels(drawn: list[dict[str, Any]]) -> None:
    truth, found = box(5, 5, 20, 20), box(15, 15, 30, 30)
    truth[40:, :12] = 255
    found[50:, :5] = 1  # in the void: counts for nothing
    sheet = panel_sheet([PanelRow(picture(), truth, found)], ["background", "defect"], title="t", size=60)
    (cell,) = drawn[0]["cells"]
    shown, marked, predicted = (np.asarray(panel) for panel in cell.panels)
    np.testing.assert_array_equal(shown, picture())
    np.testing.assert_array_equal(where(marked, tinted(SKY)), truth == 1)
    np.testing.assert_array_equal(where(predicted, tinted(SKY)), (truth == 1) & (found == 1))
    np.testing.assert_array_equal(where(predicted, tinted(YELLOW)), (truth == 1) & (found != 1))
    np.testing.assert_array_equal(where(predicted, tinted(VERMILION)), (truth == 0) & (found == 1))
    np.testing.assert_array_equal(where(predicted, (GREY,) * 3), (truth == 0) & (found == 0))
    assert sheet.width == max(420, 3 * 60 + 2 * 4) + 2 * 24


def test_a_defect_of_one_pixel_survives_the_reduction_and_has_a_ring(drawn: list[dict[str, Any]]) -> None:
    truth = box(333, 219, 1, 1, side=401)  # on no multiple of four
    big = np.zeros((401, 401), dtype=np.int64)
    big[100:300, 100:300] = 1
    row = PanelRow(picture(401), truth, np.zeros_like(truth), big, None, "a.png", 0.0, 0.0)
    panel_sheet([row], ["background", "defect"], title="t", size=100)
    _, marked, missed, refined = (np.asarray(panel) for panel in drawn[0]["cells"][0].panels)
    at = round(333 / 4.01 - 0.5), round(219 / 4.01 - 0.5)
    for panel, colour in ((marked, SKY), (missed, YELLOW)):
        assert list(zip(*np.nonzero(where(panel, tinted(colour))), strict=True)) == [at]
        ring = np.argwhere(where(panel, (255, 255, 255)))
        assert len(ring) > 20
        assert np.abs(ring - at).max() <= 6
    outside = np.argwhere(where(refined, (255, 255, 255)))  # the large false alarm needs no ring
    assert np.abs(outside - at).max() <= 6


def test_of_many_small_regions_those_of_the_truth_are_ringed(drawn: list[dict[str, Any]]) -> None:
    noise = np.zeros((300, 300), dtype=np.int64)
    noise[10::25, 10::25] = 1
    truth = box(151, 148, 3, 3, side=300)
    panel_sheet([PanelRow(picture(300), truth, noise)], ["background", "defect"], title="t", size=300)
    rings = np.argwhere(where(np.asarray(drawn[0]["cells"][0].panels[2]), (255, 255, 255)))
    assert len(rings) > 20
    assert np.abs(rings - (152, 149)).max() < 12


def test_several_classes_have_their_colours_and_hatching_where_wrong(drawn: list[dict[str, Any]]) -> None:
    truth = box(0, 0, 60, 20) + box(0, 20, 60, 20, value=2)
    found = truth.copy()
    found[:, 20:30] = 1
    truth[:10, 50:] = 255
    names = ["background", "a", "b", "c"]
    sheet = panel_sheet([PanelRow(picture(), truth, found)], names, title="t", size=60)
    _, marked, predicted = (np.asarray(panel) for panel in drawn[0]["cells"][0].panels)
    colours = [tinted(colour, 0.62) for colour in palette(4)]
    for value in (1, 2):
        np.testing.assert_array_equal(where(marked, colours[value]), truth == value)
    black = where(predicted, (0, 0, 0))
    assert not where(marked, (0, 0, 0)).any()
    assert not black[:, :20].any()
    assert not black[:, 30:].any()
    assert 0.3 < black[:, 20:30].mean() < 0.5  # two of five diagonals
    np.testing.assert_array_equal(where(predicted, colours[1])[:, 20:30], ~black[:, 20:30])
    assert not where(predicted, (GREY,) * 3)[:10, 50:].any()  # void
    key = np.asarray(sheet)[: sheet.height - 60 - 40]
    shown = [bool(where(key, colour).any()) for colour in palette(4)[1:]]
    assert shown == [True, True, False]  # no swatch for a class that does not occur


def test_wrong_pixels_are_hatched_white_on_dark_ground(drawn: list[dict[str, Any]]) -> None:
    dark = np.full((60, 60, 3), 10, dtype=np.uint8)
    truth = box(10, 10, 30, 30, value=2)
    panel_sheet([PanelRow(dark, truth, np.zeros_like(truth))], ["background", "a", "b"], title="t", size=60)
    white = where(np.asarray(drawn[0]["cells"][0].panels[2]), (255, 255, 255))
    assert 0.3 < white[truth == 2].mean() < 0.5
    assert not white[truth == 0].any()


def test_columns_captions_and_one_scale_of_uncertainty(drawn: list[dict[str, Any]]) -> None:
    rng, truth = np.random.default_rng(0), box(10, 10, 20, 20)
    unsure = [(scale * rng.random((60, 60))).astype(np.float32) for scale in (1, 0.1)]
    rows = [
        PanelRow(picture(), truth, truth, truth, unsure[0], "up.png", 0.412, 0.630),
        PanelRow(picture(), truth, truth, truth, unsure[1], "down.png", 0.5, 0.25),
        PanelRow(picture(), truth, truth, None, None, "alone.png", 0.5),
        PanelRow(picture(), 0 * truth, truth, truth, None, "none.png"),
    ]
    sheet = panel_sheet(rows, ["background", "defect"], title="t", size=120)
    assert sheet.width == 5 * 120 + 4 * 4 + 2 * 24
    cells = drawn[0]["cells"]
    assert [len(cell.panels) for cell in cells] == [5] * 4
    assert (cells[2].panels[3:], cells[3].panels[4]) == (["not refined", "none"], "none")
    assert caption(cells[0]) == "IoU 41.2 % → 63.0 %, +21.8   up.png"
    assert caption(cells[1]) == "IoU 50.0 % → 25.0 %, -25.0   down.png"
    assert caption(cells[2]) == "IoU 50.0 %   alone.png"
    assert caption(cells[3]) == "no IoU: the class is not in the truth   none.png"
    scale = 0.0, float(np.quantile(np.concatenate(unsure), 0.995))
    for cell, values in zip(cells[:2], unsure, strict=True):
        expected = overlay(np.full((120, 120, 3), GREY, dtype=np.uint8), values, scale=scale)
        np.testing.assert_array_equal(cell.panels[4], expected)


def test_sheet_without_rows_and_masks_of_another_size() -> None:
    assert panel_sheet([], ["background", "defect"], title="t").width > 400
    with pytest.raises(ValueError, match=r"a\.png: mask \(60, 60\) and picture \(50, 50\)"):
        panel_sheet([PanelRow(picture(50), box(0, 0, 1, 1), box(0, 0, 1, 1), name="a.png")], ["a", "b"], title="t")


def test_void_alone_and_a_constant_uncertainty(drawn: list[dict[str, Any]]) -> None:
    void, nothing = np.full((60, 60), 255), np.zeros((60, 60), dtype=np.float32)
    row = PanelRow(picture(), void, 0 * void, 0 * void, nothing, "v.png")
    panel_sheet([row], ["background", "defect"], title="t", size=60)
    panels = [np.asarray(panel) for panel in drawn[0]["cells"][0].panels]
    np.testing.assert_array_equal(panels[1], panels[2])
    assert not where(panels[1], (GREY,) * 3).any()


# Colours and files


MACHADO = (  # IEEE TVCG 2009, severity 1.0: none, protanopia, deuteranopia
    np.eye(3),
    np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
)


@pytest.mark.parametrize("matrix", MACHADO, ids=["trichromat", "protanope", "deuteranope"])
@pytest.mark.parametrize(("classes", "least"), [(8, 11), (21, 8)])
def test_classes_are_told_apart_by_all_readers(matrix: np.ndarray, classes: int, least: float) -> None:
    share = np.array(palette(classes)) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ matrix.T, 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    distance = deltaE_ciede2000(lab[:, None], lab[None])
    assert distance[np.triu_indices(classes, 1)].min() > least


def test_palette_of_any_length() -> None:
    assert palette(1) == [(0, 0, 0)]
    assert palette(2)[:2] == palette(30)[:2]
    many = palette(120)
    assert len(many) == len(set(many)) == 120
    assert all(0 <= channel <= 255 and isinstance(channel, int) for colour in many for channel in colour)


def test_colour_mask() -> None:
    mask = np.array([[0, 1, 2], [2, 255, 0]])
    colours = [*palette(3), (224, 224, 192)]
    expected = [[colours[0], colours[1], colours[2]], [colours[2], colours[3], colours[0]]]
    np.testing.assert_array_equal(colour_mask(mask, 3), expected)
    assert colour_mask(mask, 3).dtype == np.uint8


def test_mask_file_holds_indices_under_vocs_colours(tmp_path: Path) -> None:
    mask = np.arange(256, dtype=np.int64).reshape(8, 32)
    path = write_mask_png(tmp_path / "new" / "test" / "a.jpg.png", mask)
    assert [file.name for file in path.parent.iterdir()] == ["a.jpg.png"]
    with Image.open(path) as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), mask)
        colours = np.asarray(image.convert("RGB")).reshape(256, 3)
    np.testing.assert_array_equal(read_mask(path), mask)
    published = {  # of VOC's development kit
        0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
        12: (64, 0, 128), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192),
    }  # fmt: skip
    assert {value: tuple(colours[value].tolist()) for value in published} == published
    assert len(np.unique(colours, axis=0)) == 256


@pytest.mark.parametrize("mask", [np.zeros((2, 2)), np.zeros((1, 2, 2), int), np.array([[256]]), np.array([[-1]])])
def test_masks_of_another_kind_are_refused(tmp_path: Path, mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="class ids"):
        write_mask_png(tmp_path / "a.png", mask)
    with pytest.raises(ValueError, match="class ids"):
        colour_mask(mask, 2)
    assert not list(tmp_path.iterdir())


# Figures


def points(figure: Any, marker: str = ".") -> np.ndarray:
    lines = [line for line in figure.axes[0].lines if line.get_marker() == marker]
    return np.concatenate([np.column_stack(line.get_data()) for line in lines])


def test_gain_figure_has_counts_means_and_all_points() -> None:
    before = np.array([0.01, 0.04, 0.09, 0.31, 0.32, 0.33, 1.0, np.nan, 0.5])
    after = np.array([0.31, 0.24, 0.19, 0.21, 0.32, 0.83, 1.0, 0.5, np.nan])
    figure = gain_figure(before, after)
    assert_inside(figure)
    assert "4 images better, 1 worse, 2 equal; mean gain +14.3 points of IoU" in texts(figure)
    expected = np.column_stack([before, after - before])[:7]
    np.testing.assert_allclose(sorted(points(figure).tolist()), sorted(expected.tolist()))
    levels = [line.get_data() for line in figure.axes[0].lines if line.get_linewidth() == 2.0]
    assert [(x[0], x[1]) for x, _ in levels] == [(0, pytest.approx(0.1)), (pytest.approx(0.3), pytest.approx(0.4))]
    means = [float(np.mean([0.3, 0.2, 0.1])), float(np.mean([-0.1, 0.0, 0.5]))]
    np.testing.assert_allclose([y[0] for _, y in levels], means)
    limits = stats.ttest_1samp([0.3, 0.2, 0.1], 0).confidence_interval()
    upright = [y for x, y in (line.get_data() for line in figure.axes[0].lines) if len(x) == 2 and x[0] == x[1] == 0.05]
    np.testing.assert_allclose(upright, [limits])


def test_gain_figure_counts_each_part_once() -> None:
    before, gain = np.full(7, 0.55), np.array([0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.5])
    figure = gain_figure(before, before + gain, groups=["a", "a", "a", "a", "b", "c", "c"])
    expected = stats.ttest_1samp([0.1, 0.2, 0.4], 0).confidence_interval()
    found = [line.get_ydata() for line in figure.axes[0].lines if line.get_zorder() == 4]
    np.testing.assert_allclose(found, [[0.7 / 3, 0.7 / 3], expected])
    assert "7 images better, 0 worse, 0 equal; mean gain +20.0 points of IoU" in texts(figure)


def test_gain_figure_by_type() -> None:
    rng = np.random.default_rng(0)
    before, types = rng.random(120), [f"kind {i % 10 if i < 100 else 0}" for i in range(120)]
    figure = gain_figure(before, np.clip(before + 0.1, 0, 1), types=types, label="one step")
    assert_inside(figure)
    found = texts(figure)
    assert "kind 0 (30)" in found
    assert "others (20)" in found  # the ninth and tenth
    assert "gain by one step, points of IoU" in found
    assert len(points(figure)) == 120


def test_gain_figure_without_images_and_with_wrong_shapes() -> None:
    assert "No image has an IoU before and after" in texts(gain_figure([np.nan], [0.5]))
    for arguments in ([[0.1, 0.2], [0.1]], [[[0.1]], [[0.1]]]):
        with pytest.raises(ValueError, match="shape"):
            gain_figure(*arguments)
    with pytest.raises(ValueError, match="one type, group for each"):
        gain_figure([0.1, 0.2], [0.1, 0.2], types=["a"])


def entry(value: float | None, n: int = 7) -> dict[str, Any]:
    known = value is not None
    return {"value": value, "low": value - 0.1 if known else None, "high": value + 0.1 if known else None, "n": n}


def test_iou_by_class_figure_puts_the_methods_beside_each_other() -> None:
    methods = {
        "stage1": {"cat": entry(0.6), "bird": entry(0.2), "dog": entry(None, 0), "cow": entry(0.7)},
        "refined": {"cat": entry(0.5), "bird": entry(0.4), "dog": entry(0.3, 0), "cow": entry(0.8)},
    }
    figure = iou_by_class_figure(methods, overall={"stage1": entry(0.5, 21), "refined": entry(0.56, 21)})
    assert_inside(figure)
    axes = figure.axes[0]
    labels = ["bird  (7)", "cat  (7)", "cow  (7)", "dog", "all  (21)"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == labels
    dots = points(figure, "o")
    dots = dots[np.lexsort(dots.T)]  # from top to bottom
    np.testing.assert_allclose(dots[:, 0], [0.2, 0.4, 0.6, 0.5, 0.7, 0.8, 0.3, 0.5, 0.56])
    np.testing.assert_allclose(dots[:, 1], [-0.2, 0.2, 0.8, 1.2, 1.8, 2.2, 3.2, 3.8, 4.2])
    spans = {tuple(np.round(line.get_xdata(), 6)) for line in axes.lines if len(line.get_xdata()) == 2}
    assert (0.1, 0.3) in spans
    assert (0.46, 0.66) in spans
    title = "Refined is above stage 1 in 2 of 3 classes;\nover all 50.0 % become 56.0 %"
    assert title in texts(figure)


def test_iou_by_class_figure_of_one_method() -> None:
    figure = iou_by_class_figure({"segmenter": {"crack": entry(0.3), "hole": entry(0.6)}}, label="type")
    assert_inside(figure)
    assert "Hardest type: crack, 30.0 %; easiest: hole, 60.0 %" in texts(figure)
    assert "IoU by class" in texts(iou_by_class_figure({"segmenter": {"defect": entry(None)}}))
    with pytest.raises(ValueError, match="at least one method"):
        iou_by_class_figure({})


def test_sparsification_figure_measures_the_area() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random((50, 50)) < 0.1
    for uncertainty, share in ((wrong.astype(float), "100 %"), (rng.random((50, 50)), None), (-1.0 * wrong, None)):
        found = sparsification(uncertainty, wrong, np.ones((50, 50), dtype=bool))
        figure = sparsification_figure(found.error, found.oracle, found.random, "variance", shares=found.share)
        assert_inside(figure)
        (title,) = [text for text in texts(figure) if "AUSE" in text]
        assert f"AUSE {found.ause:.4f}\n" in title
        achieved = float(title.split("\n")[1].split(" %")[0])
        if share:
            assert achieved == 100
        else:
            assert achieved < 15  # no better than chance, or worse
        evenly = sparsification_figure(found.error, found.oracle, found.random, "variance")
        assert title in texts(evenly)
    for curve, oracle in (([0.1], [0.1]), ([0.1, 0.2], [0.1])):
        with pytest.raises(ValueError, match="two curves"):
            sparsification_figure(curve, oracle, 0.1, "variance")


def test_sweep_figure_names_the_highest() -> None:
    series = {
        "strength 0.25": [(10.0, entry(0.62)), (1.0, entry(0.5)), (50.0, entry(0.6))],
        "strength 0.5": [(1.0, entry(0.55)), (10.0, entry(None))],
    }
    figure = sweep_figure(series, x_label="network calls", baselines={"stage 1": 0.48})
    assert_inside(figure)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "10", "50"]
    curves = [line for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(curves[0].get_xdata(), [1, 10, 50])
    np.testing.assert_allclose(curves[0].get_ydata(), [0.5, 0.62, 0.6])
    np.testing.assert_allclose(curves[1].get_xdata(), [1])
    found = texts(figure)
    assert "Highest IoU per image: 62.0 % at network calls 10 (strength 0.25)" in found
    assert "stage 1 48.0 %" in found
    assert sweep_figure({"a": [(0.25, entry(0.5)), (0.5, entry(0.6))]}, x_label="x").axes[0].get_xscale() == "linear"
    with pytest.raises(ValueError, match="no point"):
        sweep_figure({"a": [(1.0, entry(None))]}, x_label="x")


# Tables


def refiner_result(n: int = 12) -> dict[str, Any]:
    """Metrics of a refiner as its task writes them, from real counts."""
    rng = np.random.default_rng(0)
    truth = (rng.random((n, 16, 16)) < 0.3).astype(int)
    truth[-2:] = 0  # images without the class
    names, types = ["background", "defect"], ["crack", "hole"] * (n // 2)
    flips = {"stage1": 0.2, "sampled": 0.3, "one_step": 0.12, "refined": 0.1}
    counts = {
        name: count_masks(np.where(rng.random(truth.shape) < share, 1 - truth, truth), truth, 2)
        for name, share in flips.items()
    }
    return {
        "task": "DDPMRefiner", "n": n, "class_names": names, "foreground": ["defect"],
        "methods": {name: evaluate_masks(c, names, types=types, resamples=50) for name, c in counts.items()},
        "gain": {
            name: compare_masks(counts["stage1"], c, names, types=types, resamples=50)
            for name, c in counts.items() if name != "stage1"
        },
        "uncertainty": {"of": "variance of 4 samples", "auroc": 0.912, "found": 0.6, "ause": 0.01},
        "network_calls": 500, "ms_per_image": {"stage1": 12.3, "refined": 4321.0},
        "parameters": {"stage1": 24_400_000, "refiner": 35_700_000},
    }  # fmt: skip


def rendered(result: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(mask_table(result, "test: 12 pictures"))
    return console.export_text()


def test_table_fits_the_terminal_and_holds_the_figures() -> None:
    result = refiner_result()
    text = rendered(result)
    assert "…" not in text
    lines = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in text.splitlines() if "│" in line}
    assert list(lines) == ["stage 1", "sampled", "one step", "refined"]
    for name, label in (("stage1", "stage 1"), ("refined", "refined")):
        figures, cells = result["methods"][name], [cell.strip() for cell in lines[label]]
        iou = figures["iou"]
        assert cells[0] == f"{100 * iou['value']:.1f} ({100 * iou['low']:.0f} to {100 * iou['high']:.0f})"
        assert cells[1] == f"{100 * figures['pooled_iou']['value']:.1f}"
        assert cells[2] == f"{100 * figures['boundary_iou']['value']:.1f}"
        assert cells[3] == f"{figures['hd95']['value']:.1f}"
    gain = result["gain"]["refined"]["iou"]  # above ten points
    assert lines["refined"][4].strip() == (
        f"{100 * gain['value']:+.1f} ({100 * gain['low']:+.0f} to {100 * gain['high']:+.0f})"
    )
    assert lines["stage 1"][4].strip() == ""
    flat = " ".join(text.split())
    assert "12 images, IoU defined on 10" in flat
    assert "refined: 10 better, 0 worse, 0 equal, Wilcoxon p 0.002" in flat  # 2 / 2**10
    assert "false alarms on 2 images without the class: stage 1 100 %" in flat
    assert "AUROC 0.912 for wrong pixels, 60 % of them among the 10 % least sure" in flat
    assert "ms an image: stage 1 12.3, refined 4321; calls of the refiner's network: 500" in flat
    assert "parameters: stage 1 24.4 M, refiner 35.7 M" in flat


def test_markdown_has_every_interval_and_the_cost() -> None:
    result = refiner_result()
    head, _, *body = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in mask_markdown(result).splitlines()
    )
    lines = {line[0]: dict(zip(head, line, strict=True)) for line in body}
    refined, iou = lines["refined"], result["methods"]["refined"]["iou"]
    assert body[3][2] == f"{100 * iou['low']:.1f} to {100 * iou['high']:.1f}"
    assert (refined["network calls"], refined["ms an image"]) == ("500", "4321")
    assert (refined["Wilcoxon p"], refined["better / worse / equal"]) == ("0.002", "10 / 0 / 0")
    assert lines["stage 1"]["gain in IoU"] == lines["stage 1"]["network calls"] == ""


def test_tables_of_a_segmenter_and_of_undefined_figures() -> None:
    names = ["pore", "quartz", "clay"]
    truth = np.zeros((2, 8, 8), dtype=int)
    truth[:, :, 4:] = 1
    result = {
        "task": "Segmenter", "network_calls": 1, "parameters": {"segmenter": 1_000_000},
        "methods": {"segmenter": evaluate_masks(count_masks(0 * truth, truth, 3), names, resamples=20)},
    }  # fmt: skip
    text = rendered(result)
    assert "gain" not in text
    assert "not found at all (no HD95): 2 of the images' classes" in " ".join(text.split())
    assert "IoU by class, segmenter: quartz 0.0, pore 50.0" in " ".join(text.split())
    assert "| segmenter | 25.0 |" in mask_markdown(result)
    assert "Wilcoxon" not in mask_markdown(result)
    void = np.full((1, 4, 4), 255)
    nothing = {"methods": {"segmenter": evaluate_masks(count_masks(0 * void, void, 3), names, resamples=20)}}
    assert mask_markdown(nothing).splitlines()[2].split("|")[2].strip() == "-"
    assert "IoU defined on 0" in rendered(nothing)
    few = refiner_result()
    few["gain"] = {"refined": few["gain"]["refined"] | {"iou": {"value": 0.047, "low": -0.031, "high": 0.062}}}
    assert "+4.7 (-3.1 to +6.2)" in rendered(few)
