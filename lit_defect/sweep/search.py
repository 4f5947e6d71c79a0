"""Optuna's part in an off-line sweep: where trials are kept, how their parameters are drawn, when they are pruned."""

from __future__ import annotations

import importlib.util
import os
import random
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from lit_defect.errors import UserError
from lit_defect.sweep.attempts import counted, number_of
from lit_defect.sweep.file import Sweep
from lit_defect.sweep.space import combinations, label

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
_TRIES = 10  # to make the tables
_WAIT = 60.0  # seconds for SQLite's file, which one worker at a time may write; five by default, then the others fail
_BEST, _FEWEST_BEST = 0.1, 5  # share of the trials, and number, that importance holds against the others
_ID = "sweep_id"  # of the folder that a study in a database belongs to


class ByNumber(BaseSampler):
    """Draws each trial's parameters by its number, which the storage gives to one worker only.

    Of a grid, trial 7 is combination 7: however many workers there are, none is run twice and none is left out. At
    random and by TPE the generator begins anew with the sweep's seed and the number: no two workers draw the same, and
    one worker alone draws what it has drawn before.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._grid = combinations(sweep.parameters) if sweep.sampler == "grid" else []
        self._number = -1
        self._of_number: BaseSampler = RandomSampler()

    def _sampler(self, study: optuna.Study, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            number = number_of(study, trial)
            seed = int(np.random.SeedSequence([self.sweep.seed, number]).generate_state(1)[0])
            self._number = trial.number
            self._of_number = (
                TPESampler(seed=seed, n_startup_trials=self.sweep.startup, constant_liar=True)
                if self.sweep.sampler == "tpe"
                else RandomSampler(seed=seed)
            )
        return self._of_number

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """As Optuna's sampler does."""
        return self._sampler(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's sampler does."""
        return self._sampler(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The grid's value, or as Optuna's sampler does."""
        if self.sweep.sampler == "grid":
            return label(self._grid[number_of(study, trial) % len(self._grid)][param_name])
        return self._sampler(study, trial).sample_independent(study, trial, param_name, param_distribution)


def pruner(sweep: Sweep) -> BasePruner:
    """Must be given to the study in every worker: a storage does not keep it."""
    if sweep.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=min(sweep.startup, 5), n_warmup_steps=sweep.warmup)
    if sweep.pruner == "hyperband":
        band = sweep.hyperband
        return optuna.pruners.HyperbandPruner(
            min_resource=band.least, max_resource=band.most or "auto", reduction_factor=band.eta
        )
    return optuna.pruners.NopPruner()


def open_study(sweep: Sweep, folder: Path, url: str | None, sweep_id: str, *, create: bool = True) -> optuna.Study:
    """Make or join the study of a sweep.

    Args:
        sweep: the sweep.
        folder: of the sweep.
        url: of an Optuna storage; None for a journal in the folder.
        sweep_id: of the folder, so that a study in a database is not mixed with that of another folder.
        create: whether to make it where there is none.

    Raises:
        UserError: the storage cannot be used, or holds another sweep of this name.
    """
    shown = str(folder / "journal.log") if url is None else f"--storage {without_password(url)}"
    try:
        storage = _storage(folder, url)
        study = (
            optuna.create_study(
                study_name=sweep.name, storage=storage, direction=sweep.goal, load_if_exists=True,
                sampler=ByNumber(sweep), pruner=pruner(sweep),
            )
            if create
            else optuna.load_study(
                study_name=sweep.name, storage=storage, sampler=ByNumber(sweep), pruner=pruner(sweep)
            )
        )  # fmt: skip
    except KeyError:
        raise UserError(f"{shown} has no sweep {sweep.name}: start it first") from None
    except (ImportError, ValueError, OSError) as error:
        raise UserError(f"{shown}: {_first_line(error, url)}") from None
    except Exception as error:
        if not type(error).__module__.startswith("sqlalchemy"):
            raise
        raise UserError(f"{shown} cannot be used: {_first_line(error, url)}") from None
    known = study.user_attrs.get(_ID)
    if known is None:
        study.set_user_attr(_ID, sweep_id)
    elif known != sweep_id:
        raise UserError(
            f"{shown} has a sweep {sweep.name} of another folder than {folder}: its workers must share one "
            "--runs_dir, which holds the states that trials go on from; or give this sweep another `name`"
        )
    return study


class _MendingLock(JournalFileOpenLock):
    """Of a journal; whoever gets it drops what a killed worker or a full disk has left of a line.

    Nobody has read that. Else the next line would be written behind it, and the journal would be unreadable for ever.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal

    def acquire(self) -> bool:
        """As Optuna does."""
        got = super().acquire()
        try:
            with self._journal.open("rb+") as file:
                end = size = file.seek(0, os.SEEK_END)
                while end and (file.seek(end - 1), file.read(1))[1] != b"\n":
                    end -= 1
                if end < size:
                    file.truncate(end)
        except OSError:
            self.release()  # which Optuna does of what it has acquired, and the others wait for it
            raise
        return got


def _storage(folder: Path, url: str | None) -> BaseStorage:
    if url is None:
        from optuna.storages import JournalStorage

        path = folder / "journal.log"
        return JournalStorage(JournalFileBackend(str(path), lock_obj=_MendingLock(path)))
    if "://" not in url:
        raise ValueError("expected a URL such as postgresql://user@host/database or sqlite:///FILE")
    return _database(_with_driver(url))


def _database(url: str) -> BaseStorage:
    """Optuna's tables, made where there are none.

    Workers that come to an empty database at the same moment all begin to make them, and all but one trip over the
    tables of that one: those try again.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    patient = {"connect_args": {"timeout": _WAIT}} if url.startswith("sqlite") else {}

    def connect() -> BaseStorage:
        return RDBStorage(url, engine_kwargs={"pool_pre_ping": True, **patient})

    for _ in range(_TRIES):
        try:
            return connect()
        except (IntegrityError, ProgrammingError):  # PostgreSQL, by how far the other one has come
            pass
        except OperationalError as error:  # SQLite and MySQL
            if "already exists" not in str(error):
                raise
        time.sleep(random.uniform(0.1, 0.5))
    return connect()


def _with_driver(url: str) -> str:
    """`postgresql://` means psycopg2 to SQLAlchemy; its successor does as well."""
    scheme, _, rest = url.partition("://")
    if scheme in ("postgres", "postgresql") and importlib.util.find_spec("psycopg2") is None:
        return f"postgresql+psycopg://{rest}"
    return url


def without_password(url: str) -> str:
    """A storage's URL as it may be shown."""
    scheme, separator, rest = url.partition("://")
    name, at, place = rest.rpartition("@")
    user, colon, _ = name.partition(":")
    return f"{scheme}{separator}{user}{':***' if colon else ''}{at}{place}"


def _first_line(error: BaseException, url: str | None) -> str:
    """What an error says, without the password that the URL may hold."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    secret = (url or "").partition("://")[2].rpartition("@")[0].partition(":")[2]
    return text.replace(secret, "***") if secret else text


def importance(study: optuna.Study, sweep: Sweep) -> dict[str, float] | None:
    """Each parameter's share in what sets the best trials apart (PED-ANOVA), None while there are too few to tell.

    The best are a tenth of the trials, but five at least: of fewer, which Optuna takes by default, a share is mostly
    chance. For the same reason at least 4 trials for each parameter and 10 in all are asked for.
    """
    done = [t for t in counted(study, sweep).values() if t.state == TrialState.COMPLETE]
    if len(done) < max(10, 4 * len(sweep.parameters)) or len({t.value for t in done}) < 2:
        return None
    local = optuna.create_study(direction=sweep.goal)
    local.add_trials(done)
    judge = PedAnovaImportanceEvaluator(target_quantile=max(_BEST, _FEWEST_BEST / len(done)))
    try:
        shares = optuna.importance.get_param_importances(local, evaluator=judge)
    except (ValueError, RuntimeError):
        return None
    return {name: round(float(share), 4) for name, share in shares.items()}
