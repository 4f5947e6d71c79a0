"""Scores against scikit-learn and scipy, what checkpoints carry, and what cannot be fitted."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import sklearn.covariance
import torch
import torch.distributed
from scipy.spatial.distance import mahalanobis
from sklearn.neighbors import KernelDensity as SklearnKernelDensity
from sklearn.neighbors import NearestNeighbors as SklearnNearestNeighbors
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torch.nn.parallel import DistributedDataParallel

from lit_defect.errors import UserError
from lit_defect.scoring import neighbours as neighbours_module
from lit_defect.scoring.density import GaussianDensity, KernelDensity, ledoit_wolf
from lit_defect.scoring.maps import RIDGE, LocalGaussian, upsample_maps
from lit_defect.scoring.neighbours import NearestNeighbours

SCORES: dict[str, Callable[[], GaussianDensity | KernelDensity | NearestNeighbours]] = {
    "gaussian": GaussianDensity,
    "gaussian, lengths kept": lambda: GaussianDensity(normalise=False),
    "neighbours": NearestNeighbours,
    "kernel": KernelDensity,
}


def correlated(n: int, d: int, seed: int = 0) -> Tensor:
    """(n, d) float32 with a covariance far from the identity and a mean far from 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99)) * torch.logspace(0, -2, d)
    return torch.randn(n, d, generator=generator) @ mixing + 3


def feature_maps(
    n: int, seed: int = 0, sizes: tuple[tuple[int, int, int], ...] = ((6, 8, 6), (9, 4, 3))
) -> list[Tensor]:
    """Maps (n, C, h, w), each place with its own mean and its own spread."""
    found = []
    for c, h, w in sizes:
        place = torch.Generator().manual_seed(c)
        mean, spread = torch.randn(c, h, w, generator=place) * 2, torch.rand(c, h, w, generator=place) + 0.2
        found.append(mean + spread * torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(seed + c)))
    return found


# --- covariance ---


@pytest.mark.filterwarnings("ignore:Only one sample")
@pytest.mark.parametrize(("n", "d"), [(200, 10), (12, 40), (3, 5), (2, 6), (1, 4), (30, 1)])
def test_ledoit_wolf_is_scikit_learns(n: int, d: int) -> None:
    x = correlated(n, d).double()
    found = ledoit_wolf(x)
    covariance, shrinkage = sklearn.covariance.ledoit_wolf(x.numpy())
    np.testing.assert_allclose(found.covariance, np.reshape(covariance, (d, d)), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.shrinkage, shrinkage, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.mean, x.numpy().mean(axis=0), rtol=1e-12)


def test_ledoit_wolf_of_a_batch_is_that_of_each() -> None:
    x = torch.stack([correlated(15, 7, seed) * (seed + 1) for seed in range(6)]).view(2, 3, 15, 7)
    together = ledoit_wolf(x)
    assert together.shrinkage.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            for part, one in zip(together, ledoit_wolf(x[i, j]), strict=True):
                torch.testing.assert_close(part[i, j], one)


def test_ledoit_wolf_of_one_or_equal_samples_is_zero() -> None:
    for x in (torch.ones(1, 4), torch.full((20, 4), 0.1)):
        found = ledoit_wolf(x)
        assert found.covariance.abs().max() < 1e-30
        assert found.shrinkage == 0


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0)])
def test_ledoit_wolf_names_a_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(\.\.\., n, d\)"):
        ledoit_wolf(torch.zeros(shape))


# --- scores of a picture ---


@pytest.mark.parametrize("n", [20, 300])
@pytest.mark.parametrize("length", [True, False])
def test_gaussian_density_is_scipys_mahalanobis_under_scikit_learns_covariance(n: int, length: bool) -> None:
    train, test = correlated(n, 48), correlated(9, 48, seed=1)
    score = GaussianDensity(normalise=length)
    score.fit(train)
    a, b = ((normalize(x.double(), dim=1) if length else x.double()).numpy() for x in (train, test))
    estimate = sklearn.covariance.LedoitWolf().fit(a)
    expected = [mahalanobis(x, estimate.location_, estimate.precision_) for x in b]
    np.testing.assert_allclose(score(test), expected, rtol=1e-5)


def test_gaussian_density_keeps_its_digits_far_from_the_origin() -> None:
    # A mean of a million beside a spread of 1: in float32 its square leaves no digit, and its rounding, 1/32, shows.
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 8, generator=generator, dtype=torch.float64) + 1e6 + 1 / 3 for n in (50, 9))
    score = GaussianDensity(normalise=False)
    score.fit(train)
    assert score.centre.dtype == torch.float32
    estimate = sklearn.covariance.LedoitWolf().fit(train.numpy())
    expected = [mahalanobis(x, estimate.location_, estimate.precision_) for x in test.numpy()]
    np.testing.assert_allclose(score(test), expected, rtol=1e-5)


def test_gaussian_density_of_two_pictures_repeated_is_finite() -> None:
    # Ledoit and Wolf's share is 0 here, and the covariance of rank one.
    train = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]).repeat(5, 1)
    score = GaussianDensity()
    score.fit(train)
    assert torch.allclose(score(train), torch.ones(10), atol=1e-3)
    off_the_line = score(torch.tensor([[1.0, 1.0, 1.0]]))
    assert off_the_line.isfinite()
    assert off_the_line > 100


@pytest.mark.parametrize("k", [1, 5, 40])
def test_neighbours_are_scikit_learns(k: int) -> None:
    train, test = correlated(40, 12), correlated(9, 12, seed=1)
    score = NearestNeighbours(k)
    score.fit(train)
    reference = SklearnNearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(train.double().numpy())
    distances, _ = reference.kneighbors(test.double().numpy())
    np.testing.assert_allclose(score(test), distances.mean(axis=1), rtol=1e-5)


def test_the_nearest_neighbour_of_a_training_picture_is_itself() -> None:
    train = correlated(40, 12)
    score = NearestNeighbours(k=1)
    score.fit(train)
    assert score(train * 7).abs().max() < 1e-12


def test_kernel_density_is_scikit_learns() -> None:
    train, test = correlated(40, 12), correlated(9, 12, seed=1)
    score = KernelDensity()
    score.fit(train)
    a, b = (normalize(x.double(), dim=1).numpy() for x in (train, test))
    bandwidth = math.sqrt(np.trace(np.cov(a.T, bias=True)) / 20)
    log_density = SklearnKernelDensity(bandwidth=bandwidth).fit(a).score_samples(b)
    constant = -12 / 2 * math.log(2 * math.pi) - 12 * math.log(bandwidth)
    np.testing.assert_allclose(score(test), constant - log_density, rtol=1e-5)


def test_kernel_density_far_away_is_finite() -> None:
    # exp(-...) is 0 in every format; its logarithm is not.
    train = torch.tensor([1.0, 0.0, 0.0]) + 1e-5 * correlated(40, 3)
    score = KernelDensity()
    score.fit(train)
    far = score(torch.tensor([[-1.0, 0.0, 0.0]]))
    assert far.isfinite()
    assert far > 1e6


@pytest.mark.parametrize("name", ["neighbours", "kernel"])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    train, test = correlated(40, 12), correlated(23, 12, seed=1)
    score = SCORES[name]()
    score.fit(train)
    expected = score(test)
    for numbers in (1, 40 * 7):  # one row at a time, seven rows at a time
        monkeypatch.setattr(neighbours_module, "_CHUNK", numbers)
        torch.testing.assert_close(score(test), expected)


@pytest.mark.parametrize("name", SCORES)
def test_what_is_unlike_the_training_scores_higher(name: str) -> None:
    train = correlated(100, 16)
    score = SCORES[name]()
    score.fit(train)
    alike, unlike = score(correlated(30, 16, seed=1)), score(torch.randn(30, 16) * 10)
    assert alike.max() < unlike.min()


@pytest.mark.parametrize("name", SCORES)
def test_no_rows_give_no_scores(name: str) -> None:
    score = SCORES[name]()
    score.fit(correlated(20, 6))
    assert score(torch.zeros(0, 6)).shape == (0,)


@pytest.mark.parametrize("name", SCORES)
def test_a_picture_without_a_score_stays_nan(name: str) -> None:
    score = SCORES[name]()
    score.fit(correlated(20, 6))
    test = correlated(3, 6, seed=1)
    test[1, 2] = torch.nan
    assert score(test).isnan().tolist() == [False, True, False]


# --- maps ---


def test_aligned_maps_are_a_gaussian_for_each_place() -> None:
    train, test = feature_maps(20), feature_maps(4, seed=50)
    score = LocalGaussian()
    score.fit(train)
    layers = []
    for a, b in zip(train, test, strict=True):
        _, c, h, w = a.shape
        ridge = RIDGE * a.double().var(dim=0, correction=0).mean()
        squared = np.zeros((4, h, w))
        for i in range(h):
            for j in range(w):
                x = a[:, :, i, j].double().numpy()
                covariance = sklearn.covariance.ledoit_wolf(x)[0] + ridge.item() * np.eye(c)
                precision = np.linalg.inv(covariance)
                squared[:, i, j] = [mahalanobis(y, x.mean(0), precision) ** 2 / c for y in b[:, :, i, j].double()]
        layers.append(interpolate(torch.from_numpy(squared)[:, None], (8, 6), mode="bilinear")[:, 0])
    expected = (sum(layers) / 2) ** 0.5
    assert score(test).dtype == torch.float32
    np.testing.assert_allclose(score(test), expected, rtol=1e-5)


def test_shared_maps_are_one_gaussian_for_all_places() -> None:
    train, test = feature_maps(5, sizes=((6, 8, 6),)), feature_maps(4, seed=50, sizes=((6, 5, 9),))
    score = LocalGaussian(positions="shared")
    score.fit(train)
    x, y = (m[0].permute(0, 2, 3, 1).reshape(-1, 6).double() for m in (train, test))
    ridge = RIDGE * x.var(dim=0, correction=0).mean().item()
    covariance = sklearn.covariance.ledoit_wolf(x.numpy())[0] + ridge * np.eye(6)
    expected = [mahalanobis(row, x.mean(0), np.linalg.inv(covariance)) / math.sqrt(6) for row in y]
    np.testing.assert_allclose(score(test).flatten(), expected, rtol=1e-5)


def test_a_radius_pools_the_neighbouring_places() -> None:
    (train,), (test,) = feature_maps(6, sizes=((4, 7, 5),)), feature_maps(2, seed=50, sizes=((4, 7, 5),))
    score = LocalGaussian(radius=2)
    score.fit([train])
    samples = {}
    for i in range(7):
        for j in range(5):
            window = train.double()[:, :, max(0, i - 2) : i + 3, max(0, j - 2) : j + 3]
            samples[i, j] = window.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
    ridge = RIDGE * np.mean([x.var(axis=0) for x in samples.values()])
    found = score([test])
    for (i, j), x in samples.items():
        precision = np.linalg.inv(sklearn.covariance.ledoit_wolf(x)[0] + ridge * np.eye(4))
        expected = [mahalanobis(y, x.mean(axis=0), precision) / 2 for y in test[:, :, i, j].double()]
        np.testing.assert_allclose(found[:, i, j], expected, rtol=1e-5)


def test_a_spot_is_found_where_it_is() -> None:
    train, test = feature_maps(60), feature_maps(1, seed=50)
    test[0][0, :, 5, 1] += 4
    score = LocalGaussian()
    score.fit(train)
    found = score(test)[0]
    assert found.argmax() == 5 * 6 + 1


def test_normal_maps_score_about_one_whatever_their_number_of_channels() -> None:
    for c in (2, 64):
        train, test = (torch.randn(4000, c, 2, 2, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        score = LocalGaussian()
        score.fit([train])
        assert score([test]).square().mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("positions", ["aligned", "shared"])
def test_batches_are_the_same_as_all_at_once(positions: str) -> None:
    train, test = feature_maps(23), feature_maps(4, seed=50)
    whole, parts, stream = (LocalGaussian(positions=positions) for _ in range(3))  # type: ignore[arg-type]
    batches = [[x[i : i + 5] for x in train] for i in range(0, 23, 5)]
    whole.fit(train)
    parts.fit(batches)
    stream.fit(iter(batches))
    assert whole.fitted
    for other in (parts, stream):
        torch.testing.assert_close(other(test), whole(test), rtol=1e-6, atol=0)


@pytest.mark.parametrize("positions", ["aligned", "shared"])
def test_several_processes_fit_to_the_pictures_of_all(positions: str) -> None:
    # Unequal shares, far from each other: 4 and 19 pictures, the first brighter. The sum over processes is one
    # of threads that meet: each gives its tensor, waits for the others, and takes the total.
    train, test = feature_maps(23), feature_maps(4, seed=50)
    for x in train:
        x[:4] += 5
    shares = [[x[:4] for x in train], [x[4:] for x in train]]
    fits = [LocalGaussian(positions=positions) for _ in shares]  # type: ignore[arg-type]
    given: list[list[Tensor]] = [[], []]
    barrier = threading.Barrier(2, timeout=60)

    def one(rank: int) -> None:
        def add_up(part: Tensor) -> Tensor:
            given[rank].append(part)
            turn = len(given[rank]) - 1
            barrier.wait()
            return given[0][turn] + given[1][turn]

        fits[rank].fit(shares[rank], add_up=add_up)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
    alone = LocalGaussian(positions=positions)  # type: ignore[arg-type]
    alone.fit(train)
    for score in fits:
        torch.testing.assert_close(score(test), alone(test), rtol=1e-5, atol=0)
    for a, b in zip(fits[0].state_dict().values(), fits[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sums_keep_their_digits_far_from_the_origin() -> None:
    train, test = ([x.double() + 1e6 for x in maps] for maps in (feature_maps(20), feature_maps(4, seed=50)))
    far, near = LocalGaussian(), LocalGaussian()
    far.fit([[x[:3] for x in train], [x[3:] for x in train]])
    near.fit([x - 1e6 for x in train])
    torch.testing.assert_close(far(test), near([x - 1e6 for x in test]), rtol=1e-5, atol=0)


def test_the_projection_keeps_lengths_and_depends_on_its_seed_only() -> None:
    train = [torch.randn(10, 40, 2, 2), torch.randn(10, 40, 2, 2)]
    fits = [LocalGaussian(dimensions=16, seed=seed) for seed in (0, 0, 1)]
    for i, score in enumerate(fits):
        torch.manual_seed(i)  # the global generator plays no part
        score.fit(train)
    first = fits[0].layers[0].projection
    torch.testing.assert_close(first.T @ first, torch.eye(16), atol=1e-6, rtol=0)
    assert torch.equal(first, fits[1].layers[0].projection)
    assert not torch.equal(first, fits[2].layers[0].projection)
    assert not torch.equal(first, fits[0].layers[1].projection)  # each map its own
    assert fits[0].layers[0].whiten.shape == (2, 2, 16, 16)


def test_a_place_that_never_changes_does_not_outweigh_the_object() -> None:
    # A black border: grain of a twentieth of the object's spread is no defect there.
    (train,), (test,) = feature_maps(40, sizes=((6, 8, 6),)), feature_maps(1, seed=50, sizes=((6, 8, 6),))
    train[:, :, 0] = 0.0
    test[:, :, 0] = 0.03
    score = LocalGaussian()
    score.fit([train])
    found = score([test])[0]
    assert found[0].max() < found[1:].mean()


# --- upsampling ---


@pytest.mark.parametrize(
    ("shape", "size", "sigma"),
    [
        ((2, 8, 8), (64, 64), 4.0),
        ((1, 5, 9), (37, 80), 2.5),
        ((1, 3, 2), (12, 7), 9.0),  # the kernel reaches over the picture several times
        ((2, 6, 6), (24, 24), 0.0),
        ((1, 16, 16), (8, 8), 1.0),
        ((1, 1, 1), (5, 4), 1.0),
    ],
)
def test_upsampling_is_interpolation_and_scipys_gaussian_filter(
    shape: tuple[int, int, int], size: tuple[int, int], sigma: float
) -> None:
    maps = torch.randn(shape, dtype=torch.float64)
    found = upsample_maps(maps, size, sigma)
    fine = interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = [scipy.ndimage.gaussian_filter(x, sigma, mode="reflect", truncate=4) if sigma else x for x in fine]
    assert found.shape == (shape[0], *size)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_upsampling_refuses_a_negative_sigma() -> None:
    with pytest.raises(UserError, match=r"sigma = -1"):
        upsample_maps(torch.zeros(1, 2, 2), (4, 4), -1.0)


# --- state ---


class System(nn.Module):
    """All that a task may hold; some fitted, some not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 6)
        self.scores = nn.ModuleList(make() for make in SCORES.values())
        self.maps = LocalGaussian()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def fit(self) -> None:
        for score in self.scores:
            score.fit(correlated(20, 6))  # type: ignore[operator]
        self.maps.fit(feature_maps(10))

    def evaluate(self) -> list[Tensor]:
        return [*(score(correlated(4, 6, seed=1)) for score in self.scores), self.maps(feature_maps(3, seed=50))]


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_carries_what_was_fitted(tmp_path: Path, assign: bool) -> None:
    system = System()
    system.fit()
    torch.save(system.state_dict(), tmp_path / "state.pt")
    again = System()
    assert not any(score.fitted for score in (*again.scores, again.maps))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not again.load_state_dict(state, assign=assign).missing_keys
    assert all(score.fitted for score in (*again.scores, again.maps))
    for a, b in zip(again.evaluate(), system.evaluate(), strict=True):
        assert torch.equal(a, b)
    assert not any(p.requires_grad for name, p in again.named_parameters() if not name.startswith("net"))


def test_a_checkpoint_may_be_unfitted_or_fitted_to_other_shapes() -> None:
    empty, system = System().state_dict(), System()
    system.load_state_dict(empty)
    assert not any(score.fitted for score in (*system.scores, system.maps))
    system.fit()
    other = System()
    for score in other.scores:
        score.fit(correlated(9, 11))  # type: ignore[operator]
    other.maps.fit(feature_maps(5, sizes=((3, 2, 2), (4, 2, 2), (5, 1, 1))))
    system.load_state_dict(other.state_dict())
    assert system.scores[0](correlated(4, 11)).shape == (4,)
    assert system.maps(feature_maps(2, sizes=((3, 2, 2), (4, 2, 2), (5, 1, 1)))).shape == (2, 2, 2)


def test_a_second_fit_replaces_the_first() -> None:
    system, fresh = System(), System()
    system.fit()
    for each in (system, fresh):
        for score in each.scores:
            score.fit(correlated(30, 7, seed=5))  # type: ignore[operator]
        each.maps.fit(feature_maps(8, seed=7, sizes=((6, 3, 3),)))
    for (name, a), b in zip(system.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert name.startswith("net") or torch.equal(a, b)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_training_goes_on_after_an_evaluation_fitted_in_inference_mode() -> None:
    # DDP writes rank 0's buffers into everybody's at each step, which inference tensors would refuse.
    system = System()
    ddp = DistributedDataParallel(system)
    ddp(torch.ones(2, 6)).sum().backward()
    with torch.inference_mode():
        system.fit()
        expected = system.evaluate()
    ddp(torch.ones(2, 6)).sum().backward()
    system.load_state_dict({name: value.clone() for name, value in system.state_dict().items()})
    for a, b in zip(system.evaluate(), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_and_half_precision_features_change_nothing() -> None:
    rows, maps = correlated(20, 6).bfloat16(), [x.bfloat16() for x in feature_maps(10)]
    system, plain = System(), System()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for score in system.scores:
            score.fit(rows)  # type: ignore[operator]
        system.maps.fit(maps)
        found = [
            *(score(rows) for score in system.scores),
            system.maps(maps),
            upsample_maps(system.maps(maps), (16, 16), 1.0),
        ]
    for score in plain.scores:
        score.fit(rows.float())  # type: ignore[operator]
    plain.maps.fit([x.float() for x in maps])
    fine = plain.maps([x.float() for x in maps])
    expected = [*(score(rows.float()) for score in plain.scores), fine, upsample_maps(fine, (16, 16), 1.0)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


# --- what cannot be ---


@pytest.mark.parametrize("name", SCORES)
def test_features_that_cannot_be_fitted(name: str) -> None:
    score = SCORES[name]()
    with pytest.raises(ValueError, match="is not fitted"):
        score(torch.ones(2, 3))
    with pytest.raises(UserError, match=r"not finite.*diverged"):
        score.fit(torch.full((9, 3), torch.nan))
    with pytest.raises(ValueError, match=r"expected \(n, d\)"):
        score.fit(torch.ones(9))
    with pytest.raises(UserError, match="normal"):
        score.fit(torch.ones(1, 3))
    if name != "neighbours":  # for which equal features are no trouble
        with pytest.raises(UserError, match="all 9 normal training pictures have the same features"):
            score.fit(torch.ones(9, 3) * 0.1)
    assert not score.fitted


def test_too_many_neighbours_are_named() -> None:
    score = NearestNeighbours(k=7)
    with pytest.raises(UserError, match=r"k = 7 .* only 4 normal"):
        score.fit(torch.randn(4, 3))
    with pytest.raises(UserError, match="k = 0"):
        NearestNeighbours(k=0)
    fitted = NearestNeighbours(k=4)
    fitted.fit(torch.randn(4, 3))
    score.load_state_dict(fitted.state_dict())
    with pytest.raises(UserError, match=r"k = 7 .* only 4 normal"):
        score(torch.randn(2, 3))


def test_maps_that_cannot_be_fitted() -> None:
    score = LocalGaussian()
    with pytest.raises(ValueError, match="is not fitted"):
        score(feature_maps(2))
    with pytest.raises(UserError, match="got none"):
        score.fit([])
    with pytest.raises(UserError, match=r"at least 3 normal training pictures .* got 2"):
        score.fit(feature_maps(2))
    with pytest.raises(UserError, match="are the same at every place"):
        score.fit([torch.ones(9, 4, 3, 3) * 0.1])
    with pytest.raises(UserError, match=r"not finite.*diverged"):
        score.fit([torch.full((9, 4, 3, 3), torch.inf)])
    with pytest.raises(UserError, match="pictures of one size"):
        score.fit([[torch.randn(9, 4, 3, 3)], [torch.randn(9, 4, 3, 4)]])
    assert not score.fitted
    score.fit([torch.randn(9, 4, 3, 5)])
    with pytest.raises(UserError, match=r"5x3 places, .* fitted on 3x5"):
        score([torch.randn(9, 4, 5, 3)])
    with pytest.raises(ValueError, match="5 channels, expected 4"):
        score([torch.randn(9, 5, 3, 5)])
    with pytest.raises(ValueError, match="2 maps of each picture, expected 1"):
        score([torch.randn(9, 4, 3, 5)] * 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"positions": "anywhere"}, "choose one of aligned, shared"),
        ({"dimensions": 0}, "dimensions = 0"),
        ({"radius": -1}, "radius = -1"),
        ({"radius": 1, "positions": "shared"}, "radius = 1"),
    ],
)
def test_bad_settings_of_maps_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LocalGaussian(**arguments)  # type: ignore[arg-type]
