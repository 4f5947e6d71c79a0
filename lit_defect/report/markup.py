"""HTML and SVG as strings in which all text is escaped unless it was made here."""

from __future__ import annotations

import html
import re

from lit_defect.reporting.palette import shorten

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")  # neither HTML nor XML may hold them
_EMPTY = {"circle", "img", "input", "line", "meta", "path", "rect", "wbr"}
_BREAKS = re.compile(r"(?<=[/\\_.,=:-])(?=[^\s/\\_.,=:-])")
_LONG_WORD = re.compile(r"(\S{19,})")
_LONG_CELL = 140


class Markup(str):
    """Markup that is ready; any other str is text and will be escaped."""


def escape(text: str) -> Markup:
    """Text for an element or an attribute; what no page may hold becomes U+FFFD."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate, as in a file name of wrong encoding
    return Markup(html.escape(_CONTROLS.sub("\ufffd", text)))


def element(tag: str, *children: str | None, **attributes: str | float | bool | None) -> Markup:
    """An element; a child that is no `Markup` is text.

    Args:
        tag: of HTML or SVG.
        children: in their order; None is left out.
        attributes: `class_` is class, `data_arm` is data-arm; None and False are left out, True has no value.
    """
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{"" if value is True else escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    inside = join(*children)
    return Markup(f"<{tag}{given}/>" if tag in _EMPTY and not inside else f"<{tag}{given}>{inside}</{tag}>")


def join(*parts: str | None) -> Markup:
    """Parts one behind the other."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


def prose(text: str) -> Markup:
    """Plain text in which `words` between backticks are code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its partner stands for itself
        parts[-2:] = ["`".join(parts[-2:])]
    return join(*(element("code", breakable(part)) if i % 2 else breakable(part) for i, part in enumerate(parts)))


def breakable(text: str) -> Markup:
    """Text whose long words (paths, keys) may break behind their separators."""
    parts = _LONG_WORD.split(text)
    return join(*(_broken(part) if i % 2 else part for i, part in enumerate(parts)))


def _broken(word: str) -> Markup:
    return Markup(element("wbr").join(escape(part) for part in _BREAKS.split(word)))


def name(text: str, length: int = _LONG_CELL) -> Markup:
    """A name isolated from the text around it (right-to-left script); one too long has its full form in a tooltip."""
    short = shorten(text, length)
    return element("bdi", breakable(short), title=text if short != text else None)
