"""One picture by diffusers and by us, as often through the same U-Net; see `anomaly_diffusion.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from generator.subject import DEVICE, Subject, clock, counted, jobs_of, middle, normal_of
from lit_defect.data.images import resize_image
from lit_defect.diffusion.attention import CrossAttention
from lit_defect.generation.options import Generation
from lit_defect.tasks import AnomalyDiffusion
from lit_defect.tasks.generation_plan import Job
from lit_defect.tasks.views import unit_range

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "fast, without guidance": ({"guidance": 1.0}, "DPMSolverMultistepScheduler"),
    "fast": ({}, "DPMSolverMultistepScheduler"),
    "paper": ({"preset": "paper"}, "DDIMScheduler"),
}
Run = Callable[[], Any]


def compare_diffusers(subject: Subject, folder: Path, options: Any) -> None:
    """What our loop costs above diffusers' for as many passes of the U-Net."""
    task = subject.ready()
    if task.network.channels != 4:
        print("diffusers' pipeline inpaints with latents of 4 channels only: left out\n")
        return
    (job,) = jobs_of(task, 1, 1)[0]
    roots = (folder / str(number) for number in count())
    for title, (arm, scheduler) in SETTINGS.items():
        plain = {**arm, "reweight": "off", "candidates": 1}
        contestants = {
            "diffusers, StableDiffusionInpaintPipeline": pipeline_of(task, job, arm, scheduler),
            "diffusers, plain loop, nothing blended": loop_of(task, job, arm, scheduler),
            "ours, sampling, no re-weighting": sampling_of(task, job, subject.maker(task, next(roots), plain)),
            "ours, sampling": sampling_of(task, job, subject.maker(task, next(roots), {**arm, "candidates": 1})),
            "ours, whole: mask, sampling, judgement, files": whole_of(
                job, subject.maker(task, next(roots), {**arm, "candidates": 1})
            ),
        }
        turns, calls = taken_in_turn(task, contestants, options.rounds)
        print(f"One picture by the sampler of {title}\n")
        print("| by | pictures through the U-Net | s | times the pipeline's | lowest, highest |")
        print("|---|---|---|---|---|")
        for name, spent in turns.items():
            ratios = [own / other for own, other in zip(spent, next(iter(turns.values())), strict=True)]
            print(f"| {name} | {calls[name]} | {statistics.median(spent):.3f} | {statistics.median(ratios):.2f} "
                  f"| {min(ratios):.2f}, {max(ratios):.2f} |")  # fmt: skip
        print(flush=True)


def taken_in_turn(
    task: AnomalyDiffusion, contestants: dict[str, Run], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each turn, and pictures through the U-Net; a turn before is for what a first call prepares."""
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    calls = {}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            if name.startswith("diffusers"):
                task.cross.remove()  # the U-Net as it comes
            with counted(task.network.unet) as seen:
                begun = clock()
                run()
                spent = clock() - begun
            if name.startswith("diffusers"):
                task.cross = CrossAttention(task.network.unet)
            calls[name] = sum(seen)
            if turn:
                turns[name].append(spent)
    return turns, calls


def scheduled(task: AnomalyDiffusion, arm: dict[str, Any], name: str) -> tuple[Any, dict[str, Any]]:
    """diffusers' scheduler of a setting, and the setting's options."""
    import diffusers

    settings = dict(Generation(**arm).resolved())
    base = task.network
    kind = getattr(diffusers, name)
    made = kind(**base.process.settings, prediction_type=base.prediction, timestep_spacing="trailing",
                **({"clip_sample": False} if name == "DDIMScheduler" else {"final_sigmas_type": "zero"}))  # fmt: skip
    return made, settings


def pipeline_of(task: AnomalyDiffusion, job: Job, arm: dict[str, Any], scheduler: str) -> Run:
    from diffusers import StableDiffusionInpaintPipeline

    made, settings = scheduled(task, arm, scheduler)
    base = task.network
    pipeline: Any = StableDiffusionInpaintPipeline(
        vae=base.vae, unet=base.unet, text_encoder=base.text_encoder, tokenizer=base.tokenizer, scheduler=made,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,  # type: ignore[arg-type]
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    height, width = task.data.image_size
    picture = Image.fromarray(normal_of(task, job))
    mask = Image.fromarray((255 * middle(task)[0, 0].cpu().numpy()).astype(np.uint8))
    eta = {"eta": settings["eta"]} if settings["eta"] is not None else {}

    def run() -> Any:
        return pipeline(
            f"a photo of a {job.pair[1]}", image=picture, mask_image=mask, height=height, width=width,
            strength=settings["strength"], num_inference_steps=settings["steps"], guidance_scale=settings["guidance"],
            output_type="np", generator=torch.Generator().manual_seed(0), **eta,
        )  # fmt: skip

    return run


def loop_of(task: AnomalyDiffusion, job: Job, arm: dict[str, Any], scheduler: str) -> Run:
    made, settings = scheduled(task, arm, scheduler)
    base = task.network

    @torch.no_grad()
    def run() -> Any:
        picture = torch.from_numpy(resize_image(normal_of(task, job), task.data.image_size)).to(DEVICE)
        latents = base.encode(2 * unit_range(picture.permute(2, 0, 1)[None]) - 1)
        made.set_timesteps(settings["steps"])
        left = int(settings["steps"] * (1 - settings["strength"]) + 0.5)
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(left)
        steps = made.timesteps[left:]
        state = made.add_noise(latents, torch.randn_like(latents), steps[:1])
        states = torch.cat([task.unconditional(1)] * (1 if settings["guidance"] == 1 else 2))
        eta = {"eta": settings["eta"]} if settings["eta"] is not None else {}
        for t in steps:
            told = base.unet(state.expand(len(states), -1, -1, -1), t, states).sample
            guided = told[:1] + settings["guidance"] * (told[-1:] - told[:1])
            state = made.step(guided, t, state, **eta).prev_sample
        return base.decode(state).cpu()

    return run


def sampling_of(task: AnomalyDiffusion, job: Job, maker: Any) -> Run:
    @torch.no_grad()
    def run() -> Any:
        normal = maker._small(normal_of(task, job))
        return maker.generate([job], normal, task.network.encode(2 * normal - 1).float(), middle(task))[0].cpu()

    return run


def whole_of(job: Job, maker: Any) -> Run:
    def run() -> None:
        maker.done.clear()
        maker.make([job])

    return run
