"""The tables of a report as files: CSV with all digits, and LaTeX (booktabs) with those that are shown."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lit_defect.files import whole_file
from lit_defect.report.blocks import Block, Cell, Column, Details, Report, Table

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "`": r"\textasciigrave{}", '"': r"\textquotedbl{}",
    "\n": " ", "\r": " ", "\t": " ",
}  # fmt: skip
_NUMBER = r"[+-]?\d+(?:\.\d+)?"
_MEAN = re.compile(rf"({_NUMBER})(?: ± ({_NUMBER}))?$")
_LONG = 40
"""Tables of more rows go over several pages."""


def all_tables(report: Report) -> list[Table]:
    """Of all sections, folded ones as well, in order."""
    return [table for section in report.sections for table in _in_blocks(section.blocks)]


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write `NAME.csv` and `NAME.tex` of each table and `tables.tex`, a document of them all; returns the files."""
    written: list[Path] = []
    names: list[str] = []
    for table in all_tables(report):
        name = _free(file_name(table.name), names)
        names.append(name)
        for suffix, text in ((".csv", csv_text(table)), (".tex", latex(table, name))):
            written.append(_write(folder / f"{name}{suffix}", text))
    return [*written, _write(folder / "tables.tex", document(names))]


def csv_text(table: Table) -> str:
    """A head and a line for each row; empty where there is nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(column.name for column in table.columns)
    writer.writerows([_plain(cell) for cell in row] for row in table.rows)
    return text.getvalue()


def latex(table: Table, name: str) -> str:
    r"""A floating table with a caption and the label `tab:NAME`, or a `longtable` where it is long."""
    numeric = [_is_numeric(table.rows, k) for k in range(len(table.columns))]
    spec = "".join("r" if right else "l" for right in numeric)
    strong = set(table.strong)
    head = " & ".join(escape(column.name) for column in table.columns) + r" \\"
    body = [
        " & ".join(_latex_cell(cell, table.columns[k], (i, k) in strong) for k, cell in enumerate(row)) + r" \\"
        for i, row in enumerate(table.rows)
    ]
    caption = rf"\caption{{{escape(table.caption or table.name)}}}\label{{tab:{name}}}"
    if len(table.rows) > _LONG:
        lines = [rf"\begin{{longtable}}{{{spec}}}", caption + r" \\", r"\toprule", head, r"\midrule", r"\endhead"]
        return "\n".join([*lines, *body, r"\bottomrule", r"\end{longtable}", ""])
    lines = [r"\begin{table}", r"\centering", caption, rf"\begin{{tabular}}{{{spec}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def document(names: Sequence[str]) -> str:
    """A document of all tables; names in other scripts than Latin need `lualatex` or `xelatex` and a font of theirs."""
    inputs = "\n".join(rf"\input{{{name}.tex}}" + "\n" + r"\clearpage" for name in names)
    return (
        "% In your own document: \\usepackage{booktabs,longtable} and \\input{NAME.tex}.\n"
        "\\documentclass[10pt]{article}\n\\usepackage[T1]{fontenc}\n\\usepackage[utf8]{inputenc}\n"
        "\\usepackage[landscape,margin=1cm]{geometry}\n\\usepackage{booktabs,longtable}\n"
        f"\\begin{{document}}\n\\tiny\n{inputs}\n\\end{{document}}\n"
    )


def markdown(table: Table, most: int = 100) -> str:
    """The table in Markdown with its caption, and how many rows were left out."""
    from lit_defect.reporting.tables import markdown_table

    body = [
        [_of_line(cell_text(cell, column)) for cell, column in zip(row, table.columns, strict=True)]
        for row in table.rows[:most]
    ]
    text = markdown_table([_of_line(column.name) for column in table.columns], body)
    left = f"\n{len(table.rows) - most} more rows are in the CSV file.\n" if len(table.rows) > most else ""
    return f"{text}\n{table.caption}\n{left}"


def cell_text(cell: Cell, column: Column) -> str:
    """A cell as it is read: numbers with the column's digits, `-` for an empty place."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return "-"
    return f"{cell:.{column.digits}f}" if isinstance(cell, float) else str(cell)


def escape(text: str) -> str:
    """Text for LaTeX, of which nothing is a command."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text if letter.isprintable() or letter in "\n\r\t")


def file_name(name: str) -> str:
    """A name that is one on every file system and in LaTeX."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_") or "table"


def _in_blocks(blocks: Iterable[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Details):
            yield from _in_blocks(block.blocks)


def _free(name: str, taken: Sequence[str]) -> str:
    number, found = 2, name
    while found in (*taken, "tables"):
        found, number = f"{name}_{number}", number + 1
    return found


def _plain(cell: Cell) -> str:
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    return f"{cell:.8g}" if isinstance(cell, float) else str(cell)


def _is_numeric(rows: Sequence[Sequence[Cell]], k: int) -> bool:
    cells = [row[k] for row in rows if row[k] is not None]
    return bool(cells) and all(not isinstance(cell, str) or cell == "-" or _MEAN.match(cell) for cell in cells)


def _latex_cell(cell: Cell, column: Column, strong: bool) -> str:
    text = cell_text(cell, column)
    if found := _MEAN.match(text):
        math_text = found.group(1) + (rf" \pm {found.group(2)}" if found.group(2) else "")
        return rf"{{\boldmath${math_text}$}}" if strong else f"${math_text}$"
    text = "--" if text == "-" else escape(text)
    return rf"\textbf{{{text}}}" if strong else text


def _of_line(text: str) -> str:
    return text.replace("\n", " ").replace("<", "&lt;")


def _write(path: Path, text: str) -> Path:
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))
    return path
