"""What W&B is shown of a run folder: curves, tables, overlays, artifacts' names, and which samples."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_curve

from lit_defect.callbacks import artifacts, media
from lit_defect.callbacks.results_tracking import ResultsTracking
from lit_defect.callbacks.tracking import RunWandb, _exit_code, mark_preempting
from lit_defect.data import MVTecAD
from lit_defect.data.fingerprint import fingerprint
from lit_defect.data.samples import Sample
from lit_defect.reporting.overlays import Overlay, fixed_positions, framed
from lit_defect.runs import RunFolder
from tests.fakes import make_mvtec


def picture(path: str, name: str) -> np.ndarray:
    return np.full((20, 40, 3), 90, np.uint8)


def binary(count: int = 60) -> list[dict[str, str]]:
    """Rows of a classifier that is mostly right."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        label = number % 2
        share = float(np.clip(rng.normal(0.35 + 0.3 * label, 0.2), 0.01, 0.99))
        names = ("good", "bad")
        rows.append({
            "path": "p", "name": f"{number}.png", "label": names[label], "prediction": names[int(share > 0.5)],
            "score": f"{share}", "split": "test", "p(good)": f"{1 - share}", "p(bad)": f"{share}",
        })  # fmt: skip
    return rows


# --- curves and tables ---


def test_the_curve_is_that_of_scikit_learn():
    rows = binary()
    points = media.charts("test", rows, "good")["test/roc"].table.data
    assert {row[0] for row in points} == {"bad"}
    x, y, _ = roc_curve([row["label"] == "bad" for row in rows], [float(row["score"]) for row in rows])
    found = {(row[1], row[2]) for row in points}
    assert {(round(a, 4), round(b, 4)) for a, b in zip(x, y, strict=True)} <= found


def test_every_class_of_several_has_a_curve_and_a_curve_is_no_longer_than_need_be():
    rng, names = np.random.default_rng(0), ["a", "b", "c"]
    rows = []
    for number in range(900):
        shares = rng.dirichlet([1, 1, 1])
        told = {f"p({name})": str(share) for name, share in zip(names, shares, strict=True)}
        best = names[int(shares.argmax())]
        rows.append({"label": names[number % 3], "prediction": best, "score": str(shares.max()), **told})
    drawn = media.charts("test", rows, None)
    points = drawn["test/roc"].table.data
    assert {row[0] for row in points} == set(names)
    assert len(points) <= 600
    assert {"test/confusion", "test/precision_recall", "test/scores/a"} <= drawn.keys()


def test_scores_without_a_threshold_have_curves_but_no_confusion():
    rows = [{**row, "prediction": "", "label": "good" if row["label"] == "good" else "defective"} for row in binary()]
    rows = [{key: value for key, value in row.items() if not key.startswith("p(")} for row in rows]
    drawn = media.charts("test", rows, "good")
    assert "test/confusion" not in drawn
    assert {row[0] for row in drawn["test/roc"].table.data} == {"defective"}


def test_new_pictures_without_labels_have_no_charts():
    assert media.charts("predict", [{**row, "label": ""} for row in binary()], "good") == {}
    assert (
        len(
            media.sample_table("predict", [{**row, "label": ""} for row in binary()], picture, 5)[
                "predict/samples"
            ].data
        )
        == 5
    )


def test_the_surest_mistakes_come_first_and_the_number_is_capped():
    rows = binary()
    table = media.sample_table("test", rows, picture, 40)["test/samples"]
    score, label, right = (table.columns.index(name) for name in ("score", "label", "right"))
    assert len(table.data) == 40
    assert [row[right] for row in table.data] == sorted(row[right] for row in table.data)
    lead = [(row[score] - 0.5) * (1 if row[label] == "bad" else -1) for row in table.data]
    assert lead == sorted(lead)
    assert (table.data[0][0]._width, table.data[0][0]._height) == (224, 112)


def test_the_worst_masks_come_first_and_a_lost_file_leaves_a_gap():
    def gone(path: str, name: str) -> np.ndarray:
        raise FileNotFoundError(path)

    rows = [
        {"path": "p", "name": str(iou), "type": "crack", "split": "test", "iou(main)": iou}
        for iou in ("0.5", "", "0.1")
    ]
    table = media.sample_table("test", rows, gone, 10)["test/samples"]
    assert [row[1] for row in table.data] == [0.1, 0.5, None]
    assert table.data[0][0] is None


@pytest.mark.parametrize(
    ("name", "box", "mirrored"),
    [
        ("a/b.png", None, False),
        ("a.png#1,2,30,40", (1, 2, 30, 40), False),
        ("a.png#1,2,30,40#mirrored", (1, 2, 30, 40), True),
    ],
)
def test_a_name_tells_which_part_of_a_picture_it_is(name, box, mirrored):
    assert media.where(name) == (box, mirrored)


def test_the_figures_of_all_kinds_of_results_have_their_intervals():
    one = {"value": 0.5, "low": 0.25, "high": 0.75}
    classifier = media.summary_of("test", {"auroc": one, "recall": {"good": one}, "f1": {"value": None}})
    assert classifier == {
        "test/auroc": 0.5, "test/auroc_low": 0.25, "test/auroc_high": 0.75,
        "test/recall/good": 0.5, "test/recall/good_low": 0.25, "test/recall/good_high": 0.75,
    }  # fmt: skip
    detector = media.summary_of("test", {"score": "knn", "image": {"knn": {"auroc": one}, "kde": {"auroc": one}}})
    assert {"test/auroc", "test/kde_auroc_high"} <= detector.keys()
    pixels = media.summary_of("val", {"methods": {"refined": {"iou": one}, "stage1": {"iou": one}}}, "refined")
    assert {"val/iou_low", "val/stage1_iou"} <= pixels.keys()
    parts = {
        "methods": {"refined": {"iou": one}},
        "kept": {"methods": {"refined": {"iou": one}, "stage1": {"iou": one}}},
    }
    assert {"val/iou", "val/kept/iou", "val/kept/stage1_iou"} <= media.summary_of("val", parts, "refined").keys()


def test_pictures_of_thousands_of_epochs_are_few(tmp_path):
    shown = ResultsTracking(RunFolder(tmp_path), "fit", {})
    due = [epoch for epoch in range(5000) if shown._is_due(epoch)]
    assert due[:3] == [0, 10, 20]
    assert due[99:102] == [990, 1000, 1100]
    assert len(due) == 140


# --- pictures with masks ---


def test_overlays_have_one_size_and_masks_keep_their_values():
    small = Overlay("a", np.zeros((20, 10, 3), np.uint8), {"ground_truth": np.eye(20, 10, dtype=np.int64) * 3})
    large = Overlay("b", np.zeros((300, 900, 3), np.uint8), heat=np.zeros((300, 900), np.float32))
    shown = [framed(one, 256) for one in (small, large)]
    assert [one.picture.shape for one in shown] == [(256, 256, 3)] * 2
    assert set(np.unique(shown[0].masks["ground_truth"])) == {0, 3}
    drawn = media.overlays("test", [small, large])
    assert {(image._width, image._height) for image in drawn["test/masks"]} == {(768, 768)}
    assert len(drawn["test/anomaly_maps"]) == 1


def sample(name: str, label: int, kind: str, group: str = "") -> Sample:
    return Sample(path=f"/x/{name}", name=name, label=label, defect_type=kind, group=group)


def test_the_samples_to_be_shown_are_always_the_same_defects_of_all_types():
    samples = [sample("g", 0, "good"), sample("c2", 1, "crack"), sample("c1", 1, "crack"), sample("h1", 1, "hole"),
               sample("c0", 1, "crack", "part"), sample("c00", 1, "crack", "part")]  # fmt: skip
    chosen = [samples[place].name for place in fixed_positions(samples, 0, 3)]
    assert chosen == ["c0", "h1", "c1"]
    turned = samples[::-1]
    assert [turned[place].name for place in fixed_positions(turned, 0, 3)] == chosen
    assert fixed_positions(samples[:1], 0, 3) == [0]


def test_generated_pictures_stand_beside_their_sources(tmp_path):
    for name in ("made.png", "mask.png"):
        Image.fromarray(np.full((32, 32), 200, np.uint8)).save(tmp_path / name)
    row = {"image": "made.png", "mask": "mask.png", "source": "s", "category": "tile", "defect_type": "crack",
           "prompt": "p", "seed": "1", "area": "0.5", "accepted": "1"}  # fmt: skip
    rows = [row, {**row, "accepted": "0", "image": ""}, *[{**row, "defect_type": "hole"}] * 30]
    table = media.generated_table(tmp_path, rows, lambda name: picture("", name), 10)["generated/pictures"]
    assert [line[2] for line in table.data] == ["crack", *["hole"] * 5]
    assert {(image._width, image._height) for image in table.data[0][:2]} == {(320, 320)}
    assert table.data[0][1]._masks["mask"]
    many = [{**row, "defect_type": str(kind)} for kind in range(12)]
    assert len(media.generated_table(tmp_path, many, lambda name: None, 5)["generated/pictures"].data) == 5


# --- names and lineage ---


def write_run(path: Path, **record: object) -> RunFolder:
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps(record))
    return RunFolder(path)


def test_a_configuration_tells_what_it_builds_upon(tmp_path):
    base, made = write_run(tmp_path / "runs" / "base" / "s0"), write_run(tmp_path / "runs" / "new set" / "s1")
    own = write_run(tmp_path / "runs" / "own" / "s2")
    folders = (base.path / "pipeline", made.path / "edited", tmp_path / "elsewhere" / "set", own.path / "checkpoints")
    for folder in folders:
        folder.mkdir(parents=True)
    for folder in folders[1:3]:
        (folder / "manifest.csv").touch()
    (own.path / "checkpoints" / "last.ckpt").touch()
    config = {
        "model": {"init_args": {"base": str(folders[0]), "references": [str(folders[2])], "name": "tiny"}},
        "data": {"init_args": {"synthetic": {"path": str(folders[1])}, "root": str(tmp_path)}},
        "ckpt_path": str(own.last),
    }
    assert artifacts.used_by(config, own) == ["model-base-s0", "generated-set", "generated-new-set-s1"]


def test_a_run_that_was_moved_keeps_its_names(tmp_path):
    moved = write_run(tmp_path / "archive" / "old" / "best of all")
    (moved.path / "config.yaml").write_text("experiment: base\nrun_id: s0\n")
    assert artifacts.model_name(moved) == "model-base-s0"
    assert artifacts.generated_name(moved.path / "generated") == "generated-base-s0"


def test_a_run_tells_its_data_by_their_fingerprint():
    assert artifacts.data_name({"data": {"class": "MVTecAD"}, "data_fingerprint": "ab"}) == "data-MVTecAD-ab"
    assert artifacts.data_name({}) is None


def test_the_fingerprint_is_that_of_the_data_wherever_they_lie(tmp_path):
    found = []
    for place in ("a", "b"):
        data = MVTecAD(str(make_mvtec(tmp_path / place)), setting="supervised", leakage="off")
        data.setup("fit")
        found.append(data.fingerprint())
        data = MVTecAD(str(tmp_path / place), setting="supervised", leakage="off", seed=1)
        data.setup("fit")
        found.append(data.fingerprint())
    assert found[:2] == found[2:]
    assert found[0] != found[1]  # other splits


def test_the_fingerprint_tells_labels_splits_and_lengths_but_not_the_order():
    two = [sample("a", 0, "good"), sample("b", 1, "crack")]
    plain = fingerprint({"train": two}, lambda path: 5)
    assert fingerprint({"train": two[::-1]}, lambda path: 5) == plain
    assert fingerprint({"train": [replace(s, path=f"/y/{s.name}") for s in two]}, lambda path: 5) == plain
    others = [
        fingerprint({"test": two}, lambda path: 5),
        fingerprint({"train": two}, lambda path: 6),
        fingerprint({"train": [replace(two[0], label=1), two[1]]}, lambda path: 5),
        fingerprint({"train": two[:1]}, lambda path: 5),
    ]
    assert len({plain, *others}) == 5


# --- the end of a run ---


def test_exit_codes_are_those_of_the_program():
    errors = [SystemExit(143), SystemExit(None), SystemExit("no"), KeyboardInterrupt(), RuntimeError()]
    assert [_exit_code(error) for error in errors] == [143, 0, 1, 130, 1]


def test_preemption_is_told_to_wandb_only_and_a_failure_costs_nothing():
    told: list[str] = []

    def fails() -> None:
        raise OSError("no answer")

    loggers = [
        SimpleNamespace(),
        *(RunWandb(SimpleNamespace(mark_preempting=f)) for f in (fails, partial(told.append, "x"))),
    ]
    with pytest.warns(UserWarning, match="no answer"):
        mark_preempting(SimpleNamespace(is_global_zero=True, loggers=loggers))
    mark_preempting(SimpleNamespace(is_global_zero=False, loggers=loggers))  # another process
    assert told == ["x"]
