"""The feature store: identity, damage, concurrent writers, speed."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from lit_defect.nets.features import FeatureStore


def keys(n: int, start: int = 0) -> list[str]:
    return [f"folder/image {i}.png|1234|{i}" for i in range(start, start + n)]


def parts(store: FeatureStore) -> list[Path]:
    return sorted(store.folder.glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_come_back_in_the_order_asked(tmp_path, dtype):
    store = FeatureStore(tmp_path, "net", num_features=4, dtype=dtype)
    rows = torch.randn(10, 4)
    store.put(keys(6), rows[:6])
    store.put(keys(4, 6), rows[6:])
    order = torch.randperm(10)
    asked = [keys(10)[i] for i in order]
    for again in (store, FeatureStore(tmp_path, "net", num_features=4, dtype=dtype)):
        features, missing = again.get(asked)
        assert torch.equal(features, rows[order].to(dtype))
        assert missing.tolist() == []


def test_missing_and_repeated_keys(tmp_path):
    store = FeatureStore(tmp_path, "net", num_features=2)
    features, missing = store.get(["a", "b"])
    assert features.tolist() == [[0, 0], [0, 0]]
    assert missing.tolist() == [0, 1]
    store.put(["b"], torch.tensor([[1.0, 2.0]]))
    features, missing = store.get(["a", "b", "a", "b"])
    assert features.tolist() == [[0, 0], [1, 2], [0, 0], [1, 2]]
    assert missing.tolist() == [0, 2]
    features, missing = store.get([])
    assert features.shape == (0, 2)
    assert missing.shape == (0,)
    store.put([], torch.zeros(0, 2))
    assert len(parts(store)) == 1


def test_views_keys_and_types_do_not_mix(tmp_path):
    store = FeatureStore(tmp_path, "net", num_features=2)
    store.put(["a"], torch.ones(1, 2))
    store.put(["a"], torch.full((1, 2), 5.0), view=1)
    assert store.get(["a"])[0].tolist() == [[1, 1]]
    assert store.get(["a"], view=1)[0].tolist() == [[5, 5]]
    assert store.get(["a"], view=2)[1].tolist() == [0]
    for other in (
        FeatureStore(tmp_path, "other net", num_features=2),
        FeatureStore(tmp_path, "net", num_features=3),
        FeatureStore(tmp_path, "net", num_features=2, dtype=torch.float16),
    ):
        assert other.get(["a"])[1].tolist() == [0]


def test_what_another_process_wrote_is_seen(tmp_path):
    first, second = (FeatureStore(tmp_path, "net", num_features=2) for _ in range(2))
    assert first.get(["a"])[1].tolist() == [0]
    second.put(["a"], torch.ones(1, 2))
    assert first.get(["a"])[1].tolist() == []


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another file"])
def test_damaged_part_is_dropped_and_rebuilt(tmp_path, caplog, damage):
    store = FeatureStore(tmp_path, "net", num_features=8)
    store.put(["a"], torch.ones(1, 8))
    store.put(["b"], torch.ones(1, 8))
    victim = next(p for p in parts(store) if _holds(p, store, "b"))
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(content[:-5])
    elif damage == "flipped":
        content[-1] ^= 1
        victim.write_bytes(content)
    else:
        victim.write_bytes(b"" if damage == "empty" else b"hello" * 100)
    again = FeatureStore(tmp_path, "net", num_features=8)
    with caplog.at_level(logging.WARNING):
        features, missing = again.get(["a", "b"])
    assert "damaged" in caplog.text
    assert missing.tolist() == [1]
    assert features[0].tolist() == [1] * 8
    assert not victim.exists()
    again.put(["b"], torch.full((1, 8), 2.0))
    assert again.get(["b"])[0].tolist() == [[2] * 8]


def test_a_part_that_cannot_be_opened_for_now_is_not_dropped(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path, "net", num_features=8)
    store.put(["a"], torch.ones(1, 8))

    def busy(*_: object) -> None:
        raise OSError("Too many open files")

    again = FeatureStore(tmp_path, "net", num_features=8)
    with monkeypatch.context() as patch:
        patch.setattr(again, "_read", busy)
        assert again.get(["a"])[1].tolist() == [0]
    assert again.get(["a"])[1].tolist() == []


def _holds(path: Path, store: FeatureStore, key: str) -> bool:
    alone = FeatureStore(store.folder.parents[1] / "alone", "net", num_features=store.num_features)
    alone.folder.mkdir(parents=True, exist_ok=True)
    for old in parts(alone):
        old.unlink()
    (alone.folder / path.name).write_bytes(path.read_bytes())
    return len(alone.get([key])[1]) == 0


def test_half_written_parts_are_ignored_and_swept(tmp_path):
    store = FeatureStore(tmp_path, "net", num_features=2)
    store.put(["a"], torch.ones(1, 2))
    fresh, old = (store.folder / f"{name}.unfinished" for name in ("fresh", "old"))
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    store.put(["b"], torch.ones(1, 2))
    assert store.get(["a", "b"])[1].tolist() == []
    assert fresh.exists()
    assert not old.exists()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.ones(2, 3), "expected"),
        (torch.ones(1, 2), "expected"),
        (torch.tensor([[1.0, float("nan")]] * 2), "not finite"),
        (torch.full((2, 2), 1e6), "not finite"),
    ],
)
def test_bad_features(tmp_path, features, message):
    store = FeatureStore(tmp_path, "net", num_features=2, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        store.put(["a", "b"], features)
    assert parts(store) == []


def _write(folder: str) -> None:
    store = FeatureStore(folder, "net", num_features=3)
    for start in range(0, 40, 10):  # every worker writes the same images
        store.get(keys(40))
        store.put(keys(10, start), torch.arange(start, start + 10.0)[:, None].expand(-1, 3))


def test_concurrent_writers(tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        list(pool.map(_write, [str(tmp_path)] * 4))
    features, missing = FeatureStore(tmp_path, "net", num_features=3).get(keys(40))
    assert missing.tolist() == []
    assert features[:, 0].tolist() == list(range(40))


def test_lookup_of_many_keys_is_fast(tmp_path):
    store = FeatureStore(tmp_path, "net", num_features=4)
    rows = torch.randn(100_000, 4)
    many = keys(100_000)
    for start in range(0, 100_000, 5000):
        store.put(many[start : start + 5000], rows[start : start + 5000])
    fresh = FeatureStore(tmp_path, "net", num_features=4)
    start_time = time.perf_counter()
    features, missing = fresh.get(many)
    assert time.perf_counter() - start_time < 10  # about 0.5 s on an idle core
    assert torch.equal(features, rows)
    assert len(missing) == 0
