"""Seconds that the verb `report` takes over 10, 100 and 1,000 run folders, each arm with five seeds.

    python benchmarks/report.py [--template RUN] [--counts 10 100 1000]

The runs are copies of RUN (without its checkpoints and pictures), a finished run, with other seeds and learning rates;
without one they are the small ones of the tests. The first line is the process that only prints its help. The whole
command writes HTML, CSV and LaTeX; imports, reading of the runs, and tests with sections are timed in a second process.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 5
SMALL = ("*.json", "*.csv", "config.yaml")
TIMED = """
import sys, time
start = time.perf_counter()
from lit_defect.report.contents import build
from lit_defect.report.matter import Asked, gather
from pathlib import Path
imported = time.perf_counter()
matter = gather(Asked(runs=[Path(sys.argv[1])]))
read = time.perf_counter()
build(matter)
print(imported - start, read - imported, time.perf_counter() - read)
"""


def copies(template: Path | None, folder: Path, count: int) -> None:
    """Write `count` runs below `folder`, five seeds for each learning rate."""
    sys.path.insert(0, str(ROOT))
    from tests.run_folders import make_run

    for number in range(count):
        arm, seed = divmod(number, SEEDS)
        lr = round(1e-4 * (arm + 1), 6)
        if template is None:
            make_run(folder, f"arm_{arm:03d}", seed, lr=lr, accuracy=0.5 + 0.02 * seed, steps=200)
            continue
        run = folder / f"arm_{arm:03d}" / f"s{seed}"
        run.mkdir(parents=True)
        for pattern in SMALL:
            for file in template.glob(pattern):
                shutil.copyfile(file, run / file.name)
        config = (template / "config.yaml").read_text()
        lines = [f"    lr: {lr}" if line.startswith("    lr: ") else line for line in config.splitlines()]
        (run / "config.yaml").write_text("\n".join(lines).replace("seed_everything: 0", f"seed_everything: {seed}"))
        for file in run.glob("*_metrics.json"):
            file.write_text(file.read_text().replace('"training_seed": 0', f'"training_seed": {seed}'))


def seconds(words: list[str]) -> tuple[float, str]:
    """Of a process, and what it has printed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, help="a finished run that is copied")
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1000])
    options = parser.parse_args()
    print(f"`--help`: {seconds(['-m', 'lit_defect', 'report', '--help'])[0]:.2f} s\n")
    print("| runs | whole command, s | of it imports | reading | tests and sections | page, MB |")
    print("|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as temporary:
        for count in options.counts:
            runs, out = Path(temporary) / f"runs{count}", Path(temporary) / f"report{count}"
            copies(options.template, runs, count)
            whole, _ = seconds(["-m", "lit_defect", "report", str(runs), "-o", str(out), "--wandb", "off"])
            imports, reading, building = map(float, seconds(["-c", TIMED, str(runs)])[1].split())
            size = (out / "report.html").stat().st_size / 1e6
            print(
                f"| {count} | {whole:.1f} | {imports:.1f} | {reading:.1f} | {building:.1f} | {size:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
