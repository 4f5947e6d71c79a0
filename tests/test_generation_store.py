"""Generated data sets on disk: whole after every kill, alike however many processes wrote them, read with care."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lit_defect.errors import DataError, UserError
from lit_defect.generation import files, manifest, store
from lit_defect.generation.store import About, GeneratedStore, read_about, read_manifest, read_trained_on

LEARNT = [("tile/test/crack/000.png", "7"), ("tile/test/crack/001.png", "")]
NAMES = [
    "number", "image", "mask", "source", "source_group", "category", "defect_type", "seed", "prompt", "base", "tokens",
    "sampler", "steps", "strength", "guidance", "reweight", "mask_source", "candidates", "rejected", "change_inside",
    "change_outside", "covered", "contrast", "likeness", "area", "accepted", "reason",
    "mode", "most_outside", "most_after", "share_changed", "seam", "retried",
]  # fmt: skip


def about(**changes: object) -> About:
    values = {"generator": "anomaly_diffusion", "base": {"source": "base", "fingerprint": "ab"}, "tokens": "cd"}
    return About(**{**values, "options": {"steps": 20, "mask": {"feather": 1.5}}, "seed": 3, **changes})


def made(number: int, accepted: bool = True, **changes: object) -> manifest.Made:
    values = {
        "number": number, "source": f"tile/train/good/{number}.png", "source_group": "12", "category": "tile",
        "defect_type": "crack", "seed": 3, "prompt": 'a "photo", of a *', "base": "ab", "tokens": "cd", "sampler": "ddim",
        "steps": 20, "strength": 0.1 + 0.2, "guidance": 1.0, "reweight": "paper", "mask_source": "augmented 000.png",
        "candidates": 4, "rejected": {"nothing changed": 2, "mask: too small": 1}, "change_inside": 12.25,
        "change_outside": math.nan, "covered": 0.5, "contrast": math.inf, "likeness": -math.inf, "area": 1e-5, "accepted": accepted,
        "reason": "" if accepted else "nothing changed", "mode": "inpaint", "most_outside": 31.5, "most_after": 0.5, "share_changed": 0.01,
        "seam": -0.25, "retried": 2,
    }  # fmt: skip
    return {**values, **changes}


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def mask(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((9, 7)) > 0.5


def open_store(root: Path, rank: int = 0, **changes: object) -> GeneratedStore:
    return GeneratedStore(root, about(**changes), LEARNT, rank)


def fill(root: Path, numbers: range, rank: int = 0) -> GeneratedStore:
    opened = open_store(root, rank)
    for number in numbers:
        accepted = number % 3 != 2
        opened.add(made(number, accepted), *((picture(number), mask(number)) if accepted else ()))
    return opened


def contents(root: Path) -> dict[str, bytes]:
    found = [path for path in root.rglob("*") if path.is_file() and path.parent.name != ".launches"]
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


# --- what is written ---


def test_the_layout_is_mvtecs_and_the_pixels_are_those_given(tmp_path):
    fill(tmp_path, range(3)).merge()
    assert set(contents(tmp_path)) == {
        "about.json", "manifest.csv", "trained_on.csv",
        "tile/test/crack/00000.png", "tile/ground_truth/crack/00000_mask.png",
        "tile/test/crack/00001.png", "tile/ground_truth/crack/00001_mask.png",
    }  # fmt: skip
    for number in range(2):
        written = np.asarray(Image.open(tmp_path / f"tile/test/crack/0000{number}.png"))
        np.testing.assert_array_equal(written, picture(number))
        written = np.asarray(Image.open(tmp_path / f"tile/ground_truth/crack/0000{number}_mask.png"))
        np.testing.assert_array_equal(written, mask(number) * 255)


def test_the_manifest_is_an_ordinary_csv_file_with_the_columns_agreed_on(tmp_path):
    fill(tmp_path, range(3)).merge()
    with (tmp_path / "manifest.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert list(rows[0]) == NAMES
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    assert [row["accepted"] for row in rows] == ["1", "1", "0"]
    assert rows[0]["image"] == "tile/test/crack/00000.png"
    assert rows[0]["mask"] == "tile/ground_truth/crack/00000_mask.png"
    assert rows[2]["image"] == rows[2]["mask"] == ""
    assert json.loads(rows[0]["rejected"]) == {"nothing changed": 2, "mask: too small": 1}


def test_what_is_read_is_what_was_written(tmp_path):
    opened = open_store(tmp_path)
    first = opened.add(made(4, prompt="two\nlines, ü"), picture(), mask())
    opened.add(made(1, accepted=False, change_inside=np.float32(0.25)))
    opened.merge()
    rows = read_manifest(tmp_path)
    assert [row["number"] for row in rows] == [1, 4]
    assert rows[0]["accepted"] is False
    assert rows[0]["reason"] == "nothing changed"
    assert rows[0]["change_inside"] == 0.25
    read = rows[1]
    assert read["prompt"] == "two lines, ü"
    assert math.isnan(read["change_outside"])
    for name, value in first.items():
        if name not in ("prompt", "change_outside"):
            assert read[name] == value, name
            assert type(read[name]) is type(value), name


def test_about_tells_what_decides_the_pixels_and_counts(tmp_path):
    fill(tmp_path, range(5)).merge()
    told = read_about(tmp_path)
    assert told["generator"] == "anomaly_diffusion"
    assert told["base"] == {"source": "base", "fingerprint": "ab"}
    assert (told["tokens"], told["seed"]) == ("cd", 3)
    assert told["options"] == {"steps": 20, "mask": {"feather": 1.5}}
    assert told["counts"] == {
        "asked": 5, "accepted": 4, "pairs": {"tile/crack": {"asked": 5, "accepted": 4}},
        "rejections": {"nothing changed": 10, "mask: too small": 5},
    }  # fmt: skip
    assert read_trained_on(tmp_path) == sorted(LEARNT)


def test_rejected_candidates_are_kept_where_they_are_given(tmp_path):
    open_store(tmp_path).add(made(2, accepted=False), rejected={0: picture(5), 3: picture(6)})
    folder = tmp_path / "rejected" / "tile" / "crack"
    assert sorted(path.name for path in folder.iterdir()) == ["00002_0.png", "00002_3.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "00002_3.png")), picture(6))


def test_a_set_without_categories_has_no_folders_of_them(tmp_path):
    row = open_store(tmp_path).add(made(0, category=""), picture(), mask())
    assert row["image"] == "test/crack/00000.png"
    assert (tmp_path / row["mask"]).is_file()


# --- several processes, and resuming ---


def test_two_processes_leave_what_one_leaves(tmp_path):
    fill(tmp_path / "one", range(6)).merge()
    second = fill(tmp_path / "two", range(1, 6, 2), rank=1)
    first = fill(tmp_path / "two", range(0, 6, 2), rank=0)
    assert first.done() == second.done() == set(range(6))
    first.merge()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_merging_again_changes_nothing_and_later_lines_join(tmp_path):
    opened = fill(tmp_path, range(3))
    opened.merge()
    before = contents(tmp_path)
    opened.merge()
    assert contents(tmp_path) == before
    again = fill(tmp_path, range(3, 5))
    assert again.done() == set(range(5))
    again.merge()
    fill(tmp_path / "at_once", range(5)).merge()
    expected = contents(tmp_path / "at_once")
    assert {name: whole for name, whole in contents(tmp_path).items() if not name.startswith("at_once")} == expected


def test_killed_between_manifest_and_parts_nothing_is_listed_twice(tmp_path, monkeypatch):
    opened = fill(tmp_path, range(3))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            opened.merge()
    assert list((tmp_path / ".parts").iterdir())
    opened.merge()
    assert [row["number"] for row in read_manifest(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kept", [-1, -30, 40, 0])
def test_a_torn_last_line_does_not_count_and_is_written_anew(tmp_path, kept, rank):
    """`rank` 0 goes on with the torn part itself; 1 leaves it as it is."""
    fill(tmp_path, range(2))
    part = tmp_path / ".parts" / "manifest.0.csv"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept] if kept else lines[0][:-5])
    valid = {0} if kept else set()
    opened = open_store(tmp_path, rank)
    assert opened.done() == valid
    for number in {0, 1} - valid:
        opened.add(made(number), picture(number), mask(number))
    opened.add(made(2, accepted=False))
    assert opened.done() == {0, 1, 2}
    opened.merge()
    fill(tmp_path / "never_torn", range(3)).merge()
    assert (tmp_path / "manifest.csv").read_bytes() == (tmp_path / "never_torn" / "manifest.csv").read_bytes()


def test_a_process_killed_at_any_moment_leaves_a_valid_set(tmp_path):
    """A child is killed by the system; every line it left has its whole picture, and the rest is made again."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from tests import test_generation_store as t\n"
        "opened = t.open_store(Path(sys.argv[1]))\n"
        "for number in range(10**6):\n"
        "    opened.add(t.made(number), t.picture(number), t.mask(number)); print(number, flush=True)\n"
    )
    root = tmp_path / "set"
    home = str(Path(__file__).parents[1])
    child = subprocess.Popen([sys.executable, "-c", program, str(root), home], stdout=subprocess.PIPE)
    for _ in range(7):
        child.stdout.readline()
    child.kill()
    child.wait()
    child.stdout.close()
    done = open_store(root).done()
    assert done >= set(range(7))
    assert done == set(range(len(done)))
    for number in done:
        np.testing.assert_array_equal(
            np.asarray(Image.open(root / f"tile/test/crack/{number:05d}.png")), picture(number)
        )
        written = np.asarray(Image.open(root / f"tile/ground_truth/crack/{number:05d}_mask.png"))
        np.testing.assert_array_equal(written > 0, mask(number))


def test_a_set_that_another_launch_writes_is_refused_until_it_has_ended(tmp_path):
    """Its end would take away lines that the other writes meanwhile: six at once lost some of 260 pictures."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); from tests import test_generation_store as t\n"
        "opened = t.fill(Path(sys.argv[1]), range(3)); print('begun', flush=True)\n"
        "if sys.stdin.readline(): opened.merge(); print('merged', flush=True); sys.stdin.readline()\n"
    )
    root = tmp_path / "set"
    words = [sys.executable, "-c", program, str(root), str(Path(__file__).parents[1])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="is being written"):
            open_store(root)
        fill(root, range(3, 6), rank=1)  # another process of that launch
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "merged\n"
        fill(root, range(6, 9)).merge()
        other.communicate()
    assert [row["number"] for row in read_manifest(root)] == list(range(9))


def test_a_picture_without_a_line_is_overwritten(tmp_path):
    opened = open_store(tmp_path)
    place = tmp_path / "tile" / "test" / "crack" / "00000.png"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"half a pict")
    assert opened.done() == set()
    opened.add(made(0), picture(), mask())
    np.testing.assert_array_equal(np.asarray(Image.open(place)), picture())


# --- a full disk ---


def test_when_the_disk_is_full_what_is_listed_is_valid_and_it_goes_on(tmp_path, monkeypatch):
    opened = fill(tmp_path, range(2))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for module in (files, manifest):
        with monkeypatch.context() as patch:
            patch.setattr(module, "os", type("Full", (), {**vars(os), "fsync": staticmethod(full)}))
            with pytest.raises(UserError, match=r"No space left.*whole.*same command"):
                opened.add(made(2, accepted=module is files), *((picture(2), mask(2)) if module is files else ()))
        assert opened.done() == {0, 1}
        assert not [path for path in tmp_path.rglob(".*.png.*")]
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", type("Full", (), {**vars(os), "fsync": staticmethod(full)}))
        with pytest.raises(UserError, match="No space left"):
            opened.merge()
    fill(tmp_path, range(2, 3)).merge()
    assert [row["number"] for row in read_manifest(tmp_path)] == [0, 1, 2]


def test_a_line_that_only_half_fits_is_taken_back(tmp_path):
    """The system's own limit on the size of a file cuts the write, as a full disk does."""
    fill(tmp_path, range(2))
    part = tmp_path / ".parts" / "manifest.0.csv"
    before = part.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    opened = open_store(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(UserError, match="same command"):
            opened.add(made(2, accepted=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert part.read_bytes() == before


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 4}, "seed was 3, is 4"),
        ({"tokens": "ee"}, "tokens was cd, is ee"),
        ({"base": {"source": "base", "fingerprint": "xy"}}, "base.fingerprint was ab, is xy"),
        ({"options": {"steps": 20, "mask": {"feather": 2.0}}}, "options.mask.feather was 1.5, is 2.0"),
        ({"options": {"steps": 20}}, "options.mask.feather was 1.5, is None"),
    ],
)
def test_a_folder_of_another_generation_is_refused(tmp_path, change, told):
    fill(tmp_path, range(1)).merge()
    with pytest.raises(UserError, match=told):
        open_store(tmp_path, **change)


def test_a_base_that_has_moved_is_the_same(tmp_path):
    fill(tmp_path, range(1)).merge()
    assert open_store(tmp_path, base={"source": "/elsewhere/base", "fingerprint": "ab"}).done() == {0}


def test_pictures_learnt_from_belong_to_what_a_generation_is(tmp_path):
    open_store(tmp_path)
    GeneratedStore(tmp_path, about(), reversed(LEARNT))  # their order does not
    with pytest.raises(UserError, match="trained_on"):
        GeneratedStore(tmp_path, about(), LEARNT[:1])


def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no generated data set, but holds train"):
        open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize(
    "change", [{"defect_type": "../x"}, {"defect_type": ""}, {"category": ".."}, {"category": "a/b"}]
)
def test_names_that_are_no_folders_are_refused(tmp_path, change):
    with pytest.raises(UserError, match="rename"):
        open_store(tmp_path).add(made(0, **change), picture(), mask())


def test_an_accepted_picture_needs_a_mask_of_its_size_or_none_and_another_has_neither(tmp_path):
    opened = open_store(tmp_path)
    refused = [(made(0),), (made(0), None, mask()), (made(0, accepted=False), picture(), mask())]
    for arguments in [*refused, (made(0, accepted=False), None, mask())]:
        with pytest.raises(ValueError, match="neither them nor a mask"):
            opened.add(*arguments)
    with pytest.raises(ValueError, match="does not fit"):
        opened.add(made(0), picture(), mask()[:-1])
    assert opened.done() == set()


def test_a_picture_may_have_no_mask(tmp_path):
    opened = open_store(tmp_path)
    opened.add(made(0, defect_type="good"), picture())
    opened.add(made(1, category="", defect_type="defective 1/3"), picture(1))
    rows = opened.merge()
    assert [(row["image"], row["mask"]) for row in rows] == [
        ("tile/test/good/00000.png", ""), ("test/defective 1_3/00001.png", ""),
    ]  # fmt: skip
    assert [row["defect_type"] for row in read_manifest(tmp_path)] == ["good", "defective 1/3"]
    assert not (tmp_path / "tile/ground_truth").exists()
    (tmp_path / "tile/test/good/00000.png").unlink()
    with pytest.raises(DataError, match=r"good/00000\.png is not there"):
        read_manifest(tmp_path)


def test_sets_from_before_there_was_editing_are_read_and_gone_on_with(tmp_path):
    """They have no columns `mode` to `retried`."""

    def older(path):
        lines = path.read_text().splitlines()
        path.write_text("".join(",".join(line.split(",")[: 27 - len(NAMES)]) + "\n" for line in lines))

    fill(tmp_path, range(2))
    older(tmp_path / ".parts/manifest.0.csv")
    fill(tmp_path, range(2, 3)).merge()
    rows = read_manifest(tmp_path)
    assert [row["number"] for row in rows] == [0, 1, 2]
    assert [(row["mode"], row["retried"]) for row in rows] == [("", 0), ("", 0), ("inpaint", 2)]
    assert [math.isnan(row["seam"]) for row in rows] == [True, True, False]
    older(tmp_path / "manifest.csv")
    assert [row["mode"] for row in read_manifest(tmp_path)] == ["", "", ""]
    assert [row["reason"] for row in read_manifest(tmp_path)] == ["", "", "nothing changed"]


def test_no_generated_data_set(tmp_path):
    with pytest.raises(DataError, match=r"no about\.json"):
        read_manifest(tmp_path)
    with pytest.raises(DataError, match=r"trained_on\.csv is not there"):
        read_trained_on(tmp_path)
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)
    (tmp_path / "about.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match="not of a generated data set"):
        read_manifest(tmp_path)


def test_a_generation_that_has_not_finished_is_told(tmp_path):
    fill(tmp_path, range(1))
    with pytest.raises(DataError, match="has not finished; run the same command again"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.png", "/etc/hostname", "tile/../../outside.png", "link/outside.png", "", "."]
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, name):
    root = tmp_path / "set"
    fill(root, range(1)).merge()
    (tmp_path / "outside.png").write_bytes(b"")
    (root / "link").symlink_to(tmp_path)
    table = (root / "manifest.csv").read_text().replace("tile/test/crack/00000.png", name)
    (root / "manifest.csv").write_text(table)
    with pytest.raises(DataError, match="is not in"):
        read_manifest(root)


def test_a_missing_picture_or_mask_is_named(tmp_path):
    fill(tmp_path, range(2)).merge()
    (tmp_path / "tile/ground_truth/crack/00001_mask.png").unlink()
    with pytest.raises(DataError, match=r"00001_mask\.png is not there"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("number,", "id,", "other columns"),
        (",20,", ",twenty,", r"manifest\.csv:2 is damaged"),
        (",1,,inpaint,", ",yes,,inpaint,", r"manifest\.csv:2 is damaged"),
        ('"{""nothing', '"[""nothing', r"manifest\.csv:2 is damaged"),
        (",paper,", ",", r"manifest\.csv:2 is damaged"),
        (",-0.25,2", "", r"manifest\.csv:2 is damaged"),
        ("mode,most_outside,", "", "other columns"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, old, new, told):
    fill(tmp_path, range(2)).merge()
    table = (tmp_path / "manifest.csv").read_text()
    assert old in table
    (tmp_path / "manifest.csv").write_text(table.replace(old, new, 1))
    with pytest.raises(DataError, match=told):
        read_manifest(tmp_path)


def test_a_manifest_saved_by_a_spreadsheet_is_read(tmp_path):
    fill(tmp_path, range(3)).merge()
    expected = [{k: v for k, v in row.items() if k != "change_outside"} for row in read_manifest(tmp_path)]
    text = (tmp_path / "manifest.csv").read_text()
    (tmp_path / "manifest.csv").write_text("\ufeff" + text.replace("\n", "\r\n") + "\r\n", newline="")
    read = [{k: v for k, v in row.items() if k != "change_outside"} for row in read_manifest(tmp_path)]
    assert read == expected


def test_reading_a_manifest_needs_no_torch():
    program = f"import sys; import {store.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=False).returncode == 0
