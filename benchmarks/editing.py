"""What editing costs beside diffusers' own pipeline, and what cutting the mask's box out saves.

    python benchmarks/editing.py [--rounds 5] [--batch 4] [--threads 1] [--large]

The same U-Net, scheduler, number of passes, masks and prompts: diffusers' StableDiffusionInpaintPipeline called with a
list of pictures as its documentation does (pictures in, pictures out), our `running.run` (masked content, places of
the latents), and the whole of an editing: masks drawn, frames, paste-back, judgement, PNG files and manifest. Then the
same edits of large photographs at their own size, and of the mask's box alone.

The base has the size of experiments/editing/ and random weights; with `--large` its U-Net has that of Stable
Diffusion 1.5 (860 million parameters, pictures of 512 pixels). The contestants take turns; medians. On one thread of a
CPU seconds are the processor's, which other programs disturb least, else the wall's.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from generator.subject import DEVICE, clock, trainer_of, untrained
from PIL import Image

from lit_defect.data import MVTecAD
from lit_defect.editing.options import Edit
from lit_defect.editing.running import Request, run
from lit_defect.editing.samplers import make_scheduler, told_strength
from lit_defect.tasks import StableDiffusionEditor
from lit_defect.tasks.edit_making import EditMaking
from lit_defect.tasks.editing import SOURCES

LARGE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with TemporaryDirectory() as folder, torch.no_grad():
        root = Path(folder)
        subject = untrained(root)
        base = root / "base"
        if options.large:
            enlarge(base)
        enlarge_pictures(root / "data", LARGE)
        side = LARGE if options.large else 96
        edit = {"sources": None, "result": "hole", "masks": "augmented", "foreground": "all", "steps": options.steps,
                "strength": 0.5, "guidance": 2.0, "least_change": 0.0, "repair": False, "mask_blur": 0.0,
                "batch": options.batch}  # fmt: skip
        whole = {**edit, "size": (side, side), "stretch": True}
        turns = count(options, root, base, subject.data, whole)
        show("An edit of a picture", turns)
        if not options.large:
            named = {"whole photograph, 512 px": "whole", "box of the mask and 16 px around it": "only_masked"}
            cut = {name: {**edit, "area": area, "padding": 16} for name, area in named.items()}
            show("Photographs at their own size", areas(options, root, base, subject.data, cut))


def count(options: Any, root: Path, base: Path, data: Any, edit: Any) -> dict[str, list[float]]:
    """Seconds a picture of each contestant's turns."""
    maker, groups = making(root / "set", base, data, edit, options)
    opened, settings = maker.opened, maker.edit
    ready = [maker.inputs.prepare(job) for job in groups[0]]
    pictures = torch.stack([one.pixels for one in ready])
    masks = [torch.from_numpy(one.frame.cut_mask(one.mask)).float()[None] for one in ready]
    requests = [Request(p, m, one.prompt, strength=settings.strength_of("good"), words=(n,))
                for n, (p, m, one) in enumerate(zip(pictures, masks, ready, strict=True))]  # fmt: skip
    given = [Image.fromarray((255 * p.permute(1, 2, 0).numpy()).round().astype(np.uint8)) for p in pictures]
    marks = [Image.fromarray((255 * m[0].numpy()).astype(np.uint8)) for m in masks]
    strength = told_strength(settings.steps, 0.5, settings.steps_convention)

    def plain() -> None:
        pipe = opened.pipe
        pipe.scheduler = make_scheduler(settings.sampler, opened.schedule)
        pipe(
            prompt=[one.prompt for one in ready], image=given, mask_image=marks, strength=strength,
            num_inference_steps=settings.steps, guidance_scale=settings.guidance,
            height=pictures.shape[2], width=pictures.shape[3],
            generator=[torch.Generator().manual_seed(n) for n in range(len(ready))],
        )  # fmt: skip

    left = itertools.cycle(groups)

    def everything() -> None:
        maker.done.clear()
        maker.make(next(left))

    return in_turn(
        {
            "diffusers, StableDiffusionInpaintPipeline": plain,
            "ours, the call": lambda: run(opened, requests, settings),
            "ours, all of it": everything,
        },
        options.rounds,
        len(ready),
    )


def areas(options: Any, root: Path, base: Path, data: Any, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds a picture by what of it goes through the network."""
    contestants = {}
    for number, (name, edit) in enumerate(settings.items()):
        maker, groups = making(root / f"area{number}", base, data, {**edit, "batch": 1}, options)

        def everything(maker: EditMaking = maker, left: Any = itertools.cycle(groups)) -> None:  # noqa: B008
            maker.done.clear()
            maker.make(next(left))

        contestants[name] = everything
    return in_turn(contestants, options.rounds, 1)


def making(root: Path, base: Path, data: Any, edit: Any, options: Any) -> tuple[EditMaking, list[Any]]:
    task = StableDiffusionEditor(str(base), "inpaint", Edit(**{**edit, "output": str(root)}))
    task.trainer = trainer_of()
    task.trainer.datamodule = parts = MVTecAD(**{**data, "image_size": None})  # type: ignore[attr-defined]
    parts.prepare_data()
    parts.setup("predict")
    task.setup("predict")
    task.to(DEVICE)
    pairs = {job.pair for group in task.groups for job in group}
    return EditMaking(task, SOURCES, pairs, 0), [group for group in task.groups if len(group) == task.edit.batch]


def in_turn(contestants: dict[str, Callable[[], Any]], rounds: int, pictures: int) -> dict[str, list[float]]:
    """Seconds a picture; a turn before is for what a first call prepares."""
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, act in contestants.items():
            begun = clock()
            act()
            if turn:
                spent[name].append((clock() - begun) / pictures)
    return spent


def show(title: str, turns: dict[str, list[float]]) -> None:
    first = next(iter(turns.values()))
    print(f"{title}\n\n| by | s a picture | times the first | lowest, highest |\n|---|---|---|---|")
    for name, spent in turns.items():
        ratios = [own / other for own, other in zip(spent, first, strict=True)]
        print(f"| {name} | {statistics.median(spent):.3f} | {statistics.median(ratios):.2f} "
              f"| {min(ratios):.2f}, {max(ratios):.2f} |")  # fmt: skip
    print(flush=True)


def enlarge(base: Path) -> None:
    """Put a U-Net and an autoencoder of Stable Diffusion 1.5's size in the base's folder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
    )
    unet.save_pretrained(base / "unet")
    vae: Any = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    vae.save_pretrained(base / "vae")


def enlarge_pictures(root: Path, side: int) -> None:
    for path in root.rglob("*.png"):
        picture = Image.open(path)
        how = Image.Resampling.NEAREST if "ground_truth" in path.parts else Image.Resampling.BICUBIC
        picture.resize((side, side), how).save(path)


if __name__ == "__main__":
    main()
