"""Object masks, mask rules and new masks against scikit-image, scipy, counting by hand, and shapes with known answers."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.measure import label, regionprops

from lit_defect.errors import DataError, UserError
from lit_defect.generation import foreground as modules
from lit_defect.generation.files import png, read_mask
from lit_defect.generation.foreground import Foreground, foreground, otsu
from lit_defect.generation.mask_rules import MaskRules, fix_to, largest_border_share
from lit_defect.generation.mask_shapes import fit_mask, keep_area, vary
from lit_defect.generation.mask_sources import LARGEST, TRIES, AugmentedMasks, MaskFolder, MaskSource, rules_of

PAIR = ("tile", "crack")


def disc(size: tuple[int, int], centre: tuple[float, float], radius: float) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def box(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def noisy(colour: object, size: tuple[int, int] = (80, 100), spread: float = 2.0) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(*size, 3)) * spread + np.asarray(colour)
    return np.clip(values, 0, 255).astype(np.uint8)


# --- the object in a picture ---


@pytest.mark.parametrize("colours", [(20, 200), (235, 60), ((30, 90, 40), (30, 40, 90))])
def test_an_object_before_an_even_background_is_found(colours):
    picture = noisy(colours[0])
    truth = disc((80, 100), (40, 45), 22)
    picture[truth] = noisy(colours[1])[truth]
    found = foreground(picture)
    assert (found & truth).sum() / (found | truth).sum() > 0.93
    edge = ndimage.binary_dilation(truth, iterations=2) & ~ndimage.binary_erosion(truth, iterations=2)
    np.testing.assert_array_equal(found[~edge], truth[~edge])


def test_holes_are_filled_specks_go_and_several_parts_stay():
    picture = noisy(10)
    parts = disc((80, 100), (40, 25), 15) | disc((80, 100), (40, 75), 12)
    picture[parts] = 180
    picture[disc((80, 100), (40, 25), 5)] = 10
    picture[8:10, 90:92] = 180
    found = foreground(picture)
    assert label(found).max() == 2
    assert found[40, 25]
    assert not found[8:10, 90:92].any()


@pytest.mark.parametrize(
    "picture",
    [
        noisy(120, spread=30),  # a texture
        noisy(120, spread=3),  # an even one: Otsu's halves of its noise are no object
        noisy(120, spread=0),
        np.dstack([np.broadcast_to(np.linspace(0, 255, 100), (80, 100)).astype(np.uint8)] * 3),
    ],
)
def test_a_texture_fills_the_picture(picture):
    assert foreground(picture).all()


def test_a_speck_of_dust_is_no_object():
    picture = noisy(120)
    picture[30:34, 30:34] = 250
    assert foreground(picture).all()


def test_an_object_across_the_frame_fills_the_picture():
    picture = noisy(10)
    picture[:, 30:70] = 200
    assert foreground(picture).all()


def test_otsu_is_scikit_images():
    rng = np.random.default_rng(1)
    for _ in range(5):
        values = np.concatenate([rng.normal(3, 1, 300), rng.normal(9, 2, int(rng.integers(20, 900)))])
        assert otsu(values) == pytest.approx(threshold_otsu(values))


def test_an_object_is_looked_for_once(monkeypatch):
    """Of each picture, by its name; sizes that no byte divides."""
    calls = []
    look = modules.foreground
    monkeypatch.setattr(modules, "foreground", lambda picture: calls.append(picture.shape) or look(picture))
    shown = {"a": np.full((21, 35, 3), 200, np.uint8), "b": np.full((35, 21, 3), 200, np.uint8)}
    shown["a"][5:14, 8:25] = 40
    objects = Foreground("auto")
    for name in ("a", "b", "a", "b"):
        found = objects.of(name, shown[name])
        assert found.dtype == np.bool_
        assert np.array_equal(found, look(shown[name]))
        found[:] = False  # belongs to who has asked for it
    assert 0 < objects.of("a", shown["a"]).mean() < 1
    assert calls == [(21, 35, 3), (35, 21, 3)]


def test_object_masks_come_from_a_folder_by_the_pictures_names(tmp_path):
    picture = noisy(10)
    one, two = disc((80, 100), (40, 45), 22), disc((80, 100), (20, 20), 9)
    (tmp_path / "tile" / "train").mkdir(parents=True)
    (tmp_path / "tile" / "train" / "000.png").write_bytes(png(one))
    (tmp_path / "tile" / "train" / "000#1,2,100,80.png").write_bytes(png(two))
    objects = Foreground(str(tmp_path))
    np.testing.assert_array_equal(objects.of("tile/train/000.jpg", picture), one)
    np.testing.assert_array_equal(objects.of("tile/train/000.jpg#1,2,100,80", picture), two)
    assert Foreground("all").of("any", picture).all()
    np.testing.assert_array_equal(Foreground("auto").of("any", picture), foreground(picture))


def test_object_masks_that_do_not_fit_are_named(tmp_path):
    picture = noisy(10)
    with pytest.raises(UserError, match="expected auto, all, or a folder"):
        Foreground(str(tmp_path / "nowhere"))
    objects = Foreground(str(tmp_path))
    with pytest.raises(DataError, match=r"a\.png: there is no such mask"):
        objects.of("a.jpg", picture)
    (tmp_path / "a.png").write_bytes(png(disc((80, 90), (9, 9), 5)))
    with pytest.raises(DataError, match=r"a\.png is 90x80, its picture 100x80"):
        objects.of("a.jpg", picture)
    (tmp_path / "a.png").write_bytes(png(np.zeros((80, 100), bool)))
    with pytest.raises(DataError, match=r"a\.png is empty"):
        objects.of("a.jpg", picture)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"a\.png: not a readable mask"):
        objects.of("a.jpg", picture)


def test_any_channel_marks_a_mask(tmp_path):
    values = np.zeros((4, 5, 3), np.uint8)
    values[1, 2, 1] = 7
    Image.fromarray(values).save(tmp_path / "mask.png")
    assert np.argwhere(read_mask(tmp_path / "mask.png")).tolist() == [[1, 2]]


# --- rules ---


def test_rules_are_the_real_masks_areas_with_slack_and_a_third_of_an_edge():
    masks = [box((10, 10), 2, 2, 4, 5), box((20, 30), 5, 5, 15, 20)]  # shares .06 and .25
    assert MaskRules.of(masks) == MaskRules(pytest.approx(0.04), pytest.approx(0.375), pytest.approx(1 / 3))
    along = box((10, 10), 0, 1, 5, 9)  # 8 of 10 pixels of the first row
    rules = MaskRules.of([along, *masks])
    assert rules.border == pytest.approx(0.8)
    assert rules.most == pytest.approx(0.6)
    assert MaskRules.of([box((10, 10), 0, 0, 9, 10)]).most == 1.0
    for nothing in ([], [np.zeros((3, 3), bool)]):
        with pytest.raises(ValueError, match="mark something"):
            MaskRules.of(nothing)


@pytest.mark.parametrize(
    ("mask", "fault"),
    [
        (box((20, 20), 0, 0, 0, 0), "empty"),
        (box((20, 20), 0, 0, 20, 20), "full"),
        (box((20, 20), 5, 5, 6, 8), "too small"),
        (box((20, 20), 1, 1, 19, 19), "too large"),
        (box((20, 20), 10, 15, 14, 19), "off the object"),
        (box((20, 20), 0, 4, 3, 11), "along the border"),
        (box((20, 20), 4, 0, 11, 3), "along the border"),
        (box((20, 20), 0, 4, 4, 10), None),
        (box((20, 20), 4, 5, 9, 9), None),
        (box((20, 20), 9, 9, 10, 10), "too small"),
    ],
)
def test_faults(mask, fault):
    rules = MaskRules(least=0.02, most=0.3, border=1 / 3)
    assert rules.fault(mask, box((20, 20), 0, 0, 20, 16)) == fault


def test_a_pixel_is_not_too_large_where_defects_are_smaller_still():
    rules = MaskRules(least=1e-5, most=1e-4, border=1 / 3)
    assert rules.fault(box((20, 20), 9, 9, 10, 10), np.ones((20, 20), bool)) is None
    assert rules.fault(box((20, 20), 9, 9, 10, 11), np.ones((20, 20), bool)) == "too large"


def test_a_tenth_of_a_mask_may_lie_off_the_object():
    rules, mask = MaskRules(0.02, 0.5, 1.0), box((20, 20), 5, 0, 10, 20)  # 100 pixels
    assert rules.fault(mask, box((20, 20), 0, 0, 20, 18)) is None
    assert rules.fault(mask, box((20, 20), 0, 0, 20, 17)) == "off the object"
    assert fix_to(mask, box((20, 20), 0, 0, 20, 17)).sum() == 85


def test_largest_border_share_looks_at_all_four_edges():
    assert largest_border_share(box((10, 20), 1, 1, 9, 19)) == 0
    assert largest_border_share(box((10, 20), 0, 3, 1, 7)) == pytest.approx(4 / 20)
    assert largest_border_share(box((10, 20), 9, 3, 10, 8)) == pytest.approx(5 / 20)
    assert largest_border_share(box((10, 20), 3, 0, 9, 1)) == pytest.approx(6 / 10)
    assert largest_border_share(box((10, 20), 1, 19, 8, 20)) == pytest.approx(7 / 10)


# --- shapes ---


def test_reduced_masks_keep_the_cells_that_are_covered_most():
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.normal(size=(60, 80)), 3) > 0.15
    cells = mask.reshape(15, 4, 20, 4).mean(axis=(1, 3))
    got = fit_mask(mask, (15, 20))
    assert got.sum() >= round(cells.sum())
    parts, count = ndimage.label(mask, structure=np.ones((3, 3)))
    expected = np.zeros_like(got)
    for number in range(1, count + 1):  # of each part the most covered ones, and no more than ties make
        own = (parts == number).reshape(15, 4, 20, 4).mean(axis=(1, 3))
        expected |= own >= np.sort(own.ravel())[::-1][max(1, round(own.sum())) - 1]
    np.testing.assert_array_equal(got, expected)


def test_a_large_part_does_not_cost_the_small_and_thin_ones_beside_it():
    stain = disc((1024, 1024), (300, 300), 160)
    dots = np.zeros((1024, 1024), bool)
    for i in range(10):
        dots[900:903, 60 * i + 100 : 60 * i + 103] = True
    scratch = box((1024, 1024), 700, 200, 701, 400)
    fitted = fit_mask(stain | dots | scratch, (256, 256))
    assert fitted[210:].sum() == 10, "one pixel for each, though none is covered by half"
    assert fitted[150:200].sum() == 50
    assert fitted[:150].sum() == pytest.approx(stain.sum() / 16, rel=0.01)


@pytest.mark.parametrize("size", [(96, 96), (100, 77), (1500, 2000)])
def test_specks_do_not_fill_a_small_mask(size):
    specks = np.random.default_rng(0).random((1024, 1024)) < 0.01
    assert 0.5 * specks.mean() < fit_mask(specks, size).mean() < 2.1 * specks.mean()


def test_a_defect_of_a_pixel_survives_and_a_straight_edge_stays_straight():
    tiny = box((300, 400), 123, 321, 124, 322)
    assert np.argwhere(fit_mask(tiny, (30, 40))).tolist() == [[12, 32]]
    half = box((40, 40), 0, 0, 22, 40)
    reduced = fit_mask(half, (10, 10))
    assert (reduced == reduced[:, :1]).all()
    np.testing.assert_array_equal(fit_mask(fit_mask(half, (80, 80)), (40, 40)), half)
    assert not fit_mask(np.zeros((40, 40), bool), (10, 10)).any()
    line = box((100, 100), 0, 50, 100, 51)  # a hundredth of the picture: a half would lose it
    assert fit_mask(line, (40, 40)).sum() == 40


def test_transparency_marks_nothing(tmp_path):
    marked = box((8, 8), 2, 3, 4, 5)
    grey = 255 * marked.astype(np.uint8)
    for name, channels in (("LA", [grey]), ("RGBA", [grey] * 3)):
        Image.fromarray(np.stack([*channels, np.full_like(grey, 255)], axis=2), name).save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_mask(tmp_path / f"{name}.png"), marked)


def test_keep_area_gives_all_pixels_alike_the_same():
    coverage = np.array([[1.0, 0.5, 0.5], [0.0, 0.2, 0.2000000001]])
    assert keep_area(coverage).tolist() == [[True, True, True], [False, False, False]]
    assert keep_area(np.array([[0.2, 0.2000000001, 0.1]])).tolist() == [[True, True, False]]
    assert not keep_area(np.zeros((2, 2))).any()


def test_varied_shapes_are_turned_scaled_and_bent_within_bounds():
    real = box((200, 200), 60, 95, 140, 105)  # 80 x 10
    rng = np.random.default_rng(0)
    areas, angles, lengths = [], [], []
    for _ in range(150):
        shape, edges = vary(real, (200, 200), rng)
        assert not edges.any()
        assert shape.any(axis=0).all() or shape.any(axis=1).all()
        region = regionprops(np.pad(shape, 2).astype(int))[0]
        areas.append(region.area)
        angles.append(math.degrees(region.orientation))
        lengths.append(region.axis_major_length)
    assert 0.9 * 800 < np.median(areas) < 1.1 * 800
    assert np.min(areas) < 0.8 * 800
    assert np.max(areas) > 1.25 * 800
    assert np.abs(angles).max() < 20 + 12  # bending adds to turning
    assert min(angles) < -12
    assert max(angles) > 12
    assert np.quantile(lengths, 0.95) < 1.35 * regionprops(real.astype(int))[0].axis_major_length


def test_a_variant_without_chance_is_the_mask_itself(monkeypatch):
    """Turning, scaling and bending by nothing leaves the pixels, flipped as drawn."""
    monkeypatch.setattr("lit_defect.generation.mask_shapes.TURN", 0.0)
    monkeypatch.setattr("lit_defect.generation.mask_shapes.SCALE", 1.0)
    monkeypatch.setattr("lit_defect.generation.mask_shapes.BEND", 0.0)
    real = box((30, 40), 8, 9, 20, 13) | box((30, 40), 18, 9, 20, 30)
    seen = set()
    for seed in range(12):
        flips = tuple(np.random.default_rng(seed).random(2) < 0.5)
        seen.add(flips)
        shape, _ = vary(real, (30, 40), np.random.default_rng(seed))
        expected = real[8:20, 9:30][:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
        np.testing.assert_array_equal(shape, expected)
    assert len(seen) == 4
    shape, _ = vary(real, (60, 80), np.random.default_rng(1))
    assert shape.shape == (24, 42)
    assert shape.sum() == 4 * real.sum()


@pytest.mark.parametrize("size", [(4000, 3000), (64, 48), (10, 10)])
def test_a_mask_of_one_pixel_never_vanishes(size):
    real = box(size, size[0] // 2, size[1] // 3, size[0] // 2 + 1, size[1] // 3 + 1)
    rng = np.random.default_rng(0)
    for _ in range(10):
        shape, _ = vary(real, (64, 48), rng)
        assert shape.any()
        assert shape.mean() > 0.3


# --- new masks of real ones ---


def real_masks(size: tuple[int, int] = (100, 120)) -> list[tuple[str, np.ndarray]]:
    return [("0.png", disc(size, (50, 60), 9)), ("1.png", box(size, 40, 30, 44, 70))]


def augmented(named: list[tuple[str, np.ndarray]]) -> AugmentedMasks:
    return AugmentedMasks({PAIR: named}, rules_of({PAIR: named}))


def test_drawn_masks_keep_the_rules_on_the_object_and_differ():
    source = augmented(real_masks())
    objects = disc((50, 60), (25, 30), 18)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        drawn = source.draw(PAIR, rng, objects)
        assert drawn.mask.shape == (50, 60)
        if "cut" not in drawn.source:
            assert source.rules[PAIR].fault(drawn.mask, objects) is None
        assert (drawn.mask & objects).any()
        assert drawn.rejected.total() <= TRIES
        seen.add(drawn.mask.tobytes())
        assert drawn.source.startswith(("augmented 0.png", "augmented 1.png"))
    assert len(seen) == 60


def test_places_cover_the_object():
    """Centres of discs drawn on an all-over object reach all parts of the frame alike."""
    source = augmented([("0.png", disc((100, 120), (50, 60), 4))] * 2)
    rng, everywhere = np.random.default_rng(0), np.ones((50, 60), bool)
    total = sum(source.draw(PAIR, rng, everywhere).mask.astype(int) for _ in range(600))
    quarters = total[:48].reshape(4, 12, 4, 15).sum(axis=(1, 3))
    assert quarters.min() > 0.5 * quarters.mean()
    assert quarters.max() < 1.7 * quarters.mean()


def test_the_same_generator_gives_the_same_masks_and_leaves_those_given_alone():
    named = real_masks()
    copies = [mask.copy() for _, mask in named]
    objects = disc((50, 60), (25, 30), 22)
    first, second = (augmented(named).draw(PAIR, np.random.default_rng(5), objects) for _ in range(2))
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.source == second.source
    assert not np.array_equal(augmented(named).draw(PAIR, np.random.default_rng(6), objects).mask, first.mask)
    for (_, mask), copy in zip(named, copies, strict=True):
        np.testing.assert_array_equal(mask, copy)


def test_a_broken_rim_stays_at_the_rim_and_a_band_reaches_from_edge_to_edge():
    rim = [("rim", box((100, 120), 0, 50, 10, 70))] * 2
    band = [("band", box((100, 120), 40, 0, 60, 120))] * 2
    everywhere = np.ones((50, 60), bool)
    rng, sides = np.random.default_rng(0), Counter()
    for _ in range(40):
        mask = augmented(rim).draw(PAIR, rng, everywhere).mask
        assert mask[0].any() != mask[-1].any()
        sides["top" if mask[0].any() else "bottom"] += 1
        mask = augmented(band).draw(PAIR, rng, everywhere).mask
        assert mask.any(axis=0).all()
    assert min(sides.values()) > 8


def test_what_is_broken_off_is_widest_at_the_rim():
    source = augmented([("bite", disc((100, 120), (0, 60), 18))] * 2)
    rng, everywhere = np.random.default_rng(0), np.ones((50, 60), bool)
    for _ in range(20):
        mask = source.draw(PAIR, rng, everywhere).mask
        rim, inner = (mask[0], mask[4]) if mask[0].any() else (mask[-1], mask[-5])
        assert rim.sum() > inner.sum() > 0


def test_masks_larger_than_the_room_are_drawn_still():
    large = [("large", box((100, 120), 0, 0, 95, 118)), ("tall", box((100, 120), 5, 50, 98, 70))]
    source, everywhere = augmented(large), np.ones((50, 60), bool)
    rng = np.random.default_rng(0)
    areas = [source.draw(PAIR, rng, everywhere).mask.mean() for _ in range(30)]
    assert min(areas) > 0.08
    assert max(areas) < 1


class Listed(MaskSource):
    """Gives certain masks in turn."""

    def __init__(self, masks: list[np.ndarray], rules: MaskRules) -> None:
        super().__init__({PAIR: rules})
        self.masks, self.asked = masks, 0

    def candidate(self, pair, rng, foreground):
        self.asked += 1
        return self.masks[(self.asked - 1) % len(self.masks)], f"number {self.asked - 1}"


SIZE = (20, 20)
LEFT = box(SIZE, 0, 0, 20, 10)
RULES = MaskRules(0.02, 0.2, 1 / 3)


def test_faulty_masks_are_counted_by_reason_until_one_passes():
    masks = [box(SIZE, 0, 0, 0, 0), box(SIZE, 5, 15, 9, 19), box(SIZE, 4, 14, 9, 19), box(SIZE, 5, 2, 9, 6)]
    drawn = Listed(masks, RULES).draw(PAIR, np.random.default_rng(0), LEFT)
    np.testing.assert_array_equal(drawn.mask, masks[3])
    assert drawn.source == "number 3"
    assert drawn.rejected == {"empty": 1, "off the object": 2}


def test_when_none_passes_the_nearest_is_cut_to_the_object():
    far, near, beside = box(SIZE, 5, 9, 9, 14), box(SIZE, 5, 7, 9, 12), box(SIZE, 5, 12, 9, 15)
    drawn = Listed([far, beside, near], RULES).draw(PAIR, np.random.default_rng(0), LEFT)
    np.testing.assert_array_equal(drawn.mask, box(SIZE, 5, 7, 9, 10))
    assert drawn.source == "number 2, cut to the object"
    assert drawn.rejected == {"off the object": TRIES}


def test_what_keeps_the_rules_when_cut_is_nearer_than_what_has_more_on_the_object():
    huge = box(SIZE, 1, 0, 19, 10)  # all on the object, but too large
    drawn = Listed([huge, box(SIZE, 5, 7, 9, 13)], RULES).draw(PAIR, np.random.default_rng(0), LEFT)
    np.testing.assert_array_equal(drawn.mask, box(SIZE, 5, 7, 9, 10))


def test_where_no_mask_reaches_the_object_it_is_said():
    with pytest.raises(DataError, match=rf"tile/crack lies on the object \({TRIES} tries: {TRIES} off the object"):
        Listed([box(SIZE, 5, 12, 9, 15)], RULES).draw(PAIR, np.random.default_rng(0), LEFT)


def test_masks_that_cannot_be_learnt_from_are_named():
    good = real_masks()
    for bad, told in ((np.zeros((9, 9), bool), "marks nothing"), (np.ones((9, 9), bool), "marks the whole picture")):
        named = {PAIR: [*good, ("test/crack/007.png", bad)]}
        for refuse in (rules_of, lambda masks: AugmentedMasks(masks, {PAIR: RULES})):
            with pytest.raises(DataError, match=rf"test/crack/007\.png {told}"):
                refuse(named)
    with pytest.raises(DataError, match="tile/crack has 1 training masks; new ones need at least 2"):
        rules_of({PAIR: good[:1]})


def test_a_pair_without_masks_is_refused():
    with pytest.raises(DataError, match="no masks of tile/hole; there are of tile/crack"):
        augmented(real_masks()).draw(("tile", "hole"), np.random.default_rng(0), np.ones((50, 60), bool))


def test_masks_have_the_size_of_each_picture_and_are_as_thin_as_the_real_ones():
    line = [("line", box((300, 200), 100, 20, 102, 180))] * 2
    source = augmented(line)
    for size in ((300, 200), (600, 400), (150, 100)):
        for seed in range(8):
            mask = source.draw(PAIR, np.random.default_rng(seed), np.ones(size, bool)).mask
            assert mask.shape == size
            length = np.hypot(*(np.ptp(np.argwhere(mask), axis=0) + 1))
            width = mask.sum() / length  # the real one is 2 of 300 pixels wide
            assert width == pytest.approx(2 * size[0] / 300, rel=0.5)


def test_very_large_masks_are_drawn_smaller_and_enlarged():
    named = [("0", disc((40, 50), (20, 25), 6))] * 2
    source, size = augmented(named), (2 * LARGEST, 2 * LARGEST + 500)
    seen = []
    source.candidate, real = lambda *given: seen.append(given[2].shape) or real(*given), source.candidate
    drawn = source.draw(PAIR, np.random.default_rng(0), np.ones(size, bool))
    assert drawn.mask.shape == size
    assert set(seen) == {(round(LARGEST * size[0] / size[1]), LARGEST)}
    assert drawn.mask.mean() == pytest.approx(named[0][1].mean(), rel=0.7)


# --- masks from a folder ---


def test_masks_from_a_folder_are_taken_as_they_are_and_judged_by_the_rules(tmp_path):
    folder = tmp_path / "tile" / "crack"
    folder.mkdir(parents=True)
    masks = {"0.png": box(SIZE, 5, 2, 9, 6), "1.png": box(SIZE, 5, 12, 9, 16), "2.png": np.zeros(SIZE, bool)}
    masks["3.png"] = np.kron(box(SIZE, 2, 1, 6, 5), np.ones((2, 2), bool))
    for name, mask in masks.items():
        (folder / name).write_bytes(png(mask))
    source = MaskFolder(tmp_path, {PAIR: RULES})
    rng, rejected, seen = np.random.default_rng(0), Counter(), set()
    for _ in range(40):
        drawn = source.draw(PAIR, rng, LEFT)
        seen.add(drawn.source)
        rejected += drawn.rejected
        expected = masks["0.png"] if drawn.source == "0.png" else box(SIZE, 2, 1, 6, 5)
        np.testing.assert_array_equal(drawn.mask, expected)
    assert seen == {"0.png", "3.png"}
    assert set(rejected) == {"empty", "off the object"}


def test_a_folder_without_masks_of_a_pair_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"tile.crack has no masks"):
        MaskFolder(tmp_path, {PAIR: RULES})
