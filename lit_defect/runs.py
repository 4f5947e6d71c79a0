"""The run folder: where a run keeps what it was told, what it did and what came out.

`<runs_dir>/<experiment>/<run id>/` holds

- `config.yaml`: every option, defaults included; `run.json`: status, command, commit, versions, data fingerprint;
- `.launches/`: who has begun to train into it or to evaluate it, one after the other (`lit_defect.claims`);
- `metrics.csv`: what was logged, step by step;
- `checkpoints/last.ckpt` and `checkpoints/best.ckpt`;
- `splits.csv`, `leakage.csv`, `skipped.csv`: which sample went where, and what was found;
- `<stage>_metrics.json`, `<stage>_predictions.csv` and `figures/` for each evaluated stage: `test`, `val`, or
  `mirrored` where the training pictures were mirrored for the test (`data.test=mirrored_train`).

No torch here, so that reports and sweeps start quickly.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import socket
import subprocess
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lit_defect.errors import UserError
from lit_defect.files import whole_file

_LESS_IS_BETTER = ("loss", "error", "ece", "nll", "brier", "escape", "overkill")
RUN_ID_VARIABLE = "LIT_DEFECT_RUN_ID"
MIRRORED_TRAIN = "mirrored_train"  # of data.test
MIRRORED = "mirrored"  # what its results are called, which are those of no test
# Options that say where and how a run is carried out, not what it computes.
_NOT_THE_EXPERIMENT = (
    "config",
    "run_id",
    "resume",
    "runs_dir",
    "wandb",
    "wandb_checkpoints",
    "ckpt_path",
    "weights_only",
    "test_after_fit",
)
_RECORDED_PACKAGES = ("lit_defect", "torch", "torchvision", "lightning", "timm", "torchmetrics", "numpy", "pillow")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder; creating the object touches nothing on disk."""

    path: Path

    @property
    def experiment(self) -> str:
        """Name of the experiment that the run belongs to."""
        return self.path.parent.name

    @property
    def run_id(self) -> str:
        """Name of the run, unique in its experiment."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Folder of `last.ckpt` and `best.ckpt`."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The state that a resumed run goes on from."""
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        """The best state on the validation split."""
        return self.checkpoints / "best.ckpt"

    @property
    def figures(self) -> Path:
        """Folder of the pictures."""
        return self.path / "figures"

    def record(self) -> dict[str, Any]:
        """What `run.json` says; empty when there is none or it is unreadable."""
        return read_json(self.path / "run.json")

    def config(self) -> dict[str, Any]:
        """What `config.yaml` says; empty when there is none or it is unreadable."""
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
        try:
            return yaml.load((self.path / "config.yaml").read_text(encoding="utf-8"), loader) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return {}

    def splits(self) -> dict[str, str]:
        """Split by sample name, as the run has written it in `splits.csv`; empty when there is none."""
        try:
            with (self.path / "splits.csv").open(newline="", encoding="utf-8") as lines:
                return {row["name"]: row["split"] for row in csv.DictReader(lines)}
        except OSError:
            return {}

    def update(self, **changes: Any) -> None:
        """Change entries of `run.json`, atomically."""
        write_json(self.path / "run.json", {**self.record(), **changes})

    def is_alive(self) -> bool:
        """Whether the process that writes this run still runs on this machine."""
        record = self.record()
        if record.get("status") != "running" or record.get("host") != socket.gethostname():
            return False
        pid = int(record.get("pid", 0))
        started = process_start(pid) if pid > 0 and pid != os.getpid() else ""
        return bool(started) and started == record.get("process_start", started)


def process_start(pid: int) -> str:
    """When the kernel started a process of this machine, in its own ticks: a number used again is another process.

    Empty for one that is gone or a zombie, as killed processes stay in containers where nobody waits for them.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        if Path("/proc/self").exists():
            return ""
        try:  # a system without /proc
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "unknown"
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def is_finished(run: RunFolder, config: Mapping[str, Any]) -> bool:
    """Whether a run of this very configuration has nothing left to do, the test included that may have been killed."""
    record = run.record()
    tested = not config.get("test_after_fit") or (run.path / f"{test_name(config)}_metrics.json").is_file()
    return record.get("status") == "finished" and record.get("config_hash") == hash_config(config) and tested


def new_run_id(seed: int | None) -> str:
    """A fresh run id: time, seed and eight random characters, such as `20260131-120000-s0-1f3a07bc`.

    Of 50 jobs that begin in one second with one seed two would share four characters once in fifty times.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-s{'x' if seed is None else seed}-{secrets.token_hex(4)}"


def launched_run_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """The run id that all processes of one launch can know without talking to each other.

    Lightning's own launcher hands it down in an environment variable; torchrun and SLURM give every
    process the same job id. None for a process that was started alone.

    Raises:
        UserError: torchrun gave no unique id.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        if environ["TORCHELASTIC_RUN_ID"] == "none":
            raise UserError(
                "torchrun gave this job no id, so its processes cannot agree on a run folder: "
                "pass --run_id NAME to the program, or --standalone or --rdzv-id to torchrun"
            )
        return f"torchrun-{environ['TORCHELASTIC_RUN_ID']}"
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        job = environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environ:
            job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
        return f"slurm-{job}"
    if "LOCAL_RANK" in environ:
        return environ.get(RUN_ID_VARIABLE)
    return None


def list_runs(experiment_dir: Path) -> list[RunFolder]:
    """The runs of an experiment, newest first."""
    if not experiment_dir.is_dir():
        return []
    runs = [RunFolder(path.parent) for path in experiment_dir.glob("*/run.json")]
    return sorted(runs, key=lambda run: (run.record().get("started", ""), run.run_id), reverse=True)


def find_resumable(experiment_dir: Path, config_hash: str, trains: bool = True) -> RunFolder | None:
    """The newest run of this very configuration that no living process writes, finished or not.

    Args:
        experiment_dir: that holds the runs.
        config_hash: of the configuration.
        trains: whether a run of `fit` is looked for, not one of a verb that evaluates or generates.
    """
    for run in list_runs(experiment_dir):
        record = run.record()
        same = record.get("config_hash") == config_hash and (record.get("status") != "evaluation") == trains
        if same and not run.is_alive():
            return run
    return None


def check_name(option: str, name: str) -> None:
    """Refuse names that lead to another folder than their own.

    Raises:
        UserError: the name is empty, a dot or two, or has slashes.
    """
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(f"{option} {name!r}: a plain name is needed, without slashes; folders go into --runs_dir")


def changed_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations in what is computed, as `key: old -> new`."""
    old, new = (flatten({k: v for k, v in c.items() if k not in _NOT_THE_EXPERIMENT}) for c in (before, now))
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration as `{"model.init_args.lr": 0.03, ...}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def better(metric: str) -> Literal["min", "max"]:
    """Whether smaller or larger values of a logged metric are better, as its name tells."""
    return "min" if any(word in metric for word in _LESS_IS_BETTER) else "max"


def test_name(config: Mapping[str, Any]) -> str:
    """What the results of `test` are called under a configuration: `test` or `mirrored`."""
    data = config.get("data") or {}
    return MIRRORED if (data.get("init_args") or {}).get("test") == MIRRORED_TRAIN else "test"


def hash_config(config: Mapping[str, Any]) -> str:
    """Hash of what is computed: the configuration without run id, folders and tracking."""
    relevant = {key: value for key, value in config.items() if key not in _NOT_THE_EXPERIMENT}
    text = json.dumps(relevant, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resolve_checkpoint(name: str, experiment_dir: Path, run_id: str | None) -> Path:
    """The file behind `--ckpt_path`: `best` and `last` mean the newest run's own.

    Args:
        name: `best`, `last` or a file; of a finished run whose task chooses no best state, `best` is the last.
        experiment_dir: folder of the experiment's runs.
        run_id: a certain run, or None for the newest one that has such a checkpoint.

    Raises:
        UserError: there is no such file.
    """
    if name not in ("best", "last"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"--ckpt_path {name}: no such file; give a checkpoint's path, `best` or `last`")
        return path
    runs = [RunFolder(experiment_dir / run_id)] if run_id else list_runs(experiment_dir)
    for run in runs:
        found: Path = getattr(run, name)
        if found.is_file():
            return found
        if run.last.is_file() and run.record().get("status") == "finished":
            return run.last
    where = experiment_dir / run_id if run_id else experiment_dir
    raise UserError(
        f"--ckpt_path {name}: no run in {where} has a checkpoints/{name}.ckpt; "
        "run `fit` with the same --experiment first, or give the checkpoint's path"
    )


def whole_checkpoint(path: Path) -> Path:
    """The path, if the file is what `torch.save` writes, from its first byte to its last.

    Raises:
        UserError: the file is something else, or was cut off.
    """
    if not zipfile.is_zipfile(path):  # its table of contents is at the end
        raise UserError(f"{path} is no checkpoint, or only a part of one; give another by --ckpt_path")
    return path


def run_of_checkpoint(path: Path) -> RunFolder | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    folder = path.resolve().parent.parent
    return RunFolder(folder) if path.parent.name == "checkpoints" and (folder / "run.json").is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file says; empty when there is none or it is unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def whole_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a `metrics.csv`, without the half line of one that is being written, or that a full disk has left.

    No rows if there is no file.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")  # the half line may end within a letter
    except OSError:
        return []
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    text = json.dumps(content, indent=2, sort_keys=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())


def keep_previous(path: Path) -> None:
    """Rename an existing `name.ext` to the first free `name.1.ext`, `name.2.ext`, ...: results are never lost.

    Of several processes that do so at once each takes a number of its own before it renames, and one has the file.
    """
    number = 0
    while path.exists():
        target = path.with_name(f"{path.stem}.{(number := number + 1)}{path.suffix}")
        try:
            target.mkdir() if path.is_dir() else target.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            path.replace(target)
        except FileNotFoundError:  # another process has kept it meanwhile
            target.unlink()
        return


def describe_process(command: list[str]) -> dict[str, Any]:
    """Who runs where with what: command, host, commit and package versions, for `run.json`."""
    return {
        "command": command,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "commit": _git_commit(),
        "versions": {name: found for name in _RECORDED_PACKAGES if (found := _installed(name))},
        "cpus": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the checkout that this code lies in, `+` for uncommitted changes; None outside of git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here, capture_output=True, text=True, timeout=5, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if dirty else "")
