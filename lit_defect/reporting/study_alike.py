"""Whether the runs of a study are what its file says now, and alike in what should not matter."""

from __future__ import annotations

from collections.abc import Iterator

from lit_defect.errors import UserError
from lit_defect.reporting.study_runs import STAGES, Results
from lit_defect.study_check import changes_since, parsed
from lit_defect.study_file import Study
from lit_defect.study_plan import plan


def changed_since(study: Study, results: Results) -> Iterator[str]:
    """A sentence for each arm whose first run has other options than the file would give it now."""
    first = {f"{arm}/s{next(iter(runs))}" for arm, runs in results.items()}
    jobs = [job for job in plan(study) if job.name in first]
    try:
        configs = parsed({job.name: [job.verb, *job.words] for job in jobs})
        for job in jobs:
            if changes := "; ".join(changes_since(job, configs[job.name])):
                yield f"**{job.arm}: its runs were made with other options than the file has now: {changes}.**"
    except UserError as error:
        yield f"**Whether the runs have the options of the file is unknown: {error}.**"


def tested_unlike(results: Results, baseline: str) -> Iterator[str]:
    """A sentence for each arm and test set with runs that were not tested on the baseline's pictures."""
    for arm, runs in results.items():
        for stage, name in STAGES.items():
            seeds = [
                f"s{seed}"
                for seed, run in runs.items()
                if (first := results.get(baseline, {}).get(seed)) and stage in run.tested and stage in first.tested
                and set(run.tested[stage].names) != set(first.tested[stage].names)
            ]  # fmt: skip
            if seeds:
                yield (
                    f"**{arm}: {', '.join(seeds)} had other test pictures ({name}) than {baseline}; no difference is "
                    "taken of them.**"
                )


def unlike(results: Results) -> Iterator[str]:
    """A sentence for each arm whose runs differ in devices, nodes or the folder of the data."""
    for arm, runs in results.items():
        found: dict[str, dict[str, list[str]]] = {"devices": {}, "nodes": {}, "data.root": {}}
        for seed, run in runs.items():
            config = run.folder.config()
            told = {
                "devices": run.folder.record().get("devices"),
                "nodes": (config.get("trainer") or {}).get("num_nodes"),
                "data.root": ((config.get("data") or {}).get("init_args") or {}).get("root"),
            }
            for key, value in told.items():
                found[key].setdefault(str(value), []).append(f"s{seed}")
        for key, by_value in found.items():
            if len(by_value) > 1:
                each = "; ".join(f"{value}: {', '.join(of)}" for value, of in by_value.items())
                yield f"{arm}: its runs differ in {key} ({each}), which may have changed what they learnt."
