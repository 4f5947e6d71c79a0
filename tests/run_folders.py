"""Run folders as the tasks leave them, written without training anything."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import yaml


def make_run(
    runs_dir: Path,
    experiment: str,
    seed: int,
    *,
    lr: float = 0.001,
    augment: str = "flips",
    accuracy: float = 0.8,
    status: str = "finished",
    category: str | None = None,
    tested: int = 40,
    classes: tuple[str, ...] = ("good", "defective"),
    first_test: int = 0,
    evaluated: bool = True,
    steps: int = 20,
    run_id: str = "",
    **record: Any,
) -> Path:
    """A classifier's run, whose predictions are right for the given share of pictures; returns its folder."""
    folder = runs_dir / experiment / (run_id or f"s{seed}")
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "trainer": {"max_epochs": 5, "devices": "auto"},
        "model": {
            "class_path": "lit_defect.tasks.DefectClassifier",
            "init_args": {"lr": lr, "augment": augment, "schedule": "cosine"},
        },
        "data": {"class_path": "lit_defect.data.ELPV", "init_args": {"seed": 0, "root": None}},
        "experiment": experiment,
        "run_id": folder.name,
    }
    if category:
        config["data"]["init_args"]["category"] = category
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = {
        "command": ["/somewhere/lit_defect/__main__.py", "fit", "--experiment", experiment],
        "host": "elsewhere", "pid": 1, "commit": "0123456789ab", "versions": {"torch": "2.11.0"},
        "started": f"2026-01-01T00:00:{seed % 60:02d}", "status": status, "seed": seed, "seconds": [60.0 + seed],
        "epochs": 5, "steps": steps, **record,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(said), encoding="utf-8")
    draw = random.Random(f"{experiment}{lr}{seed}")
    _csv(
        folder / "metrics.csv",
        ["epoch", "lr-AdamW", "step", "train/loss", "val/loss"],
        [[k, 0.001, 10 * k, 1 / (k + 1) + 0.01 * draw.random(), "" if k % 2 else 1 / (k + 1)] for k in range(steps)],
    )
    names = [f"p{number:03d}.png" for number in range(first_test, first_test + tested)]
    labels = [k % len(classes) for k in range(tested)]
    splits = [[name, "test", label, f"part{name}", "real"] for name, label in zip(names, labels, strict=True)]
    splits += [[f"t{k}.png", "train", k % len(classes), f"t{k}", "real"] for k in range(10)]
    _csv(folder / "splits.csv", ["name", "split", "label", "group", "source"], splits)
    _csv(folder / "leakage.csv", ["name_a", "split_a", "name_b", "split_b"], [["t0.png", "train", names[0], "test"]])
    if evaluated:
        wrong = set(draw.sample(range(tested), round((1 - accuracy) * tested)))
        called = [(label + (k in wrong)) % len(classes) for k, label in enumerate(labels)]
        _results(folder, names, labels, called, classes, seed, accuracy)
    return folder


def _results(
    folder: Path,
    names: list[str],
    labels: list[int],
    called: list[int],
    classes: tuple[str, ...],
    seed: int,
    share: float,
) -> None:
    rows = [
        [name, classes[label], classes[call], 0.9 if call else 0.1]
        for name, label, call in zip(names, labels, called, strict=True)
    ]
    _csv(folder / "test_predictions.csv", ["name", "label", "prediction", "score"], rows)
    confusion = [[0] * len(classes) for _ in classes]
    for label, call in zip(labels, called, strict=True):
        confusion[label][call] += 1
    recall = [row[k] / max(1, sum(row)) for k, row in enumerate(confusion)]
    interval = {"low": share - 0.1, "high": min(1.0, share + 0.1)}
    result = {
        "n": len(names), "n_groups": len(names), "level": 0.95, "class_names": list(classes), "normal_class": 0,
        "accuracy": {"value": share, **interval}, "balanced_accuracy": {"value": sum(recall) / len(recall), **interval},
        "auroc": {"value": share, **interval}, "ece": {"value": 0.1, "low": 0.0, "high": 0.2},
        "escape_rate": {"value": None, "low": None, "high": None, "reason": "no threshold"},
        "recall": {name: {"value": value} for name, value in zip(classes, recall, strict=True)},
        "confusion": confusion, "training_seed": seed, "split_seed": 0, "images_per_second": 100.0,
        "without_near_duplicates": {"n": len(names) - 1, "accuracy": {"value": share - 0.01}},
    }  # fmt: skip
    (folder / "test_metrics.json").write_text(json.dumps(result), encoding="utf-8")


def _csv(path: Path, head: list[str], rows: list[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def make_sweep(runs_dir: Path, name: str = "search", trials: int = 6) -> Path:
    """A sweep's file without runs, the last trial failed; returns its folder."""
    folder = runs_dir / name
    folder.mkdir(parents=True)
    listed = [
        {
            "number": k, "state": "complete" if k < trials - 1 else "failed", "value": 0.5 + 0.05 * (k % 4) if k < trials - 1 else None,
            "params": {"model.init_args.lr": 10.0 ** -(k % 3 + 2), "model.init_args.augment": ("flips", "strong")[k % 2]},
            "seeds": [0, 1], "values": [0.5, 0.6], "runs": [], "seconds": 30.0, "worker": "w1",
        }
        for k in range(trials)
    ]  # fmt: skip
    said = {
        "sweep": name, "metric": {"name": "val/auroc", "goal": "maximize"}, "method": "bayes",
        "parameters": {"model.init_args.lr": {"log": True, "choices": False},
                       "model.init_args.augment": {"log": False, "choices": True}},
        "importance": {"model.init_args.lr": 0.7, "model.init_args.augment": 0.3}, "trials": listed,
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(said), encoding="utf-8")
    return folder
