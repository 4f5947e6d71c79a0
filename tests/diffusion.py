"""The equations of diffusion models in numpy and float64, written from the papers, for the tests to compare with.

`a` is alpha_bar at the step where a state is, `b` alpha_bar at the step where it goes to (1 at the very end).
"""

from __future__ import annotations

import numpy as np


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
