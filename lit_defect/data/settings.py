"""What a data module refuses before it looks at a single file: values outside their range, and contradictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lit_defect.errors import UserError

AT_LEAST = {"batch_size": 1, "global_batch_size": 1, "eval_batch_size": 1, "batches_per_epoch": 1, "num_workers": 0}


def check_choices(classes: Iterable[type], values: Mapping[str, Any]) -> None:
    """Raises UserError if a value is none of its argument's `Literal`; the command line has checked this, Python not.

    Args:
        classes: those whose `__init__` name the arguments, the base class first.
        values: arguments by name.
    """
    hints = {key: hint for one in classes for key, hint in get_type_hints(one.__init__).items()}  # type: ignore[misc]
    for key, value in values.items():
        if get_origin(hints.get(key)) is Literal and value not in get_args(hints[key]):
            raise UserError(f"data.{key} is {value!r}; expected {' or '.join(map(repr, get_args(hints[key])))}.")


def check_settings(values: Mapping[str, Any]) -> None:
    """Raises UserError if attributes of a `DefectDataModule` are out of range or contradict each other."""
    for key, least in AT_LEAST.items():
        if values[key] is not None and values[key] < least:
            raise UserError(f"data.{key} is {values[key]}; expected {least} or more.")
    sides = values["image_size"]
    if sides is not None and (len(sides) != 2 or min(sides) < 1):
        raise UserError(f"data.image_size is {sides}; expected a side or [height, width] in pixels.")
    if values["split_file"] and any(values[key] is not None for key in ("folds", "shots", "val_seed")):
        raise UserError(
            "data.split_file says who trains, validates and tests: leave data.folds, data.shots and data.val_seed out."
        )
    if values["test"] == "mirrored_train" and values["leakage"] == "error":
        raise UserError(
            "data.test=mirrored_train tests on the training pictures, which data.leakage=error forbids. "
            "Set data.test=holdout, or data.leakage=warn to repeat that protocol."
        )


def share_of_step(samples: int, processes: int, accumulated: int, evenly: bool = True) -> int:
    """Samples that a process takes at a time, of those of an optimizer step.

    Args:
        samples: of an optimizer step.
        processes: that share it.
        accumulated: batches whose gradients a step adds up.
        evenly: whether all have to have as many; not where nothing is trained.

    Raises:
        UserError: they cannot be shared evenly.
    """
    share, rest = divmod(samples, processes * accumulated)
    if not evenly:
        return max(1, share)
    if rest or not share:
        by = f"{processes} processes" + (f" x {accumulated} accumulated batches" if accumulated > 1 else "")
        near = max(1, round(samples / (processes * accumulated))) * processes * accumulated
        raise UserError(f"data.global_batch_size = {samples} cannot be shared by {by}: {near} can.")
    return share
