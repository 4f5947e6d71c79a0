"""Pictures and masks come in upright and 8-bit, or are refused with a reason."""

import numpy as np
import pytest
from PIL import Image

from lit_defect.data.images import (
    BoxError,
    ImageError,
    MissingFileError,
    TooLargeError,
    TruncatedError,
    WrongModeError,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
)

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(path, picture, **kwargs):
    picture.save(path, **kwargs)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_grey_and_colour_are_read_as_they_are(tmp_path, suffix):
    grey = saved(tmp_path / f"g{suffix}", Image.fromarray(GREY))
    colour = saved(tmp_path / f"c{suffix}", Image.fromarray(COLOUR))
    np.testing.assert_array_equal(read_image(grey), np.stack([GREY] * 3, axis=2))
    np.testing.assert_array_equal(read_image(colour), COLOUR)


def test_bilevel_becomes_black_and_white_and_opaque_palette_its_colours(tmp_path):
    bits = GREY > 127
    path = saved(tmp_path / "b.png", Image.fromarray(bits))
    np.testing.assert_array_equal(read_image(path)[..., 0], bits * 255)
    palette = Image.fromarray((GREY % 3).astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    np.testing.assert_array_equal(read_image(saved(tmp_path / "p.png", palette)), colours[GREY % 3])


def test_box_then_mirror(tmp_path):
    path = saved(tmp_path / "c.png", Image.fromarray(COLOUR))
    np.testing.assert_array_equal(read_image(path, box=(2, 1, 4, 3), mirror=True), COLOUR[1:4, 2:6][:, ::-1])
    for box in [(6, 0, 4, 3), (-1, 0, 4, 3), (0, 0, 0, 3), (0, 4, 4, 3)]:
        with pytest.raises(BoxError, match="9x6"):
            read_image(path, box=box)


def test_sixteen_bits_are_refused_or_scaled_from_the_full_range(tmp_path):
    deep = np.array([[0, 1, 128, 257, 32768, 65535]], dtype=np.uint16)
    for suffix in (".png", ".tif"):
        path = saved(tmp_path / f"deep{suffix}", Image.fromarray(deep))
        with pytest.raises(WrongModeError, match="16 bits"):
            read_image(path)
        np.testing.assert_array_equal(read_image(path, convert=True)[0, :, 0], np.rint(deep[0] / 257))


def test_floating_point_is_scaled_only_when_white_is_known(tmp_path):
    path = saved(tmp_path / "f.tif", Image.fromarray(np.array([[0, 0.5, 1]], np.float32)))
    with pytest.raises(WrongModeError, match="mode F"):
        read_image(path)
    np.testing.assert_array_equal(read_image(path, convert=True)[0, :, 0], [0, 128, 255])
    other = saved(tmp_path / "g.tif", Image.fromarray(np.array([[0, 300.0]], np.float32)))
    with pytest.raises(WrongModeError, match="white is unknown"):
        read_image(other, convert=True)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette"])
def test_transparency_is_laid_over_black(tmp_path, mode):
    path = tmp_path / "t.png"
    if mode == "palette":
        picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        picture.putpalette([200, 100, 50, 40, 80, 120])
        picture.save(path, transparency=0)
        expected = [[0, 0, 0], [40, 80, 120]]
    elif mode == "LA":
        Image.fromarray(np.array([[[200, 0], [100, 255]]], np.uint8), "LA").save(path)
        expected = [[0, 0, 0], [100, 100, 100]]
    else:
        Image.fromarray(np.array([[[200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)).save(path)
        expected = [[0, 0, 0], [40, 20, 10]]
    with pytest.raises(WrongModeError, match="transparency"):
        read_image(path)
    np.testing.assert_array_equal(read_image(path, convert=True)[0], expected)


def test_cmyk_is_refused_or_converted(tmp_path):
    path = saved(tmp_path / "c.tif", Image.new("CMYK", (3, 2), (0, 255, 255, 0)))
    with pytest.raises(WrongModeError, match="CMYK"):
        read_image(path)
    np.testing.assert_array_equal(read_image(path, convert=True), np.full((2, 3, 3), [255, 0, 0]))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_exif_orientation_is_refused_or_turned_upright(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    stored = np.zeros((16, 32), np.uint8)
    stored[:, :16] = 255
    path = saved(tmp_path / f"e{suffix}", Image.fromarray(stored), exif=exif, quality=100)
    with pytest.raises(WrongModeError, match="orientation 6"):
        read_image(path)
    upright = read_image(path, convert=True)[..., 0]
    np.testing.assert_array_equal(upright > 127, np.rot90(stored, -1) > 127)


def test_missing_truncated_and_foreign_files_are_told_apart(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ImageError, match="not a readable picture") as caught:
        read_image(tmp_path / "text.png")
    assert caught.value.kind == "unreadable"
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8))
    for suffix in (".png", ".jpg"):
        path = saved(tmp_path / f"whole{suffix}", noise)
        path.write_bytes(path.read_bytes()[:-900])
        with pytest.raises(TruncatedError):
            read_image(path)


def test_mask_keeps_stored_values(tmp_path):
    indices = (GREY % 4).astype(np.uint8)
    palette = Image.fromarray(indices, "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    np.testing.assert_array_equal(read_mask(saved(tmp_path / "p.png", palette)), indices)
    bits = saved(tmp_path / "b.png", Image.fromarray(GREY > 127))
    np.testing.assert_array_equal(read_mask(bits, box=(1, 2, 3, 2), mirror=True), (GREY > 127)[2:4, 1:4][:, ::-1])
    equal = saved(tmp_path / "e.png", Image.fromarray(np.stack([indices] * 3, axis=2)))
    np.testing.assert_array_equal(read_mask(equal), indices)


def test_mask_refuses_colours_and_large_values(tmp_path):
    with pytest.raises(WrongModeError, match="one channel"):
        read_mask(saved(tmp_path / "c.png", Image.fromarray(COLOUR)))
    with pytest.raises(WrongModeError, match="from 0 to 255"):
        read_mask(saved(tmp_path / "d.png", Image.fromarray(np.full((2, 2), 300, np.uint16))))


def test_mask_refuses_what_is_turned_or_blurred(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with pytest.raises(WrongModeError, match="EXIF orientation 6"):
        read_mask(saved(tmp_path / "t.png", Image.fromarray(GREY), exif=exif))
    with pytest.raises(WrongModeError, match="JPEG blurs"):
        read_mask(saved(tmp_path / "m.jpg", Image.fromarray(GREY)))


def test_an_empty_and_a_too_large_file_say_so(tmp_path, monkeypatch):
    (tmp_path / "e.png").touch()
    with pytest.raises(TruncatedError, match=r"e.png: the file is empty"):
        read_image(tmp_path / "e.png")
    path = saved(tmp_path / "l.png", Image.fromarray(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size - 1)
    read_image(path)  # over Pillow's warning, below its limit: no warning
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size // 2 - 1)
    with pytest.raises(TooLargeError, match="54 pixels"):
        read_image(path)


def test_resize_averages_when_it_shrinks_and_masks_get_no_new_values():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = resize_image(stripes, (8, 8))
    assert small.shape == (8, 8)
    assert abs(small.astype(int) - 127).max() <= 40  # without antialiasing it would be all 0 or all 255
    assert resize_image(COLOUR, (3, 5)).shape == (3, 5, 3)
    assert set(np.unique(resize_mask((GREY % 4).astype(np.uint8), (13, 5)))) <= {0, 1, 2, 3}
