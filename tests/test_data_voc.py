"""VOC's layout: mask ids, void, classes against background, the square crop, overlapping sets, SBD."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from lit_defect.data import download
from lit_defect.data.voc import NAMES, PascalVOC
from lit_defect.errors import DataError, UserError
from tests.fakes import make_voc, save

ROCK = Path(__file__).parents[2] / "shared" / "data" / "digital_rock"


def ready(root: Path, memory: Path, **settings: object) -> PascalVOC:
    data = PascalVOC(str(root), cache_dir=str(memory), leakage="off", **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def sizes(data: PascalVOC) -> tuple[int, int, int]:
    return len(data.samples["train"]), len(data.samples["val"]), len(data.samples["test"])


def stored(data: PascalVOC, name: str) -> np.ndarray:
    return np.asarray(Image.open(data.root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / f"{name}.png"))


def test_masks_hold_palette_indices_and_void(tmp_path: Path) -> None:
    data = ready(make_voc(tmp_path / "d"), tmp_path / "c", crop="none")
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 48)
    assert batch["mask"].dtype == torch.int64
    for mask, path, label in zip(batch["mask"], batch["path"], batch["label"], strict=True):
        truth = stored(data, Path(path).stem)
        assert (mask.numpy() == truth).all()
        assert {0, 255, int(label)} == set(np.unique(truth).tolist())
    assert data.class_names[3] == "bird"
    assert set(batch["label"].tolist()) == {3, 8}
    assert len(NAMES) == 21


def test_originals_keep_their_size_and_the_ids_of_their_classes(tmp_path: Path) -> None:
    data = ready(make_voc(tmp_path / "d"), tmp_path / "c", image_size=16)
    for position, sample in enumerate(data.samples["test"]):
        picture, mask = data.original("test", position)
        assert picture.shape == (32, 32, 3)  # the centre square
        assert (mask == stored(data, Path(sample.path).stem)[:, 8:40]).all()


def test_the_default_sets_never_select_on_the_test(tmp_path: Path) -> None:
    data = ready(make_voc(tmp_path / "d", images={"train": 10, "val": 6}), tmp_path / "c")
    assert sizes(data) == (8, 2, 6)
    listed = (tmp_path / "d/VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").read_text().split()
    assert sorted(Path(s.path).stem for s in data.samples["test"]) == sorted(listed)


def test_the_square_is_the_centre(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "d")
    tall = root / "VOCdevkit/VOC2012"
    picture = np.asarray(Image.open(tall / "JPEGImages/2012_000000.jpg"))
    mask = stored(PascalVOC(str(root)), "2012_000000")
    save(np.rot90(picture).copy(), tall / "JPEGImages/2012_000000.jpg")
    save(np.rot90(mask).copy(), tall / "SegmentationClass/2012_000000.png")
    data = ready(root, tmp_path / "c", batch_size=1, val_fraction=0)
    for batch in data.train_dataloader():
        truth = stored(data, Path(batch["path"][0]).stem)
        height, width = truth.shape
        cut = truth[8:40] if height > width else truth[:, 8:40]
        assert batch["mask"].shape == (1, 32, 32)
        assert (batch["mask"][0].numpy() == cut).all()
        assert batch["image"].shape == (1, 3, 32, 32)


def test_void_as_background(tmp_path: Path) -> None:
    data = ready(make_voc(tmp_path / "d"), tmp_path / "c", void="background")
    masks = next(iter(data.test_dataloader()))["mask"]
    assert set(masks.unique().tolist()) == {0, 3, 8}


def test_chosen_classes_against_background(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "d", classes=(3, 8, 12), images={"train": 12, "val": 6})
    cats = ready(root, tmp_path / "c", classes=["cat"])
    assert sizes(cats) == (3, 1, 2)  # a third of 12 and of 6 shows a cat
    batch = next(iter(cats.test_dataloader()))
    assert set(batch["mask"].unique().tolist()) == {0, 1, 255}
    assert (cats.class_names, cats.mask_names) == (["background", "cat"], ["background", "cat"])

    two = ready(root, tmp_path / "c", classes=["dog", "bird"])  # ids follow the given order
    batch = next(iter(two.test_dataloader()))
    for mask, path in zip(batch["mask"], batch["path"], strict=True):
        truth = stored(two, Path(path).stem)[:, 8:40]
        expected = np.select([truth == 12, truth == 3, truth == 255], [1, 2, 255], 0)
        assert (mask.numpy() == expected).all()

    one = ready(root, tmp_path / "c", classes=["dog", "bird"], merge=True)
    batch = next(iter(one.test_dataloader()))
    assert set(batch["mask"].unique().tolist()) == {0, 1, 255}
    assert set(batch["label"].tolist()) == {1, 2}  # still tells which
    assert one.mask_names == ["background", "dog+bird"]


def test_overlapping_sets_are_reported_and_separated(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "d", images={"train": 8, "val": 3, "test": 4})
    lists = root / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    both = (lists / "test.txt").read_text().split()[:2]
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + "\n".join(both) + "\n")
    with pytest.warns(UserWarning, match=r"2 names stand both in test \(test\) and trainval \(train\): 2012_0000"):
        data = ready(root, tmp_path / "c", image_sets={"train": "trainval", "test": "test"}, val_fraction=0)
    assert sizes(data) == (8, 0, 4)
    with (
        pytest.warns(UserWarning, match="3 names stand both in"),
        pytest.raises(DataError, match="nothing is left of val for val"),
    ):
        ready(root, tmp_path / "c", image_sets={"train": "train", "val": "val", "test": "val"})


def test_faults_are_listed(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "d")
    home = root / "VOCdevkit/VOC2012"
    (home / "SegmentationClass/2012_000000.png").unlink()
    (home / "JPEGImages/2012_000001.jpg").unlink()
    save(np.zeros((32, 48), np.uint8), home / "SegmentationClass/2012_000099.png")
    save(np.full((32, 48), 77, np.uint8), home / "SegmentationClass/2012_000002.png")
    with pytest.raises(DataError) as caught:
        ready(root, tmp_path / "c", classes=["bird", "cat"])
    text = str(caught.value)
    for part in (
        "mask missing: 1",
        "missing: 1",
        "mask without image: 1",
        "mask value without a name: 1",
        "[77]",
        "2012_000099",
    ):
        assert part in text
    assert sizes(ready(root, tmp_path / "c", on_bad_file="skip", val_fraction=0)) == (5, 0, 4)


def test_wrong_choices(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "d")
    for settings, message in (
        ({"classes": ["brid"]}, "no class brid. Did you mean bird?"),
        ({"classes": ["background"]}, "no class background"),
        ({"classes": []}, "empty list"),
        ({"classes": ["cat", "cat"]}, "twice"),
        ({"merge": True}, "needs data.classes"),
        ({"image_sets": {"training": "train"}}, "expected train, val and test as keys"),
        ({"download": True, "year": "2011"}, "knows VOC 2012 and 2007, not 2011"),
    ):
        with pytest.raises(UserError) as caught:
            PascalVOC(str(root), **settings)
        assert message in str(caught.value)
    with pytest.raises(DataError, match=r"no image set trainval in .* it has train, val"):
        ready(root, tmp_path / "c", image_sets={"train": "trainval"})
    (root / "VOCdevkit/VOC2012/ImageSets/Segmentation/evil.txt").write_text("../../secret\n")
    with pytest.raises(DataError, match="is not the name of a picture"):
        ready(root, tmp_path / "c", image_sets={"train": "evil"})


def test_masks_are_always_served(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.with_masks: PascalVOC always serves masks"):
        PascalVOC(str(tmp_path), with_masks=False)


def test_a_cache_folder_without_access_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = ready(make_voc(tmp_path / "d"), tmp_path / "file")
    assert sum(map(len, data.samples.values())) > 0


def test_a_missing_data_set_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError, match=r"data.download=true(.|\n)*6cd6e144f989b92b3379bac3b3de84fd(.|\n)*JPEGImages/<name>"
    ):
        ready(tmp_path, tmp_path / "c")
    with pytest.raises(DataError, match=r"no folder .*VOC1999"):
        ready(tmp_path, tmp_path / "c", year="1999")

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
    with pytest.raises(DataError, match=r"no route to host(.|\n)*c52e279531787c972589f7e41ab4ae64"):
        ready(tmp_path, tmp_path / "c", year="2007", download=True)


def test_what_was_counted_is_remembered_and_renewed(tmp_path: Path) -> None:
    root, memory = make_voc(tmp_path / "d"), tmp_path / "c"
    first = [s.label for s in PascalVOC(str(root), cache_dir=str(memory)).find_samples()]
    files = list(memory.glob("mask-values-*.npy"))
    assert len(files) == 1
    files[0].write_bytes(b"damaged")
    assert [s.label for s in PascalVOC(str(root), cache_dir=str(memory)).find_samples()] == first
    save(np.full((32, 48), 12, np.uint8), root / "VOCdevkit/VOC2012/SegmentationClass/2012_000000.png")
    labels = {s.name[-10:-4]: s.label for s in PascalVOC(str(root), cache_dir=str(memory)).find_samples()}
    assert labels["000000"] == 12


def test_sbd_adds_to_training_only(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "d", images={"train": 4, "val": 3})
    sbd = tmp_path / "benchmark_RELEASE"
    (sbd / "dataset" / "cls").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (
        "2012_000000",
        "2012_000005",
        "2010_000001",
        "2010_000002",
    ):  # in train, in val, two new ones
        values = np.zeros((32, 48), np.uint8)
        values[10:20, 12:30] = 8
        save(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8), sbd / "dataset/img" / f"{name}.jpg")
        savemat(sbd / f"dataset/cls/{name}.mat", {"GTcls": {"Segmentation": values}})
    data = ready(root, tmp_path / "c", sbd_root=str(sbd), val_fraction=0, crop="none")
    assert sizes(data) == (6, 0, 3)
    assert {s.name for s in data.samples["train"] if s.name.startswith("SBD")} == {
        "SBD/2010_000001.jpg",
        "SBD/2010_000002.jpg",
    }
    batch = next(iter(data.loader("train")))
    new = [i for i, name in enumerate(batch["name"]) if name.startswith("SBD")]
    assert (batch["mask"][new] == torch.from_numpy(values)).all()
    with pytest.raises(DataError, match="is not an unpacked SBD"):
        ready(root, tmp_path / "c", sbd_root=str(tmp_path))
    savemat(sbd / "dataset/cls/2010_000003.mat", {"other": 1})
    with pytest.raises(DataError, match=r"2010_000003.mat is not a class map"):
        ready(root, tmp_path / "c2", sbd_root=str(sbd))


@pytest.mark.skipif(not ROCK.is_dir(), reason="the digital rock is not beside the project")
def test_real_rock(tmp_path: Path) -> None:
    names = ["one", "two", "three", "four"]
    sets = {split: split for split in ("train", "val", "test")}
    data = ready(ROCK, tmp_path, year="2007", names=names, image_sets=sets, cache="off")
    assert sizes(data) == (707, 23, 26)
    batch = next(iter(data.val_dataloader()))
    assert batch["mask"].shape == (23, 256, 256)
    assert set(batch["mask"].unique().tolist()) <= {0, 1, 2, 3}
    with pytest.warns(UserWarning, match=r"23 names stand both in test \(test\) and trainval \(train\)"):
        ready(
            ROCK,
            tmp_path,
            year="2007",
            names=names,
            image_sets={"train": "trainval", "test": "test"},
            cache="off",
        )
