"""One screen at the start: which data, which model, which machine."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table


class StartupSummary(Callback):
    """Prints what is about to happen, once, on rank 0.

    Args:
        folder: the run folder, or None for a run that leaves nothing behind.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._shown = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training."""
        self._show(trainer, pl_module, "fit")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before testing."""
        self._show(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before predicting."""
        self._show(trainer, pl_module, "predict")

    def _show(self, trainer: Trainer, pl_module: LightningModule, verb: str) -> None:
        if self._shown or not trainer.is_global_zero:
            return
        self._shown = True
        console = Console(highlight=False)
        console.print()
        console.print(data_table(getattr(pl_module, "data", None)))
        console.print(f"[bold]model[/]   {describe_model(pl_module)}", soft_wrap=True)
        console.print(f"[bold]machine[/] {describe_machine(trainer)}")
        console.print(f"[bold]{verb}[/]     {self.folder or 'a trial without a run folder'}\n", soft_wrap=True)


class EpochLines(Callback):
    """What a log file shows instead of a progress bar: a line after an epoch, at most one in ten seconds.

    Lightning lets callbacks end an epoch before the task does, which may log its figures only then: the line is
    written when the next epoch begins, or the training ends.
    """

    def __init__(self) -> None:
        self._shown_at = 0.0
        self._ended: tuple[int, int] | None = None  # epochs and steps at the end of the epoch that is to be shown

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the epoch and its validation."""
        now = time.monotonic()
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.is_global_zero and (now - self._shown_at >= 10 or last):
            self._shown_at = now
            self._ended = (trainer.current_epoch + 1, trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the epoch before."""
        self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last epoch."""
        self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ended is None:
            return
        epoch, step = self._ended
        self._ended = None
        monitored = (getattr(pl_module, "monitor", None) or ("",))[0]
        metrics = trainer.callback_metrics
        shown = [key for key in dict.fromkeys(("train/loss", "val/loss", monitored)) if key in metrics]
        figures = "  ".join(f"{key} {float(metrics[key]):.4g}" for key in shown)
        epochs = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else "-"
        print(f"epoch {epoch}/{epochs}  step {step}  {figures}", flush=True)


def data_table(datamodule: object) -> Table:
    """Samples per split and class."""
    counts: dict[str, dict[str, int]] = datamodule.counts() if hasattr(datamodule, "counts") else {}
    counts = {split: found for split, found in counts.items() if sum(found.values())}
    new = len(getattr(datamodule, "samples", {}).get("predict", ()))
    table = Table(title=f"data: {type(datamodule).__name__}", title_justify="left", title_style="bold")
    table.add_column("split")
    names = list(dict.fromkeys(name for found in counts.values() for name in found))
    shown = names[:8]
    for name in shown:
        table.add_column(name, justify="right")
    if len(names) > len(shown):
        table.add_column(f"{len(names) - len(shown)} more", justify="right")
    table.add_column("all", justify="right")
    for split, found in counts.items():
        cells = [str(found.get(name, 0)) for name in shown]
        if len(names) > len(shown):
            cells.append(str(sum(found.get(name, 0) for name in names[len(shown) :])))
        table.add_row(split, *cells, str(sum(found.values())))
    if not counts and new:
        table.add_row("predict", str(new))
    return table


def describe_model(module: LightningModule) -> str:
    """Class, trainable and frozen parameters of each part."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    title = getattr(module, "title", type(module).__name__)
    return f"{title}: {trainable:,} parameters trained, {frozen:,} frozen"


def describe_machine(trainer: Trainer) -> str:
    """Devices, precision and threads."""
    kind = type(trainer.accelerator).__name__.removesuffix("Accelerator")
    name = f" ({torch.cuda.get_device_name()})" if kind == "CUDA" else f", {torch.get_num_threads()} threads"
    processes = "process" if trainer.world_size == 1 else "processes"
    return f"{trainer.world_size} {kind} {processes}{name}, precision {trainer.precision}"
