"""Trials as the sweep counts them, of which a failed one may be run again.

Optuna does not reopen a trial that has ended. What runs it again is another trial of Optuna's, which is marked with the
number of the first and has its parameters; here both are one trial in two attempts, and the newest attempt counts. The
sweep's own numbers go on as if there were no marked ones: a grid's point is not lost, and none is left out.
"""

from __future__ import annotations

from collections.abc import Collection

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from lit_defect.claims import Claims
from lit_defect.errors import UserError
from lit_defect.sweep.file import Sweep

_REPEATS = "repeats"  # number of the trial that is run again
_ATTEMPT = "attempt"  # counted from 0, which is not written down
_KEPT = ("parameters", "seeds", "runs", "seconds")  # what is known of a trial before it is taken up again


def number_of(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> int:
    """The sweep's number of one of Optuna's trials."""
    if _REPEATS in trial.user_attrs:
        return int(trial.user_attrs[_REPEATS])
    before = study.get_trials(deepcopy=False)[: trial.number]
    return trial.number - sum(_REPEATS in one.user_attrs for one in before)


def attempts(trial: FrozenTrial | optuna.Trial) -> int:
    """How often the trial has been begun, with this attempt."""
    return int(trial.user_attrs.get(_ATTEMPT, 0)) + 1


def task_of(number: int, trial: FrozenTrial | optuna.Trial) -> str:
    """What a worker claims: each attempt for itself."""
    again = attempts(trial) - 1
    return f"t{number:04d}" + (f".{again}" if again else "")


def counted(study: optuna.Study, sweep: Sweep) -> dict[int, FrozenTrial]:
    """The newest attempt of each trial by the sweep's numbers.

    Those are left out that two workers began at once beyond the last one.
    """
    found: dict[int, FrozenTrial] = {}
    begun = 0
    for trial in study.get_trials(deepcopy=False):
        number = trial.user_attrs.get(_REPEATS)
        if number is None:
            number, begun = begun, begun + 1
        if sweep.limit is None or number < sweep.limit:
            found[number] = trial
    return found


def retry(study: optuna.Study, sweep: Sweep, claims: Claims, asked: Collection[int] | None = None) -> list[int]:
    """Let failed trials wait to be taken up by any worker, with their numbers, parameters and run folders.

    Of several processes that do so at once, one does it for each trial.

    Args:
        study: Optuna's.
        sweep: the sweep.
        claims: the sweep's.
        asked: numbers of trials; None for all that have failed.

    Returns:
        Numbers of the trials that wait now by this call.

    Raises:
        UserError: there is no such trial, or it has not failed.
    """
    trials = counted(study, sweep)
    for number in asked or ():
        if number not in trials:
            raise UserError(f"--trials {number}: there is no such trial; see sweep status {sweep.file}")
        if trials[number].state != TrialState.FAIL:
            raise UserError(
                f"--trials {number}: it is {trials[number].state.name.lower()}, and only failed ones are run again"
            )
    failed = [number for number, trial in trials.items() if trial.state == TrialState.FAIL]
    return [n for n in failed if (asked is None or n in asked) and _again(study, sweep, claims, n, trials[n])]


def _again(study: optuna.Study, sweep: Sweep, claims: Claims, number: int, failed: FrozenTrial) -> bool:
    """Begin the next attempt and give it back at once; False if another process has done so."""
    known = {key: failed.user_attrs[key] for key in _KEPT if key in failed.user_attrs}
    trial = create_trial(
        state=TrialState.RUNNING, params=failed.params, distributions=failed.distributions,
        user_attrs={_REPEATS: number, _ATTEMPT: attempts(failed), **known},
    )  # fmt: skip
    task = task_of(number, trial)
    before = claims.newest(task).get(task)
    if before is not None and not (before.released or claims.is_dead(before)):
        return False
    if (held := claims.take(task, before)) is None:
        return False
    begun = counted(study, sweep)[number].number != failed.number  # by one that has died before it gave it back
    if not begun:
        study.add_trial(trial)
    held.release()
    return not begun
