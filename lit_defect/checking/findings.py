"""What a check has found: a line for each thing looked at, and what follows for a script."""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lit_defect.errors import UserError
from lit_defect.runs import write_json

_HERE, _ROOT = Path(__file__).parent, Path(__file__).parent.parent  # of this package, of lit_defect
State = Literal["ok", "warning", "failed"]
_SHOWN = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "failed": ("FAILED", "bold red")}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: of it.
        state: `failed` is what a run would stop at, or be worth nothing for.
        found: what was found.
        remedy: what to do; empty where nothing is to be done, or `found` tells.
        values: the figures in it, for scripts.
    """

    name: str
    state: State
    found: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


class Findings(list[Finding]):
    """What was found, in the order in which it was looked at."""

    def ok(self, name: str, found: str, **values: Any) -> None:
        """Note what is right."""
        self.append(Finding(name, "ok", found, values=values))

    def warn(self, name: str, found: str, remedy: str = "", **values: Any) -> None:
        """Note what a user may want to change."""
        self.append(Finding(name, "warning", found, remedy, values))

    def fail(self, name: str, found: str, remedy: str = "", **values: Any) -> None:
        """Note what would stop a run."""
        self.append(Finding(name, "failed", found, remedy, values))

    @contextmanager
    def noting(self, name: str) -> Iterator[None]:
        """What goes wrong in here is a finding, and the checks go on; so is each warning."""
        with self.hearing(name):
            try:
                yield
            except Exception as error:  # whatever it is, a run would stop at it, too
                self.fail(name, said(error))

    @contextmanager
    def hearing(self, name: str, **named: str) -> Iterator[None]:
        """Each warning in here is a finding, once.

        Args:
            name: of these findings.
            named: other names for those that say a certain word.
        """
        with warnings.catch_warnings(record=True) as heard:
            try:
                yield
            finally:
                for text in dict.fromkeys(str(warning.message) for warning in heard):
                    subject = next((other for other, word in named.items() if word in text), name)
                    if not self.failed(subject):  # which has said more
                        self.warn(subject, text)

    def failed(self, name: str | None = None) -> bool:
        """Whether something, or this, would stop a run."""
        return any(finding.state == "failed" for finding in self if name in (None, finding.name))

    def passes(self, strict: bool = False) -> bool:
        """Whether nothing failed; with `strict`, nor warned."""
        return not self.failed() and not (strict and any(finding.state == "warning" for finding in self))

    def counted(self) -> str:
        """How many of each state, in words."""
        counts = {state: sum(finding.state == state for finding in self) for state in _SHOWN}
        plural = "" if counts["warning"] == 1 else "s"
        return f"{counts['ok']} ok, {counts['warning']} warning{plural}, {counts['failed']} failed"

    def show(self, stream: Any = None) -> None:
        """A table on a terminal, else a plain line for each finding, its remedy below."""
        console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=not (stream or sys.stdout).isatty())
        if console.is_terminal:
            console.print(self._table())
        else:
            for line in self.lines():
                console.print(Text(line))
        console.print(Text(f"\n{self.counted()}"))

    def lines(self) -> list[str]:
        """The findings as plain text; what has several lines is indented."""
        width = max((len(finding.name) for finding in self), default=0)
        rows = []
        for finding in self:
            text = "\n".join(part for part in (finding.found, _remedy(finding)) if part)
            rows.append(
                f"{_SHOWN[finding.state][0]:8} {finding.name:{width}}  " + text.replace("\n", f"\n{'':{width + 11}}")
            )
        return rows

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in self:
            word, style = _SHOWN[finding.state]
            text = Text(finding.found)
            if finding.remedy:
                text.append(f"\n{_remedy(finding)}", style="bold")
            table.add_row(Text(word, style=style), Text(finding.name), text)
        return table

    def write(self, target: str, strict: bool) -> None:
        """The findings as JSON, into a file or for `-` onto standard output.

        Raises:
            UserError: the file cannot be written.
        """
        content = {"passes": self.passes(strict), "strict": strict, "checks": [asdict(finding) for finding in self]}
        if target == "-":
            print(json.dumps(content, indent=2))
            return
        try:
            write_json(Path(target), content)
        except OSError as error:
            raise UserError(f"--json {target}: cannot be written ({error.strerror})") from None


def said(error: BaseException) -> str:
    """What an error says to a user; one of foreign code with its kind and place."""
    if isinstance(error, UserError):
        return str(error)
    places = traceback.extract_tb(error.__traceback__)
    folders = [Path(place.filename).parent for place in places]
    own = [
        place
        for place, folder in zip(places, folders, strict=True)
        if _ROOT in (folder, *folder.parents) and folder != _HERE
    ]
    own = own or places[-1:]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    text = str(error).strip() or "without a word"
    return f"{type(error).__name__}: {text}{where}"


def size(count: float) -> str:
    """Bytes in words."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def duration(seconds: float) -> str:
    """Seconds in words, to two digits or so."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours = minutes / 60
    return f"{hours:.1f} h" if hours < 72 else f"{hours / 24:.1f} days"


def _remedy(finding: Finding) -> str:
    return f"-> {finding.remedy}" if finding.remedy else ""
