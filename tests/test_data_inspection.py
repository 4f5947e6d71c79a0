"""Everything that is wrong with a data set is found at once, and what is sound is looked at only once."""

import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lit_defect.data import inspection
from lit_defect.data.inspection import check, list_pictures
from lit_defect.data.leakage import perceptual_code
from lit_defect.data.samples import Sample
from lit_defect.errors import DataError

RNG = np.random.default_rng(0)
CLASSES = {"class_names": ["good", "bad"], "normal_class": 0}


@pytest.fixture
def samples(tmp_path):
    """Two good pictures, and two bad ones with masks."""
    found = []
    for i in range(4):
        path, mask = tmp_path / f"{i}.png", tmp_path / f"{i}_mask.png"
        Image.fromarray(RNG.integers(0, 256, (20, 30), dtype=np.uint8)).save(path)
        marked = np.zeros((20, 30), np.uint8)
        marked[5:9, 10:15] = 255
        Image.fromarray(marked).save(mask)
        found.append(Sample(path=str(path), name=path.name, label=i // 2, mask=str(mask) if i > 1 else None))
    return found


def kinds(samples, **kwargs):
    """name -> kind of the problem, from a check that skips."""
    result = check(samples, on_bad_file="skip", **kwargs)
    assert {s.name for s in result.samples} == {s.name for s in samples} - {p.name for p in result.problems}
    return {problem.name: problem.kind for problem in result.problems}


def test_sound_samples_pass_with_their_sizes_and_codes(samples):
    result = check(samples, with_masks=True, **CLASSES)
    assert result.samples == samples
    assert result.problems == []
    assert result.shapes == [(20, 30)] * 4
    assert result.grey == [True] * 4
    pixels = np.asarray(Image.open(samples[2].path))
    np.testing.assert_allclose(result.codes[2], perceptual_code(pixels), rtol=1e-5, atol=1e-3)


def test_one_error_lists_every_file_with_its_remedy(samples, tmp_path):
    os.remove(samples[0].path)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:-200])
    Image.new("CMYK", (30, 20)).save(tmp_path / "c.tif")
    odd = Sample(path=str(tmp_path / "c.tif"), name="c.tif", label=0)
    with pytest.raises(DataError) as caught:
        check([*samples, odd], with_masks=True, **CLASSES)
    text = str(caught.value)
    assert text.startswith("Files that cannot be used: 3 ")
    for part in ("missing: 1.", "truncated: 1.", "wrong mode: 1.", "data.on_wrong_mode=convert", "0.png", "1.png"):
        assert part in text
    assert "data.on_bad_file=skip" in text
    assert all(line.count("c.tif") <= 1 for line in text.splitlines())  # named once, by the whole path
    assert [s.name for s in check([odd], on_wrong_mode="convert").samples] == ["c.tif"]


def test_at_most_twenty_files_of_a_kind_are_named(samples, tmp_path):
    gone = [Sample(path=str(tmp_path / f"x{i}"), name=f"x{i}", label=0) for i in range(25)]
    with pytest.raises(DataError, match=r"(?s)missing: 25\..*x19.*\.\.\. and 5 more") as caught:
        check([*samples, *gone])
    assert "x20" not in str(caught.value)


def test_masks_are_checked_when_asked_for(samples, tmp_path):
    os.remove(samples[2].mask)
    Image.new("L", (9, 9), 255).save(samples[3].mask)
    assert kinds(samples, **CLASSES) == {}
    both_gone = pytest.raises(DataError, match="no sample of class bad")
    with both_gone:
        kinds(samples, with_masks=True, **CLASSES)
    found = kinds(samples, with_masks=True)
    assert found == {"2.png": "mask missing", "3.png": "mask of another size"}
    (tmp_path / "3_mask.png").write_text("no")
    assert kinds(samples, with_masks=True)["3.png"] == "mask unreadable"


def test_empty_mask_matters_only_on_a_defective_picture(samples):
    Image.new("L", (30, 20)).save(samples[2].mask)
    assert kinds(samples, with_masks=True, **CLASSES) == {"2.png": "empty mask"}
    good = [replace(s, label=0) for s in samples]
    assert kinds(good, with_masks=True, normal_class=0) == {}
    outside = replace(samples[3], box=(0, 10, 10, 10))  # the mark is at x 10 to 14, y 5 to 8
    inside = replace(samples[3], box=(8, 4, 10, 10), name="inside")
    assert kinds([samples[0], outside, inside], with_masks=True, **CLASSES) == {"3.png": "empty mask"}


def test_duplicates_and_boxes(samples):
    twice = replace(samples[0], name="again")
    crops = [replace(samples[0], name=f"crop{i}", box=box) for i, box in enumerate([(0, 0, 9, 9), (25, 0, 9, 9)])]
    turned = replace(samples[0], name="turned", mirror=True)
    found = kinds([*samples, twice, *crops, turned])
    assert found == {"again": "duplicated", "crop1": "box outside the picture"}
    assert check([crops[0]]).shapes == [(9, 9)]


def test_problems_of_the_layout_are_listed_too(samples):
    problem = inspection.Problem("ground_truth/9.png", "mask without image", "no picture 9")
    with pytest.raises(DataError, match="mask without image: 1"):
        check(samples, problems=[problem])


def test_empty_class_and_empty_set(samples):
    with pytest.raises(DataError, match="no sample of class scratched"):
        check(samples, class_names=["good", "bad", "scratched"])
    with pytest.raises(DataError, match="no samples"):
        check([])


def test_second_start_decodes_nothing_and_gives_the_same(samples, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = check(samples, with_masks=True, cache_dir=cache, **CLASSES)
    monkeypatch.setattr(inspection, "_look_at", None)  # a decode would now raise
    second = check(samples, with_masks=True, cache_dir=cache, **CLASSES)
    assert second.samples == first.samples
    assert second.shapes == first.shapes
    np.testing.assert_array_equal(second.codes, first.codes)


def test_changed_file_is_looked_at_again(samples, tmp_path):
    cache = tmp_path / "cache"
    check(samples, cache_dir=cache)
    Image.new("L", (7, 5), 3).save(samples[1].path)
    assert check(samples, cache_dir=cache).shapes == [(20, 30), (5, 7), (20, 30), (20, 30)]


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 broken"])
def test_damaged_memory_is_rebuilt(samples, tmp_path, content):
    cache = tmp_path / "cache"
    expected = check(samples, cache_dir=cache)
    (file,) = cache.glob("inspection-*.npz")
    file.write_bytes(content)
    np.testing.assert_array_equal(check(samples, cache_dir=cache).codes, expected.codes)
    assert len(file.read_bytes()) > 1000


def test_unwritable_cache_folder_is_no_error(samples, tmp_path):
    (tmp_path / "file").write_text("")
    assert len(check(samples, cache_dir=tmp_path / "file" / "cache").samples) == 4


def test_list_pictures_walks_down(samples, tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "deep" / "z.JPG", "JPEG")
    (tmp_path / "notes.txt").write_text("")
    found = list_pictures(tmp_path)
    assert [s.name for s in found][-1] == "deep/z.JPG"
    assert len(found) == 9
    assert {(s.label, s.split) for s in found} == {(-1, "predict")}
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures"):
        list_pictures(tmp_path / "empty")
    with pytest.raises(DataError, match=r"there is no folder .*nowhere; correct the path"):
        list_pictures(tmp_path / "nowhere")
