"""Every configuration below `experiments/`: its keys are known, and it runs on a tiny data set of its layout.

A new YAML is covered by being there; a new kind of data module needs a line in `DATA`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import UNet2DConditionModel

from lit_defect.data.voc import NAMES
from lit_defect.generation.store import read_manifest
from lit_defect.reporting.probabilities import write_header, write_probabilities
from lit_defect.sweep.commands import warnings, words
from lit_defect.sweep.file import read_sweep
from tests.fakes import make_crops_folder, make_elpv, make_mvtec, make_voc, save, write_rows
from tests.latent import tiny_pipeline, tiny_vae
from tests.pipelines import tiny_ip_adapter, tiny_lora, tiny_sd, tiny_unclip

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
SWEEPS = sorted((EXPERIMENTS / "sweeps").glob("*.yaml"))
OVERLAYS = sorted((EXPERIMENTS / "trainer").glob("*.yaml"))  # of a machine, to be added to any configuration
STUDIES = {file for file in EXPERIMENTS.rglob("*.yaml") if "study" in yaml.safe_load(file.read_text())}
FILES = sorted(set(EXPERIMENTS.rglob("*.yaml")) - {*SWEEPS, *OVERLAYS} - STUDIES)  # studies: test_study.py
SIDE = 32  # pixels, instead of 224


def elpv(folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    make_elpv(folder, cells=64, size=(SIDE, SIDE))
    monkeypatch.syspath_prepend(folder)
    lists = [key for key in ("split_file", "group_file") if key in settings]  # of the real cells
    return [word for key in lists for word in (f"--data.{key}", "null")]


def mvtec(folder: Path, settings: dict[str, Any], _: pytest.MonkeyPatch) -> list[str]:
    category = settings.get("category", "tile")
    names = ["metal_nut", "wood"] if category == "all" else [category]
    kinds = settings.get("kinds") or ["crack", "hole"]
    sizes = {"train_good": 16, "test_good": 8, "defects": dict.fromkeys(kinds, 12)}
    make_mvtec(folder, **sizes, categories=names, itself="category" not in settings)
    return ["--data.root", str(folder)]


def crops(folder: Path, settings: dict[str, Any], _: pytest.MonkeyPatch) -> list[str]:
    kinds = ["good", "defective", *settings.get("kinds", [])]
    make_crops_folder(folder, classes=dict.fromkeys(kinds, 20), size=(SIDE, SIDE))
    if settings.get("annotations"):  # every fourth crop is a generated one
        files = sorted(folder.rglob("*.png"))
        sources = ["stable-diffusion" if number % 4 == 3 else "real" for number in range(len(files))]
        rows = [(f.relative_to(folder), f.parent.name, s) for f, s in zip(files, sources, strict=True)]
        write_rows(folder / settings["annotations"], ("path", "label", "source"), rows)
    alike = ["--data.leakage", "warn"] if settings.get("leakage") == "error" else []  # as drawn pictures may be
    return ["--data.root", str(folder), *alike]


def voc(folder: Path, settings: dict[str, Any], _: pytest.MonkeyPatch) -> list[str]:
    classes = [1, 2, 3] if "names" in settings else [3, 8]  # of four names, or VOC's bird and cat
    sets = {name: 8 for name in settings.get("image_sets", {"train": "train", "val": "val"}).values()}
    make_voc(folder, year=str(settings.get("year", "2012")), classes=classes, images=sets)
    return ["--data.root", str(folder)]


DATA: dict[str, Callable[[Path, dict[str, Any], pytest.MonkeyPatch], list[str]]] = {
    "ELPV": elpv,
    "MVTecAD": mvtec,
    "CustomCrops": crops,
    "PascalVOC": voc,
}


def first_stage(folder: Path, pictures: Path, data: dict[str, Any]) -> list[str]:
    """Probability maps of all pictures, as a refiner takes them in place of the run that its YAML names."""
    names = ["background", "defect"]
    if "classes" in data:
        names = ["background", *data["classes"]]
    elif "year" in data or data["root"].endswith("voc"):
        names = data.get("names") or list(NAMES)
    write_header(folder, names)
    flat = np.full((len(names), SIDE, SIDE), 1 / len(names))
    for file in [*pictures.rglob("*.jpg"), *pictures.rglob("*.png")]:
        write_probabilities(folder, file.relative_to(pictures).as_posix(), flat)
    return ["--model.stage1", str(folder)]


def small(folder: Path, kind: str) -> list[str]:
    """What stands in place of a pretrained base, and sizes that need no GPU."""
    if kind in ("AnomalyDiffusion", "MaskDiffusion", "StableDiffusionLoRA"):
        return ["--model.base", str(tiny_pipeline(folder / "base"))]
    if kind == "LatentDiffusion":
        tiny_vae().save_pretrained(folder / "autoencoder")
        sizes = ["--model.channels", "[16, 16]", "--model.text_width", "16", "--model.heads", "2"]
        return ["--model.autoencoder", str(folder / "autoencoder"), "--model.variants", "1", *sizes]
    return ["--model.channels", "[8, 16]"] if kind == "ImageAutoencoder" else []


def verb(path: Path) -> str:
    """`fit`, or of a task that does not train `predict`."""
    return "predict" if yaml.safe_load(path.read_text())["model"]["class_path"] == "StableDiffusionEditor" else "fit"


def editor(folder: Path, pictures: Path, model: dict[str, Any]) -> list[str]:
    """A tiny pipeline of the editor's mode, few small pictures, and what is put on top of the pipeline."""
    mode, edit = model["mode"], model["edit"]
    extra = {"extra_channels": 4} if mode == "instruct_pix2pix" else {}
    base = tiny_unclip(folder / "base") if mode == "variation" else tiny_sd(folder / "base", **extra)
    words = ["--model.base", str(base), "--model.edit.count", "1", "--model.edit.steps", "2", "--model.edit.least_change", "0",
             "--model.edit.least_contrast", "0", "--model.edit.repair", "false", "--model.edit.foreground", "all"]  # fmt: skip
    words += ["--model.edit.size", f"[{SIDE}, {SIDE}]"] if "size" in edit else []
    network = model.get("network", {})
    unet = UNet2DConditionModel.from_pretrained(base / "unet") if network.keys() & {"lora", "ip_adapter"} else None
    words += ["--model.network.lora", f"[{tiny_lora(folder / 'lora', unet)}]"] if "lora" in network else []
    words += ["--model.network.ip_adapter", tiny_ip_adapter(folder / "ip", unet)] if "ip_adapter" in network else []
    if str(edit.get("masks")).startswith("data/"):
        for picture in pictures.rglob("*.png"):
            target = folder / "masks" / picture.relative_to(pictures)
            target.parent.mkdir(parents=True, exist_ok=True)
            mask = np.zeros((SIDE, SIDE), np.uint8)
            mask[8:20, 8:20] = 255
            save(mask, target)
        words += ["--model.edit.masks", str(folder / "masks")]
    return words


def named(path: Path) -> str:
    return path.relative_to(EXPERIMENTS).as_posix()


def test_there_are_experiments():
    assert len(FILES) >= 3


def assert_says(shown: Any, written: Any) -> None:
    """What was written is shown, with defaults beside it and class names in full."""
    if isinstance(written, dict):
        for key, value in written.items():
            assert_says(shown[key], value)
    elif isinstance(shown, str) and isinstance(written, str):
        assert shown == written or shown.endswith(f".{written}")
    else:
        assert shown == written


@pytest.mark.parametrize("path", FILES, ids=named)
def test_every_key_is_known_and_the_overlays_leave_them_alone(lit_defect, capsys, path):
    overlays = [word for overlay in OVERLAYS for word in ("--config", overlay)]
    with pytest.raises(SystemExit) as stop:
        lit_defect(verb(path), "--config", path, *overlays, "--print_config")
    assert stop.value.code == 0, capsys.readouterr().err
    shown, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
    for part in ("model", "data"):
        assert_says(shown[part], written[part])


@pytest.mark.parametrize("overlay", OVERLAYS, ids=named)
def test_an_overlay_says_what_the_machine_is(lit_defect, capsys, overlay):
    path = EXPERIMENTS / "classification" / "elpv_vgg19.yaml"
    with pytest.raises(SystemExit) as stop:
        lit_defect("fit", "--config", path, "--config", overlay, "--print_config")
    assert stop.value.code == 0, capsys.readouterr().err
    shown, written, added = (
        yaml.safe_load(t) for t in (capsys.readouterr().out, path.read_text(), overlay.read_text())
    )
    assert_says(shown["trainer"], written["trainer"] | added["trainer"])


def test_an_overlay_says_nothing_but_the_machine():
    for overlay in OVERLAYS:
        assert yaml.safe_load(overlay.read_text()).keys() == {"trainer"}, named(overlay)
        assert f"--config {overlay.relative_to(EXPERIMENTS.parent).as_posix()}" in overlay.read_text()
    assert len(OVERLAYS) >= 4


def tiny(folder: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options that let a configuration run on pictures, weights and networks of our own, made in `folder`."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    content = yaml.safe_load(path.read_text())
    model, data = content["model"]["init_args"], dict(content["data"]["init_args"])
    make = DATA[content["data"]["class_path"].rsplit(".", 1)[-1]]
    if verb(path) == "predict":
        data["kinds"] = sorted(wanted_kinds(model) - {"good", "defective"})
        words = make(folder / "pictures", data, monkeypatch) + editor(folder, folder / "pictures", model)
        return [*words, "--trainer.accelerator", "cpu"]
    words = make(folder / "pictures", data, monkeypatch)
    words += ["--model.weights", "null"] if "weights" in model else []
    words += ["--model.image_size", str(SIDE)] if "image_size" in model else []
    words += ["--data.image_size", str(SIDE)] if "image_size" in data else []
    words += ["--model.crop", str(SIDE // 2)] if "crop" in model else []
    words += small(folder, content["model"]["class_path"])
    words += first_stage(folder / "maps", folder / "pictures", data) if "stage1" in model else []
    return [*words, "--data.batch_size", "8", "--trainer.accelerator", "cpu"]


def wanted_kinds(model: dict[str, Any]) -> set[str]:
    """Types that an editor's options name."""
    wanted = [model["edit"].get(key) or [] for key in ("sources", "result")]
    return {kind for kinds in wanted for kind in ([kinds] if isinstance(kinds, str) else kinds)}


@pytest.mark.parametrize("path", [path for path in FILES if verb(path) == "predict"], ids=named)
def test_every_editing_runs(lit_defect, tmp_path, monkeypatch, path):
    """As it stands, but for the pictures, their size, the pipeline, its steps and what is accepted."""
    model = yaml.safe_load(path.read_text())["model"]["init_args"]
    words = tiny(tmp_path, path, monkeypatch)
    lit_defect("predict", "--config", path, *words, "--run_id", "tiny", "--wandb", "off")
    rows = read_manifest(tmp_path / "runs" / path.stem / "tiny" / "edited")
    assert rows
    assert all(row["accepted"] and row["mode"] == model["mode"] for row in rows)
    assert {row["defect_type"] for row in rows} <= wanted_kinds(model) | {"good", "defective 2/3"}


@pytest.mark.parametrize("path", [path for path in FILES if verb(path) == "fit"], ids=named)
def test_every_experiment_runs(lit_defect, tmp_path, monkeypatch, path):
    """As it stands, but for the pictures, their size, the pretrained weights and what is too large for a CPU."""
    words = tiny(tmp_path, path, monkeypatch)
    cli = lit_defect("fit", "--config", path, *words, "--trainer.fast_dev_run", "true")
    assert cli.trainer.global_step == 1
    assert "train/loss" in cli.trainer.callback_metrics
    assert not (tmp_path / "runs").exists()  # a trial leaves no run folder


def test_every_experiment_says_what_it_is_and_how_to_run_it():
    for path in FILES:
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        command = f"python -m lit_defect {verb(path)} --config {path.relative_to(EXPERIMENTS.parent).as_posix()}"
        assert any(command in line for line in head), named(path)
        assert yaml.safe_load(path.read_text())["experiment"] == path.stem


@pytest.mark.parametrize("path", SWEEPS, ids=named)
def test_every_sweep_varies_options_that_its_experiment_has(lit_defect, capsys, path):
    """The command of a trial, here with the last value of each parameter, as the sweep and W&B's agent write it."""
    sweep = read_sweep(path)
    assert sweep.name == path.stem
    config = EXPERIMENTS.parent / sweep.command[sweep.command.index("--config") + 1]
    assert config in FILES
    chosen = {parameter.name: parameter.extremes()[-1] for parameter in sweep.parameters}
    made = [str(config) if word.startswith("experiments/") else word for word in words(sweep, chosen)]
    with pytest.raises(SystemExit) as stop:
        lit_defect(*made[made.index("lit_defect") + 1 :], "--print_config")
    assert stop.value.code == 0, capsys.readouterr().err
    shown = yaml.safe_load(capsys.readouterr().out)
    for name, value in chosen.items():
        part, _, key = name.partition(".")
        assert (shown[part]["init_args"][key] if key else shown[part]) == value
    tests = shown["test_after_fit"]
    assert tests if sweep.metric.startswith("test/") else not (tests and sweep.method != "grid")  # it must not be seen
    assert not warnings(sweep)


@pytest.mark.parametrize("path", SWEEPS, ids=named)
def test_every_sweep_says_how_to_start_it(path):
    name = path.relative_to(EXPERIMENTS.parent).as_posix()
    head = path.read_text().partition("name:")[0]
    assert f"#   python -m lit_defect sweep {name}" in head
    assert "sweep status" in head
    assert f"sbatch --array=0-7 experiments/cluster/sweep.sbatch {name}\n" in head
