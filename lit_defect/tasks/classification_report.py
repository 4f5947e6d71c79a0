"""What an evaluation of a classifier leaves in its run folder, and the last words on the screen."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from lit_defect.errors import UserError
from lit_defect.metrics.classification import defect_score
from lit_defect.nets.gradcam import grad_cam
from lit_defect.reporting.figures import save_figure, training_figure, write_figures
from lit_defect.reporting.gallery import Tile, gallery, worst_mistakes
from lit_defect.reporting.tables import metrics_table
from lit_defect.runs import keep_previous, write_json
from lit_defect.tasks.views import resize, unit_range

if TYPE_CHECKING:
    from lit_defect.tasks.classification import DefectClassifier

_SHOWN_MISTAKES = 12
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def write_report(
    task: DefectClassifier,
    folder: Path,
    stage: str,
    result: dict[str, Any],
    *,
    samples: list[Any],
    probabilities: Floats,
    labels: Ints,
) -> None:
    """Predictions always; figures, pictures of mistakes and the metrics where the labels are known.

    Args:
        task: the classifier, for its class-activation maps.
        folder: the run folder.
        stage: test, val or predict.
        result: what `evaluate` returned, with the settings that led to it; empty for unknown labels.
        samples: n samples of the data module.
        probabilities: (n, C).
        labels: (n,), -1 where unknown.
    """
    names = list(task.class_names or ())
    predictions = folder / f"{stage}_predictions.csv"
    keep_previous(predictions)
    write_predictions(predictions, samples, probabilities, labels, names, task.normal_class, stage)
    console = Console(highlight=False)
    if not result:
        console.print(f"\n{len(samples)} predictions: {predictions}\n", soft_wrap=True)
        return
    metrics = folder / f"{stage}_metrics.json"
    keep_previous(metrics)
    write_json(metrics, result)
    written = write_figures(folder / "figures", probabilities, labels, result, prefix=f"{stage}_")
    if (folder / "metrics.csv").is_file():
        written.append(save_figure(training_figure(folder / "metrics.csv"), folder / "figures" / "training.png"))
    worst = worst_mistakes(probabilities, labels, _SHOWN_MISTAKES)
    picture = folder / "figures" / f"{stage}_mistakes.png"
    tiles = mistake_tiles(task, stage, worst, samples, probabilities, labels, names)
    wrong = int((probabilities.argmax(1) != labels).sum())
    title = f"{wrong} mistakes on {len(labels)} pictures ({stage}), the surest first" if wrong else "No mistakes"
    gallery(tiles, title=title).save(picture)
    console.print()
    console.print(metrics_table(result, f"{stage}: {len(labels)} pictures"))
    console.print(f"metrics      {metrics}\npredictions  {predictions}", soft_wrap=True)
    console.print(
        f"figures      {folder / 'figures'}: {', '.join(p.name for p in [*written, picture])}", soft_wrap=True
    )


def write_predictions(
    path: Path,
    samples: list[Any],
    probabilities: Floats,
    labels: Ints,
    names: list[str],
    normal_class: int | None,
    stage: str,
) -> None:
    """CSV: path, name, label, prediction, score (defective, or of the prediction), split, P of each class."""
    score = probabilities.max(1) if normal_class is None else defect_score(probabilities, normal_class)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "name", "label", "prediction", "score", "split", *(f"p({name})" for name in names)])
        for sample, label, row, value in zip(samples, labels, probabilities, score, strict=True):
            truth = names[label] if label >= 0 else ""
            shares = [f"{share:.8g}" for share in row]
            prediction = names[int(row.argmax())]
            writer.writerow([sample.path, sample.name, truth, prediction, f"{value:.8g}", stage, *shares])


def mistake_tiles(
    task: DefectClassifier,
    stage: str,
    positions: Ints,
    samples: list[Any],
    probabilities: Floats,
    labels: Ints,
    names: list[str],
) -> list[Tile]:
    """Pictures of samples with the class-activation map of the wrong class."""
    if not len(positions):
        return []
    data = task.data
    data.serve_images = True
    loader = data.loader(stage)
    index = {sample.name: position for position, sample in enumerate(data.samples[stage])}
    tiles = []
    for position in positions:
        sample, row = samples[position], probabilities[position]
        image = loader.batch([index[sample.name]])["image"].to(task.device)
        predicted = int(row.argmax())
        tiles.append(
            Tile(
                picture=image[0].permute(1, 2, 0).cpu().numpy(),
                name=sample.name,
                truth=names[labels[position]],
                predicted=names[predicted],
                probability=float(row[predicted]),
                heat=activation(task, image, predicted),
            )
        )
    return tiles


def activation(task: DefectClassifier, image: torch.Tensor, target: int) -> npt.NDArray[np.float32] | None:
    """Class-activation map (H, W) of one picture (1, 3, H, W); None where the network has no map in space."""
    pixels = task.network.normalise(resize(unit_range(image), task.image_size))
    try:
        heat = grad_cam(task.network, pixels, torch.tensor([target], device=pixels.device))
    except UserError:
        return None
    return heat[0].cpu().numpy()
