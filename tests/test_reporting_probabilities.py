"""Probability maps on disk: what other programs may write is read as what it means, and all that is wrong is told."""

import json
import re
import threading
import time

import numpy as np
import pytest

from lit_defect.errors import UserError
from lit_defect.reporting.probabilities import ProbabilityMaps, write_header, write_probabilities

NAMES = ["background", "crack", "hole"]
PAIR = ["background", "crack"]


@pytest.fixture
def maps(rng):
    """(3, 4, 6), adding up to 1."""
    drawn = rng.gamma(1.0, size=(3, 4, 6))
    return drawn / drawn.sum(0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def put(folder, name, array, *, suffix=".npy", names=NAMES):
    write_header(folder, names)
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".npz":
        np.savez_compressed(path, array)
    else:
        np.save(path, array)
    return ProbabilityMaps(folder, names)


def test_what_is_written_is_read_back_to_the_precision_of_half_floats(tmp_path, maps):
    write_header(tmp_path, NAMES)
    path = write_probabilities(tmp_path, "test/crack/000.png", maps)
    assert path == tmp_path / "test" / "crack" / "000.png.npy"
    stored = np.load(path)
    assert (stored.dtype, stored.shape) == (np.float16, (3, 4, 6))
    read = ProbabilityMaps(tmp_path, NAMES).read("test/crack/000.png")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, maps, rtol=2e-3)
    np.testing.assert_allclose(read.sum(0), 1, atol=1e-6)
    assert [file.name for file in path.parent.iterdir()] == ["000.png.npy"]  # nothing half written beside it
    header = json.loads((tmp_path / "probabilities.json").read_text())
    assert header == {"format": "lit_defect probability maps", "version": 1, "class_names": NAMES}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("kind", ["<f2", "<f4", "<f8", ">f4"])
def test_floats_of_other_programs_mean_themselves(tmp_path, maps, kind, suffix):
    read = put(tmp_path, "a.png", maps.astype(kind), suffix=suffix).read("a.png")
    np.testing.assert_allclose(read, maps, atol=1e-3)
    np.testing.assert_allclose(read.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize(("kind", "full"), [(np.uint8, 255), (np.uint16, 65535)])
def test_integers_mean_shares_of_their_largest_value(tmp_path, maps, kind, full):
    levels = np.floor(maps * full).astype(kind)  # cut off and not rounded: the sums are up to two levels short
    read = put(tmp_path, "a.png", levels).read("a.png")
    expected = levels / levels.sum(0, dtype=float)
    np.testing.assert_allclose(read, expected, atol=1e-6)


def test_two_classes_may_be_one_map_of_the_second(tmp_path):
    alone = np.array([[0.0, 0.25], [0.75, 1.0]])
    expected = np.stack([1 - alone, alone])
    for array in (alone, np.round(alone * 65535).astype(np.uint16), expected):
        np.testing.assert_allclose(put(tmp_path, "a", array, names=PAIR).read("a"), expected, atol=1e-5)


def test_a_sum_may_be_off_by_one_percent_and_is_taken_out(tmp_path):
    off = np.array([0.5, 0.3, 0.208]).reshape(3, 1, 1)
    np.testing.assert_allclose(put(tmp_path, "a", off).read("a").ravel(), off.ravel() / 1.008, rtol=1e-6)
    off[2] = 0.22
    with pytest.raises(UserError, match=r"classes that do not add up to 1 \(to 1\.02 at the worst pixel\)"):
        put(tmp_path, "a", off).read("a")


def test_many_classes_in_bytes_may_be_off_by_half_a_level_each(tmp_path):
    names = [str(i) for i in range(21)]
    levels = np.full((21, 2, 2), 12, np.uint8)  # 255 / 21 = 12.14; the sum is 252 / 255 = 0.988
    np.testing.assert_allclose(put(tmp_path, "a", levels, names=names).read("a"), 1 / 21, rtol=1e-6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 2, 2), np.nan), "nan or infinity"),
        (np.log(np.full((3, 2, 2), 1 / 3)), r"values that are no probabilities \(from -1\.099 to -1\.099\)"),
        (
            np.stack([np.full((2, 2), v) for v in (1.1, -0.05, -0.05)]),
            r"values that are no probabilities \(from -0\.05 to 1\.1\)",
        ),
        (np.full((3, 2, 2), 1), r"another type than float16, .* \(int64\)"),
        (np.full((2, 2, 2), 0.5), r"not of 3 classes \(2 x 2 x 2 instead of 3 x height x width\)"),
        (np.full((2, 2, 3), 1 / 3), r"not of 3 classes \(2 x 2 x 3 "),
        (np.full((2, 2), 0.5), r"not of 3 classes \(2 x 2 "),
        (np.zeros((3, 0, 2)), "empty"),
    ],
)
def test_what_is_no_probability_map_is_refused_by_name(tmp_path, array, message):
    with pytest.raises(UserError, match=rf"the probability map of d/a\.png: {message}"):
        put(tmp_path, "d/a.png", array).read("d/a.png")


def test_files_that_run_code_or_are_cut_off_are_not_opened(tmp_path, maps):
    folder = put(tmp_path, "a", maps)
    np.save(tmp_path / "b.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:200])
    (tmp_path / "c.npz").write_bytes(b"PK no archive")
    for name in "abc":
        with pytest.raises(UserError, match=f"map of {name}: unreadable"):
            folder.read(name)
    np.savez(tmp_path / "d.npz", first=maps, second=maps)
    with pytest.raises(UserError, match=r"not one array in the \.npz \(it has first, second\)"):
        folder.read("d")


def test_one_error_tells_all_that_is_wrong(tmp_path, maps):
    folder = put(tmp_path, "good", maps)
    put(tmp_path, "small", maps[:, :2])
    put(tmp_path, "void", maps * np.nan)
    put(tmp_path, "flat", maps[:2])
    names = ["good", "small", "void", *(f"gone_{i}" for i in range(7)), "flat"]
    with pytest.raises(UserError) as caught:
        folder.check(names, [(4, 6)] * len(names))
    text = str(caught.value)
    assert "no file: 7 of 11: gone_0 (gone_0.npy or .npz), gone_1" in text
    assert re.search(r"gone_4 \S+ or .npz\) and 2 more", text)
    assert "gone_5" not in text
    assert "another size than the picture: 1 of 11: small (2x6; expected 4x6 as HxW)" in text
    assert "nan or infinity: 1 of 11: void" in text
    assert "not of 3 classes: 1 of 11: flat (2 x 4 x 6 instead of 3 x height x width)" in text
    assert "good" not in text
    assert "probabilities.json" in text


def test_the_threads_that_check_open_one_array_at_a_time(tmp_path, maps, monkeypatch):
    """Python before 3.11.8 parses the headers of two arrays wrongly when two threads do so at once."""
    names = [f"{number}.png" for number in range(24)]
    write_header(tmp_path, NAMES)
    for name in names:
        write_probabilities(tmp_path, name, maps)
    alone, load = threading.Lock(), np.load

    def watched(*args, **kwargs):
        assert alone.acquire(blocking=False), "two threads open an array at once"
        try:
            time.sleep(0.002)
            return load(*args, **kwargs)
        finally:
            alone.release()

    monkeypatch.setattr(np, "load", watched)
    ProbabilityMaps(tmp_path, NAMES).check(names)


def test_without_sizes_any_size_will_do(tmp_path, maps):
    folder = put(tmp_path, "a", maps)
    put(tmp_path, "b", maps[:, :2])
    folder.check(["a", "b"])
    folder.check(["a", "b"], [(4, 6), (2, 6)])
    folder.check([])
    with pytest.raises(UserError, match=r"2 of 2: a \(4x6; expected 6x4 as HxW\), b "):
        folder.check(["a", "b"], [(6, 4), (6, 2)])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, r"there is no probabilities\.json in it"),
        ("{", r"cannot be read"),
        ("[]", "is not the header of such maps"),
        ('{"format": "other", "version": 1, "class_names": ["background", "crack", "hole"]}', "is not the header"),
        ('{"format": "lit_defect probability maps", "version": 2, "class_names": []}', "is not the header"),
        (
            '{"format": "lit_defect probability maps", "version": 1, "class_names": ["background", "hole", "crack"]}',
            "classes background, hole, crack; the data set has background, crack, hole, in this order",
        ),
    ],
)
def test_a_header_says_which_classes_the_channels_are(tmp_path, header, message):
    if header is not None:
        (tmp_path / "probabilities.json").write_text(header)
    with pytest.raises(UserError, match=message):
        ProbabilityMaps(tmp_path, NAMES)


def test_a_missing_folder_is_told_with_the_format(tmp_path):
    with pytest.raises(UserError, match=r"(?s)no such folder.*\"class_names\": .*PICTURE\.npy.*uint16"):
        ProbabilityMaps(tmp_path / "nowhere", NAMES)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "", "b/../../a"])
def test_no_name_leads_out_of_the_folder(tmp_path, maps, name):
    with pytest.raises(UserError, match="leads out of the folder"):
        write_probabilities(tmp_path / "maps", name, maps)
    folder = put(tmp_path / "maps", "a", maps)
    with pytest.raises(UserError, match="leads out of the folder"):
        folder.check([name])
    assert not (tmp_path / "a.png.npy").exists()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        (np.full((2, 3, 3), np.nan), UserError),
        (np.full((2, 3, 3), 0.7), UserError),
        (np.full((3, 3), 0.5), ValueError),
        (np.full((1, 3, 3), 1.0), ValueError),
    ],
)
def test_only_probabilities_are_written(tmp_path, values, error):
    with pytest.raises(error):
        write_probabilities(tmp_path, "a", values)
    assert not list(tmp_path.iterdir())


def test_a_write_that_breaks_off_leaves_the_former_file(tmp_path, maps, monkeypatch):
    path = write_probabilities(tmp_path, "a", maps)
    before = path.read_bytes()
    monkeypatch.setattr(np, "save", lambda file, *_, **__: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        write_probabilities(tmp_path, "a", maps[::-1])
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
