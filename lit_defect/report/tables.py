"""The tables of a report as files: CSV with all digits, and LaTeX with those that are shown; and as Markdown."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lit_defect.files import whole_file
from lit_defect.report.axes import cell_text
from lit_defect.report.blocks import Block, Cell, Details, Report, Table
from lit_defect.report.latex import document, latex


def all_tables(report: Report) -> list[Table]:
    """Of all sections, folded ones as well, in order."""
    return [table for section in report.sections for table in _in_blocks(section.blocks)]


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write `NAME.csv` and `NAME.tex` of each table and `tables.tex`, a document of them all; returns the files."""
    written: list[Path] = []
    as_latex: dict[str, str] = {}
    for table in all_tables(report):
        name = _free(file_name(table.name), list(as_latex))
        as_latex[name] = latex(table, name)
        for suffix, text in ((".csv", csv_text(table)), (".tex", as_latex[name])):
            written.append(_write(folder / f"{name}{suffix}", text))
    return [*written, _write(folder / "tables.tex", document(as_latex))]


def csv_text(table: Table) -> str:
    """A head and a line for each row; empty where there is nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(column.name for column in table.columns)
    writer.writerows([_plain(cell) for cell in row] for row in table.rows)
    return text.getvalue()


def markdown(table: Table, most: int = 100) -> str:
    """The table in Markdown with its caption, and how many rows were left out."""
    from lit_defect.reporting.tables import markdown_table

    body = [
        [_of_line(cell_text(cell, column.digits)) for cell, column in zip(row, table.columns, strict=True)]
        for row in table.rows[:most]
    ]
    text = markdown_table([_of_line(column.name) for column in table.columns], body)
    left = f"\n{len(table.rows) - most} more rows are in the CSV file.\n" if len(table.rows) > most else ""
    return f"{text}\n{table.caption}\n{left}"


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


def _of_line(text: str) -> str:
    return text.replace("\n", " ").replace("<", "&lt;")


def _write(path: Path, text: str) -> Path:
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))
    return path
