import csv
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lit_defect.errors import UserError
from lit_defect.reporting.refinement import (
    ANIMALS,
    PUBLISHED,
    class_tables,
    group,
    main,
    method_table,
    read_runs,
    write_csv,
)

VALUES = {"stage1": 0.5, "sampled": 0.4, "one_step": 0.52, "refined": 0.55}


def entry(value: float | None, low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, **more}


def figures(iou: float | None, classes: Iterable[str], types: Iterable[str] = (), n: int = 20) -> dict[str, Any]:
    """What `evaluate_masks` returns, as far as it is read."""
    return {
        "n": n, "n_defined": n, "iou": entry(iou), "dice": entry(0.7), "pooled_iou": entry(0.6),
        "boundary_iou": entry(0.3), "hd95": entry(None, reason="not defined", n=0, undefined=3),
        "pooled_iou_by_class": {}, "iou_by_class": {name: entry(iou, n=n) for name in classes},
        **({"iou_by_type": {name: entry(iou, n=n // 2) for name in types}} if types else {}),
    }  # fmt: skip


def write_run(
    root: Path,
    seed: int,
    values: dict[str, float | None] | None = None,
    names: tuple[str, ...] = ("background", "bird"),
    types: tuple[str, ...] = (),
    n: int = 20,
    **options: Any,
) -> Path:
    """A run folder as the tasks leave it; `values` are the methods' IoU."""
    folder = root / f"{len(list(root.glob('*'))):03d}"
    folder.mkdir(parents=True)
    found = VALUES if values is None else values
    classes = names[1:] if len(names) == 2 else names
    gain = {}
    for method, value in found.items():
        if method not in ("stage1", "segmenter"):
            change = None if value is None or found["stage1"] is None else value - found["stage1"]
            own = entry(change, None if change is None else change - 0.02, None if change is None else change + 0.02)
            parts = {"by_class": {c: {**own, "n": n} for c in classes}, "by_type": {t: {**own, "n": n} for t in types}}
            gain[method] = {"iou": own, "wilcoxon_p": 0.01, "better": 9, "worse": 2, "equal": 1, **parts}
    alone = "segmenter" in found
    metrics = {
        "task": "Segmenter" if alone else "DDPMRefiner", "class_names": list(names),
        "methods": {method: figures(value, classes, types, n) for method, value in found.items()},
        **({"architecture": "unet", "encoder": "resnet34", "weights": "hub"} if alone else {"gain": gain}),
        **({} if alone else {"preset": "" if "strength" in options else "paper"}),
        "network_calls": 1 if alone else 500, "ms_per_image": {name: 10.0 + seed for name in found},
        "training_seed": seed, "split_seed": 0,
    }  # fmt: skip
    (folder / "test_metrics.json").write_text(json.dumps(metrics))
    model = {
        "preset": "paper", "strength": None, "steps": None, "patch": 1,
        "stage1": f"runs/unet/id{seed}/checkpoints/best.ckpt", **options,
    }  # fmt: skip
    config = {
        "seed_everything": seed,
        "model": {"init_args": {} if alone else model},
        "data": {"class_path": "PascalVOC", "init_args": {"root": "/somewhere/tiles", "classes": list(names[1:])}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def cells(markdown: str, *begin: str) -> list[str]:
    """The one line that begins with these cells."""
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in markdown.splitlines() if "|" in line]
    (line,) = [line for line in table if line[: len(begin)] == list(begin)]
    return line


def paper_runs(root: Path, seeds: int = 3) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Gains (seeds,) of each class, and its number of images."""
    rng = np.random.default_rng(0)
    gains = {name: 0.04 + 0.01 * rng.normal(size=seeds) for name in ANIMALS}
    images = {name: 20 + 10 * i for i, name in enumerate(ANIMALS)}
    for name, drawn in gains.items():
        for seed, gain in enumerate(drawn):
            values: dict[str, float | None] = {"stage1": 0.5, "refined": 0.5 + float(gain)}
            write_run(root, seed, values, ("background", name), n=images[name])
    return gains, images


def test_published_figures_are_the_papers() -> None:
    assert ANIMALS == ("bird", "cat", "dog", "horse", "sheep")
    before, after = PUBLISHED
    assert before.iou == (41.4, 60.2, 53.6, 51.7, 51.4)
    assert after.iou == (48.3, 64.8, 58.8, 53.6, 55.2)
    assert (before.total, after.total) == (52.1, 56.8)
    assert (before.method, after.method) == ("stage1", "refined")


def test_paper_table_has_mean_spread_and_scipys_interval_over_seeds(tmp_path: Path) -> None:
    gains, images = paper_runs(tmp_path)
    text = class_tables(group(read_runs([tmp_path])))
    assert text.startswith("**DDPMRefiner, paper**\n")
    for name, gain in gains.items():
        row = cells(text, name)
        expected = stats.ttest_1samp(100 * gain, 0).confidence_interval()
        assert row[4:6] == [str(images[name]), "50.0 ± 0.0"]
        assert row[6] == f"{50 + 100 * gain.mean():.1f} ± {100 * gain.std(ddof=1):.1f}"
        assert row[7] == f"+{100 * gain.mean():.1f} ± {100 * gain.std(ddof=1):.1f}"
        assert row[8:] == [f"{expected.low:+.1f} to {expected.high:+.1f}", "3"]
    assert cells(text, "bird")[1:4] == ["41.4", "48.3", "+6.9"]
    total = cells(text, "all images")
    assert total[1:5] == ["52.1", "56.8", "+4.7", str(sum(images.values()))]
    weighted = sum(100 * gains[name] * images[name] for name in ANIMALS) / sum(images.values())  # of each seed
    expected = stats.ttest_1samp(weighted, 0).confidence_interval()
    assert total[7] == f"+{weighted.mean():.1f} ± {weighted.std(ddof=1):.1f}"
    assert total[8] == f"{expected.low:+.1f} to {expected.high:+.1f}"
    plain = 100 * np.mean(list(gains.values()), axis=0)
    assert f"published 51.7 and 56.1, gain +4.5; ours +{plain.mean():.1f} ± {plain.std(ddof=1):.1f} (" in text


def test_some_of_the_papers_classes_stand_beside_no_published_total(tmp_path: Path) -> None:
    for name in ("cat", "sheep"):
        write_run(tmp_path, 0, names=("background", name))
    write_run(tmp_path, 0, names=("background", "zebra"))
    text = class_tables(group(read_runs([tmp_path])))
    assert [cells(text, name)[1] for name in ("cat", "sheep")] == ["60.2", "51.4"]
    paper, own = text.split("zebra: ")
    assert cells(paper, "all images")[1:] == ["-", "-", "-", "40", "50.0", "55.0", "+5.0", "", "1"]
    assert "over the 2 classes: published 55.8 and 60.0, gain +4.2; ours +5.0." in paper
    assert "51.7" not in paper
    assert "bird" not in text
    assert cells(own, "all images") == ["all images", "20", "50.0", "55.0", "+5.0", "", "1"]


def test_own_classes_and_kinds(tmp_path: Path) -> None:
    write_run(tmp_path, 0, names=("pore", "quartz", "clay"))
    write_run(tmp_path, 0, names=("background", "defect"), types=("crack", "hole"))
    write_run(tmp_path, 0, {"segmenter": 0.6}, names=("background", "defect"), types=("crack", "hole"))
    rows = group(read_runs([tmp_path / "000"])) + group(read_runs([tmp_path / "001"]))
    text = class_tables(rows)
    assert "| class: IoU, % | images |" in text
    assert [cells(text, name)[1:4] for name in ("pore", "quartz", "clay")] == [["20", "50.0", "55.0"]] * 3
    assert "| kind: IoU, % | images |" in text
    assert [cells(text, name)[1:5] for name in ("crack", "hole")] == [["10", "50.0", "55.0", "+5.0"]] * 2
    assert text.count("tiles: DDPMRefiner") == 2  # the folder of the data, where the class has no telling name
    assert "published" not in text
    assert class_tables(group(read_runs([tmp_path / "002"]))) == ""


def test_every_method_has_a_line_and_a_shared_stage_1_only_one(tmp_path: Path) -> None:
    for seed, value in enumerate((0.51, 0.55, 0.59)):
        values: dict[str, float | None] = {**VALUES, "refined": value}
        write_run(tmp_path, seed, values)
        write_run(tmp_path, seed, values, strength=0.75)
        write_run(tmp_path, seed, {"segmenter": 0.53})
    text = method_table(group(read_runs([tmp_path])))
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    found = [dict(zip(head[4:], line[4:], strict=True)) for line in lines]
    ours = ["DDPMRefiner, paper", "DDPMRefiner, paper, strength=0.75"]
    assert [line[:4] for line in lines] == [
        ["bird", ours[0], "stage 1", "3"],
        *(["bird", name, method, "3"] for name in ours for method in ("sampled", "one step", "refined")),
        ["bird", "Segmenter, unet, resnet34 (hub weights)", "segmenter", "3"],
    ]
    refined, expected = found[3], stats.ttest_1samp([1.0, 5.0, 9.0], 0).confidence_interval()
    assert refined["IoU per image, %"] == "55.0 ± 4.0"
    assert refined["gain in IoU, points"] == "+5.0 ± 4.0"
    assert refined["95 % interval of the gain"] == f"{expected.low:+.1f} to {expected.high:+.1f}"
    assert refined["runs above 0"] == "2 of 3"  # intervals of ± 2 about +1, +5, +9
    assert (refined["network calls"], refined["ms an image"]) == ("500", "11.0 ± 1.0")
    assert (found[-1]["gain in IoU, points"], found[-1]["runs above 0"], found[-1]["network calls"]) == ("", "", "1")
    assert found[1]["gain in IoU, points"] == "-10.0 ± 0.0"
    assert "HD95, pixels" not in head  # nobody has it


def test_stage_1_of_each_seed_is_one_option_unless_its_experiment_differs(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, seed)
    assert [(row.name, len(row.runs["bird"])) for row in group(read_runs([tmp_path]))] == [("DDPMRefiner, paper", 2)]
    write_run(tmp_path, 0, stage1="runs/deeplab/id9/checkpoints/best.ckpt")
    write_run(tmp_path, 0, stage1="elsewhere/maps")
    write_run(tmp_path, 0, patch=2)
    names = [row.name for row in group(read_runs([tmp_path]))]
    paths = ["unet/best.ckpt", "deeplab/best.ckpt", "elsewhere/maps"]
    assert names == [
        *(f"DDPMRefiner, paper, patch=1, stage1={path}" for path in paths),
        "DDPMRefiner, paper, patch=2, stage1=unet/best.ckpt",
    ]


def test_undefined_figures_are_dashes(tmp_path: Path) -> None:
    write_run(tmp_path, 0, dict.fromkeys(VALUES))
    rows = group(read_runs([tmp_path]))
    assert class_tables(rows) == ""
    assert len(method_table(rows).splitlines()) == 2  # no method has a figure
    write_run(tmp_path, 1)
    assert cells(class_tables(group(read_runs([tmp_path]))), "bird")[4:] == ["20", "50.0", "55.0", "+5.0", "", "1"]


def test_a_refiner_without_stage_1_and_an_unknown_method_have_their_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 0, names=("background", "cat"))
    metrics = json.loads((folder / "test_metrics.json").read_text())
    del metrics["gain"], metrics["methods"]["stage1"]
    metrics["methods"]["reconstruction"] = metrics["methods"].pop("sampled")
    (folder / "test_metrics.json").write_text(json.dumps(metrics))
    rows = group(read_runs([tmp_path]))
    for name in ("cat", "all images"):
        assert cells(class_tables(rows), name)[-5:] == ["-", "55.0", "-", "", "1"]
    text = method_table(rows)
    found = [line.split(" | ")[2:5] for line in text.splitlines()[2:]]
    assert found == [["one step", "1", "52.0"], ["refined", "1", "55.0"], ["reconstruction", "1", "40.0"]]
    assert "gain" not in text


def test_csv_has_ours_and_the_published_figures(tmp_path: Path) -> None:
    gains, _ = paper_runs(tmp_path / "runs", seeds=2)
    write_csv(group(read_runs([tmp_path / "runs"])), tmp_path / "out" / "table.csv")
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        lines = {(line["data"], line["figure"], line["configuration"]): line for line in csv.DictReader(file)}
    ours = lines["cat", "refined/gain/class/cat", "DDPMRefiner, paper"]
    assert float(ours["mean"]) == pytest.approx(gains["cat"].mean(), rel=1e-4)
    assert float(ours["sd"]) == pytest.approx(np.std(gains["cat"], ddof=1), rel=1e-4)
    assert (ours["seeds"], ours["source"]) == ("2", "")
    assert ("all images of 5 classes", "refined/gain", "DDPMRefiner, paper") in lines
    assert not any(figure == "refined/hd95" for _, figure, _ in lines)
    published = lines["all images of 5 classes", "refined/iou", "+ refiner, published"]
    assert (float(published["mean"]), published["seeds"]) == (pytest.approx(0.568), "")
    assert published["source"] == "Ando, Table 1"


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, again = write_run(tmp_path / "e", 0), write_run(tmp_path / "e", 0)
    with pytest.raises(UserError, match=f"{one} and {again}.*same seeds"):
        group(read_runs([tmp_path]))
    with pytest.raises(UserError, match=r"no test_metrics\.json"):
        read_runs([tmp_path / "none"])
    other = '{"class_names": ["good", "bad"], "accuracy": {"value": 1.0}}'
    for text, message in (("{", "no JSON"), ("[]", "does not hold"), (other, "does not hold the metrics of segm")):
        (one / "test_metrics.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_runs([one])
    assert main([str(one)]) == 2
    assert "does not hold the metrics of segmentation" in capsys.readouterr().err


def test_command_line_prints_both_tables_without_torch(tmp_path: Path) -> None:
    paper_runs(tmp_path / "runs", seeds=1)
    code = (
        "import sys; from lit_defect.reporting import refinement, segmentation_panels, segmentation_tables; "
        f"code = refinement.main([{str(tmp_path / 'runs')!r}, '--csv', {str(tmp_path / 'a.csv')!r}]); "
        "assert not {'torch', 'lightning'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "| IoU, % | U-Net, published | + refiner, published |" in done.stdout
    assert "| data | configuration | method | seeds |" in done.stdout
    assert (tmp_path / "a.csv").is_file()
