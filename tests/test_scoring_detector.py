"""All scores of a network together: what they are fitted to, what they give, what a checkpoint carries."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.scoring.density import GaussianDensity, KernelDensity
from lit_defect.scoring.detector import SCORES, Detector
from lit_defect.scoring.maps import LocalGaussian, upsample_maps
from lit_defect.scoring.neighbours import NearestNeighbours

Batch = tuple[Tensor, list[Tensor]]
SIZE = (32, 48)


def normal(n: int, seed: int = 0) -> Batch:
    """Features (n, 7) and maps of two layers."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 7, generator=generator) + 2
    return features, [torch.randn(n, 5, 8, 12, generator=generator), torch.randn(n, 9, 4, 6, generator=generator)]


def cut(batch: Batch, *places: int) -> Iterator[Batch]:
    """The same pictures in several batches; once only, as a loader's."""
    edges = (0, *places, len(batch[0]))
    for start, stop in pairwise(edges):
        yield batch[0][start:stop], [part[start:stop] for part in batch[1]]


def fitted(**settings: object) -> Detector:
    detector = Detector(neighbours=3, dimensions=4, **settings)
    detector.fit([normal(20)])
    return detector


def test_each_score_is_that_of_its_part():
    detector, (features, maps) = fitted(), normal(6, seed=1)
    scores, grid = detector(features, maps, SIZE)
    assert tuple(scores) == SCORES
    train_features, train_maps = normal(20)
    for name, part in (("gaussian", GaussianDensity()), ("knn", NearestNeighbours(3)), ("kde", KernelDensity())):
        part.fit(train_features)
        torch.testing.assert_close(scores[name], part(features))
    local = LocalGaussian("aligned", 4)
    local.fit(train_maps)
    torch.testing.assert_close(grid, local(maps))
    smooth = upsample_maps(grid, SIZE, 4 / 256 * 48)  # a share of the longer side
    torch.testing.assert_close(detector.enlarge(grid, SIZE), smooth)
    torch.testing.assert_close(scores["map_max"], smooth.flatten(1).max(1).values)
    assert all(values.shape == (6,) and values.dtype == torch.float32 for values in scores.values())


@pytest.mark.parametrize("positions", ["aligned", "shared"])
def test_batches_make_no_difference(positions):
    whole, parts = (Detector(3, positions, 4) for _ in range(2))
    whole.fit([normal(20)])
    parts.fit(cut(normal(20), 1, 7, 15))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value, rtol=1e-5, atol=1e-6)


def test_a_new_fit_replaces_the_old_one():
    again, once = Detector(3, dimensions=4), Detector(3, dimensions=4)
    again.fit([normal(12, seed=5)])
    again.fit([normal(20)])
    once.fit([normal(20)])
    assert again.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in once.state_dict().items())


def test_half_precision_features_are_taken():
    features, maps = normal(20)
    detector = Detector(3, dimensions=4)
    detector.fit([(features.bfloat16(), [part.bfloat16() for part in maps])])
    scores, grid = detector(features.bfloat16(), [part.bfloat16() for part in maps], SIZE)
    assert all(values.dtype == torch.float32 and values.isfinite().all() for values in (*scores.values(), grid))


# --- what a checkpoint carries ---


@pytest.mark.parametrize("positions", ["aligned", "shared"])
def test_a_fitted_state_goes_into_any_other(tmp_path, positions):
    detector, (features, maps) = fitted(positions=positions), normal(6, seed=1)
    torch.save(detector.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    receivers = [Detector(3, positions, 4), Detector(3, positions, 4)]
    receivers[1].fit([(normal(9, seed=3)[0], normal(9, seed=3)[1][:1])])  # of another shape
    expected, expected_grid = detector(features, maps, SIZE)
    for receiver in receivers:
        receiver.load_state_dict(state)
        assert receiver.fitted
        found, grid = receiver(features, maps, SIZE)
        assert all(torch.equal(found[name], expected[name]) for name in SCORES)
        assert torch.equal(grid, expected_grid)


def test_an_unfitted_state_empties_a_fitted_detector():
    detector = fitted()
    assert detector.fitted
    detector.load_state_dict(Detector(3, dimensions=4).state_dict())
    assert not detector.fitted
    with pytest.raises(ValueError, match="not fitted"):
        detector(*normal(2), SIZE)
    detector.fit([normal(20)])
    assert detector.fitted


def test_a_part_of_a_larger_module_is_loaded_too(tmp_path: Path):
    outer, other = (torch.nn.ModuleDict({"a": Detector(3, dimensions=4), "b": Detector(3)}) for _ in range(2))
    outer["a"].fit([normal(20)])
    other["b"].fit([normal(20)])
    other.load_state_dict(outer.state_dict())
    assert other["a"].fitted
    assert not other["b"].fitted


# --- what cannot be fitted or scored ---


def test_what_is_refused():
    with pytest.raises(UserError, match="k = 0"):
        Detector(neighbours=0)
    with pytest.raises(UserError, match="need normal training pictures and got none"):
        Detector().fit([])
    with pytest.raises(UserError, match=r"k = 5 .* only 4"):
        Detector().fit([normal(4)])
    with pytest.raises(UserError, match="at least 3"):
        Detector(1).fit([normal(2)])
    flat = torch.ones(9, 7), [torch.ones(9, 5, 8, 12)]
    with pytest.raises(UserError, match="the same at every place"):
        Detector().fit([flat])
    features, maps = normal(9)
    with pytest.raises(UserError, match="same features"):
        Detector().fit([(features[:1].expand(9, -1), maps)])
    features[3, 2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        Detector().fit([(features, maps)])
    with pytest.raises(UserError, match="sigma"):
        fitted(smoothing=-1.0)(*normal(2), SIZE)


def test_a_failed_fit_leaves_nothing_fitted():
    detector = Detector()
    with pytest.raises(UserError, match="k = 5"):
        detector.fit([normal(4)])
    assert not detector.fitted


def test_the_combination_weighs_whole_and_place_by_their_spread_on_unseen_pictures():
    """Against z-scores of the logarithms by scipy."""
    detector = fitted()
    unseen, _ = detector(*normal(30, seed=2), SIZE)
    scores, _ = detector(*normal(6, seed=1), SIZE)
    plain = (scores["gaussian"].log() + scores["map_max"].log()) / 2
    torch.testing.assert_close(scores["combined"], plain)  # until it is calibrated
    detector.calibrate(unseen["gaussian"], unseen["map_max"])
    scores, _ = detector(*normal(6, seed=1), SIZE)
    by_hand = [
        stats.zmap(np.log(scores[name].double()), np.log(unseen[name].double()), ddof=1)
        for name in ("gaussian", "map_max")
    ]
    np.testing.assert_allclose(scores["combined"], np.mean(by_hand, axis=0), rtol=1e-4)
    again = Detector(neighbours=3, dimensions=4)
    again.load_state_dict(detector.state_dict())
    torch.testing.assert_close(again(*normal(6, seed=1), SIZE)[0]["combined"], scores["combined"])


@pytest.mark.parametrize("values", [[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0], [2.0, 5.0]])
def test_pictures_that_tell_nothing_of_the_spread_leave_the_combination_finite(values):
    detector = fitted()
    detector.calibrate(torch.tensor(values), torch.tensor(values))
    scores, _ = detector(*normal(6, seed=1), SIZE)
    assert scores["combined"].isfinite().all()
