"""Features of a frozen network for a whole split: read from the disk, or computed once by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_defect.errors import UserError
from lit_defect.nets.features import FeatureStore


def cached_features(
    trainer: Any, data: Any, split: str, views: int, store: FeatureStore, compute: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """(n, V, D) features of a split's n samples in V views; each process computes its share of what is missing.

    What is missing still, the processes of a machine compute that has a folder of its own, and last each for itself:
    where another launch adds to the folder meanwhile, the processes do not see the same, nor share it all out.

    Args:
        trainer: for rank, processes and barriers.
        data: the data module; its `sample_key` names a picture in the store.
        split: train, val or test.
        views: V.
        store: where features are kept.
        compute: (pictures (B, 3, H, W), view) -> features (B, D).

    Raises:
        UserError: the features could not be kept, by this process or another one.
    """
    keys = [data.sample_key(sample) for sample in data.samples[split]]
    alone = (0, 1)
    shares = [(trainer.global_rank, trainer.world_size), (trainer.local_rank, trainer.num_devices), alone]
    reason = ""
    for rank, processes in shares if trainer.world_size > 1 else [alone]:
        for number in range(views):
            _, missing = store.get(keys, view=number)
            trainer.strategy.barrier("features looked up")  # before anybody adds to them
            own = missing[rank::processes].tolist()
            if own and not reason:
                data.serve_images = True
                loader, size = data.loader(split), data.eval_batch_size
                parts = [own[start : start + size] for start in range(0, len(own), size)]
                features = torch.cat([compute(loader.batch(part)["image"], number) for part in parts])
                try:
                    store.put([keys[position] for position in own], features, view=number)
                except OSError as error:
                    reason = f" ({error})"  # told when the others do not wait any more
        trainer.strategy.barrier("features computed")
    found = [store.get(keys, view=number) for number in range(views)]
    kept = not any(len(missing) for _, missing in found)
    everywhere = trainer.strategy.reduce_boolean_decision(kept)  # else the others would wait for those that fail
    if kept and not everywhere:
        raise UserError(f"features of {split} could not be kept by another process; its own message says why")
    if not kept:
        raise UserError(
            f"features of {split} could not be kept in {store.folder}{reason}; "
            "free some space there, or set model.init_args.cache_features to false"
        )
    return torch.stack([features for features, _ in found], dim=1)
