"""StableDiffusionEditor writes data sets: as asked for, repeatable, untouched outside its masks, fit to train on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from lit_defect.data import ELPV, CustomCrops
from lit_defect.editing.pipelines import open_pipeline
from lit_defect.editing.running import Result
from lit_defect.errors import DataError, UserError
from lit_defect.generation.judgement import stands_out
from lit_defect.generation.store import read_manifest
from lit_defect.tasks import edit_making, editing
from lit_defect.tasks.editing_plan import plan_edits
from tests.anomaly_diffusion import NATIVE, contents, make_base, make_parts, marked, parts, pixels
from tests.editing import edited, editor, write_config
from tests.fakes import make_crops_csv, make_elpv

GOOD = [f"tile/train/good/{i:03d}.png" for i in range(6)]


class Given(NamedTuple):
    root: Path
    base: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("editing")
    return Given(make_parts(folder / "parts"), make_base(folder / "base"))


@pytest.fixture(autouse=True)
def _off_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def source_of(given: Given, row: dict[str, str]) -> np.ndarray:
    return pixels(given.root / row["source"])


# --- the plan ---


def test_plan_takes_each_source_equally_often_and_grows_without_change():
    sources = [("tile", "good")] * 4 + [("tile", "hole")] * 2
    few, many = (plan_edits(sources, None, lambda kind, n=n: n, 3) for n in (4, 9))
    assert [job for job in many if job.number in {j.number for j in few}] == few
    taken = [job.source for job in many if job.kind == "good"]
    assert len(taken) == 9
    assert set(np.unique(taken, return_counts=True)[1]) <= {2, 3}
    assert {job.pair for job in few} == {("tile", "good"), ("tile", "hole")}
    assert len(plan_edits(sources, ["crack"], lambda kind: None, 0)) == 6
    both = plan_edits(sources, ["crack", "fray"], lambda kind: 2, 0)
    assert sorted(job.pair[1] for job in both) == ["crack"] * 4 + ["fray"] * 4


# --- what is written ---


def test_inpainting_leaves_every_pixel_outside_the_mask_as_it_was(given, tmp_path):
    rows = edited(editor(given.base, result="crack"), parts(given.root), tmp_path / "set")
    assert [row["source"] for row in sorted(rows, key=lambda r: r["source"])] == GOOD
    for row in rows:
        assert row["accepted"] == "1"
        assert (row["defect_type"], row["mode"]) == ("crack", "inpaint")
        before, after = source_of(given, row), pixels(tmp_path / "set" / row["image"])
        mask = marked(tmp_path / "set" / row["mask"])
        assert after.shape == (*NATIVE, 3)
        assert mask.any()
        assert (after[~mask] == before[~mask]).all()
        assert (after[mask] != before[mask]).any()
        assert float(row["most_outside"]) > 0  # before the paste, the autoencoder had changed it


def test_pasting_nothing_back_shows_what_the_network_has_done_outside(given, tmp_path):
    row = edited(editor(given.base, result="crack", paste="none", count=1), parts(given.root), tmp_path / "set")[0]
    before, after = source_of(given, row), pixels(tmp_path / "set" / row["image"])
    mask = marked(tmp_path / "set" / row["mask"])
    assert np.abs(after[~mask].astype(int) - before[~mask]).max() == pytest.approx(float(row["most_outside"]), abs=1)


@pytest.mark.parametrize("sides", [(32, 32), (40, 24)])
def test_a_working_size_does_not_change_the_size_of_what_comes_out(given, tmp_path, sides):
    task = editor(given.base, result="hole", area="only_masked", padding=4, size=sides, count=2)
    for row in edited(task, parts(given.root), tmp_path / "set"):
        before, after = source_of(given, row), pixels(tmp_path / "set" / row["image"])
        mask = marked(tmp_path / "set" / row["mask"])
        assert after.shape == before.shape
        assert (after[~mask] == before[~mask]).all()


def test_variants_keep_type_and_mask_of_their_source(given, tmp_path):
    task = editor(given.base, "img2img", sources=["crack", "good"], strength={"crack": 0.5, "good": 0.25}, count=2)
    rows = edited(task, parts(given.root), tmp_path / "set")
    assert sorted((row["defect_type"], float(row["strength"])) for row in rows) == [
        ("crack", 0.5), ("crack", 0.5), ("good", 0.25), ("good", 0.25)
    ]  # fmt: skip
    for row in rows:
        if row["defect_type"] == "good":
            assert row["mask"] == ""
        else:
            own = given.root / row["source"].replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
            assert (marked(tmp_path / "set" / row["mask"]) == marked(own)).all()


def test_an_unmasked_new_defect_is_marked_where_the_network_has_changed_the_picture(given, tmp_path, monkeypatch):
    def hole(opened: Any, requests: Any, edit: Any) -> Result:  # the autoencoder's picture with a square hole
        same = opened.decode(opened.encode(torch.stack([request.picture for request in requests])))
        same[:, :, 8:20, 8:22] = (same[:, :, 8:20, 8:22] - 0.4).clamp(0, 1)
        return Result(same, *[[False] * len(requests)] * 2)

    monkeypatch.setattr(edit_making, "run", hole)
    task = editor(given.base, "img2img", result="hole", repair=True, least_change=3.0, least_contrast=0.0, count=2)
    for row in edited(task, parts(given.root), tmp_path / "set"):
        mask = marked(tmp_path / "set" / row["mask"])
        wanted = np.zeros_like(mask)
        wanted[8:20, 8:22] = True
        assert (mask == wanted).mean() > 0.98
        after = pixels(tmp_path / "set" / row["image"])
        assert (after[~mask] == source_of(given, row)[~mask]).all()
        assert float(row["change_inside"]) > 20


def test_what_changes_more_than_real_defects_cover_is_refused(given, tmp_path, monkeypatch):
    def all_over(opened: Any, requests: Any, edit: Any) -> Result:
        return Result(torch.stack([1 - request.picture for request in requests]), *[[False] * len(requests)] * 2)

    monkeypatch.setattr(edit_making, "run", all_over)
    task = editor(given.base, "img2img", result="hole", repair=True, least_contrast=0.0, count=1)
    assert edited(task, parts(given.root), tmp_path / "set")[0]["reason"] in ("mask: too large", "mask: full")


def test_a_variation_is_another_picture_whose_defect_lies_anywhere(given, tmp_path, monkeypatch):
    task = editor(given.base, "img2img", sources=["hole"], count=1)
    task.mode = "variation"  # as its label is decided on
    monkeypatch.setattr(editing, "open_pipeline", lambda base, mode, *rest: open_pipeline(base, "img2img", *rest))
    row = edited(task, parts(given.root), tmp_path / "set")[0]
    assert (row["accepted"], row["mask"]) == ("1", "")
    task.edit = replace(task.edit, masks="own")  # held to the picture outside of it
    row = edited(task, parts(given.root), tmp_path / "own")[0]
    own = given.root / row["source"].replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
    assert (marked(tmp_path / "own" / row["mask"]) == marked(own)).all()


def test_a_second_defect_is_judged_by_itself_and_marked_beside_the_first(given, tmp_path, monkeypatch):
    def nothing(opened: Any, requests: Any, edit: Any) -> Result:
        return Result(torch.stack([request.picture for request in requests]), *[[False] * len(requests)] * 2)

    monkeypatch.setattr(edit_making, "run", nothing)
    task = editor(given.base, sources=["hole"], result="crack", count=2, feather=0.0, least_contrast=0.1)
    for row in edited(task, parts(given.root), tmp_path / "set"):  # the hole stands out, the crack is not there
        assert row["reason"] == "fainter than real ones"
    task = editor(given.base, sources=["hole"], result="crack", count=1, feather=0.0)
    row = edited(task, parts(given.root), tmp_path / "both")[0]
    own = given.root / row["source"].replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
    area = marked(tmp_path / "both" / "areas" / "00000.png")
    assert (marked(tmp_path / "both" / row["mask"]) == (area | marked(own))).all()


def test_a_mask_of_all_of_a_picture_is_no_rule_for_others(given, tmp_path):
    root = tmp_path / "parts"
    shutil.copytree(given.root, root)
    mask = next(iter(sorted((root / "tile" / "ground_truth" / "crack").glob("*.png"))))
    Image.fromarray(np.full(NATIVE, 255, np.uint8)).save(mask)
    assert len(edited(editor(given.base, result="crack", masks="random", count=1), parts(root), tmp_path / "set")) == 1


def test_own_masks_are_where_variants_change(given, tmp_path):
    rows = edited(editor(given.base, sources=["hole"], masks="own"), parts(given.root), tmp_path / "set")
    for row in rows:
        before, after = source_of(given, row), pixels(tmp_path / "set" / row["image"])
        mask = marked(tmp_path / "set" / row["mask"])
        assert (after[~mask] == before[~mask]).all()


def test_changes_are_added_to_the_photograph_s_own_grain(given, tmp_path, monkeypatch):
    def nothing(opened: Any, requests: Any, edit: Any) -> Result:  # a network that changes nothing
        same = opened.decode(opened.encode(torch.stack([request.picture for request in requests])))
        return Result(same, *[[False] * len(requests)] * 2)

    monkeypatch.setattr(edit_making, "run", nothing)
    change = {}
    for paste in ("picture", "change"):
        task = editor(given.base, result="crack", paste=paste, count=1, least_change=0.0)
        change[paste] = float(edited(task, parts(given.root), tmp_path / paste)[0]["change_inside"])
    assert change["picture"] > 1  # the autoencoder's own loss
    assert change["change"] == 0


def test_candidates_are_judged_and_the_rejected_kept_apart(given, tmp_path):
    task = editor(given.base, result="crack", candidates=3, least_change=200.0, keep_rejected=True, count=2)
    rows = edited(task, parts(given.root), tmp_path / "set")
    assert [row["accepted"] for row in rows] == ["0", "0"]
    assert all(json.loads(row["rejected"])["nothing changed"] == 3 for row in rows)
    assert len(list((tmp_path / "set" / "rejected").rglob("*.png"))) == 6
    assert not list((tmp_path / "set" / "tile").rglob("*.png")) if (tmp_path / "set" / "tile").exists() else True
    about = json.loads((tmp_path / "set" / "about.json").read_text())
    assert about["counts"]["rejections"] == {"nothing changed": 6}


def test_a_place_that_stood_out_before_is_no_new_defect(given, tmp_path, monkeypatch):
    def faint(opened: Any, requests: Any, edit: Any) -> Result:  # darker within the mask, by 8 grey levels
        dark = torch.stack([request.picture - 8 / 255 * request.mask for request in requests])
        return Result(dark.clamp(0, 1), *[[False] * len(requests)] * 2)

    monkeypatch.setattr(edit_making, "run", faint)
    data = parts(given.root)
    task = editor(given.base, result="crack", feather=0.0)
    for row in edited(task, data, tmp_path / "set"):
        before, mask = source_of(given, row), marked(tmp_path / "set" / row["mask"])
        after = pixels(tmp_path / "set" / row["image"])
        now, then = stands_out(after, mask), stands_out(before, mask)
        assert float(row["contrast"]) == pytest.approx(min(abs(now), abs(now - then)), abs=1e-3)
        assert float(row["contrast"]) < 9
    rows = edited(editor(given.base, result="crack", feather=0.0, least_contrast=0.9), data, tmp_path / "strict")
    assert all(row["reason"] == "fainter than real ones" for row in rows)  # most real ones stand out by more


def test_crops_are_put_back_into_their_photographs(given, tmp_path):
    make_crops_csv(tmp_path / "crops")
    data = CustomCrops(str(tmp_path / "crops"), annotations="crops.csv", val_fraction=0.0, leakage="off")
    rows = edited(editor(given.base, "img2img", put_back=True, count=1, prompt="a {type} part"), data, tmp_path / "set")
    assert rows
    for row in rows:
        photograph, _, box = row["source"].partition("#")
        x, y, width, height = map(int, box.split(","))
        before = pixels(tmp_path / "crops" / photograph).copy()
        after = pixels(tmp_path / "set" / "photographs" / f"{int(row['number']):05d}.png")
        crop = pixels(tmp_path / "set" / row["image"])
        assert (after[y : y + height, x : x + width] == crop).all()
        before[y : y + height, x : x + width] = crop
        assert (after == before).all()


# --- repeated, gone on with, on several processes ---


def test_the_same_seed_makes_the_same_files_and_another_does_not(given, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        edited(editor(given.base, result="crack", count=2), parts(given.root), tmp_path / name, seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    pictures = [{k: v for k, v in contents(tmp_path / n).items() if k.endswith(".png")} for n in "ac"]
    assert pictures[0] != pictures[1]


def test_two_processes_write_the_files_of_one(given, tmp_path):
    for name, more in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_spawn"})):
        edited(editor(given.base, result="crack", batch=1), parts(given.root), tmp_path / name, **more)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_set_is_gone_on_with_and_another_is_refused(given, tmp_path):
    edited(editor(given.base, result="crack", count=2), parts(given.root), tmp_path / "whole")
    edited(editor(given.base, result="crack", count=1), parts(given.root), tmp_path / "set")
    edited(editor(given.base, result="crack", count=2), parts(given.root), tmp_path / "set")
    pictures = [{k: v for k, v in contents(tmp_path / n).items() if k.endswith(".png")} for n in ("whole", "set")]
    assert pictures[0].keys() == pictures[1].keys()
    with pytest.raises(UserError, match=r"options\.strength was 0\.5, is 0\.75"):
        edited(editor(given.base, result="crack", count=2, strength=0.75), parts(given.root), tmp_path / "set")


# --- training with it ---


def test_edited_pictures_train_defects_and_good_ones(given, tmp_path):
    task = editor(given.base, "img2img", sources=["crack", "good"], count=2)
    edited(task, parts(given.root), tmp_path / "set")
    data = parts(given.root, synthetic=str(tmp_path / "set"))
    data.prepare_data()
    data.setup("fit")
    added = [sample for sample in data.samples["train"] if sample.source != "real"]
    assert sorted(sample.defect_type for sample in added) == ["crack", "crack", "good", "good"]
    assert {sample.label for sample in added if sample.defect_type == "good"} == {0}


def test_cells_without_masks_are_edited_and_train(tmp_path, given, monkeypatch):
    make_elpv(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    settings: dict[str, Any] = {"val_fraction": 0.0, "leakage": "off", "image_size": 32}
    task = editor(given.base, "img2img", sources=["defective"], prompt="a photo of a {type} {category} cell")
    rows = edited(task, ELPV(**settings), tmp_path / "set")
    assert rows
    assert all(row["accepted"] == "1" and row["mask"] == "" for row in rows)
    data = ELPV(**settings, synthetic=str(tmp_path / "set"))
    data.prepare_data()
    data.setup("fit")
    assert sum(sample.source != "real" for sample in data.samples["train"]) == len(rows)


# --- through the command line ---


def test_command_line_edits_without_a_checkpoint(given, tmp_path, lit_defect, capsys):
    data = {"class_path": "MVTecAD", "init_args": {"root": str(given.root), "setting": "few_shot", "with_masks": True,
                                                   "val_fraction": 0.0, "leakage": "off"}}  # fmt: skip
    config = write_config(tmp_path / "edit.yaml", given.base, data, result="crack", count=2)
    lit_defect("predict", "--config", config, "--run_id", "first", "--runs_dir", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny" / "first"
    assert len(read_manifest(run / "edited")) == 2
    with Image.open(run / "figures" / "edits.png") as sheet:
        assert min(sheet.size) > 100
    assert "tile/crack" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        lit_defect("fit", "--config", config, "--runs_dir", tmp_path / "runs")
    assert "has no verb fit" in capsys.readouterr().err


# --- mistakes ---


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sources": ["crak"]}, "Did you mean crack"),
        ({"result": "hole", "strength": {"bad": 0.5}}, "strength has none for good"),
        ({"masks": "nowhere"}, r"no such folder of masks or list of boxes; correct the path, or choose one of none"),
        ({"masks": "own", "result": "hole"}, "none of the 6 pictures to edit has a mask"),
        ({"prompt": {"hole": "a hole"}, "result": "crack"}, "prompt"),
        ({"prompt": "{caption} with a hole", "result": "hole"}, "captioner"),
        ({"size": (30, 32), "result": "hole"}, "multiple"),
        ({"sampler": "Eular a", "result": "hole"}, "Euler a"),
    ],
)
def test_mistakes_are_named(given, tmp_path, options, told):
    with pytest.raises((UserError, DataError), match=told):
        edited(editor(given.base, **options), parts(given.root), tmp_path / "set")


@pytest.mark.parametrize("masks", ["own", "augmented"])
def test_masks_of_pictures_that_are_used_without_are_named(given, tmp_path, masks):
    task = editor(given.base, sources=["hole"], masks=masks)
    with pytest.raises(UserError, match=rf"masks = {masks}: .* without masks \(data\.init_args\.with_masks\)"):
        edited(task, parts(given.root, with_masks=False), tmp_path / "set")


def test_modes_that_follow_pictures_want_some(given):
    with pytest.raises(UserError, match="references is missing"):
        editor(given.base, "reference_only")
    with pytest.raises(UserError, match="inpainting needs masks"):
        editor(given.base, masks="none")


def test_other_pictures_need_a_type(given, tmp_path):
    folder = tmp_path / "new"
    shutil.copytree(given.root / "tile" / "train" / "good", folder)
    with pytest.raises(UserError, match="result is missing"):
        edited(editor(given.base), parts(given.root, predict_root=str(folder)), tmp_path / "set")
    rows = edited(editor(given.base, result="hole"), parts(given.root, predict_root=str(folder)), tmp_path / "set")
    assert len(rows) == 6
    assert {row["category"] for row in rows} == {"tile"}


@pytest.mark.parametrize("blur", [0.0, 3.0])
def test_a_blur_takes_nothing_from_the_mask_and_widens_its_box(given, tmp_path, monkeypatch, blur):
    seen: list[tuple[Any, Any]] = []

    def look(opened: Any, requests: Any, edit: Any) -> Result:
        seen.extend((request.picture.shape, request.mask) for request in requests)
        return Result(torch.stack([request.picture for request in requests]), *[[False] * len(requests)] * 2)

    monkeypatch.setattr(edit_making, "run", look)
    task = editor(given.base, result="crack", area="only_masked", padding=0, mask_blur=blur, count=1)
    edited(task, parts(given.root), tmp_path / "set")
    area = marked(tmp_path / "set" / "areas" / "00000.png")
    rows, columns = (np.flatnonzero(area.any(axis=axis)) for axis in (1, 0))
    reach = int(2.5 * blur + 0.5)
    sides = [min(found[-1] + reach + 1, side) - max(0, found[0] - reach)
             for found, side in zip((rows, columns), area.shape, strict=True)]  # fmt: skip
    (_, *shape), mask = seen[0]
    assert shape == [-(-side // 4) * 4 for side in sides]
    top, left = (found[0] - max(0, found[0] - reach) for found in (rows, columns))
    cut = area[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    assert mask[0].numpy()[top : top + cut.shape[0], left : left + cut.shape[1]][cut].all()


def test_black_pictures_are_rejected_as_such(given, tmp_path, monkeypatch):
    def black(opened: Any, requests: Any, edit: Any) -> Result:
        pictures = torch.stack([request.picture for request in requests])
        pictures[0] = 0
        return Result(pictures, [False] * len(requests), [number == 0 for number in range(len(requests))])

    monkeypatch.setattr(edit_making, "run", black)
    rows = edited(editor(given.base, result="crack", candidates=2, count=1), parts(given.root), tmp_path / "set")
    assert rows[0]["accepted"] == "1"
    assert json.loads(rows[0]["rejected"]) == {"black": 1}


def test_words_that_the_encoder_does_not_see_are_told(given, tmp_path):
    long = " ".join(["hole"] * 40)
    with pytest.warns(UserWarning, match=r"edit\.prompt: .* does not fit and is cut off"):
        edited(editor(given.base, result="crack", prompt=long, count=1), parts(given.root), tmp_path / "a")
    with pytest.warns(UserWarning, match=r"edit\.negative_prompt: .* does not fit and is cut off"):
        edited(editor(given.base, result="crack", negative_prompt=long, count=1), parts(given.root), tmp_path / "b")
