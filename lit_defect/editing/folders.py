"""Where the files of a pipeline of any kind come from: a folder, a run that holds one, the hub or its cache.

What `diffusion.base_model` does for the one kind of pipeline that it opens, by what `model_index.json` lists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_defect.diffusion.base_model import DESCRIPTIONS, HALF, INDEX, KEY, WEIGHTS, local_folder, reason, variants
from lit_defect.errors import UserError
from lit_defect.generation.store import TRAINED_ON
from lit_defect.nets.weights import knock_at_hub

_CHECKER = "safety_checker"  # blanks pictures; never opened
_NOT_NETWORKS = ("Tokenizer", "Scheduler", "Processor", "Extractor", "Backend")


def pipeline_folder(source: str) -> Path:
    """The local folder of a pipeline, fetched from the hub if it is not in its cache.

    Args:
        source: folder of a saved pipeline, a run folder that holds one as `pipeline`, or `owner/name` on the hub.

    Raises:
        UserError: nothing there, or a hub out of reach.
    """
    return local_folder(source) or _from_hub(source)


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


def parts(index: dict[str, Any]) -> dict[str, str]:
    """The class of each part that is opened, by its name."""
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and name != _CHECKER}
    return {name: str(entry[1]) for name, entry in listed.items() if len(entry) == 2 and entry[1]}


def networks(index: dict[str, Any]) -> list[str]:
    """Names of the parts that have weights."""
    return [name for name, kind in parts(index).items() if not any(word in kind for word in _NOT_NETWORKS)]


def variant(folder: Path, index: dict[str, Any]) -> str | None:
    """What diffusers calls the weights to load: "fp16" if a network has no others."""
    return "fp16" if any(variants(folder / name) == {"fp16"} for name in networks(index)) else None


def _from_hub(source: str) -> Path:
    """The folder of a repository in the hub's cache, fetched if it is not there."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download, try_to_load_from_cache

    cached = None
    try:
        found = try_to_load_from_cache(source, INDEX)
        cached = Path(found).parent if isinstance(found, str) else None
        if cached and _is_whole(cached):  # whoever has put it there
            return cached
        if constants.HF_HUB_OFFLINE:
            raise OSError("it is not in the cache, and HF_HUB_OFFLINE is set")
        knock_at_hub()
        index = read_index(Path(hf_hub_download(source, INDEX)).parent)
        for weights, ignored in WEIGHTS:
            kinds = (*DESCRIPTIONS, weights)
            options: Any = {
                "allow_patterns": [INDEX, TRAINED_ON, *(f"{part}/{kind}" for part in parts(index) for kind in kinds)],
                "ignore_patterns": list(ignored),
            }
            folder = Path(snapshot_download(source, **options))
            if _is_whole(folder, halves=HALF not in ignored):
                break
        return folder
    except Exception as error:  # the client's errors have changed their base class between versions
        if cached and _is_whole(cached, halves=True):
            return cached
        raise UserError(
            f"{KEY}: could not fetch {source} from the hub ({reason(error)}). Copy the pipeline's folder here and "
            "name it, or train a base on your own pictures: experiments/editing/base_*.yaml"
        ) from error


def _is_whole(folder: Path, halves: bool = False) -> bool:
    """Whether a cached pipeline has a folder of every part, and weights of networks: full ones, or `halves`."""
    index = read_index(folder)
    allowed = (None, "fp16") if halves else (None,)
    there = all((folder / name).is_dir() for name in parts(index))
    return there and all(variants(folder / name).intersection(allowed) for name in networks(index))
