"""The checks in their order, and what each makes of what was seen."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lit_defect.callbacks.startup import describe_machine, describe_model
from lit_defect.checking.cost import Cost, kept, seconds_of
from lit_defect.checking.findings import Findings, duration, size
from lit_defect.checking.launch import Launch, check_launch
from lit_defect.checking.pictures import check_cache, check_pictures, check_sharing
from lit_defect.checking.place import check_run, check_space, check_tracking
from lit_defect.checking.steps import Seen, explained, try_steps
from lit_defect.data.cache import available_memory
from lit_defect.data.module import DefectDataModule
from lit_defect.runs import RunFolder
from lit_defect.tasks.base import DefectTask

_NAMED = 5  # parameters that are named of many


@dataclass
class Job:
    """What is to be checked.

    Attributes:
        options: of the run, its objects made: `trainer`, `wandb`, `test_after_fit`.
        dump: the whole configuration in plain types.
        sources: where the options come from, in words.
        model, data: as they were made for the run.
        trainer: of one process (`launch.one_process`).
        launch: what is asked for.
        folder: of the experiment.
        choose: chooses the run's folder, as `fit` does.
        state: the checkpoint that a chosen run goes on from, or None; asked after `choose`.
    """

    options: Mapping[str, Any]
    dump: Mapping[str, Any]
    sources: str
    model: LightningModule
    data: LightningDataModule | None
    trainer: Trainer
    launch: Launch
    folder: Path
    choose: Callable[[], RunFolder]
    state: Callable[[], str | None]


def examine(job: Job) -> Findings:
    """Everything that can be looked at; a failure ends what builds upon it, and nothing else."""
    findings = Findings()
    try:
        _examine(findings, job)
    finally:
        shutil.rmtree(job.trainer.default_root_dir, ignore_errors=True)  # the temporary one
    return findings


def _examine(findings: Findings, job: Job) -> None:
    options, asked = job.options, job.options["trainer"]
    stage = _stage(job.model)
    findings.ok("options", job.sources)
    check_launch(findings, job.launch, job.trainer, asked)
    if asked.get("fast_dev_run"):
        findings.warn("run folder", "none: trainer.fast_dev_run tries a few batches and keeps nothing")
    elif stage == "fit":
        check_run(findings, job.choose, job.folder)
        check_tracking(findings, options["wandb"], asked.get("logger"))
    _check_verbs(findings, job, stage)
    if not check_pictures(findings, job.data, stage):
        return
    if stage != "fit":
        _check_setup(findings, job, stage)
        return
    batches = check_sharing(findings, job.data, job.launch, asked)
    with findings.noting("cache"):
        check_cache(findings, job.data, job.launch)
    with findings.hearing("training"):
        seen = try_steps(job.trainer, job.model, job.data, job.state(), small=not job.launch.here)
    _judge_model(findings, job, seen)
    if not seen.losses:
        return
    _judge_steps(findings, job, seen)
    _judge_memory(findings, job, seen)
    if not asked.get("fast_dev_run") and seen.checkpoint:
        enabled = asked.get("enable_checkpointing") is not False
        count = kept(asked.get("callbacks"), enabled, getattr(job.model, "monitor", None) is not None)
        check_space(findings, job.folder, seen.checkpoint, count)
    _judge_cost(findings, job, seen, batches)


def _stage(model: LightningModule) -> str:
    """`fit`, or the first verb of a task that has none such."""
    verbs = getattr(model, "verbs", ("fit",))
    return "fit" if "fit" in verbs else str(verbs[0])


def _check_verbs(findings: Findings, job: Job, stage: str) -> None:
    model = job.model
    if not isinstance(model, DefectTask):
        return
    verbs = ", ".join(model.verbs)
    if stage != "fit":
        findings.ok(
            "verbs", f"{type(model).__name__} has {verbs}: it trains nothing, so no step is tried", verbs=model.verbs
        )
    elif job.options["test_after_fit"] and (reason := model.objection("test")):
        findings.fail("verbs", f"--test_after_fit true: {reason}", "--test_after_fit false")
    elif job.options["test_after_fit"] and job.options["trainer"].get("enable_checkpointing") is False:
        findings.fail("verbs", "--test_after_fit true tests a checkpoint", "leave trainer.enable_checkpointing on")
    else:
        findings.ok("verbs", verbs, verbs=model.verbs)


def _check_setup(findings: Findings, job: Job, stage: str) -> None:
    """What a task that does not train finds wrong with its data and options, and with the files of its pipeline."""
    trainer, model = job.trainer, job.model
    trainer.datamodule, model.trainer = job.data, trainer  # type: ignore[attr-defined]
    with findings.hearing(stage), findings.noting(stage):
        model.setup(stage)
        findings.ok(stage, str(getattr(model, "title", type(model).__name__)))
    if (opens := getattr(model, "open", None)) is not None:
        with findings.hearing("model"), findings.noting("model"):
            opens()
            findings.ok("model", "its files are there and open")


def _judge_model(findings: Findings, job: Job, seen: Seen) -> None:
    """Whether it could be built, with its weights, and came to its first step."""
    built = seen.stage not in ("data", "model")
    if built:
        findings.ok("model", describe_model(job.model), parameters=sum(p.numel() for p in job.model.parameters()))
        if hub := _from_hub(job.dump):
            where = os.environ.get("HF_HOME", "~/.cache/huggingface")
            findings.ok("weights", f"{hub} from the hub, now in {where}: a node without a network needs that folder")
    if seen.error is not None:
        findings.fail(seen.stage, *explained(seen.error))
    elif not seen.losses:
        findings.warn(
            "training", "no step was made: nothing is left to train", "see trainer.max_epochs, max_steps and limits"
        )


def _from_hub(dump: Mapping[str, Any]) -> str:
    """Which options name files of a hub."""
    options = (dump.get("model") or {}).get("init_args") or {}
    named = [f"{key} {value}" for key, value in options.items() if key == "weights" and str(value).startswith("hub")]
    bases = [
        key for key in ("base", "autoencoder") if options.get(key) and not Path(options[key]).expanduser().exists()
    ]
    return ", ".join([*named, *(f"{key} {options[key]}" for key in bases)])


def _judge_steps(findings: Findings, job: Job, seen: Seen) -> None:
    losses = seen.losses
    text = f"{len(losses)} steps of {seen.batch} samples; loss {', '.join(f'{loss:.4g}' for loss in losses)}"
    if not all(map(math.isfinite, losses)):
        findings.fail(
            "loss", text, "a smaller --model.lr, --trainer.precision 32-true, or look at the data", losses=losses
        )
    else:
        findings.ok("loss", text, losses=losses)
    scaled = str(job.trainer.precision).startswith("16")
    if seen.broken and not scaled:
        findings.fail(
            "gradients", f"not finite in {_some(seen.broken)}", "a smaller --model.lr, --trainer.precision 32-true"
        )
    elif seen.broken:
        findings.warn("gradients", f"not finite in {_some(seen.broken)}; the scale of 16-bit floats is still falling")
    if seen.missing:
        _judge_missing(findings, job, seen.missing)
    elif not seen.broken:
        findings.ok("gradients", f"finite, for all {seen.trained:,} parameters in the optimizer", trained=seen.trained)
    if seen.validated is not None:
        _judge_validation(findings, job, seen)


def _judge_missing(findings: Findings, job: Job, missing: list[str]) -> None:
    text = f"none for {_some(missing)}, which are to be trained"
    remedy = "--trainer.strategy ddp_find_unused_parameters_true"
    if job.launch.processes > 1 and "find_unused" not in job.launch.strategy:
        findings.fail("gradients", f"{text}: DDP stops at that", remedy, missing=missing)
    else:
        findings.warn("gradients", text, f"with several processes: {remedy}", missing=missing)


def _judge_validation(findings: Findings, job: Job, seen: Seen) -> None:
    shown = {name: value for name, value in seen.metrics.items() if name.startswith("val/")}
    monitor = (getattr(job.model, "monitor", None) or ("",))[0]
    if monitor.startswith("val/") and monitor not in shown:
        logged = ", ".join(shown) or "nothing"
        findings.warn("validation", f"one batch gives {logged}, and {monitor} is to choose the best checkpoint")
    else:
        findings.ok("validation", f"a batch takes {duration(seen.validated or 0)}", seconds=seen.validated)


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


def _judge_memory(findings: Findings, job: Job, seen: Seen) -> None:
    """Measured on a GPU; on a CPU the sum of what is known, which is about what a GPU would need."""
    memory = seen.memory
    batch = getattr(job.data, "batch_size", seen.batch) if not job.launch.here else seen.batch
    share = max(1, batch) / max(1, seen.batch)
    estimate = memory.estimate(share)
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
             "activations": int(memory.activations * share)}  # fmt: skip
    values = {**parts, "estimate": estimate, "batch": batch, "process": memory.process}
    listed = ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    each = " in each process" if job.launch.processes > 1 else ""
    if memory.peak:
        text = (
            f"{size(memory.peak)} of {size(memory.device)} at most{each}, measured with batches of {batch} ({listed})"
        )
        findings.ok("memory", text, **values, peak=memory.peak, device=memory.device)
        return
    text = f"about {size(estimate)}{each} with batches of {batch}: {listed}; temporary tensors come on top"
    if job.launch.here:
        text += f"; this process took {size(memory.process)} in all"
    free = available_memory()
    if job.launch.here and free is not None and (job.launch.devices - 1) * memory.process > free:
        findings.warn(
            "memory", f"{text}; {size(free)} are free for {job.launch.devices - 1} more", "fewer devices", **values
        )
    else:
        findings.ok("memory", text, **values)


def _judge_cost(findings: Findings, job: Job, seen: Seen, batches: dict[str, int]) -> None:
    asked, launch = job.options["trainer"], job.launch
    if "train" not in batches:
        return
    cost = Cost.of(asked, batches["train"], batches.get("val", 0))
    per_step = job.data.batch_size if isinstance(job.data, DefectDataModule) else seen.batch
    per_step = min(per_step, len(getattr(job.data, "samples", {}).get("train", ())) // launch.processes)
    if not math.isfinite(cost.total):
        limit = seconds_of(asked.get("max_time"))
        end = f"trainer.max_time ends it after {duration(limit)}" if limit else "nothing ends it"
        (findings.ok if limit else findings.warn)(
            "cost", f"{cost.steps} optimizer steps an epoch; {end}", steps_per_epoch=cost.steps
        )
        return
    pictures = cost.epochs * cost.batches * per_step * launch.processes
    values = {"steps_per_epoch": cost.steps, "epochs": cost.epochs, "steps": cost.total, "pictures": round(pictures)}
    findings.ok(
        "cost",
        f"{cost.steps} optimizer steps an epoch, {cost.epochs:g} epochs, {cost.total:,} steps; "
        f"{pictures:,.0f} pictures seen; {cost.validations} validations",
        **values,
        validations=cost.validations,
    )
    _judge_time(findings, job, seen, cost, per_step)


def _judge_time(findings: Findings, job: Job, seen: Seen, cost: Cost, per_step: int) -> None:
    """The measured time of a step, times the steps."""
    scale = max(1, per_step) / max(1, seen.batch)
    step = seen.step_seconds * scale
    training = step * cost.epochs * cost.batches
    validating = (seen.validated or 0.0) * scale * cost.validations * cost.val_batches
    preparing = seen.prepared / max(seen.share, 1e-9)
    total = training + validating + preparing
    values = {"step_seconds": step, "data_share": seen.data_share, "preparing_seconds": preparing,
              "validating_seconds": validating, "seconds": total}  # fmt: skip
    text = f"about {duration(total)}: {duration(step)} a batch ({seen.data_share:.0%} of it waiting for data)"
    text += f", validation {duration(validating)}" if validating else ""
    text += f", preparation before the first step {duration(preparing)}" if preparing > max(5, 0.02 * total) else ""
    text += f"\nmeasured on {describe_machine(job.trainer)}"
    text += "" if seen.warm else ", in the first steps, which are slower"
    text += "; the asked one differs" if not job.launch.here else "; another machine differs"
    text += ", and the test after fit comes on top" if job.options["test_after_fit"] else ""
    limit = seconds_of(job.options["trainer"].get("max_time"))
    if limit is not None and job.launch.here and total > limit:
        findings.warn(
            "time", f"{text}\ntrainer.max_time stops it after {duration(limit)}", "--resume goes on", **values
        )
    else:
        findings.ok("time", text, **values)
