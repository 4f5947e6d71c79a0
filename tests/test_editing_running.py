"""What comes out of a pipeline: the same as diffusers gives by itself, held outside the mask, whole in half precision."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image

from lit_defect.editing import running
from lit_defect.editing.content import fill
from lit_defect.editing.options import Edit, Network
from lit_defect.editing.pipelines import open_pipeline
from lit_defect.editing.running import Request, check_steps, run, unheeded_negative
from lit_defect.editing.samplers import make_scheduler
from lit_defect.errors import UserError
from tests.latent import tiny_unet
from tests.pipelines import FACTOR, tiny_flux, tiny_ip_adapter, tiny_sd, tiny_sd3, tiny_unclip, tiny_variation, tiny_xl

SIZE = (40, 56)  # odd numbers of places on every level
EDIT = Edit(steps=5, sampler="DPM++ 2M Karras")
KINDS = {
    "img2img": ("img2img", lambda folder: tiny_sd(folder)),
    "img2img of XL": ("img2img", tiny_xl),
    "img2img of 3": ("img2img", tiny_sd3),
    "img2img of Flux": ("img2img", tiny_flux),
    "inpaint": ("inpaint", lambda folder: tiny_sd(folder)),
    "inpaint, 9 channels": ("inpaint", lambda folder: tiny_sd(folder, extra_channels=5)),
    "inpaint of XL": ("inpaint", tiny_xl),
    "inpaint of XL, 9 channels": ("inpaint", lambda folder: tiny_xl(folder, extra_channels=5)),
    "inpaint of 3": ("inpaint", tiny_sd3),
    "inpaint of 3 without T5": ("inpaint", lambda folder: tiny_sd3(folder, t5=False)),
    "inpaint of Flux": ("inpaint", tiny_flux),
    "inpaint of Flux Fill": ("inpaint", lambda folder: tiny_flux(folder, fill=True)),
    "instruct": ("instruct_pix2pix", lambda folder: tiny_sd(folder, extra_channels=4)),
    "instruct of XL": ("instruct_pix2pix", lambda folder: tiny_xl(folder, extra_channels=4)),
    "variation": ("variation", tiny_variation),
    "variation of unCLIP": ("variation", tiny_unclip),
    "reference_only": ("reference_only", lambda folder: tiny_sd(folder)),
    "ip_adapter": ("ip_adapter", lambda folder: tiny_sd(folder)),
}


def opened(tmp_path, kind="img2img", **network):
    mode, make = KINDS[kind]
    if mode == "ip_adapter":
        network["ip_adapter"] = tiny_ip_adapter(tmp_path / "ip", tiny_unet())
    return open_pipeline(str(make(tmp_path / "base")), mode, Network(**network), "cpu")


def picture(seed=0, size=SIZE):
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed))


def mask(top=8, left=16, height=16, width=24, size=SIZE):
    values = torch.zeros(1, *size)
    values[:, top : top + height, left : left + width] = 1
    return values


def request(number=0, **changes):
    given = {"picture": picture(number), "prompt": "hole in a nut", "strength": 0.6, "words": (7, number)}
    return Request(**{**given, **changes})


def flows(kind):
    """Whether it is a transformer that matches flows."""
    return "Flux" in kind or "of 3" in kind


def fitting(kind, number=0, **changes):
    """A request that the kind can do."""
    mode = KINDS[kind][0]
    size = (48, 64) if flows(kind) else SIZE
    given = {"picture": picture(number, size)}
    if mode == "inpaint":
        given["mask"] = mask(size=size)
    if mode in ("reference_only", "ip_adapter"):
        given["reference"] = picture(100 + number)
    return request(number, **{**given, **changes})


def edit_of(kind, **changes):
    sampler = "default" if flows(kind) else EDIT.sampler
    return Edit(**{"steps": EDIT.steps, "sampler": sampler, **changes})


def generator(words=(7, 0)):
    """What a request with these words is drawn from."""
    return running._generator(Request(picture(), words=words), 0)


def by_hand(pipe, sampler=EDIT.sampler, **arguments):
    """What the pipeline gives by itself."""
    schedule = pipe.scheduler.config
    pipe.scheduler = make_scheduler(sampler, schedule)
    given = {"num_inference_steps": EDIT.steps, "guidance_scale": EDIT.guidance, "output_type": "pt", **arguments}
    return pipe(**given).images.float()


# --- every kind ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_and_a_picture_does_not_depend_on_its_batch(tmp_path, kind):
    pipeline = opened(tmp_path, kind)
    requests = [fitting(kind, number) for number in range(3)]
    whole = run(pipeline, requests, edit_of(kind))
    assert whole.pictures.shape == (3, *requests[0].picture.shape)
    assert whole.pictures.dtype == torch.float32
    assert not any(whole.retried)
    assert 0 <= whole.pictures.min() < whole.pictures.max() <= 1
    assert len({one.numpy().tobytes() for one in whole.pictures}) == 3
    alone = run(pipeline, [requests[2]], edit_of(kind))
    torch.testing.assert_close(alone.pictures[0], whole.pictures[2], atol=1e-4, rtol=0)
    assert torch.equal(run(pipeline, requests, edit_of(kind)).pictures, whole.pictures)


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM", "Heun", "UniPC", "LCM", "DPM++ 2M SDE Karras", "DPM++ SDE"])
def test_noise_within_the_steps_is_each_requests_own(tmp_path, sampler):
    if sampler == "DPM++ SDE":
        pytest.importorskip("torchsde")
    pipeline = opened(tmp_path)
    requests = [request(number, picture=picture(), words=(7, number)) for number in range(2)]
    together = run(pipeline, requests, Edit(steps=5, sampler=sampler)).pictures
    assert not torch.equal(together[0], together[1])
    alone = run(pipeline, requests[1:], Edit(steps=5, sampler=sampler)).pictures
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=0)


def test_strengths_are_told_apart_and_results_stay_in_order(tmp_path):
    pipeline = opened(tmp_path)
    requests = [request(0, strength=0.6), request(1, strength=0.2), request(2, strength=0.6)]
    together = run(pipeline, requests, EDIT).pictures
    for number, one in enumerate(requests):
        torch.testing.assert_close(run(pipeline, [one], EDIT).pictures[0], together[number], atol=1e-4, rtol=0)
    assert not torch.allclose(run(pipeline, [request(1)], EDIT).pictures[0], together[1], atol=1e-2)


def test_the_default_sampler_is_the_pipelines_own_after_another_was_used(tmp_path):
    pipeline = opened(tmp_path)
    first = run(pipeline, [request()], Edit(steps=5, sampler="default")).pictures
    run(pipeline, [request()], Edit(steps=5, sampler="Euler a"))
    assert type(pipeline.pipe.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert torch.equal(run(pipeline, [request()], Edit(steps=5, sampler="default")).pictures, first)


def test_no_more_than_a_batch_goes_through_together(tmp_path, monkeypatch):
    pipeline = opened(tmp_path)
    seen = []
    forward = pipeline.pipe.unet.forward
    monkeypatch.setattr(pipeline.pipe.unet, "forward", lambda x, *a, **k: (seen.append(len(x)), forward(x, *a, **k))[1])
    requests = [request(number) for number in range(5)]
    made = run(pipeline, requests, Edit(steps=5, batch=2, guidance=1.0))
    assert sorted(set(seen)) == [1, 2]
    alone = run(pipeline, [requests[3]], Edit(steps=5, guidance=1.0))
    torch.testing.assert_close(alone.pictures[0], made.pictures[3], atol=1e-4, rtol=0)


def test_too_little_memory_names_what_to_lower(tmp_path, monkeypatch):
    pipeline = opened(tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipeline.pipe.unet, "forward", full)
    with pytest.raises(UserError, match=r"2 pictures of 40 x 56: .*edit.batch .*edit.size .*network.offload"):
        run(pipeline, [request(0), request(1)], EDIT)


@pytest.mark.parametrize(
    ("kind", "edit", "told"),
    [
        ("img2img", {"sampler": "LCM", "steps": 60}, r"edit.steps = 60: LCMScheduler cannot"),
        ("instruct", {"sampler": "DDIM", "steps": 1200}, r"edit.steps = 1200: DDIMScheduler cannot"),
        ("img2img", {"steps_convention": "diffusers"}, r"edit.strength = 0.05 leaves none of 5 steps"),
        ("img2img of Flux", {"sampler": "default", "steps_convention": "diffusers"}, "leaves none of 5 steps"),
        ("img2img of Flux", {}, "set it to default"),
    ],
)
def test_steps_that_cannot_be_done_are_refused_at_once(tmp_path, kind, edit, told):
    with pytest.raises(UserError, match=told):
        check_steps(opened(tmp_path, kind), Edit(**{"steps": 5, **edit}), [0.6, 0.05])


def test_a_base_whose_own_sampler_cannot_start_in_the_middle(tmp_path):
    pipeline, own = opened(tmp_path), Edit(sampler="default", steps=5)
    pipeline.schedule = {**PNDMScheduler(skip_prk_steps=True).config, "_class_name": "PNDMScheduler"}
    with pytest.raises(UserError, match=r"sampler = default: .*PNDMScheduler leaves noise .*; set it to DDIM"):
        check_steps(pipeline, own, [0.6])
    check_steps(pipeline, own, [1.0])
    check_steps(pipeline, Edit(sampler="DDIM", steps=5), [0.6])
    pipeline.mode = "variation"  # begins with noise
    check_steps(pipeline, own, [0.6])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_can_be_done_are_let_through(tmp_path, kind):
    check_steps(opened(tmp_path, kind), edit_of(kind), [0.2, 0.6, 1.0])


# --- the same as diffusers ---


def test_img2img_is_that_of_diffusers(tmp_path):
    pipeline = opened(tmp_path)
    made = run(pipeline, [request()], EDIT).pictures
    expected = by_hand(
        pipeline.pipe, prompt="hole in a nut", image=picture()[None], strength=0.8, generator=[generator()]
    )  # 0.6 of 5 steps are 3 and one more
    assert torch.equal(made, expected)


@pytest.mark.parametrize("kind", ["img2img of 3", "inpaint of 3", "img2img of Flux", "inpaint of Flux"])
def test_flow_matching_is_that_of_diffusers(tmp_path, kind):
    pipeline, asked = opened(tmp_path, kind), fitting(kind)
    made = run(pipeline, [asked], edit_of(kind)).pictures
    height, width = asked.picture.shape[1:]
    masked = {"mask_image": asked.mask[None]} if asked.mask is not None else {}
    if kind == "inpaint of 3":  # which leaves the autoencoder's shift out where it decodes itself
        masked["output_type"] = "latent"
    expected = by_hand(
        pipeline.pipe, "default", prompt="hole in a nut", image=asked.picture[None], strength=0.8,
        generator=[generator()], height=height, width=width, **masked,
    )  # fmt: skip
    if kind == "inpaint of 3":
        vae = pipeline.pipe.vae
        with torch.no_grad():
            expected = vae.decode(expected / vae.config.scaling_factor + vae.config.shift_factor).sample
        expected = (expected / 2 + 0.5).clamp(0, 1)
    assert torch.equal(made, expected)


def test_inpainting_with_9_channels_is_that_of_diffusers(tmp_path):
    pipeline = opened(tmp_path, "inpaint, 9 channels")
    made = run(pipeline, [request(mask=mask())], EDIT).pictures
    expected = by_hand(
        pipeline.pipe, prompt="hole in a nut", image=picture()[None], mask_image=mask()[None], strength=0.8,
        generator=[generator()], height=SIZE[0], width=SIZE[1],
    )  # fmt: skip
    assert torch.equal(made, expected)


@pytest.mark.parametrize("kind", ["inpaint", "inpaint of XL"])
def test_inpainting_with_4_channels_is_that_of_diffusers_on_the_latents(tmp_path, kind):
    pipeline = opened(tmp_path, kind)
    made = run(pipeline, [request(mask=mask())], EDIT).pictures
    latents = pipeline.encode(picture()[None])
    expected = by_hand(
        pipeline.pipe, prompt="hole in a nut", image=latents, masked_image_latents=latents, mask_image=mask()[None],
        strength=0.8, generator=[generator()], height=SIZE[0], width=SIZE[1],
    )  # fmt: skip
    assert torch.equal(made, expected)


def test_instruct_pix2pix_is_that_of_diffusers(tmp_path):
    pipeline = opened(tmp_path, "instruct")
    made = run(pipeline, [request()], EDIT).pictures
    expected = by_hand(pipeline.pipe, prompt="hole in a nut", image=picture()[None], generator=[generator()])
    assert torch.equal(made, expected)


@pytest.mark.parametrize("kind", ["variation", "variation of unCLIP"])
def test_variations_are_those_of_diffusers(tmp_path, kind):
    pipeline = opened(tmp_path, kind)
    made = run(pipeline, [request(prompt="nut")], edit_of(kind, noise_level=3)).pictures
    told = {"prompt": ["nut"], "noise_level": 3} if "unCLIP" in kind else {}
    image = Image.fromarray((picture() * 255).round().byte().permute(1, 2, 0).numpy())
    expected = by_hand(
        pipeline.pipe, image=[image], generator=[generator()], height=SIZE[0], width=SIZE[1], **told
    )  # fmt: skip
    assert torch.equal(made, expected)


def test_negative_prompts_count_and_may_be_missing_for_some(tmp_path):
    pipeline = opened(tmp_path, "img2img of XL")
    requests = [request(0), request(1, negative_prompt="wood"), request(1)]
    together = run(pipeline, requests, EDIT).pictures
    assert not torch.allclose(together[1], together[2], atol=1e-3)
    for number, one in enumerate(requests):
        torch.testing.assert_close(run(pipeline, [one], EDIT).pictures[0], together[number], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "edit", "told"),
    [
        ("img2img", {"guidance": 1.0}, "of no effect with model.init_args.edit.guidance = 1.0; take more than 1"),
        ("img2img of Flux", {}, "of no effect: FluxImg2ImgPipeline is guided without one"),
        ("inpaint of Flux Fill", {}, "of no effect: FluxFillPipeline is guided without one"),
        ("variation", {}, "of no effect: StableDiffusionImageVariationPipeline is guided without one"),
        ("img2img", {}, None),
        ("img2img of 3", {}, None),
    ],
)
def test_a_negative_prompt_without_effect_is_told(tmp_path, kind, edit, told):
    pipeline, edit = opened(tmp_path, kind), edit_of(kind, negative_prompt="wood", **edit)
    found = unheeded_negative(pipeline, edit)
    assert found == (told and f"model.init_args.edit.negative_prompt is {told}")
    assert unheeded_negative(pipeline, edit_of(kind)) is None
    made = [run(pipeline, [fitting(kind, negative_prompt=words)], edit).pictures for words in ("", "wood")]
    assert torch.equal(*made) == (told is not None)


def test_no_guidance_by_the_picture_would_be_none_by_the_prompt(tmp_path):
    """Why less than 1 is refused: diffusers then leaves out both."""
    pipeline = opened(tmp_path, "instruct")
    given = {"prompt": "hole in a nut", "image": picture()[None], "image_guidance_scale": 0.9}
    plain, guided = (by_hand(pipeline.pipe, generator=[generator()], guidance_scale=g, **given) for g in (1.0, 9.0))
    assert torch.equal(plain, guided)
    with pytest.raises(UserError, match=r"edit.image_guidance = 0.9: expected 1 or more"):
        Edit(image_guidance=0.9)


@pytest.mark.parametrize("guidance", [1.0, 7.0])
def test_an_ip_adapter_shows_each_picture_its_own_reference(tmp_path, guidance):
    pipeline = opened(tmp_path, "ip_adapter")
    requests = [request(number, reference=picture(100 + number)) for number in range(2)]
    made = run(pipeline, requests, edit_of("ip_adapter", guidance=guidance)).pictures
    for number in range(2):
        image = Image.fromarray((picture(100 + number) * 255).round().byte().permute(1, 2, 0).numpy())
        expected = by_hand(
            pipeline.pipe, prompt="hole in a nut", image=picture(number)[None], strength=0.8, guidance_scale=guidance,
            generator=[generator((7, number))], ip_adapter_image=image,
        )  # fmt: skip
        torch.testing.assert_close(made[number], expected[0], atol=1e-4, rtol=0)


def test_a_reference_is_looked_at_and_the_network_left_as_it_was(tmp_path):
    pipeline = opened(tmp_path, "reference_only")
    processors = {name: type(one) for name, one in pipeline.pipe.unet.attn_processors.items()}
    made = [run(pipeline, [request(reference=picture(seed))], EDIT).pictures for seed in (50, 51)]
    assert not torch.allclose(made[0], made[1], atol=1e-3)
    assert {name: type(one) for name, one in pipeline.pipe.unet.attn_processors.items()} == processors


# --- masks ---


@pytest.mark.parametrize("sampler", ["DPM++ 2M Karras", "Euler a", "DDIM", "Heun", "LCM", "UniPC"])
@pytest.mark.parametrize("strength", [0.6, 0.79, 0.95])
def test_img2img_with_a_mask_is_inpainting_by_the_same_network(tmp_path, sampler, strength):
    """Diffusers' own blending is the reference for ours; from 0.8 on all 5 steps are done, from the source still."""
    edit = Edit(steps=5, sampler=sampler, content="latent_noise")
    asked = request(mask=mask(), strength=strength)
    made = run(opened(tmp_path), [asked], edit).pictures
    held = run(opened(tmp_path, "inpaint"), [asked], edit).pictures
    assert torch.equal(made, held)


@pytest.mark.parametrize("kind", ["img2img", "instruct", "instruct of XL", "variation", "variation of unCLIP", "reference_only", "ip_adapter", "inpaint"])  # fmt: skip
def test_places_outside_the_mask_are_the_sources(tmp_path, kind):
    pipeline = opened(tmp_path, kind)
    asked = fitting(kind, mask=mask())
    seen = []
    decode = pipeline.pipe.vae.decode
    pipeline.pipe.vae.decode = lambda latents, *a, **k: (seen.append(latents), decode(latents, *a, **k))[1]
    run(pipeline, [asked], edit_of(kind))
    source = pipeline.encode(asked.picture[None])
    outside = mask()[:, ::FACTOR, ::FACTOR] == 0
    made = seen[0] * pipeline.pipe.vae.config.scaling_factor
    inside = ~outside.expand_as(made[0])
    torch.testing.assert_close(made[0][~inside], source[0][~inside], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made[0][inside], source[0][inside], atol=1e-2)


@pytest.mark.parametrize("kind", ["inpaint of 3", "inpaint of 3 without T5", "inpaint of Flux"])
def test_flow_matching_holds_what_is_outside_the_mask(tmp_path, monkeypatch, kind):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    pipeline, asked = opened(tmp_path, kind), fitting(kind)
    seen, vae = [], pipeline.pipe.vae
    decode = vae.decode
    vae.decode = lambda latents, *a, **k: (seen.append(latents), decode(latents, *a, **k))[1]
    run(pipeline, [asked], edit_of(kind))
    source = pipeline.encode(asked.picture[None])[0]
    made = (seen[0][0] - vae.config.shift_factor) * vae.config.scaling_factor
    inside = (asked.mask[:, ::FACTOR, ::FACTOR] == 1).expand_as(made)
    torch.testing.assert_close(made[~inside], source[~inside], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(made[inside], source[inside], atol=1e-2)


def test_a_mask_smaller_than_a_place_of_the_latents_still_edits(tmp_path):
    for kind in ("inpaint", "inpaint, 9 channels", "img2img"):
        pipeline = opened(tmp_path / kind, kind)
        small = mask(top=11, left=19, height=2, width=2)
        made = run(pipeline, [request(mask=small)], EDIT).pictures[0]
        none = run(pipeline, [request(mask=torch.zeros_like(small))], EDIT).pictures[0]
        assert not torch.allclose(made[small.expand_as(made) > 0], none[small.expand_as(made) > 0], atol=1e-3), kind


def test_full_and_empty_masks(tmp_path):
    pipeline = opened(tmp_path, "inpaint")
    full, empty = (run(pipeline, [request(mask=torch.full((1, *SIZE), value))], EDIT).pictures for value in (1.0, 0.0))
    kept = pipeline.decode(pipeline.encode(picture()[None]))
    torch.testing.assert_close(empty, kept, atol=1e-5, rtol=0)
    assert not torch.allclose(full, kept, atol=1e-2)


@pytest.mark.parametrize("kind", ["inpaint", "inpaint, 9 channels", "img2img", "instruct"])
def test_fill_is_in_the_pixels(tmp_path, kind):
    pipeline = opened(tmp_path, kind)
    filled = fill((picture() * 255).round().byte().permute(1, 2, 0).numpy(), mask()[0].numpy() > 0)
    inside = mask().expand(3, -1, -1) > 0
    shown = torch.where(inside, torch.from_numpy(filled).permute(2, 0, 1) / 255, picture())
    made = run(pipeline, [request(mask=mask())], edit_of(kind, content="fill")).pictures
    assert torch.equal(made, run(pipeline, [request(mask=mask(), picture=shown)], edit_of(kind)).pictures)
    assert not torch.equal(made, run(pipeline, [request(mask=mask())], edit_of(kind)).pictures)


@pytest.mark.parametrize("content", ["latent_noise", "latent_nothing"])
def test_what_the_latents_start_from(tmp_path, content, monkeypatch):
    pipeline = opened(tmp_path, "inpaint")
    started = []
    prepare = type(pipeline.pipe).prepare_latents
    names = list(inspect.signature(prepare).parameters)
    monkeypatch.setattr(
        pipeline.pipe, "prepare_latents",
        lambda *a, **k: (started.append(k.get("image", a[names.index("image") - 1] if len(a) >= names.index("image") else None)), prepare(pipeline.pipe, *a, **k))[1],
    )  # fmt: skip
    run(pipeline, [request(mask=mask())], edit_of("inpaint", content=content))
    inside = (mask()[:, ::FACTOR, ::FACTOR] > 0).expand(4, -1, -1)
    assert not torch.equal(started[0][0][inside], pipeline.encode(picture()[None])[0][inside])
    if content == "latent_nothing":
        assert (started[0][0][inside] == 0).all()
    else:
        assert 0.5 < started[0][0][inside].std() < 1.5


@pytest.mark.parametrize("kind", ["inpaint, 9 channels", "instruct", "variation", "inpaint of Flux"])
def test_noise_in_the_latents_is_refused_where_nothing_starts_from_them(tmp_path, kind):
    with pytest.raises(UserError, match=r"model.init_args.edit.content = latent_noise .* original or fill"):
        run(opened(tmp_path, kind), [fitting(kind, mask=mask(size=fitting(kind).picture.shape[1:]))], edit_of(kind, content="latent_noise"))  # fmt: skip


def test_what_a_mode_lacks_is_said(tmp_path):
    with pytest.raises(UserError, match=r"edit.masks = none, but the mode inpaint needs masks"):
        run(opened(tmp_path, "inpaint"), [request()], EDIT)
    with pytest.raises(UserError, match=r"edit.references: the mode reference_only needs"):
        run(opened(tmp_path / "r", "reference_only"), [request()], EDIT)
    kind = "img2img of Flux"
    with pytest.raises(UserError, match=r"edit.masks: with this model take the mode inpaint"):
        run(opened(tmp_path / "f", kind), [fitting(kind, mask=mask(size=(48, 64)))], edit_of(kind))
    with pytest.raises(ValueError, match="multiples of 8"):
        run(opened(tmp_path / "s"), [request(picture=picture(size=(36, 40)))], EDIT)


# --- half precision ---


def spoil(pipeline, monkeypatch, value, rows=(1,), whenever=False):
    """The autoencoder gives `value` for some pictures while it is in half precision, or always."""
    vae = pipeline.pipe.vae
    decode = vae.decode

    def spoilt(latents, *args, **kwargs):
        made = decode(latents, *args, **kwargs)
        if vae.dtype != torch.float32 or whenever:
            made[0][[row for row in rows if row < len(latents)]] = value
        return made

    monkeypatch.setattr(vae, "decode", spoilt)


@pytest.mark.parametrize("value", [float("nan"), -1.0], ids=["nan", "black"])
def test_spoilt_pictures_are_made_again_in_float32(tmp_path, monkeypatch, value):
    pipeline = opened(tmp_path, dtype="bfloat16")
    weights = {name: value.clone() for name, value in pipeline.pipe.unet.state_dict().items()}
    requests = [request(number) for number in range(3)]
    fine = run(pipeline, requests, EDIT)
    assert not any(fine.retried)
    with pipeline.in_float32():
        expected = run(pipeline, [requests[1]], EDIT).pictures[0]
    spoil(pipeline, monkeypatch, value)
    made = run(pipeline, requests, EDIT)
    assert made.retried == [False, True, False]
    assert made.spoilt == [False, False, False]
    assert torch.equal(made.pictures[[0, 2]], fine.pictures[[0, 2]])
    torch.testing.assert_close(made.pictures[1], expected)
    assert pipeline.dtype == pipeline.pipe.unet.dtype == pipeline.pipe.vae.dtype == torch.bfloat16
    assert all(torch.equal(weights[name], value) for name, value in pipeline.pipe.unet.state_dict().items())


@pytest.mark.parametrize("kind", ["img2img", "inpaint", "reference_only", "ip_adapter"])
def test_the_trainers_precision_changes_nothing(tmp_path, kind):
    pipeline = opened(tmp_path, kind)
    requests = [fitting(kind)]
    plain = run(pipeline, requests, EDIT).pictures
    latents = pipeline.encode(requests[0].picture[None])
    decoded = pipeline.decode(latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as under 16-mixed and bf16-mixed
        assert torch.equal(run(pipeline, requests, EDIT).pictures, plain)
        assert torch.equal(pipeline.encode(requests[0].picture[None]), latents)
        assert torch.equal(pipeline.decode(latents), decoded)
    torch.set_default_dtype(torch.bfloat16)  # as under bf16-true
    try:
        assert torch.equal(run(pipeline, requests, EDIT).pictures, plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_are_kept_in_float32_come_back_from_it(tmp_path):
    pipeline = opened(tmp_path, "img2img of Flux", dtype="float16")
    layer = pipeline.pipe.text_encoder_2.encoder.block[0].layer[1].DenseReluDense.wo
    assert layer.weight.dtype == torch.float32  # T5 overflows there
    before = layer.weight.clone()
    with pipeline.in_float32():
        assert {weight.dtype for weight in pipeline.pipe.text_encoder_2.parameters()} == {torch.float32}
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, before)
    assert pipeline.pipe.text_encoder_2.shared.weight.dtype == pipeline.pipe.vae.dtype == torch.float16


def test_nan_in_float32_is_an_error(tmp_path, monkeypatch):
    for dtype in ("bfloat16", "float32"):
        pipeline = opened(tmp_path / dtype, dtype=dtype)
        spoil(pipeline, monkeypatch, float("nan"), rows=(0, 1), whenever=True)
        with pytest.raises(UserError, match=r"gives NaN for 'hole in a nut' in float32, too.*lora_scale"):
            run(pipeline, [request(0), request(1)], EDIT)


def test_a_black_source_may_stay_black(tmp_path, monkeypatch):
    pipeline = opened(tmp_path, dtype="bfloat16")
    spoil(pipeline, monkeypatch, -1.0, rows=(0,))
    made = run(pipeline, [request(picture=torch.zeros(3, *SIZE))], EDIT)
    assert (made.retried, made.spoilt) == ([False], [False])


def test_black_in_float32_is_left_to_the_judgement(tmp_path, monkeypatch):
    pipeline = opened(tmp_path)
    spoil(pipeline, monkeypatch, -1.0, rows=(0,), whenever=True)
    made = run(pipeline, [request()], EDIT)
    assert (made.retried, made.spoilt) == ([False], [True])
    assert np.all(made.pictures.numpy() == 0)


def test_what_is_black_after_the_retry_is_told(tmp_path, monkeypatch):
    pipeline = opened(tmp_path, dtype="bfloat16")
    spoil(pipeline, monkeypatch, -1.0, rows=(0,), whenever=True)
    made = run(pipeline, [request(0), request(1)], EDIT)
    assert (made.retried, made.spoilt) == ([True, False], [True, False])
