import csv
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from scipy import stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from lit_defect.errors import UserError
from lit_defect.metrics.calibration import reliability
from lit_defect.metrics.classification import evaluate
from lit_defect.reporting.figures import (
    confusion_figure,
    precision_recall_figure,
    reliability_figure,
    roc_figure,
    score_figure,
    training_figure,
    write_figures,
)
from lit_defect.reporting.gallery import Tile, gallery, overlay_heat, worst_mistakes
from lit_defect.reporting.style import short_names, shorten
from lit_defect.reporting.tables import (
    collect,
    markdown,
    metrics_table,
    rows,
    summary_markdown,
    summary_table,
    write_csv,
)

AREA = {"value": 0.9, "low": 0.85, "high": 0.95}


def predictions(classes: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.append(np.arange(classes), rng.integers(0, classes, n - classes))
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.5
    probs = np.exp(logits)
    return probs / probs.sum(1, keepdims=True), labels


def result_of(probs: np.ndarray, labels: np.ndarray, names: list[str], **settings: object) -> dict:
    return evaluate(probs, labels, names, normal_class=0, threshold=0.4, resamples=20, **settings)


def texts(figure: Figure) -> list[str]:
    """Every text of a figure, and of its axes."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def assert_inside(figure: Figure) -> None:
    """No text of the drawn figure is cut off at its edge."""
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    beyond = {
        id(tick.label1)
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    for text in figure.findobj(matplotlib.text.Text):
        box = text.get_window_extent()
        if text.get_text() and text.get_visible() and id(text) not in beyond:
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= width + 1, text
            assert box.y1 <= height + 1, text


# Figures


def test_write_figures_draws_all_that_apply(tmp_path: Path) -> None:
    p, y = predictions(2, 80)
    before = dict(matplotlib.rcParams)
    written = write_figures(tmp_path, p, y, result_of(p, y, ["good", "bad"]), prefix="test_")
    assert {path.name for path in written} == {
        "test_confusion.png", "test_reliability.png", "test_roc.png", "test_precision_recall.png", "test_scores.png",
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}
    assert dict(matplotlib.rcParams) == before
    for path in written:
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 400
        assert image.std() > 5


@pytest.mark.parametrize("n", [0, 3])
def test_one_class_or_nothing_leaves_out_the_curves(tmp_path: Path, n: int) -> None:
    p, y = np.tile([[0.8, 0.2]], (n, 1)), np.zeros(n, int)
    written = {path.stem for path in write_figures(tmp_path, p, y, result_of(p, y, ["good", "bad"]))}
    assert written == ({"confusion", "reliability", "scores"} if n else {"confusion"})


@pytest.mark.parametrize("classes", [2, 7, 30])
def test_confusion_matrix_names_and_counts(classes: int) -> None:
    counts = np.random.default_rng(0).integers(1, 90, (classes, classes))
    names = [f"a_long_folder_of_names/and_class_{i:02d}" for i in range(classes)]
    figure = confusion_figure(counts, names)
    assert_inside(figure)
    shown = texts(figure)
    for count in counts.ravel():
        assert str(count) in shown
    assert sum(text.endswith(f"_{classes - 1:02d}") for text in set(shown)) == 1  # the column's label
    assert any(f"({counts[0].sum()})" in text for text in shown)


def test_confusion_title_says_what_is_seen() -> None:
    figure = confusion_figure([[50, 2, 0], [9, 30, 1], [0, 0, 8]], ["good", "crack", "fray"])
    assert figure.get_suptitle() == "88.0 % of 100 right\nmost often: crack taken for good (9)"
    assert confusion_figure(np.zeros((2, 2)), ["good", "bad"]).get_suptitle() == "No samples"
    assert confusion_figure(np.eye(2), ["good", "bad"]).get_suptitle() == "100.0 % of 2 right"


@pytest.mark.parametrize("decimals", [6, 1])
def test_roc_curve_is_scikit_learns(decimals: int) -> None:
    p, y = predictions(2, 60)
    score = np.round(p[:, 1], decimals)
    axes = roc_figure([("bad", y == 1, score)], AREA).axes[0]
    x, t = axes.lines[1].get_data()
    fpr, tpr, _ = roc_curve(y, score, drop_intermediate=False)
    np.testing.assert_allclose(x, fpr)
    np.testing.assert_allclose(t, tpr)


@pytest.mark.parametrize("decimals", [6, 1])
def test_precision_recall_curve_is_scikit_learns(decimals: int) -> None:
    p, y = predictions(2, 60)
    score = np.round(p[:, 1], decimals)
    axes = precision_recall_figure([("bad", y == 1, score)], AREA).axes[0]
    recall, precision = axes.lines[1].get_data()
    expected_precision, expected_recall, _ = precision_recall_curve(y, score)
    np.testing.assert_allclose(recall[1:], expected_recall[-2::-1])
    np.testing.assert_allclose(precision[1:], expected_precision[-2::-1])


def test_curves_of_many_classes_name_the_worst() -> None:
    p, y = predictions(12, 200)
    curves = [(f"class {c}", y == c, p[:, c]) for c in range(12)]
    for draw, area in ((roc_figure, roc_auc_score), (precision_recall_figure, average_precision_score)):
        figure = draw(curves, AREA)
        assert_inside(figure)
        legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        worst = sorted((area(positive, score), name) for name, positive, score in curves)[:5]
        assert legend == [*(f"{value:.3f}  {name}" for value, name in worst), "7 better classes"]
    assert figure.get_suptitle() == "Mean average precision 0.900  [0.850, 0.950]"


def test_odd_class_names_are_shown_as_they_are(tmp_path: Path) -> None:
    p, y = predictions(3, 40)
    names = ["_hidden", "$x^", "50% {a}"]
    figure = roc_figure([(name, y == c, p[:, c]) for c, name in enumerate(names)], AREA)
    legend = [text.get_text().split("  ")[1] for text in figure.axes[0].get_legend().get_texts()]
    assert sorted(legend) == sorted(names)
    assert len(write_figures(tmp_path, p, y, result_of(p, y, names))) == 5


def test_score_figure_states_both_rates() -> None:
    figure = score_figure([0.1, 0.2, 0.6, 0.3, 0.9], [0, 0, 0, 1, 1], 0.3)
    assert figure.get_suptitle() == "0.0 % of the defects pass, 33.3 % of the good are rejected"
    assert "threshold 0.3" in texts(figure)
    assert_inside(figure)
    assert "threshold" not in " ".join(texts(score_figure([0.1, 0.2], [0, 1], None)))


@pytest.mark.parametrize(("right", "word"), [(0.5, "Over-confident"), (1.0, "Under-confident")])
def test_reliability_figure_names_the_lean(right: float, word: str) -> None:
    p = np.tile([[0.8, 0.2]], (40, 1))
    figure = reliability_figure(reliability(p, (np.arange(40) >= 40 * right).astype(int)))
    assert figure.get_suptitle() == f"{word}: ECE {abs(0.8 - right):.3f} (40 samples)"
    assert_inside(figure)


def test_training_figure_reads_lightnings_log(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "lr-AdamW", "train/loss_step", "train/loss_epoch", "val/auroc", "val/loss"])
        for epoch in range(3):
            writer.writerow([epoch, 10 * epoch, 0.1, 1.0 - epoch / 10, "", "", ""])
            writer.writerow([epoch, 10 * epoch + 9, "", "", 0.9, 0.5 + epoch / 10, [2.0, 1.0, 1.5][epoch]])
    figure = training_figure(log)
    assert_inside(figure)
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert set(panels) == {"loss", "validation", "learning rate"}
    (curve,) = panels["validation"].lines
    np.testing.assert_allclose(curve.get_xydata(), [[9, 0.5], [19, 0.6], [29, 0.7]])
    training, validation = panels["loss"].lines
    np.testing.assert_allclose(training.get_ydata(), [0.9] * 3)  # by epoch where both are logged
    np.testing.assert_allclose(validation.get_ydata(), [2, 1, 1.5])
    assert figure.get_suptitle() == "Validation loss lowest at step 19 of 29"


def test_training_figure_shows_what_held_out_generated_pictures_say(tmp_path: Path) -> None:
    rows = ["epoch,step,synthetic/pixel_average_precision,val/pro,lr-Adam", "0,9,,,0.1", "0,9,0.25,,", "0,9,,0.5,",
            "1,19,0.75,,", "1,19,,0.625,"]  # fmt: skip
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    panels = {axes.get_title(loc="left"): axes for axes in training_figure(tmp_path / "metrics.csv").axes}
    curves = {line.get_label(): line.get_xydata().tolist() for line in panels["validation"].lines}
    assert curves == {
        "synthetic/pixel_average_precision": [[9, 0.25], [19, 0.75]],
        "val/pro": [[9, 0.5], [19, 0.625]],
    }


def test_training_figure_without_metrics_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step\n")
    assert "no metrics were logged" in texts(training_figure(tmp_path / "metrics.csv"))


def test_names_are_shortened_in_the_middle_and_stay_distinct() -> None:
    assert shorten("blowhole", 8) == "blowhole"
    assert shorten("abcdefghij", 5) == "ab…ij"
    assert [len(shorten("x" * 50, length)) for length in range(1, 8)] == list(range(1, 8))
    names = [f"prefix_{i}_suffix_of_all" for i in range(12)]
    short = short_names(names, 10)
    assert len(set(short)) == 12
    assert max(map(len, short)) <= 10


# Gallery


def tile(**changes: object) -> Tile:
    picture = np.full((40, 60, 3), 120, np.uint8)
    return Tile(
        **{"picture": picture, "name": "a.png", "truth": "good", "predicted": "bad", "probability": 0.9} | changes
    )  # type: ignore[arg-type]


def test_worst_mistakes_come_with_the_least_probable_truth_first() -> None:
    p = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7], [0.99, 0.01]])
    assert worst_mistakes(p, [0, 0, 0, 1, 1], 5).tolist() == [4, 2, 1]
    assert worst_mistakes(p, [0, 0, 0, 1, 1], 2).tolist() == [4, 2]
    assert worst_mistakes(p, [0, 1, 1, 1, 0], 5).tolist() == []


def test_gallery_shows_picture_heat_and_caption_of_each_tile() -> None:
    heat = np.zeros((4, 6))
    heat[1, 1] = 1
    size, margin, gap = 60, 24, 16
    image = np.asarray(gallery([tile(heat=heat)] * 5, title="Five", columns=4, size=size))
    rows_of_picture = (image == 120).all(2).sum(1) > 30
    assert image.shape[1] == 2 * margin + 4 * (2 * size + 4) + 3 * gap
    assert np.diff(rows_of_picture.astype(int)).clip(0).sum() == 2  # two rows of tiles
    first = image[:, margin : margin + size]
    assert (first == 120).all(2).sum() == pytest.approx(2 * 58 * 40, rel=0.05)  # 60 x 40, in a frame
    second = image[:, margin + size + 4 : margin + 2 * size + 4].astype(int)
    assert np.ptp(second, axis=2).max() > 50  # the map is coloured


def test_long_captions_stay_in_their_tile() -> None:
    long = "x" * 300
    image = np.asarray(gallery([tile(name=long, truth=long, predicted=long)], title=long, size=150))
    assert (image[:, -24:] == 255).all()
    assert (image[60:, 24 + 152 :] == 255).all()


def test_gallery_of_nothing_says_so() -> None:
    assert np.asarray(gallery([], title="No mistakes")).std() > 5


def test_heat_colours_only_where_it_is_warm() -> None:
    picture = np.full((20, 30, 3), 100, np.uint8)
    heat = np.zeros((20, 30))
    heat[:, 20:] = 1
    mixed = overlay_heat(picture, heat).astype(int)
    assert mixed.shape == picture.shape
    assert (mixed[:, :15] == 100).all()
    assert (np.ptp(mixed[:, 22:], axis=2) > 20).all()
    assert (overlay_heat(picture, np.full((2, 2), math.nan)) == 100).all()


# Tables


def printed(table: object) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_table_shows_figures_limits_and_counts() -> None:
    p, y = predictions(2, 200)
    result = result_of(p, y, ["good", "[red]bad"])
    text = printed(metrics_table(result, "Test split"))
    escape = result["escape_rate"]
    assert f"{100 * escape['value']:.1f} %" in text
    assert f"{100 * escape['low']:.1f} to {100 * escape['high']:.1f} %" in text
    assert f"{escape['k']}/{escape['n']}" in text
    assert "recall: [red]bad" in text
    assert "200 samples, threshold 0.4 on the defect score for escapes and overkill" in " ".join(text.split())
    for row in rows(result):
        assert f"| {row.label} | {row.number(row.value)} | {row.interval} | {row.count} |" in markdown(result)


def test_undefined_figures_show_their_reason() -> None:
    result = evaluate([[0.9, 0.1]], [0], ["good", "bad"], normal_class=0)
    text = printed(metrics_table(result, "Test split"))
    assert "one class only" in text
    assert "no threshold" in text
    assert "nan" not in text


def test_terminal_lists_the_worst_of_many_classes() -> None:
    p, y = predictions(25, 400)
    result = result_of(p, y, [f"class {i}" for i in range(25)])
    text = printed(metrics_table(result, "Test split"))
    worst = min(result["recall"], key=lambda name: result["recall"][name]["value"])
    assert text.count("recall: ") == 10
    assert f"recall: {worst} " in text
    assert markdown(result).count("recall: ") == 25


def test_csv_keeps_every_digit(tmp_path: Path) -> None:
    p, y = predictions(3, 60)
    result = result_of(p, y, ["good", "crack", "fray"])
    write_csv(result, tmp_path / "metrics.csv")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        read = {row["figure"]: row for row in csv.DictReader(file)}
    assert float(read["auroc"]["value"]) == result["auroc"]["value"]
    assert float(read["recall/crack"]["low"]) == result["recall"]["crack"]["low"]


def folders(tmp_path: Path, count: int, names: list[str]) -> list[Path]:
    for seed in range(count):
        p, y = predictions(2, 60, seed)
        (tmp_path / str(seed)).mkdir()
        content = json.dumps(result_of(p, y, names))
        (tmp_path / str(seed) / "test_metrics.json").write_text(content)
    return [tmp_path / str(seed) for seed in range(count)]


def test_runs_are_summarised_with_scipys_interval(tmp_path: Path) -> None:
    runs = folders(tmp_path, 5, ["good", "bad"])
    values = [json.loads((run / "test_metrics.json").read_text())["auroc"]["value"] for run in runs]
    (auroc,) = [summary for summary in collect(runs) if summary.key == "auroc"]
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert (auroc.mean, auroc.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (auroc.low, auroc.high) == pytest.approx((expected.low, expected.high))
    shown = f"{auroc.mean:.3f} ± {auroc.sd:.3f}"
    assert shown in printed(summary_table(collect(runs), "Five seeds"))
    assert f"| AUROC | {shown} | {auroc.low:.3f} to {auroc.high:.3f} | 5 |" in summary_markdown(collect(runs))


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    text = summary_markdown(collect(folders(tmp_path, 1, ["good", "bad"])))
    assert "±" not in text.replace("mean ± sd", "")
    assert "nan" not in text


def test_interval_of_a_share_stays_between_none_and_all(tmp_path):
    runs = []
    for number, rate in enumerate((0.0, 0.0, 0.4)):
        rng = np.random.default_rng(number)
        labels = np.repeat([0, 1], 50)
        score = np.where(labels == 1, 0.9, 0.1) + rng.uniform(0, 0.05, 100)
        score[50 : 50 + int(50 * rate)] = 0.1
        result = evaluate(np.stack([1 - score, score], 1), labels, ["good", "bad"], normal_class=0, threshold=0.5)
        runs.append(tmp_path / str(number))
        runs[-1].mkdir()
        (runs[-1] / "test_metrics.json").write_text(json.dumps(result))
    (escaped,) = [summary for summary in collect(runs) if summary.key == "escape_rate"]
    assert escaped.low == 0
    assert 0.13 < escaped.mean < 0.14
    assert escaped.mean < escaped.high < 1


def test_runs_that_cannot_be_averaged_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = folders(tmp_path / "a", 1, ["good", "bad"])
    other = folders(tmp_path / "b", 1, ["good", "crack"])
    with pytest.raises(UserError, match="same classes"):
        collect([*one, *other])
    with pytest.raises(UserError, match="no such file"):
        collect([tmp_path / "missing"])
    with pytest.raises(UserError, match="no run folders"):
        collect([])
    (one[0] / "test_metrics.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        collect(one)
