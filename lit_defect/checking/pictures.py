"""The data of a run: what its data module finds, and whether that is enough for what is asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from lightning.pytorch import LightningDataModule

from lit_defect.checking.findings import Findings, said, size
from lit_defect.checking.launch import Launch
from lit_defect.data.cache import available_memory
from lit_defect.data.module import DefectDataModule
from lit_defect.data.settings import share_of_step
from lit_defect.errors import DataError, UserError


def check_pictures(findings: Findings, data: LightningDataModule | None, stage: str) -> bool:
    """Files, splits and leakage, by the data module's own hooks; whether there are samples to go on with.

    What it refuses is noted, and then it is asked to be lenient, so that the checks can go on.
    """
    if not isinstance(data, DefectDataModule):
        findings.ok("data", f"{type(data).__name__} is none of lit_defect: only its batches are looked at")
        return True
    with findings.hearing("data", leakage="near-duplicate"):
        if not _prepare(findings, data, stage):
            return False
    for split, found in data.counts().items():
        classes = ", ".join(f"{name} {count}" for name, count in found.items())
        findings.ok(split, f"{sum(found.values())} samples: {classes}", samples=sum(found.values()), classes=found)
    if any(finding.name == "leakage" for finding in findings):
        pass
    elif data.leakage == "off":
        findings.warn("leakage", "near-duplicates across the splits are not looked for", "--data.leakage warn")
    elif any(data.samples.get(split) for split in ("val", "test")):
        findings.ok("leakage", "no near-duplicates across the splits")
    if stage == "fit":
        _check_splits(findings, data)
    return True


def _prepare(findings: Findings, data: DefectDataModule, stage: str) -> bool:
    said_before = ""
    while True:
        try:
            data.prepare_data()
            data.setup(stage)
            return True
        except Exception as error:
            text = said(error)
            if text == said_before:
                return False
            said_before = text
            if data.samples and data.leakage == "error":
                findings.fail("leakage", text)
                data.leakage = "off"
            else:
                findings.fail("data", text)
                data.on_bad_file = "skip"


def _check_splits(findings: Findings, data: DefectDataModule) -> None:
    counts = data.counts()
    if not counts.get("train"):
        findings.fail("train", "no samples", "see data.split_file, or the data set's own train split")
    absent = [name for name, count in counts.get("train", {}).items() if not count]
    if absent and not data.good_only:
        findings.warn("train", f"no sample of class {', '.join(absent)}", "see data.setting, data.split_file")
    if "val" not in counts:
        findings.warn("val", "no samples: nothing chooses the best checkpoint", "--data.val_fraction 0.2")
    if "test" not in counts:
        findings.warn("test", "no samples: nothing will judge the model", "--data.test_fraction 0.25")
    used = [sample for split in ("train", "val", "test") for sample in data.samples.get(split, ())]
    if data.with_masks:
        defective = [sample for sample in used if sample.label != data.normal_class]
        masked = sum(sample.mask is not None for sample in defective)
        findings.ok(
            "masks", f"{masked} of {len(defective)} samples that are not of the good class have one", masks=masked
        )


def check_sharing(
    findings: Findings, data: LightningDataModule | None, launch: Launch, trainer: Mapping[str, Any]
) -> dict[str, int]:
    """Whether the samples can be shared by so many processes; batches of each process by split.

    The data module's own samplers judge, under a stand-in for the trainer that would run there.
    """
    batches: dict[str, int] = {}
    if not isinstance(data, DefectDataModule):
        return batches
    accumulated = trainer.get("accumulate_grad_batches") or 1
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=0,
        world_size=launch.processes,
        num_devices=launch.devices,
        num_nodes=launch.nodes,
        accumulate_grad_batches=accumulated,
        overfit_batches=trainer.get("overfit_batches") or 0,
        training=False,
    )
    try:
        if data.global_batch_size is not None:
            data.batch_size = share_of_step(data.global_batch_size, launch.processes, accumulated)
        for split, make in (
            ("train", data.train_dataloader),
            ("val", data.val_dataloader),
            ("test", data.test_dataloader),
        ):
            if not data.samples.get(split):
                continue
            try:
                batches[split] = len(make())
            except DataError as error:
                findings.fail(f"{split} shared", f"{launch.processes} processes: {error}")
    except UserError as error:
        findings.fail("batch size", str(error))
    finally:
        data.trainer = None
    count, asked = len(data.samples.get("train", ())), data.batch_size * launch.processes
    if "train" in batches and count < asked:
        each = f" by {launch.processes} processes" if launch.processes > 1 else ""
        findings.warn(
            "batch size",
            f"{data.batch_size}{each} is more than the {count} training samples: batches are smaller",
            f"--data.batch_size {max(1, count // launch.processes)}",
        )
    return batches


def check_cache(findings: Findings, data: LightningDataModule | None, launch: Launch) -> None:
    """Whether the memory holds the decoded pictures of each process."""
    if not isinstance(data, DefectDataModule) or data.cache == "off":
        return
    needed = data.decoded_bytes()
    if data.cache == "disk":
        findings.ok("cache", f"{size(needed)} on disk in {data.cache_dir}, shared by all processes", cache_bytes=needed)
        return  # `prepare_data` has written it
    total, free = needed * launch.devices, available_memory()
    text = f"{size(needed)} of pictures in memory for each process"
    text += f", {size(total)} for {launch.devices}" if launch.devices > 1 else ""
    values = {"cache_bytes": needed, "cache_bytes_per_node": total, "free_bytes": free}
    if free is None or total <= free:
        findings.ok("cache", text + (f"; {size(free)} free here" if free else ""), **values)
    elif launch.here:
        findings.fail("cache", f"{text}; {size(free)} free here", "--data.cache disk", **values)
    else:
        findings.warn("cache", f"{text}; {size(free)} free here, perhaps more there", "--data.cache disk", **values)
