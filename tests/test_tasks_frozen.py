"""Features that several processes compute together, here as threads: whatever folders they have and who else writes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_defect.errors import UserError
from lit_defect.nets.features import FeatureStore
from lit_defect.tasks.frozen import cached_features

COUNT = 12
EXPECTED = torch.arange(COUNT).float()[:, None, None].expand(-1, -1, 2)  # (n, V, D)


class Loader:
    def batch(self, positions: list[int]) -> dict[str, torch.Tensor]:
        return {"image": torch.tensor(positions)}


class Data:
    eval_batch_size = 5
    serve_images = False

    def __init__(self) -> None:
        self.samples = {"train": [f"picture {number}" for number in range(COUNT)]}

    def sample_key(self, sample: str) -> str:
        return sample

    def loader(self, split: str) -> Loader:
        return Loader()


def trainer(rank: int, processes: int, on_a_machine: int, barrier: threading.Barrier, said: list[bool]) -> Any:
    def all_say(own: bool) -> bool:
        said.append(own)
        barrier.wait(20)
        return all(said)

    return SimpleNamespace(
        global_rank=rank, world_size=processes, local_rank=rank % on_a_machine, num_devices=on_a_machine,
        strategy=SimpleNamespace(barrier=lambda name: barrier.wait(20), reduce_boolean_decision=all_say),
    )  # fmt: skip


def together(stores: list[FeatureStore], on_a_machine: int) -> tuple[list[torch.Tensor], list[int]]:
    """What each process gets, and how many pictures each went through the network with."""
    processes, computed = len(stores), [0] * len(stores)
    barrier, said = threading.Barrier(processes), []

    def work(rank: int) -> torch.Tensor:
        def compute(images: torch.Tensor, view: int) -> torch.Tensor:
            computed[rank] += len(images)
            return images.float()[:, None].expand(-1, 2)

        started = trainer(rank, processes, on_a_machine, barrier, said)
        return cached_features(started, Data(), "train", 1, stores[rank], compute)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(work, range(processes))), computed


def open_store(folder: Path) -> FeatureStore:
    return FeatureStore(folder, "net", num_features=2)


def test_processes_that_share_a_folder_share_the_work(tmp_path):
    found, computed = together([open_store(tmp_path) for _ in range(4)], on_a_machine=4)
    assert all(torch.equal(features, EXPECTED) for features in found)
    assert computed == [3, 3, 3, 3]


def test_machines_may_have_a_folder_each(tmp_path):
    found, computed = together([open_store(tmp_path / str(rank // 2)) for rank in range(4)], on_a_machine=2)
    assert all(torch.equal(features, EXPECTED) for features in found)
    assert computed == [6, 6, 6, 6], "each machine has computed every picture once"


def test_another_launch_may_add_while_the_processes_look(tmp_path):
    class Overtaken(FeatureStore):
        looked = False

        def get(self, keys: Any, *, view: int = 0) -> Any:
            if not self.looked:  # another launch has put the first one since the other process has looked
                self.looked = True
                open_store(tmp_path).put(keys[:1], torch.zeros(1, 2))
            return super().get(keys, view=view)

    late = Overtaken(tmp_path, "net", num_features=2)
    early = open_store(tmp_path)
    early.get, late.get = _in_turn(early.get, late.get)
    found, _ = together([early, late], on_a_machine=2)
    assert all(torch.equal(features, EXPECTED) for features in found)


def _in_turn(first: Any, second: Any) -> tuple[Any, Any]:
    """The second is called when the first has been."""
    called = threading.Event()

    def early(*words: Any, **named: Any) -> Any:
        try:
            return first(*words, **named)
        finally:
            called.set()

    def late(*words: Any, **named: Any) -> Any:
        called.wait(20)
        return second(*words, **named)

    return early, late


def test_a_folder_that_cannot_be_written_is_told_with_what_to_do(tmp_path):
    (tmp_path / "features").write_text("no folder")
    with pytest.raises(UserError, match=r"could not be kept.*cache_features"):
        together([open_store(tmp_path)], on_a_machine=1)
    (tmp_path / "features").unlink()
    found, _ = together([open_store(tmp_path)], on_a_machine=1)
    assert torch.equal(found[0], EXPECTED)


def test_where_one_machine_cannot_keep_them_the_others_do_not_wait_for_it(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "features").write_text("no folder")
    with pytest.raises(UserError, match="by another process"):  # says the first one
        together([open_store(tmp_path / str(rank)) for rank in range(2)], on_a_machine=1)
