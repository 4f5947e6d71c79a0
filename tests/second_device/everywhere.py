"""pytest plugin: every Trainer of one process computes on the second device, and waits within training steps are noted.

python -m pytest -p tests.second_device.everywhere tests/test_experiments.py

With `SECOND_DEVICE_WAITS` set to a file it writes there, as JSON, what a GPU would have been waited for within training
steps: "kind file:function" of the innermost line of lit_defect, and how often.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

import lit_defect
from tests.second_device import NAME, SecondAccelerator, install

_HOME = Path(lit_defect.__file__).parent
_OF_LIGHTNING = "lightning/fabric/utilities/apply_func.py"  # makes figures for loggers and the progress bar
extension = install()
devices: Counter[str] = Counter()
waits: Counter[str] = Counter()
_steps = 0


def _on_second(connect: Any) -> Any:
    @wraps(connect)
    def connected(self: Any, **kwargs: Any) -> None:
        processes = kwargs.get("devices", "auto") in ("auto", 1, "1") and kwargs.get("num_nodes", 1) == 1
        if processes and kwargs.get("accelerator", "auto") in ("auto", "cpu") and kwargs.get("strategy") == "auto":
            strategy = SingleDeviceStrategy(torch.device(NAME, 0), accelerator=SecondAccelerator())
            kwargs |= {"accelerator": "auto", "strategy": strategy}
        connect(self, **kwargs)
        devices[self.strategy.root_device.type] += 1

    return connected


def _noted(advance: Any) -> Any:
    @wraps(advance)
    def counted(self: Any, *args: Any) -> Any:
        global _steps
        _steps += 1
        extension.listen(_hear)
        try:
            return advance(self, *args)
        finally:
            extension.listen(None)

    return counted


def _hear(kind: str) -> None:
    frame: FrameType | None = sys._getframe(1)
    while frame and not Path(frame.f_code.co_filename).is_relative_to(_HOME):
        if frame.f_code.co_filename.endswith(_OF_LIGHTNING):
            return
        frame = frame.f_back
    if frame and not kind.startswith("asynchronous"):
        where = Path(frame.f_code.co_filename).relative_to(_HOME).as_posix()
        waits[f"{kind} {where}:{frame.f_code.co_name}"] += 1


_AcceleratorConnector.__init__ = _on_second(_AcceleratorConnector.__init__)  # type: ignore[method-assign]
_TrainingEpochLoop.advance = _noted(_TrainingEpochLoop.advance)  # type: ignore[method-assign]


def pytest_sessionfinish() -> None:
    """Write down what was waited for."""
    if os.environ.get("SECOND_DEVICE_WAITS"):
        told = {"devices": devices, "steps": _steps, "waits": waits}
        Path(os.environ["SECOND_DEVICE_WAITS"]).write_text(json.dumps(told, indent=1))
