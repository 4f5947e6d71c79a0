"""Latents and captions that a base is trained on, encoded once: a frozen autoencoder gives the same every epoch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_defect.diffusion.labels import generators
from lit_defect.diffusion.prompts import encode_prompt
from lit_defect.tasks.processes import joined_by_key
from lit_defect.tasks.variations import Variations
from lit_defect.tasks.views import unit_range
from lit_defect.transfer import sent


class LatentBank(NamedTuple):
    """V variations of each of n pictures.

    Attributes:
        moments: (n, V, 2 C, h, w) float16 on the CPU, mean and log variance of the latents.
        ids: (n, V, L) int64, the captions.
        captions: n lists of V sentences.
    """

    moments: Tensor
    ids: Tensor
    captions: list[list[str]]

    @torch.no_grad()
    def draw(self, rows: Tensor, variants: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Moments (B, 2 C, h, w) float32 and ids (B, L) of the given rows and variations, both (B,) on the CPU."""
        return sent(self.moments[rows, variants], device).float(), sent(self.ids[rows, variants], device)


@torch.no_grad()
def fill_bank(
    task: Any, split: str, names: dict[str, str], variations: Variations, variants: int, vae: Any, tokenizer: Any
) -> LatentBank:
    """Encode every picture of a split in `variants` variations; the first keeps the picture as it is.

    Each process encodes its share of the batches, and all have the whole. The draws depend on the data module's seed
    and the place of the batch alone: a resumed run has the same bank, and so has one on another number of processes.
    """
    data, device, trainer = task.data, task.device, task.trainer
    plain = Variations(variations.anomaly, edited=0.0, masks=0.0, augment="none", light=0.0)
    count, step = len(data.samples[split]), data.eval_batch_size
    loader, starts = data.loader(split), range(0, count, step)
    encoded: dict[int, tuple[Tensor, list[list[str]]]] = {}  # by the start of the batch
    with torch.random.fork_rng(devices=[]):
        for start in starts[trainer.global_rank :: trainer.world_size]:
            batch = loader.batch(list(range(start, min(start + step, count))))
            images = unit_range(batch["image"])
            spoken = [names[category] for category in batch["category"]]
            rows: list[Tensor] = []
            said: list[list[str]] = [[] for _ in spoken]
            for number in range(variants):
                torch.manual_seed(generators(data.seed, [start], number)[0].initial_seed())
                pictures, sentences = (variations if number else plain).captioned(images, spoken)
                posterior = vae.encode(2 * pictures.to(device) - 1).latent_dist
                rows.append(torch.cat([posterior.mean, posterior.logvar], dim=1).half().cpu())
                for kept, sentence in zip(said, sentences, strict=True):
                    kept.append(sentence)
            encoded[start] = torch.stack(rows, dim=1), said
    if trainer.world_size > 1:
        encoded = joined_by_key(encoded)
    moments = torch.cat([encoded[start][0] for start in starts])
    captions = [sentences for start in starts for sentences in encoded[start][1]]
    known = {sentence: encode_prompt(tokenizer, sentence, 0).ids for said in captions for sentence in said}
    ids = torch.stack([torch.stack([known[sentence] for sentence in said]) for said in captions])
    return LatentBank(moments, ids, captions)
