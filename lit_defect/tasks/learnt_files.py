"""What an inversion has learnt as a file of its own: safetensors, with the base's hash and the pairs in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_defect.errors import UserError

EXPORT = "learnt.safetensors"
KEY = "model.init_args.start"
_TOKENS = "learnt.tokens.weight"


def is_learnt(key: str) -> bool:
    """Whether a tensor of a task's state is not the base's."""
    return key.startswith("learnt.") or ".lora_" in key


def write_learnt(task: Any, path: Path) -> None:
    """Write everything that an `Inversion` has learnt."""
    from safetensors.torch import save_file

    about = {
        "task": type(task).__name__,
        "base": task.base_source,
        "fingerprint": task.network.fingerprint,
        "learnt_with": json.dumps(task.learnt_with()),
        "pairs": json.dumps(task.pairs),
        "learnt_from": json.dumps(sorted(task.learnt_from)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous().cpu() for key, value in task.learnt_state().items()}, path, about)


def check_options(task: Any, learnt_with: Mapping[str, Any], source: str) -> None:
    """Whether what was learnt is to be used as it was learnt; prompts may be tried out, with a warning.

    Args:
        task: an `Inversion`.
        learnt_with: its `learnt_with` when it learnt; what is not told is not checked.
        source: what the messages call the file.

    Raises:
        UserError: another number of vectors, or another rank of LoRA.
    """
    for option, now in task.learnt_with().items():
        if (then := learnt_with.get(option, now)) == now:
            continue
        told = f"model.init_args.{option} = {now!r}, but {source} was learnt with {then!r}"
        if option != "template":
            raise UserError(f"{told}; take that, or train anew")
        rank_zero_warn(f"{told}: vectors that were learnt in one prompt may show something else in another")


@torch.no_grad()
def start_from(task: Any, path: Path) -> None:
    """Give a task what another has learnt on the same base; pairs that the file does not know keep their start.

    What the other has learnt from, this one then has learnt from, too.

    Raises:
        UserError: no such file, a damaged or foreign one, of another base, task, or of other options.
    """
    about, state = _read(path)
    if about.get("task") != type(task).__name__:
        raise UserError(f"{KEY}: {path} is of {about.get('task')}, not of this {type(task).__name__}")
    if about["fingerprint"] != task.network.fingerprint:
        raise UserError(
            f"{KEY}: {path} was learnt on another base, {about['base']} ({about['fingerprint'][:12]}), not on "
            f"{task.base_source} ({task.network.fingerprint[:12]}); vectors mean nothing to another base"
        )
    check_options(task, json.loads(about.get("learnt_with", "{}")), str(path))
    tokens = state.pop(_TOKENS, torch.empty(0))
    own = task.learnt_state()
    mine = own.pop(_TOKENS)
    shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (own, state)]
    if shapes[0] != shapes[1] or tokens.shape[1:] != mine.shape[1:]:
        raise UserError(
            f"{KEY}: {path} does not fit the options anomaly_tokens, spatial_tokens and lora of this "
            f"{type(task).__name__}; take those of its run (config.yaml)"
        )
    for key, value in own.items():
        value.copy_(state[key])
    for row, pair in enumerate(json.loads(about["pairs"])):
        if tuple(pair) in task.pairs:
            mine[task.pairs.index(tuple(pair))] = tokens[row].to(mine)
    task.learnt_from |= {(picture, group) for picture, group in json.loads(about["learnt_from"])}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{KEY}: there is no file {path}") from None
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{KEY}: {path} cannot be read ({reason})") from error
    if not {"task", "base", "fingerprint", "pairs", "learnt_from"} <= about.keys():
        raise UserError(f"{KEY}: {path} holds nothing that an AnomalyDiffusion or MaskDiffusion has learnt")
    return about, state
