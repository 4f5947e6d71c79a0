"""Quality of a generated data set as tables: its types, their mean, the real pictures, and the published figures.

The input is what `lit_defect.quality.evaluate` gives, or the quality.json that it wrote. Figures of stand-in networks
carry a star: they rank data sets among themselves, and are not to be compared with published ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

# Name of a figure, what it is called, factor and digits it is shown with; narrow enough for 80 characters.
AS_A_SET = {
    "inception_score": ("IS", 1, 2),
    "ic_lpips": ("IC-LPIPS", 1, 3),
    "kid": ("KID x 1000", 1000, 1),
    "fid": ("FID", 1, 1),
}
BESIDE_SOURCE = {
    "background_lpips": ("LPIPS outside", 1, 4),
    "background_psnr": ("PSNR outside", 1, 1),
    "background_identical": ("exact outside", 1, 2),
    "mask_auroc": ("mask AUROC", 1, 3),
    "mask_average_precision": ("mask AP", 1, 3),
    "mask_iou": ("mask IoU", 1, 3),
}
FIGURES = AS_A_SET | BESIDE_SOURCE

# Means over the categories and types of MVTec AD; DFMGAN as Hu et al. report it.
PUBLISHED: dict[str, dict[str, float]] = {
    "AnomalyDiffusion (AAAI 2024)": {"inception_score": 1.80, "ic_lpips": 0.32},
    "DFMGAN (AAAI 2023)": {"inception_score": 1.72, "ic_lpips": 0.20},
    "SeaS (ICCV 2025)": {"inception_score": 1.88, "ic_lpips": 0.34},
    "DualAnoDiff (CVPR 2025)": {"inception_score": 1.93, "ic_lpips": 0.38},
    "MAGIC (2026)": {"kid": 0.0403},
    "O2MAG (2026)": {"kid": 0.0456},
}


def quality_tables(result: Mapping[str, Any]) -> list[Table]:
    """The pictures as a set, with the real and the published ones; and each beside the picture it was made from."""
    columns = [label for label, _, _ in FIGURES.values()]
    first = _table(f"{result['generator']}: the pictures as a set", columns[: len(AS_A_SET)])
    second = _table("beside their sources: outside the mask, and the mask", columns[len(AS_A_SET) :])
    short = len({name.partition("/")[0] for name in result["types"]}) == 1
    for name, found in result["types"].items():
        label = f"{name.partition('/')[2] if short else name} ({found['counts']['accepted']})"
        _add(first, second, label, found["figures"])
    for table in (first, second):
        table.add_section()
    _add(first, second, "mean of the types", result["figures"])
    first.add_row("real, held out", *_cells(result["real"], AS_A_SET))
    first.add_section()
    for name, values in result["published"].items():
        first.add_row(name, *_cells({key: {"value": value} for key, value in values.items()}, AS_A_SET))
    return [first, second]


def notes(result: Mapping[str, Any]) -> list[str]:
    """What there is to say below the tables: with what the figures were computed, and what undoes a comparison."""
    of_networks: defaultdict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for key, figure in result["figures"].items():
        if "network" in figure:
            of_networks[figure["network"], figure["weights"], figure["published"]].append(FIGURES[key][0])
    lines = [
        f"{', '.join(labels)}: {network}, {weights}"
        + ("." if published else " (*: not the published network and weights; no comparison with published figures).")
        for (network, weights, published), labels in of_networks.items()
    ]
    lines.append("In brackets: accepted pictures. Published: means over the types of MVTec AD.")
    remarks: defaultdict[str, list[str]] = defaultdict(list)  # the same of many types is said once
    for name, found in result["types"].items():
        for key in AS_A_SET:
            figure = found["figures"].get(key, {})
            if figure.get("note") and (key == "fid" or figure["value"] is None):
                remarks[f"{FIGURES[key][0]}: {figure['note']}"].append(name)
    return [*lines, *(f"{remark} ({', '.join(names)})." for remark, names in remarks.items())]


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    table.add_column("", overflow="fold")
    for label in columns:
        table.add_column(label, justify="right")
    return table


def _add(first: Table, second: Table, label: str, figures: Mapping[str, Mapping[str, Any]]) -> None:
    first.add_row(escape(label), *_cells(figures, AS_A_SET))
    second.add_row(escape(label), *_cells(figures, BESIDE_SOURCE))


def _cells(figures: Mapping[str, Mapping[str, Any]], shown: Mapping[str, tuple[str, int, int]]) -> list[str]:
    def cell(key: str, factor: int, digits: int) -> str:
        figure = figures.get(key, {})
        if figure.get("value") is None:
            return "-"
        return f"{factor * figure['value']:.{digits}f}" + ("" if figure.get("published", True) else "*")

    return [cell(key, factor, digits) for key, (_, factor, digits) in shown.items()]
