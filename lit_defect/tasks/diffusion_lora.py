"""LoRA (Hu et al., ICLR 2022) that teaches a latent diffusion model one's own defects by words, from a few pictures.

The run's folder `lora` is what diffusers' `load_lora_weights` opens, and every tool that reads its files. The model
stays as it is: low-rank adapters in the U-Net's attention, and in the text encoder if asked for, learn to make the
pictures of a type from its prompt. Normal pictures with a prompt of their own may go along, so that it does not forget
what a part without a defect looks like (after the prior preservation of DreamBooth, Ruiz et al., CVPR 2023, with
photographs in place of the model's own samples).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.diffusion.base_model import LatentBase, as_in_files
from lit_defect.diffusion.prompts import encode_prompt, text_states
from lit_defect.editing.prompts import CATEGORY, TYPE, Prompts
from lit_defect.errors import UserError
from lit_defect.generation.store import write_trained_on
from lit_defect.losses.diffusion import latent_mask, masked_mse
from lit_defect.runs import write_json
from lit_defect.tasks.base import Batch
from lit_defect.tasks.few_shots import FewShots, encode_views
from lit_defect.tasks.frozen_base import OnFrozenBase
from lit_defect.tasks.latent_steps import noised
from lit_defect.tasks.learnt_files import check_origin, put_back
from lit_defect.tasks.picture_sheets import picture_sheet
from lit_defect.tasks.pixels import Listed
from lit_defect.tasks.prompt_samples import sample_prompts
from lit_defect.tasks.views import VIEWS
from lit_defect.transfer import sent

FOLDER, ABOUT = "lora", "lora.json"
_ATTENTION = {"unet": ["to_q", "to_k", "to_v", "to_out.0"], "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"]}
_NORMAL = 200  # normal pictures that are encoded for `prior`, at most
_SHOWN = 12  # prompts of the sheet
_KEY = "model.init_args"


class StableDiffusionLoRA(OnFrozenBase):
    """Adapters for one's own pictures on Stable Diffusion 1.x or 2.x, or on a base of one's own.

    Args:
        base: hub name, folder of a pipeline of diffusers, or run of a `LatentDiffusion`.
        prompt: of the pictures, or one for each type; `{category}` and `{type}` are put in.
        types: of the pictures that train, such as `crack`; null for all with a defect. Each pair of category and type
            comes up equally often.
        prior: share of normal pictures that go along.
        prior_prompt: of these.
        rank: of the adapters.
        alpha: their answer is scaled by alpha / rank; null for `rank`. The exported weights have it in them.
        text_encoder: whether it has adapters, too.
        drop_caption: share of the pictures with an empty prompt, for classifier-free guidance.
        mask_weight: extra weight of the loss where the mask is; 0 needs no masks.
        augment: views that training draws from.
        min_snr_gamma: of min-SNR weighting; null weighs all steps alike.
        offset_noise: strength of noise that is constant over a picture.
        kwargs: see `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    verbs = ("fit",)
    judged_by = "what is made with it"
    exports = FOLDER

    def __init__(
        self,
        base: str,
        prompt: str | dict[str, str] = "a photo of a {category} with a {type}",
        types: list[str] | None = None,
        prior: float = 0.0,
        prior_prompt: str = "a photo of a {category}",
        rank: int = 8,
        alpha: float | None = None,
        text_encoder: bool = False,
        drop_caption: float = 0.1,
        mask_weight: float = 0.0,
        augment: Listed = "flips",
        min_snr_gamma: float | None = 5.0,
        offset_noise: float = 0.0,
        monitor: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, monitor=monitor, **kwargs)
        self.save_hyperparameters(logger=False)
        if rank < 1:
            raise UserError(f"{_KEY}.rank = {rank}: expected at least 1")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(f"{_KEY}.min_snr_gamma = {min_snr_gamma}: expected more than 0, or null")
        if alpha is not None and not 0 < alpha < math.inf:
            raise UserError(f"{_KEY}.alpha = {alpha}: expected a number > 0, or null for rank")
        for key, share in (("prior", prior), ("drop_caption", drop_caption)):
            if not 0 <= share < 1:
                raise UserError(f"{_KEY}.{key} = {share}: expected a share, 0 <= s < 1")
        for key, number in (("mask_weight", mask_weight), ("offset_noise", offset_noise)):
            if not 0 <= number < math.inf:
                raise UserError(f"{_KEY}.{key} = {number}: expected a number >= 0")
        self.prompts = Prompts(prompt, f"{_KEY}.prompt", (CATEGORY, TYPE))
        self.prior_prompts = Prompts(prior_prompt, f"{_KEY}.prior_prompt", (CATEGORY, TYPE))
        self.types = types
        self.prior = prior
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.text_encoder = text_encoder
        self.drop_caption = drop_caption
        self.mask_weight = mask_weight
        self.augment: Listed = augment
        self.min_snr_gamma = min_snr_gamma
        self.offset = offset_noise
        self.said: list[str] = []  # prompts of the pairs, then of the normal pictures' categories
        self._states: Tensor | None = None  # of `said` and of "", where the text encoder stays as it is

    # --- construction ---

    @property
    def title(self) -> str:
        """What the start-up screen calls it."""
        return f"StableDiffusionLoRA of rank {self.rank} on {self.base_source}"

    def setup(self, stage: str) -> None:
        """Look what there is to learn.

        Raises:
            UserError: no pictures of a type, none at all, no masks where they are to weigh, another stage than fit.
        """
        super().setup(stage)
        data = self.data
        if data is None or data.normal_class is None:
            raise UserError("StableDiffusionLoRA needs a data module that has a good class")
        self.check_serving()
        if self.mask_weight and not data.with_masks:
            raise UserError(f"{_KEY}.mask_weight = {self.mask_weight} needs masks: set data.init_args.with_masks")
        found = self._chosen("train")
        there = {sample.defect_type for sample in data.samples["train"]}
        if unknown := sorted(set(self.types or ()) - {sample.defect_type for sample in found.values()}):
            raise UserError(f"{_KEY}.types: no training picture is {unknown[0]}; there are {', '.join(sorted(there))}")
        if not found:
            raise UserError(
                "no defective picture trains, of which StableDiffusionLoRA could learn: set data.init_args.setting to "
                f"supervised or few_shot, or name what is to be learnt by {_KEY}.types"
            )
        self.pairs = sorted({(s.category, s.defect_type) for s in found.values()})
        normal = self._normal()
        if self.prior and not normal:
            raise UserError(f"{_KEY}.prior = {self.prior}: no normal picture trains, or {_KEY}.types has them already")
        self.categories = sorted({s.category for s in normal.values()})
        kind = data.class_names[data.normal_class]
        self.said = [self.prompts.of(category, kind) for category, kind in self.pairs]
        self.said += [self.prior_prompts.of(category, kind) for category in self.categories]
        self.learnt_from |= {(s.name, s.group) for s in (*found.values(), *normal.values())}

    def _chosen(self, split: str) -> dict[int, Any]:
        """The real pictures of a split that are learnt, by position."""
        normal = self.data.normal_class

        def wanted(sample: Any) -> bool:
            return sample.label != normal if self.types is None else sample.defect_type in self.types

        samples = self.data.samples.get(split, ())
        return {i: s for i, s in enumerate(samples) if s.source == "real" and wanted(s)}

    def _normal(self) -> dict[int, Any]:
        """The normal training pictures that go along, evenly from all, by position."""
        if not self.prior:
            return {}
        data, learnt = self.data, self._chosen("train")
        there = [
            (i, s)
            for i, s in enumerate(data.samples["train"])
            if s.label == data.normal_class and s.source == "real" and i not in learnt
        ]
        return dict(there[round(i * (len(there) - 1) / (_NORMAL - 1))] for i in range(_NORMAL)) if there else {}

    def configure_model(self) -> None:
        """Open the base and put the adapters in."""
        if self.base is not None:
            return
        from peft import LoraConfig

        base = self.open_base()
        base.check_size(*self.data.image_size)
        for name, network in self._adapted(base).items():
            if not hasattr(network, "add_adapter"):
                raise UserError(f"{_KEY}.text_encoder: the {type(network).__name__} of {base.source} takes no adapters")
            network.add_adapter(
                LoraConfig(
                    r=self.rank,
                    lora_alpha=self.alpha,  # type: ignore[arg-type]
                    target_modules=_ATTENTION[name],
                    init_lora_weights="gaussian",
                )
            )
        self.base = base
        self.learnt_from |= base.trained_on
        self._ids = torch.stack([self._encoded(text) for text in (*self.said, "")])

    def _adapted(self, base: LatentBase) -> dict[str, Any]:
        return {"unet": base.unet} | ({"text_encoder": base.text_encoder} if self.text_encoder else {})

    def _encoded(self, text: str) -> Tensor:
        prompt = encode_prompt(self.network.tokenizer, text, 0)
        if prompt.cut:
            rank_zero_warn(f'{_KEY}.prompt: "{prompt.cut}" of "{text}" does not fit and is cut off; take fewer words')
        return prompt.ids

    # --- checkpoints ---

    def learnt_with(self) -> dict[str, Any]:
        """The options that the adapters depend on."""
        return {"rank": self.rank, "alpha": self.alpha, "text_encoder": self.text_encoder}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the base back in.

        Raises:
            UserError: learnt on another base or with other options.
        """
        check_origin(self, checkpoint)
        put_back(self, checkpoint)

    # --- training ---

    def on_fit_start(self) -> None:
        """Encode pictures and prompts once."""
        base, data = self.network, self.data
        row_of = {pair: row for row, pair in enumerate(self.pairs)}
        rows = {split: {i: row_of.get((s.category, s.defect_type)) for i, s in self._chosen(split).items()}
                for split in ("train", "val")}  # fmt: skip
        for split, found in rows.items():
            known = {i: row for i, row in found.items() if row is not None}
            if known and split not in self._shots:
                views = VIEWS[self.augment] if split == "train" else 1
                self._shots[split] = self._encode(split, known, views, masked=self.mask_weight > 0)
        if self.prior and "prior" not in self._shots:
            categories = {i: self.categories.index(s.category) for i, s in self._normal().items()}
            self._shots["prior"] = self._encode("train", categories, VIEWS[self.augment], masked=False)
        data.serve_images = False
        if not self.text_encoder:
            with torch.no_grad():
                self._states = text_states(base.text_encoder, self._ids.to(self.device))

    def _encode(self, split: str, rows: dict[int, int], views: int, masked: bool) -> FewShots:
        base = self.network
        return encode_views(
            self.data, split, rows, views, lambda pictures, _: base.moments(2 * pictures - 1), self.device, masked
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of as many pictures as the batch has: of each pair equally often, and `prior` of them normal."""
        count = len(batch["index"])
        normal = int((torch.rand(count) < self.prior).sum())
        parts = [self._drawn("train", count - normal, len(self.pairs), 0)] if normal < count else []
        parts += [self._drawn("prior", normal, len(self.categories), len(self.pairs))] if normal else []
        moments, masks, prompts = (torch.cat(part) for part in zip(*parts, strict=True))
        prompts[torch.rand(count) < self.drop_caption] = len(self.said)  # the empty prompt
        loss = self._weighed(moments, masks, prompts)
        self.log("train/loss", loss, batch_size=count, prog_bar=True)
        return loss

    def _drawn(self, name: str, count: int, kinds: int, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Moments, masks and prompts of pictures; `first` is the row of their first prompt."""
        shots = self._shots[name]
        rows, views = shots.draw(count, kinds)
        return shots.moments[rows, views], shots.masks[rows, views], shots.pairs[rows] + first

    def _loss(self, shots: FewShots, rows: Tensor, views: Tensor) -> Tensor:
        """Of pictures that are learnt, by their own prompts."""
        return self._weighed(shots.moments[rows, views], shots.masks[rows, views], shots.pairs[rows])

    def _weighed(self, moments: Tensor, masks: Tensor, prompts: Tensor) -> Tensor:
        """Squared error, each place weighed by 1 + mask_weight * mask.

        Args:
            moments: (B, 2 C, h, w), of the latents.
            masks: (B, 1, H, W) in {0, 1}.
            prompts: (B,) rows of `said`; the number of these for the empty one.
        """
        base, device = self.network, self.device
        asked = noised(base, sent(moments, device), self.offset, self.min_snr_gamma)
        if self._states is None:
            states = text_states(base.text_encoder, sent(self._ids[prompts], device))
        else:
            states = self._states[sent(prompts, device)]
        output = base.unet(asked.state, asked.t, states).sample.float()
        weighed = None
        if self.mask_weight:
            weighed = 1 + self.mask_weight * latent_mask(sent(masks, device).float(), output.shape[2:])
        return masked_mse(output, asked.target, weighed, weights=asked.weights)

    # --- the result ---

    def export(self, path: Path) -> None:
        """Write the folder `lora`: weights as diffusers reads them, what they are of, what they have learnt from."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        base, layers = self.network, {}
        for name, network in self._adapted(base).items():
            # Files of diffusers have no alpha that all readers heed; theirs is the rank.
            state = {
                key: value.detach().cpu() * (self.alpha / self.rank if ".lora_B." in key else 1)
                for key, value in get_peft_model_state_dict(network).items()
            }
            state = as_in_files(state) if name == "text_encoder" else state
            layers[f"{name}_lora_layers"] = convert_state_dict_to_diffusers(state)
        StableDiffusionPipeline.save_lora_weights(path, **layers)
        about = {
            "base": {"source": self.base_source, "fingerprint": base.fingerprint},
            "prompts": list(dict.fromkeys(self.said)),
            "rank": self.rank,
            "text_encoder": self.text_encoder,
        }
        write_json(path / ABOUT, about)
        write_trained_on(path, self.learnt_from)

    @torch.no_grad()
    def draw_export(self, folder: Path) -> None:
        """`samples.png`: of each prompt a training picture, what the base makes of it, and two with the adapters."""
        base, shots = self.network, self._shots["train"]
        panels: list[list[Tensor]] = []
        shown = range(min(_SHOWN, len(self.pairs)))
        for pair in shown:
            row = int(torch.nonzero(shots.pairs == pair)[0])
            moments = shots.moments[row, 0].to(self.device)[None]
            with_it = self._samples(pair, 2, moments)
            for network in self._adapted(base).values():
                network.disable_adapters()
            without = self._samples(pair, 1, moments)
            for network in self._adapted(base).values():
                network.enable_adapters()
            pictures = torch.cat([base.decode(base.latents(moments)), without, with_it])
            panels.append(list(((pictures + 1) / 2).clamp(0, 1)))
        columns = [torch.stack(column) for column in zip(*panels, strict=True)]
        title = "Of each prompt: a training picture, the base's, and two with the adapters"
        picture_sheet(folder / "samples.png", columns, [self.said[pair] for pair in shown], title, columns=2)

    def _samples(self, prompt: int, count: int, moments: Tensor) -> Tensor:
        base = self.network
        ids = self._ids[[prompt] * count + [len(self.said)]].to(self.device)
        states = text_states(base.text_encoder, ids)
        shape = (base.channels, *moments.shape[2:])
        latents = sample_prompts(base.unet, states[:-1], states[-1:], base.process, base.prediction, shape)
        return base.decode(latents)
