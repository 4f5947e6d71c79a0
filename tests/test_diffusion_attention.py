"""Attention of a tiny U-Net, layer by layer, against numpy on the layer's own queries, keys and values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from torch.nn import functional as F

from lit_defect.diffusion.attention import CrossAttention, Reweight
from lit_defect.errors import UserError

TOKENS, WIDTH, HEADS, LAYERS = 8, 12, 2, 7
POSITIONS = (2, 3, 5)
CLOSE = {"atol": 2e-4, "rtol": 1e-4}  # of outputs: layer after layer, sharp attention makes more of a rounding


def make_unet(**options: Any) -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": HEADS,
        "norm_num_groups": 4,
    }
    unet: Any = UNet2DConditionModel
    made = unet(**(settings | options)).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if ".attn2.to_" in name and parameter.ndim == 2:
            parameter.mul_(4)  # fresh layers attend to all tokens alike, which any error would too
    return made


@pytest.fixture
def unet() -> Any:
    return make_unet()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def inputs(height: int = 8, width: int = 8, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State, step and text states."""
    return torch.randn(batch, 4, height, width), torch.arange(batch) * 400 + 10, torch.randn(batch, TOKENS, WIDTH)


def layers_of(unet: Any) -> list[Any]:
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


@contextlib.contextmanager
def watching(unet: Any) -> Iterator[list[SimpleNamespace]]:
    """For each call of a layer: its query, key and value (B, heads, places or L, C / heads), and what its attention gave (B, heads, places, C / heads)."""
    calls: list[SimpleNamespace] = []
    hooks = []

    def heads(x: torch.Tensor) -> np.ndarray:
        return x.detach().double().numpy().reshape(len(x), x.shape[1], HEADS, -1).transpose(0, 2, 1, 3)

    for layer in layers_of(unet):
        found: dict[str, np.ndarray] = {}
        for name in ("to_q", "to_k", "to_v"):
            keep = lambda m, i, o, found=found, name=name: found.__setitem__(name, heads(o))  # noqa: E731
            hooks.append(getattr(layer, name).register_forward_hook(keep))

        def close(module: Any, given: tuple[torch.Tensor], found: dict[str, np.ndarray] = found) -> None:
            calls.append(SimpleNamespace(q=found["to_q"], k=found["to_k"], v=found["to_v"], out=heads(given[0])))

        hooks.append(layer.to_out[0].register_forward_pre_hook(close))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def logits_of(call: SimpleNamespace) -> np.ndarray:
    """(B, heads, places, L)"""
    return np.einsum("bhid,bhjd->bhij", call.q, call.k) / np.sqrt(call.q.shape[-1])


# --- nothing to do ---


def test_while_nothing_is_asked_the_unet_answers_as_ever_by_the_fast_path(unet, monkeypatch):
    given = inputs()
    before = unet(*given).sample
    CrossAttention(unet)
    calls = []
    fast = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(a[1].shape[2]) or fast(*a, **k))
    torch.testing.assert_close(unet(*given).sample, before, rtol=0, atol=0)
    assert calls.count(TOKENS) == len(layers_of(unet)) == LAYERS


def test_removing_gives_the_unet_back_as_it_was(unet):
    given = inputs()
    own, before = dict(unet.attn_processors), unet(*given).sample
    cross = CrossAttention(unet)
    changed = unet.attn_processors
    assert [name for name in own if changed[name] is not own[name]] == [name for name in own if "attn2" in name]
    cross.reweight = Reweight(torch.full((2, 1, 8, 8), 3.0), POSITIONS)
    assert (unet(*given).sample - before).abs().max() > 1e-3
    cross.remove()
    assert all(unet.attn_processors[name] is own[name] for name in own)
    assert not unet._forward_pre_hooks
    torch.testing.assert_close(unet(*given).sample, before, rtol=0, atol=0)


def test_no_weight_is_added_to_the_unet(unet):
    before = list(unet.state_dict())
    CrossAttention(unet)
    assert list(unet.state_dict()) == before


# --- recording ---


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (5, 12), (1, 6)])
def test_recorded_maps_are_the_softmax_of_each_layer(unet, size):
    given = inputs(*size)
    before = unet(*given).sample
    cross = CrossAttention(unet)
    with watching(unet) as calls, cross.recording(POSITIONS) as maps:
        output = unet(*given).sample
    torch.testing.assert_close(output, before, **CLOSE)
    half = tuple(-(-side // 2) for side in size)
    assert [tuple(m.shape[1:]) for m in maps] == [size, half, half, half, half, size, size]
    for found, call in zip(maps, calls, strict=True):
        attention = softmax(logits_of(call), axis=-1)
        expected = attention[..., list(POSITIONS)].sum(axis=-1).mean(axis=1).reshape(found.shape)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
        assert expected.std() > 1e-3  # there is something to see


def test_a_map_has_its_rows_and_columns_where_the_picture_has_them():
    """Only the text states differ between tokens, so a layer that reads the picture's brightness shows its shape."""
    unet = make_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
    )
    cross = CrossAttention(unet)
    x, t, states = inputs(6, 10, 1)
    with cross.recording((1,)) as maps:
        unet(x, t, states)
        changed = x.clone()
        changed[:, :, 0, 9] += 20
        unet(changed, t, states)
    # The group norms spread a little of it over the picture; most stays near.
    first = len(maps) // 2
    change = (maps[first] - maps[0])[0].abs()
    assert change.argmax() in (8, 9, 18, 19)


def test_all_tokens_together_have_all_of_the_attention(unet):
    cross = CrossAttention(unet)
    with cross.recording(range(TOKENS)) as maps:
        unet(*inputs())
    assert len(maps) == LAYERS
    for found in maps:
        np.testing.assert_allclose(found.numpy(), 1, atol=1e-5)


def test_a_recording_holds_every_call_until_it_is_closed(unet):
    cross = CrossAttention(unet)
    with cross.recording(POSITIONS) as maps:
        unet(*inputs())
        unet(*inputs())
    unet(*inputs())
    assert len(maps) == 2 * LAYERS
    with pytest.raises(KeyError), cross.recording(POSITIONS):
        raise KeyError
    assert cross.idle


def test_gradient_flows_from_the_maps_to_the_text_states(unet):
    x, t, states = inputs()
    states.requires_grad_(True)
    cross = CrossAttention(unet)
    with cross.recording(POSITIONS) as maps:
        unet(x, t, states)
    torch.stack([m.mean() for m in maps]).sum().backward()
    assert states.grad is not None
    assert (states.grad.abs().sum(dim=-1) > 0).all()


def test_recording_is_before_any_reweighting(unet):
    given, cross = inputs(), CrossAttention(unet)
    with cross.recording(POSITIONS) as plain:
        unet(*given)
    for mode in ("paper", "official"):
        cross.reweight = Reweight(torch.full((2, 1, 8, 8), 2.0), POSITIONS, mode)
        with cross.recording(POSITIONS) as maps:
            unet(*given)
        torch.testing.assert_close(maps[0], plain[0])  # what later layers see has changed


def test_words_that_the_text_mask_hides_are_not_attended_to(unet):
    x, t, states = inputs()
    visible = torch.ones(2, TOKENS)
    visible[0, 4:] = 0
    before = unet(x, t, states, encoder_attention_mask=visible).sample
    cross = CrossAttention(unet)
    with cross.recording(range(4, TOKENS)) as maps:
        output = unet(x, t, states, encoder_attention_mask=visible).sample
    torch.testing.assert_close(output, before, **CLOSE)
    assert all(m[0].abs().max() < 1e-6 < m[1].max() for m in maps)


def test_in_half_precision_the_open_path_is_as_exact_as_the_fast_one(unet):
    given = inputs()
    exact = unet(*given).sample
    half, given_half = make_unet().bfloat16(), [x.bfloat16() if x.is_floating_point() else x for x in given]
    fast = half(*given_half).sample
    cross = CrossAttention(half)
    with cross.recording(POSITIONS) as maps:
        slow = half(*given_half).sample
    assert slow.dtype == torch.bfloat16
    assert maps[0].dtype == torch.float32
    assert (slow - exact).std() < 1.5 * (fast - exact).std() < 0.2 * exact.std()


# --- re-weighting ---


def averaged(weights: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """(B, H, W) -> (B, h, w): the mean over the pixels that a place touches."""
    height, width = weights.shape[1:]
    out = np.empty((len(weights), *grid))
    for i in range(grid[0]):
        for j in range(grid[1]):
            rows = slice(i * height // grid[0], -(-(i + 1) * height // grid[0]))
            columns = slice(j * width // grid[1], -(-(j + 1) * width // grid[1]))
            out[:, i, j] = weights[:, rows, columns].mean(axis=(1, 2))
    return out


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize(("size", "weights_size"), [((8, 8), (8, 8)), ((8, 8), (32, 32)), ((9, 7), (9, 7))])
def test_reweighted_attention_is_the_formula_in_every_layer(unet, mode, size, weights_size):
    weights = torch.rand(2, 1, *weights_size) * 3
    cross = CrossAttention(unet)
    cross.reweight = Reweight(weights, POSITIONS, mode)
    with watching(unet) as calls:
        unet(*inputs(*size))
    assert len(calls) == LAYERS
    columns = np.isin(np.arange(TOKENS), POSITIONS)
    for call in calls:
        logits = logits_of(call)
        grid = size if logits.shape[2] == size[0] * size[1] else tuple(-(-side // 2) for side in size)
        w = averaged(weights.numpy()[:, 0], grid).reshape(2, 1, -1, 1)
        factor = np.where(columns, w, 1.0)
        attention = softmax(logits, axis=-1) * factor if mode == "paper" else softmax(logits * factor, axis=-1)
        np.testing.assert_allclose(call.out, attention @ call.v, atol=1e-5)


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_weights_of_one_change_nothing_also_for_a_part_of_the_batch(unet, mode):
    given = inputs()
    before = unet(*given).sample
    cross = CrossAttention(unet)
    weights = torch.ones(2, 1, 8, 8)
    cross.reweight = Reweight(weights, POSITIONS, mode)
    torch.testing.assert_close(unet(*given).sample, before, **CLOSE)
    weights[1] = 2  # the other half, without condition, stays
    changed = unet(*given).sample
    torch.testing.assert_close(changed[0], before[0], **CLOSE)
    assert (changed[1] - before[1]).abs().max() > 1e-3


def test_weights_for_another_batch_are_refused(unet):
    cross = CrossAttention(unet)
    for shape in ((1, 1, 8, 8), (2, 8, 8)):
        cross.reweight = Reweight(torch.ones(shape), POSITIONS)
        with pytest.raises(ValueError, match=r"weights of shape .* for a batch of 2"):
            unet(*inputs())


# --- adapters ---


@pytest.mark.parametrize("first", ["adapter", "attention"])
def test_adapters_act_in_both_paths_whichever_came_first(unet, first):
    from peft import LoraConfig

    def adapt(unet: Any) -> None:
        torch.manual_seed(3)
        parts = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=parts))

    given, plain = inputs(), make_unet()
    without = plain(*given).sample
    adapt(plain)
    expected = plain(*given).sample
    assert (expected - without).abs().max() > 1e-3
    if first == "adapter":
        adapt(unet)
    cross = CrossAttention(unet)
    if first == "attention":
        adapt(unet)
    torch.testing.assert_close(unet(*given).sample, expected, rtol=0, atol=0)
    with cross.recording(POSITIONS) as maps:
        torch.testing.assert_close(unet(*given).sample, expected, **CLOSE)
    assert len(maps) == LAYERS


# --- U-Nets that cannot be held ---


def test_unets_without_plain_cross_attention_are_refused(unet):
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    plain: Any = UNet2DModel
    with pytest.raises(UserError, match=r"model\.init_args\.base: its U-Net has no cross-attention"):
        CrossAttention(
            plain(
                block_out_channels=(8, 8),
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
                norm_num_groups=4,
            )
        )
    layers_of(unet)[-1].set_processor(CustomDiffusionAttnProcessor(False, False))
    with pytest.raises(UserError, match=r"cross-attention of a kind \(CustomDiffusionAttnProcessor\)"):
        CrossAttention(unet)
    assert not unet._forward_pre_hooks
    assert "_Processor" not in {type(layer.processor).__name__ for layer in layers_of(unet)}


def test_a_unet_that_rounds_down_is_told(unet):
    odd = make_unet(downsample_padding=0)
    cross = CrossAttention(odd)
    with cross.recording(POSITIONS), pytest.raises(ValueError, match=r"a layer of \d+ places in a U-Net for 9x7"):
        odd(*inputs(9, 7))


def test_maps_for_a_loss_and_gradient_checkpointing_exclude_each_other(unet):
    unet.enable_gradient_checkpointing()
    cross = CrossAttention(unet)
    with pytest.raises(UserError, match="under gradient checkpointing"), cross.recording(POSITIONS):
        pass
    with torch.no_grad(), cross.recording(POSITIONS) as maps:
        unet(*inputs())
    assert len(maps) == LAYERS
