"""What each method promises: geometry, colours, the Poisson equation, the statistics of the noise."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import lil_matrix
from scipy.sparse.linalg import spsolve
from torch import Tensor
from torchvision.transforms import functional as tv

from lit_defect.anomalies import CutPaste, CutPaste3Way, CutPasteScar, LocalPseudoAnomaly, PerlinAnomaly, PoissonPatch
from lit_defect.anomalies.colour import Strengths, jitter
from lit_defect.anomalies.perlin import perlin_field, strips_of
from lit_defect.anomalies.pixels import Boxes, Pixels
from lit_defect.errors import UserError

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(height: int, width: int, count: int = 1) -> Tensor:
    """Pictures whose colour says where a pixel came from: red its row, green its column."""
    y = torch.linspace(0, 1, height)[:, None].expand(height, width)
    x = torch.linspace(0, 1, width).expand(height, width)
    return torch.stack((y, x, torch.full_like(y, 0.5))).expand(count, 3, height, width).contiguous()


def origins(picture: Tensor, mask: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(m, 2) y and x of the changed pixels, and where a ramp's colours say that they came from."""
    height, width = mask.shape[-2:]
    to = mask[0].nonzero().double().numpy()
    came = picture[:2, mask[0]].double().T.numpy() * (height - 1, width - 1)
    return to, came


def still(**others: object) -> dict:
    return {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "ssim_scope": "off", **others}


class TestCutPaste:
    def test_copies_a_rectangle_exactly(self) -> None:
        images = ramp(80, 120, 40)
        made = CutPaste(jitter=0.0)(images, seeded())
        for picture, mask, area in zip(made.images, made.masks, made.area.tolist(), strict=True):
            to, came = origins(picture, mask)
            moved = came - to
            assert np.abs(moved - moved[0].round()).max() < 1e-3
            inside = came.min() > -1e-3 and (came.max(axis=0) < (79.001, 119.001)).all()
            assert inside
            assert 0.018 < area < 0.155

    def test_areas_and_shapes_are_the_published_ones(self) -> None:
        images = torch.rand(300, 3, 64, 64, generator=seeded())
        made = CutPaste(jitter=0.1)(images, seeded(1))
        rows, columns = made.masks[:, 0].any(dim=2).sum(dim=1), made.masks[:, 0].any(dim=1).sum(dim=1)
        area, aspect = rows * columns / 64**2, columns / rows
        assert 0.019 < area.min() < 0.025
        assert 0.145 < area.max() < 0.155
        assert area.mean().item() == pytest.approx(0.085, abs=0.006)  # even, not logarithmic
        assert 0.27 < aspect.min() < 0.36
        assert 2.8 < aspect.max() < 3.7
        assert (aspect > 1).float().mean().item() == pytest.approx(0.5, abs=0.1)
        assert torch.allclose(made.area, area.float())

    def test_reaches_every_corner(self) -> None:
        make = CutPaste(area=(0.3, 0.3))
        made = make(torch.rand(400, 3, 16, 16, generator=seeded()), seeded(1))
        assert made.masks.any(dim=0)[0, [0, 0, -1, -1], [0, -1, 0, -1]].all()

    def test_scars_are_thin_and_turned_within_their_range(self) -> None:
        make = CutPasteScar(jitter=0.0, width=(3.0, 3.0), length=(60.0, 60.0), angle=45.0)
        made = make(torch.rand(200, 3, 256, 256, generator=seeded()), seeded(1))
        tilts = []
        for mask in made.masks:
            points = mask[0].nonzero().double().numpy()
            values, axes = np.linalg.eigh(np.cov(points.T))
            assert math.sqrt(12 * values[1]) == pytest.approx(60, abs=3)  # length of an even rod
            assert math.sqrt(12 * values[0]) == pytest.approx(3, abs=0.6)
            tilts.append(math.degrees(math.atan(axes[1, 1] / axes[0, 1])))
        assert -46 < min(tilts) < -40
        assert 40 < max(tilts) < 46
        assert made.area.mean().item() == pytest.approx(180 / 256**2, rel=0.02)

    def test_scars_follow_the_size_of_the_picture(self) -> None:
        small = CutPasteScar()(torch.rand(300, 3, 64, 64, generator=seeded()), seeded(1))
        large = CutPasteScar()(torch.rand(300, 3, 256, 256, generator=seeded()), seeded(1))
        assert small.area.mean().item() == pytest.approx(large.area.mean().item(), rel=0.1)

    def test_scars_that_do_not_fit_are_cut_off(self) -> None:
        make = CutPasteScar(width=(200.0, 256.0), length=(200.0, 256.0), angle=90.0, ssim_scope="patch")
        made = make(torch.rand(100, 3, 12, 90, generator=seeded()), seeded(1))
        assert made.tried_ssim.isfinite().all()
        assert (made.tried > 0).all()

    def test_three_way_is_both(self) -> None:
        images = torch.rand(6, 3, 40, 50, generator=seeded())
        make = CutPaste3Way()
        made = make(images, seeded(1))
        uniforms = torch.rand(6, make.uniforms_of_picture, generator=seeded(1), dtype=torch.float64)
        patches, scars = CutPaste(), CutPasteScar()
        assert torch.equal(made.images[:6], patches.generate(images, uniforms[:, : patches.uniforms]).images)
        assert torch.equal(made.images[6:], scars.generate(images, uniforms[:, patches.uniforms :]).images)
        assert made.kind.tolist() == [1] * 6 + [2] * 6
        assert (made.area[:6] > made.area[6:]).all()


class TestLocal:
    def test_is_a_small_turn_and_shift(self) -> None:
        """A ramp is linear, so reading between pixels is exact: the map from target to source is a rotation."""
        images = ramp(100, 100, 60)
        made = LocalPseudoAnomaly(**still(area=(0.02, 0.1), angle=15.0, shift=0.05))(images, seeded())
        turns = []
        for picture, mask in zip(made.images, made.masks, strict=True):
            to, came = origins(picture, mask)
            keep = ((came > 0.5) & (came < 98.5)).all(axis=1)  # away from the border, where colours repeat
            design = np.column_stack((to[keep], np.ones(keep.sum())))
            found, *_ = np.linalg.lstsq(design, came[keep], rcond=None)
            assert np.abs(design @ found - came[keep]).max() < 1e-3
            turn = found[:2]
            assert np.abs(turn @ turn.T - np.eye(2)).max() < 1e-3
            assert np.linalg.det(turn) == pytest.approx(1, abs=1e-3)
            turns.append(math.degrees(math.atan2(turn[1, 0], turn[0, 0])))
            if mask[0, [0, -1]].any() or mask[0, :, [0, -1]].any():
                continue  # clipped by the border: its middle is not the patch's
            middle = (to.min(axis=0) + to.max(axis=0)) / 2
            assert np.abs(np.append(middle, 1) @ found - middle).max() < 5 + 1.5
        assert -15.1 < min(turns) < -10
        assert 10 < max(turns) < 15.1

    def test_something_of_the_patch_stays_in_the_picture(self) -> None:
        make = LocalPseudoAnomaly(area=(0.001, 0.9), aspect=(0.02, 50.0), shift=0.5, angle=0.0)
        for turn in (0.0, 90.0):
            make.angle = turn
            made = make(torch.rand(300, 3, 12, 20, generator=seeded()), seeded(1))
            assert made.tried_ssim.isfinite().all()
            assert (made.tried > 0).all()

    def test_no_empty_corners(self) -> None:
        """A turned patch of a plain picture cannot be seen at all."""
        images = torch.full((20, 3, 64, 64), 0.7)
        made = LocalPseudoAnomaly(**still(angle=180.0, area=(0.05, 0.15)))(images, seeded())
        assert torch.equal(made.images, images)
        assert not made.masks.any()
        assert not made.accepted.any()
        assert (made.area > 0.02).all()

    def test_areas_are_even_on_a_logarithmic_scale(self) -> None:
        images = torch.rand(600, 3, 64, 64, generator=seeded())
        made = LocalPseudoAnomaly(**still(area=(0.005, 0.15), shift=0.0, angle=0.0, contrast=0.9))(images, seeded(1))
        place = (made.area.log() - math.log(0.005)) / math.log(0.15 / 0.005)
        counts = torch.histc(place, bins=4, min=0, max=1)
        assert place.min() > -0.06
        assert place.max() < 1.02
        assert (counts > 110).all()

    def test_a_half_turn_is_exact(self) -> None:
        images = torch.rand(1, 3, 32, 32, generator=seeded())
        strips = LocalPseudoAnomaly(**still(angle=0.0, shift=0.0, brightness=0.5))(images, seeded(3))
        rows, columns = strips.masks[0, 0].any(1).nonzero().flatten(), strips.masks[0, 0].any(0).nonzero().flatten()
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        ratio = strips.images[0, :, top:bottom, left:right] / images[0, :, top:bottom, left:right]
        assert ratio[strips.images[0, :, top:bottom, left:right] < 1].std() < 1e-5  # in place, only brighter or darker


class TestColour:
    """Against torchvision, on colours that nothing clamps."""

    values = 0.35 + 0.3 * torch.rand(3, 8, 9, generator=seeded())

    def changed(self, number: int, strength: float) -> Tensor:
        """The patch with one of the four changed as far up as it goes."""
        zero = torch.zeros(1, dtype=torch.int64)
        pixels = Pixels(Boxes(zero, zero, zero + 8, zero + 9), zero, torch.Size((1, 3, 8, 9)), CPU)
        strengths = Strengths(*(strength if index == number else 0.0 for index in range(4)))
        return jitter(self.values.flatten(1), pixels, torch.ones(1, 4, dtype=torch.float64), strengths).view(3, 8, 9)

    @pytest.mark.parametrize(
        ("number", "adjust"), [(0, tv.adjust_brightness), (1, tv.adjust_contrast), (2, tv.adjust_saturation)]
    )
    def test_factors(self, number: int, adjust: object) -> None:
        # torchvision's grey has four digits, as ours has three
        expected = adjust(self.values, 1.2)  # type: ignore[operator]
        assert torch.allclose(self.changed(number, 0.2), expected, atol=2e-4)

    def test_hue_turns_chroma_and_keeps_luma(self) -> None:
        luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        grey = (luma * self.values).sum(0)
        turned = self.changed(3, 0.25)
        assert torch.allclose((luma * turned).sum(0), grey, atol=1e-5)
        assert torch.allclose(self.changed(3, 0.5), 2 * grey - self.values, atol=1e-5)  # the complement
        i, q = torch.tensor([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]) @ self.values.flatten(1)
        j, r = torch.tensor([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]) @ turned.flatten(1)
        assert torch.allclose(i**2 + q**2, j**2 + r**2, atol=1e-4)
        assert torch.allclose(i * j + q * r, torch.zeros(72), atol=1e-4)  # a quarter of a turn

    def test_nothing_changes_nothing(self) -> None:
        assert torch.equal(self.changed(0, 0.0), self.values)


@pytest.mark.parametrize("gradients", ["source", "mixed"])
def test_poisson_equals_a_direct_solution(gradients: str) -> None:
    images = torch.rand(5, 3, 30, 41, generator=seeded())
    images = 0.4 + 0.2 * images  # nothing is clamped
    make = PoissonPatch(ssim_scope="off", gradients=gradients, area=(0.01, 0.3))  # type: ignore[arg-type]
    uniforms = torch.rand(5, make.uniforms, generator=seeded(2), dtype=torch.float64)
    edit = make.edit(images, torch.arange(5), uniforms)
    begin = 0
    for number in range(5):
        top, left, bottom, right = (int(side[number]) for side in edit.pixels.boxes)
        height, width = bottom - top, right - left
        from_top = 1 + min(int(uniforms[number, 2] * (30 - height - 1)), 30 - height - 2)
        from_left = 1 + min(int(uniforms[number, 3] * (41 - width - 1)), 41 - width - 2)
        target = images[number].double().numpy()
        source = np.roll(target, (top - from_top, left - from_left), axis=(1, 2))
        ours = edit.values[:, begin : begin + height * width].view(3, height, width).numpy()
        begin += height * width
        for channel in range(3):
            direct = solve_directly(target[channel], source[channel], (top, left, bottom, right), gradients == "mixed")
            assert np.abs(ours[channel] - direct).max() < 1e-5


def solve_directly(target: np.ndarray, source: np.ndarray, box: tuple[int, int, int, int], mixed: bool) -> np.ndarray:
    """Pérez et al., eq. 7, one row of a sparse matrix for each pixel."""
    top, left, bottom, right = box
    height, width = bottom - top, right - left
    matrix, known = lil_matrix((height * width, height * width)), np.zeros(height * width)
    for y in range(top, bottom):
        for x in range(left, right):
            row = (y - top) * width + x - left
            matrix[row, row] = 4
            for other_y, other_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                guide, own = source[y, x] - source[other_y, other_x], target[y, x] - target[other_y, other_x]
                known[row] += own if mixed and abs(own) > abs(guide) else guide
                if top <= other_y < bottom and left <= other_x < right:
                    matrix[row, (other_y - top) * width + other_x - left] = -1
                else:
                    known[row] += target[other_y, other_x]
    return spsolve(matrix.tocsr(), known).reshape(height, width)


class TestPerlin:
    def field(self, count: int, *, cells: float, seed: int = 0) -> Tensor:
        uniforms = torch.rand(count, 6, generator=seeded(seed), dtype=torch.float64)
        uniforms[:, :2] = cells
        return perlin_field(uniforms, 128, 128, CPU)

    def test_mean_and_variance(self) -> None:
        # Unit gradients of random direction: E n^2 = 2 E sum_c w_c^2 |d_c|^2 / 2, over the places in a cell
        t = (np.arange(1000) + 0.5) / 1000
        fade = 6 * t**5 - 15 * t**4 + 10 * t**3
        weight = [(1 - fade) ** 2, fade**2]
        expected = sum(
            np.mean(weight[a][:, None] * weight[b] * ((t[:, None] - a) ** 2 + (t - b) ** 2))
            for a in (0, 1)
            for b in (0, 1)
        )
        field = self.field(64, cells=0.99)
        assert field.mean().item() == pytest.approx(0, abs=0.002)
        assert field.square().mean().item() == pytest.approx(expected, rel=0.02)
        assert field.abs().max() < 1.5

    def test_is_nought_at_the_corners_of_cells_and_smooth_between(self) -> None:
        uniforms = torch.tensor([[0.99, 0.99, 0.5, 0.5, 0.5, 0.3]], dtype=torch.float64)  # 32 cells, not turned
        field = perlin_field(uniforms, 32 * 8, 32 * 8, CPU)[0]  # corners between the pixels 3 and 4 of each cell
        around = torch.stack([field[3 + a :: 8, 3 + b :: 8][:31, :31] for a in (0, 1) for b in (0, 1)])
        assert around.mean(dim=0).abs().max() < 0.02
        assert field.abs().max() > 0.5
        assert max(field.diff(dim=dim).abs().max() for dim in (0, 1)) < 0.5

    def test_cells_count_along_each_axis(self) -> None:
        uniforms = torch.tensor([[0.99, 0.4, 0.5, 0.1, 0.2, 0.3]], dtype=torch.float64)  # 32 down, 4 across
        field = perlin_field(uniforms, 128, 128, CPU)[0]
        down, across = field.diff(dim=0).square().mean(), field.diff(dim=1).square().mean()
        assert (down / across).sqrt().item() == pytest.approx(8, rel=0.3)

    def test_every_seed_is_another_field(self) -> None:
        field = self.field(16, cells=0.5).flatten(1)
        similarity = torch.corrcoef(field) - torch.eye(16)
        assert similarity.abs().max() < 0.4

    def test_there_is_always_a_region(self) -> None:
        images = torch.rand(200, 3, 48, 48, generator=seeded())
        made = PerlinAnomaly(threshold=1.0)(images, seeded(1))
        assert (made.area > 0).all()
        assert made.area.mean() < 0.1

    def test_strips_rebuild_their_masks(self) -> None:
        masks = torch.rand(5, 13, 17, generator=seeded()) < 0.4
        masks[1], masks[2] = True, False
        rebuilt = torch.zeros_like(masks)
        for region, y, left, width in zip(*(part.tolist() for part in strips_of(masks)), strict=True):
            assert not rebuilt[region, y, left : left + width].any()
            rebuilt[region, y, left : left + width] = True
        assert torch.equal(rebuilt, masks)

    def test_textures_come_from_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "more").mkdir()
        Image.new("RGB", (30, 20), (255, 0, 0)).save(tmp_path / "red.png")
        Image.new("RGB", (30, 20), (0, 255, 0)).save(tmp_path / "more" / "green.jpg", quality=100)
        (tmp_path / "notes.txt").write_text("no picture")
        images = torch.full((20, 3, 32, 32), 0.5)
        made = PerlinAnomaly(textures=str(tmp_path), opacity=(1.0, 1.0))(images, seeded())
        colours = [
            picture[:, mask[0]].mean(dim=1).round().tolist()
            for picture, mask in zip(made.images, made.masks, strict=True)
        ]
        assert {tuple(colour) for colour in colours} == {(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)}

    def test_a_broken_texture_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(b"no picture")
        make = PerlinAnomaly(textures=str(tmp_path))
        with pytest.raises(UserError, match=r"broken.png.*anomaly.init_args.textures"):
            make(torch.rand(1, 3, 32, 32), seeded())
