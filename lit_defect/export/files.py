"""The files of an exported model: written, described, and opened again as the factory opens them."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lit_defect.errors import UserError
from lit_defect.export.factory import PICTURES, Batch, dynamic_axes
from lit_defect.export.intake import Size

Format = Literal["onnx", "torch"]
Pixels = npt.NDArray[np.uint8]
Run = Callable[[Pixels], dict[str, npt.NDArray[Any]]]
"""Pictures (B, H, W, 3) -> answers by name."""

NAMES: dict[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2"}
DESCRIPTION = "model.json"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages(formats: list[Format]) -> None:
    """Look for what ONNX needs.

    Raises:
        UserError: packages that are missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if "onnx" in formats and missing:
        raise UserError(f"ONNX needs {', '.join(missing)}: pip install 'lit_defect[export]'; or take --to torch")


def write_torch(graph: torch.export.ExportedProgram, path: Path, about: Mapping[str, Any]) -> None:
    """Write a `.pt2`, with `about` in it as an extra file `model.json`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(graph, path, extra_files={DESCRIPTION: json.dumps(about)})


def write_onnx(
    graph: torch.export.ExportedProgram, path: Path, about: Mapping[str, Any], size: Size | None, batch: Batch
) -> None:
    """Write an ONNX file whose metadata are the keys of `about`, each as JSON."""
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            graph,
            dynamo=True,
            verbose=False,
            input_names=[PICTURES],
            output_names=list(about["outputs"]),
            dynamic_shapes={PICTURES: dynamic_axes(size, batch) or None},
        )
    model = program.model_proto
    inside = model.graph
    values = (*inside.input, *inside.output, *inside.value_info, *inside.initializer)
    for part in (model, inside, *inside.node, *values):  # without the lines of code that they come from
        del part.metadata_props[:]
        part.doc_string = ""
    for key, value in about.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def open_torch(path: Path) -> Run:
    """What a `.pt2` answers."""
    module = torch.export.load(path).module()

    def run(pictures: Pixels) -> dict[str, npt.NDArray[Any]]:
        with torch.no_grad():
            said = module(torch.from_numpy(np.ascontiguousarray(pictures)))
        return {name: value.numpy() for name, value in said.items()}

    return run


def open_onnx(path: Path) -> Run:
    """What an ONNX file answers in ONNX Runtime, on the CPU with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pictures: Pixels) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(names, session.run(None, {PICTURES: pictures}), strict=True))

    return run
