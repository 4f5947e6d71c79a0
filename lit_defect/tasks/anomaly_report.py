"""What an evaluation of an anomaly detector found, and what it leaves in its run folder and on the screen."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor

from lit_defect.anomalies import PseudoAnomalies, PseudoAnomaly, explain_rejection
from lit_defect.errors import UserError
from lit_defect.metrics.anomaly import evaluate_scores
from lit_defect.reporting.anomalies import AnomalyTile, PseudoTile, anomaly_gallery, choose, pseudo_anomaly_sheet
from lit_defect.reporting.anomaly_figures import auroc_by_type_figure, discard_figure, score_histogram_figure
from lit_defect.reporting.anomaly_tables import anomaly_table
from lit_defect.reporting.figures import precision_recall_figure, roc_figure, save_figure, training_figure
from lit_defect.reporting.maps import Scale, colour_scale
from lit_defect.runs import keep_previous, write_json

Shown = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None, npt.NDArray[np.float32] | None]
"""Picture (H, W, 3), mask (H, W) or None, map (h, w) or None."""
Look = Callable[[int, Literal["map", "grad_cam"]], Shown]

LABELS = {
    "gaussian": "Mahalanobis distance of the features",
    "knn": "cosine distance to the nearest normal features",
    "kde": "minus log density of the features",
    "map_max": "highest score of the anomaly map",
    "pooled_max": "highest mean of a window of the anomaly map",
    "combined": "features and map together, in standard deviations",
}
_SHOWN = 8  # pictures in each gallery


@dataclass(frozen=True)
class AnomalyEvaluation:
    """Scores of a whole split, in the order of its samples.

    Attributes:
        samples: n samples of the data module.
        positions: n positions in the split.
        is_defect: (n,) booleans.
        known: whether the truth is known at all.
        scores: (n,) by name of the score.
        thresholds: by name; nan without validation pictures.
        score: name of the one that decides.
        pixel: figures of the maps; empty without masks.
        pixel_by_type: the same of each kind of defect, against good pictures.
        map_scale: the maps' range, where they have one.
    """

    samples: list[Any]
    positions: list[int]
    is_defect: npt.NDArray[np.bool_]
    known: bool
    scores: dict[str, npt.NDArray[np.float64]]
    thresholds: dict[str, float]
    score: str
    pixel: dict[str, float]
    pixel_by_type: dict[str, dict[str, float]] = field(default_factory=dict)
    map_scale: Scale | None = None

    def figures(self, resamples: int = 2000) -> dict[str, dict[str, Any]]:
        """All figures of each score; where parts were photographed more than once, parts are counted."""
        groups = [sample.group or sample.name for sample in self.samples]
        clustered = len(set(groups)) < len(groups)
        return {
            name: evaluate_scores(
                values,
                self.is_defect,
                groups=groups if clustered else None,
                defect_types=[sample.defect_type for sample in self.samples],
                threshold=self.thresholds[name],
                resamples=resamples,
            )
            for name, values in self.scores.items()
        }

    def watched(self, stage: str) -> dict[str, float]:
        """The figures to log, `<stage>/<name>`, where they are defined."""
        main = replace(self, scores={self.score: self.scores[self.score]}).figures(resamples=0)[self.score]
        values = {name: main[name]["value"] for name in ("auroc", "average_precision", "escape_rate", "overkill_rate")}
        values |= self.pixel
        return {f"{stage}/{name}": v for name, v in values.items() if v is not None and not math.isnan(v)}

    def without(self, names: set[str]) -> AnomalyEvaluation:
        """The same without the samples of these names; the pixels' figures are left out."""
        kept = [row for row, sample in enumerate(self.samples) if sample.name not in names]
        return replace(
            self,
            samples=[self.samples[row] for row in kept],
            positions=[self.positions[row] for row in kept],
            is_defect=self.is_defect[kept],
            scores={name: values[kept] for name, values in self.scores.items()},
            pixel={},
            pixel_by_type={},
        )


def first_look(maker: PseudoAnomaly, images: Tensor) -> PseudoAnomalies:
    """What a maker makes of some training pictures (B, 3, H, W) in [0, 1], by the run's seed; on the CPU.

    Raises:
        UserError: it changes none of them, or its gate rejects everything.
    """
    made = maker(images, torch.Generator().manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0))))
    if not made.accepted.any():
        if maker.ssim_scope == "off":
            raise UserError("the pseudo-anomalies change no pixel of the training pictures: are these blank?")
        raise UserError(explain_rejection(made.tried_ssim, maker.ssim_threshold))
    return PseudoAnomalies(*(part.cpu() for part in made))


def write_preview(folder: Path, sources: Tensor, names: list[str], made: PseudoAnomalies, maker: PseudoAnomaly) -> None:
    """What the training will see: `figures/pseudo_anomalies.png`, and the discard rate by area where there is a gate.

    Args:
        folder: the run folder.
        sources: (B, 3, H, W) in [0, 1].
        names: of the B pictures.
        made: their pseudo-anomalies, kinds x B rows.
        maker: what made them.
    """
    count = len(names)
    rows = [row + kind * count for row in range(count) for kind in range(maker.kinds)][: 2 * _SHOWN]
    tiles = [
        PseudoTile(
            source=_picture(sources[row % count]),
            changed=_picture(made.images[row]),
            mask=made.masks[row, 0].numpy(),
            ssim=float(made.ssim[row]),
            area=float(made.area[row]),
            accepted=bool(made.accepted[row]),
            name=names[row % count],
        )
        for row in rows
    ]
    title = f"{type(maker).__name__}: {int(made.accepted.sum())} of {len(made.accepted)} accepted"
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    pseudo_anomaly_sheet(tiles, title=title).save(figures / "pseudo_anomalies.png")
    if maker.ssim_scope != "off":
        label = f"SSIM of the {maker.ssim_scope}"
        drawn = discard_figure(made.tried.numpy(), made.tried_ssim.numpy(), maker.ssim_threshold, label)
        save_figure(drawn, figures / "discarded_by_area.png")


def _picture(image: Tensor) -> npt.NDArray[np.uint8]:
    return (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def latency(score: Callable[[Tensor], object], singles: Iterable[Tensor]) -> dict[str, float]:
    """Milliseconds from a decoded picture (1, 3, H, W) to its scores and map: median and 95th percentile."""
    times = []
    for number, image in enumerate(singles):
        for _ in range(1 if number else 4):  # the first times are those of a cold start
            start = time.perf_counter()
            score(image)
            taken = time.perf_counter() - start
        times.append(1000 * taken)
    middle, late = np.quantile(times, (0.5, 0.95))
    return {"median": round(float(middle), 2), "p95": round(float(late), 2)}


def write_report(
    folder: Path, stage: str, evaluation: AnomalyEvaluation, about: dict[str, Any], near: set[str], look: Look
) -> None:
    """Scores always; figures, galleries and the metrics where the truth is known.

    Args:
        folder: the run folder.
        stage: test, mirrored, val or predict.
        evaluation: the scores.
        about: settings that led to them, for `<stage>_metrics.json`.
        near: names of samples with a near-duplicate in another split.
        look: (position in the split, what to lay over) -> picture, mask and map.
    """
    console = Console(highlight=False)
    predictions = folder / f"{stage}_predictions.csv"
    keep_previous(predictions)
    write_scores(predictions, evaluation, stage)
    count = len(evaluation.samples)
    if stage == "predict" or not evaluation.known:
        maps = folder / "predict_maps"
        drawn = f"\nmaps and overlays: {maps}" if stage == "predict" and maps.is_dir() else ""
        console.print(f"\n{count} pictures scored: {predictions}{drawn}\n", soft_wrap=True)
        return
    result: dict[str, Any] = {
        "score": evaluation.score,
        "n": count,
        "image": evaluation.figures(),
        "pixel": _defined(evaluation.pixel),
        "pixel_by_type": {kind: _defined(figures) for kind, figures in evaluation.pixel_by_type.items()},
        **about,
    }
    fresh = evaluation.without(near)
    if near and fresh.samples:
        result["without_near_duplicates"] = {"n": len(fresh.samples), "image": fresh.figures()}
    metrics = folder / f"{stage}_metrics.json"
    keep_previous(metrics)
    write_json(metrics, result)
    written = _draw(folder, stage, evaluation, result, look)
    console.print()
    console.print(anomaly_table(result, f"{stage}: {count} pictures"))
    console.print(f"metrics      {metrics}\npredictions  {predictions}", soft_wrap=True)
    console.print(f"figures      {folder / 'figures'}: {', '.join(path.name for path in written)}", soft_wrap=True)


def _defined(figures: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def write_scores(path: Path, evaluation: AnomalyEvaluation, stage: str) -> None:
    """CSV: path, name, label, type, prediction, score (the one that decides), split, and every score by name."""
    threshold = evaluation.thresholds[evaluation.score]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "name", "label", "type", "prediction", "score", "split", *evaluation.scores])
        for row, sample in enumerate(evaluation.samples):
            truth = ("good", "defective")[int(evaluation.is_defect[row])] if sample.label >= 0 else ""
            score = evaluation.scores[evaluation.score][row]
            decision = "" if math.isnan(threshold) else ("good", "defective")[int(score >= threshold)]
            values = [f"{score:.8g}", stage, *(f"{values[row]:.8g}" for values in evaluation.scores.values())]
            writer.writerow([sample.path, sample.name, truth, sample.defect_type, decision, *values])


def _draw(folder: Path, stage: str, evaluation: AnomalyEvaluation, result: dict[str, Any], look: Look) -> list[Path]:
    """Every figure that the data allow; the files written."""
    figures, main = folder / "figures", evaluation.score
    scores, defect, threshold = evaluation.scores[main], evaluation.is_defect, evaluation.thresholds[main]
    limit = None if math.isnan(threshold) else threshold
    drawn = {f"{stage}_scores": score_histogram_figure(scores, defect, limit, LABELS[main])}
    if defect.any() and not defect.all():
        entry = result["image"][main]
        curves = [("defective", defect, scores)]
        drawn[f"{stage}_roc"] = roc_figure(curves, entry["auroc"])
        drawn[f"{stage}_precision_recall"] = precision_recall_figure(curves, entry["average_precision"])
        if len(entry["auroc_by_type"]) > 1:
            types = [sample.defect_type for sample in evaluation.samples]
            counts = {name: types.count(name) for name in entry["auroc_by_type"]}
            drawn[f"{stage}_auroc_by_type"] = auroc_by_type_figure(entry["auroc_by_type"], entry["auroc"], counts)
    if (folder / "metrics.csv").is_file() and result.get("loss") != "none":
        drawn["training"] = training_figure(folder / "metrics.csv")
    for name in {f"{stage}_roc", f"{stage}_precision_recall", f"{stage}_auroc_by_type"} - set(drawn):
        (figures / f"{name}.png").unlink(missing_ok=True)  # of an earlier evaluation
    written = [save_figure(figure, figures / f"{name}.png") for name, figure in drawn.items()]
    return written + _galleries(figures, stage, evaluation, look)


def _galleries(figures: Path, stage: str, evaluation: AnomalyEvaluation, look: Look) -> list[Path]:
    """Escapes, false alarms and found defects with their maps, and what the Gaussian score rests on."""
    scores, defect = evaluation.scores[evaluation.score], evaluation.is_defect
    threshold = evaluation.thresholds[evaluation.score]
    if math.isnan(threshold):  # without one: the worst of either kind, around the median of all
        threshold = float(np.median(scores))
    chosen = choose(scores, defect, threshold, len(scores))
    pixel_limit = evaluation.thresholds["map_max"]
    limit = None if math.isnan(pixel_limit) else pixel_limit
    named = {
        "escapes": (chosen.escapes, "map", "Escaped defects, the lowest score first"),
        "false_alarms": (chosen.false_alarms, "map", "Good pictures rejected, the highest score first"),
        "found": (chosen.found, "map", "Defects found, the highest score first"),
        "grad_cam": (chosen.found, "grad_cam", "What the Gaussian score of the whole picture rests on (Grad-CAM)"),
    }
    tiles = {
        name: [_tile(evaluation, row, threshold, look, how) for row in _one_of_each_part(evaluation, rows)]
        for name, (rows, how, _) in named.items()
    }
    tiles["grad_cam"] = [tile for tile in tiles["grad_cam"] if tile.scores is not None]
    maps = [tile.scores for name in tiles if name != "grad_cam" for tile in tiles[name] if tile.scores is not None]
    scale = evaluation.map_scale or colour_scale(maps)  # one for all galleries
    written = []
    for name, (_, how, title) in named.items():
        path = figures / f"{stage}_{name}.png"
        if not tiles[name]:
            path.unlink(missing_ok=True)  # of an earlier evaluation
            continue
        if how == "grad_cam":
            drawn = anomaly_gallery(tiles[name], title=title, scale=(0.0, 1.0))
        else:
            drawn = anomaly_gallery(tiles[name], title=title, scale=scale, threshold=limit)
        drawn.save(path)
        written.append(path)
    return written


def _one_of_each_part(evaluation: AnomalyEvaluation, rows: npt.NDArray[np.int64]) -> list[int]:
    """The first picture of each of the first few parts: one part photographed six times shows nothing new."""
    first: dict[str, int] = {}
    for row in rows.tolist():
        sample = evaluation.samples[row]
        first.setdefault(sample.group or sample.name, row)
    return list(first.values())[:_SHOWN]


def _tile(evaluation: AnomalyEvaluation, row: int, threshold: float, look: Look, how: Any) -> AnomalyTile:
    sample = evaluation.samples[row]
    score = float(evaluation.scores[evaluation.score][row])
    picture, mask, scores = look(evaluation.positions[row], how)
    return AnomalyTile(
        picture=picture,
        scores=scores,
        mask=mask,
        name=sample.name,
        defect_type=sample.defect_type,
        is_defect=bool(evaluation.is_defect[row]),
        score=score,
        rejected=score >= threshold,
    )
