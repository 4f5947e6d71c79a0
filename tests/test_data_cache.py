"""The three stores give the same pixels; a cache that would not fit, or was interrupted, does no harm."""

import errno
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lit_defect.claims import Held
from lit_defect.data import cache
from lit_defect.data.cache import PixelStore, disk_store, ram_store
from lit_defect.errors import DataError

RNG = np.random.default_rng(0)
EVEN = [RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in range(6)]
MIXED = [RNG.integers(0, 256, (4 + i % 2, 6, 1), dtype=np.uint8) for i in range(6)]


class Reader:
    """Counts how often each row is decoded."""

    def __init__(self, rows):
        self.rows = rows
        self.asked = []

    def __call__(self, row):
        self.asked.append(row)
        return self.rows[row]


def shapes(rows):
    return [row.shape for row in rows]


@pytest.fixture(params=["off", "ram", "disk"])
def open_store(request, tmp_path):
    def build(rows):
        if request.param == "disk":
            return disk_store(tmp_path / "deep" / "pixels.u8", shapes(rows), Reader(rows))
        return (ram_store if request.param == "ram" else PixelStore)(shapes(rows), Reader(rows))

    return build


def test_rows_come_stacked_in_the_order_asked_for(open_store):
    store = open_store(EVEN)
    np.testing.assert_array_equal(store.take([4, 0, 4]), np.stack([EVEN[4], EVEN[0], EVEN[4]]))


def test_batches_belong_to_the_caller(open_store):
    store = open_store(EVEN)
    store.take([2])[...] = 0
    np.testing.assert_array_equal(store.take([2])[0], EVEN[2])
    store.take(np.array([1]))[...] = 7
    np.testing.assert_array_equal(store.take([1])[0], EVEN[1])


def test_rows_of_different_sizes_cannot_share_a_batch(open_store):
    store = open_store(MIXED)
    np.testing.assert_array_equal(store.take([0, 2]), np.stack([MIXED[0], MIXED[2]]))
    np.testing.assert_array_equal(store.take([1]), MIXED[1][None])
    with pytest.raises(DataError, match=r"6x4, 6x5.*data\.image_size"):
        store.take([0, 1])


def test_ram_decodes_a_row_once_and_only_when_asked():
    reader = Reader(EVEN)
    store = ram_store(shapes(EVEN), reader)
    store.take([1, 3, 1])
    store.take([3, 5])
    assert sorted(reader.asked) == [1, 3, 5]


def test_ram_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(cache, "available_memory", lambda: 1000)
    ram_store(shapes(EVEN), Reader(EVEN))  # 630 bytes
    with pytest.raises(DataError, match=r"data\.cache=disk"):
        ram_store(shapes(EVEN), Reader(EVEN), copies=2)


def test_available_memory_is_less_than_the_machine_has():
    free = cache.available_memory()
    assert free is None or 2**20 < free < 2**50


def test_disk_is_decoded_once_for_all_runs(tmp_path):
    path = tmp_path / "pixels.u8"
    first, second = Reader(EVEN), Reader(EVEN)
    disk_store(path, shapes(EVEN), first)
    store = disk_store(path, shapes(EVEN), second)
    assert sorted(first.asked) == list(range(6))
    np.testing.assert_array_equal(store.take(range(6)), np.stack(EVEN))
    assert second.asked == []
    assert path.stat().st_size == sum(row.size for row in EVEN)


def test_interrupted_build_leaves_nothing_and_is_done_again(tmp_path):
    path = tmp_path / "pixels.u8"

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disk_store(path, shapes(EVEN), stop)
    assert [left.name for left in tmp_path.iterdir()] == ["claims"]
    path.write_bytes(b"of another length")
    np.testing.assert_array_equal(disk_store(path, shapes(EVEN), Reader(EVEN)).take([3]), EVEN[3][None])


def test_of_several_at_once_one_decodes_and_the_others_wait(tmp_path):
    path, together = tmp_path / "pixels.u8", threading.Barrier(5)
    readers = [Reader(EVEN) for _ in range(5)]

    def use(reader):
        together.wait()
        return disk_store(path, shapes(EVEN), reader).take(range(6))

    with ThreadPoolExecutor(5) as pool:
        for found in pool.map(use, readers):
            np.testing.assert_array_equal(found, np.stack(EVEN))
    assert sorted(row for reader in readers for row in reader.asked) == list(range(6))
    assert path.stat().st_mode & 0o044 == 0o044 & ~umask(), "others of a shared folder may read it"


def test_whoever_waits_says_so(tmp_path, monkeypatch):
    path, begun, said = tmp_path / "pixels.u8", threading.Event(), threading.Event()

    def slow(row):
        begun.set()
        assert said.wait(timeout=20)
        return EVEN[row]

    monkeypatch.setattr(cache, "say", lambda text: said.set() if "waits for" in text else None)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(disk_store, path, shapes(EVEN), slow)
        assert begun.wait(timeout=20)
        disk_store(path, shapes(EVEN), Reader(EVEN))
        first.result()


def test_a_killed_build_is_taken_over_at_once_and_leaves_nothing(tmp_path):
    path = tmp_path / "pixels.u8"

    def die(row):
        os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        try:
            disk_store(path, shapes(EVEN), die)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [left.name[:11] for left in tmp_path.iterdir() if left.name != "claims"] == [".pixels.u8."]
    np.testing.assert_array_equal(disk_store(path, shapes(EVEN), Reader(EVEN)).take([3]), EVEN[3][None])
    assert {left.name for left in tmp_path.iterdir()} == {"claims", "pixels.u8"}


def test_a_disk_that_others_fill_meanwhile_is_an_error_and_not_a_crash(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.os, "posix_fallocate", full)
    for _ in range(2):  # the first has given back what it had claimed
        with pytest.raises(DataError, match=r"No space left .* data\.cache_dir"):
            disk_store(tmp_path / "pixels.u8", shapes(EVEN), Reader(EVEN))
    assert [left.name for left in tmp_path.iterdir()] == ["claims"]


def test_what_a_full_disk_leaves_claimed_does_not_keep_this_process_waiting_for_itself(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "posix_fallocate", full)
        patched.setattr(Held, "release", full)
        with pytest.raises(DataError, match="No space left"):
            disk_store(tmp_path / "pixels.u8", shapes(EVEN), Reader(EVEN))
    monkeypatch.setattr(cache.time, "sleep", lambda _: pytest.fail("it waits"))
    np.testing.assert_array_equal(
        disk_store(tmp_path / "pixels.u8", shapes(EVEN), Reader(EVEN)).take([3]), EVEN[3][None]
    )


def test_a_build_that_has_slept_while_another_took_over_uses_what_that_one_made(tmp_path, monkeypatch):
    path, asleep, wakes = tmp_path / "pixels.u8", threading.Event(), threading.Event()

    def slow(row):
        asleep.set()
        wakes.wait()
        return EVEN[row]

    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(disk_store, path, shapes(EVEN), slow)
        asleep.wait()
        monkeypatch.setattr(cache.Claims, "is_dead", lambda *_: True)  # as after minutes without a sign of life
        disk_store(path, shapes(EVEN), Reader(EVEN))
        wakes.set()
        np.testing.assert_array_equal(late.result(timeout=20).take([3]), EVEN[3][None])


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_disk_says_what_to_do_without_room_or_access(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        disk_store(tmp_path / "file" / "pixels.u8", shapes(EVEN), Reader(EVEN))
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: cache.shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(DataError, match="are free"):
        disk_store(tmp_path / "pixels.u8", shapes(EVEN), Reader(EVEN))


def test_in_threads_keeps_the_order():
    assert cache.in_threads(lambda n: n * n, range(50)) == [n * n for n in range(50)]
