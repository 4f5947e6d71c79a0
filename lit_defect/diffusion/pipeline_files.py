"""Where the files of a pipeline of diffusers come from: a folder, a run that holds one, the hub or its cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.generation.store import TRAINED_ON
from lit_defect.nets.weights import knock_at_hub

KEY = "model.init_args.base"
INDEX = "model_index.json"
_DESCRIPTIONS = ("*.json", "*.txt", "*.model")
_HALF, _RAW = "*.fp16*", "*.non_ema*"
# What a repository's weights may be called, and what of that is left out; the first that it has for all networks.
_WEIGHTS = (
    ("*.safetensors", (_HALF, _RAW)),
    ("*.bin", (_HALF, _RAW)),
    (f"{_HALF}.safetensors", (_RAW,)),
    (f"{_HALF}.bin", (_RAW,)),
)


Parts = Callable[[dict[str, Any]], Iterable[str]]
"""What `model_index.json` says -> folders that are needed; a UserError where it is no pipeline that will do."""


def pipeline_folder(source: str, parts: Parts, is_whole: Callable[[Path, bool], bool]) -> Path:
    """The local folder of a pipeline, fetched from the hub if it is not in its cache.

    Where the cache has weights in float16 only, they will do if the hub has no others or cannot be reached.

    Args:
        source: folder of a saved pipeline, a run folder that holds one as `pipeline`, or `owner/name` on the hub.
        parts: which folders of the repository are needed; asked before they are fetched.
        is_whole: whether a folder has them all, the weights in full precision or, if the second argument is true,
            in half of it.

    Raises:
        UserError: nothing there, a hub out of reach, or what `parts` raises.
    """
    return _local_folder(source) or _from_hub(source, parts, is_whole)


def _local_folder(source: str) -> Path | None:
    """The folder of a pipeline on this machine, or None for the name of a repository of the hub.

    Raises:
        UserError: it is neither.
    """
    path = Path(source).expanduser()
    for folder in (path, path / "pipeline"):
        if (folder / INDEX).is_file():
            return folder
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise UserError(
            f"{KEY}: {source} is no folder of a diffusers pipeline (it has no {INDEX}), no run of a LatentDiffusion "
            "that has ended, and no hub name like owner/name"
        )
    return None


def read_index(folder: Path) -> dict[str, Any]:
    """What `model_index.json` lists: the pipeline's class as `_class_name`, and each part's library and class.

    Raises:
        UserError: it is damaged.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{KEY}: {folder / INDEX} is damaged ({reason(error)}); copy the pipeline again") from error
    return index


def _from_hub(source: str, parts: Parts, is_whole: Callable[[Path, bool], bool]) -> Path:
    from huggingface_hub import constants, snapshot_download, try_to_load_from_cache

    cached = None
    try:
        index = try_to_load_from_cache(source, INDEX)
        cached = Path(index).parent if isinstance(index, str) else None
        if cached and is_whole(cached, False):  # whoever has put it there
            return cached
        if constants.HF_HUB_OFFLINE:
            raise OSError("it is not in the cache, and HF_HUB_OFFLINE is set")
        knock_at_hub()
        needed = list(parts(read_index(Path(snapshot_download(source, allow_patterns=[INDEX], ignore_patterns=[])))))
        for weights, ignored in _WEIGHTS:
            wanted = [f"{part}/{kind}" for part in needed for kind in (*_DESCRIPTIONS, weights)]
            options: Any = {"allow_patterns": [INDEX, TRAINED_ON, *wanted], "ignore_patterns": list(ignored)}
            folder = Path(snapshot_download(source, **options))
            if is_whole(folder, _HALF not in ignored):
                break
        return folder
    except UserError:
        raise
    except Exception as error:  # the client's errors have changed their base class between versions
        if cached and is_whole(cached, True):
            return cached
        raise UserError(
            f"{KEY}: could not fetch {source} from the hub ({reason(error)}). Copy the pipeline's folder here and "
            "name it, or train a base on your own pictures: experiments/*/base_*.yaml"
        ) from error


def variants(folder: Path) -> set[str | None]:
    """Which weights are in a network's folder: None for those in full precision, "fp16"."""
    names = [p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin") and not fnmatch(p.name, _RAW)]
    return {"fp16" if fnmatch(name, _HALF) else None for name in names}


def variant(folder: Path) -> str | None:
    """What diffusers and transformers call the weights to load of a network's folder: "fp16" if it has no others."""
    return "fp16" if variants(folder) == {"fp16"} else None


def reason(error: Exception) -> str:
    """The first line of what an error of another library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
