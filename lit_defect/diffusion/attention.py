"""Cross-attention of a text-conditioned U-Net: read while it looks, and re-weighted (Hu et al., AAAI 2024, AAR).

    cross = CrossAttention(unet)                               # nothing changes until it is told to
    with cross.recording(prompt.positions) as maps:            # where in the picture the learnt tokens are attended to
        unet(x, t, states)
    cross.reweight = Reweight(paper_weights(x0, y, m), prompt.positions, "paper")
    unet(x, t, states)                                         # looks more to them where the picture is still normal
    cross.remove()

For queries Q of the picture's places and keys K of the tokens, and w the weight of a place, in the columns j of the
learnt tokens only:

    paper       A = softmax(Q K^T / sqrt(d)),  A_ij <- w_i A_ij       not normalised again
    official    A = softmax(L),  L_ij = w_i (Q K^T / sqrt(d))_ij      the authors' code

As a rule of thumb the authors advise re-weighting for defects of texture, and none for structural ones. Their code
also multiplies the column of the prompt's start token, which looks like an oversight and is not repeated here. It joins
re-weighting with a region that is wider at first (`latent_sampling.Region`); here either can be had alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_defect.errors import UserError

_CEILING = 1.5  # of the official weights


@dataclass(frozen=True)
class Reweight:
    """What to do to the attention.

    Attributes:
        weights: (B, 1, h, w), w of each place, B that of the U-Net's batch: rows without condition have weights of 1.
            Each layer takes the average over the area of each place of its grid. So the weights of all places keep
            their sum in proportion, and a place half in the mask has half of what its pixels ask for.
        positions: columns of the learnt tokens.
        mode: `paper` or `official`.
    """

    weights: Tensor
    positions: Sequence[int]
    mode: Literal["paper", "official"] = "paper"


class CrossAttention:
    """Holds the cross-attentions ("attn2") of a U-Net of diffusers.

    While nothing is recorded or re-weighted their own processors do the work. Otherwise the attention is computed
    openly, from the modules of the layer, so that adapters such as LoRA act as before.

    Args:
        unet: UNet2DConditionModel.

    Attributes:
        reweight: how to change the attention; None for not at all.

    Raises:
        UserError: a U-Net without cross-attention, or with one of another kind.
    """

    def __init__(self, unet: nn.Module) -> None:
        self.reweight: Reweight | None = None
        self._unet = unet
        self._size = (0, 0)
        self._recorded: tuple[list[Tensor], Sequence[int]] | None = None
        self._layers: list[Any] = [m for name, m in unet.named_modules() if name.split(".")[-1] == "attn2"]
        if not self._layers:
            raise UserError("model.init_args.base: its U-Net has no cross-attention (attn2), where a prompt would act")
        for layer in self._layers:
            _check_plain(layer)
        self._own = [layer.processor for layer in self._layers]
        for layer, own in zip(self._layers, self._own, strict=True):
            layer.set_processor(_Processor(self, own))
        self._hook = unet.register_forward_pre_hook(self._see_size, with_kwargs=True)

    @property
    def idle(self) -> bool:
        """Nothing is recorded and nothing re-weighted."""
        return self._recorded is None and self.reweight is None

    def remove(self) -> None:
        """Give the U-Net back its own processors."""
        self._hook.remove()
        for layer, own in zip(self._layers, self._own, strict=True):
            layer.set_processor(own)

    @contextmanager
    def recording(self, positions: Sequence[int]) -> Iterator[list[Tensor]]:
        """Collects the U-Net's own attention to tokens, before any re-weighting.

        Args:
            positions: columns of the tokens.

        Yields:
            a list, to which every call of the U-Net adds (B, h_l, w_l) of each layer: the attention summed over the
            tokens and averaged over the heads, 0 to 1, differentiable.

        Raises:
            UserError: gradient checkpointing, which would run the layers once more when nothing is recorded any more.
        """
        if torch.is_grad_enabled() and getattr(self._unet, "is_gradient_checkpointing", False):
            raise UserError("attention cannot be recorded under gradient checkpointing: turn one of them off")
        maps: list[Tensor] = []
        before, self._recorded = self._recorded, (maps, positions)
        try:
            yield maps
        finally:
            self._recorded = before

    def _see_size(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample: Tensor = args[0] if args else kwargs["sample"]
        self._size = (sample.shape[2], sample.shape[3])

    def _changed(self, attention: Tensor, logits: Tensor) -> Tensor:
        """Record and re-weight the attention (B, heads, places, L), softmax of `logits`."""
        grid = _grid(self._size, attention.shape[2])
        if self._recorded is not None:
            maps, positions = self._recorded
            seen = attention[..., list(positions)].sum(dim=-1).mean(dim=1)  # (B, places)
            maps.append(seen.unflatten(1, grid))
        if self.reweight is None:
            return attention
        factor = _factors(self.reweight, grid, attention)
        return attention * factor if self.reweight.mode == "paper" else (logits * factor).softmax(dim=-1)


class _Processor:
    """What a layer of diffusers calls; see `CrossAttention`."""

    def __init__(self, owner: CrossAttention, own: Any) -> None:
        self.owner, self.own = owner, own

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Places (B, N, C) and states (B, L, D) -> (B, N, C); the names are those of diffusers."""
        if self.owner.idle:
            done: Tensor = self.own(attn, hidden_states, encoder_hidden_states, attention_mask)
            return done
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attn.norm_cross:
            states = attn.norm_encoder_hidden_states(states)
        split = (attn.heads, -1)
        query, key, value = (
            projected.unflatten(-1, split).transpose(1, 2)  # (B, heads, N or L, C / heads)
            for projected in (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        )
        logits = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).float()  # (B, heads, N, L)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, states.shape[1], len(states))
            logits = logits + mask.view(len(states), attn.heads, -1, states.shape[1])
        attention = self.owner._changed(logits.softmax(dim=-1), logits)
        found = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (B, N, C)
        projected: Tensor = attn.to_out[1](attn.to_out[0](found))
        return projected


def paper_weights(x0: Tensor, normal: Tensor, mask: Tensor) -> Tensor:
    """w of the paper: where the picture, as it is foreseen, is still like the normal one, attention rises.

        d = sum over channels of (m y - m x0)^2          per pixel
        w = |m|_1 softmax(f(d)) over the pixels,         f(d) = 1 / d, and -inf where d = 0

    The mean of w over the mask is 1. In pictures of [-1, 1], 1 / d differs between pixels by more than a softmax
    can spread, so that w often is all on one pixel; the formula is kept as it is.

    Args:
        x0: (B, C, H, W), what the network foresees.
        normal: (B, C, H, W), y.
        mask: (B, 1, H, W), m in {0, 1}.

    Returns:
        (B, 1, H, W) float32, 0 outside the mask; where nothing at all differs, w = m.
    """
    m = mask.float()
    distance = (m * (normal.float() - x0.float())).square().sum(dim=1, keepdim=True)  # (B, 1, H, W)
    largest = torch.finfo(torch.float32).max
    score = distance.reciprocal().clamp(max=largest).where(distance > 0, -torch.inf)
    share = score.flatten(1).softmax(dim=1).view_as(score)
    same = (distance == 0).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    return m.where(same, m.sum(dim=(1, 2, 3), keepdim=True) * share)


def official_weights(noisy: Tensor, normal: Tensor, mask: Tensor) -> Tensor:
    """w of the authors' code: as in the paper, but on latents, without a softmax, and bounded.

        d = sum over channels of (m x_t - m y)^2         per place
        w = |m|_1 (1 / d) / sum of (1 / d) over the mask, clipped to 1 ... 1.5; 1 outside the mask

    Args:
        noisy: (B, C, h, w), the latents x_t of the current step.
        normal: (B, C, h, w), y: the latents of the normal picture, without noise.
        mask: (B, 1, h, w), m in {0, 1}.

    Returns:
        (B, 1, h, w) float32; places inside where nothing differs count as very near.
    """
    m = mask.float()
    distance = (m * (noisy.float() - normal.float())).square().sum(dim=1, keepdim=True)  # (B, 1, h, w)
    # Relative to the nearest place all numbers are in 0 ... 1, however near it is.
    least = torch.finfo(torch.float32).tiny
    nearest = distance.clamp(min=least).where(m > 0, torch.inf).amin(dim=(2, 3), keepdim=True)
    nearness = (nearest / distance.clamp(min=least)).where(m > 0, 0.0)
    share = nearness / nearness.sum(dim=(2, 3), keepdim=True).clamp(min=least)
    weights = (m.sum(dim=(2, 3), keepdim=True) * share).clamp(1, _CEILING)
    return weights.where(m > 0, 1.0)


def _grid(size: tuple[int, int], places: int) -> tuple[int, int]:
    """Height and width of a layer with so many places, in a U-Net that halves `size` again and again, rounding up."""
    height, width = size
    while height * width > places:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != places:
        raise ValueError(f"a layer of {places} places in a U-Net for {size[0]}x{size[1]}, which halves its sides")
    return height, width


def _factors(reweight: Reweight, grid: tuple[int, int], attention: Tensor) -> Tensor:
    """(B, 1, places, L): the weights in the columns of the learnt tokens, 1 in the others."""
    if reweight.weights.shape[:2] != (len(attention), 1):
        raise ValueError(f"weights of shape {tuple(reweight.weights.shape)} for a batch of {len(attention)}")
    weights = F.adaptive_avg_pool2d(reweight.weights.to(attention), grid).flatten(2)[..., None]  # (B, 1, places, 1)
    columns = torch.zeros(attention.shape[-1], dtype=torch.bool, device=attention.device)
    columns[list(reweight.positions)] = True
    return weights.where(columns, 1.0)


def _check_plain(layer: Any) -> None:
    """Attentions of other kinds (of SDXL's relatives with added keys, of IP-adapters) compute something else."""
    kinds = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}
    name = type(layer.processor).__name__
    parts = (layer.group_norm, layer.spatial_norm, layer.norm_q, layer.norm_k, layer.added_kv_proj_dim)
    scaled = layer.scale_qk and layer.rescale_output_factor == 1 and not layer.residual_connection
    if name not in kinds or any(part is not None for part in parts) or not scaled:
        raise UserError(
            f"model.init_args.base: its U-Net has cross-attention of a kind ({name}) that cannot be recorded or "
            "re-weighted; take a plain UNet2DConditionModel as of Stable Diffusion 1.x or 2.x"
        )
