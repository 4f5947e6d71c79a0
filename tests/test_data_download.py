"""A download is complete, checked and inside its folder, or it is not there at all."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lit_defect.data import download
from lit_defect.data.download import Archive, fetch_archive
from lit_defect.errors import DataError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def pack(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:xz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def archive(url: str, digest: str) -> Archive:
    return Archive(
        title="Toys",
        urls=(url,),
        algorithm="sha256",
        digest=digest,
        licence="CC0.",
        page="https://toys.example/page",
        tree="  tile/train/good/000.png",
    )


def test_an_archive_is_fetched_and_merged(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    digest = pack(folder / "toys.tar.xz", {"kit/a/1.txt": b"one", "kit/b.txt": b"two"})
    root = tmp_path / "data"
    (root / "kit").mkdir(parents=True)
    (root / "kit" / "own.txt").write_text("kept")
    fetch_archive(archive(f"{url}/toys.tar.xz", digest), root)
    found = {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*.txt")}
    assert found == {"kit/a/1.txt": "one", "kit/b.txt": "two", "kit/own.txt": "kept"}
    assert [p.name for p in root.iterdir()] == ["kit"]  # nothing temporary is left


def test_another_process_that_fetches_the_same_does_not_make_a_folder_in_a_folder(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    digest = pack(folder / "toys.tar.xz", {"kit/a/1.txt": b"one", "kit/b.txt": b"two"})
    root = tmp_path / "data"

    def overtaken(move: Callable) -> Callable:
        def late(child: Path, place: Path) -> object:
            if child.name == "kit":  # the other one is a moment earlier
                (root / "kit" / "a").mkdir(parents=True)
                (root / "kit" / "a" / "1.txt").write_text("one")
            return move(child, place)

        return late

    monkeypatch.setattr(download.shutil, "move", overtaken(download.shutil.move))
    monkeypatch.setattr(Path, "replace", overtaken(Path.replace))
    fetch_archive(archive(f"{url}/toys.tar.xz", digest), root)
    found = {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*.txt")}
    assert found == {"kit/a/1.txt": "one", "kit/b.txt": "two"}


def test_the_second_address_serves_when_the_first_does_not(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    digest = pack(folder / "toys.tar.xz", {"b.txt": b"two"})
    pack(folder / "wrong.tar.xz", {"b.txt": b"other"})
    names = ("missing", "wrong", "toys")
    both = replace(archive("", digest), urls=tuple(f"{url}/{name}.tar.xz" for name in names))
    fetch_archive(both, tmp_path / "data")
    assert (tmp_path / "data" / "b.txt").read_text() == "two"


def test_a_wrong_checksum_leaves_nothing(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    digest = pack(folder / "toys.tar.xz", {"b.txt": b"two"})
    with pytest.raises(DataError, match=f"sha256 of the file is {digest}"):
        fetch_archive(archive(f"{url}/toys.tar.xz", "0" * 64), tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_unreachable_host_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT", 2.0)
    with pytest.raises(DataError) as caught:
        fetch_archive(archive("http://127.0.0.1:9/toys.tar.xz", "0" * 64), tmp_path / "data")
    text = str(caught.value)
    for part in ("127.0.0.1:9", "https://toys.example/page", "sha256 000", "tile/train/good/000.png"):
        assert part in text
    assert f"{tmp_path / 'data'}/\n" in text


@pytest.mark.parametrize("name", ["../evil.txt", "kit/../../../evil.txt"])
def test_an_archive_cannot_write_outside(served: tuple[Path, str], tmp_path: Path, name: str) -> None:
    folder, url = served
    digest = pack(folder / "toys.tar.xz", {name: b"evil"})
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch_archive(archive(f"{url}/toys.tar.xz", digest), tmp_path / "deep" / "data")
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_damaged_archive(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    (folder / "toys.tar.xz").write_bytes(b"not a tar file")
    digest = hashlib.sha256(b"not a tar file").hexdigest()
    with pytest.raises(DataError, match="cannot be unpacked"):
        fetch_archive(archive(f"{url}/toys.tar.xz", digest), tmp_path / "data")


def test_a_folder_that_cannot_be_made(served: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be stored"):
        fetch_archive(archive(served[1], "0" * 64), tmp_path / "file" / "data")
