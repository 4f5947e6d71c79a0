"""What is told of an exported model: in `model.json`, and in the ONNX file's metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor

from lit_defect import runs
from lit_defect.export.factory import PICTURES, Batch, answers_to_nothing
from lit_defect.export.intake import Size
from lit_defect.export.opening import Opened

VERSION = 1
_MEANINGS = {
    "probabilities": "of each class, adding up to 1",
    "predicted": "number of the most probable class",
    "score": "higher is more defective",
    "defective": "whether the score reaches the threshold",
    "map": "score of each pixel; higher is more defective",
    "mask": "number of the most probable class of each pixel",
}
_RECORDED = ("lit_defect", "torch", "onnx", "onnxscript", "pillow")


def describe(opened: Opened, size: Size | None, batch: Batch, *, half: bool) -> dict[str, Any]:
    """Everything that is known before the check, the same for the same run and options."""
    facts = opened.task.factory_facts()
    record, own = opened.run.record(), runs.describe_process([])
    named: list[Any] = ["batch" if batch == "dynamic" else batch, *(size or ("height", "width"))]
    return {
        "format": "lit_defect model",
        "version": VERSION,
        "task": type(opened.task).__name__,
        "input": {
            "name": PICTURES,
            "dtype": "uint8",
            "shape": [*named, 3],
            "meaning": "RGB pictures as the camera gives them; a grey one has its channel three times",
        },
        "outputs": {name: _output(name, value, named) for name, value in answers_to_nothing(opened).items()},
        **facts,
        "network_size": opened.task_size or opened.data_size or size,
        "weights": "float16" if half else "float32",
        "checkpoint": {"file": opened.checkpoint.name, "sha256": opened.digest()},
        "run": {
            "experiment": opened.run.path.absolute().parent.name,
            "run_id": opened.run.path.absolute().name,
            "commit": record.get("commit"),
            "data_fingerprint": record.get("data_fingerprint"),
            "versions": record.get("versions"),
        },
        "exported_with": {"commit": own["commit"], "versions": {name: _version(name) for name in _RECORDED}},
    }


def _output(name: str, value: Tensor, named: list[Any]) -> dict[str, Any]:
    """Type, axes and meaning of an answer: (B,), (B, C), (B, H, W) or (B, C, H, W)."""
    classes = [value.shape[1]] if value.ndim in (2, 4) else []
    shape = [named[0], *classes, *(named[1:] if value.ndim > 2 else [])]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": shape, "meaning": _MEANINGS[name]}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
