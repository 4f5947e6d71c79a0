"""Boxes worked out by hand, and pictures that come back as they went."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lit_defect.editing.frames import Frame
from lit_defect.errors import UserError


def mask_of(shape: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[rows, columns] = True
    return mask


def picture_of(shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def frame_of(shape: tuple[int, int], mask: np.ndarray | None = None, **told: Any) -> Frame:
    options: dict[str, Any] = {"area": "only_masked", "padding": 0, "size": None, "multiple": 8, **told}
    return Frame.of(shape, mask, **options)


def ends(frame: Frame) -> tuple[int, int, int, int]:
    rows, columns = frame.box
    return rows.start, rows.stop, columns.start, columns.stop


def test_the_whole_picture_is_padded_to_what_the_network_takes() -> None:
    frame = frame_of((50, 64), area="whole")
    assert (ends(frame), frame.inner, frame.padded) == ((0, 50, 0, 64), (50, 64), (56, 64))


@pytest.mark.parametrize("mask", [None, mask_of((50, 64), slice(3, 5), slice(3, 5))])
def test_the_whole_picture_does_not_look_at_the_mask(mask: np.ndarray | None) -> None:
    assert ends(frame_of((50, 64), mask, area="whole", padding=9)) == (0, 50, 0, 64)


@pytest.mark.parametrize(
    ("rows", "columns", "padding", "size", "box"),
    [
        (slice(40, 50), slice(60, 90), 0, None, (40, 50, 60, 90)),
        (slice(40, 50), slice(60, 90), 8, None, (32, 58, 52, 98)),
        (slice(0, 10), slice(180, 200), 8, None, (0, 18, 172, 200)),  # cut at the picture's border
        (slice(40, 50), slice(60, 90), 0, (64, 64), (30, 60, 60, 90)),  # 20 rows more, 10 on each side
        (slice(40, 51), slice(60, 90), 0, (64, 64), (31, 61, 60, 90)),  # 19: the smaller half above
        (slice(40, 50), slice(60, 70), 5, (64, 128), (35, 55, 45, 85)),  # 20 x 20 to 20 x 40
        (slice(40, 50), slice(60, 91), 0, (64, 96), (35, 55, 60, 91)),  # to 20 of 20.7 rows
        (slice(0, 10), slice(60, 90), 0, (64, 64), (0, 30, 60, 90)),  # shifted down
        (slice(90, 100), slice(60, 90), 0, (64, 64), (70, 100, 60, 90)),  # shifted up
        (slice(10, 90), slice(190, 200), 0, (64, 64), (10, 90, 120, 200)),  # shifted left
        (slice(10, 20), slice(20, 180), 0, (64, 64), (0, 100, 20, 180)),  # 160 rows are not there
        (slice(0, 100), slice(0, 200), 32, (64, 64), (0, 100, 0, 200)),
        (slice(7, 8), slice(9, 10), 0, None, (7, 8, 9, 10)),
    ],
)
def test_boxes_of_a_picture_of_100_by_200(
    rows: slice, columns: slice, padding: int, size: Any, box: tuple[int, int, int, int]
) -> None:
    mask = mask_of((100, 200), rows, columns)
    assert ends(frame_of((100, 200), mask, padding=padding, size=size)) == box


def test_parts_of_a_mask_share_a_box() -> None:
    mask = mask_of((100, 200), slice(10, 12), slice(20, 22)) | mask_of((100, 200), slice(70, 75), slice(150, 151))
    assert ends(frame_of((100, 200), mask)) == (10, 75, 20, 151)


@pytest.mark.parametrize(
    ("shape", "size", "inner"),
    [
        ((100, 100), (512, 512), (512, 512)),
        ((100, 200), (512, 512), (256, 512)),  # the aspect is kept
        ((200, 100), (64, 128), (64, 32)),
        ((101, 75), (512, 384), (512, 384)),  # less than a pixel of the picture is no reason to pad
        ((103, 100), (512, 512), (512, 497)),
        ((1000, 1), (64, 64), (64, 1)),
    ],
)
def test_a_part_keeps_its_aspect_within_the_working_size(shape: Any, size: Any, inner: Any) -> None:
    frame = frame_of(shape, area="whole", size=size)
    assert (frame.inner, frame.padded) == (inner, size)


@pytest.mark.parametrize("shape", [(48, 64), (50, 61), (7, 3), (1, 1)])
def test_a_picture_comes_back_bit_for_bit_where_nothing_is_resized(shape: tuple[int, int]) -> None:
    picture = picture_of(shape)
    frame = frame_of(shape, area="whole", multiple=16)
    cut = frame.cut(picture)
    assert cut.shape == (*frame.padded, 3)
    assert frame.padded[0] % 16 == frame.padded[1] % 16 == 0
    assert cut.dtype == np.float32
    assert np.array_equal(np.rint(frame.back(cut) * 255), picture)
    assert np.array_equal(frame.back(cut), (picture / 255).astype(np.float32))


def test_a_box_comes_back_bit_for_bit_to_its_place() -> None:
    picture, mask = picture_of((60, 80)), mask_of((60, 80), slice(31, 44), slice(70, 80))
    frame = frame_of((60, 80), mask, padding=3)
    assert np.array_equal(np.rint(frame.back(frame.cut(picture)) * 255), picture[28:47, 67:80])


def test_what_is_missing_is_mirrored_and_not_masked() -> None:
    picture, frame = picture_of((10, 12)), frame_of((10, 12), area="whole")
    cut = frame.cut(picture)
    assert np.array_equal(cut[10:16], cut[4:10][::-1])
    assert np.array_equal(cut[:, 12:16], cut[:, 8:12][:, ::-1])
    mask = frame.cut_mask(np.ones((10, 12), dtype=bool))
    assert mask.shape == (16, 16)
    assert mask[:10, :12].all()
    assert mask.sum() == 120


def test_a_small_box_is_enlarged_and_comes_back_nearly_as_it_was() -> None:
    rows, columns = np.mgrid[:90, :120]
    picture = np.stack([rows, columns, rows + columns], axis=2).astype(np.uint8)
    mask = mask_of((90, 120), slice(40, 60), slice(50, 80))
    frame = frame_of((90, 120), mask, size=(128, 128))
    cut = frame.cut(picture)
    assert cut.shape == (128, 128, 3)
    assert (ends(frame), frame.inner) == ((35, 65, 50, 80), (128, 128))
    # A pixel of the box is 128 / 30 of the working size: its middle is where it should be.
    assert cut[63:65, 63:65, 0].mean() * 255 == pytest.approx(49.5, abs=0.2)
    assert cut[63:65, 63:65, 1].mean() * 255 == pytest.approx(64.5, abs=0.2)
    back = frame.back(cut) * 255
    assert back.shape == (30, 30, 3)
    assert np.abs(back - picture[35:65, 50:80])[2:-2, 2:-2].max() < 0.5


def test_padding_of_a_resized_part_does_not_come_back() -> None:
    frame = frame_of((20, 40), area="whole", size=(64, 64))
    generated = np.full((64, 64, 3), 0.9, dtype=np.float32)
    generated[:32] = 0.25
    back = frame.back(generated)
    assert back.shape == (20, 40, 3)
    assert np.allclose(back, 0.25)


def test_masks_are_resized_and_small_parts_stay() -> None:
    mask = mask_of((64, 64), slice(16, 32), slice(16, 48))
    mask[60, 60] = True
    frame = frame_of((64, 64), area="whole", size=(16, 16))
    cut = frame.cut_mask(mask)
    assert cut.dtype == bool
    assert cut[4:8, 4:12].all()
    assert cut[15, 15]
    assert cut.sum() == 33
    larger = frame_of((64, 64), area="whole", size=(128, 128)).cut_mask(mask)
    assert larger[32:64, 32:96].all()
    assert larger[120:122, 120:122].all()
    assert larger.sum() == mask.sum() * 4


def test_resized_values_stay_between_0_and_1() -> None:
    picture = np.zeros((20, 20, 3), dtype=np.uint8)
    picture[:, 10:] = 255
    cut = frame_of((20, 20), area="whole", size=(64, 64)).cut(picture)
    assert cut.min() == 0
    assert cut.max() == 1


@pytest.mark.parametrize(
    ("size", "near"), [((500, 512), [496, 512]), ((512, 3), [512, 8]), ((0, 512), [8, 512]), ((509, 515), [512, 512])]
)
def test_a_size_that_does_not_fit_names_the_nearest(size: Any, near: list[int]) -> None:
    with pytest.raises(UserError) as problem:
        frame_of((100, 100), area="whole", size=size)
    assert "model.init_args.edit.size" in str(problem.value)
    assert str(problem.value).endswith(f"the nearest is {near}")


@pytest.mark.parametrize(
    ("mask", "said"), [(None, "there is no mask"), (np.zeros((100, 100), dtype=bool), "a mask is empty")]
)
def test_only_masked_without_a_mask_is_an_error(mask: np.ndarray | None, said: str) -> None:
    with pytest.raises(UserError, match=rf"edit.area = only_masked: {said}; set .*edit.masks"):
        frame_of((100, 100), mask)
