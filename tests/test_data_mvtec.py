"""MVTec AD's layout: what trains and what tests in each setting, masks, parts, and what is refused."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_defect.data import download
from lit_defect.data.mvtec import MVTecAD, first_third
from lit_defect.data.samples import Sample
from lit_defect.errors import DataError, UserError
from tests.fakes import make_mvtec

TILES = Path(__file__).parents[2] / "shared" / "data" / "magnetic_tile"


def ready(root: Path, memory: Path, **settings: object) -> MVTecAD:
    data = MVTecAD(str(root), cache_dir=str(memory), leakage="off", **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def table(data: MVTecAD) -> dict[str, dict[str, int]]:
    return {split: dict(Counter(s.defect_type for s in data.samples[split])) for split in ("train", "val", "test")}


def torn_groups(data: MVTecAD) -> set[str]:
    places = [{s.group for s in data.samples[split] if s.group} for split in ("train", "val", "test")]
    return (places[0] & places[1]) | (places[0] & places[2]) | (places[1] & places[2])


def test_one_class_trains_on_good_only(tmp_path: Path) -> None:
    data = ready(make_mvtec(tmp_path / "d", train_good=20), tmp_path / "c")
    assert table(data) == {
        "train": {"good": 16},
        "val": {"good": 4},
        "test": {"good": 6, "crack": 6, "hole": 6},
    }
    assert data.class_names == ["good", "defective"]
    assert data.normal_class == 0
    assert data.counts()["test"] == {"good": 6, "defective": 12}
    sample = next(s for s in data.samples["test"] if s.defect_type == "hole")
    assert (sample.label, sample.category, sample.name) == (1, "tile", "tile/test/hole/000.png")


def test_few_shot_takes_the_first_third_by_file_order(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", defects={"crack": 7, "hole": 6})
    data = ready(root, tmp_path / "c", setting="few_shot", target="type", val_fraction=0)
    assert table(data) == {
        "train": {"good": 12, "crack": 2, "hole": 2},
        "val": {},
        "test": {"good": 6, "crack": 5, "hole": 4},
    }
    cracks = sorted(Path(s.path).stem for s in data.samples["train"] if s.defect_type == "crack")
    assert cracks == ["000", "001"]
    assert data.class_names == ["good", "crack", "hole"]
    assert {s.label for s in data.samples["test"] if s.defect_type == "hole"} == {2}


def test_supervised_pools_everything(tmp_path: Path) -> None:
    data = ready(make_mvtec(tmp_path / "d", train_good=18), tmp_path / "c", setting="supervised")
    sizes = {split: len(data.samples[split]) for split in ("train", "val", "test")}
    assert sizes == {"train": 22, "val": 5, "test": 9}  # of 36
    assert data.counts()["train"].keys() == {"good", "defective"}
    assert min(data.counts()["train"].values()) > 0


def test_parts_stay_together(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", shots_per_part=3, train_good=30, test_good=12, defects={"crack": 18, "hole": 18})
    for setting in ("one_class", "few_shot", "supervised"):
        data = ready(root, tmp_path / "c", setting=setting)
        assert not torn_groups(data)
        assert all(s.group.startswith("tile/") for s in data.samples["train"])
    few = ready(root, tmp_path / "c", setting="few_shot", val_fraction=0)
    assert table(few)["train"] == {"good": 30, "crack": 6, "hole": 6}  # two parts of three pictures


def test_a_part_moves_with_its_pictures_in_other_folders() -> None:
    def sample(name: str, split: str, group: str) -> Sample:
        kind = name.split("/")[0]
        return Sample(path=f"/{name}", name=name, label=int(kind != "good"), defect_type=kind, split=split, group=group)

    samples = [sample(f"crack/{i:02d}", "test", f"p{i // 2}") for i in range(12)]  # 6 parts, a third is 2 of them
    samples += [
        sample("good/0", "test", "p0"),
        sample("good/1", "test", "p5"),
        sample("hole/0", "test", "p1"),
    ]
    samples += [sample(f"hole/{i}", "test", f"h{i}") for i in range(1, 6)]  # 6 pictures; p1 is one of two
    done = first_third(samples)
    assert {s.name for s in done if s.split == "train"} == {
        "crack/00", "crack/01", "crack/02", "crack/03", "good/0", "hole/0", "hole/1",
    }  # fmt: skip


def test_masks_are_found_by_either_name(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", suffix=".jpg")
    for mask in (root / "tile" / "ground_truth" / "hole").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    data = ready(root, tmp_path / "c", with_masks=True)
    batch = next(iter(data.test_dataloader()))
    assert batch["mask"].shape == (18, 1, 32, 40)
    marked = batch["mask"].flatten(1).sum(1)
    defective = np.array(batch["defect_type"]) != "good"
    assert (marked[defective] == 10 * 13).all()  # a third of 32 by a third of 40
    assert (marked[~defective] == 0).all()


def test_faulty_masks_are_listed_together(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d")
    masks = root / "tile" / "ground_truth" / "crack"
    (masks / "000_mask.png").unlink()
    shutil.copy(masks / "001_mask.png", masks / "099_mask.png")
    Image.fromarray(np.zeros((32, 40), np.uint8)).save(masks / "002_mask.png")
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(masks / "003_mask.png")
    with pytest.raises(DataError) as caught:
        ready(root, tmp_path / "c", with_masks=True)
    text = str(caught.value)
    for kind in ("mask missing: 1", "mask without image: 1", "empty mask: 1", "mask of another size: 1"):
        assert kind in text
    assert "099_mask.png" in text
    data = ready(root, tmp_path / "c", with_masks=True, on_bad_file="skip")
    assert table(data)["test"]["crack"] == 3
    assert table(ready(root, tmp_path / "c"))["test"]["crack"] == 6  # without masks nothing is wrong


def test_an_empty_folder_is_reported(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d")
    (root / "tile" / "test" / "bent").mkdir()
    with pytest.raises(DataError, match=r"empty class: 1(.|\n)*tile/test/bent: .* has no pictures"):
        ready(root, tmp_path / "c")
    with pytest.warns(UserWarning, match="empty class 1"):
        ready(root, tmp_path / "c", on_bad_file="skip")


def test_several_categories(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", categories=("tile", "wood", "zip"), shots_per_part=2)
    assert {s.category for s in ready(root, tmp_path / "c").samples["test"]} == {"tile", "wood", "zip"}
    two = ready(root, tmp_path / "c", category=["wood", "zip"])
    assert {s.category for s in two.samples["train"]} == {"wood", "zip"}
    assert {s.group.split("/")[0] for s in two.samples["train"]} == {"wood", "zip"}
    assert len(ready(root, tmp_path / "c", category="wood").samples["test"]) == 18
    with pytest.raises(DataError, match=r"no category wod\. Did you mean wood\? It has tile, wood, zip"):
        ready(root, tmp_path / "c", category="wod")


def test_the_root_may_be_a_category(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "bottles", itself=True, shots_per_part=2)
    data = ready(root, tmp_path / "c")
    assert {s.category for s in data.samples["train"]} == {"bottles"}
    assert data.samples["test"][0].name.startswith("test/")
    assert all(s.group for s in data.samples["train"])


def test_a_validation_folder_is_used(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d")
    shutil.copytree(root / "tile" / "test" / "good", root / "tile" / "validation" / "good")
    assert table(ready(root, tmp_path / "c"))["val"] == {"good": 6}
    assert table(ready(root, tmp_path / "c"))["train"] == {"good": 12}


def test_what_is_refused(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d")
    shutil.copytree(root / "tile" / "test" / "hole", root / "tile" / "train" / "hole")
    with pytest.raises(DataError, match=r"train/hole holds defects, but data\.setting=one_class"):
        ready(root, tmp_path / "c")
    shutil.rmtree(root / "tile" / "ground_truth")
    with pytest.raises(DataError, match="has no folder ground_truth"):
        ready(root, tmp_path / "c", with_masks=True)
    with pytest.raises(DataError, match=r"not in MVTec AD's layout(.|\n)*<category>/train/good/000.png"):
        ready(tmp_path / "nothing", tmp_path / "c")


def test_one_class_needs_good_pictures_to_train_on(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", categories=("tile", "wood"), train_good=6)
    shutil.move(root / "wood" / "train" / "good", root / "wood" / "train" / "fine")
    with pytest.raises(DataError, match=r"data\.category: .*/wood has no folder train/good"):
        ready(root, tmp_path / "c", category="wood")
    shutil.move(root / "wood" / "train" / "fine", root / "wood" / "train" / "good")
    for path in (root / "wood" / "train" / "good").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"unreadable: 6(.|\n)*wood/train/good/000.png"):
        ready(root, tmp_path / "c")
    with (
        pytest.warns(UserWarning, match="unreadable 6"),
        pytest.raises(
            DataError, match=r"wood/train/good has no picture that can be used, so nothing trains wood\. Add"
        ),
    ):
        ready(root, tmp_path / "c", on_bad_file="skip")


def test_one_class_with_a_single_picture(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", train_good=1)
    with pytest.raises(DataError, match=r"data\.val_fraction: 0\.2 of 1 samples .* Add samples or set it to 0"):
        ready(root, tmp_path / "c")
    data = ready(root, tmp_path / "c", val_fraction=0.0)
    assert table(data)["train"] == {"good": 1}
    assert data.val_dataloader() == []
    with pytest.raises(DataError, match=r"no samples in the val split: set data\.val_fraction"):
        data.loader("val")
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (1, 3, 32, 40)


def test_one_class_without_any_defect_yet(tmp_path: Path) -> None:
    data = ready(make_mvtec(tmp_path / "d", defects={}), tmp_path / "c", target="type")
    assert data.class_names == ["good"]
    assert table(data)["test"] == {"good": 6}
    root = make_mvtec(tmp_path / "e", defects={})
    shutil.rmtree(root / "tile" / "test")
    untested = ready(root, tmp_path / "c")
    assert table(untested) == {"train": {"good": 10}, "val": {"good": 2}, "test": {}}
    with pytest.raises(DataError, match="no samples in the test split: fill the data set's own test split"):
        untested.test_dataloader()
    with pytest.raises(DataError, match="no sample of class defective"):
        ready(root, tmp_path / "c", setting="supervised")


def test_one_class_never_trains_on_the_defects_of_a_split_file(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "d", train_good=18)
    pooled = ready(root, tmp_path / "c", setting="supervised")
    assert table(pooled)["train"].keys() == {"good", "crack", "hole"}
    pooled.write_records(tmp_path / "run")
    data = ready(root, tmp_path / "c", split_file=str(tmp_path / "run" / "splits.csv"))
    assert table(data) == {
        "train": {"good": table(pooled)["train"]["good"]},
        "val": {"good": table(pooled)["val"]["good"]},
        "test": table(pooled)["test"],
    }


def test_originals_keep_the_size_of_the_files(tmp_path: Path) -> None:
    data = ready(make_mvtec(tmp_path / "d"), tmp_path / "c", with_masks=True, image_size=16)
    for position, sample in enumerate(data.samples["test"]):
        picture, mask = data.original("test", position)
        assert picture.shape == (32, 40, 3)
        assert mask.shape == (32, 40)
        assert mask.dtype == np.uint8
        assert mask.sum() == (10 * 13 if sample.label else 0)


def test_download_only_where_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)
    ready(make_mvtec(tmp_path / "d"), tmp_path / "c", download=True)  # is there: nothing to fetch
    with pytest.raises(DataError, match=r"no route to host(.|\n)*mvtec.com(.|\n)*cf4313b1") as caught:
        ready(tmp_path / "empty", tmp_path / "c", download=True)
    assert "<category>/ground_truth" in str(caught.value)


@pytest.mark.skipif(not TILES.is_dir(), reason="the magnetic tiles are not beside the project")
def test_real_tiles(tmp_path: Path) -> None:
    data = ready(TILES, tmp_path, cache="off")
    assert table(data)["test"] == {
        "good": 202,
        "blowhole": 115,
        "break": 85,
        "crack": 57,
        "fray": 32,
        "uneven": 103,
    }
    assert abs(len(data.samples["val"]) - 150) <= 6
    assert not torn_groups(data)
    few = ready(TILES, tmp_path, cache="off", setting="few_shot", val_fraction=0)
    assert not torn_groups(few)
    for kind, number in (("blowhole", 115), ("break", 85), ("crack", 57), ("fray", 32), ("uneven", 103)):
        assert abs(table(few)["train"][kind] - number // 3) <= 6
    masked = ready(TILES, tmp_path, cache="off", with_masks=True, on_bad_file="skip")
    assert table(masked)["test"]["uneven"] == 99  # four have an empty mask
    with pytest.raises(DataError, match="empty mask: 4"):
        ready(TILES, tmp_path, cache="off", with_masks=True)


def test_kinds_of_defect_alone(tmp_path):
    root = make_mvtec(tmp_path / "d", train_good=6, test_good=4, defects={"crack": 6, "hole": 9})
    data = ready(root, tmp_path / "c", setting="few_shot", target="defects", val_fraction=0)
    assert data.class_names == ["crack", "hole"]
    assert data.normal_class is None
    assert data.counts() == {"train": {"crack": 2, "hole": 3}, "test": {"crack": 4, "hole": 6}}


def test_kinds_of_defect_alone_have_no_one_class_setting(tmp_path):
    with pytest.raises(UserError, match=r"data\.setting=one_class does not train on: set data\.setting to few_shot"):
        MVTecAD(root=str(tmp_path), target="defects")
