"""What a configuration asks of a machine, what this machine has, and a trainer that tries it on one process."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.environments import ClusterEnvironment, LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_defect.callbacks.startup import describe_machine
from lit_defect.checking.findings import Findings
from lit_defect.errors import UserError

_GPUS = {"gpu": (CUDAAccelerator, MPSAccelerator), "cuda": (CUDAAccelerator,), "mps": (MPSAccelerator,)}
_OF_GPUS = ("auto", *_GPUS)
_STRATEGIES = ("auto", "single_device", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")


@dataclass(frozen=True)
class Launch:
    """What `trainer` asks for.

    Attributes:
        accelerator: as asked, in lower case.
        devices: processes on each node; where "all there are" is asked, those of this machine.
        nodes: machines.
        strategy: as asked; `auto` for none.
        here: whether this machine has the accelerator.
        counted_here: whether `devices` was counted on this machine, and may differ on another.
    """

    accelerator: str
    devices: int
    nodes: int
    strategy: str
    here: bool
    counted_here: bool

    @property
    def processes(self) -> int:
        """Of all machines."""
        return self.devices * self.nodes

    @property
    def asked(self) -> str:
        """In words."""
        machines = f" on each of {self.nodes} nodes" if self.nodes > 1 else ""
        strategy = "" if self.strategy == "auto" else f", strategy {self.strategy}"
        count = f"{self.devices} process{'es' * (self.devices > 1)}"
        count += " (that machine may have more devices)" if self.counted_here and not self.here else ""
        return f"accelerator {self.accelerator}, {count}{machines}{strategy}"

    @classmethod
    def of(cls, trainer: Mapping[str, Any]) -> Launch:
        """What the options of a trainer ask for.

        Raises:
            UserError: an accelerator, number of devices or nodes that is none.
        """
        asked = trainer.get("accelerator") or "auto"
        name = asked.lower() if isinstance(asked, str) else type(asked).__name__.lower().removesuffix("accelerator")
        known = {"auto", "gpu", *AcceleratorRegistry.available_accelerators()}
        if isinstance(asked, str) and name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"trainer.accelerator = {asked}: no such accelerator{hint}")
        own = (
            [kind for kind in _GPUS["gpu" if name == "auto" else name] if kind.is_available()]
            if name in _OF_GPUS
            else []
        )
        count = own[0].auto_device_count() if own else CPUAccelerator.auto_device_count()
        wanted = trainer.get("devices")
        devices, counted = _devices("auto" if wanted is None else wanted, count)
        nodes = int(trainer.get("num_nodes") or 1)
        strategy = trainer.get("strategy") or "auto"
        strategy = strategy if isinstance(strategy, str) else type(strategy).__name__
        # Several processes of "whatever there is" are asked for on a node of GPUs, which a login node may lack.
        here = name == "cpu" or bool(own) or (name == "auto" and devices * nodes == 1)
        return cls(name, devices, nodes, strategy, here, counted)


def _devices(asked: Any, here: int) -> tuple[int, bool]:
    """How many processes on a machine, and whether that is a count of those of this one.

    Raises:
        UserError: none at all, or no number.
    """
    if isinstance(asked, str) and asked != "auto":
        numbers = [number.strip() for number in asked.split(",") if number.strip()]
        try:
            asked = [int(number) for number in numbers] if "," in asked else int(asked)
        except ValueError:
            raise UserError(f"trainer.devices = {asked}: expected auto, a number or a list of numbers") from None
    if asked in ("auto", -1, [-1]):
        return max(1, here), True
    count = len(asked) if isinstance(asked, list) else int(asked)
    if count < 1:
        raise UserError(f"trainer.devices = {asked}: expected auto, a number or a list of numbers")
    return count, False


def strategy_objection(asked: Any) -> str:
    """Why nothing is trained by a strategy of Lightning's, with what to use; empty if it serves, or is none."""
    if isinstance(asked, str):
        serves, name = asked in _STRATEGIES or asked not in StrategyRegistry.available_strategies(), asked
    else:
        started = not isinstance(asked, DDPStrategy) or asked._start_method == "popen"
        serves = asked is None or (isinstance(asked, DDPStrategy | SingleDeviceStrategy) and started)
        name = type(asked).__name__ + ("" if started else f" with start_method {asked._start_method}")
    if serves:
        return ""
    why = (
        "processes that it forks or spawns do not heed signals, so that a run that is stopped is lost"
        if "ddp" in name.lower() and "fsdp" not in name.lower()
        else "the networks here fit on one GPU each, and tasks set up optimizers and write states for whole ones only"
    )
    return f"trainer.strategy = {name}: {why}; set --trainer.strategy ddp"


def check_launch(findings: Findings, launch: Launch, trainer: Trainer, asked: Mapping[str, Any]) -> None:
    """Whether there is such a strategy, and what of the rest this machine can try."""
    values = {"processes": launch.processes, "processes_per_node": launch.devices, "nodes": launch.nodes}
    known, strategy = StrategyRegistry.available_strategies(), asked.get("strategy") or "auto"
    if objection := strategy_objection(strategy):
        text, _, remedy = objection.partition("; set ")
        findings.fail("launch", text, remedy, **values)
    elif isinstance(strategy, str) and strategy != "auto" and strategy not in known:
        near = difflib.get_close_matches(strategy, known, 1, cutoff=0.4) or ["ddp"]
        findings.fail(
            "launch", f"trainer.strategy = {strategy}: no such strategy", f"--trainer.strategy {near[0]}", **values
        )
    elif not launch.here:
        missing = "gpu" if launch.accelerator == "auto" else launch.accelerator
        tried = f"this machine has no {missing}: tried on {describe_machine(trainer)}, with small batches"
        findings.ok("launch", f"{launch.asked}; {tried}", **values)
    elif launch.processes > 1:
        findings.ok("launch", f"{launch.asked}; tried on {describe_machine(trainer)}", **values)
    else:
        findings.ok("launch", describe_machine(trainer), **values)
    if (precision := asked.get("precision")) != (taken := _precision(precision, launch)):
        findings.ok("precision", f"{precision} is of GPUs; tried in {taken} here")


def one_process(asked: Mapping[str, Any], launch: Launch, kind: type[Trainer]) -> Trainer:
    """A trainer that trains as asked, but on one process, and keeps nothing.

    Args:
        asked: the options of the trainer, its objects made.
        launch: what they ask for.
        kind: class of the trainer.

    Raises:
        UserError: options that no trainer takes.
    """
    accelerator = asked.get("accelerator") or "auto"
    validates = asked.get("limit_val_batches")
    own = asked.get("callbacks") or []
    plugins = asked.get("plugins") or []
    options = {
        **asked,
        "accelerator": accelerator if launch.here else "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
        "precision": _precision(asked.get("precision"), launch),
        "callbacks": [one for one in (own if isinstance(own, list) else [own]) if not isinstance(one, Checkpoint)],
        "plugins": [
            *(
                one
                for one in (plugins if isinstance(plugins, list) else [plugins])
                if not isinstance(one, ClusterEnvironment)
            ),
            LightningEnvironment(),
        ],
        "logger": DummyLogger(),  # takes everything, as callbacks that log want one
        "fast_dev_run": False,
        "barebones": False,
        "profiler": None,
        "max_time": None,
        "min_epochs": None,
        "min_steps": None,
        "limit_val_batches": 0 if validates == 0 else 1,
        "num_sanity_val_steps": 0,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
        "accumulate_grad_batches": 1,
        "sync_batchnorm": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tempfile.mkdtemp(prefix="lit_defect-check-"),  # removed by `examine`
    }
    try:
        return kind(**options)
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"trainer: {error}") from error


def _precision(asked: Any, launch: Launch) -> Any:
    """16-bit floats without a GPU: bfloat16 stands in, as CPUs compute with it."""
    on_cpu = launch.accelerator == "cpu" or not launch.here
    return (
        {"16-mixed": "bf16-mixed", "16-true": "bf16-true", "16": "bf16-mixed"}.get(str(asked), asked)
        if on_cpu
        else asked
    )
