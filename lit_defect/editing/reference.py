"""Reference only: a U-Net looks at another picture while it denoises (sd-webui-controlnet's `reference_adain+attn`).

    control = ReferenceOnly(pipe.unet, attention=True, adain=True, fidelity=0.5)
    with control.reading(latents, pipe.scheduler, generators):  # latents of one reference for each picture
        pipe(prompt, image=pictures, strength=0.75)

Nothing is trained and the pipeline is not changed. While `reading` is open, each call U(x, t, c) is made twice, with z
the reference's latents and e noise that is drawn anew:

    write   U(sqrt(a_t) z + sqrt(1 - a_t) e, t, c)      keeps r, what each self-attention is given, and the mean and
                                                        deviation (m_r, s_r) over the places of each block's output
    read    U(x, t, c), wherein
        attention   A(h, h)  becomes  A(h, [h; r])      queries h; keys and values of h and r together
        AdaIN       y        becomes  (y - m) / s s_r + m_r

Guidance has a half without condition, where fidelity f blends what was there with what it became: f A(h, h) +
(1 - f) A(h, [h; r]), and f y + (1 - f) AdaIN(y). So f = 1 has guidance lead towards the reference.

The reference is given in the form that a U-Net with the products a_t was trained on. All samplers of such a network
bring their states into that form before they call it (`scale_model_input`), so that it does not matter which one is
used.

Source: Mikubill/sd-webui-controlnet, scripts/hook.py. As there, t is rounded, and with Stable Diffusion XL f is cubed.
Other than there, both halves of guidance see the same noise: their difference is amplified, and should come from the
prompt only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lit_defect.editing.options import KEY
from lit_defect.errors import UserError

_EPS = 1e-6  # least variance of a block's output
_UP_LAYERS = 8  # of Stable Diffusion's nine outside its last level; of XL's six it is all

_open: WeakSet[nn.Module] = WeakSet()


class ReferenceOnly:
    """Has a U-Net look at references; see the top of the file.

    Args:
        unet: UNet2DConditionModel, such as that of Stable Diffusion 1.x, 2.x and XL.
        attention: whether self-attentions see the reference.
        adain: whether blocks take its statistics.
        fidelity: f; 0 is "my prompt is more important", 0.5 balanced, 1 "ControlNet is more important".
        weight: how much of the U-Net takes part, the innermost first. At 1 every self-attention and the inner half of
            the blocks; above 2 all.

    Raises:
        UserError: neither attention nor adain; not a U-Net, or one without self-attention.
    """

    def __init__(self, unet: Any, *, attention: bool, adain: bool, fidelity: float, weight: float = 1.0) -> None:
        from diffusers import UNet2DConditionModel

        self._unet = unet
        if not attention and not adain:
            raise UserError(
                f"{KEY}.reference_attention and {KEY}.reference_adain are both off: nothing of the reference would be "
                "seen; turn one of them on"
            )
        if not isinstance(unet, UNet2DConditionModel):
            raise UserError(
                "reference_only needs a model with a U-Net, such as Stable Diffusion 1.x, 2.x or XL; this one has a "
                f"{type(unet).__name__}"
            )
        is_xl = self._unet.config.addition_embed_type == "text_time"
        self._fidelity = fidelity**3 if is_xl else fidelity
        self._attentions = self_attentions(unet, weight) if attention else []
        self._layers = adain_layers(unet, weight) if adain else []
        if attention and not self._attentions:
            raise UserError(f"{KEY}.reference_attention: the model's U-Net has no self-attention; turn it off")

    @contextmanager
    def reading(self, latents: Tensor, scheduler: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
        """While it is open, the U-Net sees the references; then it is as it was, also after an error.

        Args:
            latents: (B, C, h', w') of the references without noise, in the U-Net's scale: one for each picture of the
                U-Net's batch, which is B, or 2B with guidance, [without condition; with]. h' and w' may differ from
                those of the pictures.
            scheduler: of the pipeline, for its a_t.
            generators: B, for the references' noise; not those of the pipeline, whose draws would change.

        Raises:
            UserError: a scheduler without a_t, such as one of flow matching.
            RuntimeError: this U-Net reads already.
            ValueError: from the U-Net's call, a batch or channels that the references do not fit.
        """
        products: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
        if products is None:
            raise UserError(
                f"{KEY}.sampler: reference_only needs one with a noise schedule as of Stable Diffusion; "
                f"{type(scheduler).__name__} has none"
            )
        if len(generators) != len(latents):
            raise ValueError(f"{len(generators)} generators for {len(latents)} references")
        if self._unet in _open:
            raise RuntimeError("this U-Net reads references already")
        call = _Call(latents, products, generators, self._fidelity)
        with ExitStack() as stack:
            _open.add(self._unet)
            stack.callback(_open.discard, self._unet)
            for attention in self._attentions:
                stack.callback(attention.set_processor, attention.processor)
                attention.set_processor(_Attention(call, attention.processor))
            hooks = [layer.register_forward_hook(_AdaIN(call)) for layer in self._layers]
            hooks.append(self._unet.register_forward_pre_hook(call.write, with_kwargs=True))
            for hook in hooks:
                stack.callback(hook.remove)
            yield


class _Call:
    """A call of the U-Net: whether it writes or reads, and what guidance leaves as it was.

    Attributes:
        writing: the reference goes through the U-Net, not the pictures.
        free: how many rows, the first ones, are without condition.
    """

    def __init__(
        self, latents: Tensor, products: Tensor, generators: Sequence[torch.Generator], fidelity: float
    ) -> None:
        self.latents, self.products, self.generators, self.fidelity = latents, products, generators, fidelity
        self.writing = False
        self.free = 0

    @torch.no_grad()
    def write(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of the U-Net: the same call with the reference in the pictures' place."""
        others = dict(kwargs)
        sample: Tensor = args[0] if args else others.pop("sample")  # (B or 2B, C, h, w)
        timestep = args[1] if len(args) > 1 else others["timestep"]
        halves, left = divmod(len(sample), len(self.latents))
        if halves not in (1, 2) or left or sample.shape[1] != self.latents.shape[1]:
            raise ValueError(f"references {tuple(self.latents.shape)} for a U-Net's batch of {tuple(sample.shape)}")
        self.free = len(self.latents) if halves == 2 else 0
        noisy = self._noised(timestep).to(sample).repeat(halves, 1, 1, 1)
        self.writing = True
        unet.forward(noisy, *args[1:], **others)
        self.writing = False

    def _noised(self, timestep: Any) -> Tensor:
        """(B, C, h', w') float32."""
        z = self.latents.float()
        shape = z.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in self.generators]).to(z.device)
        t = torch.as_tensor(timestep, device=z.device).float().round().long()
        product = self.products.to(z.device).float()[t.clamp(0, len(self.products) - 1)]
        return product.sqrt() * z + (1 - product).sqrt() * noise

    def blended(self, before: Tensor, after: Tensor) -> Tensor:
        """Rows without condition: f before + (1 - f) after.

        Args:
            before: (free, ...), these rows only.
            after: (B or 2B, ...).
        """
        return torch.cat([torch.lerp(after[: self.free], before, self.fidelity), after[self.free :]])


class _Attention:
    """A(h, [h; r]) in the place of A(h, h), by the layer's own processor."""

    def __init__(self, call: _Call, own: Any) -> None:
        self.call, self.own = call, own
        self.written = torch.empty(0)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, N, C) -> (B, N, C); the names are those of diffusers, whose pipelines give the first only."""
        h = hidden_states
        if self.call.writing:
            self.written = h  # (B, N', C)
            plain: Tensor = self.own(attn, h)
            return plain
        seen: Tensor = self.own(attn, h, torch.cat([h, self.written], dim=1))
        if self.call.free and self.call.fidelity > 0:
            seen = self.call.blended(self.own(attn, h[: self.call.free]), seen)
        return seen


class _AdaIN:
    """Hook behind a layer: mean and deviation of each channel become the reference's."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.written = (torch.empty(0), torch.empty(0))

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The output (B, C, h, w) is a tensor or, of transformers, the first of a tuple."""
        if isinstance(output, tuple):
            return (self._matched(output[0]), *output[1:])
        return self._matched(output)

    def _matched(self, output: Tensor) -> Tensor:
        y = output.float()
        variance, mean = torch.var_mean(y, dim=(2, 3), keepdim=True, correction=0)  # (B, C, 1, 1)
        deviation = variance.clamp(min=_EPS).sqrt()
        if self.call.writing:
            self.written = (mean, deviation)
            return output
        mean_of_reference, deviation_of_reference = self.written
        matched = (y - mean) / deviation * deviation_of_reference + mean_of_reference
        return self.call.blended(y[: self.call.free], matched).to(output.dtype)


def self_attentions(unet: Any, weight: float) -> list[Any]:
    """Those that see the reference: where i / n < weight, i of n from the widest, which are the innermost, on."""
    from diffusers.models.attention import BasicTransformerBlock

    parts = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    blocks: list[Any] = [
        module
        for part in parts
        if part is not None
        for module in part.modules()
        if isinstance(module, BasicTransformerBlock) and not module.only_cross_attention
    ]
    blocks.sort(key=lambda block: -block.dim)
    return [block.attn1 for i, block in enumerate(blocks) if i / len(blocks) < weight]


def adain_layers(unet: Any, weight: float) -> list[nn.Module]:
    """Those whose outputs take the reference's statistics.

    A layer is a residual block and the attention behind it. The first level and the last, which are the outermost, take
    no part; the middle always does. Others do where what they have is less than the weight: 2 (1 - i / n) on the way
    down, 2 i / n on the way up. A level's last layer on the way up includes its upsampling.
    """
    down = [layer for block in list(unet.down_blocks)[1:] for layer in _layers(block)]
    up = [layer for block in list(unet.up_blocks)[:-1] for layer in [*_layers(block)[:-1], block.upsamplers[-1]]]
    up = up[:_UP_LAYERS]
    thresholds = [(2 * (1 - i / len(down)), layer) for i, layer in enumerate(down)]
    thresholds += [] if unet.mid_block is None else [(0.0, unet.mid_block)]
    thresholds += [(2 * i / len(up), layer) for i, layer in enumerate(up)]
    return [layer for threshold, layer in thresholds if threshold < weight]


def _layers(block: Any) -> list[nn.Module]:
    """The last module of each layer of a level."""
    return list(getattr(block, "attentions", None) or block.resnets)
