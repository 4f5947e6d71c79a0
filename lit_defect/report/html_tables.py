"""Tables of a page: digits of the column, best cells strong, heads that explain themselves, long ones folded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lit_defect.report.axes import DASH, MINUS, Scale, fixed, full, short
from lit_defect.report.blocks import Cell, Column, Lines, Table
from lit_defect.report.charts import segments
from lit_defect.report.markup import Markup, element, join, name, prose
from lit_defect.report.series import Arms, swatch

_BRIEF, _LONG = 20, 30  # letters of a cell that does not break, such as 0.91 ± 0.02, and of one that needs width
_CROWDED = 12  # columns from which paper needs small print
_ARROWS = {"larger": ("↑", "larger is better"), "smaller": ("↓", "smaller is better")}


def table(block: Table, arms: Arms) -> Markup:
    """The table; without the page's script all of its rows are there."""
    numeric = [_is_numeric(row[i] for row in block.rows) for i in range(len(block.columns))]
    whole = [all(isinstance(row[i], int | None) for row in block.rows) for i in range(len(block.columns))]
    strong = set(block.strong)
    rows = []
    for r, row in enumerate(block.rows):
        arm = next((cell for cell in row if isinstance(cell, str) and arms.key(cell)), None)
        cells = [
            _cell(cell, column, arms, numeric=numeric[c], whole=whole[c], strong=(r, c) in strong, head=c == 0)
            for c, (cell, column) in enumerate(zip(row, block.columns, strict=True))
        ]
        rows.append(element("tr", *cells, data_arm=arms.key(arm) if arm is not None else None))
    shown = len(rows) if block.folded is None else block.folded
    head = element("tr", *(_head(column, right) for column, right in zip(block.columns, numeric, strict=True)))
    drawn = element(
        "table",
        element("caption", element("span", prose(block.caption))) if block.caption else None,
        element("thead", head),
        element("tbody", *rows[:shown]),
        element("tbody", *rows[shown:], class_="rest") if rows[shown:] else None,
        class_="data crowded" if len(block.columns) > _CROWDED else "data",
        data_folds=len(rows) if rows[shown:] else None,
    )
    box = element("div", drawn, class_="scroll", tabindex=0, role="region", aria_label=block.caption or block.name)
    nothing = None if rows else element("p", "no rows", class_="note")
    return element("div", box, nothing, _explained(block.columns), class_="table")


def values_of(block: Lines) -> Table:
    """A chart's curves in figures, for who wants or needs them so."""
    rows: list[list[Cell]] = []
    shown = []
    for curve in block.curves:
        points = [point for piece in segments(curve, log_x=block.log_x) for point in piece]
        shown += points
        if points:
            low, high = min(points, key=lambda point: point.y), max(points, key=lambda point: point.y)
            rows.append([curve.name, len(points), points[-1].y, low.y, low.x, high.y, high.x])
        else:
            rows.append([curve.name, 0, None, None, None, None, None])
    over, along = Scale.around(point.y for point in shown), Scale.around(point.x for point in shown)
    digits = over.digits() + 1 if over else 3
    places = along.digits() if along and any(point.x % 1 for point in shown) else 0
    y_columns = [Column(head, digits) for head in ("last", "smallest", "largest")]
    at = Column(f"at {block.x_name}", places)
    columns = [Column("curve"), Column("points", 0), *y_columns[:2], at, y_columns[2], at]
    return Table("values", columns, rows)


def _is_numeric(cells: Iterable[Cell]) -> bool:
    given = [cell for cell in cells if cell is not None]
    return bool(given) and sum(not isinstance(cell, str) for cell in given) * 2 > len(given)


def _head(column: Column, right: bool) -> Markup:
    arrow, meaning = _ARROWS.get(column.better or "", ("", ""))
    tip = ". ".join(part for part in (column.help.replace("`", ""), meaning) if part)
    mark = (
        element("span", f"\N{NO-BREAK SPACE}{arrow}", element("span", f" ({meaning})", class_="unseen"))
        if arrow
        else None
    )
    return element(
        "th",
        prose(column.name),
        mark,
        scope="col",
        class_="number" if right else None,
        title=tip or None,
    )


def _cell(cell: Cell, column: Column, arms: Arms, *, numeric: bool, whole: bool, strong: bool, head: bool) -> Markup:
    text, exact = write(cell, column.digits, whole=whole)
    body: Markup | str = text
    if isinstance(cell, str):
        look = arms.look(cell)
        body = join(swatch(look) if look is not None else None, name(cell))
    if strong:
        body = element("strong", body)
    classes = ["number"] if numeric else []
    if isinstance(cell, str):
        classes += ["brief"] if len(cell) <= _BRIEF else ["long"] if len(cell) > _LONG else []
    classes += ["none"] if cell is None or text == "nan" else []
    return element(
        "th" if head and isinstance(cell, str) else "td",
        body,
        class_=" ".join(classes) or None,
        scope="row" if head and isinstance(cell, str) else None,
        title=exact if exact != text else None,
        data_value=full(cell) if isinstance(cell, int | float) and exact != text else None,
    )


def write(cell: Cell, digits: int, *, whole: bool = False) -> tuple[str, str]:
    """A cell as it is shown and, for its tooltip, in full.

    Args:
        cell: None is an en dash; what `digits` would round to zero is written with its power of ten.
        digits: behind the point.
        whole: numbers of this column are counts.
    """
    if cell is None:
        return DASH, DASH
    if isinstance(cell, str):
        return cell, cell
    if isinstance(cell, bool) or (whole and isinstance(cell, int)):
        return str(cell), str(cell)
    if not math.isfinite(cell):
        text = "nan" if math.isnan(cell) else "∞" if cell > 0 else f"{MINUS}∞"
        return text, text
    exact, rounded = full(cell), round(cell, digits)
    if cell and not rounded:
        tiny = short(float(f"{abs(cell):.1e}"))
        return f"{MINUS}{tiny}" if cell < 0 else tiny, exact
    text = fixed(cell, digits)
    return text, text if rounded == float(exact) else exact


def _explained(columns: Sequence[Column]) -> Markup | None:
    """The columns' help, for fingers, keyboards and paper, which have no tooltips."""
    given = [column for column in columns if column.help]
    if not given:
        return None
    entries = (join(element("dt", prose(column.name)), element("dd", prose(column.help))) for column in given)
    return element("details", element("summary", "What the columns mean"), element("dl", *entries), class_="help")
