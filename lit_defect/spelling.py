"""Short error messages for the command line, with the nearest right key."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy

from lit_defect import anomalies
from lit_defect.errors import UserError

_NOT_OPTIONS = {"CACHE", "RUN_ID"}  # variables of ours that stand for no option


def explain(message: str, parser: Any, arguments: list[str]) -> str:
    """Rewrite a parser's message: the full key, the nearest right one, where to look.

    Args:
        message: what jsonargparse says.
        parser: the parser that failed.
        arguments: the command line, searched for the key as the user wrote it.
    """
    parser = _of_verb(parser, arguments)
    unknown = re.search(r"(?:[Oo]ption|[Kk]ey) '([^']+)'", message)
    if unknown and re.search(r"not accept|not expected|is not accepted", message):
        key = unknown.group(1)
        written = _as_written(key, arguments)
        classes = re.findall(r"class_path '(?:[\w.]*\.)?(\w+)'", message)  # outermost first
        near, help_ = _nearest(key, written, parser, classes[-1:]), _help_of_class(parser, classes[:1])
        return f"unknown key {written}{near}\n  see: {help_}"
    unrecognised = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    if unrecognised:
        key = unrecognised.group(1).split()[0].lstrip("-").split("=")[0]
        return f"unknown option --{key}{_nearest(key, key, parser, [])}\n  see: {_help(parser)}"
    choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", message)
    if choice and "subcommand" in message:
        verbs = re.findall(r"\w+", choice.group(2))
        return f"unknown verb {choice.group(1)!r}{_hint(choice.group(1), verbs)}\n  verbs: {', '.join(verbs)}"
    if name := re.search(r"Expected a dot import path string: ([\w.]+)|has no attribute '(\w+)'", message):
        return _unknown_class(name.group(1) or name.group(2), _path_of_keys(message))
    if (wrong := _wrong_value(message)) or (wrong := _broken_file(arguments)):
        return f"{wrong}\n  see: {_help(parser)}"
    return f"{_shorten(message)}\n  see: {_help(parser)}"


def _path_of_keys(message: str) -> str:
    """`model.lr` from nested messages about the keys `fit.model` and `lr`."""
    path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    return re.sub(r"^(fit|check|validate|test|predict)\.", "", path)


def _unknown_class(name: str, key: str) -> str:
    """What there is in place of a class that does not exist."""
    if key in ("model", "data"):
        known = sorted(_classes(LightningModule if key == "model" else LightningDataModule))
    elif "anomaly" in key:
        known = sorted(_anomalies())
    else:
        known = []
    if known:
        return f"--{key} {name}: no such class{_hint(name, known)}\n  there is: {', '.join(known)}"
    kinds = _every_class(Callback) | _every_class(Logger) | _every_class(Strategy)
    return f"{key}: no such class {name}{_hint(name, kinds)}"


def _wrong_value(message: str) -> str:
    """`model.transfer = haed: expected one of head, all`; empty when the message is about something else."""
    keys = list(re.finditer(r'^( *).*Parser key "([^"]+)"', message, re.MULTILINE))
    if not keys:
        return ""
    deepest = message[keys[-1].end() :].splitlines()
    depth = len(keys[-1].group(1))
    inner = [line for line in deepest[1:] if len(line) - len(line.lstrip()) > depth]  # its own lines only
    wanted = [found.group(1) for line in inner if (found := re.search(r"Expected an? (.+?)(?:\. Got value|$)", line))]
    value = re.search(r"(?:Got|Given) value: (?!NestedArg|Namespace|[\[{])(.*)", message[keys[-1].end() :])
    if not wanted or not value:
        return ""
    expected = " or ".join(map(_plain_type, wanted))
    hint = '; YAML reads a plain off as false: write "off"' if value.group(1) == "False" and "off" in expected else ""
    return f"{_path_of_keys(message)} = {value.group(1)}: expected {expected}{hint}"


def _plain_type(text: str) -> str:
    """`<class 'int'>` -> int; Literal['a', 'b'] -> one of a, b."""
    if choices := re.search(r"Literal\[(.*)\]", text):
        return f"one of {choices.group(1)}".replace("'", "")
    return text.removeprefix("<class '").removesuffix("'>").replace("NoneType", "null")


def _broken_file(arguments: list[str]) -> str:
    """Which --config is no YAML or holds no options; empty when all are sound."""
    for option, value in pairwise([*arguments, ""]):
        path = value if option in ("-c", "--config") else option.removeprefix("--config=")
        if path == option or not Path(path).is_file():
            continue
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            return f"--config {path}: not valid YAML: {' '.join(str(error).split())}"
        if not isinstance(content, dict):
            return f"--config {path}: holds no options (expected `key: value` lines)"
    return ""


def unknown_environment(prefix: str, environ: Mapping[str, str], verbs: Mapping[str, Any]) -> None:
    """Refuse variables that look like options and would be ignored in silence.

    Args:
        prefix: what our variables begin with.
        environ: the environment.
        verbs: the parser of each verb.

    Raises:
        UserError: a variable `<prefix>_<VERB>__MODEL__INIT_ARGS__...` or one that is no option of a verb.
    """
    options = {
        verb.upper(): {action.dest.upper().replace(".", "__") for action in parser._actions}
        for verb, parser in verbs.items()
    }
    for name in environ:
        if not name.startswith(f"{prefix}_"):
            continue
        rest = name.removeprefix(f"{prefix}_")
        if rest in _NOT_OPTIONS or rest == "CONFIG" or rest == "SUBCOMMAND":
            continue
        verb, _, key = rest.partition("__")
        if verb not in options or not key:
            raise UserError(f"environment variable {name}: no such option; {prefix}_FIT__TRAINER__MAX_EPOCHS is one")
        if key.startswith(("MODEL__", "DATA__")):
            part = key.split("__")[0]
            raise UserError(
                f"environment variable {name}: a class's own arguments cannot be set one by one; "
                f"set {prefix}_{verb}__{part} to YAML ({{class_path: ..., init_args: {{...}}}}) or use the command line"
            )
        if key not in options[verb]:
            raise UserError(
                f"environment variable {name}: no such option{_hint(key, options[verb], f'{prefix}_{verb}_', '_')}"
            )


def _as_written(key: str, arguments: list[str]) -> str:
    """The key with its prefix, as on the command line; the bare key when it came from a file."""
    for argument in arguments:
        option = argument.split("=")[0].lstrip("-")
        if argument.startswith("--") and (option == key or option.endswith(f".{key}")):
            return f"--{option}"
    return repr(key)


def _nearest(key: str, written: str, parser: Any, classes: list[str]) -> str:
    """`; did you mean ...?` from the parser's options and the arguments of the class asked, or of all known ones."""
    options = {action.dest for action in parser._actions if action.dest and action.dest != "help"}
    options |= {option.partition(".")[0] for option in options}
    if full := difflib.get_close_matches(key, options, n=1, cutoff=0.7):
        return f"; did you mean {full[0]}?"
    every = _classes(LightningModule) | _classes(LightningDataModule) | _anomalies()
    kinds = [*every.values()]
    if asked := [every[name] for name in classes if name in every]:
        kinds = asked
    elif "anomaly." in written:
        kinds = [*_anomalies().values()]
    elif "model." in written:
        kinds = [*_classes(LightningModule).values()]
    elif "data." in written:
        kinds = [*_classes(LightningDataModule).values()]
    prefix, _, last = key.rpartition(".")
    names = {name for known in kinds for name in _parameters(known)} - {last}  # which another class may have
    return _hint(last, names, prefix)


def _of_verb(parser: Any, arguments: list[str]) -> Any:
    """The parser of the verb on the command line, or the main one."""
    for action in parser._actions:
        for verb, found in (getattr(action, "_name_parser_map", None) or {}).items():
            if verb in arguments:
                return found
    return parser


def _hint(word: str, candidates: Iterable[str], prefix: str = "", join: str = ".") -> str:
    lowered = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.5)
    return f"; did you mean {prefix + join if prefix else ''}{lowered[near[0]]}?" if near else ""


def _every_class(base: type) -> set[str]:
    """Names of all imported subclasses."""
    children: list[type] = base.__subclasses__()
    return {name for child in children for name in {child.__name__} | _every_class(child)}


def _classes(base: type) -> dict[str, type]:
    """This project's subclasses of `base` by name."""
    found: dict[str, type] = {}
    known: type
    for known in base.__subclasses__():
        below = _classes(known)
        if known.__module__.startswith("lit_defect.") and not below:  # a base of several is no choice
            found[known.__name__] = known
        found |= below
    return found


def _anomalies() -> dict[str, type]:
    """The pseudo-anomalies by name."""
    known = {name: kind for name, kind in vars(anomalies).items() if isinstance(kind, type)}
    return {
        name: kind
        for name, kind in known.items()
        if issubclass(kind, anomalies.PseudoAnomaly) and not inspect.isabstract(kind)
    }


def _parameters(known: type) -> set[str]:
    """Names of a class's arguments, its parents' included."""
    return {
        name
        for parent in known.__mro__
        if parent.__module__.startswith("lit_defect.") and "__init__" in vars(parent)
        for name in inspect.signature(parent).parameters
        if name not in ("args", "kwargs")
    }


def _help_of_class(parser: Any, classes: list[str]) -> str:
    """The command that explains the arguments of the task or data module, which a verb's own help does not list."""
    for part, base in (("model", LightningModule), ("data", LightningDataModule)):
        for name in classes:
            if name in _classes(base):
                return f"{_help(parser).removesuffix('--help')}--{part}.help {name}"
    return _help(parser)


def _help(parser: Any) -> str:
    return f"python -m {parser.prog.replace(' [options]', '')} --help"


def _shorten(message: str) -> str:
    """The lines that say something to a user, without jsonargparse's inner types."""
    skipped = ("Subtypes:", "Errors:", "Does not validate against any of the Union subtypes")
    message = message.partition("Given value")[0]  # a whole class with all its arguments may follow
    lines = [line.strip(" -") for line in message.splitlines()]
    return "\n  ".join(line for line in lines if line and not line.startswith(skipped))
