"""Ando's refiner: a diffusion model repairs the label map of any segmentation network.

A first stage gives class probabilities, a label map is drawn from them, and the reverse process of a diffusion model
that was trained on true label maps and their pictures turns it into a likelier one (`diffusion/refine.py`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_defect.diffusion.labels import LabelInput, generators, sample_labels
from lit_defect.diffusion.presets import Preset, check, quick_sampler, resolve
from lit_defect.diffusion.process import BetaSchedule, ForwardProcess, Prediction
from lit_defect.diffusion.refine import Conditioning, Refinement
from lit_defect.diffusion.samplers import Sampler, SamplerName
from lit_defect.diffusion.spaces import LatentSpace, PixelSpace, Space
from lit_defect.errors import UserError
from lit_defect.losses.segmentation import make_mask_loss
from lit_defect.nets.averaging import running_mean
from lit_defect.nets.canvas import Canvas
from lit_defect.nets.denoiser import Denoiser
from lit_defect.nets.fitting import fingerprint
from lit_defect.tasks.base import Batch
from lit_defect.tasks.pixels import Answer, PixelTask, targets
from lit_defect.tasks.refiner_state import check_latents, check_weights, compare_chains
from lit_defect.tasks.stages import FirstStage, SegmenterStage, first_stage


class Estimate(NamedTuple):
    """Probabilities (B, C, H, W) at the end and after one call, and the uncertainty (B, H, W)."""

    refined: Tensor
    one_step: Tensor
    uncertainty: Tensor


class DDPMRefiner(PixelTask):
    """Refines the label maps of a first stage.

    A preset decides all options from `conditioning` to `beta_schedule` that are left at null.

    Args:
        stage1: run folder or checkpoint of a `Segmenter`, or a folder of probability maps; null trains on masks alone
            and segments from pure noise (strength 1).
        preset: `paper` (Ando) or `fast` (at most 10 network calls).
        conditioning: how the picture comes in: `joint`, `replace` or `concat` (see `diffusion/refine.py`).
        start: from the `clean` label map, or from the `noised` one.
        train_on: states that are noised `ground_truth`, or those that a chain from the first stage's `prediction`
            meets.
        label_input: the first stage's map as one `sample`, as `argmax`, or `soft`.
        num_samples: chains whose results are averaged; their variance is the uncertainty.
        scheduler: `ddpm`, `ddim`, `dpmsolver` or `unipc`.
        steps: of the whole reverse process; must divide `train_steps`.
        strength: share of them that is done; 0 gives back the first stage.
        prediction: what the network answers: `epsilon`, `sample`, `v_prediction`, or `logits` of the classes.
        loss: what `logits` are trained by: `ce` (cross-entropy), `dice`, `focal`, `ce_dice` or `focal_dice`.
        beta_schedule: `linear`, `scaled_linear` or `cosine`. The strength means another noise level under each.
        train_steps: T of the diffusion.
        channels: of the U-Net's levels.
        layers: residual blocks of a level.
        attention: whether the coarsest level attends.
        patch: side of the blocks of pixels that the U-Net works on.
        ema_decay: of the running mean of the weights, which evaluates.
        latent: `autoencoder` folder or checkpoint of a `MaskAutoencoder`: the states are its latents.
        tile: side of overlapping tiles in which larger pictures go through the network; null takes them whole.
        overlap: of the tiles, as a share of their side.
        validation_calls: network calls a picture, at most, while training (DDIM then); test does all.
        kwargs: see `PixelTask`.

    Raises:
        UserError: an option that is out of range, or options that contradict each other.
    """

    main = "refined"

    def __init__(
        self,
        stage1: str | None = None,
        preset: Preset = "fast",
        conditioning: Conditioning | None = None,
        start: Literal["clean", "noised"] | None = None,
        train_on: Literal["ground_truth", "prediction"] | None = None,
        label_input: LabelInput | None = None,
        num_samples: int | None = None,
        scheduler: SamplerName | None = None,
        steps: int | None = None,
        strength: float | None = None,
        prediction: Prediction | None = None,
        loss: Literal["ce", "dice", "focal", "ce_dice", "focal_dice"] = "ce",
        beta_schedule: BetaSchedule | None = None,
        train_steps: int = 1000,
        channels: tuple[int, ...] = (64, 128, 256, 256),
        layers: int = 2,
        attention: bool = True,
        patch: int = 1,
        ema_decay: float = 0.999,
        latent: str | None = None,
        tile: int | None = None,
        overlap: float = 0.25,
        validation_calls: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters(logger=False)
        given = {
            "conditioning": conditioning, "start": start, "train_on": train_on, "label_input": label_input,
            "num_samples": num_samples, "scheduler": scheduler, "steps": steps, "strength": strength,
            "prediction": prediction, "beta_schedule": beta_schedule,
        }  # fmt: skip
        self.settings, self.preset = resolve(preset, given)
        self.hparams.update(self.settings)
        self.loss_name = loss
        self.stage1_source = stage1
        self.num_samples: int = self.settings["num_samples"]
        check(self.settings, stage1=stage1, latent=latent)
        if validation_calls < 1:
            raise UserError(f"model.init_args.validation_calls = {validation_calls}: expected at least 1")
        self.process = ForwardProcess(train_steps, self.settings["beta_schedule"])
        self.sampler = Sampler(
            self.settings["scheduler"],
            self.process,
            steps=self.settings["steps"],
            strength=self.settings["strength"],
        )
        self.validation_sampler = quick_sampler(self.sampler, validation_calls)
        self.network_options: dict[str, Any] = {
            "channels": channels, "layers": layers, "attention": attention, "patch": patch
        }  # fmt: skip
        with torch.device("meta"):  # says now what cannot be built
            running_mean(Denoiser(2, 2, **self.network_options), ema_decay)
        self.ema_decay = ema_decay
        self.latent = latent
        self.tile = tile
        self.overlap = overlap
        self.before = None if stage1 is None else "stage1"
        if stage1 is None and self.settings["strength"] < 1:
            self.monitor = ("val/loss", "min")  # there is nothing to start a chain from
        self.stage1: FirstStage | None = None
        self.denoiser: Denoiser | None = None

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        settings = self.settings
        return (
            f"DDPMRefiner ({self.preset or 'own settings'}): {settings['conditioning']}, {settings['prediction']}, "
            f"{self.sampler.calls * self.num_samples} network calls behind {self.stage1_source or 'nothing'}"
        )

    def setup(self, stage: str) -> None:
        """Open the first stage and look whether it goes with the data.

        Raises:
            UserError: a first stage that is missing, of other classes, or without a map of each picture; or none
                where one is needed.
        """
        super().setup(stage)
        if stage == "fit" and self.settings["train_on"] == "prediction" and self.sampler.calls == 0:
            raise UserError(
                "model.init_args.strength = 0 leaves no step to train on with model.init_args.train_on = prediction: "
                "train with the strength that will be used, or with train_on: ground_truth"
            )
        if self.stage1_source is None:
            if stage != "fit" and self.settings["strength"] < 1:
                raise UserError(
                    f"{stage} needs a first stage: set model.init_args.stage1, or model.init_args.strength to 1 to "
                    "segment from pure noise"
                )
            return
        if self.stage1 is None:
            with self.opening("stage1"):
                self.stage1 = first_stage(self.stage1_source, self.names).to(self.device)
        splits = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,))
        if stage == "fit" and self.settings["train_on"] == "ground_truth":
            splits = ("val",)
        self.stage1.check(self.data, splits)

    def configure_model(self) -> None:
        """Build the denoiser and the running mean of its weights."""
        if self.denoiser is not None:
            return
        space: Space = PixelSpace(self.classes)
        if self.latent is not None:
            with self.opening("latent"):
                space = LatentSpace(self._open_autoencoder(self.latent))
        self.refinement = Refinement(
            self.process,
            self.sampler,
            space,
            self.settings["conditioning"],
            self.settings["start"],
            self.settings["prediction"],
            self.settings["label_input"],
            make_mask_loss(self.loss_name),
        )
        denoiser = Denoiser(self.refinement.in_channels, self.refinement.out_channels, **self.network_options)
        self.denoiser = denoiser.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.ema = running_mean(self.denoiser, self.ema_decay)
        tile = None if self.tile is None else -(-self.tile // space.factor)  # in places of a state
        self.canvas = Canvas(denoiser.multiple, tile, self.overlap)
        self.whole = Canvas(denoiser.multiple)
        if self.compile_network:
            self.denoiser.compile()
            self.ema.module.compile()

    def _open_autoencoder(self, source: str) -> Any:
        from lit_defect.nets.label_autoencoder import LabelAutoencoder

        autoencoder = LabelAutoencoder.load(Path(source).expanduser())
        if autoencoder.classes != self.classes:
            raise UserError(
                f"model.init_args.latent: {source} is made for {autoencoder.classes} classes, and the data have "
                f"{self.classes}"
            )
        self.autoencoder = autoencoder.requires_grad_(False)
        return self.autoencoder

    def train(self, mode: bool = True) -> DDPMRefiner:
        """Only the denoiser trains."""
        super().train(mode)
        for part in ("stage1", "ema", "autoencoder"):
            module = getattr(self, part, None)
            if module is not None:
                module.eval()
        return self

    # --- checkpoints ---

    def _borrowed(self, keys: Any) -> list[str]:
        """Keys of what others have trained; it is opened by its path."""
        return [key for key in keys if key.startswith(("stage1.", "autoencoder."))]

    def _autoencoder_hash(self) -> str | None:
        return None if self.latent is None else fingerprint(self.autoencoder.state_dict())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the first stage and the autoencoder out, and note which they were."""
        if self.stage1 is not None:
            checkpoint["stage1"] = {"source": self.stage1.source, "fingerprint": self.stage1.fingerprint}
        checkpoint["autoencoder"] = self._autoencoder_hash()
        for key in self._borrowed(list(checkpoint["state_dict"])):
            del checkpoint["state_dict"][key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the first stage and the autoencoder back in.

        Raises:
            UserError: the checkpoint was trained with other options that its weights depend on, or a training goes on
                behind another first stage.
        """
        check_weights(checkpoint.get("hyper_parameters", {}), self.hparams)
        check_latents(checkpoint, self.latent, self._autoencoder_hash())
        goes_on = self._trainer is not None and self._trainer.state.fn == "fit"
        compare_chains(checkpoint, self.settings, self.stage1, goes_on=goes_on)
        own = self.state_dict()
        checkpoint["state_dict"].update({key: own[key] for key in self._borrowed(own)})
        super().on_load_checkpoint(checkpoint)

    # --- training ---

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then move the running mean; both are in any checkpoint that follows."""
        super().optimizer_step(*args, **kwargs)
        assert self.denoiser is not None
        self.ema.update_parameters(self.denoiser)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss at a random step of the process of each picture, in a random view and window."""
        loss = self._loss(self.denoiser, batch, augment=True)
        self.log("train/loss", loss, batch_size=len(batch["index"]), prog_bar=True)
        return loss

    def _loss(self, network: Any, batch: Batch, *, augment: bool) -> Tensor:
        stage1 = self.stage1 if self.settings["train_on"] == "prediction" else None
        maps = None if stage1 is None else stage1.stored(batch)
        if augment:
            images, labels, maps = self.training_pictures(batch, maps)
        else:
            images, labels = self.pixels(batch), targets(batch, self.classes)
        if stage1 is not None and maps is None:
            maps = stage1(images)
        images, labels = self._padded(2 * images - 1), self._padded(labels)

        def asked(inputs: Tensor, t: Tensor) -> Tensor:
            return self.whole(lambda part: network(self._laid_out(part), t), inputs)

        first = (None, None) if maps is None else (self._padded(maps), asked)
        example = self.refinement.example(labels, images, *first)
        output = asked(example.inputs, example.t)
        return self.refinement.loss(output, example, labels)

    def _laid_out(self, inputs: Tensor) -> Tensor:
        return inputs.contiguous(memory_format=self.memory_format)

    def _padded(self, pixels: Tensor) -> Tensor:
        """(..., H, W) with sides that the space can take."""
        return Canvas(self.refinement.space.factor).pad(pixels)

    def on_validation_epoch_start(self) -> None:
        """The same steps and noise for the validation loss after each epoch."""
        super().on_validation_epoch_start()
        torch.manual_seed(self.global_rank)  # every training batch seeds anew

    def validation_loss(self, batch: Batch, labels: Tensor, answer: Answer) -> Tensor:
        """The training loss of the plain pictures, by the running mean of the weights."""
        return self._loss(self.ema.module, batch, augment=False)

    # --- refining ---

    def answer(self, batch: Batch, stage: str) -> Answer:
        """First stage, one of its sampled maps, one call, and the whole chain."""
        images, since = self.pixels(batch), self.clock()
        first = None
        if self.stage1 is not None:
            first = self.stage1.stored(batch)
            first = self.stage1(images) if first is None else first
            if isinstance(self.stage1, SegmenterStage):
                self.timed("stage1", since)
        if first is None and self.settings["strength"] < 1:  # only while training on masks alone
            flat = images.new_full((len(images), self.classes, *images.shape[-2:]), 1 / self.classes)
            return Answer({"refined": flat.argmax(1)}, flat)
        since = self.clock()
        indices = batch["index"].tolist()
        found = self.refine(images, first, indices, quick=stage == "fit")
        self.timed("refined", since)
        masks = {}  # in the order of the method: reports take the first as what was there, the last as what came of it
        if first is not None:
            masks["stage1"] = first.argmax(1)
            if stage != "fit":
                masks["sampled"] = sample_labels(first, generators(self._seed, indices))
        if stage != "fit":
            masks["one_step"] = found.one_step.argmax(1)
        masks["refined"] = found.refined.argmax(1)
        return Answer(masks, found.refined, found.uncertainty)

    @property
    def _seed(self) -> int:
        return 0 if self._trainer is None else int(getattr(self.data, "seed", 0) or 0)

    def refine(self, images: Tensor, first: Tensor | None, indices: list[int], *, quick: bool = False) -> Estimate:
        """Refine the maps of a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            first: probabilities (B, C, H, W) of the first stage, or None to start from noise.
            indices: a number for each picture, which decides its random stream.
            quick: by the sampler of the validation while training.
        """
        height, width = images.shape[-2:]
        refinement = replace(self.refinement, sampler=self.validation_sampler) if quick else self.refinement
        if refinement.sampler.calls == 0 and first is not None:
            return Estimate(first, first, 1 - first.amax(1))
        pictures = self._padded(2 * images - 1)
        start = None if first is None else self._padded(first)
        finals, ones = [], []
        for number in range(1 if quick else self.num_samples):
            chain = refinement.refine(self._denoise, start, pictures, generators(self._seed, indices, number))
            finals.append(refinement.space.decode(chain.final)[..., :height, :width])
            ones.append(refinement.space.decode(chain.first)[..., :height, :width])
        stacked = torch.stack(finals)  # (K, B, C, H, W)
        mean = stacked.mean(0)
        uncertainty = 1 - mean.amax(1) if len(finals) == 1 else stacked.var(0, correction=0).sum(1)
        return Estimate(mean, torch.stack(ones).mean(0), uncertainty)

    def _denoise(self, inputs: Tensor, t: Tensor) -> Tensor:
        """The running mean's answer, in tiles where pictures are larger than one; all of a batch are at one step."""
        return self.canvas(lambda part: self.ema.module(self._laid_out(part), t[:1].expand(len(part))), inputs)

    def about(self) -> dict[str, Any]:
        """Preset and settings, calls and sizes."""
        assert self.denoiser is not None
        parameters = {"refiner": sum(parameter.numel() for parameter in self.denoiser.parameters())}
        if self.stage1 is not None and self.stage1.parameters_used is not None:
            parameters["stage1"] = self.stage1.parameters_used
        many = self.num_samples > 1
        return {
            "preset": self.preset,
            "settings": {
                **self.settings,
                "loss": self.loss_name,
                "train_steps": self.process.train_steps,
                "latent": self.latent,
            },
            "stage1": None if self.stage1 is None else self.stage1.source,
            "network_calls": self.sampler.calls * self.num_samples,
            "parameters": parameters,
            "uncertainty_of": f"variance of {self.num_samples} samples" if many else "1 - highest probability",
        }
