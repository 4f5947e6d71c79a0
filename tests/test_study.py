"""Studies: what their files may say, the jobs that follow, and how they are run, resumed and spread over a cluster."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_defect import study as program
from lit_defect import study_plan
from lit_defect.errors import UserError
from lit_defect.runs import RunFolder, write_json
from lit_defect.study import main
from lit_defect.study_check import parsed
from lit_defect.study_file import read_study
from lit_defect.study_plan import plan
from tests.fakes import make_mvtec
from tests.sweeping import until

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
STUDIES = [file for file in sorted(EXPERIMENTS.rglob("*.yaml")) if "study" in yaml.safe_load(file.read_text())]
BASIC: dict[str, Any] = {
    "study": "toy",
    "seeds": [0, 1],
    "config": "tiny.yaml",
    "options": {"trainer.max_epochs": 2},
    "steps": {
        "base": {"config": "tiny.yaml"},
        "edits": {"verb": "predict", "config": "tiny.yaml", "options": {"model.base": "{base}", "p": "a {type}"}},
    },
    "arms": {"A": {"title": "originals"}, "B": {"options": {"data.synthetic.path": "{edits}/edited"}}},
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a study like `BASIC` with other entries (None removes one), in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text("experiment: tiny\n")

    def file(**entries: Any) -> Path:
        said = {key: value for key, value in (BASIC | entries).items() if value is not None}
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(said, sort_keys=False))
        return path

    return file


def jobs(file: Path) -> dict[str, study_plan.Job]:
    return {job.name: job for job in plan(read_study(file))}


# --- the file and its jobs ---


def test_jobs_come_in_the_order_in_which_they_can_run(write):
    found = jobs(write())
    assert list(found) == ["base", "A/s0", "A/s1", "edits", "B/s0", "B/s1"]
    assert [job.stage for job in found.values()] == [0, 0, 0, 1, 2, 2]
    assert found["B/s1"].needs == ("edits",)
    assert found["edits"].needs == ("base",)


def test_commands_name_seed_folder_and_the_steps_that_they_build_upon(write):
    found = jobs(write())
    assert found["B/s1"].command[1:] == shlex.split(
        "-m lit_defect fit --config tiny.yaml --seed_everything 1 --runs_dir runs --experiment toy_B --run_id s1 "
        "--resume --test_after_fit true --trainer.max_epochs 2 --data.synthetic.path runs/toy_edits/s0/edited"
    )
    edits = found["edits"].command
    assert edits[3] == "predict"
    assert "--resume" not in edits
    assert edits[-4:] == ["--model.base", "runs/toy_base/s0", "--p", "a {type}"]  # not ours to fill in


def test_values_are_written_as_the_command_line_reads_them(write):
    arms = {
        "A": {"options": {"a": None, "b": True, "c": [1, "x"], "d": "off", "e": "{seed}", "f": {"class_path": "X"}}}
    }
    words = jobs(write(arms=arms, steps=None))["A/s1"].words
    told = words[words.index("--a") :]
    assert told == (
        "--a",
        "null",
        "--b",
        "true",
        "--c",
        '[1, "x"]',
        "--d",
        "off",
        "--e",
        "1",
        "--f",
        '{"class_path": "X"}',
    )


def test_an_arm_overrules_what_is_told_to_all(write):
    words = jobs(write(arms={"A": {"options": {"trainer.max_epochs": 9}}}, steps=None))["A/s0"].words
    assert words.count("--trainer.max_epochs") == 1
    assert words[-1] == "9"


def test_steps_for_each_seed_belong_to_the_runs_of_that_seed(write):
    steps = {
        "base": {"config": "tiny.yaml", "each_seed": True},
        "edits": {"verb": "predict", "of": "base", "config": "tiny.yaml", "each_seed": True},
    }
    found = jobs(write(steps=steps))
    assert found["B/s1"].needs == ("edits/s1",)
    assert found["edits/s1"].needs == ("base/s1",)
    assert found["edits/s1"].run == found["base/s1"].run  # a predict with a run's state writes into its folder
    assert found["edits/s1"].words[-2:] == ("--ckpt_path", "best")
    assert "runs/toy_base/s1/edited" in found["B/s1"].words


def test_a_shared_step_has_an_experiment_of_its_own(write):
    steps = {"base": {"config": "tiny.yaml", "experiment": "base_tiles", "seed": 4}}
    arms = {"A": {"options": {"x": "{base}"}}}
    assert str(jobs(write(steps=steps, arms=arms))["base"].run.path) == "runs/base_tiles/s4"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"sedes": [1]}, "sedes is unknown; did you mean seeds"),
        ({"seeds": [0, 0]}, "seeds is .*different whole numbers"),
        ({"seeds": None}, "seeds is needed"),
        ({"study": "a/b"}, "plain name"),
        ({"baseline": "C"}, "baseline is C, which is no arm"),
        ({"judged_by": "luck"}, "judged_by is luck"),
        ({"paper": "other"}, "paper is other; known are zheng_nagata"),
        ({"mirrored": "maybe"}, "expected true or false"),
        ({"config": "gone.yaml"}, "no such file"),
        ({"config": None}, "arms.A.config is needed"),
        ({"arms": {"A": {"option": {}}}}, "arms.A.option is unknown; did you mean options"),
        ({"arms": {"A": {"needs": ["edit"]}}}, "needs edit, which is no step; did you mean edits"),
        ({"arms": {"A": {"options": {"x": "{edit}/edited"}}}}, r"names \{edit\}/.*did you mean edits"),
        ({"arms": {"A": {"options": {"run_id": "x"}}}}, "run_id is set by the study itself"),
        ({"arms": {"A": {"options": {"--x": 1}}}}, "without the leading dashes"),
        ({"arms": {"edits": {}}}, "has the name of a step"),
        ({"steps": {"a": {"config": "tiny.yaml", "verb": "test"}}}, "expected fit or predict"),
        ({"steps": {"a": {"config": "tiny.yaml", "of": "a"}}}, "is for a predict"),
        (
            {
                "steps": {
                    "a": {"config": "tiny.yaml", "needs": ["b"]},
                    "b": {"config": "tiny.yaml", "options": {"x": "{a}"}},
                },
                "arms": {"A": {}},
            },
            "circle: a -> b -> a",
        ),
        (
            {
                "steps": {
                    "a": {"config": "tiny.yaml", "each_seed": True},
                    "b": {"config": "tiny.yaml", "needs": ["a"]},
                },
                "arms": {"A": {}},
            },
            "needs a, which has a run for each seed",
        ),
        ({"steps": {"a": {"config": "tiny.yaml", "seed": "abc"}}}, "steps.a.seed is abc: expected a whole number"),
        ({"arms": {"A": {"needs": 5}}}, "arms.A.needs is 5: expected names of steps"),
        ({"steps": {"a": {"config": "tiny.yaml", "verb": "predict", "of": "b"}, "b": "x"}}, "steps.b is no mapping"),
        ({"arms": {"A": {"options": {"x": date(2026, 1, 2)}}}}, "arms.A.options.x is 2026-01-02.*into quotes"),
        ({"steps": {"type": {"config": "tiny.yaml"}}}, "steps.type needs a name .*none of seed, category, type, cap"),
        ({"steps": {"caption": {"config": "tiny.yaml"}}}, "steps.caption needs a name"),
    ],
)
def test_mistakes_in_the_file_are_named(write, entries, message):
    with pytest.raises(UserError, match=message):
        plan(read_study(write(**entries)))


def test_a_file_that_is_none(write, tmp_path):
    with pytest.raises(UserError, match=r"gone\.yaml.*a study's file is needed"):
        read_study(tmp_path / "gone.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(UserError, match="is no YAML"):
        read_study(broken)
    broken.write_bytes("question: größer".encode("latin-1"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_study(broken)
    broken.write_text("study: toy\narms:\n  A: {title: a}\n  A: {title: b}\n")
    with pytest.raises(UserError, match=r"A stands twice[^$]*line 4"):
        read_study(broken)
    broken.write_text("study: toy\nx: &x {title: a}\narms:\n  A: {<<: *x, title: b}\n")
    with pytest.raises(UserError, match="x is unknown"):  # what is merged may be overruled
        read_study(broken)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"x": {"config": "tiny.yaml", "experiment": "toy_A"}}, "x and A/s0 would both write runs/toy_A/s0"),
        (
            {"x": {"config": "tiny.yaml"}, "y": {"verb": "predict", "config": "tiny.yaml", "experiment": "toy_x"}},
            "x and y would both write",
        ),
        (
            {
                "y": {"verb": "predict", "of": "x", "config": "tiny.yaml"},
                "x": {"config": "tiny.yaml"},
                "z": {"verb": "predict", "of": "x", "config": "tiny.yaml"},
            },
            "y and z would both write",
        ),
    ],
)
def test_no_two_jobs_write_one_folder(write, steps, message):
    with pytest.raises(UserError, match=message):
        jobs(write(steps=steps, arms={"A": {}}))


def test_a_predict_may_stand_before_its_fit(write):
    steps = {"y": {"verb": "predict", "of": "x", "config": "tiny.yaml"}, "x": {"config": "tiny.yaml"}}
    found = jobs(write(steps=steps, arms={"A": {}}))
    assert found["y"].run == found["x"].run


# --- running: commands are played by a quick program that leaves what the real one leaves ---

PLAY = """
import json, sys
from pathlib import Path
verb, words = sys.argv[1], sys.argv[2:]
told = dict(zip(words, words[1:]))
run = Path(told["--runs_dir"]) / told["--experiment"] / told["--run_id"]
run.mkdir(parents=True, exist_ok=True)
with open("calls.txt", "a") as file:
    print(verb, run.parent.name, run.name, told.get("--data.test", ""), file=file)
if told["--experiment"] in Path("failing.txt").read_text().split():
    print("out of luck")
    sys.exit(3)
if verb == "fit":
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    (run / "config.yaml").write_text("lr: 1")
if verb == "test" or "--test_after_fit" in told:
    name = "mirrored" if "--data.test" in told else "test"
    (run / f"{name}_metrics.json").write_text("{}")
"""


@pytest.fixture
def play(write, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs a study with arguments; gives the calls that were made. `failing.txt` names experiments that fail."""
    Path("play.py").write_text(PLAY)
    Path("failing.txt").write_text("")
    monkeypatch.setattr(study_plan.Job, "line", staticmethod(lambda *words: [sys.executable, "play.py", *words]))
    monkeypatch.setattr(program, "parsed", lambda commands: {name: {"lr": 1} for name in commands})
    monkeypatch.setattr(program, "_report", lambda study, checked: None)

    def run(file: Path, *arguments: str, status: int = 0) -> list[str]:
        Path("calls.txt").write_text("")
        assert main([str(file), *arguments]) == status
        return [line.strip() for line in Path("calls.txt").read_text().splitlines()]

    return run


def test_everything_runs_once_and_what_is_finished_is_skipped(write, play, capsys):
    file = write()
    calls = play(file)
    assert calls == [
        "fit toy_base s0",
        "fit toy_A s0",
        "fit toy_A s1",
        "predict toy_edits s0",
        "fit toy_B s0",
        "fit toy_B s1",
    ]
    assert play(file) == []
    assert "[6/6] B/s1: finished before" in capsys.readouterr().out


def test_what_judges_is_written_down_before_the_first_run_and_never_again(write, play):
    Path("failing.txt").write_text("toy_base toy_A")
    play(write(judged_by="auroc"), status=1)
    written = Path("runs/toy/judged_by.json")
    assert json.loads(written.read_text())["judged_by"] == "auroc"
    play(write(judged_by="accuracy"), status=1)
    assert json.loads(written.read_text())["judged_by"] == "auroc"


def test_an_unfinished_run_goes_on_and_an_untested_one_is_tested(write, play):
    file = write()
    play(file)
    write_json(Path("runs/toy_A/s1/run.json"), {"status": "interrupted"})
    Path("runs/toy_B/s0/test_metrics.json").unlink()
    assert play(file) == ["fit toy_A s1", "test toy_B s0"]


def test_mirrored_pictures_are_tested_beside_the_hold_out(write, play):
    file = write(mirrored=True, steps=None, arms={"A": {}})
    assert play(file)[:2] == ["fit toy_A s0", "test toy_A s0 mirrored_train"]
    assert play(file) == []
    run = RunFolder(Path("runs/toy_A/s0"))
    (run.path / "mirrored_metrics.json").unlink()
    (run.path / "config.yaml").write_text("data: {init_args: {leakage: error}}")
    (command,) = jobs(file)["A/s0"].test_commands()
    own_split = ["--data.split_file", "runs/toy_A/s0/splits.csv"]  # else what is held out would count as training
    assert command[-6:] == ["--data.test", "mirrored_train", *own_split, "--data.leakage", "warn"]
    (run.path / "config.yaml").write_text("data: {init_args: {shots: 5}}")
    (command,) = jobs(file)["A/s0"].test_commands()
    assert command[-4:] == [*own_split, "--data.shots", "null"]  # which a split file excludes
    (run.path / "config.yaml").write_text("data: {init_args: {test: mirrored_train}}")  # its own protocol
    assert len(jobs(file)["A/s0"].test_commands()) == 1
    assert "mirrored_train" not in jobs(file)["A/s0"].test_commands()[0]


def test_a_failure_stops_only_what_needs_it(write, play, capsys):
    Path("failing.txt").write_text("toy_edits")
    calls = play(write(), status=1)
    assert calls[-1] == "predict toy_edits s0"
    assert "fit toy_A s1" in calls
    said = capsys.readouterr().out
    assert "edits: FAILED, exit status 3" in said
    assert "toy/logs/edits.log" in said
    assert "| out of luck" in said
    assert "B/s0: left out, since it needs edits" in said


def test_one_job_one_stage_one_arm_one_seed(write, play, capsys):
    file = write()
    assert play(file, "--job", "3", status=1) == []  # its base is not there yet
    assert play(file, "--job", "0") == ["fit toy_base s0"]
    assert play(file, "--stage", "1") == ["predict toy_edits s0"]
    assert play(file, "--only", "B", "--seeds", "1") == ["fit toy_B s1"]
    assert play(file, "--job", "9", status=2) == []
    assert play(file, "--job", "0", "--only", "A", status=2) == []
    assert play(file, "--job", "0", "--seeds", "1", status=2) == []
    assert play(file, "--only", "Q", status=2) == []
    assert play(file, "--seeds", "7", status=2) == []
    assert "the arms are A, B" in capsys.readouterr().err
    assert play(file, "--report", "--only", "A", status=2) == []
    assert "--report is of the whole study" in capsys.readouterr().err
    assert play(file, "--options", "--note 'a", status=2) == []
    assert "error: --options --note 'a: no closing quotation" in capsys.readouterr().err


def test_the_list_tells_the_numbers_of_a_stage(write, play, capsys):
    file = write()
    play(file, "--job", "0")
    capsys.readouterr()
    assert play(file, "--list") == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["0", "stage", "0", "base", "finished"]
    assert lines[-3:] == ["stage 0: --array=0-2", "stage 1: --array=3-3", "stage 2: --array=4-5"]


def test_a_dry_run_prints_what_is_left(write, play, capsys):
    file = write(mirrored=True)
    play(file, "--only", "A", "--seeds", "0")
    capsys.readouterr()
    assert play(file, "--dry_run", "--options", "--trainer.devices 2") == []
    said = capsys.readouterr().out
    assert "# A/s0: finished" in said
    assert said.count("--trainer.devices 2") == 1 + 2 + 1 + 4  # base; A/s1 and B with the mirrored test; edits


def test_a_finished_run_of_other_options_is_no_part_of_the_study(write, play, monkeypatch, capsys):
    file = write(steps=None, arms={"A": {}})
    play(file)
    for seed in (0, 1):
        config = {"model": {"init_args": {"lr": 0.1}}, "data": {"init_args": {"synthetic": None, "root": "here"}}}
        Path(f"runs/toy_A/s{seed}/config.yaml").write_text(yaml.safe_dump(config))

    def now(**changes: Any) -> None:
        model, data = {"lr": 0.1, "added_since": 1} | changes, {"synthetic": changes.get("synthetic"), "root": "there"}
        config = {"model": {"init_args": model}, "data": {"init_args": data}}
        monkeypatch.setattr(program, "parsed", lambda commands: dict.fromkeys(commands, config))

    now()
    assert play(file) == []
    now(lr=0.2)
    assert play(file, status=2) == []
    assert "model.init_args.lr: 0.1 -> 0.2" in capsys.readouterr().err
    assert play(file, "--job", "1", status=2) == []
    now(synthetic={"path": "edits"})
    assert play(file, status=2) == []


def test_a_run_that_was_only_begun_counts_as_well(write, play, monkeypatch, capsys):
    file = write(steps=None, arms={"A": {}}, seeds=[0])
    play(file)
    monkeypatch.setattr(program, "parsed", lambda commands: {name: {"lr": 2} for name in commands})
    Path("runs/toy_A/s0/test_metrics.json").unlink()
    assert play(file, status=2) == []
    write_json(Path("runs/toy_A/s0/run.json"), {"status": "interrupted"})
    assert play(file, status=2) == []
    assert "lr: 1 -> 2" in capsys.readouterr().err
    Path("runs/toy_A/s0/config.yaml").write_text("")
    assert play(file, status=2) == []
    assert "config.yaml has no options" in capsys.readouterr().err


def test_an_option_of_a_later_version_counts_where_the_study_sets_it(write, play, monkeypatch, capsys):
    def study(**options: Any) -> Path:
        return write(steps=None, arms={"A": {}}, seeds=[0], options=options)

    config = {"model": {"init_args": {"lr": 1, "added": 3, "maker": {"class_path": "M", "init_args": {"size": 2}}}}}
    play(study())
    Path("runs/toy_A/s0/config.yaml").write_text("model: {init_args: {lr: 1}}")
    monkeypatch.setattr(program, "parsed", lambda commands: dict.fromkeys(commands, config))
    assert play(study()) == []
    assert play(study(**{"model.lr": 1})) == []
    assert play(study(**{"model.added": 3}), status=2) == []
    assert "model.init_args.added: None -> 3" in capsys.readouterr().err
    assert play(study(**{"model.maker": "M"}), status=2) == []
    assert play(study(), "--options=--model.added=3", status=2) == []
    Path("tiny.yaml").write_text("model: {init_args: {maker: {class_path: M}}}")
    assert play(study(), status=2) == []


def test_a_finished_predict_of_other_options_is_refused(write, play, monkeypatch, capsys):
    file = write()
    play(file)
    monkeypatch.setattr(
        program,
        "parsed",
        lambda commands: {name: {"lr": 2 if name == "edits" else 1} for name in commands},  # the YAML has changed
    )
    assert play(file, status=2) == []
    assert "edits: runs/toy_edits/s0 was made with other options (lr: 1 -> 2)" in capsys.readouterr().err


def test_a_predict_that_is_marked_by_its_words_alone_goes_by_them(write, play, monkeypatch):
    file = write()
    play(file)
    mark = Path("runs/toy_edits/s0/study_edits.json")
    write_json(mark, {"command": json.loads(mark.read_text())["command"]})
    assert play(file) == []
    other = {"base": {"config": "tiny.yaml"}, "edits": {**BASIC["steps"]["edits"], "options": {"model.base": "{base}"}}}
    assert play(write(steps=other), status=2) == []


def test_another_spelling_of_the_folder_is_no_other_option(write, play, monkeypatch):
    """Of `model.base`, which names a run folder."""
    monkeypatch.setattr(
        program,
        "parsed",
        lambda commands: {
            name: {
                "lr": 1,
                "base": words[words.index("--runs_dir") + 1],
                "lora": [words[words.index("--runs_dir") + 1]],
            }
            for name, words in commands.items()
        },
    )
    Path("play.py").write_text(
        PLAY.replace('"lr: 1"', "json.dumps({'lr': 1, 'base': told['--runs_dir'], 'lora': [told['--runs_dir']]})")
    )
    file = write()
    play(file)
    assert play(file, "--runs_dir", str(Path("runs").absolute())) == []
    mark = Path("runs/toy_edits/s0/study_edits.json")
    write_json(mark, {"command": json.loads(mark.read_text())["command"]})
    assert play(file, "--runs_dir", str(Path("runs").absolute())) == []
    Path("other").symlink_to("runs")
    assert play(file, "--runs_dir", "other") == []


def test_a_stop_is_handed_on_and_the_study_goes_on_later(write, play, monkeypatch):
    file = write(steps=None, arms={"A": {}})
    Path("play.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved.txt', 'w').close(), sys.exit(143)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(30)\n"
    )
    with pytest.raises(SystemExit) as stopped:
        play(file)
    assert stopped.value.code == 143
    assert Path("saved.txt").is_file()
    Path("play.py").write_text(PLAY)
    assert play(file) == ["fit toy_A s0", "fit toy_A s1"]


def test_a_stop_while_a_run_is_just_started_is_handed_on_to_it(write, play, monkeypatch):
    """As on a busy machine, where the run gets further than the study that has started it."""

    class Slow(subprocess.Popen):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            until(Path("told.txt").is_file)

    Path("play.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (open('saved.txt', 'w').close(), sys.exit(143)))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "open('told.txt', 'w').close()\n"
        "time.sleep(30)\n"
    )
    monkeypatch.setattr(program.subprocess, "Popen", Slow)
    with pytest.raises(SystemExit) as stopped:
        play(write(steps=None, arms={"A": {}}))
    assert stopped.value.code == 143
    assert Path("saved.txt").is_file()


def test_a_study_waits_for_its_run_whoever_else_tells_it(write, play, monkeypatch):
    """SLURM tells all processes of a job, and the run may be told before it listens: then the study puts the job back."""
    program = Path("bin/scontrol")
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $@ >> {Path('asked.txt').absolute()}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent.absolute()}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    told = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(0.5),\n"
        "                                          open('saved.txt', 'w').close(), sys.exit({code})))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(30)\n"
    )
    for code, asked in ((138, ""), (3, "requeue 17\n")):
        Path("play.py").write_text(told.format(code=code))
        Path("asked.txt").write_text("")
        Path("saved.txt").unlink(missing_ok=True)
        with pytest.raises(SystemExit) as stopped:
            play(write(steps=None, arms={"A": {}}))
        assert stopped.value.code == 138
        assert Path("saved.txt").is_file()
        assert Path("asked.txt").read_text() == asked


# --- the real command line ---


def test_a_study_of_two_runs(tmp_path, monkeypatch, capsys):
    """From the file to the report, by real runs; an unknown option is refused before the first of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    make_mvtec(tmp_path / "data", train_good=8, test_good=6, defects={"crack": 8}, itself=True)
    model = {"backbone": "test_resnet", "weights": None, "transfer": "all", "image_size": 32, "lr": 0.01}
    data = {"root": "data", "setting": "supervised", "image_size": 32, "batch_size": 8, "leakage": "off"}
    config = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "model": {"class_path": "DefectClassifier", "init_args": model},
        "data": {"class_path": "MVTecAD", "init_args": data},
    }
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    said = {"study": "toy", "seeds": [3], "config": "tiny.yaml", "options": {"wandb": "off"}, "mirrored": True}
    Path("study.yaml").write_text(yaml.safe_dump(said | {"arms": {"A": {"options": {"model.lrr": 1}}}}))
    assert main(["study.yaml"]) == 2
    assert "A/s3: unknown key --model.lrr" in capsys.readouterr().err
    assert not Path("runs").exists()
    Path("study.yaml").write_text(yaml.safe_dump(said | {"arms": {"A": {}}}))
    assert main(["study.yaml"]) == 0
    run = Path("runs/toy_A/s3")
    plain, mirrored = (json.loads((run / f"{name}_metrics.json").read_text()) for name in ("test", "mirrored"))
    assert mirrored["n"] > plain["n"]
    assert len(list(run.glob("test_metrics*"))) == 1  # what the mirrored pictures gave is not called a test
    assert "#mirrored" not in (run / "test_predictions.csv").read_text()
    assert (run / "mirrored_predictions.csv").read_text().count("#mirrored") == mirrored["n"]
    assert (run / "figures" / "mirrored_confusion.png").is_file()
    assert (Path("runs/toy") / "report.md").is_file()
    assert main(["study.yaml"]) == 0  # also by the checks of a finished run
    assert "finished before" in capsys.readouterr().out


def test_the_program_starts_without_torch():
    code = "import sys, lit_defect.study, lit_defect.reporting.study; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=EXPERIMENTS.parent).returncode == 0


@pytest.mark.skipif(not STUDIES, reason="no study among the experiments")
@pytest.mark.parametrize("module", ["study", "reporting.study"])
def test_a_job_script_with_the_former_command_is_told_the_new_one(module):
    command = [sys.executable, "-m", f"lit_defect.{module}", "elpv.yaml"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 1
    assert "this is now python -m lit_defect study FILE" in done.stderr


def test_every_study_among_the_experiments_has_options_that_there_are(monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    monkeypatch.setenv("PYTHONPATH", str(EXPERIMENTS.parent))
    found = {f"{file.stem}: {job.name}": [job.verb, *job.words] for file in STUDIES for job in plan(read_study(file))}
    assert len(parsed(found)) == len(found)


@pytest.mark.skipif(not STUDIES, reason="no study among the experiments")
@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_title_tells_of_pseudo_anomalies_that_unbalance_the_batches(file):
    arms = yaml.safe_load(file.read_text())["arms"].values()
    titles = [arm["title"] for arm in arms if "model.anomaly" in arm.get("options", {})]
    assert all("a quarter of the batch" in title for title in titles)


def test_the_end_of_a_log_begins_where_the_error_does(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("epoch 1\nerror: data.root: no such layout\n" + "".join(f"  folder {n}\n" for n in range(9)))
    assert program.end_of(log).splitlines()[0] == "  | error: data.root: no such layout"
    assert len(program.end_of(log).splitlines()) == 10
    log.write_text("a\nb\nc\nerror: short\n")
    assert program.end_of(log, lines=3) == "  | b\n  | c\n  | error: short"
    log.write_text("a\n")
    assert program.end_of(log) == "  | a"
