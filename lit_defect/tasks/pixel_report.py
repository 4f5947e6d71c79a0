"""What an evaluation of masks leaves in its run folder, and the last words on the screen."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from lit_defect.metrics.segmentation import (
    MaskCounts,
    class_iou,
    compare_masks,
    evaluate_masks,
    foreground_of,
    image_iou,
)
from lit_defect.metrics.uncertainty import Sparsification
from lit_defect.reporting.figures import save_figure, training_figure
from lit_defect.reporting.segmentation_figures import gain_figure, iou_by_class_figure, sparsification_figure
from lit_defect.reporting.segmentation_panels import PanelRow, panel_sheet
from lit_defect.reporting.segmentation_tables import mask_table
from lit_defect.runs import keep_previous, write_json

Floats = npt.NDArray[np.float64]

_SHOWN = 6  # pictures of a sheet of panels


class Shown(NamedTuple):
    """A picture (H, W, 3), its truth (H, W), the masks (H, W) by method, and the uncertainty (H, W) or None."""

    picture: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.int64]
    masks: dict[str, npt.NDArray[np.integer[Any]]]
    uncertainty: npt.NDArray[np.float32] | None


Look = Callable[[int], Shown]


@dataclass(frozen=True)
class Doubt:
    """How well the uncertainty knows where the main method is wrong.

    Attributes:
        auroc: (N,) of each picture, nan where undefined.
        found: (N,) share of the wrong pixels among the most uncertain tenth.
        curve: mean over the pictures.
    """

    auroc: Floats
    found: Floats
    curve: Sparsification

    def figures(self) -> dict[str, Any]:
        """Means over the pictures where they are defined; None without any."""
        known = np.isfinite(self.auroc)
        return {
            "auroc": float(self.auroc[known].mean()) if known.any() else None,
            "found": float(self.found[known].mean()) if known.any() else None,
            "ause": self.curve.ause,
            "n": int(known.sum()),
        }


@dataclass(frozen=True)
class PixelEvaluation:
    """Counts of a whole split by method, in the order of its samples.

    Attributes:
        samples: n samples of the data module.
        positions: n positions in the split.
        counts: by method, of the n pictures.
        class_names: C names, the background first.
        main: the method that is reported first.
        before: the method that the others are compared with, or None.
        doubt: of the main method, if it has an uncertainty.
    """

    samples: list[Any]
    positions: list[int]
    counts: dict[str, MaskCounts]
    class_names: list[str]
    main: str
    before: str | None = None
    doubt: Doubt | None = None

    def iou(self, method: str) -> Floats:
        """Of each picture (n,); nan where its truth shows nothing to be found."""
        return image_iou(self.counts[method], foreground_of(self.class_names))

    @property
    def types(self) -> list[str] | None:
        """Kind of defect of each picture, where there are several."""
        names = [sample.defect_type for sample in self.samples]
        return names if len(set(names)) > 1 else None

    @property
    def groups(self) -> list[str] | None:
        """Part behind each picture, where one was photographed more than once."""
        names = [sample.group or sample.name for sample in self.samples]
        return names if len(set(names)) < len(names) else None

    def figures(self) -> dict[str, Any]:
        """`methods` and, where there is something to compare with, `gain`, all with intervals."""
        kinds: dict[str, Any] = {"types": self.types, "groups": self.groups}
        result: dict[str, Any] = {
            "methods": {
                method: evaluate_masks(counts, self.class_names, **kinds) for method, counts in self.counts.items()
            }
        }
        if self.before is not None and self.before in self.counts:
            first = self.counts[self.before]
            result["gain"] = {
                method: compare_masks(first, counts, self.class_names, **kinds)
                for method, counts in self.counts.items()
                if method != self.before
            }
        return result

    def watched(self, stage: str) -> dict[str, float]:
        """What is logged of each method, where it is defined; without intervals."""
        logged: dict[str, float | None] = {}
        for method, counts in self.counts.items():
            quick = evaluate_masks(counts, self.class_names, resamples=0)
            prefix = f"{stage}/" if method == self.main else f"{stage}/{method}_"
            logged |= {f"{prefix}{name}": quick[name]["value"] for name in ("iou", "pooled_iou", "boundary_iou")}
        return {name: value for name, value in logged.items() if value is not None}

    def without(self, names: set[str]) -> PixelEvaluation:
        """The same without the samples of these names, and without the uncertainty."""
        kept = [row for row, sample in enumerate(self.samples) if sample.name not in names]
        return replace(
            self,
            samples=[self.samples[row] for row in kept],
            positions=[self.positions[row] for row in kept],
            counts={method: counts.take(kept) for method, counts in self.counts.items()},
            doubt=None,
        )


@dataclass
class Report:
    """Writes one evaluation.

    Attributes:
        folder: the run folder.
        stage: test, mirrored or val.
        task: name of the task.
        evaluation: the counts.
        about: settings and sizes, for `<stage>_metrics.json`.
        near: names of samples with a near-duplicate in another split.
        look: position in the split -> what there is to see.
    """

    folder: Path
    stage: str
    task: str
    evaluation: PixelEvaluation
    about: dict[str, Any]
    near: set[str]
    look: Look
    written: list[Path] = field(default_factory=list)

    def write(self) -> None:
        """Metrics, one line a picture, figures, panels, and the table on the screen."""
        evaluation, console = self.evaluation, Console(highlight=False)
        foreground = [evaluation.class_names[number] for number in foreground_of(evaluation.class_names)]
        result: dict[str, Any] = {
            "task": self.task,
            "n": len(evaluation.samples),
            "class_names": evaluation.class_names,
            "foreground": foreground,
            **evaluation.figures(),
            **self.about,
        }
        if evaluation.doubt is not None:
            result["uncertainty"] = {"of": self.about.get("uncertainty_of", ""), **evaluation.doubt.figures()}
        fresh = evaluation.without(self.near)
        if self.near and fresh.samples:
            result["without_near_duplicates"] = {"n": len(fresh.samples), **fresh.figures()}
        metrics, predictions = (self.folder / f"{self.stage}_{name}" for name in ("metrics.json", "predictions.csv"))
        for path in (metrics, predictions):
            keep_previous(path)
        write_json(metrics, result)
        write_pictures(predictions, evaluation, self.stage)
        self._draw(result)
        console.print()
        console.print(mask_table(result, f"{self.stage}: {len(evaluation.samples)} pictures"))
        console.print(f"metrics      {metrics}\npredictions  {predictions}", soft_wrap=True)
        figures = ", ".join(path.name for path in self.written)
        console.print(f"figures      {self.folder / 'figures'}: {figures}", soft_wrap=True)

    def _draw(self, result: dict[str, Any]) -> None:
        evaluation = self.evaluation
        by_type = evaluation.types is not None
        key = "iou_by_type" if by_type else "iou_by_class"
        methods = result["methods"]
        self._figure(
            f"{self.stage}_iou",
            iou_by_class_figure(
                {method: entry[key] for method, entry in methods.items()},
                overall={method: entry["iou"] for method, entry in methods.items()},
                label="type" if by_type else "class",
            ),
        )
        if (self.folder / "metrics.csv").is_file():
            self._figure("training", training_figure(self.folder / "metrics.csv"))
        if evaluation.before is not None and evaluation.before in evaluation.counts:
            before, after = evaluation.iou(evaluation.before), evaluation.iou(evaluation.main)
            self._figure(
                f"{self.stage}_gain", gain_figure(before, after, types=evaluation.types, groups=evaluation.groups)
            )
        if evaluation.doubt is not None:
            curve = evaluation.doubt.curve
            drawn = sparsification_figure(
                curve.error, curve.oracle, curve.random, result["uncertainty"]["of"], shares=curve.share
            )
            self._figure(f"{self.stage}_uncertainty", drawn)
        self._sheets()

    def _figure(self, name: str, figure: Any) -> None:
        self.written.append(save_figure(figure, self.folder / "figures" / f"{name}.png"))

    def _sheets(self) -> None:
        """The pictures that gained and lost most (Ando's figures 4 and 5), or the best and worst ones."""
        evaluation = self.evaluation
        after = evaluation.iou(evaluation.main)
        before = evaluation.iou(evaluation.before) if evaluation.before in evaluation.counts else None
        value = after if before is None else after - before
        order = [row for row in np.argsort(-value, kind="stable").tolist() if np.isfinite(value[row])]
        if before is None:
            sheets = {
                "best": (order, "The best pictures by IoU"),
                "worst": (order[::-1], "The worst pictures by IoU"),
            }
        else:
            gained = [row for row in order if value[row] > 0]
            lost = [row for row in order[::-1] if value[row] < 0]
            sheets = {
                "best": (gained, f"Refined for the better: the largest gains of {len(gained)}"),
                "worst": (lost, f"Refined for the worse: the largest losses of {len(lost)}"),
            }
        for name, (rows, title) in sheets.items():
            path = self.folder / "figures" / f"{self.stage}_{name}.png"
            path.unlink(missing_ok=True)  # of an earlier evaluation
            chosen = self._one_of_each_part(rows)
            if chosen:
                panels = [self._panel(row, before, after) for row in chosen]
                panel_sheet(panels, evaluation.class_names, title=title).save(path)
                self.written.append(path)

    def _one_of_each_part(self, rows: Iterable[int]) -> list[int]:
        """The first picture of each of the first few parts: one part photographed six times shows nothing new."""
        first: dict[str, int] = {}
        for row in rows:
            sample = self.evaluation.samples[row]
            first.setdefault(sample.group or sample.name, row)
        return list(first.values())[:_SHOWN]

    def _panel(self, row: int, before: Floats | None, after: Floats) -> PanelRow:
        evaluation = self.evaluation
        shown = self.look(evaluation.positions[row])
        main = shown.masks[evaluation.main]
        first = shown.masks.get(evaluation.before or "")
        return PanelRow(
            picture=shown.picture,
            truth=shown.truth,
            stage1=main if first is None else first,
            refined=None if first is None else main,
            uncertainty=shown.uncertainty,
            name=evaluation.samples[row].name,
            iou_before=float(after[row] if before is None else before[row]),
            iou_after=float("nan") if before is None else float(after[row]),
        )


def write_pictures(path: Path, evaluation: PixelEvaluation, stage: str) -> None:
    """CSV: path, name, type, group, split, and of each method the IoU, that of each class, and the 95 % distance."""
    foreground = foreground_of(evaluation.class_names)
    columns: dict[str, Floats] = {}
    for method, counts in evaluation.counts.items():
        columns[f"iou({method})"] = evaluation.iou(method)
        by_class = class_iou(counts.confusion)
        for number in foreground if len(foreground) > 1 else ():
            columns[f"iou({method}, {evaluation.class_names[number]})"] = by_class[:, number]
        for number in foreground:
            columns[f"hd95({method}, {evaluation.class_names[number]})"] = counts.distance[:, number]
    if evaluation.doubt is not None:
        columns["auroc(uncertainty)"] = evaluation.doubt.auroc
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "name", "type", "group", "split", *columns])
        for row, sample in enumerate(evaluation.samples):
            values = [f"{column[row]:.6g}" if np.isfinite(column[row]) else "" for column in columns.values()]
            writer.writerow([sample.path, sample.name, sample.defect_type, sample.group, stage, *values])
