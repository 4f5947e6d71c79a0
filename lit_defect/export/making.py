"""From an opened run to a folder of files, each checked."""

from __future__ import annotations

import argparse
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

from lit_defect.errors import UserError
from lit_defect.export.checking import Comparison, by_task, compare, pictures_for
from lit_defect.export.description import describe
from lit_defect.export.factory import factory_of, graph_of
from lit_defect.export.files import DESCRIPTION, NAMES, open_onnx, open_torch, write_onnx, write_torch
from lit_defect.export.opening import Opened
from lit_defect.runs import write_json

_NAMED = 5  # pictures with a difference, in a message


def make(opened: Opened, options: argparse.Namespace, folder: Path) -> list[str]:
    """Write the files into `folder` and say what was found.

    Returns:
        What disagrees with the task by more than is allowed, a line each; empty if all is well.

    Raises:
        UserError: options that do not go with the run.
    """
    size, batch = options.size, options.batch
    if (opened.data_size or opened.task_size or size) is None:
        raise UserError(
            f"{opened.run.path} was trained on pictures as they are (neither data.init_args.image_size nor the model's "
            "is set), so its network is exported for pictures of one size: give it by --size HxW"
        )
    if opened.dropped:
        print(f"note: options of the run that this version does not know are left out: {', '.join(opened.dropped)}")
    if options.threshold is not None:
        opened.task.decide_at(options.threshold)
    if options.tolerance is None:
        options.tolerance = 0.02 if options.half else 0.0002
    about = describe(opened, size, batch, half=options.half)
    origin, pictures = pictures_for(opened, options.check, size)
    graph = graph_of(factory_of(opened, half=options.half), size, batch)
    wrong, files, checked = [], {}, {}
    print(f"{about['task']} of {opened.checkpoint}, checked on {len(pictures)} {origin}")
    if about.get("threshold", 0) is None:
        print("note: the run has learnt no threshold, so there is no answer `defective`; --threshold gives one")
    outputs = tuple(about["outputs"])
    since = time.perf_counter()
    for picture in pictures:
        by_task(opened, picture.pixels, outputs)
    _say("PyTorch", (time.perf_counter() - since) / len(pictures))
    for kind in options.to:
        path = folder / NAMES[kind]
        if kind == "onnx":
            write_onnx(graph, path, about, size, batch)
        else:
            write_torch(graph, path, about)
        run = open_onnx(path) if kind == "onnx" else open_torch(path)
        now, then = compare(opened, run, pictures, outputs, batch, options.tolerance)
        files[kind] = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        checked[kind] = {"against_pytorch": now.as_dict(), "against_the_run": then.as_dict()}
        _say(path.name, now.seconds / len(pictures), path.stat().st_size)
        _tell("than PyTorch", now)
        _tell("than the run said", then)
        wrong += [f"{path.name}: {line}" for line in now.wrong[:_NAMED]]
        if then.wrong:
            print(
                f"  note: {then.wrong[0]} from what the run has written. Did it test another checkpoint, in another "
                "precision, by an older version, or have the pictures changed?"
            )
    check: dict[str, Any] = {"pictures": len(pictures), "origin": origin, "tolerance": options.tolerance, **checked}
    write_json(folder / DESCRIPTION, {**about, "files": files, "check": check})
    return wrong


def _say(what: str, seconds: float, size: int | None = None) -> None:
    print(f"{what:12} {1000 * seconds:.1f} ms a picture" + (f", {size / 2**20:.1f} MiB" if size else ""))


def _tell(than: str, found: Comparison) -> None:
    """The largest differences and the share of equal decisions, where there are any."""
    shares = found.equal_decisions()
    parts = [f"{name} {value:.2g}" for name, value in found.difference.items()]
    parts += [] if shares is None else [f"{shares:.4%} of the decisions equal"]
    if parts:
        print(f"  other {than} by at most: {', '.join(parts)}")
