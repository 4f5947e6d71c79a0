"""What an editing leaves on the screen and in its run folder: counts, reasons, a contact sheet."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_defect.generation.files import read_picture
from lit_defect.generation.store import REJECTED, place, read_area
from lit_defect.reporting.edit_sheets import EditTile, edit_sheet
from lit_defect.tasks.generation_report import print_counts

_SHOWN = 3  # edits of each source's and result's type, and so many of those that were rejected and kept


def write_edited(
    task: Any, sources: str, root: Path, rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any], folder: Path
) -> None:
    """Print the counts and draw `figures/edits.png`.

    Args:
        task: the editor, with its data module.
        sources: split that holds what was edited.
        root: the data set.
        rows: of its manifest.
        counts: by `generation.store.count`.
        folder: the run's.
    """
    console = Console()
    print_counts(console, counts, "edited")
    path = folder / "figures" / "edits.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{task.mode}: {counts['accepted']} of {counts['asked']} accepted"
    edit_sheet(_tiles(task, sources, root, rows), title=title).save(path)
    console.print(f"\ndata set  {root}\nfigure    {path}\n", soft_wrap=True)


def _tiles(task: Any, sources: str, root: Path, rows: Sequence[Mapping[str, Any]]) -> list[EditTile]:
    """Some accepted and some rejected edits of each type, with their sources."""
    data, places = task.data, {s.name: i for i, s in enumerate(task.data.samples[sources])}
    alike: defaultdict[Any, list[tuple[Mapping[str, Any], Path]]] = defaultdict(list)
    for row in rows:
        file = root / row["image"] if row["accepted"] else _kept(root, row)
        if row["source"] in places and file is not None:
            kind = data.samples[sources][places[row["source"]]].defect_type
            alike[row["category"], kind, row["defect_type"], row["accepted"]].append((row, file))
    tiles = []
    for same in alike.values():
        for row, file in same[:: max(1, len(same) // _SHOWN)][:_SHOWN]:
            source = data.original(sources, places[row["source"]])[0]
            tiles.append(EditTile(source, read_picture(file), read_area(root, row), row))
    return tiles


def _kept(root: Path, row: Mapping[str, Any]) -> Path | None:
    """The first rejected candidate that was kept."""
    folder = root / REJECTED / place(row["category"], row["defect_type"])
    kept = folder.glob(f"{row['number']:05d}_*.png")
    return min(kept, key=lambda path: (len(path.name), path.name), default=None)
