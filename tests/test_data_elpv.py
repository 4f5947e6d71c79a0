"""ELPV from the files of its package, whose code stays untouched."""

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
    module = ELPV(cache_dir=str(tmp_path / "cache"), leakage="off", **kwargs)
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
