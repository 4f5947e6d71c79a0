"""Differences between arms against scipy and by hand, and what is refused."""

import math

import numpy as np
import pytest
from scipy import stats

from lit_defect.metrics.intervals import mcnemar
from lit_defect.report.arms import make_arms
from lit_defect.report.collect import find_runs, read_runs
from lit_defect.report.comparing import differences, holm, over_pictures, paired_t, seeds_only, unlike_pictures
from lit_defect.report.contents import build
from lit_defect.report.matter import Asked, gather
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
    assert "better on these pictures, over seeds" in seeds_only(found[0], "a")
    assert "no conclusion" in seeds_only(found[2], "a")


def test_an_error_that_grows_is_worse(tmp_path):
    for seed in range(4):
        make_run(tmp_path, "e_a", seed)
        folder = make_run(tmp_path, "e_b", seed, lr=0.1)
        text = (
            (folder / "test_metrics.json").read_text().replace('"ece": {"value": 0.1', f'"ece": {{"value": 0.5{seed}')
        )
        (folder / "test_metrics.json").write_text(text)
    first, other = _arms(tmp_path)
    assert "worse" in seeds_only(differences(first, [other], "test", ["ece"])[0], "a")


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
        make_run(tmp_path, "e_b", seed, accuracy=0.95, lr=0.1, tested=80)
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
