"""Reference only: layers of a tiny U-Net against numpy, its places in Stable Diffusion's, and whole pipelines."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from lit_defect.editing.reference import ReferenceOnly, adain_layers, self_attentions
from lit_defect.errors import UserError
from tests.latent import WIDTH, sd_alpha_bar, tiny_pipeline, tiny_unet

TOKENS, STEP = 5, 400
ALL = 3.0  # a weight at which every layer takes part


@pytest.fixture
def unet() -> Any:
    return tiny_unet().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1)


def make_xl() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return (
        UNet2DConditionModel(
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 10,
        )
        .eval()
        .requires_grad_(False)
    )


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def call(unet: Any, x: torch.Tensor, states: torch.Tensor, **more: Any) -> torch.Tensor:
    return unet(x, torch.tensor(STEP), encoder_hidden_states=states, **more).sample


def guided(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """References (count), pictures' states (2 count) and text states (2 count)."""
    half = torch.randn(count, 4, 8, 8)
    return torch.randn(count, 4, 8, 8), torch.cat([half, half]), torch.randn(2 * count, TOKENS, WIDTH)


@contextmanager
def watched(module: Any) -> Iterator[list[SimpleNamespace]]:
    """Inputs and outputs of each call of a module: of the write pass, then of the read pass."""
    seen: list[SimpleNamespace] = []

    def see(layer: Any, args: tuple[Any, ...], output: Any) -> None:
        made = output[0] if isinstance(output, tuple) else output
        seen.append(SimpleNamespace(given=args[0].double().numpy(), made=made.double().numpy()))

    hook = module.register_forward_hook(see)
    yield seen
    hook.remove()


def attention_by_hand(layer: Any, queries: np.ndarray, states: np.ndarray) -> np.ndarray:
    """(N, C) and (M, C) -> (N, C)."""
    weight = {
        name: part.weight.double().numpy()
        for name, part in (("q", layer.to_q), ("k", layer.to_k), ("v", layer.to_v), ("out", layer.to_out[0]))
    }
    q, k, v = queries @ weight["q"].T, states @ weight["k"].T, states @ weight["v"].T
    size = q.shape[1] // layer.heads
    heads = [slice(i * size, (i + 1) * size) for i in range(layer.heads)]
    found = [softmax(q[:, h] @ k[:, h].T / np.sqrt(size), axis=1) @ v[:, h] for h in heads]
    return np.concatenate(found, axis=1) @ weight["out"].T + layer.to_out[0].bias.double().numpy()


@pytest.mark.parametrize(("kind", "fidelity", "share"), [("1.x", 0.25, 0.25), ("1.x", 0.0, 0.0), ("XL", 0.5, 0.125)])
def test_self_attention_sees_the_reference_beside_the_picture(kind: str, fidelity: float, share: float) -> None:
    unet = tiny_unet().eval().requires_grad_(False) if kind == "1.x" else make_xl()
    more = {"text_embeds": torch.randn(4, 10), "time_ids": torch.ones(4, 6)}
    reference, x, states = guided(2)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    for part in (layer.to_q, layer.to_k):
        part.weight.mul_(4)  # fresh layers attend to all places alike
    control = ReferenceOnly(unet, attention=True, adain=False, fidelity=fidelity)
    with watched(layer) as seen, control.reading(reference, scheduler(), seeded(1, 2)):
        call(unet, x, states, **({"added_cond_kwargs": more} if kind == "XL" else {}))

    written, read = seen
    for row in range(4):
        h, r = read.given[row], written.given[row]
        plain, wide = attention_by_hand(layer, h, h), attention_by_hand(layer, h, np.concatenate([h, r]))
        assert np.abs(wide - plain).max() > 1e-3
        expected = share * plain + (1 - share) * wide if row < 2 else wide
        np.testing.assert_allclose(read.made[row], expected, atol=1e-5)
        np.testing.assert_allclose(written.made[row], attention_by_hand(layer, r, r), atol=1e-5)


@pytest.mark.parametrize("place", ["transformer", "upsampler", "middle"])
def test_a_layer_takes_mean_and_deviation_of_the_reference(unet: Any, place: str) -> None:
    layer = {
        "transformer": unet.up_blocks[0].attentions[0],
        "upsampler": unet.up_blocks[0].upsamplers[0],
        "middle": unet.mid_block,
    }[place]
    reference, x, states = guided(2)
    control = ReferenceOnly(unet, attention=False, adain=True, fidelity=0.25, weight=ALL)
    with (
        watched(layer) as before,
        control.reading(reference, scheduler(), seeded(1, 2)),
        watched(layer) as after,
    ):
        call(unet, x, states)

    (written, y), (written_too, found) = [s.made for s in before], [s.made for s in after]
    np.testing.assert_array_equal(written_too, written)
    for row in range(4):
        for channel in range(y.shape[1]):
            here, there = y[row, channel], written[row, channel]
            adain = (here - here.mean()) / here.std() * there.std() + there.mean()
            expected = 0.25 * here + 0.75 * adain if row < 2 else adain
            np.testing.assert_allclose(found[row, channel], expected, rtol=1e-3, atol=1e-4)


def test_a_layer_without_variance_stays_finite(unet: Any) -> None:
    unet.up_blocks[0].upsamplers[0].conv.weight.zero_()
    reference, x, states = guided(1)
    control = ReferenceOnly(unet, attention=False, adain=True, fidelity=0, weight=ALL)
    with control.reading(reference, scheduler(), seeded(1)):
        assert call(unet, x, states).isfinite().all()


@pytest.mark.parametrize(("attention", "adain"), [(True, False), (False, True), (True, True)])
def test_fidelity_says_how_much_of_the_reference_the_half_without_condition_has(
    unet: Any, attention: bool, adain: bool
) -> None:
    reference, x, states = guided(2)
    plain = call(unet, x, states)
    answers = {}
    for fidelity in (0.0, 0.5, 1.0):
        control = ReferenceOnly(unet, attention=attention, adain=adain, fidelity=fidelity)
        with control.reading(reference, scheduler(), seeded(1, 2)):
            answers[fidelity] = call(unet, x, states)

    torch.testing.assert_close(answers[1.0][:2], plain[:2], atol=1e-6, rtol=1e-6)
    changes = [(answers[f][:2] - plain[:2]).abs().max() for f in (0.0, 0.5)]
    assert changes[0] > changes[1] > 1e-4
    for fidelity in (0.0, 0.5):  # of no effect on the other half
        torch.testing.assert_close(answers[fidelity][2:], answers[1.0][2:], atol=1e-6, rtol=1e-6)
    assert (answers[1.0][2:] - plain[2:]).abs().max() > 1e-4


def test_without_guidance_all_rows_have_the_reference_whatever_the_fidelity(unet: Any) -> None:
    reference, x, states = guided(2)
    answers = []
    for fidelity in (0.0, 1.0):
        control = ReferenceOnly(unet, attention=True, adain=True, fidelity=fidelity)
        with control.reading(reference, scheduler(), seeded(1, 2)):
            answers.append(call(unet, x[2:], states[2:]))
        with control.reading(reference, scheduler(), seeded(1, 2)):
            with_guidance = call(unet, x, states)[2:]
        torch.testing.assert_close(answers[-1], with_guidance, atol=1e-6, rtol=1e-6)
    assert torch.equal(*answers)


def test_a_picture_that_is_its_own_reference_stays_as_it_is(unet: Any) -> None:
    reference, _, states = guided(1)
    product = sd_alpha_bar()[STEP]
    noise = torch.randn(1, 4, 8, 8, generator=seeded(7)[0])
    x = (product**0.5 * reference + (1 - product) ** 0.5 * noise).float().repeat(2, 1, 1, 1)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=0, weight=ALL)
    with control.reading(reference, scheduler(), seeded(7)):
        answer = call(unet, x, states)
    torch.testing.assert_close(answer, call(unet, x, states), atol=1e-5, rtol=1e-5)


def test_each_call_draws_new_noise_and_both_halves_have_the_same(unet: Any) -> None:
    reference, x, states = guided(2)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=1)
    with watched(unet.conv_in) as seen, control.reading(reference, scheduler(), seeded(1, 2)):
        call(unet, x, states)
        call(unet, x, states)
    first, second = seen[0].given, seen[2].given
    np.testing.assert_array_equal(first[:2], first[2:])
    assert np.abs(first - second).max() > 0.1
    again = torch.stack([torch.randn(2, 4, 8, 8, generator=g)[1] for g in seeded(1, 2)])
    product = sd_alpha_bar()[STEP]
    np.testing.assert_allclose(second[:2], product**0.5 * reference + (1 - product) ** 0.5 * again, atol=1e-5)


def test_the_reference_is_seen_with_the_prompts_of_the_pictures(unet: Any) -> None:
    reference, x, states = guided(2)
    with (
        watched(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k) as seen,
        ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5).reading(reference, scheduler(), seeded(1, 2)),
    ):
        call(unet, x, states)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0].given, states.numpy())


def test_a_picture_is_the_same_alone_and_among_others(unet: Any) -> None:
    reference, x, states = guided(3)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5)
    with control.reading(reference, scheduler(), seeded(1, 2, 3)):
        together = call(unet, x, states)
    rows = [1, 4]
    with control.reading(reference[1:2], scheduler(), seeded(2)):
        alone = call(unet, x[rows], states[rows])
    torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=1e-5)
    with control.reading(reference[:1], scheduler(), seeded(2)):
        other = call(unet, x[rows], states[rows])
    assert (other - alone).abs().max() > 1e-4


def test_the_reference_may_be_of_another_size(unet: Any) -> None:
    _, x, states = guided(2)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5)
    with control.reading(torch.randn(2, 4, 12, 6), scheduler(), seeded(1, 2)):
        assert call(unet, x, states).shape == x.shape


def state_of(unet: Any) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()]
    return [[m.processor for m in unet.modules() if hasattr(m, "processor")], hooks, "forward" in vars(unet)]


def test_the_unet_is_as_it_was_afterwards(unet: Any) -> None:
    before = state_of(unet)
    reference, x, states = guided(2)
    plain = call(unet, x, states)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5)
    with control.reading(reference, scheduler(), seeded(1, 2)):
        assert not torch.equal(call(unet, x, states), plain)
    assert state_of(unet) == before
    assert torch.equal(call(unet, x, states), plain)


@pytest.mark.parametrize("place", ["in the write pass", "in the read pass", "around"])
def test_the_unet_is_as_it_was_after_an_error(unet: Any, place: str) -> None:
    before = state_of(unet)
    reference, x, states = guided(2)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5)
    calls = {"in the write pass": 1, "in the read pass": 2, "around": 3}[place]

    def fail(layer: Any, args: Any) -> None:
        nonlocal calls
        calls -= 1
        if not calls:
            raise FloatingPointError(place)

    def run() -> None:
        with control.reading(reference, scheduler(), seeded(1, 2)):
            call(unet, x, states)
            raise FloatingPointError("around")

    with unet.conv_out.register_forward_pre_hook(fail), pytest.raises(FloatingPointError, match=place):
        run()
    assert state_of(unet) == before
    with control.reading(reference, scheduler(), seeded(1, 2)):  # once more
        found = call(unet, x, states)
    with control.reading(reference, scheduler(), seeded(1, 2)):
        assert torch.equal(call(unet, x, states), found)


def test_reading_twice_at_once_is_refused(unet: Any) -> None:
    reference, x, states = guided(2)
    inner, outer = (ReferenceOnly(unet, attention=False, adain=True, fidelity=0.5) for _ in range(2))
    with outer.reading(reference, scheduler(), seeded(1, 2)):
        expected = call(unet, x, states)
    with outer.reading(reference, scheduler(), seeded(1, 2)):
        with (
            pytest.raises(RuntimeError, match="reads references already"),
            inner.reading(reference, scheduler(), seeded(1, 2)),
        ):
            pass
        assert torch.equal(call(unet, x, states), expected)  # the outer one goes on
    with inner.reading(reference, scheduler(), seeded(1, 2)):
        pass


def test_what_cannot_be_done_is_refused(unet: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    with pytest.raises(UserError, match=r"edit\.reference_attention and .*reference_adain are both off"):
        ReferenceOnly(unet, attention=False, adain=False, fidelity=0.5)
    with pytest.raises(UserError, match=r"needs a model with a U-Net.*Linear"):
        ReferenceOnly(torch.nn.Linear(2, 2), attention=True, adain=True, fidelity=0.5)
    control = ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5)
    reference, x, states = guided(2)
    with (
        pytest.raises(UserError, match=r"edit\.sampler.*FlowMatchEulerDiscreteScheduler has none"),
        control.reading(reference, FlowMatchEulerDiscreteScheduler(), seeded(1, 2)),
    ):
        pass
    with pytest.raises(ValueError, match="1 generators for 2"), control.reading(reference, scheduler(), seeded(1)):
        pass
    for misfit in (reference[:1].repeat(3, 1, 1, 1), reference[:, :3]):
        with (
            pytest.raises(ValueError, match=r"references .* for a U-Net's batch of \(4, 4, 8, 8\)"),
            control.reading(misfit, scheduler(), seeded(*range(len(misfit)))),
        ):
            call(unet, x, states)


def test_only_cross_attention_is_left_alone() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
        only_cross_attention=True,
    )
    with pytest.raises(UserError, match="no self-attention"):
        ReferenceOnly(unet, attention=True, adain=True, fidelity=0.5)
    reference, x, states = guided(1)
    control = ReferenceOnly(unet, attention=False, adain=True, fidelity=0.5, weight=ALL)
    with control.reading(reference, scheduler(), seeded(1)):
        call(unet, x, states)


@functools.cache
def stable_diffusion(kind: str) -> Any:
    """Without weights."""
    from diffusers import UNet2DConditionModel

    cross = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
    options: dict[str, Any] = {
        "1.5": {},
        "XL": {
            "down_block_types": ("DownBlock2D", cross[0], cross[0]),
            "up_block_types": (cross[1], cross[1], "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": [1, 2, 10],
        },
    }
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=8, **options[kind])


def names(unet: Any, chosen: Sequence[Any]) -> list[str]:
    return [next(name for name, module in unet.named_modules() if module is one) for one in chosen]


# hook.py numbers the original's blocks: input 4 5 7 8 10 11 are the two layers of the second to fourth level; output
# 0 to 7 the three layers of each level, of which the last has the upsampling. It gives them 2 (1 - i/6) and 2 i/8.
DOWN = ("down_blocks.1.attentions.0", "down_blocks.1.attentions.1", "down_blocks.2.attentions.0")
DOWN += ("down_blocks.2.attentions.1", "down_blocks.3.resnets.0", "down_blocks.3.resnets.1")
UP = ("up_blocks.0.resnets.0", "up_blocks.0.resnets.1", "up_blocks.0.upsamplers.0", "up_blocks.1.attentions.0")
UP += ("up_blocks.1.attentions.1", "up_blocks.1.upsamplers.0", "up_blocks.2.attentions.0", "up_blocks.2.attentions.1")


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (0.1, ["mid_block", UP[0]]),
        (1.0, [*DOWN[4:], "mid_block", *UP[:4]]),
        (1.01, [*DOWN[3:], "mid_block", *UP[:5]]),
        (2.0, [*DOWN[1:], "mid_block", *UP]),
        (ALL, [*DOWN, "mid_block", *UP]),
    ],
)
def test_statistics_are_taken_by_the_layers_of_the_original(weight: float, expected: list[str]) -> None:
    unet = stable_diffusion("1.5")
    assert names(unet, adain_layers(unet, weight)) == expected


# input 4 5 7 8 of XL with 2 (1 - i/4), output 0 to 5 with 2 i/6
@pytest.mark.parametrize(("weight", "down", "up"), [(1.0, 1, 3), (1.01, 2, 4), (ALL, 4, 6)])
def test_statistics_are_taken_by_the_layers_of_the_original_of_xl(weight: float, down: int, up: int) -> None:
    unet = stable_diffusion("XL")
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in (0, 1)][4 - down :]
    blocks += ["mid_block"]
    blocks += [f"up_blocks.{i}.{j}" for i in (0, 1) for j in ("attentions.0", "attentions.1", "upsamplers.0")][:up]
    assert names(unet, adain_layers(unet, weight)) == blocks


def test_attentions_of_the_widest_levels_come_first() -> None:
    unet = stable_diffusion("1.5")
    assert len(self_attentions(unet, 1.0)) == 16
    some = names(unet, self_attentions(unet, 0.5))
    assert [name.split(".attentions")[0] for name in some] == 2 * ["down_blocks.2"] + ["mid_block"] + 3 * [
        "up_blocks.1"
    ] + 2 * ["down_blocks.1"]
    assert all(name.endswith("transformer_blocks.0.attn1") for name in some)


def open_pipe(folder: Path, sampler: str) -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
        tiny_pipeline(folder / "pipeline"), safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"DPMSolverMultistep": {"use_karras_sigmas": True, "final_sigmas_type": "zero"}}
    kind = getattr(diffusers, f"{sampler}Scheduler")
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options.get(sampler, {}))
    return pipe


def edited(pipe: Any, latents: torch.Tensor, strength: float = 0.5, steps: int = 8, guidance: float = 5.0) -> Any:
    return pipe(
        ["a metal nut"] * len(latents),
        image=latents,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=seeded(*range(len(latents))),
        output_type="latent",
    ).images


SAMPLERS = ["EulerAncestralDiscrete", "DPMSolverMultistep", "HeunDiscrete", "DDIM", "UniPCMultistep"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_within_a_pipeline_the_reference_has_the_noise_of_the_picture(tmp_path: Path, sampler: str) -> None:
    """With the picture as its own reference and the pipeline's own noise, U-Net and reference see the same."""
    pipe = open_pipe(tmp_path, sampler)
    latents = torch.randn(2, 4, 8, 8)
    control = ReferenceOnly(pipe.unet, attention=True, adain=True, fidelity=0.5)
    with watched(pipe.unet.conv_in) as seen, control.reading(latents, pipe.scheduler, seeded(0, 1)):
        edited(pipe, latents)
    np.testing.assert_allclose(seen[0].given, seen[1].given, atol=0.02)  # Karras' sigmas lie between steps
    assert np.abs(seen[2].given - seen[3].given).max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS[:2])
def test_a_pipeline_edits_with_references(tmp_path: Path, sampler: str, guidance: float) -> None:
    pipe = open_pipe(tmp_path, sampler)
    latents, reference = torch.randn(2, 2, 4, 8, 8)
    plain = edited(pipe, latents, guidance=guidance)
    control = ReferenceOnly(pipe.unet, attention=True, adain=True, fidelity=0.5)
    found = []
    for slicing in (False, True):
        if slicing:
            pipe.enable_attention_slicing(1)
        with control.reading(reference, pipe.scheduler, seeded(5, 6)):
            found.append(edited(pipe, latents, guidance=guidance))
    assert (found[0] - plain).abs().max() > 1e-3
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    pipe.disable_attention_slicing()
    torch.testing.assert_close(edited(pipe, latents, guidance=guidance), plain, atol=1e-4, rtol=1e-4)
