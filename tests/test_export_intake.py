"""The scaling inside an exported model is Pillow's, byte for byte, and the enlarging of maps is that of `predict`."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch

from lit_defect.data.images import resize_image
from lit_defect.export.intake import Intake, scaled, scaled_bytes
from lit_defect.scoring.maps import _resampling, _resampling_graph
from lit_defect.tasks.views import resize

SIZES = [(300, 300), (37, 501), (501, 37), (64, 64), (120, 97), (97, 120), (373, 248), (33, 33), (2, 3), (257, 130)]


def noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)


def channels_first(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.mark.parametrize("wanted", [(128, 128), (64, 64), (96, 161), (33, 20)])
@pytest.mark.parametrize("size", SIZES)
def test_bytes_are_pillows(size, wanted):
    pixels = noise(size)
    found = scaled_bytes(channels_first(pixels), wanted)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, resize_image(pixels, wanted))


def test_bytes_are_pillows_where_the_size_is_left_open(tmp_path):
    """Traced once, for all sizes: tall pictures too, of which Pillow may scale the columns first."""
    axes = {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    example = torch.zeros(1, 77, 91, 3, dtype=torch.uint8)
    graph = torch.export.export(Intake((64, 48), None), (example,), dynamic_shapes={"pictures": axes})
    torch.onnx.export(graph, dynamo=True, verbose=False, dynamic_shapes={"pictures": axes}).save(tmp_path / "m.onnx")
    traced, session = graph.module(), onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for size in (*SIZES, (64, 48), (200, 60), (64, 50), (70, 48)):
        pixels = noise(size)
        expected = resize_image(pixels, (64, 48)).transpose(2, 0, 1)[None]
        np.testing.assert_array_equal(traced(torch.from_numpy(pixels)[None]), expected)
        np.testing.assert_array_equal(session.run(None, {"pictures": pixels[None]})[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_floats_are_scaled_as_the_tasks_do(size):
    images = channels_first(noise(size)).float() / 255
    torch.testing.assert_close(scaled(images, (40, 56)), resize(images, (40, 56)), atol=4e-6, rtol=0)


@pytest.mark.parametrize(
    ("n", "size", "sigma"), [(8, 64, 1.0), (8, 40, 2.5), (5, 37, 4.7), (12, 12, 0.3), (7, 50, 0.0)]
)
def test_maps_are_enlarged_alike_in_a_graph(n, size, sigma):
    torch.testing.assert_close(_resampling_graph(n, size, sigma), _resampling(n, size, sigma), atol=1e-12, rtol=0)
