"""Runs as a report reads them: found, filtered, put into arms; broken ones told of and never fatal."""

import os

import numpy as np
import pytest

from lit_defect.errors import UserError
from lit_defect.report.arms import choose_baseline, make_arms
from lit_defect.report.collect import find_runs, read_run, read_runs
from lit_defect.report.contents import build
from lit_defect.report.curves import last_values, mean_curve, read_series, thin
from lit_defect.report.figures import better, choose, label, meaning, read_measured
from lit_defect.report.keys import filtered, resolve
from lit_defect.report.matter import Asked, gather
from tests.run_folders import make_run


def _runs(folder):
    return read_runs(find_runs([folder])).runs


def test_runs_are_found_below_in_the_order_of_their_numbers(tmp_path):
    for seed in (0, 2, 10):
        make_run(tmp_path / "a", "exp", seed)
    assert [path.name for path in find_runs([tmp_path])] == ["s0", "s2", "s10"]
    assert find_runs([tmp_path / "a" / "exp" / "s2"]) == [tmp_path / "a" / "exp" / "s2"]
    assert len(find_runs([tmp_path, tmp_path / "a"])) == 3


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no run here"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "none"])


def test_a_folder_without_runs_among_others_is_passed_over_and_told(tmp_path):
    """`runs/elpv*` takes in the folder of the study itself."""
    make_run(tmp_path, "elpv_a", 0)
    (tmp_path / "elpv").mkdir()
    matter = gather(Asked(runs=[tmp_path / "elpv", tmp_path / "elpv_a"]))
    assert len(matter.runs) == 1
    assert matter.problems == [f"{tmp_path / 'elpv'}: no run here"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1, 2]", "`run.json` is missing or broken"),
        ('{"versions": [1], "steps": "many", "seconds": [null], "seed": 3}', "no sound versions, steps, seconds"),
    ],
)
def test_an_odd_record_is_told_of_and_the_rest_of_it_is_read(tmp_path, content, problem):
    folder = make_run(tmp_path, "exp", 0)
    (folder / "run.json").write_text(content)
    matter = gather(Asked(runs=[tmp_path]))
    assert problem in matter.problems[0]
    assert problem in str(build(matter))
    assert matter.arms[0].by_seed("test", "accuracy") == {(0, 0): pytest.approx(0.8)}


def test_a_broken_run_is_told_of_and_others_are_read(tmp_path):
    make_run(tmp_path, "exp", 0)
    broken = make_run(tmp_path, "exp", 1)
    (broken / "test_metrics.json").write_text('{"accuracy": {"va')
    (broken / "config.yaml").write_text("a: [1,\n")
    no_record = make_run(tmp_path, "exp", 2)
    (no_record / "run.json").write_text("{")
    matter = gather(Asked(runs=[tmp_path]))
    assert len(matter.runs) == 3
    text = "\n".join(matter.problems)
    assert "exp/s1: `config.yaml`" in text
    assert "exp/s1: `test_metrics.json` cannot be read" in text
    assert "exp/s2: `run.json`" in text
    assert [run.folder.run_id for run in matter.arms[0].runs] == ["s0", "s2"]


@pytest.mark.parametrize("content", ["[]", "null", '{"accuracy": "high"}', '{"accuracy": {"value": {"value": 1}}}'])
def test_odd_metrics_are_no_crash(tmp_path, content):
    folder = make_run(tmp_path, "exp", 0)
    (folder / "test_metrics.json").write_text(content)
    assert not any(found.figures.get("accuracy") for found in read_run(folder).measured.values())


def test_a_half_written_log_gives_its_whole_lines(tmp_path):
    folder = make_run(tmp_path, "exp", 0, steps=4)
    with (folder / "metrics.csv").open("a") as file:
        file.write("4,0.001,40,0.1\n5,0.001,x,0.1,0.2\n6,0.001,60,oops,0.25\n7,0.0")
    series = read_series(folder / "metrics.csv")
    assert series["train/loss"][0].tolist() == [0, 10, 20, 30]
    assert last_values(folder / "metrics.csv")["val/loss"] == 0.25
    assert read_series(folder / "none.csv") == {}


def test_states_are_those_of_the_record_and_of_living_processes(tmp_path):
    import socket

    assert read_run(make_run(tmp_path, "a", 0, status="preempted")).state == "preempted"
    assert read_run(make_run(tmp_path, "a", 1, status="running")).state == "running"  # of another host
    gone = make_run(tmp_path, "a", 2, status="running", host=socket.gethostname())
    assert read_run(gone).state in ("lost", "running")
    import subprocess

    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = make_run(tmp_path, "a", 3, status="running", host=socket.gethostname(), pid=ended.pid)
    assert read_run(dead).state == "lost"
    living = make_run(tmp_path, "a", 4, status="running", host=socket.gethostname(), pid=os.getppid())
    assert read_run(living).state == "running"


def test_filters_compare_numbers_patterns_and_several_values(tmp_path):
    for lr in (0.001, 0.01):
        for seed in (0, 1, 2):
            make_run(tmp_path, f"exp_{lr}", seed, lr=lr, status="failed" if seed == 2 else "finished")
    runs = _runs(tmp_path)
    assert len(filtered(runs, ["model.lr=1e-3"])) == 3
    assert len(filtered(runs, ["seed=0,1", "experiment=exp_0.01"])) == 2
    assert len(filtered(runs, ["state=fin*"])) == 4
    with pytest.raises(UserError, match=r"model.lrr.*did you mean model.lr\?"):
        filtered(runs, ["model.lrr=1"])
    with pytest.raises(UserError, match=r"no run is left; lr is one of 0.001, 0.01"):
        filtered(runs, ["lr=5"])
    with pytest.raises(UserError, match="KEY=VALUE"):
        filtered(runs, ["lr"])


def test_a_key_may_be_shortened_unless_several_end_so(tmp_path):
    folder = make_run(tmp_path, "exp", 3)
    run = read_run(folder)
    assert resolve("lr", [run], "--group-by")(run) == "0.001"
    assert resolve("model.init_args.lr", [run], "--group-by")(run) == "0.001"
    assert resolve("seed", [run], "--group-by")(run) == "3"
    with pytest.raises(UserError, match="several options end so"):
        resolve("class_path", [run], "--group-by")


def test_arms_are_runs_that_differ_in_seeds_only(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "elpv_originals", seed)
        make_run(tmp_path, "elpv_strong", seed, augment="strong")
    found = make_arms(_runs(tmp_path))
    assert [arm.name for arm in found.arms] == ["originals", "strong"]
    assert found.prefix == "elpv_"
    assert [len(arm.runs) for arm in found.arms] == [2, 2]
    assert found.differ == {"model.augment": {"originals": "flips", "strong": "strong"}}
    assert found.mixed == []


def test_arms_of_one_experiment_are_named_by_what_tells_them_apart(tmp_path):
    for number, (lr, augment) in enumerate([(0.1, "flips"), (0.2, "flips"), (0.1, "strong"), (0.2, "strong")]):
        make_run(tmp_path, "grid", 0, lr=lr, augment=augment, run_id=f"r{number}")
    names = [arm.name for arm in make_arms(_runs(tmp_path)).arms]
    assert names == [
        "lr=0.1, augment=flips", "lr=0.2, augment=flips", "lr=0.1, augment=strong", "lr=0.2, augment=strong"
    ]  # fmt: skip


def test_what_most_arms_have_stands_in_no_name_while_these_stay_distinct(tmp_path):
    for number, lr in enumerate((0.1, 0.2, 0.3)):
        make_run(tmp_path, "tried", 0, lr=lr, run_id=f"r{number}")
    make_run(tmp_path, "tried", 0, lr=0.3, augment="strong")
    names = [arm.name for arm in make_arms(_runs(tmp_path)).arms]
    assert names == ["lr=0.1", "lr=0.2", "lr=0.3", "lr=0.3, augment=strong"]


def test_group_by_takes_seeds_as_units_and_says_what_was_mixed(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "a", seed, lr=0.1, accuracy=0.7)
        make_run(tmp_path, "b", seed, lr=0.1, accuracy=0.9, augment="strong")
        make_run(tmp_path, "c", seed, lr=0.02, accuracy=0.5)
    found = make_arms(_runs(tmp_path), ["model.lr"])
    assert [arm.name for arm in found.arms] == ["lr=0.02", "lr=0.1"]
    both = found.arms[1]
    assert both.by_seed("test", "accuracy") == {(0, 0): pytest.approx(0.8), (1, 0): pytest.approx(0.8)}
    assert both.spread("test", "accuracy").seeds == 2
    assert both.repeated == 2
    assert found.mixed == [("lr=0.1", "model.augment")]
    with pytest.raises(UserError, match=r"--group-by model.learning: .*did you mean"):
        make_arms(_runs(tmp_path), ["model.learning"])


def test_the_baseline_is_the_usual_arm_or_the_one_asked_for(tmp_path):
    make_run(tmp_path, "x_augmented", 0, augment="strong")
    make_run(tmp_path, "x_plain", 0)
    make_run(tmp_path, "x_steep", 0, lr=0.1)
    arms = make_arms(_runs(tmp_path)).arms
    assert choose_baseline(arms, None, None)[0].name == "plain"
    first, others = choose_baseline(arms, ["steep", "plain"], None)
    assert (first.name, [arm.name for arm in others]) == ("steep", ["plain"])
    with pytest.raises(UserError, match="--compare flat: no such arm; there are: augmented; plain; steep"):
        choose_baseline(arms, ["flat", "plain"], None)


def test_figures_of_all_tasks_are_named_by_what_they_are():
    found = read_measured(
        {
            "score": "knn", "n": 5, "threshold": 0.5, "training_minutes": 3.0, "latency_ms": {"median": 2.0},
            "image": {"knn": {"auroc": {"value": 0.9, "low": 0.8, "high": 1.0}, "counts": {"good": 2},
                              "auroc_by_type": {"crack": {"value": 0.7}}},
                      "kde": {"auroc": {"value": 0.6}}},
            "pixel": {"pixel_auroc": 0.95, "aupro": None}, "pixel_by_type": {"crack": {"pixel_auroc": 0.5}},
            "methods": {"refined": {"iou": {"value": 0.4}, "iou_by_class": {"pore": {"value": 0.3, "n": 4}}}},
            "gain": {"refined": {"iou": {"value": -0.1}, "wilcoxon_p": 0.01, "by_class": {"pore": {"value": -0.2}}}},
            "figures": {"psnr_good": 34.0},
            "without_near_duplicates": {"image": {"knn": {"auroc": {"value": 0.85}}}},
        }
    )  # fmt: skip
    assert {name: figure.value for name, figure in found.figures.items()} == {
        "image/auroc": 0.9, "image/kde/auroc": 0.6, "pixel/auroc": 0.95, "refined/iou": 0.4, "gain/refined/iou": -0.1,
        "psnr_good": 34.0,
    }  # fmt: skip
    assert found.figures["image/auroc"].low == 0.8
    assert found.parts == {
        "image/auroc": {"crack": 0.7}, "pixel/auroc": {"crack": 0.5}, "refined/iou": {"pore": 0.3},
        "gain/refined": {"pore": -0.2},
    }  # fmt: skip
    assert found.fresh["image/auroc"].value == 0.85
    assert found.costs == {"training_minutes": 3.0, "latency_ms/median": 2.0}


def test_which_figures_come_first_and_which_of_their_values_are_good():
    assert choose(["ece", "accuracy", "balanced_accuracy"])[0] == "balanced_accuracy"
    assert choose(["odd", "psnr_good"]) == ["psnr_good"]
    assert choose(["odd"]) == ["odd"]
    assert [better(name) for name in ("image/auroc", "escape_rate", "refined/hd95", "gain/refined/iou", "odd")] == [
        "larger", "smaller", "smaller", "larger", None
    ]  # fmt: skip
    assert label("refined/boundary_iou") == "refined boundary IoU"


def test_figures_are_explained():
    assert "0.5 is guessing" in meaning("image/auroc")
    assert meaning("defect_auroc") == meaning("auroc")
    assert meaning("pixel/auroc") == meaning("auroc") + "; of single pixels"
    assert meaning("gain/refined/iou").startswith("what refinement adds to stage 1; overlap")
    assert meaning("odd") == ""


def test_curves_are_thinned_and_averaged():
    steps = np.arange(1000.0)
    thinned = thin((steps, 2 * steps), 100)
    assert len(thinned[0]) == 100
    assert thinned[1].mean() == pytest.approx(999.0)
    curve = mean_curve("a", [(np.array([0.0, 1]), np.array([1.0, 2])), (np.array([0.0, 1]), np.array([3.0, 6]))])
    assert curve.y == [2.0, 4.0]
    assert curve.low == pytest.approx([2 - np.sqrt(2), 4 - np.sqrt(8)])
    shorter = mean_curve(
        "a", [(np.array([0.0, 2]), np.array([0.0, 2])), (np.array([0.0, 1, 2]), np.array([0.0, 1, 2]))]
    )
    assert shorter.y == [0.0, 1.0, 2.0]
    alone = mean_curve("a", [(np.array([0.0, 4]), np.array([0.0, 1])), (np.array([0.0, 2, 3]), np.array([0.0, 1, 2]))])
    assert alone.x == [0.0, 2.0, 4.0]
    assert alone.y[-1] == 1.0  # one run alone has got there


def test_what_other_runs_have_made_goes_by_their_experiment(tmp_path):
    made = [make_run(tmp_path / "runs", "generator", seed) for seed in (0, 1)]
    for seed, one in enumerate(made):
        folder = make_run(tmp_path / "runs", "trained", seed)
        text = (folder / "config.yaml").read_text()
        text = text.replace("    root: null\n", f"    root: null\n    synthetic: {{path: {one}/generated}}\n")
        (folder / "config.yaml").write_text(text)
        other = make_run(tmp_path / "runs", "elsewhere", seed)
        text = (other / "config.yaml").read_text()
        text = text.replace("    root: null\n", f"    root: null\n    synthetic: {{path: /gone/sets_s{seed}}}\n")
        (other / "config.yaml").write_text(text)
    arms = make_arms(_runs(tmp_path / "runs")).arms
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("elsewhere", 2), ("generator", 2), ("trained", 2)]
    differ = make_arms(_runs(tmp_path / "runs")).differ["data.synthetic.path"]
    assert differ == {"elsewhere": "/gone/sets_s{seed}", "generator": "-", "trained": "generator"}
