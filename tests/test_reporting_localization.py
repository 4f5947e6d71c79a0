"""Tables of localisers: arms, differences seed by seed, published rows beside ours."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from lit_defect.errors import UserError
from lit_defect.reporting.localization import (
    ABLATION,
    CATEGORIES,
    FIGURES,
    PUBLISHED,
    ablation_table,
    arms_table,
    group,
    main,
    paired,
    published_table,
    read_runs,
    split_note,
    types_table,
    write_csv,
)


def write_run(folder: Path, seed: int, value: float | None, category: str = "tiles", **changes: object) -> Path:
    """A run folder as the task leaves it; every figure is `value`, but for image figures, which lie halfway to 1."""
    settings = {"synthetic": None, "anomaly": None, "select": "auto", "generated": 0, "n": 17, "lr": 1e-4, **changes}
    folder = folder / f"{category}-{seed}"
    folder.mkdir(parents=True)
    high = None if value is None else (1 + value) / 2
    cell = {"value": high, "low": None, "high": None}
    image = {"auroc": cell, "average_precision": cell, "f1_max": cell, "auroc_by_type": {"crack": cell, "hole": cell}}
    pixel = dict.fromkeys(("aupro", "pixel_auroc", "pixel_average_precision", "pixel_f1_max"), value)
    metrics = {
        "task": "AnomalyLocalizer", "score": "pooled_max", "n": settings["n"], "image": {"pooled_max": image},
        "pixel": pixel, "pixel_by_type": {"crack": pixel, "hole": pixel}, "category": category,
        "training_seed": seed, "split_seed": 0, "architecture": "unet", "encoder": "resnet34", "weights": None,
        "anomaly": settings["anomaly"],
        "training_pictures": {
            "good": 12, "defective": 6, **({"AnomalyDiffusion": settings["generated"]} if settings["generated"] else {})
        },
    }  # fmt: skip
    (folder / "test_metrics.json").write_text(json.dumps(metrics))
    config = {
        "seed_everything": seed,
        "model": {"init_args": {"lr": settings["lr"], "select": settings["select"], "maps": f"m{seed}"}},
        "data": {"init_args": {"category": category, "synthetic": settings["synthetic"]}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def cells(markdown: str, name: str) -> list[str]:
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


REAL, MADE = (0.50, 0.56, 0.53), (0.60, 0.68, 0.61)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two arms with three seeds each, the second in another order."""
    for seed, value in enumerate(REAL):
        write_run(tmp_path / "real", seed, value)
    for seed, value in reversed(list(enumerate(MADE))):
        write_run(tmp_path / "made", seed, value, generated=24)
    return tmp_path


def arms(runs: Path) -> list:
    return group([*read_runs([runs / "real"], "real"), *read_runs([runs / "made"], "made")])


def test_an_arm_is_the_mean_over_its_seeds(runs: Path) -> None:
    table = arms_table(arms(runs), ["tiles"])
    for name, values in (("real", REAL), ("made", MADE)):
        rows = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        row = [cell.strip() for cell in rows[0].strip("| ").split(" | ")]
        pixel = f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
        image = f"{50 + 50 * np.mean(values):.1f} ± {50 * np.std(values, ddof=1):.1f}"
        assert row[1:] == [pixel] * 4 + [image] * 3 + ["3"]
    assert table.splitlines()[0].startswith("| tiles, % | pixel AUROC | pixel AP | pixel F1-max | PRO | image AUROC |")


def test_differences_are_taken_seed_by_seed(runs: Path) -> None:
    first, second = arms(runs)
    found = paired(first, second, ["tiles"], "pixel_ap")
    expected = stats.ttest_rel(MADE, REAL).confidence_interval()
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(MADE) - np.mean(REAL))
    below = arms_table([first, second], ["tiles"]).split("\n\n")[-1]
    row = cells(below, "made")
    assert row[2] == "+10.0 ± 2.0 (+5.0 to +15.0)"
    assert row[-1] == "3"
    assert "| tiles: less real, points |" in below


def test_only_shared_seeds_are_paired(runs: Path) -> None:
    write_run(runs / "real", 7, 0.1)
    write_run(runs / "made", 8, 0.9, generated=24)
    write_run(runs / "made", 9, None, generated=24)
    first, second = arms(runs)
    assert paired(first, second, ["tiles"], "pro").seeds == 3
    assert second.spread("tiles", "pro").seeds == 4, "an undefined figure is none"
    lone = group([*read_runs([runs / "real" / "tiles-7"], "a"), *read_runs([runs / "made" / "tiles-8"], "b")])
    row = cells(arms_table(lone, ["tiles"]).split("\n\n")[-1], "b")
    assert row[1:] == ["-"] * 7 + ["0"]


def test_a_mean_over_categories_is_taken_within_each_seed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0.4, 0.9, (2, 2, 3))  # arm, category, seed
    for arm, name in enumerate(("a", "b")):
        for place, category in enumerate(("bottle", "wood")):
            for seed in range(3):
                write_run(tmp_path / name, seed, values[arm, place, seed], category)
    first, second = group([*read_runs([tmp_path / "a"], "a"), *read_runs([tmp_path / "b"], "b")])
    differences = values[1].mean(0) - values[0].mean(0)
    found = paired(first, second, ["bottle", "wood"], "pixel_ap")
    expected = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (found.mean, found.low, found.high) == pytest.approx((differences.mean(), expected.low, expected.high))
    means = 100 * values[1].mean(0)
    table = arms_table([first, second], ["bottle", "wood"])
    assert table.startswith("| mean of 2, %")
    assert f"{means.mean():.1f} ± {means.std(ddof=1):.1f}" in table
    assert cells(published_table([first, second]), "b")[-1] == "ours, 2 of 15 categories"


def test_arms_without_names_are_told_apart_by_what_was_learned(tmp_path: Path) -> None:
    """A generated data set is known by the experiment that made it, so that each seed may have its own."""
    for seed in range(2):
        generator = tmp_path / "runs" / "with_encoder" / f"run{seed}"
        generator.mkdir(parents=True)
        (generator / "run.json").write_text('{"status": "finished"}')
        made = {"path": str(generator / "generated"), "holdout": 0.1, "ratio": None}
        other = {"path": f"{tmp_path}/elsewhere", "holdout": 0.1}
        write_run(tmp_path / "e1", seed, 0.5, anomaly="CutPaste")
        write_run(tmp_path / "e2", seed, 0.6, synthetic=made, generated=24)
        write_run(tmp_path / "e3", seed, 0.7, synthetic=other, generated=30)
        write_run(tmp_path / "e4", seed, 0.7, "other", synthetic=other, generated=9)
    rows = group(read_runs([tmp_path / f"e{i}" for i in range(1, 5)]))
    network = "unet on resnet34 (random weights)"
    assert [row.name for row in rows] == [
        f"real + CutPaste, {network}",
        f"real + AnomalyDiffusion, {network}, synthetic=with_encoder, holdout 0.1",
        f"real + AnomalyDiffusion, {network}, synthetic={tmp_path}/elsewhere, holdout 0.1",
    ]
    assert {name: len(found) for name, found in rows[2].runs.items()} == {"tiles": 2, "other": 2}


def test_kinds_of_defect_and_other_splits_are_shown(runs: Path) -> None:
    rows = arms(runs)
    assert cells(types_table(rows, "tiles"), "hole")[1:] == ["53.0 ± 3.0", "63.0 ± 4.4"]
    assert split_note(rows, "tiles") == ""
    write_run(runs / "made", 5, 0.6, n=20, generated=24)
    assert "17 to 20 pictures of tiles" in split_note(arms(runs), "tiles")


def test_published_rows_are_those_of_the_papers() -> None:
    values = {p.name: [None if math.isnan(x) else x for x in p.values] for p in PUBLISHED}
    assert all(len(row) == len(FIGURES) for row in values.values())
    assert values["DRAEM"] == [92.2, 54.1, 53.1, None, 94.6, 97.0, 94.4]
    assert values["PRN"] == [96.9, 66.2, 64.7, None, 91.6, 96.6, 92.4]
    assert values["DFMGAN"] == [90.0, 62.7, 62.1, None, 87.2, 94.8, 94.7]
    assert values["AnomalyDiffusion"] == [99.1, 81.4, 76.3, 94.0, 99.2, 99.7, 98.7]
    assert values["AnomalyDiffusion, run again"][:4] == [98.39, 74.02, 70.14, 92.57]
    assert values["MAGIC"][:4] == [99.15, 81.99, 77.33, 96.2]
    assert len(CATEGORIES) == len(set(CATEGORIES)) == 15
    table = ablation_table()
    assert cells(table, "spatial encoder")[1:] == ["90.3", "51.2", "60.7"]
    assert cells(table, "all")[1:] == ["99.1", "81.4", "76.3"]
    assert len(ABLATION) == 5
    row = cells(published_table([]), "AnomalyDiffusion, run again")
    assert row[1:] == ["98.39", "74.02", "70.14", "92.57", "-", "-", "-", "independent re-runs"]


def test_csv_has_every_figure_difference_and_published_row(runs: Path, tmp_path: Path) -> None:
    write_csv(arms(runs), tmp_path / "out" / "table.csv")
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        lines = {(line["data"], line["configuration"], line["figure"]): line for line in csv.DictReader(file)}
    assert float(lines["tiles", "made", "pixel_ap"]["mean"]) == pytest.approx(np.mean(MADE), abs=1e-6)
    assert float(lines["tiles", "made less real", "pro"]["sd"]) == pytest.approx(0.02, abs=1e-6)
    assert float(lines["tiles", "made", "pixel_ap/hole"]["mean"]) == pytest.approx(np.mean(MADE), abs=1e-6)
    paper = lines["mean of MVTec AD", "AnomalyDiffusion", "image_f1"]
    assert (float(paper["mean"]), paper["seeds"], paper["source"]) == (0.987, "", "Hu et al., AAAI 2024")
    assert sum(line["source"] != "" for line in lines.values()) == 3 * 6 + 7 + 4 + 2 + 2 + 4 + 3 + 5 * 3


def test_runs_that_cannot_be_compared_are_named(runs: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError, match="same seeds"):
        group([*read_runs([runs / "real"], "one"), *read_runs([runs / "made"], "one")])
    with pytest.raises(UserError, match=r"no test_metrics\.json"):
        read_runs([runs / "none"])
    file = runs / "real" / "tiles-0" / "test_metrics.json"
    for text, message in (("{", "no JSON"), ("[]", "does not hold"), ('{"class_names": []}', "does not hold")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_runs([runs / "real"])
    assert main([f"real={runs / 'real'}"]) == 2
    assert "does not hold the metrics of a localiser" in capsys.readouterr().err


def test_command_line_prints_the_tables_without_torch(runs: Path, tmp_path: Path) -> None:
    words = [f"real={runs / 'real'}", f"generated={runs / 'made'}", "--csv", str(tmp_path / "a.csv")]
    code = (
        f"import sys; from lit_defect.reporting import localization; code = localization.main({words!r}); "
        "assert not {'torch', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for head in ("tiles, %", "tiles: less real, points", "tiles: pixel AP by kind, %", "means of MVTec AD, %"):
        assert f"| {head} |" in done.stdout
    assert "| AnomalyDiffusion with, published, % |" in done.stdout
    assert "best on the test pictures" in done.stdout
    assert (tmp_path / "a.csv").is_file()
