"""An off-line worker: takes trials until there are none left; any number of them share a sweep.

A trial is one of Optuna's from its first parameter to its value, whoever carries it out: who that is, is told by the
claims (lit_defect/claims.py). A trial whose worker was stopped or has died is claimed anew with its number, its
parameters and its run folders, and its trainings go on by `--resume`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lit_defect.claims import Claim, Claims, Held
from lit_defect.errors import UserError
from lit_defect.runs import RunFolder
from lit_defect.study import end_of
from lit_defect.sweep.attempts import counted, number_of, task_of
from lit_defect.sweep.commands import placed, seeding, words
from lit_defect.sweep.file import SEED, Sweep
from lit_defect.sweep.results import Logged, NotLoggedError, NoValueError, value_of
from lit_defect.sweep.summary import write_summary
from lit_defect.sweep.training import MISTAKE, STOPPED, Stops, Training

_MOST_DEATHS = 3  # of workers of one trial: then it is the trial that kills them
_POLL = 1.0  # seconds

Taken = tuple[int, optuna.Trial, Held]  # the sweep's number of a trial, an attempt of it, and this worker's claim


class StoppedError(Exception):
    """The worker was told to stop; its trial waits to be taken up."""


class LostError(Exception):
    """Another worker has taken the trial over."""


class FailedError(Exception):
    """The trial gives no value; the text says why."""


class PrunedError(Exception):
    """The trial is not worth going on with."""


class Worker:
    """Carries out trials of a sweep.

    Args:
        sweep: the sweep.
        study: Optuna's, with the sampler and the pruner.
        runs_dir: folder of all experiments.
        experiment: of the trials' runs.
        seeds: of the trainings of each trial; None where the seed is a parameter.
        extra: words that every command ends with.
        stops: notes the signals.
        say: for what happens.
    """

    def __init__(
        self,
        sweep: Sweep,
        study: optuna.Study,
        runs_dir: Path,
        experiment: str,
        seeds: Sequence[int] | None,
        extra: Sequence[str],
        stops: Stops,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.sweep, self.study, self.stops, self.say = sweep, study, stops, say
        self.runs_dir, self.experiment, self.seeds, self.extra = runs_dir, experiment, seeds, list(extra)
        self.folder = runs_dir / sweep.name
        self.claims = Claims(self.folder / "claims")

    def work(self, count: int | None = None) -> int:
        """Carry out trials, at most `count`; returns how many have failed of them.

        Raises:
            StoppedError: by a signal.
            UserError: what the user must mend, or too many failures in succession.
        """
        failed = in_succession = done = 0
        while (count is None or done < count) and (taken := self._next()) is not None:
            done += 1
            number, trial, held = taken
            try:
                with held:
                    came_to = self._carry_out(number, trial, held)
            except (LostError, UpdateFinishedTrialError):
                self.say(f"trial {number}: another worker has taken it over")
                continue
            failed += came_to == TrialState.FAIL
            in_succession = in_succession + 1 if came_to == TrialState.FAIL else 0
            if in_succession >= self.sweep.max_failures:
                raise UserError(f"{in_succession} trials have failed in succession; their logs are in {self.logs}")
        return failed

    @property
    def logs(self) -> Path:
        """Folder of what the trainings say."""
        return self.folder / "logs"

    # --- which trial is next ---

    def _next(self) -> Taken | None:
        """A trial that waits to be taken up, else a new one; None when there is nothing left for this worker.

        Before it goes, it looks whether the workers of running trials still live: only that long.
        """
        until = time.monotonic() + self.claims.dead_after + 2 * _POLL
        told = False
        while not self.stops.number:
            trials = counted(self.study, self.sweep)
            running = {number: trial for number, trial in trials.items() if trial.state == TrialState.RUNNING}
            if taken := self._take_up(running):
                return taken
            limit = self.sweep.limit
            if limit is None or len(trials) < limit:
                if taken := self._begin():
                    return taken
                continue
            newest = self.claims.newest()
            unsure = [n for n, trial in running.items() if not self._lives(newest.get(task_of(n, trial)))]
            if not unsure or time.monotonic() > until:
                if running:
                    self.say(f"{len(running)} still run elsewhere: this command again takes up what they should leave")
                return None
            if not told:
                told = True
                self.say(f"waits to see whether {len(unsure)} trials on other machines still run")
            time.sleep(_POLL)
        raise StoppedError

    def _lives(self, claim: Claim | None) -> bool:
        return claim is not None and self.claims.is_alive(claim)

    def _take_up(self, running: Mapping[int, FrozenTrial]) -> Taken | None:
        newest = self.claims.newest() if running else {}
        for number, trial in running.items():
            task = task_of(number, trial)
            claim = newest.get(task)
            if claim is None:  # its worker has begun it just now, or died before it could claim it
                if self.claims.unchanged(self.claims.folder / f"{task}-0.json"):
                    held = self.claims.take(task)
                else:
                    continue
            elif claim.released or self.claims.is_dead(claim):
                held = self.claims.take(task, claim)
            else:
                continue
            if held is None:
                continue
            if held.claim.deaths > _MOST_DEATHS:
                self._tell(number, trial, TrialState.FAIL, reason=f"its worker has died {held.claim.deaths} times")
                continue
            why = "was given back" if claim is not None and claim.released else "lost its worker"
            self.say(f"trial {number}: {why}, and is taken up again")
            return number, optuna.Trial(self.study, trial._trial_id), held
        return None

    def _begin(self) -> Taken | None:
        """A new trial, if it is not one too many, which several workers may begin at once.

        That one is left as it is: it is taken up if more trials are asked for later.
        """
        trial = self.study.ask()
        number = number_of(self.study, trial)
        limit = self.sweep.limit
        if limit is not None and number >= limit:
            return None
        held = self.claims.take(task_of(number, trial))
        return None if held is None else (number, trial, held)

    # --- one trial ---

    def _carry_out(self, number: int, trial: optuna.Trial, held: Held) -> TrialState:
        """Train with each seed and tell the value; returns the state that the trial has come to."""
        parameters = {parameter.name: parameter.suggest(trial) for parameter in self.sweep.parameters}
        trainings = self.trainings(number, parameters)
        self._note(trial, parameters=parameters, seeds=list(trainings), runs=self._told(trainings.values()))
        trial.set_user_attr("worker", held.claim.worker)
        shown = ", ".join(f"{name} {_short(value)}" for name, value in parameters.items())
        self.say(f"trial {number}: {shown}")
        started, before = time.monotonic(), float(trial.user_attrs.get("seconds", 0.0))
        values: list[float] = []
        try:
            for place, training in enumerate(trainings.values()):
                values.append(self._train(trial, held, training, first=place == 0))
        except (StoppedError, UserError):
            trial.set_user_attr("seconds", round(before + time.monotonic() - started, 1))
            held.release()
            write_summary(self.sweep, self.study, self.folder, self.claims)
            raise
        except PrunedError:
            state, reason, value = TrialState.PRUNED, "", None
        except FailedError as error:
            state, reason, value = TrialState.FAIL, str(error), None
        else:
            state, reason, value = TrialState.COMPLETE, "", sum(values) / len(values)
        seconds = round(before + time.monotonic() - started, 1)
        self._patiently(lambda: self._note(trial, values=values, seconds=seconds))
        if not held.is_mine():
            raise LostError
        self._tell(number, trial, state, value, reason)
        return state

    def trainings(self, number: int, parameters: Mapping[str, Any]) -> dict[int, Training]:
        """The trainings of a trial by their seeds."""
        seeds = [int(parameters.get(SEED, self.sweep.constant.get(SEED, 0)))] if self.seeds is None else self.seeds
        made = {}
        for seed in seeds:
            name = f"{self.sweep.name}-t{number:04d}-s{seed}"
            run = RunFolder(self.runs_dir / self.experiment / name)
            told = seeding(self.sweep, None if self.seeds is None else seed)
            command = words(self.sweep, parameters, [*self.extra, *told, *placed(run)])
            made[seed] = Training(run, command, self.logs / f"{name}.log", self.sweep.metric)
        return made

    def _train(self, trial: optuna.Trial, held: Held, training: Training, *, first: bool) -> float:
        """The value of one training, which goes on where it has been begun.

        Raises:
            StoppedError, LostError, PrunedError, FailedError: as they say.
            UserError: the training says that the user must mend something, or the metric is not what is logged.
        """
        if not training.is_done():
            self._wait_for_other(training.run, held)
            if self.stops.number:
                raise StoppedError
            follow = _Reporter(trial) if first and self.sweep.pruner != "none" else lambda _: False
            status, pruned = training.carry_out(self.stops, follow, held.is_mine)
            if held.lost.is_set():
                raise LostError
            if pruned:
                raise PrunedError
            if status == MISTAKE:
                self._refuse(trial, end_of(training.log))
            if status in STOPPED or (self.stops.number and status):
                self.stops.number = self.stops.number or status - 128  # the training alone was sent the signal
                raise StoppedError
            if status:
                raise FailedError(f"exit status {status}; {training.log} ends\n{end_of(training.log)}")
            if not training.is_finished():
                said = training.run.record().get("status", "without a run.json")
                raise FailedError(f"it ended without an error and unfinished: {training.run.path} is {said}")
        try:
            return value_of(training.run, self.sweep.metric, self.sweep.goal, self.sweep.value)
        except NotLoggedError as error:
            if not any(t.state == TrialState.COMPLETE for t in self.study.get_trials(deepcopy=False)):
                raise UserError(f"{self.sweep.file}: metric.name: {error}") from None
            raise FailedError(str(error)) from None
        except NoValueError as error:
            raise FailedError(str(error)) from None

    def _refuse(self, trial: optuna.Trial, said: str) -> None:
        """A mistake of the user ends this worker; one that a worker has met with already is the trial's own.

        Raises:
            UserError: the first time: all of the trials may have it, such as data that are not there.
            FailedError: the second time, so that a combination that cannot be does not hold up the others.
        """
        mistake = said.splitlines()[-1]
        if trial.user_attrs.get("mistake") == mistake:
            raise FailedError(said)
        trial.set_user_attr("mistake", mistake)
        raise UserError(
            f"trial {number_of(self.study, trial)} says what must be mended:\n{said}\n"
            "if only these values cannot be: start the worker again, and the trial counts as failed"
        )

    def _wait_for_other(self, run: RunFolder, held: Held) -> None:
        """Wait for the process of a dead worker on this machine, which saves its state before it ends."""
        told = False
        while run.is_alive():
            if self.stops.number:
                raise StoppedError
            if not held.is_mine():
                raise LostError
            if not told:
                told = True
                self.say(f"  waits for process {run.record().get('pid')}, which still writes {run.path}")
            time.sleep(_POLL)

    def _told(self, trainings: Any) -> list[str]:
        return [str(training.run.path.relative_to(self.runs_dir)) for training in trainings]

    def _note(self, trial: optuna.Trial, **entries: Any) -> None:
        for key, value in entries.items():
            if trial.user_attrs.get(key) != value:
                trial.set_user_attr(key, value)

    def _tell(
        self,
        number: int,
        trial: FrozenTrial | optuna.Trial,
        state: TrialState,
        value: float | None = None,
        reason: str = "",
    ) -> None:
        """End a trial for good, and write how the sweep stands."""
        if reason:
            told = optuna.Trial(self.study, trial._trial_id)
            self._patiently(lambda: told.set_user_attr("reason", reason))
        try:
            self._patiently(lambda: self.study.tell(trial.number, value, state=state))
        except ValueError as error:
            raise LostError from error
        what = {TrialState.COMPLETE: f"{self.sweep.metric} {value:.5g}" if value is not None else ""}
        self.say(f"trial {number}: {what.get(state) or state.name.lower() + (': ' + reason if reason else '')}")
        self._patiently(lambda: write_summary(self.sweep, self.study, self.folder, self.claims))

    def _patiently(self, write: Callable[[], object]) -> None:
        """Write what a trial has come to, also where the storage is away for a while.

        Not for longer than it takes until other workers may take this one for dead.
        """
        until, told = time.monotonic() + self.claims.dead_after, False
        while True:
            try:
                write()
                return
            except (OSError, StorageInternalError) as error:
                if self.stops.number or time.monotonic() > until:
                    raise
                if not told:
                    told = True
                    self.say(f"  tries again for {self.claims.dead_after:.0f} s: {error}")
            time.sleep(_POLL)


class _Reporter:
    """Tells Optuna a curve as it grows: the first value is step 1, as W&B counts iterations."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial
        self.known = len(trial.study.get_trials(deepcopy=False)[trial.number].intermediate_values)

    def __call__(self, values: list[Logged]) -> bool:
        with contextlib.suppress(OSError):  # a folder that is away for a while: told with the next value
            for step, logged in enumerate(values[self.known :], self.known + 1):
                self.trial.report(logged.value, step)
                self.known = step
                if self.trial.should_prune():
                    return True
        return False


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
