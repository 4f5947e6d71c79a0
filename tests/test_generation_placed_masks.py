"""Masks of edited pictures: what drawn ones and boxes must be like, and where random ones lie."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lit_defect.errors import DataError
from lit_defect.generation import placed_masks
from lit_defect.generation.files import mask_file, png, write_whole
from lit_defect.generation.mask_rules import MaskRules
from lit_defect.generation.mask_sources import AugmentedMasks, MaskFolder, rules_of
from lit_defect.generation.placed_masks import (
    Boxes,
    DrawnMasks,
    OwnMasks,
    PlacedMasks,
    RandomMasks,
    read_placed,
    strange_masks,
    with_masks,
)

NAME, PAIR, SIZE = "tile/train/good/003.jpg", ("tile", "crack"), (20, 30)


def draw(masks: PlacedMasks, name: str = NAME, foreground: np.ndarray | None = None, seed: int = 0):
    area = np.ones(SIZE, bool) if foreground is None else foreground
    return masks.draw_for(name, PAIR, np.random.default_rng(seed), area)


def box(top: int, left: int, bottom: int, right: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def write(folder: Path, values: np.ndarray, name: str = NAME) -> Path:
    path = mask_file(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


# --- drawn ---


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("tile/train/good/003.jpg", "tile/train/good/003.png"),
        ("a.b/photo.1.png", "a.b/photo.1.png"),
        ("photo.jpg#0,8,32,32", "photo#0,8,32,32.png"),
        ("part.1#3,4,5,6", "part#3,4,5,6.png"),
    ],
)
def test_masks_are_called_as_their_pictures(name, path):
    assert mask_file(Path("masks"), name) == Path("masks", path)


@pytest.mark.parametrize("name", [NAME, "photo.jpg#0,8,32,32"])
def test_a_drawn_mask_is_taken_as_it_is(tmp_path, name):
    mask = box(3, 4, 9, 20)
    write(tmp_path, mask.astype(np.uint8) * 255, name)
    found = draw(DrawnMasks(tmp_path), name)
    assert np.array_equal(found.mask, mask)
    assert found.mask.dtype == bool
    assert found.source == f"drawn {mask_file(tmp_path, name).name}"
    assert not found.rejected


@pytest.mark.parametrize(
    "values",
    [
        box(3, 4, 9, 20).astype(np.uint8),
        box(3, 4, 9, 20).astype(np.uint8) * 7,
        box(3, 4, 9, 20).astype(np.uint16) * 65535,
        box(3, 4, 9, 20),
        np.stack([box(3, 4, 9, 20).astype(np.uint8) * value for value in (255, 0, 90)], axis=2),
        np.dstack([np.stack([box(3, 4, 9, 20).astype(np.uint8) * 255] * 3, 2), np.full((*SIZE, 1), 200, np.uint8)]),
    ],
)
def test_any_two_values_are_a_drawn_mask(tmp_path, values):
    write(tmp_path, values)
    assert np.array_equal(draw(DrawnMasks(tmp_path)).mask, box(3, 4, 9, 20))


def test_a_mask_of_all_of_the_picture_may_be_drawn(tmp_path):
    write(tmp_path, np.full(SIZE, 255, np.uint8))
    assert draw(DrawnMasks(tmp_path)).mask.all()


def test_grey_values_need_a_threshold(tmp_path):
    values = np.zeros(SIZE, np.uint8)
    values[3, 3:8] = [100, 127, 128, 129, 255]
    path = write(tmp_path, values)
    with pytest.raises(DataError, match=rf"{path} has 6 grey values.*set mask_threshold"):
        draw(DrawnMasks(tmp_path))
    assert np.flatnonzero(draw(DrawnMasks(tmp_path, 128)).mask[3]).tolist() == [5, 6, 7]
    write(tmp_path, np.where(values, 255, 128).astype(np.uint8))  # two values, but none is the outside
    with pytest.raises(DataError, match="has 2 grey values"):
        draw(DrawnMasks(tmp_path))


def test_a_threshold_does_not_refuse_files_of_one_bit(tmp_path):
    write(tmp_path, box(3, 4, 9, 20))
    assert np.array_equal(draw(DrawnMasks(tmp_path, 200)).mask, box(3, 4, 9, 20))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.zeros(SIZE, np.uint8), "marks nothing; mark what"),
        (np.full(SIZE, 99, np.uint8), "marks nothing from mask_threshold 100 on"),
        (np.full((30, 20), 255, np.uint8), rf"003\.png is 20x30, its picture {NAME} 30x20"),
    ],
)
def test_drawn_masks_that_do_not_fit_are_named(tmp_path, values, told):
    write(tmp_path, values)
    with pytest.raises(DataError, match=told):
        draw(DrawnMasks(tmp_path, 100 if values.any() else None))


def test_drawn_masks_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match=r"003\.png: there is no such mask"):
        draw(DrawnMasks(tmp_path))
    with pytest.raises(DataError, match="is no folder of masks"):
        DrawnMasks(tmp_path / "nowhere")


# --- boxes ---


def listed(tmp_path: Path, *lines: str, header: str = "path,x,y,width,height") -> Path:
    path = tmp_path / "boxes.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_all_boxes_of_a_picture_are_its_mask(tmp_path):
    boxes = Boxes(listed(tmp_path, f"{NAME},4,3,16,6", "", "photo.png,0,0,1,1", f"{NAME}, 28, 0, 2, 20"))
    found = draw(boxes)
    assert np.array_equal(found.mask, box(3, 4, 9, 20) | box(0, 28, 20, 30))
    assert found.source == "2 boxes of boxes.csv"
    assert draw(boxes, "photo.png").mask.sum() == 1
    crop = Boxes(listed(tmp_path, '"photo.png#0,8,30,20",1,2,3,4'))
    assert np.array_equal(draw(crop, "photo.png#0,8,30,20").mask, box(2, 1, 6, 4))


def test_a_list_saved_by_a_spreadsheet_is_read(tmp_path):
    path = listed(tmp_path, f"{NAME},0,0,30,20")
    path.write_text("\ufeff" + path.read_text().replace("\n", "\r\n"), newline="")
    assert draw(Boxes(path)).mask.all()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"{NAME},15,3,16,6", rf"boxes\.csv:2: the box 15,3,16,6 lies outside {NAME}, which is 30x20"),
        (f"{NAME},4,15,16,6", "lies outside"),
        (f"{NAME},-1,3,16,6", r"boxes\.csv:2: expected x and y of 0 or more"),
        (f"{NAME},4,3,0,6", "width and height of 1 or more"),
        (f"{NAME},4,3,16.5,6", r"boxes\.csv:2: expected a path and four whole numbers"),
        (f"{NAME},4,3,16", "four whole numbers"),
        ("tile/train/good/004.jpg,4,3,16,6", rf"has no box of {NAME}; it has tile/train/good/004\.jpg"),
        ("", rf"has no box of {NAME}\."),
    ],
)
def test_boxes_that_do_not_fit_are_named(tmp_path, line, told):
    path = listed(tmp_path, line)
    with pytest.raises(DataError, match=told):
        draw(Boxes(path))


def test_lists_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="other columns than path,x,y,width,height"):
        Boxes(listed(tmp_path, header="path,left,top,right,bottom"))
    with pytest.raises(DataError, match="cannot be read"):
        Boxes(tmp_path / "nowhere.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="other columns"):
        Boxes(tmp_path / "empty.csv")


# --- own ---


def test_a_pictures_own_mask():
    masks = {NAME: box(1, 2, 3, 4), "empty.png": np.zeros(SIZE, bool)}
    own = OwnMasks(masks.get)
    assert np.array_equal(draw(own).mask, masks[NAME])
    assert draw(own).source == "own"
    for name in ("empty.png", "good.png"):
        with pytest.raises(DataError, match=rf"{name} has no mask of its own"):
            draw(own, name)


# --- random ---


def object_of(size: tuple[int, int] = (120, 150)) -> np.ndarray:
    y, x = np.ogrid[: size[0], : size[1]]
    return ((y - 60) / 50) ** 2 + ((x - 70) / 60) ** 2 < 1


@pytest.mark.parametrize("seed", range(20))
def test_a_blob_lies_on_the_object_with_an_area_as_asked_for(seed):
    area = object_of()
    found = draw(RandomMasks((0.01, 0.1)), foreground=area, seed=seed)
    assert not (found.mask & ~area).any()
    share = found.mask.sum() / area.sum()
    assert 0.0099 < share < 0.1001
    assert found.source == f"random, {share:.2%}" or math.isclose(float(found.source[8:-1]), 100 * share, abs_tol=0.02)
    assert ndimage.label(found.mask)[1] == 1
    assert np.array_equal(found.mask, draw(RandomMasks((0.01, 0.1)), foreground=area, seed=seed).mask)


def test_areas_are_drawn_evenly_by_their_logarithm():
    """Half of them lie below the geometric mean."""
    area = object_of((60, 75)) | box(10, 10, 50, 60, (60, 75))
    masks, rng = RandomMasks((0.01, 0.25)), np.random.default_rng(0)
    shares = [masks.draw_for(NAME, PAIR, rng, area).mask.sum() / area.sum() for _ in range(300)]
    assert np.mean(np.array(shares) < 0.05) == pytest.approx(0.5, abs=0.08)
    assert min(shares) < 0.012
    assert max(shares) > 0.22


def test_blobs_reach_every_part_of_the_object_and_have_many_shapes():
    area = object_of()
    masks = [draw(RandomMasks((0.02, 0.02)), foreground=area, seed=s).mask for s in range(250)]
    assert (np.any(masks, axis=0) & area).sum() > 0.97 * area.sum()
    inner = [m for m in masks if not (ndimage.binary_dilation(m, iterations=6) & ~area).any()]
    lengths = []
    for mask in inner:
        values = np.linalg.eigvalsh(np.cov(np.argwhere(mask).T))
        lengths.append(math.sqrt(values[1] / values[0]))
    assert min(lengths) < 1.3
    assert 2.3 < max(lengths) < 4.5


def test_a_blob_has_a_pixel_at_least_and_the_object_at_most():
    speck = box(3, 4, 4, 6)
    assert draw(RandomMasks((0.001, 0.001)), foreground=speck).mask.sum() == 1
    assert np.array_equal(draw(RandomMasks((1.0, 1.0)), foreground=speck).mask, speck)
    with pytest.raises(DataError, match=f"the object's mask of {NAME} is empty"):
        draw(RandomMasks((0.1, 0.2)), foreground=np.zeros(SIZE, bool))


def test_on_very_large_pictures_blobs_are_drawn_smaller_and_enlarged(monkeypatch):
    monkeypatch.setattr("lit_defect.generation.mask_sources.LARGEST", 60)
    drawn, blob = [], placed_masks._blob
    monkeypatch.setattr(placed_masks, "_blob", lambda *given: drawn.append(given[1].shape) or blob(*given))
    area = object_of((240, 300))
    found = draw(RandomMasks((0.05, 0.05)), foreground=area).mask
    assert found.shape == (240, 300)
    assert drawn == [(48, 60)]
    assert found.sum() / area.sum() == pytest.approx(0.05, rel=0.1)


# --- which of them ---


def test_masks_of_types_do_for_any_picture():
    real = {PAIR: [("a", box(3, 4, 9, 20)), ("b", box(2, 2, 6, 12))]}
    source = AugmentedMasks(real, rules_of(real))
    found, same = draw(source), source.draw(PAIR, np.random.default_rng(0), np.ones(SIZE, bool))
    assert np.array_equal(found.mask, same.mask)
    assert found.source == same.source


def test_a_path_is_a_list_of_boxes_drawn_masks_or_masks_of_types(tmp_path):
    def read(path, names=(NAME, "other.png"), rules=None):
        return read_placed(path, names, [PAIR], rules or {}, 100)

    assert isinstance(read(listed(tmp_path)), Boxes)
    write(tmp_path / "drawn", np.full(SIZE, 255, np.uint8))
    drawn = read(tmp_path / "drawn")
    assert isinstance(drawn, DrawnMasks)
    assert drawn.threshold == 100
    write_whole(tmp_path / "types/tile/crack/00000.png", png(box(0, 0, 20, 29)))
    plain = read(tmp_path / "types")
    assert isinstance(plain, MaskFolder)
    assert draw(plain).mask.sum() == 20 * 29, "without real masks any will do"
    strict = read(tmp_path / "types", rules={PAIR: MaskRules(0.1, 0.2, 1 / 3), ("tile", "hole"): MaskRules(0, 1, 1)})
    assert draw(strict).rejected == {"too large": 20}
    with pytest.raises(DataError, match=r"has no masks.* has its name, such as .*drawn/good/other\.png"):
        read(tmp_path / "drawn", names=["good/other.png"])
    with pytest.raises(DataError, match="is no folder of masks"):
        read(tmp_path / "nowhere")


def test_masks_may_be_there_for_some_pictures_only(tmp_path):
    names = [NAME, "other.png"]
    write(tmp_path / "drawn", np.full(SIZE, 255, np.uint8))
    assert with_masks(tmp_path / "drawn", names) == {NAME}
    assert with_masks(listed(tmp_path, f"{NAME},0,0,1,1", "photo.png,0,0,1,1"), names) == {NAME}
    with pytest.raises(DataError, match=r"has no box of other\.png; it has photo\.png"):
        with_masks(listed(tmp_path, "photo.png,0,0,1,1"), names)
    write_whole(tmp_path / "types/tile/crack/00000.png", png(box(0, 0, 20, 29)))
    assert with_masks(tmp_path / "types", names) == set(names)


def test_masks_of_no_picture_are_found(tmp_path):
    names = [NAME, "other.png"]
    write(tmp_path / "drawn", np.full(SIZE, 255, np.uint8))
    assert strange_masks(tmp_path / "drawn", names) == []
    write_whole(tmp_path / "drawn/othre.png", png(box(3, 4, 9, 20)))
    (tmp_path / "drawn/._other.png").write_bytes(b"of another system")
    assert strange_masks(tmp_path / "drawn", names) == ["othre.png"]
    assert strange_masks(listed(tmp_path, f"{NAME},0,0,1,1", "photo.png,0,0,1,1"), names) == ["photo.png"]
    write_whole(tmp_path / "types/tile/crack/00000.png", png(box(0, 0, 20, 29)))
    assert strange_masks(tmp_path / "types", names) == [], "masks of a type do for any picture"


def test_types_with_a_slash_have_a_folder_without(tmp_path):
    write_whole(tmp_path / "mono/defective 1_3/00000.png", png(box(3, 4, 9, 20)))
    pair = ("mono", "defective 1/3")
    found = MaskFolder(tmp_path, {pair: MaskRules(0, 1, 1)}).draw(pair, np.random.default_rng(0), np.ones(SIZE, bool))
    assert np.array_equal(found.mask, box(3, 4, 9, 20))
