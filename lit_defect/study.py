"""A study: arms that differ in one thing, a run of each for several seeds, and a report; by one command.

    python -m lit_defect study FILE.yaml [--dry_run] [--only ARM ...] [--seeds 0 1] [--options "--trainer.devices 2"]

What is finished is skipped and what was interrupted goes on, so the same command resumes the study. What the file says
is told in `study_file.py`; the runs are those of `python -m lit_defect`, one after the other, each in its own folder
`<runs_dir>/<study>_<arm>/s<seed>`; their output goes to `<runs_dir>/<study>/logs/`. The other
runs go on where one fails that they do not need. The report (`reporting/study.py`) is written at the end.

On a cluster each job may be a job of its own; the numbers of a stage follow each other:

    python -m lit_defect study FILE.yaml --list
    sbatch --array=0-1 --wrap 'python -m lit_defect study FILE.yaml --job $SLURM_ARRAY_TASK_ID'
    sbatch --array=2-11 --dependency=afterok:FIRST --wrap '...'      # the next stage, and in the end:
    python -m lit_defect study FILE.yaml --report                   # also while runs are missing: it says which

The exit status is 0 when all is done, 1 when a run failed, 2 for what the user can mend before anything is run, and
128 + signal when it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lit_defect import runs
from lit_defect.claims import create
from lit_defect.errors import UserError
from lit_defect.stopping import SIGNALS, Stopped, ended
from lit_defect.study_check import changes_since, parsed
from lit_defect.study_file import Study, read_study
from lit_defect.study_plan import Job, plan


class Runner:
    """Carries out jobs of a study.

    Args:
        study: what is studied.
        extra: words that every command ends with.
    """

    def __init__(self, study: Study, extra: Sequence[str] = ()) -> None:
        self.study = study
        self.extra = list(extra)
        self.jobs = plan(study)
        self._by_name = {job.name: job for job in self.jobs}
        self._configs: dict[str, dict[str, Any]] = {}  # of the jobs that were checked

    def chosen(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Job]:
        """The jobs of these arms and seeds, all where none are named, and what they need.

        Raises:
            UserError: the study has no such arm or seed.
        """
        for name in arms:
            if name not in self.study.arms:
                raise UserError(f"--only {name}: the arms are {', '.join(self.study.arms)}")
        for seed in seeds:
            if seed not in self.study.seeds:
                raise UserError(f"--seeds {seed}: the study's seeds are {', '.join(map(str, self.study.seeds))}")
        if not arms and not seeds:
            return self.jobs
        wanted = [
            job.name
            for job in self.jobs
            if job.arm is not None and (not arms or job.arm in arms) and (not seeds or job.seed in seeds)
        ]
        needed: set[str] = set()
        while wanted:
            needed.add(name := wanted.pop())
            wanted += self._by_name[name].needs
        return [job for job in self.jobs if job.name in needed]

    def check(self, jobs: Sequence[Job]) -> None:
        """Before the first run: options that no command would take, and runs begun or finished with other options.

        Raises:
            UserError: naming the job and the key.
        """
        self._configs |= parsed({job.name: [job.verb, *job.words, *self.extra] for job in jobs})
        for job in jobs:
            if changes := changes_since(job, self._configs[job.name], self.extra):
                raise UserError(
                    f"{job.name}: {job.run.path} was made with other options ({'; '.join(changes)}): give the study "
                    "another name, or remove that folder and those of the runs that build upon it"
                )

    def run(self, jobs: Sequence[Job]) -> int:
        """Carry them out, one after the other; returns how many are not finished in the end."""
        if not self.study.plan_file.exists():
            written = {"judged_by": self.study.judged_by, "written": time.strftime("%Y-%m-%dT%H:%M:%S")}
            create(self.study.plan_file, written)  # of jobs that begin at once the first one's word stays
        for number, job in enumerate(jobs, 1):
            place = f"[{number}/{len(jobs)}] {job.name}"
            if is_finished(job):
                _say(f"{place}: finished before")
                continue
            if missing := [name for name in job.needs if not is_finished(self._by_name[name])]:
                _say(f"{place}: left out, since it needs {', '.join(missing)}")
                continue
            log = self.study.folder / "logs" / f"{job.name.replace('/', '-')}.log"
            _say(f"{place}: runs ... ({log})")
            started = time.monotonic()
            if reason := self._carry_out(job, log):
                _say(f"{place}: FAILED, {reason}\n  its output is in {log}, which ends\n{end_of(log)}")
            else:
                _say(f"{place}: done in {_time(time.monotonic() - started)}")
        return sum(not is_finished(job) for job in jobs)

    def commands(self, job: Job) -> list[list[str]]:
        """What is left to run of a job, as far as it can be said beforehand."""
        if is_finished(job):
            return []
        tests = [[*command, *self.extra] for command in job.test_commands()]
        if job.run.record().get("status") == "finished" and job.verb == "fit":
            return tests
        kept = [command for command in tests if runs.MIRRORED_TRAIN in command]  # the fit itself tests as well
        return [[*job.command, *self.extra], *kept]

    def _carry_out(self, job: Job, log: Path) -> str:
        """Run what is left of a job; returns what went wrong, if anything."""
        log.parent.mkdir(parents=True, exist_ok=True)
        if job.verb == "predict":
            if status := _run(self.commands(job)[0], log):
                return f"exit status {status}"
            runs.write_json(job.mark, {"command": list(job.words), "config": self._configs.get(job.name)})
            return ""
        if job.run.record().get("status") != "finished":
            if status := _run([*job.command, *self.extra], log):
                return f"exit status {status}"
            if (status := job.run.record().get("status", "there is no run.json")) != "finished":
                return f"it ended without an error and unfinished: {status}"
        for command in job.test_commands():
            if status := _run([*command, *self.extra], log):
                return f"exit status {status} of the test"
        return "" if is_finished(job) else f"{job.run.path} has no metrics in the end"


def is_finished(job: Job) -> bool:
    """Whether there is nothing left to do of a job."""
    if job.verb == "predict":
        return job.mark.is_file()
    return job.run.record().get("status") == "finished" and not job.test_commands()


def main(arguments: Sequence[str]) -> int:
    """Run a study, or say what it would run; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        runner = Runner(read_study(options.file, options.runs_dir), words_of(options.options))
        jobs = _of_options(runner, options)
        if options.list:
            _list(runner, jobs)
            return 0
        if options.report:
            return 0 if _report(runner.study, checked=False) else 2
        runner.check(jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for job in jobs:
            print(f"# {job.name}" + (": finished" if is_finished(job) else ""))
            for command in runner.commands(job):
                print(shlex.join(command))
        return 0
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        unfinished = runner.run(jobs)
    except KeyboardInterrupt:
        _say("stopped; the same command goes on")
        return 128 + signal.SIGINT
    except Stopped as stop:
        raise SystemExit(ended(stop)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if options.job is None and options.stage is None:
        _report(runner.study, checked=not options.only and not options.seeds)
    return 1 if unfinished else 0


def _report(study: Study, *, checked: bool) -> bool:
    """Write it from what there is, else say why not."""
    from lit_defect.reporting.study import write_report

    try:
        _say(f"report  {write_report(study, checked=checked)}")
    except (UserError, OSError) as error:
        print(f"no report: {error}", file=sys.stderr)
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lit_defect study", description="Arms by seeds, by one command that may be repeated."
    )
    parser.add_argument("file", type=Path, help="what is studied, YAML")
    parser.add_argument("--runs_dir", type=Path, help="folder of all experiments [that of the file, or runs]")
    parser.add_argument("--only", nargs="+", metavar="ARM", default=[], help="these arms, and the steps they need")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", default=[], help="these seeds only")
    parser.add_argument("--options", default="", help='added to every command, such as "--trainer.devices 2"')
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--dry_run", action="store_true", help="check everything and print the commands that are left")
    one.add_argument("--list", action="store_true", help="print the jobs with their numbers, stages and states")
    one.add_argument("--job", type=int, metavar="N", help="run this job of --list only, as on a cluster")
    one.add_argument("--stage", type=int, metavar="K", help="run the jobs of this stage of --list only")
    one.add_argument("--report", action="store_true", help="write the report of what there is, and run nothing")
    return parser


def _of_options(runner: Runner, options: argparse.Namespace) -> list[Job]:
    """The jobs that the command line asks for; numbers and stages count all jobs of the study."""
    if options.report and (options.only or options.seeds):
        raise UserError("--report is of the whole study: leave out --only and --seeds")
    if options.job is not None:
        if options.only or options.seeds:
            raise UserError("--job names one job by itself: leave out --only and --seeds")
        if not 0 <= options.job < len(runner.jobs):
            raise UserError(f"--job {options.job}: the jobs are 0 to {len(runner.jobs) - 1}; see --list")
        return [runner.jobs[options.job]]
    jobs = runner.chosen(options.only, options.seeds)
    if options.stage is None:
        return jobs
    if not (of_stage := [job for job in jobs if job.stage == options.stage]):
        raise UserError(f"--stage {options.stage}: the stages are 0 to {max(job.stage for job in jobs)}; see --list")
    return of_stage


def _list(runner: Runner, jobs: Sequence[Job]) -> None:
    """A line for each job, then the numbers of each stage."""
    numbers = {job.name: number for number, job in enumerate(runner.jobs)}
    width = max(len(job.name) for job in jobs)
    for job in jobs:
        state = "finished" if is_finished(job) else str(job.run.record().get("status") or "-")
        needs = f"  needs {', '.join(job.needs)}" if job.needs else ""
        print(f"{numbers[job.name]:4d}  stage {job.stage}  {job.name:{width}}  {state:11}  {job.run.path}{needs}")
    for stage in sorted({job.stage for job in jobs}):
        of_stage = [numbers[job.name] for job in jobs if job.stage == stage]
        whole = of_stage == list(range(of_stage[0], of_stage[-1] + 1))
        text = f"{of_stage[0]}-{of_stage[-1]}" if whole else ",".join(map(str, of_stage))
        print(f"stage {stage}: --array={text}")


def _run(command: list[str], log: Path) -> int:
    """Run a command with its output in a file; a stop is handed on to it, and waited for."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {shlex.join(command)}\n")
        file.flush()
        process: subprocess.Popen[bytes] | None = None
        try:
            with _noted():
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
                )
            return process.wait()
        except BaseException as stop:
            if process is None:
                raise
            process.send_signal(stop.number if isinstance(stop, Stopped) else signal.SIGTERM)  # it saves and ends
            if process.wait() == getattr(stop, "code", None):
                raise SystemExit(process.returncode) from None  # it has also put the job back
            raise


@contextlib.contextmanager
def _noted() -> Iterator[None]:
    """A signal in here counts at the end: one that breaks into the start of a run would leave that run alone."""
    told: list[int] = []
    before = {one: signal.signal(one, lambda number, _: told.append(number)) for one in (signal.SIGINT, *SIGNALS)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    if told:
        signal.raise_signal(told[0])


def _stop(number: int, _: Any) -> NoReturn:
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # told once is enough: the run is waited for
    raise Stopped(number)


def words_of(text: str) -> list[str]:
    """Words of what `--options` is given, as a shell reads them.

    Raises:
        UserError: a quotation mark without its second.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--options {text}: {str(error).lower()}") from None


def end_of(log: Path, lines: int = 5) -> str:
    """The last lines of a log, as a part of a message: from the error on, where it has more lines than that."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    errors = [number for number, line in enumerate(text) if line.startswith("error: ")]
    start = min(len(text) - lines, *errors[-1:]) if errors else len(text) - lines
    return "\n".join(f"  | {line}" for line in text[max(start, 0) :])


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":  # the former command, of job scripts that must not end well with nothing done
    raise SystemExit("error: this is now python -m lit_defect study FILE")
