"""What is learnt of a few defects on a frozen base: vectors in a prompt, and optionally LoRA on the U-Net.

Textual inversion (Gal et al., ICLR 2023) for many (category, defect type) pairs at once. The few pictures are encoded
once, in all views, and each step draws the pairs equally often: a type of four pictures learns as much as one of forty.
Checkpoints hold what was learnt and the hash of the base, not the base.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.diffusion.attention import CrossAttention
from lit_defect.diffusion.prompts import encode_prompt, encode_prompts, text_states
from lit_defect.errors import UserError
from lit_defect.nets.fitting import fingerprint
from lit_defect.nets.inserted_tokens import AnomalyTokens, SpatialEncoder
from lit_defect.tasks.base import Batch
from lit_defect.tasks.few_shots import FewShots, encode_shots, is_shot
from lit_defect.tasks.frozen_base import OnFrozenBase
from lit_defect.tasks.latent_steps import noised
from lit_defect.tasks.learnt_files import (
    EXPORT,
    check_origin,
    is_learnt,
    put_back,
    start_from,
    write_learnt,
)
from lit_defect.tasks.pixels import Listed
from lit_defect.tasks.views import VIEWS
from lit_defect.transfer import sent

_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
_FEWEST = 2


class Inversion(OnFrozenBase):
    """Base of the tasks that learn prompts on a frozen latent diffusion model.

    Args:
        base: hub name, folder of a pipeline of diffusers, or run of a `LatentDiffusion`.
        template: of the prompt; the learnt vectors stand for "*". What was learnt with another one is warned of, and
            so are words at its end that do not fit behind the vectors.
        anomaly_tokens: k vectors for each pair.
        spatial_tokens: n vectors that the spatial encoder makes of the mask; 0 for none.
        start_word: whose embedding the vectors start from.
        prompt_noise: standard deviation of noise on the vectors in training and sampling, as a share of their own root
            mean square.
        lora: rank of low-rank adapters in the U-Net's attention; 0 for none (the paper).
        spatial_lr, lora_lr: learning rates as shares of `lr`.
        start: `learnt.safetensors` of another run on the same base, to go on from with other pictures or further types.
        augment: views that training draws from: `none`, `flip`, `flips`, `dihedral`.
        min_snr_gamma: of min-SNR weighting; null weighs all steps alike (the paper).
        offset_noise: strength of noise that is constant over a picture.
        kwargs: see `DefectTask`.

    Raises:
        UserError: an option out of range.
    """

    verbs = ("fit", "predict")
    judged_by = "what it makes (python -m lit_defect.quality)"
    exports = EXPORT

    def __init__(
        self,
        base: str,
        template: str = "a photo of a *",
        anomaly_tokens: int = 8,
        spatial_tokens: int = 0,
        start_word: str = "anomaly",
        prompt_noise: float = 0.0,
        lora: int = 0,
        spatial_lr: float = 1.0,
        lora_lr: float = 1.0,
        start: str | None = None,
        augment: Listed = "flips",
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        pairs: list[tuple[str, str]] | None = None,
        monitor: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base, monitor=monitor, **kwargs)
        least = {"anomaly_tokens": 1, "spatial_tokens": 0, "lora": 0, "prompt_noise": 0, "offset_noise": 0}
        given = {"anomaly_tokens": anomaly_tokens, "spatial_tokens": spatial_tokens, "lora": lora,
                 "prompt_noise": prompt_noise, "offset_noise": offset_noise}  # fmt: skip
        for key, number in given.items():
            if number < least[key]:
                raise UserError(f"model.init_args.{key} = {number}: expected at least {least[key]}")
        self.template = template
        self.counts = (anomaly_tokens, spatial_tokens)
        self.start_word = start_word
        self.prompt_noise = prompt_noise
        self.lora = lora
        self.lr_shares = {"spatial": spatial_lr, "lora": lora_lr}
        self.start = None if start is None else Path(start).expanduser()
        self.augment: Listed = augment
        self.min_snr_gamma = min_snr_gamma
        self.offset = offset_noise
        self.pairs = None if pairs is None else [(category, kind) for category, kind in pairs]

    # --- what a subclass provides ---

    @abstractmethod
    def shown(self, images: Tensor, masks: Tensor) -> Tensor:
        """What the base learns to make of pictures (B, 3, H, W) and masks (B, 1, H, W) in [0, 1]: (B, 3, H, W)."""

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor, masks: Tensor, weights: Tensor | None) -> Tensor:
        """Of the U-Net's answer (B, C, h, w); masks (B, 1, H, W), weights (B,)."""

    # --- construction ---

    def setup(self, stage: str) -> None:
        """Look which pairs there are, and whether each can be learnt.

        Raises:
            UserError: no masks, no defects to learn from, a type with one picture, a verb that does not apply.
        """
        super().setup(stage)
        data, name = self.data, type(self).__name__
        if data is None or data.normal_class is None or not data.with_masks:
            raise UserError(f"{name} needs a data module with a good class and masks: set data.init_args.with_masks")
        self.check_serving()
        if stage == "fit":
            found = Counter((s.category, s.defect_type) for s in self.defects("train"))
            if not found:
                raise UserError(f"{name} learns from defective pictures, and none trains: set data.setting to few_shot")
            for pair, count in sorted(found.items()):
                if count < _FEWEST:
                    raise UserError(
                        f"{'/'.join(pair)} has {count} training picture: {name} needs {_FEWEST} of each type, so that "
                        "it does not learn one by heart; add some, or leave the type out of the data set"
                    )
            self._check_pairs(self.pairs, sorted(found))
            self.pairs = sorted(found)
            self.learnt_from |= {(s.name, s.group) for s in self.defects("train")}
        self.hparams.update(pairs=[list(pair) for pair in self.pairs or ()])

    @staticmethod
    def _check_pairs(learnt: list[tuple[str, str]] | None, there: list[tuple[str, str]]) -> None:
        if learnt is not None and learnt != there:
            raise UserError(
                f"the checkpoint knows {_named(learnt)}, the data have {_named(there)}: go on with the data options of "
                "its run (config.yaml), or start a new one"
            )

    def defects(self, split: str) -> list[Any]:
        """The defective samples of a split that are real."""
        samples = self.data.samples.get(split, ())
        return [sample for sample in samples if is_shot(self.data, sample)]

    def configure_model(self) -> None:
        """Open the base and make what is learnt."""
        if self.base is not None:
            return
        base = self.open_base()
        if self._trainer is not None and self.data is not None:  # else a checkpoint is opened without data
            base.check_size(*self.data.image_size)
        _, n = self.counts
        self.learnt = nn.ModuleDict()
        if n:
            self.learnt["spatial"] = SpatialEncoder(n, base.width, float(base.embeddings.norm(dim=1).mean()))
        if self.lora:
            from peft import LoraConfig

            base.unet.add_adapter(
                LoraConfig(
                    r=self.lora, lora_alpha=self.lora, target_modules=_LORA_TARGETS, init_lora_weights="gaussian"
                )
            )
        self.base = base
        self.learnt_from |= base.trained_on
        self.cross = CrossAttention(base.unet)
        if self.pairs is not None:  # else a checkpoint will tell them
            self._make_tokens(self.pairs)

    def _make_tokens(self, pairs: list[tuple[str, str]]) -> None:
        base = self.network
        start = base.embeddings[encode_words(base.tokenizer, self.start_word)].mean(dim=0)
        self.learnt["tokens"] = AnomalyTokens(pairs, self.counts[0], base.width, start).to(self.device)
        self.pairs = pairs
        self.hparams.update(pairs=[list(pair) for pair in pairs])
        categories = sorted({category for category, _ in pairs})
        self.prompts = encode_prompts(base.tokenizer, self.template, sum(self.counts), categories)

    @property
    def positions(self) -> tuple[int, ...]:
        """Of the vectors in the prompts."""
        return next(iter(self.prompts.values())).positions

    # --- checkpoints ---

    def learnt_state(self) -> dict[str, Tensor]:
        """Everything that was learnt, by its name in the state of the task."""
        return {key: value for key, value in self.state_dict().items() if is_learnt(key)}

    def learnt_with(self) -> dict[str, Any]:
        """The options that what is learnt depends on."""
        tokens, spatial = self.counts
        return {"template": self.template, "anomaly_tokens": tokens, "spatial_tokens": spatial, "lora": self.lora}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the base back in, if it is the same.

        Raises:
            UserError: learnt on another base, for other pairs, or with other options.
        """
        check_origin(self, checkpoint)
        pairs: list[Any] = [tuple(pair) for pair in checkpoint.get("hyper_parameters", {}).get("pairs", ())]
        if self._trainer is not None and self._trainer.state.fn == "fit":
            self._check_pairs(pairs, self.pairs or [])
        if self.pairs != pairs or "tokens" not in self.learnt:
            self._make_tokens(pairs)
        put_back(self, checkpoint)

    def tokens_hash(self) -> str:
        """SHA-256 of what was learnt."""
        return fingerprint(self.learnt_state())

    def export(self, path: Path) -> None:
        """Write `learnt.safetensors`, which the option `start` of other runs takes."""
        write_learnt(self, path)

    # --- training ---

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Vectors, spatial encoder and adapters, each with its own rate; none has a decay but the adapters."""
        groups = [{"params": list(self.learnt["tokens"].parameters()), "lr": self.lr, "weight_decay": 0.0}]
        if "spatial" in self.learnt:
            spatial = list(self.learnt["spatial"].parameters())
            groups.append({"params": spatial, "lr": self.lr * self.lr_shares["spatial"], "weight_decay": 0.0})
        adapters = [p for p in self.network.unet.parameters() if p.requires_grad]
        groups.append({"params": adapters, "lr": self.lr * self.lr_shares["lora"], "weight_decay": self.weight_decay})
        return groups

    def on_fit_start(self) -> None:
        """Take what another run has learnt, and encode the few pictures once."""
        if self.start is not None and self.begins:
            start_from(self, self.start)
        for split in ("train", "val"):
            if self.defects(split) and split not in self._shots:
                self._shots[split] = encode_shots(self, split, VIEWS[self.augment] if split == "train" else 1)
        self.data.serve_images = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of as many pictures as the batch has, drawn so that each pair comes up equally often."""
        shots, count = self._shots["train"], len(batch["index"])
        loss = self._loss(shots, *shots.draw(count, len(self.pairs or ())))
        self.log("train/loss", loss, batch_size=count, prog_bar=True)
        return loss

    def _loss(self, shots: FewShots, rows: Tensor, views: Tensor) -> Tensor:
        base, device = self.network, self.device
        masks = sent(shots.masks[rows, views], device).float()
        asked = noised(base, sent(shots.moments[rows, views], device), self.offset, self.min_snr_gamma)
        states = self.states(shots.pairs[rows], masks, torch.randn)
        return self.loss(base.unet(asked.state, asked.t, states).sample.float(), asked.target, masks, asked.weights)

    def states(self, pairs: Tensor, masks: Tensor, draw: Any = None) -> Tensor:
        """Text states (B, L, D) of pairs (B,), on the CPU, with the defects at masks (B, 1, H, W).

        Args:
            draw: (*shape) -> standard normal numbers for `prompt_noise`; None for none.
        """
        inserted = self.learnt["tokens"](sent(pairs, self.device))
        if "spatial" in self.learnt:
            inserted = torch.cat([inserted, self.learnt["spatial"](masks)], dim=1)  # (B, k + n, d)
        if self.prompt_noise and draw is not None:
            size = inserted.detach().square().mean(dim=(1, 2), keepdim=True).sqrt()
            inserted = inserted + self.prompt_noise * size * sent(draw(*inserted.shape), self.device).to(inserted)
        assert self.pairs is not None
        ids = torch.stack([self.prompts[self.pairs[pair][0]].ids for pair in pairs.tolist()])
        return text_states(self.network.text_encoder, sent(ids, self.device), inserted, self.positions)

    def unconditional(self, count: int) -> Tensor:
        """Text states (B, L, D) of the empty prompt."""
        ids = encode_prompt(self.network.tokenizer, "", 0).ids.to(self.device)
        return text_states(self.network.text_encoder, ids[None]).expand(count, -1, -1)


def encode_words(tokenizer: Any, words: str) -> list[int]:
    """Token ids of words alone.

    Raises:
        UserError: there are none.
    """
    ids = list(tokenizer(words, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"model.init_args.start_word = {words!r}: expected a word")
    return ids


def _named(pairs: Any) -> str:
    return ", ".join("/".join(pair) for pair in pairs) or "none"
