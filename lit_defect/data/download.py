"""Public data sets, fetched once: by checksum, with their licence in the log, and never half of one.

`fetch_archive` loads into a temporary folder beside the data, compares the checksum, unpacks and only then
moves the folders into place. A download that is cut off leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from lit_defect.errors import DataError

log = logging.getLogger(__name__)

TIMEOUT = 20.0  # seconds without an answer
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A tar archive on the internet.

    Attributes:
        title: the data set's name.
        urls: addresses of the same file, tried in this order.
        algorithm, digest: the checksum that the file must have, such as `sha256` and 64 hex digits.
        licence: one sentence for the log.
        page: where a person finds the file.
        tree: how the folder must look if it is unpacked by hand.
    """

    title: str
    urls: tuple[str, ...]
    algorithm: str
    digest: str
    licence: str
    page: str
    tree: str


def fetch_archive(archive: Archive, root: Path) -> None:
    """Downloads and unpacks the archive into `root`; files that are there already are replaced.

    Raises:
        DataError: no address answers, the checksum differs, the archive is damaged or would write outside
            of `root`, or the disk refuses.
    """
    log.info("%s: %s", archive.title, archive.licence)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as folder:
            file, unpacked = Path(folder) / "archive", Path(folder) / "unpacked"
            _download(archive, file)
            unpacked.mkdir()
            _unpack(archive, file, unpacked)
            _move_into(unpacked, root)
    except OSError as problem:
        raise DataError(f"{archive.title} cannot be stored in {root}: {problem}.") from problem


def by_hand(archive: Archive, root: Path) -> str:
    """How to do without the download: two sentences and the folder tree, for an error message."""
    return (
        f"Get it by hand from {archive.page} ({archive.urls[0].rsplit('/', 1)[-1]}, "
        f"{archive.algorithm} {archive.digest}). Unpack it so that the folder looks like this:\n\n"
        f"{root}/\n{archive.tree}"
    )


def _download(archive: Archive, file: Path) -> None:
    problems = []
    for url in archive.urls:
        try:
            digest = _save(archive, url, file)
        except (OSError, http.client.HTTPException) as problem:  # URLError and timeouts are OSErrors
            problems.append(f"  {url}: {problem}")
            continue
        if digest != archive.digest:
            problems.append(f"  {url}: the {archive.algorithm} of the file is {digest}, not the one published")
            continue
        return
    folder = file.parents[1]
    raise DataError(f"{archive.title} cannot be downloaded:\n" + "\n".join(problems) + f"\n{by_hand(archive, folder)}")


def _save(archive: Archive, url: str, file: Path) -> str:
    """Writes what `url` answers to `file`; returns its checksum."""
    from rich.progress import wrap_file

    digest = hashlib.new(archive.algorithm)
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, file.open("wb") as target:
        total = int(answer.headers.get("Content-Length") or 0)
        with wrap_file(answer, total=total, description=archive.title) as source:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                target.write(chunk)
    if total and file.stat().st_size != total:
        raise http.client.IncompleteRead(b"", total - file.stat().st_size)
    return digest.hexdigest()


def _unpack(archive: Archive, file: Path, folder: Path) -> None:
    try:
        with tarfile.open(file) as tar:
            tar.extractall(folder, filter="data")  # refuses paths and links that leave the folder, devices
    except (tarfile.TarError, EOFError) as problem:
        raise DataError(f"{archive.title}: the archive cannot be unpacked ({problem}).") from problem


def _move_into(source: Path, target: Path) -> None:
    """Moves everything in `source` into `target`; folders that both have are merged.

    Several processes may do so with the same files at once: a folder is not asked about and then moved, since
    `shutil.move` puts it inside one that another process has moved there in between.
    """
    for child in sorted(source.iterdir()):
        place = target / child.name
        try:
            child.replace(place)
        except OSError:  # a folder is there already, or this is another file system
            if child.is_dir() and place.is_dir():
                _move_into(child, place)
            else:
                shutil.move(child, place)
