"""Exported models: what they say is what `predict` says, whatever the picture; faults are found; nothing is left half."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from lit_defect.data.images import read_image
from lit_defect.export import files, making
from lit_defect.reporting.maps import read_map
from lit_defect.tasks import AnomalyLocalizer, DefectClassifier
from tests.export import KINDS, SIZES, Onnx, export, predict, read, train
from tests.segmentation import read_masks, rows

EXAMPLE = Path(__file__).parent.parent / "experiments" / "export" / "inspect_pictures.py"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each kind of run, trained when it is first asked for; tests must not write into it."""
    made: dict[str, Path] = {}

    def run_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = train(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return run_of


@pytest.fixture(scope="module")
def exported(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder that each kind of run is exported to as it comes."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("exported") / kind
            assert export(runs(kind), "--out", made[kind]) == 0
        return made[kind]

    return folder_of


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_says_what_predict_says(runs, exported, kind):
    run, model = runs(kind), Onnx(exported(kind) / "model.onnx")
    predict(run)
    for size, line in zip(SIZES, rows_of(run), strict=True):
        pixels = read(run.parents[2] / "new" / line["name"])
        assert pixels.shape[:2] == size
        compare(run, model(pixels[None]), line, model.about)


def rows_of(run: Path) -> list[dict[str, str]]:
    """The lines of the prediction; of a segmenter, which writes none, the names."""
    file = run / "predict_predictions.csv"
    return rows(file) if file.is_file() else [{"name": f"{number}.png"} for number in range(len(SIZES))]


def compare(run: Path, said: dict[str, np.ndarray], line: dict[str, str], about: dict[str, Any]) -> None:
    names = about["class_names"]
    if "mask" in said:
        mask = read_masks(run, [line["name"]])[line["name"]]
        assert (said["mask"][0] == mask).mean() > 0.999
        np.testing.assert_array_equal(said["mask"], said["probabilities"].argmax(1))
    elif "predicted" in said:
        found = [float(line[f"p({name})"]) for name in names]
        np.testing.assert_allclose(said["probabilities"][0], found, atol=1e-4)
        assert names[said["predicted"][0]] == line["prediction"]
        assert said["score"][0] == pytest.approx(float(line["score"]), abs=1e-4)
    else:
        expected = read_map(run / "predict_maps" / f"{line['name']}.npy")
        np.testing.assert_allclose(said["map"][0], expected, rtol=1e-3, atol=1e-3 * expected.max())
        assert said["score"][0] == pytest.approx(float(line["score"]), rel=2e-3, abs=1e-5)
        assert line["prediction"] == names[int(said["defective"][0])]


def test_a_decision_is_taken_at_the_learnt_threshold(runs, exported):
    run, model = runs("binary"), Onnx(exported("binary") / "model.onnx")
    state = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    limit = model.about["threshold"]
    assert limit == state["threshold"].item()
    said = [model(read(path)[None]) for path in sorted((run.parents[2] / "data").rglob("test/*/*.png"))]
    scores = np.concatenate([one["score"] for one in said]).astype(float)
    defective = np.concatenate([one["defective"] for one in said])
    clear = np.abs(scores - limit) > 1e-5
    np.testing.assert_array_equal(defective[clear], scores[clear] >= limit)
    assert len(np.unique(defective)) == 2


def test_without_a_threshold_there_is_no_decision(exported):
    model = Onnx(exported("types") / "model.onnx")
    assert model.about["threshold"] is None
    assert model.names == ["probabilities", "predicted", "score"]


def test_both_files_agree_take_any_batch_and_refuse_what_is_no_picture_of_bytes(exported):
    folder = exported("gaussian")
    onnx, module = Onnx(folder / "model.onnx"), torch.export.load(folder / "model.pt2").module()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 47, 25, 3), dtype=np.uint8)
    together = onnx(pixels)
    for name, values in module(torch.from_numpy(pixels)).items():
        np.testing.assert_allclose(values, together[name], rtol=1e-3, atol=1e-3)
        alone = np.concatenate([onnx(one[None])[name] for one in pixels])
        np.testing.assert_allclose(alone, together[name], rtol=1e-3, atol=1e-3)
    assert together["map"].shape == (3, 47, 25)
    for wrong in (pixels.astype(np.uint16), pixels[..., :1]):
        with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
            onnx(wrong)
        with pytest.raises((RuntimeError, AssertionError)):
            module(torch.from_numpy(wrong))


def test_an_export_is_the_same_each_time(runs, exported, tmp_path):
    assert export(runs("localizer"), "--out", tmp_path / "again") == 0
    for file in ("model.onnx", "model.pt2", "model.json"):
        assert (tmp_path / "again" / file).read_bytes() == (exported("localizer") / file).read_bytes()


def test_the_description_tells_where_the_model_comes_from(runs, exported):
    """And the file of a detector carries nothing that its score does not need."""
    run, folder = runs("gaussian"), exported("gaussian")
    about = json.loads((folder / "model.json").read_text())
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert about["checkpoint"] == {"file": "last.ckpt", "sha256": sha256(checkpoint.read_bytes()).hexdigest()}
    assert about["run"]["commit"] == json.loads((run / "run.json").read_text())["commit"]
    assert about["outputs"]["map"]["shape"] == ["batch", "height", "width"]
    assert about["files"]["torch"]["bytes"] == (folder / "model.pt2").stat().st_size
    check = about["check"]
    assert check["origin"] == "test pictures of the run"
    assert check["torch"]["against_the_run"]["largest_difference"]["score"] < 1e-4
    assert check["torch"]["against_pytorch"]["equal_decisions"] == 1
    content = (folder / "model.onnx").read_bytes() + (folder / "model.json").read_bytes()
    assert str(Path(making.__file__).parent).encode() not in content, "no path of this machine"
    assert str(run).encode() not in content
    extra = {"model.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra)
    assert json.loads(extra["model.json"])["checkpoint"] == about["checkpoint"]
    assert not [key for key in program.state_dict if "knn" in key or "kde" in key or "task.projection" in key]


def test_fixed_sizes_and_half_the_bytes(runs, tmp_path):
    run = runs("localizer")
    plain, small = tmp_path / "plain", tmp_path / "small"
    words = ("--to", "onnx", "--size", "50x70", "--batch", "2", "--check", "3")
    assert export(run, "--out", plain, *words) == 0
    assert export(run, "--out", small, *words, "--half") == 0
    one, other = Onnx(plain / "model.onnx"), Onnx(small / "model.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    np.testing.assert_allclose(one(pixels)["map"], other(pixels)["map"], atol=0.02)
    assert not np.array_equal(one(pixels)["map"], other(pixels)["map"])
    assert one.about["input"]["shape"] == [2, 50, 70, 3]
    assert other.about["weights"] == "float16"
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument):
        one(pixels[:1])


def test_half_is_half(runs, exported, tmp_path):
    assert export(runs("types"), "--out", tmp_path / "half", "--half") == 0
    for file in ("model.onnx", "model.pt2"):
        assert (tmp_path / "half" / file).stat().st_size < 0.6 * (exported("types") / file).stat().st_size


# --- faults ---


def test_a_wrong_mean_is_found_and_no_file_gets_its_name(runs, tmp_path, monkeypatch, capsys):
    run, right = runs("localizer"), making.factory_of

    def shifted(*words: Any, **options: Any) -> Any:
        factory = right(*words, **options)
        factory.task.network.mean += 0.2
        return factory

    monkeypatch.setattr(making, "factory_of", shifted)
    assert export(run, "--out", tmp_path / "out", "--to", "onnx") == 1
    assert "score differs by" in capsys.readouterr().err
    assert list(tmp_path.glob("*out*")) == []
    assert list(tmp_path.glob(".out*")) == []


def test_a_decision_the_wrong_way_round_is_found(runs, tmp_path, monkeypatch, capsys):
    def reversed_(self: AnomalyLocalizer, images: torch.Tensor, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        said = right(self, images, size)
        return {**said, "defective": ~said["defective"]} if torch.compiler.is_exporting() else said

    right = AnomalyLocalizer.for_factory
    monkeypatch.setattr(AnomalyLocalizer, "for_factory", reversed_)
    assert export(runs("localizer"), "--out", tmp_path / "out", "--to", "torch") == 1
    assert "defective is decided otherwise" in capsys.readouterr().err


def test_what_the_run_has_written_is_compared_too(runs, tmp_path, capsys):
    run = shutil.copytree(runs("binary"), tmp_path / "runs" / "tiny" / "binary")
    file = run / "test_predictions.csv"
    header, first, *rest = file.read_text().splitlines()
    words = first.split(",")
    words[-1] = "0.123"
    file.write_text("\n".join([header, ",".join(words), *rest]))
    assert export(run, "--to", "torch", "--check", "100") == 0
    assert "from what the run has written" in capsys.readouterr().out
    assert (run / "export" / "model.pt2").is_file()


def test_an_interrupted_export_leaves_nothing_and_an_earlier_one_stays(runs, tmp_path, monkeypatch):
    run, out = runs("localizer"), tmp_path / "out"
    assert export(run, "--out", out, "--to", "torch") == 0
    before = (out / "model.pt2").read_bytes()
    (tmp_path / ".out").mkdir()  # what a process left that was killed
    (tmp_path / ".out" / "model.onnx").write_text("half")
    whole = making.write_torch

    def broken(*words: Any) -> None:
        whole(*words)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(making, "write_torch", broken)
        with pytest.raises(KeyboardInterrupt):
            export(run, "--out", out, "--to", "torch")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]
    assert (out / "model.pt2").read_bytes() == before
    assert export(run, "--out", out, "--to", "torch", "--threshold", "0.9") == 0
    assert (tmp_path / "out.1" / "model.pt2").read_bytes() == before
    assert json.loads((out / "model.json").read_text())["threshold"] == 0.9


def test_of_two_exports_at_once_the_first_is_left_alone(runs, tmp_path, monkeypatch):
    words, make = (runs("localizer"), "--to", "torch", "--out", tmp_path / "out"), making.make

    def while_another_begins(opened: Any, options: Any, folder: Path) -> Any:
        command = [sys.executable, "-m", "lit_defect", "export", *map(str, words)]
        other = subprocess.run(command, capture_output=True, text=True)
        assert (other.returncode, "is being written by another export" in other.stderr) == (2, True)
        return make(opened, options, folder)

    monkeypatch.setattr(making, "make", while_another_begins)
    assert export(*words) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.json", "model.pt2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- refusals ---


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    capsys.readouterr()
    assert export(*words) == 2
    return capsys.readouterr().err


def test_refusals_name_the_remedy(runs, tmp_path, capsys, monkeypatch):
    run = runs("binary")
    assert "give runs/EXPERIMENT/RUN" in refused(capsys, tmp_path)
    assert "expected a number of pictures" in refused(capsys, run, "--out", tmp_path / "out", "--check", "0")
    assert "no such file" in refused(capsys, run, "--ckpt", tmp_path / "nothing.ckpt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep me")
    assert "holds no exported model" in refused(capsys, run, "--out", tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.txt").is_file()
    assert "decides without one" in refused(capsys, runs("segmenter"), "--threshold", "0.5", "--out", tmp_path / "out")
    empty = tmp_path / "runs" / "tiny" / "empty"
    empty.mkdir(parents=True)
    shutil.copy(run / "config.yaml", empty)
    assert "run `fit`" in refused(capsys, empty)
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    said = refused(capsys, run, "--out", tmp_path / "out")
    assert "pip install 'lit_defect[export]'" in said
    assert "--to torch" in said


def test_a_network_for_pictures_as_they_come_is_exported_for_one_size(runs, tmp_path, capsys):
    run = shutil.copytree(runs("binary"), tmp_path / "runs" / "tiny" / "binary")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("image_size: 32", "image_size: null"))
    assert "give it by --size HxW" in refused(capsys, run)
    assert export(run, "--to", "torch", "--size", "32x40") == 0
    assert json.loads((run / "export" / "model.json").read_text())["network_size"] == [32, 40]


def test_an_unfitted_detector_and_another_version_are_refused(runs, tmp_path, capsys):
    run = runs("gaussian")
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    inside = state["state_dict"]
    for key in [key for key in inside if key.startswith("detector.local.layers")]:
        del inside[key]
    for key in [key for key in inside if key.startswith("detector.") and not key.endswith(("usual", "spread"))]:
        inside[key] = torch.empty(0)
    torch.save(state, tmp_path / "early.ckpt")
    assert "take --ckpt last" in refused(capsys, run, "--ckpt", tmp_path / "early.ckpt")
    del inside["detector.usual"]
    torch.save(state, tmp_path / "old.ckpt")
    assert "another version of SimCLR" in refused(capsys, run, "--ckpt", tmp_path / "old.ckpt")


def test_a_refiner_is_refused_and_its_first_stage_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        "model: {class_path: lit_defect.tasks.DDPMRefiner, init_args: {stage1: seg/a}}"
    )
    said = refused(capsys, tmp_path)
    assert "DefectClassifier, Segmenter, SimCLR" in said
    assert "its first stage, seg/a, is" in said


def test_without_the_data_generated_pictures_check_it(runs, tmp_path, capsys):
    run = shutil.copytree(runs("binary"), tmp_path / "runs" / "tiny" / "binary")
    file = run / "test_predictions.csv"
    file.write_text(file.read_text().replace(str(runs("binary").parents[2]), "/nowhere"))
    assert export(run, "--to", "torch", "--check", "2") == 0
    assert "generated pictures" in capsys.readouterr().out
    assert export(run, "--to", "torch", "--check", runs("binary").parents[2] / "new") == 0
    assert "4 pictures in new" in capsys.readouterr().out


def test_the_factorys_example_runs(runs, exported, tmp_path):
    picture, file = runs("binary").parents[2] / "new" / "1.png", exported("binary") / "model.onnx"
    words = [sys.executable, str(EXAMPLE), str(file), str(picture)]
    plain = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    said = subprocess.run(words, check=True, capture_output=True, text=True, cwd=tmp_path, env=plain).stdout
    found = json.loads(said[said.index("{") :])
    assert found["score"] == pytest.approx(float(Onnx(file)(read(picture)[None])["score"][0]))
    assert "['good', 'defective']" in said
    assert len(EXAMPLE.read_text().split("session = ")[1].splitlines()) <= 12


def test_the_factorys_example_reads_deep_and_turned_pictures_as_training_does(runs, exported, tmp_path):
    file = exported("binary") / "model.onnx"
    grey = np.asarray(Image.open(runs("binary").parents[2] / "new" / "1.png").convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(grey).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(grey).convert("RGBA").save(tmp_path / "clear.png")
    for name in ("deep.png", "turned.png"):
        pixels = read_image(tmp_path / name, convert=True)
        pixels = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels
        words = [sys.executable, str(EXAMPLE), str(file), str(tmp_path / name)]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        assert json.loads(said[said.index("{") :])["score"] == pytest.approx(
            float(Onnx(file)(pixels[None])["score"][0])
        )
    (tmp_path / "Thumbs.db").write_bytes(b"no picture")
    names = ("clear.png", "Thumbs.db", "nowhere.png", "turned.png")
    words = [sys.executable, str(EXAMPLE), str(file), *(str(tmp_path / name) for name in names)]
    refused = subprocess.run(words, check=False, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "clear.png is not judged: mode RGBA" in refused.stderr
    assert [f"{name} is not judged" in refused.stderr for name in names] == [True, True, True, False]
    assert "Traceback" not in refused.stderr
    assert refused.stdout.startswith(f"{tmp_path / 'turned.png'} ['good', 'defective']"), "the others are judged"


def test_the_verb_is_quick_to_say_what_it_does():
    code = "import sys; sys.argv = ['lit_defect', 'export', '--help']\ntry:\n    from lit_defect.__main__ import main; main()\n" \
           "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"  # fmt: skip
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--threshold" in said


def test_the_classifiers_score_is_that_of_its_evaluation():
    from lit_defect.metrics.classification import defect_score

    task = DefectClassifier("test_resnet", weights=None, transfer="all", class_names=["a", "good", "b"], normal_class=1)
    task.configure_model()
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        said = task.eval().for_factory(images, (32, 32))
        probabilities = task._probabilities({"image": images}, "test").numpy()
    np.testing.assert_allclose(said["score"], defect_score(probabilities, 1), rtol=1e-6)
