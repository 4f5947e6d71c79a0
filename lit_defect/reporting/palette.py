"""Colours and short names of every picture, for those too that draw without matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

# Okabe & Ito (2008): told apart by colour-blind readers too.
GOOD, DEFECTIVE = "#0072B2", "#D55E00"
PALETTE = (GOOD, DEFECTIVE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5A4FCF", "#8C564B")
INK, MUTED, GREY, FAINT = "#222222", "#6B6B6B", "#BBBBBB", "#E4E4E4"


def shorten(text: str, length: int) -> str:
    """Leave out the middle of a text longer than `length` characters: `crack_near_…_image_0012`."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[len(text) - tail :]}"


def short_names(names: Sequence[str], length: int) -> list[str]:
    """Shortened names that stay distinct; the ones that would collide are numbered."""
    short = [shorten(name, length) for name in names]
    return [
        f"{shorten(name, length - 3)} {i}" if short.count(label) > 1 else label
        for i, (name, label) in enumerate(zip(names, short, strict=True))
    ]
