"""What is learnt on a frozen base, without the base: in checkpoints, and as a file of an inversion's own.

Both name the base by its hash. The file is a safetensors with the pairs in its header.
"""

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


def keep_learnt(task: Any, checkpoint: dict[str, Any]) -> None:
    """Leave in a checkpoint only what was learnt, with what options and on what base.

    Args:
        task: has `base_source`, the base as `network`, the options as `learnt_with()`, and `learnt_from`.
        checkpoint: that Lightning is about to write.
    """
    checkpoint["learnt_with"] = task.learnt_with()
    checkpoint["base"] = {"source": task.base_source, "fingerprint": task.network.fingerprint}
    checkpoint["task"] = type(task).__name__
    checkpoint["learnt_from"] = sorted(list(picture) for picture in task.learnt_from)
    state = checkpoint["state_dict"]
    for key in [key for key in state if not is_learnt(key)]:
        del state[key]


def check_origin(task: Any, checkpoint: Mapping[str, Any]) -> None:
    """Whether a checkpoint is of such a task, on its base, with its options.

    Raises:
        UserError: it is not.
    """
    name = type(task).__name__
    known, kind = checkpoint.get("base"), checkpoint.get("task", name)
    if known is None or kind != name:
        raise UserError(f"the checkpoint is of {'another task' if known is None else kind}, not of this {name}")
    if known.get("fingerprint") != task.network.fingerprint:
        raise UserError(
            f"model.init_args.base: {task.base_source} ({task.network.fingerprint[:12]}) is not the base that this "
            f"checkpoint was learnt on, {known.get('source')} ({str(known.get('fingerprint'))[:12]}); what was learnt "
            "means nothing to another base"
        )
    check_options(task, checkpoint.get("learnt_with", {}), "the checkpoint")


def put_back(task: Any, checkpoint: dict[str, Any]) -> None:
    """Complete a checkpoint by the task's own base, and take over what it has learnt from.

    Raises:
        UserError: what was learnt has other shapes.
    """
    task.learnt_from |= {(picture, group) for picture, group in checkpoint.get("learnt_from", ())}
    own, learnt = task.state_dict(), checkpoint["state_dict"]
    misfit = sorted(
        {key for key, value in own.items() if is_learnt(key) and learnt.get(key, own[key][:0]).shape != value.shape}
        | (learnt.keys() - own.keys())
    )
    if misfit:
        raise UserError(
            f"the checkpoint does not fit this {type(task).__name__}: {misfit[0]} is missing, left over or of "
            "another shape; take the model's options from the config.yaml of its run"
        )
    learnt.update({key: value for key, value in own.items() if not is_learnt(key)})


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
        task: an `Inversion` or a `StableDiffusionLoRA`.
        learnt_with: its `learnt_with` when it learnt; what is not told is not checked.
        source: what the messages call the file.

    Raises:
        UserError: another number of vectors, another rank of LoRA and the like.
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
