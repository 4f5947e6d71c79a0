"""What an evaluation of a classifier leaves in its run folder, and the last words on the screen."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from lit_defect.metrics.classification import defect_score
from lit_defect.reporting.figures import save_figure, training_figure, write_figures
from lit_defect.reporting.gallery import Tile, gallery, worst_mistakes
from lit_defect.reporting.tables import metrics_table, rows
from lit_defect.runs import keep_previous, write_json
from lit_defect.tasks.evaluation import Evaluation

Look = Callable[[int, int], tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32] | None]]

_SHOWN_MISTAKES = 12


def write_report(folder: Path, stage: str, result: dict[str, Any], evaluation: Evaluation, look: Look) -> None:
    """Predictions always; figures, pictures of mistakes and the metrics where the labels are known.

    Args:
        folder: the run folder.
        stage: test, mirrored, val or predict.
        result: what `evaluate` returned, with the settings that led to it; empty for unknown labels.
        evaluation: the predictions.
        look: (position in the split, class) -> picture (H, W, 3) uint8 and the class's activation map (H, W).
    """
    predictions = folder / f"{stage}_predictions.csv"
    keep_previous(predictions)
    write_predictions(predictions, evaluation, stage)
    console = Console(highlight=False)
    count = len(evaluation.labels)
    if not result:
        console.print(f"\n{count} predictions: {predictions}\n", soft_wrap=True)
        return
    metrics = folder / f"{stage}_metrics.json"
    keep_previous(metrics)
    write_json(metrics, result)
    figures = folder / "figures"
    probabilities, labels = evaluation.probabilities, evaluation.labels
    written = write_figures(figures, probabilities, labels, result, prefix=f"{stage}_")
    if (folder / "metrics.csv").is_file():
        written.append(save_figure(training_figure(folder / "metrics.csv"), figures / "training.png"))
    written.append(figures / f"{stage}_mistakes.png")
    wrong = int((probabilities.argmax(1) != labels).sum())
    title = f"{wrong} mistakes on {count} pictures ({stage}), the surest first" if wrong else "No mistakes"
    gallery(mistake_tiles(evaluation, look), title=title).save(written[-1])
    console.print()
    console.print(metrics_table(result, f"{stage}: {count} pictures"))
    if fresh := result.get("without_near_duplicates"):
        figures_of = ", ".join(
            f"{row.label} {row.number(row.value)} ({row.interval})"
            for row in rows(fresh)
            if row.key in ("accuracy", "auroc", "escape_rate")
        )
        console.print(
            f"on the {fresh['n']} pictures without a near-duplicate in another split: {figures_of}", soft_wrap=True
        )
    console.print(f"metrics      {metrics}\npredictions  {predictions}", soft_wrap=True)
    console.print(f"figures      {figures}: {', '.join(path.name for path in written)}", soft_wrap=True)


def write_predictions(path: Path, evaluation: Evaluation, stage: str) -> None:
    """CSV: path, name, label, prediction, score (defective, or of the prediction), split, P of each class."""
    names, probabilities = evaluation.class_names, evaluation.probabilities
    normal = evaluation.normal_class
    score = probabilities.max(1) if normal is None else defect_score(probabilities, normal)
    lines = zip(evaluation.samples, evaluation.labels, probabilities, score, strict=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "name", "label", "prediction", "score", "split", *(f"p({name})" for name in names)])
        for sample, label, row, value in lines:
            truth = names[label] if label >= 0 else ""
            shares = [f"{share:.8g}" for share in row]
            prediction = names[int(row.argmax())]
            writer.writerow([sample.path, sample.name, truth, prediction, f"{value:.8g}", stage, *shares])


def mistake_tiles(evaluation: Evaluation, look: Look) -> list[Tile]:
    """Pictures of the worst mistakes with the class-activation map of the wrong class."""
    tiles = []
    for row in worst_mistakes(evaluation.probabilities, evaluation.labels, _SHOWN_MISTAKES):
        shares = evaluation.probabilities[row]
        predicted = int(shares.argmax())
        picture, heat = look(evaluation.positions[row], predicted)
        tiles.append(
            Tile(
                picture=picture,
                name=evaluation.samples[row].name,
                truth=evaluation.class_names[evaluation.labels[row]],
                predicted=evaluation.class_names[predicted],
                probability=float(shares[predicted]),
                heat=heat,
            )
        )
    return tiles
