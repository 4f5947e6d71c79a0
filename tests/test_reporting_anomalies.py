import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lit_defect.errors import UserError
from lit_defect.reporting import anomalies, maps
from lit_defect.reporting.anomalies import AnomalyTile, PseudoTile, anomaly_gallery, choose, pseudo_anomaly_sheet
from lit_defect.reporting.anomaly_figures import auroc_by_type_figure, discard_figure, score_histogram_figure
from lit_defect.reporting.maps import CONTOUR, LEVELS, colour_scale, outline, overlay, read_map, write_map
from tests.test_reporting_figures import assert_inside, texts

GREEN, ORANGE = (0, 229, 143), (213, 94, 0)


def random_map(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2, 3, (height, width)).astype(np.float32)


def count(image: Image.Image | np.ndarray, colour: tuple[int, ...]) -> int:
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


# Files of maps


def test_npy_map_keeps_every_bit(tmp_path: Path) -> None:
    scores = random_map()
    scores[0, :3] = -1e-30, 3e30, np.inf
    assert write_map(tmp_path / "new" / "a.npy", scores) == 0
    read = np.load(tmp_path / "new" / "a.npy")
    assert read.dtype == np.float32
    assert read.tobytes() == scores.tobytes() == read_map(tmp_path / "new" / "a.npy").tobytes()


@pytest.mark.parametrize("full_scale", [1e-6, 6.5, 12345.0])
def test_tiff_map_holds_the_formulas_levels_and_gives_the_scores_back(tmp_path: Path, full_scale: float) -> None:
    scores = random_map() / 30 * full_scale
    scores[0, :4] = -full_scale / 10, 2 * full_scale, np.inf, full_scale
    scores[1, :2] = 0.0, full_scale * 0.25
    path = tmp_path / "a.TIFF"
    beyond = int(((scores < 0) | (scores.astype(float) > full_scale)).sum())
    assert write_map(path, scores, full_scale=full_scale) == beyond >= 3
    with Image.open(path) as image:
        levels, description = np.asarray(image), json.loads(image.tag_v2[270])
    assert levels.dtype == np.uint16
    expected = np.round(np.clip(scores.astype(float) / full_scale, 0, 1) * 65535)
    np.testing.assert_array_equal(levels, expected)
    assert levels[0, :4].tolist() == [0, 65535, 65535, 65535]
    assert description == {
        "kind": "lit_defect score map", "full_scale": full_scale, "levels": LEVELS, "saturated": beyond,
    }  # fmt: skip
    read = read_map(path)
    assert read.dtype == np.float32
    tolerance = full_scale / LEVELS / 2 + full_scale * 2**-23
    assert np.abs(read - np.clip(scores, 0, full_scale)).max() <= tolerance


@pytest.mark.parametrize("name", ["a.npy", "a.tif"])
def test_failed_map_leaves_the_older_file_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    write_map(path, random_map(), full_scale=30)
    before = path.read_bytes()

    def half(file: object, *_: object, **__: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(maps.np, "save", half)
    monkeypatch.setattr(Image.Image, "save", lambda self, file, **_: half(file))
    with pytest.raises(OSError, match="disk full"):
        write_map(path, random_map(seed=1), full_scale=30)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_maps_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    scores = random_map()
    with pytest.raises(ValueError, match="full_scale"):
        write_map(tmp_path / "a.tif", scores)
    for scale in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="white cannot be"):
            write_map(tmp_path / "a.tif", scores, full_scale=scale)
    with pytest.raises(ValueError, match=r"\.npy, \.tif or \.tiff"):
        write_map(tmp_path / "a.png", scores, full_scale=1)
    for shape in ((3, 4, 1), (0, 4)):
        with pytest.raises(ValueError, match=r"\(H, W\)"):
            write_map(tmp_path / "a.npy", np.zeros(shape))
    scores[3, 3] = np.nan
    with pytest.raises(UserError, match=r"a\.npy.*nan"):
        write_map(tmp_path / "a.npy", scores)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_maps_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_map(tmp_path / "none.npy")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "grey.tif")
    np.save(tmp_path / "double.npy", np.zeros((4, 4)))
    np.save(tmp_path / "cube.npy", np.zeros((4, 4, 4), np.float32))
    np.save(tmp_path / "pickle.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "text.npy").write_text("text")
    (tmp_path / "text.tif").write_text("text")
    (tmp_path / "empty.npy").touch()
    write_map(tmp_path / "whole.tif", random_map(), full_scale=1)
    (tmp_path / "cut.tif").write_bytes((tmp_path / "whole.tif").read_bytes()[:300])
    for name in ("grey.tif", "double.npy", "cube.npy", "pickle.npy", "text.npy", "text.tif", "empty.npy", "cut.tif"):
        with pytest.raises(UserError, match=f"{name} is no score map"):
            read_map(tmp_path / name)


# Maps over pictures


def test_colours_begin_at_the_typical_pixel_and_end_below_a_stray_one() -> None:
    quiet, loud = np.full((50, 50), 2.0), np.full((50, 50), 3.0)
    loud[:5, :5] = 9.0
    loud[0, 0] = 1e6
    quiet[0, 0] = np.nan
    low, high = colour_scale([quiet, loud, np.full((2, 2), np.inf)])
    assert (low, high) == (2.5, 9.0)
    assert colour_scale([]) == (0.0, 1.0)
    low, high = colour_scale([np.full((4, 4), 7.0)])
    assert low == 7
    assert high > low


def test_overlay_is_grey_where_cold_and_the_same_colour_for_the_same_score() -> None:
    picture = np.full((40, 60, 3), 100, np.uint8)
    one, other = np.full((40, 60), -5.0), np.full((40, 60), -5.0)
    one[10:20, 10:20] = 3.0
    other[10:20, 10:20], other[30:, 50:] = 3.0, 50.0
    drawn = [overlay(picture, scores, scale=(-5.0, 5.0)) for scores in (one, other)]
    assert (drawn[0][30:] == 100).all()
    np.testing.assert_array_equal(drawn[0][12:18, 12:18], drawn[1][12:18, 12:18])
    assert np.ptp(drawn[0][15, 15]) > 50
    np.testing.assert_array_equal(overlay(picture, other)[:8], overlay(picture, other, scale=colour_scale([other]))[:8])


def test_overlay_encloses_what_reaches_the_threshold() -> None:
    picture = np.full((80, 80, 3), 30, np.uint8)
    scores = np.zeros((80, 80), np.float32)
    scores[20:40, 30:50] = 2.0
    drawn = overlay(picture, scores, scale=(0, 10), threshold=2.0, line=1)
    line = (drawn == rgb(CONTOUR)).all(axis=2)
    expected = np.zeros((80, 80), bool)
    expected[19:41, 29:51] = True
    expected[20:40, 30:50] = False
    np.testing.assert_array_equal(line, expected)
    assert not count(overlay(picture, scores, scale=(0, 10), threshold=2.1), rgb(CONTOUR))
    assert count(overlay(picture, scores[::4, ::4], scale=(0, 10), threshold=2.0), rgb(CONTOUR))


def test_a_single_pixel_and_a_whole_picture_have_outlines() -> None:
    picture = np.full((20, 30, 3), 200, np.uint8)
    dot = np.zeros((20, 30), int)
    dot[5, 5] = 255
    drawn = outline(picture, dot, "#00E58F", line=1)
    assert (drawn[5, 5] == 200).all()
    assert count(drawn, GREEN) == 8
    assert count(outline(picture, np.ones((20, 30)), "#00E58F", line=1), GREEN) == 2 * 30 + 2 * 18
    assert (outline(picture, np.zeros((20, 30)), "#00E58F") == picture).all()
    assert (picture == 200).all()


# Galleries


def tile(kind: str = "crack", **changes: object) -> AnomalyTile:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:20] = kind != "good"
    picture = np.random.default_rng(0).integers(0, 120, (40, 60, 3), dtype=np.uint8)
    defaults = {
        "picture": picture, "scores": random_map(), "mask": mask, "name": "a.png", "defect_type": kind,
        "is_defect": kind != "good", "score": 3.5, "rejected": True,
    }  # fmt: skip
    return AnomalyTile(**{**defaults, **changes})


def test_pictures_worth_showing_are_the_extreme_ones() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.4, 0.7, 0.2, 0.5, 0.3])
    defect = np.array([0, 0, 1, 1, 0, 1, 1, 0], bool)
    chosen = choose(scores, defect, 0.5, 10)
    assert chosen.escapes.tolist() == [5, 3]
    assert chosen.false_alarms.tolist() == [1, 4]
    assert chosen.found.tolist() == [2, 6]  # a score at the threshold is rejected; ties in order
    assert [len(kind) for kind in choose(scores, defect, 0.5, 1)] == [1, 1, 1]
    assert [len(kind) for kind in choose([], [], 0.5, 4)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("is_defect", "rejected", "word"),
    [(True, True, "found"), (True, False, "escaped"), (False, True, "false alarm"), (False, False, "passed"),
     (True, None, "no threshold")],
)  # fmt: skip
def test_decision_in_a_word(is_defect: bool, rejected: bool | None, word: str) -> None:
    assert tile(is_defect=is_defect, rejected=rejected).decision == word
    shown = np.bool_(is_defect), rejected if rejected is None else np.bool_(rejected)
    assert tile(is_defect=shown[0], rejected=shown[1]).decision == word  # as arrays give them


def test_gallery_shows_picture_mark_and_map() -> None:
    image = anomaly_gallery([tile()], title="One", size=120)
    assert count(image, GREEN) > 50
    assert image.width >= 3 * 120
    unmarked = anomaly_gallery([tile("good"), tile("good", mask=None)], title="Good", size=240, columns=1)
    assert not count(unmarked, GREEN)
    assert 2 * 240 < unmarked.width < 3 * 240  # no empty panel where nothing is marked
    alone = anomaly_gallery([tile("good", scores=None, mask=None)], title="Alone", size=600)
    assert 600 < alone.width < 2 * 600
    crossed = anomaly_gallery([tile()], title="One", size=120, threshold=5.0)
    assert count(crossed, rgb(CONTOUR)) > count(image, rgb(CONTOUR))


def test_gallery_of_mixed_tiles_and_of_nothing() -> None:
    tiles = [tile(), tile("good", name="x" * 300, defect_type="y" * 99), tile(scores=None, mask=None, rejected=None)]
    image = anomaly_gallery(tiles, title="Mixed " * 60, size=100)
    edge = np.asarray(image)[:, -20:]
    assert (edge == 255).all()  # long words stay within the margin
    assert np.asarray(anomaly_gallery([], title="No escapes")).std() > 5


def test_gallery_gives_one_colour_scale_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    real = anomalies.overlay
    monkeypatch.setattr(anomalies, "overlay", lambda *a, **k: used.append(k["scale"]) or real(*a, **k))
    tiles = [tile(scores=random_map(seed=seed) * (seed + 1)) for seed in range(3)]
    anomaly_gallery(tiles, title="Three")
    assert used == [colour_scale([t.scores for t in tiles])] * 3
    used.clear()
    anomaly_gallery(tiles, title="Three", scale=(1.0, 2.0))
    assert used == [(1.0, 2.0)] * 3


def test_thin_mask_survives_the_smaller_picture() -> None:
    picture, mask = np.full((800, 800, 3), 90, np.uint8), np.zeros((800, 800), bool)
    mask[100:700, 400] = True
    image = anomaly_gallery([tile(picture=picture, mask=mask)], title="Crack", size=100)
    assert count(image, GREEN) > 100


def pseudo(change: int = 20, accepted: bool = True) -> PseudoTile:
    source = np.full((50, 50, 3), 100, np.uint8)
    changed, mask = source.copy(), np.zeros((50, 50), bool)
    changed[10:20, 10:30] += np.uint8(change)
    mask[10:20, 10:30] = change != 0
    return PseudoTile(source, changed, mask, 0.61, 0.08, accepted, "a.png")


def test_sheet_of_pseudo_anomalies_shows_change_and_verdict() -> None:
    image = pseudo_anomaly_sheet([pseudo()], title="One", size=150)  # three times as large
    tinted = tuple(round(0.25 * 188 + 0.75 * c) for c in ORANGE)  # pale: 128 + (100 + 20) / 2
    assert count(image, tinted) == 60 * 30
    last = np.asarray(image)[100:, 24 + 3 * (150 + 4) :]  # below the key, right of the caption
    assert count(last, (128 + 4 * 20,) * 3) == 60 * 30  # the power of two that stays within the range
    assert count(last, (128, 128, 128)) > 0.9 * (150 * 150 - 60 * 30)
    rejected = pseudo_anomaly_sheet([pseudo(accepted=False)], title="One", size=150)
    assert count(rejected, ORANGE) > count(image, ORANGE) == 0


@pytest.mark.parametrize("change", [0, 1, 155])
def test_sheet_of_pseudo_anomalies_copes_with_any_change(change: int) -> None:
    assert np.asarray(pseudo_anomaly_sheet([pseudo(change)], title="One")).std() > 5
    assert np.asarray(pseudo_anomaly_sheet([], title="None")).std() > 5
    with pytest.raises(ValueError, match="differ in size"):
        pseudo_anomaly_sheet([PseudoTile(**{**vars(pseudo()), "mask": np.zeros((4, 4))})], title="One")


@pytest.mark.parametrize(
    ("ssim", "accepted", "caption"),
    [(0.61, True, "SSIM 0.610   area 8 %   accepted"), (0.91, False, "SSIM 0.910   area 8 %   rejected: too alike"),
     (math.nan, True, "area 8 %   accepted"), (math.nan, False, "area 8 %   rejected: nothing changed")],
)  # fmt: skip
def test_caption_of_a_pseudo_anomaly(
    ssim: float, accepted: bool, caption: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(anomalies, "sheet", lambda cells, **_: drawn.extend(cells))
    pseudo_anomaly_sheet([PseudoTile(**{**vars(pseudo()), "ssim": ssim, "accepted": accepted})], title="One")
    assert "".join(words.text for words in drawn[0].caption[-1]) == caption


# Figures


def test_histogram_states_rates_on_any_scale() -> None:
    figure = score_histogram_figure([-9, -7, -2, 4, 5], [0, 0, 0, 1, 1], -2.0, "log density")
    assert figure.get_suptitle() == "0.0 % of the defects pass, 33.3 % of the good are rejected"
    assert {"threshold -2", "log density", "good (3)", "defective (2)"} <= set(texts(figure))
    assert figure.axes[0].get_xscale() == "linear"
    assert_inside(figure)


@pytest.mark.parametrize(
    ("scores", "threshold"), [([3.0] * 5, None), ([3.0] * 5, math.inf), ([1, 2, 3, 4, 5], 90.0), ([0.0] * 5, 0.0)]
)
def test_histogram_of_odd_scores_holds_them_all(scores: list[float], threshold: float | None) -> None:
    figure = score_histogram_figure(scores, [0, 0, 1, 1, 1], threshold, "score")
    for name, total in (("good (2)", 1), ("defective (3)", 1)):
        (steps,) = [patch for patch in figure.axes[0].patches if patch.get_label() == name]
        assert steps.get_data().values.sum() == pytest.approx(total)
    assert_inside(figure)


def test_histogram_with_a_heavy_tail_is_logarithmic_and_readable() -> None:
    scores = np.append(np.random.default_rng(0).gamma(20, 1, 200), [3000.0, 5000.0])
    figure = score_histogram_figure(scores, np.arange(202) >= 150, 28.0, "distance")
    assert figure.axes[0].get_xscale() == "log"
    assert_inside(figure)
    assert {"20", "100", "1000"} <= set(texts(figure))
    assert not any("mathdefault" in text for text in texts(figure))
    assert sum(patch.get_data().values.sum() for patch in figure.axes[0].patches) == pytest.approx(4)


def test_histogram_refuses_what_is_no_score() -> None:
    for scores, truth in (([], []), ([1.0], [0, 1]), ([[1.0]], [[1]]), ([math.nan], [1]), ([math.inf], [0])):
        with pytest.raises(ValueError, match=r"\(n,\)|finite"):
            score_histogram_figure(scores, truth, None, "score")


def interval(value: float | None, half: float | None = 0.05, **more: object) -> dict:
    known = value is not None and half is not None
    return {"value": value, "low": value - half if known else None, "high": value + half if known else None, **more}


def test_types_are_ordered_by_how_hard_they_are() -> None:
    by_type = {
        "fray": interval(0.9), "crack": interval(0.55), "a long name of a defect that goes on": interval(0.8, None),
        "none": interval(None, reason="no samples"),
    }  # fmt: skip
    figure = auroc_by_type_figure(by_type, interval(0.75), dict.fromkeys(by_type, 7))
    assert figure.get_suptitle() == "Hardest to find: crack, AUROC 0.550; easiest: fray, 0.900"
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert [label.split("  ")[0] for label in labels] == ["crack", "a long name …hat goes on", "fray", "none"]
    assert all(label.endswith("(7)") for label in labels)
    assert {"undefined: no samples", "0.800", "chance", "all defects 0.750"} <= set(texts(figure))
    assert_inside(figure)
    assert "chance" not in texts(auroc_by_type_figure({"a": interval(0.97, 0.01)}))
    assert auroc_by_type_figure({}).get_suptitle() == "AUROC by kind of defect"


def test_discard_rates_are_those_of_each_bin() -> None:
    rng = np.random.default_rng(0)
    areas = np.exp(rng.uniform(np.log(0.005), np.log(0.15), (500, 4)))
    ssim = np.clip(1 - 2 * areas + rng.normal(0, 0.1, areas.shape), 0, 1)
    figure = discard_figure(areas, ssim, 0.9, "SSIM of the patch")
    assert_inside(figure)
    above, below = figure.axes
    edges = np.geomspace(areas.min(), areas.max(), 9)
    held, _ = np.histogram(areas, edges)
    gone, _ = np.histogram(areas[ssim >= 0.9], edges)
    np.testing.assert_allclose([bar.get_height() for bar in below.patches], gone / held, atol=0.01)
    counts = [int(text.get_text()) for text in below.texts]
    assert sum(counts) == areas.size
    assert f"discarded ({(ssim >= 0.9).sum()})" in texts(figure)
    assert above.get_ylabel() == "SSIM of the patch"
    small, large = (np.mean(ssim[half] >= 0.9) for half in (areas < np.median(areas), areas >= np.median(areas)))
    assert figure.get_suptitle() == (
        f"{100 * (ssim >= 0.9).mean():.0f} % of 2000 candidates are too alike to their source:\n"
        f"{100 * small:.0f} % of the smaller half, {100 * large:.0f} % of the larger half"
    )


def test_discard_figure_of_odd_candidates() -> None:
    figure = discard_figure([0.1, 0.1, 0.0, 0.1], [0.9, 0.2, 0.5, math.nan], 0.9)
    assert figure.get_suptitle() == "50 % of 2 candidates are too alike to their source"
    assert_inside(figure)
    with pytest.raises(ValueError, match="no candidate"):
        discard_figure([0.0], [0.5], 0.9)
    with pytest.raises(ValueError, match="one similarity"):
        discard_figure([0.1, 0.1], [0.5], 0.9)


def test_figures_leave_the_callers_style_alone() -> None:
    before = dict(matplotlib.rcParams)
    for figure in (
        score_histogram_figure([1, 2], [0, 1], 1.5, "s"),
        auroc_by_type_figure({"a": interval(0.8)}),
        discard_figure([0.1, 0.2], [0.5, 0.9], 0.8),
    ):
        assert isinstance(figure, Figure)
    assert dict(matplotlib.rcParams) == before


def test_white_of_a_pseudo_anomaly_stays_white() -> None:
    white = np.full((20, 20, 3), 255, np.uint8)
    assert (anomalies._tint(white, np.zeros((20, 20))) == 255).all()
