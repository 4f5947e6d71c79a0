"""Sheets and tables of edited pictures, and the command that puts sets side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import run
from typing import Any, cast, get_type_hints

import numpy as np
import pytest
from PIL import Image

from lit_defect.generation.manifest import Made
from lit_defect.generation.store import About, GeneratedStore
from lit_defect.reporting import edit_sheets, editing
from lit_defect.reporting.differences import difference, gain_of
from lit_defect.reporting.edit_sheets import EditTile, close_up, edit_sheet, joined_sheet
from lit_defect.reporting.edit_tables import SPARE, TAKEN, candidates_figure, numbers_table, outcomes, reasons_table
from tests.fakes import save
from tests.test_reporting_figures import assert_inside, texts

LINE = {
    "number": 0, "source": "train/good/000.png", "defect_type": "hole", "mode": "inpaint", "prompt": "a hole",
    "sampler": "Euler a", "steps": 40, "strength": 0.4, "guidance": 7.0, "candidates": 3, "rejected": {},
    "change_inside": 12.34, "change_outside": 0.81, "most_outside": 14.0, "most_after": 3.0, "share_changed": 0.01, "seam": 1.25,
    "retried": 0, "accepted": True, "reason": "",
}  # fmt: skip


def tile(shift: int = 40, **line: Any) -> EditTile:
    """20 x 10 pixels at (5, 30) brighter by `shift`, and one other pixel by 3."""
    source = np.full((60, 80, 3), 100, np.uint8)
    mask = np.zeros((60, 80), bool)
    mask[5:25, 30:40] = True
    result = source.copy()
    result[mask] += np.uint8(shift)
    result[50, 70, 1] += 3
    return EditTile(source, result, mask, LINE | line)


def written(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The cells that a sheet is drawn of."""
    cells: list[Any] = []
    monkeypatch.setattr(edit_sheets, "sheet", lambda found, **_: cells.extend(found))
    make()
    return cells


def words(cell: Any) -> list[str]:
    return ["".join(part.text for part in line) for line in cell.caption]


# --- pictures ---


def test_a_difference_is_signed_and_enlarged():
    source, result = np.full((1, 3, 3), 100, np.uint8), np.array([[[100] * 3, [105] * 3, [0] * 3]], np.uint8)
    np.testing.assert_array_equal(difference(source, result, 4)[0, :, 0], [128, 148, 0])
    assert gain_of([(source, source)]) == 1
    assert gain_of([(source, source + np.uint8(3))]) == 32  # 42 would fit, no more is drawn
    assert gain_of([(source, source + np.uint8(20))]) == 4
    with pytest.raises(ValueError, match="compared"):
        difference(source, result[:, :2], 1)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((5, 25), (30, 40), ((0, 32), (19, 51))),  # 1.6 x 20 pixels, shifted down from the edge
        ((58, 60), (78, 80), ((36, 60), (56, 80))),  # 24 at least
        ((0, 60), (10, 70), ((0, 60), (0, 80))),  # all there is
    ],
)
def test_a_close_up_is_a_square_around_the_mask_within_the_picture(rows, columns, expected):
    mask = np.zeros((60, 80), bool)
    mask[slice(*rows), slice(*columns)] = True
    box = close_up(mask)
    assert box is not None
    assert tuple((part.start, part.stop) for part in box) == expected
    assert close_up(mask & False) is None
    assert close_up(None) is None


def test_a_row_shows_source_mask_result_difference_and_both_close_up(monkeypatch):
    (cell,) = written(lambda: edit_sheet([tile()], title="One", size=80), monkeypatch)
    source, masked, result, differs, near, near_result = cell.panels
    np.testing.assert_array_equal(source, tile().source)
    np.testing.assert_array_equal(result, tile().result)
    assert (masked[~tile().mask] != 100).any()
    assert (masked[tile().mask] == 100).all(), "the outline leaves the defect free"
    assert (differs[tile().mask] == 128 + 2 * 40).all()
    assert near.shape == near_result.shape == (80, 80, 3)
    assert (near == 100).all()
    assert 0.15 < (near_result[..., 0] > 130).mean() < 0.25  # 200 of 32 x 32 pixels
    heading, origin, changes = words(cell)
    assert heading == "inpaint   hole   a hole"
    assert origin == "train/good/000.png   Euler a, 40 steps, strength 0.4, guidance 7"
    assert changes == (
        "change inside 12.3, outside 0.8 (at most 14) before the paste, at most 3 in the result;   seam 1.2   accepted"
    )


def test_rows_are_sorted_by_function_and_type_and_lines_may_know_little(monkeypatch):
    old = {"source": "a.png", "defect_type": "hole", "accepted": False, "reason": "nothing changed"}
    tiles = [
        tile(mode="reference_only"),
        tile(defect_type="crack"),
        EditTile(tile().source, None, None, old, "x"),
        tile(),
    ]
    cells = written(lambda: edit_sheet(tiles, title="Some"), monkeypatch)
    assert [words(cell)[0] for cell in cells] == [
        "inpaint   crack   a hole", "inpaint   hole   a hole", "reference_only   hole   a hole", "x   hole   ",
    ]  # fmt: skip
    assert cells[-1].panels[1:] == ["mask not kept", "none accepted", "", "", ""]
    assert words(cells[-1])[1:] == [
        "a.png   ",
        "change inside -, outside - (at most -) before the paste, at most - in the result;   seam -   "
        "rejected: nothing changed",
    ]


def test_functions_stand_side_by_side_on_one_source(monkeypatch):
    whole = EditTile(tile().source, tile().result, None, LINE | {"mode": "img2img"})
    cells = written(lambda: joined_sheet([[whole, tile(), None], [None] * 3], title="All", size=64), monkeypatch)
    assert words(cells[1])[-1] == "accepted"
    assert edit_sheets._masked(whole, 64) == "no mask"
    assert [words(cell)[0] for cell in cells] == ["source", "img2img   hole", "inpaint   hole", ""]
    assert words(cells[2])[1:] == ["inside 12.3; outside 14 \N{RIGHTWARDS ARROW} 3; seam 1.2", "accepted"]
    near = [cell.panels[where] for cell, where in zip(cells[:3], (2, 1, 1), strict=True)]
    np.testing.assert_array_equal(near[1], near[2]), "without a mask, the other's window"
    assert (near[0] == 100).all()
    assert cells[3].panels == ["not asked"]


def test_sheets_are_drawn():
    image = np.asarray(edit_sheet([tile(), tile(shift=0)], title="Two"))
    assert image.std() > 5
    assert np.asarray(joined_sheet([[tile(), None]], title="One")).std() > 5
    assert np.asarray(edit_sheet([], title="None")).std() > 5
    assert np.asarray(joined_sheet([], title="None")).std() > 5


# --- numbers ---


ROWS = [
    LINE | {"rejected": {"nothing changed": 1}, "most_after": 0.0},
    LINE | {"change_inside": 14.34, "most_after": 2.0, "retried": 1},
    LINE | {"accepted": False, "rejected": {"nothing changed": 1, "label mostly lost": 2}, "change_inside": 99.0},
]


def test_every_candidate_has_one_outcome():
    assert outcomes(ROWS) == {TAKEN: 2, SPARE: 3, "nothing changed": 2, "label mostly lost": 2}
    assert sum(outcomes(ROWS).values()) == sum(row["candidates"] for row in ROWS)


def test_numbers_are_those_of_the_accepted_pictures():
    lines = numbers_table({"inpaint": ROWS, "img2img": [{**ROWS[2], "defect_type": "crack"}, *ROWS[:1]]}).splitlines()
    assert lines[2] == "| inpaint | 2 | 3 | 9 | 13.34 ± 1.41 | 0.81 ± 0.00 | 14 | 2 | 1.00 ± 0.00 | 1.25 ± 0.00 | 1 |"
    assert lines[3].startswith("| img2img | 1 | 2 | 6 | 12.34 | 0.81 | 14 | 0 |")
    assert lines[4].startswith("| img2img: crack | 0 | 1 | 3 | - |")
    assert lines[5].startswith("| img2img: hole | 1 | 1 | 3 | 12.34 |")
    table = reasons_table({"inpaint": ROWS, "img2img": ROWS[:1]})
    assert "| nothing changed | 2 | 1 |" in table
    assert "| label mostly lost | 2 | 0 |" in table


def test_the_figure_has_a_bar_for_each_function_of_all_its_candidates():
    figure = candidates_figure({"inpaint": ROWS, "img2img": ROWS[:1]})
    (axes,) = figure.axes
    bars: dict[float, float] = {}
    for bar in axes.patches:
        bars[bar.get_y()] = bars.get(bar.get_y(), 0) + bar.get_width()
    assert [bars[y] for y in sorted(bars)] == [3, 9]
    assert {"taken", "nothing changed", "label mostly lost"} <= set(texts(figure))
    assert_inside(figure)


# --- the command ---


def make_set(root: Path, sources: Sequence[str], pictures: Path, shift: int, **line: Any) -> Path:
    """An accepted hole on each source but the last, of which a rejected candidate was kept."""
    about = About("editor", {"source": "b", "fingerprint": "f"}, "t", {"shift": shift}, 0)
    store = GeneratedStore(root, about, [])
    blank: dict[str, Any] = {name: kind() for name, kind in get_type_hints(Made).items() if kind in (int, float, str)}
    for number, name in enumerate(sources):
        source = np.asarray(Image.open(pictures / name).convert("RGB"))
        mask = np.zeros(source.shape[:2], bool)
        mask[4:12, 6:14] = True
        result = np.where(mask[..., None], np.uint8(shift), source)
        accepted = name != sources[-1]
        known = {"number": number, "source": name, "accepted": accepted, "rejected": {"nothing changed": 1}}
        made = cast(Made, blank | {key: value for key, value in LINE.items() if key in blank} | known | line)
        if accepted:
            store.add(made, result, mask)
        else:
            store.add(made, rejected={1: result})
    store.merge()
    return root


@pytest.fixture
def real(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(4):
        save(rng.integers(80, 120, (30, 40)).astype(np.uint8), tmp_path / "real" / "train" / "good" / f"{i}.png")
    return tmp_path / "real"


def names(real: Path) -> list[str]:
    return [path.relative_to(real).as_posix() for path in sorted(real.rglob("*.png"))]


def test_the_command_joins_sets_and_prints_their_numbers(tmp_path, real, capsys):
    make_set(tmp_path / "run" / "edited", names(real), real, 20, category="tile")
    make_set(tmp_path / "b", names(real)[1:], real, 200, category="tile")
    given = [f"dark={tmp_path / 'run'}", f"very bright={tmp_path / 'b'}", "--real", str(real), "--count", "2"]
    assert editing.main(given) == 0
    folder = tmp_path / "run" / "figures"
    assert {path.name for path in folder.iterdir()} == {
        "edits.png", "edits_dark.png", "edits_very_bright.png", "candidates.png", "edits.md",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "| dark | 3 | 4 | 12 | 12.34 ± 0.00 |" in printed
    assert "| very bright | 2 | 3 | 9 |" in printed
    assert (folder / "edits.md").read_text() in printed


def test_sources_of_most_sets_come_first_and_accepted_pictures_stand_for_them(tmp_path, real):
    roots = [
        make_set(tmp_path / "a", [*names(real), names(real)[-1]], real, 20),  # the last one is asked for twice
        make_set(tmp_path / "b", names(real)[1:], real, 200),
    ]
    sets = editing.read_sets([f"a={roots[0]}", f"b={roots[1]}"], real)
    rows = editing.joined(sets, 4)
    asked = [[None if part is None else part.made["source"] for part in row] for row in rows]
    first, *others = names(real)
    assert asked == [*([name, name] for name in others), [first, None]]
    rejected = rows[2][1]
    assert rejected is not None
    assert rejected.made["accepted"] is False
    assert rejected.result is not None, "the candidate that was kept"
    assert (rejected.result[4:12, 6:14] == 200).all()


def test_each_type_has_its_rows(tmp_path, real):
    (part,) = editing.read_sets([str(make_set(tmp_path / "set", names(real), real, 20))], real)
    both = editing.EditedSet("a", part.root, real, [*part.rows, *(row | {"defect_type": "crack"} for row in part.rows)])
    found = [row[0].made["defect_type"] for row in editing.joined([both], 2) if row[0] is not None]
    assert found == ["hole", "hole", "crack", "crack"]
    assert [(row["defect_type"], row["number"]) for row in both.first(1)] == [("hole", 0), ("crack", 0)]


def test_crops_and_mirrored_pictures_are_cut_as_their_names_say(real):
    name = names(real)[0]
    whole = np.asarray(Image.open(real / name).convert("RGB"))
    np.testing.assert_array_equal(editing._source(real, f"{name}#3,5,20,10"), whole[5:15, 3:23])
    np.testing.assert_array_equal(editing._source(real, f"{name}#mirrored"), whole[:, ::-1])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{set}", "{set}"], "name of several sets"),
        (["{real}"], "is no generated data set"),
        (["{set}", "--real", "{set}"], "is --real the data set"),
        (["{set}", "--real", "{other}"], "different sizes"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, real, capsys, words, told):
    made = make_set(tmp_path / "set", names(real), real, 20)
    other = tmp_path / "other"
    for name in names(real):
        save(np.zeros((10, 10), np.uint8), other / name)
    given = [word.format(set=made, real=real, other=other) for word in words]
    assert editing.main(["--real", str(real), *given]) == 2
    assert told in capsys.readouterr().err


def test_sheets_need_no_torch():
    code = "import lit_defect.reporting.editing, sys; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
