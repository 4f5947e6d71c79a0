"""What goes into an editing: references, captions, masks of some pictures only, pictures that cannot be edited."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from lit_defect.editing.options import Edit
from lit_defect.errors import DataError, UserError
from lit_defect.generation.files import read_picture
from lit_defect.generation.store import read_manifest
from lit_defect.tasks.edit_inputs import EditInputs
from lit_defect.tasks.editing_plan import EditJob
from tests.anomaly_diffusion import NATIVE, make_base, make_parts, parts
from tests.editing import QUICK, edited, editor

JOB = EditJob(0, 0, "good", ("tile", "crack"), (0, 0, 0))


class Given(NamedTuple):
    root: Path
    base: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("inputs")
    return Given(make_parts(folder / "parts"), make_base(folder / "base"))


@pytest.fixture(autouse=True)
def _off_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Task(NamedTuple):
    """What `EditInputs` wants of an editor."""

    data: Any
    edit: Edit
    mode: str
    device: str = "cpu"


def inputs(given: Given, mode: str = "inpaint", data: dict[str, Any] | None = None, **edit: Any) -> EditInputs:
    module = parts(given.root, **(data or {}))
    module.setup("fit")
    return EditInputs(Task(module, Edit(**{**QUICK, **edit}), mode), "train", [("tile", "crack")], 8)


# --- references ---


@pytest.mark.parametrize("stretch", [False, True])
def test_references_keep_their_aspect(given, tmp_path, stretch):
    """A square one, followed in a frame twice as wide as high."""
    square = np.zeros((40, 40, 3), np.uint8)
    square[:, :20] = 255  # its left half
    Image.fromarray(square).save(tmp_path / "one.png")
    made = inputs(given, "reference_only", references=str(tmp_path), size=(32, 64), stretch=stretch)
    frame = made.frame(np.zeros((40, 80, 3), np.uint8), None)
    reference = made._reference(JOB, frame)
    assert reference.shape == (3, 32, 64)
    white = (reference[0].mean(0) > 0.5).int().tolist()
    assert white[:32] == ([1] * 32 if stretch else [1] * 16 + [0] * 16)


# --- captions ---


def test_a_captioner_without_a_place_for_its_words_is_refused(given):
    with pytest.raises(UserError, match=r"edit\.captioner = owner/name: no model\.init_args\.edit\.prompt has a"):
        inputs(given, "img2img", captioner="owner/name")


# --- sets that are cut short ---


@pytest.mark.parametrize("limit", [1, 0.5])
def test_half_a_set_is_refused(given, tmp_path, limit):
    with pytest.raises(UserError, match=r"trainer\.limit_predict_batches would leave half a set .*edit\.count instead"):
        edited(editor(given.base, result="crack"), parts(given.root), tmp_path / "set", limit_predict_batches=limit)
    assert not (tmp_path / "set").exists()


def test_an_unknown_foreground_names_the_option_of_the_editor(given):
    with pytest.raises(UserError, match=r"model\.init_args\.edit\.foreground = nowhere: expected auto, all"):
        inputs(given, foreground="nowhere")


# --- pictures of the data set in folders that are named ---


@pytest.mark.parametrize("key", ["references", "masks"])
def test_folders_with_pictures_that_test_are_refused_and_others_are_written_down(given, tmp_path, key):
    folder, mode = given.root / "tile/test/crack", "reference_only"
    if key == "masks":  # masks for each type, as `MaskDiffusion` writes them, linked to those of the data set
        (tmp_path / "masks/tile").mkdir(parents=True)
        folder, mode = tmp_path / "masks", "inpaint"
        (folder / "tile/crack").symlink_to(given.root / "tile/ground_truth/crack")
        for path in (given.root / "tile/ground_truth/crack").iterdir():
            (folder / f"{path.name}").symlink_to(path)
    with pytest.raises(DataError, match=rf"edit\.{key} = .*: 6 pictures or masks .*tile/test/crack/003\.png \(test\)"):
        inputs(given, mode, **{key: str(folder)})
    train = tmp_path / "train"
    shutil.copytree(given.root / "tile/test/crack", train / "tile/crack")
    for number in range(3):  # those that train, by links
        (train / f"{number}.png").symlink_to(
            given.root / f"tile/{'test' if key == 'references' else 'ground_truth'}/crack/"
            f"{number:03d}{'' if key == 'references' else '_mask'}.png"
        )
    made = inputs(given, mode, **{key: str(train)})
    assert {name for name, _ in made.looks([])} == {f"tile/test/crack/{number:03d}.png" for number in range(3)}


def test_a_type_comes_before_a_folder_of_its_name(given, tmp_path, monkeypatch):
    (tmp_path / "hole").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "hole" / "0.png")
    monkeypatch.chdir(tmp_path)
    made = inputs(given, "reference_only", references="hole")
    assert made.references is not None
    assert list(made.references) == ["tile"]
    assert {name for name, _ in made.looks([])} == {f"tile/test/hole/{number:03d}.png" for number in range(2)}


# --- masks of some pictures only, and unfit ones ---


def drawn(folder: Path, *numbers: int, size: tuple[int, int] = NATIVE) -> Path:
    """Masks of some of the good training pictures."""
    for number in numbers:
        mask = np.zeros(size, np.uint8)
        mask[4:12, 6:20] = 255
        path = folder / f"tile/train/good/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return folder


@pytest.mark.parametrize("kind", ["drawn", "boxes", "own"])
def test_pictures_without_a_mask_are_left_out(given, tmp_path, kind):
    options: dict[str, Any] = {"masks": str(drawn(tmp_path / "masks", 1, 4)), "result": "crack"}
    names = ["tile/train/good/001.png", "tile/train/good/004.png"]
    if kind == "boxes":
        options["masks"] = str(tmp_path / "boxes.csv")
        (tmp_path / "boxes.csv").write_text("path,x,y,width,height\n" + "".join(f"{n},2,2,9,9\n" for n in names))
    if kind == "own":
        options |= {"masks": "own", "sources": ["good", "hole"], "result": "hole"}
        names = ["tile/test/hole/000.png", "tile/test/hole/001.png"]
    with pytest.warns(UserWarning, match=r"(4 of 6|6 of 8) pictures have no mask there and are not edited"):
        rows = edited(editor(given.base, **options), parts(given.root), tmp_path / "set")
    assert sorted(row["source"] for row in rows) == names
    assert {row["accepted"] for row in rows} == {"1"}


def test_a_mask_of_no_picture_is_named_with_the_nearest(given, tmp_path):
    masks = drawn(tmp_path / "masks", 1)
    (masks / "tile/train/good/001.png").with_name("01.png").write_bytes(b"never opened")
    with pytest.warns(
        UserWarning, match=r"for 1 pictures that are not in .* tile/train/good/01\.png\. Did you mean tile"
    ):
        edited(editor(given.base, masks=str(masks), result="crack"), parts(given.root), tmp_path / "set")


def test_a_picture_with_an_unfit_mask_is_rejected_and_the_others_are_made(given, tmp_path):
    drawn(tmp_path / "masks", 0, 1, 2, 3)
    drawn(tmp_path / "masks", 2, size=(20, 30))
    for time in range(2):  # gone on with, too
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            rows = edited(
                editor(given.base, result="crack", masks=str(tmp_path / "masks"), batch=1),
                parts(given.root),
                tmp_path / "set",
            )
        assert len(rows) == 4
        (bad,) = [row for row in rows if row["accepted"] == "0"]
        assert bad["source"] == "tile/train/good/002.png"
        assert "is 30x20, its picture tile/train/good/002.png 45x37" in bad["reason"]
        assert json.loads(bad["rejected"]) == {"picture or mask unfit": 1}
        assert sum("002.png is not edited: " in str(one.message) for one in told) == (time == 0)
    assert len(read_manifest(tmp_path / "set")) == 4


def test_masks_that_fit_no_picture_are_an_error(given, tmp_path):
    masks = drawn(tmp_path / "masks", 0, 1, 2, 3, size=(20, 30))
    with pytest.raises(DataError, match=r"no picture could be edited: .* is 30x20, its picture"):
        edited(editor(given.base, result="crack", masks=str(masks)), parts(given.root), tmp_path / "set")


# --- files that have changed ---


@pytest.mark.parametrize("key", ["masks", "boxes", "foreground", "references"])
def test_a_set_is_not_gone_on_with_when_named_files_have_changed(given, tmp_path, key):
    folder, mode, options = drawn(tmp_path / "files", *range(6)), "inpaint", {"result": "crack", "count": 1}
    file = folder / "tile/train/good/003.png"
    if key == "boxes":
        folder = file = tmp_path / "boxes.csv"
        file.write_text("path,x,y,width,height\n" + "".join(f"tile/train/good/{n:03d}.png,2,2,9,9\n" for n in range(6)))
    if key == "foreground":
        options |= {"mask_area": (0.1, 0.2), "masks": "random"}
    if key == "references":
        mode, file = "reference_only", folder / "one.png"
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(file)
    option = "masks" if key == "boxes" else key
    options[option] = str(folder)

    def again() -> None:
        edited(editor(given.base, mode, **options), parts(given.root), tmp_path / "set")

    again()
    (tmp_path / "files/.DS_Store").touch()
    again()
    if key == "boxes":
        file.write_text(file.read_text().replace("2,2,9,9", "2,2,9,8"))
    else:
        Image.fromarray(np.asarray(read_picture(file)) ^ 1).save(file)
    with pytest.raises(UserError, match=rf"options\.files\.{option} was "):
        again()


def test_a_set_is_not_gone_on_with_when_the_autoencoder_works_in_tiles(given, tmp_path):
    edited(editor(given.base, result="crack", count=1), parts(given.root), tmp_path / "set")
    tiled = editor(given.base, network={"vae_tiling": True}, result="crack", count=1)
    with pytest.raises(UserError, match=r"options\.vae_tiling was False, is True"):
        edited(tiled, parts(given.root), tmp_path / "set")


# --- pictures of one's own ---


def test_what_is_made_of_pictures_of_ones_own_trains_whatever_they_are_called(given, tmp_path):
    """Named as two that test here, and grouped with nothing."""
    new = tmp_path / "new/tile/test/crack"
    new.mkdir(parents=True)
    for number in (7, 8):
        picture = np.random.default_rng(number).integers(0, 255, (*NATIVE, 3), dtype=np.uint8)
        Image.fromarray(picture).save(new / f"{number:03d}.png")
    data = parts(given.root, predict_root=str(tmp_path / "new"))
    rows = edited(editor(given.base, result="hole"), data, tmp_path / "set")
    assert sorted(row["source"] for row in rows) == ["tile/test/crack/007.png", "tile/test/crack/008.png"]
    trained = parts(given.root, synthetic=str(tmp_path / "set"))
    trained.prepare_data()
    trained.setup("fit")
    added = [sample for sample in trained.samples["train"] if sample.source != "real"]
    assert [(sample.defect_type, sample.group) for sample in added] == [("hole", "")] * 2


def test_pictures_of_the_data_set_are_not_foreign(given, tmp_path):
    data = parts(given.root, predict_root=str(given.root / "tile/test/good"))
    with pytest.raises(UserError, match=r"predict_root: tile/test/good/000\.png is a picture of the data set itself"):
        edited(editor(given.base, result="hole"), data, tmp_path / "set")
