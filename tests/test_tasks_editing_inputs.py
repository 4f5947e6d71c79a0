"""What goes into an editing: references, captions, masks of some pictures only, pictures that cannot be edited."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from lit_defect.editing.options import Edit
from lit_defect.errors import UserError
from lit_defect.tasks.edit_inputs import EditInputs
from lit_defect.tasks.editing_plan import EditJob
from tests.anomaly_diffusion import make_base, make_parts, parts
from tests.editing import QUICK, edited, editor

JOB = EditJob(0, 0, "good", ("tile", "crack"), (0, 0, 0))


class Given(NamedTuple):
    root: Path
    base: Path


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    folder = tmp_path_factory.mktemp("inputs")
    return Given(make_parts(folder / "parts"), make_base(folder / "base"))


@pytest.fixture(autouse=True)
def _off_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Task(NamedTuple):
    """What `EditInputs` wants of an editor."""

    data: Any
    edit: Edit
    mode: str
    device: str = "cpu"


def inputs(given: Given, mode: str = "inpaint", data: dict[str, Any] | None = None, **edit: Any) -> EditInputs:
    module = parts(given.root, **(data or {}))
    module.setup("fit")
    return EditInputs(Task(module, Edit(**{**QUICK, **edit}), mode), "train", [("tile", "crack")], 8)


# --- references ---


@pytest.mark.parametrize("stretch", [False, True])
def test_references_keep_their_aspect(given, tmp_path, stretch):
    """A square one, followed in a frame twice as wide as high."""
    square = np.zeros((40, 40, 3), np.uint8)
    square[:, :20] = 255  # its left half
    Image.fromarray(square).save(tmp_path / "one.png")
    made = inputs(given, "reference_only", references=str(tmp_path), size=(32, 64), stretch=stretch)
    frame = made.frame(np.zeros((40, 80, 3), np.uint8), None)
    reference = made._reference(JOB, frame)
    assert reference.shape == (3, 32, 64)
    white = (reference[0].mean(0) > 0.5).int().tolist()
    assert white[:32] == ([1] * 32 if stretch else [1] * 16 + [0] * 16)


# --- captions ---


def test_a_captioner_without_a_place_for_its_words_is_refused(given):
    with pytest.raises(UserError, match=r"edit\.captioner = owner/name: no model\.init_args\.edit\.prompt has a"):
        inputs(given, "img2img", captioner="owner/name")


# --- sets that are cut short ---


@pytest.mark.parametrize("limit", [1, 0.5])
def test_half_a_set_is_refused(given, tmp_path, limit):
    with pytest.raises(UserError, match=r"trainer\.limit_predict_batches would leave half a set .*edit\.count instead"):
        edited(editor(given.base, result="crack"), parts(given.root), tmp_path / "set", limit_predict_batches=limit)
    assert not (tmp_path / "set").exists()


def test_an_unknown_foreground_names_the_option_of_the_editor(given):
    with pytest.raises(UserError, match=r"model\.init_args\.edit\.foreground = nowhere: expected auto, all"):
        inputs(given, foreground="nowhere")
