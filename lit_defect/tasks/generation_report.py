"""What a generation leaves on the screen and in its run folder: counts, reasons, and real beside generated defects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from lit_defect.reporting.generated import GeneratedTile, defect_sheet

_SHOWN = 4  # real and generated defects of each type


def write_generated(
    task: Any, root: Path, rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any], folder: Path
) -> None:
    """Print the counts and draw `figures/generated.png`.

    Args:
        task: the generator, with its data module.
        root: the generated data set.
        rows: of its manifest.
        counts: by `generation.store.count`.
        folder: the run's.
    """
    console = Console()
    print_counts(console, counts, "generated")
    path = folder / "figures" / "generated.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    defect_sheet(_tiles(task, root, rows)).save(path)
    console.print(f"\ndata set  {root}\nfigure    {path}\n", soft_wrap=True)


def print_counts(console: Console, counts: Mapping[str, Any], title: str) -> None:
    """Of each category and type what was asked for and accepted; and why candidates were rejected."""
    table = Table(title=title, title_justify="left")
    for column in ("category/type", "asked", "accepted"):
        table.add_column(column, justify="left" if column == "category/type" else "right")
    for pair, numbers in counts["pairs"].items():
        table.add_row(pair, str(numbers["asked"]), str(numbers["accepted"]))
    console.print()
    console.print(table)
    if counts["rejections"]:
        told = ", ".join(f"{times} {reason}" for reason, times in counts["rejections"].items())
        console.print(f"rejected candidates and masks: {told}", soft_wrap=True)


def _tiles(task: Any, root: Path, rows: Sequence[Mapping[str, Any]]) -> list[GeneratedTile]:
    """Some real training defects of each type, then some generated ones with their normal pictures."""
    data, tiles = task.data, []
    for category, kind in task.pairs:
        real = [
            position
            for position, s in enumerate(data.samples["train"])
            if (s.category, s.defect_type, s.source) == (category, kind, "real")
        ]
        for position in real[:: max(1, len(real) // _SHOWN)][:_SHOWN]:
            picture, mask = data.original("train", position)
            tiles.append(GeneratedTile(kind, picture, mask > 0))
        names = {s.name: position for position, s in enumerate(data.samples["sources"])}
        accepted = [r for r in rows if r["accepted"] and (r["category"], r["defect_type"]) == (category, kind)]
        for row in accepted[:: max(1, len(accepted) // _SHOWN)][:_SHOWN]:
            picture = np.asarray(Image.open(root / row["image"]).convert("RGB"))
            mask = np.asarray(Image.open(root / row["mask"])) > 0
            source = data.original("sources", names[row["source"]])[0] if row["source"] in names else None
            tiles.append(GeneratedTile(kind, picture, mask, source, True))
    return tiles
