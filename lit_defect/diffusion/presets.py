"""The refiner's options by the name of a preset, and the samplers that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.samplers import Sampler
from lit_defect.errors import UserError

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


def check(settings: Mapping[str, Any], *, stage1: str | None, latent: str | None) -> None:
    """Raises `UserError` if a refiner's options are out of range or contradict each other."""
    if settings["num_samples"] < 1:
        raise UserError(f"model.init_args.num_samples = {settings['num_samples']}: expected at least 1")
    if latent is not None and settings["prediction"] == "logits":
        raise UserError(
            "model.init_args.prediction = logits are scores of classes, and latents have none: set it to sample, "
            "v_prediction or epsilon"
        )
    if stage1 is None and settings["train_on"] == "prediction":
        raise UserError(
            "model.init_args.train_on = prediction trains on the maps of a first stage: name one by "
            "model.init_args.stage1, or set train_on to ground_truth"
        )
    random = (
        stage1 is None
        or settings["label_input"] == "sample"
        or settings["scheduler"] == "ddpm"
        or settings["start"] == "noised"
        or settings["conditioning"] == "replace"
    )
    if settings["num_samples"] > 1 and not random:
        raise UserError(
            f"model.init_args.num_samples = {settings['num_samples']} chains would all be the same: set label_input to "
            "sample, start to noised or scheduler to ddpm, or num_samples to 1"
        )


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
