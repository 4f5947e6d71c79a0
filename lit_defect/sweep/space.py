"""Parameters of a sweep in W&B's format, and what they are for Optuna.

| W&B                                            | Optuna                                                             |
|------------------------------------------------|--------------------------------------------------------------------|
| `value`, `constant`                            | not a parameter: the option has this value in every trial          |
| `values`, `categorical`                        | one of these                                                       |
| `min`, `max` of whole numbers, `int_uniform`   | whole numbers                                                      |
| `min`, `max` else, `uniform`                   | numbers                                                            |
| `log_uniform_values`                           | numbers, their logarithm uniform                                   |
| `q_uniform`                                    | the multiples of `q` from `min` to `max`                           |
| `q_log_uniform_values`                         | numbers, their logarithm uniform, then the nearest multiple of `q` |

A grid takes each of `values`, each whole number and each multiple of `q`. Everything else is refused with a remedy.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_defect.errors import UserError
from lit_defect.yaml_files import near_word

if TYPE_CHECKING:
    import optuna

_KEYS = ("value", "values", "min", "max", "q", "distribution", "probabilities", "mu", "sigma", "parameters")
_DISTRIBUTIONS = (
    "constant", "categorical", "int_uniform", "uniform", "log_uniform_values", "q_uniform", "q_log_uniform_values",
)  # fmt: skip
_INSTEAD = {
    "normal": "uniform with min and max",
    "log_normal": "log_uniform_values with min and max",
    "q_normal": "q_uniform with min and max",
    "q_log_normal": "q_log_uniform_values with min and max",
    "beta": "uniform with min and max",
    "q_beta": "q_uniform with min and max",
    "log_uniform": "log_uniform_values, whose min and max are the values themselves and not their exponents",
    "q_log_uniform": "q_log_uniform_values, whose min and max are the values themselves and not their exponents",
    "inv_log_uniform": "log_uniform_values",
    "inv_log_uniform_values": "log_uniform_values",
    "categorical_w_probabilities": "values without probabilities",
}
_MOST = 100_000  # combinations that a grid may have


@dataclass(frozen=True)
class Parameter:
    """One option of the command and the values that it may take.

    Attributes:
        name: the option, such as `model.lr`.
        choices: what it is chosen from; None for a range.
        low, high: of a range, both included.
        log: whether the logarithm is uniform.
        q: values are multiples of it; None where every number will do.
        whole: whether values are whole numbers.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    q: float | None = None
    whole: bool = False

    def describe(self) -> dict[str, Any]:
        """Plain entries, by which two files are compared."""
        if self.choices is not None:
            return {"values": list(self.choices)}
        described: dict[str, Any] = {"min": self.low, "max": self.high, "log": self.log, "whole": self.whole}
        return described | ({} if self.q is None else {"q": self.q})

    def suggest(self, trial: optuna.Trial) -> Any:
        """What Optuna draws; what it has drawn before for a trial that goes on."""
        if self.choices is not None:
            return self.value(trial.suggest_categorical(self.name, [label(value) for value in self.choices]))
        step = None if self.log else self.q
        if self.whole:
            low, high = int(self.low), int(self.high)
            return self.value(trial.suggest_int(self.name, low, high, log=self.log, step=int(step or 1)))
        return self.value(trial.suggest_float(self.name, self.low, self.high, log=self.log, step=step))

    def value(self, drawn: Any) -> Any:
        """The option's value for what Optuna has drawn."""
        if self.choices is not None:
            return next(value for value in self.choices if label(value) == drawn and type(label(value)) is type(drawn))
        if self.q is None:
            return int(drawn) if self.whole else float(drawn)
        nearest = round(drawn / self.q) * self.q
        return int(nearest) if self.whole else float(f"{nearest:.12g}")

    def grid(self) -> tuple[Any, ...]:
        """All values, in order.

        Raises:
            UserError: there is no end of them.
        """
        if self.choices is not None:
            return self.choices
        if self.log or (self.q is None and not self.whole):
            raise UserError(f"parameters.{self.name} is a range, of which a grid has no end: list its `values`")
        step = self.q or 1
        return tuple(self.value(self.low + k * step) for k in range(round((self.high - self.low) / step) + 1))

    def extremes(self) -> tuple[Any, ...]:
        """Values that show whether the command takes this parameter: each choice, or both ends of a range."""
        return self.choices if self.choices is not None else (self.value(self.low), self.value(self.high))


def label(value: Any) -> Any:
    """What stands for a choice in Optuna, which takes plain values only."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def combinations(parameters: Sequence[Parameter]) -> list[dict[str, Any]]:
    """Every combination of a grid, the last parameter changing fastest.

    Raises:
        UserError: a parameter without an end, or far too many combinations.
    """
    values = [parameter.grid() for parameter in parameters]
    if (count := math.prod(map(len, values))) > _MOST:
        raise UserError(f"the grid has {count:,} combinations: list fewer `values`, or set `method: random`")
    names = [parameter.name for parameter in parameters]
    return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]


def read_parameters(said: Mapping[str, Any], file: str, above: str = "") -> tuple[list[Parameter], dict[str, Any]]:
    """Parameters that vary, and the options that are the same in every trial; nested ones by their dotted names.

    Args:
        said: what stands under `parameters`.
        file: for messages.
        above: the option that these are arguments of, with a dot.

    Raises:
        UserError: an entry that cannot be mapped, with the remedy.
    """
    varied: list[Parameter] = []
    constant: dict[str, Any] = {}
    for key, entry in said.items():
        name = f"{above}{key}"
        where = f"{file}: parameters.{name}"
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {entry}: expected {{values: [...]}}, {{min: ..., max: ...}} or {{value: ...}}")
        for word in entry:
            if word not in _KEYS:
                raise UserError(f"{where}.{word} is unknown{near_word(str(word), _KEYS)}")
        if "parameters" in entry:
            below, same = read_parameters(_mapping(entry["parameters"], f"{where}.parameters"), file, f"{name}.")
            varied += below
            constant |= same
            continue
        found = _read(name, entry, where)
        if isinstance(found, Parameter):
            varied.append(found)
        else:
            constant[name] = found[0]
    return varied, constant


def _mapping(said: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(said, dict):
        raise UserError(f"{where} is no mapping of names to values")
    return said


def _read(name: str, entry: Mapping[str, Any], where: str) -> Parameter | tuple[Any]:
    """The parameter, or its only value in a tuple."""
    kind = _kind_of(entry, where)
    if kind == "constant":
        return (entry.get("value"),)
    if kind == "categorical":
        values = entry.get("values")
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}.values is {values}: expected a list")
        written = [json.dumps(value, default=str) for value in values]
        if twice := next((value for value in written if written.count(value) > 1), None):
            raise UserError(f"{where}.values has {twice} twice: leave one out")
        return Parameter(name, choices=tuple(values)) if len(values) > 1 else (values[0],)
    low, high = (_number(entry, key, where) for key in ("min", "max"))
    if low >= high:
        raise UserError(f"{where}: min {low:g} is not below max {high:g}")
    log = "log" in kind
    if log and low <= 0:
        raise UserError(f"{where}.min is {low:g}: the logarithm needs a number above 0")
    whole = kind == "int_uniform"
    if whole and (low != int(low) or high != int(high)):
        raise UserError(f"{where}: int_uniform needs whole numbers; set `distribution: uniform`")
    if not kind.startswith("q_"):
        return Parameter(name, low=low, high=high, log=log, whole=whole)
    q = _number({"q": 1, **entry}, "q", where)
    if q <= 0:
        raise UserError(f"{where}.q is {q:g}: expected a number above 0")
    whole = q == int(q)
    if not log:
        low, high = math.ceil(low / q - 1e-9) * q, math.floor(high / q + 1e-9) * q
        if low >= high:
            raise UserError(f"{where}: there are no two multiples of {q:g} from min to max")
    elif whole and (low != int(low) or high != int(high)):
        raise UserError(f"{where}: with q {q:g}, min and max must be whole numbers")
    return Parameter(name, low=float(f"{low:.12g}"), high=float(f"{high:.12g}"), log=log, q=q, whole=whole)


def _kind_of(entry: Mapping[str, Any], where: str) -> str:
    """The distribution that is named, or that the keys come to, as W&B takes them.

    Raises:
        UserError: one that neither has, or keys that make none.
    """
    if "probabilities" in entry:
        raise UserError(f"{where}.probabilities cannot be mapped: leave them out, each value is then as likely")
    kind = entry.get("distribution")
    if kind is None:
        if "value" in entry:
            return "constant"
        if "values" in entry:
            return "categorical"
        if "mu" in entry or "sigma" in entry:
            kind = "normal"
        elif "min" in entry and "max" in entry:
            return "int_uniform" if type(entry["min"]) is int and type(entry["max"]) is int else "uniform"
        else:
            raise UserError(f"{where} needs `values`, or `min` and `max`, or `value`")
    if kind in _INSTEAD:
        raise UserError(f"{where}.distribution {kind} cannot be mapped to both W&B and Optuna: use {_INSTEAD[kind]}")
    if kind not in _DISTRIBUTIONS:
        raise UserError(f"{where}.distribution {kind} is unknown{near_word(str(kind), _DISTRIBUTIONS)}")
    return str(kind)


def _number(entry: Mapping[str, Any], key: str, where: str) -> float:
    if key not in entry:
        raise UserError(f"{where}.{key} is needed")
    value = entry[key]
    if isinstance(value, str):
        raise UserError(
            f"{where}.{key} is the text {value!r}: YAML reads 1.0e-4 as a number, and neither 1e-4 nor 1.0e4"
        )
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}.{key} is {value}: expected a number")
    return float(value)
