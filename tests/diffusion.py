"""The equations of diffusion models in numpy and float64, written from the papers, for the tests to compare with.

Behind them a refiner of tiny pictures, and a network that knows the truth. `a` is alpha_bar at the step where a state is, `b` alpha_bar at the step where it goes to (1 at the very end).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from lit_defect.diffusion.labels import one_hot
from lit_defect.diffusion.process import ForwardProcess
from lit_defect.diffusion.refine import Refinement
from lit_defect.diffusion.samplers import Sampler
from lit_defect.diffusion.spaces import PixelSpace

CONDITIONINGS = ("joint", "replace", "concat")
STARTS = ("clean", "noised")
PREDICTIONS = ("epsilon", "sample", "v_prediction", "logits")
SCHEDULERS = ("ddpm", "ddim", "dpmsolver", "unipc")
CLASSES, SIZE = 3, (6, 8)
PROCESSES = {schedule: ForwardProcess(1000, schedule) for schedule in ("linear", "cosine")}


def alpha_bar(schedule: str, steps: int = 1000) -> np.ndarray:
    """(T,) products of 1 - beta."""
    if schedule == "linear":  # Ho et al., section 4
        betas = np.linspace(1e-4, 0.02, steps)
    elif schedule == "scaled_linear":  # Stable Diffusion: linear in the roots
        betas = np.linspace(0.0001**0.5, 0.02**0.5, steps) ** 2
    else:  # Nichol & Dhariwal, eq. 17, betas at most 0.999
        f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return np.cumprod(1 - betas)


def levels_of(schedule: str, total: int, steps: int) -> dict[int, tuple[float, float]]:
    """Step -> (a, b) for every step of a chain of `steps` steps, evenly spaced from T - 1 down."""
    product, stride = alpha_bar(schedule, total), total // steps
    return {t: (product[t], product[t - stride] if t >= stride else 1.0) for t in range(total - 1, -1, -stride)}


def posterior(x: np.ndarray, x0: np.ndarray, a: float, b: float) -> tuple[np.ndarray, float]:
    """Mean and variance of q(x_prev | x, x0): Ho et al., eq. 7 with alpha_t = a / b."""
    alpha, beta = a / b, 1 - a / b
    mean = np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(alpha) * (1 - b) / (1 - a) * x
    return mean, (1 - b) / (1 - a) * beta


def ddim(x: np.ndarray, x0: np.ndarray, a: float, b: float) -> np.ndarray:
    """Song et al., eq. 12 with sigma = 0; the noise is what leads from x0 to x."""
    epsilon = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
    return np.sqrt(b) * x0 + np.sqrt(1 - b) * epsilon


def half_log_snr(a: float) -> float:
    """lambda = log(alpha / sigma) of Lu et al."""
    return 0.5 * np.log(a / (1 - a))


def x0_of(answer: np.ndarray, x: np.ndarray, a: float, prediction: str) -> np.ndarray:
    """What an answer says about x0, for the noise (Ho et al., eq. 15), x0 itself, and v (Salimans & Ho, appendix D)."""
    if prediction == "epsilon":
        return (x - np.sqrt(1 - a) * answer) / np.sqrt(a)
    if prediction == "v_prediction":
        return np.sqrt(a) * x - np.sqrt(1 - a) * answer
    return answer


def answer_for(x0: np.ndarray, x: np.ndarray, a: float, prediction: str) -> np.ndarray:
    """What a network that knows x0 answers."""
    epsilon = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
    return {"epsilon": epsilon, "v_prediction": np.sqrt(a) * epsilon - np.sqrt(1 - a) * x0}.get(prediction, x0)


class Blocks:
    """An autoencoder that loses nothing: blocks of 2 x 2 pixels become channels, on another scale."""

    classes, latent_channels, factor, limit = 2, 8, 2, 5.0

    def encode(self, labels):
        return 1.7 * F.pixel_unshuffle(labels, 2)

    def decode(self, latents):
        return 20 * F.pixel_shuffle(latents / 1.7, 2)


def make(schedule="cosine", scheduler="ddim", *, steps=10, strength=0.5, space=None, **options) -> Refinement:
    process = PROCESSES[schedule]
    chosen = {"conditioning": "concat", "start": "clean", "prediction": "sample", "label_input": "sample", **options}
    sampler = Sampler(scheduler, process, steps=steps, strength=strength)
    return Refinement(process, sampler, space or PixelSpace(CLASSES), **chosen)


def pictures(count=2, size=SIZE, classes=CLASSES, seed=0):
    """Truth (B, H, W), images in [-1, 1] and a first stage's probabilities that have nothing to do with the truth."""
    rng = np.random.default_rng(seed)
    truth = torch.from_numpy(rng.integers(0, classes, (count, *size)))
    images = torch.from_numpy(rng.uniform(-1, 1, (count, 3, *size))).float()
    return truth, images, torch.from_numpy(rng.dirichlet(np.ones(classes), (count, *size))).float().permute(0, 3, 1, 2)


class Oracle:
    """Knows x0, answers what a perfect network would, and keeps what it saw."""

    def __init__(self, refinement: Refinement, schedule: str, truth: torch.Tensor, images: torch.Tensor):
        space = refinement.space
        labels = space.encode(one_hot(truth, space.classes))
        joint = refinement.conditioning != "concat"
        self.x0 = torch.cat([labels, space.image(images)], dim=1) if joint else labels
        self.prediction, self.labels = refinement.prediction, space.channels
        self.product = alpha_bar(schedule)
        self.inputs: list[torch.Tensor] = []
        self.states: list[np.ndarray] = []
        self.steps: list[list[int]] = []

    def __call__(self, inputs, t):
        assert t.dtype == torch.int64
        self.inputs.append(inputs)
        self.steps.append(t.tolist())
        self.states.append(inputs[:, : self.x0.shape[1]].double().numpy())
        x0 = self.x0.double().numpy()
        answer = answer_for(x0, self.states[-1], self.product[self.steps[-1][0]], self.prediction)
        if self.prediction == "logits":
            answer = np.concatenate([20 * x0[:, : self.labels], x0[:, self.labels :]], axis=1)
        return torch.from_numpy(answer).float()
