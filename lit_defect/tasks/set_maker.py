"""What the tasks share that write a set by `predict`: when it is planned, its seed and folder, who begins it."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.tasks.base import DefectTask
from lit_defect.tasks.inversion import Inversion
from lit_defect.tasks.processes import first_process_first


class SetMaker(DefectTask):
    """Base of the tasks that generate.

    Attributes:
        folder: name of the set in the run's folder.
        output: folder of the set instead; None for that one.
        counted_by: the option that says how many.
        _store: of the set, after `beginning`.
    """

    folder: str
    counted_by: str
    _store: Any

    @property
    @abstractmethod
    def output(self) -> str | None:
        """See above."""

    @abstractmethod
    def plan_groups(self) -> None:
        """Decide what is made, and let a sample of the split `predict` stand for each group of it."""

    @property
    def seed(self) -> int:
        """Of the generation: `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def root(self) -> Path:
        """Where the set is written."""
        return Path(self.output).expanduser() if self.output else Path(self.trainer.default_root_dir) / self.folder

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """The first process opens the set before the others.

        Raises:
            UserError: under fast_dev_run or limit_predict_batches, which would leave half of it looking whole; or the
                first process could not.
        """
        limit = self.trainer.limit_predict_batches
        limited = limit != 1.0 or isinstance(limit, int)  # 1.0 is all of them, 1 a single one
        if cut := "fast_dev_run" if self.trainer.fast_dev_run else "limit_predict_batches" if limited else "":  # type: ignore[attr-defined]
            raise UserError(f"trainer.{cut} would leave half a set in {self.root}: set {self.counted_by} instead")
        with first_process_first(self.trainer):
            yield

    def on_predict_epoch_end(self) -> None:
        """Join what the processes have written."""
        self.trainer.strategy.barrier("all is made")
        with first_process_first(self.trainer):
            if self.trainer.is_global_zero:
                self._store.merge()


class InversionMaker(SetMaker, Inversion):
    """Base of the inversions that generate; a subclass sets `generation`, its options, with `count` and `output`."""

    generation: Any
    counted_by = "model.init_args.generation.count"

    @property
    def output(self) -> str | None:
        """As the options say."""
        return self.generation.output  # type: ignore[no-any-return]

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        pairs = "" if self.pairs is None else f" of {len(self.pairs)} (category, type) pairs"
        adapters = f", LoRA of rank {self.lora}" if self.lora else ""
        return f"{type(self).__name__}{pairs} on {self.base_source}{adapters}"

    def serve_groups(self, **splits: list[Any]) -> None:
        """A step is a group of what is to be made, so that one sees how far it is; the plan may wait for a checkpoint.

        Args:
            splits: further ones that the data module is to have.
        """
        self.data.serve_places(**splits)
        if self.pairs is not None:
            self.plan_groups()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """With the checkpoint the pairs are known, and what there is to make of them."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and self._trainer.state.fn == "predict":
            self.plan_groups()
