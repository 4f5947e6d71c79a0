"""A task as its run left it, without the data that it was trained on."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

import lit_defect.tasks
from lit_defect.errors import UserError
from lit_defect.export.intake import Size
from lit_defect.runs import RunFolder, resolve_checkpoint, whole_checkpoint
from lit_defect.tasks.base import DefectTask


@dataclass(frozen=True)
class Opened:
    """A trained task, ready to answer.

    Attributes:
        task: in evaluation mode, on the CPU.
        run: its run folder.
        checkpoint: whose state it has.
        data: options of the run's data module.
        dropped: options of the run that this version does not know.
    """

    task: DefectTask
    run: RunFolder
    checkpoint: Path
    data: dict[str, Any]
    dropped: tuple[str, ...]

    @property
    def data_size(self) -> Size | None:
        """(height, width) that the data module scales pictures to; None where it takes them as they are."""
        size = self.data.get("image_size")
        return (size, size) if isinstance(size, int) else None if size is None else (size[0], size[1])

    @property
    def task_size(self) -> Size | None:
        """(height, width) that the task scales them to afterwards."""
        return getattr(self.task, "image_size", None)

    @property
    def converts(self) -> bool:
        """Whether pictures of 16 bits and the like are converted."""
        return self.data.get("on_wrong_mode") == "convert"

    def digest(self) -> str:
        """SHA-256 of the checkpoint's file."""
        with self.checkpoint.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def exportable() -> list[str]:
    """Names of the tasks that say something for the factory."""
    kinds = (getattr(lit_defect.tasks, name) for name in lit_defect.tasks.__all__)
    return [kind.__name__ for kind in kinds if kind.for_factory is not DefectTask.for_factory]


def open_run(path: Path, checkpoint: str) -> Opened:
    """The task of a run folder.

    Args:
        path: the run folder.
        checkpoint: `best`, `last` or a file.

    Raises:
        UserError: no run, no such checkpoint, a task that is not exported, or a state that this version cannot read
            or that lacks what the answers need.
    """
    run = RunFolder(path)
    config = run.config()
    model = config.get("model") or {}
    if "class_path" not in model:
        raise UserError(f"{path} is no run folder (it has no config.yaml with a model): give runs/EXPERIMENT/RUN")
    kind = _kind(model["class_path"])
    if kind.__name__ not in exportable():
        hint = f"; its first stage, {first}, is" if (first := (model.get("init_args") or {}).get("stage1")) else ""
        raise UserError(f"{path} is a {kind.__name__}, which is not exported. {', '.join(exportable())} are{hint}")
    file = whole_checkpoint(resolve_checkpoint(checkpoint, path.absolute().parent, path.absolute().name))
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(f"{file} is no checkpoint ({type(error).__name__}: {error})") from error
    task, dropped = _task(kind, model.get("init_args") or {}, state, path)
    _load(task, state, file, run)
    data = (config.get("data") or {}).get("init_args") or {}
    return Opened(task, run, file, data, dropped)


def _kind(class_path: str) -> type[DefectTask]:
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module or "lit_defect.tasks"), name)
    except (ImportError, AttributeError):
        raise UserError(
            f"{class_path}: the run's task is not there; is it a class of your own? Set PYTHONPATH"
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, DefectTask)):
        raise UserError(f"{class_path} is no task of lit_defect; {', '.join(exportable())} are exported")
    return kind


def _task(
    kind: type[DefectTask], options: dict[str, Any], state: dict[str, Any], path: Path
) -> tuple[DefectTask, tuple[str, ...]]:
    """The task by the run's options, its classes from the checkpoint; and the options that it does not know."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "model")
    known = set(vars(parser.get_defaults().model))
    learnt = {key: state.get("hyper_parameters", {}).get(key) for key in ("class_names", "normal_class")}
    chosen = {**options, **{key: value for key, value in learnt.items() if value is not None}, "compile": False}
    kept = {key: value for key, value in chosen.items() if key in known}
    try:
        task = parser.instantiate(parser.parse_object({"model": kept})).model
    except (ArgumentError, ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.yaml'}: the model cannot be made again: {error}") from error
    return task, tuple(sorted(set(options) - known))


def _load(task: DefectTask, state: dict[str, Any], file: Path, run: RunFolder) -> None:
    task.configure_model()
    try:
        task.on_load_checkpoint(state)
        task.load_state_dict(state["state_dict"])
    except (RuntimeError, KeyError) as error:
        commit = run.record().get("commit")
        raise UserError(
            f"{file} was written by another version of {type(task).__name__}{f' (commit {commit})' if commit else ''} "
            f"and does not fit this one: export it with that version, or train anew. {_first_lines(error)}"
        ) from error
    task.eval().requires_grad_(False)
    if not getattr(getattr(task, "detector", None), "fitted", True):
        raise UserError(
            f"{file} was written before the training ended and holds no fitted scores: take --ckpt last of a finished "
            "run, or finish this one by fit --resume"
        )


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
