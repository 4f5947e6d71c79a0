"""The refiner's options by the name of a preset, and the samplers that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.samplers import Sampler

Preset = Literal["paper", "fast"]

PRESETS: dict[str, dict[str, Any]] = {
    # Ando, sections 4 and 5; what the paper does not say is DDPM's own (Ho et al.).
    "paper": {
        "conditioning": "joint",
        "start": "clean",
        "train_on": "ground_truth",
        "label_input": "sample",
        "num_samples": 1,
        "scheduler": "ddpm",
        "steps": 1000,
        "strength": 0.5,
        "prediction": "epsilon",
        "beta_schedule": "linear",
    },
    # The best of at most 10 network calls that was measured (experiments/RESULTS.md).
    "fast": {
        "conditioning": "concat",
        "start": "clean",
        "train_on": "prediction",
        "label_input": "sample",
        "num_samples": 1,
        "scheduler": "ddim",
        "steps": 10,
        "strength": 0.5,
        "prediction": "logits",
        "beta_schedule": "cosine",
    },
}


def resolve(preset: Preset, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """All options of a preset, with those in their place that are given (not None).

    Returns:
        The options, and the name of the preset that they are, or "".
    """
    settings = {key: value if given.get(key) is None else given[key] for key, value in PRESETS[preset].items()}
    return settings, next((name for name, options in PRESETS.items() if options == settings), "")


def quick_sampler(sampler: Sampler, calls: int) -> Sampler:
    """The sampler itself, or where it takes more calls, DDIM over the same part of the process with as many at most.

    Numbers of steps whose share is whole go first: with others the chain would begin below strength * T.
    """
    if sampler.calls <= calls:
        return sampler
    process, strength = sampler.process, sampler.strength
    fitting = [steps for steps in divisors(process) if 1 <= int(steps * strength + 1e-9) <= calls]
    whole = [steps for steps in fitting if abs(steps * strength - round(steps * strength)) < 1e-9]
    return Sampler("ddim", process, steps=max(whole or fitting), strength=strength) if fitting else sampler


def divisors(process: ForwardProcess) -> list[int]:
    """The numbers of steps that divide T, rising."""
    total = process.train_steps
    return [steps for steps in range(1, total + 1) if total % steps == 0]
