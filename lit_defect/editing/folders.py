"""Where the files of a pipeline of any kind come from: a folder, a run that holds one, the hub or its cache.

As `diffusion.pipeline_files` says, with the parts that `model_index.json` lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_defect.diffusion import pipeline_files
from lit_defect.diffusion.pipeline_files import read_index, variants

_CHECKER = "safety_checker"  # blanks pictures; never opened
_NOT_NETWORKS = ("Tokenizer", "Scheduler", "Processor", "Extractor", "Backend")


def pipeline_folder(source: str) -> Path:
    """The local folder of a pipeline, fetched from the hub if it is not in its cache.

    Args:
        source: folder of a saved pipeline, a run folder that holds one as `pipeline`, or `owner/name` on the hub.

    Raises:
        UserError: nothing there, or a hub out of reach.
    """
    return pipeline_files.pipeline_folder(source, parts, _is_whole)


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


def _is_whole(folder: Path, halves: bool) -> bool:
    """Whether a cached pipeline has a folder of every part, and weights of networks: full ones, or `halves`."""
    index = read_index(folder)
    allowed = (None, "fp16") if halves else (None,)
    there = all((folder / name).is_dir() for name in parts(index))
    return there and all(variants(folder / name).intersection(allowed) for name in networks(index))
