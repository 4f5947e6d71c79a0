"""Pictures through a pipeline: one call of diffusers for those that go together, the same whatever goes with them.

    result = run(opened, [Request(picture, mask, "a photo of a nut with a hole", words=(seed, number, 0))], edit)
    result.pictures     # (B, 3, h, w) float32 in [0, 1]

What is ours around the call:

    masked content      `fill` in the pixels; `latent_noise` and `latent_nothing` in the latents that it starts from
    the mask            in whole places of the latents, so that a small one does not fall between them
    the surroundings    of modes without a mask of their own: after each step, places outside the mask take the source
                        with the noise of the next step, as diffusers' inpainting does with a network that sees no mask
    half precision      pictures that come out with NaN, or black, are made again in float32, and counted
    mixed precision     is off: the pipeline computes in the precision of its weights, whatever the trainer's is
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from lit_defect.editing.content import fill, latent_cells, started
from lit_defect.editing.options import KEY, NETWORK_KEY, Edit
from lit_defect.editing.pipelines import Opened
from lit_defect.editing.reference import ReferenceOnly
from lit_defect.editing.samplers import make_scheduler, start, told_strength
from lit_defect.errors import UserError

_MAIN, _CONTENT, _SURROUNDINGS, _REFERENCE = range(4)  # what a request draws noise for
_FORGETS_SHIFT = (
    "StableDiffusion3InpaintPipeline",
)  # when it decodes, not when it encodes: huggingface/diffusers#13611
_FROM_NOISE = ("instruct_pix2pix", "variation")  # modes that know no strength


@dataclass(frozen=True)
class Request:
    """A picture to be edited.

    Attributes:
        picture: (3, h, w) float in [0, 1], whose sides are multiples of `Opened.multiple`.
        mask: (1, h, w) float in [0, 1], 1 where it is to be edited; None for all of it.
        prompt: what is to be seen.
        negative_prompt: what guidance leads away from.
        strength: of denoising, in (0, 1].
        words: numbers that its noise is drawn from: the same ones, the same picture.
        reference: (3, h', w') float in [0, 1], for `reference_only` and `ip_adapter`.
    """

    picture: Tensor
    mask: Tensor | None = None
    prompt: str = ""
    negative_prompt: str = ""
    strength: float = 1.0
    words: tuple[int, ...] = (0,)
    reference: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        pictures: (B, 3, h, w) float32 in [0, 1], on the CPU, in the order of the requests.
        retried: which of them were made again in float32.
        spoilt: which of them are black all the same, though their source is not.
    """

    pictures: Tensor
    retried: list[bool]
    spoilt: list[bool]


def run(opened: Opened, requests: Sequence[Request], edit: Edit) -> Result:
    """Edit pictures of one size; those that agree in strength and in what they have go through together, by `batch`.

    Raises:
        UserError: the pipeline cannot do what the options or a request say, gives NaN in float32 too, or runs out of
            the GPU's memory.
        ValueError: pictures of several sizes, or of one that does not go through the network.
    """
    _check(opened, requests, edit)
    groups: dict[tuple[float, bool, bool], list[int]] = {}
    for number, request in enumerate(requests):
        key = (request.strength, request.mask is not None, bool(request.negative_prompt))
        groups.setdefault(key, []).append(number)
    pictures = torch.empty(len(requests), *requests[0].picture.shape, dtype=torch.float32)
    retried = [False] * len(requests)
    for numbers in (group[i : i + edit.batch] for group in groups.values() for i in range(0, len(group), edit.batch)):
        pictures[numbers] = _call(opened, [requests[n] for n in numbers], edit)
        again = [n for n in numbers if _is_spoilt(pictures[n], requests[n].picture)]
        if again and opened.dtype != torch.float32:
            with opened.in_float32():
                pictures[again] = _call(opened, [requests[n] for n in again], edit)
            for number in again:
                retried[number] = True
        if not pictures[numbers].isfinite().all():
            raise UserError(
                f"{opened.source} gives NaN for {requests[numbers[0]].prompt!r} in float32, too: its weights, a LoRA "
                f"or an embedding are damaged, or {NETWORK_KEY}.lora_scale or {KEY}.guidance is far too high"
            )
    spoilt = [_is_spoilt(made, request.picture) for made, request in zip(pictures, requests, strict=True)]
    return Result(pictures, retried, spoilt)


def check_steps(opened: Opened, edit: Edit, strengths: Iterable[float]) -> None:
    """Whether the sampler can do what will be asked of it.

    Raises:
        UserError: a sampler that the network or the number of steps does not fit, one that cannot start where a
            strength lets it, or a strength that leaves no step.
    """
    for strength in strengths:
        scheduler = make_scheduler(edit.sampler, opened.schedule)
        told = _told(opened, strength, edit)
        if opened.has_unet:  # flow matching starts anywhere
            start(scheduler, told, edit.steps)


def unheeded_negative(opened: Opened, edit: Edit) -> str | None:
    """What to tell if the negative prompt is of no effect; else None."""
    known = inspect.signature(type(opened.pipe).__call__).parameters
    if not edit.negative_prompt:
        return None
    if "negative_prompt" not in known or "true_cfg_scale" in known:  # Flux 1 has its guidance learnt
        return f"{KEY}.negative_prompt is of no effect: {type(opened.pipe).__name__} is guided without one"
    if edit.guidance <= 1:
        return f"{KEY}.negative_prompt is of no effect with {KEY}.guidance = {edit.guidance}; take more than 1"
    return None


def _told(opened: Opened, strength: float, edit: Edit) -> float:
    """The strength that the pipeline is told; 1 where it knows none."""
    if opened.mode in _FROM_NOISE:
        return 1.0
    return told_strength(edit.steps, strength, edit.steps_convention, rounds_up=not opened.has_unet)


def reconstruct(opened: Opened, picture: Tensor) -> Tensor:
    """A picture (3, h, w) in [0, 1] through the autoencoder and back; in float32 where half precision spoils it."""
    made = opened.decode(opened.encode(picture[None]))[0].cpu()
    if opened.dtype != torch.float32 and _is_spoilt(made, picture):
        with opened.in_float32():
            made = opened.decode(opened.encode(picture[None]))[0].cpu()
    return made


def _check(opened: Opened, requests: Sequence[Request], edit: Edit) -> None:
    """Raises what `run` says."""
    shape = requests[0].picture.shape
    if any(r.picture.shape != shape or (r.mask is not None and r.mask.shape != (1, *shape[1:])) for r in requests):
        raise ValueError("pictures and masks of one call must be of one size")
    if shape[1] % opened.multiple or shape[2] % opened.multiple:
        raise ValueError(f"pictures of {tuple(shape)}: the sides must be multiples of {opened.multiple}")
    masked = any(r.mask is not None for r in requests)
    if opened.mode == "inpaint" and any(r.mask is None for r in requests):
        raise UserError(f"{KEY}.masks = none, but the mode inpaint needs masks; img2img edits all of a picture")
    if masked and opened.mode != "inpaint" and not (opened.has_unet and opened.channels == 4):
        raise UserError(f"{KEY}.masks: with this model take the mode inpaint; {opened.mode} edits all of the picture")
    if masked and edit.content in ("latent_noise", "latent_nothing") and not _starts_from_latents(opened):
        raise UserError(
            f"{KEY}.content = {edit.content} needs a U-Net of 4 channels that starts from the picture; for this model "
            "take original or fill"
        )
    if opened.mode in ("reference_only", "ip_adapter") and any(r.reference is None for r in requests):
        raise UserError(f"{KEY}.references: the mode {opened.mode} needs a reference for each picture")


def _starts_from_latents(opened: Opened) -> bool:
    """Whether a masked call is given latents, not pixels."""
    return opened.has_unet and not opened.takes_mask and opened.mode not in _FROM_NOISE


def _is_spoilt(picture: Tensor, source: Tensor) -> bool:
    """Whether half precision may have overflowed: (3, h, w) with NaN, or black though the source is not."""
    return not bool(picture.isfinite().all()) or bool((picture <= 0).all() and (source > 0).any())


def _call(opened: Opened, requests: Sequence[Request], edit: Edit) -> Tensor:
    """One call of the pipeline, (B, 3, h, w) float32 on the CPU; of requests that `run` put together."""
    pipe, mode = opened.pipe, opened.mode
    pipe.scheduler = make_scheduler(edit.sampler, opened.schedule)
    if hasattr(pipe.scheduler, "noise_sampler_seed"):  # DPM++ SDE takes no generators
        pipe.scheduler.noise_sampler_seed = [_generator(r, _MAIN).initial_seed() for r in requests]
    height, width = requests[0].picture.shape[1:]
    arguments: dict[str, Any] = {
        "prompt": [r.prompt for r in requests],
        # None is not "" for all: Stable Diffusion XL takes zeros for it, as it was trained.
        "negative_prompt": [r.negative_prompt for r in requests] if requests[0].negative_prompt else None,
        "num_inference_steps": edit.steps,
        "guidance_scale": edit.guidance,
        "image_guidance_scale": edit.image_guidance,
        "noise_level": edit.noise_level,
        "generator": [_generator(r, _MAIN) for r in requests],
        "height": height,
        "width": width,
        "output_type": "latent" if type(pipe).__name__ in _FORGETS_SHIFT else "pt",
    }
    if mode not in _FROM_NOISE:
        arguments["strength"] = _told(opened, requests[0].strength, edit)
    pictures = torch.stack([_prefilled(r, edit) for r in requests])  # (B, 3, h, w)
    arguments["image"] = [_to_pil(r.picture) for r in requests] if mode == "variation" else pictures
    with ExitStack() as stack:
        stack.enter_context(_own_precision(opened.device))
        if requests[0].mask is not None:
            arguments |= _masked(opened, requests, pictures, edit)
        if mode == "inpaint" and requests[0].strength < 1:
            stack.enter_context(_from_source(pipe))
        if mode == "ip_adapter":
            arguments["ip_adapter_image_embeds"] = [stack.enter_context(_shown(opened, requests, edit))]
        if mode == "reference_only":
            stack.enter_context(_reading(opened, requests, edit))
        known = inspect.signature(type(pipe).__call__).parameters
        try:
            made = pipe(**{key: value for key, value in arguments.items() if key in known}).images
        except torch.OutOfMemoryError as problem:
            raise UserError(
                f"the GPU's memory does not hold {len(requests)} pictures of {height} x {width}: set {KEY}.batch lower "
                f"({edit.batch} now; each candidate counts) or {KEY}.size smaller, or {NETWORK_KEY}.offload to model"
            ) from problem
        if arguments["output_type"] == "latent":
            made = opened.decode(made)
    return made.float().cpu()


@contextmanager
def _own_precision(device: torch.device) -> Iterator[None]:
    """No autocasting, as mixed precision has it, and new tensors in float32, not as under bf16-true."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def _masked(opened: Opened, requests: Sequence[Request], pictures: Tensor, edit: Edit) -> dict[str, Any]:
    """What a call with masks is given; holds the surroundings where the pipeline does not."""
    mask = torch.stack([r.mask.float().cpu() for r in requests if r.mask is not None])  # (B, 1, h, w)
    size = (mask.shape[2] // opened.factor, mask.shape[3] // opened.factor)
    cells = latent_cells(mask, size)  # (B, 1, h', w') of 0 and 1
    given: dict[str, Any] = {}
    if opened.mode == "inpaint":
        given["mask_image"] = cells.repeat_interleave(opened.factor, 2).repeat_interleave(opened.factor, 3)
    if not opened.has_unet or opened.takes_mask:
        return given
    latents = opened.encode(pictures)  # (B, 4, h', w')
    cells = cells.to(latents)
    if _starts_from_latents(opened):
        noise = _noise(latents, [_generator(r, _CONTENT) for r in requests])
        given["image"] = started(latents, cells, edit.content, noise)
    if opened.mode == "inpaint":
        given["masked_image_latents"] = given["image"]  # of no effect; spares it an encoding
        return given
    # The noise that the pipeline starts from, where that is the first thing it draws.
    stream = _SURROUNDINGS if opened.mode == "variation" else _MAIN
    noise = _noise(latents, [_generator(r, stream) for r in requests])
    _hold(opened.pipe, given.get("image", latents), cells, noise)
    return given


def _hold(pipe: Any, source: Tensor, cells: Tensor, noise: Tensor) -> None:
    """After each step of the pipeline's scheduler, places outside the mask are the source with that step's noise.

    Args:
        pipe: with a scheduler of its own for this call.
        source: latents (B, C, h', w').
        cells: (B, 1, h', w'), 1 inside the mask.
        noise: (B, C, h', w') standard normal, one for all steps.
    """
    scheduler = pipe.scheduler
    step = scheduler.step
    left: list[Tensor] = []

    @functools.wraps(step)  # pipelines look at its parameters
    def held(output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if not left:
            begin = len(scheduler.timesteps) - getattr(pipe, "_num_timesteps", len(scheduler.timesteps))
            left.extend(scheduler.timesteps[begin:].flip(0))
        made = step(output, timestep, *args, **kwargs)
        left.pop()
        proper = scheduler.add_noise(source, noise, left[-1][None]) if left else source
        latents = (1 - cells) * proper + cells * made[0]
        if isinstance(made, tuple):
            return (latents, *made[1:])
        made.prev_sample = latents
        return made

    scheduler.step = held


@contextmanager
def _from_source(pipe: Any) -> Iterator[None]:
    """Inpainting starts from the source with noise where all steps are done, too, as in the web interface.

    Left to itself it starts from noise alone if its strength is 1, as which 0.95 of 20 steps and one more are told.
    """
    prepare = pipe.prepare_latents
    if "is_strength_max" not in inspect.signature(prepare).parameters:
        yield  # Flux does so anyway
        return
    pipe.prepare_latents = lambda *args, **kwargs: prepare(*args, **{**kwargs, "is_strength_max": False})
    try:
        yield
    finally:
        del pipe.prepare_latents


def _prefilled(request: Request, edit: Edit) -> Tensor:
    """The picture (3, h, w), the inside of its mask filled from around it if so asked."""
    if request.mask is None or edit.content == "original":
        return request.picture
    inside = request.mask >= 0.5
    filled = fill(_to_bytes(request.picture), inside[0].cpu().numpy())
    pixels = torch.from_numpy(filled).permute(2, 0, 1).to(request.picture) / 255
    return torch.where(inside, pixels, request.picture)


def _to_bytes(picture: Tensor) -> Any:
    """(3, h, w) in [0, 1] -> (h, w, 3) uint8."""
    return (picture * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(_to_bytes(picture)))


@contextmanager
def _shown(opened: Opened, requests: Sequence[Request], edit: Edit) -> Iterator[Tensor]:
    """The references' embeddings (B or 2B, 1, ...), those without condition first; the pipeline takes them as they are.

    Left to itself it repeats them B times, and each picture would see all references.
    """
    pipe = opened.pipe
    is_guided = edit.guidance > 1 and pipe.unet.config.time_cond_proj_dim is None
    each = [
        pipe.prepare_ip_adapter_image_embeds([_to_pil(r.reference)], None, pipe._execution_device, 1, is_guided)[0]
        for r in requests
        if r.reference is not None
    ]
    halves = zip(*(one.chunk(2) if is_guided else (one,) for one in each), strict=True)
    embeddings = torch.cat([torch.cat(half) for half in halves])
    pipe.prepare_ip_adapter_image_embeds = lambda *_, **__: [embeddings]
    try:
        yield embeddings
    finally:
        del pipe.prepare_ip_adapter_image_embeds


def _reading(opened: Opened, requests: Sequence[Request], edit: Edit) -> Any:
    """The U-Net looks at the references while this is open."""
    control = ReferenceOnly(
        opened.pipe.unet,
        attention=edit.reference_attention,
        adain=edit.reference_adain,
        fidelity=edit.style_fidelity,
    )
    references = torch.cat([opened.encode(r.reference[None]) for r in requests if r.reference is not None])
    return control.reading(references, opened.pipe.scheduler, [_generator(r, _REFERENCE) for r in requests])


def _generator(request: Request, use: int) -> Generator:
    """On the CPU, so that the noise is the same on any device; another one for each use."""
    state = np.random.SeedSequence([*request.words, use]).generate_state(1, np.uint64)[0]
    return Generator().manual_seed(int(state >> np.uint64(1)))


def _noise(like: Tensor, generators: list[Generator]) -> Tensor:
    """Drawn as diffusers does, so that equal generators give equal noise."""
    from diffusers.utils.torch_utils import randn_tensor

    noise: Tensor = randn_tensor(like.shape, generator=generators, device=like.device, dtype=like.dtype)
    return noise
