"""Samplers of diffusers by name, all told the same x_0, and the steps that a strength leaves of them.

The network's answer is turned into x_0, clipped, and handed over as such (`prediction_type="sample"`): clipping
then means the same in every scheduler, also in those that know none, and DDIM's noise agrees with the clipped x_0.
Steps are spaced `trailing` (Lin et al., WACV 2024): the first one is at strength * T whatever their number, so a
strength keeps its meaning. Where steps * strength is not whole, it is rounded down, and the first step lies lower.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Generator, Tensor

from lit_defect.diffusion.process import ForwardProcess
from lit_defect.errors import UserError

SamplerName = Literal["ddpm", "ddim", "dpmsolver", "unipc"]


class Sampler:
    """One reverse process over the last `strength` of all steps.

    Args:
        name: `ddpm` (Ho et al.), `ddim` (Song et al.), `dpmsolver` (DPM-Solver++ of order 2, Lu et al.) or
            `unipc` (Zhao et al.).
        process: the forward process to be reversed.
        steps: steps of the whole reverse process; must divide T.
        strength: share of them that is done, the last ones.
        eta: share of DDPM's noise that DDIM adds at each step (Song et al., eq. 16); None for the sampler's own: 1 for
            `ddpm`, 0 for the others.

    Attributes:
        timesteps: those done, falling; as many as there are network calls.
        eta: as above, never None.

    Raises:
        UserError: steps or strength out of range, or so few steps that none is left.
    """

    def __init__(
        self, name: SamplerName, process: ForwardProcess, *, steps: int, strength: float, eta: float | None = None
    ) -> None:
        total = process.train_steps
        if not 0 <= strength <= 1:
            raise UserError(f"model.init_args.strength = {strength}: expected a share of the steps, 0 to 1")
        if steps < 1 or total % steps:
            near = sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - steps))[:4]
            raise UserError(
                f"model.init_args.steps = {steps}: must divide the {total} steps of the diffusion (train_steps), such "
                f"as {', '.join(map(str, sorted(near)))}"
            )
        own = 1.0 if name == "ddpm" else 0.0
        self.eta = own if eta is None else eta
        if (name != "ddim" and self.eta != own) or not 0 <= self.eta <= 1:
            raise UserError(f"model.init_args.eta = {eta}: only ddim takes one, between 0 and 1; leave it out")
        self.name = name
        self.process = process
        self.steps = steps
        self.strength = strength
        self.calls = int(steps * strength + 1e-9)
        if strength > 0 and self.calls == 0:
            raise UserError(
                f"model.init_args.steps = {steps} and strength = {strength} leave no step to do: set steps to at "
                f"least {int(1 / strength + 0.999999)}, or strength to 0 for the input as it is"
            )
        stride = total // steps
        self.timesteps = [stride * (k + 1) - 1 for k in reversed(range(self.calls))]

    def begin(self) -> Any:
        """A scheduler of diffusers at the first of `timesteps`; it keeps state, so each chain takes its own."""
        import diffusers

        settings: dict[str, Any] = {
            **self.process.settings,
            "prediction_type": "sample",
            "timestep_spacing": "trailing",
        }
        scheduler: Any
        if self.name == "ddpm":
            scheduler = diffusers.DDPMScheduler(**settings, clip_sample=False)
        elif self.name == "ddim":
            scheduler = diffusers.DDIMScheduler(**settings, clip_sample=False)
        elif self.name == "dpmsolver":
            scheduler = diffusers.DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
        else:
            scheduler = diffusers.UniPCMultistepScheduler(**settings, final_sigmas_type="zero")
        scheduler.set_timesteps(self.steps)
        planned = scheduler.timesteps[self.steps - self.calls :].tolist()
        if planned != self.timesteps:
            raise RuntimeError(f"{type(scheduler).__name__} goes through {planned}, expected {self.timesteps}")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.steps - self.calls)
        return scheduler

    def step(self, scheduler: Any, x0: Tensor, t: int, state: Tensor, generators: list[Generator]) -> Tensor:
        """The next state, after the one at step t whose x_0 is thought to be `x0`; all (B, C, H, W)."""
        noise: dict[str, Any] = {"generator": generators} if self.eta else {}
        if self.name == "ddim":
            noise["eta"] = self.eta
        result: Tensor = scheduler.step(x0, t, state, **noise).prev_sample
        return result
