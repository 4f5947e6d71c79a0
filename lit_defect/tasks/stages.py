"""First stages of a refiner: a Segmenter's checkpoint, or probability maps that any program has written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.errors import UserError
from lit_defect.reporting.probabilities import HEADER, ProbabilityMaps
from lit_defect.runs import RunFolder, list_runs, run_of_checkpoint
from lit_defect.tasks.base import Batch
from lit_defect.tasks.segmentation import load_segmenter
from lit_defect.transfer import sent


class FirstStage(nn.Module):
    """Probabilities of a batch's pictures.

    Attributes:
        source: the file or folder that it was read from.
        fingerprint: identity of what it says.
        parameters_used: of its network; None where that is not known.
    """

    source: str
    fingerprint: str
    parameters_used: int | None = None

    def stored(self, batch: Batch) -> Tensor | None:
        """Maps (B, C, H, W) that are read; None where the network looks at the pictures itself."""
        return None

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> probabilities (B, C, H, W) float32; where nothing is stored."""
        raise UserError("stored maps know nothing of new pictures")

    def check(self, data: Any, splits: Sequence[str]) -> None:
        """Look for what would go wrong later, in the splits of a data module that will be asked for."""


class SegmenterStage(FirstStage):
    """A trained Segmenter, frozen.

    Args:
        path: its checkpoint.
        class_names: of the data.

    Raises:
        UserError: no such checkpoint, or other classes.
    """

    def __init__(self, path: Path, class_names: Sequence[str]) -> None:
        super().__init__()
        self.path = path
        self.segmenter = load_segmenter(str(path))
        if list(self.segmenter.names) != list(class_names):
            raise UserError(
                f"model.init_args.stage1: {path} names the classes {', '.join(self.segmenter.names)}; the data have "
                f"{', '.join(class_names)}: choose the same classes in data, or a first stage trained on these"
            )
        assert self.segmenter.network is not None
        self.source, self.fingerprint = str(path), self.segmenter.network.fingerprint()
        self.parameters_used = sum(parameter.numel() for parameter in self.segmenter.parameters())

    def train(self, mode: bool = True) -> SegmenterStage:
        """It never trains."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> probabilities (B, C, H, W) float32."""
        return self.segmenter.probabilities(images)

    def check(self, data: Any, splits: Sequence[str]) -> None:
        """Refuse to validate and test on what the first stage was trained on: its maps are too good there.

        Raises:
            UserError: such pictures.
        """
        run = run_of_checkpoint(self.path)
        if run is not None:
            _refuse_seen(run, data, splits)


class StoredStage(FirstStage):
    """Probability maps in a folder (`reporting/probabilities.py`).

    Args:
        folder: of the maps.
        class_names: of the data.

    Raises:
        UserError: no such folder, or maps of other classes.
    """

    def __init__(self, folder: Path, class_names: Sequence[str]) -> None:
        super().__init__()
        self.maps = ProbabilityMaps(folder, class_names)
        self.source = self.fingerprint = str(folder)

    def stored(self, batch: Batch) -> Tensor | None:
        """(B, C, H, W) float32, on the device of the batch's pictures."""
        maps = [torch.from_numpy(self.maps.read(name)) for name in batch["name"]]
        size = batch["image"].shape[-2:]
        for name, one in zip(batch["name"], maps, strict=True):
            if one.shape[-2:] != size:
                raise UserError(
                    f"{self.maps.folder}: the map of {name} is {one.shape[-2]}x{one.shape[-1]}, its picture "
                    f"{size[0]}x{size[1]}: write the maps for pictures of this size, or set data.image_size to theirs"
                )
        return sent(torch.stack(maps), batch["image"].device)

    def check(self, data: Any, splits: Sequence[str]) -> None:
        """Read every map once; those in a Segmenter's run are too good where it was trained.

        Raises:
            UserError: maps that are missing, of another size or number of classes, or no probabilities; or pictures
                to be evaluated that the run beside the maps was trained on.
        """
        run = RunFolder(self.maps.folder.resolve().parent)
        if run.record():
            _refuse_seen(run, data, splits)
        names = [sample.name for split in splits for sample in data.samples.get(split, ())]
        sizes = None if data.image_size is None else [tuple(data.image_size)] * len(names)
        self.maps.check(names, sizes)


def _refuse_seen(run: RunFolder, data: Any, splits: Sequence[str]) -> None:
    """Raises `UserError` if the run of a first stage was trained on pictures of the splits that judge a refiner."""
    trained_on = (run.config().get("data") or {}).get("init_args") or {}
    if str(Path(str(trained_on.get("root"))).expanduser().absolute()) != str(data.root):
        return  # equal names may mean other pictures
    before = run.splits()
    for split in set(splits) & {"val", "test"}:
        seen = [sample.name for sample in data.samples.get(split, ()) if before.get(sample.name) == "train"]
        if seen:
            raise UserError(
                f"{len(seen)} {split} pictures, such as {seen[0]}, were used to train the first stage in "
                f"{run.path}; its maps of them are too good. Take over its split by --data.split_file "
                f"{run.path / 'splits.csv'}, or set data.seed and the fractions as in its config.yaml"
            )


def first_stage(source: str, class_names: Sequence[str]) -> FirstStage:
    """The first stage behind `source`: a folder of maps, a Segmenter's checkpoint, its run, or the newest of its runs.

    Raises:
        UserError: none of these, or one of other classes.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / HEADER).is_file():
            return StoredStage(path, class_names)
        segmenters = [run for run in list_runs(path) if _model(run) == "Segmenter"]
        for run in (RunFolder(path), *segmenters):
            for checkpoint in (run.best, run.last):
                if checkpoint.is_file():
                    return SegmenterStage(checkpoint, class_names)
        return StoredStage(path, class_names)  # which says what is missing
    if not path.is_file():
        raise UserError(
            f"model.init_args.stage1 = {source}: there is no such file or folder. Expected the run folder or "
            "checkpoint of a Segmenter, or a folder of probability maps (predict of a Segmenter writes one)"
        )
    return SegmenterStage(path, class_names)


def _model(run: RunFolder) -> str:
    """Name of the task that a run has trained."""
    return str((run.config().get("model") or {}).get("class_path")).rsplit(".", 1)[-1]
