"""The few pictures that something is learnt from on a frozen base, encoded once in every view."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.generation.mask_shapes import fit_mask
from lit_defect.generation.mask_sources import Pair
from lit_defect.tasks.views import unit_range, view


class FewShots(NamedTuple):
    """Some pictures of a split.

    Attributes:
        moments: (n, V, 2 C, h, w) float32 on the CPU, mean and log variance of the latents in each view.
        masks: (n, V, 1, H, W) uint8; zeros where they were not asked for.
        pairs: (n,) int64, row of each picture's (category, defect type).
        row_of: index of a sample in its split -> row.
    """

    moments: Tensor
    masks: Tensor
    pairs: Tensor
    row_of: dict[int, int]

    def draw(self, count: int, pairs: int) -> tuple[Tensor, Tensor]:
        """Rows and views (count,), by torch's global generator; each of so many pairs comes up equally often."""
        wanted = torch.randint(pairs, (count,)).tolist()
        members = [torch.nonzero(self.pairs == pair)[:, 0] for pair in wanted]
        rows = torch.stack([rows[torch.randint(len(rows), ())] for rows in members])
        return rows, torch.randint(self.moments.shape[1], (count,))


def encode_shots(task: Any, split: str, views: int) -> FewShots:
    """All views of a split's defects.

    Args:
        task: an `Inversion` on its device, which says what is shown of a picture and its mask.
        split: of its data module.
        views: as many as `tasks.views` lists for the augmentation.
    """
    data, tokens, known = task.data, task.learnt["tokens"], set(task.pairs)
    chosen = {
        i: tokens.row_of(s.category, s.defect_type)
        for i, s in enumerate(data.samples[split])
        if is_shot(data, s) and (s.category, s.defect_type) in known
    }

    def moments(pictures: Tensor, masks: Tensor) -> Tensor:
        found: Tensor = task.network.moments(2 * task.shown(pictures, masks) - 1)
        return found

    return encode_views(data, split, chosen, views, moments, task.device)


@torch.no_grad()
def encode_views(
    data: Any,
    split: str,
    chosen: Mapping[int, int],
    views: int,
    moments: Callable[[Tensor, Tensor], Tensor],
    device: torch.device,
    masked: bool = True,
) -> FewShots:
    """All views of some pictures; masks are made smaller without losing what is smaller than a pixel.

    Args:
        data: the data module.
        split: of it.
        chosen: index of each picture in the split -> row of its pair.
        views: as many as `tasks.views` lists for the augmentation.
        moments: pictures (V, 3, H, W) and masks (V, 1, H, W) in [0, 1] -> (V, 2 C, h, w).
        device: that `moments` works on.
        masked: whether the masks of defects are read; those of normal pictures are zeros, and all others without it.
    """
    encoded, masks = [], []
    loader = data.loader(split)
    for i in chosen:
        images = unit_range(loader.batch([i])["image"].to(device))
        mask = torch.zeros_like(images[:, :1])
        if masked and data.samples[split][i].label != data.normal_class:
            mask = mask_of(data, split, i, images.shape[-2:])[None, None].to(device)
        marked = torch.cat([view(mask, v) for v in range(views)])
        encoded.append(moments(torch.cat([view(images, v) for v in range(views)]), marked).float().cpu())
        masks.append(marked.byte().cpu())
    row_of = {index: row for row, index in enumerate(chosen)}
    return FewShots(torch.stack(encoded), torch.stack(masks), torch.tensor(list(chosen.values())), row_of)


def is_shot(data: Any, sample: Any) -> bool:
    """Whether a sample is a real defect."""
    return sample.label != data.normal_class and sample.source == "real"


def defect_positions(task: Any, pairs: Iterable[Pair] | None = None) -> dict[Pair, list[tuple[int, str]]]:
    """Positions and names of the real training defects of some pairs, or of all that were learnt.

    Raises:
        UserError: a pair has none.
    """
    data = task.data
    found: dict[Pair, list[tuple[int, str]]] = {pair: [] for pair in sorted(task.pairs if pairs is None else pairs)}
    for position, sample in enumerate(data.samples.get("train", ())):
        pair = (sample.category, sample.defect_type)
        if pair in found and is_shot(data, sample):
            found[pair].append((position, sample.name))
    missing = sorted("/".join(pair) for pair, names in found.items() if not names)
    if missing:
        raise UserError(
            f"no training pictures of {', '.join(missing)}, whose masks a generation needs: use the data options that "
            "the training had (its config.yaml)"
        )
    return found


def mask_of(data: Any, split: str, position: int, size: Any) -> Tensor:
    """The mask (H, W) float of a sample at `size`, made of the file's own, its area kept: no small defect is lost.

    Raises:
        UserError: a mask that marks nothing or everything.
    """
    _, values = data.original(split, position)
    if values is None or not values.any() or values.all():
        name = data.samples[split][position].name
        state = "has no mask" if values is None else "marks nothing" if not values.any() else "marks everything"
        raise UserError(f"the mask of {name} {state}; mend it, or take the picture out of the data set")
    return torch.from_numpy(fit_mask(values > 0, (int(size[0]), int(size[1])))).float()
