"""SBD, the Semantic Boundaries Dataset: more masks for VOC's pictures (Hariharan et al., ICCV 2011).

The release (`benchmark.tgz`, folder `benchmark_RELEASE`) holds `dataset/img/<name>.jpg`, and in
`dataset/cls/<name>.mat` a MATLAB structure `GTcls` whose field `Segmentation` is an (H, W) map of VOC's class
indices, without void. The maps are written once as PNG, which the rest of the data code reads.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from lit_defect.data.cache import in_threads, write_whole
from lit_defect.errors import DataError


def read_sbd(root: Path, folder: Path, *, skip: Collection[str] = ()) -> dict[str, tuple[Path, Path]]:
    """The (picture, mask) of every SBD picture whose name is not in `skip`, by that name.

    Args:
        root: the release's folder, or its `dataset`.
        folder: where the masks are written as PNG; those that are there already are kept.
        skip: names to leave out.

    Raises:
        DataError: the folders are missing, or a map cannot be read.
    """
    home = root / "dataset" if (root / "dataset").is_dir() else root
    maps = sorted((home / "cls").glob("*.mat"))
    if not maps or not (home / "img").is_dir():
        raise DataError(
            f"data.sbd_root: {root} is not an unpacked SBD. Expected dataset/img/<name>.jpg and "
            "dataset/cls/<name>.mat, as in benchmark.tgz from "
            "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
        )
    wanted = [path for path in maps if path.stem not in skip]
    masks = [folder / f"{path.stem}.png" for path in wanted]
    missing = [(path, mask) for path, mask in zip(wanted, masks, strict=True) if not mask.is_file()]
    in_threads(lambda pair: _convert(*pair), missing)
    return {path.stem: (home / "img" / f"{path.stem}.jpg", mask) for path, mask in zip(wanted, masks, strict=True)}


def _convert(source: Path, target: Path) -> None:
    from scipy.io import loadmat

    try:
        values = np.asarray(loadmat(str(source))["GTcls"]["Segmentation"][0, 0])
        if values.ndim != 2 or values.dtype.kind not in "ui":
            raise ValueError(f"a map of {values.dtype} with {values.ndim} axes")
    except (OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError) as problem:
        raise DataError(f"{source} is not a class map of SBD ({problem}).") from problem
    write_whole(target, lambda stream: Image.fromarray(values.astype(np.uint8)).save(stream, "PNG"))
