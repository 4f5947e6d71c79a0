"""From samples to batches: which samples, in which order, on which process, and where to go on after a stop.

- `TrainBatchSampler`: the order is a function of (seed, epoch) alone, so that any run can be repeated or
  continued. The processes of a run share each global batch: the same samples meet in an optimiser step
  whether one process takes 64 or two take 32 each. An epoch is one pass over the samples, or so many steps
  of the endless row of passes.
- `EvalBatchSampler`: every sample exactly once over all processes, nothing padded, and the same number of
  batches on each, since a process with one batch more would wait for the others forever.
- `BatchLoader`: a stateful loader that a resumed Trainer continues in the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from lit_defect.data.samples import Sample
from lit_defect.errors import DataError
from lit_defect.stopping import shield_worker

Batch = dict[str, Any]
TEXT_FIELDS = ("path", "name", "category", "defect_type", "group", "source")


class Store(Protocol):
    """Decoded pictures or masks by row (see `lit_defect.data.cache`)."""

    def take(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The rows stacked, in an array of their own."""


class DefectDataset(Dataset[Batch]):
    """Batches of one split; indexed with a list of positions, it returns a finished batch.

    Args:
        samples: the split's samples; `index` in a batch is the position here.
        rows: where each sample stands in the stores.
        images: pictures, (H, W, C); None leaves `image` and `mask` out.
        masks: stored mask values, (H, W); None leaves `mask` out.
        prepare_mask: (values (H, W), its sample) -> the mask as it stands in the batch.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        rows: Sequence[int] = (),
        images: Store | None = None,
        masks: Store | None = None,
        prepare_mask: Callable[[npt.NDArray[np.uint8], Sample], npt.NDArray[Any]] | None = None,
    ) -> None:
        self.samples = samples
        self.rows = np.asarray(rows, dtype=np.int64)
        self.images = images
        self.masks = masks
        self.prepare_mask = prepare_mask
        self.labels = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        self.mirror = np.array([sample.mirror for sample in samples], dtype=bool)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Batch:
        """A batch of one."""
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """image (B, 3, H, W) uint8 · mask · label (B,) · index (B,) · lists of str for the identity."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        chosen = [self.samples[i] for i in positions]
        batch: Batch = {"label": self.labels[index], "index": index}
        batch.update({field: [getattr(sample, field) for sample in chosen] for field in TEXT_FIELDS})
        if self.images is None:
            return batch
        pixels = self._take(self.images, positions)  # (B, H, W, C), C is 1 or 3
        batch["image"] = torch.from_numpy(pixels).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
        if self.masks is not None and self.prepare_mask is not None:
            values = self._take(self.masks, positions)  # (B, H, W)
            ready = [self.prepare_mask(value, sample) for value, sample in zip(values, chosen, strict=True)]
            batch["mask"] = torch.from_numpy(np.stack(ready))
        return batch

    def _take(self, store: Store, positions: Sequence[int]) -> npt.NDArray[np.uint8]:
        pixels = store.take(self.rows[np.asarray(positions)])
        mirrored = self.mirror[np.asarray(positions)]
        if mirrored.any():
            pixels[mirrored] = pixels[mirrored][:, :, ::-1]
        return pixels


class TrainBatchSampler:
    """Batches of positions for training, in an order that depends on `seed` and the epoch only.

    The samples are taken in passes, each in an order of its own. Samples that do not fill the last global
    batch of a pass are left out of it (`drop_last`) or make a smaller batch, without the n mod world_size
    that cannot be shared evenly. A set that is smaller than one step gives one smaller step. Every process
    gets the same number of batches, of the same sizes.

    An epoch is one pass, or `batches` steps: epoch e then holds the steps e * batches, ..., of the passes
    laid end to end. A pass that an epoch cuts goes on in the next one, so that samples are seen equally
    often, and two runs of as many steps see the same batches however their steps are counted into epochs.

    Args:
        labels: class of each sample.
        batch_size: samples per process and step.
        kind: `shuffle` takes each sample at most once a pass, hence once a batch; `balanced` draws all
            classes equally often, each class's samples equally often up to one, n in all.
        weights: how often `balanced` draws each class, relative to the others; None for equally often.
        batches: steps of an epoch; None for those of one pass.
        together: batches that an optimizer step adds up; a pass holds a multiple of these.
        fixed: the same order in every epoch (to overfit a few batches on purpose).

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(
        self,
        labels: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        kind: Literal["shuffle", "balanced"] = "shuffle",
        drop_last: bool = True,
        batches: int | None = None,
        together: int = 1,
        fixed: bool = False,
        weights: Mapping[int, float] | None = None,
    ) -> None:
        if len(labels) < world_size:
            raise DataError(f"{len(labels)} training samples cannot be shared by {world_size} processes")
        self.labels = np.asarray(labels)
        self.batch_size = min(batch_size, max(1, len(labels) // (world_size * together)))
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.kind = kind
        self.weights = weights or dict.fromkeys(np.unique(self.labels).tolist(), 1)
        self.fixed = fixed
        self.epoch = 0
        self.start = 0  # the batch of the epoch to begin with
        step = self.batch_size * world_size
        whole, rest = len(labels) // step, (len(labels) % step) // world_size
        whole -= whole % together if drop_last and whole >= together else 0
        self.sizes = [self.batch_size] * whole + ([rest] if rest and not drop_last else [])  # of a pass
        self.batches = len(self.sizes) if batches is None else batches * together

    @property
    def sampler(self) -> TrainBatchSampler:
        """Itself: Lightning announces the epoch to `batch_sampler.sampler`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self.epoch = 0 if self.fixed else epoch

    def order(self, number: int) -> npt.NDArray[np.int64]:
        """Positions of a pass, counted from the start of training, in their order over all processes."""
        rng = np.random.default_rng([self.seed, number])
        if self.kind == "shuffle":
            return rng.permutation(len(self.labels))
        classes = rng.permutation(np.unique(self.labels))
        weights = [self.weights[int(label)] for label in classes]
        counts = [int(len(self.labels) * weight / sum(weights)) for weight in weights]
        draws = []
        for nth, label in enumerate(classes):
            members = np.flatnonzero(self.labels == label)
            count = counts[nth] + (nth < len(self.labels) - sum(counts))  # the first few get the remainder
            rounds = [rng.permutation(members) for _ in range(-(-count // len(members)))]
            draws.append(np.concatenate(rounds)[:count] if rounds else members[:0])
        return rng.permutation(np.concatenate(draws))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        steps = range(self.epoch * self.batches + self.start, (self.epoch + 1) * self.batches)
        order: npt.NDArray[np.int64] | None = None
        for step in steps:
            number, place = divmod(step, len(self.sizes))
            if order is None or place == 0:
                order = self.order(number)
            size = self.sizes[place]
            first = place * self.batch_size * self.world_size + self.rank * size
            yield order[first : first + size].tolist()


class EvalBatchSampler:
    """Batches of positions for evaluation: each sample once over all processes, in a fixed order.

    Process r takes positions r, r + world_size, ... and cuts them into batches of nearly equal size, at
    most `batch_size` (one more where n mod world_size samples do not fit otherwise).

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(self, count: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if count < world_size:
            raise DataError(
                f"{count} samples cannot be evaluated by {world_size} processes: each needs at least one. "
                f"Use at most {count} devices (trainer.devices)."
            )
        smallest, largest = count // world_size, -(-count // world_size)
        batches = min(-(-largest // batch_size), smallest)
        shard = np.arange(rank, count, world_size)
        if batches == -(-len(shard) // batch_size):  # the usual case: full batches, then the rest
            self.batches = [shard[i : i + batch_size].tolist() for i in range(0, len(shard), batch_size)]
        else:
            self.batches = [part.tolist() for part in np.array_split(shard, batches)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)


def _as_is(batch: Any) -> Any:
    return batch


class BatchLoader:
    """Iterates over the batches of a dataset; a Trainer can continue it in the middle of an epoch.

    It is deliberately no `DataLoader` (it holds one): Lightning replaces the sampler of every DataLoader in
    a run of several processes by one that pads, and here the samplers already know their process.

    Where an iteration begins is settled when its first batch is asked for, not by `iter()`: Lightning calls
    `iter()` before it announces the epoch. Under a Trainer `progress` answers, and it alone is right:
    Lightning's own count is the only one that knows whether the step after the last batch was finished, and
    `load_state_dict` is never called when a scheduler asked for `estimated_stepping_batches`, because the
    loader then exists before the checkpoint is read. Without a Trainer the loaded state answers.

    The dataset, too, is made for the first batch: Lightning asks for the training loader before a task
    can have found that it needs no images.

    Args:
        make_dataset: () -> the dataset; one without images is read without workers and without pinning.
        progress: () -> number of batches of the current epoch that are done.
        pin_memory: page-locked batches, for a faster copy to the GPU.
    """

    def __init__(
        self,
        make_dataset: Callable[[], DefectDataset],
        batch_sampler: TrainBatchSampler | EvalBatchSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        progress: Callable[[], int] | None = None,
    ) -> None:
        self.make_dataset = make_dataset
        self.batch_sampler = batch_sampler
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.progress = progress
        self._state = {"epoch": 0, "batches": 0}  # what was handed out last
        self._resume: dict[str, int] | None = None

    def batch(self, positions: Sequence[int]) -> Batch:
        """The batch of these samples, by their positions in the split."""
        return self._dataset.__getitems__(positions)

    @cached_property
    def _dataset(self) -> DefectDataset:  # not `dataset`, which Lightning would look at too early
        return self.make_dataset()

    @cached_property
    def _loader(self) -> DataLoader[Batch]:
        decodes = self._dataset.images is not None
        workers = self.num_workers if decodes else 0
        return DataLoader(
            self._dataset,
            batch_sampler=self.batch_sampler,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=self.pin_memory and decodes,
            persistent_workers=workers > 0,
            worker_init_fn=shield_worker,
            generator=torch.Generator().manual_seed(0),  # otherwise every epoch draws from the global one
        )

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        return self._run()  # a generator: nothing happens before the first batch is asked for

    def _run(self) -> Iterator[Batch]:
        sampler = self.batch_sampler
        if not isinstance(sampler, TrainBatchSampler):
            yield from self._loader
            return
        resume, self._resume = self._resume, None
        loaded = resume["batches"] if resume and resume["epoch"] == sampler.epoch else 0
        sampler.start = self.progress() if self.progress else loaded
        for done, batch in enumerate(self._loader, start=sampler.start + 1):
            self._state = {"epoch": sampler.epoch, "batches": done}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches handed out; workers may have prepared more."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on after `state`: with the rest of its epoch, or with the next one where nothing is left."""
        sampler = self.batch_sampler
        if isinstance(sampler, TrainBatchSampler):
            ended = state["batches"] >= len(sampler)
            self._resume = {"epoch": state["epoch"] + 1, "batches": 0} if ended else dict(state)
            self._state = dict(self._resume)
            sampler.set_epoch(self._resume["epoch"])
