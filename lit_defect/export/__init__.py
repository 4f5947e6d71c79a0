"""`python -m lit_defect export RUN`: a trained model for the factory, as ONNX and as PyTorch's exported program.

    a camera's picture, uint8 (B, H, W, 3) RGB --> scaled and normalised as in training --> network --> answers

| task | answers |
|---|---|
| DefectClassifier | `probabilities` (B, C), `predicted` (B,); with a good class `score` (B,), `defective` (B,) |
| SimCLR, AnomalyLocalizer | `score` (B,), `defective` (B,), `map` (B, H, W) |
| Segmenter | `probabilities` (B, C, H, W), `mask` (B, H, W) |

`defective` is there where the run has learnt a threshold, or `--threshold` gives one. The folder RUN/export holds
`model.onnx`, `model.pt2` and `model.json`, which says what goes in and comes out, of which checkpoint it is, and how
far the files were found to agree with the task in PyTorch and with the run's own predictions. It gets its name when
the files have been opened again, run on pictures and found to agree.

No torch here, so that `--help` and mistakes in the options are quick.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_defect.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Export a run; returns the exit status: 0, 1 where the exported model disagrees, 2 for what the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        return _export(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect export",
        description="A trained model with its preprocessing as ONNX and torch.export, checked against PyTorch.",
    )
    parser.add_argument("run", type=Path, help="the run's folder, runs/EXPERIMENT/RUN")
    parser.add_argument("--ckpt", "--ckpt_path", default="best", help="best, last or a file [best]")
    parser.add_argument(
        "--to", nargs="+", choices=("onnx", "torch"), default=["onnx", "torch"], help="kinds of file [onnx torch]"
    )
    parser.add_argument("--out", type=Path, help="folder for the files [RUN/export]; an earlier one gets a number")
    parser.add_argument("--size", type=_size, default="dynamic", help="of the pictures: HxW, or dynamic [dynamic]")
    parser.add_argument("--batch", type=_batch, default="dynamic", help="pictures at a time, or dynamic [dynamic]")
    parser.add_argument("--half", action="store_true", help="weights as float16: half the size, computed in float32")
    parser.add_argument("--threshold", type=float, help="reject from this score on, instead of the learnt threshold")
    parser.add_argument(
        "--check",
        default="16",
        metavar="N|FOLDER",
        help="check on so many of the run's test pictures (generated ones where they are gone), or on a folder's [16]",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference from PyTorch, as a share of 1 or of an answer's largest value where that is more "
        "[0.0002; 0.02 with --half]",
    )
    return parser


def _size(word: str) -> tuple[int, int] | None:
    if word == "dynamic":
        return None
    height, _, width = word.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) > 1 and int(width) > 1):
        raise argparse.ArgumentTypeError(f"{word!r}: expected HEIGHTxWIDTH in pixels, such as 480x640, or dynamic")
    return int(height), int(width)


def _batch(word: str) -> int | str:
    if word == "dynamic":
        return word
    if not (word.isdigit() and int(word)):
        raise argparse.ArgumentTypeError(f"{word!r}: expected a number of pictures, at least 1, or dynamic")
    return int(word)


def _export(options: argparse.Namespace) -> int:
    from lit_defect.claims import forget_launches, launching
    from lit_defect.export.files import DESCRIPTION, check_packages
    from lit_defect.export.making import make
    from lit_defect.export.opening import open_run
    from lit_defect.runs import keep_previous

    check_packages(options.to)
    opened = open_run(options.run, options.ckpt)
    target = options.out or options.run / "export"
    if target.exists() and not (target / DESCRIPTION).is_file():
        raise UserError(f"{target} exists and holds no exported model: choose another folder by --out")
    unfinished = target.with_name(f".{target.name}")
    with launching():
        _take(unfinished)
        try:
            wrong = make(opened, options, unfinished)
            if wrong:
                print(f"error: the exported model disagrees with PyTorch, so there is no {target}:", file=sys.stderr)
                print("\n".join(f"  {line}" for line in wrong), file=sys.stderr)
                return 1
            keep_previous(target)
            unfinished.rename(target)
            forget_launches(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    print(f"files        {target}: {', '.join(sorted(file.name for file in target.iterdir()))}")
    return 0


def _take(unfinished: Path) -> None:
    """The folder that is written first, empty but for whose it is.

    Raises:
        UserError: another process writes it, or it cannot be written.
    """
    from lit_defect.claims import LAUNCHES, begin_launch, last_launch, still_writes

    before = last_launch(unfinished)
    try:
        if still_writes(before) or not begin_launch(unfinished, before):
            raise UserError(f"{unfinished} is being written by another export; wait for it, or choose another --out")
        for left in unfinished.iterdir():  # of a process that was killed
            if left.name != LAUNCHES:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        raise UserError(f"{unfinished} cannot be written ({error.strerror}): choose another --out") from None
