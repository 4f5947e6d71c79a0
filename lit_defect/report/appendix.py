"""The sections that come last: examples, all runs, how to repeat each, and how W&B gets what was kept off line."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lit_defect.report.arms import Arm
from lit_defect.report.blocks import Block, Cell, Code, Column, Details, Picture, Pictures, Section, Table, Text
from lit_defect.report.collect import RunInfo
from lit_defect.report.figures import better, label
from lit_defect.report.matter import Matter, common_folder

_EXAMPLES = re.compile(
    r"(mistakes|worst|best|escapes|false_alarms|found|generated|edits|samples|masks|reconstructions|pseudo_anomalies|"
    r"predictions|gallery)$"
)
_ARMS = 6
_KINDS = 5
_CONFIGS = 12
_LINES = 400


def examples(matter: Matter) -> Section | None:
    """Pictures that the runs have drawn already, one kind after another, arms side by side."""
    if not matter.asked.pictures:
        return None
    arms = [arm for arm in matter.arms or matter.grouped.arms]
    by_kind: dict[str, dict[str, Picture]] = {}
    for arm in arms:
        for run in arm.runs[:1]:
            for path in _figures(run, matter.stage):
                by_kind.setdefault(path.stem, {})[arm.name] = Picture(path, f"{arm.name}: {run.name}")
    kinds = sorted(by_kind, key=lambda kind: (not kind.startswith(matter.stage), -len(by_kind[kind])))
    blocks: list[Block] = []
    for kind in kinds[:_KINDS]:
        shown = list(by_kind[kind].values())[:_ARMS]
        blocks.append(Pictures(shown, kind.replace("_", " ")))
    made = list(_made(arms))[:_ARMS]
    if made:
        blocks.append(Pictures(made, "what the generators have made"))
    if not blocks:
        return None
    left = [f"{len(arms) - _ARMS} arms"] if len(arms) > _ARMS else []
    left += [", ".join(kind.replace("_", " ") for kind in kinds[_KINDS:])] if kinds[_KINDS:] else []
    note = "Of each arm the first run; they were drawn by the runs themselves."
    blocks.insert(0, Text(note + (f" Left out: {' and '.join(left)}; see `figures/` of the runs." if left else "")))
    return Section("Examples", blocks)


def run_table(matter: Matter) -> Section:
    """Every run with its state, also those that are broken or have not ended."""
    base = common_folder(matter.runs)
    arm_of = {run.folder.path: arm.name for arm in matter.grouped.arms for run in arm.runs}
    states = Counter(run.state for run in matter.runs)
    columns = [
        Column("run"), Column("arm"), Column("state"), Column("seed"), Column("epochs", 0), Column("steps", 0),
        Column("minutes", 1), *(Column(label(figure), 3, better=better(figure)) for figure in matter.figures),
        Column("started"), Column("commit"), Column("what went wrong"),
    ]  # fmt: skip
    rows: list[list[Cell]] = [
        [
            _relative(run.folder.path, base),
            arm_of.get(run.folder.path),
            run.state,
            str(run.seeds[0]),
            run.record.get("epochs"),
            run.record.get("steps"),
            _minutes(run),
            *(_figure(run, matter.stage, figure) for figure in matter.figures),
            str(run.record.get("started") or "").replace("T", " "),
            str(run.record.get("commit") or ""),
            _error(run),
        ]
        for run in matter.runs
    ]
    said = ", ".join(f"{count} {state}" for state, count in states.most_common())
    blocks: list[Block] = [Text(f"Runs below `{base}`: {said}.")]
    if states.keys() & {"lost"}:
        blocks.append(Text("Lost runs say that they run, but their process is gone; `--resume` goes on with them."))
    unfinished = sum(count for state, count in states.items() if state not in ("finished", "evaluation"))
    if unfinished:
        counted = sum(1 for run in matter.runs if run.state not in ("finished", "evaluation") and run.measured)
        text = f"{unfinished} runs have not finished; {counted} of them have results, which the tables count."
        blocks.append(Text(text, "warning"))
    if matter.problems:
        blocks.append(
            Details(f"{len(matter.problems)} files or folders that could not be read", _lines(matter.problems))
        )
    return Section("Runs", [*blocks, Table("runs", columns, rows, "Every run.", folded=30)])


def repeat(matter: Matter) -> Section:
    """The command of each arm's first run, and its whole configuration below a fold."""
    arms = matter.grouped.arms
    commands = "\n".join(f"# {arm.name}\n{command(arm.runs[0])}" for arm in arms[:_CONFIGS] if _said(arm.runs[0]))
    blocks: list[Block] = [
        Text(
            "The command of the first run of each arm; other seeds by `--seed_everything`. A run's `config.yaml` holds "
            "every option, defaults included, and is a `--config` again; `splits.csv` is a `--data.split_file`."
        ),
        Code(commands, "commands"),
    ]
    if len(arms) > _CONFIGS:
        more = "\n".join(f"# {arm.name}\n{command(arm.runs[0])}" for arm in arms[_CONFIGS:] if _said(arm.runs[0]))
        blocks.append(Details(f"Commands of {len(arms) - _CONFIGS} more arms", [Code(more)]))
    for arm in arms[:_CONFIGS]:
        try:
            text = (arm.runs[0].folder.path / "config.yaml").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        lines = text.splitlines()
        cut = [f"# ... {len(lines) - _LINES} more lines"] if len(lines) > _LINES else []
        blocks.append(Details(f"Configuration of {arm.name}", [Code("\n".join([*lines[:_LINES], *cut]))]))
    return Section("Configurations, and how to repeat each run", blocks)


def tracking(matter: Matter) -> Section | None:
    """How the runs that W&B has off line get there."""
    waiting, synced = [], 0
    for run in matter.runs:
        for folder in sorted((run.folder.path / "wandb").glob("offline-run-*")):
            if any(folder.glob("*.synced")):
                synced += 1
            else:
                waiting.append(folder)
    if not waiting:
        return None
    base = common_folder(matter.runs)
    shown = "\n".join(f"wandb sync {shlex.quote(str(path))}" for path in waiting[:20])
    said = f"{len(waiting)} W&B runs were kept off line" + (f", {synced} more are synced already" if synced else "")
    blocks: list[Block] = [Text(f"{said}; after `wandb login` these commands send them.")]
    if len(waiting) > 20:
        pattern = f"find {shlex.quote(base)} -type d -name 'offline-run-*' -print0 | xargs -0 -n 20 wandb sync"
        blocks.append(Code(pattern, "all of them"))
        blocks.append(Details("The first 20 one by one", [Code(shown)]))
    else:
        blocks.append(Code(shown))
    return Section("Weights & Biases", blocks)


def command(run: RunInfo) -> str:
    """The command of a run as it is typed."""
    words = _said(run)
    if words and (words[0].endswith(".py") or Path(words[0]).name == "lit-defect"):
        words = words[1:]
    return "python -m lit_defect " + shlex.join(words)


def _said(run: RunInfo) -> list[str]:
    words = run.record.get("command")
    return [str(word) for word in words] if isinstance(words, list) else []


def _figures(run: RunInfo, stage: str) -> list[Path]:
    """Pictures with examples; those of other stages than the report's are left out."""
    others = tuple(f"{name}_" for name in ("test", "val", "mirrored") if name != stage)
    try:
        found = sorted(run.folder.figures.glob("*.png"))
    except OSError:
        return []
    return [path for path in found if _EXAMPLES.search(path.stem) and not path.stem.startswith(others)]


def _made(arms: Sequence[Arm]) -> Iterator[Picture]:
    """Sheets of the generators whose pictures have trained."""
    seen = set()
    for arm in arms:
        try:
            said = json.loads((arm.runs[0].folder.path / "synthetic.json").read_text(encoding="utf-8"))
            made = Path(str(said["path"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for name in ("edits", "generated"):
            path = made.parent / "figures" / f"{name}.png"
            if path.is_file() and path not in seen:
                seen.add(path)
                yield Picture(path, f"{arm.name}: trained with {said.get('train', '?')} of these")


def _relative(path: Path, base: str) -> str:
    try:
        return str(path.relative_to(base))
    except ValueError:
        return str(path)


def _minutes(run: RunInfo) -> float | None:
    seconds = run.record.get("seconds")
    return sum(map(float, seconds)) / 60 if isinstance(seconds, list) and seconds else None


def _figure(run: RunInfo, stage: str, figure: str) -> float | None:
    found = run.measured.get(stage)
    return found.figures[figure].value if found and figure in found.figures else None


def _error(run: RunInfo) -> str:
    """The first line of what a run failed of, or what of its files is broken."""
    error = str(run.record.get("error") or "").strip()
    return error.splitlines()[0][:200] if error else "; ".join(run.problems)


def _lines(texts: Sequence[str]) -> list[Block]:
    return [Text(text) for text in texts[:200]]
