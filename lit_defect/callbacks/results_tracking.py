"""Shows Weights & Biases what a run writes into its folder, when it is written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng

from lit_defect.callbacks import artifacts, media
from lit_defect.callbacks.tracking import GLOBAL_STEP, harmless, wandb_runs
from lit_defect.data.images import read_image
from lit_defect.reporting.overlays import fixed_positions
from lit_defect.runs import RunFolder

_TOLD = ("commit", "versions", "command", "host", "cpus", "devices", "started", "resumed", "data", "data_fingerprint")


class ResultsTracking(Callback):
    """Logs to W&B, where a trainer has such a logger: rank 0 only, after what it logs was written.

    At the start: what `run.json` says, and which artifacts the run builds upon. While training: previews, new figures,
    and every few epochs some validation pictures with their masks and maps. After an evaluation: its figures with
    intervals, curves, a table of samples, figures, pictures with masks. In the end: checkpoints, splits, manifests.
    Whatever fails warns, and the run goes on.

    Args:
        run: the run folder.
        verb: fit, validate, test or predict.
        config: the whole configuration, plain types.
        checkpoints: what artifacts hold of them.
        every_n_epochs: between pictures while training; ten times as many from epoch 1000 on, and so forth.
        rows: of a table of samples, at most.
        pictures: with masks, at most.
    """

    def __init__(
        self,
        run: RunFolder,
        verb: str,
        config: Mapping[str, Any],
        checkpoints: artifacts.Checkpoints = "reference",
        every_n_epochs: int = 10,
        rows: int = 100,
        pictures: int = 6,
    ) -> None:
        self.run = run
        self.verb = verb
        self.config = config
        self.checkpoints = checkpoints
        self.every_n_epochs = every_n_epochs
        self.rows = rows
        self.pictures = pictures
        self._seen = self._figures()  # of earlier launches

    # --- the run itself ---

    @harmless("describing the run")
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Config, lineage, and that the summary is to hold the best of what is monitored."""
        self._begin(trainer)
        monitor = getattr(pl_module, "monitor", None)
        if monitor is None:
            return
        for run in wandb_runs(trainer):
            with harmless("naming the monitored figure"):
                run.define_metric(monitor[0], step_metric=GLOBAL_STEP, step_sync=True, summary=monitor[1])

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, of a run that only evaluates."""
        self._begin_evaluation(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, of one that only predicts or generates."""
        self._begin_evaluation(trainer)

    @harmless("describing the run")
    def _begin_evaluation(self, trainer: Trainer) -> None:
        if self.verb != "fit" and self.run.record().get("status") == "evaluation":
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        for run in wandb_runs(trainer):
            with harmless("logging what run.json says"):
                record = self.run.record()
                told = {key: record[key] for key in _TOLD if key in record}
                run.config.update({"run": told, "lineage": self._lineage(record)}, allow_val_change=True)
                artifacts.use(run, artifacts.used_by(self.config, self.run))

    def _lineage(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Names of the artifacts behind this run."""
        return {"data": artifacts.data_name(record), "uses": artifacts.used_by(self.config, self.run)}

    # --- while training ---

    @harmless("showing previews")
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Previews, such as pseudo-anomalies."""
        self._show_new_figures(trainer)

    @harmless("showing validation")
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pictures of every few epochs of a fit; the results of the verb `validate`."""
        if self.verb == "validate":
            self._show_results(trainer, pl_module, "val")
        elif not trainer.sanity_checking and self._is_due(trainer.current_epoch):
            self._show_new_figures(trainer)
            self._show_overlays(trainer, pl_module, "val", "val")

    def _is_due(self, epoch: int) -> bool:
        """Whether an epoch's pictures are shown: of thousands of epochs less often, or they would fill a disk."""
        return epoch % (self.every_n_epochs * 10 ** max(0, len(str(epoch)) - 3)) == 0

    # --- results ---

    @harmless("showing results")
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The results of the test split."""
        self._show_results(trainer, pl_module, "test")

    @harmless("showing results")
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predictions, and generated pictures beside their sources."""
        self._show_results(trainer, pl_module, "predict")
        root = getattr(pl_module, "root", None)
        if isinstance(root, Path) and (root / artifacts.MANIFEST).is_file():
            self._show_generated(trainer, root)

    @harmless("logging artifacts")
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After a fit and its exports: their figures, and the artifacts."""
        if stage != "fit" or not (runs := wandb_runs(trainer)):
            return
        self._show_new_figures(trainer)
        record = self.run.record()
        lineage = {**self._lineage(record), "run": f"{self.run.experiment}/{self.run.run_id}"}
        for run in runs:
            with harmless("logging artifacts"):
                self._log_data(run, record)
                if self.checkpoints != "off":
                    exports = getattr(pl_module, "exports", "")
                    self._log(run, artifacts.model_artifact(self.run, exports, self.checkpoints, lineage))

    def _log_data(self, run: Any, record: Mapping[str, Any]) -> None:
        """The splits: an input of the run where W&B can tell, which is on line."""
        if name := artifacts.data_name(record):
            about = {**record["data"], "fingerprint": record["data_fingerprint"]}
            splits = artifacts.file_artifact(name, "dataset", [self.run.path / "splits.csv"], about)
            if splits is not None and not run.offline:
                run.use_artifact(splits)
            else:
                self._log(run, splits)

    @staticmethod
    def _log(run: Any, artifact: Any) -> None:
        if artifact is not None:
            run.log_artifact(artifact)

    def _show_results(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        if not (runs := wandb_runs(trainer)):
            return
        named = getattr(pl_module, "results_name", None)
        stage = named(split) if named is not None else split
        rows = media.read_predictions(self.run.path / f"{stage}_predictions.csv")
        result = media.read_json(self.run.path / f"{stage}_metrics.json")
        names, normal = result.get("class_names", ()), result.get("normal_class")
        good = names[normal] if names and normal is not None else None
        figures = media.summary_of(stage, result, getattr(pl_module, "main", None))
        for run in runs:
            with harmless("logging results"):
                run.summary.update(figures)
        self._show(trainer, "charts", lambda: media.charts(stage, rows, good))
        self._show(trainer, "samples", lambda: media.sample_table(stage, rows, _look, self.rows))
        self._show_overlays(trainer, pl_module, split, stage)
        self._show_new_figures(trainer)

    def _show_overlays(self, trainer: Trainer, pl_module: LightningModule, split: str, stage: str) -> None:
        """The same few samples each time; not where the weights lie on several devices: all would have to help."""
        look_at = getattr(pl_module, "look_at", None)
        samples = getattr(getattr(trainer, "datamodule", None), "samples", {}).get(split)
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if look_at is None or not samples or not whole or split not in ("val", "test"):
            return
        positions = fixed_positions(samples, trainer.datamodule.normal_class, self.pictures)  # type: ignore[attr-defined]

        def drawn() -> dict[str, Any]:
            with isolate_rng():  # as without tracking
                return media.overlays(stage, look_at(split, positions))

        self._show(trainer, "masks", drawn)

    def _show_generated(self, trainer: Trainer, root: Path) -> None:
        samples = getattr(getattr(trainer, "datamodule", None), "samples", {})
        known = {sample.name: sample for split in samples.values() for sample in split}

        def source(name: str) -> Any:
            sample = known.get(name)
            if sample is None:
                return None
            return read_image(sample.path, box=sample.box, mirror=sample.mirror, convert=True)

        rows = media.read_predictions(root / artifacts.MANIFEST)
        self._show(trainer, "generated pictures", lambda: media.generated_table(root, rows, source, self.rows))
        record = self.run.record()
        lineage = self._lineage(record)
        if self.run.last.is_file():
            lineage["uses"] = [artifacts.model_name(self.run), *lineage["uses"]]
        files = [root / name for name in (artifacts.MANIFEST, "about.json", "trained_on.csv")]
        for run in wandb_runs(trainer):
            with harmless("logging the manifest"):
                metadata = {**lineage, "asked": len(rows)}
                self._log(run, artifacts.file_artifact(artifacts.generated_name(root), "generated", files, metadata))

    # --- inside ---

    def _figures(self) -> dict[Path, int]:
        """The pictures of the run folder, with their times of change."""
        files = [*self.run.path.glob("*.png"), *self.run.figures.glob("*.png")]
        return {path: path.stat().st_mtime_ns for path in sorted(files)}

    def _show_new_figures(self, trainer: Trainer) -> None:
        if not wandb_runs(trainer):
            return
        found = self._figures()
        new = [path for path, changed in found.items() if self._seen.get(path) != changed]
        self._seen = found
        self._show(trainer, "figures", lambda: media.figures(new))

    def _show(self, trainer: Trainer, what: str, make: Any) -> None:
        """Log what `make` gives, at the step of the training that it belongs to."""
        for run in wandb_runs(trainer):
            with harmless(f"logging {what}"):
                step = trainer.global_step or self.run.record().get("steps", 0)
                if objects := make():
                    run.log({**objects, GLOBAL_STEP: step})


def _look(path: str, name: str) -> Any:
    """The picture of a sample of `<stage>_predictions.csv`."""
    box, mirror = media.where(name)
    return read_image(path, box=box, mirror=mirror, convert=True)
