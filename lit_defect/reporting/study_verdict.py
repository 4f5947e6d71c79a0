"""What the differences of a study allow to say: a sentence for each arm, by rule.

1. The figure is the one that the study's file names, the difference that to the baseline, over the seeds of both.
2. Other seeds would move it, and so would other test pictures: one interval holds both, the root of the summed squares
   of the t interval over the seeds and of the bootstrap interval over whole parts.
3. Its level is 1 - 0.05 / k for k arms held against one (Bonferroni), so that 95 % hold for all of them together.
4. An arm is better or worse where that interval leaves out 0. Fewer than two seeds or `LEAST_PARTS` parts conclude
   nothing: a bootstrap over few parts is too narrow. Nor do seeds that all have the same difference: they tell nothing
   of what others would change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

from lit_defect.reporting.study_runs import FIGURES, HOLD_OUT, Judged, Results, has_stage, judge
from lit_defect.study_file import Study

LEAST_PARTS = 20


def conclusions(study: Study, results: Results) -> Iterator[str]:
    """A sentence for each arm against the baseline, then the rule and what the intervals do not hold."""
    level = 1 - 0.05 / max(1, len(study.arms) - 1)
    yield from _sentences(study, results, level)
    yield (
        f"Rule: an arm is better or worse where its interval leaves out 0. The interval has what other seeds and what "
        f"other test pictures (whole parts) would change, both at once, at {100 * level:.4g} %, so that 95 % hold for "
        f"all {len(study.arms) - 1} arms against {study.baseline} together; nothing is concluded from fewer than two "
        f"seeds or {LEAST_PARTS} parts. The tables have intervals of 95 %, each by itself."
    )
    started = [str(run.folder.record().get("started")) for runs in results.values() for run in runs.values()]
    yield when_chosen(study, started)
    yield from of_one_generation(study)


def verdict(found: Judged, figure: str, level: float) -> str:
    """What the difference of a figure allows to say."""
    if found.seeds < 2 or found.parts < LEAST_PARTS or not math.isfinite(found.low + found.high):
        why = f" ({found.reason})" if found.reason else ""
        return (
            f"no conclusion on {figure} from {found.seeds} seed(s) and {found.pictures} shared test pictures of "
            f"{found.parts} parts{why}."
        )
    text = (
        f"{figure} {100 * found.value:+z.1f} points ({100 * found.low:+z.1f} to {100 * found.high:+z.1f} at "
        f"{100 * level:.4g} %, {found.seeds} seeds, {found.pictures} pictures of {found.parts} parts): "
    )
    if found.low <= 0 <= found.high:
        return text + "no difference is shown; none is excluded within these limits either."
    return text + f"{'better' if found.low > 0 else 'worse'} on these data."


def _sentences(study: Study, results: Results, level: float) -> Iterator[str]:
    if not has_stage(results, HOLD_OUT):
        yield "**No conclusion: there is no hold-out, only mirrored training pictures.**"
        return
    first = results.get(study.baseline, {})
    if not has_stage({study.baseline: first}, HOLD_OUT):
        yield f"**No conclusion: the baseline {study.baseline} has no results on the hold-out.**"
        return
    for arm, runs in results.items():
        if arm == study.baseline:
            continue
        found = judge(first, runs, HOLD_OUT, study.judged_by, level)
        if found is not None:
            said = verdict(found, FIGURES[study.judged_by], level)
        elif has_stage({arm: runs}, HOLD_OUT):
            said = "no conclusion, since none of its seeds has been tested in the baseline on the same pictures, too."
        else:
            said = "no conclusion, since it has results on mirrored training pictures only."
        yield f"**{arm} ({study.arms[arm].title}) against {study.baseline}: {said}**"


def when_chosen(study: Study, started: Sequence[str]) -> str:
    """Whether the figure was written down before there were results to choose it by; `started`: of the runs."""
    figure = FIGURES[study.judged_by]
    try:
        told = json.loads(study.plan_file.read_text(encoding="utf-8"))
        before, written = str(told["judged_by"]), str(told["written"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"Judged by {figure}; that it was chosen before the runs is written down nowhere."
    if before != study.judged_by:
        return f"**Judged by {figure}, although {before} was written down at {written}: chosen afterwards.**"
    if any(start < written for start in started):
        return f"Judged by {figure}, written down at {written}, when some of these runs had begun (at {min(started)})."
    return f"Judged by {figure}, written down at {written}, before the first of these runs."


def of_one_generation(study: Study) -> Iterator[str]:
    """Steps that are run once, for all seeds: of their chance, no interval tells."""
    arms_of: dict[tuple[str, ...], list[str]] = {}
    for name, arm in study.arms.items():
        wanted, needed = list(arm.needs), set[str]()
        while wanted:
            needed.add(step := wanted.pop())
            wanted += study.steps[step].needs
        if once := tuple(step for step in study.steps if step in needed and not study.steps[step].each_seed):
            arms_of.setdefault(once, []).append(name)
    for once, arms in arms_of.items():
        yield (
            f"{', '.join(arms)}: the pictures of one generation, since {', '.join(once)} ran once for all seeds; "
            "another would differ, which no interval tells."
        )
