from collections.abc import Callable

import jsonargparse
import numpy as np
import pytest
import torch
from skimage import data
from torch import Tensor

from lit_defect.anomalies import (
    CutPaste,
    CutPaste3Way,
    CutPasteScar,
    LocalPseudoAnomaly,
    MixedAnomaly,
    PerlinAnomaly,
    PoissonPatch,
    PseudoAnomalies,
    PseudoAnomaly,
    base,
    explain_rejection,
    ssim,
)
from lit_defect.errors import UserError

KINDS = [LocalPseudoAnomaly, CutPaste, CutPasteScar, CutPaste3Way, PerlinAnomaly, PoissonPatch]


class Mixed(MixedAnomaly):
    """Two makers that take the same settings."""

    def __init__(self, **settings: object) -> None:
        super().__init__([LocalPseudoAnomaly(**settings), PerlinAnomaly(**settings)])  # type: ignore[arg-type]


EVERY = [*KINDS, Mixed]
SCOPES = ["image", "patch", "off"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def photographs(height: int = 64, width: int = 64) -> Tensor:
    """(4, 3, height, width): a colour picture and three grey ones."""
    arrays = [
        data.coffee()[100:, 100:],
        *(np.repeat(getattr(data, n)()[..., None], 3, 2) for n in ("brick", "grass", "gravel")),
    ]
    return torch.stack([torch.from_numpy(a[:height, :width].copy()).permute(2, 0, 1).float() / 255 for a in arrays])


def sources(images: Tensor, made: PseudoAnomalies) -> Tensor:
    return images.repeat(len(made.images) // len(images), 1, 1, 1)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", EVERY)
class TestEveryKind:
    def test_masks_are_what_differs(self, kind: type[PseudoAnomaly], scope: str) -> None:
        images = photographs(60, 84)
        kept = images.clone()
        for seed in range(3):
            made = kind(ssim_scope=scope)(images, seeded(seed))
            differs = made.images != sources(images, made)
            assert torch.equal(made.masks, differs.any(dim=1, keepdim=True))
            # nothing changes by less than half a grey level
            change = (made.images - sources(images, made)).abs().amax(dim=1, keepdim=True)
            assert change[made.masks].min() >= 0.5 / 255
            assert made.images.min() >= 0
            assert made.images.max() <= 1
        assert torch.equal(images, kept)

    def test_shapes_and_types(self, kind: type[PseudoAnomaly], scope: str) -> None:
        images = photographs()
        made = kind(ssim_scope=scope, candidates=3)(images, seeded())
        rows, tries = 4 * kind.kinds, 1 if scope == "off" else 3
        assert made.images.shape == (rows, 3, 64, 64)
        assert made.masks.shape == (rows, 1, 64, 64)
        assert [made.ssim.shape, made.accepted.shape, made.area.shape] == [(rows,)] * 3
        assert made.tried.shape == made.tried_ssim.shape == (rows, tries)
        numbers = {name: tensor.dtype for name, tensor in made._asdict().items()}
        assert (numbers.pop("masks"), numbers.pop("accepted"), numbers.pop("kind")) == (
            torch.bool,
            torch.bool,
            torch.int64,
        )
        assert set(numbers.values()) == {torch.float32}
        assert made.kind.tolist() == [1 + row // 4 for row in range(rows)]
        share = made.masks.float().mean(dim=(1, 2, 3))
        assert (share <= made.area + 1e-6).all()
        assert (share > 0.5 * made.area)[made.accepted].all()

    def test_same_seed_whatever_the_batch_size(self, kind: type[PseudoAnomaly], scope: str) -> None:
        images = photographs(48, 64).repeat(2, 1, 1, 1)
        make = kind(ssim_scope=scope)
        whole = make(images, seeded(5))
        generator = seeded(5)
        parts = [make(part, generator) for part in (images[:1], images[1:4], images[4:])]
        for name, value in whole._asdict().items():
            by_kind = [getattr(part, name).chunk(kind.kinds) for part in parts]
            joined = torch.cat([part[number] for number in range(kind.kinds) for part in by_kind])
            assert torch.equal(value, joined) or value.isnan().all(), name

    def test_same_seed_whatever_the_memory(
        self, kind: type[PseudoAnomaly], scope: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        images = photographs(48, 48)
        whole = kind(ssim_scope=scope)(images, seeded())
        monkeypatch.setattr(base, "_AT_ONCE", 1)
        assert torch.equal(kind(ssim_scope=scope)(images, seeded()).images, whole.images)

    def test_a_grey_picture_stays_grey(self, kind: type[PseudoAnomaly], scope: str) -> None:
        made = kind(ssim_scope=scope)(photographs()[1:], seeded())
        assert (made.images - made.images[:, :1]).abs().max() < 1e-5

    def test_constant_pictures(self, kind: type[PseudoAnomaly], scope: str) -> None:
        flat = torch.tensor([0.0, 0.5, 1.0])[:, None, None, None].expand(3, 3, 32, 32)
        made = kind(ssim_scope=scope)(flat, seeded())
        assert made.images.isfinite().all()
        if scope != "off":
            assert not made.tried_ssim.isnan().any()
        unchanged = ~made.masks.flatten(1).any(dim=1)
        assert not made.accepted[unchanged].any()
        assert torch.equal(made.images[unchanged], sources(flat, made)[unchanged])

    def test_smallest_pictures(self, kind: type[PseudoAnomaly], scope: str) -> None:
        make = kind(ssim_scope=scope)
        for size in ((11, 11), (11, 47), (90, 12)):
            made = make(torch.rand(3, 3, *size, generator=seeded()), seeded(1))
            assert made.images.isfinite().all()
        if scope == "off":
            make(torch.rand(50, 3, 3, 3, generator=seeded()), seeded(1))
            with pytest.raises(UserError, match="2x20 are too small to be edited"):
                make(torch.rand(2, 3, 2, 20), seeded())
        else:
            with pytest.raises(UserError, match=r"10x20 .*11x11.*data.init_args.image_size"):
                make(torch.rand(2, 3, 10, 20), seeded())

    def test_autocast_and_memory_format_change_nothing(self, kind: type[PseudoAnomaly], scope: str) -> None:
        images = photographs()
        plain = kind(ssim_scope=scope)(images, seeded())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made = kind(ssim_scope=scope)(images.to(memory_format=torch.channels_last), seeded())
        for ours, theirs in zip(plain, made, strict=True):
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("kind", EVERY)
def test_refuses_bad_pictures(kind: type[PseudoAnomaly]) -> None:
    make, images = kind(), photographs()
    for value in (torch.nan, 1.5, -0.1, torch.inf):
        bad = images.clone()
        bad[3, 1, -1, -1] = value
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            make(bad, seeded())
    for wrong in (images.to(torch.uint8), images[0], images[:, :1], images[:0]):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) float32"):
            make(wrong, seeded())


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize(
    ("wrong", "value"), [("ssim_threshold", 0.0), ("ssim_threshold", 1.2), ("candidates", 0), ("ssim_scope", "box")]
)
def test_refuses_bad_settings(kind: type[PseudoAnomaly], wrong: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"model\.init_args\.anomaly\.init_args\.{wrong} = {value}"):
        kind(**{wrong: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: LocalPseudoAnomaly(area=(0.2, 0.1)), "area"),
        (lambda: LocalPseudoAnomaly(area=(0.0, 0.1)), "area"),
        (lambda: LocalPseudoAnomaly(angle=-1), "angle"),
        (lambda: LocalPseudoAnomaly(shift=0.9), "shift"),
        (lambda: LocalPseudoAnomaly(hue=0.7), "hue"),
        (lambda: CutPaste(aspect=(0.5, 2.0)), "aspect"),
        (lambda: CutPaste(jitter=2.0), "jitter"),
        (lambda: CutPasteScar(width=(5.0, 1.0)), "width"),
        (lambda: CutPaste3Way(jitter=-1.0), "jitter"),
        (lambda: PerlinAnomaly(opacity=(0.5, 1.5)), "opacity"),
        (lambda: PerlinAnomaly(textures="/nowhere"), "textures"),
        (lambda: PoissonPatch(gradients="both"), "gradients"),  # type: ignore[arg-type]
    ],
)
def test_names_the_setting_that_is_wrong(make: Callable[[], PseudoAnomaly], key: str) -> None:
    with pytest.raises(UserError, match=rf"model\.init_args\.anomaly\.init_args\.{key} = "):
        make()


class TestGate:
    def test_first_accepted_candidate_wins(self) -> None:
        images = photographs().repeat(4, 1, 1, 1)
        made = LocalPseudoAnomaly(ssim_scope="image", ssim_threshold=0.9, candidates=3)(images, seeded())
        places = set()
        for row in range(len(images)):
            below = (made.tried_ssim[row] < 0.9).nonzero().flatten().tolist()
            chosen = below[0] if below else int(made.tried_ssim[row].argmin())
            assert bool(made.accepted[row]) == bool(below)
            assert made.ssim[row] == made.tried_ssim[row, chosen]
            assert made.area[row] == made.tried[row, chosen]
            places.add(chosen if below else -1)
        assert len(places) > 2  # the first, a later one, none

    def test_reported_ssim_is_that_of_the_picture(self) -> None:
        images = photographs()
        made = CutPaste(ssim_scope="image")(images, seeded(1))
        assert torch.allclose(made.ssim, ssim(images, made.images), atol=1e-6)

    def test_more_candidates_keep_the_first_ones(self) -> None:
        """K = 1 is what is tried first with K = 4, for the first picture."""
        images = photographs()[:1]
        one = LocalPseudoAnomaly(candidates=1)(images, seeded())
        four = LocalPseudoAnomaly(candidates=4)(images, seeded())
        assert one.tried_ssim[0, 0] == four.tried_ssim[0, 0]

    @pytest.mark.parametrize("scope", ["image", "patch"])
    def test_background_is_discarded_and_the_object_is_not(self, scope: str) -> None:
        """A textured disc on a plain ground with the noise of a camera."""
        size, generator = 128, seeded()
        ground = 0.8 + torch.randn(1, 1, size, size, generator=generator).expand(-1, 3, -1, -1) * 1.5 / 255
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        disc = (y - 64) ** 2 + (x - 64) ** 2 < 30**2
        scene = torch.where(disc, photographs(size, size)[3:], ground).clamp(0, 1)
        make = CutPaste(candidates=1, ssim_scope=scope, jitter=0.0, area=(0.02, 0.05))
        # the same places on a map of the disc say where each patch came from and went
        made = make(scene.repeat(200, 1, 1, 1), seeded(1))
        on_map = CutPaste(candidates=1, ssim_scope="off", jitter=0.0, area=(0.02, 0.05))(
            disc.float().expand(200, 3, -1, -1).contiguous(), seeded(1)
        )
        # unchanged on the map: from ground to ground, or from disc to disc
        ground_only = ~on_map.masks.flatten(1).any(1) & ~(made.masks & disc).flatten(1).any(1)
        objects = on_map.masks.float().flatten(1).mean(1) > 0.01
        assert ground_only.sum() > 20
        assert objects.sum() > 20
        assert (~made.accepted[ground_only]).float().mean() > 0.95
        assert made.accepted[objects].float().mean() > 0.95

    def test_explains_what_it_discards(self) -> None:
        text = explain_rejection(torch.tensor([[0.91, 0.95, torch.nan], [0.97, 0.99, torch.nan]]), 0.5)
        assert "model.init_args.anomaly.init_args.ssim_threshold = 0.5" in text
        assert "no SSIM was measured" in explain_rejection(torch.full((2, 1), torch.nan), 0.5)
        assert "4 candidates lies between 0.910 and 0.990" in text


@pytest.mark.parametrize("kind", KINDS)
def test_is_configured_by_class_path(kind: type[PseudoAnomaly]) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(PseudoAnomaly, "anomaly")
    config = {
        "class_path": f"lit_defect.anomalies.{kind.__name__}",
        "init_args": {"candidates": 2, "ssim_scope": "image"},
    }
    made = parser.instantiate_classes(parser.parse_object({"anomaly": config})).anomaly
    assert type(made) is kind
    assert made.candidates == 2
    assert made.ssim_threshold == base.THRESHOLDS["image"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", EVERY)
def test_the_device_changes_nothing(kind: type[PseudoAnomaly], scope: str) -> None:
    images = photographs(96, 128)
    here = kind(ssim_scope=scope)(images, seeded())
    there = kind(ssim_scope=scope)(images.cuda(), seeded())
    assert there.images.device.type == "cuda"
    assert torch.allclose(here.tried, there.tried.cpu(), atol=1e-3)
    assert torch.allclose(here.tried_ssim, there.tried_ssim.cpu(), atol=1e-3, equal_nan=True)
    # a pixel on the very edge may fall to the other side
    assert ((here.images - there.images.cpu()).abs() > 1e-4).float().mean() < 1e-3
