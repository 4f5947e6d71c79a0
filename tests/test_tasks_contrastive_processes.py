"""SimCLR on two processes: steps, scores and figures of one."""

from __future__ import annotations

import copy
import os
import socket
import sys
import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from lit_defect.anomalies import (
    PseudoAnomalies,
    PseudoAnomaly,
)
from lit_defect.scoring.detector import SCORES
from lit_defect.tasks import SimCLR, contrastive
from tests.contrastive import (
    PIXEL,
    fit,
    make_data,
    make_task,
    make_tile,
    make_trainer,
)

WORLD = 2
LOSSES = ["ntxent", "ntxent_hard", "one_class", "classifier"]


class Stripes(PseudoAnomaly):
    """Dark stripes, drawn without chance; every third picture of the data set is rejected."""

    uniforms_of_picture = 1

    def generate(self, images: Tensor, uniforms: Tensor) -> PseudoAnomalies:
        made = images.clone()
        made[..., ::3] *= 0.2
        count = len(images)
        level = (images.mean((1, 2, 3)) * 1e5).long()  # the same picture is judged the same on any process
        one = torch.ones(count)
        masks = made.ne(images).any(1, keepdim=True)
        return PseudoAnomalies(made, masks, one, level % 3 > 0, one, one.long(), one[:, None], one[:, None])


class WithoutNorm(SimCLR):
    """No layer of it mixes the pictures of a batch."""

    def configure_model(self) -> None:
        torch.manual_seed(1)
        super().configure_model()
        self.projection[1] = nn.Identity()


def one_step(root: Path, loss: str, batch_size: int, trainer: Trainer) -> dict[str, Tensor]:
    """How one step of gradient descent moves the weights; every random view is replaced by a known one."""
    task = make_task(
        WithoutNorm, loss=loss, anomaly=Stripes(), norms="frozen", lr=1.0, optimizer="sgd", schedule="constant",
        warmup=0.0, weight_decay=0.0, pose="fixed",
    )  # fmt: skip
    turns = cycle([lambda images, pose: images, lambda images, pose: images.flip(-1)])
    plain, contrastive.contrastive_views = contrastive.contrastive_views, lambda *given: next(turns)(*given)
    before: dict[str, Tensor] = {}

    class Start(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: SimCLR) -> None:
            before.update(copy.deepcopy(dict(pl_module.named_parameters())))

    trainer.callbacks.append(Start())
    try:
        trainer.fit(task, datamodule=make_data(root, val_fraction=0.0, batch_size=batch_size))
    finally:
        contrastive.contrastive_views = plain
    return {name: (value - before[name]).detach() for name, value in task.named_parameters()}


def evaluated(task: SimCLR) -> dict[str, Any]:
    kept = task._evaluation
    return {"names": [s.name for s in kept.samples], **{k: v.tolist() for k, v in kept.scores.items()}, **kept.pixel}


def on_one_rank(rank: int, root: str, folder: str, port: int) -> None:
    """Everything that needs two processes, in one launch."""
    torch.set_num_threads(1)
    warnings.filterwarnings("error", "torch.distributed", FutureWarning)  # about what torch will drop
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
    os.environ["LIT_DEFECT_CACHE"] = f"{folder}/cache{rank}"
    two = {"devices": WORLD, "strategy": "ddp"}
    found: dict[str, Any] = {}
    for loss in LOSSES:
        seed_everything(0, verbose=False)
        trainer = make_trainer(limit_train_batches=1, **two)
        found[loss] = one_step(Path(root), loss, 7, trainer)
    task = make_task()
    trainer = fit(task, make_data(Path(root)), epochs=2, limit_val_batches=0, **two)  # DDP joins the norms to validate
    trainer.save_checkpoint(f"{folder}/two.ckpt")
    found["state"] = copy.deepcopy(task.state_dict())
    trainer.test(task, datamodule=make_data(Path(root)), verbose=False)
    found["test"] = evaluated(task)
    plain = make_task(loss="none")
    fit(plain, make_data(Path(root)), epochs=2, **two)
    found["none"] = plain.detector.fitted
    torch.save(found, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def on_two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]]]:
    """Root of the data, folder of the checkpoint, and what each process found."""
    folder = tmp_path_factory.mktemp("processes")
    root = make_tile(folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A fork has all modules already, but no process may fork once its autograd has threads for a GPU.
    way = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    torch.multiprocessing.start_processes(on_one_rank, (str(root), str(folder), port), WORLD, start_method=way)
    return root, folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_step_like_one(on_two_processes, loss):
    root, _, found = on_two_processes
    seed_everything(0, verbose=False)
    expected = one_step(root, loss, 14, make_trainer(limit_train_batches=1))
    largest = max(float(step.abs().max()) for step in expected.values())
    assert largest > 1e-4
    for steps in found:
        for name, step in steps[loss].items():
            torch.testing.assert_close(step, expected[name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def test_two_processes_hold_one_detector(on_two_processes):
    root, folder, found = on_two_processes
    first, second = (each["state"] for each in found)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    # It is that of one process with the same weights.
    task, data = make_task(), make_data(root)
    trainer = make_trainer()
    trainer.test(task, datamodule=data, ckpt_path=folder / "two.ckpt", verbose=False)
    fitted = copy.deepcopy(task.state_dict())
    task._fit_detector()
    for key, value in task.state_dict().items():
        torch.testing.assert_close(fitted[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_two_processes_test_like_one(on_two_processes):
    root, folder, found = on_two_processes
    task = make_task()
    make_trainer().test(task, datamodule=make_data(root), ckpt_path=folder / "two.ckpt", verbose=False)
    alone = evaluated(task)
    assert len(alone["names"]) == 13, "an odd number, so that one process has a picture more"
    for together in (each["test"] for each in found):
        assert together["names"] == alone["names"]
        for name in SCORES:
            np.testing.assert_allclose(together[name], alone[name], rtol=1e-4)
        for name in PIXEL:
            assert together[name] == pytest.approx(alone[name], abs=1e-6)


def test_two_processes_need_nothing_to_train(on_two_processes):
    assert all(each["none"] for each in on_two_processes[2])
