"""The verb `report` as a whole: what it writes of 1, 200 and 1,000 runs, without torch."""

import csv
import json
import math
import subprocess
import sys
import time

import pytest

from lit_defect import report
from lit_defect.errors import UserError
from lit_defect.report import wandb_report
from lit_defect.report.blocks import Column, Details, Intervals, Parallel, Pictures, Table, Text
from lit_defect.report.contents import build
from lit_defect.report.latex import latex
from lit_defect.report.matter import Asked, gather
from lit_defect.report.sweeps import read_sweep
from lit_defect.report.tables import all_tables, csv_text, file_name, markdown, write_tables
from tests.run_folders import make_run, make_sweep

_ODD = r"50% & more_#1 {x} \y ~ ^ $1 <b>é</b> ±|`"


@pytest.fixture
def two_arms(tmp_path):
    for seed in range(3):
        make_run(tmp_path / "runs", "elpv_a", seed, accuracy=0.7 + 0.01 * seed)
        make_run(tmp_path / "runs", "elpv_b", seed, accuracy=0.8 - 0.01 * seed, lr=0.1)
    return tmp_path / "runs"


def _blocks(blocks):
    for block in blocks:
        yield block
        if isinstance(block, Details):
            yield from _blocks(block.blocks)


def _table(built, name):
    return next(table for table in all_tables(built) if table.name == name)


def test_sections_stand_in_the_order_in_which_they_are_read(two_arms):
    built = build(gather(Asked(runs=[two_arms], question="Does it help?")))
    assert [section.title for section in built.sections] == [
        "Question", "What it comes to", "Protocol", "Data and leakage", "Results", "Curves",
        "By class and type of defect", "Time and memory", "Runs", "Configurations, and how to repeat each run",
    ]  # fmt: skip
    assert built.sections[0].blocks[0] == Text("Does it help?")
    assert built.title == "elpv"
    names = [table.name for table in all_tables(built)]
    assert len(set(names)) == len(names)


def test_a_table_of_every_figure_holds_the_numbers(two_arms):
    table = _table(build(gather(Asked(runs=[two_arms]))), "figures")
    row = next(row for row in table.rows if row[:2] == ["a", "accuracy"])
    assert row[2:4] == pytest.approx([0.71, 0.01])
    assert row[4:6] == pytest.approx([0.71 - 4.30265 * 0.01 / 3**0.5, 0.71 + 4.30265 * 0.01 / 3**0.5], rel=1e-5)
    assert row[6] == 3


def test_leakage_and_commands_are_told(two_arms):
    built = build(gather(Asked(runs=[two_arms], metrics=["accuracy"])))
    row = _table(built, "leakage").rows[0]
    assert row[:2] == ["a", 1]
    assert row[3] - row[2] == pytest.approx(-0.01)
    assert "python -m lit_defect fit --experiment elpv_a" in str(built.sections[-1])


def test_columns_without_anything_and_what_all_arms_share_are_no_columns(two_arms):
    built = build(gather(Asked(runs=[two_arms])))
    assert "what went wrong" not in [column.name for column in _table(built, "runs").columns]
    assert "The same for all 2 arms: task DefectClassifier; data ELPV;" in str(built)
    assert "arms" not in [table.name for table in all_tables(built)]
    make_run(two_arms, "elpv_b", 7, lr=0.1)
    assert [column.name for column in _table(build(gather(Asked(runs=[two_arms]))), "arms").columns] == [
        "arm", "seeds", "runs"
    ]  # fmt: skip


def test_failed_and_unfinished_runs_are_listed_with_the_first_line_of_their_error(two_arms):
    make_run(two_arms, "elpv_b", 7, lr=0.1, status="failed", error="ValueError: bad\nsecond line", evaluated=False)
    built = build(gather(Asked(runs=[two_arms])))
    row = next(row for row in _table(built, "runs").rows if row[0] == "elpv_b/s7")
    assert row[2] == "failed"
    assert row[-1] == "ValueError: bad"
    assert "1 runs have not finished; 0 of them have results" in str(built)


def test_examples_stand_side_by_side_and_can_be_left_out(two_arms):
    for arm in ("a", "b"):
        figures = two_arms / f"elpv_{arm}" / "s0" / "figures"
        figures.mkdir()
        for name in ("test_mistakes", "test_roc", "mirrored_mistakes"):
            (figures / f"{name}.png").write_bytes(b"")
    built = build(gather(Asked(runs=[two_arms])))
    shown = [block for section in built.sections for block in _blocks(section.blocks) if isinstance(block, Pictures)]
    assert [(block.caption, len(block.pictures)) for block in shown] == [("test mistakes", 2)]
    without = build(gather(Asked(runs=[two_arms], pictures=False)))
    assert "Examples" not in [section.title for section in without.sections]


def _text(built):
    return str(built.sections)


def test_a_single_run_has_no_interval_over_seeds_and_none_is_told_of(tmp_path):
    make_run(tmp_path, "one", 0)
    built = build(gather(Asked(runs=[tmp_path])))
    assert "tandard deviation over seeds" not in _text(built)
    assert "An interval tells" not in _text(built)
    assert _table(built, "results").caption.startswith("Values of single runs")
    make_run(tmp_path, "two", 0)
    alone = _text(build(gather(Asked(runs=[tmp_path]))))
    assert "AUROC of single runs" in alone
    assert "p-values of the paired t test" not in alone
    make_run(tmp_path, "other", 0)
    make_run(tmp_path, "other", 1)
    built = build(gather(Asked(runs=[tmp_path])))
    assert "tandard deviation over seeds" in _text(built)
    charts = [block for section in built.sections for block in _blocks(section.blocks) if isinstance(block, Intervals)]
    one = next(line for chart in charts for line in chart.intervals if line.name == "one")
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert "(one, one seed)" in built.summary


def test_what_is_judged_by_is_explained_and_counted(two_arms):
    text = _text(build(gather(Asked(runs=[two_arms]))))
    assert "Judged by AUROC (chance that a defective one scores higher" in text
    assert "on 40 test pictures." in text


def test_a_run_is_a_row_with_all_figures(two_arms):
    table = _table(build(gather(Asked(runs=[two_arms]))), "runs")
    names = [column.name for column in table.columns]
    assert {"AUROC", "accuracy", "balanced accuracy"} <= set(names)
    assert [row[names.index("accuracy")] for row in table.rows] == pytest.approx([0.7, 0.71, 0.72, 0.8, 0.79, 0.78])


def test_of_leakage_nothing_is_shown_where_nothing_was_looked_for(two_arms):
    for file in two_arms.rglob("leakage.csv"):
        file.unlink()
    built = build(gather(Asked(runs=[two_arms])))
    assert "leakage" not in [table.name for table in all_tables(built)]
    assert "Near-duplicates were not looked for (no `leakage.csv`)." in _text(built)


def test_different_tests_of_arms_are_no_chance_of_the_split(two_arms):
    splits = two_arms / "elpv_a" / "s0" / "splits.csv"
    whole = splits.read_bytes()
    splits.write_text("name,split\nhalf")
    assert "The runs were tested on the same 40 pictures; of 1 it is not known" in _text(
        build(gather(Asked(runs=[two_arms])))
    )
    splits.write_bytes(whole)
    make_run(two_arms, "elpv_c", 0, tested=30)
    assert "2 different sets of tested pictures, of 30 to 40: only runs" in _text(build(gather(Asked(runs=[two_arms]))))
    make_run(two_arms, "elpv_c", 1, tested=20)
    assert "hold the chance of the split, too, and only runs" in _text(build(gather(Asked(runs=[two_arms]))))


def test_arms_without_any_figure_of_the_report_have_no_row_in_its_table(two_arms):
    folder = make_run(two_arms, "elpv_c", 0)
    (folder / "test_metrics.json").write_text(json.dumps({"refined": {"iou": {"value": 0.5}}}))
    table = _table(build(gather(Asked(runs=[two_arms]))), "results")
    assert [row[0] for row in table.rows] == ["a", "b"]


def test_mixtures_are_named_in_the_first_sentence(two_arms):
    both = build(gather(Asked(runs=[two_arms], group_by=["trainer.max_epochs"])))
    assert "mix runs that differ in more than seeds" in both.summary
    make_run(two_arms, "elpv_c", 0, category="screw")
    assert "on 2 data sets, whose figures do not compare" in build(gather(Asked(runs=[two_arms]))).summary


def test_runs_without_results_are_told_by_what_they_have_logged(tmp_path):
    make_run(tmp_path, "generator", 0, evaluated=False)
    built = build(gather(Asked(runs=[tmp_path])))
    assert "training logs and no results" in built.summary


def test_trials_that_are_not_tested_are_judged_by_their_sweep(tmp_path):
    """Not by the training loss, and not one against the other."""
    folder = make_sweep(tmp_path)
    runs = [make_run(tmp_path, f"trial{k}", seed, evaluated=False) for k in range(2) for seed in range(2)]
    said = json.loads((folder / "sweep.json").read_text())
    said["trials"][0]["runs"] = [str(run.relative_to(tmp_path)) for run in runs]
    said["metric"]["name"] = "val/loss"
    (folder / "sweep.json").write_text(json.dumps(said))
    matter = gather(Asked(sweep=folder))
    assert matter.judged == "val/loss"
    built = build(matter)
    assert built.summary.startswith("Sweep search: best of 5 complete trials")
    assert [section.title for section in built.sections][:2] == ["Sweep search", "Protocol"]


def test_a_sweep_is_read_from_its_file_alone(tmp_path):
    folder = make_sweep(tmp_path)
    built = build(gather(Asked(sweep=folder)))
    assert built.title == "search"
    assert "trial 3" in built.summary
    section = built.sections[-1]
    lines = next(block for block in section.blocks if isinstance(block, Parallel))
    assert list(lines.axes) == ["model.lr", "model.augment", "val/auroc"]
    assert lines.log == ["model.lr"]
    assert len(lines.lines) == 5
    rows = _table(built, "trials_search").rows
    assert [row[0] for row in rows] == [3, 2, 1, 0, 4, 5]  # best first, equal ones by number, failed last
    assert [sweep.name for sweep in gather(Asked(runs=[tmp_path])).sweeps] == ["search"]
    with pytest.raises(UserError, match=r"no sweep.json here"):
        read_sweep(tmp_path)
    (folder / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match="is not what the verb `sweep` writes"):
        read_sweep(folder)


def test_trials_of_a_sweep_are_not_held_against_one_another_as_arms(tmp_path):
    folder = make_sweep(tmp_path)
    for number in range(2):
        for seed in range(2):
            lr = 0.123456789 + number
            make_run(tmp_path, "tuned", seed, lr=lr, evaluated=False, run_id=f"search-t{number}-s{seed}")
    built = build(gather(Asked(runs=[tmp_path])))
    assert built.title == "search"
    assert built.summary.startswith("Sweep search: best of")
    assert "Against" not in built.summary
    assert [section.title for section in built.sections][:2] == ["Sweep search", "Protocol"]
    assert [row[0] for row in _table(built, "results").rows] == ["lr=0.123457", "lr=1.12346"]
    make_run(tmp_path, "other", 0)
    assert "Question" in [section.title for section in build(gather(Asked(runs=[tmp_path]))).sections]
    assert folder.is_dir()


def test_names_of_arms_may_hold_anything(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "ζ日本 %_&#", seed, augment=_ODD)
        make_run(tmp_path, "ζ日本 <script>", seed)
    built = build(gather(Asked(runs=[tmp_path])))
    for table in all_tables(built):
        assert latex(table, "x").count(r"\\") >= len(table.rows)
        assert "<script>" not in markdown(table)
    files = write_tables(built, tmp_path / "tables")
    assert all(file.name.isascii() for file in files)


def test_csv_has_all_digits():
    table = Table(
        "t", [Column("arm"), Column("x", 2), Column("y")], [("a", 0.123456789, "0.5 ± 0.1"), ("b", None, "-")]
    )
    assert csv_text(table).splitlines() == ["arm,x,y", "a,0.12345679,0.5 ± 0.1", "b,,-"]
    assert file_name("trials ζ/..") == "trials"


def test_the_wandb_report_is_valid_and_holds_tables_and_curves(two_arms, tmp_path):
    built = build(gather(Asked(runs=[two_arms])))
    made = wandb_report.build(built, ["elpv_a", "elpv_b"])
    file = wandb_report.write_specification(made, tmp_path / "spec.json")
    said = json.loads(file.read_text())
    blocks = said["spec"]["blocks"]
    headings = [block["children"][0]["text"] for block in blocks if block["type"] == "heading" and block["level"] == 2]
    assert headings == [section.title for section in built.sections]
    grid = next(block for block in blocks if block["type"] == "panel-grid")["metadata"]
    panels = grid["panelBankSectionConfig"]["panels"]
    assert [panel["config"]["metrics"] for panel in panels] == [["train/loss"], ["val/loss"]]
    assert {panel["config"]["xAxis"] for panel in panels} == {"trainer/global_step"}
    assert grid["runSets"][0]["filters"]["filters"][0]["value"] == ["elpv_a", "elpv_b"]
    assert "| a | 3 |" in file.read_text()


def test_the_coordinates_of_a_sweep_on_wandb_are_options_as_its_runs_have_them(tmp_path):
    folder = make_sweep(tmp_path)
    run = make_run(tmp_path, "trial", 0)
    sweep = json.loads((folder / "sweep.json").read_text().replace("model.init_args.", "model."))  # as typed
    sweep["trials"][0]["runs"] = [str(run.relative_to(tmp_path))]
    (folder / "sweep.json").write_text(json.dumps(sweep))
    said = wandb_report.specification(wandb_report.build(build(gather(Asked(sweep=folder))), []))
    panels = [
        panel
        for block in said["spec"]["blocks"]
        if block["type"] == "panel-grid"
        for panel in block["metadata"]["panelBankSectionConfig"]["panels"]
    ]
    columns = next(panel["config"]["columns"] for panel in panels if "columns" in panel["config"])
    assert [column["accessor"] for column in columns] == [
        "config:model.value.init_args.lr", "config:model.value.init_args.augment", "summary:val/auroc"
    ]  # fmt: skip
    assert [column["log"] for column in columns] == [True, False, False]


def test_a_broken_specification_is_noticed(two_arms):
    said = wandb_report.specification(wandb_report.build(build(gather(Asked(runs=[two_arms]))), []))
    wandb_report.validate(said)
    next(block for block in said["spec"]["blocks"] if block["type"] == "heading")["children"] = None
    with pytest.raises(ValueError, match="heading"):
        wandb_report.validate(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no runs; give run folders"),
        (["nowhere"], "nowhere: no such folder"),
        (["RUNS", "--metric", "acuracy"], "--metric acuracy: no run has it; did you mean accuracy?"),
        (["RUNS", "--stage", "val"], "--stage val: no run has val_metrics.json; there is: test"),
        (["RUNS", "--filter", "seed=9"], "no run is left"),
        (["RUNS", "--group-by", "model.lrr"], "did you mean model.lr?"),
        (["RUNS", "--compare", "a", "c"], "--compare c: no such arm"),
        (["RUNS", "--colour"], "unrecognized arguments: --colour"),
        (["--sweep", "RUNS"], "no sweep.json here"),
    ],
)
def test_mistakes_are_told_in_a_line(two_arms, tmp_path, capsys, words, message):
    words = [str(two_arms) if word == "RUNS" else word for word in words]
    assert report.main([*words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_verb_writes_all_three(two_arms, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lit_defect.tracking_login.logged_in", lambda: False)
    out = tmp_path / "out"
    assert report.main([str(two_arms), "-o", str(out), "--compare", "b", "a", "--title", "Über <x>"]) == 0
    said = capsys.readouterr().out
    assert "not published" in said
    page = (out / "report.html").read_text()
    assert "Über &lt;x&gt;" in page
    with (out / "tables" / "results.csv").open() as lines:
        assert [row["arm"] for row in csv.DictReader(lines)] == ["a", "b"]
    assert (out / "wandb_report.json").is_file()


def test_the_verb_imports_no_torch(two_arms, tmp_path):
    code = (
        "import sys; from lit_defect.report import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print([name for name in ('torch', 'lightning', 'wandb', 'torchvision', 'pandas') if name in sys.modules])"
    )
    words = [str(two_arms), "-o", str(tmp_path / "out"), "--wandb", "off"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_is_there_at_once():
    code = (
        "import sys; from lit_defect.report import main\ntry: main(['--help'])\nfinally: print('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "False"
    assert "--group-by" in done.stdout


@pytest.mark.parametrize(("experiments", "seeds"), [(1, 1), (40, 5), (200, 5)])
def test_many_runs_are_quick_and_stay_readable(tmp_path, experiments, seeds):
    for number in range(experiments):
        for seed in range(seeds):
            make_run(tmp_path, f"exp_{number:03d}", seed, lr=0.001 * (number + 1), accuracy=0.5 + 0.4 * seed / 5)
    start = time.perf_counter()
    built = build(gather(Asked(runs=[tmp_path])))
    assert time.perf_counter() - start < 60  # seconds on one core that others share; some two of them when alone
    assert len(_table(built, "runs").rows) == experiments * seeds
    assert len(built.summary) < 800
    paragraphs = [b for section in built.sections for b in section.blocks if isinstance(b, Text)]
    assert len(paragraphs) < 50
    if experiments > 30:
        assert "the best 32 of" in str(built)
        assert "The first 32 of" in str(built)
    if seeds == 1:
        assert "a single run does not tell what another seed would have given" in str(built)
