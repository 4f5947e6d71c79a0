"""The perceptual code against scipy's DCT and scikit-image's area average; leaks against planted ones."""

import numpy as np
import pytest
from scipy.fft import dctn
from skimage.data import astronaut, brick

from lit_defect.data.leakage import perceptual_code
from lit_defect.errors import DataError


def test_code_is_the_low_block_of_scipys_dct_of_the_area_average():
    image = brick()[:320, :480]
    average = image.reshape(32, 10, 32, 15).mean(axis=(1, 3))
    expected = dctn(average, norm="ortho")[:12, :12]
    np.testing.assert_allclose(perceptual_code(image).reshape(12, 12), expected, rtol=1e-4, atol=1e-2)


def test_colour_is_read_as_luma():
    image = astronaut()
    grey = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(perceptual_code(image), perceptual_code(grey.round().astype(np.uint8)), atol=1.0)


@pytest.mark.parametrize("shape", [(1, 1), (7, 301), (33, 31)])
def test_any_size_keeps_the_mean(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert perceptual_code(image)[0] == pytest.approx(32 * image.mean(), rel=1e-4)


@pytest.mark.parametrize("image", [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8), np.uint8)])
def test_other_arrays_are_refused(image):
    with pytest.raises(DataError, match="uint8"):
        perceptual_code(image)
