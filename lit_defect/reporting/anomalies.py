"""Pictures of anomaly detection: what was missed, flagged and found, and what the pseudo-anomalies look like.

Two sheets. `anomaly_gallery` shows each test picture, its marked defect, and its score map in colours that mean
the same in every row; `choose` names the pictures worth showing. `pseudo_anomaly_sheet` shows what a generator
made of a normal picture. Pictures are (H, W, 3) uint8 as a person would look at them, never normalised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw

from lit_defect.reporting.differences import difference, gain_of
from lit_defect.reporting.maps import CONTOUR, Scale, colour_scale, outline, overlay
from lit_defect.reporting.sheets import LINE, Cell, Picture, Words, fit, font, sheet
from lit_defect.reporting.style import DEFECTIVE, GOOD, INK, MUTED

MARKED = "#00E58F"  # the line around a marked defect
_THICK = 2  # pixels of a line in a gallery, whatever the picture's own size


@dataclass(frozen=True)
class AnomalyTile:
    """One test picture.

    Attributes:
        picture: (H, W, 3) uint8.
        scores: (h, w) score map on the scorer's own scale, stretched to the picture; None where there is none.
        mask: (H, W), not 0 on the defect; None where the data set has none.
        name: of the file.
        defect_type: `good`, or the kind of defect.
        is_defect: the truth.
        score: of the whole picture.
        rejected: the decision; None without a threshold.
    """

    picture: Picture
    scores: NDArray[np.floating] | None
    mask: NDArray[Any] | None
    name: str
    defect_type: str
    is_defect: bool
    score: float
    rejected: bool | None = None

    @property
    def decision(self) -> str:
        """What became of it, in one word or two."""
        if self.rejected is None:
            return "no threshold"
        words = ("escaped", "found") if self.is_defect else ("passed", "false alarm")
        return words[bool(self.rejected)]


@dataclass(frozen=True)
class PseudoTile:
    """One pseudo-anomaly beside what it was made of.

    Attributes:
        source: (H, W, 3) uint8.
        changed: (H, W, 3) uint8, the pseudo-anomaly.
        mask: (H, W), not 0 on the changed pixels.
        ssim: structural similarity of the two, in the scope that the gate looks at; nan without a gate.
        area: share of the picture that was edited.
        accepted: whether the gate let it through.
        name: of the source, or of the generator.
    """

    source: Picture
    changed: Picture
    mask: NDArray[Any]
    ssim: float
    area: float
    accepted: bool
    name: str = ""


class Choice(NamedTuple):
    """Positions of pictures worth looking at."""

    escapes: NDArray[np.int64]
    false_alarms: NDArray[np.int64]
    found: NDArray[np.int64]


def choose(scores: ArrayLike, is_defect: ArrayLike, threshold: float, count: int) -> Choice:
    """At most `count` positions of each kind, the most telling first.

    Args:
        scores: (n,) of the pictures.
        is_defect: (n,) the truth.
        threshold: a picture is rejected when its score reaches it.
        count: at most so many of each.

    Returns:
        Escaped defects, the lowest score first; good pictures rejected and defects found, the highest first.
    """
    score, defect = np.asarray(scores, dtype=np.float64), np.asarray(is_defect, dtype=bool)
    rising = np.argsort(score, kind="stable")
    falling = np.argsort(-score, kind="stable")
    rejected = score >= threshold
    return Choice(
        rising[(defect & ~rejected)[rising]][:count],
        falling[(~defect & rejected)[falling]][:count],
        falling[(defect & rejected)[falling]][:count],
    )


def anomaly_gallery(
    tiles: Sequence[AnomalyTile],
    *,
    title: str,
    scale: Scale | None = None,
    threshold: float | None = None,
    columns: int = 2,
    size: int = 200,
) -> Image.Image:
    """Draw for each picture: itself, the marked defect, the score map; below, name, type, score and decision.

    Args:
        tiles: in the order of reading; without any, the gallery says that there is nothing to show.
        title: above all.
        scale: scores at which the colours begin and end, the same for all; without it, `colour_scale` of these
            maps. Give one where several galleries are to be compared.
        threshold: on a pixel's score; a line is drawn around what reaches it.
        columns: samples in a row, at most.
        size: side in pixels of the square into which each picture is fitted.
    """
    maps = [tile.scores for tile in tiles if tile.scores is not None]
    marks = any(tile.mask is not None and np.any(tile.mask) for tile in tiles)
    span = (scale or colour_scale(maps)) if maps else None
    cells = [_anomaly_cell(tile, span, threshold, marks, size) for tile in tiles]
    key = _colour_key(span, threshold, marks) if span else None
    return sheet(cells, title=title, columns=columns, size=size, key=key)


def pseudo_anomaly_sheet(tiles: Sequence[PseudoTile], *, title: str, columns: int = 2, size: int = 180) -> Image.Image:
    """Draw for each: source, pseudo-anomaly, its changed pixels, the difference enlarged; below, SSIM and area.

    Args:
        tiles: in the order of reading; without any, the sheet says that there is nothing to show.
        title: above all.
        columns: samples in a row, at most.
        size: side in pixels of the square into which each picture is fitted.
    """
    gain = gain_of((tile.source, tile.changed) for tile in tiles)
    cells = [_pseudo_cell(tile, gain) for tile in tiles]
    text = f"source, pseudo-anomaly, changed pixels, difference \N{MULTIPLICATION SIGN} {gain:g} (grey: unchanged)"
    return sheet(cells, title=title, columns=columns, size=size, key=_text_key(text) if tiles else None)


def _anomaly_cell(tile: AnomalyTile, scale: Scale | None, threshold: float | None, marks: bool, size: int) -> Cell:
    picture = fit(tile.picture, size)  # lines are drawn at the size of the sheet, so that they stay as thick
    panels: list[Picture | str] = [picture]
    if marks:
        marked = tile.mask is not None and np.any(tile.mask)
        panels.append(outline(picture, _fit_mask(tile.mask, picture), MARKED, _THICK) if marked else "nothing marked")
    if scale is not None:
        panels.append("no map")
    if scale is not None and tile.scores is not None:
        panels[-1] = overlay(picture, tile.scores, scale=scale, threshold=threshold, line=_THICK)
    wrong = tile.rejected is not None and tile.rejected != tile.is_defect
    caption = (
        [Words(tile.name, MUTED, shrink=True)],
        [
            Words(tile.defect_type, bold=True, shrink=True),
            Words(f"   score {tile.score:.4g}"),
            *([] if tile.rejected is None else [Words(f", {tile.decision}", DEFECTIVE if wrong else GOOD)]),
        ],
    )
    return Cell(panels, caption)


def _pseudo_cell(tile: PseudoTile, gain: float) -> Cell:
    if tile.source.shape != tile.changed.shape or np.shape(tile.mask) != tile.source.shape[:2]:
        shapes = tile.source.shape, tile.changed.shape, np.shape(tile.mask)
        raise ValueError(f"source, pseudo-anomaly and mask differ in size: {shapes}")
    measured = math.isfinite(tile.ssim)
    refused = Words("rejected: too alike" if measured else "rejected: nothing changed", DEFECTIVE)
    similarity = f"SSIM {tile.ssim:.3f}   " if measured else ""
    verdict = Words("accepted", GOOD) if tile.accepted else refused
    caption = [Words(f"{similarity}area {100 * tile.area:.2g} %   "), verdict]
    lines = ([Words(tile.name, MUTED, shrink=True)], caption) if tile.name else (caption,)
    return Cell(
        [tile.source, tile.changed, _tint(tile.changed, tile.mask), difference(tile.source, tile.changed, gain)], lines
    )


def _tint(picture: Picture, mask: NDArray[Any]) -> Picture:
    """The picture pale and grey, the mask in colour."""
    pale = np.repeat(np.minimum(128 + picture.mean(axis=2, keepdims=True) / 2, 255), 3, axis=2)
    colour = np.array([int(DEFECTIVE[i : i + 2], 16) for i in (1, 3, 5)])
    inside = np.asarray(mask, dtype=bool)[..., None]
    return np.rint(np.where(inside, 0.25 * pale + 0.75 * colour, pale)).astype(np.uint8)


def _fit_mask(mask: Any, picture: Picture) -> NDArray[np.bool_]:
    """The mask at the picture's size; what is thinner than a pixel there counts as one."""
    height, width = picture.shape[:2]
    whole = Image.fromarray((np.asarray(mask) != 0).astype(np.float32))
    return np.asarray(whole.resize((width, height), Image.Resampling.BOX)) > 1e-6


def _colour_key(scale: Scale, threshold: float | None, marks: bool) -> Image.Image:
    """The colours with their scores, and what the panels and lines are."""
    text = f"picture{', marked defect' if marks else ''}, score map:"
    key = _text_key(text, room=420)
    draw = ImageDraw.Draw(key)
    x = font().getlength(text) + 10
    low, high = (f"{end:.3g}" for end in scale)
    draw.text((x, 0), low, font=font(), fill=INK)
    x += font().getlength(low) + 6
    ramp = np.tile((matplotlib.colormaps["inferno"](np.linspace(0, 1, 140))[:, :3] * 255).astype(np.uint8), (12, 1, 1))
    key.paste(Image.fromarray(ramp), (round(x), 3))
    draw.text((x + 146, 0), high, font=font(), fill=INK)
    if threshold is not None:
        x += 146 + font().getlength(high) + 18
        draw.rectangle((x, 7, x + 22, 9), fill=CONTOUR, outline=None)
        draw.text((x + 28, 0), f"reaches {threshold:.3g}", font=font(), fill=INK)
    return key


def _text_key(text: str, room: int = 0) -> Image.Image:
    key = Image.new("RGB", (round(font().getlength(text)) + room, LINE), "white")
    ImageDraw.Draw(key).text((0, 0), text, font=font(), fill=INK)
    return key
