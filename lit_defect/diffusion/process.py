"""The forward process q of a denoising diffusion model, and what follows from it in closed form.

Notation of Ho et al. (DDPM, NeurIPS 2020): betas b_t, a_t = 1 - b_t, and `alpha_bar[t]`, the product of a_0 ... a_t for
t = 0 ... T - 1 (the paper counts from 1). A state x_t has any number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.transfer import sent

BetaSchedule = Literal["linear", "scaled_linear", "cosine"]
Prediction = Literal["epsilon", "sample", "v_prediction", "logits"]

_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


class ForwardProcess:
    """q(x_t | x_0) and its relatives, for T steps of a schedule.

    Args:
        train_steps: T.
        beta_schedule: `linear` (Ho et al.: 1e-4 to 0.02), `scaled_linear` (linear between their roots, as in Stable
            Diffusion) or `cosine` (Nichol & Dhariwal, ICML 2021).
        betas: the first and the last b_t; without meaning for `cosine`.

    Attributes:
        alpha_bar: (T,) float32, falling.
        settings: what every scheduler of diffusers takes, so that all of them mean this process.

    Raises:
        UserError: fewer than 2 steps.
    """

    def __init__(
        self,
        train_steps: int = 1000,
        beta_schedule: BetaSchedule = "linear",
        betas: tuple[float, float] = (1e-4, 0.02),
    ) -> None:
        if train_steps < 2:
            raise UserError(f"model.init_args.train_steps = {train_steps}: expected at least 2")
        from diffusers import DDPMScheduler

        self.train_steps = train_steps
        self.settings: dict[str, Any] = {
            "num_train_timesteps": train_steps,
            "beta_schedule": _SCHEDULES[beta_schedule],
            "beta_start": betas[0],
            "beta_end": betas[1],
        }
        scheduler: Any = DDPMScheduler(**self.settings)
        self.alpha_bar: Tensor = scheduler.alphas_cumprod

    @classmethod
    def of_scheduler(cls, config: Mapping[str, Any]) -> ForwardProcess:
        """The process that a scheduler of diffusers was configured for.

        Raises:
            UserError: a schedule of noise that has no name here.
        """
        names = {theirs: ours for ours, theirs in _SCHEDULES.items()}
        schedule = names.get(config.get("beta_schedule", "linear"))
        if schedule is None or config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
            raise UserError(
                f"model.init_args.base: its scheduler has beta_schedule {config.get('beta_schedule')}, trained_betas "
                f"or rescale_betas_zero_snr; known are {', '.join(names)}, without the latter two"
            )
        ends = (config.get("beta_start", 1e-4), config.get("beta_end", 0.02))
        return cls(config.get("num_train_timesteps", 1000), cast(BetaSchedule, schedule), ends)

    def levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal sqrt(alpha_bar_t) and of noise sqrt(1 - alpha_bar_t), (B, 1, 1, 1), for steps t (B,)."""
        share = sent(self.alpha_bar, like.device)[t].view(-1, 1, 1, 1)
        return share.sqrt(), (1 - share).sqrt()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of q(x_t | x_0) (Ho et al., eq. 4): (B, C, H, W), t (B,)."""
        signal, spread = self.levels(t, x0)
        return signal * x0 + spread * noise

    def bridge(self, start: Tensor, x0: Tensor, t_start: Tensor, t: Tensor, noise: Tensor, eta: float) -> Tensor:
        """Where a chain that left `start` at step t_start is at t <= t_start, if its network is always right.

        q(x_t | x_{t_start}, x_0) of Song et al. (DDIM, ICLR 2021, eq. 7 and 16): eta = 1 is the posterior of DDPM
        (Ho et al., eq. 6 and 7, for any jump), eta = 0 the deterministic path. A network that is trained on these
        states meets at test time what it was trained on, whatever the chain starts from.

        Args:
            start: (B, C, H, W), the state at t_start.
            x0: (B, C, H, W), the truth.
            t_start, t: (B,).
            noise: (B, C, H, W), standard normal.
            eta: 0 to 1.

        Returns:
            (B, C, H, W); `start` itself where t == t_start.
        """
        signal_start, spread_start = self.levels(t_start, x0)
        signal, spread = self.levels(t, x0)
        direction = (start - signal_start * x0) / spread_start
        ratio = (signal_start / signal).square()  # alpha_bar_start / alpha_bar_t
        sigma = eta * spread / spread_start * (1 - ratio).clamp(min=0).sqrt()
        return signal * x0 + (spread.square() - sigma.square()).clamp(min=0).sqrt() * direction + sigma * noise

    def target(self, state: Tensor, x0: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """What a network should answer to `state` so that its x_0 is the truth; (B, C, H, W).

        On states of q(x_t | x_0) these are the noise (Ho et al., eq. 14), x_0, or v = sqrt(alpha_bar) noise -
        sqrt(1 - alpha_bar) x_0 (Salimans & Ho, ICLR 2022); on others the same algebra gives the noise that
        would have led there.
        """
        if prediction in ("sample", "logits"):
            return x0
        signal, spread = self.levels(t, x0)
        noise = (state - signal * x0) / spread
        return noise if prediction == "epsilon" else signal * noise - spread * x0

    def x0_of(self, output: Tensor, state: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """The inverse of `target`: the x_0 that a network's answer (B, C, H, W) to `state` means, not clipped."""
        if prediction in ("sample", "logits"):
            return output
        signal, spread = self.levels(t, state)
        if prediction == "epsilon":
            return (state - spread * output) / signal
        return signal * state - spread * output


def uniform_steps(count: int, below: int, device: torch.device) -> Tensor:
    """(B,) steps drawn from 0 ... below - 1 by torch's global generator."""
    return torch.randint(below, (count,), device=device)
