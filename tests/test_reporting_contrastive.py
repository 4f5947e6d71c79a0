import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from lit_defect.errors import UserError
from lit_defect.reporting.contrastive import (
    OBJECTS,
    PUBLISHED,
    comparison_table,
    group,
    main,
    object_table,
    read_runs,
    write_csv,
)


def write_run(root: Path, category: str, seed: int, auroc: float | None, **changes: object) -> Path:
    """A run folder as the task leaves it."""
    settings = {"loss": "ntxent_hard", "lr": 0.03, "anomaly": "LocalPseudoAnomaly", "weights": "imagenet", **changes}
    folder = root / f"{len(list(root.glob('*'))):03d}"
    folder.mkdir(parents=True)
    area = {"value": auroc, "low": None, "high": None}
    scores = {name: {"auroc": area, "average_precision": area} for name in ("gaussian", "knn")}
    scores["knn"] = {**scores["knn"], "auroc": {"value": 0.5, "low": None, "high": None}}
    pixel = {"aupro": 0.8, "pixel_auroc": 0.9} if settings.get("masks", True) else {}
    metrics = {
        "score": "gaussian", "image": scores, "pixel": pixel, "training_seed": seed, "split_seed": 0,
        "training_minutes": 10.0 + seed, "loss": settings["loss"], "anomaly": settings["anomaly"],
        "weights": settings["weights"], "backbone": "resnet18", "category": category,
    }  # fmt: skip
    (folder / "test_metrics.json").write_text(json.dumps(metrics))
    config = {
        "seed_everything": seed,
        "model": {"init_args": {"loss": settings["loss"], "lr": settings["lr"], "flip": category == "bottle"}},
        "data": {"init_args": {"category": category, "num_workers": seed}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def whole_table(root: Path, seeds: int = 3) -> dict[str, list[float]]:
    rng = np.random.default_rng(0)
    values = {name: (0.95 + 0.01 * rng.normal(size=seeds)).tolist() for name in OBJECTS}
    for name, drawn in values.items():
        for seed, value in enumerate(drawn):
            write_run(root, name, seed, value)
    return values


def cells(markdown: str, name: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {name}")]
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_published_rows_are_the_papers() -> None:
    for row in PUBLISHED:
        assert len(row.auroc) == len(OBJECTS) == 10
        assert abs(np.mean(row.auroc) - row.mean) < 0.1
    assert {row.name: row.mean for row in PUBLISHED} == {
        "CutPaste, as the paper ran it": 93.7, "the paper": 94.2, "CutPaste 3-way, as published": 94.3,
    }  # fmt: skip
    paper = dict(zip(OBJECTS, PUBLISHED[1].auroc, strict=True))
    assert (paper["cable"], paper["screw"], paper["transistor"]) == (83.1, 90.2, 88.4)


def test_table_has_mean_spread_and_scipys_interval_over_seeds(tmp_path: Path) -> None:
    values = whole_table(tmp_path)
    table = object_table(group(read_runs([tmp_path])))
    row = cells(table, "ntxent_hard")
    assert row[0] == "ntxent_hard, LocalPseudoAnomaly, resnet18 (imagenet), gaussian"
    for cell, name in zip(row[1:11], OBJECTS, strict=True):
        assert cell == f"{100 * np.mean(values[name]):.1f} ± {100 * np.std(values[name], ddof=1):.1f}"
    means = 100 * np.mean(list(values.values()), axis=0)  # of each seed
    expected = stats.ttest_1samp(means, 0).confidence_interval()
    assert row[11] == f"{means.mean():.1f} ± {means.std(ddof=1):.1f}"
    assert row[12:] == [f"{expected.low:.1f} to {expected.high:.1f}", "3"]
    assert cells(table, "the paper")[1:12] == [*(f"{x:.1f}" for x in PUBLISHED[1].auroc), "94.2"]
    assert "above CutPaste, as the paper ran it (93.7)" in table or "not told apart from CutPaste, as" in table


def test_missing_categories_are_dashes_and_the_mean_says_over_which(tmp_path: Path) -> None:
    for name in OBJECTS[:8]:
        for seed in range(2):
            write_run(tmp_path, name, seed, 0.97 + 0.001 * seed)
    write_run(tmp_path, "bottle", 2, 0.97)
    table = object_table(group(read_runs([tmp_path])))
    row = cells(table, "ntxent_hard")
    assert row[9:12] == ["-", "-", "97.0 ± 0.1 (8 of 10)"]
    assert row[13] == "2 to 3"
    assert "over 8 of 10 categories (without transistor, zipper)" in table
    assert f"above the paper ({np.mean(PUBLISHED[1].auroc[:8]):.1f})" in table  # over the same eight


def test_seeds_that_no_category_shares_give_no_interval(tmp_path: Path) -> None:
    for seed, name in enumerate(OBJECTS):
        write_run(tmp_path, name, seed, 0.9)
    table = object_table(group(read_runs([tmp_path])))
    assert cells(table, "ntxent_hard")[11:13] == ["90.0", ""]
    assert "without an interval" in table
    assert "above" not in table


def test_rows_are_told_apart_by_what_differs_on_the_same_category(tmp_path: Path) -> None:
    for seed in range(2):
        for name in ("bottle", "cable"):  # differ in `flip`, which goes with the category
            write_run(tmp_path, name, seed, 0.9)
            write_run(tmp_path, name, seed, 0.9, loss="one_class")
        write_run(tmp_path, "cable", seed, 0.8, lr=0.1)
    write_run(tmp_path, "cable", 0, 0.7, loss="none", anomaly=None, masks=False)
    anomaly = {"class_path": "lit_defect.anomalies.CutPaste", "init_args": {}}
    write_run(tmp_path, "cable", 0, 0.7, loss="classifier", anomaly=anomaly, weights=None)
    rows = {row.name: {name: len(runs) for name, runs in row.runs.items()} for row in group(read_runs([tmp_path]))}
    ours = "ntxent_hard, LocalPseudoAnomaly, resnet18 (imagenet), gaussian"
    assert rows == {
        f"{ours}, lr=0.03": {"bottle": 2, "cable": 2},
        f"{ours}, lr=0.1": {"cable": 2},
        ours.replace("ntxent_hard", "one_class"): {"bottle": 2, "cable": 2},
        "not trained, resnet18 (imagenet), gaussian": {"cable": 1},
        "classifier, CutPaste, resnet18 (from scratch), gaussian": {"cable": 1},
    }


def test_comparison_of_any_data_set(tmp_path: Path) -> None:
    for seed, value in enumerate((0.80, 0.82, 0.84)):
        write_run(tmp_path, "magnetic_tile", seed, value)
    write_run(tmp_path, "magnetic_tile", 0, None, loss="one_class", masks=False)
    rows = group(read_runs([tmp_path]))
    table = comparison_table(rows)
    head, _, first, second = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines())
    found = dict(zip(head, first, strict=True))
    assert "without near-duplicates" not in head  # nobody has it
    assert found["image AUROC"] == "0.820 ± 0.020"
    assert found["image AUROC, 95 % interval"] == "0.770 to 0.870"
    assert found["minutes"] == "11.0 ± 1.0"
    assert found["AUPRO"] == "0.800 ± 0.000"
    assert second[4:] == ["-", "-", "-", "-", "10.0"]
    assert not any(row.objects() for row in rows)


def test_a_run_that_has_no_near_duplicates_counts_without_them_as_it_is(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, "elpv", seed, auroc) for seed, auroc in enumerate((0.9, 0.8, 0.7))]
    said = json.loads((folders[0] / "test_metrics.json").read_text())
    said["without_near_duplicates"] = {"image": {"gaussian": {"auroc": {"value": 0.6}}}}
    (folders[0] / "test_metrics.json").write_text(json.dumps(said))
    for folder in folders[:2]:  # of the third nobody knows
        (folder / "splits.csv").write_text("name,split\n")
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["data"]["init_args"]["leakage"] = "warn"
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    found = [run.figures["fresh_auroc"] for run in read_runs(folders)]
    assert found == [0.6, 0.8, pytest.approx(float("nan"), nan_ok=True)]


def test_csv_has_every_cell(tmp_path: Path) -> None:
    values = whole_table(tmp_path / "runs", seeds=2)
    write_csv(group(read_runs([tmp_path / "runs"])), tmp_path / "out" / "table.csv")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["table.csv"]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    (cable,) = [line for line in lines if (line["data"], line["figure"], line["source"]) == ("cable", "auroc", "")]
    assert float(cable["mean"]) == pytest.approx(np.mean(values["cable"]), abs=1e-6)
    assert float(cable["sd"]) == pytest.approx(np.std(values["cable"], ddof=1), rel=1e-4)
    assert cable["seeds"] == "2"
    assert sum(line["source"] != "" for line in lines) == 3 * 11
    (paper,) = [line for line in lines if line["data"] == "mean of 10 objects" and line["configuration"] == "the paper"]
    assert float(paper["mean"]) == pytest.approx(0.942)


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one = write_run(tmp_path / "e", "bottle", 0, 0.9)
    again = write_run(tmp_path / "e", "bottle", 0, 0.9)
    with pytest.raises(UserError, match=f"{one} and {again}.*same seeds"):
        group(read_runs([tmp_path]))
    assert len(read_runs([one, one, tmp_path / "e", tmp_path])) == 2  # each folder once
    with pytest.raises(UserError, match=r"no test_metrics\.json"):
        read_runs([tmp_path / "none"])
    with pytest.raises(UserError, match=r"no image score 'kde', but gaussian, knn; choose by --score"):
        read_runs([one], "kde")
    assert read_runs([one], "knn")[0].figures["auroc"] == 0.5
    for text, message in (("{", "no JSON"), ("[]", "does not hold"), ('{"class_names": []}', "does not hold")):
        (one / "test_metrics.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_runs([one])
    assert main([str(one)]) == 2
    assert "does not hold the metrics" in capsys.readouterr().err


def test_command_line_prints_both_tables_without_torch(tmp_path: Path) -> None:
    whole_table(tmp_path / "runs", seeds=1)
    code = (
        "import sys; from lit_defect.reporting import anomalies, anomaly_figures, contrastive; "
        f"code = contrastive.main([{str(tmp_path / 'runs')!r}, '--csv', {str(tmp_path / 'a.csv')!r}]); "
        "assert not {'torch', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "| image AUROC, % | bottle |" in done.stdout
    assert "| data | configuration | seeds |" in done.stdout
    assert (tmp_path / "a.csv").is_file()
