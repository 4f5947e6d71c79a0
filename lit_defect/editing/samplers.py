"""Samplers of diffusers by the names of Stable Diffusion's web interface, and the steps that a strength leaves of them.

The web interface spaces the steps of k-diffusion's samplers evenly over 0 ... T-1 (`linspace`), or their noise levels
as Karras et al. (2022), eq. 5, do; those of DDIM are at 1, 1 + T/N, ... (`leading`). So are they here, whatever spacing
a pipeline comes with; its betas and what its network answers (`epsilon`, `v_prediction`) are kept. What a name does
here is what it does there, but that `DPM++ 2M` without Karras takes N steps of N + 1 evenly spaced ones; that `DPM2`
leaves out the last noise level but one there; and that noise is drawn otherwise.

`PLMS` and `LMS` are left out. Started in the middle, as edits are, those of diffusers go wrong: the one passes over a
step, the other combines four slopes where it has one; both leave noise in the picture.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from lit_defect.editing.options import KEY, Content
from lit_defect.errors import UserError

DEFAULT = "default"
Convention = Literal["webui", "diffusers"]

_EVEN: dict[str, Any] = {"timestep_spacing": "linspace"}
_EARLY: dict[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False}
_MULTISTEP: dict[str, Any] = {**_EVEN, "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero"}
_SPACED = {  # samplers that also come with other noise levels
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {**_MULTISTEP, "algorithm_type": "dpmsolver++"}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {**_MULTISTEP, "algorithm_type": "sde-dpmsolver++"}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", _EVEN),
    "Euler": ("EulerDiscreteScheduler", _EVEN),
    "Heun": ("HeunDiscreteScheduler", _EVEN),
    "DPM2": ("KDPM2DiscreteScheduler", _EVEN),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", _EVEN),
}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    **_SPACED,
    **{f"{name} Karras": (kind, {**told, "use_karras_sigmas": True}) for name, (kind, told) in _SPACED.items()},
    **{
        f"{name} Exponential": (kind, {**told, "use_exponential_sigmas": True})
        for name, (kind, told) in _SPACED.items()
    },
    "Euler a": ("EulerAncestralDiscreteScheduler", _EVEN),
    "DDIM": ("DDIMScheduler", {**_EARLY, "set_alpha_to_one": False}),
    "DDPM": ("DDPMScheduler", {**_EARLY, "steps_offset": 0}),
    "UniPC": (
        "UniPCMultistepScheduler",
        {**_EVEN, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
    ),
    "LCM": ("LCMScheduler", {}),
}
"""Names to classes of diffusers and their settings, beside those of the network that is sampled."""

_OF_NETWORK = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_ZERO_SNR = "rescale_betas_zero_snr"
_FROM_NOISE_ONLY = ("PNDMScheduler", "LMSDiscreteScheduler")
_RECOVERS = 0.75  # strength from which on unit noise, or nothing, becomes a picture


class Start(NamedTuple):
    """Where sampling starts: the step of T, and the noise there over the picture, sqrt((1 - a) / a)."""

    timestep: float
    sigma: float


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A new scheduler of diffusers.

    Args:
        name: of `SAMPLERS`, in upper or lower case, or `default` for the one that the pipeline came with.
        config: of that one; as read from a file, so that its class is in it.

    Raises:
        UserError: no such sampler, or one that the network cannot be sampled by.
    """
    import diffusers

    if name.lower() == DEFAULT:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    kind, told = _looked_up(name)
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise UserError(
            f"{KEY}.sampler = {name}: this network is sampled by its own {config['_class_name']}; set it to {DEFAULT}"
        )
    if kind == "DPMSolverSDEScheduler" and importlib.util.find_spec("torchsde") is None:
        raise UserError(f"{KEY}.sampler = {name} needs torchsde: pip install torchsde; DPM++ 2M SDE does without")
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    if config.get(_ZERO_SNR) and _ZERO_SNR not in known:
        raise UserError(f"{KEY}.sampler = {name} cannot start from pure noise ({_ZERO_SNR}); DPM++ 2M or Euler can")
    of_network = {key: config[key] for key in (*_OF_NETWORK, _ZERO_SNR) if key in config and key in known}
    return getattr(diffusers, kind)(**of_network, **told)


def evaluations(steps: int, strength: float, convention: Convention) -> int:
    """How many of a process's steps a strength s leaves: int(N s) + 1 (`webui`) or int(N s) (`diffusers`).

    The product is rounded as both do, so 100 steps at 0.29 are 28 (or 29). The network is asked as often, but by
    samplers of order 2 (Heun, DPM2, DPM++ SDE), which ask 2 n - 1 times for n steps, twice that with guidance in turn.

    Raises:
        UserError: there is none left.
    """
    count = min(int(steps * strength) + (convention == "webui"), steps)
    if count < 1:
        raise UserError(
            f"{KEY}.strength = {strength} leaves none of {steps} steps; raise it, or set {KEY}.steps to "
            f"{math.ceil(1 / strength)} or more"
        )
    return count


def told_strength(steps: int, strength: float, convention: Convention, *, rounds_up: bool = False) -> float:
    """What a pipeline of diffusers must be told as strength so that it does `evaluations` steps.

    That is their share, or the next float where the product with `steps` falls on the wrong side of a whole number.
    Where it is 1, diffusers' inpainting starts from pure noise.

    Args:
        steps: of the whole process.
        strength: as the convention understands it.
        convention: of the strength.
        rounds_up: whether the pipeline rounds steps * strength up, as those of flow matching do (Stable Diffusion 3,
            Flux), not down.
    """
    count = evaluations(steps, strength, convention)
    told = count / steps
    done = steps - int(steps - steps * told) if rounds_up else int(steps * told)
    return told if done == count else math.nextafter(told, 0 if rounds_up else 1)


def start(scheduler: Any, told: float, steps: int) -> Start:
    """Where a pipeline of diffusers starts that is told this strength.

    Args:
        scheduler: whose steps are set anew.
        told: from `told_strength`.
        steps: of the whole process.

    Raises:
        UserError: the sampler cannot do so many steps, or cannot start there.
    """
    if told < 1 and type(scheduler).__name__ in _FROM_NOISE_ONLY:
        raise UserError(
            f"{KEY}.sampler = {DEFAULT}: the pipeline's own {type(scheduler).__name__} leaves noise in the picture if "
            "it starts in the middle; set it to DDIM or DPM++ 2M Karras"
        )
    try:
        scheduler.set_timesteps(steps)
    except ValueError as problem:
        raise UserError(f"{KEY}.steps = {steps}: {type(scheduler).__name__} cannot ({problem})") from problem
    first = (steps - round(steps * told)) * scheduler.order
    timestep = float(scheduler.timesteps[first])
    if hasattr(scheduler, "sigmas"):
        return Start(timestep, float(scheduler.sigmas[first]))
    kept = float(scheduler.alphas_cumprod[int(timestep)])
    return Start(timestep, math.sqrt((1 - kept) / kept) if kept else math.inf)  # zero terminal SNR


def warn_of_content(content: Content, strength: float) -> str | None:
    """What to tell if a mask's first content will be seen in the result; else None."""
    if content in ("original", "fill") or strength >= _RECOVERS:
        return None
    left = "noise" if content == "latent_noise" else "a flat grey"
    return (
        f"{KEY}.content = {content} with a strength of {strength}: below {_RECOVERS} too few steps are left to make a "
        f"picture of it, and {left} will be seen in the mask; raise the strength or set content to original or fill"
    )


def _looked_up(name: str) -> tuple[str, dict[str, Any]]:
    """Class and settings of a sampler.

    Raises:
        UserError: there is none of that name.
    """
    names = {known.lower(): known for known in (*SAMPLERS, DEFAULT)}
    if name.lower() not in names:
        near = [names[word] for word in difflib.get_close_matches(name.lower(), list(names), n=3, cutoff=0.4)]
        hint = f"did you mean {', '.join(near)}?" if near else f"there is: {', '.join(names.values())}"
        raise UserError(f"{KEY}.sampler = {name}: no such sampler; {hint}")
    return SAMPLERS[names[name.lower()]]
