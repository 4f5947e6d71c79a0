"""Artifacts and where they come from: generated set <- model <- data.

Every artifact has a name that follows from its run, so that another run can name it without asking a server:
`model-<experiment>-<run id>`, `generated-<experiment>-<run id>`, `data-<class>-<fingerprint>`. On line a run uses the
artifacts of the runs that its configuration points to. Off line W&B has no `use_artifact`: the same names then stand
in the run's config (`lineage`) and in the metadata of what it logs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from lit_defect.runs import RunFolder, flatten

Checkpoints = Literal["reference", "upload", "off"]
MANIFEST = "manifest.csv"
_ABOVE = 3  # folders between a file that is used and the folder of its run, at most


def name_of(kind: str, *parts: object) -> str:
    """A name that W&B accepts."""
    return re.sub(r"[^\w.-]", "-", "-".join([kind, *map(str, parts)]))[:128]


def model_name(run: RunFolder) -> str:
    """Of a run's checkpoints and of what it exports."""
    return _name_of_run("model", run)


def generated_name(root: Path) -> str:
    """Of a generated set: by the run that it lies in; by its folder where it was taken out of that."""
    run = run_around(root)
    return _name_of_run("generated", run) if run else name_of("generated", root.name)


def _name_of_run(kind: str, run: RunFolder) -> str:
    """By the names that it was trained under, wherever its folder has been moved since."""
    said = run.config()
    return name_of(kind, said.get("experiment") or run.experiment, said.get("run_id") or run.run_id)


def data_name(record: Mapping[str, Any]) -> str | None:
    """Of the data set in its splits, by what `run.json` says of it."""
    data, fingerprint = record.get("data"), record.get("data_fingerprint")
    return name_of("data", data["class"], fingerprint) if data and fingerprint else None


def run_around(path: Path) -> RunFolder | None:
    """The run whose folder holds a file or folder."""
    for folder in [path, *path.parents][: _ABOVE + 1]:
        if (folder / "run.json").is_file():
            return RunFolder(folder)
    return None


def used_by(config: Mapping[str, Any], run: RunFolder) -> list[str]:
    """Artifacts of other runs that a configuration points to: bases, first stages, checkpoints, generated sets."""
    found = []
    for value in _texts(flatten({key: config.get(key) for key in ("model", "data", "ckpt_path")}).values()):
        path = Path(value).expanduser()
        try:
            if "/" not in value or not path.exists():
                continue
        except (OSError, ValueError):  # a text too long for a path
            continue
        path = path.resolve()
        other = run_around(path)
        if (path / MANIFEST).is_file():
            found.append(generated_name(path))
        elif other is not None and other.path != run.path.resolve():
            found.append(model_name(other))
    return list(dict.fromkeys(found))


def model_artifact(run: RunFolder, exports: str, policy: Checkpoints, metadata: Mapping[str, Any]) -> Any:
    """The checkpoints and the exported folder; None without any.

    Args:
        run: the folder.
        exports: file or folder in it that other runs build upon; empty for none.
        policy: `reference` notes where the files lie and their checksums, `upload` stores the best state and what is
            exported.
        metadata: of the artifact.
    """
    import wandb

    states = [path for path in (run.best, run.last) if path.is_file()]
    export = run.path / exports if exports else None
    artifact = wandb.Artifact(model_name(run), "model", metadata=dict(metadata))
    if policy == "upload":
        for path in states[:1]:
            artifact.add_file(str(path.resolve()), policy="immutable")
    else:
        for path in states:
            artifact.add_reference(path.resolve().as_uri(), name=path.name)
    if export is not None and export.exists():
        if policy == "reference":
            artifact.add_reference(export.resolve().as_uri(), name=export.name)
        elif export.is_dir():
            artifact.add_dir(str(export.resolve()), name=export.name, policy="immutable")
        else:
            artifact.add_file(str(export.resolve()), policy="immutable")
    return artifact if artifact.manifest.entries else None


def file_artifact(name: str, kind: str, files: Iterable[Path], metadata: Mapping[str, Any]) -> Any:
    """Small files, stored: splits, the manifest of a generated set; None without any."""
    import wandb

    artifact = wandb.Artifact(name, kind, metadata=dict(metadata))
    for path in files:
        if path.is_file():
            artifact.add_file(str(path.resolve()), policy="immutable")
    return artifact if artifact.manifest.entries else None


def use(run: Any, names: Iterable[str]) -> list[str]:
    """Tell W&B that a run uses artifacts; gives those that it does not know, as all of them off line."""
    unknown = []
    for name in names:
        try:
            run.use_artifact(f"{name}:latest")
        except Exception:  # off line, or logged by nobody: W&B raises many kinds
            unknown.append(name)
    return unknown


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str) and value:
            yield value
        elif isinstance(value, list | tuple):
            yield from _texts(value)
        elif isinstance(value, Mapping):
            yield from _texts(value.values())
