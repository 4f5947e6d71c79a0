"""Order, sharing between processes, and going on after a stop: bit for bit as without the stop."""

from itertools import chain, islice

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_defect.data.cache import PixelStore
from lit_defect.data.loading import BatchLoader, DefectDataset, EvalBatchSampler, TrainBatchSampler
from lit_defect.data.samples import Sample
from lit_defect.errors import DataError

LABELS = [0] * 17 + [1] * 5


def items(labels=LABELS):
    return [Sample(path=f"/{i}", name=str(i), label=label) for i, label in enumerate(labels)]


def trained(epoch=0, rank=0, world_size=1, **kwargs):
    sampler = TrainBatchSampler(LABELS, **{"batch_size": 4, "seed": 3} | kwargs, rank=rank, world_size=world_size)
    sampler.set_epoch(epoch)
    return list(sampler)


# ---- order of training ----------------------------------------------------------------------------------


def test_an_epoch_takes_each_sample_once_and_epochs_differ():
    first, second = trained(0, drop_last=False), trained(1, drop_last=False)
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(22))
    assert first != second
    assert [len(batch) for batch in first] == [4, 4, 4, 4, 4, 2]
    assert [len(batch) for batch in trained()] == [4] * 5


def test_order_depends_on_seed_and_epoch_only():
    torch.manual_seed(1)
    np.random.seed(1)
    first = trained(2)
    torch.manual_seed(2)
    np.random.seed(2)
    assert trained(2) == first
    assert trained(2, seed=4) != first
    assert trained(0, fixed=True) == trained(5, fixed=True)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_global_batch_evenly(world_size, drop_last):
    shares = [trained(1, rank, world_size, batch_size=3, drop_last=drop_last) for rank in range(world_size)]
    sizes = [[len(batch) for batch in share] for share in shares]
    assert all(size == sizes[0] for size in sizes)
    together = [list(chain(*step)) for step in zip(*shares, strict=True)]
    alone = trained(1, batch_size=3 * world_size, drop_last=drop_last)
    assert together[:-1] == alone[: len(together) - 1]  # the same optimiser steps as in one process
    left_out = 22 - len(set(chain(*together)))
    assert left_out == (22 % (3 * world_size) if drop_last else 22 % world_size)


def test_balanced_draws_classes_equally_often_and_their_samples_evenly():
    drawn = list(chain(*trained(4, kind="balanced", batch_size=11)))
    labels = np.array(LABELS)[drawn]
    assert (labels == 1).sum() == 11
    times = np.bincount(drawn, minlength=22)
    assert set(times[:17]) == {0, 1}
    assert set(times[17:]) == {2, 3}


def test_small_sets_still_train_and_too_few_samples_are_an_error():
    assert [len(batch) for batch in TrainBatchSampler([0, 1, 1], batch_size=32, seed=0)] == [3]
    pair = [list(TrainBatchSampler([0] * 5, batch_size=32, seed=0, rank=r, world_size=2)) for r in (0, 1)]
    assert [[len(batch) for batch in share] for share in pair] == [[2], [2]]
    added_up = list(TrainBatchSampler([0] * 50, batch_size=32, seed=0, together=2))
    (alone,) = TrainBatchSampler([0] * 50, batch_size=64, seed=0)
    assert sorted(chain(*added_up)) == sorted(alone), "one step of all, in two parts"
    assert [len(batch) for batch in added_up] == [25, 25]
    with pytest.raises(DataError, match="3 processes"):
        TrainBatchSampler([0, 1], batch_size=1, seed=0, world_size=3)


# ---- epochs of a given length ----------------------------------------------------------------------------


def row_of_passes(steps, **kwargs):
    """The batches of passes laid end to end, worked out from epochs of one pass each."""
    return list(islice(chain.from_iterable(trained(epoch, **kwargs) for epoch in range(steps)), steps))


@pytest.mark.parametrize("batches", [1, 3, 5, 7, 16])
@pytest.mark.parametrize("kind", ["shuffle", "balanced"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_of_a_given_length_are_cut_out_of_the_row_of_passes(batches, kind, drop_last):
    settings = {"kind": kind, "drop_last": drop_last}
    epochs = [trained(epoch, batches=batches, **settings) for epoch in range(4)]
    assert [len(epoch) for epoch in epochs] == [batches] * 4
    assert list(chain(*epochs)) == row_of_passes(4 * batches, **settings)


def test_no_batch_holds_a_sample_twice_and_all_are_seen_equally_often():
    epochs = [trained(epoch, batches=13, batch_size=11) for epoch in range(4)]  # 26 passes of two batches
    assert all(len(set(batch)) == 11 for epoch in epochs for batch in epoch)
    assert set(np.bincount(list(chain(*chain(*epochs))))) == {26}
    assert epochs[0] != epochs[1]


def test_a_set_smaller_than_a_batch_fills_an_epoch_with_passes():
    sampler = TrainBatchSampler([0] * 6, batch_size=32, seed=0, batches=10)
    assert len(sampler) == 10
    batches = list(sampler)
    assert [sorted(batch) for batch in batches] == [list(range(6))] * 10
    assert len(set(map(tuple, batches))) > 5  # each pass has an order of its own


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_processes_share_the_batches_of_an_epoch_of_a_given_length(world_size, drop_last):
    kwargs = {"batch_size": 3, "batches": 8, "drop_last": drop_last}
    shares = [trained(2, rank, world_size, **kwargs) for rank in range(world_size)]
    assert [len(share) for share in shares] == [8] * world_size
    together = [list(chain(*step)) for step in zip(*shares, strict=True)]
    assert all(len({len(batch) for batch in step}) == 1 for step in zip(*shares, strict=True))
    assert all(len(set(batch)) == len(batch) for batch in together)
    if drop_last:
        assert together == trained(2, batch_size=3 * world_size, batches=8)


def test_a_fixed_order_repeats_its_epoch():
    assert trained(0, fixed=True, batches=7) == trained(5, fixed=True, batches=7) == trained(0, batches=7)


# ---- evaluation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_evaluation_takes_each_sample_once_with_as_many_batches_everywhere(world_size, batch_size):
    for count in range(world_size, 40):
        shards = [
            list(EvalBatchSampler(count, batch_size=batch_size, rank=r, world_size=world_size))
            for r in range(world_size)
        ]
        assert sorted(chain(*chain(*shards))) == list(range(count))
        assert len({len(shard) for shard in shards}) == 1
        assert max(len(batch) for shard in shards for batch in shard) <= batch_size + (batch_size == 1)
        assert min(len(batch) for shard in shards for batch in shard) >= 1
        sizes = [sum(map(len, shard)) for shard in shards]
        assert max(sizes) - min(sizes) <= 1


def test_evaluation_on_one_process_keeps_the_order():
    assert list(EvalBatchSampler(5, batch_size=2)) == [[0, 1], [2, 3], [4]]


def test_fewer_samples_than_processes_is_an_error():
    with pytest.raises(DataError, match=r"trainer\.devices"):
        EvalBatchSampler(1, batch_size=4, world_size=2)


# ---- batches --------------------------------------------------------------------------------------------


def test_batch_holds_pixels_masks_and_identity():
    pixels = np.arange(2 * 4 * 5, dtype=np.uint8).reshape(2, 4, 5)
    samples = [
        Sample(path="/a", name="a", label=0, category="tile", defect_type="good", group="g"),
        Sample(path="/a", name="a#mirrored", label=1, mirror=True),
        Sample(path="/b", name="b", label=1),
    ]
    dataset = DefectDataset(
        samples,
        rows=[0, 0, 1],
        images=PixelStore([(4, 5, 1)] * 2, lambda row: pixels[row][..., None]),
        masks=PixelStore([(4, 5)] * 2, lambda row: pixels[row] % 2),
        prepare_mask=lambda values, sample: values[None],
    )
    batch = dataset.__getitems__([2, 1, 0])
    assert batch["image"].shape == (3, 3, 4, 5)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    for channel in range(3):
        np.testing.assert_array_equal(batch["image"][0, channel], pixels[1])
        np.testing.assert_array_equal(batch["image"][1, channel], pixels[0][:, ::-1])
    np.testing.assert_array_equal(batch["mask"][1, 0], pixels[0][:, ::-1] % 2)
    assert batch["label"].tolist() == [1, 1, 0]
    assert batch["index"].tolist() == [2, 1, 0]
    assert batch["name"] == ["b", "a#mirrored", "a"]
    assert batch["group"] == ["", "", "g"]
    assert batch["source"] == ["real"] * 3
    assert {"path", "category", "defect_type"} <= set(batch)


def test_without_stores_only_identity_is_served():
    batch = DefectDataset(items())[3]
    assert "image" not in batch
    assert batch["name"] == ["3"]


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batches", [None, 4, 12])
def test_state_leads_back_to_the_same_batch(workers, batches):
    def build():
        sampler = TrainBatchSampler(LABELS, batch_size=4, seed=3, batches=batches)
        return BatchLoader(lambda: DefectDataset(items()), sampler, num_workers=workers)

    loader = build()
    loader.batch_sampler.set_epoch(2)
    iterator = iter(loader)
    seen = [next(iterator)["index"].tolist() for _ in range(3)]
    state = loader.state_dict()
    assert state == {"epoch": 2, "batches": 3}  # not what the workers have prepared
    rest = [batch["index"].tolist() for batch in iterator]
    assert seen + rest == trained(2, batches=batches)

    other = build()
    other.load_state_dict(state)
    assert indices(other) == rest
    assert indices(other) == trained(2, batches=batches)  # only the first iteration is a continuation
    other.load_state_dict(loader.state_dict())  # at the end of epoch 2
    assert indices(other) == trained(3, batches=batches)


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    indices(BatchLoader(lambda: DefectDataset(items()), EvalBatchSampler(22, batch_size=4)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- under a Trainer ------------------------------------------------------------------------------------


class ToyData(pl.LightningDataModule):
    """22 samples without pictures."""

    def __init__(self, workers=0, batches=None):
        super().__init__()
        self.workers = workers
        self.batches = batches

    def done(self):
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def train_dataloader(self):
        sampler = TrainBatchSampler(LABELS, batch_size=4, seed=3, batches=self.batches)
        return BatchLoader(lambda: DefectDataset(items()), sampler, num_workers=self.workers, progress=self.done)

    def val_dataloader(self):
        return BatchLoader(lambda: DefectDataset(items()), EvalBatchSampler(22, batch_size=8))


class ToyTask(pl.LightningModule):
    """A linear layer under Adam and a cosine schedule, which asks for the length of training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(8, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        x = torch.sin(batch["index"][:, None] * torch.arange(1.0, 9))
        return ((self.layer(x)[:, 0] - batch["label"]) ** 2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", batch["label"].float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        steps = self.trainer.estimated_stepping_batches  # makes the loader before the checkpoint is read
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Killed(Exception):  # noqa: N818
    """Stands for the end of the process."""


class KillAt(Callback):
    """Saves a checkpoint in a hook at a step, then ends the run."""

    def __init__(self, hook, step, path):
        self.step, self.path = step, path
        setattr(self, hook, self.kill)

    def kill(self, trainer, *args, **kwargs):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Killed


def fit(task, data, folder, callbacks=(), ckpt_path=None, **kwargs):
    trainer = pl.Trainer(
        **{"max_epochs": 3} | kwargs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        default_root_dir=folder,
    )
    trainer.fit(task, data, ckpt_path=ckpt_path)
    return task


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.parameters()])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of 3 epochs of 5 steps without a stop."""
    return fit(ToyTask(), ToyData(), tmp_path_factory.mktemp("straight"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("hook", "step", "workers"),
    [
        ("on_train_batch_end", 1, 0),
        ("on_train_batch_end", 7, 0),
        ("on_train_batch_end", 7, 2),
        ("on_train_batch_end", 10, 0),  # the last batch of an epoch
        ("on_before_optimizer_step", 8, 0),  # in the middle of a step, which is then repeated
        ("on_validation_start", 5, 0),
        ("on_validation_end", 10, 2),
        ("on_train_epoch_end", 5, 0),
    ],
)
def test_resumed_run_ends_with_the_same_weights(straight, tmp_path, hook, step, workers):
    path = tmp_path / "stopped.ckpt"
    first = ToyTask()
    with pytest.raises(Killed):
        fit(first, ToyData(workers), tmp_path, [KillAt(hook, step, path)])
    second = fit(ToyTask(), ToyData(workers), tmp_path, ckpt_path=path)
    assert first.seen[:step] + second.seen == straight.seen
    assert torch.equal(weights(second), weights(straight))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("hook", "step", "workers"), [("on_train_batch_end", 12, 0), ("on_validation_end", 14, 2)])
def test_a_run_with_epochs_of_a_given_length_resumes_in_the_middle_of_a_pass(tmp_path, hook, step, workers):
    whole = fit(ToyTask(), ToyData(batches=7), tmp_path)
    assert whole.seen == row_of_passes(21)
    path = tmp_path / "stopped.ckpt"
    first = ToyTask()
    with pytest.raises(Killed):
        fit(first, ToyData(workers, batches=7), tmp_path, [KillAt(hook, step, path)])
    second = fit(ToyTask(), ToyData(workers, batches=7), tmp_path, ckpt_path=path)
    assert first.seen[:step] + second.seen == whole.seen
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kwargs", [{}, {"limit_train_batches": 4}, {"accumulate_grad_batches": 2}])
def test_every_checkpoint_of_lightnings_own_callback_resumes(tmp_path, kwargs):
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=2, filename="{step}")
    whole = fit(ToyTask(), ToyData(), tmp_path, [every], **kwargs)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 4
    for path in paths:
        torch.load(path, weights_only=True)
        assert torch.equal(weights(fit(ToyTask(), ToyData(), tmp_path, ckpt_path=path, **kwargs)), weights(whole))


@pytest.mark.filterwarnings("ignore")
def test_finished_run_can_be_prolonged(straight, tmp_path):
    every = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    short = fit(ToyTask(), ToyData(), tmp_path, [every], max_epochs=2)
    assert short.seen == straight.seen[:10]
    longer = fit(ToyTask(), ToyData(), tmp_path, ckpt_path=max(tmp_path.glob("*.ckpt"), key=lambda p: p.name))
    assert longer.seen == straight.seen[10:]
