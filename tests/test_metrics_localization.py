import doctest
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.measure import label as connected
from sklearn import metrics as sk
from torch import Tensor
from torchmetrics import Metric

from lit_defect.errors import UserError
from lit_defect.metrics import localization
from lit_defect.metrics.localization import AUPRO, BinnedPixelMetrics, PixelMetrics, region_sizes

FIGURES = {"aupro", "pixel_auroc", "pixel_average_precision", "pixel_f1_max"}
KINDS = [PixelMetrics, AUPRO, BinnedPixelMetrics]

pytestmark = pytest.mark.filterwarnings("ignore:.* from histograms may be wrong")  # pictures of few pixels


def pictures(seed: int, n: int = 4, size: tuple[int, int] = (9, 11), levels: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with defects of all shapes: touching at corners, single pixels, at the border; with `levels`, ties."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n, *size)) < rng.choice([0.03, 0.2, 0.5])
    masks[0] = False
    masks[-1, 0, 0] = True
    maps = rng.normal(size=masks.shape) + masks
    if levels:
        maps = np.round(maps * levels) / levels
    return torch.from_numpy(maps.astype(np.float32)), torch.from_numpy(masks)


def by_definition(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """AUPRO as it is written down: every score as a threshold, every region on its own, trapezoids."""
    regions = []
    for scores, mask in zip(maps, masks, strict=True):
        labels = connected(mask, connectivity=2)
        regions += [scores[labels == number] for number in range(1, labels.max() + 1)]
    normal = np.concatenate([scores[~mask] for scores, mask in zip(maps, masks, strict=True)])
    thresholds = np.unique(np.concatenate([scores.ravel() for scores in maps]))[::-1]
    points = [(0.0, 0.0)]
    points += [((normal >= t).mean(), np.mean([(region >= t).mean() for region in regions])) for t in thresholds]
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        end = min(x1, limit)
        if end > x0:
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


def measured(maps: Tensor | list[Tensor], masks: Tensor | list[Tensor], metric: Metric | None = None) -> dict:
    metric = metric or PixelMetrics()
    metric.update(maps, masks)
    return {name: value.item() for name, value in metric.compute().items()}


# Against the definition and against scikit-learn


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_aupro_is_the_threshold_loops(seed: int, levels: int, limit: float) -> None:
    maps, masks = pictures(seed, levels=levels)
    expected = by_definition(list(maps.numpy()), list(masks.numpy()), limit)
    metric = AUPRO(fpr_limit=limit)
    metric.update(maps, masks)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_pixel_figures_are_scikit_learns(seed: int, levels: int) -> None:
    maps, masks = pictures(seed, levels=levels)
    truth, scores = masks.numpy().ravel(), maps.numpy().ravel()
    precision, recall, _ = sk.precision_recall_curve(truth, scores)
    figures = measured(maps, masks)
    assert figures["pixel_auroc"] == pytest.approx(sk.roc_auc_score(truth, scores), abs=1e-12)
    assert figures["pixel_average_precision"] == pytest.approx(sk.average_precision_score(truth, scores), abs=1e-12)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert figures["pixel_f1_max"] == pytest.approx(best, abs=1e-12)


def test_aupro_worked_by_hand() -> None:
    # Regions {9, 1} and {5}, normal pixels 7, 5, 3, 0. PRO begins at 1/4 (the 9) and is flat up to FPR 1/4 (the 7);
    # the tie at 5 is a slope to 3/4 at FPR 1/2; flat up to 3/4 (the 3), where the 1 lifts it to 1.
    maps, masks = torch.tensor([[[9.0, 1, 7, 5, 3, 5, 0]]]), torch.tensor([[[1, 1, 0, 0, 0, 1, 0]]])
    for limit, area in (
        (1, (1 / 4 + 1 / 2 + 3 / 4 + 1) / 4),
        (3 / 4, (1 / 4 + 1 / 2 + 3 / 4) / 4),
        (3 / 8, 1 / 4 * 1 / 4 + 1 / 8 * 3 / 8),  # the slope is cut in the middle, at PRO 1/2
        (1 / 8, 1 / 8 * 1 / 4),
    ):
        assert measured(maps, masks, PixelMetrics(fpr_limit=limit))["aupro"] == pytest.approx(area / limit, abs=1e-12)


def test_regions_join_at_corners_but_not_across_pictures() -> None:
    masks = torch.zeros(3, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 3, 3] = True
    masks[1, 0, 0] = True
    assert region_sizes(masks).tolist() == [2, 2, 1, 1]


def test_pictures_of_different_sizes() -> None:
    one, two = pictures(0), pictures(1, n=2, size=(5, 30), levels=2)
    maps, masks = [*one[0], *two[0]], [*one[1], *two[1]]
    expected = by_definition([m.numpy() for m in maps], [m.numpy() for m in masks], 0.3)
    assert measured(maps, masks)["aupro"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", [PixelMetrics, BinnedPixelMetrics])
def test_batches_do_not_matter(kind: type[Metric]) -> None:
    maps, masks = pictures(0, n=7, levels=3)
    whole, parts = kind(), kind()
    whole.update(maps, masks)
    for scores, mask in reversed(list(zip(maps.split(3), masks.split(3), strict=True))):
        parts.update(scores, mask)
    for name, value in whole.compute().items():
        assert parts.compute()[name] == pytest.approx(value.item(), abs=1e-12)


def test_scores_are_neither_clamped_nor_rescaled() -> None:
    maps, masks = pictures(3)
    assert measured(maps * 512 - 2048, masks) == measured(maps, masks)


def test_infinite_scores_are_ranked() -> None:
    maps, masks = pictures(3)
    maps = torch.where(masks, maps.abs() + 1, -maps.abs())
    maps[masks] = torch.inf
    maps[0] = -torch.inf
    for kind in (PixelMetrics, BinnedPixelMetrics):
        assert measured(maps, masks, kind()) == pytest.approx(dict.fromkeys(FIGURES, 1.0), abs=1e-12)


# Histograms


@pytest.mark.parametrize("bits", [10, 13, 20, 24])
def test_binned_figures_are_exact_for_cut_scores(bits: int) -> None:
    maps, masks = pictures(0, n=6, size=(40, 40))
    maps[0, 0, :5] = torch.tensor([0.0, -0.0, 3e4, -2e-5, 1.0])
    mantissa, exponent = np.frexp(maps.double().numpy())  # 0.5 <= |mantissa| < 1
    digits = 2.0 ** (bits - 8)
    cut = torch.from_numpy(np.ldexp(np.trunc(mantissa * digits) / digits, exponent)).float()
    binned = measured(maps, masks, BinnedPixelMetrics(bits=bits))
    assert binned == pytest.approx(measured(cut, masks), abs=1e-12)
    assert binned["pixel_f1_max"] <= measured(maps, masks)["pixel_f1_max"] + 1e-12


def test_zeros_of_both_signs_are_a_tie() -> None:
    maps, masks = torch.tensor([[[0.0, -0.0, 0.0, -0.0]]]), torch.tensor([[[1, 1, 0, 0]]])
    for kind in (PixelMetrics, BinnedPixelMetrics):
        assert measured(maps, masks, kind())["pixel_auroc"] == 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("limit", [0.05, 0.3])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_binned_figures_lie_within_their_bound(bits: int, limit: float, seed: int) -> None:
    maps, masks = pictures(seed, n=6, size=(30, 30))
    maps = maps / 4 + 20
    exact, metric = measured(maps, masks, PixelMetrics(fpr_limit=limit)), BinnedPixelMetrics(bits=bits, fpr_limit=limit)
    binned = measured(maps, masks, metric)
    bounds = written_bounds(maps, masks, bits, limit)
    for name, bound in bounds.items():
        assert abs(binned[name] - exact[name]) <= bound + 1e-12
        assert metric._bounds()[name] == pytest.approx(bound, abs=1e-12)


def written_bounds(maps: Tensor, masks: Tensor, bits: int, limit: float) -> dict[str, float]:
    """The docstring's sums, pixel by pixel; all scores lie between 16 and 32, where bins are 2^(13 - bits) wide."""
    assert maps.min() >= 16
    assert maps.max() < 32
    bins = (maps.double() / 2.0 ** (13 - bits)).floor().numpy()
    normal, k = bins[~masks.numpy()], limit * int((~masks).sum())
    aupro, auroc, regions = 0.0, 0.0, 0
    for row, mask in zip(bins, masks.numpy(), strict=True):
        labels = connected(mask, connectivity=2)
        regions += labels.max()
        for y, x in np.argwhere(mask):
            above, reached = (normal > row[y, x]).sum(), (normal >= row[y, x]).sum()
            aupro += (min(reached, k) - min(above, k)) / (labels == labels[y, x]).sum()
            auroc += (reached - above) / 2
    return {"aupro": aupro / (k * regions), "pixel_auroc": auroc / (len(normal) * int(masks.sum()))}


def test_too_few_bits_for_an_offset_warn_and_enough_do_not() -> None:
    maps, masks = pictures(0, size=(40, 40))
    metric = BinnedPixelMetrics()
    metric.update(maps + 5000, masks)
    with pytest.warns(UserWarning, match=r"aupro from histograms may be wrong by up to 0\.\d+.*20 bits"):
        metric.compute()
    metric = BinnedPixelMetrics()
    metric.update(maps, masks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures = metric.compute()
    assert figures["aupro"].item() == pytest.approx(measured(maps, masks)["aupro"], abs=1e-3)


# What cannot be measured, and what is refused


@pytest.mark.parametrize("kind", [PixelMetrics, BinnedPixelMetrics])
@pytest.mark.parametrize("fill", [0, 1])
def test_one_kind_of_pixel_only_is_nan(kind: type[Metric], fill: int) -> None:
    figures = measured(torch.rand(2, 8, 8), torch.full((2, 8, 8), fill), kind())
    assert figures.keys() == FIGURES
    assert all(np.isnan(value) for value in figures.values())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_scores_name_the_cause_and_nothing_is_counted(kind: type[Metric]) -> None:
    maps, masks = pictures(0)
    metric, fresh = kind(), kind()
    metric.update(maps, masks)
    fresh.update(maps, masks)
    bad = maps.clone()
    bad[-1, -1, -1] = torch.nan
    with pytest.raises(UserError, match="anomaly maps contain nan"):
        metric.update([*maps, bad[-1]], [*masks, masks[-1]])
    assert str(metric.compute()) == str(fresh.compute())


def test_bad_shapes_and_values() -> None:
    maps, masks = pictures(0)
    for wrong in (masks[:, :-1], masks[:2], masks[:, None]):
        with pytest.raises(ValueError, match=r"\(B, H, W\)"):
            PixelMetrics().update(maps, wrong)
    with pytest.raises(ValueError, match=r"\(B, H, W\)"):
        PixelMetrics().update(maps[:, None], masks[:, None])
    with pytest.raises(ValueError, match="zip"):
        PixelMetrics().update(list(maps), list(masks[:-1]))
    with pytest.raises(ValueError, match="0 and 1"):
        PixelMetrics().update(maps, masks * torch.tensor(255, dtype=torch.uint8))


@pytest.mark.parametrize("limit", [0.0, -0.1, 1.1, float("nan")])
def test_limits_out_of_range(limit: float) -> None:
    with pytest.raises(UserError, match="fpr_limit"):
        PixelMetrics(fpr_limit=limit)


def test_bits_out_of_range() -> None:
    for bits in (9, 25):
        with pytest.raises(UserError, match=f"bits = {bits}"):
            BinnedPixelMetrics(bits=bits)


# As a torchmetrics metric


@pytest.mark.parametrize("mask_type", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("map_type", [torch.float16, torch.bfloat16, torch.float64])
def test_types(map_type: torch.dtype, mask_type: torch.dtype) -> None:
    maps, masks = pictures(0, levels=2)
    assert measured(maps.to(map_type).requires_grad_(), masks.to(mask_type)) == measured(maps, masks)


@pytest.mark.parametrize("kind", [PixelMetrics, BinnedPixelMetrics])
def test_computing_twice_and_going_on(kind: type[Metric]) -> None:
    (maps, masks), (more, more_masks) = pictures(0), pictures(1)
    metric = kind()
    with torch.inference_mode():
        batch = metric(maps, masks)
    first = {name: value.item() for name, value in metric.compute().items()}
    assert {name: value.item() for name, value in batch.items()} == first
    metric.update(more, more_masks)
    both = measured(torch.cat([maps, more]), torch.cat([masks, more_masks]), kind())
    assert {name: value.item() for name, value in metric.compute().items()} == pytest.approx(both, abs=1e-12)
    metric.reset()
    assert measured(maps, masks, metric) == first


def test_maps_are_left_as_they_were() -> None:
    maps, masks = pictures(0)
    before = maps.clone()
    measured(maps[:1], masks[:1])  # a good picture alone, then all
    measured(maps, masks)
    assert torch.equal(maps, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [PixelMetrics, BinnedPixelMetrics])
def test_gpu_and_cpu_agree(kind: type[Metric]) -> None:
    maps, masks = pictures(0, n=8, size=(64, 64), levels=50)
    on_gpu = measured(maps.cuda(), masks, kind().cuda())
    assert on_gpu == pytest.approx(measured(maps, masks, kind()), abs=1e-9)


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_measure_share, args=(str(tmp_path),), nprocs=2)
    for kind in (PixelMetrics, BinnedPixelMetrics):
        expected = measured(*pictures(0, n=5), kind())
        for rank in range(2):
            for figures in torch.load(tmp_path / f"{rank}.pt")[kind.__name__]:
                assert figures == pytest.approx(expected, abs=1e-12)


def _measure_share(rank: int, folder: str) -> None:
    """Shares of 1 and 4 pictures, then of 5 and none at all."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torchmetrics', of computing without pictures
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    maps, masks = pictures(0, n=5)
    figures: dict[str, list] = {}
    for kind in (PixelMetrics, BinnedPixelMetrics):
        for cut in (1, 5):
            metric = kind()
            for position in range(cut) if rank == 0 else range(cut, 5):
                metric.update(maps[position, None], masks[position, None])
            values = {name: value.item() for name, value in metric.compute().items()}
            figures.setdefault(kind.__name__, []).append(values)
    torch.save(figures, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_examples_in_the_docstrings() -> None:
    results = doctest.testmod(localization)
    assert results.attempted
    assert not results.failed
