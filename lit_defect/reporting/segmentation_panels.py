"""Sheets of masks over their pictures: input, truth, stage 1, refined, uncertainty; and masks as files.

Masks of two classes show right, missed and false pixels in three colours, and a ring around what is too small to be
seen. With more classes each has its colour, background lets the picture through, and wrong pixels are hatched.
Void pixels, which no figure counts, are grey with white lines. Where a picture is made smaller, a region thinner than
a pixel of the sheet is drawn as one pixel, rare classes above frequent ones.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from lit_defect.files import whole_file
from lit_defect.reporting.maps import Scale, outline, overlay
from lit_defect.reporting.sheets import LINE, SEAM, Cell, Picture, Words, fit, font, sheet
from lit_defect.reporting.style import DEFECTIVE, GOOD, INK, MUTED

Colour = tuple[int, int, int]
Mask = NDArray[np.integer[Any]]

VOID = 255
RIGHT, MISSED, FALSE = 1, 2, 3  # what a pixel of a two-class mask is; 0 is background that was seen as such
STATES = {RIGHT: "right", MISSED: "missed", FALSE: "false alarm"}

# Okabe & Ito (2008), then, one by one, the colour that is farthest (CIEDE2000) from all before it, from black, grey
# and white, to readers without and with protanopia or deuteranopia (Machado et al. 2009).
_COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#880000", "#004444", "#EECCAA",
    "#2200CC", "#006644", "#4488FF", "#22EEFF", "#004466", "#FF0066", "#AA4400", "#88CCCC", "#886688", "#FF88AA",
    "#6600FF", "#88CC66", "#CC00AA", "#CCEE88",
)  # fmt: skip
_STATE_COLOURS = {RIGHT: "#56B4E9", MISSED: "#F0E442", FALSE: "#D55E00"}
_VOID_COLOUR: Colour = (224, 224, 192)  # that of VOC's own masks
_VOID_GREY = 140
_SMALL, _RINGS = 60, 12  # pixels of the sheet: a region below gets a ring; rings in a panel, at most
_RING = "#FFFFFF"
_DARK = 50  # grey below which the hatching is white
_SWATCH = 13


@dataclass(frozen=True)
class PanelRow:
    """One picture with its masks; class ids, 255 is void.

    Attributes:
        picture: (H, W, 3) uint8.
        truth: (H, W).
        stage1: (H, W) labels of stage 1, or of a segmenter that stands alone.
        refined: (H, W) labels of the refiner; None where there is none.
        uncertainty: (h, w), higher is less sure, stretched to the picture; None where there is none.
        name: of the file.
        iou_before: of stage 1, nan where undefined.
        iou_after: of the refined labels, nan where undefined.
    """

    picture: Picture
    truth: Mask
    stage1: Mask
    refined: Mask | None = None
    uncertainty: NDArray[np.floating[Any]] | None = None
    name: str = ""
    iou_before: float = math.nan
    iou_after: float = math.nan


def panel_sheet(rows: Sequence[PanelRow], class_names: Sequence[str], *, title: str, size: int = 200) -> Image.Image:
    """Draw the rows below each other; columns that no row fills are left out.

    Args:
        rows: in the order of reading; without any, the sheet says that there is nothing to show.
        class_names: of the mask ids; the first is the background.
        title: above all.
        size: side in pixels of the square into which each panel is fitted.

    Raises:
        ValueError: a mask that is not as large as its picture.
    """
    refined = any(row.refined is not None for row in rows)
    unsure = [row.uncertainty for row in rows if row.uncertainty is not None]
    scale = _uncertainty_scale(unsure) if unsure else None
    heads = ["picture", "truth", "stage 1" if refined else "predicted"]
    heads += ["refined"] * refined + ["uncertainty"] * bool(unsure)
    cells = [_cell(row, len(class_names), refined, scale, size) for row in rows]
    width = len(heads) * (size + SEAM) - SEAM
    key = _key(rows, class_names, heads, scale, width) if rows else None
    return sheet(cells, title=title, columns=1, size=size, key=key)


def palette(classes: int) -> list[Colour]:
    """A colour (R, G, B) for each class, the background black; told apart by colour-blind readers as far as can be."""
    colours: list[Colour] = [(0, 0, 0), *map(_rgb, _COLOURS)]
    for i in range(classes - len(colours)):  # more classes than any reader tells apart: hues by the golden angle
        red, green, blue = colorsys.hsv_to_rgb(0.618034 * i % 1, (0.9, 0.5)[i % 2], (0.6, 0.95)[i // 2 % 2])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours[:classes]


def colour_mask(mask: ArrayLike, classes: int) -> Picture:
    """Class ids (H, W), 255 void, as a picture (H, W, 3) uint8 in the colours of `palette`."""
    ids = _class_ids(mask)
    table = np.full((256, 3), _VOID_COLOUR, dtype=np.uint8)
    table[: min(classes, VOID)] = palette(min(classes, VOID))
    return table[ids]


def overlay_mask(picture: Picture, mask: ArrayLike, classes: int) -> Picture:
    """The picture (H, W, 3), grey, under the colours of its mask (H, W), the background clear."""
    return _fill(picture, _class_ids(mask), dict(enumerate(palette(classes)[1:], 1)), 0.5)


def write_mask_png(path: Path, mask: ArrayLike) -> Path:
    """Write class ids (H, W), 255 void, as VOC does: a palette PNG whose indices are the ids; folders are made.

    A reader sees the whole file or none. Viewers show VOC's own colours, in which neighbouring ids differ strongly.

    Raises:
        ValueError: not a (H, W) mask of ids 0 to 255.
    """
    image = Image.fromarray(_class_ids(mask))
    image.putpalette(_voc_colours().tobytes())
    with whole_file(path) as file:
        image.save(file, format="PNG", optimize=True)
    return path


def _cell(row: PanelRow, classes: int, refined: bool, scale: Scale | None, size: int) -> Cell:
    for mask in (row.truth, row.stage1, row.refined):
        if mask is not None and np.shape(mask) != row.picture.shape[:2]:
            raise ValueError(f"{row.name}: mask {np.shape(mask)} and picture {row.picture.shape[:2]} differ in size")
    picture = fit(row.picture, size)
    panels: list[Picture | str] = [picture]
    draw = _draw_states if classes == 2 else _draw_classes
    for mask in (row.truth, row.stage1, row.refined):
        if mask is not None:
            panels.append(draw(picture, np.asarray(mask), np.asarray(row.truth), classes))
        elif refined:
            panels.append("not refined")
    if scale is not None:
        panels.append("none")
        if row.uncertainty is not None:
            panels[-1] = overlay(picture, row.uncertainty, scale=scale)
    return Cell(panels, ([*_iou_words(row), Words(row.name, MUTED, shrink=True)],))


def _iou_words(row: PanelRow) -> list[Words]:
    """`IoU 41.2 % → 63.0 %, +21.8   `."""
    before, after = row.iou_before, row.iou_after
    if row.refined is None or math.isnan(before) or math.isnan(after):
        value = before if row.refined is None else after
        return [Words("no IoU: the class is not in the truth   " if math.isnan(value) else f"IoU {_share(value)}   ")]
    gain = 100 * (after - before)
    colour = GOOD if gain > 0.05 else DEFECTIVE if gain < -0.05 else MUTED
    return [
        Words(f"IoU {_share(before)} \N{RIGHTWARDS ARROW} {_share(after)}, "),
        Words(f"{gain:+z.1f}   ", colour, bold=True),
    ]


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _draw_states(picture: Picture, mask: Mask, truth: Mask, classes: int) -> Picture:
    """Two classes: right, missed and false pixels; of the truth itself all are right."""
    found, there = mask == 1, truth == 1
    states = RIGHT * (found & there) + MISSED * (there & ~found) + FALSE * (found & ~there)
    states[truth == VOID] = VOID
    small = _fit_ids(states, picture, rare_first=False)
    drawn = _fill(picture, small, {state: _rgb(colour) for state, colour in _STATE_COLOURS.items()}, 0.8)
    return outline(drawn, _rings(np.isin(small, list(STATES)), np.isin(small, (RIGHT, MISSED))), _RING, 1)


def _draw_classes(picture: Picture, mask: Mask, truth: Mask, classes: int) -> Picture:
    """Several classes in their colours, hatched where they are wrong: black, on dark ground white."""
    ids = np.where(truth == VOID, VOID, mask)
    colours = dict(enumerate(palette(classes)[1:], 1))
    drawn = _fill(picture, _fit_ids(ids, picture, rare_first=True), colours, 0.62)
    wrong = _fit_ids(((mask != truth) & (truth != VOID)).astype(np.uint8), picture, rare_first=True) == 1
    hatch = wrong & _diagonals(wrong.shape, 5, 2)
    drawn[hatch] = np.where(picture.mean(axis=2, keepdims=True)[hatch] < _DARK, 255, 0)
    return drawn


def _fill(picture: Picture, ids: Mask, colours: dict[int, Colour], opacity: float) -> Picture:
    """The picture grey, each id's pixels tinted; void hatched."""
    grey = np.repeat(picture.mean(axis=2, keepdims=True), 3, axis=2)
    for value, colour in colours.items():
        inside = ids == value
        grey[inside] = (1 - opacity) * grey[inside] + opacity * np.array(colour)
    drawn = np.rint(grey).astype(np.uint8)
    void = ids == VOID
    drawn[void] = drawn[void] // 2 + _VOID_GREY // 2
    drawn[void & _diagonals(void.shape, 6, 1)] = 255
    return drawn


def _rings(region: NDArray[np.bool_], first: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The small parts of a region with a margin, for a line around them; of many, those on `first` go first."""
    label, count = ndimage.label(region, structure=np.ones((3, 3)))
    parts = np.arange(1, count + 1)
    parts = parts[np.bincount(label.ravel(), minlength=count + 1)[1:] < _SMALL]
    if len(parts) > _RINGS:
        parts = np.intersect1d(parts, label[first])[:_RINGS]
    return np.asarray(ndimage.binary_dilation(np.isin(label, parts), structure=np.ones((3, 3)), iterations=4))


def _diagonals(shape: tuple[int, ...], period: int, width: int) -> NDArray[np.bool_]:
    rows, columns = np.indices(shape)
    return np.asarray((rows + columns) % period < width)


def _fit_ids(ids: Mask, picture: Picture, *, rare_first: bool) -> Mask:
    """Ids (H, W) at the picture's size (h, w); made smaller, any id goes before 0, however little it covers.

    Of several ids within a pixel of the sheet, the one rarest in the picture is taken, or the one that covers most.
    """
    height, width = picture.shape[:2]
    if height >= ids.shape[0]:
        whole = Image.fromarray(ids.astype(np.uint8))
        return np.asarray(whole.resize((width, height), Image.Resampling.NEAREST))
    values, counts = np.unique(ids[ids != 0], return_counts=True)
    small, most = np.zeros((height, width), dtype=np.uint8), np.full((height, width), 1e-6)
    for value in values[np.argsort(-counts, kind="stable")]:
        part = Image.fromarray((ids == value).astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        cover = np.asarray(part)
        taken = cover > most
        small[taken] = value
        if not rare_first:
            most[taken] = cover[taken]
    return small


def _uncertainty_scale(maps: Sequence[NDArray[np.floating[Any]]]) -> Scale:
    """From sure to the 99.5 % quantile of what is not sure; the same for all rows."""
    values = np.concatenate([np.asarray(u, dtype=np.float64).ravel() for u in maps])
    unsure = values[np.isfinite(values) & (values > 0)]
    return (0.0, float(np.quantile(unsure, 0.995))) if unsure.size else (0.0, 1.0)


def _key(
    rows: Sequence[PanelRow], class_names: Sequence[str], heads: Sequence[str], scale: Scale | None, width: int
) -> Image.Image:
    """What the colours mean, in as many lines as they need, and the heads of the columns."""
    face = font()
    entries = _entries(rows, class_names)
    places, x, line = [], 0, 0
    for text, _, _ in entries:
        room = _SWATCH + 6 + round(face.getlength(text)) + 18
        if x and x + room > width:
            x, line = 0, line + 1
        places.append((x, line * LINE))
        x += room
    top = (line + 1) * LINE + 6
    key = Image.new("RGB", (width, top + LINE), "white")
    draw = ImageDraw.Draw(key)
    for (text, colour, hatch), (left, y) in zip(entries, places, strict=True):
        key.paste(_swatch(colour, hatch), (left, y + 3))
        draw.text((left + _SWATCH + 6, y), text, font=face, fill=INK)
    step = (width + SEAM) / len(heads)
    for i, head in enumerate(heads):
        draw.text((i * step, top), head, font=font(bold=True), fill=MUTED)
    if scale is not None:
        _draw_ramp(key, (round((len(heads) - 1) * step + font(bold=True).getlength(heads[-1])) + 8, top), scale)
    return key


def _entries(rows: Sequence[PanelRow], class_names: Sequence[str]) -> list[tuple[str, Colour | None, Colour | None]]:
    """Text, colour and colour of the hatching of each swatch; of the classes only those that occur."""
    masks = [mask for row in rows for mask in (row.truth, row.stage1, row.refined) if mask is not None]
    present = {int(value) for mask in masks for value in np.unique(mask)}
    entries: list[tuple[str, Colour | None, Colour | None]]
    if len(class_names) == 2:
        entries = [(text, _rgb(_STATE_COLOURS[state]), None) for state, text in STATES.items()]
        entries[0] = (f"{class_names[1]}, {entries[0][0]}", *entries[0][1:])
    else:
        colours = palette(len(class_names))
        entries = [(name, colours[i], None) for i, name in enumerate(class_names) if i and i in present]
        entries.append(("wrong", None, (0, 0, 0)))
    return [*entries, *([("void, not counted", (_VOID_GREY,) * 3, (255, 255, 255))] if VOID in present else [])]


def _swatch(colour: Colour | None, hatch: Colour | None) -> Image.Image:
    square = np.full((_SWATCH, _SWATCH, 3), colour or (225, 225, 225), dtype=np.uint8)
    if hatch:
        square[_diagonals(square.shape[:2], 5, 2)] = hatch
    return Image.fromarray(square)


def _draw_ramp(key: Image.Image, corner: tuple[int, int], scale: Scale) -> None:
    """The heat's colours from 0 to the end of their scale."""
    x, y = corner
    text = f"{scale[1]:.2g}"
    room = round(key.width - x - font().getlength(text) - 6)
    if room < 20:
        return
    ramp = (matplotlib.colormaps["inferno"](np.linspace(0, 1, room))[:, :3] * 255).astype(np.uint8)
    key.paste(Image.fromarray(np.tile(ramp, (12, 1, 1))), (x, y + 3))
    ImageDraw.Draw(key).text((x + room + 6, y), text, font=font(), fill=MUTED)


def _class_ids(mask: ArrayLike) -> NDArray[np.uint8]:
    ids = np.asarray(mask)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"expected class ids of shape (H, W), not {ids.dtype} of shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() > VOID):
        raise ValueError(f"class ids lie between 0 and 255 (void), not {ids.min()} to {ids.max()}")
    return ids.astype(np.uint8)


def _voc_colours() -> Picture:
    """VOC's colours (256, 3): the bits of the index, taken three at a time, fill red, green and blue from the top."""
    index = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.uint8)
    for bit in range(8):
        colours[:, bit % 3] |= ((index >> bit & 1) << (7 - bit // 3)).astype(np.uint8)
    return colours


def _rgb(colour: str) -> Colour:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
