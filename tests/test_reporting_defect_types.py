"""Tables of classifiers of kinds of defect: arms, recall by kind, differences seed by seed, published means beside."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lit_defect.errors import UserError
from lit_defect.metrics.classification import evaluate
from lit_defect.reporting.defect_types import (
    PUBLISHED,
    arms_table,
    group,
    kinds_table,
    main,
    paired,
    published_table,
    read_runs,
    split_note,
    write_csv,
)
from tests.fakes import make_mvtec
from tests.segmentation import command

KINDS = ["crack", "hole"]


def write_run(folder: Path, seed: int, right: tuple[int, int], category: str = "tiles", **changes: Any) -> Path:
    """A run folder as the task leaves it: of 10 cracks and 20 holes (or `tested`) so many are called by their names."""
    settings = {"synthetic": None, "backbone": "resnet34", "lr": 1e-4, "tested": (10, 20), "normal": None, **changes}
    folder = folder / f"{category}-{seed}"
    folder.mkdir(parents=True)
    labels = np.repeat([0, 1], settings["tested"])
    hit = np.concatenate([np.arange(n) < r for n, r in zip(settings["tested"], right, strict=True)])
    probabilities = np.eye(2)[np.where(hit, labels, 1 - labels)] * 0.8 + 0.1
    names = ["good", "crack"] if settings["normal"] is not None else KINDS
    metrics = evaluate(probabilities, labels, names, normal_class=settings["normal"], resamples=0)
    (folder / "test_metrics.json").write_text(json.dumps(metrics | {"training_seed": seed, "split_seed": 0}))
    config = {
        "seed_everything": seed,
        "model": {"init_args": {"lr": settings["lr"], "backbone": settings["backbone"], "weights": "hub"}},
        "data": {"init_args": {"category": category, "root": "data/x", "synthetic": settings["synthetic"]}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if settings["synthetic"]:
        (folder / "synthetic.json").write_text(json.dumps({"generator": "AnomalyDiffusion", "train": 40}))
    return folder


def cells(markdown: str, name: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


REAL, MADE = ((3, 12), (5, 10), (4, 14)), ((6, 15), (7, 15), (8, 19))  # cracks and holes called right
ACCURACY = [np.array([(a + b) / 30 for a, b in arm]) for arm in (REAL, MADE)]
RECALL = [np.array([(a / 10 + b / 20) / 2 for a, b in arm]) for arm in (REAL, MADE)]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms with three seeds each, the second in another order."""
    for seed, right in enumerate(REAL):
        write_run(tmp_path / "real", seed, right)
    for seed, right in reversed(list(enumerate(MADE))):
        write_run(tmp_path / "made", seed, right, synthetic="somewhere")
    return tmp_path


def arms(runs: Path) -> list:
    return group([*read_runs([runs / "real"], "real"), *read_runs([runs / "made"], "made")])


def test_an_arm_is_the_mean_over_its_seeds_with_its_interval(runs: Path) -> None:
    above = arms_table(arms(runs), ["tiles"]).split("\n\n")[0]
    assert above.splitlines()[0] == "| tiles, % | accuracy | 95 % interval | mean recall | seeds |"
    for name, accuracy, recall in zip(("real", "made"), ACCURACY, RECALL, strict=True):
        limits = stats.ttest_1samp(accuracy, 0).confidence_interval()
        assert cells(above, name)[1:] == [
            f"{100 * accuracy.mean():.1f} ± {100 * accuracy.std(ddof=1):.1f}",
            f"{100 * limits.low:.1f} to {100 * min(1, limits.high):.1f}",
            f"{100 * recall.mean():.1f} ± {100 * recall.std(ddof=1):.1f}",
            "3",
        ]


def test_differences_are_taken_seed_by_seed(runs: Path) -> None:
    first, second = arms(runs)
    found = paired(first, second, ["tiles"], "accuracy")
    expected = stats.ttest_rel(ACCURACY[1], ACCURACY[0]).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    below = arms_table([first, second], ["tiles"]).split("\n\n")[1]
    gain = 100 * (ACCURACY[1] - ACCURACY[0])
    row = cells(below, "made")
    assert row[1].startswith(f"+{gain.mean():.1f} ± {gain.std(ddof=1):.1f} (+")
    assert row[-1] == "3"
    assert "| tiles: less real, points | accuracy | mean recall | pairs |" in below
    write_run(runs / "made", 8, (10, 20), synthetic="somewhere")
    assert paired(*arms(runs), ["tiles"], "accuracy").seeds == 3, "of the shared seeds"


def test_recall_by_kind(runs: Path) -> None:
    table = kinds_table(arms(runs), "tiles")
    cracks, holes = (np.array([[pair[i] for pair in arm] for arm in (REAL, MADE)]) / (10, 20)[i] for i in (0, 1))
    for name, values in (("crack (10)", cracks), ("hole (20)", holes)):
        assert cells(table, name)[1:] == [f"{100 * v.mean():.1f} ± {100 * v.std(ddof=1):.1f}" for v in values]
    assert split_note(arms(runs), "tiles") == ""
    write_run(runs / "made", 5, (9, 9), tested=(12, 20), synthetic="somewhere")
    assert "30 to 32 pictures of tiles" in split_note(arms(runs), "tiles")
    assert cells(kinds_table(arms(runs), "tiles"), "crack (10 to 12)")


def test_a_kind_that_no_picture_tests_has_no_recall(tmp_path: Path) -> None:
    write_run(tmp_path / "real", 0, (0, 15), tested=(0, 20))
    table = kinds_table(group(read_runs([tmp_path], "real")), "tiles")
    assert cells(table, "crack (0)")[1:] == ["-"]
    assert cells(table, "hole (20)")[1:] == ["75.0"]


def test_a_mean_over_categories_is_taken_within_each_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    right = rng.integers(2, 10, (2, 2, 3))  # arm, category, seed
    for arm, name in enumerate(("a", "b")):
        for place, category in enumerate(("bottle", "wood")):
            for seed in range(3):
                write_run(tmp_path / name, seed, (right[arm, place, seed], 11), category)
    first, second = group([*read_runs([tmp_path / "a"], "a"), *read_runs([tmp_path / "b"], "b")])
    means = ((right + 11) / 30).mean(1)
    expected = stats.ttest_1samp(means[1] - means[0], 0).confidence_interval()
    found = paired(first, second, ["bottle", "wood"], "accuracy")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    ours = cells(published_table([first, second]), "b")
    assert ours[1:] == [f"{100 * means[1].mean():.1f} ± {100 * means[1].std(ddof=1):.1f}", "ours, 2 of 15 categories"]
    assert arms_table([first, second], ["bottle", "wood"]).startswith("| mean of 2, %")


def test_arms_without_names_are_told_apart_by_what_was_learned(tmp_path: Path) -> None:
    generator = tmp_path / "runs" / "with_encoder" / "run0"
    generator.mkdir(parents=True)
    (generator / "run.json").write_text('{"status": "finished"}')
    for seed in range(2):
        write_run(tmp_path / "e1", seed, (3, 12))
        write_run(tmp_path / "e2", seed, (4, 12), synthetic={"path": str(generator / "generated"), "ratio": 2.0})
        write_run(tmp_path / "e3", seed, (4, 12), synthetic="elsewhere")
        write_run(tmp_path / "e4", seed, (4, 12), backbone="resnet18")
    rows = group(read_runs([tmp_path / f"e{i}" for i in range(1, 5)]))
    assert [row.name for row in rows] == [
        "real, resnet34 (hub weights)",
        "real + AnomalyDiffusion, resnet34 (hub weights), synthetic=with_encoder, ratio 2.0",
        "real + AnomalyDiffusion, resnet34 (hub weights), synthetic=elsewhere",
        "real, resnet18 (hub weights)",
    ]
    assert all(len(row.runs["tiles"]) == 2 for row in rows)


def test_published_rows_are_those_of_the_papers() -> None:
    assert {p.name: p.accuracy for p in PUBLISHED} == {
        "DFMGAN": 49.61,
        "AnomalyDiffusion": 66.09,
        "AnomalyDiffusion, run again": 64.9,
        "MAGIC": 78.1,
        "O2MAG, trained on real defects too": 82.4,
    }
    table = published_table([])
    assert cells(table, "DFMGAN")[1:] == ["49.61", "Hu et al., AAAI 2024"]
    assert cells(table, "MAGIC")[1:] == ["78.1", "2026"]


def test_csv_has_every_figure_difference_and_published_row(runs: Path, tmp_path: Path) -> None:
    write_csv(arms(runs), tmp_path / "out" / "table.csv")
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        lines = {(line["data"], line["configuration"], line["figure"]): line for line in csv.DictReader(file)}
    assert float(lines["tiles", "made", "accuracy"]["mean"]) == pytest.approx(ACCURACY[1].mean(), abs=1e-6)
    assert float(lines["tiles", "made", "recall/hole"]["mean"]) == pytest.approx(49 / 60, abs=1e-6)
    gain = [0.3, 0.2, 0.4]  # of the cracks
    assert float(lines["tiles", "made less real", "recall/crack"]["sd"]) == pytest.approx(
        np.std(gain, ddof=1), abs=1e-6
    )
    paper = lines["mean of MVTec AD", "AnomalyDiffusion", "accuracy"]
    assert (float(paper["mean"]), paper["seeds"], paper["source"]) == (0.6609, "", "Hu et al., AAAI 2024")
    assert len(lines) == 2 * 4 + 4 + 5


def test_runs_that_do_not_belong_here_are_named(runs: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(runs / "binary", 0, (3, 12), normal=0)
    with pytest.raises(UserError, match=r"tells good from defective.*set data\.target to defects"):
        read_runs([runs / "binary"])
    with pytest.raises(UserError, match="same seeds"):
        group([*read_runs([runs / "real"], "one"), *read_runs([runs / "made"], "one")])
    file = runs / "real" / "tiles-0" / "test_metrics.json"
    for text, message in (("{", "no JSON"), ("[]", "does not hold"), ('{"task": "AnomalyLocalizer"}', "does not hold")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_runs([runs / "real"])
    assert main([f"real={runs / 'real'}"]) == 2
    assert "does not hold the metrics of a classifier" in capsys.readouterr().err


def test_command_line_prints_the_tables_without_torch(runs: Path, tmp_path: Path) -> None:
    words = [f"real={runs / 'real'}", f"generated={runs / 'made'}", "--csv", str(tmp_path / "a.csv")]
    code = (
        f"import sys; from lit_defect.reporting import defect_types; code = defect_types.main({words!r}); "
        "assert not {'torch', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heads = ("tiles, %", "tiles: less real, points", "tiles: recall by kind, %", "means of MVTec AD, %")
    assert all(f"| {head} |" in done.stdout for head in heads)
    assert "only differences between arms" in done.stdout
    assert (tmp_path / "a.csv").is_file()


def test_a_run_of_the_task_itself(tmp_path: Path) -> None:
    """Trained and tested through the command line, on kinds of defect alone."""
    make_mvtec(tmp_path / "data", defects={"crack": 9, "hole": 9})
    config = tmp_path / "tiny.yaml"
    model = {"backbone": "test_resnet", "weights": None, "transfer": "all", "monitor": None}
    data = {"root": str(tmp_path / "data"), "category": "tile", "setting": "few_shot", "target": "defects",
            "image_size": 32, "val_fraction": 0.0, "batch_size": 4, "leakage": "off"}  # fmt: skip
    config.write_text(yaml.safe_dump({
        "experiment": "kinds", "wandb": "off", "test_after_fit": True,
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "model": {"class_path": "DefectClassifier", "init_args": model},
        "data": {"class_path": "MVTecAD", "init_args": data},
    }))  # fmt: skip
    command(tmp_path, "fit", "--config", config, "--run_id", "a")
    (run,) = read_runs([tmp_path / "runs" / "kinds"])
    assert (run.category, run.method, run.seeds) == ("tile", "real, test_resnet (random weights)", (0, 0))
    with (run.path / "test_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert run.figures["pictures"] == len(rows) == 12
    for kind in KINDS:
        mine = [row["prediction"] == kind for row in rows if row["label"] == kind]
        assert (run.figures[f"recall/{kind}"], run.figures[f"tested/{kind}"]) == (np.mean(mine), 6)
    assert run.figures["accuracy"] == pytest.approx(np.mean([row["prediction"] == row["label"] for row in rows]))
