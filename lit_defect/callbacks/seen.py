"""Refuses to evaluate a model on pictures that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_defect.errors import UserError
from lit_defect.runs import RunFolder

_USED_BEFORE = {"test": ("train", "val"), "val": ("train",)}  # validation chose the checkpoint and the threshold


class SeenPictures(Callback):
    """Compares the splits at hand with the `splits.csv` of the run whose weights go on or are evaluated.

    Another `data.seed` or `data.val_fraction` than in training moves pictures from one split to another, and
    a test would then praise what was learned by heart.

    Args:
        run: the run that the checkpoint belongs to.
        config: the configuration at hand, plain types.
    """

    def __init__(self, run: RunFolder, config: Mapping[str, Any]) -> None:
        self.run = run
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before anything is written; a resumed run keeps its splits, too.

        Raises:
            UserError: pictures of the split to evaluate were used in training.
        """
        splits = {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        self._check(getattr(trainer, "datamodule", None), splits)

    def _check(self, data: Any, splits: Iterable[str]) -> None:
        file = self.run.path / "splits.csv"
        if not file.is_file() or getattr(data, "test", None) == "mirrored_train":
            return
        before = self.run.splits()
        for split in splits:
            names = [sample.name for sample in getattr(data, "samples", {}).get(split, ())]
            seen = sorted(name for name in names if before.get(name) in _USED_BEFORE[split])
            if not seen:
                continue
            trained = sum(before[name] == "train" for name in seen)
            text = (
                f"{len(seen)} of {len(names)} {split} pictures were used in the training of {self.run.path} "
                f"({trained} to train, {len(seen) - trained} to validate), such as {seen[0]}; figures would be too good"
            )
            if _of_another_place(self.run, self.config):
                warnings.warn(f"{text}, if these are the same pictures under another root", stacklevel=2)
            else:
                raise UserError(
                    f"{text}. Repeat the run's own split by --data.split_file {file}, or set data.seed and the "
                    "fractions as in its config.yaml"
                )


def _of_another_place(run: RunFolder, config: Mapping[str, Any]) -> bool:
    """Whether the data set at hand is another one than the run's, so that equal names may mean other pictures."""
    then, now = (part.get("data") or {} for part in (run.config(), config))
    roots = [_absolute((part.get("init_args") or {}).get("root")) for part in (then, now)]
    return bool(then) and (then.get("class_path") != now.get("class_path") or roots[0] != roots[1])


def _absolute(root: Any) -> Path | None:
    return Path(str(root)).expanduser().resolve() if root else None
