"""The module that is exported, and its graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_defect.errors import UserError
from lit_defect.export.intake import Intake, Size
from lit_defect.export.opening import Opened
from lit_defect.tasks.base import DefectTask

Batch = int | Literal["dynamic"]
Answers = dict[str, Tensor]

PICTURES = "pictures"
_NODE_NOTES = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node")


class Factory(nn.Module):
    """A task with its intake: the camera's pictures in, the task's answers out.

    Args:
        task: whose `for_factory` answers.
        intake: what brings pictures to the task's size.
        outputs: names of the answers that are given.
    """

    def __init__(self, task: DefectTask, intake: Intake, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.task = task
        self.intake = intake
        self.outputs = outputs

    def forward(self, pictures: Tensor) -> Answers:
        """(B, H, W, 3) uint8, RGB -> answers by name."""
        height, width = pictures.shape[1:3]
        said = self.task.for_factory(self.intake(pictures), (height, width))
        return {name: said[name] for name in self.outputs}


def factory_of(opened: Opened, *, half: bool) -> Factory:
    """The module of a run; with `half` its weights are rounded to float16, and kept so in the files."""
    task = copy.deepcopy(opened.task)
    if half:
        _halve(task)
    return Factory(task, Intake(opened.data_size, opened.task_size), tuple(answers_to_nothing(opened)))


def answers_to_nothing(opened: Opened) -> Answers:
    """The answers to a black picture, by name; without a threshold there is no decision by it."""
    size = opened.task_size or opened.data_size or (64, 64)
    with torch.no_grad():
        said = opened.task.for_factory(torch.zeros(1, 3, *size, dtype=torch.uint8), size)
    undecided = opened.task.factory_facts().get("threshold") is None
    return {name: value for name, value in said.items() if not (undecided and name == "defective")}


def graph_of(factory: Factory, size: Size | None, batch: Batch) -> torch.export.ExportedProgram:
    """The graph of a module, the same for the same weights, with only what the answers need.

    Args:
        factory: the module.
        size: (height, width) of the pictures; None for any.
        batch: pictures at a time, or `dynamic` for any number.

    Raises:
        UserError: PyTorch cannot trace the network with sizes left open, or not at all.
    """
    sides = size or tuple(side + 13 for side in factory.intake.data_size or factory.intake.task_size or (64, 64))
    example = torch.zeros(2 if batch == "dynamic" else batch, *sides, 3, dtype=torch.uint8)
    open_axes = dynamic_axes(size, batch)
    try:
        with torch.no_grad(), _quiet():
            traced = _exported(factory, example, open_axes)
            return _without_notes(_exported(_pruned(traced), example, open_axes))
    except Exception as error:  # whatever a network does that cannot be traced
        left = "--size HxW, --batch 1" if open_axes else "another network"
        raise UserError(
            f"this network cannot be exported so: {type(error).__name__}: {str(error).strip()[:300]}; try {left}"
        ) from error


def dynamic_axes(size: Size | None, batch: Batch) -> dict[int, torch.export.Dim]:
    """The axes of the pictures that are left open, by their place."""
    axes = {0: torch.export.Dim("batch", min=1)} if batch == "dynamic" else {}
    if size is None:
        axes |= {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    return axes


def _exported(module: nn.Module, example: Tensor, axes: dict[int, Any]) -> torch.export.ExportedProgram:
    return torch.export.export(module, (example,), dynamic_shapes={PICTURES: axes or None}, strict=False)


def _pruned(traced: torch.export.ExportedProgram) -> nn.Module:
    """The graph without the tensors that no answer needs, such as a projection or the other scores' features."""
    module: Any = traced.module()
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # keeps alive what it looks at
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [key for key, _ in (*module.named_parameters(), *module.named_buffers())]:
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()
    return module


def _without_notes(traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without the lines of code that the nodes come from, and their paths on this machine."""
    for node in traced.graph.nodes:
        for note in _NODE_NOTES:
            node.meta.pop(note, None)
    return traced


class _Widened(nn.Module):
    """A weight that is kept as float16 and computed with as float32."""

    def forward(self, kept: Tensor) -> Tensor:
        return kept.float()


def _halve(task: nn.Module) -> None:
    """Keep all weights of more than one dimension as float16."""
    for module in list(task.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim > 1:
                parametrize.register_parametrization(module, name, _Widened(), unsafe=True)
                kept: Any = module.parametrizations[name]  # type: ignore[index]
                kept.original = nn.Parameter(weight.half(), requires_grad=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's remarks about its own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
