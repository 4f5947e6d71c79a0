"""The reverse process that repairs a label map (Ando, section 4), with the choices that others have made since.

`joint`: labels and picture are one state, both denoised (Ando).
`replace`: the same, but before each step the picture's channels are the picture noised to that step (after RePaint,
    Lugmayr et al., CVPR 2022).
`concat`: the state is the labels alone, and the network sees the clean picture beside it (Wolleb et al., MIDL 2022;
    SegRefiner, NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lit_defect.diffusion.labels import VOID, LabelInput, draw_normal, encode, one_hot
from lit_defect.diffusion.process import ForwardProcess, Prediction, uniform_steps
from lit_defect.diffusion.samplers import Sampler
from lit_defect.diffusion.spaces import Space
from lit_defect.losses.segmentation import make_mask_loss

Conditioning = Literal["joint", "replace", "concat"]
Network = Callable[[Tensor, Tensor], Tensor]
"""(input (B, C, h, w), step (B,)) -> answer (B, C', h, w)."""


class Refined(NamedTuple):
    """What a chain has come to: its last label state, and the x_0 that its first call gave; (B, channels, h, w)."""

    final: Tensor
    first: Tensor


class Example(NamedTuple):
    """One training batch: what the network sees, at which step, the state within, and the true x_0.

    `recycled` states are not noised truths, so that the noise which would have led there has no bound.
    """

    inputs: Tensor
    t: Tensor
    state: Tensor
    x0: Tensor
    recycled: bool = False


@dataclass(frozen=True)
class Refinement:
    """How label maps are refined, and what a network is trained on to do so.

    Attributes:
        process: the forward process.
        sampler: which steps are done, and how.
        space: where states live.
        conditioning: how the picture comes in (see the top of the file).
        start: `clean` starts the reverse process from the label map itself (Ando), `noised` from the map noised to
            the first step (img2img).
        prediction: what the network answers: the noise, x_0, v, or class scores (`logits`) whose softmax is x_0.
        label_input: how probabilities become a label map.
        mask_loss: (class scores (B, n, H, W), labels (B, H, W)) -> mean loss, what `logits` are trained by.
    """

    process: ForwardProcess
    sampler: Sampler
    space: Space
    conditioning: Conditioning
    start: Literal["clean", "noised"]
    prediction: Prediction
    label_input: LabelInput
    mask_loss: Callable[[Tensor, Tensor], Tensor] = field(default_factory=lambda: make_mask_loss("ce"))

    @property
    def in_channels(self) -> int:
        """Channels that the network sees."""
        return self.space.channels + self.space.image_channels

    @property
    def out_channels(self) -> int:
        """Channels that it answers."""
        return self.space.channels if self.conditioning == "concat" else self.in_channels

    # --- refining ---

    @torch.no_grad()
    def refine(
        self, network: Network, probabilities: Tensor | None, images: Tensor, streams: list[Generator]
    ) -> Refined:
        """Reverse process from the label map of a first stage.

        Args:
            network: the denoiser.
            probabilities: (B, n, H, W) of the first stage; None starts from noise.
            images: (B, 3, H, W) in [-1, 1].
            streams: random stream of each picture (`labels.generators`).

        Returns:
            What the chain has come to; without a step (strength 0) the first stage's label map as it is.
        """
        picture = self.space.image(images)
        state = self._start(probabilities, picture, streams)
        scheduler, first = self.sampler.begin(), None
        for t in self.sampler.timesteps:
            steps = torch.full((len(images),), t, device=images.device)
            if self.conditioning == "replace":
                state = self._replace(state, picture, steps, draw_normal(picture.shape[1:], streams, picture))
            x0 = self._x0(network(self._inputs(state, picture), steps).float(), state, steps)
            first = self._labels(x0) if first is None else first
            state = self.sampler.step(scheduler, x0, t, state, streams)
        final = self._labels(state)
        return Refined(final, final if first is None else first)

    def _start(self, probabilities: Tensor | None, picture: Tensor, streams: list[Generator]) -> Tensor:
        """The state that the chain leaves from, at the sampler's first step."""
        if probabilities is None:
            size = picture.shape[-2:]
            labels = draw_normal((self.space.channels, *size), streams, picture)
            if self.conditioning == "concat":
                return labels
            return torch.cat([labels, draw_normal(picture.shape[1:], streams, picture)], dim=1)
        state = self.space.encode(encode(probabilities, self.label_input, streams))
        if self.conditioning != "concat":
            state = torch.cat([state, picture], dim=1)
        if self.start == "clean" or not self.sampler.timesteps:
            return state
        steps = torch.full((len(state),), self.sampler.timesteps[0], device=state.device)
        return self.process.add_noise(state, draw_normal(state.shape[1:], streams, state), steps)

    def _x0(self, output: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """The x_0 that an answer means, within the limits of the space."""
        if self.prediction == "logits":
            shares = 2 * self._labels(output).softmax(1) - 1
            output = torch.cat([shares, output[:, self.space.channels :]], dim=1)
        x0, limit = self.process.x0_of(output, state, t, self.prediction), self.space.limit
        picture = x0[:, self.space.channels :].clamp(-1, 1)  # of a joint state; pixels, whatever the labels are
        return torch.cat([self._labels(x0).clamp(-limit, limit), picture], dim=1)

    def _labels(self, state: Tensor) -> Tensor:
        return state[:, : self.space.channels]

    def _inputs(self, state: Tensor, picture: Tensor) -> Tensor:
        return torch.cat([state, picture], dim=1) if self.conditioning == "concat" else state

    def _replace(self, state: Tensor, picture: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return torch.cat([self._labels(state), self.process.add_noise(picture, noise, t)], dim=1)

    # --- training ---

    def example(
        self, labels: Tensor, images: Tensor, probabilities: Tensor | None = None, network: Network | None = None
    ) -> Example:
        """Draw steps and states to train on; randomness from torch's global generator.

        Without `probabilities` the states are the noised truth at any step (Ando). With them, they are what a chain
        from the first stage's map meets: for half of the batch its first state, for the rest where the sampler gets
        to from there, at any later step, with the x_0 that the network answers to the first one. So it learns to mend
        the first stage's errors and then its own (recycling: Fu et al., MELBA 2023:016).

        Args:
            labels: (B, H, W) class ids, 255 for void.
            images: (B, 3, H, W) in [-1, 1].
            probabilities: (B, n, H, W) of the first stage, or None.
            network: the one in training, asked without a gradient; needed with `probabilities`.

        Raises:
            ValueError: only one of maps and network, or a strength of 0, under which no chain leaves from the maps.
        """
        picture = self.space.image(images)
        x0 = self.space.encode(one_hot(labels, self.space.classes))
        if self.conditioning != "concat":
            x0 = torch.cat([x0, picture], dim=1)
        if (probabilities is None) != (network is None):
            raise ValueError("training on a first stage's maps needs the maps and the network")
        if probabilities is None or network is None:
            t = uniform_steps(len(labels), self.process.train_steps, images.device)
            state = self.process.add_noise(x0, torch.randn_like(x0), t)
            if self.conditioning == "replace":
                state = self._replace(state, picture, t, torch.randn_like(picture))
        else:
            t, state = self._met(network, picture, probabilities)
        return Example(self._inputs(state, picture), t, state, x0, recycled=probabilities is not None)

    @torch.no_grad()
    def _met(self, network: Network, picture: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Steps (B,) and states (B, C, h, w) that a chain from the first stage's maps gets to."""
        if not self.sampler.timesteps:
            raise ValueError("a strength of 0 leaves no step that a chain would meet")
        count, device = len(picture), picture.device
        first = torch.full((count,), self.sampler.timesteps[0], device=device)
        state = self.space.encode(encode(probabilities, self.label_input))
        if self.conditioning != "concat":
            state = torch.cat([state, picture], dim=1)
        if self.start == "noised":
            state = self.process.add_noise(state, torch.randn_like(state), first)
        if self.conditioning == "replace":
            state = self._replace(state, picture, first, torch.randn_like(picture))
        t = first.clone()
        half = (count + 1) // 2 if count > 1 else int(torch.randint(2, ()))  # a batch of one is the one or the other
        later = slice(half, count)
        if self.sampler.calls == 1 or half == count:
            return t, state
        t[later] = uniform_steps(count - half, self.sampler.timesteps[0], device)
        left = state[later].clone()  # the network's input, which stays what it was
        answer = network(self._inputs(left, picture[later]), first[later]).float()
        guess = self._x0(answer, left, first[later])
        noise = torch.randn_like(guess)
        state[later] = self.process.bridge(left, guess, first[later], t[later], noise, self.sampler.eta)
        if self.conditioning == "replace":
            state[later] = self._replace(state[later], picture[later], t[later], torch.randn_like(picture[later]))
        return t, state

    def loss(self, output: Tensor, example: Example, labels: Tensor) -> Tensor:
        """Mean over all places that are not void: squared error of the target (Ho et al., eq. 14), or `mask_loss`.

        Args:
            output: the network's answer to `example.inputs`.
            example: what it was asked.
            labels: (B, H, W) class ids, 255 for void.
        """
        output, channels = output.float(), self.space.channels
        valid = (labels != VOID).float().unsqueeze(1)
        if self.space.factor > 1:  # a place of a latent counts by its share of pixels that are not void
            valid = F.avg_pool2d(valid, self.space.factor)
        target = self.process.target(example.state, example.x0, example.t, self.prediction)
        if example.recycled and self.prediction in ("epsilon", "v_prediction"):  # count the error of x_0 instead
            signal, spread = self.process.levels(example.t, output)
            share = spread if self.prediction == "v_prediction" else (spread / signal).clamp(max=1)
            output, target = share * output, share * target
        if self.prediction == "logits":
            weight = valid.sum()
            total = self.mask_loss(output[:, :channels], labels) * weight
        else:
            terms = (output[:, :channels] - target[:, :channels]).square() * valid
            total, weight = terms.sum(), valid.expand_as(terms).sum()
        if output.shape[1] > channels:
            terms = (output[:, channels:] - target[:, channels:]).square()
            total, weight = total + terms.sum(), weight + terms.numel()
        return total / weight.clamp(min=1)
