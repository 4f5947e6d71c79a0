"""Seconds until the command line answers, and of a whole run with everything cached.

    python benchmarks/startup.py [--repeats 5]

`python -m lit_defect fit --help` against what every LightningCLI pays, `python -c "import lightning.pytorch.cli"`
(goal: within 1.5 times), and `experiments/quickstart.yaml` (40 epochs and the test, with figures) before and
after the features of its pictures are known. Each in a process of its own, taking turns; medians.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
    "lit_defect --help": ["-m", "lit_defect", "--help"],
    "lit_defect fit --help": ["-m", "lit_defect", "fit", "--help"],
    "lit_defect fit --model.help DefectClassifier": ["-m", "lit_defect", "fit", "--model.help=DefectClassifier"],
}


def seconds(arguments: list[str], **variables: str) -> tuple[float, float]:
    """Wall time and processor time of one python process."""
    used, begun = processor_time(), time.perf_counter()
    environment = {**os.environ, **variables}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun, processor_time() - used


def processor_time() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def quickstart(folder: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    run = ["-m", "lit_defect", "fit", "--config=experiments/quickstart.yaml", "--wandb=off"]
    turns = [
        seconds([*run, f"--runs_dir={folder}/runs"], LIT_DEFECT_CACHE=f"{folder}/cache") for _ in range(1 + repeats)
    ]
    return {"quickstart, nothing known": turns[:1], "quickstart, warm cache": turns[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    seconds(COMMANDS["lit_defect fit --help"])  # bytecode and disk cache
    found: dict[str, list[tuple[float, float]]] = {title: [] for title in COMMANDS}
    for _ in range(repeats):
        for title, arguments in COMMANDS.items():
            found[title].append(seconds(arguments))
    with tempfile.TemporaryDirectory() as folder:
        found.update(quickstart(folder, max(1, repeats // 2)))
    medians = {title: [statistics.median(x) for x in zip(*turns, strict=True)] for title, turns in found.items()}
    wall_0, cpu_0 = medians["import lightning.pytorch.cli"]
    print("| command | wall, s | times the import | processor, s | times the import |\n|---|---|---|---|---|")
    for title, (wall, cpu) in medians.items():
        print(f"| {title} | {wall:.1f} | {wall / wall_0:.2f} | {cpu:.1f} | {cpu / cpu_0:.2f} |")


if __name__ == "__main__":
    main()
