"""Own pictures: folders, lists of crops, windows and tiles, and every way in which a list can be wrong."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_defect.data.crops import CustomCrops
from lit_defect.errors import DataError, UserError
from tests.fakes import make_crops_csv, make_crops_folder, save, write_rows


def ready(root: Path, memory: Path, **settings: object) -> CustomCrops:
    data = CustomCrops(str(root), cache_dir=str(memory), leakage="off", **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def everything(data: CustomCrops) -> dict[str, str]:
    """Name -> class, over all splits."""
    names = data.class_names
    return {s.name: names[s.label] for split in ("train", "val", "test") for s in data.samples[split]}


def photograph(root: Path, name: str, size: tuple[int, int] = (60, 100)) -> np.ndarray:
    picture = np.random.default_rng(len(name)).integers(0, 255, size, dtype=np.uint8)
    save(picture, root / name)
    return picture


def listed(root: Path, *rows: tuple[object, ...], header: str = "path,x,y,width,height,label") -> str:
    write_rows(root / "list.csv", header.split(","), rows)
    return "list.csv"


# ---- folders


def test_a_folder_per_class(tmp_path: Path) -> None:
    root = make_crops_folder(tmp_path / "d", classes={"scratch": 10, "OK": 20, "dent": 10})
    data = ready(root, tmp_path / "c")
    assert data.class_names == ["OK", "dent", "scratch"]
    assert data.normal_class == 0
    assert Counter(everything(data).values()) == {"OK": 20, "scratch": 10, "dent": 10}
    assert len(data.samples["test"]) == 10
    assert all(name.startswith(f"{kind}/") for name, kind in everything(data).items())


def test_prescribed_splits(tmp_path: Path) -> None:
    data = ready(make_crops_folder(tmp_path / "d", splits=("train", "test")), tmp_path / "c")
    assert {s.name.split("/")[0] for s in data.samples["test"]} == {"test"}
    assert {s.name.split("/")[0] for s in data.samples["train"] + data.samples["val"]} == {"train"}
    assert data.class_names == ["good", "defective"]


def test_the_flawless_class(tmp_path: Path) -> None:
    root = make_crops_folder(tmp_path / "d", classes={"intact": 8, "burnt": 8})
    data = ready(root, tmp_path / "c")
    assert (data.class_names, data.normal_class) == (["burnt", "intact"], None)
    data = ready(root, tmp_path / "c", normal_class="intact")
    assert (data.class_names, data.normal_class) == (["intact", "burnt"], 0)
    with pytest.raises(UserError, match=r"no class intac in burnt, intact\. Did you mean intact\?"):
        ready(root, tmp_path / "c", normal_class="intac")
    both = make_crops_folder(tmp_path / "both", classes={"good": 4, "ok": 4})
    with pytest.raises(UserError, match="good and ok may both be flawless"):
        ready(both, tmp_path / "c")


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nothing\. Expected a folder per class"):
        ready(tmp_path / "nothing", tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no folders"):
        ready(tmp_path / "empty", tmp_path / "c")
    root = make_crops_folder(tmp_path / "d")
    (root / "dent").mkdir()
    with pytest.raises(DataError, match=r"dent has no pictures"):
        ready(root, tmp_path / "c")


# ---- lists


def test_folders_that_are_half_splits_are_refused(tmp_path: Path) -> None:
    root = make_crops_folder(tmp_path / "d", splits=("train", "test"))
    (root / "test").rename(root / "Test")
    with pytest.raises(DataError, match=r"holds Test, train, of which Test, train sound like splits"):
        ready(root, tmp_path / "c")
    (root / "Test").rename(root / "docs")
    with pytest.raises(DataError, match=r"holds docs, train, of which train"):
        ready(root, tmp_path / "c")


def test_loose_hidden_and_lost_pictures(tmp_path: Path) -> None:
    root = make_crops_folder(tmp_path / "d", classes={"good": 4, "bad": 4})
    hidden = root / "good" / ".ipynb_checkpoints" / "000-checkpoint.png"
    hidden.parent.mkdir()
    for copy in (hidden, root / "good" / "._000.png", root / "overview.png"):
        copy.write_bytes((root / "good" / "000.png").read_bytes())
    with pytest.warns(UserWarning, match=r"1 pictures stand in no class's folder .*overview.png"):
        data = ready(root, tmp_path / "c")
    assert len(everything(data)) == 8
    (root / "good" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"missing: 1(.|\n)*good/lost.png"):
        ready(root, tmp_path / "c")


@pytest.mark.parametrize("masks", [False, True])
def test_crops_of_a_list(tmp_path: Path, masks: bool) -> None:
    file = make_crops_csv(tmp_path / "d", masks=masks)
    data = ready(file.parent, tmp_path / "c", annotations="crops.csv", with_masks=masks, batch_size=4)
    assert data.class_names == ["good", "defective"]
    for split in ("train", "val", "test"):
        by_photograph = Counter(s.group for s in data.samples[split])
        assert set(by_photograph.values()) == {2}  # both crops of a photograph
    batch = next(iter(data.test_dataloader()))
    for i, name in enumerate(batch["name"]):
        photo, _, box = name.partition("#")
        x, y, width, height = map(int, box.split(","))
        full = np.asarray(Image.open(file.parent / photo))
        assert (batch["image"][i, 0].numpy() == full[y : y + height, x : x + width]).all()
        if masks:
            assert (batch["mask"][i].sum() > 0) == (batch["label"][i] == 1)


def test_json_says_the_same(tmp_path: Path) -> None:
    file = make_crops_csv(tmp_path / "d")
    data = ready(file.parent, tmp_path / "c", annotations="crops.csv")
    header, *lines = (line.split(",") for line in file.read_text().splitlines())
    entries = [dict(zip(header, line, strict=True)) for line in lines]
    for entry in entries:
        entry.update({key: int(entry[key]) for key in ("x", "y", "width", "height")})
    (file.parent / "crops.json").write_text(json.dumps(entries))
    again = ready(file.parent, tmp_path / "c", annotations=str(file.parent / "crops.json"))
    assert again.samples == data.samples


def test_split_group_source_and_whole_photographs(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for i in range(9):
        photograph(root, f"{i}.png")
    rows = [(f"{i}.png", "good" if i < 5 else "dent", "", f"part{i // 2}", "") for i in range(8)]
    rows[0] = ("0.png", "good", "test", "part0", "")
    rows.append(("8.png", "dent", "train", "", "diffusion"))
    data = ready(
        root,
        tmp_path / "c",
        annotations=listed(root, *rows, header="path,label,split,group,source"),
        val_fraction=0,
    )
    assert {s.name for s in data.samples["test"]} == {"0.png", "1.png"}  # one part, one of them prescribed
    made = next(s for s in data.samples["train"] if s.name == "8.png")
    assert (made.source, made.box, made.group) == ("diffusion", None, "8.png")
    rows[-1] = ("8.png", "dent", "test", "", "diffusion")
    with pytest.raises(DataError, match="generated pictures are in the test split"):
        ready(
            root,
            tmp_path / "c",
            annotations=listed(root, *rows, header="path,label,split,group,source"),
            val_fraction=0,
        )


def test_every_wrong_row_is_named(tmp_path: Path) -> None:
    root = tmp_path / "d"
    photograph(root, "1.png")
    photograph(tmp_path, "secret.png")
    (root / "link").symlink_to(tmp_path)
    good = ("1.png", 0, 0, 5, 5, "good")
    file = listed(
        root,
        good,
        ("", 0, 0, 5, 5, "good"),
        ("1.png", 0, 0, 5, 5, ""),
        ("../secret.png", 0, 0, 5, 5, "good"),
        (str(tmp_path / "secret.png"), 0, 0, 5, 5, "good"),
        ("link/secret.png", 0, 0, 5, 5, "good"),
        ("1.png", 0, 0, 5, "", "good"),
        ("1.png", 0, 0, 2.5, 5, "good"),
        ("1.png", "nan", 0, 5, 5, "good"),
        ("1.png", -1, 0, 5, 5, "good"),
        ("1.png", 0, 0, 0, 5, "good"),
        good,
    )
    with pytest.raises(DataError) as caught:
        ready(root, tmp_path / "c", annotations=file)
    text = str(caught.value)
    assert "11 rows are wrong" in text
    for part in (
        "line 3: no path",
        "line 4: no label",
        "line 5: '../secret.png' leads out of",
        "secret.png' leads out of",
        "line 7: 'link/secret.png' leads out of",
        "line 8: x, y, width, height are 0, 0, 5, ; expected four whole numbers",
        "line 9: x, y",
        "line 10: x, y",
        "line 11: the box -1, 0, 5, 5 is empty or begins outside",
        "line 12: the box 0, 0, 0, 5 is empty",
        "line 13: 1.png#0,0,5,5 stands at line 2, too",
    ):
        assert part in text
    for row, message in (
        (("1.png", "good", "training", ""), "split 'training'"),
        (("1.png", "good", "", "../secret.png"), "leads out of"),
    ):
        with pytest.raises(DataError, match=message):
            ready(root, tmp_path / "c", annotations=listed(root, row, header="path,label,split,mask"))


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    root = tmp_path
    for text, name, message in (
        ("path,class\n", "a.csv", "the header is 'path,class'; expected path, label and some of path, x"),
        ("path;label\n1.png;x\n", "a.csv", "separated by commas"),
        ("path,label\n", "a.csv", "has no rows"),
        ("path,label\n1.png,dent, deep\n", "a.csv", "line 2: more cells than the header"),
        ("{}", "a.json", "expected a list of objects"),
        ("[1]", "a.json", "expected a list of objects"),
        ("[", "a.json", "cannot be read"),
        ('[{"path": "1.png", "lable": "x"}]', "a.json", "unknown keys lable"),
    ):
        (root / name).write_text(text)
        with pytest.raises(DataError, match=message):
            ready(root, tmp_path / "c", annotations=name)
    with pytest.raises(DataError, match=r"none.csv is not there"):
        ready(root, tmp_path / "c", annotations="none.csv")
    (root / "a.csv").write_bytes("path,label\n1.png,Kratzer häßlich\n".encode("latin-1"))
    with pytest.raises(DataError, match="expected a CSV file in UTF-8"):
        ready(root, tmp_path / "c", annotations="a.csv")
    # A picture that is missing and a box over the edge are found by the inspection of the files.
    photograph(root, "1.png")
    with pytest.raises(DataError, match=r"box outside the picture: 1(.|\n)*missing: 1"):
        ready(
            root,
            tmp_path / "c",
            annotations=listed(root, ("1.png", 90, 0, 20, 9, "ok"), ("2.png", 0, 0, 9, 9, "bad")),
        )


# ---- windows


def test_windows_stay_inside_the_photograph(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for i in range(4):
        photograph(root, f"{i}.png", (60, 100))
    file = listed(
        root,
        ("0.png", 48, 28, 4, 4, "dent"),  # in the middle: centre (50, 30)
        ("1.png", 0, 0, 4, 4, "dent"),  # in a corner: shifted
        ("2.png", 96, 56, 4, 4, "good"),  # in the opposite corner
        ("3.png", 97, 20, 3, 3, "good"),
    )
    data = ready(root, tmp_path / "c", annotations=file, window=(24, 32), multiple_of=8, val_fraction=0)
    assert set(everything(data)) == {
        "0.png#34,18,32,24",
        "1.png#0,0,32,24",
        "2.png#68,36,32,24",
        "3.png#68,9,32,24",
    }
    assert next(iter(data.test_dataloader()))["image"].shape[2:] == (24, 32)


def test_windows_show_what_their_label_says(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for i in range(3):
        photograph(root, f"{i}.png")
    rows = [
        ("0.png", 10, 10, 4, 4, "dent"),
        ("0.png", 30, 10, 4, 4, "good"),  # its window reaches the dent
        ("0.png", 80, 40, 4, 4, "good"),
        ("1.png", 10, 10, 6, 6, "dent"),
        ("1.png", 11, 11, 4, 4, "dent"),  # the same window
        ("2.png", 10, 10, 4, 4, "good"),
    ]
    with pytest.warns(UserWarning, match=r"1 windows of good boxes show a defect .*0.png#30,10,4,4"):
        data = ready(root, tmp_path / "c", annotations=listed(root, *rows), window=(40, 40), val_fraction=0)
    assert Counter(everything(data).values()) == {"dent": 2, "good": 2}
    clash = [*rows, ("1.png", 11, 11, 4, 4, "scratch")]
    clash.pop(4)
    with pytest.raises(DataError, match=r"scratch and dent boxes in .* get the same window"):
        ready(root, tmp_path / "c", annotations=listed(root, *clash), window=(40, 40))


def test_windows_that_do_not_fit(tmp_path: Path) -> None:
    root = tmp_path / "d"
    photograph(root, "1.png", (60, 100))
    box = ("1.png", 0, 0, 5, 5, "good")
    with pytest.raises(DataError, match=r"data.window is 64x64, but 1 photographs are smaller \(1.png\)"):
        ready(root, tmp_path / "c", annotations=listed(root, box), window=(64, 64))
    with pytest.raises(DataError, match=r"needs a box in every row; 1.png has none"):
        ready(root, tmp_path / "c", annotations=listed(root, ("1.png", "", "", "", "", "good")), window=(8, 8))


@pytest.mark.parametrize("cut", ["window", "tile"])
def test_boxes_over_the_edge_are_reported_with_all_else(tmp_path: Path, cut: str) -> None:
    root = tmp_path / "d"
    for i in range(6):
        photograph(root, f"{i}.png", (60, 100))
    good = [(f"{i}.png", 5, 5, 5, 5, "good") for i in range(1, 6)]
    bad = [(f"{i}.png", 50, 40, 5, 5, "dent") for i in range(1, 6)]
    wrong = [("0.png", 98, 0, 5, 5, "dent"), ("missing.png", 0, 0, 5, 5, "good")]
    file = listed(root, *good, *bad, *wrong)
    with pytest.raises(DataError, match=r"box outside the picture: 1(.|\n)*0.png#98(.|\n)*missing: 1"):
        ready(root, tmp_path / "c", annotations=file, **{cut: (8, 8)})
    data = ready(root, tmp_path / "c", annotations=file, on_bad_file="skip", **{cut: (8, 8)})
    assert not any(name.startswith(("0.png", "missing")) for name in everything(data))


def test_a_defect_without_a_mask_is_reported(tmp_path: Path) -> None:
    root = tmp_path / "d"
    make_crops_csv(root, photographs=4, masks=True)
    text = (root / "crops.csv").read_text()
    (root / "crops.csv").write_text(text.replace("masks/002.png", ""))
    ready(root, tmp_path / "c", annotations="crops.csv")
    with pytest.raises(DataError, match=r"mask missing: 1(.|\n)*photos/002.png#"):
        ready(root, tmp_path / "c", annotations="crops.csv", with_masks=True)


def test_lists_as_spreadsheets_and_windows_write_them(tmp_path: Path) -> None:
    root = tmp_path / "d"
    file = make_crops_csv(root, photographs=4)
    plain = everything(ready(root, tmp_path / "c", annotations="crops.csv"))
    text = file.read_text().replace("path,x,y", "path, x, y").replace("\n", "\r\n")
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert everything(ready(root, tmp_path / "c", annotations="crops.csv")) == plain
    rows = list(csv.DictReader(text.replace(", ", ",").splitlines()))
    (root / "crops.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert everything(ready(root, tmp_path / "c", annotations="crops.json")) == plain


# ---- tiles


def test_tiles_cover_the_photograph_and_know_their_defects(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for i in range(3):
        photograph(root, f"{i}.png", (50, 90))
    # Steps of 20 (40 less a half): columns 0, 20, 40, 50; rows 0, 10.
    file = listed(
        root,
        ("0.png", 0, 0, 5, 5, "dent"),
        ("1.png", 85, 45, 5, 5, "scratch"),
        ("2.png", "", "", "", "", "good"),
    )
    data = ready(root, tmp_path / "c", annotations=file, tile=(40, 40), overlap=0.5, val_fraction=0, test_fraction=0)
    tiles = everything(data)
    boxes = {tuple(map(int, name.split("#")[1].split(","))) for name in tiles}
    assert boxes == {(x, y, 40, 40) for x in (0, 20, 40, 50) for y in (0, 10)}
    assert len(tiles) == 3 * 8
    assert {name for name, kind in tiles.items() if kind == "dent"} == {"0.png#0,0,40,40"}
    assert {name for name, kind in tiles.items() if kind == "scratch"} == {"1.png#50,10,40,40"}
    assert {s.group for s in data.samples["train"]} == {"0.png", "1.png", "2.png"}


def test_tiles_are_labelled_by_a_mask(tmp_path: Path) -> None:
    root = tmp_path / "d"
    for i in range(4):
        photograph(root, f"{i}.png", (40, 80))
        mask = np.zeros((40, 80), np.uint8)
        mask[5:8, 60:62] = 255
        save(mask, root / f"mask{i}.png")
    rows = [(f"{i}.png", "dent", f"mask{i}.png") for i in range(4)]
    data = ready(
        root,
        tmp_path / "c",
        annotations=listed(root, *rows, header="path,label,mask"),
        tile=(40, 40),
        with_masks=True,
    )
    assert data.class_names == ["good", "dent"]  # good comes from the tiles
    assert {name.split("#")[1] for name, kind in everything(data).items() if kind == "dent"} == {"40,0,40,40"}
    batch = next(iter(data.test_dataloader()))
    assert (batch["mask"].flatten(1).sum(1) == 6 * batch["label"]).all()
    with pytest.raises(DataError, match=r"nothing tells where in .*0.png the dent is"):
        ready(
            root,
            tmp_path / "c",
            annotations=listed(root, ("0.png", "dent"), header="path,label"),
            tile=(40, 40),
        )
    rows = [("0.png", 0, 0, 5, 5, "dent", "a"), ("0.png", 9, 9, 5, 5, "dent", "b")]
    with pytest.raises(DataError, match="differ in split, group or source"):
        ready(
            root,
            tmp_path / "c",
            annotations=listed(root, *rows, header="path,x,y,width,height,label,group"),
            tile=(40, 40),
        )


# ---- sizes and settings


def test_sizes_that_are_no_multiples(tmp_path: Path) -> None:
    file = make_crops_csv(tmp_path / "d", photographs=3, crop=(24, 20))
    with pytest.raises(DataError, match=r"24x20: 6 \(photos/000.png#.*; the nearest is 24x16"):
        ready(file.parent, tmp_path / "c", annotations="crops.csv", multiple_of=8)
    ready(file.parent, tmp_path / "c", annotations="crops.csv", multiple_of=8, image_size=32)
    folder = make_crops_folder(tmp_path / "f", size=(30, 32))
    with pytest.raises(DataError, match=r"30x32: 24 .* the nearest is 32x32"):
        ready(folder, tmp_path / "c", multiple_of=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (8, 8), "tile": (8, 8), "annotations": "a.csv"}, "exclude each other"),
        ({"window": (8, 8)}, "data.window needs data.annotations"),
        ({"tile": (8, 8)}, "data.tile needs data.annotations"),
        ({"tile": (0, 8), "annotations": "a.csv"}, r"data.tile is \(0, 8\)"),
        ({"overlap": 1.0}, "data.overlap is 1"),
        ({"multiple_of": 0}, "data.multiple_of is 0"),
        ({"multiple_of": 8, "image_size": 100}, "data.image_size is 100x100, .* the nearest is 96x96"),
        (
            {"multiple_of": 8, "window": (1290, 1288), "annotations": "a.csv"},
            "data.window is 1290x1288, .* 1288x1288",
        ),
    ],
)
def test_settings_that_contradict(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        CustomCrops(str(tmp_path), **settings)


def test_originals_are_the_crops_at_their_own_size(tmp_path: Path) -> None:
    file = make_crops_csv(tmp_path / "d", masks=True)
    data = ready(file.parent, tmp_path / "c", annotations="crops.csv", with_masks=True, image_size=8)
    for position, sample in enumerate(data.samples["test"]):
        picture, mask = data.original("test", position)
        x, y, width, height = sample.box
        photo = np.asarray(Image.open(sample.path))[y : y + height, x : x + width]
        assert (picture == photo[..., None]).all()
        expected = np.zeros((24, 24))
        if sample.mask:
            expected = np.asarray(Image.open(sample.mask))[y : y + height, x : x + width] > 0
            assert expected.any()
        assert (mask == expected).all()


def test_one_class_trains_on_flawless_pictures_and_tests_all_others(tmp_path):
    root = make_crops_folder(tmp_path, classes={"good": 20, "bent": 10})
    rows = [(f"{kind}/{i:03d}.png", kind, "", "") for kind, count in (("good", 20), ("bent", 10)) for i in range(count)]
    rows[20] = ("bent/000.png", "bent", "train", "")  # as the user wants it, and so not used
    rows[21] = ("bent/001.png", "bent", "", "part-1")  # a part that trains
    rows[0] = ("good/000.png", "good", "train", "part-1")
    write_rows(root / "list.csv", ("path", "label", "split", "group"), rows)
    data = CustomCrops(str(root), annotations="list.csv", setting="one_class", cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    kinds = {split: {s.defect_type for s in data.samples[split]} for split in ("train", "val", "test")}
    assert kinds == {"train": {"good"}, "val": {"good"}, "test": {"good", "bent"}}
    tested = {s.name for s in data.samples["test"] if s.defect_type == "bent"}
    assert tested == {f"bent/{i:03d}.png" for i in range(2, 10)}


def test_one_class_needs_a_flawless_class(tmp_path):
    root = make_crops_folder(tmp_path, classes={"perfect": 8, "bent": 8})
    data = CustomCrops(str(root), setting="one_class", cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    with pytest.raises(UserError, match=r"data\.normal_class"):
        data.setup("fit")
