"""The report of a study: arms side by side, what the differences allow to say, and what the test set is worth.

`python -m lit_defect study FILE` writes it at the end, and with `--report` at any time, also while runs are missing: it
says which. It is `report.md`, `figures.csv` (means and differences), `runs.csv` (every run) and `arms.png` in
`<runs_dir>/<study>/`.
"""

from __future__ import annotations

import csv
import io
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lit_defect.files import whole_file
from lit_defect.metrics.intervals import Interval
from lit_defect.reporting import seeds
from lit_defect.reporting.seeds import Line, Spread, difference
from lit_defect.reporting.study_alike import changed_since, tested_unlike, unlike
from lit_defect.reporting.study_runs import (
    FIGURES,
    HOLD_OUT,
    OVER_PICTURES,
    STAGES,
    Compared,
    Results,
    StudyRun,
    compare,
    has_stage,
    read_results,
    spread,
)
from lit_defect.reporting.study_verdict import conclusions
from lit_defect.reporting.tables import markdown_table
from lit_defect.runs import MIRRORED
from lit_defect.study_file import Study
from lit_defect.study_plan import step_run


def write_report(study: Study, *, checked: bool = False) -> Path:
    """Write the report with its tables and picture; returns the Markdown file.

    Args:
        study: what was studied.
        checked: whether the runs are known to have the options of the file; else that is looked at, for some seconds.

    Raises:
        UserError: there is no tested run yet.
    """
    from lit_defect.reporting.study_figure import arms_figure
    from lit_defect.reporting.style import save_figure

    results, folder = read_results(study), study.folder
    text = markdown(study, results, () if checked else changed_since(study, results))
    stage = HOLD_OUT if has_stage(results, HOLD_OUT) else MIRRORED
    titles = {arm: study.arms[arm].title for arm in results}
    title = study.name if stage == HOLD_OUT else f"{study.name}, {STAGES[stage]}"
    save_figure(arms_figure(results, titles, study.baseline, title, stage), folder / "arms.png")
    seeds.write_lines(_lines(study, results), folder / "figures.csv")
    text += _pictures(study, folder)
    for name, content in (("runs.csv", _runs_csv(results)), ("report.md", text)):
        with whole_file(folder / name) as file:
            file.write(content.encode())
    return folder / "report.md"


def markdown(study: Study, results: Results, changes: Iterable[str] = ()) -> str:
    """The whole report; `changes` say where the runs are not what the file says."""
    stages = [stage for stage in STAGES if has_stage(results, stage)]
    text = f"# Study {study.name}\n\n"
    text += f"{study.question}\n\n" if study.question else ""
    if missing := [f"{a}/s{s}" for a in study.arms for s in study.seeds if s not in results.get(a, {})]:
        text += f"**Unfinished: no results yet of {', '.join(missing)}.**\n\n"
    text += "".join(f"{sentence}\n\n" for sentence in conclusions(study, results))
    text += "".join(f"{note}\n\n" for note in (*changes, *tested_unlike(results, study.baseline), *unlike(results)))
    text += "![arms](arms.png)\n\n## Arms\n\n" + arms_table(study, results) + "\n"
    for stage in stages:
        text += f"## On the {STAGES[stage]}\n\n" + figures_table(results, stage) + "\n"
        if stage == MIRRORED:
            text += f"{_MIRRORED_NOTE}\n\n"
        if found := _compared(study, results, stage):
            text += difference_table(found, study.baseline) + "\n" + pictures_table(found, study.baseline) + "\n"
            text += discordant_table(found, study.baseline) + "\n"
    text += "".join(f"- {note}\n" for note in _NOTES)
    text += "\n## What the test set is worth\n\n" + leakage_table(results) + "\n"
    if len(stages) > 1:
        text += both_table(results) + "\n"
    if study.paper == "zheng_nagata":
        from lit_defect.reporting.zheng_nagata import paper_tables

        titles = {arm: study.arms[arm].title for arm in results}
        text += "## Beside Zheng & Nagata\n\n" + paper_tables(results, titles)
    return text


def _pictures(study: Study, folder: Path) -> str:
    """The sheets of what the steps have made, copied beside the report; of the first seed where each has its own."""
    text = ""
    for name, step in study.steps.items():
        run = step_run(study, name, study.seeds[0])
        sheet = next((run.figures / f"{kind}.png" for kind in _SHEETS if (run.figures / f"{kind}.png").is_file()), None)
        if step.verb == "predict" and sheet is not None:
            shutil.copyfile(sheet, folder / f"{name}.png")
            text += f"### {name}\n\n![{name}]({name}.png)\n\n"
    return f"\n## What was made\n\n{text}" if text else ""


_SHEETS = ("edits", "generated")  # figures of the tasks that make pictures
_MIRRORED_NOTE = (
    "These pictures were trained on, and mirrored for the test: a leak by design. The figures say how well a network "
    "remembers, not how well it judges new parts, and no conclusion rests on them."
)
_NOTES = (
    "Means over seeds ± standard deviation; intervals are 95 %. Over seeds (Student's t) an interval tells how a mean "
    "would move with other seeds on these test pictures; over pictures (bootstrap, whole parts where they are known) "
    "how it would move with other test pictures and these networks; it is too narrow where the parts are few.",
    "The class with the highest probability is taken; defects found and false alarms count at that.",
    "McNemar's exact test compares two networks on the same pictures, which it takes for independent. The sums over "
    "the seeds hold each picture once for each seed: their p-value is too small and only describes.",
)


def arms_table(study: Study, results: Results) -> str:
    """What each arm is: options in which its runs differ from other arms', and the pictures that they trained on."""
    told = {arm: _options_of(runs) for arm, runs in results.items()}
    shared = set.intersection(*map(set, told.values()))
    body = []
    for name, arm in study.arms.items():
        runs = results.get(name, {}).values()
        made = sorted({run.generator for run in runs if run.generator})
        generated = _counts([run.generated for run in runs]) + (f" by {', '.join(made)}" if made else "")
        own = " ".join(option for option in told.get(name, []) if option not in shared)
        own = "no run yet" if name not in told else f"`{own}`" if own else "-"
        body.append([name, arm.title, arm.config, own, _counts([run.real for run in runs]), generated])
    head = ("arm", "title", "configuration", "options, where arms differ", "real training pictures", "generated")
    return markdown_table(head, body)


def _options_of(runs: Mapping[int, StudyRun]) -> list[str]:
    """`--key value` of all that decides what is computed, as the runs have written it."""
    found = [seeds.learning_options(run.folder.path) for run in runs.values()]
    keys = dict.fromkeys(key for options in found for key in options)
    values = {key: " or ".join(dict.fromkeys(options.get(key, "-") for options in found)) for key in keys}
    return [f"--{key.replace('.init_args', '')} {value}" for key, value in values.items()]


def figures_table(results: Results, stage: str) -> str:
    """Mean, standard deviation and interval of every figure by arm."""
    body = []
    for arm, runs in results.items():
        found = [spread(runs, stage, key) for key in FIGURES]
        body.append([arm, *map(_with_limits, found), str(found[0].seeds)])
    return markdown_table(("%", *FIGURES.values(), "seeds"), body)


def difference_table(found: Mapping[str, Compared], baseline: str) -> str:
    """Differences seed by seed, in points."""
    body = [
        [arm, *(difference(pair.by_seed[key]) for key in FIGURES), str(len(pair.discordant))]
        for arm, pair in found.items()
    ]
    return markdown_table((f"less {baseline}, points, over seeds", *FIGURES.values(), "pairs"), body)


def pictures_table(found: Mapping[str, Compared], baseline: str) -> str:
    """The same differences with their intervals over test pictures."""
    body = []
    for arm, pair in found.items():
        cells = [_interval(pair.over_pictures.get(key)) for key in OVER_PICTURES]
        body.append([arm, *cells, str(pair.pictures), str(pair.parts)])
    names = [FIGURES[key] for key in OVER_PICTURES]
    head = (f"less {baseline}, points, over pictures", *names, "pictures", "parts")
    return markdown_table(head, body)


def discordant_table(found: Mapping[str, Compared], baseline: str) -> str:
    """McNemar's test by seed, and of the sums."""
    body = []
    for arm, pair in found.items():
        for seed, test in [*pair.discordant.items(), ("all together", pair.summed)]:
            body.append(
                [f"{arm}, seed {seed}".replace("seed all", "all"), str(test.only_b), str(test.only_a), _p(test.p_value)]
            )
    return markdown_table(("McNemar", "only the arm right", f"only {baseline} right", "p"), body)


def leakage_table(results: Results) -> str:
    """Test pictures with a near-duplicate in training or validation, and the accuracy with and without them."""
    body, unchecked = [], False
    for arm, runs in results.items():
        tested = [run.tested[HOLD_OUT] for run in runs.values() if HOLD_OUT in run.tested]
        if not tested:
            continue
        unchecked |= any(_unchecked(run) for run in runs.values())
        fresh = [one.result.get("without_near_duplicates") or one.result for one in tested]
        near = sorted({one.result["n"] - kept["n"] for one, kept in zip(tested, fresh, strict=True)})
        without = Spread.of(kept["accuracy"]["value"] for kept in fresh)
        total = sorted({one.result["n"] for one in tested})
        of_all = Spread.of(one.figures["accuracy"] for one in tested)
        body.append([arm, _range(total), _range(near), of_all.text(100, 1), without.text(100, 1)])
    if not body:
        return "There is no hold-out: every test picture is a training picture, mirrored.\n"
    head = ("hold-out", "test pictures", "near-duplicates in earlier splits", "accuracy, %", "without them")
    note = (
        "\n- Near-duplicates were not looked for in all runs (data.leakage off): 0 may mean unknown.\n"
        if unchecked
        else ""
    )
    return markdown_table(head, body) + note


def both_table(results: Results) -> str:
    """Accuracy on the hold-out beside that on the mirrored training pictures."""
    body = []
    for arm, runs in results.items():
        both = [run.tested for run in runs.values() if {HOLD_OUT, MIRRORED} <= set(run.tested)]
        ours = [Spread.of(tested[stage].figures["accuracy"] for tested in both) for stage in (HOLD_OUT, MIRRORED)]
        more = Spread.of(t[MIRRORED].figures["accuracy"] - t[HOLD_OUT].figures["accuracy"] for t in both)
        body.append([arm, *(found.text(100, 1) for found in ours), more.text(100, 1, sign=True)])
    head = ("accuracy, %", "hold-out", "mirrored training pictures (leak by design)", "mirrored less hold-out, points")
    return markdown_table(head, body)


def _compared(study: Study, results: Results, stage: str) -> dict[str, Compared]:
    """The other arms against the baseline, as far as there are pairs."""
    first = results.get(study.baseline, {})
    found = {arm: compare(first, runs, stage) for arm, runs in results.items() if arm != study.baseline}
    return {arm: pair for arm, pair in found.items() if pair is not None}


def _lines(study: Study, results: Results) -> Iterator[Line]:
    for stage, name in STAGES.items():
        for arm, runs in results.items():
            for key in FIGURES:
                yield Line(name, arm, key, spread(runs, stage, key))
        for arm, pair in _compared(study, results, stage).items():
            for key in FIGURES:
                yield Line(name, f"{arm} less {study.baseline}, over seeds", key, pair.by_seed[key])
            for key, found in pair.over_pictures.items():
                limits = Spread(found.value, math.nan, found.low, found.high, len(pair.discordant))
                yield Line(name, f"{arm} less {study.baseline}, over pictures", key, limits)


def _runs_csv(results: Results) -> str:
    """A line for each run and test set."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("arm", "seed", "tested_on", "pictures", *FIGURES, "folder"))
    for arm, runs in results.items():
        for seed, run in runs.items():
            for stage, tested in run.tested.items():
                numbers = ["" if math.isnan(x) else f"{x:.6g}" for x in tested.figures.values()]
                writer.writerow((arm, seed, STAGES[stage], len(tested.names), *numbers, run.folder.path))
    return text.getvalue()


def _unchecked(run: StudyRun) -> bool:
    data = run.folder.config().get("data") or {}
    return str((data.get("init_args") or {}).get("leakage")) in ("off", "False")


def _counts(found: Sequence[Mapping[str, int]]) -> str:
    """`good 1184, defective 30`, or the range where seeds differ."""
    names = dict.fromkeys(name for counts in found for name in counts)
    parts = [f"{name or '-'} {_range(sorted({counts.get(name, 0) for counts in found}))}" for name in names]
    return ", ".join(parts) or "-"


def _range(numbers: Sequence[int]) -> str:
    return "-" if not numbers else str(numbers[0]) if numbers[0] == numbers[-1] else f"{numbers[0]} to {numbers[-1]}"


def _with_limits(found: Spread) -> str:
    limits = found.limits(100, 1)
    return found.text(100, 1) + (f" ({limits})" if limits else "")


def _interval(found: Interval | None) -> str:
    if found is None or math.isnan(found.value):
        return "-"
    if math.isnan(found.low):
        return f"{100 * found.value:+z.1f}" + (f" ({found.reason})" if found.reason else "")
    return f"{100 * found.value:+z.1f} ({100 * found.low:+z.1f} to {100 * found.high:+z.1f})"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


if __name__ == "__main__":  # the former command, of job scripts that must not end well with nothing done
    raise SystemExit("error: this is now python -m lit_defect study FILE --report")
