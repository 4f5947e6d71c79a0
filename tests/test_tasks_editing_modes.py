"""Every mode of StableDiffusionEditor through the command line, and what goes wrong there: masks, models, precision, kills."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from lit_defect.errors import DataError
from lit_defect.generation.files import mask_file, read_grey
from lit_defect.generation.store import read_manifest
from lit_defect.tasks import StableDiffusionLoRA
from tests.anomaly_diffusion import NATIVE, SERVED, contents, make_parts, marked, parts, pixels
from tests.editing import edited, editor, write_config
from tests.latent import tiny_unet
from tests.pipelines import tiny_ip_adapter, tiny_sd
from tests.segmentation import fit, refused
from tests.test_editing_running import KINDS, flows
from tests.test_survival import run
from tests.test_tasks_anomaly_diffusion_processes import kill_when

GOOD = [f"tile/train/good/{i:03d}.png" for i in range(6)]
GREY = 90  # of a mask's soft border


class Given(NamedTuple):
    root: Path
    base: Path  # of text to image
    folder: Path


class Made(NamedTuple):
    root: Path  # of the data set
    rows: list[Any]  # of its manifest


Edit = Callable[..., Made]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("modes")
    return Given(make_parts(folder / "parts"), tiny_sd(folder / "base"), folder)


@pytest.fixture(autouse=True)
def _off_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def data_of(root: Path, **settings: Any) -> dict[str, Any]:
    return {"class_path": "MVTecAD", "init_args": {"root": str(root), **SERVED, **settings}}


@pytest.fixture
def edit(given: Given, tmp_path: Path, lit_defect: Any) -> Edit:
    """`predict` from a YAML; `root` is of the data."""

    def run_it(mode: str = "inpaint", *, base: Any = given.base, root: Path = given.root, **options: Any) -> Made:
        config = write_config(tmp_path / "edit.yaml", base, data_of(root), mode, **options)
        lit_defect("predict", "--config", config, "--run_id", "one")
        made = tmp_path / "runs" / "tiny" / "one" / "edited"
        return Made(made, list(read_manifest(made)))

    return run_it


def draw(folder: Path, masks: dict[str, np.ndarray]) -> Path:
    """A mask's file for each picture, of bool or of grey values."""
    for name, mask in masks.items():
        path = mask_file(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask.astype(np.uint8) * 255 if mask.dtype == bool else mask).save(path)
    return folder


def blot(size: tuple[int, int] = NATIVE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[9:22, 11:30] = True
    return mask


def assert_untouched(root: Path, made: Made, masks: dict[str, np.ndarray] | None = None) -> None:
    """Outside the mask every picture is its source to the last bit, and inside it is another.

    A single pixel may happen to be made as it was.
    """
    for row in made.rows:
        assert row["accepted"], row["reason"]
        before, after = pixels(root / row["source"]), pixels(made.root / row["image"])
        mask = marked(made.root / row["mask"])
        if masks is not None:
            assert (mask == masks[row["source"]]).all()
        assert after.shape == before.shape
        assert (after[~mask] == before[~mask]).all()
        assert (after[mask] != before[mask]).any() or mask.sum() == 1
        assert row["share_changed"] <= mask.mean()


# --- every mode ---


WHOLE = ["img2img of 3", "img2img of Flux"]  # that know no masks in this mode
MODES = ["img2img", "img2img of XL", "inpaint", "inpaint, 9 channels", "inpaint of 3", "inpaint of Flux Fill", "instruct", "variation", "variation of unCLIP", "reference_only", "ip_adapter"]  # fmt: skip


def asked(kind: str, given: Given) -> dict[str, Any]:
    """Mode, base and what else a kind of pipeline needs."""
    mode, make = KINDS[kind]
    options: dict[str, Any] = {"mode": mode, "base": make(given.folder / kind)}
    if flows(kind):
        options["sampler"] = "default"
    if mode in ("reference_only", "ip_adapter"):
        options["references"] = "hole"
    if mode == "ip_adapter":
        options["network"] = {"ip_adapter": tiny_ip_adapter(given.folder / "ip", tiny_unet())}
    return options


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_edits_within_masks(given, edit, kind):
    options = asked(kind, given)
    made = edit(**options, result="hole", masks="augmented", count=3)
    assert len(made.rows) == 3
    assert {row["defect_type"] for row in made.rows} == {"hole"}
    assert {row["mode"] for row in made.rows} == {options["mode"]}
    assert_untouched(given.root, made)
    about = json.loads((made.root / "about.json").read_text())
    assert about["options"]["mode"] == options["mode"]
    assert about["counts"]["pairs"] == {"tile/hole": {"asked": 3, "accepted": 3}}
    assert pixels(made.root.parent / "figures" / "edits.png").std() > 10


@pytest.mark.parametrize("kind", [*(kind for kind in MODES if not kind.startswith("inpaint")), *WHOLE])
def test_every_mode_but_inpainting_edits_whole_pictures(given, edit, kind):
    """Of their own type: the mask of a defective one stays, but for variations; a good one has none."""
    made = edit(**asked(kind, given), sources=["crack", "good"], count=2)
    assert sorted(row["defect_type"] for row in made.rows) == ["crack", "crack", "good", "good"]
    for row in made.rows:
        assert row["accepted"]
        assert row["mask_source"] == "none"
        assert (pixels(made.root / row["image"]) != pixels(given.root / row["source"])).any(axis=2).mean() > 0.9
        assert (row["mask"] == "") == (row["defect_type"] == "good" or row["mode"] == "variation")
        if row["mask"]:
            own = given.root / row["source"].replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
            assert (marked(made.root / row["mask"]) == marked(own)).all()


@pytest.mark.parametrize("kind", WHOLE)
def test_a_model_that_knows_no_masks_in_a_mode_says_which_does(given, edit, kind, capsys):
    with pytest.raises(SystemExit):
        edit(**asked(kind, given), result="hole", masks="augmented", count=3)
    assert "edit.masks: with this model take the mode inpaint" in capsys.readouterr().err


# --- masks of every kind ---


def odd_masks(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """A pixel in a corner, one in the middle, a frame along all borders, two that touch borders, and all."""
    masks = {name: np.zeros(size, dtype=bool) for name in GOOD}
    corner, middle, frame, left, bottom, full = masks.values()
    corner[0, -1] = middle[size[0] // 2, size[1] // 2] = True
    frame[:] = True
    frame[1:-1, 1:-1] = False
    left[7:20, :5] = bottom[-3:, 2:] = full[:] = True
    return masks


@pytest.mark.parametrize(
    ("size", "mode", "options"),
    [
        (NATIVE, "inpaint", {}),
        (NATIVE, "inpaint", {"area": "only_masked", "padding": 3}),
        (NATIVE, "inpaint", {"content": "fill", "size": (24, 64), "stretch": True}),
        (NATIVE, "img2img", {"area": "only_masked", "padding": 5}),
        ((41, 33), "inpaint", {"area": "only_masked", "padding": 0, "size": (40, 48), "paste": "change"}),
        ((41, 33), "inpaint", {"content": "latent_nothing", "strength": 0.75, "mask_blur": 0.0, "feather": 0.0}),
        ((41, 33), "reference_only", {"references": "hole", "paste": "change"}),
    ],
    ids=str,
)
def test_outside_of_odd_masks_no_bit_changes(tmp_path, given, size, mode, options):
    root, masks = given.root if size == NATIVE else make_parts(tmp_path / "parts", size=size), odd_masks(size)
    options = {"mask_blur": 4.0, "feather": 4.0, "result": "hole", "strength": 1.0} | options
    task = editor(given.base, mode, masks=str(draw(tmp_path / "masks", masks)), **options)
    edited(task, parts(root), tmp_path / "set")
    made = Made(tmp_path / "set", list(read_manifest(tmp_path / "set")))
    assert_untouched(root, made, masks)
    assert any(row["share_changed"] > 0 for row in made.rows if masks[row["source"]].sum() == 1)


def test_labels_that_are_repaired_lie_within_the_mask(tmp_path, given):
    masks = odd_masks(NATIVE)
    options = {"repair": True, "least_change": 2.0, "least_covered": 0.01, "strength": 1.0, "result": "hole"}
    task = editor(given.base, masks=str(draw(tmp_path / "masks", masks)), **options)
    edited(task, parts(given.root), tmp_path / "set")
    made = Made(tmp_path / "set", list(read_manifest(tmp_path / "set")))
    assert_untouched(given.root, made)
    for row in made.rows:
        assert not (marked(made.root / row["mask"]) & ~masks[row["source"]]).any()


# --- what is refused, and what is told ---


@pytest.mark.parametrize(
    ("drawn", "told"),
    [
        (np.zeros(NATIVE, dtype=bool), "marks nothing; mark what is to be edited"),
        (blot((32, 40)), "is 40x32, its picture tile/train/good/003.png 45x37; give each mask the size of its picture"),
        (blot() * np.uint8(255) + np.roll(blot(), 3) * np.uint8(GREY), "set mask_threshold to the value"),
    ],
    ids=["empty", "another size", "grey"],
)
@pytest.mark.parametrize("area", ["whole", "only_masked"])
def test_masks_that_do_not_do_are_named_with_their_file(tmp_path, given, edit, capsys, drawn, told, area):
    masks = dict.fromkeys(GOOD, blot()) | {GOOD[3]: drawn}
    folder = draw(tmp_path / "masks", masks)
    made = edit("inpaint", masks=str(folder), result="hole", area=area)
    assert [row["source"] for row in made.rows if not row["accepted"]] == [GOOD[3]], "the others are edited"
    (reason,) = (row["reason"] for row in made.rows if not row["accepted"])
    for message in (reason, capsys.readouterr().err):
        assert str(mask_file(folder, GOOD[3])) in message
        assert told in message


def test_grey_masks_are_taken_from_their_threshold_on(tmp_path, given, edit):
    soft = np.maximum(blot() * np.uint8(255), np.roll(blot(), 3) * np.uint8(GREY))
    folder = draw(tmp_path / "masks", dict.fromkeys(GOOD, soft))
    made = edit("inpaint", masks=str(folder), result="hole", mask_threshold=GREY + 1)
    assert_untouched(given.root, made, dict.fromkeys(GOOD, blot()))
    assert (read_grey(folder / GOOD[0]) > GREY).sum() == blot().sum()


def test_words_that_the_encoder_does_not_see_are_told_once(edit, capsys):
    prompt = "hole " * 30 + "a damage of metal"
    made = edit("img2img", result="hole", count=4, batch=1, prompt=prompt)
    told = capsys.readouterr().err
    assert told.count('"a damage of metal" of "hole hole') == 1
    assert "does not fit and is cut off" in told
    assert {row["prompt"] for row in made.rows} == {prompt}


def test_a_negative_prompt_without_effect_is_told_once(edit, capsys):
    edit("img2img", result="hole", count=2, batch=1, negative_prompt="wood", guidance=1.0)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("negative_prompt is of no effect with model.init_args.edit.guidance = 1.0") == 1


@pytest.mark.parametrize(
    ("extra", "mode", "told"),
    [
        (5, "img2img", "it is an inpainting model. The mode img2img needs a text-to-image model (4 channels)"),
        (5, "reference_only", "it is an inpainting model. The mode reference_only needs a text-to-image model (4"),
        (4, "inpaint", "it is a model for instruct_pix2pix. The mode inpaint needs an inpainting or a text-to-image"),
        (0, "instruct_pix2pix", "needs an InstructPix2Pix model, such as timbrooks/instruct-pix2pix (8 channels)"),
        (0, "variation", "the mode variation needs a Stable unCLIP or an image variation model"),
    ],
)
def test_a_model_of_another_kind_is_named_with_the_right_one(tmp_path, edit, capsys, extra, mode, told):
    base = tiny_sd(tmp_path / "other", extra_channels=extra)
    options = {"masks": "augmented"} if mode == "inpaint" else {"references": "hole"}
    message = refused(capsys, partial(edit, mode, base=base, result="hole", **options))
    assert f"model.init_args.base: {base}" in message or f"the U-Net of {base}" in message
    assert told in message


@pytest.mark.parametrize(
    ("offline", "options", "told"),
    [
        (True, {"base": "someone/nothing"}, "model.init_args.base: could not fetch someone/nothing from the hub"),
        (True, {"captioner": "someone/words", "prompt": "{caption}"}, "captioner: could not fetch someone/words from"),
        (False, {"base": "someone/nothing"}, "model.init_args.base: could not fetch someone/nothing from the hub"),
        (False, {"network": {"lora": ["someone/lora"]}}, "network.lora: someone/lora cannot be put on this model"),
        (False, {"network": {"embeddings": ["some/word"]}}, "network.embeddings: some/word cannot be put on this"),
    ],
)
def test_a_hub_out_of_reach(tmp_path, edit, capsys, monkeypatch, offline, options, told):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    message = refused(capsys, partial(edit, "img2img", result="hole", **options))
    assert told in message
    assert "hub" in message
    assert not list((tmp_path / "runs").rglob("*.png"))


# --- half precision ---


def spoil(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Every autoencoder gives `value` for the first of some pictures, unless it is in float32."""
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode

    def spoilt(vae: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        made = decode(vae, latents, *args, **kwargs)
        if vae.dtype != torch.float32:
            made[0][0] = value
        return made

    monkeypatch.setattr(AutoencoderKL, "decode", spoilt)


@pytest.mark.parametrize(
    ("value", "mode", "options"),
    [
        (float("nan"), "img2img", {}),
        (-1.0, "inpaint", {"masks": "augmented"}),
        (float("nan"), "inpaint", {"masks": "augmented", "paste": "change"}),
    ],
    ids=["nan", "black", "nan, where the change is pasted"],
)
def test_spoilt_pictures_are_made_again_in_float32_and_counted(given, edit, monkeypatch, value, mode, options):
    spoil(monkeypatch, value)
    network = {"dtype": "bfloat16"}
    made = edit(mode, network=network, result="hole", batch=3, candidates=2, strength=1.0, **options)
    assert [row["retried"] for row in made.rows] == [1, 1, 0, 1, 1, 0]  # three at once: two candidates and one
    for row in made.rows:
        assert row["accepted"], row["reason"]
        before, after = pixels(given.root / row["source"]), pixels(made.root / row["image"])
        mask = marked(made.root / row["mask"]) if row["mask"] else np.ones(before.shape[:2], dtype=bool)
        assert row["change_inside"] > 1
        assert (after[mask] != before[mask]).any()
        assert after[mask].any()
    assert json.loads((made.root / "about.json").read_text())["options"]["dtype"] == "bfloat16"


# --- processes that are killed ---


def test_two_processes_killed_in_the_middle_and_gone_on_with_write_the_files_of_one(edit, tmp_path):
    whole = edit("inpaint", result="hole", count=20, batch=1, candidates=2, steps=10)
    assert len(whole.rows) == 20
    root = tmp_path / "runs" / "tiny" / "two" / "edited"
    words = ("predict", "--config", tmp_path / "edit.yaml", "--run_id", "two")
    words += ("--trainer.devices", "2", "--trainer.strategy", "ddp")

    def pictures() -> int:
        return len(list(root.rglob("test/*/*.png")))

    kill_when(lambda: pictures() >= 4 and len(list(root.glob(".parts/*.csv"))) == 2, tmp_path, *words)
    assert 4 <= pictures() < 20, "in the middle"
    assert not (root / "manifest.csv").exists()
    before = {path: path.stat().st_mtime_ns for path in root.rglob("test/*/*.png")}
    run(tmp_path, *words)
    found = {name: content for name, content in contents(root).items() if not Path(name).name.startswith(".")}
    assert found == contents(whole.root)
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(before) - 2, "of each process at most the picture whose line was not written yet"


# --- LoRA of one's own ---


@pytest.mark.parametrize("setting", ["few_shot", "supervised"])
def test_a_lora_changes_pictures_and_tells_what_it_learnt_from(given, edit, tmp_path, monkeypatch, setting):
    """The generated set trains in few_shot, where most of what a supervised LoRA has learnt from tests."""
    monkeypatch.setattr("lit_defect.tasks.prompt_samples._STEPS", 1)
    task = StableDiffusionLoRA(str(given.base), rank=2, lr=0.05, augment="flip", warmup=0.0)
    fit(task, parts(given.root, setting=setting, batches_per_epoch=3), default_root_dir=tmp_path / "learnt")
    plain = edited(editor(given.base, result="hole", count=2), parts(given.root), tmp_path / "plain")
    made = edit("inpaint", network={"lora": [str(tmp_path / "learnt")]}, result="hole", count=2)
    for row, other in zip(made.rows, plain, strict=True):
        assert row["source"] == other["source"]
        assert row["base"] != other["base"]
        assert (pixels(made.root / row["image"]) != pixels(tmp_path / "plain" / other["image"])).any()
    names = [
        _names(folder / "trained_on.csv") for folder in (tmp_path / "learnt" / "lora", tmp_path / "plain", made.root)
    ]
    assert names[0]
    assert names[2] == names[0] | names[1]

    def train_with(folder: Path) -> int:
        data = parts(given.root, synthetic=str(folder))
        data.prepare_data()
        data.setup("fit")
        return sum(sample.source != "real" for sample in data.samples["train"])

    assert train_with(tmp_path / "plain") == 2
    if setting == "few_shot":
        assert train_with(made.root) == 2
    else:
        with pytest.raises(DataError, match=r"generator of .*edited has learnt from \d+ pictures, .* that test here"):
            train_with(made.root)


def _names(path: Path) -> set[str]:
    with path.open(newline="") as file:
        return {row["name"] for row in csv.DictReader(file)}
