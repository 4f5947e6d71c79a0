"""Tables as LaTeX: booktabs, nothing wider than the page, and nothing in a name that LaTeX would take for a command.

A table whose letters would not fit on a line of `article` breaks its heads and long cells, and is scaled to the line if
that does not do; one of many lines goes over several pages. The first line of each file says which packages it needs.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

from lit_defect.report.axes import cell_text
from lit_defect.report.blocks import Cell, Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "`": r"\textasciigrave{}", '"': r"\char34{}",
    "\n": " ", "\r": " ", "\t": " ",
}  # fmt: skip
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?)(?:e([+-]?\d+))?(?: ± (\d+(?:\.\d+)?))?$")
_LONG_WORD, _SEPARATOR = re.compile(r"\S{18,}"), re.compile(r"(\\_|[/.,=:])(?=.)")
_ARROWS = {"larger": r" $\uparrow$", "smaller": r" $\downarrow$"}
_LINE = 60
"""Letters, gaps included, on a line of `article`."""
_BREAKS = 26
"""Letters of a text from which it breaks in a table that would be too wide."""
_HEAD = 9
"""Letters of a head, at least, before it breaks."""
_SMALL = 92
"""Letters on a line in the small print of tables over several pages."""
_LONG = 40
"""Tables of more lines go over several pages."""
_PUNCTUATION = (0x2013, 0x2014, 0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2026)
_KNOWN = frozenset(map(chr, (*range(0x180), *_PUNCTUATION))) - set("ĦħĸĿŀŉŦŧſ")
"""Letters that pdflatex has."""


def latex(table: Table, name: str) -> str:
    r"""A floating table with a caption and the label `tab:NAME`, or a `longtable` where it is long."""
    layout = _Layout(table)
    strong = set(table.strong)
    columns = range(len(table.columns))
    head = " & ".join(layout.head(k) for k in columns) + r" \\"
    body = [
        " & ".join(layout.cell(i, k, strong=(i, k) in strong) for k in columns) + r" \\" for i in range(len(table.rows))
    ]
    caption = rf"\caption{{{_breakable(table.caption or table.name)}}}\label{{tab:{name}}}"
    packages = ["array", "booktabs", "longtable" if layout.long else "graphicx" if layout.wide else ""]
    lines = [rf"% \usepackage{{{','.join(filter(None, packages))}}}"]
    if foreign(" ".join([head, *body, caption])):
        lines.append("% holds letters that pdflatex has not: lualatex or xelatex, and a font that has them")
    if layout.long:
        size = [r"\begingroup\scriptsize\setlength{\tabcolsep}{3pt}"] if layout.wide else [r"\begingroup"]
        lines += [*size, rf"\begin{{longtable}}{{{layout.spec}}}", caption + r" \\", r"\toprule", head]
        lines += [r"\midrule", r"\endhead", *body, r"\bottomrule", r"\end{longtable}", r"\endgroup", ""]
        return "\n".join(lines)
    lines += [r"\begin{table}", r"\centering", caption]
    scaled = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    lines += [*([scaled] if layout.wide else []), rf"\begin{{tabular}}{{{layout.spec}}}", r"\toprule", head]
    end = r"\end{tabular}}" if layout.wide else r"\end{tabular}"
    return "\n".join([*lines, r"\midrule", *body, r"\bottomrule", end, r"\end{table}", ""])


def document(tables: Mapping[str, str]) -> str:
    """A document of all tables, by the names of their files; what pdflatex has no letter for stands by its number."""
    inputs = "\n".join(rf"\input{{{name}.tex}}" + "\n" + r"\clearpage" for name in tables)
    letters = sorted(set().union(*map(foreign, tables.values())))
    declared = "".join(rf"\DeclareUnicodeCharacter{{{ord(one):04X}}}{{[{ord(one):04X}]}}" + "\n" for one in letters)
    return (
        "% In your own document: the packages that the first line of a file names, and \\input{NAME.tex}.\n"
        "\\documentclass[10pt]{article}\n"
        "\\ifdefined\\directlua\\usepackage{fontspec}\\else\\ifdefined\\XeTeXversion\\usepackage{fontspec}\\else\n"
        f"\\usepackage[T1]{{fontenc}}\\usepackage[utf8]{{inputenc}}\n{declared}\\fi\\fi\n"
        "\\usepackage[landscape,margin=1cm]{geometry}\n\\usepackage{array,booktabs,graphicx,longtable}\n"
        f"\\begin{{document}}\n\\footnotesize\n{inputs}\n\\end{{document}}\n"
    )


def escape(text: str) -> str:
    """Text for LaTeX, of which nothing is a command; accents and their letters are one, as in no file name of macOS."""
    letters = unicodedata.normalize("NFC", text)
    return "".join(_SPECIAL.get(letter, letter) for letter in letters if letter.isprintable() or letter in "\n\r\t")


def _breakable(text: str) -> str:
    """The same, and its long words may break behind their separators."""
    return _LONG_WORD.sub(lambda word: _SEPARATOR.sub(r"\1\\allowbreak{}", word.group()), escape(text))


def foreign(text: str) -> set[str]:
    """Letters of a text that pdflatex has not."""
    return set(text) - _KNOWN


class _Layout:
    """How the columns of a table stand: flush left or right, or broken where the table would be too wide.

    Attributes:
        wide: it would not fit on a line as it is.
        long: it goes over several pages.
        spec: the columns for `tabular` or `longtable`.
    """

    def __init__(self, table: Table) -> None:
        self._columns = table.columns
        self._texts = [
            [cell_text(cell, column.digits) for cell, column in zip(row, table.columns, strict=True)]
            for row in table.rows
        ]
        numeric = [_is_numeric(table.rows, k) for k in range(len(table.columns))]
        cells = [max((len(row[k]) for row in self._texts), default=0) for k in range(len(table.columns))]
        heads = [len(column.name) + 2 * bool(column.better) for column in table.columns]
        self.wide = sum(map(max, cells, heads)) + 2 * len(cells) > _LINE
        self._broken = [self.wide and not right and cell > _BREAKS for right, cell in zip(numeric, cells, strict=True)]
        self._letters = [
            min(_BREAKS, cell) if broken else max(cell, min(head, _HEAD) if self.wide else head)
            for broken, cell, head in zip(self._broken, cells, heads, strict=True)
        ]
        lines = sum(max((self._lines(text, k) for k, text in enumerate(row)), default=1) for row in self._texts)
        self.long = lines > _LONG
        self._right = numeric
        self.spec = "".join(map(self._kind, range(len(cells))))

    def head(self, k: int) -> str:
        """The head of a column, on several lines where it is broader than what stands below."""
        column = self._columns[k]
        arrow = _ARROWS.get(column.better or "", "")
        if self._broken[k]:
            return _breakable(column.name) + arrow
        lines = _lines_of(column.name, self._letters[k]) if self.wide else [column.name]
        text = r"\\".join(map(escape, lines)) + arrow
        if len(lines) == 1:
            return text
        return rf"\begin{{tabular}}[b]{{@{{}}{'r' if self._right[k] else 'l'}@{{}}}}{text}\end{{tabular}}"

    def cell(self, i: int, k: int, *, strong: bool) -> str:
        """A cell; numbers in mathematical mode."""
        text = self._texts[i][k]
        if found := _NUMBER.match(text):
            value, power, spread = found.groups()
            value += rf" \cdot 10^{{{int(power)}}}" if power else ""
            value += rf" \pm {spread}" if spread else ""
            return rf"{{\boldmath${value}$}}" if strong else f"${value}$"
        text = "--" if text == "-" else _breakable(text) if self._broken[k] else escape(text)
        return rf"\textbf{{{text}}}" if strong else text

    def _lines(self, text: str, k: int) -> int:
        return math.ceil(1.25 * len(text) / self._letters[k]) if self._broken[k] else 1  # lines end early

    def _kind(self, k: int) -> str:
        if not self._broken[k]:
            return "r" if self._right[k] else "l"
        width = f"{0.5 * _BREAKS:.0f}em"
        if self.long:  # what the other columns leave of the line
            given = sum(letters + 2 for letters, broken in zip(self._letters, self._broken, strict=True) if not broken)
            share = max(0.08, (1 - given / _SMALL) / sum(self._broken))
            width = rf"{share:.2f}\linewidth"
        return rf">{{\raggedright\arraybackslash}}p{{{width}}}"


def _lines_of(text: str, letters: int) -> list[str]:
    """A head on lines of so many letters, broken behind blanks and separators."""
    lines = [""]
    for word in re.split(r"(?<=[ _/.,=-])", text):
        if lines[-1] and len(lines[-1] + word.rstrip()) > letters:
            lines.append("")
        lines[-1] += word
    return [line.strip() for line in lines]


def _is_numeric(rows: Sequence[Sequence[Cell]], k: int) -> bool:
    cells = [row[k] for row in rows if row[k] is not None]
    return bool(cells) and all(not isinstance(cell, str) or cell == "-" or _NUMBER.match(cell) for cell in cells)
