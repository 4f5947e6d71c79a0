"""What readers of Weights & Biases look at, made from what a run folder holds: figures, curves, tables, overlays.

Each function gives a dict of W&B objects to log at once. Numbers and sizes are bounded, so that a run with many
pictures does not fill a disk. Nothing is computed anew: predictions come from `<stage>_predictions.csv`, figures of
the results from `<stage>_metrics.json`, generated pictures from their manifest.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lit_defect.errors import DataError
from lit_defect.reporting.figures import counts_above
from lit_defect.reporting.maps import colour_scale, overlay
from lit_defect.reporting.overlays import Overlay, framed
from lit_defect.reporting.sheets import fit

Row = dict[str, str]
Look = Callable[[str, str], NDArray[np.uint8]]
"""(path, name of a sample) -> picture (H, W, 3)."""

THUMBNAIL = 224  # pixels, longer side
_FRAME = 320  # pixels, side of a generated picture and of its source
_SIDE = 3000  # pixels, longer side of a figure
_POINTS = 200  # of a curve
_BINS = 32
_OVERLAY = (256, 768)  # pixels, least and most side of a picture with masks


def figures(paths: Iterable[Path]) -> dict[str, Any]:
    """Pictures by `figures/<name>`, with their names in words as captions."""
    import wandb

    drawn = {}
    for path in paths:
        with Image.open(path) as image:
            shown: Any = str(path)
            if max(image.size) > _SIDE:
                shown = image.convert("RGB")
                shown.thumbnail((_SIDE, _SIDE))
            drawn[f"figures/{path.stem}"] = wandb.Image(shown, caption=path.stem.replace("_", " "))
    return drawn


def read_predictions(path: Path) -> list[Row]:
    """The rows of a `<stage>_predictions.csv`; none without the file."""
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            return list(csv.DictReader(lines))
    except OSError:
        return []


def charts(stage: str, rows: Sequence[Row], normal: str | None) -> dict[str, Any]:
    """ROC, precision-recall, confusion matrix and histograms of the scores, of the rows that know their label.

    Args:
        stage: of the results.
        rows: of the predictions.
        normal: name of the good class, which has no curve of its own beside a single other one.
    """
    import wandb

    rows = [row for row in rows if row.get("label") and row.get("score")]
    if not rows:
        return {}
    labels = np.array([row["label"] for row in rows])
    drawn: dict[str, Any] = {}
    roc, precision = [], []
    for name, score in _scores(rows, normal).items():
        positive = labels == name
        if positive.any() and not positive.all():
            found, flagged = counts_above(positive, score)
            roc += [[name, x, y] for x, y in _thinned(flagged / flagged[-1], found / found[-1])]
            precise = found[1:] / (found + flagged)[1:]
            precision += [[name, x, y] for x, y in _thinned(found[1:] / found[-1], precise)]
    if roc:
        drawn[f"{stage}/roc"] = _curve("ROC", "false positive rate", "true positive rate", roc)
        drawn[f"{stage}/precision_recall"] = _curve("Precision and recall", "recall", "precision", precision)
    if all(row["prediction"] for row in rows):
        names = list(dict.fromkeys([*_classes(rows), *labels.tolist(), *(row["prediction"] for row in rows)]))
        drawn[f"{stage}/confusion"] = wandb.plot.confusion_matrix(
            y_true=[names.index(label) for label in labels],
            preds=[names.index(row["prediction"]) for row in rows],
            class_names=names,
            title=f"{stage}: confusion",
        )
    score = np.array([float(row["score"]) for row in rows])
    edges = np.histogram_bin_edges(score[np.isfinite(score)], bins=_BINS)
    for name in sorted(set(labels.tolist())):
        drawn[f"{stage}/scores/{name}"] = wandb.Histogram(np_histogram=np.histogram(score[labels == name], bins=edges))
    return drawn


def sample_table(stage: str, rows: Sequence[Row], look: Look, count: int) -> dict[str, Any]:
    """A table of pictures with what was said of them: the surest mistakes first, then what was nearest to one.

    Args:
        stage: of the results.
        rows: of the predictions.
        look: gives the pictures.
        count: at most so many.
    """
    import wandb

    if not rows:
        return {}
    columns = [name for name in rows[0] if name not in ("path", "split")]
    judged = "label" in rows[0] and "prediction" in rows[0] and all(row["prediction"] for row in rows)
    table = wandb.Table(columns=["picture", *columns, *(["right"] if judged else [])])
    for row in sorted(rows, key=_order(rows))[:count]:
        cells = [_number(row[name]) for name in columns]
        right = [row["label"] == row["prediction"] if row["label"] else None] if judged else []
        table.add_data(thumbnail(look, row["path"], row["name"]), *cells, *right)
    return {f"{stage}/samples": table}


def generated_table(root: Path, rows: Sequence[Row], source: Callable[[str], Any], count: int) -> dict[str, Any]:
    """Generated pictures beside their sources, accepted ones of each type in turn.

    Args:
        root: the generated set.
        rows: of its manifest.
        source: name of a sample -> its picture (H, W, 3), or None.
        count: at most so many.
    """
    import wandb

    by_type: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["accepted"] == "1" and row["image"]:
            by_type.setdefault((row["category"], row["defect_type"]), []).append(row)
    columns: list[str | int] = ["source picture", "generated", "type", "category", "prompt", "seed", "area", "source"]
    table = wandb.Table(columns=columns)
    each = max(1, count // max(1, len(by_type)))
    for found in list(by_type.values())[:count]:
        for row in found[:: max(1, len(found) // each)][:each]:
            made, before = _open(root / row["image"]), source(row["source"])
            mask = _open(root / row["mask"])[..., 0] > 0 if row["mask"] else np.zeros(made.shape[:2], bool)
            shown = Overlay(
                row["image"], made, {"mask": mask.astype(np.uint8)}, {0: "as before", 1: row["defect_type"]}
            )
            table.add_data(
                None if before is None else _masked(framed(Overlay(row["source"], before), _FRAME), caption=""),
                _masked(framed(shown, _FRAME), caption=""),
                *(row[name] for name in ("defect_type", "category", "prompt")),
                *(_number(row[name]) for name in ("seed", "area")),
                row["source"],
            )
    return {"generated/pictures": table} if table.data else {}


def overlays(stage: str, seen: Sequence[Overlay]) -> dict[str, Any]:
    """Pictures with true and predicted masks to be switched on and off, and with their maps laid over."""
    import wandb

    maps = [one.heat for one in seen if one.heat is not None]
    scale = next((one.scale for one in seen if one.scale), None) or colour_scale(maps)
    drawn: dict[str, Any] = {}
    side = int(np.clip(max((max(one.picture.shape[:2]) for one in seen), default=0), *_OVERLAY))
    shown = [framed(one, side) for one in seen]  # W&B shows pictures of one size together
    if any(one.masks for one in shown):
        drawn[f"{stage}/masks"] = [_masked(one, caption=one.name) for one in shown]
    if maps:
        drawn[f"{stage}/anomaly_maps"] = [
            wandb.Image(
                overlay(one.picture, one.heat, scale=scale, threshold=one.threshold), caption=one.name, file_type="jpg"
            )
            for one in shown
            if one.heat is not None
        ]
    return drawn


def summary_of(stage: str, result: Mapping[str, Any], main: str | None = None) -> dict[str, float]:
    """The figures of a `<stage>_metrics.json` as `<stage>/<name>`, with `_low` and `_high` where there is an interval.

    Args:
        stage: of the results.
        result: what the file holds.
        main: the method that is reported first, where there are several.
    """
    main = result.get("score", main)
    return {f"{stage}/{name}": value for name, value in _values(result, main)}


def thumbnail(look: Look, path: str, name: str) -> Any:
    """The picture of a sample, small; None where it cannot be read any more."""
    try:
        return _small(look(path, name))
    except (DataError, OSError):
        return None


def where(name: str) -> tuple[tuple[int, int, int, int] | None, bool]:
    """The crop window and whether it is mirrored, as the name of a sample tells."""
    mirrored = name.endswith("#mirrored")
    box = re.search(r"#(\d+),(\d+),(\d+),(\d+)$", name.removesuffix("#mirrored"))
    return (tuple(int(part) for part in box.groups()) if box else None), mirrored  # type: ignore[return-value]


def _small(picture: NDArray[np.uint8]) -> Any:
    import wandb

    return wandb.Image(fit(picture, THUMBNAIL), file_type="jpg")


def _masked(one: Overlay, caption: str) -> Any:
    import wandb

    names = dict(one.class_names)
    masks = {name: {"mask_data": np.asarray(mask), "class_labels": names} for name, mask in one.masks.items()}
    return wandb.Image(one.picture, caption=caption, masks=masks or None, file_type="jpg")


def _open(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _classes(rows: Sequence[Row]) -> list[str]:
    return [name[2:-1] for name in rows[0] if name.startswith("p(") and name.endswith(")")]


def _scores(rows: Sequence[Row], normal: str | None) -> dict[str, NDArray[np.float64]]:
    """By class, what speaks for it; of two classes only what speaks for the second, or for the defective one."""
    names = _classes(rows)
    if not names:
        return {"defective": np.array([float(row["score"]) for row in rows])}
    if len(names) == 2:
        names = [name for name in names if name != (normal or names[0])]
    return {name: np.array([float(row[f"p({name})"]) for row in rows]) for name in names}


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[tuple[float, float]]:
    rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round().astype(int))
    return [(round(float(x[row]), 4), round(float(y[row]), 4)) for row in rows]


def _curve(title: str, x_name: str, y_name: str, points: list[list[Any]]) -> Any:
    """W&B's own panel of its `plot.roc_curve` and `pr_curve`, which need pandas and scikit-learn to fill it."""
    import wandb

    return wandb.plot_table(
        vega_spec_name="wandb/area-under-curve/v0",
        data_table=wandb.Table(columns=["class", "x", "y"], data=points),
        fields={"x": "x", "y": "y", "class": "class"},
        string_fields={"title": title, "x-axis-title": x_name, "y-axis-title": y_name},
    )


def _order(rows: Sequence[Row]) -> Callable[[Row], float]:
    """Smaller for what should be looked at first: by how little the truth is ahead of what else might be."""
    names = _classes(rows)
    iou = next((name for name in rows[0] if name.startswith("iou(")), None)
    if iou:
        return lambda row: float(row[iou]) if row[iou] else math.inf
    scores = [float(row["score"]) for row in rows]
    rejected = [score for row, score in zip(rows, scores, strict=True) if row["prediction"] == "defective"]
    limit = min(rejected, default=float(np.median(scores)))

    def lead(row: Row) -> float:
        if not names:
            return (float(row["score"]) - limit) * (1 if row["label"] == "defective" else -1)
        truth = row["label"] or row["prediction"]
        return float(row[f"p({truth})"]) - max(float(row[f"p({name})"]) for name in names if name != truth)

    return lead


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text or None


def _values(entry: Mapping[str, Any], main: str | None, path: str = "") -> Iterable[tuple[str, float]]:
    for name, value in entry.items():
        if name in ("methods", "image"):
            for method, figures in value.items():
                yield from _values(figures, main, path if method == main else f"{path}{method}_")
        elif isinstance(value, Mapping) and "value" in value:
            for key, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                if isinstance(value.get(key), int | float) and math.isfinite(value[key]):
                    yield f"{path}{name}{suffix}", float(value[key])
        elif isinstance(value, Mapping):
            yield from _values(value, main, f"{path}{name}/")


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; empty without it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
