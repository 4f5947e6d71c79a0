"""ELPV from the files of its package, whose code stays untouched."""

import csv
import sys

import pytest

from lit_defect.data.elpv import ELPV, package_folder
from lit_defect.errors import DataError
from tests.fakes import make_elpv


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = make_elpv(tmp_path / "site", cells=64)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "elpv_dataset", raising=False)
    return folder


def make(tmp_path, **kwargs):
    module = ELPV(cache_dir=str(tmp_path / "cache"), **{"leakage": "off"} | kwargs)
    module.setup("fit")
    return module


def test_binary_labels_start_at_one_half(site, tmp_path):
    module = make(tmp_path)
    assert module.class_names == ["good", "defective"]
    grades = {(s.defect_type, s.label) for samples in module.samples.values() for s in samples}
    assert grades == {("good", 0), ("defective 1/3", 0), ("defective 2/3", 1), ("defective", 1)}
    assert "elpv_dataset" not in sys.modules


def test_four_grades_and_cell_types(site, tmp_path):
    module = make(tmp_path, grades="four", cells="mono")
    samples = [s for split in ("train", "val", "test") for s in module.samples[split]]
    assert len(samples) == 32
    assert {s.category for s in samples} == {"mono"}
    assert sorted({s.label for s in samples}) == [0, 1, 2, 3]
    assert len(module.class_names) == 4
    assert module.normal_class == 0


def test_extremes_leave_the_doubtful_cells_out(site, tmp_path):
    module = make(tmp_path, grades="extremes")
    assert module.class_names == ["good", "defective"]
    samples = [s for split in ("train", "val", "test") for s in module.samples[split]]
    assert len(samples) == 32
    assert {(s.defect_type, s.label) for s in samples} == {("good", 0), ("defective", 1)}


@pytest.mark.parametrize("grades", ["binary", "four", "extremes"])
def test_one_class_trains_on_good_cells_and_tests_what_supervised_tests(site, tmp_path, grades):
    plain, module = make(tmp_path, grades=grades), make(tmp_path, grades=grades, setting="one_class")
    for split in ("train", "val"):
        assert module.samples[split] == [s for s in plain.samples[split] if s.label == module.normal_class]
        assert module.samples[split]
        assert len(module.samples[split]) < len(plain.samples[split])
    assert module.samples["test"] == plain.samples["test"]
    assert len({s.label for s in module.samples["test"]}) == len(module.class_names)
    assert module.counts()["val"] == {
        name: plain.counts()["val"][name] * (label == 0) for label, name in enumerate(module.class_names)
    }
    assert {label for batch in module.val_dataloader() for label in batch["label"].tolist()} == {0}


def test_cells_that_one_class_does_not_use_are_recorded_and_the_split_repeats(site, tmp_path):
    supervised, module = make(tmp_path, seed=3), make(tmp_path, seed=3, setting="one_class")
    supervised.write_records(tmp_path / "supervised")
    module.write_records(tmp_path / "one_class")
    with (tmp_path / "one_class" / "splits.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 64
    unused = {row["name"] for row in rows if row["split"] == "unused"}
    assert unused == {s.name for split in ("train", "val") for s in supervised.samples[split] if s.label}
    for run in ("supervised", "one_class"):  # also a split in which defects train
        again = make(tmp_path, seed=4, setting="one_class", split_file=str(tmp_path / run / "splits.csv"))
        assert again.samples == module.samples


def test_one_class_keeps_groups_together_and_the_guard_looks_at_what_is_used(site, tmp_path):
    images = site / "elpv_dataset" / "data" / "images"
    labels = (images.parent / "labels.csv").read_text().splitlines()
    good, bad = ([line.split()[0] for line in labels if line.split()[1] == p] for p in ("0.0", "1.0"))
    for first, second in [(good[0], good[1]), (good[2], good[3]), (bad[0], bad[1])]:
        (images.parent / second).write_bytes((images.parent / first).read_bytes())
    with pytest.warns(UserWarning, match="near-duplicate"):
        module = next(
            module
            for module in (make(tmp_path, setting="one_class", leakage="warn", seed=seed) for seed in range(20))
            if any(leak.name_a in bad[:2] or leak.name_b in good[:4] for leak in module.leaks)
        )
    used = {s.name for split in ("train", "val", "test") for s in module.samples[split]}
    assert all({leak.name_a, leak.name_b} <= used for leak in module.leaks)
    module.write_records(tmp_path / "run")
    groups = str(tmp_path / "run" / "groups.csv")
    mended = make(tmp_path, setting="one_class", leakage="error", group_file=groups, seed=module.seed)
    assert mended.leaks == []
    places = {s.name: split for split in ("train", "val", "test") for s in mended.samples[split]}
    for a, b in [(good[0], good[1]), (good[2], good[3]), (bad[0], bad[1])]:
        assert places.get(a) == places.get(b)


def test_test_split_is_a_quarter_of_every_grade_and_type(site, tmp_path):
    module = make(tmp_path)
    drawn = [(s.category, s.defect_type) for s in module.samples["test"]]
    assert len(drawn) == 16
    assert all(drawn.count(stratum) == 2 for stratum in set(drawn))
    assert len(set(drawn)) == 8


def test_damaged_labels_name_the_line(site, tmp_path):
    labels = site / "elpv_dataset" / "data" / "labels.csv"
    labels.write_text(labels.read_text() + "images/cell9999.png 0.5\n")
    with pytest.raises(DataError, match=r"labels\.csv:65"):
        make(tmp_path)
    labels.write_text("images/cell0001.png 7.0 mono\n")
    with pytest.raises(DataError, match=r"labels\.csv:1"):
        make(tmp_path)


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("lit_defect.data.elpv.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install elpv-dataset"):
        package_folder()


def test_the_real_package_holds_what_the_paper_counts():
    try:
        package_folder()
    except DataError:
        pytest.skip("elpv-dataset is not installed")
    samples = ELPV().find_samples()
    assert len(samples) == 2624
    assert sum(s.category == "mono" for s in samples) == 1074
    assert sum(s.label == 0 for s in samples) == 1803
    extremes = ELPV(grades="extremes", setting="one_class").find_samples()
    assert [sum(s.label == label for s in extremes) for label in (0, 1)] == [1508, 715]
