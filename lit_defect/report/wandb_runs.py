"""Runs from Weights & Biases as run folders: what the tracking callback has sent, written where a report reads it.

`wandb:ENTITY/PROJECT` or `wandb:ENTITY/PROJECT/GROUP`; a group is an experiment. Configuration, state, curves and
figures come down; predictions, splits and pictures do not, so that arms are compared over seeds alone.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_defect.errors import UserError
from lit_defect.runs import MIRRORED, write_json
from lit_defect.tracking_login import logged_in

SCHEME = "wandb:"
_STAGES = ("test", MIRRORED)
_STEP = "trainer/global_step"
_OURS = ("run", "lineage")
"""What the tracking callback adds to the configuration."""
_STATES = {"finished": "finished", "running": "running", "preempted": "preempted", "preempting": "preempted"}


def fetch(address: str, folder: Path, api: Any = None) -> list[Path]:
    """Write the runs of a project, or of a group of it, below `folder`; returns their folders.

    Args:
        address: `wandb:ENTITY/PROJECT[/GROUP]`.
        folder: gets `<experiment>/<run id>` for each run.
        api: `wandb.Api()` of the login where it is not given.

    Raises:
        UserError: an address of another form, no login, W&B cannot be asked, or no such run.
    """
    parts = address.removeprefix(SCHEME).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"{address}: wandb:ENTITY/PROJECT or wandb:ENTITY/PROJECT/GROUP is needed")
    if api is None:
        if not logged_in():
            raise UserError(f"{address}: W&B is asked only when logged in: `wandb login`, or set WANDB_API_KEY")
        import wandb
    filters = {"group": parts[2]} if len(parts) > 2 else None
    try:
        found = (api or wandb.Api(timeout=60)).runs(f"{parts[0]}/{parts[1]}", filters=filters)
        written = [_write(run, folder, parts[1]) for run in found]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; choose another folder by -o") from None
    except Exception as error:  # whatever a network and a server can do
        raise UserError(f"{address}: W&B cannot be asked ({type(error).__name__}: {error})") from error
    if not written:
        raise UserError(f"{address}: no run there; a group is what --experiment was called")
    return written


def _write(run: Any, folder: Path, project: str) -> Path:
    """One run as a run folder; its id, which is unique in the project, is the folder's name."""
    config = dict(run.config)
    told = config.get("run")
    told = told if isinstance(told, Mapping) else {}
    summary = {str(key): value for key, value in dict(run.summary_metrics).items()}
    path = folder / _plain(run.group or project) / _plain(run.id)
    path.mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in config.items() if key not in _OURS}
    (path / "config.yaml").write_text(yaml.safe_dump(kept, allow_unicode=True), encoding="utf-8")
    status = summary.get("status") or _STATES.get(run.state, "failed")
    write_json(path / "run.json", {"started": run.created_at, **told, "status": status, "url": run.url})
    rows = list(_curves(run.scan_history()))
    _write_rows(path / "metrics.csv", rows)
    for stage in _STAGES:
        file = path / f"{stage}_metrics.json"
        file.unlink(missing_ok=True)
        if figures := _figures(stage, summary):
            write_json(file, figures)
    return path


def _figures(stage: str, summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`test/auroc`, `test/auroc_low`, `test/auroc_high` -> `{"auroc": {"value", "low", "high"}}`."""
    mine = {key.removeprefix(f"{stage}/"): value for key, value in summary.items() if key.startswith(f"{stage}/")}
    numbers = {key: float(value) for key, value in mine.items() if _is_number(value)}
    figures: dict[str, dict[str, float]] = {}
    for key, value in numbers.items():
        name, _, end = key.rpartition("_")
        if end not in ("low", "high") or name not in numbers:
            ends = {end: numbers[f"{key}_{end}"] for end in ("low", "high") if f"{key}_{end}" in numbers}
            figures[key] = {"value": value, **ends}
    return figures


def _curves(history: Iterable[Mapping[str, Any]]) -> Iterable[dict[str, float]]:
    """Rows of numbers with their `step`; media and W&B's own columns are left out."""
    for row in history:
        step = row.get(_STEP, row.get("_step"))
        values = {
            key: value for key, value in row.items() if _is_number(value) and not key.startswith(("_", "system/"))
        }
        values.pop(_STEP, None)
        if values and _is_number(step):
            yield {"step": step, **values}


def _write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    names = dict.fromkeys(["step", *(key for row in rows for key in row)])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(names))
        writer.writeheader()
        writer.writerows(rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _plain(name: str) -> str:
    """A name that is one folder, whatever W&B calls the run."""
    return re.sub(r"[/\\\0]", "_", name).lstrip(".") or "_"
