"""A second device for tests: strict as a GPU about where tensors lie, with the CPU's kernels and memory.

`install` compiles `second.cpp` (once; PyTorch keeps the result) and registers the device "second" with PyTorch, and as
Lightning's accelerator `tests.second_device.SecondAccelerator`. It cannot be taken back: call it in a process of its own.
"""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry

NAME = "second"


class SecondAccelerator(Accelerator):
    """The one device "second:0", as `--trainer.accelerator second`."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def install() -> Any:
    """Compile and register the device; returns the extension, whose `listen` hears of copies and waits.

    Raises:
        RuntimeError: no compiler, or one that failed.
    """
    from torch.utils.cpp_extension import load

    extension = load(NAME, [str(Path(__file__).with_name("second.cpp"))], extra_cflags=["-O1", "-w"])
    extension.register()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module(extension))
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.to` leaves a parameter the same object, as on CUDA
    if NAME not in AcceleratorRegistry:
        AcceleratorRegistry.register(NAME, SecondAccelerator)
    return extension


def _module(extension: Any) -> types.ModuleType:
    """What PyTorch expects of `torch.second`, as of `torch.cuda`."""
    module = types.ModuleType(f"torch.{NAME}")
    generator = extension.default_generator()
    module.default_generators = (generator,)  # type: ignore[attr-defined]
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda index: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "is_bf16_supported": lambda: True,
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "manual_seed": lambda seed: generator.manual_seed(seed),
        "manual_seed_all": lambda seed: generator.manual_seed(seed),
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": lambda state, device=None: generator.set_state(state),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    sys.modules[module.__name__] = module
    return module
