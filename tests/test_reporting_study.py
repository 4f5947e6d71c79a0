"""The report of a study, against figures worked by hand and by scipy."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from lit_defect.errors import UserError
from lit_defect.metrics.classification import evaluate
from lit_defect.reporting import study_alike, study_runs
from lit_defect.reporting.seeds import Spread
from lit_defect.reporting.study import markdown
from lit_defect.reporting.study_runs import FIGURES, Judged, StudyRun, compare, judge, read_results
from lit_defect.reporting.study_verdict import verdict
from lit_defect.reporting.zheng_nagata import ACCURACY, BEST, published_difference
from lit_defect.runs import RunFolder, write_json
from lit_defect.study import main
from lit_defect.study_file import read_study

PICTURES_TESTED = 40  # the second half is defective

Make = Callable[..., Path]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a study with the arms A and B, and no runs yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study_alike, "parsed", lambda commands: {name: {} for name in commands})
    Path("c.yaml").write_text("{}")
    said = {"study": "toy", "question": "Does it help?", "seeds": [0, 1, 2], "config": "c.yaml", "mirrored": True}
    arms = {"A": {"title": "originals"}, "B": {"title": "and edits", "options": {"data.synthetic.path": "x"}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**said, "arms": arms, "paper": "zheng_nagata"}))
    return path


def write_run(
    arm: str, seed: int, wrong: Sequence[int], stage: str = "test", near: Sequence[int] = (), **changes: Any
) -> Path:
    """A run folder as the task leaves it: these pictures are called by the other class's name."""
    folder = Path(f"runs/toy_{arm}/s{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.repeat([0, 1], PICTURES_TESTED // 2)
    sure = 0.6 + 0.3 * np.random.default_rng([seed, ord(arm)]).random(PICTURES_TESTED)
    right = ~np.isin(np.arange(PICTURES_TESTED), wrong)
    defective = np.where((labels == 1) == right, sure, 1 - sure)
    probabilities = np.stack([1 - defective, defective], axis=1)
    names = ["good", "defective"]
    result = evaluate(probabilities, labels, names, normal_class=0, resamples=0)
    if near:
        kept = ~np.isin(np.arange(PICTURES_TESTED), near)
        fresh = evaluate(probabilities[kept], labels[kept], names, normal_class=0, resamples=0)
        result["without_near_duplicates"] = fresh
    (folder / f"{stage}_metrics.json").write_text(json.dumps(result))
    with (folder / f"{stage}_predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "name", "label", "prediction", "score", "split"])
        for k, (label, p) in enumerate(zip(labels, defective, strict=True)):
            writer.writerow([f"/x/{k}", f"p{k:02}", names[label], names[int(p > 0.5)], p, stage])
    group = changes.get("group", lambda k: "")
    with (folder / "splits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "split", "label", "group", "source"])
        writer.writerows([f"p{k:02}", "test", labels[k], group(k), "real"] for k in range(PICTURES_TESTED))
        writer.writerows([f"t{k}", "train", int(k < 3), "", "real"] for k in range(10))
    if arm == "B":
        (folder / "synthetic.json").write_text(json.dumps({"generator": "StableDiffusionEditor", "train": 2}))
        lines = "name,split,defect_type\na,train,crack\nb,train,crack\nc,synthetic_val,crack\n"
        (folder / "synthetic.csv").write_text(lines)
    return folder


WRONG = {"A": [[0, 1, 20, 21, 22], [0, 20, 21, 23], [5, 20, 21, 22]], "B": [[0, 20], [1, 20, 21], [20]]}


def write_all(**changes: Any) -> None:
    for arm, wrong in WRONG.items():
        for seed, pictures in enumerate(wrong):
            write_run(arm, seed, pictures, **changes)


def cells(text: str, first: str, number: int = 0) -> list[str]:
    """Cells of the line of a Markdown table that begins so; of the number-th such line."""
    line = [line for line in text.splitlines() if line.startswith(f"| {first} |")][number]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_figures_of_a_run(study):
    write_run("A", 0, [0, 20, 21, 22])
    (run,) = read_results(read_study(study))["A"].values()
    figures = run.tested["test"].figures
    assert list(figures) == list(FIGURES)
    assert figures["accuracy"] == pytest.approx(36 / 40)
    assert figures["recall"] == pytest.approx(17 / 20)
    assert figures["false_alarms"] == pytest.approx(1 / 20)
    assert run.real == {"good": 7, "defective": 3}


def test_means_and_differences_over_seeds_are_scipys(study):
    write_all()
    results = read_results(read_study(study))
    pair = compare(results["A"], results["B"], "test")
    a, b = (np.array([1 - len(wrong) / PICTURES_TESTED for wrong in WRONG[arm]]) for arm in "AB")
    found = pair.by_seed["accuracy"]
    low, high = stats.t.interval(0.95, 2, (b - a).mean(), stats.sem(b - a))
    assert (found.mean, found.low, found.high) == pytest.approx(((b - a).mean(), low, high))
    text = markdown(read_study(study), results)
    low, high = stats.t.interval(0.95, 2, a.mean(), stats.sem(a))
    assert (
        cells(text, "A", 1)[0]
        == f"{100 * a.mean():.1f} ± {100 * a.std(ddof=1):.1f} ({100 * low:.1f} to {100 * high:.1f})"
    )


def test_mcnemar_by_seed_and_summed(study):
    write_all()
    results = read_results(read_study(study))
    pair = compare(results["A"], results["B"], "test")
    only_b = [len(set(a) - set(b)) for a, b in zip(WRONG["A"], WRONG["B"], strict=True)]
    only_a = [len(set(b) - set(a)) for a, b in zip(WRONG["A"], WRONG["B"], strict=True)]
    assert [test.only_b for test in pair.discordant.values()] == only_b
    assert [test.only_a for test in pair.discordant.values()] == only_a
    assert (pair.summed.only_b, pair.summed.only_a) == (sum(only_b), sum(only_a))
    exact = stats.binomtest(sum(only_a), sum(only_a) + sum(only_b)).pvalue
    assert pair.summed.p_value == pytest.approx(exact)


def test_the_interval_over_pictures_is_that_of_the_mean_over_seeds(study):
    write_all()
    results = read_results(read_study(study))
    found = compare(results["A"], results["B"], "test").over_pictures
    wrong = {arm: np.stack([np.isin(np.arange(PICTURES_TESTED), w) for w in WRONG[arm]]).mean(0) for arm in "AB"}
    gained = wrong["A"] - wrong["B"]  # of each picture, over the seeds
    assert found["accuracy"].value == pytest.approx(gained.mean())
    half = 1.96 * gained.std() / np.sqrt(PICTURES_TESTED)
    assert found["accuracy"].low == pytest.approx(gained.mean() - half, abs=0.3 * half)
    assert found["accuracy"].high == pytest.approx(gained.mean() + half, abs=0.3 * half)
    assert found["balanced_accuracy"].value == pytest.approx((gained[:20].mean() + gained[20:].mean()) / 2)
    areas = [np.mean([run.tested["test"].figures["auroc"] for run in results[arm].values()]) for arm in "AB"]
    assert found["auroc"].value == pytest.approx(areas[1] - areas[0])


def test_photographs_of_one_part_are_drawn_together(study):
    write_all()
    alone = compare(*read_results(read_study(study)).values(), "test").over_pictures["accuracy"]
    write_all(group=lambda k: f"part{k // 4}")
    together = compare(*read_results(read_study(study)).values(), "test").over_pictures["accuracy"]
    assert together.value == alone.value
    assert together.high - together.low > 1.2 * (alone.high - alone.low)


def test_only_seeds_and_pictures_that_both_arms_have_are_compared(study):
    write_all()
    Path("runs/toy_B/s2/test_metrics.json").unlink()
    results = read_results(read_study(study))
    assert list(compare(results["A"], results["B"], "test").discordant) == [0, 1]
    assert "**Unfinished: no results yet of B/s2.**" in markdown(read_study(study), results)


def test_seeds_and_pictures_move_a_difference_together(study):
    write_all()
    results = read_results(read_study(study))
    level = 0.99
    found = judge(results["A"], results["B"], "test", "accuracy", level)
    differences = compare(results["A"], results["B"], "test").by_seed["accuracy"]
    over_seeds = stats.t.isf((1 - level) / 2, 2) * differences.sd / np.sqrt(3)
    wrong = {arm: np.stack([np.isin(np.arange(PICTURES_TESTED), w) for w in WRONG[arm]]).mean(0) for arm in "AB"}
    over_pictures = stats.norm.isf((1 - level) / 2) * (wrong["A"] - wrong["B"]).std() / np.sqrt(PICTURES_TESTED)
    assert found.value == pytest.approx(7 / 120)
    assert found.high - found.value == pytest.approx(np.hypot(over_seeds, over_pictures), rel=0.15)
    assert found.value - found.low == pytest.approx(np.hypot(over_seeds, over_pictures), rel=0.15)
    assert found.value - found.low > over_seeds
    assert (found.seeds, found.pictures, found.parts) == (3, 40, 40)


def test_noise_of_both_kinds_is_seldom_called_a_difference():
    """Seeds and pictures move the difference by chance alone: few intervals of 95 % may leave out 0."""
    rng, called = np.random.default_rng(0), 0
    names = [f"p{k}" for k in range(60)]
    for _ in range(200):
        shift = rng.normal(0, 0.08, 60)  # of the pictures, for all seeds
        runs: list[dict[int, Any]] = [{}, {}]
        for seed in range(5):
            chance = rng.normal(0, 0.05)
            for arm, runs_of in enumerate(runs):
                right = rng.random(60) < 0.7 + arm * (shift + chance)
                tested = study_runs.Tested({key: float(right.mean()) for key in FIGURES}, {}, names, np.arange(60) % 2, right,
                                np.zeros(60), None, names)  # fmt: skip
                runs_of[seed] = StudyRun(RunFolder(Path("x")), {"test": tested}, {}, {}, "")
        found = judge(runs[0], runs[1], "test", "accuracy", 0.95)
        called += found.low > 0 or found.high < 0
    assert called <= 12


def test_seeds_with_one_and_the_same_difference_conclude_nothing(study):
    """Their interval has no width by chance: two seeds and 40 pictures meet in it often."""
    for seed in range(2):
        write_run("A", seed, range(10 + seed, 20 + seed))
        write_run("B", seed, [seed])
    text = markdown(read_study(study), read_results(read_study(study)))
    assert "no conclusion on accuracy from 2 seed(s)" in text
    assert "(the same in every run)" in text
    assert cells(text, "B", 2)[0] == "+22.5 ± 0.0"


def test_limits_of_a_difference_are_differences_that_shares_can_have(study):
    for seed, wrong in enumerate((30, 0)):
        write_run("A", seed, range(wrong))
        write_run("B", seed, [5])
    results = read_results(read_study(study))
    found = judge(results["A"], results["B"], "test", "accuracy", 0.95)
    assert (found.low, found.high) == (-1, 1)
    assert "(-100.0 to +100.0 at 95 %, 2 seeds" in verdict(found, "accuracy", 0.95)
    main([str(study), "--report"])
    with Path("runs/toy/figures.csv").open() as lines:
        numbers = {row["configuration"]: row for row in csv.DictReader(lines) if row["figure"] == "accuracy"}
    assert (numbers["A"]["low"], numbers["A"]["high"]) == ("0", "1")
    assert (numbers["B less A, over seeds"]["low"], numbers["B less A, over seeds"]["high"]) == ("-1", "1")


def test_runs_that_were_tested_on_other_pictures_are_no_pairs(study):
    write_all()
    for seed in (0, 1, 2):
        file = Path(f"runs/toy_B/s{seed}/test_predictions.csv")
        file.write_text(file.read_text().replace(",p00,", ",other,"))
        text = markdown(read_study(study), read_results(read_study(study)))
        others = ", ".join(f"s{k}" for k in range(seed + 1))
        assert f"**B: {others} had other test pictures (hold-out) than A; no difference is taken of them.**" in text
        pair = compare(*read_results(read_study(study)).values(), "test")
        assert list(pair.discordant if pair else ()) == list(range(seed + 1, 3))
    assert "no conclusion, since none of its seeds has been tested in the baseline on the same pictures, too." in text
    assert "less A, points" not in text


def test_nothing_is_less_than_nothing():
    assert Spread(-1e-17, 1e-17, -4e-4, 4e-4, 2).text(100, 1, sign=True) == "+0.0 ± 0.0"
    assert Spread(-1e-17, 1e-17, -4e-4, 4e-4, 2).limits(100, 1, sign=True) == "+0.0 to +0.0"
    assert verdict(Judged(-1e-17, -4e-4, 4e-4, 3, 40, 40), "accuracy", 0.95).startswith("accuracy +0.0 points (+0.0 ")


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.03, ": better on these data"),
        (-0.03, -0.01, ": worse on these data"),
        (-0.02, 0.03, "none is excluded"),
    ],
)
def test_the_conclusion_follows_from_the_interval(low, high, said):
    assert said in verdict(Judged((low + high) / 2, low, high, 3, 40, 40), "accuracy", 0.95)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": 1}, "from 1 seed(s)"),
        ({"low": np.nan}, "no conclusion on accuracy"),
        ({"parts": 19}, "40 shared test pictures of 19 parts"),
    ],
)
def test_no_conclusion_from_one_seed_no_limits_or_few_parts(changes, said):
    found = verdict(Judged(**{"value": 0.02, "low": 0.01, "high": 0.03, "seeds": 3, "pictures": 40, "parts": 40} | changes),
                    "accuracy", 0.95)  # fmt: skip
    assert said in found
    assert "no conclusion" in found


def test_parts_are_counted_and_several_arms_share_the_doubt(study):
    write_all(group=lambda k: f"part{k // 4}")
    text = markdown(read_study(study), read_results(read_study(study)))
    assert "no conclusion on accuracy from 3 seed(s) and 40 shared test pictures of 10 parts" in text
    pictures = text[text.index("points, over pictures |") :]
    assert cells(pictures, "B")[-2:] == ["40", "10"]
    assert "at 95 %, so that 95 % hold" in text
    said = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump(said | {"arms": said["arms"] | {"C": {}}}))
    assert "at 97.5 %, so that 95 % hold for all 2 arms" in markdown(read_study(study), read_results(read_study(study)))


def test_what_one_generation_leaves_open_is_told(study):
    write_all()
    said = yaml.safe_load(study.read_text())
    steps: dict[str, Any] = {"base": {"config": "c.yaml"}, "made": {"config": "c.yaml", "options": {"m": "{base}"}}}
    said["arms"]["B"]["options"] = {"data.synthetic.path": "{made}/edited"}
    note = "the pictures of one generation, since {} ran once for all seeds"
    study.write_text(yaml.safe_dump(said | {"steps": steps}))
    text = markdown(read_study(study), read_results(read_study(study)))
    assert f"B: {note.format('base, made')}" in text
    steps = {name: {**step, "each_seed": True} for name, step in steps.items()}
    study.write_text(yaml.safe_dump(said | {"steps": steps}))
    assert "one generation" not in markdown(read_study(study), read_results(read_study(study)))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "chosen before the runs is written down nowhere"),
        ({"judged_by": "accuracy", "written": "2026-01-02T03:04:05"}, "at 2026-01-02T03:04:05, before the first"),
        ({"judged_by": "accuracy", "written": "2026-01-02T13:04:05"}, "some of these runs had begun (at 2026-01-02T12"),
        ({"judged_by": "auroc", "written": "2026-01-02T03:04:05"}, "although auroc was written down at 2026-01-02"),
    ],
)
def test_when_the_judge_was_chosen_is_told(study, told, said):
    (write_run("A", 0, []) / "run.json").write_text(json.dumps({"started": "2026-01-02T12:00:00"}))
    if told:
        Path("runs/toy").mkdir()
        Path("runs/toy/judged_by.json").write_text(json.dumps(told))
    assert said in markdown(read_study(study), read_results(read_study(study)))


def test_arms_without_hold_out_are_told(study):
    write_all(stage="mirrored")
    write_run("A", 0, [0])
    text = markdown(read_study(study), read_results(read_study(study)))
    assert "B (and edits) against A: no conclusion, since it has results on mirrored training pictures only" in text
    Path("runs/toy_A/s0/test_metrics.json").unlink()
    write_run("B", 1, [0])
    text = markdown(read_study(study), read_results(read_study(study)))
    assert "No conclusion: the baseline A has no results on the hold-out" in text
    write_run("A", 0, [0])
    text = markdown(read_study(study), read_results(read_study(study)))
    assert "none of its seeds has been tested in the baseline" in text


def test_near_duplicates_are_counted_and_left_out(study):
    for seed in range(3):
        write_run("A", seed, [0, 20], near=[0, 1, 2, 3])
    text = markdown(read_study(study), read_results(read_study(study)))
    line = cells(text, "A", 2)  # arms, figures, leakage
    assert line[:2] == ["40", "4"]
    assert line[2:] == ["95.0 ± 0.0", f"{100 * 35 / 36:.1f} ± 0.0"]


def test_mirrored_pictures_stand_beside_the_hold_out_and_conclude_nothing(study):
    write_all(stage="mirrored")
    results = read_results(read_study(study))
    text = markdown(read_study(study), results)
    assert "No conclusion: there is no hold-out" in text
    assert "There is no hold-out" in text
    write_all()
    for seed in range(3):
        write_run("A", seed, [0], stage="mirrored")
    text = markdown(read_study(study), read_results(read_study(study)))
    beside = text[text.index("mirrored less hold-out") :]
    assert cells(beside, "A")[1] == "97.5 ± 0.0"
    assert cells(beside, "A")[0] == "89.2 ± 1.4"


def test_the_papers_figures_are_the_papers():
    means = [np.mean(trials) for trials in ACCURACY.values()]
    assert [round(mean, 2) for mean in means] == [96.23, 97.51]
    assert round(means[1] - means[0], 2) == 1.28
    first = np.array(BEST[0].counts)
    assert round(100 * first.trace() / first.sum(), 2) == 96.81 == max(ACCURACY["CNN A, originals"])
    second = np.array(BEST[1].counts)
    good, defective = 149, 196  # of sets A and C, as the text counts them
    assert second.sum() == good + defective - 2
    assert round(100 * 340 / (good + defective), 2) == 98.55 == max(ACCURACY["CNN B, and generated"])
    assert first.sum(1).tolist() == [good, defective]  # NG first: swapped
    assert published_difference().startswith("+1.28 (+0.")


def test_the_papers_tables_have_ours_beside(study):
    write_all()
    write_all(stage="mirrored")
    text = markdown(read_study(study), read_results(read_study(study)))
    assert cells(text, "1")[:2] == ["96.52", "97.10"]
    assert cells(text, "1")[2:] == ["87.50", "95.00", "87.50", "95.00"]
    assert cells(text, "4")[2:] == ["-"] * 4
    assert "ours A, mirrored, seeds 0, 1, 2" in text
    assert "Ours on mirrored pictures stand beside them" in text
    for file in Path("runs").rglob("mirrored_metrics.json"):
        file.unlink()
    beside = markdown(read_study(study), read_results(read_study(study)))
    assert "Ours on mirrored pictures stand beside them" not in beside
    assert "Ours have no mirrored pictures: none of them compares with these figures" in beside
    assert "| true NG (149) | 143 | 6 |" in text
    assert "| ours, best A, seed 1, hold-out | called good (22) | called defective (18) |" in text
    assert "| true defective (20) | 3 | 17 |" in text


def test_the_papers_table_has_no_accuracy_below_none(study):
    for seed, wrong in enumerate((30, 0)):
        write_run("A", seed, range(wrong))
        write_run("B", seed, [5])
    text = markdown(read_study(study), read_results(read_study(study)))
    assert cells(text, "95 % interval")[2:] == ["0.00 to 100.00", "-"]


def test_arms_name_the_options_of_their_runs(study):
    write_all()
    for arm, synthetic in (("A", None), ("B", "made/edited")):
        for seed in range(3):
            config = {"model": {"init_args": {"lr": 0.1 if arm == "A" or seed else 0.2}}, "seed_everything": seed}
            config["data"] = {"init_args": {"synthetic": synthetic, "batch_size": 8}}
            Path(f"runs/toy_{arm}/s{seed}/config.yaml").write_text(yaml.safe_dump(config))
    said = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump(said | {"arms": said["arms"] | {"C": {"options": {"lr": 5}}}}))
    text = markdown(read_study(study), read_results(read_study(study)))
    own = "`--model.lr 0.1 --data.synthetic None`"
    assert cells(text, "A") == ["originals", "c.yaml", own, "good 7, defective 3", "-"]
    assert cells(text, "B")[2:] == [
        "`--model.lr 0.2 or 0.1 --data.synthetic made/edited`",
        "good 7, defective 3",
        "crack 2 by StableDiffusionEditor",
    ]
    assert cells(text, "C")[2] == "no run yet"


def test_a_file_that_says_otherwise_by_now_is_told(study, monkeypatch):
    write_all()
    for arm, runs in WRONG.items():
        for seed in range(len(runs)):
            write_json(Path(f"runs/toy_{arm}/s{seed}/run.json"), {"status": "finished"})
            Path(f"runs/toy_{arm}/s{seed}/config.yaml").write_text("lr: 1")
    monkeypatch.setattr(
        study_alike, "parsed", lambda commands: {name: {"lr": 1 + (name[0] == "B")} for name in commands}
    )
    said = read_study(study)
    (note,) = study_alike.changed_since(said, read_results(said))
    assert note == "**B: its runs were made with other options than the file has now: lr: 1 -> 2.**"
    assert note in markdown(said, read_results(said), [note])
    main([str(study), "--report"])
    assert note in Path("runs/toy/report.md").read_text()


def test_runs_on_other_machines_or_data_are_told(study):
    write_all()
    for seed in range(3):
        folder = Path(f"runs/toy_B/s{seed}")
        write_json(folder / "run.json", {"devices": 1 + (seed == 2)})
        (folder / "config.yaml").write_text(
            f"data: {{init_args: {{root: data{min(seed, 1)}}}}}\ntrainer: {{num_nodes: 1}}"
        )
    text = markdown(read_study(study), read_results(read_study(study)))
    assert "B: its runs differ in devices (1: s0, s1; 2: s2)" in text
    assert "B: its runs differ in data.root (data0: s0; data1: s1, s2)" in text
    assert "differ in nodes" not in text
    assert "A: its runs" not in text


def test_the_program_writes_report_tables_and_picture(study, capsys):
    write_all()
    assert main([str(study), "--report"]) == 0
    folder = Path("runs/toy")
    assert str(folder / "report.md") in capsys.readouterr().out
    assert (folder / "arms.png").stat().st_size > 10_000
    with (folder / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert float(rows[0]["accuracy"]) == pytest.approx(0.875)
    with (folder / "figures.csv").open(newline="") as file:
        lines = {(row["configuration"], row["figure"]): row for row in csv.DictReader(file)}
    assert float(lines["B less A, over seeds", "accuracy"]["mean"]) == pytest.approx(7 / 120)
    assert float(lines["B less A, over pictures", "accuracy"]["mean"]) == pytest.approx(7 / 120)


def test_files_that_are_missing_beside_the_metrics_are_named(study):
    folder = write_run("A", 0, [])
    whole = (folder / "test_predictions.csv").read_text()
    (folder / "test_predictions.csv").write_text("".join(whole.splitlines(True)[:-3]))
    with pytest.raises(UserError, match=r"test_predictions\.csv has 37 pictures, .*test_metrics\.json 40"):
        read_results(read_study(study))
    (folder / "test_predictions.csv").unlink()
    with pytest.raises(UserError, match=r"test_predictions\.csv has 0 pictures"):
        read_results(read_study(study))
    (folder / "test_predictions.csv").write_text(whole)
    (folder / "splits.csv").unlink()
    with pytest.raises(UserError, match=r"splits\.csv is missing"):
        read_results(read_study(study))


def test_an_output_that_can_be_no_folder(study, capsys):
    write_run("A", 0, [])
    (Path("runs/toy")).write_text("")
    assert main([str(study), "--report"]) == 2
    assert "runs/toy" in capsys.readouterr().err


def test_what_cannot_be_reported_is_said(study, capsys):
    assert main([str(study), "--report"]) == 2
    assert "no tested run here yet" in capsys.readouterr().err
    folder = write_run("A", 0, [])
    (folder / "test_metrics.json").write_text('{"methods": {}}')
    with pytest.raises(UserError, match="does not hold the metrics of a classifier"):
        read_results(read_study(study))


def test_the_report_shows_what_the_steps_have_made(study, capsys):
    said = yaml.safe_load(study.read_text())
    said["steps"] = {"made": {"verb": "predict", "config": "c.yaml"}, "base": {"config": "c.yaml"}}
    study.write_text(yaml.safe_dump(said))
    for arm in "AB":
        for seed in range(3):
            write_run(arm, seed, [seed])
    assert main([str(study), "--report"]) == 0
    assert "What was made" not in Path("runs/toy/report.md").read_text()
    sheet = Path("runs/toy_made/s0/figures/edits.png")
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes(b"a sheet")
    assert main([str(study), "--report"]) == 0
    assert "![made](made.png)" in Path("runs/toy/report.md").read_text()
    assert Path("runs/toy/made.png").read_bytes() == b"a sheet"
