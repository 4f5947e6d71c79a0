"""Differences between arms against scipy and by hand, and what is refused."""

import math

import numpy as np
import pytest
from scipy import stats

from lit_defect.metrics.intervals import mcnemar
from lit_defect.report.arms import make_arms
from lit_defect.report.blocks import Intervals, Text
from lit_defect.report.collect import find_runs, read_runs
from lit_defect.report.comparing import differences, holm, over_pictures, paired_t, seeds_only, unlike_pictures
from lit_defect.report.contents import build
from lit_defect.report.figures import choose, ends, ends_of_difference
from lit_defect.report.matter import Asked, gather
from lit_defect.report.tables import all_tables
from tests.run_folders import make_run


def _arms(folder):
    return make_arms(read_runs(find_runs([folder])).runs).arms


def test_the_paired_t_test_is_that_of_scipy():
    draw = np.random.default_rng(0)
    first = {(k, 0): float(x) for k, x in enumerate(draw.normal(0.8, 0.02, 6))}
    other = {(k, 0): float(x) for k, x in enumerate(draw.normal(0.81, 0.02, 8)) if k != 2}
    spread, p_value = paired_t(first, other)
    shared = [k for k in range(6) if k != 2]
    wanted = stats.ttest_rel([other[k, 0] for k in shared], [first[k, 0] for k in shared])
    assert p_value == pytest.approx(wanted.pvalue)
    assert (spread.low, spread.high) == pytest.approx(tuple(wanted.confidence_interval()))
    assert spread.seeds == 5


def test_without_two_seeds_or_without_spread_there_is_no_test():
    assert math.isnan(paired_t({(0, 0): 0.5}, {(0, 0): 0.6})[1])
    assert math.isnan(paired_t({(0, 0): 0.5, (1, 0): 0.6}, {(0, 0): 0.6, (1, 0): 0.7})[1])
    assert paired_t({(0, 0): 0.5}, {(1, 0): 0.6})[0].seeds == 0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02, 0.001]) == pytest.approx([0.02, 0.002])


def test_differences_are_adjusted_together(tmp_path):
    for seed in range(4):
        make_run(tmp_path, "e_a", seed, accuracy=0.7 + 0.01 * seed)
        make_run(tmp_path, "e_b", seed, accuracy=0.8 + 0.01 * seed + 0.001 * (seed % 2), lr=0.1)
    first, other = _arms(tmp_path)
    found = differences(first, [other], "test", ["accuracy", "auroc", "ece"])
    assert [one.figure for one in found] == ["accuracy", "auroc", "ece"]
    assert found[0].spread.mean == pytest.approx(0.1005)
    assert found[0].adjusted == pytest.approx(2 * found[0].p_value)  # of ece, all the same, there is no test
    assert math.isnan(found[2].adjusted)
    assert "better on these pictures, over seeds" in seeds_only(found[0], "a", 0.95)
    assert "no conclusion" in seeds_only(found[2], "a", 0.95)


def test_an_error_that_grows_is_worse(tmp_path):
    for seed in range(4):
        make_run(tmp_path, "e_a", seed)
        folder = make_run(tmp_path, "e_b", seed, lr=0.1)
        text = (
            (folder / "test_metrics.json").read_text().replace('"ece": {"value": 0.1', f'"ece": {{"value": 0.5{seed}')
        )
        (folder / "test_metrics.json").write_text(text)
    first, other = _arms(tmp_path)
    assert "worse" in seeds_only(differences(first, [other], "test", ["ece"])[0], "a", 0.95)


def test_other_test_pictures_are_refused(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "e_a", seed)
        make_run(tmp_path, "e_b", seed, lr=0.1, first_test=30)
    first, other = _arms(tmp_path)
    assert "10 shared" in unlike_pictures(first, other, "test")
    found = differences(first, [other], "test", ["accuracy"])
    assert found[0].refused
    assert math.isnan(found[0].p_value)
    assert over_pictures(first, [other], "test", "accuracy") == []
    matter = gather(Asked(runs=[tmp_path], metrics=["accuracy"]))
    text = str(build(matter))
    assert "no conclusion on accuracy: tested on different pictures" in text
    assert "2 different sets of tested pictures" in text


def test_pictures_are_compared_as_studies_do(tmp_path):
    for seed in range(3):
        make_run(tmp_path, "e_a", seed, accuracy=0.6, tested=80)
        make_run(tmp_path, "e_b", seed, accuracy=0.9375 + 0.0125 * seed, lr=0.1, tested=80)
    first, other = _arms(tmp_path)
    found = over_pictures(first, [other], "test", "accuracy")[0]
    assert found.judged.value == pytest.approx(0.35)
    assert found.judged.low < 0.35 < found.judged.high
    assert (found.judged.seeds, found.judged.pictures) == (3, 80)
    assert "better on these data" in found.said
    assert found.only_arm - found.only_baseline == 3 * 28
    assert all(p < 0.01 for p in found.p_values)
    right = [_right(run.folder.path) for run in (first.runs[0], other.runs[0])]
    assert found.p_values[0] == pytest.approx(mcnemar(*right).p_value)


def _right(folder):
    import csv

    with (folder / "test_predictions.csv").open() as lines:
        return [row["label"] == row["prediction"] for row in csv.DictReader(lines)]


def test_one_seed_concludes_nothing(tmp_path):
    make_run(tmp_path, "e_a", 0, accuracy=0.5)
    make_run(tmp_path, "e_b", 0, accuracy=1.0, lr=0.1)
    report = build(gather(Asked(runs=[tmp_path])))
    assert "no conclusion: b" in report.summary
    text = str(report)
    assert "No arm has two seeds" in text
    assert "better on" not in text


def test_of_few_noisy_seeds_no_difference_is_claimed(tmp_path):
    for seed, (a, b) in enumerate([(0.7, 0.8), (0.8, 0.7), (0.75, 0.8)]):
        make_run(tmp_path, "e_a", seed, accuracy=a)
        make_run(tmp_path, "e_b", seed, accuracy=b, lr=0.1)
    report = build(gather(Asked(runs=[tmp_path], metrics=["accuracy"])))
    assert "no difference is shown: b" in report.summary


def _unlike_seeds(folder, gains, *, arms=("b",)):
    for seed, gain in enumerate(gains):
        make_run(folder, "e_a", seed, accuracy=0.7)
        for k, arm in enumerate(arms):
            make_run(folder, f"e_{arm}", seed, accuracy=0.7 + gain, lr=0.1 + k)


def _chart(matter):
    blocks = next(section for section in build(matter).sections if section.title == "What it comes to").blocks
    return next((block for block in blocks if isinstance(block, Intervals)), None)


def test_what_is_judged_needs_no_threshold_and_was_not_named_before(tmp_path):
    _unlike_seeds(tmp_path, [0.27, 0.28, 0.29])
    matter = gather(Asked(runs=[tmp_path]))
    assert matter.judged == "auroc"
    section = next(section for section in build(matter).sections if section.title == "What it comes to")
    chosen = [block for block in section.blocks if isinstance(block, Text) and "was chosen by" in block.text]
    assert [block.kind for block in chosen] == ["warning"]  # since b is claimed to be better
    assert choose(["auroc", "balanced_accuracy", "defect_auroc"])[0] == "defect_auroc"


def test_the_chart_has_the_very_intervals_of_the_conclusions(tmp_path):
    _unlike_seeds(tmp_path, [0.05, 0.1, 0.075], arms=("b", "c"))
    matter = gather(Asked(runs=[tmp_path], metrics=["auroc"]))
    chart = _chart(matter)
    judged = {found.arm: found.judged for found in matter.pictures}
    assert [(line.name, line.low, line.high) for line in chart.intervals] == [
        (arm, judged[arm].low, judged[arm].high) for arm in ("b", "c")
    ]
    assert chart.reference == 0
    assert "at 97.5 %, so that 95 % hold for all 2 arms together" in chart.caption


def test_side_figures_change_no_conclusion(tmp_path):
    _unlike_seeds(tmp_path, [0.05, 0.1, 0.075])
    for file in tmp_path.glob("*/*/test_predictions.csv"):
        file.unlink()
    alone, beside = (
        build(gather(Asked(runs=[tmp_path], metrics=names))).summary
        for names in (["auroc"], ["auroc", "accuracy", "balanced_accuracy"])
    )
    assert alone == beside
    assert "better: b" in alone
    limits = _chart(gather(Asked(runs=[tmp_path], metrics=["auroc"]))).intervals[0]
    wanted = stats.ttest_1samp([0.05, 0.1, 0.075], 0).confidence_interval()
    assert (limits.low, limits.high) == pytest.approx(tuple(wanted))


def test_other_data_are_refused_even_under_the_same_names(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "e_a", seed, category="screw")
        make_run(tmp_path, "e_b", seed, category="cable")
    first, other = _arms(tmp_path)
    assert unlike_pictures(first, other, "test") == "of other data: ELPV screw and ELPV cable"
    table = next(table for table in all_tables(build(gather(Asked(runs=[tmp_path])))) if table.name == "results")
    assert not table.strong


def test_mirrored_training_pictures_and_logs_conclude_nothing(tmp_path):
    for seed, gain in enumerate([0.05, 0.1, 0.075]):
        for arm, lr in (("a", 0.001), ("b", 0.1)):
            folder = make_run(tmp_path, f"e_{arm}", seed, accuracy=0.7 + gain * (arm == "b"), lr=lr)
            for name in ("metrics.json", "predictions.csv"):
                (folder / f"test_{name}").rename(folder / f"mirrored_{name}")
    text = build(gather(Asked(runs=[tmp_path]))).summary
    assert "no conclusion: b" in text
    assert "trained on" in text
    for file in tmp_path.glob("*/*/mirrored_*"):
        file.unlink()
    assert "no conclusion: b" in build(gather(Asked(runs=[tmp_path]))).summary


def test_what_was_not_compared_stands_in_one_box(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "e_a", seed)
        for arm in "bcd":
            make_run(tmp_path, f"e_{arm}", seed, lr=0.1 * ord(arm), first_test=30)
    blocks = [block for section in build(gather(Asked(runs=[tmp_path]))).sections for block in section.blocks]
    boxes = [block for block in blocks if isinstance(block, Text) and block.text == "Not compared:"]
    assert [len(box.items) for box in boxes] == [3]


def test_a_single_run_shows_its_figures_first_with_intervals_over_pictures(tmp_path):
    make_run(tmp_path, "e", 0, accuracy=0.8)
    built = build(gather(Asked(runs=[tmp_path])))
    assert "0.800 (95 % interval for other pictures: 0.700 to 0.900), of one seed" in built.summary
    table = next(table for table in all_tables(built) if table.name == "at_a_glance")
    assert list(table.rows[0]) == ["AUROC", 0.8, pytest.approx(0.7), pytest.approx(0.9)]


def test_of_equally_usual_arms_the_one_with_most_seeds_is_the_baseline(tmp_path):
    make_run(tmp_path, "e_a", 0, lr=0.1)
    make_run(tmp_path, "e_a", 0, lr=0.1, category="screw", run_id="other")
    for seed in (0, 1):
        make_run(tmp_path, "e_b", seed, lr=0.2)
    assert gather(Asked(runs=[tmp_path])).baseline.name == "b"


def test_an_arm_without_predictions_takes_the_pictures_from_no_other(tmp_path):
    _unlike_seeds(tmp_path, [0.05, 0.1, 0.075], arms=("b", "c", "d"))
    for file in tmp_path.glob("e_c/*/test_predictions.csv"):
        file.unlink()
    folder = make_run(tmp_path, "e_d", 0, lr=2.1, run_id="again")
    assert folder.is_dir()
    matter = gather(Asked(runs=[tmp_path], metrics=["accuracy"]))
    assert [found.arm for found in matter.pictures] == ["b"]
    assert "(for other seeds alone: c, d)" in _chart(matter).caption


def test_seeds_that_all_say_the_same_have_no_interval_of_no_width(tmp_path):
    _unlike_seeds(tmp_path, [0.1, 0.1, 0.1])
    for file in tmp_path.glob("*/*/test_predictions.csv"):
        file.unlink()
    matter = gather(Asked(runs=[tmp_path], metrics=["accuracy"]))
    assert math.isnan(matter.differences[0].limits(0.95).low)
    assert "no conclusion: b" in build(matter).summary
    assert _chart(matter) is None


def test_limits_stay_where_shares_and_their_differences_can_lie(tmp_path):
    for seed, (a, b) in enumerate([(0.5, 0.6), (0.4, 1.0)]):
        make_run(tmp_path, "e_a", seed, accuracy=a)
        make_run(tmp_path, "e_b", seed, accuracy=b, lr=0.1)
    for file in tmp_path.glob("*/*/test_predictions.csv"):
        file.unlink()
    matter = gather(Asked(runs=[tmp_path], metrics=["accuracy", "ece"]))
    for table in all_tables(build(matter)):
        heads = [column.name for column in table.columns]
        for row in table.rows:
            found = dict(zip(heads, row, strict=True))
            if table.name == "judged" or (table.name == "figures" and found["figure"] == "accuracy"):
                limits = [found[head] for head in ("low", "high", "95 % from", "95 % to") if head in found]
                assert limits == [0, 1]
            if table.name == "differences" and found["figure"] == "accuracy":
                assert (found["95 % from"], found["95 % to"]) == (-1, 1)
    assert (_chart(matter).intervals[0].low, _chart(matter).intervals[0].high) == (-1, 1)
    assert "(-1 to +1 at 95 %, 2 seeds)" in str(build(matter))
    assert ends("val/nll") == (-math.inf, math.inf)
    assert ends_of_difference("gain/refined/iou") == (-2, 2)


def test_equal_best_means_all_stand_out(tmp_path):
    for name, shares in {"a": (0.8, 0.9), "b": (0.9, 0.8), "c": (0.7, 0.8)}.items():
        for seed, share in enumerate(shares):
            make_run(tmp_path, f"e_{name}", seed, accuracy=share)
    (table,) = (
        t for t in all_tables(build(gather(Asked(runs=[tmp_path], metrics=["accuracy"])))) if t.name == "results"
    )
    assert sorted(table.strong) == [(0, 2), (1, 2)]


def test_numbers_that_were_drawn_are_read_with_four_digits(tmp_path):
    for name, lr in (("plain", 0.001), ("drawn", 0.025750846143454856), ("tiny", 3.1234567890123e-05)):
        for seed in range(2):
            make_run(tmp_path, name, seed, lr=lr)
    built = build(gather(Asked(runs=[tmp_path])))
    protocol = next(section for section in built.sections if section.title == "Protocol")
    (table,) = (block for block in protocol.blocks if getattr(block, "name", "") == "differences_of_options")
    (row,) = (row for row in table.rows if row[0] == "model.lr")
    assert set(row[1:]) == {"0.001", "0.02575", "3.123e-05"}
