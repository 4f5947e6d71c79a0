"""Fit the tensors of a weight file to a model: by name, else by order, else say what does not fit.

Files of other projects name the same layers differently. A file fits when, in this order of trial,
1. its names are the model's, behind any common prefix (`module.`, `backbone.model.`, ...);
2. they are after timm's own conversion for the architecture (position embeddings of another image
   size, the authors' own names, ...);
3. its tensors stand in the model's order, and every shape and kind (weight, bias, running mean or
   variance) agrees, a linear layer over a whole map standing for a convolution (torchvision's VGG).
The classifier is left out when its number of classes differs; any other difference is an error.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_defect.errors import UserError

State = dict[str, Tensor]


def read_state(path: Path) -> State:
    """All tensors of a weight file, by name; never runs code from it.

    Looks inside the usual wrappers (`state_dict`, `model`, their EMA copies first).
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights: {path} holds more than tensors and is not opened, since it could run code. "
            "Save its state_dict alone: torch.save(model.state_dict(), path), or as safetensors."
        ) from error
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(f"weights: {path} cannot be read ({type(error).__name__}: {error}).") from error
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    named = content.items() if isinstance(content, Mapping) else ()
    state = {key: value for key, value in named if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"weights: {path} holds no named tensors; expected a state_dict.")
    return state


def fit(model: nn.Module, state: State, *, classifier: str) -> str:
    """Load `state` into `model`, in place.

    Args:
        model: a timm model; every tensor of its body must be found.
        state: tensors of a weight file.
        classifier: name of the last linear layer (timm's `pretrained_cfg["classifier"]`); its tensors
            are loaded only if their shapes agree.
    Returns:
        Empty on success, otherwise what does not fit, and the model is left as it was.
    """
    wanted = {k: v for k, v in model.state_dict().items() if _is_weight(k)}
    body = {k: v for k, v in wanted.items() if not k.startswith(f"{classifier}.")}
    head = {k: v for k, v in wanted.items() if k not in body}
    problems = []
    for named in _candidates(model, state, next(iter(body))):
        problem = _misfit(body, {k: v for k, v in named.items() if not k.startswith(f"{classifier}.")})
        if not problem:
            model.load_state_dict(
                {k: named[k] for k, v in wanted.items() if k in named and named[k].shape == v.shape},
                strict=False,
            )
            return ""
        problems.append(problem)
    ordered = _fit_by_order(body, head, state)
    if isinstance(ordered, str):
        return f"By name: {problems[0]}.\nBy order: {ordered}."
    model.load_state_dict(ordered, strict=False)
    return ""


def _is_weight(key: str) -> bool:
    """Whether outputs depend on the tensor; old files lack BatchNorm's batch counters."""
    return not key.endswith("num_batches_tracked")


def _candidates(model: nn.Module, state: State, first: str) -> Iterator[State]:
    """The state behind each prefix at which the model's first tensor stands, raw and converted."""
    prefixes = [k.removesuffix(first) for k in state if k == first or k.endswith(f".{first}")]
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    for prefix in prefixes or [""]:
        named = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        yield named
        if convert is not None:
            try:
                converted = convert(dict(named), model)
            except Exception:  # timm's conversions expect their own layouts and fail on others in any way
                continue
            yield {k: v for k, v in converted.items() if isinstance(v, Tensor)}


def _misfit(body: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> str:
    """What keeps `named` (without classifier) from filling the body; empty if nothing does."""
    missing = [k for k in body if k not in named]
    wrong = [
        f"{k} is {tuple(named[k].shape)}, expected {tuple(v.shape)}"
        for k, v in body.items()
        if k in named and named[k].shape != v.shape
    ]
    # More layers inside a part that the model has too: the file is of a deeper network of the family.
    # Parts that it lacks (a projector, a decoder) may stay in the file.
    parts = {k.split(".")[0] for k in body if "." in k}
    surplus = [k for k in named if _is_weight(k) and k not in body and k.split(".")[0] in parts]
    found = [("missing", missing), ("of another shape", wrong), ("too many", surplus)]
    return "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in found if keys)


def _fit_by_order(body: Mapping[str, Tensor], head: Mapping[str, Tensor], state: State) -> State | str:
    """Pair the tensors in their order, or tell where the orders part.

    A weight matrix and a bias that the file has beyond the body are its classifier.
    """
    given = [(k, v) for k, v in state.items() if _is_weight(k)]
    last = [v for _, v in given[len(body) :]]
    if len(given) < len(body) or [v.ndim for v in last] not in ([], [2, 1]):
        return f"the file has {len(given)} tensors, the backbone {len(body)} and a classifier of 2"
    for (name, tensor), (key, value) in zip(body.items(), given, strict=False):
        # A fully connected layer over a whole map may be kept as a convolution (VGG's fc6 and fc7).
        same = tensor.shape == value.shape or (
            {tensor.ndim, value.ndim} == {2, 4} and tensor.flatten(1).shape == value.flatten(1).shape
        )
        if not same or _kind(name) != _kind(key):
            return f"{key} {tuple(value.shape)} stands where {name} {tuple(tensor.shape)} is expected"
    fitted = {name: value.reshape(body[name].shape) for name, (_, value) in zip(body, given, strict=False)}
    if [v.shape for v in last] == [v.shape for v in head.values()]:
        fitted |= dict(zip(head, last, strict=True))
    return fitted


def _kind(key: str) -> str:
    """The tensor's role in its layer, so that a bias never lands in a weight of the same shape."""
    leaf = key.rpartition(".")[2]
    return leaf if leaf in ("weight", "bias", "running_mean", "running_var") else "other"


def fingerprint(state: Mapping[str, Tensor], *, prefix: str = "") -> str:
    """SHA-256 over `prefix` and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(f"{prefix}\n".encode())
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
