"""Runs of W&B, by a stand-in for its Api, as run folders that a report reads."""

from types import SimpleNamespace

import pytest

from lit_defect import report
from lit_defect.errors import UserError
from lit_defect.report.collect import read_run
from lit_defect.report.curves import read_series
from lit_defect.report.matter import Asked, gather
from lit_defect.report.wandb_runs import fetch


class _Api:
    """As much of `wandb.Api` as is asked for."""

    def __init__(self, runs):
        self.kept, self.asked = runs, []

    def runs(self, path, filters=None):
        self.asked.append((path, filters))
        return [run for run in self.kept if not filters or run.group == filters["group"]]


def _run(group, seed, auroc, state="finished", **summary):
    config = {
        "seed_everything": seed, "model": {"class_path": "lit_defect.tasks.DefectClassifier", "init_args": {"lr": 0.1}},
        "data": {"class_path": "lit_defect.data.ELPV", "init_args": {"seed": 0}},
        "run": {"commit": "abc", "host": "node1", "command": ["x", "fit"]}, "lineage": {"data": None},
    }  # fmt: skip
    figures = {"test/auroc": auroc, "test/auroc_low": auroc - 0.1, "test/auroc_high": auroc + 0.1, "test/f1": "NaN"}
    history = [
        {"_step": 0, "trainer/global_step": 10, "train/loss": 1.0, "epoch": 0, "_runtime": 3.0},
        {"_step": 1, "trainer/global_step": 20, "train/loss": 0.5, "val/loss": 0.7, "figures": {"_type": "image-file"}},
        {"_step": 2, "trainer/global_step": 20, "charts": {"_type": "table"}},
    ]
    return SimpleNamespace(
        id=f"{group}-s{seed}", name=f"{group}/s{seed}", group=group, state=state, config=config, url="https://x",
        created_at="2026-01-01T00:00:00", summary_metrics={**figures, "test": {"roc": {}}, **summary},
        scan_history=lambda: iter(history),
    )  # fmt: skip


def test_runs_come_down_with_config_state_curves_and_figures(tmp_path):
    api = _Api([_run("a", 0, 0.8, status="preempted"), _run("b", 0, 0.9)])
    (folder,) = fetch("wandb:me/project/a", tmp_path, api)
    assert api.asked == [("me/project", {"group": "a"})]
    run = read_run(folder)
    assert (run.name, run.state, run.task, run.data, run.seeds) == (
        "a/a-s0",
        "preempted",
        "DefectClassifier",
        "ELPV",
        (0, 0),
    )
    assert run.record["commit"] == "abc"
    assert "run.commit" not in run.options
    assert list(run.measured["test"].figures) == ["auroc"]
    figure = run.measured["test"].figures["auroc"]
    assert (figure.value, figure.low, figure.high) == pytest.approx((0.8, 0.7, 0.9))
    series = read_series(folder / "metrics.csv")
    assert [series["train/loss"][k].tolist() for k in (0, 1)] == [[10, 20], [1.0, 0.5]]
    assert series["val/loss"][0].tolist() == [20]


def test_they_are_compared_over_seeds(tmp_path):
    runs = [_run(arm, seed, 0.7 + 0.01 * seed + gain + 0.001 * seed * gain) for arm, gain in (("x_a", 0), ("x_b", 0.1))
            for seed in range(3)]  # fmt: skip
    matter = gather(Asked(runs=fetch("wandb:me/project", tmp_path, _Api(runs)), metrics=["auroc"]))
    assert [arm.name for arm in matter.arms] == ["a", "b"]
    assert matter.differences[0].spread.mean == pytest.approx(0.1, abs=1e-3)
    assert matter.pictures == []


def test_names_lead_to_no_other_folder(tmp_path):
    (folder,) = fetch("wandb:me/project", tmp_path / "in", _Api([_run("../../out", 0, 0.8)]))
    assert folder.parent.parent == tmp_path / "in"


@pytest.mark.parametrize("address", ["wandb:", "wandb:me", "wandb:me/", "wandb:/project", "wandb:me/project/"])
def test_an_address_of_another_form_is_told(tmp_path, address):
    with pytest.raises(UserError, match="ENTITY/PROJECT"):
        fetch(address, tmp_path, _Api([]))


def test_no_login_no_run_and_a_server_that_fails_are_told_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lit_defect.report.wandb_runs.logged_in", lambda: False)
    assert report.main(["wandb:me/project", "-o", str(tmp_path / "out")]) == 2
    assert "wandb:me/project: W&B is asked only when logged in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no run there"):
        fetch("wandb:me/project/none", tmp_path, _Api([_run("a", 0, 0.8)]))
    broken = SimpleNamespace(runs=lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"cannot be asked \(ZeroDivisionError"):
        fetch("wandb:me/project", tmp_path, broken)
