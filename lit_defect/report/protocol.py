"""The sections on how it was done: what was asked, what the arms are, the data, and what the test set is worth."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_defect.report.blocks import Block, Cell, Code, Column, Details, Section, Table, Text
from lit_defect.report.collect import RunInfo
from lit_defect.report.figures import label, meaning
from lit_defect.report.matter import Matter, common_folder
from lit_defect.report.splits import read_splits, tested_names
from lit_defect.reporting.seeds import Spread, experiment_of
from lit_defect.reporting.study_runs import REAL

_SIDE_BY_SIDE = 8


def question(matter: Matter) -> Section:
    """What is asked, and of what."""
    asked, study = matter.asked, matter.study
    text = asked.question or (study.question if study else "")
    name = label(matter.judged) if matter.judged else "what they log"
    if not text:
        arms, runs = len(matter.grouped.arms), len(matter.runs)
        text = f"How do {arms} arms of {runs} runs stand to each other in {name}?"
        if arms == 1:
            text = f"What do{'es a run' if runs == 1 else f' {runs} runs'} of one configuration come to in {name}?"
    blocks: list[Block] = [Text(text)]
    if matter.judged:
        sizes = {len(tested_names(run, matter.stage)) for arm in matter.arms for run in arm.runs}
        count = f"{size} " if len(sizes) == 1 and (size := next(iter(sizes))) else ""
        said = f"Judged by {name}{f' ({meant})' if (meant := meaning(matter.judged)) else ''}"
        said += f" on {count}{matter.where}."
        if matter.baseline is not None and matter.others:
            chosen = (
                "by `--compare`" if asked.compare else "by the study's file" if study else "for its most usual options"
            )
            said += f" Arms are held against `{matter.baseline.name}`, chosen {chosen}."
        blocks.append(Text(said))
    if asked.filters:
        blocks.append(Text(f"Only runs with {' and '.join(f'`{text}`' for text in asked.filters)}.", "note"))
    return Section("Question", blocks)


def _how_made(matter: Matter) -> Text:
    asked, study = matter.asked, matter.study
    how = "by the study's file" if study else f"by {', '.join(asked.group_by)}" if asked.group_by else ""
    prefix = matter.grouped.prefix
    made = (
        "Runs of one experiment that differ in nothing but seeds make an arm, named by its experiment and by options "
    )
    made += f"that tell it apart{f'; `{prefix}`, with which all experiments begin, is left out' if prefix else ''}."
    return Text(f"Arms were made {how}." if how else made, "note")


def protocol(matter: Matter) -> Section:
    """What the arms are, and with what they were made."""
    blocks: list[Block] = [_how_made(matter), *_arms_table(matter)]
    blocks += _differences(matter)
    if mixed := [f"{name}: {keys}" for name, keys in matter.grouped.mixed]:
        blocks.append(Text("Runs of one arm differ in more than seeds:", "warning", _shortened(mixed)))
    if repeated := [f"{arm.name}: {arm.repeated} runs" for arm in matter.grouped.arms if arm.repeated]:
        text = "Runs that repeat a seed of their arm; the mean of a seed's runs counts once:"
        blocks.append(Text(text, "warning", _shortened(repeated)))
    blocks += _environment(matter.runs)
    return Section("Protocol", blocks)


def leakage(matter: Matter) -> Section | None:
    """Near-duplicates between training and test, figures without them, and what generators have learnt from."""
    if not matter.arms:
        return None
    rows: list[list[Cell]] = []
    seen: list[str] = []
    unknown: list[str] = []
    for arm in matter.arms:
        runs = [run for run in arm.runs if matter.stage in run.measured]
        found = [_near_duplicates(run.folder.path / "leakage.csv", matter.stage) for run in runs]
        counted = [count for count in found if count is not None]
        spread, fresh = arm.spread(matter.stage, matter.judged), _fresh(runs, matter)
        learnt, generators = _learnt(runs[0], matter.stage)
        rows.append(
            [
                arm.name,
                None if not counted else max(counted),
                _value(spread.mean),
                _value(fresh.mean),
                _value(fresh.mean - spread.mean),
                ", ".join(generators) or None,
                learnt,
            ]
        )
        if learnt:
            seen.append(f"{arm.name}: from {learnt}")
        if not counted:
            unknown.append(arm.name)
    name = label(matter.judged)
    columns = [
        Column("arm"),
        Column("near-duplicate pairs", 0, f"between training and {matter.where}, the most of any of its runs"),
        Column(name, 3),
        Column("without them", 3, "the same without pictures that nearly repeat a training picture"),
        Column("change", 4),
        Column("trained with pictures of", 0),
        Column("test pictures that these learnt from", 0),
    ]
    blocks: list[Block] = []
    if any(any(cell is not None for cell in row[1:2] + row[5:]) for row in rows):
        caption = f"What stands on both sides of the split, and what it is worth in {name}."
        blocks.append(Table("leakage", columns, rows, caption))
    if seen:
        blocks.append(Text("Its generator has learnt from test pictures:", "warning", _shortened(seen)))
    if unknown:
        of_all = len(unknown) == len(matter.arms)
        text = f"Near-duplicates were not looked for (no `leakage.csv`){'.' if of_all else ':'}"
        blocks.append(Text(text, "note", [] if of_all else _shortened(unknown)))
    if matter.stage == "mirrored":
        blocks.append(Text("The tested pictures are the training pictures mirrored: a leak by design.", "warning"))
    blocks += _different_tests(matter)
    return Section("Data and leakage", blocks)


def _arms_table(matter: Matter) -> Iterator[Block]:
    """What all arms have in common in a sentence, and the rest as a table."""
    rows: list[list[Cell]] = []
    for arm in matter.grouped.arms:
        run = arm.runs[0]
        rows.append(
            [
                arm.name,
                *([arm.title] if matter.study else []),
                run.task,
                _data(run),
                *_counts(run),
                ", ".join(dict.fromkeys(str(run.seeds[0]) for run in arm.runs)),
                len(arm.runs),
                _mean(run.record.get("steps") for run in arm.runs),
                _mean(run.record.get("devices") for run in arm.runs),
            ]
        )
    columns = [
        Column("arm"),
        *([Column("title")] if matter.study else []),
        Column("task"),
        Column("data"),
        Column("trained on", help="pictures by label; of the first run"),
        Column("validation pictures", 0),
        Column("test pictures", 0),
        Column("parts tested", 0, "physical parts that the test pictures show"),
        Column("seeds"),
        Column("runs", 0),
        Column("steps", 0),
        Column("devices", 0),
    ]
    same = [k for k in range(1, len(columns)) if len(rows) > 1 and len({row[k] for row in rows}) == 1]
    said = [f"{columns[k].name} {_plain(rows[0][k])}" for k in same if rows[0][k] is not None]
    if said:
        yield Text(f"The same for all {len(rows)} arms: {'; '.join(said)}.")
    kept = [k for k in range(len(columns)) if k not in same]
    if kept == [0]:
        return
    rows = [[row[k] for k in kept] for row in rows]
    yield Table("arms", [columns[k] for k in kept], rows, "The arms, with the pictures of the first run of each.")


def _data(run: RunInfo) -> str:
    """Class of the data and the folder that it was read from."""
    root = run.options.get("data.init_args.root")
    return f"{run.data} ({Path(root).name})" if isinstance(root, str) and Path(root).name else run.data


def _plain(cell: Cell) -> str:
    return f"{cell:g}" if isinstance(cell, float) else str(cell)


def _counts(run: RunInfo) -> tuple[Cell, Cell, Cell, Cell]:
    """Training pictures by label and source, numbers of validation and test pictures, and parts tested."""
    splits = read_splits(run)
    if splits is None:
        counts = (run.record.get("data") or {}).get("counts") if isinstance(run.record.get("data"), dict) else None
        return (str(counts) if counts else None), None, None, None
    names = _class_names(run)
    trained: Counter[str] = Counter()
    for (split, text, source), count in splits.counts.items():
        if split == "train":
            name = names[int(text)] if text.isdigit() and int(text) < len(names) else "pictures"
            trained[name if source == REAL else f"{name} by {source}"] += count
    words = ", ".join(f"{count} {name}" for name, count in trained.items())
    if generated := _synthetic(run).get("train"):
        words += f", {generated} generated"
    return words or None, splits.count("val"), splits.count("test"), splits.parts("test") or None


def _class_names(run: RunInfo) -> Sequence[str]:
    """Of the labels in `splits.csv`; none where these are not what the run tells apart."""
    for found in run.measured.values():
        if "confusion" in found.about:
            return [str(name) for name in found.about["class_names"]]
        if "image" in found.about:
            return "good", "defective"
    return ()


def _differences(matter: Matter) -> Iterator[Block]:
    differ, arms = matter.grouped.differ, matter.grouped.arms
    if not differ:
        if len(arms) > 1:
            yield Text("The arms do not differ in any option that says what is computed.", "warning")
        return
    usual = {key: Counter(texts.values()).most_common(1)[0][0] for key, texts in differ.items()}
    if len(arms) <= _SIDE_BY_SIDE:
        own = [key for key, texts in differ.items() if _belongs_to_another(key, texts, differ)]
        main = [key for key in differ if key not in own]
        yield _side_by_side("differences_of_options", "What differs between arms.", main, matter, usual)
        if own:
            table = _side_by_side("options_of_choices", "Options of one arm's choice alone.", own, matter, usual)
            yield Details("Options that only one of these choices has", [table])
        return
    rows = []
    for arm in arms:
        own = [f"{key}={_shown(texts[arm.name])}" for key, texts in differ.items() if texts[arm.name] != usual[key]]
        rows.append([arm.name, ", ".join(own) or "the usual values"])
    columns = [Column("arm"), Column("departs from the usual values in")]
    yield Table("differences_of_options", columns, rows, "What differs between arms.", folded=20)
    usual_rows: list[list[Cell]] = [[key, _shown(value)] for key, value in usual.items()]
    usual_table = Table("usual_options", [Column("option"), Column("usual value")], usual_rows)
    yield Details("The usual values: those that most arms have", [usual_table])


def _belongs_to_another(key: str, texts: Mapping[str, str], differ: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether an option has one value, in arms that have made a choice which brings it along."""
    return len(set(texts.values()) - {"-"}) == 1 and any(key.startswith(f"{parent}.") for parent in differ)


def _side_by_side(name: str, caption: str, keys: Sequence[str], matter: Matter, usual: Mapping[str, str]) -> Table:
    """Options by arms; of more than two arms, what departs from the usual value stands out."""
    arms, differ = matter.grouped.arms, matter.grouped.differ
    rows: list[list[Cell]] = [
        [key, *(None if (text := differ[key][arm.name]) == "-" else _shown(text) for arm in arms)] for key in keys
    ]
    strong = [
        (i, k)
        for i, key in enumerate(keys)
        for k, arm in enumerate(arms, 1)
        if differ[key][arm.name] != usual[key] and len(arms) > 2
    ]
    return Table(name, [Column("option"), *(Column(arm.name) for arm in arms)], rows, caption, strong, folded=20)


def _environment(runs: Sequence[RunInfo]) -> Iterator[Block]:
    """Commits, versions and machines, with how many runs have each."""
    lines = []
    for word, value in (
        ("commit", lambda run: run.record.get("commit")),
        ("host", lambda run: run.record.get("host")),
        ("data fingerprint", lambda run: run.record.get("data_fingerprint")),
        ("versions", lambda run: ", ".join(f"{k} {v}" for k, v in (run.record.get("versions") or {}).items())),
    ):
        found = Counter(str(text) for run in runs if (text := value(run)))
        if found:
            each = [f"{text} ({count} runs)" if len(found) > 1 else text for text, count in found.most_common(8)]
            lines.append(f"{word}: {'; '.join(each)}" + ("; ..." if len(found) > 8 else ""))
            if word == "commit" and len(found) > 1:
                yield Text(f"The runs are of {len(found)} commits: their code may have differed.", "warning")
            if word == "commit" and any(text.endswith("+") for text in found):
                text = "Some runs had changes that were not committed (+ behind the commit): their code cannot be had."
                yield Text(text, "warning")
    started = sorted(str(run.record["started"]) for run in runs if run.record.get("started"))
    if started:
        lines.append(f"started: {started[0]} to {started[-1]}")
    if runs:
        lines.append(f"folder: {common_folder(runs)}")
    yield Code("\n".join(lines), "made with")


def _near_duplicates(file: Path, stage: str) -> int | None:
    """Pairs between training and the stage's pictures; None where they were not looked for."""
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            pairs = [{row.get("split_a"), row.get("split_b")} for row in csv.DictReader(lines)]
    except (OSError, ValueError, csv.Error):
        return None
    return sum(pair == {"train", "test" if stage == "mirrored" else stage} for pair in pairs)


def _fresh(runs: Sequence[RunInfo], matter: Matter) -> Spread:
    found = [run.measured[matter.stage].fresh.get(matter.judged) for run in runs]
    return Spread.of(figure.value for figure in found if figure is not None)


def _learnt(run: RunInfo, stage: str) -> tuple[int | None, list[str]]:
    """How many tested pictures the makers of the generated training pictures have learnt from, and who they are."""
    said = _synthetic(run)
    if "path" not in said:
        return None, []
    made = Path(str(said["path"]))
    name = f"{said.get('generator', 'a generator')} ({experiment_of(made)}, {said.get('train', '?')} pictures)"
    try:
        with (made / "trained_on.csv").open(newline="", encoding="utf-8") as lines:
            learnt = {row["name"] for row in csv.DictReader(lines)}
    except (OSError, ValueError, KeyError, csv.Error):
        return None, [name]
    return len(learnt & tested_names(run, stage)), [name]


def _synthetic(run: RunInfo) -> dict[str, Any]:
    """What `synthetic.json` says of the generated pictures that have trained; empty where none did."""
    try:
        said = json.loads((run.folder.path / "synthetic.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _different_tests(matter: Matter) -> Iterator[Block]:
    """Whether all runs were tested on the same pictures."""
    by_arm = [{names for run in arm.runs if (names := tested_names(run, matter.stage))} for arm in matter.arms]
    known = list(set().union(*by_arm))
    unknown = sum(not tested_names(run, matter.stage) for arm in matter.arms for run in arm.runs)
    if len(known) == 1:
        others = f"; of {unknown} it is not known, for want of a `splits.csv`" if unknown else ""
        yield Text(f"{'The' if unknown else 'All'} runs were tested on the same {len(known[0])} pictures{others}.")
    elif known:
        sizes = sorted(map(len, known))
        within = " means over seeds then hold the chance of the split, too, and" if max(map(len, by_arm)) > 1 else ""
        yield Text(
            f"The runs have {len(known)} different sets of tested pictures, of {sizes[0]} to {sizes[-1]}:{within} only "
            "runs with the same pictures are paired.",
            "warning",
        )
    else:
        yield Text("Which pictures were tested is not known: there is no `splits.csv`.", "note")


def _mean(values: Any) -> float | None:
    found = [float(value) for value in values if isinstance(value, (int, float))]
    return math.fsum(found) / len(found) if found else None


def _value(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _shown(text: str) -> str:
    """A value of an option; a number that was drawn has more digits than anybody reads (the command has them all)."""
    if re.fullmatch(r"-?\d*\.\d{7,}(e-?\d+)?", text):
        return f"{float(text):.4g}"
    return text if len(text) <= 80 else f"{text[:38]} ... {text[-38:]}"


def _shortened(texts: Sequence[str]) -> list[str]:
    """The first few, and how many more there are."""
    return [*texts[:5], *([f"... and {len(texts) - 5} more"] if len(texts) > 5 else [])]
